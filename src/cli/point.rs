//! A moment of the log, as a command is told it.

use chrono::{DateTime, Utc};

use crate::log::Recorded;

/// In `--at` and `--until`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    Position(u64),
    Time(DateTime<Utc>),
}

/// # Errors
/// In words that follow the flag's name.
pub fn parse(text: &str) -> Result<Point, String> {
    if let Ok(position) = text.parse() {
        return Ok(Point::Position(position));
    }
    let time = DateTime::parse_from_rfc3339(text)
        .map_err(|_| "neither a position nor a time with its zone, such as 2026-11-21T19:30:00Z")?;
    Ok(Point::Time(time.to_utc()))
}

/// What had happened by a time, of events that are seen in their order. A clock that was put forward
/// for a while, or set back, has left times that are not in that order.
#[derive(Debug, Clone, Copy)]
pub struct By {
    time: DateTime<Utc>,
    position: u64,
    /// Of the events up to there, those of a later time.
    later: u64,
    /// The same of those after it.
    since: u64,
}

impl By {
    pub fn new(time: DateTime<Utc>) -> Self {
        Self { time, position: 0, later: 0, since: 0 }
    }

    pub fn see(&mut self, event: &Recorded) {
        if event.time > self.time {
            self.since += 1;
        } else {
            self.position = event.position;
            self.later += std::mem::take(&mut self.since);
        }
    }

    /// Of the last event of that time or before; 0 if there was none.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Whether an event after it was of a later time.
    pub fn is_past(&self) -> bool {
        self.since > 0
    }

    /// Says on stderr what else is among what had happened by then.
    pub fn warn(&self) {
        if let Some(warning) = self.warning() {
            eprintln!("{warning}");
        }
    }

    fn warning(&self) -> Option<String> {
        let Self { time, position, later, .. } = self;
        let events = if *later == 1 { "event has" } else { "events have" };
        (*later > 0).then(|| {
            format!(
                "{later} {events} a later time than {} and a position before {position}, the last of \
                 that time or before, since a clock was set back: a position in place of the time is \
                 exact",
                time.to_rfc3339()
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use chrono::TimeDelta;
    use uuid::Uuid;

    use super::*;

    /// The events of these seconds had happened by second 5: where that is, and what else is told.
    fn by(seconds: &[i64]) -> (u64, u64, bool, Option<String>) {
        let at = |second| DateTime::UNIX_EPOCH + TimeDelta::seconds(second);
        let mut by = By::new(at(5));
        for (second, position) in seconds.iter().zip(1..) {
            by.see(&Recorded {
                id: Uuid::nil(),
                stream: "thing-1".into(),
                revision: position - 1,
                position,
                kind: "thing.done.v1".into(),
                time: at(*second),
                data: Bytes::new(),
                metadata: Bytes::new(),
                hash: [0; 32],
            });
        }
        (by.position(), by.later, by.is_past(), by.warning())
    }

    #[test]
    fn what_a_clock_put_forward_or_back_cuts_nothing_off() {
        for (seconds, position, later, is_past) in [
            (&[][..], 0, 0, false),
            (&[6, 7], 0, 0, true),
            (&[1, 2, 5], 3, 0, false),
            (&[1, 5, 6, 7], 2, 0, true),
            (&[1, 99, 2, 3], 4, 1, false),
            (&[99, 98, 1, 97, 2, 6], 5, 3, true),
            (&[1, 2, 99], 2, 0, true),
        ] {
            let (found, among, past, warning) = by(seconds);
            assert_eq!((found, among, past), (position, later, is_past), "{seconds:?}");
            assert_eq!(warning.is_some(), later > 0, "{seconds:?}");
        }
        let warned = by(&[99, 98, 1]).3.unwrap_or_default();
        assert!(warned.starts_with("2 events have a later time than 1970-01-01T00:00:05"));
        assert!(warned.contains("before 3,") && warned.ends_with("is exact"), "{warned}");
    }

    #[test]
    fn a_point_is_a_position_or_a_time() {
        assert_eq!(parse("7"), Ok(Point::Position(7)));
        assert_eq!(parse("1970-01-01T01:00:00+01:00"), Ok(Point::Time(DateTime::UNIX_EPOCH)));
        for text in ["yesterday", "2026-11-21T19:30:00"] {
            assert!(parse(text).unwrap_err().starts_with("neither a position nor a time"));
        }
    }
}
