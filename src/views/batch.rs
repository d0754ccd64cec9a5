//! One batch of events on its way into the tables. Each row that its events concern is read once,
//! changed in memory as often as they say, and written once: in a replay most events change a row
//! that an event shortly before has changed too.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::hash::Hash;
use std::sync::Arc;

use foldhash::fast::RandomState;
use rusqlite::{Connection, params};

use super::column::int;
use super::feed::{self, Feed};
use super::files::FileEntry;
use super::jobs::Job;
use super::parked::{self, Parked, View};
use super::queue::{Shares, Turn};
use super::sessions::Session;
use super::tallies::Tally;
use super::users::User;
use super::{Change, Entity, Happened, checkpoint};
use crate::domain::ids::UserId;
use crate::domain::{file as file_domain, user};

/// A row that is kept in memory while a batch is taken in.
pub(super) trait Record: Sized {
    type Key: Hash + Eq + Clone;

    fn find(sql: &Connection, key: &Self::Key) -> rusqlite::Result<Option<Self>>;
    /// It is not in the table yet.
    fn insert(&self, sql: &Connection, key: &Self::Key) -> rusqlite::Result<()>;
    fn update(&self, sql: &Connection, key: &Self::Key) -> rusqlite::Result<()>;
    fn delete(sql: &Connection, key: &Self::Key) -> rusqlite::Result<()>;
}

/// Rows of one table, in the order in which they were first asked for: new ones are written in the
/// order of their keys then, which is the cheapest.
pub(super) struct Rows<R: Record> {
    slots: VecDeque<Slot<R>>,
    /// By the number of their slots, which are numbered through.
    places: HashMap<R::Key, usize, RandomState>,
    /// The number of the first slot.
    first: usize,
}

struct Slot<R: Record> {
    key: R::Key,
    row: Option<R>,
    in_table: bool,
    changed: bool,
}

impl<R: Record> Default for Rows<R> {
    fn default() -> Self {
        Self { slots: VecDeque::new(), places: HashMap::default(), first: 0 }
    }
}

impl<R: Record> Rows<R> {
    /// As it is after the events so far.
    pub fn get(&mut self, sql: &Connection, key: &R::Key) -> rusqlite::Result<Option<&R>> {
        Ok(self.slot(sql, key)?.row.as_ref())
    }

    /// The same, to be changed.
    pub fn change(&mut self, sql: &Connection, key: &R::Key) -> rusqlite::Result<Option<&mut R>> {
        let slot = self.slot(sql, key)?;
        slot.changed |= slot.row.is_some();
        Ok(slot.row.as_mut())
    }

    /// In the place of what was there.
    pub fn put(&mut self, sql: &Connection, key: &R::Key, row: R) -> rusqlite::Result<()> {
        let slot = self.slot(sql, key)?;
        (slot.row, slot.changed) = (Some(row), true);
        Ok(())
    }

    /// The row that is no more.
    pub fn remove(&mut self, sql: &Connection, key: &R::Key) -> rusqlite::Result<Option<R>> {
        let slot = self.slot(sql, key)?;
        slot.changed |= slot.row.is_some();
        Ok(slot.row.take())
    }

    /// Writes what has changed, and shows each changed row; none for one that is no more.
    fn save(
        &mut self,
        sql: &Connection,
        mut shown: impl FnMut(&R::Key, Option<&R>) -> rusqlite::Result<()>,
    ) -> rusqlite::Result<()> {
        for slot in self.slots.iter_mut().filter(|slot| slot.changed) {
            slot.save(sql)?;
            shown(&slot.key, slot.row.as_ref())?;
        }
        Ok(())
    }

    /// Holds no more than so many any longer: those that were asked for first are written and go.
    fn let_go(&mut self, sql: &Connection, most: usize) -> rusqlite::Result<()> {
        while self.slots.len() > most
            && let Some(mut slot) = self.slots.pop_front()
        {
            self.first += 1;
            self.places.remove(&slot.key);
            if slot.changed {
                slot.save(sql)?;
            }
        }
        Ok(())
    }

