//! Signed links: in which order they are judged.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use reqwest::Method;
use reqwest::multipart::{Form, Part};
use serde_json::json;
use t2m::media::signed_url::SigningSecrets;

use super::clerk_user;
use crate::server::{Answer, LINK_SECRET, Server, Setup, ask, now};

const NOBODYS_FILE: &str = "0190d3a0-0000-7000-8000-000000000001";

async fn follow(server: &Server, link: &str) -> Answer {
    ask(server.request(Method::GET, link)).await
}

fn signature(file_id: &str, user_id: &str, expires: i64) -> String {
    SigningSecrets::parse(LINK_SECRET).expect("a secret").sign(file_id, user_id, expires)
}

#[tokio::test]
async fn a_link_is_judged_by_its_form_then_its_time_then_its_signature_then_its_file() {
    let server = Server::start(Setup::clerk());
    let file = server.upload("user_ada", "notes.txt", "hello").await;
    let file_id = file["file_id"].as_str().unwrap();
    let (past, future) = (now() - 1000, now() + 1000);
    let link = |id: &str, user: &str, expires: i64, signature: &str| {
        format!("files/secure/{id}?user_id={user}&expires={expires}&signature={signature}")
    };
    let good = signature(file_id, "user_ada", future);
    let table = [
        // Each is wrong in every later respect too.
        (format!("files/secure/{NOBODYS_FILE}"), 400, "link_malformed"),
        (format!("files/secure/{NOBODYS_FILE}?expires={past}&signature=0"), 400, "link_malformed"),
        (
            format!("files/secure/{NOBODYS_FILE}?user_id=a&signature=0&expires=soon"),
            400,
            "link_malformed",
        ),
        (format!("files/secure/{NOBODYS_FILE}?user_id=a&expires={past}"), 400, "link_malformed"),
        (link(NOBODYS_FILE, "a", past, "0"), 410, "link_expired"),
        (
            link(file_id, "user_ada", past, &signature(file_id, "user_ada", past)),
            410,
            "link_expired",
        ),
        (link(NOBODYS_FILE, "a", future, "0"), 403, "link_signature_invalid"),
        (link(file_id, "user_ada", future + 1, &good), 403, "link_signature_invalid"),
        (link(file_id, "user_bob", future, &good), 403, "link_signature_invalid"),
        (link(NOBODYS_FILE, "user_ada", future, &good), 403, "link_signature_invalid"),
        (
            link(NOBODYS_FILE, "user_ada", future, &signature(NOBODYS_FILE, "user_ada", future)),
            404,
            "not_found",
        ),
        (
            link(file_id, "user_bob", future, &signature(file_id, "user_bob", future)),
            404,
            "not_found",
        ),
    ];
    for (link, status, code) in table {
        println!("{link}");
        follow(&server, &link).await.assert_refused(status, code);
    }
    let whole = follow(&server, &link(file_id, "user_ada", future, &good)).await;
    assert_eq!((whole.status, whole.bytes.as_slice()), (200, &b"hello"[..]));
    assert!(whole.header("content-disposition").starts_with("attachment"));
}

#[tokio::test]
async fn the_link_of_a_deleted_file_leads_nowhere() {
    let server = Server::start(Setup::clerk());
    let file = server.upload("user_ada", "notes.txt", "hello").await;
    let path = format!("files/{}", file["file_id"].as_str().unwrap());
    let link = server.post("user_ada", &format!("{path}/signed-url"), &serde_json::json!({})).await;
    let link = link.data(200)["url"].as_str().unwrap().to_owned();
    assert!(link.contains("?user_id=user_ada&expires="), "{link}");
    let link = link.strip_prefix(&server.address).unwrap();
    assert_eq!(follow(&server, link).await.status, 200);
    let asks = |position: u64| {
        server.request(Method::GET, link).header("x-log-position", position.to_string())
    };
    let end = server.log_position().await;
    assert_eq!(ask(asks(end)).await.status, 200);
    ask(asks(end + 1000)).await.assert_refused(503, "not_caught_up");
    server.delete("user_ada", &path).await.data(200);
    follow(&server, link).await.assert_refused(404, "not_found");
    server.get("user_ada", &path).await.assert_refused(404, "not_found");
}

#[tokio::test]
async fn the_link_of_a_file_whose_bytes_cannot_be_read_says_so() {
    let server = Server::start(Setup::clerk());
    let file = server.upload("user_ada", "notes.txt", "hello").await;
    let link = link_to(&server, &file).await;
    let sha256 = file["sha256"].as_str().unwrap();
    let blob = server.data_dir().join("blobs/sha256").join(&sha256[..2]).join(sha256);
    std::fs::write(&blob, "hel").unwrap();
    let refused = follow(&server, &link).await;
    refused.assert_refused(503, "storage_unavailable");
    assert!(!refused.header("retry-after").is_empty());
    assert_eq!((refused.header("etag"), refused.header("cache-control")), ("", "no-store"));
    std::fs::remove_file(&blob).unwrap();
    follow(&server, &link).await.assert_refused(503, "storage_unavailable");
}

