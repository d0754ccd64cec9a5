//! Thin shells over plain structs: who orders commands, who follows the log, who acts on what is
//! due. The structs do the work in ordinary methods that tests call directly.

pub mod callbacks;
pub mod codec;
pub mod dead_letters;
pub mod directory;
pub mod dispatcher;
pub mod entity;
pub mod erasure;
pub mod keyring;
pub mod leasing;
pub mod metadata_sync;
pub mod news;
pub mod outputs;
pub mod projector;
pub mod rebuild;
pub mod records;
pub mod renewal;
pub mod sealing;
pub mod secrets;
pub mod standing;
pub mod storekeeper;
pub mod supervise;
pub mod timekeeper;

use std::sync::Arc;
use std::time::Duration;

use crate::clock::Clock;
use crate::domain::{file::File, job::Job, session::Session, user::User};
use crate::log::EventLog;
use crate::views::{View, Views};

use directory::Directory;
use keyring::Keyring;
use news::News;
use projector::{Progress, Projector};

/// The longest that a command waits for its own effect to be readable.
pub const VISIBLE_WITHIN: Duration = Duration::from_secs(2);

/// Everything behind the front end: one directory an aggregate, and the read model.
pub struct System {
    pub clock: Clock,
    pub log: Arc<dyn EventLog>,
    pub views: Views,
    pub keyring: Keyring,
    pub users: Directory<User>,
    pub sessions: Directory<Session>,
    pub files: Directory<File>,
    pub jobs: Directory<Job>,
    /// How far the read model is.
    pub progress: Progress,
    /// Whose part of it has moved.
    pub news: News,
}

impl System {
    /// Starts the entities' arbiters and the projector; needs a running actix system.
    pub fn start(
        clock: Clock,
        log: Arc<dyn EventLog>,
        views: Views,
        keyring: Keyring,
    ) -> Arc<Self> {
        let arbiters = directory::Arbiters::new(2);
        let projector = Projector::new(Arc::clone(&log), views.clone(), keyring.clone());
        let news = projector.news();
        let progress = projector.start();
        Arc::new(Self {
            users: Directory::new(&arbiters, &log, &clock, &keyring),
            sessions: Directory::new(&arbiters, &log, &clock, &keyring),
            files: Directory::new(&arbiters, &log, &clock, &keyring),
            jobs: Directory::new(&arbiters, &log, &clock, &keyring),
            clock,
            log,
            views,
            keyring,
            progress,
            news,
        })
    }

    /// Waits until what was written at `position` can be read, two seconds at most.
    ///
    /// # Errors
    /// [`projector::NotCaughtUp`] when it takes longer.
    pub async fn visible(&self, position: u64) -> Result<(), projector::NotCaughtUp> {
        self.progress.reached(position, None, VISIBLE_WITHIN).await
    }

    /// The same of an event that shows in one view.
    ///
    /// # Errors
    /// [`projector::NotCaughtUp`] also when that view is parked before it.
    pub async fn visible_in(
        &self,
        view: View,
        position: u64,
    ) -> Result<(), projector::NotCaughtUp> {
        self.progress.reached(position, Some(view), VISIBLE_WITHIN).await
    }
}
