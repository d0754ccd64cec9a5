//! `t2m replay`: the read model built anew from the log, beside the one in use.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use chrono::{DateTime, Utc};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use crate::actors::projector::Projector;
use crate::log::{EmbeddedLog, EventLog};
use crate::views::Views;

#[derive(Args)]
pub struct Replay {
    /// Where the log lies; it may be in use by a server
    #[arg(long, env = "T2M_DATA_DIR", default_value = "./data")]
    data_dir: PathBuf,
    /// Stop at a position, or at a time (RFC 3339)
    #[arg(long, value_name = "POSITION|TIME", value_parser = until)]
    until: Option<Until>,
    /// The file to build; must not exist [default: replayed.sqlite in the data directory]
    #[arg(long, value_name = "PATH")]
    to: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy)]
enum Until {
    Position(u64),
    Time(DateTime<Utc>),
}

fn until(text: &str) -> Result<Until, String> {
    if let Ok(position) = text.parse() {
        return Ok(Until::Position(position));
    }
    let time = DateTime::parse_from_rfc3339(text).map_err(|_| "neither a position nor a time")?;
    Ok(Until::Time(time.to_utc()))
}

impl Replay {
    pub fn run(self) -> anyhow::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let path = self.data_dir.join("log.sqlite");
            let log: Arc<dyn EventLog> = Arc::new(
                EmbeddedLog::open_read_only(&path)
                    .with_context(|| format!("opening the log {}", path.display()))?,
            );
            let target = self.to.unwrap_or_else(|| self.data_dir.join("replayed.sqlite"));
            anyhow::ensure!(
                !target.exists(),
                "{} exists; name another with --to",
                target.display()
            );
            let head = *log.head().borrow();
            let until = match self.until {
                None => head,
                Some(Until::Position(position)) => position.min(head),
                Some(Until::Time(time)) => position_at(log.as_ref(), time).await?,
            };
            let views = replay(log, &target, until).await?;
            println!("read model  {}", target.display());
            println!("position    {until} of {head}");
            for (table, rows, digest) in views.dump().context("reading the read model")? {
                println!("{table:<12}{rows:>9} rows  sha256 {digest}");
            }
            Ok(())
        })
    }
}

/// Builds a fresh read model up to `until`, with a progress bar.
///
/// # Errors
/// The log cannot be read, an event cannot be understood, or the file cannot be written.
pub async fn replay(log: Arc<dyn EventLog>, target: &Path, until: u64) -> anyhow::Result<Views> {
    let views = Views::open(target).context("making the read model")?;
    let projector = Projector::new(log, views.clone());
    let style = ProgressStyle::with_template("replay {bar:40} {pos}/{len} events {per_sec} {eta}")?;
    let bar = ProgressBar::new(until).with_style(style);
    while views.checkpoint() < until {
        if projector.apply_next(until).await.context("replaying the log")? == 0 {
            break;
        }
        bar.set_position(views.checkpoint());
    }
    bar.finish_and_clear();
    Ok(views)
}

/// The last position whose event happened at `time` or before.
async fn position_at(log: &dyn EventLog, time: DateTime<Utc>) -> anyhow::Result<u64> {
    let mut position = 0;
    loop {
        let page = log.read_all(position, 1000).await.context("reading the log")?;
        if page.is_empty() {
            return Ok(position);
        }
        for event in page {
            if event.time > time {
                return Ok(position);
            }
            position = event.position;
        }
    }
}
