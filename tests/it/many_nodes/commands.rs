//! Commands on the same entity at all nodes at once.

use std::collections::HashSet;

use futures_util::future::join_all;
use reqwest::multipart::{Form, Part};
use reqwest::{Method, RequestBuilder};
use serde_json::json;

use super::{ADA, Cluster, NODES, count, text};
use crate::server::ask;

const ROUNDS: usize = 8;
const AT_ONCE: usize = 3 * NODES;

#[tokio::test]
async fn one_idempotency_key_at_all_nodes_at_once_makes_one_job_and_one_file() {
    let cluster = Cluster::start().await;
    // Nobody has heard of the user either: nine requests provision it and begin its session.
    for round in 0..ROUNDS {
        let key = |request: RequestBuilder| request.header("idempotency-key", format!("k{round}"));
        let body = json!({ "prompt": format!("picture {round}") });
        let asked = (0..AT_ONCE).map(|number| {
            let request =
                cluster.node(number).request_of(ADA, Method::POST, "videos/generate").json(&body);
            ask(key(request))
        });
        let answers = join_all(asked).await;
        let fresh = answers.iter().filter(|it| it.header("idempotent-replayed") != "true").count();
        let ids: HashSet<String> =
            answers.into_iter().map(|answer| text(&answer.data(202), "job_id")).collect();
        assert_eq!((ids.len(), fresh), (1, 1), "round {round}");

        let asked = (0..AT_ONCE).map(|number| {
            let part = Part::text(format!("hello {round}")).file_name("a.txt");
            let form = Form::new().part("file", part.mime_str("text/plain").unwrap());
            let request = cluster.node(number).request_of(ADA, Method::POST, "files/upload");
            ask(key(request).multipart(form))
        });
        let ids: HashSet<String> = join_all(asked)
            .await
            .into_iter()
            .map(|answer| text(&answer.data(200), "file_id"))
            .collect();
        assert_eq!(ids.len(), 1, "round {round}");
    }
    cluster.caught_up().await;
    for node in &cluster.nodes {
        let usage = &node.get(ADA, "me").await.data(200)["usage"];
        assert_eq!(usage["jobs"], json!({ "queued": ROUNDS }));
        assert_eq!((&usage["files"], &usage["bytes_stored"]), (&json!(ROUNDS), &json!(7 * ROUNDS)));
    }
    let story = cluster.story().await;
    assert_eq!(count(&story[&format!("user-{ADA}")], "user.registered.v1"), 1);
    cluster.assert_alike(&[ADA]).await;
}

#[tokio::test]
async fn cancels_retries_and_deletions_at_all_nodes_at_once_have_one_effect() {
    let cluster = Cluster::start().await;
    let (mut jobs, mut files) = (Vec::new(), Vec::new());
    for number in 0..ROUNDS {
        jobs.push(cluster.node(number).generate(ADA, "a lighthouse").await);
        let file = cluster.node(number).upload(ADA, "a.txt", "hello").await;
        files.push(text(&file, "file_id"));
    }
    cluster.caught_up().await;
    for job in &jobs {
        for (what, lost) in [("cancel", None), ("retry", Some(409))] {
            let path = format!("jobs/{job}/{what}");
            let asked = (0..AT_ONCE).map(async |number| {
                let answer = cluster.node(number).post(ADA, &path, &json!({})).await;
                (answer.status, answer.body["data"]["state"].clone())
            });
            let answers = join_all(asked).await;
            let won = answers.iter().filter(|(status, _)| *status == 200).count();
            let all_fine =
                answers.iter().all(|(status, _)| *status == 200 || Some(*status) == lost);
            // Who cancels what is cancelled has its will; who retries what waits is told.
            let wanted = if lost.is_some() { 1 } else { AT_ONCE };
            assert!(all_fine && won == wanted, "{what}: {answers:?}");
        }
    }
    for file in &files {
        let path = format!("files/{file}");
        let asked = (0..AT_ONCE).map(|number| cluster.node(number).delete(ADA, &path));
        for answer in join_all(asked).await {
            assert!([200, 404].contains(&answer.status), "{}", answer.body);
        }
    }
    let story = cluster.story().await;
    let once =
        ["job.requested.v1", "job.cancel_requested.v1", "job.cancelled.v1", "job.retried.v1"];
    for job in &jobs {
        assert_eq!(story[&format!("job-{job}")], once);
    }
    for file in &files {
        assert_eq!(story[&format!("file-{file}")], ["file.stored.v1", "file.deleted.v2"]);
    }
    cluster.caught_up().await;
    for node in &cluster.nodes {
        let usage = &node.get(ADA, "me").await.data(200)["usage"];
        assert_eq!(usage["jobs"], json!({ "queued": ROUNDS }));
        assert_eq!((&usage["files"], &usage["bytes_stored"]), (&json!(0), &json!(0)));
    }
    cluster.assert_alike(&[ADA]).await;
}

