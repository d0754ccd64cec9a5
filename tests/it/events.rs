//! Holds the stored format: `events/` and the code say the same, both ways and for ever.
//!
//! `T2M_BLESS=1 cargo test --test it events` writes the schemas anew and publishes new examples; it
//! never changes an example. Stories fold to snapshots beside this file.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::LazyLock;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use t2m::actors::codec::{self, AnyEvent, Metadata};
use t2m::actors::keyring::Keyring;
use t2m::config::BlobStore;
use t2m::domain::Aggregate;
use t2m::domain::{file, file::File, job, job::Job, session, session::Session, user, user::User};
use t2m::log::Recorded;
use t2m::media::blobs::Blobs;
use t2m::media::vault::MasterKey;

#[test]
fn each_type_has_its_file_and_the_schema_of_the_file_is_that_of_the_type() {
    for (kind, schema) in types() {
        let Some(mut file) = FILES.get(&kind).cloned() else {
            panic!("events/{kind}.json is missing: T2M_BLESS=1 writes it, examples are yours");
        };
        file.as_object_mut().expect("a schema is an object").remove("examples");
        assert_eq!(file, schema, "{kind}: not the type's schema, see T2M_BLESS");
    }
}

#[test]
fn each_file_belongs_to_a_type() {
    let types = types();
    for kind in FILES.keys() {
        assert!(types.contains_key(kind) || codec::is_retired(kind), "{kind} is no type");
    }
}

#[test]
fn each_example_fits_its_schema_and_comes_back_unchanged() {
    for (kind, file) in FILES.iter() {
        let schema = jsonschema::options().should_validate_formats(true).build(file);
        let schema = schema.unwrap_or_else(|error| panic!("{kind}: {error}"));
        let examples = examples(file);
        assert!(!examples.is_empty(), "{kind} has no example");
        for example in examples {
            schema.validate(example).unwrap_or_else(|error| panic!("{kind}: {error}: {example}"));
            let again = reencoded(kind, example).unwrap_or_else(|error| panic!("{error}"));
            assert!(codec::is_retired(kind) || again == (kind.clone(), example.clone()), "{kind}");
        }
    }
}

#[test]
fn a_published_example_is_never_edited_nor_removed() {
    let path = folder().join("published.sha256");
    let mut published = std::fs::read_to_string(&path).unwrap_or_default();
    let present: BTreeSet<String> = FILES.iter().flat_map(|(k, f)| digests(k, f)).collect();
    let lost = lost(&published, &present);
    assert!(lost.is_empty(), "edited or removed, restore them: {lost:#?}");
    let fresh: Vec<_> = present.iter().filter(|d| !published.lines().any(|l| l == *d)).collect();
    if std::env::var_os("T2M_BLESS").is_some() {
        published.extend(fresh.iter().map(|digest| format!("{digest}\n")));
        std::fs::write(&path, published).unwrap();
    } else {
        assert!(fresh.is_empty(), "not published yet, see T2M_BLESS: {fresh:#?}");
    }
}

