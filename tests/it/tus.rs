//! Uploads in pieces: with the official client through connections that are cut and servers that
//! are killed, and by hand for everything that a client may get wrong.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use reqwest::{Method, RequestBuilder};
use rustix::process::Signal;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;

use crate::clients;
use crate::s3::S3;
use crate::server::{Answer, Server, Setup, ask, claims, signed};

const ADA: &str = "user_ada";
const SIZE: usize = 6 * 1024 * 1024;
const PIECE: &str = "application/offset+octet-stream";

/// A way to the server on which connections break after so many bytes of the client's.
struct Cutting {
    address: String,
    /// Where to; nothing while there is no server.
    target: Arc<Mutex<Option<String>>>,
    cuts: mpsc::UnboundedReceiver<()>,
}

impl Cutting {
    fn start(target: &str, after: &[u64]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let host = target.trim_start_matches("http://").to_owned();
        let target = Arc::new(Mutex::new(Some(host)));
        let (cut, cuts) = mpsc::unbounded_channel();
        let (shared, left) = (Arc::clone(&target), Arc::new(Mutex::new(after.to_vec())));
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let Ok(client) = client else { return };
                let Some(target) = shared.lock().unwrap().clone() else { continue };
                let Ok(server) = TcpStream::connect(target) else { continue };
                let (client_out, server_in) =
                    (client.try_clone().unwrap(), server.try_clone().unwrap());
                std::thread::spawn(move || forward(server_in, client_out, None));
                let (left, cut) = (Arc::clone(&left), cut.clone());
                std::thread::spawn(move || {
                    let after = left.lock().unwrap().first().copied();
                    if forward(client, server, after) {
                        left.lock().unwrap().remove(0);
                        let _ = cut.send(());
                    }
                });
            }
        });
        Self { address, target, cuts }
    }
}

/// True when it was cut.
fn forward(mut from: TcpStream, mut to: TcpStream, most: Option<u64>) -> bool {
    let (mut buffer, mut passed) = (vec![0; 16 * 1024], 0);
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..read]).is_err() {
            break;
        }
        passed += read as u64;
        if most.is_some_and(|most| passed >= most) {
            let _ = from.shutdown(Shutdown::Both);
            let _ = to.shutdown(Shutdown::Both);
            return true;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
    false
}

async fn with_client(through: &str, more: Value) -> Value {
    let mut asked = json!({
        "endpoint": format!("{through}/api/v1/files/tus"),
        "token": signed(&claims(ADA)),
        "size": SIZE,
    });
    asked.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    tokio::task::spawn_blocking(move || clients::run("tus-upload.mjs", &asked)).await.unwrap()
}

fn methods(told: &Value) -> Vec<&str> {
    let requests = told["requests"].as_array().unwrap().iter();
    requests.map(|request| request["method"].as_str().unwrap()).collect()
}

/// The file is whole, by its record and by its bytes, and its upload's address still tells it.
async fn assert_stored(server: &Server, told: &Value) {
    let file_id = told["file_id"].as_str().unwrap_or_else(|| panic!("no file: {told}"));
    let file = server.get(ADA, &format!("files/{file_id}")).await.data(200);
    assert_eq!((&file["sha256"], &file["size"]), (&told["sha256"], &json!(SIZE)), "{told}");
    assert_eq!(file["filename"], "clip ü.bin");
    assert_eq!(file["content_type"], "video/x-test");
    assert_eq!(file["metadata"], json!({ "purpose": "test" }));
    let path = format!("files/{file_id}/signed-url");
    let link = server.post(ADA, &path, &json!({})).await.data(200);
    let link = link["url"].as_str().unwrap();
    let path = &link[link.find("/api").unwrap()..];
    let bytes = ask(server.request(Method::GET, path)).await.bytes;
    assert_eq!(hex::encode(Sha256::digest(&bytes)), told["sha256"].as_str().unwrap());
    let head = ask(tus(server, Method::HEAD, &format!("files/tus/{file_id}"))).await;
    assert_eq!((head.status, head.header("x-file-id")), (200, file_id));
    assert_eq!(head.header("upload-offset"), SIZE.to_string());
    let described = head.header("upload-metadata");
    let name = format!("filename {}", STANDARD.encode("clip ü.bin"));
    assert!(described.split(',').any(|pair| pair == name), "{described}");
    let spool = server.data_dir().join("blobs/uploads");
    assert_eq!(std::fs::read_dir(spool).unwrap().count(), 0, "something was left behind");
}

