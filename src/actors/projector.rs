//! Follows the log, feeds the read model, and says how far it is.

use std::sync::Arc;
use std::time::Duration;

use actix::Arbiter;
use tokio::sync::watch;

use super::codec::{self, AnyEvent};
use super::news::News;
use crate::log::{self, EventLog, Recorded};
use crate::views::{self, Entity, Happened, Views};

/// Events applied in one transaction at the most.
const BATCH: usize = 1000;
/// How long a failed read or write of the read model waits before it is tried again.
const PAUSE: Duration = Duration::from_millis(500);

/// How far the read model is, and whether it still moves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reached {
    /// The last position applied.
    pub position: u64,
    /// Set when an event could not be decoded or applied: where, and why.
    pub parked: Option<Parked>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parked {
    pub position: u64,
    pub reason: String,
}

/// The read model has not reached a position in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the read model has not caught up yet")]
pub struct NotCaughtUp;

/// Lets anyone ask or wait for how far the read model is.
#[derive(Debug, Clone)]
pub struct Progress(watch::Receiver<Reached>);

impl Progress {
    pub fn now(&self) -> Reached {
        self.0.borrow().clone()
    }

    /// Waits for `position`, for `within` at most.
    ///
    /// # Errors
    /// [`NotCaughtUp`] when it took too long or the projection is parked before it.
    pub async fn reached(&self, position: u64, within: Duration) -> Result<(), NotCaughtUp> {
        let mut receiver = self.0.clone();
        let there = |at: &Reached| at.position >= position || at.parked.is_some();
        match tokio::time::timeout(within, receiver.wait_for(there)).await {
            Ok(Ok(at)) if at.position >= position => Ok(()),
            _ => Err(NotCaughtUp),
        }
    }

    /// Resolves when the read model has moved since this handle last looked.
    pub async fn moved(&mut self) {
        // The sender lives as long as the system; without it nothing moves any more.
        if self.0.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// Why a batch did not become part of the read model.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Log(#[from] log::Error),
    #[error("event at position {position}: {source}")]
    Poison { position: u64, source: codec::Error },
    #[error(transparent)]
    Views(#[from] views::Error),
}

/// The way from the log into one read model; the same for following and for replay.
pub struct Projector {
    log: Arc<dyn EventLog>,
    views: Views,
    reached: watch::Sender<Reached>,
    news: News,
}

impl Projector {
    pub fn new(log: Arc<dyn EventLog>, views: Views) -> Self {
        let (reached, _) = watch::channel(Reached { position: views.checkpoint(), parked: None });
        Self { log, views, reached, news: News::default() }
    }

    pub fn progress(&self) -> Progress {
        Progress(self.reached.subscribe())
    }

    /// Whose part of the read model has moved.
    pub fn news(&self) -> News {
        self.news.clone()
    }

    /// Follows the log on a thread of its own.
    pub fn start(self) -> Progress {
        let progress = self.progress();
        Arbiter::new().spawn(self.follow());
        progress
    }

    /// Applies what the log holds beyond the checkpoint, one batch; the number of events.
    ///
    /// # Errors
    /// [`Error`]; the read model is then as before the batch, save for the good events ahead of a
    /// poisonous one.
    pub async fn apply_next(&self, until: u64) -> Result<usize, Error> {
        let from = self.views.checkpoint();
        let mut batch = self.log.read_all(from, BATCH).await?;
        batch.retain(|recorded| recorded.position <= until);
        let mut happened = Vec::with_capacity(batch.len());
        let mut poison = None;
        for recorded in &batch {
            match decoded(recorded) {
                Ok(event) => happened.push(event),
                Err(source) => {
                    poison = Some(Error::Poison { position: recorded.position, source });
                    break;
                }
            }
        }
        if !happened.is_empty() {
            let touched = self.views.apply(&happened)?;
            let position = self.views.checkpoint();
            self.reached.send_modify(|at| at.position = position);
            self.news.tell(&touched);
        }
        poison.map_or(Ok(happened.len()), Err)
    }

    async fn follow(self) {
        let mut head = self.log.head();
        loop {
            let until = *head.borrow_and_update();
            let outcome = self.catch_up_to(until).await;
            match outcome {
                Ok(()) => {}
                Err(Error::Poison { position, source }) => {
                    tracing::error!(position, error = %source, "the projection is parked");
                    let parked = Parked { position, reason: source.to_string() };
                    self.reached.send_modify(|at| at.parked = Some(parked));
                    return;
                }
                Err(error) => {
                    tracing::error!(%error, "the projection could not go on; trying again");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            }
            if head.changed().await.is_err() {
                return;
            }
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
}

fn decoded(recorded: &Recorded) -> Result<Happened, codec::Error> {
    let event = codec::decode_any(&recorded.stream, &recorded.kind, &recorded.data)?;
    let entity = match event {
        AnyEvent::User(id, event) => Entity::User(id, event),
        AnyEvent::Session(id, event) => Entity::Session(id, event),
        AnyEvent::File(id, event) => Entity::File(id, event),
        AnyEvent::Job(id, event) => Entity::Job(id, event),
    };
    Ok(Happened { position: recorded.position, time: recorded.time, entity })
}
