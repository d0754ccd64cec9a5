//! Decisions on jobs, as tables of steps.

use super::progressing::delay_after;
use super::*;
use crate::domain::translation::TranslationOptions;
use uuid::Uuid;

fn at(seconds: i64) -> DateTime<Utc> {
    DateTime::UNIX_EPOCH + TimeDelta::seconds(seconds)
}

fn user(name: &str) -> UserId {
    UserId::try_from(name.to_owned()).unwrap()
}

fn lease(n: u128) -> LeaseId {
    LeaseId(Uuid::from_u128(n))
}

/// A video of 10 s as somebody asks for it, also for the tests of other modules.
pub(crate) fn video_of(user_id: UserId, prompt: &str) -> Request {
    Request {
        user_id,
        kind: Kind::Video,
        prompt: Personal::Known(Prompt::parse(prompt).unwrap()),
        options: Options::Video(VideoOptions {
            duration: 10,
            quality: Quality::P720,
            aspect_ratio: AspectRatio::Landscape,
            style: None,
            seed: 1,
            engine: None,
            source_file_id: None,
        }),
        tier: Tier::Standard,
        batch: false,
        fingerprint: None,
        callback_url: None,
        deadline: None,
    }
}

fn request() -> Request {
    Request { fingerprint: Some("f".to_owned()), ..video_of(user("ada"), "a lighthouse") }
}

fn output() -> Output {
    Output {
        file_id: FileId(Uuid::from_u128(9)),
        content_type: "video/mp4".to_owned(),
        size: 1,
        duration: Some(10.0),
        width: Some(1280),
        height: Some(720),
        poster_file_id: None,
        captions_file_id: None,
    }
}

fn ask() -> Command {
    Command::Request(request())
}
fn take(n: u128) -> Command {
    Command::Lease { lease_id: lease(n), worker_id: "w".to_owned() }
}
fn finish(n: u128) -> Command {
    Command::Complete { lease_id: lease(n), output: output() }
}
fn fail(n: u128) -> Command {
    Command::Fail { lease_id: lease(n), error: "boom".to_owned(), retryable: true }
}
fn give_back(n: u128) -> Command {
    Command::GiveBack { lease_id: lease(n) }
}
fn cancel() -> Command {
    Command::Cancel { by: user("ada") }
}

/// Runs commands at their seconds; the last one's answer and the state's name.
fn run(steps: &[(i64, Command)]) -> (Result<usize, Refusal>, &'static str) {
    let mut job = Job::default();
    let mut last = Ok(0);
    for (second, command) in steps {
        last = job.decide(command, at(*second)).map(|events| {
            for event in &events {
                job.evolve(event);
            }
            events.len()
        });
    }
    let state = match &job {
        Job::Absent => "absent",
        Job::Requested(job) => job.phase.name(),
    };
    (last, state)
}

fn check(steps: &[(i64, Command)], then: Result<usize, Refusal>, state: &str) {
    assert_eq!(run(steps), (then, state), "{steps:?}");
}

#[test]
fn a_request_is_leased_and_completed_once() {
    check(&[(0, ask())], Ok(1), "queued");
    check(&[(0, ask()), (0, ask())], Ok(0), "queued");
    check(&[(0, ask()), (1, take(1))], Ok(1), "running");
    check(&[(0, ask()), (1, take(1)), (2, finish(1))], Ok(1), "completed");
    check(&[(0, ask()), (1, take(1)), (2, finish(1)), (3, finish(1))], Ok(0), "completed");
    check(
        &[(0, ask()), (1, take(1)), (1, take(2))],
        Err(Refusal::NotLeasable("running")),
        "running",
    );
}

#[test]
fn another_request_under_the_same_key_is_refused() {
    let other = Request { fingerprint: Some("g".to_owned()), ..request() };
    check(&[(0, ask()), (0, Command::Request(other))], Err(Refusal::KeyReused), "queued");
}

#[test]
fn a_late_worker_changes_nothing() {
    let steps = [(0, ask()), (1, take(1)), (61, Command::Lapse), (62, take(2)), (63, finish(1))];
    check(&steps, Err(Refusal::LeaseLost), "running");
}

