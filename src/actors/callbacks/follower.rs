//! From the end of a job in the log to the request that tells it.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use actix::Arbiter;
use chrono::{DateTime, Utc};
use futures_util::future::LocalBoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::json;
use tokio::sync::watch;
use tracing::Instrument;
use uuid::Uuid;

use super::record::{End, Record};
use super::sender::{Answer, Message, Sender};
use super::{Callbacks, Error, KEPT_FOR, Show, name, url_of};
use crate::actors::supervise::supervise;
use crate::actors::{System, metadata_sync};
use crate::domain::Aggregate;
use crate::domain::ids::{JobId, UserId};
use crate::domain::job::Job;
use crate::log::Recorded;
use crate::views::View;

/// Events read at once.
const PAGE: usize = 1000;
/// Requests under way at once, and of one user, whose addresses may all be slow.
const AT_ONCE: usize = 32;
const AT_ONCE_PER_USER: usize = 4;
/// After what could not be read or written, and the longest sleep.
const PAUSE: Duration = Duration::from_secs(1);
const LOOK_EVERY: Duration = Duration::from_secs(60);
const TRIM_EVERY: Duration = Duration::from_secs(3600);
/// When a job that could not be shown is looked at again.
const NOT_NOW: chrono::TimeDelta = chrono::TimeDelta::seconds(10);

/// What the delivery of callbacks needs.
pub struct Delivery {
    pub system: Arc<System>,
    pub callbacks: Callbacks,
    pub sender: Sender,
    pub show: Show,
    /// Where the position in the log is kept.
    pub path: PathBuf,
}

/// Starts delivering, on a thread of its own, until `stopping` says true.
pub fn start(delivery: Delivery, mut stopping: watch::Receiver<bool>) {
    Arbiter::new().spawn_fn(move || {
        let delivery = Arc::new(delivery);
        actix::spawn(async move {
            // A request that is cut off here is made again after the next start.
            tokio::select! {
                () = supervise("callbacks", || run(Arc::clone(&delivery))) => {}
                _ = stopping.wait_for(|stopping| *stopping) => {}
            }
        });
    });
}

async fn run(delivery: Arc<Delivery>) {
    let mut follower = Follower::open(Arc::clone(&delivery));
    let mut progress = delivery.system.progress.clone();
    while let Err(error) = follower.load().await {
        tracing::warn!(%error, "the waiting callbacks could not be read");
        tokio::time::sleep(PAUSE).await;
    }
    let mut trim_due = tokio::time::interval(TRIM_EVERY);
    let mut sending = FuturesUnordered::new();
    loop {
        // What the read model has not taken in yet cannot be shown.
        let until = progress.now().position;
        let mut sleep = LOOK_EVERY;
        if let Err(error) = follower.read_on(until).await {
            tracing::warn!(%error, "the ends of jobs could not be noted");
            sleep = PAUSE;
        }
        follower.begin(&mut sending);
        let sleep = sleep.min(follower.until_next());
        tokio::select! {
            Some(sent) = sending.next() => follower.note(sent).await,
            () = progress.moved() => {}
            _ = trim_due.tick() => {
                if let Err(error) = delivery.callbacks.trim(&delivery.system).await {
                    tracing::warn!(%error, "old records of callbacks could not be dropped");
                }
            }
            () = tokio::time::sleep(sleep) => {}
        }
    }
}

/// A job with a callback that waits.
struct Waiting {
    user_id: UserId,
    due_at: DateTime<Utc>,
    under_way: bool,
}

struct Follower {
    delivery: Arc<Delivery>,
    /// As it is on disk.
    checkpoint: u64,
    /// Up to where events were read, and all ends in them noted.
    read: u64,
    /// Whether anything was noted since the checkpoint was kept.
    noted: bool,
    waiting: HashMap<JobId, Waiting>,
}

/// What came of a turn.
struct Sent {
    job_id: JobId,
    outcome: Outcome,
}

enum Outcome {
    Attempted {
        revision: u64,
        at: DateTime<Utc>,
        answer: Answer,
    },
    /// Nobody is there any more who could be told.
    Gone,
    /// Another node has told it meanwhile, or is to try later.
    NotDue,
    NotNow,
    /// Another node is telling it.
    Elsewhere,
}

impl Follower {
    fn open(delivery: Arc<Delivery>) -> Self {
        let head = *delivery.system.log.head().borrow();
        let kept = std::fs::read_to_string(&delivery.path).ok();
        let kept = kept.and_then(|text| text.trim().parse().ok());
        // Without it all of the log is read again: the records say what was told.
        let checkpoint = kept.filter(|position| *position <= head).unwrap_or(0);
        Self { delivery, checkpoint, read: checkpoint, noted: false, waiting: HashMap::new() }
    }

