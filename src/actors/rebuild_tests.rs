//! Which pages a rebuild reads of logs that end anywhere, grow meanwhile or fail; and when one begins.

use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use futures_util::TryStreamExt;
use tokio::sync::watch;
use uuid::Uuid;

use super::*;
use crate::config::BlobStore;
use crate::domain::ids::UserId;
use crate::domain::user;
use crate::log::{Appended, EmbeddedLog, Expected, NewEvent, Stats, Verified};
use crate::media::blobs::Blobs;
use crate::media::vault::MasterKey;
use crate::views::{Entity, Parked, View};

/// A log that shows its first events to the first reads and all of them from then on.
struct Scripted {
    stride: u64,
    events: u64,
    at_first: (usize, u64),
    /// The read of what follows this position fails.
    broken_after: Option<u64>,
    reads: AtomicUsize,
    /// Done before each read.
    meanwhile: Box<dyn Fn() + Send + Sync>,
}

impl Scripted {
    fn of(stride: u64, events: u64) -> Self {
        let reads = AtomicUsize::new(0);
        let meanwhile = Box::new(|| ());
        Self { stride, events, at_first: (0, 0), broken_after: None, reads, meanwhile }
    }

    fn recorded(&self, number: u64) -> Recorded {
        Recorded {
            id: Uuid::from_u128(number.into()),
            stream: "job-1".into(),
            revision: number - 1,
            position: number * self.stride,
            kind: "job.requested.v1".into(),
            time: DateTime::UNIX_EPOCH,
            data: Bytes::new(),
            metadata: Bytes::new(),
            hash: [0; 32],
        }
    }
}

#[async_trait::async_trait]
impl EventLog for Scripted {
    async fn append(&self, _: &str, _: Expected, _: Vec<NewEvent>) -> Result<Appended, log::Error> {
        unreachable!("it is only read")
    }

    async fn read_stream(&self, _: &str, _: u64, _: usize) -> Result<Vec<Recorded>, log::Error> {
        unreachable!("it is read as a whole")
    }

    async fn read_all(&self, after: u64, limit: usize) -> Result<Vec<Recorded>, log::Error> {
        (self.meanwhile)();
        let (reads, events) = self.at_first;
        let has_grown = self.reads.fetch_add(1, Ordering::Relaxed) >= reads;
        if self.broken_after == Some(after) {
            return Err(log::Error::Storage("cut off".to_owned()));
        }
        let numbers = 1..=if has_grown { self.events } else { events };
        let events = numbers.map(|number| self.recorded(number));
        Ok(events.filter(|event| event.position > after).take(limit).collect())
    }

    fn head(&self) -> watch::Receiver<u64> {
        watch::channel(self.events * self.stride).1
    }

    fn writable(&self) -> Result<(), log::Error> {
        Ok(())
    }

    fn stride(&self) -> u64 {
        self.stride
    }

    async fn stats(&self) -> Result<Stats, log::Error> {
        unreachable!("nobody counts")
    }

    async fn verify(&self) -> Result<Verified, log::Error> {
        unreachable!("nobody verifies")
    }
}

async fn positions(log: Scripted, from: u64, until: u64) -> Result<Vec<u64>, Error> {
    let pages: Vec<_> = pages(Arc::new(log), from, until).try_collect().await?;
    assert!(pages.iter().all(|page| page.len() <= BATCH));
    Ok(pages.iter().flatten().map(|event| event.position).collect())
}

#[tokio::test]
async fn every_event_is_read_once_and_in_order_wherever_the_log_and_its_pages_end() {
    for stride in [1, 7] {
        for events in 0..=3 * BATCH as u64 + 1 {
            for from in [0, 1, 5] {
                let expected: Vec<_> =
                    (1..=events).map(|n| n * stride).filter(|at| *at > from).collect();
                let end = events * stride;
                for until in [end, end + 1, end + 100, u64::MAX] {
                    let read = positions(Scripted::of(stride, events), from, until).await.unwrap();
                    // Nobody need read what is not asked for.
                    let asked = if until > from { &expected[..] } else { &[] };
                    assert_eq!(read, asked, "{events} by {stride} after {from} to {until}");
                }
            }
        }
    }
}