#[test]
fn a_clock_that_was_ahead_holds_no_job_once_it_is_right() {
    let (ahead, right) = (400 * 86_400, 10);
    let steps = [(0, ask()), (ahead, take(1)), (right, Command::Lapse), (right, take(2))];
    check(&steps, Ok(1), "running");
    let steps = [(0, ask()), (ahead, take(1)), (right, cancel()), (right, Command::Lapse)];
    check(&steps, Ok(1), "cancelled");
    let steps = [(0, ask()), (ahead, take(1)), (ahead, fail(1)), (right, take(2))];
    check(&steps, Ok(1), "running");
    // Of two nodes one is always a little ahead.
    check(&[(0, ask()), (3_000, take(1)), (right, Command::Lapse)], Ok(0), "running");
}

#[test]
fn progress_renews_the_lease_and_never_falls() {
    let progress =
        |percent| Command::Progress { lease_id: lease(1), progress: percent, message: None };
    let steps = [(0, ask()), (1, take(1)), (50, progress(40)), (61, Command::Lapse)];
    check(&steps, Ok(0), "running");
    let job = Job::fold(&[
        Event::Requested(Box::new(request())),
        Event::Leased {
            lease_id: lease(1),
            worker_id: "w".to_owned(),
            attempt: 1,
            expires_at: at(60),
        },
        Event::Progressed { lease_id: lease(1), progress: 40, message: None, expires_at: at(60) },
    ]);
    let events = job.decide(&progress(10), at(5)).unwrap();
    assert!(matches!(events[..], [Event::Progressed { progress: 40, .. }]));
}

#[test]
fn what_a_worker_gives_back_goes_on_at_once_and_was_no_attempt() {
    let mut steps = vec![(0, ask())];
    // More often than there are attempts.
    for n in 1..=u128::from(MAX_ATTEMPTS) + 2 {
        steps.extend([(1, take(n)), (1, give_back(n))]);
        check(&steps, Ok(1), "queued");
    }
    steps.extend([(1, take(9)), (2, fail(9))]);
    check(&steps, Ok(1), "retry_wait");
    check(&[(0, ask()), (1, take(1)), (1, give_back(2))], Err(Refusal::LeaseLost), "running");
    check(&[(0, ask()), (1, take(1)), (1, cancel()), (1, give_back(1))], Ok(1), "cancelled");
    let lapsed = [(0, ask()), (1, take(1)), (61, Command::Lapse), (62, give_back(1))];
    check(&lapsed, Err(Refusal::LeaseLost), "queued");
}

#[test]
fn three_attempts_with_growing_delay_and_then_failed() {
    let mut steps = vec![(0, ask()), (1, take(1)), (2, fail(1))];
    check(&steps, Ok(1), "retry_wait");
    steps.push((6, take(2)));
    check(&steps, Err(Refusal::NotLeasable("retry_wait")), "retry_wait");
    steps.extend([(7, take(2)), (8, fail(2))]);
    check(&steps, Ok(1), "retry_wait");
    steps.extend([(28, take(3)), (29, fail(3))]);
    check(&steps, Ok(2), "failed");
    steps.push((30, Command::Retry { by: user("ada") }));
    check(&steps, Ok(1), "queued");
}

#[test]
fn a_lease_that_runs_out_three_times_fails_the_job() {
    let mut steps = vec![(0, ask())];
    for round in 0..3 {
        steps.extend([(round * 100, take(round as u128)), (round * 100 + 60, Command::Lapse)]);
    }
    check(&steps, Ok(2), "failed");
}

