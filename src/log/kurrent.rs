//! The engine over KurrentDB (EventStoreDB), from 20.6 on: any number of nodes append to one server
//! or cluster, through the `eventstore` client under a supervisor of our own.
//!
//! # Positions
//! The commit positions of the server's log, unchanged. They have gaps, and the log is entered at
//! events alone; [`reading`] finds the places. An event's commit position is its own, several events
//! of one append included: the server gives events a common one in explicit transactions only, which
//! cannot be made over gRPC. Servers before 22 do not tell positions when a stream is read; then they
//! are looked for behind the position that each event's envelope names.
//!
//! # Hashes
//! The server gives the position after the hash was made, so the chain goes along each stream: an
//! event's hash covers its predecessor in the *stream* and, in place of its own position, the newest
//! position that its writer had read. `verify` walks the whole log, checks revisions, order and each
//! stream's chain, and that every event so named is there: what is missing at the end of a stream is
//! found as long as anything was written after it was read. The head hash is made by the walk, over
//! everything and its positions, as that of the other engines; no event carries it.
//!
//! # The client's faults
//! It neither finds another leader when one is gone nor recovers from a failed first contact, panics
//! over answers that it does not know, and goes round in circles when a subscription ends. So each
//! [`link::Link`] has a runtime of its own and is replaced as a whole.

use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex, OnceLock};

use bytestring::ByteString;
use futures_util::future::BoxFuture;
use tokio::runtime::Runtime;
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;
use uuid::Uuid;

use super::condition::Condition;
use super::patience::{Backoff, Deadlines};
use super::tail::Tail;
use super::{
    Appended, Error, EventLog, Expected, NewEvent, Recorded, Stats, Verified, bad, check_limits,
    guard,
};
use address::Address;
use appending::Append;
use link::{Failure, Link};
use memory::Memory;
use whole::{Check, PAGE, Tally};

mod address;
mod appending;
mod envelope;
mod follower;
mod link;
mod marker;
mod memory;
mod reading;
mod silence;
mod whole;

/// Appends that are under way at the same time: a connection carries a hundred calls.
const APPENDS: usize = 64;
/// Positions are bytes of the server's log; so many are an event with its envelope.
const STRIDE: u64 = 512;
/// Locks that streams share.
const TURNS: usize = 64;

/// The log on a KurrentDB server or cluster.
///
/// An acknowledged append is durable as that server says it: a single node has written it to its
/// disk, a cluster has it on a majority of its nodes.
pub struct KurrentLog {
    shared: Arc<Shared>,
    tally: Arc<tokio::sync::Mutex<Tally>>,
    writes: bool,
    /// Its own, as the callers' may end or stand still. Present until the drop.
    runtime: Option<Runtime>,
}

impl KurrentLog {
    /// Open the log at `setting`, `esdb://user:password@host:2113?tls=true` or the seeds of a
    /// cluster; it is begun if the server holds nothing yet.
    ///
    /// # Errors
    /// [`Error::Invalid`] when `setting` is no address, [`Error::Foreign`] when the server refuses
    /// the credentials or holds something else or a newer log, [`Error::Storage`] when it cannot be
    /// reached within [`Deadlines::start`]. They name the setting, never the password.
    pub async fn open(setting: &str) -> Result<Self, Error> {
        Self::open_with(setting, Deadlines::default()).await
    }

    /// [`KurrentLog::open`] with other deadlines.
    ///
    /// # Errors
    /// As [`KurrentLog::open`].
    pub async fn open_with(setting: &str, deadlines: Deadlines) -> Result<Self, Error> {
        Self::prepare(setting, deadlines, true).await
    }

    /// Open the log for reading alone; nothing is begun.
    ///
    /// # Errors
    /// As [`KurrentLog::open`]; [`Error::Foreign`] when there is no log.
    pub async fn open_read_only(setting: &str) -> Result<Self, Error> {
        Self::prepare(setting, Deadlines::default(), false).await
    }

    /// Whether `setting` is an address; nothing is opened but the certificates that it names.
    ///
    /// # Errors
    /// [`Error::Invalid`] in one sentence without the password.
    pub fn check(setting: &str) -> Result<(), Error> {
        Address::parse(setting)?.check_files()
    }

    async fn prepare(setting: &str, deadlines: Deadlines, writes: bool) -> Result<Self, Error> {
        let address = Address::parse(setting)?;
        address.check_files()?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("log-kurrent")
            .enable_all()
            .build()
            .map_err(|error| Error::Storage(error.to_string()))?;
        let shared = Arc::new(Shared::new(address, deadlines));
        // From here on its drop ends the runtime, which must not be dropped among other tasks.
        let log = Self { shared, tally: Arc::default(), writes, runtime: Some(runtime) };
        let shared = Arc::clone(&log.shared);
        log.on_runtime(async move { shared.find(writes).await }).await?;
        log.spawn(follower::run(Arc::clone(&log.shared)));
        if writes {
            log.spawn(follower::probe(Arc::clone(&log.shared)));
        }
        Ok(log)
    }

