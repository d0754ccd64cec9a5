//! The whole log as text, out of one engine and into another; or without the text, from one to the
//! other. Of what came in, all is compared with what was to come.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Seek, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail, ensure};
use clap::Args;
use serde_json::json;

use super::super::draft::Draft;
use super::super::interrupt::Interrupt;
use super::super::output::Stdout;
use super::super::{owner, restore, say, server_lock};
use super::{Where, Which, bar, verify_all};
use crate::log::dump::{self, Header, Lines};
use crate::log::transfer::{self, Carrying, Reading, Stopped};
use crate::log::{self, EventLog, GENESIS, Link, Recorded, Verified};

/// Events that are taken at once.
const PAGE: usize = 1000;

#[derive(Args)]
pub struct Export {
    #[command(flatten)]
    place: Where,
    /// The file to write, which must not exist; `-` is standard output
    #[arg(value_name = "FILE", default_value = "-")]
    to: PathBuf,
}

#[derive(Args)]
pub struct Import {
    #[command(flatten)]
    place: Where,
    /// The file to read; `-` is standard input
    ///
    /// A log in PostgreSQL or KurrentDB takes one event after the other, so that a file is first
    /// read to its end and checked: one that is damaged changes nothing. What comes through a pipe
    /// cannot be read twice: what precedes the event that is wrong stays then, and an import of the
    /// whole export goes on after it.
    #[arg(value_name = "FILE", default_value = "-")]
    from: PathBuf,
}

#[derive(Args)]
pub struct Copy {
    #[command(flatten)]
    place: Where,
    /// The engine of the other log, as `T2M_LOG` has it; it must be empty, or have the beginning
    #[arg(long, env = "T2M_COPY_TO", hide_env_values = true, value_name = "LOG")]
    to: String,
    /// The other log's data directory, which an embedded one needs
    #[arg(long, value_name = "DIR")]
    to_data_dir: Option<PathBuf>,
}

fn is_standard(path: &Path) -> bool {
    path == Path::new("-")
}

impl Export {
    pub async fn run(self) -> anyhow::Result<()> {
        let log = self.place.log.open_for_reading().await?;
        if is_standard(&self.to) {
            export(&*log, &mut BufWriter::new(Stdout)).await?;
            return Ok(());
        }
        ensure!(!self.to.exists(), "{} exists; name another file", self.to.display());
        let header = export_to(&*log, &self.to).await?;
        let Header { events, position, head_hash, .. } = header;
        match self.place.json {
            true => say(format_args!(
                "{}",
                json!({ "events": events, "position": position, "head_hash": head_hash })
            )),
            false => say(format_args!(
                "{events} events up to position {position} in {}; head hash {head_hash}",
                self.to.display()
            )),
        }
        Ok(())
    }
}

/// Under its name only when it is whole.
async fn export_to(log: &dyn EventLog, to: &Path) -> anyhow::Result<Header> {
    let context = || format!("writing {}", to.display());
    let mut interrupt = Interrupt::listen()?;
    let (draft, file) = Draft::beside(to).with_context(context)?;
    let mut out = BufWriter::new(file);
    let header = interrupt.or(export(log, &mut out)).await?;
    let file = out.into_inner().map_err(|error| error.into_error()).with_context(context)?;
    file.sync_all().with_context(context)?;
    draft.keep().with_context(context)?;
    Ok(header)
}

/// Up to where the log is now; what is appended meanwhile is left to the next export.
async fn export(log: &dyn EventLog, out: &mut impl Write) -> anyhow::Result<Header> {
    let Verified { events, head_hash } = transfer::extent(log).await.context("counting the log")?;
    let header = Header::new(events, events, &head_hash);
    let bar = bar("export", events, "events")?;
    dump::write_header(out, &header)?;
    let mut reading = Reading::of(log);
    while reading.end().0 < events {
        let page = reading.page().await.context("reading the log")?;
        ensure!(!page.is_empty(), "the log ends before its end was reached");
        for event in page.iter().filter(|event| event.position <= events) {
            dump::write_event(out, event)?;
            bar.inc(1);
        }
    }
    out.flush()?;
    bar.finish_and_clear();
    Ok(header)
}

