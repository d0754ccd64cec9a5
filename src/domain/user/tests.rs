//! Decisions about a user, and that any order of deliveries ends the same.

use super::*;
use proptest::prelude::*;
use uuid::Uuid;

fn at(second: i64) -> DateTime<Utc> {
    DateTime::from_timestamp(second, 0).unwrap()
}

fn snapshot(email: &str, role: &str) -> Snapshot {
    Snapshot {
        profile: Profile { email: Some(Personal::Known(email.to_owned())), ..Profile::default() },
        told: Told { role: Some(role.to_owned()), ..Told::default() },
        ..Snapshot::default()
    }
}

fn sync(second: i64, email: &str, role: &str) -> Command {
    Command::Sync { snapshot: snapshot(email, role), source_updated_at: at(second) }
}

fn join(second: i64, role: &str) -> Command {
    let membership = Membership {
        membership_id: "m1".to_owned(),
        organization_id: "o1".to_owned(),
        name: None,
        slug: None,
        role: role.to_owned(),
        permissions: BTreeSet::new(),
    };
    Command::Join { membership, source_updated_at: at(second) }
}

fn leave() -> Command {
    Command::Leave { membership_id: "m1".to_owned(), organization_id: "o1".to_owned() }
}

fn run(commands: &[Command]) -> (User, Vec<Result<usize, Refusal>>) {
    let mut user = User::default();
    let answers = commands
        .iter()
        .map(|command| {
            user.decide(command, at(0)).map(|events| {
                for event in &events {
                    user.evolve(event);
                }
                events.len()
            })
        })
        .collect();
    (user, answers)
}

#[test]
fn a_webhook_completes_what_a_token_provisioned() {
    let provision = Command::Provision(snapshot("claims@example.com", "user").into());
    let (user, _) = run(&[provision.clone(), sync(5, "ada@example.com", "admin"), provision]);
    assert_eq!(user.standing, Standing::Registered);
    assert_eq!(user.profile.email, Some(Personal::Known("ada@example.com".to_owned())));
    assert_eq!(user.access.role, "admin");
}

#[test]
fn what_a_token_claims_of_an_organization_gives_way_to_clerk_in_any_order() {
    let claims = || Claims {
        snapshot: snapshot("claims@x", "user"),
        memberships: vec![Membership {
            membership_id: Membership::claimed("o1"),
            organization_id: "o1".to_owned(),
            name: None,
            slug: None,
            role: "org:admin".to_owned(),
            permissions: BTreeSet::new(),
        }],
        issued_at: at(9),
        ..Claims::default()
    };
    let provision = || Command::Provision(claims());
    for (life, roles) in [
        (vec![provision()], vec!["org:admin"]),
        (vec![provision(), sync(5, "ada@x", "user")], vec!["org:admin"]),
        (vec![provision(), join(5, "org:member")], vec!["org:member"]),
        (vec![join(5, "org:member"), provision()], vec!["org:member"]),
        (vec![sync(5, "ada@x", "user"), provision()], vec![]),
        (vec![provision(), leave()], vec![]),
        (vec![leave(), provision()], vec![]),
        (vec![provision(), leave(), join(5, "org:member")], vec![]),
        (vec![provision(), join(5, "org:member"), leave()], vec![]),
    ] {
        let (user, _) = run(&life);
        let present = user.memberships.values().filter_map(|state| match state {
            MembershipState::Member { membership, .. } => Some(membership.role.as_str()),
            MembershipState::Left => None,
        });
        assert_eq!(present.collect::<Vec<_>>(), roles, "{life:?}");
    }
}

#[test]
fn a_stale_or_repeated_delivery_changes_nothing() {
    let (user, answers) =
        run(&[sync(5, "new@x", "user"), sync(5, "new@x", "user"), sync(4, "old@x", "admin")]);
    assert_eq!(answers[1..], [Ok(0), Ok(0)]);
    assert_eq!(user.access.role, "user");
}

