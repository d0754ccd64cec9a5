use std::pin::pin;

use clap::Parser;
use futures_util::poll;
use rustix::process::{Signal as Number, getpid, kill_process};
use tokio::sync::watch;

use super::super::super::interrupt::tests::told;
use super::super::Log;
use super::*;
use crate::log::{Appended, Error, Expected, NewEvent, Stats};

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
    let target = Target::Log { log: &log, carrying: Carrying::into(&log) };
    let told = target.finish(7, &mut told()).await.err().unwrap();
    assert_eq!(format!("{told:#}"), "comparing the two: interrupted");
}

#[tokio::test]
async fn an_export_that_is_told_to_end_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let left = || dir.path().read_dir().unwrap().count();
    let (log, to) = (Silent(watch::Sender::new(7)), dir.path().join("log.jsonl"));
    let mut export = pin!(export_to(&log, &to));
    assert!(poll!(&mut export).is_pending());
    assert_eq!(left(), 2, "it has begun, and holds a lock");
    // As systemd does.
    kill_process(getpid(), Number::TERM).unwrap();
    let told = export.await.err().unwrap();
    assert_eq!((told.to_string(), left()), ("interrupted".to_owned(), 0));
}

#[derive(Parser)]
struct Line {
    #[command(subcommand)]
    log: Log,
}

#[test]
fn without_a_file_an_export_and_an_import_are_ends_of_a_pipe() {
    let parsed = |command: &str| Line::try_parse_from(["t2m", command]).unwrap().log;
    let paths = match (parsed("export"), parsed("import")) {
        (Log::Export(export), Log::Import(import)) => [export.to, import.from],
        _ => unreachable!("they are these two"),
    };
    assert!(paths.iter().all(|path| is_standard(path)), "{paths:?}");
}
