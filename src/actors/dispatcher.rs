//! Brings queued jobs and the built-in renderer together.
//!
//! It looks at which jobs wait and how many renders run, and acts on the difference; the read
//! model's movement only makes it look sooner. A render has its own low-priority thread, so the
//! front end stays responsive; the job's lease is renewed while it runs, and whatever it writes
//! is fenced by that lease.

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use actix::Arbiter;
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;

use super::System;
use super::entity::Failure;
use super::leasing::{Error, Leased, Leasing, Shape};
use super::outputs::{Handed, Slot, slots};
use crate::domain::ids::JobId;
use crate::domain::job::{Kind, Request};
use crate::media::blobs::Blobs;
use crate::media::renderer::{self, Rendered, Spec};

const WORKER: &str = "storyboard";
/// How often a render without news says that it lives; a third of the lease.
const HEARTBEAT: Duration = Duration::from_secs(20);
/// The longest it sleeps: delays of failed attempts end without any event.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What the built-in renderer needs to run.
#[derive(Clone)]
pub struct Rendering {
    pub leasing: Arc<Leasing>,
    pub blobs: Arc<Blobs>,
    /// Where renders are written before their bytes go to the blob store: a directory a job, so
    /// that an attempt finds what the one before it had finished.
    pub scratch: PathBuf,
    /// Renders at once.
    pub slots: usize,
    /// Threads of one render.
    pub threads: usize,
}

/// Starts leasing jobs to the built-in renderer, on a thread of its own.
pub fn start(system: Arc<System>, rendering: Rendering) {
    Arbiter::new().spawn(run(system, rendering));
}

