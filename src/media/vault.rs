//! Secrets that must be destroyed one day: each is sealed by AES-256-GCM under its own name, and
//! only what is sealed is stored. Without the key of the vault it says nothing.
//!
//! A vault is a folder of the object store, so that there can be one for what jobs need and one for
//! the keys of users, side by side and under one master key.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
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
    Kept { path: PathBuf, last: Mutex<Option<Keys>> },
    /// Somebody else keeps them.
    Given(Keys),
}

type Keys = Arc<[SealingKey]>;

impl MasterKey {
    /// Keys that lie in a file, made at its first need and readable by this user alone.
    pub fn kept_in(path: &Path) -> Self {
        Self(Arc::new(Source::Kept { path: path.to_owned(), last: Mutex::default() }))
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
    /// off: it goes on with those.
    ///
    /// # Errors
    /// The file cannot be read or written.
    pub fn put_fresh_first(&self) -> Result<(), Error> {
        let Some(path) = self.path() else { return Ok(()) };
        let failed = |error| Error::MasterKey { path: path.to_owned(), error };
        let old = read_or_make(path).map_err(failed)?;
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
            Source::Kept { path, last } => (path, last),
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
        self.fresh(read_or_make)?.first().ok_or(Error::BadKey)?.seal(name, bytes)
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
    std::fs::remove_file(&unfinished)?;
    sync_parent(path)?;
    match linked {
        Ok(()) => Ok(key),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => read_or_make(path),
        Err(error) => Err(error),
    }
}

fn replace(path: &Path, keys: &[u8]) -> io::Result<()> {
    std::fs::rename(draft(path, keys)?, path)?;
    sync_parent(path)
}

/// A file of its own each time: what another thread then links or renames must not be what this one
/// still writes.
fn draft(path: &Path, keys: &[u8]) -> io::Result<PathBuf> {
    let unfinished = path.with_extension(format!("new-{:016x}", rand::random::<u64>()));
    let mut options = std::fs::OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(0o600).open(&unfinished)?;
    file.write_all(keys)?;
    file.sync_all()?;
    Ok(unfinished)
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
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn vault(dir: &Path) -> Vault {
        let blobs = Blobs::open(&crate::config::BlobStore::File, dir).unwrap();
        Vault::new(&blobs, "secrets", MasterKey::kept_in(&dir.join("master.key")))
    }

    fn sealed_file(dir: &Path, name: &str) -> PathBuf {
        dir.join("blobs/secrets").join(name)
    }

    #[tokio::test]
    async fn a_secret_comes_back_until_it_is_destroyed_and_is_nowhere_in_clear() {
        let dir = tempfile::tempdir().unwrap();
        vault(dir.path()).seal("job-1", b"a-very-secret-key").await.unwrap();
        // Another process with the same directory.
        let again = vault(dir.path());
        assert_eq!(again.open("job-1").await.unwrap().unwrap(), b"a-very-secret-key");
        let sealed = std::fs::read(sealed_file(dir.path(), "job-1")).unwrap();
        assert!(!sealed.windows(6).any(|part| part == b"secret"));
        again.destroy("job-1").await.unwrap();
        again.destroy("job-1").await.unwrap();
        assert_eq!(again.open("job-1").await.unwrap(), None);
        assert!(!sealed_file(dir.path(), "job-1").exists());
    }

    #[tokio::test]
    async fn the_same_secret_is_never_sealed_the_same_twice() {
        let dir = tempfile::tempdir().unwrap();
        let vault = vault(dir.path());
        let mut seen = std::collections::HashSet::new();
        for _ in 0..20 {
            vault.seal("job-1", b"k").await.unwrap();
            assert!(seen.insert(std::fs::read(sealed_file(dir.path(), "job-1")).unwrap()));
        }
    }

    #[tokio::test]
    async fn what_was_changed_moved_or_sealed_by_another_key_is_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        let vault = vault(dir.path());
        vault.seal("job-1", b"key of one").await.unwrap();
        let path = sealed_file(dir.path(), "job-1");
        let sealed = std::fs::read(&path).unwrap();
        std::fs::copy(&path, sealed_file(dir.path(), "job-2")).unwrap();
        assert!(matches!(vault.open("job-2").await, Err(Error::Unopenable)), "moved");
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            std::fs::write(&path, &changed).unwrap();
            assert!(matches!(vault.open("job-1").await, Err(Error::Unopenable)), "byte {at}");
            std::fs::write(&path, &sealed[..at]).unwrap();
            assert!(matches!(vault.open("job-1").await, Err(Error::Unopenable)), "cut at {at}");
        }
        std::fs::write(&path, &sealed).unwrap();
        let other = MasterKey::given(SealingKey::new(&[7; KEY_BYTES]).unwrap());
        let other = Vault::new(
            &Blobs::open(&crate::config::BlobStore::File, dir.path()).unwrap(),
            "secrets",
            other,
        );
        assert!(matches!(other.open("job-1").await, Err(Error::Unopenable)), "another key");
        assert!(vault.open("job-1").await.unwrap().is_some());
    }

