//! `t2m restore`: a backup into an empty data directory. Everything is checked before anything
//! takes its place: each file against the manifest, each blob against its name, the log's chain.

mod documents;
mod staging;

use std::collections::HashSet;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use clap::Args;
use serde_json::{Value, json};

use super::backup::files::{copy_as, ensure_whole, parse_list, place};
use super::backup::manifest::{Manifest, Part, write_private};
use super::keys::given_master_key;
use super::layout::{LOG, MASTER_KEY};
use super::log::carry::copy_into;
use super::log::{Which, verify_all};
use super::{owner, say};
use crate::actors::keyring;
use crate::config::{BlobStore, Secret};
use crate::log::transfer::{Carrying, Reading};
use crate::log::{EmbeddedLog, EventLog};
use crate::media::blobs::{self, Blobs};
use crate::media::documents::is_unfinished;
use crate::media::vault::MasterKey;
use documents::{Bringing, Document};
use staging::{Restored, Staging};

pub use staging::refuse_unfinished;

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
    /// The same as the server's; without it that is the backup's `master.key`
    #[arg(long, env = "T2M_MASTER_KEY", hide_env_values = true)]
    master_key: Option<Secret>,
    /// Where keys in the store do not open, put the backup's in their place, and remove those that the
    /// backup does not have: only if the master key that sealed them is lost for good
    #[arg(long)]
    replace_keys: bool,
    /// Who was erased since the backup: a copy of the live store's folder `erased`, or a file with
    /// the names in it, one a line. Their keys are not restored
    #[arg(long, value_name = "DIR_OR_FILE")]
    tombstones: Option<PathBuf>,
    /// Go on without the files that are damaged in the backup, or not there; each is named
    #[arg(long)]
    without_damaged_files: bool,
    /// JSON instead of text
    #[arg(long)]
    json: bool,
}

impl Restore {
    pub fn run(self) -> anyhow::Result<()> {
        owner::refuse_root(&self.log.data_dir)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (manifest, restored) = runtime.block_on(self.restore())?;
        let Restored { head_hash, blobs, erased, left_out, .. } = restored;
        let (events, erased) = (manifest.log.events, erased.len());
        if self.json {
            let restored = json!({
                "events": events, "head_hash": head_hash, "blobs": blobs, "erased": erased,
                "missing_blobs": manifest.blobs.missing, "left_out_blobs": left_out,
                "listed_blobs": manifest.blobs.listed(),
                "backup_of": manifest.created_at,
            });
            say(format_args!("{restored}"));
            return Ok(());
        }
        say(format_args!("data       {}", self.log.data_dir.display()));
        say(format_args!("backup of  {}", manifest.created_at.to_rfc3339()));
        say(format_args!("events     {events}, each chained to the one before it"));
        say(format_args!("head hash  {head_hash}"));
        say(format_args!("files      {blobs} of {}", manifest.blobs.count));
        if manifest.blobs.listed() > 0 {
            say(format_args!(
                "listed     the backup has none of its files: they must be in the store (T2M_BLOBS)"
            ));
        }
        if !left_out.is_empty() {
            say(format_args!("left out   {} files that are damaged or not there", left_out.len()));
        }
        say(format_args!("erased     {erased} users since the backup"));
        say(format_args!("`t2m serve` computes the read model anew at its start"));
        Ok(())
    }

