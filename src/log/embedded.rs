//! The embedded engine: one SQLite file, one writer thread that commits whatever waits as a group,
//! a checkpointer beside it, and a bounded pool of read-only connections.

use std::collections::{BTreeMap, HashMap};
use std::fs::{File, TryLockError};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc as std_mpsc;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use chrono::{DateTime, Utc};
use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension, Params, Row, params};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use uuid::Uuid;

use super::{Appended, Error, EventLog, Expected, Link, NewEvent, Recorded, Stats, Verified};
use super::{GENESIS, REPEAT_WINDOW, check_limits};

/// "T2Ml": who asks the file (`file(1)`, SQLite's own shell) sees whose it is.
const APPLICATION_ID: u32 = 0x5432_4d6c;
/// The newest layout this program knows.
const VERSION: u32 = 1;

const SCHEMA: &str = "
    CREATE TABLE streams (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE) STRICT;
    CREATE TABLE types (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE) STRICT;
    CREATE TABLE events (
        position INTEGER PRIMARY KEY,
        stream_id INTEGER NOT NULL,
        revision INTEGER NOT NULL,
        type_id INTEGER NOT NULL,
        id BLOB NOT NULL,
        time INTEGER NOT NULL,
        hash BLOB NOT NULL,
        data BLOB NOT NULL,
        metadata BLOB NOT NULL
    ) STRICT;
    CREATE UNIQUE INDEX events_by_stream ON events (stream_id, revision);";

const COLUMNS: &str = "position, stream_id, revision, type_id, id, time, hash, data, metadata";

/// Appends that may wait; one more waits for its turn in `append`.
const QUEUE: usize = 4096;
/// Bounds of one commit.
const GROUP_APPENDS: usize = 1024;
const GROUP_BYTES: usize = 8 * 1024 * 1024;
/// Streams whose end the writer, and whose name a reader, keeps in memory.
const KNOWN_STREAMS: usize = 65_536;
/// Reads that run at the same time.
const READERS: usize = 8;
/// Pages written to the WAL between two checkpoints of the checkpointer.
const CHECKPOINT_PAGES: usize = 4000;
/// A WAL longer than this is checkpointed by the writer, between two commits: under unbroken load
/// the checkpointer never reaches its end, and only then does SQLite start it from the front again.
const LONG_WAL_PAGES: i64 = 16_000;
/// How often a log opened for reading looks whether another process has appended.
const POLL: Duration = Duration::from_millis(200);
/// Events a verification reads in one transaction, so that it holds up no checkpoint for long.
const VERIFY_PAGE: i64 = 2000;

/// The log in one SQLite file.
///
/// A failed write, also one for want of disk space, stops the writer until the log is opened anew.
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
    _lock: Option<File>,
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

    fn around(path: &Path, shared: Arc<Shared>, lock: Option<File>) -> Result<Self, Error> {
        let readers = Readers {
            path: path.to_owned(),
            idle: Mutex::new(vec![Reader::open(path)?]),
            permits: Arc::new(Semaphore::new(READERS)),
        };
        Ok(Self {
            shared,
            readers: Arc::new(readers),
            tally: Arc::default(),
            queue: None,
            poll: None,
            threads: Vec::new(),
            _lock: lock,
        })
    }
}

impl Drop for EmbeddedLog {
    /// Waits until what is queued is written and the threads have let go of the file.
    fn drop(&mut self) {
        self.queue = None;
        self.poll = None;
        guard(&self.readers.idle).clear();
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
        if queue.is_closed() || self.shared.stopped.get().is_some() {
            return Err(self.shared.unwritable());
        }
        Ok(())
    }

    async fn stats(&self) -> Result<Stats, Error> {
        let (tally, path) = (self.tally.clone(), self.readers.path.clone());
        self.readers.run(move |reader| stats(reader, &tally, &path)).await
    }

    async fn verify(&self) -> Result<Verified, Error> {
        let head = *self.shared.head.borrow();
        // Its own connection: names remembered from before must not vouch for the file.
        let path = self.readers.path.clone();
        self.readers.run(move |_| verify(&mut Reader::open(&path)?, head)).await
    }
}

/// What the handle and its threads have in common.
struct Shared {
    head: watch::Sender<u64>,
    /// Why nothing is written any more.
    stopped: OnceLock<String>,
    /// The checkpointer asks the writer for a checkpoint between two commits.
    wal_is_long: AtomicBool,
}

impl Shared {
    fn new(head: u64) -> Self {
        Self {
            head: watch::Sender::new(head),
            stopped: OnceLock::new(),
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

    fn stop(&self, doing: &str, error: &rusqlite::Error) {
        let reason = format!("{doing} failed: {error}");
        tracing::error!(%reason, "the log stops writing");
        // The first reason is the one that matters.
        let _ = self.stopped.set(reason);
    }

    fn unwritable(&self) -> Error {
        let reason = self.stopped.get().map_or("its writer has ended", String::as_str);
        Error::Unwritable(reason.to_owned())
    }
}

// ---- The file ----

#[derive(PartialEq, Eq)]
enum Found {
    Nothing,
    Log,
}

/// What is at `path`, from the file's first bytes alone: SQLite may change a file by opening it.
fn inspect(path: &Path) -> Result<Found, Error> {
    let mut header = Vec::new();
    match File::open(path) {
        Ok(file) => file.take(100).read_to_end(&mut header).map_err(io)?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Found::Nothing),
        Err(error) => return Err(io(error)),
    };
    let path = path.display();
    // https://www.sqlite.org/fileformat.html: user_version at 60, application_id at 68.
    let number = |at: usize| header.get(at..at + 4).and_then(|b| b.try_into().ok());
    let (Some(version), Some(application)) = (number(60), number(68)) else {
        return Err(Error::Foreign(format!("{path} is not a T2M log; it was left as it is")));
    };
    if !header.starts_with(b"SQLite format 3\0")
        || u32::from_be_bytes(application) != APPLICATION_ID
    {
        return Err(Error::Foreign(format!("{path} is not a T2M log; it was left as it is")));
    }
    let version = u32::from_be_bytes(version);
    if version != VERSION {
        return Err(Error::Foreign(format!(
            "{path} is a T2M log of version {version} and this program knows version {VERSION}; \
             use a newer program"
        )));
    }
    Ok(Found::Log)
}

/// One writer at a time, also across processes; the system lets go of it when the process dies.
fn lock(path: &Path) -> Result<File, Error> {
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path.with_extension("lock"))
        .map_err(io)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            Err(Error::Unwritable(format!("{} is open for writing elsewhere", path.display())))
        }
        Err(TryLockError::Error(error)) => Err(io(error)),
    }
}

