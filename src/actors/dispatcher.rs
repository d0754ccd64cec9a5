//! Brings queued jobs and this machine's engines together.
//!
//! It looks at which jobs wait and how many are worked on, and acts on the difference; the read
//! model's movement only makes it look sooner. The job's lease is renewed while an engine works,
//! and whatever it writes is fenced by that lease.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use actix::Arbiter;
use tokio::sync::{Semaphore, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior};
use tracing::Instrument;
use uuid::Uuid;

use super::System;
use super::entity::Failure;
use super::leasing::{Error, Leased, Leasing, Shape, by};
use super::outputs::{Handed, Slot, slots};
use super::secrets::Secrets;
use super::supervise::supervise;
use crate::config::Secret;
use crate::domain::ids::{FileId, JobId, UserId};
use crate::domain::job::Kind;
use crate::media::blobs::{Blobs, Error::NotFound as Absent};
use crate::media::renderer::pause::Pause;
use crate::media::renderer::{self, Engine, Made, MadeFile, Progress, Work};
use crate::telemetry::attempt_span;

/// How often a render without news says that it lives; a third of the lease.
const HEARTBEAT: Duration = Duration::from_millis(if cfg!(test) { 5 } else { 20_000 });
/// How often progress is recorded at the most.
const RECORD_EVERY: Duration = Duration::from_millis(250);
/// The longest it sleeps: delays of failed attempts end without any event.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What an engine of this machine needs to run.
#[derive(Clone)]
pub struct Rendering {
    pub engine: Engine,
    /// What it makes.
    pub kind: Kind,
    pub leasing: Arc<Leasing>,
    pub blobs: Arc<Blobs>,
    pub secrets: Secrets,
    /// Where results are written before their bytes go to the blob store: a directory a job, so
    /// that an attempt finds what the one before it had finished. No other dispatcher's.
    pub scratch: PathBuf,
    /// Jobs at once.
    pub slots: usize,
}

impl Rendering {
    /// The storyboard draws from the prompt alone, and can go on where an attempt broke off. A
    /// program may have left anything, even what looks like a result.
    fn is_program(&self) -> bool {
        matches!(self.engine, Engine::Command(_))
    }
}

/// Where the results of a kind are written, below the data directory.
pub fn scratch_of(kind: Kind, data_dir: &Path) -> PathBuf {
    data_dir.join("scratch").join(kind.as_str())
}

/// Resolves when a dispatcher has given back what it had.
pub type Ended = oneshot::Receiver<()>;

/// Starts leasing jobs of one kind to an engine, on a thread of its own, until `stopping` says true.
pub fn start(system: Arc<System>, rendering: Rendering, stopping: watch::Receiver<bool>) -> Ended {
    let (at_the_end, ended) = oneshot::channel();
    Arbiter::new().spawn(async move {
        // Attempts go on while it is begun anew: their slots and their directories stay theirs.
        let (running, busy) = (Arc::new(Semaphore::new(rendering.slots)), Busy::default());
        let pause = Pause::default();
        let run = || {
            let (system, rendering, stopping) =
                (Arc::clone(&system), rendering.clone(), stopping.clone());
            run(system, rendering, stopping, Arc::clone(&running), busy.clone(), pause.clone())
        };
        supervise("dispatcher", run).await;
        let _ = at_the_end.send(());
    });
    ended
}