async fn run(system: Arc<System>, rendering: Rendering) {
    let mut progress = system.progress.clone();
    let running = Arc::new(tokio::sync::Semaphore::new(rendering.slots));
    let busy = Busy::default();
    sweep(&system, &rendering.scratch, &busy);
    loop {
        while let Ok(slot) = Arc::clone(&running).try_acquire_owned() {
            match lease_next(&rendering, &busy).await {
                Some((leased, mine)) => {
                    let (system, rendering) = (Arc::clone(&system), rendering.clone());
                    let busy = busy.clone();
                    actix::spawn(async move {
                        work(&system, &rendering, &leased).await;
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
        let _ = tokio::time::timeout(LOOK_EVERY, free).await;
    }
}

async fn lease_next(rendering: &Rendering, busy: &Busy) -> Option<(Leased, Mine)> {
    // An attempt that lost its lease may still be stopping: the next one must not meet it in the
    // job's directory.
    let skip = |id| busy.jobs().contains(&id);
    match rendering.leasing.lease(WORKER, &[Kind::Video], skip).await {
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
    let Ok(entries) = std::fs::read_dir(scratch) else { return };
    for entry in entries.flatten() {
        let id = entry.file_name().to_str().and_then(|name| Uuid::try_parse(name).ok()).map(JobId);
        let needed = id.is_some_and(|id| {
            let over = match system.views.job(&id) {
                Ok(Some(job)) => job.is_over(),
                Ok(None) => true,
                Err(_) => false,
            };
            !over || busy.jobs().contains(&id)
        });
        if !needed && let Err(error) = std::fs::remove_dir_all(entry.path()) {
            tracing::warn!(%error, "what a render has left was not removed");
        }
    }
}

/// One attempt, from lease to outcome.
async fn work(system: &System, rendering: &Rendering, leased: &Leased) {
    let directory = rendering.scratch.join(leased.job_id.to_string());
    let (error, retryable) = match attempt(system, rendering, leased, &directory).await {
        Ok(()) | Err(Ended::LeaseLost) => return,
        Err(Ended::Cancelled) => ("cancelled".to_owned(), false),
        Err(Ended::Failed { error, retryable }) => (error, retryable),
    };
    let leasing = &rendering.leasing;
    let (job_id, lease_id) = (leased.job_id, leased.lease_id);
    if let Err(error) = leasing.fail(job_id, lease_id, WORKER, error, retryable).await {
        // The lease runs out by itself, and another attempt begins.
        tracing::warn!(%job_id, %error, "the end of an attempt was not recorded");
    }
}

/// Why an attempt came to no output.
enum Ended {
    Cancelled,
    LeaseLost,
    Failed { error: String, retryable: bool },
}

impl Ended {
    fn machine(what: &str, error: impl std::fmt::Display) -> Self {
        tracing::error!(%error, "{what}");
        Self::Failed { error: what.to_owned(), retryable: true }
    }
}

async fn attempt(
    system: &System,
    rendering: &Rendering,
    leased: &Leased,
    directory: &Path,
) -> Result<(), Ended> {
    let spec = spec_of(&leased.request)?;
    tokio::fs::create_dir_all(directory)
        .await
        .map_err(|error| Ended::machine("the scratch directory could not be made", error))?;
    let rendered = render(system, rendering, leased, spec, directory).await?;
    let handed = hand_in(rendering, &rendered).await?;
    let shape = Shape {
        duration: rendered.duration_ms as f64 / 1000.0,
        width: rendered.width,
        height: rendered.height,
    };
    let (job_id, lease_id, request) = (leased.job_id, leased.lease_id, &leased.request);
    let finish = rendering.leasing.finish(job_id, lease_id, WORKER, request, &handed, shape);
    match finish.await {
        Ok(_) => Ok(()),
        Err(Error::Job(Failure::Refused(_))) => Err(Ended::LeaseLost),
        Err(error) => Err(Ended::machine("the result could not be recorded", error)),
    }
}

fn spec_of(request: &Request) -> Result<Spec, Ended> {
    let options = &request.options;
    let unknown =
        || Ended::Failed { error: "the picture size is unknown".into(), retryable: false };
    let (width, height) =
        renderer::dimensions(options.quality.as_str(), options.aspect_ratio.as_str())
            .ok_or_else(unknown)?;
    Ok(Spec {
        prompt: request.prompt.0.as_str().to_owned(),
        seed: options.seed,
        duration_s: options.duration,
        width,
        height,
        frames_per_second: renderer::FRAMES_PER_SECOND,
        style: options.style.clone(),
    })
}

/// Renders on a thread of its own, while this task turns its progress into events.
async fn render(
    system: &System,
    rendering: &Rendering,
    leased: &Leased,
    spec: Spec,
    directory: &Path,
) -> Result<Rendered, Ended> {
    let stop = Arc::new(AtomicBool::new(false));
    let (progress_in, mut progress_out) = mpsc::unbounded_channel();
    let mut finished = spawn_render(spec, directory, rendering.threads, &stop, progress_in)?;
    let mut moved = system.progress.clone();
    let mut heartbeat = std::pin::pin!(tokio::time::sleep(HEARTBEAT));
    let mut percent = 0u8;
    let mut ended = None;
    loop {
        let mut news = true;
        tokio::select! {
            biased;
            outcome = &mut finished => {
                let outcome = outcome
                    .unwrap_or_else(|_| Err(renderer::Error::Failed("the renderer died".into())));
                return match (outcome, ended) {
                    (_, Some(ended)) => Err(ended),
                    (Ok(rendered), None) => Ok(rendered),
                    (Err(renderer::Error::Cancelled), None) => Err(Ended::Cancelled),
                    (Err(renderer::Error::Invalid(error)), None) => {
                        Err(Ended::Failed { error, retryable: false })
                    }
                    (Err(renderer::Error::Failed(error)), None) => {
                        Err(Ended::machine("rendering failed", error))
                    }
                };
            }
            Some(next) = progress_out.recv() => percent = next,
            () = heartbeat.as_mut() => {}
            // A user who cancels is not kept waiting for the next picture.
            () = moved.moved() => {
                news = is_cancelling(system, leased);
            }
        }
        // Only the latest matters when several came while the last was being recorded.
        while let Ok(next) = progress_out.try_recv() {
            percent = next;
        }
        if news {
            heartbeat.set(tokio::time::sleep(HEARTBEAT));
        }
        if news && ended.is_none() {
            ended = record_progress(&rendering.leasing, leased, percent).await;
            stop.store(ended.is_some(), Ordering::Relaxed);
        }
    }
}

fn spawn_render(
    spec: Spec,
    directory: &Path,
    threads: usize,
    stop: &Arc<AtomicBool>,
    progress: mpsc::UnboundedSender<u8>,
) -> Result<oneshot::Receiver<Result<Rendered, renderer::Error>>, Ended> {
    let (done, finished) = oneshot::channel();
    let (directory, stop) = (directory.to_owned(), Arc::clone(stop));
    let thread = std::thread::Builder::new().name("render".to_owned()).spawn(move || {
        // On Linux this is the thread's own nice value, which the encoder threads inherit.
        if let Err(error) = rustix::process::setpriority_process(None, 15) {
            tracing::warn!(%error, "the renderer runs at normal priority");
        }
        let mut last = None;
        let mut on_progress = |percent: f32| {
            let percent = whole_percent(percent);
            if last.replace(percent) != Some(percent) {
                let _ = progress.send(percent);
            }
            if stop.load(Ordering::Relaxed) {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        };
        let _ = done.send(renderer::render(&spec, &directory, threads, &mut on_progress));
    });
    thread.map_err(|error| Ended::machine("no thread for the renderer", error))?;
    Ok(finished)
}

/// 100 is said by the completion alone, once the bytes are stored.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn whole_percent(percent: f32) -> u8 {
    percent.clamp(0.0, 99.0) as u8
}

fn is_cancelling(system: &System, leased: &Leased) -> bool {
    let job = system.views.job(&leased.job_id);
    matches!(job, Ok(Some(job)) if job.state != "running" || job.lease_id != Some(leased.lease_id))
}

/// Renews the lease; says why the render must stop, if it must.
async fn record_progress(leasing: &Leasing, leased: &Leased, percent: u8) -> Option<Ended> {
    let message = Some("rendering".to_owned());
    let (job_id, lease_id) = (leased.job_id, leased.lease_id);
    match leasing.progress(job_id, lease_id, WORKER, percent, message).await {
        Ok(report) => report.cancelled.then_some(Ended::Cancelled),
        Err(Error::Job(Failure::Refused(_))) => Some(Ended::LeaseLost),
        Err(error) => {
            tracing::warn!(%job_id, %error, "progress was not recorded");
            None
        }
    }
}

/// Moves the rendered files into the blob store.
async fn hand_in(
    rendering: &Rendering,
    rendered: &Rendered,
) -> Result<Vec<(&'static Slot, Handed)>, Ended> {
    let files = [
        ("video", &rendered.video, "video/mp4"),
        ("poster", &rendered.poster, "image/jpeg"),
        ("captions", &rendered.captions, "text/vtt"),
    ];
    let mut handed = Vec::with_capacity(files.len());
    for slot in slots(Kind::Video) {
        let Some((_, path, content_type)) = files.iter().find(|(name, ..)| *name == slot.name)
        else {
            continue;
        };
        let stored = rendering
            .blobs
            .put_file(path)
            .await
            .map_err(|error| Ended::machine("the result could not be stored", error))?;
        let content_type = (*content_type).to_owned();
        handed.push((slot, Handed { content_type, size: stored.size, sha256: stored.sha256 }));
    }
    Ok(handed)
}
