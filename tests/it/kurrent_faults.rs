//! The log over KurrentDB when connections are cut, answers are slow or missing, and leaders change:
//! what was acknowledged is there, nothing is there twice, and all goes on by itself.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use t2m::log::{self, Appended, Deadlines, Error, EventLog, Expected, KurrentLog};
use uuid::Uuid;

use crate::engine_faults::until;
use crate::engines::event;
use crate::kurrent::{SHORT, open, real};
use crate::standin::{Age, Cluster, Fault, Node};

/// Appends, again and again with the same ids while the outcome is unknown.
async fn settle(log: &dyn EventLog, stream: &str, expected: Expected, id: u128) -> Appended {
    loop {
        match log.append(stream, expected, vec![event(id)]).await {
            Ok(answer) => return answer,
            Err(Error::Unwritable(_)) => tokio::time::sleep(Duration::from_millis(50)).await,
            Err(error) => panic!("{stream}: {error}"),
        }
    }
}

#[tokio::test]
async fn an_append_happens_once_whatever_befalls_it() {
    let faults = [
        Fault::CutBefore,
        Fault::CutAfter,
        Fault::TimeoutBefore,
        Fault::TimeoutAfter,
        Fault::WrittenLate(Duration::from_millis(10)),
        Fault::WrittenLate(Duration::from_millis(300)),
        Fault::NotReady,
    ];
    for age in [Age::Old, Age::New] {
        let node = Node::start(age).await;
        let log = open(&node.address()).await;
        let mut number = 0_u64;
        for any in [false, true] {
            for fault in faults {
                node.next_append(fault);
                let expected = match any {
                    true => Expected::Any,
                    false => number.checked_sub(1).map_or(Expected::NoStream, Expected::Revision),
                };
                // One fault passes before the append is given up.
                let answer = log.append("thing", expected, vec![event(number.into())]).await;
                assert_eq!(answer.unwrap().revision, number, "{fault:?}");
                assert_eq!(log.writable(), Ok(()));
                number += 1;
            }
        }
        assert_eq!(node.store().stream("thing").len() as u64, number);
        assert_eq!(log.read_all(0, 100).await.unwrap().len() as u64, number);
        assert_eq!(log.verify().await.unwrap().events, number);
    }
}

#[tokio::test]
async fn an_append_whose_outcome_stays_unknown_is_settled_by_its_repeat() {
    let node = Node::start(Age::Old).await;
    let log = open(&node.address()).await;
    settle(&log, "thing", Expected::NoStream, 1).await;
    // More than there is time for; the first is written long after everybody has given up.
    node.next_append(Fault::WrittenLate(SHORT.settle * 2));
    (0..10).for_each(|_| node.next_append(Fault::TimeoutBefore));
    let answer = log.append("thing", Expected::Revision(0), vec![event(2)]).await;
    assert!(matches!(&answer, Err(Error::Unwritable(why)) if why.contains("timed out")));
    until("it is written", async || node.store().stream("thing").len() == 2).await;
    assert_eq!(settle(&log, "thing", Expected::Revision(0), 2).await.revision, 1);
    assert_eq!(log.read_stream("thing", 0, 10).await.unwrap().len(), 2);
    assert_eq!(log.verify().await.unwrap().events, 2);
}

#[tokio::test]
async fn the_same_ids_with_another_content_from_two_nodes_do_not_break_the_chain() {
    let node = Node::start(Age::Old).await;
    let (one, other) = (open(&node.address()).await, open(&node.address()).await);
    let mut late = event(1);
    late.data = b"{\"by\":\"the other\"}".to_vec();
    let first = one.append("thing", Expected::NoStream, vec![event(1)]).await.unwrap();
    assert_eq!(other.append("thing", Expected::NoStream, vec![late]).await.unwrap(), first);
    other.append("thing", Expected::Revision(0), vec![event(2)]).await.unwrap();
    assert_eq!(other.verify().await.unwrap().events, 2);
}

