//! The one writer of a node: it commits whatever waits as a group, and finds out what became of a
//! commit whose connection broke.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytestring::ByteString;
use chrono::DateTime;
use futures_util::future::{OptionFuture, join_all, try_join4};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout_at};
use tokio_postgres::Statement;
use uuid::Uuid;

use super::connection::Session;
use super::placing::{Before, End, Known, Lookup, Placed, place};
use super::reader::{NEWEST, seen};
use super::{Backoff, CHANNEL, Seen, Shared};
use crate::log::{Appended, Error, Expected, NewEvent, Recorded, from_sql, to_sql};

/// Bounds of one commit.
const GROUP_APPENDS: usize = 1024;
const GROUP_BYTES: usize = 8 * 1024 * 1024;
/// A commit that took longer says more of the server's mood than of the next commit.
const LONGEST_COMMIT: Duration = Duration::from_millis(8);
/// Streams whose end, and types whose number, are kept in memory.
const KNOWN_NAMES: usize = 65_536;
/// How often an idle connection is tried.
const IDLE: Duration = Duration::from_secs(5);
/// How often it is tried whether a server that took no append takes one again.
const PROBE: Duration = Duration::from_secs(1);
/// A name that no stream can have.
const PROBED: &str = "\u{1}probe";
/// Who holds it gives positions; "T2M log".
const WRITE_LOCK: i64 = 0x0054_324d_206c_6f67;

pub(super) struct Append {
    pub(super) stream: ByteString,
    pub(super) expected: Expected,
    pub(super) events: Vec<NewEvent>,
    pub(super) reply: oneshot::Sender<Result<Appended, Error>>,
    /// Whether one before it was not written, where it may only follow what was.
    pub(super) broken: Option<Arc<AtomicBool>>,
}

impl Append {
    fn bytes(&self) -> usize {
        self.events.iter().map(|e| e.data.len() + e.metadata.len()).sum()
    }

    /// Those that may only follow it are not written either.
    pub(super) fn break_off(&self) {
        self.broken.iter().for_each(|broken| broken.store(true, Ordering::Relaxed));
    }

    pub(super) fn follows_a_failure(&self) -> bool {
        self.broken.as_ref().is_some_and(|broken| broken.load(Ordering::Relaxed))
    }

    fn refuse(self, error: Error) {
        self.break_off();
        let _ = self.reply.send(Err(error));
    }

    pub(super) fn conflict(&self, actual: Option<u64>) -> Error {
        Error::Conflict { stream: self.stream.to_string(), expected: self.expected, actual }
    }
}

pub(super) struct Writer {
    shared: Arc<Shared>,
    queue: mpsc::Receiver<Append>,
    link: Option<Link>,
    /// The log's end when `ends` was true.
    head: Seen,
    /// Where streams end, unless another node has appended since `head`.
    ends: HashMap<ByteString, End>,
    types: HashMap<ByteString, i64>,
    /// What was sent to be committed, and not answered.
    in_doubt: Option<Placed>,
    /// When the next probe is due, if one is needed.
    probe_at: Instant,
}

impl Writer {
    pub(super) fn new(shared: Arc<Shared>, queue: mpsc::Receiver<Append>) -> Self {
        let head = shared.seen();
        Self {
            shared,
            queue,
            link: None,
            head,
            ends: HashMap::new(),
            types: HashMap::new(),
            in_doubt: None,
            probe_at: Instant::now(),
        }
    }

    /// Until the log is closed and the queue is empty, or the log has stopped.
    pub(super) async fn run(mut self) {
        let mut last = Pace::default();
        while self.shared.condition.check_stopped().is_ok() {
            let Some(first) = self.next().await else { break };
            let group = self.gather(first, &last).await;
            let (began, size) = (Instant::now(), group.len());
            self.settle(group).await;
            last = Pace { size, took: began.elapsed() };
        }
        self.queue.close();
        self.refuse_queued();
    }

    /// The next append; meanwhile the connection is kept open.
    async fn next(&mut self) -> Option<Append> {
        loop {
            if self.link.is_none() {
                self.connect().await;
                if self.shared.condition.check_stopped().is_err() {
                    return None;
                }
            }
            // Nobody is sent to a node that is not ready: it has to find out by itself.
            let is_refused = self.shared.condition.is_refused();
            if is_refused && self.link.is_some() && self.probe_at <= Instant::now() {
                self.probe().await;
                self.probe_at = Instant::now() + PROBE;
                continue;
            }
            let idle = if is_refused { PROBE } else { IDLE };
            let Some(link) = self.link.as_mut() else { return self.queue.recv().await };
            let broken = tokio::select! {
                append = self.queue.recv() => return append,
                () = link.session.ended() => true,
                () = tokio::time::sleep(idle) => false,
            };
            if broken || link.session.within(link.session.client.batch_execute("")).await.is_err() {
                self.link = None;
            }
        }
    }

