//! Workers that die, freeze and wake up, on a clock that the tests move.

use super::*;
use bytes::Bytes;
use chrono::TimeDelta;
use uuid::Uuid;

use crate::actors::entity::Entity;
use crate::actors::timekeeper;
use crate::clock::Clock;
use crate::domain::job::{LEASE, tests::video_of};
use crate::log;
use crate::views::Views;

const ANY: [Kind; 2] = Kind::ALL;
const SHAPE: Shape = Shape { duration: Some(1.0), width: Some(64), height: Some(64) };

use crate::actors::keyring::{self, Keyring};
use crate::media::vault::{MasterKey, Vault};

/// A server without its front end, whose time stands still.
pub struct World {
    clock: Clock,
    pub system: Arc<System>,
    pub blobs: Blobs,
    pub leasing: Arc<Leasing>,
    dir: tempfile::TempDir,
}

impl World {
    pub async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let clock = Clock::manual(DateTime::from_timestamp(1_800_000_000, 0).unwrap());
        let log = log::open("embedded", dir.path()).await.unwrap();
        let views = Views::open(&dir.path().join("views.sqlite")).unwrap();
        let blobs = Blobs::open(&crate::config::BlobStore::File, dir.path()).unwrap();
        Self::on(clock, log, views, blobs, dir)
    }

    fn on(
        clock: Clock,
        log: Arc<dyn log::EventLog>,
        views: Views,
        blobs: Blobs,
        dir: tempfile::TempDir,
    ) -> Self {
        let keyring = Keyring::new(&blobs, master(&dir));
        let system = System::start(clock.clone(), log, views, keyring);
        let leasing = Arc::new(Leasing::new(Arc::clone(&system), &blobs, Caps::DEFAULT));
        Self { clock, system, blobs, leasing, dir }
    }

    /// One that remembers nothing but what is stored.
    fn again(self) -> Self {
        let Self { clock, system, blobs, dir, .. } = self;
        Self::on(clock, Arc::clone(&system.log), system.views.clone(), blobs, dir)
    }

    pub fn vault(&self) -> Vault {
        Vault::new(&self.blobs, keyring::KEYS, master(&self.dir))
    }

    async fn lose_the_key_of(&self, user: &str) {
        self.vault().destroy(user).await.unwrap();
    }

    /// Something that this version does not understand, in the stream of a job.
    async fn poison(&self, id: JobId) {
        let event = log::NewEvent {
            id: self.clock.fresh_id(),
            kind: "job.enchanted.v9".to_owned(),
            time: self.clock.now(),
            data: b"{}".to_vec(),
            metadata: b"{}".to_vec(),
        };
        let stream = format!("job-{id}");
        self.system.log.append(&stream, log::Expected::Any, vec![event]).await.unwrap();
        self.caught_up().await;
    }

    pub async fn ask(&self, user: &str) -> JobId {
        let id = JobId(self.clock.fresh_id());
        let request = video_of(self.user(user), "a pier");
        let command = Command::Request(request);
        let done = self.system.jobs.execute(id, command, by("test")).await.unwrap();
        self.system.visible(done.position).await.unwrap();
        id
    }

    fn user(&self, name: &str) -> UserId {
        UserId::try_from(name.to_owned()).unwrap()
    }

    pub async fn lease(&self, worker: &str) -> Leased {
        self.leasing.lease(&by(worker), &ANY, |_| false).await.unwrap().expect("a job waits")
    }

    async fn hand_in(&self, leased: &Leased, bytes: &'static [u8]) -> Result<(), Error> {
        let mut writer = self.blobs.writer().await.unwrap();
        writer.write(Bytes::from_static(bytes)).await.unwrap();
        let stored = writer.finish().await.unwrap();
        let handed = Handed {
            content_type: "video/mp4".to_owned(),
            size: stored.size,
            sha256: stored.sha256,
        };
        let slot = &slots(Kind::Video)[0];
        self.leasing.hand_in(leased.job_id, leased.lease_id, slot, &handed).await
    }

    async fn complete(&self, leased: &Leased) -> Result<Completed, Error> {
        let (job_id, lease_id) = (leased.job_id, leased.lease_id);
        let done = self.leasing.complete(job_id, lease_id, &by("w"), |_| SHAPE).await?;
        assert_eq!(done.visible, Ok(()));
        Ok(done.outcome)
    }

    /// Time passes; what it brings about is there when this returns.
    pub async fn pass(&self, time: TimeDelta) {
        self.clock.advance(time);
        timekeeper::look(&self.system).await.unwrap();
        self.caught_up().await;
    }

    async fn caught_up(&self) {
        let head = *self.system.log.head().borrow();
        self.system.visible(head).await.unwrap();
    }

    async fn job(&self, id: JobId) -> Arc<crate::views::JobRow> {
        self.caught_up().await;
        self.system.views.job(&id).unwrap().unwrap()
    }

    /// The SHA-256 of each file that a user sees.
    async fn files(&self, user: &str) -> Vec<String> {
        self.caught_up().await;
        let page = self.system.views.files(&self.user(user), None, 50).unwrap();
        page.items.into_iter().map(|file| file.sha256).collect()
    }
}

