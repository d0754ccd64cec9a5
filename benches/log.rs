//! How fast the embedded log is: durable appends beside a bare SQLite group commit of the same rows,
//! reading and verifying a million events, and taking them in from another log. `cargo bench --bench log`; the figures are per event.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::DateTime;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use rusqlite::{Connection, params};
use t2m::log::{EmbeddedLog, EventLog, Expected, Import, NewEvent};
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;

const CLIENTS: [u64; 4] = [1, 8, 64, 512];
const BARE_GROUP: u64 = 64;
const READ: u64 = 1_000_000;

criterion_group!(
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    targets = durable_appends, bare_group_commit, read_verify_and_import_a_million
);
criterion_main!(benches);

fn durable_appends(c: &mut Criterion) {
    let runtime = runtime();
    let mut group = c.benchmark_group("durable appends");
    group.throughput(Throughput::Elements(1));
    for clients in CLIENTS {
        let dir = tempfile::tempdir().expect("a directory");
        let log = open(&dir.path().join("log.sqlite"));
        let mut round = 0;
        group.bench_function(format!("{clients} waiting clients"), |b| {
            b.iter_custom(|events| {
                round += 1;
                runtime.block_on(append_side_by_side(&log, round, clients, events))
            });
        });
    }
    group.finish();
}