    /// Tries until there is a connection, or there will be none: the log is closed or stopped.
    /// After the first failures, whoever waits is told.
    async fn connect(&mut self) {
        let give_up = Instant::now() + self.shared.deadlines.settle;
        let mut backoff = Backoff::default();
        loop {
            match Link::open(&self.shared).await {
                Ok(link) => {
                    self.link = Some(link);
                    self.shared.condition.set_back();
                    return;
                }
                Err(error) => {
                    if self.shared.condition.check_stopped().is_err() {
                        return;
                    }
                    if self.shared.condition.is_unwritable() || Instant::now() >= give_up {
                        self.shared.condition.set_away(&error.to_string());
                        self.refuse_queued();
                    }
                }
            }
            // Closed, and nobody waits any more.
            if self.queue.is_closed() && self.queue.is_empty() {
                return;
            }
            backoff.wait().await;
        }
    }

    async fn probe(&mut self) {
        let Some(link) = self.link.take() else { return };
        match link.probe().await {
            Ok(()) => {
                self.link = Some(link);
                self.shared.condition.set_taken();
            }
            Err(error) => self.shared.condition.set_refused(&error.to_string()),
        }
    }

    fn refuse_queued(&mut self) {
        while let Ok(append) = self.queue.try_recv() {
            append.refuse(self.shared.condition.unwritable());
        }
    }

    /// Whatever waits, up to the bounds of a commit. The callers that the last commit answered may
    /// be about to come again; going without them would make them wait for a whole commit, so that
    /// a part of one is spent on waiting for as many. A caller alone never waits.
    async fn gather(&mut self, first: Append, last: &Pace) -> Vec<Append> {
        let deadline = Instant::now() + last.took.min(LONGEST_COMMIT) / 4;
        let mut bytes = first.bytes();
        let mut group = vec![first];
        while group.len() < GROUP_APPENDS && bytes < GROUP_BYTES {
            let next = match self.queue.try_recv() {
                Ok(append) => Some(append),
                Err(_) if group.len() >= last.size => None,
                Err(_) => timeout_at(deadline, self.queue.recv()).await.unwrap_or_default(),
            };
            let Some(append) = next else { break };
            bytes += append.bytes();
            group.push(append);
        }
        group
    }

    /// Commits the group and answers it, over as many connections as it takes and as fit into the
    /// time there is for it.
    async fn settle(&mut self, group: Vec<Append>) {
        let give_up = Instant::now() + self.shared.deadlines.settle;
        let mut backoff = Backoff::default();
        loop {
            let error = match self.commit(&group).await {
                Ok(answers) => {
                    for (append, answer) in group.into_iter().zip(answers) {
                        if answer.is_err() {
                            append.break_off();
                        }
                        // Whoever gave up waiting finds the outcome by repeating the append.
                        let _ = append.reply.send(answer);
                    }
                    self.shared.condition.set_back();
                    return;
                }
                Err(error) => error,
            };
            // With the connection the server forgets what it had begun.
            self.link = None;
            self.ends.clear();
            self.types.clear();
            if Instant::now() >= give_up || self.shared.condition.check_stopped().is_err() {
                self.in_doubt = None;
                self.shared.condition.set_refused(&error.to_string());
                for append in group {
                    append.refuse(self.shared.condition.unwritable());
                }
                return;
            }
            tracing::warn!(%error, "a commit is tried again");
            backoff.wait().await;
        }
    }

    async fn commit(&mut self, group: &[Append]) -> Result<Vec<Result<Appended, Error>>, Error> {
        let link = match self.link.take() {
            Some(link) => link,
            None => Link::open(&self.shared).await?,
        };
        let answers = self.commit_over(&link, group).await?;
        if !link.broken.load(Ordering::Relaxed) {
            self.link = Some(link);
        }
        Ok(answers)
    }

