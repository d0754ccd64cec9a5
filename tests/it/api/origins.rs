//! Browsers: which pages may write, which may read, and what they are told of our answers.

use reqwest::Method;
use reqwest::header::HeaderValue;
use serde_json::json;

use crate::server::{Answer, Server, Setup, ask, claims, signed};

const ADA: &str = "user_ada";
const APP: &str = "https://app.example.com";

fn setup() -> Setup {
    Setup::clerk().with("ALLOWED_ORIGINS", APP)
}

#[tokio::test]
async fn no_origin_that_only_looks_like_ours_may_write_or_read() {
    let server = Server::start(setup());
    server.get(ADA, "me").await.data(200);
    let end = server.log_position().await;
    let look_alikes = [
        "null",
        "",
        "*",
        "http://app.example.com",
        "https://app.example.com:444",
        "https://app.example.com:443",
        "https://app.example.com/",
        "https://app.example.com.",
        "https://app.example.com.evil.test",
        "https://evil-app.example.com",
        "https://evil.test/https://app.example.com",
        "https://app.example.com@evil.test",
        "https://sub.app.example.com",
        "https://example.com",
        "HTTPS://APP.EXAMPLE.COM",
        "https://аpp.example.com",
        "https://xn--pp-6kc.example.com",
        "https://app.example.com https://evil.test",
        "https://app.example.com, https://evil.test",
        "file://",
    ];
    let mut bodies = Vec::new();
    for origin in look_alikes {
        println!("{origin}");
        let value = || HeaderValue::from_bytes(origin.as_bytes()).unwrap();
        for method in [Method::POST, Method::PUT, Method::PATCH, Method::DELETE] {
            let request = server.request_of(ADA, method, "videos/generate");
            let refused = ask(request.header("origin", value()).json(&json!({ "prompt": "a" })));
            let refused = refused.await;
            refused.assert_refused(403, "invalid_origin");
            assert_eq!(refused.header("access-control-allow-origin"), "");
            assert_eq!(refused.header("vary"), "Origin");
            bodies.push(refused.body);
        }
        let read = server.request_of(ADA, Method::GET, "me").header("origin", value());
        let read = ask(read).await;
        assert_eq!((read.status, read.header("access-control-allow-origin")), (200, ""));
        assert_eq!(preflight(&server, value()).await.header("access-control-allow-origin"), "");
    }
    let twice = server.request_of(ADA, Method::POST, "videos/generate").header("origin", APP);
    let twice = ask(twice.header("origin", "https://evil.test").json(&json!({ "prompt": "a" })));
    let twice = twice.await;
    twice.assert_refused(403, "invalid_origin");
    assert_eq!(twice.header("access-control-allow-origin"), "");
    bodies.push(twice.body);
    bodies.dedup();
    assert_eq!(bodies.len(), 1, "{bodies:?}");
    assert_eq!(server.log_position().await, end);
}

async fn preflight(server: &Server, origin: HeaderValue) -> Answer {
    let request = server.request(Method::OPTIONS, "videos/generate").header("origin", origin);
    let request = request.header("access-control-request-method", "POST");
    ask(request.header("access-control-request-headers", "authorization,content-type")).await
}

#[tokio::test]
async fn a_path_that_is_spelled_otherwise_is_guarded_alike() {
    let server = Server::start(setup());
    for path in ["/%61pi/v1/onboarding", "/api/v%31/onboarding", "/%61pi/onboarding"] {
        let url = format!("{}{path}", server.address);
        let request = reqwest::Client::new().post(url).header("origin", "https://evil.test");
        let request = request.bearer_auth(signed(&claims(ADA))).json(&json!({ "step": 1 }));
        ask(request).await.assert_refused(403, "invalid_origin");
    }
}

#[tokio::test]
async fn a_page_of_ours_may_ask_before_it_is_known_and_read_every_refusal() {
    let server = Server::start(setup().with("RATE_LIMIT_WRITES", "1/1h"));
    let allowed = preflight(&server, HeaderValue::from_static(APP)).await;
    assert_eq!(allowed.status, 200);
    assert!(allowed.header("access-control-allow-methods").contains("POST"));
    assert_readable(&allowed);

    let admin = server.request_of(ADA, Method::GET, "admin/users");
    let missing = server.request_of(ADA, Method::GET, "jobs/none");
    let write = || {
        let request = server.request_of(ADA, Method::POST, "videos/generate");
        request.json(&json!({ "prompt": "a" }))
    };
    let table = [
        (server.request(Method::GET, "me"), 401),
        (admin, 403),
        (missing, 404),
        (server.request(Method::GET, "nowhere"), 404),
        (server.request(Method::DELETE, "me"), 405),
        (write(), 202),
        (write(), 429),
    ];
    for (request, status) in table {
        let answer = ask(request.header("origin", APP)).await;
        assert_eq!(answer.status, status, "{}", answer.body);
        assert_readable(&answer);
    }
    // A cache must not give a page what it kept of a request without an origin.
    let plain = ask(server.request(Method::GET, "system/health")).await;
    assert!(plain.header("vary").contains("Origin"), "{:?}", plain.headers);
}

#[track_caller]
fn assert_readable(answer: &Answer) {
    assert_eq!(answer.header("access-control-allow-origin"), APP);
    assert!(answer.header("vary").contains("Origin"), "{:?}", answer.headers);
}

#[tokio::test]
async fn what_a_browser_is_told_depends_on_what_it_is_given() {
    let server = Server::start(setup());
    let nothing = "default-src 'none'; frame-ancestors 'none'";
    for path in ["/api/me", "/api/system/health", "/nowhere"] {
        let answer = ask(server.request(Method::GET, path)).await;
        assert_eq!(answer.header("content-security-policy"), nothing, "{path}");
        assert_eq!(answer.header("x-content-type-options"), "nosniff");
        assert_eq!(answer.header("referrer-policy"), "no-referrer");
        assert_eq!(answer.header("strict-transport-security"), "", "over http it means nothing");
    }
    let docs = ask(server.request(Method::GET, "/docs/")).await;
    assert_eq!(docs.status, 200);
    let policy = docs.header("content-security-policy");
    assert!(policy.contains("default-src 'self'") && policy.contains("frame-ancestors 'none'"));
    // What the page loads it finds below itself; nothing of it stands in the page.
    let page = String::from_utf8_lossy(&docs.bytes).into_owned();
    assert!(!page.contains("<style") && !page.contains("<script>"), "{page}");

    let secure = Server::start(setup().with("PUBLIC_URL", "https://api.example.com"));
    let answer = ask(secure.request(Method::GET, "system/health")).await;
    assert_eq!(answer.header("strict-transport-security"), "max-age=31536000");
}
