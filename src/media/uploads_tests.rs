//! What is durable, what is doubted, and what is left after an end.

use std::convert::Infallible;

use aws_lc_rs::digest;
use bytes::Bytes;
use chrono::TimeDelta;
use futures_util::stream;
use sha2::Digest;

use super::append::{NOTED_BYTES, NOTED_EVERY};
use super::*;
use crate::config::BlobStore;

struct Place {
    dir: tempfile::TempDir,
    reservations: Reservations,
}

impl Place {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), reservations: Reservations::default() }
    }

    /// As after a start.
    fn uploads(&self) -> Arc<Uploads> {
        let blobs = Blobs::open(&BlobStore::File, self.dir.path()).unwrap();
        Arc::new(Uploads::open(&blobs, &self.reservations).unwrap())
    }

    fn files(&self) -> usize {
        fs::read_dir(self.dir.path().join("blobs/uploads")).unwrap().count()
    }
}

const ID: Uuid = Uuid::from_u128(7);

fn ada() -> UserId {
    UserId::try_from("ada".to_owned()).unwrap()
}

fn at(second: i64) -> DateTime<Utc> {
    DateTime::UNIX_EPOCH + TimeDelta::seconds(second)
}

async fn create(place: &Place, uploads: &Arc<Uploads>, length: u64) {
    try_create(place, uploads, length).await.unwrap();
}

async fn try_create(place: &Place, uploads: &Arc<Uploads>, length: u64) -> Result<(), Error> {
    let wanted = Wanted {
        id: ID,
        user_id: ada(),
        length,
        filename: "a.png".to_owned(),
        declared_type: None,
        metadata: Map::new(),
        described: String::new(),
        expires_at: at(100),
        whole: None,
    };
    let room = place.reservations.reserve(&ada(), length, |_| Ok::<_, Infallible>(()));
    let Ok(room) = room;
    uploads.claim(ID)?.create(wanted, room).await
}

async fn hold(uploads: &Arc<Uploads>) -> Held {
    uploads.hold(uploads.find(ID, at(0)).unwrap()).await.unwrap()
}

/// Chunks; `cut` breaks the body off.
async fn append(held: &mut Held, body: &[&'static str], sum: Option<&[u8]>) -> (String, u64) {
    let chunk = |text: &&'static str| match *text {
        "cut" => Err("broken"),
        text => Ok(Bytes::from_static(text.as_bytes())),
    };
    let body = stream::iter(body.iter().map(chunk).collect::<Vec<_>>());
    let appended = held.append(body, sum.map(promised)).await.unwrap();
    (format!("{:?}", appended.ended), appended.offset)
}

fn promised(digest: &[u8]) -> Checksum {
    Checksum { algorithm: Algorithm::Sha1, digest: digest.to_vec() }
}

fn sha1(text: &str) -> Vec<u8> {
    digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, text.as_bytes()).as_ref().to_vec()
}

#[tokio::test]
async fn what_was_broken_off_goes_on_after_a_restart_and_becomes_a_blob() {
    let place = Place::new();
    let uploads = place.uploads();
    create(&place, &uploads, 11).await;
    let mut held = hold(&uploads).await;
    let broken = append(&mut held, &["hel", "lo", "cut"], None).await;
    assert_eq!(broken, ("BrokenOff(\"broken\")".to_owned(), 5));
    drop((held, uploads));
    assert_eq!(place.reservations.of(&ada()), 0);

    let uploads = place.uploads();
    assert_eq!(place.reservations.of(&ada()), 11);
    let mut held = hold(&uploads).await;
    assert_eq!((held.offset(), held.is_full()), (5, false));
    assert_eq!(append(&mut held, &[" wor", "ld"], None).await, ("Whole".to_owned(), 11));
    assert!(uploads.blobs().is_empty());
    let stored = held.store().await.unwrap();
    assert_eq!(stored.sha256, hex::encode(Sha256::digest("hello world")));
    assert!(uploads.blobs().contains(&stored.sha256));
    drop((held, uploads));

    // The event was not recorded before the crash: it is all there to do it again.
    let uploads = place.uploads();
    assert!(uploads.blobs().contains(&stored.sha256));
    let mut held = hold(&uploads).await;
    assert!(held.is_full());
    assert_eq!(held.store().await.unwrap(), stored);
    held.end().await.unwrap();
    assert!(uploads.find(ID, at(0)).is_none());
    assert_eq!((place.files(), place.reservations.of(&ada())), (0, 0));
}

