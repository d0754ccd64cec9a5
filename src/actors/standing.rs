//! Whether a read model belongs to a log: by the hashes of the first and the last event that it has
//! taken in.

use crate::log::{Error, EventLog};
use crate::views::Seen;

/// How a log stands to what a read model has seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// All that was seen is there.
    Same,
    /// It begins with another event.
    Another,
    /// It holds nothing, so that it may be any.
    Empty,
    /// It begins the same, and ends before what was seen.
    Cut { head: u64 },
    /// It begins the same, and has something else where the last event was seen.
    Parted,
}

/// # Errors
/// The log cannot be read at present. Where it is damaged it is believed to be the same: whoever
/// follows it stops there.
pub async fn of(log: &dyn EventLog, seen: &Seen) -> Result<Standing, Error> {
    match compare(log, seen).await {
        Err(Error::Corrupt { .. }) => Ok(Standing::Same),
        found => found,
    }
}

async fn compare(log: &dyn EventLog, seen: &Seen) -> Result<Standing, Error> {
    if seen.position == 0 {
        return Ok(Standing::Same);
    }
    // What was appended just now by somebody else may have been seen, and not be in `head` yet.
    if seen.position > *log.head().borrow() {
        log.end().await?;
    }
    let Some(first) = log.read_all(0, 1).await?.pop() else { return Ok(Standing::Empty) };
    if first.hash != seen.first {
        return Ok(Standing::Another);
    }
    let last = log.read_all(seen.position - 1, 1).await?.pop();
    Ok(match last {
        None => Standing::Cut { head: *log.head().borrow() },
        Some(last) if last.position == seen.position && last.hash == seen.last => Standing::Same,
        Some(_) => Standing::Parted,
    })
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;
    use uuid::Uuid;

    use super::*;
    use crate::log::{EmbeddedLog, Expected, NewEvent};

    async fn with(path: &std::path::Path, ids: &[u128]) -> EmbeddedLog {
        let log = EmbeddedLog::open(path).unwrap();
        for id in ids {
            let event = NewEvent {
                id: Uuid::from_u128(*id),
                kind: "thing.happened.v1".to_owned(),
                time: DateTime::UNIX_EPOCH,
                data: b"{}".to_vec(),
                metadata: b"{}".to_vec(),
            };
            log.append("thing", Expected::Any, vec![event]).await.unwrap();
        }
        log
    }

    #[tokio::test]
    async fn a_log_is_known_by_what_was_seen_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let seen = {
            let log = with(&dir.path().join("seen"), &[1, 2, 3]).await;
            let events = log.read_all(0, 3).await.unwrap();
            Seen { position: 3, first: events[0].hash, last: events[2].hash }
        };
        let nothing = Seen { position: 0, first: [0; 32], last: [0; 32] };
        for (nth, (ids, then)) in [
            (&[1, 2, 3][..], Standing::Same),
            (&[1, 2, 3, 4], Standing::Same),
            (&[], Standing::Empty),
            (&[1, 2], Standing::Cut { head: 2 }),
            (&[1, 2, 4], Standing::Parted),
            (&[1, 4, 3, 5], Standing::Parted),
            (&[9, 2, 3], Standing::Another),
            (&[9], Standing::Another),
        ]
        .into_iter()
        .enumerate()
        {
            let log = with(&dir.path().join(nth.to_string()), ids).await;
            assert_eq!(of(&log, &seen).await.unwrap(), then, "{ids:?}");
            assert_eq!(of(&log, &nothing).await.unwrap(), Standing::Same);
        }
    }
}
