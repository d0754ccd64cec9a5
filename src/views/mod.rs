//! The read models: tables that answer what clients and background actors ask. All of it follows
//! from the log, lies in one SQLite file, and may be thrown away at any time.
//!
//! A batch of events and the checkpoint that counts them are one transaction. The file is in WAL
//! mode with `synchronous=NORMAL`: a crash of the machine may cost the last transactions, but
//! leaves the file sound, and what is missing is applied again from the log.

mod analytics;
mod batch;
mod building;
mod column;
mod difference;
mod digest;
mod feed;
mod file;
mod files;
mod jobs;
mod page;
mod parked;
mod peek;
mod queue;
mod reach;
mod sessions;
mod shards;
mod tallies;
#[cfg(test)]
mod tests;
mod usage;
mod users;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use chrono::{DateTime, Utc};
use rusqlite::{Connection, TransactionBehavior};

use crate::domain::ids::{FileId, JobId, SessionId, UserId};
use crate::domain::{file as file_domain, job, session, user};
use batch::{Held, Rules, Taken};
use column::unsigned;
use queue::{Place, Queue};
use shards::Shards;

pub use analytics::{Analytics, DAYS, MONTHS};
pub use building::Building;
pub use difference::{Difference, Snapshot};
pub use feed::FeedItem;
pub use file::{current as present_file, discard};
pub use files::FileRow;
pub use jobs::{JobFilter, JobRow};
pub use page::{Cursor, Page};
pub use parked::{Parked, View, skip, skipped};
pub use peek::{Peek, Referring, peek, referring};
pub use reach::Reach;
pub use sessions::{SessionCursor, SessionRow, SessionStanding};
pub use tallies::Period;
pub use usage::Usage;
pub use users::{DecidedHere, UserAccess, UserRow};

/// What views have seen of the log that they were computed from: by that they know it again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Of the last event; 0 before the first.
    pub position: u64,
    /// The hash of the first event.
    pub first: [u8; 32],
    /// The hash of the last event.
    pub last: [u8; 32],
}

/// One decoded event of the log.
#[derive(Debug, Clone)]
pub struct Happened {
    /// In the log; strictly growing.
    pub position: u64,
    /// By which the log knows the event.
    pub hash: [u8; 32],
    pub time: DateTime<Utc>,
    pub entity: Entity,
}

#[derive(Debug, Clone)]
pub enum Entity {
    User(UserId, user::Event),
    Session(SessionId, session::Event),
    File(FileId, file_domain::Event),
    Job(JobId, job::Event),
    /// What this version does not understand: the view that it belongs to stops there; every view
    /// if that is not known either.
    Unreadable {
        view: Option<View>,
        reason: String,
    },
}

