//! Follows the log, feeds the read model, and says how far it is.

use std::sync::Arc;
use std::time::Duration;

use actix::Arbiter;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::codec::{self, AnyEvent};
use super::keyring::{self, Keyring};
use super::news::News;
use super::supervise::supervise;
use crate::domain::{Aggregate, file::File, job::Job, session::Session, user::User};
use crate::log::{self, EventLog, Recorded};
use crate::views::{self, Entity, Happened, Parked, View, Views};

/// Events applied in one transaction at the most, so that none waits long for its own to be seen.
const BATCH: usize = 1000;
/// How long a failed read or write of the read model waits before it is tried again.
const PAUSE: Duration = Duration::from_millis(500);
/// How many times in a row it has failed when it is said to stand still.
const FAILURES: u32 = 4;
/// How often it looks whether another process has put new views in the place of these.
const SUCCESSOR_EVERY: Duration = Duration::from_secs(1);

/// How far the read model is, and whether all of it still moves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reached {
    /// The last position applied.
    pub position: u64,
    /// The views that stand still since an event could not be understood.
    pub parked: Vec<Parked>,
    /// Nothing moves: time and again the log could not be read, or the read model not be written.
    pub stands_still: bool,
}

/// The read model has not reached a position in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the read model has not caught up yet")]
pub struct NotCaughtUp;

/// Lets anyone ask or wait for how far the read model is.
#[derive(Debug, Clone)]
pub struct Progress {
    at: watch::Receiver<Reached>,
    /// Wakes all who wait in the order in which they came. A watch wakes them in an order that it
    /// draws, and then no simulation is the same twice.
    bell: Arc<Notify>,
}

impl Progress {
    pub fn now(&self) -> Reached {
        self.at.borrow().clone()
    }

    /// Waits for `position`, for `within` at most; in one view, or wherever it may be.
    ///
    /// # Errors
    /// [`NotCaughtUp`] when it took too long, or the view is parked at or before it.
    pub async fn reached(
        &self,
        position: u64,
        view: Option<View>,
        within: Duration,
    ) -> Result<(), NotCaughtUp> {
        let stands = |parked: &Parked| Some(parked.view) == view && parked.position <= position;
        match tokio::time::timeout(within, self.arrival(position)).await {
            Ok(()) if !self.at.borrow().parked.iter().any(stands) => Ok(()),
            _ => Err(NotCaughtUp),
        }
    }

    /// Waits until what lies at `position` shows in a view, also while that is parked before it.
    ///
    /// # Errors
    /// [`NotCaughtUp`] when it took too long.
    pub async fn shown(
        &self,
        position: u64,
        view: View,
        within: Duration,
    ) -> Result<(), NotCaughtUp> {
        let hides = |parked: &Parked| parked.view == view && parked.position <= position;
        let shows = |at: &Reached| at.position >= position && !at.parked.iter().any(hides);
        tokio::time::timeout(within, self.when(shows)).await.map_err(|_| NotCaughtUp)
    }

    /// Waits for `position` for as long as the read model moves at all; whether it got there.
    pub async fn reached_or_stuck(&self, position: u64) -> bool {
        self.when(|at| at.position >= position || at.stands_still).await;
        self.at.borrow().position >= position
    }

    async fn arrival(&self, position: u64) {
        self.when(|at| at.position >= position).await;
    }

    async fn when(&self, holds: impl Fn(&Reached) -> bool) {
        loop {
            // Before the look, so that nothing moves unheard between the two.
            let mut rings = std::pin::pin!(self.bell.notified());
            rings.as_mut().enable();
            if holds(&self.at.borrow()) {
                return;
            }
            rings.await;
        }
    }