#[tokio::test]
async fn pages_go_as_far_as_is_asked() {
    // Where there are no gaps no further: what follows may be damaged.
    for (stride, until, last) in [(1, 6, 6), (7, 6 * 7, 2 * BATCH as u64)] {
        let read = positions(Scripted::of(stride, 100), 0, until).await.unwrap();
        assert_eq!(read, (1..=last).map(|n| n * stride).collect::<Vec<_>>());
    }
}

#[tokio::test]
async fn a_log_that_grows_meanwhile_is_read_without_a_gap() {
    for reads in 0..5 {
        for at_first in 0..=2 * BATCH as u64 {
            let log = Scripted { at_first: (reads, at_first), ..Scripted::of(1, 40) };
            let read = positions(log, 0, 40).await.unwrap();
            assert!(read.len() as u64 >= at_first.min(40) || reads == 0, "{reads}, {at_first}");
            assert_eq!(read, (1..=read.len() as u64).collect::<Vec<_>>(), "{reads}, {at_first}");
        }
    }
}

#[tokio::test]
async fn a_page_that_cannot_be_read_ends_the_reading_after_those_before_it() {
    for stride in [1, 7] {
        let after = 2 * BATCH as u64 * stride;
        let log = Scripted { broken_after: Some(after), ..Scripted::of(stride, 40) };
        let read: Vec<_> = pages(Arc::new(log), 0, 40 * stride).collect().await;
        assert_eq!(read.iter().map(|page| page.is_ok()).collect::<Vec<_>>(), [true, true, false]);
    }
}

#[tokio::test]
async fn what_nobody_asks_for_behind_the_end_breaks_nothing() {
    let beyond = 2 * BATCH as u64;
    let log = Scripted { broken_after: Some(beyond), ..Scripted::of(1, BATCH as u64 + 1) };
    assert_eq!(positions(log, 0, u64::MAX).await.unwrap().len(), BATCH + 1);
}

/// An event that no version understands, and one that this does.
async fn unknown_and_known(dir: &Path) -> EmbeddedLog {
    let log = EmbeddedLog::open(&dir.join("log.sqlite")).unwrap();
    for (number, stream, kind) in
        [(1, "thing-1", "thing.done.v1"), (2, "user-ada", "user.banned.v1")]
    {
        let event = NewEvent {
            id: Uuid::from_u128(number),
            kind: kind.to_owned(),
            time: DateTime::UNIX_EPOCH,
            data: b"{}".to_vec(),
            metadata: b"{}".to_vec(),
        };
        log.append(stream, Expected::NoStream, vec![event]).await.unwrap();
    }
    log
}

#[tokio::test]
async fn what_does_not_begin_passes_over_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let log = unknown_and_known(dir.path()).await;
    let views = Views::open(&dir.path().join("views.sqlite")).unwrap();
    let keyring = keyring(dir.path());
    let rebuilds = Rebuilds::new(Clock::system(), Arc::new(log), keyring, views.clone());
    let skipped = || views::skipped(&views.path()).unwrap().iter().copied().collect::<Vec<_>>();

    let refused = async |skip: &[u64]| match rebuilds.start(false, skip).await {
        Err(Refused::Unskippable(why)) => why.to_string(),
        started => panic!("{started:?}"),
    };
    assert_eq!(refused(&[1, 3]).await, "the log ends at 2: there is no 3");
    assert_eq!(refused(&[1, 2]).await, "the event at 2 can be read: nothing stands still there");
    assert_eq!(refused(&[0]).await, "the log has no event at 0");
    assert_eq!((rebuilds.status().is_none(), skipped()), (true, vec![]));
    rebuilds.start(true, &[]).await.unwrap();
    assert!(matches!(rebuilds.start(false, &[1]).await, Err(Refused::UnderWay)));
    assert_eq!(skipped(), [0; 0]);
    ended(&rebuilds).await;
    rebuilds.start(false, &[1]).await.unwrap();
    // Nobody is there to take it over.
    for _ in 0..600 {
        if skipped() == [1] {
            return;
        }
        tokio::time::sleep(LOOK).await;
    }
    panic!("{:?} is passed over", skipped());
}

