//! What event streams read: one row for each event of a job or a file, with the state after it.

use std::ops::Range;

use chrono::{DateTime, Utc};
use rusqlite::{Connection, Row, params};
use serde::Serialize;

use super::column::{Id, int, unsigned};
use super::{Error, Views};
use crate::domain::ids::{JobId, UserId};

pub(super) const SCHEMA: &str = "
CREATE TABLE feed (
    position INTEGER PRIMARY KEY,
    user_id TEXT NOT NULL,
    job_id BLOB,
    type TEXT NOT NULL,
    data TEXT NOT NULL
);
CREATE INDEX feed_ticks ON feed (position) WHERE type = 'job.progressed';
";

pub(super) const INDEXES: &str = "
-- An index of SQLite ends with the row's id, here the position.
CREATE INDEX feed_of_user ON feed (user_id);
CREATE INDEX feed_of_job ON feed (job_id) WHERE job_id IS NOT NULL;
";

/// For about how many events ticks of progress are kept; all else is kept for ever. Whoever comes
/// back after more than that is told where each job stands by its later items.
pub const TICKS_KEPT: u64 = 100_000;

/// The same in positions of a log where so many lie between neighbouring events.
pub(super) fn ticks_kept(stride: u64) -> u64 {
    TICKS_KEPT.saturating_mul(stride)
}

/// Before it ends what a stream may tell: a view that stands still may yet tell of what comes after,
/// and whoever follows asks for nothing before what he was told last.
fn upto(views: &str) -> String {
    format!(
        "position < ifnull((SELECT min(position) FROM parked
                            WHERE view IN ({views})), 9223372036854775807)"
    )
}

/// One item of a stream of Server-Sent Events.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FeedItem {
    /// The position in the log; the `id:` of the item.
    pub position: u64,
    /// The event's type without its version: `job.progressed`.
    pub event: String,
    /// A JSON object on one line.
    pub data: String,
}

impl Views {
    /// What happened to a user's jobs and files after a position, oldest first.
    pub fn feed_of_user(
        &self,
        user_id: &UserId,
        after: u64,
        limit: usize,
    ) -> Result<Vec<FeedItem>, Error> {
        self.read(|sql| {
            sql.prepare_cached(&format!(
                "SELECT position, type, data FROM feed
                 WHERE user_id = ?1 AND position > ?2 AND {} ORDER BY position LIMIT ?3",
                upto("'files', 'jobs'"),
            ))?
            .query_map(params![user_id.as_str(), int(after), int(limit as u64)], item)?
            .collect()
        })
    }

    /// What happened to a job after a position, oldest first.
    pub fn feed_of_job(
        &self,
        job_id: &JobId,
        after: u64,
        limit: usize,
    ) -> Result<Vec<FeedItem>, Error> {
        self.read(|sql| {
            sql.prepare_cached(&format!(
                "SELECT position, type, data FROM feed
                 WHERE job_id = ?1 AND position > ?2 AND {} ORDER BY position LIMIT ?3",
                upto("'jobs'"),
            ))?
            .query_map(params![Id(job_id.0), int(after), int(limit as u64)], item)?
            .collect()
        })
    }
}

/// The `data` of a job's item.
#[derive(Serialize)]
pub(super) struct JobItem<'a> {
    pub job_id: JobId,
    #[serde(rename = "type")]
    pub event: &'static str,
    pub status: &'static str,
    pub state: &'a str,
    pub progress: u8,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<&'a str>,
    pub attempt: u32,
    pub error: Option<&'a str>,
    pub time: DateTime<Utc>,
}

/// The `data` of a file's item.
#[derive(Serialize)]
pub(super) struct FileItem {
    pub file_id: crate::domain::ids::FileId,
    #[serde(rename = "type")]
    pub event: &'static str,
    pub time: DateTime<Utc>,
}

/// Items of a batch that are not in the table yet.
#[derive(Default)]
pub(super) struct Feed {
    items: Vec<NewItem>,
    /// The data of all of them, one behind the other.
    data: Vec<u8>,
    stale: u64,
}

struct NewItem {
    position: u64,
    user_id: UserId,
    job_id: Option<JobId>,
    event: &'static str,
    data: Range<usize>,
}

impl Feed {
    /// Ticks at or below `stale` are not even added.
    pub fn let_go_until(&mut self, stale: u64) {
        self.stale = stale;
    }

    /// Whether such an item is kept at all.
    pub fn keeps(&self, position: u64, event: &str) -> bool {
        position > self.stale || event != TICK
    }

    pub fn add(
        &mut self,
        position: u64,
        user_id: &UserId,
        job_id: Option<JobId>,
        event: &'static str,
        data: &impl Serialize,
    ) -> rusqlite::Result<()> {
        let start = self.data.len();
        serde_json::to_writer(&mut self.data, data)
            .map_err(|error| rusqlite::Error::ToSqlConversionFailure(Box::new(error)))?;
        let data = start..self.data.len();
        self.items.push(NewItem { position, user_id: user_id.clone(), job_id, event, data });
        Ok(())
    }

    pub fn save(&mut self, sql: &Connection) -> rusqlite::Result<()> {
        let mut insert = sql.prepare_cached("INSERT INTO feed VALUES (?1, ?2, ?3, ?4, ?5)")?;
        for NewItem { position, user_id, job_id, event, data } in self.items.drain(..) {
            let job_id = job_id.map(|id| Id(id.0));
            let data = std::str::from_utf8(&self.data[data])?;
            insert.execute(params![int(position), user_id.as_str(), job_id, event, data])?;
        }
        self.data.clear();
        Ok(())
    }
}

/// The one event of which there are many and only the last says something.
const TICK: &str = "job.progressed";

/// Lets go of the ticks that are too old at a checkpoint: exactly these, so that every replay keeps
/// the same.
pub(super) fn trim(sql: &Connection, checkpoint: u64, stride: u64) -> rusqlite::Result<()> {
    let stale = checkpoint.saturating_sub(ticks_kept(stride));
    sql.prepare_cached("DELETE FROM feed WHERE type = 'job.progressed' AND position <= ?1")?
        .execute([int(stale)])?;
    Ok(())
}

/// The same as a statement, for views that were built: their checkpoint and indexes stand by then.
pub(super) fn settle(stride: u64) -> String {
    let kept = int(ticks_kept(stride));
    format!(
        "DELETE FROM feed WHERE type = 'job.progressed'
             AND position <= (SELECT position FROM checkpoint) - {kept};"
    )
}

fn item(row: &Row<'_>) -> rusqlite::Result<FeedItem> {
    Ok(FeedItem { position: unsigned(row.get(0)?), event: row.get(1)?, data: row.get(2)? })
}
