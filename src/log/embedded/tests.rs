use std::path::PathBuf;
use std::sync::atomic::Ordering;

use chrono::DateTime;
use rusqlite::{Connection, params};
use tempfile::TempDir;
use uuid::Uuid;

use super::file::{VERSION, beside};
use super::writer::StreamEnd;
use super::*;
use crate::log::{conformance, to_sql};

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
        // Only since the handle knows where the log ended.
        ("DELETE FROM events WHERE position > 18", 19),
        ("UPDATE events SET time = time + 1 WHERE position = 5", 5),
        ("UPDATE events SET revision = 100 WHERE position = 8", 8),
        ("UPDATE events SET type_id = 3 - type_id WHERE position = 9", 9),
        ("UPDATE events SET stream_id = 77 WHERE position = 10", 10),
        ("UPDATE events SET position = 100 WHERE position = 11", 11),
        ("UPDATE streams SET name = 'thing-x' WHERE name = 'thing-0'", 2),
        ("UPDATE types SET name = 'thing.else.v1' WHERE name = 'thing.happened.v1'", 1),
        // What this program never made may change what is written next.
        ("CREATE TRIGGER other AFTER INSERT ON events BEGIN SELECT 1; END", 0),
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
            let Error::Foreign(why) = refused(opened) else { panic!("it is foreign") };
            assert!(why.contains("is not a T2M log"), "{why}");
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
    assert!(writer.is_exclusive() && !reader.is_exclusive());
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
        let Err(Error::Unwritable(why)) = &later else { panic!("no retry: {later:?}") };
        assert!(why.starts_with("a write failed: "), "{why}");
        assert_eq!(log.writable(), Err(later.unwrap_err()));
        assert_eq!(*log.head().borrow(), 3);
        assert_eq!(log.read_all(0, 100).await.unwrap().len(), 3);
        let wal = std::fs::read(beside(&path, "-wal")).unwrap();
        drop(log);
        assert!(std::fs::read(beside(&path, "-wal")).unwrap() == wal, "closing wrote");
        let log = EmbeddedLog::open(&path).unwrap();
        let retried = log.append("thing-1", Expected::Any, vec![event(4), event(5)]).await;
        assert_eq!(retried, Ok(Appended { revision: 3, position: 5 }));
        assert_eq!(log.verify().await.unwrap().events, 5);
    }
}

#[tokio::test]
async fn a_commit_without_room_leaves_nothing_and_the_next_with_room_follows_on() {
    let (_dir, path) = place();
    let mut writer = Writer::open_new(&path);
    let append = |stream: &str, number: u128, bytes: usize| Append {
        stream: stream.into(),
        expected: Expected::Any,
        events: vec![NewEvent { data: vec![b'1'; bytes], ..event(number) }],
        reply: oneshot::channel().0,
    };
    writer.commit(&mut [append("thing-1", 1, 1)]).unwrap();
    writer.shared.advance(1);
    let pages: i64 = writer.conn.query_row("PRAGMA page_count", [], |row| row.get(0)).unwrap();
    writer.conn.pragma_update(None, "max_page_count", pages).unwrap();
    // The first append of the group still finds room, and its stream and type are new.
    let group = &mut [append("thing-2", 2, 1), append("thing-1", 3, 100_000)];
    let error = writer.commit(group).unwrap_err();
    assert!(super::room::is_want_of_room(&error), "{error:?}");
    let _ = writer.conn.execute_batch("ROLLBACK");
    assert_eq!(writer.look_for_room(), Ok(true), "its first page needs no more");
    writer.conn.pragma_update(None, "max_page_count", 1_000_000).unwrap();
    let group = &mut [append("thing-2", 2, 1), append("thing-1", 3, 100_000)];
    let answers = writer.commit(group).unwrap();
    let at = |revision, position| Ok(Appended { revision, position });
    assert_eq!(answers, [at(0, 2), at(1, 3)]);
    drop(writer);
    let log = EmbeddedLog::open(&path).unwrap();
    assert_eq!(log.verify().await.unwrap().events, 3);
    assert_eq!(log.stats().await.unwrap().streams, 2);
}