#[tokio::test]
async fn the_official_client_resumes_when_its_connection_is_cut() {
    let server = Server::start(Setup::clerk());
    let way = Cutting::start(&server.address, &[1_000_000, 2_500_000]);
    let told = with_client(&way.address, json!({})).await;
    let methods = methods(&told);
    assert_eq!(methods.iter().filter(|method| **method == "POST").count(), 1, "{told}");
    assert!(methods.contains(&"HEAD"), "it was not cut: {told}");
    let resumed = told["requests"].as_array().unwrap().iter().any(|request| {
        let offset = request["offset"].as_str().and_then(|it| it.parse::<usize>().ok());
        request["method"] == "HEAD" && offset.is_some_and(|offset| (1..SIZE).contains(&offset))
    });
    assert!(resumed, "it began again: {told}");
    assert_stored(&server, &told).await;
}

#[tokio::test]
async fn the_official_client_resumes_on_a_server_that_was_killed_and_started_again() {
    let server = Server::start(Setup::clerk());
    let mut way = Cutting::start(&server.address, &[3_000_000]);
    let through = way.address.clone();
    let uploading =
        tokio::spawn(
            async move { with_client(&through, json!({ "chunk_size": 1024 * 1024 })).await },
        );
    way.cuts.recv().await.expect("the connection is cut");
    *way.target.lock().unwrap() = None;
    let server = server.start_again();
    let host = server.address.trim_start_matches("http://").to_owned();
    *way.target.lock().unwrap() = Some(host);
    let told = uploading.await.unwrap();
    assert!(methods(&told).contains(&"HEAD"), "{told}");
    assert_stored(&server, &told).await;
}

#[tokio::test]
async fn the_official_client_may_send_bytes_with_its_first_request() {
    let server = Server::start(Setup::clerk());
    let told =
        with_client(&server.address, json!({ "with_creation": true, "chunk_size": 2_000_000 }))
            .await;
    assert_eq!(told["requests"][0]["offset"], "2000000", "{told}");
    assert_stored(&server, &told).await;
}

#[tokio::test]
async fn an_upload_in_pieces_ends_in_a_bucket_too() {
    let s3 = S3::start().await;
    let setup = Setup::clerk().with("T2M_BLOBS", &s3.url);
    let server =
        Server::start(s3.variables().fold(setup, |it, (name, value)| it.with(name, value)));
    let told = with_client(&server.address, json!({ "chunk_size": 2_500_000 })).await;
    assert_stored(&server, &told).await;
    assert!(!server.data_dir().join("blobs/sha256").exists());
}

fn tus(server: &Server, method: Method, path: &str) -> RequestBuilder {
    server.request_of(ADA, method, path).header("tus-resumable", "1.0.0")
}

async fn created(server: &Server, length: u64) -> String {
    let request = tus(server, Method::POST, "files/tus").header("upload-length", length);
    let answer = ask(request).await;
    assert_eq!(answer.status, 201, "{}", answer.body);
    assert!(!answer.header("upload-expires").is_empty());
    answer.header("location").to_owned()
}

fn piece(server: &Server, path: &str, offset: u64, bytes: &'static str) -> RequestBuilder {
    let request = tus(server, Method::PATCH, path).header("upload-offset", offset);
    request.header("content-type", PIECE).body(bytes)
}

async fn offset(server: &Server, path: &str) -> u64 {
    let head = ask(tus(server, Method::HEAD, path)).await;
    assert_eq!((head.status, head.header("cache-control")), (200, "no-store"));
    head.header("upload-offset").parse().expect("an offset is a number")
}

