//! Histories in, answers out; and that neither the cut into batches nor a replay makes a difference.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use chrono::{DateTime, TimeDelta, Utc};
use proptest::prelude::*;
use tempfile::TempDir;
use uuid::Uuid;

mod analytics;
mod building;
mod renewing;

use super::*;
use crate::domain::file::{Event as FileEvent, Reason, Stored};
use crate::domain::ids::LeaseId;
use crate::domain::job::{
    AspectRatio, Event as JobEvent, Kind, Options, Output, Quality, Request, VideoOptions,
};
use crate::domain::session::{EndReason, Event as SessionEvent};
use crate::domain::text::{Personal, Prompt};
use crate::domain::tier::{Caps, Tier};
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
    UserEvent::Registered { profile: Box::new(profile), provisional: true, told: Told::default() }
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
    let request = Request {
        user_id: user_id(owner),
        kind: Kind::Video,
        prompt: Personal::Known(Prompt::parse("a lighthouse").unwrap()),
        options: Options::Video(VideoOptions {
            duration: 10,
            quality: Quality::P720,
            aspect_ratio: AspectRatio::Landscape,
            style: None,
            seed: u64::MAX,
            engine: None,
            source_file_id: None,
        }),
        tier: Tier::Standard,
        batch: false,
        fingerprint: Some("f".to_owned()),
        callback_url: None,
        deadline: None,
    };
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

