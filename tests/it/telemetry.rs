//! What operators see from outside: metrics, the dashboard over them, log lines, traces, and what is
//! deployed with it.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc;

use prost::Message as _;
use reqwest::Method;
use serde_json::{Value, json};

use crate::server::{LOG_FILE, Server, Setup, ask};
use crate::worker::{Remote, TOKEN};

const ADA: &str = "user_ada";

async fn metrics(server: &Server) -> String {
    let answer = ask(server.request(Method::GET, "/metrics")).await;
    assert_eq!(answer.status, 200);
    assert!(answer.header("content-type").starts_with("text/plain; version=0.0.4"));
    String::from_utf8(answer.bytes).unwrap()
}

/// The value of a series, by the line's beginning.
fn value(text: &str, series: &str) -> f64 {
    let found = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    found.unwrap_or_else(|| panic!("no {series} in\n{text}")).parse().unwrap()
}

/// The metrics that an expression, or a file of them, asks for.
fn names_in(text: &str) -> BTreeSet<&str> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| word.starts_with("t2m_") || word.starts_with("process_")).collect()
}

#[tokio::test]
async fn what_happens_is_counted_and_dashboard_and_alerts_ask_for_nothing_else() {
    let server = Server::start(Setup::clerk());
    // An increase is seen of what was there before it.
    let text = metrics(&server).await;
    assert_eq!(value(&text, "t2m_job_leases_expired_total"), 0.0);
    assert_eq!(value(&text, "t2m_background_panics_total{task=\"projector\"}"), 0.0);
    for verdict in ["recorded", "unchanged", "ignored", "unusable", "rejected", "failed"] {
        let series = format!("t2m_webhook_deliveries_total{{verdict=\"{verdict}\"}}");
        assert_eq!(value(&text, &series), 0.0);
    }
    server.get(ADA, "me").await.data(200);
    server.get(ADA, "jobs/nonsense").await;
    server.generate(ADA, "a lighthouse").await;
    server.deliver("user.created", &json!({ "id": "user_bob" })).await.data(200);
    let forged = server.delivery("msg_1", "user.created", &json!({ "id": "user_eve" }));
    ask(forged.header("svix-signature", "v1,AAAA")).await;
    let text = metrics(&server).await;
    let requests =
        "t2m_http_requests_total{method=\"POST\",route=\"/videos/generate\",status=\"202\"}";
    assert_eq!(value(&text, requests), 1.0);
    assert_eq!(value(&text, "t2m_jobs{state=\"queued\"}"), 1.0);
    assert_eq!(value(&text, "t2m_jobs{state=\"failed\"}"), 0.0);
    assert_eq!(value(&text, "t2m_webhook_deliveries_total{verdict=\"recorded\"}"), 1.0);
    assert_eq!(value(&text, "t2m_log_events_appended_total{type=\"job.requested.v1\"}"), 1.0);
    assert_eq!(value(&text, "t2m_log_writable"), 1.0);
    assert_eq!(value(&text, "t2m_projection_lag_positions"), 0.0);
    for purpose in ["work", "traffic"] {
        assert_eq!(value(&text, &format!("t2m_ready{{purpose=\"{purpose}\"}}")), 1.0);
    }
    assert!(value(&text, "t2m_disk_free_bytes") > 0.0);
    assert!(value(&text, "t2m_log_position") >= 3.0);
    assert!(value(&text, "t2m_log_append_duration_seconds_count") >= 3.0);
    assert!(!text.contains(ADA), "no series is a person's");

    let board = std::fs::read_to_string(deployed("grafana-dashboard.json")).unwrap();
    let board: Value = serde_json::from_str(&board).unwrap();
    let mut asked = BTreeSet::new();
    for target in board["panels"].as_array().unwrap().iter().flat_map(|panel| {
        panel["targets"].as_array().unwrap().iter().map(|target| target["expr"].as_str().unwrap())
    }) {
        asked.extend(names_in(target));
    }
    assert!(asked.len() > 15, "{asked:?}");
    let rules = std::fs::read_to_string(deployed("alerts.yaml")).unwrap();
    let asked_of_alerts = names_in(&rules);
    assert!(asked_of_alerts.len() >= 6, "{asked_of_alerts:?}");
    asked.extend(asked_of_alerts);
    // This tells of what this server does not have: keys from the network.
    for name in asked.into_iter().filter(|name| *name != "t2m_jwks_age_seconds") {
        assert!(text.lines().any(|line| line.starts_with(name)), "no {name} in\n{text}");
    }
}

