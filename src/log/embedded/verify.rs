//! Whether the log is what was written: the chain, event by event, then what the chain says nothing
//! of: the tables' form and the indices that streams and names are found by.
//!
//! The chain is walked in segments, on several threads, and the structure is checked beside them. A
//! link is judged by the hash that its predecessor claims, which is judged itself one link before, so
//! that no segment waits for another.

use std::path::Path;
use std::sync::Mutex;
use std::thread::{Scope, ScopedJoinHandle};

use rusqlite::functions::Context;
use rusqlite::{Connection, params};
use sha2::{Digest, Sha256};

use super::Error;
use super::file::statements;
use super::given::{Given, Receiver};
use super::reader::{COLUMNS, Reader, decode, hash_at, head};
use crate::log::{GENESIS, Verified, bad, from_sql, guard, to_sql};

/// Events that a thread takes at once; of those that came since the beginning all.
const SEGMENT: u64 = if cfg!(test) { 7 } else { 16_384 };
/// Events read in one transaction, so that a verification holds up no checkpoint for long.
const PAGE: u64 = if cfg!(test) { 3 } else { 2048 };
/// Threads that walk at the most.
const WALKERS: usize = 8;

/// Walk the chain after `after` to its end, which must not be before `head`. This engine leaves no
/// gaps, so that a missing position is damage. `progress` is told how far one alone would have come.
pub(super) fn verify(
    path: &Path,
    after: u64,
    head: u64,
    progress: &mut (dyn FnMut(u64) + Send),
) -> Result<Verified, Error> {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let beside = Reader::open(path)?.conn;
    check_schema(&beside)?;
    let segments = Segments {
        after,
        head,
        ahead: Mutex::new(Ahead { next: Some(after), walked: after, progress }),
    };
    let walkers: Vec<_> = (0..processors.min(WALKERS))
        .map(|_| Walker::new(path, &segments))
        .collect::<Result<_, Error>>()?;
    std::thread::scope(|scope| {
        let walkers: Vec<_> = walkers
            .into_iter()
            .map(|walker| spawn(scope, || walker.run()))
            .collect::<Result<_, Error>>()
            .inspect_err(|_| segments.stop())?;
        let structure = match after {
            0 => Some(spawn(scope, move || check_structure(beside, head))?),
            _ => None,
        };
        let lost = |error| Err(Fault { after, error });
        let walked = walkers.into_iter().map(|walker| outcome(walker).unwrap_or_else(lost));
        let walked = walked.reduce(Walked::both).unwrap_or_else(|| Ok(Walked::default()));
        let Walked { rows, end } = walked.map_err(|fault| fault.error)?;
        match structure.map(|structure| outcome(structure)?).transpose()? {
            Some(found) if found != rows => {
                Err(bad(0, "the index of streams does not have the log's events"))
            }
            _ => Ok(Verified { events: end.0 - after, head_hash: end.1 }),
        }
    })
}

fn spawn<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    work: impl FnOnce() -> T + Send + 'scope,
) -> Result<ScopedJoinHandle<'scope, T>, Error> {
    std::thread::Builder::new()
        .name("log-verify".into())
        .spawn_scoped(scope, work)
        .map_err(super::io)
}

fn outcome<T>(thread: ScopedJoinHandle<'_, T>) -> Result<T, Error> {
    thread.join().map_err(|_| Error::Storage("a verifying thread panicked".into()))
}

/// What is left to walk, from the front.
struct Segments<'a> {
    /// Where the first one begins.
    after: u64,
    /// Where the log ended at the beginning; the last segment is what has come since.
    head: u64,
    ahead: Mutex<Ahead<'a>>,
}

struct Ahead<'a> {
    /// Where the next segment begins; none after the last one, or after a fault.
    next: Option<u64>,
    walked: u64,
    progress: &'a mut (dyn FnMut(u64) + Send),
}

impl Segments<'_> {
    /// Follows its first position, up to its second; to the log's end if it has none.
    fn next(&self) -> Option<(u64, Option<u64>)> {
        let mut ahead = guard(&self.ahead);
        let from = ahead.next?;
        let to = (from < self.head).then(|| self.head.min(from.saturating_add(SEGMENT)));
        ahead.next = to;
        Some((from, to))
    }

    fn add(&self, events: u64) {
        let mut ahead = guard(&self.ahead);
        ahead.walked += events;
        let walked = ahead.walked;
        (ahead.progress)(walked);
    }

    /// What lies before a fault is with somebody already.
    fn stop(&self) {
        guard(&self.ahead).next = None;
    }
}

/// What some of the segments came to.
#[derive(Default)]
struct Walked {
    /// Up to the head at the beginning, where the index is compared.
    rows: Rows,
    /// The furthest position, with its hash.
    end: (u64, [u8; 32]),
}

/// Why a walk ended, and the last event that was good before.
struct Fault {
    after: u64,
    error: Error,
}

