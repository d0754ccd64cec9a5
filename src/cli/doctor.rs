//! `t2m doctor`: is everything there that a server needs, and does it fit together? It works beside
//! a running server and on a stopped one, and changes nothing.

mod blobs;
mod keys;
mod users;

use std::collections::HashMap;
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use chrono::{DateTime, TimeDelta, Utc};
use clap::Args;
use serde::Serialize;
use serde_json::Value;

use super::log::{Which, bar, unit};
use super::{assemble, layout, say};
use crate::actors::keyring::Keyring;
use crate::actors::standing::{self, Standing};
use crate::clock::Clock;
use crate::config::{BlobStore, Options};
use crate::domain::ids::UserId;
use crate::log::{self, EventLog};
use crate::media::blobs::Blobs;
use crate::media::disk::Space;
use crate::media::vault::MasterKey;
use crate::views::{self, Parked, Peek, Seen, peek};

/// How many are named of those that are in disorder.
const NAMED: usize = 20;
/// Clocks of several machines never agree quite.
const CLOCK_SKEW: TimeDelta = TimeDelta::seconds(5);

#[derive(Args)]
pub struct Doctor {
    #[command(flatten)]
    options: Box<Options>,
    /// Verify the whole log, not only its end, and try every sealed key, not only some
    #[arg(long)]
    full: bool,
    /// How many events at the log's end are verified; where positions leave gaps, all are
    #[arg(long, default_value_t = 10_000, value_name = "EVENTS")]
    last: u64,
    /// JSON instead of text
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    Ok,
    Warning,
    Fault,
}

#[derive(Debug, Serialize)]
struct Finding {
    check: &'static str,
    verdict: Verdict,
    says: String,
    /// All that it is about, where `says` names only the first of it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    details: Vec<Value>,
}

/// What there is to hold everything else against.
enum Log {
    Read(Arc<dyn EventLog>),
    /// Its file is not there, and a server makes one.
    Nothing,
    /// Why was said already.
    Unreadable,
}

struct Doctoring {
    data_dir: PathBuf,
    findings: Vec<Finding>,
}

impl Doctor {
    pub fn run(self) -> anyhow::Result<()> {
        let data_dir = self.options.data_dir.clone();
        let mut doctoring = Doctoring { data_dir, findings: Vec::new() };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(doctoring.look(&self));
        let findings = doctoring.findings;
        if self.json {
            say(format_args!("{}", serde_json::to_string(&findings)?));
        } else {
            for Finding { check, verdict, says, .. } in &findings {
                let verdict = match verdict {
                    Verdict::Ok => "ok",
                    Verdict::Warning => "warning",
                    Verdict::Fault => "fault",
                };
                say(format_args!("{verdict:<8} {check:<14} {says}"));
            }
        }
        let faults = findings.iter().filter(|it| it.verdict == Verdict::Fault).count();
        anyhow::ensure!(faults == 0, "{faults} of {} checks found a fault", findings.len());
        Ok(())
    }
}

impl Doctoring {
    async fn look(&mut self, asked: &Doctor) {
        match assemble::check((*asked.options).clone()) {
            Ok(_) => self.ok("configuration", "every setting makes sense"),
            Err(faults) => self.fault("configuration", faults.0.join("; ")),
        }
        self.disk();
        if !self.data_dir.is_dir() {
            let missing = format!("there is no data directory {}", self.data_dir.display());
            return self.fault("log", missing);
        }
        let log = self.log(asked).await;
        let found = self.views(&log).await;
        let (blobs, users) = found.map(|found| (found.blobs, found.users)).unzip();
        // What is wrong with the setting was said already, of the configuration.
        let Ok(store) = BlobStore::parse(&asked.options.blobs) else { return };
        let opened = match Blobs::open_for_reading(&store, &self.data_dir) {
            Ok(opened) => opened,
            Err(error) => return self.fault("blobs", error),
        };
        // One that is not there reads as one with nothing in it: what is needed of it is missing.
        self.keys(asked, &opened).await;
        if let Log::Read(log) = &log {
            self.keys_of_users(&**log, &opened, users.filter(|_| !asked.full)).await;
        }
        self.blobs(&opened, blobs).await;
    }

