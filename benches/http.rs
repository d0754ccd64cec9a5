//! The front end's measures: requests a second beside a bare actix-web handler, the latency of a
//! poll while a video is rendered, and memory before and after a large upload.
//!
//! Both servers are processes of their own and the load comes from this one, so all three share
//! the machine's cores: the ratios say more than the figures.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix_web::{App, HttpResponse, HttpServer, web};
use bytes::Bytes;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const CONNECTIONS: usize = 64;
const MEASURED: Duration = Duration::from_secs(5);
/// Caches fill and the first connections are made before anything counts.
const WARM_UP: Duration = Duration::from_secs(1);
/// A page polls now and then; it does not ask as fast as it can.
const POLLERS: usize = 8;
const POLL_EVERY: Duration = Duration::from_millis(20);
const UPLOAD_MIB: u64 = 1024;
/// In the environment of the process that is to be the bare server.
const BARE: &str = "T2M_BENCH_BARE";

fn main() -> std::io::Result<()> {
    if std::env::var_os(BARE).is_some() {
        return actix_web::rt::System::new().block_on(bare());
    }
    // `cargo test --benches` only wants to know that it starts.
    if !std::env::args().any(|argument| argument == "--bench") {
        return Ok(());
    }
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    println!("{cores} cores, load before: {}", load.trim());
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        throughput().await;
        identity().await;
        under_load().await;
    });
    Ok(())
}

/// What actix-web does when nothing is asked of it: JSON in, JSON out.
async fn bare() -> std::io::Result<()> {
    let answer = web::Data::new(json!({ "success": true, "data": {
        "job_id": "0197a8c4-7f6e-7c3a-9f1e-0a4b6f1d2c3e", "kind": "video", "status": "processing",
        "state": "queued", "progress": 0, "prompt": "A lighthouse in the storm", "attempt": 0,
        "options": { "duration": 10, "quality": "720p", "aspect_ratio": "16:9", "seed": 7 },
        "queue_position": 1, "error": null, "output": null, "started_at": null,
        "created_at": "2026-01-01T00:00:00.000000Z", "finished_at": null,
    }}));
    let server = HttpServer::new(move || {
        App::new().app_data(answer.clone()).service(
            web::resource("/bare")
                .get(|answer: web::Data<Value>| async move { HttpResponse::Ok().json(&*answer) })
                .post(|_: web::Json<Value>, answer: web::Data<Value>| async move {
                    HttpResponse::Accepted().json(&*answer)
                }),
        )
    });
    let server = server
        .workers(std::thread::available_parallelism().map_or(2, usize::from))
        .bind("127.0.0.1:0")?;
    println!("listening on http://{}", server.addrs()[0]);
    server.run().await
}

async fn throughput() {
    let program = std::env::current_exe().expect("this program has a path");
    let bare = Server::start(Command::new(program).env(BARE, "1"));
    let directory = tempfile::tempdir().expect("a directory");
    let real = Server::start(&mut t2m(directory.path(), "none"));
    let job = generate(&real, json!({ "prompt": "A lighthouse in the storm" })).await;
    let body = json!({ "prompt": "A lighthouse in the storm", "duration": 10 });

    println!("\n{CONNECTIONS} connections, {} s each", MEASURED.as_secs());
    let bare_get = measured("bare GET", &bare, get("/bare"), None).await;
    let path = format!("/api/jobs/{job}");
    measured("GET jobs/{id}", &real, get(&path), Some(bare_get)).await;
    let bare_post = measured("bare POST", &bare, post("/bare", &body), None).await;
    let request = post("/api/videos/generate", &body);
    measured("POST videos/generate", &real, request, Some(bare_post)).await;
    let last = generate(&real, body).await;
    let path = format!("/api/jobs/{last}");
    measured("GET jobs/{id}, last in queue", &real, get(&path), Some(bare_get)).await;
}

/// The same answer with nobody to identify and with a token that was verified before, in turns
/// because the machine's mood changes.
async fn identity() {
    let directories = [(); 2].map(|()| tempfile::tempdir().expect("a directory"));
    let open = Server::start(&mut t2m(directories[0].path(), "none"));
    let mut closed = t2m(directories[1].path(), "none");
    let closed = Server::start(closed.env("DEV_MODE", "false"));
    // The server has made the key that signs it.
    let token = token(directories[1].path());
    let closed = closed.with_bearer(&token);
    let body = json!({ "prompt": "A lighthouse in the storm" });
    let nobody = get(&format!("/api/jobs/{}", generate(&open, body.clone()).await));
    let path = format!("/api/jobs/{}", generate(&closed, body).await);
    let bearer =
        format!("GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n\r\n");
    println!("\nidentity");
    for _ in 0..3 {
        let free = measured("GET jobs/{id}, DEV_MODE", &open, nobody.clone(), None).await;
        measured("GET jobs/{id}, cached token", &closed, bearer.clone().into(), Some(free)).await;
    }
}

