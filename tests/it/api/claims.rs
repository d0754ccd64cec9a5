//! Of a token and Clerk's webhook, which is believed.

use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use t2m::clock::Clock;
use t2m::log::{EmbeddedLog, EventLog, Expected, NewEvent};

use super::{clerk_session, clerk_user};
use crate::server::{Server, Setup, ask, claims, now, session_of, signed};

const ADA: &str = "user_ada";

fn token(more: &Value) -> String {
    let mut claims = claims(ADA);
    claims.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    signed(&claims)
}

fn asked(server: &Server, path: &str, token: &str) -> RequestBuilder {
    server.request(Method::GET, path).bearer_auth(token)
}

/// Ada at Clerk, with this metadata.
fn ada(metadata: Value, updated_at_ms: i64) -> Value {
    let mut user = clerk_user(ADA, updated_at_ms);
    user["public_metadata"] = metadata;
    user
}

#[tokio::test]
async fn a_creation_that_names_no_right_takes_none_from_the_token_that_came_before_it() {
    let server = Server::start(Setup::clerk());
    let token = token(&json!({ "role": "admin", "subscription_tier": "premium" }));
    ask(asked(&server, "me", &token)).await.data(200);
    server.deliver("user.created", &ada(json!({}), (now() - 60) * 1000)).await.data(200);
    let me = ask(asked(&server, "me", &token)).await.data(200);
    assert_eq!((&me["role"], &me["subscription_tier"]), (&json!("admin"), &json!("premium")));
    assert_eq!(me["user"]["first_name"], "Ada");
    ask(asked(&server, "admin/users", &token)).await.data(200);
    // Nor do later tokens have to repeat it.
    let me = server.get(ADA, "me").await.data(200);
    assert_eq!((&me["role"], &me["subscription_tier"]), (&json!("admin"), &json!("premium")));
    // A newer word that is silent, or says otherwise, counts at once.
    server.deliver("user.updated", &ada(json!({}), (now() + 1) * 1000)).await.data(200);
    ask(asked(&server, "admin/users", &token)).await.assert_refused(403, "role_required");
}

#[tokio::test]
async fn a_registration_that_changes_no_right_overrules_no_token_of_its_second() {
    let server = Server::start(Setup::clerk());
    let second = now();
    server.deliver("user.created", &ada(json!({}), second * 1000 + 999)).await.data(200);
    let token = |iat: i64| token(&json!({ "role": "admin", "iat": iat }));
    ask(asked(&server, "admin/users", &token(second))).await.data(200);
    // A later word counts against tokens up to its own second and no further.
    server.deliver("user.updated", &ada(json!({}), second * 1000 + 1999)).await.data(200);
    let refused = ask(asked(&server, "admin/users", &token(second + 1))).await;
    refused.assert_refused(403, "role_required");
    ask(asked(&server, "admin/users", &token(second + 2))).await.data(200);
}

#[tokio::test]
async fn user_type_and_flags_of_a_newer_token_are_shown_like_its_rights() {
    let server = Server::start(Setup::clerk());
    let claimed = json!({ "userType": "seller", "featureFlags": { "new": true, "text": "x" } });
    let shown = async || {
        let me = ask(asked(&server, "me", &token(&claimed))).await.data(200);
        (me["user_type"].clone(), me["feature_flags"].clone())
    };
    // Clerk has said nothing of them, and long ago.
    server.deliver("user.created", &ada(json!({}), (now() - 120) * 1000)).await.data(200);
    assert_eq!(shown().await, (json!("seller"), json!({ "new": true })));
    assert_eq!(server.get(ADA, "me").await.data(200)["feature_flags"], json!({}));
    // What is heard just now overrules the token.
    let known = json!({ "userType": "buyer", "featureFlags": { "old": true } });
    server.deliver("user.updated", &ada(known.clone(), (now() - 60) * 1000)).await.data(200);
    assert_eq!(shown().await, (known["userType"].clone(), known["featureFlags"].clone()));
}

#[tokio::test]
async fn a_session_is_over_at_once_also_while_its_view_stands_still() {
    let mut server = Server::start(Setup::clerk());
    server.get(ADA, "me").await.data(200);
    server.stop();
    let log = EmbeddedLog::open(&server.data_dir().join("log.sqlite")).unwrap();
    let (clock, data, metadata) = (Clock::system(), b"{}".to_vec(), b"{}".to_vec());
    let kind = "session.teleported.v7".to_owned();
    let event = NewEvent { id: clock.fresh_id(), kind, time: clock.now(), data, metadata };
    log.append("session-sess_other", Expected::Any, vec![event]).await.unwrap();
    drop(log);
    let server = server.start_again();
    server.get(ADA, "me").await.data(200);
    let session = clerk_session(&session_of(ADA), ADA, "revoked");
    server.deliver("session.revoked", &session).await;
    let refused = server.get(ADA, "me").await;
    refused.assert_refused(401, "session_ended");
    assert_eq!(refused.body["detail"]["reason"], "revoked");
    // One that the view never showed begins.
    server.get("user_bob", "jobs").await.data(200);
}

#[tokio::test]
async fn a_token_is_shown_as_it_was_understood() {
    let server = Server::start(Setup::clerk());
    let token = token(&json!({
        "email": "ada@example.com", "userType": "seller", "pla": "u:premium", "fea": "u:hd,o:team",
        "o": { "id": "org_1", "slg": "acme", "rol": "admin" },
        "feature_flags": { "new": true, "text": "x" },
        "onboarding": { "status": "in_progress", "currentStep": 3 },
    }));
    let shown = ask(asked(&server, "session-token", &token)).await.data(200);
    let organization = json!({
        "id": "org_1", "slug": "acme", "role": "org:admin", "permissions": [],
    });
    for (name, value) in [
        ("email", json!("ada@example.com")),
        ("user_type", json!("seller")),
        ("subscription_tier", json!("premium")),
        ("plan", json!("premium")),
        ("features", json!(["hd", "team"])),
        ("organizations", json!([organization])),
        ("feature_flags", json!({ "new": true })),
        ("onboarding", json!({ "step": 3, "total_steps": 8, "status": "in_progress" })),
    ] {
        assert_eq!(shown[name], value, "{name}");
    }
    assert_eq!(shown["claims"]["pla"], "u:premium");
}
