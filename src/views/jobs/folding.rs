//! What events do to the row of a job.

use std::borrow::Cow;

use chrono::{DateTime, Utc};
use rusqlite::{Connection, OptionalExtension, params};

use super::status;
use crate::domain::ids::{JobId, UserId};
use crate::domain::job::{Event, Kind, Options, Output, Request, VideoOptions};
use crate::domain::schedule::Share;
use crate::domain::text::Personal;
use crate::domain::tier::Class;
use crate::domain::translation::TranslationOptions;
use crate::views::batch::{Batch, Held, Record};
use crate::views::column::{Id, Json, Text, Time, Word, int, unsigned};
use crate::views::feed::JobItem;
use crate::views::queue::{Place, Standing, TurnKey};
use crate::views::tallies;

/// What is shown of an attempt whose worker was not heard of any more.
const LEASE_RAN_OUT: &str = "the worker's lease ran out";

impl Batch<'_> {
    pub fn job(
        &mut self,
        position: u64,
        time: DateTime<Utc>,
        job_id: JobId,
        event: &Event,
    ) -> rusqlite::Result<()> {
        match event {
            Event::Requested(request) => {
                if self.held.jobs.get(self.sql, &job_id)?.is_some() {
                    // Twice: no rule of the domain makes it.
                    return Ok(());
                }
                let erased = self.is_erased(&request.user_id)?;
                let job = Job::requested(position, time, request, erased);
                self.held.jobs.put(self.sql, &job_id, job)?;
                self.count_request(&request.user_id, time)?;
            }
            Event::Progressed { .. } => {}
            event => self.job_went_on(position, time, job_id, event)?,
        }
        let Held { jobs, feed, .. } = &mut *self.held;
        // One that was never requested: no rule of the domain makes it, and nothing can be shown.
        let Some(job) = jobs.change(self.sql, &job_id)? else { return Ok(()) };
        if let Event::Progressed { .. } = event {
            job.take_in(position, time, event);
        }
        let (event, message) = shown(event);
        if feed.keeps(position, event) {
            let item = JobItem {
                job_id,
                event,
                status: status(job.state),
                state: job.state,
                progress: job.progress,
                message,
                attempt: job.attempt,
                error: job.error.as_deref(),
                time,
            };
            feed.add(position, &job.user_id, Some(job_id), event, &item)?;
        }
        if !self.building && !self.touched.contains(&job.user_id) {
            self.touched.insert(job.user_id.clone());
        }
        Ok(())
    }

    fn job_went_on(
        &mut self,
        position: u64,
        time: DateTime<Utc>,
        job_id: JobId,
        event: &Event,
    ) -> rusqlite::Result<()> {
        let Some(job) = self.held.jobs.change(self.sql, &job_id)? else { return Ok(()) };
        let before = job.state;
        let lease_ran_out = job.error.as_deref() == Some(LEASE_RAN_OUT);
        job.take_in(position, time, event);
        let (user_id, after, turn) = (job.user_id.clone(), job.state, job.turn());
        if matches!(event, Event::Leased { .. }) {
            self.serve(position, turn)?;
        }
        let moved = tallies::Moved { user_id: &user_id, before, after, event, lease_ran_out };
        self.count_move(&moved, time)
    }
}

/// The columns of a job that events change, and of a new one all.
pub(in crate::views) struct Job {
    new: Option<New>,
    /// Leased in this batch.
    pub leased: bool,
    /// More than its progress has changed.
    moved: bool,
    user_id: UserId,
    pub kind: Kind,
    class: Class,
    state: &'static str,
    attempt: u32,
    progress: u8,
    error: Option<String>,
    output: Option<Output>,
    lease_id: Option<Id>,
    lease_expires_at: Option<Time>,
    available_at: Option<Time>,
    queued_position: i64,
    started_at: Option<Time>,
    finished_at: Option<Time>,
    updated_at: Time,
}

/// A job that has no row yet.
struct New {
    position: u64,
    time: DateTime<Utc>,
    request: Box<Request>,
    /// Its user has been forgotten by now.
    erased: bool,
}

impl Job {
    fn requested(position: u64, time: DateTime<Utc>, request: &Request, erased: bool) -> Self {
        Self {
            new: Some(New { position, time, request: Box::new(request.clone()), erased }),
            leased: false,
            moved: true,
            user_id: request.user_id.clone(),
            kind: request.kind,
            class: request.class(),
            state: "queued",
            attempt: 0,
            progress: 0,
            error: None,
            output: None,
            lease_id: None,
            lease_expires_at: None,
            available_at: Some(Time(time)),
            queued_position: int(position),
            started_at: None,
            finished_at: None,
            updated_at: Time(time),
        }
    }