impl Walked {
    /// Of two faults the one that stands before the other is the one that counts.
    fn both(one: Result<Self, Fault>, other: Result<Self, Fault>) -> Result<Self, Fault> {
        match (one, other) {
            (Ok(one), Ok(other)) => {
                Ok(Self { rows: one.rows.and(&other.rows), end: one.end.max(other.end) })
            }
            (Err(one), Err(other)) if other.after < one.after => Err(other),
            (Err(fault), _) | (_, Err(fault)) => Err(fault),
        }
    }
}

struct Walker<'a> {
    given: Given<Chain>,
    segments: &'a Segments<'a>,
    end: (u64, [u8; 32]),
}

/// The chain as far as one walker has come.
struct Chain {
    /// Of the names.
    reader: Reader,
    /// Where the log ended at the beginning.
    head: u64,
    /// The last event that was good, with its hash.
    end: (u64, [u8; 32]),
    rows: Rows,
    /// What is hashed of an event.
    encoded: Vec<u8>,
}

impl Receiver for Chain {
    fn take(&mut self, row: &Context) -> Result<(), Error> {
        let Self { reader, head, end, rows, encoded } = self;
        let event = decode(|at| Ok(row.get_raw(at)), &reader.conn, &mut reader.names)?;
        if event.position <= end.0 {
            return Err(bad(end.0 + 1, "an earlier event stands in its place"));
        }
        if event.position > end.0 + 1 {
            return Err(bad(end.0 + 1, "the event is missing"));
        }
        encoded.clear();
        event.link().encode(&end.1, encoded);
        if Sha256::digest(&*encoded)[..] != event.hash {
            return Err(bad(event.position, "the event and its hash do not belong together"));
        }
        if event.position <= *head {
            rows.add(event.stream_id, event.revision, event.position);
        }
        *end = (event.position, event.hash);
        Ok(())
    }
}

impl<'a> Walker<'a> {
    fn new(path: &Path, segments: &'a Segments<'a>) -> Result<Self, Error> {
        let (head, reader) = (segments.head, Reader::open(path)?);
        let start = (0, GENESIS);
        let chain = Chain { reader, head, end: start, rows: Rows::default(), encoded: Vec::new() };
        let given = Given::new(Reader::open(path)?.conn, chain)?;
        Ok(Self { given, segments, end: start })
    }

    fn run(mut self) -> Result<Walked, Fault> {
        while let Some((from, to)) = self.segments.next() {
            if let Err(error) = self.segment(from, to) {
                self.segments.stop();
                let after = self.given.receiver(|chain| chain.end.0);
                return Err(Fault { after, error });
            }
            self.end = self.end.max(self.given.receiver(|chain| chain.end));
        }
        let rows = self.given.receiver(|chain| std::mem::take(&mut chain.rows));
        Ok(Walked { rows, end: self.end })
    }

    /// What follows `from`, up to `to`, or as far as there is something.
    fn segment(&self, from: u64, to: Option<u64>) -> Result<(), Error> {
        let sql = format!(
            "SELECT given({COLUMNS}) FROM events NOT INDEXED WHERE position > ?1 AND position <= ?2"
        );
        let start = (from, GENESIS);
        self.given.receiver(|chain| chain.end = start);
        let hash = hash_at(self.given.conn(), from).map_err(|error| match error {
            // Whoever walks up to it judges the event itself.
            Error::Corrupt { what, .. } if from != self.segments.after => {
                bad(0, &format!("the way to event {from}: {what}"))
            }
            other => other,
        })?;
        self.given.receiver(|chain| chain.end.1 = hash);
        let mut at = from;
        while to.is_none_or(|to| at < to) {
            let before = at;
            // Before the page is read: what comes while it is being read is not missing from it.
            let head = self.head();
            let page_end = to.unwrap_or(u64::MAX).min(at.saturating_add(PAGE));
            let page = self.given.run(&sql, params![to_sql(at), to_sql(page_end)]);
            at = self.given.receiver(|chain| chain.end.0);
            page.map_err(|error| match error {
                // Nothing is missing after the end: it is the tree that leads astray.
                Error::Corrupt { position: 1.., what }
                    if at >= self.segments.head.max(self.head().unwrap_or(0)) =>
                {
                    bad(0, &format!("after its last event, {at}: {what}"))
                }
                // Whatever a row says of its own place: right after the last one that was good.
                Error::Corrupt { position: 1.., what } => bad(at + 1, &what),
                other => other,
            })?;
            self.segments.add(at - before);
            if at == before {
                return match to.is_none() && head? <= at {
                    true => Ok(()),
                    false => Err(bad(at + 1, "the event is missing")),
                };
            }
        }
        Ok(())
    }

    fn head(&self) -> Result<u64, Error> {
        head(self.given.conn())
    }
}

/// The rows that an index must have, as a sum in which their order plays no part: two that agree
/// hold the same rows, unless somebody sought them out to agree.
#[derive(Debug, Default, PartialEq, Eq)]
struct Rows {
    count: u64,
    sum: u128,
}

impl Rows {
    fn add(&mut self, stream_id: i64, revision: u64, position: u64) {
        self.count += 1;
        self.sum = self.sum.wrapping_add(mixed(stream_id.cast_unsigned(), revision, position));
    }

    /// Those of both.
    fn and(&self, other: &Self) -> Self {
        Self { count: self.count + other.count, sum: self.sum.wrapping_add(other.sum) }
    }
}