    async fn log(&mut self, asked: &Doctor) -> Log {
        let which = Which { data_dir: self.data_dir.clone(), setting: asked.options.log.clone() };
        if log::check(&which.setting).is_err() {
            // Said already, of the configuration.
            return Log::Unreadable;
        }
        // Where nobody may look, opening it says so.
        if which.file().is_some_and(|path| path.try_exists().is_ok_and(|exists| !exists)) {
            self.warning("log", format!("there is no log at {} yet", which.shown()));
            return Log::Nothing;
        }
        let log = match which.open_for_reading().await {
            Ok(log) => log,
            Err(error) => {
                self.fault("log", format!("{error:#}"));
                return Log::Unreadable;
            }
        };
        let head = *log.head().borrow();
        // Where positions leave gaps nobody knows where the last events begin.
        let is_whole = asked.full || log.stride() > 1;
        let after = if is_whole { 0 } else { head.saturating_sub(asked.last) };
        let moving = bar("verify", head, unit(&*log)).ok();
        let shown = moving.clone();
        let progress = move |at| shown.iter().for_each(|bar| bar.set_position(at));
        let verified = log.verify_after(after, Box::new(progress)).await;
        moving.iter().for_each(|bar| bar.finish_and_clear());
        match verified {
            Ok(verified) => {
                let head_hash = hex::encode(verified.head_hash);
                let count = verified.events;
                let part = if after == 0 { "all" } else { "the last" };
                let says = format!("{part} {count} events verified; head hash {head_hash}");
                self.ok("log", format!("{}: {says}", which.shown()));
            }
            Err(error) => self.fault("log", error),
        }
        match log.read_all(head.saturating_sub(1), 1).await.map(|events| events.into_iter().next())
        {
            Ok(Some(last)) => self.clock(last.time, Clock::system().now()),
            Ok(None) => self.ok("clock", "the log has no event to hold it against"),
            // Said already.
            Err(_) => {}
        }
        Log::Read(log)
    }

    fn clock(&mut self, last: DateTime<Utc>, now: DateTime<Utc>) {
        let says =
            format!("it is {}, the last event is of {}", now.to_rfc3339(), last.to_rfc3339());
        match last - now > CLOCK_SKEW {
            true => self.fault("clock", format!("the clock is behind the log: {says}")),
            false => self.ok("clock", says),
        }
    }

    /// What the read model knows, if it can be read.
    async fn views(&mut self, log: &Log) -> Option<Peek> {
        let found = match peek(&self.data_dir.join(layout::VIEWS)) {
            Ok(Some(found)) => found,
            Ok(None) => {
                self.warning("views", "there is no read model; the server makes one at its start");
                return None;
            }
            Err(error @ views::Error::Outdated(_)) => {
                self.warning("views", format!("{error}; the server makes them anew at its start"));
                // Unless the log lacks what they have seen.
                let seen = Seen::of(&self.data_dir.join(layout::VIEWS));
                if let (Log::Read(log), Ok(Some(seen))) = (log, seen) {
                    self.standing(&**log, &seen).await;
                }
                return None;
            }
            // The server's start ends with the same.
            Err(error) => {
                self.fault("views", error);
                return None;
            }
        };
        let checkpoint = found.seen.position;
        match log {
            Log::Read(log) => self.standing(&**log, &found.seen).await,
            Log::Nothing if checkpoint == 0 => self.ok("views", "at 0, as the log is"),
            Log::Nothing => self.fault("views", format!("at {checkpoint}, and there is no log")),
            Log::Unreadable => {
                let says = format!("at {checkpoint}, which cannot be held against the log");
                self.warning("views", says);
            }
        }
        for Parked { view, position, reason } in &found.parked {
            let remedy = "see `t2m replay --skip`";
            let view = view.as_str();
            self.fault("views", format!("{view} stand still at {position}: {reason}; {remedy}"));
        }
        if !found.skipped.is_empty() {
            let positions: Vec<String> = found.skipped.iter().map(u64::to_string).collect();
            let (count, positions) = (positions.len(), positions.join(", "));
            let says = format!("{count} events were given up and are passed over: {positions}");
            self.warning("skipped", says);
        }
        Some(found)
    }

