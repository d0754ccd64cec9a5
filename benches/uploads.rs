//! What a large upload costs: memory while it runs, and its speed beside writing and hashing the
//! same bytes directly. The client shares the machine's cores, so the ratio understates.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use reqwest::{Body, Client, Response};
use serde_json::Value;
use sha2::{Digest, Sha256};

const MIB: u64 = 512;
/// Each way is measured so often, and the middle is told.
const ROUNDS: usize = 3;

fn main() -> std::io::Result<()> {
    // `cargo test --benches` only wants to know that it starts.
    if !std::env::args().any(|argument| argument == "--bench") {
        return Ok(());
    }
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!("{MIB} MiB, {ROUNDS} rounds, load before: {}", load.trim());
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(measure());
    Ok(())
}

async fn measure() {
    let directory = tempfile::tempdir().expect("a directory");
    let server = Server::start(directory.path());
    // Caches fill and threads start before anything counts.
    multipart(&server, 64, 0).await;
    tus(&server, 64, 1).await;
    let mut direct = vec![];
    let mut ways = [("multipart", vec![], 0), ("tus", vec![], 0)];
    for round in 0..ROUNDS as u64 {
        let path = directory.path().join("direct");
        let work = tokio::task::spawn_blocking(move || write_and_hash(&path));
        direct.push(work.await.expect("the disk takes it"));
        for (number, (name, speeds, growth)) in (0..).zip(&mut ways) {
            let (before, peak) = (server.memory(), server.watch());
            let (began, seed) = (Instant::now(), 2 + round * 2 + number);
            match *name {
                "tus" => tus(&server, MIB, seed).await,
                _ => multipart(&server, MIB, seed).await,
            }
            speeds.push(MIB as f64 / began.elapsed().as_secs_f64());
            *growth = (*growth).max(peak.stop().saturating_sub(before));
        }
    }
    let seen = spread(&direct);
    let direct = middle(direct);
    println!("{:<22} {direct:>7.0} MiB/s  ({seen}), one after the other", "write, hash, sync");
    for (name, speeds, growth) in ways {
        let seen = spread(&speeds);
        let speed = middle(speeds);
        println!(
            "{name:<22} {speed:>7.0} MiB/s  ({seen})  {:.2} of it  resident set grew by {:.1} MiB at most",
            speed / direct,
            growth as f64 / 1024.0,
        );
    }
}

/// What any upload must do at the least, in MiB/s.
fn write_and_hash(path: &Path) -> f64 {
    let (mut file, mut hasher) = (File::create(path).expect("a file"), Sha256::new());
    let began = Instant::now();
    let (mut writing, mut hashing) = (Duration::ZERO, Duration::ZERO);
    for number in 0..MIB {
        let piece = piece(1000 + number);
        let at = Instant::now();
        file.write_all(&piece).expect("the disk takes it");
        writing += at.elapsed();
        let at = Instant::now();
        hasher.update(&piece);
        hashing += at.elapsed();
    }
    let at = Instant::now();
    file.sync_all().expect("the disk keeps it");
    println!(
        "directly: written in {writing:.2?}, hashed in {hashing:.2?}, synced in {:.2?}",
        at.elapsed()
    );
    std::hint::black_box(hasher.finalize());
    let speed = MIB as f64 / began.elapsed().as_secs_f64();
    std::fs::remove_file(path).expect("it was there");
    speed
}

/// A MiB that is no other one, at next to no cost.
fn piece(number: u64) -> Bytes {
    let mut piece = vec![b'x'; 1 << 20];
    piece[..8].copy_from_slice(&number.to_le_bytes());
    piece.into()
}

fn body(mib: u64, seed: u64) -> Body {
    let pieces = (0..mib).map(move |number| Ok::<_, std::io::Error>(piece(seed << 32 | number)));
    Body::wrap_stream(futures_util::stream::iter(pieces))
}

async fn multipart(server: &Server, mib: u64, seed: u64) {
    let part = reqwest::multipart::Part::stream_with_length(body(mib, seed), mib << 20);
    let form = reqwest::multipart::Form::new().part("file", part.file_name("large.bin"));
    let request = server.client.post(format!("{}/api/files/upload", server.address));
    let answer: Value =
        checked(request.multipart(form).send().await).await.json().await.expect("JSON");
    remove(server, answer["data"]["file_id"].as_str().expect("an id")).await;
}

async fn tus(server: &Server, mib: u64, seed: u64) {
    let request = server.client.post(format!("{}/api/files/tus", server.address));
    let request = request.header("tus-resumable", "1.0.0").header("upload-length", mib << 20);
    let created = checked(request.send().await).await;
    let path = created.headers()["location"].to_str().expect("a path");
    let request = server.client.patch(format!("{}{path}", server.address));
    let request = request
        .header("tus-resumable", "1.0.0")
        .header("upload-offset", 0)
        .header("content-type", "application/offset+octet-stream")
        .header("content-length", mib << 20);
    let done = checked(request.body(body(mib, seed)).send().await).await;
    remove(server, done.headers()["x-file-id"].to_str().expect("an id")).await;
}

async fn checked(response: reqwest::Result<Response>) -> Response {
    let response = response.expect("an answer");
    let status = response.status();
    assert!(status.is_success(), "{status}");
    response
}

async fn remove(server: &Server, file_id: &str) {
    let request = server.client.delete(format!("{}/api/files/{file_id}", server.address));
    checked(request.send().await).await;
}

fn spread(speeds: &[f64]) -> String {
    speeds.iter().map(|speed| format!("{speed:.0}")).collect::<Vec<_>>().join(", ")
}

fn middle(mut speeds: Vec<f64>) -> f64 {
    speeds.sort_unstable_by(f64::total_cmp);
    speeds[speeds.len() / 2]
}

struct Server {
    process: Child,
    address: String,
    client: Client,
}

impl Server {
    fn start(data_dir: &Path) -> Self {
        let mut process = Command::new(env!("CARGO_BIN_EXE_t2m"))
            .arg("serve")
            .env_clear()
            .current_dir(data_dir)
            .env("T2M_LISTEN", "127.0.0.1:0")
            .env("T2M_DATA_DIR", data_dir)
            .env("T2M_ENGINE", "none")
            .env("DEV_MODE", "true")
            .env("RATE_LIMIT_WRITES", "1000000/1h")
            .env("RUST_LOG", "off")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("t2m starts");
        let stdout = process.stdout.as_mut().expect("its output is piped");
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line).expect("it says its address");
        let address = line.trim().trim_start_matches("listening on ").to_owned();
        Self { process, address, client: Client::new() }
    }

    /// The resident set in KiB.
    fn memory(&self) -> u64 {
        resident(self.process.id())
    }

    fn watch(&self) -> Watch {
        let (id, peak, stop) = (self.process.id(), Arc::new(AtomicU64::new(0)), Arc::default());
        let watch = Watch { peak: Arc::clone(&peak), stop: Arc::clone(&stop) };
        std::thread::spawn(move || {
            while !AtomicBool::load(&stop, Ordering::Relaxed) {
                peak.fetch_max(resident(id), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        watch
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The highest resident set seen, in KiB.
struct Watch {
    peak: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

impl Watch {
    fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.peak.load(Ordering::Relaxed)
    }
}

fn resident(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    number.unwrap_or_default()
}
