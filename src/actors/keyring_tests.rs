//! What is sealed, what opens it and where, and what a destroyed or a lost key means.

use bytes::Bytes;
use std::path::Path;

use super::*;
use crate::config::BlobStore;
use crate::domain::ids::SessionId;
use crate::domain::session::{self, Session};
use crate::domain::text::Personal;
use crate::domain::user::{self, Profile, Told, User};

const MARKER: &str = "ada@example.com";

fn keyring(dir: &Path) -> Keyring {
    let blobs = Blobs::open(&BlobStore::File, dir).unwrap();
    Keyring::new(&blobs, MasterKey::kept_in(&dir.join("master.key")))
}

fn id(name: &str) -> UserId {
    UserId::try_from(name.to_owned()).unwrap()
}

fn registered(email: Personal<String>) -> user::Event {
    let profile = Profile { email: Some(email), ..Profile::default() };
    user::Event::Registered {
        profile: Box::new(profile),
        provisional: false,
        told: Told::default(),
        claimed_at: None,
    }
}

fn known() -> user::Event {
    registered(Personal::Known(MARKER.to_owned()))
}

fn recorded(stream: &str, (kind, data): (String, Vec<u8>)) -> Recorded {
    Recorded {
        id: uuid::Uuid::nil(),
        stream: stream.into(),
        revision: 0,
        position: 1,
        kind: kind.into(),
        time: DateTime::UNIX_EPOCH,
        data: data.into(),
        metadata: Bytes::new(),
        hash: [0; 32],
    }
}

async fn opened(keyring: &Keyring, record: &Recorded) -> Result<user::Event, codec::Error> {
    let (mut events, failed) = keyring.decode::<User>(std::slice::from_ref(record)).await.unwrap();
    failed.map_or_else(|| Ok(events.remove(0)), Err)
}

fn key_file(dir: &Path, user: &str) -> std::path::PathBuf {
    dir.join("blobs/keys").join(user)
}

#[tokio::test]
async fn what_is_personal_is_sealed_in_the_log_and_known_to_every_node() {
    let dir = tempfile::tempdir().unwrap();
    let here = keyring(dir.path());
    let sealed = here.encode::<User>("user-ada", &known()).await.unwrap();
    assert!(!String::from_utf8_lossy(&sealed.1).contains(MARKER));
    let record = recorded("user-ada", sealed);
    for node in [here, keyring(dir.path())] {
        assert_eq!(opened(&node, &record).await, Ok(known()));
        let any = node.decode_each(std::slice::from_ref(&record)).await.unwrap();
        assert_eq!(any, [Ok(AnyEvent::User(id("ada"), known()))]);
        let shown = node.open_json("user-ada", &record.kind, &record.data).await.unwrap();
        assert_eq!(shown["profile"]["email"], MARKER);
    }
}

#[tokio::test]
async fn nothing_sealed_opens_anywhere_else() {
    let dir = tempfile::tempdir().unwrap();
    let keyring = keyring(dir.path());
    let (kind, data) = keyring.encode::<User>("user-ada", &known()).await.unwrap();
    keyring.encode::<User>("user-bob", &known()).await.unwrap();
    let text = String::from_utf8(data.clone()).unwrap();
    let elsewhere = [
        recorded("user-bob", (kind.clone(), data.clone())),
        recorded("user-ada", (kind.clone(), text.replace("email", "username").into())),
        recorded(
            "user-ada",
            (
                "user.profile_changed.v1".to_owned(),
                text.replace(
                    "\"provisional\":false",
                    "\"source_updated_at\":\"2026-01-01T00:00:00Z\"",
                )
                .into(),
            ),
        ),
    ];
    for record in elsewhere {
        let refused = opened(&keyring, &record).await;
        assert!(matches!(&refused, Err(codec::Error::BadData { .. })), "{refused:?}");
        let shown = keyring.open_json(&record.stream, &record.kind, &record.data).await.unwrap();
        assert!(!shown.to_string().contains(MARKER) && shown.to_string().contains("sealed"));
    }
}

