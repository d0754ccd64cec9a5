//! The contract of [`EventLog`] as code: every engine's tests call [`run`]. A clause that does not
//! hold panics. The log may hold events already, and may be shared with others.

use std::collections::HashSet;
use std::sync::Arc;

use chrono::{DateTime, Duration, Utc};

use super::{Appended, Error, EventLog, Expected, Link, NewEvent, Recorded};
use super::{MAX_BYTES, MAX_EVENTS, MAX_NAME, REPEAT_WINDOW};

type Log = Arc<dyn EventLog>;

/// What engines may do in their own way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Each event's hash is over the one before it in the log. Every append within the contract's
    /// limits is taken.
    Own,
    /// A server gives the positions after the hashes were made: each event's hash is over the one
    /// before it in its stream. The server may refuse an append for its bytes, with
    /// [`Error::Invalid`] and nothing written, but none of 768 KiB.
    Server,
}

/// Hold every clause against a log from `make`, which is called once a clause.
pub async fn run(make: impl AsyncFn() -> Log) {
    run_as(Kind::Own, make).await;
}

/// [`run`] for an engine of this kind.
pub async fn run_as(kind: Kind, make: impl AsyncFn() -> Log) {
    revisions_are_dense_and_positions_grow(make().await).await;
    what_was_appended_is_read_back_as_it_was(make().await).await;
    pages_of_a_stream_join_without_gap_or_overlap(make().await).await;
    nothing_is_read_where_nothing_is(make().await).await;
    no_stream_is_refused_once_there_is_one(make().await).await;
    a_wrong_revision_is_refused_with_the_actual_one(make().await).await;
    any_appends_wherever_the_end_is(make().await).await;
    a_repeated_append_answers_what_the_first_did(make().await).await;
    a_repeat_with_any_is_recognised(make().await).await;
    an_append_that_only_overlaps_is_a_conflict(make().await).await;
    a_batch_is_all_or_nothing(make().await).await;
    limits_are_refused_and_nothing_is_written(make().await).await;
    the_largest_append_is_accepted(kind, make().await).await;
    racing_writers_share_out_the_revisions(make().await).await;
    racing_repeats_are_written_once(make().await).await;
    pages_skip_nothing_while_others_append(make().await).await;
    head_is_never_behind_an_acknowledged_append(make().await).await;
    head_wakes_who_waits_for_it(make().await).await;
    match kind {
        Kind::Own => the_chain_links_event_to_event(make().await).await,
        Kind::Server => {}
    }
    the_log_is_verified_and_has_one_head_hash(make().await).await;
    stats_count_what_was_appended(kind, make().await).await;
}

pub async fn revisions_are_dense_and_positions_grow(log: Log) {
    let mut new = Fresh::new();
    let (a, b) = (new.stream(), new.stream());
    for batch in 1..=3 {
        append(&log, &a, Expected::Any, new.events(batch)).await;
        append(&log, &b, Expected::Any, new.events(1)).await;
    }
    for (stream, count) in [(&a, 6), (&b, 3)] {
        let events = read(&log, stream).await;
        let revisions: Vec<u64> = events.iter().map(|e| e.revision).collect();
        assert_eq!(revisions, (0..count).collect::<Vec<u64>>());
        assert!(events.windows(2).all(|w| w[0].position < w[1].position));
        assert!(events[0].position >= 1, "positions start at 1");
    }
}

