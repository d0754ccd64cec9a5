//! The life of a lease, for workers of every sort: taken, renewed by progress, ended by an outcome.
//! Every step is decided by the job itself and fenced by the lease: whoever lost it, by being slow,
//! frozen or cut off, changes nothing any more.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use tokio::sync::{Mutex, watch};
use tokio::time::Instant;

use super::System;
use super::codec::{Last, Metadata, Source};
use super::entity::{Executed, Failure};
use super::keyring;
use super::outputs::{Handed, Outputs, Slot, slots};
use super::projector::NotCaughtUp;
use crate::domain::file::{self, Stored};
use crate::domain::ids::{FileId, JobId, LeaseId, UserId, derived_id};
use crate::domain::job::{self, Command, Job, Kind, Options, Output, Phase, Request};
use crate::domain::text::Personal;
use crate::domain::tier::Caps;
use crate::log;
use crate::media::blobs::{self, Blobs};
use crate::media::renderer::output::translated_name;
use crate::media::vault;
use crate::views::View;

/// How often one look for a job is begun anew because another node took the one that was found.
const TRIES: usize = 8;
/// How many jobs that cannot be read one look finds at the most; the next one goes on behind them.
const UNREADABLE_AT_ONCE: usize = 64;
/// After how long one of them is tried again, and told of again.
const UNREADABLE_FOR: TimeDelta = TimeDelta::minutes(1);
/// The longest that a waiting worker sleeps: delays of failed attempts end without any event.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Gives jobs to workers and takes their results.
pub struct Leasing {
    system: Arc<System>,
    outputs: Outputs,
    caps: Caps,
    /// Held from the choice of a job until the read model knows that it is taken: two workers that
    /// ask at once get the first and the second in the order. It knows the jobs that could not be
    /// read, and when.
    turn: Mutex<HashMap<JobId, DateTime<Utc>>>,
}

/// One attempt in the hands of a worker.
#[derive(Debug, Clone)]
pub struct Leased {
    pub job_id: JobId,
    pub lease_id: LeaseId,
    /// From 1.
    pub attempt: u32,
    pub expires_at: DateTime<Utc>,
    pub request: Request,
    /// Where in the log the lease lies.
    pub position: u64,
    /// The event that gave the lease.
    pub last: Last,
}

impl Leased {
    /// The request that the job came from, if one is known.
    pub fn request_id(&self) -> Option<&str> {
        Some(&*self.last.correlation_id).filter(|id| !id.is_empty())
    }
}

/// What a worker's call came to, and where in the log that lies.
#[derive(Debug, Clone, PartialEq)]
pub struct Done<T> {
    pub outcome: T,
    pub position: u64,
    /// Whether it can be read already; it stands in any case.
    pub visible: Result<(), NotCaughtUp>,
}

/// What a worker learns when it reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Report {
    /// The user wants it stopped, or its deadline has passed: the worker ends it with a failure.
    pub cancelled: bool,
    pub expires_at: DateTime<Utc>,
}

/// What only the worker knows of what it made.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Shape {
    /// Seconds; absent for what has none.
    pub duration: Option<f64>,
    pub width: Option<u32>,
    pub height: Option<u32>,
}

/// How a completion ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Completed {
    Done(Output),
    /// The user had cancelled: what was made is thrown away.
    Cancelled,
}