/// `events` appends of one event, shared out over `clients`, each of which waits for its answer.
async fn append_side_by_side(
    log: &Arc<EmbeddedLog>,
    round: u64,
    clients: u64,
    events: u64,
) -> Duration {
    let start = Instant::now();
    let tasks: Vec<_> = (0..clients)
        .map(|client| {
            let log = log.clone();
            let share = events / clients + u64::from(client < events % clients);
            tokio::spawn(async move {
                for number in 0..share {
                    // A stream has some ten events, as a job has; names sort by their age.
                    let stream = format!("job-{round:06}-{:08}-{client:03}", number / 10);
                    let end = match number % 10 {
                        0 => Expected::NoStream,
                        length => Expected::Revision(length - 1),
                    };
                    let id = (round << 40) | (client << 24) | number;
                    log.append(&stream, end, vec![event(id)]).await.expect("appended");
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.expect("the client ended well");
    }
    start.elapsed()
}

fn bare_group_commit(c: &mut Criterion) {
    let dir = tempfile::tempdir().expect("a directory");
    let conn = bare(&dir.path().join("bare.sqlite"));
    let mut next = 0;
    let mut group = c.benchmark_group("bare SQLite");
    group.throughput(Throughput::Elements(1));
    group.bench_function(format!("groups of {BARE_GROUP}"), |b| {
        b.iter_custom(|events| {
            let start = Instant::now();
            let end = next + events;
            while next < end {
                let upto = end.min(next + BARE_GROUP);
                insert(&conn, next..upto).expect("inserted");
                next = upto;
            }
            start.elapsed()
        });
    });
    let runtime = runtime();
    group.bench_function(format!("{BARE_GROUP} waiting clients"), |b| {
        b.iter_custom(|events| {
            let rounds = events.div_ceil(BARE_GROUP);
            let took = runtime.block_on(wait_for_bare_commits(&conn, next, rounds));
            next += rounds * BARE_GROUP;
            // A round is never cut, so that its share is told.
            took.mul_f64(events as f64 / (rounds * BARE_GROUP) as f64)
        });
    });
    group.finish();
}

/// The least that a group commit for clients who wait can be: each sends a row and waits for its
/// answer, the writer takes one of each client and commits. No revisions, no chain.
async fn wait_for_bare_commits(conn: &Connection, first: u64, rounds: u64) -> Duration {
    let (queue, mut rows) = mpsc::channel::<(u64, oneshot::Sender<()>)>(BARE_GROUP as usize);
    let start = Instant::now();
    let clients: Vec<_> = (0..BARE_GROUP)
        .map(|client| {
            let queue = queue.clone();
            tokio::spawn(async move {
                for round in 0..rounds {
                    let (reply, answer) = oneshot::channel();
                    let row = first + round * BARE_GROUP + client;
                    queue.send((row, reply)).await.expect("the writer lives");
                    answer.await.expect("answered");
                }
            })
        })
        .collect();
    tokio::task::block_in_place(|| {
        for _ in 0..rounds {
            let group: Vec<_> = (0..BARE_GROUP).filter_map(|_| rows.blocking_recv()).collect();
            let mut positions: Vec<u64> = group.iter().map(|(row, _)| *row).collect();
            positions.sort_unstable();
            insert(conn, positions).expect("inserted");
            for (_, reply) in group {
                reply.send(()).expect("the client waits");
            }
        }
    });
    for client in clients {
        client.await.expect("the client ended well");
    }
    start.elapsed()
}

/// The log's tables and settings, without the log.
fn bare(path: &Path) -> Connection {
    let conn = Connection::open(path).expect("a database");
    conn.execute_batch(
        "PRAGMA page_size = 8192; PRAGMA journal_mode = wal; PRAGMA synchronous = full;
         PRAGMA cache_size = -65536; PRAGMA wal_autocheckpoint = 4000;
         CREATE TABLE streams (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE) STRICT;
         CREATE TABLE events (position INTEGER PRIMARY KEY, stream_id INTEGER NOT NULL,
            revision INTEGER NOT NULL, type_id INTEGER NOT NULL, id BLOB NOT NULL,
            time INTEGER NOT NULL, hash BLOB NOT NULL, data BLOB NOT NULL,
            metadata BLOB NOT NULL) STRICT;
         CREATE UNIQUE INDEX events_by_stream ON events (stream_id, revision);",
    )
    .expect("a schema");
    conn
}

fn insert(conn: &Connection, positions: impl IntoIterator<Item = u64>) -> rusqlite::Result<()> {
    conn.prepare_cached("BEGIN IMMEDIATE")?.execute([])?;
    for position in positions {
        // As above: clients side by side, ten events a stream, and one in ten begins it.
        let (round, client) = (position / BARE_GROUP, position % BARE_GROUP);
        let (stream, revision) = (round / 10 * BARE_GROUP + client, round % 10);
        if revision == 0 {
            let name = format!("job-{:012}-{client:03}", round / 10);
            conn.prepare_cached("INSERT INTO streams VALUES (?1, ?2)")?
                .execute(params![stream.cast_signed(), name])?;
        }
        let event = event(position);
        conn.prepare_cached("INSERT INTO events VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)")?
            .execute(params![
                position.cast_signed(),
                stream.cast_signed(),
                revision.cast_signed(),
                1,
                event.id.as_bytes(),
                event.time.timestamp_micros(),
                [0_u8; 32],
                event.data,
                event.metadata,
            ])?;
    }
    conn.prepare_cached("COMMIT")?.execute([])?;
    Ok(())
}

fn read_verify_and_import_a_million(c: &mut Criterion) {
    let runtime = runtime();
    let dir = tempfile::tempdir().expect("a directory");
    let log = open(&dir.path().join("log.sqlite"));
    runtime.block_on(async {
        for batch in 0..READ / 1000 {
            let events = (0..1000).map(|i| event(batch * 1000 + i)).collect();
            let stream = format!("job-{batch}");
            log.append(&stream, Expected::NoStream, events).await.expect("appended");
        }
    });
    let mut group = c.benchmark_group("read_all");
    group.throughput(Throughput::Elements(READ));
    group.bench_function("a million events", |b| {
        b.iter(|| {
            let (mut after, mut read) = (0, 0);
            runtime.block_on(async {
                loop {
                    let page = log.read_all(after, 4096).await.expect("read");
                    let Some(last) = page.last() else { break };
                    after = last.position;
                    read += page.len() as u64;
                }
            });
            assert_eq!(read, READ);
        });
    });
    group.finish();
    // With the file's size, of which the hashed bytes are somewhat less.
    let bytes = runtime.block_on(log.stats()).expect("counted").bytes;
    let mut group = c.benchmark_group("verify");
    group.throughput(Throughput::Bytes(bytes));
    group.bench_function("a million events", |b| {
        b.iter(|| assert_eq!(runtime.block_on(log.verify()).expect("sound").events, READ));
    });
    group.finish();
    let mut group = c.benchmark_group("import");
    group.throughput(Throughput::Elements(READ));
    group.bench_function("a million events", |b| {
        b.iter(|| {
            let path = dir.path().join("copy.sqlite");
            let _ = std::fs::remove_file(&path);
            let mut import = Import::begin(&path).expect("begun");
            runtime.block_on(async {
                for after in (0..READ).step_by(4000) {
                    for event in log.read_all(after, 4000).await.expect("read") {
                        import.take(&event).expect("taken");
                    }
                }
            });
            assert_eq!(import.finish().expect("finished").events, READ);
        });
    });
    group.finish();
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime")
}

fn open(path: &Path) -> Arc<EmbeddedLog> {
    Arc::new(EmbeddedLog::open(path).expect("a log"))
}

/// The size of a job's events: some 300 bytes with metadata.
fn event(number: u64) -> NewEvent {
    let data = format!(
        r#"{{"job_id":"{number:032x}","kind":"video","prompt":"{:080}","options":{{"seconds":8}}}}"#,
        number
    );
    NewEvent {
        id: Uuid::from_u128(u128::from(number)),
        kind: "job.requested.v1".into(),
        time: DateTime::from_timestamp_micros(1_700_000_000_000_000).expect("in range"),
        data: data.into_bytes(),
        metadata: format!(r#"{{"correlation_id":"{number:032x}","actor":"user","source":"api"}}"#)
            .into_bytes(),
    }
}
