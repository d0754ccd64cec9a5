//! The lease protocol as a remote worker speaks it, and all the ways to speak it badly.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::multipart::{Form, Part};
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::server::{Answer, Server, Setup, ask};

const ADA: &str = "user_ada";
const TOKEN: &str = "a-worker-token-of-the-tests";
const NOBODY: &str = "0190d3a0-0000-7000-8000-000000000001";
/// As little of an MP4 as its signature.
const MP4: &[u8] = b"\0\0\0\x18ftypisom\0\0\0\0isommp42 and then some frames";
const JPEG: &[u8] = &[0xff, 0xd8, 0xff, 0xe0, 0, 16, b'J', b'F', b'I', b'F'];

fn server() -> Server {
    let tokens = format!("another-token-of-the-tests,{TOKEN}");
    Server::start(Setup::clerk().with("T2M_WORKER_TOKENS", tokens).with("MAX_UPLOAD_BYTES", "4096"))
}

fn call(server: &Server, method: Method, path: &str) -> RequestBuilder {
    server.request(method, &format!("worker/{path}")).bearer_auth(TOKEN)
}

async fn post(server: &Server, path: &str, body: &Value) -> Answer {
    ask(call(server, Method::POST, path).json(body)).await
}

async fn lease(server: &Server) -> Answer {
    post(server, "lease", &json!({ "worker_id": "w", "kinds": ["video"] })).await
}

/// What an administrator sees of the log.
async fn events(server: &Server, query: &str) -> Vec<Value> {
    let mut admin = crate::server::claims("user_admin");
    admin["role"] = json!("admin");
    let request = server.request(Method::GET, &format!("admin/events?{query}"));
    let mut found = ask(request.bearer_auth(crate::server::signed(&admin))).await.data(200);
    serde_json::from_value(found["items"].take()).unwrap()
}

/// A worker with a job.
struct Held {
    job: String,
    lease: String,
}

impl Held {
    async fn new(server: &Server) -> Self {
        let data = lease(server).await.data(200);
        let text = |name: &str| data[name].as_str().unwrap().to_owned();
        Self { job: text("job_id"), lease: text("lease_id") }
    }

    fn put(&self, server: &Server, query: &str) -> RequestBuilder {
        let path = format!("jobs/{}/output?lease_id={}{query}", self.job, self.lease);
        call(server, Method::PUT, &path)
    }

    async fn post(&self, server: &Server, what: &str, mut body: Value) -> Answer {
        body["lease_id"] = json!(self.lease);
        post(server, &format!("jobs/{}/{what}", self.job), &body).await
    }
}

#[tokio::test]
async fn a_remote_worker_makes_a_video() {
    let server = server();
    assert_eq!(lease(&server).await.status, 204);
    let job = server.generate(ADA, "a lighthouse").await;
    let waiting = server.get(ADA, &format!("jobs/{job}")).await.data(200);
    assert_eq!(waiting["queue_position"], 1);

    let leased = lease(&server).await.data(200);
    assert_eq!((&leased["job_id"], &leased["kind"]), (&json!(job), &json!("video")));
    assert_eq!((&leased["prompt"], &leased["attempt"]), (&json!("a lighthouse"), &json!(1)));
    assert_eq!(leased["options"]["quality"], "720p");
    assert_eq!(leased["outputs"][0]["name"], "video");
    let held = Held { job: job.clone(), lease: leased["lease_id"].as_str().unwrap().to_owned() };

    let body = json!({ "progress": 40, "message": "drawing" });
    let report = held.post(&server, "progress", body).await.data(200);
    assert_eq!(report["cancelled"], false);
    assert_eq!(server.get(ADA, &format!("jobs/{job}")).await.data(200)["progress"], 40);

    let digest = format!("sha-256=:{}:", STANDARD.encode(Sha256::digest(MP4)));
    let put = held.put(&server, "").header("content-digest", digest).body(MP4);
    let stored = ask(put).await.data(200);
    assert_eq!(stored["sha256"], hex::encode(Sha256::digest(MP4)));
    ask(held.put(&server, "&name=poster").body(JPEG)).await.data(200);
    let captions = "\u{feff}WEBVTT\n\n00:00.000 --> 00:01.000\na lighthouse\n";
    ask(held.put(&server, "&name=captions").body(captions)).await.data(200);
    let files = server.get(ADA, "files").await.data(200);
    assert_eq!(files["items"], json!([]), "seen before it is completed");

    let done = held.post(&server, "complete", json!({ "width": 64, "height": 48 })).await;
    let again = held.post(&server, "complete", json!({})).await;
    assert_eq!((done.status, &done.body), (again.status, &again.body));
    let output = &done.data(200)["output"];
    assert_eq!((&output["width"], &output["duration"]), (&json!(64), &json!(10.0)));
    let shown = server.get(ADA, &format!("jobs/{job}")).await.data(200);
    assert_eq!((&shown["state"], &shown["output"]), (&json!("completed"), output));
    let link = server.post(ADA, &format!("videos/{job}/signed-url"), &json!({})).await.data(200);
    let link = link["url"].as_str().unwrap().strip_prefix(&server.address).unwrap().to_owned();
    assert_eq!(ask(server.request(Method::GET, &link)).await.bytes, MP4);
}

