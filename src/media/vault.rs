//! Secrets that must be destroyed one day: each is sealed by AES-256-GCM under its own name, and
//! only what is sealed is stored. Without the key of the vault it says nothing.
//!
//! A vault is a folder of the object store, so that there can be one for what jobs need and one for
//! the keys of users, side by side and under one master key.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::blobs::{self, Blobs};
use super::documents::{Documents, Listed};

/// In bytes.
pub const KEY_BYTES: usize = 32;
/// Stands first in everything sealed, so that another cipher can follow one day.
const VERSION: u8 = 1;
/// What the extension of a key's file begins with while it is written; 16 hex digits follow.
const DRAFT: &str = "new-";

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("what is sealed cannot be opened: another key, another name, or damage")]
    Unopenable,
    #[error("a key is 32 bytes, base64")]
    BadKey,
    #[error("the system gives no randomness, or the cipher refuses")]
    Cipher,
    #[error("using the master key {path}: {error}")]
    MasterKey { path: PathBuf, error: io::Error },
    #[error(transparent)]
    Store(#[from] blobs::Error),
}

/// Seals and opens bytes under a name.
#[derive(Clone)]
pub struct SealingKey(Arc<LessSafeKey>);

impl SealingKey {
    pub fn new(key: &[u8; KEY_BYTES]) -> Result<Self, Error> {
        let key = UnboundKey::new(&AES_256_GCM, key).map_err(|_| Error::Cipher)?;
        Ok(Self(Arc::new(LessSafeKey::new(key))))
    }

    /// From the base64 of its bytes.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let bytes = STANDARD.decode(text.trim()).map_err(|_| Error::BadKey)?;
        Self::new(&bytes.try_into().map_err(|_| Error::BadKey)?)
    }

    /// Version, nonce, ciphertext and tag. The nonce is random: NIST SP 800-38D allows 2^32
    /// sealings a key.
    pub fn seal(&self, name: &str, bytes: &[u8]) -> Result<Vec<u8>, Error> {
        let mut nonce = [0; NONCE_LEN];
        aws_lc_rs::rand::fill(&mut nonce).map_err(|_| Error::Cipher)?;
        let mut sealed = bytes.to_vec();
        let unique = Nonce::assume_unique_for_key(nonce);
        let sealing = self.0.seal_in_place_append_tag(unique, Aad::from(name), &mut sealed);
        sealing.map_err(|_| Error::Cipher)?;
        Ok([&[VERSION], &nonce[..], &sealed].concat())
    }

    /// What was sealed under exactly this name.
    pub fn open(&self, name: &str, sealed: &[u8]) -> Result<Vec<u8>, Error> {
        let (&version, rest) = sealed.split_first().ok_or(Error::Unopenable)?;
        let (nonce, sealed) = rest.split_at_checked(NONCE_LEN).ok_or(Error::Unopenable)?;
        if version != VERSION {
            return Err(Error::Unopenable);
        }
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| Error::Unopenable)?;
        let mut bytes = sealed.to_vec();
        let length = {
            let opened = self.0.open_in_place(nonce, Aad::from(name), &mut bytes);
            opened.map_err(|_| Error::Unopenable)?.len()
        };
        bytes.truncate(length);
        Ok(bytes)
    }
}

/// Where the keys that seal everything else come from: the first seals, all of them open, so that
/// one can take another's place while the server runs.
#[derive(Clone)]
pub struct MasterKey(Arc<Source>);

enum Source {
    /// A file, made at the first need. It is read again when it may have changed: another process
    /// puts a new key first.
    Kept {
        path: PathBuf,
        last: Mutex<Option<Keys>>,
        /// Its name was made durable by this process.
        is_settled: AtomicBool,
    },
    /// Somebody else keeps them.
    Given(Keys),
}

type Keys = Arc<[SealingKey]>;

impl MasterKey {
    /// Keys that lie in a file, made at its first need and readable by this user alone.
    pub fn kept_in(path: &Path) -> Self {
        let (path, last, is_settled) = (path.to_owned(), Mutex::default(), AtomicBool::new(false));
        Self(Arc::new(Source::Kept { path, last, is_settled }))
    }

