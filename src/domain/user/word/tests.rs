//! Words of Clerk's that come late, say nothing, or are our own coming back.

use super::*;
use crate::domain::Aggregate;
use crate::domain::user::{
    AccessChange, Assignment, Claims, Command, Onboarding, OnboardingStatus, Placement,
};

/// Tenths of a second.
fn at(tenths: i64) -> DateTime<Utc> {
    DateTime::from_timestamp_millis(tenths * 100).unwrap()
}

fn role(role: &str) -> Told {
    Told { role: Some(role.to_owned()), ..Told::default() }
}

fn says(tenths: i64, told: Told) -> (i64, Command) {
    let snapshot = Snapshot { told, ..Snapshot::default() };
    (tenths, Command::Sync { snapshot, source_updated_at: at(tenths) })
}

fn claims(tenths: i64, told: Told) -> (i64, Command) {
    let snapshot = Snapshot { told, ..Snapshot::default() };
    (tenths, Command::Provision(Claims { snapshot, issued_at: at(tenths), ..Claims::default() }))
}

fn set_role(role: &str) -> Command {
    Command::SetAccess(AccessChange { role: Some(role.to_owned()), ..AccessChange::default() })
}

fn onboard(step: u32, status: OnboardingStatus) -> (Onboarding, Command) {
    let onboarding = Onboarding { step, total_steps: 8, status };
    (onboarding.clone(), Command::Onboard(onboarding))
}

/// The user after the commands, each at its time.
fn after(steps: &[(i64, Command)]) -> User {
    let mut user = User::default();
    for (tenths, command) in steps {
        for event in user.decide(command, at(*tenths)).unwrap() {
            user.evolve(&event);
        }
    }
    user
}

#[test]
fn what_a_token_claimed_stands_until_clerk_says_otherwise_or_nothing_later() {
    let everything = || Told {
        role: Some("creator".to_owned()),
        permissions: Some(["videos:delete".to_owned()].into()),
        subscription_tier: Some("premium".to_owned()),
        user_type: Some("seller".to_owned()),
        feature_flags: Some([("beta".to_owned(), true)].into()),
        onboarding: None,
    };
    let nothing = || Told {
        permissions: Some(BTreeSet::new()),
        feature_flags: Some(BTreeMap::new()),
        ..Told::default()
    };
    let silent = |tenths| [says(tenths, Told::default()), says(tenths, nothing())];
    for words in [[&silent(90)[..1]].concat(), [&silent(90)[1..], &silent(99)[..1]].concat()] {
        let user = after(&[&[claims(100, everything())], &words[..]].concat());
        let access = &user.access;
        assert_eq!((&*access.role, &*access.subscription_tier), ("creator", "premium"));
        assert_eq!((access.permissions.len(), user.feature_flags.len()), (1, 1));
        assert_eq!(user.user_type.as_deref(), Some("seller"));
        // A newer one, also of the same second, may have heard that it was taken away.
        for tenths in [100, 105, 200] {
            let user = after(
                &[&[claims(100, everything())], &words[..], &[says(tenths, Told::default())]]
                    .concat(),
            );
            assert_eq!(user.access, Access::default());
            assert_eq!((user.user_type, user.feature_flags.len()), (None, 0));
        }
    }
    // What Clerk names counts, however old: it is the first that is known to be its own.
    let user = after(&[claims(100, everything()), says(90, role("editor"))]);
    assert_eq!((&*user.access.role, &*user.access.subscription_tier), ("editor", "premium"));
}

#[test]
fn an_older_silence_and_a_newer_one_end_the_same_in_any_order() {
    let (first, older, newer) =
        (claims(100, role("admin")), says(90, Told::default()), says(200, Told::default()));
    let straight = after(&[first.clone(), older.clone(), newer.clone()]);
    assert_eq!(straight, after(&[first, newer, older]));
    assert_eq!(straight.access.role, "user");
}

#[test]
fn what_was_decided_over_a_claim_stands_when_clerk_names_neither() {
    let life = [claims(100, role("admin")), says(90, Told::default())];
    let decided = [(150, set_role("editor")), says(200, Told::default())];
    assert_eq!(after(&[life, decided].concat()).access.role, "editor");
}

#[test]
fn an_older_event_of_a_token_gives_way_to_the_first_silence_as_it_did() {
    let mut user = User::default();
    for mut event in user.decide(&claims(100, role("admin")).1, at(100)).unwrap() {
        if let Event::Registered { claimed_at, .. } = &mut event {
            assert_eq!(claimed_at.take(), Some(at(100)));
        }
        user.evolve(&event);
    }
    for event in user.decide(&says(90, Told::default()).1, at(110)).unwrap() {
        user.evolve(&event);
    }
    assert_eq!(user.access.role, "user");
}

