//! How long a worker waits for its next job behind 10,000 queued jobs of 100 users: the whole lease,
//! durable and visible, and the two questions in it. `cargo bench --bench leasing`

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use t2m::actors::System;
use t2m::actors::codec::{Metadata, Source};
use t2m::actors::keyring::Keyring;
use t2m::actors::leasing::Leasing;
use t2m::clock::Clock;
use t2m::domain::ids::{JobId, UserId};
use t2m::domain::job::{AspectRatio, Command, Kind, Options, Quality, Request, VideoOptions};
use t2m::domain::text::{Personal, Prompt};
use t2m::domain::tier::{Caps, Tier};
use t2m::log;
use t2m::media::blobs::Blobs;
use t2m::media::vault::MasterKey;
use t2m::views::Views;

const JOBS: usize = 10_000;
const USERS: usize = 100;
const LEASES: usize = 1_000;
/// So that the caps do not end it.
const CAPS: Caps = Caps { premium: 1000, standard: 1000, batch: 1000 };

fn main() {
    actix::System::new().block_on(run());
    actix::System::current().stop();
}

async fn run() {
    let dir = tempfile::tempdir().expect("a directory");
    let clock = Clock::system();
    let log = log::open("embedded", dir.path()).await.expect("a log");
    let views = Views::open(&dir.path().join("views.sqlite")).expect("views");
    let blobs = Blobs::open(&t2m::config::BlobStore::File, dir.path()).expect("a blob store");
    let keyring = Keyring::new(&blobs, MasterKey::kept_in(&dir.path().join("master.key")));
    let system = System::start(clock, log, views, keyring);
    let leasing = Leasing::new(Arc::clone(&system), &blobs, CAPS);
    let ids = fill(&system).await;

    let mut asked = Vec::with_capacity(ids.len());
    for id in &ids {
        let job = system.views.job(id).expect("views").expect("the job is there");
        let start = Instant::now();
        let place = system.views.queue_position(&job, system.clock.now(), &CAPS);
        asked.push(start.elapsed());
        assert!(place.is_some());
    }
    report("queue position", asked);

    let mut chosen = Vec::with_capacity(LEASES);
    let mut leased = Vec::with_capacity(LEASES);
    let worker = Metadata::by("bench", Source::Worker);
    for _ in 0..LEASES {
        let start = Instant::now();
        let next = system.views.next_job(system.clock.now(), &CAPS, &Kind::ALL, |_| false);
        chosen.push(start.elapsed());
        let start = Instant::now();
        let lease = leasing.lease(&worker, &Kind::ALL, |_| false).await.expect("a lease");
        leased.push(start.elapsed());
        assert_eq!(lease.map(|lease| lease.job_id), next);
    }
    report("choice of the next job", chosen);
    report("lease, durable and visible", leased);
}

async fn fill(system: &System) -> Vec<JobId> {
    let ids: Vec<JobId> = (0..JOBS).map(|_| JobId(system.clock.fresh_id())).collect();
    let mut last = 0;
    for (round, ids) in ids.chunks(250).enumerate() {
        let asked = ids.iter().enumerate().map(|(index, id)| {
            let command = Command::Request(request(round * 250 + index));
            system.jobs.execute_fresh(*id, command, Metadata::by("bench", Source::Api))
        });
        for done in join_all(asked).await {
            last = done.expect("a job is taken").position.max(last);
        }
    }
    while system.visible(last).await.is_err() {}
    ids
}

fn request(number: usize) -> Request {
    let user = format!("user_{}", number % USERS);
    Request {
        user_id: UserId::try_from(user).expect("an id"),
        kind: Kind::Video,
        prompt: Personal::Known(Prompt::parse("a lighthouse").expect("a prompt")),
        options: Options::Video(VideoOptions {
            duration: 10,
            quality: Quality::P720,
            aspect_ratio: AspectRatio::Landscape,
            style: None,
            seed: 1,
            engine: None,
            source_file_id: None,
        }),
        tier: if number.is_multiple_of(3) { Tier::Premium } else { Tier::Standard },
        batch: number.is_multiple_of(5),
        fingerprint: None,
        callback_url: None,
        deadline: None,
    }
}

fn report(what: &str, mut times: Vec<Duration>) {
    times.sort();
    let at = |part: usize| times[times.len() * part / 1000];
    println!("{what}: median {:?}, 99th percentile {:?}", at(500), at(990));
}
