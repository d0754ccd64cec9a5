//! Deliveries that are genuine and of no use: kept, shown, retried and forgotten.

use std::path::PathBuf;
use std::process::Output;

use reqwest::Method;
use serde_json::{Value, json};

use super::clerk_user;
use crate::server::{Answer, Server, Setup, WEBHOOK_SECRET, ask, claims, now, signed};
use t2m::clerk::webhook;

const ADA: &str = "user_ada";

fn folder(server: &Server) -> PathBuf {
    server.data_dir().join("blobs/dead-letters")
}

fn files(server: &Server) -> usize {
    std::fs::read_dir(folder(server)).map_or(0, Iterator::count)
}

/// A signed delivery of any bytes.
async fn deliver_raw(server: &Server, id: &str, body: &[u8]) -> Answer {
    let at = now();
    let signature = webhook::sign(WEBHOOK_SECRET, id, at, body).unwrap();
    let request = server.request(Method::POST, "webhooks/clerk");
    let request = request.header("svix-id", id).header("svix-timestamp", at);
    ask(request.header("svix-signature", signature).body(body.to_vec())).await
}

async fn as_admin(server: &Server, method: Method, path: &str) -> Answer {
    let mut claims = claims("user_admin");
    claims["role"] = json!("admin");
    ask(server.request(method, path).bearer_auth(signed(&claims))).await
}

fn said(output: &Output) -> (Option<i32>, String) {
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    (output.status.code(), String::from_utf8(text).unwrap())
}

/// As an older version left it, which could not use what this one can.
fn plant(server: &Server, id: &str, user: &str) {
    let body = json!({ "type": "user.created", "data": clerk_user(user, 1_767_225_600_000) });
    let letter = json!({
        "message_id": id, "received_at": "2026-01-01T00:00:00Z", "type": "user.created",
        "reason": "an older version", "body": body.to_string(),
    });
    std::fs::create_dir_all(folder(server)).unwrap();
    std::fs::write(folder(server).join(format!("{id}.json")), letter.to_string()).unwrap();
}

#[tokio::test]
async fn an_unusable_delivery_is_acknowledged_once_it_is_kept_and_kept_once() {
    let server = Server::start(Setup::clerk());
    let body = br#"{"type":"user.created","data":{"first_name":"Zo\u00eb"}}"#;
    for _ in 0..2 {
        let answer = deliver_raw(&server, "msg_1", body).await.data(200);
        assert_eq!(answer["outcome"], "unusable");
    }
    deliver_raw(&server, "msg_2", b"not JSON \x1b[2J \xff").await.data(200);
    assert_eq!(server.log_position().await, 0, "it is in the log");

    let (code, listed) = said(&server.run(&["webhooks", "dead"]));
    let lines: Vec<&str> = listed.lines().collect();
    assert_eq!((code, lines.len()), (Some(0), 2), "{listed}");
    assert!(lines[0].starts_with("msg_2  20") && lines[0].contains("  -  "), "{listed}");
    assert!(lines[1].ends_with("Z  user.created  the data of user.created names no user"));
    let (_, shown) = said(&server.run(&["webhooks", "dead", "show", "msg_1"]));
    assert!(shown.ends_with(&format!("\n{}\n", String::from_utf8_lossy(body))), "{shown}");
    let (_, shown) = said(&server.run(&["webhooks", "dead", "show", "msg_2"]));
    assert!(shown.ends_with("not JSON \\u{1b}[2J \u{fffd}\n"), "{shown}");
    let (code, missing) = said(&server.run(&["webhooks", "dead", "show", "msg_3"]));
    assert_eq!((code, missing.trim()), (Some(1), "t2m: there is no dead letter msg_3"));

    let (code, gone) = said(&server.run(&["webhooks", "dead", "discard", "--all"]));
    assert_eq!((code, gone.trim(), files(&server)), (Some(0), "discarded 2", 0));
}

#[tokio::test]
async fn what_is_unknown_or_may_carry_a_code_is_never_kept() {
    let server = Server::start(Setup::clerk());
    let bodies: [&[u8]; 5] = [
        br#"{"type":"future.thing","data":{"id":7}}"#,
        br#"{"type":"email.created","data":{"otp_code":"424242"}}"#,
        br#"{"type":"sms.created","data":7}"#,
        br#"{"type":"email.created","data":{"otp_code":"424242""#,
        br#"{"type":"sms\u002ecreated","type":"x","data":"424242"}"#,
    ];
    for (index, body) in bodies.iter().enumerate() {
        deliver_raw(&server, &format!("msg_{index}"), body).await.data(200);
    }
    assert_eq!((files(&server), server.log_position().await), (0, 0));
}

#[tokio::test]
async fn a_usable_redelivery_settles_the_letter_also_after_a_restart() {
    let server = Server::start(Setup::clerk());
    deliver_raw(&server, "msg_1", b"{").await.data(200);
    deliver_raw(&server, "msg_2", b"{").await.data(200);
    let good = server.delivery("msg_1", "user.created", &clerk_user(ADA, 1_767_225_600_000));
    assert_eq!(ask(good).await.data(200)["outcome"], "recorded");
    assert_eq!(files(&server), 1);
    let server = server.start_again();
    ask(server.delivery("msg_2", "future.thing", &json!({}))).await.data(200);
    assert_eq!(files(&server), 0);
}

#[tokio::test]
async fn what_can_neither_be_used_nor_kept_is_to_be_sent_again() {
    let server = Server::start(Setup::clerk());
    std::fs::write(folder(&server), "in the way").unwrap();
    let refused = deliver_raw(&server, "msg_1", b"{").await;
    refused.assert_refused(503, "storage_unavailable");
    assert!(!refused.header("retry-after").is_empty());
    std::fs::remove_file(folder(&server)).unwrap();
    deliver_raw(&server, "msg_1", b"{").await.data(200);
    assert_eq!(files(&server), 1);
}

