//! What T2M tells Clerk: changes that are made here reach the Backend API, in the words of Clerk's
//! own client.

use std::path::Path;
use std::process::{Command, Output};

use reqwest::Method;
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use crate::backend::{Backend, Instance, SECRET_KEY};
use crate::server::{Server, Setup, ask, claims, signed};

fn setup(backend: &Backend) -> Setup {
    Setup::clerk().with("CLERK_SECRET_KEY", SECRET_KEY).with("CLERK_API_URL", &*backend.url)
}

/// A request of an administrator.
async fn put(server: &Server, path: &str, body: Value) {
    let mut claims = claims("user_root");
    claims["role"] = json!("admin");
    let request = server.request(Method::PUT, path).bearer_auth(signed(&claims)).json(&body);
    ask(request).await.data(200);
}

/// Makes Clerk tell the server of a user as the stand-in has it.
async fn tell(server: &Server, backend: &Backend, id: &str) {
    let user = backend.instance().user(id).clone();
    server.deliver("user.updated", &user).await.data(200);
}

async fn set_flag(server: &Server, id: &str) {
    let path = format!("admin/users/{id}/feature-flags");
    put(server, &path, json!({ "feature_flags": { "beta": true } })).await;
}

fn has_flag(instance: &Instance, id: &str) -> bool {
    instance.metadata(id)["featureFlags"]["beta"] == true
}