/// SplitMix64's mixer, over each word with the ones before it.
fn mixed(stream_id: u64, revision: u64, position: u64) -> u128 {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut halves = [0; 4];
    for (half, word) in halves.iter_mut().zip([stream_id, revision, position, 1]) {
        state = (state ^ word).wrapping_add(0x9e37_79b9_7f4a_7c15);
        state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        state ^= state >> 31;
        *half = state;
    }
    (u128::from(halves[2]) << 64) | u128::from(halves[3])
}

/// Columns of another name or order would make the same bytes say something else.
fn check_schema(conn: &Connection) -> Result<(), Error> {
    let mut statement = conn.prepare(
        "SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL
         AND (type = 'trigger' OR tbl_name IN ('streams', 'types', 'events')) ORDER BY rowid",
    )?;
    let found: Vec<String> =
        statement.query_map([], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?;
    match found == statements() {
        true => Ok(()),
        false => Err(bad(0, "its tables are not the ones it was made with")),
    }
}

/// SQLite's own check of the trees, and of the names' indices; the events' index, which would take
/// it longer than everything else, is read up to the position `head`, to be compared with the rows.
fn check_structure(conn: Connection, head: u64) -> Result<Rows, Error> {
    for check in ["quick_check('events')", "integrity_check('streams')", "integrity_check('types')"]
    {
        let found: String = conn.query_row(&format!("PRAGMA {check}"), [], |row| row.get(0))?;
        if found != "ok" {
            return Err(bad(0, &found));
        }
    }
    let index = Given::new(conn, Index { rows: Rows::default(), last: None })?;
    index.run(
        "SELECT given(stream_id, revision, position) FROM events INDEXED BY events_by_stream
         WHERE position <= ?1",
        [to_sql(head)],
    )?;
    Ok(index.receiver(|index| std::mem::take(&mut index.rows)))
}

/// The index of streams, as it is read.
struct Index {
    rows: Rows,
    last: Option<(i64, i64)>,
}

impl Receiver for Index {
    fn take(&mut self, entry: &Context) -> Result<(), Error> {
        let (stream_id, revision): (i64, i64) = (entry.get(0)?, entry.get(1)?);
        let here = Some((stream_id, revision));
        if here <= self.last {
            return Err(bad(0, "the index of streams is not in order"));
        }
        self.last = here;
        self.rows.add(stream_id, from_sql(revision), from_sql(entry.get(2)?));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fault_that_stands_first_counts_whatever_it_is() {
        let unread = || Err(Fault { after: 3, error: Error::Storage("cut off".into()) });
        let altered = || Err(Fault { after: 9, error: bad(10, "altered") });
        let sound = || Ok(Walked::default());
        for (one, other) in [(unread(), altered()), (altered(), unread()), (sound(), unread())] {
            let found = Walked::both(one, other).map_err(|fault| fault.error).err();
            assert_eq!(found, Some(Error::Storage("cut off".into())));
        }
        assert_eq!(Walked::both(altered(), sound()).map_err(|fault| fault.after).err(), Some(9));
    }

    #[test]
    fn each_bit_of_a_row_changes_about_half_of_what_is_summed() {
        let row = [7, 3, 1_000_u64];
        let of = |[stream, revision, position]: [u64; 3]| mixed(stream, revision, position);
        let mut changed = Vec::new();
        for word in 0..3 {
            for bit in 0..64 {
                let mut other = row;
                other[word] ^= 1 << bit;
                changed.push((of(row) ^ of(other)).count_ones());
            }
        }
        assert!(changed.iter().all(|bits| (32..=96).contains(bits)), "{changed:?}");
        let mean = f64::from(changed.iter().sum::<u32>()) / changed.len() as f64;
        assert!((62.0..=66.0).contains(&mean), "{mean}");
    }

    /// Each word meets its own value, so that what is mixed is SplitMix64 begun with 0, whose first
    /// number is published (Vigna's reference implementation); the last word is 1.
    #[test]
    fn the_mixer_is_split_mix_64() {
        const FIRST: u64 = 0xe220_a839_7b1d_cdaf;
        let sum = mixed(0x9e37_79b9_7f4a_7c15, FIRST, FIRST);
        assert_eq!(sum, (u128::from(FIRST) << 64) | 0x08b4_fda8_c892_b50e);
    }

    #[test]
    fn rows_that_changed_places_are_other_rows_and_another_order_is_not() {
        let sum = |rows: &[(i64, u64, u64)]| {
            let mut all = Rows::default();
            rows.iter().for_each(|(stream, revision, position)| {
                all.add(*stream, *revision, *position);
            });
            all
        };
        let rows = [(1, 0, 1), (1, 1, 2), (2, 0, 3)];
        assert_eq!(sum(&rows), sum(&[rows[2], rows[0], rows[1]]));
        assert_ne!(sum(&rows), sum(&[(2, 0, 1), (1, 1, 2), (1, 0, 3)]));
        assert_ne!(sum(&rows), sum(&rows[..2]));
        assert_eq!(sum(&rows).count, 3);
    }
}