impl Entity {
    /// Whether this version does not understand it.
    pub fn is_unreadable(&self) -> bool {
        matches!(self, Self::Unreadable { .. })
    }
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Opening would destroy what somebody else keeps there.
    #[error("{} is not a views file of ours", .0.display())]
    Foreign(PathBuf),
    /// To open them would throw them away and begin anew.
    #[error("{} is of another version of the views", .0.display())]
    Outdated(PathBuf),
    #[error("there are no views at {}", .0.display())]
    Nothing(PathBuf),
    #[error("the cursor is not one of ours")]
    BadCursor,
    /// Readers must never go back in time.
    #[error("the fresh views are at position {fresh}, the present ones at {present}")]
    Behind { fresh: u64, present: u64 },
    #[error("the fresh views must lie beside the present ones")]
    Elsewhere,
    #[error("the views are being rebuilt already")]
    Rebuilding,
    #[error("what was built beside the views is not taken over")]
    NotTakenOver,
    #[error("{} exists already", .0.display())]
    Exists(PathBuf),
    /// What was built shows less than what it is to replace.
    #[error(
        "the view {} would stand still at position {}, where the present read model went on: {}",
        .0.view.as_str(), .0.position, .0.reason
    )]
    StandsStill(Parked),
    /// A full disk would stop the log.
    #[error("the read model needs {needed} bytes of room beside it, and there are {free}")]
    NoRoom { needed: u64, free: u64 },
    #[error("views: {0}")]
    Sqlite(#[from] rusqlite::Error),
    #[error("views: {0}")]
    Io(#[from] std::io::Error),
}

/// A handle on the read models; clones share them. All calls block for microseconds, except
/// [`Views::apply`], [`Views::dump`], [`Views::renew`] and those that open a file.
#[derive(Clone)]
pub struct Views(Arc<RwLock<Arc<Content>>>);

/// One views file, opened.
struct Content {
    /// What the file is called to the outside; a rebuilt one has a number in its real name.
    base: PathBuf,
    file: PathBuf,
    writer: Mutex<Connection>,
    readers: Mutex<Vec<Connection>>,
    checkpoint: AtomicU64,
    stride: AtomicU64,
    users: Shards<UserId, Arc<UserAccess>>,
    /// The live ones.
    sessions: Shards<SessionId, SessionStanding>,
    queue: Queue,
    parked: Mutex<Vec<Parked>>,
    /// Rows that were read since their last event.
    jobs: Shards<JobId, Arc<JobRow>>,
    /// Set when another file has taken its place: then the last user deletes it.
    replaced: AtomicBool,
}

/// What a committed batch changes in memory.
enum Change {
    User(UserId, Arc<UserAccess>),
    /// Nothing: it is not live.
    Session(SessionId, Option<SessionStanding>),
    /// Its row is another now, and perhaps its place in the queue.
    Job(JobId, Place),
    /// Rows of any number of jobs are others now.
    AllJobs,
}

/// Idle connections kept for the next reader.
const IDLE_READERS: usize = 64;

impl Views {
    /// Opens the views at `path`, or creates them. Those of another schema version are thrown away
    /// and begin anew at checkpoint 0.
    ///
    /// # Errors
    /// [`Error::Foreign`] when the file is something else; it is left alone.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let real = file::current(path)?;
        let content = Content::open(path.to_owned(), real, 1)?;
        file::remove_leftovers(path, &content.file);
        Ok(Self::of(content))
    }

    /// Position of the last event applied; 0 before the first.
    pub fn checkpoint(&self) -> u64 {
        self.current().checkpoint.load(Ordering::Acquire)
    }

    /// The same, with what it takes to know the log again.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn seen(&self) -> Result<Seen, Error> {
        self.read(seen)
    }

    /// About how far apart the positions of neighbouring events of the log are; 1 unless this is
    /// called. What is kept for so many events is kept for as many more positions.
    pub fn set_stride(&self, stride: u64) {
        self.current().stride.store(stride, Ordering::Release);
    }

    fn stride(&self) -> u64 {
        self.current().stride.load(Ordering::Acquire)
    }

    /// Takes in a batch, all of it or nothing. Events at or below the checkpoint are skipped.
    /// Gives the users who have something new in the feed, or who stand otherwise than before.
    ///
    /// # Errors
    /// Only what the file itself does; an event that fits no row is not an error.
    pub fn apply(&self, batch: &[Happened]) -> Result<HashSet<UserId>, Error> {
        self.apply_towards(batch, 0)
    }

    /// The same on the way to position `towards`: what will be let go by then is not even written.
    /// The content is right once the checkpoint is there.
    ///
    /// # Errors
    /// As [`Views::apply`].
    pub fn apply_towards(
        &self,
        batch: &[Happened],
        towards: u64,
    ) -> Result<HashSet<UserId>, Error> {
        // Held throughout: a replacement waits, so that no batch goes into a file that is left.
        let content = self.0.read().unwrap_or_else(PoisonError::into_inner);
        content.apply(batch, towards)
    }

    /// The file that is read at present.
    pub fn present_file(&self) -> PathBuf {
        self.current().file.clone()
    }

    /// What is called so to the outside: where [`Building::beside`] builds another one.
    pub fn path(&self) -> PathBuf {
        self.current().base.clone()
    }

    /// Whether others are to take the place of these; not those of another program's version, which
    /// takes them itself.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn is_outdated(&self) -> Result<bool, Error> {
        let present = self.current();
        Ok(file::successor(&present.base, &present.file)?.is_some())
    }

    /// The views that are to take the place of these, if somebody else has built them: another
    /// process, beside this one.
    ///
    /// # Errors
    /// They cannot be opened.
    pub fn successor(&self) -> Result<Option<Self>, Error> {
        let present = self.current();
        let Some(real) = file::successor(&present.base, &present.file)? else { return Ok(None) };
        Ok(Some(Self::of(Content::open(present.base.clone(), real, self.stride())?)))
    }

    /// The views that stand still, each with where and why.
    pub fn parked(&self) -> Vec<Parked> {
        locked(&self.current().parked).clone()
    }

    /// Puts `fresh`, which [`Building::beside`] made, in the place of what is shown now, at once
    /// and for good. Readers that have begun finish with the old file, which is then deleted.
    ///
    /// # Errors
    /// [`Error::Behind`] when `fresh` has not caught up yet; nothing changed then.
    pub fn replace_with(&self, fresh: Self) -> Result<(), Error> {
        let fresh = fresh.current();
        let mut place = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let [new, old] =
            [&fresh, &*place].map(|content| content.checkpoint.load(Ordering::Acquire));
        if new < old {
            return Err(Error::Behind { fresh: new, present: old });
        }
        if fresh.base != place.base || fresh.file == place.file {
            return Err(Error::Elsewhere);
        }
        file::make_current(&fresh.base, &fresh.file)?;
        let old = std::mem::replace(&mut *place, fresh);
        old.replaced.store(true, Ordering::Release);
        Ok(())
    }

    /// SHA-256 over all rows of all tables in the order of their keys: equal for equal histories,
    /// however they were cut into batches.
    pub fn content_hash(&self) -> Result<String, Error> {
        Ok(digest::total(&self.dump()?))
    }

    /// Each table with the number of its rows and the SHA-256 over them.
    pub fn dump(&self) -> Result<Vec<(String, u64, String)>, Error> {
        self.read(digest::tables)
    }

    /// Whether the file may hold what its tables no longer say of users who were deleted.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn holds_residue(&self) -> Result<bool, Error> {
        self.read(|sql| {
            sql.prepare_cached(
                "SELECT EXISTS (SELECT 1 FROM users WHERE deleted
                 AND access_position > (SELECT position FROM renewed))",
            )?
            .query_row([], |row| row.get(0))
        })
    }

    /// Writes the rows anew, beside, into what is then the successor: it holds nothing else. Queries
    /// and batches go on meanwhile.
    ///
    /// # Errors
    /// [`Error::Rebuilding`] while somebody else builds there, or what the files do; nothing of it is
    /// left then.
    pub fn renew(&self) -> Result<(), Error> {
        let copied = Building::beside(&self.path())?.copied()?;
        copied.with_stride(self.stride()).hand_over()
    }

    /// Deletes what replays that broke off have left, and what was replaced.
    pub fn sweep(&self) {
        let content = self.current();
        file::remove_leftovers(&content.base, &content.file);
    }

    fn of(content: Content) -> Self {
        Self(Arc::new(RwLock::new(Arc::new(content))))
    }

    fn current(&self) -> Arc<Content> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Asks with a connection of its own, so that readers wait neither for each other nor for the
    /// writer.
    fn read<T>(
        &self,
        question: impl FnOnce(&Connection) -> rusqlite::Result<T>,
    ) -> Result<T, Error> {
        let content = self.current();
        let idle = locked(&content.readers).pop();
        let connection = match idle {
            Some(connection) => connection,
            None => file::reader(&content.file)?,
        };
        let answer = question(&connection)?;
        let mut readers = locked(&content.readers);
        if readers.len() < IDLE_READERS {
            readers.push(connection);
        }
        Ok(answer)
    }
}

