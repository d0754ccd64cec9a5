//! What becomes of bytes: uploads that nobody finishes end, outputs go when their time is over,
//! and what no file refers to any more leaves the store. It looks at what is there and at what the
//! read model says, and acts on the difference; nothing is lost when a look is missed.

use std::sync::Arc;
use std::time::Duration;

use actix::Arbiter;

use super::System;
use super::codec::{Metadata, Source};
use super::outputs::Outputs;
use super::supervise::supervise;
use crate::config::Retention;
use crate::domain::file::{Command, Reason};
use crate::domain::ids::{FileId, JobId};
use crate::domain::job::{self, Job, Phase};
use crate::domain::tier::Tier;
use crate::log;
use crate::media::aside::GRACE;
use crate::media::blobs::{self, Blobs};
use crate::media::uploads::Uploads;
use crate::views::{self, View};

/// How often it looks at what time has brought about.
const EVERY: Duration = Duration::from_secs(10);
/// How many such looks pass until it goes through the whole store: an hour.
const LOOKS: u32 = 360;
/// What it deletes in one look at the most; the rest waits for the next.
const AT_ONCE: usize = 500;
/// The longest it waits for the read model before it leaves the store alone.
const CAUGHT_UP_WITHIN: Duration = Duration::from_secs(10);

pub struct Storekeeper {
    pub system: Arc<System>,
    pub blobs: Arc<Blobs>,
    pub uploads: Arc<Uploads>,
    pub retention: Retention,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Views(#[from] views::Error),
    #[error(transparent)]
    Blobs(#[from] blobs::Error),
    #[error(transparent)]
    Log(#[from] log::Error),
}

/// What a walk through the store has done, in blobs.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Reconciled {
    pub put_aside: usize,
    pub brought_back: usize,
    pub destroyed: usize,
}

impl Storekeeper {
    /// Looks for as long as the actix system runs, on a thread of its own.
    pub fn start(self) {
        let keeper = Arc::new(self);
        Arbiter::new().spawn(supervise("storekeeper", move || Arc::clone(&keeper).keep_store()));
    }

    async fn keep_store(self: Arc<Self>) {
        for number in 0_u32.. {
            if let Err(error) = self.look().await {
                tracing::warn!(%error, "the storekeeper could not look");
            }
            if number.is_multiple_of(LOOKS)
                && let Err(error) = self.reconcile().await
            {
                tracing::warn!(%error, "the storekeeper could not go through the store");
            }
            tokio::time::sleep(EVERY).await;
        }
    }

    /// Ends uploads and outputs whose time is over.
    ///
    /// # Errors
    /// The read model cannot be read. What the log cannot take is tried again at the next look.
    pub async fn look(&self) -> Result<(), Error> {
        let now = self.system.clock.now();
        self.uploads.sweep(now).await;
        for tier in Tier::ALL {
            let Some(kept) = *tier.pick(&self.retention) else { continue };
            let over = self.system.views.outputs_before(tier, now - kept, AT_ONCE)?;
            self.remove(over, Reason::Expired).await;
        }
        Ok(())
    }

    /// Goes through the whole store and moves what no file refers to one step further out of it.
    /// [`crate::media::aside`] says why no upload loses its bytes over this.
    ///
    /// # Errors
    /// The store, the log or the read model cannot be read; what was done until then is sound.
    pub async fn reconcile(&self) -> Result<Reconciled, Error> {
        let mut done = Reconciled::default();
        let system = &self.system;
        self.remove(system.views.files_of_gone_users(AT_ONCE)?, Reason::OwnerDeleted).await;
        let now = system.clock.now();
        let (aside, old) = (self.blobs.all_aside().await?, self.blobs.old(now).await?);
        let outputs = Outputs::new(&self.blobs);
        let noted = outputs.noted().await?;
        // A file that the log knows and the read model does not know yet must count: the store is
        // left alone while the read model is behind, is being rebuilt, or is parked. A node that is
        // cut off from the log, but not from the store, would believe that it is not behind: this
        // asks the log itself.
        let head = system.log.end().await?;
        if system.progress.reached(head, Some(View::Files), CAUGHT_UP_WITHIN).await.is_err() {
            tracing::warn!("the read model is behind: nothing is removed from the store");
            return Ok(done);
        }
        // Another view, which may be parked while that of the files is not.
        if system.progress.reached(head, Some(View::Jobs), CAUGHT_UP_WITHIN).await.is_ok() {
            self.remove_failed_outputs().await?;
            // It knows the lease that each was handed in under. A job that it does not know has gone
            // with its user.
            let is_over =
                |id| system.views.job_is_alive(&id).is_ok_and(|alive| alive != Some(true));
            outputs.sweep_these(noted, is_over).await?;
        }
        // Before the read model is asked: what ends meanwhile is a file there by then.
        let uploaded = self.uploads.blobs();
        let is_needed = |sha256: &String| -> Result<bool, Error> {
            Ok(uploaded.contains(sha256) || system.views.blob_referrers(sha256)? > 0)
        };
        for found in aside {
            let needed = is_needed(&found.sha256)?;
            if needed && self.blobs.bring_back(&found.sha256).await? {
                done.brought_back += 1;
            } else if now - found.since >= GRACE {
                self.blobs.destroy(&found).await?;
                done.destroyed += usize::from(!needed);
            }
        }
        for sha256 in old {
            if !is_needed(&sha256)? {
                self.blobs.put_aside(&sha256, now).await?;
                done.put_aside += 1;
            }
        }
        self.blobs.sweep_abandoned(now).await?;
        if done != Reconciled::default() {
            tracing::info!(?done, "the store was reconciled");
        }
        Ok(done)
    }

    /// Removes what broken completions have left of jobs that came to nothing. Each job is asked
    /// itself: a removal stands for ever, and what the read model says may be older than a retry.
    async fn remove_failed_outputs(&self) -> Result<(), Error> {
        for (file_id, job_id) in self.system.views.files_of_failed_jobs(AT_ONCE)? {
            if self.came_to_nothing(job_id).await {
                self.remove(vec![file_id], Reason::Expired).await;
            }
        }
        Ok(())
    }

    /// For good, as far as its files go: a retry stores its own under a new lease.
    async fn came_to_nothing(&self, job_id: JobId) -> bool {
        match self.system.jobs.execute(job_id, job::Command::Look, origin()).await {
            Ok(found) => {
                let Job::Requested(job) = found.state else { return false };
                matches!(job.phase, Phase::Failed | Phase::Cancelled)
            }
            Err(error) => {
                tracing::warn!(%job_id, %error, "a job could not be asked about its files");
                false
            }
        }
    }

    async fn remove(&self, files: Vec<FileId>, reason: Reason) {
        for file_id in files {
            let command = Command::Remove { reason };
            if let Err(error) = self.system.files.execute(file_id, command, origin()).await {
                tracing::warn!(%file_id, %error, "a file could not be removed");
            }
        }
    }
}

fn origin() -> Metadata {
    Metadata::by("storekeeper", Source::System)
}

#[cfg(test)]
#[path = "storekeeper_tests.rs"]
mod tests;
