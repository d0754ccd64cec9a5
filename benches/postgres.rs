//! How fast the log over PostgreSQL is: durable appends beside the plain design, one insert and one
//! commit an append over a connection a client, on the same server. `cargo bench --bench postgres`;
//! it starts a server of its own (scripts/postgres), and the figures are per append.

use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::DateTime;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use t2m::log::{EventLog, Expected, NewEvent, PostgresLog};
use tokio::runtime::Runtime;
use tokio_postgres::Client;
use uuid::Uuid;

#[path = "common/server.rs"]
mod server;

use server::{Server, connect};

const CLIENTS: [u64; 3] = [1, 8, 64];
const READ: u64 = 200_000;

criterion_group!(
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3));
    targets = side_by_side
);
criterion_main!(benches);

fn side_by_side(c: &mut Criterion) {
    let server = Server::start();
    durable_appends(c, &server);
    one_insert_one_commit(c, &server);
    read_all(c, &server);
}

fn durable_appends(c: &mut Criterion, server: &Server) {
    let runtime = runtime();
    let log = runtime.block_on(PostgresLog::open(&server.database("appends", &runtime)));
    let log = Arc::new(log.expect("a log"));
    let mut group = c.benchmark_group("durable appends");
    group.throughput(Throughput::Elements(1));
    let mut round = 0;
    for clients in CLIENTS {
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
    log: &Arc<PostgresLog>,
    round: u64,
    clients: u64,
    events: u64,
) -> Duration {
    let start = Instant::now();
    let tasks: Vec<_> = (0..clients)
        .map(|client| {
            let log = log.clone();
            tokio::spawn(async move {
                for number in 0..share(events, clients, client) {
                    // A stream has some ten events, as a job has.
                    let stream = stream(round, client, number);
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

/// What is written first when one needs an event store: a sequence gives positions, a unique index
/// holds the revisions, each client has a connection and commits each of its events.
fn one_insert_one_commit(c: &mut Criterion, server: &Server) {
    let runtime = runtime();
    let address = server.database("plain", &runtime);
    let clients = runtime.block_on(async {
        let mut clients = Vec::new();
        for _ in 0..*CLIENTS.last().expect("some") {
            clients.push(Arc::new(connect(&address).await));
        }
        clients[0].batch_execute(PLAIN).await.expect("a table");
        clients
    });
    let mut group = c.benchmark_group("one insert, one commit");
    group.throughput(Throughput::Elements(1));
    let mut round = 0;
    for count in CLIENTS {
        group.bench_function(format!("{count} waiting clients"), |b| {
            b.iter_custom(|events| {
                round += 1;
                let clients = &clients[..usize::try_from(count).expect("a small number")];
                runtime.block_on(insert_side_by_side(clients, round, events))
            });
        });
    }
    group.finish();
}

const PLAIN: &str = "CREATE TABLE events (
    position bigserial PRIMARY KEY, stream text NOT NULL, revision bigint NOT NULL,
    type text NOT NULL, id uuid NOT NULL, time bigint NOT NULL, data bytea NOT NULL,
    metadata bytea NOT NULL, UNIQUE (stream, revision))";

async fn insert_side_by_side(clients: &[Arc<Client>], round: u64, events: u64) -> Duration {
    let count = clients.len() as u64;
    let sql = "INSERT INTO events (stream, revision, type, id, time, data, metadata)
               VALUES ($1, $2, $3, $4, $5, $6, $7) RETURNING position";
    let mut prepared = Vec::new();
    for client in clients {
        prepared.push((client.clone(), client.prepare(sql).await.expect("prepared")));
    }
    let start = Instant::now();
    let tasks: Vec<_> = (0..)
        .zip(prepared)
        .map(|(client, (connection, insert))| {
            tokio::spawn(async move {
                for number in 0..share(events, count, client) {
                    let event = event((round << 40) | (client << 24) | number);
                    let (stream, revision) = (stream(round, client, number), number % 10);
                    connection
                        .query_one(
                            &insert,
                            &[
                                &stream,
                                &revision.cast_signed(),
                                &event.kind,
                                &event.id,
                                &event.time.timestamp_micros(),
                                &event.data,
                                &event.metadata,
                            ],
                        )
                        .await
                        .expect("inserted");
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.expect("the client ended well");
    }
    start.elapsed()
}

/// What a new node does first.
fn read_all(c: &mut Criterion, server: &Server) {
    let runtime = runtime();
    let address = server.database("reading", &runtime);
    runtime.block_on(async {
        let log = PostgresLog::open(&address).await.expect("a log");
        for batch in 0..READ / 1000 {
            let events = (0..1000).map(|number| event(batch * 1000 + number)).collect();
            let stream = format!("job-{batch}");
            log.append(&stream, Expected::NoStream, events).await.expect("appended");
        }
    });
    let mut group = c.benchmark_group("read_all");
    group.throughput(Throughput::Elements(READ));
    group.bench_function(format!("{READ} events"), |b| {
        b.iter(|| {
            runtime.block_on(async {
                let log = PostgresLog::open_read_only(&address).await.expect("the log");
                let (mut after, mut read) = (0, 0);
                while after < READ {
                    let page = log.read_all(after, 4096).await.expect("read");
                    after = page.last().expect("there are more").position;
                    read += page.len() as u64;
                }
                assert_eq!(read, READ);
            });
        });
    });
    group.finish();
}

fn share(events: u64, clients: u64, client: u64) -> u64 {
    events / clients + u64::from(client < events % clients)
}

fn stream(round: u64, client: u64, number: u64) -> String {
    format!("job-{round:06}-{:08}-{client:03}", number / 10)
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime")
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
