//! The files that a log names, and how they come into a backup.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::HowBlobs;
use super::manifest::Part;
use crate::log::Recorded;
use crate::media::blobs::Blobs;

/// The files that are there after the events seen so far. What names them is not sealed.
#[derive(Debug, Default)]
pub struct Needed {
    files: HashMap<String, (String, u64)>,
}

#[derive(Deserialize)]
struct Stored {
    sha256: String,
    size: u64,
}

impl Needed {
    /// Takes in the next event of the log.
    ///
    /// # Errors
    /// A file's event does not say which bytes it has.
    pub fn see(&mut self, event: &Recorded) -> anyhow::Result<()> {
        if event.kind.starts_with("file.stored.") {
            let Stored { sha256, size } = serde_json::from_slice(&event.data)
                .with_context(|| format!("the event at position {}", event.position))?;
            self.files.insert(event.stream.to_string(), (sha256, size));
        } else if event.kind.starts_with("file.deleted.") {
            self.files.remove(&*event.stream);
        }
        Ok(())
    }

    /// Each once, with its size in bytes.
    pub fn blobs(&self) -> BTreeMap<String, u64> {
        self.files.values().cloned().collect()
    }

    /// The list of a backup, one blob a line: its name and its size.
    pub fn write_list(&self, path: &Path) -> anyhow::Result<Part> {
        let write = || {
            let mut list = BufWriter::new(File::create(path)?);
            for (sha256, size) in self.blobs() {
                writeln!(list, "{sha256} {size}")?;
            }
            list.into_inner().map_err(|error| error.into_error())?.sync_all()
        };
        write().with_context(|| format!("writing {}", path.display()))?;
        let directory = path.parent().unwrap_or(Path::new("."));
        Part::of(directory, "blobs.txt")
    }
}

/// What became of the files.
#[derive(Debug, Default)]
pub struct Copied {
    pub how: String,
    /// Those that the store does not have, or has with other bytes.
    pub missing: Vec<String>,
}

/// Linking needs both on one file system.
pub fn can_link(data_dir: &Path, backup: &Path) -> HowBlobs {
    let device = |path: &Path| std::fs::metadata(path).map(|about| about.dev()).ok();
    match device(&data_dir.join("blobs")) {
        Some(one) if Some(one) == device(backup) => HowBlobs::Link,
        _ => HowBlobs::Copy,
    }
}

/// Where a blob lies in a backup, and in a store.
pub fn place(root: &Path, sha256: &str) -> PathBuf {
    root.join("blobs/sha256").join(sha256.get(..2).unwrap_or_default()).join(sha256)
}

/// Brings what is not in the backup yet.
pub fn copy_blobs(
    blobs: &Blobs,
    needed: &Needed,
    how: HowBlobs,
    backup: &Path,
) -> anyhow::Result<Copied> {
    let name = match how {
        HowBlobs::Copy => "copied",
        HowBlobs::Link => "linked",
        HowBlobs::None => "listed",
    };
    let mut copied = Copied { how: name.to_owned(), missing: Vec::new() };
    if how == HowBlobs::None {
        return Ok(copied);
    }
    for (sha256, size) in needed.blobs() {
        let target = place(backup, &sha256);
        if target.exists() {
            continue;
        }
        let done = bring(blobs, &sha256, size, how, &target);
        if !done.with_context(|| format!("copying the file {sha256}"))? {
            copied.missing.push(sha256);
        }
    }
    Ok(copied)
}

/// False when the store does not have it. It may be moved aside, or back, while it is looked for.
fn bring(
    blobs: &Blobs,
    sha256: &str,
    size: u64,
    how: HowBlobs,
    target: &Path,
) -> std::io::Result<bool> {
    if let Some(directory) = target.parent() {
        std::fs::create_dir_all(directory)?;
    }
    for _ in 0..3 {
        let Some(source) = blobs.file_of(sha256) else { continue };
        let brought = match how {
            HowBlobs::Link => std::fs::hard_link(&source, target),
            _ => copy_as(&source, target, sha256),
        };
        match brought {
            Ok(()) if std::fs::metadata(target)?.len() == size => return Ok(true),
            Ok(()) => {
                std::fs::remove_file(target)?;
                return Ok(false);
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) if error.kind() == std::io::ErrorKind::InvalidData => return Ok(false),
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}

/// Copies durably what has this hash; of anything else nothing stays.
///
/// # Errors
/// `InvalidData` when the bytes are not those.
pub fn copy_as(source: &Path, target: &Path, sha256: &str) -> std::io::Result<()> {
    let mut from = File::open(source)?;
    let mut to = File::options().write(true).create_new(true).open(target)?;
    let (mut sha, mut chunk) = (Sha256::new(), vec![0; 256 * 1024]);
    loop {
        let read = from.read(&mut chunk)?;
        if read == 0 {
            break;
        }
        sha.update(&chunk[..read]);
        to.write_all(&chunk[..read])?;
    }
    if hex::encode(sha.finalize()) != sha256 {
        std::fs::remove_file(target)?;
        return Err(std::io::Error::new(
            std::io::ErrorKind::InvalidData,
            format!("{} is damaged: its SHA-256 is not the one it should have", source.display()),
        ));
    }
    to.sync_all()
}

/// A directory that only this user may look into.
pub fn make_private(path: &Path) -> anyhow::Result<()> {
    let made = std::fs::DirBuilder::new().mode(0o700).recursive(true).create(path);
    made.with_context(|| format!("making {}", path.display()))
}

/// The list of a backup's blobs.
///
/// # Errors
/// A line is none of a list.
pub fn parse_list(list: &[u8]) -> anyhow::Result<Vec<(String, u64)>> {
    let list = std::str::from_utf8(list).context("blobs.txt is not a text")?;
    let line = |line: &str| {
        let (sha256, size) = line.split_once(' ')?;
        let plain = sha256.len() == 64 && sha256.bytes().all(|byte| byte.is_ascii_hexdigit());
        Some((plain.then(|| sha256.to_owned())?, size.parse().ok()?))
    };
    let blobs: Option<Vec<_>> = list.lines().map(line).collect();
    ensure!(blobs.is_some(), "blobs.txt is not a list of files");
    Ok(blobs.unwrap_or_default())
}