#[tokio::test]
async fn a_server_tells_what_it_can_and_pages_of_allowed_origins_may_ask() {
    let page = "https://app.example.com";
    let server = Server::start(Setup::clerk().with("ALLOWED_ORIGINS", page));
    let told = ask(server.request(Method::OPTIONS, "files/tus")).await;
    assert_eq!(told.status, 204);
    for (name, value) in [
        ("tus-resumable", "1.0.0"),
        ("tus-version", "1.0.0"),
        ("tus-extension", "creation,creation-with-upload,expiration,checksum,termination"),
        ("tus-max-size", "2147483648"),
        ("tus-checksum-algorithm", "sha1,sha256"),
    ] {
        assert_eq!(told.header(name), value, "{name}");
    }
    for (path, method) in [("files/tus", "POST"), ("files/tus/x", "PATCH"), ("files/tus/x", "HEAD")]
    {
        let preflight = server
            .request(Method::OPTIONS, path)
            .header("origin", page)
            .header("access-control-request-method", method)
            .header(
                "access-control-request-headers",
                "authorization,content-type,tus-resumable,upload-length,upload-metadata,\
                 upload-offset,upload-checksum",
            );
        let answer = ask(preflight).await;
        assert_eq!(answer.status, 200, "{method}");
        assert_eq!(answer.header("access-control-allow-origin"), page);
    }
    let request = tus(&server, Method::POST, "files/tus").header("upload-length", 0);
    let answer = ask(request.header("origin", page)).await;
    let exposed = answer.header("access-control-expose-headers").to_lowercase();
    for name in ["location", "upload-offset", "upload-expires", "x-file-id", "tus-resumable"] {
        assert!(exposed.contains(name), "{name} is not in {exposed}");
    }
    // Without a byte to come it is finished at once.
    assert_eq!((answer.status, answer.header("upload-offset")), (201, "0"));
    assert!(!answer.header("x-file-id").is_empty());
}

async fn refused(request: RequestBuilder, status: u16, code: &str) -> Answer {
    let answer = ask(request).await;
    answer.assert_refused(status, code);
    answer
}

#[tokio::test]
async fn what_cannot_be_begun_is_refused_and_changes_nothing() {
    let setup = Setup::clerk().with("MAX_UPLOAD_BYTES", "1000");
    let server = Server::start(setup);
    let begin = || tus(&server, Method::POST, "files/tus");
    let plain = server.request_of(ADA, Method::POST, "files/tus").header("upload-length", 5);
    let answer = refused(plain, 412, "precondition_failed").await;
    assert_eq!(answer.header("tus-version"), "1.0.0");
    let later = begin().header("upload-defer-length", 1);
    refused(later, 400, "malformed_request").await;
    for length in ["-1", "", "5.0", "0x5", "99999999999999999999999", "five"] {
        refused(begin().header("upload-length", length), 400, "malformed_request").await;
    }
    refused(begin(), 400, "malformed_request").await;
    let large = refused(begin().header("upload-length", 1001), 413, "payload_too_large").await;
    assert_eq!(large.body["detail"]["limit_bytes"], 1000);
    for metadata in ["filename !", "a YQ==,a Yg==", "filename /w=="] {
        let request = begin().header("upload-length", 5).header("upload-metadata", metadata);
        refused(request, 422, "validation_failed").await;
    }
    let more = begin().header("upload-length", 5).header("content-type", PIECE).body("123456");
    refused(more, 413, "payload_too_large").await;
    let spool = server.data_dir().join("blobs/uploads");
    assert_eq!(std::fs::read_dir(spool).unwrap().count(), 0);
    assert_eq!(server.get(ADA, "files").await.data(200)["items"], json!([]));
}

