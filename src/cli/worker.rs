//! `t2m worker`: leases jobs from a server over HTTP and lets an engine of this machine do them.

mod attempt;
mod scratch;
mod server;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::Instrument;
use url::Url;

use self::attempt::Attempt;
use self::scratch::Scratch;
use self::server::{Lease, Refused, Server};
use super::assemble::engine_of;
use super::interrupt::Interrupt;
use super::{BadConfiguration, telemetry};
use crate::config::{self, LimitOptions, LogFormat, Secret, TraceOptions};
use crate::domain::job::Kind;
use crate::media::renderer::Engine;
use crate::media::renderer::pause::Pause;
use crate::telemetry::attempt_span;

/// How long one request for a job waits at the server.
const WAIT: Duration = Duration::from_secs(20);
/// Between two requests to a server that does not answer; it doubles, with a little chance in it so
/// that not all workers come back at once.
const FIRST_DELAY: Duration = Duration::from_millis(250);
const LONGEST_DELAY: Duration = Duration::from_secs(30);

#[derive(Args)]
pub struct Worker {
    /// What does the work: `storyboard` or `command:PROGRAM ARGS…`
    #[arg(long, env = "T2M_ENGINE", default_value = "storyboard")]
    engine: String,
    /// The server's address, e.g. https://t2m.example.com
    #[arg(long, env = "T2M_SERVER")]
    server: Option<String>,
    /// One of the server's T2M_WORKER_TOKENS
    #[arg(long, env = "T2M_WORKER_TOKEN", hide_env_values = true)]
    token: Option<Secret>,
    /// Kinds of jobs, comma separated: `video`, `translation`
    #[arg(long, env = "T2M_WORKER_KINDS", default_value = "video", value_delimiter = ',')]
    kinds: Vec<String>,
    /// Jobs at once
    #[arg(long, env = "T2M_WORKER_CONCURRENCY", default_value_t = 1,
          value_parser = clap::value_parser!(u16).range(1..=64))]
    concurrency: u16,
    /// The name that it goes by [default: the engine's, and the process id]
    #[arg(long, env = "T2M_WORKER_ID")]
    worker_id: Option<String>,
    /// Where it works, in a directory of its own; several workers may share it [default: among the
    /// temporary directories]
    #[arg(long, env = "T2M_WORKER_SCRATCH")]
    scratch: Option<PathBuf>,
    /// Log lines as `text` or as `json`
    #[arg(long, env = "T2M_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
    #[command(flatten)]
    traces: TraceOptions,
    #[command(flatten)]
    limits: LimitOptions,
}

/// A worker that can work.
struct Ready {
    engine: Engine,
    server: Server,
    kinds: Vec<Kind>,
    concurrency: usize,
    /// Of traces.
    collector: Option<String>,
    pause: Pause,
}

impl Worker {
    pub fn run(self) -> anyhow::Result<()> {
        let (log_format, above) = (self.log_format, self.scratch.clone());
        let ready = Arc::new(self.check()?);
        // Ends last, so that what is left at the very end is sent too.
        let telemetry = telemetry::init("t2m-worker", log_format, ready.collector.as_deref())?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let scratch = Scratch::take(&scratch::shared(above.as_deref())?)?;
        let outcome = runtime.block_on(work(ready, scratch.path()));
        drop((scratch, runtime, telemetry));
        outcome
    }