#[tokio::test]
async fn bytes_whose_checksum_is_wrong_or_that_are_too_many_change_nothing() {
    let place = Place::new();
    let uploads = place.uploads();
    create(&place, &uploads, 10).await;
    let mut held = hold(&uploads).await;
    let good = sha1("hello");
    assert_eq!(append(&mut held, &["hel", "la"], Some(&good)).await, ("Corrupted".to_owned(), 0));
    assert_eq!(append(&mut held, &["hel", "lo"], Some(&good)).await, ("Whole".to_owned(), 5));
    let cut = append(&mut held, &["hello", "cut"], Some(&good)).await;
    assert_eq!(cut, ("BrokenOff(\"broken\")".to_owned(), 5));
    assert_eq!(append(&mut held, &["hello", "!"], None).await, ("TooLong".to_owned(), 5));
    assert_eq!(append(&mut held, &["hello"], None).await, ("Whole".to_owned(), 10));
    let stored = held.store().await.unwrap();
    assert_eq!(stored.sha256, hex::encode(Sha256::digest("hellohello")));
}

/// Bytes that nobody has synced or compared with their checksum, or whose number alone has come to the
/// disk.
#[tokio::test]
async fn bytes_behind_those_that_count_are_cut_off_after_a_crash() {
    let place = Place::new();
    let uploads = place.uploads();
    create(&place, &uploads, 10).await;
    append(&mut hold(&uploads).await, &["hello", "cut"], None).await;
    fs::write(uploads.path(ID, "part"), "helloBAD").unwrap();
    drop(uploads);
    let uploads = place.uploads();
    let mut held = hold(&uploads).await;
    assert_eq!((held.offset(), place.files()), (5, 3));
    assert_eq!(fs::read(uploads.path(ID, "part")).unwrap(), b"hello");
    assert_eq!(append(&mut held, &["world"], None).await, ("Whole".to_owned(), 10));
    let stored = held.store().await.unwrap();
    assert_eq!(stored.sha256, hex::encode(Sha256::digest("helloworld")));
}

#[tokio::test]
async fn an_upload_goes_on_with_what_is_left_where_a_disk_has_lost_bytes_or_their_number() {
    let short_part: (_, Option<&[u8]>, _) = ("part", Some(b"he"), 2);
    for (name, left, offset) in
        [short_part, ("offset", Some(b"he"), 0), ("offset", Some(b"\xff"), 0), ("offset", None, 0)]
    {
        let place = Place::new();
        let uploads = place.uploads();
        create(&place, &uploads, 10).await;
        append(&mut hold(&uploads).await, &["hello"], None).await;
        match left {
            Some(bytes) => fs::write(uploads.path(ID, name), bytes).unwrap(),
            None => fs::remove_file(uploads.path(ID, name)).unwrap(),
        }
        drop(uploads);
        let uploads = place.uploads();
        assert_eq!(hold(&uploads).await.offset(), offset, "{name} {left:?}");
        assert_eq!(uploads.note(ID).read().unwrap(), Some(offset), "{name} {left:?}");
        append(&mut hold(&uploads).await, &[&"helloworld"[offset as usize..]], None).await;
        drop(uploads);
        let stored = hold(&place.uploads()).await.store().await.unwrap();
        assert_eq!(stored.sha256, hex::encode(Sha256::digest("helloworld")));
    }
}

