//! The jobs: how far each one is, and which ones somebody must do something about.

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use chrono::{DateTime, Utc};
use rusqlite::{Connection, OptionalExtension, Row, params};
use serde::Serialize;

use super::batch::{Batch, Record};
use super::column::{Id, Json, Text, Time, Word, int, unsigned};
use super::feed::JobItem;
use super::page::{Cursor, Page, before, one_more};
use super::queue::{Place, Standing, TurnKey};
use super::{Error, Views, tallies};
use crate::domain::ids::{JobId, LeaseId, UserId};
use crate::domain::job::{Event, Kind, Options, Output, Request};
use crate::domain::schedule::Share;
use crate::domain::tier::{Caps, Class, Tier};
use crate::domain::translation::TranslationOptions;

pub(super) const SCHEMA: &str = "
CREATE TABLE jobs (
    position INTEGER PRIMARY KEY,
    job_id BLOB NOT NULL UNIQUE,
    user_id TEXT NOT NULL,
    kind TEXT NOT NULL,
    state TEXT NOT NULL,
    prompt TEXT NOT NULL,
    options TEXT NOT NULL,
    fingerprint TEXT,
    tier TEXT NOT NULL,
    -- Among which jobs it takes its turn.
    class TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    progress INTEGER NOT NULL,
    error TEXT,
    output TEXT,
    -- Length of the output in seconds.
    seconds REAL,
    lease_id BLOB,
    lease_expires_at INTEGER,
    -- From when on a worker may take it; null unless it waits for one.
    available_at INTEGER,
    -- Its place among those: where it was requested, or retried by its user.
    queued_position INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    started_at INTEGER,
    finished_at INTEGER,
    updated_at INTEGER NOT NULL,
    -- When it fails unless it has ended before.
    deadline_at INTEGER
);
";

pub(super) const INDEXES: &str = "
CREATE INDEX jobs_of_user ON jobs (user_id);
-- With the seconds, so that usage is summed without touching the rows.
CREATE INDEX jobs_of_user_in_state ON jobs (user_id, state, position, seconds);
CREATE INDEX jobs_waiting ON jobs (available_at) WHERE available_at IS NOT NULL;
CREATE INDEX jobs_retrying ON jobs (available_at) WHERE state = 'retry_wait';
CREATE INDEX jobs_leased ON jobs (lease_expires_at) WHERE lease_expires_at IS NOT NULL;
CREATE INDEX jobs_due ON jobs (deadline_at) WHERE deadline_at IS NOT NULL AND finished_at IS NULL;
";

const COLUMNS: &str = "position, job_id, user_id, kind, state, prompt, options, fingerprint, \
                       attempt, progress, error, output, lease_id, lease_expires_at, available_at, \
                       queued_position, created_at, started_at, finished_at, updated_at, tier, class, \
                       deadline_at";

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct JobRow {
    pub job_id: JobId,
    pub user_id: UserId,
    pub kind: Kind,
    /// A name of `job::Phase`.
    pub state: String,
    /// Empty once its user was deleted.
    pub prompt: String,
    pub options: Options,
    pub attempt: u32,
    /// Percent of the present attempt.
    pub progress: u8,
    /// Of the last attempt that went wrong.
    pub error: Option<String>,
    pub output: Option<Output>,
    pub lease_id: Option<LeaseId>,
    pub lease_expires_at: Option<DateTime<Utc>>,
    /// Only in `retry_wait`.
    pub retry_at: Option<DateTime<Utc>>,
    pub position_of_request: u64,
    /// Where it was requested or last retried by its user: its place in the queue.
    pub queued_position: u64,
    pub created_at: DateTime<Utc>,
    /// The first attempt of this round.
    pub started_at: Option<DateTime<Utc>>,
    pub finished_at: Option<DateTime<Utc>>,
    pub updated_at: DateTime<Utc>,
    pub fingerprint: Option<String>,
    /// Its user's when it was requested.
    pub tier: Tier,
    /// Among which jobs it takes its turn.
    pub class: Class,
    /// When it fails unless it has ended before.
    pub deadline: Option<DateTime<Utc>>,
}