#[tokio::test]
async fn what_a_worker_does_is_told_as_its_own_and_where_it_lies() {
    let server = server();
    server.generate(ADA, "a lighthouse").await;
    server.generate(ADA, "a pier").await;
    let named = |request: RequestBuilder, id: &str| request.header("x-request-id", id.to_owned());
    let mut steps = Vec::new();
    for (worker, ends) in [("w-1", "complete"), ("w-2", "fail")] {
        let body = json!({ "worker_id": worker, "kinds": ["video"] });
        let request = call(&server, Method::POST, "lease").json(&body);
        let leased = ask(named(request, &format!("{worker}-lease"))).await;
        steps.push((worker, "lease", leased.position()));
        assert_eq!(leased.position(), server.log_position().await);
        let leased = leased.data(200);
        let text = |name: &str| leased[name].as_str().unwrap().to_owned();
        let held = Held { job: text("job_id"), lease: text("lease_id") };
        ask(held.put(&server, "").body(MP4)).await.data(200);
        for step in ["progress", ends] {
            let path = format!("jobs/{}/{step}", held.job);
            let body = json!({ "lease_id": held.lease, "progress": 1, "error": "x" });
            let request = call(&server, Method::POST, &path).json(&body);
            let done = ask(named(request, &format!("{worker}-{step}"))).await;
            steps.push((worker, step, done.position()));
            done.data(200);
        }
    }
    assert_eq!(steps.last().unwrap().2, server.log_position().await);
    let all = events(&server, "limit=200").await;
    for (worker, step, position) in steps {
        let event = &events(&server, &format!("from={}&limit=1", position - 1)).await[0];
        let before = event["revision"].as_u64().unwrap() - 1;
        let is_before = |it: &&Value| it["stream"] == event["stream"] && it["revision"] == before;
        let expected = json!({
            "correlation_id": format!("{worker}-{step}"),
            "causation_id": all.iter().find(is_before).unwrap()["id"],
            "actor": worker,
            "source": "worker",
        });
        assert_eq!(event["metadata"], expected, "{event}");
    }
}

