//! A job: from a request to its one outcome, through leases that each let one worker try.

use chrono::{DateTime, TimeDelta, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::ids::{FileId, LeaseId, UserId};
use super::text::{Personal, Prompt, Visit};
use super::tier::{Class, Tier};
use super::{Aggregate, moment};

mod options;

pub use options::{AspectRatio, Options, Quality, VideoOptions};

/// Attempts a job gets before it fails for good.
pub const MAX_ATTEMPTS: u32 = 3;
/// How long a lease lasts unless progress renews it.
pub const LEASE: TimeDelta = TimeDelta::seconds(60);
/// How long an attempt may take; no progress renews its lease beyond that.
pub const LONGEST_ATTEMPT: TimeDelta = TimeDelta::minutes(60);
/// The error of a job whose deadline has passed begins with it.
pub const DEADLINE_EXCEEDED: &str = "deadline_exceeded";

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", content = "data")]
pub enum Event {
    #[serde(rename = "job.requested.v1")]
    Requested(Box<Request>),
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
        #[serde(deserialize_with = "moment::deserialize")]
        expires_at: DateTime<Utc>,
    },
    #[serde(rename = "job.lease_expired.v1")]
    LeaseExpired {
        lease_id: LeaseId,
        attempt: u32,
        /// Before its time, by a worker that was told to stop: the attempt does not count.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        given_back: bool,
    },
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
    /// What a video shall show; of a translation, the name of the file.
    pub prompt: Personal<Prompt>,
    pub options: Options,
    /// The user's at the time of the request; absent: `standard`.
    #[serde(default, skip_serializing_if = "Tier::is_standard")]
    pub tier: Tier,
    /// One of many that were asked for at once.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub batch: bool,
    /// Digest of the request that an `Idempotency-Key` came with, to tell a retry from a misuse.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<String>,
    /// Where to tell that the job has ended. It may hold a secret of its user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub callback_url: Option<Personal<String>>,
    /// When the job fails unless it has ended before; absent: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<DateTime<Utc>>,
}

