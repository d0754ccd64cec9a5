//! `t2m log`: read, follow, count and check the log. It says which log it read and how far.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use crate::log::{EmbeddedLog, EventLog, Recorded};

#[derive(Subcommand)]
pub enum Log {
    /// Print events
    Show(Show),
    /// Print events as they come, until interrupted
    Tail(Tail),
    /// Count events, streams and types
    Stats(Where),
    /// Walk the hash chain and name the first position that is wrong
    Verify(Where),
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

#[derive(Args)]
pub struct Show {
    #[command(flatten)]
    place: Where,
    /// Only this stream, such as `job-0198…`
    #[arg(long)]
    stream: Option<String>,
    /// Only types that begin so, such as `job.` or `job.failed.v1`
    #[arg(long = "type", value_name = "TYPE")]
    kind: Option<String>,
    /// Only events after this position
    #[arg(long, default_value_t = 0, value_name = "POSITION")]
    from: u64,
    /// At most so many
    #[arg(long, default_value_t = u64::MAX, hide_default_value = true)]
    limit: u64,
}

#[derive(Args)]
pub struct Tail {
    #[command(flatten)]
    place: Where,
    /// Begin so many events before the end
    #[arg(long, default_value_t = 10)]
    last: u64,
}

const PAGE: usize = 500;

impl Log {
    pub fn run(self) -> anyhow::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let done = runtime.block_on(async {
            match self {
                Self::Show(show) => show.run().await,
                Self::Tail(tail) => tail.run().await,
                Self::Stats(place) => stats(&place).await,
                Self::Verify(place) => verify(&place).await,
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
    fn open(&self) -> anyhow::Result<Arc<EmbeddedLog>> {
        let path = self.data_dir.join("log.sqlite");
        let log = EmbeddedLog::open_read_only(&path);
        Ok(Arc::new(log.with_context(|| format!("opening the log {}", path.display()))?))
    }

    fn print(&self, event: &Recorded) -> anyhow::Result<()> {
        let mut out = std::io::stdout().lock();
        if self.json {
            writeln!(out, "{}", envelope(event))?;
        } else {
            let data = String::from_utf8_lossy(&event.data);
            let time = event.time.format("%Y-%m-%dT%H:%M:%S%.3fZ");
            let (position, revision) = (event.position, event.revision);
            writeln!(
                out,
                "{position:>8}  {time}  {} #{revision}  {}  {data}",
                event.stream, event.kind
            )?;
        }
        Ok(())
    }
}

impl Show {
    async fn run(self) -> anyhow::Result<()> {
        let log = self.place.open()?;
        let (mut after, mut shown) = (self.from, 0);
        loop {
            let page = log.read_all(after, PAGE).await.context("reading the log")?;
            let Some(last) = page.last() else { return Ok(()) };
            after = last.position;
            for event in page.iter().filter(|event| self.wanted(event)) {
                if shown == self.limit {
                    return Ok(());
                }
                self.place.print(event)?;
                shown += 1;
            }
        }
    }

    fn wanted(&self, event: &Recorded) -> bool {
        self.stream.as_deref().is_none_or(|stream| *event.stream == *stream)
            && self.kind.as_deref().is_none_or(|kind| event.kind.starts_with(kind))
    }
}

impl Tail {
    async fn run(self) -> anyhow::Result<()> {
        let log = self.place.open()?;
        let mut head = log.head();
        let mut after = head.borrow_and_update().saturating_sub(self.last);
        loop {
            loop {
                let page = log.read_all(after, PAGE).await.context("reading the log")?;
                for event in &page {
                    self.place.print(event)?;
                    after = event.position;
                }
                if page.len() < PAGE {
                    break;
                }
            }
            head.changed().await.context("following the log")?;
        }
    }
}

async fn stats(place: &Where) -> anyhow::Result<()> {
    let stats = place.open()?.stats().await.context("counting the log")?;
    let head_hash = hex::encode(stats.head_hash);
    if place.json {
        let stats = json!({
            "events": stats.events, "streams": stats.streams, "position": stats.position,
            "head_hash": head_hash, "bytes": stats.bytes, "types": stats.types,
            "first": stats.first, "last": stats.last,
        });
        println!("{stats}");
        return Ok(());
    }
    println!("log        {}", place.data_dir.join("log.sqlite").display());
    println!("events     {}", stats.events);
    println!("streams    {}", stats.streams);
    println!("position   {}", stats.position);
    println!("bytes      {}", stats.bytes);
    println!("head hash  {head_hash}");
    for (label, time) in [("first", stats.first), ("last", stats.last)] {
        if let Some(time) = time {
            println!("{label:<9}  {}", time.to_rfc3339());
        }
    }
    for (kind, count) in stats.types {
        println!("{count:>9}  {kind}");
    }
    Ok(())
}

/// The chain shows that the log agrees with itself; keep the head hash elsewhere to show more.
async fn verify(place: &Where) -> anyhow::Result<()> {
    let verified = place.open()?.verify().await.context("verifying the log")?;
    let head_hash = hex::encode(verified.head_hash);
    if place.json {
        println!("{}", json!({ "events": verified.events, "head_hash": head_hash }));
    } else {
        println!(
            "{} events, each chained to the one before it; head hash {head_hash}",
            verified.events
        );
    }
    Ok(())
}

fn envelope(event: &Recorded) -> Value {
    let parsed = |bytes: &[u8]| {
        let text = || Value::String(String::from_utf8_lossy(bytes).into_owned());
        serde_json::from_slice(bytes).unwrap_or_else(|_| text())
    };
    json!({
        "id": event.id, "stream": *event.stream, "revision": event.revision,
        "position": event.position, "type": *event.kind, "time": event.time,
        "data": parsed(&event.data), "metadata": parsed(&event.metadata),
        "hash": hex::encode(event.hash),
    })
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<std::io::Error>();
    io.is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}
