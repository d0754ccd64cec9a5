//! Bytes and keys, which lie where all nodes see them; and pieces of uploads, which do not.

use std::path::Path;
use std::time::Instant;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures_util::future::join_all;
use reqwest::{Method, RequestBuilder};
use serde_json::json;

use super::{ADA, Cluster, NODES, as_admin, text};
use crate::engine_faults::until;
use crate::server::{Server, UNDER, ask};

#[tokio::test]
async fn a_file_that_was_uploaded_at_one_node_is_downloaded_from_the_others() {
    let cluster = Cluster::start_as(|setup| setup.with("FILE_SIGNING_SECRET", "")).await;
    for (number, node) in cluster.nodes.iter().enumerate() {
        let words = format!("hello from {number}");
        let file = node.upload(ADA, "a.txt", &words).await;
        cluster.caught_up().await;
        let path = format!("files/{}/signed-url", text(&file, "file_id"));
        for signing in &cluster.nodes {
            let link = text(&signing.post(ADA, &path, &json!({})).await.data(200), "url");
            // Without a public address a link leads to the node that gave it.
            assert!(link.starts_with(&signing.address), "{link}");
            let below = &link[link.find("/api").unwrap()..];
            for other in &cluster.nodes {
                let answer = ask(other.request(Method::GET, below)).await;
                assert_eq!((answer.status, &answer.bytes[..]), (200, words.as_bytes()));
                let range = other.request(Method::GET, below).header("range", "bytes=0-4");
                assert_eq!(ask(range).await.bytes, b"hello");
            }
        }
    }
    for node in &cluster.nodes {
        assert!(!node.data_dir().join("blobs/sha256").exists());
    }
}

fn tus(node: &Server, method: Method, path: &str) -> RequestBuilder {
    node.request_of(ADA, method, path).header("tus-resumable", "1.0.0")
}

fn piece(node: &Server, path: &str, offset: usize, bytes: &'static str) -> RequestBuilder {
    let request = tus(node, Method::PATCH, path).header("upload-offset", offset);
    request.header("content-type", "application/offset+octet-stream").body(bytes)
}

/// What the README says: an upload in pieces belongs to its node, and the others say so.
#[tokio::test]
async fn an_upload_in_pieces_goes_on_at_its_node_alone_and_its_file_is_everywhere() {
    let cluster = Cluster::start().await;
    let begun = tus(cluster.node(0), Method::POST, "files/tus").header("upload-length", 10);
    let begun = ask(begun).await;
    assert_eq!(begun.status, 201, "{}", begun.body);
    let location = begun.header("location").to_owned();
    let path = &location[location.find("/api").unwrap()..];
    assert_eq!(ask(piece(cluster.node(0), path, 0, "hello")).await.status, 204);
    cluster.caught_up().await;
    for other in 1..NODES {
        let node = cluster.node(other);
        // A client of tus begins anew at either.
        assert_eq!(ask(tus(node, Method::HEAD, path)).await.status, 404);
        ask(piece(node, path, 5, "world")).await.assert_refused(404, "not_found");
    }
    // Nothing of that has harmed it.
    let head = ask(tus(cluster.node(0), Method::HEAD, path)).await;
    assert_eq!(head.header("upload-offset"), "5");
    let done = ask(piece(cluster.node(0), path, 5, "world")).await;
    assert_eq!(done.status, 204, "{}", done.body);
    let file_id = done.header("x-file-id").to_owned();
    cluster.caught_up().await;
    for node in &cluster.nodes {
        let head = ask(tus(node, Method::HEAD, path)).await;
        assert_eq!((head.status, head.header("x-file-id")), (200, &file_id[..]));
        let file = node.get(ADA, &format!("files/{file_id}")).await.data(200);
        assert_eq!(file["size"], 10);
    }
}