fn token(data_dir: &Path) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_t2m"));
    let command = command.args(["token", "--user", "user_bench", "--expires-in", "3600"]);
    let output = command.env("T2M_DATA_DIR", data_dir).output().expect("t2m runs");
    String::from_utf8(output.stdout).expect("a token").trim().to_owned()
}

/// Requests a second of as many as the server will take, told with their latencies.
async fn measured(name: &str, server: &Server, request: Vec<u8>, beside: Option<f64>) -> f64 {
    let request: Arc<[u8]> = request.into();
    load(server, &request, CONNECTIONS, Duration::ZERO, WARM_UP).await;
    let began = Instant::now();
    let latencies = load(server, &request, CONNECTIONS, Duration::ZERO, MEASURED).await;
    let rate = latencies.len() as f64 / began.elapsed().as_secs_f64();
    let ratio = beside.map_or_else(String::new, |bare| format!("  {:.2} of bare", rate / bare));
    println!("{name:<30} {rate:>9.0}/s  {}{ratio}", quantiles(latencies));
    rate
}

async fn under_load() {
    let directory = tempfile::tempdir().expect("a directory");
    let server = Server::start(&mut t2m(directory.path(), "storyboard"));
    let job =
        generate(&server, json!({ "prompt": "Warm", "duration": 1, "quality": "480p" })).await;
    let idle_job: Arc<[u8]> = get(&format!("/api/jobs/{job}")).into();
    finished(&server, &job).await;
    println!("\nmemory, after a first small video");
    println!("{:<30} {:>9} KiB", "VmRSS idle", server.memory("VmRSS"));
    let (before, began) = (server.memory("VmHWM"), Instant::now());
    upload(&server).await;
    let took = began.elapsed().as_secs_f64();
    println!("{:<30} {:>9} KiB", format!("VmRSS after {UPLOAD_MIB} MiB"), server.memory("VmRSS"));
    println!("{:<30} {:>9} KiB, was {before}", "VmHWM after it", server.memory("VmHWM"));
    println!("{:<30} {:>9.0} MiB/s", "upload", UPLOAD_MIB as f64 / took);

    println!("\n{POLLERS} pages, each asks every {} ms", POLL_EVERY.as_millis());
    let calm = load(&server, &idle_job, POLLERS, POLL_EVERY, MEASURED).await;
    println!("{:<30} {}", "GET jobs/{id}, nothing else", quantiles(calm));
    let film = json!({ "prompt": "A lighthouse in the storm", "duration": 10, "quality": "1080p" });
    let began = Instant::now();
    let job = generate(&server, film).await;
    let request: Arc<[u8]> = get(&format!("/api/jobs/{job}")).into();
    let mut latencies = vec![];
    while state(&server, &job).await != "completed" {
        let second = Duration::from_secs(1);
        latencies.extend(load(&server, &request, POLLERS, POLL_EVERY, second).await);
    }
    let took = began.elapsed().as_secs_f64();
    println!("{:<30} {}  in {took:.1} s", "GET jobs/{id}, 10 s of 1080p", quantiles(latencies));
    println!("{:<30} {:>9} KiB", "VmHWM after it", server.memory("VmHWM"));
}

fn t2m(data_dir: &Path, engine: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_t2m"));
    command
        .arg("serve")
        .env("DEV_MODE", "true")
        .env("T2M_ENGINE", engine)
        .env("T2M_LISTEN", "127.0.0.1:0")
        .env("T2M_DATA_DIR", data_dir)
        .env("RATE_LIMIT_WRITES", "1000000000/1h")
        .env("RATE_LIMIT_READS", "1000000000/1h");
    command
}

/// A server process that ends with the measurement.
struct Server {
    process: Child,
    /// `http://127.0.0.1:8080`
    address: String,
    client: reqwest::Client,
}

impl Server {
    fn start(command: &mut Command) -> Self {
        let command = command.stdout(Stdio::piped()).stderr(Stdio::null());
        let mut process = command.spawn().expect("the server starts");
        let mut line = String::new();
        let stdout = process.stdout.take().expect("it is piped");
        BufReader::new(stdout).read_line(&mut line).expect("the server says where it listens");
        let address = line.trim().strip_prefix("listening on ").expect("an address").to_owned();
        let client = reqwest::Client::builder().no_proxy().build().expect("a client");
        Self { process, address, client }
    }

    /// Signs what this program asks in between.
    fn with_bearer(mut self, token: &str) -> Self {
        let value = format!("Bearer {token}").parse().expect("a header");
        let headers = [(reqwest::header::AUTHORIZATION, value)].into_iter().collect();
        let client = reqwest::Client::builder().no_proxy().default_headers(headers);
        self.client = client.build().expect("a client");
        self
    }

