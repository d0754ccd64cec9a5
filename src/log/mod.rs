//! The event log: streams, revisions, positions and a hash chain. It knows nothing of what the
//! events mean; the trait's comment is the contract, and `conformance` is the contract as code.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use bytestring::ByteString;
use chrono::{DateTime, Utc};
use sha2::{Digest, Sha256};
use tokio::sync::watch;
use uuid::Uuid;

pub use embedded::{EmbeddedLog, Import};
#[cfg(feature = "eventstore")]
pub use kurrent::KurrentLog;
pub use patience::Deadlines;
pub use postgres::PostgresLog;

mod condition;
pub mod conformance;
pub mod dump;
mod embedded;
#[cfg(feature = "eventstore")]
mod kurrent;
mod patience;
mod postgres;
mod tail;
pub mod transfer;

/// What an embedded log is called in its data directory.
pub const EMBEDDED_FILE: &str = "log.sqlite";
/// The most events one append may carry.
pub const MAX_EVENTS: usize = 1000;
/// The most bytes an event's data may have, and likewise its metadata.
pub const MAX_BYTES: usize = 1024 * 1024;
/// The most bytes the name of a stream or of a type may have.
pub const MAX_NAME: usize = 255;
/// How far back from a stream's end a repeat of an append with [`Expected::Any`] is recognised.
pub const REPEAT_WINDOW: u64 = 256;
/// What the first event of a log is chained to.
pub const GENESIS: [u8; 32] = *b"t2m event log, hash chain no. 01";

