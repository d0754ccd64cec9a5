//! What is in a backup. It is written last: a directory without it was never finished.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, bail, ensure};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

pub const FORMAT: &str = "t2m-backup";
/// The newest form known here.
pub const VERSION: u32 = 1;
const NAME: &str = "manifest.json";

#[derive(Debug, Serialize, Deserialize)]
pub struct Manifest {
    pub format: String,
    pub version: u32,
    /// The version of `t2m` that wrote it.
    pub program: String,
    pub created_at: DateTime<Utc>,
    pub log: LogPart,
    pub blobs: BlobPart,
    /// Every other file; those under `keys/` may be kept elsewhere.
    pub parts: Vec<Part>,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct LogPart {
    #[serde(flatten)]
    pub part: Part,
    pub events: u64,
    pub position: u64,
    pub head_hash: String,
}

/// The blobs themselves are listed in `blobs.txt`: each is named by its hash.
#[derive(Debug, Serialize, Deserialize)]
pub struct BlobPart {
    /// `copied`, `linked`, `linked or copied`, or `listed`: then they are not here.
    pub how: String,
    pub count: u64,
    pub bytes: u64,
    /// Those that the log names and the store did not have.
    pub missing: Vec<String>,
}

impl BlobPart {
    /// How many are not here.
    pub fn listed(&self) -> u64 {
        if self.how == "listed" { self.count } else { 0 }
    }
}

/// One file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Part {
    /// In the backup, with slashes.
    pub path: String,
    pub bytes: u64,
    pub sha256: String,
}

impl Part {
    /// Writes a file of the backup, durably and for this user alone.
    pub fn write(backup: &Path, path: &str, bytes: &[u8]) -> anyhow::Result<Self> {
        let target = backup.join(path);
        write_private(&target, bytes).with_context(|| format!("writing {}", target.display()))?;
        let sha256 = hex::encode(Sha256::digest(bytes));
        Ok(Self { path: path.to_owned(), bytes: bytes.len() as u64, sha256 })
    }

    /// A file that is there.
    pub fn of(backup: &Path, path: &str) -> anyhow::Result<Self> {
        let target = backup.join(path);
        let (bytes, sha256) =
            hash_file(&target).with_context(|| format!("reading {}", target.display()))?;
        Ok(Self { path: path.to_owned(), bytes, sha256 })
    }

    /// Whether it belongs to what may lie elsewhere than the rest.
    pub fn is_of_keys(&self) -> bool {
        self.path.starts_with("keys/")
    }

    /// Where it lies; `keys` may lie elsewhere than the rest.
    pub fn place(&self, backup: &Path, keys: &Path) -> PathBuf {
        match self.path.strip_prefix("keys/") {
            Some(below) => keys.join(below),
            None => backup.join(&self.path),
        }
    }

    /// Reads it whole, if it is what it was.
    pub fn read(&self, backup: &Path, keys: &Path) -> anyhow::Result<Vec<u8>> {
        let path = self.place(backup, keys);
        let bytes = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        let same = hex::encode(Sha256::digest(&bytes)) == self.sha256;
        ensure!(same, "{} is damaged: its SHA-256 is not the manifest's", path.display());
        Ok(bytes)
    }
}

impl Manifest {
    /// Makes the backup one.
    pub fn finish(&self, backup: &Path) -> anyhow::Result<()> {
        let context = || format!("writing the manifest in {}", backup.display());
        sync_tree(backup).with_context(context)?;
        let unfinished = backup.join("manifest.new");
        let json = serde_json::to_vec_pretty(self).with_context(context)?;
        write_private(&unfinished, &json).with_context(context)?;
        std::fs::rename(&unfinished, backup.join(NAME)).with_context(context)?;
        File::open(backup).and_then(|dir| dir.sync_all()).with_context(context)
    }

    /// # Errors
    /// There is none, it is of a newer version, or it is not one.
    pub fn read(backup: &Path) -> anyhow::Result<Self> {
        let path = backup.join(NAME);
        let json = match std::fs::read(&path) {
            Ok(json) => json,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => bail!(
                "{} has no manifest: it is no backup, or one that was never finished",
                backup.display()
            ),
            Err(error) => {
                return Err(error).with_context(|| format!("reading {}", path.display()));
            }
        };
        #[derive(Deserialize)]
        struct Kind {
            format: String,
            version: u32,
        }
        let kind: Option<Kind> = serde_json::from_slice(&json).ok();
        match kind {
            Some(kind) if kind.format == FORMAT && kind.version > VERSION => bail!(
                "the backup is of version {} and this program knows version {VERSION}; use a \
                 newer program",
                kind.version
            ),
            Some(kind) if kind.format == FORMAT => {}
            _ => bail!("{} is no manifest of a backup", path.display()),
        }
        let manifest: Self = serde_json::from_slice(&json)
            .with_context(|| format!("{} is damaged", path.display()))?;
        for part in &manifest.parts {
            let plain = |part: Component| matches!(part, Component::Normal(_));
            let inside = Path::new(&part.path).components().all(plain);
            ensure!(inside, "{} names a file outside of the backup", path.display());
        }
        Ok(manifest)
    }
}

/// Size in bytes, and SHA-256 in hex.
pub fn hash_file(path: &Path) -> std::io::Result<(u64, String)> {
    let mut file = File::open(path)?;
    let (mut sha, mut size, mut chunk) = (Sha256::new(), 0, vec![0; 256 * 1024]);
    loop {
        match file.read(&mut chunk)? {
            0 => return Ok((size, hex::encode(sha.finalize()))),
            read => {
                sha.update(&chunk[..read]);
                size += read as u64;
            }
        }
    }
}

pub fn write_private(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    let mut options = File::options();
    let mut file = options.write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// The names of all files, durable; their contents are already.
pub fn sync_tree(directory: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            sync_tree(&entry.path())?;
        }
    }
    File::open(directory)?.sync_all()
}