/// Make an empty log beside its place and move it there whole, so that a crash leaves no half one.
fn create(path: &Path) -> Result<(), Error> {
    let wal = beside(path, "-wal");
    if wal.exists() {
        // SQLite would replay it into the new file.
        return Err(Error::Foreign(format!(
            "{} lies there without its log; move it away or bring the log back",
            wal.display()
        )));
    }
    let new = path.with_extension("new");
    for stale in [new.clone(), beside(&new, "-journal"), beside(&new, "-wal")] {
        match std::fs::remove_file(stale) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(io(error)),
            _ => {}
        }
    }
    let conn = connect(&new, OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE)?;
    conn.pragma_update(None, "page_size", 8192)?;
    conn.execute_batch(&format!(
        "BEGIN; {SCHEMA} PRAGMA application_id = {APPLICATION_ID}; \
         PRAGMA user_version = {VERSION}; COMMIT;"
    ))?;
    conn.pragma_update(None, "journal_mode", "wal")?;
    conn.close().map_err(|(_, error)| error)?;
    File::open(&new).and_then(|file| file.sync_all()).map_err(io)?;
    std::fs::rename(&new, path).map_err(io)?;
    sync_directory(path)
}

fn sync_directory(path: &Path) -> Result<(), Error> {
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(io)
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Flags without URI: a path is a path, whatever is in it.
fn connect(path: &Path, flags: OpenFlags) -> Result<Connection, Error> {
    let conn = Connection::open_with_flags(path, flags | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
    conn.busy_timeout(Duration::from_secs(10))?;
    // Else a statement is planned anew whenever a bound that it compares with changes.
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
    conn.set_prepared_statement_cache_capacity(32);
    Ok(conn)
}

/// A connection that makes what it writes durable.
fn connect_durably(path: &Path) -> Result<Connection, Error> {
    let conn = connect(path, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
    conn.pragma_update(None, "synchronous", "full")?;
    // A plain fsync does not reach the disk on macOS; elsewhere these do nothing.
    conn.pragma_update(None, "fullfsync", true)?;
    conn.pragma_update(None, "checkpoint_fullfsync", true)?;
    conn.pragma_update(None, "wal_autocheckpoint", 0)?;
    Ok(conn)
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, Error> {
    std::thread::Builder::new().name(name.into()).spawn(work).map_err(io)
}

// ---- Writing ----

struct Append {
    stream: String,
    expected: Expected,
    events: Vec<NewEvent>,
    reply: oneshot::Sender<Result<Appended, Error>>,
}

impl Append {
    fn bytes(&self) -> usize {
        self.events.iter().map(|e| e.data.len() + e.metadata.len()).sum()
    }

    fn conflict(&self, actual: Option<u64>) -> Error {
        Error::Conflict { stream: self.stream.clone(), expected: self.expected, actual }
    }
}

#[derive(Clone, Copy)]
struct StreamEnd {
    id: i64,
    /// The last event's revision.
    last: u64,
}

/// Owns the writing connection. What it keeps in memory runs ahead of the commit; that is sound
/// because after a failed commit it never writes again.
struct Writer {
    shared: Arc<Shared>,
    conn: Connection,
    position: u64,
    hash: [u8; 32],
    streams: HashMap<String, StreamEnd>,
    types: HashMap<String, i64>,
    /// A guess, on the high side, of the pages written since the checkpointer was last woken.
    pages: usize,
}

impl Writer {
    fn open(path: &Path) -> Result<Self, Error> {
        let conn = connect_durably(path)?;
        conn.pragma_update(None, "cache_size", -65_536)?;
        conn.pragma_update(None, "journal_size_limit", 256 * 1024 * 1024)?;
        let reader = Reader::open(path)?;
        let position = reader.head()?;
        Ok(Self {
            shared: Arc::new(Shared::new(position)),
            conn,
            position,
            hash: reader.hash_at(position)?,
            streams: HashMap::new(),
            types: HashMap::new(),
            pages: 0,
        })
    }

    fn run(mut self, mut appends: mpsc::Receiver<Append>, wake: &std_mpsc::SyncSender<()>) {
        while let Some(first) = appends.blocking_recv() {
            let group = gather(first, &mut appends);
            if self.shared.stopped.get().is_some() || !self.commit_and_answer(group) {
                break;
            }
            self.checkpoint_if_due(wake);
        }
        appends.close();
        while let Some(append) = appends.blocking_recv() {
            let _ = append.reply.send(Err(self.shared.unwritable()));
        }
        if self.shared.stopped.get().is_some() {
            leave_wal_alone(&self.conn);
        }
    }

    /// Whether the writer may go on.
    fn commit_and_answer(&mut self, group: Vec<Append>) -> bool {
        match self.commit(&group) {
            Ok(answers) => {
                self.shared.advance(self.position);
                for (append, answer) in group.into_iter().zip(answers) {
                    // Whoever gave up waiting finds the outcome by repeating the append.
                    let _ = append.reply.send(answer);
                }
                true
            }
            Err(error) => {
                self.shared.stop("a write", &error);
                if !self.conn.is_autocommit() {
                    let _ = self.conn.execute_batch("ROLLBACK");
                }
                for append in group {
                    let _ = append.reply.send(Err(self.shared.unwritable()));
                }
                false
            }
        }
    }

    /// The whole group in one transaction. An append that conflicts is refused before it has
    /// written anything, so that it spoils none of the others.
    fn commit(&mut self, group: &[Append]) -> rusqlite::Result<Vec<Result<Appended, Error>>> {
        self.conn.prepare_cached("BEGIN IMMEDIATE")?.execute([])?;
        let answers = group.iter().map(|append| self.place(append)).collect::<Result<_, _>>()?;
        self.conn.prepare_cached("COMMIT")?.execute([])?;
        Ok(answers)
    }

    fn place(&mut self, append: &Append) -> rusqlite::Result<Result<Appended, Error>> {
        let Some(end) = self.find_stream(&append.stream)? else {
            return match append.expected {
                Expected::Revision(_) => Ok(Err(append.conflict(None))),
                Expected::Any | Expected::NoStream => {
                    let id = intern(&self.conn, "streams", &append.stream)?;
                    self.insert(id, 0, append).map(Ok)
                }
            };
        };
        let repeat_from = match append.expected {
            Expected::Revision(last) if last == end.last => None,
            Expected::Revision(last) => Some(last.saturating_add(1)),
            Expected::NoStream => Some(0),
            Expected::Any => self.find_repeat(end, &append.events)?,
        };
        match repeat_from {
            None => self.insert(end.id, end.last + 1, append).map(Ok),
            Some(first) => Ok(self
                .recorded_at(end, first, &append.events)?
                .ok_or_else(|| append.conflict(Some(end.last)))),
        }
    }

    fn find_stream(&mut self, name: &str) -> rusqlite::Result<Option<StreamEnd>> {
        if let Some(end) = self.streams.get(name) {
            return Ok(Some(*end));
        }
        let Some(id) = find_name(&self.conn, "streams", name)? else { return Ok(None) };
        let last: i64 = self
            .conn
            .prepare_cached("SELECT max(revision) FROM events WHERE stream_id = ?1")?
            .query_row([id], |row| row.get(0))?;
        Ok(Some(self.remember(name, StreamEnd { id, last: from_sql(last) })))
    }

    fn remember(&mut self, name: &str, end: StreamEnd) -> StreamEnd {
        if let Some(known) = self.streams.get_mut(name) {
            *known = end;
            return end;
        }
        if self.streams.len() >= KNOWN_STREAMS {
            self.streams.clear();
        }
        self.streams.insert(name.to_owned(), end);
        end
    }

    /// The revision near the stream's end where the first of `events` already is. An index over ids
    /// would cost every append a page; this costs only those that name no place.
    fn find_repeat(&self, end: StreamEnd, events: &[NewEvent]) -> rusqlite::Result<Option<u64>> {
        let oldest = end.last.saturating_sub(REPEAT_WINDOW + events.len() as u64);
        let Some(first) = events.first() else { return Ok(None) };
        let found: Option<i64> = self
            .conn
            .prepare_cached(
                "SELECT revision FROM events WHERE stream_id = ?1 AND revision >= ?2 AND id = ?3
                 ORDER BY revision DESC LIMIT 1",
            )?
            .query_row(params![end.id, to_sql(oldest), first.id.as_bytes()], |row| row.get(0))
            .optional()?;
        Ok(found.map(from_sql))
    }

    /// The original answer, if exactly these events are in the stream from revision `first` on.
    fn recorded_at(
        &self,
        end: StreamEnd,
        first: u64,
        events: &[NewEvent],
    ) -> rusqlite::Result<Option<Appended>> {
        let mut statement = self.conn.prepare_cached(
            "SELECT id, position FROM events WHERE stream_id = ?1 AND revision >= ?2
             ORDER BY revision LIMIT ?3",
        )?;
        let limit = to_sql(events.len() as u64);
        let mut rows = statement.query(params![end.id, to_sql(first), limit])?;
        let mut position = 0;
        for event in events {
            let Some(row) = rows.next()? else { return Ok(None) };
            if row.get_ref(0)?.as_blob()? != event.id.as_bytes() {
                return Ok(None);
            }
            position = from_sql(row.get(1)?);
        }
        Ok(Some(Appended { revision: first + events.len() as u64 - 1, position }))
    }

    fn insert(&mut self, stream: i64, first: u64, append: &Append) -> rusqlite::Result<Appended> {
        let mut revision = first;
        for (event, at) in append.events.iter().zip(first..) {
            revision = at;
            let kind = self.find_type(&event.kind)?;
            let position = self.position + 1;
            let link = Link {
                position,
                stream: &append.stream,
                revision,
                kind: &event.kind,
                id: event.id,
                time: event.time,
                data: &event.data,
                metadata: &event.metadata,
            };
            let hash = link.hash(&self.hash);
            self.conn
                .prepare_cached("INSERT INTO events VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)")?
                .execute(params![
                    to_sql(position),
                    stream,
                    to_sql(revision),
                    kind,
                    event.id.as_bytes(),
                    event.time.timestamp_micros(),
                    hash,
                    event.data,
                    event.metadata,
                ])?;
            (self.position, self.hash) = (position, hash);
        }
        self.remember(&append.stream, StreamEnd { id: stream, last: revision });
        self.pages += 3 + append.events.len() + append.bytes() / 8192;
        Ok(Appended { revision, position: self.position })
    }

    fn find_type(&mut self, name: &str) -> rusqlite::Result<i64> {
        if let Some(id) = self.types.get(name) {
            return Ok(*id);
        }
        let id = match find_name(&self.conn, "types", name)? {
            Some(id) => id,
            None => intern(&self.conn, "types", name)?,
        };
        if self.types.len() >= KNOWN_STREAMS {
            self.types.clear();
        }
        self.types.insert(name.to_owned(), id);
        Ok(id)
    }

    fn checkpoint_if_due(&mut self, wake: &std_mpsc::SyncSender<()>) {
        if self.shared.wal_is_long.swap(false, Ordering::Relaxed)
            && let Err(error) = checkpoint(&self.conn)
        {
            self.shared.stop("a checkpoint", &error);
        }
        if self.pages >= CHECKPOINT_PAGES {
            self.pages = 0;
            // Full: it is awake already.
            let _ = wake.try_send(());
        }
    }
}

fn gather(first: Append, appends: &mut mpsc::Receiver<Append>) -> Vec<Append> {
    let mut bytes = first.bytes();
    let mut group = vec![first];
    while group.len() < GROUP_APPENDS
        && bytes < GROUP_BYTES
        && let Ok(append) = appends.try_recv()
    {
        bytes += append.bytes();
        group.push(append);
    }
    group
}

fn find_name(conn: &Connection, table: &str, name: &str) -> rusqlite::Result<Option<i64>> {
    conn.prepare_cached(&format!("SELECT id FROM {table} WHERE name = ?1"))?
        .query_row([name], |row| row.get(0))
        .optional()
}

fn intern(conn: &Connection, table: &str, name: &str) -> rusqlite::Result<i64> {
    conn.prepare_cached(&format!("INSERT INTO {table} (name) VALUES (?1)"))?.insert([name])
}

/// Moves the WAL into the file off the writer's thread, so that commits need not wait for it.
struct Checkpointer {
    shared: Arc<Shared>,
    conn: Connection,
}

impl Checkpointer {
    fn open(path: &Path, shared: Arc<Shared>) -> Result<Self, Error> {
        Ok(Self { shared, conn: connect_durably(path)? })
    }

    fn run(self, woken: &std_mpsc::Receiver<()>) {
        while woken.recv().is_ok() && self.shared.stopped.get().is_none() {
            match checkpoint(&self.conn) {
                Ok(pages) if pages > LONG_WAL_PAGES => {
                    self.shared.wal_is_long.store(true, Ordering::Relaxed);
                }
                Ok(_) => {}
                // A sync of the file failed: as with a commit, no second try.
                Err(error) => self.shared.stop("a checkpoint", &error),
            }
        }
        if self.shared.stopped.get().is_some() {
            leave_wal_alone(&self.conn);
        }
    }
}

/// Answers how many pages are in the WAL. It never waits for readers or the writer.
fn checkpoint(conn: &Connection) -> rusqlite::Result<i64> {
    conn.prepare_cached("PRAGMA wal_checkpoint(PASSIVE)")?.query_row([], |row| row.get(1))
}

/// After a failure closing must not write either; the next opening recovers from the WAL.
fn leave_wal_alone(conn: &Connection) {
    if let Err(error) = conn.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true) {
        tracing::error!(%error, "the log's WAL may be written back on closing");
    }
}

// ---- Reading ----

/// Connections for reading. Reads go to tokio's blocking threads, always: even a small one may
/// have to wait for a disk, and an actor's runtime has only the one thread.
struct Readers {
    path: PathBuf,
    idle: Mutex<Vec<Reader>>,
    permits: Arc<Semaphore>,
}

impl Readers {
    async fn run<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&mut Reader) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let readers = self.clone();
        let permit = self.permits.clone().acquire_owned().await;
        let permit = permit.map_err(|_| Error::Storage("the log is closed".into()))?;
        let task = tokio::task::spawn_blocking(move || {
            // Moved in: it is held until the work is done, also when nobody waits for it any more.
            let _permit = permit;
            let idle = guard(&readers.idle).pop();
            let mut reader = match idle {
                Some(reader) => reader,
                None => Reader::open(&readers.path)?,
            };
            let answer = work(&mut reader);
            if answer.is_ok() {
                guard(&readers.idle).push(reader);
            }
            answer
        });
        task.await.map_err(|error| Error::Storage(format!("a read did not end: {error}")))?
    }
}

struct Reader {
    conn: Connection,
    names: Names,
}

/// Names by their numbers, as far as this connection has met them.
#[derive(Default)]
struct Names {
    streams: HashMap<i64, Arc<str>>,
    types: HashMap<i64, Arc<str>>,
}

impl Reader {
    fn open(path: &Path) -> Result<Self, Error> {
        let conn = connect(path, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
        conn.pragma_update(None, "cache_size", -16_384)?;
        // Virtual, not resident: as much as SQLite lets one map.
        conn.pragma_update(None, "mmap_size", 0x7fff_0000)?;
        leave_wal_alone(&conn);
        Ok(Self { conn, names: Names::default() })
    }

    fn head(&self) -> Result<u64, Error> {
        let mut statement = self.conn.prepare_cached("SELECT max(position) FROM events")?;
        let head: Option<i64> = statement.query_row([], |row| row.get(0))?;
        Ok(head.map_or(0, from_sql))
    }

    fn hash_at(&self, position: u64) -> Result<[u8; 32], Error> {
        if position == 0 {
            return Ok(GENESIS);
        }
        let mut statement =
            self.conn.prepare_cached("SELECT hash FROM events WHERE position = ?1")?;
        let hash: Vec<u8> = statement.query_row([to_sql(position)], |row| row.get(0))?;
        hash.try_into().map_err(|_| bad(position, "its hash has not 32 bytes"))
    }

    fn page(&mut self, after: u64, limit: usize) -> Result<Vec<Recorded>, Error> {
        let sql =
            format!("SELECT {COLUMNS} FROM events WHERE position > ?1 ORDER BY position LIMIT ?2");
        self.collect(&sql, params![to_sql(after), to_sql(limit as u64)])
    }

    fn stream_page(
        &mut self,
        stream: &str,
        from: u64,
        limit: usize,
    ) -> Result<Vec<Recorded>, Error> {
        let sql = format!(
            "SELECT {COLUMNS} FROM events
             WHERE stream_id = (SELECT id FROM streams WHERE name = ?1) AND revision >= ?2
             ORDER BY revision LIMIT ?3"
        );
        self.collect(&sql, params![stream, to_sql(from), to_sql(limit as u64)])
    }

    fn collect(&mut self, sql: &str, params: impl Params) -> Result<Vec<Recorded>, Error> {
        let mut events = Vec::new();
        self.each(sql, params, |event| {
            events.push(event);
            Ok(())
        })?;
        Ok(events)
    }

    fn each(
        &mut self,
        sql: &str,
        params: impl Params,
        mut visit: impl FnMut(Recorded) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut statement = self.conn.prepare_cached(sql)?;
        let mut rows = statement.query(params)?;
        while let Some(row) = rows.next()? {
            visit(decode(row, &self.conn, &mut self.names)?)?;
        }
        Ok(())
    }
}

/// A row of [`COLUMNS`].
fn decode(row: &Row, conn: &Connection, names: &mut Names) -> Result<Recorded, Error> {
    let position = from_sql(row.get(0)?);
    let stream = name(conn, "streams", &mut names.streams, row.get(1)?, position)?;
    let revision: i64 = row.get(2)?;
    let kind = name(conn, "types", &mut names.types, row.get(3)?, position)?;
    let blob = |at| -> Result<&[u8], Error> {
        row.get_ref(at)?.as_blob().map_err(|_| bad(position, "a field is not bytes"))
    };
    Ok(Recorded {
        id: Uuid::from_slice(blob(4)?).map_err(|_| bad(position, "its id has not 16 bytes"))?,
        stream,
        revision: u64::try_from(revision).map_err(|_| bad(position, "its revision is negative"))?,
        position,
        kind,
        time: DateTime::from_timestamp_micros(row.get(5)?)
            .ok_or_else(|| bad(position, "its time is out of range"))?,
        data: blob(7)?.to_vec(),
        metadata: blob(8)?.to_vec(),
        hash: blob(6)?.try_into().map_err(|_| bad(position, "its hash has not 32 bytes"))?,
    })
}

fn name(
    conn: &Connection,
    table: &str,
    known: &mut HashMap<i64, Arc<str>>,
    id: i64,
    position: u64,
) -> Result<Arc<str>, Error> {
    if let Some(name) = known.get(&id) {
        return Ok(name.clone());
    }
    let found: Option<String> = conn
        .prepare_cached(&format!("SELECT name FROM {table} WHERE id = ?1"))?
        .query_row([id], |row| row.get(0))
        .optional()?;
    let name: Arc<str> =
        found.ok_or_else(|| bad(position, &format!("its name is not among the {table}")))?.into();
    if known.len() >= KNOWN_STREAMS {
        known.clear();
    }
    known.insert(id, name.clone());
    Ok(name)
}

/// Events counted so far; each call for stats counts on from there.
#[derive(Default)]
struct Tally {
    upto: i64,
    events: u64,
    types: HashMap<i64, u64>,
    first: Option<DateTime<Utc>>,
    last: Option<DateTime<Utc>>,
}

impl Tally {
    fn count_on(&mut self, conn: &Connection) -> Result<(), Error> {
        let mut statement = conn.prepare_cached(
            "SELECT position, type_id, time FROM events WHERE position > ?1 ORDER BY position",
        )?;
        let mut rows = statement.query([self.upto])?;
        while let Some(row) = rows.next()? {
            self.upto = row.get(0)?;
            self.events += 1;
            *self.types.entry(row.get(1)?).or_default() += 1;
            self.last = DateTime::from_timestamp_micros(row.get(2)?);
            self.first = self.first.or(self.last);
        }
        Ok(())
    }
}

fn stats(reader: &mut Reader, tally: &Mutex<Tally>, path: &Path) -> Result<Stats, Error> {
    let mut tally = guard(tally);
    tally.count_on(&reader.conn)?;
    let position = from_sql(tally.upto);
    let mut types = BTreeMap::new();
    for (id, count) in &tally.types {
        let name = name(&reader.conn, "types", &mut reader.names.types, *id, position)?;
        types.insert(name.to_string(), *count);
    }
    let mut statement = reader.conn.prepare_cached("SELECT count(*) FROM streams")?;
    let length = |path: &Path| std::fs::metadata(path).map_or(0, |file| file.len());
    Ok(Stats {
        events: tally.events,
        streams: from_sql(statement.query_row([], |row| row.get(0))?),
        position,
        head_hash: reader.hash_at(position)?,
        bytes: length(path) + length(&beside(path, "-wal")),
        types,
        first: tally.first,
        last: tally.last,
    })
}

/// Walk the chain up to the end, which must not be before `head`. This engine leaves no gaps, so a
/// missing position is damage.
fn verify(reader: &mut Reader, head: u64) -> Result<Verified, Error> {
    let sql =
        format!("SELECT {COLUMNS} FROM events WHERE position > ?1 ORDER BY position LIMIT ?2");
    let (mut position, mut hash) = (0, GENESIS);
    loop {
        let start = position;
        let walked = reader.each(&sql, params![to_sql(start), VERIFY_PAGE], |event| {
            check_link(&event, position, &hash)?;
            (position, hash) = (event.position, event.hash);
            Ok(())
        });
        walked.map_err(|error| match error {
            // SQLite itself stumbled: right after the last event that was good.
            Error::Corrupt { position: 0, what } => bad(position + 1, &what),
            other => other,
        })?;
        if position == start {
            break;
        }
    }
    if position < head {
        return Err(bad(position + 1, "the event is missing"));
    }
    check_structure(reader)?;
    Ok(Verified { events: position, head_hash: hash })
}

fn check_link(event: &Recorded, before: u64, hash: &[u8; 32]) -> Result<(), Error> {
    if event.position != before + 1 {
        return Err(bad(before + 1, "the event is missing"));
    }
    if event.hash != Link::of(event).hash(hash) {
        return Err(bad(event.position, "the event and its hash do not belong together"));
    }
    Ok(())
}

/// The chain says nothing of the indices, which streams are read by.
fn check_structure(reader: &Reader) -> Result<(), Error> {
    let found: String = reader.conn.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))?;
    if found == "ok" { Ok(()) } else { Err(bad(0, &found)) }
}

