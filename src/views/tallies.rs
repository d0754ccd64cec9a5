//! Counts that are kept as events come in, so that asking for them costs the same with a million
//! jobs as with ten: of a user by month, of everybody by day and as of now.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use rusqlite::{Connection, params};

use super::column::unsigned;
use crate::domain::job::{Event, MAX_ATTEMPTS};

pub(super) const SCHEMA: &str = "
CREATE TABLE tallies (
    -- Empty: everybody.
    user_id TEXT NOT NULL,
    -- A month (2026-11) of a user, a day (2026-11-21) of everybody; empty: all time.
    period TEXT NOT NULL,
    item TEXT NOT NULL,
    count INTEGER NOT NULL,
    -- Seconds or bytes, where the item has some.
    amount REAL NOT NULL,
    PRIMARY KEY (user_id, period, item)
) WITHOUT ROWID;
";

/// Users who are there.
pub(super) const USERS: &str = "users";
/// Files that are there, and their bytes.
pub(super) const FILES: &str = "files";
const REQUESTED: &str = "requested";
const COMPLETED: &str = "completed";
/// Followed by the state in which so many jobs are.
const STATE: &str = "state:";
/// Followed by the class of the reason.
const FAILURE: &str = "failure:";

const EVERYBODY: &str = "";
const ALWAYS: &str = "";

/// What happened in a day or a month.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Period {
    /// `2026-11-21` or `2026-11`, in UTC.
    pub name: String,
    /// Jobs that were asked for in it.
    pub requested: u64,
    /// Jobs that ended in it; one that is tried again by its user and ends again counts again.
    pub completed: u64,
    pub failed: u64,
    pub cancelled: u64,
    /// The length of the videos that were completed in it.
    pub seconds_rendered: f64,
}

impl Period {
    fn take_in(&mut self, item: &str, count: u64, amount: f64) {
        match item {
            REQUESTED => self.requested = count,
            COMPLETED => (self.completed, self.seconds_rendered) = (count, amount),
            "failed" => self.failed = count,
            "cancelled" => self.cancelled = count,
            _ => {}
        }
    }
}

/// As of now, of everybody.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Totals {
    pub users: u64,
    pub files: u64,
    pub bytes_stored: u64,
    pub seconds_rendered: f64,
    pub states: BTreeMap<String, u64>,
    pub failures: BTreeMap<String, u64>,
}

/// Counts something that is there now: one more, or one less.
pub(super) fn there(sql: &Connection, item: &str, count: i64, amount: f64) -> rusqlite::Result<()> {
    add(sql, EVERYBODY, ALWAYS, item, count, amount)
}

/// A job that was asked for.
pub(super) fn requested(
    sql: &Connection,
    user_id: &str,
    time: DateTime<Utc>,
) -> rusqlite::Result<()> {
    add(sql, EVERYBODY, ALWAYS, &format!("{STATE}queued"), 1, 0.0)?;
    add(sql, EVERYBODY, &day(time), REQUESTED, 1, 0.0)?;
    add(sql, user_id, &month(time), REQUESTED, 1, 0.0)
}

/// A job that went from one state to another.
pub(super) struct Moved<'a> {
    pub user_id: &'a str,
    pub before: &'a str,
    pub after: &'a str,
    pub event: &'a Event,
    /// What was known of the last attempt's end before the event.
    pub lease_ran_out: bool,
}

pub(super) fn moved(
    sql: &Connection,
    job: &Moved<'_>,
    time: DateTime<Utc>,
) -> rusqlite::Result<()> {
    let Moved { user_id, before, after, event, lease_ran_out } = job;
    if before == after {
        return Ok(());
    }
    add(sql, EVERYBODY, ALWAYS, &format!("{STATE}{before}"), -1, 0.0)?;
    add(sql, EVERYBODY, ALWAYS, &format!("{STATE}{after}"), 1, 0.0)?;
    let seconds = match event {
        Event::Completed { output, .. } => output.duration.unwrap_or(0.0),
        _ => 0.0,
    };
    if matches!(*after, "completed" | "failed" | "cancelled") {
        add(sql, EVERYBODY, &day(time), after, 1, seconds)?;
        add(sql, user_id, &month(time), after, 1, seconds)?;
    }
    if *after == COMPLETED {
        add(sql, EVERYBODY, ALWAYS, COMPLETED, 1, seconds)?;
    }
    if *after == "failed" {
        let class = failure_class(event, *lease_ran_out);
        add(sql, EVERYBODY, ALWAYS, &format!("{FAILURE}{class}"), 1, 0.0)?;
    }
    Ok(())
}

