//! A text becomes its translation, and the key that came with it is found nowhere.

use std::path::{Path, PathBuf};

use reqwest::Method;
use reqwest::multipart::{Form, Part};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::server::{Answer, LOG_FILE, Server, Setup, ask};

const SRT: &str = "\u{feff}1\r\n00:00:01,000 --> 00:00:02,500 X1:40\r\n<i>The house</i> is big.\r\n\
                   Hello, my friend.\r\n\r\n2\r\n00:00:03,000 --> 00:00:04,000\r\nGood morning\r\n";
const KEY: &str = "sk-marker-of-the-api-key-7f3b";

fn engine(name: &str) -> String {
    format!("command:{}/scripts/engines/{name}", env!("CARGO_MANIFEST_DIR"))
}

fn form(name: &str, text: &str, fields: &[(&'static str, &str)]) -> Form {
    let file = Part::bytes(text.as_bytes().to_vec()).file_name(name.to_owned());
    let form = Form::new().part("file", file);
    fields.iter().fold(form, |form, (name, value)| form.text(*name, (*value).to_owned()))
}

async fn send(server: &Server, user: &str, path: &str, form: Form) -> Answer {
    ask(server.request_of(user, Method::POST, path).multipart(form)).await
}

/// Follows a job to its end.
async fn ended(server: &Server, user: &str, job: &str) -> Value {
    let mut events = server.events(user, &format!("jobs/{job}/events"), Some(0)).await;
    while let Some(event) = events.next().await {
        if ["completed", "failed", "cancelled"].contains(&event.data["state"].as_str().unwrap()) {
            break;
        }
    }
    server.get(user, &format!("jobs/{job}")).await.data(200)
}

async fn text_of(server: &Server, user: &str, file: &Value) -> String {
    let path = format!("files/{}/signed-url", file.as_str().unwrap());
    let link = server.post(user, &path, &json!({})).await.data(200);
    let url = link["url"].as_str().unwrap();
    let path = url.strip_prefix(&server.address).unwrap();
    let answer = ask(server.request(Method::GET, path)).await;
    assert_eq!(answer.status, 200);
    String::from_utf8(answer.bytes).unwrap()
}

#[tokio::test]
async fn subtitles_are_translated_and_keep_their_timing_byte_for_byte() {
    let setup = Setup::clerk().with("T2M_TRANSLATION_ENGINE", engine("translate-apertium"));
    let server = Server::start(setup);
    let fields = [("source_language", "en"), ("target_language", "es"), ("api_key", KEY)];
    let asked = send(&server, "ada", "translations", form("film.srt", SRT, &fields)).await;
    let asked = asked.data(202);
    assert_eq!((&asked["kind"], &asked["prompt"]), (&json!("translation"), &json!("film.srt")));
    assert_eq!(
        (&asked["options"]["format"], &asked["options"]["segment_size"]),
        (&json!("srt"), &json!(15_000))
    );
    let job = ended(&server, "ada", asked["job_id"].as_str().unwrap()).await;
    assert_eq!(job["state"], "completed", "{job}");
    assert_eq!(job["output"]["content_type"], "application/x-subrip");
    let file = format!("files/{}", job["output"]["file_id"].as_str().unwrap());
    assert_eq!(server.get("ada", &file).await.data(200)["filename"], "film.es.srt");
    let expected = SRT
        .replace("The house</i> is big.", "La casa</i> es grande.")
        .replace("Hello, my friend.", "Hola, mi amigo.")
        .replace("Good morning", "Buenos días");
    assert_eq!(text_of(&server, "ada", &job["output"]["file_id"]).await, expected);
    let source = text_of(&server, "ada", &job["options"]["source_file_id"]).await;
    assert_eq!(source, SRT);
}

#[tokio::test]
async fn the_seeds_client_asks_by_its_own_path_and_reads_its_own_fields() {
    let server = Server::start(Setup::clerk());
    for path in ["/uploadfile/", "/api/uploadfile/", "/api/v1/uploadfile/"] {
        let fields = [("api_key", KEY), ("model_name", "gemini-2.5-pro"), ("segment_size", "9000")];
        let answer = send(&server, "ada", path, form("novel.txt", "Once upon a time", &fields));
        let body = answer.await;
        assert_eq!(body.status, 200, "{}", body.body);
        let body = body.body;
        assert_eq!(
            (&body["id"], &body["filename"]),
            (&body["data"]["job_id"], &json!("novel.txt"))
        );
        assert_eq!(body["status"], "processing");
        assert_eq!(body["data"]["options"]["model_name"], "gemini-2.5-pro");
        send(&server, "ada", path, form("novel.txt", "Once", &[]))
            .await
            .assert_refused(422, "validation_failed");
    }
    ask(server.request(Method::POST, "/uploadfile/")).await.assert_refused(401, "unauthenticated");
    let wrong = server.request_of("ada", Method::GET, "/uploadfile/");
    ask(wrong).await.assert_refused(405, "method_not_allowed");
    let foreign = server.request_of("ada", Method::POST, "/uploadfile/");
    let foreign = foreign.header("origin", "https://evil.example");
    ask(foreign).await.assert_refused(403, "invalid_origin");
}

#[tokio::test]
async fn what_cannot_be_translated_is_refused_and_nothing_is_begun() {
    let server = Server::start(Setup::clerk());
    let before = server.log_position().await;
    let check = async |name: &str, text: &str, fields: &[(&'static str, &str)], field: &str| {
        let answer = send(&server, "ada", "translations", form(name, text, fields)).await;
        answer.assert_refused(422, "validation_failed");
        assert!(!answer.body["detail"]["fields"][field].is_null(), "{}", answer.body);
        assert!(!String::from_utf8_lossy(&answer.bytes).contains(KEY), "{}", answer.body);
    };
    check("a.txt", "", &[], "file").await;
    check("a.txt", " \n", &[], "file").await;
    check("a.txt", "a\0b", &[], "file").await;
    for bad in ["0", "-1", "1e9", "ten", "99999999999"] {
        check("a.txt", "hi", &[("segment_size", bad), ("api_key", KEY)], "segment_size").await;
    }
    check("a.txt", "hi", &[("target_language", "../../etc")], "target_language").await;
    check("a.txt", "hi", &[("api_key", KEY), ("api_key", KEY)], "api_key").await;
    check("a.txt", "hi", &[("api_key", &format!("{KEY}\r\nx: y"))], "api_key").await;
    check("a.txt", "hi", &[("api_key", &KEY.repeat(200))], "api_key").await;
    check("a.txt", "hi", &[("model_name", &"m".repeat(129))], "model_name").await;
    check("a.txt", "hi", &[("style_data", "a\u{7}b")], "style_data").await;
    let events = server.printed(&["log", "show", "--json", "--from", &before.to_string()]);
    for kind in ["file.stored", "job.requested"] {
        assert!(!events.contains(kind), "{events}");
    }
}

#[tokio::test]
async fn a_repeated_request_is_one_job_and_a_cancelled_one_is_not_tried_again_without_its_key() {
    let server = Server::start(Setup::clerk());
    let ask_again = async |text: &str| {
        let request = server.request_of("ada", Method::POST, "translations");
        let request = request.header("idempotency-key", "k1");
        ask(request.multipart(form("a.txt", text, &[("api_key", KEY)]))).await
    };
    let first = ask_again("hi").await.data(202);
    let again = ask_again("hi").await;
    assert_eq!(again.header("idempotent-replayed"), "true");
    assert_eq!(again.data(202)["job_id"], first["job_id"]);
    ask_again("other").await.assert_refused(422, "idempotency_key_reused");
    let job = first["job_id"].as_str().unwrap();
    assert!(secrets(&server).iter().any(|name| name.contains(job)));
    server.post("ada", &format!("jobs/{job}/cancel"), &json!({})).await.data(200);
    let retried = server.post("ada", &format!("jobs/{job}/retry"), &json!({})).await;
    retried.assert_refused(409, "conflict");
    secrets_gone(&server).await;
}

fn secrets(server: &Server) -> Vec<String> {
    let entries = std::fs::read_dir(server.data_dir().join("blobs/secrets"));
    let entries = entries.into_iter().flatten();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// The reconciler has no event of its own; the deadline only turns a hang into a failure.
async fn secrets_gone(server: &Server) {
    let waiting = async {
        while !secrets(server).is_empty() {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    let within = std::time::Duration::from_secs(30);
    tokio::time::timeout(within, waiting).await.expect("secrets of ended jobs are destroyed");
}

#[tokio::test]
async fn the_secret_of_a_job_goes_with_its_end_its_user_or_a_crash() {
    let server = Server::start(Setup::clerk());
    server.deliver("user.created", &json!({ "id": "user_gone" })).await;
    let fields = [("api_key", KEY)];
    send(&server, "user_gone", "translations", form("a.txt", "hi", &fields)).await.data(202);
    let asked = send(&server, "ada", "translations", form("a.txt", "hi", &fields)).await.data(202);
    assert_eq!(secrets(&server).len(), 2);
    server.deliver("user.deleted", &json!({ "id": "user_gone", "deleted": true })).await;
    let cancel = format!("jobs/{}/cancel", asked["job_id"].as_str().unwrap());
    server.post("ada", &cancel, &json!({})).await.data(200);
    // Killed before it may have looked; the next one looks at what is.
    let server = server.start_again();
    secrets_gone(&server).await;
}

/// Every file below a directory.
fn files(folder: &Path, all: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files(&path, all) } else { all.push(path) }
    }
}

fn assert_nowhere(marker: &str, folders: &[&Path]) {
    let mut all = Vec::new();
    folders.iter().for_each(|folder| files(folder, &mut all));
    assert!(all.len() > 5, "{all:?}");
    for path in all {
        // A file that was gone before it could be read holds nothing.
        let bytes = std::fs::read(&path).unwrap_or_default();
        let found = bytes.windows(marker.len()).any(|part| part == marker.as_bytes());
        assert!(!found, "{marker} is in {}", path.display());
    }
}

#[tokio::test]
async fn no_secret_is_found_in_the_data_directory_or_in_any_output() {
    // It takes long enough for its progress to be recorded. It shows all that it was told, in every way that it has, and then fails once, and once more.
    const TALKATIVE: &str = r#"command:/bin/sh -c 'read -r job; echo "$job" >&2; echo "$job"
        key=${job##*api_key\":\"}; key=${key%%\"*}; echo "{\"progress\":5,\"message\":\"with $key\"}"
        echo "key is $key" >&2; sleep 1; case $job in
        *\"attempt\":1,*) exit 75;; *novel*) exit 1;; *) echo done > ../output.txt;; esac'"#;
    let output = TempDir::new().unwrap();
    let log = output.path().join("stderr");
    let worker = "worker-token-marker-0123456789";
    let backend = "sk_test_marker_of_the_backend";
    let whsec = "whsec_bWFya2VyLW9mLXRoZS13ZWJob29rLXNlY3JldA==";
    let signing = "marker of the signing secret 42";
    let master = "bWFzdGVyLWtleS1tYXJrZXItMTIzNDU2Nzg5MDEyMzQ=";
    let setup = Setup::clerk()
        .with("T2M_TRANSLATION_ENGINE", TALKATIVE)
        .with("T2M_WORKER_TOKENS", worker)
        .with("T2M_WORKER_TOKEN", worker)
        .with("CLERK_SECRET_KEY", backend)
        .with("CLERK_API_URL", "http://127.0.0.1:9")
        .with("CLERK_WEBHOOK_SECRET", whsec)
        .with("FILE_SIGNING_SECRET", signing)
        .with("T2M_MASTER_KEY", master)
        .with("RUST_LOG", "trace")
        .with(LOG_FILE, log.to_str().unwrap());
    let server = Server::start(setup);
    let fields = [("api_key", KEY), ("style_data", "plain")];
    let asked = send(&server, "ada", "/uploadfile/", form("fine.txt", "hi", &fields)).await;
    let fine = asked.body["id"].as_str().unwrap().to_owned();
    let asked = send(&server, "ada", "translations", form("novel.txt", "hi", &fields)).await;
    let bad = asked.data(202)["job_id"].as_str().unwrap().to_owned();
    let refused = form("a.txt", "hi", &[("api_key", KEY), ("segment_size", "x")]);
    send(&server, "ada", "translations", refused).await.assert_refused(422, "validation_failed");
    assert!(secrets(&server).iter().any(|name| name.contains(&bad)));
    assert_nowhere(KEY, &[server.data_dir(), output.path()]);
    let (fine, bad) = (ended(&server, "ada", &fine).await, ended(&server, "ada", &bad).await);
    assert_eq!((&fine["state"], &bad["state"]), (&json!("completed"), &json!("failed")), "{fine}");
    let error = bad["error"].as_str().unwrap();
    assert!(error.contains("key is ***") && !error.contains(KEY), "{error}");
    secrets_gone(&server).await;
    let shown = server.printed(&["log", "show", "--json"]);
    assert!(shown.contains("with ***") && !shown.contains(KEY), "{shown}");
    for marker in [KEY, worker, backend, whsec, signing, master] {
        assert_nowhere(marker, &[server.data_dir(), output.path()]);
    }
    assert!(std::fs::metadata(&log).unwrap().len() > 10_000, "the log lines were looked at");
}
