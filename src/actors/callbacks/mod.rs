//! Tells callers that their jobs have ended, at the address that each job names.
//!
//! It follows the log to find the ends of jobs, and keeps what has become of each callback as a
//! document beside the blobs. Neither is the read model: one that is rebuilt sends nothing again. A
//! crash makes it look again at what it had not noted, so that a callback may come twice, under the
//! same `webhook-id`, and is never lost: at least once. Where several nodes follow one log, each
//! notes the same, and the one that claims a job first sends (`claims`).

pub mod address;
mod claims;
mod follower;
pub mod record;
pub mod sender;

use std::sync::Arc;
use std::time::Duration;

use chrono::TimeDelta;
use serde_json::Value;

use super::System;
use super::codec::{Metadata, Source};
use super::entity::Failure;
use crate::domain::ids::JobId;
use crate::domain::job::{self, Command, Job};
use crate::media::blobs::{self, Blobs};
use crate::media::documents::Documents;
use crate::views::{self, JobRow};

use claims::Claims;
pub use follower::{Delivery, start};
use record::Record;

/// How long it is known what became of a callback; an end that is older is told no more.
const KEPT_FOR: TimeDelta = TimeDelta::days(30);

/// A job as its owner sees it, for the body of a callback.
pub type Show = Arc<dyn Fn(&JobRow) -> Result<Value, views::Error> + Send + Sync>;

/// What is known of callbacks. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Callbacks {
    /// One document a job.
    records: Documents,
    /// The names of those in which something waits, so that a start need not read them all.
    waiting: Documents,
    /// Which node sends what.
    claims: Claims,
    allow_private: bool,
    /// False when there is nothing to sign them with: then none is accepted.
    enabled: bool,
    /// When each attempt is made, after the one before it.
    delays: Arc<[Duration]>,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Log(#[from] crate::log::Error),
    #[error(transparent)]
    Blobs(#[from] blobs::Error),
    #[error(transparent)]
    Views(#[from] views::Error),
    #[error(transparent)]
    Job(#[from] Failure<job::Refusal>),
    #[error("keeping the position in the log: {0}")]
    Checkpoint(#[from] std::io::Error),
    #[error("a job cannot be shown: {0}")]
    Json(#[from] serde_json::Error),
}

impl Callbacks {
    pub fn new(blobs: &Blobs, allow_private: bool, enabled: bool, delays: Vec<Duration>) -> Self {
        Self {
            records: blobs.documents("callbacks"),
            waiting: blobs.documents("callbacks-waiting"),
            claims: Claims::new(blobs.documents("callbacks-claims")),
            allow_private,
            enabled,
            delays: delays.into(),
        }
    }

    /// Looks at a URL that a caller gives.
    ///
    /// # Errors
    /// What is wrong with it, in words that follow the field's name.
    pub fn check(&self, url: &str) -> Result<(), String> {
        if !self.enabled {
            return Err("cannot be used: this server has no secret to sign callbacks".to_owned());
        }
        address::check(url, self.allow_private).map(drop).map_err(|fault| fault.to_string())
    }

    /// What has become of a job's callbacks; none before its end.
    ///
    /// # Errors
    /// The store cannot be read.
    pub async fn of_job(&self, job_id: JobId) -> Result<Option<Record>, blobs::Error> {
        let Some(bytes) = self.records.get(&name(job_id)).await? else { return Ok(None) };
        let record = serde_json::from_slice(&bytes);
        Ok(record.inspect_err(|error| tracing::warn!(%job_id, %error, "not a record")).ok())
    }

    /// The first record of a job; false if another node has written one.
    async fn keep_first(&self, job_id: JobId, record: &Record) -> Result<bool, Error> {
        Ok(self.records.create(&name(job_id), serde_json::to_vec_pretty(record)?).await?)
    }

    async fn keep(&self, job_id: JobId, record: &Record) -> Result<(), Error> {
        Ok(self.records.put(&name(job_id), serde_json::to_vec_pretty(record)?).await?)
    }

    /// Drops records that are old.
    async fn trim(&self, system: &System) -> Result<(), blobs::Error> {
        let now = system.clock.now();
        for old in self.records.list().await?.iter().rev() {
            if now - old.written_at < KEPT_FOR {
                break;
            }
            self.records.delete(&old.name).await?;
        }
        Ok(())
    }
}

/// The address that a job names. It is read from the job itself, which alone holds it.
///
/// # Errors
/// The job cannot be read.
pub async fn url_of(system: &System, job_id: JobId) -> Result<Option<String>, Error> {
    let origin = Metadata::by("callbacks", Source::System);
    match system.jobs.execute(job_id, Command::Look, origin).await {
        Ok(done) => Ok(match done.state {
            Job::Requested(job) => job.request.callback_url.and_then(|url| url.known().cloned()),
            Job::Absent => None,
        }),
        Err(Failure::Refused(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn name(job_id: JobId) -> String {
    format!("{job_id}.json")
}