/// The types of a user's events, as they are in the log.
fn types(server: &Server, id: &str) -> Vec<String> {
    let shown = server.printed(&["log", "show", "--json", "--stream", &format!("user-{id}")]);
    let kind = |line: &str| serde_json::from_str::<Value>(line).unwrap()["type"].clone();
    shown.lines().map(|line| kind(line).as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn what_an_administrator_decides_is_pushed_and_its_echo_changes_nothing() {
    let backend = Backend::start();
    backend.instance().add("user_ada", json!({ "role": "creator", "theirs": { "x": 1 } }));
    let server = Server::start(setup(&backend));
    tell(&server, &backend, "user_ada").await;

    let access = json!({ "role": "editor", "permissions": ["b", "a"] });
    put(&server, "admin/users/user_ada/access", access).await;
    backend.until(|clerk| clerk.metadata("user_ada")["role"] == "editor").await;
    let body = json!({ "public_metadata": { "role": "editor", "permissions": ["a", "b"] } });
    assert_eq!(backend.instance().requests("PATCH", "/user_ada/metadata")[0].body, body);

    // Clerk takes the role away meanwhile, which is not heard of here.
    let demoted = json!({ "role": "user", "permissions": ["a", "b"], "theirs": { "x": 1 } });
    backend.instance().set_metadata("user_ada", demoted);
    put(&server, "admin/users/user_ada/access", json!({ "subscription_tier": "premium" })).await;
    let premium = |clerk: &Instance| clerk.metadata("user_ada")["subscription_tier"] == "premium";
    backend.until(premium).await;
    assert_eq!(backend.instance().metadata("user_ada")["role"], "user");
    put(&server, "admin/users/user_ada/access", json!({ "role": "editor" })).await;
    backend.until(|clerk| clerk.metadata("user_ada")["role"] == "editor").await;

    set_flag(&server, "user_ada").await;
    backend.until(|clerk| has_flag(clerk, "user_ada")).await;
    let other = json!({ "feature_flags": { "gamma": false } });
    put(&server, "admin/users/user_ada/feature-flags", other).await;
    let flags = json!({ "gamma": false });
    backend.until(|clerk| clerk.metadata("user_ada")["featureFlags"] == flags).await;
    server.post("user_ada", "onboarding", &json!({ "step": 3 })).await.data(200);
    let onboarding = json!({ "status": "in_progress", "currentStep": 3, "totalSteps": 8 });
    backend.until(|clerk| clerk.metadata("user_ada")["onboarding"] == onboarding).await;
    assert_eq!(backend.instance().metadata("user_ada")["theirs"], json!({ "x": 1 }));

    let before = types(&server, "user_ada");
    let mut echo = backend.instance().user("user_ada").clone();
    echo["updated_at"] = json!(crate::server::now() * 1000 + 1000);
    server.deliver("user.updated", &echo).await.data(200);
    let after = types(&server, "user_ada");
    // That Clerk's word is known up to then, and nothing else.
    assert_eq!(after[before.len()..], ["user.profile_changed.v1"]);
}

#[tokio::test]
async fn the_echo_of_a_step_undoes_no_completion_and_a_step_none_at_clerk() {
    let backend = Backend::start();
    backend.instance().add("user_ada", json!({}));
    backend.instance().add("user_bob", json!({ "onboarding": { "status": "completed" } }));
    let server = Server::start(setup(&backend).with("REQUIRE_ONBOARDING", "true"));
    tell(&server, &backend, "user_ada").await;
    let status = |clerk: &Instance, id: &str| clerk.metadata(id)["onboarding"]["status"].clone();
    server.post("user_ada", "onboarding", &json!({ "step": 7 })).await.data(200);
    backend.until(|clerk| status(clerk, "user_ada") == "in_progress").await;
    let mut echo = backend.instance().user("user_ada").clone();
    echo["updated_at"] = json!(crate::server::now() * 1000 + 2000);
    backend.hold_writes_after(0);
    server.post("user_ada", "onboarding", &json!({ "step": 8 })).await.data(200);
    server.deliver("user.updated", &echo).await.data(200);
    server.get("user_ada", "files").await.data(200);
    backend.release_writes();
    backend.until(|clerk| status(clerk, "user_ada") == "completed").await;

    // Of this one Clerk knows what is not heard of here.
    server.post("user_bob", "onboarding", &json!({ "step": 2 })).await.data(200);
    set_flag(&server, "user_bob").await;
    backend.until(|clerk| has_flag(clerk, "user_bob")).await;
    assert_eq!(status(&backend.instance(), "user_bob"), "completed");
}

#[tokio::test]
async fn what_clerk_or_a_token_says_is_not_pushed_back() {
    let backend = Backend::start();
    for id in ["user_ada", "user_bob", "user_carol", "user_dora"] {
        backend.instance().add(id, json!({ "role": "creator" }));
    }
    let server = Server::start(setup(&backend));
    tell(&server, &backend, "user_ada").await;
    tell(&server, &backend, "user_carol").await;
    let mut stale = claims("user_bob");
    stale["role"] = json!("old");
    ask(server.request(Method::GET, "me").bearer_auth(signed(&stale))).await.data(200);
    // Of this one a membership was heard before the token.
    let membership = json!({
        "id": "orgmem_1", "object": "organization_membership", "role": "org:member",
        "organization": { "id": "org_1", "name": "Acme", "slug": "acme" },
        "public_user_data": { "user_id": "user_dora" },
    });
    server.deliver("organizationMembership.deleted", &membership).await.data(200);
    let mut stale = claims("user_dora");
    stale["permissions"] = json!(["videos:write"]);
    stale["onboarding"] = json!({ "status": "completed" });
    ask(server.request(Method::GET, "me").bearer_auth(signed(&stale))).await.data(200);
    // It comes last in the log, so whatever was to be pushed before it has been.
    set_flag(&server, "user_carol").await;
    backend.until(|clerk| has_flag(clerk, "user_carol")).await;
    let asked: Vec<String> = backend.instance().noted.iter().map(|it| it.path.clone()).collect();
    assert_eq!(asked, ["/v1/users/user_carol", "/v1/users/user_carol/metadata"]);
}

#[tokio::test]
async fn a_429_is_waited_out_and_a_user_whom_clerk_does_not_know_holds_up_nobody() {
    let backend = Backend::start();
    backend.instance().add("user_ada", json!({}));
    backend.instance().turned_away = 2;
    let server = Server::start(setup(&backend));
    tell(&server, &backend, "user_ada").await;
    server.post("user_ghost", "onboarding", &json!({ "step": 1 })).await.data(200);
    let begun = std::time::Instant::now();
    set_flag(&server, "user_ada").await;
    backend.until(|clerk| has_flag(clerk, "user_ada")).await;
    assert!(begun.elapsed().as_millis() >= 1900, "two answers asked for a second each");
    let instance = backend.instance();
    assert_eq!(instance.requests("PATCH", "/user_ada/metadata").len(), 3);
    assert_eq!(instance.requests("GET", "/user_ghost").len(), 1);
}

#[tokio::test]
async fn a_server_that_is_killed_midway_pushes_the_rest_when_it_is_back_and_a_replay_nothing() {
    const USERS: usize = 30;
    let backend = Backend::start();
    let ids: Vec<String> = (0..USERS).map(|number| format!("user_{number}")).collect();
    for id in &ids {
        backend.instance().add(id, json!({}));
    }
    backend.hold_writes_after(5);
    let server = Server::start(setup(&backend));
    for id in &ids {
        tell(&server, &backend, id).await;
        set_flag(&server, id).await;
    }
    let pushed = |clerk: &Instance| ids.iter().filter(|id| has_flag(clerk, id)).count();
    backend.until(|clerk| pushed(clerk) == 5 && clerk.requests("PATCH", "").len() > 5).await;
    let server = {
        let mut server = server;
        server.kill();
        backend.release_writes();
        assert_eq!(pushed(&backend.instance()), 5);
        server.start_again()
    };
    backend.until(|clerk| pushed(clerk) == USERS).await;

    // This is looked at only after it was noted that the others are done.
    let push_one = async |server: &Server, id: &str| {
        backend.instance().add(id, json!({}));
        tell(server, &backend, id).await;
        set_flag(server, id).await;
        backend.until(|clerk| has_flag(clerk, id)).await;
    };
    push_one(&server, "user_last").await;

    // The read model is thrown away; only what is new is looked at.
    let mut server = server;
    assert!(server.stop().success());
    for entry in std::fs::read_dir(server.data_dir()).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name().unwrap().to_string_lossy().starts_with("views") {
            std::fs::remove_file(path).unwrap();
        }
    }
    let kept = std::fs::read_to_string(server.data_dir().join("clerk-sync-position")).unwrap();
    assert!(kept.trim().parse::<u64>().unwrap() > 0);
    backend.instance().noted.clear();
    let server = server.start_again();
    push_one(&server, "user_new").await;
    let asked: Vec<String> = backend.instance().noted.iter().map(|it| it.path.clone()).collect();
    // The answer about the last one may have been cut off.
    let again = |path: &&String| !path.contains("user_new") && !path.contains("user_last");
    assert_eq!(asked.iter().filter(again).count(), 0, "{asked:?}");
}

#[tokio::test]
async fn a_session_that_its_user_revokes_is_revoked_at_clerk() {
    let backend = Backend::start();
    let server = Server::start(setup(&backend));
    let mut phone = claims("user_ada");
    phone["sid"] = json!("sess_phone");
    ask(server.request(Method::GET, "me").bearer_auth(signed(&phone))).await.data(200);
    server.delete("user_ada", "sessions/sess_phone").await.data(200);
    backend
        .until(|clerk| clerk.requests("POST", "/v1/sessions/sess_phone/revoke").len() == 1)
        .await;
}

/// The number on the line of this name.
fn count(output: &Output, name: &str) -> u64 {
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|rest| rest.trim().parse().ok());
    number.unwrap_or_else(|| panic!("no {name} in {output:?}"))
}

