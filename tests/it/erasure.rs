//! A deleted user leaves nothing behind: not in the log, not in any file, not in what was printed.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use reqwest::Method;
use reqwest::multipart::{Form, Part};
use serde_json::json;
use t2m::clock::Clock;
use t2m::log::{EmbeddedLog, EventLog, Expected, NewEvent};
use t2m::views::Views;

use crate::server::{LOG_FILE, Server, Setup, ask, now};

const ADA: &str = "user_ada";
const MARKER: &str = "marker-5b0f";
const ADDRESS: &str = "203.0.113.77";

fn setup() -> Setup {
    Setup::clerk().with("T2M_TRUSTED_PROXIES", "127.0.0.1")
}

/// Files below a folder that hold one of the marks.
fn holding(folder: &Path, wanted: impl Fn(&str) -> bool) -> Vec<String> {
    let (mut found, mut folders) = (vec![], vec![folder.to_owned()]);
    while let Some(folder) = folders.pop() {
        // What a running server removes meanwhile is not there any more.
        let entries = std::fs::read_dir(folder).into_iter().flatten();
        for path in entries.map(|entry| entry.unwrap().path()) {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() {
                folders.push(path);
            } else if wanted(&name)
                && let Ok(bytes) = std::fs::read(&path)
                && [MARKER, ADDRESS]
                    .iter()
                    .any(|mark| bytes.windows(mark.len()).any(|part| part == mark.as_bytes()))
            {
                found.push(path.display().to_string());
            }
        }
    }
    found
}

fn marked(what: &str) -> String {
    format!("{MARKER}-{what}")
}

