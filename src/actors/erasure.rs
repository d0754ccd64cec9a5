//! Erases what is left of deleted users: their keys first, and with them what the log says; then
//! what lies outside it. It looks at who is deleted and at who has a tombstone, so that it goes on
//! where a crash broke it off, and follows `t2m erase` beside a running server. What is left in the
//! pages of the read model is the renewal's.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use actix::Arbiter;

use super::System;
use super::codec::{Metadata, Source};
use super::dead_letters::DeadLetters;
use super::keyring;
use super::supervise::supervise;
use crate::domain::file::{Command as FileCommand, Reason};
use crate::domain::ids::{FileId, UserId};
use crate::domain::job::Command as JobCommand;
use crate::domain::user::Command;
use crate::media::blobs;
use crate::media::uploads::Uploads;
use crate::views;

/// How often it looks for tombstones; the read model's movement wakes it sooner.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// Movements come in bursts.
const AT_MOST_EVERY: Duration = Duration::from_secs(1);
/// Users, and files of one of them, that it takes up in one look at the most.
const AT_ONCE: usize = 500;

pub struct Eraser {
    pub system: Arc<System>,
    pub letters: DeadLetters,
    pub uploads: Arc<Uploads>,
    /// For jobs whose workers have yet to hear that it is over; none where a timekeeper sees to them.
    last_word: Option<JobCommand>,
    progress: Seen,
}

