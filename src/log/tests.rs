use std::sync::atomic::{AtomicU64, Ordering};

use super::*;

fn link() -> Link<'static> {
    Link {
        position: 7,
        stream: "thing-1",
        revision: 3,
        kind: "thing.done.v1",
        id: Uuid::from_u128(9),
        time: DateTime::from_timestamp_micros(1_700_000_000_123_456).unwrap(),
        data: b"{}",
        metadata: b"[]",
    }
}

#[test]
fn the_stored_hash_of_a_known_event_never_changes() {
    // Computed with Python's hashlib from the words of `Link::hash`.
    assert_eq!(hex::encode(link().hash(&GENESIS)), EXPECTED);
}

const EXPECTED: &str = "8547efde8f02fa8b4156e0b15179d5ba39aca43a735911feab1bfb8d05f306a0";

#[test]
fn what_is_hashed_in_one_go_is_what_is_hashed_in_parts() {
    let mut encoded = Vec::new();
    link().encode(&GENESIS, &mut encoded);
    assert_eq!(Sha256::digest(&encoded)[..], link().hash(&GENESIS));
}

#[test]
fn every_field_and_the_predecessor_are_in_the_hash() {
    let whole = link();
    let changed = [
        Link { position: 8, ..whole },
        Link { stream: "thing-2", ..whole },
        Link { revision: 4, ..whole },
        Link { kind: "thing.done.v2", ..whole },
        Link { id: Uuid::from_u128(8), ..whole },
        Link { time: whole.time + chrono::Duration::microseconds(1), ..whole },
        Link { data: b"{}[", metadata: b"]", ..whole },
        Link { metadata: b"", ..whole },
    ];
    for other in changed {
        assert_ne!(other.hash(&GENESIS), whole.hash(&GENESIS), "{other:?}");
    }
    assert_ne!(whole.hash(&[0; 32]), whole.hash(&GENESIS));
}

#[test]
fn an_event_may_have_as_many_bytes_as_the_limit_says_and_no_more() {
    let event = |data, metadata| NewEvent {
        id: Uuid::nil(),
        kind: "thing.done.v1".to_owned(),
        time: DateTime::UNIX_EPOCH,
        data: vec![b' '; data],
        metadata: vec![b' '; metadata],
    };
    assert_eq!(check_limits("thing-1", &[event(MAX_BYTES, MAX_BYTES)]), Ok(()));
    for (data, metadata) in [(MAX_BYTES + 1, 0), (0, MAX_BYTES + 1)] {
        let refused = check_limits("thing-1", &[event(data, metadata)]);
        assert!(matches!(refused, Err(Error::Invalid(_))), "{refused:?}");
    }
}

#[tokio::test]
async fn an_unknown_engine_is_refused_without_repeating_its_password() {
    let dir = tempfile::tempdir().unwrap();
    // The second one is known, where it was built in, and its address is none.
    for setting in ["mysql://root:secret@host", "esdb://root:secret@host:port"] {
        let unknown = check(setting).unwrap_err();
        assert!(matches!(unknown, Error::Invalid(_)));
        assert!(!unknown.to_string().contains("secret"), "{unknown}");
        let opened = [open(setting, dir.path()).await, open_for_reading(setting, dir.path()).await];
        for opened in opened {
            assert_eq!(opened.map(drop).unwrap_err(), unknown);
        }
    }
}

#[test]
fn a_log_is_named_without_what_is_secret_in_its_address() {
    let check = |setting: &str, then: &str| assert_eq!(shown(setting, Path::new("d")), then);
    check("embedded", "d/log.sqlite");
    check("postgres://u:hunter2@h:1/d?sslmode=require", "postgres://h:1/d");
    check("postgres://u:hun?ter2@h/d", "postgres://h/d");
    check("esdb://admin:hunter2@a:1,b:2?tls=false", "esdb://a:1,b:2");
    check("esdb://a:1", "esdb://a:1");
}

#[cfg(not(feature = "eventstore"))]
#[test]
fn an_engine_that_was_left_out_is_named_with_its_feature() {
    let error = check("esdb://admin:secret@host").unwrap_err().to_string();
    assert!(error.starts_with("T2M_LOG: ") && error.contains("`eventstore`"), "{error}");
    assert!(!error.contains("secret"), "{error}");
}

#[tokio::test]
async fn the_embedded_engine_is_made_in_a_directory_that_was_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let log = open("embedded", &dir.path().join("a/b")).await.unwrap();
    assert_eq!(log.stats().await.unwrap().events, 0);
    assert!(dir.path().join("a/b/log.sqlite").exists());
}

#[test]
fn a_setting_is_judged_by_its_engine_without_opening_anything() {
    for good in ["embedded", "postgres://h/d", "postgresql://h/d"] {
        assert_eq!(check(good), Ok(()), "{good}");
    }
    for (bad, what) in [
        ("mysql://h/d", "no log engine is called `mysql`"),
        ("Embedded", "no log engine is called `that`"),
        ("postgres://", "not an address"),
    ] {
        let error = check(bad).unwrap_err();
        assert!(matches!(&error, Error::Invalid(said) if said.contains(what)), "{error}");
    }
}

#[tokio::test]
async fn a_log_is_opened_for_reading_only_where_there_is_one() {
    let dir = tempfile::tempdir().unwrap();
    let missing = open_for_reading("embedded", dir.path()).await.err();
    assert!(matches!(missing, Some(Error::Storage(_))), "{missing:?}");
    drop(open("embedded", dir.path()).await.unwrap());
    let log = open_for_reading("embedded", dir.path()).await.unwrap();
    assert!(matches!(log.writable(), Err(Error::Unwritable(_))));
    assert!(!log.is_exclusive());
    let unknown = "no log engine is called `x`";
    for (setting, what) in [("x://h", unknown), ("postgres://", "not an address")] {
        let reading = open_for_reading(setting, dir.path()).await;
        for opened in [open(setting, dir.path()).await, reading] {
            let error = opened.err().unwrap().to_string();
            assert!(error.contains(what), "{error}");
        }
    }
}