#[tokio::test]
async fn metrics_are_told_also_while_the_read_model_cannot_be_asked() {
    let server = Server::start(Setup::clerk());
    server.generate(ADA, "a lighthouse").await;
    assert_eq!(value(&metrics(&server).await, "t2m_jobs{state=\"queued\"}"), 1.0);
    let views = rusqlite::Connection::open(server.data_dir().join("views.sqlite")).unwrap();
    views.execute_batch("DROP TABLE tallies").unwrap();
    let text = metrics(&server).await;
    assert_eq!(value(&text, "t2m_log_writable"), 1.0);
    assert!(
        value(&text, "t2m_jobs{state=\"queued\"}").is_nan(),
        "what was counted before is no count"
    );
}

#[tokio::test]
async fn a_log_line_is_json_and_names_the_request_that_it_is_of() {
    let lines = tempfile::NamedTempFile::new().unwrap();
    let setup = Setup::clerk()
        .with("T2M_LOG_FORMAT", "json")
        .with("RUST_LOG", "t2m=info")
        .with(LOG_FILE, lines.path().to_string_lossy());
    let mut server = Server::start(setup);
    let request = server.request_of(ADA, Method::GET, "jobs/nonsense");
    ask(request.header("x-request-id", "req-of-a-test")).await;
    server.stop();
    let text = std::fs::read_to_string(lines.path()).unwrap();
    let mut found = false;
    for line in text.lines() {
        let line: Value = serde_json::from_str(line).unwrap_or_else(|_| panic!("no JSON: {line}"));
        found |= line["request_id"] == "req-of-a-test" && line["status"].is_u64();
    }
    assert!(found, "{text}");
}

#[test]
fn the_log_lines_of_a_worker_are_json_too() {
    let server = Server::start(Setup::clerk());
    let scratch = tempfile::tempdir().unwrap();
    let worker = Setup::development()
        .with("T2M_ENGINE", "storyboard")
        .with("T2M_LOG_FORMAT", "json")
        .with("RUST_LOG", "t2m=info")
        .with("T2M_SERVER", &server.address)
        .with("T2M_WORKER_TOKEN", "of-another-server")
        .command(scratch.path(), &["worker"])
        .output()
        .unwrap();
    let text = String::from_utf8(worker.stderr).unwrap();
    let first: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    assert_eq!(first["message"], "waiting for jobs", "{text}");
}

#[tokio::test]
async fn a_trace_goes_to_the_collector_within_the_callers_own() {
    let collector = Collector::start();
    let address = &collector.address;
    let setup = Setup::clerk().with("OTEL_EXPORTER_OTLP_ENDPOINT", address);
    let setup = setup.with("CLERK_WEBHOOK_SECRET", "").with("OTEL_SERVICE_NAME", "t2m-eu");
    let mut server = Server::start(setup);
    let trace = "0af7651916cd43dd8448eb211c80319c";
    let request = server.request_of(ADA, Method::POST, "videos/generate");
    let request = request.header("traceparent", format!("00-{trace}-b7ad6b7169203331-01"));
    ask(request.json(&json!({ "prompt": "a lighthouse" }))).await.data(202);
    let failing = server.request(Method::POST, "webhooks/clerk");
    let failing = failing.header("traceparent", format!("00-{trace}-b7ad6b7169203331-01"));
    ask(failing).await.assert_refused(503, "not_ready");
    // What is left is sent on the way out.
    server.stop();
    let of_caller: Vec<Span> =
        collector.spans().into_iter().filter(|span| hex::encode(&span.trace_id) == trace).collect();
    for (name, failed) in [
        ("POST /api/v1/videos/generate", false),
        ("command", false),
        ("POST /api/v1/webhooks/clerk", true),
    ] {
        let span = of_caller.iter().find(|span| span.name == name);
        let span = span.unwrap_or_else(|| panic!("no {name} in {of_caller:?}"));
        assert_eq!((span.failed, &span.service[..]), (failed, "t2m-eu"), "{span:?}");
    }
}

#[tokio::test]
async fn what_a_worker_asks_of_the_server_belongs_to_the_trace_of_its_attempt() {
    let (of_server, of_worker) = (Collector::start(), Collector::start());
    let setup = Setup::clerk()
        .with("T2M_WORKER_TOKENS", TOKEN)
        .with("OTEL_EXPORTER_OTLP_ENDPOINT", &of_server.address);
    let mut server = Server::start(setup);
    let setup = Setup::development().with("OTEL_EXPORTER_OTLP_ENDPOINT", &of_worker.address);
    let mut worker = Remote::start(&server, setup);
    worker.may_go_on();
    let job = server.generate(ADA, "a lighthouse").await;
    let mut events = server.events(ADA, &format!("jobs/{job}/events"), Some(0)).await;
    while events.next().await.unwrap().kind != "job.completed" {}
    drop(events);
    worker.terminate();
    server.stop();
    let spans = of_worker.spans();
    let attempt = spans.iter().find(|span| span.name == "attempt");
    let attempt = attempt.unwrap_or_else(|| panic!("no attempt in {spans:?}"));
    assert_eq!(attempt.service, "t2m-worker");
    let mut spans = of_server.spans();
    spans.retain(|span| span.trace_id == attempt.trace_id);
    assert!(spans.iter().all(|span| span.service == "t2m"), "{spans:?}");
    let is_call = |it: &&Span| it.name.contains(" /api/") && it.parent == attempt.span_id;
    let calls = spans.iter().filter(is_call);
    assert!(calls.count() >= 2, "an output and a completion: {spans:?}");
    assert!(spans.iter().any(|span| span.name == "command"), "{spans:?}");
}

