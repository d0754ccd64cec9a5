//! The engine over PostgreSQL: any number of nodes append to one database, each with one writing
//! connection that commits whatever waits as a group, and read it with a few others.
//!
//! Positions are given under a lock that is held until the commit, so that their order is the order
//! in which events become readable, without gaps: no reader can pass by a commit that comes late,
//! and every event's hash can cover its position.

use std::sync::atomic::AtomicBool;
use std::sync::mpsc as std_mpsc;
use std::sync::{Arc, Mutex, OnceLock};

use tokio::runtime::Runtime;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::Instant;
use uuid::Uuid;

use super::condition::Condition;
use super::patience::{Backoff, Deadlines};
use super::tail::Tail;
use super::{
    Appended, Error, EventLog, Expected, GENESIS, NewEvent, Progress, Recorded, Stats, ToAppend,
    Verified, check_limits, guard,
};
use address::Address;
use connection::Session;
use reader::{Query, Readers};
use stats::Tally;
use tls::Tls;
use writer::{Append, Writer};

mod address;
mod connection;
mod follower;
mod placing;
#[cfg(test)]
mod placing_tests;
mod reader;
mod schema;
mod stats;
mod tls;
mod writer;

/// Appends that may wait; one more waits for its turn in `append`.
const QUEUE: usize = 4096;
/// What a commit is made known by to the other nodes.
const CHANNEL: &str = "t2m_log";

/// The log in a PostgreSQL database, from version 12 on.
///
/// An acknowledged append is as durable as a commit of that server: its `synchronous_commit` is
/// raised to `on` where it is `off`, so that standbys it waits for are waited for here.
pub struct PostgresLog {
    shared: Arc<Shared>,
    readers: Arc<Readers>,
    tally: Arc<tokio::sync::Mutex<Tally>>,
    /// None when opened for reading only.
    queue: Option<mpsc::Sender<Append>>,
    /// Says when the writer has ended, by being dropped.
    written: Mutex<std_mpsc::Receiver<()>>,
    /// Its own: connections must go on whatever the callers' runtimes do. Present until the drop.
    runtime: Option<Runtime>,
}

impl PostgresLog {
    /// Open the log at `setting`, `postgres://user:password@host:port/database`; it is made if the
    /// database has none.
    ///
    /// # Errors
    /// [`Error::Invalid`] when `setting` is no address, [`Error::Foreign`] when the server refuses
    /// the credentials or the database holds something else or a newer log, [`Error::Storage`] when
    /// it cannot be reached within [`Deadlines::start`]. They name the setting, never the password.
    pub async fn open(setting: &str) -> Result<Self, Error> {
        Self::open_with(setting, Deadlines::default()).await
    }

    /// [`PostgresLog::open`] with other deadlines.
    ///
    /// # Errors
    /// As [`PostgresLog::open`].
    pub async fn open_with(setting: &str, deadlines: Deadlines) -> Result<Self, Error> {
        let (mut log, ended) = Self::prepare(setting, deadlines, true).await?;
        let (queue, appends) = mpsc::channel(QUEUE);
        let writer = Writer::new(Arc::clone(&log.shared), appends);
        log.spawn(async move {
            writer.run().await;
            drop(ended);
        });
        log.queue = Some(queue);
        Ok(log)
    }

    /// Open the log at `setting` for reading; nothing is made.
    ///
    /// # Errors
    /// As [`PostgresLog::open`]; [`Error::Storage`] when there is no log.
    pub async fn open_read_only(setting: &str) -> Result<Self, Error> {
        Ok(Self::prepare(setting, Deadlines::default(), false).await?.0)
    }

    /// Whether `setting` is an address; nothing is opened but the file that `sslrootcert` names.
    ///
    /// # Errors
    /// [`Error::Invalid`] in one sentence without the password.
    pub fn check(setting: &str) -> Result<(), Error> {
        Address::parse(setting)?.tls().map(drop)
    }

