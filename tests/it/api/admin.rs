//! What administrators decide about users.

use reqwest::Method;
use serde_json::{Value, json};

use super::clerk_user;
use crate::server::{Answer, Server, Setup, ask, claims, now, session_of, signed};

const ADA: &str = "user_ada";
const NOBODY: &str = "user_nobody";

async fn as_admin(server: &Server, method: Method, path: &str, body: Option<&Value>) -> Answer {
    let mut claims = claims("user_boss");
    claims["role"] = json!("admin");
    let request = server.request(method, path).bearer_auth(signed(&claims));
    ask(match body {
        Some(body) => request.json(body),
        None => request,
    })
    .await
}

async fn organization(server: &Server, user: &str, body: &Value) -> Answer {
    let path = format!("admin/users/{user}/organization");
    as_admin(server, Method::PUT, &path, Some(body)).await
}

#[tokio::test]
async fn an_administrator_sets_type_and_organization_of_a_user_and_the_user_sees_it() {
    let server = Server::start(Setup::clerk());
    server.get(ADA, "me").await.data(200);
    let body = json!({
        "userType": "vendor_company", "organizationId": "org_456",
        "organizationName": "Acme Corp", "organizationRole": "ORG_OWNER",
    });
    let set = organization(&server, ADA, &body).await;
    let end = set.position();
    let set = set.data(200);
    assert_eq!(set["user_type"], "vendor_company");
    let joined = &set["organizations"][0];
    assert_eq!(joined["organization_id"], "org_456");
    assert_eq!((&joined["name"], &joined["role"]), (&json!("Acme Corp"), &json!("ORG_OWNER")));

    assert_eq!(organization(&server, ADA, &body).await.data(200), set);
    assert_eq!(server.log_position().await, end, "the same again was recorded");
    let me = server.get(ADA, "me").await.data(200);
    assert_eq!(
        (&me["user_type"], &me["organizations"]),
        (&set["user_type"], &set["organizations"])
    );

    let left = organization(&server, ADA, &json!({ "organization_id": null })).await.data(200);
    assert_eq!((&left["organizations"], &left["user_type"]), (&json!([]), &set["user_type"]));
}

#[tokio::test]
async fn an_organization_that_makes_no_sense_changes_nothing() {
    let server = Server::start(Setup::clerk());
    server.get(ADA, "me").await.data(200);
    organization(&server, ADA, &json!({})).await.data(200);
    let end = server.log_position().await;
    let table = [
        (json!({ "organization_id": "org_1" }), "organization_role"),
        (json!({ "organization_role": "member" }), "organization_id"),
        (json!({ "organization_id": null, "organization_name": "x" }), "organization_id"),
        (json!({ "organization_id": 5, "organization_role": "member" }), "organization_id"),
        (json!({ "user_type": "" }), "user_type"),
    ];
    for (body, field) in table {
        let answer = organization(&server, ADA, &body).await;
        answer.assert_refused(422, "validation_failed");
        assert!(answer.body["detail"]["fields"][field].is_string(), "{body}: {}", answer.body);
    }
    let good = json!({ "user_type": "freelancer" });
    for user in [NOBODY, "no%2fid"] {
        organization(&server, user, &good).await.assert_refused(404, "not_found");
    }
    assert_eq!(server.log_position().await, end);
}

#[tokio::test]
async fn a_session_that_an_administrator_ends_is_refused_on_its_very_next_request() {
    let server = Server::start(Setup::clerk());
    server.get(ADA, "me").await.data(200);
    server.get("user_bob", "me").await.data(200);
    let sessions = format!("admin/users/{ADA}/sessions");
    let listed = as_admin(&server, Method::GET, &sessions, None).await.data(200);
    assert_eq!(listed["items"][0]["session_id"], session_of(ADA));
    assert_eq!(listed["items"][0]["current"], false);
    assert_eq!(listed["items"][0]["ip_address"], "127.0.0.1");

    let of = |user: &str, session: &str| format!("admin/users/{user}/sessions/{session}");
    let not_there = [of(ADA, &session_of("user_bob")), of(ADA, "sess_x"), of(NOBODY, "sess_x")];
    for path in not_there {
        let answer = as_admin(&server, Method::DELETE, &path, None).await;
        answer.assert_refused(404, "not_found");
    }
    let nobodys = format!("admin/users/{NOBODY}/sessions");
    as_admin(&server, Method::GET, &nobodys, None).await.assert_refused(404, "not_found");

    let path = of(ADA, &session_of(ADA));
    as_admin(&server, Method::DELETE, &path, None).await.data(200);
    let refused = server.get(ADA, "me").await;
    refused.assert_refused(401, "session_ended");
    assert_eq!(refused.body["detail"]["reason"], "revoked");
    let end = server.log_position().await;
    as_admin(&server, Method::DELETE, &path, None).await.data(200);
    assert_eq!(server.log_position().await, end, "it ended twice");
    server.get("user_bob", "me").await.data(200);
}

