//! The one writer, which commits whatever waits as a group, and the checkpointer beside it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc as std_mpsc;
use std::time::{Duration, Instant};

use bytestring::ByteString;
use chrono::SubsecRound;
use metrics::histogram;
use rusqlite::config::DbConfig;
use rusqlite::hooks::Wal;
use rusqlite::{Connection, OptionalExtension, params};
use tokio::sync::{mpsc, oneshot};

use super::file::connect_durably;
use super::reader::Reader;
use super::room::is_want_of_room;
use super::{Error, KNOWN_STREAMS, Shared};
use crate::log::{
    Appended, Expected, Link, NewEvent, REPEAT_WINDOW, Recorded, bad, check_recorded, from_sql,
    to_sql,
};
use crate::telemetry;

/// Bounds of one commit.
const GROUP_APPENDS: usize = 1024;
const GROUP_BYTES: usize = 8 << 20;
/// A commit that took longer says more of the disk's mood than of the next commit.
const LONGEST_COMMIT: Duration = Duration::from_millis(4);
/// Pages written to the WAL between two checkpoints of the checkpointer.
const CHECKPOINT_PAGES: usize = 4000;
/// A WAL longer than this is checkpointed by the writer, between two commits: under unbroken load
/// the checkpointer never reaches its end, and only then does SQLite start it from the front again.
const LONG_WAL_PAGES: i64 = 16_000;

pub(super) struct Append {
    pub(super) stream: ByteString,
    pub(super) expected: Expected,
    pub(super) events: Vec<NewEvent>,
    pub(super) reply: oneshot::Sender<Result<Appended, Error>>,
}

impl Append {
    fn bytes(&self) -> usize {
        self.events.iter().map(|e| e.data.len() + e.metadata.len()).sum()
    }

    fn conflict(&self, actual: Option<u64>) -> Error {
        Error::Conflict { stream: self.stream.to_string(), expected: self.expected, actual }
    }
}

#[derive(Clone, Copy)]
pub(super) struct StreamEnd {
    pub(super) id: i64,
    /// The last event's revision.
    pub(super) last: u64,
}

/// Owns the writing connection. What it keeps in memory runs ahead of the commit; that is sound
/// because after a failed commit it never writes again, or forgets all of it first.
pub(super) struct Writer {
    pub(super) shared: Arc<Shared>,
    pub(super) path: PathBuf,
    pub(super) conn: Connection,
    position: u64,
    hash: [u8; 32],
    /// What the present transaction has inserted.
    fresh: Vec<Recorded>,
    pub(super) streams: HashMap<ByteString, StreamEnd>,
    types: HashMap<ByteString, i64>,
    /// In the WAL after the last commit, and when the checkpointer was last woken.
    wal_pages: Arc<AtomicUsize>,
    woken_at: usize,
}