    async fn prepare(
        setting: &str,
        deadlines: Deadlines,
        make: bool,
    ) -> Result<(Self, std_mpsc::Sender<()>), Error> {
        let address = Address::parse(setting)?;
        let shared = Arc::new(Shared::new(address, deadlines)?);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("log-postgres")
            .enable_all()
            .build()
            .map_err(|error| Error::Storage(error.to_string()))?;
        let (ended, written) = std_mpsc::channel();
        // From here on its drop ends the runtime, which must not be dropped among other tasks.
        let log = Self {
            readers: Arc::new(Readers::new(Arc::clone(&shared))),
            shared: Arc::clone(&shared),
            tally: Arc::default(),
            queue: None,
            written: Mutex::new(written),
            runtime: Some(runtime),
        };
        log.on_runtime(async move { shared.find(make).await }).await?;
        log.spawn(follower::run(Arc::clone(&log.shared)));
        Ok((log, ended))
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
        ended.map_err(|error| Error::Storage(format!("a read did not end: {error}")))?
    }
}

impl Drop for PostgresLog {
    /// Waits until what is queued is written, or can not be within the deadlines.
    fn drop(&mut self) {
        let Deadlines { settle, statement, connect, .. } = self.shared.deadlines;
        if let Some(queue) = self.queue.take() {
            drop(queue);
            // That it has ended is an error of the channel, too.
            let _ = guard(&self.written).recv_timeout(settle + 2 * (statement + connect));
        }
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

#[async_trait::async_trait]
impl EventLog for PostgresLog {
    async fn append(
        &self,
        stream: &str,
        expected: Expected,
        events: Vec<NewEvent>,
    ) -> Result<Appended, Error> {
        check_limits(stream, &events)?;
        self.writable()?;
        let queue = self.queue.as_ref().ok_or_else(read_only)?;
        let (reply, answer) = oneshot::channel();
        let append = Append { stream: stream.into(), expected, events, reply, broken: None };
        queue.send(append).await.map_err(|_| self.shared.condition.unwritable())?;
        answer.await.map_err(|_| self.shared.condition.unwritable())?
    }

    async fn append_in_turn(&self, appends: Vec<ToAppend>) -> Result<(), (usize, Error)> {
        for (at, append) in appends.iter().enumerate() {
            check_limits(&append.stream, &append.events).map_err(|error| (at, error))?;
        }
        self.writable().map_err(|error| (0, error))?;
        let queue = self.queue.as_ref().ok_or_else(|| (0, read_only()))?;
        // The writer takes them in the order of its queue.
        let broken = Arc::new(AtomicBool::new(false));
        let mut answers = Vec::with_capacity(appends.len());
        for (at, ToAppend { stream, expected, events }) in appends.into_iter().enumerate() {
            let (reply, answer) = oneshot::channel();
            let broken = Some(Arc::clone(&broken));
            let append = Append { stream, expected, events, reply, broken };
            queue.send(append).await.map_err(|_| (at, self.shared.condition.unwritable()))?;
            answers.push(answer);
        }
        for (at, answer) in answers.into_iter().enumerate() {
            let answer = answer.await.unwrap_or_else(|_| Err(self.shared.condition.unwritable()));
            answer.map_err(|error| (at, error))?;
        }
        Ok(())
    }

    async fn read_stream(
        &self,
        stream: &str,
        from_revision: u64,
        limit: usize,
    ) -> Result<Vec<Recorded>, Error> {
        // PostgreSQL refuses some texts that no stream is called by.
        if super::check_name("a stream", stream).is_err() {
            return Ok(vec![]);
        }
        let query = Query::Stream { stream: stream.to_owned(), from: from_revision, limit };
        let readers = Arc::clone(&self.readers);
        self.on_runtime(async move { readers.fetch(&query).await }).await
    }

    async fn read_all(&self, after: u64, limit: usize) -> Result<Vec<Recorded>, Error> {
        self.shared.condition.check_stopped()?;
        if let Some(events) = self.shared.tail.page(after, limit)
            // It may end before what others wrote; positions have no gaps.
            && (events.len() == limit
                || after.saturating_add(events.len() as u64) >= *self.shared.head.borrow())
        {
            return Ok(events);
        }
        let readers = Arc::clone(&self.readers);
        let shared = Arc::clone(&self.shared);
        self.on_runtime(async move {
            let events = readers.fetch(&Query::All { after, limit }).await?;
            if let Some(last) = events.last() {
                shared.tail.extend(events.iter().cloned());
                shared.saw(Seen { position: last.position, hash: last.hash });
            }
            Ok(events)
        })
        .await
    }

    fn head(&self) -> watch::Receiver<u64> {
        self.shared.head.subscribe()
    }

    async fn end(&self) -> Result<u64, Error> {
        let readers = Arc::clone(&self.readers);
        self.on_runtime(async move { Ok(readers.newest().await?.position) }).await
    }

    fn writable(&self) -> Result<(), Error> {
        let queue = self.queue.as_ref().ok_or_else(read_only)?;
        if queue.is_closed() || self.shared.condition.is_unwritable() {
            return Err(self.shared.condition.unwritable());
        }
        Ok(())
    }

    async fn stats(&self) -> Result<Stats, Error> {
        let (readers, tally) = (Arc::clone(&self.readers), Arc::clone(&self.tally));
        self.on_runtime(async move { stats::stats(&readers, &tally).await }).await
    }

    async fn verify(&self) -> Result<Verified, Error> {
        self.verify_after(0, Box::new(|_| {})).await
    }

    async fn verify_after(&self, after: u64, progress: Progress) -> Result<Verified, Error> {
        let head = *self.shared.head.borrow();
        let readers = Arc::clone(&self.readers);
        self.on_runtime(async move { stats::verify(&readers, after, head, progress).await }).await
    }
}

/// The newest event that this node knows of.
#[derive(Debug, Clone, Copy)]
struct Seen {
    position: u64,
    hash: [u8; 32],
}

/// What the handle and its tasks have in common.
struct Shared {
    address: Address,
    tls: Tls,
    deadlines: Deadlines,
    /// Set when the log is opened.
    identity: OnceLock<Uuid>,
    head: watch::Sender<u64>,
    tail: Tail,
    seen: Mutex<Seen>,
    /// Somebody else has appended.
    appended: Notify,
    condition: Condition,
}

impl Shared {
    fn new(address: Address, deadlines: Deadlines) -> Result<Self, Error> {
        Ok(Self {
            condition: Condition::new(address.shown()),
            tls: address.tls()?,
            address,
            deadlines,
            identity: OnceLock::new(),
            head: watch::Sender::new(0),
            tail: Tail::default(),
            seen: Mutex::new(Seen { position: 0, hash: GENESIS }),
            appended: Notify::new(),
        })
    }

    /// Finds the log, which is made if it may be, and waits for a server that is not there yet.
    async fn find(self: &Arc<Self>, make: bool) -> Result<(), Error> {
        let (began, limit) = (Instant::now(), self.deadlines.start);
        let mut backoff = Backoff::default();
        loop {
            let why = match self.find_once(make).await {
                Err(Error::Storage(why)) => why,
                found => return found,
            };
            let place = self.address.shown();
            if began.elapsed() >= limit {
                let limit = limit.as_secs();
                return Err(Error::Storage(format!(
                    "T2M_LOG: {place} could not be reached within {limit} s: {why}"
                )));
            }
            tracing::warn!(%why, "waiting for the log, {place} (T2M_LOG)");
            backoff.wait().await;
        }
    }

    async fn find_once(self: &Arc<Self>, make: bool) -> Result<(), Error> {
        let mut session = Session::unchecked(self).await?;
        let place = self.address.shown();
        let found = async {
            if make {
                return schema::migrate(&mut session.client, &place).await;
            }
            match schema::inspect(&session.client, &place).await? {
                Some((schema::VERSION, identity)) => Ok(identity),
                Some((version, _)) => Err(Error::Foreign(format!(
                    "T2M_LOG: {place} holds a T2M log of version {version}; start a server of \
                     this version once to bring it up to date"
                ))),
                None => Err(Error::Foreign(format!("T2M_LOG: {place} holds no log"))),
            }
        };
        let found = tokio::time::timeout(self.deadlines.statement, found).await;
        let identity = found.unwrap_or_else(|_| Err(connection::late()))?;
        if session.within(session.client.query_one("SHOW fsync", &[])).await?.get::<_, &str>(0)
            == "off"
        {
            tracing::warn!("{place} has fsync off: a power cut there loses what was acknowledged");
        }
        let _ = self.identity.set(identity);
        let newest = reader::newest(&session).await?;
        self.saw(newest);
        Ok(())
    }

    fn seen(&self) -> Seen {
        *guard(&self.seen)
    }

    /// Takes note of a durable event, and of the log being at least that long.
    fn saw(&self, newest: Seen) {
        {
            let mut seen = guard(&self.seen);
            if newest.position > seen.position {
                *seen = newest;
            }
        }
        self.head.send_if_modified(|head| {
            let moved = newest.position > *head;
            *head = newest.position.max(*head);
            moved
        });
    }
}

fn read_only() -> Error {
    Error::Unwritable("it was opened for reading only".into())
}
