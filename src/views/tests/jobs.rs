//! Jobs, their queue, their feed and their files, as the events made them.

use super::*;

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
fn a_job_that_was_given_back_looks_as_if_that_attempt_had_not_begun() {
    let given_back =
        |attempt| JobEvent::LeaseExpired { lease_id: lease(), attempt, given_back: true };
    let shown = |events: Vec<JobEvent>| {
        let job = row(events);
        (job.state.clone(), job.attempt, job.progress, job.started_at)
    };
    let first = vec![requested("ada"), leased(1, 60), progressed(40, 60), given_back(1)];
    assert_eq!(shown(first), ("queued".into(), 0, 0, None));
    let mut second = vec![requested("ada"), leased(1, 60), attempt_failed(Some(9))];
    second.extend([leased(2, 60), progressed(40, 60), given_back(2)]);
    assert_eq!(shown(second), ("queued".into(), 1, 0, Some(at(1))));
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
    assert_eq!(told(View::Files), [vec![10, 20], vec![10, 50]], "files tell nothing of a job");
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
