//! The log over KurrentDB: the contract, many nodes on one log, what is refused at its opening, and
//! what verification finds. Over the stand-in, and over a real server that `T2M_TEST_ESDB` names.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use t2m::log::conformance::{self, Kind};
use t2m::log::{self, Appended, Deadlines, Error, EventLog, Expected, KurrentLog};
use uuid::Uuid;

use crate::engines::event;
use crate::postgres::free_port;
use crate::standin::store::{Kept, MAX_APPEND};
use crate::standin::{Age, Cluster, Node};

/// Deadlines with which a test of faults does not wait long.
pub const SHORT: Deadlines = Deadlines {
    start: Duration::from_secs(60),
    connect: Duration::from_millis(1500),
    statement: Duration::from_millis(1500),
    settle: Duration::from_millis(700),
    poll: Duration::from_millis(100),
};

pub async fn open(address: &str) -> KurrentLog {
    KurrentLog::open_with(address, SHORT).await.expect("the log opens")
}

/// The real server's address; none, aloud, when there is none.
pub fn real() -> Option<String> {
    let address = std::env::var("T2M_TEST_ESDB").ok().filter(|address| !address.is_empty());
    if address.is_none() {
        eprintln!("skipped: T2M_TEST_ESDB names no KurrentDB server");
    }
    address
}

async fn refused(address: &str) -> String {
    match KurrentLog::open_with(address, SHORT).await {
        Ok(_) => panic!("it was opened"),
        Err(error @ (Error::Foreign(_) | Error::Invalid(_))) => error.to_string(),
        Err(error) => panic!("not a refusal: {error:?}"),
    }
}

/// `count` events, alternating between two streams.
async fn fill(log: &KurrentLog, count: u128) {
    for number in 1..=count {
        let stream = format!("thing-{}", number % 2);
        log.append(&stream, Expected::Any, vec![event(number)]).await.unwrap();
    }
}

async fn position_of(log: &KurrentLog, number: u128) -> u64 {
    let events = log.read_all(0, 1000).await.unwrap();
    events.iter().find(|event| event.id == Uuid::from_u128(number)).unwrap().position
}