    async fn commit_over(
        &mut self,
        link: &Link,
        group: &[Append],
    ) -> Result<Vec<Result<Appended, Error>>, Error> {
        let head = self.begin(link, group).await?;
        if let Some(placed) = &self.in_doubt {
            let committed = link.has(placed).await?;
            if let Some(placed) = self.in_doubt.take().filter(|_| committed) {
                link.roll_back().await;
                return Ok(self.done(placed));
            }
        }
        let lookups = group.iter().map(|append| Lookup::of(append, self.ends.get(&append.stream)));
        let known = link.look_up(lookups.collect()).await?;
        let before = Before { head, ends: &self.ends, types: &self.types };
        let placed = place(group, &before, &known);
        if placed.fresh.is_empty() {
            link.roll_back().await;
            // What was there already, from a commit whose answer was lost, is there to be read now.
            self.shared.saw(head);
            return Ok(placed.answers);
        }
        // From here on a commit may happen that is not heard of.
        let placed = self.in_doubt.insert(placed);
        link.write(placed).await?;
        Ok(self.in_doubt.take().map(|placed| self.done(placed)).unwrap_or_default())
    }

    /// Takes the lock, and makes `ends` and `types` true for the streams and types of the group.
    async fn begin(&mut self, link: &Link, group: &[Append]) -> Result<Seen, Error> {
        if self.ends.len() >= KNOWN_NAMES {
            self.ends.clear();
        }
        if self.types.len() >= KNOWN_NAMES {
            self.types.clear();
        }
        let kinds = group.iter().flat_map(|append| &append.events).map(|event| &*event.kind);
        let types = distinct(kinds.filter(|kind| !self.types.contains_key(*kind)));
        let streams = || group.iter().map(|append| &*append.stream);
        let unknown = distinct(streams().filter(|stream| !self.ends.contains_key(*stream)));
        let (head, ends, types) = link.begin(&unknown, &types).await?;
        if head.position < self.shared.seen().position {
            return Err(self.shared.condition.cut(self.shared.seen().position));
        }
        self.types.extend(types);
        if head.position == self.head.position {
            self.ends.extend(ends);
        } else {
            // Another node has appended. Its followers are told by it, and the caches are stale.
            self.ends.clear();
            let all = distinct(streams());
            let ends = if all.len() == unknown.len() { ends } else { link.ends(&all).await? };
            self.ends.extend(ends);
        }
        self.head = head;
        Ok(head)
    }

    /// Takes note of what is durable now.
    fn done(&mut self, placed: Placed) -> Vec<Result<Appended, Error>> {
        self.shared.condition.set_taken();
        if let Some(last) = placed.fresh.last() {
            self.head = Seen { position: last.position, hash: last.hash };
        }
        self.types.extend(placed.new_types.into_iter().map(|(id, name)| (name, id)));
        self.ends.extend(placed.ends);
        self.shared.tail.extend(placed.fresh);
        self.shared.saw(self.head);
        placed.answers
    }
}

fn distinct<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut names: Vec<&str> = names.collect();
    names.sort_unstable();
    names.dedup();
    names
}

/// How the last commit went.
#[derive(Default)]
struct Pace {
    size: usize,
    took: Duration,
}

/// The writing connection with its statements.
struct Link {
    session: Session,
    /// Not to be used again, although what it was opened for is done.
    broken: AtomicBool,
    newest: Statement,
    ends: Statement,
    types: Statement,
    hash_at: Statement,
    known_from: Statement,
    known_of: Statement,
    insert: Statement,
}

impl Link {
    async fn open(shared: &Arc<Shared>) -> Result<Self, Error> {
        let session = Session::open(shared).await?;
        let timeout = shared.deadlines.statement.as_millis();
        let set = format!("SET statement_timeout = {timeout}");
        session.within(session.client.batch_execute(&set)).await?;
        let prepare = |sql| session.within(session.client.prepare(sql));
        Ok(Self {
            newest: prepare(NEWEST).await?,
            ends: prepare(
                "SELECT s.name, s.id,
                    (SELECT max(revision) FROM t2m.events e WHERE e.stream_id = s.id)
                 FROM t2m.streams s WHERE s.name = ANY ($1)",
            )
            .await?,
            types: prepare("SELECT name, id FROM t2m.types WHERE name = ANY ($1)").await?,
            hash_at: prepare("SELECT hash FROM t2m.events WHERE position = $1").await?,
            known_from: prepare(
                "SELECT revision, id, position FROM t2m.events
                 WHERE stream_id = $1 AND revision >= $2 ORDER BY revision LIMIT $3",
            )
            .await?,
            known_of: prepare(
                "SELECT revision, id, position FROM t2m.events
                 WHERE stream_id = $1 AND revision >= (
                    SELECT revision FROM t2m.events
                    WHERE stream_id = $1 AND revision >= $2 AND id = $4
                    ORDER BY revision DESC LIMIT 1)
                 ORDER BY revision LIMIT $3",
            )
            .await?,
            insert: prepare(
                "WITH s AS (INSERT INTO t2m.streams SELECT * FROM unnest($1::bigint[], $2::text[])),
                      t AS (INSERT INTO t2m.types SELECT * FROM unnest($3::bigint[], $4::text[]))
                 INSERT INTO t2m.events SELECT * FROM unnest($5::bigint[], $6::bigint[],
                    $7::bigint[], $8::bigint[], $9::uuid[], $10::bigint[], $11::bytea[],
                    $12::bytea[], $13::bytea[])",
            )
            .await?,
            session,
            broken: AtomicBool::new(false),
        })
    }

