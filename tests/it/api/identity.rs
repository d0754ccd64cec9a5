//! Who is asking: tokens, webhooks and sessions.

use reqwest::Method;
use serde_json::{Value, json};
use t2m::clerk::signing::SigningKey;

use super::{clerk_session, clerk_user};
use crate::server::{Answer, Server, Setup, ask, claims, now, session_of, signed};

const ADA: &str = "user_ada";

async fn me_with(server: &Server, token: &str) -> Answer {
    ask(server.request(Method::GET, "me").bearer_auth(token)).await
}

fn with(claim: &str, value: Value) -> Value {
    let mut claims = claims(ADA);
    claims[claim] = value;
    claims
}

#[tokio::test]
async fn an_expired_token_is_told_when_it_expired_in_both_places() {
    let server = Server::start(Setup::clerk());
    let expired_at = now() - 600;
    let before = now();
    let answer = me_with(&server, &signed(&with("exp", json!(expired_at)))).await;
    answer.assert_refused(401, "token_expired");
    let current = answer.body["current_time"].as_i64().unwrap();
    assert!((before..=now()).contains(&current));
    let times = json!({
        "requires_refresh": true,
        "expired_at": expired_at,
        "current_time": current,
        "expired_seconds_ago": current - expired_at,
    });
    let mut whole = json!({
        "success": false,
        "error": "Token has expired",
        "message": "Token has expired",
        "code": "token_expired",
        "detail": times,
    });
    whole.as_object_mut().unwrap().extend(times.as_object().unwrap().clone());
    assert_eq!(answer.body, whole);
}

#[tokio::test]
async fn tokens_that_are_wrong_in_different_ways_are_refused_with_one_body() {
    let server = Server::start(Setup::clerk());
    let good = signed(&claims(ADA));
    let foreign = SigningKey::generate("tests").unwrap();
    let none = format!("eyJhbGciOiJub25lIn0.{}.", good.split('.').nth(1).unwrap());
    let table = [
        ("issuer", signed(&with("iss", json!("https://clerk.evil.test")))),
        ("no issuer", signed(&with("iss", Value::Null))),
        ("audience", signed(&with("aud", json!("another-api")))),
        ("no audience", signed(&with("aud", Value::Null))),
        ("key", foreign.sign(&claims(ADA)).unwrap()),
        ("subject", signed(&with("sub", json!("../ada")))),
        ("not yet", signed(&with("nbf", json!(now() + 600)))),
        ("no expiry", signed(&with("exp", Value::Null))),
        ("no signature", none),
        ("cut", good[..good.len() - 4].to_owned()),
        ("garbage", "garbage".to_owned()),
    ];
    let mut bodies = Vec::new();
    for (wrong, token) in table {
        println!("{wrong}");
        let answer = me_with(&server, &token).await;
        answer.assert_refused(401, "token_invalid");
        bodies.push(answer.body);
    }
    bodies.dedup();
    assert_eq!(bodies.len(), 1, "{bodies:?}");
    assert_eq!(server.log_position().await, 0);
    me_with(&server, &good).await.data(200);
}

#[tokio::test]
async fn the_session_of_one_user_does_not_carry_another() {
    let server = Server::start(Setup::clerk());
    server.get(ADA, "me").await.data(200);
    let mut claims = claims("user_bob");
    claims["sid"] = json!(session_of(ADA));
    me_with(&server, &signed(&claims)).await.assert_refused(401, "token_invalid");
}

#[tokio::test]
async fn a_delivery_without_a_good_signature_is_refused_and_recorded_nowhere() {
    let server = Server::start(Setup::clerk());
    let user = clerk_user(ADA, 1);
    let body = json!({ "type": "user.created", "object": "event", "data": user }).to_string();
    let post = |path| {
        let request = server.request(Method::POST, path);
        request.header("content-type", "application/json").body(body.clone())
    };
    let signature = format!("v1,{}", "A".repeat(43) + "=");
    let at = |seconds: i64| {
        let request = post("webhooks/clerk").header("svix-id", "msg_1");
        request.header("svix-timestamp", seconds).header("svix-signature", &signature)
    };
    let swapped = server.delivery("msg_1", "user.created", &user).body(body.clone());
    let table = [
        ("unsigned", post("webhooks/clerk")),
        ("unsigned, other path", post("auth/webhook")),
        ("wrong signature", at(now())),
        ("too old", at(now() - 301)),
        ("from the future", at(now() + 900)),
        ("another body", swapped),
    ];
    for (wrong, request) in table {
        println!("{wrong}");
        ask(request).await.assert_refused(400, "webhook_invalid");
    }
    assert_eq!(server.log_position().await, 0);
}