#[tokio::test]
async fn a_lease_tells_the_request_of_the_job_and_is_part_of_it_unless_the_worker_names_another() {
    let server = server();
    for (of_job, of_call) in [("req_one", None), ("req_two", Some("poll_two"))] {
        let request = server.request_of(ADA, Method::POST, "videos/generate");
        let request = request.header("x-request-id", of_job).json(&json!({ "prompt": "a pier" }));
        let job = ask(request).await.data(202);
        let body = json!({ "worker_id": "w", "kinds": ["video"] });
        let mut request = call(&server, Method::POST, "lease").json(&body);
        if let Some(id) = of_call {
            request = request.header("x-request-id", id);
        }
        let leased = ask(request).await;
        let borne = of_call.unwrap_or(of_job);
        assert_eq!(leased.header("x-request-id"), borne);
        let event = &events(&server, &format!("from={}&limit=1", leased.position() - 1)).await[0];
        assert_eq!(event["type"], "job.leased.v1");
        assert_eq!(event["metadata"]["correlation_id"], borne);
        let leased = leased.data(200);
        assert_eq!(
            (&leased["job_id"], &leased["request_id"]),
            (&job["job_id"], &json!(of_job)),
            "{leased}"
        );
        // What is told without an id goes on with it, and an end with whoever brought it about.
        let job = job["job_id"].as_str().unwrap();
        let (of, tell) = (
            format!("jobs/{job}/progress"),
            json!({ "lease_id": leased["lease_id"], "progress": 5 }),
        );
        assert_eq!(post(&server, &of, &tell).await.header("x-request-id"), of_job);
        let cancel = server.request_of(ADA, Method::POST, &format!("jobs/{job}/cancel"));
        ask(cancel.header("x-request-id", "req_cancel").json(&json!({}))).await.data(200);
        let (of, tell) = (
            format!("jobs/{job}/fail"),
            json!({ "lease_id": leased["lease_id"], "error": "stopped" }),
        );
        let ended = post(&server, &of, &tell).await;
        assert_eq!((ended.status, ended.header("x-request-id")), (200, "req_cancel"));
        let event = &events(&server, &format!("from={}&limit=1", ended.position() - 1)).await[0];
        assert_eq!(event["type"], "job.cancelled.v1");
        assert_eq!(event["metadata"]["correlation_id"], "req_cancel");
    }
    let nothing = lease(&server).await;
    assert_eq!(nothing.status, 204);
    let fresh = nothing.header("x-request-id");
    assert!(!["", "req_one", "req_two"].contains(&fresh), "{fresh}");
}

#[tokio::test]
async fn the_source_of_a_job_is_fetched_by_the_link_in_the_lease() {
    let server = server();
    let file = server.upload(ADA, "notes.txt", "hello").await;
    let body = json!({ "prompt": "a pier", "source_file_id": file["file_id"] });
    server.post(ADA, "videos/generate", &body).await.data(202);
    let leased = lease(&server).await.data(200);
    let link = leased["source"]["url"].as_str().unwrap();
    let link = link.strip_prefix(&server.address).unwrap().to_owned();
    assert_eq!(ask(server.request(Method::GET, &link)).await.bytes, b"hello");
}

#[tokio::test]
async fn a_translation_comes_with_its_key_and_keeps_the_layout_of_its_source() {
    let server = server();
    let srt = "1\n00:00:01,000 --> 00:00:02,000\nHello\n";
    let form = Form::new()
        .part("file", Part::text(srt).file_name("film.srt"))
        .text("target_language", "es")
        .text("api_key", "sk-of-the-test");
    let asked = server.request_of(ADA, Method::POST, "translations").multipart(form);
    let asked = ask(asked).await.data(202);
    assert_eq!(lease(&server).await.status, 204, "it is no video");
    let body = json!({ "worker_id": "w", "kinds": ["translation"] });
    let leased = post(&server, "lease", &body).await.data(200);
    assert_eq!(
        (&leased["job_id"], &leased["api_key"]),
        (&asked["job_id"], &json!("sk-of-the-test"))
    );
    let link = leased["source"]["url"].as_str().unwrap();
    let link = link.strip_prefix(&server.address).unwrap().to_owned();
    assert_eq!(ask(server.request(Method::GET, &link)).await.bytes, srt.as_bytes());
    let text = |name: &str| leased[name].as_str().unwrap().to_owned();
    let held = Held { job: text("job_id"), lease: text("lease_id") };
    ask(held.put(&server, "").body("Hola")).await.assert_refused(415, "unsupported_media_type");
    let named = held.put(&server, "").header("content-type", "application/x-subrip").body("Hola");
    ask(named).await.assert_refused(415, "unsupported_media_type");
    ask(held.put(&server, "").body(srt.replace("Hello", "Hola"))).await.data(200);
    let output = held.post(&server, "complete", json!({})).await.data(200)["output"].clone();
    assert_eq!(output["content_type"], "application/x-subrip");
    assert_eq!(output.get("duration"), Some(&Value::Null), "{output}");
    let file = format!("files/{}", output["file_id"].as_str().unwrap());
    assert_eq!(server.get(ADA, &file).await.data(200)["filename"], "film.es.srt");
}

