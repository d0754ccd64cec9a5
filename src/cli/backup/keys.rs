//! The keys and secrets of a backup. What is sealed in it opens with the master key beside it, also
//! when `t2m keys rotate` runs meanwhile.
//!
//! What lies in the store opens with the master key of that moment, and a master key that was
//! exchanged never comes back. So if it is the same before and after all of the rest was copied, it
//! was the same all the time, and opens all of it.

use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, bail, ensure};

use super::super::doctor::few;
use super::super::layout::{self, MASTER_KEY};
use super::manifest::Part;
use super::{copy_folder, files};
use crate::actors::keyring::{self, TOMBSTONES};
use crate::actors::secrets;
use crate::media::blobs::Blobs;
use crate::media::vault::MasterKey;

/// What else of the data directory is secret.
const SECRETS: [&str; 3] =
    [layout::FILE_SIGNING_SECRET, layout::CALLBACK_SIGNING_SECRET, layout::DEVELOPMENT_KEY];
/// Folders of the store that hold sealed keys and secrets.
const SEALED: [&str; 2] = [keyring::KEYS, secrets::SECRETS];
/// How often it is begun anew; a rotation changes the master key twice.
const TRIES: u32 = 5;

/// Where they are.
pub struct Keys<'a> {
    pub blobs: &'a Blobs,
    pub data_dir: &'a Path,
    /// The master key, where it does not lie in the data directory.
    pub given: Option<&'a MasterKey>,
}

/// What came into the backup.
#[derive(Debug)]
pub struct Copied {
    pub parts: Vec<Part>,
    /// What of it does not open with the master key, by folder and name.
    pub unopened: Vec<String>,
}

impl Keys<'_> {
    /// Before anything is copied: in another directory than the server's there is no master key.
    ///
    /// # Errors
    /// Something is sealed, and nothing is there to open it.
    pub async fn ensure_openable(&self) -> anyhow::Result<()> {
        for folder in SEALED {
            let names = self.blobs.names_in(folder).await.context("looking at the keys")?;
            self.ensure_master(names.len(), read(self.data_dir, MASTER_KEY)?.is_some())?;
        }
        Ok(())
    }

    /// Copies all of them to `keys`. The log may hold what was sealed by a user's key.
    ///
    /// # Errors
    /// Something cannot be read or written, the master key changes again and again, or there is
    /// nothing to open what was sealed.
    pub async fn copy(&self, backup: &Path, log_has_sealed: bool) -> anyhow::Result<Copied> {
        let Self { blobs, data_dir, given } = *self;
        let parts =
            under_one_key(data_dir, backup, async || copy_rest(blobs, data_dir, backup).await);
        let parts = parts.await?;
        let is_of = |part: &Part, folder: &str| {
            let below = part.path.strip_prefix("keys/").and_then(|below| below.split_once('/'));
            below.is_some_and(|(it, _)| it == folder)
        };
        let count = |folder| parts.iter().filter(|part| is_of(part, folder)).count();
        let master = parts.iter().any(|part| part.path == path_of(MASTER_KEY));
        let sealed = SEALED.map(count).iter().sum();
        self.ensure_master(sealed, master)?;
        ensure!(
            !log_has_sealed || count(keyring::KEYS) + count(TOMBSTONES) > 0,
            "the log holds what users' keys have sealed, and the store has neither a key nor a \
             tombstone: {} (T2M_DATA_DIR) or T2M_BLOBS is not that log's",
            data_dir.display()
        );
        let kept = master.then(|| MasterKey::kept_in(&backup.join(path_of(MASTER_KEY))));
        let unopened = match given.or(kept.as_ref()) {
            Some(master) => unopened_by(master, &parts, backup)?,
            None => Vec::new(),
        };
        if sealed > 0 && unopened.len() == sealed {
            let place = data_dir.join(MASTER_KEY);
            let place = place.display();
            let other_kept = kept.filter(|_| given.is_some());
            let opened_by_kept = match other_kept {
                Some(kept) => sealed - unopened_by(&kept, &parts, backup)?.len(),
                None => 0,
            };
            let (which, remedy) = match given {
                None => (place.to_string(), "T2M_MASTER_KEY is what seals them".to_owned()),
                Some(_) if opened_by_kept == 0 => {
                    ("T2M_MASTER_KEY".to_owned(), "another one seals them".to_owned())
                }
                Some(_) => (
                    "T2M_MASTER_KEY".to_owned(),
                    format!("{place} opens {opened_by_kept} of them, without that setting"),
                ),
            };
            bail!(
                "none of the {sealed} sealed keys or secrets in the store opens with {which}: \
                 {remedy}; or T2M_DATA_DIR or T2M_BLOBS is not the server's"
            );
        }
        if !unopened.is_empty() {
            let (which, other) = match given {
                Some(_) => ("T2M_MASTER_KEY", "another one seals them"),
                None => ("the master.key in this backup", "T2M_MASTER_KEY is what seals them"),
            };
            eprintln!(
                "{} of the sealed keys and secrets do not open with {which}: {}; they are damaged, \
                 or {other}",
                unopened.len(),
                few(unopened.iter())
            );
        }
        Ok(Copied { parts, unopened })
    }

    fn ensure_master(&self, sealed: usize, is_there: bool) -> anyhow::Result<()> {
        ensure!(
            sealed == 0 || is_there || self.given.is_some(),
            "the store holds {sealed} sealed keys or secrets, and there is neither {} nor \
             T2M_MASTER_KEY to open them: name the server's data directory (T2M_DATA_DIR), or give \
             its T2M_MASTER_KEY",
            self.data_dir.join(MASTER_KEY).display()
        );
        Ok(())
    }
}

