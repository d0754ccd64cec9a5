//! What a new node costs: the real server is started on an empty directory, over a log of a million
//! events of each engine, and takes requests when its read model has all of them.
//! `cargo bench --bench catch_up [-- EVENTS]`; PostgreSQL is started by scripts/postgres.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use t2m::actors::keyring::Keyring;
use t2m::clerk::signing::SigningKey;
use t2m::config::BlobStore;
use t2m::log;
use t2m::media::blobs::Blobs;
use t2m::media::vault::MasterKey;
use tokio::runtime::Runtime;

#[path = "common/lives.rs"]
mod lives;
#[path = "common/server.rs"]
mod server;

const EVENTS: usize = 1_000_000;

fn main() {
    // `cargo test --benches` only wants to know that it starts.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let events = std::env::args().find_map(|argument| argument.parse().ok()).unwrap_or(EVENTS);
    let runtime = Runtime::new().expect("a runtime");
    measure("embedded", "embedded", events, &runtime);
    let postgres = server::Server::start();
    measure("PostgreSQL", &postgres.database("catch_up", &runtime), events, &runtime);
}

fn measure(engine: &str, setting: &str, events: usize, runtime: &Runtime) {
    let directory = tempfile::tempdir().expect("a directory");
    let head = runtime.block_on(async {
        let blobs = Blobs::open(&BlobStore::File, directory.path()).expect("a store");
        let master = MasterKey::kept_in(&directory.path().join("master.key"));
        let keyring = Keyring::new(&blobs, master);
        let log = log::open(setting, directory.path()).await.expect("a log");
        lives::fill(log.as_ref(), &keyring, events).await;
        *log.head().borrow()
    });
    // All that is there is the keys of users, and the log where that is a file.
    assert!(!directory.path().join("views.sqlite").exists());
    let key = SigningKey::generate("bench").expect("a key");
    let key = key.public_pem().expect("its public half");
    let start = || {
        let began = Instant::now();
        let mut node = start_node(setting, &key, directory.path());
        let (took, peak) = (began.elapsed(), peak_memory(&node));
        node.kill().expect("it ran");
        node.wait().expect("it ends");
        (took, peak)
    };
    let (took, peak) = start();
    let rate = head as f64 / took.as_secs_f64();
    println!("{engine}: a new node took {took:.1?} for {head} events, {rate:.0}/s, {peak} at most");
    let (took, peak) = start();
    println!("{engine}: the same node started again in {took:.1?}, {peak} at most");
}

/// Answers when the node does. The key spares it the making of one.
fn start_node(setting: &str, key: &str, directory: &Path) -> Child {
    let mut node = Command::new(env!("CARGO_BIN_EXE_t2m"))
        .arg("serve")
        .env_clear()
        .current_dir(directory)
        .env("T2M_LISTEN", "127.0.0.1:0")
        .env("T2M_DATA_DIR", directory)
        .env("T2M_LOG", setting)
        .env("T2M_ENGINE", "none")
        .env("CLERK_ISSUER", "https://clerk.example.com")
        .env("CLERK_JWT_KEY", key)
        // The lives are old, and nobody is to end them while it is measured.
        .env("RETENTION_STANDARD", "never")
        .env("RUST_LOG", "error")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("t2m starts");
    let mut line = String::new();
    let stdout = node.stdout.as_mut().expect("piped");
    BufReader::new(stdout).read_line(&mut line).expect("it speaks");
    assert!(line.starts_with("listening on "), "{line}");
    node
}

fn peak_memory(node: &Child) -> String {
    let status = std::fs::read_to_string(format!("/proc/{}/status", node.id())).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or("(unknown)");
    line.trim().to_owned()
}
