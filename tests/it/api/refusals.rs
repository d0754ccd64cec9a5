//! What is refused, how it is said, and that nothing comes of it.

use reqwest::Method;
use reqwest::header::CONTENT_TYPE;
use serde_json::{Value, json};
use t2m::http::app::PREFIXES;
use t2m::http::routes::{Access, table};

use crate::server::{Server, Setup, ask, claims, session_of, signed};

const ADA: &str = "user_ada";
const BOB: &str = "user_bob";
const NOBODYS: &str = "0190d3a0-0000-7000-8000-000000000001";
const JSON: &str = "application/json";

/// A route's path with an id in it, under each prefix.
fn concrete(path: &str) -> impl Iterator<Item = String> {
    PREFIXES.iter().map(move |prefix| format!("{prefix}{}", path.replace("{id}", NOBODYS)))
}

#[tokio::test]
async fn what_is_no_route_is_not_found() {
    let server = Server::start(Setup::clerk());
    for path in ["/api/v1/nothing", "/api/nothing", "/nothing", "/api/v1/jobs/1/2/3", "/api/v2/me"]
    {
        println!("{path}");
        ask(server.request(Method::GET, path)).await.assert_refused(404, "not_found");
    }
}

#[tokio::test]
async fn a_wrong_method_is_told_the_right_ones() {
    let server = Server::start(Setup::clerk());
    // Of no route, but of real caches (RFC 9110 lets methods be added).
    let purge = || Method::from_bytes(b"PURGE").unwrap();
    for route in table() {
        for path in concrete(route.path) {
            let answer = ask(server.request_of(ADA, purge(), &path)).await;
            println!("{path}");
            answer.assert_refused(405, "method_not_allowed");
            let allowed = answer.header("allow").split(", ").any(|it| it == route.method.as_str());
            assert!(allowed, "{} is not in {:?}", route.method, answer.header("allow"));
        }
    }
    for path in ["/metrics", "/.well-known/jwks.json"] {
        let answer = ask(server.request(Method::POST, path)).await;
        answer.assert_refused(405, "method_not_allowed");
        assert_eq!(answer.header("allow"), "GET");
    }
}

#[tokio::test]
async fn every_route_that_is_not_public_wants_a_token() {
    let server = Server::start(Setup::clerk());
    let closed = table().into_iter().filter(|route| route.access != Access::Public);
    for route in closed {
        for path in concrete(route.path) {
            println!("{} {path}", route.method);
            let method = || Method::from_bytes(route.method.as_str().as_bytes()).unwrap();
            let bare = ask(server.request(method(), &path)).await;
            if route.method == "HEAD" {
                // Its answer has no body that could tell the code.
                assert_eq!(bare.status, 401);
                assert!(bare.header("www-authenticate").starts_with("Bearer"));
                continue;
            }
            bare.assert_refused(401, "unauthenticated");
            let broken = server.request(method(), &path).header(CONTENT_TYPE, JSON).body("{");
            ask(broken).await.assert_refused(401, "unauthenticated");
            let forged = ask(server.request(method(), &path).bearer_auth("a.b.c")).await;
            forged.assert_refused(401, "token_invalid");
        }
    }
    assert_eq!(server.log_position().await, 0);
}

#[tokio::test]
async fn a_body_that_cannot_be_read_is_refused_by_what_is_wrong_with_it() {
    let server = Server::start(Setup::clerk());
    let large = json!({ "prompt": "a", "style": "x".repeat(300 * 1024) }).to_string();
    let deep = "[".repeat(100_000);
    let table: [(&str, &[u8], &str, u16, &str); 13] = [
        ("videos/generate", b"", JSON, 400, "missing_body"),
        ("videos/generate", b"{\"prompt\":", JSON, 400, "invalid_json"),
        ("videos/generate", b"{\"prompt\":\"a\"} {}", JSON, 400, "invalid_json"),
        ("videos/generate", b"prompt=a", JSON, 400, "invalid_json"),
        ("videos/generate", b"{\"prompt\":\"\xff\"}", JSON, 400, "invalid_json"),
        ("videos/generate", deep.as_bytes(), JSON, 400, "invalid_json"),
        ("videos/generate", b"[]", JSON, 422, "validation_failed"),
        ("videos/generate", b"null", JSON, 422, "validation_failed"),
        ("videos/generate", large.as_bytes(), JSON, 413, "payload_too_large"),
        ("videos/generate", b"{\"prompt\":\"a\"}", "text/plain", 415, "unsupported_media_type"),
        ("videos/generate", b"{\"prompt\":\"a\"}", "nonsense", 415, "unsupported_media_type"),
        ("files/upload", b"{}", JSON, 415, "unsupported_media_type"),
        ("files/upload", b"{}", "multipart/form-data", 400, "multipart_invalid"),
    ];
    let before = first_request(&server).await;
    for (path, body, content_type, status, code) in table {
        println!("{path} {content_type} {:.40}", String::from_utf8_lossy(body));
        let request = server.request_of(ADA, Method::POST, path);
        let answer = ask(request.header(CONTENT_TYPE, content_type).body(body.to_vec())).await;
        answer.assert_refused(status, code);
    }
    assert_eq!(server.log_position().await, before);
}