/// The master key, which stayed the same while `rest` was copied, and that rest.
async fn under_one_key(
    data_dir: &Path,
    backup: &Path,
    mut rest: impl AsyncFnMut() -> anyhow::Result<Vec<Part>>,
) -> anyhow::Result<Vec<Part>> {
    let keys = backup.join("keys");
    for _ in 0..TRIES {
        files::make_private(&keys)?;
        let before = read(data_dir, MASTER_KEY)?;
        let mut parts = rest().await?;
        if read(data_dir, MASTER_KEY)? == before {
            let master = before.map(|key| Part::write(backup, &path_of(MASTER_KEY), &key));
            parts.extend(master.transpose()?);
            return Ok(parts);
        }
        std::fs::remove_dir_all(&keys)
            .with_context(|| format!("removing {} to copy it anew", keys.display()))?;
    }
    bail!("the master key was exchanged again and again while the keys were copied")
}

async fn copy_rest(blobs: &Blobs, data_dir: &Path, backup: &Path) -> anyhow::Result<Vec<Part>> {
    let mut parts = Vec::new();
    for name in SECRETS {
        if let Some(bytes) = read(data_dir, name)? {
            parts.push(Part::write(backup, &path_of(name), &bytes)?);
        }
    }
    for folder in SEALED.into_iter().chain([TOMBSTONES]) {
        parts.extend(copy_folder(blobs, folder, backup, "keys").await?);
    }
    Ok(parts)
}

fn path_of(name: &str) -> String {
    format!("keys/{name}")
}

/// None if there is none.
fn read(data_dir: &Path, name: &str) -> anyhow::Result<Option<Vec<u8>>> {
    match std::fs::read(data_dir.join(name)) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("reading {name}")),
    }
}

