//! Reading: pages of events, what is in the log as a whole, and whether the chain holds.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Mutex;

use bytes::Bytes;
use bytestring::ByteString;
use chrono::{DateTime, Utc};
use rusqlite::types::ValueRef;
use rusqlite::{Connection, OpenFlags, Params, Row, params};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::Error;
use super::file::{beside, connect};
use super::writer::leave_wal_alone;
use crate::log::{Encoded, GENESIS, Link, Recorded, Stats, bad, from_sql, guard, to_sql};

pub(super) const COLUMNS: &str =
    "position, stream_id, revision, type_id, id, time, hash, data, metadata";

/// Names of streams that a reader keeps in memory, and of types.
const KNOWN_STREAMS: usize = 16_384;
const KNOWN_TYPES: usize = 256;
/// The most names that are read at a time.
const AHEAD: i64 = 64;

pub(super) struct Reader {
    pub(super) conn: Connection,
    pub(super) names: Names,
    /// Bytes that the last page took.
    page_size: usize,
}

/// What streams and types are called, as far as this connection has met them lately.
#[derive(Default)]
pub(super) struct Names {
    streams: Known<KNOWN_STREAMS>,
    types: Known<KNOWN_TYPES>,
}

/// Names by their numbers: one for each remainder of a number, for names in use at the same time have
/// numbers near each other. This is asked twice for every event.
struct Known<const MOST: usize> {
    names: Vec<Option<(i64, Box<str>)>>,
    /// How many were asked for the last time, and the number after them. Whoever walks the log meets
    /// most names for the first time in the order of their numbers, so that the more are read the
    /// longer that has been so.
    ahead: i64,
    next: i64,
    /// The number after the last one from before those.
    behind: i64,
}

impl<const MOST: usize> Default for Known<MOST> {
    fn default() -> Self {
        Self { names: vec![None; MOST], ahead: 1, next: 0, behind: 0 }
    }
}