async fn until(what: &str, mut done: impl AsyncFnMut() -> bool) {
    for _ in 0..600 {
        if done().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("{what} has not come");
}

fn clerk_user(id: &str) -> serde_json::Value {
    json!({
        "id": id, "object": "user", "first_name": marked("first"), "last_name": marked("last"),
        "username": marked("username"), "image_url": format!("https://img.test/{MARKER}.png"),
        "primary_email_address_id": "idn_1",
        "email_addresses": [{ "id": "idn_1", "email_address": format!("{MARKER}@example.com") }],
        "public_metadata": {}, "created_at": now() * 1000, "updated_at": now() * 1000,
    })
}

/// Puts the marker wherever a user can.
async fn leave_traces(server: &Server, user: &str) {
    server.deliver("user.created", &clerk_user(user)).await.data(200);
    let visit = server.request_of(user, Method::GET, "me").header("x-forwarded-for", ADDRESS);
    let me = ask(visit.header("user-agent", marked("browser"))).await.data(200);
    assert_eq!(me["user"]["email"], format!("{MARKER}@example.com"));
    let sessions = server.get(user, "sessions").await.data(200).to_string();
    assert!(sessions.contains(ADDRESS) && sessions.contains(&marked("browser")), "{sessions}");

    let part = Part::text("harmless").file_name(marked("file.txt"));
    let form = Form::new().part("file", part).text("note", marked("metadata"));
    ask(server.request_of(user, Method::POST, "files/upload").multipart(form)).await.data(200);
    let metadata = format!("filename {}", STANDARD.encode(marked("upload.txt")));
    let upload = server.request_of(user, Method::POST, "files/tus");
    let upload = upload.header("tus-resumable", "1.0.0").header("upload-length", 5);
    assert_eq!(ask(upload.header("upload-metadata", metadata)).await.status, 201);

    let wanted = json!({ "prompt": marked("prompt"), "style": marked("style of a film") });
    let asked = server.post(user, "videos/generate", &wanted).await.data(202);
    assert_eq!(asked["options"]["style"], marked("style of a film"));
    let part = Part::text("harmless").file_name(marked("novel.txt"));
    let form = Form::new().part("file", part);
    let form = form.text("api_key", marked("key")).text("style_data", marked("style"));
    let asked = ask(server.request_of(user, Method::POST, "translations").multipart(form)).await;
    assert_eq!(asked.data(202)["options"]["style_data"], marked("style"));
    let unusable = json!({
        "id": format!("no id, {}", marked("letter")), "object": "session", "user_id": user,
        "status": "active", "created_at": now() * 1000, "updated_at": now() * 1000,
    });
    let kept = server.deliver("session.created", &unusable).await.data(200);
    assert_eq!(kept["outcome"], "unusable");
}

/// Its session may have ended already, or not yet.
async fn assert_gone(server: &Server, user: &str) {
    let refused = server.get(user, "me").await;
    assert!(refused.body.to_string().contains("user_deleted"), "{}", refused.body);
    assert!(matches!(refused.status, 401 | 403), "{}", refused.status);
}

/// The log is whole, and tells the read model of the server that has stopped.
fn prove_replay(server: &Server, target: &str) {
    server.printed(&["log", "verify"]);
    let views = Views::open(&server.data_dir().join("views.sqlite")).unwrap();
    let printed = server.printed(&["replay", "--to", target]);
    for (table, rows, digest) in views.dump().unwrap() {
        let line = format!("{table:<12}{rows:>9} rows  sha256 {digest}");
        assert!(printed.contains(&line), "no {line:?} in\n{printed}");
    }
}

#[tokio::test]
async fn a_deleted_user_is_found_nowhere_on_the_disk_and_the_log_stays_whole() {
    let output = tempfile::NamedTempFile::new().unwrap();
    let setup = setup().with(LOG_FILE, output.path().to_str().unwrap()).with("RUST_LOG", "debug");
    let mut server = Server::start(setup);
    leave_traces(&server, ADA).await;
    assert_eq!(holding(server.data_dir(), |name| name.starts_with("log.sqlite")), [""; 0]);
    assert!(holding(server.data_dir(), |name| name.starts_with("views.sqlite")).len() == 1);
    let shown = server.printed(&["log", "show"]);
    assert!(shown.contains("sealed") && !shown.contains(MARKER), "{shown}");

    let deleted = json!({ "id": ADA, "object": "user", "deleted": true });
    server.deliver("user.deleted", &deleted).await.data(200);
    let data_dir = server.data_dir().to_owned();
    until("the erasure", async || holding(&data_dir, |_| true).is_empty()).await;
    assert!(!data_dir.join("blobs/keys").join(ADA).exists());
    assert!(data_dir.join("blobs/erased").join(ADA).exists());
    // Late news of the user is not kept either.
    server.deliver("user.updated", &clerk_user(ADA)).await.data(200);
    let shown = server.printed(&["log", "show"]);
    until("the end of the files", async || {
        server.printed(&["log", "show", "--type", "file.deleted"]).lines().count() == 2
    })
    .await;
    assert!(!shown.contains(MARKER));
    assert!(server.stop().success());
    prove_replay(&server, "replayed.sqlite");
    assert_eq!(holding(server.data_dir(), |_| true), [""; 0]);
    let printed = std::fs::read_to_string(output.path()).unwrap();
    for mark in [MARKER, ADDRESS] {
        let line = printed.lines().find(|line| line.contains(mark));
        assert_eq!(line, None, "the server printed it");
    }
}

#[tokio::test]
async fn an_operator_erases_a_user_beside_a_running_server_and_without_one() {
    let mut server = Server::start(setup());
    let server_data = server.data_dir().to_owned();
    for user in [ADA, "user_bob"] {
        leave_traces(&server, user).await;
    }
    let nobody = server.run(&["erase", "user_nobody"]);
    let errors = String::from_utf8_lossy(&nobody.stderr).into_owned();
    assert_eq!(nobody.status.code(), Some(1));
    assert!(errors.contains("knows no user user_nobody"), "{errors}");

    // What crashes leave of documents that are being written is a copy without a name.
    let left = |path: &str| server_data.join("blobs").join(path);
    let copy = |user: &str| {
        std::fs::copy(left("keys").join(user), left(&format!("keys/{user}#1"))).unwrap();
    };
    copy(ADA);
    let printed = server.printed(&["erase", ADA]);
    assert!(printed.contains("key          destroyed"), "{printed}");
    assert!(!left(&format!("keys/{ADA}#1")).exists());
    assert!(printed.contains("running"), "{printed}");
    until("the deletion", async || {
        server.printed(&["log", "show", "--type", "user.deleted"]).contains(ADA)
    })
    .await;
    assert_gone(&server, ADA).await;
    assert_eq!(server.get("user_bob", "me").await.data(200)["user"]["last_name"], marked("last"));

    let job = server.generate("user_bob", &marked("last")).await;
    assert!(server.stop().success());
    copy("user_bob");
    std::fs::write(left("dead-letters/letter#1"), marked("letter")).unwrap();
    // And of uploads and renders that were broken off.
    std::fs::write(left("incoming/upload#1"), marked("upload")).unwrap();
    let scratch = server_data.join("scratch/video").join(job);
    std::fs::create_dir_all(&scratch).unwrap();
    std::fs::write(scratch.join("source"), marked("source")).unwrap();
    let printed = server.printed(&["erase", "user_bob"]);
    assert!(!left("keys/user_bob#1").exists());
    assert_eq!((left("incoming/upload#1").exists(), scratch.exists()), (false, false));
    assert_eq!(std::fs::read_dir(left("secrets")).unwrap().count(), 0);
    assert!(printed.contains("read model   cleared"), "{printed}");
    let again = server.printed(&["erase", "user_bob"]);
    assert!(again.contains("there was none") && again.contains("was there"), "{again}");
    assert_eq!(holding(server.data_dir(), |_| true), [""; 0]);
    prove_replay(&server, "replayed.sqlite");
    std::fs::write(left("secrets/job-1#1"), "sealed").unwrap();
    let server = server.start_again();
    assert!(!left("secrets/job-1#1").exists());
    assert_gone(&server, "user_bob").await;
}

#[tokio::test]
async fn a_restored_older_backup_shows_nothing_of_who_was_erased_since() {
    let mut server = Server::start(setup());
    leave_traces(&server, ADA).await;
    let kept = server.generate("user_bob", "of somebody who stays").await;
    let place = tempfile::tempdir().unwrap();
    let backup = place.path().join("backup");
    let there = backup.to_str().unwrap();
    server.printed(&["backup", there]);
    // All that opens what is sealed, and in clear what nobody has sealed.
    let in_clear = holding(place.path(), |_| true);
    assert!(!in_clear.is_empty() && in_clear.iter().all(|path| path.contains("/dead-letters/")));
    assert!(backup.join("keys/keys").join(ADA).exists());
    assert!(server.stop().success());
    server.printed(&["erase", ADA]);

    let elsewhere = tempfile::tempdir().unwrap();
    let printed = |arguments: &[&str]| {
        let output = setup().run(elsewhere.path(), arguments);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "t2m {arguments:?}: {errors}");
        String::from_utf8(output.stdout).unwrap()
    };
    let tombstones = server.data_dir().join("blobs/erased");
    printed(&["restore", there, "--tombstones", tombstones.to_str().unwrap()]);
    assert_eq!(holding(elsewhere.path(), |_| true), [""; 0]);
    let key_of = |user: &str| elsewhere.path().join("blobs/keys").join(user);
    assert_eq!([ADA, "user_bob"].map(|user| key_of(user).exists()), [false, true]);
    printed(&["log", "verify"]);
    printed(&["replay", "--to", "before.sqlite"]);
    assert_eq!(holding(elsewhere.path(), |_| true), [""; 0]);

    let mut restored = Server::start_in(setup(), elsewhere);
    assert_eq!(holding(restored.data_dir(), |_| true), [""; 0]);
    until("the deletion", async || {
        restored.printed(&["log", "show", "--type", "user.deleted"]).contains(ADA)
    })
    .await;
    until("the end of the files", async || {
        restored.printed(&["log", "show", "--type", "file.deleted"]).lines().count() == 2
    })
    .await;
    assert_gone(&restored, ADA).await;
    let job = restored.get("user_bob", &format!("jobs/{kept}")).await.data(200);
    assert_eq!(job["prompt"], "of somebody who stays");
    let shown = restored.printed(&["log", "show", "--json"]);
    let stream_of = |line: &str| {
        let event: serde_json::Value = serde_json::from_str(line).unwrap();
        event["stream"].as_str().unwrap().to_owned()
    };
    let streams: BTreeSet<String> = shown.lines().map(stream_of).collect();
    assert!(streams.contains(&format!("user-{ADA}")), "{streams:?}");
    let states = streams.iter().map(|stream| restored.printed(&["state", stream, "--json"]));
    let states: Vec<_> = states.collect();
    assert!(states.iter().any(|state| state.contains("of somebody who stays")));
    let exported = restored.printed(&["log", "export"]);
    for said in states.iter().chain([&shown, &exported]) {
        assert!(![MARKER, ADDRESS].iter().any(|mark| said.contains(mark)), "{said}");
    }
    assert!(restored.stop().success());
    prove_replay(&restored, "after.sqlite");
    assert_eq!(holding(restored.data_dir(), |_| true), [""; 0]);
}

