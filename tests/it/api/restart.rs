//! What outlives a crash, and what keeps a server from starting.

use std::collections::BTreeMap;
use std::sync::Mutex;

use futures_util::StreamExt;
use futures_util::stream;
use reqwest::{Method, RequestBuilder};
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::server::{Server, Setup, ask, try_ask};

const ADA: &str = "user_ada";
const JOBS: usize = 200;
/// So many are acknowledged when the server is killed.
const ENOUGH: usize = 80;

fn keyed(server: &Server, number: usize, prompt: &str) -> RequestBuilder {
    let request = server.request_of(ADA, Method::POST, "videos/generate");
    let request = request.header("idempotency-key", format!("key-{number}"));
    request.json(&json!({ "prompt": format!("{prompt} {number}") }))
}

#[tokio::test]
async fn every_acknowledged_job_outlives_a_kill_and_every_retry_finds_its_own() {
    let mut server = Server::start(Setup::clerk());
    server.get(ADA, "me").await.data(200);
    let acknowledged = Mutex::new(BTreeMap::new());
    stream::iter(0..JOBS)
        .for_each_concurrent(16, |number| {
            let request = keyed(&server, number, "job");
            let (server, acknowledged) = (&server, &acknowledged);
            async move {
                let Ok(answer) = try_ask(request).await else { return };
                let job = answer.data(202);
                let mut acknowledged = acknowledged.lock().expect("no test thread panicked");
                acknowledged.insert(number, job);
                if acknowledged.len() == ENOUGH {
                    server.send(Signal::KILL);
                }
            }
        })
        .await;
    server.kill();
    let acknowledged = acknowledged.into_inner().unwrap();
    assert!((ENOUGH..JOBS).contains(&acknowledged.len()), "{}", acknowledged.len());

    let server = server.start_again();
    server.printed(&["log", "verify"]);
    for job in acknowledged.values() {
        let path = format!("jobs/{}", job["job_id"].as_str().unwrap());
        let found = server.get(ADA, &path).await.data(200);
        assert_eq!((&found["prompt"], &found["state"]), (&job["prompt"], &json!("queued")));
    }
    for number in 0..JOBS {
        let answer = ask(keyed(&server, number, "job")).await;
        if let Some(first) = acknowledged.get(&number) {
            assert_eq!(answer.header("idempotent-replayed"), "true");
            assert_eq!(answer.data(202), *first);
        } else {
            answer.data(202);
        }
    }
    let listed = server.get(ADA, "jobs?limit=200").await.data(200);
    assert_eq!(listed["items"].as_array().map(Vec::len), Some(JOBS));
    assert_eq!(listed["next_cursor"], Value::Null);
}

#[tokio::test]
async fn a_key_used_again_gives_the_same_answer_or_is_refused_for_another_body() {
    let server = Server::start(Setup::clerk());
    let first = ask(keyed(&server, 1, "job")).await;
    assert_eq!(first.header("idempotent-replayed"), "");
    let first = first.data(202);
    let server = server.start_again();
    let again = ask(keyed(&server, 1, "job")).await;
    assert_eq!(again.header("idempotent-replayed"), "true");
    assert_eq!(again.data(202), first);
    let other = ask(keyed(&server, 1, "another job")).await;
    other.assert_refused(422, "idempotency_key_reused");
    let of_bob = server.request_of("user_bob", Method::POST, "videos/generate");
    let of_bob = of_bob.header("idempotency-key", "key-1").json(&json!({ "prompt": "job 1" }));
    assert_ne!(ask(of_bob).await.data(202)["job_id"], first["job_id"]);
    let listed = server.get(ADA, "jobs").await.data(200);
    assert_eq!(listed["items"].as_array().map(Vec::len), Some(1));
}

#[tokio::test]
async fn a_session_that_was_ended_stays_ended_and_a_link_stays_good() {
    let server = Server::start(Setup::clerk());
    let file = server.upload(ADA, "notes.txt", "hello").await;
    let path = format!("files/{}/signed-url", file["file_id"].as_str().unwrap());
    let link = server.post(ADA, &path, &json!({})).await.data(200);
    let link = link["url"].as_str().unwrap().strip_prefix(&server.address).unwrap().to_owned();
    server.get("user_bob", "me").await.data(200);
    server.delete("user_bob", "sessions/sess_user_bob").await.data(200);
    let server = server.start_again();
    server.get("user_bob", "me").await.assert_refused(401, "session_ended");
    assert_eq!(ask(server.request(Method::GET, &link)).await.bytes, b"hello");
}