#[tokio::test]
async fn a_destroyed_key_erases_what_it_sealed_and_what_comes_later() {
    let dir = tempfile::tempdir().unwrap();
    let (here, there) = (keyring(dir.path()), keyring(dir.path()));
    let record = recorded("user-ada", here.encode::<User>("user-ada", &known()).await.unwrap());
    let destroyed = here.destroy(&id("ada"), DateTime::UNIX_EPOCH).await.unwrap();
    assert_eq!(destroyed, Destroyed { tombstone: true, key: true });
    let again = here.destroy(&id("ada"), DateTime::UNIX_EPOCH).await.unwrap();
    assert_eq!(again, Destroyed { tombstone: false, key: false });
    assert!(!key_file(dir.path(), "ada").exists());
    for node in [&here, &there] {
        assert_eq!(opened(node, &record).await, Ok(registered(Personal::Erased)));
        let shown = node.open_json("user-ada", &record.kind, &record.data).await.unwrap();
        assert_eq!(shown["profile"]["email"], json!({ "erased": true }));
        let (_, later) = node.encode::<User>("user-ada", &known()).await.unwrap();
        assert!(String::from_utf8_lossy(&later).contains(r#""email":{"erased":true}"#));
    }
    assert_eq!(there.erased().await.unwrap(), [id("ada")]);
}

#[tokio::test]
async fn a_copy_of_a_key_that_a_crash_left_goes_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let keyring = keyring(dir.path());
    keyring.encode::<User>("user-ada", &known()).await.unwrap();
    let copies = ["ada#1", "ada#2", "adam#1"].map(|name| key_file(dir.path(), name));
    let copy =
        || copies.iter().for_each(|to| drop(std::fs::copy(copies[2].with_file_name("ada"), to)));
    copy();
    keyring.destroy(&id("ada"), DateTime::UNIX_EPOCH).await.unwrap();
    assert_eq!(copies.each_ref().map(|path| path.exists()), [false, false, true]);
    // One that was erased before this was seen to.
    std::fs::copy(&copies[2], &copies[0]).unwrap();
    let again = keyring.destroy(&id("ada"), DateTime::UNIX_EPOCH).await.unwrap();
    assert_eq!((again.key, copies[0].exists()), (false, false));
}

#[tokio::test]
async fn a_key_made_while_it_was_destroyed_does_not_stay() {
    let dir = tempfile::tempdir().unwrap();
    let (here, there) = (keyring(dir.path()), keyring(dir.path()));
    // The tombstone is there, and the other node has found no key before it was.
    here.destroy(&id("ada"), DateTime::UNIX_EPOCH).await.unwrap();
    there.vault.create("ada", &[7; KEY_BYTES]).await.unwrap();
    let who_looks_just_then = keyring(dir.path());
    let found = who_looks_just_then.find(&id("ada")).await.unwrap();
    assert!(matches!(found, Some(Holding::Erased)));
    assert!(here.bury(&id("ada")).await.unwrap());
    assert!(matches!(there.of(&id("ada")).await.unwrap(), Holding::Erased));
    assert!(!key_file(dir.path(), "ada").exists());
}

#[tokio::test]
async fn a_lost_key_is_an_error_that_names_the_user_and_the_good_events_stand() {
    let dir = tempfile::tempdir().unwrap();
    let first = keyring(dir.path());
    let mut records = vec![];
    for user in ["bob", "ada"] {
        let stream = format!("user-{user}");
        records.push(recorded(&stream, first.encode::<User>(&stream, &known()).await.unwrap()));
    }
    std::fs::remove_file(key_file(dir.path(), "ada")).unwrap();
    let mut events = keyring(dir.path()).decode_each(&records).await.unwrap();
    let failed = events.remove(1).unwrap_err();
    assert_eq!(events, [Ok(AnyEvent::User(id("bob"), known()))]);
    assert_eq!(failed, codec::Error::NoKey("ada".to_owned()));
    assert!(failed.to_string().contains("t2m erase ada"), "{failed}");
    // The process that still knows the key goes on: no disk is asked twice.
    assert_eq!(opened(&first, &records[1]).await, Ok(known()));
}

#[tokio::test]
async fn a_damaged_key_is_an_error_that_names_the_user_and_the_good_events_stand() {
    let dir = tempfile::tempdir().unwrap();
    let first = keyring(dir.path());
    let mut records = vec![];
    for user in ["bob", "ada"] {
        let stream = format!("user-{user}");
        records.push(recorded(&stream, first.encode::<User>(&stream, &known()).await.unwrap()));
    }
    std::fs::write(key_file(dir.path(), "ada"), b"damaged").unwrap();
    let other = keyring(dir.path());
    let events = other.decode_each(&records).await.unwrap();
    assert_eq!(events[0], Ok(AnyEvent::User(id("bob"), known())));
    assert_eq!(events[1], Err(codec::Error::DamagedKey("ada".to_owned())));
    let refused = other.of(&id("ada")).await.err().map(|error| error.to_string());
    assert!(refused.is_some_and(|said| said.contains("t2m erase ada")), "it is not replaced");
    other.destroy(&id("ada"), DateTime::UNIX_EPOCH).await.unwrap();
    let erased = registered(Personal::Erased);
    let events = keyring(dir.path()).decode_each(&records).await.unwrap();
    assert_eq!(events[1], Ok(AnyEvent::User(id("ada"), erased)));
}

#[tokio::test]
async fn without_the_right_master_key_no_event_is_given_up_and_no_other_one_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let first = keyring(dir.path());
    let sealed = first.encode::<User>("user-ada", &known()).await.unwrap();
    let records = [recorded("user-ada", sealed)];
    let (path, aside) = (dir.path().join("master.key"), dir.path().join("aside"));
    std::fs::rename(&path, &aside).unwrap();
    let late = keyring(dir.path());
    let failed = late.decode_each(&records).await.unwrap_err();
    assert!(matches!(&failed, Error::Key(user, vault::Error::Unopenable) if *user == id("ada")));
    assert!(failed.to_string().contains("the user ada"), "{failed}");
    assert!(!late.is_ours(false).await.unwrap());
    assert!(!path.exists(), "reading makes no key");
    std::fs::rename(&aside, &path).unwrap();
    let events = late.decode_each(&records).await.unwrap();
    assert_eq!(events, [Ok(AnyEvent::User(id("ada"), known()))]);
}