#[test]
fn cancelling_a_running_job_waits_for_its_worker_or_its_lease() {
    check(&[(0, ask()), (0, cancel())], Ok(2), "cancelled");
    check(&[(0, ask()), (0, take(1)), (1, cancel())], Ok(1), "cancelling");
    check(&[(0, ask()), (0, take(1)), (1, cancel()), (2, finish(1))], Ok(1), "cancelled");
    check(&[(0, ask()), (0, take(1)), (1, cancel()), (61, Command::Lapse)], Ok(1), "cancelled");
    check(&[(0, ask()), (0, take(1)), (1, cancel()), (2, Command::Abandon)], Ok(1), "cancelled");
    check(&[(0, ask()), (0, take(1)), (1, Command::Abandon)], Ok(0), "running");
    check(&[(0, ask()), (1, Command::Abandon)], Ok(0), "queued");
    check(&[(0, ask()), (0, take(1)), (1, finish(1)), (2, Command::Abandon)], Ok(0), "completed");
    check(
        &[(0, ask()), (0, take(1)), (1, finish(1)), (2, cancel())],
        Err(Refusal::WrongState("completed")),
        "completed",
    );
}

#[test]
fn a_job_whose_secret_is_gone_cannot_be_tried_again() {
    let translation = |has_api_key| {
        let options = TranslationOptions {
            source_file_id: FileId(Uuid::from_u128(8)),
            format: crate::domain::translation::Format::Srt,
            source_language: None,
            target_language: None,
            model_name: "m".to_owned(),
            style_data: None,
            segment_size: 15_000,
            has_api_key,
        };
        let options = Options::Translation(options);
        Command::Request(Request { kind: Kind::Translation, options, ..request() })
    };
    let retry = || Command::Retry { by: user("ada") };
    let steps = [(0, translation(true)), (1, cancel()), (2, retry())];
    check(&steps, Err(Refusal::SecretGone), "cancelled");
    check(&[(0, translation(false)), (1, cancel()), (2, retry())], Ok(1), "queued");
}

#[test]
fn somebody_elses_job_is_not_found() {
    let by = user("bob");
    check(&[(0, ask()), (0, Command::Cancel { by: by.clone() })], Err(Refusal::NotFound), "queued");
    check(&[(0, ask()), (0, Command::Retry { by })], Err(Refusal::NotFound), "queued");
}

#[test]
fn a_job_fails_at_its_deadline_wherever_it_is_and_is_not_tried_again() {
    let due = || Command::Request(Request { deadline: Some(at(10)), ..request() });
    check(&[(0, due()), (9, Command::Lapse)], Ok(0), "queued");
    check(&[(0, due()), (10, Command::Lapse)], Ok(1), "failed");
    check(&[(0, due()), (1, take(1)), (10, Command::Lapse)], Ok(1), "failed");
    check(&[(0, due()), (1, take(1)), (2, fail(1)), (10, Command::Lapse)], Ok(1), "failed");
    check(&[(0, due()), (1, take(1)), (2, finish(1)), (10, Command::Lapse)], Ok(0), "completed");
    check(&[(0, due()), (10, take(1))], Err(Refusal::NotLeasable("queued")), "queued");
    let retry = Command::Retry { by: user("ada") };
    let steps = [(0, due()), (10, Command::Lapse), (11, Command::Lapse), (12, retry)];
    check(&steps[..3], Ok(0), "failed");
    check(&steps, Err(Refusal::DeadlineOver), "failed");
    let early = [(0, due()), (1, cancel()), (2, Command::Retry { by: user("ada") })];
    check(&early, Ok(1), "queued");
}

#[test]
fn the_worker_of_an_overdue_job_is_heard_and_changes_nothing() {
    let due = || Command::Request(Request { deadline: Some(at(10)), ..request() });
    let progress = |n| Command::Progress { lease_id: lease(n), progress: 5, message: None };
    let after = |command| [(0, due()), (1, take(1)), (10, Command::Lapse), (11, command)];
    check(&after(progress(1)), Ok(0), "failed");
    check(&after(fail(1)), Ok(0), "failed");
    check(&after(give_back(1)), Ok(0), "failed");
    for lost in
        [progress(2), fail(2), give_back(2), finish(1), Command::Hold { lease_id: lease(1) }]
    {
        check(&after(lost), Err(Refusal::LeaseLost), "failed");
    }
}

