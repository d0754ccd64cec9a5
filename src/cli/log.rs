//! `t2m log`: read, follow, count, check and carry the log. It says which log it read and how far.

mod carry;
mod selection;
mod show;

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::say;
use crate::log::{EmbeddedLog, EventLog};

#[derive(Subcommand)]
pub enum Log {
    /// Print events
    Show(show::Show),
    /// Print events as they come, until interrupted
    Tail(show::Tail),
    /// Count events, streams and types
    Stats(show::Count),
    /// Walk the hash chain and name the first position that is wrong
    Verify(Where),
    /// Write the whole log as text, one event a line
    Export(carry::Export),
    /// Take in an exported log, all of it or nothing
    Import(carry::Import),
}

#[derive(Args)]
pub struct Where {
    /// Where the log lies; it may be in use by a server
    #[arg(long, env = "T2M_DATA_DIR", default_value = "./data")]
    data_dir: PathBuf,
    /// JSON instead of text
    #[arg(long)]
    json: bool,
}

impl Log {
    pub fn run(self) -> anyhow::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let done = runtime.block_on(async {
            match self {
                Self::Show(show) => show.run().await,
                Self::Tail(tail) => tail.run().await,
                Self::Stats(count) => count.run().await,
                Self::Verify(place) => verify(&place).await,
                Self::Export(export) => export.run().await,
                Self::Import(import) => import.run(),
            }
        });
        // A reader that has seen enough (`| head`) is no failure.
        match done {
            Err(error) if is_broken_pipe(&error) => Ok(()),
            other => other,
        }
    }
}

impl Where {
    fn path(&self) -> PathBuf {
        self.data_dir.join("log.sqlite")
    }

    fn open(&self) -> anyhow::Result<Arc<EmbeddedLog>> {
        open(&self.path()).map(Arc::new)
    }
}

/// A log beside whoever writes it.
pub fn open(path: &std::path::Path) -> anyhow::Result<EmbeddedLog> {
    EmbeddedLog::open_read_only(path).with_context(|| format!("opening the log {}", path.display()))
}

/// A bar on stderr, for `what` of so many events.
pub fn bar(what: &str, events: u64) -> anyhow::Result<ProgressBar> {
    let template = format!("{what} {{bar:40}} {{pos}}/{{len}} events {{per_sec}} {{eta}}");
    let style = ProgressStyle::with_template(&template)?;
    Ok(ProgressBar::new(events).with_style(style))
}

/// The chain shows that the log agrees with itself; keep the head hash elsewhere to show more.
async fn verify(place: &Where) -> anyhow::Result<()> {
    let log = place.open()?;
    let bar = bar("verify", *log.head().borrow())?;
    let moving = bar.clone();
    let verified = log.verify_after(0, move |position| moving.set_position(position)).await;
    bar.finish_and_clear();
    let verified = verified.context("verifying the log")?;
    let head_hash = hex::encode(verified.head_hash);
    if place.json {
        say(format_args!("{}", json!({ "events": verified.events, "head_hash": head_hash })));
    } else {
        say(format_args!(
            "{} events, each chained to the one before it; head hash {head_hash}",
            verified.events
        ));
    }
    Ok(())
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let io = cause.downcast_ref::<std::io::Error>();
        io.is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
    })
}