    fn spawn<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> tokio::task::JoinHandle<T> {
        self.runtime.as_ref().expect("it is there until the drop").spawn(work)
    }

    async fn on_runtime<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Result<T, Error> {
        let ended = self.spawn(work).await;
        ended.map_err(|error| Error::Storage(format!("it did not end: {error}")))?
    }
}

impl Drop for KurrentLog {
    /// Waits until what was begun is written, or can not be within the deadlines.
    fn drop(&mut self) {
        let Some(runtime) = self.runtime.take() else { return };
        let Deadlines { settle, statement, connect, .. } = self.shared.deadlines;
        let shared = Arc::clone(&self.shared);
        let (ended, written) = std::sync::mpsc::channel();
        runtime.spawn(async move {
            let all = u32::try_from(APPENDS).unwrap_or(u32::MAX);
            // That it was closed means that nobody writes.
            let _ = shared.permits.acquire_many(all).await;
            let _ = ended.send(());
        });
        let _ = written.recv_timeout(settle + 2 * (statement + connect));
        runtime.shutdown_background();
    }
}

#[async_trait::async_trait]
impl EventLog for KurrentLog {
    async fn append(
        &self,
        stream: &str,
        expected: Expected,
        events: Vec<NewEvent>,
    ) -> Result<Appended, Error> {
        check_limits(stream, &events)?;
        let append = Append { stream: stream.to_owned(), expected, events };
        append.check_size()?;
        self.writable()?;
        let permit = Arc::clone(&self.shared.permits).acquire_owned().await;
        let permit = permit.map_err(|_| self.shared.condition.unwritable())?;
        let shared = Arc::clone(&self.shared);
        // It goes on when the caller does not, and is waited for when the log is closed.
        let ended = self.spawn(async move {
            let answer = append.run(shared).await;
            drop(permit);
            answer
        });
        let ended = ended.await;
        ended.unwrap_or_else(|_| Err(self.shared.condition.unwritable()))
    }

    async fn read_stream(
        &self,
        stream: &str,
        from_revision: u64,
        limit: usize,
    ) -> Result<Vec<Recorded>, Error> {
        if super::check_name("a stream", stream).is_err() {
            return Ok(vec![]);
        }
        let (shared, stream) = (Arc::clone(&self.shared), stream.to_owned());
        self.on_runtime(async move {
            let read = |link: Arc<Link>| -> BoxFuture<'_, _> {
                let (shared, stream) = (&shared, &stream);
                Box::pin(async move {
                    reading::stream(shared, &link, stream, from_revision, limit).await
                })
            };
            shared.answer(read).await
        })
        .await
    }

    async fn read_all(&self, after: u64, limit: usize) -> Result<Vec<Recorded>, Error> {
        self.shared.condition.check_stopped()?;
        let head = *self.shared.head.borrow();
        if limit == 0 || after >= head {
            return Ok(Vec::new());
        }
        if let Some(events) = self.shared.tail.page(after, limit)
            // It may end before what was just appended.
            && (events.len() == limit || events.last().is_some_and(|last| last.position >= head))
        {
            return Ok(events);
        }
        let shared = Arc::clone(&self.shared);
        self.on_runtime(async move { shared.page(after, limit).await }).await
    }

    fn head(&self) -> watch::Receiver<u64> {
        self.shared.head.subscribe()
    }

    async fn end(&self) -> Result<u64, Error> {
        let shared = Arc::clone(&self.shared);
        self.on_runtime(async move {
            let newest = |link: Arc<Link>| -> BoxFuture<'_, _> {
                Box::pin(async move { reading::newest(&link).await })
            };
            let (events, _) = shared.answer(newest).await?;
            let end = events.last().map_or(0, |last| last.position);
            let mut head = shared.head.subscribe();
            let arrived = head.wait_for(|head| *head >= end);
            let arrived = tokio::time::timeout(shared.deadlines.statement, arrived).await;
            let late = || Error::Storage("what was just appended does not come".into());
            arrived.map_err(|_| late())?.map(|head| *head).map_err(|_| late())
        })
        .await
    }

    fn writable(&self) -> Result<(), Error> {
        if !self.writes {
            return Err(Error::Unwritable("it was opened for reading only".into()));
        }
        match self.shared.condition.is_unwritable() {
            true => Err(self.shared.condition.unwritable()),
            false => Ok(()),
        }
    }

    fn stride(&self) -> u64 {
        STRIDE
    }

    async fn stats(&self) -> Result<Stats, Error> {
        let (shared, tally) = (Arc::clone(&self.shared), Arc::clone(&self.tally));
        self.on_runtime(async move {
            let mut tally = tally.lock().await;
            loop {
                let page = shared.page(tally.position, PAGE).await?;
                page.iter().for_each(|event| tally.count(event));
                if page.len() < PAGE {
                    return Ok(tally.stats());
                }
            }
        })
        .await
    }

    async fn verify(&self) -> Result<Verified, Error> {
        let shared = Arc::clone(&self.shared);
        let head = *self.shared.head.borrow();
        self.on_runtime(async move {
            let mut check = Check::default();
            loop {
                let page = shared.found(check.position, PAGE).await?;
                page.iter().try_for_each(|found| check.take(found))?;
                if page.len() < PAGE {
                    break;
                }
            }
            if check.position < head {
                return Err(bad(head, "the event is missing"));
            }
            Ok(check.verified())
        })
        .await
    }
}

