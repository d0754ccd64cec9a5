//! The keys and secrets of a backup. What is sealed in it opens with the master key beside it, also
//! when `t2m keys rotate` runs meanwhile.
//!
//! What lies in the store opens with the master key of that moment, and a master key that was
//! exchanged never comes back. So if it is the same before and after all of the rest was copied, it
//! was the same all the time, and opens all of it.

use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, bail};

use super::manifest::Part;
use super::{copy_folder, files};
use crate::actors::{keyring, secrets};
use crate::media::blobs::Blobs;
use crate::media::vault::MasterKey;

const MASTER_KEY: &str = "master.key";
/// What else of the data directory is secret.
const SECRETS: [&str; 3] =
    ["file-signing-secret", "callback-signing-secret", "development-key.pem"];
/// Folders of the store that hold sealed keys and secrets, or say which were destroyed.
const FOLDERS: [&str; 3] = [keyring::KEYS, "erased", secrets::SECRETS];
/// How often it is begun anew; a rotation changes the master key twice.
const TRIES: u32 = 5;

/// Copies all of them to `keys`.
///
/// # Errors
/// Something cannot be read or written, or the master key changes again and again.
pub async fn copy(blobs: &Blobs, data_dir: &Path, backup: &Path) -> anyhow::Result<Vec<Part>> {
    let parts = under_one_key(data_dir, backup, async || copy_rest(blobs, data_dir, backup).await);
    let parts = parts.await?;
    let unopened = count_unopened(&parts, backup)?;
    if unopened > 0 {
        eprintln!(
            "{unopened} of the sealed keys and secrets do not open with the {MASTER_KEY} in this \
             backup: they are damaged, or T2M_MASTER_KEY is what seals them"
        );
    }
    Ok(parts)
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
    for folder in FOLDERS {
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

/// How much of what is sealed does not open with the master key of the backup; nothing is known
/// where it holds none.
fn count_unopened(parts: &[Part], backup: &Path) -> anyhow::Result<usize> {
    if !parts.iter().any(|part| part.path == path_of(MASTER_KEY)) {
        return Ok(0);
    }
    let master = MasterKey::kept_in(&backup.join(path_of(MASTER_KEY)));
    let mut unopened = 0;
    for part in parts {
        let below = part.path.strip_prefix("keys/").and_then(|below| below.split_once('/'));
        let Some((keyring::KEYS | secrets::SECRETS, _)) = below else { continue };
        let Some((folder, name)) = below else { continue };
        let sealed = part.read(backup, &backup.join("keys"))?;
        // A master key that is broken opens nothing either.
        unopened += usize::from(!master.has_sealed(folder, name, &sealed));
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
        assert_eq!((parts.len(), count_unopened(&parts, &backup).unwrap()), (3, 0));
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
    async fn what_another_master_key_has_sealed_is_counted_where_the_backup_has_one() {
        let [data, to, without] = [(); 3].map(|()| tempfile::tempdir().unwrap());
        let blobs = Blobs::open(&BlobStore::File, data.path()).unwrap();
        let vault = |name: &str| {
            let master = MasterKey::kept_in(&data.path().join(name));
            Vault::new(&blobs, secrets::SECRETS, master)
        };
        vault("another.key").seal("job-1", b"a secret").await.unwrap();
        let parts = copy(&blobs, data.path(), without.path()).await.unwrap();
        assert_eq!((parts.len(), count_unopened(&parts, without.path()).unwrap()), (1, 0));
        vault(MASTER_KEY).seal("job-2", b"a secret").await.unwrap();
        let parts = copy(&blobs, data.path(), to.path()).await.unwrap();
        assert_eq!((parts.len(), count_unopened(&parts, to.path()).unwrap()), (3, 1));
    }
}