/// An append-only log of events in streams.
///
/// # Order
/// - A stream's events have the revisions 0, 1, 2 … without a gap.
/// - All events have positions, from 1, that grow strictly in the order in which they became
///   readable; there may be gaps. Within a stream, positions grow with revisions. A reader that
///   pages on from the last position it saw never misses an event, whoever appends meanwhile.
/// - The events of one append are all there or none of them, next to each other in their stream.
///
/// # Appending
/// - `append` returns when its events are durable (synced to storage): they survive a power cut.
/// - [`Expected`] says where the stream's end must be. Otherwise [`Error::Conflict`] names where it
///   is, and nothing was written. Of writers racing for one revision exactly one succeeds.
/// - Appending the same event ids once more at the same place is a success that answers what the
///   first append answered, however long ago it was. With [`Expected::Any`], which names no place,
///   the repeat is recognised within the last [`REPEAT_WINDOW`] events of the stream; a batch that
///   starts with an event found there but does not equal what follows it is a conflict. Only ids
///   are compared: content belongs to its id.
/// - A caller that drops the future, or is answered [`Error::Unwritable`], does not know whether the
///   events were written; repeating the append with the same ids settles it.
/// - A full queue makes `append` wait; it is never an error.
/// - Limits, else [`Error::Invalid`] and nothing written: 1 to [`MAX_EVENTS`] events with distinct
///   ids; data and metadata of [`MAX_BYTES`] each; names of streams and types of 1 to [`MAX_NAME`]
///   bytes without control characters. Data and metadata are opaque here; times are kept to the
///   microsecond.
///
/// # Reading
/// - What was acknowledged is in every later read. A read never shows what is not durable.
/// - `read_stream` and `read_all` answer in order, and fewer than `limit` only at the end. A stream
///   nobody wrote to is empty, not an error.
/// - `head` holds the last durable position, 0 when the log is empty. It never falls and is never
///   behind an acknowledged append; a read may for an instant be ahead of it.
///
/// # When storage fails
/// After a failed write, commit or sync nothing is tried again, since what the system holds in its
/// cache cannot be trusted then. The writer stops, the appends under way and all later ones answer
/// [`Error::Unwritable`], `writable` says why, and reads go on. Opening the log anew is the way on.
///
/// One failure is no such: when an engine knows that a write failed only for want of room, before
/// anything of it was synced, it takes back the whole transaction. Appends answer
/// [`Error::Unwritable`] for as long as there is no room, and succeed again, on the same handle, when
/// there is; `writable` tells both. What was answered so is repeated, as ever, with the same ids.
///
/// An engine over the network tells a connection that broke from that. It finds out itself, on
/// another connection, what became of the appends under way, and answers them as if nothing had
/// been; they are written once. While its server cannot be reached for longer than a moment,
/// appends and `writable` answer [`Error::Unwritable`] and reads [`Error::Storage`], within its
/// deadlines; when the server is back, all of this ends by itself. So it is with the writing alone
/// when a server can be reached and takes no append, as one without room: the engine tries by
/// itself whether it does. Only a server that comes back with another log, or with less of it than was
/// seen here, stops the handle for good, reads too.
///
/// Several handles, on several machines, may write to one log of such an engine. What another one
/// appended is in `read_stream` at once; in `head`, and with it in `read_all`, within a second.
///
/// # Integrity
/// Every event carries a SHA-256 over itself and its predecessor ([`Link::hash`]): the one before it
/// in the log, or, where a server gives the positions afterwards, in its stream. `verify` walks
/// this chain and names the first position that is altered, out of order or missing. A chain
/// proves that the log is consistent, not that it is honest: whoever can rewrite all of it, or cut
/// its end, is found out only by comparing the head hash with one kept elsewhere.
///
/// The methods work on any tokio runtime, a current-thread one too, and do not block it.
#[async_trait::async_trait]
pub trait EventLog: Send + Sync + 'static {
    /// Append `events` to `stream`, durably, if its end is where `expected` says.
    async fn append(
        &self,
        stream: &str,
        expected: Expected,
        events: Vec<NewEvent>,
    ) -> Result<Appended, Error>;

    /// Append to streams one after the other, in this order. Once one is not written, no later one
    /// is, whatever happens meanwhile: what is there are the first of them. Many at once cost an
    /// engine over the network little more than one.
    ///
    /// # Errors
    /// Which of them was the first that failed, and why.
    async fn append_in_turn(&self, appends: Vec<ToAppend>) -> Result<(), (usize, Error)> {
        for (at, ToAppend { stream, expected, events }) in appends.into_iter().enumerate() {
            self.append(&stream, expected, events).await.map_err(|error| (at, error))?;
        }
        Ok(())
    }

    /// Up to `limit` events of `stream` from `from_revision` (inclusive) on.
    async fn read_stream(
        &self,
        stream: &str,
        from_revision: u64,
        limit: usize,
    ) -> Result<Vec<Recorded>, Error>;

    /// Up to `limit` events with positions after `after` (exclusive; 0 is the start).
    async fn read_all(&self, after: u64, limit: usize) -> Result<Vec<Recorded>, Error>;

    /// The last durable position and a wake-up whenever it moves.
    fn head(&self) -> watch::Receiver<u64>;

    /// Where the log ends, asked of the engine itself; `head` is there by then. While an engine over
    /// the network cannot be reached `head` stands still, and nobody who trusts it would know.
    async fn end(&self) -> Result<u64, Error> {
        Ok(*self.head().borrow())
    }

    /// Whether appends are possible; else [`Error::Unwritable`] with the reason.
    fn writable(&self) -> Result<(), Error>;

    /// Whether nobody but this handle can append: then what it has acknowledged is all there is,
    /// and who appends through it alone need not look for what others wrote.
    fn is_exclusive(&self) -> bool {
        false
    }

    /// About how far apart the positions of neighbouring events are; 1 promises that there are no
    /// gaps.
    fn stride(&self) -> u64 {
        1
    }

    /// Counts and sizes. The first call may walk the whole log.
    async fn stats(&self) -> Result<Stats, Error>;

    /// Walk the hash chain. [`Error::Corrupt`] names the first bad position.
    async fn verify(&self) -> Result<Verified, Error>;

    /// The same for what follows position `after`, whose own hash is believed; an engine that
    /// cannot begin there walks all of it. `progress` is told the position every now and then.
    async fn verify_after(&self, after: u64, mut progress: Progress) -> Result<Verified, Error> {
        let verified = self.verify().await?;
        progress(after.max(*self.head().borrow()));
        Ok(verified)
    }
}

/// Hears of positions.
pub type Progress = Box<dyn FnMut(u64) + Send>;