    /// A field of `/proc/PID/status`, in KiB.
    fn memory(&self, field: &str) -> u64 {
        let path = format!("/proc/{}/status", self.process.id());
        let status = std::fs::read_to_string(path).expect("the server runs, on Linux");
        let line = status.lines().find(|line| line.starts_with(field));
        let number = line.and_then(|line| line.split_whitespace().nth(1));
        number.and_then(|number| number.parse().ok()).expect("the kernel tells it")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

async fn generate(server: &Server, body: Value) -> String {
    let request = server.client.post(format!("{}/api/videos/generate", server.address));
    let response = request.json(&body).send().await.expect("an answer");
    let answer: Value = response.json().await.expect("JSON");
    answer["data"]["job_id"].as_str().unwrap_or_else(|| panic!("refused: {answer}")).to_owned()
}

async fn state(server: &Server, job: &str) -> String {
    let request = server.client.get(format!("{}/api/jobs/{job}", server.address));
    let answer: Value = request.send().await.expect("an answer").json().await.expect("JSON");
    let state = answer["data"]["state"].as_str().unwrap_or_else(|| panic!("refused: {answer}"));
    assert!(state != "failed", "{answer}");
    state.to_owned()
}

async fn finished(server: &Server, job: &str) {
    while state(server, job).await != "completed" {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Sends a file that is never whole in memory here either.
async fn upload(server: &Server) {
    let mib = Bytes::from(vec![b'x'; 1 << 20]);
    let chunks = (0..UPLOAD_MIB).map(move |_| Ok::<_, std::io::Error>(mib.clone()));
    let body = reqwest::Body::wrap_stream(futures_util::stream::iter(chunks));
    let part = reqwest::multipart::Part::stream_with_length(body, UPLOAD_MIB << 20);
    let form = reqwest::multipart::Form::new().part("file", part.file_name("large.txt"));
    let request = server.client.post(format!("{}/api/files/upload", server.address));
    let response = request.multipart(form).send().await.expect("an answer");
    assert!(response.status().is_success(), "{}", response.text().await.unwrap_or_default());
}

fn get(path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n").into_bytes()
}

fn post(path: &str, body: &Value) -> Vec<u8> {
    let body = body.to_string();
    format!(
        "POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// The same request over and over on each connection, `pause` apart; how long each took.
async fn load(
    server: &Server,
    request: &Arc<[u8]>,
    connections: usize,
    pause: Duration,
    during: Duration,
) -> Vec<Duration> {
    let host = server.address.trim_start_matches("http://");
    let until = Instant::now() + during;
    let mut clients = vec![];
    for _ in 0..connections {
        let connection = TcpStream::connect(host).await.expect("a connection");
        connection.set_nodelay(true).expect("a socket takes the option");
        clients.push(tokio::spawn(repeat(connection, Arc::clone(request), pause, until)));
    }
    let mut latencies = vec![];
    for client in clients {
        latencies.extend(client.await.expect("the client ended well"));
    }
    latencies
}

async fn repeat(
    mut connection: TcpStream,
    request: Arc<[u8]>,
    pause: Duration,
    until: Instant,
) -> Vec<Duration> {
    let (mut latencies, mut buffer) = (vec![], Vec::with_capacity(8192));
    while Instant::now() < until {
        let began = Instant::now();
        connection.write_all(&request).await.expect("the server reads");
        response(&mut connection, &mut buffer).await;
        latencies.push(began.elapsed());
        if !pause.is_zero() {
            tokio::time::sleep(pause).await;
        }
    }
    latencies
}

/// Reads one whole answer, which must be a success with a `content-length`.
async fn response(connection: &mut TcpStream, buffer: &mut Vec<u8>) {
    buffer.clear();
    let mut whole = None;
    while whole.is_none_or(|whole| buffer.len() < whole) {
        let read = connection.read_buf(buffer).await.expect("the server answers");
        assert!(read > 0, "the server hung up: {}", String::from_utf8_lossy(buffer));
        if whole.is_none()
            && let Some(end) = buffer.windows(4).position(|four| four == b"\r\n\r\n")
        {
            let head = String::from_utf8_lossy(&buffer[..end]).to_ascii_lowercase();
            assert!(head.starts_with("http/1.1 2"), "{head}");
            let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
            let length: Option<usize> = length.and_then(|length| length.trim().parse().ok());
            whole = Some(end + 4 + length.expect("the answer tells its length"));
        }
    }
}

fn quantiles(mut latencies: Vec<Duration>) -> String {
    latencies.sort_unstable();
    let at = |percent: usize| latencies.get(latencies.len() * percent / 100).copied();
    let ms = |percent| at(percent).unwrap_or_default().as_secs_f64() * 1000.0;
    format!("p50 {:>7.2} ms  p99 {:>7.2} ms", ms(50), ms(99))
}
