//! A clock that is moved, a log and a read model on the disk, and blobs that come and go.

use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use chrono::TimeDelta;
use futures_util::TryStreamExt;
use tempfile::TempDir;
use tokio::sync::watch;
use uuid::Uuid;

use super::*;
use crate::actors::directory::{Arbiters, Directory};
use crate::actors::keyring::Keyring;
use crate::actors::outputs::{Handed, slots};
use crate::actors::projector::Projector;
use crate::clock::Clock;
use crate::config::{BlobStore, ByTier};
use crate::domain::file::Stored;
use crate::domain::ids::{JobId, LeaseId, UserId};
use crate::domain::job::{self, tests::video_of};
use crate::domain::text::Personal;
use crate::domain::user::{self, Snapshot, Told};
use crate::log::{self, Appended, EventLog, Expected, NewEvent, Recorded, Stats, Verified};
use crate::media::reservations::Reservations;
use crate::media::uploads::Wanted;
use crate::media::vault::MasterKey;
use crate::views::Views;

/// A log that others write to as well, and that may be out of reach.
struct Distant {
    log: Arc<dyn EventLog>,
    away: Arc<AtomicBool>,
}

#[async_trait::async_trait]
impl EventLog for Distant {
    async fn append(
        &self,
        stream: &str,
        expected: Expected,
        events: Vec<NewEvent>,
    ) -> Result<Appended, log::Error> {
        self.log.append(stream, expected, events).await
    }

    async fn read_stream(
        &self,
        stream: &str,
        from: u64,
        limit: usize,
    ) -> Result<Vec<Recorded>, log::Error> {
        match self.away.load(Ordering::SeqCst) {
            true => Err(log::Error::Storage("it is away".to_owned())),
            false => self.log.read_stream(stream, from, limit).await,
        }
    }

    async fn read_all(&self, after: u64, limit: usize) -> Result<Vec<Recorded>, log::Error> {
        self.log.read_all(after, limit).await
    }

    fn head(&self) -> watch::Receiver<u64> {
        self.log.head()
    }

    async fn end(&self) -> Result<u64, log::Error> {
        match self.away.load(Ordering::SeqCst) {
            true => Err(log::Error::Storage("it is away".to_owned())),
            false => self.log.end().await,
        }
    }

    fn writable(&self) -> Result<(), log::Error> {
        self.log.writable()
    }

    async fn stats(&self) -> Result<Stats, log::Error> {
        self.log.stats().await
    }

    async fn verify(&self) -> Result<Verified, log::Error> {
        self.log.verify().await
    }
}

struct House {
    keeper: Storekeeper,
    clock: Clock,
    reservations: Reservations,
    _dir: TempDir,
}

fn id(name: &str) -> UserId {
    UserId::try_from(name.to_owned()).unwrap()
}

fn keyring(dir: &TempDir) -> Keyring {
    let blobs = Blobs::open(&BlobStore::File, dir.path()).unwrap();
    Keyring::new(&blobs, MasterKey::kept_in(&dir.path().join("master.key")))
}

fn origin() -> Metadata {
    Metadata::by("test", Source::Api)
}

