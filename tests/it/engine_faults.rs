//! The log over PostgreSQL when the server crashes, the connection is cut or the answers are slow:
//! what was acknowledged is there, nothing is there twice, and all goes on by itself.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use t2m::log::{Appended, Deadlines, Error, EventLog, Expected, NewEvent, PostgresLog};
use uuid::Uuid;

use crate::engines::{event, ids, in_turn};
use crate::postgres::{Postgres, Proxy, SHORT};

/// Holds within a minute.
pub async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    for _ in 0..600 {
        if holds().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("never: {what}");
}

/// Appends, again and again with the same ids while the outcome is unknown.
async fn settle(log: &PostgresLog, stream: &str, expected: Expected, id: u128) -> Appended {
    loop {
        match log.append(stream, expected, vec![event(id)]).await {
            Ok(answer) => return answer,
            Err(Error::Unwritable(_)) => tokio::time::sleep(Duration::from_millis(50)).await,
            Err(error) => panic!("{stream}: {error}"),
        }
    }
}

/// All events of the log; no id is there twice.
async fn all(log: &PostgresLog) -> HashMap<Uuid, u64> {
    let events = log.read_all(0, 1_000_000).await.unwrap();
    let ids: HashMap<Uuid, u64> = events.iter().map(|e| (e.id, e.position)).collect();
    assert_eq!(ids.len(), events.len(), "an event is there twice");
    ids
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_server_that_crashes_under_load_loses_and_doubles_nothing() {
    const CLIENTS: u64 = 16;
    let server = Postgres::start_own();
    let log = PostgresLog::open_with(&server.address("postgres"), SHORT).await.unwrap();
    let (log, stop) = (Arc::new(log), Arc::new(AtomicBool::new(false)));
    let counter = Arc::new(AtomicU64::new(0));
    let clients: Vec<_> = (0..CLIENTS)
        .map(|client| {
            let (log, stop, counter) = (log.clone(), stop.clone(), counter.clone());
            tokio::spawn(async move {
                let (stream, mut acknowledged) = (format!("client-{client}"), Vec::new());
                while !stop.load(Ordering::Relaxed) {
                    let number = acknowledged.len() as u64;
                    let end = match (client % 2, number) {
                        (0, _) => Expected::Any,
                        (_, 0) => Expected::NoStream,
                        (_, length) => Expected::Revision(length - 1),
                    };
                    let id = u128::from(client << 32 | number);
                    let answer = settle(&log, &stream, end, id).await;
                    assert_eq!(answer.revision, number, "{stream} has each event once");
                    acknowledged.push((Uuid::from_u128(id), answer.position));
                    counter.fetch_add(1, Ordering::Relaxed);
                }
                acknowledged
            })
        })
        .collect();
    for _ in 0..3 {
        let before = counter.load(Ordering::Relaxed);
        until("the clients go on", async || counter.load(Ordering::Relaxed) > before + 300).await;
        server.crash();
        server.start_again();
    }
    let before = counter.load(Ordering::Relaxed);
    until("the clients go on", async || counter.load(Ordering::Relaxed) > before + 300).await;
    stop.store(true, Ordering::Relaxed);
    let mut acknowledged = Vec::new();
    for client in clients {
        acknowledged.extend(client.await.unwrap());
    }
    let there = all(&log).await;
    assert_eq!(there, acknowledged.into_iter().collect());
    assert_eq!(log.verify().await.unwrap().events, there.len() as u64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wherever_the_connection_is_cut_an_append_happens_once() {
    let server = Postgres::shared();
    let database = server.database().await;
    let proxy = Proxy::to(server).await;
    // Nothing but the append passes meanwhile.
    let deadlines = Deadlines { poll: Duration::from_secs(600), ..SHORT };
    let log = PostgresLog::open_with(&proxy.address(&database), deadlines).await.unwrap();
    let (mut cut, mut number) = (0, 0_u64);
    // An append alone is about two kilobytes of questions and answers; beyond, nothing is cut.
    for bytes in (0..2600).step_by(13) {
        // Written over a new connection, perhaps; the next goes over the same.
        settle(&log, "calm", Expected::Any, u128::from(1_000_000 + number)).await;
        proxy.cut_after(bytes);
        let expected = match number % 3 {
            0 => Expected::Any,
            _ => number.checked_sub(1).map_or(Expected::NoStream, Expected::Revision),
        };
        let answer = settle(&log, "thing", expected, u128::from(number)).await;
        assert_eq!(answer.revision, number, "cut after {bytes} bytes");
        cut += u64::from(proxy.was_cut());
        proxy.cut_after(u64::MAX);
        number += 1;
    }
    assert!(cut > 50, "{cut} cuts are too few to say anything");
    assert!(cut < number, "the largest counts are beyond an append's end");
    let there = all(&log).await;
    assert_eq!(there.len() as u64, 2 * number);
    assert_eq!(log.verify().await.unwrap().events, 2 * number);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_can_be_reached_and_takes_no_append_is_not_writable_until_it_does() {
    let server = Postgres::shared();
    let database = server.database().await;
    let log = PostgresLog::open_with(&server.address(&database), SHORT).await.unwrap();
    settle(&log, "thing", Expected::NoStream, 1).await;
    let inside = server.client(&database).await;
    let refuse = "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql
                  AS $$ BEGIN RAISE EXCEPTION 'no room for it'; END $$;
                  CREATE TRIGGER refuse BEFORE INSERT ON t2m.events EXECUTE FUNCTION refuse()";
    inside.batch_execute(refuse).await.unwrap();
    let answer = log.append("thing", Expected::Revision(0), vec![event(2)]).await;
    let is_told = |why: &str| why.contains("no room for it");
    assert!(matches!(&answer, Err(Error::Unwritable(why)) if is_told(why)), "{answer:?}");
    // Each try costs a connection.
    let mut connections = HashSet::new();
    until("it was tried again and again", async || {
        assert!(log.writable().is_err());
        let of_log = "SELECT pid FROM pg_stat_activity WHERE datname = $1";
        let rows = inside.query(of_log, &[&database]).await.unwrap();
        connections.extend(rows.iter().map(|row| row.get::<_, i32>(0)));
        connections.len() > 6
    })
    .await;
    inside.batch_execute("DROP TRIGGER refuse ON t2m.events").await.unwrap();
    until("it is writable again", async || log.writable().is_ok()).await;
    assert_eq!(settle(&log, "thing", Expected::Revision(0), 2).await.revision, 1);
    assert_eq!(log.verify().await.unwrap().events, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_answers_make_writes_unavailable_until_they_are_fast_again() {
    let server = Postgres::shared();
    let database = server.database().await;
    let proxy = Proxy::to(server).await;
    let log = PostgresLog::open_with(&proxy.address(&database), SHORT).await.unwrap();
    settle(&log, "thing", Expected::NoStream, 1).await;
    proxy.hold_answers(SHORT.statement * 3);
    let answer = log.append("thing", Expected::Revision(0), vec![event(2)]).await;
    assert!(matches!(answer, Err(Error::Unwritable(_))), "{answer:?}");
    assert!(matches!(log.writable(), Err(Error::Unwritable(_))));
    let read = log.read_stream("thing", 0, 10).await;
    assert!(matches!(read, Err(Error::Storage(_))), "{read:?}");
    proxy.hold_answers(Duration::ZERO);
    until("it is writable again", async || log.writable().is_ok()).await;
    let settled = settle(&log, "thing", Expected::Revision(0), 2).await;
    assert_eq!(settled.revision, 1);
    assert_eq!(log.read_stream("thing", 0, 10).await.unwrap().len(), 2);
    assert_eq!(log.verify().await.unwrap().events, 2);
}

#[tokio::test]
async fn an_idle_log_notices_that_its_server_went_and_came_back() {
    let server = Postgres::start_own();
    let log = PostgresLog::open_with(&server.address("postgres"), SHORT).await.unwrap();
    settle(&log, "thing", Expected::Any, 1).await;
    server.crash();
    until("it is not writable", async || log.writable().is_err()).await;
    let answer = log.append("thing", Expected::Any, vec![event(2)]).await;
    assert!(matches!(answer, Err(Error::Unwritable(_))), "{answer:?}");
    assert!(matches!(log.read_stream("thing", 0, 1).await, Err(Error::Storage(_))));
    // What this node wrote it still knows.
    assert_eq!(log.read_all(0, 1).await.unwrap().len(), 1);
    server.start_again();
    until("it is writable again", async || log.writable().is_ok()).await;
    assert_eq!(settle(&log, "thing", Expected::Any, 2).await.revision, 1);
    assert_eq!(log.read_stream("thing", 0, 10).await.unwrap().len(), 2);
}

#[tokio::test]
async fn a_node_that_hangs_in_a_commit_holds_up_the_others_for_a_moment_only() {
    let server = Postgres::shared();
    let database = server.database().await;
    let address = server.address(&database);
    let log = PostgresLog::open_with(&address, SHORT).await.unwrap();
    settle(&log, "thing", Expected::Any, 1).await;
    // The lock as a node has it, with the settings of a node, which goes silent.
    let hanging = server.client(&database).await;
    let timeout = SHORT.statement.as_millis();
    let set = format!("SET idle_in_transaction_session_timeout = {timeout}");
    hanging.batch_execute(&set).await.unwrap();
    hanging
        .batch_execute(&format!(
            "BEGIN; SELECT pg_advisory_xact_lock({})",
            0x0054_324d_206c_6f67_i64
        ))
        .await
        .unwrap();
    assert_eq!(settle(&log, "thing", Expected::Any, 2).await.revision, 1);
}

#[tokio::test]
async fn a_failed_insert_is_refused_and_leaves_no_trace() {
    let server = Postgres::shared();
    let database = server.database().await;
    let log = PostgresLog::open_with(&server.address(&database), SHORT).await.unwrap();
    settle(&log, "thing", Expected::Any, 1).await;
    let stranger = server.client(&database).await;
    let fault = "CREATE FUNCTION fault() RETURNS trigger LANGUAGE plpgsql
                 AS $$ BEGIN RAISE 'the disk is full'; END $$;
                 CREATE TRIGGER fault BEFORE INSERT ON t2m.events EXECUTE FUNCTION fault()";
    stranger.batch_execute(fault).await.unwrap();
    let batch: Vec<NewEvent> = (2..5).map(event).collect();
    let answer = log.append("other", Expected::NoStream, batch.clone()).await;
    assert!(matches!(&answer, Err(Error::Unwritable(why)) if why.contains("the disk is full")));
    assert_eq!(log.read_all(0, 10).await.unwrap().len(), 1);
    stranger.batch_execute("DROP TRIGGER fault ON t2m.events").await.unwrap();
    until("it is writable again", async || log.writable().is_ok()).await;
    let answer = log.append("other", Expected::NoStream, batch).await;
    assert_eq!(answer, Ok(Appended { revision: 2, position: 4 }));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_appends_in_turn_the_first_ones_are_there_when_the_server_goes_in_the_middle() {
    let server = Postgres::start_own();
    let log = PostgresLog::open_with(&server.address("postgres"), SHORT).await.unwrap();
    let log = Arc::new(log);
    let mut there = 0;
    for round in 1..=3_u128 {
        let appending = {
            let log = Arc::clone(&log);
            tokio::spawn(async move { log.append_in_turn(in_turn(there + 1..=there + 4000)).await })
        };
        let mut head = log.head();
        head.wait_for(|head| u128::from(*head) > there).await.unwrap();
        server.crash();
        let (at, error) = appending.await.unwrap().expect_err("more were to come");
        assert!(matches!(error, Error::Unwritable(_)), "{error}");
        server.start_again();
        until("it can be written", async || log.writable().is_ok()).await;
        // A commit whose answer was lost may be there, too: one who comes anew sees it.
        let anew = PostgresLog::open_with(&server.address("postgres"), SHORT).await.unwrap();
        let found = ids(&anew).await;
        assert!(found.len() as u128 >= there + at as u128, "{} after {at}", found.len());
        assert_eq!(found, (1..=found.len() as u128).collect::<Vec<_>>(), "round {round}");
        there = found.len() as u128;
    }
    // What was acknowledged can be read at once, be it only found there.
    log.append_in_turn(in_turn(there - 5..=there)).await.unwrap();
    assert_eq!(ids(&*log).await.len() as u128, there);
    log.append_in_turn(in_turn(there - 5..=there + 5)).await.unwrap();
    assert_eq!(ids(&*log).await.len() as u128, there + 5);
}
