//! Counts that are kept as events come in, so that asking for them costs the same with a million
//! jobs as with ten: of a user by month, of everybody by day and as of now.

use std::borrow::Cow;
use std::collections::BTreeMap;

use chrono::{DateTime, Datelike, NaiveDate, Utc};
use rusqlite::{Connection, OptionalExtension, params};

use super::batch::{Batch, Record};
use super::column::unsigned;
use crate::domain::ids::UserId;
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

/// What is counted.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Item {
    /// Users who are there.
    Users,
    /// Files that are there, and their bytes.
    Files,
    Requested,
    /// With their seconds.
    Completed,
    /// Ended otherwise, by the state's name.
    Ended(&'static str),
    /// Jobs in a state.
    State(&'static str),
    /// Jobs that failed for a reason of a class.
    Failure(&'static str),
}

/// A month of a user, a day of everybody, or all time.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Span {
    Always,
    Day(NaiveDate),
    Month(NaiveDate),
}

#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct TallyKey {
    /// None: everybody.
    user_id: Option<UserId>,
    span: Span,
    item: Item,
}

/// How many, and how many seconds or bytes where the item has some.
#[derive(Clone, Copy, Default)]
pub(super) struct Tally {
    count: i64,
    amount: f64,
}

const USERS: &str = "users";
const FILES: &str = "files";
const REQUESTED: &str = "requested";
const COMPLETED: &str = "completed";
const STATE: &str = "state:";
const FAILURE: &str = "failure:";

const EVERYBODY: &str = "";

const DAY: &str = "%Y-%m-%d";
const MONTH: &str = "%Y-%m";

impl Item {
    fn name(self) -> Cow<'static, str> {
        match self {
            Self::Users => USERS.into(),
            Self::Files => FILES.into(),
            Self::Requested => REQUESTED.into(),
            Self::Completed => COMPLETED.into(),
            Self::Ended(state) => state.into(),
            Self::State(state) => format!("{STATE}{state}").into(),
            Self::Failure(class) => format!("{FAILURE}{class}").into(),
        }
    }
}

impl TallyKey {
    fn columns(&self) -> (&str, String, Cow<'static, str>) {
        let period = match self.span {
            Span::Always => String::new(),
            Span::Day(date) => date.format(DAY).to_string(),
            Span::Month(date) => date.format(MONTH).to_string(),
        };
        (self.user_id.as_ref().map_or(EVERYBODY, UserId::as_str), period, self.item.name())
    }
}

impl Record for Tally {
    type Key = TallyKey;

    fn find(sql: &Connection, key: &TallyKey) -> rusqlite::Result<Option<Self>> {
        let (user_id, period, item) = key.columns();
        sql.prepare_cached(
            "SELECT count, amount FROM tallies WHERE user_id = ?1 AND period = ?2 AND item = ?3",
        )?
        .query_row(params![user_id, period, item], |row| {
            Ok(Self { count: row.get(0)?, amount: row.get(1)? })
        })
        .optional()
    }

    fn insert(&self, sql: &Connection, key: &TallyKey) -> rusqlite::Result<()> {
        self.update(sql, key)
    }

    fn update(&self, sql: &Connection, key: &TallyKey) -> rusqlite::Result<()> {
        let (user_id, period, item) = key.columns();
        sql.prepare_cached("INSERT OR REPLACE INTO tallies VALUES (?1, ?2, ?3, ?4, ?5)")?
            .execute(params![user_id, period, item, self.count, self.amount])?;
        Ok(())
    }

    fn delete(sql: &Connection, key: &TallyKey) -> rusqlite::Result<()> {
        let (user_id, period, item) = key.columns();
        sql.prepare_cached("DELETE FROM tallies WHERE user_id = ?1 AND period = ?2 AND item = ?3")?
            .execute(params![user_id, period, item])?;
        Ok(())
    }
}

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

/// A job that went from one state to another.
pub(super) struct Moved<'a> {
    pub user_id: &'a UserId,
    pub before: &'static str,
    pub after: &'static str,
    pub event: &'a Event,
    /// What was known of the last attempt's end before the event.
    pub lease_ran_out: bool,
}

impl Batch<'_> {
    /// Counts something that is there now: one more, or one less.
    pub fn count(&mut self, item: Item, count: i64, amount: f64) -> rusqlite::Result<()> {
        self.tally(None, Span::Always, item, count, amount)
    }

    /// A job that was asked for.
    pub fn count_request(&mut self, user_id: &UserId, time: DateTime<Utc>) -> rusqlite::Result<()> {
        self.count(Item::State("queued"), 1, 0.0)?;
        self.tally(None, Span::day(time), Item::Requested, 1, 0.0)?;
        self.tally(Some(user_id), Span::month(time), Item::Requested, 1, 0.0)
    }

    pub fn count_move(&mut self, job: &Moved<'_>, time: DateTime<Utc>) -> rusqlite::Result<()> {
        let Moved { user_id, before, after, event, lease_ran_out } = *job;
        if before == after {
            return Ok(());
        }
        self.count(Item::State(before), -1, 0.0)?;
        self.count(Item::State(after), 1, 0.0)?;
        let (item, seconds) = match (after, event) {
            ("completed", Event::Completed { output, .. }) => {
                (Item::Completed, output.duration.unwrap_or(0.0))
            }
            ("failed" | "cancelled", _) => (Item::Ended(after), 0.0),
            _ => return Ok(()),
        };
        self.tally(None, Span::day(time), item, 1, seconds)?;
        self.tally(Some(user_id), Span::month(time), item, 1, seconds)?;
        match after {
            "completed" => self.count(item, 1, seconds),
            "failed" => self.count(Item::Failure(failure_class(event, lease_ran_out)), 1, 0.0),
            _ => Ok(()),
        }
    }

    fn tally(
        &mut self,
        user_id: Option<&UserId>,
        span: Span,
        item: Item,
        count: i64,
        amount: f64,
    ) -> rusqlite::Result<()> {
        let key = TallyKey { user_id: user_id.cloned(), span, item };
        match self.held.tallies.change(self.sql, &key)? {
            Some(tally) => {
                tally.count += count;
                // One after the other, as they happened: sums of fractions depend on the order.
                tally.amount += amount;
                Ok(())
            }
            None => self.held.tallies.put(self.sql, &key, Tally { count, amount }),
        }
    }
}

impl Span {
    fn day(time: DateTime<Utc>) -> Self {
        Self::Day(time.date_naive())
    }

    fn month(time: DateTime<Utc>) -> Self {
        let date = time.date_naive();
        Self::Month(date.with_day(1).unwrap_or(date))
    }
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

/// As [`Period::name`] has it.
pub fn day(time: DateTime<Utc>) -> String {
    time.format(DAY).to_string()
}

/// As [`Period::name`] has it.
pub fn month(time: DateTime<Utc>) -> String {
    time.format(MONTH).to_string()
}
