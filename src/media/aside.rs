//! How a blob that no file refers to goes: it is put aside first and destroyed later, so that
//! whoever stored the same bytes meanwhile loses nothing.
//!
//! The danger is an upload that finds its blob there already (or writes it anew), while the same
//! blob is judged unneeded because the upload's event is not to be seen yet. Whatever the order,
//! one of two things is true. Either the upload wrote the blob after it was put aside: then its
//! copy lies in the blob's own place, where [`Blobs::destroy`] never looks. Or its bytes are the
//! ones that were put aside: then its event follows within minutes, readers find the bytes aside
//! in the meantime, and the second look, a whole [grace time](GRACE) later, sees the event and
//! brings them back. No lock is needed, hence it holds for several servers on one bucket too. An
//! upload in pieces may wait for its event much longer, for as long as the log cannot be written:
//! its blob counts as needed while it is open, and is brought back from where other servers, which
//! do not know of it, have put it.
//!
//! A bucket moves nothing in one step: it copies and then deletes, and another server may come in
//! between. So what is brought back from aside there is copied and left: whoever was still putting
//! it aside deletes the copy in the blob's place without harm. It goes at a look a whole grace time
//! after it was put aside that finds the blob in its place.

use chrono::{DateTime, TimeDelta, Utc};
use futures_util::{StreamExt, TryStreamExt};
use object_store::{ObjectStore, ObjectStoreExt, path::Path};

use super::blobs::{Blobs, Error, location};

/// How old a blob must be before it is put aside, and how long it then lies there. Far longer than
/// what lies between the bytes of an upload and its event.
pub const GRACE: TimeDelta = TimeDelta::hours(6);
/// What is still being written must be older than the longest upload before it is swept.
const ABANDONED: TimeDelta = TimeDelta::hours(48);

/// A blob that was put aside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Aside {
    pub sha256: String,
    /// When that was, in whole seconds.
    pub since: DateTime<Utc>,
    /// In bytes.
    pub size: u64,
    pub(super) location: Path,
}

impl Blobs {
    /// Blobs of that age, for which the caller finds out whether they are needed.
    ///
    /// # Errors
    /// The store cannot be listed.
    pub async fn old(&self, now: DateTime<Utc>) -> Result<Vec<String>, Error> {
        let mut listed = self.small.list(Some(&Path::from("sha256")));
        let mut old = Vec::new();
        while let Some(object) = listed.next().await.transpose()? {
            let name = object.location.filename().unwrap_or_default();
            if now - object.last_modified >= GRACE && location(name).is_ok() {
                old.push(name.to_owned());
            }
        }
        Ok(old)
    }

    /// Puts a blob aside; one that is not there is no error. It can still be read.
    ///
    /// # Errors
    /// The store's.
    pub async fn put_aside(&self, sha256: &str, now: DateTime<Utc>) -> Result<(), Error> {
        // The time is part of the name: a store keeps or changes a file's own as it likes.
        let aside = Path::from(format!("aside/{sha256}/{}", now.timestamp()));
        absent_is_fine(self.store.rename(&location(sha256)?, &aside).await)
    }

    /// All that was put aside.
    ///
    /// # Errors
    /// The store cannot be listed.
    pub async fn all_aside(&self) -> Result<Vec<Aside>, Error> {
        self.list_aside("aside".to_owned()).await
    }

    /// Gives a blob its place back, and says whether it was not in it.
    ///
    /// # Errors
    /// [`Error::NotFound`] when it is neither here nor there.
    pub async fn bring_back(&self, sha256: &str) -> Result<bool, Error> {
        let place = location(sha256)?;
        match self.small.head(&place).await {
            Ok(_) => return Ok(false),
            Err(object_store::Error::NotFound { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        if let Some(aside) = self.aside(sha256).await? {
            absent_is_fine(match self.is_local {
                true => self.store.rename(&aside.location, &place).await,
                false => self.store.copy(&aside.location, &place).await,
            })?;
            self.leave(sha256).await;
        }
        self.small.head(&place).await?;
        Ok(true)
    }

    /// Ends what was put aside, and nothing else: the same bytes in their own place stay.
    ///
    /// # Errors
    /// The store's.
    pub async fn destroy(&self, aside: &Aside) -> Result<(), Error> {
        absent_is_fine(self.small.delete(&aside.location).await)?;
        self.leave(&aside.sha256).await;
        Ok(())
    }

    /// Removes the directory that a blob has left, unless others lie there: directories are all
    /// that a local store would keep of its blobs, and every look would walk through them. Whoever
    /// puts a blob there at that moment makes it anew.
    async fn leave(&self, sha256: &str) {
        if self.is_local {
            // What cannot be removed costs a look and nothing else.
            let _ = tokio::fs::remove_dir(self.root.join("aside").join(sha256)).await;
        }
    }

    /// Removes what other servers' crashes left half written in the store.
    ///
    /// # Errors
    /// The store's.
    pub async fn sweep_abandoned(&self, now: DateTime<Utc>) -> Result<usize, Error> {
        let listed: Vec<_> = self.small.list(Some(&Path::from("incoming"))).try_collect().await?;
        let mut swept = 0;
        for object in listed.iter().filter(|object| now - object.last_modified >= ABANDONED) {
            absent_is_fine(self.small.delete(&object.location).await)?;
            swept += 1;
        }
        Ok(swept)
    }

    /// The newest, should there be several.
    pub(super) async fn aside(&self, sha256: &str) -> Result<Option<Aside>, Error> {
        location(sha256)?;
        let found = self.list_aside(format!("aside/{sha256}")).await?;
        Ok(found.into_iter().max_by_key(|aside| aside.since))
    }

    async fn list_aside(&self, folder: String) -> Result<Vec<Aside>, Error> {
        let listed: Vec<_> = self.small.list(Some(&Path::from(folder))).try_collect().await?;
        let aside = listed.into_iter().filter_map(|object| {
            let since = object.location.filename()?.parse().ok()?;
            let sha256 = object.location.parts().nth_back(1)?.as_ref().to_owned();
            Some(Aside {
                sha256,
                since: DateTime::from_timestamp(since, 0)?,
                size: object.size,
                location: object.location,
            })
        });
        Ok(aside.collect())
    }
}

fn absent_is_fine(outcome: object_store::Result<()>) -> Result<(), Error> {
    match outcome {
        Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