/// Takes traces by OTLP over HTTP.
struct Collector {
    address: String,
    received: mpsc::Receiver<Vec<u8>>,
}

#[derive(Debug)]
struct Span {
    service: String,
    name: String,
    trace_id: Vec<u8>,
    span_id: Vec<u8>,
    parent: Vec<u8>,
    failed: bool,
}

impl Collector {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let (sender, received) = mpsc::channel();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (Ok(mut stream), sender) = (stream, sender.clone()) else { return };
                std::thread::spawn(move || {
                    let (mut bytes, mut chunk) = (Vec::<u8>::new(), [0; 65_536]);
                    while body(&bytes).is_none() {
                        match stream.read(&mut chunk) {
                            Ok(count @ 1..) => bytes.extend_from_slice(&chunk[..count]),
                            _ => return,
                        }
                    }
                    // Before the answer: whoever waited for that and ended has been heard.
                    let _ = sender.send(bytes);
                    let answer =
                        "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
                    let _ = stream.write_all(answer.as_bytes());
                });
            }
        });
        Self { address, received }
    }

    /// What came from processes that have ended since.
    fn spans(&self) -> Vec<Span> {
        let mut spans = Vec::new();
        for request in self.received.try_iter() {
            assert!(request.starts_with(b"POST /v1/traces"));
            let sent = otlp::Sent::decode(body(&request).unwrap()).unwrap();
            for process in sent.processes {
                let service = process.service();
                for span in process.scopes.into_iter().flat_map(|scope| scope.spans) {
                    let otlp::Span { trace_id, span_id, parent, name, status } = span;
                    let failed = status.is_some_and(|status| status.code == otlp::ERROR);
                    let service = service.clone();
                    spans.push(Span { service, name, trace_id, span_id, parent, failed });
                }
            }
        }
        spans
    }
}

/// Of an HTTP request that is there as a whole.
fn body(request: &[u8]) -> Option<&[u8]> {
    let end = request.windows(4).position(|part| part == b"\r\n\r\n")?;
    let head = String::from_utf8_lossy(&request[..end]).to_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    let length: usize = length.expect("it tells its length").parse().unwrap();
    request.get(end + 4..end + 4 + length)
}