#[tokio::test]
async fn a_duplicate_a_stale_and_an_unknown_delivery_are_acknowledged_and_change_nothing() {
    let server = Server::start(Setup::clerk());
    let user = clerk_user(ADA, 1_767_225_600_000);
    ask(server.delivery("msg_1", "user.created", &user)).await.data(200);
    let position = server.log_position().await;
    let mut stale = clerk_user(ADA, 1_767_225_500_000);
    stale["first_name"] = json!("Old");
    ask(server.delivery("msg_1", "user.created", &user)).await.data(200);
    ask(server.delivery("msg_2", "user.updated", &stale)).await.data(200);
    ask(server.delivery("msg_3", "future.thing", &json!({ "id": "x" }))).await.data(200);
    ask(server.delivery("msg_4", "user.created", &json!({ "id": "no/id" }))).await.data(200);
    assert_eq!(server.log_position().await, position);
    assert_eq!(server.get(ADA, "me").await.data(200)["user"]["first_name"], "Ada");
}

#[tokio::test]
async fn a_session_that_clerk_ends_is_refused_on_its_next_request_with_the_reason() {
    let server = Server::start(Setup::clerk());
    let table = [
        ("user_a", "session.revoked", "revoked"),
        ("user_b", "session.ended", "signed_out"),
        ("user_c", "session.removed", "removed"),
    ];
    for (user, kind, reason) in table {
        let session = clerk_session(&session_of(user), user, "active");
        server.deliver("session.created", &session).await.data(200);
        server.get(user, "me").await.data(200);
        server.deliver(kind, &session).await.data(200);
        let refused = server.get(user, "me").await;
        refused.assert_refused(401, "session_ended");
        assert_eq!(refused.body["detail"]["reason"], reason);
        assert_eq!(refused.body["reason"], reason);
    }
}

#[tokio::test]
async fn a_session_revoked_by_its_user_is_over_and_the_other_one_is_not() {
    let server = Server::start(Setup::clerk());
    let phone = signed(&with("sid", json!("sess_phone")));
    me_with(&server, &phone).await.data(200);
    let listed = server.get(ADA, "sessions").await.data(200);
    assert_eq!(listed["items"].as_array().unwrap().len(), 2);
    server.delete(ADA, "sessions/sess_phone").await.data(200);
    me_with(&server, &phone).await.assert_refused(401, "session_ended");
    server.get(ADA, "me").await.data(200);
}

#[tokio::test]
async fn a_deleted_user_is_refused_whatever_its_token_says() {
    let server = Server::start(Setup::clerk());
    server.deliver("user.created", &clerk_user(ADA, 1_767_225_600_000)).await.data(200);
    server.get(ADA, "me").await.data(200);
    let gone = json!({ "id": ADA, "object": "user", "deleted": true });
    server.deliver("user.deleted", &gone).await.data(200);
    for token in [signed(&claims(ADA)), signed(&with("sid", json!("sess_new")))] {
        let refused = me_with(&server, &token).await;
        refused.assert_refused(401, "session_ended");
        assert_eq!(refused.body["detail"]["reason"], "user_deleted");
    }
    server.deliver("user.updated", &clerk_user(ADA, now() * 1000)).await.data(200);
    assert_eq!(server.get(ADA, "me").await.status, 401, "a late delivery brought the user back");
}

#[tokio::test]
async fn role_and_tier_of_the_webhook_are_those_of_the_caller() {
    let server = Server::start(Setup::clerk());
    server.deliver("user.created", &clerk_user(ADA, 1_767_225_600_000)).await.data(200);
    let me = server.get(ADA, "me").await.data(200);
    assert_eq!((&me["role"], &me["subscription_tier"]), (&json!("creator"), &json!("premium")));

    let mut changed = clerk_user(ADA, 1_767_225_700_000);
    changed["public_metadata"]["role"] = json!("admin");
    server.deliver("user.updated", &changed).await.data(200);
    assert_eq!(server.get(ADA, "me").await.data(200)["role"], "admin");

    let mut older = with("role", json!("creator"));
    older["iat"] = json!(now() - 60);
    let me = me_with(&server, &signed(&older)).await.data(200);
    assert_eq!(me["role"], "admin", "a token from before the change overruled it");
}

/// A token that was made when the user was an administrator, and outlives it.
fn older_token() -> String {
    let mut claims = with("role", json!("admin"));
    claims["iat"] = json!(now() - 60);
    signed(&claims)
}

