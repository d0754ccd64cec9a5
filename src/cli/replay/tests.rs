use tokio::sync::watch;
use uuid::Uuid;

use super::*;
use crate::cli::interrupt::tests::{told, untold};
use crate::cli::log::Which;
use crate::log::{Appended, EmbeddedLog, Error, Expected, NewEvent, Recorded, Stats, Verified};

fn replay(data_dir: &Path, from_what_is_left: bool) -> Replay {
    let log = Which { data_dir: data_dir.to_owned(), setting: "embedded".to_owned() };
    let place = Place { log, blobs: "file".to_owned(), master_key: None };
    let (until, to, view, diff, skip) = (None, None, None, false, vec![]);
    Replay { place, until, to, view, diff, skip, from_what_is_left, even_if_parked: false }
}

/// Ids of events that no version understands.
const UNREADABLE: std::ops::Range<u128> = 100..200;

async fn log_of(path: &Path, ids: &[u128]) -> Arc<dyn EventLog> {
    let log = EmbeddedLog::open(path).unwrap();
    for id in ids {
        let kind = if UNREADABLE.contains(id) { "user.unheard_of.v1" } else { "user.banned.v1" };
        let event = NewEvent {
            id: Uuid::from_u128(*id),
            kind: kind.to_owned(),
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
    let at = || Seen::of(&dir.path().join("views.sqlite")).unwrap().unwrap().position;
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

#[test]
fn where_no_log_is_left_nothing_is_what_counts_from_now_on_and_only_where_that_is_meant() {
    let dir = tempfile::tempdir().unwrap();
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let seen = log_of(&dir.path().join("seen"), &[1, 2, 3]).await;
        replay(dir.path(), true).take_over(seen).await.unwrap();
    });
    let (log, views) = (dir.path().join("log.sqlite"), dir.path().join("views.sqlite"));
    let refused = format!("{:#}", replay(dir.path(), false).run().unwrap_err());
    assert!(refused.contains("there is no log") && !log.exists(), "{refused}");
    assert_eq!(Seen::of(&views).unwrap().unwrap().position, 3);
    replay(dir.path(), true).run().unwrap();
    assert!(log.exists());
    assert_eq!(Seen::of(&views).unwrap().unwrap().position, 0);
}

#[tokio::test]
async fn what_lies_beside_the_read_model_goes_with_it_and_not_before() {
    let dir = tempfile::tempdir().unwrap();
    let log = async |name: &str, ids: &[u128]| log_of(&dir.path().join(name), ids).await;
    let over = |skip: &[u64], from_what_is_left| {
        let replay = replay(dir.path(), from_what_is_left);
        Replay { skip: skip.to_vec(), ..replay }
    };
    let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap_or_default();
    let whole = log("whole", &[1, 101, 2, 102, 3]).await;
    over(&[2, 4], false).take_over(whole).await.unwrap();
    for name in layout::POSITIONS.iter().take(2) {
        std::fs::write(dir.path().join(name), "5").unwrap();
    }
    let all = || layout::POSITIONS.map(read);
    let before = all();
    assert_eq!(before, ["5", "5", "2\n4\n"]);

    // It fails when it is known already that the log is another one, or cut.
    let (another, cut) = (log("another", &[9]).await, log("cut", &[1, 101, 2]).await);
    for (log, of_left) in [(&another, false), (&cut, true)] {
        let refused = over(&[1], of_left).take_over(Arc::clone(log)).await.unwrap_err();
        assert!(refused.to_string().contains("can be read"), "{refused}");
        assert_eq!(all(), before);
    }

    // What is there of the same log is passed over still, and nothing is sent to Clerk anew.
    over(&[], true).take_over(cut).await.unwrap();
    assert_eq!(all(), ["3", "", "2\n"]);
    assert_eq!(read("views.skipped.of-another-log"), "2\n4\n");
    over(&[], false).take_over(another).await.unwrap();
    assert_eq!(all(), ["", "", ""]);
}

#[tokio::test]
async fn what_an_older_version_has_seen_is_asked_for_too() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("views.sqlite");
    let outdate = |and: &str| {
        let real = Views::open(&path).unwrap().present_file();
        let sql = rusqlite::Connection::open(real).unwrap();
        sql.execute_batch(&format!("PRAGMA user_version = 1; {and}")).unwrap();
    };
    let seen = log_of(&dir.path().join("seen"), &[1, 2, 3]).await;
    let cut = log_of(&dir.path().join("cut"), &[1, 2]).await;
    let which = Which { data_dir: dir.path().to_owned(), setting: "embedded".to_owned() };
    let take_over = async |log| replay(dir.path(), false).take_over(Arc::clone(log)).await;
    take_over(&seen).await.unwrap();
    outdate("");
    let refused = read_model::open_views(&*cut, &which).await.map(drop).unwrap_err().to_string();
    assert!(refused.contains("the log was cut or exchanged"), "{refused}");
    let told = take_over(&cut).await.unwrap_err().to_string();
    assert_eq!(told, refused);
    // Of the same log they begin anew.
    drop(read_model::open_views(&*seen, &which).await.unwrap());
    assert_eq!(Seen::of(&path).unwrap().unwrap().position, 0);

    // Where nobody can tell, no server may be at work.
    outdate("DROP TABLE checkpoint");
    let held = server_lock::take(dir.path()).unwrap();
    let told = take_over(&cut).await.unwrap_err().to_string();
    assert!(told.contains("nobody can tell whether the server that runs"), "{told}");
    drop(held);
    take_over(&cut).await.unwrap();
    assert_eq!(Seen::of(&path).unwrap().unwrap().position, 2);
}

