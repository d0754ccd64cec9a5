//! Many videos at once.

use reqwest::Method;
use serde_json::{Value, json};

use crate::server::{Answer, Server, Setup, ask, claims, signed};

const ADA: &str = "user_ada";

/// Ada's first token makes her a premium user.
async fn batch(server: &Server, key: Option<&str>, jobs: &Value) -> Answer {
    let mut claims = claims(ADA);
    claims["subscription_tier"] = json!("premium");
    let request = server.request(Method::POST, "videos/batch").bearer_auth(signed(&claims));
    let request = match key {
        Some(key) => request.header("idempotency-key", key),
        None => request,
    };
    ask(request.json(&json!({ "jobs": jobs }))).await
}

fn prompts(count: usize) -> Value {
    (0..count).map(|number| json!({ "prompt": format!("picture {number}") })).collect()
}

fn ids(data: &Value) -> Vec<String> {
    let jobs = data["jobs"].as_array().expect("the answer has jobs").iter();
    jobs.map(|job| job["job_id"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn a_hundred_videos_are_readable_in_their_order_as_soon_as_they_are_acknowledged() {
    let server = Server::start(Setup::clerk());
    let answer = batch(&server, None, &prompts(100)).await;
    assert_eq!(answer.position(), server.log_position().await);
    let data = answer.data(202);
    for (number, job) in data["jobs"].as_array().unwrap().iter().enumerate() {
        assert_eq!(job["prompt"], format!("picture {number}"));
        assert_eq!((&job["status"], &job["state"]), (&json!("processing"), &json!("queued")));
    }
    let listed = server.get(ADA, "jobs?limit=200").await.data(200);
    assert_eq!(listed["items"].as_array().unwrap().len(), 100);
    let last = &ids(&data)[99];
    assert_eq!(server.get(ADA, &format!("jobs/{last}")).await.data(200)["prompt"], "picture 99");
}

#[tokio::test]
async fn one_bad_entry_is_named_and_nothing_is_recorded() {
    let server = Server::start(Setup::clerk());
    batch(&server, None, &prompts(1)).await.data(202);
    let before = server.log_position().await;
    let mut bad = prompts(5);
    bad[3]["prompt"] = json!(" ");
    bad[4]["duration"] = json!(0);
    let mut foreign = prompts(3);
    foreign[2]["source_file_id"] = json!("0190d3a0-0000-7000-8000-000000000001");
    let table: [(Value, &[&str]); 7] = [
        (bad, &["jobs[3].prompt", "jobs[4].duration"]),
        (foreign, &["jobs[2].source_file_id"]),
        (json!([{ "prompt": "a" }, 5]), &["jobs[1]"]),
        (prompts(0), &["jobs"]),
        (prompts(101), &["jobs"]),
        (json!({}), &["jobs"]),
        (Value::Null, &["jobs"]),
    ];
    for (jobs, fields) in table {
        let answer = batch(&server, Some("k"), &jobs).await;
        answer.assert_refused(422, "validation_failed");
        let named = answer.body["detail"]["fields"].as_object().unwrap();
        assert_eq!(named.keys().collect::<Vec<_>>(), fields);
    }
    assert_eq!(server.log_position().await, before);
}

#[tokio::test]
async fn the_same_batch_under_the_same_key_is_asked_for_once() {
    let server = Server::start(Setup::clerk());
    let first = batch(&server, Some("k"), &prompts(3)).await;
    assert_eq!(first.header("idempotent-replayed"), "");
    let end = server.log_position().await;
    let again = batch(&server, Some("k"), &prompts(3)).await;
    assert_eq!(again.header("idempotent-replayed"), "true");
    assert_eq!(again.body, first.body);
    assert_eq!(server.log_position().await, end);

    let mut changed = prompts(3);
    changed[2]["prompt"] = json!("another");
    for other in [prompts(2), prompts(4), changed] {
        batch(&server, Some("k"), &other).await.assert_refused(422, "idempotency_key_reused");
    }
    assert_eq!(server.log_position().await, end, "a refused batch was recorded in part");

    // A single job under the same key is another thing.
    let request = server.request_of(ADA, Method::POST, "videos/generate");
    let single = request.header("idempotency-key", "k").json(&json!({ "prompt": "picture 0" }));
    let single = ask(single).await.data(202);
    assert!(!ids(&first.data(202)).contains(&single["job_id"].as_str().unwrap().to_owned()));
}

#[tokio::test]
async fn the_longest_prompts_fit_a_hundred_times() {
    let server = Server::start(Setup::clerk());
    let jobs: Value = (0..100).map(|_| json!({ "prompt": "🌊".repeat(2000) })).collect();
    assert_eq!(ids(&batch(&server, None, &jobs).await.data(202)).len(), 100);
}