#[test]
fn delays_grow_and_are_spread_by_up_to_a_half() {
    for (attempts, least) in [(1, 5_000), (2, 20_000), (3, 80_000)] {
        let delays: Vec<i64> =
            (0..64).map(|n| delay_after(attempts, lease(n * 1_013)).num_milliseconds()).collect();
        assert!(delays.iter().all(|delay| (least..least * 3 / 2).contains(delay)), "{delays:?}");
        let different: std::collections::BTreeSet<_> = delays.iter().collect();
        assert!(different.len() > 60, "{delays:?}");
    }
}

#[test]
fn an_attempt_that_takes_too_long_loses_its_lease_however_often_it_is_renewed() {
    let progress = || Command::Progress { lease_id: lease(1), progress: 1, message: None };
    let mut steps = vec![(0, ask()), (0, take(1))];
    steps.extend((1..80).map(|minute| (minute * 50, progress())));
    let end = LONGEST_ATTEMPT.num_seconds();
    steps.retain(|(second, _)| *second < end);
    steps.push((end - 1, Command::Lapse));
    check(&steps, Ok(0), "running");
    steps.push((end, Command::Lapse));
    check(&steps, Ok(1), "queued");
}

#[test]
fn a_worker_that_reports_on_a_job_being_cancelled_learns_it_and_renews_nothing() {
    let progress = Command::Progress { lease_id: lease(1), progress: 5, message: None };
    let steps = [(0, ask()), (0, take(1)), (1, cancel()), (50, progress), (60, Command::Lapse)];
    check(&steps[..4], Ok(0), "cancelling");
    check(&steps, Ok(1), "cancelled");
}

#[test]
fn a_lease_is_held_until_it_is_lost() {
    let hold = |n| Command::Hold { lease_id: lease(n) };
    check(&[(0, ask()), (0, hold(1))], Err(Refusal::LeaseLost), "queued");
    check(&[(0, ask()), (0, take(1)), (1, hold(1))], Ok(0), "running");
    check(&[(0, ask()), (0, take(1)), (1, hold(2))], Err(Refusal::LeaseLost), "running");
    check(&[(0, ask()), (0, take(1)), (1, cancel()), (1, hold(1))], Ok(0), "cancelling");
    check(
        &[(0, ask()), (0, take(1)), (1, finish(1)), (1, hold(1))],
        Err(Refusal::LeaseLost),
        "completed",
    );
}

#[test]
fn who_does_not_hold_the_lease_is_refused_whatever_it_says() {
    let progress = || Command::Progress { lease_id: lease(2), progress: 5, message: None };
    let hold = || Command::Hold { lease_id: lease(2) };
    for said in [progress(), finish(2), fail(2), give_back(2), hold()] {
        check(&[(0, ask()), (1, said.clone())], Err(Refusal::LeaseLost), "queued");
        let running = [(0, ask()), (0, take(1)), (1, said.clone())];
        check(&running, Err(Refusal::LeaseLost), "running");
        let cancelling = [(0, ask()), (0, take(1)), (1, cancel()), (2, said)];
        check(&cancelling, Err(Refusal::LeaseLost), "cancelling");
    }
}

#[test]
fn an_end_that_a_clock_ahead_has_set_holds_nothing() {
    assert_eq!([-1, 0, 1].map(|second| has_come(at(second), at(0))), [true, true, false]);
    let ahead = |second| has_come(at(second) + CLOCK_AHEAD, at(0));
    assert_eq!([-1, 0, 1].map(ahead), [false, false, true]);
}

#[test]
fn what_is_repeated_changes_nothing() {
    check(&[(0, ask()), (1, take(1)), (2, take(1))], Ok(0), "running");
    check(&[(0, ask()), (0, take(1)), (1, cancel()), (2, cancel())], Ok(0), "cancelling");
    check(&[(0, ask()), (1, cancel()), (2, cancel())], Ok(0), "cancelled");
    check(&[(0, ask()), (1, Command::Look)], Ok(0), "queued");
    let other = Output { size: 2, ..output() };
    let other = Command::Complete { lease_id: lease(1), output: other };
    let steps = [(0, ask()), (0, take(1)), (1, finish(1)), (2, other)];
    check(&steps, Err(Refusal::LeaseLost), "completed");
}

