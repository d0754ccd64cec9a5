//! Event streams: nothing is lost, nothing comes twice, and nobody sees what is another's.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::server::{Event, Events, Server, Setup, ask, claims, signed};

const JOBS: usize = 12;
const CUTS: usize = 100;
/// More events than all buffers between a server and a slow reader hold.
const SLOW: usize = 2000;
const WORKER: &str = "a-worker-token-of-the-tests";

#[tokio::test]
async fn a_stream_that_is_cut_after_each_event_goes_on_without_loss_or_repetition() {
    let server = Server::start(Setup::clerk());
    let asking = async {
        let mut positions = Vec::new();
        for number in 0..JOBS {
            server.generate("user_bob", "not for ada").await;
            let body = json!({ "prompt": format!("job {number}") });
            let answer = server.post("user_ada", "videos/generate", &body).await;
            positions.push(answer.position());
        }
        positions
    };
    let reading = async {
        let (mut after, mut seen) = (0, Vec::new());
        for _ in 0..JOBS {
            // Dropped at once: each event costs a connection.
            let mut events = server.events("user_ada", "events", Some(after)).await;
            let event = events.next().await.expect("the stream stays open");
            after = event.id;
            seen.push(event.id);
        }
        seen
    };
    let (asked, seen) = tokio::join!(asking, reading);
    assert_eq!(seen, asked);
    assert_eq!(read(&server, "user_ada", 0, JOBS).await, asked, "in one piece");
}

#[tokio::test]
async fn nobody_sees_the_events_of_another_user() {
    let server = Server::start(Setup::clerk());
    let of_bob = server.generate("user_bob", "for bob").await;
    let of_ada = server.generate("user_ada", "for ada").await;
    server.post("user_bob", &format!("jobs/{of_bob}/cancel"), &json!({})).await.data(200);
    server.post("user_ada", &format!("jobs/{of_ada}/cancel"), &json!({})).await.data(200);
    for (user, job_id) in [("user_ada", of_ada), ("user_bob", of_bob)] {
        let mut events = server.events(user, "events", Some(0)).await;
        for _ in 0..2 {
            let Event { data, .. } = events.next().await.expect("the stream stays open");
            assert_eq!(data["job_id"], job_id);
        }
    }
}

#[tokio::test]
async fn a_stream_without_a_position_begins_with_what_comes_next() {
    let server = Server::start(Setup::clerk());
    server.generate("user_ada", "before").await;
    let mut events = server.events("user_ada", "events", None).await;
    let after = server.generate("user_ada", "after").await;
    let event = events.next().await.expect("the stream stays open");
    assert_eq!((event.kind.as_str(), &event.data["job_id"]), ("job.requested", &json!(after)));
}

#[tokio::test]
async fn a_stream_that_is_cut_before_its_first_event_goes_on_without_loss() {
    let server = Server::start(Setup::clerk());
    let before = server.generate("user_ada", "before").await;
    let of_job = server.events("user_ada", &format!("jobs/{before}/events"), None).await;
    assert_eq!(of_job.greeted().await.last_id, None, "it begins at the beginning anyway");
    let of_user = server.events("user_ada", "events", None).await.greeted().await.last_id;
    assert!(of_user.is_some());
    let meanwhile = server.generate("user_ada", "meanwhile").await;
    let mut events = server.events("user_ada", "events", of_user).await;
    let event = events.next().await.expect("the stream stays open");
    assert_eq!((event.kind.as_str(), &event.data["job_id"]), ("job.requested", &json!(meanwhile)));
}

#[tokio::test]
async fn who_goes_on_from_beyond_the_logs_end_is_told_to_read_again_and_hears_what_comes() {
    let server = Server::start(Setup::clerk());
    let before = server.generate("user_ada", "before").await;
    let end = server.log_position().await;
    let of_job = format!("jobs/{before}/events");
    let (mut of_user, mut of_job) = tokio::join!(
        server.events("user_ada", "events", Some(end + 1000)),
        server.events("user_ada", &of_job, Some(u64::MAX)),
    );
    let next = async |events: &mut Events| events.next().await.expect("the stream stays open");
    let reset = next(&mut of_user).await;
    assert_eq!((reset.kind.as_str(), reset.data), ("reset", json!({ "type": "reset" })));
    assert!(reset.id <= server.log_position().await);
    let after = server.generate("user_ada", "after").await;
    let event = next(&mut of_user).await;
    assert_eq!((event.kind.as_str(), &event.data["job_id"]), ("job.requested", &json!(after)));

    let reset = next(&mut of_job).await;
    assert_eq!((reset.kind.as_str(), reset.id), ("reset", 0), "as at first: from its beginning");
    assert_eq!(next(&mut of_job).await.data["job_id"], json!(before));
}

