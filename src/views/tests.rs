//! Histories in, answers out; and that neither the cut into batches nor a replay makes a difference.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use chrono::{DateTime, TimeDelta, Utc};
use proptest::prelude::*;
use tempfile::TempDir;
use uuid::Uuid;

mod analytics;
mod building;
mod jobs;
mod people;
mod renewing;
mod replacing;

use super::*;
use crate::domain::file::{Event as FileEvent, Reason, Stored};
use crate::domain::ids::LeaseId;
use crate::domain::job::{Event as JobEvent, Kind, Options, Output, tests::video_of};
use crate::domain::session::{EndReason, Event as SessionEvent};
use crate::domain::text::Personal;
use crate::domain::tier::Caps;
use crate::domain::user::{
    Access, Event as UserEvent, Membership, Onboarding, OnboardingStatus, Profile, Right, Told,
};

fn at(second: i64) -> DateTime<Utc> {
    DateTime::UNIX_EPOCH + TimeDelta::seconds(second)
}

fn user_id(name: &str) -> UserId {
    UserId::try_from(name.to_owned()).unwrap()
}

fn session_id(name: &str) -> SessionId {
    SessionId::try_from(name.to_owned()).unwrap()
}

fn job_id(n: u128) -> JobId {
    JobId(Uuid::from_u128(n))
}

fn file_id(n: u128) -> FileId {
    FileId(Uuid::from_u128(n))
}

fn user(name: &str, event: UserEvent) -> Entity {
    Entity::User(user_id(name), event)
}

fn session(name: &str, event: SessionEvent) -> Entity {
    Entity::Session(session_id(name), event)
}

fn registered(email: &str) -> UserEvent {
    let profile = Profile { email: Some(Personal::Known(email.to_owned())), ..Profile::default() };
    let (profile, told) = (Box::new(profile), Told::default());
    UserEvent::Registered { profile, provisional: true, told, claimed_at: None }
}

fn membership(role: &str) -> Membership {
    Membership {
        membership_id: "m".to_owned(),
        organization_id: "o".to_owned(),
        name: None,
        slug: None,
        role: role.to_owned(),
        permissions: BTreeSet::new(),
    }
}

fn joined(role: &str) -> UserEvent {
    UserEvent::OrganizationJoined { membership: membership(role), source_updated_at: at(0) }
}

fn admin() -> UserEvent {
    let access = Access { role: "admin".to_owned(), ..Access::default() };
    UserEvent::AccessChanged { access, decided_at: None, decided: None }
}

fn started(owner: &str, second: i64) -> SessionEvent {
    SessionEvent::Started {
        user_id: user_id(owner),
        started_at: at(second),
        expires_at: at(second + 7 * 86_400),
        ip_address: Some(Personal::Known("192.0.2.1".to_owned())),
        user_agent: None,
    }
}

fn ended(reason: EndReason) -> SessionEvent {
    SessionEvent::Ended { user_id: None, reason, at: at(99) }
}

fn stored(n: u128, owner: &str, blob: &str) -> Entity {
    let file = Stored {
        user_id: user_id(owner),
        filename: Personal::Known(format!("{n}.png")),
        content_type: "image/png".to_owned(),
        size: 10,
        sha256: blob.to_owned(),
        metadata: Personal::default(),
        job_id: None,
        fingerprint: None,
    };
    Entity::File(file_id(n), FileEvent::Stored(Box::new(file)))
}

fn deleted_file(n: u128, owner: &str) -> Entity {
    let event = FileEvent::Deleted {
        user_id: user_id(owner),
        sha256: "b".to_owned(),
        reason: Reason::Requested,
    };
    Entity::File(file_id(n), event)
}

fn job(n: u128, event: JobEvent) -> Entity {
    Entity::Job(job_id(n), event)
}

fn requested(owner: &str) -> JobEvent {
    let mut request = video_of(user_id(owner), "a lighthouse");
    request.fingerprint = Some("f".to_owned());
    if let Options::Video(options) = &mut request.options {
        options.seed = u64::MAX;
    }
    JobEvent::Requested(Box::new(request))
}

fn seed_of(job: &JobRow) -> u64 {
    match &job.options {
        Options::Video(options) => options.seed,
        Options::Translation(_) => panic!("a video was asked for"),
    }
}

fn lease() -> LeaseId {
    LeaseId(Uuid::from_u128(1))
}

