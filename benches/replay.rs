//! What a long log costs: rebuilding the read model, verifying, a restart, and appending to it.
//! `cargo bench --bench replay [-- EVENTS [DIRECTORY]]`; a million unless told. In a directory the log
//! stays, and is not written again: what a replay takes of memory is only seen without that.
//!
//! The mix is that of an app whose users render videos: for each user an account with its webhooks,
//! five sessions with twenty recorded activities, and twenty jobs, each leased, told of eighteen
//! times and completed with a video and a poster. 512 such lives go on at a time.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use chrono::{DateTime, TimeDelta, Utc};
use futures_util::{StreamExt, stream};
use mimalloc::MiMalloc;
use t2m::actors::codec::{Metadata, Source};
use t2m::actors::keyring::Keyring;
use t2m::actors::rebuild::rebuild;
use t2m::config::BlobStore;
use t2m::domain::file::{self, File, Stored};
use t2m::domain::ids::{FileId, JobId, LeaseId, SessionId, UserId};
use t2m::domain::job::{self, AspectRatio, Job, Kind, Options, Output, Quality, VideoOptions};
use t2m::domain::session::{self, EndReason, Session};
use t2m::domain::text::{Personal, Prompt};
use t2m::domain::tier::Tier;
use t2m::domain::user::{self, Profile, Told, User};
use t2m::domain::{self, Aggregate};
use t2m::log::{EmbeddedLog, EventLog, Expected, NewEvent};
use t2m::media::blobs::Blobs;
use t2m::media::vault::MasterKey;
use t2m::views::{Building, Views};
use uuid::Uuid;

/// The binary's.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

const EVENTS: usize = 1_000_000;
const SESSIONS: u32 = 5;
const ACTIVITIES: i64 = 20;
const JOBS: u32 = 20;
const TICKS: u8 = 18;

