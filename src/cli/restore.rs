//! `t2m restore`: a backup into an empty data directory. Everything is checked before anything
//! takes its place: each file against the manifest, each blob against its name, the log's chain.

use std::collections::HashSet;
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use clap::Args;
use serde_json::{Value, json};

use super::backup::files::{copy_as, parse_list, place};
use super::backup::manifest::{Manifest, Part, sync_tree, write_private};
use super::log::carry::copy_into;
use super::log::{Which, verify_all};
use super::{owner, say, server_lock};
use crate::actors::keyring;
use crate::config::BlobStore;
use crate::log::transfer::{Carrying, Reading};
use crate::log::{EmbeddedLog, EventLog};
use crate::media::blobs::Blobs;
use crate::media::documents::is_unfinished;

/// What a restore that was cut off leaves in the data directory, and the next one removes.
pub const STAGING: &str = "restoring";
/// A backup holds the log in this form, whatever the engine.
const LOG: &str = "log.sqlite";
/// Of somebody who was erased before the restore; when, nobody says.
const TOMBSTONE: &[u8] = br#"{"erased_at":"before a restore"}"#;

#[derive(Args)]
pub struct Restore {
    /// The backup
    #[arg(value_name = "DIR")]
    from: PathBuf,
    #[command(flatten)]
    log: Which,
    /// The store of files that the server will use: `file` or `s3://bucket/prefix`
    #[arg(long = "store", env = "T2M_BLOBS", default_value = "file")]
    store: String,
    /// The backup's keys, where they are kept apart [default: `keys` in the backup]
    #[arg(long, value_name = "DIR")]
    keys: Option<PathBuf>,
    /// Who was erased since the backup: a copy of the live store's folder `erased`, or a file with
    /// the names in it, one a line. Their keys are not restored
    #[arg(long, value_name = "DIR_OR_FILE")]
    tombstones: Option<PathBuf>,
    /// JSON instead of text
    #[arg(long)]
    json: bool,
}

impl Restore {
    pub fn run(self) -> anyhow::Result<()> {
        owner::refuse_root(&self.log.data_dir)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let done = runtime.block_on(self.restore())?;
        let Restored { manifest, blobs, erased } = done;
        let (events, head_hash) = (manifest.log.events, &manifest.log.head_hash);
        if self.json {
            let restored = json!({
                "events": events, "head_hash": head_hash, "blobs": blobs, "erased": erased,
                "missing_blobs": manifest.blobs.missing, "backup_of": manifest.created_at,
            });
            say(format_args!("{restored}"));
            return Ok(());
        }
        say(format_args!("data       {}", self.log.data_dir.display()));
        say(format_args!("backup of  {}", manifest.created_at.to_rfc3339()));
        say(format_args!("events     {events}, each chained to the one before it"));
        say(format_args!("head hash  {head_hash}"));
        say(format_args!("files      {blobs} of {}", manifest.blobs.count));
        say(format_args!("erased     {erased} users since the backup"));
        say(format_args!("`t2m serve` computes the read model anew at its start"));
        Ok(())
    }