async fn run(
    system: Arc<System>,
    rendering: Rendering,
    mut stopping: watch::Receiver<bool>,
    running: Arc<Semaphore>,
    busy: Busy,
    pause: Pause,
) {
    let mut progress = system.progress.clone();
    sweep(&system, &rendering.scratch, &busy);
    let mut swept = tokio::time::Instant::now();
    loop {
        while !*stopping.borrow()
            && pause.left().is_none()
            && let Ok(slot) = Arc::clone(&running).try_acquire_owned()
        {
            match lease_next(&rendering, &busy).await {
                Some((leased, mine)) => {
                    let (system, rendering) = (Arc::clone(&system), rendering.clone());
                    let (busy, pause, stopping) = (busy.clone(), pause.clone(), stopping.clone());
                    let span = attempt_span(leased.job_id, leased.attempt, leased.request_id());
                    actix::spawn(async move {
                        let attempt = work(&system, &rendering, &leased, &pause, stopping);
                        attempt.instrument(span).await;
                        drop(mine);
                        sweep(&system, &rendering.scratch, &busy);
                        drop(slot);
                    });
                }
                None => break,
            }
        }
        let free = async {
            // Nothing to take while every slot is busy, so wait for one of them.
            let _ = running.acquire().await;
            progress.moved().await;
        };
        tokio::select! {
            biased;
            _ = stopping.wait_for(|stop| *stop) => break,
            _ = tokio::time::timeout(LOOK_EVERY, free) => {}
        }
        // The read model moves often; what a deleted user's jobs have left can wait a second.
        if swept.elapsed() >= LOOK_EVERY {
            sweep(&system, &rendering.scratch, &busy);
            swept = tokio::time::Instant::now();
        }
    }
    // Every attempt hears of it too, and leaves its slot.
    let slots = u32::try_from(rendering.slots).unwrap_or(u32::MAX);
    let _ = running.acquire_many(slots).await;
}

async fn lease_next(rendering: &Rendering, busy: &Busy) -> Option<(Leased, Mine)> {
    // An attempt that lost its lease may still be stopping: the next one must not meet it in the
    // job's directory.
    let skip = |id| busy.jobs().contains(&id);
    let origin = by(rendering.engine.name());
    match rendering.leasing.lease(&origin, &[rendering.kind], skip).await {
        Ok(leased) => leased.map(|leased| {
            let mine = busy.take(leased.job_id);
            (leased, mine)
        }),
        Err(error) => {
            tracing::warn!(%error, "no job could be leased");
            None
        }
    }
}

/// The jobs that this process works on.
#[derive(Clone, Default)]
struct Busy(Arc<Mutex<HashSet<JobId>>>);

/// Says that it is worked on for as long as it lives.
struct Mine(Busy, JobId);

impl Busy {
    fn jobs(&self) -> MutexGuard<'_, HashSet<JobId>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, id: JobId) -> Mine {
        self.jobs().insert(id);
        Mine(self.clone(), id)
    }
}

impl Drop for Mine {
    fn drop(&mut self) {
        self.0.jobs().remove(&self.1);
    }
}

/// Removes what renders have left of jobs that are over, and keeps what another attempt can use.
fn sweep(system: &System, scratch: &Path, busy: &Busy) {
    for left in leftovers(system, scratch, busy) {
        if let Err(error) = std::fs::remove_dir_all(left) {
            tracing::warn!(%error, "what a render has left was not removed");
        }
    }
}

/// The same where no dispatcher is at work.
///
/// # Errors
/// Something stays.
pub fn sweep_alone(system: &System, scratch: &Path) -> std::io::Result<()> {
    leftovers(system, scratch, &Busy::default()).iter().try_for_each(std::fs::remove_dir_all)
}

fn leftovers(system: &System, scratch: &Path, busy: &Busy) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(scratch).into_iter().flatten().flatten();
    let paths = entries.map(|entry| entry.path()).filter(|path| path.is_dir());
    let needed = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        let id = name.and_then(|name| Uuid::try_parse(name).ok()).map(JobId);
        id.is_some_and(|id| {
            // What a render has left of a deleted user's job goes too.
            let over = match system.views.job_is_alive(&id) {
                Ok(alive) => alive != Some(true),
                Err(_) => false,
            };
            !over || busy.jobs().contains(&id)
        })
    };
    paths.filter(|path| !needed(path)).collect()
}