#[tokio::test]
async fn all_users_are_pushed_ten_at_once_with_a_line_for_each_failure() {
    const USERS: u64 = 300;
    let backend = Backend::start();
    for number in 0..USERS {
        backend.instance().add(&format!("user_{number}"), json!({ "role": "creator" }));
    }
    let (data, setup) = (TempDir::new().unwrap(), setup(&backend));
    let imported = setup.run(data.path(), &["clerk", "import"]);
    assert_eq!(count(&imported, "imported"), USERS, "{imported:?}");

    let dry = setup.run(data.path(), &["clerk", "sync", "--dry-run"]);
    assert_eq!((dry.status.code(), count(&dry, "to push")), (Some(0), USERS));
    assert_eq!(backend.instance().requests("PATCH", "").len(), 0);

    backend.instance().forget("user_7");
    let pushed = setup.run(data.path(), &["clerk", "sync"]);
    assert_eq!(pushed.status.code(), Some(1));
    assert_eq!((count(&pushed, "pushed"), count(&pushed, "failed")), (USERS - 1, 1));
    let errors = String::from_utf8_lossy(&pushed.stderr).into_owned();
    assert!(errors.lines().any(|line| line.starts_with("user_7: ")), "{errors}");
    assert!(!errors.contains(SECRET_KEY));
    assert_eq!(backend.instance().metadata("user_8")["subscription_tier"], "standard");
    let most = backend.instance().most_under_way;
    assert!((2..=10).contains(&most), "{most} requests at once");

    let again = setup.run(data.path(), &["clerk", "sync"]);
    assert_eq!((count(&again, "pushed"), count(&again, "unchanged")), (0, USERS - 1));
}

