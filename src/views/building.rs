//! Views that are being built: nobody reads them yet, and a crash may throw them away, so that they
//! are filled without a journal, as fast as the disk takes pages.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rusqlite::Connection;

use super::batch::{self, Held, Rules, Taken};
use super::parked::{self, Parked, View};
use super::{Content, Difference, Error, Happened, Reach, Snapshot, Views, file};

/// Rows of each table held in memory until they are written: some tens of megabytes. What happens to
/// a row happens mostly within as many others.
const HELD: usize = if cfg!(test) { 4 } else { 8192 };

/// A file of views on its way from position 0 to where they may be shown. Dropped before it got there
/// it is deleted: it shows everything in clear, and takes the room that the log may need.
pub struct Building {
    /// What it will be called to the outside.
    base: PathBuf,
    /// Closed before the file is deleted, and that before the lock is let go.
    sql: Connection,
    file: Unfinished,
    checkpoint: u64,
    stride: u64,
    /// What is not in the file yet: nearly every row is written once, as it is in the end.
    held: Held,
    parked: Vec<Parked>,
    skipped: Arc<BTreeSet<u64>>,
    only: Option<View>,
    /// No two rebuilds beside the same views; the system lets go of it when the process dies.
    lock: Option<File>,
}

/// A file that is deleted unless it is kept.
struct Unfinished {
    path: PathBuf,
    kept: bool,
}

impl Unfinished {
    fn keep(mut self) {
        self.kept = true;
    }

    /// Lets `base` name it, and keeps it then.
    fn make_current(self, base: &Path) -> Result<(), Error> {
        let made = file::make_current(base, &self.path);
        // It may be named although the name is not durable yet.
        if made.is_ok() || file::current(base).is_ok_and(|named| named == self.path) {
            self.keep();
        }
        made
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.kept
            && let Err(error) = file::remove(&self.path)
        {
            let path = self.path.display();
            tracing::warn!(%error, %path, "views that were not finished could not be deleted");
        }
    }
}

impl Building {
    /// At a place of their own.
    ///
    /// # Errors
    /// [`Error::Exists`] when there is something already.
    pub fn at(path: &Path) -> Result<Self, Error> {
        if path.exists() {
            return Err(Error::Exists(path.to_owned()));
        }
        Self::create(path.to_owned(), path.to_owned(), None)
    }

    /// To take the place of the views that are called `base`, which may be in use meanwhile. What
    /// an earlier attempt left there is removed; what is not ours stays, and the next number is taken.
    ///
    /// # Errors
    /// [`Error::Rebuilding`] while somebody else does the same.
    pub fn beside(base: &Path) -> Result<Self, Error> {
        let lock = file::lock(base)?.ok_or(Error::Rebuilding)?;
        let path = file::make_way(base, &file::current(base)?)?;
        Self::create(base.to_owned(), path, Some(lock))
    }

    /// Takes over all rows of the views that are read at present, in the place of a replay.
    ///
    /// # Errors
    /// They are another version's, or one of the two files does something.
    pub fn copied(self) -> Result<Self, Error> {
        file::copy(&self.sql, &file::current(&self.base)?)?;
        Ok(self)
    }

    /// Leaves the tables of all other views empty; those of the users are needed for any.
    pub fn only(mut self, view: Option<View>) -> Self {
        self.only = view;
        self
    }

    /// Passes over these positions, in the place of those that are given up for the views it is called
    /// after.
    pub fn passing_over(mut self, skipped: Arc<BTreeSet<u64>>) -> Self {
        self.skipped = skipped;
        self
    }

    /// As [`Views::set_stride`].
    pub fn with_stride(mut self, stride: u64) -> Self {
        self.stride = stride;
        self
    }

    fn create(base: PathBuf, file: PathBuf, lock: Option<File>) -> Result<Self, Error> {
        let skipped = parked::skipped(&base)?;
        let file = Unfinished { path: file, kept: false };
        let sql = file::builder(&file.path)?;
        Ok(Self {
            base,
            sql,
            file,
            checkpoint: 0,
            stride: 1,
            held: Held::default(),
            parked: Vec::new(),
            skipped,
            only: None,
            lock,
        })
    }