    /// Whose turn its lease is.
    pub fn turn(&self) -> TurnKey {
        TurnKey { kind: self.kind, class: self.class, user_id: self.user_id.clone() }
    }

    pub fn place(&self, served: u64, shares: Option<[Share; 3]>) -> Place {
        Place {
            kind: self.kind,
            class: self.class,
            user_id: self.user_id.clone(),
            position: unsigned(self.queued_position),
            standing: Standing::of(self.state, self.available_at),
            served,
            shares,
        }
    }

    fn take_in(&mut self, position: u64, time: DateTime<Utc>, event: &Event) {
        self.updated_at = Time(time);
        self.moved |= !matches!(event, Event::Progressed { .. });
        self.leased |= matches!(event, Event::Leased { .. });
        match event {
            Event::Requested(_) => {}
            Event::Leased { lease_id, attempt, expires_at, .. } => {
                self.become_free("running");
                self.attempt = *attempt;
                self.progress = 0;
                self.lease_id = Some(Id(lease_id.0));
                self.lease_expires_at = Some(Time(*expires_at));
                self.started_at.get_or_insert(Time(time));
            }
            Event::Progressed { progress, expires_at, .. } => {
                if self.state == "running" {
                    self.progress = *progress;
                    self.lease_expires_at = Some(Time(*expires_at));
                }
            }
            Event::LeaseExpired { attempt, given_back: true, .. } => {
                self.become_free("queued");
                self.available_at = Some(Time(time));
                self.attempt = attempt.saturating_sub(1);
                // As if it had not begun.
                self.progress = 0;
                if self.attempt == 0 {
                    self.started_at = None;
                }
            }
            Event::LeaseExpired { given_back: false, .. } => {
                self.become_free("queued");
                self.available_at = Some(Time(time));
                self.error = Some(LEASE_RAN_OUT.to_owned());
            }
            Event::AttemptFailed { error, retry_at: Some(until), .. } => {
                self.become_free("retry_wait");
                self.available_at = Some(Time(*until));
                self.error = Some(error.clone());
            }
            Event::AttemptFailed { error, retry_at: None, .. } | Event::Failed { error } => {
                self.finish("failed", time);
                self.error = Some(error.clone());
            }
            Event::CancelRequested { .. } => {
                if self.state == "running" {
                    self.state = "cancelling";
                }
            }
            Event::Completed { output, .. } => {
                self.finish("completed", time);
                self.progress = 100;
                self.error = None;
                self.output = Some(output.clone());
            }
            Event::Cancelled {} => self.finish("cancelled", time),
            Event::Retried { .. } => {
                self.become_free("queued");
                self.attempt = 0;
                self.progress = 0;
                self.error = None;
                self.output = None;
                self.available_at = Some(Time(time));
                self.queued_position = int(position);
                self.started_at = None;
                self.finished_at = None;
            }
        }
    }

    fn finish(&mut self, state: &'static str, time: DateTime<Utc>) {
        self.become_free(state);
        self.finished_at = Some(Time(time));
    }

    /// Enters a state with neither a lease nor a place in the queue.
    fn become_free(&mut self, state: &'static str) {
        self.state = state;
        self.lease_id = None;
        self.lease_expires_at = None;
        self.available_at = None;
    }
}

impl Record for Job {
    type Key = JobId;

    fn find(sql: &Connection, job_id: &JobId) -> rusqlite::Result<Option<Self>> {
        sql.prepare_cached(
            "SELECT user_id, state, attempt, progress, error, output, lease_id, lease_expires_at,
                 available_at, queued_position, started_at, finished_at, kind, class, updated_at
             FROM jobs WHERE job_id = ?1",
        )?
        .query_row([Id(job_id.0)], |row| {
            Ok(Job {
                new: None,
                leased: false,
                moved: false,
                user_id: row.get::<_, Text<UserId>>(0)?.0,
                state: known_state(row.get_ref(1)?.as_str()?),
                attempt: row.get(2)?,
                progress: row.get(3)?,
                error: row.get(4)?,
                output: row.get::<_, Option<Json<Output>>>(5)?.map(|output| output.0),
                lease_id: row.get(6)?,
                lease_expires_at: row.get(7)?,
                available_at: row.get(8)?,
                queued_position: row.get(9)?,
                started_at: row.get(10)?,
                finished_at: row.get(11)?,
                kind: row.get::<_, Word<_>>(12)?.0,
                class: row.get::<_, Word<_>>(13)?.0,
                updated_at: row.get(14)?,
            })
        })
        .optional()
    }