#[tokio::test]
async fn what_clerk_changed_while_nobody_listened_is_not_put_back_but_loaded() {
    let backend = Backend::start();
    for id in ["user_kept", "user_demoted"] {
        backend.instance().add(id, json!({ "role": "admin" }));
    }
    let (data, setup) = (TempDir::new().unwrap(), setup(&backend));
    assert!(setup.run(data.path(), &["clerk", "import"]).status.success());
    backend.instance().change("user_demoted", json!({ "role": "user" }));

    for arguments in [&["clerk", "sync", "--dry-run"][..], &["clerk", "sync"]] {
        let pushed = setup.run(data.path(), arguments);
        assert_eq!((pushed.status.code(), count(&pushed, "newer there")), (Some(0), 1));
        let named = String::from_utf8_lossy(&pushed.stdout).into_owned();
        assert!(named.contains("passed over  user_demoted\n"), "{named}");
        assert!(!named.contains("user_kept"), "{named}");
    }
    assert_eq!(backend.instance().metadata("user_kept")["subscription_tier"], "standard");
    assert_eq!(*backend.instance().metadata("user_demoted"), json!({ "role": "user" }));

    assert!(setup.run(data.path(), &["clerk", "reconcile"]).status.success());
    let whole = json!({ "role": "user", "permissions": [], "subscription_tier": "standard",
        "featureFlags": {} });
    assert_eq!(*backend.instance().metadata("user_demoted"), whole);
}

#[tokio::test]
async fn all_users_are_imported_page_by_page_and_a_second_time_nothing_changes() {
    let backend = Backend::start();
    for number in 0..620 {
        backend.instance().add(&format!("user_{number}"), json!({ "role": "creator" }));
    }
    let (data, setup) = (TempDir::new().unwrap(), setup(&backend));
    let events = |data: &Path| {
        let stats = setup.run(data, &["log", "stats", "--json"]);
        serde_json::from_slice::<Value>(&stats.stdout).unwrap()["events"].as_u64()
    };
    let first = setup.run(data.path(), &["clerk", "import"]);
    assert_eq!((first.status.code(), count(&first, "imported")), (Some(0), 620), "{first:?}");
    let written = events(data.path());
    let second = setup.run(data.path(), &["clerk", "import"]);
    assert_eq!((count(&second, "imported"), count(&second, "unchanged")), (0, 620));
    assert_eq!(events(data.path()), written);
    let instance = backend.instance();
    for request in instance.requests("GET", "/v1/users") {
        let limit: u32 = request.query["limit"].parse().unwrap();
        assert!((1..=500).contains(&limit), "for 501 Clerk gives 10");
    }
}

#[tokio::test]
async fn an_import_beside_a_running_server_says_why_it_cannot() {
    let backend = Backend::start();
    backend.instance().add("user_ada", json!({ "role": "creator" }));
    let mut server = Server::start(setup(&backend));
    let refused = server.run(&["clerk", "import"]);
    let errors = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1));
    assert!(errors.contains("held by a running server"), "{errors}");
    assert!(backend.instance().noted.is_empty());

    assert!(server.stop().success());
    assert!(server.run(&["clerk", "import"]).status.success());
    let server = server.start_again();
    assert_eq!(server.get("user_ada", "me").await.data(200)["role"], "creator");
}

