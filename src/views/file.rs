//! The file of the views on disk: how it is opened, recognised, replaced and deleted.
//!
//! A rebuilt file keeps its own name (`views-3.sqlite`) and a small file beside the first one
//! (`views.current`) names it. Renaming over an open SQLite database would leave its WAL behind to
//! be taken for the new one's; a pointer changes in one step and touches no open file.

use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags};

use super::{Error, feed, files, jobs, parked, queue, sessions, tallies, users};

/// "T2MV" in SQLite's field for the kind of a file.
const APPLICATION: i32 = 0x5432_4d56;
/// Raised with each change of a table or of what an event does to it: older files are rebuilt.
pub(super) const SCHEMA_VERSION: i32 = 12;
/// Of a file that is still being built.
const UNFINISHED: i32 = -1;
/// How long a connection waits for another one's lock.
pub(super) const BUSY: Duration = Duration::from_secs(5);
/// The most bytes of a WAL that is of no use any more: twice what is written between checkpoints.
const WAL_KEPT: i64 = if cfg!(test) { 1 << 20 } else { 64 << 20 };
/// What lies beside a database while it is open, under its name and these.
const COMPANIONS: [&str; 2] = ["-wal", "-shm"];
/// More statements than the views have, so that each is prepared once a connection.
const STATEMENTS: usize = 80;

const CHECKPOINT: &str = "
CREATE TABLE checkpoint (position INTEGER NOT NULL, first BLOB NOT NULL, last BLOB NOT NULL);
INSERT INTO checkpoint VALUES (0, zeroblob(32), zeroblob(32));
";

/// Where the rows stood when they were last written anew. Clearing a row does not clear what SQLite
/// left of it where it lay before its page was put in order: of who was deleted later than this the
/// file may hold more than its tables say.
const RENEWED: &str = "
CREATE TABLE renewed (position INTEGER NOT NULL);
INSERT INTO renewed VALUES (0);
";

/// The one connection that writes; creates the file, or anew when its schema is another one.
pub(super) fn writer(path: &Path) -> Result<Connection, Error> {
    match recognise(path)? {
        Found::Ours => {}
        Found::Outdated => {
            remove(path)?;
            create(path, SCHEMA_VERSION)?;
        }
        Found::Nothing => create(path, SCHEMA_VERSION)?,
    }
    let connection = Connection::open(path)?;
    tune(&connection)?;
    connection.execute_batch(
        "PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;
         PRAGMA wal_autocheckpoint = 4000; PRAGMA cache_size = -65536;
         PRAGMA secure_delete = ON;",
    )?;
    // What it grew to while somebody read for long is given back.
    connection.pragma_update(None, "journal_size_limit", WAL_KEPT)?;
    Ok(connection)
}

/// A new file to be filled from the beginning, in one transaction, which the caller commits. It has no
/// journal: only [`finish`] makes it one that is recognised, and until then a crash leaves something
/// that is thrown away.
pub(super) fn builder(path: &Path) -> Result<Connection, Error> {
    create(path, UNFINISHED)?;
    let connection = Connection::open(path)?;
    tune(&connection)?;
    connection.execute_batch(
        "PRAGMA main.locking_mode = EXCLUSIVE; PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;
         PRAGMA cache_size = -65536; PRAGMA mmap_size = 0;
         PRAGMA secure_delete = ON; BEGIN;",
    )?;
    Ok(connection)
}

