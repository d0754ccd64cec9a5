//! The main job: from Clerk's webhook to a video in the player, and back from the log.

use reqwest::Method;
use serde_json::{Value, json};
use t2m::views::Views;

use super::{clerk_session, clerk_user};
use crate::s3::S3;
use crate::server::{Answer, Server, Setup, ask, session_of};

const ADA: &str = "user_ada";

#[tokio::test]
async fn a_prompt_becomes_a_video_and_the_log_tells_it_all_again() {
    let mut server = Server::start(Setup::clerk().with("T2M_ENGINE", "storyboard"));
    sign_in(&server).await;
    let file_id = upload(&server).await;
    let job_id = generate(&server, &file_id).await;
    let output = follow(&server, &job_id).await;
    play(&server, &job_id, &output).await;
    assert!(server.stop().success(), "the server did not stop in order");
    replay(&server);
}

#[tokio::test]
async fn the_same_with_its_files_in_a_bucket_and_nothing_on_the_disk() {
    let s3 = S3::start().await;
    let setup = Setup::clerk().with("T2M_ENGINE", "storyboard").with("T2M_BLOBS", &s3.url);
    let server =
        Server::start(s3.variables().fold(setup, |it, (name, value)| it.with(name, value)));
    sign_in(&server).await;
    let file_id = upload(&server).await;
    let job_id = generate(&server, &file_id).await;
    let output = follow(&server, &job_id).await;
    play(&server, &job_id, &output).await;
    assert!(!server.data_dir().join("blobs/sha256").exists());
    let link = link(&server, &format!("videos/{job_id}/signed-url")).await;
    let path = format!("files/{}", output["file_id"].as_str().expect("the output has a file"));
    server.delete(ADA, &path).await.data(200);
    fetch(&server, Method::GET, &link, &[]).await.assert_refused(404, "not_found");
}

async fn sign_in(server: &Server) {
    server.deliver("user.created", &clerk_user(ADA, 1_767_225_600_000)).await.data(200);
    let session = clerk_session(&session_of(ADA), ADA, "active");
    server.deliver("session.created", &session).await.data(200);
    let me = server.get(ADA, "me").await.data(200);
    assert_eq!(me["user"]["id"], ADA);
    assert_eq!(me["user"]["email"], "ada@example.com");
    assert_eq!(me["session"]["session_id"], session_of(ADA));
}

async fn upload(server: &Server) -> String {
    let file = server.upload(ADA, "notes.txt", "hello").await;
    let file_id = file["file_id"].as_str().expect("a file has an id").to_owned();
    assert_eq!(
        file,
        json!({
            "file_id": file_id,
            "filename": "notes.txt",
            "content_type": "text/plain",
            "size": 5,
            // `printf hello | sha256sum`
            "sha256": "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824",
            "created_at": file["created_at"],
        })
    );
    let mut shown = file.clone();
    shown["metadata"] = json!({ "purpose": "test" });
    shown["job_id"] = json!(null);
    let created_at = file["created_at"].as_str().expect("a time");
    chrono::DateTime::parse_from_rfc3339(created_at).expect("RFC 3339");
    for path in [format!("/api/files/{file_id}"), format!("/api/v1/files/{file_id}")] {
        assert_eq!(server.get(ADA, &path).await.data(200), shown, "{path}");
    }
    file_id
}

async fn generate(server: &Server, source_file_id: &str) -> String {
    let body = json!({
        "prompt": "a lighthouse at dusk", "duration": 1, "quality": "480p", "seed": 7,
        "source_file_id": source_file_id,
    });
    let answer = server.post(ADA, "/api/videos/generate", &body).await;
    assert!(answer.position() > 0);
    let job = answer.data(202);
    for (field, value) in [
        ("kind", json!("video")),
        ("status", json!("processing")),
        ("state", json!("queued")),
        ("progress", json!(0)),
        ("prompt", json!("a lighthouse at dusk")),
        ("output", json!(null)),
        ("error", json!(null)),
    ] {
        assert_eq!(job[field], value, "{field}");
    }
    job["job_id"].as_str().expect("a job has an id").to_owned()
}

