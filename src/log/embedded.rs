//! The embedded engine: one SQLite file, one writer thread that commits whatever waits as a group,
//! a checkpointer beside it, and a bounded pool of read-only connections.

use std::fmt::Display;
use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc as std_mpsc;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use rusqlite::ErrorCode;
use tokio::sync::{mpsc, oneshot, watch};

use super::tail::Tail;
use super::{
    Appended, Error, EventLog, Expected, NewEvent, Progress, Recorded, Stats, Verified, bad,
    check_limits, guard,
};
use file::{Found, create, inspect, lock};
use reader::{Reader, Tally, stats};
use readers::Readers;
use verify::verify;
use writer::{Append, Checkpointer, Writer};

pub use import::Import;

#[cfg(test)]
mod damage_tests;
mod file;
mod given;
mod import;
#[cfg(test)]
mod import_tests;
mod reader;
mod readers;
mod room;
#[cfg(test)]
mod tests;
mod verify;
mod writer;

/// Appends that may wait; one more waits for its turn in `append`.
const QUEUE: usize = 4096;
/// Streams whose end, and types whose number, the writer keeps in memory.
const KNOWN_STREAMS: usize = 65_536;
/// How often a log opened for reading looks whether another process has appended.
const POLL: Duration = Duration::from_millis(200);

/// The log in one SQLite file.
///
/// A failed write stops the writer until the log is opened anew; only a full disk stops it no longer
/// than it is full.
pub struct EmbeddedLog {
    shared: Arc<Shared>,
    readers: Arc<Readers>,
    tally: Arc<Mutex<Tally>>,
    /// None when opened for reading only.
    queue: Option<mpsc::Sender<Append>>,
    /// Dropping it ends the poll thread.
    poll: Option<std_mpsc::Sender<()>>,
    threads: Vec<JoinHandle<()>>,
    /// Held, and let go only after the threads have ended.
    lock: Option<File>,
}

impl EmbeddedLog {
    /// Open the log at `path` for appending and reading; it is made if it is not there.
    ///
    /// [`Error::Foreign`] when the file is not a log of a version known here (it is left as it is),
    /// [`Error::Unwritable`] when another process, or another handle in this one, has it open.
    pub fn open(path: &Path) -> Result<Self, Error> {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir).map_err(io)?;
        }
        inspect(path)?;
        let lock = lock(path)?;
        import::clear(path)?;
        // Once more: another process may have made it between the two.
        if inspect(path)? == Found::Nothing {
            create(path)?;
        }
        let writer = Writer::open(path)?;
        let mut log = Self::around(path, writer.shared.clone(), Some(lock))?;
        let (queue, appends) = mpsc::channel(QUEUE);
        let (wake, woken) = std_mpsc::sync_channel(1);
        let checkpointer = Checkpointer::open(path, writer.shared.clone())?;
        log.threads.push(spawn("log-checkpoint", move || checkpointer.run(&woken))?);
        log.threads.push(spawn("log-writer", move || writer.run(appends, &wake))?);
        log.queue = Some(queue);
        Ok(log)
    }

    /// Open the log at `path` for reading, while another process may be writing it. Its `head`
    /// follows the other process within a fifth of a second; a `read_all` that sees more moves it.
    pub fn open_read_only(path: &Path) -> Result<Self, Error> {
        if inspect(path)? == Found::Nothing {
            return Err(Error::Storage(format!("there is no log at {}", path.display())));
        }
        let reader = Reader::open(path)?;
        let shared = Arc::new(Shared::new(reader.head()?));
        let mut log = Self::around(path, shared.clone(), None)?;
        let (poll, ended) = std_mpsc::channel::<()>();
        let follow = move || {
            while ended.recv_timeout(POLL) == Err(std_mpsc::RecvTimeoutError::Timeout) {
                match reader.head() {
                    Ok(head) => shared.advance(head),
                    Err(error) => tracing::warn!(%error, "the log's head cannot be read"),
                }
            }
        };
        log.threads.push(spawn("log-follow", follow)?);
        log.poll = Some(poll);
        Ok(log)
    }

    /// As [`EventLog::verify`], for what follows position `after` only, whose own hash is believed;
    /// `progress` is told the position every now and then. From 0 on the file's structure and its
    /// indices are checked too, which streams are read by.
    ///
    /// # Errors
    /// [`Error::Corrupt`] names the first bad position; 0 when it is the file's structure.
    pub async fn verify_after(
        &self,
        after: u64,
        mut progress: impl FnMut(u64) + Send + 'static,
    ) -> Result<Verified, Error> {
        let head = *self.shared.head.borrow();
        // Its own connection: names remembered from before must not vouch for the file.
        let path = self.readers.path().to_owned();
        let work = move |_: &mut Reader| verify(&path, after, head, &mut progress);
        self.readers.run(work).await
    }

    fn around(path: &Path, shared: Arc<Shared>, lock: Option<File>) -> Result<Self, Error> {
        Ok(Self {
            shared,
            readers: Arc::new(Readers::open(path)?),
            tally: Arc::default(),
            queue: None,
            poll: None,
            threads: Vec::new(),
            lock,
        })
    }
}