/// The newest event that this node has read.
#[derive(Debug, Clone)]
struct Seen {
    position: u64,
    id: Uuid,
    stream: ByteString,
    revision: u64,
}

/// The connection in use, and why there is none.
#[derive(Default)]
struct Line {
    link: Option<Arc<Link>>,
    failed: Option<(Instant, Error)>,
}

/// What the handle and its tasks have in common.
struct Shared {
    address: Address,
    deadlines: Deadlines,
    /// Set when the log is opened.
    identity: OnceLock<Uuid>,
    line: tokio::sync::Mutex<Line>,
    head: watch::Sender<u64>,
    tail: Tail,
    memory: Mutex<Memory>,
    seen: Mutex<Option<Seen>>,
    permits: Arc<Semaphore>,
    turns: Vec<tokio::sync::Mutex<()>>,
    hasher: RandomState,
    condition: Condition,
}

impl Shared {
    fn new(address: Address, deadlines: Deadlines) -> Self {
        Self {
            condition: Condition::new(address.shown()),
            address,
            deadlines,
            identity: OnceLock::new(),
            line: tokio::sync::Mutex::default(),
            head: watch::Sender::new(0),
            tail: Tail::default(),
            memory: Mutex::default(),
            seen: Mutex::default(),
            permits: Arc::new(Semaphore::new(APPENDS)),
            turns: (0..TURNS).map(|_| tokio::sync::Mutex::default()).collect(),
            hasher: RandomState::new(),
        }
    }

    /// Finds the log, which is begun if it may be, and waits for a server that is not there yet.
    async fn find(self: &Arc<Self>, make: bool) -> Result<(), Error> {
        let (began, limit) = (Instant::now(), self.deadlines.start);
        let (mut backoff, place) = (Backoff::default(), self.address.shown());
        loop {
            let why = match self.find_once(make, &place).await {
                Ok(()) => return Ok(()),
                Err(Failure::Denied) => {
                    return Err(Error::Foreign(format!(
                        "T2M_LOG: {place} refuses the user and password, or what they may do"
                    )));
                }
                Err(failure) if failure.passes() => failure.told(),
                Err(failure) => return Err(failure.into_error()),
            };
            if began.elapsed() >= limit {
                let limit = limit.as_secs();
                let tls = match self.address.settings.is_secure_mode_enabled() {
                    true => "with TLS",
                    false => "without TLS",
                };
                return Err(Error::Storage(format!(
                    "T2M_LOG: {place} could not be reached {tls} within {limit} s: {why}"
                )));
            }
            tracing::warn!(%why, "waiting for the log, {place} (T2M_LOG)");
            backoff.wait().await;
        }
    }

    async fn find_once(self: &Arc<Self>, make: bool, place: &str) -> Result<(), Failure> {
        let link = Link::open(&self.address, self.deadlines).await?;
        let identity = match make {
            true => marker::begin(&link, place).await?,
            false => marker::inspect(&link, place).await?.ok_or_else(|| {
                Failure::Bad(Error::Foreign(format!("T2M_LOG: {place} holds no log")))
            })?,
        };
        let _ = self.identity.set(identity);
        let (events, is_all) = reading::newest(&link).await?;
        if let Some(last) = events.last().cloned() {
            guard(&self.memory).read_page(&events);
            let since = if is_all { 0 } else { events.first().map_or(0, |first| first.position) };
            self.tail.follow(since, events.into_iter().filter(|event| event.position > since));
            self.read(&last);
        }
        self.line.lock().await.link = Some(link);
        Ok(())
    }