impl Writer {
    pub(super) fn open(path: &Path) -> Result<Self, Error> {
        let mut conn = connect_durably(path)?;
        let wal_pages = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&wal_pages);
        conn.wal_hook(Some(move |_: &mut Wal, pages| {
            counter.store(usize::try_from(pages).unwrap_or_default(), Ordering::Relaxed);
            Ok(())
        }))?;
        conn.pragma_update(None, "cache_size", -65_536)?;
        conn.pragma_update(None, "journal_size_limit", 256 * 1024 * 1024)?;
        let reader = Reader::open(path)?;
        let position = reader.head()?;
        Ok(Self {
            shared: Arc::new(Shared::new(position)),
            path: path.to_owned(),
            conn,
            position,
            hash: reader.hash_at(position)?,
            fresh: Vec::new(),
            streams: HashMap::new(),
            types: HashMap::new(),
            wal_pages,
            woken_at: 0,
        })
    }

    pub(super) fn run(
        mut self,
        mut appends: mpsc::Receiver<Append>,
        wake: &std_mpsc::SyncSender<()>,
    ) {
        let mut last = Pace::default();
        while let Some(first) = appends.blocking_recv() {
            let group = gather(first, &mut appends, &last);
            let (began, size) = (Instant::now(), group.len());
            let events: usize = group.iter().map(|append| append.events.len()).sum();
            if self.shared.stopped.get().is_some() || !self.commit_and_answer(group) {
                break;
            }
            if self.shared.is_full() {
                self.wait_for_room(&mut appends);
                continue;
            }
            last = Pace { size, took: began.elapsed() };
            histogram!(telemetry::COMMIT_EVENTS).record(events as f64);
            histogram!(telemetry::COMMIT_DURATION).record(last.took);
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
    fn commit_and_answer(&mut self, mut group: Vec<Append>) -> bool {
        match self.commit(&mut group) {
            Ok(answers) => {
                self.shared.tail.extend(self.fresh.drain(..));
                self.shared.advance(self.position);
                for (append, answer) in group.into_iter().zip(answers) {
                    // Whoever gave up waiting finds the outcome by repeating the append.
                    let _ = append.reply.send(answer);
                }
                true
            }
            Err(error) => {
                if !self.conn.is_autocommit() {
                    let _ = self.conn.execute_batch("ROLLBACK");
                }
                let may_go_on = is_want_of_room(&error) && self.conn.is_autocommit();
                if may_go_on {
                    self.shared.set_full(true);
                } else {
                    self.shared.stop("a write", &error);
                }
                for append in group {
                    let _ = append.reply.send(Err(self.shared.unwritable()));
                }
                may_go_on
            }
        }
    }

    /// The whole group in one transaction. An append that conflicts is refused before it has
    /// written anything, so that it spoils none of the others.
    pub(super) fn commit(
        &mut self,
        group: &mut [Append],
    ) -> rusqlite::Result<Vec<Result<Appended, Error>>> {
        self.conn.prepare_cached("BEGIN IMMEDIATE")?.execute([])?;
        let answers =
            group.iter_mut().map(|append| self.place(append)).collect::<Result<_, _>>()?;
        self.conn.prepare_cached("COMMIT")?.execute([])?;
        Ok(answers)
    }

    fn place(&mut self, append: &mut Append) -> rusqlite::Result<Result<Appended, Error>> {
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

    pub(super) fn find_stream(&mut self, name: &str) -> rusqlite::Result<Option<StreamEnd>> {
        if let Some(end) = self.streams.get(name) {
            return Ok(Some(*end));
        }
        let Some(id) = find_name(&self.conn, "streams", name)? else { return Ok(None) };
        let last: i64 = self
            .conn
            .prepare_cached("SELECT max(revision) FROM events WHERE stream_id = ?1")?
            .query_row([id], |row| row.get(0))?;
        Ok(Some(self.remember(&name.into(), StreamEnd { id, last: from_sql(last) })))
    }

    pub(super) fn remember(&mut self, name: &ByteString, end: StreamEnd) -> StreamEnd {
        if let Some(known) = self.streams.get_mut(name) {
            *known = end;
            return end;
        }
        if self.streams.len() >= KNOWN_STREAMS {
            self.streams.clear();
        }
        self.streams.insert(name.clone(), end);
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

    /// Takes the events out of `append`: they go on to the followers.
    fn insert(
        &mut self,
        stream: i64,
        first: u64,
        append: &mut Append,
    ) -> rusqlite::Result<Appended> {
        let mut revision = first;
        for (event, at) in std::mem::take(&mut append.events).into_iter().zip(first..) {
            revision = at;
            let (kind, kind_id) = self.find_type(&event.kind)?;
            let mut recorded = Recorded {
                id: event.id,
                stream: append.stream.clone(),
                revision,
                position: self.position + 1,
                kind,
                // As a reader of the file sees it.
                time: event.time.trunc_subsecs(6),
                data: event.data.into(),
                metadata: event.metadata.into(),
                hash: [0; 32],
            };
            recorded.hash = Link::of(&recorded).hash(&self.hash);
            self.write(&recorded, stream, kind_id)?;
            self.fresh.push(recorded);
        }
        self.remember(&append.stream, StreamEnd { id: stream, last: revision });
        Ok(Appended { revision, position: self.position })
    }

    /// Moves the end to this event.
    fn write(&mut self, event: &Recorded, stream: i64, kind: i64) -> rusqlite::Result<()> {
        self.conn
            .prepare_cached("INSERT INTO events VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)")?
            .execute(params![
                to_sql(event.position),
                stream,
                to_sql(event.revision),
                kind,
                event.id.as_bytes(),
                event.time.timestamp_micros(),
                event.hash,
                &*event.data,
                &*event.metadata,
            ])?;
        (self.position, self.hash) = (event.position, event.hash);
        Ok(())
    }

    /// Forgets what a transaction that came to nothing left in memory.
    pub(super) fn start_from(&mut self, position: u64, hash: [u8; 32]) {
        (self.position, self.hash) = (position, hash);
        self.fresh.clear();
        self.streams.clear();
        self.types.clear();
    }

    pub(super) fn into_connection(self) -> Connection {
        self.conn
    }

    /// The last position and its hash.
    pub(super) fn end(&self) -> (u64, [u8; 32]) {
        (self.position, self.hash)
    }

    /// Writes what another log holds right after this one's end, as it is. The caller has begun a
    /// transaction, and rolls it back after an error.
    pub(super) fn take(&mut self, event: &Recorded) -> Result<(), Error> {
        let next = self.position + 1;
        if event.position != next {
            return Err(bad(next, "the event is missing"));
        }
        check_recorded(event)?;
        if event.hash != Link::of(event).hash(&self.hash) {
            return Err(bad(next, "the event and its hash do not belong together"));
        }
        let end = self.find_stream(&event.stream)?;
        if event.revision != end.map_or(0, |end| end.last + 1) {
            return Err(bad(next, "its revision does not follow its stream's last one"));
        }
        let stream = match end {
            Some(end) => end.id,
            None => intern(&self.conn, "streams", &event.stream)?,
        };
        let (_, kind) = self.find_type(&event.kind)?;
        self.write(event, stream, kind)?;
        // Copied: else the page that the event was read in would stay for its name.
        let name = ByteString::from(&*event.stream);
        self.remember(&name, StreamEnd { id: stream, last: event.revision });
        Ok(())
    }

    fn find_type(&mut self, name: &str) -> rusqlite::Result<(ByteString, i64)> {
        if let Some((name, id)) = self.types.get_key_value(name) {
            return Ok((name.clone(), *id));
        }
        let id = match find_name(&self.conn, "types", name)? {
            Some(id) => id,
            None => intern(&self.conn, "types", name)?,
        };
        if self.types.len() >= KNOWN_STREAMS {
            self.types.clear();
        }
        let name: ByteString = name.into();
        self.types.insert(name.clone(), id);
        Ok((name, id))
    }

    fn checkpoint_if_due(&mut self, wake: &std_mpsc::SyncSender<()>) {
        if self.shared.wal_is_long.swap(false, Ordering::Relaxed)
            && let Err(error) = checkpoint(&self.conn)
        {
            checkpoint_failed(&self.shared, &error);
        }
        let pages = self.wal_pages.load(Ordering::Relaxed);
        if pages < self.woken_at {
            // It was written back whole and begun anew.
            self.woken_at = 0;
        }
        if pages - self.woken_at >= CHECKPOINT_PAGES {
            self.woken_at = pages;
            // Full: it is awake already.
            let _ = wake.try_send(());
        }
    }
}

/// How the last commit went.
#[derive(Default)]
struct Pace {
    size: usize,
    took: Duration,
}

/// Whatever waits, up to the bounds of a commit. The callers that the last commit answered may be
/// about to come again; going without them would make them wait for a whole commit, so that a part
/// of one is spent on waiting for as many. A caller alone never waits.
fn gather(first: Append, appends: &mut mpsc::Receiver<Append>, last: &Pace) -> Vec<Append> {
    let deadline = Instant::now() + last.took.min(LONGEST_COMMIT) / 4;
    let mut bytes = first.bytes();
    let mut group = vec![first];
    while group.len() < GROUP_APPENDS && bytes < GROUP_BYTES {
        match appends.try_recv() {
            Ok(append) => {
                bytes += append.bytes();
                group.push(append);
            }
            Err(_) if group.len() < last.size && Instant::now() < deadline => {
                std::thread::yield_now();
            }
            Err(_) => break,
        }
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
pub(super) struct Checkpointer {
    shared: Arc<Shared>,
    conn: Connection,
}

impl Checkpointer {
    pub(super) fn open(path: &Path, shared: Arc<Shared>) -> Result<Self, Error> {
        Ok(Self { shared, conn: connect_durably(path)? })
    }

    pub(super) fn run(self, woken: &std_mpsc::Receiver<()>) {
        while woken.recv().is_ok() && self.shared.stopped.get().is_none() {
            match checkpoint(&self.conn) {
                Ok(pages) if pages > LONG_WAL_PAGES => {
                    self.shared.wal_is_long.store(true, Ordering::Relaxed);
                }
                Ok(_) => {}
                Err(error) => checkpoint_failed(&self.shared, &error),
            }
        }
        if self.shared.stopped.get().is_some() {
            leave_wal_alone(&self.conn);
        }
    }
}

/// For want of room the WAL just stays as long as it is, whole. After a failed sync of the file there
/// is no second try, as with a commit.
fn checkpoint_failed(shared: &Shared, error: &rusqlite::Error) {
    if is_want_of_room(error) {
        tracing::warn!(%error, "the log's WAL cannot be written back yet");
    } else {
        shared.stop("a checkpoint", error);
    }
}

/// Answers how many pages are in the WAL. It never waits for readers or the writer.
pub(super) fn checkpoint(conn: &Connection) -> rusqlite::Result<i64> {
    conn.prepare_cached("PRAGMA wal_checkpoint(PASSIVE)")?.query_row([], |row| row.get(1))
}

/// After a failure closing must not write either; the next opening recovers from the WAL.
pub(super) fn leave_wal_alone(conn: &Connection) {
    if let Err(error) = conn.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true) {
        tracing::error!(%error, "the log's WAL may be written back on closing");
    }
}

#[cfg(test)]
#[path = "writer_tests.rs"]
mod tests;