#[tokio::test]
async fn a_cancelled_job_tells_its_worker_and_a_failed_attempt_comes_again() {
    let server = server();
    let job = server.generate(ADA, "one").await;
    let held = Held::new(&server).await;
    let cancelled = server.post(ADA, &format!("jobs/{job}/cancel"), &json!({})).await.data(200);
    assert_eq!(cancelled["state"], "cancelling");
    let report = held.post(&server, "progress", json!({ "progress": 1 })).await.data(200);
    assert_eq!(report["cancelled"], true);
    let ended = held.post(&server, "fail", json!({ "error": "stopped" })).await.data(200);
    assert_eq!(ended["state"], "cancelled");

    let job = server.generate(ADA, "two").await;
    let held = Held::new(&server).await;
    let ended = held.post(&server, "fail", json!({ "error": "no memory" })).await.data(200);
    assert_eq!(ended["state"], "retry_wait");
    let shown = server.get(ADA, &format!("jobs/{job}")).await.data(200);
    assert_eq!((&shown["error"], &shown["queue_position"]), (&json!("no memory"), &Value::Null));
    assert_eq!(lease(&server).await.status, 204, "leased again before its delay was over");
}

#[tokio::test]
async fn a_job_that_a_worker_gives_back_goes_on_at_once_and_no_attempt_is_counted() {
    let server = server();
    let job = server.generate(ADA, "one").await;
    let held = Held::new(&server).await;
    let body = json!({ "error": "the worker was stopped", "given_back": true });
    let ended = held.post(&server, "fail", body.clone()).await.data(200);
    assert_eq!(ended["state"], "queued");
    let shown = server.get(ADA, &format!("jobs/{job}")).await.data(200);
    assert_eq!((&shown["attempt"], &shown["error"]), (&json!(0), &Value::Null), "{shown}");
    let again = lease(&server).await.data(200);
    assert_eq!((&again["job_id"], &again["attempt"]), (&json!(job), &json!(1)));
    held.post(&server, "fail", body).await.assert_refused(409, "lease_lost");
}

#[tokio::test]
async fn a_worker_is_told_to_stop_once_the_deadline_of_its_job_has_passed() {
    let server = server();
    let body = json!({ "prompt": "a pier", "deadline_s": 1 });
    let job = server.post(ADA, "videos/generate", &body).await.data(202);
    let job = format!("jobs/{}", job["job_id"].as_str().unwrap());
    let held = Held::new(&server).await;
    let mut events = server.events(ADA, &format!("{job}/events"), Some(0)).await;
    while events.next().await.unwrap().kind != "job.failed" {}
    let report = held.post(&server, "progress", json!({ "progress": 50 })).await.data(200);
    assert_eq!(report["cancelled"], true);
    ask(held.put(&server, "").body(MP4)).await.assert_refused(409, "lease_lost");
    held.post(&server, "complete", json!({})).await.assert_refused(409, "lease_lost");
    let ended = held.post(&server, "fail", json!({ "error": "cancelled" })).await.data(200);
    assert_eq!(ended["state"], "failed");
    let shown = server.get(ADA, &job).await.data(200);
    assert!(shown["error"].as_str().unwrap().starts_with("deadline_exceeded: "), "{shown}");
    assert_eq!(lease(&server).await.status, 204);
}

