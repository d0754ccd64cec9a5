//! Uploads that come in pieces: what each is to become, and the bytes it has so far. All of it
//! lies in the spool under the data directory and outlives a crash at any point.
//!
//! `ID.json` is what was asked for, `ID.part` the bytes, `ID.offset` how many of them count: those
//! that are durable and, where a checksum was promised, compared with it.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::Sha256;
use tokio::sync::{Mutex as Turn, Notify, OwnedMutexGuard};
use tokio::task::spawn_blocking;
use uuid::Uuid;

use super::blobs::{self, Blobs, Stored};
use super::reservations::{Reservation, Reservations};
use crate::domain::ids::UserId;
use note::Note;

mod append;
mod note;

pub use append::{Algorithm, Appended, Checksum, Ended};

/// How long a request waits until the one before it has let go of the upload.
const TURN: Duration = Duration::from_secs(5);

/// What an upload is to become.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Wanted {
    /// Also of the file, once it is stored.
    pub id: Uuid,
    pub user_id: UserId,
    /// In bytes.
    pub length: u64,
    /// Safe to store.
    pub filename: String,
    pub declared_type: Option<String>,
    pub metadata: Map<String, Value>,
    /// As the client worded all of that.
    pub described: String,
    pub expires_at: DateTime<Utc>,
    /// Set once all bytes are there and their digest is known.
    pub whole: Option<Stored>,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another request holds it and does not let go.
    #[error("the upload is in use")]
    Busy,
    /// It was ended, or its bytes are lost.
    #[error("no such upload")]
    Gone,
    /// What is left of the disk is for the log.
    #[error("the disk is full")]
    Full,
    #[error("the spool: {0}")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Blobs(#[from] blobs::Error),
}

/// All uploads of this machine that are not finished.
#[derive(Debug)]
pub struct Uploads {
    spool: PathBuf,
    blobs: Blobs,
    open: Mutex<HashMap<Uuid, Arc<Upload>>>,
    /// Those whose files are being made.
    begun: Mutex<HashSet<Uuid>>,
}

/// One of them.
#[derive(Debug)]
pub struct Upload {
    /// Without `whole`, which [`Held`] knows.
    pub wanted: Wanted,
    turn: Arc<Turn<Work>>,
    /// Requests that wait for their turn; the one that has it then makes haste.
    waiting: AtomicUsize,
    hurry: Notify,
    /// What is left of it, if anything, is to be removed.
    gone: AtomicBool,
    /// The digest, once it is noted: for who must not wait for a turn.
    sha256: OnceLock<String>,
    /// Held for its drop.
    _room: Reservation,
}

/// What changes as bytes come in.
#[derive(Debug)]
struct Work {
    /// So many bytes are durable.
    offset: u64,
    /// The note is sure to say just that.
    is_noted: bool,
    /// Of the bytes up to the offset; absent after a restart or a failure.
    hasher: Option<Sha256>,
    whole: Option<Stored>,
}

/// Counts a request as waiting, also when its client goes away.
struct Waiting<'a>(&'a Upload);