impl Import {
    pub async fn run(self) -> anyhow::Result<()> {
        owner::refuse_root(&self.place.log.data_dir)?;
        restore::refuse_unfinished(&self.place.log.data_dir)?;
        let (text, header) = Text::open(&self.from)?;
        let what = format!("importing {}", self.from.display());
        let brought = bring(Source::Text(text), header, &self.place.log, &what).await?;
        brought.print(&self.place, &self.place.log, "imported");
        Ok(())
    }
}

impl Copy {
    pub async fn run(self) -> anyhow::Result<()> {
        // Without one there is nothing to be locked: the server may be at work still.
        let to = Which { data_dir: self.to_data_dir.unwrap_or_default(), setting: self.to };
        ensure!(
            to.file().is_none() || !to.data_dir.as_os_str().is_empty(),
            "--to {} needs --to-data-dir, where it lies",
            to.setting
        );
        owner::refuse_root(&to.data_dir)?;
        restore::refuse_unfinished(&to.data_dir)?;
        let from = &self.place.log;
        let place = |which: &Which| which.file().and_then(|path| path.canonicalize().ok());
        let is_same =
            from.shown() == to.shown() || place(from).is_some_and(|it| Some(it) == place(&to));
        ensure!(!is_same, "{} is the log that is to be copied", to.shown());
        let log = from.open_for_reading().await?;
        let brought = copy_into(&*log, &to, &format!("copying {}", from.shown())).await?;
        brought.print(&self.place, &to, "copied");
        Ok(())
    }
}

/// What came of it.
pub struct Brought {
    taken: u64,
    verified: Verified,
}

impl Brought {
    fn print(&self, place: &Where, to: &Which, done: &str) {
        let Self { taken, verified: Verified { events, head_hash } } = self;
        let head_hash = hex::encode(head_hash);
        match place.json {
            true => say(format_args!(
                "{}",
                json!({ done: taken, "events": events, "head_hash": head_hash })
            )),
            false => say(format_args!(
                "{taken} events {done} into {}, which has {events} now, compared one by one; head \
                 hash {head_hash}",
                to.shown()
            )),
        }
    }
}

/// Brings a log that is read on this machine into another one.
///
/// # Errors
/// They say what is there afterwards.
pub async fn copy_into(log: &dyn EventLog, to: &Which, what: &str) -> anyhow::Result<Brought> {
    let Verified { events, head_hash } = transfer::extent(log).await.context("counting the log")?;
    let header = Header::new(events, events, &head_hash);
    bring(Source::Log(Reading::of(log)), header, to, what).await
}

/// Where the events come from.
enum Source<'a> {
    Text(Text),
    Log(Reading<'a>),
}

/// An export, after its header.
struct Text {
    /// Away while a page is read.
    lines: Option<Lines<Box<dyn BufRead + Send>>>,
    /// Whether its end was seen.
    ended: bool,
    /// To begin again; what is no file comes only once.
    file: Option<File>,
}

/// The next events, with the line of the first of them.
struct Page {
    events: Vec<Recorded>,
    line: Option<u64>,
}

impl Text {
    fn open(path: &Path) -> anyhow::Result<(Self, Header)> {
        let mut file = None;
        let lines: Box<dyn BufRead + Send> = if is_standard(path) {
            Box::new(BufReader::new(std::io::stdin()))
        } else {
            let open = || format!("opening {}", path.display());
            let opened = File::open(path).with_context(open)?;
            if opened.metadata().with_context(open)?.is_file() {
                file = Some(opened.try_clone().with_context(open)?);
            }
            Box::new(BufReader::new(opened))
        };
        let mut lines = Lines::new(lines);
        let header = lines.header().with_context(|| format!("reading {}", path.display()))?;
        Ok((Self { lines: Some(lines), ended: false, file }, header))
    }

    fn rewind(&mut self) -> anyhow::Result<()> {
        // The two share the place that is read next.
        let file = self.file.as_ref().context("what is no file comes only once")?;
        let mut file = file.try_clone()?;
        file.rewind()?;
        let again: Box<dyn BufRead + Send> = Box::new(BufReader::new(file));
        let mut lines = Lines::new(again);
        lines.header()?;
        (self.lines, self.ended) = (Some(lines), false);
        Ok(())
    }
}

