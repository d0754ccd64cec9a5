//! A node that is killed, all that are restarted, and a database that goes away.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use futures_util::{StreamExt, stream};
use reqwest::Method;
use serde_json::json;
use tempfile::TempDir;

use super::storm::{self, Storm};
use super::{ADA, Cluster, call, count, lease, text};
use crate::engine_faults::until;
use crate::faults::{library, skip};
use crate::postgres::Postgres;
use crate::server::{LOG_FILE, Server, Setup, ask, claims, signed};

const CLIENTS: usize = 6;
const COMMANDS: usize = 30;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_node_that_is_killed_in_a_storm_leaves_nothing_half_done_and_catches_up() {
    let mut cluster = Cluster::start().await;
    let storm = Storm::start(&cluster, CLIENTS);
    storm.more(COMMANDS).await;
    cluster.nodes[1].kill();
    // The others go on without it.
    storm.more(COMMANDS).await;
    cluster.start_again(1);
    storm.more(COMMANDS).await;
    let told = storm.stop().await;
    storm::assert_kept(&cluster, &told).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nodes_that_are_restarted_one_after_the_other_lose_no_acknowledged_command() {
    let mut cluster = Cluster::start().await;
    let storm = Storm::start(&cluster, CLIENTS);
    for number in 0..cluster.nodes.len() {
        storm.more(COMMANDS).await;
        let began = Instant::now();
        let status = cluster.nodes[number].stop();
        assert!(status.success(), "node {number} ended with {status}");
        let stopped = began.elapsed();
        cluster.start_again(number);
        println!("node {number} stopped in {stopped:?}, was back after {:?}", began.elapsed());
    }
    storm.more(COMMANDS).await;
    let told = storm.stop().await;
    storm::assert_kept(&cluster, &told).await;
}

/// A clock of the nodes' own that goes ahead when it is told.
struct Ahead {
    library: String,
    offset: PathBuf,
    _place: TempDir,
}

impl Ahead {
    fn new() -> Option<Self> {
        let library = library("faketime/libfaketimeMT.so.1")?.to_string_lossy().into_owned();
        let place = TempDir::new().unwrap();
        let ahead = Self { library, offset: place.path().join("offset"), _place: place };
        ahead.by(0);
        Some(ahead)
    }

    fn of(&self, setup: Setup) -> Setup {
        setup
            .with("LD_PRELOAD", &self.library)
            .with("FAKETIME_TIMESTAMP_FILE", self.offset.to_string_lossy())
            .with("FAKETIME_NO_CACHE", "1")
            .with("FAKETIME_DONT_FAKE_MONOTONIC", "1")
    }

    fn by(&self, seconds: u64) {
        let draft = self.offset.with_extension("draft");
        std::fs::write(&draft, format!("+{seconds}s\n")).unwrap();
        std::fs::rename(draft, &self.offset).unwrap();
    }
}

#[tokio::test]
async fn a_lease_outlives_the_node_that_gave_it_and_lapses_once_when_its_worker_is_silent() {
    let Some(clock) = Ahead::new() else {
        return skip("a clock that goes ahead", "libfaketime is not installed");
    };
    let mut cluster = Cluster::start_as(|setup| clock.of(setup)).await;
    let mut held = Vec::new();
    for worker in ["diligent", "silent"] {
        cluster.node(0).generate(ADA, "a lighthouse").await;
        held.push(lease(cluster.node(0), worker, 10).await.expect("a job"));
    }
    cluster.caught_up().await;
    cluster.nodes[0].kill();
    let [diligent, silent] = [0, 1].map(|it| text(&held[it], "job_id"));
    let report = json!({ "lease_id": held[0]["lease_id"], "progress": 10 });
    let path = format!("jobs/{diligent}/progress");
    ask(call(&cluster.nodes[1], &path, &report)).await.data(200);
    // A lease is good for a minute; the one that is renewed, for another.
    clock.by(40);
    ask(call(&cluster.nodes[2], &path, &report)).await.data(200);
    clock.by(70);
    for node in &cluster.nodes[1..] {
        until("the lease has lapsed", async || {
            let job = node.get(ADA, &format!("jobs/{silent}")).await.data(200);
            job["state"] != "running"
        })
        .await;
    }
    ask(call(&cluster.nodes[1], &path, &report)).await.data(200);
    let late = json!({ "lease_id": held[1]["lease_id"], "progress": 10 });
    let late = call(&cluster.nodes[2], &format!("jobs/{silent}/progress"), &late);
    assert_eq!(ask(late).await.status, 409);
    cluster.start_again(0);
    cluster.caught_up().await;
    ask(call(&cluster.nodes[0], &path, &report)).await.data(200);
    let story = cluster.story().await;
    let expired = |job: &str| count(&story[&format!("job-{job}")], "job.lease_expired.v1");
    assert_eq!((expired(&diligent), expired(&silent)), (0, 1));
    cluster.assert_as_replayed();
}

#[tokio::test]
async fn while_the_database_is_away_three_nodes_answer_reads_and_put_off_writes() {
    let Some(clock) = Ahead::new() else {
        return skip("a clock that goes ahead", "libfaketime is not installed");
    };
    let postgres = Postgres::start_own();
    let cluster = Cluster::over(&postgres.address("postgres"), |setup| clock.of(setup)).await;
    let job = cluster.node(0).generate(ADA, "a lighthouse").await;
    let file = text(&cluster.node(1).upload(ADA, "a.txt", "hello").await, "file_id");
    cluster.caught_up().await;
    let path = format!("files/{file}/signed-url");
    let link = text(&cluster.node(2).post(ADA, &path, &json!({})).await.data(200), "url");
    let link = &link[link.find("/api").unwrap()..];

    let began = Instant::now();
    postgres.crash();
    for node in &cluster.nodes {
        until("it is not ready", async || {
            ask(node.request(Method::GET, "system/ready")).await.status == 503
        })
        .await;
    }
    println!("all nodes have noticed after {:?}", began.elapsed());
    // Long enough for a read to be worth noting in its session, which is a write.
    clock.by(120);
    let generate = json!({ "prompt": "meanwhile" });
    let mut slowest = (Duration::ZERO, Duration::ZERO);
    for node in &cluster.nodes {
        for path in ["me", "sessions", "jobs", &format!("jobs/{job}"), "files", "videos"] {
            let began = Instant::now();
            node.get(ADA, path).await.data(200);
            slowest.0 = slowest.0.max(began.elapsed());
        }
        assert_eq!(ask(node.request(Method::GET, link)).await.bytes, b"hello");
        // To sign a link records nothing.
        node.post(ADA, &format!("files/{file}/signed-url"), &json!({})).await.data(200);
        let mut events = node.events(ADA, "events", Some(0)).await;
        assert_eq!(events.next().await.expect("it stays open").data["job_id"], job);
        let began = Instant::now();
        let write = node.request_of(ADA, Method::POST, "videos/generate");
        let write = ask(write.header("idempotency-key", "k").json(&generate)).await;
        slowest.1 = slowest.1.max(began.elapsed());
        write.assert_refused(503, "log_unavailable");
        assert!(!write.header("retry-after").is_empty());
        let cancel = node.post(ADA, &format!("jobs/{job}/cancel"), &json!({})).await;
        cancel.assert_refused(503, "log_unavailable");
    }
    println!("the slowest read took {:?}, the slowest refusal {:?}", slowest.0, slowest.1);
    assert!(slowest.0 < Duration::from_secs(2), "a read waited for the database");

    let began = Instant::now();
    postgres.start_again();
    println!("the database was back after {:?}", began.elapsed());
    for (number, node) in cluster.nodes.iter().enumerate() {
        until("it takes commands again", async || {
            let again = node.request_of(ADA, Method::POST, "videos/generate");
            let again = ask(again.header("idempotency-key", "k").json(&generate)).await;
            again.status == 202
        })
        .await;
        println!("node {number} takes commands {:?} after that began", began.elapsed());
    }
    cluster.caught_up().await;
    let usage = &cluster.node(1).get(ADA, "me").await.data(200)["usage"]["jobs"];
    assert_eq!(*usage, json!({ "queued": 2 }), "a repeated command happened twice");
    cluster.assert_alike(&[ADA]).await;
}

#[tokio::test]
async fn a_new_node_on_an_empty_directory_catches_up_with_a_long_log() {
    const BATCHES: usize = 102;
    const JOBS: usize = 100;
    let cluster = Cluster::start().await;
    let mut claims = claims(ADA);
    claims["subscription_tier"] = json!("premium");
    let token = signed(&claims);
    let jobs: Vec<_> = (0..JOBS).map(|_| json!({ "prompt": "one of many" })).collect();
    let body = json!({ "jobs": jobs });
    let asked = stream::iter(0..BATCHES).map(|number| {
        let request = cluster.node(number).request(Method::POST, "videos/batch");
        ask(request.bearer_auth(&token).json(&body))
    });
    let answers: Vec<_> = asked.buffer_unordered(cluster.nodes.len()).collect().await;
    for answer in answers {
        answer.data(202);
    }
    let end = cluster.caught_up().await;
    // Enough for its read model to be built as a replay builds it.
    assert!(end >= 10_000, "{end}");
    let began = Instant::now();
    let said = TempDir::new().unwrap();
    let said = said.path().join("said");
    let setup = cluster.setup.clone().with("RUST_LOG", "info");
    let node = Server::start(setup.with(LOG_FILE, said.to_string_lossy()));
    println!("{end} events were taken in within {:?}", began.elapsed());
    let said = std::fs::read_to_string(&said).unwrap();
    assert!(said.contains("is built from the whole log") && !said.contains("WARN"), "{said}");
    let usage = &node.get(ADA, "me").await.data(200)["usage"]["jobs"];
    assert_eq!(*usage, json!({ "queued": BATCHES * JOBS }));
    let newest = node.get(ADA, "jobs?limit=200").await.data(200);
    assert_eq!(newest, cluster.node(0).get(ADA, "jobs?limit=200").await.data(200));
    // It goes on from there.
    let job = cluster.node(1).generate(ADA, "one more").await;
    until("the new node has heard of it", async || {
        node.get(ADA, &format!("jobs/{job}")).await.status == 200
    })
    .await;
    let diff = node.printed(&["replay", "--diff"]);
    assert!(diff.contains("live and replayed alike"), "{diff}");
}
