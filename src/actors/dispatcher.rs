//! Brings queued jobs and the built-in renderer together.
//!
//! It looks at which jobs wait and how many renders run, and acts on the difference; the read
//! model's movement only makes it look sooner. A render has its own low-priority thread, so the
//! front end stays responsive; the job's lease is renewed while it runs, and whatever it writes
//! is fenced by that lease.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use actix::Arbiter;
use tokio::sync::{mpsc, oneshot};

use super::System;
use super::codec::{Metadata, Source};
use super::entity::Failure;
use crate::domain::file::{self, Stored};
use crate::domain::ids::{FileId, JobId, LeaseId, derived_id};
use crate::domain::job::{self, Job, Output, Phase, Request};
use crate::domain::text::Personal;
use crate::media::blobs::Blobs;
use crate::media::renderer::{self, Rendered, Spec};

const WORKER: &str = "storyboard";
/// How often a render without news says that it lives; a third of the lease.
const HEARTBEAT: Duration = Duration::from_secs(20);
/// The longest it sleeps: delays of failed attempts end without any event.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What the built-in renderer needs to run.
#[derive(Debug, Clone)]
pub struct Rendering {
    pub blobs: Arc<Blobs>,
    /// Where renders are written before their bytes go to the blob store.
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
    loop {
        while let Ok(slot) = Arc::clone(&running).try_acquire_owned() {
            match lease_next(&system).await {
                Some(leased) => {
                    let (system, rendering) = (Arc::clone(&system), rendering.clone());
                    actix::spawn(async move {
                        work(&system, &rendering, leased).await;
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

struct Leased {
    job_id: JobId,
    lease_id: LeaseId,
    request: Request,
    /// Where the lease's event lies.
    position: u64,
}

/// Takes the first job that waits; none when there is none or all were taken by others.
async fn lease_next(system: &System) -> Option<Leased> {
    let waiting = match system.views.leasable_jobs(system.clock.now(), 8) {
        Ok(waiting) => waiting,
        Err(error) => {
            tracing::error!(%error, "the queue could not be read");
            return None;
        }
    };
    for job_id in waiting {
        let lease_id = LeaseId(system.clock.fresh_id());
        let command = job::Command::Lease { lease_id, worker_id: WORKER.to_owned() };
        let Ok(done) = system.jobs.execute(job_id, command, origin()).await else { continue };
        if let Job::Requested(job) = done.state {
            let leased = Leased { job_id, lease_id, request: job.request, position: done.position };
            // Else the next look would find the same job still queued in the read model.
            let _ = system.visible(leased.position).await;
            return Some(leased);
        }
    }
    None
}

/// One attempt, from lease to outcome.
async fn work(system: &System, rendering: &Rendering, leased: Leased) {
    let directory = rendering.scratch.join(leased.lease_id.0.to_string());
    let outcome = attempt(system, rendering, &leased, &directory).await;
    let _ = tokio::fs::remove_dir_all(&directory).await;
    let (error, retryable) = match outcome {
        Ok(()) | Err(Ended::LeaseLost) => return,
        Err(Ended::Cancelled) => ("cancelled".to_owned(), false),
        Err(Ended::Failed { error, retryable }) => (error, retryable),
    };
    let command = job::Command::Fail { lease_id: leased.lease_id, error, retryable };
    if let Err(error) = system.jobs.execute(leased.job_id, command, origin()).await {
        // The lease runs out by itself, and another attempt begins.
        tracing::warn!(job_id = %leased.job_id, %error, "the end of an attempt was not recorded");
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
    let output = store(system, rendering, leased, &rendered).await?;
    let files = [Some(output.file_id), output.poster_file_id, output.captions_file_id];
    let command = job::Command::Complete { lease_id: leased.lease_id, output };
    let completed = system.jobs.execute(leased.job_id, command, origin()).await;
    let kept = matches!(&completed, Ok(done) if is_completed(&done.state));
    if !kept {
        discard(system, leased, files.into_iter().flatten()).await;
    }
    match completed {
        Ok(_) => Ok(()),
        Err(Failure::Refused(_)) => Err(Ended::LeaseLost),
        Err(error) => Err(Ended::machine("the result could not be recorded", error)),
    }
}

fn is_completed(job: &Job) -> bool {
    matches!(job, Job::Requested(job) if matches!(job.phase, Phase::Completed(_)))
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
    let mut percent = 0u8;
    let mut ended = None;
    loop {
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
            () = tokio::time::sleep(HEARTBEAT) => {}
        }
        // Only the latest matters when several came while the last was being recorded.
        while let Ok(next) = progress_out.try_recv() {
            percent = next;
        }
        if ended.is_none() {
            ended = record_progress(system, leased, percent).await;
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
        let mut on_progress = |percent: f32| {
            let _ = progress.send(whole_percent(percent));
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

/// Renews the lease; says why the render must stop, if it must.
async fn record_progress(system: &System, leased: &Leased, percent: u8) -> Option<Ended> {
    let command = job::Command::Progress {
        lease_id: leased.lease_id,
        progress: percent,
        message: Some("rendering".to_owned()),
    };
    match system.jobs.execute(leased.job_id, command, origin()).await {
        Ok(_) => None,
        Err(Failure::Refused(_)) => Some(why_refused(system, leased)),
        Err(error) => {
            tracing::warn!(job_id = %leased.job_id, %error, "progress was not recorded");
            None
        }
    }
}

/// A refused heartbeat means that the user cancelled, or that the lease went to somebody else.
fn why_refused(system: &System, leased: &Leased) -> Ended {
    match system.views.job(&leased.job_id) {
        Ok(Some(job)) if job.lease_id == Some(leased.lease_id) => Ended::Cancelled,
        _ => Ended::LeaseLost,
    }
}

/// Moves the rendered files into the blob store and records them; the video first.
async fn store(
    system: &System,
    rendering: &Rendering,
    leased: &Leased,
    rendered: &Rendered,
) -> Result<Output, Ended> {
    let video = keep(system, rendering, leased, &rendered.video, "video.mp4", "video/mp4").await?;
    let poster =
        keep(system, rendering, leased, &rendered.poster, "poster.jpg", "image/jpeg").await?;
    let captions =
        keep(system, rendering, leased, &rendered.captions, "captions.vtt", "text/vtt").await?;
    Ok(Output {
        file_id: video.0,
        content_type: "video/mp4".to_owned(),
        size: video.1,
        duration: rendered.duration_ms as f64 / 1000.0,
        width: rendered.width,
        height: rendered.height,
        poster_file_id: Some(poster.0),
        captions_file_id: Some(captions.0),
    })
}

async fn keep(
    system: &System,
    rendering: &Rendering,
    leased: &Leased,
    path: &Path,
    filename: &str,
    content_type: &str,
) -> Result<(FileId, u64), Ended> {
    let stored = rendering
        .blobs
        .put_file(path)
        .await
        .map_err(|error| Ended::machine("the result could not be stored", error))?;
    let user_id = &leased.request.user_id;
    let file_id = FileId(derived_id(user_id, filename, &leased.lease_id.0.to_string()));
    let file = Stored {
        user_id: user_id.clone(),
        filename: Personal(filename.to_owned()),
        content_type: content_type.to_owned(),
        size: stored.size,
        sha256: stored.sha256,
        metadata: Personal::default(),
        job_id: Some(leased.job_id),
        fingerprint: None,
    };
    system
        .files
        .execute(file_id, file::Command::Store(file), origin())
        .await
        .map_err(|error| Ended::machine("the result could not be recorded", error))?;
    Ok((file_id, stored.size))
}

/// The output of an attempt that came too late belongs to nobody.
async fn discard(system: &System, leased: &Leased, files: impl Iterator<Item = FileId>) {
    for file_id in files {
        let command = file::Command::Delete { by: leased.request.user_id.clone() };
        if let Err(error) = system.files.execute(file_id, command, origin()).await {
            tracing::warn!(%file_id, %error, "a late output was not removed");
        }
    }
}

fn origin() -> Metadata {
    Metadata::by(WORKER, Source::Worker)
}