// ---- Small things ----

/// SQLite's integers have a sign; no log reaches where that matters.
fn to_sql(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn from_sql(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

fn bad(position: u64, what: &str) -> Error {
    Error::Corrupt { position, what: what.to_owned() }
}

fn read_only() -> Error {
    Error::Unwritable("it was opened for reading only".into())
}

fn io(error: std::io::Error) -> Error {
    Error::Storage(error.to_string())
}

/// What these mutexes hold is whole between any two statements, so a panic elsewhere spoils nothing.
fn guard<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::conformance;
    use tempfile::TempDir;

    fn event(number: u128) -> NewEvent {
        NewEvent {
            id: Uuid::from_u128(number),
            kind: format!("thing.happened.v{}", number % 2),
            time: DateTime::from_timestamp_micros(1_700_000_000_000_000).unwrap(),
            data: format!(r#"{{"n":{number}}}"#).into_bytes(),
            metadata: b"{}".to_vec(),
        }
    }

    fn place() -> (TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.sqlite");
        (dir, path)
    }

    /// `count` events, alternating between two streams.
    async fn fill(log: &EmbeddedLog, count: u128) {
        for number in 1..=count {
            let stream = format!("thing-{}", number % 2);
            log.append(&stream, Expected::Any, vec![event(number)]).await.unwrap();
        }
    }

    /// A stranger's connection to the file, as fast as it can be.
    fn raw(path: &Path) -> Connection {
        let conn = Connection::open(path).unwrap();
        conn.execute_batch("PRAGMA synchronous = off").unwrap();
        conn
    }

    fn refused(opened: Result<EmbeddedLog, Error>) -> Error {
        opened.err().expect("it was opened")
    }

    #[tokio::test]
    async fn the_contract_holds_on_one_thread() {
        let (_dir, path) = place();
        let log: Arc<dyn EventLog> = Arc::new(EmbeddedLog::open(&path).unwrap());
        conformance::run(async || log.clone()).await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn the_contract_holds_on_many_threads_and_fresh_logs() {
        let dir = tempfile::tempdir().unwrap();
        let made = std::sync::atomic::AtomicUsize::new(0);
        let make = async || {
            let number = made.fetch_add(1, Ordering::Relaxed);
            let path = dir.path().join(format!("{number}.sqlite"));
            Arc::new(EmbeddedLog::open(&path).unwrap()) as Arc<dyn EventLog>
        };
        conformance::run(make).await;
    }

    #[tokio::test]
    async fn reopening_keeps_everything() {
        let (_dir, path) = place();
        let log = EmbeddedLog::open(&path).unwrap();
        fill(&log, 20).await;
        let (before, stats) = (log.read_all(0, 100).await.unwrap(), log.stats().await.unwrap());
        drop(log);
        let log = EmbeddedLog::open(&path).unwrap();
        assert_eq!(*log.head().borrow(), 20);
        assert_eq!(log.read_all(0, 100).await.unwrap(), before);
        let again = log.append("thing-1", Expected::NoStream, vec![event(1)]).await;
        assert_eq!(again, Ok(Appended { revision: 0, position: 1 }));
        let next = log.append("thing-1", Expected::Revision(9), vec![event(21)]).await;
        assert_eq!(next, Ok(Appended { revision: 10, position: 21 }));
        assert_eq!(log.verify().await.unwrap().events, 21);
        assert_eq!(stats.head_hash, before[19].hash);
    }

    #[tokio::test]
    async fn a_log_whose_process_was_killed_opens_with_all_that_was_acknowledged() {
        let (dir, path) = place();
        let log = EmbeddedLog::open(&path).unwrap();
        fill(&log, 10).await;
        // What a killed process leaves behind: the file and its WAL as they are at this moment.
        let copy = dir.path().join("copy.sqlite");
        for suffix in ["", "-wal"] {
            std::fs::copy(beside(&path, suffix), beside(&copy, suffix)).unwrap();
        }
        let copy = EmbeddedLog::open(&copy).unwrap();
        assert_eq!(copy.verify().await, log.verify().await);
        assert_eq!(copy.verify().await.unwrap().events, 10);
    }

    #[tokio::test]
    async fn a_conflict_in_a_group_spoils_none_of_the_others() {
        let (_dir, path) = place();
        let log = Arc::new(EmbeddedLog::open(&path).unwrap());
        // While a stranger holds the file, appends wait, so that they are committed together.
        let stranger = raw(&path);
        stranger.execute_batch("BEGIN IMMEDIATE").unwrap();
        let mut waiting = Vec::new();
        for number in 1..=20_u128 {
            let log = log.clone();
            waiting.push(tokio::spawn(async move {
                // Of each pair of writers one has to lose.
                let stream = format!("thing-{}", number / 2);
                log.append(&stream, Expected::NoStream, vec![event(number)]).await
            }));
        }
        tokio::task::yield_now().await;
        stranger.execute_batch("ROLLBACK").unwrap();
        let mut won = 0;
        for append in waiting {
            match append.await.unwrap() {
                Ok(_) => won += 1,
                Err(error) => assert!(matches!(error, Error::Conflict { .. }), "{error}"),
            }
        }
        assert_eq!(won, 11);
        assert_eq!(log.verify().await.unwrap().events, 11);
    }

    #[tokio::test]
    async fn every_flipped_byte_is_found_at_its_position() {
        let (_dir, path) = place();
        let log = EmbeddedLog::open(&path).unwrap();
        fill(&log, 20).await;
        let stranger = raw(&path);
        for position in 1..=20_u64 {
            for field in ["id", "hash", "data", "metadata"] {
                let select = format!("SELECT {field} FROM events WHERE position = ?1");
                let update = format!("UPDATE events SET {field} = ?2 WHERE position = ?1");
                let whole: Vec<u8> =
                    stranger.query_row(&select, [to_sql(position)], |r| r.get(0)).unwrap();
                for at in 0..whole.len() {
                    let mut flipped = whole.clone();
                    flipped[at] ^= 1 << (at % 8);
                    stranger.execute(&update, params![to_sql(position), flipped]).unwrap();
                    let found = log.verify().await;
                    assert!(
                        matches!(found, Err(Error::Corrupt { position: p, .. }) if p == position),
                        "{field} of {position}, byte {at}: {found:?}"
                    );
                }
                stranger.execute(&update, params![to_sql(position), whole]).unwrap();
            }
        }
        assert_eq!(log.verify().await.unwrap().events, 20);
    }

    #[tokio::test]
    async fn other_alterations_are_found_at_their_position() {
        let alterations = [
            ("DELETE FROM events WHERE position = 7", 7),
            ("DELETE FROM events WHERE position = 1", 1),
            ("DELETE FROM events WHERE position > 18", 19),
            ("UPDATE events SET time = time + 1 WHERE position = 5", 5),
            ("UPDATE events SET revision = 100 WHERE position = 8", 8),
            ("UPDATE events SET type_id = 3 - type_id WHERE position = 9", 9),
            ("UPDATE events SET stream_id = 77 WHERE position = 10", 10),
            ("UPDATE events SET position = 100 WHERE position = 11", 11),
            ("UPDATE streams SET name = 'thing-x' WHERE name = 'thing-0'", 2),
            ("UPDATE types SET name = 'thing.else.v1' WHERE name = 'thing.happened.v1'", 1),
        ];
        for (sql, bad) in alterations {
            let (_dir, path) = place();
            let log = EmbeddedLog::open(&path).unwrap();
            fill(&log, 20).await;
            log.read_all(0, 100).await.unwrap();
            raw(&path).execute_batch(sql).unwrap();
            let found = log.verify().await;
            assert!(
                matches!(found, Err(Error::Corrupt { position, .. }) if position == bad),
                "{sql}: {found:?}"
            );
        }
    }

    #[tokio::test]
    async fn a_damaged_page_of_the_file_is_found() {
        let (_dir, path) = place();
        let log = EmbeddedLog::open(&path).unwrap();
        fill(&log, 200).await;
        drop(log);
        let mut bytes = std::fs::read(&path).unwrap();
        let last_page = bytes.len() - 8192;
        bytes[last_page..last_page + 64].fill(0xff);
        std::fs::write(&path, bytes).unwrap();
        let log = EmbeddedLog::open_read_only(&path);
        let found = match log {
            Ok(log) => log.verify().await.map(|_| ()),
            Err(error) => Err(error),
        };
        assert!(matches!(found, Err(Error::Corrupt { .. })), "{found:?}");
    }

    #[test]
    fn a_foreign_file_is_refused_and_left_unchanged() {
        let (dir, path) = place();
        let database = dir.path().join("other.sqlite");
        raw(&database).execute_batch("CREATE TABLE t (x); PRAGMA journal_mode = wal").unwrap();
        let database = std::fs::read(&database).unwrap();
        for content in [b"".to_vec(), b"hello".to_vec(), vec![0; 4096], database] {
            std::fs::write(&path, &content).unwrap();
            for opened in [EmbeddedLog::open(&path), EmbeddedLog::open_read_only(&path)] {
                assert!(matches!(refused(opened), Error::Foreign(_)));
            }
            assert_eq!(std::fs::read(&path).unwrap(), content);
            assert!(!beside(&path, "-wal").exists());
        }
    }

    #[tokio::test]
    async fn a_newer_version_is_refused_and_left_unchanged() {
        let (_dir, path) = place();
        fill(&EmbeddedLog::open(&path).unwrap(), 1).await;
        let newer = VERSION + 1;
        raw(&path).pragma_update(None, "user_version", newer).unwrap();
        let before = std::fs::read(&path).unwrap();
        let error = refused(EmbeddedLog::open(&path));
        assert!(matches!(error, Error::Foreign(_)));
        assert!(error.to_string().contains(&format!("version {newer}")), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), before);
    }

    #[test]
    fn a_wal_without_its_log_is_not_replayed_into_a_new_one() {
        let (_dir, path) = place();
        std::fs::write(beside(&path, "-wal"), b"left over").unwrap();
        assert!(matches!(refused(EmbeddedLog::open(&path)), Error::Foreign(_)));
        assert!(!path.exists());
    }

    #[test]
    fn a_second_writer_is_refused_until_the_first_has_ended() {
        let (_dir, path) = place();
        let first = EmbeddedLog::open(&path).unwrap();
        assert!(matches!(refused(EmbeddedLog::open(&path)), Error::Unwritable(_)));
        drop(first);
        EmbeddedLog::open(&path).unwrap();
    }

    #[tokio::test]
    async fn a_reader_beside_the_writer_follows_it_and_cannot_write() {
        let (_dir, path) = place();
        assert!(matches!(refused(EmbeddedLog::open_read_only(&path)), Error::Storage(_)));
        let writer = EmbeddedLog::open(&path).unwrap();
        fill(&writer, 3).await;
        let reader = EmbeddedLog::open_read_only(&path).unwrap();
        let mut head = reader.head();
        assert_eq!(*head.borrow_and_update(), 3);
        // The first three are repeats.
        fill(&writer, 5).await;
        assert_eq!(reader.read_all(0, 100).await, writer.read_all(0, 100).await);
        assert_eq!(*reader.head().borrow(), 5, "reading on moves the head");
        writer.append("late", Expected::Any, vec![event(99)]).await.unwrap();
        let moved = head.wait_for(|position| *position == 6);
        tokio::time::timeout(Duration::from_secs(10), moved).await.unwrap().unwrap();
        assert_eq!(reader.verify().await, writer.verify().await);
        let answer = reader.append("thing-1", Expected::Any, vec![event(100)]).await;
        assert!(matches!(answer, Err(Error::Unwritable(_))));
        assert!(matches!(reader.writable(), Err(Error::Unwritable(_))));
        drop(writer);
        assert_eq!(reader.read_all(5, 10).await.unwrap().len(), 1);
    }

    #[tokio::test]
    async fn after_a_failed_commit_the_writer_stops_and_reads_go_on() {
        // The first fails in COMMIT itself, the second in the middle of a group.
        let faults = [
            "CREATE TABLE parent (id INTEGER PRIMARY KEY);
             CREATE TABLE child (p REFERENCES parent (id) DEFERRABLE INITIALLY DEFERRED);
             CREATE TRIGGER fault AFTER INSERT ON events WHEN new.position = 4
             BEGIN INSERT INTO child VALUES (99); END",
            "CREATE TRIGGER fault AFTER INSERT ON events WHEN new.position = 4
             BEGIN SELECT RAISE(FAIL, 'no more'); END",
        ];
        for fault in faults {
            let (_dir, path) = place();
            let log = EmbeddedLog::open(&path).unwrap();
            fill(&log, 3).await;
            raw(&path).execute_batch(fault).unwrap();
            let failed = log.append("thing-1", Expected::Any, vec![event(4), event(5)]).await;
            assert!(matches!(failed, Err(Error::Unwritable(_))), "{failed:?}");
            raw(&path).execute_batch("DROP TRIGGER fault").unwrap();
            let later = log.append("thing-1", Expected::Any, vec![event(6)]).await;
            assert!(matches!(later, Err(Error::Unwritable(_))), "no retry: {later:?}");
            assert_eq!(log.writable(), Err(later.unwrap_err()));
            assert_eq!(*log.head().borrow(), 3);
            assert_eq!(log.read_all(0, 100).await.unwrap().len(), 3);
            drop(log);
            let log = EmbeddedLog::open(&path).unwrap();
            let retried = log.append("thing-1", Expected::Any, vec![event(4), event(5)]).await;
            assert_eq!(retried, Ok(Appended { revision: 3, position: 5 }));
            assert_eq!(log.verify().await.unwrap().events, 5);
        }
    }

    #[tokio::test]
    async fn what_is_queued_is_written_before_the_log_closes() {
        let (_dir, path) = place();
        let log = Arc::new(EmbeddedLog::open(&path).unwrap());
        let stranger = raw(&path);
        stranger.execute_batch("BEGIN IMMEDIATE").unwrap();
        let waiting: Vec<_> = (1..=50_u128)
            .map(|number| {
                let log = log.clone();
                tokio::spawn(async move {
                    log.append("thing-1", Expected::Any, vec![event(number)]).await
                })
            })
            .collect();
        tokio::task::yield_now().await;
        // Nobody waits for the answers any more; the appends are on their way all the same.
        for append in waiting {
            append.abort();
            assert!(append.await.unwrap_err().is_cancelled());
        }
        stranger.execute_batch("ROLLBACK").unwrap();
        drop(log);
        let log = EmbeddedLog::open(&path).unwrap();
        assert_eq!(log.read_all(0, 100).await.unwrap().len(), 50);
    }

    #[tokio::test]
    async fn more_streams_than_are_remembered_keep_their_revisions() {
        let (_dir, path) = place();
        let mut writer = Writer::open_new(&path);
        let end = writer.find_stream("thing-1").unwrap();
        assert!(end.is_none());
        let append = |number| Append {
            stream: "thing-1".into(),
            expected: Expected::Any,
            events: vec![event(number)],
            reply: oneshot::channel().0,
        };
        for number in 1..=3 {
            writer.streams.clear();
            let answers = writer.commit(&[append(number)]).unwrap();
            let revision = u64::try_from(number).unwrap() - 1;
            assert_eq!(answers, [Ok(Appended { revision, position: revision + 1 })]);
        }
        for number in 0..KNOWN_STREAMS {
            writer.remember(&format!("other-{number}"), StreamEnd { id: 0, last: 0 });
        }
        assert!(writer.streams.len() <= KNOWN_STREAMS);
    }

    impl Writer {
        fn open_new(path: &Path) -> Self {
            create(path).unwrap();
            Self::open(path).unwrap()
        }
    }
}