const MIB: usize = 1024 * 1024;

/// Six megabytes of a body; before the last one something happens.
fn long_body(happens: impl Fn()) -> impl futures_util::Stream<Item = Result<Bytes, Infallible>> {
    stream::iter((0..6).map(move |number| {
        if number == 5 {
            happens();
        }
        Ok(Bytes::from(vec![number; MIB]))
    }))
}

/// What a crash would leave now, as an upload of another place.
fn crash(uploads: &Uploads, other: &Place) {
    let spool = other.uploads().spool.clone();
    for name in ["json", "part", "offset"].map(|it| format!("{ID}.{it}")) {
        fs::copy(uploads.spool.join(&name), spool.join(&name)).unwrap();
    }
}

async fn offset_after_a_crash_in_the_midst(checksum: Option<Checksum>) -> u64 {
    let (place, other) = (Place::new(), Place::new());
    let uploads = place.uploads();
    create(&place, &uploads, 7 * MIB as u64).await;
    let mut held = hold(&uploads).await;
    append(&mut held, &["hello"], None).await;
    held.append(long_body(|| crash(&uploads, &other)), checksum).await.unwrap();
    hold(&other.uploads()).await.offset()
}

#[tokio::test]
async fn a_crash_in_the_midst_of_a_long_body_costs_no_more_than_a_few_megabytes() {
    assert_eq!(offset_after_a_crash_in_the_midst(None).await, 5 + NOTED_BYTES);
    let checksum = Some(promised(b"whatever"));
    assert_eq!(offset_after_a_crash_in_the_midst(checksum).await, 5, "nothing was compared");
}

#[tokio::test(start_paused = true)]
async fn what_comes_slowly_is_noted_every_few_seconds() {
    let (place, other) = (Place::new(), Place::new());
    let uploads = place.uploads();
    create(&place, &uploads, 10).await;
    let mut held = hold(&uploads).await;
    let body = stream::iter([Ok::<_, Infallible>(Bytes::from_static(b"hello"))]);
    let body = futures_util::StreamExt::chain(body, stream::pending());
    let append = tokio::spawn(async move { held.append(body, None).await.map(drop) });
    tokio::time::sleep(2 * NOTED_EVERY).await;
    crash(&uploads, &other);
    assert_eq!(hold(&other.uploads()).await.offset(), 5);
    append.abort();
}

#[tokio::test]
async fn what_was_noted_of_an_append_that_failed_does_not_count_for_the_bytes_of_the_next() {
    let (place, other) = (Place::new(), Place::new());
    let uploads = place.uploads();
    create(&place, &uploads, 12 * MIB as u64).await;
    let mut held = hold(&uploads).await;
    append(&mut held, &["hello"], None).await;
    // Four megabytes are noted, the end of the body cannot be.
    let (note, aside) = (uploads.note(ID).0, place.dir.path().join("aside"));
    let body = long_body(|| fs::rename(&note, &aside).unwrap());
    assert!(matches!(held.append(body, None).await, Err(Error::Io(_))));
    fs::rename(&aside, &note).unwrap();
    held.append(long_body(|| crash(&uploads, &other)), Some(promised(b"whatever"))).await.unwrap();
    assert_eq!(hold(&other.uploads()).await.offset(), 5);
}

#[tokio::test]
async fn a_long_body_that_does_not_count_is_not_noted_either() {
    let place = Place::new();
    let uploads = place.uploads();
    create(&place, &uploads, NOTED_BYTES + 5).await;
    let mut held = hold(&uploads).await;
    append(&mut held, &["hello"], None).await;
    let body = [vec![0; NOTED_BYTES as usize], vec![0]].map(|it| Ok::<_, Infallible>(it.into()));
    let appended = held.append(stream::iter(body), None).await.unwrap();
    assert!(matches!(appended.ended, Ended::TooLong));
    assert_eq!((appended.offset, uploads.note(ID).read().unwrap()), (5, Some(5)));
}

