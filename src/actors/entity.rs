//! One live stream: its state, and the actor whose mailbox orders the commands to it.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Instant;

use actix::prelude::*;
use futures_util::FutureExt;
use metrics::{counter, histogram};
use tracing::{Instrument, Span};

use super::codec::{self, Last, Metadata};
use super::keyring::{self, Keyring};
use crate::clock::Clock;
use crate::domain::Aggregate;
use crate::log::{self, EventLog, Expected, NewEvent};
use crate::telemetry;

/// Events read at once while a state is loaded.
const PAGE: usize = 500;
/// How often a command is decided at most, because another node wrote to its stream. At each try
/// somebody's command succeeds, and mostly that of a node which has just written and need not read:
/// of thirty commands at once at three nodes some failed ten times. So many take about a second.
const TRIES: u32 = 50;

/// A stream's state and the decisions on it.
pub struct Entity<A> {
    log: Arc<dyn EventLog>,
    clock: Clock,
    keyring: Keyring,
    stream: String,
    state: A,
    /// How many events the state has taken in: the next event's revision.
    next_revision: u64,
    /// Of the last event taken in; 0 when there is none.
    position: u64,
    /// The last event taken in, if there is one.
    last: Option<Last>,
    loaded: bool,
}

/// What became of a command.
#[derive(Debug, Clone)]
pub struct Executed<A: Aggregate> {
    /// What happened now; empty if there was nothing to do.
    pub events: Vec<A::Event>,
    pub state: A,
    /// Where the stream's last event lies: what a reader must have reached to see the effect.
    pub position: u64,
    /// The stream's last event: what it brings about in other streams answers to it.
    pub last: Option<Last>,
}

/// Why a command had no effect.
#[derive(Debug, thiserror::Error)]
pub enum Failure<R: std::error::Error> {
    /// The business says no.
    #[error(transparent)]
    Refused(R),
    /// The log cannot take events now; the outcome of this command is unknown.
    #[error(transparent)]
    Unavailable(log::Error),
    /// Others wrote to the stream at each try.
    #[error(transparent)]
    Conflict(log::Error),
    /// The log cannot be read, or does not take what it was given.
    #[error(transparent)]
    Log(log::Error),
    #[error(transparent)]
    Codec(#[from] codec::Error),
    /// The keys that seal what is personal cannot be read or made now; nothing was recorded.
    #[error(transparent)]
    Keys(keyring::Error),
    /// Too many commands wait for this entity, or it is shutting down.
    #[error("too many commands are waiting")]
    Overloaded,
}

impl<R: std::error::Error> From<log::Error> for Failure<R> {
    fn from(error: log::Error) -> Self {
        match error {
            log::Error::Unwritable(_) | log::Error::Storage(_) => Self::Unavailable(error),
            log::Error::Conflict { .. } => Self::Conflict(error),
            log::Error::Corrupt { .. } | log::Error::Foreign(_) | log::Error::Invalid(_) => {
                Self::Log(error)
            }
        }
    }
}

impl<R: std::error::Error> From<keyring::Error> for Failure<R> {
    fn from(error: keyring::Error) -> Self {
        match error {
            keyring::Error::Codec(error) => Self::Codec(error),
            keyring::Error::Vault(_) | keyring::Error::Key(..) | keyring::Error::Store(_) => {
                Self::Keys(error)
            }
        }
    }
}

impl<A: Aggregate> Entity<A> {
    pub fn new(log: Arc<dyn EventLog>, clock: Clock, keyring: Keyring, stream: String) -> Self {
        let state = A::default();
        let (next_revision, position, last, loaded) = (0, 0, None, false);
        Self { log, clock, keyring, stream, state, next_revision, position, last, loaded }
    }

    /// Takes the stream as empty without looking: right for a fresh id, and if it is not, the
    /// expected revision tells.
    pub fn assume_fresh(&mut self) {
        self.loaded = self.next_revision == 0;
    }

    /// Decides `command` and makes its events durable.
    ///
    /// # Errors
    /// [`Failure`]; a refusal and a conflict change nothing.
    pub async fn execute(
        &mut self,
        command: &A::Command,
        origin: &Metadata,
    ) -> Result<Executed<A>, Failure<A::Refusal>> {
        for _ in 1..TRIES {
            match self.try_once(command, origin).await {
                Err(Failure::Conflict(_)) => self.loaded = false,
                done => return done,
            }
        }
        self.try_once(command, origin).await
    }

    async fn try_once(
        &mut self,
        command: &A::Command,
        origin: &Metadata,
    ) -> Result<Executed<A>, Failure<A::Refusal>> {
        // What is appended the log holds against the stream's end. An answer without any event
        // rests on the state alone, so that the state must not be older than the question: another
        // node may have written.
        let mut current = !self.loaded || self.log.is_exclusive();
        loop {
            self.catch_up().await?;
            let now = self.clock.now();
            let decided = self.state.decide(command, now);
            let has_effect = decided.as_ref().is_ok_and(|events| !events.is_empty());
            if !has_effect && !current {
                (current, self.loaded) = (true, false);
                continue;
            }
            let events = decided.map_err(Failure::Refused)?;
            if has_effect {
                self.append(&events, now, origin).await?;
            }
            let (state, position, last) = (self.state.clone(), self.position, self.last.clone());
            return Ok(Executed { events, state, position, last });
        }
    }