#[tokio::test]
async fn who_goes_on_from_what_is_just_being_written_waits_for_it() {
    let server = Server::start(Setup::clerk());
    let end = server.log_position().await;
    let (mut events, job) = tokio::join!(
        server.events("user_ada", "events", Some(end + 1)),
        server.generate("user_ada", "now"),
    );
    server.post("user_ada", &format!("jobs/{job}/cancel"), &json!({})).await.data(200);
    let event = events.next().await.expect("the stream stays open");
    assert_ne!(event.kind, "reset");
}

#[tokio::test]
async fn a_stream_that_is_cut_a_hundred_times_tells_a_job_exactly_as_one_that_is_not() {
    let server = Server::start(Setup::clerk().with("T2M_WORKER_TOKENS", WORKER));
    let job = server.generate("user_ada", "a lighthouse").await;
    let of_job = format!("jobs/{job}/events");
    let (of_job_cut, of_user_cut, ()) = tokio::join!(
        read_in_pieces(&server, &of_job),
        read_in_pieces(&server, "events"),
        work(&server),
    );
    let whole = read_on(&server, &of_job, 0).await;
    assert!(whole.len() > CUTS, "too few to cut: {}", whole.len());
    assert_eq!(of_job_cut, whole);
    assert_eq!(of_user_cut, whole);
}

/// A worker that reports each percent of a job and then gives up for good.
async fn work(server: &Server) {
    let post = async |path: &str, body: Value| {
        let request = server.request(Method::POST, &format!("worker/{path}"));
        ask(request.bearer_auth(WORKER).json(&body)).await.data(200)
    };
    let leased = post("lease", json!({ "worker_id": "w", "kinds": ["video"] })).await;
    let (job, lease) = (leased["job_id"].as_str().unwrap(), &leased["lease_id"]);
    for percent in 1..=99 {
        let body = json!({ "lease_id": lease, "progress": percent });
        post(&format!("jobs/{job}/progress"), body).await;
    }
    let body = json!({ "lease_id": lease, "error": "enough", "retryable": false });
    post(&format!("jobs/{job}/fail"), body).await;
}

/// All events of a job over connections that end after none, one or two of them.
async fn read_in_pieces(server: &Server, path: &str) -> Vec<Event> {
    let mut seen: Vec<Event> = Vec::new();
    let last = |seen: &[Event]| seen.last().map_or(0, |event| event.id);
    for cut in 0..CUTS {
        let mut events = server.events("user_ada", path, Some(last(&seen))).await;
        for _ in 0..cut % 3 {
            seen.push(events.next().await.expect("the stream stays open"));
        }
    }
    let rest = read_on(server, path, last(&seen)).await;
    seen.extend(rest);
    seen
}

/// The events after a position until a job has failed, over one connection.
async fn read_on(server: &Server, path: &str, after: u64) -> Vec<Event> {
    let mut events = server.events("user_ada", path, Some(after)).await;
    let mut seen: Vec<Event> = Vec::new();
    while seen.last().is_none_or(|event| event.kind != "job.failed") {
        seen.push(events.next().await.expect("the stream stays open"));
    }
    seen
}

#[tokio::test]
async fn a_user_has_so_many_streams_and_no_more_until_one_of_them_ends() {
    let server = Server::start(Setup::clerk().with("T2M_STREAMS_PER_USER", "2"));
    let job = server.generate("user_ada", "a lighthouse").await;
    let one = server.events("user_ada", "events", None).await;
    let _two = server.events("user_ada", &format!("jobs/{job}/events"), None).await;
    let refused = server.get("user_ada", "events").await;
    refused.assert_refused(429, "too_many_streams");
    assert_eq!(refused.body["detail"]["limit"], 2);
    assert_eq!(refused.header("retry-after"), "15");
    server.events("user_bob", "events", None).await;

    drop(one);
    opens(&server).await;
}

