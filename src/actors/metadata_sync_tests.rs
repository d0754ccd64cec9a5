//! What is asked of Clerk after which events, with a stand-in of it and a log in memory.

use std::sync::Mutex;

use async_trait::async_trait;
use serde_json::{Map, Value, json};
use tempfile::TempDir;
use uuid::Uuid;

use super::*;
use crate::actors::keyring::Keyring;
use crate::actors::projector::Projector;
use crate::clerk::api::{Answer, Request, Transport};
use crate::config::BlobStore;
use crate::domain::user::{
    Access, AccessChange, Claims, Membership, Onboarding, OnboardingStatus, Told,
};
use crate::log::{Appended, Expected, NewEvent, Stats, Verified};
use crate::media::blobs::Blobs;
use crate::media::vault::MasterKey;
use crate::views::{Parked, Views};

fn told() -> Told {
    Told {
        role: Some("creator".to_owned()),
        user_type: Some("seller".to_owned()),
        feature_flags: Some([("beta".to_owned(), true)].into()),
        ..Told::default()
    }
}

/// The same as Clerk has it.
fn heard() -> Value {
    json!({ "role": "creator", "userType": "seller", "featureFlags": { "beta": true } })
}

fn at(second: i64) -> DateTime<Utc> {
    DateTime::from_timestamp(1_800_000_000 + second, 0).unwrap()
}

fn says(second: i64, told: Told) -> (i64, Command) {
    let snapshot = Snapshot { told, ..Snapshot::default() };
    (second, Command::Sync { snapshot, source_updated_at: at(second) })
}

fn set_role(role: &str) -> Command {
    Command::SetAccess(AccessChange { role: Some(role.to_owned()), ..AccessChange::default() })
}

fn set_flag(name: &str) -> Command {
    Command::SetFlags([(name.to_owned(), true)].into())
}

fn id(name: &str) -> UserId {
    UserId::try_from(name).unwrap()
}

/// A log that others write to.
struct Memory {
    events: Mutex<Vec<Recorded>>,
    head: watch::Sender<u64>,
}

impl Memory {
    fn new() -> Arc<Self> {
        Arc::new(Self { events: Mutex::default(), head: watch::Sender::new(0) })
    }

    fn of_stream(&self, stream: &str) -> Vec<Recorded> {
        let events = self.events.lock().unwrap();
        events.iter().filter(|event| *event.stream == *stream).cloned().collect()
    }

    /// What a user's command brings about at its second; where the log ends then.
    fn execute(&self, name: &str, (second, command): (i64, Command)) -> u64 {
        let stream = domain::stream::<User>(name);
        let before = self.of_stream(&stream);
        let decode = |it: &Recorded| codec::decode::<User>(&it.kind, &it.data).unwrap();
        let user = User::fold(&before.iter().map(decode).collect::<Vec<_>>());
        let is_clerks = matches!(command, Command::Sync { .. });
        let source = if is_clerks { Source::Clerk } else { Source::Api };
        let decided = user.decide(&command, at(second)).unwrap();
        let mut events = self.events.lock().unwrap();
        for (revision, event) in (before.len() as u64..).zip(&decided) {
            let (kind, data) = codec::encode::<User>(event).unwrap();
            let position = events.len() as u64 + 1;
            events.push(Recorded {
                id: Uuid::from_u128(position.into()),
                stream: stream.clone().into(),
                revision,
                position,
                kind: kind.into(),
                time: at(second),
                data: data.into(),
                metadata: Metadata::by("test", source).to_bytes().into(),
                hash: [0; 32],
            });
        }
        let head = events.len() as u64;
        self.head.send_replace(head);
        head
    }
}

#[async_trait]
impl EventLog for Memory {
    async fn append(&self, _: &str, _: Expected, _: Vec<NewEvent>) -> Result<Appended, log::Error> {
        unreachable!("it is only read")
    }

