//! Whether the log is what was written: the chain, event by event, then what the chain says nothing
//! of: the tables' form and the indices that streams and names are found by.
//!
//! Walking the events, hashing them and checking the structure are on a thread each. A link is
//! judged by the hash that its predecessor claims, which is judged itself one link before, so none
//! waits for another.

use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{Scope, ScopedJoinHandle};

use rusqlite::{Connection, params};
use sha2::{Digest, Sha256};

use super::Error;
use super::file::statements;
use super::reader::{COLUMNS, Reader, decode};
use crate::log::{Verified, bad, from_sql, to_sql};

/// Events read in one transaction, so that a verification holds up no checkpoint for long.
const PAGE: i64 = 2000;
/// Bytes that are handed over at once.
const BLOCK: usize = 256 * 1024;
/// Blocks under way between the two threads.
const UNDER_WAY: usize = 3;

/// What is hashed of some events, one behind the other.
#[derive(Default)]
struct Block {
    bytes: Vec<u8>,
    links: Vec<Expected>,
}

struct Expected {
    position: u64,
    /// Where its bytes end.
    end: usize,
    hash: [u8; 32],
}

/// Walk the chain after `after` to its end, which must not be before `head`. This engine leaves no
/// gaps, so that a missing position is damage.
pub(super) fn verify(
    path: &Path,
    after: u64,
    head: u64,
    progress: &mut (dyn FnMut(u64) + Send),
) -> Result<Verified, Error> {
    let (blocks, received) = sync_channel(UNDER_WAY);
    let (used, spare) = sync_channel(UNDER_WAY + 2);
    let (mut reader, beside) = (Reader::open(path)?, Reader::open(path)?);
    std::thread::scope(|scope| {
        let hashing = spawn(scope, move || hash(&received, &used))?;
        let structure = match after {
            0 => Some(spawn(scope, move || check_structure(&beside.conn, head))?),
            _ => None,
        };
        let rows = Rows::default();
        let mut walk = Walk { blocks, spare, block: Block::default(), rows, indexed: head };
        let walked = walk.run(&mut reader, after, head, progress);
        // What was read before a fault is judged too: the first fault is the one that counts.
        walk.hand_over();
        let rows = std::mem::take(&mut walk.rows);
        // Else the hashing thread would wait for more.
        drop(walk);
        outcome(hashing)?;
        let verified = walked?;
        match structure.map(outcome).transpose()? {
            Some(found) if found != rows => {
                Err(bad(0, "the index of streams does not have the log's events"))
            }
            _ => Ok(verified),
        }
    })
}

fn spawn<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    work: impl FnOnce() -> Result<T, Error> + Send + 'scope,
) -> Result<ScopedJoinHandle<'scope, Result<T, Error>>, Error> {
    std::thread::Builder::new()
        .name("log-verify".into())
        .spawn_scoped(scope, work)
        .map_err(super::io)
}

fn outcome<T>(thread: ScopedJoinHandle<'_, Result<T, Error>>) -> Result<T, Error> {
    thread.join().unwrap_or_else(|_| Err(Error::Storage("a verifying thread panicked".into())))
}

struct Walk {
    blocks: SyncSender<Block>,
    /// Blocks to be filled again.
    spare: Receiver<Block>,
    block: Block,
    /// Up to the position `indexed`, where the index is compared.
    rows: Rows,
    indexed: u64,
}

impl Walk {
    fn run(
        &mut self,
        reader: &mut Reader,
        after: u64,
        head: u64,
        progress: &mut (dyn FnMut(u64) + Send),
    ) -> Result<Verified, Error> {
        check_schema(&reader.conn)?;
        let mut end = (after, reader.hash_at(after)?);
        loop {
            let before = end.0;
            self.page(reader, &mut end).map_err(|error| match error {
                // Nothing is missing after the end: it is the tree that leads astray.
                Error::Corrupt { position: 1.., what }
                    if end.0 >= self.indexed.max(reader.head().unwrap_or(0)) =>
                {
                    bad(0, &format!("after its last event, {}: {what}", end.0))
                }
                // Whatever a row says of its own place: right after the last one that was good.
                Error::Corrupt { position: 1.., what } => bad(end.0 + 1, &what),
                other => other,
            })?;
            progress(end.0);
            if end.0 == before {
                break;
            }
        }
        let (position, head_hash) = end;
        match position < head {
            true => Err(bad(position + 1, "the event is missing")),
            false => Ok(Verified { events: position - after, head_hash }),
        }
    }

    fn page(&mut self, reader: &mut Reader, end: &mut (u64, [u8; 32])) -> Result<(), Error> {
        let mut statement = reader.conn.prepare_cached(&format!(
            "SELECT {COLUMNS} FROM events WHERE position > ?1 ORDER BY position LIMIT ?2"
        ))?;
        let mut rows = statement.query(params![to_sql(end.0), PAGE])?;
        while let Some(row) = rows.next()? {
            let event = decode(row, &reader.conn, &mut reader.names)?;
            if event.position <= end.0 {
                return Err(bad(end.0 + 1, "an earlier event stands in its place"));
            }
            if event.position > end.0 + 1 {
                return Err(bad(end.0 + 1, "the event is missing"));
            }
            event.link().encode(&end.1, &mut self.block.bytes);
            if event.position <= self.indexed {
                self.rows.add(event.stream_id, event.revision, event.position);
            }
            *end = (event.position, event.hash);
            let (position, hash) = *end;
            self.block.links.push(Expected { position, end: self.block.bytes.len(), hash });
            if self.block.bytes.len() >= BLOCK && !self.hand_over() {
                // The other thread has found something, which lies before this.
                return Err(bad(position, "it was not looked at"));
            }
        }
        Ok(())
    }

    /// Whether somebody took it.
    fn hand_over(&mut self) -> bool {
        let next = self.spare.try_recv().unwrap_or_default();
        self.blocks.send(std::mem::replace(&mut self.block, next)).is_ok()
    }
}

/// Ends at the first event that does not belong to its hash.
fn hash(blocks: &Receiver<Block>, used: &SyncSender<Block>) -> Result<(), Error> {
    while let Ok(mut block) = blocks.recv() {
        let mut start = 0;
        for Expected { position, end, hash } in &block.links {
            if Sha256::digest(&block.bytes[start..*end])[..] != hash[..] {
                return Err(bad(*position, "the event and its hash do not belong together"));
            }
            start = *end;
        }
        block.bytes.clear();
        block.links.clear();
        // Nobody needs it any more: it goes.
        let _ = used.try_send(block);
    }
    Ok(())
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
fn check_structure(conn: &Connection, head: u64) -> Result<Rows, Error> {
    for check in ["quick_check('events')", "integrity_check('streams')", "integrity_check('types')"]
    {
        let found: String = conn.query_row(&format!("PRAGMA {check}"), [], |row| row.get(0))?;
        if found != "ok" {
            return Err(bad(0, &found));
        }
    }
    let mut statement = conn.prepare(
        "SELECT stream_id, revision, position FROM events INDEXED BY events_by_stream
         WHERE position <= ?1 ORDER BY stream_id, revision",
    )?;
    let mut found = Rows::default();
    let mut last = None;
    let mut entries = statement.query([to_sql(head)])?;
    while let Some(entry) = entries.next()? {
        let (stream_id, revision): (i64, i64) = (entry.get(0)?, entry.get(1)?);
        let here = Some((stream_id, revision));
        if here <= last {
            return Err(bad(0, "the index of streams is not in order"));
        }
        last = here;
        found.add(stream_id, from_sql(revision), from_sql(entry.get(2)?));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

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