#[tokio::test]
async fn slow_answers_make_writes_unavailable_until_they_are_fast_again() {
    let node = Node::start(Age::Old).await;
    let log = open(&node.address()).await;
    settle(&log, "thing", Expected::NoStream, 1).await;
    node.slow(SHORT.statement * 3);
    let answer = log.append("thing", Expected::Revision(0), vec![event(2)]).await;
    assert!(matches!(answer, Err(Error::Unwritable(_))), "{answer:?}");
    until("it is not writable", async || log.writable().is_err()).await;
    let read = log.read_stream("thing", 0, 10).await;
    assert!(matches!(read, Err(Error::Storage(_))), "{read:?}");
    node.slow(Duration::ZERO);
    until("it is writable again", async || log.writable().is_ok()).await;
    assert_eq!(settle(&log, "thing", Expected::Revision(0), 2).await.revision, 1);
    assert_eq!(log.read_stream("thing", 0, 10).await.unwrap().len(), 2);
    assert_eq!(log.verify().await.unwrap().events, 2);
}

#[tokio::test]
async fn a_server_that_answers_and_takes_no_append_is_not_writable_until_it_does() {
    let node = Node::start(Age::New).await;
    let log = open(&node.address()).await;
    settle(&log, "thing", Expected::NoStream, 1).await;
    (0..10).for_each(|_| node.next_append(Fault::TimeoutBefore));
    let answer = log.append("thing", Expected::Revision(0), vec![event(2)]).await;
    assert!(matches!(&answer, Err(Error::Unwritable(why)) if why.contains("timed out")));
    until("it takes appends", async || {
        let writable = log.writable();
        assert_eq!(log.read_stream("thing", 0, 10).await.unwrap().len(), 1);
        let is_healed = node.faults_left() == 0;
        assert!(is_healed || writable.is_err());
        is_healed
    })
    .await;
    until("it is writable again", async || log.writable().is_ok()).await;
    // By what was tried the log is neither shorter nor longer, for who opens it then either.
    let first = log.read_all(0, 10).await.unwrap();
    assert_eq!(first.len(), 1);
    for number in 1..3 {
        let other = open(&node.address()).await;
        assert_eq!(other.read_all(0, 1).await.unwrap(), first);
        assert_eq!(other.end().await.unwrap(), *other.head().borrow());
        assert_eq!(other.verify().await.unwrap().events, number);
        if number == 1 {
            settle(&log, "thing", Expected::Revision(0), 2).await;
        }
    }
}

#[tokio::test]
async fn a_server_that_hangs_is_noticed_and_waited_for() {
    let node = Node::start(Age::New).await;
    let log = open(&node.address()).await;
    settle(&log, "thing", Expected::NoStream, 1).await;
    assert_eq!(log.read_all(0, 1).await.unwrap().len(), 1);
    node.set_hangs(true);
    until("it is not writable", async || log.writable().is_err()).await;
    assert_eq!(log.read_all(0, 1).await.unwrap().len(), 1, "what was read is known");
    node.set_hangs(false);
    until("it is writable again", async || log.writable().is_ok()).await;
    assert_eq!(settle(&log, "thing", Expected::Any, 2).await.revision, 1);
}

#[tokio::test]
async fn a_server_that_is_down_at_the_start_is_waited_for() {
    let node = Node::start(Age::Old).await;
    node.down();
    let address = node.address();
    let opening = tokio::spawn(async move { open(&address).await });
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(!opening.is_finished());
    node.up();
    let log = opening.await.unwrap();
    assert_eq!(settle(&log, "thing", Expected::NoStream, 1).await.revision, 0);
}

#[tokio::test]
async fn an_idle_log_notices_that_its_server_went_and_came_back() {
    let node = Node::start(Age::New).await;
    let log = open(&node.address()).await;
    settle(&log, "thing", Expected::Any, 1).await;
    node.down();
    until("it is not writable", async || log.writable().is_err()).await;
    let answer = log.append("thing", Expected::Any, vec![event(2)]).await;
    assert!(matches!(answer, Err(Error::Unwritable(_))), "{answer:?}");
    assert!(matches!(log.read_stream("thing", 0, 1).await, Err(Error::Storage(_))));
    node.up();
    until("it is writable again", async || log.writable().is_ok()).await;
    assert_eq!(settle(&log, "thing", Expected::Any, 2).await.revision, 1);
}

