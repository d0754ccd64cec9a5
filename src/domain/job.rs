//! A job: from a request to its one outcome, through leases that each let one worker try.

use chrono::{DateTime, TimeDelta, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::ids::{FileId, LeaseId, UserId};
use super::text::{Personal, Prompt, Visit};
use super::tier::{Class, Tier};
use super::{Aggregate, moment};

mod options;
mod progressing;

pub use options::{AspectRatio, Options, Quality, VideoOptions};

/// Attempts a job gets before it fails for good.
pub const MAX_ATTEMPTS: u32 = 3;
/// How long a lease lasts unless progress renews it.
pub const LEASE: TimeDelta = TimeDelta::seconds(60);
/// How long an attempt may take; no progress renews its lease beyond that.
pub const LONGEST_ATTEMPT: TimeDelta = TimeDelta::minutes(60);
/// How far the clock that set a lease's end may have been ahead of the one that judges it, of another
/// node or of this one before it was put right, and the lease still runs its time.
pub const CLOCK_AHEAD: TimeDelta = TimeDelta::hours(1);
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
            Options::Video(options) => {
                if let Some(style) = &mut options.style {
                    visit("options.style", style);
                }
            }
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
    /// Nobody is there to work under the lease or to tell of it, however long it lasts: no server
    /// runs on the log. A job that was only waiting for that is cancelled.
    Abandon,
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
    pub worker_id: String,
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
            (Self::Requested(job), Command::Abandon) => Ok(job.abandon()),
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

/// Whether the end of a lease or of a delay has come. No such end lies further ahead than a minute:
/// one that seems to lie beyond [`CLOCK_AHEAD`] was set by a clock that was ahead and has been put
/// right, and would hold the job for as long as that.
pub fn has_come(end: DateTime<Utc>, now: DateTime<Utc>) -> bool {
    end <= now || end > now + CLOCK_AHEAD
}

#[cfg(test)]
pub(crate) mod tests;
