//! The front end of the seeds `t2m-auth-and-sessions` and `animathic-auth-fix`, as literally as node
//! can run it (`tests/clients/seeds`), against the real server.

use serde_json::json;

use crate::clients;
use crate::server::{Server, Setup, claims, now, signed};

#[tokio::test]
async fn the_front_end_of_the_seeds_works_from_an_expired_token_to_the_player() {
    let server = Server::start(Setup::clerk().with("T2M_ENGINE", "storyboard"));
    let mut old = claims("user_ada");
    old["iat"] = json!(now() - 7200);
    old["nbf"] = json!(now() - 7200);
    old["exp"] = json!(now() - 3600);
    let given = json!({
        "base_url": format!("{}/api/v1", server.address),
        "expired": signed(&old),
        "fresh": signed(&claims("user_ada")),
    });
    // It blocks, and the server is another process.
    let shown = tokio::task::spawn_blocking(move || clients::run("seeds/run.mjs", &given));
    let shown = shown.await.unwrap();

    assert_eq!(shown["expired_error"], "Token has expired");
    assert_eq!(shown["after_refresh"], json!({ "status": 200, "renewals": 1 }));
    assert_eq!(shown["renewals_of_a_fresh_token"], 0);
    assert_eq!(shown["renewals_of_an_old_token"], 1);

    assert_eq!(shown["upload"]["success"], true);
    assert_eq!(shown["upload"]["data"]["filename"], "notes.txt");
    let listed = &shown["files"]["data"]["items"][0];
    assert_eq!(listed["file_id"], shown["upload"]["data"]["file_id"]);
    assert_eq!(listed["metadata"], json!({ "purpose": "seed" }));

    assert_eq!(shown["button_before"], json!({ "disabled": false, "text": "Generate Video" }));
    assert_eq!(shown["button_while"], json!({ "disabled": true, "text": "Generating..." }));
    assert_eq!(shown["early_player"]["signedUrl"], json!(null));
    assert_eq!(shown["early_player"]["error"], "The job is not completed");
    assert_eq!(shown["button_after"], json!({ "disabled": false, "text": "Generate Video" }));
    assert_eq!(shown["progress"], 100);
    let history: Vec<&str> =
        shown["history"].as_array().unwrap().iter().filter_map(|status| status.as_str()).collect();
    assert_eq!(history[..2], ["starting", "processing"]);
    assert_eq!(history.last(), Some(&"completed"));
    let known = ["starting", "processing", "completed"];
    assert!(history.iter().all(|status| known.contains(status)), "{history:?}");

    assert_eq!(shown["player_error"], json!(null));
    let video = &shown["video"];
    assert_eq!((&video["status"], &video["type"]), (&json!(206), &json!("video/mp4")), "{video}");
    assert_eq!(video["brand"], "ftyp");
    assert!(video["size"].as_u64().is_some_and(|size| size > 1000), "{video}");
    let attached = video["disposition"].as_str().is_some_and(|it| it.starts_with("attachment"));
    assert!(!attached, "the player would be given a download: {video}");

    let sentence = shown["empty_prompt"].as_str().unwrap();
    assert!(sentence.starts_with("Some fields are not valid: prompt"), "{sentence}");
    assert_eq!(shown["missing_job"], "Not found");
}
