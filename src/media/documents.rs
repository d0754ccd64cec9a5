//! Small documents by name, in the object store where the blobs lie: written whole, replaced whole,
//! durable when [`Documents::put`] returns.

use std::io::{self, ErrorKind};
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use futures_util::{StreamExt, TryStreamExt};
use object_store::path::{Path, PathPart};
use object_store::{ObjectStore, ObjectStoreExt, PutMode};

use super::blobs::{Blobs, Error};
use super::settling::Settling;

/// Folders of the store that hold no documents. Blobs are many, and none is written in its place.
const OTHERS: [&str; 4] = ["sha256", "aside", "incoming", "uploads"];
/// More than ever write one document at a time, each into a file of its own.
const WRITERS: u32 = 8;

/// One folder of documents. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Documents {
    store: Arc<dyn ObjectStore>,
    folder: Path,
    /// Where it lies, if that is on this machine.
    directory: Option<PathBuf>,
    settling: Arc<Settling>,
}

/// A document, unread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    pub name: String,
    /// When it was written, by the store's clock.
    pub written_at: DateTime<Utc>,
}

impl Documents {
    pub(super) fn new(blobs: &Blobs, folder: &str) -> Self {
        let (store, folder) = (Arc::clone(&blobs.store), Path::from(folder));
        let directory = blobs.local_root().map(|root| root.join(folder.as_ref()));
        Self { store, folder, directory, settling: Arc::default() }
    }

    /// Writes a document in the place of the one of this name, if there is any.
    pub async fn put(&self, name: &str, bytes: Vec<u8>) -> Result<(), Error> {
        self.store.put(&self.location(name), bytes.into()).await.inspect_err(|_| self.failed())?;
        self.settle().await
    }

    /// Writes a document unless there is one of this name, and says whether it did. Of several
    /// that try at once, one does.
    pub async fn create(&self, name: &str, bytes: Vec<u8>) -> Result<bool, Error> {
        let (location, only_new) = (self.location(name), PutMode::Create);
        match self.store.put_opts(&location, bytes.into(), only_new.into()).await {
            Ok(_) => self.settle().await.map(|()| true),
            Err(object_store::Error::AlreadyExists { .. }) => self.settle().await.map(|()| false),
            Err(error) => {
                self.failed();
                Err(error.into())
            }
        }
    }

    /// Makes durable what is there already, for who is about to rely on it: it may be what a write has
    /// left that failed. Costs nothing where none has.
    ///
    /// # Errors
    /// The directory cannot be synced.
    pub async fn settle(&self) -> Result<(), Error> {
        let Some(directory) = &self.directory else { return Ok(()) };
        // The one above too, where it is a name itself.
        let above = directory.parent().unwrap_or(directory);
        Ok(self.settling.settle(|| [directory.clone(), above.to_owned()]).await?)
    }

    fn failed(&self) {
        self.settling.failed();
    }