    /// Asks the table again from here on.
    fn forget(&mut self) {
        *self = Self::default();
    }

    fn slot(&mut self, sql: &Connection, key: &R::Key) -> rusqlite::Result<&mut Slot<R>> {
        let number = match self.places.get(key) {
            Some(number) => *number,
            None => {
                let row = R::find(sql, key)?;
                let (number, in_table) = (self.first + self.slots.len(), row.is_some());
                self.slots.push_back(Slot { key: key.clone(), row, in_table, changed: false });
                self.places.insert(key.clone(), number);
                number
            }
        };
        Ok(&mut self.slots[number - self.first])
    }
}

impl<R: Record> Slot<R> {
    fn save(&mut self, sql: &Connection) -> rusqlite::Result<()> {
        match (&self.row, self.in_table) {
            (Some(row), true) => row.update(sql, &self.key)?,
            (Some(row), false) => row.insert(sql, &self.key)?,
            (None, true) => R::delete(sql, &self.key)?,
            (None, false) => {}
        }
        self.in_table = self.row.is_some();
        self.changed = false;
        Ok(())
    }
}

/// What a batch is taken in by.
pub(super) struct Rules {
    /// Where the log ended when this began: what will be let go by then is not even written.
    pub towards: u64,
    /// About how far apart the positions of neighbouring events are.
    pub stride: u64,
    pub parked: Vec<Parked>,
    /// Positions that an operator has given up.
    pub skipped: Arc<BTreeSet<u64>>,
    /// The one view that is wanted, if not all are.
    pub only: Option<View>,
    /// Nobody reads these views yet.
    pub building: bool,
}

/// What came of it.
pub(super) struct Taken {
    pub position: u64,
    /// What follows for the memory.
    pub changes: Vec<Change>,
    /// Whoever follows one of these has something to look at.
    pub touched: HashSet<UserId>,
    pub parked: Vec<Parked>,
}

/// The rows that are in memory, and the items of the feed that are not in the table yet.
#[derive(Default)]
pub(super) struct Held {
    pub users: Rows<User>,
    pub sessions: Rows<Session>,
    pub files: Rows<FileEntry>,
    pub jobs: Rows<Job>,
    pub turns: Rows<Turn>,
    pub shares: Rows<Shares>,
    pub tallies: Rows<Tally>,
    pub feed: Feed,
}

impl Held {
    /// Writes all of the feed, and of each table all but so many rows. Nobody reads the views yet, so
    /// that nothing follows for the memory.
    pub fn let_go(&mut self, sql: &Connection, most: usize) -> rusqlite::Result<()> {
        let Self { users, sessions, files, jobs, turns, shares, tallies, feed } = self;
        users.let_go(sql, most)?;
        sessions.let_go(sql, most)?;
        files.let_go(sql, most)?;
        jobs.let_go(sql, most)?;
        turns.let_go(sql, most)?;
        shares.let_go(sql, most)?;
        tallies.let_go(sql, most)?;
        feed.save(sql)
    }
}