fn leased(attempt: u32, until: i64) -> JobEvent {
    JobEvent::Leased {
        lease_id: lease(),
        worker_id: "w".to_owned(),
        attempt,
        expires_at: at(until),
    }
}

fn progressed(progress: u8, until: i64) -> JobEvent {
    JobEvent::Progressed {
        lease_id: lease(),
        progress,
        message: Some("drawing".to_owned()),
        expires_at: at(until),
    }
}

fn attempt_failed(retry_at: Option<i64>) -> JobEvent {
    JobEvent::AttemptFailed {
        lease_id: lease(),
        attempt: 1,
        error: "boom".to_owned(),
        retry_at: retry_at.map(at),
    }
}

fn output() -> Output {
    Output {
        file_id: file_id(9),
        content_type: "video/mp4".to_owned(),
        size: 1,
        duration: Some(10.5),
        width: Some(1280),
        height: Some(720),
        poster_file_id: None,
        captions_file_id: None,
    }
}

fn completed() -> JobEvent {
    JobEvent::Completed { lease_id: lease(), output: output() }
}

fn retried() -> JobEvent {
    JobEvent::Retried { by: user_id("ada") }
}

/// Events at positions 10, 20, … (gaps are allowed), one second apart.
fn log(entities: Vec<Entity>) -> Vec<Happened> {
    let happened = |(n, entity)| Happened {
        position: (n as u64 + 1) * 10,
        hash: [0; 32],
        time: at(n as i64),
        entity,
    };
    entities.into_iter().enumerate().map(happened).collect()
}

struct Fixture {
    directory: TempDir,
    views: Views,
}

impl std::ops::Deref for Fixture {
    type Target = Views;
    fn deref(&self) -> &Views {
        &self.views
    }
}

fn empty() -> Fixture {
    let directory = TempDir::new().unwrap();
    let views = Views::open(&directory.path().join("views.sqlite")).unwrap();
    Fixture { directory, views }
}

fn after(entities: Vec<Entity>) -> Fixture {
    let fixture = empty();
    fixture.apply(&log(entities)).unwrap();
    fixture
}

fn row(events: Vec<JobEvent>) -> JobRow {
    let entities = events.into_iter().map(|event| job(1, event)).collect();
    let fixture = after(entities);
    JobRow::clone(&fixture.job(&job_id(1)).unwrap().unwrap())
}

/// Some of everything that the domain can say, unknown entities and late comers included.
fn history() -> Vec<Entity> {
    let onboarding = Onboarding { step: 1, total_steps: 3, status: OnboardingStatus::InProgress };
    vec![
        user("ada", joined("member")),
        user("ada", registered("ada@example.com")),
        user("bob", registered("bob@example.com")),
        session("s1", started("ada", 0)),
        session("s2", started("bob", 1)),
        user("ada", admin()),
        user(
            "ada",
            UserEvent::ProfileChanged {
                profile: Box::default(),
                source_updated_at: at(3),
                told: Told::default(),
            },
        ),
        user(
            "ada",
            UserEvent::AttributesChanged { user_type: Some("pro".to_owned()), decided_at: None },
        ),
        user(
            "ada",
            UserEvent::FlagsChanged {
                feature_flags: BTreeMap::from([("x".into(), true)]),
                decided_at: None,
            },
        ),
        user("ada", UserEvent::OnboardingProgressed { onboarding, decided_at: None }),
        session("s1", SessionEvent::Active { user_id: user_id("ada"), at: at(70) }),
        job(1, requested("ada")),
        job(2, requested("bob")),
        job(3, requested("ada")),
        job(1, leased(1, 60)),
        job(1, progressed(40, 70)),
        job(77, progressed(40, 70)),
        job(1, JobEvent::LeaseExpired { lease_id: lease(), attempt: 1, given_back: false }),
        job(1, leased(2, 130)),
        job(1, attempt_failed(Some(140))),
        job(2, leased(1, 100)),
        job(2, JobEvent::CancelRequested { by: user_id("bob") }),
        job(2, JobEvent::Cancelled {}),
        job(1, leased(3, 200)),
        stored(9, "ada", "b"),
        job(1, completed()),
        job(3, leased(1, 200)),
        job(3, attempt_failed(None)),
        job(3, JobEvent::Failed { error: "boom".to_owned() }),
        job(3, retried()),
        stored(10, "bob", "b"),
        deleted_file(9, "ada"),
        deleted_file(88, "ada"),
        user(
            "ada",
            UserEvent::OrganizationLeft { membership_id: "m".into(), organization_id: "o".into() },
        ),
        user("bob", UserEvent::Banned {}),
        user("bob", UserEvent::Unbanned {}),
        user("bob", UserEvent::Deleted {}),
        session("s2", ended(EndReason::UserDeleted)),
        session("s3", ended(EndReason::Removed)),
        session("s3", started("ada", 5)),
        session(
            "s1",
            SessionEvent::Remembered {
                user_id: user_id("ada"),
                remember_me: true,
                expires_at: at(30 * 86_400),
            },
        ),
    ]
}