#[test]
fn a_right_that_clerk_no_longer_names_is_taken_away() {
    let provision = Command::Provision(snapshot("a@x", "admin").into());
    let silent = |second| Command::Sync {
        snapshot: Snapshot { told: Told::default(), ..snapshot("a@x", "") },
        source_updated_at: at(second),
    };
    for life in [
        vec![sync(1, "a@x", "admin"), silent(2)],
        vec![silent(2), sync(1, "a@x", "admin")],
        vec![provision, silent(2)],
    ] {
        assert_eq!(run(&life).0.access.role, "user", "{life:?}");
    }
}

fn set_role(role: &str) -> Command {
    Command::SetAccess(AccessChange { role: Some(role.to_owned()), ..AccessChange::default() })
}

#[test]
fn a_decision_that_changes_nothing_stands_against_an_older_word_of_clerk() {
    let told = |second, role| (second, sync(second, "a@x", role));
    let late = |second| (60, sync(second, "a@x", "admin"));
    let decided = (50, set_role("user"));
    assert_eq!(after(&[told(1, "user"), decided.clone(), late(30)]).access.role, "user");
    assert_eq!(after(&[told(1, "user"), decided, late(55)]).access.role, "admin");
}

#[test]
fn what_an_administrator_does_not_name_stays_as_another_one_left_it() {
    let tier = AccessChange {
        subscription_tier: Some("premium".to_owned()),
        permissions: Some(BTreeSet::from(["videos:write".to_owned()])),
        ..AccessChange::default()
    };
    let life = [sync(1, "a@x", "admin"), set_role("user"), Command::SetAccess(tier)];
    let access = run(&life).0.access;
    assert_eq!((&*access.role, &*access.subscription_tier), ("user", "premium"));
    let access = run(&[&life[..], &[set_role("editor")]].concat()).0.access;
    assert_eq!(access.permissions.first().map(String::as_str), Some("videos:write"));
    assert_eq!((&*access.role, &*access.subscription_tier), ("editor", "premium"));
}

#[test]
fn an_administrators_decision_stands_until_clerk_says_something_new() {
    let decided = set_role("editor");
    let life = [sync(1, "a@x", "user"), decided, sync(2, "b@x", "user")];
    assert_eq!(run(&life).0.access.role, "editor");
    let life = [&life[..], &[sync(3, "b@x", "admin")]].concat();
    assert_eq!(run(&life).0.access.role, "admin");
}

#[test]
fn a_renamed_organization_is_known_by_its_new_name_whatever_came_first() {
    let named = |second, name: &str| match join(second, "org:member") {
        Command::Join { membership, source_updated_at } => Command::Join {
            membership: Membership { name: Some(name.to_owned()), ..membership },
            source_updated_at,
        },
        other => other,
    };
    let straight = run(&[named(1, "Acme"), named(2, "Acme Films")]).0;
    let reversed = run(&[named(2, "Acme Films"), named(1, "Acme")]).0;
    assert_eq!(straight, reversed);
    let MembershipState::Member { membership, .. } = &straight.memberships["m1"] else {
        panic!("a member: {straight:?}");
    };
    assert_eq!(membership.name.as_deref(), Some("Acme Films"));
}

/// The user after the commands at their seconds.
fn after(steps: &[(i64, Command)]) -> User {
    let mut user = User::default();
    for (second, command) in steps {
        for event in user.decide(command, at(*second)).unwrap() {
            user.evolve(&event);
        }
    }
    user
}

/// Something that Clerk's metadata and administrators both have a say in.
struct Right {
    told: fn(String) -> Told,
    decided: fn(String) -> Command,
    held: fn(&User) -> Option<&String>,
}

const RIGHTS: [Right; 5] = [
    Right {
        told: |role| Told { role: Some(role), ..Told::default() },
        decided: |role| set_role(&role),
        held: |user| Some(&user.access.role),
    },
    Right {
        told: |one| Told { permissions: Some(BTreeSet::from([one])), ..Told::default() },
        decided: |one| {
            let permissions = Some(BTreeSet::from([one]));
            Command::SetAccess(AccessChange { permissions, ..AccessChange::default() })
        },
        held: |user| user.access.permissions.first(),
    },
    Right {
        told: |tier| Told { subscription_tier: Some(tier), ..Told::default() },
        decided: |tier| {
            let subscription_tier = Some(tier);
            Command::SetAccess(AccessChange { subscription_tier, ..AccessChange::default() })
        },
        held: |user| Some(&user.access.subscription_tier),
    },
    Right {
        told: |user_type| Told { user_type: Some(user_type), ..Told::default() },
        decided: |user_type| {
            let organization = Assignment::AsItIs;
            Command::Place(Placement { user_type: Some(user_type), organization })
        },
        held: |user| user.user_type.as_ref(),
    },
    Right {
        told: |flag| Told { feature_flags: Some([(flag, true)].into()), ..Told::default() },
        decided: |flag| Command::SetFlags([(flag, true)].into()),
        held: |user| user.feature_flags.keys().next(),
    },
];