#[tokio::test]
async fn a_piece_that_does_not_fit_is_refused_and_changes_nothing() {
    let server = Server::start(Setup::clerk());
    let path = created(&server, 10).await;
    let taken = ask(piece(&server, &path, 0, "hello")).await;
    assert_eq!((taken.status, taken.header("upload-offset")), (204, "5"));
    assert_eq!(taken.header("tus-resumable"), "1.0.0");
    let elsewhere = refused(piece(&server, &path, 0, "again"), 409, "upload_offset_mismatch").await;
    assert_eq!(elsewhere.body["detail"]["offset"], 5);
    refused(piece(&server, &path, 5, "too long"), 413, "payload_too_large").await;
    let untyped = tus(&server, Method::PATCH, &path).header("upload-offset", 5).body("x");
    refused(untyped, 415, "unsupported_media_type").await;
    let nowhere = tus(&server, Method::PATCH, &path).header("content-type", PIECE).body("x");
    refused(nowhere, 400, "malformed_request").await;
    let sum = |algorithm: &str, digest: &[u8]| format!("{algorithm} {}", STANDARD.encode(digest));
    let promised = |sum: &str| piece(&server, &path, 5, "world").header("upload-checksum", sum);
    refused(promised("md5 AAAA"), 400, "malformed_request").await;
    refused(promised("sha1 !"), 400, "malformed_request").await;
    refused(promised("sha1"), 400, "malformed_request").await;
    let wrong = sum("sha256", &Sha256::digest("w0rld"));
    refused(promised(&wrong), 460, "checksum_mismatch").await;
    assert_eq!(offset(&server, &path).await, 5);

    let of_bob = |method: Method| {
        server.request_of("user_bob", method, &path).header("tus-resumable", "1.0.0")
    };
    assert_eq!(ask(of_bob(Method::HEAD)).await.status, 404);
    refused(of_bob(Method::DELETE), 404, "not_found").await;
    let foreign = of_bob(Method::PATCH).header("upload-offset", 5).header("content-type", PIECE);
    refused(foreign.body("x"), 404, "not_found").await;

    let right = sum("sha256", &Sha256::digest("world"));
    let done = ask(promised(&right)).await;
    assert_eq!((done.status, done.header("upload-offset")), (204, "10"));
    assert!(done.position() > 0);
    let file_id = done.header("x-file-id");
    assert!(path.ends_with(file_id));
    let file = server.get(ADA, &format!("files/{file_id}")).await.data(200);
    assert_eq!(file["sha256"], hex::encode(Sha256::digest("helloworld")));
    assert_eq!(file["filename"], "file");
    // Its address goes on to say so, and takes nothing more.
    refused(piece(&server, &path, 5, "world"), 409, "upload_offset_mismatch").await;
    refused(piece(&server, &path, 10, "more"), 413, "payload_too_large").await;
    assert_eq!(offset(&server, &path).await, 10);
}

#[tokio::test]
async fn an_upload_can_be_ended_also_by_clients_that_know_only_post() {
    let server = Server::start(Setup::clerk());
    let path = created(&server, 10).await;
    let overridden =
        |method: &str| tus(&server, Method::POST, &path).header("x-http-method-override", method);
    let first = overridden("PATCH").header("upload-offset", 0).header("content-type", PIECE);
    assert_eq!(ask(first.body("hello")).await.status, 204);
    refused(overridden("PUT"), 400, "malformed_request").await;
    assert_eq!(offset(&server, &path).await, 5);
    assert_eq!(ask(overridden("DELETE")).await.status, 204);
    assert_eq!(ask(tus(&server, Method::HEAD, &path)).await.status, 404);
    refused(piece(&server, &path, 5, "world"), 404, "not_found").await;
    let spool = server.data_dir().join("blobs/uploads");
    assert_eq!(std::fs::read_dir(spool).unwrap().count(), 0);
}

#[tokio::test]
async fn a_creation_with_the_same_key_is_the_same_upload() {
    let server = Server::start(Setup::clerk());
    let begin = |length: u64, metadata: &str| {
        let request = tus(&server, Method::POST, "files/tus").header("idempotency-key", "once");
        ask(request.header("upload-length", length).header("upload-metadata", metadata.to_owned()))
    };
    let first = begin(5, "filename YQ==").await;
    let path = first.header("location").to_owned();
    assert_eq!(ask(piece(&server, &path, 0, "he")).await.status, 204);
    let again = begin(5, "filename YQ==").await;
    assert_eq!((again.status, again.header("location")), (201, path.as_str()));
    assert_eq!(again.header("idempotent-replayed"), "true");
    assert_eq!(again.header("upload-offset"), "2");
    begin(6, "filename YQ==").await.assert_refused(422, "idempotency_key_reused");
    begin(5, "filename Yg==").await.assert_refused(422, "idempotency_key_reused");
    let last = ask(piece(&server, &path, 2, "llo")).await;
    assert_eq!(last.status, 204);
    let finished = begin(5, "filename YQ==").await;
    assert_eq!((finished.status, finished.header("upload-offset")), (201, "5"));
    assert!(!finished.header("x-file-id").is_empty());
    assert_eq!(finished.position(), last.position());
    let ended = ask(tus(&server, Method::DELETE, &path)).await;
    assert_eq!((ended.status, ended.position()), (204, server.log_position().await));
}

