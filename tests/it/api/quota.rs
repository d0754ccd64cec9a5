//! How much a user may store, whatever the way and however many uploads there are at once.

use futures_util::future::join_all;
use reqwest::multipart::{Form, Part};
use reqwest::{Method, RequestBuilder};
use serde_json::json;
use t2m::log::{EmbeddedLog, EventLog, Expected, NewEvent};

use crate::server::{Answer, Server, Setup, ask, claims, signed};

const ADA: &str = "user_ada";

fn file(server: &Server, token: &str, size: usize) -> RequestBuilder {
    let part = Part::bytes(vec![b'x'; size]).file_name("x.txt");
    let request = server.request(Method::POST, "files/upload").bearer_auth(token);
    request.multipart(Form::new().part("file", part))
}

async fn send(server: &Server, size: usize) -> Answer {
    ask(file(server, &signed(&claims(ADA)), size)).await
}

async fn begin(server: &Server, length: u64) -> Answer {
    let request = server.request_of(ADA, Method::POST, "files/tus");
    ask(request.header("tus-resumable", "1.0.0").header("upload-length", length)).await
}

async fn stored(server: &Server) -> u64 {
    let me = server.get(ADA, "me").await.data(200);
    me["usage"]["bytes_stored"].as_u64().expect("usage is told")
}

#[tokio::test]
async fn what_does_not_fit_is_refused_and_what_is_reserved_counts() {
    let server = Server::start(Setup::clerk().with("QUOTA_STANDARD_BYTES", "1000"));
    let first = send(&server, 600).await.data(200);
    let refused = send(&server, 600).await;
    refused.assert_refused(413, "quota_exceeded");
    let detail = &refused.body["detail"];
    assert_eq!((&detail["limit"], &detail["used"]), (&json!(1000), &json!(600)));
    assert!(detail["requested"].as_u64() > Some(400), "{detail}");

    begin(&server, 401).await.assert_refused(413, "quota_exceeded");
    let begun = begin(&server, 300).await;
    assert_eq!(begun.status, 201);
    send(&server, 101).await.assert_refused(413, "quota_exceeded");
    let server = server.start_again();
    send(&server, 101).await.assert_refused(413, "quota_exceeded");
    // To the byte, although the body is larger than the file in it.
    send(&server, 100).await.data(200);
    begin(&server, 1).await.assert_refused(413, "quota_exceeded");

    let ended = server.request_of(ADA, Method::DELETE, begun.header("location"));
    assert_eq!(ask(ended.header("tus-resumable", "1.0.0")).await.status, 204);
    send(&server, 300).await.data(200);
    assert_eq!(stored(&server).await, 1000);
    let path = format!("files/{}", first["file_id"].as_str().unwrap());
    server.delete(ADA, &path).await.data(200);
    send(&server, 600).await.data(200);
}

#[tokio::test]
async fn many_uploads_at_once_do_not_pass_it_together_and_premium_has_its_own() {
    let setup = Setup::clerk().with("QUOTA_STANDARD_BYTES", "1000000");
    let server = Server::start(setup.with("QUOTA_PREMIUM_BYTES", "2000000"));
    server.get(ADA, "me").await.data(200);
    let answers = join_all((0..16).map(|_| send(&server, 150_000))).await;
    let taken = answers.iter().filter(|answer| answer.status == 200).count() as u64;
    assert!((1..=6).contains(&taken), "{taken}");
    for answer in answers.iter().filter(|answer| answer.status != 200) {
        answer.assert_refused(413, "quota_exceeded");
    }
    assert_eq!(stored(&server).await, taken * 150_000);
    let mut rich = claims("user_rich");
    rich["subscription_tier"] = json!("premium");
    ask(file(&server, &signed(&rich), 1_500_000)).await.data(200);
}

#[tokio::test]
async fn what_is_recorded_and_cannot_be_read_yet_counts_too() {
    let mut server = Server::start(Setup::clerk().with("QUOTA_STANDARD_BYTES", "1000"));
    server.get(ADA, "me").await.data(200);
    assert!(server.stop().success());
    // Of a newer version: the view of files stands still there.
    let log = EmbeddedLog::open(&server.data_dir().join("log.sqlite")).unwrap();
    let event = NewEvent {
        id: uuid::Uuid::from_u128(1),
        kind: "file.juggled.v1".to_owned(),
        time: chrono::DateTime::UNIX_EPOCH,
        data: b"{}".to_vec(),
        metadata: b"{}".to_vec(),
    };
    let stream = format!("file-{}", event.id);
    log.append(&stream, Expected::NoStream, vec![event]).await.unwrap();
    drop(log);
    let server = server.start_again();
    send(&server, 600).await.assert_refused(503, "not_caught_up");
    send(&server, 600).await.assert_refused(413, "quota_exceeded");
    let request =
        server.request_of(ADA, Method::POST, "files/tus").header("tus-resumable", "1.0.0");
    let request = request.header("content-type", "application/offset+octet-stream");
    let whole = request.header("upload-length", 300).body(vec![b'x'; 300]);
    ask(whole).await.assert_refused(503, "not_caught_up");
    send(&server, 101).await.assert_refused(413, "quota_exceeded");
    send(&server, 100).await.assert_refused(503, "not_caught_up");
}