impl<'a> Waiting<'a> {
    fn new(upload: &'a Upload) -> Self {
        upload.waiting.fetch_add(1, Ordering::SeqCst);
        upload.hurry.notify_waiters();
        Self(upload)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}

/// An id that nobody else begins an upload of.
#[derive(Debug)]
pub struct Begun {
    uploads: Arc<Uploads>,
    id: Uuid,
}

impl Drop for Begun {
    fn drop(&mut self) {
        self.uploads.beginning().remove(&self.id);
    }
}

/// An upload whose turn it is.
pub struct Held {
    uploads: Arc<Uploads>,
    pub upload: Arc<Upload>,
    work: OwnedMutexGuard<Work>,
}

impl Uploads {
    /// Finds what earlier runs have left, and reserves its room again. Blocking; for the start.
    ///
    /// # Errors
    /// The spool cannot be read or made, or an upload in it; the latter is named. One that makes no
    /// sense is removed.
    pub fn open(blobs: &Blobs, reservations: &Reservations) -> io::Result<Self> {
        let spool = blobs.spool();
        fs::create_dir_all(&spool)?;
        if let Some(above) = spool.parent() {
            File::open(above)?.sync_all()?;
        }
        let (open, begun) = (Mutex::default(), Mutex::default());
        let uploads = Self { spool, blobs: blobs.clone(), open, begun };
        let files = fs::read_dir(&uploads.spool)?.map(|entry| Ok(entry?.path()));
        let files = files.collect::<io::Result<Vec<_>>>()?;
        let id = |path: &Path| Uuid::try_parse(path.file_stem()?.to_str()?).ok();
        let is_head = |path: &&PathBuf| path.extension().is_some_and(|it| it == "json");
        for id in files.iter().filter(is_head).filter_map(|path| id(path)) {
            uploads.load(id, reservations).map_err(|error| {
                let which = uploads.path(id, "*");
                io::Error::new(error.kind(), format!("{}: {error}", which.display()))
            })?;
        }
        for path in files {
            let head = id(&path).map(|id| uploads.path(id, "json"));
            // Without its head a file was never acknowledged, or is what is left of an end.
            if !head.map_or(Ok(false), |head| head.try_exists())? {
                remove(&path)?;
            }
        }
        Ok(uploads)
    }

    /// Has nobody else begin an upload of this id meanwhile.
    ///
    /// # Errors
    /// [`Error::Busy`] if there is one, or somebody is about to begin it.
    pub fn claim(self: &Arc<Self>, id: Uuid) -> Result<Begun, Error> {
        if !self.beginning().insert(id) {
            return Err(Error::Busy);
        }
        let begun = Begun { uploads: Arc::clone(self), id };
        // Only now: whoever had the id before has put the upload there.
        match self.opened().contains_key(&id) {
            true => Err(Error::Busy),
            false => Ok(begun),
        }
    }

    /// Blocking.
    fn begin(&self, wanted: Wanted, room: Reservation) -> io::Result<()> {
        let id = wanted.id;
        let [head, part, draft] = ["json", "part", "draft"].map(|it| self.path(id, it));
        let written = || {
            // The bytes' file first: a head whose bytes are not there has been adopted.
            File::create(&part)?.sync_all()?;
            self.note(id).create()?;
            replace(&head, &draft, &json(&wanted))?;
            File::open(&self.spool)?.sync_all()
        };
        if let Err(error) = written() {
            // As far as that goes: what stays is overwritten, or swept at the next start, which a
            // head without its bytes would prevent.
            let _ = remove(&head).and_then(|()| remove(&part));
            let _ = remove(&self.note(id).0);
            let _ = remove(&draft);
            return Err(error);
        }
        let hasher = Some(Sha256::default());
        let work = Work { offset: 0, is_noted: true, hasher, whole: None };
        self.opened().insert(id, Arc::new(Upload::new(wanted, work, room)));
        Ok(())
    }

    /// An upload that is neither finished nor over.
    pub fn find(&self, id: Uuid, now: DateTime<Utc>) -> Option<Arc<Upload>> {
        let is_open = |upload: &&Arc<Upload>| now < upload.wanted.expires_at && !upload.is_gone();
        self.opened().get(&id).filter(is_open).cloned()
    }

    /// Waits for an upload's turn. Whoever has it is told to make haste: a client that comes again
    /// has lost its former connection, whatever that still looks like from here.
    ///
    /// # Errors
    /// [`Error::Busy`] after some seconds, [`Error::Gone`] if it was ended meanwhile.
    pub async fn hold(self: &Arc<Self>, upload: Arc<Upload>) -> Result<Held, Error> {
        let waiting = Waiting::new(&upload);
        let work = tokio::time::timeout(TURN, Arc::clone(&upload.turn).lock_owned()).await;
        drop(waiting);
        let work = work.map_err(|_| Error::Busy)?;
        if upload.is_gone() {
            return Err(Error::Gone);
        }
        Ok(Held { uploads: Arc::clone(self), upload, work })
    }

