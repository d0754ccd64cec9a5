//! What a client that wanders between nodes sees: its own writes, the end of its session, and its
//! events in one piece.

use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};

use super::{ADA, Cluster, NODES, as_admin, call, lease, text};
use crate::server::{Event, Server, ask, claims, session_of, signed};

#[tokio::test]
async fn a_read_that_names_a_position_waits_at_another_node_until_it_is_there() {
    let cluster = Cluster::start().await;
    let with = |node: &Server, path: &str, position: u64| {
        node.request_of(ADA, Method::GET, path).header("x-log-position", position)
    };
    for number in 0..60 {
        let body = json!({ "prompt": format!("picture {number}") });
        let answer = cluster.node(number).post(ADA, "videos/generate", &body).await;
        let position = answer.position();
        let job = text(&answer.data(202), "job_id");
        let read = ask(with(cluster.node(number + 1), &format!("jobs/{job}"), position)).await;
        assert_eq!(read.data(200)["prompt"], body["prompt"]);
        let listed = ask(with(cluster.node(number + 2), "jobs?limit=1", position)).await;
        assert_eq!(listed.data(200)["items"][0]["job_id"], job);
    }
    // What is said of the caller itself is of that position, too.
    for number in 0..20 {
        let (path, role) = (format!("admin/users/{ADA}/access"), ["editor", "creator"][number % 2]);
        let body = json!({ "role": role });
        let changed = as_admin(cluster.node(number), Method::PUT, &path, Some(&body)).await;
        let position = changed.position();
        changed.data(200);
        let me = ask(with(cluster.node(number + 1), "me", position)).await.data(200);
        assert_eq!(me["role"], role);
    }
    // Asked before it is written, it is answered when it is.
    let end = cluster.caught_up().await;
    let early = tokio::spawn(ask(with(cluster.node(1), "me", end + 1)));
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!early.is_finished(), "it did not wait");
    cluster.node(0).generate(ADA, "a pier").await;
    assert_eq!(early.await.unwrap().data(200)["usage"]["jobs"]["queued"], 61);
    // What nobody writes is not waited for for ever.
    let began = Instant::now();
    let never = ask(with(cluster.node(2), "me", end + 1000)).await;
    never.assert_refused(503, "not_caught_up");
    assert!(!never.header("retry-after").is_empty());
    assert!((Duration::from_secs(1)..Duration::from_secs(4)).contains(&began.elapsed()));
}

/// How long another node let a session in after it was ended at one.
async fn refused_after(node: &Server, user: &str, began: Instant) -> Duration {
    loop {
        let answer = node.get(user, "me").await;
        if answer.status == 401 {
            answer.assert_refused(401, "session_ended");
            return began.elapsed();
        }
        answer.data(200);
        assert!(began.elapsed() < Duration::from_secs(10), "the session lives on");
    }
}

#[tokio::test]
async fn a_session_that_is_ended_at_one_node_is_refused_at_the_others_within_a_second() {
    let cluster = Cluster::start().await;
    let clerk = |user: &str, status: &str| {
        let now = crate::server::now() * 1000;
        json!({
            "id": session_of(user), "object": "session", "user_id": user, "status": status,
            "created_at": now, "updated_at": now, "expire_at": now + 7 * 24 * 3_600_000,
        })
    };
    let mut worst = Duration::ZERO;
    for (round, how) in
        ["revoked", "ended", "sign-out", "administrator", "banned", "deleted"].iter().enumerate()
    {
        let user = format!("user_{round}");
        for node in &cluster.nodes {
            node.get(&user, "me").await.data(200);
        }
        // A page that follows its events is told, too.
        let mut events = cluster.node(round + 1).events(&user, "events", None).await;
        let node = cluster.node(round);
        let path = format!("sessions/{}", session_of(&user));
        let answer = match *how {
            "revoked" => node.deliver("session.revoked", &clerk(&user, "revoked")).await,
            "ended" => node.deliver("session.ended", &clerk(&user, "ended")).await,
            "sign-out" => node.delete(&user, &path).await,
            "administrator" => {
                let path = format!("admin/users/{user}/{path}");
                as_admin(node, Method::DELETE, &path, None).await
            }
            "banned" => {
                let updated = crate::server::now() * 1000;
                let data = json!({ "id": user, "banned": true, "updated_at": updated });
                node.deliver("user.updated", &data).await
            }
            _ => node.deliver("user.deleted", &json!({ "id": user, "deleted": true })).await,
        };
        let began = Instant::now();
        answer.data(200);
        // It holds at the node that answered on the very next request.
        assert_eq!(node.get(&user, "me").await.status, 401, "{how}");
        for other in 1..NODES {
            let took = refused_after(cluster.node(round + other), &user, began).await;
            println!("{how}: refused at another node after {took:?}");
            worst = worst.max(took);
        }
        let ended = async { while events.next().await.is_some() {} };
        let ended = tokio::time::timeout(Duration::from_secs(1), ended).await;
        println!("{how}: the event stream ended after {:?}", began.elapsed());
        assert!(ended.is_ok(), "{how}: the event stream goes on");
    }
    println!("the longest: {worst:?}");
    assert!(worst < Duration::from_secs(1), "{worst:?}");
}