impl House {
    async fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let log = log::open("embedded", dir.path()).await.unwrap();
        Self::over(log, dir)
    }

    fn over(log: Arc<dyn EventLog>, dir: TempDir) -> Self {
        // Files on the disk have the machine's time, so that the clock starts there.
        let clock = Clock::manual(Clock::system().now());
        let views = Views::open(&dir.path().join("views.sqlite")).unwrap();
        let blobs = Arc::new(Blobs::open(&BlobStore::File, dir.path()).unwrap());
        let reservations = Reservations::default();
        let keeper = Storekeeper {
            system: System::start(clock.clone(), log, views, keyring(&dir)),
            uploads: Arc::new(Uploads::open(&blobs, &reservations).unwrap()),
            blobs,
            retention: ByTier { standard: Some(TimeDelta::days(30)), premium: None },
        };
        Self { keeper, clock, reservations, _dir: dir }
    }

    async fn user(&self, name: &str, tier: &str) {
        let told = Told { subscription_tier: Some(tier.to_owned()), ..Told::default() };
        let snapshot = Snapshot { told, ..Snapshot::default() };
        let command = user::Command::Provision(snapshot.into());
        let done = self.keeper.system.users.execute(id(name), command, origin()).await.unwrap();
        self.keeper.system.visible(done.position).await.unwrap();
    }

    async fn blob(&self, text: &'static str) -> String {
        let mut writer = self.keeper.blobs.writer().await.unwrap();
        writer.write(Bytes::from_static(text.as_bytes())).await.unwrap();
        writer.finish().await.unwrap().sha256
    }

    async fn file(&self, owner: &str, sha256: &str, job: Option<u128>) -> FileId {
        let file_id = FileId(self.clock.fresh_id());
        let command = Command::Store(Stored {
            user_id: id(owner),
            filename: Personal::Known("a".to_owned()),
            content_type: "text/plain".to_owned(),
            size: 1,
            sha256: sha256.to_owned(),
            metadata: Personal::default(),
            job_id: job.map(|job| JobId(Uuid::from_u128(job))),
            fingerprint: None,
        });
        self.execute(file_id, command).await;
        file_id
    }

    async fn job(&self, owner: &str, number: u128) -> JobId {
        let job_id = JobId(Uuid::from_u128(number));
        let command = job::Command::Request(video_of(id(owner), "a pier"));
        self.keeper.system.jobs.execute(job_id, command, origin()).await.unwrap();
        job_id
    }

    async fn upload(&self, length: u64) -> Uuid {
        let wanted = Wanted {
            id: self.clock.fresh_id(),
            user_id: id("ada"),
            length,
            filename: "a".to_owned(),
            declared_type: None,
            metadata: serde_json::Map::new(),
            described: String::new(),
            expires_at: self.clock.now() + TimeDelta::hours(24),
            whole: None,
        };
        let upload = wanted.id;
        let Ok(room) = self
            .reservations
            .reserve(&id("ada"), length, |_| Ok::<_, std::convert::Infallible>(()));
        self.keeper.uploads.claim(upload).unwrap().create(wanted, room).await.unwrap();
        upload
    }

    async fn execute(&self, file_id: FileId, command: Command) {
        let done = self.keeper.system.files.execute(file_id, command, origin()).await.unwrap();
        self.keeper.system.visible(done.position).await.unwrap();
    }

    async fn is_there(&self, file_id: FileId) -> bool {
        let head = *self.keeper.system.log.head().borrow();
        self.keeper.system.visible(head).await.unwrap();
        self.keeper.system.views.file(&file_id).unwrap().is_some()
    }

    async fn reads(&self, sha256: &str) -> bool {
        let read: Result<Vec<Bytes>, _> =
            self.keeper.blobs.read_range(sha256, 0..1).try_collect().await;
        read.is_ok()
    }

    async fn reconciled(&self) -> [usize; 3] {
        let done = self.keeper.reconcile().await.unwrap();
        [done.put_aside, done.brought_back, done.destroyed]
    }
}

#[actix::test]
async fn bytes_go_in_two_steps_once_the_last_file_that_refers_to_them_is_gone() {
    let house = House::new().await;
    let sha256 = house.blob("shared").await;
    let first = house.file("ada", &sha256, None).await;
    let second = house.file("bob", &sha256, None).await;
    house.clock.advance(GRACE + TimeDelta::minutes(1));
    house.execute(first, Command::Delete { by: id("ada") }).await;
    assert_eq!(house.reconciled().await, [0, 0, 0]);
    house.execute(second, Command::Delete { by: id("bob") }).await;
    assert_eq!(house.reconciled().await, [1, 0, 0]);
    assert!(house.reads(&sha256).await);
    house.clock.advance(GRACE - TimeDelta::seconds(1));
    assert_eq!(house.reconciled().await, [0, 0, 0]);
    house.clock.advance(TimeDelta::seconds(2));
    assert_eq!(house.reconciled().await, [0, 0, 1]);
    assert!(!house.reads(&sha256).await);
}