    /// All of an append but that it stays: the commit is one to the server's disk and its standbys.
    async fn probe(&self) -> Result<(), Error> {
        let append = Append {
            stream: PROBED.into(),
            expected: Expected::NoStream,
            events: vec![NewEvent {
                id: Uuid::nil(),
                kind: PROBED.to_owned(),
                time: DateTime::UNIX_EPOCH,
                data: Vec::new(),
                metadata: Vec::new(),
            }],
            reply: oneshot::channel().0,
            broken: None,
        };
        let (head, ..) = self.begin(&[], &[]).await?;
        let before = Before { head, ends: &HashMap::new(), types: &HashMap::new() };
        let placed = place(&[append], &before, &[Vec::new()]);
        let client = &self.session.client;
        self.session.within(client.batch_execute("SAVEPOINT probe")).await?;
        self.session.within(self.insert(&placed, 0..1)).await?;
        let undo = client.batch_execute("ROLLBACK TO SAVEPOINT probe; COMMIT");
        self.session.within(undo).await
    }

    /// Gives the lock back, if need be with the connection.
    async fn roll_back(&self) {
        let client = &self.session.client;
        if self.session.within(client.batch_execute("ROLLBACK")).await.is_err() {
            self.broken.store(true, Ordering::Relaxed);
        }
    }

    /// Begins a transaction that holds the writers' lock. All of it is sent at once, and each
    /// statement after the lock sees what was committed before the lock was had.
    async fn begin(
        &self,
        streams: &[&str],
        types: &[&str],
    ) -> Result<(Seen, Vec<(ByteString, End)>, Vec<(ByteString, i64)>), Error> {
        let client = &self.session.client;
        let lock = format!("BEGIN; SELECT pg_advisory_xact_lock({WRITE_LOCK})");
        let ends = (!streams.is_empty()).then_some(self.query_ends(streams));
        let types = (!types.is_empty()).then_some(async {
            let rows = client.query(&self.types, &[&types]).await?;
            rows.iter()
                .map(|row| Ok((row.try_get::<_, &str>(0)?.into(), row.try_get(1)?)))
                .collect()
        });
        let answers = try_join4(
            client.batch_execute(&lock),
            client.query_opt(&self.newest, &[]),
            async { OptionFuture::from(ends).await.transpose() },
            async { OptionFuture::from(types).await.transpose() },
        );
        let ((), newest, ends, types) = self.session.within(answers).await?;
        Ok((seen(newest.as_ref())?, ends.unwrap_or_default(), types.unwrap_or_default()))
    }

    async fn ends(&self, streams: &[&str]) -> Result<Vec<(ByteString, End)>, Error> {
        self.session.within(self.query_ends(streams)).await
    }

    async fn query_ends(
        &self,
        streams: &[&str],
    ) -> Result<Vec<(ByteString, End)>, tokio_postgres::Error> {
        let rows = self.session.client.query(&self.ends, &[&streams]).await?;
        let end = |row: &tokio_postgres::Row| {
            let end = End { id: row.try_get(1)?, last: from_sql(row.try_get(2)?) };
            Ok((row.try_get::<_, &str>(0)?.into(), end))
        };
        rows.iter().map(end).collect()
    }