/// Takes in what lies beyond the checkpoint, and moves it; within the caller's transaction. What
/// changes is written at once for views that are read, and only held for those that are built.
pub(super) fn take_in(
    sql: &Connection,
    events: &[Happened],
    rules: Rules,
    held: &mut Held,
) -> rusqlite::Result<Option<Taken>> {
    let before = checkpoint(sql)?;
    let fresh = &events[events.partition_point(|happened| happened.position <= before)..];
    let (Some(first), Some(Happened { position, hash, .. })) = (fresh.first(), fresh.last()) else {
        return Ok(None);
    };
    let position = *position;
    let Rules { towards, stride, mut parked, skipped, only, building } = rules;
    held.feed.let_go_until(towards.max(position).saturating_sub(feed::ticks_kept(stride)));
    let mut batch = Batch { sql, held, changes: Vec::new(), touched: HashSet::new(), building };
    for happened in fresh {
        if let Entity::Unreadable { view, reason } = &happened.entity {
            if !skipped.contains(&happened.position) {
                parked::park(sql, &mut parked, *view, happened.position, reason)?;
            }
            continue;
        }
        let view = View::of(&happened.entity);
        let unwanted = only.is_some_and(|only| view != Some(only) && view != Some(View::Users));
        if !unwanted && !parked.iter().any(|parked| Some(parked.view) == view) {
            batch.take_in(happened)?;
        }
    }
    if !building {
        batch.save()?;
        feed::trim(sql, position, stride)?;
    }
    let Batch { changes, touched, .. } = batch;
    sql.prepare_cached(
        "UPDATE checkpoint SET first = iif(position = 0, ?2, first), position = ?1, last = ?3",
    )?
    .execute(params![int(position), first.hash, hash])?;
    Ok(Some(Taken { position, changes, touched, parked }))
}

/// What a batch has come to so far.
pub(super) struct Batch<'a> {
    pub sql: &'a Connection,
    pub held: &'a mut Held,
    changes: Vec<Change>,
    pub touched: HashSet<UserId>,
    /// Nobody reads these views yet: what concerns many rows is done at the end, and what the
    /// memory would hold is of no use.
    pub building: bool,
}

impl Batch<'_> {
    fn take_in(&mut self, happened: &Happened) -> rusqlite::Result<()> {
        let Happened { position, time, entity, .. } = happened;
        match entity {
            Entity::User(id, event) => {
                // A deletion clears what the user wrote.
                if matches!(event, user::Event::Deleted {}) {
                    self.changes.push(Change::AllJobs);
                }
                self.touch(id);
                self.user(*position, *time, id, event)
            }
            Entity::Session(id, event) => self.session(id, event),
            Entity::File(id, event) => {
                let user_id = match event {
                    file_domain::Event::Stored(stored) => &stored.user_id,
                    file_domain::Event::Deleted { user_id, .. } => user_id,
                };
                self.touch(user_id);
                self.file(*position, *time, *id, event)
            }
            Entity::Job(id, event) => self.job(*position, *time, *id, event),
            Entity::Unreadable { .. } => Ok(()),
        }
    }

    pub fn touch(&mut self, user_id: &UserId) {
        if !self.building && !self.touched.contains(user_id) {
            self.touched.insert(user_id.clone());
        }
    }

    /// Writes all of it, so that statements over many rows may follow; the rows that those change
    /// are read anew.
    pub fn save(&mut self) -> rusqlite::Result<()> {
        let Self { sql, held, changes, .. } = self;
        let sql: &Connection = sql;
        let Held { users, sessions, files, jobs, turns, shares, tallies, feed } = &mut **held;
        users.save(sql, |id, user| {
            changes.extend(user.and_then(|user| user.change(id)));
            Ok(())
        })?;
        sessions.save(sql, |id, session| {
            changes.push(Change::Session(id.clone(), session.and_then(Session::standing)));
            Ok(())
        })?;
        files.save(sql, |_, _| Ok(()))?;
        jobs.save(sql, |id, job| {
            let Some(job) = job else { return Ok(()) };
            let served = turns.get(sql, &job.turn())?.map_or(0, |turn| turn.0);
            let shares = if job.leased { shares.get(sql, &job.kind)? } else { None };
            changes.push(Change::Job(*id, job.place(served, shares.map(|shares| shares.0))));
            Ok(())
        })?;
        turns.save(sql, |_, _| Ok(()))?;
        shares.save(sql, |_, _| Ok(()))?;
        tallies.save(sql, |_, _| Ok(()))?;
        feed.save(sql)?;
        sessions.forget();
        files.forget();
        jobs.forget();
        Ok(())
    }
}