/// Open the log that `setting` (`T2M_LOG`) names; an embedded one lies in `data_dir`, which is
/// made if it is not there.
pub async fn open(setting: &str, data_dir: &Path) -> Result<Arc<dyn EventLog>, Error> {
    match setting {
        "embedded" => {
            let path = data_dir.join(EMBEDDED_FILE);
            let opened = tokio::task::spawn_blocking(move || EmbeddedLog::open(&path)).await;
            Ok(Arc::new(opened.map_err(|e| Error::Storage(e.to_string()))??))
        }
        other if is_postgres(other) => Ok(Arc::new(PostgresLog::open(other).await?)),
        #[cfg(feature = "eventstore")]
        other if is_kurrent(other) => Ok(Arc::new(KurrentLog::open(other).await?)),
        other => Err(unknown(other)),
    }
}

/// Open the log that `setting` names for reading alone, while a server may be writing to it.
///
/// # Errors
/// As [`open`]; [`Error::Storage`] when there is no log.
pub async fn open_for_reading(setting: &str, data_dir: &Path) -> Result<Arc<dyn EventLog>, Error> {
    match setting {
        "embedded" => {
            let path = data_dir.join(EMBEDDED_FILE);
            let opened = tokio::task::spawn_blocking(move || EmbeddedLog::open_read_only(&path));
            Ok(Arc::new(opened.await.map_err(|e| Error::Storage(e.to_string()))??))
        }
        other if is_postgres(other) => Ok(Arc::new(PostgresLog::open_read_only(other).await?)),
        #[cfg(feature = "eventstore")]
        other if is_kurrent(other) => Ok(Arc::new(KurrentLog::open_read_only(other).await?)),
        other => Err(unknown(other)),
    }
}

/// Whether `setting` names an engine and an address that can be understood; nothing is opened.
///
/// # Errors
/// [`Error::Invalid`] says what is wrong with it, and never repeats a password.
pub fn check(setting: &str) -> Result<(), Error> {
    match setting {
        "embedded" => Ok(()),
        other if is_postgres(other) => PostgresLog::check(other),
        #[cfg(feature = "eventstore")]
        other if is_kurrent(other) => KurrentLog::check(other),
        other => Err(unknown(other)),
    }
}

/// The file in which an engine of this machine keeps the log; none for one over the network.
pub fn file(setting: &str, data_dir: &Path) -> Option<PathBuf> {
    (setting == "embedded").then(|| data_dir.join(EMBEDDED_FILE))
}

/// Which log `setting` names, for people: the path of its file, or the engine's address without
/// whatever is secret in it.
pub fn shown(setting: &str, data_dir: &Path) -> String {
    if let Some(path) = file(setting, data_dir) {
        return path.display().to_string();
    }
    let (scheme, address) = setting.split_once("://").unwrap_or((setting, ""));
    // A password may hold any sign that was not escaped: all before the last @ goes.
    let address = address.rsplit_once('@').map_or(address, |(_, address)| address);
    let address = address.split(['?', '#']).next().unwrap_or_default();
    format!("{scheme}://{address}")
}

fn is_postgres(setting: &str) -> bool {
    setting.starts_with("postgres://") || setting.starts_with("postgresql://")
}

fn is_kurrent(setting: &str) -> bool {
    let scheme = setting.split_once("://").map(|(scheme, _)| scheme);
    matches!(scheme, Some("esdb" | "esdb+discover" | "kurrentdb" | "kurrentdb+discover"))
}

/// The setting may hold a password, so only its scheme is repeated, if it has one.
fn unknown(setting: &str) -> Error {
    let scheme = setting.split_once("://").map_or("that", |(scheme, _)| scheme);
    if is_kurrent(setting) {
        return Error::Invalid(format!(
            "T2M_LOG: this program was built without the engine for {scheme}://; build it with \
             the cargo feature `eventstore`"
        ));
    }
    Error::Invalid(format!(
        "T2M_LOG: no log engine is called `{scheme}`; use embedded, postgres://… or esdb://…"
    ))
}

/// An event to be appended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewEvent {
    pub id: Uuid,
    /// The event's type with its version, `job.requested.v1`; written `type` where it is serialised.
    pub kind: String,
    pub time: DateTime<Utc>,
    /// JSON; opaque to the log.
    pub data: Vec<u8>,
    /// JSON; opaque to the log.
    pub metadata: Vec<u8>,
}