/// Asks until ada may open a stream.
async fn opens(server: &Server) {
    let opened = async {
        loop {
            let request = server.request_of("user_ada", Method::GET, "events");
            if request.send().await.unwrap().status() == 200 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    // Sooner than the heartbeat, at which a dead connection would be noticed anyway.
    tokio::time::timeout(Duration::from_secs(10), opened).await.expect("no stream was let go");
}

#[tokio::test]
async fn a_reader_that_takes_nothing_is_dropped_and_goes_on_from_what_it_has() {
    let setup = Setup::clerk().with("T2M_STREAMS_PER_USER", "1").with("T2M_STALLED_S", "1");
    let server = Server::start(setup);
    for number in 0..SLOW / 100 {
        generate_a_hundred(&server, number).await;
    }
    let mut slow = connect_with_small_buffer(&server).await;
    server.get("user_ada", "events").await.assert_refused(429, "too_many_streams");
    opens(&server).await;

    let mut taken = Vec::new();
    // What the kernel had taken for it; then the connection turns out to be gone.
    let _ = slow.read_to_end(&mut taken).await;
    let taken = String::from_utf8_lossy(&taken);
    // The last frame may be cut short.
    let whole = taken.rsplit_once("\n\n").expect("it took something").0;
    let ids: Vec<u64> = whole
        .lines()
        .filter_map(|line| line.strip_prefix("id: "))
        .map(|id| id.parse().unwrap())
        .collect();
    let last = *ids.last().expect("it took an event");
    assert!(ids.len() < SLOW, "all of it fitted the buffers: nothing was shown");
    let rest = read(&server, "user_ada", last, SLOW - ids.len()).await;
    opens(&server).await;
    let all = read(&server, "user_ada", 0, SLOW).await;
    assert_eq!([ids, rest].concat(), all);
}

async fn generate_a_hundred(server: &Server, number: usize) {
    let mut premium = claims("user_ada");
    premium["subscription_tier"] = json!("premium");
    let jobs: Vec<Value> = (0..100).map(|n| json!({ "prompt": format!("number {n}") })).collect();
    let attempt = async || {
        let request = server.request(Method::POST, "videos/batch").bearer_auth(signed(&premium));
        let request = request.header("idempotency-key", format!("batch-{number}"));
        ask(request.json(&json!({ "jobs": jobs }))).await
    };
    // A busy machine may need longer than the server waits to see what it wrote.
    let mut answer = attempt().await;
    while answer.status == 503 {
        answer = attempt().await;
    }
    answer.data(202);
}

/// Opens ada's stream from the beginning and takes its head alone.
async fn connect_with_small_buffer(server: &Server) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let address = server.address.strip_prefix("http://").unwrap().parse().unwrap();
    let mut stream = socket.connect(address).await.unwrap();
    let token = signed(&claims("user_ada"));
    let head = format!(
        "GET /api/v1/events HTTP/1.1\r\nhost: t2m\r\nlast-event-id: 0\r\n\
         authorization: Bearer {token}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut first = [0; 15];
    stream.read_exact(&mut first).await.unwrap();
    assert_eq!(&first, b"HTTP/1.1 200 OK");
    stream
}

#[tokio::test]
async fn a_silent_stream_has_its_heartbeat_whatever_else_happens_to_its_user() {
    let server = Server::start(Setup::clerk());
    let job = server.generate("user_ada", "waits").await;
    let path = format!("jobs/{job}/events");
    let request = server.request_of("user_ada", Method::GET, &path);
    let mut response = request.send().await.unwrap();
    let beating = async {
        let mut text = String::new();
        while !text.contains(": heartbeat\n\n") {
            let chunk = response.chunk().await.unwrap().expect("the stream stays open");
            text.push_str(std::str::from_utf8(&chunk).unwrap());
        }
    };
    let disturbing = async {
        loop {
            server.generate("user_ada", "something else").await;
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    };
    tokio::select! {
        () = beating => {}
        () = disturbing => {}
        () = tokio::time::sleep(Duration::from_secs(40)) => panic!("no heartbeat"),
    }
}

/// The ids of the first events after a position, over one connection.
async fn read(server: &Server, user: &str, after: u64, count: usize) -> Vec<u64> {
    let mut events = server.events_when_free(user, "events", Some(after)).await;
    let mut ids = Vec::new();
    while ids.len() < count {
        ids.push(events.next().await.expect("the stream stays open").id);
    }
    ids
}
