//! `t2m replay`: the read model built anew from the log, beside the one in use.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use chrono::{DateTime, Utc};
use clap::Args;

use super::draft::Draft;
use super::interrupt::Interrupt;
use super::keys::Place;
use super::log::{bar, unit};
use super::{layout, owner, read_model, say, server_lock};
use crate::actors::keyring::Keyring;
use crate::actors::rebuild::{beside, ensure_unreadable, rebuild};
use crate::actors::standing::{self, Standing};
use crate::log::EventLog;
use crate::views::{self, Building, Difference, Parked, Snapshot, View, Views};

#[derive(Args)]
pub struct Replay {
    #[command(flatten)]
    place: Place,
    /// Stop at a position, or at a time (RFC 3339); while a server runs only with --to
    #[arg(long, value_name = "POSITION|TIME", value_parser = until, conflicts_with = "diff")]
    until: Option<Until>,
    /// Build this file, which must not exist, instead of what the server reads
    #[arg(long, value_name = "PATH", conflicts_with = "diff")]
    to: Option<PathBuf>,
    /// Build this view alone: users, sessions, files or jobs; only with --to or --diff
    #[arg(long, value_name = "VIEW", value_parser = view)]
    view: Option<View>,
    /// Compare what the server reads with a replay, row by row, and change nothing; exit code 1 if
    /// they differ
    #[arg(long)]
    diff: bool,
    /// Pass over the event at this position from now on; may be given several times
    #[arg(long, value_name = "POSITION", conflicts_with_all = ["to", "diff"])]
    skip: Vec<u64>,
    /// Although the log lacks events that the read model has seen, which no server accepts: what is left
    /// counts from now on
    #[arg(long, conflicts_with_all = ["to", "diff"])]
    from_what_is_left: bool,
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

fn view(name: &str) -> Result<View, String> {
    View::parse(name).ok_or_else(|| "none of users, sessions, files, jobs".to_owned())
}

impl Replay {
    pub fn run(self) -> anyhow::Result<()> {
        anyhow::ensure!(
            self.view.is_none() || self.to.is_some() || self.diff,
            "one view alone cannot take its place, since counts and event streams are told by \
             several: `t2m replay` repairs all of them; with --to or --diff, --view builds a part"
        );
        if self.to.is_none() {
            // A comparison too builds beside what it compares with.
            owner::refuse_root(self.place.data_dir())?;
        }
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        runtime.block_on(async {
            let log = self.place.log.open_for_reading().await?;
            if self.diff {
                return self.compare(log).await;
            }
            match &self.to {
                Some(to) => self.build(log, to).await,
                None => self.take_over(log).await,
            }
        })
    }

    /// Beside the views in use, and then in their place.
    async fn take_over(&self, log: Arc<dyn EventLog>) -> anyhow::Result<()> {
        let base = self.base();
        // If it is of another log: until the end, so that no server starts on what is replaced.
        let mut held = self.hold_if_of_another(&*log).await?;
        if self.until.is_some() && held.is_none() {
            held = Some(server_lock::take(self.place.data_dir())?.context(
                "a server runs: it would answer from an earlier time until it has caught up; \
                 --to builds a file of its own",
            )?);
        }
        let keyring = self.keyring()?;
        ensure_unreadable(&*log, &keyring, &self.skip).await?;
        if !self.skip.is_empty() {
            views::skip(&base, &self.skip).context("noting what is to be passed over")?;
        }
        for position in &self.skip {
            say(format_args!("event {position} is passed over from now on"));
        }
        let (head, until) = self.end(&*log).await?;
        let building = beside(&base).await.context("making the read model")?;
        let built = with_bar(log, keyring, building, until).await?;
        let views = built.finish_as_current().context("making the read model durable")?;
        summary(&views, head, &base)?;
        let then = match held {
            None => "A server that runs takes it over within a second or two.",
            Some(_) => "The next server goes on from there.",
        };
        say(format_args!("{then}"));
        Ok(())
    }

    /// What a running server reads is never replaced by what another log says; and where the log lacks
    /// what was seen, the read model is the last that knows.
    async fn hold_if_of_another(&self, log: &dyn EventLog) -> anyhow::Result<Option<File>> {
        // What cannot be looked into is to be replaced anyhow.
        let Ok(Some(found)) = views::peek(&self.base()) else { return Ok(None) };
        let standing = standing::of(log, &found.seen).await.context("reading the log")?;
        if standing == Standing::Same {
            return Ok(None);
        }
        let held = server_lock::take(self.place.data_dir())?.with_context(|| {
            format!(
                "a server runs in {} over another log than {}: T2M_LOG or --log must name its own",
                self.place.data_dir().display(),
                self.place.log.shown()
            )
        })?;
        if !self.from_what_is_left {
            read_model::ensure_no_loss(standing, &found.seen, &self.place.log)?;
        }
        read_model::set_aside(standing, &found.seen, &self.place.log)?;
        Ok(Some(held))
    }