impl Source<'_> {
    /// Looks for what is wrong with a file, before anything of it is taken.
    async fn check(&mut self, header: &Header) -> anyhow::Result<()> {
        if !matches!(self, Self::Text(Text { file: Some(_), .. })) {
            return Ok(());
        }
        let mut end = (0, GENESIS);
        let follow = async |events: &[Recorded]| transfer::follow(&mut end, events);
        pump(self, header, "check", follow).await?;
        match self {
            Self::Text(text) => text.rewind(),
            Self::Log(_) => Ok(()),
        }
    }

    async fn page(&mut self) -> anyhow::Result<Page> {
        match self {
            Self::Text(Text { lines, ended, .. }) => {
                let mut away = lines.take().context("the text was lost")?;
                if *ended {
                    let line = Some(away.number());
                    *lines = Some(away);
                    return Ok(Page { events: Vec::new(), line });
                }
                // A terminal or a pipe may let it wait for ever.
                let read = tokio::task::spawn_blocking(move || {
                    let line = away.number() + 1;
                    let mut events = Vec::with_capacity(PAGE);
                    while events.len() < PAGE
                        && let Some(event) = away.event()?
                    {
                        events.push(event);
                    }
                    anyhow::Ok((away, Page { events, line: Some(line) }))
                });
                let (back, page) = read.await??;
                *ended = page.events.len() < PAGE;
                *lines = Some(back);
                Ok(page)
            }
            Self::Log(reading) => {
                let events = reading.page().await.context("reading the log")?;
                Ok(Page { events, line: None })
            }
        }
    }
}

impl Page {
    /// What is wrong with one of its events.
    fn fault(&self, Stopped { at, error }: Stopped) -> anyhow::Error {
        let Some(event) = self.events.get(at) else { return error.into() };
        let what = match error {
            log::Error::Corrupt { position, what } => format!("position {position}: {what}"),
            other => format!("position {}: {other}", event.position),
        };
        match self.line {
            Some(first) => anyhow!(dump::Error::Line { line: first + at as u64, what }),
            None => anyhow!(what),
        }
    }
}

/// Where they go: a file takes all of them or nothing, with their positions and hashes; any other
/// engine takes them one append after the other.
enum Target<'a> {
    File { path: PathBuf, import: Box<log::Import>, had: (u64, [u8; 32]), end: (u64, [u8; 32]) },
    Log { log: &'a dyn EventLog, carrying: Carrying<'a> },
}

impl Target<'_> {
    /// How many events it has already, which must be the first of those that come.
    async fn had(&self) -> anyhow::Result<u64> {
        match self {
            Self::File { had, .. } => Ok(had.0),
            Self::Log { log, .. } => Ok(log.stats().await.context("counting the log")?.events),
        }
    }

    async fn take(&mut self, events: &[Recorded]) -> Result<(), Stopped> {
        match self {
            Self::File { import, had, end, .. } => {
                for (at, event) in events.iter().enumerate() {
                    let taken = match event.position <= had.0 {
                        true => follow(end, *had, event),
                        false => import.take(event).map(|()| *end = import.end()),
                    };
                    taken.map_err(|error| Stopped { at, error })?;
                }
                Ok(())
            }
            Self::Log { carrying, .. } => carrying.take(events).await,
        }
    }

    /// What is there if it ends now.
    fn left(&self) -> &'static str {
        match self {
            Self::Log { carrying, .. } if carrying.has_begun() => {
                "what was brought stays, and the same command goes on after it"
            }
            _ => "nothing was changed",
        }
    }

    /// What is interrupted here was brought, and not compared to its end.
    async fn finish(self, events: u64, interrupt: &mut Interrupt) -> anyhow::Result<Brought> {
        match self {
            Self::File { path, import, had, .. } => {
                let taken = import.finish().context("writing the log")?;
                let log = log::EmbeddedLog::open_read_only(&path);
                let log = log.with_context(|| format!("opening the log {}", path.display()))?;
                let verified = interrupt.or(verify_all(&log)).await.context("verifying the log")?;
                ensure!(verified == taken, "the log does not read as what was written");
                Ok(Brought { taken: verified.events - had.0, verified })
            }
            Self::Log { carrying, .. } => {
                let bar = bar("compare", events, "events")?;
                let taken = carrying.appended();
                let comparing = carrying.finish(|at| bar.set_position(at));
                let verified = interrupt.or(async { Ok(comparing.await?) }).await;
                bar.finish_and_clear();
                Ok(Brought { taken, verified: verified.context("comparing the two")? })
            }
        }
    }
}