/// Else a power cut could leave its length, and zeros that count.
#[test]
fn bytes_are_not_cut_off_before_they_no_longer_count() {
    let place = tempfile::tempdir().unwrap();
    let note = Note(place.path().join("offset"));
    let path = place.path().join("part");
    fs::write(&path, "hello").unwrap();
    let part = File::options().write(true).open(&path).unwrap();
    assert!(note.cut(&part, 2).is_err());
    assert_eq!(fs::read(&path).unwrap(), b"hello");
    note.create().unwrap();
    note.cut(&part, 2).unwrap();
    assert_eq!((fs::read(&path).unwrap(), note.read().unwrap()), (b"he".to_vec(), Some(2)));
}

#[tokio::test]
async fn an_append_that_cannot_be_noted_counts_for_nothing() {
    let place = Place::new();
    let uploads = place.uploads();
    create(&place, &uploads, 10).await;
    let mut held = hold(&uploads).await;
    append(&mut held, &["hello"], None).await;
    // When all of the body has come, its bytes cannot be noted.
    let (note, aside) = (uploads.note(ID).0, place.dir.path().join("aside"));
    let body = stream::iter(["wor", "ld"].into_iter().map(|chunk| {
        if chunk == "ld" {
            fs::rename(&note, &aside).unwrap();
        }
        Ok::<_, Infallible>(Bytes::from_static(chunk.as_bytes()))
    }));
    assert!(matches!(held.append(body, None).await, Err(Error::Io(_))));
    assert_eq!(held.offset(), 5);
    fs::rename(&aside, &note).unwrap();
    assert_eq!(append(&mut held, &["world"], None).await, ("Whole".to_owned(), 10));
    let stored = held.store().await.unwrap();
    assert_eq!(stored.sha256, hex::encode(Sha256::digest("helloworld")));
}

#[tokio::test]
async fn a_beginning_that_failed_leaves_nothing_and_may_be_tried_again() {
    let place = Place::new();
    let uploads = place.uploads();
    // In the way of what is written after the bytes' file.
    let draft = uploads.path(ID, "draft");
    fs::create_dir(&draft).unwrap();
    assert!(matches!(try_create(&place, &uploads, 5).await, Err(Error::Io(_))));
    fs::remove_dir(&draft).unwrap();
    assert_eq!((place.files(), place.reservations.of(&ada())), (0, 0));
    // As a failure leaves it that could not even remove what it had made.
    fs::write(uploads.path(ID, "part"), "x").unwrap();
    create(&place, &uploads, 5).await;
    assert!(matches!(try_create(&place, &uploads, 5).await, Err(Error::Busy)));
    assert_eq!(place.reservations.of(&ada()), 5);
    let mut held = hold(&uploads).await;
    assert_eq!(append(&mut held, &["hello"], None).await, ("Whole".to_owned(), 5));
    assert_eq!(held.store().await.unwrap().sha256, hex::encode(Sha256::digest("hello")));
}