impl Drop for EmbeddedLog {
    /// Waits until what is queued is written and the threads have let go of the file; but for those
    /// that still read for somebody who does not wait for it any more.
    fn drop(&mut self) {
        // First: whoever closes the file last writes the WAL back, and readers do not.
        self.readers.close();
        self.queue = None;
        self.poll = None;
        for thread in self.threads.drain(..).rev() {
            if thread.join().is_err() {
                tracing::error!("a thread of the log panicked");
            }
        }
    }
}

#[async_trait::async_trait]
impl EventLog for EmbeddedLog {
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
        let append = Append { stream: stream.into(), expected, events, reply };
        queue.send(append).await.map_err(|_| self.shared.unwritable())?;
        answer.await.map_err(|_| self.shared.unwritable())?
    }

    async fn read_stream(
        &self,
        stream: &str,
        from_revision: u64,
        limit: usize,
    ) -> Result<Vec<Recorded>, Error> {
        let stream = stream.to_owned();
        self.readers.run(move |reader| reader.stream_page(&stream, from_revision, limit)).await
    }

    async fn read_all(&self, after: u64, limit: usize) -> Result<Vec<Recorded>, Error> {
        if let Some(events) = self.shared.tail.page(after, limit) {
            return Ok(events);
        }
        let events = self.readers.run(move |reader| reader.page(after, limit)).await?;
        if self.queue.is_none()
            && let Some(last) = events.last()
        {
            self.shared.advance(last.position);
        }
        Ok(events)
    }

    fn head(&self) -> watch::Receiver<u64> {
        self.shared.head.subscribe()
    }

    fn writable(&self) -> Result<(), Error> {
        let queue = self.queue.as_ref().ok_or_else(read_only)?;
        if queue.is_closed() || self.shared.stopped.get().is_some() || self.shared.is_full() {
            return Err(self.shared.unwritable());
        }
        Ok(())
    }

    fn is_exclusive(&self) -> bool {
        self.lock.is_some()
    }

    async fn stats(&self) -> Result<Stats, Error> {
        let (tally, path) = (self.tally.clone(), self.readers.path().to_owned());
        self.readers.run(move |reader| stats(reader, &tally, &path)).await
    }

    async fn verify(&self) -> Result<Verified, Error> {
        Self::verify_after(self, 0, |_| {}).await
    }

    async fn verify_after(&self, after: u64, progress: Progress) -> Result<Verified, Error> {
        Self::verify_after(self, after, progress).await
    }
}

/// What the handle and its threads have in common.
struct Shared {
    head: watch::Sender<u64>,
    tail: Tail,
    /// Why nothing is written any more.
    stopped: OnceLock<String>,
    /// Nothing is written until there is room on the disk again.
    full: AtomicBool,
    /// The checkpointer asks the writer for a checkpoint between two commits.
    wal_is_long: AtomicBool,
}

impl Shared {
    fn new(head: u64) -> Self {
        Self {
            head: watch::Sender::new(head),
            tail: Tail::default(),
            stopped: OnceLock::new(),
            full: AtomicBool::new(false),
            wal_is_long: AtomicBool::new(false),
        }
    }

    fn advance(&self, to: u64) {
        self.head.send_if_modified(|head| {
            let moved = to > *head;
            *head = to.max(*head);
            moved
        });
    }

    fn is_full(&self) -> bool {
        self.full.load(Ordering::Acquire)
    }

    fn set_full(&self, full: bool) {
        self.full.store(full, Ordering::Release);
    }

    fn stop(&self, doing: &str, error: &dyn Display) {
        let reason = format!("{doing} failed: {error}");
        tracing::error!(%reason, "the log stops writing");
        // The first reason is the one that matters.
        let _ = self.stopped.set(reason);
    }

    fn unwritable(&self) -> Error {
        let otherwise =
            if self.is_full() { "no room is left on its disk" } else { "its writer has ended" };
        let reason = self.stopped.get().map_or(otherwise, String::as_str);
        Error::Unwritable(reason.to_owned())
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, Error> {
    std::thread::Builder::new().name(name.into()).spawn(work).map_err(io)
}

fn read_only() -> Error {
    Error::Unwritable("it was opened for reading only".into())
}

fn io(error: std::io::Error) -> Error {
    Error::Storage(error.to_string())
}

impl From<rusqlite::Error> for Error {
    fn from(error: rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
                bad(0, &error.to_string())
            }
            _ => Error::Storage(error.to_string()),
        }
    }
}
