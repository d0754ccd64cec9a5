//! A server that is told to stop: whoever got in is answered, nobody is kept, and what its engines
//! were doing goes on after it.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, mpsc};
use std::time::{Duration, Instant};

use reqwest::Method;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::server::{Server, Setup, ask, claims, signed};

const ADA: &str = "user_ada";
/// Only turns a hang into a failure.
const PATIENCE: Duration = Duration::from_secs(60);

/// The status and the rest of an answer, read to its end.
struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    fn is_last(&self) -> bool {
        self.head.contains("connection: close")
    }
}

fn connect(server: &Server) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect(server.address.strip_prefix("http://").unwrap())?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// None if the connection ends before the answer does.
fn exchange(stream: &mut TcpStream, request: &str) -> Option<Answer> {
    stream.write_all(request.as_bytes()).ok()?;
    let mut bytes = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let text = String::from_utf8_lossy(&bytes);
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let head = head.to_ascii_lowercase();
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
            if body.len() >= length.unwrap().parse::<usize>().unwrap() {
                let status = head.split(' ').nth(1).unwrap().parse().unwrap();
                return Some(Answer { status, body: body.to_owned(), head });
            }
        }
        match stream.read(&mut chunk) {
            Ok(count @ 1..) => bytes.extend_from_slice(&chunk[..count]),
            Ok(0) | Err(_) => return None,
        }
    }
}

fn post(path: &str, headers: &str, body: &str) -> String {
    let token = signed(&claims(ADA));
    let length = body.len();
    format!(
        "POST /api/v1/{path} HTTP/1.1\r\nhost: t2m.test\r\nauthorization: Bearer {token}\r\n\
         content-type: application/json\r\ncontent-length: {length}\r\n{headers}\r\n{body}"
    )
}

/// What the clients have seen, together.
#[derive(Default)]
struct Seen {
    answers: AtomicUsize,
    /// Ids of the jobs that were promised.
    acknowledged: Mutex<Vec<String>>,
    /// When the last client had connected.
    connected: Mutex<Option<Instant>>,
    /// When each request was sent that got no answer on a connection of its own.
    lost: Mutex<Vec<Instant>>,
    /// The same on one that had been used before.
    lost_on_used: Mutex<Vec<Instant>>,
}

impl Seen {
    /// Asks until nobody listens any more, each time on a connection of its own or on one for as
    /// long as it is kept.
    fn ask_on(&self, server: &Server, request: &str, keep: bool) {
        while let Ok(mut stream) = connect(server) {
            let now = Instant::now();
            let mut connected = self.connected.lock().unwrap();
            *connected = connected.max(Some(now));
            drop(connected);
            let mut used = false;
            loop {
                let sent = Instant::now();
                let Some(answer) = exchange(&mut stream, request) else {
                    let lost = if used { &self.lost_on_used } else { &self.lost };
                    lost.lock().unwrap().push(sent);
                    break;
                };
                if answer.status == 202 {
                    let body: serde_json::Value = serde_json::from_str(&answer.body).unwrap();
                    let id = body["data"]["job_id"].as_str().unwrap().to_owned();
                    self.acknowledged.lock().unwrap().push(id);
                }
                let count = self.answers.fetch_add(1, Ordering::SeqCst);
                if count == ENOUGH {
                    server.send(Signal::TERM);
                }
                used = true;
                if !keep || answer.is_last() {
                    break;
                }
            }
        }
    }
}

/// So many are answered when the server is told to stop.
const ENOUGH: usize = 300;

#[tokio::test]
async fn under_load_every_request_that_got_in_is_answered_and_nothing_promised_is_lost() {
    let mut server = Server::start(Setup::clerk());
    server.get(ADA, "me").await.data(200);
    let request = post("videos/generate", "", &json!({ "prompt": "a pier" }).to_string());
    let seen = Seen::default();
    std::thread::scope(|scope| {
        for number in 0..32 {
            let (seen, server, request) = (&seen, &server, &request);
            scope.spawn(move || seen.ask_on(server, request, number % 4 == 0));
        }
    });
    assert!(server.ended().success());
    let Seen { acknowledged, connected, lost, lost_on_used, .. } = seen;
    let (lost, acknowledged) = (lost.into_inner().unwrap(), acknowledged.into_inner().unwrap());
    assert_eq!(lost.len(), 0, "of {} connections nothing came back", lost.len());
    // One that is sent when nobody listens any more may meet a connection that is being closed.
    let connected = connected.into_inner().unwrap();
    let early = lost_on_used.into_inner().unwrap().into_iter().filter(|at| Some(*at) < connected);
    assert_eq!(early.count(), 0, "on connections that were kept");

    let server = server.start_again();
    assert!(acknowledged.len() >= ENOUGH);
    for id in acknowledged {
        server.get(ADA, &format!("jobs/{id}")).await.data(200);
    }
}

