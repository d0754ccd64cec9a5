//! The engine that is a program: the job goes in as one JSON document on standard input, progress
//! comes out as JSON Lines on standard output, and the result is a file at an agreed path.
//!
//! The agreement is written down for those who make such programs in `scripts/engines/README.md`.

use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncRead, AsyncWriteExt, BufReader};
use tokio::process::ChildStdin;
use tokio::sync::{oneshot, watch};

use super::engine::{Made, MadeFile, Progress, Work, is_stopped, size, whole_percent};
use super::output;
use super::process::{Bounds, Group};
use super::{Error, disk};
use crate::config::Secret;
use crate::domain::job::Options;

/// `EX_TEMPFAIL` of sysexits: the same job may succeed later.
const TRY_LATER: i32 = 75;
/// What is said in the program's place: by our shell of a limit that it cannot set, and by whatever
/// was to start the program (`nice`, a shell) of one that is not there or cannot be run.
const NOT_RUN: [i32; 3] = [78, 126, 127];
/// A larger picture is no poster, in bytes.
const LARGEST_POSTER: u64 = 16 * 1024 * 1024;
/// A longer line of a program is cut off, in bytes.
const LINE_BYTES: usize = 16 * 1024;
/// What of standard error is kept for the job.
const LAST_LINES: usize = 20;
const LAST_LINE_CHARACTERS: usize = 400;
/// Of a job's error; a server takes no more from its workers.
const WORDS_CHARACTERS: usize = 1000;
const MESSAGE_CHARACTERS: usize = 200;
/// How often it is looked at how much of the disk a job fills.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long the pipes may stay open once the program has ended and its group was killed.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// A program and what it may use.
#[derive(Debug, Clone)]
pub struct CommandEngine {
    name: String,
    words: Vec<String>,
    limits: Limits,
}

#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// From start to end.
    pub time: Duration,
    /// Address space of each process, in bytes; 0 is no limit.
    pub memory_bytes: u64,
    /// The largest file that it may write, in bytes.
    pub output_bytes: u64,
    /// What all its files together may fill of the disk, in bytes.
    pub scratch_bytes: u64,
}

/// What the program is told. Its fields are an agreement: some may be added, none changed.
#[derive(Serialize)]
struct Document<'a> {
    job_id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    request_id: Option<&'a str>,
    kind: &'static str,
    attempt: u32,
    prompt: &'a str,
    options: &'a Options,
    #[serde(skip_serializing_if = "Option::is_none")]
    width: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    height: Option<u32>,
    source_path: Option<&'a Path>,
    output_path: &'a Path,
    scratch_dir: &'a Path,
    #[serde(skip_serializing_if = "Option::is_none")]
    api_key: Option<&'a str>,
}

/// A line of the program; other fields are its own affair.
#[derive(Debug, Default, Deserialize)]
struct Line {
    progress: Option<f32>,
    message: Option<String>,
    /// What it knows of its output.
    output: Option<Facts>,
}

/// What a program may say of its output; what it does not say is taken from the request.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
struct Facts {
    duration: Option<f64>,
    width: Option<u32>,
    height: Option<u32>,
}

/// What was heard of a program.
#[derive(Default)]
struct Heard {
    facts: Facts,
    last_lines: std::collections::VecDeque<String>,
}

impl CommandEngine {
    /// `words` are the program and its arguments.
    pub fn new(words: Vec<String>, limits: Limits) -> Self {
        let program = words.first().map(Path::new).and_then(Path::file_name);
        let name = program.map_or_else(|| "command".into(), |name| name.to_string_lossy());
        Self { name: name.into_owned(), words, limits }
    }

    /// The program's, without its path.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub(super) async fn run(
        &self,
        work: &Work,
        directory: &Path,
        progress: &watch::Sender<Progress>,
        stop: watch::Receiver<bool>,
    ) -> Result<Made, Error> {
        let output_path = directory.join(match &work.options {
            Options::Video(_) => "output.mp4".to_owned(),
            Options::Translation(options) => format!("output.{}", options.format.extension()),
        });
        let scratch = directory.join("scratch");
        let failed = |what: &str, error: std::io::Error| Error::Failed(format!("{what}: {error}"));
        tokio::fs::create_dir_all(&scratch).await.map_err(|error| failed("scratch", error))?;
        let document = document(work, &output_path, &scratch)?;
        let bounds =
            Bounds { memory_bytes: self.limits.memory_bytes, file_bytes: self.limits.output_bytes };
        let mut group = Group::start(&self.words, &scratch, bounds)
            .map_err(|error| failed("the engine could not be started", error))?;
        let mut heard = Heard::default();
        let ended = tokio::select! {
            biased;
            () = stopped(stop) => None,
            () = tokio::time::sleep(self.limits.time) => Some(Err(self.too_slow())),
            () = outgrown(directory, self.limits.scratch_bytes) => Some(Err(self.too_large())),
            status = converse(&mut group, document, &mut heard, progress, work.api_key.as_ref()) => {
                Some(status.map_err(|error| failed("the engine could not be waited for", error)))
            }
        };
        match ended {
            None => {
                group.stop().await;
                Err(Error::Cancelled)
            }
            Some(Err(error)) => {
                group.stop().await;
                Err(error)
            }
            Some(Ok(status)) => {
                heard.judge(status)?;
                made(work, output_path, heard.facts, self.limits.output_bytes).await
            }
        }
    }

    fn too_slow(&self) -> Error {
        let words = format!("the engine took longer than {} s", self.limits.time.as_secs());
        Error::Engine { words, retryable: false }
    }

    fn too_large(&self) -> Error {
        let most = self.limits.scratch_bytes;
        let words = format!("the engine filled more than {most} bytes of the disk");
        Error::Engine { words, retryable: false }
    }
}