#[tokio::test]
async fn a_lease_that_is_wrong_stale_or_of_another_job_changes_nothing() {
    let server = server();
    server.generate(ADA, "one").await;
    server.generate("user_bob", "two").await;
    let (one, two) = (Held::new(&server).await, Held::new(&server).await);
    ask(two.put(&server, "").body(MP4)).await.data(200);
    two.post(&server, "complete", json!({})).await.data(200);
    let end = server.log_position().await;
    let wrong = [
        Held { job: one.job.clone(), lease: two.lease.clone() },
        Held { job: one.job.clone(), lease: NOBODY.to_owned() },
        Held { job: two.job.clone(), lease: one.lease.clone() },
    ];
    for held in &wrong {
        let fail = json!({ "error": "x" });
        let answers = [
            held.post(&server, "progress", json!({ "progress": 5 })).await,
            ask(held.put(&server, "").body(MP4)).await,
            held.post(&server, "complete", json!({})).await,
            held.post(&server, "fail", fail).await,
        ];
        for answer in answers {
            answer.assert_refused(409, "lease_lost");
        }
    }
    for job in [NOBODY, "nonsense"] {
        let held = Held { job: job.to_owned(), lease: one.lease.clone() };
        let progress = held.post(&server, "progress", json!({ "progress": 5 })).await;
        progress.assert_refused(404, "not_found");
        ask(held.put(&server, "").body(MP4)).await.assert_refused(404, "not_found");
    }
    // The one that is over.
    two.post(&server, "progress", json!({ "progress": 5 })).await.assert_refused(409, "lease_lost");
    ask(two.put(&server, "").body("other")).await.assert_refused(409, "lease_lost");
    assert_eq!(server.log_position().await, end);
}

#[tokio::test]
async fn a_malformed_call_is_told_what_is_wrong_and_changes_nothing() {
    let server = server();
    server.generate(ADA, "one").await;
    let held = Held::new(&server).await;
    let end = server.log_position().await;
    let good = json!({ "worker_id": "w", "kinds": ["video"] });
    let with = |base: &Value, field: &str, value: Value| {
        let mut body = base.clone();
        body[field] = value;
        body
    };
    let lease_id = json!({ "lease_id": held.lease });
    let progress = with(&lease_id, "progress", json!(1));
    let fail = with(&lease_id, "error", json!("x"));
    let at = |what: &str| format!("jobs/{}/{what}", held.job);
    let table = [
        ("lease".to_owned(), json!({}), "worker_id"),
        ("lease".to_owned(), with(&good, "worker_id", json!("a\r\nb")), "worker_id"),
        ("lease".to_owned(), with(&good, "worker_id", json!("x".repeat(129))), "worker_id"),
        ("lease".to_owned(), with(&good, "kinds", json!([])), "kinds"),
        ("lease".to_owned(), with(&good, "kinds", json!(["painting"])), "kinds"),
        ("lease".to_owned(), with(&good, "kinds", json!("video")), "kinds"),
        ("lease".to_owned(), with(&good, "wait_s", json!(3601)), "wait_s"),
        ("lease".to_owned(), with(&good, "wait_s", json!(-1)), "wait_s"),
        (at("progress"), json!({ "progress": 1 }), "lease_id"),
        (at("progress"), with(&progress, "lease_id", json!("x")), "lease_id"),
        (at("progress"), lease_id.clone(), "progress"),
        (at("progress"), with(&progress, "progress", json!(101)), "progress"),
        (at("progress"), with(&progress, "progress", json!("10")), "progress"),
        (at("progress"), with(&progress, "message", json!("x".repeat(201))), "message"),
        (at("complete"), json!({}), "lease_id"),
        (at("complete"), with(&lease_id, "duration", json!(-1)), "duration"),
        (at("complete"), with(&lease_id, "width", json!(0)), "width"),
        (at("fail"), lease_id.clone(), "error"),
        (at("fail"), with(&fail, "retryable", json!("yes")), "retryable"),
        (at("fail"), with(&fail, "error", json!("x".repeat(16_385))), "error"),
    ];
    for (path, body, field) in table {
        let answer = post(&server, &path, &body).await;
        answer.assert_refused(422, "validation_failed");
        assert!(answer.body["detail"]["fields"][field].is_string(), "{path} {body}");
    }
    let broken = call(&server, Method::POST, "lease").header("content-type", "application/json");
    ask(broken.body("{")).await.assert_refused(400, "invalid_json");
    ask(call(&server, Method::POST, "lease")).await.assert_refused(400, "missing_body");
    held.post(&server, "complete", json!({})).await.assert_refused(422, "output_missing");
    assert_eq!(server.log_position().await, end);
}

