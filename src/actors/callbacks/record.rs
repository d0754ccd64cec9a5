//! What is known of a job's callbacks: kept as a document, because a crash must lose no callback and
//! forget no attempt.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};

use super::sender::Answer;
use crate::actors::codec::Metadata;
use crate::domain::ids::{JobId, UserId};
use crate::log::Recorded;

/// A job that is retried by its user has many ends; so many of the last ones are kept.
const MOST_CALLBACKS: usize = 50;
/// The longest that the other side may put us off.
const LONGEST_RETRY_AFTER: TimeDelta = TimeDelta::hours(10);

/// The callbacks of one job, the oldest first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub user_id: UserId,
    pub callbacks: Vec<Callback>,
}

/// One end of the job that is to be told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Callback {
    /// The `webhook-id`.
    pub id: String,
    /// Of the event, in the job's stream.
    pub revision: u64,
    #[serde(rename = "type")]
    pub ending: Ending,
    pub happened_at: DateTime<Utc>,
    /// The event's `correlation_id`: sent along, so that both sides' logs can be read together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    pub attempts: Vec<Attempt>,
    /// Absent once it was delivered or given up.
    pub next_attempt_at: Option<DateTime<Utc>>,
    pub delivered: bool,
}

/// An event that ends a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    /// In the job's stream.
    pub revision: u64,
    pub ending: Ending,
    pub happened_at: DateTime<Utc>,
    pub request_id: Option<String>,
}