/// Fills what [`builder`] made with the rows of another file as they are at one moment; that one may be
/// in use, and goes on. Row by row: what its pages hold besides stays behind.
pub(super) fn copy(sql: &Connection, from: &Path) -> Result<(), Error> {
    if !matches!(recognise(from)?, Found::Ours) {
        return Err(Error::Outdated(from.to_owned()));
    }
    sql.execute("ATTACH ?1 AS present", [from.as_os_str().as_bytes()])?;
    let tables: Vec<String> = sql
        .prepare("SELECT name FROM main.sqlite_schema WHERE type = 'table'")?
        .query_map([], |row| row.get(0))?
        .collect::<rusqlite::Result<_>>()?;
    // Some begin with a row. Between equal tables SQLite carries rows over without a look inside.
    for table in tables {
        sql.execute_batch(&format!(
            "DELETE FROM main.{table}; INSERT INTO main.{table} SELECT * FROM present.{table};"
        ))?;
    }
    sql.execute_batch(
        "UPDATE main.renewed SET position = (SELECT position FROM main.checkpoint);
         COMMIT; DETACH present; BEGIN;",
    )?;
    Ok(())
}

/// Closes a file that was built, durable and whole.
pub(super) fn finish(built: Connection, path: &Path, stride: u64) -> Result<(), Error> {
    let file = File::open(path)?;
    // What is there already is on its way to the disk while the indexes are made. The same handle
    // throughout: a failed write is told to each handle once. It outlives the connection, whose locks
    // would go with it.
    let syncing =
        thread::Builder::new().name("views-sync".into()).spawn(move || (file.sync_data(), file))?;
    let indexing =
        [&indexing(path), &INDEXES.concat(), &feed::settle(stride), users::SETTLE].concat();
    let indexed = built.execute_batch(&indexing);
    let closed = built.close();
    let (synced, file) = syncing.join().map_err(|_| io::Error::other("the sync panicked"))?;
    synced?;
    indexed?;
    closed.map_err(|(_, error)| error)?;
    file.sync_all()?;
    // Whoever has interrupted a replay has removed it: it is not made anew.
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.execute_batch(&format!(
        "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;
         PRAGMA user_version = {SCHEMA_VERSION};"
    ))?;
    Ok(())
}

/// Held while views are built beside `base`; none while another one holds it.
pub(super) fn lock(base: &Path) -> io::Result<Option<File>> {
    let path = base.with_extension("rebuild.lock");
    let file = File::options().create(true).truncate(false).write(true).open(path)?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// A connection that cannot write.
pub(super) fn reader(path: &Path) -> Result<Connection, Error> {
    let connection = Connection::open_with_flags(path, read_only())?;
    tune(&connection)?;
    Ok(connection)
}

/// The file that `base` names at present.
///
/// # Errors
/// The name cannot be read.
pub fn current(base: &Path) -> io::Result<PathBuf> {
    match fs::read_to_string(pointer(base)) {
        Ok(name) => Ok(numbered(base, name.trim().parse().unwrap_or(0))),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(base.to_owned()),
        Err(error) => Err(error),
    }
}

/// The file that `base` names if that is another one than `present` and has our version.
pub(super) fn successor(base: &Path, present: &Path) -> Result<Option<PathBuf>, Error> {
    let named = current(base)?;
    let is_another = named != present && matches!(recognise(&named)?, Found::Ours);
    Ok(is_another.then_some(named))
}

/// The name of a file that may replace `present`, where there is none now: the next number, or the
/// first after it under which nobody keeps anything. What an earlier attempt left is removed. Whoever
/// asks holds the [`lock`], so that nobody else takes the same.
pub(super) fn make_way(base: &Path, present: &Path) -> io::Result<PathBuf> {
    let mut next = number(base, present).map_or(1, |number| number + 1);
    loop {
        let path = numbered(base, next);
        if is_free(&path)? {
            remove(&path)?;
            return Ok(path);
        }
        let path = path.display();
        tracing::warn!(%path, "no views file of ours: it stays, and another name is taken");
        next += 1;
    }
}

/// Whether nothing goes with what has this name but what is ours, or empty.
fn is_free(path: &Path) -> io::Result<bool> {
    let about = |path: &Path| match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        about => about.map(Some),
    };
    match about(path)? {
        // Of ours the companions go before it.
        None => {
            let companions = COMPANIONS.iter().map(|suffix| about(&with(path, suffix)));
            Ok(companions.collect::<io::Result<Vec<_>>>()?.iter().all(Option::is_none))
        }
        Some(about) => Ok(about.is_file() && (recognise(path).is_ok() || bears_our_mark(path))),
    }
}