fn master(dir: &tempfile::TempDir) -> MasterKey {
    MasterKey::kept_in(&dir.path().join("master.key"))
}

fn is_lost<T>(result: &Result<T, Error>) -> bool {
    matches!(result, Err(Error::Job(Failure::Refused(job::Refusal::LeaseLost))))
}

fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest;
    hex::encode(sha2::Sha256::digest(bytes))
}

#[actix::test]
async fn a_job_is_done_once_and_the_same_completion_again_answers_the_same() {
    let world = World::new().await;
    let id = world.ask("ada").await;
    let leased = world.lease("w").await;
    assert_eq!((leased.job_id, leased.attempt), (id, 1));
    let missing = world.complete(&leased).await;
    assert!(matches!(missing, Err(Error::OutputMissing("video"))), "{missing:?}");
    world.hand_in(&leased, b"film").await.unwrap();
    assert_eq!(world.files("ada").await.len(), 0, "seen before it is completed");
    let done = world.complete(&leased).await.unwrap();
    let end = *world.system.log.head().borrow();
    assert_eq!(world.complete(&leased).await.unwrap(), done);
    assert_eq!(*world.system.log.head().borrow(), end);
    let job = world.job(id).await;
    assert_eq!(Completed::Done(job.output.clone().unwrap()), done);
    assert_eq!(world.files("ada").await, [sha256(b"film")]);
    // Nobody else has completed it.
    let other = Leased { lease_id: LeaseId(Uuid::from_u128(7)), ..leased };
    assert!(is_lost(&world.complete(&other).await));
}

#[actix::test]
async fn a_worker_that_was_killed_costs_one_attempt_and_no_job() {
    let world = World::new().await;
    let id = world.ask("ada").await;
    let dead = world.lease("dead").await;
    world.hand_in(&dead, b"half").await.unwrap();
    world.pass(LEASE - TimeDelta::seconds(1)).await;
    assert_eq!(world.job(id).await.state, "running");
    world.pass(TimeDelta::seconds(1)).await;
    let second = world.lease("second").await;
    assert_eq!((second.job_id, second.attempt), (id, 2));
    world.hand_in(&second, b"whole").await.unwrap();
    world.complete(&second).await.unwrap();
    assert_eq!(world.files("ada").await, [sha256(b"whole")]);
}

#[actix::test]
async fn a_worker_that_wakes_up_too_late_changes_nothing_at_any_step() {
    let world = World::new().await;
    let id = world.ask("ada").await;
    let frozen = world.lease("frozen").await;
    world.hand_in(&frozen, b"late").await.unwrap();
    world.pass(LEASE).await;
    let second = world.lease("second").await;
    world.hand_in(&second, b"good").await.unwrap();

    let late = async || {
        let (job_id, lease_id) = (frozen.job_id, frozen.lease_id);
        let leasing = &world.leasing;
        assert!(is_lost(&leasing.progress(job_id, lease_id, &by("frozen"), 99, None).await));
        assert!(is_lost(&world.hand_in(&frozen, b"later").await));
        assert!(is_lost(&world.complete(&frozen).await));
        let failed = leasing.fail(job_id, lease_id, &by("frozen"), "x".into(), true).await;
        assert!(is_lost(&failed));
    };
    let end = *world.system.log.head().borrow();
    late().await;
    assert_eq!(*world.system.log.head().borrow(), end, "a late worker left something in the log");
    world.complete(&second).await.unwrap();
    let end = *world.system.log.head().borrow();
    late().await;
    assert_eq!(*world.system.log.head().borrow(), end);
    assert_eq!(world.job(id).await.attempt, 2);
    assert_eq!(world.files("ada").await, [sha256(b"good")]);
}

