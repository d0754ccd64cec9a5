//! Users and their sessions, as the events made them.

use super::*;

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
        let found = views.user_standing(&user_id("ada")).unwrap().decided_here.rights.clone();
        assert_eq!(found.into_iter().collect::<Vec<_>>(), here);
    }
}

#[test]
fn a_first_word_of_clerks_is_not_known_to_take_anything_away_and_later_ones_are() {
    let word = |second| {
        let (profile, told) = (Box::default(), Told::default());
        user("ada", UserEvent::ProfileChanged { profile, source_updated_at: at(second), told })
    };
    let told_at = |words: Vec<Entity>| {
        let access = after([vec![user("ada", registered("a"))], words].concat());
        let access = access.user_standing(&user_id("ada")).unwrap();
        assert_eq!(access.access_changed_at, None);
        access.told_at
    };
    assert_eq!(told_at(vec![]), None);
    assert_eq!(told_at(vec![word(50)]), Some(at(49)));
    assert_eq!(told_at(vec![word(50), word(51)]), Some(at(51)));
}

#[test]
fn who_decides_user_type_and_flags_is_kept() {
    let (type_of, flags) = (
        |decided_at| UserEvent::AttributesChanged { user_type: None, decided_at },
        |decided_at| UserEvent::FlagsChanged { feature_flags: BTreeMap::new(), decided_at },
    );
    let here = Some(at(50));
    for (events, expected) in [
        (vec![type_of(None), flags(None)], (false, false)),
        (vec![type_of(here)], (true, false)),
        (vec![type_of(here), flags(here)], (true, true)),
        (vec![type_of(here), flags(here), type_of(None)], (false, true)),
    ] {
        let views = empty();
        let events = [&[registered("a")], &events[..]].concat();
        for event in log(events.into_iter().map(|event| user("ada", event)).collect()) {
            views.apply(&[event]).unwrap();
        }
        let here = views.user_standing(&user_id("ada")).unwrap().decided_here.clone();
        assert_eq!((here.user_type, here.flags), expected);
        assert_eq!(here.rights, BTreeSet::new());
    }
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
