//! Whether the master key opens what lies in the store under it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::pin::pin;

use futures_util::{StreamExt, stream};
use serde_json::json;

use super::{Doctor, Doctoring, Verdict, few};
use crate::actors::keyring::KEYS;
use crate::actors::secrets::SECRETS;
use crate::cli::layout;
use crate::media::blobs::{self, Blobs};
use crate::media::vault::{Error, MasterKey, Vault};

const CHECK: &str = "keys";
/// What holds sealed keys and secrets.
const FOLDERS: [&str; 2] = [KEYS, SECRETS];
/// How many of a folder are opened to see whether the master key is theirs.
const TRIED: usize = 20;
/// Opened at the same time, where all are.
const AT_A_TIME: usize = 32;

/// What came of trying them. Their names have the folder before them.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tried {
    opened: usize,
    unopenable: BTreeSet<String>,
    /// With why.
    unreadable: BTreeMap<String, String>,
    untried: usize,
}

impl Doctoring {
    pub(super) async fn keys(&mut self, asked: &Doctor, store: &Blobs) {
        let path = self.data_dir.join(layout::MASTER_KEY);
        let given = asked.options.master_key.as_ref();
        match given.filter(|key| !key.reveal().trim().is_empty()) {
            // Several while one takes another's place.
            Some(keys) => {
                // What is wrong with it was said already, of the configuration.
                if let Ok(master) = MasterKey::parse(keys.reveal()) {
                    self.sealed_by(&master, store, asked.full).await;
                }
            }
            None if path.exists() => {
                self.sealed_by(&MasterKey::kept_in(&path), store, asked.full).await;
            }
            None => self.sealed_by_none(&path, store).await,
        }
    }

    async fn sealed_by_none(&mut self, path: &Path, store: &Blobs) {
        match count(store).await {
            Ok(0) => self.ok(CHECK, "there is no master key yet, and nothing was sealed"),
            Ok(sealed) => {
                let path = path.display();
                let says = format!("{sealed} sealed keys and secrets, and no master key at {path}");
                self.fault(CHECK, says);
            }
            Err(error) => self.fault(CHECK, error),
        }
    }

    async fn sealed_by(&mut self, master: &MasterKey, store: &Blobs, all: bool) {
        let tried = match Tried::of(store, master, all).await {
            Ok(tried) => tried,
            Err(error) => return self.fault(CHECK, error),
        };
        let (opened, sealed) = (tried.opened, tried.sealed());
        let Tried { unopenable, unreadable, untried, .. } = tried;
        let mut says = format!("the master key opens {opened} of {sealed} that were sealed");
        if untried > 0 {
            let how = if all { "" } else { " (--full tries all)" };
            says += &format!("; {untried} were not tried{how}");
        }
        if !unopenable.is_empty() {
            let why = "they are damaged, or another master key has sealed them";
            says += &format!("; it does not open {}: {why}", few(unopenable.iter()));
        }
        if !unreadable.is_empty() {
            let each = unreadable.iter().map(|(key, why)| format!("{key} ({why})"));
            says += &format!("; some cannot be read: {}", few(each));
        }
        let verdict = match unopenable.is_empty() && unreadable.is_empty() {
            true => Verdict::Ok,
            false => Verdict::Fault,
        };
        let shut = unopenable.into_iter().map(|key| (key, Error::Unopenable.to_string()));
        let details = shut.chain(unreadable).map(|(key, why)| json!({ "key": key, "why": why }));
        self.list(CHECK, verdict, says, details.collect());
    }
}

