//! The file: whose it is, how it is made, locked and connected to.

use std::fs::{File, TryLockError};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags};

use super::{Error, io};

/// "T2Ml": who asks the file (`file(1)`, SQLite's own shell) sees whose it is.
const APPLICATION_ID: u32 = 0x5432_4d6c;
/// The newest layout this program knows.
pub(super) const VERSION: u32 = 1;

const SCHEMA: &str = "
    CREATE TABLE streams (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE) STRICT;
    CREATE TABLE types (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE) STRICT;
    CREATE TABLE events (
        position INTEGER PRIMARY KEY,
        stream_id INTEGER NOT NULL,
        revision INTEGER NOT NULL,
        type_id INTEGER NOT NULL,
        id BLOB NOT NULL,
        time INTEGER NOT NULL,
        hash BLOB NOT NULL,
        data BLOB NOT NULL,
        metadata BLOB NOT NULL
    ) STRICT;
    CREATE UNIQUE INDEX events_by_stream ON events (stream_id, revision);";

#[derive(PartialEq, Eq)]
pub(super) enum Found {
    Nothing,
    Log,
}

/// What is at `path`, from the file's first bytes alone: SQLite may change a file by opening it.
pub(super) fn inspect(path: &Path) -> Result<Found, Error> {
    let mut header = Vec::new();
    match File::open(path) {
        Ok(file) => file.take(100).read_to_end(&mut header).map_err(io)?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Found::Nothing),
        Err(error) => return Err(io(error)),
    };
    let path = path.display();
    // https://www.sqlite.org/fileformat.html: user_version at 60, application_id at 68.
    let number = |at: usize| header.get(at..at + 4).and_then(|b| b.try_into().ok());
    let (Some(version), Some(application)) = (number(60), number(68)) else {
        return Err(Error::Foreign(format!("{path} is not a T2M log; it was left as it is")));
    };
    if !header.starts_with(b"SQLite format 3\0")
        || u32::from_be_bytes(application) != APPLICATION_ID
    {
        return Err(Error::Foreign(format!("{path} is not a T2M log; it was left as it is")));
    }
    let version = u32::from_be_bytes(version);
    if version != VERSION {
        return Err(Error::Foreign(format!(
            "{path} is a T2M log of version {version} and this program knows version {VERSION}; \
             use a newer program"
        )));
    }
    Ok(Found::Log)
}

/// One writer at a time, also across processes; the system lets go of it when the process dies.
pub(super) fn lock(path: &Path) -> Result<File, Error> {
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path.with_extension("lock"))
        .map_err(io)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            Err(Error::Unwritable(format!("{} is open for writing elsewhere", path.display())))
        }
        Err(TryLockError::Error(error)) => Err(io(error)),
    }
}

/// Whoever puts a log where there is none asks this first.
///
/// # Errors
/// [`Error::Foreign`] when there is a WAL without its log.
pub(super) fn refuse_stray_wal(path: &Path) -> Result<(), Error> {
    let wal = beside(path, "-wal");
    if wal.exists() {
        // SQLite would replay it into the new file.
        return Err(Error::Foreign(format!(
            "{} lies there without its log; move it away or bring the log back",
            wal.display()
        )));
    }
    Ok(())
}

/// Make an empty log beside its place and move it there whole, so that a crash leaves no half one.
pub(super) fn create(path: &Path) -> Result<(), Error> {
    refuse_stray_wal(path)?;
    let new = path.with_extension("new");
    move_into_place(lay_out(&new)?, &new, path)
}

/// A log without events at `new`, in the place of whatever a crash left there. Not durable yet, and
/// not in WAL mode.
pub(super) fn lay_out(new: &Path) -> Result<Connection, Error> {
    remove(new)?;
    let conn = connect(new, OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE)?;
    conn.pragma_update(None, "page_size", 8192)?;
    conn.execute_batch(&format!(
        "BEGIN; {SCHEMA} PRAGMA application_id = {APPLICATION_ID}; \
         PRAGMA user_version = {VERSION}; COMMIT;"
    ))?;
    Ok(conn)
}

/// Makes what `conn` wrote at `new` durable, and then the log at `path`.
pub(super) fn move_into_place(conn: Connection, new: &Path, path: &Path) -> Result<(), Error> {
    conn.pragma_update(None, "journal_mode", "wal")?;
    conn.close().map_err(|(_, error)| error)?;
    File::open(new).and_then(|file| file.sync_all()).map_err(io)?;
    std::fs::rename(new, path).map_err(io)?;
    sync_directory(path)
}

/// Deletes a file of SQLite's with its companions; one that is not there is no error.
pub(super) fn remove(path: &Path) -> Result<(), Error> {
    for suffix in ["", "-journal", "-wal", "-shm"] {
        match std::fs::remove_file(beside(path, suffix)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(io(error)),
            _ => {}
        }
    }
    Ok(())
}

/// The statements that made the file, one an object, as SQLite keeps them.
pub(super) fn statements() -> Vec<&'static str> {
    SCHEMA.split(';').map(str::trim).filter(|statement| !statement.is_empty()).collect()
}

fn sync_directory(path: &Path) -> Result<(), Error> {
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(io)
}

pub(super) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Flags without URI: a path is a path, whatever is in it.
pub(super) fn connect(path: &Path, flags: OpenFlags) -> Result<Connection, Error> {
    let conn = Connection::open_with_flags(path, flags | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
    conn.busy_timeout(Duration::from_secs(10))?;
    // Else a statement is planned anew whenever a bound that it compares with changes.
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
    conn.set_prepared_statement_cache_capacity(32);
    Ok(conn)
}

/// A connection that makes what it writes durable.
pub(super) fn connect_durably(path: &Path) -> Result<Connection, Error> {
    let conn = connect(path, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
    conn.pragma_update(None, "synchronous", "full")?;
    // A plain fsync does not reach the disk on macOS; elsewhere these do nothing.
    conn.pragma_update(None, "fullfsync", true)?;
    conn.pragma_update(None, "checkpoint_fullfsync", true)?;
    conn.pragma_update(None, "wal_autocheckpoint", 0)?;
    Ok(conn)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_named_without_a_directory_lies_in_the_present_one() {
        assert_eq!(sync_directory(Path::new("log.sqlite")), Ok(()));
        assert!(sync_directory(Path::new("/no/such/directory/log.sqlite")).is_err());
    }

    #[test]
    fn what_is_not_there_is_removed_already_and_what_cannot_be_removed_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(remove(&dir.path().join("log.sqlite")), Ok(()));
        assert!(matches!(remove(dir.path()), Err(Error::Storage(_))), "a directory");
    }

    #[test]
    fn what_cannot_be_looked_at_is_not_taken_for_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, b"").unwrap();
        assert!(inspect(&dir.path().join("log.sqlite")) == Ok(Found::Nothing));
        assert!(matches!(inspect(&file.join("log.sqlite")), Err(Error::Storage(_))));
    }
}