/// Waits until the files of a job fill more of the disk than they may.
async fn outgrown(directory: &Path, most_bytes: u64) {
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let directory = directory.to_owned();
        // A look that failed says nothing.
        let filled = tokio::task::spawn_blocking(move || disk::filled(&directory)).await;
        if filled.is_ok_and(|bytes| bytes > most_bytes) {
            return;
        }
    }
}

fn document(work: &Work, output_path: &Path, scratch_dir: &Path) -> Result<Vec<u8>, Error> {
    let (width, height) = match &work.options {
        Options::Video(options) => size(options).map(|(w, h)| (Some(w), Some(h)))?,
        Options::Translation(_) => (None, None),
    };
    let document = Document {
        job_id: work.job_id.to_string(),
        request_id: work.request_id.as_deref(),
        kind: work.kind().as_str(),
        attempt: work.attempt,
        prompt: &work.prompt,
        options: &work.options,
        width,
        height,
        source_path: work.source.as_deref(),
        output_path,
        scratch_dir,
        api_key: work.api_key.as_ref().map(Secret::reveal),
    };
    let mut bytes = serde_json::to_vec(&document)
        .map_err(|error| Error::Failed(format!("the job could not be written down: {error}")))?;
    bytes.push(b'\n');
    Ok(bytes)
}

async fn stopped(mut stop: watch::Receiver<bool>) {
    while !is_stopped(&stop) {
        let _ = stop.changed().await;
    }
}

/// Feeds the program and hears it out, until it and its pipes have ended.
async fn converse(
    group: &mut Group,
    document: Vec<u8>,
    heard: &mut Heard,
    progress: &watch::Sender<Progress>,
    secret: Option<&Secret>,
) -> std::io::Result<ExitStatus> {
    let (stdin, stdout, stderr) =
        (group.leader.stdin.take(), group.leader.stdout.take(), group.leader.stderr.take());
    let (over, is_over) = oneshot::channel::<()>();
    let (facts, last_lines) = (&mut heard.facts, &mut heard.last_lines);
    let hearing = async {
        tokio::join!(
            feed(stdin, document),
            hear_progress(stdout, progress, facts, secret),
            keep_last_lines(stderr, last_lines, secret),
        );
    };
    let hearing_out = async {
        tokio::pin!(hearing);
        tokio::select! {
            () = &mut hearing => return,
            _ = is_over => {}
        }
        // Something that left the group may hold the pipes for ever.
        let _ = tokio::time::timeout(LAST_WORDS, hearing).await;
    };
    let ending = async {
        let status = group.finish().await;
        let _ = over.send(());
        status
    };
    tokio::join!(ending, hearing_out).0
}

/// A program that does not want to know all is free not to.
async fn feed(stdin: Option<ChildStdin>, document: Vec<u8>) {
    if let Some(mut stdin) = stdin {
        let _ = stdin.write_all(&document).await;
    }
}

async fn hear_progress(
    stdout: Option<impl AsyncRead + Unpin>,
    progress: &watch::Sender<Progress>,
    facts: &mut Facts,
    secret: Option<&Secret>,
) {
    let Some(stdout) = stdout else { return };
    let mut lines = BufReader::new(stdout);
    let mut garbage = 0u64;
    while let Some(text) = next_line(&mut lines, LINE_BYTES).await {
        let Ok(line) = serde_json::from_slice::<Line>(&text) else {
            garbage += 1;
            continue;
        };
        if let Some(said) = line.output {
            facts.duration = said.duration.or(facts.duration);
            facts.width = said.width.or(facts.width);
            facts.height = said.height.or(facts.height);
        }
        if line.progress.is_none() && line.message.is_none() {
            continue;
        }
        progress.send_modify(|known| {
            known.percent = known.percent.max(whole_percent(line.progress.unwrap_or_default()));
            if let Some(message) = &line.message {
                known.message = Some(readable(message, MESSAGE_CHARACTERS, secret));
            }
        });
    }
    if garbage > 0 {
        // Not the lines themselves: nobody knows what is in them.
        tracing::warn!(lines = garbage, "the engine printed lines that are no progress");
    }
}