#[tokio::test]
async fn a_beginning_whose_request_is_dropped_is_done_all_the_same() {
    let place = Place::new();
    let uploads = place.uploads();
    tokio::select! {
        biased;
        () = create(&place, &uploads, 5) => {}
        () = std::future::ready(()) => {}
    }
    // Bounded, so that a failure is a failure.
    tokio::time::timeout(Duration::from_secs(60), async {
        while uploads.find(ID, at(0)).is_none() {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
    assert_eq!(place.reservations.of(&ada()), 5);
}

#[tokio::test]
async fn an_id_that_is_being_begun_cannot_be_begun_by_another() {
    let place = Place::new();
    let uploads = place.uploads();
    let claimed = uploads.claim(ID).unwrap();
    assert!(matches!(uploads.claim(ID), Err(Error::Busy)));
    drop(claimed);
    create(&place, &uploads, 5).await;
    assert!(matches!(uploads.claim(ID), Err(Error::Busy)));
}

#[tokio::test]
async fn an_end_whose_request_is_dropped_is_an_end_all_the_same() {
    let place = Place::new();
    let uploads = place.uploads();
    create(&place, &uploads, 5).await;
    let upload = uploads.find(ID, at(0)).unwrap();
    let held = uploads.hold(Arc::clone(&upload)).await.unwrap();
    tokio::select! {
        biased;
        ended = held.end() => ended.unwrap(),
        () = std::future::ready(()) => {}
    }
    let next = tokio::time::timeout(Duration::from_secs(60), uploads.hold(upload)).await;
    assert!(matches!(next.unwrap(), Err(Error::Gone)));
    assert!(uploads.find(ID, at(0)).is_none());
    assert_eq!((place.files(), place.reservations.of(&ada())), (0, 0));
}

#[tokio::test]
async fn an_upload_that_is_over_leaves_nothing() {
    let place = Place::new();
    let uploads = place.uploads();
    create(&place, &uploads, 10).await;
    append(&mut hold(&uploads).await, &["hello"], None).await;
    assert_eq!(uploads.sweep(at(99)).await, 0);
    assert!(uploads.find(ID, at(100)).is_none());
    let held = hold(&uploads).await;
    assert_eq!(uploads.sweep(at(100)).await, 0, "it is in use");
    drop(held);
    assert_eq!(uploads.sweep(at(100)).await, 1);
    assert_eq!((place.files(), place.reservations.of(&ada())), (0, 0));
}

#[tokio::test]
async fn who_comes_again_takes_the_turn_from_a_connection_that_hangs() {
    let place = Place::new();
    let uploads = place.uploads();
    create(&place, &uploads, 10).await;
    let mut held = hold(&uploads).await;
    let body = stream::iter([Ok::<_, Infallible>(Bytes::from_static(b"hello"))]);
    let hanging = tokio::spawn(async move {
        held.append(futures_util::StreamExt::chain(body, stream::pending()), None).await.unwrap()
    });
    tokio::task::yield_now().await;
    let second = hold(&uploads).await;
    let appended = hanging.await.unwrap();
    assert!(matches!(appended.ended, Ended::Hurried));
    assert_eq!(second.offset(), appended.offset);
}

#[tokio::test]
async fn what_an_end_could_not_remove_is_no_upload_and_is_swept_later() {
    let place = Place::new();
    let uploads = place.uploads();
    create(&place, &uploads, 5).await;
    let note = uploads.note(ID).0;
    fs::remove_file(&note).unwrap();
    fs::create_dir(&note).unwrap();
    let upload = uploads.find(ID, at(0)).unwrap();
    assert!(matches!(hold(&uploads).await.end().await, Err(Error::Io(_))));
    assert!(matches!(uploads.hold(upload).await, Err(Error::Gone)));
    assert!(uploads.find(ID, at(0)).is_none());
    assert!(!uploads.end_of(&ada()).await);
    fs::remove_dir(&note).unwrap();
    assert_eq!(uploads.sweep(at(0)).await, 1);
    assert_eq!((place.files(), place.reservations.of(&ada())), (0, 0));
}

#[tokio::test]
async fn what_nobody_acknowledged_is_swept_at_the_start() {
    let place = Place::new();
    drop(place.uploads());
    let spool = place.dir.path().join("blobs/uploads");
    fs::write(spool.join(format!("{ID}.part")), "x").unwrap();
    fs::write(spool.join(format!("{ID}.draft")), "{").unwrap();
    place.uploads();
    assert_eq!(place.files(), 0);
    for name in ["json", "part", "offset"].map(|it| format!("{ID}.{it}")) {
        fs::write(spool.join(name), "{").unwrap();
    }
    assert!(place.uploads().find(ID, at(0)).is_none());
    assert_eq!(place.files(), 0);
}
