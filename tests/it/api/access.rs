//! Who may use which route: every row of the table, asked by everybody.

use std::collections::BTreeSet;

use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use t2m::http::app::PREFIXES;
use t2m::http::routes::{self, Access};

use crate::server::{Server, Setup, claims, now, session_of, signed};

/// What is expected of a route; the table of the crate must agree, row by row.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Class {
    /// Anybody, also without a token.
    Free,
    /// Any user.
    User,
    /// The owner of what the path names; to others it is not there.
    Owner,
    Premium,
    Admin,
    /// Who has a worker's token, and no user.
    Worker,
}

use Class::{Admin, Free, Owner, Premium, User, Worker};

/// A new route needs a line here.
const EXPECTED: &[(&str, &str, Class)] = &[
    ("GET", "/auth/health", Free),
    ("GET", "/system/health", Free),
    ("GET", "/system/ready", Free),
    ("GET", "/metrics", Free),
    ("POST", "/webhooks/clerk", Free),
    ("POST", "/auth/webhook", Free),
    ("GET", "/openapi.json", Free),
    ("GET", "/files/secure/{id}", Free),
    ("HEAD", "/files/secure/{id}", Free),
    ("GET", "/me", User),
    ("POST", "/onboarding", User),
    ("GET", "/session-token", User),
    ("GET", "/sessions", User),
    ("PATCH", "/sessions/current", User),
    ("POST", "/sessions/current/activity", User),
    ("DELETE", "/sessions/current", User),
    ("DELETE", "/sessions/{id}", Owner),
    ("POST", "/files/upload", User),
    ("OPTIONS", "/files/tus", Free),
    ("POST", "/files/tus", User),
    ("HEAD", "/files/tus/{id}", Owner),
    ("PATCH", "/files/tus/{id}", Owner),
    ("DELETE", "/files/tus/{id}", Owner),
    ("POST", "/files/tus/{id}", Owner),
    ("GET", "/files", User),
    ("GET", "/files/{id}", Owner),
    ("DELETE", "/files/{id}", Owner),
    ("POST", "/files/{id}/signed-url", Owner),
    ("POST", "/videos/generate", User),
    ("POST", "/videos/batch", Premium),
    ("GET", "/videos", User),
    ("POST", "/videos/{id}/signed-url", Owner),
    ("GET", "/jobs", User),
    ("GET", "/jobs/{id}", Owner),
    ("GET", "/status/{id}", Owner),
    ("POST", "/jobs/{id}/cancel", Owner),
    ("POST", "/jobs/{id}/retry", Owner),
    ("GET", "/jobs/{id}/callbacks", Owner),
    ("GET", "/jobs/{id}/events", Owner),
    ("GET", "/events", User),
    ("POST", "/translations", User),
    ("POST", "/uploadfile", User),
    ("POST", "/uploadfile/", User),
    ("GET", "/admin/users", Admin),
    ("GET", "/admin/users/{id}", Admin),
    ("PUT", "/admin/users/{id}/access", Admin),
    ("PUT", "/admin/users/{id}/feature-flags", Admin),
    ("PUT", "/admin/users/{id}/organization", Admin),
    ("GET", "/admin/users/{id}/sessions", Admin),
    ("DELETE", "/admin/users/{id}/sessions/{session_id}", Admin),
    ("GET", "/admin/analytics", Admin),
    ("POST", "/admin/replay", Admin),
    ("GET", "/admin/replay", Admin),
    ("GET", "/admin/events", Admin),
    ("GET", "/admin/system", Admin),
    ("GET", "/admin/webhooks/dead", Admin),
    ("POST", "/admin/webhooks/dead/{id}/retry", Admin),
    ("DELETE", "/admin/webhooks/dead/{id}", Admin),
    ("POST", "/worker/lease", Worker),
    ("POST", "/worker/jobs/{id}/progress", Worker),
    ("PUT", "/worker/jobs/{id}/output", Worker),
    ("POST", "/worker/jobs/{id}/complete", Worker),
    ("POST", "/worker/jobs/{id}/fail", Worker),
];

#[test]
fn the_table_of_routes_is_the_one_that_is_expected() {
    let class = |access| match access {
        Access::Public => "public",
        Access::Authenticated => "authenticated",
        Access::Premium => "premium",
        Access::Admin => "admin",
        Access::Permission(name) => name,
        Access::Worker => "worker",
    };
    let actual: BTreeSet<_> = routes::table()
        .into_iter()
        .map(|route| (route.method.to_string(), route.path, class(route.access)))
        .collect();
    let expected: BTreeSet<_> = EXPECTED
        .iter()
        .map(|(method, path, expected)| {
            let class = match expected {
                Free => "public",
                User | Owner => "authenticated",
                Premium => "premium",
                Admin => "admin",
                Worker => "worker",
            };
            (method.to_string(), *path, class)
        })
        .collect();
    assert_eq!(actual, expected);
}