#[tokio::test]
async fn an_invalid_field_is_named_and_nothing_is_recorded() {
    let server = Server::start(Setup::clerk());
    let file = server.upload(ADA, "notes.txt", "hello").await;
    let link = format!("files/{}/signed-url", file["file_id"].as_str().unwrap());
    let video = "videos/generate";
    let with = |field: &str, value: Value| {
        let mut body = json!({ "prompt": "a lighthouse" });
        body[field] = value;
        body
    };
    let mut table =
        vec![(video, json!({}), "prompt"), (video, json!({ "prompt": null }), "prompt")];
    let prompts = [json!(""), json!("  \n"), json!("a".repeat(2001)), json!("a\0b"), json!(5)];
    table.extend(prompts.map(|prompt| (video, with("prompt", prompt), "prompt")));
    let durations = [json!(0), json!(-1), json!(1e9), json!("10"), json!(1.5), json!([10])];
    table.extend(durations.map(|value| (video, with("duration", value), "duration")));
    for field in ["quality", "aspect_ratio", "seed", "engine", "style", "source_file_id"] {
        table.push((video, with(field, json!({})), field));
    }
    table.push((video, with("quality", json!("8k")), "quality"));
    table.push((video, with("source_file_id", json!(NOBODYS)), "source_file_id"));
    for value in [json!(0), json!(-1), json!(604_801), json!("60"), json!(1.5)] {
        table.push((link.as_str(), json!({ "expiresIn": value }), "expires_in"));
        table.push((link.as_str(), json!({ "expires_in": value }), "expires_in"));
    }
    let before = server.log_position().await;
    for (path, body, field) in table {
        println!("{path} {body:.60}");
        let answer = server.post(ADA, path, &body).await;
        answer.assert_refused(422, "validation_failed");
        let fields = answer.body["detail"]["fields"].as_object().unwrap();
        assert_eq!(fields.keys().collect::<Vec<_>>(), [field], "{}", answer.body);
    }
    assert_eq!(server.log_position().await, before);
    for (path, field) in [
        ("files?limit=0", "limit"),
        ("jobs?limit=201", "limit"),
        ("jobs?limit=x", "limit"),
        ("jobs?limit=1&limit=2", "limit"),
        ("jobs?cursor=x", "cursor"),
        ("jobs?state=x", "state"),
        ("jobs?state=queued&state=failed", "state"),
        ("jobs?kind=x", "kind"),
    ] {
        let answer = server.get(ADA, path).await;
        answer.assert_refused(422, "validation_failed");
        assert!(answer.body["detail"]["fields"][field].is_string(), "{}", answer.body);
    }
}

#[tokio::test]
async fn the_longest_prompt_counts_characters_and_not_bytes() {
    let server = Server::start(Setup::clerk());
    server.generate(ADA, &"ü".repeat(2000)).await;
}

#[tokio::test]
async fn what_is_not_there_and_what_is_anothers_are_answered_alike() {
    let server = Server::start(Setup::clerk());
    let job = server.generate(BOB, "for bob").await;
    let file = server.upload(BOB, "bob.txt", "for bob").await;
    let file = file["file_id"].as_str().unwrap();
    let session = session_of(BOB);
    let table = [
        (Method::GET, "jobs/{id}", job.as_str()),
        (Method::GET, "status/{id}", &job),
        (Method::GET, "jobs/{id}/events", &job),
        (Method::POST, "jobs/{id}/cancel", &job),
        (Method::POST, "jobs/{id}/retry", &job),
        (Method::POST, "videos/{id}/signed-url", &job),
        (Method::GET, "files/{id}", file),
        (Method::DELETE, "files/{id}", file),
        (Method::POST, "files/{id}/signed-url", file),
        (Method::DELETE, "sessions/{id}", &session),
    ];
    for (method, path, bobs) in table {
        let mut bodies = Vec::new();
        for id in [bobs, NOBODYS, "no-uuid", "%00", "..%2f..%2fetc"] {
            let path = path.replace("{id}", id);
            println!("{method} {path}");
            let answer = ask(server.request_of(ADA, method.clone(), &path)).await;
            answer.assert_refused(404, "not_found");
            bodies.push(answer.body);
        }
        bodies.dedup();
        assert_eq!(bodies.len(), 1, "{bodies:?}");
    }
    assert_eq!(server.get(BOB, &format!("jobs/{job}")).await.data(200)["state"], "queued");
    server.get(BOB, &format!("files/{file}")).await.data(200);
    server.get(BOB, "me").await.data(200);
}