#[test]
fn what_is_decided_here_is_undone_only_by_a_newer_word_of_clerk() {
    for right in RIGHTS {
        let says =
            |word: &str| Snapshot { told: (right.told)(word.to_owned()), ..snapshot("", "") };
        let sync =
            |second, word| Command::Sync { snapshot: says(word), source_updated_at: at(second) };
        let check = |steps: &[(i64, Command)], word: &str| {
            let user = after(steps);
            assert_eq!((right.held)(&user).map(String::as_str), Some(word), "{steps:?}");
        };
        let (known, decided) = ((1, sync(1, "first")), (10, (right.decided)("ours".to_owned())));
        let then = |later| [known.clone(), decided.clone(), later];
        check(&then((11, sync(7, "theirs"))), "ours");
        check(&then((11, sync(10, "theirs"))), "ours");
        check(&then((13, sync(12, "first"))), "ours");
        check(&then((13, sync(12, "theirs"))), "theirs");
        // The first word of Clerk's comes after the decision, but is from before it.
        let provision = (1, Command::Provision(says("first").into()));
        check(&[provision.clone(), decided.clone(), (11, sync(7, "first"))], "ours");
        check(&[provision.clone(), decided.clone(), (13, sync(12, "first"))], "ours");
        check(&[provision.clone(), decided.clone(), (13, sync(12, "theirs"))], "theirs");
        // Nor does one that says nothing, be it that the token had a default of its template.
        let silent = |second| Command::Sync {
            snapshot: Snapshot { told: Told::default(), ..snapshot("", "") },
            source_updated_at: at(second),
        };
        check(&[provision, decided.clone(), (13, silent(12))], "ours");
        // The echo of what was decided makes it Clerk's own word, which a later one changes back.
        let echo = (13, sync(12, "ours"));
        check(&[known, decided, echo, (15, sync(14, "first"))], "first");
    }
}

#[test]
fn a_list_that_is_empty_says_no_more_than_an_absent_one() {
    let empty = || Told {
        permissions: Some(BTreeSet::new()),
        feature_flags: Some(BTreeMap::new()),
        ..Told::default()
    };
    let says = |told: Told| Snapshot { told, ..snapshot("", "") };
    let sync = |second, told| Command::Sync { snapshot: says(told), source_updated_at: at(second) };
    let permissions = Some(BTreeSet::from(["videos:delete".to_owned()]));
    let decided = [
        (10, Command::SetAccess(AccessChange { permissions, ..AccessChange::default() })),
        (10, Command::SetFlags([("beta".to_owned(), true)].into())),
    ];
    for (known, later) in [
        (Command::Provision(says(empty()).into()), Told::default()),
        (sync(1, empty()), Told::default()),
        (sync(1, Told::default()), empty()),
    ] {
        let user = after(&[&[(1, known)], &decided[..], &[(13, sync(12, later))]].concat());
        assert_eq!((user.access.permissions.len(), user.feature_flags.len()), (1, 1));
    }
}

#[test]
fn what_an_administrator_names_is_decided_even_where_it_was_so() {
    let whole = Command::SetAccess(AccessChange {
        role: Some("user".to_owned()),
        permissions: Some(BTreeSet::new()),
        subscription_tier: Some("premium".to_owned()),
    });
    let life = [(1, sync(1, "a@x", "user")), (10, whole), (11, sync(7, "a@x", "admin"))];
    assert_eq!(after(&life).access.role, "user");
    // The same without the names, as it was stored before there were any.
    let mut user = after(&life[..1]);
    let mut events = user.decide(&life[1].1, at(10)).unwrap();
    let Some(Event::AccessChanged { decided, .. }) = events.first_mut() else { panic!() };
    *decided = None;
    user.evolve(&events[0]);
    assert_eq!((user.decided.role.at, user.decided.permissions.at), (None, None));
    assert_eq!(user.decided.subscription_tier.at, Some(at(10)));
}

