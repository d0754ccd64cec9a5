//! `t2m keys`: which master key seals what, and how another one takes its place. Also where every
//! command that reads what is personal finds the keys.

use std::fs::File;
use std::path::Path;

use anyhow::Context;
use clap::{Args, Subcommand};

use super::layout::{EXCHANGE_LOCK, MASTER_KEY};
use super::log::{Alone, Which};
use super::{BadConfiguration, agreed, owner, restore, say, server_lock};
use crate::actors::keyring::{self, KEYS, Keyring};
use crate::actors::secrets::SECRETS;
use crate::config::{BlobStore, Secret};
use crate::media::blobs::{self, Blobs};
use crate::media::vault::{self, MasterKey, Vault};

/// What is said of what lies in [`KEYS`].
const OF_USERS: &str = "users' keys";

#[derive(Subcommand)]
pub enum Keys {
    /// Count what is sealed, and what of it by another master key than the first
    Status(Place),
    /// Seal everything anew under the first master key; a kept one gets a successor first
    Rotate(Place),
}

/// Where the keys of users lie, as the server has it.
#[derive(Debug, Clone, Args)]
// Commands have places of their own beside this one, and clap tells groups apart by name.
#[group(id = "store_and_keys")]
pub struct Place {
    #[command(flatten)]
    pub log: Which,
    /// The store of files and keys, the same as the server's
    #[arg(long, env = "T2M_BLOBS", default_value = "file")]
    pub blobs: String,
    /// The same as the server's
    #[arg(long, env = "T2M_MASTER_KEY", hide_env_values = true)]
    pub master_key: Option<Secret>,
}

/// The store and its keys.
pub struct Opened {
    pub blobs: Blobs,
    pub master: MasterKey,
}

impl Place {
    /// # Errors
    /// [`BadConfiguration`], or the store cannot be opened.
    pub fn open(&self) -> anyhow::Result<Opened> {
        self.opened(Blobs::open)
    }

    /// To look only; nothing is made where there is nothing.
    ///
    /// # Errors
    /// As [`Place::open`].
    pub fn open_for_reading(&self) -> anyhow::Result<Opened> {
        self.opened(Blobs::open_for_reading)
    }

    fn opened(
        &self,
        open: fn(&BlobStore, &Path) -> Result<Blobs, blobs::Error>,
    ) -> anyhow::Result<Opened> {
        let store = BlobStore::parse(&self.blobs)
            .map_err(|fault| BadConfiguration(vec![format!("T2M_BLOBS: {fault}")]))?;
        let master = given_master_key(self.master_key.as_ref())?
            .unwrap_or_else(|| MasterKey::kept_in(&self.data_dir().join(MASTER_KEY)));
        let blobs = open(&store, self.data_dir());
        let blobs = blobs.with_context(|| format!("opening {}", self.data_dir().display()))?;
        Ok(Opened { blobs, master })
    }

    pub fn data_dir(&self) -> &Path {
        &self.log.data_dir
    }
}

/// The master key that a setting holds; none if it is not set.
///
/// # Errors
/// [`BadConfiguration`].
pub fn given_master_key(setting: Option<&Secret>) -> anyhow::Result<Option<MasterKey>> {
    let given = setting.filter(|key| !key.reveal().trim().is_empty());
    let parsed = given.map(|key| MasterKey::parse(key.reveal())).transpose();
    Ok(parsed.map_err(|fault| BadConfiguration(vec![format!("T2M_MASTER_KEY: {fault}")]))?)
}

impl Opened {
    pub fn keyring(&self) -> Keyring {
        Keyring::new(&self.blobs, self.master.clone())
    }

    /// The keys of users, for who will seal with them.
    ///
    /// # Errors
    /// Another master key than this one has sealed those that are there.
    pub async fn own_keyring(&self) -> anyhow::Result<Keyring> {
        let keyring = self.keyring();
        anyhow::ensure!(
            keyring.is_ours(false).await.context("looking at the keys of users")?,
            "T2M_MASTER_KEY: the keys in the store were sealed by another master key; give the \
             server's, or restore the one of this data directory (master.key)"
        );
        Ok(keyring)
    }