#[tokio::test]
async fn while_it_stops_a_refusal_too_is_the_last_answer_on_its_connection() {
    let mut server = Server::start(Setup::clerk());
    server.get(ADA, "me").await.data(200);
    let (mut first, mut second) = (connect(&server).unwrap(), connect(&server).unwrap());
    // It does not end before this has been asked to its end.
    let mut held = connect(&server).unwrap();
    let slow = post("videos/generate", "", &json!({ "prompt": "a pier" }).to_string());
    let (most, rest) = slow.split_at(slow.len() - 1);
    held.write_all(most.as_bytes()).unwrap();
    // What is refused unread ends its connection anyway, so that there is nothing to read.
    let foreign = post("videos/generate", "origin: https://evil.test\r\n", "");
    let refused = exchange(&mut first, &foreign).unwrap();
    assert_eq!((refused.status, refused.is_last()), (403, false));
    server.send(Signal::TERM);
    let stopping = async {
        let why = "the server is stopping";
        let ready = || ask(server.request(Method::GET, "system/ready?for=traffic"));
        while ready().await.body["detail"]["reason"] != why {}
    };
    tokio::time::timeout(PATIENCE, stopping).await.expect("it says that it stops");
    for stream in [&mut first, &mut second] {
        let refused = exchange(stream, &foreign).unwrap();
        assert_eq!((refused.status, refused.is_last()), (403, true));
    }
    let answer = exchange(&mut held, rest).unwrap();
    assert_eq!((answer.status, answer.is_last()), (202, true));
    assert!(server.ended().success());
}

/// A stop takes 10 s at the most; the rest is for a busy machine.
const STOPPED_WITHIN: Duration = Duration::from_secs(20);

#[tokio::test]
async fn who_sends_a_body_without_end_keeps_no_server_from_stopping() {
    let mut server = Server::start(Setup::clerk());
    server.get(ADA, "me").await.data(200);
    let mut held = connect(&server).unwrap();
    let whole = post("videos/generate", "expect: 100-continue\r\n", &" ".repeat(1000));
    let (head, body) = whole.split_at(whole.len() - 1000);
    held.write_all(head.as_bytes()).unwrap();
    // From here on it is being answered: what has not got in is not waited for.
    let mut begun = [0; 25];
    held.read_exact(&mut begun).unwrap();
    assert_eq!(begun, *b"HTTP/1.1 100 Continue\r\n\r\n");
    held.write_all(&body.as_bytes()[..500]).unwrap();
    let process = Pid::from_raw(i32::try_from(server.process_id()).unwrap()).unwrap();
    server.send(Signal::TERM);

    let (ended, until_ended) = mpsc::channel::<()>();
    // Silence alone would end the request; its last byte is never sent.
    let sending = std::thread::spawn(move || {
        let told = Instant::now();
        while told.elapsed() < STOPPED_WITHIN {
            let pause = until_ended.recv_timeout(Duration::from_millis(500));
            if pause == Err(mpsc::RecvTimeoutError::Disconnected) {
                return held;
            }
            // Cut off, it has yet to end.
            let _ = held.write_all(b" ");
        }
        // Told to the test by how it ended.
        let _ = kill_process(process, Signal::KILL);
        held
    });
    let status = server.ended();
    drop(ended);
    let mut held = sending.join().unwrap();
    assert!(status.success(), "after {STOPPED_WITHIN:?} at the most: {status}");
    assert!(!matches!(held.read(&mut begun), Ok(1..)), "half a body was answered");
}

/// How the events of a job went on, up to one.
async fn story(server: &Server, job: &str, until: &str) -> Vec<(String, serde_json::Value)> {
    let mut events = server.events(ADA, &format!("jobs/{job}/events"), Some(0)).await;
    let mut story = Vec::new();
    let reading = async {
        loop {
            let event = events.next().await.expect("the stream goes on");
            let last = event.kind == until;
            story.push((event.kind, event.data["attempt"].clone()));
            if last {
                return;
            }
        }
    };
    tokio::time::timeout(PATIENCE, reading).await.expect("it comes");
    story
}

#[tokio::test]
async fn what_an_engine_was_doing_goes_on_at_once_after_a_restart_and_was_no_attempt() {
    let engine = "command:/bin/sh -c 'read -r job; sleep 1000'";
    let mut server = Server::start(Setup::clerk().with("T2M_ENGINE", engine));
    let begun = server.generate(ADA, "a pier").await;
    story(&server, &begun, "job.leased").await;
    let waiting = server.generate(ADA, "a lighthouse").await;
    assert!(server.stop().success());

    // Nothing is leased by it, and nothing was when the first engine had become free.
    let server = server.start_again_as(Setup::clerk());
    let shown = server.get(ADA, &format!("jobs/{begun}")).await.data(200);
    assert_eq!((&shown["state"], &shown["attempt"]), (&json!("queued"), &json!(0)), "{shown}");
    let shown = server.get(ADA, &format!("jobs/{waiting}")).await.data(200);
    assert_eq!((&shown["state"], &shown["attempt"]), (&json!("queued"), &json!(0)), "{shown}");

    let engine = Setup::clerk().with("T2M_ENGINE", "storyboard");
    let server = server.start_again_as(engine);
    let mut story = story(&server, &begun, "job.completed").await;
    story.retain(|(kind, _)| !matches!(kind.as_str(), "job.requested" | "job.progressed"));
    let expected = [("job.leased", 1), ("job.lease_expired", 0), ("job.leased", 1)];
    let expected = expected.map(|(kind, attempt)| (kind.to_owned(), json!(attempt)));
    assert_eq!(story[..3], expected, "{story:?}");
}
