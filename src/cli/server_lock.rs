//! Who holds the data directory: one server, or one command that does what a server would do. An
//! embedded log has a lock of its own; an engine over the network lets anybody write, and the read
//! model beside it is still one process's.

use std::ffi::OsStr;
use std::fs::{self, File, TryLockError};
use std::io::Write;
use std::path::Path;

use anyhow::Context;

use super::layout::SERVER_LOCK;

/// What a server writes into it; a command leaves it empty.
const SERVER: &str = "server";

/// Whether a file of the data directory is the lock, which says nothing by being there.
pub fn is_named(name: &OsStr) -> bool {
    name == SERVER_LOCK
}

/// Held until it is dropped, or the process ends, however it ends; none while somebody else has it.
///
/// # Errors
/// The directory cannot be written to.
pub fn take(data_dir: &Path) -> anyhow::Result<Option<File>> {
    let held = lock(&data_dir.join(SERVER_LOCK))?;
    if let Some(held) = &held {
        // A server that was killed has left its word.
        held.set_len(0).with_context(|| format!("writing {SERVER_LOCK}"))?;
    }
    Ok(held)
}

/// The same for a server, which stays and does by itself what others find to be done.
///
/// # Errors
/// As [`take`].
pub fn take_for_server(data_dir: &Path) -> anyhow::Result<Option<File>> {
    let Some(mut held) = take(data_dir)? else { return Ok(None) };
    held.write_all(SERVER.as_bytes()).with_context(|| format!("writing {SERVER_LOCK}"))?;
    Ok(Some(held))
}

/// Of a directory that somebody holds: whether that is a server.
pub fn is_by_server(data_dir: &Path) -> bool {
    fs::read_to_string(data_dir.join(SERVER_LOCK)).is_ok_and(|word| word == SERVER)
}

/// The same for any file, which is made if it is not there.
///
/// # Errors
/// As [`take`].
pub fn lock(path: &Path) -> anyhow::Result<Option<File>> {
    let context = || format!("locking {}", path.display());
    let mut options = File::options();
    let file = options.create(true).truncate(false).write(true).open(path).with_context(context)?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error).with_context(context),
    }
}