#[tokio::test]
async fn nodes_that_start_at_once_on_an_empty_store_seal_with_the_same_keys() {
    const USERS: usize = 5;
    // Without one of their own they agree on the one that the first has made.
    let cluster = Cluster::start_as(|setup| setup.with("T2M_MASTER_KEY", "")).await;
    // The first request of each user comes to all nodes at once: each would make the user's key.
    for user in 0..USERS {
        let user = format!("user_{user}");
        let asked = cluster.nodes.iter().enumerate().map(async |(number, node)| {
            node.generate(&user, &format!("a secret of {number}")).await
        });
        let jobs = join_all(asked).await;
        cluster.caught_up().await;
        for (number, job) in jobs.iter().enumerate() {
            for node in &cluster.nodes {
                let shown = node.get(&user, &format!("jobs/{job}")).await.data(200);
                assert_eq!(shown["prompt"], format!("a secret of {number}"));
            }
        }
    }
    // What one user's key does not open, another node cannot read after a replay either.
    cluster.assert_alike(&["user_0"]).await;
    let rotated = cluster.node(0).run(&["keys", "rotate"]);
    let errors = String::from_utf8_lossy(&rotated.stderr);
    assert!(!rotated.status.success() && errors.contains("T2M_MASTER_KEY=NEW,OLD"), "{errors}");
}

#[tokio::test]
async fn a_node_with_another_master_key_does_not_start() {
    let cluster = Cluster::start().await;
    cluster.node(0).generate(ADA, "a secret").await;
    // Without any it would need that of the others, and makes none of its own.
    for other in [STANDARD.encode([8; 32]), String::new()] {
        let directory = tempfile::tempdir().unwrap();
        let setup = cluster.setup.clone().with("T2M_MASTER_KEY", other);
        // It would run for ever if it started.
        let output = setup.with(UNDER, "/usr/bin/timeout 60").run(directory.path(), &["serve"]);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && output.status.code() != Some(124), "it runs");
        assert!(errors.contains("T2M_MASTER_KEY"), "{errors}");
    }
    cluster.node(1).get(ADA, "me").await.data(200);
}

#[tokio::test]
async fn who_is_erased_at_one_node_can_be_read_at_none_and_not_from_their_disks() {
    const EMAIL: &str = "who-was-that@example.com";
    let cluster = Cluster::start().await;
    let at = crate::server::now() * 1000;
    let data = json!({
        "id": ADA, "object": "user", "first_name": "Ada", "primary_email_address_id": "idn_1",
        "email_addresses": [{ "id": "idn_1", "email_address": EMAIL }],
        "public_metadata": {}, "created_at": at, "updated_at": at,
    });
    cluster.node(0).deliver("user.created", &data).await.data(200);
    cluster.caught_up().await;
    for node in &cluster.nodes {
        assert_eq!(node.get(ADA, "me").await.data(200)["user"]["email"], EMAIL);
    }
    let began = Instant::now();
    let gone = json!({ "id": ADA, "object": "user", "deleted": true });
    cluster.node(1).deliver("user.deleted", &gone).await.data(200);
    for node in &cluster.nodes {
        until("it shows nothing any more", async || {
            let user = as_admin(node, Method::GET, &format!("admin/users/{ADA}"), None).await;
            !user.body.to_string().contains(EMAIL)
        })
        .await;
        println!("erased at a node after {:?}", began.elapsed());
        until("nothing is left on its disk", async || !holds(node.data_dir(), EMAIL)).await;
        println!("and from its disk after {:?}", began.elapsed());
    }
    cluster.assert_as_replayed();
}

/// Whether a file below a folder has this text in it.
fn holds(folder: &Path, text: &str) -> bool {
    std::fs::read_dir(folder).unwrap().flatten().any(|entry| {
        let path = entry.path();
        if path.is_dir() {
            return holds(&path, text);
        }
        // It may be gone since it was listed.
        let bytes = std::fs::read(&path).unwrap_or_default();
        bytes.windows(text.len()).any(|window| window == text.as_bytes())
    })
}
