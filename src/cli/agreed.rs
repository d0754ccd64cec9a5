//! Secrets that servers make for themselves where none were given. Nodes that share a log and a
//! store agree on them through the store: the first makes one, the others take it.

use std::io::ErrorKind;
use std::path::Path;

use anyhow::Context;

use super::assemble::keep_private;
use super::layout::MASTER_KEY;
use crate::actors::keyring::{KEYS, MARK};
use crate::actors::secrets::SECRETS;
use crate::media::blobs::Blobs;
use crate::media::documents::Documents;
use crate::media::vault::{KEY_BYTES, MasterKey, SealingKey, Vault};

/// Where they lie in the store.
pub fn in_store(blobs: &Blobs) -> Documents {
    blobs.documents("made")
}

/// Sees to it that the file at `path` holds what all nodes have there: what this node has already, or
/// what `make` gives, if it is the first. It lies in the store then, and whoever reads the store has
/// it: `variable` is the setting that keeps it out of there.
///
/// # Errors
/// The store or the file cannot be read or written; the file holds something else already.
pub async fn on(
    blobs: &Blobs,
    path: &Path,
    variable: &str,
    make: impl FnOnce() -> Vec<u8>,
) -> anyhow::Result<()> {
    let own = own(path)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let documents = in_store(blobs);
    let reading = || format!("agreeing on {name} with other nodes (or set {variable})");
    let first = own.clone().unwrap_or_else(make);
    let agreed = documents.get(&name).await.with_context(reading)?;
    if agreed.is_none() && documents.create(&name, first.clone()).await.with_context(reading)? {
        tracing::warn!("{variable} is not set: {name} lies in the store for the other nodes");
    }
    let agreed = documents.get(&name).await.with_context(reading)?;
    let agreed = agreed.as_deref().unwrap_or(&first);
    match own {
        None => keep_private(path, agreed),
        Some(own) if own == agreed => Ok(()),
        Some(_) => anyhow::bail!(
            "{variable}: {} is not what the other nodes have; set {variable} to the same for all, \
             or remove the file to take theirs",
            path.display()
        ),
    }
}

/// The same for the master key, which everything sealed is lost without. One is made only where
/// nothing was sealed yet; and one that this node has already stays its own: it was made when this was
/// the only node, and whoever reads the store must not be able to open what lies there.
///
/// # Errors
/// The store or the file cannot be read or written; there is no key to agree on, or another one.
pub async fn on_master_key(blobs: &Blobs, path: &Path) -> anyhow::Result<()> {
    let documents = in_store(blobs);
    let agreed = async || {
        let agreed = documents.get(MASTER_KEY).await;
        agreed.context("agreeing on the master key with other nodes (or set T2M_MASTER_KEY)")
    };
    let kept = MasterKey::kept_in(path);
    if let Some(own) = own(path)? {
        let path = path.display();
        match agreed().await? {
            Some(agreed) if agreed == own => {}
            Some(_) if opens(blobs, &kept).await? == Some(true) => anyhow::bail!(
                "T2M_MASTER_KEY: {path} opens the keys in the store, but made/{MASTER_KEY} there is \
                 another one; keep the file, and set T2M_MASTER_KEY to what it holds, in base64, \
                 for all nodes"
            ),
            Some(_) => anyhow::bail!(
                "T2M_MASTER_KEY: {path} is not what the other nodes have, and opens nothing in the \
                 store; set T2M_MASTER_KEY to the same for all, or put the file elsewhere to take \
                 theirs"
            ),
            None => tracing::warn!("T2M_MASTER_KEY is not set, and other nodes do not have {path}"),
        }
        return Ok(());
    }
    // Asked first: who seals has agreed before, so that what is not agreed on now never was.
    let is_in_use = opens(blobs, &kept).await?.is_some();
    let refused = "T2M_MASTER_KEY: what lies in the store was sealed by a master key that this node \
                   does not have; set T2M_MASTER_KEY to that key (the master.key of the node that \
                   has it, in base64) for all nodes";
    let found = match agreed().await? {
        Some(agreed) => agreed,
        None if is_in_use => anyhow::bail!(refused),
        None => {
            let fresh = rand::random::<[u8; KEY_BYTES]>().to_vec();
            let storing = "bringing the master key into the store";
            if documents.create(MASTER_KEY, fresh.clone()).await.context(storing)? {
                tracing::warn!(
                    "T2M_MASTER_KEY is not set: {MASTER_KEY} was made, and lies in the store for \
                     the other nodes"
                );
            }
            agreed().await?.unwrap_or_else(|| fresh.into())
        }
    };
    let key = found[..].try_into().ok().and_then(|key| SealingKey::new(key).ok());
    let key = key.with_context(|| format!("made/{MASTER_KEY} in the store is no master key"))?;
    // Not kept then, so that nothing is in the way of the right one.
    anyhow::ensure!(opens(blobs, &MasterKey::given(key)).await? != Some(false), refused);
    keep_private(path, &found)
}