impl Request {
    /// Whether its time is over.
    fn is_overdue(&self, now: DateTime<Utc>) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= now)
    }

    /// Among which jobs it takes its turn.
    pub fn class(&self) -> Class {
        Class::of(self.tier, self.batch)
    }

    /// The prompt; empty once it was erased with its user.
    pub fn prompt_text(&self) -> &str {
        self.prompt.known().map_or("", Prompt::as_str)
    }

    /// Every field is named, so that a new one is not forgotten here.
    fn personal(&mut self, visit: Visit<'_>) {
        let Self {
            prompt,
            options,
            callback_url,
            user_id: _,
            kind: _,
            tier: _,
            batch: _,
            fingerprint: _,
            deadline: _,
        } = self;
        visit("prompt", prompt);
        if let Some(url) = callback_url {
            visit("callback_url", url);
        }
        match options {
            Options::Video(_) => {}
            Options::Translation(options) => {
                if let Some(style) = &mut options.style_data {
                    visit("options.style_data", style);
                }
            }
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    Video,
    Translation,
}

impl Kind {
    pub const ALL: [Self; 2] = [Self::Video, Self::Translation];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Video => "video",
            Self::Translation => "translation",
        }
    }

    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == name)
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Output {
    pub file_id: FileId,
    pub content_type: String,
    /// In bytes.
    pub size: u64,
    /// Seconds; absent for what has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub width: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub height: Option<u32>,
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
    /// Is the lease still held? Nothing happens.
    Hold {
        lease_id: LeaseId,
    },
    /// Also the worker's heartbeat: it renews the lease. Of a job that is being cancelled nothing
    /// is recorded; the state tells the worker to stop.
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
    /// The worker was told to stop: the job goes on elsewhere, as if it had not begun.
    GiveBack {
        lease_id: LeaseId,
    },
    Cancel {
        by: UserId,
    },
    Retry {
        by: UserId,
    },
    /// Time has passed: take the lease back if it ran out, and end the job if its deadline has
    /// passed.
    Lapse,
    /// What is there? Nothing happens.
    Look,
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
    #[error("the job's secret was destroyed with its last attempt")]
    SecretGone,
    #[error("the job's deadline has passed")]
    DeadlineOver,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Job {
    #[default]
    Absent,
    Requested(Box<Progressing>),
}

/// A job that exists: what was asked for, and how far it is.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Progressing {
    pub request: Request,
    /// Attempts of this round; a retry by the user starts a new one.
    pub attempts: u32,
    pub phase: Phase,
    /// The lease that the job's deadline ended: its worker has yet to hear of it.
    pub cut_off: Option<LeaseId>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
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

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Lease {
    pub id: LeaseId,
    pub expires_at: DateTime<Utc>,
    /// When the attempt has taken too long.
    pub ends_at: DateTime<Utc>,
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
                Ok(vec![Event::Requested(Box::new(request.clone()))])
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
            (Self::Requested(job), Command::Hold { lease_id }) => job.hold(*lease_id),
            (Self::Requested(job), Command::Progress { lease_id, progress, message }) => {
                job.progress(*lease_id, *progress, message.as_deref(), now)
            }
            (Self::Requested(job), Command::Complete { lease_id, output }) => {
                job.complete(*lease_id, output)
            }
            (Self::Requested(job), Command::Fail { lease_id, error, retryable }) => {
                job.fail(*lease_id, error, *retryable, now)
            }
            (Self::Requested(job), Command::GiveBack { lease_id }) => job.give_back(*lease_id),
            (Self::Requested(job), Command::Cancel { by }) => job.cancel(by),
            (Self::Requested(job), Command::Retry { by }) => job.retry(by, now),
            (Self::Requested(job), Command::Lapse) => Ok(job.lapse(now)),
            (Self::Requested(_), Command::Look) => Ok(vec![]),
        }
    }

    fn evolve(&mut self, event: &Event) {
        if let Event::Requested(request) = event {
            *self = Self::Requested(Box::new(Progressing {
                request: Request::clone(request),
                attempts: 0,
                phase: Phase::Queued,
                cut_off: None,
            }));
            return;
        }
        if let Self::Requested(job) = self {
            job.evolve(event);
        }
    }

    fn personal(event: &mut Event, visit: Visit<'_>) {
        match event {
            Event::Requested(request) => request.personal(visit),
            Event::Leased { .. }
            | Event::Progressed { .. }
            | Event::LeaseExpired { .. }
            | Event::AttemptFailed { .. }
            | Event::CancelRequested { .. }
            | Event::Completed { .. }
            | Event::Failed { .. }
            | Event::Cancelled {}
            | Event::Retried { .. } => {}
        }
    }

    fn owner(_id: &str, event: &Event) -> Option<UserId> {
        match event {
            Event::Requested(request) => Some(request.user_id.clone()),
            Event::Leased { .. }
            | Event::Progressed { .. }
            | Event::LeaseExpired { .. }
            | Event::AttemptFailed { .. }
            | Event::CancelRequested { .. }
            | Event::Completed { .. }
            | Event::Failed { .. }
            | Event::Cancelled {}
            | Event::Retried { .. } => None,
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
        if !ready || self.request.is_overdue(now) {
            return Err(Refusal::NotLeasable(self.phase.name()));
        }
        Ok(vec![Event::Leased {
            lease_id,
            worker_id: worker_id.to_owned(),
            attempt: self.attempts + 1,
            expires_at: now + LEASE,
        }])
    }

    fn hold(&self, lease_id: LeaseId) -> Result<Vec<Event>, Refusal> {
        match &self.phase {
            Phase::Running(lease) | Phase::Cancelling(lease) if lease.id == lease_id => Ok(vec![]),
            _ => Err(Refusal::LeaseLost),
        }
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
                expires_at: (now + LEASE).min(lease.ends_at),
            }]),
            Phase::Cancelling(lease) if lease.id == lease_id => Ok(vec![]),
            _ if self.cut_off == Some(lease_id) => Ok(vec![]),
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
            _ if self.cut_off == Some(lease_id) => Ok(vec![]),
            _ => Err(Refusal::LeaseLost),
        }
    }

    fn give_back(&self, lease_id: LeaseId) -> Result<Vec<Event>, Refusal> {
        let attempt = self.attempts;
        match &self.phase {
            Phase::Running(lease) if lease.id == lease_id => {
                Ok(vec![Event::LeaseExpired { lease_id, attempt, given_back: true }])
            }
            Phase::Cancelling(lease) if lease.id == lease_id => Ok(vec![Event::Cancelled {}]),
            _ if self.cut_off == Some(lease_id) => Ok(vec![]),
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
        let mut events = vec![Event::AttemptFailed {
            lease_id,
            attempt: self.attempts,
            error: error.to_owned(),
            retry_at: again.then(|| now + delay_after(self.attempts, lease_id)),
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

    fn retry(&self, by: &UserId, now: DateTime<Utc>) -> Result<Vec<Event>, Refusal> {
        if *by != self.request.user_id {
            return Err(Refusal::NotFound);
        }
        match &self.phase {
            Phase::Failed | Phase::Cancelled if self.request.options.needs_secret() => {
                Err(Refusal::SecretGone)
            }
            Phase::Failed | Phase::Cancelled if self.request.is_overdue(now) => {
                Err(Refusal::DeadlineOver)
            }
            Phase::Failed | Phase::Cancelled => Ok(vec![Event::Retried { by: by.clone() }]),
            other => Err(Refusal::WrongState(other.name())),
        }
    }

    fn lapse(&self, now: DateTime<Utc>) -> Vec<Event> {
        match &self.phase {
            Phase::Queued | Phase::RetryWait { .. } | Phase::Running(_)
                if self.request.is_overdue(now) =>
            {
                let error = format!("{DEADLINE_EXCEEDED}: the job had not ended by its deadline");
                vec![Event::Failed { error }]
            }
            Phase::Running(lease) if lease.expires_at <= now => {
                let (lease_id, attempt) = (lease.id, self.attempts);
                let mut events = vec![Event::LeaseExpired { lease_id, attempt, given_back: false }];
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
                self.phase = Phase::Running(Lease {
                    id: *lease_id,
                    expires_at: *expires_at,
                    ends_at: *expires_at - LEASE + LONGEST_ATTEMPT,
                    progress: 0,
                });
            }
            Event::Progressed { progress, expires_at, .. } => {
                if let Phase::Running(lease) = &mut self.phase {
                    lease.progress = *progress;
                    lease.expires_at = *expires_at;
                }
            }
            Event::LeaseExpired { attempt, given_back, .. } => {
                self.attempts = attempt.saturating_sub(u32::from(*given_back));
                self.phase = Phase::Queued;
            }
            Event::AttemptFailed { retry_at, .. } => {
                self.phase = retry_at.map_or(Phase::Failed, |until| Phase::RetryWait { until });
            }
            Event::CancelRequested { .. } => {
                if let Phase::Running(lease) = &self.phase {
                    self.phase = Phase::Cancelling(lease.clone());
                }
            }
            Event::Completed { output, .. } => self.phase = Phase::Completed(output.clone()),
            Event::Failed { .. } => {
                // After an attempt that failed or lost its lease nobody runs any more.
                if let Phase::Running(lease) = &self.phase {
                    self.cut_off = Some(lease.id);
                }
                self.phase = Phase::Failed;
            }
            Event::Cancelled {} => self.phase = Phase::Cancelled,
            Event::Retried { .. } => {
                self.attempts = 0;
                self.phase = Phase::Queued;
            }
        }
    }
}

/// 5 s after the first attempt and four times as long after each further one; up to half of it is
/// added, so that jobs that failed together do not come again together. The lease's id, which is
/// another for each attempt, says how much.
fn delay_after(attempts: u32, lease_id: LeaseId) -> TimeDelta {
    let whole = 5_000 * 4_i64.pow(attempts.saturating_sub(1).min(5));
    let part = i64::from(lease_id.0.as_u128() as u16);
    TimeDelta::milliseconds(whole + whole * part / (2 * (1 << 16)))
}

#[cfg(test)]
mod tests;
