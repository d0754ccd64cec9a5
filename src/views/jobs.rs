//! The jobs: how far each one is, and which ones somebody must do something about.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use chrono::{DateTime, Utc};
use rusqlite::{Connection, OptionalExtension, Row, params};
use serde::Serialize;

pub(super) use folding::Job;

use super::column::{Id, Json, Text, Time, Word, int, unsigned};
use super::page::{Cursor, Page, before, one_more};
use super::{Error, Views};
use crate::domain::ids::{JobId, LeaseId, UserId};
use crate::domain::job::{self, Kind, Options, Output};
use crate::domain::tier::{Caps, Class, Tier};

mod folding;

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
CREATE INDEX jobs_waiting ON jobs (available_at) WHERE available_at IS NOT NULL;
CREATE INDEX jobs_retrying ON jobs (available_at) WHERE state = 'retry_wait';
CREATE INDEX jobs_leased ON jobs (lease_expires_at) WHERE lease_expires_at IS NOT NULL;
CREATE INDEX jobs_due ON jobs (deadline_at) WHERE deadline_at IS NOT NULL AND finished_at IS NULL;
";

pub(super) const INDEXES: &str = "
CREATE INDEX jobs_of_user ON jobs (user_id);
-- With the seconds, so that usage is summed without touching the rows.
CREATE INDEX jobs_of_user_in_state ON jobs (user_id, state, position, seconds);
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

    /// Jobs of deleted users that were told to end, and have a worker that was not heard of since.
    pub fn ending_jobs_of_gone_users(&self, limit: usize) -> Result<Vec<JobId>, Error> {
        self.read(|sql| {
            sql.prepare_cached(
                "SELECT job_id FROM users CROSS JOIN jobs USING (user_id)
                 WHERE deleted AND state = 'cancelling' LIMIT ?1",
            )?
            .query_map([int(limit as u64)], |row| Ok(JobId(row.get::<_, Id>(0)?.0)))?
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

    /// Jobs whose lease was given by a clock that was ahead, see [`job::has_come`].
    pub fn jobs_held_by_another_clock(
        &self,
        now: DateTime<Utc>,
        limit: usize,
    ) -> Result<Vec<JobId>, Error> {
        self.job_ids(
            "SELECT job_id FROM jobs WHERE lease_expires_at IS NOT NULL AND lease_expires_at > ?1
             ORDER BY lease_expires_at LIMIT ?2",
            now + job::CLOCK_AHEAD,
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

/// What of a user's jobs was personal is gone with the user.
pub(super) fn erase(sql: &Connection, user_id: &UserId) -> rusqlite::Result<()> {
    sql.prepare_cached(
        "UPDATE jobs SET prompt = '', options = json_remove(options, '$.style', '$.style_data')
         WHERE user_id = ?1",
    )?
    .execute([user_id.as_str()])?;
    Ok(())
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
