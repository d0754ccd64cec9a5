//! Digests of the tables, to prove that a replay came out the same.

use rusqlite::Connection;
use rusqlite::types::ValueRef;
use sha2::{Digest, Sha256};

use super::column::unsigned;

/// Each table with its key. The checkpoint is left out: it says how far, not what.
pub(super) const TABLES: [(&str, &str); 8] = [
    ("users", "user_id"),
    ("sessions", "session_id"),
    ("files", "position"),
    ("jobs", "position"),
    ("feed", "position"),
    ("turns", "kind, class, user_id"),
    ("shares", "kind, class"),
    ("tallies", "user_id, period, item"),
];

/// Name, number of rows and SHA-256 of each table, all as of one moment.
pub(super) fn tables(sql: &Connection) -> rusqlite::Result<Vec<(String, u64, String)>> {
    let moment = sql.unchecked_transaction()?;
    TABLES.iter().map(|(table, key)| one(&moment, table, key)).collect()
}

pub(super) fn total(tables: &[(String, u64, String)]) -> String {
    let mut digest = Sha256::new();
    for (table, rows, hash) in tables {
        digest.update(format!("{table} {rows} {hash}\n"));
    }
    hex::encode(digest.finalize())
}

fn one(sql: &Connection, table: &str, key: &str) -> rusqlite::Result<(String, u64, String)> {
    let mut query = sql.prepare(&format!("SELECT * FROM {table} ORDER BY {key}"))?;
    let columns = query.column_count();
    let (mut digest, mut count) = (Sha256::new(), 0);
    let mut rows = query.query([])?;
    while let Some(row) = rows.next()? {
        for column in 0..columns {
            add(&mut digest, row.get_ref(column)?);
        }
        count += 1;
    }
    Ok((table.to_owned(), unsigned(count), hex::encode(digest.finalize())))
}

/// With kind and length, so that no two different rows look alike.
fn add(digest: &mut Sha256, value: ValueRef<'_>) {
    match value {
        ValueRef::Null => digest.update([0]),
        ValueRef::Integer(number) => field(digest, 1, &number.to_be_bytes()),
        ValueRef::Real(number) => field(digest, 2, &number.to_be_bytes()),
        ValueRef::Text(text) => field(digest, 3, text),
        ValueRef::Blob(bytes) => field(digest, 4, bytes),
    }
}

fn field(digest: &mut Sha256, kind: u8, bytes: &[u8]) {
    digest.update([kind]);
    digest.update((bytes.len() as u64).to_be_bytes());
    digest.update(bytes);
}