#[tokio::test]
async fn the_master_key_is_exchanged_while_the_server_runs() {
    let mut server = Server::start(setup());
    leave_traces(&server, ADA).await;
    let path = server.data_dir().join("master.key");
    let old = std::fs::read(&path).unwrap();
    let printed = server.printed(&["keys", "rotate"]);
    assert!(printed.contains("keeps the old key"), "{printed}");
    // The server finds the new one: what it seals now and what it sealed before both open.
    leave_traces(&server, "user_bob").await;
    let status = server.printed(&["keys", "status"]);
    assert!(status.contains("users' keys              2, 0 of them"), "{status}");
    assert!(status.contains("secrets of jobs          2, 0 of them"), "{status}");
    assert!(server.stop().success());
    let printed = server.printed(&["keys", "rotate"]);
    assert!(printed.contains("holds the new master key alone"), "{printed}");
    let new = std::fs::read(&path).unwrap();
    assert!(new.len() == 32 && new != old);
    let server = server.start_again();
    let bob = server.get("user_bob", "me").await.data(200);
    assert_eq!(bob["user"]["first_name"], marked("first"));
    server.generate(ADA, "a pier").await;
}

#[tokio::test]
async fn an_event_of_a_newer_version_stops_the_read_model_and_says_where() {
    let mut server = Server::start(Setup::clerk());
    server.deliver("user.created", &clerk_user(ADA)).await.data(200);
    assert!(server.stop().success());
    let clock = Clock::system();
    let log = EmbeddedLog::open(&server.data_dir().join("log.sqlite")).unwrap();
    let newer = NewEvent {
        id: clock.fresh_id(),
        kind: "user.knighted.v7".to_owned(),
        time: clock.now(),
        data: b"{}".to_vec(),
        metadata: b"{}".to_vec(),
    };
    let stream = format!("user-{ADA}");
    let at = log.append(&stream, Expected::Any, vec![newer]).await.unwrap().position;
    drop(log);
    let replay = server.run(&["replay", "--to", "replayed.sqlite"]);
    let errors = String::from_utf8_lossy(&replay.stderr).into_owned();
    let expected = format!("event at position {at}: the event type user.knighted.v7 is not known");
    assert!(errors.contains(&expected) && errors.contains("newer version than this"), "{errors}");
    assert_eq!(replay.status.code(), Some(1));
    // What cannot be cleared is not said to be.
    let erased = server.run(&["erase", "user_bob", "--unknown"]);
    let errors = String::from_utf8_lossy(&erased.stderr).into_owned();
    assert!(errors.contains(&format!("stands still at {at} and cannot be cleared")), "{errors}");
    assert_eq!(erased.status.code(), Some(1));
    let server = server.start_again();
    let ready = ask(server.request(Method::GET, "system/ready")).await;
    ready.assert_refused(503, "not_ready");
    let reason = ready.body["detail"]["reason"].as_str().unwrap();
    assert_eq!(reason, format!("the view users is parked at position {at}"));
    // Nothing is decided on a state that lacks it.
    server.deliver("user.updated", &clerk_user(ADA)).await.assert_refused(500, "internal_error");
}

