//! How far ahead of a walk names are read, and what a page may not lack.

use super::*;
use crate::log::embedded::EmbeddedLog;
use crate::log::{EventLog, Expected, NewEvent};

const MOST: usize = 64;

/// Names with numbers from 1 on.
fn table(names: i64) -> Connection {
    let conn = Connection::open_in_memory().unwrap();
    conn.execute_batch("CREATE TABLE streams (id INTEGER PRIMARY KEY, name TEXT)").unwrap();
    let mut insert = conn.prepare("INSERT INTO streams VALUES (?1, ?2)").unwrap();
    for id in 1..=names {
        insert.execute(params![id, format!("thing-{id}")]).unwrap();
    }
    drop(insert);
    conn
}

/// Up to where names were read once these were asked for, each.
fn read_up_to(known: &mut Known<MOST>, conn: &Connection, ids: &[i64]) -> Vec<i64> {
    let ask = |id: &i64| {
        assert_eq!(known.name(conn, "streams", *id, 1).unwrap(), format!("thing-{id}"));
        known.next - 1
    };
    ids.iter().map(ask).collect()
}

#[test]
fn a_walk_has_twice_as_many_names_read_each_time_up_to_64() {
    let (conn, mut known) = (table(1000), Known::default());
    let walked = read_up_to(&mut known, &conn, &(1..=192).collect::<Vec<_>>());
    let mut ends = walked.clone();
    ends.dedup();
    assert_eq!(ends, [2, 6, 14, 30, 62, 126, 190, 254]);
    assert!(walked.iter().zip(1..).all(|(end, id)| *end >= id));
    // The table ends before as many.
    let ends = read_up_to(&mut known, &conn, &[255, 319, 383, 447, 511, 575, 639, 703, 767, 831]);
    assert_eq!(ends.last(), Some(&894));
    assert_eq!(read_up_to(&mut known, &conn, &[895, 959, 1000]), [958, 1000, 1000]);
    assert!(known.name(&conn, "streams", 1001, 7).is_err());
}

#[test]
fn whoever_jumps_begins_anew_and_one_name_from_before_breaks_no_walk() {
    let (conn, mut known) = (table(1000), Known::default());
    let mut ends = |ids: &[i64]| read_up_to(&mut known, &conn, ids);
    assert_eq!(ends(&[1, 3, 7, 900, 901]), [2, 6, 14, 900, 902]);
    assert_eq!(ends(&[500, 903]), [902, 906]);
    assert_eq!(ends(&[501, 502, 504]), [501, 503, 507], "a second one near it is another walk");
}

#[tokio::test]
async fn a_stream_that_lacks_an_event_is_not_read_past_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log.sqlite");
    let log = EmbeddedLog::open(&path).unwrap();
    for number in 1..=6 {
        let event = NewEvent {
            id: Uuid::from_u128(number),
            kind: "thing.happened.v1".to_owned(),
            time: DateTime::UNIX_EPOCH,
            data: b"{}".to_vec(),
            metadata: b"{}".to_vec(),
        };
        log.append(&format!("thing-{}", number % 2), Expected::Any, vec![event]).await.unwrap();
    }
    Connection::open(&path).unwrap().execute("DELETE FROM events WHERE position = 3", []).unwrap();
    let mut reader = Reader::open(&path).unwrap();
    assert_eq!(reader.stream_page("thing-1", 0, 1).unwrap().len(), 1);
    for from in [0, 1] {
        let found = reader.stream_page("thing-1", from, 10).unwrap_err();
        assert!(matches!(found, Error::Corrupt { position: 5, .. }), "{found:?}");
    }
    assert_eq!(reader.stream_page("thing-1", 2, 10).unwrap().len(), 1);
}
