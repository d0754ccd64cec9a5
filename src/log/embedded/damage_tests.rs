//! What a damaged file does: each altered bit and each cut is found, or harms nothing, and no
//! reader is given an event that was altered. What a damaged WAL has lost only those miss who know
//! where the log ended. All bits and all cuts with `T2M_EVERY_BIT=1`, which `scripts/soak` sets;
//! otherwise a sample that leaves out most of what is empty.

use std::collections::BTreeMap;
use std::iter::{Rev, StepBy};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use chrono::DateTime;
use tempfile::TempDir;
use uuid::Uuid;

use super::file::{beside, remove};
use super::reader::Reader;
use super::verify::verify;
use super::*;
use crate::log::{GENESIS, Verified};

const EVENTS: u64 = 50;
const STREAMS: u64 = 7;
const PAGE: usize = 8192;

fn event(number: u64) -> NewEvent {
    NewEvent {
        id: Uuid::from_u128(u128::from(number) << 70),
        kind: format!("thing.happened.v{}", number % 3),
        time: DateTime::from_timestamp_micros(1_700_000_000_000_000).unwrap(),
        // The largest reaches over pages of its own.
        data: format!(r#"{{"n":"{:1$}"}}"#, number, if number == 30 { 20_000 } else { 40 })
            .into_bytes(),
        metadata: br#"{"source":"system"}"#.to_vec(),
    }
}

fn stream_of(number: u64) -> String {
    format!("thing-{}", number % STREAMS)
}

/// In memory where there is such a directory: it is written many thousand times.
fn scratch() -> TempDir {
    let shm = Path::new("/dev/shm");
    let dir = if shm.is_dir() { tempfile::tempdir_in(shm) } else { tempfile::tempdir() };
    dir.unwrap()
}

/// Has all cores at `work`, each with its number and its share of so many places, the last first.
fn on_all_cores(places: usize, work: impl Fn(usize, Rev<StepBy<Range<usize>>>) + Sync) {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let work = &work;
    std::thread::scope(|scope| {
        for core in 0..cores {
            scope.spawn(move || work(core, (core..places).step_by(cores).rev()));
        }
    });
}

/// What verification says of a log of these events.
fn whole(events: &[Recorded]) -> Verified {
    let head_hash = events.last().map_or(GENESIS, |last| last.hash);
    Verified { events: events.len() as u64, head_hash }
}

/// A closed log of [`EVENTS`] events.
struct Sound {
    dir: TempDir,
    bytes: Vec<u8>,
    events: Vec<Recorded>,
}

impl Sound {
    async fn new() -> Self {
        let dir = scratch();
        let path = dir.path().join("sound.sqlite");
        let log = EmbeddedLog::open(&path).unwrap();
        for number in 0..EVENTS {
            log.append(&stream_of(number), Expected::Any, vec![event(number)]).await.unwrap();
        }
        let events = log.read_all(0, 1000).await.unwrap();
        drop(log);
        Self { bytes: std::fs::read(&path).unwrap(), dir, events }
    }

    fn copy(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, &self.bytes).unwrap();
        path
    }

    /// Has `judge` judge each place in the file, the last first, on all cores: each core has a copy of
    /// its own.
    fn at_each_byte(&self, judge: impl Fn(usize, &Path, &File) + Sync) {
        on_all_cores(self.bytes.len(), |core, places| {
            let path = self.copy(&format!("copy{core}.sqlite"));
            let file = File::options().write(true).open(&path).unwrap();
            assert_eq!(self.judge(&path, "the sound one"), None);
            places.for_each(|at| judge(at, &path, &file));
        });
    }

    /// Of each byte the position of the event whose row it is in, from its id on, as far as the row
    /// is in one piece; 0 where it is in none. These bytes are that event's alone.
    fn rows(&self) -> Vec<u64> {
        let path = self.copy("rows.sqlite");
        let file = File::options().write(true).open(&path).unwrap();
        let mut rows = vec![0; self.bytes.len()];
        for event in &self.events {
            let time = event.time.timestamp_micros().to_be_bytes();
            let start = [&event.id.as_bytes()[..], &time[..], &event.hash[..]].concat();
            let row = [&start[..], &event.data[..], &event.metadata[..]].concat();
            let places = self.bytes.windows(start.len()).enumerate();
            let places = places.filter(|(_, bytes)| *bytes == start).map(|(at, _)| at);
            // A page that was split holds some of them still, where it is empty now.
            let mut in_use = places.filter(|at| {
                file.write_all_at(&[self.bytes[*at] ^ 1], *at as u64).unwrap();
                let is_found = read(&path).is_err();
                file.write_all_at(&[self.bytes[*at]], *at as u64).unwrap();
                is_found
            });
            let (Some(at), None) = (in_use.next(), in_use.next()) else {
                panic!("not one row of event {}", event.position);
            };
            let same = row.iter().zip(&self.bytes[at..]).take_while(|(one, other)| one == other);
            let length = same.count();
            rows[at..at + length].fill(event.position);
        }
        rows
    }

    /// What the copy at `path` is like: the error that names its damage, or nothing.
    fn judge(&self, path: &Path, what: &str) -> Option<Error> {
        let read = read(path);
        if let Ok(read) = &read {
            read.ensure_written(&self.events, what);
        }
        match found(path) {
            Ok(verified) => {
                assert_eq!(verified, whole(&self.events), "{what}: verified, but not the same");
                let read = read.unwrap_or_else(|error| panic!("{what}: verified, but {error}"));
                assert_eq!(read.all, self.events, "{what}: verified, but read otherwise");
                let events = self.events.len();
                assert_eq!(read.of_streams(), events, "{what}: verified, but streams miss some");
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

impl Read {
    /// Whatever verification says: what is read is what was written, or its beginning.
    fn ensure_written(&self, written: &[Recorded], what: &str) {
        assert!(written.starts_with(&self.all), "{what}: read_all gave what is not there");
        for (stream, events) in &self.streams {
            let mut ours = written.iter().filter(|event| *event.stream == **stream);
            let same = events.iter().all(|event| ours.next() == Some(event));
            assert!(same, "{what}: {stream} was read otherwise than it was written");
        }
    }

    /// Events in all streams.
    fn of_streams(&self) -> usize {
        self.streams.iter().map(|(_, events)| events.len()).sum()
    }
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

const HARMLESS: &str = "not, without harm";
const EXACTLY: &str = "at the event in whose row they are";

fn every_bit() -> bool {
    std::env::var_os("T2M_EVERY_BIT").is_some()
}

#[tokio::test]
async fn every_flipped_bit_of_the_file_is_found_or_harmless() {
    let sound = Sound::new().await;
    let rows = sound.rows();
    let counts = Mutex::new(BTreeMap::new());
    sound.at_each_byte(|at, path, file| {
        let byte = sound.bytes[at];
        // At the end of a page is where the first of its cells ends.
        let all = every_bit() || at % PAGE == PAGE - 1;
        let bits = if all { 0..8 } else { at % 8..at % 8 + 1 };
        // Filling, whether or not it belongs to an event.
        let is_dull = byte == 0 || byte == b' ';
        if !every_bit() && is_dull && !at.is_multiple_of(41) {
            return;
        }
        for bit in bits {
            file.write_all_at(&[byte ^ (1 << bit)], at as u64).unwrap();
            let what = format!("bit {bit} of byte {at}");
            let located = match (rows[at], sound.judge(path, &what)) {
                (0, None) => HARMLESS,
                (0, Some(Error::Corrupt { position: 0, .. })) => "as structure",
                (0, Some(Error::Corrupt { .. })) => "at an event",
                (0, Some(Error::Storage(_))) => "as storage",
                // By its beginning alone the file is known as a log.
                (0, Some(Error::Foreign(_))) if at < 100 => "as foreign",
                (row, Some(Error::Corrupt { position, .. })) if position == row => EXACTLY,
                (row, found) => panic!("{what}, in the row of event {row}: {found:?}"),
            };
            *guard(&counts).entry(located).or_insert(0_u32) += 1;
            file.write_all_at(&[byte], at as u64).unwrap();
        }
        // The last place of all: whatever was flipped was put back.
        if at == 0 {
            assert_eq!(sound.judge(path, "the sound one again"), None);
        }
    });
    let counts = counts.into_inner().unwrap();
    let judged: u32 = counts.values().sum();
    println!("{judged} bits flipped, and found: {counts:?}");
    // Of all bits most are of what is empty.
    let found = judged - counts[HARMLESS];
    assert!(judged > 5000 && found > 2500 && counts[EXACTLY] > 2000, "{judged}: {counts:?}");
}

#[tokio::test]
async fn every_cut_of_the_file_is_found() {
    let sound = Sound::new().await;
    sound.at_each_byte(|length, path, file| {
        if every_bit() || length.is_multiple_of(97) || length.is_multiple_of(PAGE) {
            file.set_len(length as u64).unwrap();
            let found = sound.judge(path, &format!("cut to {length} bytes"));
            assert!(found.is_some(), "cut to {length} bytes, and nothing said");
        }
    });
}

#[tokio::test]
async fn an_altered_event_is_given_to_no_reader() {
    let sound = Sound::new().await;
    let path = sound.copy("copy.sqlite");
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

/// A log whose process was killed: its last events lie in its WAL alone.
struct Killed {
    dir: TempDir,
    main: Vec<u8>,
    wal: Vec<u8>,
    events: Vec<Recorded>,
    /// How long the WAL was after each append, and how many events there were then.
    commits: Vec<(usize, usize)>,
}

impl Killed {
    /// Events that were written back before.
    const BEFORE: u64 = 10;

    async fn new() -> Self {
        let dir = scratch();
        let path = dir.path().join("killed.sqlite");
        let log = EmbeddedLog::open(&path).unwrap();
        for number in 0..Self::BEFORE {
            log.append(&stream_of(number), Expected::Any, vec![event(number)]).await.unwrap();
        }
        drop(log);
        let log = EmbeddedLog::open(&path).unwrap();
        let wal = beside(&path, "-wal");
        let mut commits = Vec::new();
        for number in [10, 12, 14] {
            let two = vec![event(number), event(number + 1)];
            log.append(&stream_of(number), Expected::Any, two).await.unwrap();
            let length = std::fs::metadata(&wal).unwrap().len();
            commits.push((length as usize, number as usize + 2));
        }
        let events = log.read_all(0, 1000).await.unwrap();
        let [main, wal] = [path, wal].map(|file| std::fs::read(file).unwrap());
        Self { dir, main, wal, events, commits }
    }

    /// With a WAL that is as it was up to `sound`: what is left are the events of all commits that
    /// end there, and who knows how many there were is told which is the first that is missing.
    fn judge(&self, path: &Path, wal: &[u8], sound: usize, what: &str) {
        remove(path).unwrap();
        std::fs::write(path, &self.main).unwrap();
        std::fs::write(beside(path, "-wal"), wal).unwrap();
        let commit = self.commits.iter().rfind(|(length, _)| *length <= sound);
        let left = commit.map_or(Self::BEFORE as usize, |(_, events)| *events);
        let read = read(path).unwrap_or_else(|error| panic!("{what}: {error}"));
        read.ensure_written(&self.events, what);
        assert_eq!((read.all.len(), read.of_streams()), (left, left), "{what}");
        let acknowledged = self.events.len();
        match verify(path, 0, acknowledged as u64, &mut |_| {}) {
            Ok(verified) => {
                assert_eq!((left, verified), (acknowledged, whole(&self.events)), "{what}");
            }
            Err(Error::Corrupt { position, .. }) => assert_eq!(position, left as u64 + 1, "{what}"),
            Err(error) => panic!("{what}: {error}"),
        }
        // It can be mended still.
        assert!(std::fs::read(beside(path, "-wal")).unwrap() == wal, "{what}: a reader wrote it");
    }
}

#[tokio::test]
async fn of_a_damaged_wal_all_is_read_up_to_the_damage_and_the_rest_is_known_to_be_missing() {
    let killed = Killed::new().await;
    on_all_cores(killed.wal.len(), |core, places| {
        let place = killed.dir.path().join(core.to_string());
        std::fs::create_dir(&place).unwrap();
        let path = place.join("copy.sqlite");
        killed.judge(&path, &killed.wal, killed.wal.len(), "the sound one");
        let mut wal = killed.wal.clone();
        for at in places {
            // 32 bytes, then pages with 24 bytes before each.
            let in_frame = at.checked_sub(32).map_or(0, |at| at % (24 + PAGE));
            let is_taken = in_frame < 24 || at.is_multiple_of(97);
            let bits = if every_bit() { 0..8 } else { at % 8..at % 8 + usize::from(is_taken) };
            for bit in bits {
                wal[at] ^= 1 << bit;
                killed.judge(&path, &wal, at, &format!("bit {bit} of byte {at} of the WAL"));
                wal[at] ^= 1 << bit;
            }
            if every_bit() || in_frame == 0 || at.is_multiple_of(307) {
                killed.judge(&path, &wal[..at], at, &format!("the WAL cut to {at} bytes"));
            }
        }
    });
}

#[tokio::test]
async fn a_log_without_its_wal_agrees_with_itself_and_not_with_what_was_acknowledged() {
    let killed = Killed::new().await;
    let path = killed.dir.path().join("copy.sqlite");
    std::fs::write(&path, &killed.main).unwrap();
    let log = EmbeddedLog::open_read_only(&path).unwrap();
    let left = &killed.events[..Killed::BEFORE as usize];
    assert_eq!(log.read_all(0, 1000).await.unwrap(), left);
    assert_eq!(log.verify().await, Ok(whole(left)));
    let found = verify(&path, 0, killed.events.len() as u64, &mut |_| {});
    assert_eq!(found, Err(bad(Killed::BEFORE + 1, "the event is missing")));
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
            Self { bytes: std::fs::read(&path).unwrap(), dir, root: (page as usize - 1) * PAGE };
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