/// An event as the log holds it.
///
/// What varies in length may be a slice of the page that the event was read in: whoever keeps it for
/// long keeps the whole page, and had better copy it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recorded {
    pub id: Uuid,
    pub stream: ByteString,
    /// In the stream, from 0, without gaps.
    pub revision: u64,
    /// In the log, from 1, growing strictly.
    pub position: u64,
    /// The event's type with its version; written `type` where it is serialised.
    pub kind: ByteString,
    /// To the microsecond.
    pub time: DateTime<Utc>,
    pub data: Bytes,
    pub metadata: Bytes,
    /// The chain's hash over this event and its predecessor.
    pub hash: [u8; 32],
}

/// Where the end of a stream must be for an append to succeed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    Any,
    NoStream,
    /// The revision of the stream's last event.
    Revision(u64),
}

/// One append of several, as [`EventLog::append`] takes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToAppend {
    pub stream: ByteString,
    pub expected: Expected,
    pub events: Vec<NewEvent>,
}

/// Where an append's last event stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Appended {
    pub revision: u64,
    pub position: u64,
}

/// What is in a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stats {
    pub events: u64,
    pub streams: u64,
    /// The last event's position, 0 when there is none.
    pub position: u64,
    /// The last event's hash, [`GENESIS`] when there is none.
    pub head_hash: [u8; 32],
    /// Bytes on disk.
    pub bytes: u64,
    /// Events by type.
    pub types: BTreeMap<String, u64>,
    /// The first event's time.
    pub first: Option<DateTime<Utc>>,
    /// The last event's time.
    pub last: Option<DateTime<Utc>>,
}

/// A chain found whole. Keep the head hash elsewhere to be able to prove later that it is this log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verified {
    pub events: u64,
    pub head_hash: [u8; 32],
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("stream {stream} ends at {actual:?}, expected {expected:?}")]
    Conflict { stream: String, expected: Expected, actual: Option<u64> },
    /// No appends on this handle: until there is room on the disk or the engine's server is back, or
    /// for good. For an append under way the outcome is unknown.
    #[error("the log cannot be written: {0}")]
    Unwritable(String),
    /// The first bad position; 0 when it is the file's structure and not one event.
    #[error("the log is damaged at position {position}: {what}")]
    Corrupt { position: u64, what: String },
    /// Not our file, or of a newer version than this program knows.
    #[error("{0}")]
    Foreign(String),
    /// What was asked is outside the contract's limits.
    #[error("{0}")]
    Invalid(String),
    #[error("log storage: {0}")]
    Storage(String),
}

/// The next events of all, as [`EventLog::read_all`] has them; of a page with a damaged one those that
/// lie before it, where positions leave no gaps.
///
/// # Errors
/// As there; that of the damage only where nothing lies before it.
pub async fn read_up_to_damage(
    log: &dyn EventLog,
    after: u64,
    limit: usize,
) -> Result<Vec<Recorded>, Error> {
    match log.read_all(after, limit).await {
        Err(Error::Corrupt { position, .. }) if log.stride() == 1 && position > after + 1 => {
            let before = usize::try_from(position - after - 1).unwrap_or(limit);
            log.read_all(after, before.min(limit)).await
        }
        page => page,
    }
}

