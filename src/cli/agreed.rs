//! Secrets that servers make for themselves where none were given. Nodes that share a log and a
//! store agree on them through the store: the first makes one, the others take it.

use std::io::ErrorKind;
use std::path::Path;

use anyhow::Context;

use super::assemble::keep_private;
use crate::media::blobs::Blobs;
use crate::media::documents::Documents;

/// Where they lie in the store.
pub fn in_store(blobs: &Blobs) -> Documents {
    blobs.documents("made")
}

/// Sees to it that the file at `path` holds what all nodes have there, or what `make` gives to the
/// first of them. What was made so lies in the store, and whoever reads the store has it: `variable`
/// is the setting that keeps it out of there.
///
/// # Errors
/// The store or the file cannot be read or written; the file holds something else already.
pub async fn on(
    blobs: &Blobs,
    path: &Path,
    variable: &str,
    make: impl FnOnce() -> Vec<u8>,
) -> anyhow::Result<()> {
    let own = match std::fs::read(path) {
        Ok(own) => Some(own),
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
    };
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let documents = in_store(blobs);
    let reading = || format!("agreeing on {name} with other nodes (or set {variable})");
    if let Some(own) = own {
        return match documents.get(&name).await.with_context(reading)? {
            Some(agreed) if agreed == own => Ok(()),
            Some(_) => anyhow::bail!(
                "{variable}: {} is not what the other nodes have; set {variable} to the same for \
                 all, or remove the file to take theirs",
                path.display()
            ),
            // It was made when this was the only node: it is not for the store.
            None => {
                tracing::warn!(
                    "{variable} is not set, and other nodes do not have {}",
                    path.display()
                );
                Ok(())
            }
        };
    }
    let first = make();
    if documents.create(&name, first.clone()).await.with_context(reading)? {
        tracing::warn!(
            "{variable} is not set: {name} was made, and lies in the store for the other nodes"
        );
    }
    let agreed = documents.get(&name).await.with_context(reading)?;
    keep_private(path, agreed.as_deref().unwrap_or(&first))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::BlobStore;

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
        on(&elsewhere, &three, "T2M_KEY", || b"6".to_vec()).await.unwrap();
        assert_eq!(std::fs::read(&three).unwrap(), b"4");
        assert!(in_store(&elsewhere).get("key").await.unwrap().is_none(), "it stays where it was");
    }
}
