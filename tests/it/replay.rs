//! The read model built anew from the log: beside a running server and taken over by it, compared
//! with what it reads, and stopped at an event that this version does not know.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use t2m::clock::Clock;
use t2m::log::{EmbeddedLog, EventLog, Expected, NewEvent};

use crate::server::{Server, Setup, ask, claims, signed};

const ADA: &str = "user_ada";

/// What an administrator asks.
fn admin(server: &Server, method: Method, path: &str) -> RequestBuilder {
    let mut claims = claims("user_admin");
    claims["role"] = json!("admin");
    server.request(method, path).bearer_auth(signed(&claims))
}

/// Asks until the answer is as wanted; a hang fails.
async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    for _ in 0..600 {
        if holds().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("never: {what}");
}

/// The replay of the server has ended; its status.
async fn ended(server: &Server) -> Value {
    let mut last = Value::Null;
    until("the replay ends", async || {
        let answer = ask(admin(server, Method::GET, "admin/replay")).await.data(200);
        last = answer["replay"].clone();
        last["state"] != "running"
    })
    .await;
    last
}

#[tokio::test]
async fn a_running_server_takes_over_a_replay_without_refusing_a_request() {
    let server = Arc::new(Server::start(Setup::clerk()));
    let job_id = server.generate(ADA, "a lighthouse").await;
    server.upload(ADA, "notes.txt", "hello").await;
    let path = format!("jobs/{job_id}");
    let (done, refused) = (AtomicBool::new(false), AtomicBool::new(false));
    let asking = async {
        while !done.load(Ordering::Relaxed) {
            refused.fetch_or(server.get(ADA, &path).await.status != 200, Ordering::Relaxed);
        }
    };
    let replaying = async {
        let first = server.data_dir().join("views.sqlite");
        let operator = Arc::clone(&server);
        let printed = tokio::task::spawn_blocking(move || operator.printed(&["replay"]));
        let printed = printed.await.expect("the replay succeeds");
        assert!(printed.contains("jobs                1 rows"), "{printed}");
        until("the old file is let go", async || !first.exists()).await;
        let started = ask(admin(&server, Method::POST, "admin/replay")).await.data(202);
        assert_eq!(started["state"], "running");
        assert_eq!(ended(&server).await["state"], "completed");
        done.store(true, Ordering::Relaxed);
    };
    tokio::join!(asking, replaying);
    assert!(!refused.load(Ordering::Relaxed), "a request was refused meanwhile");
    let next = server.generate(ADA, "another").await;
    assert_eq!(server.get(ADA, &format!("jobs/{next}")).await.data(200)["state"], "queued");
    let files = std::fs::read_dir(server.data_dir()).unwrap().flatten();
    let views = files.filter(|file| {
        let name = file.file_name().to_string_lossy().into_owned();
        name.starts_with("views") && name.ends_with(".sqlite")
    });
    assert_eq!(views.count(), 1, "what was replaced is gone");
    // And it outlives a restart.
    let server = Arc::into_inner(server).expect("nobody else uses it").start_again();
    assert_eq!(server.get(ADA, &path).await.data(200)["prompt"], "a lighthouse");
}

#[tokio::test]
async fn a_difference_between_log_and_read_model_is_found_row_by_row() {
    let server = Server::start(Setup::clerk());
    let job_id = server.generate(ADA, "a lighthouse").await;
    let same = server.printed(&["replay", "--diff"]);
    assert!(same.contains("live and replayed alike"), "{same}");
    ask(admin(&server, Method::POST, "admin/replay").json(&json!({ "diff": true })))
        .await
        .data(202);
    let status = ended(&server).await;
    let tables = status["differences"].as_array().expect("tables are compared");
    assert!(tables.iter().any(|table| table["table"] == "jobs"), "{status}");
    assert!(tables.iter().all(|table| table["changed"] == 0 && table["missing"] == 0), "{status}");

    let views = rusqlite::Connection::open(server.data_dir().join("views.sqlite")).unwrap();
    views.execute("UPDATE jobs SET state = 'completed'", []).unwrap();
    let output = server.run(&["replay", "--diff", "--view", "jobs"]);
    let printed = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{printed}");
    assert!(printed.contains("state completed / queued"), "{printed}");
    // The remedy.
    server.printed(&["replay"]);
    let path = format!("jobs/{job_id}");
    let server = server.start_again();
    assert_eq!(server.get(ADA, &path).await.data(200)["state"], "queued");
}

