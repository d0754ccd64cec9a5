//! The operator's commands.

use reqwest::Method;
use serde_json::{Value, json};
use t2m::actors::dead_letters::{DeadLetters, Heading, Letter};
use t2m::clock::Clock;
use t2m::config::BlobStore;
use t2m::http::routes::table;
use t2m::log::{EmbeddedLog, EventLog, Expected, NewEvent};
use t2m::media::blobs::Blobs;
use tempfile::TempDir;

use crate::server::{Server, Setup, UNDER, ask};

fn parsed(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[test]
fn help_lists_every_command() {
    let data = TempDir::new().unwrap();
    let output = Setup::development().run(data.path(), &["--help"]);
    let help = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success());
    for command in [
        "serve", "demo", "worker", "log", "replay", "state", "backup", "restore", "doctor",
        "clerk", "webhooks", "token", "openapi",
    ] {
        let listed = help.lines().any(|line| line.split_whitespace().next() == Some(command));
        assert!(listed, "{command} is not in\n{help}");
    }
    let serve = Setup::development().run(data.path(), &["serve", "--help"]);
    let serve = String::from_utf8(serve.stdout).unwrap();
    for variable in ["T2M_LISTEN", "CLERK_ISSUER", "FILE_SIGNING_SECRET", "CLERK_SECRET_KEY"] {
        assert!(serve.contains(variable), "{variable} is not in\n{serve}");
    }
}

#[test]
fn the_openapi_document_lists_every_route() {
    let data = TempDir::new().unwrap();
    let output = Setup::development().run(data.path(), &["openapi"]);
    let document = parsed(&String::from_utf8(output.stdout).unwrap());
    for route in table() {
        let method = route.method.as_str().to_lowercase();
        let described = &document["paths"][route.path][&method];
        assert!(described["responses"].is_object(), "{method} {}", route.path);
        assert_eq!(route.body.is_some(), described["requestBody"].is_object(), "{}", route.path);
    }
    let parameters = |path: &str, method: &str| -> Vec<String> {
        let found = document["paths"][path][method]["parameters"].as_array();
        let text = |it: &Value| format!("{}:{}", it["in"].as_str().unwrap(), it["name"]);
        found.into_iter().flatten().map(|it| text(it).replace('"', "")).collect()
    };
    let position = "header:X-Log-Position";
    let table: [(&str, &str, &[&str]); 9] = [
        ("/me", "get", &[position]),
        ("/system/ready", "get", &["query:for"]),
        ("/sessions", "get", &["query:limit", "query:cursor", position]),
        ("/jobs", "get", &["query:state", "query:kind", "query:limit", "query:cursor", position]),
        (
            "/files/secure/{id}",
            "head",
            &["path:id", "query:user_id", "query:expires", "query:signature"],
        ),
        (
            "/admin/events",
            "get",
            &["query:stream", "query:type", "query:from", "query:limit", "query:cursor", position],
        ),
        ("/videos/generate", "post", &["header:Idempotency-Key", position]),
        ("/jobs/{id}/events", "get", &["path:id", "header:Last-Event-ID", position]),
        ("/worker/jobs/{id}/output", "put", &["path:id", "query:lease_id", "query:name"]),
    ];
    for (path, method, expected) in table {
        assert_eq!(parameters(path, method), expected, "{method} {path}");
    }
    let signature = &document["paths"]["/files/secure/{id}"]["get"]["parameters"][3];
    assert_eq!((&signature["name"], &signature["required"]), (&json!("signature"), &json!(true)));
    for (path, media_type) in [
        ("/files/upload", "multipart/form-data"),
        ("/translations", "multipart/form-data"),
        ("/uploadfile/", "multipart/form-data"),
        ("/videos/batch", "application/json"),
    ] {
        let content = &document["paths"][path]["post"]["requestBody"]["content"];
        assert!(content[media_type]["schema"]["$ref"].is_string(), "{path}: {content}");
    }
    // Nothing is referred to that is not there.
    let text = document.to_string();
    for reference in text.split("\"$ref\":\"#").skip(1) {
        let pointer = reference.split('"').next().unwrap();
        assert!(document.pointer(pointer).is_some(), "{pointer}");
    }
    assert_eq!(document["servers"], json!([{ "url": "/api/v1" }, { "url": "/api" }]));
}

/// What it says on stderr, with exit code 2, before anything is started.
fn refused(setup: &Setup, arguments: &[&str], dotenv: &str) -> Vec<String> {
    let data = TempDir::new().unwrap();
    std::fs::write(data.path().join(".env"), dotenv).unwrap();
    let output = setup.clone().with(UNDER, "/usr/bin/timeout 60").run(data.path(), arguments);
    let told = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), output.stdout.len()), (Some(2), 0), "{arguments:?}: {told}");
    assert_eq!(std::fs::read_dir(data.path()).unwrap().count(), 1, "{arguments:?} left something");
    told.lines().map(str::to_owned).collect()
}