/// Follows the job's stream to its end and gives the job's output.
async fn follow(server: &Server, job_id: &str) -> Value {
    let mut events = server.events(ADA, &format!("jobs/{job_id}/events"), None).await;
    let (mut last_id, mut last_progress, mut kinds) = (0, 0, Vec::new());
    loop {
        let event = events.next().await.expect("the stream lasts as long as the job");
        assert_eq!(event.data["job_id"], job_id);
        let progress = event.data["progress"].as_u64().expect("progress is a number");
        assert!(event.id > last_id, "{} after {last_id}", event.id);
        assert!((last_progress..=100).contains(&progress), "{progress} after {last_progress}");
        (last_id, last_progress) = (event.id, progress);
        kinds.push(event.kind);
        match event.data["status"].as_str() {
            Some("processing") => {}
            Some("completed") => break,
            other => panic!("the job became {other:?}: {}", event.data),
        }
    }
    assert_eq!(last_progress, 100);
    assert_eq!(kinds[..2], ["job.requested", "job.leased"]);
    assert_eq!(kinds.last().map(String::as_str), Some("job.completed"));

    let job = server.get(ADA, &format!("jobs/{job_id}")).await.data(200);
    for path in [format!("/api/jobs/{job_id}"), format!("status/{job_id}")] {
        assert_eq!(server.get(ADA, &path).await.data(200), job, "{path}");
    }
    let seen = (&job["status"], &job["state"], &job["progress"]);
    assert_eq!(seen, (&json!("completed"), &json!("completed"), &json!(100)));
    assert_eq!(job["output"]["content_type"], "video/mp4");
    // Ada's tier is premium: a year.
    let time = |field: &str| {
        let text = job[field].as_str().unwrap_or_else(|| panic!("no {field}: {job}"));
        chrono::DateTime::parse_from_rfc3339(text).expect("RFC 3339")
    };
    let kept = time("expires_at") - time("created_at");
    assert_eq!(kept.num_days(), 365);
    assert_eq!(job["output"]["height"], 480);
    assert_eq!(job["output"]["duration"].as_f64(), Some(1.0));
    job["output"].clone()
}

async fn play(server: &Server, job_id: &str, output: &Value) {
    let link = link(server, &format!("videos/{job_id}/signed-url")).await;
    let whole = fetch(server, Method::GET, &link, &[]).await;
    assert_eq!((whole.status, whole.header("content-type")), (200, "video/mp4"));
    assert_eq!(whole.header("cache-control"), "private, max-age=3600");
    assert_eq!(whole.header("accept-ranges"), "bytes");
    assert_eq!(&whole.bytes[4..8], b"ftyp");
    let size = whole.bytes.len();
    assert_eq!(Some(size as u64), output["size"].as_u64());

    let part = fetch(server, Method::GET, &link, &[("range", "bytes=4-7")]).await;
    assert_eq!((part.status, part.bytes.as_slice()), (206, &b"ftyp"[..]));
    assert_eq!(part.header("content-range"), format!("bytes 4-7/{size}"));

    let head = fetch(server, Method::HEAD, &link, &[]).await;
    assert_eq!((head.status, head.bytes.len()), (200, 0));
    assert_eq!(head.header("content-length"), size.to_string());

    let etag = whole.header("etag");
    assert!(etag.starts_with('"') && etag == head.header("etag"), "{etag}");
    let same = fetch(server, Method::GET, &link, &[("if-none-match", etag)]).await;
    assert_eq!((same.status, same.bytes.len()), (304, 0));

    let poster = fetch_file(server, &output["poster_file_id"]).await;
    assert_eq!(poster.header("content-type"), "image/jpeg");
    assert!(poster.bytes.starts_with(&[0xff, 0xd8, 0xff]));
    let captions = fetch_file(server, &output["captions_file_id"]).await;
    assert!(captions.header("content-type").starts_with("text/vtt"));
    assert!(captions.bytes.starts_with(b"WEBVTT"));
}

async fn fetch_file(server: &Server, id: &Value) -> Answer {
    let id = id.as_str().expect("the output names its files");
    let link = link(server, &format!("files/{id}/signed-url")).await;
    fetch(server, Method::GET, &link, &[]).await
}

/// The path and query of a link, which must point at this server.
async fn link(server: &Server, path: &str) -> String {
    let link = server.post(ADA, path, &json!({ "expiresIn": 60 })).await.data(200);
    let url = link["url"].as_str().expect("a link has a url");
    url.strip_prefix(&server.address).expect("the link points here").to_owned()
}

/// Without any token, as a player does.
async fn fetch(server: &Server, method: Method, link: &str, headers: &[(&str, &str)]) -> Answer {
    let request = server.request(method, link);
    let request = headers.iter().fold(request, |it, (name, value)| it.header(*name, *value));
    ask(request).await
}

/// The log is whole, and it tells the read model of the server that has stopped.
fn replay(server: &Server) {
    server.printed(&["log", "verify"]);
    let views = Views::open(&server.data_dir().join("views.sqlite")).expect("the views open");
    let live = views.dump().expect("the views can be read");
    assert!(live.iter().any(|(table, rows, _)| *table == "jobs" && *rows == 1), "{live:?}");
    for target in ["first.sqlite", "second.sqlite"] {
        let to = server.data_dir().join(target);
        let printed = server.printed(&["replay", "--to", to.to_str().expect("a UTF-8 path")]);
        for (table, rows, digest) in &live {
            let line = format!("{table:<12}{rows:>9} rows  sha256 {digest}");
            assert!(printed.contains(&line), "no {line:?} in\n{printed}");
        }
    }
}
