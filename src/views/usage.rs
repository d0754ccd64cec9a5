//! How much a user has used, for `me`.

use std::collections::BTreeMap;

use serde::Serialize;

use super::column::unsigned;
use super::{Error, Views};
use crate::domain::ids::UserId;

#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Usage {
    /// How many jobs are in each state; a state without jobs is absent.
    pub jobs: BTreeMap<String, u64>,
    /// Files that are there, made or uploaded.
    pub files: u64,
    /// Their sizes together; equal bytes count for each file.
    pub bytes_stored: u64,
    /// The length of all completed videos.
    pub seconds_rendered: f64,
}

impl Views {
    /// Read from indexes alone, so that it stays cheap with thousands of jobs.
    pub fn usage(&self, user_id: &UserId) -> Result<Usage, Error> {
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
            (usage.files, usage.bytes_stored) = sql
                .prepare_cached(
                    "SELECT count(*), coalesce(sum(size), 0) FROM files WHERE user_id = ?1",
                )?
                .query_row([user_id.as_str()], |row| {
                    Ok((unsigned(row.get(0)?), unsigned(row.get(1)?)))
                })?;
            Ok(usage)
        })
    }
}