    /// Position of the last event taken in; 0 before the first.
    pub fn checkpoint(&self) -> u64 {
        self.checkpoint
    }

    /// As [`Views::apply_towards`]. After an error the building is of no use any more.
    ///
    /// # Errors
    /// What the file itself does.
    pub fn apply(&mut self, events: &[Happened], towards: u64) -> Result<(), Error> {
        let rules = Rules {
            towards,
            stride: self.stride,
            parked: std::mem::take(&mut self.parked),
            skipped: Arc::clone(&self.skipped),
            only: self.only,
            building: true,
        };
        let parked = rules.parked.clone();
        match batch::take_in(&self.sql, events, rules, &mut self.held)? {
            Some(Taken { position, parked, .. }) => {
                (self.checkpoint, self.parked) = (position, parked);
            }
            None => self.parked = parked,
        }
        Ok(self.held.let_go(&self.sql, HELD)?)
    }

    /// Whether it may take the place of those that have come as far as `present`: no view stands still
    /// here that went on there. To be asked before it is finished.
    ///
    /// # Errors
    /// [`Error::StandsStill`]
    pub fn ensure_no_worse_than(&self, present: Option<&Reach>) -> Result<(), Error> {
        match present.and_then(|present| present.went_past(&self.parked)) {
            Some(parked) => Err(Error::StandsStill(parked.clone())),
            None => Ok(()),
        }
    }

    fn write_held(&mut self) -> Result<(), Error> {
        self.held.let_go(&self.sql, 0)?;
        Ok(self.sql.execute_batch("COMMIT")?)
    }

    /// Makes it durable and ready to be read.
    ///
    /// # Errors
    /// What the file itself does.
    pub fn finish(mut self) -> Result<Views, Error> {
        self.write_held()?;
        let Self { lock: _lock, base, sql, stride, file, .. } = self;
        let views = finished(base, sql, stride, &file.path)?;
        file.keep();
        Ok(views)
    }

    /// Compares what was built with others, and throws it away.
    ///
    /// # Errors
    /// One of the two cannot be read.
    pub fn compare_and_remove(mut self, others: &Snapshot) -> Result<Vec<Difference>, Error> {
        self.write_held()?;
        let Self { lock: _lock, sql, stride, file, .. } = self;
        file::finish(sql, &file.path, stride)?;
        let found = Snapshot::of_file(&file.path).and_then(|fresh| others.compare(&fresh))?;
        file::remove(&file.path)?;
        Ok(found)
    }

    /// The same as [`Building::finish`], and it stands for the views from now on: whoever has the
    /// present ones open finds it by [`Views::successor`], whoever opens them gets it.
    ///
    /// # Errors
    /// What the files do.
    pub fn finish_as_current(self) -> Result<Views, Error> {
        self.finish_as_current_after(|| Ok(()))
    }

    /// The same; once nothing is left to be built, and nothing replaced yet, `settled` sees to what lies
    /// beside the views.
    ///
    /// # Errors
    /// Its own, or as [`Building::finish_as_current`]; the present views stay then.
    pub fn finish_as_current_after<E: From<Error>>(
        mut self,
        settled: impl FnOnce() -> Result<(), E>,
    ) -> Result<Views, E> {
        self.write_held()?;
        // Held to the end: without it a server that starts takes the file for a leftover.
        let Self { lock: _lock, base, sql, stride, file, .. } = self;
        let views = finished(base.clone(), sql, stride, &file.path)?;
        settled()?;
        file.make_current(&base)?;
        Ok(views)
    }

    /// The same for somebody else to open.
    ///
    /// # Errors
    /// What the files do.
    pub fn hand_over(mut self) -> Result<(), Error> {
        self.write_held()?;
        // The lock is held to the end here too.
        let Self { lock: _lock, base, sql, stride, file, .. } = self;
        file::finish(sql, &file.path, stride)?;
        file.make_current(&base)
    }
}

fn finished(base: PathBuf, sql: Connection, stride: u64, path: &Path) -> Result<Views, Error> {
    file::finish(sql, path, stride)?;
    Ok(Views::of(Content::open(base, path.to_owned(), stride)?))
}
