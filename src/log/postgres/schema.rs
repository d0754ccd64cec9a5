//! The tables: whose they are, how they are made and brought up to date.

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use uuid::Uuid;

use super::connection::failed;
use crate::log::Error;

/// The steps from an empty schema to the layout that this program knows. A step that was released
/// never changes; the version is how many were taken.
///
/// Streams and types are numbered by the position of their first event, so that whoever holds the
/// writers' lock can number them without asking.
const STEPS: [&str; 1] = ["
    CREATE TABLE t2m.streams (id bigint PRIMARY KEY, name text COLLATE \"C\" NOT NULL UNIQUE);
    CREATE TABLE t2m.types (id bigint PRIMARY KEY, name text COLLATE \"C\" NOT NULL UNIQUE);
    CREATE TABLE t2m.events (
        position bigint PRIMARY KEY,
        stream_id bigint NOT NULL,
        revision bigint NOT NULL,
        type_id bigint NOT NULL,
        id uuid NOT NULL,
        time bigint NOT NULL,
        hash bytea NOT NULL,
        data bytea NOT NULL,
        metadata bytea NOT NULL,
        UNIQUE (stream_id, revision)
    );"];
pub(super) const VERSION: i32 = 1;
const _: () = assert!(STEPS.len() == VERSION as usize);

/// Who holds it migrates; "T2M mig".
const MIGRATION_LOCK: i64 = 0x0054_324d_206d_6967;

/// The identity of the log in this database; its tables are made or brought up to date first.
///
/// # Errors
/// [`Error::Foreign`] when they are not ours, or of a newer version; they are left as they are.
pub(super) async fn migrate(client: &mut Client, place: &str) -> Result<Uuid, Error> {
    // What is there already may be used by who may not create anything.
    if let Some((VERSION, identity)) = inspect(client, place).await? {
        return Ok(identity);
    }
    let transaction = client.transaction().await.map_err(failed)?;
    let lock = format!("SELECT pg_advisory_xact_lock({MIGRATION_LOCK})");
    transaction.batch_execute(&lock).await.map_err(failed)?;
    let version = match inspect(transaction.client(), place).await? {
        Some((version, _)) => version,
        None => {
            let identity = Uuid::from_u128(rand::random());
            let begin = format!(
                "CREATE SCHEMA IF NOT EXISTS t2m;
                 CREATE TABLE t2m.log (version integer NOT NULL, identity uuid NOT NULL);
                 INSERT INTO t2m.log VALUES (0, '{identity}')"
            );
            transaction.batch_execute(&begin).await.map_err(failed)?;
            0
        }
    };
    for step in STEPS.iter().skip(usize::try_from(version).unwrap_or(0)) {
        transaction.batch_execute(step).await.map_err(failed)?;
    }
    let update = format!("UPDATE t2m.log SET version = {VERSION}");
    transaction.batch_execute(&update).await.map_err(failed)?;
    transaction.commit().await.map_err(failed)?;
    match inspect(client, place).await? {
        Some((VERSION, identity)) => Ok(identity),
        _ => Err(Error::Storage("the log's tables are gone as soon as they were made".into())),
    }
}

/// Version and identity of the log; none where there is nothing yet.
pub(super) async fn inspect(client: &Client, place: &str) -> Result<Option<(i32, Uuid)>, Error> {
    let foreign = |what: String| Err(Error::Foreign(format!("T2M_LOG: {place} {what}")));
    let another = || foreign("has a schema t2m that is not a T2M log; it was left as it is".into());
    let found = client
        .query_one(
            "SELECT current_setting('server_encoding'), to_regclass('t2m.log') IS NOT NULL,
                (SELECT count(*) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                 WHERE n.nspname = 't2m')",
            &[],
        )
        .await
        .map_err(failed)?;
    let (encoding, ours, tables): (String, bool, i64) = (found.get(0), found.get(1), found.get(2));
    if encoding != "UTF8" {
        return foreign(format!("has the encoding {encoding}; make a database with UTF8"));
    }
    if !ours {
        return match tables {
            0 => Ok(None),
            _ => another(),
        };
    }
    let rows = match client.query("SELECT version, identity FROM t2m.log", &[]).await {
        Err(error) if error.code() == Some(&SqlState::UNDEFINED_COLUMN) => return another(),
        rows => rows.map_err(failed)?,
    };
    let [row] = rows.as_slice() else { return another() };
    let (Ok(version), Ok(identity)) = (row.try_get(0), row.try_get(1)) else { return another() };
    if version > VERSION {
        return foreign(format!(
            "holds a T2M log of version {version} and this program knows version {VERSION}; \
             use a newer program"
        ));
    }
    Ok(Some((version, identity)))
}