#[tokio::test]
async fn a_user_has_no_more_than_a_hundred_uploads_open() {
    let server = Server::start(Setup::clerk());
    let mut paths = Vec::new();
    for _ in 0..100 {
        paths.push(created(&server, 10).await);
    }
    let begin = || tus(&server, Method::POST, "files/tus").header("upload-length", 10);
    let answer = refused(begin(), 413, "quota_exceeded").await;
    assert_eq!(answer.body["detail"], json!({ "open": 100, "limit": 100 }));
    let of_bob = server.request_of("user_bob", Method::POST, "files/tus");
    let of_bob = of_bob.header("tus-resumable", "1.0.0").header("upload-length", 10);
    assert_eq!(ask(of_bob).await.status, 201);
    assert_eq!(ask(piece(&server, &paths[0], 0, "helloworld")).await.status, 204);
    assert_eq!(ask(begin()).await.status, 201);
    refused(begin(), 413, "quota_exceeded").await;
}

/// Bounded, so that a failure is a failure.
async fn until(what: &str, holds: impl AsyncFn() -> bool) {
    let waiting = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), waiting).await.expect(what);
}

#[tokio::test]
async fn a_creation_that_breaks_off_stays_only_if_its_key_names_it() {
    let server = Server::start(Setup::clerk().with("QUOTA_STANDARD_BYTES", "1000"));
    let spool = server.data_dir().join("blobs/uploads");
    let cut = async |key: &str| {
        let host = server.address.trim_start_matches("http://");
        let mut client = TcpStream::connect(host).unwrap();
        let token = signed(&claims(ADA));
        let request = format!(
            "POST /api/v1/files/tus HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {token}\r\n\
             tus-resumable: 1.0.0\r\nupload-length: 1000\r\ncontent-type: {PIECE}\r\n\
             content-length: 1000\r\n{key}\r\nhello"
        );
        client.write_all(request.as_bytes()).unwrap();
        let begun = async || {
            let mut files = std::fs::read_dir(&spool).unwrap().map(|it| it.unwrap().path());
            files.any(|path| path.extension().is_some_and(|it| it == "json"))
        };
        until("it is begun", begun).await;
    };
    let begin = || tus(&server, Method::POST, "files/tus").header("upload-length", 1000);
    cut("idempotency-key: once\r\n").await;
    let again = ask(begin().header("idempotency-key", "once")).await;
    assert_eq!((again.status, again.header("idempotent-replayed")), (201, "true"));
    assert_eq!(ask(tus(&server, Method::DELETE, again.header("location"))).await.status, 204);
    cut("").await;
    until("its room is given back", async || ask(begin()).await.status == 201).await;
}

#[tokio::test]
async fn what_came_of_a_slow_piece_is_kept_and_answered_when_the_server_stops() {
    let mut server = Server::start(Setup::clerk());
    let path = created(&server, 1000).await;
    let host = server.address.trim_start_matches("http://");
    let mut client = TcpStream::connect(host).unwrap();
    client.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let token = signed(&claims(ADA));
    let request = format!(
        "PATCH {path} HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {token}\r\n\
         tus-resumable: 1.0.0\r\nupload-offset: 0\r\ncontent-type: {PIECE}\r\n\
         content-length: 1000\r\n\r\n"
    );
    client.write_all(request.as_bytes()).unwrap();
    server.send(Signal::TERM);
    // A byte now and then, until there is an answer.
    let (mut sent, mut answer) = (0, [0; 4096]);
    let answer = loop {
        client.write_all(b"x").expect("the server listens until it answers");
        sent += 1;
        match client.read(&mut answer) {
            Ok(length) => break String::from_utf8_lossy(&answer[..length]).into_owned(),
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock, "{error}"),
        }
    };
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    assert!(answer.to_lowercase().contains("retry-after: 1"), "{answer}");
    assert!(server.ended().success());
    let server = server.start_again();
    let kept = offset(&server, &path).await;
    // Those that came while it wrote are not.
    assert!(kept > sent / 2 && kept <= sent, "{kept} of {sent} bytes");
}

#[tokio::test]
async fn an_upload_whose_time_is_over_is_not_there() {
    let server = Server::start(Setup::clerk().with("UPLOAD_LIFETIME", "1s"));
    let path = created(&server, 10).await;
    let gone = async || ask(tus(&server, Method::HEAD, &path)).await.status == 404;
    until("it expires", gone).await;
}
