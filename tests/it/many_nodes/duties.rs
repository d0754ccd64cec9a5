//! What every node looks after, and what must happen once all the same.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use actix_web::{App, HttpRequest, HttpResponse, HttpServer, web};
use reqwest::Method;
use serde_json::json;

use super::{ADA, Cluster, text};
use crate::engine_faults::until;
use crate::server::{Setup, ask};

#[tokio::test]
async fn a_deadline_that_all_nodes_see_pass_fails_the_job_once() {
    const JOBS: usize = 12;
    let cluster = Cluster::start().await;
    let mut jobs = Vec::new();
    for number in 0..JOBS {
        let body = json!({ "prompt": "too late", "deadline_s": 1 });
        let answer = cluster.node(number).post(ADA, "videos/generate", &body).await;
        jobs.push(text(&answer.data(202), "job_id"));
    }
    for node in &cluster.nodes {
        until("all have failed", async || {
            let usage = node.get(ADA, "me").await.data(200)["usage"]["jobs"].clone();
            usage == json!({ "failed": JOBS })
        })
        .await;
    }
    let story = cluster.story().await;
    for job in &jobs {
        assert_eq!(story[&format!("job-{job}")], ["job.requested.v1", "job.failed.v1"]);
    }
    cluster.assert_alike(&[ADA]).await;
}

/// The `webhook-id` of each request that came.
type Calls = Arc<Mutex<Vec<String>>>;

/// Refuses the first request of each job and takes the second.
fn receiver() -> (String, Calls) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}/", listener.local_addr().unwrap());
    let calls = Calls::default();
    let data = web::Data::new(calls.clone());
    std::thread::spawn(move || {
        actix_web::rt::System::new().block_on(async move {
            let app = move || App::new().app_data(data.clone()).default_service(web::to(take));
            HttpServer::new(app).workers(1).listen(listener).unwrap().run().await.unwrap();
        });
    });
    (address, calls)
}

async fn take(calls: web::Data<Calls>, request: HttpRequest) -> HttpResponse {
    let id = request.headers().get("webhook-id").unwrap().to_str().unwrap().to_owned();
    let mut calls = calls.lock().unwrap();
    let known = calls.contains(&id);
    calls.push(id);
    if known { HttpResponse::Ok() } else { HttpResponse::InternalServerError() }.finish()
}

fn with_callbacks(setup: Setup) -> Setup {
    setup
        .with("CALLBACK_SIGNING_SECRET", "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD")
        .with("CALLBACK_ALLOW_PRIVATE", "true")
        .with("CALLBACK_RETRY_SCHEDULE", "0s,1s,1s")
}

#[tokio::test]
async fn a_callback_is_made_by_one_of_the_nodes_and_repeated_by_one() {
    const JOBS: usize = 12;
    let (url, calls) = receiver();
    let cluster = Cluster::start_as(with_callbacks).await;
    let mut jobs = Vec::new();
    for number in 0..JOBS {
        let body = json!({ "prompt": "tell me", "callback_url": url });
        let answer = cluster.node(number).post(ADA, "videos/generate", &body).await;
        let position = answer.position();
        let job = text(&answer.data(202), "job_id");
        let path = format!("jobs/{job}/cancel");
        let cancel = cluster.node(number + 1).request_of(ADA, Method::POST, &path);
        ask(cancel.header("x-log-position", position).json(&json!({}))).await.data(200);
        jobs.push(job);
    }
    let told = async |number: usize, job: &str| {
        let path = format!("jobs/{job}/callbacks");
        let items = cluster.node(number).get(ADA, &path).await.data(200)["items"].clone();
        (items[0]["delivered"] == json!(true)).then(|| items[0]["attempts"].clone())
    };
    for (number, job) in jobs.iter().enumerate() {
        until("it was delivered", async || told(number, job).await.is_some()).await;
    }
    // A node that was second looks again after ten seconds.
    tokio::time::sleep(Duration::from_secs(12)).await;
    let seen = calls.lock().unwrap().clone();
    assert_eq!(seen.len(), 2 * JOBS, "{seen:#?}");
    for (number, job) in jobs.iter().enumerate() {
        for node in 0..super::NODES {
            let attempts = told(number + node, job).await.expect("it was delivered");
            let statuses: Vec<_> = attempts.as_array().unwrap().iter().collect();
            let statuses: Vec<_> = statuses.iter().map(|it| it["status"].clone()).collect();
            assert_eq!(statuses, [500, 200], "{attempts}");
        }
    }
}