#[tokio::test]
async fn what_a_webhook_takes_away_is_gone_on_the_very_next_request_of_an_older_token() {
    let user = |metadata: Value, banned: bool, updated_at: i64| {
        let mut user = clerk_user(ADA, updated_at * 1000);
        user["public_metadata"] = metadata;
        user["banned"] = json!(banned);
        user
    };
    let admin = json!({ "role": "admin" });
    let gone = json!({ "id": ADA, "object": "user", "deleted": true });
    let session = clerk_session(&session_of(ADA), ADA, "revoked");
    let table = [
        ("user.updated", user(json!({ "role": "user" }), false, now()), 403, "role_required"),
        ("user.updated", user(json!({}), false, now()), 403, "role_required"),
        ("user.updated", user(admin.clone(), true, now()), 401, "session_ended"),
        ("user.deleted", gone, 401, "session_ended"),
        ("session.revoked", session, 401, "session_ended"),
    ];
    let server = Server::start(Setup::clerk());
    let ask_as = |token: String| ask(server.request(Method::GET, "admin/users").bearer_auth(token));
    for (index, (kind, data, status, code)) in table.into_iter().enumerate() {
        // A user of its own for each row.
        let id = format!("user_{index}");
        let own = |value: &Value| -> Value {
            let text = value.to_string().replace(ADA, &id);
            serde_json::from_str(&text).unwrap()
        };
        let mut claims = own(&claims(ADA));
        claims["role"] = json!("admin");
        claims["iat"] = json!(now() - 60);
        let token = signed(&claims);
        let created = own(&user(admin.clone(), false, now() - 120));
        server.deliver("user.created", &created).await.data(200);
        ask_as(token.clone()).await.data(200);
        server.deliver(kind, &own(&data)).await.data(200);
        ask_as(token).await.assert_refused(status, code);
    }
}

#[tokio::test]
async fn a_right_that_was_taken_away_before_it_was_heard_of_is_not_taken_from_an_older_token() {
    let server = Server::start(Setup::clerk());
    let mut user = clerk_user(ADA, (now() - 120) * 1000);
    user["public_metadata"] = json!({});
    server.deliver("user.created", &user).await.data(200);
    let users = || ask(server.request(Method::GET, "admin/users").bearer_auth(older_token()));
    users().await.data(200);
    // Made administrator 90 seconds ago, which we never hear, and no longer: no right changes.
    user["updated_at"] = json!(now() * 1000);
    server.deliver("user.updated", &user).await.data(200);
    users().await.assert_refused(403, "role_required");
}

#[tokio::test]
async fn an_open_event_stream_ends_when_its_session_or_its_user_does() {
    let server = Server::start(Setup::clerk());
    let banned = |user: &str| {
        let mut banned = clerk_user(user, now() * 1000);
        banned["banned"] = json!(true);
        banned
    };
    let table = [
        ("user_a", "session.revoked", clerk_session(&session_of("user_a"), "user_a", "revoked")),
        ("user_b", "session.ended", clerk_session(&session_of("user_b"), "user_b", "ended")),
        ("user_c", "user.deleted", json!({ "id": "user_c", "deleted": true })),
        ("user_d", "user.updated", banned("user_d")),
    ];
    let mut other = server.events("user_other", "events", None).await;
    for (user, kind, data) in table {
        let mut events = server.events(user, "events", None).await;
        // It is open: what happens to the user comes through.
        let job = server.generate(user, "a lighthouse").await;
        assert_eq!(events.next().await.expect("the stream is open").data["job_id"], job);
        let mut of_job = server.events(user, &format!("jobs/{job}/events"), None).await;
        assert_eq!(of_job.next().await.expect("the stream is open").kind, "job.requested");
        server.deliver(kind, &data).await.data(200);
        assert_eq!(events.next().await, None, "{kind}: the stream went on");
        assert_eq!(of_job.next().await, None, "{kind}: the job's stream went on");
    }
    let job = server.generate("user_other", "a lighthouse").await;
    let event = other.next().await.expect("another's stream stays open");
    assert_eq!(event.data["job_id"], job);
}

#[tokio::test]
async fn the_first_request_provisions_and_the_webhook_completes() {
    let server = Server::start(Setup::clerk());
    let mut claims = with("email", json!("claim@example.com"));
    claims["subscription_tier"] = json!("premium");
    let me = me_with(&server, &signed(&claims)).await.data(200);
    assert_eq!(me["user"]["email"], "claim@example.com");
    assert_eq!(me["subscription_tier"], "premium");
    assert_eq!(me["user"]["first_name"], Value::Null);

    server.deliver("user.created", &clerk_user(ADA, 1_767_225_600_000)).await.data(200);
    let me = server.get(ADA, "me").await.data(200);
    assert_eq!(me["user"]["email"], "ada@example.com");
    assert_eq!(me["user"]["first_name"], "Ada");
}

#[tokio::test]
async fn a_token_near_its_end_is_advised_to_be_renewed() {
    let server = Server::start(Setup::clerk());
    for (lifetime, advice) in [(299, "recommended"), (600, "")] {
        let answer = me_with(&server, &signed(&with("exp", json!(now() + lifetime)))).await;
        assert_eq!((answer.status, answer.header("x-token-refresh")), (200, advice));
    }
}