impl Content {
    fn open(base: PathBuf, real: PathBuf, stride: u64) -> Result<Self, Error> {
        let writer = file::writer(&real)?;
        let content = Self {
            base,
            file: real,
            checkpoint: AtomicU64::new(checkpoint(&writer)?),
            stride: AtomicU64::new(stride),
            readers: Mutex::default(),
            users: Shards::new(),
            sessions: Shards::new(),
            queue: Queue::load(&writer)?,
            parked: Mutex::new(parked::load(&writer)?),
            jobs: Shards::new(),
            replaced: AtomicBool::new(false),
            writer: Mutex::new(writer),
        };
        {
            let writer = locked(&content.writer);
            users::load(&writer, |change| content.remember(change))?;
            sessions::load(&writer, |change| content.remember(change))?;
        }
        Ok(content)
    }

    fn apply(&self, batch: &[Happened], towards: u64) -> Result<HashSet<UserId>, Error> {
        let mut writer = locked(&self.writer);
        let transaction = writer.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let parked = locked(&self.parked).clone();
        let before = parked.len();
        let poisoned = batch.iter().any(|happened| happened.entity.is_unreadable());
        let skipped = if poisoned { parked::skipped(&self.base)? } else { Arc::default() };
        let stride = self.stride.load(Ordering::Acquire);
        let rules = Rules { towards, stride, parked, skipped, only: None, building: false };
        let Some(taken) = batch::take_in(&transaction, batch, rules, &mut Held::default())? else {
            return Ok(HashSet::new());
        };
        let Taken { position, changes, touched, parked } = taken;
        transaction.commit()?;
        // First: whoever keeps a row that it read before this commit sees that it is too late, or
        // is undone by what follows.
        self.checkpoint.store(position, Ordering::Release);
        for change in changes {
            self.remember(change);
        }
        if parked.len() != before {
            *locked(&self.parked) = parked;
        }
        Ok(touched)
    }

    fn remember(&self, change: Change) {
        match change {
            Change::User(id, access) => self.users.insert(id, access),
            Change::Session(id, Some(live)) => self.sessions.insert(id, live),
            Change::Session(id, None) => self.sessions.remove(&id),
            Change::Job(id, place) => {
                self.queue.set(id, place);
                self.jobs.remove(&id);
            }
            Change::AllJobs => self.jobs.clear(),
        }
    }
}

impl Drop for Content {
    fn drop(&mut self) {
        if self.replaced.load(Ordering::Acquire) {
            locked(&self.readers).clear();
            if let Err(error) = file::remove(&self.file) {
                tracing::warn!(%error, "a replaced views file could not be deleted");
            }
        }
    }
}

fn checkpoint(sql: &Connection) -> rusqlite::Result<u64> {
    Ok(seen(sql)?.position)
}

fn seen(sql: &Connection) -> rusqlite::Result<Seen> {
    sql.prepare_cached("SELECT position, first, last FROM checkpoint")?.query_row([], |row| {
        Ok(Seen { position: unsigned(row.get(0)?), first: row.get(1)?, last: row.get(2)? })
    })
}

/// A panic elsewhere leaves no half-done change behind: SQLite rolled it back.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
