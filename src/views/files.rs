//! The files that are there. A deleted one has no row.

use chrono::{DateTime, Utc};
use rusqlite::{Connection, OptionalExtension, Row, params};
use serde::Serialize;
use serde_json::{Map, Value};

use super::batch::{Batch, Record};
use super::column::{Id, Json, Text, Time, int, unsigned};
use super::feed::FileItem;
use super::page::{Cursor, Page, before, one_more};
use super::{Error, Views, tallies};
use crate::config::Retention;
use crate::domain::file::{Event, Stored};
use crate::domain::ids::{FileId, JobId, UserId};
use crate::domain::tier::Tier;

pub(super) const SCHEMA: &str = "
CREATE TABLE files (
    position INTEGER PRIMARY KEY,
    file_id BLOB NOT NULL UNIQUE,
    user_id TEXT NOT NULL,
    filename TEXT NOT NULL,
    content_type TEXT NOT NULL,
    size INTEGER NOT NULL,
    sha256 TEXT NOT NULL,
    metadata TEXT NOT NULL,
    job_id BLOB,
    -- Of an output: its owner's when it was stored, which settles how long it is kept.
    tier TEXT,
    created_at INTEGER NOT NULL
);
";

pub(super) const INDEXES: &str = "
-- With the size, so that usage is summed without touching the rows.
CREATE INDEX files_of_user ON files (user_id, position, size);
CREATE INDEX outputs ON files (tier, created_at) WHERE tier IS NOT NULL;
CREATE INDEX files_of_blob ON files (sha256);
CREATE INDEX files_of_job ON files (job_id) WHERE job_id IS NOT NULL;
";

const COLUMNS: &str = "position, file_id, user_id, filename, content_type, size, sha256, metadata, \
                       job_id, created_at, tier";

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FileRow {
    pub file_id: FileId,
    pub user_id: UserId,
    pub filename: String,
    pub content_type: String,
    /// In bytes.
    pub size: u64,
    pub sha256: String,
    pub metadata: Map<String, Value>,
    pub job_id: Option<JobId>,
    pub created_at: DateTime<Utc>,
    /// Of an output: its owner's when it was stored.
    pub tier: Option<String>,
    /// Where in the log it was stored.
    pub position: u64,
}

impl FileRow {
    /// When it will be deleted; nothing for what no job made, and for what is kept for ever.
    pub fn expires_at(&self, retention: &Retention) -> Option<DateTime<Utc>> {
        let kept = Tier::of(self.tier.as_deref()?).pick(retention);
        kept.map(|kept| self.created_at + kept)
    }
}

impl Views {
    /// A file; nothing when it never was or was deleted.
    pub fn file(&self, file_id: &FileId) -> Result<Option<FileRow>, Error> {
        self.read(|sql| {
            sql.prepare_cached(&format!("SELECT {COLUMNS} FROM files WHERE file_id = ?1"))?
                .query_row([Id(file_id.0)], file)
                .optional()
        })
        .map(|found| found.map(|(_, file)| file))
    }

    /// A user's files, newest first.
    pub fn files(
        &self,
        user_id: &UserId,
        cursor: Option<&Cursor>,
        limit: usize,
    ) -> Result<Page<FileRow>, Error> {
        let rows = self.read(|sql| {
            sql.prepare_cached(&format!(
                "SELECT {COLUMNS} FROM files
                 WHERE user_id = ?1 AND position < ?2 ORDER BY position DESC LIMIT ?3"
            ))?
            .query_map(params![user_id.as_str(), before(cursor), one_more(limit)], file)?
            .collect()
        })?;
        Ok(Page::cut(rows, limit))
    }

    /// What attempts of a job have stored: the output, and what broke off beside it.
    pub fn files_of_job(&self, job_id: JobId) -> Result<Vec<FileId>, Error> {
        self.read(|sql| {
            sql.prepare_cached("SELECT file_id FROM files WHERE job_id = ?1 ORDER BY position")?
                .query_map([Id(job_id.0)], |row| row.get::<_, Id>(0).map(|id| FileId(id.0)))?
                .collect()
        })
    }

    /// Outputs of jobs of a tier that were stored at that time or before, the oldest first.
    pub fn outputs_before(
        &self,
        tier: Tier,
        time: DateTime<Utc>,
        limit: usize,
    ) -> Result<Vec<FileId>, Error> {
        self.read(|sql| {
            sql.prepare_cached(
                "SELECT file_id FROM files WHERE tier = ?1 AND created_at <= ?2
                 ORDER BY created_at LIMIT ?3",
            )?
            .query_map(params![tier.as_str(), Time(time), int(limit as u64)], file_id)?
            .collect()
        })
    }

    /// Files whose owners were deleted.
    pub fn files_of_gone_users(&self, limit: usize) -> Result<Vec<FileId>, Error> {
        self.read(|sql| {
            sql.prepare_cached(
                "SELECT file_id FROM users CROSS JOIN files USING (user_id)
                 WHERE deleted LIMIT ?1",
            )?
            .query_map([int(limit as u64)], file_id)?
            .collect()
        })
    }

    /// What attempts that broke off while they stored their output have left of jobs that came to
    /// nothing, some of it, each with its job.
    pub fn files_of_failed_jobs(&self, limit: usize) -> Result<Vec<(FileId, JobId)>, Error> {
        self.read(|sql| {
            sql.prepare_cached(
                "SELECT file_id, job_id FROM files CROSS JOIN jobs USING (job_id)
                 WHERE files.job_id IS NOT NULL AND state IN ('failed', 'cancelled') LIMIT ?1",
            )?
            .query_map([int(limit as u64)], |row| {
                Ok((file_id(row)?, JobId(row.get::<_, Id>(1)?.0)))
            })?
            .collect()
        })
    }