    /// How far the read model is, and whether it is of this log.
    async fn standing(&mut self, log: &dyn EventLog, seen: &Seen) {
        let (checkpoint, head) = (seen.position, *log.head().borrow());
        // What cannot be read was said already.
        let fault = match standing::of(log, seen).await.unwrap_or(Standing::Same) {
            Standing::Same => None,
            Standing::Cut { head } => {
                Some(format!("the log ends at {head}: it was cut or exchanged"))
            }
            Standing::Empty => Some("the log is empty: T2M_LOG names another one".to_owned()),
            Standing::Another => Some(
                "they are of another log than T2M_LOG names: a server computes them anew"
                    .to_owned(),
            ),
            Standing::Parted => {
                Some("the log has another event there: it was cut and has gone on since".to_owned())
            }
        };
        if let Some(fault) = fault {
            self.fault("views", format!("at {checkpoint}, and {fault}"));
        } else if checkpoint >= head {
            self.ok("views", format!("at {checkpoint}, with nothing left to apply"));
        } else {
            let (lag, unit) = (head - checkpoint, unit(log));
            let soon = "a server catches up within moments of its start";
            self.warning("views", format!("at {checkpoint}, {lag} {unit} behind the log; {soon}"));
        }
    }

    /// Users known from the read model, else from the whole log.
    async fn keys_of_users(
        &mut self,
        log: &dyn EventLog,
        store: &Blobs,
        known: Option<HashMap<UserId, bool>>,
    ) {
        const CHECK: &str = "keys of users";
        // None of them is opened.
        let keyring =
            Keyring::new(store, MasterKey::kept_in(&self.data_dir.join(layout::MASTER_KEY)));
        let found = match users::look(log, &keyring, known).await {
            Ok(found) => found,
            Err(error) => return self.fault(CHECK, format!("{error:#}")),
        };
        let users::Found { keys, erased, lost, returned, unerased, undeleted } = found;
        if [&lost, &returned, &unerased, &undeleted].iter().all(|users| users.is_empty()) {
            let says = format!("{keys} keys, {erased} users erased; none is lost or has come back");
            self.ok(CHECK, says);
        }
        if !lost.is_empty() {
            let (lost, remedy) =
                (few(lost.iter()), "bring them back, or give them up with `t2m erase`");
            self.fault(CHECK, format!("lost, with no note in `erased`: {lost}; {remedy}"));
        }
        if !returned.is_empty() {
            let (returned, remedy) = (few(returned.iter()), "a server destroys them at its start");
            self.fault(CHECK, format!("destroyed and there again: {returned}; {remedy}"));
        }
        if !unerased.is_empty() {
            let (unerased, remedy) =
                (few(unerased.iter()), "a server destroys their keys within moments of its start");
            self.warning(CHECK, format!("deleted, and not erased: {unerased}; {remedy}"));
        }
        if !undeleted.is_empty() {
            let (undeleted, remedy) =
                (few(undeleted.iter()), "a server deletes them, and so does `t2m erase` once more");
            self.warning(CHECK, format!("erased, and not deleted: {undeleted}; {remedy}"));
        }
    }

    fn disk(&mut self) {
        // The directory may not be there yet.
        let mut place: &Path = &self.data_dir;
        while !place.exists() {
            place = match place.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => parent,
                _ => Path::new("."),
            };
        }
        match Space::of(place) {
            Ok(space) => {
                let says = format!("{} of {} bytes free", space.free, space.total);
                match space.is_scarce() {
                    true => self.warning("disk", says),
                    false => self.ok("disk", says),
                }
            }
            Err(error) => self.fault("disk", error),
        }
    }

    fn ok(&mut self, check: &'static str, says: impl ToString) {
        self.note(check, Verdict::Ok, says);
    }

    fn warning(&mut self, check: &'static str, says: impl ToString) {
        self.note(check, Verdict::Warning, says);
    }

    fn fault(&mut self, check: &'static str, says: impl ToString) {
        self.note(check, Verdict::Fault, says);
    }

    fn note(&mut self, check: &'static str, verdict: Verdict, says: impl ToString) {
        self.list(check, verdict, says, Vec::new());
    }

    /// The same with all that it is about.
    fn list(
        &mut self,
        check: &'static str,
        verdict: Verdict,
        says: impl ToString,
        details: Vec<Value>,
    ) {
        self.findings.push(Finding { check, verdict, says: says.to_string(), details });
    }
}

/// The first of them, and how many more there are.
pub fn few<T: Display>(all: impl ExactSizeIterator<Item = T>) -> String {
    let more = all.len().saturating_sub(NAMED);
    let named: Vec<String> = all.take(NAMED).map(|it| it.to_string()).collect();
    match more {
        0 => named.join(", "),
        more => format!("{} and {more} more", named.join(", ")),
    }
}