/// SQL's integers have a sign; no log reaches where that matters.
fn to_sql(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn from_sql(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

fn bad(position: u64, what: &str) -> Error {
    Error::Corrupt { position, what: what.to_owned() }
}

/// Whether `event` follows the one at `before` with this hash, in an engine that leaves no gaps.
fn check_next(event: &Recorded, before: u64, hash: &[u8; 32]) -> Result<(), Error> {
    if event.position != before + 1 {
        return Err(bad(before + 1, "the event is missing"));
    }
    if event.hash != Link::of(event).hash(hash) {
        return Err(bad(event.position, "the event and its hash do not belong together"));
    }
    Ok(())
}

/// What these mutexes hold is whole between any two statements, so a panic elsewhere spoils nothing.
fn guard<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What an event's hash covers: everything of it but the hash, at its place.
#[derive(Debug, Clone, Copy)]
pub struct Link<'a> {
    pub position: u64,
    pub stream: &'a str,
    pub revision: u64,
    pub kind: &'a str,
    pub id: Uuid,
    pub time: DateTime<Utc>,
    pub data: &'a [u8],
    pub metadata: &'a [u8],
}

impl<'a> Link<'a> {
    pub fn of(event: &'a Recorded) -> Self {
        Self {
            position: event.position,
            stream: &event.stream,
            revision: event.revision,
            kind: &event.kind,
            id: event.id,
            time: event.time,
            data: &event.data,
            metadata: &event.metadata,
        }
    }

    /// SHA-256 over `previous`, position, stream, revision, type, id, time (µs since 1970), data
    /// and metadata. Numbers are 64 bits, little endian; whatever varies in length has its length
    /// before it, so that no two events share an encoding. This is stored: it may never change.
    pub fn hash(&self, previous: &[u8; 32]) -> [u8; 32] {
        let mut sha = Sha256::new();
        sha.update(previous);
        sha.update(self.position.to_le_bytes());
        with_length(&mut sha, self.stream.as_bytes());
        sha.update(self.revision.to_le_bytes());
        with_length(&mut sha, self.kind.as_bytes());
        sha.update(self.id.as_bytes());
        sha.update(self.time.timestamp_micros().to_le_bytes());
        with_length(&mut sha, self.data);
        with_length(&mut sha, self.metadata);
        sha.finalize().into()
    }

    /// Adds what [`Link::hash`] is taken over, for whoever hashes many events in one go; and says
    /// where what varies in length came to lie.
    pub(crate) fn encode(&self, previous: &[u8; 32], to: &mut Vec<u8>) -> Encoded {
        let with_length = |to: &mut Vec<u8>, bytes: &[u8]| {
            to.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
            to.extend_from_slice(bytes);
            to.len() - bytes.len()..to.len()
        };
        to.extend_from_slice(previous);
        to.extend_from_slice(&self.position.to_le_bytes());
        let stream = with_length(to, self.stream.as_bytes());
        to.extend_from_slice(&self.revision.to_le_bytes());
        let kind = with_length(to, self.kind.as_bytes());
        to.extend_from_slice(self.id.as_bytes());
        to.extend_from_slice(&self.time.timestamp_micros().to_le_bytes());
        let data = with_length(to, self.data);
        let metadata = with_length(to, self.metadata);
        Encoded { stream, kind, data, metadata }
    }
}

/// Where [`Link::encode`] has put something.
pub(crate) struct Encoded {
    pub(crate) stream: Range<usize>,
    pub(crate) kind: Range<usize>,
    pub(crate) data: Range<usize>,
    pub(crate) metadata: Range<usize>,
}

fn with_length(sha: &mut Sha256, bytes: &[u8]) {
    sha.update((bytes.len() as u64).to_le_bytes());
    sha.update(bytes);
}

/// The contract's limits, the same for every engine.
pub fn check_limits(stream: &str, events: &[NewEvent]) -> Result<(), Error> {
    check_name("a stream's name", stream)?;
    if events.is_empty() || events.len() > MAX_EVENTS {
        let count = events.len();
        return Err(Error::Invalid(format!("an append has 1 to {MAX_EVENTS} events, not {count}")));
    }
    for event in events {
        check_name("an event's type", &event.kind)?;
        if event.data.len() > MAX_BYTES || event.metadata.len() > MAX_BYTES {
            return Err(Error::Invalid(format!(
                "event {} has more than {MAX_BYTES} bytes of data or metadata",
                event.id
            )));
        }
    }
    let distinct: HashSet<Uuid> = events.iter().map(|event| event.id).collect();
    if distinct.len() < events.len() {
        return Err(Error::Invalid("two events of one append have the same id".into()));
    }
    Ok(())
}

/// The same for one event that another log holds.
pub(crate) fn check_recorded(event: &Recorded) -> Result<(), Error> {
    check_name("a stream's name", &event.stream)?;
    check_name("an event's type", &event.kind)?;
    if event.data.len() > MAX_BYTES || event.metadata.len() > MAX_BYTES {
        return Err(Error::Invalid(format!(
            "event {} has more than {MAX_BYTES} bytes of data or metadata",
            event.id
        )));
    }
    Ok(())
}

fn check_name(what: &str, name: &str) -> Result<(), Error> {
    if name.is_empty() || name.len() > MAX_NAME || name.chars().any(char::is_control) {
        return Err(Error::Invalid(format!(
            "{what} has 1 to {MAX_NAME} bytes and no control characters"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
