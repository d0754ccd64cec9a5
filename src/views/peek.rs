//! A look at the views without opening them: nothing is created, thrown away or written.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::Arc;

use super::column::{Id, Text, unsigned};
use super::file::{self, Found};
use super::parked::{self, Parked};
use super::{Error, Seen, seen};
use crate::domain::ids::{FileId, UserId};

/// What operators ask of views that a server may be using.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peek {
    /// What they have seen of the log.
    pub seen: Seen,
    /// The views that stand still.
    pub parked: Vec<Parked>,
    /// The positions that an operator has given up.
    pub skipped: Arc<BTreeSet<u64>>,
    /// The blobs that files refer to, with their sizes in bytes.
    pub blobs: HashMap<String, u64>,
    /// The users who were registered, and whether they are deleted.
    pub users: HashMap<UserId, bool>,
}

/// None when there are no views at `path`.
///
/// # Errors
/// [`Error::Outdated`] when [`super::Views::open`] makes them anew; any other it would meet too.
pub fn peek(path: &Path) -> Result<Option<Peek>, Error> {
    let real = file::current(path)?;
    match file::recognise(&real)? {
        Found::Ours => {}
        Found::Outdated => return Err(Error::Outdated(real)),
        Found::Nothing => return Ok(None),
    }
    let mut sql = file::reader(&real)?;
    // One moment for all.
    let moment = sql.transaction()?;
    let seen = seen(&moment)?;
    let mut files = moment.prepare("SELECT DISTINCT sha256, size FROM files")?;
    let blobs = files.query_map([], |row| Ok((row.get(0)?, unsigned(row.get(1)?))))?;
    let blobs = blobs.collect::<rusqlite::Result<_>>()?;
    let mut users =
        moment.prepare("SELECT user_id, deleted FROM users WHERE position IS NOT NULL")?;
    let users = users.query_map([], |row| Ok((row.get::<_, Text<UserId>>(0)?.0, row.get(1)?)))?;
    let users = users.collect::<rusqlite::Result<_>>()?;
    let (parked, skipped) = (parked::load(&moment)?, parked::skipped(path)?);
    Ok(Some(Peek { seen, parked, skipped, blobs, users }))
}

/// A file that refers to a blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Referring {
    pub file_id: FileId,
    pub user_id: UserId,
    pub sha256: String,
    /// In bytes.
    pub size: u64,
}

/// The files that refer to one of these blobs at present, of views that [`peek`] takes.
///
/// # Errors
/// They cannot be read.
pub fn referring<'a>(
    path: &Path,
    blobs: impl IntoIterator<Item = &'a String>,
) -> Result<Vec<Referring>, Error> {
    let sql = file::reader(&file::current(path)?)?;
    let mut query = sql.prepare("SELECT file_id, user_id, size FROM files WHERE sha256 = ?1")?;
    let mut found = Vec::new();
    for sha256 in blobs {
        let files = query.query_map([sha256], |row| {
            Ok(Referring {
                file_id: FileId(row.get::<_, Id>(0)?.0),
                user_id: row.get::<_, Text<UserId>>(1)?.0,
                sha256: sha256.clone(),
                size: unsigned(row.get(2)?),
            })
        })?;
        found.extend(files.collect::<rusqlite::Result<Vec<_>>>()?);
    }
    Ok(found)
}

impl Seen {
    /// What the views at `path` have seen, also those of another version that keeps it in the same way;
    /// none where there are no views.
    ///
    /// # Errors
    /// [`Error::Outdated`] when the other version keeps it otherwise; any other as [`peek`].
    pub fn of(path: &Path) -> Result<Option<Self>, Error> {
        let real = file::current(path)?;
        match file::recognise(&real)? {
            Found::Ours => Ok(Some(seen(&file::reader(&real)?)?)),
            Found::Outdated => {
                let sql = file::reader(&real)?;
                seen(&sql).map(Some).map_err(|_| Error::Outdated(real))
            }
            Found::Nothing => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::views::Views;

    #[test]
    fn outdated_views_are_told_from_what_no_server_starts_with() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("views.sqlite");
        assert_eq!(peek(&path).unwrap(), None);
        std::fs::write(&path, "").unwrap();
        assert_eq!(peek(&path).unwrap(), None, "an empty file is one that was never begun");
        drop(Views::open(&path).unwrap());
        assert_eq!(peek(&path).unwrap().unwrap().seen.position, 0);
        let change = |sql| rusqlite::Connection::open(&path).unwrap().execute_batch(sql).unwrap();
        change("PRAGMA user_version = 999; UPDATE checkpoint SET position = 7");
        assert!(matches!(peek(&path), Err(Error::Outdated(_))));
        assert_eq!(Seen::of(&path).unwrap().unwrap().position, 7);
        change("ALTER TABLE checkpoint RENAME TO kept_otherwise");
        assert!(matches!(Seen::of(&path), Err(Error::Outdated(_))));
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[..16].fill(b'x');
        std::fs::write(&path, bytes).unwrap();
        assert!(matches!(peek(&path), Err(Error::Foreign(_))));
        assert!(matches!(Views::open(&path), Err(Error::Foreign(_))));
    }
}