    async fn read_stream(
        &self,
        stream: &str,
        from: u64,
        limit: usize,
    ) -> Result<Vec<Recorded>, log::Error> {
        let events = self.of_stream(stream).into_iter();
        Ok(events.filter(|event| event.revision >= from).take(limit).collect())
    }

    async fn read_all(&self, after: u64, limit: usize) -> Result<Vec<Recorded>, log::Error> {
        let events = self.events.lock().unwrap();
        Ok(events.iter().filter(|event| event.position > after).take(limit).cloned().collect())
    }

    fn head(&self) -> watch::Receiver<u64> {
        self.head.subscribe()
    }

    fn writable(&self) -> Result<(), log::Error> {
        Ok(())
    }

    async fn stats(&self) -> Result<Stats, log::Error> {
        unreachable!("nobody counts")
    }

    async fn verify(&self) -> Result<Verified, log::Error> {
        unreachable!("nobody verifies")
    }
}

/// Clerk, with what was asked of it.
#[derive(Clone, Default)]
struct Clerk(Arc<Mutex<Instance>>);

#[derive(Default)]
struct Instance {
    users: BTreeMap<String, Value>,
    /// With what it answers all requests about some.
    failing: BTreeMap<String, u16>,
    shown: usize,
    patched: Vec<(String, Value)>,
    /// Done while it shows a user for the first time.
    meanwhile: Option<Box<dyn FnOnce() + Send>>,
}

#[async_trait]
impl Transport for Clerk {
    async fn send(&self, request: Request) -> Result<Answer, String> {
        let mut clerk = self.0.lock().unwrap();
        let name = request.url.path().split('/').nth(3).unwrap_or_default().to_owned();
        let answer = |status, body: &Value| Answer {
            status,
            retry_after: None,
            body: body.to_string().into_bytes(),
        };
        if let Some(status) = clerk.failing.get(&name) {
            return Ok(answer(*status, &Value::Null));
        }
        let Some(body) = request.body else {
            clerk.shown += 1;
            if let Some(meanwhile) = clerk.meanwhile.take() {
                meanwhile();
            }
            return Ok(answer(200, &clerk.users[&name]));
        };
        let patch = body["public_metadata"].clone();
        let user = clerk.users.get_mut(&name).unwrap();
        for (key, value) in patch.as_object().unwrap() {
            user["public_metadata"][key] = value.clone();
        }
        clerk.patched.push((name, patch));
        Ok(answer(200, &Value::Null))
    }
}

impl Clerk {
    fn has(&self, name: &str, public_metadata: Value, updated_at: Option<DateTime<Utc>>) {
        let updated_at = updated_at.map(|at| at.timestamp_millis());
        let user = json!({
            "id": name, "public_metadata": public_metadata, "updated_at": updated_at,
        });
        self.0.lock().unwrap().users.insert(name.to_owned(), user);
    }

    fn api(&self) -> Arc<Api> {
        let base = "https://api.clerk.test/".parse().unwrap();
        Arc::new(Api::over(Box::new(self.clone()), base, Arc::new(|| 0), || 0.5))
    }

    fn was_told_of(&self, name: &str) -> bool {
        self.0.lock().unwrap().patched.iter().any(|(patched, _)| patched == name)
    }

    fn patches(&self) -> Vec<Value> {
        self.0.lock().unwrap().patched.iter().map(|(_, patch)| patch.clone()).collect()
    }
}

/// What carries the events of a log to a Clerk, with the folder of its checkpoint.
fn sync(log: &Arc<Memory>, clerk: &Clerk) -> (MetadataSync, TempDir) {
    let dir = TempDir::new().unwrap();
    let log: Arc<dyn EventLog> = log.clone();
    (MetadataSync::open(log, clerk.api(), dir.path().join("position")), dir)
}

/// Looks until nothing is under way any more.
async fn settle(sync: &mut MetadataSync, until: u64) {
    sync.look(until).await.unwrap();
    while let Some(sent) = sync.sending.next().await {
        sync.note(sent);
        sync.look(until).await.unwrap();
    }
}