#[tokio::test]
async fn the_contract_holds_over_an_old_server_on_one_thread() {
    let node = Node::start(Age::Old).await;
    let log: Arc<dyn EventLog> = Arc::new(open(&node.address()).await);
    conformance::run_as(Kind::Server, async || log.clone()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_contract_holds_over_a_newer_server_with_a_handle_each() {
    let node = Node::start(Age::New).await;
    let address = node.address();
    conformance::run_as(Kind::Server, async || log::open(&address, "".as_ref()).await.unwrap())
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_contract_holds_over_a_cluster_while_another_node_writes() {
    let cluster = Cluster::start(3, Age::Old).await;
    cluster.lead(1);
    let other = open(&cluster.address()).await;
    let log: Arc<dyn EventLog> = Arc::new(open(&cluster.address()).await);
    let noise = tokio::spawn(async move {
        for number in 1.. {
            other.append("noise", Expected::Any, vec![event(number)]).await.unwrap();
        }
    });
    conformance::run_as(Kind::Server, async || log.clone()).await;
    noise.abort();
    assert!(noise.await.unwrap_err().is_cancelled(), "the other node went on well");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_contract_holds_over_a_real_server() {
    let Some(address) = real() else { return };
    let log: Arc<dyn EventLog> = log::open(&address, "".as_ref()).await.unwrap();
    conformance::run_as(Kind::Server, async || log.clone()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn four_nodes_race_over_a_real_server() {
    let Some(address) = real() else { return };
    race(&address).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn four_nodes_race_without_a_lost_update_and_readers_skip_nothing() {
    race(&Node::start(Age::Old).await.address()).await;
    race(&Cluster::start(3, Age::New).await.address()).await;
}

async fn race(address: &str) {
    const NODES: u64 = 4;
    const EACH: u64 = 40;
    let run: u32 = rand::random();
    let reader = open(address).await;
    let (mut after, mut nodes) = (*reader.head().borrow(), Vec::new());
    let wanted = format!("race-{run}-wanted");
    for node in 0..NODES {
        let (log, wanted) = (open(address).await, wanted.clone());
        nodes.push(tokio::spawn(async move {
            let mut end = Expected::NoStream;
            for number in 0..EACH {
                let id = u128::from(run) << 64 | u128::from(node << 32 | number << 1);
                // A stream that all want, and one of its own.
                loop {
                    match log.append(&wanted, end, vec![event(id)]).await {
                        Ok(answer) => break end = Expected::Revision(answer.revision),
                        Err(Error::Conflict { actual: Some(actual), .. }) => {
                            end = Expected::Revision(actual);
                        }
                        Err(error) => panic!("neither won nor lost: {error}"),
                    }
                }
                let own = number.checked_sub(1).map_or(Expected::NoStream, Expected::Revision);
                let stream = format!("race-{run}-own-{node}");
                log.append(&stream, own, vec![event(id + 1)]).await.unwrap();
            }
        }));
    }
    let (mut ids, mut head) = (HashSet::new(), reader.head());
    let is_ours = |id: Uuid| id.as_u128() >> 64 == u128::from(run);
    while ids.len() < usize::try_from(NODES * EACH * 2).unwrap() {
        let page = reader.read_all(after, 5).await.unwrap();
        for event in page.iter() {
            assert!(event.position > after);
            after = event.position;
            assert!(!is_ours(event.id) || ids.insert(event.id), "an event came twice");
        }
        if page.is_empty() {
            let moved = head.wait_for(|head| *head > after);
            tokio::time::timeout(Duration::from_secs(60), moved).await.unwrap().unwrap();
        }
    }
    for node in nodes {
        node.await.unwrap();
    }
    let wanted = reader.read_stream(&wanted, 0, 10_000).await.unwrap();
    assert_eq!(wanted.len() as u64, NODES * EACH);
    assert!(reader.verify().await.unwrap().events >= NODES * EACH * 2);
}

#[tokio::test]
async fn nodes_that_open_an_empty_server_together_make_one_log() {
    let node = Node::start(Age::Old).await;
    let address = node.address();
    let opened = futures_util::future::join_all((0..4).map(|_| open(&address))).await;
    for (number, log) in (1..).zip(&opened) {
        log.append("thing", Expected::Any, vec![event(number)]).await.unwrap();
    }
    assert_eq!(opened[0].verify().await.unwrap().events, 4);
}

#[tokio::test]
async fn one_member_of_a_cluster_is_enough_to_find_its_leader() {
    let cluster = Cluster::start(3, Age::Old).await;
    cluster.lead(2);
    let log = open(&cluster.nodes[0].address()).await;
    fill(&log, 3).await;
    cluster.lead(1);
    fill(&log, 6).await;
    assert_eq!(log.verify().await.unwrap().events, 6);
}

#[tokio::test]
async fn a_node_is_woken_by_what_another_one_appends() {
    let node = Node::start(Age::New).await;
    let one = open(&node.address()).await;
    let other = log::open_for_reading(&node.address(), "".as_ref()).await.unwrap();
    let mut head = other.head();
    fill(&one, 3).await;
    let end = *one.head().borrow();
    let moved = head.wait_for(|position| *position == end);
    tokio::time::timeout(Duration::from_secs(10), moved).await.unwrap().unwrap();
    assert_eq!(other.read_all(0, 10).await, one.read_all(0, 10).await);
    let answer = other.append("thing-1", Expected::Any, vec![event(4)]).await;
    assert!(matches!(answer, Err(Error::Unwritable(_))));
    assert!(matches!(other.writable(), Err(Error::Unwritable(_))));
}

#[tokio::test]
async fn reopening_keeps_everything_and_any_number_can_be_read_from() {
    for age in [Age::Old, Age::New] {
        let node = Node::start(age).await;
        let log = open(&node.address()).await;
        // More than is taken into memory when it is opened.
        for batch in 0..70_u64 {
            let events = (1..=10).map(|number| event(u128::from(batch * 10 + number))).collect();
            let stream = format!("thing-{}", batch % 2);
            log.append(&stream, Expected::Any, events).await.unwrap();
        }
        let before = log.read_all(0, 1000).await.unwrap();
        assert_eq!(before.len(), 700);
        let end = *log.head().borrow();
        drop(log);
        let log = open(&node.address()).await;
        assert_eq!(*log.head().borrow(), end);
        for (at, step) in [(5, 0), (20, 1), (60, 7), (350, 33), (640, 90), (699, 0)] {
            let after = before[at].position + step;
            let read = log.read_all(after, 3).await.unwrap();
            let next = before[at + 1..].iter().filter(|event| event.position > after);
            assert_eq!(read, next.take(3).cloned().collect::<Vec<_>>(), "after {after}");
            let alone = log.read_all(before[at].position - 1, 1).await.unwrap();
            assert_eq!(alone, before[at..=at]);
        }
        assert_eq!(log.read_all(0, 1000).await.unwrap(), before);
        let first = Appended { revision: 0, position: before[0].position };
        let again = log.append("thing-0", Expected::NoStream, vec![event(1)]).await;
        assert_eq!(again, Ok(first));
        let next = log.append("thing-1", Expected::Revision(349), vec![event(701)]).await.unwrap();
        assert_eq!(next.revision, 350);
        assert_eq!(log.verify().await.unwrap().events, 701);
    }
}

#[tokio::test]
async fn what_was_begun_is_written_before_the_log_closes() {
    let node = Node::start(Age::Old).await;
    let log = Arc::new(open(&node.address()).await);
    let waiting: Vec<_> = (1..=50)
        .map(|number| {
            let log = log.clone();
            let stream = format!("x-{number}");
            tokio::spawn(async move {
                log.append(&stream, Expected::NoStream, vec![event(number)]).await
            })
        })
        .collect();
    tokio::task::yield_now().await;
    for append in waiting {
        append.abort();
        let _ = append.await;
    }
    tokio::task::spawn_blocking(move || drop(log)).await.unwrap();
    assert_eq!(open(&node.address()).await.read_all(0, 100).await.unwrap().len(), 50);
}

#[tokio::test]
async fn an_append_of_more_than_the_server_takes_is_refused_and_writes_nothing() {
    let node = Node::start(Age::Old).await;
    let log = open(&node.address()).await;
    for (count, size) in [(2, MAX_APPEND / 2), (20, 1024 * 1024)] {
        let mut events: Vec<_> = (1..=count).map(event).collect();
        events.iter_mut().for_each(|event| event.data = vec![b'1'; size]);
        let answer = log.append("large", Expected::NoStream, events).await;
        let why = "the append is larger than the server takes";
        assert!(matches!(&answer, Err(Error::Invalid(told)) if told.contains(why)), "{answer:?}");
    }
    assert_eq!(log.read_stream("large", 0, 10).await, Ok(vec![]));
    log.append("large", Expected::NoStream, vec![event(9)]).await.unwrap();
}

#[tokio::test]
async fn what_happened_can_be_looked_at_on_the_server() {
    let node = Node::start(Age::New).await;
    let log = open(&node.address()).await;
    let mut binary = event(2);
    binary.data = b" {}".to_vec();
    log.append("$thing", Expected::NoStream, vec![event(1), binary]).await.unwrap();
    let there = node.store().stream("~$thing");
    let types: Vec<&str> = there.iter().map(|event| &*event.content_type).collect();
    assert_eq!(types, ["application/json", "application/octet-stream"]);
    assert_eq!(there[0].data, event(1).data);
    assert_eq!(*log.read_stream("$thing", 0, 9).await.unwrap()[1].stream, *"$thing");
    assert_eq!(log.read_all(0, 9).await.unwrap().len(), 2);
}

#[tokio::test]
async fn every_alteration_is_found_at_its_position() {
    type Change = fn(&mut Kept);
    let changes: [(&str, Change); 5] = [
        ("data", |kept| kept.data = b"{}".to_vec()),
        ("type", |kept| kept.kind = "other".to_owned()),
        ("id", |kept| kept.id = Uuid::from_u128(99)),
        ("revision", |kept| kept.revision += 1),
        ("envelope", |kept| kept.metadata.truncate(40)),
    ];
    let node = Node::start(Age::Old).await;
    let log = open(&node.address()).await;
    fill(&log, 20).await;
    let at = position_of(&log, 7).await;
    assert_eq!(log.verify().await.unwrap().events, 20);
    for (what, change) in changes {
        let mut kept = None;
        node.store().alter(at, |event| {
            kept = Some(event.clone());
            change(event);
        });
        let found = log.verify().await;
        assert!(
            matches!(found, Err(Error::Corrupt { position, .. }) if position == at),
            "{what}: {found:?}"
        );
        node.store().alter(at, |event| *event = kept.unwrap());
    }
    assert_eq!(log.verify().await.unwrap().events, 20);
}

fn strangers(stream: &str) -> Kept {
    Kept {
        id: Uuid::from_u128(rand::random()),
        stream: stream.to_owned(),
        revision: 0,
        position: 0,
        kind: "order.placed".to_owned(),
        content_type: "application/json".to_owned(),
        metadata: Vec::new(),
        data: b"{}".to_vec(),
    }
}

#[tokio::test]
async fn what_a_stranger_writes_to_the_server_is_not_of_the_log() {
    let node = Node::start(Age::Old).await;
    let log = open(&node.address()).await;
    fill(&log, 2).await;
    node.store().write(vec![strangers("order-1")]);
    fill(&log, 4).await;
    assert_eq!(log.read_all(0, 10).await.unwrap().len(), 4);
    assert_eq!(log.verify().await.unwrap().events, 4);
    // In a stream of the log it is damage.
    node.store().write(vec![strangers("thing-1")]);
    assert!(matches!(log.read_stream("thing-1", 0, 10).await, Err(Error::Corrupt { .. })));
    let answer = log.append("thing-1", Expected::Any, vec![event(9)]).await;
    assert!(matches!(answer, Err(Error::Corrupt { .. })), "{answer:?}");
}

#[tokio::test]
async fn what_cannot_be_this_log_is_refused_in_a_sentence_that_names_the_setting() {
    let (empty, foreign, newer) =
        (Node::start(Age::Old).await, Node::start(Age::New).await, Node::start(Age::Old).await);
    foreign.store().write(vec![strangers("order-1")]);
    let marker = |text: &str| Kept { data: text.as_bytes().to_vec(), ..strangers("~t2m") };
    let identity = Uuid::nil();
    newer.store().write(vec![marker(&format!(
        r#"{{"format":"t2m-log","version":99,"identity":"{identity}"}}"#
    ))]);
    let odd = Node::start(Age::Old).await;
    odd.store().write(vec![marker("{}")]);
    let cluster = Cluster::start(2, Age::Old).await;
    let wrong = |address: String| address.replace("admin:changeit", "admin:hunter2");
    for (address, because) in [
        (wrong(empty.address()), "refuses the user and password"),
        (wrong(cluster.address()), "refuses the user and password"),
        (foreign.address(), "holds events of another system; they were left as they are"),
        (newer.address(), "version 99"),
        (odd.address(), "that is not T2M's"),
    ] {
        let sentence = refused(&address).await;
        assert!(sentence.starts_with("T2M_LOG: KurrentDB at 127.0.0.1:"), "{sentence}");
        assert!(sentence.contains(because), "{sentence}");
        assert!(!sentence.contains("hunter2"), "{sentence}");
    }
    let nothing = log::open_for_reading(&empty.address(), "".as_ref()).await.err();
    assert!(matches!(nothing, Some(Error::Foreign(why)) if why.contains("holds no log")));
    assert_eq!(empty.store().from(0).len(), 1, "nothing was written to any of them");
}

#[tokio::test]
async fn a_server_that_is_not_there_is_waited_for_up_to_a_limit() {
    let deadlines = Deadlines { start: Duration::from_millis(300), ..SHORT };
    let address = format!("esdb://me:hunter2@127.0.0.1:{}?tls=false", free_port());
    let Err(error) = KurrentLog::open_with(&address, deadlines).await else { panic!("opened") };
    assert!(matches!(error, Error::Storage(_)));
    let sentence = error.to_string();
    assert!(sentence.contains("T2M_LOG: KurrentDB at 127.0.0.1:"), "{sentence}");
    assert!(sentence.contains("could not be reached without TLS within"), "{sentence}");
    assert!(!sentence.contains("hunter2"), "{sentence}");
}
