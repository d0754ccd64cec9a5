//! Names that may not outlive a power cut. A file has its name before its directory is synced: where
//! that fails, or whoever was at it is killed, the file is found by the next one who looks, and must not
//! be believed yet.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::task::spawn_blocking;

/// Whether some directories were synced since the last failure in them. At first they were not: an
/// earlier process may have been killed.
#[derive(Debug)]
pub struct Settling {
    failures: AtomicU64,
    /// So many of them are made up for.
    settled: AtomicU64,
}

impl Default for Settling {
    fn default() -> Self {
        Self { failures: AtomicU64::new(1), settled: AtomicU64::new(0) }
    }
}

impl Settling {
    /// Something has failed in one of the directories.
    pub fn failed(&self) {
        self.failures.fetch_add(1, Ordering::SeqCst);
    }

    /// Syncs the directories if that is due; one that is not there has no names.
    ///
    /// # Errors
    /// They cannot be synced, which is then still due.
    pub async fn settle<const N: usize>(
        &self,
        directories: impl FnOnce() -> [PathBuf; N],
    ) -> io::Result<()> {
        let failures = self.failures.load(Ordering::SeqCst);
        if self.settled.load(Ordering::SeqCst) >= failures {
            return Ok(());
        }
        sync(directories()).await?;
        self.settled.fetch_max(failures, Ordering::SeqCst);
        Ok(())
    }
}

/// Syncs directories, those that are there.
///
/// # Errors
/// What the system said.
pub async fn sync<const N: usize>(directories: [PathBuf; N]) -> io::Result<()> {
    let syncing = spawn_blocking(move || directories.iter().try_for_each(|it| sync_one(it)));
    syncing.await.map_err(io::Error::other)?
}

fn sync_one(directory: &Path) -> io::Result<()> {
    match File::open(directory) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        opened => opened?.sync_all(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn directories_are_synced_once_and_again_after_a_failure() {
        let dir = tempfile::tempdir().unwrap();
        // There is nothing below a file, so that this cannot even be opened.
        let obstacle = dir.path().join("file");
        std::fs::write(&obstacle, "").unwrap();
        let (below, absent) = (obstacle.join("below"), dir.path().join("absent"));
        let settling = Settling::default();
        for _ in 0..2 {
            settling.settle(|| [absent.clone(), below.clone()]).await.unwrap_err();
        }
        std::fs::remove_file(&obstacle).unwrap();
        settling.settle(|| [absent.clone(), below.clone()]).await.unwrap();
        std::fs::write(&obstacle, "").unwrap();
        settling.settle(|| [below.clone()]).await.expect("it is not due");
        settling.failed();
        settling.settle(|| [below.clone()]).await.unwrap_err();
    }
}
