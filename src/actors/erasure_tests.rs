//! That nothing stays of a deleted user, whoever deleted it and whatever broke off meanwhile.

use std::path::Path;

use tempfile::TempDir;

use super::*;
use crate::actors::dead_letters::{Heading, Letter};
use crate::actors::keyring::Keyring;
use crate::actors::rebuild::rebuild;
use crate::actors::renewal;
use crate::clock::Clock;
use crate::config::BlobStore;
use crate::domain::ids::{JobId, LeaseId};
use crate::domain::job::tests::video_of;
use crate::domain::text::Personal;
use crate::domain::user::{Profile, Snapshot};
use crate::log;
use crate::media::blobs::Blobs;
use crate::media::reservations::Reservations;
use crate::media::vault::MasterKey;
use crate::views::{Building, Views};

const MARKER: &str = "marker-of-ada";

struct House {
    system: Arc<System>,
    eraser: Eraser,
    dir: TempDir,
}

fn ada() -> UserId {
    UserId::try_from("ada".to_owned()).unwrap()
}

fn keyring(dir: &Path) -> Keyring {
    let blobs = Blobs::open(&BlobStore::File, dir).unwrap();
    Keyring::new(&blobs, MasterKey::kept_in(&dir.join("master.key")))
}

impl House {
    /// With Ada in it, and a letter about her.
    async fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let log = log::open("embedded", dir.path()).await.unwrap();
        let views = Views::open(&dir.path().join("views.sqlite")).unwrap();
        let system = System::start(Clock::system(), log, views, keyring(dir.path()));
        let eraser = eraser(&system, dir.path());
        let email = Some(Personal::Known(MARKER.to_owned()));
        let profile = Profile { email, ..Profile::default() };
        let house = Self { system, eraser, dir };
        house.tell(Command::Provision(Snapshot { profile, ..Snapshot::default() }.into())).await;
        house.write_letter().await;
        house
    }

    async fn tell(&self, command: Command) {
        let origin = Metadata::by("test", Source::System);
        let done = self.system.users.execute(ada(), command, origin).await.unwrap();
        self.system.visible(done.position).await.unwrap();
    }

    /// Whose worker has not been heard of since.
    async fn lease_a_job(&self) -> JobId {
        let job_id = JobId(self.system.clock.fresh_id());
        let request = video_of(ada(), MARKER);
        let lease_id = LeaseId(self.system.clock.fresh_id());
        let lease = JobCommand::Lease { lease_id, worker_id: "w1".to_owned() };
        for command in [JobCommand::Request(request), lease] {
            let origin = Metadata::by("test", Source::System);
            self.system.jobs.execute(job_id, command, origin).await.unwrap();
        }
        self.catch_up().await;
        job_id
    }

    async fn catch_up(&self) {
        self.system.visible(*self.system.log.head().borrow()).await.unwrap();
    }

    /// What a server does within seconds; how much is left.
    async fn clear(&mut self) -> usize {
        let left = self.eraser.look().await.unwrap();
        renewal::look(&self.system.views).await.unwrap();
        left + usize::from(self.system.views.holds_residue().unwrap())
    }

    async fn write_letter(&self) {
        let heading = Heading {
            message_id: "msg_1".to_owned(),
            received_at: self.system.clock.now(),
            kind: None,
            reason: "x".to_owned(),
        };
        let body = format!(r#"{{"data":{{"id":"ada","email":"{MARKER}"}}}}"#);
        let letter = Letter { heading, body };
        self.eraser.letters.keep(&letter, self.system.clock.now()).await.unwrap();
    }

    /// Files of the data directory that hold the marker.
    fn found(&self) -> Vec<String> {
        let mut found = vec![];
        let mut folders = vec![self.dir.path().to_owned()];
        while let Some(folder) = folders.pop() {
            for path in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
                if path.is_dir() {
                    folders.push(path);
                } else if std::fs::read(&path)
                    .unwrap()
                    .windows(MARKER.len())
                    .any(|part| part == MARKER.as_bytes())
                {
                    found.push(path.file_name().unwrap().to_string_lossy().into_owned());
                }
            }
        }
        found.sort();
        found
    }
}

fn eraser(system: &Arc<System>, dir: &Path) -> Eraser {
    let blobs = Blobs::open(&BlobStore::File, dir).unwrap();
    let uploads = Uploads::open(&blobs, &Reservations::default()).unwrap();
    Eraser::new(Arc::clone(system), DeadLetters::new(&blobs), Arc::new(uploads))
}

#[actix::test]
async fn a_deleted_user_leaves_nothing_in_any_file() {
    let mut house = House::new().await;
    assert_eq!(house.clear().await, 0);
    assert_eq!(house.found(), ["msg_1.json", "views.sqlite-wal"]);
    house.tell(Command::Delete).await;
    assert_eq!(house.clear().await, 0);
    assert_eq!(house.found(), [""; 0]);
    // What is kept of the user later goes too.
    house.write_letter().await;
    let file = house.system.views.present_file();
    house.clear().await;
    assert_eq!(house.found(), [""; 0]);
    assert_eq!(house.system.views.present_file(), file, "once is enough");
}

