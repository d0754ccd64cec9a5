//! Event streams: nothing is lost, nothing comes twice, and nobody sees what is another's.

use serde_json::json;

use crate::server::{Event, Server, Setup};

const JOBS: usize = 12;

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

/// The ids of the first events after a position, over one connection.
async fn read(server: &Server, user: &str, after: u64, count: usize) -> Vec<u64> {
    let mut events = server.events(user, "events", Some(after)).await;
    let mut ids = Vec::new();
    while ids.len() < count {
        ids.push(events.next().await.expect("the stream stays open").id);
    }
    ids
}