    /// None if there is no such document.
    pub async fn get(&self, name: &str) -> Result<Option<Bytes>, Error> {
        let found = match self.store.get(&self.location(name)).await {
            Ok(found) => found,
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        Ok(Some(found.bytes().await?))
    }

    /// Removes a document; one that is not there is no error.
    pub async fn delete(&self, name: &str) -> Result<(), Error> {
        match self.store.delete(&self.location(name)).await.map_err(Error::from) {
            Err(Error::NotFound) => Ok(()),
            other => other,
        }
    }

    /// Removes the copies of a document that crashes left half written, which no listing shows. Whoever
    /// is writing it just then fails.
    pub async fn forget_unfinished(&self, name: &str) -> Result<(), Error> {
        let Some(directory) = &self.directory else { return Ok(()) };
        let location = self.location(name);
        let path = directory.join(location.filename().unwrap_or_default());
        let removing = tokio::task::spawn_blocking(move || {
            for number in 1..=WRITERS {
                let mut unfinished = path.clone().into_os_string();
                unfinished.push(format!("#{number}"));
                match std::fs::remove_file(unfinished) {
                    Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                    _ => {}
                }
            }
            Ok(())
        });
        Ok(removing.await.map_err(io::Error::other)??)
    }

    /// All documents, the one written last first.
    pub async fn list(&self) -> Result<Vec<Listed>, Error> {
        let found: Vec<_> = self.store.list(Some(&self.folder)).try_collect().await?;
        let mut listed: Vec<Listed> = found
            .into_iter()
            .filter_map(|object| {
                let name = object.location.filename()?.to_owned();
                Some(Listed { name, written_at: object.last_modified })
            })
            .collect();
        listed.sort_by(|one, other| {
            (other.written_at, &other.name).cmp(&(one.written_at, &one.name))
        });
        Ok(listed)
    }

    /// The names of some documents, as the store lists them; `most` at the most.
    pub async fn some(&self, most: usize) -> Result<Vec<String>, Error> {
        let found: Vec<_> = self.store.list(Some(&self.folder)).take(most).try_collect().await?;
        Ok(found
            .iter()
            .filter_map(|object| object.location.filename().map(str::to_owned))
            .collect())
    }

    /// A name is one part of the path: whatever it holds, it leads nowhere else.
    fn location(&self, name: &str) -> Path {
        self.folder.parts().chain([PathPart::from(name)]).collect()
    }
}

impl Blobs {
    /// Removes what a crash left of documents that were being written, each perhaps a whole copy, and
    /// says how many files that were. Only for who holds the data directory, before the first writer:
    /// it would take a living writer's file too.
    ///
    /// # Errors
    /// The directory cannot be read or changed.
    pub fn sweep_documents(&self) -> Result<usize, Error> {
        let Some(root) = self.local_root() else { return Ok(0) };
        let mut swept = 0;
        for folder in std::fs::read_dir(root)? {
            let folder = folder?;
            let is_other = OTHERS.iter().any(|name| folder.file_name() == *name);
            if is_other || !folder.path().is_dir() {
                continue;
            }
            for entry in std::fs::read_dir(folder.path())? {
                let entry = entry?;
                if is_unfinished(&entry.file_name().to_string_lossy()) {
                    std::fs::remove_file(entry.path())?;
                    swept += 1;
                }
            }
        }
        Ok(swept)
    }
}

/// Whether a file of this name is a document on its way: a store on a disk writes `NAME#1` and gives it
/// its name once it is durable. No document's own name has a `#` there.
pub fn is_unfinished(file_name: &str) -> bool {
    let number = file_name.split_once('#').map_or("", |(_, number)| number);
    !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::is_unfinished;
    use crate::config::BlobStore;
    use crate::media::blobs::Blobs;

    #[tokio::test]
    async fn a_document_is_replaced_read_and_removed_under_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let documents = Blobs::open(&BlobStore::File, dir.path()).unwrap().documents("letters");
        assert_eq!(documents.get("a.json").await.unwrap(), None);
        assert_eq!(documents.list().await.unwrap(), []);
        documents.put("a.json", b"1".to_vec()).await.unwrap();
        documents.put("b.json", b"2".to_vec()).await.unwrap();
        documents.put("a.json", b"3".to_vec()).await.unwrap();
        assert_eq!(documents.get("a.json").await.unwrap().as_deref(), Some(&b"3"[..]));
        let names: Vec<_> = documents.list().await.unwrap().into_iter().map(|it| it.name).collect();
        assert_eq!(names, ["a.json", "b.json"], "what was written last comes first");
        assert_eq!(documents.some(1).await.unwrap().len(), 1);
        assert_eq!(documents.some(9).await.unwrap().len(), 2);
        assert!(!documents.create("a.json", b"4".to_vec()).await.unwrap());
        assert_eq!(documents.get("a.json").await.unwrap().as_deref(), Some(&b"3"[..]));
        documents.delete("a.json").await.unwrap();
        documents.delete("a.json").await.unwrap();
        assert_eq!(documents.list().await.unwrap().len(), 1);
    }

    #[tokio::test]
    async fn what_a_crash_left_half_written_is_swept_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(&BlobStore::File, dir.path()).unwrap();
        let documents = blobs.documents("letters");
        let names = ["a.json", "b#1", "c#", "#2", "d#1x", "e|#3"];
        for name in names {
            documents.put(name, b"x".to_vec()).await.unwrap();
        }
        let file = |path: &str| dir.path().join("blobs").join(path);
        let left = ["letters/a.json#1", "letters/gone#1", "letters/b%231#12"].map(file);
        let others = ["sha256/x#1", "uploads/x#1"].map(file);
        std::fs::create_dir_all(file("uploads")).unwrap();
        for path in left.iter().chain(&others) {
            std::fs::write(path, "half").unwrap();
        }
        assert_eq!(blobs.sweep_documents().unwrap(), left.len());
        assert!(others.iter().all(|path| path.exists()) && !left.iter().any(|it| it.exists()));
        for name in names {
            assert!(documents.get(name).await.unwrap().is_some(), "{name}");
        }
        assert!(is_unfinished("a#1") && !is_unfinished("a") && !is_unfinished("a#1b"));
    }

    #[tokio::test]
    async fn the_unfinished_copies_of_one_document_are_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let documents = Blobs::open(&BlobStore::File, dir.path()).unwrap().documents("letters");
        documents.forget_unfinished("a|b").await.unwrap();
        documents.put("a|b", b"x".to_vec()).await.unwrap();
        let files = ["a%7Cb#1", "a%7Cb#3", "a%7Cbc#1"]
            .map(|name| dir.path().join("blobs/letters").join(name));
        for path in &files {
            std::fs::write(path, "half").unwrap();
        }
        documents.forget_unfinished("a|b").await.unwrap();
        assert_eq!(files.map(|path| path.exists()), [false, false, true]);
        assert!(documents.get("a|b").await.unwrap().is_some());
    }

    #[tokio::test]
    async fn no_name_leads_out_of_the_folder() {
        let dir = tempfile::tempdir().unwrap();
        let documents = Blobs::open(&BlobStore::File, dir.path()).unwrap().documents("letters");
        for name in ["../escaped", "/etc/escaped", "a/b", "..", "%2e%2e/escaped", "a\\b"] {
            documents.put(name, b"x".to_vec()).await.unwrap();
            assert_eq!(documents.get(name).await.unwrap().as_deref(), Some(&b"x"[..]), "{name}");
        }
        let inside = std::fs::read_dir(dir.path().join("blobs/letters")).unwrap().count();
        assert_eq!(inside, 6);
        assert_eq!(documents.list().await.unwrap().len(), 6);
    }
}
