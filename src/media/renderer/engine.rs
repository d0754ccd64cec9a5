//! Whatever makes a job's result: the built-in storyboard, or a program. What goes in, what comes
//! out, and how it is stopped are the same for both, in a server and in a remote worker.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use tokio::sync::{oneshot, watch};

use super::command::CommandEngine;
use super::{Error, FRAMES_PER_SECOND, Spec, dimensions, storyboard};
use crate::config::Secret;
use crate::domain::ids::JobId;
use crate::domain::job::{Kind, Options, VideoOptions};
use crate::domain::text::Personal;

/// Makes results.
#[derive(Debug, Clone)]
pub enum Engine {
    /// Draws videos, on so many threads.
    Storyboard { threads: usize },
    /// Lets a program make them.
    Command(CommandEngine),
}

/// One attempt at a job.
#[derive(Debug, Clone)]
pub struct Work {
    pub job_id: JobId,
    /// Of the request that the job came from, if one is known.
    pub request_id: Option<String>,
    /// From 1.
    pub attempt: u32,
    /// May be a secret of its user: an engine shows it to nobody but itself.
    pub prompt: String,
    pub options: Options,
    /// The file that the job works on, where the engine can read it.
    pub source: Option<PathBuf>,
    pub api_key: Option<Secret>,
}

impl Work {
    pub fn kind(&self) -> Kind {
        self.options.kind()
    }
}

/// How far an engine is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Progress {
    /// 0 to 99: 100 is said by the completion alone, once the bytes are stored.
    pub percent: u8,
    pub message: Option<String>,
}

/// A finished result, in the directory that the engine was given.
#[derive(Debug, Clone, PartialEq)]
pub struct Made {
    pub main: MadeFile,
    /// Seconds.
    pub duration: Option<f64>,
    pub width: Option<u32>,
    pub height: Option<u32>,
    pub poster: Option<MadeFile>,
    pub captions: Option<MadeFile>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MadeFile {
    pub path: PathBuf,
    pub content_type: String,
}

impl MadeFile {
    fn new(path: PathBuf, content_type: &str) -> Self {
        Self { path, content_type: content_type.to_owned() }
    }
}

impl Engine {
    /// The name that a worker goes by.
    pub fn name(&self) -> &str {
        match self {
            Self::Storyboard { .. } => "storyboard",
            Self::Command(engine) => engine.name(),
        }
    }

    /// Makes the result in a directory that exists and is this attempt's own. Ends soon after
    /// `stop` says true or its sender is gone, and so does everything it started; dropping the
    /// future ends a program at once.
    ///
    /// # Errors
    /// Why there is no result; files may be left in the directory.
    pub async fn make(
        &self,
        work: &Work,
        directory: &Path,
        progress: &watch::Sender<Progress>,
        stop: watch::Receiver<bool>,
    ) -> Result<Made, Error> {
        match self {
            Self::Storyboard { threads } => {
                draw(work, directory, *threads, progress.clone(), stop).await
            }
            Self::Command(engine) => engine.run(work, directory, progress, stop).await,
        }
    }
}

/// Whether the work is to be stopped; also when nobody is left to say so.
pub fn is_stopped(stop: &watch::Receiver<bool>) -> bool {
    *stop.borrow() || stop.has_changed().is_err()
}

/// Draws on a thread of its own with low priority, so that a server stays responsive.
async fn draw(
    work: &Work,
    directory: &Path,
    threads: usize,
    progress: watch::Sender<Progress>,
    stop: watch::Receiver<bool>,
) -> Result<Made, Error> {
    let Options::Video(options) = &work.options else {
        return Err(Error::Invalid("the storyboard makes videos only".to_owned()));
    };
    let spec = spec(&work.prompt, options)?;
    let (done, finished) = oneshot::channel();
    let (directory, span) = (directory.to_owned(), tracing::Span::current());
    let thread = std::thread::Builder::new().name("render".to_owned()).spawn(move || {
        let _attempt = span.enter();
        // On Linux this is the thread's own nice value, which the encoder threads inherit.
        if let Err(error) = rustix::process::setpriority_process(None, 15) {
            tracing::warn!(%error, "the renderer runs at normal priority");
        }
        let mut on_progress = |percent: f32| {
            let message = Some("rendering".to_owned());
            let now = Progress { percent: whole_percent(percent), message };
            // It says so often, and what is no news is not recorded.
            progress.send_if_modified(|known| {
                let is_news = *known != now;
                *known = now;
                is_news
            });
            match is_stopped(&stop) {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        };
        let _ = done.send(storyboard::render(&spec, &directory, threads, &mut on_progress));
    });
    thread.map_err(|error| Error::Failed(format!("no thread for the renderer: {error}")))?;
    let died = |_| Err(Error::Failed("the renderer died".to_owned()));
    let rendered = finished.await.unwrap_or_else(died)?;
    Ok(Made {
        main: MadeFile::new(rendered.video, "video/mp4"),
        duration: Some(rendered.duration_ms as f64 / 1000.0),
        width: Some(rendered.width),
        height: Some(rendered.height),
        poster: Some(MadeFile::new(rendered.poster, "image/jpeg")),
        captions: Some(MadeFile::new(rendered.captions, "text/vtt")),
    })
}

fn spec(prompt: &str, options: &VideoOptions) -> Result<Spec, Error> {
    let (width, height) = size(options)?;
    Ok(Spec {
        prompt: prompt.to_owned(),
        seed: options.seed,
        duration_s: options.duration,
        width,
        height,
        frames_per_second: FRAMES_PER_SECOND,
        style: options.style.as_ref().and_then(Personal::known).cloned(),
    })
}

/// Width and height in pixels.
pub(super) fn size(options: &VideoOptions) -> Result<(u32, u32), Error> {
    dimensions(options.quality.as_str(), options.aspect_ratio.as_str())
        .ok_or_else(|| Error::Invalid("the picture size is unknown".to_owned()))
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
pub(super) fn whole_percent(percent: f32) -> u8 {
    percent.clamp(0.0, 99.0) as u8
}
