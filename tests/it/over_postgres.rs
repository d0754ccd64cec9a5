//! The whole server over PostgreSQL: it needs nothing but the log to come back, and it lives on while
//! the database is away.

use std::collections::HashSet;

use reqwest::Method;
use serde_json::json;

use crate::engine_faults::until;
use crate::postgres::{Postgres, free_port};
use crate::server::{Server, Setup, ask, claims, signed};

const ADA: &str = "user_ada";

#[tokio::test]
async fn a_server_over_postgres_outlives_a_crash_and_rebuilds_its_views_from_nothing() {
    let database = Postgres::shared().database().await;
    let setup = Setup::clerk().with("T2M_LOG", Postgres::shared().address(&database));
    let mut server = Server::start(setup);
    let jobs: Vec<String> =
        futures_util::future::join_all((0..5).map(|_| server.generate(ADA, "a lighthouse"))).await;
    server.kill();
    assert!(!server.data_dir().join("log.sqlite").exists());
    // Nothing but the log, and the keys of what is sealed in it.
    for entry in std::fs::read_dir(server.data_dir()).unwrap().flatten() {
        if entry.file_name().to_string_lossy().starts_with("views") {
            std::fs::remove_file(entry.path()).unwrap();
        }
    }
    let server = server.start_again();
    let mut there = HashSet::new();
    for job in &jobs {
        assert_eq!(server.get(ADA, &format!("jobs/{job}")).await.data(200)["state"], "queued");
        there.insert(job);
    }
    assert_eq!(there.len(), 5);
    let diff = server.printed(&["replay", "--diff"]);
    assert!(diff.contains("live and replayed alike"), "{diff}");
}

#[tokio::test]
async fn while_the_database_is_away_reads_go_on_and_writes_say_when_to_come_again() {
    let postgres = Postgres::start_own();
    let server = Server::start(Setup::clerk().with("T2M_LOG", postgres.address("postgres")));
    let job = server.generate(ADA, "a lighthouse").await;
    postgres.crash();
    let path = format!("jobs/{job}");
    until("it is not ready", async || {
        ask(server.request(Method::GET, "system/ready")).await.status == 503
    })
    .await;
    let write = server.post(ADA, "videos/generate", &json!({ "prompt": "meanwhile" })).await;
    write.assert_refused(503, "log_unavailable");
    assert!(!write.header("retry-after").is_empty());
    assert_eq!(server.get(ADA, &path).await.data(200)["prompt"], "a lighthouse");
    // Each new token without a session's id begins a session, which cannot be noted now.
    let mut claims = claims(ADA);
    claims.as_object_mut().unwrap().remove("sid");
    let by_template = |method, path: &str| {
        server.request(method, path).bearer_auth(signed(&claims)).json(&json!({ "prompt": "now" }))
    };
    ask(by_template(Method::GET, &path)).await.data(200);
    let write = ask(by_template(Method::POST, "videos/generate")).await;
    write.assert_refused(503, "log_unavailable");
    postgres.start_again();
    until("it is ready", async || {
        ask(server.request(Method::GET, "system/ready")).await.status == 200
    })
    .await;
    server.generate(ADA, "afterwards").await;
    let jobs = server.get(ADA, "jobs").await.data(200);
    assert_eq!(jobs["items"].as_array().unwrap().len(), 2, "{jobs}");
}

#[test]
fn a_bad_address_stops_the_server_before_anything_is_opened() {
    let address = format!("postgres://me:hunter2@127.0.0.1:{}/d?sslmode=maybe", free_port());
    let directory = tempfile::tempdir().unwrap();
    let output = Setup::clerk().with("T2M_LOG", address).run(directory.path(), &["serve"]);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{errors}");
    assert!(errors.contains("T2M_LOG") && errors.contains("sslmode"), "{errors}");
    assert!(!errors.contains("hunter2"), "{errors}");
}
