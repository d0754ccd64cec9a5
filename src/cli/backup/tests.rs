use std::collections::HashSet;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use chrono::DateTime;
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use tokio::sync::watch;
use uuid::Uuid;

use super::files::place;
use super::*;
use crate::cli::log::tests::{alter, see};
use crate::log::{Appended, EmbeddedLog, Error, Expected, NewEvent, Recorded, Stats};

/// A log to which somebody stores one more file whenever it was read to its end.
struct Growing {
    log: EmbeddedLog,
    data_dir: TempDir,
    files: AtomicU32,
}

impl Growing {
    fn new() -> Self {
        let data_dir = tempfile::tempdir().unwrap();
        let log = EmbeddedLog::open(&data_dir.path().join("log.sqlite")).unwrap();
        Self { log, data_dir, files: AtomicU32::new(0) }
    }

    async fn store_next(&self) -> String {
        let number = self.files.fetch_add(1, Ordering::Relaxed);
        let text = format!("file {number}");
        let sha256 = hex::encode(Sha256::digest(&text));
        let path = place(self.data_dir.path(), &sha256);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, &text).unwrap();
        let stored = NewEvent {
            id: Uuid::from_u128(number.into()),
            kind: "file.stored.v1".to_owned(),
            time: DateTime::UNIX_EPOCH,
            data: json!({ "sha256": sha256, "size": text.len() }).to_string().into_bytes(),
            metadata: b"{}".to_vec(),
        };
        self.log.append(&format!("file-{number}"), Expected::Any, vec![stored]).await.unwrap();
        sha256
    }

    fn backup_to(&self, to: &Path) -> Backup {
        let (data_dir, setting) = (self.data_dir.path().to_owned(), "embedded".to_owned());
        Backup {
            to: to.to_owned(),
            log: Which { data_dir, setting },
            store: "file".to_owned(),
            master_key: None,
            blobs: None,
            json: false,
        }
    }

    fn blobs(&self) -> Blobs {
        Blobs::open(&BlobStore::File, self.data_dir.path()).unwrap()
    }
}

#[async_trait::async_trait]
impl EventLog for Growing {
    async fn append(
        &self,
        stream: &str,
        expected: Expected,
        events: Vec<NewEvent>,
    ) -> Result<Appended, Error> {
        self.log.append(stream, expected, events).await
    }

    async fn read_stream(
        &self,
        stream: &str,
        from: u64,
        limit: usize,
    ) -> Result<Vec<Recorded>, Error> {
        self.log.read_stream(stream, from, limit).await
    }

    async fn read_all(&self, after: u64, limit: usize) -> Result<Vec<Recorded>, Error> {
        let page = self.log.read_all(after, limit).await?;
        if page.is_empty() {
            self.store_next().await;
        }
        Ok(page)
    }

    fn head(&self) -> watch::Receiver<u64> {
        self.log.head()
    }

    fn writable(&self) -> Result<(), Error> {
        self.log.writable()
    }

    async fn stats(&self) -> Result<Stats, Error> {
        self.log.stats().await
    }

    async fn verify(&self) -> Result<Verified, Error> {
        self.log.verify().await
    }
}

#[tokio::test]
async fn beside_a_file_that_was_lost_all_others_of_a_log_that_grows_are_in_the_backup() {
    let (growing, to) = (Growing::new(), tempfile::tempdir().unwrap());
    let lost = growing.store_next().await;
    std::fs::remove_file(place(growing.data_dir.path(), &lost)).unwrap();
    let mut reading = Reading::of(&growing);
    let backup = growing.backup_to(to.path());
    let (verified, needed, copying) =
        backup.copy_log_and_blobs(&growing, &mut reading, &growing.blobs()).await.unwrap();
    let names: HashSet<_> = needed.blobs().into_keys().collect();
    let there = |sha256: &&String| place(to.path(), sha256).exists();
    let absent: Vec<_> = names.iter().filter(|it| !there(it)).cloned().collect();
    assert_eq!((&absent, &copying.missing), (&vec![lost.clone()], &vec![lost]));
    assert_eq!((names.len() as u64, verified.events), (TRIES.into(), TRIES.into()));
    copying.ensure_whole(&needed, to.path()).unwrap();
    let one = names.iter().find(there).unwrap();
    std::fs::remove_file(place(to.path(), one)).unwrap();
    let refused = copying.ensure_whole(&needed, to.path()).unwrap_err().to_string();
    assert_eq!(refused, format!("the file {one} is not in the backup"));
}

#[tokio::test]
async fn a_log_that_has_lost_its_end_is_not_backed_up() {
    let (growing, to) = (Growing::new(), tempfile::tempdir().unwrap());
    for _ in 0..3 {
        growing.store_next().await;
    }
    let events = growing.log.read_all(0, 3).await.unwrap();
    let data_dir = growing.data_dir.path();
    see(data_dir, &events);
    let backup = growing.backup_to(&to.path().join("whole"));
    assert_eq!(backup.make().await.unwrap().0.log.events, 3);
    alter(data_dir, "DELETE FROM events WHERE position = 3");
    let backup = growing.backup_to(&to.path().join("cut"));
    let refused = backup.make().await.map(drop).unwrap_err();
    assert!(format!("{refused:#}").contains("is damaged at position 3: "), "{refused:#}");
    assert!(!backup.to.exists());
    see(data_dir, &events[..2]);
    assert_eq!(backup.make().await.unwrap().0.log.events, 2);
}
