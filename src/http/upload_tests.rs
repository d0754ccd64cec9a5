//! Uploads over a real connection: what is kept, what is refused, and what is left behind.

use std::{net::SocketAddr, path::Path, time::Duration};

use actix_web::{App, HttpResponse, HttpServer, dev::ServerHandle, web};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::*;
use crate::config::BlobStore;
use crate::http::answer;

const MAX: u64 = 3_000_000;

struct Server {
    dir: tempfile::TempDir,
    address: SocketAddr,
    handle: ServerHandle,
}

async fn handler(
    req: HttpRequest,
    body: web::Payload,
    blobs: web::Data<Blobs>,
) -> Result<HttpResponse, Problem> {
    let most = Most { file: MAX, fields: MAX_METADATA_BYTES };
    let upload = receive(&req, body, &blobs, most, &mut Allowance::unlimited()).await?;
    Ok(answer::ok(json!({
        "filename": upload.filename, "content_type": upload.content_type,
        "declared": upload.declared_type, "size": upload.size, "sha256": upload.sha256,
        "metadata": upload.metadata,
    })))
}

impl Server {
    fn start(silence: Duration) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let blobs = web::Data::new(Blobs::open(&BlobStore::File, dir.path()).unwrap());
        let limits = web::Data::new(BodyLimits { silence, ..BodyLimits::DEFAULT });
        let app = move || {
            let app = App::new().app_data(blobs.clone()).app_data(limits.clone());
            app.route("/upload", web::post().to(handler))
        };
        let server = HttpServer::new(app).workers(1).bind("127.0.0.1:0").unwrap();
        let address = server.addrs()[0];
        let running = server.run();
        let handle = running.handle();
        actix_web::rt::spawn(running);
        Self { dir, address, handle }
    }

    async fn connect(&self, kind: &str, length: usize, body: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let head = format!(
            "POST /upload HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
             content-type: {kind}\r\ncontent-length: {length}\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        // A refusal may close the connection before all is written.
        drop(stream.write_all(body).await);
        stream
    }

    async fn send(&self, kind: &str, length: usize, body: &[u8]) -> (u16, Value) {
        let mut stream = self.connect(kind, length, body).await;
        let mut answer = Vec::new();
        let mut chunk = [0; 4096];
        // A reset after the answer is no loss, so what came before it counts.
        while let Ok(read @ 1..) = stream.read(&mut chunk).await {
            answer.extend_from_slice(&chunk[..read]);
        }
        let answer = String::from_utf8(answer).unwrap();
        let status = answer.get(9..12).and_then(|it| it.parse().ok()).unwrap_or_default();
        let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        (status, serde_json::from_str(body).unwrap_or_default())
    }

    async fn upload(&self, body: &[u8]) -> (u16, Value) {
        self.send("multipart/form-data; boundary=B", body.len(), body).await
    }

    /// Nothing is being written any more; bounded, so that a failure is a failure.
    async fn becomes_empty(&self) {
        let incoming = self.dir.path().join("blobs/incoming");
        tokio::time::timeout(Duration::from_secs(10), becomes(&incoming, 0)).await.unwrap();
        assert_eq!(count(&self.dir.path().join("blobs/sha256")), 0);
    }
}

fn count(directory: &Path) -> usize {
    std::fs::read_dir(directory).unwrap().count()
}

async fn becomes(directory: &Path, files: usize) {
    while count(directory) != files {
        tokio::task::yield_now().await;
    }
}

fn file(filename: &str, kind: &str, bytes: &[u8]) -> Vec<u8> {
    let head = format!(
        "--B\r\ncontent-disposition: form-data; name=\"file\"; filename=\"{filename}\"\r\n\
         content-type: {kind}\r\n\r\n"
    );
    [head.as_bytes(), bytes, b"\r\n"].concat()
}

fn text(name: &str, value: &str) -> Vec<u8> {
    format!("--B\r\ncontent-disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n").into()
}

fn body(parts: &[Vec<u8>]) -> Vec<u8> {
    [parts.concat().as_slice(), b"--B--\r\n"].concat()
}

const PATIENT: Duration = Duration::from_secs(30);

#[actix_web::test]
async fn a_file_and_its_fields_are_received() {
    let server = Server::start(PATIENT);
    let parts = [
        text("title", "ü"),
        file("../x/clip.png", "text/html", b"\x89PNG\r\n\x1a\nrest"),
        text("tag", "a"),
        text("tag", "b"),
    ];
    let (status, answer) = server.upload(&body(&parts)).await;
    assert_eq!(status, 200, "{answer}");
    let data = &answer["data"];
    assert_eq!(data["filename"], "clip.png");
    assert_eq!(data["content_type"], "image/png");
    assert_eq!(data["declared"], "text/html");
    assert_eq!(data["size"], 12);
    assert_eq!(data["metadata"], json!({"title": "ü", "tag": ["a", "b"]}));
    server.handle.stop(false).await;
}