#[tokio::test]
async fn the_jobs_of_a_deleted_user_end_and_nobody_is_told_what_they_were() {
    const TOKEN: &str = "a-worker-token-of-thirty-bytes";
    let server = Server::start(setup().with("T2M_WORKER_TOKENS", TOKEN));
    let worker = async |path: &str, body: serde_json::Value| {
        ask(server.request(Method::POST, path).bearer_auth(TOKEN).json(&body)).await
    };
    let running = server.generate(ADA, &marked("running")).await;
    let taken = json!({ "worker_id": "w1", "kinds": ["video"] });
    let lease = worker("worker/lease", taken.clone()).await.data(200);
    assert_eq!(lease["job_id"], running.as_str());
    let waiting = server.generate(ADA, &marked("waiting")).await;
    server.deliver("user.deleted", &json!({ "id": ADA, "deleted": true })).await.data(200);
    // From the very answer on.
    assert_eq!(worker("worker/lease", taken).await.status, 204);
    until("the running job is to be stopped", async || {
        let path = format!("worker/jobs/{running}/progress");
        let report = json!({ "lease_id": lease["lease_id"], "progress": 50 });
        worker(&path, report).await.data(200)["cancelled"] == true
    })
    .await;
    // What its worker says at the end is not taken down either.
    let path = format!("worker/jobs/{running}/fail");
    let why = json!({ "lease_id": lease["lease_id"], "error": marked("why"), "retryable": true });
    worker(&path, why).await.data(200);
    for job in [running, waiting] {
        let stream = format!("job-{job}");
        until("the job is cancelled", async || {
            server.printed(&["log", "show", "--stream", &stream]).contains("job.cancelled.v1")
        })
        .await;
    }
    assert_eq!(holding(server.data_dir(), |name| name.starts_with("log.sqlite")), [""; 0]);
}

