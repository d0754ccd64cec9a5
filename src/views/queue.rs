//! Whose turn it is among the jobs that wait, in memory, so that neither a page that polls its job
//! nor a worker that asks for one costs a search. The order is [`Schedule`]'s; what it needs to know
//! of the past lies in two small tables, so that it outlives a restart.

use std::collections::{BTreeMap, HashMap};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use chrono::{DateTime, Utc};
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::column::{Id, Text, Time, Word, int, unsigned};
use crate::domain::ids::{JobId, UserId};
use crate::domain::job::Kind;
use crate::domain::schedule::{Schedule, Share};
use crate::domain::tier::{Caps, Class};

pub(super) const SCHEMA: &str = "
-- Where each user's last lease lies.
CREATE TABLE turns (
    kind TEXT NOT NULL,
    class TEXT NOT NULL,
    user_id TEXT NOT NULL,
    position INTEGER NOT NULL,
    PRIMARY KEY (kind, class, user_id)
) WITHOUT ROWID;
-- What each class has had.
CREATE TABLE shares (
    kind TEXT NOT NULL,
    class TEXT NOT NULL,
    start INTEGER NOT NULL,
    next INTEGER NOT NULL,
    PRIMARY KEY (kind, class)
) WITHOUT ROWID;
";

/// All jobs that wait or run.
#[derive(Default)]
pub(super) struct Queue(RwLock<State>);

#[derive(Default)]
struct State {
    kinds: HashMap<Kind, Lane>,
    jobs: HashMap<JobId, Place>,
    /// Jobs of the schedules' future, by when and where.
    delayed: BTreeMap<(DateTime<Utc>, u64), JobId>,
}

#[derive(Default)]
struct Lane {
    schedule: Schedule,
    /// Where its last lease lies in the log.
    served: u64,
}

/// Where a job stands after an event of it.
#[derive(Clone)]
pub(super) struct Place {
    kind: Kind,
    class: Class,
    user_id: UserId,
    /// Where it was requested, or retried by its user.
    position: u64,
    standing: Standing,
    /// Where its user's last lease of the class lies.
    served: u64,
    /// Told when they changed.
    shares: Option<[Share; 3]>,
}

#[derive(Clone, Copy, PartialEq)]
enum Standing {
    /// Its turn comes once this has passed.
    Delayed(DateTime<Utc>),
    Waits,
    Runs,
    Over,
}

impl Queue {
    pub fn load(sql: &Connection) -> rusqlite::Result<Self> {
        let mut state = State::default();
        // Each has its index.
        for condition in ["available_at IS NOT NULL", "lease_expires_at IS NOT NULL"] {
            let mut statement =
                sql.prepare(&format!("SELECT {COLUMNS}, job_id FROM {TABLES} WHERE {condition}"))?;
            let mut rows = statement.query([])?;
            while let Some(row) = rows.next()? {
                state.set(JobId(row.get::<_, Id>(7)?.0), place_of(row)?);
            }
        }
        for kind in Kind::ALL {
            let served = "SELECT max(position) FROM turns WHERE kind = ?1";
            let served: Option<i64> = sql.query_row(served, [kind.as_str()], |row| row.get(0))?;
            let lane = state.kinds.entry(kind).or_default();
            lane.served = served.map(unsigned).unwrap_or_default();
            lane.schedule.set_shares(shares(sql, kind)?);
        }
        Ok(Self(RwLock::new(state)))
    }

    pub fn set(&self, id: JobId, place: Place) {
        self.write().set(id, place);
    }

    /// The job whose turn it is among those of these kinds. Between kinds it is the one that waits
    /// longest for a worker.
    pub fn next(
        &self,
        now: DateTime<Utc>,
        caps: &Caps,
        kinds: &[Kind],
        skip: impl Fn(JobId) -> bool,
    ) -> Option<JobId> {
        self.admit(now);
        let state = self.read();
        let mut lanes: Vec<_> =
            state.kinds.iter().filter(|(kind, _)| kinds.contains(kind)).collect();
        lanes.sort_by_key(|(_, lane)| lane.served);
        lanes.into_iter().find_map(|(_, lane)| lane.schedule.next(caps, &skip))
    }

    /// From 1; nothing for a job that does not wait for its turn.
    pub fn place_of(&self, id: JobId, now: DateTime<Utc>, caps: &Caps) -> Option<u64> {
        self.admit(now);
        let state = self.read();
        let place = state.jobs.get(&id).filter(|place| place.standing == Standing::Waits)?;
        let schedule = &state.kinds.get(&place.kind)?.schedule;
        schedule.place(caps, place.class, &place.user_id, place.position)
    }