#[tokio::test]
async fn what_is_added_to_one_user_at_all_nodes_at_once_is_all_there() {
    const MEMBERSHIPS: usize = 30;
    let cluster = Cluster::start().await;
    cluster.node(0).get(ADA, "me").await.data(200);
    let delivered = (0..MEMBERSHIPS).map(async |number| {
        let data = json!({
            "id": format!("orgmem_{number}"), "role": "org:member", "permissions": [],
            "organization": { "id": format!("org_{number:02}"), "name": "Acme", "slug": "acme" },
            "public_user_data": { "user_id": ADA },
        });
        // As Clerk does: until it is answered 2xx, and under the same id.
        for attempt in 0..50 {
            let id = format!("msg_{number}");
            let delivery =
                cluster.node(number).delivery(&id, "organizationMembership.created", &data);
            let answer = ask(delivery).await;
            if answer.status == 200 {
                return attempt;
            }
            assert_eq!(answer.status, 503, "{}", answer.body);
            println!("put off: {}", answer.body["code"]);
        }
        panic!("membership {number} was never taken");
    });
    let repeated: usize = join_all(delivered).await.into_iter().sum();
    println!("{MEMBERSHIPS} commands on one stream at once: {repeated} were put off");
    assert_eq!(repeated, 0, "of {MEMBERSHIPS}");
    cluster.caught_up().await;
    for node in &cluster.nodes {
        let me = node.get(ADA, "me").await.data(200);
        let organizations: HashSet<String> = me["organizations"]
            .as_array()
            .unwrap()
            .iter()
            .map(|organization| text(organization, "organization_id"))
            .collect();
        assert_eq!(organizations.len(), MEMBERSHIPS, "{me}");
    }
    let story = cluster.story().await;
    let joined = count(&story[&format!("user-{ADA}")], "user.organization_joined.v1");
    assert_eq!(joined, MEMBERSHIPS);
    cluster.assert_alike(&[ADA]).await;
}

#[tokio::test]
async fn one_delivery_of_clerks_at_all_nodes_at_once_is_taken_in_once() {
    let cluster = Cluster::start().await;
    let at = crate::server::now() * 1000;
    let user = json!({
        "id": ADA, "object": "user", "first_name": "Ada", "primary_email_address_id": "idn_1",
        "email_addresses": [{ "id": "idn_1", "email_address": "ada@example.com" }],
        "public_metadata": { "role": "creator" }, "created_at": at, "updated_at": at,
    });
    let session = json!({
        "id": "sess_1", "object": "session", "user_id": ADA, "status": "active",
        "created_at": at, "updated_at": at, "expire_at": at + 3_600_000,
    });
    for (kind, data) in [("user.created", &user), ("session.created", &session)] {
        let asked =
            (0..AT_ONCE).map(|number| ask(cluster.node(number).delivery("msg_1", kind, data)));
        for answer in join_all(asked).await {
            answer.data(200);
        }
    }
    let story = cluster.story().await;
    let users = ["user.registered.v1", "user.profile_changed.v1", "user.access_changed.v1"];
    assert_eq!(story[&format!("user-{ADA}")], users);
    assert_eq!(story["session-sess_1"], ["session.started.v1"]);
    cluster.assert_alike(&[ADA]).await;
}