    /// Finds what was waiting at the last stop.
    async fn load(&mut self) -> Result<(), Error> {
        for listed in self.delivery.callbacks.waiting.list().await? {
            let id = listed.name.strip_suffix(".json").and_then(|it| Uuid::try_parse(it).ok());
            if let Some(job_id) = id.map(JobId) {
                let record = self.delivery.callbacks.of_job(job_id).await?;
                self.settle(job_id, record.as_ref()).await?;
            }
        }
        Ok(())
    }

    /// Reads on to `until` and notes which jobs have ended.
    async fn read_on(&mut self, until: u64) -> Result<(), Error> {
        while self.read < until {
            let page = self.delivery.system.log.read_all(self.read, PAGE).await?;
            for recorded in page.iter().take_while(|recorded| recorded.position <= until) {
                self.take_in(recorded).await?;
                self.read = recorded.position;
            }
            if page.len() < PAGE {
                self.read = self.read.max(until);
            }
            self.keep_checkpoint()?;
        }
        Ok(())
    }

    async fn take_in(&mut self, recorded: &Recorded) -> Result<(), Error> {
        let Some(end) = End::of(recorded) else { return Ok(()) };
        let (category, id) = recorded.stream.split_once('-').unwrap_or_default();
        let (true, Ok(id)) = (category == Job::CATEGORY, Uuid::try_parse(id)) else {
            return Ok(());
        };
        if self.delivery.system.clock.now() - recorded.time >= KEPT_FOR {
            return Ok(());
        }
        let Some(user_id) = self.asker(recorded).await? else { return Ok(()) };
        let (job_id, callbacks) = (JobId(id), &self.delivery.callbacks);
        let known = callbacks.of_job(job_id).await?;
        let is_first = known.is_none();
        let mut record = known.unwrap_or_else(|| Record::new(user_id));
        let delays = &callbacks.delays;
        if record.add(job_id, end, delays) {
            if !is_first {
                callbacks.keep(job_id, &record).await?;
            } else if !callbacks.keep_first(job_id, &record).await? {
                // Another node was first, and may have noted an attempt since.
                record = callbacks.of_job(job_id).await?.unwrap_or(record);
            }
        }
        self.noted = true;
        self.settle(job_id, Some(&record)).await
    }

    /// The user of a job that names an address. Only whether there is one is looked at here.
    async fn asker(&self, recorded: &Recorded) -> Result<Option<UserId>, Error> {
        #[derive(Deserialize)]
        struct Asked {
            user_id: UserId,
            callback_url: Option<IgnoredAny>,
        }
        let first = self.delivery.system.log.read_stream(&recorded.stream, 0, 1).await?;
        let asked = first.first().and_then(|it| serde_json::from_slice::<Asked>(&it.data).ok());
        Ok(asked.filter(|it| it.callback_url.is_some()).map(|it| it.user_id))
    }

    /// Makes what waits agree with a record, here and in the store.
    async fn settle(&mut self, job_id: JobId, record: Option<&Record>) -> Result<(), Error> {
        let next = record.and_then(|record| Some((record, record.next()?.1)));
        let store = &self.delivery.callbacks.waiting;
        let Some((record, due_at)) = next else {
            store.delete(&name(job_id)).await?;
            self.waiting.remove(&job_id);
            return Ok(());
        };
        match self.waiting.get_mut(&job_id) {
            Some(waiting) => waiting.due_at = due_at,
            None => {
                store.put(&name(job_id), Vec::new()).await?;
                let user_id = record.user_id.clone();
                self.waiting.insert(job_id, Waiting { user_id, due_at, under_way: false });
            }
        }
        Ok(())
    }

    /// To read events anew that concern nobody costs less than to sync a file after each of them.
    fn keep_checkpoint(&mut self) -> Result<(), Error> {
        let enough = self.noted || self.read >= self.checkpoint + PAGE as u64;
        if enough && self.read > self.checkpoint {
            metadata_sync::replace(&self.delivery.path, &self.read.to_string())?;
            self.checkpoint = self.read;
            self.noted = false;
        }
        Ok(())
    }

    /// Begins what is due, the longest due first, as far as there is room.
    fn begin(&mut self, sending: &mut FuturesUnordered<LocalBoxFuture<'static, Sent>>) {
        let now = self.delivery.system.clock.now();
        let mut of_user: HashMap<UserId, usize> = HashMap::new();
        for waiting in self.waiting.values().filter(|it| it.under_way) {
            *of_user.entry(waiting.user_id.clone()).or_default() += 1;
        }
        let due = self.waiting.iter_mut().filter(|(_, it)| !it.under_way && it.due_at <= now);
        let mut due: Vec<_> = due.collect();
        due.sort_by_key(|(_, it)| it.due_at);
        for (job_id, waiting) in due {
            let under_way = of_user.entry(waiting.user_id.clone()).or_default();
            if sending.len() >= AT_ONCE {
                return;
            }
            if *under_way < AT_ONCE_PER_USER {
                *under_way += 1;
                waiting.under_way = true;
                let (delivery, job_id) = (Arc::clone(&self.delivery), *job_id);
                sending.push(Box::pin(async move {
                    let outcome = delivery.turn(job_id).await;
                    Sent { job_id, outcome }
                }));
            }
        }
    }

