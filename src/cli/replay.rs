//! `t2m replay`: the read model built anew from the log, beside the one in use.

use std::collections::BTreeSet;
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
use super::point::{self, By, Point};
use super::{layout, owner, read_model, restore, say, server_lock};
use crate::actors::keyring::Keyring;
use crate::actors::metadata_sync;
use crate::actors::rebuild::{beside, ensure_unreadable, rebuild};
use crate::actors::standing::{self, Standing};
use crate::log::{self, EventLog};
use crate::views::{self, Building, Difference, Parked, Reach, Seen, Snapshot, View, Views};

#[derive(Args)]
pub struct Replay {
    #[command(flatten)]
    place: Place,
    /// Stop at a position, or at a time (RFC 3339); while a server runs only with --to
    #[arg(long, value_name = "POSITION|TIME", value_parser = point::parse, conflicts_with = "diff")]
    until: Option<Point>,
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
    /// Replace what the server reads even if a view will stand still that went on there
    #[arg(long, conflicts_with_all = ["to", "diff"])]
    even_if_parked: bool,
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
        let done = runtime.block_on(async {
            if self.from_what_is_left {
                self.ensure_a_log().await?;
            }
            let log = self.place.log.open_for_reading().await?;
            if self.diff {
                return self.compare(log).await;
            }
            match &self.to {
                Some(to) => self.build(log, to, Interrupt::listen()?).await,
                None => self.take_over(log).await,
            }
        });
        // Whoever interrupts it does not wait for a thread that is at work on what is gone.
        runtime.shutdown_background();
        done
    }

    /// Where a read model has seen a log and there is no file of one, nothing is left: that is what counts
    /// from now on.
    async fn ensure_a_log(&self) -> anyhow::Result<()> {
        let (which, data_dir) = (&self.place.log, self.place.data_dir());
        let is_there = which.file().is_none_or(|file| file.exists());
        let seen = which.seen().context("reading the read model")?;
        if is_there || seen.is_none_or(|seen| seen.position == 0) {
            return Ok(());
        }
        restore::refuse_unfinished(data_dir)?;
        let _held = server_lock::take(data_dir)?.context("a server runs")?;
        which.open().await.map(drop)
    }

    /// Beside the views in use, and then in their place. Until those are replaced nothing is changed.
    async fn take_over(&self, log: Arc<dyn EventLog>) -> anyhow::Result<()> {
        let base = self.base();
        // If it is of another log: until the end, so that no server starts on what is replaced.
        let mut before = self.judge(&*log).await?;
        if self.until.is_some() && before.held.is_none() {
            before.held = Some(server_lock::take(self.place.data_dir())?.context(
                "a server runs: it would answer from an earlier time until it has caught up; \
                 --to builds a file of its own",
            )?);
        }
        let keyring = self.keyring()?;
        ensure_unreadable(&*log, &keyring, &self.skip).await?;
        let (head, until) = self.end(&*log).await?;
        let skipped = self.skipped(&before)?;
        let building = beside(&base).await.context("making the read model")?;
        let building = building.passing_over(Arc::new(skipped.clone()));
        let built = with_bar(log, keyring, building, until).await?;
        if before.usable && !self.even_if_parked {
            let present = Reach::of(&base).context("reading the read model in use")?;
            built
                .ensure_no_worse_than(present.as_ref())
                .context("nothing was replaced (it would be with --even-if-parked)")?;
        }
        let views = built
            .finish_as_current_after(|| self.settle(&before, skipped, head))
            .context("making the read model durable")?;
        for position in &self.skip {
            say(format_args!("event {position} is passed over from now on"));
        }
        Summary::of(&views)?.print(head, &views.present_file())?;
        let then = match before.held {
            None => "A server that runs takes it over within a second or two.",
            Some(_) => "The next server goes on from there.",
        };
        say(format_args!("{then}"));
        Ok(())
    }

    /// What a running server reads is never replaced by what another log says; and where the log lacks
    /// what was seen, the read model is the last that knows.
    async fn judge(&self, log: &dyn EventLog) -> anyhow::Result<Before> {
        let data_dir = self.place.data_dir();
        let hold = || server_lock::take(data_dir);
        let seen = match Seen::of(&self.base()) {
            Ok(None) => return Ok(Before { seen: None, usable: true, held: None }),
            Ok(Some(seen)) => seen,
            // It is to be replaced anyhow.
            Err(error) => {
                let held = hold()?.with_context(|| {
                    format!(
                        "{error}: nobody can tell whether the server that runs in {} is of this log; \
                         stop it first",
                        data_dir.display()
                    )
                })?;
                return Ok(Before { seen: None, usable: false, held: Some(held) });
            }
        };
        let standing = standing::of(log, &seen).await.context("reading the log")?;
        if standing == Standing::Same {
            return Ok(Before { seen: None, usable: true, held: None });
        }
        let held = hold()?.with_context(|| {
            format!(
                "a server runs in {} over another log than {}: T2M_LOG or --log must name its own",
                data_dir.display(),
                self.place.log.shown()
            )
        })?;
        if !self.from_what_is_left {
            read_model::ensure_no_loss(standing, &seen, &self.place.log)?;
        }
        Ok(Before { seen: Some((standing, seen)), usable: false, held: Some(held) })
    }

    /// What is passed over from now on: what was, as far as that is of this log, and what was asked for.
    fn skipped(&self, before: &Before) -> anyhow::Result<BTreeSet<u64>> {
        let same_up_to = match before.seen {
            None | Some((Standing::Same, _)) => u64::MAX,
            Some((Standing::Cut { head }, _)) => head,
            Some((Standing::Another | Standing::Empty | Standing::Parted, _)) => 0,
        };
        let known = views::skipped(&self.base()).context("reading what is passed over")?;
        let known = known.iter().copied().filter(|position| *position <= same_up_to);
        Ok(known.chain(self.skip.iter().copied()).collect())
    }

    /// What lies beside the read model is made to agree with the log that it is of now.
    fn settle(&self, before: &Before, skipped: BTreeSet<u64>, head: u64) -> anyhow::Result<()> {
        if let Some((standing, seen)) = &before.seen {
            read_model::set_aside(*standing, seen, &self.place.log)?;
            if *standing != Standing::Another {
                // What Clerk said since the decisions that are left may be lost.
                let path = self.place.data_dir().join(layout::CLERK_SYNC_POSITION);
                metadata_sync::count_as_sent(&path, head)
                    .context("keeping the position at Clerk")?;
            }
        }
        // Beside a server that notes such things itself only what was asked for.
        if !skipped.is_empty() && (before.seen.is_some() || !self.skip.is_empty()) {
            let skipped = Vec::from_iter(skipped);
            views::skip(&self.base(), &skipped).context("noting what is to be passed over")?;
        }
        Ok(())
    }

    /// Where the log ends, and where the replay.
    async fn end(&self, log: &dyn EventLog) -> anyhow::Result<(u64, u64)> {
        let head = *log.head().borrow();
        let until = match self.until {
            None => head,
            Some(Point::Position(position)) => position.min(head),
            Some(Point::Time(time)) => {
                let by = position_at(log, time).await?;
                by.warn();
                by.position()
            }
        };
        Ok((head, until))
    }

    /// Under its name only when it is whole: it shows everything in clear.
    async fn build(
        &self,
        log: Arc<dyn EventLog>,
        to: &Path,
        mut interrupt: Interrupt,
    ) -> anyhow::Result<()> {
        anyhow::ensure!(!to.exists(), "{} exists; name another file", to.display());
        let draft = Draft::of(to);
        let built = interrupt.or(async {
            let (head, until) = self.end(&*log).await?;
            let building = Building::at(draft.path()).context("making the read model")?;
            let skipped = views::skipped(&self.base()).context("reading what is passed over")?;
            let building = building.only(self.view).passing_over(skipped);
            let built = with_bar(log, self.keyring()?, building, until).await?;
            // On another thread, so that an interruption is heard.
            let finishing = tokio::task::spawn_blocking(move || {
                let views = built.finish().context("making the read model durable")?;
                // Closed then, so that all of it is in the one file.
                Summary::of(&views)
            });
            Ok((finishing.await??, head))
        });
        let (summary, head) = built.await?;
        draft.keep().with_context(|| format!("writing {}", to.display()))?;
        summary.print(head, to)
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

/// What was in use, where that may not simply be replaced.
struct Before {
    /// What it has seen of another log, or of what this one has lost.
    seen: Option<(Standing, Seen)>,
    /// Whether a server would go on with it, as far as can be told.
    usable: bool,
    /// So that no server is at work there.
    held: Option<File>,
}

/// What was built.
struct Summary {
    position: u64,
    tables: Vec<(String, u64, String)>,
    parked: Vec<Parked>,
}

impl Summary {
    fn of(views: &Views) -> anyhow::Result<Self> {
        let tables = views.dump().context("reading the read model")?;
        Ok(Self { position: views.checkpoint(), tables, parked: views.parked() })
    }

    /// # Errors
    /// A view stands still.
    fn print(&self, head: u64, path: &Path) -> anyhow::Result<()> {
        say(format_args!("read model  {}", path.display()));
        say(format_args!("position    {} of {head}", self.position));
        for (table, rows, digest) in &self.tables {
            say(format_args!("{table:<12}{rows:>9} rows  sha256 {digest}"));
        }
        for Parked { view, position, .. } in &self.parked {
            say(format_args!("parked      {} at {position}", view.as_str()));
        }
        match self.parked.first() {
            Some(Parked { position, reason, .. }) => {
                anyhow::bail!("event at position {position}: {reason}")
            }
            None => Ok(()),
        }
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

/// The last position whose event happened at `time` or before. All of the log is looked at, for a clock
/// may have been wrong for a while; of one that is damaged, what lies before that, if it goes as far.
async fn position_at(log: &dyn EventLog, time: DateTime<Utc>) -> anyhow::Result<By> {
    let (mut by, mut after) = (By::new(time), 0);
    loop {
        let page = match log::read_up_to_damage(log, after, 1000).await {
            Err(error @ log::Error::Corrupt { .. }) if by.is_past() => {
                eprintln!("{error}; what follows is not searched for events of that time");
                return Ok(by);
            }
            page => page.context("reading the log")?,
        };
        let Some(last) = page.last() else { return Ok(by) };
        after = last.position;
        page.iter().for_each(|event| by.see(event));
    }
}

#[cfg(test)]
mod tests;