impl JobRow {
    /// The three words that the seed's front end understands (CONTRACT §3).
    pub fn status(&self) -> &'static str {
        status(&self.state)
    }

    /// Nothing more happens to it, unless its user asks for another round.
    pub fn is_over(&self) -> bool {
        matches!(self.state.as_str(), "completed" | "failed" | "cancelled")
    }
}

/// Which of a user's jobs; an absent part means all.
#[derive(Debug, Clone, Default)]
pub struct JobFilter {
    pub state: Option<String>,
    pub kind: Option<String>,
}

/// What is shown of an attempt whose worker was not heard of any more.
const LEASE_RAN_OUT: &str = "the worker's lease ran out";

/// Rows kept in each part of the memory, of which there are 64.
const KEPT: usize = 256;

impl Views {
    pub fn job(&self, job_id: &JobId) -> Result<Option<Arc<JobRow>>, Error> {
        let content = self.current();
        if let Some(row) = content.jobs.get(job_id) {
            return Ok(Some(row));
        }
        let before = content.checkpoint.load(Ordering::Acquire);
        let row = self.read_job(job_id)?.map(Arc::new);
        if let Some(row) = &row {
            // Kept only if nothing was applied since: then it is not older than its last event.
            let unmoved = || content.checkpoint.load(Ordering::Acquire) == before;
            content.jobs.keep(*job_id, Arc::clone(row), KEPT, unmoved);
        }
        Ok(row)
    }

    fn read_job(&self, job_id: &JobId) -> Result<Option<JobRow>, Error> {
        self.read(|sql| {
            sql.prepare_cached(&format!("SELECT {COLUMNS} FROM jobs WHERE job_id = ?1"))?
                .query_row([Id(job_id.0)], job)
                .optional()
        })
    }

    /// A user's jobs, newest first.
    pub fn jobs(
        &self,
        user_id: &UserId,
        filter: &JobFilter,
        cursor: Option<&Cursor>,
        limit: usize,
    ) -> Result<Page<JobRow>, Error> {
        // Two statements, so that each has its index.
        let state = if filter.state.is_some() { "state = ?5" } else { "?5 IS NULL" };
        let rows: Vec<JobRow> = self.read(|sql| {
            sql.prepare_cached(&format!(
                "SELECT {COLUMNS} FROM jobs
                 WHERE user_id = ?1 AND position < ?2 AND (?4 IS NULL OR kind = ?4) AND {state}
                 ORDER BY position DESC LIMIT ?3"
            ))?
            .query_map(
                params![
                    user_id.as_str(),
                    before(cursor),
                    one_more(limit),
                    filter.kind,
                    filter.state
                ],
                job,
            )?
            .collect()
        })?;
        Ok(Page::cut(rows.into_iter().map(|job| (job.position_of_request, job)).collect(), limit))
    }

    /// The job of these kinds that a worker is to take now; `skip` says which ones it must not.
    pub fn next_job(
        &self,
        now: DateTime<Utc>,
        caps: &Caps,
        kinds: &[Kind],
        skip: impl Fn(JobId) -> bool,
    ) -> Option<JobId> {
        self.current().queue.next(now, caps, kinds, skip)
    }

    /// Jobs of deleted users that have not ended, nor were told to.
    pub fn open_jobs_of_gone_users(&self, limit: usize) -> Result<Vec<(UserId, JobId)>, Error> {
        self.read(|sql| {
            sql.prepare_cached(
                "SELECT user_id, job_id FROM users CROSS JOIN jobs USING (user_id)
                 WHERE deleted AND state IN ('queued', 'running', 'retry_wait') LIMIT ?1",
            )?
            .query_map([int(limit as u64)], |row| {
                Ok((row.get::<_, Text<UserId>>(0)?.0, JobId(row.get::<_, Id>(1)?.0)))
            })?
            .collect()
        })
    }