#[actix_web::test]
async fn refusals_have_their_status_and_leave_nothing() {
    let server = Server::start(PATIENT);
    let large = file("a", "text/plain", &vec![b'x'; MAX as usize + 1]);
    let short = file("a", "text/plain", b"short");
    let many: Vec<_> = (0..33).map(|n| text(&format!("f{n}"), "x")).collect();
    for (parts, status) in [
        (body(&[text("title", "x")]), 422),
        (body(&many), 422),
        (body(&[text("long", &"x".repeat(16 * 1024 + 1))]), 422),
        // After the file: no blob stays behind.
        (body(&[short.clone(), short.clone()]), 422),
        (body(&[short.clone(), text("long", &"x".repeat(16 * 1024 + 1))]), 422),
        ([short.clone(), b"--B\r\nnonsense".to_vec()].concat(), 400),
        (body(&[large]), 413),
        (file("a", "text/plain", b"no end"), 400),
        (b"nonsense".to_vec(), 400),
    ] {
        let (got, answer) = server.upload(&parts).await;
        assert_eq!((got, answer["success"].as_bool()), (status, Some(false)), "{answer}");
    }
    assert_eq!(server.send("application/json", 2, b"{}").await.0, 415);
    assert_eq!(server.send("multipart/form-data", 2, b"{}").await.0, 400);
    let declared = server.send("multipart/form-data; boundary=B", 9_000_000, b"").await;
    assert_eq!(declared.0, 413);
    server.becomes_empty().await;
    server.handle.stop(false).await;
}

#[actix_web::test]
async fn fields_are_bounded_together_and_as_they_are_stored() {
    let server = Server::start(PATIENT);
    let part = || file("a", "text/plain", b"x");
    let half = "x".repeat(8 * 1024 - 10);
    let (status, answer) =
        server.upload(&body(&[text("a", &half), part(), text("b", &half)])).await;
    assert_eq!(status, 200, "{answer}");
    for fields in [
        vec![text("a", &half), text("a", &half), text("b", "too much")],
        // Six characters each once they are JSON.
        vec![text("b", &"\u{1}".repeat(3000))],
    ] {
        let (status, answer) = server.upload(&body(&[fields, vec![part()]].concat())).await;
        assert_eq!((status, answer["code"].as_str()), (422, Some("validation_failed")));
        assert!(answer["detail"]["fields"]["b"].is_string(), "{answer}");
    }
    server.handle.stop(false).await;
}

#[actix_web::test]
async fn a_stalled_upload_is_cut_off() {
    let server = Server::start(Duration::from_millis(50));
    let part = file("a", "text/plain", &vec![b'x'; 2_000_000]);
    let (status, answer) =
        server.send("multipart/form-data; boundary=B", part.len() + 100, &part).await;
    assert_eq!((status, &answer["code"]), (408, &json!("request_timeout")));
    server.becomes_empty().await;
    server.handle.stop(false).await;
}

#[actix_web::test]
async fn an_upload_broken_off_by_its_sender_leaves_nothing() {
    let server = Server::start(PATIENT);
    let part = file("a", "text/plain", &vec![b'x'; 2_000_000]);
    let length = part.len() + 100;
    let stream = server.connect("multipart/form-data; boundary=B", length, &part).await;
    let incoming = server.dir.path().join("blobs/incoming");
    tokio::time::timeout(Duration::from_secs(10), becomes(&incoming, 1)).await.unwrap();
    drop(stream);
    server.becomes_empty().await;
    server.handle.stop(false).await;
}

#[test]
fn file_names_are_made_safe() {
    for (given, kept) in [
        ("clip.mp4", "clip.mp4"),
        ("../../etc/passwd", "passwd"),
        ("C:\\temp\\a b.txt", "a b.txt"),
        ("a\0b\r\nc\u{7f}.txt", "abc.txt"),
        ("photo\u{202e}gpj.exe", "photogpj.exe"),
        ("日本.mp4", "日本.mp4"),
        ("", "file"),
        ("..", "file"),
        ("a/", "file"),
        (" \t ", "file"),
    ] {
        assert_eq!(sanitised(given), kept, "{given:?}");
    }
    let long = sanitised(&format!("{}.mp4", "ü".repeat(200)));
    assert!(long.len() <= 255 && long.ends_with("ü.mp4"));
}

const DOCX: &str = "application/vnd.openxmlformats-officedocument.wordprocessingml.document";

#[test]
fn bytes_outrank_words_about_the_type() {
    let declared = |text: &str| text.parse::<mime::Mime>().ok();
    for (sniffed, told, expected) in [
        (Some("image/png"), "text/plain", "image/png"),
        (None, "text/plain; charset=utf-8", "text/plain"),
        (None, "video/mp4", "video/mp4"),
        (None, "text/html", "application/octet-stream"),
        (None, "image/svg+xml", "application/octet-stream"),
        (None, "application/xhtml+xml", "application/octet-stream"),
        (None, "text/javascript", "application/octet-stream"),
        (None, "multipart/mixed", "application/octet-stream"),
        (None, "TEXT/HTML", "application/octet-stream"),
        (None, "application/xml", "application/octet-stream"),
        (None, "application/x-javascript", "application/octet-stream"),
        (None, "text/javascript1.5", "application/octet-stream"),
        (None, "application/wasm", "application/octet-stream"),
        (None, "text/css", "application/octet-stream"),
        (None, DOCX, DOCX),
        (None, "application/postscript", "application/postscript"),
        (None, "text/x-java-source", "text/x-java-source"),
        (None, "nonsense", "application/octet-stream"),
    ] {
        assert_eq!(content_type(sniffed, declared(told).as_ref()), expected, "{told}");
    }
}
