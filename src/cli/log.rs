//! `t2m log`: read, follow, count, check and carry the log. It says which log it read and how far.

pub mod carry;
mod selection;
mod show;

use std::fs::File;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::{BadConfiguration, layout, read_model, restore, say, server_lock};
use crate::actors::standing::{self, Standing};
use crate::log::{self, EventLog};
use crate::views::{self, Seen};

/// How long a server that is not there is waited for in silence.
const SILENCE: Duration = Duration::from_secs(2);

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
    ///
    /// After a line with the number of events and the head hash, each event is a JSON object. Its
    /// `data` and `metadata` are JSON strings that hold the stored text, so that every byte, and with
    /// it every hash, stays as it is; `data_base64` and `metadata_base64` where it is not UTF-8.
    Export(carry::Export),
    /// Take in an exported log; a log that has its beginning is continued, any other refused
    Import(carry::Import),
    /// Bring the log into another one, of any engine, and compare the two
    Copy(carry::Copy),
}

/// Which log: the server's, whatever its engine.
#[derive(Debug, Clone, Args)]
#[group(id = "which_log")]
pub struct Which {
    /// The server's data directory; the embedded log lies there, and may be in use
    #[arg(long, env = "T2M_DATA_DIR", default_value = "./data")]
    pub data_dir: PathBuf,
    /// The log's engine, as of the server
    #[arg(long = "log", env = "T2M_LOG", default_value = "embedded", hide_env_values = true)]
    pub setting: String,
}

#[derive(Args)]
pub struct Where {
    #[command(flatten)]
    log: Which,
    /// JSON instead of text
    #[arg(long)]
    json: bool,
}

/// Whether a command is alone with the log and the data directory.
pub enum Alone {
    /// For as long as the file is there.
    Yes(Arc<dyn EventLog>, File),
    BesideServer,
    /// Which ends by itself, and does nothing of what a server would.
    BesideCommand,
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
                Self::Import(import) => import.run().await,
                Self::Copy(copy) => copy.run().await,
            }
        });
        // A thread may wait for standard input still.
        runtime.shutdown_background();
        done
    }
}

impl Which {
    /// Beside whoever writes it.
    ///
    /// # Errors
    /// [`BadConfiguration`] when the setting names no log; there is none, or it cannot be reached.
    pub async fn open_for_reading(&self) -> anyhow::Result<Arc<dyn EventLog>> {
        self.opened(log::open_for_reading(&self.setting, &self.data_dir)).await
    }

    /// Whether it is the setting of a log, which need not be there.
    ///
    /// # Errors
    /// [`BadConfiguration`].
    pub fn check(&self) -> Result<(), BadConfiguration> {
        log::check(&self.setting).map_err(|fault| BadConfiguration(vec![fault.to_string()]))
    }

    /// To write to it; where there is none it is made.
    ///
    /// # Errors
    /// As [`Which::open_for_reading`].
    pub async fn open(&self) -> anyhow::Result<Arc<dyn EventLog>> {
        self.opened(log::open(&self.setting, &self.data_dir)).await
    }

    /// To write to it where no server, and no other command that needs it alone, is at work in the
    /// data directory.
    ///
    /// # Errors
    /// As [`Which::open_for_reading`].
    pub async fn open_alone(&self) -> anyhow::Result<Alone> {
        let context = || format!("making the data directory {}", self.data_dir.display());
        std::fs::create_dir_all(&self.data_dir).with_context(context)?;
        let Some(held) = server_lock::take(&self.data_dir)? else {
            let by_server = server_lock::is_by_server(&self.data_dir);
            return Ok(if by_server { Alone::BesideServer } else { Alone::BesideCommand });
        };
        restore::refuse_unfinished(&self.data_dir)?;
        self.ensure_no_loss_before_opening().await?;
        match self.open().await {
            Ok(log) => Ok(Alone::Yes(log, held)),
            Err(error) => match error.downcast_ref() {
                // A server would hold the directory too. Only a file is one writer's.
                Some(log::Error::Unwritable(_)) if self.file().is_some() => {
                    Ok(Alone::BesideCommand)
                }
                _ => Err(error),
            },
        }
    }