/// What this process has seen to. After a start everything is looked at anew: it costs a few calls
/// a deleted user, and brings the tombstones to a key that a backup has brought back.
#[derive(Default)]
struct Seen {
    /// Up to which deletion.
    position: u64,
    /// Deleted, and not all of it gone; by the position of the deletion.
    pending: BTreeMap<u64, UserId>,
    erased: HashSet<UserId>,
    /// Letters kept when they were last gone through.
    letters: Option<usize>,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Keys(#[from] keyring::Error),
    #[error(transparent)]
    Views(#[from] views::Error),
    #[error("the dead letters: {0}")]
    Letters(#[from] blobs::Error),
}

impl Eraser {
    pub fn new(system: Arc<System>, letters: DeadLetters, uploads: Arc<Uploads>) -> Self {
        Self { system, letters, uploads, last_word: None, progress: Seen::default() }
    }

    /// For where no timekeeper runs: what a job that is to end is told, that time has passed or that
    /// nobody works on it any more.
    pub fn with_last_word(mut self, command: JobCommand) -> Self {
        self.last_word = Some(command);
        self
    }

    /// Looks for as long as the actix system runs, on a thread of its own.
    pub fn start(self) {
        Arbiter::new().spawn(supervise("erasure", move || self.anew().keep_looking()));
    }

    /// One that has seen to nothing yet.
    fn anew(&self) -> Self {
        let Self { system, letters, uploads, last_word, progress: _ } = self;
        let fresh = Self::new(Arc::clone(system), letters.clone(), Arc::clone(uploads));
        Self { last_word: last_word.clone(), ..fresh }
    }

    async fn keep_looking(mut self) {
        let mut moved = self.system.progress.clone();
        loop {
            if let Err(error) = self.look().await {
                tracing::warn!(%error, "not everything of deleted users could be erased");
            }
            tokio::time::sleep(AT_MOST_EVERY).await;
            let _ = tokio::time::timeout(LOOK_EVERY - AT_MOST_EVERY, moved.moved()).await;
        }
    }

    /// Erases what is to be erased now, and says of how many users something is left for the next
    /// look. What cannot be erased of one user holds up nobody else.
    ///
    /// # Errors
    /// The store or the read model cannot be read or changed; the first error, if there are several.
    pub async fn look(&mut self) -> Result<usize, Error> {
        let (undeleted, mut failed) = self.follow_tombstones().await?;
        loop {
            let deleted = self.system.views.users_deleted_after(self.progress.position, AT_ONCE)?;
            let Some((last, _)) = deleted.last() else { break };
            self.progress.position = *last;
            self.progress.pending.extend(deleted);
        }
        self.stop_their_jobs().await?;
        for (position, user) in self.progress.pending.clone() {
            let erased = match self.erase(&user).await {
                Ok(erased) => erased,
                Err(error) => {
                    failed.get_or_insert(error);
                    continue;
                }
            };
            if self.progress.erased.insert(user) {
                self.progress.letters = None;
            }
            if erased {
                self.progress.pending.remove(&position);
            }
        }
        self.forget_letters().await?;
        match failed {
            Some(error) => Err(error),
            None => Ok(undeleted + self.progress.pending.len()),
        }
    }

    /// An operator has erased somebody: the key is gone already, now the user is deleted. Says of
    /// how many that does not show yet, and what failed first.
    async fn follow_tombstones(&mut self) -> Result<(usize, Option<Error>), Error> {
        let system = &self.system;
        let is_deleted =
            |user: &UserId| system.views.user_standing(user).is_some_and(|it| it.deleted);
        let (mut undeleted, mut failed) = (0, None);
        for user in system.keyring.erased().await? {
            if self.progress.erased.contains(&user) {
                continue;
            }
            // Also forgets the key that this process still knows.
            if let Err(error) = system.keyring.destroy(&user, system.clock.now()).await {
                failed.get_or_insert(Error::from(error));
                continue;
            }
            if is_deleted(&user) {
                continue;
            }
            let origin = Metadata::by("erasure", Source::System);
            match system.users.execute(&user, Command::Delete, origin).await {
                Ok(done) => drop(system.visible(done.position).await),
                Err(error) => tracing::warn!(%error, "an erased user could not be deleted"),
            }
            undeleted += usize::from(!is_deleted(&user));
        }
        Ok((undeleted, failed))
    }

    /// Nobody works on anything of theirs any more; and what was stored while that was still going on
    /// goes too, whenever it comes.
    async fn stop_their_jobs(&self) -> Result<(), Error> {
        let system = &self.system;
        for (user, job_id) in system.views.open_jobs_of_gone_users(AT_ONCE)? {
            let origin = Metadata::by("erasure", Source::System);
            let cancel = JobCommand::Cancel { by: user };
            if let Err(error) = system.jobs.execute(job_id, cancel, origin).await {
                tracing::warn!(%job_id, %error, "a deleted user's job could not be cancelled");
            }
        }
        if let Some(last_word) = &self.last_word {
            for job_id in system.views.ending_jobs_of_gone_users(AT_ONCE)? {
                let origin = Metadata::by("erasure", Source::System);
                if let Err(error) = system.jobs.execute(job_id, last_word.clone(), origin).await {
                    tracing::warn!(%job_id, %error, "a deleted user's job could not be ended");
                }
            }
        }
        self.remove(&system.views.files_of_gone_users(AT_ONCE)?).await;
        Ok(())
    }

    async fn remove(&self, files: &[FileId]) {
        for file_id in files {
            let origin = Metadata::by("erasure", Source::System);
            let remove = FileCommand::Remove { reason: Reason::OwnerDeleted };
            if let Err(error) = self.system.files.execute(file_id, remove, origin).await {
                tracing::warn!(%file_id, %error, "a deleted user's file could not be removed");
            }
        }
    }

    /// Says whether nothing is left that this look could not take.
    async fn erase(&self, user: &UserId) -> Result<bool, Error> {
        let system = &self.system;
        system.keyring.destroy(user, system.clock.now()).await?;
        let uploads_are_gone = self.uploads.end_of(user).await;
        let files = system.views.file_ids_of(user, AT_ONCE)?;
        self.remove(&files).await;
        Ok(uploads_are_gone && files.is_empty() && !system.views.has_open_jobs(user)?)
    }

    /// Goes through the letters when somebody new was erased, or a new letter has come.
    async fn forget_letters(&mut self) -> Result<(), Error> {
        let kept = self.letters.kept();
        if self.progress.letters != Some(kept) && !self.progress.erased.is_empty() {
            self.letters.forget(&self.progress.erased).await?;
            self.progress.letters = Some(kept);
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "erasure_tests.rs"]
mod tests;
