//! What a long log costs: rebuilding the read model, verifying, a restart, and appending to it.
//! `cargo bench --bench replay [-- EVENTS]`; a million unless told.
//!
//! The mix is that of an app whose users render videos: for each user an account with its webhooks,
//! five sessions with twenty recorded activities, and twenty jobs, each leased, told of eighteen
//! times and completed with a video and a poster. 512 such lives go on at a time.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::{DateTime, TimeDelta, Utc};
use futures_util::{StreamExt, stream};
use t2m::actors::codec::{self, Metadata, Source};
use t2m::actors::rebuild::rebuild;
use t2m::domain::file::{self, File, Stored};
use t2m::domain::ids::{FileId, JobId, LeaseId, SessionId, UserId};
use t2m::domain::job::{self, AspectRatio, Job, Kind, Options, Output, Quality, VideoOptions};
use t2m::domain::session::{self, EndReason, Session};
use t2m::domain::text::{Personal, Prompt};
use t2m::domain::tier::Tier;
use t2m::domain::user::{self, Profile, Told, User};
use t2m::domain::{self, Aggregate};
use t2m::log::{EmbeddedLog, EventLog, Expected, NewEvent};
use t2m::views::{Building, Views};
use uuid::Uuid;

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
    let events = std::env::args().find_map(|argument| argument.parse().ok()).unwrap_or(EVENTS);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let directory = tempfile::tempdir().expect("a directory");
    let (log, views) = (directory.path().join("log.sqlite"), directory.path().join("views.sqlite"));
    runtime.block_on(async {
        appends("an empty log", &log).await;
        fill(&log, events).await;
        appends("the same log", &log).await;
    });
    runtime.block_on(async {
        replay(&log, &views).await;
        restart(&log, &views);
        verify(&log).await;
    });
}

/// One caller that waits for each of its events.
async fn appends(what: &str, path: &Path) {
    let log = EmbeddedLog::open(path).expect("a log");
    let mut took = Vec::new();
    for number in 0..2000 {
        let stream = format!("session-bench_{number}");
        let event = recorded::<Session>(active(&user_id(0), at(number)), number.unsigned_abs());
        let began = Instant::now();
        log.append(&stream, Expected::Any, vec![event]).await.expect("appended");
        took.push(began.elapsed());
    }
    took.sort();
    println!("append to {what}: {:?} median, {:?} p99", took[1000], took[1980]);
}

async fn fill(path: &Path, events: usize) {
    let log = Arc::new(EmbeddedLog::open(path).expect("a log"));
    let began = Instant::now();
    let mut written = 0;
    let lives = (1_u64..).map_while(|number| {
        let more = written < events;
        let life = life(number);
        written += life.len();
        more.then_some(life)
    });
    stream::iter(lives)
        .map(|life| {
            let log = Arc::clone(&log);
            async move {
                for (stream, event) in life {
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

async fn replay(log: &Path, views: &Path) {
    let log: Arc<dyn EventLog> = Arc::new(EmbeddedLog::open_read_only(log).expect("the log"));
    let head = *log.head().borrow();
    let before = resident();
    let began = Instant::now();
    let building = Building::at(views).expect("a read model");
    let built = rebuild(log, building, head, |_| ()).await.expect("rebuilt");
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

type Written = (String, NewEvent);

/// Everything that one user does, in its order.
fn life(number: u64) -> Vec<Written> {
    let user_id = user_id(number);
    let mut life = Vec::new();
    let mut second = i64::try_from(number % 1_000_000).unwrap_or_default() * 60;
    let user_stream = domain::stream::<User>(&user_id);
    for event in account(number, at(second)) {
        life.push((user_stream.clone(), recorded::<User>(event, number)));
    }
    for session in 0..SESSIONS {
        let name = format!("sess_{number}_{session}");
        let id = SessionId::try_from(name).expect("an id");
        let stream = domain::stream::<Session>(&id);
        let mut say = |event| life.push((stream.clone(), recorded::<Session>(event, number)));
        say(session::Event::Started {
            user_id: user_id.clone(),
            started_at: at(second),
            expires_at: at(second + 604_800),
            ip_address: Some(Personal("203.0.113.7".to_owned())),
            user_agent: Some(Personal("Mozilla/5.0 (X11; Linux x86_64)".to_owned())),
        });
        for minute in 0..ACTIVITIES {
            say(active(&user_id, at(second + minute * 60)));
        }
        second += ACTIVITIES * 60;
        let (user_id, at) = (Some(user_id.clone()), at(second));
        say(session::Event::Ended { user_id, reason: EndReason::SignedOut, at });
        for _ in 0..JOBS / SESSIONS {
            second += 30;
            video(&mut life, number, second);
        }
    }
    life
}

fn account(number: u64, now: DateTime<Utc>) -> [user::Event; 2] {
    let profile = Profile {
        email: Some(Personal(format!("user{number}@example.com"))),
        first_name: Some(Personal("Ada".to_owned())),
        last_name: Some(Personal("Lovelace".to_owned())),
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

fn video(life: &mut Vec<Written>, number: u64, second: i64) {
    let user_id = user_id(number);
    let job_id = JobId(fresh(second));
    let lease_id = LeaseId(Uuid::from_u128(u128::from(number)));
    let stream = domain::stream::<Job>(job_id);
    let mut say = |event| life.push((stream.clone(), recorded::<Job>(event, number)));
    let prompt = "A lighthouse above a quiet sea at dusk. Stars come out one by one.";
    say(job::Event::Requested(job::Request {
        user_id: user_id.clone(),
        kind: Kind::Video,
        prompt: Personal(Prompt::parse(prompt).expect("a prompt")),
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
    }));
    let worker_id = "storyboard".to_owned();
    let expires_at = at(second + 60);
    say(job::Event::Leased { lease_id, worker_id, attempt: 1, expires_at });
    for tick in 1..=TICKS {
        let expires_at = at(second + 60 + i64::from(tick));
        say(job::Event::Progressed { lease_id, progress: tick * 5, message: None, expires_at });
    }
    let [film, poster] = ["video.mp4", "poster.jpg"].map(|name| {
        let id = FileId(fresh(second));
        let stored = Stored {
            user_id: user_id.clone(),
            filename: Personal(name.to_owned()),
            content_type: "video/mp4".to_owned(),
            size: 2_500_000,
            sha256: format!("{:064x}", id.0.as_u128()),
            metadata: Personal::default(),
            job_id: Some(job_id),
            fingerprint: None,
        };
        let event = recorded::<File>(file::Event::Stored(stored), number);
        life.push((domain::stream::<File>(id), event));
        id
    });
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
    let event = job::Event::Completed { lease_id, output };
    life.push((stream.clone(), recorded::<Job>(event, number)));
}

fn recorded<A: Aggregate>(event: A::Event, number: u64) -> NewEvent {
    let (kind, data) = codec::encode::<A>(&event).expect("it can be written");
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
