//! The secrets that jobs bring along: kept in the vault until the job ends, handed to whoever works
//! on it, and destroyed by looking at which jobs have ended, so that no crash keeps one alive.

use std::sync::Arc;
use std::time::Duration;

use actix::Arbiter;
use chrono::TimeDelta;
use uuid::Uuid;

use super::System;
use super::supervise::supervise;
use crate::config::Secret;
use crate::domain::ids::JobId;
use crate::media::vault::{self, Vault};
use crate::views::View;

/// Where they lie in the object store.
pub const SECRETS: &str = "secrets";
/// The longest that it sleeps; the read model's movement wakes it sooner.
const LOOK_EVERY: Duration = Duration::from_secs(60);
/// Movements come in bursts, and a look lists the whole folder.
const AT_MOST_EVERY: Duration = Duration::from_secs(1);
/// The longest that it waits for the read model before it spares those whose jobs it does not find.
const CAUGHT_UP_WITHIN: Duration = Duration::from_secs(10);
/// A secret is sealed before its job is in the log. One whose job has not come by then was left by
/// a request that failed in between. Longer than clocks of two nodes may differ.
const WAIT_FOR_JOB: TimeDelta = TimeDelta::hours(24);

/// The jobs' part of the vault. Cheap to clone.
#[derive(Clone)]
pub struct Secrets(Vault);

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Vault(#[from] vault::Error),
    #[error(transparent)]
    Views(#[from] crate::views::Error),
    #[error(transparent)]
    Log(#[from] crate::log::Error),
}

impl Secrets {
    pub fn new(vault: Vault) -> Self {
        Self(vault)
    }

    /// Seals a job's secret; before the job is in the log, so that no worker misses it.
    ///
    /// # Errors
    /// It could not be sealed or stored.
    pub async fn keep(&self, job_id: JobId, secret: &Secret) -> Result<(), vault::Error> {
        self.0.seal(&name(job_id), secret.reveal().as_bytes()).await
    }

    /// For the lease of the job, and nothing else. None once it was destroyed.
    ///
    /// # Errors
    /// It could not be read or opened.
    pub async fn of_job(&self, job_id: JobId) -> Result<Option<Secret>, vault::Error> {
        let Some(bytes) = self.0.open(&name(job_id)).await? else { return Ok(None) };
        let text = String::from_utf8(bytes).map_err(|_| vault::Error::Unopenable)?;
        Ok(Some(Secret::from(text)))
    }

    /// Destroys the secrets of jobs that have ended or whose user is gone, on a thread of its own.
    pub fn start(self, system: Arc<System>) {
        let keep = move || self.clone().keep_few(Arc::clone(&system));
        Arbiter::new().spawn(supervise("secrets", keep));
    }

    async fn keep_few(self, system: Arc<System>) {
        let mut progress = system.progress.clone();
        loop {
            if let Err(error) = self.look(&system).await {
                tracing::warn!(%error, "the secrets of ended jobs could not be destroyed");
            }
            tokio::time::sleep(AT_MOST_EVERY).await;
            let _ = tokio::time::timeout(LOOK_EVERY, progress.moved()).await;
        }
    }

    /// Acts on every secret whose time is over.
    ///
    /// # Errors
    /// The vault or the read model cannot be read; the next look goes on.
    pub async fn look(&self, system: &System) -> Result<(), Error> {
        let secrets = self.0.list().await?;
        // A job that its view does not show yet is not one that never came: the view may be parked,
        // or have been begun anew. Nor is this node's word enough that it is not behind: cut off from
        // the log, but not from the store, it would not know.
        if secrets.is_empty() {
            return Ok(());
        }
        let head = system.log.end().await?;
        let reached = system.progress.reached(head, Some(View::Jobs), CAUGHT_UP_WITHIN);
        let behind = reached.await.is_err();
        for secret in secrets {
            let alive = match job_of(&secret.name) {
                Some(job_id) => system.views.job_is_alive(&job_id)?,
                None => continue,
            };
            let old = secret.written_at + WAIT_FOR_JOB < system.clock.now();
            if alive == Some(false) || (alive.is_none() && old && !behind) {
                self.0.destroy(&secret.name).await?;
            }
        }
        Ok(())
    }
}

fn name(job_id: JobId) -> String {
    format!("job-{job_id}")
}

fn job_of(name: &str) -> Option<JobId> {
    Uuid::try_parse(name.strip_prefix("job-")?).ok().map(JobId)
}
