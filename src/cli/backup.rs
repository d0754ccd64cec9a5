//! `t2m backup`: the log, the keys and the files of a server that may be running, in a directory of
//! their own. What is computed from the log (the read model) is not in it.
//!
//! The log comes first, and it is copied event by event, so that it is a whole prefix of the
//! server's and checked on the way; one that ends before what the read model has seen is refused.
//! Bytes are stored before the event that names them, so that the files of that prefix are there,
//! save those that were deleted meanwhile: then the log is copied on to where their deletion is.
//! Keys come last: each was there before the first event it sealed.

pub mod files;
mod keys;
pub mod manifest;

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};
use serde_json::json;

use super::keys::given_master_key;
use super::log::{Which, bar};
use super::{layout, say};
use crate::clock::Clock;
use crate::config::{BlobStore, Secret};
use crate::log::transfer::Reading;
use crate::log::{EventLog, Import, Verified};
use crate::media::blobs::Blobs;
use files::{Copying, Needed};
use keys::{Copied, Keys};
use manifest::{BlobPart, LogPart, Manifest, Part};

/// What is kept in the store for more than a moment, beside the keys.
const OTHER_FOLDERS: [&str; 3] = ["dead-letters", "callbacks", "callbacks-waiting"];
/// How often files that were deleted meanwhile are looked up in what the log has since.
const TRIES: u32 = 5;

#[derive(Args)]
pub struct Backup {
    /// The directory to write, which must be empty or not there
    #[arg(value_name = "DIR")]
    to: PathBuf,
    #[command(flatten)]
    log: Which,
    /// The server's store of files: `file` or `s3://bucket/prefix`
    #[arg(long = "store", env = "T2M_BLOBS", default_value = "file")]
    store: String,
    /// The same as the server's; it is not copied
    #[arg(long, env = "T2M_MASTER_KEY", hide_env_values = true)]
    master_key: Option<Secret>,
    /// Whether files are copied, linked (the same disk; damage to one is damage to both), or only
    /// listed [default: link where that is possible, else copy; in S3 none]
    #[arg(long, value_name = "HOW")]
    blobs: Option<HowBlobs>,
    /// JSON instead of text
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum HowBlobs {
    Copy,
    Link,
    None,
}

impl Backup {
    pub fn run(self) -> anyhow::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (manifest, unopened) = runtime.block_on(self.make())?;
        let Manifest { log, blobs, parts, .. } = &manifest;
        if self.json {
            say(format_args!(
                "{}",
                json!({
                    "events": log.events, "head_hash": log.head_hash, "blobs": blobs.count,
                    "blob_bytes": blobs.bytes, "missing_blobs": blobs.missing, "parts": parts.len(),
                    "unopened_keys": unopened.len(), "unopened": unopened,
                })
            ));
            return Ok(());
        }
        say(format_args!("backup     {}", self.to.display()));
        say(format_args!("events     {}", log.events));
        say(format_args!("head hash  {}", log.head_hash));
        say(format_args!("files      {} ({} bytes), {}", blobs.count, blobs.bytes, blobs.how));
        if !blobs.missing.is_empty() {
            say(format_args!(
                "missing    {} files are not in the store either, or damaged there",
                blobs.missing.len()
            ));
        }
        if !unopened.is_empty() {
            say(format_args!(
                "unopened   {} of the sealed keys and secrets do not open with the master key",
                unopened.len()
            ));
        }
        say(format_args!("keep `keys` apart from the rest: with it, all of this can be read"));
        Ok(())
    }