/// Why a worker's call had no effect.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Job(#[from] Failure<job::Refusal>),
    #[error(transparent)]
    File(#[from] Failure<file::Refusal>),
    #[error(transparent)]
    Blobs(#[from] blobs::Error),
    #[error(transparent)]
    Views(#[from] crate::views::Error),
    /// The output that the job is about was not handed in under this lease.
    #[error("no output {0} was handed in")]
    OutputMissing(&'static str),
}

impl Error {
    fn lost() -> Self {
        Self::Job(Failure::Refused(job::Refusal::LeaseLost))
    }
}

impl Leasing {
    pub fn new(system: Arc<System>, blobs: &Blobs, caps: Caps) -> Self {
        Self { system, outputs: Outputs::new(blobs), caps, turn: Mutex::default() }
    }

    pub fn caps(&self) -> &Caps {
        &self.caps
    }

    /// Forgets outputs whose jobs ended without them; for the start.
    ///
    /// # Errors
    /// The store cannot be listed.
    pub async fn sweep(&self) -> Result<(), blobs::Error> {
        let views = &self.system.views;
        self.outputs.sweep(|id| matches!(views.job(&id), Ok(Some(job)) if job.is_over())).await
    }

    /// Takes the job whose turn it is for the worker that `origin` names; nothing when there is
    /// none. `skip` names jobs to pass over.
    ///
    /// # Errors
    /// [`Failure`], never a refusal: a job that another node took is passed over, and so is one
    /// that alone cannot be read.
    pub async fn lease(
        &self,
        origin: &Metadata,
        kinds: &[Kind],
        skip: impl Fn(JobId) -> bool,
    ) -> Result<Option<Leased>, Error> {
        let mut unreadable = self.turn.lock().await;
        let now = self.system.clock.now();
        // One from the future was noted by a clock that has been put right.
        unreadable.retain(|_, since| (*since..*since + UNREADABLE_FOR).contains(&now));
        let known = unreadable.len();
        let mut taken = HashSet::new();
        while taken.len() < TRIES && unreadable.len() - known < UNREADABLE_AT_ONCE {
            let now = self.system.clock.now();
            let passed = |id| taken.contains(&id) || unreadable.contains_key(&id) || skip(id);
            let found = self.system.views.next_job(now, &self.caps, kinds, passed);
            let Some(job_id) = found else { return Ok(None) };
            if self.system.views.is_of_gone_user(&job_id)? {
                // About to be cancelled: nobody gets to see it any more.
                taken.insert(job_id);
                continue;
            }
            let lease_id = LeaseId(self.system.clock.fresh_id());
            let command = Command::Lease { lease_id, worker_id: origin.actor.clone() };
            match self.execute(job_id, command, origin).await {
                Ok(done) => {
                    // Else the next look would find the same job still waiting. Where it takes too
                    // long, the worker gets its job nevertheless: nobody else would work on it until
                    // the lease runs out, and the attempt would be lost.
                    let _ = self.system.visible(done.position).await;
                    self.discard_leftovers(job_id, &[]).await?;
                    return Ok(leased(job_id, done));
                }
                Err(Failure::Refused(_)) => drop(taken.insert(job_id)),
                Err(error) if is_of_one_job(&error) => {
                    tracing::warn!(%job_id, %error, "a job that cannot be leased is passed over");
                    unreadable.insert(job_id, now);
                }
                Err(other) => return Err(other.into()),
            }
        }
        Ok(None)
    }

    /// The same, waiting for a job to come; gives up when `stopping` turns true.
    ///
    /// # Errors
    /// As [`Leasing::lease`].
    pub async fn lease_within(
        &self,
        origin: &Metadata,
        kinds: &[Kind],
        wait: Duration,
        mut stopping: watch::Receiver<bool>,
    ) -> Result<Option<Leased>, Error> {
        let mut progress = self.system.progress.clone();
        let until = Instant::now() + wait;
        loop {
            if let Some(leased) = self.lease(origin, kinds, |_| false).await? {
                return Ok(Some(leased));
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || *stopping.borrow_and_update() {
                return Ok(None);
            }
            tokio::select! {
                () = progress.moved() => {}
                () = tokio::time::sleep(left.min(LOOK_EVERY)) => {}
                _ = stopping.changed() => {}
            }
        }
    }

    /// Records how far an attempt is, and renews its lease.
    ///
    /// # Errors
    /// A lost lease is refused.
    pub async fn progress(
        &self,
        job_id: JobId,
        lease_id: LeaseId,
        origin: &Metadata,
        percent: u8,
        message: Option<String>,
    ) -> Result<Done<Report>, Error> {
        let command = Command::Progress { lease_id, progress: percent, message };
        let Executed { state, position, .. } = self.execute(job_id, command, origin).await?;
        let report = self.report(&state, lease_id)?;
        Ok(self.done(report, position).await)
    }

    /// Asks only whether an attempt is still wanted; nothing is recorded.
    ///
    /// # Errors
    /// A lost lease is refused.
    pub async fn look(&self, job_id: JobId, lease_id: LeaseId) -> Result<Report, Error> {
        let found = self.execute(job_id, Command::Look, &by("")).await?;
        self.report(&found.state, lease_id)
    }

    fn report(&self, job: &Job, lease_id: LeaseId) -> Result<Report, Error> {
        let Job::Requested(job) = job else { return Err(Error::lost()) };
        match &job.phase {
            Phase::Running(lease) if lease.id == lease_id => {
                Ok(Report { cancelled: false, expires_at: lease.expires_at })
            }
            Phase::Cancelling(lease) if lease.id == lease_id => {
                Ok(Report { cancelled: true, expires_at: lease.expires_at })
            }
            // The job's deadline has passed, and the worker hears of it now.
            _ if job.cut_off == Some(lease_id) => {
                Ok(Report { cancelled: true, expires_at: self.system.clock.now() })
            }
            _ => Err(Error::lost()),
        }
    }

    /// The worker that holds a lease, if it is held, and the last that happened to the job.
    pub async fn holder(&self, job_id: JobId, lease_id: LeaseId) -> Option<(String, Last)> {
        let found = self.execute(job_id, Command::Look, &by("")).await.ok()?;
        let Job::Requested(job) = found.state else { return None };
        match job.phase {
            Phase::Running(lease) | Phase::Cancelling(lease) if lease.id == lease_id => {
                Some((lease.worker_id, found.last.unwrap_or_default()))
            }
            _ => None,
        }
    }

    /// The request of a job whose lease is held, and the last that happened to it.
    ///
    /// # Errors
    /// A lost lease is refused.
    pub async fn hold(&self, job_id: JobId, lease_id: LeaseId) -> Result<(Request, Last), Error> {
        let done = self.execute(job_id, Command::Hold { lease_id }, &by("")).await?;
        match done.state {
            Job::Requested(job) => Ok((job.request, done.last.unwrap_or_default())),
            Job::Absent => Err(Error::lost()),
        }
    }

    /// Notes an output whose bytes are durable; nobody sees it before the job is completed.
    ///
    /// # Errors
    /// A lost lease is refused.
    pub async fn hand_in(
        &self,
        job_id: JobId,
        lease_id: LeaseId,
        slot: &Slot,
        handed: &Handed,
    ) -> Result<(), Error> {
        self.hold(job_id, lease_id).await?;
        Ok(self.outputs.note(job_id, lease_id, slot, handed).await?)
    }

    /// Completes a job with what was handed in under the lease. The same again answers the same.
    /// `shape` makes the shape of the output from the request.
    ///
    /// # Errors
    /// A lost lease is refused, and a completion without the output that the job is about.
    pub async fn complete(
        &self,
        job_id: JobId,
        lease_id: LeaseId,
        origin: &Metadata,
        shape: impl FnOnce(&Request) -> Shape,
    ) -> Result<Done<Completed>, Error> {
        let (request, last) = match self.hold(job_id, lease_id).await {
            Ok(held) => held,
            Err(error) => return self.completed_before(job_id, lease_id).await?.ok_or(error),
        };
        let handed = self.outputs.of(request.kind, job_id, lease_id).await?;
        let (shape, origin) = (shape(&request), origin.after(&last));
        let done = self.finish(job_id, lease_id, &origin, &request, &handed, shape).await?;
        self.outputs.forget(request.kind, job_id, lease_id).await;
        Ok(done)
    }

    /// Completes a job with these outputs: first the files, then the job that refers to them.
    ///
    /// # Errors
    /// As [`Leasing::complete`].
    pub async fn finish(
        &self,
        job_id: JobId,
        lease_id: LeaseId,
        origin: &Metadata,
        request: &Request,
        handed: &[(&'static Slot, Handed)],
        shape: Shape,
    ) -> Result<Done<Completed>, Error> {
        let find = |slot: &Slot| handed.iter().find(|(it, _)| it.name == slot.name);
        let file_of = |name: &str| {
            handed
                .iter()
                .find(|(slot, _)| slot.name == name)
                .map(|(slot, _)| output_id(&request.user_id, lease_id, slot))
        };
        let main = slots(request.kind).first().expect("each kind has an output");
        let Some((_, about)) = find(main) else { return Err(Error::OutputMissing(main.name)) };
        for (slot, handed) in handed {
            self.keep(job_id, lease_id, origin, request, slot, handed).await?;
        }
        let output = Output {
            file_id: output_id(&request.user_id, lease_id, main),
            content_type: about.content_type.clone(),
            size: about.size,
            duration: shape.duration,
            width: shape.width,
            height: shape.height,
            poster_file_id: file_of("poster"),
            captions_file_id: file_of("captions"),
        };
        let command = Command::Complete { lease_id, output: output.clone() };
        let outcome = self.execute(job_id, command, origin).await;
        let kept = match &outcome {
            Ok(done) => is_completed(&done.state),
            // Another call under the same lease may have completed it, with another shape.
            Err(Failure::Refused(_)) => {
                !matches!(self.completed_before(job_id, lease_id).await, Ok(None))
            }
            // Whether it was recorded is not known: the worker asks again, or the lease runs out
            // and the next attempt clears up, or else the storekeeper.
            Err(_) => true,
        };
        let files = handed.iter().map(|(slot, _)| output_id(&request.user_id, lease_id, slot));
        let files: Vec<FileId> = files.collect();
        if !kept {
            self.discard(&request.user_id, &files).await;
        }
        let position = outcome?.position;
        if !kept {
            return Ok(self.done(Completed::Cancelled, position).await);
        }
        let done = self.done(Completed::Done(output), position).await;
        self.discard_leftovers(job_id, &files).await?;
        Ok(done)
    }

    /// Ends an attempt without a result; gives the state of the job after it.
    ///
    /// # Errors
    /// A lost lease is refused.
    pub async fn fail(
        &self,
        job_id: JobId,
        lease_id: LeaseId,
        origin: &Metadata,
        error: String,
        retryable: bool,
    ) -> Result<Done<&'static str>, Error> {
        let command = Command::Fail { lease_id, error, retryable };
        self.end(job_id, lease_id, command, origin).await
    }

    /// Ends an attempt before its end, as the worker is told to stop: the job goes on with the next
    /// worker at once, and the attempt does not count. Gives the state of the job after it.
    ///
    /// # Errors
    /// A lost lease is refused.
    pub async fn give_back(
        &self,
        job_id: JobId,
        lease_id: LeaseId,
        origin: &Metadata,
    ) -> Result<Done<&'static str>, Error> {
        self.end(job_id, lease_id, Command::GiveBack { lease_id }, origin).await
    }

    /// Ends an attempt without a result.
    async fn end(
        &self,
        job_id: JobId,
        lease_id: LeaseId,
        command: Command,
        origin: &Metadata,
    ) -> Result<Done<&'static str>, Error> {
        let Executed { state, position, .. } = self.execute(job_id, command, origin).await?;
        let Job::Requested(job) = state else { return Err(Error::lost()) };
        let done = self.done(job.phase.name(), position).await;
        self.outputs.forget(job.request.kind, job_id, lease_id).await;
        Ok(done)
    }

    /// The answer to a completion whose first answer was lost: the output's id names the lease. The
    /// job itself is asked, for the first answer may have been that it cannot be read yet.
    async fn completed_before(
        &self,
        job_id: JobId,
        lease_id: LeaseId,
    ) -> Result<Option<Done<Completed>>, Error> {
        let found = self.execute(job_id, Command::Look, &by("")).await?;
        let Job::Requested(job) = found.state else { return Ok(None) };
        let Phase::Completed(output) = job.phase else { return Ok(None) };
        let main = slots(job.request.kind).first().expect("each kind has an output");
        if output.file_id != output_id(&job.request.user_id, lease_id, main) {
            return Ok(None);
        }
        Ok(Some(self.done(Completed::Done(output), found.position).await))
    }

    /// Who asks once this is answered must see it.
    async fn done<T>(&self, outcome: T, position: u64) -> Done<T> {
        let visible = self.system.visible_in(View::Jobs, position).await;
        Done { outcome, position, visible }
    }

    async fn keep(
        &self,
        job_id: JobId,
        lease_id: LeaseId,
        origin: &Metadata,
        request: &Request,
        slot: &Slot,
        handed: &Handed,
    ) -> Result<(), Error> {
        let file = Stored {
            user_id: request.user_id.clone(),
            filename: Personal::Known(filename(request, slot, handed)),
            content_type: handed.content_type.clone(),
            size: handed.size,
            sha256: handed.sha256.clone(),
            metadata: Personal::default(),
            job_id: Some(job_id),
            fingerprint: None,
        };
        let file_id = output_id(&request.user_id, lease_id, slot);
        let command = file::Command::Store(file);
        match self.system.files.execute(file_id, command, origin.clone()).await {
            Ok(_) => Ok(()),
            // A later attempt has cleared it away; or a completion of this one broke off after the
            // file, and its user has deleted that since, or other bytes were handed in. Nothing can
            // be completed under this lease any more: the next one makes another file.
            Err(Failure::Refused(_)) => Err(Error::lost()),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes what attempts that broke off while they stored their output have left.
    async fn discard_leftovers(&self, job_id: JobId, but: &[FileId]) -> Result<(), Error> {
        let mut files = self.system.views.files_of_job(job_id)?;
        files.retain(|id| !but.contains(id));
        if files.is_empty() {
            return Ok(());
        }
        if let Some(job) = self.system.views.job(&job_id)? {
            self.discard(&job.user_id, &files).await;
        }
        Ok(())
    }

    /// The output of an attempt that came too late belongs to nobody.
    async fn discard(&self, user_id: &UserId, files: &[FileId]) {
        for file_id in files {
            let command = file::Command::Delete { by: user_id.clone() };
            let done = self.system.files.execute(file_id, command, by("leasing")).await;
            if let Err(error) = done {
                tracing::warn!(%file_id, %error, "a late output was not removed");
            }
        }
    }

    async fn execute(
        &self,
        job_id: JobId,
        command: Command,
        origin: &Metadata,
    ) -> Result<Executed<Job>, Failure<job::Refusal>> {
        self.system.jobs.execute(job_id, command, origin.clone()).await
    }
}

/// Whether other jobs may well be leased: their streams and the keys of their users are others.
fn is_of_one_job(failure: &Failure<job::Refusal>) -> bool {
    use vault::Error::{BadKey, Unopenable};
    match failure {
        Failure::Refused(_) | Failure::Conflict(_) | Failure::Codec(_) | Failure::Overloaded => {
            true
        }
        Failure::Log(error) => matches!(error, log::Error::Corrupt { .. }),
        Failure::Keys(error) => matches!(error, keyring::Error::Key(_, Unopenable | BadKey)),
        Failure::Unavailable(_) => false,
    }
}

fn leased(job_id: JobId, done: Executed<Job>) -> Option<Leased> {
    let Job::Requested(job) = done.state else { return None };
    let Phase::Running(lease) = job.phase else { return None };
    Some(Leased {
        job_id,
        lease_id: lease.id,
        attempt: job.attempts,
        expires_at: lease.expires_at,
        request: job.request,
        position: done.position,
        last: done.last.unwrap_or_default(),
    })
}

fn is_completed(job: &Job) -> bool {
    matches!(job, Job::Requested(job) if matches!(job.phase, Phase::Completed(_)))
}

/// A translation is called after its source.
fn filename(request: &Request, slot: &Slot, handed: &Handed) -> String {
    match &request.options {
        Options::Video(_) => slot.filename(&handed.content_type).unwrap_or(slot.name).to_owned(),
        Options::Translation(options) => translated_name(request.prompt_text(), options),
    }
}

/// The same for each try to store it under the same lease.
fn output_id(user_id: &UserId, lease_id: LeaseId, slot: &Slot) -> FileId {
    FileId(derived_id(user_id, slot.name, &lease_id.0.to_string()))
}

/// The origin of what a worker does.
pub fn by(worker_id: &str) -> Metadata {
    Metadata::by(worker_id, Source::Worker)
}

#[cfg(test)]
#[path = "leasing_tests.rs"]
pub(super) mod tests;