/// Also of what a crash has left half written, and SQLite cannot read: the mark stands there from the
/// first moment on.
fn bears_our_mark(path: &Path) -> bool {
    let mut header = [0; 72];
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut header));
    read.is_ok()
        && header.starts_with(b"SQLite format 3\0")
        && header.ends_with(&APPLICATION.to_be_bytes())
}

/// From now on `base` stands for `file`, even after a crash; unless it stands for a newer one already.
pub(super) fn make_current(base: &Path, file: &Path) -> Result<(), Error> {
    let named = number(base, &current(base)?);
    let number = number(base, file).ok_or(Error::Elsewhere)?;
    if named >= Some(number) {
        return Ok(());
    }
    let (pointer, mut draft) = (pointer(base), base.as_os_str().to_owned());
    draft.push(".current.draft");
    let mut written = File::create(&draft)?;
    written.write_all(number.to_string().as_bytes())?;
    written.sync_all()?;
    fs::rename(&draft, pointer)?;
    File::open(directory(base))?.sync_all()?;
    Ok(())
}

/// Deletes what a crash left: files older than `present`, which it replaced, and newer ones, which
/// nobody is building any more. They may show what was erased since. Another one that `base` names
/// was built beside `present` and is not taken over yet: it stays, and so does what lies between the
/// two, which may be on its way.
///
/// Best effort; a file that stays costs its room until the next start.
pub(super) fn remove_leftovers(base: &Path, present: &Path) {
    let files = || {
        let entries = fs::read_dir(directory(base)).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).filter_map(|path| Some((number(base, &path)?, path)))
    };
    let Some(present) = number(base, present) else { return };
    // Before the name is looked at: whoever builds holds it until `base` names what was built. And
    // only where it is needed, since nobody can begin to build meanwhile.
    let lock = files().any(|(number, _)| number > present).then(|| lock(base));
    let nobody_builds = matches!(&lock, Some(Ok(Some(_))));
    let Ok(Some(named)) = current(base).map(|named| number(base, &named)) else { return };
    let (oldest, newest) = (present.min(named), present.max(named));
    for (number, path) in files() {
        let left = number < oldest || (number > newest && nobody_builds);
        if left && matches!(recognise(&path), Ok(Found::Ours | Found::Outdated)) {
            let _ = remove(&path);
        }
    }
}

/// Deletes the views that `base` names, which nobody has open; the next ones begin with nothing.
///
/// # Errors
/// They are something else, or stay.
pub fn discard(base: &Path) -> Result<(), Error> {
    let real = current(base)?;
    for path in [&real, base] {
        if matches!(recognise(path)?, Found::Ours | Found::Outdated) {
            remove(path)?;
        }
    }
    match fs::remove_file(pointer(base)) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

/// Deletes a database with its companions; itself at the end, since whoever sweeps finds the others by
/// it if this is broken off.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    for suffix in COMPANIONS.into_iter().chain([""]) {
        match fs::remove_file(with(path, suffix)) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
    }
    Ok(())
}

fn with(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

pub(super) enum Found {
    Nothing,
    Ours,
    Outdated,
}

pub(super) fn recognise(path: &Path) -> Result<Found, Error> {
    match fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Found::Nothing),
        Err(error) => return Err(error.into()),
        Ok(about) if !about.is_file() => return Err(Error::Foreign(path.to_owned())),
        Ok(about) if about.len() == 0 => return Ok(Found::Nothing),
        Ok(_) => {}
    }
    let marks = Connection::open_with_flags(path, read_only()).and_then(|connection| {
        let mark = |query| connection.query_row(query, [], |row| row.get::<_, i32>(0));
        Ok((
            mark("PRAGMA application_id")?,
            mark("PRAGMA user_version")?,
            mark("SELECT count(*) FROM sqlite_schema")?,
        ))
    });
    match marks {
        Ok((APPLICATION, SCHEMA_VERSION, _)) => Ok(Found::Ours),
        Ok((APPLICATION, _, _)) => Ok(Found::Outdated),
        // Creation was cut short before its transaction.
        Ok((0, 0, 0)) => Ok(Found::Nothing),
        Ok(_) => Err(Error::Foreign(path.to_owned())),
        Err(error) if error.sqlite_error_code() == Some(ErrorCode::NotADatabase) => {
            Err(Error::Foreign(path.to_owned()))
        }
        Err(error) => Err(error.into()),
    }
}