    fn check(self) -> Result<Ready, BadConfiguration> {
        let mut faults = Vec::new();
        let engine = config::Engine::parse(&self.engine);
        if let Err(fault) = &engine {
            faults.push(format!("T2M_ENGINE: {fault}"));
        }
        let limits = self.limits.check().map_err(|found| faults.extend(found)).ok();
        let collector = self.traces.check(&mut faults);
        let kinds: Option<Vec<Kind>> =
            self.kinds.iter().map(|kind| Kind::parse(kind.trim())).collect();
        // Clap would not name the variables.
        for (variable, is_there) in
            [("T2M_SERVER", self.server.is_some()), ("T2M_WORKER_TOKEN", self.token.is_some())]
        {
            if !is_there {
                faults.push(format!("{variable}: required"));
            }
        }
        let url = self.server.as_deref().and_then(|server| Url::parse(server).ok());
        let url = url.filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
        if kinds.is_none() {
            faults.push("T2M_WORKER_KINDS: `video`, `translation` or both".to_owned());
        }
        if self.server.is_some() && url.is_none() {
            faults.push("T2M_SERVER: not an http or https URL".to_owned());
        }
        let engine = engine.ok().zip(limits).and_then(|(engine, limits)| {
            let made = engine_of(&engine, limits);
            if made.is_none() {
                faults.push("T2M_ENGINE: a worker needs one".to_owned());
            }
            made
        });
        if let (Some(Engine::Storyboard { .. }), Some(kinds)) = (&engine, &kinds)
            && kinds.contains(&Kind::Translation)
        {
            faults.push("T2M_WORKER_KINDS: the storyboard makes videos only".to_owned());
        }
        let process = std::process::id();
        let name = engine.as_ref().map_or("worker", Engine::name);
        let worker_id = self.worker_id.unwrap_or_else(|| format!("{name}-{process}"));
        let server = url.zip(self.token).and_then(|(url, token)| {
            Server::new(&url, token, worker_id)
                .map_err(|_| faults.push("T2M_WORKER_TOKEN: cannot be sent in a header".to_owned()))
                .ok()
        });
        match (engine, server, kinds) {
            (Some(engine), Some(server), Some(kinds)) if faults.is_empty() => {
                let concurrency = usize::from(self.concurrency);
                let pause = Pause::default();
                Ok(Ready { engine, server, kinds, concurrency, collector, pause })
            }
            _ => Err(BadConfiguration(faults)),
        }
    }
}

/// Works until it is told to stop; then gives back what it has.
async fn work(ready: Arc<Ready>, scratch: &Path) -> anyhow::Result<()> {
    let (stop, stopping) = watch::channel(false);
    let mut interrupt = Interrupt::listen()?;
    let mut slots = JoinSet::new();
    for number in 0..ready.concurrency {
        slots.spawn(slot(Arc::clone(&ready), scratch.to_owned(), number, stopping.clone()));
    }
    tracing::info!(engine = ready.engine.name(), jobs = ready.concurrency, "waiting for jobs");
    let outcome = tokio::select! {
        () = interrupt.heard() => Ok(()),
        // A slot ends by itself only when the server will not have it.
        ended = slots.join_next() => ended.unwrap_or(Ok(Ok(()))).context("a slot broke off")?,
    };
    tracing::info!("stopping: jobs are given back");
    stop.send_replace(true);
    while slots.join_next().await.is_some() {}
    outcome
}

/// One job after the other.
async fn slot(
    ready: Arc<Ready>,
    scratch: PathBuf,
    number: usize,
    mut stopping: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let mut delay = FIRST_DELAY;
    loop {
        let leased = tokio::select! {
            biased;
            _ = stopping.wait_for(|stop| *stop) => return Ok(()),
            leased = next(&ready) => leased,
        };
        match leased {
            Ok(Some(lease)) => {
                delay = FIRST_DELAY;
                let directory = scratch.join(format!("{number}-{}", lease.lease_id));
                let span = attempt_span(lease.job_id, lease.attempt, lease.request_id.as_deref());
                let attempt = Attempt::new(&ready.engine, &ready.server, lease, &directory);
                attempt.run(&ready.pause, stopping.clone()).instrument(span).await;
                let _ = tokio::fs::remove_dir_all(&directory).await;
            }
            Ok(None) => delay = FIRST_DELAY,
            Err(Refused::Unwelcome(status)) => {
                anyhow::bail!("the server refuses this worker with status {status}")
            }
            Err(error) => {
                tracing::warn!(%error, "no job could be asked for");
                tokio::select! {
                    biased;
                    _ = stopping.wait_for(|stop| *stop) => return Ok(()),
                    () = tokio::time::sleep(delay.mul_f64(rand::random_range(0.5..1.0))) => {}
                }
                delay = (delay * 2).min(LONGEST_DELAY);
            }
        }
    }
}

/// The next job, once this machine is believed to be able to do it.
async fn next(ready: &Ready) -> Result<Option<Lease>, Refused> {
    ready.pause.over().await;
    ready.server.lease(&ready.kinds, WAIT).await
}