impl Reader {
    pub(super) fn open(path: &Path) -> Result<Self, Error> {
        let conn = connect(path, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
        conn.pragma_update(None, "cache_size", -16_384)?;
        // Virtual, not resident: as much as SQLite lets one map.
        conn.pragma_update(None, "mmap_size", 0x7fff_0000)?;
        leave_wal_alone(&conn);
        Ok(Self { conn, names: Names::default(), page_size: 0 })
    }

    pub(super) fn head(&self) -> Result<u64, Error> {
        head(&self.conn)
    }

    pub(super) fn hash_at(&self, position: u64) -> Result<[u8; 32], Error> {
        hash_at(&self.conn, position)
    }

    /// This engine leaves no gaps, so that a missing position is damage.
    pub(super) fn page(&mut self, after: u64, limit: usize) -> Result<Vec<Recorded>, Error> {
        let sql =
            format!("SELECT {COLUMNS} FROM events WHERE position > ?1 ORDER BY position LIMIT ?2");
        let events = self.collect(&sql, params![to_sql(after), to_sql(limit as u64)])?;
        let expected = (1..).map(|nth| after.saturating_add(nth));
        match events.iter().zip(expected).find(|(event, expected)| event.position != *expected) {
            Some((_, missing)) => Err(bad(missing, "the event is missing")),
            None => Ok(events),
        }
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
        let events = self.collect(&sql, params![stream, to_sql(from), to_sql(limit as u64)])?;
        let expected = (0..).map(|nth| from.saturating_add(nth));
        let astray =
            |event: &Recorded, revision| event.revision != revision || *event.stream != *stream;
        match events.iter().zip(expected).find(|(event, expected)| astray(event, *expected)) {
            Some((event, _)) => Err(bad(event.position, "an event before it is missing")),
            None => Ok(events),
        }
    }

    /// Each event is held against its hash: nobody is given one that was altered. What is hashed of
    /// it lies in one piece of memory for the whole page, and the event is made of slices of that.
    fn collect(&mut self, sql: &str, params: impl Params) -> Result<Vec<Recorded>, Error> {
        let mut statement = self.conn.prepare_cached(sql)?;
        let mut rows = statement.query(params)?;
        let mut page = Vec::with_capacity(self.page_size + self.page_size / 8);
        let (mut events, mut places): (Vec<Recorded>, Vec<Encoded>) = (Vec::new(), Vec::new());
        while let Some(row) = rows.next()? {
            let row = decode(|at| row.get_ref(at), &self.conn, &mut self.names)?;
            let previous = match events.last() {
                Some(last) if last.position + 1 == row.position => last.hash,
                _ => hash_at(&self.conn, row.position - 1)?,
            };
            let start = page.len();
            places.push(row.link().encode(&previous, &mut page));
            if Sha256::digest(&page[start..])[..] != row.hash {
                return Err(bad(row.position, "the event and its hash do not belong together"));
            }
            events.push(row.without_bytes());
        }
        self.page_size = page.len();
        if page.capacity() / 2 > page.len() {
            page.shrink_to_fit();
        }
        let page = Bytes::from(page);
        for (event, Encoded { stream, kind, data, metadata }) in events.iter_mut().zip(places) {
            event.stream = text(page.slice(stream), event.position)?;
            event.kind = text(page.slice(kind), event.position)?;
            event.data = page.slice(data);
            event.metadata = page.slice(metadata);
        }
        Ok(events)
    }
}

pub(super) fn head(conn: &Connection) -> Result<u64, Error> {
    let mut statement = conn.prepare_cached("SELECT max(position) FROM events")?;
    let head: Option<i64> = statement.query_row([], |row| row.get(0))?;
    Ok(head.map_or(0, from_sql))
}

pub(super) fn hash_at(conn: &Connection, position: u64) -> Result<[u8; 32], Error> {
    if position == 0 {
        return Ok(GENESIS);
    }
    let mut statement = conn.prepare_cached("SELECT hash FROM events WHERE position = ?1")?;
    let mut rows = statement.query([to_sql(position)])?;
    let row = rows.next()?.ok_or_else(|| bad(position, "the event is missing"))?;
    hash_of(row.get_ref(0)?.as_blob().unwrap_or_default(), position)
}

fn text(bytes: Bytes, position: u64) -> Result<ByteString, Error> {
    bytes.try_into().map_err(|_| bad(position, "its name is not a text"))
}

fn hash_of(bytes: &[u8], position: u64) -> Result<[u8; 32], Error> {
    bytes.try_into().map_err(|_| bad(position, "its hash has not 32 bytes"))
}

/// A row of [`COLUMNS`], whose bytes are SQLite's until it moves on.
pub(super) struct Decoded<'row> {
    pub(super) position: u64,
    pub(super) stream: &'row str,
    /// The number of its name.
    pub(super) stream_id: i64,
    pub(super) revision: u64,
    kind: &'row str,
    id: Uuid,
    time: DateTime<Utc>,
    pub(super) hash: [u8; 32],
    data: &'row [u8],
    metadata: &'row [u8],
}

impl Decoded<'_> {
    pub(super) fn link(&self) -> Link<'_> {
        Link {
            position: self.position,
            stream: self.stream,
            revision: self.revision,
            kind: self.kind,
            id: self.id,
            time: self.time,
            data: self.data,
            metadata: self.metadata,
        }
    }

    fn without_bytes(&self) -> Recorded {
        Recorded {
            id: self.id,
            stream: ByteString::new(),
            revision: self.revision,
            position: self.position,
            kind: ByteString::new(),
            time: self.time,
            data: Bytes::new(),
            metadata: Bytes::new(),
            hash: self.hash,
        }
    }
}