#[test]
fn bad_configuration_is_named_with_exit_code_2_and_no_secret_is_shown() {
    let table: [(&[(&'static str, &str)], &str); 9] = [
        (&[("DEV_MODE", "true"), ("ENVIRONMENT", "production")], "DEV_MODE"),
        (&[("CLERK_WEBHOOK_SECRET", "hunter2")], "CLERK_WEBHOOK_SECRET"),
        (&[("CLERK_WEBHOOK_SECRET", "whsec_hunter2!")], "CLERK_WEBHOOK_SECRET"),
        (&[("CLERK_JWT_KEY", "hunter2"), ("CLERK_ISSUER", "https://a.test")], "CLERK_JWT_KEY"),
        (&[("FILE_SIGNING_SECRET", "hunter2,,")], "FILE_SIGNING_SECRET"),
        (&[("RATE_LIMIT_READS", "many")], "RATE_LIMIT_READS"),
        (&[("T2M_WORKER_TOKENS", "my hunter2")], "T2M_WORKER_TOKENS"),
        (&[("T2M_RUNNING_PER_USER", "premium=0")], "T2M_RUNNING_PER_USER"),
        (&[("T2M_LOG", "mysql://me:hunter2@host/db")], "T2M_LOG"),
    ];
    for (variables, named) in table {
        let data = TempDir::new().unwrap();
        let setup =
            variables.iter().fold(Setup::development(), |it, (name, value)| it.with(name, *value));
        let output = setup.run(data.path(), &["serve"]);
        let errors = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{errors}");
        assert!(errors.lines().any(|line| line.starts_with(named)), "{named} is not in {errors}");
        assert!(!errors.contains("hunter2"), "{errors}");
        assert_eq!(output.stdout, b"");
        assert_eq!(data.path().read_dir().unwrap().count(), 0, "something was started");
    }
}

#[tokio::test]
async fn a_second_server_on_the_same_data_says_so_and_leaves_the_first_alone() {
    let server = Server::start(Setup::clerk());
    server.generate(ADA, "before").await;
    let output = server.run(&["serve"]);
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{errors}");
    assert_eq!((errors.lines().count(), output.stdout.len()), (1, 0), "{errors}");
    assert!(errors.starts_with("t2m: opening the log"), "{errors}");
    server.generate(ADA, "after").await;
}

#[tokio::test]
async fn a_log_that_is_damaged_where_the_views_begin_keeps_no_server_from_answering() {
    let mut server = Server::start(Setup::clerk());
    server.generate(ADA, "before").await;
    assert!(server.stop().success());
    let log = rusqlite::Connection::open(server.data_dir().join("log.sqlite")).unwrap();
    log.execute("UPDATE events SET data = x'7b7d' WHERE position = 2", []).unwrap();
    drop(log);
    for entry in server.data_dir().read_dir().unwrap() {
        let entry = entry.unwrap();
        if entry.file_name().to_string_lossy().starts_with("views.sqlite") {
            std::fs::remove_file(entry.path()).unwrap();
        }
    }
    let server = server.start_again();
    ask(server.request(Method::GET, "system/health")).await.data(200);
    let ready = ask(server.request(Method::GET, "system/ready")).await;
    ready.assert_refused(503, "not_ready");
    let reason = &ready.body["detail"]["reason"];
    assert!(reason.as_str().is_some_and(|it| it.ends_with("is parked at position 2")), "{reason}");
    let text = ask(server.request(Method::GET, "/metrics")).await.bytes;
    let text = String::from_utf8(text).unwrap();
    assert!(text.contains("t2m_projection_parked{view=\"jobs\"} 1"), "{text}");
}

#[tokio::test]
async fn a_server_told_to_stop_ends_its_streams_and_stops_in_order() {
    let mut server = Server::start(Setup::clerk());
    let mut events = server.events(ADA, "events", None).await;
    assert!(server.stop().success());
    assert_eq!(events.next().await, None);
}