#[test]
fn an_edited_example_is_noticed_and_a_reordered_one_is_not() {
    let of = |text: &str| digests("a.v1", &serde_json::from_str(text).unwrap()).collect();
    let published: BTreeSet<String> = of(r#"{"examples":[{"a":1,"b":[2]},{"a":3}]}"#);
    let published = published.into_iter().collect::<Vec<_>>().join("\n");
    assert_eq!(lost(&published, &of(r#"{"examples":[{"a":3},{"b":[2],"a":1}]}"#)).len(), 0);
    assert_eq!(lost(&published, &of(r#"{"examples":[{"a":4},{"b":[2],"a":1}]}"#)).len(), 1);
    assert_eq!(lost(&published, &of(r#"{"examples":[]}"#)).len(), 2);
}

#[test]
fn a_video_from_a_prompt() {
    insta::assert_snapshot!(states(&story("video-from-prompt")));
}

#[test]
fn a_worker_that_crashes_and_the_retry() {
    insta::assert_snapshot!(states(&story("worker-crash-and-retry")));
}

#[test]
fn webhooks_that_come_after_the_deletion() {
    let story = story("late-webhooks-after-deletion");
    insta::assert_snapshot!(states(&story));

    let (_, user): (_, User) = only(&story, |event| match event {
        AnyEvent::User(id, event) => Some((id.to_string(), event)),
        _ => None,
    });
    let late = at("2026-03-09T12:00:00Z");
    let snapshot = user::Snapshot::default();
    let sync = user::Command::Sync { snapshot: snapshot.clone(), source_updated_at: late };
    assert_eq!(user.decide(&sync, late), Ok(vec![]));
    let provision = user::Command::Provision(snapshot.into());
    assert_eq!(user.decide(&provision, late), Err(user::Refusal::Deleted));

    let (id, session): (_, Session) = only(&story, |event| match event {
        AnyEvent::Session(id, event) if id.as_str() == "sess_2rOvertaken" => {
            Some((id.to_string(), event))
        }
        _ => None,
    });
    let start = session::Command::Start {
        user_id: String::from("user_2rGrace").try_into().unwrap(),
        started_at: at("2026-03-09T08:00:00Z"),
        expires_at: None,
        ip_address: None,
        user_agent: None,
    };
    let ended = session::Refusal::Ended(session::EndReason::Removed);
    assert_eq!(session.decide(&start, late), Err(ended), "{id}");
}

#[test]
fn a_deletion_means_the_same_in_both_versions() {
    let story = story("deletions-before-and-after");
    let reasons = story.iter().filter_map(|(_, event)| match event {
        AnyEvent::File(_, file::Event::Deleted { reason, .. }) => Some(*reason),
        _ => None,
    });
    let [asked, expired] = [file::Reason::Requested, file::Reason::Expired];
    assert_eq!(reasons.collect::<Vec<_>>(), [asked, asked, expired, expired]);
    insta::assert_snapshot!(states(&story));
}

#[tokio::test]
async fn no_personal_field_of_any_event_lies_in_the_log_in_clear() {
    let dir = tempfile::tempdir().unwrap();
    let blobs = Blobs::open(&BlobStore::File, dir.path()).unwrap();
    let keyring = Keyring::new(&blobs, MasterKey::kept_in(&dir.path().join("master.key")));
    for (kind, file) in FILES.iter().filter(|(kind, _)| !codec::is_retired(kind)) {
        let (mut planted, mut there) = (BTreeSet::new(), BTreeSet::new());
        places(file, file, "", &mut there);
        for example in examples(file) {
            let mut data = example.clone();
            plant(file, file, "", &mut data, &mut planted);
            let stream = stream_of(kind);
            let event = codec::decode_any(&stream, kind, data.to_string().as_bytes()).unwrap();
            let (kind, data) = match &event {
                AnyEvent::User(_, event) => keyring.encode::<User>(&stream, event).await,
                AnyEvent::Session(_, event) => keyring.encode::<Session>(&stream, event).await,
                AnyEvent::File(_, event) => keyring.encode::<File>(&stream, event).await,
                AnyEvent::Job(_, event) => keyring.encode::<Job>(&stream, event).await,
            }
            .unwrap();
            let stored = String::from_utf8_lossy(&data).into_owned();
            assert!(!stored.contains(MARKER), "{kind} stores {stored}");
            let shown = keyring.open_json(&stream, &kind, &data).await.unwrap().to_string();
            assert_eq!(shown.contains(MARKER), !there.is_empty(), "{kind} shows {shown}");
            let (stream, kind) = (stream.into(), kind.into());
            let record = Recorded {
                id: uuid::Uuid::nil(),
                stream,
                revision: 0,
                position: 1,
                kind,
                time: DateTime::UNIX_EPOCH,
                data: data.into(),
                metadata: Bytes::new(),
                hash: [0; 32],
            };
            assert_eq!(keyring.decode_each(&[record]).await.unwrap(), [Ok(event)]);
        }
        assert_eq!(planted, there, "{kind}: no example has all of them");
    }
}

const MARKER: &str = "marker-of-something-personal";

/// Every place of a type where its schema has a personal field.
fn places(schema: &Value, root: &Value, place: &str, found: &mut BTreeSet<String>) {
    if is_personal(schema) {
        found.insert(place.to_owned());
        return;
    }
    let schema = resolved(schema, root);
    for branch in branches(&schema) {
        places(branch, root, place, found);
    }
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        places(field, root, &format!("{place}.{name}"), found);
    }
}

/// Writes the marker into all of them that this event may have.
fn plant(
    schema: &Value,
    root: &Value,
    place: &str,
    value: &mut Value,
    planted: &mut BTreeSet<String>,
) {
    let referred = resolved(schema, root);
    if is_personal(schema) {
        let is_object = resolved(&referred["anyOf"][0], root)["type"] == "object";
        *value = if is_object { json!({ "note": MARKER }) } else { json!(MARKER) };
        planted.insert(place.to_owned());
        return;
    }
    for branch in branches(&referred) {
        let required = resolved(branch, root)["required"].clone();
        let mut required = required.as_array().into_iter().flatten();
        if is_personal(branch) || required.all(|it| value.get(it.as_str().unwrap()).is_some()) {
            plant(branch, root, place, value, planted);
        }
    }
    for (name, field) in referred["properties"].as_object().into_iter().flatten() {
        let is_personal_field = is_personal(field) || branches(field).any(is_personal);
        if let Some(fields) = value.as_object_mut()
            && (is_personal_field || fields.contains_key(name))
        {
            let value = fields.entry(name).or_insert(Value::Null);
            plant(field, root, &format!("{place}.{name}"), value, planted);
        }
    }
}

fn is_personal(schema: &Value) -> bool {
    schema["$ref"].as_str().is_some_and(|path| path.starts_with("#/$defs/Personal_"))
}

fn branches(schema: &Value) -> impl Iterator<Item = &Value> {
    ["anyOf", "oneOf"].iter().filter_map(|name| schema[name].as_array()).flatten()
}

/// `events/*.json` by type; with `T2M_BLESS` the schemas in them are written anew first.
static FILES: LazyLock<BTreeMap<String, Value>> = LazyLock::new(|| {
    if std::env::var_os("T2M_BLESS").is_some() {
        types().iter().for_each(|(kind, schema)| bless(kind, schema));
    }
    let entries = std::fs::read_dir(folder()).expect("events/ reads");
    let paths = entries.map(|entry| entry.expect("an entry reads").path());
    let json = paths.filter(|path| path.extension().is_some_and(|it| it == "json"));
    json.map(|path| {
        let kind = path.file_stem().expect("it has a name").to_string_lossy().into_owned();
        let text = std::fs::read_to_string(&path).expect("the file reads");
        (kind, serde_json::from_str(&text).expect("the file is JSON"))
    })
    .collect()
});

fn bless(kind: &str, schema: &Value) {
    let path = folder().join(format!("{kind}.json"));
    let old = std::fs::read_to_string(&path).unwrap_or_else(|_| r#"{"examples":[]}"#.to_owned());
    let old: Value = serde_json::from_str(&old).expect("the file is JSON");
    let mut new = schema.clone();
    new["examples"] = old["examples"].clone();
    let text = serde_json::to_string_pretty(&sorted(&new)).expect("a value is JSON");
    std::fs::write(path, text + "\n").expect("the file can be written");
}

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("events")
}

/// Every type in the code, with the schema of its data.
fn types() -> BTreeMap<String, Value> {
    let mut types = BTreeMap::new();
    types.extend(types_of::<user::Event>());
    types.extend(types_of::<session::Event>());
    types.extend(types_of::<file::Event>());
    types.extend(types_of::<job::Event>());
    types
}

/// One schema a variant: that of its data, under the variant's name and description.
fn types_of<E: JsonSchema>() -> Vec<(String, Value)> {
    let root = schemars::schema_for!(E).to_value();
    let variants = root["oneOf"].as_array().expect("an event is one of its variants");
    let schema = |variant: &Value| {
        let kind = variant["properties"]["type"]["const"].as_str().expect("each has a type");
        let mut data = resolved(&variant["properties"]["data"], &root);
        data["$schema"] = root["$schema"].clone();
        data["title"] = json!(kind);
        if let Some(description) = variant.get("description") {
            data["description"] = description.clone();
        }
        let mut used = Map::new();
        collect_definitions(&data, &root, &mut used);
        if !used.is_empty() {
            data["$defs"] = Value::Object(used);
        }
        (kind.to_owned(), data)
    };
    variants.iter().map(schema).collect()
}

fn resolved(schema: &Value, root: &Value) -> Value {
    match schema["$ref"].as_str().and_then(|path| path.strip_prefix('#')) {
        Some(path) => root.pointer(path).expect("a reference leads somewhere").clone(),
        None => schema.clone(),
    }
}

fn collect_definitions(schema: &Value, root: &Value, used: &mut Map<String, Value>) {
    match schema {
        Value::Object(fields) => {
            if let Some(name) = schema["$ref"].as_str().and_then(|r| r.strip_prefix("#/$defs/"))
                && !used.contains_key(name)
            {
                used.insert(name.to_owned(), root["$defs"][name].clone());
                collect_definitions(&root["$defs"][name], root, used);
            }
            fields.values().for_each(|field| collect_definitions(field, root, used));
        }
        Value::Array(items) => {
            items.iter().for_each(|item| collect_definitions(item, root, used));
        }
        _ => {}
    }
}

fn examples(file: &Value) -> &[Value] {
    file["examples"].as_array().map_or(&[], Vec::as_slice)
}

/// Through the code and back: the type and data as it would be stored today.
fn reencoded(kind: &str, data: &Value) -> Result<(String, Value), codec::Error> {
    encoded(&codec::decode_any(&stream_of(kind), kind, data.to_string().as_bytes())?)
}

fn stream_of(kind: &str) -> String {
    let category = kind.split('.').next().unwrap_or_default();
    let id = match category {
        "file" | "job" => "018f0000-0000-7000-8000-000000000000",
        _ => "id",
    };
    format!("{category}-{id}")
}

fn encoded(event: &AnyEvent) -> Result<(String, Value), codec::Error> {
    let (kind, data) = match event {
        AnyEvent::User(_, event) => codec::encode::<User>(event)?,
        AnyEvent::Session(_, event) => codec::encode::<Session>(event)?,
        AnyEvent::File(_, event) => codec::encode::<File>(event)?,
        AnyEvent::Job(_, event) => codec::encode::<Job>(event)?,
    };
    Ok((kind, serde_json::from_slice(&data).expect("the codec writes JSON")))
}

/// One line an example: SHA-256 of its JSON with sorted keys and no white space, and its type.
fn digests(kind: &str, file: &Value) -> impl Iterator<Item = String> {
    examples(file).iter().map(move |example| {
        let canonical = sorted(example).to_string();
        format!("{}  {kind}", hex::encode(Sha256::digest(canonical)))
    })
}

fn lost<'a>(published: &'a str, present: &BTreeSet<String>) -> Vec<&'a str> {
    published.lines().filter(|line| !present.contains(*line)).collect()
}

/// The same value with its keys in order, whatever order serde_json was built to keep.
fn sorted(value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            let fields: BTreeMap<_, _> = fields.iter().map(|(k, v)| (k, sorted(v))).collect();
            Value::Object(fields.into_iter().map(|(k, v)| (k.clone(), v)).collect())
        }
        Value::Array(items) => items.iter().map(sorted).collect(),
        other => other.clone(),
    }
}

/// CONTRACT §5.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Envelope {
    id: uuid::Uuid,
    stream: String,
    revision: u64,
    position: u64,
    r#type: String,
    time: DateTime<Utc>,
    data: Value,
    metadata: Metadata,
}

/// The events of a story in order, after checking that it could have come from a log.
fn story(name: &str) -> Vec<(String, AnyEvent)> {
    let path = folder().join(format!("stories/{name}.jsonl"));
    let text = std::fs::read_to_string(path).expect("the story reads");
    let (mut ids, mut revisions) = (BTreeSet::new(), BTreeMap::<String, u64>::new());
    let (mut position, mut time) = (None, DateTime::UNIX_EPOCH);
    let mut events = vec![];
    for line in text.lines() {
        let told: Envelope = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        assert!(ids.insert(told.id), "an id comes twice: {line}");
        assert!(Some(told.position) > position, "positions grow: {line}");
        assert!(told.time >= time, "time does not run backwards: {line}");
        let next = revisions.entry(told.stream.clone()).or_default();
        assert_eq!(told.revision, *next, "revisions are dense: {line}");
        assert!(!told.metadata.correlation_id.is_empty(), "{line}");
        (position, time) = (Some(told.position), told.time);
        *next += 1;
        let data = told.data.to_string();
        let event = codec::decode_any(&told.stream, &told.r#type, data.as_bytes());
        let event = event.unwrap_or_else(|error| panic!("{error}: {line}"));
        // A retired version comes back as the present one.
        if !codec::is_retired(&told.r#type) {
            assert_eq!(
                encoded(&event),
                Ok((told.r#type, told.data)),
                "it would be stored otherwise"
            );
        }
        events.push((told.stream, event));
    }
    assert!(!events.is_empty(), "{name} is empty");
    events
}

/// The state of every entity of a story.
fn states(story: &[(String, AnyEvent)]) -> String {
    let mut streams = BTreeMap::<&str, Vec<&AnyEvent>>::new();
    for (stream, event) in story {
        streams.entry(stream).or_default().push(event);
    }
    let shown = streams.iter().map(|(stream, events)| format!("{stream}: {}\n", state(events)));
    shown.collect()
}

fn state(events: &[&AnyEvent]) -> String {
    match events[0] {
        AnyEvent::User(..) => folded::<User>(events, |event| match event {
            AnyEvent::User(_, event) => Some(event),
            _ => None,
        }),
        AnyEvent::Session(..) => folded::<Session>(events, |event| match event {
            AnyEvent::Session(_, event) => Some(event),
            _ => None,
        }),
        AnyEvent::File(..) => folded::<File>(events, |event| match event {
            AnyEvent::File(_, event) => Some(event),
            _ => None,
        }),
        AnyEvent::Job(..) => folded::<Job>(events, |event| match event {
            AnyEvent::Job(_, event) => Some(event),
            _ => None,
        }),
    }
}

fn folded<A: Aggregate + std::fmt::Debug>(
    events: &[&AnyEvent],
    pick: fn(&AnyEvent) -> Option<&A::Event>,
) -> String {
    let events = events.iter().map(|event| pick(event).expect("a stream is of one aggregate"));
    format!("{:#?}", A::fold(events))
}

/// The state of the one entity whose events `pick` takes.
fn only<'a, A: Aggregate>(
    story: &'a [(String, AnyEvent)],
    pick: impl Fn(&'a AnyEvent) -> Option<(String, &'a A::Event)>,
) -> (String, A) {
    let (ids, events): (Vec<_>, Vec<_>) = story.iter().filter_map(|(_, e)| pick(e)).unzip();
    assert!(ids.windows(2).all(|pair| pair[0] == pair[1]), "more than one: {ids:?}");
    (ids.first().expect("the story tells of it").clone(), A::fold(events))
}

fn at(time: &str) -> DateTime<Utc> {
    time.parse().expect("a time")
}
