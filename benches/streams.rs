//! Five thousand open event streams on one server: what each costs in memory, and how long an event
//! takes until all have it.
//!
//! `cargo bench --bench streams`. The server is a process of its own, but the readers share the
//! machine's cores with it. Both need as many open files as there are streams.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

const STREAMS: usize = 5000;
/// Events, each of which all streams get.
const EVENTS: usize = 10;

fn main() -> std::io::Result<()> {
    // `cargo test --benches` only wants to know that it starts.
    if !std::env::args().any(|argument| argument == "--bench") {
        return Ok(());
    }
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    println!("{cores} cores, load before: {}", load.trim());
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(measure());
    Ok(())
}

async fn measure() {
    let data = tempfile::TempDir::new().expect("a temporary directory");
    let server = Server::start(data.path());
    // Pools and caches fill before anything counts.
    server.generate().await;
    let (sender, mut received) = mpsc::unbounded_channel();
    for _ in 0..100 {
        tokio::spawn(follow(server.connect().await, sender.clone()));
    }
    let before = server.resident_bytes();
    for _ in 100..STREAMS + 100 {
        tokio::spawn(follow(server.connect().await, sender.clone()));
    }
    let after = server.resident_bytes();
    println!(
        "{STREAMS} more streams: {:.1} KiB each (resident set {} to {} MiB)",
        (after.saturating_sub(before)) as f64 / 1024.0 / STREAMS as f64,
        before >> 20,
        after >> 20,
    );
    let mut slowest = Duration::ZERO;
    for number in 0..EVENTS {
        let asked = Instant::now();
        server.generate().await;
        let answered = asked.elapsed();
        for _ in 0..STREAMS + 100 {
            received.recv().await.expect("no stream ends");
        }
        let all = asked.elapsed();
        slowest = slowest.max(all);
        println!("event {number}: answered after {answered:.1?}, all have it after {all:.1?}");
    }
    let after = server.resident_bytes();
    println!(
        "slowest: {slowest:.1?}; after {EVENTS} events {:.1} KiB a stream",
        (after.saturating_sub(before)) as f64 / 1024.0 / STREAMS as f64,
    );
}

/// Tells of each event that a stream brings.
async fn follow(mut stream: TcpStream, sender: mpsc::UnboundedSender<()>) {
    let mut text = Vec::new();
    let mut chunk = [0; 1024];
    while let Ok(count @ 1..) = stream.read(&mut chunk).await {
        text.extend_from_slice(&chunk[..count]);
        let end = |frame: &[u8]| frame.windows(2).position(|pair| pair == b"\n\n");
        while let Some(end) = end(&text) {
            if text[..end].windows(6).any(|start| start == b"data: ") {
                let _ = sender.send(());
            }
            text.drain(..end + 2);
        }
    }
}

struct Server {
    process: Child,
    _stdout: BufReader<ChildStdout>,
    /// `127.0.0.1:…`
    address: String,
    http: reqwest::Client,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Server {
    fn start(data: &Path) -> Self {
        let mut process = Command::new(env!("CARGO_BIN_EXE_t2m"))
            .arg("serve")
            .env_clear()
            .current_dir(data)
            .env("T2M_LISTEN", "127.0.0.1:0")
            .env("T2M_DATA_DIR", data)
            .env("T2M_ENGINE", "none")
            .env("DEV_MODE", "true")
            .env("T2M_STREAMS_PER_USER", "1000000")
            .env("RATE_LIMIT_READS", "1000000/1h")
            .env("RUST_LOG", "off")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the server starts");
        let mut stdout = BufReader::new(process.stdout.take().expect("its output is piped"));
        let mut line = String::new();
        stdout.read_line(&mut line).expect("the server says its address");
        let address = line.trim().strip_prefix("listening on http://").expect("an address");
        let address = address.to_owned();
        Self { process, _stdout: stdout, address, http: reqwest::Client::new() }
    }

    /// Opens a stream of the user's events and waits for its first bytes.
    async fn connect(&self) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).await.expect("the server listens");
        let head = "GET /api/v1/events HTTP/1.1\r\nhost: bench\r\n\r\n";
        stream.write_all(head.as_bytes()).await.expect("the server reads");
        let mut text = Vec::new();
        while !text.ends_with(b"\n\n\r\n") {
            text.push(stream.read_u8().await.expect("the server answers"));
        }
        assert!(text.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&text));
        stream
    }

    /// Causes one event.
    async fn generate(&self) {
        let url = format!("http://{}/api/v1/videos/generate", self.address);
        let request = self.http.post(url).json(&json!({ "prompt": "a lighthouse" }));
        let answer = request.send().await.expect("the server answers");
        assert_eq!(answer.status(), 202);
        answer.json::<Value>().await.expect("an answer in JSON");
    }

    fn resident_bytes(&self) -> u64 {
        let path = format!("/proc/{}/status", self.process.id());
        let status = std::fs::read_to_string(path).expect("the server runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB")).expect("kibibytes");
        kib.trim().parse::<u64>().expect("a number") * 1024
    }
}
