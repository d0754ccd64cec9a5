//! Whose turn it is among the jobs that wait, in memory, so that neither a page that polls its job
//! nor a worker that asks for one costs a search. The order is [`Schedule`]'s; what it needs to know
//! of the past lies in two small tables, so that it outlives a restart.

use std::collections::{BTreeMap, HashMap};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use chrono::{DateTime, Utc};
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::batch::{Batch, Record};
use super::column::{Id, Text, Time, Word, int, unsigned};
use crate::domain::ids::{JobId, UserId};
use crate::domain::job::{Kind, has_come};
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
    pub kind: Kind,
    pub class: Class,
    pub user_id: UserId,
    /// Where it was requested, or retried by its user.
    pub position: u64,
    pub standing: Standing,
    /// Where its user's last lease of the class lies.
    pub served: u64,
    /// Told when they changed.
    pub shares: Option<[Share; 3]>,
}

#[derive(Clone, Copy, PartialEq)]
pub(super) enum Standing {
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
        lanes.sort_by_key(|(kind, lane)| (lane.served, kind.as_str()));
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
        if self.read().due(now).is_none() {
            return;
        }
        let mut state = self.write();
        while let Some(key) = state.due(now) {
            let Some(id) = state.delayed.remove(&key) else { return };
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
    /// One whose delay has passed: the first of all, or else the last, see [`has_come`].
    fn due(&self, now: DateTime<Utc>) -> Option<(DateTime<Utc>, u64)> {
        let ends = [self.delayed.first_key_value(), self.delayed.last_key_value()];
        ends.into_iter().flatten().map(|(key, _)| *key).find(|(until, _)| has_come(*until, now))
    }

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

impl Standing {
    pub fn of(state: &str, available_at: Option<Time>) -> Self {
        match (state, available_at) {
            ("running" | "cancelling", _) => Self::Runs,
            ("retry_wait", Some(until)) => Self::Delayed(until.0),
            (_, Some(_)) => Self::Waits,
            _ => Self::Over,
        }
    }
}

/// Where a user's last lease of a class lies.
pub(super) struct Turn(pub u64);

#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct TurnKey {
    pub kind: Kind,
    pub class: Class,
    pub user_id: UserId,
}

/// What the classes of a kind have had.
pub(super) struct Shares(pub [Share; 3]);

impl Batch<'_> {
    /// Takes in that a job was leased.
    pub fn serve(&mut self, position: u64, turn: TurnKey) -> rusqlite::Result<()> {
        let TurnKey { kind, class, .. } = turn;
        self.held.turns.put(self.sql, &turn, Turn(position))?;
        if self.held.shares.get(self.sql, &kind)?.is_none() {
            self.held.shares.put(self.sql, &kind, Shares(Default::default()))?;
        }
        if let Some(shares) = self.held.shares.change(self.sql, &kind)? {
            Share::take(&mut shares.0, class);
        }
        Ok(())
    }
}

impl Record for Turn {
    type Key = TurnKey;

    fn find(sql: &Connection, key: &TurnKey) -> rusqlite::Result<Option<Self>> {
        sql.prepare_cached(
            "SELECT position FROM turns WHERE kind = ?1 AND class = ?2 AND user_id = ?3",
        )?
        .query_row(params![key.kind.as_str(), key.class.as_str(), key.user_id.as_str()], |row| {
            row.get(0).map(|position| Self(unsigned(position)))
        })
        .optional()
    }

    fn insert(&self, sql: &Connection, key: &TurnKey) -> rusqlite::Result<()> {
        self.update(sql, key)
    }

    fn update(&self, sql: &Connection, key: &TurnKey) -> rusqlite::Result<()> {
        sql.prepare_cached("INSERT OR REPLACE INTO turns VALUES (?1, ?2, ?3, ?4)")?.execute(
            params![key.kind.as_str(), key.class.as_str(), key.user_id.as_str(), int(self.0)],
        )?;
        Ok(())
    }

    fn delete(sql: &Connection, key: &TurnKey) -> rusqlite::Result<()> {
        sql.prepare_cached("DELETE FROM turns WHERE kind = ?1 AND class = ?2 AND user_id = ?3")?
            .execute(params![key.kind.as_str(), key.class.as_str(), key.user_id.as_str()])?;
        Ok(())
    }
}

impl Record for Shares {
    type Key = Kind;

    /// None of a kind of which nothing was leased yet.
    fn find(sql: &Connection, kind: &Kind) -> rusqlite::Result<Option<Self>> {
        let shares = shares(sql, *kind)?;
        Ok((shares != <[Share; 3]>::default()).then_some(Self(shares)))
    }

    fn insert(&self, sql: &Connection, kind: &Kind) -> rusqlite::Result<()> {
        self.update(sql, kind)
    }

    /// A class that had nothing has no row.
    fn update(&self, sql: &Connection, kind: &Kind) -> rusqlite::Result<()> {
        let mut save =
            sql.prepare_cached("INSERT OR REPLACE INTO shares VALUES (?1, ?2, ?3, ?4)")?;
        for class in Class::ALL {
            let share = self.0[class as usize];
            if share != Share::default() {
                let (start, next) = (int(share.start), int(share.next));
                save.execute(params![kind.as_str(), class.as_str(), start, next])?;
            }
        }
        Ok(())
    }

    fn delete(sql: &Connection, kind: &Kind) -> rusqlite::Result<()> {
        sql.prepare_cached("DELETE FROM shares WHERE kind = ?1")?.execute([kind.as_str()])?;
        Ok(())
    }
}

fn shares(sql: &Connection, kind: Kind) -> rusqlite::Result<[Share; 3]> {
    let mut shares = [Share::default(); 3];
    let mut statement =
        sql.prepare_cached("SELECT class, start, next FROM shares WHERE kind = ?1")?;
    let mut rows = statement.query([kind.as_str()])?;
    while let Some(row) = rows.next()? {
        let class = row.get::<_, Word<Class>>(0)?.0;
        shares[class as usize] =
            Share { start: unsigned(row.get(1)?), next: unsigned(row.get(2)?) };
    }
    Ok(shares)
}

fn place_of(row: &Row<'_>) -> rusqlite::Result<Place> {
    Ok(Place {
        kind: row.get::<_, Word<Kind>>(0)?.0,
        class: row.get::<_, Word<Class>>(1)?.0,
        user_id: row.get::<_, Text<UserId>>(2)?.0,
        position: row.get(3).map(unsigned)?,
        standing: Standing::of(row.get_ref(4)?.as_str()?, row.get(5)?),
        served: row.get::<_, Option<i64>>(6)?.map(unsigned).unwrap_or_default(),
        shares: None,
    })
}