#[actix::test]
async fn an_upload_keeps_its_bytes_whenever_the_storekeeper_comes_between() {
    let house = House::new().await;
    // Young bytes without an event are left alone.
    let sha256 = house.blob("same").await;
    assert_eq!(house.reconciled().await, [0, 0, 0]);
    house.clock.advance(GRACE + TimeDelta::minutes(1));
    // The event of the upload comes after its bytes were judged unneeded, and before they end.
    assert_eq!(house.reconciled().await, [1, 0, 0]);
    let late = house.file("ada", &sha256, None).await;
    assert!(house.reads(&sha256).await);
    house.clock.advance(GRACE + TimeDelta::minutes(1));
    assert_eq!(house.reconciled().await, [0, 1, 0]);
    assert_eq!(house.reconciled().await, [0, 0, 0]);
    assert!(house.reads(&sha256).await);
    // Bytes that come anew while the old ones lie aside are not theirs.
    house.execute(late, Command::Delete { by: id("ada") }).await;
    assert_eq!(house.reconciled().await, [1, 0, 0]);
    house.blob("same").await;
    house.file("ada", &sha256, None).await;
    assert_eq!(house.keeper.blobs.all_aside().await.unwrap().len(), 1);
    assert_eq!(house.reconciled().await, [0, 0, 0]);
    assert_eq!(house.keeper.blobs.all_aside().await.unwrap().len(), 1);
    house.clock.advance(GRACE + TimeDelta::minutes(1));
    assert_eq!(house.reconciled().await, [0, 0, 0]);
    assert_eq!(house.keeper.blobs.all_aside().await.unwrap(), []);
    assert!(house.reads(&sha256).await);
}

#[actix::test]
async fn nothing_is_removed_while_the_read_model_is_behind_the_log() {
    let house = House::new().await;
    let sha256 = house.blob("known to the log").await;
    house.file("ada", &sha256, None).await;
    house.clock.advance(GRACE * 2);
    let dir = TempDir::new().unwrap();
    let empty = Views::open(&dir.path().join("views.sqlite")).unwrap();
    let (log, arbiters) = (Arc::clone(&house.keeper.system.log), Arbiters::new(1));
    // A read model that is being built anew and stands at the beginning.
    let projector = Projector::new(Arc::clone(&log), empty.clone(), keyring(&dir));
    let behind = System {
        users: Directory::new(&arbiters, &log, &house.clock, &keyring(&dir)),
        sessions: Directory::new(&arbiters, &log, &house.clock, &keyring(&dir)),
        files: Directory::new(&arbiters, &log, &house.clock, &keyring(&dir)),
        jobs: Directory::new(&arbiters, &log, &house.clock, &keyring(&dir)),
        clock: house.clock.clone(),
        progress: projector.progress(),
        news: projector.news(),
        keyring: keyring(&dir),
        log,
        views: empty,
    };
    let keeper = Storekeeper {
        system: Arc::new(behind),
        blobs: Arc::clone(&house.keeper.blobs),
        uploads: Arc::clone(&house.keeper.uploads),
        retention: house.keeper.retention,
    };
    assert_eq!(keeper.reconcile().await.unwrap(), Reconciled::default());
    assert_eq!(house.reconciled().await, [0, 0, 0]);
    assert!(house.reads(&sha256).await);
}