/// What of the sealed a master key does not open, by folder and name.
fn unopened_by(master: &MasterKey, parts: &[Part], backup: &Path) -> anyhow::Result<Vec<String>> {
    let mut unopened = Vec::new();
    for part in parts {
        let Some(below) = part.path.strip_prefix("keys/") else { continue };
        let sealed = below.split_once('/').filter(|(folder, _)| SEALED.contains(folder));
        let Some((folder, name)) = sealed else { continue };
        let sealed = part.read(backup, &backup.join("keys"))?;
        // A master key that is broken opens nothing either.
        if !master.has_sealed(folder, name, &sealed) {
            unopened.push(below.to_owned());
        }
    }
    Ok(unopened)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::BlobStore;
    use crate::media::vault::Vault;

    /// Another process puts a new master key in the place of the old one.
    async fn rotate(blobs: &Blobs, data_dir: &Path) {
        let master = MasterKey::kept_in(&data_dir.join(MASTER_KEY));
        master.put_fresh_first().unwrap();
        let vault = Vault::new(blobs, keyring::KEYS, master.clone());
        for sealed in vault.list().await.unwrap() {
            assert!(vault.reseal(&sealed.name).await.unwrap());
        }
        master.keep_first_alone().unwrap();
    }

    #[tokio::test]
    async fn the_keys_of_a_backup_open_with_its_master_key_when_that_is_exchanged_meanwhile() {
        let [data, to] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let blobs = Blobs::open(&BlobStore::File, data.path()).unwrap();
        let master = MasterKey::kept_in(&data.path().join(MASTER_KEY));
        let vault = Vault::new(&blobs, keyring::KEYS, master);
        for name in ["ada", "bob"] {
            vault.seal(name, b"a key").await.unwrap();
        }
        let backup = to.path().join("backup");
        std::fs::create_dir(&backup).unwrap();
        let mut rounds = 0;
        let copied = under_one_key(data.path(), &backup, async || {
            rounds += 1;
            if rounds == 1 {
                rotate(&blobs, data.path()).await;
            }
            copy_rest(&blobs, data.path(), &backup).await
        });
        let parts = copied.await.unwrap();
        let kept = MasterKey::kept_in(&backup.join(path_of(MASTER_KEY)));
        let unopened = unopened_by(&kept, &parts, &backup).unwrap();
        assert_eq!((parts.len(), unopened), (3, vec![]));
        assert_eq!(rounds, 2);
        let mut rounds = 0;
        let copied = under_one_key(data.path(), to.path(), async || {
            rounds += 1;
            rotate(&blobs, data.path()).await;
            Ok(vec![])
        });
        let refused = copied.await.unwrap_err().to_string();
        assert!(refused.contains("exchanged again and again"), "{refused}");
        assert_eq!(rounds, TRIES);
    }

    #[tokio::test]
    async fn what_another_master_key_has_sealed_is_named_and_with_none_at_all_it_is_refused() {
        let [data, to, without] = [(); 3].map(|()| tempfile::tempdir().unwrap());
        let blobs = Blobs::open(&BlobStore::File, data.path()).unwrap();
        let kept = |name: &str| MasterKey::kept_in(&data.path().join(name));
        let vault = |name: &str| Vault::new(&blobs, secrets::SECRETS, kept(name));
        vault("another.key").seal("job-1", b"a secret").await.unwrap();
        let (given, data_dir) = (kept("another.key"), data.path());
        let keys = Keys { blobs: &blobs, data_dir, given: None };
        let refused = keys.ensure_openable().await.unwrap_err().to_string();
        assert!(refused.contains("holds 1 sealed keys or secrets, and there is neither"));
        let late = keys.copy(without.path(), false).await.unwrap_err().to_string();
        assert_eq!(late, refused);
        vault(MASTER_KEY).seal("job-2", b"a secret").await.unwrap();
        for (given, unopened) in [(None, "secrets/job-1"), (Some(&given), "secrets/job-2")] {
            let to = to.path().join(format!("{}", given.is_some()));
            let keys = Keys { given, ..keys };
            keys.ensure_openable().await.unwrap();
            let copied = keys.copy(&to, false).await.unwrap();
            assert_eq!((copied.parts.len(), copied.unopened), (3, vec![unopened.to_owned()]));
        }
    }

    #[tokio::test]
    async fn a_master_key_that_opens_nothing_is_no_key_of_this_backup() {
        let [data, to] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let blobs = Blobs::open(&BlobStore::File, data.path()).unwrap();
        let (kept, mut copies) = (data.path().join(MASTER_KEY), 0);
        let mut copy = async |given: Option<&MasterKey>| {
            copies += 1;
            let keys = Keys { blobs: &blobs, data_dir: data.path(), given };
            let copied = keys.copy(&to.path().join(copies.to_string()), true).await;
            copied.map(|copied| copied.unopened).map_err(|refused| refused.to_string())
        };
        let given = MasterKey::kept_in(&data.path().join("elsewhere"));
        let vault = Vault::new(&blobs, keyring::KEYS, given.clone());
        vault.seal("ada", b"a key").await.unwrap();
        std::fs::write(&kept, [7; 64]).unwrap();
        let refused = copy(None).await.unwrap_err();
        assert!(refused.starts_with("none of the 1 sealed keys or secrets"), "{refused}");
        assert!(refused.contains("T2M_MASTER_KEY is what seals them"), "{refused}");
        assert_eq!(copy(Some(&given)).await, Ok(vec![]));

        let wrong = MasterKey::parse(&format!("{}Bwc=", "BwcH".repeat(10))).unwrap();
        let refused = copy(Some(&wrong)).await.unwrap_err();
        assert!(refused.contains("opens with T2M_MASTER_KEY: another one seals"), "{refused}");
        std::fs::copy(data.path().join("elsewhere"), &kept).unwrap();
        let refused = copy(Some(&wrong)).await.unwrap_err();
        assert!(refused.contains("master.key opens 1 of them"), "{refused}");
    }

    #[tokio::test]
    async fn a_log_with_sealed_fields_has_keys_or_tombstones() {
        let data = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(&BlobStore::File, data.path()).unwrap();
        let keys = Keys { blobs: &blobs, data_dir: data.path(), given: None };
        let copy = async |sealed| {
            let to = tempfile::tempdir().unwrap();
            keys.copy(to.path(), sealed).await.map(|copied| copied.parts.len())
        };
        assert_eq!(copy(false).await.unwrap(), 0);
        let refused = copy(true).await.unwrap_err().to_string();
        assert!(refused.contains("neither a key nor a tombstone"), "{refused}");
        blobs.bring_document(TOMBSTONES, "ada", b"gone".to_vec()).await.unwrap();
        assert_eq!(copy(true).await.unwrap(), 1);
    }
}