pub async fn what_was_appended_is_read_back_as_it_was(log: Log) {
    let mut new = Fresh::new();
    let stream = format!("{} with ümläuts / and spaces", new.stream());
    let mut events = new.events(2);
    events[0].data = br#"{"text":"\u0000 \"quoted\" 'single' %; \u2603"}"#.to_vec();
    events[1].data = "{\"text\":\"☃ 雪\"}".as_bytes().to_vec();
    events[1].time -= Duration::days(365 * 80);
    let answer = append(&log, &stream, Expected::NoStream, events.clone()).await;
    let read = read(&log, &stream).await;
    assert_eq!(read.len(), 2);
    for (new, recorded) in events.iter().zip(&read) {
        assert_eq!(*recorded.stream, *stream);
        assert_eq!(recorded.id, new.id);
        assert_eq!(*recorded.kind, *new.kind);
        assert_eq!(recorded.time, new.time);
        assert_eq!(recorded.data, new.data);
        assert_eq!(recorded.metadata, new.metadata);
    }
    let last = &read[1];
    assert_eq!(answer, Appended { revision: last.revision, position: last.position });
    let all = log.read_all(read[0].position - 1, 1).await.expect("read_all");
    assert_eq!(all[0], read[0], "both ways of reading show the same");
}

pub async fn pages_of_a_stream_join_without_gap_or_overlap(log: Log) {
    let mut new = Fresh::new();
    let stream = new.stream();
    append(&log, &stream, Expected::NoStream, new.events(10)).await;
    let mut seen = Vec::new();
    loop {
        let page = log.read_stream(&stream, seen.len() as u64, 3).await.expect("read_stream");
        assert_eq!(page.len(), 3.min(10 - seen.len()), "a short page only at the end");
        if page.is_empty() {
            break;
        }
        seen.extend(page);
    }
    assert_eq!(seen, read(&log, &stream).await);
}

pub async fn nothing_is_read_where_nothing_is(log: Log) {
    let mut new = Fresh::new();
    let stream = new.stream();
    assert_eq!(read(&log, &stream).await, []);
    append(&log, &stream, Expected::Any, new.events(1)).await;
    for from in [1, 1000, i64::MAX as u64, u64::MAX] {
        assert_eq!(log.read_stream(&stream, from, 10).await, Ok(vec![]));
    }
    assert_eq!(log.read_stream(&stream, 0, 0).await, Ok(vec![]));
    for nobody in ["", "no\0body"] {
        assert_eq!(log.read_stream(nobody, 0, 10).await, Ok(vec![]), "{nobody:?}");
    }
    assert_eq!(log.read_all(0, 0).await, Ok(vec![]));
    assert_eq!(log.read_all(u64::MAX, 10).await, Ok(vec![]));
}

pub async fn no_stream_is_refused_once_there_is_one(log: Log) {
    let mut new = Fresh::new();
    let stream = new.stream();
    append(&log, &stream, Expected::NoStream, new.events(2)).await;
    refuse(&log, &stream, Expected::NoStream, new.events(1), Some(1)).await;
}

pub async fn a_wrong_revision_is_refused_with_the_actual_one(log: Log) {
    let mut new = Fresh::new();
    let stream = new.stream();
    for wrong in [0, 5, u64::MAX] {
        refuse(&log, &stream, Expected::Revision(wrong), new.events(1), None).await;
    }
    append(&log, &stream, Expected::NoStream, new.events(3)).await;
    for wrong in [0, 1, 3, u64::MAX] {
        refuse(&log, &stream, Expected::Revision(wrong), new.events(1), Some(2)).await;
    }
    let answer = append(&log, &stream, Expected::Revision(2), new.events(1)).await;
    assert_eq!(answer.revision, 3);
}

pub async fn any_appends_wherever_the_end_is(log: Log) {
    let mut new = Fresh::new();
    let stream = new.stream();
    for count in [2, 1, 3] {
        append(&log, &stream, Expected::Any, new.events(count)).await;
    }
    assert_eq!(read(&log, &stream).await.len(), 6);
}