#[actix::test]
async fn outputs_are_kept_as_long_as_the_tier_says_that_their_owner_had() {
    let house = House::new().await;
    house.user("ada", "standard").await;
    house.user("bob", "enterprise").await;
    let sha256 = house.blob("output").await;
    let output = house.file("ada", &sha256, Some(1)).await;
    let upload = house.file("ada", &sha256, None).await;
    let premium = house.file("bob", &sha256, Some(2)).await;
    let row = house.keeper.system.views.file(&output).unwrap().unwrap();
    let expires_at = row.expires_at(&house.keeper.retention).unwrap();
    assert_eq!(expires_at - row.created_at, TimeDelta::days(30));
    let row = house.keeper.system.views.file(&premium).unwrap().unwrap();
    assert_eq!(row.expires_at(&house.keeper.retention), None);

    house.clock.advance(expires_at - house.clock.now() - TimeDelta::seconds(1));
    house.keeper.look().await.unwrap();
    assert!(house.is_there(output).await);
    house.clock.advance(TimeDelta::seconds(1));
    house.keeper.look().await.unwrap();
    assert!(!house.is_there(output).await);
    house.clock.advance(TimeDelta::days(10_000));
    house.keeper.look().await.unwrap();
    assert!(house.is_there(upload).await && house.is_there(premium).await);
}

#[actix::test]
async fn what_a_broken_completion_has_left_of_a_job_that_came_to_nothing_goes() {
    let house = House::new().await;
    house.user("ada", "standard").await;
    let sha256 = house.blob("output").await;
    let (failed, queued) = (house.job("ada", 1).await, house.job("ada", 2).await);
    let left = house.file("ada", &sha256, Some(1)).await;
    let needed = house.file("ada", &sha256, Some(2)).await;
    let cancel = job::Command::Cancel { by: id("ada") };
    let jobs = &house.keeper.system.jobs;
    jobs.execute(failed, cancel, origin()).await.unwrap();
    house.reconciled().await;
    assert!(!house.is_there(left).await && house.is_there(needed).await, "{queued}");
}

#[actix::test]
async fn what_workers_that_died_have_handed_in_is_forgotten_once_its_job_is_over() {
    let house = House::new().await;
    house.user("ada", "standard").await;
    let (over, queued) = (house.job("ada", 1).await, house.job("ada", 2).await);
    let outputs = Outputs::new(&house.keeper.blobs);
    let (kind, lease_id) = (job::Kind::Video, LeaseId(Uuid::from_u128(9)));
    let sha256 = house.blob("half of it").await;
    let handed = Handed { content_type: "video/mp4".to_owned(), size: 10, sha256 };
    for job_id in [over, queued] {
        outputs.note(job_id, lease_id, &slots(kind)[0], &handed).await.unwrap();
    }
    let cancel = job::Command::Cancel { by: id("ada") };
    house.keeper.system.jobs.execute(over, cancel, origin()).await.unwrap();
    house.reconciled().await;
    assert!(outputs.of(kind, over, lease_id).await.unwrap().is_empty());
    assert_eq!(outputs.of(kind, queued, lease_id).await.unwrap().len(), 1);
}

#[actix::test]
async fn what_may_have_been_retried_since_is_kept_while_the_view_of_jobs_is_parked() {
    let house = House::new().await;
    house.user("ada", "standard").await;
    let sha256 = house.blob("output").await;
    let (retried, over) = (house.job("ada", 1).await, house.job("ada", 2).await);
    let jobs = &house.keeper.system.jobs;
    for job_id in [retried, over] {
        let lease_id = LeaseId(Uuid::from_u128(9));
        let lease = job::Command::Lease { lease_id, worker_id: "w".to_owned() };
        jobs.execute(job_id, lease, origin()).await.unwrap();
        let fail = job::Command::Fail { lease_id, error: "no".to_owned(), retryable: false };
        jobs.execute(job_id, fail, origin()).await.unwrap();
    }
    let (of_retried, left) =
        (house.file("ada", &sha256, Some(1)).await, house.file("ada", &sha256, Some(2)).await);
    // Of a newer version: the view stands still here, as do the jobs in it.
    let event = NewEvent {
        id: Uuid::from_u128(3),
        kind: "job.juggled.v1".to_owned(),
        time: house.clock.now(),
        data: b"{}".to_vec(),
        metadata: origin().to_bytes(),
    };
    let stream = format!("job-{}", Uuid::from_u128(3));
    house.keeper.system.log.append(&stream, Expected::NoStream, vec![event]).await.unwrap();
    let again = job::Command::Retry { by: id("ada") };
    jobs.execute(retried, again, origin()).await.unwrap();

    house.reconciled().await;
    assert!(house.is_there(of_retried).await && house.is_there(left).await);
    // Whatever the view says, the job itself is asked.
    house.keeper.remove_failed_outputs().await.unwrap();
    assert!(house.is_there(of_retried).await && !house.is_there(left).await);
}