async fn link_to(server: &Server, file: &serde_json::Value) -> String {
    let path = format!("files/{}/signed-url", file["file_id"].as_str().unwrap());
    let link = server.post("user_ada", &path, &json!({})).await.data(200);
    link["url"].as_str().unwrap().strip_prefix(&server.address).unwrap().to_owned()
}

#[tokio::test]
async fn the_links_of_a_deleted_user_lead_nowhere_at_once() {
    let server = Server::start(Setup::clerk());
    let file = server.upload("user_ada", "notes.txt", "hello").await;
    let link = link_to(&server, &file).await;
    server.deliver("user.created", &clerk_user("user_ada", 1_767_225_600_000)).await.data(200);
    assert_eq!(follow(&server, &link).await.status, 200);
    let gone = json!({ "id": "user_ada", "object": "user", "deleted": true });
    server.deliver("user.deleted", &gone).await.data(200);
    follow(&server, &link).await.assert_refused(404, "not_found");
}

#[tokio::test]
async fn while_secrets_are_exchanged_the_links_of_both_are_good() {
    let other = "another secret that signs the links from now on";
    let both = format!("{other},{LINK_SECRET}");
    let server = Server::start(Setup::clerk().with("FILE_SIGNING_SECRET", both));
    let file = server.upload("user_ada", "notes.txt", "hello").await;
    let file_id = file["file_id"].as_str().unwrap();
    let expires = now() + 1000;
    let by = |secret: &str| {
        let signature = SigningSecrets::parse(secret).expect("a secret");
        let signature = signature.sign(file_id, "user_ada", expires);
        format!("files/secure/{file_id}?user_id=user_ada&expires={expires}&signature={signature}")
    };
    assert_eq!(follow(&server, &by(other)).await.status, 200);
    assert_eq!(follow(&server, &by(LINK_SECRET)).await.status, 200);
    let unknown = follow(&server, &by("a secret that nobody has configured here")).await;
    unknown.assert_refused(403, "link_signature_invalid");
    let made = link_to(&server, &file).await;
    let part = |name: &str| {
        let found = made.split(['?', '&']).find_map(|pair| pair.strip_prefix(name));
        found.expect("a link has it").to_owned()
    };
    let first = SigningSecrets::parse(other).expect("a secret");
    let signature = first.sign(file_id, "user_ada", part("expires=").parse().unwrap());
    assert_eq!(part("signature="), signature, "the first one signs");
}

#[tokio::test]
async fn names_and_types_cannot_make_a_browser_run_what_was_uploaded() {
    let server = Server::start(Setup::clerk());
    let long = format!("{}.html", "n".repeat(4096));
    for (name, kind, bytes) in [
        ("../../etc/passwd", "text/html", "<script>alert(1)</script>"),
        ("a\u{0}b.svg", "image/svg+xml", "<svg xmlns='http://www.w3.org/2000/svg'/>"),
        ("x\r\nSet-Cookie: a=b.xml", "application/xml", "<?xml version='1.0'?><a/>"),
        (long.as_str(), "application/xhtml+xml", "<!DOCTYPE html><html></html>"),
        ("a\"; filename=b.html", "application/pdf", "%PDF-1.7"),
        ("photo\u{202e}gpj.exe", "video/mp4; codecs=\"x\"", "MZ"),
        ("a.js", "text/javascript", "alert(1)"),
    ] {
        let part = Part::text(bytes).file_name(name.to_owned()).mime_str(kind).unwrap();
        let request = server.request_of("user_ada", Method::POST, "files/upload");
        let answer = ask(request.multipart(Form::new().part("file", part))).await;
        if answer.status != 200 {
            answer.assert_refused(400, "multipart_invalid");
        }
        // The same where the name is not part of a header's own grammar.
        let metadata =
            format!("filename {},filetype {}", STANDARD.encode(name), STANDARD.encode(kind));
        let request = server.request_of("user_ada", Method::POST, "files/tus").body(bytes);
        let answer = ask(request
            .header("tus-resumable", "1.0.0")
            .header("upload-length", bytes.len())
            .header("upload-metadata", metadata)
            .header("content-type", "application/offset+octet-stream"))
        .await;
        assert_eq!(answer.status, 201, "{name}: {}", answer.body);
        let path = format!("files/{}", answer.header("x-file-id"));
        let file = server.get("user_ada", &path).await.data(200);
        let kept = file["filename"].as_str().unwrap();
        assert!(kept.len() <= 255 && !kept.contains(['/', '\\', '\0', '\r', '\n']), "{kept:?}");
        let served = follow(&server, &link_to(&server, &file).await).await;
        assert_eq!((served.status, served.bytes.as_slice()), (200, bytes.as_bytes()), "{name}");
        let disposition = served.header("content-disposition");
        let harmless = served.header("content-type").starts_with("video/");
        assert!(harmless || disposition.starts_with("attachment; filename=\""), "{disposition}");
        assert_eq!(served.header("x-content-type-options"), "nosniff");
        assert!(served.header("content-security-policy").contains("sandbox"), "{name}");
        assert_eq!(served.header("set-cookie"), "");
    }
}