fn create(path: &Path, version: i32) -> Result<(), Error> {
    let connection = Connection::open(path)?;
    connection.execute_batch("PRAGMA page_size = 8192; PRAGMA journal_mode = WAL;")?;
    let mut tables = TABLES.concat();
    if version != UNFINISHED {
        tables.extend(INDEXES);
    }
    connection.execute_batch(&format!(
        "BEGIN; {tables} PRAGMA application_id = {APPLICATION};
         PRAGMA user_version = {version}; COMMIT;"
    ))?;
    Ok(())
}

const TABLES: [&str; 10] = [
    CHECKPOINT,
    RENEWED,
    parked::SCHEMA,
    users::SCHEMA,
    sessions::SCHEMA,
    files::SCHEMA,
    jobs::SCHEMA,
    queue::SCHEMA,
    feed::SCHEMA,
    tallies::SCHEMA,
];

/// Reads the tables where they lie; and of what is sorted for an index, which is more the longer the
/// log, no more than the cache's size is in memory: the rest waits in files without a name, beside
/// the views, where there is room and nobody else may look.
fn indexing(path: &Path) -> String {
    let beside = directory(path)
        .to_str()
        .map(|place| format!("PRAGMA temp_store_directory = '{}';", place.replace('\'', "''")));
    format!(
        "{} PRAGMA mmap_size = 1073741824; PRAGMA temp_store = FILE; PRAGMA cache_size = -16384;
         PRAGMA threads = 2;",
        beside.unwrap_or_default()
    )
}

/// Made at once over a table that is full they cost a third of what they cost row by row. Indexes of
/// few rows are made with their tables: finding those rows at the end would take a walk through the
/// whole table.
const INDEXES: [&str; 5] =
    [users::INDEXES, sessions::INDEXES, files::INDEXES, jobs::INDEXES, feed::INDEXES];

fn tune(connection: &Connection) -> rusqlite::Result<()> {
    // Else a statement is planned anew whenever a bound that it compares with changes.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
    connection.set_prepared_statement_cache_capacity(STATEMENTS);
    connection.busy_timeout(BUSY)?;
    connection.execute_batch("PRAGMA mmap_size = 1073741824; PRAGMA temp_store = MEMORY;")
}

fn read_only() -> OpenFlags {
    OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX
}

fn pointer(base: &Path) -> PathBuf {
    base.with_extension("current")
}

pub(super) fn directory(base: &Path) -> &Path {
    base.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// `views.sqlite` is number 0 of itself, `views-3.sqlite` its number 3.
fn numbered(base: &Path, number: u64) -> PathBuf {
    if number == 0 {
        return base.to_owned();
    }
    let mut name = OsString::from(base.file_stem().unwrap_or_default());
    name.push(format!("-{number}"));
    if let Some(extension) = base.extension() {
        name.push(".");
        name.push(extension);
    }
    base.with_file_name(name)
}

fn number(base: &Path, path: &Path) -> Option<u64> {
    if path.file_name() == base.file_name() {
        return Some(0);
    }
    let stem = path.file_stem()?.to_str()?.strip_prefix(base.file_stem()?.to_str()?)?;
    let number = stem.strip_prefix('-')?.parse().ok()?;
    (numbered(base, number).file_name() == path.file_name()).then_some(number)
}
