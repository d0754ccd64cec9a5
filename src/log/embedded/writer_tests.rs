//! What one commit takes, and what the connections of the writer are set to.

use super::*;
use chrono::DateTime;
use uuid::Uuid;

fn event(id: u128, bytes: usize) -> NewEvent {
    NewEvent {
        id: Uuid::from_u128(id),
        kind: "thing.happened.v1".to_owned(),
        time: DateTime::UNIX_EPOCH,
        data: vec![b' '; bytes / 2],
        metadata: vec![b' '; bytes / 2],
    }
}

fn append(events: Vec<NewEvent>) -> Append {
    let (stream, expected) = ("thing".into(), Expected::Any);
    Append { stream, expected, events, reply: oneshot::channel().0 }
}

/// The size of the group that begins with the first of these when the others wait.
fn group_of(bytes: &[usize], last: Pace) -> usize {
    let (queue, mut appends) = mpsc::channel(GROUP_APPENDS * 2);
    let of_size = |bytes: &usize| append(vec![event(0, *bytes)]);
    bytes[1..].iter().for_each(|bytes| queue.try_send(of_size(bytes)).ok().unwrap());
    gather(of_size(&bytes[0]), &mut appends, &last).len()
}

#[test]
fn a_commit_takes_what_waits_up_to_its_bounds() {
    let size = |bytes: &[usize]| group_of(bytes, Pace::default());
    assert_eq!(size(&[2]), 1);
    assert_eq!(size(&[2; 5]), 5);
    assert_eq!(size(&[2; GROUP_APPENDS + 5]), GROUP_APPENDS);
    assert_eq!(size(&[GROUP_BYTES, 2]), 1);
    assert_eq!(size(&[GROUP_BYTES / 2, GROUP_BYTES / 4, GROUP_BYTES / 4, 2]), 3);
    assert_eq!(size(&[GROUP_BYTES / 2, GROUP_BYTES, 2]), 2, "the last may reach beyond");
}

#[test]
fn a_commit_waits_a_little_for_as_many_as_the_last_one_had() {
    let took = Duration::from_secs(3600);
    let spent = |bytes: &[usize], size| {
        let began = Instant::now();
        assert_eq!(group_of(bytes, Pace { size, took }), bytes.len());
        began.elapsed()
    };
    // Whoever is alone, or has company enough, is kept from nothing.
    let wait = LONGEST_COMMIT / 4;
    assert!(spent(&[2], 2) >= wait);
    assert!(spent(&[2; 3], 4) >= wait);
    let quick = (0..100).map(|_| spent(&[2], 1).max(spent(&[2; 3], 3))).min();
    assert!(quick.is_some_and(|quick| quick < wait), "{quick:?}");
}

fn writer(dir: &tempfile::TempDir) -> Writer {
    let path = dir.path().join("log.sqlite");
    crate::log::embedded::create(&path).unwrap();
    Writer::open(&path).unwrap()
}

#[test]
fn the_writer_has_64_mib_of_cache_and_a_reader_16_and_a_wal_is_cut_to_256() {
    let dir = tempfile::tempdir().unwrap();
    let writer = writer(&dir);
    let reader = Reader::open(&writer.path).unwrap();
    let of = |conn: &Connection, name| -> i64 {
        conn.pragma_query_value(None, name, |row| row.get(0)).unwrap()
    };
    assert_eq!(of(&writer.conn, "cache_size"), -64 * 1024, "in KiB");
    assert_eq!(of(&reader.conn, "cache_size"), -16 * 1024, "in KiB");
    assert_eq!(of(&writer.conn, "journal_size_limit"), 256 << 20, "in bytes");
}

#[test]
fn a_wal_that_has_grown_long_is_left_to_the_writer() {
    let dir = tempfile::tempdir().unwrap();
    let Writer { conn, path, shared, .. } = writer(&dir);
    let is_long_after = |sql: &str| {
        conn.execute_batch(sql).unwrap();
        let (wake, woken) = std_mpsc::sync_channel(1);
        wake.send(()).unwrap();
        drop(wake);
        Checkpointer::open(&path, Arc::clone(&shared)).unwrap().run(&woken);
        shared.wal_is_long.load(Ordering::Relaxed)
    };
    assert!(!is_long_after("CREATE TABLE filling (bytes)"));
    let page_bytes: i64 = conn.pragma_query_value(None, "page_size", |it| it.get(0)).unwrap();
    let bytes = (LONG_WAL_PAGES + 1) * page_bytes;
    assert!(is_long_after(&format!("INSERT INTO filling VALUES (zeroblob({bytes}))")));
    assert!(shared.stopped.get().is_none());
}

#[test]
fn a_repeat_is_looked_for_among_the_last_events_of_its_stream_alone() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = writer(&dir);
    let mut at = |ids: std::ops::Range<u64>| {
        let events = ids.map(|id| event(id.into(), 2)).collect();
        let answer = writer.commit(&mut [append(events)]).unwrap().remove(0);
        answer.unwrap().position
    };
    // As many as may follow a batch of two before it is too long ago: its first event counts.
    let last = 3 + REPEAT_WINDOW;
    assert_eq!([at(1..3), at(3..last + 1), at(1..3)], [2, last, 2]);
    assert_eq!([at(last + 1..last + 2), at(1..3)], [last + 1, last + 3]);
}

#[test]
fn the_checkpointer_is_woken_once_for_so_many_pages() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = writer(&dir);
    let (wake, woken) = std_mpsc::sync_channel(1);
    let mut is_woken_at = |pages| {
        writer.wal_pages.store(pages, Ordering::Relaxed);
        writer.checkpoint_if_due(&wake);
        woken.try_recv().is_ok()
    };
    let (some, more) = (CHECKPOINT_PAGES, CHECKPOINT_PAGES * 2);
    let grows = [some - 1, some, some, some + 1, more - 1, more].map(&mut is_woken_at);
    assert_eq!(grows, [false, true, false, false, false, true]);
    // Begun anew.
    assert_eq!([10, some - 1, some].map(is_woken_at), [false, false, true]);
}
