//! `t2m erase`: everything personal of one user, for ever. The key goes here and now; a running
//! server sees to the rest within seconds, and without one this command does.

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::Args;

use super::keys::{Opened, Place};
use super::log::Alone;
use super::read_model::open_views;
use super::{owner, restore, say};
use crate::actors::codec::{Metadata, Source};
use crate::actors::dead_letters::DeadLetters;
use crate::actors::erasure::Eraser;
use crate::actors::keyring::{Destroyed, Keyring};
use crate::actors::secrets::{SECRETS, Secrets};
use crate::actors::{System, dispatcher, renewal};
use crate::clock::Clock;
use crate::domain::ids::UserId;
use crate::domain::job::{Command as JobCommand, Kind};
use crate::domain::stream;
use crate::domain::user::{Command, User};
use crate::log::EventLog;
use crate::media::reservations::Reservations;
use crate::media::uploads::Uploads;
use crate::media::vault::Vault;
use crate::views;

/// How often it tries what is in the way of something else.
const MOST_LOOKS: u32 = 50;
const BETWEEN_LOOKS: Duration = Duration::from_millis(100);
/// The same while a lease may have to run out, or a replay to end: a minute and some seconds.
const MOST_LOOKS_FOR_LONG: u32 = 650;
/// How often the read model may be waited for, two seconds each time, while it does not move.
const MOST_TRIES: u32 = 5;

#[derive(Args)]
pub struct Erase {
    /// The user's id, such as `user_2abc`
    #[arg(value_name = "USER", value_parser = user)]
    user: UserId,
    /// Also one of whom neither the log nor the keys know anything
    #[arg(long)]
    unknown: bool,
    #[command(flatten)]
    place: Place,
}

fn user(text: &str) -> Result<UserId, String> {
    UserId::try_from(text.to_owned()).map_err(|error| error.to_string())
}

impl Erase {
    pub fn run(self) -> anyhow::Result<()> {
        owner::refuse_root(self.place.data_dir())?;
        restore::refuse_unfinished(self.place.data_dir())?;
        actix::System::new().block_on(async {
            // A slip of the pen must not make a store either.
            self.ensure_known(&self.place.open_for_reading()?.keyring()).await?;
            let opened = self.place.open()?;
            let keyring = opened.keyring();
            let now = Clock::system().now();
            let destroyed = keyring.destroy(&self.user, now).await.context("destroying the key")?;
            self.say(destroyed);
            let Some((log, _held)) = self.alone().await? else {
                say(format_args!("server       running: it deletes the user within ten seconds"));
                return Ok(());
            };
            let keyring = opened.own_keyring().await.context("the user is not deleted yet")?;
            self.clear(log, &opened, keyring).await
        })
    }

    /// A slip of the pen must not pass for an erasure.
    async fn ensure_known(&self, keyring: &Keyring) -> anyhow::Result<()> {
        let log = self.place.log.open_for_reading().await?;
        let events = log.read_stream(&stream::<User>(&self.user), 0, 1).await;
        let in_log = !events.context("reading the log")?.is_empty();
        let known = in_log || keyring.holds(&self.user).await.context("reading the keys")?;
        ensure!(
            known || self.unknown,
            "{} knows no user {}; with --unknown it is erased all the same",
            self.place.log.shown(),
            self.user
        );
        Ok(())
    }

    fn say(&self, Destroyed { tombstone, key }: Destroyed) {
        say(format_args!("user         {}", self.user));
        say(format_args!("key          {}", if key { "destroyed" } else { "there was none" }));
        say(format_args!("tombstone    {}", if tombstone { "written" } else { "was there" }));
    }

    /// None beside a server, which does all else. A command does nothing of it, and is waited for.
    async fn alone(&self) -> anyhow::Result<Option<(Arc<dyn EventLog>, File)>> {
        for _ in 0..MOST_LOOKS {
            match self.place.log.open_alone().await? {
                Alone::Yes(log, held) => return Ok(Some((log, held))),
                Alone::BesideServer => return Ok(None),
                Alone::BesideCommand => tokio::time::sleep(BETWEEN_LOOKS).await,
            }
        }
        bail!(
            "the user is not deleted yet: no server runs in {}, and another command is at work \
             there; repeat this when it has ended",
            self.place.data_dir().display()
        )
    }