/// A field that is not of its column's kind is damage at that position.
pub(super) fn decode<'row>(
    column: impl Fn(usize) -> rusqlite::Result<ValueRef<'row>>,
    conn: &Connection,
    names: &'row mut Names,
) -> Result<Decoded<'row>, Error> {
    let position = match column(0)?.as_i64() {
        Ok(position @ 1..) => from_sql(position),
        Ok(_) | Err(_) => return Err(bad(1, "an event stands before the first position")),
    };
    let number = |at| -> Result<i64, Error> {
        column(at)?.as_i64().map_err(|_| bad(position, "a field is not a number"))
    };
    let blob = |at| -> Result<&'row [u8], Error> {
        column(at)?.as_blob().map_err(|_| bad(position, "a field is not bytes"))
    };
    let (stream_id, revision) = (number(1)?, number(2)?);
    let Names { streams, types } = names;
    Ok(Decoded {
        position,
        stream: streams.name(conn, "streams", stream_id, position)?,
        stream_id,
        revision: u64::try_from(revision).map_err(|_| bad(position, "its revision is negative"))?,
        kind: types.name(conn, "types", number(3)?, position)?,
        id: Uuid::from_slice(blob(4)?).map_err(|_| bad(position, "its id has not 16 bytes"))?,
        time: DateTime::from_timestamp_micros(number(5)?)
            .ok_or_else(|| bad(position, "its time is out of range"))?,
        hash: hash_of(blob(6)?, position)?,
        data: blob(7)?,
        metadata: blob(8)?,
    })
}

impl<const MOST: usize> Known<MOST> {
    /// What number `id` of a table is called, which the event at `position` asks for.
    fn name(
        &mut self,
        conn: &Connection,
        table: &str,
        id: i64,
        position: u64,
    ) -> Result<&str, Error> {
        if !matches!(self.place(id), Some((known, _)) if *known == id) {
            self.read(conn, table, id, position)?;
        }
        Ok(self.place(id).as_ref().map_or("", |(_, name)| name))
    }

    fn read(
        &mut self,
        conn: &Connection,
        table: &str,
        id: i64,
        position: u64,
    ) -> Result<(), Error> {
        let limit = match id.checked_sub(self.next) {
            Some(0..AHEAD) => AHEAD.min(self.ahead * 2),
            _ => 1,
        };
        let mut statement = conn.prepare_cached(&format!(
            "SELECT id, name FROM {table} WHERE id >= ?1 ORDER BY id LIMIT ?2"
        ))?;
        let mut rows = statement.query([id, limit])?;
        let row = rows.next()?.filter(|row| is_number(row, id));
        let row =
            row.ok_or_else(|| bad(position, &format!("its name is not among the {table}")))?;
        let name = row.get_ref(1)?.as_str();
        self.keep(id, name.map_err(|_| bad(position, "its name is not a text"))?);
        if id < self.next {
            // One from before does not break the order; a second one near it begins another walk.
            let walks = id.checked_sub(self.behind).is_some_and(|step| (0..AHEAD).contains(&step));
            self.behind = id.saturating_add(1);
            if !walks {
                return Ok(());
            }
        }
        (self.ahead, self.next) = (limit, id.saturating_add(1));
        // Nobody has asked for these yet: what is wrong with one is told to whoever does.
        while let Ok(Some(row)) = rows.next()
            && is_number(row, self.next)
            && let Ok(name) = row.get_ref(1)?.as_str()
        {
            self.keep(self.next, name);
            self.next = self.next.saturating_add(1);
        }
        Ok(())
    }

    fn keep(&mut self, id: i64, name: &str) {
        *self.place(id) = Some((id, name.into()));
    }

    fn place(&mut self, id: i64) -> &mut Option<(i64, Box<str>)> {
        &mut self.names[id.cast_unsigned() as usize % MOST]
    }
}

fn is_number(row: &Row, id: i64) -> bool {
    row.get_ref(0).is_ok_and(|number| number.as_i64() == Ok(id))
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
        let name = reader.names.types.name(&reader.conn, "types", *id, position)?;
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

#[cfg(test)]
#[path = "reader_tests.rs"]
mod tests;
