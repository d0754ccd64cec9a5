use std::pin::pin;

use clap::Parser;
use futures_util::poll;
use rustix::process::{Signal as Number, getpid, kill_process};
use tokio::sync::watch;

use super::super::super::interrupt::tests::told;
use super::super::Log;
use super::super::tests::{embedded_in, filled, see};
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

/// The lines of an export of 28 events, the header first.
async fn exported() -> Vec<String> {
    let dir = tempfile::tempdir().unwrap();
    let (log, mut text) = (filled(dir.path(), 1..=28).await, Vec::new());
    export(&log, &mut text).await.unwrap();
    String::from_utf8(text).unwrap().lines().map(str::to_owned).collect()
}

/// As it is told, or with how many events there are then.
async fn import(lines: &[String], to: &Which) -> Result<u64, String> {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("log.jsonl");
    std::fs::write(&file, lines.join("\n") + "\n").unwrap();
    let (text, header) = Text::open(&file).unwrap();
    let brought = bring(Source::Text(text), header, to, "importing").await;
    brought.map(|brought| brought.verified.events).map_err(|refused| format!("{refused:#}"))
}

#[tokio::test]
async fn a_gap_is_named_at_its_place_also_where_the_header_counts_without_it() {
    let whole = exported().await;
    let says = |lines: &mut Vec<String>, events: u64| {
        lines[0] = lines[0].replacen("\"events\":28", &format!("\"events\":{events}"), 1);
    };
    let mut gap = whole.clone();
    gap.remove(9);
    says(&mut gap, 27);
    // The last line is missing, and the header counts without it.
    let mut cut = whole[..28].to_vec();
    says(&mut cut, 27);
    let mut more = whole.clone();
    says(&mut more, 27);
    let mut doubled = whole.clone();
    doubled.push(whole[28].clone());
    for (lines, sentence) in [
        (gap, "line 10: position 9: the event is missing"),
        (cut, "line 1: the last event's hash is not the one that the header names"),
        (more, "line 29: the export has more than the 27 events that its header names"),
        (doubled, "line 30: the export has more than the 28 events that its header names"),
    ] {
        let to = tempfile::tempdir().unwrap();
        let refused = import(&lines, &embedded_in(to.path())).await.unwrap_err();
        assert!(
            refused.contains("nothing was changed") && refused.ends_with(sentence),
            "{refused}"
        );
        assert!(!to.path().join("log.sqlite").exists(), "{sentence}");
    }
}

#[tokio::test]
async fn of_what_is_more_than_the_header_names_nothing_goes_into_a_log_that_takes_one_by_one() {
    let mut lines = exported().await;
    lines[0] = lines[0].replacen("\"events\":28", "\"events\":20", 1);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("log.jsonl");
    std::fs::write(&file, lines.join("\n") + "\n").unwrap();
    let (text, header) = Text::open(&file).unwrap();
    let mut taken = Vec::new();
    let take = async |events: &[Recorded]| {
        taken.extend(events.iter().map(|event| event.position));
        Ok::<(), Stopped>(())
    };
    let refused = pump(&mut Source::Text(text), &header, "import", take).await.unwrap_err();
    let sentence = "line 22: the export has more than the 20 events that its header names";
    assert_eq!(refused.to_string(), sentence);
    assert_eq!(taken, Vec::from_iter(1..=20));
}

#[tokio::test]
async fn events_are_brought_back_where_a_read_model_has_seen_them_and_the_log_is_gone() {
    let [from, one, other] = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let log = filled(from.path(), 1..=28).await;
    let events = log.read_all(0, 28).await.unwrap();
    let [one, other] = [&one, &other].map(|dir| {
        see(dir.path(), &events);
        embedded_in(dir.path())
    });
    for which in [&one, &other] {
        which.ensure_no_loss_before_opening().await.unwrap_err();
    }
    assert_eq!(import(&exported().await, &one).await, Ok(28));
    assert_eq!(copy_into(&log, &other, "copying").await.unwrap().verified.events, 28);
    for which in [&one, &other] {
        which.ensure_no_loss_before_opening().await.unwrap();
    }
}