#[test]
fn the_echo_of_an_earlier_decision_undoes_no_later_one() {
    let known = says(10, role("user"));
    let (first, second) = ((100, set_role("editor")), (102, set_role("creator")));
    let then = |later: &[(i64, Command)]| {
        let life = [known.clone(), first.clone(), second.clone()];
        after(&[&life[..], later].concat()).access.role
    };
    let (echo, own) = (says(103, role("editor")), says(110, role("creator")));
    assert_eq!(then(std::slice::from_ref(&echo)), "creator");
    assert_eq!(then(&[echo.clone(), own.clone()]), "creator");
    // What is no echo of ours is a word as ever.
    assert_eq!(then(&[says(103, role("admin"))]), "admin");
    assert_eq!(then(&[echo.clone(), says(104, role("admin"))]), "admin");
    assert_eq!(then(&[says(103, role("admin")), says(104, role("editor"))]), "editor");
    // Each comes back once; what says it again, or much later, is Clerk's own word.
    assert_eq!(then(&[echo, own.clone(), says(120, role("editor"))]), "editor");
    assert_eq!(then(&[own, says(120, role("editor"))]), "editor");
    // Each of several may come back.
    let third = (103, set_role("moderator"));
    assert_eq!(then(&[third, says(104, role("editor"))]), "moderator");
    // It is no echo of what was decided before Clerk said something else in between.
    let between =
        [says(105, role("admin")), (106, set_role("moderator")), says(108, role("creator"))];
    assert_eq!(then(&between), "creator");
    let much_later = 102 + ECHO.num_seconds() * 10 + 1;
    assert_eq!(then(&[says(much_later, role("editor"))]), "editor");
}

#[test]
fn the_echo_of_a_step_undoes_no_completion() {
    use OnboardingStatus::{Completed, InProgress};
    let (seventh, step) = onboard(7, InProgress);
    let (completed, done) = onboard(8, Completed);
    let word = |tenths, onboarding: &Onboarding| {
        says(tenths, Told { onboarding: Some(onboarding.clone()), ..Told::default() })
    };
    let (begun, _) = onboard(1, InProgress);
    let life = [word(10, &begun), (100, step.clone()), (102, done), word(103, &seventh)];
    assert_eq!(after(&life).onboarding, Some(completed.clone()));
    let life = [&life[..], &[word(105, &completed), word(200, &begun)]].concat();
    assert_eq!(after(&life).onboarding, Some(begun.clone()));
    let between = [&life[..4], &[word(104, &begun), word(105, &seventh)]].concat();
    assert_eq!(after(&between).onboarding, Some(seventh.clone()));
    // The same of flags and of the user type.
    let flags = |name: &str| BTreeMap::from([(name.to_owned(), true)]);
    let told = |name: &str| Told { feature_flags: Some(flags(name)), ..Told::default() };
    let life = [
        says(10, told("old")),
        (100, Command::SetFlags(flags("a"))),
        (101, Command::SetFlags(flags("b"))),
        says(103, told("a")),
    ];
    assert_eq!(after(&life).feature_flags, flags("b"));
}

#[test]
fn flags_and_user_type_that_were_so_already_are_decided_once() {
    let flags = BTreeMap::from([("beta".to_owned(), true)]);
    let told = |name: &str, on: bool| Told {
        user_type: Some(name.to_owned()),
        feature_flags: Some([("beta".to_owned(), on)].into()),
        ..Told::default()
    };
    let place = Command::Place(Placement {
        user_type: Some("seller".to_owned()),
        organization: Assignment::AsItIs,
    });
    let known = says(10, told("seller", true));
    for decided in [Command::SetFlags(flags.clone()), place.clone()] {
        let user = after(std::slice::from_ref(&known));
        assert_eq!(user.decide(&decided, at(100)).unwrap().len(), 1);
        let user = after(&[known.clone(), (100, decided.clone())]);
        assert_eq!(user.decide(&decided, at(101)).unwrap(), []);
        // After Clerk said otherwise and again the same, it is Clerk's.
        let life = [
            known.clone(),
            (100, decided.clone()),
            says(110, told("other", false)),
            says(120, told("seller", true)),
        ];
        assert_eq!(after(&life).decide(&decided, at(130)).unwrap().len(), 1);
    }
    let life = [known, (100, Command::SetFlags(flags.clone())), (100, place)];
    let user = after(&[&life[..], &[says(50, told("other", false))]].concat());
    assert_eq!((user.user_type.as_deref(), user.feature_flags), (Some("seller"), flags));
}