#[test]
fn clerks_word_on_the_onboarding_is_heard_like_any_other() {
    use OnboardingStatus::{Completed, InProgress};
    let progress = |step, status| Onboarding { step, total_steps: 8, status };
    let here = |step, status| Command::Onboard(progress(step, status));
    let says = |second, onboarding| Command::Sync {
        snapshot: Snapshot { told: Told { onboarding, ..Told::default() }, ..snapshot("", "") },
        source_updated_at: at(second),
    };
    let check = |steps: &[(i64, Command)], step| {
        assert_eq!(after(steps).onboarding.map(|it| it.step), Some(step), "{steps:?}");
    };
    let done = Some(progress(8, Completed));
    let begun = Some(progress(1, InProgress));
    let (known, third) = ((1, says(1, None)), (10, here(3, InProgress)));
    let then = |later: &[(i64, Command)]| [&[known.clone(), third.clone()], later].concat();
    check(&then(&[(13, says(12, done.clone()))]), 8);
    check(&then(&[(13, says(7, done.clone()))]), 3);
    check(&then(&[(13, says(12, begun.clone())), (15, here(4, InProgress))]), 4);
    // What it merely repeats, and what is no longer there, is no word.
    let again = (20, here(2, InProgress));
    check(&then(&[(13, says(12, done.clone())), again.clone(), (22, says(21, done.clone()))]), 2);
    check(&then(&[(13, says(12, done.clone())), (22, says(21, None))]), 8);
    // The first may be as old as can be.
    check(&[known.clone(), (10, here(8, Completed)), (13, says(12, begun.clone()))], 8);
    check(&[known, (13, says(12, done)), (15, says(14, begun))], 1);
}

#[test]
fn a_decision_on_one_right_is_none_on_the_others() {
    let told = |role: &str| Told { role: Some(role.to_owned()), ..Told::default() };
    let sync = |second, role| Command::Sync {
        snapshot: Snapshot { told: told(role), ..Snapshot::default() },
        source_updated_at: at(second),
    };
    for decided in RIGHTS.into_iter().skip(1).map(|right| (right.decided)("ours".to_owned())) {
        let user = after(&[(1, sync(1, "user")), (10, decided), (11, sync(7, "creator"))]);
        assert_eq!(user.access.role, "creator");
    }
}

#[test]
fn of_two_words_of_one_time_the_one_that_bans_holds() {
    let word = |second, banned| Command::Sync {
        snapshot: Snapshot { banned, ..snapshot("a@x", "user") },
        source_updated_at: at(second),
    };
    for (words, banned, last) in [
        ([word(5, false), word(5, true)], true, Ok(1)),
        ([word(5, true), word(5, false)], true, Ok(0)),
        ([word(5, true), word(5, true)], true, Ok(0)),
        ([word(5, false), word(4, true)], false, Ok(0)),
        ([word(5, false), word(6, true)], true, Ok(2)),
        ([word(5, true), word(6, false)], false, Ok(2)),
        ([word(5, true), word(6, true)], true, Ok(1)),
    ] {
        let (user, answers) = run(&words);
        assert_eq!((user.banned, answers[1].clone()), (banned, last), "{words:?}");
    }
}

#[test]
fn a_token_provisions_a_user_once_and_only_one_that_is_unknown() {
    let provision = || Command::Provision(snapshot("claims@x", "admin").into());
    let (user, answers) = run(&[provision(), provision()]);
    assert_eq!(answers, [Ok(2), Ok(0)]);
    assert_eq!((user.standing, user.access.role.as_str()), (Standing::Provisional, "admin"));
    let (user, answers) = run(&[sync(1, "a@x", "user"), provision()]);
    assert_eq!((user.standing, &answers[1]), (Standing::Registered, &Ok(0)));
}