    /// How many of a user there are.
    pub fn number_of(&self, user_id: &UserId) -> usize {
        self.opened().values().filter(|upload| upload.wanted.user_id == *user_id).count()
    }

    /// What their bytes have become, or are about to: blobs that no file refers to yet.
    pub fn blobs(&self) -> HashSet<String> {
        self.opened().values().filter_map(|upload| upload.sha256.get().cloned()).collect()
    }

    /// Ends the uploads whose time is over, or whose end was not whole, and says how many. One that
    /// is in use has until its request ends.
    pub async fn sweep(self: &Arc<Self>, now: DateTime<Utc>) -> usize {
        self.end_those(|upload| now >= upload.wanted.expires_at || upload.is_gone()).await.0
    }

    /// Ends what a user has begun, and says whether nothing is left: one that is in use has until
    /// its request ends.
    pub async fn end_of(self: &Arc<Self>, user_id: &UserId) -> bool {
        let (ended, found) = self.end_those(|upload| upload.wanted.user_id == *user_id).await;
        ended == found
    }

    /// How many of those found could be ended.
    async fn end_those(self: &Arc<Self>, which: impl Fn(&Upload) -> bool) -> (usize, usize) {
        let over: Vec<_> = self.opened().values().filter(|upload| which(upload)).cloned().collect();
        let (mut swept, found) = (0, over.len());
        for upload in over {
            let Ok(work) = Arc::clone(&upload.turn).try_lock_owned() else { continue };
            let held = Held { uploads: Arc::clone(self), upload, work };
            match held.end().await {
                Ok(()) => swept += 1,
                Err(error) => tracing::warn!(%error, "an upload that is over was not removed"),
            }
        }
        (swept, found)
    }

    fn load(&self, id: Uuid, reservations: &Reservations) -> io::Result<()> {
        let Ok(wanted) = serde_json::from_slice::<Wanted>(&fs::read(self.path(id, "json"))?) else {
            tracing::warn!(%id, "an unfinished upload makes no sense and is removed");
            return remove(&self.path(id, "json"));
        };
        let offset = match &wanted.whole {
            Some(whole) => whole.size,
            None => self.believed(id)?,
        };
        let whole = wanted.whole.clone();
        let work = Work { offset, is_noted: true, hasher: None, whole };
        let Ok(room) = reservations
            .reserve(&wanted.user_id, wanted.length, |_| Ok::<_, std::convert::Infallible>(()));
        self.opened().insert(id, Arc::new(Upload::new(wanted, work, room)));
        Ok(())
    }

    /// How many bytes count, as the note says now; whatever lies behind them is cut off.
    fn believed(&self, id: Uuid) -> io::Result<u64> {
        let part = File::options().write(true).open(self.path(id, "part"))?;
        let (note, length) = (self.note(id), part.metadata()?.len());
        let Some(noted) = note.read()? else {
            tracing::warn!(%id, "the note of an unfinished upload is lost; it begins anew");
            note.create()?;
            File::open(&self.spool)?.sync_all()?;
            part.set_len(0)?;
            return Ok(0);
        };
        let offset = noted.min(length);
        // Also where there is nothing to cut: what is read may not have come to the disk before a
        // kill.
        note.cut(&part, offset)?;
        Ok(offset)
    }

    fn note(&self, id: Uuid) -> Note {
        Note(self.path(id, "offset"))
    }

    fn path(&self, id: Uuid, extension: &str) -> PathBuf {
        self.spool.join(format!("{id}.{extension}"))
    }

