//! Where a job stands among all that wait, and jobs that were read lately: both in memory, so that
//! a page that polls its job costs no search.

use std::sync::{PoisonError, RwLock};

use rusqlite::{Connection, OptionalExtension};

use super::column::{Id, unsigned};
use crate::domain::ids::JobId;

/// The queue positions of all waiting jobs, sorted: new ones come last, so keeping it costs little
/// and a place is found by halving.
#[derive(Default)]
pub(super) struct Waiting(RwLock<Vec<u64>>);

/// A job's queue position, and whether it waits there.
pub(super) struct Place {
    pub position: u64,
    pub waits: bool,
}

impl Waiting {
    pub fn load(sql: &Connection) -> rusqlite::Result<Self> {
        let mut statement = sql.prepare(
            "SELECT queued_position FROM jobs WHERE available_at IS NOT NULL
             ORDER BY queued_position",
        )?;
        let positions = statement.query_map([], |row| row.get(0).map(unsigned))?;
        Ok(Self(RwLock::new(positions.collect::<rusqlite::Result<_>>()?)))
    }

    pub fn set(&self, place: &Place) {
        let mut positions = self.0.write().unwrap_or_else(PoisonError::into_inner);
        match (positions.binary_search(&place.position), place.waits) {
            (Err(index), true) => positions.insert(index, place.position),
            (Ok(index), false) => {
                positions.remove(index);
            }
            (Ok(_), true) | (Err(_), false) => {}
        }
    }

    /// From 1.
    pub fn place_of(&self, position: u64) -> u64 {
        let positions = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let (Ok(index) | Err(index)) = positions.binary_search(&position);
        index as u64 + 1
    }
}

/// Where a job stands after an event of it; nothing if there is no such job.
pub(super) fn place(sql: &Connection, job_id: JobId) -> rusqlite::Result<Option<Place>> {
    sql.prepare_cached(
        "SELECT queued_position, available_at IS NOT NULL FROM jobs WHERE job_id = ?1",
    )?
    .query_row([Id(job_id.0)], |row| {
        Ok(Place { position: row.get(0).map(unsigned)?, waits: row.get(1)? })
    })
    .optional()
}