    /// Whether these very events were committed: a hash covers an event and all before it. Asked
    /// under the lock, which the connection that sent them held until it had committed or not.
    async fn has(&self, placed: &Placed) -> Result<bool, Error> {
        let Some(last) = placed.fresh.last() else { return Ok(false) };
        let client = &self.session.client;
        let position = to_sql(last.position);
        let row = self.session.within(client.query_opt(&self.hash_at, &[&position])).await?;
        Ok(row.is_some_and(|row| row.get::<_, &[u8]>(0) == last.hash))
    }

    async fn look_up(&self, lookups: Vec<Option<Lookup>>) -> Result<Vec<Vec<Known>>, Error> {
        let answers = lookups.into_iter().map(async |lookup| {
            let Some(Lookup { stream, from, id, length }) = lookup else { return Ok(Vec::new()) };
            let (from, length) = (to_sql(from), to_sql(length as u64));
            let client = &self.session.client;
            let rows = match id {
                None => client.query(&self.known_from, &[&stream, &from, &length]).await?,
                Some(id) => client.query(&self.known_of, &[&stream, &from, &length, &id]).await?,
            };
            let known = |row: &tokio_postgres::Row| Known {
                revision: from_sql(row.get(0)),
                id: row.get(1),
                position: from_sql(row.get(2)),
            };
            Ok(rows.iter().map(known).collect())
        });
        self.session.within(async { join_all(answers).await.into_iter().collect() }).await
    }

    /// Inserts and commits, in as many statements as its size asks for; the last goes out together
    /// with the commit.
    async fn write(&self, placed: &Placed) -> Result<(), Error> {
        let Some(last) = placed.fresh.last() else { return Ok(()) };
        let mut parts = parts(&placed.fresh);
        let end = parts.pop().unwrap_or(0..0);
        for part in parts {
            self.session.within(self.insert(placed, part)).await?;
        }
        let finish = format!("SELECT pg_notify('{CHANNEL}', '{}'); COMMIT", last.position);
        let finish = self.session.client.batch_execute(&finish);
        let both = futures_util::future::try_join(self.insert(placed, end), finish);
        self.session.within(both).await.map(drop)
    }

    async fn insert(
        &self,
        placed: &Placed,
        part: std::ops::Range<usize>,
    ) -> Result<(), tokio_postgres::Error> {
        // The names go with the first part.
        let named = part.start == 0;
        let (stream_ids, streams) = columns(&placed.new_streams, named);
        let (type_ids, types) = columns(&placed.new_types, named);
        let numbers = &placed.numbers[part.clone()];
        let events = &placed.fresh[part];
        let of_event = |number: fn(&Recorded) -> i64| events.iter().map(number).collect::<Vec<_>>();
        let positions = of_event(|event| to_sql(event.position));
        let revisions = of_event(|event| to_sql(event.revision));
        let times = of_event(|event| event.time.timestamp_micros());
        let of_stream: Vec<i64> = numbers.iter().map(|(stream, _)| *stream).collect();
        let of_type: Vec<i64> = numbers.iter().map(|(_, kind)| *kind).collect();
        let ids: Vec<Uuid> = events.iter().map(|event| event.id).collect();
        let hashes: Vec<&[u8]> = events.iter().map(|event| &event.hash[..]).collect();
        let data: Vec<&[u8]> = events.iter().map(|event| &event.data[..]).collect();
        let metadata: Vec<&[u8]> = events.iter().map(|event| &event.metadata[..]).collect();
        let client = &self.session.client;
        client
            .execute(
                &self.insert,
                &[
                    &stream_ids,
                    &streams,
                    &type_ids,
                    &types,
                    &positions,
                    &of_stream,
                    &revisions,
                    &of_type,
                    &ids,
                    &times,
                    &hashes,
                    &data,
                    &metadata,
                ],
            )
            .await
            .map(drop)
    }
}

fn columns(names: &[(i64, ByteString)], wanted: bool) -> (Vec<i64>, Vec<&str>) {
    names.iter().filter(|_| wanted).map(|(id, name)| (*id, &**name)).unzip()
}

/// One statement may carry so much, and the server a gigabyte at the most.
fn parts(events: &[Recorded]) -> Vec<std::ops::Range<usize>> {
    let (mut parts, mut start, mut bytes) = (Vec::new(), 0, 0);
    for (at, event) in events.iter().enumerate() {
        let size = event.data.len() + event.metadata.len();
        if bytes + size > GROUP_BYTES && at > start {
            parts.push(start..at);
            (start, bytes) = (at, 0);
        }
        bytes += size;
    }
    parts.push(start..events.len());
    parts
}