    /// What is left of a user's files, some of them.
    pub fn file_ids_of(&self, user_id: &UserId, limit: usize) -> Result<Vec<FileId>, Error> {
        self.read(|sql| {
            sql.prepare_cached("SELECT file_id FROM files WHERE user_id = ?1 LIMIT ?2")?
                .query_map(params![user_id.as_str(), int(limit as u64)], file_id)?
                .collect()
        })
    }

    /// How many files share these bytes; at 0 the blob may go.
    pub fn blob_referrers(&self, sha256: &str) -> Result<u64, Error> {
        self.read(|sql| {
            sql.prepare_cached("SELECT count(*) FROM files WHERE sha256 = ?1")?
                .query_row([sha256], |row| row.get(0).map(unsigned))
        })
    }
}

/// A file that is there.
pub(super) struct FileEntry {
    size: u64,
    /// Of one that has no row yet.
    new: Option<New>,
}

struct New {
    position: u64,
    time: DateTime<Utc>,
    stored: Box<Stored>,
    /// Its owner's; of outputs alone.
    tier: Option<Tier>,
    /// Its owner has been forgotten by now.
    erased: bool,
}

impl Batch<'_> {
    pub fn file(
        &mut self,
        position: u64,
        time: DateTime<Utc>,
        file_id: FileId,
        event: &Event,
    ) -> rusqlite::Result<()> {
        match event {
            Event::Stored(stored) => {
                if self.held.files.get(self.sql, &file_id)?.is_none() {
                    let owner =
                        self.held.users.get(self.sql, &stored.user_id)?.map(|user| &user.row);
                    // As the log has it at this position, so that every replay finds the same.
                    let tier = Tier::of(owner.map_or("", |owner| owner.subscription_tier.as_str()));
                    let new = New {
                        position,
                        time,
                        stored: stored.clone(),
                        tier: stored.job_id.map(|_| tier),
                        erased: owner.is_some_and(|owner| owner.deleted),
                    };
                    let entry = FileEntry { size: stored.size, new: Some(new) };
                    self.held.files.put(self.sql, &file_id, entry)?;
                    self.count(tallies::Item::Files, 1, stored.size as f64)?;
                }
                let item = FileItem { file_id, event: "file.stored", time };
                self.held.feed.add(position, &stored.user_id, None, item.event, &item)
            }
            Event::Deleted { user_id, .. } => {
                if let Some(entry) = self.held.files.remove(self.sql, &file_id)? {
                    self.count(tallies::Item::Files, -1, -(entry.size as f64))?;
                }
                let item = FileItem { file_id, event: "file.deleted", time };
                self.held.feed.add(position, user_id, None, item.event, &item)
            }
        }
    }
}

impl Record for FileEntry {
    type Key = FileId;

    fn find(sql: &Connection, file_id: &FileId) -> rusqlite::Result<Option<Self>> {
        sql.prepare_cached("SELECT size FROM files WHERE file_id = ?1")?
            .query_row([Id(file_id.0)], |row| Ok(Self { size: unsigned(row.get(0)?), new: None }))
            .optional()
    }

    fn insert(&self, sql: &Connection, file_id: &FileId) -> rusqlite::Result<()> {
        let Some(New { position, time, stored, tier, erased }) = &self.new else { return Ok(()) };
        let nothing = Map::new();
        let metadata = stored.metadata.known().filter(|_| !erased).unwrap_or(&nothing);
        sql.prepare_cached(&format!(
            "INSERT INTO files ({COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)"
        ))?
        .execute(params![
            int(*position),
            Id(file_id.0),
            stored.user_id.as_str(),
            stored.filename.known().filter(|_| !erased).map_or("", String::as_str),
            stored.content_type,
            int(stored.size),
            stored.sha256,
            Json(metadata),
            stored.job_id.map(|id| Id(id.0)),
            Time(*time),
            tier.map(Tier::as_str),
        ])?;
        Ok(())
    }

    /// Deleted and stored anew within a batch; nothing else changes a file.
    fn update(&self, sql: &Connection, file_id: &FileId) -> rusqlite::Result<()> {
        if self.new.is_some() {
            Self::delete(sql, file_id)?;
            self.insert(sql, file_id)?;
        }
        Ok(())
    }

    fn delete(sql: &Connection, file_id: &FileId) -> rusqlite::Result<()> {
        sql.prepare_cached("DELETE FROM files WHERE file_id = ?1")?.execute([Id(file_id.0)])?;
        Ok(())
    }
}

/// What of a user's files was personal is gone with the user; the files stay until retention.
pub(super) fn erase(sql: &Connection, user_id: &UserId) -> rusqlite::Result<()> {
    sql.prepare_cached("UPDATE files SET filename = '', metadata = '{}' WHERE user_id = ?1")?
        .execute([user_id.as_str()])?;
    Ok(())
}

fn file_id(row: &Row<'_>) -> rusqlite::Result<FileId> {
    row.get::<_, Id>(0).map(|id| FileId(id.0))
}

fn file(row: &Row<'_>) -> rusqlite::Result<(u64, FileRow)> {
    let file = FileRow {
        file_id: FileId(row.get::<_, Id>(1)?.0),
        user_id: row.get::<_, Text<UserId>>(2)?.0,
        filename: row.get(3)?,
        content_type: row.get(4)?,
        size: unsigned(row.get(5)?),
        sha256: row.get(6)?,
        metadata: row.get::<_, Json<_>>(7)?.0,
        job_id: row.get::<_, Option<Id>>(8)?.map(|id| JobId(id.0)),
        created_at: row.get::<_, Time>(9)?.0,
        tier: row.get(10)?,
        position: unsigned(row.get(0)?),
    };
    Ok((file.position, file))
}