pub async fn a_repeated_append_answers_what_the_first_did(log: Log) {
    let mut new = Fresh::new();
    let stream = new.stream();
    let (one, two) = (new.events(2), new.events(3));
    let first = append(&log, &stream, Expected::NoStream, one.clone()).await;
    let second = append(&log, &stream, Expected::Revision(1), two.clone()).await;
    append(&log, &stream, Expected::Revision(4), new.events(300)).await;
    let before = read(&log, &stream).await;
    for _ in 0..2 {
        assert_eq!(append(&log, &stream, Expected::NoStream, one.clone()).await, first);
        assert_eq!(append(&log, &stream, Expected::Revision(1), two.clone()).await, second);
    }
    assert_eq!(read(&log, &stream).await, before, "a repeat writes nothing");
}

pub async fn a_repeat_with_any_is_recognised(log: Log) {
    let mut new = Fresh::new();
    let stream = new.stream();
    append(&log, &stream, Expected::Any, new.events(5)).await;
    let batch = new.events(3);
    let first = append(&log, &stream, Expected::Any, batch.clone()).await;
    assert_eq!(append(&log, &stream, Expected::Any, batch.clone()).await, first);
    append(&log, &stream, Expected::Any, new.events(20)).await;
    assert_eq!(append(&log, &stream, Expected::Any, batch).await, first);
    assert_eq!(read(&log, &stream).await.len(), 28);
    // Its first event is the oldest of the window.
    let batch = new.events(2);
    let first = append(&log, &stream, Expected::Any, batch.clone()).await;
    append(&log, &stream, Expected::Any, new.events(REPEAT_WINDOW as usize - 2)).await;
    assert_eq!(append(&log, &stream, Expected::Any, batch).await, first);
}

pub async fn an_append_that_only_overlaps_is_a_conflict(log: Log) {
    let mut new = Fresh::new();
    let stream = new.stream();
    let batch = new.events(3);
    append(&log, &stream, Expected::NoStream, batch.clone()).await;
    let longer = [batch.clone(), new.events(1)].concat();
    let other = [batch[..2].to_vec(), new.events(1)].concat();
    let moved = batch[1..].to_vec();
    for overlapping in [longer, other, moved] {
        refuse(&log, &stream, Expected::NoStream, overlapping, Some(2)).await;
    }
}

pub async fn a_batch_is_all_or_nothing(log: Log) {
    let mut new = Fresh::new();
    let stream = new.stream();
    append(&log, &stream, Expected::NoStream, new.events(1)).await;
    let mut batch = new.events(4);
    batch[3].data = vec![b' '; MAX_BYTES + 1];
    let answer = log.append(&stream, Expected::Revision(0), batch).await;
    assert!(matches!(answer, Err(Error::Invalid(_))), "{answer:?}");
    assert_eq!(read(&log, &stream).await.len(), 1);
    // While batches are appended, no reader sees a part of one.
    let writer = {
        let (log, stream) = (log.clone(), stream.clone());
        let batches: Vec<_> = (0..20).map(|_| new.events(5)).collect();
        tokio::spawn(async move {
            for batch in batches {
                append(&log, &stream, Expected::Any, batch).await;
            }
        })
    };
    loop {
        let seen = read(&log, &stream).await.len();
        assert_eq!((seen - 1) % 5, 0, "a part of a batch was visible");
        if seen == 101 {
            break;
        }
        tokio::task::yield_now().await;
    }
    writer.await.expect("the writer ended well");
}

pub async fn limits_are_refused_and_nothing_is_written(log: Log) {
    let mut new = Fresh::new();
    let stream = new.stream();
    let mut bad = vec![
        (stream.clone(), vec![]),
        (stream.clone(), new.events(MAX_EVENTS + 1)),
        (String::new(), new.events(1)),
        ("x".repeat(MAX_NAME + 1), new.events(1)),
        (format!("{stream}\0"), new.events(1)),
    ];
    let mut wrong = |change: fn(&mut NewEvent)| {
        let mut events = new.events(2);
        change(&mut events[1]);
        bad.push((stream.clone(), events));
    };
    wrong(|e| e.data = vec![b' '; MAX_BYTES + 1]);
    wrong(|e| e.metadata = vec![b' '; MAX_BYTES + 1]);
    wrong(|e| e.kind = String::new());
    wrong(|e| e.kind = "x".repeat(MAX_NAME + 1));
    let mut twice = new.events(1);
    twice.extend(twice.clone());
    bad.push((stream.clone(), twice));
    for (name, events) in bad {
        let answer = log.append(&name, Expected::Any, events).await;
        assert!(matches!(answer, Err(Error::Invalid(_))), "{name:?}: {answer:?}");
    }
    assert_eq!(read(&log, &stream).await, []);
    assert_eq!(log.writable(), Ok(()), "a bad append does not stop the writer");
}