/// Whether a master key opens anything that lies in the store; none where nothing is sealed.
async fn opens(blobs: &Blobs, master: &MasterKey) -> anyhow::Result<Option<bool>> {
    let mut found = None;
    for folder in [KEYS, MARK, SECRETS] {
        let vault = Vault::new(blobs, folder, master.clone());
        match vault.is_ours().await.context("looking at what is sealed in the store")? {
            Some(true) => return Ok(Some(true)),
            is_ours => found = found.or(is_ours),
        }
    }
    Ok(found)
}

fn own(path: &Path) -> anyhow::Result<Option<Vec<u8>>> {
    match std::fs::read(path) {
        Ok(own) => Ok(Some(own)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::actors::keyring::Keyring;
    use crate::config::BlobStore;
    use crate::domain::ids::UserId;

    #[tokio::test]
    async fn nodes_agree_on_what_the_first_has_and_one_that_has_another_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(&BlobStore::File, dir.path()).unwrap();
        let [one, two, three] =
            ["one", "two", "three"].map(|node| dir.path().join(node).join("key"));
        let made = |path, bytes: &'static [u8]| on(&blobs, path, "T2M_KEY", || bytes.to_vec());
        let (a, b) = tokio::join!(made(&one, b"1"), made(&two, b"2"));
        a.and(b).unwrap();
        let agreed = std::fs::read(&one).unwrap();
        assert_eq!(std::fs::read(&two).unwrap(), agreed);
        made(&one, b"3").await.unwrap();
        assert_eq!(std::fs::read(&one).unwrap(), agreed, "also after a restart");
        keep_private(&three, b"4").unwrap();
        let refused = made(&three, b"5").await.unwrap_err().to_string();
        assert!(refused.starts_with("T2M_KEY: "), "{refused}");
        assert_eq!(std::fs::read(&three).unwrap(), b"4");
        let elsewhere = Blobs::open(&BlobStore::File, &dir.path().join("elsewhere")).unwrap();
        for node in [&three, &dir.path().join("four/key")] {
            on(&elsewhere, node, "T2M_KEY", || b"6".to_vec()).await.unwrap();
            assert_eq!(std::fs::read(node).unwrap(), b"4", "what was there is for all");
        }
    }

    /// A node that worked alone so far: its key is in nobody else's hands, and has sealed something.
    async fn with_a_past(dir: &Path) -> (Blobs, PathBuf) {
        let (blobs, own) =
            (Blobs::open(&BlobStore::File, dir).unwrap(), dir.join("one/master.key"));
        std::fs::create_dir(dir.join("one")).unwrap();
        let keyring = Keyring::new(&blobs, MasterKey::kept_in(&own));
        keyring.of(&UserId::try_from("user_ada").unwrap()).await.unwrap();
        (blobs, own)
    }

    #[tokio::test]
    async fn nodes_agree_on_a_master_key_where_nothing_is_sealed_yet() {
        let dir = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(&BlobStore::File, dir.path()).unwrap();
        let [one, two, three] = ["one", "two", "three"].map(|node| dir.path().join(node));
        let (a, b) = tokio::join!(on_master_key(&blobs, &one), on_master_key(&blobs, &two));
        a.and(b).unwrap();
        Keyring::new(&blobs, MasterKey::kept_in(&one)).is_ours(true).await.unwrap();
        on_master_key(&blobs, &three).await.unwrap();
        on_master_key(&blobs, &one).await.unwrap();
        let [one, two, three] = [one, two, three].map(|path| std::fs::read(path).unwrap());
        assert!(one.len() == KEY_BYTES && one == two && two == three);
    }

    #[tokio::test]
    async fn no_master_key_is_made_where_another_has_sealed_something() {
        let dir = tempfile::tempdir().unwrap();
        let (blobs, own) = with_a_past(dir.path()).await;
        let fresh = dir.path().join("two");
        let refused = on_master_key(&blobs, &fresh).await.unwrap_err().to_string();
        assert!(refused.starts_with("T2M_MASTER_KEY: what lies in the store"), "{refused}");
        assert!(in_store(&blobs).get(MASTER_KEY).await.unwrap().is_none() && !fresh.exists());
        on_master_key(&blobs, &own).await.unwrap();
        let published = in_store(&blobs).get(MASTER_KEY).await.unwrap();
        assert!(published.is_none(), "it stays where it was");
    }

    #[tokio::test]
    async fn nobody_is_told_to_part_with_a_master_key_that_opens_something() {
        let dir = tempfile::tempdir().unwrap();
        let (blobs, own) = with_a_past(dir.path()).await;
        in_store(&blobs).put(MASTER_KEY, vec![7; KEY_BYTES]).await.unwrap();
        let refused = on_master_key(&blobs, &own).await.unwrap_err().to_string();
        assert!(refused.contains("keep the file"), "{refused}");
        assert!(!refused.contains("remove") && !refused.contains("elsewhere"), "{refused}");
        let fresh = dir.path().join("two");
        let refused = on_master_key(&blobs, &fresh).await.unwrap_err().to_string();
        assert!(refused.starts_with("T2M_MASTER_KEY: what lies in the store"), "{refused}");
        assert!(!fresh.exists(), "it keeps a key that opens nothing");
        std::fs::write(&fresh, [8; KEY_BYTES]).unwrap();
        let refused = on_master_key(&blobs, &fresh).await.unwrap_err().to_string();
        assert!(refused.contains("opens nothing in the store"), "{refused}");
    }
}