#[tokio::test]
async fn an_event_that_was_given_up_is_passed_over_in_a_file_elsewhere_too() {
    let [data, place] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let to = place.path().join("views.sqlite");
    let log = log_of(&data.path().join("log"), &[1, 101, 2]).await;
    let stands =
        replay(data.path(), false).build(Arc::clone(&log), &to, untold()).await.unwrap_err();
    assert!(stands.to_string().contains("event at position 2"), "{stands}");
    std::fs::remove_file(&to).unwrap();
    let skipping = Replay { skip: vec![2], ..replay(data.path(), false) };
    skipping.take_over(Arc::clone(&log)).await.unwrap();
    replay(data.path(), false).build(log, &to, untold()).await.unwrap();
}

#[tokio::test]
async fn what_would_stand_still_does_not_replace_what_went_on_unless_that_is_meant() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("views.sqlite");
    let log = log_of(&dir.path().join("log"), &[1, 101, 2]).await;
    let take_over = async |skip: &[u64], even_if_parked| {
        let replay = replay(dir.path(), false);
        let replay = Replay { skip: skip.to_vec(), even_if_parked, ..replay };
        replay.take_over(Arc::clone(&log)).await.map_err(|error| format!("{error:#}"))
    };
    let present = || views::present_file(&base).unwrap();
    let parked = || views::peek(&base).unwrap().unwrap().parked.len();
    take_over(&[2], false).await.unwrap();
    let before = present();
    // What was given up is not known any more.
    std::fs::remove_file(dir.path().join("views.skipped")).unwrap();
    let refused = take_over(&[], false).await.unwrap_err();
    let words = "the view users would stand still at position 2, where the present read model";
    assert!(refused.starts_with("nothing was replaced") && refused.contains(words), "{refused}");
    assert!(refused.contains("user.unheard_of.v1"), "{refused}");
    assert_eq!((present(), parked()), (before.clone(), 0));
    assert!(!dir.path().join("views-2.sqlite").exists(), "the draft is gone");

    let stands = take_over(&[], true).await.unwrap_err();
    assert!(stands.starts_with("event at position 2: "), "{stands}");
    assert_eq!((present() == before, parked()), (false, 1));
    // Those stand still already.
    let before = present();
    take_over(&[], false).await.unwrap_err();
    assert_eq!((present() == before, parked()), (false, 1));
    // Those no server goes on with.
    take_over(&[2], false).await.unwrap();
    std::fs::remove_file(dir.path().join("views.skipped")).unwrap();
    let outdated = rusqlite::Connection::open(present()).unwrap();
    outdated.pragma_update(None, "user_version", 1).unwrap();
    drop(outdated);
    take_over(&[], false).await.unwrap_err();
    assert_eq!(parked(), 1);
}