    /// A key that somebody else keeps.
    pub fn given(key: SealingKey) -> Self {
        Self(Arc::new(Source::Given(Arc::new([key]))))
    }

    /// Keys that somebody else keeps, comma separated, each the base64 of its bytes.
    ///
    /// # Errors
    /// One of them is none.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let keys = text.split(',').map(SealingKey::parse).collect::<Result<_, _>>()?;
        Ok(Self(Arc::new(Source::Given(keys))))
    }

    /// The file of the keys, unless somebody else keeps them.
    pub fn path(&self) -> Option<&Path> {
        match &*self.0 {
            Source::Kept { path, .. } => Some(path),
            Source::Given(_) => None,
        }
    }

    /// Puts a fresh key before the kept one. With several there already, an exchange was broken
    /// off: it goes on with those. Only one process at a time may call it, since what others left
    /// unfinished goes.
    ///
    /// # Errors
    /// The file cannot be read or written.
    pub fn put_fresh_first(&self) -> Result<(), Error> {
        let Some(path) = self.path() else { return Ok(()) };
        let failed = |error| Error::MasterKey { path: path.to_owned(), error };
        let old = read_or_make(path).map_err(failed)?;
        sweep_drafts(path).map_err(failed)?;
        if old.len() == KEY_BYTES {
            let fresh = fresh_key().map_err(failed)?;
            replace(path, &[&fresh[..], &old].concat()).map_err(failed)?;
        }
        self.fresh(read_if_there).map(drop)
    }

    /// Forgets all kept keys but the first: what they sealed is lost.
    ///
    /// # Errors
    /// The file cannot be read or written.
    pub fn keep_first_alone(&self) -> Result<(), Error> {
        let Some(path) = self.path() else { return Ok(()) };
        let failed = |error| Error::MasterKey { path: path.to_owned(), error };
        let keys = read_or_make(path).map_err(failed)?;
        if keys.len() > KEY_BYTES {
            replace(path, &keys[..KEY_BYTES]).map_err(failed)?;
        }
        self.fresh(read_if_there).map(drop)
    }

    /// Whether one of them opens what lies under this name in a vault's folder.
    pub fn has_sealed(&self, folder: &str, name: &str, sealed: &[u8]) -> bool {
        self.open(&full(folder, name), sealed).is_ok()
    }

    /// As they are now.
    fn fresh(&self, read: fn(&Path) -> io::Result<Vec<u8>>) -> Result<Keys, Error> {
        let (path, last) = match &*self.0 {
            Source::Given(keys) => return Ok(Arc::clone(keys)),
            Source::Kept { path, last, .. } => (path, last),
        };
        let failed = |error| Error::MasterKey { path: path.clone(), error };
        let bytes = read(path).map_err(failed)?;
        let (chunks, _) = bytes.as_chunks::<KEY_BYTES>();
        let keys: Keys = chunks.iter().map(SealingKey::new).collect::<Result<_, _>>()?;
        *last.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&keys));
        Ok(keys)
    }

    /// As they were when they were last looked at.
    fn last(&self) -> Keys {
        match &*self.0 {
            Source::Given(keys) => Arc::clone(keys),
            Source::Kept { last, .. } => {
                let last = last.lock().unwrap_or_else(PoisonError::into_inner);
                last.clone().unwrap_or_else(|| Arc::new([]))
            }
        }
    }

    fn seal(&self, name: &str, bytes: &[u8]) -> Result<Vec<u8>, Error> {
        let keys = self.fresh(read_or_make)?;
        self.settle()?;
        keys.first().ok_or(Error::BadKey)?.seal(name, bytes)
    }

    /// Whoever made the file may have failed, or been killed, before its name was durable.
    fn settle(&self) -> Result<(), Error> {
        if let Source::Kept { path, is_settled, .. } = &*self.0
            && !is_settled.load(Ordering::SeqCst)
        {
            sync_parent(path).map_err(|error| Error::MasterKey { path: path.clone(), error })?;
            is_settled.store(true, Ordering::SeqCst);
        }
        Ok(())
    }

    /// What was sealed, and by the how manieth key. No key is made for it, which could not be the
    /// one.
    fn open(&self, name: &str, sealed: &[u8]) -> Result<(Vec<u8>, usize), Error> {
        let by = |keys: &Keys| {
            let mut tried = keys.iter().enumerate();
            tried.find_map(|(number, key)| Some((key.open(name, sealed).ok()?, number)))
        };
        match by(&self.last()) {
            Some(opened) => Ok(opened),
            None => by(&self.fresh(read_if_there)?).ok_or(Error::Unopenable),
        }
    }
}

