//! Decisions about a user, and that any order of deliveries ends the same.

use super::*;
use proptest::prelude::*;

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
    let provision = Command::Provision(snapshot("claims@example.com", "user"));
    let (user, _) = run(&[provision.clone(), sync(5, "ada@example.com", "admin"), provision]);
    assert_eq!(user.standing, Standing::Registered);
    assert_eq!(user.profile.email, Some(Personal::Known("ada@example.com".to_owned())));
    assert_eq!(user.access.role, "admin");
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
    let provision = Command::Provision(snapshot("a@x", "admin"));
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

#[test]
fn an_administrators_decision_stands_until_clerk_says_something_new() {
    let decided = Command::SetAccess(Access { role: "editor".to_owned(), ..Access::default() });
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

/// The commands at their seconds; the role at the end.
fn role_after(steps: &[(i64, Command)]) -> String {
    let mut user = User::default();
    for (second, command) in steps {
        for event in user.decide(command, at(*second)).unwrap() {
            user.evolve(&event);
        }
    }
    user.access.role
}

fn decide(role: &str) -> Command {
    Command::SetAccess(Access { role: role.to_owned(), ..Access::default() })
}

#[test]
fn what_is_decided_here_is_undone_only_by_a_newer_word_of_clerk() {
    let check = |steps: &[(i64, Command)], role| assert_eq!(role_after(steps), role, "{steps:?}");
    let (known, decided) = ((1, sync(1, "a@x", "user")), (10, decide("admin")));
    let then = |later| [known.clone(), decided.clone(), later];
    check(&then((11, sync(7, "b@x", "creator"))), "admin");
    check(&then((13, sync(12, "b@x", "user"))), "admin");
    check(&then((13, sync(12, "b@x", "creator"))), "creator");
    // The first word of Clerk's comes after the decision, but is from before it.
    let provision = (1, Command::Provision(snapshot("a@x", "user")));
    check(&[provision.clone(), decided.clone(), (11, sync(7, "b@x", "user"))], "admin");
    check(&[provision.clone(), decided.clone(), (13, sync(12, "b@x", "user"))], "admin");
    check(&[provision, decided.clone(), (13, sync(12, "b@x", "creator"))], "creator");
    // The echo of what was decided makes it Clerk's own word, which a later one changes back.
    let echo = (13, sync(12, "a@x", "admin"));
    check(&[known, decided, echo, (15, sync(14, "a@x", "user"))], "user");
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
        Command::Provision(snapshot("late@x", "admin")),
    ]);
    assert_eq!(user, User { standing: Standing::Deleted, ..User::default() });
    assert_eq!(answers, [Ok(1), Ok(0), Err(Refusal::Deleted)]);
}

#[test]
fn nobody_unknown_is_given_a_role() {
    assert_eq!(run(&[Command::SetAccess(Access::default())]).1, [Err(Refusal::NotFound)]);
}

fn place(id: &str, organization: &str, role: &str, name: Option<&str>) -> Command {
    let membership = Membership {
        membership_id: format!("{ADMINISTERED}{id}"),
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
    let owner = place("1", "o9", "owner", Some("Nine"));
    let (user, answers) = run(&[
        sync(1, "a@x", "user"),
        owner.clone(),
        owner.clone(),
        place("2", "o9", "owner", None),
        place("3", "o9", "member", Some("Nine")),
        place("4", "o8", "member", None),
    ]);
    assert_eq!(answers[1..], [Ok(2), Ok(0), Ok(0), Ok(1), Ok(2)]);
    assert_eq!(organizations(&user), [("o8", "member")]);
    assert_eq!(user.user_type.as_deref(), Some("vendor_company"));
}

#[test]
fn a_user_taken_out_can_be_put_in_again() {
    let (user, answers) = run(&[
        sync(1, "a@x", "user"),
        place("1", "o9", "owner", None),
        nowhere(),
        nowhere(),
        place("2", "o9", "owner", None),
    ]);
    assert_eq!(answers[2..], [Ok(1), Ok(0), Ok(1)]);
    assert_eq!(organizations(&user), [("o9", "owner")]);
}

#[test]
fn a_membership_of_clerks_is_adjusted_but_not_ended_by_an_administrator() {
    let (user, answers) = run(&[
        sync(1, "a@x", "user"),
        join(-5, "org:member"),
        place("1", "o1", "org:admin", None),
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