    /// The connection, a new one if need be; whoever waits for it shares its failure.
    ///
    /// # Errors
    /// [`Error::Storage`] when there is none. [`Error::Foreign`] when the server has another log
    /// now, or less of it than was seen here: the handle is stopped then.
    async fn link(&self) -> Result<Arc<Link>, Error> {
        let came = Instant::now();
        let mut line = self.line.lock().await;
        self.condition.check_stopped()?;
        if let Some(link) = &line.link {
            return Ok(Arc::clone(link));
        }
        if let Some((when, error)) = &line.failed
            && *when >= came
        {
            return Err(error.clone());
        }
        match self.connect().await {
            Ok(link) => Ok(Arc::clone(line.link.insert(link))),
            Err(error) => {
                line.failed = Some((Instant::now(), error.clone()));
                Err(error)
            }
        }
    }

    async fn connect(&self) -> Result<Arc<Link>, Error> {
        let storage = |failure: Failure| Error::Storage(failure.told());
        let link = Link::open(&self.address, self.deadlines).await.map_err(storage)?;
        let place = self.address.shown();
        match marker::inspect(&link, &place).await {
            Ok(found) if found == self.identity.get().copied() => {}
            Ok(_) => return Err(self.condition.stop(&format!("{place} holds another log now"))),
            Err(Failure::Bad(Error::Foreign(why))) => return Err(self.condition.stop(&why)),
            Err(failure) => return Err(storage(failure)),
        }
        let Some(seen) = self.seen() else { return Ok(link) };
        // A leader of this moment may not have made its index up to date.
        let give_up = Instant::now() + self.deadlines.settle;
        let mut backoff = Backoff::default();
        while !self.is_there(&link, &seen).await.map_err(storage)? {
            if Instant::now() >= give_up {
                return Err(self.condition.cut(seen.position));
            }
            backoff.wait().await;
        }
        Ok(link)
    }

    async fn is_there(&self, link: &Link, seen: &Seen) -> Result<bool, Failure> {
        let from = eventstore::StreamPosition::Position(seen.revision);
        let found = link.stream(envelope::to_server(&seen.stream), from, false, 1).await?;
        Ok(found.first().is_some_and(|event| event.id == seen.id))
    }

    /// Gives the connection up unless it is sound for all the failure says.
    async fn lost(&self, link: &Arc<Link>, failure: &Failure) {
        if matches!(failure, Failure::Broken(_)) {
            self.give_up(link).await;
        }
    }

    async fn give_up(&self, link: &Arc<Link>) {
        let mut line = self.line.lock().await;
        line.link.take_if(|current| Arc::ptr_eq(current, link));
    }

    /// What `read` answers, over another connection if the one in use broke.
    async fn answer<'a, T>(
        &self,
        read: impl Fn(Arc<Link>) -> BoxFuture<'a, Result<T, Failure>>,
    ) -> Result<T, Error> {
        let give_up = Instant::now() + self.deadlines.settle;
        let mut backoff = Backoff::default();
        loop {
            let link = self.link().await?;
            let failure = match read(Arc::clone(&link)).await {
                Ok(answer) => return Ok(answer),
                Err(failure) => failure,
            };
            self.lost(&link, &failure).await;
            if !failure.passes() || Instant::now() >= give_up {
                return Err(failure.into_error());
            }
            backoff.wait().await;
        }
    }

    async fn found(&self, after: u64, limit: usize) -> Result<Vec<envelope::Found>, Error> {
        let read = |link: Arc<Link>| -> BoxFuture<'_, _> {
            Box::pin(async move { reading::all(self, &link, after, limit).await })
        };
        self.answer(read).await
    }

    async fn page(&self, after: u64, limit: usize) -> Result<Vec<Recorded>, Error> {
        let found = self.found(after, limit).await?;
        let events: Vec<Recorded> = found.into_iter().map(|found| found.event).collect();
        guard(&self.memory).read_page(&events);
        if let Some(last) = events.last() {
            self.tail.follow(after, events.iter().cloned());
            self.saw(last.position);
        }
        Ok(events)
    }

    fn turn(&self, stream: &str) -> &tokio::sync::Mutex<()> {
        let hash = self.hasher.hash_one(stream);
        &self.turns[usize::try_from(hash % TURNS as u64).unwrap_or_default()]
    }

    fn seen(&self) -> Option<Seen> {
        guard(&self.seen).clone()
    }

    /// Takes note of the newest event that was read, all before it included.
    fn read(&self, last: &Recorded) {
        let Recorded { position, id, revision, .. } = *last;
        let seen = Seen { position, id, stream: last.stream.clone(), revision };
        *guard(&self.seen) = Some(seen);
        self.saw(position);
    }

    /// Takes note of the log being at least that long.
    fn saw(&self, position: u64) {
        self.head.send_if_modified(|head| {
            let moved = position > *head;
            *head = position.max(*head);
            moved
        });
    }
}