async fn bring(
    mut source: Source<'_>,
    header: Header,
    to: &Which,
    what: &str,
) -> anyhow::Result<Brought> {
    // From here on: whoever interrupts it has what was begun cleared away.
    let mut interrupt = Interrupt::listen()?;
    let brings = || format!("{what} into {}", to.shown());
    let (opened, _held);
    let mut target = match to.file() {
        Some(path) => {
            let import = interrupt.or(begin(&path)).await.with_context(brings)?;
            // Who holds the log now is seen by a restore that begins, and sees one that has begun.
            restore::refuse_unfinished(&to.data_dir)?;
            if import.has_cleared() {
                eprintln!("an import into {} was broken off; what it left is removed", to.shown());
            }
            let had = import.end();
            Target::File { path, import, had, end: (0, GENESIS) }
        }
        None => {
            if to.data_dir.is_dir() {
                let held = server_lock::take(&to.data_dir)?;
                let running = || format!("a server runs in {}: stop it", to.data_dir.display());
                _held = held.with_context(running)?;
            }
            opened = interrupt.or(to.open()).await.with_context(brings)?;
            Target::Log { log: &*opened, carrying: Carrying::into(&*opened) }
        }
    };
    let had = interrupt.or(target.had()).await.with_context(brings)?;
    ensure!(
        had <= header.events,
        "the log {} ends at position {had} and the export at {}: it does not continue it",
        to.shown(),
        header.events
    );
    let bringing = async {
        // An embedded log is as it was until all of it has come.
        if matches!(target, Target::Log { .. }) {
            source.check(&header).await?;
        }
        let take = async |events: &[Recorded]| target.take(events).await;
        pump(&mut source, &header, "import", take).await
    };
    let done = interrupt.or(bringing).await;
    done.with_context(|| format!("{}; {}", brings(), target.left()))?;
    target.finish(header.events, &mut interrupt).await
}

/// On another thread, so that an interruption is heard.
async fn begin(path: &Path) -> anyhow::Result<Box<log::Import>> {
    let opened = path.to_owned();
    let beginning = tokio::task::spawn_blocking(move || log::Import::begin(&opened));
    let import = beginning.await?.with_context(|| format!("opening the log {}", path.display()))?;
    Ok(Box::new(import))
}

/// All that the header names, page by page, to where `take` has it.
async fn pump(
    source: &mut Source<'_>,
    header: &Header,
    what: &str,
    mut take: impl AsyncFnMut(&[Recorded]) -> Result<(), Stopped>,
) -> anyhow::Result<()> {
    let bar = bar(what, header.events, "events")?;
    let (mut read, mut hash) = (0, GENESIS);
    loop {
        let mut page = source.page().await?;
        let left = usize::try_from(header.events - read).unwrap_or(usize::MAX);
        // In a log, what was appended since is left to the next time.
        let surplus = page.line.filter(|_| page.events.len() > left);
        page.events.truncate(left);
        let is_end = page.events.is_empty();
        if let Some(last) = page.events.last() {
            hash = last.hash;
            take(&page.events).await.map_err(|stopped| page.fault(stopped))?;
            read += page.events.len() as u64;
            bar.set_position(read);
        }
        // Not before: with one missing the last has a position that is too high, and no surplus.
        if let Some(first) = surplus {
            bail!(
                "line {}: the export has more than the {} events that its header names",
                first + left as u64,
                header.events
            );
        }
        if is_end {
            let line = page.line.map_or(String::new(), |line| format!("line {line}: "));
            ensure!(
                read == header.events,
                "{line}the export ends after {read} of {} events: it was cut",
                header.events
            );
            ensure!(
                hex::encode(hash) == header.head_hash,
                "line 1: the last event's hash is not the one that the header names"
            );
            break;
        }
        // So that an interruption is heard.
        tokio::task::yield_now().await;
    }
    bar.finish_and_clear();
    Ok(())
}

/// Through what the log has already.
fn follow(
    end: &mut (u64, [u8; 32]),
    had: (u64, [u8; 32]),
    event: &Recorded,
) -> Result<(), log::Error> {
    let bad = |position, what: &str| log::Error::Corrupt { position, what: what.to_owned() };
    if event.position != end.0 + 1 {
        return Err(bad(end.0 + 1, "the event is missing"));
    }
    if event.hash != Link::of(event).hash(&end.1) {
        return Err(bad(event.position, "the event and its hash do not belong together"));
    }
    *end = (event.position, event.hash);
    if event.position == had.0 && event.hash != had.1 {
        return Err(log::Error::Foreign(format!(
            "the log has another event at position {}: the export does not continue it",
            had.0
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