#[actix::test]
async fn what_happens_while_the_read_model_is_renewed_shows_in_the_new_one() {
    let mut house = House::new().await;
    house.tell(Command::Delete).await;
    house.eraser.look().await.unwrap();
    let views = house.system.views.clone();
    let building = Building::beside(&views.path()).unwrap().copied().unwrap();
    let bob = UserId::try_from("bob".to_owned()).unwrap();
    let origin = Metadata::by("test", Source::System);
    let provision = Command::Provision(Snapshot::default().into());
    let done = house.system.users.execute(&bob, provision, origin).await.unwrap();
    house.system.visible(done.position).await.unwrap();
    assert!(views.user(&bob).unwrap().is_some());
    building.hand_over().unwrap();
    renewal::look(&views).await.unwrap();
    assert!(!views.holds_residue().unwrap());
    assert!(views.user(&bob).unwrap().is_some() && views.checkpoint() >= done.position);
    assert_eq!(house.found(), [""; 0]);
}

#[actix::test]
async fn where_no_timekeeper_runs_a_job_that_nobody_works_on_any_more_ends() {
    for (last_word, left) in [(None, 1), (Some(JobCommand::Abandon), 0)] {
        let mut house = House::new().await;
        house.eraser.last_word = last_word;
        let job_id = house.lease_a_job().await;
        house.tell(Command::Delete).await;
        for _ in 0..3 {
            house.eraser.look().await.unwrap();
            house.catch_up().await;
        }
        assert_eq!(house.eraser.look().await.unwrap(), left);
        let state = house.system.views.job(&job_id).unwrap().unwrap().state.clone();
        assert_eq!(state, if left == 0 { "cancelled" } else { "cancelling" });
    }
}

#[actix::test]
async fn views_that_were_built_before_a_deletion_show_nothing_once_they_have_taken_over() {
    let mut house = House::new().await;
    let views = house.system.views.clone();
    let (log, keyring) = (Arc::clone(&house.system.log), house.system.keyring.clone());
    let building = Building::beside(&views.path()).unwrap();
    let built = rebuild(log, keyring, building, views.checkpoint(), |_| ()).await.unwrap();
    house.tell(Command::Delete).await;
    house.eraser.look().await.unwrap();
    let before = views.present_file();
    drop(built.finish_as_current().unwrap());
    while views.present_file() == before {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(house.found(), ["views-1.sqlite"]);
    house.clear().await;
    assert_eq!(house.found(), [""; 0]);
}

#[actix::test]
async fn what_a_crash_left_is_erased_after_the_next_start() {
    let house = House::new().await;
    house.tell(Command::Delete).await;
    // The first one never came to look; nor did it when a backup brought the key back.
    for _ in 0..2 {
        eraser(&house.system, house.dir.path()).look().await.unwrap();
        renewal::look(&house.system.views).await.unwrap();
        assert_eq!(house.found(), [""; 0]);
        let key = house.dir.path().join("blobs/keys/ada");
        assert!(!key.exists());
        std::fs::create_dir_all(key.parent().unwrap()).unwrap();
        std::fs::write(key, "brought back").unwrap();
    }
}

#[actix::test]
async fn a_tombstone_that_another_process_wrote_deletes_the_user_here() {
    let mut house = House::new().await;
    house.clear().await;
    let now = house.system.clock.now();
    keyring(house.dir.path()).destroy(&ada(), now).await.unwrap();
    house.clear().await;
    assert!(house.system.views.user_standing(&ada()).unwrap().deleted);
    assert_eq!(house.found(), [""; 0]);
    let head = *house.system.log.head().borrow();
    house.clear().await;
    assert_eq!(*house.system.log.head().borrow(), head, "once is enough");
}

#[actix::test]
async fn a_key_that_cannot_be_removed_holds_up_nobody_else() {
    let mut house = House::new().await;
    let bob = UserId::try_from("bob".to_owned()).unwrap();
    house.tell(Command::Delete).await;
    for command in [Command::Provision(Snapshot::default().into()), Command::Delete] {
        let origin = Metadata::by("test", Source::System);
        house.system.users.execute(&bob, command, origin).await.unwrap();
    }
    house.catch_up().await;
    // What looks like an unfinished copy of Ada's key, and is no file.
    let blobs = house.dir.path().join("blobs");
    let obstacle = blobs.join("keys/ada#1");
    std::fs::create_dir_all(&obstacle).unwrap();
    // The second one finds the tombstones.
    for _ in 0..2 {
        house.eraser.look().await.unwrap_err();
        assert!(blobs.join("erased/bob").exists() && !blobs.join("keys/bob").exists());
        house.eraser = eraser(&house.system, house.dir.path());
    }
    assert!(blobs.join("keys/ada").exists());
    std::fs::remove_dir(&obstacle).unwrap();
    house.clear().await;
    assert!(!blobs.join("keys/ada").exists());
    assert_eq!(house.found(), [""; 0]);
}
