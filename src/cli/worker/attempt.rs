//! One attempt of a remote worker: from the lease to the outcome, or to the moment when the job is
//! not ours any more.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::server::{Lease, Refused, Report, Server};
use crate::clock::Clock;
use crate::domain::ids::JobId;
use crate::domain::job::Options;
use crate::media::renderer::pause::Pause;
use crate::media::renderer::{self, Engine, Made, MadeFile, Progress, Work};

/// How often the server is asked whether the job was cancelled, by telling it how far we are: a
/// cancelled job has stopped within two seconds.
const REPORT_EVERY: Duration = Duration::from_millis(1000);
/// A lease that is shorter is renewed so many times.
const LEASE_PART: u32 = 3;
const SHORTEST_LEASE: Duration = Duration::from_secs(3);
/// How long a call to the server may go on once the attempt is over.
const GRACE: Duration = Duration::from_millis(1500);
/// A source that is larger is none of ours, in bytes.
const LARGEST_SOURCE: u64 = 4 << 30;
/// Between two tries of a call that a server, on its way down or up, did not answer.
const FIRST_DELAY: Duration = Duration::from_millis(200);
const LONGEST_DELAY: Duration = Duration::from_secs(5);

pub struct Attempt<'a> {
    engine: &'a Engine,
    server: &'a Server,
    lease: Lease,
    directory: &'a Path,
    clock: Clock,
}

/// Why there is no result.
enum Ended {
    LeaseLost,
    Cancelled,
    /// This worker was told to stop.
    Stopped,
    /// This machine lacks what every job needs: it was no attempt.
    NotBegun,
    /// The machine's fault, or its way to the server's, as far as anybody can tell. It counts: a job
    /// whose fault it is after all must not be tried for ever.
    Machine(String),
    Failed {
        error: String,
        retryable: bool,
    },
}

impl From<renderer::Error> for Ended {
    fn from(error: renderer::Error) -> Self {
        match error {
            renderer::Error::Cancelled => Self::Cancelled,
            renderer::Error::Invalid(error) => Self::Failed { error, retryable: false },
            renderer::Error::Engine { words, retryable } => {
                Self::Failed { error: words, retryable }
            }
            renderer::Error::Failed(error) => {
                tracing::error!(error, "the engine failed");
                Self::Machine("rendering failed".to_owned())
            }
            renderer::Error::NotRun(words) => {
                tracing::error!("the engine could not be run");
                Self::Machine(words)
            }
        }
    }
}

impl From<Refused> for Ended {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::LeaseLost => Self::LeaseLost,
            Refused::Unacceptable(_) => {
                let error = "the server does not accept the result".to_owned();
                Self::Failed { error, retryable: false }
            }
            other => {
                tracing::error!(error = %other, "an attempt could not go on");
                Self::Machine("the worker failed".to_owned())
            }
        }
    }
}

impl<'a> Attempt<'a> {
    pub fn new(engine: &'a Engine, server: &'a Server, lease: Lease, directory: &'a Path) -> Self {
        Self { engine, server, lease, directory, clock: Clock::system() }
    }

    /// Does the job, and says how it ended.
    pub async fn run(self, pause: &Pause, stopping: watch::Receiver<bool>) {
        let fail = async |error: &str, retryable: bool| {
            tracing::info!(retryable, "ended without a result");
            self.persist(|| self.server.fail(&self.lease, error, retryable)).await
        };
        let give_back = async |why: &str| {
            tracing::info!(why, "given back");
            self.persist(|| self.server.give_back(&self.lease, why)).await
        };
        let outcome = self.attempt(stopping).await;
        match &outcome {
            Ok(()) => pause.worked(),
            Err(Ended::NotBegun | Ended::Machine(_)) => pause.failed(),
            Err(_) => {}
        }
        let told = match outcome {
            Ok(()) => return tracing::info!("completed"),
            Err(Ended::LeaseLost) => return tracing::warn!("the lease was lost"),
            Err(Ended::Cancelled) => {
                tracing::info!("cancelled");
                self.persist(|| self.server.cancelled(&self.lease)).await
            }
            Err(Ended::Machine(error)) => fail(&error, true).await,
            Err(Ended::Failed { error, retryable }) => fail(&error, retryable).await,
            Err(Ended::Stopped) => give_back("the worker was stopped").await,
            Err(Ended::NotBegun) => give_back("the worker could not begin").await,
        };
        if let Err(error) = told {
            // The lease runs out by itself, and another attempt begins.
            tracing::warn!(%error, "the end of an attempt was not heard");
        }
    }

    async fn attempt(&self, mut stopping: watch::Receiver<bool>) -> Result<(), Ended> {
        let (progress, seen) = watch::channel(Progress::default());
        let (stop, stopped) = watch::channel(false);
        let mut working = std::pin::pin!(self.work(&progress, stopped));
        let ended = tokio::select! {
            biased;
            done = &mut working => return done,
            ended = self.report(seen) => ended,
            _ = stopping.wait_for(|stop| *stop) => Ended::Stopped,
        };
        // An engine ends with all that it started; a call to the server is dropped in the end.
        stop.send_replace(true);
        match tokio::time::timeout(GRACE, working).await {
            // It was as good as done, and the server has it.
            Ok(Ok(())) => Ok(()),
            _ => Err(ended),
        }
    }