    async fn restore(&self) -> anyhow::Result<Restored> {
        let store = BlobStore::parse(&self.store)
            .map_err(|fault| super::BadConfiguration(vec![format!("T2M_BLOBS: {fault}")]))?;
        self.log.check()?;
        let manifest = Manifest::read(&self.from)?;
        let erased = self.erased()?;
        let (staging, broken_off, _held) = self.begin()?;
        let give_up = |error: anyhow::Error| match broken_off {
            // What an earlier one brought into a log over the network is half a log.
            true => empty(&staging).map_or_else(|it| it, |()| error.context("repeat the restore")),
            false => std::fs::remove_dir_all(&staging)
                .context("removing what was restored")
                .map_or_else(|it| it, |()| error.context("nothing was restored")),
        };
        tell_strangers(&manifest, &erased);
        let restored = self.stage(&store, &staging, &manifest, &erased).await;
        let (blobs, documents) = match restored {
            Ok(staged) => staged,
            Err(error) => return Err(give_up(error)),
        };
        let network = match self.log.file() {
            Some(_) => None,
            None => {
                self.ensure_fits(&staging).await.map_err(give_up)?;
                Some(staging.join(LOG))
            }
        };
        if store != BlobStore::File {
            // The last thing that can fail; the store's own tombstones go before the keys.
            let target = Blobs::open(&store, &self.log.data_dir).context("opening the store")?;
            bring_documents(&target, &documents, &erased).await?;
        }
        if let Some(path) = network {
            // What is staged stays if it breaks off, so that no server starts on half a log.
            let log = EmbeddedLog::open_read_only(&path).context("reading the restored log")?;
            copy_into(&log, &self.log, "restoring the log").await?;
            drop(log);
            remove_log(&path).context("removing the copy of the log")?;
        }
        put_into_place(&staging, &self.log.data_dir)?;
        Ok(Restored { manifest, blobs, erased: erased.len() })
    }

    /// Before anything is brought anywhere: a log over the network must be empty, or have the
    /// beginning of this one from a restore that broke off.
    async fn ensure_fits(&self, staging: &Path) -> anyhow::Result<()> {
        let log = EmbeddedLog::open_read_only(&staging.join(LOG))?;
        let target = self.log.open().await?;
        let holds = target.stats().await.context("counting the log")?.events;
        ensure!(
            holds <= log.stats().await?.events,
            "the log {} (T2M_LOG) has more than this backup: it has gone on since",
            self.log.shown()
        );
        let (mut reading, mut carrying) = (Reading::of(&log), Carrying::into(&*target));
        loop {
            let page = reading.page().await.context("reading the restored log")?;
            let same = carrying.compare(&page).await;
            let same = same.with_context(|| {
                format!(
                    "the log {} (T2M_LOG) is neither empty nor a part of this backup",
                    self.log.shown()
                )
            })?;
            if page.is_empty() || same < page.len() {
                return Ok(());
            }
        }
    }