    async fn restore(&self) -> anyhow::Result<(Manifest, Restored)> {
        let store = BlobStore::parse(&self.store)
            .map_err(|fault| super::BadConfiguration(vec![format!("T2M_BLOBS: {fault}")]))?;
        self.log.check()?;
        let given = given_master_key(self.master_key.as_ref())?;
        let manifest = Manifest::read(&self.from)?;
        let erased = self.erased()?;
        let bucket = match store {
            BlobStore::File => None,
            _ => {
                let bucket =
                    Blobs::open(&store, &self.log.data_dir).context("opening the store")?;
                bucket.probe().await.context("looking into the store")?;
                Some(bucket)
            }
        };
        let staging = Staging::begin(&self.log.data_dir)?;
        if let Some(moving) = &staging.moving {
            let Restored { backup_of, head_hash, erased: they, .. } = &moving.restored;
            ensure!(
                *backup_of == manifest.created_at
                    && *head_hash == manifest.log.head_hash
                    && they.iter().eq(sorted(&erased)),
                "a restore of the backup of {} broke off while it came into its place: repeat that \
                 one, with the same tombstones, or empty {}",
                backup_of.to_rfc3339(),
                self.log.data_dir.display()
            );
            staging.move_on(moving)?;
            return Ok((manifest, moving.restored.clone()));
        }
        tell_strangers(&manifest, &erased);
        let (bucket, given) = (bucket.as_ref(), given.as_ref());
        let brought = self.bring(&staging, bucket, &manifest, &erased, given).await;
        let restored = match brought {
            Ok(restored) => restored,
            Err(error) => return Err(self.give_up(&staging, error)),
        };
        if self.log.file().is_none() {
            // What is staged stays if it breaks off, so that no server starts on half a log.
            let path = staging.path.join(LOG);
            let log = EmbeddedLog::open_read_only(&path).context("reading the restored log")?;
            copy_into(&log, &self.log, "restoring the log").await?;
            drop(log);
            remove_log(&path).context("removing the copy of the log")?;
        }
        match staging.put_into_place(&restored) {
            Ok(()) => Ok((manifest, restored)),
            Err(error) if staging.is_moving() || self.log.file().is_none() => Err(error),
            Err(error) => Err(self.give_up(&staging, error)),
        }
    }

    /// Everything but a log over the network; what comes into a bucket comes last.
    async fn bring(
        &self,
        staging: &Staging,
        bucket: Option<&Blobs>,
        manifest: &Manifest,
        erased: &HashSet<String>,
        given: Option<&MasterKey>,
    ) -> anyhow::Result<Restored> {
        let Files { sound, left_out } = self.stage_blobs(&staging.path, bucket, manifest)?;
        let documents = self.stage_parts(&staging.path, manifest)?;
        let (documents, kept) = (&documents[..], staging.path.join(MASTER_KEY));
        let kept = kept.exists().then(|| MasterKey::kept_in(&kept));
        let replaces = self.replace_keys;
        let bringing = Bringing { documents, erased, given, kept, replaces };
        let in_the_way = match bucket {
            Some(bucket) => bringing.in_the_way(bucket).await?,
            None => {
                let target = Blobs::open(&BlobStore::File, &staging.path);
                let target = target.context("making the store of files")?;
                let in_the_way = bringing.in_the_way(&target).await?;
                bringing.bring(&target, &in_the_way).await?;
                vec![]
            }
        };
        self.stage_log(&staging.path, manifest).await?;
        if self.log.file().is_none() {
            self.ensure_fits(&staging.path).await?;
        }
        if let Some(bucket) = bucket {
            let what = "what was brought into the store stays there";
            self.bring_files(bucket, &sound).await.context(what)?;
            // The store's own tombstones go before the keys.
            bringing.bring(bucket, &in_the_way).await.context(what)?;
        }
        Ok(Restored {
            backup_of: manifest.created_at,
            head_hash: manifest.log.head_hash.clone(),
            erased: sorted(erased).cloned().collect(),
            blobs: sound.len() as u64,
            left_out,
        })
    }