    /// What the read model has seen of a log that lies beside it; none where there is none. To be
    /// asked before the log is opened: a server may be at work on both.
    ///
    /// # Errors
    /// The read model cannot be asked.
    pub fn seen(&self) -> Result<Option<Seen>, views::Error> {
        match self.file() {
            Some(_) => Seen::of(&self.data_dir.join(layout::VIEWS)),
            None => Ok(None),
        }
    }

    /// A log that has lost its end agrees with itself, and not with what was seen of it.
    ///
    /// # Errors
    /// [`log::Error::Corrupt`] with the first position that is missing; the log cannot be read.
    pub async fn ensure_no_loss(
        &self,
        log: &dyn EventLog,
        seen: Result<Option<Seen>, views::Error>,
    ) -> Result<(), log::Error> {
        let seen = match seen {
            Ok(Some(seen)) => seen,
            Ok(None) => return Ok(()),
            // That is no fault of the log's.
            Err(error) => {
                eprintln!("the log's end was not held against the read model: {error}");
                return Ok(());
            }
        };
        let standing = standing::of(log, &seen).await?;
        let Err(lacking) = read_model::ensure_no_loss(standing, &seen, self) else {
            return Ok(());
        };
        let position = match standing {
            Standing::Empty => 1,
            Standing::Cut { head } => head + 1,
            // The last that was seen is not there; since where, nobody knows.
            Standing::Parted | Standing::Same | Standing::Another => seen.position,
        };
        Err(log::Error::Corrupt { position, what: lacking.to_string() })
    }

    /// The same of a log that is to be written, before it is opened for that: whoever closes it then
    /// deletes its WAL, and with it the events that lie there behind a damage. One that is not there
    /// at all is not made either.
    ///
    /// # Errors
    /// As [`read_model::ensure_no_loss`]; the log cannot be read.
    pub async fn ensure_no_loss_before_opening(&self) -> anyhow::Result<()> {
        // Whatever else is wrong with the read model is said when it is opened.
        let Ok(Some(seen)) = self.seen() else { return Ok(()) };
        let Some(file) = self.file() else { return Ok(()) };
        let standing = match file.exists() {
            true => {
                let opened = log::open_for_reading(&self.setting, &self.data_dir).await;
                let log = opened.context("opening the log")?;
                standing::of(&*log, &seen).await.context("reading the log")?
            }
            false if seen.position == 0 => Standing::Same,
            // Who opens it is told more of a WAL that lies there alone, and nothing is made either.
            false if file.with_extension("sqlite-wal").exists() => Standing::Same,
            false => Standing::Empty,
        };
        read_model::ensure_no_loss(standing, &seen, self)
    }

    /// Its file, where the engine has one on this machine.
    pub fn file(&self) -> Option<PathBuf> {
        log::file(&self.setting, &self.data_dir)
    }

    /// For people, without a password.
    pub fn shown(&self) -> String {
        log::shown(&self.setting, &self.data_dir)
    }

    async fn opened(
        &self,
        opening: impl Future<Output = Result<Arc<dyn EventLog>, log::Error>>,
    ) -> anyhow::Result<Arc<dyn EventLog>> {
        self.check()?;
        let mut opening = pin!(opening);
        let opened = tokio::select! {
            biased;
            opened = &mut opening => opened,
            () = tokio::time::sleep(SILENCE) => {
                eprintln!("waiting for the log {} (T2M_LOG)", self.shown());
                opening.await
            }
        };
        opened.with_context(|| format!("opening the log {}", self.shown()))
    }
}

/// A bar on stderr, for `what` of so many.
pub fn bar(what: &str, many: u64, unit: &str) -> anyhow::Result<ProgressBar> {
    let template = format!("{what} {{bar:40}} {{pos}}/{{len}} {unit} {{per_sec}} {{eta}}");
    let style = ProgressStyle::with_template(&template)?;
    Ok(ProgressBar::new(many).with_style(style))
}

/// What the positions of a log count.
pub fn unit(log: &dyn EventLog) -> &'static str {
    if log.stride() == 1 { "events" } else { "positions" }
}

