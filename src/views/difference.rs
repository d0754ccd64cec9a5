//! Two views compared row by row: what a replay says against what is shown.

use std::cmp::Ordering;
use std::path::Path;

use rusqlite::types::{Value, ValueRef};
use rusqlite::{Connection, Rows, Statement};
use serde::Serialize;

use super::digest::TABLES;
use super::file::{self, Found};
use super::{Error, checkpoint};

/// Rows that differ are told one by one up to so many a table.
const TOLD: usize = 20;

/// The views as they are at one moment, whatever is applied meanwhile.
pub struct Snapshot {
    sql: Connection,
    checkpoint: u64,
}

/// What differs in one table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, utoipa::ToSchema)]
#[schema(as = TableDifference)]
pub struct Difference {
    pub table: &'static str,
    /// Rows that are in the first one alone.
    pub missing: u64,
    /// Rows that are in the second one alone.
    pub surplus: u64,
    /// Rows with one key and different content.
    pub changed: u64,
    /// The first of them: key, and what there is instead of what.
    pub told: Vec<String>,
}

impl Difference {
    pub fn is_none(&self) -> bool {
        self.missing + self.surplus + self.changed == 0
    }
}

impl Snapshot {
    /// Of the views that are called `path` at present; they may be in use.
    ///
    /// # Errors
    /// There are none, they are another program's version of them, or they cannot be read.
    pub fn of(path: &Path) -> Result<Self, Error> {
        Self::of_file(&file::current(path)?)
    }

    pub(super) fn of_file(path: &Path) -> Result<Self, Error> {
        match file::recognise(path)? {
            Found::Ours => {}
            Found::Outdated => return Err(Error::Outdated(path.to_owned())),
            Found::Nothing => return Err(Error::Nothing(path.to_owned())),
        }
        let sql = file::reader(path)?;
        sql.execute_batch("BEGIN")?;
        // The first read settles the moment.
        let checkpoint = checkpoint(&sql)?;
        Ok(Self { sql, checkpoint })
    }

    pub fn checkpoint(&self) -> u64 {
        self.checkpoint
    }

    /// Goes through both, table by table, each in the order of its keys.
    ///
    /// # Errors
    /// One of them cannot be read.
    pub fn compare(&self, other: &Self) -> Result<Vec<Difference>, Error> {
        TABLES.iter().map(|(table, key)| Ok(compare(&self.sql, &other.sql, table, key)?)).collect()
    }
}

fn compare(
    ours: &Connection,
    theirs: &Connection,
    table: &'static str,
    key: &str,
) -> rusqlite::Result<Difference> {
    let query = format!("SELECT {key}, * FROM {table} ORDER BY {key}");
    let keys = key.split(',').count();
    let (mut ours, mut theirs) = (ours.prepare(&query)?, theirs.prepare(&query)?);
    let names: Vec<String> = ours.column_names().map(str::to_owned).collect();
    let (mut ours, mut theirs) = (Side::of(&mut ours)?, Side::of(&mut theirs)?);
    let mut found = Difference { table, missing: 0, surplus: 0, changed: 0, told: Vec::new() };
    loop {
        let order = match (&ours.row, &theirs.row) {
            (None, None) => return Ok(found),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some(ours), Some(theirs)) => by_key(&ours[..keys], &theirs[..keys]),
        };
        let tell = found.told.len() < TOLD;
        match (order, &ours.row, &theirs.row) {
            (Ordering::Less, Some(row), _) => {
                found.missing += 1;
                if tell {
                    found.told.push(format!("{}: only in the first", shown(&row[..keys])));
                }
                ours.step()?;
            }
            (Ordering::Greater, _, Some(row)) => {
                found.surplus += 1;
                if tell {
                    found.told.push(format!("{}: only in the second", shown(&row[..keys])));
                }
                theirs.step()?;
            }
            (_, Some(one), Some(other)) => {
                if one != other {
                    found.changed += 1;
                    if tell {
                        found.told.push(changed(&names, one, other, keys));
                    }
                }
                ours.step()?;
                theirs.step()?;
            }
            _ => return Ok(found),
        }
    }
}

/// One row at a time, so that tables of any length are compared in the same memory.
struct Side<'a> {
    rows: Rows<'a>,
    columns: usize,
    row: Option<Vec<Value>>,
}

impl<'a> Side<'a> {
    fn of(statement: &'a mut Statement<'_>) -> rusqlite::Result<Self> {
        let columns = statement.column_count();
        let mut side = Self { rows: statement.query([])?, columns, row: None };
        side.step()?;
        Ok(side)
    }

    fn step(&mut self) -> rusqlite::Result<()> {
        self.row = match self.rows.next()? {
            Some(row) => Some((0..self.columns).map(|at| row.get(at)).collect::<Result<_, _>>()?),
            None => None,
        };
        Ok(())
    }
}

/// As SQLite orders keys: all of them are numbers, texts by their bytes, or bytes.
fn by_key(one: &[Value], other: &[Value]) -> Ordering {
    let compared = one.iter().zip(other).map(|pair| match pair {
        (Value::Integer(one), Value::Integer(other)) => one.cmp(other),
        (Value::Text(one), Value::Text(other)) => one.cmp(other),
        (Value::Blob(one), Value::Blob(other)) => one.cmp(other),
        _ => Ordering::Equal,
    });
    compared.fold(Ordering::Equal, Ordering::then)
}

fn changed(names: &[String], one: &[Value], other: &[Value], keys: usize) -> String {
    let differ = (keys..one.len())
        .filter(|at| one[*at] != other[*at])
        .map(|at| format!("{} {} / {}", names[at], text(&one[at]), text(&other[at])));
    format!("{}: {}", shown(&one[..keys]), differ.collect::<Vec<_>>().join(", "))
}

fn shown(values: &[Value]) -> String {
    values.iter().map(text).collect::<Vec<_>>().join(" ")
}

fn text(value: &Value) -> String {
    match ValueRef::from(value) {
        ValueRef::Null => "null".to_owned(),
        ValueRef::Integer(number) => number.to_string(),
        ValueRef::Real(number) => number.to_string(),
        ValueRef::Text(text) => String::from_utf8_lossy(text).into_owned(),
        ValueRef::Blob(bytes) => bytes.iter().map(|byte| format!("{byte:02x}")).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::views::Views;

    #[test]
    fn what_is_not_of_this_version_is_not_compared() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("views.sqlite");
        let found = || Snapshot::of(&path).map(|found| found.checkpoint());
        assert!(matches!(found(), Err(Error::Nothing(_))));
        drop(Views::open(&path).unwrap());
        assert_eq!(found().unwrap(), 0);
        let sql = Connection::open(&path).unwrap();
        sql.execute_batch("PRAGMA user_version = 999").unwrap();
        assert!(matches!(found(), Err(Error::Outdated(_))));
        sql.execute_batch("PRAGMA application_id = 7").unwrap();
        assert!(matches!(found(), Err(Error::Foreign(_))));
    }
}