#[actix::test]
async fn the_files_of_a_user_who_is_gone_go_too() {
    let house = House::new().await;
    house.user("ada", "standard").await;
    let sha256 = house.blob("hers").await;
    let hers = house.file("ada", &sha256, None).await;
    let his = house.file("bob", &sha256, None).await;
    let users = &house.keeper.system.users;
    let done = users.execute(id("ada"), user::Command::Delete, origin()).await.unwrap();
    house.keeper.system.visible(done.position).await.unwrap();
    house.reconciled().await;
    assert!(!house.is_there(hers).await && house.is_there(his).await);
}

#[actix::test]
async fn the_bytes_of_a_whole_upload_are_kept_until_it_is_recorded_or_over() {
    let house = House::new().await;
    let upload = house.upload(5).await;
    let uploads = &house.keeper.uploads;
    let found = uploads.find(upload, house.clock.now()).unwrap();
    let mut held = uploads.hold(Arc::clone(&found)).await.unwrap();
    let body = futures_util::stream::iter([Ok::<_, ()>(Bytes::from_static(b"hello"))]);
    held.append(body, None).await.unwrap();
    let sha256 = held.store().await.unwrap().sha256;
    // The log could not be written, and its client comes again within the promised day.
    drop(held);
    for _ in 0..3 {
        house.clock.advance(GRACE + TimeDelta::minutes(1));
        assert_eq!(house.reconciled().await, [0, 0, 0]);
    }
    // So it is with what another server has put aside, which knows nothing of the upload.
    house.keeper.blobs.put_aside(&sha256, house.clock.now()).await.unwrap();
    house.clock.advance(GRACE);
    assert_eq!(house.reconciled().await, [0, 1, 0]);
    uploads.hold(found).await.unwrap().store().await.unwrap();
    house.keeper.look().await.unwrap();
    assert_eq!(house.reconciled().await, [1, 0, 0]);
}

#[actix::test]
async fn an_upload_that_is_never_finished_gives_back_its_room() {
    let house = House::new().await;
    house.upload(10).await;
    house.keeper.look().await.unwrap();
    assert_eq!(house.reservations.of(&id("ada")), 10);
    house.clock.advance(TimeDelta::hours(24));
    house.keeper.look().await.unwrap();
    assert_eq!(house.reservations.of(&id("ada")), 0);
    assert_eq!(std::fs::read_dir(house.keeper.blobs.spool()).unwrap().count(), 0);
}

#[actix::test]
async fn a_node_that_is_cut_off_from_the_log_removes_nothing_from_the_store() {
    let dir = TempDir::new().unwrap();
    let log = log::open("embedded", dir.path()).await.unwrap();
    let away = Arc::new(AtomicBool::new(true));
    let house = House::over(Arc::new(Distant { log, away: Arc::clone(&away) }), dir);
    // Another node has recorded a file of it, for all that this one can know.
    let sha256 = house.blob("another node's").await;
    house.clock.advance(GRACE + TimeDelta::minutes(1));
    assert!(matches!(house.keeper.reconcile().await, Err(Error::Log(_))));
    away.store(false, Ordering::SeqCst);
    assert_eq!(house.reconciled().await, [1, 0, 0]);
    assert!(house.reads(&sha256).await);
}
