//! How much may be asked for, and by whom.

use reqwest::{Method, RequestBuilder};
use serde_json::json;

use super::clerk_user;
use crate::server::{Answer, Server, Setup, ask, claims, signed};

const ADA: &str = "user_ada";

fn from(request: RequestBuilder, address: &str) -> RequestBuilder {
    request.header("x-forwarded-for", address)
}

fn assert_limited(answer: &Answer) {
    answer.assert_refused(429, "rate_limited");
    let seconds = answer.header("retry-after").parse::<u64>();
    assert!(seconds.is_ok_and(|seconds| (1..=120).contains(&seconds)), "{:?}", answer.headers);
}

#[tokio::test]
async fn nobody_is_limited_by_its_address_and_a_user_behind_the_same_one_is_not() {
    let server = Server::start(Setup::clerk().with("RATE_LIMIT_ANONYMOUS", "4/1h"));
    let nobody = || server.request(Method::GET, "me");
    let forged = || nobody().bearer_auth("a.b.c");
    let unsigned = || server.request(Method::POST, "webhooks/clerk").body("{}");
    let link =
        || server.request(Method::GET, "files/secure/x?user_id=a&expires=9999999999&signature=0");
    ask(nobody()).await.assert_refused(401, "unauthenticated");
    ask(forged()).await.assert_refused(401, "token_invalid");
    ask(unsigned()).await.assert_refused(400, "webhook_invalid");
    ask(link()).await.assert_refused(403, "link_signature_invalid");
    let document = || server.request(Method::GET, "openapi.json");
    for request in [nobody(), forged(), unsigned(), link(), document()] {
        let answer = ask(request).await;
        answer.assert_refused(429, "rate_limited");
        assert!(answer.header("retry-after").parse::<u64>().is_ok_and(|seconds| seconds > 0));
    }
    // The header of a client that is no proxy of ours is worth nothing.
    ask(from(nobody(), "192.0.2.1")).await.assert_refused(429, "rate_limited");

    server.get(ADA, "me").await.data(200);
    for second in 0..10 {
        server.deliver("user.updated", &clerk_user(ADA, second)).await.data(200);
    }
    for path in ["system/health", "system/ready"] {
        ask(server.request(Method::GET, path)).await.data(200);
    }
    let file = server.upload(ADA, "a.txt", "hello").await;
    let path = format!("files/{}/signed-url", file["file_id"].as_str().unwrap());
    let link = server.post(ADA, &path, &json!({})).await.data(200);
    let link = link["url"].as_str().unwrap().strip_prefix(&server.address).unwrap();
    for _ in 0..10 {
        assert_eq!(ask(server.request(Method::GET, link)).await.status, 200);
    }
    let mut late = claims(ADA);
    late["exp"] = json!(0);
    let late = ask(nobody().bearer_auth(signed(&late))).await;
    late.assert_refused(401, "token_expired");
}

#[tokio::test]
async fn behind_a_proxy_that_is_trusted_each_client_has_a_budget_of_its_own() {
    let setup = Setup::clerk().with("RATE_LIMIT_ANONYMOUS", "1/1m");
    let server = Server::start(setup.with("T2M_TRUSTED_PROXIES", "127.0.0.0/8"));
    let nobody = async |address: &str| ask(from(server.request(Method::GET, "me"), address)).await;
    nobody("192.0.2.1").await.assert_refused(401, "unauthenticated");
    assert_limited(&nobody("192.0.2.1").await);
    assert_limited(&nobody("192.0.2.9, 192.0.2.1").await);
    nobody("192.0.2.2").await.assert_refused(401, "unauthenticated");
    nobody("2001:db8::1").await.assert_refused(401, "unauthenticated");
    assert_limited(&nobody("2001:db8::2").await);

    let request = from(server.request_of(ADA, Method::GET, "me"), "192.0.2.7");
    assert_eq!(ask(request).await.data(200)["session"]["ip_address"], "192.0.2.7");
}

#[tokio::test]
async fn links_have_a_budget_of_their_own() {
    let setup = Setup::clerk().with("RATE_LIMIT_WRITES", "1/1h").with("RATE_LIMIT_LINKS", "40/1h");
    let server = Server::start(setup.with("RATE_LIMIT_READS", "1/1h"));
    let file = server.upload(ADA, "a.txt", "hello").await;
    let path = format!("files/{}/signed-url", file["file_id"].as_str().unwrap());
    // What the seed's player asks for in three seconds.
    for asked in 1..=37 {
        let answer = server.post(ADA, &path, &json!({})).await;
        assert_eq!(answer.header("x-ratelimit-limit"), "40");
        assert_eq!(answer.header("x-ratelimit-remaining"), (40 - asked).to_string());
        answer.data(200);
    }
    for _ in 38..=40 {
        server.post(ADA, &path, &json!({})).await.data(200);
    }
    let refused = server.post(ADA, &path, &json!({})).await;
    refused.assert_refused(429, "rate_limited");
    assert!(!refused.header("retry-after").is_empty());
}

#[tokio::test]
async fn every_answer_to_a_user_says_how_its_budget_stands() {
    let server = Server::start(Setup::clerk().with("RATE_LIMIT_READS", "3/1h"));
    for (path, status, remaining) in
        [("me", 200, "2"), ("admin/users", 403, "1"), ("jobs/x", 404, "0"), ("me", 429, "0")]
    {
        let answer = server.get(ADA, path).await;
        assert_eq!(answer.status, status);
        assert_eq!(answer.header("x-ratelimit-limit"), "3");
        assert_eq!(answer.header("x-ratelimit-remaining"), remaining, "{path}");
        assert!(answer.header("x-ratelimit-reset").parse::<i64>().is_ok());
    }
    let invalid = server.post(ADA, "videos/generate", &json!({})).await;
    assert_eq!(invalid.status, 422);
    assert!(!invalid.header("x-ratelimit-remaining").is_empty());
}
