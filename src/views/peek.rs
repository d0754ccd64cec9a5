//! A look at the views without opening them: nothing is created, thrown away or written.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::Arc;

use super::column::unsigned;
use super::parked::{self, Parked};
use super::{Error, Seen, file, seen};

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
}

/// None when there are no views at `path`.
///
/// # Errors
/// They cannot be read, e.g. because they are of another version.
pub fn peek(path: &Path) -> Result<Option<Peek>, Error> {
    let real = file::current(path)?;
    if !real.try_exists()? {
        return Ok(None);
    }
    let mut sql = file::reader(&real)?;
    // One moment for both.
    let moment = sql.transaction()?;
    let seen = seen(&moment)?;
    let mut files = moment.prepare("SELECT DISTINCT sha256, size FROM files")?;
    let blobs = files.query_map([], |row| Ok((row.get(0)?, unsigned(row.get(1)?))))?;
    let blobs = blobs.collect::<rusqlite::Result<_>>()?;
    Ok(Some(Peek { seen, parked: parked::load(&moment)?, skipped: parked::skipped(path)?, blobs }))
}