#[tokio::test]
async fn an_upload_that_is_not_whole_or_too_large_leaves_nothing() {
    let server = Server::start(Setup::clerk().with("MAX_UPLOAD_BYTES", "1000"));
    let part = |headers: &str, bytes: &str| {
        format!("--b\r\nContent-Disposition: form-data; {headers}\r\n\r\n{bytes}\r\n")
    };
    let file = |bytes: &str| part("name=\"file\"; filename=\"a.txt\"", bytes);
    let table = [
        (String::new(), 400, "multipart_invalid"),
        ("no boundary at all".to_owned(), 400, "multipart_invalid"),
        (file("cut"), 400, "multipart_invalid"),
        ("--b\r\n\r\nno headers\r\n--b--\r\n".to_owned(), 400, "multipart_invalid"),
        (part("name=\"other\"", "x") + "--b--\r\n", 422, "validation_failed"),
        (file("1") + &file("2") + "--b--\r\n", 422, "validation_failed"),
        (file(&"x".repeat(1001)) + "--b--\r\n", 413, "payload_too_large"),
    ];
    let before = first_request(&server).await;
    for (body, status, code) in table {
        println!("{body:.60}");
        let request = server.request_of(ADA, Method::POST, "files/upload").body(body);
        let answer = ask(request.header(CONTENT_TYPE, "multipart/form-data; boundary=b")).await;
        answer.assert_refused(status, code);
        if status == 422 {
            assert!(answer.body["detail"]["fields"]["file"].is_string(), "{}", answer.body);
        }
    }
    assert_eq!(server.log_position().await, before);
    assert_eq!(server.get(ADA, "files").await.data(200)["items"], json!([]));
    assert_eq!(server.upload(ADA, "most.txt", &"x".repeat(1000)).await["size"], 1000);
}

#[tokio::test]
async fn a_foreign_origin_may_read_but_not_write() {
    let server = Server::start(Setup::clerk().with("ALLOWED_ORIGINS", "https://app.example.com"));
    let post = |origin: &str| {
        let request = server.request_of(ADA, Method::POST, "videos/generate");
        ask(request.header("origin", origin).json(&json!({ "prompt": "a" })))
    };
    let foreign = ["https://app.example.com.evil.test", "http://app.example.com", "null"];
    for origin in foreign.into_iter().chain(["https://app.example.com:444"]) {
        post(origin).await.assert_refused(403, "invalid_origin");
    }
    post("https://app.example.com").await.data(202);
}

#[tokio::test]
async fn a_used_up_budget_says_when_to_come_again() {
    let server = Server::start(Setup::clerk().with("RATE_LIMIT_WRITES", "2/1h"));
    let body = json!({ "prompt": "a" });
    for remaining in ["1", "0"] {
        let answer = server.post(ADA, "videos/generate", &body).await;
        assert_eq!(answer.header("x-ratelimit-limit"), "2");
        assert_eq!(answer.header("x-ratelimit-remaining"), remaining);
        answer.data(202);
    }
    let refused = server.post(ADA, "videos/generate", &body).await;
    refused.assert_refused(429, "rate_limited");
    assert!(refused.header("retry-after").parse::<u64>().is_ok_and(|seconds| seconds > 0));
    server.get(ADA, "jobs").await.data(200);
    server.post(BOB, "videos/generate", &body).await.data(202);
}

#[tokio::test]
async fn a_request_id_comes_back_and_an_unusable_one_is_replaced() {
    let server = Server::start(Setup::clerk());
    let token = signed(&claims(ADA));
    let id_for = async |given: &str| {
        let request = server.request(Method::GET, "me").bearer_auth(&token);
        ask(request.header("x-request-id", given)).await.header("x-request-id").to_owned()
    };
    assert_eq!(id_for("req-1").await, "req-1");
    for unusable in ["two words", &"x".repeat(129)] {
        let fresh = id_for(unusable).await;
        assert!(!fresh.is_empty() && fresh != unusable, "{fresh}");
    }
}

/// Provisions Ada, so that what follows has nothing else to record; gives the log's position.
async fn first_request(server: &Server) -> u64 {
    server.get(ADA, "me").await.data(200);
    server.log_position().await
}