/// The worst moment: the files are stored, the completion is not.
#[actix::test]
async fn what_an_attempt_left_that_broke_off_while_it_was_stored_is_cleared_by_the_next() {
    let world = World::new().await;
    let id = world.ask("ada").await;
    let first = world.lease("first").await;
    world.hand_in(&first, b"first").await.unwrap();
    let request = first.request.clone();
    let handed = world.leasing.outputs.of(Kind::Video, id, first.lease_id).await.unwrap();
    let (slot, file) = &handed[0];
    world.leasing.keep(id, first.lease_id, &by("first"), &request, slot, file).await.unwrap();
    world.pass(LEASE).await;
    let second = world.lease("second").await;
    assert_eq!(world.files("ada").await.len(), 0);
    world.hand_in(&second, b"second").await.unwrap();
    world.complete(&second).await.unwrap();
    assert!(is_lost(&world.complete(&first).await));
    let origin = by("first");
    let finish = world.leasing.finish(id, first.lease_id, &origin, &request, &handed, SHAPE).await;
    assert!(is_lost(&finish), "{finish:?}");
    assert_eq!(world.files("ada").await, [sha256(b"second")]);
}

#[actix::test]
async fn what_comes_of_a_request_goes_back_to_it() {
    let world = World::new().await;
    let id = JobId(world.clock.fresh_id());
    let request = Command::Request(video_of(world.user("ada"), "a pier"));
    let mut origin = Metadata::by("ada", Source::Api);
    origin.correlation_id = "req_1".to_owned();
    let asked = world.system.jobs.execute(id, request, origin).await.unwrap();
    world.system.visible(asked.position).await.unwrap();
    let leased = world.lease("w").await;
    world.hand_in(&leased, b"made").await.unwrap();
    let origin = by("w");
    world.leasing.progress(id, leased.lease_id, &origin, 50, None).await.unwrap();
    world.leasing.complete(id, leased.lease_id, &origin, |_| SHAPE).await.unwrap();
    let events = world.system.log.read_all(asked.position, 100).await.unwrap();
    let kinds: Vec<&str> = events.iter().map(|event| &*event.kind).collect();
    let expected = ["job.leased.v1", "job.progressed.v1", "file.stored.v1", "job.completed.v1"];
    assert_eq!(kinds, expected);
    let requested = world.system.log.read_all(asked.position - 1, 1).await.unwrap().remove(0);
    for (event, cause) in events.iter().zip([&requested, &events[0], &events[1], &events[1]]) {
        let metadata: Metadata = serde_json::from_slice(&event.metadata).unwrap();
        assert_eq!(metadata.correlation_id, "req_1", "{}", event.kind);
        assert_eq!(metadata.causation_id, Some(cause.id.to_string()), "{}", event.kind);
    }
    // The next worker's also, after the user's next word.
    let id = world.ask("ada").await;
    let leased = world.lease("w").await;
    assert_eq!((leased.job_id, &*leased.last.correlation_id), (id, ""));
    let mut origin = Metadata::by("ada", Source::Api);
    origin.correlation_id = "req_2".to_owned();
    world.system.jobs.execute(id, Command::Cancel { by: world.user("ada") }, origin).await.unwrap();
    let keyring = Keyring::new(&world.blobs, master(&world.dir));
    let (log, clock) = (Arc::clone(&world.system.log), world.clock.clone());
    let mut loaded = Entity::<Job>::new(log, clock, keyring, format!("job-{id}"));
    let found = loaded.execute(&Command::Look, &by("")).await.unwrap();
    assert_eq!(found.last.unwrap().correlation_id, "req_2");
    world.pass(LEASE).await;
    let head = *world.system.log.head().borrow();
    let ended = world.system.log.read_all(head - 1, 1).await.unwrap().remove(0);
    assert_eq!(ended.kind, "job.cancelled.v1");
    let metadata: Metadata = serde_json::from_slice(&ended.metadata).unwrap();
    assert_eq!(metadata.correlation_id, "req_2");
}

