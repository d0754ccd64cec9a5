//! Reading: pages of events, what is in the log as a whole, and whether the chain holds.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use chrono::{DateTime, Utc};
use rusqlite::{Connection, OpenFlags, OptionalExtension, Params, Row, params};
use tokio::sync::Semaphore;
use uuid::Uuid;

use super::file::{beside, connect};
use super::writer::leave_wal_alone;
use super::{Error, KNOWN_STREAMS, bad, from_sql, guard, to_sql};
use crate::log::{GENESIS, Link, Recorded, Stats, Verified};

const COLUMNS: &str = "position, stream_id, revision, type_id, id, time, hash, data, metadata";

/// Events a verification reads in one transaction, so that it holds up no checkpoint for long.
const VERIFY_PAGE: i64 = 2000;

/// Connections for reading. Reads go to tokio's blocking threads, always: even a small one may
/// have to wait for a disk, and an actor's runtime has only the one thread.
pub(super) struct Readers {
    pub(super) path: PathBuf,
    pub(super) idle: Mutex<Vec<Reader>>,
    pub(super) permits: Arc<Semaphore>,
}

impl Readers {
    pub(super) async fn run<T: Send + 'static>(
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

pub(super) struct Reader {
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
    pub(super) fn open(path: &Path) -> Result<Self, Error> {
        let conn = connect(path, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
        conn.pragma_update(None, "cache_size", -16_384)?;
        // Virtual, not resident: as much as SQLite lets one map.
        conn.pragma_update(None, "mmap_size", 0x7fff_0000)?;
        leave_wal_alone(&conn);
        Ok(Self { conn, names: Names::default() })
    }

    pub(super) fn head(&self) -> Result<u64, Error> {
        let mut statement = self.conn.prepare_cached("SELECT max(position) FROM events")?;
        let head: Option<i64> = statement.query_row([], |row| row.get(0))?;
        Ok(head.map_or(0, from_sql))
    }

    pub(super) fn hash_at(&self, position: u64) -> Result<[u8; 32], Error> {
        if position == 0 {
            return Ok(GENESIS);
        }
        let mut statement =
            self.conn.prepare_cached("SELECT hash FROM events WHERE position = ?1")?;
        let hash: Vec<u8> = statement.query_row([to_sql(position)], |row| row.get(0))?;
        hash.try_into().map_err(|_| bad(position, "its hash has not 32 bytes"))
    }

    pub(super) fn page(&mut self, after: u64, limit: usize) -> Result<Vec<Recorded>, Error> {
        let sql =
            format!("SELECT {COLUMNS} FROM events WHERE position > ?1 ORDER BY position LIMIT ?2");
        self.collect(&sql, params![to_sql(after), to_sql(limit as u64)])
    }

    pub(super) fn stream_page(
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
pub(super) struct Tally {
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

pub(super) fn stats(
    reader: &mut Reader,
    tally: &Mutex<Tally>,
    path: &Path,
) -> Result<Stats, Error> {
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
pub(super) fn verify(reader: &mut Reader, head: u64) -> Result<Verified, Error> {
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