    /// Keeps everybody else from exchanging the kept key until it is dropped: of two that do so at
    /// once, the second drops what the first has put there and a server has sealed with already.
    fn begin_exchange(&self) -> anyhow::Result<Option<File>> {
        let Some(path) = self.master.path() else { return Ok(None) };
        let held = server_lock::lock(&path.with_file_name(EXCHANGE_LOCK))?;
        let held =
            held.with_context(|| format!("another rotation of {} is at work", path.display()));
        held.map(Some)
    }

    /// What the master key seals, by what it is.
    fn vaults(&self) -> [(&'static str, Vault); 2] {
        [(OF_USERS, KEYS), ("secrets of jobs", SECRETS)]
            .map(|(what, folder)| (what, Vault::new(&self.blobs, folder, self.master.clone())))
    }
}

impl Keys {
    pub fn run(self) -> anyhow::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            match self {
                Self::Status(place) => status(&place).await,
                Self::Rotate(place) => rotate(&place).await,
            }
        })
    }
}

async fn status(place: &Place) -> anyhow::Result<()> {
    // Nothing is sealed where nothing is, which must not pass for an answer about the server's keys.
    drop(place.log.open_for_reading().await?);
    let opened = place.open_for_reading()?;
    for (what, vault) in opened.vaults() {
        let (mut count, mut older) = (0, 0);
        for sealed in vault.list().await.with_context(|| format!("listing the {what}"))? {
            let reading = || format!("opening {} of the {what}", sealed.name);
            if let Some(by_first) = vault.is_by_first(&sealed.name).await.with_context(reading)? {
                count += 1;
                older += usize::from(!by_first);
            }
        }
        say(format_args!("{what:<17}{count:>9}, {older} of them under an older master key"));
    }
    let erased = opened.keyring().erased().await.context("listing the tombstones")?;
    say(format_args!("{:<17}{:>9}", "erased users", erased.len()));
    Ok(())
}

/// Both keys open everything until the last step, so it may break off anywhere and be repeated.
async fn rotate(place: &Place) -> anyhow::Result<()> {
    owner::refuse_root(place.data_dir())?;
    restore::refuse_unfinished(place.data_dir())?;
    // A slip of the pen must not make a key where nothing is sealed.
    drop(place.log.open_for_reading().await?);
    // Nor is anything sealed anew that cannot be ended.
    place.log.ensure_no_loss_before_opening().await?;
    let opened = place.open()?;
    let shared = agreed::in_store(&opened.blobs);
    anyhow::ensure!(
        opened.master.path().is_none()
            || shared.get(MASTER_KEY).await.context("looking into the store")?.is_none(),
        "several nodes agreed on this master key through the store; set T2M_MASTER_KEY=NEW,OLD for \
         all of them, where OLD is master.key in base64, restart them, and rotate then"
    );
    // Nor one beside what another has sealed: it would be taken for that of the directory.
    opened.own_keyring().await?;
    let _alone = opened.begin_exchange()?;
    opened.master.put_fresh_first().context("making the new master key")?;
    reseal(&opened).await?;
    let Some(path) = opened.master.path() else {
        // What the nodes may have agreed on before it was given opens nothing any more.
        shared.delete(MASTER_KEY).await.context("removing the old master key from the store")?;
        say(format_args!("take the older keys out of T2M_MASTER_KEY now, everywhere"));
        return Ok(());
    };
    // A server may be about to store something that it sealed before it saw the new key.
    let alone = place.log.open_alone().await?;
    let until = match &alone {
        Alone::Yes(..) => None,
        Alone::BesideServer => Some("a server runs: stop it and"),
        Alone::BesideCommand => Some("another command is at work: wait for it and"),
    };
    if let Some(until) = until {
        say(format_args!(
            "{} keeps the old key beside the new one as long as {until} rotate again to forget it",
            path.display()
        ));
        return Ok(());
    }
    reseal(&opened).await?;
    opened.master.keep_first_alone().context("forgetting the old master key")?;
    drop(alone);
    say(format_args!("{} holds the new master key alone", path.display()));
    Ok(())
}