    /// Where the log ends, and where the replay.
    async fn end(&self, log: &dyn EventLog) -> anyhow::Result<(u64, u64)> {
        let head = *log.head().borrow();
        let until = match self.until {
            None => head,
            Some(Until::Position(position)) => position.min(head),
            Some(Until::Time(time)) => position_at(log, time).await?,
        };
        Ok((head, until))
    }

    /// Under its name only when it is whole: it shows everything in clear.
    async fn build(&self, log: Arc<dyn EventLog>, to: &Path) -> anyhow::Result<()> {
        anyhow::ensure!(!to.exists(), "{} exists; name another file", to.display());
        let mut interrupt = Interrupt::listen()?;
        let draft = Draft::of(to);
        let built = interrupt.or(async {
            let (head, until) = self.end(&*log).await?;
            let building = Building::at(draft.path()).context("making the read model")?;
            let building = building.only(self.view);
            let built = with_bar(log, self.keyring()?, building, until).await?;
            Ok((built.finish().context("making the read model durable")?, head))
        });
        let (views, head) = built.await?;
        let summary = summary(&views, head, to);
        // Closed, so that all of it is in the one file.
        drop(views);
        draft.keep().with_context(|| format!("writing {}", to.display()))?;
        summary
    }

    async fn compare(&self, log: Arc<dyn EventLog>) -> anyhow::Result<()> {
        let live = || Snapshot::of(&self.base()).context("reading the read model in use");
        let until = live()?.checkpoint();
        // Where the next rebuild or start removes what is left if this is broken off: it shows
        // everything in clear.
        let building = beside(&self.base()).await.context("making the read model")?;
        let building = building.only(self.view);
        let keyring = self.keyring()?;
        let built = with_bar(Arc::clone(&log), keyring.clone(), building, until).await?;
        // Held no longer than need be: the WAL of what is in use grows all the while.
        let live = live()?;
        log.end().await.context("reading the log")?;
        let rest = rebuild(log, keyring, built, live.checkpoint(), |_| ()).await;
        let built = rest.context("replaying the log")?;
        let found = built.compare_and_remove(&live).context("comparing the two")?;
        say(format_args!("position    {}", live.checkpoint()));
        let mut equal = true;
        for Difference { table, missing, surplus, changed, told } in found {
            if !self.view.is_none_or(|view| view.tables().contains(&table)) {
                continue;
            }
            equal &= missing + surplus + changed == 0;
            say(format_args!(
                "{table:<12}{missing} only live, {surplus} only replayed, {changed} changed"
            ));
            for row in told {
                say(format_args!("  {row}"));
            }
        }
        anyhow::ensure!(equal, "the read model in use differs from a replay of the log");
        say(format_args!("live and replayed alike"));
        Ok(())
    }

    fn keyring(&self) -> anyhow::Result<Keyring> {
        Ok(self.place.open_for_reading()?.keyring())
    }

    fn base(&self) -> PathBuf {
        self.place.data_dir().join(layout::VIEWS)
    }
}

fn summary(views: &Views, head: u64, path: &Path) -> anyhow::Result<()> {
    say(format_args!("read model  {}", path.display()));
    say(format_args!("position    {} of {head}", views.checkpoint()));
    for (table, rows, digest) in views.dump().context("reading the read model")? {
        say(format_args!("{table:<12}{rows:>9} rows  sha256 {digest}"));
    }
    let parked = views.parked();
    for Parked { view, position, .. } in &parked {
        say(format_args!("parked      {} at {position}", view.as_str()));
    }
    match parked.first() {
        Some(Parked { position, reason, .. }) => {
            anyhow::bail!("event at position {position}: {reason}")
        }
        None => Ok(()),
    }
}

/// Builds up to `until` in a file of its own.
///
/// # Errors
/// The log cannot be read, or the file cannot be written.
pub async fn replay(
    log: Arc<dyn EventLog>,
    keyring: Keyring,
    target: &Path,
    until: u64,
) -> anyhow::Result<Views> {
    let building = Building::at(target).context("making the read model")?;
    let built = with_bar(log, keyring, building, until).await?;
    built.finish().context("making the read model durable")
}

async fn with_bar(
    log: Arc<dyn EventLog>,
    keyring: Keyring,
    building: Building,
    until: u64,
) -> anyhow::Result<Building> {
    let bar = bar("replay", until, unit(&*log))?;
    let shown = bar.clone();
    let built =
        rebuild(log, keyring, building, until, move |position| shown.set_position(position)).await;
    bar.finish_and_clear();
    built.context("replaying the log")
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

#[cfg(test)]
mod tests;
