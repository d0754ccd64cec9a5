//! Made-up lives: what the users of an app whose users render videos leave in a log. For each an
//! account with its webhooks, five sessions with twenty recorded activities, and twenty jobs, each
//! leased, told of eighteen times and completed with a video and a poster. 512 such lives go on at a
//! time.

use std::time::Instant;

use chrono::{DateTime, TimeDelta, Utc};
use futures_util::{StreamExt, stream};
use t2m::actors::codec::{Metadata, Source};
use t2m::actors::keyring::Keyring;
use t2m::domain::file::{self, File, Stored};
use t2m::domain::ids::{FileId, JobId, LeaseId, SessionId, UserId};
use t2m::domain::job::{self, AspectRatio, Job, Kind, Options, Output, Quality, VideoOptions};
use t2m::domain::session::{self, EndReason, Session};
use t2m::domain::text::{Personal, Prompt};
use t2m::domain::tier::Tier;
use t2m::domain::user::{self, Profile, Told, User};
use t2m::domain::{self, Aggregate};
use t2m::log::{EventLog, Expected, NewEvent};
use uuid::Uuid;

const SESSIONS: u32 = 5;
const ACTIVITIES: i64 = 20;
const JOBS: u32 = 20;
const TICKS: u8 = 18;

/// Writes so many events or a few more, each in an append of its own as it would happen, so that
/// those of many streams lie between each other; and says how fast that was.
pub async fn fill(log: &dyn EventLog, keyring: &Keyring, events: usize) {
    let began = Instant::now();
    let lives = events.div_ceil(life(keyring, 0).await.len()) as u64;
    stream::iter(1..=lives)
        .map(async |number| {
            for (stream, event) in life(keyring, number).await {
                log.append(&stream, Expected::Any, vec![event]).await.expect("appended");
            }
        })
        .buffer_unordered(512)
        .collect::<()>()
        .await;
    let head = *log.head().borrow();
    println!("{head} events written at {:.0}/s", head as f64 / began.elapsed().as_secs_f64());
}

pub type Written = (String, NewEvent);

/// Everything that one user does, in its order, sealed with the user's key.
pub async fn life(keyring: &Keyring, number: u64) -> Vec<Written> {
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
            profile: Box::new(Profile { first_name: None, last_name: None, ..profile.clone() }),
            provisional: true,
            told: Told::default(),
            claimed_at: None,
        },
        user::Event::ProfileChanged {
            profile: Box::new(profile),
            source_updated_at: now,
            told: Told::default(),
        },
    ]
}

pub fn active(user_id: &UserId, at: DateTime<Utc>) -> session::Event {
    session::Event::Active { user_id: user_id.clone(), at }
}

async fn video(life: &mut Life<'_>, second: i64) {
    let number = life.number;
    let user_id = user_id(number);
    let job_id = JobId(fresh(second));
    let lease_id = LeaseId(Uuid::from_u128(u128::from(number)));
    let stream = domain::stream::<Job>(job_id);
    let prompt = "A lighthouse above a quiet sea at dusk. Stars come out one by one.";
    let request = job::Request {
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
    };
    life.say::<Job>(&stream, job::Event::Requested(Box::new(request))).await;
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
        life.say::<File>(&domain::stream::<File>(id), file::Event::Stored(Box::new(stored))).await;
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

pub async fn recorded<A: Aggregate>(
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

pub fn user_id(number: u64) -> UserId {
    UserId::try_from(format!("user_{number:027}")).expect("an id")
}

/// As they are made: in the order of time, with random ends.
fn fresh(second: i64) -> Uuid {
    let seconds = u64::try_from(second).unwrap_or_default() + 1_760_000_000;
    uuid::Builder::from_unix_timestamp_millis(seconds * 1000, &rand::random()).into_uuid()
}

pub fn at(second: i64) -> DateTime<Utc> {
    DateTime::UNIX_EPOCH + TimeDelta::seconds(1_760_000_000 + second)
}