#[tokio::test]
async fn a_writer_without_room_refuses_and_takes_appends_again_when_there_is_some() {
    let (_dir, path) = place();
    let writer = Writer::open_new(&path);
    let pages: i64 = writer.conn.query_row("PRAGMA page_count", [], |row| row.get(0)).unwrap();
    writer.conn.pragma_update(None, "max_page_count", pages + 4).unwrap();
    let shared = writer.shared.clone();
    let (queue, appends) = mpsc::channel(8);
    let (wake, _woken) = std_mpsc::sync_channel(1);
    let thread = std::thread::spawn(move || writer.run(appends, &wake));
    let append = async |number, bytes| {
        let (reply, answer) = oneshot::channel();
        let events = vec![NewEvent { data: vec![b'1'; bytes], ..event(number) }];
        let append = Append { stream: "thing-1".into(), expected: Expected::Any, events, reply };
        queue.send(append).await.ok().unwrap();
        answer.await.unwrap()
    };
    let at = |revision, position| Ok(Appended { revision, position });
    assert_eq!(append(1, 1).await, at(0, 1));
    let refused = append(2, 100_000).await;
    assert_eq!(refused, Err(Error::Unwritable("no room is left on its disk".to_owned())));
    let room = async {
        while shared.is_full() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), room).await.unwrap();
    assert_eq!(append(3, 1).await, at(1, 2));
    assert_eq!(shared.stopped.get(), None);
    drop(queue);
    thread.join().unwrap();
}

#[tokio::test]
async fn a_log_says_that_it_cannot_be_written_for_as_long_as_there_is_no_room() {
    let (_dir, path) = place();
    let log = EmbeddedLog::open(&path).unwrap();
    log.shared.set_full(true);
    let full = Err(Error::Unwritable("no room is left on its disk".to_owned()));
    assert_eq!(log.writable(), full);
    assert_eq!(log.append("thing-1", Expected::Any, vec![event(1)]).await.map(drop), full);
    log.shared.set_full(false);
    assert_eq!(log.writable(), Ok(()));
    // The writer has not heard of it.
    log.shared.stop("a checkpoint", &"no disk");
    assert_eq!(log.writable(), Err(Error::Unwritable("a checkpoint failed: no disk".into())));
}

#[tokio::test]
async fn the_wal_is_written_back_while_the_log_is_open() {
    let (_dir, path) = place();
    let log = EmbeddedLog::open(&path).unwrap();
    for number in 1..=40_u128 {
        let large = NewEvent { data: vec![b'1'; 1 << 20], ..event(number) };
        log.append("thing-1", Expected::Any, vec![large]).await.unwrap();
    }
    let length = |suffix| std::fs::metadata(beside(&path, suffix)).unwrap().len();
    let written_back = async {
        while length("") < 30 << 20 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), written_back).await.unwrap();
    // More of it may be written back meanwhile; nothing is cut off.
    let both = || length("") + length("-wal");
    let (before, stats, after) = (both(), log.stats().await.unwrap(), both());
    assert!((before..=after).contains(&stats.bytes), "{before}, {stats:?}, {after}");
}

#[tokio::test]
async fn a_name_that_is_missing_harms_no_event_but_its_own() {
    let (_dir, path) = place();
    let log = EmbeddedLog::open(&path).unwrap();
    for number in 1..=200_u128 {
        let stream = format!("thing-{number}");
        log.append(&stream, Expected::Any, vec![event(number)]).await.unwrap();
    }
    let events = log.read_all(0, 200).await.unwrap();
    drop(log);
    raw(&path).execute_batch("DELETE FROM streams WHERE name = 'thing-100'").unwrap();
    let log = EmbeddedLog::open_read_only(&path).unwrap();
    assert_eq!(log.read_all(0, 99).await.unwrap(), events[..99]);
    assert_eq!(log.read_all(100, 100).await.unwrap(), events[100..]);
    // Among those that are known by now.
    assert_eq!(log.read_all(20, 60).await.unwrap(), events[20..80]);
    let missing = "its name is not among the streams";
    assert_eq!(log.read_all(90, 20).await, Err(bad(100, missing)));
    assert_eq!(log.verify().await, Err(bad(100, missing)));
}