/// One key or several, the first first.
fn read_or_make(path: &Path) -> io::Result<Vec<u8>> {
    let keys = read_if_there(path)?;
    if keys.is_empty() { make(path) } else { Ok(keys) }
}

/// The same, or none if there is no file.
fn read_if_there(path: &Path) -> io::Result<Vec<u8>> {
    match std::fs::read(path) {
        Ok(bytes) if bytes.is_empty() || !bytes.len().is_multiple_of(KEY_BYTES) => {
            Err(io::Error::other("it is not 32 bytes long, nor a multiple of that"))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(vec![]),
        read => read,
    }
}

fn fresh_key() -> io::Result<[u8; KEY_BYTES]> {
    let mut key = [0; KEY_BYTES];
    aws_lc_rs::rand::fill(&mut key).map_err(|_| io::Error::other("no randomness"))?;
    Ok(key)
}

/// Durable before it is used: what is sealed with a lost key is lost.
fn make(path: &Path) -> io::Result<Vec<u8>> {
    let key = fresh_key()?.to_vec();
    let unfinished = draft(path, &key)?;
    // A link never replaces the key that another process made meanwhile; a rename would.
    let linked = std::fs::hard_link(&unfinished, path);
    remove(&unfinished)?;
    sync_parent(path)?;
    match linked {
        Ok(()) => Ok(key),
        // Where the draft was swept there is a key, too: somebody exchanges it.
        Err(error)
            if matches!(error.kind(), io::ErrorKind::AlreadyExists | io::ErrorKind::NotFound) =>
        {
            read_or_make(path)
        }
        Err(error) => Err(error),
    }
}

fn replace(path: &Path, keys: &[u8]) -> io::Result<()> {
    let unfinished = draft(path, keys)?;
    std::fs::rename(&unfinished, path).inspect_err(|_| discard(&unfinished))?;
    sync_parent(path)
}

/// A file of its own each time: what another thread then links or renames must not be what this one
/// still writes.
fn draft(path: &Path, keys: &[u8]) -> io::Result<PathBuf> {
    let unfinished = path.with_extension(format!("{DRAFT}{:016x}", rand::random::<u64>()));
    let mut options = std::fs::OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(0o600).open(&unfinished)?;
    let written = file.write_all(keys).and_then(|()| file.sync_all());
    written.inspect_err(|_| discard(&unfinished))?;
    Ok(unfinished)
}

/// After a failure, which is what is told: it may hold keys that are to be forgotten.
fn discard(unfinished: &Path) {
    let _ = std::fs::remove_file(unfinished);
}

/// Removes what was broken off before it had its name: such keys have sealed nothing, or the file
/// itself holds them still.
fn sweep_drafts(path: &Path) -> io::Result<()> {
    let Some(directory) = path.parent() else { return Ok(()) };
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        if is_draft(path, Path::new(&entry.file_name())) {
            remove(&entry.path())?;
        }
    }
    sync_parent(path)
}

fn is_draft(path: &Path, name: &Path) -> bool {
    let number = name.extension().and_then(OsStr::to_str).and_then(|it| it.strip_prefix(DRAFT));
    let is_number = |it: &str| it.len() == 16 && it.bytes().all(|byte| byte.is_ascii_hexdigit());
    name.file_stem() == path.file_stem() && number.is_some_and(is_number)
}

/// It may be gone already.
fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn sync_parent(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |directory| File::open(directory)?.sync_all())
}

/// Secrets that are looked at to tell whether a master key is the right one.
const SAMPLE: usize = 8;

