//! One server without its front end: all that is behind it, on the thread of the simulation.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use chrono::{DateTime, TimeDelta, Utc};
use t2m::actors::System;
use t2m::actors::dead_letters::DeadLetters;
use t2m::actors::directory::{Arbiters, Directory};
use t2m::actors::erasure::Eraser;
use t2m::actors::keyring::Keyring;
use t2m::actors::leasing::Leasing;
use t2m::actors::projector::{self, Projector};
use t2m::actors::secrets::{SECRETS, Secrets};
use t2m::actors::storekeeper::Storekeeper;
use t2m::clock::Clock;
use t2m::config::ByTier;
use t2m::domain::tier::Caps;
use t2m::log::EventLog;
use t2m::media::blobs::Blobs;
use t2m::media::reservations::Reservations;
use t2m::media::uploads::Uploads;
use t2m::media::vault::{MasterKey, SealingKey, Vault};
use t2m::views::{Building, Views};
use tokio::task::JoinHandle;

use super::log::{SimulatedLog, Storage};
use super::store::SimulatedStore;

/// A node's clock, and every time that it has shown.
pub struct Watch {
    pub clock: Clock,
    shown: RefCell<Vec<DateTime<Utc>>>,
}

/// One life of a node, from a start to a crash.
pub struct Node {
    pub index: usize,
    pub log: Arc<SimulatedLog>,
    pub system: Arc<System>,
    pub leasing: Leasing,
    pub keeper: Storekeeper,
    pub secrets: Secrets,
    pub eraser: tokio::sync::Mutex<Eraser>,
    projector: JoinHandle<()>,
}

impl Watch {
    pub fn new(start: DateTime<Utc>, seed: u64) -> Self {
        Self { clock: Clock::seeded(start, seed), shown: RefCell::new(vec![start]) }
    }

    pub fn advance(&self, by: TimeDelta) {
        self.clock.advance(by);
        self.shown.borrow_mut().push(self.clock.now());
    }

    /// How many times it has shown so far.
    pub fn shown(&self) -> usize {
        self.shown.borrow().len()
    }

    /// What it has shown since there were so many, and what it showed then.
    pub fn since(&self, shown: usize) -> Vec<DateTime<Utc>> {
        self.shown.borrow()[shown - 1..].to_vec()
    }
}

impl Node {
    pub fn start(
        index: usize,
        clock: &Clock,
        storage: &Arc<Storage>,
        store: &Arc<SimulatedStore>,
        dir: &Path,
    ) -> Self {
        let dir = dir.join(format!("node-{index}"));
        std::fs::create_dir_all(&dir).unwrap();
        let simulated = storage.open(&format!("node {index}"));
        let log = Arc::clone(&simulated) as Arc<dyn EventLog>;
        let views = Views::open(&views_of(&dir)).unwrap();
        let blobs = Arc::new(Blobs::over(Arc::clone(store) as _, &dir));
        let master = || MasterKey::given(SealingKey::new(&[7; 32]).unwrap());
        let keyring = Keyring::new(&blobs, master());
        let projector = Projector::new(Arc::clone(&log), views.clone(), keyring.clone());
        let arbiters = Arbiters::here();
        let (progress, news) = (projector.progress(), projector.news());
        let projector = actix::spawn(projector.follow());
        let system = Arc::new(System {
            users: Directory::new(&arbiters, &log, clock, &keyring),
            sessions: Directory::new(&arbiters, &log, clock, &keyring),
            files: Directory::new(&arbiters, &log, clock, &keyring),
            jobs: Directory::new(&arbiters, &log, clock, &keyring),
            clock: clock.clone(),
            log,
            views,
            keyring,
            progress,
            news,
        });
        let uploads = Arc::new(Uploads::open(&blobs, &Reservations::default()).unwrap());
        let letters = DeadLetters::new(&blobs);
        Self {
            index,
            log: simulated,
            leasing: Leasing::new(Arc::clone(&system), &blobs, Caps::DEFAULT),
            secrets: Secrets::new(Vault::new(&blobs, SECRETS, master())),
            eraser: Eraser::new(Arc::clone(&system), letters, Arc::clone(&uploads)).into(),
            keeper: Storekeeper {
                system: Arc::clone(&system),
                blobs,
                uploads,
                retention: ByTier { standard: Some(TimeDelta::days(2)), premium: None },
            },
            system,
            projector,
        }
    }

    /// From one moment to the next nobody is there any more. What was under way stays as it is.
    pub fn crash(&self) {
        self.log.crash();
        self.projector.abort();
    }

    /// Builds the views anew, beside those that are read, which then take their place.
    pub async fn rebuild(&self) -> Result<(), projector::Error> {
        let mut building = Building::beside(&self.system.views.path())?;
        self.fill(&mut building).await?;
        building.finish_as_current()?;
        Ok(())
    }

    /// What the views should be: the whole log once more.
    pub async fn replayed(&self, path: &Path) -> Result<String, projector::Error> {
        let mut building = Building::at(path)?;
        self.fill(&mut building).await?;
        Ok(building.finish()?.content_hash()?)
    }

    async fn fill(&self, building: &mut Building) -> Result<(), projector::Error> {
        let System { log, keyring, .. } = &*self.system;
        let until = *log.head().borrow();
        while building.checkpoint() < until {
            let from = building.checkpoint();
            let happened = projector::next(log.as_ref(), keyring, from, until, 100).await?;
            if happened.is_empty() {
                break;
            }
            building.apply(&happened, until)?;
        }
        Ok(())
    }
}

fn views_of(dir: &Path) -> PathBuf {
    dir.join("views.sqlite")
}

/// A node has lost its read model.
pub fn lose_views(dir: &Path, index: usize) {
    let dir = dir.join(format!("node-{index}"));
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        if entry.file_name().to_string_lossy().starts_with("views") {
            std::fs::remove_file(entry.path()).unwrap();
        }
    }
}