#[actix::test]
async fn a_job_goes_back_to_its_request_whatever_ids_its_workers_calls_bear() {
    let world = World::new().await;
    let named = |id: &str, by: Metadata| Metadata { correlation_id: id.to_owned(), ..by };
    let (id, request) = (JobId(world.clock.fresh_id()), video_of(world.user("ada"), "a pier"));
    let asked = named("req_1", Metadata::by("ada", Source::Api));
    let asked = world.system.jobs.execute(id, Command::Request(request), asked).await.unwrap();
    world.system.visible(asked.position).await.unwrap();
    let poll = named("poll_1", by("w"));
    let leased = world.leasing.lease(&poll, &ANY, |_| false).await.unwrap().unwrap();
    assert_eq!(leased.last.correlation_id, "req_1");
    let origin = named("report_1", by("w"));
    world.leasing.progress(id, leased.lease_id, &origin, 50, None).await.unwrap();
    world.leasing.progress(id, leased.lease_id, &by("w"), 60, None).await.unwrap();
    let events = world.system.log.read_all(asked.position, 100).await.unwrap();
    let ids = events
        .iter()
        .map(|event| serde_json::from_slice::<Metadata>(&event.metadata).unwrap().correlation_id);
    assert_eq!(ids.collect::<Vec<_>>(), ["poll_1", "report_1", "req_1"]);
}

#[actix::test]
async fn a_worker_learns_of_a_cancellation_and_its_result_is_thrown_away() {
    let world = World::new().await;
    let id = world.ask("ada").await;
    let leased = world.lease("w").await;
    world.hand_in(&leased, b"unwanted").await.unwrap();
    let cancel = Command::Cancel { by: world.user("ada") };
    world.system.jobs.execute(id, cancel, by("ada")).await.unwrap();
    let report = world.leasing.progress(id, leased.lease_id, &by("w"), 50, None).await.unwrap();
    assert!(report.outcome.cancelled);
    assert_eq!(world.complete(&leased).await.unwrap(), Completed::Cancelled);
    assert_eq!(world.job(id).await.state, "cancelled");
    assert_eq!(world.files("ada").await.len(), 0);
}

#[actix::test]
async fn workers_that_ask_at_once_get_different_jobs_in_the_order_of_the_queue() {
    let world = World::new().await;
    let mut asked = vec![];
    for user in ["ada", "ada", "bob", "eve"] {
        asked.push(world.ask(user).await);
    }
    let place = |id: &JobId| {
        let job = world.system.views.job(id).unwrap().unwrap();
        world.system.views.queue_position(&job, world.clock.now(), world.leasing.caps())
    };
    let said: Vec<_> = asked.iter().map(place).collect();
    assert_eq!(said, [Some(1), Some(4), Some(2), Some(3)]);
    let worker = by("w");
    let at_once = (0..5).map(|_| world.leasing.lease(&worker, &ANY, |_| false));
    let leased: Vec<_> = futures_util::future::join_all(at_once).await;
    let leased: Vec<_> = leased.into_iter().map(|it| it.unwrap().map(|it| it.job_id)).collect();
    let expected = [0, 2, 3, 1].map(|index| Some(asked[index]));
    assert_eq!(leased[..4], expected);
    assert_eq!(leased[4], None);
}

#[actix::test]
async fn a_waiting_worker_gets_the_job_that_comes_and_nothing_when_none_does() {
    let world = World::new().await;
    let (stop, stopping) = watch::channel(false);
    let worker = by("w");
    let wait = |long| world.leasing.lease_within(&worker, &ANY, long, stopping.clone());
    assert!(wait(Duration::ZERO).await.unwrap().is_none());
    let (leased, asked) = tokio::join!(wait(Duration::from_secs(60)), world.ask("ada"));
    assert_eq!(leased.unwrap().unwrap().job_id, asked);
    let stopped = async { stop.send_replace(true) };
    let (none, _) = tokio::join!(wait(Duration::from_secs(60)), stopped);
    assert!(none.unwrap().is_none());
}

