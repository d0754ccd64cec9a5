//! What is told of a read model that cannot go on.

use std::sync::atomic::{AtomicBool, Ordering};

use chrono::DateTime;
use uuid::Uuid;

use super::*;
use crate::actors::rebuild::rebuild;
use crate::domain::ids::UserId;
use crate::log::{Appended, EmbeddedLog, Expected, NewEvent, Stats, Verified};
use crate::media::blobs::Blobs;
use crate::media::vault::MasterKey;
use crate::views::Building;

async fn write(log: &dyn EventLog, id: u128) {
    let event = NewEvent {
        id: Uuid::from_u128(id),
        kind: "user.banned.v1".to_owned(),
        time: DateTime::UNIX_EPOCH,
        data: b"{}".to_vec(),
        metadata: b"{}".to_vec(),
    };
    log.append("user-ada", Expected::Any, vec![event]).await.unwrap();
}

/// A log with an event, and a read model whose disk does not take it.
struct Full {
    dir: tempfile::TempDir,
    log: Arc<dyn EventLog>,
    keyring: Keyring,
    beside: rusqlite::Connection,
}

impl Full {
    async fn begin() -> (Self, Views) {
        let dir = tempfile::tempdir().unwrap();
        let log: Arc<dyn EventLog> = Arc::new(EmbeddedLog::open(&dir.path().join("log")).unwrap());
        let views = Views::open(&dir.path().join("views.sqlite")).unwrap();
        let blobs = Blobs::open(&crate::config::BlobStore::File, dir.path()).unwrap();
        let keyring = Keyring::new(&blobs, MasterKey::kept_in(&dir.path().join("master.key")));
        let beside = rusqlite::Connection::open(dir.path().join("views.sqlite")).unwrap();
        let full = "BEFORE UPDATE ON checkpoint BEGIN SELECT RAISE(ABORT, 'full'); END";
        beside.execute_batch(&format!("CREATE TRIGGER full {full}")).unwrap();
        write(&*log, 1).await;
        (Self { dir, log, keyring, beside }, views)
    }

    fn projector(&self, views: Views) -> Projector {
        Projector::new(Arc::clone(&self.log), views, self.keyring.clone())
    }
}

#[actix::test]
async fn who_waits_hears_when_nothing_moves_any_more_and_when_it_does_again() {
    let (full, views) = Full::begin().await;
    let mut progress = full.projector(views).start();
    assert!(!progress.reached_or_stuck(1).await);
    assert!(progress.now().stands_still);
    full.beside.execute_batch("DROP TRIGGER full").unwrap();
    while progress.now().stands_still {
        progress.moved().await;
    }
    assert!(progress.reached_or_stuck(1).await);
}

#[actix::test]
async fn views_that_cannot_be_written_any_more_are_replaced_by_those_built_beside_them() {
    let (full, views) = Full::begin().await;
    let projector = full.projector(views.clone());
    let ada = UserId::try_from("ada".to_owned()).unwrap();
    let follower = projector.news().follow(&ada, 1).unwrap();
    let progress = projector.start();
    assert!(!progress.reached_or_stuck(1).await);
    let building = Building::beside(&full.dir.path().join("views.sqlite")).unwrap();
    let built = rebuild(Arc::clone(&full.log), full.keyring.clone(), building, 1, |_| ()).await;
    drop(built.unwrap().finish_as_current().unwrap());
    progress.reached(1, None, Duration::from_secs(30)).await.unwrap();
    assert!(!progress.now().stands_still && !views.is_outdated().unwrap());
    // The old ones never told of it, and the new ones knew it already.
    tokio::time::timeout(Duration::from_secs(30), follower.news()).await.unwrap();
}

/// A log whose first read is a defect of ours.
struct Defective {
    log: Arc<dyn EventLog>,
    was_read: AtomicBool,
}

#[async_trait::async_trait]
impl EventLog for Defective {
    async fn append(&self, _: &str, _: Expected, _: Vec<NewEvent>) -> Result<Appended, log::Error> {
        unreachable!("it is only read")
    }

    async fn read_stream(&self, _: &str, _: u64, _: usize) -> Result<Vec<Recorded>, log::Error> {
        unreachable!("it is read as a whole")
    }

    async fn read_all(&self, after: u64, limit: usize) -> Result<Vec<Recorded>, log::Error> {
        assert!(self.was_read.swap(true, Ordering::Relaxed), "it is read for the first time");
        self.log.read_all(after, limit).await
    }

    fn head(&self) -> watch::Receiver<u64> {
        self.log.head()
    }

    fn writable(&self) -> Result<(), log::Error> {
        Ok(())
    }

    async fn stats(&self) -> Result<Stats, log::Error> {
        unreachable!("nobody counts")
    }

    async fn verify(&self) -> Result<Verified, log::Error> {
        unreachable!("nobody verifies")
    }
}

#[actix::test]
async fn a_projector_that_has_panicked_is_begun_anew() {
    let (full, views) = Full::begin().await;
    full.beside.execute_batch("DROP TRIGGER full").unwrap();
    let log = Arc::new(Defective { log: Arc::clone(&full.log), was_read: AtomicBool::new(false) });
    let progress = Projector::new(log, views, full.keyring.clone()).start();
    progress.reached(1, None, Duration::from_secs(30)).await.unwrap();
}

#[tokio::test]
async fn who_waits_for_what_a_parked_view_hides_hears_when_that_goes_on() {
    let parked = vec![Parked { view: View::Files, position: 3, reason: String::new() }];
    let (tell, at) = watch::channel(Reached { position: 5, parked, stands_still: false });
    let progress = Progress { at, bell: Arc::default() };
    let patient = Duration::from_secs(3600);
    assert_eq!(progress.reached(4, Some(View::Files), patient).await, Err(NotCaughtUp));
    assert_eq!(progress.shown(2, View::Files, patient).await, Ok(()));
    assert_eq!(progress.shown(4, View::Jobs, patient).await, Ok(()));
    let mut shown = std::pin::pin!(progress.shown(4, View::Files, patient));
    assert!(futures_util::poll!(&mut shown).is_pending());
    tell.send_modify(|at| at.parked.clear());
    progress.bell.notify_waiters();
    assert_eq!(shown.await, Ok(()));
}