#[tokio::test]
async fn a_user_may_end_the_session_it_asks_from_under_either_name() {
    let server = Server::start(Setup::clerk());
    for (user, path) in [("user_a", "sessions/current"), ("user_b", "sessions/sess_user_b")] {
        server.get(user, "me").await.data(200);
        server.delete(user, path).await.data(200);
        server.get(user, "me").await.assert_refused(401, "session_ended");
    }
}

#[tokio::test]
async fn access_that_is_taken_away_is_gone_for_tokens_that_still_claim_it() {
    let server = Server::start(Setup::clerk());
    server.deliver("user.created", &clerk_user(ADA, 1_767_225_600_000)).await.data(200);
    let batch = json!({ "jobs": [{ "prompt": "a" }] });
    server.post(ADA, "videos/batch", &batch).await.data(202);
    let path = format!("admin/users/{ADA}/access");
    let body = json!({ "subscription_tier": "standard" });
    as_admin(&server, Method::PUT, &path, Some(&body)).await.data(200);
    let refused = server.post(ADA, "videos/batch", &batch).await;
    refused.assert_refused(403, "premium_required");
    assert_eq!(refused.body["detail"]["subscription_tier"], "standard");

    // Clerk has not heard of it, so that its next token claims it still.
    let mut claims = claims(ADA);
    claims["subscription_tier"] = json!("premium");
    claims["role"] = json!("admin");
    claims["iat"] = json!(now() + 4);
    let request = server.request(Method::POST, "videos/batch").bearer_auth(signed(&claims));
    ask(request.json(&batch)).await.assert_refused(403, "premium_required");
}

#[tokio::test]
async fn what_is_used_is_told_to_administrators_of_all_and_to_users_of_themselves() {
    let server = Server::start(Setup::clerk());
    let job = server.generate(ADA, "a lighthouse").await;
    server.generate(ADA, "a pier").await;
    server.generate("user_bob", "a boat").await;
    server.upload(ADA, "notes.txt", "hello").await;
    server.post(ADA, &format!("jobs/{job}/cancel"), &json!({})).await.data(200);

    let told = as_admin(&server, Method::GET, "admin/analytics", None).await.data(200);
    let users = json!({ "total": 3, "active_1d": 3, "active_7d": 3, "active_30d": 3 });
    assert_eq!(told["users"], users, "ada, bob and the administrator");
    let jobs = json!({ "by_state": { "cancelled": 1, "queued": 2 }, "failures": {} });
    assert_eq!(told["jobs"], jobs);
    assert_eq!((&told["files"], &told["bytes_stored"]), (&json!(1), &json!(5)));
    let (days, months) = (told["days"].as_array().unwrap(), told["months"].as_array().unwrap());
    assert_eq!((days.len(), months.len()), (30, 12));
    // Midnight may have passed since the first job.
    let of_days: u64 = days.iter().map(|day| day["jobs"].as_u64().unwrap()).sum();
    let of_months: u64 = months.iter().map(|month| month["jobs"].as_u64().unwrap()).sum();
    assert_eq!((of_days, of_months), (3, 3));
    let as_of = told["as_of"].as_str().unwrap();
    let last = (days[29]["day"].as_str().unwrap(), months[11]["month"].as_str().unwrap());
    assert_eq!(last, (&as_of[..10], &as_of[..7]));

    let usage = &server.get(ADA, "me").await.data(200)["usage"];
    assert_eq!(usage["jobs"], json!({ "cancelled": 1, "queued": 1 }));
    assert_eq!((&usage["files"], &usage["bytes_stored"]), (&json!(1), &json!(5)));
    let months = usage["months"].as_array().unwrap();
    assert_eq!(months.iter().map(|month| month["jobs"].as_u64().unwrap()).sum::<u64>(), 2);
    assert_eq!(months.iter().map(|month| month["cancelled"].as_u64().unwrap()).sum::<u64>(), 1);
    assert!(server.get(ADA, "me").await.data(200)["usage"]["seconds_rendered"] == 0.0);
}