#[test]
fn what_an_administrator_repeats_changes_nothing_except_on_access() {
    let known = sync(1, "a@x", "user");
    for (right, again) in RIGHTS.iter().zip([1, 1, 1, 0, 0]) {
        let decided = (right.decided)("ours".to_owned());
        let (_, answers) = run(&[known.clone(), decided.clone(), decided]);
        assert_eq!(answers[1..], [Ok(1), Ok(again)]);
    }
}

#[test]
fn a_membership_follows_the_newest_word_and_ends_for_ever() {
    let (user, answers) = run(&[
        join(2, "org:member"),
        join(2, "org:admin"),
        join(1, "org:admin"),
        join(3, "org:guest"),
        leave(),
        leave(),
        join(4, "org:member"),
    ]);
    assert_eq!(answers, [Ok(1), Ok(0), Ok(0), Ok(1), Ok(1), Ok(0), Ok(0)]);
    assert_eq!(organizations(&user), []);
    assert_eq!(organizations(&run(&[join(2, "a"), join(1, "b"), join(3, "c")]).0), [("o1", "c")]);
}

#[test]
fn an_organization_that_an_administrator_renames_has_its_new_name() {
    let (user, answers) = run(&[
        sync(1, "a@x", "user"),
        place(1, "o9", "owner", Some("Nine")),
        place(2, "o9", "owner", Some("Nine Films")),
        place(3, "o9", "member", None),
    ]);
    assert_eq!(answers[2..], [Ok(1), Ok(1)]);
    let names: Vec<_> = user.present_memberships().map(|it| it.name.as_deref()).collect();
    assert_eq!(names, [Some("Nine Films")]);
    assert_eq!(organizations(&user), [("o9", "member")]);
}

#[test]
fn onboarding_is_recorded_when_it_changes() {
    let step = |step| {
        let status = OnboardingStatus::InProgress;
        Command::Onboard(Onboarding { step, total_steps: 3, status })
    };
    let (user, answers) = run(&[step(1), sync(1, "a@x", "user"), step(1), step(1), step(2)]);
    assert_eq!(answers[0], Err(Refusal::NotFound));
    assert_eq!(answers[2..], [Ok(1), Ok(0), Ok(1)]);
    assert_eq!(user.onboarding.map(|it| it.step), Some(2));
    for name in OnboardingStatus::NAMES {
        let status = OnboardingStatus::parse(name).unwrap();
        assert_eq!(serde_json::to_value(status).unwrap(), name);
    }
    assert_eq!(OnboardingStatus::parse("done"), None);
}

#[test]
fn what_clerk_does_not_say_of_rights_is_not_stored() {
    let stored = |told| {
        let profile = Box::default();
        let event = Event::Registered { profile, provisional: true, told, claimed_at: None };
        serde_json::to_value(event).unwrap()["data"]["told"].take()
    };
    assert_eq!(stored(Told::default()), serde_json::Value::Null);
    let told = Told { role: Some("admin".to_owned()), ..Told::default() };
    assert_eq!(stored(told), serde_json::json!({ "role": "admin" }));
}

#[test]
fn flags_that_an_administrator_set_survive_a_change_of_the_name() {
    let flags = BTreeMap::from([("beta".to_owned(), true)]);
    let mut user = run(&[sync(1, "a@x", "user")]).0;
    for event in user.decide(&Command::SetFlags(flags.clone()), at(10)).unwrap() {
        user.evolve(&event);
    }
    let told = Told { feature_flags: Some(BTreeMap::new()), ..Told::default() };
    let late = Command::Sync {
        snapshot: Snapshot { told, ..snapshot("b@x", "user") },
        source_updated_at: at(7),
    };
    let events = user.decide(&late, at(11)).unwrap();
    assert!(matches!(events[..], [Event::ProfileChanged { .. }]), "{events:?}");
    assert_eq!(user.feature_flags, flags);
}

#[test]
fn a_deleted_user_stays_deleted() {
    let (user, answers) = run(&[
        Command::Delete,
        sync(9, "late@x", "admin"),
        Command::Provision(snapshot("late@x", "admin").into()),
    ]);
    assert_eq!(user, User { standing: Standing::Deleted, ..User::default() });
    assert_eq!(answers, [Ok(1), Ok(0), Err(Refusal::Deleted)]);
}