#[tokio::test]
async fn an_output_that_is_not_what_it_should_be_is_refused() {
    let server = server();
    server.generate(ADA, "one").await;
    let held = Held::new(&server).await;
    let end = server.log_position().await;
    let put = |query: &str| held.put(&server, query);
    let typed =
        |request: RequestBuilder, kind: &str| request.header("content-type", kind.to_owned());
    let digest = |text: &str| put("").header("content-digest", text.to_owned()).body(MP4);
    let zeros = format!("sha-256=:{}:", STANDARD.encode([0; 32]));
    let table: Vec<(RequestBuilder, u16, &str)> = vec![
        (put("").body(JPEG), 415, "unsupported_media_type"),
        (put("").body("#!/bin/sh"), 415, "unsupported_media_type"),
        (typed(put("").body(MP4), "video/webm"), 415, "unsupported_media_type"),
        (typed(put("").body(MP4), "text/html"), 415, "unsupported_media_type"),
        (put("&name=poster").body(MP4), 415, "unsupported_media_type"),
        (put("&name=captions").body("<script>"), 415, "unsupported_media_type"),
        (put("&name=../video").body(MP4), 422, "validation_failed"),
        (put("").body(""), 400, "missing_body"),
        (put("").body(vec![0; 4097]), 413, "payload_too_large"),
        (put("").body(reqwest::Body::wrap_stream(pieces(5000))), 413, "payload_too_large"),
        (digest(&zeros), 400, "malformed_request"),
        (digest("sha-256=:xx:"), 400, "malformed_request"),
    ];
    for (request, status, code) in table {
        ask(request).await.assert_refused(status, code);
    }
    let path = format!("jobs/{}/output?lease_id=x", held.job);
    let request = call(&server, Method::PUT, &path).body(MP4);
    ask(request).await.assert_refused(422, "validation_failed");
    cut_off(&server, &held).await;
    held.post(&server, "complete", json!({})).await.assert_refused(422, "output_missing");
    assert_eq!(server.log_position().await, end);
    // What other digests there are is not for us to judge.
    ask(digest("sha-512=:xx:")).await.data(200);
    held.post(&server, "complete", json!({})).await.data(200);
}

#[tokio::test]
async fn bytes_that_show_no_type_are_of_the_declared_one_or_the_usual_and_what_was_not_made_is_null()
 {
    let server = server();
    server.post(ADA, "videos/generate", &json!({ "prompt": "A lighthouse" })).await.data(202);
    let held = Held::new(&server).await;
    let put = |query: &str| held.put(&server, query).body("an engine's own container");
    let handed = |request: RequestBuilder| async { ask(request).await.data(200) };
    assert_eq!(handed(put("")).await["content_type"], "video/mp4");
    let webm = handed(put("").header("content-type", "video/webm")).await;
    assert_eq!(webm["content_type"], "video/webm");
    ask(put("&name=captions")).await.assert_refused(415, "unsupported_media_type");
    let done = held.post(&server, "complete", json!({})).await.data(200);
    let seen = server.get(ADA, &format!("jobs/{}", held.job)).await.data(200);
    assert_eq!(done["output"], seen["output"]);
    for absent in ["poster_file_id", "captions_file_id"] {
        assert_eq!(seen["output"].get(absent), Some(&Value::Null), "{absent}");
    }
}

#[tokio::test]
async fn a_long_wait_is_cut_and_so_is_a_long_error() {
    let server = server();
    let wish = json!({ "worker_id": "w", "kinds": ["translation"], "wait_s": 3601 });
    post(&server, "lease", &wish).await.assert_refused(422, "validation_failed");
    server.post(ADA, "videos/generate", &json!({ "prompt": "A lighthouse" })).await.data(202);
    let wish = json!({ "worker_id": "w", "kinds": ["video"], "wait_s": 3600 });
    let leased = post(&server, "lease", &wish).await.data(200);
    let text = |name: &str| leased[name].as_str().unwrap().to_owned();
    let held = Held { job: text("job_id"), lease: text("lease_id") };
    let failed = json!({ "error": "é".repeat(5000), "retryable": false });
    held.post(&server, "fail", failed).await.data(200);
    let job = server.get(ADA, &format!("jobs/{}", held.job)).await.data(200);
    assert_eq!(job["error"], "é".repeat(1000));
}

