//! Workers that ask all nodes at once: every job is taken by one of them.

use std::collections::HashSet;

use futures_util::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};

use super::{ADA, Cluster, NODES, WORKER, call, count, lease, text};
use crate::server::{Setup, ask};

const WORKERS: usize = 20;
/// As little of an MP4 as its signature.
const MP4: &[u8] = b"\0\0\0\x18ftypisom\0\0\0\0isommp42 and then some frames";

fn without_caps(setup: Setup) -> Setup {
    setup.with("T2M_RUNNING_PER_USER", "standard=1000")
}

/// All workers at once, each at the next node; what they got.
async fn rush(cluster: &Cluster, wait_s: u64) -> Vec<Value> {
    let asked = (0..WORKERS)
        .map(async |number| lease(cluster.node(number), &format!("worker-{number}"), wait_s).await);
    join_all(asked).await.into_iter().flatten().collect()
}

#[tokio::test]
async fn of_twenty_workers_over_three_nodes_exactly_one_takes_a_job() {
    let cluster = Cluster::start_as(without_caps).await;
    for round in 0..10 {
        let job = cluster.node(round).generate(ADA, "a lighthouse").await;
        cluster.caught_up().await;
        let taken = rush(&cluster, 0).await;
        let ids: Vec<String> = taken.iter().map(|it| text(it, "job_id")).collect();
        assert_eq!(ids, [job], "round {round}");
    }
    for (stream, types) in cluster.story().await {
        let leases = usize::from(stream.starts_with("job-"));
        assert_eq!(count(&types, "job.leased.v1"), leases, "{stream}");
    }
    cluster.assert_alike(&[ADA]).await;
}

#[tokio::test]
async fn twenty_workers_over_three_nodes_take_each_of_many_jobs_once() {
    const JOBS: usize = 60;
    let cluster = Cluster::start_as(without_caps).await;
    let asked = (0..JOBS).map(async |number| {
        cluster.node(number).generate(&format!("user_{}", number % 6), "a lighthouse").await
    });
    let jobs: HashSet<String> = join_all(asked).await.into_iter().collect();
    assert_eq!(jobs.len(), JOBS);
    // They come while the workers ask: some look at a view that has not heard of all of them.
    let mut taken = Vec::new();
    while taken.len() < JOBS {
        let more = rush(&cluster, 1).await;
        assert!(!more.is_empty(), "{} of {JOBS} jobs were never taken", JOBS - taken.len());
        taken.extend(more.iter().map(|it| text(it, "job_id")));
    }
    assert_eq!(taken.len(), JOBS, "one was taken twice");
    assert_eq!(taken.into_iter().collect::<HashSet<_>>(), jobs);
    assert!(rush(&cluster, 0).await.is_empty());
    let story = cluster.story().await;
    for job in &jobs {
        assert_eq!(story[&format!("job-{job}")], ["job.requested.v1", "job.leased.v1"]);
    }
    cluster.assert_alike(&["user_0", "user_5"]).await;
}

#[tokio::test]
async fn a_worker_may_speak_to_another_node_at_each_step() {
    let cluster = Cluster::start().await;
    let job = cluster.node(0).generate(ADA, "a lighthouse").await;
    let leased = lease(cluster.node(1), "w", 10).await.expect("it waits for it");
    let lease_id = text(&leased, "lease_id");
    let body = json!({ "lease_id": lease_id, "progress": 40 });
    let path = |what: &str| format!("jobs/{job}/{what}");
    ask(call(cluster.node(2), &path("progress"), &body)).await.data(200);
    let put = cluster
        .node(0)
        .request(Method::PUT, &format!("worker/{}?lease_id={lease_id}", path("output")));
    ask(put.bearer_auth(WORKER).body(MP4)).await.data(200);
    let done = call(cluster.node(1), &path("complete"), &json!({ "lease_id": lease_id }));
    let done = ask(done).await.data(200);
    // The answer was lost, and the worker asks elsewhere.
    let again = call(cluster.node(2), &path("complete"), &json!({ "lease_id": lease_id }));
    let end = cluster.caught_up().await;
    assert_eq!(ask(again).await.data(200), done);
    assert_eq!(cluster.caught_up().await, end, "it was completed twice");
    for node in &cluster.nodes {
        let link = node.post(ADA, &format!("videos/{job}/signed-url"), &json!({})).await;
        let link = text(&link.data(200), "url");
        let path = &link[link.find("/api").unwrap()..];
        for other in &cluster.nodes {
            assert_eq!(ask(other.request(Method::GET, path)).await.bytes, MP4);
        }
    }
    cluster.assert_alike(&[ADA]).await;
}

/// What the README says: each node knows what it has given itself, and hears of the others' leases a
/// moment later.
#[tokio::test]
async fn the_cap_of_a_user_is_exceeded_by_one_a_node_at_most_and_holds_again_at_once() {
    let cluster = Cluster::start_as(|setup| setup.with("T2M_RUNNING_PER_USER", "standard=1")).await;
    for number in 0..10 {
        cluster.node(number).generate(ADA, "a lighthouse").await;
    }
    cluster.caught_up().await;
    let taken = rush(&cluster, 0).await.len();
    println!("{taken} leases under a cap of 1 at {NODES} nodes");
    assert!((1..=NODES).contains(&taken), "{taken}");
    cluster.caught_up().await;
    assert!(rush(&cluster, 0).await.is_empty());
}
