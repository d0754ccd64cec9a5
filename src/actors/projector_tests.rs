//! What is told of a read model that cannot go on.

use chrono::DateTime;
use uuid::Uuid;

use super::*;
use crate::log::{EmbeddedLog, Expected, NewEvent};
use crate::media::blobs::Blobs;
use crate::media::vault::MasterKey;

async fn write(log: &dyn EventLog, id: u128) {
    let event = NewEvent {
        id: Uuid::from_u128(id),
        kind: "user.banned.v1".to_owned(),
        time: DateTime::UNIX_EPOCH,
        data: b"{}".to_vec(),
        metadata: b"{}".to_vec(),
    };
    log.append("user-ada", Expected::Any, vec![event]).await.unwrap();
}

#[actix::test]
async fn who_waits_hears_when_nothing_moves_any_more_and_when_it_does_again() {
    let dir = tempfile::tempdir().unwrap();
    let log: Arc<dyn EventLog> = Arc::new(EmbeddedLog::open(&dir.path().join("log")).unwrap());
    let views = Views::open(&dir.path().join("views.sqlite")).unwrap();
    let blobs = Blobs::open(&crate::config::BlobStore::File, dir.path()).unwrap();
    let keyring = Keyring::new(&blobs, MasterKey::kept_in(&dir.path().join("master.key")));
    // A disk that does not take what the views are to hold.
    let beside = rusqlite::Connection::open(dir.path().join("views.sqlite")).unwrap();
    let full = "BEFORE UPDATE ON checkpoint BEGIN SELECT RAISE(ABORT, 'full'); END";
    beside.execute_batch(&format!("CREATE TRIGGER full {full}")).unwrap();
    write(&*log, 1).await;

    let mut progress = Projector::new(Arc::clone(&log), views, keyring).start();
    assert!(!progress.reached_or_stuck(1).await);
    assert!(progress.now().stands_still);
    beside.execute_batch("DROP TRIGGER full").unwrap();
    while progress.now().stands_still {
        progress.moved().await;
    }
    assert!(progress.reached_or_stuck(1).await);
}