#[tokio::test]
async fn an_event_of_a_newer_version_parks_its_view_until_it_is_skipped() {
    let mut server =
        Server::start(Setup::clerk().with("T2M_WORKER_TOKENS", "a-worker-token-of-the-tests"));
    let held = server.generate(ADA, "a pier").await;
    let worker = |server: &Server, path: &str, body: &Value| {
        let request = server.request(Method::POST, &format!("worker/{path}"));
        ask(request.bearer_auth("a-worker-token-of-the-tests").json(body))
    };
    let body = json!({ "worker_id": "w", "kinds": ["video"] });
    let leased = worker(&server, "lease", &body).await.data(200);
    assert_eq!(leased["job_id"], held);
    let job_id = server.generate(ADA, "a lighthouse").await;
    server.stop();
    let position = {
        let log = EmbeddedLog::open(&server.data_dir().join("log.sqlite")).unwrap();
        let event = NewEvent {
            id: Clock::system().fresh_id(),
            kind: "job.teleported.v7".to_owned(),
            time: Clock::system().now(),
            data: b"{}".to_vec(),
            metadata: b"{}".to_vec(),
        };
        let appended = log.append(&format!("job-{job_id}"), Expected::Any, vec![event]).await;
        appended.unwrap().position
    };
    let server = server.start_again();
    let not_ready = ask(server.request(Method::GET, "system/ready")).await;
    not_ready.assert_refused(503, "not_ready");
    // A balancer that led nobody here would lead nobody anywhere: all nodes are parked alike.
    ask(server.request(Method::GET, "system/ready?for=traffic")).await.data(200);
    let parked = ask(admin(&server, Method::GET, "admin/replay")).await.data(200);
    let parked = &parked["parked"][0];
    assert_eq!((&parked["view"], &parked["position"]), (&json!("jobs"), &json!(position)));
    assert!(parked["reason"].as_str().unwrap().contains("job.teleported.v7"), "{parked}");
    // The others go on; a job is taken, but cannot be shown.
    server.get(ADA, "me").await.data(200);
    server.upload(ADA, "notes.txt", "hello").await;
    let late = server.post(ADA, "videos/generate", &json!({ "prompt": "late" })).await;
    late.assert_refused(503, "not_caught_up");
    // A worker hears that his was recorded: told otherwise, he throws away what he has made.
    let end = || {
        let stats: Value =
            serde_json::from_str(&server.printed(&["log", "stats", "--json"])).unwrap();
        stats["position"].as_u64().unwrap()
    };
    let before = end();
    let body = json!({ "lease_id": leased["lease_id"], "progress": 5, "error": "x" });
    for (step, position) in [("progress", before + 1), ("fail", before + 2)] {
        let answer = worker(&server, &format!("jobs/{held}/{step}"), &body).await;
        assert_eq!((answer.status, answer.position()), (200, position));
        assert_eq!(end(), position);
    }
    // The same is said after another try.
    ended(&server).await;
    ask(admin(&server, Method::POST, "admin/replay")).await.data(202);
    assert_eq!(ended(&server).await["state"], "completed");
    ask(server.request(Method::GET, "system/ready")).await.assert_refused(503, "not_ready");

    server.printed(&["replay", "--skip", &position.to_string()]);
    until("it is ready", async || {
        ask(server.request(Method::GET, "system/ready")).await.status == 200
    })
    .await;
    let jobs = server.get(ADA, "jobs").await.data(200);
    let prompts: Vec<_> =
        jobs["items"].as_array().unwrap().iter().map(|job| job["prompt"].clone()).collect();
    assert_eq!(prompts, ["late", "a lighthouse", "a pier"]);
    // Once nobody knows any more that it was given up, what goes on is not replaced by what does not.
    std::fs::remove_file(server.data_dir().join("views.skipped")).unwrap();
    ask(admin(&server, Method::POST, "admin/replay")).await.data(202);
    let status = ended(&server).await;
    let error = status["error"].as_str().unwrap();
    let told = format!("the view jobs would stand still at position {position}, where");
    assert_eq!(status["state"], "failed");
    assert!(error.starts_with("Nothing was replaced") && error.contains(&told), "{error}");
    assert!(error.contains("job.teleported.v7"), "{error}");
    let refused = server.run(&["replay"]);
    let errors = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{errors}");
    assert!(errors.contains("nothing was replaced") && errors.contains(&told), "{errors}");
    ask(server.request(Method::GET, "system/ready")).await.data(200);
    assert_eq!(server.get(ADA, "jobs").await.data(200)["items"].as_array().unwrap().len(), 3);
}

#[tokio::test]
async fn a_replay_that_lacks_a_key_leaves_what_is_read_in_its_place() {
    let server = Server::start(Setup::clerk());
    let job_id = server.generate(ADA, "a lighthouse").await;
    let key = server.data_dir().join("blobs/keys").join(ADA);
    let kept = std::fs::read(&key).unwrap();
    std::fs::remove_file(&key).unwrap();
    let refused = server.run(&["replay"]);
    let errors = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{errors}");
    assert!(errors.contains("nothing was replaced"), "{errors}");
    assert!(errors.contains("the key of the user user_ada is missing"), "{errors}");
    assert!(!server.data_dir().join("views-1.sqlite").exists());
    std::fs::write(&key, kept).unwrap();
    let printed = server.printed(&["replay"]);
    assert!(printed.contains("views-1.sqlite"), "{printed}");
    assert_eq!(server.get(ADA, &format!("jobs/{job_id}")).await.data(200)["state"], "queued");
}
