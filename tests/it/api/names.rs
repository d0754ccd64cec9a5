//! File names that somebody chose badly, or well: the same comes of them by every door.

use reqwest::{Method, RequestBuilder};
use serde_json::Value;

use crate::server::{Answer, Server, Setup, ask};

const ADA: &str = "user_ada";
const DOORS: [&str; 5] =
    ["files/upload", "translations", "uploadfile/", "/uploadfile", "/api/uploadfile"];

/// A form with a file whose `Content-Disposition` ends with these bytes.
fn upload(server: &Server, path: &str, name: &[u8]) -> RequestBuilder {
    let mut body = b"--edge\r\ncontent-disposition: form-data; name=\"api_key\"\r\n\r\nk\r\n\
                     --edge\r\ncontent-disposition: form-data; name=\"file\"; "
        .to_vec();
    body.extend_from_slice(name);
    body.extend_from_slice(b"\r\ncontent-type: text/plain\r\n\r\nHello\r\n--edge--\r\n");
    let request = server.request_of(ADA, Method::POST, path);
    request.header("content-type", "multipart/form-data; boundary=edge").body(body)
}

/// What the file is called; nothing if it was refused as malformed.
fn name(answer: Answer, door: &str) -> Option<String> {
    if answer.status == 400 {
        answer.assert_refused(400, "multipart_invalid");
        return None;
    }
    let accepted = if door == "translations" { 202 } else { 200 };
    let data = answer.data(accepted);
    let found: &Value =
        if data["filename"].is_null() { &data["prompt"] } else { &data["filename"] };
    Some(found.as_str().unwrap().to_owned())
}

#[tokio::test]
async fn a_name_is_made_safe_or_refused_the_same_by_every_door() {
    let server = Server::start(Setup::clerk());
    let long = format!("filename=\"{}.txt\"", "x".repeat(4096));
    let shortened = format!("{}.txt", "x".repeat(251));
    let table: &[(&[u8], Option<&str>)] = &[
        (b"filename=\"notes.txt\"", Some("notes.txt")),
        (b"filename=\"../../etc/passwd\"", Some("passwd")),
        (b"filename=\"..\\\\..\\\\boot.ini\"", Some("boot.ini")),
        (b"filename=\"..\"", Some("file")),
        (b"filename=\"\"", Some("file")),
        (b"filename*=UTF-8''a%00b%0D%0Ac.txt", Some("abc.txt")),
        (b"filename*=UTF-8''..%2F..%2Fx.txt", Some("x.txt")),
        (b"filename*=UTF-8''%E2%80%AEtxt.exe", Some("txt.exe")),
        (b"filename=\"a\0b.txt\"", None),
        (b"filename=\"a\rb.txt\"", None),
        (b"filename=\"a\nb.txt\"", None),
        (b"filename=\"a\r\nx-evil: 1\r\n\r\nb.txt\"", None),
        (long.as_bytes(), Some(&shortened)),
    ];
    for (given, expected) in table {
        for door in DOORS {
            let answer = ask(upload(&server, door, given)).await;
            let found = name(answer, door);
            let given = String::from_utf8_lossy(&given[..given.len().min(40)]);
            assert_eq!(found.as_deref(), *expected, "{door}: {given:?}");
        }
    }
}