    /// Until the next one is due; those that are due and were not begun wait for others to end.
    fn until_next(&self) -> Duration {
        let now = self.delivery.system.clock.now();
        let waiting = self.waiting.values().filter(|it| !it.under_way);
        let next = waiting.map(|it| it.due_at).filter(|at| *at > now).min();
        next.and_then(|at| (at - now).to_std().ok()).unwrap_or(LOOK_EVERY)
    }

    /// Writes down what came of an attempt. As long as it cannot be written, no other is begun.
    async fn note(&mut self, sent: Sent) {
        while let Err(error) = self.try_to_note(&sent).await {
            tracing::warn!(%error, "an attempt at a callback could not be noted");
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn try_to_note(&mut self, sent: &Sent) -> Result<(), Error> {
        let (job_id, callbacks) = (sent.job_id, &self.delivery.callbacks);
        let mut record = callbacks.of_job(job_id).await?;
        match &sent.outcome {
            Outcome::Attempted { revision, at, answer } => {
                if let Some(record) = &mut record {
                    let chance = rand::random_range(0.0..1.0);
                    record.attempted(*revision, *at, answer, &callbacks.delays, chance);
                    callbacks.keep(job_id, record).await?;
                }
                let status = answer.status.ok();
                tracing::debug!(%job_id, revision, status, "a callback was tried");
            }
            Outcome::Gone => {
                callbacks.records.delete(&name(job_id)).await?;
                record = None;
            }
            Outcome::NotDue | Outcome::NotNow | Outcome::Elsewhere => {}
        }
        self.settle(job_id, record.as_ref()).await?;
        if !matches!(sent.outcome, Outcome::Elsewhere) {
            self.delivery.give_up_claim(job_id).await;
        }
        if let Some(waiting) = self.waiting.get_mut(&job_id) {
            waiting.under_way = false;
            if matches!(sent.outcome, Outcome::NotNow | Outcome::Elsewhere) {
                waiting.due_at = self.delivery.system.clock.now() + NOT_NOW;
            }
        }
        Ok(())
    }
}

impl Delivery {
    /// One attempt, unless another node has the job.
    async fn turn(&self, job_id: JobId) -> Outcome {
        match self.claim(job_id).await {
            Ok(true) => {}
            Ok(false) => return Outcome::Elsewhere,
            Err(error) => {
                tracing::warn!(%job_id, %error, "a callback could not be claimed");
                return Outcome::Elsewhere;
            }
        }
        self.attempt(job_id).await.unwrap_or_else(|error| {
            tracing::warn!(%job_id, %error, "a callback could not be prepared");
            Outcome::NotNow
        })
    }

    /// Nobody else follows a log that is this process's alone.
    async fn claim(&self, job_id: JobId) -> Result<bool, Error> {
        let alone = self.system.log.is_exclusive();
        Ok(alone || self.callbacks.claims.take(job_id, self.system.clock.now()).await?)
    }

    async fn give_up_claim(&self, job_id: JobId) {
        if !self.system.log.is_exclusive() {
            self.callbacks.claims.give_up(job_id).await;
        }
    }

    async fn attempt(&self, job_id: JobId) -> Result<Outcome, Error> {
        let views = &self.system.views;
        let Some(record) = self.callbacks.of_job(job_id).await? else { return Ok(Outcome::Gone) };
        let Some((callback, due_at)) = record.next() else { return Ok(Outcome::NotDue) };
        if due_at > self.system.clock.now() {
            return Ok(Outcome::NotDue);
        }
        let gone = views.user(&record.user_id)?.is_some_and(|user| user.deleted);
        let url = if gone { None } else { url_of(&self.system, job_id).await? };
        let Some(url) = url else { return Ok(Outcome::Gone) };
        // What the view of jobs shows is old while it is parked, and nothing until it is rebuilt.
        let parked = self.system.progress.now().parked.iter().any(|it| it.view == View::Jobs);
        if parked {
            return Ok(Outcome::NotNow);
        }
        let Some(row) = views.job(&job_id)? else { return Ok(Outcome::NotNow) };
        let body = serde_json::to_vec(&json!({
            "type": callback.ending.name(),
            "timestamp": callback.happened_at,
            "data": (self.show)(&row)?,
        }))?;
        let at = self.system.clock.now();
        let (id, request_id) = (callback.id.as_str(), callback.request_id.as_deref());
        let message = Message { url: &url, id, request_id, at, body };
        // Not the address: its owner alone may know it.
        let span = tracing::info_span!("callback", otel.kind = "client", %job_id, request_id);
        let answer = self.sender.send(message).instrument(span).await;
        Ok(Outcome::Attempted { revision: callback.revision, at, answer })
    }
}