    #[tokio::test]
    async fn the_master_key_is_made_at_the_first_need_for_this_user_alone() {
        let dir = tempfile::tempdir().unwrap();
        let vault = vault(dir.path());
        let path = dir.path().join("master.key");
        assert_eq!(vault.open("job-1").await.unwrap(), None);
        assert!(!path.exists());
        vault.seal("job-1", b"k").await.unwrap();
        let meta = std::fs::metadata(&path).unwrap();
        assert_eq!((meta.len(), meta.permissions().mode() & 0o777), (32, 0o600));
        std::fs::write(&path, b"short").unwrap();
        let broken = super::tests::vault(dir.path()).seal("job-2", b"k").await;
        assert!(matches!(broken, Err(Error::MasterKey { .. })), "a broken key is not replaced");
    }

    #[test]
    fn of_many_who_need_the_first_key_at_once_all_get_the_one_that_is_kept() {
        for _ in 0..50 {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("master.key");
            let all_there = std::sync::Barrier::new(8);
            let keys: Vec<_> = std::thread::scope(|scope| {
                let need = || {
                    all_there.wait();
                    read_or_make(&path).unwrap()
                };
                let needing: Vec<_> = (0..8).map(|_| scope.spawn(need)).collect();
                needing.into_iter().map(|it| it.join().unwrap()).collect()
            });
            let kept = std::fs::read(&path).unwrap();
            assert!(keys.iter().all(|key| *key == kept), "somebody seals with a lost key");
            assert_eq!(dir.path().read_dir().unwrap().count(), 1, "a draft was left behind");
        }
    }

    #[tokio::test]
    async fn the_kept_key_is_exchanged_under_a_running_process_and_after_a_crash() {
        let dir = tempfile::tempdir().unwrap();
        let (running, path) = (vault(dir.path()), dir.path().join("master.key"));
        running.seal("job-1", b"one").await.unwrap();
        let (old, exchange) = (std::fs::read(&path).unwrap(), MasterKey::kept_in(&path));
        let blobs = Blobs::open(&crate::config::BlobStore::File, dir.path()).unwrap();
        let exchanging = Vault::new(&blobs, "secrets", exchange.clone());
        assert_eq!(exchanging.is_by_first("job-1").await.unwrap(), Some(true));
        exchange.put_fresh_first().unwrap();
        // A second try after a crash makes no third key.
        exchange.put_fresh_first().unwrap();
        let both = std::fs::read(&path).unwrap();
        assert_eq!((both.len(), &both[KEY_BYTES..]), (2 * KEY_BYTES, &old[..]));
        running.seal("job-2", b"two").await.unwrap();
        let by_first = [running.is_by_first("job-1").await, running.is_by_first("job-2").await];
        assert_eq!(by_first.map(Result::unwrap), [Some(false), Some(true)]);
        assert!(exchanging.reseal("job-1").await.unwrap(), "it knows of its own new key");
        assert!(!vault(dir.path()).reseal("job-1").await.unwrap());
        exchange.keep_first_alone().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), both[..KEY_BYTES]);
        for vault in [running, vault(dir.path())] {
            assert_eq!(vault.open("job-1").await.unwrap().unwrap(), b"one");
            assert_eq!(vault.open("job-2").await.unwrap().unwrap(), b"two");
        }
    }

    #[tokio::test]
    async fn of_several_given_keys_the_first_seals_and_all_open() {
        let dir = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(&crate::config::BlobStore::File, dir.path()).unwrap();
        let with = |keys: &[u8]| {
            let keys: Vec<_> = keys.iter().map(|byte| STANDARD.encode([*byte; 32])).collect();
            Vault::new(&blobs, "secrets", MasterKey::parse(&keys.join(", ")).unwrap())
        };
        with(&[1]).seal("job-1", b"one").await.unwrap();
        assert_eq!(with(&[2, 1]).open("job-1").await.unwrap().unwrap(), b"one");
        assert!(matches!(with(&[2]).open("job-1").await, Err(Error::Unopenable)));
        assert!(with(&[2, 1]).reseal("job-1").await.unwrap());
        assert_eq!(with(&[2]).open("job-1").await.unwrap().unwrap(), b"one");
    }

    #[test]
    fn of_many_that_make_the_master_key_at_once_all_get_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("master.key");
        let start = std::sync::Barrier::new(8);
        let keys: Vec<Vec<u8>> = std::thread::scope(|scope| {
            let make = || {
                start.wait();
                read_or_make(&path).unwrap()
            };
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(make)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let kept = std::fs::read(&path).unwrap();
        assert!(keys.iter().all(|key| *key == kept));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no draft is left");
    }

    #[test]
    fn a_key_is_given_as_base64_of_32_bytes() {
        assert!(SealingKey::parse(&STANDARD.encode([1; 32])).is_ok());
        for bad in ["", "abc", "!!!!", &STANDARD.encode([1; 31]), &STANDARD.encode([1; 33])] {
            assert!(matches!(SealingKey::parse(bad), Err(Error::BadKey)), "{bad}");
        }
    }
}