    fn opened(&self) -> MutexGuard<'_, HashMap<Uuid, Arc<Upload>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn beginning(&self) -> MutexGuard<'_, HashSet<Uuid>> {
        self.begun.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Begun {
    /// Begins the upload; durable on return. What fails leaves nothing, so that it may be tried
    /// again under the same id; what is dropped meanwhile is done all the same.
    ///
    /// # Errors
    /// The spool cannot be written.
    pub async fn create(self, wanted: Wanted, room: Reservation) -> Result<(), Error> {
        debug_assert_eq!(self.id, wanted.id);
        Ok(in_background(move || self.uploads.begin(wanted, room)).await?)
    }
}

impl Upload {
    fn new(wanted: Wanted, work: Work, room: Reservation) -> Self {
        let sha256 = OnceLock::new();
        if let Some(whole) = &work.whole {
            let _ = sha256.set(whole.sha256.clone());
        }
        let (turn, waiting) = (Arc::new(Turn::new(work)), AtomicUsize::new(0));
        let (hurry, gone) = (Notify::new(), AtomicBool::new(false));
        Self { wanted, turn, waiting, hurry, gone, sha256, _room: room }
    }

    fn is_gone(&self) -> bool {
        self.gone.load(Ordering::SeqCst)
    }
}

impl Held {
    /// How many bytes are durable.
    pub fn offset(&self) -> u64 {
        self.work.offset
    }

    /// All bytes are there.
    pub fn is_full(&self) -> bool {
        self.work.offset == self.upload.wanted.length
    }

    /// Their digest is noted, and they may have left the spool.
    pub fn is_sealed(&self) -> bool {
        self.work.whole.is_some()
    }

    /// Makes a blob of the bytes, which must all be there. May be repeated, also after a crash.
    ///
    /// # Errors
    /// [`Error::Gone`] when the bytes are lost; then only [`Held::end`] is left.
    pub async fn store(&mut self) -> Result<Stored, Error> {
        let id = self.upload.wanted.id;
        let stored = match &self.work.whole {
            Some(stored) => stored.clone(),
            None => self.seal().await?,
        };
        match self.uploads.blobs.adopt(&format!("{id}.part"), &stored).await {
            Err(blobs::Error::NotFound) => Err(Error::Gone),
            adopted => Ok(adopted.map(|()| stored)?),
        }
    }

    /// Removes all that there is of it, and gives back its room. What is dropped meanwhile is done
    /// all the same: half of it would be an upload that nobody can go on with or end.
    ///
    /// # Errors
    /// The spool cannot be written; [`Uploads::sweep`] tries again what it had begun.
    pub async fn end(self) -> Result<(), Error> {
        let ended = in_background(move || {
            // Its turn too, which is over only then.
            let held = self;
            let (uploads, id) = (&held.uploads, held.upload.wanted.id);
            // The head first: without it the rest is removed at the next start.
            remove(&uploads.path(id, "json"))?;
            held.upload.gone.store(true, Ordering::SeqCst);
            for extension in ["part", "offset", "draft"] {
                remove(&uploads.path(id, extension))?;
            }
            // A power cut must not bring back what was erased.
            File::open(&uploads.spool)?.sync_all()?;
            uploads.opened().remove(&id);
            Ok(())
        });
        Ok(ended.await?)
    }

    /// Notes the digest, so that the bytes may leave the spool.
    async fn seal(&mut self) -> Result<Stored, Error> {
        let id = self.upload.wanted.id;
        let part = self.uploads.path(id, "part");
        let hasher = self.work.hasher.take();
        let (head, draft) = (self.uploads.path(id, "json"), self.uploads.path(id, "draft"));
        let (mut wanted, spool) = (self.upload.wanted.clone(), self.uploads.spool.clone());
        let stored = in_background(move || {
            let stored = append::examined(&part, hasher)?;
            wanted.whole = Some(stored.clone());
            replace(&head, &draft, &json(&wanted))?;
            File::open(spool)?.sync_all()?;
            Ok(stored)
        })
        .await?;
        let _ = self.upload.sha256.set(stored.sha256.clone());
        self.work.whole = Some(stored.clone());
        Ok(stored)
    }
}

fn json(wanted: &Wanted) -> Vec<u8> {
    serde_json::to_vec(wanted).expect("texts, numbers and times are always JSON")
}

/// Never half of it; the caller syncs the directory.
fn replace(path: &Path, draft: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create(draft)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(draft, path)
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

async fn in_background<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    spawn_blocking(work).await.unwrap_or_else(|_| Err(io::Error::other("the work panicked")))
}

#[cfg(test)]
#[path = "uploads_tests.rs"]
mod tests;
