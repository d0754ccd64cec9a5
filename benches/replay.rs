//! What a long log costs: rebuilding the read model, verifying, a restart, and appending to it.
//! `cargo bench --bench replay [-- EVENTS]`; a million unless told.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use t2m::actors::keyring::Keyring;
use t2m::actors::rebuild::rebuild;
use t2m::config::BlobStore;
use t2m::domain::session::Session;
use t2m::log::{EmbeddedLog, EventLog, Expected};
use t2m::media::blobs::Blobs;
use t2m::media::vault::MasterKey;
use t2m::views::{Building, Views};

#[path = "common/lives.rs"]
mod lives;

use lives::{active, at, recorded, user_id};

const EVENTS: usize = 1_000_000;

fn main() {
    // `cargo test --benches` only wants to know that it starts.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let events = std::env::args().find_map(|argument| argument.parse().ok()).unwrap_or(EVENTS);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let directory = tempfile::tempdir().expect("a directory");
    let (log, views) = (directory.path().join("log.sqlite"), directory.path().join("views.sqlite"));
    let blobs = Blobs::open(&BlobStore::File, directory.path()).expect("a store");
    let keyring = Keyring::new(&blobs, MasterKey::kept_in(&directory.path().join("master.key")));
    runtime.block_on(async {
        appends("an empty log", &log, &keyring).await;
        lives::fill(&EmbeddedLog::open(&log).expect("a log"), &keyring, events).await;
        appends("the same log", &log, &keyring).await;
    });
    runtime.block_on(async {
        replay(&log, &views, keyring.clone()).await;
        restart(&log, &views);
        verify(&log).await;
    });
}

/// One caller that waits for each of its events.
async fn appends(what: &str, path: &Path, keyring: &Keyring) {
    let log = EmbeddedLog::open(path).expect("a log");
    let mut took = Vec::new();
    for number in 0..2000 {
        let stream = format!("session-bench_{number}");
        let event = active(&user_id(0), at(number));
        let event = recorded::<Session>(keyring, &stream, event, 0).await;
        let began = Instant::now();
        log.append(&stream, Expected::Any, vec![event]).await.expect("appended");
        took.push(began.elapsed());
    }
    took.sort();
    println!("append to {what}: {:?} median, {:?} p99", took[1000], took[1980]);
}

async fn replay(log: &Path, views: &Path, keyring: Keyring) {
    let log: Arc<dyn EventLog> = Arc::new(EmbeddedLog::open_read_only(log).expect("the log"));
    let head = *log.head().borrow();
    let before = resident();
    let began = Instant::now();
    let building = Building::at(views).expect("a read model");
    let built = rebuild(log, keyring, building, head, |_| ()).await.expect("rebuilt");
    let fresh = built.finish().expect("finished");
    let took = began.elapsed();
    assert_eq!((fresh.checkpoint(), fresh.parked()), (head, vec![]));
    let rate = head as f64 / took.as_secs_f64();
    println!(
        "{head} events replayed in {took:.1?}: {rate:.0}/s, resident {before} → {}",
        resident()
    );
    let size = std::fs::metadata(views).map_or(0, |file| file.len()) / 1_000_000;
    println!("read model of {size} MB");
}

fn restart(log: &Path, views: &Path) {
    let began = Instant::now();
    let opened = (EmbeddedLog::open(log).expect("the log"), Views::open(views).expect("the views"));
    println!("log and read model opened in {:?}", began.elapsed());
    drop(opened);
}

async fn verify(path: &Path) {
    let size = std::fs::metadata(path).map_or(0, |file| file.len());
    let log = EmbeddedLog::open_read_only(path).expect("the log");
    let began = Instant::now();
    log.verify().await.expect("a whole chain");
    let took: Duration = began.elapsed();
    let rate = size as f64 / 1e6 / took.as_secs_f64();
    println!("{} MB verified in {took:.1?}: {rate:.0} MB/s", size / 1_000_000);
}

/// Of this process: now, and at its highest.
fn resident() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        line.trim().to_owned()
    };
    format!("{} (peak {})", line("VmRSS:"), line("VmHWM:"))
}