async fn keep_last_lines(
    stderr: Option<impl AsyncRead + Unpin>,
    last_lines: &mut std::collections::VecDeque<String>,
    secret: Option<&Secret>,
) {
    let Some(stderr) = stderr else { return };
    let mut lines = BufReader::new(stderr);
    while let Some(line) = next_line(&mut lines, LINE_BYTES).await {
        let line = readable(&String::from_utf8_lossy(&line), LAST_LINE_CHARACTERS, secret);
        if line.is_empty() {
            continue;
        }
        if last_lines.len() == LAST_LINES {
            last_lines.pop_front();
        }
        last_lines.push_back(line);
    }
}

/// The next line without its end, cut off at `most` bytes; none at the end or after an error.
async fn next_line(lines: &mut (impl AsyncBufRead + Unpin), most: usize) -> Option<Vec<u8>> {
    let mut line = Vec::new();
    let mut begun = false;
    loop {
        let available = lines.fill_buf().await.ok()?;
        if available.is_empty() {
            return begun.then_some(line);
        }
        begun = true;
        let end = available.iter().position(|byte| matches!(byte, b'\n' | b'\r'));
        let part = &available[..end.unwrap_or(available.len())];
        line.extend_from_slice(&part[..part.len().min(most - line.len())]);
        let used = end.map_or(available.len(), |end| end + 1);
        lines.consume(used);
        if end.is_some() {
            return Some(line);
        }
    }
}

/// Fit to be kept and shown: no secret, no control characters, so many characters at the most. The
/// secret is taken out before anything is cut off, so that no half of it is left.
fn readable(text: &str, characters: usize, secret: Option<&Secret>) -> String {
    let without = match secret.map(Secret::reveal).filter(|secret| !secret.is_empty()) {
        Some(secret) => without_secret(text, secret),
        None => text.to_owned(),
    };
    let shown = without.chars().filter(|c| !c.is_control()).take(characters);
    shown.collect::<String>().trim().to_owned()
}

/// Also without what a line that was cut off shows of its beginning.
fn without_secret(text: &str, secret: &str) -> String {
    let mut text = text.replace(secret, "***");
    let cut = (4..secret.len())
        .rev()
        .find(|&length| secret.is_char_boundary(length) && text.ends_with(&secret[..length]));
    if let Some(length) = cut {
        text.truncate(text.len() - length);
        text.push_str("***");
    }
    text
}

impl Heard {
    fn judge(&self, status: ExitStatus) -> Result<(), Error> {
        use std::os::unix::process::ExitStatusExt;
        let was_run = status.code().is_none_or(|code| !NOT_RUN.contains(&code));
        let (what, retryable) = match (status.code(), status.signal()) {
            (Some(0), _) => return Ok(()),
            (Some(TRY_LATER), _) => ("the engine asks to be tried again later".to_owned(), true),
            (Some(code), _) if !was_run => {
                (format!("the engine could not be run (exit code {code})"), true)
            }
            (Some(code), _) => (format!("the engine failed with exit code {code}"), false),
            // Short of memory, or an operator: neither is the job's fault.
            (None, signal) => {
                (format!("the engine was ended by signal {}", signal.unwrap_or_default()), true)
            }
        };
        let mut words = what;
        let mut room = WORDS_CHARACTERS - words.chars().count();
        // The last ones say most.
        let fits = |line: &&String| {
            let needed = line.chars().count() + 1;
            room.checked_sub(needed).map(|left| room = left).is_some()
        };
        let lines: Vec<&String> = self.last_lines.iter().rev().take_while(fits).collect();
        for line in lines.into_iter().rev() {
            words.push('\n');
            words.push_str(line);
        }
        Err(match was_run {
            true => Error::Engine { words, retryable },
            false => Error::NotRun(words),
        })
    }
}

async fn made(work: &Work, path: PathBuf, facts: Facts, most: u64) -> Result<Made, Error> {
    let bad = |words: &str| Error::Engine { words: words.to_owned(), retryable: false };
    let checked = output::check(&path, &work.options, most).await;
    let content_type = checked
        .map_err(|error| Error::Failed(format!("the output could not be read: {error}")))?
        .map_err(bad)?;
    Ok(match &work.options {
        Options::Video(options) => {
            let (width, height) = size(options)?;
            let duration = facts.duration.filter(|seconds| seconds.is_finite() && *seconds > 0.0);
            Made {
                poster: poster_beside(&path).await,
                main: MadeFile { path, content_type },
                duration: Some(duration.unwrap_or_else(|| f64::from(options.duration))),
                width: Some(facts.width.unwrap_or(width)),
                height: Some(facts.height.unwrap_or(height)),
                captions: None,
            }
        }
        Options::Translation(_) => Made {
            main: MadeFile { path, content_type },
            duration: None,
            width: None,
            height: None,
            poster: None,
            captions: None,
        },
    })
}

/// `poster.jpg`, if the program left one that is a JPEG of a sensible size.
async fn poster_beside(video: &Path) -> Option<MadeFile> {
    let path = video.with_file_name("poster.jpg");
    if output::is_jpeg(&path, LARGEST_POSTER).await {
        return Some(MadeFile { path, content_type: "image/jpeg".to_owned() });
    }
    None
}

#[cfg(test)]
#[path = "command_tests.rs"]
mod tests;
