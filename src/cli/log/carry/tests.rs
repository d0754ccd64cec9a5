use rustix::process::{Signal as Number, getpid, kill_process};
use tokio::sync::watch;

use super::*;
use crate::log::{Appended, Error, Expected, NewEvent, Stats};

#[test]
fn of_two_exports_to_one_name_the_second_replaces_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("log.jsonl");
    let [(one, mut first), (two, mut second), (never, _)] =
        [(); 3].map(|()| Draft::beside(&to).unwrap());
    first.write_all(b"the first").unwrap();
    second.write_all(b"the second").unwrap();
    assert!(!to.exists());
    one.keep().unwrap();
    let refused = two.keep().unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::AlreadyExists);
    drop(never);
    assert_eq!(std::fs::read(&to).unwrap(), b"the first");
    assert_eq!(dir.path().read_dir().unwrap().count(), 1, "a draft was left");
}

/// A log whose server does not answer any more.
struct Silent(watch::Sender<u64>);

#[async_trait::async_trait]
impl EventLog for Silent {
    async fn append(&self, _: &str, _: Expected, _: Vec<NewEvent>) -> Result<Appended, Error> {
        std::future::pending().await
    }

    async fn read_stream(&self, _: &str, _: u64, _: usize) -> Result<Vec<Recorded>, Error> {
        std::future::pending().await
    }

    async fn read_all(&self, _: u64, _: usize) -> Result<Vec<Recorded>, Error> {
        std::future::pending().await
    }

    fn head(&self) -> watch::Receiver<u64> {
        self.0.subscribe()
    }

    fn writable(&self) -> Result<(), Error> {
        Ok(())
    }

    async fn stats(&self) -> Result<Stats, Error> {
        std::future::pending().await
    }

    async fn verify(&self) -> Result<Verified, Error> {
        std::future::pending().await
    }
}

#[tokio::test]
async fn who_interrupts_the_comparison_at_the_end_is_heard() {
    let log = Silent(watch::Sender::new(0));
    // As Ctrl-C, which would end the other tests too.
    let mut interrupt = Interrupt::on(SignalKind::user_defined2()).unwrap();
    kill_process(getpid(), Number::USR2).unwrap();
    let target = Target::Log { log: &log, carrying: Carrying::into(&log) };
    let told = target.finish(7, &mut interrupt).await.err().unwrap();
    assert_eq!(format!("{told:#}"), "comparing the two: interrupted");
}
