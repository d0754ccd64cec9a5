//! Events on the terminal, and their counts.

use std::collections::{BTreeMap, HashSet};
use std::io::{BufWriter, Write};

use anyhow::Context;
use chrono::{DateTime, Utc};
use clap::Args;
use serde_json::json;

use super::Where;
use super::selection::{Selection, Then};
use crate::actors::records::Envelope;
use crate::cli::output::{Stdout, say};
use crate::log::{EventLog, Recorded};

const PAGE: usize = 500;

#[derive(Args)]
pub struct Show {
    #[command(flatten)]
    place: Where,
    #[command(flatten)]
    selection: Selection,
    /// At most so many
    #[arg(long, default_value_t = u64::MAX, hide_default_value = true)]
    limit: u64,
    /// The newest first
    #[arg(long)]
    reverse: bool,
}

#[derive(Args)]
pub struct Tail {
    #[command(flatten)]
    place: Where,
    #[command(flatten)]
    selection: Selection,
    /// Begin so many events before the end, unless --from says where
    #[arg(long, default_value_t = 10)]
    last: u64,
    /// End after so many
    #[arg(long, default_value_t = u64::MAX, hide_default_value = true)]
    limit: u64,
}

#[derive(Args)]
pub struct Count {
    #[command(flatten)]
    place: Where,
    #[command(flatten)]
    selection: Selection,
}

/// Writes one event.
pub fn print(out: &mut impl Write, event: &Recorded, json: bool) -> std::io::Result<()> {
    if json {
        serde_json::to_writer(&mut *out, &Envelope::from(event))?;
        return writeln!(out);
    }
    let data = String::from_utf8_lossy(&event.data);
    let time = event.time.format("%Y-%m-%dT%H:%M:%S%.3fZ");
    let Recorded { position, revision, stream, kind, .. } = event;
    writeln!(out, "{position:>8}  {time}  {stream} #{revision}  {kind}  {data}")
}

impl Show {
    pub async fn run(self) -> anyhow::Result<()> {
        let log = self.place.log.open_for_reading().await?;
        let mut out = BufWriter::new(Stdout);
        let mut left = self.limit;
        if left == 0 {
            return Ok(());
        }
        let print_next = |event: &Recorded| {
            left -= 1;
            print(&mut out, event, self.place.json)?;
            Ok(if left == 0 { Then::Stop } else { Then::GoOn })
        };
        let printed = self.selection.walk(&*log, self.reverse, print_next).await;
        // What was read before a damaged event is shown too.
        out.flush()?;
        printed
    }
}

impl Tail {
    pub async fn run(self) -> anyhow::Result<()> {
        let log = self.place.log.open_for_reading().await?;
        let mut head = log.head();
        head.borrow_and_update();
        let mut after = match self.selection.from() {
            None => before_last(&*log, self.last).await?,
            Some(from) => from,
        };
        let mut left = self.limit;
        while left > 0 && after < self.selection.to() {
            loop {
                let page = crate::log::read_up_to_damage(&*log, after, PAGE).await;
                let page = page.context("reading the log")?;
                let mut out = BufWriter::new(Stdout);
                for event in page.iter().filter(|event| self.selection.wants(event)) {
                    if left == 0 {
                        break;
                    }
                    left -= 1;
                    print(&mut out, event, self.place.json)?;
                }
                out.flush()?;
                after = page.last().map_or(after, |event| event.position);
                if page.is_empty() || left == 0 || after >= self.selection.to() {
                    break;
                }
            }
            if left > 0 && after < self.selection.to() {
                head.changed().await.context("following the log")?;
            }
        }
        Ok(())
    }
}

/// The position after which the last `count` events are.
async fn before_last(log: &dyn EventLog, count: u64) -> anyhow::Result<u64> {
    let (mut left, mut before) = (count, *log.head().borrow());
    let note = |event: &Recorded| {
        if left == 0 {
            return Ok(Then::Stop);
        }
        (left, before) = (left - 1, event.position - 1);
        Ok(Then::GoOn)
    };
    Selection::everything().walk(log, true, note).await?;
    Ok(before)
}

impl Count {
    pub async fn run(self) -> anyhow::Result<()> {
        match self.selection.is_all() {
            true => self.of_all().await,
            false => self.of_some().await,
        }
    }

    async fn of_all(self) -> anyhow::Result<()> {
        let stats =
            self.place.log.open_for_reading().await?.stats().await.context("counting the log")?;
        let head_hash = hex::encode(stats.head_hash);
        if self.place.json {
            let stats = json!({
                "events": stats.events, "streams": stats.streams, "position": stats.position,
                "head_hash": head_hash, "bytes": stats.bytes, "types": stats.types,
                "first": stats.first, "last": stats.last,
            });
            say(format_args!("{stats}"));
            return Ok(());
        }
        say(format_args!("log        {}", self.place.log.shown()));
        say(format_args!("events     {}", stats.events));
        say(format_args!("streams    {}", stats.streams));
        say(format_args!("position   {}", stats.position));
        say(format_args!("bytes      {}", stats.bytes));
        say(format_args!("head hash  {head_hash}"));
        list(stats.first, stats.last, stats.types.into_iter());
        Ok(())
    }

    async fn of_some(self) -> anyhow::Result<()> {
        let log = self.place.log.open_for_reading().await?;
        let head = *log.head().borrow();
        let (mut events, mut streams) = (0_u64, HashSet::<String>::new());
        let mut types = BTreeMap::<String, u64>::new();
        let (mut first, mut last) = (None, None);
        let count = |event: &Recorded| {
            events += 1;
            if !streams.contains(&*event.stream) {
                streams.insert(event.stream.to_string());
            }
            *types.entry(event.kind.to_string()).or_default() += 1;
            first = first.or(Some(event.time));
            last = Some(event.time);
            Ok(Then::GoOn)
        };
        self.selection.walk(&*log, false, count).await?;
        if self.place.json {
            let types: BTreeMap<_, _> = types.iter().map(|(kind, n)| (&**kind, n)).collect();
            let counted = json!({
                "events": events, "streams": streams.len(), "position": head, "types": types,
                "first": first, "last": last,
            });
            say(format_args!("{counted}"));
            return Ok(());
        }
        say(format_args!("log        {}, up to position {head}", self.place.log.shown()));
        say(format_args!("events     {events}"));
        say(format_args!("streams    {}", streams.len()));
        list(first, last, types.into_iter());
        Ok(())
    }
}

fn list(
    first: Option<DateTime<Utc>>,
    last: Option<DateTime<Utc>>,
    types: impl Iterator<Item = (impl std::fmt::Display, u64)>,
) {
    for (label, time) in [("first", first), ("last", last)] {
        if let Some(time) = time {
            say(format_args!("{label:<9}  {}", time.to_rfc3339()));
        }
    }
    for (kind, count) in types {
        say(format_args!("{count:>9}  {kind}"));
    }
}