/// One attempt, from lease to outcome.
async fn work(
    system: &System,
    rendering: &Rendering,
    leased: &Leased,
    pause: &Pause,
    stopping: watch::Receiver<bool>,
) {
    let directory = rendering.scratch.join(leased.job_id.to_string());
    clear(rendering, &directory).await;
    let outcome = attempt(system, rendering, leased, &directory, stopping).await;
    clear(rendering, &directory).await;
    match &outcome {
        Ok(()) => pause.worked(),
        Err(Broken::NotBegun | Broken::Machine(_)) => pause.failed(),
        Err(_) => {}
    }
    // It answers to what happened last: who cancelled is not who asked.
    let (leasing, origin) = (&rendering.leasing, by(rendering.engine.name()));
    let (job_id, lease_id) = (leased.job_id, leased.lease_id);
    let recorded = match outcome {
        Ok(()) | Err(Broken::LeaseLost) => return,
        Err(Broken::Stopped | Broken::NotBegun) => {
            leasing.give_back(job_id, lease_id, &origin).await.map(drop)
        }
        Err(Broken::Cancelled) => {
            let error = "cancelled".to_owned();
            leasing.fail(job_id, lease_id, &origin, error, false).await.map(drop)
        }
        Err(Broken::Machine(error)) => {
            leasing.fail(job_id, lease_id, &origin, error, true).await.map(drop)
        }
        Err(Broken::Failed { error, retryable }) => {
            leasing.fail(job_id, lease_id, &origin, error, retryable).await.map(drop)
        }
    };
    if let Err(error) = recorded {
        // The lease runs out by itself, and another attempt begins.
        tracing::warn!(%error, "the end of an attempt was not recorded");
    }
}

/// Each attempt of a program begins with nothing, and what it leaves may be secret.
async fn clear(rendering: &Rendering, directory: &Path) {
    if !rendering.is_program() {
        return;
    }
    match tokio::fs::remove_dir_all(directory).await {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(%error, "what an attempt has left was not removed");
        }
        _ => {}
    }
}

/// Why an attempt came to no output.
enum Broken {
    Cancelled,
    /// This server was told to stop.
    Stopped,
    LeaseLost,
    /// This machine lacks what every job needs: it was no attempt.
    NotBegun,
    /// The machine's fault, as far as anybody can tell. It counts: a job whose fault it is after all
    /// must not be tried for ever.
    Machine(String),
    Failed {
        error: String,
        retryable: bool,
    },
}

impl From<renderer::Error> for Broken {
    fn from(error: renderer::Error) -> Self {
        match error {
            renderer::Error::Cancelled => Self::Cancelled,
            renderer::Error::Invalid(error) => Self::Failed { error, retryable: false },
            renderer::Error::Failed(error) => Self::machine("rendering failed", error),
            renderer::Error::NotRun(words) => {
                tracing::error!("the engine could not be run");
                Self::Machine(words)
            }
            renderer::Error::Engine { words, retryable } => {
                tracing::info!("the engine failed");
                Self::Failed { error: words, retryable }
            }
        }
    }
}

impl Broken {
    fn machine(what: &str, error: impl std::fmt::Display) -> Self {
        tracing::error!(%error, "{what}");
        Self::Machine(what.to_owned())
    }

    /// Of what was to be read from the store: whether that is away, or has lost or damaged the one
    /// thing, it says itself.
    async fn unread(rendering: &Rendering, what: &str, error: impl std::fmt::Display) -> Self {
        let broken = Self::machine(what, error);
        match rendering.blobs.probe().await {
            Ok(()) => broken,
            Err(_) => Self::NotBegun,
        }
    }
}

async fn attempt(
    system: &System,
    rendering: &Rendering,
    leased: &Leased,
    directory: &Path,
    stopping: watch::Receiver<bool>,
) -> Result<(), Broken> {
    tokio::fs::create_dir_all(directory).await.map_err(|error| {
        tracing::error!(%error, "the scratch directory could not be made");
        Broken::NotBegun
    })?;
    let made = make(system, rendering, leased, directory, stopping).await?;
    let handed = while_held(rendering, leased, hand_in(rendering, &made)).await?;
    let shape = Shape { duration: made.duration, width: made.width, height: made.height };
    let (job_id, lease_id, request) = (leased.job_id, leased.lease_id, &leased.request);
    let leasing = &rendering.leasing;
    let finish = async {
        let (_, last) = leasing.hold(job_id, lease_id).await?;
        let origin = by(rendering.engine.name()).after(&last);
        leasing.finish(job_id, lease_id, &origin, request, &handed, shape).await
    };
    match finish.await {
        Ok(_) => Ok(()),
        Err(Error::Job(Failure::Refused(_))) => Err(Broken::LeaseLost),
        Err(error) => Err(Broken::machine("the result could not be recorded", error)),
    }
}