#[tokio::test]
async fn a_subscription_that_ends_or_falls_silent_does_not_stop_the_head() {
    let node = Node::start(Age::Old).await;
    let (log, other) = (open(&node.address()).await, open(&node.address()).await);
    let mut head = log.head();
    for number in 1..=12_u128 {
        match number % 3 {
            0 => node.end_subscriptions(),
            number => node.set_mute(number == 1),
        }
        let position = settle(&other, "thing", Expected::Any, number).await.position;
        let moved = head.wait_for(|head| *head >= position);
        tokio::time::timeout(Duration::from_secs(20), moved).await.unwrap().unwrap();
    }
    assert_eq!(log.read_all(0, 100).await.unwrap().len(), 12);
}

#[tokio::test]
async fn a_subscription_that_ends_without_a_fault_is_renewed_though_nothing_is_appended() {
    let node = Node::start(Age::Old).await;
    let _log = open(&node.address()).await;
    for count in 1..=3 {
        until("there is a subscription", async || node.subscriptions() == count).await;
        // It is to be confirmed, lest its end be a failure to begin.
        tokio::time::sleep(SHORT.poll * 2).await;
        node.end_subscriptions();
    }
    until("there is a subscription", async || node.subscriptions() == 4).await;
}

#[tokio::test]
async fn another_log_or_less_of_it_stops_the_handle_for_good() {
    for is_other in [true, false] {
        let node = Node::start(Age::Old).await;
        let log = open(&node.address()).await;
        for number in 1..=4 {
            settle(&log, "thing", Expected::Any, number).await;
        }
        let end = *log.head().borrow();
        // The last one is to have been read.
        until("it was read", async || log.read_all(0, 10).await.unwrap().len() == 4).await;
        tokio::time::sleep(SHORT.poll * 3).await;
        node.down();
        until("it is not writable", async || log.writable().is_err()).await;
        match is_other {
            true => {
                node.store().clear();
                let another = Node::start(Age::Old).await;
                drop(open(&another.address()).await);
                node.store().write(another.store().stream("~t2m"));
            }
            false => node.store().cut(end),
        }
        node.up();
        let told = if is_other { "holds another log now" } else { "no longer has the event at" };
        let stopped = |why: &str| why.contains(told);
        until(
            "it stops",
            async || matches!(log.writable(), Err(Error::Unwritable(why)) if stopped(&why)),
        )
        .await;
        let answer = log.append("thing", Expected::Any, vec![event(9)]).await;
        assert!(matches!(answer, Err(Error::Unwritable(_))), "{answer:?}");
        assert!(matches!(log.read_all(0, 1).await, Err(Error::Storage(_))));
        assert!(matches!(log.read_stream("thing", 0, 1).await, Err(Error::Storage(_))));
        drop(log);
        // Opened anew, it goes on with what there is.
        let log = open(&node.address()).await;
        let there = if is_other { 0 } else { 3 };
        assert_eq!(
            log.append("thing", Expected::Any, vec![event(9)]).await.unwrap().revision,
            there
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_change_of_leaders_under_load_loses_and_doubles_nothing() {
    for age in [Age::Old, Age::New] {
        let cluster = Cluster::start(3, age).await;
        let log = Arc::new(open(&cluster.address()).await);
        let load = Load::start(log.clone(), 0, 8);
        for step in 1..=4 {
            load.goes_on(50).await;
            let (old, new) = ((step - 1) % 3, step % 3);
            // By turns the leader resigns, and is killed; it is back before the next one is.
            cluster.nodes.iter().for_each(|node| node.up());
            if step % 2 == 0 {
                cluster.nodes[old].down();
            }
            cluster.lead(new);
        }
        load.goes_on(50).await;
        load.end(&*log).await;
    }
}

/// For who kills leaders meanwhile: the load goes on for `T2M_TEST_ESDB_SECONDS`, 5 if it is not set.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_real_server_loses_and_doubles_nothing_whatever_befalls_it() {
    let Some(address) = real() else { return };
    let seconds = std::env::var("T2M_TEST_ESDB_SECONDS").ok().and_then(|text| text.parse().ok());
    let log: Arc<dyn EventLog> = log::open(&address, "".as_ref()).await.unwrap();
    let load = Load::start(log.clone(), *log.head().borrow(), 16);
    tokio::time::sleep(Duration::from_secs(seconds.unwrap_or(5))).await;
    load.goes_on(10).await;
    load.end(&*log).await;
}

/// Clients that append without a pause, each to a stream of its own.
struct Load {
    stop: Arc<AtomicBool>,
    counter: Arc<AtomicU64>,
    clients: Vec<tokio::task::JoinHandle<Vec<(Uuid, u64)>>>,
    run: u32,
    /// Where the log ended before.
    since: u64,
}

impl Load {
    fn start(log: Arc<dyn EventLog>, since: u64, clients: u64) -> Self {
        let (stop, run): (Arc<AtomicBool>, u32) = (Arc::default(), rand::random());
        let counter = Arc::new(AtomicU64::new(0));
        let clients = (0..clients)
            .map(|client| {
                let (log, stop, counter) = (log.clone(), stop.clone(), counter.clone());
                tokio::spawn(async move {
                    let (stream, mut done) = (format!("load-{run}-{client}"), Vec::new());
                    while !stop.load(Ordering::Relaxed) {
                        let number = done.len() as u64;
                        let end = match (client % 2, number) {
                            (0, _) => Expected::Any,
                            (_, 0) => Expected::NoStream,
                            (_, length) => Expected::Revision(length - 1),
                        };
                        let id = u128::from(run) << 64 | u128::from(client << 32 | number);
                        let answer = settle(&*log, &stream, end, id).await;
                        assert_eq!(answer.revision, number, "{stream} has each event once");
                        done.push((Uuid::from_u128(id), answer.position));
                        counter.fetch_add(1, Ordering::Relaxed);
                    }
                    done
                })
            })
            .collect();
        Self { stop, counter, clients, run, since }
    }

    /// Waits for so many more appends.
    async fn goes_on(&self, count: u64) {
        let wanted = self.counter.load(Ordering::Relaxed) + count;
        until("the clients go on", async || self.counter.load(Ordering::Relaxed) >= wanted).await;
    }

    /// Holds what was acknowledged against what is there.
    async fn end(self, log: &dyn EventLog) {
        self.stop.store(true, Ordering::Relaxed);
        let mut acknowledged = HashMap::new();
        for client in self.clients {
            acknowledged.extend(client.await.unwrap());
        }
        let events = log.read_all(self.since, usize::MAX).await.unwrap();
        assert!(events.windows(2).all(|pair| pair[0].position < pair[1].position));
        let mut there = HashMap::new();
        for event in events.iter().filter(|it| it.id.as_u128() >> 64 == u128::from(self.run)) {
            assert_eq!(there.insert(event.id, event.position), None, "it is there twice");
        }
        assert_eq!(there, acknowledged);
        log.verify().await.unwrap();
    }
}

#[tokio::test]
async fn a_log_that_cannot_be_reached_any_more_is_closed_within_its_deadlines() {
    let node = Node::start(Age::Old).await;
    let deadlines = Deadlines { settle: Duration::from_millis(200), ..SHORT };
    let log = Arc::new(KurrentLog::open_with(&node.address(), deadlines).await.unwrap());
    node.down();
    let appending = tokio::spawn({
        let log = log.clone();
        async move { log.append("thing", Expected::Any, vec![event(1)]).await }
    });
    assert!(matches!(appending.await.unwrap(), Err(Error::Unwritable(_))));
    let closing = tokio::task::spawn_blocking(move || drop(log));
    tokio::time::timeout(Duration::from_secs(20), closing).await.unwrap().unwrap();
}