#[actix::test]
async fn jobs_that_cannot_be_read_keep_no_other_from_being_leased() {
    let world = World::new().await;
    let first = world.ask("eve").await;
    // More than one look passes over for any other reason.
    for _ in 0..TRIES {
        world.ask("eve").await;
    }
    let poisoned = world.ask("bob").await;
    let good = world.ask("ada").await;
    world.poison(poisoned).await;
    world.lose_the_key_of("eve").await;
    let world = world.again();
    assert_eq!(
        world.system.views.next_job(world.clock.now(), &Caps::DEFAULT, &ANY, |_| false),
        Some(first)
    );
    assert_eq!(world.lease("w").await.job_id, good);
    let unreadable = world.leasing.turn.lock().await;
    assert!(unreadable.contains_key(&first) && unreadable.contains_key(&poisoned));
}

#[actix::test]
async fn a_job_that_could_not_be_read_is_tried_again_after_a_while() {
    let world = World::new().await;
    let id = world.ask("eve").await;
    let key = world.dir.path().join("blobs/keys/eve");
    let bytes = std::fs::read(&key).unwrap();
    std::fs::remove_file(&key).unwrap();
    let world = world.again();
    assert!(world.leasing.lease(&by("w"), &ANY, |_| false).await.unwrap().is_none());
    std::fs::write(&key, bytes).unwrap();
    assert!(
        world.leasing.lease(&by("w"), &ANY, |_| false).await.unwrap().is_none(),
        "tried at once"
    );
    world.clock.advance(UNREADABLE_FOR);
    assert_eq!(world.lease("w").await.job_id, id);
}

#[test]
fn what_fails_for_every_job_is_told_and_what_fails_for_one_is_not() {
    let user = UserId::try_from("ada").unwrap();
    let of_key = |error| Failure::Keys(keyring::Error::Key(user.clone(), error));
    let of_store = || blobs::Error::from(std::io::Error::other("away"));
    for (failure, of_one) in [
        (Failure::from(log::Error::Corrupt { position: 7, what: String::new() }), true),
        (Failure::from(log::Error::Storage("away".to_owned())), false),
        (Failure::from(log::Error::Unwritable("away".to_owned())), false),
        (Failure::from(log::Error::Foreign("not ours".to_owned())), false),
        (of_key(vault::Error::Unopenable), true),
        (of_key(vault::Error::Store(of_store())), false),
        (Failure::Keys(keyring::Error::Store(of_store())), false),
    ] {
        assert_eq!(is_of_one_job(&failure), of_one, "{failure}");
    }
}

#[actix::test]
async fn of_two_completions_at_once_under_one_lease_the_second_takes_nothing_from_the_first() {
    let world = World::new().await;
    let id = world.ask("ada").await;
    let leased = world.lease("w").await;
    world.hand_in(&leased, b"film").await.unwrap();
    let handed = world.leasing.outputs.of(Kind::Video, id, leased.lease_id).await.unwrap();
    let (origin, longer) = (by("w"), Shape { duration: Some(2.0), ..SHAPE });
    let finish =
        |shape| world.leasing.finish(id, leased.lease_id, &origin, &leased.request, &handed, shape);
    finish(SHAPE).await.unwrap();
    assert!(is_lost(&finish(longer).await));
    assert_eq!(world.files("ada").await, [sha256(b"film")]);
}

#[actix::test]
async fn a_job_that_was_passed_over_by_a_clock_ahead_waits_no_longer_than_any() {
    let world = World::new().await;
    let id = world.ask("ada").await;
    world.clock.advance(TimeDelta::hours(2));
    world.leasing.turn.lock().await.insert(id, world.clock.now());
    assert_eq!(
        world.leasing.lease(&by("w"), &ANY, |_| false).await.unwrap().map(|it| it.job_id),
        None
    );
    world.clock.advance(TimeDelta::hours(-2));
    assert_eq!(world.lease("w").await.job_id, id);
}
