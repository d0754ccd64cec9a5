//! The documents of a backup, and those that are in the store already. What is sealed must open with
//! the master key that the server will have. What another one has sealed is not lost unasked: some
//! server may have that one still.

use std::collections::{HashMap, HashSet};

use anyhow::{Context, bail, ensure};

use crate::actors::dead_letters::DeadLetters;
use crate::actors::keyring::{self, KEYS, Keyring, TOMBSTONES};
use crate::actors::secrets::SECRETS;
use crate::media::blobs::Blobs;
use crate::media::vault::MasterKey;

/// Of somebody who was erased before the restore; when, nobody says.
pub const TOMBSTONE: &[u8] = br#"{"erased_at":"before a restore"}"#;
/// Folders of the store that hold sealed keys and secrets.
const SEALED: [&str; 2] = [KEYS, SECRETS];

pub struct Document {
    pub folder: String,
    pub name: String,
    pub bytes: Vec<u8>,
}

/// What is to come into a store.
pub struct Bringing<'a> {
    pub documents: &'a [Document],
    /// The documents of those who were erased since the backup.
    pub erased: &'a HashSet<String>,
    /// The server's master key, where it is not the kept one.
    pub given: Option<&'a MasterKey>,
    /// The backup's.
    pub kept: Option<MasterKey>,
    /// Whether what does not open in the store gives way.
    pub replaces: bool,
}