#[tokio::test]
async fn without_a_server_nobody_waits_for_the_workers_of_an_erased_user() {
    const TOKEN: &str = "a-worker-token-of-thirty-bytes";
    let setup = setup().with("T2M_WORKER_TOKENS", TOKEN).with("T2M_ENGINE", "none");
    let mut server = Server::start(setup);
    let job = server.generate(ADA, &marked("running")).await;
    let taken = json!({ "worker_id": "w1", "kinds": ["video"] });
    let lease = server.request(Method::POST, "worker/lease").bearer_auth(TOKEN).json(&taken);
    assert_eq!(ask(lease).await.data(200)["job_id"], job.as_str());
    server.generate("user_bob", "a pier").await;
    assert!(server.stop().success());
    for user in [ADA, "user_bob"] {
        let printed = server.printed(&["erase", user]);
        assert!(printed.contains("read model   cleared"), "{printed}");
    }
    let shown = server.printed(&["log", "show", "--stream", &format!("job-{job}")]);
    assert!(shown.contains("job.cancelled.v1"), "{shown}");
}

#[tokio::test]
async fn a_command_that_writes_the_log_is_not_taken_for_a_server() {
    let mut server = Server::start(setup());
    server.deliver("user.created", &clerk_user(ADA)).await.data(200);
    assert!(server.stop().success());
    let import = EmbeddedLog::open(&server.data_dir().join("log.sqlite")).unwrap();
    let erased = server.run(&["erase", ADA]);
    let errors = String::from_utf8_lossy(&erased.stderr).into_owned();
    assert_eq!(erased.status.code(), Some(1));
    assert!(errors.contains("not deleted yet: no server runs in"), "{errors}");
    assert!(!String::from_utf8_lossy(&erased.stdout).contains("running"));
    drop(import);
    assert!(server.printed(&["erase", ADA]).contains("read model   cleared"));
}