#[test]
fn what_is_at_or_below_the_checkpoint_is_skipped() {
    let views = after(vec![user("ada", registered("a"))]);
    let before = views.content_hash().unwrap();
    let late = Happened { position: 10, hash: [0; 32], time: at(9), entity: user("ada", admin()) };
    views.apply(&[late]).unwrap();
    assert_eq!((views.content_hash().unwrap(), views.checkpoint()), (before, 10));
}

#[test]
fn a_replay_comes_out_the_same_and_applying_twice_changes_nothing() {
    let events = log(history());
    let (live, replayed) = (after(history()), after(history()));
    live.apply(&events).unwrap();
    assert_eq!(live.dump().unwrap(), replayed.dump().unwrap());
    let other = after(history().into_iter().skip(1).collect());
    assert_ne!(live.content_hash().unwrap(), other.content_hash().unwrap());
}

#[test]
fn reopening_finds_the_same_tables_memory_and_checkpoint() {
    let Fixture { directory, views } = after(history());
    let path = directory.path().join("views.sqlite");
    let ask = |views: &Views| {
        (
            views.checkpoint(),
            views.content_hash().unwrap(),
            ["ada", "bob", "eve"].map(|name| views.user_standing(&user_id(name))),
            ["s1", "s2", "s3", "s4"].map(|name| views.session_standing(&session_id(name))),
        )
    };
    let before = ask(&views);
    drop(views);
    let again = Views::open(&path).unwrap();
    assert_eq!(ask(&again), before);
    assert!(matches!(before.3[0], Some(SessionStanding::Live { remembered: true, .. })));
    assert!(before.2[0].is_some());
}

#[test]
fn a_foreign_file_is_refused_and_left_as_it_was() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("views.sqlite");
    fs::write(&path, "somebody's letters, long enough to be read as a header of SQLite".repeat(9))
        .unwrap();
    let before = fs::read(&path).unwrap();
    assert!(matches!(Views::open(&path), Err(Error::Foreign(_))));
    assert_eq!(fs::read(&path).unwrap(), before);
    fs::remove_file(&path).unwrap();
    Connection::open(&path).unwrap().execute_batch("CREATE TABLE theirs (x)").unwrap();
    assert!(matches!(Views::open(&path), Err(Error::Foreign(_))));
}

#[test]
fn views_of_another_schema_version_begin_anew() {
    let Fixture { directory, views } = after(history());
    drop(views);
    let path = directory.path().join("views.sqlite");
    Connection::open(&path).unwrap().execute_batch("PRAGMA user_version = 999").unwrap();
    let views = Views::open(&path).unwrap();
    assert_eq!(views.checkpoint(), 0);
    assert_eq!(views.content_hash().unwrap(), empty().content_hash().unwrap());
}

#[test]
fn readers_on_other_threads_go_on_while_batches_are_applied() {
    let views = empty();
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while views.checkpoint() < 410 {
                    let position = views.checkpoint();
                    // What is counted by the checkpoint is there to be read.
                    if position >= 30 {
                        assert!(views.user(&user_id("bob")).unwrap().is_some());
                    }
                }
            });
        }
        for happened in log(history()) {
            views.apply(&[happened]).unwrap();
        }
    });
    assert_eq!(views.checkpoint(), 410);
}

