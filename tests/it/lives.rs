//! Clerk delivers at least once and in any order: whatever the order, a user's life ends in the
//! same state. From the bodies of deliveries through the aggregates to the read model.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use proptest::prelude::*;
use serde_json::{Value, json};
use t2m::clerk::payload::Envelope;
use t2m::clerk::translate::{self, Command};
use t2m::domain::Aggregate;
use t2m::domain::ids::{SessionId, UserId};
use t2m::domain::session::{self, Session};
use t2m::domain::user::{self, Snapshot, Told, User};
use t2m::views::{Entity, Happened, Views};

/// When all of it is heard of; each delivery tells its own time.
const HEARD_AT: i64 = 1_767_300_000;

/// What happens to one user, told by the user's number so that many lives fit one read model.
type Life = fn(usize) -> Vec<String>;

fn user_id(number: usize) -> String {
    format!("user_{number}")
}

fn session_id(number: usize) -> String {
    format!("sess_{number}")
}

/// The body of a delivery made `second` seconds into the life.
fn body(kind: &str, second: i64, mut data: Value) -> String {
    let at = (1_767_225_600 + second) * 1000;
    data["created_at"] = json!(1_767_225_600_000_i64);
    data["updated_at"] = json!(at);
    // The envelope's own time is seconds in Clerk's specification.
    json!({ "type": kind, "object": "event", "timestamp": at / 1000 + 1, "data": data }).to_string()
}

fn user(kind: &str, second: i64, number: usize, metadata: Value) -> String {
    let data = json!({
        "id": user_id(number), "first_name": format!("Name {second}"), "last_name": null,
        "primary_email_address_id": "idn_2",
        "email_addresses": [
            { "id": "idn_1", "email_address": "first@example.com" },
            { "id": "idn_2", "email_address": format!("primary{second}@example.com") },
        ],
        "public_metadata": metadata, "banned": false, "future_field": [{}],
    });
    body(kind, second, data)
}

fn membership(kind: &str, second: i64, number: usize, name: &str, role: &str) -> String {
    let data = json!({
        "id": "orgmem_1", "role": role, "permissions": ["org:video:render"],
        "organization": { "id": "org_1", "name": name, "slug": name.to_lowercase() },
        "public_user_data": { "user_id": user_id(number) },
    });
    body(kind, second, data)
}

fn session(kind: &str, second: i64, number: usize) -> String {
    let data = json!({
        "id": session_id(number), "user_id": user_id(number), "user": null, "status": "active",
        "expire_at": 1_767_830_400_000_i64, "abandon_at": 1_769_817_600_000_i64,
    });
    body(kind, second, data)
}

fn until_deletion(number: usize) -> Vec<String> {
    vec![
        user("user.created", 0, number, json!({ "role": "admin" })),
        user("user.updated", 10, number, json!({ "role": "creator" })),
        membership("organizationMembership.created", 20, number, "Acme", "org:member"),
        session("session.created", 30, number),
        session("session.ended", 40, number),
        json!({
            "type": "user.deleted", "timestamp": 1_767_225_650_000_i64,
            "data": { "id": user_id(number), "object": "user", "deleted": true },
        })
        .to_string(),
    ]
}

fn in_the_middle(number: usize) -> Vec<String> {
    let rights = json!({
        "role": "admin", "permissions": ["videos:delete"], "subscription_tier": "premium",
        "user_type": "seller", "feature_flags": { "beta": true },
    });
    vec![
        user("user.created", 0, number, json!({})),
        user("user.updated", 10, number, rights),
        // All rights are taken away again, by their keys.
        user("user.updated", 20, number, json!({ "unknown": 7 })),
        membership("organizationMembership.created", 30, number, "Acme", "org:member"),
        membership("organizationMembership.updated", 40, number, "Acme Films", "org:admin"),
        session("session.created", 50, number),
    ]
}

/// The aggregates, and all that happened to them.
#[derive(Default)]
struct World {
    users: BTreeMap<UserId, User>,
    sessions: BTreeMap<SessionId, Session>,
    happened: Vec<Happened>,
}

impl World {
    fn deliver(&mut self, body: &str) {
        let envelope = Envelope::read(body.as_bytes()).unwrap();
        let made_at = envelope.timestamp.unwrap();
        match translate::command(envelope.into_delivery().unwrap(), made_at).unwrap().unwrap() {
            Command::User(id, command) => self.tell_user(id, &command),
            Command::Session(id, command) => {
                let session = self.sessions.entry(id.clone()).or_default();
                let events = match session.decide(&command, heard_at()) {
                    // As the front end takes it: the start came after the end.
                    Err(session::Refusal::Ended(_)) => vec![],
                    decided => decided.unwrap(),
                };
                for event in events {
                    session.evolve(&event);
                    self.happened
                        .push(happened(&self.happened, Entity::Session(id.clone(), event)));
                }
            }
        }
    }

    fn tell_user(&mut self, id: UserId, command: &user::Command) {
        let user = self.users.entry(id.clone()).or_default();
        let events = match user.decide(command, heard_at()) {
            Err(user::Refusal::Deleted) => vec![],
            decided => decided.unwrap(),
        };
        for event in events {
            user.evolve(&event);
            self.happened.push(happened(&self.happened, Entity::User(id.clone(), event)));
        }
    }

