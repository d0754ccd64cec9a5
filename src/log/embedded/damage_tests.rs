//! What a damaged file does: each altered bit and each cut is found, or harms nothing, and no
//! reader is given an event that was altered. All bits and all cuts with `T2M_EVERY_BIT=1`, which
//! `scripts/soak` sets; otherwise a sample that leaves out most of what is empty.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use chrono::DateTime;
use tempfile::TempDir;
use uuid::Uuid;

use super::reader::Reader;
use super::verify::verify;
use super::*;
use crate::log::{GENESIS, Verified};

const EVENTS: u64 = 50;
const STREAMS: u64 = 7;

/// A closed log of [`EVENTS`] events.
struct Sound {
    dir: TempDir,
    bytes: Vec<u8>,
    events: Vec<Recorded>,
}

impl Sound {
    async fn new() -> Self {
        // In memory where there is such a directory: it is written many thousand times.
        let shm = Path::new("/dev/shm");
        let dir = if shm.is_dir() { tempfile::tempdir_in(shm) } else { tempfile::tempdir() };
        let dir = dir.unwrap();
        let path = dir.path().join("sound.sqlite");
        let log = EmbeddedLog::open(&path).unwrap();
        for number in 0..EVENTS {
            let event = NewEvent {
                id: Uuid::from_u128(u128::from(number) << 70),
                kind: format!("thing.happened.v{}", number % 3),
                time: DateTime::from_timestamp_micros(1_700_000_000_000_000).unwrap(),
                // The largest reaches over pages of its own.
                data: format!(r#"{{"n":"{:1$}"}}"#, number, if number == 30 { 20_000 } else { 40 })
                    .into_bytes(),
                metadata: br#"{"source":"system"}"#.to_vec(),
            };
            let stream = format!("thing-{}", number % STREAMS);
            log.append(&stream, Expected::Any, vec![event]).await.unwrap();
        }
        let events = log.read_all(0, 1000).await.unwrap();
        drop(log);
        Self { bytes: std::fs::read(&path).unwrap(), dir, events }
    }

    fn copy(&self) -> PathBuf {
        let path = self.dir.path().join("copy.sqlite");
        std::fs::write(&path, &self.bytes).unwrap();
        path
    }

    /// What the copy at `path` is like: the error that names its damage, or nothing.
    fn judge(&self, path: &Path, what: &str) -> Option<Error> {
        let whole =
            Verified { events: EVENTS, head_hash: self.events.last().map_or(GENESIS, |e| e.hash) };
        // Whatever verification says: what is read is what was written, or its beginning.
        let read = read(path);
        if let Ok(read) = &read {
            assert!(self.events.starts_with(&read.all), "{what}: read_all gave what is not there");
            for (stream, events) in &read.streams {
                let mut ours = self.events.iter().filter(|event| *event.stream == **stream);
                let same = events.iter().all(|event| ours.next() == Some(event));
                assert!(same, "{what}: {stream} was read otherwise than it was written");
            }
        }
        match found(path) {
            Ok(verified) => {
                assert_eq!(verified, whole, "{what}: verified, but not the same");
                let read = read.unwrap_or_else(|error| panic!("{what}: verified, but {error}"));
                assert_eq!(read.all, self.events, "{what}: verified, but read otherwise");
                let of_streams: usize = read.streams.iter().map(|(_, events)| events.len()).sum();
                assert_eq!(
                    of_streams,
                    self.events.len(),
                    "{what}: verified, but streams miss some"
                );
                None
            }
            Err(error) => {
                let located = match &error {
                    Error::Corrupt { position, .. } => *position <= EVENTS,
                    Error::Foreign(_) | Error::Storage(_) => true,
                    _ => false,
                };
                assert!(located, "{what}: {error}");
                Some(error)
            }
        }
    }
}

struct Read {
    all: Vec<Recorded>,
    streams: Vec<(String, Vec<Recorded>)>,
}

fn read(path: &Path) -> Result<Read, Error> {
    inspect(path)?;
    let mut reader = Reader::open(path)?;
    let all = reader.page(0, 1000)?;
    let streams = (0..STREAMS).map(|number| {
        let stream = format!("thing-{number}");
        Ok((stream.clone(), reader.stream_page(&stream, 0, 1000)?))
    });
    Ok(Read { all, streams: streams.collect::<Result<_, Error>>()? })
}

fn found(path: &Path) -> Result<Verified, Error> {
    inspect(path)?;
    let head = Reader::open(path)?.head()?;
    verify(path, 0, head, &mut |_| {})
}

fn every_bit() -> bool {
    std::env::var_os("T2M_EVERY_BIT").is_some()
}

#[tokio::test]
async fn every_flipped_bit_of_the_file_is_found_or_harmless() {
    let sound = Sound::new().await;
    let path = sound.copy();
    let file = File::options().write(true).open(&path).unwrap();
    assert_eq!(sound.judge(&path, "the sound one"), None);
    let (mut judged, mut harmless) = (0, 0);
    for (at, byte) in sound.bytes.iter().enumerate() {
        // At the end of a page is where the first of its cells ends.
        let all = every_bit() || at % 8192 == 8191;
        let bits = if all { 0..8 } else { at % 8..at % 8 + 1 };
        // Filling, whether or not it belongs to an event.
        let is_dull = |byte: u8| byte == 0 || byte == b' ';
        if !every_bit() && is_dull(*byte) && !at.is_multiple_of(41) {
            continue;
        }
        for bit in bits {
            file.write_all_at(&[byte ^ (1 << bit)], at as u64).unwrap();
            judged += 1;
            harmless += u32::from(sound.judge(&path, &format!("bit {bit} of byte {at}")).is_none());
            file.write_all_at(&[*byte], at as u64).unwrap();
        }
    }
    assert_eq!(sound.judge(&path, "the sound one again"), None);
    println!("{judged} bits flipped, {harmless} of them without harm");
    // Of all bits most are of what is empty.
    let found = judged - harmless;
    assert!(judged > 5000 && found > 2500, "{judged} judged, {harmless} without harm");
}

#[tokio::test]
async fn every_cut_of_the_file_is_found() {
    let sound = Sound::new().await;
    let path = sound.copy();
    let file = File::options().write(true).open(&path).unwrap();
    for length in (0..sound.bytes.len()).rev() {
        if every_bit() || length.is_multiple_of(97) || length.is_multiple_of(8192) {
            file.set_len(length as u64).unwrap();
            let found = sound.judge(&path, &format!("cut to {length} bytes"));
            assert!(found.is_some(), "cut to {length} bytes, and nothing said");
        }
    }
}

#[tokio::test]
async fn an_altered_event_is_given_to_no_reader() {
    let sound = Sound::new().await;
    let path = sound.copy();
    let stranger = rusqlite::Connection::open(&path).unwrap();
    stranger
        .execute_batch("UPDATE events SET data = CAST('{}' AS BLOB) WHERE position = 20")
        .unwrap();
    let log = EmbeddedLog::open(&path).unwrap();
    let damaged = |answer: Result<Vec<Recorded>, Error>, at| {
        assert!(matches!(answer, Err(Error::Corrupt { position, .. }) if position == at));
    };
    damaged(log.read_all(10, 100).await, 20);
    damaged(log.read_all(19, 1).await, 20);
    damaged(log.read_stream(&sound.events[19].stream, 0, 100).await, 20);
    assert_eq!(log.read_all(20, 100).await.unwrap(), sound.events[20..]);
    stranger.execute_batch("DELETE FROM events WHERE position = 20").unwrap();
    damaged(log.read_all(10, 100).await, 20);
    damaged(log.read_all(20, 100).await, 20);
}

/// The tree of a log's events: seven to a page, and one page with the last.
struct Tree {
    dir: TempDir,
    bytes: Vec<u8>,
    /// Where its root begins: a page of the kind that leads to others.
    root: usize,
}

impl Tree {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.sqlite");
        let log = EmbeddedLog::open(&path).unwrap();
        for number in 0..EVENTS {
            let event = NewEvent {
                id: Uuid::from_u128(u128::from(number) + 1),
                kind: "thing.happened.v1".to_owned(),
                time: DateTime::UNIX_EPOCH,
                data: vec![b'.'; 1000],
                metadata: b"{}".to_vec(),
            };
            log.append("thing-1", Expected::Any, vec![event]).await.unwrap();
        }
        drop(log);
        let of_events = "SELECT rootpage FROM sqlite_schema WHERE name = 'events'";
        let page: u32 = rusqlite::Connection::open(&path)
            .unwrap()
            .query_row(of_events, [], |row| row.get(0))
            .unwrap();
        let tree =
            Self { bytes: std::fs::read(&path).unwrap(), dir, root: (page as usize - 1) * 8192 };
        assert_eq!(tree.bytes[tree.root], 5, "an interior page of a table");
        let keys: Vec<u8> = (0..7).map(|nth| tree.bytes[tree.cell(nth) + 4]).collect();
        assert_eq!(keys, [7, 14, 21, 28, 35, 42, 49], "the last event of each page but the last");
        tree
    }

