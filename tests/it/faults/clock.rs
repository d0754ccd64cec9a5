//! The machine's clock jumps by 400 days, forwards and back, while the server runs and across
//! restarts.

use std::path::Path;

use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};

use super::disk::library;
use super::{rounds, skip};
use crate::server::{LOG_FILE, Server, Setup, ask, claims, session_of, signed};

const ADA: &str = "user_ada";
/// Ends its session itself.
const EVE: &str = "user_eve";
/// Lets it run out, at the first jump.
const BOB: &str = "user_bob";
const DAY_S: i64 = 86_400;
/// In days from the true time.
const JUMPS: [i64; 6] = [400, 0, -400, 400, -400, 0];

#[tokio::test]
async fn the_clock_may_jump_and_nothing_comes_back_to_life() {
    let Some(faketime) = library("faketime/libfaketimeMT.so.1") else {
        return skip("a clock that jumps", "libfaketime is not installed");
    };
    let place = tempfile::tempdir().unwrap();
    let (offset, said) = (place.path().join("offset"), place.path().join("said"));
    set(&offset, 0);
    let setup = Setup::clerk()
        .with("LD_PRELOAD", faketime.to_string_lossy())
        .with("FAKETIME_TIMESTAMP_FILE", offset.to_string_lossy())
        .with("FAKETIME_NO_CACHE", "1")
        // As when an administrator sets the clock: what counts time since the start goes on.
        .with("FAKETIME_DONT_FAKE_MONOTONIC", "1")
        .with(LOG_FILE, said.to_string_lossy());
    let mut server = Server::start(setup);
    ask(at(&server, 0, EVE, Method::GET, "me")).await.data(200);
    ask(at(&server, 0, EVE, Method::DELETE, &format!("sessions/{}", session_of(EVE))))
        .await
        .data(200);
    ask(at(&server, 0, BOB, Method::GET, "me")).await.data(200);

    let (mut position, mut jobs) = (0, 0);
    for days in (0..rounds(1)).flat_map(|_| JUMPS) {
        set(&offset, days);
        for restarted in [false, true] {
            if restarted {
                server = server.start_again();
            }
            for gone in [EVE, BOB] {
                let answer = ask(at(&server, days, gone, Method::GET, "me")).await;
                answer.assert_refused(401, "session_ended");
            }
            let request = at(&server, days, ADA, Method::POST, "videos/generate");
            let job = ask(request.json(&json!({ "prompt": "a lighthouse" }))).await;
            assert!(job.position() > position, "{} after {position}", job.position());
            position = job.position();
            let job = job.data(202);
            let is = ask(at(
                &server,
                days,
                ADA,
                Method::GET,
                &format!("jobs/{}", job["job_id"].as_str().unwrap()),
            ));
            let told = is.await.data(200)["created_at"].as_str().unwrap().to_owned();
            let told = chrono::DateTime::parse_from_rfc3339(&told).unwrap().timestamp();
            let off = told - crate::server::now() - days * DAY_S;
            assert!(off.abs() < DAY_S, "the clock did not jump: {told} is off by {off} s");
            jobs += 1;
        }
    }
    let stats: Value = serde_json::from_str(&server.printed(&["log", "stats", "--json"])).unwrap();
    assert_eq!(stats["types"]["job.requested.v1"], jobs);
    let listed = ask(at(&server, 0, ADA, Method::GET, "jobs?limit=200")).await.data(200);
    assert_eq!(listed["items"].as_array().map(Vec::len), Some(jobs.min(200)));
    assert_eq!(std::fs::read_to_string(said).unwrap(), "", "it panicked, or worse");
    server.printed(&["log", "verify"]);
    let compared = server.printed(&["replay", "--diff"]);
    assert!(compared.contains("live and replayed alike"), "{compared}");
}

/// A request whose token is of the server's time.
fn at(server: &Server, days: i64, user: &str, method: Method, path: &str) -> RequestBuilder {
    let mut claims = claims(user);
    for time in ["iat", "nbf", "exp"] {
        claims[time] = json!(claims[time].as_i64().expect("seconds") + days * DAY_S);
    }
    server.request(method, path).bearer_auth(signed(&claims))
}

/// Moves the server's clock, in one step.
fn set(offset: &Path, days: i64) {
    let draft = offset.with_extension("draft");
    std::fs::write(&draft, format!("{days:+}d\n")).unwrap();
    std::fs::rename(draft, offset).unwrap();
}