impl Bringing<'_> {
    /// What is to go from the store, by folder and name: it does not open, while the backup's does
    /// or the backup has none. Nothing is changed yet.
    ///
    /// # Errors
    /// There is such and it may not go; nothing that is sealed would open; the store cannot be read.
    pub async fn in_the_way(&self, target: &Blobs) -> anyhow::Result<Vec<(&'static str, String)>> {
        let context = "looking at what is sealed in the store";
        let noted = target.names_in(TOMBSTONES).await.context(context)?;
        let brought = self.documents.iter().filter(|it| it.folder == TOMBSTONES);
        let gone = noted.iter().chain(self.erased).chain(brought.map(|it| &it.name));
        let gone: HashSet<&str> = gone.map(String::as_str).collect();
        let is_gone = |folder: &str, name: &str| folder == KEYS && gone.contains(name);
        let (mut opened, mut unopened, mut in_the_way) = (0, 0, vec![]);
        for folder in SEALED {
            let own = self.documents.iter().filter(|it| it.folder == folder);
            let own = own.filter(|it| !is_gone(folder, &it.name));
            let mut own: HashMap<&str, &[u8]> =
                own.map(|it| (it.name.as_str(), it.bytes.as_slice())).collect();
            for name in target.names_in(folder).await.context(context)? {
                if is_gone(folder, &name) {
                    continue;
                }
                // Gone since it was listed.
                let Some(there) = target.document(folder, &name).await.context(context)? else {
                    continue;
                };
                let own = own.remove(name.as_str());
                if self.opens(folder, &name, &there) {
                    opened += 1;
                } else if own.is_none_or(|own| self.opens(folder, &name, own)) {
                    opened += usize::from(own.is_some());
                    in_the_way.push((folder, name));
                } else {
                    unopened += 1;
                }
            }
            let brought = own.iter().filter(|(name, own)| self.opens(folder, name, own)).count();
            opened += brought;
            unopened += own.len() - brought;
        }
        // Keys that stay behind show it, too.
        let is_right = || {
            let mut sealed =
                self.documents.iter().filter(|it| SEALED.contains(&it.folder.as_str()));
            sealed.any(|it| self.opens(&it.folder, &it.name, &it.bytes))
        };
        let which = self.which();
        ensure!(
            self.master().is_some() || (unopened == 0 && in_the_way.is_empty()),
            "of {} sealed keys and secrets none opens: there is neither a master.key in the backup \
             nor T2M_MASTER_KEY; give the server's",
            unopened + in_the_way.len()
        );
        ensure!(
            opened > 0 || unopened == 0 || is_right(),
            "none of the {unopened} sealed keys and secrets opens with {which}: set T2M_MASTER_KEY \
             to the one that sealed them, or do not set it where that is the backup's master.key"
        );
        if let Some((folder, name)) = in_the_way.first()
            && !self.replaces
        {
            bail!(
                "{} sealed keys and secrets in the store, such as {folder}/{name}, do not open \
                 with {which}: give T2M_MASTER_KEY=NEW,OLD, the one that sealed them and the \
                 backup's, here and to the server; if the newer one is lost, and no server has \
                 it, --replace-keys puts the backup's in their place",
                in_the_way.len()
            );
        }
        if unopened > 0 {
            eprintln!(
                "{unopened} of the sealed keys and secrets do not open with {which}: they are \
                 damaged, or another one seals them"
            );
        }
        if !in_the_way.is_empty() {
            eprintln!(
                "{} sealed keys and secrets in the store do not open with {which}: the backup's \
                 come into their place, and those that it does not have are removed",
                in_the_way.len()
            );
        }
        Ok(in_the_way)
    }

    /// Tombstones first: whoever has one, here or in the backup, gets no key, and no dead letter that
    /// names him.
    ///
    /// # Errors
    /// The store does not take it, or no server would start on what is there now.
    pub async fn bring(
        &self,
        target: &Blobs,
        in_the_way: &[(&'static str, String)],
    ) -> anyhow::Result<()> {
        let context = "bringing the keys into the store";
        for name in self.erased {
            let tombstone = TOMBSTONE.to_vec();
            target.bring_document(TOMBSTONES, name, tombstone).await.context(context)?;
            target.remove_document(KEYS, name).await.context(context)?;
        }
        let is_tombstone = |document: &&Document| document.folder == TOMBSTONES;
        for Document { folder, name, bytes } in self.documents.iter().filter(is_tombstone) {
            target.bring_document(folder, name, bytes.clone()).await.context(context)?;
        }
        for (folder, name) in in_the_way {
            target.remove_document(folder, name).await.context(context)?;
        }
        if let Some(master) = self.master().filter(|_| !in_the_way.is_empty()) {
            // What another one has marked as its own.
            Keyring::new(target, master.clone()).forget_mark().await.context(context)?;
        }
        for Document { folder, name, bytes } in self.documents.iter().filter(|it| !is_tombstone(it))
        {
            let gone = folder == KEYS
                && target.document(TOMBSTONES, name).await.context(context)?.is_some();
            if !gone {
                target.bring_document(folder, name, bytes.clone()).await.context(context)?;
            }
        }
        // They are in clear: those that name somebody who was erased stay behind.
        let noted = target.documents(TOMBSTONES).list().await.context(context)?;
        let gone = noted.iter().filter_map(|note| keyring::user_of(&note.name)).collect();
        let left_out = DeadLetters::new(target).forget(&gone).await;
        left_out.context("leaving out the dead letters of erased users")?;
        self.ensure_ours(target).await
    }

    /// As a server asks at its start.
    async fn ensure_ours(&self, target: &Blobs) -> anyhow::Result<()> {
        let Some(master) = self.master() else { return Ok(()) };
        let is_ours = Keyring::new(target, master.clone()).is_ours(false).await;
        ensure!(
            is_ours.context("looking at the keys that were brought")?,
            "the keys of users that are in the store now do not open with {}: no server would start \
             on them",
            self.which()
        );
        Ok(())
    }

    fn master(&self) -> Option<&MasterKey> {
        self.given.or(self.kept.as_ref())
    }

    /// What the master key is called.
    fn which(&self) -> &'static str {
        match self.given {
            Some(_) => "T2M_MASTER_KEY",
            None => "the backup's master.key",
        }
    }

    fn opens(&self, folder: &str, name: &str, sealed: &[u8]) -> bool {
        self.master().is_some_and(|master| master.has_sealed(folder, name, sealed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::BlobStore;
    use crate::media::vault::{KEY_BYTES, SealingKey, Vault};

    fn store() -> (tempfile::TempDir, Blobs) {
        let dir = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(&BlobStore::File, dir.path()).unwrap();
        (dir, blobs)
    }

    fn master(byte: u8) -> MasterKey {
        MasterKey::given(SealingKey::new(&[byte; KEY_BYTES]).unwrap())
    }

    /// Each holds its own name.
    async fn seal(blobs: &Blobs, master: &MasterKey, paths: &[&str]) {
        for path in paths {
            let (folder, name) = path.split_once('/').unwrap();
            let vault = Vault::new(blobs, folder, master.clone());
            vault.seal(name, name.as_bytes()).await.unwrap();
        }
    }

    async fn documents_of(blobs: &Blobs) -> Vec<Document> {
        let mut documents = vec![];
        for folder in [KEYS, SECRETS, TOMBSTONES] {
            for name in blobs.names_in(folder).await.unwrap() {
                let bytes = blobs.document(folder, &name).await.unwrap().unwrap().to_vec();
                documents.push(Document { folder: folder.to_owned(), name, bytes });
            }
        }
        documents
    }

    async fn refusal(bringing: Bringing<'_>, store: &Blobs) -> String {
        bringing.in_the_way(store).await.unwrap_err().to_string()
    }

    #[tokio::test]
    async fn what_another_master_key_has_sealed_since_gives_way_only_where_that_is_asked_for() {
        let [(_one, backup), (_other, store)] = [store(), store()];
        let [old, new, wrong] = [1, 2, 3].map(master);
        seal(&backup, &old, &["keys/ada", "keys/bob", "keys/eve", "secrets/job-1"]).await;
        // Rotated since; one was erased since, and another one has come.
        seal(&store, &new, &["keys/ada", "keys/bob", "keys/dan", "secrets/job-1"]).await;
        store.bring_document(TOMBSTONES, "eve", TOMBSTONE.to_vec()).await.unwrap();
        let (documents, before) =
            (documents_of(&backup).await, store.names_in(KEYS).await.unwrap());
        let erased = HashSet::from(["bob".to_owned()]);
        let with = |given, kept: Option<&MasterKey>, replaces| {
            let (documents, erased, kept) = (&documents[..], &erased, kept.cloned());
            Bringing { documents, erased, given, kept, replaces }
        };

        let refused = refusal(with(None, Some(&old), false), &store).await;
        assert!(refused.starts_with("3 sealed keys and secrets in the store"), "{refused}");
        assert!(refused.contains("the backup's master.key") && refused.contains("--replace-keys"));
        for replaces in [false, true] {
            let refused = refusal(with(None, None, replaces), &store).await;
            assert!(refused.contains("neither a master.key in the backup nor"), "{refused}");
            let refused = refusal(with(Some(&wrong), Some(&old), replaces), &store).await;
            assert!(refused.starts_with("none of the 2 "), "{refused}");
        }
        let newer = with(Some(&new), Some(&old), true).in_the_way(&store).await.unwrap();
        assert!(newer.is_empty(), "whoever has the newer one loses nothing");
        assert_eq!(store.names_in(KEYS).await.unwrap(), before);

        let replacing = with(None, Some(&old), true);
        let in_the_way = replacing.in_the_way(&store).await.unwrap();
        let expected = [(KEYS, "ada"), (KEYS, "dan"), (SECRETS, "job-1")];
        assert_eq!(in_the_way, expected.map(|(folder, name)| (folder, name.to_owned())));
        replacing.bring(&store, &in_the_way).await.unwrap();
        assert_eq!(store.names_in(KEYS).await.unwrap(), ["ada"]);
        assert_eq!(store.names_in(TOMBSTONES).await.unwrap(), ["bob", "eve"]);
        for (folder, name) in [(KEYS, "ada"), (SECRETS, "job-1")] {
            let opened = Vault::new(&store, folder, old.clone()).open(name).await.unwrap();
            assert_eq!(opened.as_deref(), Some(name.as_bytes()));
        }
    }

    #[tokio::test]
    async fn a_damaged_key_comes_along_with_others_that_open_and_not_alone() {
        let [(_one, backup), (_other, store)] = [store(), store()];
        let (old, erased) = (master(1), HashSet::new());
        seal(&backup, &old, &["keys/ada"]).await;
        backup.bring_document(KEYS, "bob", b"damaged".to_vec()).await.unwrap();
        let documents = documents_of(&backup).await;
        let with = |documents| {
            let (given, kept) = (None, Some(old.clone()));
            Bringing { documents, erased: &erased, given, kept, replaces: false }
        };
        let refused = refusal(with(&documents[1..]), &store).await;
        assert!(refused.starts_with("none of the 1 sealed keys and secrets opens"), "{refused}");
        // But with one that stays behind, which shows that the master key is the right one.
        let gone = HashSet::from(["ada".to_owned()]);
        let erasing = Bringing { erased: &gone, ..with(&documents) };
        assert!(erasing.in_the_way(&store).await.unwrap().is_empty());
        with(&documents).bring(&store, &[]).await.unwrap();
        assert!(with(&documents).in_the_way(&store).await.unwrap().is_empty());
        assert_eq!(store.names_in(KEYS).await.unwrap(), ["ada", "bob"]);
        store.remove_document(KEYS, "ada").await.unwrap();
        let unusable = with(&documents[1..]).bring(&store, &[]).await.unwrap_err().to_string();
        assert!(unusable.contains("no server would start on them"), "{unusable}");
    }
}