async fn reseal(opened: &Opened) -> anyhow::Result<()> {
    for (what, vault) in opened.vaults() {
        let mut count = 0;
        for sealed in vault.list().await.with_context(|| format!("listing the {what}"))? {
            let resealed = vault.reseal(&sealed.name).await;
            let is_unopenable = matches!(resealed, Err(vault::Error::Unopenable));
            let user = keyring::user_of(&sealed.name).filter(|_| is_unopenable && what == OF_USERS);
            let remedy = user.map_or_else(String::new, |user| {
                format!(
                    ", without which the old master key has to stay (where another master key \
                     sealed it, give that one, too, in T2M_MASTER_KEY; where it is damaged, bring \
                     back a copy that opens, or, as the last resort, give the user up with \
                     `t2m erase '{user}'`)"
                )
            });
            let sealing = || format!("sealing {} of the {what} anew{remedy}", sealed.name);
            count += usize::from(resealed.with_context(sealing)?);
        }
        say(format_args!("{what:<17}{count:>9} sealed anew"));
    }
    let keyring = opened.keyring();
    keyring.forget_mark().await.context("removing the mark of the old master key")?;
    // One that was destroyed while it was sealed anew must not stay.
    for user in keyring.erased().await.context("listing the tombstones")? {
        keyring.bury(&user).await.with_context(|| format!("destroying the key of {user}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::EmbeddedLog;
    use crate::media::vault::KEY_BYTES;

    #[tokio::test]
    async fn a_second_rotation_at_the_same_time_is_refused_and_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        drop(EmbeddedLog::open(&dir.path().join("log.sqlite")).unwrap());
        let (data_dir, setting) = (dir.path().to_owned(), "embedded".to_owned());
        let log = Which { data_dir, setting };
        let place = Place { log, blobs: "file".to_owned(), master_key: None };
        rotate(&place).await.unwrap();
        let key = || std::fs::read(dir.path().join("master.key")).unwrap();
        let (first, other) = (key(), place.open().unwrap().begin_exchange().unwrap());
        let refused = rotate(&place).await.unwrap_err().to_string();
        assert!(refused.starts_with("another rotation of ") && refused.ends_with(" is at work"));
        assert_eq!(key(), first);
        drop(other);
        rotate(&place).await.unwrap();
        assert_ne!(key(), first);
    }

    #[tokio::test]
    async fn no_key_is_made_where_another_one_has_sealed_something() {
        let dir = tempfile::tempdir().unwrap();
        drop(EmbeddedLog::open(&dir.path().join("log.sqlite")).unwrap());
        let (data_dir, setting) = (dir.path().to_owned(), "embedded".to_owned());
        let log = Which { data_dir, setting };
        let place = Place { log, blobs: "file".to_owned(), master_key: None };
        // The server has its key from elsewhere, and whoever calls the command does not.
        let given = MasterKey::kept_in(&dir.path().join("elsewhere"));
        let opened = place.open().unwrap();
        Vault::new(&opened.blobs, KEYS, given).seal("ada", b"a key").await.unwrap();
        let refused = rotate(&place).await.unwrap_err().to_string();
        assert!(refused.starts_with("T2M_MASTER_KEY: "), "{refused}");
        assert!(!dir.path().join("master.key").exists());
    }

    #[tokio::test]
    async fn of_a_damaged_key_it_is_said_how_the_rotation_ends() {
        let dir = tempfile::tempdir().unwrap();
        drop(EmbeddedLog::open(&dir.path().join("log.sqlite")).unwrap());
        let (data_dir, setting) = (dir.path().to_owned(), "embedded".to_owned());
        let log = Which { data_dir, setting };
        let place = Place { log, blobs: "file".to_owned(), master_key: None };
        let opened = place.open().unwrap();
        let vault = Vault::new(&opened.blobs, KEYS, opened.master.clone());
        for name in ["ada", "auth0=7"] {
            vault.seal(name, b"a key").await.unwrap();
        }
        std::fs::write(dir.path().join("blobs/keys/auth0=7"), b"damaged").unwrap();
        let keys = || std::fs::read(dir.path().join("master.key")).unwrap().len() / KEY_BYTES;
        let refused = format!("{:#}", rotate(&place).await.unwrap_err());
        assert!(refused.starts_with("sealing auth0=7 of the users' keys anew"), "{refused}");
        assert!(
            refused.contains("`t2m erase 'auth0|7'`") && refused.contains("damage"),
            "{refused}"
        );
        assert_eq!(keys(), 2);
        let user = keyring::user_of("auth0=7").unwrap();
        opened.keyring().destroy(&user, chrono::DateTime::UNIX_EPOCH).await.unwrap();
        rotate(&place).await.unwrap();
        assert_eq!(keys(), 1);
    }
}