fn recorded() -> Recorded {
    let mut event = Recorded {
        id: Uuid::from_u128(9),
        stream: "thing-1".into(),
        revision: 3,
        position: 7,
        kind: "thing.done.v1".into(),
        time: DateTime::UNIX_EPOCH,
        data: Bytes::from_static(b"{}"),
        metadata: Bytes::from_static(b"[]"),
        hash: [0; 32],
    };
    event.hash = Link::of(&event).hash(&GENESIS);
    event
}

#[test]
fn an_event_follows_only_the_one_that_it_is_chained_to() {
    assert_eq!(check_next(&recorded(), 6, &GENESIS), Ok(()));
    for before in [5, 7] {
        let missing = Err(bad(before + 1, "the event is missing"));
        assert_eq!(check_next(&recorded(), before, &GENESIS), missing);
    }
    let altered = Err(bad(7, "the event and its hash do not belong together"));
    assert_eq!(check_next(&recorded(), 6, &[0; 32]), altered);
    let other = Recorded { data: Bytes::from_static(b"{ }"), ..recorded() };
    assert_eq!(check_next(&other, 6, &GENESIS), altered);
}

#[test]
fn what_another_log_holds_has_the_same_limits() {
    let (large, longest) = (vec![b' '; MAX_BYTES], "x".repeat(MAX_NAME));
    let largest = Recorded {
        stream: longest.as_str().into(),
        kind: longest.as_str().into(),
        data: large.clone().into(),
        metadata: large.clone().into(),
        ..recorded()
    };
    assert_eq!(check_recorded(&largest), Ok(()));
    let (larger, longer) = ([large, vec![b' ']].concat(), format!("{longest}x"));
    for bad in [
        Recorded { data: larger.clone().into(), ..recorded() },
        Recorded { metadata: larger.into(), ..recorded() },
        Recorded { stream: longer.as_str().into(), ..recorded() },
        Recorded { kind: longer.as_str().into(), ..recorded() },
        Recorded { stream: "".into(), ..recorded() },
        Recorded { kind: "a\nb".into(), ..recorded() },
    ] {
        assert!(matches!(check_recorded(&bad), Err(Error::Invalid(_))));
    }
}

#[test]
fn numbers_that_sql_does_not_have_become_the_nearest_one() {
    assert_eq!([0, 7, u64::MAX].map(to_sql), [0, 7, i64::MAX]);
    assert_eq!([i64::MIN, -1, 0, 7].map(from_sql), [0, 0, 0, 7]);
}

/// An engine that leaves everything at its default that has one.
struct Bare(EmbeddedLog);

#[async_trait::async_trait]
impl EventLog for Bare {
    async fn append(
        &self,
        stream: &str,
        expected: Expected,
        events: Vec<NewEvent>,
    ) -> Result<Appended, Error> {
        self.0.append(stream, expected, events).await
    }

    async fn read_stream(
        &self,
        stream: &str,
        from_revision: u64,
        limit: usize,
    ) -> Result<Vec<Recorded>, Error> {
        self.0.read_stream(stream, from_revision, limit).await
    }

    async fn read_all(&self, after: u64, limit: usize) -> Result<Vec<Recorded>, Error> {
        self.0.read_all(after, limit).await
    }

    fn head(&self) -> watch::Receiver<u64> {
        self.0.head()
    }

    fn writable(&self) -> Result<(), Error> {
        self.0.writable()
    }

    async fn stats(&self) -> Result<Stats, Error> {
        self.0.stats().await
    }

    async fn verify(&self) -> Result<Verified, Error> {
        self.0.verify().await
    }
}

fn event(number: u128) -> NewEvent {
    NewEvent {
        id: Uuid::from_u128(number),
        kind: "thing.done.v1".to_owned(),
        time: DateTime::UNIX_EPOCH,
        data: b"{}".to_vec(),
        metadata: b"{}".to_vec(),
    }
}

#[tokio::test]
async fn what_an_engine_leaves_at_its_default_is_answered_from_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let log = Bare(EmbeddedLog::open(&dir.path().join("log.sqlite")).unwrap());
    assert!(!log.is_exclusive(), "others may write");
    assert_eq!(log.stride(), 1);
    let append = |stream: &str, expected, number| ToAppend {
        stream: stream.into(),
        expected,
        events: vec![event(number)],
    };
    let (new, second) = (Expected::NoStream, Expected::Revision(0));
    let taken = vec![append("thing-1", new, 1), append("thing-2", new, 2)];
    assert_eq!(log.append_in_turn(taken).await, Ok(()));
    let refused =
        vec![append("thing-1", second, 3), append("thing-2", new, 4), append("thing-3", new, 5)];
    let (at, error) = log.append_in_turn(refused).await.unwrap_err();
    assert!(at == 1 && matches!(error, Error::Conflict { .. }), "{at}: {error}");
    assert_eq!(log.end().await, Ok(3), "what came after the refused one was not written");
    let heard = Arc::new(AtomicU64::new(0));
    let hear = Arc::clone(&heard);
    let progress = Box::new(move |position| hear.store(position, Ordering::Relaxed));
    assert_eq!(log.verify_after(2, progress).await.unwrap().events, 3, "all of it is walked");
    assert_eq!(heard.load(Ordering::Relaxed), 3);
}