    /// Of a page that lies before the last: its number in four bytes and its last event's position.
    /// https://www.sqlite.org/fileformat.html#b_tree_pages
    fn cell(&self, nth: usize) -> usize {
        let pointer = self.root + 12 + 2 * nth;
        self.root + usize::from(u16::from_be_bytes([self.bytes[pointer], self.bytes[pointer + 1]]))
    }

    fn found(&self, head: u64) -> Result<Verified, Error> {
        let path = self.dir.path().join("altered.sqlite");
        std::fs::write(&path, &self.bytes).unwrap();
        verify(&path, 0, head, &mut |_| {})
    }
}

#[tokio::test]
async fn an_event_that_only_the_way_to_it_misses_is_not_called_missing() {
    let mut tree = Tree::new().await;
    assert_eq!(tree.found(EVENTS).map(|verified| verified.events), Ok(EVENTS));
    // Who looks for event 14, where a segment ends, is led past the page that holds it.
    let cell = tree.cell(1);
    tree.bytes[cell + 4] = 13;
    let said = tree.found(EVENTS).unwrap_err();
    let Error::Corrupt { position: 0, what } = &said else { panic!("{said}") };
    assert!(what.starts_with("the way to event 14: "), "{what}");
}

#[tokio::test]
async fn what_leads_back_from_the_end_is_no_event_missing_there() {
    let mut tree = Tree::new().await;
    // The last page is the first one once more: the log seems to end with event 7.
    let (first, last) = (tree.cell(0), tree.root + 8);
    tree.bytes.copy_within(first..first + 4, last);
    let said = tree.found(7).unwrap_err();
    let Error::Corrupt { position: 0, what } = &said else { panic!("{said}") };
    assert!(what.starts_with("after its last event, 49: "), "{what}");
}
