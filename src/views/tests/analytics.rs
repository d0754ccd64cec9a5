//! What administrators are told of everybody.

use super::*;

#[test]
fn analytics_count_what_is_there_and_what_happened_when() {
    let failed = || JobEvent::Failed { error: "over".to_owned() };
    let refused = JobEvent::AttemptFailed {
        lease_id: lease(),
        attempt: 1,
        error: "never".to_owned(),
        retry_at: None,
    };
    let exhausted = JobEvent::AttemptFailed {
        lease_id: lease(),
        attempt: 3,
        error: "again".to_owned(),
        retry_at: None,
    };
    let lost = JobEvent::LeaseExpired { lease_id: lease(), attempt: 3, given_back: false };
    let entities = vec![
        user("ada", joined("member")),
        stored(1, "ada", "b"),
        stored(2, "bob", "b"),
        deleted_file(1, "ada"),
        deleted_file(1, "ada"),
        job(1, requested("ada")),
        job(1, leased(1, 60)),
        job(1, progressed(40, 70)),
        job(1, completed()),
        job(2, requested("ada")),
        job(2, leased(1, 60)),
        job(2, refused),
        job(2, failed()),
        job(3, requested("bob")),
        job(3, leased(3, 60)),
        job(3, exhausted),
        job(3, failed()),
        job(4, requested("bob")),
        job(4, leased(3, 60)),
        job(4, lost),
        job(4, failed()),
        job(4, retried()),
        job(5, requested("ada")),
        job(5, JobEvent::Cancelled {}),
    ];
    // The last three happen a day later than the rest.
    let mut history = log(entities);
    let late = history.len() - 3;
    for happened in &mut history[late..] {
        happened.time += TimeDelta::days(1);
    }
    let views = empty();
    views.apply(&history).unwrap();
    let found = views.analytics(at(86_400)).unwrap();

    let counts = |counts: &[(&str, u64)]| {
        counts.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect::<BTreeMap<_, _>>()
    };
    assert_eq!(
        found.jobs,
        counts(&[("cancelled", 1), ("completed", 1), ("failed", 2), ("queued", 1)])
    );
    assert_eq!(
        found.failures,
        counts(&[("attempts_exhausted", 1), ("not_retryable", 1), ("worker_lost", 1)])
    );
    assert_eq!((found.files, found.bytes_stored, found.seconds_rendered), (1, 10, 10.5));
    assert_eq!((found.days.len(), found.months.len()), (30, 12));
    let period = |name: &str, requested, completed, failed, cancelled| Period {
        name: name.to_owned(),
        requested,
        completed,
        failed,
        cancelled,
        seconds_rendered: 10.5 * completed as f64,
    };
    assert_eq!(found.days[27], period("1969-12-31", 0, 0, 0, 0));
    assert_eq!(found.days[28], period("1970-01-01", 4, 1, 3, 0));
    assert_eq!(found.days[29], period("1970-01-02", 1, 0, 0, 1));
    assert_eq!(found.months[10], period("1969-12", 0, 0, 0, 0));
    assert_eq!(found.months[11], period("1970-01", 5, 1, 3, 1));
}

#[test]
fn analytics_count_users_who_are_there_and_those_who_were_active() {
    let active =
        |days: i64| SessionEvent::Active { user_id: user_id("ada"), at: at(days * 86_400) };
    let views = after(vec![
        user("ada", registered("ada")),
        user("bob", registered("bob")),
        user("eve", registered("eve")),
        user("eve", UserEvent::Deleted {}),
        user("never", UserEvent::Deleted {}),
        user("only", joined("member")),
        session("a", started("ada", 0)),
        session("a", active(20)),
        session("a2", started("ada", 0)),
        session("b", started("bob", 0)),
    ]);
    let found = |day: i64| {
        let found = views.analytics(at(day * 86_400)).unwrap();
        (found.users, found.active)
    };
    assert_eq!(found(20), (2, [1, 1, 2]));
    assert_eq!(found(25), (2, [0, 1, 2]));
    assert_eq!(found(45), (2, [0, 0, 1]));
}
