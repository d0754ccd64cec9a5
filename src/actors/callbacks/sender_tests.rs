//! Against a listener of this machine that is given its answers word by word.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use super::*;
use crate::clerk::webhook::WebhookVerifier;

const ONE: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const TWO: &str = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD";

/// A port, and what it was sent: head and body.
async fn answering(answer: &'static str) -> (u16, JoinHandle<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let heard = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut heard = String::new();
        while !heard.ends_with("{}") {
            let mut bytes = [0; 4096];
            let read = stream.read(&mut bytes).await.unwrap();
            heard.push_str(std::str::from_utf8(&bytes[..read]).unwrap());
        }
        stream.write_all(answer.as_bytes()).await.unwrap();
        heard
    });
    (port, heard)
}

fn at() -> DateTime<Utc> {
    DateTime::from_timestamp(1_767_225_600, 0).unwrap()
}

async fn send(url: &str, allow_private: bool) -> Answer {
    let secrets = Secret::from(format!("{ONE}, {TWO}"));
    let sender = Sender::new(&secrets, allow_private).unwrap();
    let request_id = Some("req_1");
    sender.send(Message { url, id: "job_1_2", request_id, at: at(), body: b"{}".to_vec() }).await
}

#[tokio::test]
async fn every_secret_signs_and_a_verifier_takes_it() {
    let (port, heard) = answering("HTTP/1.1 204 No Content\r\n\r\n").await;
    let answer = send(&format!("http://127.0.0.1:{port}/hook?token=t"), true).await;
    assert_eq!(answer, Answer { status: Ok(204), retry_after: None });
    let heard = heard.await.unwrap();
    let (head, body) = heard.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("POST /hook?token=t HTTP/1.1\r\n"), "{head}");
    let headers: Vec<(&str, &[u8])> = head
        .lines()
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name, value.as_bytes()))
        .collect();
    assert!(headers.contains(&("x-request-id", b"req_1")), "{head}");
    for secret in [ONE, TWO] {
        let verifier = WebhookVerifier::parse(secret).unwrap();
        let verified = verifier.verify(headers.iter().copied(), body.as_bytes(), at());
        assert_eq!(verified.unwrap().0, "job_1_2");
        assert!(verifier.verify(headers.iter().copied(), b"{ }", at()).is_err());
    }
}

#[tokio::test]
async fn a_redirect_is_not_followed_and_a_wish_to_wait_is_heard() {
    let moved = "HTTP/1.1 307 Moved\r\nlocation: http://example.com/\r\ncontent-length: 0\r\n\r\n";
    let busy = "HTTP/1.1 503 Busy\r\nretry-after: 120\r\ncontent-length: 0\r\n\r\n";
    let dated = "HTTP/1.1 429 Busy\r\ndate: Wed, 21 Oct 2026 07:28:00 GMT\r\n\
                 retry-after: Wed, 21 Oct 2026 07:29:30 GMT\r\ncontent-length: 0\r\n\r\n";
    let cases = [(moved, 307, None), (busy, 503, Some(120)), (dated, 429, Some(90))];
    for (text, status, seconds) in cases {
        let (port, _heard) = answering(text).await;
        let answer = send(&format!("http://127.0.0.1:{port}/"), true).await;
        let retry_after = seconds.map(Duration::from_secs);
        assert_eq!(answer, Answer { status: Ok(status), retry_after });
    }
}

#[tokio::test]
async fn what_is_no_answer_and_who_is_not_there_are_told_apart() {
    let (port, _heard) = answering("SSH-2.0-OpenSSH_9.9\r\n").await;
    let answer = send(&format!("http://127.0.0.1:{port}/"), true).await;
    assert_eq!(answer.status, Err(Trouble::NoAnswer));
    let port = {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        listener.local_addr().unwrap().port()
    };
    let answer = send(&format!("http://127.0.0.1:{port}/"), true).await;
    assert_eq!(answer.status, Err(Trouble::Connection));
}

#[tokio::test]
async fn a_name_that_leads_to_this_machine_is_not_connected_to() {
    let (port, heard) = answering("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
    // By the resolver alone: this is what a name that leads elsewhere by now comes to.
    let sender = |allow_private| {
        let gate = Gate { allow_private };
        let client = Client::builder().no_proxy().dns_resolver(gate).build().unwrap();
        client.post(format!("http://localhost:{port}/")).body("{}").send()
    };
    assert_eq!(trouble(&sender(false).await.unwrap_err()), Trouble::AddressRefused);
    assert!(!heard.is_finished());
    assert_eq!(sender(true).await.unwrap().status(), 200);
    // And an address that is written out, which no resolver sees.
    let answer = send(&format!("http://127.0.0.1:{port}/"), false).await;
    assert_eq!(answer.status, Err(Trouble::AddressRefused));
}

#[tokio::test]
async fn an_answer_without_end_is_not_waited_for() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let _ = stream.read(&mut [0; 4096]).await;
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await;
        while stream.write_all(&[b'x'; 1024]).await.is_ok() {}
    });
    let answer = send(&format!("http://127.0.0.1:{port}/"), true).await;
    assert_eq!(answer.status, Ok(200));
}
