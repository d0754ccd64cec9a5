//! The whole server over KurrentDB, the stand-in of a cluster: it needs nothing but the log to come
//! back, and it lives on while the cluster is away.

use reqwest::Method;
use serde_json::json;

use crate::engine_faults::until;
use crate::server::{Server, Setup, ask};
use crate::standin::{Age, Cluster};

const ADA: &str = "user_ada";

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_server_over_kurrentdb_outlives_its_leaders_and_rebuilds_its_views_from_nothing() {
    let cluster = Cluster::start(3, Age::Old).await;
    let setup = Setup::clerk().with("T2M_LOG", cluster.address());
    let mut server = Server::start(setup);
    let mut jobs = vec![server.generate(ADA, "a lighthouse").await];
    cluster.nodes[0].down();
    cluster.lead(1);
    until("it is ready", async || {
        ask(server.request(Method::GET, "system/ready")).await.status == 200
    })
    .await;
    jobs.push(server.generate(ADA, "another one").await);
    server.kill();
    assert!(!server.data_dir().join("log.sqlite").exists());
    // Nothing but the log, and the keys of what is sealed in it.
    for entry in std::fs::read_dir(server.data_dir()).unwrap().flatten() {
        if entry.file_name().to_string_lossy().starts_with("views") {
            std::fs::remove_file(entry.path()).unwrap();
        }
    }
    let server = server.start_again();
    for job in &jobs {
        assert_eq!(server.get(ADA, &format!("jobs/{job}")).await.data(200)["state"], "queued");
    }
    let diff = server.printed(&["replay", "--diff"]);
    assert!(diff.contains("live and replayed alike"), "{diff}");
    cluster.nodes.iter().for_each(|node| node.down());
    until("it is not ready", async || {
        ask(server.request(Method::GET, "system/ready")).await.status == 503
    })
    .await;
    let write = server.post(ADA, "videos/generate", &json!({ "prompt": "meanwhile" })).await;
    write.assert_refused(503, "log_unavailable");
    assert!(!write.header("retry-after").is_empty());
    let path = format!("jobs/{}", jobs[0]);
    assert_eq!(server.get(ADA, &path).await.data(200)["prompt"], "a lighthouse");
    cluster.nodes.iter().for_each(|node| node.up());
    until("it is ready", async || {
        ask(server.request(Method::GET, "system/ready")).await.status == 200
    })
    .await;
    server.generate(ADA, "afterwards").await;
    let jobs = server.get(ADA, "jobs").await.data(200);
    assert_eq!(jobs["items"].as_array().unwrap().len(), 3, "{jobs}");
}

#[test]
fn a_bad_address_stops_the_server_before_anything_is_opened() {
    let directory = tempfile::tempdir().unwrap();
    let address = "esdb://me:hunter2@127.0.0.1:2113?tls=maybe";
    let output = Setup::clerk().with("T2M_LOG", address).run(directory.path(), &["serve"]);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{errors}");
    assert!(errors.contains("T2M_LOG: not an address such as esdb://"), "{errors}");
    assert!(!errors.contains("hunter2"), "{errors}");
}