    /// Nothing of what was restored stays, but what says that there may be half a log elsewhere.
    fn give_up(&self, staging: &Staging, error: anyhow::Error) -> anyhow::Error {
        // What an earlier one brought into a log over the network is half a log; nobody reads half
        // an embedded one.
        let (cleared, so) = match staging.broke_off && self.log.file().is_none() {
            true => (staging.empty(), "repeat the restore"),
            false => (staging.remove(), "nothing was restored"),
        };
        match cleared {
            Ok(()) => error.context(so),
            Err(uncleared) => uncleared,
        }
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

    /// The documents of the store; what belongs right into the data directory is staged.
    fn stage_parts(&self, staging: &Path, manifest: &Manifest) -> anyhow::Result<Vec<Document>> {
        let mut documents = Vec::new();
        let keys = self.keys.clone().unwrap_or_else(|| self.from.join("keys"));
        ensure!(
            keys.is_dir() || !manifest.parts.iter().any(Part::is_of_keys),
            "{} is not there: say with --keys where the keys of the backup are kept",
            keys.display()
        );
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
        Ok(documents)
    }

    /// They come into the staging directory, unless they are for a bucket: then each is only looked
    /// at.
    fn stage_blobs(
        &self,
        staging: &Path,
        bucket: Option<&Blobs>,
        manifest: &Manifest,
    ) -> anyhow::Result<Files> {
        let list = manifest.parts.iter().find(|part| part.path == "blobs.txt");
        let list = list.context("the manifest names no list of files")?;
        let mut list = parse_list(&list.read(&self.from, &self.from)?)?;
        if manifest.blobs.how == "listed" {
            return Ok(Files::default());
        }
        let missing: HashSet<_> = manifest.blobs.missing.iter().collect();
        list.retain(|(sha256, _)| !missing.contains(sha256));
        let mut files = Files::default();
        for (sha256, size) in list {
            let source = place(&self.from, &sha256);
            let staged = match bucket {
                Some(_) => ensure_whole(&source, &sha256),
                None => stage_blob(&source, &place(staging, &sha256), &sha256),
            };
            match staged {
                Ok(()) => files.sound.push((sha256, size)),
                Err(error) if self.without_damaged_files && is_of_the_backup(&error) => {
                    eprintln!("the file {sha256} is left out: {error}");
                    files.left_out.push(sha256);
                }
                Err(error) => {
                    return Err(error).with_context(|| {
                        format!(
                            "restoring the file {sha256} (with --without-damaged-files it is left \
                             out)"
                        )
                    });
                }
            }
        }
        Ok(files)
    }

    /// Those that the bucket does not have. May be repeated.
    async fn bring_files(&self, bucket: &Blobs, files: &[(String, u64)]) -> anyhow::Result<()> {
        for (sha256, size) in files {
            let context = || format!("bringing the file {sha256} into the store");
            match bucket.bring_back(sha256).await {
                Ok(_) => {}
                Err(blobs::Error::NotFound) => {
                    let stored = bucket.copy_in(&place(&self.from, sha256)).await;
                    let stored = stored.with_context(context)?;
                    ensure!(stored.sha256 == *sha256, "the file {sha256} has changed meanwhile");
                }
                Err(error) => return Err(error).with_context(context),
            }
            let there = bucket.size(sha256).await.with_context(context)?;
            ensure!(there == *size, "the file {sha256} has {there} bytes in the store, not {size}");
        }
        Ok(())
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
            let _ = std::fs::remove_file(staging.join(format!("{LOG}{suffix}")));
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
            matches!(folder, keyring::KEYS | keyring::TOMBSTONES).then_some(name)
        })
        .collect();
    for name in erased.iter().filter(|name| !known.contains(name.as_str())) {
        eprintln!("{name} is not in this backup; it stays erased all the same");
    }
}

fn sorted(names: &HashSet<String>) -> impl Iterator<Item = &String> {
    let mut names: Vec<_> = names.iter().collect();
    names.sort();
    names.into_iter()
}

fn stage_blob(source: &Path, target: &Path, sha256: &str) -> std::io::Result<()> {
    if let Some(directory) = target.parent() {
        std::fs::create_dir_all(directory)?;
    }
    copy_as(source, target, sha256)
}

/// Whether it is the file that is at fault, and not what it is to come into.
fn is_of_the_backup(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::InvalidData | ErrorKind::NotFound)
}

/// Of a backup, by their hashes.
#[derive(Default)]
struct Files {
    /// Each with its size in bytes.
    sound: Vec<(String, u64)>,
    left_out: Vec<String>,
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

#[cfg(test)]
mod tests {
    use super::documents::TOMBSTONE;
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
        let restore = Restore {
            from,
            log,
            store,
            keys: None,
            master_key: None,
            replace_keys: false,
            tombstones,
            without_damaged_files: false,
            json: false,
        };
        assert_eq!(restore.erased().unwrap(), HashSet::from(["user_ada".to_owned()]));
        std::fs::write(dir.path().join("user_bob"), "no tombstone").unwrap();
        assert!(restore.erased().is_err());
    }
}