    /// All that is known of one user in the end, without its number.
    fn end(&self, views: &Views, number: usize) -> String {
        let user_id = UserId::try_from(user_id(number)).unwrap();
        let session_id = SessionId::try_from(session_id(number)).unwrap();
        let row = json!(views.user(&user_id).unwrap());
        let sessions = views.sessions_of(&user_id, None, 50).unwrap().items;
        let seen = (views.session_standing(&session_id), sessions);
        let state = (&self.users[&user_id], &self.sessions[&session_id]);
        format!("{row}\n{seen:?}\n{state:?}")
            .replace(user_id.as_str(), "USER")
            .replace(session_id.as_str(), "SESSION")
    }
}

fn heard_at() -> DateTime<Utc> {
    DateTime::from_timestamp(HEARD_AT, 0).unwrap()
}

fn happened(before: &[Happened], entity: Entity) -> Happened {
    Happened { position: before.len() as u64 + 1, hash: [0; 32], time: heard_at(), entity }
}

/// The end of a life for each of these orders of its deliveries.
fn ends(life: Life, orders: &[Vec<usize>]) -> Vec<String> {
    let (directory, mut world) = (tempfile::tempdir().unwrap(), World::default());
    for (number, order) in orders.iter().enumerate() {
        let deliveries = life(number);
        order.iter().for_each(|index| world.deliver(&deliveries[*index]));
    }
    let views = Views::open(&directory.path().join("views.sqlite")).unwrap();
    views.apply(&world.happened).unwrap();
    (0..orders.len()).map(|number| world.end(&views, number)).collect()
}

fn permutations(of: &[usize]) -> Vec<Vec<usize>> {
    if of.is_empty() {
        return vec![vec![]];
    }
    let with = |first: &usize| {
        let rest: Vec<usize> = of.iter().copied().filter(|it| it != first).collect();
        let first = *first;
        permutations(&rest).into_iter().map(move |rest| [vec![first], rest].concat())
    };
    of.iter().flat_map(with).collect()
}

#[test]
fn every_order_of_a_lifes_deliveries_ends_the_same() {
    let orders = permutations(&[0, 1, 2, 3, 4, 5]);
    assert_eq!(orders.len(), 720);
    for life in [until_deletion as Life, in_the_middle] {
        let ends = ends(life, &orders);
        for (order, end) in orders.iter().zip(&ends) {
            assert_eq!(end, &ends[0], "{order:?}");
        }
    }
}

#[test]
fn the_end_of_a_life_is_what_was_told_last() {
    let straight = vec![vec![0, 1, 2, 3, 4, 5]];
    let gone = &ends(until_deletion, &straight)[0];
    assert!(gone.contains(r#""deleted":true"#) && gone.contains("Ended(SignedOut)"), "{gone}");
    assert!(!gone.contains("example.com") && !gone.contains("Acme"), "{gone}");
    let there = &ends(in_the_middle, &straight)[0];
    for told in [
        r#""email":"primary20@example.com""#,
        r#""role":"user""#,
        r#""permissions":[]"#,
        r#""subscription_tier":"standard""#,
        r#""user_type":null"#,
        r#""feature_flags":{}"#,
        r#""name":"Acme Films""#,
        r#""role":"org:admin""#,
        "Live",
    ] {
        assert!(there.contains(told), "no {told} in {there}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Any of them again, anywhere.
    #[test]
    fn every_repetition_ends_the_same(
        order in Just((0..6_usize).collect::<Vec<_>>()).prop_shuffle(),
        again in prop::collection::vec((0..6_usize, any::<prop::sample::Index>()), 1..8),
        deleted in any::<bool>(),
    ) {
        let mut repeated = order;
        for (delivery, place) in again {
            repeated.insert(place.index(repeated.len() + 1), delivery);
        }
        let life = if deleted { until_deletion as Life } else { in_the_middle };
        let ends = ends(life, &[(0..6).collect(), repeated]);
        prop_assert_eq!(&ends[0], &ends[1]);
    }

    /// A request with a token may come before, between or after them, and knows rights of its own.
    #[test]
    fn a_first_request_anywhere_ends_the_same(
        order in Just((0..6_usize).collect::<Vec<_>>()).prop_shuffle(),
        request_at in 0..7_usize,
        role in prop::option::of("admin|creator|user"),
        deleted in any::<bool>(),
    ) {
        let life = if deleted { until_deletion as Life } else { in_the_middle };
        let (mut world, deliveries) = (World::default(), life(0));
        for at in 0..7 {
            if at == request_at {
                let claims = Snapshot {
                    told: Told {
                        role: role.clone(),
                        permissions: Some(Default::default()),
                        feature_flags: Some(Default::default()),
                        ..Told::default()
                    },
                    ..Snapshot::default()
                };
                let id = UserId::try_from(user_id(0)).unwrap();
                world.tell_user(id, &user::Command::Provision(claims.into()));
            }
            if let Some(index) = order.get(at) {
                world.deliver(&deliveries[*index]);
            }
        }
        let directory = tempfile::tempdir().unwrap();
        let views = Views::open(&directory.path().join("views.sqlite")).unwrap();
        views.apply(&world.happened).unwrap();
        prop_assert_eq!(&world.end(&views, 0), &ends(life, &[(0..6).collect()])[0]);
    }
}
