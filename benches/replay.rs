//! What a long log costs: rebuilding the read model, verifying, a restart, and appending to it.
//! `cargo bench --bench replay [-- EVENTS [DIRECTORY]]`; a million unless told. In a directory the log
//! stays, and is not written again: what a replay takes of memory is only seen without that.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc;
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
/// How often the memory is looked at.
const LOOK: Duration = Duration::from_millis(20);

fn main() {
    // `cargo test --benches` only wants to know that it starts.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    let events = arguments.next().map_or(EVENTS, |count| count.parse().expect("a number"));
    // As `t2m replay` has it.
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.expect("a runtime");
    let temporary = tempfile::tempdir().expect("a directory");
    let directory = arguments.next().map_or_else(|| temporary.path().to_owned(), PathBuf::from);
    let (log, views) = (directory.join("log.sqlite"), temporary.path().join("views.sqlite"));
    let blobs = Blobs::open(&BlobStore::File, &directory).expect("a store");
    let keyring = Keyring::new(&blobs, MasterKey::kept_in(&directory.join("master.key")));
    runtime.block_on(async {
        if !log.exists() {
            appends("an empty log", &log, &keyring).await;
            lives::fill(&EmbeddedLog::open(&log).expect("a log"), &keyring, events).await;
        }
        appends("the full log", &log, &keyring).await;
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
    let before = own_memory();
    let (stop, stopped) = mpsc::channel::<()>();
    let watch = std::thread::spawn(move || {
        let mut most = 0;
        while stopped.recv_timeout(LOOK) == Err(mpsc::RecvTimeoutError::Timeout) {
            most = most.max(own_memory());
        }
        most
    });
    let began = Instant::now();
    let building = Building::at(views).expect("a read model");
    let built = rebuild(log, keyring, building, head, |_| ()).await.expect("rebuilt");
    let (folded, in_fold) = (began.elapsed(), own_memory());
    let fresh = built.finish().expect("finished");
    let (took, after) = (began.elapsed(), own_memory());
    drop(stop);
    let most = watch.join().expect("looked");
    assert_eq!((fresh.checkpoint(), fresh.parked()), (head, vec![]));
    let rate = head as f64 / took.as_secs_f64();
    println!(
        "{head} events replayed in {took:.1?} ({folded:.1?} without the indexes): {rate:.0}/s"
    );
    println!(
        "memory: {before} MB before, {in_fold} MB without the indexes, {most} MB at the most, \
         {after} MB after"
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

/// What this process holds without the files that it has mapped, in megabytes.
fn own_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap_or_default();
    let kilobytes = line.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or_default();
    kilobytes / 1000
}