#[tokio::test]
async fn what_would_stand_still_does_not_replace_what_went_on() {
    let dir = tempfile::tempdir().unwrap();
    let log = unknown_and_known(dir.path()).await;
    let views = Views::open(&dir.path().join("views.sqlite")).unwrap();
    // What they were built of could be read.
    let happened = |position| {
        let ada = UserId::try_from("ada".to_owned()).unwrap();
        let entity = Entity::User(ada, user::Event::Banned {});
        Happened { position, hash: [0; 32], time: DateTime::UNIX_EPOCH, entity }
    };
    views.apply(&[happened(1), happened(2)]).unwrap();
    let keyring = keyring(dir.path());
    let rebuilds = Rebuilds::new(Clock::system(), Arc::new(log), keyring, views.clone());
    rebuilds.start(false, &[]).await.unwrap();
    assert_eq!(ended(&rebuilds).await, State::Failed);
    let told = rebuilds.status().and_then(|status| status.error).unwrap();
    let expected = "Nothing was replaced: the view users would stand still at position 1, where the \
                    present read model went on: ";
    assert!(told.starts_with(expected) && told.contains("thing-1"), "{told}");
    assert!(!views.is_outdated().unwrap() && views.parked().is_empty());
    assert!(!dir.path().join("views-1.sqlite").exists(), "the draft is gone");
}

async fn ended(rebuilds: &Rebuilds) -> State {
    for _ in 0..600 {
        let state = rebuilds.status().unwrap().state;
        if state != State::Running {
            return state;
        }
        tokio::time::sleep(LOOK).await;
    }
    State::Running
}

#[tokio::test]
async fn while_a_comparison_replays_the_wal_of_what_is_read_can_be_shortened() {
    let dir = tempfile::tempdir().unwrap();
    let views = Views::open(&dir.path().join("views.sqlite")).unwrap();
    let mut log = Scripted::of(1, 40);
    let keyring = keyring(dir.path());
    let page = (1..=40).map(|number| log.recorded(number)).collect();
    views.apply(&projector::understand(&keyring, page, 40).await.unwrap()).unwrap();
    let (reads, outside) = (Arc::new(AtomicUsize::new(0)), views.present_file());
    let counted = Arc::clone(&reads);
    log.meanwhile = Box::new(move || {
        let sql = rusqlite::Connection::open(&outside).unwrap();
        sql.busy_timeout(Duration::ZERO).unwrap();
        let busy =
            sql.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get::<_, bool>(0));
        assert!(!busy.unwrap(), "somebody reads what was before");
        counted.fetch_add(1, Ordering::Relaxed);
    });
    let rebuilds = Rebuilds::new(Clock::system(), Arc::new(log), keyring, views);
    rebuilds.start(true, &[]).await.unwrap();
    assert_eq!(ended(&rebuilds).await, State::Completed);
    let status = rebuilds.status().unwrap();
    assert_eq!((status.position, status.until), (40, 40));
    assert!(status.differences.unwrap().iter().all(Difference::is_none));
    assert!(reads.load(Ordering::Relaxed) > 1);
}

#[tokio::test(start_paused = true)]
async fn what_nobody_takes_over_is_not_waited_for_without_end() {
    let dir = tempfile::tempdir().unwrap();
    let views = Views::open(&dir.path().join("views.sqlite")).unwrap();
    taken_over(&views, Duration::ZERO).await.unwrap();
    let fresh = Building::beside(&views.path()).unwrap().finish_as_current().unwrap();
    let given_up = taken_over(&views, Duration::from_secs(1)).await;
    assert!(matches!(given_up, Err(views::Error::NotTakenOver)), "{given_up:?}");
    views.replace_with(fresh).unwrap();
    taken_over(&views, Duration::ZERO).await.unwrap();
}