    fn insert(&self, sql: &Connection, job_id: &JobId) -> rusqlite::Result<()> {
        let Some(New { position, time, request, erased }) = &self.new else { return Ok(()) };
        sql.prepare_cached(
            "INSERT INTO jobs (position, job_id, user_id, kind, prompt, options, fingerprint, tier,
                 class, created_at, state, attempt, progress, error, output, seconds, lease_id,
                 lease_expires_at, available_at, queued_position, started_at, finished_at,
                 updated_at, deadline_at)
             VALUES (?1, ?2, ?3, ?4, ?5, iif(?24, json_remove(?6, '$.style', '$.style_data'), ?6), ?7, ?8, ?9,
                 ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18, ?19, ?20, ?21, ?22, ?23, ?25)",
        )?
        .execute(params![
            int(*position),
            Id(job_id.0),
            self.user_id.as_str(),
            self.kind.as_str(),
            if *erased { "" } else { request.prompt_text() },
            Json(&*unerased(&request.options)),
            request.fingerprint,
            request.tier.as_str(),
            self.class.as_str(),
            Time(*time),
            self.state,
            self.attempt,
            self.progress,
            self.error,
            self.output.as_ref().map(Json),
            self.output.as_ref().and_then(|output| output.duration),
            self.lease_id,
            self.lease_expires_at,
            self.available_at,
            self.queued_position,
            self.started_at,
            self.finished_at,
            self.updated_at,
            erased,
            request.deadline.map(Time),
        ])?;
        Ok(())
    }

    fn update(&self, sql: &Connection, job_id: &JobId) -> rusqlite::Result<()> {
        if !self.moved {
            // By far the most frequent change: it leaves all indexes but one alone.
            sql.prepare_cached(
                "UPDATE jobs SET progress = ?2, lease_expires_at = ?3, updated_at = ?4
                 WHERE job_id = ?1",
            )?
            .execute(params![
                Id(job_id.0),
                self.progress,
                self.lease_expires_at,
                self.updated_at
            ])?;
            return Ok(());
        }
        sql.prepare_cached(
            "UPDATE jobs SET state = ?2, attempt = ?3, progress = ?4, error = ?5, output = ?6,
                 seconds = ?7, lease_id = ?8, lease_expires_at = ?9, available_at = ?10,
                 queued_position = ?11, started_at = ?12, finished_at = ?13, updated_at = ?14
             WHERE job_id = ?1",
        )?
        .execute(params![
            Id(job_id.0),
            self.state,
            self.attempt,
            self.progress,
            self.error,
            self.output.as_ref().map(Json),
            self.output.as_ref().and_then(|output| output.duration),
            self.lease_id,
            self.lease_expires_at,
            self.available_at,
            self.queued_position,
            self.started_at,
            self.finished_at,
            self.updated_at,
        ])?;
        Ok(())
    }

    fn delete(sql: &Connection, job_id: &JobId) -> rusqlite::Result<()> {
        sql.prepare_cached("DELETE FROM jobs WHERE job_id = ?1")?.execute([Id(job_id.0)])?;
        Ok(())
    }
}

/// Without what was erased of them.
fn unerased(options: &Options) -> Cow<'_, Options> {
    let erased = |style: &Option<Personal<String>>| {
        style.as_ref().is_some_and(|style| style.known().is_none())
    };
    match options {
        Options::Video(asked) if erased(&asked.style) => {
            Cow::Owned(Options::Video(VideoOptions { style: None, ..asked.clone() }))
        }
        Options::Translation(asked) if erased(&asked.style_data) => {
            Cow::Owned(Options::Translation(TranslationOptions {
                style_data: None,
                ..asked.clone()
            }))
        }
        Options::Video(_) | Options::Translation(_) => Cow::Borrowed(options),
    }
}

/// The names of `job::Phase`, held once; another one cannot be in the table.
fn known_state(state: &str) -> &'static str {
    match state {
        "queued" => "queued",
        "running" => "running",
        "retry_wait" => "retry_wait",
        "cancelling" => "cancelling",
        "completed" => "completed",
        "cancelled" => "cancelled",
        _ => "failed",
    }
}

/// The name of an event without its version, and the worker's message if it has one.
fn shown(event: &Event) -> (&'static str, Option<&str>) {
    match event {
        Event::Requested(_) => ("job.requested", None),
        Event::Leased { .. } => ("job.leased", None),
        Event::Progressed { message, .. } => ("job.progressed", message.as_deref()),
        Event::LeaseExpired { .. } => ("job.lease_expired", None),
        Event::AttemptFailed { .. } => ("job.attempt_failed", None),
        Event::CancelRequested { .. } => ("job.cancel_requested", None),
        Event::Completed { .. } => ("job.completed", None),
        Event::Failed { .. } => ("job.failed", None),
        Event::Cancelled {} => ("job.cancelled", None),
        Event::Retried { .. } => ("job.retried", None),
    }
}
