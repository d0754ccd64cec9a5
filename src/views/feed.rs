//! What event streams read: one row for each event of a job or a file, with the state after it.

use chrono::{DateTime, Utc};
use rusqlite::{Connection, Row, params};
use serde::Serialize;

use super::column::{Id, Json, int, unsigned};
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
-- An index of SQLite ends with the row's id, here the position.
CREATE INDEX feed_of_user ON feed (user_id);
CREATE INDEX feed_of_job ON feed (job_id) WHERE job_id IS NOT NULL;
";

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
            sql.prepare_cached(
                "SELECT position, type, data FROM feed
                 WHERE user_id = ?1 AND position > ?2 ORDER BY position LIMIT ?3",
            )?
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
            sql.prepare_cached(
                "SELECT position, type, data FROM feed
                 WHERE job_id = ?1 AND position > ?2 ORDER BY position LIMIT ?3",
            )?
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

pub(super) fn add(
    sql: &Connection,
    position: u64,
    user_id: &str,
    job_id: Option<JobId>,
    event: &str,
    data: &impl Serialize,
) -> rusqlite::Result<()> {
    sql.prepare_cached("INSERT INTO feed VALUES (?1, ?2, ?3, ?4, ?5)")?.execute(params![
        int(position),
        user_id,
        job_id.map(|id| Id(id.0)),
        event,
        Json(data)
    ])?;
    Ok(())
}

fn item(row: &Row<'_>) -> rusqlite::Result<FeedItem> {
    Ok(FeedItem { position: unsigned(row.get(0)?), event: row.get(1)?, data: row.get(2)? })
}