#[test]
fn each_variable_with_a_bad_value_is_a_line() {
    let bad = Setup::clerk()
        .with("T2M_LISTEN", "everywhere")
        .with("ENVIRONMENT", "staging")
        .with("DEV_MODE", "perhaps")
        .with("CALLBACK_ALLOW_PRIVATE", "")
        .with("MAX_UPLOAD_BYTES", "2 GiB")
        .with("T2M_STALLED_S", "0")
        .with("T2M_LOG_FORMAT", "xml")
        .with("T2M_ENGINE_TIME_LIMIT", "soon")
        .with("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4318")
        .with("RATE_LIMIT_READS", "many");
    let named = [
        "CALLBACK_ALLOW_PRIVATE",
        "DEV_MODE",
        "ENVIRONMENT",
        "MAX_UPLOAD_BYTES",
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "RATE_LIMIT_READS",
        "T2M_ENGINE_TIME_LIMIT",
        "T2M_LISTEN",
        "T2M_LOG_FORMAT",
        "T2M_STALLED_S",
    ];
    for arguments in [&[][..], &["serve"]] {
        let mut told = refused(&bad, arguments, "");
        told.sort();
        let names: Vec<_> = told.iter().filter_map(|line| Some(line.split_once(": ")?.0)).collect();
        assert_eq!(names, named, "{told:?}");
    }
    let flag = refused(&Setup::clerk(), &["serve", "--listen", "everywhere"], "");
    assert!(flag[0].contains("'--listen <LISTEN>'"), "{flag:?}");
    // It is no variable of this command's.
    let data = TempDir::new().unwrap();
    assert!(bad.run(data.path(), &["openapi"]).status.success());
}

#[test]
fn a_line_of_dotenv_that_cannot_be_read_is_named_without_its_value() {
    let told = refused(&Setup::clerk(), &["serve"], "A=1\nFILE_SIGNING_SECRET=new, old\n");
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].starts_with("FILE_SIGNING_SECRET: line 2 of .env "), "{told:?}");
    assert!(!told[0].contains("new") && told[0].contains("single quotes"), "{told:?}");
    let taken =
        refused(&Setup::clerk(), &["serve"], "T2M_TRANSLATION_ENGINE='command:no-such-thing $x'");
    assert_eq!(taken.len(), 1, "{taken:?}");
    assert!(
        taken[0].starts_with("T2M_TRANSLATION_ENGINE: `no-such-thing` is not there"),
        "{taken:?}"
    );
}

#[test]
fn a_bad_log_is_bad_configuration_of_every_command() {
    let setup = Setup::clerk().with("T2M_LOG", "nonsense").with("CLERK_SECRET_KEY", "sk_test_x");
    for arguments in [
        &["serve"][..],
        &["restore", "backup"],
        &["clerk", "sync"],
        &["clerk", "import"],
        &["clerk", "reconcile"],
        &["log", "stats"],
        &["backup", "backup"],
        &["replay"],
        &["state", "job-1"],
    ] {
        let told = refused(&setup, arguments, "");
        assert_eq!(told.len(), 1, "{arguments:?}: {told:?}");
        assert!(told[0].starts_with("T2M_LOG: "), "{arguments:?}: {told:?}");
    }
}

#[test]
fn a_worker_needs_a_server_and_a_token_and_each_is_a_line() {
    let told = refused(&Setup::clerk().with("T2M_ENGINE", "storyboard"), &["worker"], "");
    assert_eq!(told, ["T2M_SERVER: required", "T2M_WORKER_TOKEN: required"]);
}

#[test]
fn a_command_for_a_directory_that_is_not_there_makes_none() {
    let place = TempDir::new().unwrap();
    let missing = place.path().join("mistyped");
    let setup = Setup::clerk().with("CLERK_SECRET_KEY", "sk_test_x");
    for arguments in [
        &["erase", "user_x"][..],
        &["clerk", "sync"],
        &["clerk", "sync", "--dry-run"],
        &["clerk", "reconcile", "--dry-run"],
        &["webhooks", "dead", "discard", "--all"],
        &["keys", "rotate"],
    ] {
        let setup = setup.clone().with("T2M_DATA_DIR", missing.to_str().unwrap());
        let output = setup.run(place.path(), arguments);
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(
            (output.status.code(), missing.exists()),
            (Some(1), false),
            "{arguments:?}: {told}"
        );
        assert_eq!(told.trim().lines().count(), 1, "{told}");
    }
}

#[tokio::test]
async fn the_log_can_be_read_beside_a_running_server() {
    let server = Server::start(Setup::clerk());
    let job = server.generate("user_ada", "a lighthouse").await;
    let shown = server.printed(&["log", "show", "--json"]);
    let events: Vec<Value> = shown.lines().map(parsed).collect();
    let positions: Vec<u64> = events.iter().filter_map(|it| it["position"].as_u64()).collect();
    assert_eq!(positions.len(), events.len());
    assert!(positions.is_sorted_by(|one, next| one < next), "{positions:?}");
    let requested = events.last().unwrap();
    assert_eq!(requested["stream"], format!("job-{job}"));
    assert_eq!(
        (&requested["type"], &requested["revision"]),
        (&json!("job.requested.v1"), &json!(0))
    );
    assert_eq!(requested["metadata"]["actor"], "user_ada");
    assert_eq!(requested["metadata"]["source"], "api");

    let stats = parsed(&server.printed(&["log", "stats", "--json"]));
    assert_eq!(stats["events"], events.len());
    assert_eq!(stats["types"]["job.requested.v1"], 1);
    assert_eq!(stats["position"], server.log_position().await);
    let verified = parsed(&server.printed(&["log", "verify", "--json"]));
    assert_eq!(verified["head_hash"], stats["head_hash"]);
}