#[tokio::test]
async fn of_a_log_of_many_segments_the_first_fault_is_named_or_the_first_after_what_is_believed() {
    let (_dir, path) = place();
    let log = EmbeddedLog::open(&path).unwrap();
    for number in 1..=30_u128 {
        let large = NewEvent { data: vec![b'1'; 100_000], ..event(number) };
        log.append("thing-1", Expected::Any, vec![large]).await.unwrap();
    }
    let whole = log.verify().await.unwrap();
    assert_eq!(whole.events, 30);
    let stranger = raw(&path);
    let alter = |position: u64| {
        let sql = "UPDATE events SET metadata = X'' WHERE position = ?1";
        stranger.execute(sql, [to_sql(position)]).unwrap();
    };
    alter(25);
    alter(5);
    let corrupt_at = |found: Result<Verified, Error>| match found {
        Err(Error::Corrupt { position, .. }) => position,
        other => panic!("not found: {other:?}"),
    };
    assert_eq!(corrupt_at(log.verify().await), 5);
    assert_eq!(corrupt_at(log.verify_after(5, |_| {}).await), 25);
    let told = Arc::new(Mutex::new(Vec::new()));
    let progress = {
        let told = told.clone();
        move |position| guard(&told).push(position)
    };
    let rest = log.verify_after(25, progress).await.unwrap();
    assert_eq!(rest, Verified { events: 5, head_hash: whole.head_hash });
    assert!(guard(&told).last() == Some(&30), "{told:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_appended_while_it_verifies_is_not_missing() {
    let (_dir, path) = place();
    let log = Arc::new(EmbeddedLog::open(&path).unwrap());
    fill(&log, 20).await;
    let (appending, runtime) = (Arc::clone(&log), tokio::runtime::Handle::current());
    let mut before = 0;
    // Right after the last page, which was empty.
    let one_more = move |walked| {
        if std::mem::replace(&mut before, walked) == walked {
            let append = appending.append("thing-7", Expected::Any, vec![event(99)]);
            runtime.block_on(append).unwrap();
        }
    };
    assert_eq!(log.verify_after(0, one_more).await.unwrap().events, 20);
    assert_eq!(log.verify().await.unwrap().events, 21);
}

#[tokio::test]
async fn an_index_that_says_otherwise_than_the_events_is_found() {
    let (_dir, path) = place();
    let log = EmbeddedLog::open(&path).unwrap();
    fill(&log, 20).await;
    let stranger = raw(&path);
    // Another index passes itself off as the one of the streams.
    stranger
        .execute_batch(
            "CREATE UNIQUE INDEX other ON events (stream_id, revision + 100 * (position = 13));
             PRAGMA writable_schema = ON;
             UPDATE sqlite_schema SET rootpage = (SELECT rootpage FROM sqlite_schema
                 WHERE name = 'other') WHERE name = 'events_by_stream';
             DELETE FROM sqlite_schema WHERE name = 'other';",
        )
        .unwrap();
    drop(stranger);
    let found = log.verify().await.unwrap_err();
    assert!(matches!(found, Error::Corrupt { position: 0, .. }), "{found}");
}

#[test]
fn the_head_wakes_who_waits_only_when_it_moves() {
    let shared = Shared::new(3);
    let mut head = shared.head.subscribe();
    for (to, moved, position) in [(3, false, 3), (2, false, 3), (4, true, 4)] {
        head.mark_unchanged();
        shared.advance(to);
        assert_eq!((head.has_changed().unwrap(), *head.borrow()), (moved, position), "{to}");
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
            tokio::spawn(
                async move { log.append("thing-1", Expected::Any, vec![event(number)]).await },
            )
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
        let answers = writer.commit(&mut [append(number)]).unwrap();
        let revision = u64::try_from(number).unwrap() - 1;
        assert_eq!(answers, [Ok(Appended { revision, position: revision + 1 })]);
    }
    let mut remembered_after = |name: String| {
        writer.remember(&name.into(), StreamEnd { id: 0, last: 0 });
        writer.streams.len()
    };
    let mut counts =
        (2..=KNOWN_STREAMS).map(|count| remembered_after(format!("other-{count}")) == count);
    assert!(counts.all(|one| one));
    assert!(remembered_after("more".into()) <= KNOWN_STREAMS);
}

#[tokio::test]
async fn what_is_read_from_memory_equals_what_is_read_from_the_file() {
    let (_dir, path) = place();
    let log = EmbeddedLog::open(&path).unwrap();
    // More than is kept in memory, with times finer than the file keeps.
    for batch in 0..10_u128 {
        let events = (1..=1000).map(|i| NewEvent {
            time: DateTime::from_timestamp_nanos(1_700_000_000_123_456_789),
            ..event(batch * 1000 + i)
        });
        log.append(&format!("thing-{batch}"), Expected::NoStream, events.collect()).await.unwrap();
    }
    let stranger = EmbeddedLog::open_read_only(&path).unwrap();
    for after in [0, 1, 1807, 1808, 1809, 5000, 9990, 9999, 10_000, 10_001] {
        for limit in [1, 20, 10_000] {
            let (ours, theirs) = (log.read_all(after, limit), stranger.read_all(after, limit));
            assert_eq!(ours.await.unwrap(), theirs.await.unwrap(), "{limit} after {after}");
        }
    }
}

impl Writer {
    fn open_new(path: &Path) -> Self {
        create(path).unwrap();
        Self::open(path).unwrap()
    }
}
