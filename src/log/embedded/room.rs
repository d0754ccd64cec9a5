//! What the writer does while the disk is full: it refuses every append, and looks for room until
//! there is some again. Nothing has to be started anew for that.

use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, ffi};
use tokio::sync::mpsc::Receiver;
use tokio::sync::mpsc::error::TryRecvError;

use super::file::VERSION;
use super::reader::Reader;
use super::writer::{Append, Writer, checkpoint};
use super::{Error, bad};

/// How often a writer without room looks for some. Closing the log may have to wait as long.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// What must be free again, in bytes. A log that went on with the room that SQLite still has for itself
/// would be full again after some events, and the read model takes none of them meanwhile.
const ENOUGH: u64 = 1 << 20;

/// Whether a statement failed for want of room alone. SQLite says so before it has synced anything
/// of the transaction, which is then as if it had never begun; unlike after a failed sync, nothing
/// that was written is in doubt. The second code is the same fault met by the index of the WAL,
/// which is only memory that happens to lie in a file.
///
/// A file system that has room only for others (a quota) reports a failed write like any other.
pub(super) fn is_want_of_room(error: &rusqlite::Error) -> bool {
    error.sqlite_error().is_some_and(|error| {
        error.code == ErrorCode::DiskFull || error.extended_code == ffi::SQLITE_IOERR_SHMSIZE
    })
}

impl Writer {
    /// Refuses what comes until there is room, the log is closed, or something else fails.
    pub(super) fn wait_for_room(&mut self, appends: &mut Receiver<Append>) {
        tracing::error!("no room is left on the log's disk: nothing can be appended");
        loop {
            // They were on their way before it was known.
            loop {
                match appends.try_recv() {
                    Ok(append) => drop(append.reply.send(Err(self.shared.unwritable()))),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return,
                }
            }
            std::thread::sleep(LOOK_EVERY);
            match self.look_for_room() {
                Ok(true) => break,
                Ok(false) => {}
                Err(error) => return self.shared.stop("a write", &error),
            }
        }
        self.shared.set_full(false);
        tracing::info!("there is room again: the log takes appends");
    }

    /// Whether there is room; then what this keeps in memory is what the file says, and no more.
    pub(super) fn look_for_room(&mut self) -> Result<bool, Error> {
        if !has_enough(&self.path) || !has_room(&self.conn)? {
            return Ok(false);
        }
        let reader = Reader::open(&self.path)?;
        let (position, durable) = (reader.head()?, *self.shared.head.borrow());
        if position != durable {
            return Err(bad(position, &format!("the log was to end at {durable}")));
        }
        let hash = reader.hash_at(position)?;
        self.start_from(position, hash);
        Ok(true)
    }
}

/// A file system that does not say is believed to have it.
fn has_enough(path: &Path) -> bool {
    rustix::fs::statvfs(path)
        .ok()
        .filter(|about| about.f_blocks > 0)
        .is_none_or(|about| about.f_bavail.saturating_mul(about.f_frsize) >= ENOUGH)
}

/// Tries it: what the WAL holds goes into the file, so that its own room can be used again, and the
/// file's first page is written as it is, and synced.
fn has_room(conn: &Connection) -> rusqlite::Result<bool> {
    let tried = checkpoint(conn).map(drop);
    match tried.and_then(|()| conn.pragma_update(None, "user_version", VERSION)) {
        Ok(()) => Ok(true),
        Err(error) if is_want_of_room(&error) => Ok(false),
        Err(error) => Err(error),
    }
}