    /// Whether somebody still works on a job of this user, or may.
    pub fn has_open_jobs(&self, user_id: &UserId) -> Result<bool, Error> {
        self.read(|sql| {
            sql.prepare_cached(
                "SELECT EXISTS (SELECT 1 FROM jobs WHERE user_id = ?1
                 AND state IN ('queued', 'running', 'retry_wait', 'cancelling'))",
            )?
            .query_row([user_id.as_str()], |row| row.get(0))
        })
    }

    /// Whether the job's user was deleted, as far as the memory knows.
    ///
    /// # Errors
    /// The job cannot be read.
    pub fn is_of_gone_user(&self, job_id: &JobId) -> Result<bool, Error> {
        let Some(job) = self.job(job_id)? else { return Ok(false) };
        Ok(self.user_standing(&job.user_id).is_some_and(|user| user.deleted))
    }

    /// Whether the job still is to be worked on: not when it has ended, nor when its user is gone.
    pub fn job_is_alive(&self, job_id: &JobId) -> Result<Option<bool>, Error> {
        let Some(job) = self.job(job_id)? else { return Ok(None) };
        let gone = self.user(&job.user_id)?.is_some_and(|user| user.deleted);
        Ok(Some(!job.is_over() && !gone))
    }

    /// Jobs whose lease has run out, the longest ago first.
    pub fn lapsed_jobs(&self, now: DateTime<Utc>, limit: usize) -> Result<Vec<JobId>, Error> {
        self.job_ids(
            "SELECT job_id FROM jobs WHERE lease_expires_at IS NOT NULL AND lease_expires_at <= ?1
             ORDER BY lease_expires_at LIMIT ?2",
            now,
            limit,
        )
    }

    /// Jobs that had not ended by their deadline, the longest ago first; but for those that are
    /// being cancelled anyway.
    pub fn overdue_jobs(&self, now: DateTime<Utc>, limit: usize) -> Result<Vec<JobId>, Error> {
        self.job_ids(
            "SELECT job_id FROM jobs
             WHERE deadline_at IS NOT NULL AND finished_at IS NULL AND deadline_at <= ?1
                 AND state <> 'cancelling'
             ORDER BY deadline_at LIMIT ?2",
            now,
            limit,
        )
    }

    /// From 1: how many leases of its kind until it is the job's turn if nothing else happens;
    /// nothing when it does not wait for one, or not yet.
    pub fn queue_position(&self, job: &JobRow, now: DateTime<Utc>, caps: &Caps) -> Option<u64> {
        let waits = matches!(job.state.as_str(), "queued" | "retry_wait");
        if waits { self.current().queue.place_of(job.job_id, now, caps) } else { None }
    }

    /// When time will next bring something about: a lease or a session runs out, a retry is due.
    pub fn next_due(&self) -> Result<Option<DateTime<Utc>>, Error> {
        const SOONEST: [&str; 4] = [
            "SELECT min(deadline_at) FROM jobs
             WHERE deadline_at IS NOT NULL AND finished_at IS NULL AND state <> 'cancelling'",
            "SELECT min(lease_expires_at) FROM jobs WHERE lease_expires_at IS NOT NULL",
            "SELECT min(available_at) FROM jobs WHERE state = 'retry_wait'",
            "SELECT min(due_at) FROM sessions WHERE due_at IS NOT NULL",
        ];
        self.read(|sql| {
            let mut soonest = None;
            for query in SOONEST {
                let due: Option<Time> =
                    sql.prepare_cached(query)?.query_row([], |row| row.get(0))?;
                soonest = soonest.into_iter().chain(due.map(|due| due.0)).min();
            }
            Ok(soonest)
        })
    }

    fn job_ids(&self, query: &str, now: DateTime<Utc>, limit: usize) -> Result<Vec<JobId>, Error> {
        self.read(|sql| {
            sql.prepare_cached(query)?
                .query_map(params![Time(now), int(limit as u64)], |row| {
                    row.get::<_, Id>(0).map(|id| JobId(id.0))
                })?
                .collect()
        })
    }
}

fn status(state: &str) -> &'static str {
    match state {
        "completed" => "completed",
        "failed" | "cancelled" => "error",
        _ => "processing",
    }
}

