//! The whole log as text, out of one data directory and into another.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail, ensure};
use clap::Args;
use serde_json::json;

use super::{Where, bar};
use crate::log::dump::{self, Header, Lines};
use crate::log::{self, EventLog, GENESIS, Link, Recorded, Verified};

const PAGE: usize = 1000;

#[derive(Args)]
pub struct Export {
    #[command(flatten)]
    place: Where,
    /// The file to write, which must not exist; `-` is standard output
    #[arg(value_name = "FILE")]
    to: PathBuf,
}

#[derive(Args)]
pub struct Import {
    #[command(flatten)]
    place: Where,
    /// The file to read; `-` is standard input
    #[arg(value_name = "FILE")]
    from: PathBuf,
}

fn is_standard(path: &Path) -> bool {
    path == Path::new("-")
}

impl Export {
    pub async fn run(self) -> anyhow::Result<()> {
        let log = self.place.open()?;
        if is_standard(&self.to) {
            export(&*log, &mut BufWriter::new(std::io::stdout().lock())).await?;
            return Ok(());
        }
        ensure!(!self.to.exists(), "{} exists; name another file", self.to.display());
        // Under its name only when it is whole.
        let mut unfinished = self.to.clone().into_os_string();
        unfinished.push(".unfinished");
        let context = || format!("writing {}", self.to.display());
        let mut out = BufWriter::new(File::create(&unfinished).with_context(context)?);
        let header = match export(&*log, &mut out).await {
            Ok(header) => header,
            Err(error) => {
                drop(out);
                let _ = std::fs::remove_file(&unfinished);
                return Err(error);
            }
        };
        let file = out.into_inner().map_err(|error| error.into_error()).with_context(context)?;
        file.sync_all().with_context(context)?;
        std::fs::rename(&unfinished, &self.to).with_context(context)?;
        let Header { events, position, head_hash, .. } = header;
        match self.place.json {
            true => println!(
                "{}",
                json!({ "events": events, "position": position, "head_hash": head_hash })
            ),
            false => println!(
                "{events} events up to position {position} in {}; head hash {head_hash}",
                self.to.display()
            ),
        }
        Ok(())
    }
}

/// Up to where the log is now; what is appended meanwhile is left to the next export.
async fn export(log: &dyn EventLog, out: &mut impl Write) -> anyhow::Result<Header> {
    let stats = log.stats().await.context("counting the log")?;
    let header = Header::new(stats.events, stats.position, &stats.head_hash);
    let bar = bar("export", stats.events)?;
    dump::write_header(out, &header)?;
    let mut after = 0;
    while after < stats.position {
        let page = log.read_all(after, PAGE).await.context("reading the log")?;
        let Some(last) = page.last() else { bail!("the log ends before its end was reached") };
        after = last.position;
        for event in page.iter().filter(|event| event.position <= stats.position) {
            dump::write_event(out, event)?;
            bar.inc(1);
        }
    }
    out.flush()?;
    bar.finish_and_clear();
    Ok(header)
}

impl Import {
    pub fn run(self) -> anyhow::Result<()> {
        let done = if is_standard(&self.from) {
            import(&self.place.path(), std::io::stdin().lock())
        } else {
            let open = || format!("opening {}", self.from.display());
            let file = File::open(&self.from).with_context(open)?;
            import(&self.place.path(), BufReader::new(file))
                .with_context(|| format!("importing {}; nothing was changed", self.from.display()))
        };
        let Imported { taken, verified } = done?;
        let head_hash = hex::encode(verified.head_hash);
        let events = verified.events;
        match self.place.json {
            true => println!(
                "{}",
                json!({ "imported": taken, "events": events, "head_hash": head_hash })
            ),
            false => println!(
                "{taken} events imported into {}, which has {events} now; head hash {head_hash}",
                self.place.path().display()
            ),
        }
        Ok(())
    }
}

struct Imported {
    taken: u64,
    verified: Verified,
}

fn import(path: &Path, from: impl BufRead) -> anyhow::Result<Imported> {
    let mut lines = Lines::new(from);
    let header = lines.header()?;
    let mut import =
        log::Import::begin(path).with_context(|| format!("opening the log {}", path.display()))?;
    let had = import.end();
    ensure!(
        had.0 <= header.position,
        "the log {} ends at position {} and the export at {}: it does not continue it",
        path.display(),
        had.0,
        header.position
    );
    let bar = bar("import", header.events)?;
    let (mut read, mut end) = (0, (0, GENESIS));
    while let Some(event) = lines.event()? {
        let at = |error: log::Error| match error {
            log::Error::Corrupt { position, what } => {
                anyhow!(lines.bad(format!("position {position}: {what}")))
            }
            other => anyhow!(lines.bad(format!("position {}: {other}", event.position))),
        };
        if event.position <= had.0 {
            follow(&mut end, &event).map_err(at)?;
            ensure!(
                event.position < had.0 || event.hash == had.1,
                "the log {} has another event at position {}: the export does not continue it",
                path.display(),
                had.0
            );
        } else {
            import.take(&event).map_err(at)?;
            end = import.end();
        }
        read += 1;
        bar.set_position(read);
    }
    ensure!(
        read == header.events && end.0 == header.position,
        "line {}: the export ends after {read} of {} events: it was cut",
        lines.number(),
        header.events
    );
    ensure!(
        hex::encode(end.1) == header.head_hash,
        "line 1: the last event's hash is not the one that the header names"
    );
    let verified = import.finish().context("writing the log")?;
    bar.finish_and_clear();
    Ok(Imported { taken: verified.events - had.0, verified })
}

/// Through what the log has already.
fn follow(end: &mut (u64, [u8; 32]), event: &Recorded) -> Result<(), log::Error> {
    let bad = |position, what: &str| log::Error::Corrupt { position, what: what.to_owned() };
    if event.position != end.0 + 1 {
        return Err(bad(end.0 + 1, "the event is missing"));
    }
    if event.hash != Link::of(event).hash(&end.1) {
        return Err(bad(event.position, "the event and its hash do not belong together"));
    }
    *end = (event.position, event.hash);
    Ok(())
}