#[test]
fn nobody_unknown_is_given_a_role() {
    assert_eq!(run(&[Command::SetAccess(AccessChange::default())]).1, [Err(Refusal::NotFound)]);
}

fn place(id: u128, organization: &str, role: &str, name: Option<&str>) -> Command {
    let membership = Membership {
        membership_id: Membership::administered(Uuid::from_u128(id)),
        organization_id: organization.to_owned(),
        name: name.map(str::to_owned),
        slug: None,
        role: role.to_owned(),
        permissions: BTreeSet::new(),
    };
    let organization = Assignment::Member(membership);
    Command::Place(Placement { user_type: Some("vendor_company".to_owned()), organization })
}

fn nowhere() -> Command {
    Command::Place(Placement { user_type: None, organization: Assignment::Nowhere })
}

fn organizations(user: &User) -> Vec<(&str, &str)> {
    let all = user.present_memberships();
    all.map(|it| (it.organization_id.as_str(), it.role.as_str())).collect()
}

#[test]
fn an_administrator_places_a_user_once_whatever_is_repeated() {
    let owner = place(1, "o9", "owner", Some("Nine"));
    let (user, answers) = run(&[
        sync(1, "a@x", "user"),
        owner.clone(),
        owner.clone(),
        place(2, "o9", "owner", None),
        place(3, "o9", "member", Some("Nine")),
        place(4, "o8", "member", None),
    ]);
    assert_eq!(answers[1..], [Ok(2), Ok(0), Ok(0), Ok(1), Ok(2)]);
    assert_eq!(organizations(&user), [("o8", "member")]);
    assert_eq!(user.user_type.as_deref(), Some("vendor_company"));
}

#[test]
fn a_user_taken_out_can_be_put_in_again() {
    let (user, answers) = run(&[
        sync(1, "a@x", "user"),
        place(1, "o9", "owner", None),
        nowhere(),
        nowhere(),
        place(2, "o9", "owner", None),
    ]);
    assert_eq!(answers[2..], [Ok(1), Ok(0), Ok(1)]);
    assert_eq!(organizations(&user), [("o9", "owner")]);
}

#[test]
fn a_membership_of_clerks_is_adjusted_but_not_ended_by_an_administrator() {
    let (user, answers) = run(&[
        sync(1, "a@x", "user"),
        join(-5, "org:member"),
        place(1, "o1", "org:admin", None),
        join(-4, "org:member"),
        nowhere(),
    ]);
    assert_eq!(answers[2..], [Ok(2), Ok(0), Ok(0)]);
    assert_eq!(organizations(&user), [("o1", "org:admin")]);
    let newer = join(5, "org:guest");
    let mut user = user;
    for event in user.decide(&newer, at(0)).unwrap() {
        user.evolve(&event);
    }
    assert_eq!(organizations(&user), [("o1", "org:guest")]);
}

#[test]
fn nobody_unknown_or_deleted_is_placed() {
    assert_eq!(run(&[nowhere()]).1, [Err(Refusal::NotFound)]);
    assert_eq!(run(&[Command::Delete, nowhere()]).1[1], Err(Refusal::Deleted));
}

proptest! {
    /// Six deliveries of a life, in any order and any of them twice: one end.
    #[test]
    fn every_order_and_repetition_of_deliveries_ends_the_same(
        order in Just((0..6usize).collect::<Vec<_>>()).prop_shuffle(),
        again in proptest::collection::vec(0..6usize, 0..6),
        deleted in any::<bool>(),
    ) {
        let life = [
            sync(1, "a@x", "user"), sync(2, "b@x", "admin"), sync(3, "c@x", "user"),
            join(1, "org:member"), join(2, "org:admin"),
            if deleted { Command::Delete } else { leave() },
        ];
        let straight = run(&life).0;
        let shuffled: Vec<_> =
            order.iter().chain(&again).map(|index| life[*index].clone()).collect();
        prop_assert_eq!(run(&shuffled).0, straight);
    }
}