#[test]
fn a_request_without_a_key_repeats_nothing() {
    let keyless = || Command::Request(Request { fingerprint: None, ..request() });
    check(&[(0, keyless()), (0, keyless())], Err(Refusal::KeyReused), "queued");
}

#[test]
fn a_job_that_nobody_asked_for_is_not_found() {
    for command in [take(1), finish(1), fail(1), cancel(), Command::Lapse, Command::Look] {
        check(&[(0, command)], Err(Refusal::NotFound), "absent");
    }
}

#[test]
fn an_attempt_that_failed_for_good_is_the_last() {
    let fatal =
        Command::Fail { lease_id: lease(1), error: "no such voice".to_owned(), retryable: false };
    check(&[(0, ask()), (0, take(1)), (1, fatal)], Ok(2), "failed");
}

#[test]
fn a_job_that_is_being_cancelled_ends_with_its_attempt_or_its_lease() {
    let cancelling = |second, then| [(0, ask()), (0, take(1)), (1, cancel()), (second, then)];
    check(&cancelling(2, fail(1)), Ok(1), "cancelled");
    check(&cancelling(59, Command::Lapse), Ok(0), "cancelling");
    check(&cancelling(60, Command::Lapse), Ok(1), "cancelled");
    check(&[(0, ask()), (0, take(1)), (1, fail(1)), (2, cancel())], Ok(2), "cancelled");
}

#[test]
fn only_what_has_failed_or_was_cancelled_is_tried_again() {
    let retry = || (9, Command::Retry { by: user("ada") });
    check(&[(0, ask()), retry()], Err(Refusal::WrongState("queued")), "queued");
    check(&[(0, ask()), (0, take(1)), retry()], Err(Refusal::WrongState("running")), "running");
    let completed = [(0, ask()), (0, take(1)), (1, finish(1)), retry()];
    check(&completed, Err(Refusal::WrongState("completed")), "completed");
}

#[test]
fn kinds_and_options_are_named_as_they_are_stored() {
    let stored = |value: serde_json::Value| value.as_str().map(str::to_owned);
    for kind in Kind::ALL {
        assert_eq!(stored(serde_json::to_value(kind).unwrap()).as_deref(), Some(kind.as_str()));
        assert_eq!(Kind::parse(kind.as_str()), Some(kind));
    }
    for name in Quality::NAMES {
        let quality = Quality::parse(name).unwrap();
        assert_eq!(stored(serde_json::to_value(quality).unwrap()).as_deref(), Some(name));
        assert_eq!(quality.as_str(), name);
    }
    for name in AspectRatio::NAMES {
        let ratio = AspectRatio::parse(name).unwrap();
        assert_eq!(stored(serde_json::to_value(ratio).unwrap()).as_deref(), Some(name));
        assert_eq!(ratio.as_str(), name);
    }
    assert_eq!(
        (Kind::parse("song"), Quality::parse("8k"), AspectRatio::parse("4:3")),
        (None, None, None)
    );
}

#[test]
fn a_request_says_what_it_is_and_what_it_works_on() {
    let source = FileId(Uuid::from_u128(8));
    let Options::Video(video) = request().options else { panic!("a video") };
    let of_nothing = Options::Video(video.clone());
    let of_file = Options::Video(VideoOptions { source_file_id: Some(source), ..video });
    let translation = Options::Translation(TranslationOptions {
        source_file_id: source,
        format: crate::domain::translation::Format::Text,
        source_language: None,
        target_language: None,
        model_name: "m".to_owned(),
        style_data: None,
        segment_size: 1,
        has_api_key: false,
    });
    for (options, kind, source_file_id) in [
        (of_nothing, Kind::Video, None),
        (of_file, Kind::Video, Some(source)),
        (translation, Kind::Translation, Some(source)),
    ] {
        assert_eq!((options.kind(), options.source_file_id()), (kind, source_file_id));
    }
    assert_eq!(request().prompt_text(), "a lighthouse");
    assert_eq!(Request { prompt: Personal::Erased, ..request() }.prompt_text(), "");
    let premium = Request { tier: Tier::Premium, ..request() };
    assert_eq!((request().class(), premium.class()), (Class::Standard, Class::Premium));
}