#[tokio::test]
async fn what_a_token_claims_of_organizations_and_onboarding_holds_until_clerk_tells_otherwise() {
    let server = Server::start(Setup::clerk().with("REQUIRE_ONBOARDING", "true"));
    let claimed = |user: &str, status: &str| {
        let mut claims = claims(user);
        claims["o"] = json!({ "id": "org_1", "slg": "acme", "rol": "admin" });
        claims["onboarding"] = json!({ "status": status, "currentStep": 3, "totalSteps": 5 });
        signed(&claims)
    };
    let me = me_with(&server, &claimed(ADA, "completed")).await.data(200);
    let organization = &me["organizations"][0];
    assert_eq!(
        (&organization["organization_id"], &organization["slug"], &organization["role"]),
        (&json!("org_1"), &json!("acme"), &json!("org:admin"))
    );
    let onboarding = &me["onboarding"];
    assert_eq!((&onboarding["needs_onboarding"], &onboarding["step"]), (&json!(false), &json!(3)));
    // Later tokens need not say it again.
    server.get(ADA, "files").await.data(200);

    // What the guard takes for completed, the picture shows so, whoever came first: here the webhook.
    server.deliver("user.created", &clerk_user("user_bob", now() * 1000)).await.data(200);
    for (status, needs) in [("in_progress", true), ("completed", false)] {
        let token = claimed("user_bob", status);
        let me = me_with(&server, &token).await.data(200);
        assert_eq!(me["onboarding"]["needs_onboarding"], needs);
        assert_eq!(me["organizations"], json!([]), "a token's word came after Clerk's");
        let files = ask(server.request(Method::GET, "files").bearer_auth(token)).await;
        assert_eq!(files.status == 403, needs);
    }

    let membership = |id: &str, role: &str| {
        json!({
            "id": id, "object": "organization_membership", "role": role,
            "organization": { "id": "org_1", "name": "Acme", "slug": "acme" },
            "public_user_data": { "user_id": ADA }, "updated_at": now() * 1000,
        })
    };
    let joined = membership("orgmem_1", "org:member");
    server.deliver("organizationMembership.created", &joined).await.data(200);
    let told = server.get(ADA, "me").await.data(200)["organizations"].clone();
    assert_eq!(told.as_array().unwrap().len(), 1, "{told}");
    assert_eq!(
        (&told[0]["membership_id"], &told[0]["role"]),
        (&json!("orgmem_1"), &json!("org:member"))
    );
    server.deliver("organizationMembership.deleted", &joined).await.data(200);
    // Nobody is brought back by a token that is older.
    let me = me_with(&server, &claimed(ADA, "completed")).await.data(200);
    assert_eq!(me["organizations"], json!([]));

    // One whose membership Clerk ends without ever having told of it.
    me_with(&server, &claimed("user_eve", "completed")).await.data(200);
    let mut left = membership("orgmem_2", "org:member");
    left["public_user_data"]["user_id"] = json!("user_eve");
    server.deliver("organizationMembership.deleted", &left).await.data(200);
    assert_eq!(server.get("user_eve", "me").await.data(200)["organizations"], json!([]));
}

#[tokio::test]
async fn sessions_are_listed_a_page_at_a_time() {
    let server = Server::start(Setup::clerk());
    for number in 0..5 {
        let token = signed(&with("sid", json!(format!("sess_{number}"))));
        me_with(&server, &token).await.data(200);
    }
    let mut admin = claims("user_admin");
    admin["role"] = json!("admin");
    let boss = signed(&admin);
    let path = format!("admin/users/{ADA}/sessions");
    let last = signed(&with("sid", json!("sess_4")));
    for (path, token) in [("sessions", &last), (path.as_str(), &boss)] {
        let list = |query: String| {
            ask(server.request(Method::GET, &format!("{path}?{query}")).bearer_auth(token))
        };
        let mut seen = Vec::new();
        let mut query = "limit=2".to_owned();
        loop {
            let page = list(query).await.data(200);
            let items = page["items"].as_array().unwrap();
            assert!(items.len() <= 2);
            seen.extend(items.iter().map(|it| it["session_id"].as_str().unwrap().to_owned()));
            let Some(cursor) = page["next_cursor"].as_str() else { break };
            query = format!("limit=2&cursor={cursor}");
        }
        assert_eq!(seen, ["sess_4", "sess_3", "sess_2", "sess_1", "sess_0"]);
        for (query, field) in [("limit=0", "limit"), ("limit=201", "limit"), ("cursor=x", "cursor")]
        {
            let refused = list(query.to_owned()).await;
            refused.assert_refused(422, "validation_failed");
            assert!(refused.body["detail"]["fields"][field].is_string(), "{}", refused.body);
        }
    }
}
