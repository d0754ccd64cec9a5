//! The log over PostgreSQL: the contract, many nodes on one log, and what is refused at its opening.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use chrono::DateTime;
use t2m::log::{
    self, Appended, EmbeddedLog, Error, EventLog, Expected, NewEvent, PostgresLog, ToAppend,
    conformance,
};
use uuid::Uuid;

use crate::postgres::{Postgres, SHORT, free_port};

pub fn event(number: u128) -> NewEvent {
    NewEvent {
        id: Uuid::from_u128(number),
        kind: format!("thing.happened.v{}", number % 2),
        time: DateTime::from_timestamp_micros(1_700_000_000_000_000).unwrap(),
        data: format!(r#"{{"n":{number}}}"#).into_bytes(),
        metadata: b"{}".to_vec(),
    }
}

async fn open(address: &str) -> PostgresLog {
    PostgresLog::open_with(address, SHORT).await.expect("the log opens")
}

async fn refused(address: &str) -> String {
    match PostgresLog::open_with(address, SHORT).await {
        Ok(_) => panic!("it was opened"),
        Err(error @ (Error::Foreign(_) | Error::Invalid(_))) => error.to_string(),
        Err(error) => panic!("not a refusal: {error:?}"),
    }
}

/// `count` events, alternating between two streams.
async fn fill(log: &PostgresLog, count: u128) {
    for number in 1..=count {
        let stream = format!("thing-{}", number % 2);
        log.append(&stream, Expected::Any, vec![event(number)]).await.unwrap();
    }
}

#[tokio::test]
async fn the_contract_holds_on_one_thread() {
    let server = Postgres::shared();
    let address = server.address(&server.database().await);
    let log: Arc<dyn EventLog> = Arc::new(open(&address).await);
    conformance::run(async || log.clone()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_contract_holds_on_many_threads_and_a_handle_each() {
    let server = Postgres::shared();
    let address = server.address(&server.database().await);
    conformance::run(async || log::open(&address, "".as_ref()).await.unwrap()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_contract_holds_while_another_node_writes() {
    let server = Postgres::shared();
    let address = server.address(&server.database().await);
    let other = open(&address).await;
    let log: Arc<dyn EventLog> = Arc::new(open(&address).await);
    let noise = tokio::spawn(async move {
        for number in 1.. {
            other.append("noise", Expected::Any, vec![event(number)]).await.unwrap();
        }
    });
    conformance::run(async || log.clone()).await;
    noise.abort();
    assert!(noise.await.unwrap_err().is_cancelled(), "the other node went on well");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn four_nodes_race_without_a_lost_update_and_readers_skip_nothing() {
    const NODES: u64 = 4;
    const EACH: u64 = 60;
    let server = Postgres::shared();
    let address = server.address(&server.database().await);
    let reader = open(&address).await;
    let mut nodes = Vec::new();
    for node in 0..NODES {
        let log = open(&address).await;
        nodes.push(tokio::spawn(async move {
            let mut end = Expected::NoStream;
            for number in 0..EACH {
                let id = u128::from(node << 32 | number << 1);
                // A stream that all want, and one of its own.
                loop {
                    match log.append("wanted", end, vec![event(id)]).await {
                        Ok(answer) => break end = Expected::Revision(answer.revision),
                        Err(Error::Conflict { actual: Some(actual), .. }) => {
                            end = Expected::Revision(actual);
                        }
                        Err(error) => panic!("neither won nor lost: {error}"),
                    }
                }
                let own = number.checked_sub(1).map_or(Expected::NoStream, Expected::Revision);
                log.append(&format!("own-{node}"), own, vec![event(id + 1)]).await.unwrap();
            }
        }));
    }
    let (mut after, mut ids, mut head) = (0, HashSet::new(), reader.head());
    while ids.len() < usize::try_from(NODES * EACH * 2).unwrap() {
        let page = reader.read_all(after, 5).await.unwrap();
        for event in &page {
            assert_eq!(event.position, after + 1, "no event comes in behind a reader");
            after = event.position;
            assert!(ids.insert(event.id));
        }
        if page.is_empty() {
            let moved = head.wait_for(|head| *head > after);
            tokio::time::timeout(Duration::from_secs(60), moved).await.unwrap().unwrap();
        }
    }
    for node in nodes {
        node.await.unwrap();
    }
    let wanted = reader.read_stream("wanted", 0, 10_000).await.unwrap();
    assert_eq!(wanted.len() as u64, NODES * EACH);
    assert_eq!(reader.verify().await.unwrap().events, NODES * EACH * 2);
    assert_eq!(reader.stats().await.unwrap().streams, NODES + 1);
}

/// A log in a file that a transfer takes so many pieces for.
pub async fn filled(path: &std::path::Path, pieces: u128) {
    let log = EmbeddedLog::open(path).unwrap();
    for piece in 0..pieces {
        let events = (1..=1000).map(|number| event(piece * 1000 + number)).collect();
        log.append(&format!("piece-{piece}"), Expected::NoStream, events).await.unwrap();
    }
}

/// What one after the other has written, by its ids.
pub async fn ids(log: &dyn EventLog) -> Vec<u128> {
    log.read_all(0, 100_000).await.unwrap().iter().map(|event| event.id.as_u128()).collect()
}

/// An event each, in streams of their own.
pub fn in_turn(ids: std::ops::RangeInclusive<u128>) -> Vec<ToAppend> {
    let one = |id| ToAppend {
        stream: format!("turn-{id}").into(),
        expected: Expected::NoStream,
        events: vec![event(id)],
    };
    ids.map(one).collect()
}

#[tokio::test]
async fn of_appends_in_turn_none_is_written_after_one_that_failed() {
    let server = Postgres::shared();
    let log = open(&server.address(&server.database().await)).await;
    log.append("turn-301", Expected::NoStream, vec![event(9999)]).await.unwrap();
    let failed = log.append_in_turn(in_turn(1..=2000)).await;
    assert!(matches!(failed, Err((300, Error::Conflict { actual: Some(0), .. }))), "{failed:?}");
    let expected: Vec<u128> = std::iter::once(9999).chain(1..=300).collect();
    assert_eq!(ids(&log).await, expected);
    // Those that are there are the same once more, and others go on as ever.
    log.append_in_turn(in_turn(1..=300)).await.unwrap();
    log.append_in_turn(in_turn(302..=303)).await.unwrap();
    let mut long = in_turn(400..=410);
    long[5].events.clear();
    assert!(matches!(log.append_in_turn(long).await, Err((5, Error::Invalid(_)))));
    assert_eq!(ids(&log).await, [expected, vec![302, 303]].concat());
}

#[tokio::test]
async fn nodes_that_open_an_empty_database_together_make_one_log() {
    let server = Postgres::shared();
    let address = server.address(&server.database().await);
    let opened = futures_util::future::join_all((0..4).map(|_| open(&address))).await;
    for (number, log) in (1..).zip(&opened) {
        log.append("thing", Expected::Any, vec![event(number)]).await.unwrap();
    }
    assert_eq!(opened[0].verify().await.unwrap().events, 4);
}

#[tokio::test]
async fn a_node_is_woken_by_what_another_one_appends() {
    let server = Postgres::shared();
    let address = server.address(&server.database().await);
    let (one, other) = (open(&address).await, log::open_for_reading(&address, "".as_ref()));
    let other = other.await.unwrap();
    let mut head = other.head();
    fill(&one, 3).await;
    let moved = head.wait_for(|position| *position == 3);
    tokio::time::timeout(Duration::from_secs(10), moved).await.unwrap().unwrap();
    assert_eq!(other.read_all(0, 10).await, one.read_all(0, 10).await);
    let answer = other.append("thing-1", Expected::Any, vec![event(4)]).await;
    assert!(matches!(answer, Err(Error::Unwritable(_))));
    assert!(matches!(other.writable(), Err(Error::Unwritable(_))));
}

#[tokio::test]
async fn reopening_keeps_everything() {
    let server = Postgres::shared();
    let address = server.address(&server.database().await);
    let log = open(&address).await;
    fill(&log, 20).await;
    let before = log.read_all(0, 100).await.unwrap();
    drop(log);
    let log = open(&address).await;
    assert_eq!(*log.head().borrow(), 20);
    assert_eq!(log.read_all(0, 100).await.unwrap(), before);
    let again = log.append("thing-1", Expected::NoStream, vec![event(1)]).await;
    assert_eq!(again, Ok(Appended { revision: 0, position: 1 }));
    let next = log.append("thing-1", Expected::Revision(9), vec![event(21)]).await;
    assert_eq!(next, Ok(Appended { revision: 10, position: 21 }));
    assert_eq!(log.verify().await.unwrap().events, 21);
}

#[tokio::test]
async fn what_is_queued_is_written_before_the_log_closes() {
    let server = Postgres::shared();
    let address = server.address(&server.database().await);
    let log = Arc::new(open(&address).await);
    let waiting: Vec<_> = (1..=50)
        .map(|number| {
            let log = log.clone();
            tokio::spawn(async move { log.append("x", Expected::Any, vec![event(number)]).await })
        })
        .collect();
    tokio::task::yield_now().await;
    for append in waiting {
        append.abort();
        let _ = append.await;
    }
    tokio::task::spawn_blocking(move || drop(log)).await.unwrap();
    assert_eq!(open(&address).await.read_all(0, 100).await.unwrap().len(), 50);
}

#[tokio::test]
async fn every_alteration_is_found_at_its_position() {
    let alterations = [
        ("DELETE FROM t2m.events WHERE position = 7", 7),
        ("DELETE FROM t2m.events WHERE position = 1", 1),
        ("UPDATE t2m.events SET time = time + 1 WHERE position = 5", 5),
        ("UPDATE t2m.events SET data = '{}' WHERE position = 6", 6),
        ("UPDATE t2m.events SET hash = sha256(hash) WHERE position = 4", 4),
        ("UPDATE t2m.events SET hash = '' WHERE position = 4", 4),
        ("UPDATE t2m.events SET revision = 100 WHERE position = 8", 8),
        ("UPDATE t2m.events SET type_id = 3 - type_id WHERE position = 9", 9),
        ("UPDATE t2m.events SET stream_id = 77 WHERE position = 10", 10),
        ("UPDATE t2m.events SET position = 100 WHERE position = 11", 11),
        ("UPDATE t2m.streams SET name = 'thing-x' WHERE name = 'thing-0'", 2),
        ("UPDATE t2m.types SET name = 'thing.else.v1' WHERE name = 'thing.happened.v1'", 1),
    ];
    let server = Postgres::shared();
    let database = server.database().await;
    fill(&open(&server.address(&database)).await, 20).await;
    let mut stranger = server.client(&database).await;
    for (sql, bad) in alterations {
        stranger.batch_execute("CREATE TABLE kept AS TABLE t2m.events").await.unwrap();
        stranger.batch_execute(sql).await.unwrap();
        // A node that had read the log would stop as soon as its end moves.
        let found = open(&server.address(&database)).await.verify().await;
        assert!(
            matches!(found, Err(Error::Corrupt { position, .. }) if position == bad),
            "{sql}: {found:?}"
        );
        let back = stranger.transaction().await.unwrap();
        back.batch_execute(
            "TRUNCATE t2m.events; INSERT INTO t2m.events TABLE kept; DROP TABLE kept;
             UPDATE t2m.streams SET name = 'thing-0' WHERE name = 'thing-x';
             UPDATE t2m.types SET name = 'thing.happened.v1' WHERE name = 'thing.else.v1'",
        )
        .await
        .unwrap();
        back.commit().await.unwrap();
    }
    let log = open(&server.address(&database)).await;
    assert_eq!(log.verify().await.unwrap().events, 20);
}

#[tokio::test]
async fn a_log_that_was_cut_under_a_node_stops_it() {
    let server = Postgres::shared();
    let database = server.database().await;
    let log = open(&server.address(&database)).await;
    fill(&log, 10).await;
    let stranger = server.client(&database).await;
    stranger.batch_execute("DELETE FROM t2m.events WHERE position > 8").await.unwrap();
    // The next look at the end finds it, the append's or the follower's.
    let answer = log.append("thing-1", Expected::Any, vec![event(11)]).await;
    assert!(matches!(&answer, Err(Error::Unwritable(why)) if why.contains("cut")), "{answer:?}");
    assert!(matches!(log.read_all(0, 10).await, Err(Error::Storage(_))));
    assert!(matches!(log.read_stream("thing-1", 0, 1).await, Err(Error::Storage(_))));
    assert!(log.writable().is_err());
    drop(log);
    // Opened anew, it goes on with what there is.
    let log = open(&server.address(&database)).await;
    assert_eq!(log.append("thing-1", Expected::Any, vec![event(11)]).await.unwrap().position, 9);
}

#[tokio::test]
async fn what_cannot_be_this_log_is_refused_in_a_sentence_that_names_the_setting() {
    let server = Postgres::shared();
    let port = server.port();
    let (empty, foreign) = (server.database().await, server.database().await);
    let stranger = server.client(&foreign).await;
    stranger.batch_execute("CREATE SCHEMA t2m; CREATE TABLE t2m.log (x int)").await.unwrap();
    let newer = server.database().await;
    drop(open(&server.address(&newer)).await);
    server.client(&newer).await.batch_execute("UPDATE t2m.log SET version = 99").await.unwrap();
    let latin = server.database_with("ENCODING 'LATIN1'").await;
    let at = |who: &str, database: &str| format!("postgres://{who}@127.0.0.1:{port}/{database}");
    let admin = "postgres:postgres";
    for (address, because) in [
        (at("postgres:hunter2", &empty), "password authentication failed"),
        (at("nobody:hunter2", &empty), "password authentication failed"),
        (at(admin, "missing"), "does not exist"),
        (at(admin, &foreign), "not a T2M log; it was left as it is"),
        (at(admin, &newer), "version 99"),
        (at(admin, &latin), "encoding LATIN1"),
    ] {
        let sentence = refused(&address).await;
        assert!(sentence.starts_with("T2M_LOG: "), "{sentence}");
        assert!(sentence.contains(because), "{sentence}");
        assert!(!sentence.contains("hunter2"), "{sentence}");
    }
    let nothing = log::open_for_reading(&at(admin, &empty), "".as_ref()).await.err();
    assert!(matches!(nothing, Some(Error::Foreign(why)) if why.contains("holds no log")));
}

#[tokio::test]
async fn a_role_that_may_only_use_the_tables_can_work_with_them() {
    let server = Postgres::shared();
    let database = server.database().await;
    let address = server.address(&database);
    fill(&open(&address).await, 1).await;
    let sql =
        "CREATE ROLE user_of_t2m LOGIN PASSWORD 'pw'; GRANT USAGE ON SCHEMA t2m TO user_of_t2m;
               GRANT SELECT, INSERT ON ALL TABLES IN SCHEMA t2m TO user_of_t2m";
    server.client(&database).await.batch_execute(sql).await.unwrap();
    let address = format!("postgres://user_of_t2m:pw@127.0.0.1:{}/{database}", server.port());
    let log = open(&address).await;
    fill(&log, 3).await;
    assert_eq!(log.verify().await.unwrap().events, 3);
}

#[tokio::test]
async fn a_server_that_is_not_there_is_waited_for_up_to_a_limit() {
    let deadlines = t2m::log::Deadlines { start: Duration::from_millis(300), ..SHORT };
    let address = format!("postgres://me:hunter2@127.0.0.1:{}/d", free_port());
    let Err(error) = PostgresLog::open_with(&address, deadlines).await else { panic!("opened") };
    assert!(matches!(error, Error::Storage(_)));
    let sentence = error.to_string();
    assert!(sentence.contains("T2M_LOG: database `d` at 127.0.0.1:"), "{sentence}");
    assert!(sentence.contains("could not be reached within"), "{sentence}");
    assert!(!sentence.contains("hunter2"), "{sentence}");
}