/// Sealed secrets by name. Cheap to clone.
#[derive(Clone)]
pub struct Vault {
    folder: String,
    documents: Documents,
    master: MasterKey,
}

impl Vault {
    pub fn new(blobs: &Blobs, folder: &str, master: MasterKey) -> Self {
        Self { folder: folder.to_owned(), documents: blobs.documents(folder), master }
    }

    /// Keeps a secret, in the place of the one of this name; durable when it returns.
    pub async fn seal(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let sealed = self.master.seal(&self.full(name), bytes)?;
        Ok(self.documents.put(name, sealed).await?)
    }

    /// Keeps a secret unless there is one of this name, and says whether it did.
    pub async fn create(&self, name: &str, bytes: &[u8]) -> Result<bool, Error> {
        let sealed = self.master.seal(&self.full(name), bytes)?;
        Ok(self.documents.create(name, sealed).await?)
    }

    /// None if there is no such secret.
    pub async fn open(&self, name: &str) -> Result<Option<Vec<u8>>, Error> {
        let Some(sealed) = self.documents.get(name).await? else { return Ok(None) };
        self.master.open(&self.full(name), &sealed).map(|(bytes, _)| Some(bytes))
    }

    /// Makes durable what is there, for who relies on a secret without having kept it just now.
    pub async fn settle(&self) -> Result<(), Error> {
        Ok(self.documents.settle().await?)
    }

    /// Whether a secret is sealed by the first master key; none if there is no such secret.
    pub async fn is_by_first(&self, name: &str) -> Result<Option<bool>, Error> {
        let Some(sealed) = self.documents.get(name).await? else { return Ok(None) };
        self.master.open(&self.full(name), &sealed).map(|(_, number)| Some(number == 0))
    }

    /// Seals a secret anew if another master key than the first has sealed it; says whether.
    /// One that is destroyed meanwhile may come back: the caller sees to that.
    pub async fn reseal(&self, name: &str) -> Result<bool, Error> {
        let Some(sealed) = self.documents.get(name).await? else { return Ok(false) };
        let (bytes, number) = self.master.open(&self.full(name), &sealed)?;
        if number > 0 {
            self.seal(name, &bytes).await?;
        }
        Ok(number > 0)
    }

    /// Whether there is a secret of this name; it is not opened.
    pub async fn holds(&self, name: &str) -> Result<bool, Error> {
        Ok(self.documents.get(name).await?.is_some())
    }

    /// Whether the master keys are those of what is kept here: false if they open none of some
    /// secrets. Nothing is known where there are none.
    ///
    /// # Errors
    /// The store cannot be read, or the master key not.
    pub async fn is_ours(&self) -> Result<Option<bool>, Error> {
        let names = self.documents.some(SAMPLE).await?;
        for name in &names {
            match self.open(name).await {
                // It may have been damaged, which is no reason to refuse all the others.
                Err(Error::Unopenable) | Ok(None) => {}
                opened => return opened.map(|_| Some(true)),
            }
        }
        Ok((!names.is_empty()).then_some(false))
    }

    /// Destroys a secret; one that is not there is no error.
    pub async fn destroy(&self, name: &str) -> Result<(), Error> {
        // In this order: who is sealing it has done so before it is deleted, or fails.
        self.forget_unfinished(name).await?;
        Ok(self.documents.delete(name).await?)
    }

    /// Destroys what a crash left of a secret that was being sealed: it opens like the secret itself.
    pub async fn forget_unfinished(&self, name: &str) -> Result<(), Error> {
        Ok(self.documents.forget_unfinished(name).await?)
    }

    /// The names, and when each was sealed.
    pub async fn list(&self) -> Result<Vec<Listed>, Error> {
        Ok(self.documents.list().await?)
    }

    fn full(&self, name: &str) -> String {
        full(&self.folder, name)
    }
}

/// What a seal is bound to, so that nothing sealed can take another's place.
fn full(folder: &str, name: &str) -> String {
    format!("{folder}/{name}")
}

#[cfg(test)]
#[path = "vault_tests.rs"]
mod tests;