#[tokio::test]
async fn a_reader_that_is_gone_is_no_failure_and_a_full_disk_is() {
    let data = TempDir::new().unwrap();
    let event = NewEvent {
        id: uuid::Uuid::nil(),
        kind: "thing.done.v1".to_owned(),
        time: Clock::system().now(),
        data: b"{}".to_vec(),
        metadata: b"{}".to_vec(),
    };
    let log = EmbeddedLog::open(&data.path().join("log.sqlite")).unwrap();
    log.append("thing-1", Expected::NoStream, vec![event]).await.unwrap();
    let stored = NewEvent {
        id: uuid::Uuid::max(),
        kind: "file.deleted.v2".to_owned(),
        time: Clock::system().now(),
        data: json!({ "user_id": "user_x", "reason": "requested", "sha256": "0".repeat(64) })
            .to_string()
            .into_bytes(),
        metadata: b"{}".to_vec(),
    };
    log.append("file-1", Expected::NoStream, vec![stored]).await.unwrap();
    drop(log);
    let letters = DeadLetters::new(&Blobs::open(&BlobStore::File, data.path()).unwrap());
    let heading = Heading {
        message_id: "msg_1".to_owned(),
        received_at: Clock::system().now(),
        kind: None,
        reason: "a test".to_owned(),
    };
    let letter = Letter { heading, body: "{}".to_owned() };
    letters.keep(&letter, Clock::system().now()).await.unwrap();
    let stats = ["log", "stats"];
    for (arguments, is_done_first) in [
        (&["openapi"][..], false),
        (&["token", "--user", "user_x"], false),
        (&stats, false),
        (&[&stats[..], &["--json"]].concat(), false),
        (&[&stats[..], &["--stream", "thing-1"]].concat(), false),
        (&["log", "show"], false),
        (&["log", "export", "-"], false),
        (&["log", "export", "log.txt"], true),
        (&["log", "import", "log.txt"], true),
        (&["log", "verify", "--json"], false),
        (&["state", "file-1", "--json"], false),
        (&["doctor", "--json"], false),
        (&["keys", "status"], false),
        (&["webhooks", "dead"], false),
        (&["webhooks", "dead", "show", "msg_1"], false),
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let command = || Setup::development().command(data.path(), arguments);
        let output = command().stdout(writer).output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {told}");
        if is_done_first {
            continue;
        }
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let output = command().stdout(full).output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {told}");
        assert!(told.contains("No space left on device"), "{arguments:?}: {told}");
    }
}

#[tokio::test]
async fn a_development_server_takes_the_tokens_that_the_command_line_mints() {
    let server = Server::start(Setup::development());
    let token =
        server.printed(&["token", "--user", "user_x", "--role", "admin", "--tier", "premium"]);
    let me = ask(server.request(Method::GET, "me").bearer_auth(token.trim())).await.data(200);
    assert_eq!((&me["user"]["id"], &me["role"]), (&json!("user_x"), &json!("admin")));
    assert_eq!(me["subscription_tier"], "premium");
    let production = Setup::development().with("ENVIRONMENT", "production");
    let refused = production.run(server.data_dir(), &["token", "--user", "user_x"]);
    assert_eq!((refused.status.code(), refused.stdout.len()), (Some(2), 0));
}

#[tokio::test]
async fn in_development_mode_every_request_is_somebody_and_every_answer_warns() {
    let server = Server::start(Setup::development().with("DEV_MODE", "true"));
    let answer = ask(server.request(Method::GET, "me")).await;
    assert_eq!(answer.header("x-dev-mode"), "true");
    let me = answer.data(200);
    assert_eq!((&me["user"]["id"], &me["role"]), (&json!("dev_user"), &json!("admin")));
    assert_eq!(me["subscription_tier"], "premium");
    let other = server.request(Method::GET, "me").header("x-dev-user", "user_other");
    assert_eq!(ask(other).await.data(200)["user"]["id"], "user_other");
    let post = || server.request(Method::POST, "videos/generate").json(&json!({ "prompt": "a" }));
    let preflight = server.request(Method::OPTIONS, "videos/generate");
    let preflight = preflight.header("access-control-request-method", "POST");
    for (request, status) in [
        (preflight.header("origin", &server.address), 200),
        (post().header("origin", "https://evil.test"), 403),
        (server.request(Method::POST, "/metrics"), 405),
        (server.request(Method::GET, "/nothing"), 404),
    ] {
        let answer = ask(request).await;
        assert_eq!((answer.status, answer.header("x-dev-mode")), (status, "true"));
    }
}