/// Why a job failed for good. The texts of errors are the workers' own and of any number.
fn failure_class(event: &Event, lease_ran_out: bool) -> &'static str {
    match event {
        Event::AttemptFailed { attempt, .. } if *attempt >= MAX_ATTEMPTS => "attempts_exhausted",
        Event::AttemptFailed { .. } => "not_retryable",
        _ if lease_ran_out => "worker_lost",
        _ => "other",
    }
}

pub(super) fn totals(sql: &Connection) -> rusqlite::Result<Totals> {
    let mut totals = Totals::default();
    let mut query = sql.prepare_cached(
        "SELECT item, count, amount FROM tallies WHERE user_id = '' AND period = ''",
    )?;
    let mut rows = query.query([])?;
    while let Some(row) = rows.next()? {
        let item = row.get_ref(0)?.as_str()?;
        let (count, amount): (i64, f64) = (row.get(1)?, row.get(2)?);
        let count = unsigned(count);
        match item {
            USERS => totals.users = count,
            // Sums of whole numbers far below 2^53 are exact.
            FILES => (totals.files, totals.bytes_stored) = (count, unsigned(amount as i64)),
            COMPLETED => totals.seconds_rendered = amount,
            item => {
                if let Some(state) = item.strip_prefix(STATE).filter(|_| count > 0) {
                    totals.states.insert(state.to_owned(), count);
                } else if let Some(class) = item.strip_prefix(FAILURE) {
                    totals.failures.insert(class.to_owned(), count);
                }
            }
        }
    }
    Ok(totals)
}

/// The days of everybody from one on in which anything happened, the oldest first.
pub(super) fn days(sql: &Connection, from: &str) -> rusqlite::Result<Vec<Period>> {
    periods(
        sql,
        "SELECT period, item, count, amount FROM tallies
         WHERE user_id = ?1 AND period >= ?2 AND period <> '' ORDER BY period",
        EVERYBODY,
        from,
    )
}

/// The months of everybody, likewise.
pub(super) fn months(sql: &Connection, from: &str) -> rusqlite::Result<Vec<Period>> {
    periods(
        sql,
        "SELECT substr(period, 1, 7), item, sum(count), sum(amount) FROM tallies
         WHERE user_id = ?1 AND period >= ?2 AND period <> '' GROUP BY 1, 2 ORDER BY 1",
        EVERYBODY,
        from,
    )
}

/// The months of a user, likewise.
pub(super) fn months_of(
    sql: &Connection,
    user_id: &str,
    from: &str,
) -> rusqlite::Result<Vec<Period>> {
    periods(
        sql,
        "SELECT period, item, count, amount FROM tallies
         WHERE user_id = ?1 AND period >= ?2 ORDER BY period",
        user_id,
        from,
    )
}

fn periods(
    sql: &Connection,
    query: &str,
    user_id: &str,
    from: &str,
) -> rusqlite::Result<Vec<Period>> {
    let mut periods: Vec<Period> = Vec::new();
    let mut query = sql.prepare_cached(query)?;
    let mut rows = query.query([user_id, from])?;
    while let Some(row) = rows.next()? {
        let name = row.get_ref(0)?.as_str()?;
        if periods.last().is_none_or(|last| last.name != name) {
            periods.push(Period { name: name.to_owned(), ..Period::default() });
        }
        if let Some(period) = periods.last_mut() {
            period.take_in(row.get_ref(1)?.as_str()?, unsigned(row.get(2)?), row.get(3)?);
        }
    }
    Ok(periods)
}

fn add(
    sql: &Connection,
    user_id: &str,
    period: &str,
    item: &str,
    count: i64,
    amount: f64,
) -> rusqlite::Result<()> {
    sql.prepare_cached(
        "INSERT INTO tallies VALUES (?1, ?2, ?3, ?4, ?5)
         ON CONFLICT DO UPDATE SET count = count + ?4, amount = amount + ?5",
    )?
    .execute(params![user_id, period, item, count, amount])?;
    Ok(())
}

/// As [`Period::name`] has it.
pub fn day(time: DateTime<Utc>) -> String {
    time.format("%Y-%m-%d").to_string()
}

/// As [`Period::name`] has it.
pub fn month(time: DateTime<Utc>) -> String {
    time.format("%Y-%m").to_string()
}