#[test]
fn the_questions_of_the_background_are_answered_from_indexes() {
    let views = empty();
    for query in [
        "SELECT position FROM jobs WHERE available_at IS NOT NULL",
        "SELECT position FROM jobs WHERE lease_expires_at IS NOT NULL",
        "SELECT file_id FROM files WHERE job_id = x'00' ORDER BY position",
        "SELECT file_id FROM files CROSS JOIN jobs USING (job_id)
         WHERE files.job_id IS NOT NULL AND state IN ('failed', 'cancelled') LIMIT 9",
        "SELECT job_id FROM jobs WHERE lease_expires_at IS NOT NULL AND lease_expires_at <= 1
         ORDER BY lease_expires_at LIMIT 9",
        "SELECT session_id FROM sessions WHERE due_at IS NOT NULL AND due_at <= 1
         ORDER BY due_at LIMIT 9",
        "SELECT session_id, doomed FROM sessions WHERE doomed IS NOT NULL LIMIT 9",
        "SELECT min(available_at) FROM jobs WHERE state = 'retry_wait'",
        "SELECT job_id FROM jobs WHERE deadline_at IS NOT NULL AND finished_at IS NULL
             AND deadline_at <= 1 AND state <> 'cancelling' ORDER BY deadline_at LIMIT 9",
        "SELECT min(deadline_at) FROM jobs
             WHERE deadline_at IS NOT NULL AND finished_at IS NULL AND state <> 'cancelling'",
        "SELECT state, count(*), total(seconds) FROM jobs WHERE user_id = 'a' GROUP BY state",
        "SELECT position FROM feed WHERE user_id = 'a' AND position > 1 ORDER BY position LIMIT 9",
        "SELECT position FROM feed WHERE job_id = x'00' AND position > 1 ORDER BY position LIMIT 9",
        "SELECT * FROM jobs WHERE user_id = 'a' AND position < 9 ORDER BY position DESC LIMIT 9",
        "SELECT * FROM sessions WHERE user_id = 'a' AND ended_at IS NULL ORDER BY started_at DESC",
        "SELECT count(DISTINCT user_id) FROM sessions WHERE last_active_at >= 9",
        "DELETE FROM feed WHERE type = 'job.progressed' AND position <= 9",
        "SELECT access_position, user_id FROM users WHERE deleted AND access_position > 1
         ORDER BY access_position LIMIT 9",
        "SELECT 1 FROM users WHERE deleted AND access_position > 9",
    ] {
        let plan: Vec<String> = views
            .read(|sql| {
                sql.prepare(&format!("EXPLAIN QUERY PLAN {query}"))?
                    .query_map([], |row| row.get(3))?
                    .collect()
            })
            .unwrap();
        assert!(plan.iter().all(|step| step.contains("INDEX")), "{query}: {plan:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn batches_cut_anywhere_come_out_the_same(cuts in prop::collection::vec(any::<bool>(), 41)) {
        let (whole, cut) = (after(history()), empty());
        let mut batch = vec![];
        for (happened, ends) in log(history()).into_iter().zip(cuts) {
            batch.push(happened);
            if ends {
                cut.apply(&std::mem::take(&mut batch)).unwrap();
            }
        }
        cut.apply(&batch).unwrap();
        prop_assert_eq!(cut.dump().unwrap(), whole.dump().unwrap());
        prop_assert_eq!(cut.checkpoint(), whole.checkpoint());
        for name in ["s1", "s2", "s3"] {
            let id = session_id(name);
            prop_assert_eq!(cut.session_standing(&id), whole.session_standing(&id));
        }
    }
}

#[test]
fn views_know_their_log_again_by_the_first_and_the_last_event_they_saw() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("views.sqlite");
    let emails = ["a@example.com", "b@example.com", "c@example.com"];
    let mut events = log(emails.map(|email| user("ada", registered(email))).to_vec());
    for (number, event) in (1..).zip(&mut events) {
        event.hash = [number; 32];
    }
    let views = Views::open(&path).unwrap();
    let nothing = Seen { position: 0, first: [0; 32], last: [0; 32] };
    assert_eq!(views.seen().unwrap(), nothing);
    views.apply(&events[..2]).unwrap();
    views.apply(&events[1..]).unwrap();
    let all = Seen { position: 30, first: [1; 32], last: [3; 32] };
    assert_eq!(views.seen().unwrap(), all);
    drop(views);
    assert_eq!(peek(&path).unwrap().unwrap().seen, all);
    let mut building = Building::beside(&path).unwrap();
    building.apply(&events, 0).unwrap();
    assert_eq!(building.finish_as_current().unwrap().seen().unwrap(), all);
    discard(&path).unwrap();
    assert_eq!(Views::open(&path).unwrap().seen().unwrap(), nothing);
    fs::write(directory.path().join("other"), "somebody else's").unwrap();
    assert!(matches!(discard(&directory.path().join("other")), Err(Error::Foreign(_))));
}