impl End {
    /// None if the event ends nothing.
    pub fn of(event: &Recorded) -> Option<Self> {
        let ending = Ending::of(&event.kind)?;
        let metadata: Option<Metadata> = serde_json::from_slice(&event.metadata).ok();
        let request_id = metadata.map(|it| it.correlation_id).filter(|id| !id.is_empty());
        Some(Self { revision: event.revision, ending, happened_at: event.time, request_id })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ending {
    #[serde(rename = "job.completed")]
    Completed,
    #[serde(rename = "job.failed")]
    Failed,
    #[serde(rename = "job.cancelled")]
    Cancelled,
}

impl Ending {
    /// Of an event's type in the log; none for one that ends nothing.
    pub fn of(kind: &str) -> Option<Self> {
        match kind {
            "job.completed.v1" => Some(Self::Completed),
            "job.failed.v1" => Some(Self::Failed),
            "job.cancelled.v1" => Some(Self::Cancelled),
            _ => None,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Completed => "job.completed",
            Self::Failed => "job.failed",
            Self::Cancelled => "job.cancelled",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    pub at: DateTime<Utc>,
    /// Of the answer, if one came.
    pub status: Option<u16>,
    /// Why none came.
    pub error: Option<Trouble>,
}

/// Why an attempt got no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Trouble {
    /// The name leads to private, local or reserved addresses alone.
    AddressRefused,
    /// No name, no connection, or no encryption.
    Connection,
    Timeout,
    /// The connection broke, or what came was no answer.
    NoAnswer,
    /// It could not be signed.
    Unsendable,
}

impl Record {
    pub fn new(user_id: UserId) -> Self {
        Self { user_id, callbacks: Vec::new() }
    }

    /// Adds an end of the job that is to be told; false if it is known already.
    pub fn add(&mut self, job_id: JobId, end: End, delays: &[Duration]) -> bool {
        let End { revision, ending, happened_at, request_id } = end;
        // They come in the order of the stream, so that it holds also for what was dropped.
        if self.callbacks.last().is_some_and(|last| last.revision >= revision) {
            return false;
        }
        let first = delays.first().copied().unwrap_or_default();
        self.callbacks.push(Callback {
            id: format!("job_{}_{revision}", job_id.0.simple()),
            revision,
            ending,
            happened_at,
            request_id,
            attempts: Vec::new(),
            next_attempt_at: Some(happened_at + first),
            delivered: false,
        });
        let over = self.callbacks.len().saturating_sub(MOST_CALLBACKS);
        self.callbacks.drain(..over);
        true
    }

    /// The callback whose turn is next, if any waits.
    pub fn next(&self) -> Option<(&Callback, DateTime<Utc>)> {
        let waiting = self.callbacks.iter();
        let waiting = waiting.filter_map(|it| it.next_attempt_at.map(|at| (it, at)));
        waiting.min_by_key(|(_, at)| *at)
    }

    /// Notes what came of an attempt; `chance` is 0 to 1.
    pub fn attempted(
        &mut self,
        revision: u64,
        at: DateTime<Utc>,
        answer: &Answer,
        delays: &[Duration],
        chance: f64,
    ) {
        let callback = self.callbacks.iter_mut().find(|it| it.revision == revision);
        if let Some(callback) = callback {
            callback.attempted(at, answer, delays, chance);
        }
    }
}

impl Callback {
    fn attempted(&mut self, at: DateTime<Utc>, answer: &Answer, delays: &[Duration], chance: f64) {
        let (status, error) = (answer.status.ok(), answer.status.err());
        self.attempts.push(Attempt { at, status, error });
        self.delivered = matches!(status, Some(200..=299));
        // 410 Gone: whoever lives there wants no more of them.
        let is_over = self.delivered || status == Some(410);
        let delay = delays.get(self.attempts.len()).filter(|_| !is_over);
        self.next_attempt_at = delay.map(|delay| {
            let delay = spread(*delay, chance);
            let asked = answer.retry_after.unwrap_or_default();
            let asked = TimeDelta::from_std(asked).unwrap_or(LONGEST_RETRY_AFTER);
            at + delay.max(asked.min(LONGEST_RETRY_AFTER))
        });
    }
}

/// Up to a fifth longer, so that what failed together does not come again together.
fn spread(delay: Duration, chance: f64) -> TimeDelta {
    TimeDelta::from_std(delay.mul_f64(1.0 + 0.2 * chance)).unwrap_or(LONGEST_RETRY_AFTER)
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    const DELAYS: [Duration; 3] =
        [Duration::ZERO, Duration::from_secs(5), Duration::from_secs(300)];

    fn at(seconds: i64) -> DateTime<Utc> {
        DateTime::UNIX_EPOCH + TimeDelta::seconds(seconds)
    }

    fn end(revision: u64, ending: Ending, happened_at: DateTime<Utc>) -> End {
        End { revision, ending, happened_at, request_id: None }
    }

    fn record() -> Record {
        let mut record = Record::new(UserId::try_from("ada".to_owned()).unwrap());
        let end = end(3, Ending::Failed, at(100));
        assert!(record.add(JobId(Uuid::from_u128(7)), end, &DELAYS));
        record
    }

    fn answer(status: u16) -> Answer {
        Answer { status: Ok(status), retry_after: None }
    }

    fn due(record: &Record) -> Option<DateTime<Utc>> {
        record.next().map(|(_, at)| at)
    }

    #[test]
    fn attempts_follow_the_schedule_and_are_spread() {
        let mut record = record();
        assert_eq!(due(&record), Some(at(100)));
        record.attempted(3, at(100), &answer(500), &DELAYS, 0.0);
        assert_eq!(due(&record), Some(at(105)));
        let broken = Answer { status: Err(Trouble::Timeout), retry_after: None };
        record.attempted(3, at(110), &broken, &DELAYS, 1.0);
        assert_eq!(due(&record), Some(at(110 + 360)));
        record.attempted(3, at(500), &answer(302), &DELAYS, 0.0);
        assert_eq!(due(&record), None, "it is given up");
        assert!(!record.callbacks[0].delivered);
        assert_eq!(record.callbacks[0].attempts.len(), 3);
    }

    #[test]
    fn a_success_and_a_410_end_it_at_once() {
        for (status, delivered) in [(200, true), (204, true), (410, false)] {
            let mut record = record();
            record.attempted(3, at(100), &answer(status), &DELAYS, 0.0);
            assert_eq!((due(&record), record.callbacks[0].delivered), (None, delivered));
        }
    }

    #[test]
    fn the_other_side_may_put_us_off_but_neither_hasten_us_nor_for_ever() {
        for (asked, then) in [(1, 5), (60, 60), (u64::MAX / 1000, 36_000), (1 << 40, 36_000)] {
            let mut record = record();
            let retry_after = Some(Duration::from_secs(asked));
            let answer = Answer { status: Ok(429), retry_after };
            record.attempted(3, at(100), &answer, &DELAYS, 0.0);
            assert_eq!(due(&record), Some(at(100 + then)), "{asked}");
        }
    }

    #[test]
    fn an_end_is_told_once_however_often_the_log_is_read() {
        let mut record = record();
        let id = JobId(Uuid::from_u128(7));
        assert!(!record.add(id, end(3, Ending::Failed, at(100)), &DELAYS));
        assert!(!record.add(id, end(1, Ending::Failed, at(50)), &DELAYS));
        assert!(record.add(id, end(6, Ending::Completed, at(200)), &DELAYS));
        let ids: Vec<_> = record.callbacks.iter().map(|it| it.id.as_str()).collect();
        assert_eq!(ids[0], "job_00000000000000000000000000000007_3");
        assert_ne!(ids[0], ids[1]);
        for revision in 7..200 {
            record.add(id, end(revision, Ending::Failed, at(300)), &DELAYS);
        }
        assert_eq!(record.callbacks.len(), MOST_CALLBACKS);
    }

    #[test]
    fn a_record_of_before_the_request_ids_is_read_and_left_as_it_was() {
        let record = record();
        let json = serde_json::to_value(&record).unwrap();
        assert_eq!(json["callbacks"][0].get("request_id"), None);
        assert_eq!(serde_json::from_value::<Record>(json).unwrap(), record);
    }
}