#[tokio::test]
async fn an_event_with_nothing_personal_needs_no_key() {
    let dir = tempfile::tempdir().unwrap();
    let keyring = keyring(dir.path());
    let user_id = id("ada");
    let event = session::Event::Active { user_id, at: DateTime::UNIX_EPOCH };
    let sealed = keyring.encode::<Session>("session-s", &event).await.unwrap();
    let events = keyring.decode_each(&[recorded("session-s", sealed)]).await.unwrap();
    let session = SessionId::try_from("s".to_owned()).unwrap();
    assert_eq!(events, [Ok(AnyEvent::Session(session, event))]);
    assert!(!dir.path().join("blobs/keys").exists() && !dir.path().join("master.key").exists());
}

#[tokio::test]
async fn any_user_id_is_the_name_of_a_key_and_comes_back_from_the_list() {
    let dir = tempfile::tempdir().unwrap();
    let keyring = keyring(dir.path());
    let long = "|".repeat(128);
    let odd = [".", "..", ".a", "a|b", "auth0|5f7c", "a:b@c.d", &long, "user_2Abc", "A-b_"];
    let mut names = HashSet::new();
    for user in odd {
        assert!(names.insert(name_of(&id(user))), "{user}");
        assert_eq!(user_of(&name_of(&id(user))), Some(id(user)));
        keyring.of(&id(user)).await.unwrap();
        keyring.destroy(&id(user), DateTime::UNIX_EPOCH).await.unwrap();
    }
    let erased: HashSet<_> = keyring.erased().await.unwrap().into_iter().collect();
    assert_eq!(erased, odd.into_iter().map(id).collect());
}

#[test]
fn what_is_known_is_bounded_and_an_erased_key_is_not_brought_back() {
    let mut known = Known::default();
    let key = || Holding::Key(SealingKey::new(&[1; KEY_BYTES]).unwrap());
    for number in 0..MOST + 10 {
        known.keep(&id(&number.to_string()), &key());
    }
    assert!(known.0.len() <= MOST);
    known.keep(&id("ada"), &Holding::Erased);
    known.keep(&id("ada"), &key());
    assert!(matches!(known.get(&id("ada")), Some(Holding::Erased)));
}

#[tokio::test]
async fn nodes_with_other_master_keys_are_told_apart_before_anything_is_sealed() {
    let dir = tempfile::tempdir().unwrap();
    let node = |byte: u8| {
        let key = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, [byte; 32]);
        let blobs = Blobs::open(&BlobStore::File, dir.path()).unwrap();
        Keyring::new(&blobs, MasterKey::parse(&key).unwrap())
    };
    assert!(node(9).is_ours(false).await.unwrap(), "alone it leaves no mark");
    for (byte, is_ours) in [(1, true), (2, false), (1, true)] {
        assert_eq!(node(byte).is_ours(true).await.unwrap(), is_ours);
    }
    node(1).forget_mark().await.unwrap();
    assert!(node(2).is_ours(true).await.unwrap(), "after a rotation");
    node(2).of(&id("ada")).await.unwrap();
    assert!(!node(1).is_ours(true).await.unwrap());
    assert!(node(2).is_ours(false).await.unwrap());
}
