//! The store as a whole, for whoever checks it or carries it elsewhere: which blobs are there, and
//! the documents as they lie there, sealed ones sealed.

use std::collections::HashMap;
use std::path::{Path as FsPath, PathBuf};

use bytes::Bytes;
use futures_util::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions};

use super::blobs::{Blobs, Error, location};
use super::disk::Space;

impl Blobs {
    /// Every blob with its size in bytes, also those that were put aside.
    ///
    /// # Errors
    /// The store cannot be listed.
    pub async fn sizes(&self) -> Result<HashMap<String, u64>, Error> {
        let aside = self.all_aside().await?.into_iter().map(|aside| (aside.sha256, aside.size));
        let mut sizes: HashMap<_, _> = aside.collect();
        let mut listed = self.store.list(Some(&Path::from("sha256")));
        while let Some(object) = listed.try_next().await? {
            let name = object.location.filename().unwrap_or_default();
            if location(name).is_ok() {
                sizes.insert(name.to_owned(), object.size);
            }
        }
        Ok(sizes)
    }

    /// The file of a blob, where the store is a directory of this machine.
    pub fn file_of(&self, sha256: &str) -> Option<PathBuf> {
        let root = self.local_root()?;
        let own = root.join(location(sha256).ok()?.as_ref());
        if own.exists() {
            return Some(own);
        }
        let aside = std::fs::read_dir(root.join("aside").join(sha256)).ok()?;
        aside.flatten().map(|entry| entry.path()).next()
    }

    /// The names of a folder's documents, as they lie in the store.
    ///
    /// # Errors
    /// The store cannot be listed.
    pub async fn names_in(&self, folder: &str) -> Result<Vec<String>, Error> {
        let listed: Vec<_> = self.store.list(Some(&Path::from(folder))).try_collect().await?;
        let names = listed.iter().filter_map(|object| object.location.filename());
        let mut names: Vec<_> = names.map(str::to_owned).collect();
        names.sort();
        Ok(names)
    }

    /// A document by its name in the store; none if it is gone.
    ///
    /// # Errors
    /// The store's.
    pub async fn document(&self, folder: &str, name: &str) -> Result<Option<Bytes>, Error> {
        match self.store.get(&raw(folder, name)?).await {
            Ok(found) => Ok(Some(found.bytes().await?)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Writes a document under its name in the store, unless there is one.
    ///
    /// # Errors
    /// The store's.
    pub async fn bring_document(
        &self,
        folder: &str,
        name: &str,
        bytes: Vec<u8>,
    ) -> Result<(), Error> {
        let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        match self.store.put_opts(&raw(folder, name)?, bytes.into(), options).await {
            Ok(_) | Err(object_store::Error::AlreadyExists { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes a document by its name in the store; one that is not there is no error.
    ///
    /// # Errors
    /// The store's.
    pub async fn remove_document(&self, folder: &str, name: &str) -> Result<(), Error> {
        match self.store.delete(&raw(folder, name)?).await.map_err(Error::from) {
            Err(Error::NotFound) => Ok(()),
            other => other,
        }
    }

    /// The room on this machine's disk, where the store or its spool lies.
    ///
    /// # Errors
    /// The system does not say.
    pub fn space(&self) -> std::io::Result<Space> {
        Space::of(&self.root)
    }

    /// The directory of the store; none where it is elsewhere.
    pub fn local_root(&self) -> Option<&FsPath> {
        self.is_local.then_some(self.root.as_path())
    }
}

/// The name is the store's already: what is escaped in it stays so.
fn raw(folder: &str, name: &str) -> Result<Path, Error> {
    Path::parse(format!("{folder}/{name}")).map_err(|_| Error::NotFound)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::BlobStore;

    #[tokio::test]
    async fn a_document_of_any_name_is_carried_from_store_to_store() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let open = |dir: &tempfile::TempDir| Blobs::open(&BlobStore::File, dir.path()).unwrap();
        let (one, other) = (open(&one), open(&other));
        for name in ["plain", "auth0|7", "a/b", "100%", "ü"] {
            one.documents("keys").put(name, name.into()).await.unwrap();
        }
        for name in one.names_in("keys").await.unwrap() {
            let bytes = one.document("keys", &name).await.unwrap().unwrap();
            other.bring_document("keys", &name, bytes.to_vec()).await.unwrap();
            other.bring_document("keys", &name, b"again".to_vec()).await.unwrap();
        }
        for name in ["plain", "auth0|7", "a/b", "100%", "ü"] {
            let found = other.documents("keys").get(name).await.unwrap();
            assert_eq!(found.as_deref(), Some(name.as_bytes()));
        }
        let first = other.names_in("keys").await.unwrap().remove(0);
        other.remove_document("keys", &first).await.unwrap();
        assert_eq!(other.names_in("keys").await.unwrap().len(), 4);
    }
}