/// A user with something of each kind that a path can name.
struct Person {
    user: String,
    job: String,
    file: String,
}

impl Person {
    async fn new(server: &Server, user: String) -> Self {
        let job = server.generate(&user, "mine").await;
        let file = server.upload(&user, "mine.txt", "mine").await;
        let file = file["file_id"].as_str().unwrap().to_owned();
        Self { user, job, file }
    }

    /// The path with the ids of what is this user's.
    fn path(&self, path: &str) -> String {
        let session = session_of(&self.user);
        let id = match path {
            path if path.starts_with("/admin/users/") => &self.user,
            path if path.starts_with("/files/") => &self.file,
            path if path.starts_with("/sessions/") => &session,
            _ => &self.job,
        };
        path.replace("{id}", id).replace("{session_id}", &session)
    }
}

/// Status and code of an answer; the body of a stream that goes on is not waited for.
async fn outcome(request: RequestBuilder) -> (u16, Value) {
    let response = request.send().await.expect("the server answers");
    let status = response.status().as_u16();
    let body = match status {
        400.. => response.json().await.unwrap_or_default(),
        _ => Value::Null,
    };
    (status, body)
}

fn token(user: &str, role: &str, tier: &str) -> String {
    let mut claims = claims(user);
    claims["role"] = json!(role);
    claims["subscription_tier"] = json!(tier);
    signed(&claims)
}

fn expired() -> String {
    let mut claims = claims("user_late");
    claims["exp"] = json!(now() - 60);
    signed(&claims)
}

/// What others than the owner are told: none if they are let through.
fn refusal(class: Class, role: &str, tier: &str) -> Option<(u16, &'static str, &'static str)> {
    match class {
        Owner => Some((404, "not_found", "")),
        Worker => Some((401, "token_invalid", "")),
        Admin if role != "admin" => Some((403, "role_required", "required_role")),
        Premium if tier != "premium" => Some((403, "premium_required", "required_tiers")),
        Free | User | Admin | Premium => None,
    }
}

#[tokio::test]
async fn every_route_is_open_to_those_it_is_for_and_to_nobody_else() {
    let server = Server::start(Setup::clerk());
    for (number, (method, path, class)) in EXPECTED.iter().enumerate() {
        for (prefix_number, prefix) in PREFIXES.iter().enumerate() {
            let owner = Person::new(&server, format!("owner_{number}_{prefix_number}")).await;
            let path = format!("{prefix}{}", owner.path(path));
            let request = || {
                let method = Method::from_bytes(method.as_bytes()).unwrap();
                let request = server.request(method, &path);
                request.header("content-type", "application/json").body("{}")
            };
            let what = format!("{method} {path}");
            // An answer to HEAD has no body to tell it.
            let told = |code: &str| if *method == "HEAD" { Value::Null } else { json!(code) };
            for (bearer, code) in [
                (None, "unauthenticated"),
                (Some("garbage".to_owned()), "token_invalid"),
                (Some(expired()), "token_expired"),
            ] {
                let request = match &bearer {
                    Some(token) => request().bearer_auth(token),
                    None => request(),
                };
                let (status, body) = outcome(request).await;
                match class {
                    Worker if bearer.is_some() => {
                        assert_eq!(
                            (status, &body["code"]),
                            (401, &json!("token_invalid")),
                            "{what}"
                        );
                    }
                    Free => assert!(![401, 403].contains(&status), "{what}: {status} {body}"),
                    _ => assert_eq!((status, &body["code"]), (401, &told(code)), "{what}"),
                }
            }
            let others =
                [("plain", "user", "standard"), ("rich", "user", "premium"), ("boss", "admin", "")];
            for (name, role, tier) in others {
                // Fresh ones each time: some of the requests end their own session.
                let token = token(&format!("{name}_{number}_{prefix_number}"), role, tier);
                let (status, body) = outcome(request().bearer_auth(token)).await;
                let what = format!("{what} by {name}: {status} {body}");
                match refusal(*class, role, tier) {
                    Some((expected, code, names)) => {
                        assert_eq!((status, &body["code"]), (expected, &told(code)), "{what}");
                        assert!(names.is_empty() || !body["detail"][names].is_null(), "{what}");
                    }
                    None => assert!(![401, 403, 429].contains(&status), "{what}"),
                }
            }
            if matches!(class, User | Owner) {
                let token = signed(&claims(&owner.user));
                let (status, body) = outcome(request().bearer_auth(token)).await;
                let closed = [401, 403, 404, 405, 429].contains(&status) || status >= 500;
                assert!(!closed, "{what} by its owner: {status} {body}");
            }
        }
    }
}
