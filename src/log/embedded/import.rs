//! Taking in another log as it is: the same positions, the same hashes, each checked on the way.

use std::fs::File;
use std::path::{Path, PathBuf};

use super::file::{Found, inspect, lay_out, lock, move_into_place, refuse_stray_wal, remove};
use super::writer::Writer;
use super::{Error, io};
use crate::log::{Recorded, Verified};

/// Removes what an import left that was killed, and says whether there was anything; whoever calls it
/// holds the lock.
pub(super) fn clear(path: &Path) -> Result<bool, Error> {
    let left = path.with_extension(IMPORTING);
    let was_there = left.exists();
    if was_there {
        tracing::warn!(path = %left.display(), "an import was broken off; what it left is removed");
    }
    remove(&left)?;
    Ok(was_there)
}

/// What the new file is called until it is whole.
const IMPORTING: &str = "importing";

/// Events on their way into a log file that nobody else writes to. To everybody else they are there
/// all at once, when [`Import::finish`] returns; dropped before that, it leaves nothing.
///
/// Where there is no log yet, a new one is made beside its place and moved there whole; a log that
/// is there is continued in one transaction.
pub struct Import {
    /// Taken by `finish`.
    writer: Option<Writer>,
    path: PathBuf,
    /// Where the new one lies until it is whole.
    new: Option<PathBuf>,
    has_cleared: bool,
    /// Let go last.
    _lock: File,
}

impl Import {
    /// Begins with what is at `path`, a log or nothing.
    ///
    /// # Errors
    /// [`Error::Unwritable`] when it is open for writing elsewhere, [`Error::Foreign`] when it is
    /// not a log of a version known here, or a WAL without its log.
    pub fn begin(path: &Path) -> Result<Self, Error> {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir).map_err(io)?;
        }
        look(path)?;
        let lock = lock(path)?;
        // Once more: another process may have made it between the two.
        let new = (look(path)? == Found::Nothing).then(|| path.with_extension(IMPORTING));
        let has_cleared = clear(path)?;
        // Made before anything is written, so that an error from here on removes the new file.
        let path = path.to_owned();
        let mut import = Self { writer: None, path, new, has_cleared, _lock: lock };
        if let Some(new) = &import.new {
            // Nothing of it counts before it is whole, so that it needs no journal.
            lay_out(new)?.close().map_err(|(_, error)| error)?;
        }
        let writer = Writer::open(import.new.as_ref().unwrap_or(&import.path))?;
        if import.new.is_some() {
            writer.conn.pragma_update(None, "synchronous", "off")?;
            writer.conn.pragma_update(None, "journal_mode", "off")?;
        }
        writer.conn.execute_batch("BEGIN IMMEDIATE")?;
        import.writer = Some(writer);
        Ok(import)
    }

    /// Whether it began with removing what an import left that was broken off.
    pub fn has_cleared(&self) -> bool {
        self.has_cleared
    }

    /// The last position and its hash, with what was taken so far.
    pub fn end(&self) -> (u64, [u8; 32]) {
        self.writer.as_ref().map_or((0, crate::log::GENESIS), Writer::end)
    }

    /// Takes the event that follows.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when it does not follow, or is not what its hash says, and
    /// [`Error::Invalid`] when it is beyond the contract's limits. Only dropping makes sense then.
    pub fn take(&mut self, event: &Recorded) -> Result<(), Error> {
        let writer = self.writer.as_mut();
        writer.ok_or_else(|| Error::Unwritable("the import has ended".into()))?.take(event)
    }

    /// Makes all of it durable and visible.
    ///
    /// # Errors
    /// What the storage said; then nothing of it is there.
    pub fn finish(mut self) -> Result<Verified, Error> {
        let (events, head_hash) = self.end();
        let Some(writer) = self.writer.take() else {
            return Err(Error::Unwritable("the import has ended".into()));
        };
        writer.conn.execute_batch("COMMIT")?;
        if let Some(new) = &self.new {
            move_into_place(writer.into_connection(), new, &self.path)?;
            self.new = None;
        }
        Ok(Verified { events, head_hash })
    }
}

/// What is at `path`, where a log may be put if there is none.
fn look(path: &Path) -> Result<Found, Error> {
    if inspect(path)? == Found::Nothing
        && let Err(stray) = refuse_stray_wal(path)
        // Somebody may just have made a log there, whose WAL it is.
        && inspect(path)? == Found::Nothing
    {
        return Err(stray);
    }
    inspect(path)
}

impl Drop for Import {
    fn drop(&mut self) {
        if let Some(writer) = self.writer.take()
            && self.new.is_none()
        {
            // A failed statement may have ended the transaction already.
            let _ = writer.conn.execute_batch("ROLLBACK");
        }
        if let Some(new) = &self.new
            && let Err(error) = remove(new)
        {
            tracing::warn!(%error, "an unfinished import could not be removed");
        }
    }
}