    /// Resolves when the read model has moved since this handle last looked.
    pub async fn moved(&mut self) {
        // The sender lives as long as the system; without it nothing moves any more.
        if self.at.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// Why a batch did not become part of the read model; it is then as before.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Log(#[from] log::Error),
    #[error(transparent)]
    Keys(#[from] keyring::Error),
    #[error(transparent)]
    Views(#[from] views::Error),
}

/// The way from the log into one read model; the same for following and for replay.
pub struct Projector {
    log: Arc<dyn EventLog>,
    views: Views,
    keyring: Keyring,
    reached: watch::Sender<Reached>,
    bell: Arc<Notify>,
    news: News,
}

impl Projector {
    pub fn new(log: Arc<dyn EventLog>, views: Views, keyring: Keyring) -> Self {
        views.set_stride(log.stride());
        let (position, parked) = (views.checkpoint(), views.parked());
        let (reached, _) = watch::channel(Reached { position, parked, stands_still: false });
        let (bell, news) = (Arc::default(), News::default());
        Self { log, views, keyring, reached, bell, news }
    }

    pub fn progress(&self) -> Progress {
        Progress { at: self.reached.subscribe(), bell: Arc::clone(&self.bell) }
    }

    /// Whose part of the read model has moved.
    pub fn news(&self) -> News {
        self.news.clone()
    }

    /// Follows the log on a thread of its own.
    pub fn start(self) -> Progress {
        let progress = self.progress();
        let projector = Arc::new(self);
        let mut begun = false;
        let follow = move || {
            // Until it moves again: nobody shall wait for it, or take it to be well.
            projector.tell_standing(std::mem::replace(&mut begun, true));
            Arc::clone(&projector).keep_up()
        };
        Arbiter::new().spawn(supervise("projector", follow));
        progress
    }

    /// Applies what the log holds beyond the checkpoint, one batch; the number of events.
    ///
    /// # Errors
    /// [`Error`]; an event that cannot be understood is none: its view is parked there.
    pub async fn apply_next(&self, until: u64) -> Result<usize, Error> {
        let happened = self.next(self.views.checkpoint(), until).await?;
        if !happened.is_empty() {
            let touched = self.views.apply(&happened)?;
            self.tell();
            self.news.tell(&touched);
        }
        Ok(happened.len())
    }

    fn tell(&self) {
        let (position, parked) = (self.views.checkpoint(), self.views.parked());
        self.reached.send_modify(|at| {
            for new in parked.iter().filter(|new| !at.parked.contains(new)) {
                let Parked { view, position, reason } = new;
                tracing::error!(position, view = view.as_str(), %reason, "a view is parked");
            }
            *at = Reached { position, parked, stands_still: false };
        });
        self.bell.notify_waiters();
    }

    /// Follows the log for as long as there is one; [`Projector::start`] does it on another thread.
    pub async fn follow(self) {
        Arc::new(self).keep_up().await;
    }

    async fn keep_up(self: Arc<Self>) {
        let mut head = self.log.head();
        let mut look_at = Instant::now();
        let (mut failures, mut told) = (0, None);
        loop {
            let until = *head.borrow_and_update();
            let mut done = self.catch_up_to(until).await;
            // Not at every event: it asks the disk. Also of views that cannot be written any more,
            // whose remedy it is.
            if look_at <= Instant::now() {
                look_at = Instant::now() + SUCCESSOR_EVERY;
                match self.succeed().await {
                    Ok(true) => {
                        failures = 0;
                        continue;
                    }
                    succeeded => done = done.and(succeeded.map(drop)),
                }
            }
            if let Err(error) = done {
                // Every half second the same would be no news.
                let why = error.to_string();
                if told.as_ref() != Some(&why) {
                    tracing::error!(%error, "the projection cannot go on; trying again");
                    told = Some(why);
                }
                tokio::time::sleep(PAUSE).await;
                self.tell_damage(&error);
                failures += 1;
                self.tell_standing(failures >= FAILURES);
                continue;
            }
            failures = 0;
            if told.take().is_some() {
                tracing::info!("the projection goes on");
            }
            self.tell_standing(false);
            let moved = tokio::time::timeout(SUCCESSOR_EVERY, head.changed()).await;
            if moved.is_ok_and(|moved| moved.is_err()) {
                return;
            }
        }
    }

    /// A log that is damaged stops every view before the damage; nobody may skip that.
    fn tell_damage(&self, error: &Error) {
        let Error::Log(log::Error::Corrupt { position, .. }) = error else { return };
        let parked =
            |view| Parked { view, position: *position, reason: "the log is damaged".to_owned() };
        self.reached.send_modify(|at| at.parked = View::ALL.map(parked).to_vec());
    }

    fn tell_standing(&self, stands_still: bool) {
        let changed = self.reached.send_if_modified(|at| {
            std::mem::replace(&mut at.stands_still, stands_still) != stands_still
        });
        if changed {
            self.bell.notify_waiters();
        }
    }

    async fn catch_up_to(&self, until: u64) -> Result<(), Error> {
        while self.views.checkpoint() < until {
            if self.apply_next(u64::MAX).await? == 0 {
                break;
            }
        }
        Ok(())
    }

    async fn next(&self, from: u64, until: u64) -> Result<Vec<Happened>, Error> {
        next(self.log.as_ref(), &self.keyring, from, until, BATCH).await
    }

    /// Puts the views that another process has built in the place of these, once they have caught
    /// up; says whether there were any.
    async fn succeed(&self) -> Result<bool, Error> {
        if !self.views.is_outdated()? {
            return Ok(false);
        }
        let views = self.views.clone();
        // It takes whoever it knows into memory: with many users that is a while.
        let opening = tokio::task::spawn_blocking(move || views.successor()).await;
        let opened = opening.map_err(|error| views::Error::Io(std::io::Error::other(error)))?;
        let Some(successor) = opened? else { return Ok(false) };
        tracing::info!(position = successor.checkpoint(), "views that were built beside take over");
        loop {
            // No further than these have come: what they have told of, nobody misses.
            let upto = self.views.checkpoint();
            let happened = self.next(successor.checkpoint(), upto).await?;
            successor.apply(&happened)?;
            if happened.is_empty() || successor.checkpoint() >= upto {
                break;
            }
            // Whoever waits for an event does not wait for the successor. What these cannot take in
            // is no reason to keep them.
            let _ = self.apply_next(u64::MAX).await;
        }
        self.views.replace_with(successor)?;
        self.tell();
        // What these could not take in, and what they were behind by, they have told nobody of.
        self.news.tell_all();
        Ok(true)
    }
}

/// The next events after `from`, as far as they are understood.
///
/// # Errors
/// The log or the keys cannot be read at present.
pub async fn next(
    log: &dyn EventLog,
    keyring: &Keyring,
    from: u64,
    until: u64,
    limit: usize,
) -> Result<Vec<Happened>, Error> {
    understand(keyring, log.read_all(from, limit).await?, until).await
}

/// What a page says up to `until`, as far as it is understood.
///
/// # Errors
/// The keys cannot be read at present.
pub async fn understand(
    keyring: &Keyring,
    mut page: Vec<Recorded>,
    until: u64,
) -> Result<Vec<Happened>, Error> {
    page.truncate(page.partition_point(|recorded| recorded.position <= until));
    let events = keyring.decode_each(&page).await?;
    Ok(page.iter().zip(events).map(|(recorded, event)| understood(recorded, event)).collect())
}

fn understood(recorded: &Recorded, event: Result<AnyEvent, codec::Error>) -> Happened {
    let entity = match event {
        Ok(AnyEvent::User(id, event)) => Entity::User(id, event),
        Ok(AnyEvent::Session(id, event)) => Entity::Session(id, event),
        Ok(AnyEvent::File(id, event)) => Entity::File(id, event),
        Ok(AnyEvent::Job(id, event)) => Entity::Job(id, event),
        Err(error) => Entity::Unreadable {
            view: view_of(codec::category(&recorded.stream)),
            reason: error.to_string(),
        },
    };
    Happened { position: recorded.position, hash: recorded.hash, time: recorded.time, entity }
}

/// The view that shows the entities of a category.
pub fn view_of(category: &str) -> Option<View> {
    match category {
        User::CATEGORY => Some(View::Users),
        Session::CATEGORY => Some(View::Sessions),
        File::CATEGORY => Some(View::Files),
        Job::CATEGORY => Some(View::Jobs),
        _ => None,
    }
}

#[cfg(test)]
#[path = "projector_tests.rs"]
mod tests;