/// So many events of a stream, opened after a position.
async fn some(node: &Server, path: &str, after: Option<u64>, count: usize) -> Vec<Event> {
    let mut events = node.events_when_free(ADA, path, after).await;
    let mut seen = Vec::new();
    while seen.len() < count {
        seen.push(events.next().await.expect("the stream stays open"));
    }
    seen
}

#[tokio::test]
async fn an_event_stream_that_is_cut_goes_on_at_another_node_without_loss_or_repetition() {
    const JOBS: usize = 4;
    const TICKS: usize = 5;
    let cluster = Cluster::start().await;
    // A first event, so that there is a position to begin after.
    let first = cluster.node(0).generate(ADA, "the first").await;
    let began = cluster.caught_up().await;
    cluster.node(0).post(ADA, &format!("jobs/{first}/cancel"), &json!({})).await.data(200);
    let working = async {
        for number in 0..JOBS {
            let job = cluster.node(number).generate(ADA, "a lighthouse").await;
            let leased = lease(cluster.node(number + 1), "w", 10).await.expect("a job");
            assert_eq!(text(&leased, "job_id"), job);
            for tick in 0..TICKS {
                let body = json!({ "lease_id": leased["lease_id"], "progress": 10 * tick + 1 });
                let node = cluster.node(number + tick);
                ask(call(node, &format!("jobs/{job}/progress"), &body)).await.data(200);
            }
            let body = json!({ "lease_id": leased["lease_id"], "error": "no", "retryable": false });
            ask(call(cluster.node(number), &format!("jobs/{job}/fail"), &body)).await.data(200);
        }
    };
    // Before them the two of a cancellation.
    let of_job = ["requested", "leased", "attempt_failed", "failed"].len() + TICKS;
    let expected = 2 + JOBS * of_job;
    let reading = async {
        let (mut seen, mut after) = (Vec::<Event>::new(), began);
        while seen.len() < expected {
            // Cut after one, two or three events, and resumed at the next node.
            let count = (1 + seen.len() % 3).min(expected - seen.len());
            let more = some(cluster.node(seen.len()), "events", Some(after), count).await;
            after = more.last().expect("there are some").id;
            seen.extend(more);
        }
        seen
    };
    let ((), pieced) = tokio::join!(working, reading);
    cluster.caught_up().await;
    let mut whole = Vec::new();
    for node in &cluster.nodes {
        whole.push(some(node, "events", Some(began), expected).await);
    }
    assert!(whole.iter().all(|it| *it == whole[0]), "the nodes tell different stories");
    assert_eq!(pieced, whole[0]);
    assert!(pieced.is_sorted_by(|one, next| one.id < next.id));
    let ticks = pieced.iter().filter(|event| event.kind == "job.progressed").count();
    assert_eq!(ticks, JOBS * TICKS);
    let job = &pieced.last().expect("there are events").data["job_id"];
    let path = format!("jobs/{}/events", job.as_str().unwrap());
    let story = some(cluster.node(0), &path, None, of_job).await;
    for cut in 1..story.len() {
        let rest = some(cluster.node(cut), &path, Some(story[cut - 1].id), story.len() - cut).await;
        assert_eq!(rest, story[cut..], "cut after {cut}");
    }
}

/// What the README says: each node counts what it is asked itself.
#[tokio::test]
async fn each_node_counts_a_users_requests_for_itself() {
    const BUDGET: usize = 4;
    let cluster =
        Cluster::start_as(|setup| setup.with("RATE_LIMIT_WRITES", format!("{BUDGET}/366d"))).await;
    let body = json!({ "prompt": "a lighthouse" });
    for node in &cluster.nodes {
        for left in (0..BUDGET).rev() {
            let answer = node.post(ADA, "videos/generate", &body).await;
            assert_eq!(answer.header("x-ratelimit-remaining"), left.to_string());
            answer.data(202);
        }
        let refused = node.post(ADA, "videos/generate", &body).await;
        refused.assert_refused(429, "rate_limited");
        assert!(!refused.header("retry-after").is_empty());
    }
    cluster.caught_up().await;
    let me = cluster.node(0).get(ADA, "me").await.data(200);
    assert_eq!(me["usage"]["jobs"]["queued"], Value::from(NODES * BUDGET));
    let token = signed(&claims(ADA));
    let again = cluster.node(1).request(Method::POST, "videos/generate").bearer_auth(token);
    ask(again.json(&body)).await.assert_refused(429, "rate_limited");
}