/// The chain shows that the log agrees with itself, and a read model beside it that its end is
/// there; keep the head hash elsewhere to show more.
async fn verify(place: &Where) -> anyhow::Result<()> {
    let seen = place.log.seen();
    let log = place.log.open_for_reading().await?;
    let verified = verify_as_seen(&place.log, &*log, seen).await;
    if let (true, Err(error)) = (place.json, &verified) {
        let position = match error.downcast_ref() {
            Some(log::Error::Corrupt { position, .. }) => Some(position),
            _ => None,
        };
        say(format_args!("{}", json!({ "error": format!("{error:#}"), "position": position })));
    }
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

async fn verify_as_seen(
    which: &Which,
    log: &dyn EventLog,
    seen: Result<Option<Seen>, views::Error>,
) -> anyhow::Result<log::Verified> {
    let verified = verify_all(log).await?;
    which.ensure_no_loss(log, seen).await?;
    Ok(verified)
}

/// With a bar.
pub async fn verify_all(log: &dyn EventLog) -> anyhow::Result<log::Verified> {
    let bar = bar("verify", *log.head().borrow(), unit(log))?;
    let moving = bar.clone();
    let verified = log.verify_after(0, Box::new(move |at| moving.set_position(at))).await;
    bar.finish_and_clear();
    Ok(verified?)
}

#[cfg(test)]
pub mod tests {
    use std::path::Path;

    use chrono::DateTime;
    use uuid::Uuid;

    use super::*;
    use crate::log::{EmbeddedLog, Expected, NewEvent, Recorded};
    use crate::views::Views;

    pub fn embedded_in(data_dir: &Path) -> Which {
        Which { data_dir: data_dir.to_owned(), setting: "embedded".to_owned() }
    }

    /// The log of a data directory, with one more event of each of these numbers.
    pub async fn filled(data_dir: &Path, numbers: std::ops::RangeInclusive<u128>) -> EmbeddedLog {
        let log = EmbeddedLog::open(&data_dir.join(layout::LOG)).unwrap();
        for number in numbers {
            let event = NewEvent {
                id: Uuid::from_u128(number),
                kind: "thing.happened.v1".to_owned(),
                time: DateTime::UNIX_EPOCH,
                data: b"{}".to_vec(),
                metadata: b"{}".to_vec(),
            };
            log.append("thing", Expected::Any, vec![event]).await.unwrap();
        }
        log
    }

    /// The read model of a data directory is made, where there is none, and has seen these events.
    pub fn see(data_dir: &Path, events: &[Recorded]) {
        let path = data_dir.join(layout::VIEWS);
        if !path.exists() {
            drop(Views::open(&path).unwrap());
        }
        let (first, last) = (&events[0], &events[events.len() - 1]);
        let seen = (i64::try_from(last.position).unwrap(), first.hash, last.hash);
        let sql = "UPDATE checkpoint SET position = ?1, first = ?2, last = ?3";
        rusqlite::Connection::open(&path).unwrap().execute(sql, seen).unwrap();
    }

    /// A stranger's hand at the log of a data directory.
    pub fn alter(data_dir: &Path, sql: &str) {
        let log = rusqlite::Connection::open(data_dir.join(layout::LOG)).unwrap();
        log.execute_batch(sql).unwrap();
    }

    #[tokio::test]
    async fn what_a_log_lacks_at_its_end_is_known_from_what_was_seen_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let (place, which) = (dir.path(), embedded_in(dir.path()));
        let log = filled(place, 1..=20).await;
        let events = log.read_all(0, 20).await.unwrap();
        drop(log);
        // How many events are there, or which is the first that is missing.
        let found = async || {
            let seen = which.seen();
            let log = which.open_for_reading().await.unwrap();
            match verify_as_seen(&which, &*log, seen).await {
                Ok(verified) => Ok(verified.events),
                Err(error) => match error.downcast_ref() {
                    Some(log::Error::Corrupt { position, .. }) => Err(*position),
                    _ => panic!("{error:#}"),
                },
            }
        };
        assert_eq!(found().await, Ok(20), "nothing was seen");
        see(place, &events);
        assert_eq!(found().await, Ok(20));
        alter(place, "DELETE FROM events WHERE position > 18");
        assert_eq!(found().await, Err(19));
        see(place, &events[..19]);
        assert_eq!(found().await, Err(19));
        see(place, &events[..18]);
        assert_eq!(found().await, Ok(18), "no more was seen");
        drop(filled(place, 21..=23).await);
        assert_eq!(found().await, Ok(21), "it went on from there");
        see(place, &events);
        assert_eq!(found().await, Err(20), "it went on without what was seen");
        let other = tempfile::tempdir().unwrap();
        let log = filled(other.path(), 31..=33).await;
        see(place, &log.read_all(0, 3).await.unwrap());
        assert_eq!(found().await, Ok(21), "what was seen is of another log");
        see(place, &events);
        alter(place, "DELETE FROM events");
        assert_eq!(found().await, Err(1), "nothing is left");
        std::fs::write(place.join(layout::VIEWS), "no read model of ours").unwrap();
        assert_eq!(found().await, Ok(0), "nobody can tell");
    }

    #[tokio::test]
    async fn before_a_log_that_lost_its_end_is_opened_to_write_its_wal_is_left_alone() {
        let [live, dir] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let which = embedded_in(dir.path());
        which.ensure_no_loss_before_opening().await.unwrap();
        // What a killed process leaves behind, with one bit of the last commit flipped.
        let log = filled(live.path(), 1..=20).await;
        let events = log.read_all(0, 20).await.unwrap();
        let [file, wal] = [layout::LOG.to_owned(), format!("{}-wal", layout::LOG)];
        std::fs::copy(live.path().join(&file), dir.path().join(&file)).unwrap();
        let mut damaged = std::fs::read(live.path().join(&wal)).unwrap();
        let wal = dir.path().join(wal);
        *damaged.last_mut().unwrap() ^= 1;
        std::fs::write(&wal, &damaged).unwrap();
        which.ensure_no_loss_before_opening().await.unwrap();
        see(dir.path(), &events);
        for _ in 0..2 {
            let refused = which.ensure_no_loss_before_opening().await.unwrap_err().to_string();
            assert!(refused.contains("ends at 19, but its read model"), "{refused}");
            assert!(std::fs::read(&wal).unwrap() == damaged, "a look altered it");
        }
        // Who can mend it has it all.
        *damaged.last_mut().unwrap() ^= 1;
        std::fs::write(&wal, &damaged).unwrap();
        which.ensure_no_loss_before_opening().await.unwrap();
        drop(log);
    }

    #[tokio::test]
    async fn no_log_is_made_beside_a_read_model_that_has_seen_one() {
        let dir = tempfile::tempdir().unwrap();
        let (place, which) = (dir.path(), embedded_in(dir.path()));
        // A read model that has seen nothing is no reason.
        drop(Views::open(&place.join(layout::VIEWS)).unwrap());
        which.ensure_no_loss_before_opening().await.unwrap();
        let log = filled(place, 1..=20).await;
        see(place, &log.read_all(0, 20).await.unwrap());
        drop(log);
        which.ensure_no_loss_before_opening().await.unwrap();
        let file = which.file().unwrap();
        std::fs::remove_file(&file).unwrap();
        // Who has only read it may have left these.
        let wal = place.join(format!("{}-wal", layout::LOG));
        let _ = std::fs::remove_file(&wal);
        let before = which.ensure_no_loss_before_opening().await.unwrap_err();
        let opening = which.open_alone().await.map(drop).unwrap_err();
        for refused in [before.to_string(), opening.to_string()] {
            assert!(refused.contains("is empty, but the read model in"), "{refused}");
            assert!(refused.contains("has seen 20 of"), "{refused}");
        }
        assert!(!file.exists(), "an empty log was left behind");
        // Of the last events this may be all that is left.
        std::fs::write(&wal, "a WAL").unwrap();
        let told = which.open_alone().await.map(drop).unwrap_err();
        assert!(format!("{told:#}").contains("lies there without its log"), "{told:#}");
        assert!(wal.exists() && !file.exists());
    }

    #[tokio::test]
    async fn who_is_in_the_way_is_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path();
        let which = embedded_in(place);
        let found = async || match which.open_alone().await.unwrap() {
            Alone::Yes(..) => "nobody",
            Alone::BesideServer => "a server",
            Alone::BesideCommand => "a command",
        };
        assert_eq!(found().await, "nobody");
        let log = EmbeddedLog::open(&place.join("log.sqlite")).unwrap();
        assert_eq!(found().await, "a command", "that writes the log");
        let server = server_lock::take_for_server(place).unwrap().unwrap();
        assert_eq!(found().await, "a server");
        drop((log, server));
        // The word of one that was killed is nobody's.
        let command = server_lock::take(place).unwrap().unwrap();
        assert_eq!(found().await, "a command");
        drop(command);
        assert_eq!(found().await, "nobody");
    }
}