/// So many bytes, without saying how many.
fn pieces(
    count: usize,
) -> impl futures_util::Stream<Item = Result<Vec<u8>, std::io::Error>> + Send + 'static {
    futures_util::stream::iter((0..count / 100).map(|_| Ok(vec![0; 100])))
}

/// Half of the bytes that were announced, and then silence from a closed connection.
async fn cut_off(server: &Server, held: &Held) {
    let address = server.address.strip_prefix("http://").unwrap();
    let mut connection = tokio::net::TcpStream::connect(address).await.unwrap();
    let head = format!(
        "PUT /api/v1/worker/jobs/{}/output?lease_id={} HTTP/1.1\r\nhost: {address}\r\n\
         authorization: Bearer {TOKEN}\r\ncontent-length: {}\r\n\r\n",
        held.job,
        held.lease,
        MP4.len() * 2
    );
    connection.write_all(head.as_bytes()).await.unwrap();
    connection.write_all(MP4).await.unwrap();
    connection.shutdown().await.unwrap();
    let mut answer = Vec::new();
    let _ = connection.read_to_end(&mut answer).await;
    assert!(!answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
}

#[tokio::test]
async fn what_was_handed_in_outlives_a_kill_of_the_server() {
    let server = server();
    let job = server.generate(ADA, "one").await;
    let held = Held::new(&server).await;
    ask(held.put(&server, "").body(MP4)).await.data(200);
    let server = server.start_again();
    let done = held.post(&server, "complete", json!({})).await.data(200);
    assert_eq!((&done["state"], &done["job_id"]), (&json!("completed"), &json!(job)));
    let server = server.start_again();
    let again = held.post(&server, "complete", json!({})).await.data(200);
    assert_eq!(again["output"], done["output"]);
}

#[tokio::test]
async fn a_tier_has_its_limits_and_says_which_one_would_do() {
    let server = server();
    let ask_for = |duration: u64, quality: &str| json!({ "prompt": "a pier", "duration": duration, "quality": quality });
    let answer = server.post(ADA, "videos/generate", &ask_for(11, "4k")).await;
    answer.assert_refused(422, "validation_failed");
    let fields = &answer.body["detail"]["fields"];
    for field in ["duration", "quality"] {
        assert!(fields[field].as_str().unwrap().contains("needs tier premium"), "{fields}");
    }
    server.post(ADA, "videos/generate", &ask_for(10, "1080p")).await.data(202);
    let mut claims = crate::server::claims("user_rich");
    claims["subscription_tier"] = json!("enterprise");
    let request = server.request(Method::POST, "videos/generate");
    let request = request.bearer_auth(crate::server::signed(&claims)).json(&ask_for(60, "4k"));
    ask(request).await.data(202);
    // Asked for later, and served before.
    assert_eq!(lease(&server).await.data(200)["options"]["quality"], "4k");
}

#[tokio::test]
async fn a_cancelled_render_stops_in_the_middle() {
    let server = Server::start(Setup::clerk().with("T2M_ENGINE", "storyboard"));
    let mut claims = crate::server::claims(ADA);
    claims["subscription_tier"] = json!("premium");
    // Minutes of work: if the render went on to its end, the stream would run out of patience.
    let body = json!({ "prompt": "a long way", "duration": 60, "quality": "4k" });
    let request = server.request(Method::POST, "videos/generate");
    let request = request.bearer_auth(crate::server::signed(&claims)).json(&body);
    let job = ask(request).await.data(202)["job_id"].as_str().unwrap().to_owned();
    let mut events = server.events(ADA, &format!("jobs/{job}/events"), None).await;
    while events.next().await.unwrap().kind != "job.leased" {}
    server.post(ADA, &format!("jobs/{job}/cancel"), &json!({})).await.data(200);
    loop {
        let event = events.next().await.unwrap();
        assert_ne!(event.kind, "job.completed");
        if event.kind == "job.cancelled" {
            break;
        }
    }
    let shown = server.get(ADA, &format!("jobs/{job}")).await.data(200);
    assert!(shown["progress"].as_u64().unwrap() < 50, "{shown}");
}