#[test]
fn a_job_that_was_read_is_read_anew_after_its_next_event() {
    let fixture = empty();
    let mut history = log(vec![
        job(1, requested("ada")),
        job(1, leased(1, 60)),
        user("ada", UserEvent::Deleted {}),
    ]);
    let deletion = history.pop().unwrap();
    let lease = history.pop().unwrap();
    for (next, state, prompt) in [
        (history.pop().unwrap(), "queued", true),
        (lease, "running", true),
        (deletion, "running", false),
    ] {
        fixture.apply(&[next]).unwrap();
        for _ in 0..2 {
            let row = fixture.job(&job_id(1)).unwrap().unwrap();
            assert_eq!((row.state.as_str(), !row.prompt.is_empty()), (state, prompt));
        }
    }
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
fn a_user_is_what_the_events_made_of_it() {
    let views = after(history());
    let ada = views.user(&user_id("ada")).unwrap().unwrap();
    assert_eq!((ada.role.as_str(), ada.email, ada.provisional), ("admin", None, false));
    assert_eq!(ada.organizations, vec![]);
    assert_eq!(ada.onboarding.unwrap().step, 1);
    assert_eq!(ada.created_at, at(1));
    let access = views.user_standing(&user_id("ada")).unwrap();
    assert_eq!((access.access_position, access.access_changed_at), (90, Some(at(8))));
    assert_eq!(access.feature_flags, BTreeMap::from([("x".to_owned(), true)]));
    assert!(views.user(&user_id("eve")).unwrap().is_none());
}

fn decided(access: Access, decided: Option<&[Right]>) -> UserEvent {
    let decided = decided.map(|rights| rights.iter().copied().collect());
    UserEvent::AccessChanged { access, decided_at: Some(at(50)), decided }
}

#[test]
fn what_an_administrator_names_is_decided_here_and_of_older_decisions_what_they_changed() {
    let premium = || Access { subscription_tier: "premium".to_owned(), ..Access::default() };
    let [role, permissions, tier] = Right::ALL;
    let table: [(Vec<UserEvent>, &[Right]); 6] = [
        (vec![decided(premium(), Some(&Right::ALL))], &Right::ALL),
        (vec![decided(premium(), Some(&[role, tier]))], &[role, tier]),
        (vec![decided(premium(), None)], &[tier]),
        (vec![decided(Access::default(), None)], &Right::ALL),
        (vec![decided(Access::default(), Some(&[permissions]))], &[permissions]),
        // Clerk then says otherwise of the role, and of the tier.
        (vec![decided(premium(), Some(&Right::ALL)), admin()], &[permissions]),
    ];
    for (events, here) in table {
        let events = [&[registered("a")], &events[..]].concat();
        let views = empty();
        // One at a time, so that each finds what the one before it wrote.
        for event in log(events.into_iter().map(|event| user("ada", event)).collect()) {
            views.apply(&[event]).unwrap();
        }
        let found = views.user_standing(&user_id("ada")).unwrap().decided_here.clone();
        assert_eq!(found.into_iter().collect::<Vec<_>>(), here);
    }
}

#[test]
fn what_a_token_claimed_overrules_an_older_token_even_where_it_claimed_nothing() {
    let changed_at = |event| {
        let views = after(vec![user("ada", event)]);
        views.user_standing(&user_id("ada")).unwrap().access_changed_at
    };
    assert_eq!(changed_at(registered("a")), Some(at(0)));
    let (profile, told) = (Box::default(), Told::default());
    let by_clerk = UserEvent::Registered { profile, provisional: false, told };
    assert_eq!(changed_at(by_clerk), None);
}

#[test]
fn memberships_alone_do_not_make_a_user_known_but_are_kept_for_it() {
    let views = after(vec![user("ada", joined("member"))]);
    assert!(views.user(&user_id("ada")).unwrap().is_none());
    assert!(views.user_standing(&user_id("ada")).is_none());
    let changed = UserEvent::OrganizationRoleChanged {
        membership_id: "m".to_owned(),
        role: "owner".to_owned(),
        permissions: BTreeSet::new(),
        source_updated_at: at(1),
    };
    let views = after(vec![
        user("ada", joined("member")),
        user("ada", changed),
        user("ada", registered("a")),
    ]);
    let ada = views.user(&user_id("ada")).unwrap().unwrap();
    assert_eq!(ada.organizations, [membership("owner")]);
}

#[test]
fn a_deleted_user_leaves_nothing_personal_in_any_table() {
    let views = after(vec![
        user("ada", registered("ada@example.com")),
        session("s", started("ada", 0)),
        stored(1, "ada", "b"),
        job(1, requested("ada")),
        user("ada", UserEvent::Deleted {}),
        user("ada", registered("late@example.com")),
    ]);
    let ada = views.user(&user_id("ada")).unwrap().unwrap();
    assert_eq!((ada.deleted, ada.email), (true, None));
    assert!(views.user_standing(&user_id("ada")).unwrap().deleted);
    assert_eq!(views.job(&job_id(1)).unwrap().unwrap().prompt, "");
    assert_eq!(views.file(&file_id(1)).unwrap().unwrap().filename, "");
    assert_eq!(views.session(&session_id("s")).unwrap().unwrap().ip_address, None);
}

#[test]
fn live_sessions_are_listed_newest_first_and_ended_ones_are_not() {
    let views = after(vec![
        session("old", started("ada", 1)),
        session("new", started("ada", 3)),
        session("gone", started("ada", 2)),
        session("gone", ended(EndReason::SignedOut)),
        session("gone", ended(EndReason::Expired)),
    ]);
    let ids = views.sessions_of(&user_id("ada"), None, 50).unwrap().items;
    let ids: Vec<_> = ids.iter().map(|row| row.session_id.as_str()).collect();
    assert_eq!(ids, ["new", "old"]);
    let gone = views.session_standing(&session_id("gone"));
    assert_eq!(gone, Some(SessionStanding::Ended(EndReason::SignedOut)));
    assert_eq!(views.session_standing(&session_id("never")), None);
}

#[test]
fn sessions_that_began_at_the_same_moment_are_listed_each_once() {
    let views = after(["a", "b", "c"].map(|id| session(id, started("ada", 1))).into());
    let mut cursor = None;
    for (id, more) in [("a", true), ("b", true), ("c", false)] {
        let page = views.sessions_of(&user_id("ada"), cursor.as_ref(), 1).unwrap();
        assert_eq!(page.items[0].session_id.as_str(), id);
        assert_eq!(page.next_cursor.is_some(), more);
        cursor = page.next_cursor.and_then(|text| SessionCursor::parse(&text));
    }
}

#[test]
fn an_end_that_overtakes_the_start_stands() {
    let views =
        after(vec![session("s", ended(EndReason::Revoked)), session("s", started("ada", 1))]);
    let standing = views.session_standing(&session_id("s"));
    assert_eq!(standing, Some(SessionStanding::Ended(EndReason::Revoked)));
    assert!(views.sessions_of(&user_id("ada"), None, 50).unwrap().items.is_empty());
}

#[test]
fn sessions_lapse_by_inactivity_unless_remembered_and_by_age_in_any_case() {
    let active = SessionEvent::Active { user_id: user_id("ada"), at: at(600) };
    let remembered = SessionEvent::Remembered {
        user_id: user_id("ada"),
        remember_me: true,
        expires_at: at(9000),
    };
    let views = after(vec![
        session("idle", started("ada", 0)),
        session("busy", started("ada", 0)),
        session("busy", active),
        session("kept", started("ada", 0)),
        session("kept", remembered),
    ]);
    for (second, lapsed) in [
        (1799, vec![]),
        (1800, vec!["idle"]),
        (2400, vec!["idle", "busy"]),
        (9000, vec!["idle", "busy", "kept"]),
    ] {
        let ids = views.lapsed_sessions(at(second), 10).unwrap();
        assert_eq!(ids.iter().map(SessionId::as_str).collect::<Vec<_>>(), lapsed, "{second}");
    }
    assert_eq!(views.next_due().unwrap(), Some(at(1800)));
}

#[test]
fn sessions_of_gone_users_wait_to_be_ended() {
    let mut entities = vec![
        user("ada", registered("a")),
        user("bob", registered("b")),
        session("a", started("ada", 0)),
        session("b", started("bob", 0)),
        user("ada", UserEvent::Deleted {}),
        user("bob", UserEvent::Banned {}),
        session("late", started("bob", 9)),
    ];
    let gone = |entities: &[Entity]| {
        let found = after(entities.to_vec()).live_sessions_of_gone_users(10).unwrap();
        let mut found: Vec<_> =
            found.iter().map(|(id, why)| format!("{id} {}", why.as_str())).collect();
        found.sort();
        found
    };
    assert_eq!(gone(&entities), ["a user_deleted", "b user_banned", "late user_banned"]);
    entities.push(session("a", ended(EndReason::UserDeleted)));
    entities.push(user("bob", UserEvent::Unbanned {}));
    assert_eq!(gone(&entities), Vec::<String>::new());
}

#[test]
fn a_deleted_file_is_gone_and_its_blob_loses_a_referrer() {
    let mut entities = vec![stored(1, "ada", "b"), stored(2, "bob", "b")];
    assert_eq!(after(entities.clone()).blob_referrers("b").unwrap(), 2);
    entities.push(deleted_file(1, "ada"));
    let views = after(entities);
    assert_eq!(views.blob_referrers("b").unwrap(), 1);
    assert!(views.file(&file_id(1)).unwrap().is_none());
    assert_eq!(views.file(&file_id(2)).unwrap().unwrap().filename, "2.png");
    assert_eq!(views.usage(&user_id("ada"), at(0)).unwrap(), Usage::default());
}

#[test]
fn each_event_of_a_job_leads_to_its_state_status_and_progress() {
    let base = || vec![requested("ada"), leased(1, 60)];
    let with = |more: Vec<JobEvent>| base().into_iter().chain(more).collect::<Vec<_>>();
    let cancel = || JobEvent::CancelRequested { by: user_id("ada") };
    let failed = || JobEvent::Failed { error: "over".to_owned() };
    for (events, state, status, progress, error) in [
        (vec![requested("ada")], "queued", "processing", 0, None),
        (base(), "running", "processing", 0, None),
        (with(vec![progressed(40, 70)]), "running", "processing", 40, None),
        (
            with(vec![JobEvent::LeaseExpired { lease_id: lease(), attempt: 1, given_back: false }]),
            "queued",
            "processing",
            0,
            Some("the worker's lease ran out"),
        ),
        (with(vec![attempt_failed(Some(99))]), "retry_wait", "processing", 0, Some("boom")),
        (
            with(vec![progressed(40, 70), attempt_failed(Some(99)), leased(2, 200)]),
            "running",
            "processing",
            0,
            Some("boom"),
        ),
        (with(vec![attempt_failed(Some(99)), completed()]), "completed", "completed", 100, None),
        (with(vec![attempt_failed(None), failed()]), "failed", "error", 0, Some("over")),
        (with(vec![cancel(), progressed(50, 70)]), "cancelling", "processing", 0, None),
        (with(vec![cancel(), JobEvent::Cancelled {}]), "cancelled", "error", 0, None),
        (with(vec![progressed(9, 70), failed(), retried()]), "queued", "processing", 0, None),
    ] {
        let job = row(events);
        let found = (job.state.as_str(), job.status(), job.progress, job.error.as_deref());
        assert_eq!(found, (state, status, progress, error));
        let holds_lease = matches!(state, "running" | "cancelling");
        assert_eq!(job.lease_expires_at.is_some(), holds_lease, "{state}");
        assert_eq!(job.retry_at.is_some(), state == "retry_wait");
        let over = matches!(state, "completed" | "failed" | "cancelled");
        assert_eq!(job.finished_at.is_some(), over, "{state}");
    }
}

#[test]
fn a_completed_job_reads_back_all_that_was_asked_and_made() {
    let job = row(vec![requested("ada"), leased(1, 60), completed()]);
    assert_eq!((job.prompt.as_str(), seed_of(&job)), ("a lighthouse", u64::MAX));
    assert_eq!(job.output, Some(output()));
    assert_eq!((job.position_of_request, job.attempt), (10, 1));
    assert_eq!(
        (job.created_at, job.started_at, job.finished_at),
        (at(0), Some(at(1)), Some(at(2)))
    );
    assert_eq!(job.fingerprint.as_deref(), Some("f"));
}

#[test]
fn the_queue_is_in_the_order_of_requests_and_a_retry_goes_to_its_end() {
    let views = after(vec![
        job(1, requested("ada")),
        job(2, requested("ada")),
        job(3, requested("bob")),
        job(1, leased(1, 60)),
        job(1, JobEvent::Failed { error: "over".to_owned() }),
        job(1, retried()),
        job(2, leased(1, 61)),
        job(2, attempt_failed(Some(100))),
        job(4, requested("ada")),
        job(4, leased(1, 50)),
    ]);
    let caps = Caps::DEFAULT;
    let next = |second| views.next_job(at(second), &caps, &Kind::ALL, |_| false);
    let place = |n, second| {
        views.queue_position(&views.job(&job_id(n)).unwrap().unwrap(), at(second), &caps)
    };
    // Ada has a job that runs, so that it is bob's turn; the delayed one is in nobody's way.
    assert_eq!(next(99), Some(job_id(3)));
    assert_eq!([1, 2, 3, 4].map(|n| place(n, 99)), [Some(2), None, Some(1), None]);
    assert_eq!([1, 2, 3, 4].map(|n| place(n, 100)), [Some(3), Some(2), Some(1), None]);
    assert_eq!(views.next_job(at(100), &caps, &Kind::ALL, |id| id == job_id(3)), Some(job_id(2)));
    assert_eq!(views.next_job(at(100), &caps, &[], |_| false), None);
    // Its delay was set by a clock that was ahead.
    let early = 100 - 2 * 3600;
    assert_eq!(views.next_job(at(early), &caps, &Kind::ALL, |id| id == job_id(3)), Some(job_id(2)));
    assert_eq!(views.jobs_held_by_another_clock(at(early), 9).unwrap(), [job_id(4)]);
    assert_eq!(views.jobs_held_by_another_clock(at(0), 9).unwrap(), []);
    assert_eq!(views.lapsed_jobs(at(49), 9).unwrap(), []);
    assert_eq!(views.lapsed_jobs(at(50), 9).unwrap(), [job_id(4)]);
    assert_eq!(views.next_due().unwrap(), Some(at(50)));
}

#[test]
fn the_feed_shows_each_event_with_the_state_after_it() {
    let views = after(vec![
        job(1, requested("ada")),
        job(2, requested("bob")),
        job(1, leased(1, 60)),
        job(1, progressed(40, 70)),
        stored(1, "ada", "b"),
    ]);
    let names = |items: Vec<FeedItem>| {
        items.into_iter().map(|item| (item.position, item.event)).collect::<Vec<_>>()
    };
    let ada = names(views.feed_of_user(&user_id("ada"), 10, 2).unwrap());
    assert_eq!(ada, [(30, "job.leased".to_owned()), (40, "job.progressed".to_owned())]);
    let rest = names(views.feed_of_user(&user_id("ada"), 40, 2).unwrap());
    assert_eq!(rest, [(50, "file.stored".to_owned())]);
    let item = views.feed_of_job(&job_id(1), 30, 9).unwrap().remove(0);
    let data: serde_json::Value = serde_json::from_str(&item.data).unwrap();
    let expected = serde_json::json!({
        "job_id": job_id(1), "type": "job.progressed", "status": "processing", "state": "running",
        "progress": 40, "message": "drawing", "attempt": 1, "error": null, "time": at(3),
    });
    assert_eq!(data, expected);
}

#[test]
fn a_stream_waits_for_a_view_that_stands_still() {
    let told = |view| {
        let reason = "unreadable".to_owned();
        let views = after(vec![
            job(1, requested("ada")),
            stored(1, "ada", "b"),
            Entity::Unreadable { view: Some(view), reason },
            stored(2, "ada", "b"),
            job(1, leased(1, 60)),
        ]);
        let feed = views.feed_of_user(&user_id("ada"), 0, 9).unwrap();
        let of_job = views.feed_of_job(&job_id(1), 0, 9).unwrap();
        [feed, of_job].map(|items| items.iter().map(|item| item.position).collect::<Vec<_>>())
    };
    assert_eq!(told(View::Jobs), [vec![10, 20], vec![10]]);
    assert_eq!(told(View::Files), [vec![10, 20], vec![10]]);
    assert_eq!(told(View::Users), [vec![10, 20, 40, 50], vec![10, 50]]);
}

#[test]
fn usage_counts_jobs_by_state_files_bytes_and_seconds() {
    let usage = after(history()).usage(&user_id("ada"), at(0)).unwrap();
    let jobs = BTreeMap::from([("completed".to_owned(), 1), ("queued".to_owned(), 1)]);
    let month = Period {
        name: "1970-01".to_owned(),
        requested: 2,
        completed: 1,
        // It was tried again.
        failed: 1,
        seconds_rendered: 10.5,
        ..Period::default()
    };
    let expected =
        Usage { jobs, files: 0, bytes_stored: 0, seconds_rendered: 10.5, months: vec![month] };
    assert_eq!(usage, expected);
    let bob = after(history()).usage(&user_id("bob"), at(0)).unwrap();
    assert_eq!((bob.files, bob.bytes_stored), (1, 10));
}

#[test]
fn pages_newest_first_have_no_gap_and_no_repetition_while_jobs_are_added() {
    let views = after((1..=7).map(|n| job(n, requested("ada"))).collect());
    let (mut seen, mut cursor, mut position) = (vec![], None, 1000);
    loop {
        let page = views.jobs(&user_id("ada"), &JobFilter::default(), cursor.as_ref(), 3).unwrap();
        assert!(page.items.len() <= 3);
        seen.extend(page.items.iter().map(|job| job.job_id));
        position += 1;
        let entity = job(u128::from(position), requested("ada"));
        views.apply(&[Happened { position, hash: [0; 32], time: at(0), entity }]).unwrap();
        match page.next_cursor {
            Some(next) => cursor = Some(Cursor::parse(&next).unwrap()),
            None => break,
        }
    }
    assert_eq!(seen, (1..=7).rev().map(job_id).collect::<Vec<_>>());
}

#[test]
fn a_page_that_holds_exactly_the_rest_is_the_last() {
    let views = after((1..=2).map(|n| stored(n, "ada", "b")).collect());
    assert_eq!(views.files(&user_id("ada"), None, 2).unwrap().next_cursor, None);
    assert!(views.files(&user_id("ada"), None, 1).unwrap().next_cursor.is_some());
    let views = after(vec![user("ada", registered("a")), user("bob", registered("b"))]);
    let page = views.users(None, 1).unwrap();
    assert_eq!(page.items[0].user_id, user_id("bob"));
    let cursor = Cursor::parse(&page.next_cursor.unwrap()).unwrap();
    assert_eq!(views.users(Some(&cursor), 1).unwrap().items[0].user_id, user_id("ada"));
}

#[test]
fn jobs_are_filtered_by_state_and_kind() {
    let views = after(history());
    let count = |state: Option<&str>, kind: Option<&str>| {
        let filter = JobFilter { state: state.map(Into::into), kind: kind.map(Into::into) };
        views.jobs(&user_id("ada"), &filter, None, 10).unwrap().items.len()
    };
    assert_eq!(count(None, None), 2);
    assert_eq!(count(Some("completed"), None), 1);
    assert_eq!(count(Some("running"), None), 0);
    assert_eq!(count(Some("queued"), Some("video")), 1);
    assert_eq!(count(None, Some("audio")), 0);
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
fn fresh_views_replace_the_present_ones_under_their_readers() {
    let views = after(history());
    let reader = views.views.clone();
    for round in 0..3 {
        let build = |events: &[Happened]| {
            let mut fresh = Building::beside(&views.path()).unwrap();
            assert!(matches!(Building::beside(&views.path()), Err(Error::Rebuilding)));
            fresh.apply(events, 0).unwrap();
            let fresh = fresh.finish().unwrap();
            let followed = empty();
            followed.apply(events).unwrap();
            assert_eq!(fresh.dump().unwrap(), followed.dump().unwrap(), "built as if followed");
            fresh
        };
        let behind = build(&log(history())[..3]);
        assert!(matches!(views.replace_with(behind), Err(Error::Behind { .. })), "{round}");
        views.replace_with(build(&log(history()))).unwrap();
        assert!(reader.user(&user_id("ada")).unwrap().is_some());
    }
    let entity = user("eve", registered("e"));
    views.apply(&[Happened { position: 9999, hash: [0; 32], time: at(9), entity }]).unwrap();
    assert!(reader.user_standing(&user_id("eve")).is_some());
    let hash = views.content_hash().unwrap();
    let Fixture { directory, views } = views;
    drop((views, reader));
    let databases = fs::read_dir(directory.path())
        .unwrap()
        .flatten()
        .filter(|entry| entry.path().extension().is_some_and(|extension| extension == "sqlite"));
    assert_eq!(databases.count(), 1, "the replaced files are deleted");
    let again = Views::open(&directory.path().join("views.sqlite")).unwrap();
    assert_eq!((again.checkpoint(), again.content_hash().unwrap()), (9999, hash));
}

#[test]
fn a_rebuild_that_broke_off_leaves_nothing_behind_the_next_start() {
    let Fixture { directory, views } = after(history());
    let mut building = Building::beside(&views.path()).unwrap();
    building.apply(&log(history()), 0).unwrap();
    let half_built = directory.path().join("views-1.sqlite");
    drop(views);
    let path = directory.path().join("views.sqlite");
    drop(Views::open(&path).unwrap());
    assert!(half_built.exists(), "somebody is at it");
    drop(building);
    drop(Views::open(&path).unwrap());
    assert!(!half_built.exists());
}

#[test]
fn what_was_built_beside_outlives_a_sweeping_before_it_is_taken_over() {
    let Fixture { directory, views } = after(history());
    let mut building = Building::beside(&views.path()).unwrap();
    building.apply(&log(history()), 0).unwrap();
    drop(building.finish_as_current().unwrap());
    views.sweep();
    let fresh = views.successor().unwrap().expect("it was built");
    assert_eq!(fresh.content_hash().unwrap(), views.content_hash().unwrap());
    views.replace_with(fresh).unwrap();
    views.sweep();
    assert!(!directory.path().join("views.sqlite").exists(), "the one before is not needed");
}

#[test]
fn views_that_are_taken_over_while_others_are_built_give_way_to_those() {
    let Fixture { directory, views } = after(history());
    let build = || {
        let mut building = Building::beside(&views.path()).unwrap();
        building.apply(&log(history()), 0).unwrap();
        drop(building.finish_as_current().unwrap());
    };
    build();
    let first = views.successor().unwrap().expect("it was built");
    build();
    views.sweep();
    views.replace_with(first).unwrap();
    assert_eq!(views.present_file(), directory.path().join("views-1.sqlite"));
    assert!(views.present_file().exists());
    let second = views.successor().unwrap().expect("it was built after the first");
    views.replace_with(second).unwrap();
    views.sweep();
    assert_eq!(views.present_file(), directory.path().join("views-2.sqlite"));
    assert!(!directory.path().join("views-1.sqlite").exists());
    assert_eq!(views.successor().unwrap().map(|next| next.present_file()), None);
}

#[test]
fn views_from_elsewhere_do_not_replace() {
    let (here, there) = (after(history()), after(history()));
    assert!(matches!(here.replace_with(there.views.clone()), Err(Error::Elsewhere)));
}

#[test]
fn a_session_told_after_its_users_deletion_does_not_bring_back_where_it_came_from() {
    let fixture = after(vec![
        Entity::User(user_id("ada"), UserEvent::Deleted {}),
        Entity::Session(session_id("s1"), started("ada", 1)),
        Entity::Session(session_id("s2"), started("bob", 1)),
    ]);
    let address = |name| fixture.session(&session_id(name)).unwrap().unwrap().ip_address;
    assert_eq!((address("s1"), address("s2").as_deref()), (None, Some("192.0.2.1")));
    let doomed = fixture.live_sessions_of_gone_users(9).unwrap();
    assert_eq!(doomed, [(session_id("s1"), EndReason::UserDeleted)]);
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
fn whose_turn_it_is_outlives_a_restart_and_a_rebuild() {
    let mut history = vec![];
    for n in 1..=12 {
        history.push(job(n, requested(["ada", "bob", "eve"][n as usize % 3])));
    }
    for n in [3, 1, 4] {
        history.push(job(n, leased(1, 60)));
    }
    history.push(job(3, JobEvent::Failed { error: "over".to_owned() }));
    history.push(job(3, retried()));
    history.push(job(1, attempt_failed(Some(100))));
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("views.sqlite");
    let caps = Caps::DEFAULT;
    let places = |views: &Views| -> Vec<Option<u64>> {
        let row = |n| views.job(&job_id(n)).unwrap().unwrap();
        (1..=12).map(|n| views.queue_position(&row(n), at(50), &caps)).collect()
    };
    let live = {
        let views = Views::open(&path).unwrap();
        for happened in log(history.clone()) {
            views.apply(&[happened]).unwrap();
        }
        places(&views)
    };
    assert_eq!(live.iter().flatten().count(), 10, "{live:?}");
    assert_eq!(places(&Views::open(&path).unwrap()), live);
    assert_eq!(places(&after(history)), live);
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