fn main() {
    // `cargo test --benches` only wants to know that it starts.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    let events = arguments.next().map_or(EVENTS, |count| count.parse().expect("a number"));
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let temporary = tempfile::tempdir().expect("a directory");
    let directory = arguments.next().map_or_else(|| temporary.path().to_owned(), PathBuf::from);
    let (log, views) = (directory.join("log.sqlite"), temporary.path().join("views.sqlite"));
    let blobs = Blobs::open(&BlobStore::File, &directory).expect("a store");
    let keyring = Keyring::new(&blobs, MasterKey::kept_in(&directory.join("master.key")));
    runtime.block_on(async {
        if !log.exists() {
            appends("an empty log", &log, &keyring).await;
            fill(&log, &keyring, events).await;
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

async fn fill(path: &Path, keyring: &Keyring, events: usize) {
    let log = Arc::new(EmbeddedLog::open(path).expect("a log"));
    let began = Instant::now();
    let one = life(keyring, 0).await.len();
    let lives = events.div_ceil(one) as u64;
    stream::iter(1..=lives)
        .map(|number| {
            let log = Arc::clone(&log);
            async move {
                for (stream, event) in life(keyring, number).await {
                    log.append(&stream, Expected::Any, vec![event]).await.expect("appended");
                }
            }
        })
        .buffer_unordered(512)
        .collect::<()>()
        .await;
    let head = *log.head().borrow();
    println!("{head} events written at {:.0}/s", head as f64 / began.elapsed().as_secs_f64());
}

async fn replay(log: &Path, views: &Path, keyring: Keyring) {
    let log: Arc<dyn EventLog> = Arc::new(EmbeddedLog::open_read_only(log).expect("the log"));
    let head = *log.head().borrow();
    let most = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&most);
    let note = move |_| drop(seen.fetch_max(own_memory(), Ordering::Relaxed));
    let (before, began) = (own_memory(), Instant::now());
    let building = Building::at(views).expect("a read model");
    let built = rebuild(log, keyring, building, head, note).await.expect("rebuilt");
    let folded = began.elapsed();
    let fresh = built.finish().expect("finished");
    let (took, after) = (began.elapsed(), own_memory());
    assert_eq!((fresh.checkpoint(), fresh.parked()), (head, vec![]));
    let (rate, most) = (head as f64 / took.as_secs_f64(), most.load(Ordering::Relaxed));
    println!(
        "{head} events replayed in {took:.1?} ({folded:.1?} without the indexes): {rate:.0}/s"
    );
    println!("memory: {before} MB before, {most} MB at the most, {after} MB after");
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

type Written = (String, NewEvent);

/// Everything that one user does, in its order, sealed with the user's key.
async fn life(keyring: &Keyring, number: u64) -> Vec<Written> {
    let mut life = Life { keyring, number, written: Vec::new() };
    let user_id = user_id(number);
    let mut second = i64::try_from(number % 1_000_000).unwrap_or_default() * 60;
    let stream = domain::stream::<User>(&user_id);
    for event in account(number, at(second)) {
        life.say::<User>(&stream, event).await;
    }
    for session in 0..SESSIONS {
        let name = format!("sess_{number}_{session}");
        let id = SessionId::try_from(name).expect("an id");
        let stream = domain::stream::<Session>(&id);
        let started = session::Event::Started {
            user_id: user_id.clone(),
            started_at: at(second),
            expires_at: at(second + 604_800),
            ip_address: Some(Personal::Known("203.0.113.7".to_owned())),
            user_agent: Some(Personal::Known("Mozilla/5.0 (X11; Linux x86_64)".to_owned())),
        };
        life.say::<Session>(&stream, started).await;
        for minute in 0..ACTIVITIES {
            life.say::<Session>(&stream, active(&user_id, at(second + minute * 60))).await;
        }
        second += ACTIVITIES * 60;
        let ended = session::Event::Ended {
            user_id: Some(user_id.clone()),
            reason: EndReason::SignedOut,
            at: at(second),
        };
        life.say::<Session>(&stream, ended).await;
        for _ in 0..JOBS / SESSIONS {
            second += 30;
            video(&mut life, second).await;
        }
    }
    life.written
}

struct Life<'a> {
    keyring: &'a Keyring,
    number: u64,
    written: Vec<Written>,
}

impl Life<'_> {
    async fn say<A: Aggregate>(&mut self, stream: &str, event: A::Event) {
        let event = recorded::<A>(self.keyring, stream, event, self.number).await;
        self.written.push((stream.to_owned(), event));
    }
}

fn account(number: u64, now: DateTime<Utc>) -> [user::Event; 2] {
    let profile = Profile {
        email: Some(Personal::Known(format!("user{number}@example.com"))),
        first_name: Some(Personal::Known("Ada".to_owned())),
        last_name: Some(Personal::Known("Lovelace".to_owned())),
        ..Profile::default()
    };
    [
        user::Event::Registered {
            profile: Profile { first_name: None, last_name: None, ..profile.clone() },
            provisional: true,
            told: Told::default(),
        },
        user::Event::ProfileChanged { profile, source_updated_at: now, told: Told::default() },
    ]
}

fn active(user_id: &UserId, at: DateTime<Utc>) -> session::Event {
    session::Event::Active { user_id: user_id.clone(), at }
}

async fn video(life: &mut Life<'_>, second: i64) {
    let number = life.number;
    let user_id = user_id(number);
    let job_id = JobId(fresh(second));
    let lease_id = LeaseId(Uuid::from_u128(u128::from(number)));
    let stream = domain::stream::<Job>(job_id);
    let prompt = "A lighthouse above a quiet sea at dusk. Stars come out one by one.";
    let requested = job::Event::Requested(job::Request {
        user_id: user_id.clone(),
        kind: Kind::Video,
        prompt: Personal::Known(Prompt::parse(prompt).expect("a prompt")),
        options: Options::Video(VideoOptions {
            duration: 10,
            quality: Quality::P720,
            aspect_ratio: AspectRatio::Landscape,
            style: None,
            seed: number,
            engine: None,
            source_file_id: None,
        }),
        tier: Tier::Standard,
        batch: false,
        fingerprint: None,
        callback_url: None,
        deadline: None,
    });
    life.say::<Job>(&stream, requested).await;
    let worker_id = "storyboard".to_owned();
    let expires_at = at(second + 60);
    let leased = job::Event::Leased { lease_id, worker_id, attempt: 1, expires_at };
    life.say::<Job>(&stream, leased).await;
    for tick in 1..=TICKS {
        let expires_at = at(second + 60 + i64::from(tick));
        let progress = tick * 5;
        let tick = job::Event::Progressed { lease_id, progress, message: None, expires_at };
        life.say::<Job>(&stream, tick).await;
    }
    let [film, poster] = [FileId(fresh(second)), FileId(fresh(second))];
    for (id, name) in [(film, "video.mp4"), (poster, "poster.jpg")] {
        let stored = Stored {
            user_id: user_id.clone(),
            filename: Personal::Known(name.to_owned()),
            content_type: "video/mp4".to_owned(),
            size: 2_500_000,
            sha256: format!("{:064x}", id.0.as_u128()),
            metadata: Personal::default(),
            job_id: Some(job_id),
            fingerprint: None,
        };
        life.say::<File>(&domain::stream::<File>(id), file::Event::Stored(stored)).await;
    }
    let output = Output {
        file_id: film,
        content_type: "video/mp4".to_owned(),
        size: 2_500_000,
        duration: Some(10.0),
        width: Some(1280),
        height: Some(720),
        poster_file_id: Some(poster),
        captions_file_id: None,
    };
    life.say::<Job>(&stream, job::Event::Completed { lease_id, output }).await;
}

async fn recorded<A: Aggregate>(
    keyring: &Keyring,
    stream: &str,
    event: A::Event,
    number: u64,
) -> NewEvent {
    let (kind, data) = keyring.encode::<A>(stream, &event).await.expect("it can be sealed");
    let metadata = Metadata {
        correlation_id: format!("req_{number}"),
        causation_id: None,
        actor: user_id(number).to_string(),
        source: Source::Api,
    };
    NewEvent { id: fresh(0), kind, time: at(0), data, metadata: metadata.to_bytes() }
}

fn user_id(number: u64) -> UserId {
    UserId::try_from(format!("user_{number:027}")).expect("an id")
}

/// As they are made: in the order of time, with random ends.
fn fresh(second: i64) -> Uuid {
    let seconds = u64::try_from(second).unwrap_or_default() + 1_760_000_000;
    uuid::Builder::from_unix_timestamp_millis(seconds * 1000, &rand::random()).into_uuid()
}

fn at(second: i64) -> DateTime<Utc> {
    DateTime::UNIX_EPOCH + TimeDelta::seconds(1_760_000_000 + second)
}