pub async fn the_largest_append_is_accepted(kind: Kind, log: Log) {
    let mut new = Fresh::new();
    let longest = format!("{:x<MAX_NAME$}", new.stream());
    let answer = append(&log, &longest, Expected::NoStream, new.events(MAX_EVENTS)).await;
    assert_eq!(answer.revision, MAX_EVENTS as u64 - 1);
    let mut size = MAX_BYTES;
    if kind == Kind::Server {
        let mut large = new.events(2);
        large[1].data = vec![b' '; MAX_BYTES];
        match log.append(&longest, Expected::Any, large).await {
            Ok(_) => return,
            Err(Error::Invalid(_)) => size = MAX_BYTES / 4 * 3,
            Err(error) => panic!("neither taken nor refused for its size: {error}"),
        }
        assert_eq!(log.writable(), Ok(()), "a large append does not stop the writer");
    }
    let mut large = new.events(1);
    large[0].data = vec![b' '; size];
    append(&log, &longest, Expected::Any, large).await;
    let last = log.read_stream(&longest, MAX_EVENTS as u64, 2).await.expect("read_stream");
    assert_eq!(last.len(), 1);
    assert_eq!(last[0].data.len(), size);
}

pub async fn racing_writers_share_out_the_revisions(log: Log) {
    const WRITERS: u64 = 8;
    const EACH: u64 = 10;
    let mut new = Fresh::new();
    let stream = new.stream();
    let mut writers = Vec::new();
    for _ in 0..WRITERS {
        let (log, stream) = (log.clone(), stream.clone());
        let batches: Vec<_> = (0..EACH).map(|_| new.events(1)).collect();
        writers.push(tokio::spawn(async move {
            let mut won = Vec::new();
            let mut end = Expected::NoStream;
            for batch in batches {
                won.push(win(&log, &stream, &mut end, batch).await);
            }
            won
        }));
    }
    let mut won = Vec::new();
    for writer in writers {
        won.extend(writer.await.expect("the writer ended well"));
    }
    won.sort_unstable();
    assert_eq!(won, (0..WRITERS * EACH).collect::<Vec<u64>>(), "each revision was won once");
}

/// Append where the stream ends, however often another writer is faster; answers the revision won.
async fn win(log: &Log, stream: &str, end: &mut Expected, batch: Vec<NewEvent>) -> u64 {
    loop {
        match log.append(stream, *end, batch.clone()).await {
            Ok(answer) => {
                *end = Expected::Revision(answer.revision);
                return answer.revision;
            }
            Err(Error::Conflict { actual: Some(actual), .. }) => *end = Expected::Revision(actual),
            Err(error) => panic!("neither won nor lost: {error}"),
        }
    }
}

pub async fn racing_repeats_are_written_once(log: Log) {
    let mut new = Fresh::new();
    let stream = new.stream();
    let batch = new.events(2);
    for expected in [Expected::NoStream, Expected::Any] {
        let repeats: Vec<_> = (0..8)
            .map(|_| {
                let (log, stream, batch) = (log.clone(), stream.clone(), batch.clone());
                tokio::spawn(async move { append(&log, &stream, expected, batch).await })
            })
            .collect();
        let mut answers = HashSet::new();
        for repeat in repeats {
            let answer = repeat.await.expect("the repeat ended well");
            answers.insert((answer.revision, answer.position));
        }
        assert_eq!(answers.len(), 1, "every repeat has the one answer");
    }
    assert_eq!(read(&log, &stream).await.len(), 2);
}

