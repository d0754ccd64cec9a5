//! Finds the actor of an entity or starts it, and lets go of those that nobody talks to.

use std::collections::HashMap;
use std::fmt::Display;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use actix::prelude::*;
use tracing::Span;

use super::codec::Metadata;
use super::entity::{Entity, EntityActor, Execute, Executed, Failure};
use super::keyring::Keyring;
use crate::clock::Clock;
use crate::domain::{self, Aggregate};
use crate::log::EventLog;

/// Commands that may wait for one entity; one more is answered with 503.
const MAILBOX: usize = 256;
/// Entities kept alive; beyond it, those that are idle are passivated.
const MAX_ALIVE: usize = 10_000;

/// The threads that entities live on.
pub struct Arbiters(Vec<ArbiterHandle>);

impl Arbiters {
    /// Starts `threads` of them; they end with the actix system.
    pub fn new(threads: usize) -> Self {
        Self((0..threads.max(1)).map(|_| Arbiter::new().handle()).collect())
    }

    /// The thread that calls, which runs an actix system: so that a simulation has but one.
    pub fn here() -> Self {
        Self(vec![Arbiter::current()])
    }

    fn of(&self, stream: &str) -> &ArbiterHandle {
        let mut hasher = DefaultHasher::new();
        stream.hash(&mut hasher);
        let index = usize::try_from(hasher.finish() % self.0.len() as u64).unwrap_or_default();
        &self.0[index]
    }
}

/// All live entities of one aggregate.
pub struct Directory<A: Aggregate + Unpin> {
    arbiters: Arbiters,
    log: Arc<dyn EventLog>,
    clock: Clock,
    keyring: Keyring,
    alive: Mutex<HashMap<String, Live<A>>>,
}

struct Live<A: Aggregate + Unpin> {
    address: Addr<EntityActor<A>>,
    /// Commands sent and not answered.
    waiting: Arc<AtomicUsize>,
    /// Spoken to since the last look.
    recent: bool,
}

/// The actor, and the count of its waiting commands for as long as one of them is under way.
type Found<A> = Result<(Addr<EntityActor<A>>, Waiting), Failure<<A as Aggregate>::Refusal>>;

/// Counts a command as waiting for as long as it lives, also when its caller goes away.
struct Waiting(Arc<AtomicUsize>);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl<A: Aggregate + Unpin> Directory<A> {
    pub fn new(
        arbiters: &Arbiters,
        log: &Arc<dyn EventLog>,
        clock: &Clock,
        keyring: &Keyring,
    ) -> Self {
        Self {
            arbiters: Arbiters(arbiters.0.clone()),
            log: Arc::clone(log),
            clock: clock.clone(),
            keyring: keyring.clone(),
            alive: Mutex::default(),
        }
    }

    /// Has the entity decide `command`; durable when it returns.
    ///
    /// # Errors
    /// [`Failure`], with [`Failure::Overloaded`] when too many wait for the same entity.
    pub async fn execute(
        &self,
        id: impl Display,
        command: A::Command,
        origin: Metadata,
    ) -> Result<Executed<A>, Failure<A::Refusal>> {
        self.send(id, Execute { command, origin, fresh: false, span: Span::current() }).await
    }

    /// The same for an entity whose id was made just now: spares the search for its past.
    ///
    /// # Errors
    /// As [`Directory::execute`].
    pub async fn execute_fresh(
        &self,
        id: impl Display,
        command: A::Command,
        origin: Metadata,
    ) -> Result<Executed<A>, Failure<A::Refusal>> {
        self.send(id, Execute { command, origin, fresh: true, span: Span::current() }).await
    }

    async fn send(
        &self,
        id: impl Display,
        message: Execute<A>,
    ) -> Result<Executed<A>, Failure<A::Refusal>> {
        let (address, _waiting) = self.find(&domain::stream::<A>(id))?;
        address.send(message).await.unwrap_or(Err(Failure::Overloaded))
    }

    /// How many entities are alive.
    pub fn alive(&self) -> usize {
        self.alive.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// How many commands wait for their entity or are being executed.
    pub fn waiting(&self) -> usize {
        let alive = self.alive.lock().unwrap_or_else(PoisonError::into_inner);
        alive.values().map(|live| live.waiting.load(Ordering::Relaxed)).sum()
    }

    fn find(&self, stream: &str) -> Found<A> {
        let mut alive = self.alive.lock().unwrap_or_else(PoisonError::into_inner);
        if alive.len() >= MAX_ALIVE && !alive.contains_key(stream) {
            passivate_idle(&mut alive);
        }
        // An actor that died of a panic is started anew: its state is in the log.
        if alive.get(stream).is_some_and(|live| !live.address.connected()) {
            alive.remove(stream);
        }
        let live = alive.entry(stream.to_owned()).or_insert_with(|| self.start(stream));
        live.recent = true;
        let waiting = Waiting(Arc::clone(&live.waiting));
        // The guard takes one off when it drops, so it must be counted before it can be refused.
        if live.waiting.fetch_add(1, Ordering::Relaxed) >= MAILBOX {
            return Err(Failure::Overloaded);
        }
        Ok((live.address.clone(), waiting))
    }

    fn start(&self, stream: &str) -> Live<A> {
        let (log, clock) = (Arc::clone(&self.log), self.clock.clone());
        let entity = Entity::new(log, clock, self.keyring.clone(), stream.to_owned());
        let address = EntityActor::start_in_arbiter(self.arbiters.of(stream), move |context| {
            context.set_mailbox_capacity(MAILBOX);
            EntityActor::new(entity)
        });
        Live { address, waiting: Arc::default(), recent: true }
    }
}

/// Second chance: whoever was not spoken to since the last look goes; if all were, all idle go.
/// Two actors for one stream are no danger: the log's expected revision decides between them.
fn passivate_idle<A: Aggregate + Unpin>(alive: &mut HashMap<String, Live<A>>) {
    let idle = |live: &Live<A>| live.waiting.load(Ordering::Relaxed) == 0;
    alive.retain(|_, live| !idle(live) || std::mem::take(&mut live.recent));
    if alive.len() >= MAX_ALIVE {
        alive.retain(|_, live| !idle(live));
    }
}