#[tokio::test]
async fn what_somebody_keeps_under_the_next_name_stays() {
    let dir = tempfile::tempdir().unwrap();
    let log = log_of(&dir.path().join("log"), &[1, 2]).await;
    let foreign = dir.path().join("views-1.sqlite");
    std::fs::write(&foreign, "somebody's letters").unwrap();
    replay(dir.path(), false).take_over(log).await.unwrap();
    assert_eq!(std::fs::read_to_string(&foreign).unwrap(), "somebody's letters");
    let base = dir.path().join("views.sqlite");
    assert_eq!(views::present_file(&base).unwrap(), dir.path().join("views-2.sqlite"));
    assert_eq!(views::peek(&base).unwrap().unwrap().seen.position, 2);
}

fn at(second: i64) -> DateTime<Utc> {
    DateTime::UNIX_EPOCH + chrono::TimeDelta::seconds(second)
}

/// An event at each of these seconds, in this order.
async fn log_at(path: &Path, seconds: impl IntoIterator<Item = i64>) -> EmbeddedLog {
    let log = EmbeddedLog::open(path).unwrap();
    let event = |(number, second)| NewEvent {
        id: Uuid::from_u128(number),
        kind: "user.banned.v1".to_owned(),
        time: at(second),
        data: b"{}".to_vec(),
        metadata: b"{}".to_vec(),
    };
    let events: Vec<_> = (1..).zip(seconds).map(event).collect();
    for events in events.chunks(1000) {
        log.append("user-ada", Expected::Any, events.to_vec()).await.unwrap();
    }
    log
}

#[tokio::test]
async fn a_clock_that_was_wrong_for_a_while_cuts_nothing_off() {
    let dir = tempfile::tempdir().unwrap();
    // More than a page of them follow.
    let seconds = [1, 2, 99].into_iter().chain(std::iter::repeat_n(3, 1200)).chain([7, 8]);
    let log = log_at(&dir.path().join("log"), seconds).await;
    for (second, position) in
        [(0, 0), (1, 1), (2, 2), (3, 1203), (6, 1203), (7, 1204), (50, 1205), (100, 1205)]
    {
        let by = position_at(&log, at(second)).await.unwrap();
        assert_eq!(by.position(), position, "{second}");
    }
    let until = Some(Point::Time(at(6)));
    let replay = Replay { until, ..replay(dir.path(), false) };
    replay.take_over(Arc::new(log)).await.unwrap();
    let seen = Seen::of(&dir.path().join("views.sqlite")).unwrap().unwrap();
    assert_eq!(seen.position, 1203);
}

#[tokio::test]
async fn where_the_log_is_damaged_later_an_earlier_time_is_found_still() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let _writer = log_at(&path, std::iter::repeat_n(5, 1100)).await;
    let stranger = rusqlite::Connection::open(&path).unwrap();
    stranger.execute("UPDATE events SET data = X'7b' WHERE position = 1050", []).unwrap();
    // The one that writes has them in memory still.
    let log = EmbeddedLog::open_read_only(&path).unwrap();
    assert_eq!(position_at(&log, at(4)).await.unwrap().position(), 0);
    let damaged = position_at(&log, at(5)).await.unwrap_err();
    assert!(format!("{damaged:#}").contains("damaged at position 1050"), "{damaged:#}");
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
    let error = replay(data.path(), false).build(broken, &to, untold()).await.unwrap_err();
    assert_eq!((format!("{error:#}").contains("cut off"), left()), (true, 0), "{error:#}");
    let log = log_of(&data.path().join("log"), &[1, 2]).await;
    replay(data.path(), false).build(Arc::clone(&log), &to, untold()).await.unwrap();
    assert_eq!((left(), views::peek(&to).unwrap().unwrap().seen.position), (1, 2));
    let other = place.path().join("other.sqlite");
    let ended = replay(data.path(), false).build(Arc::clone(&log), &other, told()).await;
    assert_eq!(ended.unwrap_err().to_string(), "interrupted");
    let mut names = place.path().read_dir().unwrap().map(|entry| entry.unwrap().file_name());
    assert!(names.all(|name| !name.to_string_lossy().contains("other")));
    let again = replay(data.path(), false).build(log, &to, untold()).await.unwrap_err().to_string();
    assert!(again.contains("exists; name another"), "{again}");
}