    /// The directory in which everything is put together, whether an earlier restore broke off, and
    /// a hold on the data directory.
    fn begin(&self) -> anyhow::Result<(PathBuf, bool, File)> {
        let target = &self.log.data_dir;
        let context = || format!("making the data directory {}", target.display());
        std::fs::create_dir_all(target).with_context(context)?;
        let held = File::open(target).with_context(context)?;
        match held.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                bail!("another restore into {} is at work", target.display())
            }
            Err(TryLockError::Error(error)) => return Err(error).with_context(context),
        }
        let staging = target.join(STAGING);
        for entry in std::fs::read_dir(target).with_context(context)? {
            let name = entry.with_context(context)?.file_name();
            let is_ours = name == STAGING || server_lock::is_named(&name);
            ensure!(
                is_ours,
                "{} is not empty; a backup is never restored over data",
                target.display()
            );
        }
        let broken_off = staging.exists();
        match broken_off {
            // It stays where it is: by being there it keeps servers from starting.
            true => empty(&staging)?,
            false => std::fs::create_dir(&staging).with_context(context)?,
        }
        // Nobody reads half an embedded log.
        Ok((staging, broken_off && self.log.file().is_none(), held))
    }

    /// The number of files, and the documents of the store.
    async fn stage(
        &self,
        store: &BlobStore,
        staging: &Path,
        manifest: &Manifest,
        erased: &HashSet<String>,
    ) -> anyhow::Result<(u64, Vec<Document>)> {
        let blobs = self.stage_blobs(staging, manifest)?;
        let mut documents = Vec::new();
        let keys = self.keys.clone().unwrap_or_else(|| self.from.join("keys"));
        for part in manifest.parts.iter().filter(|part| part.path != "blobs.txt") {
            let bytes = part.read(&self.from, &keys)?;
            match Target::of(part)? {
                Target::File(name) => write_private(&staging.join(name), &bytes)
                    .with_context(|| format!("writing {name}"))?,
                Target::Document { folder, name } => documents.push(Document {
                    folder: folder.to_owned(),
                    name: name.to_owned(),
                    bytes,
                }),
            }
        }
        if *store == BlobStore::File {
            let target = Blobs::open(store, staging).context("making the store of files")?;
            bring_documents(&target, &documents, erased).await?;
        }
        self.stage_log(staging, manifest).await?;
        Ok((blobs, documents))
    }

    fn stage_blobs(&self, staging: &Path, manifest: &Manifest) -> anyhow::Result<u64> {
        let list = manifest.parts.iter().find(|part| part.path == "blobs.txt");
        let list = list.context("the manifest names no list of files")?;
        let list = parse_list(&list.read(&self.from, &self.from)?)?;
        if manifest.blobs.how == "listed" {
            return Ok(0);
        }
        let missing: HashSet<_> = manifest.blobs.missing.iter().collect();
        let mut brought = 0;
        for (sha256, _) in list.iter().filter(|(sha256, _)| !missing.contains(sha256)) {
            let target = place(staging, sha256);
            if let Some(directory) = target.parent() {
                std::fs::create_dir_all(directory).context("making the store of files")?;
            }
            copy_as(&place(&self.from, sha256), &target, sha256)
                .with_context(|| format!("restoring the file {sha256}"))?;
            brought += 1;
        }
        Ok(brought)
    }

    async fn stage_log(&self, staging: &Path, manifest: &Manifest) -> anyhow::Result<()> {
        let target = staging.join(LOG);
        let Part { path, sha256, .. } = &manifest.log.part;
        copy_as(&self.from.join(path), &target, sha256).context("restoring the log")?;
        let log = EmbeddedLog::open_read_only(&target).context("opening the restored log")?;
        let verified = verify_all(&log).await.context("verifying the restored log")?;
        let same = verified.events == manifest.log.events
            && hex::encode(verified.head_hash) == manifest.log.head_hash;
        ensure!(same, "the backup's log is not the one its manifest names");
        drop(log);
        for suffix in ["-wal", "-shm"] {
            let _ = std::fs::remove_file(staging.join(format!("log.sqlite{suffix}")));
        }
        Ok(())
    }

    fn erased(&self) -> anyhow::Result<HashSet<String>> {
        let Some(path) = &self.tombstones else { return Ok(HashSet::new()) };
        let context = || format!("reading the tombstones {}", path.display());
        if !path.is_dir() {
            let text = std::fs::read_to_string(path).with_context(context)?;
            let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
            let name = |line: &str| {
                let named = keyring::document_of(line);
                named.with_context(|| format!("{}: {line} is no user", path.display()))
            };
            return lines.map(name).collect();
        }
        let mut names = HashSet::new();
        for entry in std::fs::read_dir(path).with_context(context)? {
            let entry = entry.with_context(context)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if is_unfinished(&name) {
                continue;
            }
            // A folder of something else would be taken for users who were erased.
            let note = std::fs::read(entry.path()).unwrap_or_default();
            let note: Value = serde_json::from_slice(&note).unwrap_or_default();
            let is_note = note.get("erased_at").is_some_and(Value::is_string);
            ensure!(
                is_note && keyring::document_of(&name).as_deref() == Some(&name),
                "{} is no copy of the folder `erased`: {name} is no tombstone",
                path.display()
            );
            names.insert(name);
        }
        Ok(names)
    }
}

/// They may have come after the backup; or the name is not spelled right.
fn tell_strangers(manifest: &Manifest, erased: &HashSet<String>) {
    let known: HashSet<&str> = manifest
        .parts
        .iter()
        .filter_map(|part| {
            let (folder, name) = part.path.strip_prefix("keys/")?.split_once('/')?;
            matches!(folder, "keys" | "erased").then_some(name)
        })
        .collect();
    for name in erased.iter().filter(|name| !known.contains(name.as_str())) {
        eprintln!("{name} is not in this backup; it stays erased all the same");
    }
}