    /// No server runs, so this does what it would do.
    async fn clear(
        &self,
        log: Arc<dyn EventLog>,
        opened: &Opened,
        keyring: Keyring,
    ) -> anyhow::Result<()> {
        opened.blobs.sweep_incoming().context("clearing unfinished uploads")?;
        opened.blobs.sweep_documents().context("clearing unfinished documents")?;
        let views = open_views(&*log, &self.place.log).await?;
        let uploads = Uploads::open(&opened.blobs, &Reservations::default());
        let uploads = Arc::new(uploads.context("reading unfinished uploads")?);
        let letters = DeadLetters::new(&opened.blobs);
        let system = System::start(Clock::system(), log, views, keyring);
        // A worker has its lease from a server. Where the log is in a file of this directory there is
        // none; another node may be one, and then leases run out in their time.
        let (last_word, most_looks) = match self.place.log.file() {
            Some(_) => (JobCommand::Abandon, MOST_LOOKS),
            None => (JobCommand::Lapse, MOST_LOOKS_FOR_LONG),
        };
        let mut eraser =
            Eraser::new(Arc::clone(&system), letters, uploads).with_last_word(last_word);
        let catch_up = async || {
            let head = *system.log.head().borrow();
            let (mut reached, mut tries) = (0, 0);
            while let Err(late) = system.visible(head).await {
                let now = system.progress.now();
                tries = if now.position > reached { 0 } else { tries + 1 };
                reached = now.position;
                if reached >= head {
                    break;
                }
                ensure!(
                    tries < MOST_TRIES,
                    "the read model does not come further than event {reached} ({late}); \
                     `t2m doctor` says more"
                );
            }
            // What stands still shows of the user what it showed before.
            let stands = system.progress.now().parked;
            ensure!(
                stands.is_empty(),
                "the read model stands still at {} and cannot be cleared: {}",
                stands[0].position,
                stands[0].reason
            );
            anyhow::Ok(())
        };
        catch_up().await?;
        let origin = Metadata::by("erasure", Source::System);
        let deleted = system.users.execute(&self.user, Command::Delete, origin).await;
        deleted.context("deleting the user")?;
        catch_up().await?;
        let mut left = usize::MAX;
        for _ in 0..most_looks {
            left = eraser.look().await.context("clearing what is left")?;
            catch_up().await?;
            if left == 0 {
                break;
            }
            tokio::time::sleep(BETWEEN_LOOKS).await;
        }
        ensure!(
            left == 0,
            "the user is deleted, but {left} parts are in use still: repeat this, or start a server, \
             to clear them"
        );
        self.clear_beside(&system, opened).await?;
        renew(&system.views).await.context("writing the read model anew")?;
        say(format_args!(
            "log          the user is deleted, at position {}",
            *system.log.head().borrow()
        ));
        say(format_args!("read model   cleared"));
        Ok(())
    }

    /// What jobs have left outside log and read model.
    async fn clear_beside(&self, system: &System, opened: &Opened) -> anyhow::Result<()> {
        for kind in Kind::ALL {
            let scratch = dispatcher::scratch_of(kind, self.place.data_dir());
            dispatcher::sweep_alone(system, &scratch)
                .with_context(|| format!("clearing {}", scratch.display()))?;
        }
        let secrets = Secrets::new(Vault::new(&opened.blobs, SECRETS, opened.master.clone()));
        secrets.look(system).await.context("destroying the secrets of jobs")
    }
}

/// Until the read model is one that was written after the deletion.
async fn renew(views: &views::Views) -> Result<(), views::Error> {
    let mut tries = 0;
    while views.holds_residue()? {
        match renewal::look(views).await {
            Ok(_) => {}
            // A replay is at work there, which knew the user still.
            Err(views::Error::Rebuilding) if tries < MOST_LOOKS_FOR_LONG => {
                tries += 1;
                tokio::time::sleep(BETWEEN_LOOKS).await;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
