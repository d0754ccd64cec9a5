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

use super::{BadConfiguration, restore, say, server_lock};
use crate::log::{self, EventLog};

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

/// The chain shows that the log agrees with itself; keep the head hash elsewhere to show more.
async fn verify(place: &Where) -> anyhow::Result<()> {
    let log = place.log.open_for_reading().await?;
    let verified = verify_all(&*log).await;
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

/// With a bar.
pub async fn verify_all(log: &dyn EventLog) -> anyhow::Result<log::Verified> {
    let bar = bar("verify", *log.head().borrow(), unit(log))?;
    let moving = bar.clone();
    let verified = log.verify_after(0, Box::new(move |at| moving.set_position(at))).await;
    bar.finish_and_clear();
    Ok(verified?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::EmbeddedLog;

    #[tokio::test]
    async fn who_is_in_the_way_is_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path();
        let which = Which { data_dir: place.to_owned(), setting: "embedded".to_owned() };
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