struct Restored {
    manifest: Manifest,
    blobs: u64,
    erased: usize,
}

struct Document {
    folder: String,
    name: String,
    bytes: Vec<u8>,
}

/// Where a part of the backup belongs.
enum Target<'a> {
    /// Right in the data directory.
    File(&'a str),
    Document {
        folder: &'a str,
        name: &'a str,
    },
}

impl<'a> Target<'a> {
    fn of(part: &'a Part) -> anyhow::Result<Self> {
        let segments: Vec<&str> = part.path.split('/').collect();
        match segments[..] {
            ["keys" | "rest", name] => Ok(Self::File(name)),
            ["keys" | "rest", folder, name] => Ok(Self::Document { folder, name }),
            _ => bail!("the manifest names {}, which belongs nowhere", part.path),
        }
    }
}

/// Tombstones first: whoever has one, here or in the backup, gets no key.
async fn bring_documents(
    target: &Blobs,
    documents: &[Document],
    erased: &HashSet<String>,
) -> anyhow::Result<()> {
    let context = "bringing the keys into the store";
    for name in erased {
        target.bring_document("erased", name, TOMBSTONE.to_vec()).await.context(context)?;
        target.remove_document("keys", name).await.context(context)?;
    }
    let is_tombstone = |document: &&Document| document.folder == "erased";
    for Document { folder, name, bytes } in documents.iter().filter(is_tombstone) {
        target.bring_document(folder, name, bytes.clone()).await.context(context)?;
    }
    for Document { folder, name, bytes } in documents.iter().filter(|it| !is_tombstone(it)) {
        let gone =
            folder == "keys" && target.document("erased", name).await.context(context)?.is_some();
        if !gone {
            target.bring_document(folder, name, bytes.clone()).await.context(context)?;
        }
    }
    Ok(())
}

fn remove_log(path: &Path) -> std::io::Result<()> {
    for suffix in ["", "-wal", "-shm"] {
        let mut name = path.as_os_str().to_owned();
        name.push(suffix);
        match std::fs::remove_file(&name) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// The log last: without one, a data directory is an empty server's.
fn put_into_place(staging: &Path, data_dir: &Path) -> anyhow::Result<()> {
    let context = || format!("moving what was restored into {}", data_dir.display());
    sync_tree(staging).with_context(context)?;
    let mut names = Vec::new();
    for entry in std::fs::read_dir(staging).with_context(context)? {
        names.push(entry.with_context(context)?.file_name());
    }
    names.sort_by_key(|name| name == LOG);
    for name in names {
        std::fs::rename(staging.join(&name), data_dir.join(&name)).with_context(context)?;
    }
    std::fs::remove_dir(staging).with_context(context)?;
    File::open(data_dir).and_then(|dir| dir.sync_all()).with_context(context)
}

fn empty(directory: &Path) -> anyhow::Result<()> {
    let context = || format!("emptying {}", directory.display());
    for entry in std::fs::read_dir(directory).with_context(context)? {
        let path = entry.with_context(context)?.path();
        let removed = match path.is_dir() {
            true => std::fs::remove_dir_all(&path),
            false => std::fs::remove_file(&path),
        };
        removed.with_context(context)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tombstone_that_was_never_finished_is_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["user_ada", "user_bob#1"] {
            std::fs::write(dir.path().join(name), TOMBSTONE).unwrap();
        }
        let log = Which { data_dir: PathBuf::new(), setting: "embedded".to_owned() };
        let tombstones = Some(dir.path().to_owned());
        let (from, store) = (PathBuf::new(), "file".to_owned());
        let restore = Restore { from, log, store, keys: None, tombstones, json: false };
        assert_eq!(restore.erased().unwrap(), HashSet::from(["user_ada".to_owned()]));
        std::fs::write(dir.path().join("user_bob"), "no tombstone").unwrap();
        assert!(restore.erased().is_err());
    }
}