    /// Everything that is to be done while the lease holds.
    async fn work(
        &self,
        progress: &watch::Sender<Progress>,
        stop: watch::Receiver<bool>,
    ) -> Result<(), Ended> {
        tokio::fs::create_dir_all(self.directory).await.map_err(|error| {
            tracing::error!(%error, "the scratch directory cannot be used");
            Ended::NotBegun
        })?;
        let work = Work {
            job_id: JobId(self.lease.job_id),
            request_id: self.lease.request_id.clone(),
            attempt: self.lease.attempt,
            prompt: self.lease.prompt.clone(),
            options: self.lease.options.clone(),
            source: self.source().await?,
            api_key: self.lease.api_key.as_ref().map(|key| key.0.clone()),
        };
        let made = self.engine.make(&work, self.directory, progress, stop.clone()).await?;
        if *stop.borrow() {
            return Err(Ended::Cancelled);
        }
        self.hand_in(&made).await?;
        Ok(self.persist(|| self.server.complete(&self.lease, &made)).await?)
    }

    async fn source(&self) -> Result<Option<PathBuf>, Ended> {
        let needed = matches!(self.engine, Engine::Command(_));
        let Some(link) = self.lease.source.as_ref().filter(|_| needed) else { return Ok(None) };
        let path = self.directory.join("source");
        let download = || self.server.download(&self.lease, link, &path, LARGEST_SOURCE);
        let fetched = self.persist(download).await;
        match fetched {
            Ok(()) => Ok(Some(path)),
            Err(Refused::Unacceptable(_) | Refused::Unwelcome(_)) => {
                let error = "the source file is gone or too large".to_owned();
                Err(Ended::Failed { error, retryable: false })
            }
            Err(other) => Err(other.into()),
        }
    }

    /// The result, and what of the rest the server has a place for.
    async fn hand_in(&self, made: &Made) -> Result<(), Ended> {
        let wanted = &self.lease.outputs;
        let main = wanted.first().map_or_else(|| self.main_name(), |first| first.name.as_str());
        let has_place = |name: &str| wanted.iter().any(|it| it.name == name);
        let beside = [("poster", &made.poster), ("captions", &made.captions)];
        let beside = beside
            .into_iter()
            .filter_map(|(name, file)| Some((name, file.as_ref()?)))
            .filter(|(name, _)| has_place(name));
        for (name, file) in [(main, &made.main)].into_iter().chain(beside) {
            self.upload(name, file).await?;
        }
        Ok(())
    }

    fn main_name(&self) -> &'static str {
        match &self.lease.options {
            Options::Video(_) => "video",
            Options::Translation(_) => "translation",
        }
    }

    async fn upload(&self, name: &str, file: &MadeFile) -> Result<(), Ended> {
        Ok(self.persist(|| self.server.hand_in(&self.lease, name, file)).await?)
    }

    /// Tells how far the work is, until the server says that it is not wanted any more.
    async fn report(&self, mut seen: watch::Receiver<Progress>) -> Ended {
        let mut lease_ends_at = Instant::now() + self.left(self.lease.expires_at);
        loop {
            let left = lease_ends_at.saturating_duration_since(Instant::now());
            tokio::time::sleep(REPORT_EVERY.min(left / LEASE_PART)).await;
            let progress = seen.borrow_and_update().clone();
            match self.server.progress(&self.lease, &progress).await {
                Ok(Report { cancelled: true, .. }) => return Ended::Cancelled,
                Ok(Report { expires_at, .. }) => {
                    let expires_at = expires_at.unwrap_or(self.lease.expires_at);
                    lease_ends_at = Instant::now() + self.left(expires_at);
                }
                Err(Refused::LeaseLost) => return Ended::LeaseLost,
                // Also when the answer is that we are unwelcome: a token that is being exchanged.
                Err(error) => tracing::warn!(%error, "progress was not heard"),
            }
            // Whoever cannot be heard has lost the job to somebody else by now.
            if Instant::now() >= lease_ends_at {
                return Ended::LeaseLost;
            }
        }
    }

    /// How much is left of a lease. With a clock that differs from the server's this is wrong, so
    /// that it has a least value: the server decides.
    fn left(&self, expires_at: chrono::DateTime<chrono::Utc>) -> Duration {
        (expires_at - self.clock.now()).to_std().unwrap_or_default().max(SHORTEST_LEASE)
    }

    /// Tries a call again while the server does not answer. The lease bounds it: when it is lost,
    /// [`Self::report`] ends the attempt, and after it a few tries are enough.
    async fn persist<T, F, C>(&self, call: C) -> Result<T, Refused>
    where
        C: Fn() -> F,
        F: Future<Output = Result<T, Refused>>,
    {
        let mut delay = FIRST_DELAY;
        for _ in 0..TRIES {
            match call().await {
                Err(Refused::Later(reason)) => {
                    tracing::warn!(reason, "the server is tried again");
                    tokio::time::sleep(delay.mul_f64(rand::random_range(0.5..1.0))).await;
                    delay = (delay * 2).min(LONGEST_DELAY);
                }
                other => return other,
            }
        }
        call().await
    }
}

/// With the delays between them, longer than a lease.
const TRIES: usize = 20;
