//! How much a user has used, for `me`.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};

use rusqlite::Connection;

use super::analytics::last_months;
use super::column::unsigned;
use super::tallies::{self, Period};
use super::{Error, Views};
use crate::domain::ids::UserId;

#[derive(Debug, Clone, Default, PartialEq)]
pub struct Usage {
    /// How many jobs are in each state; a state without jobs is absent.
    pub jobs: BTreeMap<String, u64>,
    /// Files that are there, made or uploaded.
    pub files: u64,
    /// Their sizes together; equal bytes count for each file.
    pub bytes_stored: u64,
    /// The length of all completed videos.
    pub seconds_rendered: f64,
    /// Those of the last twelve in which anything happened, the oldest first.
    pub months: Vec<Period>,
}

impl Views {
    /// Read from indexes alone, so that it stays cheap with thousands of jobs.
    pub fn usage(&self, user_id: &UserId, now: DateTime<Utc>) -> Result<Usage, Error> {
        self.read(|sql| {
            let mut usage = Usage::default();
            let mut jobs = sql.prepare_cached(
                "SELECT state, count(*), total(seconds) FROM jobs WHERE user_id = ?1 GROUP BY state",
            )?;
            let mut rows = jobs.query([user_id.as_str()])?;
            while let Some(row) = rows.next()? {
                usage.jobs.insert(row.get(0)?, unsigned(row.get(1)?));
                usage.seconds_rendered += row.get::<_, f64>(2)?;
            }
            (usage.files, usage.bytes_stored) = stored(sql, user_id)?;
            usage.months = tallies::months_of(sql, user_id.as_str(), &last_months(now)[0])?;
            Ok(usage)
        })
    }

    /// The sizes of a user's files together: what its quota is measured by.
    pub fn bytes_stored(&self, user_id: &UserId) -> Result<u64, Error> {
        self.read(|sql| stored(sql, user_id).map(|(_, bytes)| bytes))
    }
}

/// How many files, and their sizes together.
fn stored(sql: &Connection, user_id: &UserId) -> rusqlite::Result<(u64, u64)> {
    sql.prepare_cached("SELECT count(*), coalesce(sum(size), 0) FROM files WHERE user_id = ?1")?
        .query_row([user_id.as_str()], |row| Ok((unsigned(row.get(0)?), unsigned(row.get(1)?))))
}