#[tokio::test]
async fn both_sides_are_reconciled() {
    let backend = Backend::start();
    for id in ["user_same", "user_differs", "user_gone"] {
        let whole = json!({ "role": "user", "permissions": [], "subscription_tier": "standard",
            "featureFlags": {} });
        backend.instance().add(id, whole);
    }
    let (data, setup) = (TempDir::new().unwrap(), setup(&backend));
    assert!(setup.run(data.path(), &["clerk", "import"]).status.success());
    {
        let mut instance = backend.instance();
        instance.forget("user_gone");
        instance.add("user_fresh", json!({ "role": "creator" }));
        instance.set_metadata("user_differs", json!({ "role": "user" }));
    }
    let text = |output: &Output| String::from_utf8_lossy(&output.stdout).into_owned();
    let dry = text(&setup.run(data.path(), &["clerk", "reconcile", "--dry-run"]));
    assert!(dry.contains("1 newer there, 1 missing there"), "{dry}");
    assert!(dry.contains("newer there    user_fresh") && dry.contains("missing there  user_gone"));
    assert!(backend.instance().requests("PATCH", "").is_empty());

    let done = setup.run(data.path(), &["clerk", "reconcile"]);
    assert_eq!(done.status.code(), Some(0), "{done:?}");
    assert_eq!(backend.instance().metadata("user_fresh")["role"], "creator");
    assert_eq!(backend.instance().metadata("user_differs")["subscription_tier"], "standard");
    // What was pushed is newer there until it is heard of; no server was there to be told.
    assert!(setup.run(data.path(), &["clerk", "reconcile"]).status.success());
    let again = text(&setup.run(data.path(), &["clerk", "reconcile", "--dry-run"]));
    assert!(again.contains("0 newer there, 1 missing there, 0 differing"), "{again}");
}

#[test]
fn a_missing_or_malformed_setting_is_named_and_nothing_is_done() {
    let data = TempDir::new().unwrap();
    let check = |setup: Setup, arguments: &[&str], variable: &str| {
        let output = setup.run(data.path(), arguments);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{errors}");
        assert!(errors.starts_with(variable) && !errors.contains("4242"), "{errors}");
    };
    check(Setup::clerk(), &["clerk", "sync"], "CLERK_SECRET_KEY: ");
    let public = Setup::clerk().with("CLERK_SECRET_KEY", "pk_test_4242");
    check(public.clone(), &["clerk", "import"], "CLERK_SECRET_KEY: ");
    check(public, &["serve"], "CLERK_SECRET_KEY: ");
    let url = Setup::clerk().with("CLERK_SECRET_KEY", SECRET_KEY).with("CLERK_API_URL", "clerk");
    check(url, &["serve"], "CLERK_API_URL: ");
    assert_eq!(std::fs::read_dir(data.path()).unwrap().count(), 0);
}

/// Runs a script of `tests/clients` with Node.js; its last line is JSON.
fn node(script: &str, arguments: &[&str]) -> Value {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients");
    let installed = folder.join("node_modules/@clerk/backend").exists();
    assert!(installed, "the official clients are missing: run scripts/setup-tests");
    let mut command = Command::new("node");
    let output = command.arg(folder.join(script)).args(arguments).output().expect("node starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    serde_json::from_str(text.lines().last().expect("it prints a line")).unwrap()
}

#[tokio::test]
async fn our_requests_are_those_of_the_official_client() {
    let backend = Backend::start();
    let metadata = json!({ "featureFlags": { "old": true, "kept": true }, "theirs": 1 });
    backend.instance().add("user_sdk", metadata);
    backend.instance().add("user_newer", json!({}));
    let url = backend.url.clone();
    let said = tokio::task::spawn_blocking(move || node("backend.mjs", &[&url, SECRET_KEY]));
    let merged =
        json!({ "role": "admin", "featureFlags": { "new": true, "kept": true }, "theirs": 1 });
    let understood = json!({
        "updated": merged, "read": merged, "listed": ["user_sdk"], "total": 2,
        "session": "revoked", "missing": 404, "unauthorized": 401,
    });
    assert_eq!(said.await.unwrap(), understood);
    let counting = |path: &str| path.ends_with("/count");
    let mut theirs = std::mem::take(&mut backend.instance().noted);
    // Its list asks for the count besides, and the stranger's key is not ours.
    theirs.retain(|it| !counting(&it.path) && it.headers["authorization"].ends_with("4242"));

    let api = backend.api();
    let patch = json!({ "role": "admin", "featureFlags": { "new": true, "old": null } });
    let patch: Map<String, Value> = patch.as_object().unwrap().clone();
    api.merge_metadata("user_sdk", patch).await.unwrap();
    api.user("user_sdk").await.unwrap();
    assert_eq!(api.users(1).await.unwrap().len(), 1);
    api.revoke_session("sess_sdk").await.unwrap();
    let missing = api.user("user_nobody").await.unwrap_err();
    assert_eq!(missing, t2m::clerk::api::Error::NotFound);
    assert_eq!(backend.instance().noted, theirs);
    assert!(!format!("{api:?} {:?}", backend.settings()).contains("4242"));
}