impl Tried {
    /// All of them, or some of each folder.
    ///
    /// # Errors
    /// The store cannot be listed, or the master key not be read; a bucket does not answer.
    async fn of(store: &Blobs, master: &MasterKey, all: bool) -> Result<Self, Error> {
        let mut tried = Self::default();
        for folder in FOLDERS {
            let names = store.names_in(folder).await?;
            let count = names.len();
            // What is escaped in the store has another name in the vault.
            let names: Vec<_> = names.into_iter().filter(|name| !name.contains('%')).collect();
            let names = if all { names } else { some(names) };
            tried.untried += count - names.len();
            let vault = Vault::new(store, folder, master.clone());
            let opening = names.into_iter().map(|name| {
                let vault = vault.clone();
                async move {
                    let opened = vault.open(&name).await.map(|found| found.is_some());
                    (format!("{folder}/{name}"), opened)
                }
            });
            let mut opening = pin!(stream::iter(opening).buffer_unordered(AT_A_TIME));
            while let Some((name, opened)) = opening.next().await {
                match opened {
                    Ok(true) => tried.opened += 1,
                    // Destroyed since it was listed.
                    Ok(false) => {}
                    Err(Error::Unopenable) => {
                        tried.unopenable.insert(name);
                    }
                    // On a disk that may be one file; whoever asks a bucket waits for each of them.
                    Err(Error::Store(error)) if store.local_root().is_some() => {
                        tried.unreadable.insert(name, error.to_string());
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(tried)
    }

    fn sealed(&self) -> usize {
        self.opened + self.unopenable.len() + self.unreadable.len() + self.untried
    }
}

/// Others each time, so that what is damaged is met one day.
fn some(names: Vec<String>) -> Vec<String> {
    let most = names.len().min(TRIED);
    let picked = rand::seq::index::sample(&mut rand::rng(), names.len(), most);
    picked.iter().map(|at| names[at].clone()).collect()
}

async fn count(store: &Blobs) -> Result<usize, blobs::Error> {
    let mut sealed = 0;
    for folder in FOLDERS {
        sealed += store.names_in(folder).await?.len();
    }
    Ok(sealed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::BlobStore;

    /// A store with so many keys and as many secrets.
    async fn sealed(data_dir: &Path, many: usize) -> (Blobs, MasterKey) {
        let store = Blobs::open(&BlobStore::File, data_dir).unwrap();
        let master = MasterKey::kept_in(&data_dir.join(layout::MASTER_KEY));
        for folder in FOLDERS {
            let vault = Vault::new(&store, folder, master.clone());
            for number in 0..many {
                vault.seal(&format!("name-{number:02}"), b"a key").await.unwrap();
            }
        }
        (store, master)
    }

    #[tokio::test]
    async fn all_that_do_not_open_are_found_and_named_when_all_are_tried() {
        let dir = tempfile::tempdir().unwrap();
        let (store, master) = sealed(dir.path(), 30).await;
        // Neither among the first, nor in one folder.
        let damaged = ["keys/name-25", "keys/name-29", "secrets/name-27"];
        for name in damaged {
            std::fs::write(dir.path().join("blobs").join(name), b"damaged").unwrap();
        }
        let found = Tried::of(&store, &master, true).await.unwrap();
        let unopenable = damaged.map(str::to_owned).into();
        assert_eq!(found, Tried { opened: 57, unopenable, ..Tried::default() });

        let mut doctoring = Doctoring { data_dir: dir.path().to_owned(), findings: Vec::new() };
        doctoring.sealed_by(&master, &store, true).await;
        let finding = doctoring.findings.pop().unwrap();
        assert_eq!(finding.verdict, Verdict::Fault);
        assert_eq!(
            finding.says,
            "the master key opens 57 of 60 that were sealed; it does not open keys/name-25, \
             keys/name-29, secrets/name-27: they are damaged, or another master key has sealed them"
        );
        let named: Vec<_> = finding.details.iter().map(|it| it["key"].as_str().unwrap()).collect();
        assert_eq!(named, damaged);
    }

    #[tokio::test]
    async fn of_many_some_are_tried_which_are_others_each_time_and_it_is_said_how_many_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let (store, master) = sealed(dir.path(), 30).await;
        let found = Tried::of(&store, &master, false).await.unwrap();
        assert_eq!(found, Tried { opened: 40, untried: 20, ..Tried::default() });
        let mut doctoring = Doctoring { data_dir: dir.path().to_owned(), findings: Vec::new() };
        doctoring.sealed_by(&master, &store, false).await;
        let finding = doctoring.findings.pop().unwrap();
        assert_eq!((finding.verdict, finding.details.len()), (Verdict::Ok, 0));
        assert_eq!(
            finding.says,
            "the master key opens 40 of 60 that were sealed; 20 were not tried (--full tries all)"
        );

        let names: Vec<_> = (0..1000).map(|number| format!("{number:03}")).collect();
        let [one, other] = [(); 2].map(|()| BTreeSet::from_iter(some(names.clone())));
        assert_eq!((one.len(), other.len()), (TRIED, TRIED));
        assert_ne!(one, other, "as likely as to guess a key");
        assert_eq!(some(names[..3].to_vec()).len(), 3);
    }
}