/// Lets the engine work, while this task turns its progress into events.
async fn make(
    system: &System,
    rendering: &Rendering,
    leased: &Leased,
    directory: &Path,
    mut stopping: watch::Receiver<bool>,
) -> Result<Made, Broken> {
    let work = tokio::select! {
        biased;
        _ = stopping.wait_for(|stop| *stop) => return Err(Broken::Stopped),
        work = while_held(rendering, leased, prepare(system, rendering, leased, directory)) => work?,
    };
    let (progress_in, mut progress_out) = watch::channel(Progress::default());
    let (stop, stopped) = watch::channel(false);
    let mut making = pin!(rendering.engine.make(&work, directory, &progress_in, stopped));
    let mut due = tokio::time::interval(RECORD_EVERY);
    due.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut ended = None;
    let mut recorded_at = Instant::now();
    loop {
        tokio::select! {
            biased;
            outcome = &mut making => {
                return match (outcome, ended) {
                    // It was as good as done.
                    (Ok(made), None | Some(Broken::Stopped)) => Ok(made),
                    (_, Some(ended)) => Err(ended),
                    (Err(error), None) => Err(error.into()),
                };
            }
            _ = stopping.wait_for(|stop| *stop), if ended.is_none() => {
                ended = Some(Broken::Stopped);
            }
            _ = due.tick() => {}
        }
        let is_news = progress_out.has_changed().unwrap_or(false);
        let is_due = is_news || recorded_at.elapsed() >= HEARTBEAT;
        // A user who cancels is not kept waiting for the next progress.
        if ended.is_none() && (is_due || seems_taken_away(system, leased)) {
            let progress = is_due.then(|| progress_out.borrow_and_update().clone());
            if is_due {
                recorded_at = Instant::now();
            }
            // The engine works on while this is being asked.
            let asking = pin!(ask(rendering, leased, progress));
            tokio::select! {
                biased;
                outcome = &mut making => return outcome.map_err(Broken::from),
                found = asking => ended = found,
            }
        }
        if ended.is_some() {
            stop.send_replace(true);
        }
    }
}

/// Whether the user cancelled or the lease went away, as the read model has it. It may be behind:
/// the job itself is asked before anything is stopped.
fn seems_taken_away(system: &System, leased: &Leased) -> bool {
    let job = system.views.job(&leased.job_id);
    matches!(job, Ok(Some(job)) if job.state != "running" || job.lease_id != Some(leased.lease_id))
}

/// Brings together what the engine needs.
async fn prepare(
    system: &System,
    rendering: &Rendering,
    leased: &Leased,
    directory: &Path,
) -> Result<Work, Broken> {
    let request = &leased.request;
    let source = match request.options.source_file_id() {
        Some(file_id) if rendering.is_program() => {
            Some(fetch_source(system, rendering, &request.user_id, file_id, directory).await?)
        }
        _ => None,
    };
    let api_key = match request.options.needs_secret() {
        true => Some(open_secret(rendering, leased.job_id).await?),
        false => None,
    };
    Ok(Work {
        job_id: leased.job_id,
        request_id: leased.request_id().map(str::to_owned),
        attempt: leased.attempt,
        prompt: request.prompt_text().to_owned(),
        options: request.options.clone(),
        source,
        api_key,
    })
}