    /// With the keys and secrets that do not open.
    async fn make(&self) -> anyhow::Result<(Manifest, Vec<String>)> {
        let store = BlobStore::parse(&self.store)
            .map_err(|fault| super::BadConfiguration(vec![format!("T2M_BLOBS: {fault}")]))?;
        let given = given_master_key(self.master_key.as_ref())?;
        let data_dir = &self.log.data_dir;
        // A log over the network does not tell that it is the wrong one.
        ensure!(data_dir.is_dir(), "there is no data directory {}", data_dir.display());
        let seen = self.log.seen();
        let log = self.log.open_for_reading().await?;
        let whole = self.log.ensure_no_loss(&*log, seen).await;
        whole.context("holding the log against the read model")?;
        let blobs =
            Blobs::open_for_reading(&store, data_dir).context("opening the store of files")?;
        let keys = Keys { blobs: &blobs, data_dir, given: given.as_ref() };
        keys.ensure_openable().await?;
        begin(&self.to)?;
        // Before the log, so that they are not ahead of it.
        let positions = layout::POSITIONS.map(|name| (name, std::fs::read(data_dir.join(name))));

        let mut reading = Reading::of(&*log);
        let (verified, needed, copying) =
            self.copy_log_and_blobs(&*log, &mut reading, &blobs).await?;
        copying.ensure_whole(&needed, &self.to)?;
        let list = needed.write_list(&self.to.join("blobs.txt"))?;

        let mut parts = vec![list];
        let Copied { parts: of_keys, unopened } = keys.copy(&self.to, needed.has_sealed()).await?;
        parts.extend(of_keys);
        for (name, position) in positions {
            // Where the copy has other positions, who followed the log begins anew.
            if let (Ok(position), true) = (position, reading.keeps_positions()) {
                parts.push(Part::write(&self.to, &format!("rest/{name}"), &position)?);
            }
        }
        for folder in OTHER_FOLDERS {
            parts.extend(copy_folder(&blobs, folder, &self.to, "rest").await?);
        }
        let manifest = Manifest {
            format: manifest::FORMAT.to_owned(),
            version: manifest::VERSION,
            program: env!("CARGO_PKG_VERSION").to_owned(),
            created_at: Clock::system().now(),
            log: LogPart {
                part: Part::of(&self.to, layout::LOG)?,
                events: verified.events,
                position: verified.events,
                head_hash: hex::encode(verified.head_hash),
            },
            blobs: BlobPart {
                how: copying.how().to_owned(),
                count: needed.blobs().len() as u64,
                bytes: needed.blobs().values().sum(),
                missing: copying.missing,
            },
            parts,
        };
        manifest.finish(&self.to)?;
        Ok((manifest, unopened))
    }

    /// The files that are there at the end of the copied log. One that was deleted meanwhile is
    /// missing until the log is copied on to where its deletion is; one that was lost stays missing.
    async fn copy_log_and_blobs(
        &self,
        log: &dyn EventLog,
        reading: &mut Reading<'_>,
        blobs: &Blobs,
    ) -> anyhow::Result<(Verified, Needed, Copying)> {
        let (mut needed, mut copying) = (Needed::default(), self.copying(blobs)?);
        let mut tries = 0;
        loop {
            let verified = copy_log(log, reading, &self.to, &mut needed).await?;
            // Always after the log, which may have come to name more of them.
            copying.bring_all(blobs, &needed, &self.to)?;
            tries += 1;
            if copying.missing.is_empty() || tries == TRIES {
                return Ok((verified, needed, copying));
            }
        }
    }

    fn copying(&self, blobs: &Blobs) -> anyhow::Result<Copying> {
        let is_local = blobs.local_root().is_some();
        ensure!(
            is_local || matches!(self.blobs, None | Some(HowBlobs::None)),
            "files in S3 are not copied: give --blobs none"
        );
        Ok(Copying::new(if is_local { self.blobs } else { Some(HowBlobs::None) }))
    }
}

fn begin(to: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(to).with_context(|| format!("making {}", to.display()))?;
    let mut entries = std::fs::read_dir(to).with_context(|| format!("reading {}", to.display()))?;
    ensure!(entries.next().is_none(), "{} is not empty; name a fresh directory", to.display());
    Ok(())
}

/// Copies the log, or what it has beyond the copy, up to where it ends now. Whatever its engine, the
/// copy is a file, and its positions and hashes are those of an export.
async fn copy_log(
    log: &dyn EventLog,
    reading: &mut Reading<'_>,
    to: &Path,
    needed: &mut Needed,
) -> anyhow::Result<Verified> {
    let mut import = Import::begin(&to.join(layout::LOG)).context("making the copy of the log")?;
    let bar = bar("log", (*log.head().borrow()).max(import.end().0), "events")?;
    // `head` follows another process with a delay, so that it is read until nothing comes.
    loop {
        let page = reading.page().await.context("reading the log")?;
        for event in &page {
            import.take(event).context("copying the log")?;
            needed.see(event)?;
        }
        bar.set_position(import.end().0);
        if page.is_empty() {
            break;
        }
    }
    let verified = import.finish().context("finishing the copy of the log")?;
    bar.finish_and_clear();
    let _ = std::fs::remove_file(to.join("log.lock"));
    Ok(verified)
}

async fn copy_folder(
    blobs: &Blobs,
    folder: &str,
    to: &Path,
    part: &str,
) -> anyhow::Result<Vec<Part>> {
    let mut parts = Vec::new();
    let reading = || format!("reading the folder {folder} of the store");
    for name in blobs.names_in(folder).await.with_context(reading)? {
        // Gone since it was listed: then it was to go.
        if let Some(bytes) = blobs.document(folder, &name).await.with_context(reading)? {
            parts.push(Part::write(to, &format!("{part}/{folder}/{name}"), &bytes)?);
        }
    }
    Ok(parts)
}

#[cfg(test)]
mod tests;
