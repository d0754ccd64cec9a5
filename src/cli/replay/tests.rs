use tokio::sync::watch;
use uuid::Uuid;

use super::*;
use crate::cli::log::Which;
use crate::log::{Appended, EmbeddedLog, Error, Expected, NewEvent, Recorded, Stats, Verified};

fn replay(data_dir: &Path, from_what_is_left: bool) -> Replay {
    let log = Which { data_dir: data_dir.to_owned(), setting: "embedded".to_owned() };
    let place = Place { log, blobs: "file".to_owned(), master_key: None };
    let (until, to, view, diff, skip) = (None, None, None, false, vec![]);
    Replay { place, until, to, view, diff, skip, from_what_is_left }
}

async fn log_of(path: &Path, ids: &[u128]) -> Arc<dyn EventLog> {
    let log = EmbeddedLog::open(path).unwrap();
    for id in ids {
        let event = NewEvent {
            id: Uuid::from_u128(*id),
            kind: "user.banned.v1".to_owned(),
            time: DateTime::UNIX_EPOCH,
            data: b"{}".to_vec(),
            metadata: b"{}".to_vec(),
        };
        log.append("user-ada", Expected::Any, vec![event]).await.unwrap();
    }
    Arc::new(log)
}

#[tokio::test]
async fn the_last_that_knows_of_lost_events_is_replaced_only_where_that_is_meant() {
    let dir = tempfile::tempdir().unwrap();
    let seen = log_of(&dir.path().join("seen"), &[1, 2, 3]).await;
    let at = || views::peek(&dir.path().join("views.sqlite")).unwrap().unwrap().seen.position;
    let [position, aside] = ["callbacks-position", "callbacks-position.of-another-log"]
        .map(|name| dir.path().join(name));
    for (name, ids, words) in [
        ("empty", &[][..], "is empty, but the read model in"),
        ("cut", &[1, 2], "the log was cut or exchanged"),
        ("parted", &[1, 2, 4, 5], "has another event at 3 than"),
    ] {
        replay(dir.path(), true).take_over(Arc::clone(&seen)).await.unwrap();
        std::fs::write(&position, "2").unwrap();
        let log = log_of(&dir.path().join(name), ids).await;
        let refused = replay(dir.path(), false).take_over(Arc::clone(&log)).await.unwrap_err();
        let refused = refused.to_string();
        assert!(refused.starts_with("T2M_LOG: ") && refused.contains(words), "{refused}");
        assert!(refused.contains("--from-what-is-left"), "{refused}");
        assert_eq!((at(), position.exists()), (3, true), "{name}");
        replay(dir.path(), true).take_over(log).await.unwrap();
        assert_eq!((at(), position.exists()), (ids.len() as u64, false), "{name}");
        std::fs::remove_file(&aside).unwrap();
    }
    // As a server does.
    std::fs::write(&position, "2").unwrap();
    let another = log_of(&dir.path().join("another"), &[9]).await;
    replay(dir.path(), false).take_over(another).await.unwrap();
    assert!(at() == 1 && !position.exists() && aside.exists());
}

/// A log that cannot be read to its end.
struct Broken(watch::Sender<u64>);

#[async_trait::async_trait]
impl EventLog for Broken {
    async fn append(&self, _: &str, _: Expected, _: Vec<NewEvent>) -> Result<Appended, Error> {
        unreachable!("it is only read")
    }

    async fn read_stream(&self, _: &str, _: u64, _: usize) -> Result<Vec<Recorded>, Error> {
        unreachable!("it is read as a whole")
    }

    async fn read_all(&self, _: u64, _: usize) -> Result<Vec<Recorded>, Error> {
        Err(Error::Storage("cut off".to_owned()))
    }

    fn head(&self) -> watch::Receiver<u64> {
        self.0.subscribe()
    }

    fn writable(&self) -> Result<(), Error> {
        Ok(())
    }

    async fn stats(&self) -> Result<Stats, Error> {
        unreachable!("nobody counts")
    }

    async fn verify(&self) -> Result<Verified, Error> {
        unreachable!("nobody verifies")
    }
}

#[tokio::test]
async fn a_file_that_was_not_built_to_its_end_is_none() {
    let [data, place] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let to = place.path().join("views.sqlite");
    let left = || place.path().read_dir().unwrap().count();
    let broken: Arc<dyn EventLog> = Arc::new(Broken(watch::Sender::new(7)));
    let told = replay(data.path(), false).build(broken, &to).await.unwrap_err();
    assert_eq!((format!("{told:#}").contains("cut off"), left()), (true, 0), "{told:#}");
    let log = log_of(&data.path().join("log"), &[1, 2]).await;
    replay(data.path(), false).build(Arc::clone(&log), &to).await.unwrap();
    assert_eq!((left(), views::peek(&to).unwrap().unwrap().seen.position), (1, 2));
    let again = replay(data.path(), false).build(log, &to).await.unwrap_err().to_string();
    assert!(again.contains("exists; name another"), "{again}");
}
