//! A log taken in is the same log, and one that is not sound leaves nothing.

use std::io::Write;

use bytes::Bytes;
use chrono::DateTime;
use uuid::Uuid;

use super::*;
use crate::log::dump::{self, Header, Lines};

async fn filled(path: &Path, events: u64) -> EmbeddedLog {
    let log = EmbeddedLog::open(path).unwrap();
    for first in (0..events).step_by(500) {
        let batch = (first..events.min(first + 500)).map(|number| NewEvent {
            id: Uuid::from_u128(u128::from(number)),
            kind: format!("thing.happened.v{}", number % 3),
            time: DateTime::from_timestamp_micros(1_700_000_000_000_000 + number as i64).unwrap(),
            data: format!(r#"{{"n":{number}}}"#).into_bytes(),
            metadata: b"{}".to_vec(),
        });
        log.append(&format!("thing-{}", first % 1500), Expected::Any, batch.collect())
            .await
            .unwrap();
    }
    log
}

async fn exported(log: &EmbeddedLog) -> Vec<u8> {
    let (stats, mut text, mut after) = (log.stats().await.unwrap(), Vec::new(), 0);
    let header = Header::new(stats.events, stats.position, &stats.head_hash);
    dump::write_header(&mut text, &header).unwrap();
    loop {
        let page = log.read_all(after, 1000).await.unwrap();
        let Some(last) = page.last() else { return text };
        after = last.position;
        page.iter().for_each(|event| dump::write_event(&mut text, event).unwrap());
    }
}

fn take(text: &[u8], import: &mut Import) -> Result<(), String> {
    let mut lines = Lines::new(text);
    lines.header().map_err(|error| error.to_string())?;
    while let Some(event) = lines.event().map_err(|error| error.to_string())? {
        import.take(&event).map_err(|error| error.to_string())?;
    }
    Ok(())
}

#[tokio::test]
async fn export_import_export_is_the_same_text_also_for_a_hundred_thousand_events() {
    let dir = tempfile::tempdir().unwrap();
    let log = filled(&dir.path().join("log.sqlite"), 100_000).await;
    let text = exported(&log).await;
    let path = dir.path().join("other").join("log.sqlite");
    let mut import = Import::begin(&path).unwrap();
    take(&text, &mut import).unwrap();
    assert!(!path.exists(), "it shows before it is whole");
    let verified = import.finish().unwrap();
    let copy = EmbeddedLog::open(&path).unwrap();
    assert_eq!(copy.verify().await.unwrap(), verified);
    assert_eq!(log.verify().await.unwrap(), verified);
    assert!(exported(&copy).await == text, "the text differs");
    // It is a log like any other.
    let next = copy.append("thing-0", Expected::Any, vec![event_after(100_000)]).await.unwrap();
    assert_eq!(next.position, 100_001);
}

fn event_after(number: u64) -> NewEvent {
    NewEvent {
        id: Uuid::from_u128(u128::from(number)),
        kind: "thing.happened.v1".to_owned(),
        time: DateTime::UNIX_EPOCH,
        data: b"{}".to_vec(),
        metadata: b"{}".to_vec(),
    }
}

#[tokio::test]
async fn a_log_is_continued_where_it_ends_all_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let source = filled(&dir.path().join("log.sqlite"), 2000).await;
    let (first, rest) =
        (source.read_all(0, 1500).await.unwrap(), source.read_all(1500, 5000).await.unwrap());
    let path = dir.path().join("copy.sqlite");
    let mut import = Import::begin(&path).unwrap();
    first.iter().for_each(|event| import.take(event).unwrap());
    import.finish().unwrap();
    let mut import = Import::begin(&path).unwrap();
    assert_eq!(import.end(), (1500, first[1499].hash));
    assert!(matches!(EmbeddedLog::open(&path).err(), Some(Error::Unwritable(_))), "not locked");
    rest[..300].iter().for_each(|event| import.take(event).unwrap());
    let reader = EmbeddedLog::open_read_only(&path).unwrap();
    assert_eq!(*reader.head().borrow(), 1500, "a part of it shows");
    drop(import);
    let mut import = Import::begin(&path).unwrap();
    assert_eq!(import.end(), (1500, first[1499].hash), "a part of it stayed");
    rest.iter().for_each(|event| import.take(event).unwrap());
    assert_eq!(import.finish().unwrap(), source.verify().await.unwrap());
}

#[tokio::test]
async fn what_is_not_sound_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let source = filled(&dir.path().join("log.sqlite"), 100).await;
    let events = source.read_all(0, 1000).await.unwrap();
    let mut rehashed = events.clone();
    rehashed[10].revision = 7;
    rehashed[10].hash = crate::log::Link::of(&rehashed[10]).hash(&events[9].hash);
    let mut altered = events.clone();
    altered[10].data = Bytes::from_static(b"{}");
    let mut gap = events.clone();
    gap.remove(10);
    let mut swapped = events.clone();
    swapped.swap(10, 11);
    let faults = [
        (rehashed, "its revision does not follow"),
        (altered, "do not belong together"),
        (gap, "the event is missing"),
        (swapped, "the event is missing"),
        (events[10..].to_vec(), "the event is missing"),
    ];
    for (events, what) in faults {
        let path = dir.path().join("fresh").join("log.sqlite");
        let mut import = Import::begin(&path).unwrap();
        let refused = events.iter().find_map(|event| import.take(event).err()).unwrap();
        assert!(matches!(&refused, Error::Corrupt { position: 1 | 11, .. }), "{refused}");
        assert!(refused.to_string().contains(what), "{refused}");
        drop(import);
        let left: Vec<_> = std::fs::read_dir(path.parent().unwrap())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(left, ["log.lock"]);
    }
}

#[tokio::test]
async fn an_import_that_was_killed_is_begun_anew() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log.sqlite");
    let mut left = File::create(path.with_extension("importing")).unwrap();
    left.write_all(b"half a file").unwrap();
    let source = filled(&dir.path().join("source.sqlite"), 10).await;
    let busy = lock(&path).unwrap();
    assert!(matches!(Import::begin(&path).err(), Some(Error::Unwritable(_))));
    assert!(path.with_extension("importing").exists(), "another import may be at work on it");
    drop(busy);
    let mut import = Import::begin(&path).unwrap();
    assert!(import.has_cleared());
    for event in source.read_all(0, 100).await.unwrap() {
        import.take(&event).unwrap();
    }
    assert_eq!(import.finish().unwrap().events, 10);
    assert!(!path.with_extension("importing").exists());
}

#[test]
fn no_log_is_put_under_the_wal_of_another() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log.sqlite");
    std::fs::write(file::beside(&path, "-wal"), "of a log that was moved away").unwrap();
    let refused = Import::begin(&path).err().unwrap();
    assert!(matches!(&refused, Error::Foreign(what) if what.contains("without its log")));
    let left: Vec<_> = dir.path().read_dir().unwrap().map(|it| it.unwrap().file_name()).collect();
    assert_eq!(left, ["log.sqlite-wal"], "something was written");
}