    /// Takes in what the stream holds beyond the state.
    async fn catch_up(&mut self) -> Result<(), Failure<A::Refusal>> {
        while !self.loaded {
            let page = self.log.read_stream(&self.stream, self.next_revision, PAGE).await?;
            let (events, unreadable) = self.keyring.decode::<A>(&page).await?;
            if let Some(error) = unreadable {
                return Err(error.into());
            }
            for (recorded, event) in page.iter().zip(&events) {
                self.state.evolve(event);
                self.next_revision = recorded.revision + 1;
                self.position = recorded.position;
            }
            if !page.is_empty() {
                self.last.get_or_insert_default().advance(&page);
            }
            // Not before: what could not be read is no empty stream, and is read the next time.
            self.loaded = page.len() < PAGE;
        }
        Ok(())
    }

    async fn append(
        &mut self,
        events: &[A::Event],
        now: chrono::DateTime<chrono::Utc>,
        origin: &Metadata,
    ) -> Result<(), Failure<A::Refusal>> {
        let origin = self.last.as_ref().map_or_else(|| origin.clone(), |last| origin.after(last));
        let metadata = origin.to_bytes();
        let mut records = Vec::with_capacity(events.len());
        let mut kinds = Vec::with_capacity(events.len());
        for event in events {
            let (kind, data) = self.keyring.encode::<A>(&self.stream, event).await?;
            let id = self.clock.fresh_id();
            kinds.push(kind.clone());
            records.push(NewEvent { id, kind, time: now, data, metadata: metadata.clone() });
        }
        let expected = match self.next_revision {
            0 => Expected::NoStream,
            next => Expected::Revision(next - 1),
        };
        let event_id = records.last().map_or_else(Default::default, |it| it.id);
        // Until the log has answered, the state is not known: a failure may still have written.
        self.loaded = false;
        let began = Instant::now();
        let appended = self.log.append(&self.stream, expected, records).await?;
        histogram!(telemetry::APPEND_DURATION).record(began.elapsed());
        for kind in kinds {
            counter!(telemetry::EVENTS, "type" => kind).increment(1);
        }
        for event in events {
            self.state.evolve(event);
        }
        self.next_revision = appended.revision + 1;
        self.position = appended.position;
        let last = self.last.get_or_insert_default();
        last.event_id = event_id;
        last.go_back_to(&origin);
        self.loaded = true;
        Ok(())
    }
}

/// The mailbox around an [`Entity`]: one command at a time.
pub struct EntityActor<A: Aggregate> {
    /// Away while a command is being executed.
    entity: Option<Entity<A>>,
}

/// A command on its way to its entity.
pub struct Execute<A: Aggregate> {
    pub command: A::Command,
    pub origin: Metadata,
    /// The id was made for this command, so there is nothing to load.
    pub fresh: bool,
    /// What it is a part of.
    pub span: Span,
}

impl<A: Aggregate> Message for Execute<A> {
    type Result = Result<Executed<A>, Failure<A::Refusal>>;
}

impl<A: Aggregate> EntityActor<A> {
    pub fn new(entity: Entity<A>) -> Self {
        Self { entity: Some(entity) }
    }
}

impl<A: Aggregate + Unpin> Actor for EntityActor<A> {
    type Context = Context<Self>;
}

impl<A: Aggregate + Unpin> Handler<Execute<A>> for EntityActor<A> {
    type Result = AtomicResponse<Self, Result<Executed<A>, Failure<A::Refusal>>>;

    fn handle(&mut self, message: Execute<A>, _: &mut Context<Self>) -> Self::Result {
        let entity = self.entity.take();
        let execution = async move {
            let mut entity: Entity<A> = entity.ok_or(Failure::Overloaded)?;
            if message.fresh {
                entity.assume_fresh();
            }
            let correlation_id = message.origin.correlation_id.as_str();
            let span = tracing::info_span!(
                parent: &message.span, "command", stream = entity.stream, correlation_id
            );
            let execution = entity.execute(&message.command, &message.origin).instrument(span);
            // A panic must not take the thread with it, where thousands of other entities live.
            let outcome = AssertUnwindSafe(execution).catch_unwind().await.map_err(|_| {
                tracing::error!(stream = entity.stream, "an entity panicked and is given up");
                Failure::Overloaded
            })?;
            Ok::<_, Failure<A::Refusal>>((entity, outcome))
        };
        AtomicResponse::new(Box::pin(execution.into_actor(self).map(|done, actor, context| {
            let (entity, outcome) = done.inspect_err(|_| context.stop())?;
            actor.entity = Some(entity);
            outcome
        })))
    }
}