/// What is sent of these decisions where Clerk, last heard in second 1, has this now.
async fn sent_of(decisions: &[(i64, Command)], there: Value, updated_at: Option<i64>) -> Value {
    let (log, clerk) = (Memory::new(), Clerk::default());
    let mut head = log.execute("ada", says(1, told()));
    for decision in decisions {
        head = log.execute("ada", decision.clone());
    }
    clerk.has("ada", there, updated_at.map(at));
    let (mut sync, _dir) = sync(&log, &clerk);
    settle(&mut sync, head).await;
    assert_eq!((sync.pending.len(), sync.checkpoint()), (0, head));
    let all: Map<String, Value> =
        clerk.patches().iter().flat_map(|patch| patch.as_object().unwrap().clone()).collect();
    all.into()
}

#[tokio::test]
async fn a_later_word_of_clerks_that_is_not_heard_yet_stands_and_an_older_one_does_not() {
    let admin = [(10, set_role("admin"))];
    let pushed = json!({ "role": "admin" });
    let demoted = json!({ "role": "user", "userType": "seller", "featureFlags": { "beta": true } });
    let taken_away = json!({ "userType": "seller", "featureFlags": { "beta": true } });
    for (there, updated_at, sent) in [
        (&demoted, Some(20), &json!({})),
        (&taken_away, Some(20), &json!({})),
        // Nobody knows when.
        (&demoted, None, &json!({})),
        // From before the decision.
        (&demoted, Some(5), &pushed),
        // Something else has changed.
        (&heard(), Some(20), &pushed),
        (&heard(), None, &pushed),
    ] {
        let found = sent_of(&admin, there.clone(), updated_at).await;
        assert_eq!(found, *sent, "{there} of {updated_at:?}");
    }
    // What was sent itself, before the next decision: Clerk has stamped it only then.
    let twice = [(10, set_role("editor")), (12, set_role("admin"))];
    let mut there = heard();
    there["role"] = json!("editor");
    assert_eq!(sent_of(&twice, there, Some(13)).await, pushed);
}

#[tokio::test]
async fn each_part_is_left_to_clerk_by_itself() {
    let progress = |step| {
        let status = OnboardingStatus::InProgress;
        Command::Onboard(Onboarding { step, total_steps: 8, status })
    };
    let user_type = Some("buyer".to_owned());
    let organization = user::Assignment::AsItIs;
    let decisions = [
        (10, set_role("admin")),
        (10, Command::Place(user::Placement { user_type, organization })),
        (10, set_flag("gamma")),
        (10, progress(3)),
    ];
    let ours = json!({
        "role": "admin", "userType": "buyer", "featureFlags": { "beta": null, "gamma": true },
        "onboarding": { "status": "in_progress", "currentStep": 3, "totalSteps": 8 },
    });
    assert_eq!(sent_of(&decisions, heard(), Some(20)).await, ours);
    let onboarding = json!({ "status": "in_progress", "currentStep": 5, "totalSteps": 8 });
    for (key, theirs) in [
        ("role", json!("user")),
        ("userType", json!("other")),
        ("featureFlags", json!({ "delta": true })),
        ("onboarding", onboarding),
    ] {
        let (mut there, mut others) = (heard(), ours.clone());
        there[key] = theirs;
        others.as_object_mut().unwrap().remove(key);
        assert_eq!(sent_of(&decisions, there, Some(20)).await, others);
    }
}

#[tokio::test]
async fn what_the_read_model_of_this_node_does_not_show_yet_counts() {
    let (log, clerk) = (Memory::new(), Clerk::default());
    log.execute("ada", says(1, told()));
    let shown = log.execute("ada", (10, set_role("admin")));
    log.execute("ada", says(20, Told { role: Some("user".to_owned()), ..told() }));
    let (mut lagging, _dir) = sync(&log, &clerk);
    settle(&mut lagging, shown).await;
    assert_eq!(clerk.0.lock().unwrap().shown, 0);

    // And what comes while Clerk answers.
    let shown = log.execute("ada", (30, set_role("admin")));
    clerk.has("ada", heard(), Some(at(20)));
    let beside = Arc::clone(&log);
    clerk.0.lock().unwrap().meanwhile = Some(Box::new(move || {
        beside.execute("ada", (31, set_role("editor")));
    }));
    settle(&mut lagging, shown).await;
    assert_eq!(clerk.patches(), [json!({ "role": "editor" })]);
}