pub async fn pages_skip_nothing_while_others_append(log: Log) {
    const WRITERS: usize = 6;
    const EACH: usize = 40;
    let mut new = Fresh::new();
    let start = *log.head().borrow();
    let mut wanted = HashSet::new();
    let mut writers = Vec::new();
    for writer in 0..WRITERS {
        let (log, stream) = (log.clone(), new.stream());
        let batches: Vec<_> = (0..EACH).map(|i| new.events(1 + (i + writer) % 3)).collect();
        wanted.extend(batches.iter().flatten().map(|e| e.id));
        writers.push(tokio::spawn(async move {
            for batch in batches {
                append(&log, &stream, Expected::Any, batch).await;
            }
        }));
    }
    let mut head = log.head();
    let (mut after, mut left, mut seen) = (start, wanted.clone(), Vec::new());
    while !left.is_empty() {
        let page = log.read_all(after, 7).await.expect("read_all");
        let Some(last) = page.last() else {
            let done = writers.iter().all(|w| w.is_finished());
            // A writer may have ended just after the page was read.
            if done && *head.borrow() <= after {
                assert!(left.is_empty(), "{} events were skipped", left.len());
            } else if !done && *head.borrow_and_update() <= after {
                let _ = tokio::time::timeout(std::time::Duration::from_millis(50), head.changed())
                    .await;
            }
            continue;
        };
        after = last.position;
        page.iter().for_each(|e| assert!(left.remove(&e.id) || !wanted.contains(&e.id), "twice"));
        seen.extend(page.iter().map(|e| e.position));
    }
    assert!(seen.windows(2).all(|w| w[0] < w[1]), "positions grow strictly");
}