/// As much of `opentelemetry.proto.collector.trace.v1` as is looked at.
mod otlp {
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Sent {
        #[prost(message, repeated, tag = "1")]
        pub processes: Vec<Process>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Process {
        #[prost(message, optional, tag = "1")]
        pub resource: Option<Resource>,
        #[prost(message, repeated, tag = "2")]
        pub scopes: Vec<Scope>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Resource {
        #[prost(message, repeated, tag = "1")]
        pub attributes: Vec<Attribute>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Attribute {
        #[prost(string, tag = "1")]
        pub key: String,
        #[prost(message, optional, tag = "2")]
        pub value: Option<Text>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Text {
        #[prost(string, tag = "1")]
        pub text: String,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Scope {
        #[prost(message, repeated, tag = "2")]
        pub spans: Vec<Span>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Span {
        #[prost(bytes = "vec", tag = "1")]
        pub trace_id: Vec<u8>,
        #[prost(bytes = "vec", tag = "2")]
        pub span_id: Vec<u8>,
        #[prost(bytes = "vec", tag = "4")]
        pub parent: Vec<u8>,
        #[prost(string, tag = "5")]
        pub name: String,
        #[prost(message, optional, tag = "15")]
        pub status: Option<Status>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Status {
        #[prost(int32, tag = "3")]
        pub code: i32,
    }

    pub const ERROR: i32 = 2;

    impl Process {
        pub fn service(&self) -> String {
            let attributes = self.resource.iter().flat_map(|it| &it.attributes);
            let mut named = attributes.filter(|it| it.key == "service.name");
            named.find_map(|it| Some(it.value.as_ref()?.text.clone())).unwrap_or_default()
        }
    }
}

#[tokio::test]
async fn a_collector_that_takes_no_traces_is_told_of() {
    let collector = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", collector.local_addr().unwrap());
    // Nobody answers there.
    drop(collector);
    let lines = tempfile::NamedTempFile::new().unwrap();
    let setup = Setup::clerk()
        .with("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        .with("RUST_LOG", "warn")
        .with(LOG_FILE, lines.path().to_string_lossy());
    let mut server = Server::start(setup);
    server.get(ADA, "me").await.data(200);
    server.stop();
    let text = std::fs::read_to_string(lines.path()).unwrap();
    assert!(text.contains("ERROR opentelemetry_sdk: "), "{text}");
}

fn deployed(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy").join(name)
}

#[test]
fn what_is_deployed_parses_and_names_only_settings_that_there_are() {
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/.venv/bin/python");
    let script = "
import configparser, json, sys, yaml
unit = configparser.ConfigParser(strict=False, interpolation=None)
unit.optionxform = str
unit.read(sys.argv[1])
assert unit['Service']['ExecStart'].endswith('t2m serve'), unit
compose = yaml.safe_load(open(sys.argv[2]))
nodes = [it for it in compose['services'].values() if it.get('image') == 't2m']
assert len(nodes) == 3
proxy = compose['services']['proxy']['configs'][0]['source']
asked = [it.split() for it in compose['configs'][proxy]['content'].splitlines()]
assert ['health_uri', '/api/v1/system/ready?for=traffic'] in asked, asked
assert ['@metrics', 'path', '/metrics', '/api/metrics', '/api/v1/metrics'] in asked, asked
assert ['respond', '@metrics', '404'] in asked, asked
assert {'lb_try_duration', 'fail_duration'} <= {it[0] for it in asked if it}, asked
manifests = list(yaml.safe_load_all(open(sys.argv[3])))
kinds = [it['kind'] for it in manifests]
assert kinds == ['ConfigMap', 'StatefulSet', 'Service', 'PodDisruptionBudget'], kinds
pod = manifests[1]['spec']['template']['spec']
sleep = pod['containers'][0]['lifecycle']['preStop']['sleep']['seconds']
assert pod['terminationGracePeriodSeconds'] > sleep + 10, 'no time to stop'
probe = pod['containers'][0]['readinessProbe']['httpGet']['path']
assert probe == '/api/v1/system/ready?for=traffic', probe
images = [it['image'] for it in compose['services'].values()]
assert all(image == 't2m' or ':' in image for image in images), images
assert all(port.startswith('127.0.0.1:') for port in compose['services']['proxy']['ports'])
rules = [rule for group in yaml.safe_load(open(sys.argv[4]))['groups'] for rule in group['rules']]
assert all({'alert', 'expr', 'labels', 'annotations'} <= set(rule) for rule in rules), rules
assert 'ENVIRONMENT=production' in unit['Service']['Environment'], unit
print(json.dumps(sorted(set(nodes[0]['environment']) | set(manifests[0]['data']))))
";
    let output = Command::new(python)
        .args(["-c", script])
        .args(["t2m.service", "compose.yaml", "kubernetes.yaml", "alerts.yaml"].map(deployed))
        .output()
        .expect("scripts/setup-tests has made the environment");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let names: Vec<String> = serde_json::from_slice(&output.stdout).unwrap();
    let help = Command::new(env!("CARGO_BIN_EXE_t2m")).args(["serve", "--help"]).output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    for name in names.iter().filter(|name| !name.starts_with("AWS_")) {
        assert!(help.contains(&format!("[env: {name}")), "{name} is no setting");
    }
    for file in ["t2m.service", "compose.yaml", "kubernetes.yaml", "Containerfile"] {
        let text = std::fs::read_to_string(deployed(file)).unwrap();
        for secret in ["whsec_", "sk_live", "sk_test", "BEGIN PRIVATE"] {
            assert!(!text.contains(secret), "{file} holds a secret");
        }
    }
}

#[test]
fn what_an_image_is_built_from_is_listed_and_holds_no_secrets() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let listed = std::fs::read_to_string(deployed("Containerfile.dockerignore")).unwrap();
    let lines: Vec<_> = listed.lines().filter(|line| !line.starts_with('#')).collect();
    assert_eq!(lines[0], "*", "what is not named stays out");
    for path in lines.iter().filter_map(|line| line.strip_prefix('!')) {
        assert!(root.join(path).exists(), "{path}");
    }
    let last = lines.iter().rposition(|line| line.starts_with('!')).unwrap();
    for secret in ["**/*.env", "**/.env*", "**/*.key"] {
        assert!(lines[last + 1..].contains(&secret), "{secret} comes in again");
    }
    let kept_out = std::fs::read_to_string(root.join(".gitignore")).unwrap();
    for secret in [".env", ".env.*", "*.env", "*.key", "/data"] {
        assert!(kept_out.lines().any(|line| line == secret), "{secret} may be committed");
    }
}