fn keyring(dir: &Path) -> Keyring {
    let blobs = Blobs::open(&BlobStore::File, dir).unwrap();
    Keyring::new(&blobs, MasterKey::kept_in(&dir.join("master.key")))
}

#[tokio::test]
async fn a_replay_that_fails_leaves_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let views = Views::open(&dir.path().join("views.sqlite")).unwrap();
    for stride in [1, 7] {
        let after = 2 * BATCH as u64 * stride;
        let log = Scripted { broken_after: Some(after), ..Scripted::of(stride, 40) };
        let building = beside(&views.path()).await.unwrap();
        let file = dir.path().join("views-1.sqlite");
        assert!(file.exists());
        let keyring = keyring(dir.path());
        let failed = rebuild(Arc::new(log), keyring, building, 40 * stride, |_| ()).await;
        assert!(matches!(failed, Err(Error::Log(_))));
        assert!(!file.exists());
    }
}

#[tokio::test]
async fn whoever_asks_is_told_why_it_failed() {
    let dir = tempfile::tempdir().unwrap();
    let views = Views::open(&dir.path().join("views.sqlite")).unwrap();
    let log = Scripted { broken_after: Some(0), ..Scripted::of(1, 40) };
    let keyring = keyring(dir.path());
    let rebuilds = Rebuilds::new(Clock::system(), Arc::new(log), keyring, views.clone());
    let failed = async || {
        let begun = rebuilds.start(false, &[]).await.unwrap();
        assert_eq!((begun.state, begun.error), (State::Running, None));
        assert_eq!(ended(&rebuilds).await, State::Failed);
        serde_json::to_value(rebuilds.status().unwrap()).unwrap()["error"].clone()
    };
    assert_eq!(failed().await, "The log could not be read; the server's log lines say why");
    // It takes no room itself.
    let present = std::fs::File::options().write(true).open(views.present_file()).unwrap();
    present.set_len(Space::of(dir.path()).unwrap().total).unwrap();
    let told = failed().await;
    assert!(told.as_str().unwrap().starts_with("The read model needs "), "{told}");
}

#[test]
fn why_it_failed_is_told_without_what_is_inside() {
    let corrupt = |position| log::Error::Corrupt { position, what: "inside".to_owned() };
    let read = "The log could not be read; the server's log lines say why";
    let written = "The read model could not be written; the server's log lines say why";
    for (error, told) in [
        (Error::Log(corrupt(7)), "The log is damaged at position 7"),
        (Error::Log(corrupt(0)), "The log is damaged"),
        (Error::Log(log::Error::Storage("inside".to_owned())), read),
        (
            Error::Views(views::Error::NoRoom { needed: 9, free: 8 }),
            "The read model needs 9 bytes beside it, and 8 are free",
        ),
        (
            Error::Views(views::Error::Rebuilding),
            "Somebody else builds the read model and has not ended; try again later",
        ),
        (
            Error::Views(views::Error::NotTakenOver),
            "It was built, and the server did not take it over in time",
        ),
        (
            Error::Views(views::Error::StandsStill(Parked {
                view: View::Jobs,
                position: 7,
                reason: "of a newer version".to_owned(),
            })),
            "Nothing was replaced: the view jobs would stand still at position 7, where the present \
             read model went on: of a newer version. `t2m replay --even-if-parked` replaces it all \
             the same",
        ),
        (Error::Views(views::Error::Io(io::Error::other("inside"))), written),
        (Error::Views(views::Error::Exists("/inside".into())), written),
    ] {
        assert_eq!(sentence(&error), told, "{error}");
    }
}

#[tokio::test]
async fn a_replay_without_room_for_it_does_not_begin() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("views.sqlite");
    drop(beside(&base).await.unwrap());
    let present = std::fs::File::create(&base).unwrap();
    // It takes no room itself.
    present.set_len(Space::of(dir.path()).unwrap().total).unwrap();
    let refused = beside(&base).await.map(drop);
    assert!(matches!(refused, Err(views::Error::NoRoom { .. })), "{refused:?}");
    assert!(!dir.path().join("views-1.sqlite").exists());
}