pub async fn head_is_never_behind_an_acknowledged_append(log: Log) {
    let mut new = Fresh::new();
    let writers: Vec<_> = (0..4)
        .map(|_| {
            let (log, stream) = (log.clone(), new.stream());
            let batches: Vec<_> = (0..25).map(|_| new.events(1)).collect();
            tokio::spawn(async move {
                for batch in batches {
                    let answer = append(&log, &stream, Expected::Any, batch).await;
                    assert!(*log.head().borrow() >= answer.position);
                    let read = log.read_all(answer.position - 1, 1).await.expect("read_all");
                    assert_eq!(read[0].position, answer.position, "read what was acknowledged");
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.expect("the writer ended well");
    }
}

pub async fn head_wakes_who_waits_for_it(log: Log) {
    let mut new = Fresh::new();
    let stream = new.stream();
    let mut head = log.head();
    let before = *head.borrow_and_update();
    let answer = append(&log, &stream, Expected::NoStream, new.events(3)).await;
    assert!(answer.position > before);
    let moved = head.wait_for(|position| *position >= answer.position);
    tokio::time::timeout(std::time::Duration::from_secs(10), moved)
        .await
        .expect("woken in time")
        .expect("the log is open");
}

pub async fn the_chain_links_event_to_event(log: Log) {
    let mut new = Fresh::new();
    let stream = new.stream();
    let answer = append(&log, &stream, Expected::NoStream, new.events(5)).await;
    let first = read(&log, &stream).await[0].position;
    let events = log.read_all(first - 1, 1000).await.expect("read_all");
    for pair in events.windows(2) {
        assert_eq!(pair[1].hash, Link::of(&pair[1]).hash(&pair[0].hash));
    }
    let verified = log.verify().await.expect("a whole chain");
    assert!(verified.events >= 5);
    if *log.head().borrow() == answer.position {
        assert_eq!(Some(verified.head_hash), events.last().map(|e| e.hash));
    }
}

pub async fn the_log_is_verified_and_has_one_head_hash(log: Log) {
    let mut new = Fresh::new();
    let stream = new.stream();
    append(&log, &stream, Expected::NoStream, new.events(5)).await;
    let events = read(&log, &stream).await;
    let hashes: HashSet<[u8; 32]> = events.iter().map(|event| event.hash).collect();
    assert_eq!(hashes.len(), 5, "each event has a hash of its own");
    let before = log.stats().await.expect("stats");
    let verified = log.verify().await.expect("a whole chain");
    let after = log.stats().await.expect("stats");
    assert!(before.events <= verified.events && verified.events <= after.events);
    if before.position == after.position {
        assert_eq!(verified, super::Verified { events: after.events, head_hash: after.head_hash });
    }
}

pub async fn stats_count_what_was_appended(kind: Kind, log: Log) {
    let mut new = Fresh::new();
    let before = log.stats().await.expect("stats");
    let (a, b) = (new.stream(), new.stream());
    append(&log, &a, Expected::NoStream, new.events(2)).await;
    let mut last = new.events(1);
    last[0].kind = format!("{}.v1", new.stream());
    let answer = append(&log, &b, Expected::NoStream, last.clone()).await;
    let after = log.stats().await.expect("stats");
    assert!(after.events >= before.events + 3);
    assert!(after.streams >= before.streams + 2);
    assert!(after.position >= answer.position);
    assert!(after.bytes > 0);
    assert_eq!(after.types.get(&last[0].kind), Some(&1));
    assert!(after.first.is_some());
    if after.position == answer.position {
        assert_eq!(after.last, Some(last[0].time));
        let recorded = read(&log, &b).await.remove(0);
        assert!(kind == Kind::Server || after.head_hash == recorded.hash);
    }
}

async fn append(log: &Log, stream: &str, expected: Expected, events: Vec<NewEvent>) -> Appended {
    log.append(stream, expected, events).await.expect("this append is accepted")
}

async fn read(log: &Log, stream: &str) -> Vec<Recorded> {
    log.read_stream(stream, 0, 100_000).await.expect("read_stream")
}

/// The append is a conflict that names `actual`, and the stream is as it was.
async fn refuse(
    log: &Log,
    stream: &str,
    expected: Expected,
    events: Vec<NewEvent>,
    actual: Option<u64>,
) {
    let before = read(log, stream).await;
    let answer = log.append(stream, expected, events).await;
    assert_eq!(answer, Err(Error::Conflict { stream: stream.into(), expected, actual }));
    assert_eq!(read(log, stream).await, before);
}

/// Names, ids and times of one clause's own, so that clauses can share a log with each other, with
/// earlier runs and with strangers.
struct Fresh {
    run: u64,
    made: u64,
}

impl Fresh {
    fn new() -> Self {
        Self { run: rand::random(), made: 0 }
    }

    fn next(&mut self) -> u64 {
        self.made += 1;
        self.made
    }

    fn stream(&mut self) -> String {
        let number = self.next();
        format!("conformance-{:016x}-{number}", self.run)
    }

    fn events(&mut self, count: usize) -> Vec<NewEvent> {
        (0..count).map(|_| self.event()).collect()
    }

    fn event(&mut self) -> NewEvent {
        let number = self.next();
        let start: DateTime<Utc> = DateTime::UNIX_EPOCH + Duration::days(20_000);
        NewEvent {
            id: uuid::Builder::from_random_bytes(
                ((u128::from(self.run) << 64) | u128::from(number)).to_be_bytes(),
            )
            .into_uuid(),
            kind: format!("thing.happened.v{}", number % 3),
            time: start + Duration::microseconds(i64::try_from(number).unwrap_or_default()),
            data: format!(r#"{{"number":{number}}}"#).into_bytes(),
            metadata: br#"{"source":"conformance"}"#.to_vec(),
        }
    }
}
