//! Signed links: in which order they are judged.

use reqwest::Method;
use t2m::media::signed_url::SigningSecrets;

use crate::server::{Answer, LINK_SECRET, Server, Setup, ask, now};

const NOBODYS_FILE: &str = "0190d3a0-0000-7000-8000-000000000001";

async fn follow(server: &Server, link: &str) -> Answer {
    ask(server.request(Method::GET, link)).await
}

fn signature(file_id: &str, user_id: &str, expires: i64) -> String {
    SigningSecrets::parse(LINK_SECRET).expect("a secret").sign(file_id, user_id, expires)
}

#[tokio::test]
async fn a_link_is_judged_by_its_form_then_its_time_then_its_signature_then_its_file() {
    let server = Server::start(Setup::clerk());
    let file = server.upload("user_ada", "notes.txt", "hello").await;
    let file_id = file["file_id"].as_str().unwrap();
    let (past, future) = (now() - 1000, now() + 1000);
    let link = |id: &str, user: &str, expires: i64, signature: &str| {
        format!("files/secure/{id}?user_id={user}&expires={expires}&signature={signature}")
    };
    let good = signature(file_id, "user_ada", future);
    let table = [
        // Each is wrong in every later respect too.
        (format!("files/secure/{NOBODYS_FILE}"), 400, "link_malformed"),
        (format!("files/secure/{NOBODYS_FILE}?expires={past}&signature=0"), 400, "link_malformed"),
        (
            format!("files/secure/{NOBODYS_FILE}?user_id=a&signature=0&expires=soon"),
            400,
            "link_malformed",
        ),
        (format!("files/secure/{NOBODYS_FILE}?user_id=a&expires={past}"), 400, "link_malformed"),
        (link(NOBODYS_FILE, "a", past, "0"), 410, "link_expired"),
        (
            link(file_id, "user_ada", past, &signature(file_id, "user_ada", past)),
            410,
            "link_expired",
        ),
        (link(NOBODYS_FILE, "a", future, "0"), 403, "link_signature_invalid"),
        (link(file_id, "user_ada", future + 1, &good), 403, "link_signature_invalid"),
        (link(file_id, "user_bob", future, &good), 403, "link_signature_invalid"),
        (link(NOBODYS_FILE, "user_ada", future, &good), 403, "link_signature_invalid"),
        (
            link(NOBODYS_FILE, "user_ada", future, &signature(NOBODYS_FILE, "user_ada", future)),
            404,
            "not_found",
        ),
        (
            link(file_id, "user_bob", future, &signature(file_id, "user_bob", future)),
            404,
            "not_found",
        ),
    ];
    for (link, status, code) in table {
        println!("{link}");
        follow(&server, &link).await.assert_refused(status, code);
    }
    let whole = follow(&server, &link(file_id, "user_ada", future, &good)).await;
    assert_eq!((whole.status, whole.bytes.as_slice()), (200, &b"hello"[..]));
    assert!(whole.header("content-disposition").starts_with("attachment"));
}

#[tokio::test]
async fn the_link_of_a_deleted_file_leads_nowhere() {
    let server = Server::start(Setup::clerk());
    let file = server.upload("user_ada", "notes.txt", "hello").await;
    let path = format!("files/{}", file["file_id"].as_str().unwrap());
    let link = server.post("user_ada", &format!("{path}/signed-url"), &serde_json::json!({})).await;
    let link = link.data(200)["url"].as_str().unwrap().to_owned();
    let link = link.strip_prefix(&server.address).unwrap();
    assert_eq!(follow(&server, link).await.status, 200);
    server.delete("user_ada", &path).await.data(200);
    follow(&server, link).await.assert_refused(404, "not_found");
    server.get("user_ada", &path).await.assert_refused(404, "not_found");
}
