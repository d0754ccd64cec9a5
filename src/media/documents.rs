//! Small documents by name, in the object store where the blobs lie: written whole, replaced whole,
//! durable when [`Documents::put`] returns.

use std::sync::Arc;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use futures_util::{StreamExt, TryStreamExt};
use object_store::path::{Path, PathPart};
use object_store::{ObjectStore, ObjectStoreExt, PutMode};

use super::blobs::Error;

/// One folder of documents. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Documents {
    store: Arc<dyn ObjectStore>,
    folder: Path,
}

/// A document, unread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    pub name: String,
    /// When it was written, by the store's clock.
    pub written_at: DateTime<Utc>,
}

impl Documents {
    pub(super) fn new(store: Arc<dyn ObjectStore>, folder: &str) -> Self {
        Self { store, folder: Path::from(folder) }
    }

    /// Writes a document in the place of the one of this name, if there is any.
    pub async fn put(&self, name: &str, bytes: Vec<u8>) -> Result<(), Error> {
        self.store.put(&self.location(name), bytes.into()).await?;
        Ok(())
    }

    /// Writes a document unless there is one of this name, and says whether it did. Of several
    /// that try at once, one does.
    pub async fn create(&self, name: &str, bytes: Vec<u8>) -> Result<bool, Error> {
        let (location, only_new) = (self.location(name), PutMode::Create);
        match self.store.put_opts(&location, bytes.into(), only_new.into()).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::AlreadyExists { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
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

#[cfg(test)]
mod tests {
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