#[tokio::test]
async fn what_is_decided_while_a_user_is_under_way_is_sent_too_and_not_forgotten_over_a_restart() {
    let (log, clerk) = (Memory::new(), Clerk::default());
    log.execute("ada", says(1, told()));
    let first = log.execute("ada", (10, set_role("admin")));
    clerk.has("ada", heard(), Some(at(1)));
    let (mut sync, _dir) = sync(&log, &clerk);
    sync.look(first).await.unwrap();
    let second = log.execute("ada", (11, set_flag("gamma")));
    sync.look(second).await.unwrap();
    let sent = sync.sending.next().await.unwrap();
    assert_eq!(clerk.patches(), [json!({ "role": "admin" })]);
    sync.note(sent);
    assert_eq!(sync.pending[&Target::User(id("ada"))].since, second);
    settle(&mut sync, second).await;
    let flags = json!({ "featureFlags": { "beta": null, "gamma": true } });
    assert_eq!(clerk.patches()[1..], [flags]);
    assert_eq!((sync.pending.len(), sync.checkpoint()), (0, second));
}

#[tokio::test(start_paused = true)]
async fn those_whom_clerk_keeps_failing_hold_up_nobody_else() {
    let (log, clerk) = (Memory::new(), Clerk::default());
    for name in ["ada", "bob", "cem"] {
        log.execute(name, says(1, told()));
        clerk.has(name, heard(), Some(at(1)));
    }
    let failing = [("ada".to_owned(), 500), ("bob".to_owned(), 403)];
    clerk.0.lock().unwrap().failing.extend(failing);
    let (sync, dir) = sync(&log, &clerk);
    let views = Views::open(&dir.path().join("views.sqlite")).unwrap();
    let blobs = Blobs::open(&BlobStore::File, dir.path()).unwrap();
    let keyring = Keyring::new(&blobs, MasterKey::kept_in(&dir.path().join("master.key")));
    let projector = Projector::new(log.clone(), views, keyring);
    let kept = || std::fs::read_to_string(dir.path().join("position")).unwrap_or_default();
    let told_within = async |names: &[&str], most: Duration| {
        let begun = Instant::now();
        while !names.iter().all(|name| clerk.was_told_of(name)) {
            assert!(begun.elapsed() < most, "{names:?} were not told of");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let scenario = async {
        let first = log.execute("ada", (10, set_flag("gamma")));
        log.execute("bob", (10, set_flag("gamma")));
        projector.apply_next(u64::MAX).await.unwrap();
        // By then they are tried once a minute.
        tokio::time::sleep(Duration::from_secs(300)).await;
        let last = log.execute("cem", (20, set_flag("gamma")));
        projector.apply_next(u64::MAX).await.unwrap();
        told_within(&["cem"], Duration::from_secs(1)).await;
        let before: u64 = kept().parse().unwrap_or(0);
        assert!(before < first, "{before} is kept");
        clerk.0.lock().unwrap().failing.clear();
        told_within(&["ada", "bob"], MAX_PAUSE + Duration::from_secs(10)).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(kept(), last.to_string());
    };
    tokio::select! {
        () = follow(sync, projector.progress()) => unreachable!("it follows for ever"),
        () = scenario => {}
    }
}

fn parts_after(user: &User, command: &Command) -> BTreeSet<Part> {
    let events = user.decide(command, DateTime::<Utc>::UNIX_EPOCH).unwrap();
    events.into_iter().flat_map(parts_of).collect()
}

fn user(command: &Command) -> User {
    User::fold(&User::default().decide(command, DateTime::UNIX_EPOCH).unwrap())
}

#[test]
fn what_a_token_claims_asks_for_nothing_whatever_was_heard_before() {
    let membership = Membership {
        membership_id: Membership::claimed("o1"),
        organization_id: "o1".to_owned(),
        name: None,
        slug: None,
        role: "org:admin".to_owned(),
        permissions: BTreeSet::new(),
    };
    let status = OnboardingStatus::Completed;
    let claims = Command::Provision(Claims {
        snapshot: Snapshot { told: told(), ..Snapshot::default() },
        memberships: vec![membership],
        onboarding: Some(Onboarding { step: 8, total_steps: 8, status }),
        ..Claims::default()
    });
    assert_eq!(parts_after(&User::default(), &claims), BTreeSet::new());
    let (membership_id, organization_id) = ("m1".to_owned(), "o2".to_owned());
    let left = user(&Command::Leave { membership_id, organization_id });
    assert_eq!(parts_after(&left, &claims), BTreeSet::new());
}

#[test]
fn nothing_is_read_that_the_parked_view_of_users_does_not_show() {
    let parked = |view, position| {
        let reason = String::new();
        let parked = vec![Parked { view, position, reason }];
        shown(&Reached { position: 9, parked, stands_still: false })
    };
    assert_eq!((parked(View::Jobs, 5), parked(View::Users, 5)), (9, 4));
}

#[test]
fn of_access_only_what_was_decided_is_asked_for() {
    let (_, sync) = says(0, told());
    let ada = user(&sync);
    let tier = AccessChange { subscription_tier: Some("premium".to_owned()), ..Default::default() };
    let tier_alone = BTreeSet::from([Part::Access(Right::SubscriptionTier)]);
    assert_eq!(parts_after(&ada, &Command::SetAccess(tier)), tier_alone);
    let role_alone = BTreeSet::from([Part::Access(Right::Role)]);
    assert_eq!(parts_after(&ada, &set_role("creator")), role_alone);

    // Of an older event, what it changed.
    let access = Access { subscription_tier: "premium".to_owned(), ..ada.access.clone() };
    let decided_at = Some(DateTime::UNIX_EPOCH);
    let older = user::Event::AccessChanged { access, decided_at, decided: None };
    let mut known = Known { user: ada, ..Known::default() };
    known.take_in(&older);
    assert_eq!(known.decided_of(&parts_of(older)), tier_alone);
}

#[test]
fn what_clerk_has_said_since_is_not_decided_here_any_more() {
    let all = BTreeSet::from([Part::Access(Right::Role), Part::UserType, Part::Flags]);
    let user_type = Some("buyer".to_owned());
    let place = user::Placement { user_type, organization: user::Assignment::AsItIs };
    let decisions = [set_role("admin"), Command::Place(place), set_flag("gamma")];
    for (word, left) in [
        (Told { role: None, ..told() }, [Part::UserType, Part::Flags]),
        (Told { user_type: None, ..told() }, [Part::Access(Right::Role), Part::Flags]),
        (Told { feature_flags: None, ..told() }, [Part::Access(Right::Role), Part::UserType]),
    ] {
        let mut known = Known::default();
        let heard = [says(1, told())].into_iter();
        let decided = decisions.iter().map(|decision| (10, decision.clone()));
        for (second, command) in heard.chain(decided) {
            for event in known.user.decide(&command, at(second)).unwrap() {
                known.take_in(&event);
            }
        }
        assert_eq!(known.decided_of(&all), all);
        let (second, word) = says(20, word);
        for event in known.user.decide(&word, at(second)).unwrap() {
            known.take_in(&event);
        }
        assert_eq!(known.decided_of(&all), BTreeSet::from(left));
        for event in known.user.decide(&Command::Delete, at(second)).unwrap() {
            known.take_in(&event);
        }
        assert_eq!(known.decided_of(&all), BTreeSet::new());
    }
}