async fn fetch_source(
    system: &System,
    rendering: &Rendering,
    user_id: &UserId,
    file_id: FileId,
    directory: &Path,
) -> Result<PathBuf, Broken> {
    let what = "the source file could not be read";
    let file = system.views.file(&file_id).map_err(|error| Broken::machine(what, error))?;
    let Some(file) = file.filter(|file| file.user_id == *user_id) else {
        let error = "the source file was deleted".to_owned();
        return Err(Broken::Failed { error, retryable: false });
    };
    let path = directory.join("source");
    match rendering.blobs.copy_to(&file.sha256, file.size, &path).await {
        Ok(()) => Ok(path),
        Err(Absent) => Err(Broken::Failed { error: what.to_owned(), retryable: true }),
        Err(error) => Err(Broken::unread(rendering, what, error).await),
    }
}

async fn open_secret(rendering: &Rendering, job_id: JobId) -> Result<Secret, Broken> {
    match rendering.secrets.of_job(job_id).await {
        Ok(Some(secret)) => Ok(secret),
        Ok(None) => {
            let error = "the job's secret was destroyed".to_owned();
            Err(Broken::Failed { error, retryable: false })
        }
        Err(error) => Err(Broken::unread(rendering, "the secret could not be opened", error).await),
    }
}

/// Renews the lease by telling the progress, if there is some to tell; says why the render must stop,
/// if it must.
async fn ask(rendering: &Rendering, leased: &Leased, progress: Option<Progress>) -> Option<Broken> {
    let (job_id, lease_id) = (leased.job_id, leased.lease_id);
    let (leasing, origin) = (&rendering.leasing, by(rendering.engine.name()));
    let report = match progress {
        Some(Progress { percent, message }) => {
            let told = leasing.progress(job_id, lease_id, &origin, percent, message).await;
            told.map(|done| done.outcome)
        }
        None => leasing.look(job_id, lease_id).await,
    };
    match report {
        Ok(report) => report.cancelled.then_some(Broken::Cancelled),
        Err(Error::Job(Failure::Refused(_))) => Some(Broken::LeaseLost),
        Err(error) => {
            tracing::warn!(%error, "progress was not recorded");
            None
        }
    }
}

/// Brings the engine its source or takes its result away, which may last longer than a lease where
/// files are large and the store is slow.
async fn while_held<T>(
    rendering: &Rendering,
    leased: &Leased,
    moving: impl Future<Output = Result<T, Broken>>,
) -> Result<T, Broken> {
    let mut moving = pin!(moving);
    loop {
        if let Ok(moved) = tokio::time::timeout(HEARTBEAT, &mut moving).await {
            return moved;
        }
        // As far as before: progress never falls within an attempt.
        if let Some(ended) = ask(rendering, leased, Some(Progress::default())).await {
            return Err(ended);
        }
    }
}

/// Moves what was made into the blob store; the main file first.
async fn hand_in(
    rendering: &Rendering,
    made: &Made,
) -> Result<Vec<(&'static Slot, Handed)>, Broken> {
    let mut handed = Vec::new();
    for (index, slot) in slots(rendering.kind).iter().enumerate() {
        let file = match (index, slot.name) {
            (0, _) => Some(&made.main),
            (_, "poster") => made.poster.as_ref(),
            (_, "captions") => made.captions.as_ref(),
            _ => None,
        };
        if let Some(file) = file {
            handed.push((slot, store(rendering, slot, file).await?));
        }
    }
    Ok(handed)
}

async fn store(rendering: &Rendering, slot: &Slot, file: &MadeFile) -> Result<Handed, Broken> {
    if slot.filename(&file.content_type).is_none() {
        let error = format!("the engine's {} must be of {}", slot.name, slot.types());
        return Err(Broken::Failed { error, retryable: false });
    }
    let stored = rendering.blobs.put_file(&file.path).await;
    let stored =
        stored.map_err(|error| Broken::machine("the result could not be stored", error))?;
    let content_type = file.content_type.clone();
    Ok(Handed { content_type, size: stored.size, sha256: stored.sha256 })
}

#[cfg(test)]
#[path = "dispatcher_tests.rs"]
mod tests;
