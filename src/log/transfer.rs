//! The way from one log into another of any engine: streams, revisions, ids and contents are the
//! same there; positions and hashes are that log's own.

use super::{Error, EventLog, Expected, MAX_EVENTS, NewEvent, Recorded};

/// The most bytes that are appended at once.
const BYTES: usize = 4 * 1024 * 1024;

/// Appends what another log holds, in its order. May be repeated with the same events, after a
/// crash or with the answer lost: what is there already stays once. Each append takes the run of
/// events of one stream, so that its order against other streams is kept too.
///
/// # Errors
/// [`Error::Conflict`] when a stream holds something else at that revision.
pub async fn append(target: &dyn EventLog, events: &[Recorded]) -> Result<(), Error> {
    let mut rest = events;
    while let Some(first) = rest.first() {
        let (run, others) = rest.split_at(run_of(rest));
        let expected = match first.revision.checked_sub(1) {
            None => Expected::NoStream,
            Some(last) => Expected::Revision(last),
        };
        match target.append(&first.stream, expected, run.iter().map(new).collect()).await {
            Ok(_) => rest = others,
            // An earlier try, which was cut elsewhere, has brought the first of them.
            Err(error @ Error::Conflict { actual: Some(actual), .. }) => {
                let there = (actual + 1).saturating_sub(first.revision);
                let there = usize::try_from(there).unwrap_or(usize::MAX);
                let is_same = 0 < there
                    && there < run.len()
                    && first_difference(target, &run[..there]).await?.is_none();
                if !is_same {
                    return Err(error);
                }
                rest = &rest[there..];
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The first of `events` that `target` does not hold as it is, its position and hash aside.
///
/// # Errors
/// The target cannot be read.
pub async fn first_difference<'a>(
    target: &dyn EventLog,
    events: &'a [Recorded],
) -> Result<Option<&'a Recorded>, Error> {
    let mut rest = events;
    while let Some(first) = rest.first() {
        let (run, others) = rest.split_at(run_of(rest));
        let found = target.read_stream(&first.stream, first.revision, run.len()).await?;
        let differs = |(event, at): (&Recorded, usize)| {
            found
                .get(at)
                .is_none_or(|found| (found.revision, new(found)) != (event.revision, new(event)))
        };
        if let Some(at) = (0..run.len()).find(|at| differs((&run[*at], *at))) {
            return Ok(Some(&run[at]));
        }
        rest = others;
    }
    Ok(None)
}

/// How many of them, from the first on, are one stream's and fit into one append.
fn run_of(events: &[Recorded]) -> usize {
    let Some(first) = events.first() else { return 0 };
    let mut bytes = 0;
    let fits =
        events.iter().zip(first.revision..).take(MAX_EVENTS).take_while(|(event, revision)| {
            bytes += event.data.len() + event.metadata.len();
            event.stream == first.stream
                && event.revision == *revision
                && (bytes <= BYTES || *revision == first.revision)
        });
    fits.count()
}

fn new(event: &Recorded) -> NewEvent {
    NewEvent {
        id: event.id,
        kind: event.kind.to_string(),
        time: event.time,
        data: event.data.clone(),
        metadata: event.metadata.clone(),
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;
    use uuid::Uuid;

    use super::*;
    use crate::log::EmbeddedLog;

    async fn filled(path: &std::path::Path) -> EmbeddedLog {
        let log = EmbeddedLog::open(path).unwrap();
        for number in 0..60_u128 {
            let events = (0..=number % 3).map(|nth| NewEvent {
                id: Uuid::from_u128(number * 10 + nth),
                kind: "thing.happened.v1".to_owned(),
                time: DateTime::UNIX_EPOCH,
                data: format!("{{\"n\":{number}}}").into_bytes(),
                metadata: b"{}".to_vec(),
            });
            let stream = format!("thing-{}", number % 7);
            log.append(&stream, Expected::Any, events.collect()).await.unwrap();
        }
        log
    }

    #[tokio::test]
    async fn a_log_is_carried_over_once_however_often_it_is_tried() {
        let dir = tempfile::tempdir().unwrap();
        let source = filled(&dir.path().join("a.sqlite")).await;
        let target = EmbeddedLog::open(&dir.path().join("b.sqlite")).unwrap();
        let events = source.read_all(0, 1000).await.unwrap();
        assert_eq!(first_difference(&target, &events).await.unwrap(), events.first());
        // Cut anywhere, and begun anew.
        for upto in [1, 50, 51, events.len(), events.len()] {
            append(&target, &events[..upto]).await.unwrap();
        }
        assert_eq!(first_difference(&target, &events).await.unwrap(), None);
        assert_eq!(target.read_all(0, 1000).await.unwrap(), events);
        let mut other = events.clone();
        other[70].data = b"{}".to_vec();
        assert_eq!(first_difference(&target, &other).await.unwrap(), Some(&other[70]));
    }

    fn recorded(stream: &str, revision: u64, bytes: usize) -> Recorded {
        Recorded {
            id: Uuid::from_u128(revision.into()),
            stream: stream.into(),
            revision,
            position: revision + 1,
            kind: "thing.happened.v1".into(),
            time: DateTime::UNIX_EPOCH,
            data: vec![b' '; bytes / 2],
            metadata: vec![b' '; bytes / 2],
            hash: [0; 32],
        }
    }

    #[test]
    fn a_run_is_of_one_stream_without_gaps_and_fits_into_one_append() {
        let run = |events: &[(&str, u64, usize)]| {
            let events =
                events.iter().map(|(stream, revision, bytes)| recorded(stream, *revision, *bytes));
            run_of(&events.collect::<Vec<_>>())
        };
        assert_eq!(run(&[]), 0);
        assert_eq!(run(&[("a", 5, 2), ("a", 6, 2), ("b", 0, 2), ("a", 7, 2)]), 2);
        assert_eq!(run(&[("a", 5, 2), ("a", 7, 2)]), 1);
        assert_eq!(run(&[("a", 0, BYTES / 2), ("a", 1, BYTES / 2), ("a", 2, 2)]), 2);
        assert_eq!(run(&[("a", 5, BYTES + 2), ("a", 6, 2)]), 1, "one goes whatever it has");
        let many: Vec<_> = (0..1500).map(|revision| recorded("a", revision, 2)).collect();
        assert_eq!(run_of(&many), MAX_EVENTS);
    }

    #[tokio::test]
    async fn a_log_that_holds_something_else_is_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let target = EmbeddedLog::open(&dir.path().join("log.sqlite")).unwrap();
        let events: Vec<_> = (0..4).map(|revision| recorded("a", revision, 2)).collect();
        append(&target, &events[..2]).await.unwrap();
        let mut other = events.clone();
        other[1].id = Uuid::from_u128(99);
        for wrong in [&other[..], &other[1..], &events[3..]] {
            let refused = append(&target, wrong).await;
            assert!(matches!(refused, Err(Error::Conflict { .. })), "{refused:?}");
        }
        assert_eq!(target.read_all(0, 10).await.unwrap().len(), 2);
        // What begins within what is there goes on from where that ends.
        append(&target, &events[1..]).await.unwrap();
        assert_eq!(first_difference(&target, &events).await.unwrap(), None);
    }
}
