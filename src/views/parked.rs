//! A view that met an event which it cannot take in stands still there, and says so; the others go
//! on. An operator lets it begin anew, with a version that understands the event or without it.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rusqlite::{Connection, params};
use serde::Serialize;

use super::Entity;
use super::column::{int, unsigned};
use super::file::directory;

pub(super) const SCHEMA: &str = "
CREATE TABLE parked (view TEXT PRIMARY KEY, position INTEGER NOT NULL, reason TEXT NOT NULL);
";

/// The read models that can stand still without the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum View {
    Users,
    Sessions,
    Files,
    Jobs,
}

impl View {
    pub const ALL: [Self; 4] = [Self::Users, Self::Sessions, Self::Files, Self::Jobs];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Users => "users",
            Self::Sessions => "sessions",
            Self::Files => "files",
            Self::Jobs => "jobs",
        }
    }

    /// What of the file is its own; the counts and event streams of all are told by the jobs.
    pub fn tables(self) -> &'static [&'static str] {
        match self {
            Self::Users => &["users"],
            Self::Sessions => &["sessions"],
            Self::Files => &["files"],
            Self::Jobs => &["jobs", "turns", "shares"],
        }
    }

    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|view| view.as_str() == name)
    }

    pub(super) fn of(entity: &Entity) -> Option<Self> {
        match entity {
            Entity::User(..) => Some(Self::Users),
            Entity::Session(..) => Some(Self::Sessions),
            Entity::File(..) => Some(Self::Files),
            Entity::Job(..) => Some(Self::Jobs),
            Entity::Unreadable { view, .. } => *view,
        }
    }
}

/// Where a view stands still, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Parked {
    pub view: View,
    /// Of the event that it cannot take in.
    pub position: u64,
    pub reason: String,
}

pub(super) fn load(sql: &Connection) -> rusqlite::Result<Vec<Parked>> {
    let mut query = sql.prepare("SELECT view, position, reason FROM parked ORDER BY position")?;
    let mut rows = query.query([])?;
    let mut parked = Vec::new();
    while let Some(row) = rows.next()? {
        if let Some(view) = View::parse(row.get_ref(0)?.as_str()?) {
            let position = unsigned(row.get(1)?);
            parked.push(Parked { view, position, reason: row.get(2)? });
        }
    }
    Ok(parked)
}

/// Every view if none is named. The first reason stands.
pub(super) fn park(
    sql: &Connection,
    parked: &mut Vec<Parked>,
    view: Option<View>,
    position: u64,
    reason: &str,
) -> rusqlite::Result<()> {
    for one in View::ALL.into_iter().filter(|one| view.is_none_or(|view| view == *one)) {
        if parked.iter().any(|parked| parked.view == one) {
            continue;
        }
        sql.prepare_cached("INSERT OR IGNORE INTO parked VALUES (?1, ?2, ?3)")?
            .execute(params![one.as_str(), int(position), reason])?;
        parked.push(Parked { view: one, position, reason: reason.to_owned() });
    }
    Ok(())
}

/// The positions that an operator has given up for the views that are called `base`: they are
/// passed over. They lie in a file beside the views, since those are thrown away at any time.
///
/// # Errors
/// The file cannot be read, or holds something else.
pub fn skipped(base: &Path) -> io::Result<Arc<BTreeSet<u64>>> {
    let path = list(base);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Arc::default()),
        Err(error) => return Err(error),
    };
    let positions = text.lines().map(str::parse).collect::<Result<_, _>>().map_err(|_| {
        io::Error::other(format!("{} holds something that is no position", path.display()))
    })?;
    Ok(Arc::new(positions))
}

/// Gives positions up; they count from the next rebuild on.
///
/// # Errors
/// The list cannot be read or written; it is then as before.
pub fn skip(base: &Path, more: &[u64]) -> io::Result<()> {
    let mut positions = (*skipped(base)?).clone();
    positions.extend(more);
    let (path, draft) = (list(base), base.with_extension("skipped.draft"));
    let mut file = File::create(&draft)?;
    for position in positions {
        writeln!(file, "{position}")?;
    }
    file.sync_all()?;
    fs::rename(draft, path)?;
    File::open(directory(base))?.sync_all()
}

fn list(base: &Path) -> PathBuf {
    base.with_extension("skipped")
}
