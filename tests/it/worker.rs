//! `t2m worker` against a server that plays the other side of the lease protocol, and against a real
//! one.

use std::collections::{BTreeSet, VecDeque};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use actix_web::{App, HttpRequest, HttpResponse, HttpServer, web};
use reqwest::Method;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use t2m::clock::Clock;
use tempfile::TempDir;

use crate::server::{LOG_FILE, Server, Setup, ask};

pub const TOKEN: &str = "worker-token-of-the-tests-1234";
const KEY: &str = "sk-marker-in-the-lease";
const JOB: &str = "019cadd3-83f9-7302-bd91-ff81a461489e";
const LEASE: &str = "019cadd4-6689-7f9d-adde-d1ca619cf948";
const PATIENCE: Duration = Duration::from_secs(60);

/// What the other side does and has seen.
#[derive(Default)]
struct Side {
    leases: VecDeque<Value>,
    /// Calls that are answered with 503 before any is served.
    out_of_order: usize,
    cancelled: bool,
    lost: bool,
    /// Path and body of each call that was served, but for leases.
    calls: Vec<(String, String)>,
    faults: Vec<String>,
}

#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Side>>);

impl Shared {
    fn side(&self) -> std::sync::MutexGuard<'_, Side> {
        self.0.lock().unwrap()
    }

    async fn call(&self, what: &str) -> String {
        let waiting = async {
            loop {
                let found = {
                    let side = self.side();
                    assert!(side.faults.is_empty(), "{:?}", side.faults);
                    side.calls.iter().find(|(path, _)| path.contains(what)).cloned()
                };
                if let Some((_, body)) = found {
                    return body;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(PATIENCE, waiting)
            .await
            .unwrap_or_else(|_| panic!("no call of {what}"))
    }

    fn has_seen(&self, what: &str) -> bool {
        self.side().calls.iter().any(|(path, _)| path.contains(what))
    }
}

async fn answer(shared: web::Data<Shared>, request: HttpRequest, body: web::Bytes) -> HttpResponse {
    let path = request.uri().to_string();
    let mut side = shared.side();
    if side.out_of_order > 0 {
        side.out_of_order -= 1;
        return HttpResponse::ServiceUnavailable().finish();
    }
    if request.headers().contains_key("x-request-id") {
        side.faults.push("an id that is none was sent".to_owned());
    }
    let authorization = request.headers().get("authorization").map(|it| it.to_str().unwrap());
    if path.starts_with("/source") {
        if authorization.is_some() {
            side.faults.push("the worker's token went along with a link".to_owned());
        }
        return HttpResponse::Ok().body("The house is big.");
    }
    if authorization != Some(&format!("Bearer {TOKEN}")) {
        return HttpResponse::Unauthorized().finish();
    }
    if path.ends_with("/worker/lease") {
        return match side.leases.pop_front() {
            Some(lease) => HttpResponse::Ok().json(json!({ "success": true, "data": lease })),
            None => HttpResponse::NoContent().finish(),
        };
    }
    if !path.contains(JOB)
        || !(path.contains(LEASE) || String::from_utf8_lossy(&body).contains(LEASE))
    {
        side.faults.push(format!("a call without job or lease: {path}"));
    }
    side.calls.push((path.clone(), String::from_utf8_lossy(&body).into_owned()));
    match (side.lost, path.ends_with("/progress")) {
        (true, _) => HttpResponse::Conflict().finish(),
        (false, true) => HttpResponse::Ok().json(json!({ "success": true, "data": {
            "cancelled": side.cancelled,
            "expires_at": Clock::system().now() + chrono::TimeDelta::seconds(60),
        }})),
        (false, false) => HttpResponse::Ok().json(json!({ "success": true, "data": {} })),
    }
}

/// A worker at work, and the other side.
struct Bench {
    shared: Shared,
    process: Child,
    dir: TempDir,
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Bench {
    /// `script` reads the job in `$job`; `prepare` sees the address of the other side.
    fn start(script: &str, token: &str, prepare: impl FnOnce(&mut Side, &str)) -> Self {
        let shared = Shared::default();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        prepare(&mut shared.side(), &address);
        let data = web::Data::new(shared.clone());
        std::thread::spawn(move || {
            actix_web::rt::System::new().block_on(async move {
                let app =
                    move || App::new().app_data(data.clone()).default_service(web::to(answer));
                HttpServer::new(app).workers(1).listen(listener).unwrap().run().await.unwrap();
            });
        });
        let dir = TempDir::new().unwrap();
        let engine =
            format!("command:/bin/sh -c 'read -r job; echo $$ > ../../../../pid; {script}'");
        let setup = Setup::development()
            .with("T2M_ENGINE", engine)
            .with("T2M_SERVER", address)
            .with("T2M_WORKER_TOKEN", token)
            .with("T2M_WORKER_KINDS", "video,translation")
            .with("T2M_WORKER_SCRATCH", dir.path().to_str().unwrap())
            .with("RUST_LOG", "trace")
            .with(LOG_FILE, dir.path().join("stderr").to_str().unwrap());
        let mut command = setup.command(dir.path(), &["worker"]);
        let process = command.stdout(Stdio::null()).spawn().unwrap();
        Self { shared, process, dir }
    }

    fn terminate(&mut self) -> bool {
        kill_process(Pid::from_child(&self.process), Signal::TERM).unwrap();
        self.process.wait().unwrap().success()
    }

    fn printed(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("stderr")).unwrap()
    }

    /// Whether the engine's process is there; it is the leader of its group.
    fn engine_runs(&self) -> bool {
        let id = std::fs::read_to_string(self.dir.path().join("pid")).unwrap();
        let state =
            std::process::Command::new("ps").args(["-o", "stat=", "-p", id.trim()]).output();
        let state = state.unwrap().stdout;
        !state.is_empty() && !state.starts_with(b"Z")
    }
}

fn translation(address: &str) -> Value {
    json!({
        "lease_id": LEASE, "job_id": JOB, "kind": "translation", "attempt": 1,
        "expires_at": Clock::system().now() + chrono::TimeDelta::seconds(60),
        "prompt": "a.txt", "api_key": KEY, "request_id": "fit for no\nheader",
        "options": { "source_file_id": JOB, "format": "text", "model_name": "m",
                     "segment_size": 100, "has_api_key": true },
        "source": { "url": format!("{address}/source?signature=s") },
        "outputs": [{ "name": "translation", "content_types": "text/plain" }],
    })
}

fn one_job(side: &mut Side, address: &str) {
    side.leases.push_back(translation(address));
}

#[tokio::test]
async fn a_job_is_fetched_done_and_handed_in_while_the_server_stumbles() {
    let script = r#"case $job in *sk-marker-in-the-lease*) ;; *) exit 1;; esac
                    tr a-z A-Z < ../source > ../output.txt; echo "{\"progress\": 50}""#;
    let mut bench = Bench::start(script, TOKEN, |side, address| {
        one_job(side, address);
        side.out_of_order = 3;
    });
    bench.shared.call("/complete").await;
    assert_eq!(bench.shared.call("/output?").await, "THE HOUSE IS BIG.");
    let output =
        bench.shared.side().calls.iter().find(|(path, _)| path.contains("/output?")).cloned();
    assert!(output.unwrap().0.contains("name=translation"));
    assert!(bench.terminate());
    let left = std::fs::read_dir(bench.dir.path().join("t2m-worker")).unwrap();
    let left: Vec<_> = left.map(|it| it.unwrap().path()).filter(|path| path.is_dir()).collect();
    assert!(left.is_empty(), "{left:?}");
    let printed = bench.printed();
    assert!(
        printed.len() > 1000 && !printed.contains(KEY) && !printed.contains(TOKEN),
        "{printed}"
    );
    assert!(!printed.contains("signature="), "a link is a permission: {printed}");
}

#[tokio::test]
async fn a_failure_is_told_with_the_engines_words() {
    let script = "echo it is too dark >&2; exit 75";
    let bench = Bench::start(script, TOKEN, one_job);
    let body: Value = serde_json::from_str(&bench.shared.call("/fail").await).unwrap();
    assert_eq!(body["retryable"], true);
    assert!(body["error"].as_str().unwrap().contains("it is too dark"), "{body}");
    assert!(!bench.shared.has_seen("/complete"));
}

#[tokio::test]
async fn a_cancelled_job_stops_its_engine_within_two_seconds() {
    let bench = Bench::start("sleep 1000", TOKEN, one_job);
    bench.shared.call("/progress").await;
    assert!(bench.engine_runs());
    bench.shared.side().cancelled = true;
    let began = std::time::Instant::now();
    let body: Value = serde_json::from_str(&bench.shared.call("/fail").await).unwrap();
    assert_eq!((&body["error"], &body["retryable"]), (&json!("cancelled"), &json!(false)));
    assert!(!bench.engine_runs());
    assert!(began.elapsed() < Duration::from_secs(10), "with room for a busy machine");
}

#[tokio::test]
async fn a_lost_lease_stops_the_engine_and_nothing_more_is_said() {
    let mut bench = Bench::start("sleep 1000", TOKEN, one_job);
    bench.shared.call("/progress").await;
    bench.shared.side().lost = true;
    let waiting = async {
        while bench.engine_runs() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.expect("the engine is stopped");
    assert!(bench.terminate());
    for late in ["/output?", "/complete", "/fail"] {
        assert!(!bench.shared.has_seen(late), "{late}");
    }
}

#[tokio::test]
async fn a_worker_that_is_told_to_stop_gives_its_job_back() {
    let mut bench = Bench::start("sleep 1000", TOKEN, one_job);
    bench.shared.call("/progress").await;
    assert!(bench.terminate());
    let body: Value = serde_json::from_str(&bench.shared.call("/fail").await).unwrap();
    assert_eq!(body["given_back"], true);
    assert!(!bench.engine_runs());
}

#[tokio::test]
async fn an_engine_does_not_outlive_a_worker_that_is_killed() {
    let mut bench = Bench::start("sleep 1000", TOKEN, one_job);
    bench.shared.call("/progress").await;
    bench.process.kill().unwrap();
    bench.process.wait().unwrap();
    let waiting = async {
        while bench.engine_runs() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.expect("the engine ends");
}

#[tokio::test]
async fn a_worker_that_is_not_welcome_ends_and_bad_settings_are_named() {
    let mut bench = Bench::start("true", "another-token-000000000000", one_job);
    assert!(!bench.process.wait().unwrap().success());
    assert!(bench.printed().contains("401"));
    let setup = Setup::development();
    let bad = ["worker", "--engine", "nothing", "--server", "ftp://x", "--token", "t-0-p"];
    let worse = ["--kinds", "poem", "--otlp-endpoint", "127.0.0.1:4318"];
    let output = setup.run(bench.dir.path(), &[&bad[..], &worse].concat());
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{errors}");
    for variable in ["T2M_ENGINE", "T2M_SERVER", "T2M_WORKER_KINDS", "OTEL_EXPORTER_OTLP_ENDPOINT"]
    {
        assert!(errors.contains(variable), "{variable} is not in {errors}");
    }
    assert!(!errors.contains("t-0-p"), "{errors}");
}

/// A worker of a real server, whose engine writes its job down and makes a video once it may.
pub struct Remote {
    process: Child,
    dir: TempDir,
}

impl Drop for Remote {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Remote {
    pub fn start(server: &Server, setup: Setup) -> Self {
        let dir = TempDir::new().unwrap();
        let script = r#"cat > ../../../../job
            until test -e ../../../../go; do sleep 0.02; done
            printf "\0\0\0\030ftypisom\0\0\0\0isommp42" > ../output.mp4"#;
        let setup = setup
            .with("T2M_ENGINE", format!("command:/bin/sh -c '{script}'"))
            .with("T2M_SERVER", &server.address)
            .with("T2M_WORKER_TOKEN", TOKEN)
            .with("T2M_WORKER_SCRATCH", dir.path().to_str().unwrap())
            .with("T2M_LOG_FORMAT", "json")
            .with(LOG_FILE, dir.path().join("stderr").to_str().unwrap());
        let process = setup.command(dir.path(), &["worker"]).stdout(Stdio::null()).spawn().unwrap();
        Self { process, dir }
    }

    pub fn may_go_on(&self) {
        std::fs::write(self.dir.path().join("go"), "").unwrap();
    }

    pub fn terminate(&mut self) {
        kill_process(Pid::from_child(&self.process), Signal::TERM).unwrap();
        assert!(self.process.wait().unwrap().success());
    }

    /// The log line with this message, once it is there.
    async fn line(&self, message: &str) -> Value {
        let waiting = async {
            loop {
                let text = std::fs::read_to_string(self.dir.path().join("stderr")).unwrap();
                let lines = text.lines().filter_map(|line| serde_json::from_str(line).ok());
                let found: Vec<Value> = lines.collect();
                if let Some(line) = found.into_iter().find(|line| line["message"] == message) {
                    return line;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(PATIENCE, waiting).await.expect("it says so")
    }
}

#[tokio::test]
async fn all_that_a_worker_does_for_a_job_bears_the_id_of_the_request_for_it() {
    let server = Server::start(Setup::clerk().with("T2M_WORKER_TOKENS", TOKEN));
    let worker = Remote::start(&server, Setup::development().with("RUST_LOG", "t2m=info"));
    let id = "req_of_a_test";
    let request = server.request_of("user_ada", Method::POST, "videos/generate");
    let request = request.header("x-request-id", id).json(&json!({ "prompt": "a pier" }));
    let job = ask(request).await.data(202)["job_id"].as_str().unwrap().to_owned();
    let mut events = server.events("user_ada", &format!("jobs/{job}/events"), Some(0)).await;
    while events.next().await.unwrap().kind != "job.progressed" {}
    worker.may_go_on();
    while events.next().await.unwrap().kind != "job.completed" {}

    let shown = server.printed(&["log", "show", "--json"]);
    let all = shown.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let mut kinds = BTreeSet::new();
    for event in all {
        let is_of_job = event["stream"] == format!("job-{job}") || event["data"]["job_id"] == job;
        if is_of_job {
            assert_eq!(event["metadata"]["correlation_id"], id, "{event}");
            let kind = event["type"].as_str().unwrap();
            kinds.insert(kind.split_once(".v").map_or(kind, |(kind, _)| kind).to_owned());
        }
    }
    let expected =
        ["file.stored", "job.completed", "job.leased", "job.progressed", "job.requested"];
    assert_eq!(kinds, BTreeSet::from(expected.map(str::to_owned)));
    let told = std::fs::read(worker.dir.path().join("job")).unwrap();
    let told: Value = serde_json::from_slice(&told).unwrap();
    assert_eq!((&told["job_id"], &told["request_id"]), (&json!(job), &json!(id)), "{told}");
    let line = worker.line("completed").await;
    let attempt = json!({ "name": "attempt", "job_id": job, "attempt": 1, "request_id": id });
    assert_eq!(line["span"], attempt, "{line}");
}