impl<'a> Batch<'a> {
    /// Gives the job's user.
    pub fn job(
        &mut self,
        position: u64,
        time: DateTime<Utc>,
        job_id: JobId,
        event: &'a Event,
    ) -> rusqlite::Result<Option<UserId>> {
        let known = self.jobs.get(self.sql, &job_id)?.is_some();
        match (known, event) {
            (false, Event::Requested(request)) => {
                let erased = self.is_erased(&request.user_id)?;
                let job = Job::requested(position, time, request, erased);
                self.jobs.put(self.sql, &job_id, job)?;
                self.count_request(&request.user_id, time)?;
            }
            // Requested twice, or never: no rule of the domain makes it, and nothing can be shown.
            (true, Event::Requested(_)) | (false, _) => return Ok(None),
            (true, event) => self.job_went_on(position, time, job_id, event)?,
        }
        let Some(job) = self.jobs.get(self.sql, &job_id)? else { return Ok(None) };
        let (event, message) = shown(event);
        if self.feed.keeps(position, event) {
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
            self.feed.add(position, &job.user_id, Some(job_id), event, &item)?;
        }
        Ok(Some(job.user_id.clone()))
    }

    fn job_went_on(
        &mut self,
        position: u64,
        time: DateTime<Utc>,
        job_id: JobId,
        event: &Event,
    ) -> rusqlite::Result<()> {
        let Some(job) = self.jobs.change(self.sql, &job_id)? else { return Ok(()) };
        let before = job.state;
        let lease_ran_out = job.error.as_deref() == Some(LEASE_RAN_OUT);
        job.take_in(position, time, event);
        if let Event::Progressed { .. } = event {
            return Ok(());
        }
        let (user_id, after, turn) = (job.user_id.clone(), job.state, job.turn());
        if matches!(event, Event::Leased { .. }) {
            self.serve(position, turn)?;
        }
        let moved = tallies::Moved { user_id: &user_id, before, after, event, lease_ran_out };
        self.count_move(&moved, time)
    }
}

/// What of a user's jobs was personal is gone with the user.
pub(super) fn erase(sql: &Connection, user_id: &UserId) -> rusqlite::Result<()> {
    sql.prepare_cached(
        "UPDATE jobs SET prompt = '', options = json_remove(options, '$.style_data')
         WHERE user_id = ?1",
    )?
    .execute([user_id.as_str()])?;
    Ok(())
}

/// The columns of a job that events change, and of a new one all.
pub(super) struct Job<'a> {
    new: Option<New<'a>>,
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
struct New<'a> {
    position: u64,
    time: DateTime<Utc>,
    request: &'a Request,
    /// Its user has been forgotten by now.
    erased: bool,
}

impl<'a> Job<'a> {
    fn requested(position: u64, time: DateTime<Utc>, request: &'a Request, erased: bool) -> Self {
        Self {
            new: Some(New { position, time, request, erased }),
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
            Event::LeaseExpired { .. } => {
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

impl Record for Job<'_> {
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
             VALUES (?1, ?2, ?3, ?4, ?5, iif(?24, json_remove(?6, '$.style_data'), ?6), ?7, ?8, ?9,
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
    match options {
        Options::Translation(asked)
            if asked.style_data.as_ref().is_some_and(|style| style.known().is_none()) =>
        {
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

fn job(row: &Row<'_>) -> rusqlite::Result<JobRow> {
    let moment = |column| row.get::<_, Option<Time>>(column).map(|at| at.map(|at| at.0));
    let state: String = row.get(4)?;
    let available_at = moment(14)?;
    Ok(JobRow {
        job_id: JobId(row.get::<_, Id>(1)?.0),
        user_id: row.get::<_, Text<UserId>>(2)?.0,
        kind: row.get::<_, Word<Kind>>(3)?.0,
        prompt: row.get(5)?,
        options: row.get::<_, Json<_>>(6)?.0,
        fingerprint: row.get(7)?,
        attempt: row.get(8)?,
        progress: row.get(9)?,
        error: row.get(10)?,
        output: row.get::<_, Option<Json<_>>>(11)?.map(|output| output.0),
        lease_id: row.get::<_, Option<Id>>(12)?.map(|id| LeaseId(id.0)),
        lease_expires_at: moment(13)?,
        retry_at: available_at.filter(|_| state == "retry_wait"),
        position_of_request: unsigned(row.get(0)?),
        queued_position: unsigned(row.get(15)?),
        created_at: row.get::<_, Time>(16)?.0,
        started_at: moment(17)?,
        finished_at: moment(18)?,
        updated_at: row.get::<_, Time>(19)?.0,
        tier: row.get::<_, Word<_>>(20)?.0,
        class: row.get::<_, Word<_>>(21)?.0,
        deadline: moment(22)?,
        state,
    })
}