#[tokio::test]
async fn the_command_line_delivers_letters_to_the_running_server_again() {
    let server = Server::start(Setup::clerk());
    plant(&server, "msg_good", ADA);
    deliver_raw(&server, "msg_bad", b"{").await.data(200);
    let at = ["--server", server.address.as_str()];

    let retry = [&["webhooks", "dead", "retry", "--all"][..], &at].concat();
    let (code, text) = said(&server.run(&retry));
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("msg_good  recorded") && text.contains("msg_bad  unusable"), "{text}");
    assert!(text.contains("1 of 2 are still unusable"), "{text}");
    assert_eq!(files(&server), 1);
    assert_eq!(server.get(ADA, "me").await.data(200)["user"]["first_name"], "Ada");

    plant(&server, "msg_again", ADA);
    let retry = [&["webhooks", "dead", "retry", "msg_again"][..], &at].concat();
    let (code, text) = said(&server.run(&retry));
    assert_eq!((code, text.trim()), (Some(0), "msg_again  unchanged"));
    assert_eq!(files(&server), 1);
    plant(&server, "msg_again", ADA);
    let (_, text) = said(&server.run(&[&retry[..], &["--json"]].concat()));
    let parsed: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(parsed, json!({ "message_id": "msg_again", "outcome": "unchanged" }));
    let (_, text) = said(&server.run(&["webhooks", "dead", "discard", "--all", "--json"]));
    assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), json!({ "discarded": 1 }));
}

#[tokio::test]
async fn a_retry_that_cannot_begin_says_why() {
    let mut server = Server::start(Setup::clerk());
    deliver_raw(&server, "msg_1", b"{").await.data(200);
    let retry = |setup: Setup, rest: &[&str]| {
        let arguments = [&["webhooks", "dead", "retry"][..], rest].concat();
        said(&setup.run(server.data_dir(), &arguments))
    };
    let (code, text) = retry(Setup::clerk(), &["--all"]);
    assert!(code == Some(2) && text.contains("T2M_LISTEN") && text.contains("--server"), "{text}");
    let to = ["--all", "--server", server.address.as_str()];
    let (code, text) = retry(Setup::development(), &to);
    assert!(code == Some(2) && text.contains("CLERK_WEBHOOK_SECRET"), "{text}");
    let (code, text) = retry(Setup::clerk().with("CLERK_WEBHOOK_SECRET", "hunter2"), &to);
    assert!(code == Some(2) && text.contains("secret 1") && !text.contains("hunter2"), "{text}");
    let (code, text) = retry(Setup::clerk().with("PUBLIC_URL", "nonsense"), &["--all"]);
    assert!(code == Some(2) && text.contains("PUBLIC_URL"), "{text}");
    let address = server.address.clone();
    server.kill();
    let (code, text) = said(
        &Setup::clerk()
            .with("PUBLIC_URL", address.clone())
            .run(server.data_dir(), &["webhooks", "dead", "retry", "msg_1"]),
    );
    let expected = format!("no server answers at {address}");
    assert!(code == Some(1) && text.contains(&expected), "{text}");
    assert_eq!(files(&server), 1);
}

#[tokio::test]
async fn administrators_list_retry_and_discard_letters_and_nobody_else() {
    let server = Server::start(Setup::clerk());
    for id in ["msg_1", "msg_2", "msg/3"] {
        deliver_raw(&server, id, br#"{"type":"session.created","data":{}}"#).await.data(200);
    }
    plant(&server, "msg_4", ADA);
    let denied = server.get(ADA, "admin/webhooks/dead").await;
    denied.assert_refused(403, "role_required");

    let (mut seen, mut cursor): (Vec<Value>, _) = (vec![], String::new());
    loop {
        let path = format!("admin/webhooks/dead?limit=3{cursor}");
        let page = as_admin(&server, Method::GET, &path).await.data(200);
        seen.extend(page["items"].as_array().unwrap().clone());
        let Some(next) = page["next_cursor"].as_str() else { break };
        cursor = format!("&cursor={next}");
    }
    let ids: Vec<&Value> = seen.iter().map(|item| &item["message_id"]).collect();
    assert_eq!(ids, ["msg_4", "msg/3", "msg_2", "msg_1"]);
    assert_eq!(seen[1]["type"], "session.created");
    assert_eq!(seen[1]["reason"], "the data of session.created names no session");
    assert!(seen.iter().all(|item| item.get("body").is_none()), "{seen:?}");
    let bad = as_admin(&server, Method::GET, "admin/webhooks/dead?cursor=x").await;
    bad.assert_refused(422, "validation_failed");

    let retried = as_admin(&server, Method::POST, "admin/webhooks/dead/msg_4/retry").await;
    assert!(retried.position() > 0);
    assert_eq!(retried.data(200)["outcome"], "recorded");
    let again = as_admin(&server, Method::POST, "admin/webhooks/dead/msg_4/retry").await;
    again.assert_refused(404, "not_found");
    let unusable = as_admin(&server, Method::POST, "admin/webhooks/dead/msg_1/retry").await;
    unusable.assert_refused(409, "conflict");
    assert_eq!(unusable.body["detail"]["reason"], seen[1]["reason"]);
    let deleted = as_admin(&server, Method::DELETE, "admin/webhooks/dead/msg%2F3").await.data(200);
    assert_eq!(deleted, json!({ "message_id": "msg/3", "deleted": true }));
    as_admin(&server, Method::DELETE, "admin/webhooks/dead/msg%2F3")
        .await
        .assert_refused(404, "not_found");
    assert_eq!(files(&server), 2);
}
