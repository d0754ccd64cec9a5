//! How much all users together use, for administrators.

use std::collections::BTreeMap;

use chrono::{DateTime, Months, TimeDelta, Utc};
use rusqlite::Connection;

use super::column::{Time, unsigned};
use super::tallies::{self, Period, day, month};
use super::{Error, Views};

/// Days that are told one by one, the present one included.
pub const DAYS: u32 = 30;
/// Months that are told one by one, the present one included.
pub const MONTHS: u32 = 12;

#[derive(Debug, Clone, Default, PartialEq)]
pub struct Analytics {
    /// Users who are there; not those who were deleted.
    pub users: u64,
    /// Users with a session that was active within 1, 7 and 30 days.
    pub active: [u64; 3],
    /// How many jobs are in each state; a state without jobs is absent.
    pub jobs: BTreeMap<String, u64>,
    /// How many jobs failed for good, by the class of the reason.
    pub failures: BTreeMap<String, u64>,
    /// The length of all videos ever completed.
    pub seconds_rendered: f64,
    pub files: u64,
    /// The sizes of all files together; equal bytes count for each file.
    pub bytes_stored: u64,
    /// The last [`DAYS`], the oldest first, those without any event among them.
    pub days: Vec<Period>,
    /// The last [`MONTHS`], likewise.
    pub months: Vec<Period>,
}

impl Views {
    /// How many jobs are in each state; a state without jobs is absent.
    pub fn jobs_by_state(&self) -> Result<BTreeMap<String, u64>, Error> {
        self.read(|sql| tallies::totals(sql).map(|totals| totals.states))
    }

    /// Read from counts that are kept, and for the active users from an index.
    pub fn analytics(&self, now: DateTime<Utc>) -> Result<Analytics, Error> {
        let days: Vec<String> =
            (0..i64::from(DAYS)).rev().map(|ago| day(now - TimeDelta::days(ago))).collect();
        let months = last_months(now);
        self.read(|sql| {
            let moment = sql.unchecked_transaction()?;
            let totals = tallies::totals(&moment)?;
            let mut active = [0; 3];
            for (count, days) in active.iter_mut().zip([1, 7, 30]) {
                *count = active_since(&moment, now - TimeDelta::days(days))?;
            }
            Ok(Analytics {
                users: totals.users,
                active,
                jobs: totals.states,
                failures: totals.failures,
                seconds_rendered: totals.seconds_rendered,
                files: totals.files,
                bytes_stored: totals.bytes_stored,
                days: without_gaps(tallies::days(&moment, &days[0])?, days),
                months: without_gaps(tallies::months(&moment, &months[0])?, months),
            })
        })
    }
}

/// The names of the last [`MONTHS`], the oldest first.
pub(super) fn last_months(now: DateTime<Utc>) -> Vec<String> {
    let ago = |months| now.checked_sub_months(Months::new(months)).unwrap_or(now);
    (0..MONTHS).rev().map(|months| month(ago(months))).collect()
}

fn active_since(sql: &Connection, since: DateTime<Utc>) -> rusqlite::Result<u64> {
    sql.prepare_cached("SELECT count(DISTINCT user_id) FROM sessions WHERE last_active_at >= ?1")?
        .query_row([Time(since)], |row| row.get(0).map(unsigned))
}

/// One period a name, empty where nothing is known.
fn without_gaps(known: Vec<Period>, names: Vec<String>) -> Vec<Period> {
    let mut known: BTreeMap<String, Period> =
        known.into_iter().map(|period| (period.name.clone(), period)).collect();
    names
        .into_iter()
        .map(|name| known.remove(&name).unwrap_or(Period { name, ..Period::default() }))
        .collect()
}
