//! A request that comes again under its key is recognised before anything else is asked of it.

use reqwest::multipart::{Form, Part};
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};

use crate::server::{Answer, Server, Setup, ask, claims, signed};

const ADA: &str = "user_ada";

fn keyed(server: &Server, path: &str) -> RequestBuilder {
    let mut claims = claims(ADA);
    claims["subscription_tier"] = json!("premium");
    let request = server.request(Method::POST, path).bearer_auth(signed(&claims));
    request.header("idempotency-key", "once")
}

/// A text of so many bytes.
async fn send(server: &Server, path: &str, size: usize) -> Answer {
    let part = Part::text("x".repeat(size)).file_name("x.txt");
    let form = Form::new().part("file", part).text("api_key", "sk");
    ask(keyed(server, path).multipart(form)).await
}

#[track_caller]
fn assert_again(again: &Answer, first: &Answer) {
    assert_eq!((again.status, &again.body), (first.status, &first.body));
    assert_eq!(again.header("idempotent-replayed"), "true");
    assert_eq!(again.position(), first.position());
}

#[tokio::test]
async fn an_upload_comes_again_when_there_is_no_room_for_another() {
    let server = Server::start(Setup::clerk().with("QUOTA_PREMIUM_BYTES", "1000"));
    let first = send(&server, "files/upload", 600).await;
    let translation = send(&server, "translations", 300).await;
    assert_eq!((first.status, translation.status), (200, 202), "{}", translation.body);
    let end = server.log_position().await;
    assert_again(&send(&server, "files/upload", 600).await, &first);
    assert_again(&send(&server, "translations", 300).await, &translation);
    for other in [500, 601, 2000, 1_000_000] {
        let other = send(&server, "files/upload", other).await;
        other.assert_refused(422, "idempotency_key_reused");
    }
    // Nor does it take the text that it was about.
    let source = &translation.body["data"]["options"]["source_file_id"];
    server.delete(ADA, &format!("files/{}", source.as_str().unwrap())).await.data(200);
    assert_again(&send(&server, "translations", 300).await, &translation);
    let other = send(&server, "translations", 301).await;
    other.assert_refused(422, "idempotency_key_reused");
    assert_eq!(server.log_position().await, end + 1);
}

#[tokio::test]
async fn a_video_comes_again_when_it_could_not_be_asked_for_any_more() {
    let server = Server::start(Setup::clerk());
    let source = server.upload(ADA, "source.txt", "source").await["file_id"].clone();
    let video = json!({ "prompt": "a pier", "duration": 60, "source_file_id": source });
    let batch = json!({ "jobs": [{ "prompt": "another" }, video] });
    let send = |path: &'static str, body: &Value| ask(keyed(&server, path).json(body));
    let first = send("videos/generate", &video).await;
    let batched = send("videos/batch", &batch).await;
    assert_eq!((first.status, batched.status), (202, 202), "{}", first.body);

    server.delete(ADA, &format!("files/{}", source.as_str().unwrap())).await.data(200);
    assert_again(&send("videos/generate", &video).await, &first);
    assert_again(&send("videos/batch", &batch).await, &batched);
    let mut admin = claims("user_admin");
    admin["role"] = json!("admin");
    let lower = server.request(Method::PUT, &format!("admin/users/{ADA}/access"));
    let lower = lower.bearer_auth(signed(&admin)).json(&json!({ "subscription_tier": "standard" }));
    ask(lower).await.data(200);
    let end = server.log_position().await;
    assert_again(&send("videos/generate", &video).await, &first);

    let mut other = video.clone();
    other["prompt"] = json!("a harbour");
    let refused = send("videos/generate", &other).await;
    refused.assert_refused(422, "idempotency_key_reused");
    let fresh = server.post(ADA, "videos/generate", &video).await;
    fresh.assert_refused(422, "validation_failed");
    let fields = fresh.body["detail"]["fields"].as_object().unwrap();
    assert_eq!(fields.keys().collect::<Vec<_>>(), ["duration", "source_file_id"]);
    assert_eq!(server.log_position().await, end);
}
