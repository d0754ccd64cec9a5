//! A job: from a request to its one outcome, through leases that each let one worker try.

use chrono::{DateTime, TimeDelta, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Aggregate;
use super::ids::{FileId, LeaseId, UserId};
use super::text::{Personal, Prompt};

/// Attempts a job gets before it fails for good.
pub const MAX_ATTEMPTS: u32 = 3;
/// How long a lease lasts unless progress renews it.
pub const LEASE: TimeDelta = TimeDelta::seconds(60);

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", content = "data")]
pub enum Event {
    #[serde(rename = "job.requested.v1")]
    Requested(Request),
    #[serde(rename = "job.leased.v1")]
    Leased {
        lease_id: LeaseId,
        worker_id: String,
        /// From 1.
        attempt: u32,
        expires_at: DateTime<Utc>,
    },
    #[serde(rename = "job.progressed.v1")]
    Progressed {
        lease_id: LeaseId,
        /// Percent, 0 to 100; never falls within an attempt.
        progress: u8,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        message: Option<String>,
        expires_at: DateTime<Utc>,
    },
    #[serde(rename = "job.lease_expired.v1")]
    LeaseExpired { lease_id: LeaseId, attempt: u32 },
    #[serde(rename = "job.attempt_failed.v1")]
    AttemptFailed {
        lease_id: LeaseId,
        attempt: u32,
        error: String,
        /// When the next attempt may start; absent after the last.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        retry_at: Option<DateTime<Utc>>,
    },
    #[serde(rename = "job.cancel_requested.v1")]
    CancelRequested { by: UserId },
    #[serde(rename = "job.completed.v1")]
    Completed { lease_id: LeaseId, output: Output },
    #[serde(rename = "job.failed.v1")]
    Failed { error: String },
    #[serde(rename = "job.cancelled.v1")]
    Cancelled {},
    /// The user asked for another round of attempts.
    #[serde(rename = "job.retried.v1")]
    Retried { by: UserId },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Request {
    pub user_id: UserId,
    pub kind: Kind,
    pub prompt: Personal<Prompt>,
    pub options: VideoOptions,
    /// Digest of the request that an `Idempotency-Key` came with, to tell a retry from a misuse.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    Video,
}

impl Kind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Video => "video",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct VideoOptions {
    /// Seconds.
    pub duration: u32,
    pub quality: Quality,
    pub aspect_ratio: AspectRatio,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub style: Option<String>,
    /// Chosen at the request when the caller names none, so that every attempt draws the same.
    pub seed: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_file_id: Option<FileId>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Quality {
    #[serde(rename = "480p")]
    P480,
    #[serde(rename = "720p")]
    P720,
    #[serde(rename = "1080p")]
    P1080,
    #[serde(rename = "4k")]
    K4,
}

impl Quality {
    pub const NAMES: [&'static str; 4] = ["480p", "720p", "1080p", "4k"];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::P480 => "480p",
            Self::P720 => "720p",
            Self::P1080 => "1080p",
            Self::K4 => "4k",
        }
    }

    pub fn parse(name: &str) -> Option<Self> {
        [Self::P480, Self::P720, Self::P1080, Self::K4].into_iter().find(|q| q.as_str() == name)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum AspectRatio {
    #[serde(rename = "16:9")]
    Landscape,
    #[serde(rename = "9:16")]
    Portrait,
    #[serde(rename = "1:1")]
    Square,
}

impl AspectRatio {
    pub const NAMES: [&'static str; 3] = ["16:9", "9:16", "1:1"];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Landscape => "16:9",
            Self::Portrait => "9:16",
            Self::Square => "1:1",
        }
    }

    pub fn parse(name: &str) -> Option<Self> {
        [Self::Landscape, Self::Portrait, Self::Square].into_iter().find(|r| r.as_str() == name)
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Output {
    pub file_id: FileId,
    pub content_type: String,
    /// In bytes.
    pub size: u64,
    /// Seconds.
    pub duration: f64,
    pub width: u32,
    pub height: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub poster_file_id: Option<FileId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub captions_file_id: Option<FileId>,
}

#[derive(Debug, Clone)]
pub enum Command {
    Request(Request),
    Lease {
        lease_id: LeaseId,
        worker_id: String,
    },
    /// Also the worker's heartbeat: it renews the lease.
    Progress {
        lease_id: LeaseId,
        progress: u8,
        message: Option<String>,
    },
    Complete {
        lease_id: LeaseId,
        output: Output,
    },
    Fail {
        lease_id: LeaseId,
        error: String,
        retryable: bool,
    },
    Cancel {
        by: UserId,
    },
    Retry {
        by: UserId,
    },
    /// Time has passed: take the lease back if it ran out.
    Lapse,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("no such job")]
    NotFound,
    #[error("the idempotency key was used for another request")]
    KeyReused,
    #[error("the job is {0} and cannot be leased")]
    NotLeasable(&'static str),
    #[error("the lease is no longer held")]
    LeaseLost,
    #[error("the job is {0}")]
    WrongState(&'static str),
}

#[derive(Debug, Clone, Default, PartialEq)]
pub enum Job {
    #[default]
    Absent,
    Requested(Box<Progressing>),
}

/// A job that exists: what was asked for, and how far it is.
#[derive(Debug, Clone, PartialEq)]
pub struct Progressing {
    pub request: Request,
    /// Attempts of this round; a retry by the user starts a new one.
    pub attempts: u32,
    pub phase: Phase,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Phase {
    Queued,
    Running(Lease),
    RetryWait {
        until: DateTime<Utc>,
    },
    /// The user wants it stopped; its worker has yet to notice or to lose its lease.
    Cancelling(Lease),
    Completed(Output),
    Failed,
    Cancelled,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Lease {
    pub id: LeaseId,
    pub expires_at: DateTime<Utc>,
    pub progress: u8,
}

impl Phase {
    /// The word that clients see as `state` (CONTRACT §3).
    pub fn name(&self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running(_) => "running",
            Self::RetryWait { .. } => "retry_wait",
            Self::Cancelling(_) => "cancelling",
            Self::Completed(_) => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

impl Aggregate for Job {
    const CATEGORY: &'static str = "job";
    type Command = Command;
    type Event = Event;
    type Refusal = Refusal;

    fn decide(&self, command: &Command, now: DateTime<Utc>) -> Result<Vec<Event>, Refusal> {
        match (self, command) {
            (Self::Absent, Command::Request(request)) => {
                Ok(vec![Event::Requested(request.clone())])
            }
            (Self::Absent, _) => Err(Refusal::NotFound),
            (Self::Requested(job), Command::Request(request)) => {
                let same =
                    request.fingerprint.is_some() && request.fingerprint == job.request.fingerprint;
                if same { Ok(vec![]) } else { Err(Refusal::KeyReused) }
            }
            (Self::Requested(job), Command::Lease { lease_id, worker_id }) => {
                job.lease(*lease_id, worker_id, now)
            }
            (Self::Requested(job), Command::Progress { lease_id, progress, message }) => {
                job.progress(*lease_id, *progress, message.as_deref(), now)
            }
            (Self::Requested(job), Command::Complete { lease_id, output }) => {
                job.complete(*lease_id, output)
            }
            (Self::Requested(job), Command::Fail { lease_id, error, retryable }) => {
                job.fail(*lease_id, error, *retryable, now)
            }
            (Self::Requested(job), Command::Cancel { by }) => job.cancel(by),
            (Self::Requested(job), Command::Retry { by }) => job.retry(by),
            (Self::Requested(job), Command::Lapse) => Ok(job.lapse(now)),
        }
    }

    fn evolve(&mut self, event: &Event) {
        if let Event::Requested(request) = event {
            *self = Self::Requested(Box::new(Progressing {
                request: request.clone(),
                attempts: 0,
                phase: Phase::Queued,
            }));
            return;
        }
        if let Self::Requested(job) = self {
            job.evolve(event);
        }
    }
}

impl Progressing {
    fn lease(
        &self,
        lease_id: LeaseId,
        worker_id: &str,
        now: DateTime<Utc>,
    ) -> Result<Vec<Event>, Refusal> {
        let ready = match &self.phase {
            Phase::Queued => true,
            Phase::RetryWait { until } => *until <= now,
            Phase::Running(lease) if lease.id == lease_id => return Ok(vec![]),
            _ => false,
        };
        if !ready {
            return Err(Refusal::NotLeasable(self.phase.name()));
        }
        Ok(vec![Event::Leased {
            lease_id,
            worker_id: worker_id.to_owned(),
            attempt: self.attempts + 1,
            expires_at: now + LEASE,
        }])
    }

    fn progress(
        &self,
        lease_id: LeaseId,
        progress: u8,
        message: Option<&str>,
        now: DateTime<Utc>,
    ) -> Result<Vec<Event>, Refusal> {
        match &self.phase {
            Phase::Running(lease) if lease.id == lease_id => Ok(vec![Event::Progressed {
                lease_id,
                progress: progress.min(100).max(lease.progress),
                message: message.map(str::to_owned),
                expires_at: now + LEASE,
            }]),
            _ => Err(Refusal::LeaseLost),
        }
    }

    fn complete(&self, lease_id: LeaseId, output: &Output) -> Result<Vec<Event>, Refusal> {
        match &self.phase {
            Phase::Running(lease) if lease.id == lease_id => {
                Ok(vec![Event::Completed { lease_id, output: output.clone() }])
            }
            Phase::Cancelling(lease) if lease.id == lease_id => Ok(vec![Event::Cancelled {}]),
            Phase::Completed(done) if done == output => Ok(vec![]),
            _ => Err(Refusal::LeaseLost),
        }
    }

    fn fail(
        &self,
        lease_id: LeaseId,
        error: &str,
        retryable: bool,
        now: DateTime<Utc>,
    ) -> Result<Vec<Event>, Refusal> {
        match &self.phase {
            Phase::Running(lease) if lease.id == lease_id => {
                Ok(self.after_attempt(lease_id, error, retryable, now))
            }
            Phase::Cancelling(lease) if lease.id == lease_id => Ok(vec![Event::Cancelled {}]),
            _ => Err(Refusal::LeaseLost),
        }
    }

    /// Another attempt after a growing delay, or the end.
    fn after_attempt(
        &self,
        lease_id: LeaseId,
        error: &str,
        retryable: bool,
        now: DateTime<Utc>,
    ) -> Vec<Event> {
        let again = retryable && self.attempts < MAX_ATTEMPTS;
        let delay = TimeDelta::seconds(5) * 4i32.pow(self.attempts.saturating_sub(1).min(5));
        let mut events = vec![Event::AttemptFailed {
            lease_id,
            attempt: self.attempts,
            error: error.to_owned(),
            retry_at: again.then(|| now + delay),
        }];
        if !again {
            events.push(Event::Failed { error: error.to_owned() });
        }
        events
    }

    fn cancel(&self, by: &UserId) -> Result<Vec<Event>, Refusal> {
        if *by != self.request.user_id {
            return Err(Refusal::NotFound);
        }
        let asked = Event::CancelRequested { by: by.clone() };
        match &self.phase {
            Phase::Queued | Phase::RetryWait { .. } => Ok(vec![asked, Event::Cancelled {}]),
            Phase::Running(_) => Ok(vec![asked]),
            Phase::Cancelling(_) | Phase::Cancelled => Ok(vec![]),
            Phase::Completed(_) | Phase::Failed => Err(Refusal::WrongState(self.phase.name())),
        }
    }

    fn retry(&self, by: &UserId) -> Result<Vec<Event>, Refusal> {
        if *by != self.request.user_id {
            return Err(Refusal::NotFound);
        }
        match &self.phase {
            Phase::Failed | Phase::Cancelled => Ok(vec![Event::Retried { by: by.clone() }]),
            other => Err(Refusal::WrongState(other.name())),
        }
    }

    fn lapse(&self, now: DateTime<Utc>) -> Vec<Event> {
        match &self.phase {
            Phase::Running(lease) if lease.expires_at <= now => {
                let mut events =
                    vec![Event::LeaseExpired { lease_id: lease.id, attempt: self.attempts }];
                if self.attempts >= MAX_ATTEMPTS {
                    events.push(Event::Failed { error: "no worker finished the job".to_owned() });
                }
                events
            }
            Phase::Cancelling(lease) if lease.expires_at <= now => vec![Event::Cancelled {}],
            _ => vec![],
        }
    }

    fn evolve(&mut self, event: &Event) {
        match event {
            Event::Requested(_) => {}
            Event::Leased { lease_id, attempt, expires_at, .. } => {
                self.attempts = *attempt;
                self.phase =
                    Phase::Running(Lease { id: *lease_id, expires_at: *expires_at, progress: 0 });
            }
            Event::Progressed { progress, expires_at, .. } => {
                if let Phase::Running(lease) = &mut self.phase {
                    lease.progress = *progress;
                    lease.expires_at = *expires_at;
                }
            }
            Event::LeaseExpired { .. } => self.phase = Phase::Queued,
            Event::AttemptFailed { retry_at, .. } => {
                self.phase = retry_at.map_or(Phase::Failed, |until| Phase::RetryWait { until });
            }
            Event::CancelRequested { .. } => {
                if let Phase::Running(lease) = &self.phase {
                    self.phase = Phase::Cancelling(lease.clone());
                }
            }
            Event::Completed { output, .. } => self.phase = Phase::Completed(output.clone()),
            Event::Failed { .. } => self.phase = Phase::Failed,
            Event::Cancelled {} => self.phase = Phase::Cancelled,
            Event::Retried { .. } => {
                self.attempts = 0;
                self.phase = Phase::Queued;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    fn at(seconds: i64) -> DateTime<Utc> {
        DateTime::UNIX_EPOCH + TimeDelta::seconds(seconds)
    }

    fn user(name: &str) -> UserId {
        UserId::try_from(name.to_owned()).unwrap()
    }

    fn lease(n: u128) -> LeaseId {
        LeaseId(Uuid::from_u128(n))
    }

    fn request() -> Request {
        Request {
            user_id: user("ada"),
            kind: Kind::Video,
            prompt: Personal(Prompt::parse("a lighthouse").unwrap()),
            options: VideoOptions {
                duration: 10,
                quality: Quality::P720,
                aspect_ratio: AspectRatio::Landscape,
                style: None,
                seed: 1,
                engine: None,
                source_file_id: None,
            },
            fingerprint: Some("f".to_owned()),
        }
    }

    fn output() -> Output {
        Output {
            file_id: FileId(Uuid::from_u128(9)),
            content_type: "video/mp4".to_owned(),
            size: 1,
            duration: 10.0,
            width: 1280,
            height: 720,
            poster_file_id: None,
            captions_file_id: None,
        }
    }

    fn ask() -> Command {
        Command::Request(request())
    }
    fn take(n: u128) -> Command {
        Command::Lease { lease_id: lease(n), worker_id: "w".to_owned() }
    }
    fn finish(n: u128) -> Command {
        Command::Complete { lease_id: lease(n), output: output() }
    }
    fn fail(n: u128) -> Command {
        Command::Fail { lease_id: lease(n), error: "boom".to_owned(), retryable: true }
    }
    fn cancel() -> Command {
        Command::Cancel { by: user("ada") }
    }

    /// Runs commands at their seconds; the last one's answer and the state's name.
    fn run(steps: &[(i64, Command)]) -> (Result<usize, Refusal>, &'static str) {
        let mut job = Job::default();
        let mut last = Ok(0);
        for (second, command) in steps {
            last = job.decide(command, at(*second)).map(|events| {
                for event in &events {
                    job.evolve(event);
                }
                events.len()
            });
        }
        let state = match &job {
            Job::Absent => "absent",
            Job::Requested(job) => job.phase.name(),
        };
        (last, state)
    }

    fn check(steps: &[(i64, Command)], then: Result<usize, Refusal>, state: &str) {
        assert_eq!(run(steps), (then, state), "{steps:?}");
    }

    #[test]
    fn a_request_is_leased_and_completed_once() {
        check(&[(0, ask())], Ok(1), "queued");
        check(&[(0, ask()), (0, ask())], Ok(0), "queued");
        check(&[(0, ask()), (1, take(1))], Ok(1), "running");
        check(&[(0, ask()), (1, take(1)), (2, finish(1))], Ok(1), "completed");
        check(&[(0, ask()), (1, take(1)), (2, finish(1)), (3, finish(1))], Ok(0), "completed");
        check(
            &[(0, ask()), (1, take(1)), (1, take(2))],
            Err(Refusal::NotLeasable("running")),
            "running",
        );
    }

    #[test]
    fn another_request_under_the_same_key_is_refused() {
        let other = Request { fingerprint: Some("g".to_owned()), ..request() };
        check(&[(0, ask()), (0, Command::Request(other))], Err(Refusal::KeyReused), "queued");
    }

    #[test]
    fn a_late_worker_changes_nothing() {
        let steps =
            [(0, ask()), (1, take(1)), (61, Command::Lapse), (62, take(2)), (63, finish(1))];
        check(&steps, Err(Refusal::LeaseLost), "running");
    }

    #[test]
    fn progress_renews_the_lease_and_never_falls() {
        let progress =
            |percent| Command::Progress { lease_id: lease(1), progress: percent, message: None };
        let steps = [(0, ask()), (1, take(1)), (50, progress(40)), (61, Command::Lapse)];
        check(&steps, Ok(0), "running");
        let job = Job::fold(&[
            Event::Requested(request()),
            Event::Leased {
                lease_id: lease(1),
                worker_id: "w".to_owned(),
                attempt: 1,
                expires_at: at(60),
            },
            Event::Progressed {
                lease_id: lease(1),
                progress: 40,
                message: None,
                expires_at: at(60),
            },
        ]);
        let events = job.decide(&progress(10), at(5)).unwrap();
        assert!(matches!(events[..], [Event::Progressed { progress: 40, .. }]));
    }

    #[test]
    fn three_attempts_with_growing_delay_and_then_failed() {
        let mut steps = vec![(0, ask()), (1, take(1)), (2, fail(1))];
        check(&steps, Ok(1), "retry_wait");
        steps.push((6, take(2)));
        check(&steps, Err(Refusal::NotLeasable("retry_wait")), "retry_wait");
        steps.extend([(7, take(2)), (8, fail(2))]);
        check(&steps, Ok(1), "retry_wait");
        steps.extend([(28, take(3)), (29, fail(3))]);
        check(&steps, Ok(2), "failed");
        steps.push((30, Command::Retry { by: user("ada") }));
        check(&steps, Ok(1), "queued");
    }

    #[test]
    fn a_lease_that_runs_out_three_times_fails_the_job() {
        let mut steps = vec![(0, ask())];
        for round in 0..3 {
            steps.extend([(round * 100, take(round as u128)), (round * 100 + 60, Command::Lapse)]);
        }
        check(&steps, Ok(2), "failed");
    }

    #[test]
    fn cancelling_a_running_job_waits_for_its_worker_or_its_lease() {
        check(&[(0, ask()), (0, cancel())], Ok(2), "cancelled");
        check(&[(0, ask()), (0, take(1)), (1, cancel())], Ok(1), "cancelling");
        check(&[(0, ask()), (0, take(1)), (1, cancel()), (2, finish(1))], Ok(1), "cancelled");
        check(&[(0, ask()), (0, take(1)), (1, cancel()), (61, Command::Lapse)], Ok(1), "cancelled");
        check(
            &[(0, ask()), (0, take(1)), (1, finish(1)), (2, cancel())],
            Err(Refusal::WrongState("completed")),
            "completed",
        );
    }

    #[test]
    fn somebody_elses_job_is_not_found() {
        let by = user("bob");
        check(
            &[(0, ask()), (0, Command::Cancel { by: by.clone() })],
            Err(Refusal::NotFound),
            "queued",
        );
        check(&[(0, ask()), (0, Command::Retry { by })], Err(Refusal::NotFound), "queued");
    }
}