    /// Lets in the jobs whose delay has passed.
    fn admit(&self, now: DateTime<Utc>) {
        let due =
            |state: &State| state.delayed.first_key_value().is_some_and(|(at, _)| at.0 <= now);
        if !due(&self.read()) {
            return;
        }
        let mut state = self.write();
        while due(&state) {
            let Some((_, id)) = state.delayed.pop_first() else { return };
            if let Some(place) = state.jobs.get(&id).cloned() {
                state.set(id, Place { standing: Standing::Waits, ..place });
            }
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn set(&mut self, id: JobId, place: Place) {
        if let Some(old) = self.jobs.remove(&id) {
            let schedule = &mut self.kinds.entry(old.kind).or_default().schedule;
            match old.standing {
                Standing::Waits => schedule.leave(old.class, &old.user_id, old.position),
                Standing::Runs => schedule.end(old.class, &old.user_id),
                Standing::Delayed(until) => drop(self.delayed.remove(&(until, old.position))),
                Standing::Over => {}
            }
        }
        let lane = self.kinds.entry(place.kind).or_default();
        match place.standing {
            Standing::Waits => lane.schedule.wait(place.class, &place.user_id, place.position, id),
            Standing::Runs => lane.schedule.run(place.class, &place.user_id),
            Standing::Delayed(until) => drop(self.delayed.insert((until, place.position), id)),
            Standing::Over => {}
        }
        lane.schedule.serve(place.class, &place.user_id, place.served);
        if let Some(shares) = place.shares {
            lane.schedule.set_shares(shares);
            lane.served = lane.served.max(place.served);
        }
        if place.standing != Standing::Over {
            self.jobs.insert(id, place);
        }
    }
}

const COLUMNS: &str = "jobs.kind, jobs.class, jobs.user_id, queued_position, state, available_at, \
                       turns.position";
const TABLES: &str = "jobs LEFT JOIN turns ON turns.kind = jobs.kind AND turns.class = jobs.class \
                      AND turns.user_id = jobs.user_id";

/// Where a job stands after an event of it; nothing if there is no such job.
pub(super) fn place(
    sql: &Connection,
    job_id: JobId,
    leased: bool,
) -> rusqlite::Result<Option<Place>> {
    let place = sql
        .prepare_cached(&format!("SELECT {COLUMNS} FROM {TABLES} WHERE job_id = ?1"))?
        .query_row([Id(job_id.0)], place_of)
        .optional()?;
    let Some(place) = place else { return Ok(None) };
    let shares = if leased { Some(shares(sql, place.kind)?) } else { None };
    Ok(Some(Place { shares, ..place }))
}

/// Takes in that a job of the user was leased.
pub(super) fn serve(
    sql: &Connection,
    position: u64,
    kind: &str,
    class: Class,
    user_id: &str,
) -> rusqlite::Result<()> {
    sql.prepare_cached("INSERT OR REPLACE INTO turns VALUES (?1, ?2, ?3, ?4)")?
        .execute(params![kind, class.as_str(), user_id, int(position)])?;
    let mut shares = shares_of(sql, kind)?;
    Share::take(&mut shares, class);
    let Share { start, next } = shares[class as usize];
    sql.prepare_cached("INSERT OR REPLACE INTO shares VALUES (?1, ?2, ?3, ?4)")?
        .execute(params![kind, class.as_str(), int(start), int(next)])?;
    Ok(())
}

fn shares(sql: &Connection, kind: Kind) -> rusqlite::Result<[Share; 3]> {
    shares_of(sql, kind.as_str())
}

fn shares_of(sql: &Connection, kind: &str) -> rusqlite::Result<[Share; 3]> {
    let mut shares = [Share::default(); 3];
    let mut statement =
        sql.prepare_cached("SELECT class, start, next FROM shares WHERE kind = ?1")?;
    let mut rows = statement.query([kind])?;
    while let Some(row) = rows.next()? {
        let class = row.get::<_, Word<Class>>(0)?.0;
        shares[class as usize] =
            Share { start: unsigned(row.get(1)?), next: unsigned(row.get(2)?) };
    }
    Ok(shares)
}

fn place_of(row: &Row<'_>) -> rusqlite::Result<Place> {
    let state: String = row.get(4)?;
    let standing = match (state.as_str(), row.get::<_, Option<Time>>(5)?) {
        ("running" | "cancelling", _) => Standing::Runs,
        ("retry_wait", Some(until)) => Standing::Delayed(until.0),
        (_, Some(_)) => Standing::Waits,
        _ => Standing::Over,
    };
    Ok(Place {
        kind: row.get::<_, Word<Kind>>(0)?.0,
        class: row.get::<_, Word<Class>>(1)?.0,
        user_id: row.get::<_, Text<UserId>>(2)?.0,
        position: row.get(3).map(unsigned)?,
        standing,
        served: row.get::<_, Option<i64>>(6)?.map(unsigned).unwrap_or_default(),
        shares: None,
    })
}
