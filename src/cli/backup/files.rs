//! The files that a log names, and how they come into a backup.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io::{BufWriter, ErrorKind, Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::HowBlobs;
use super::manifest::{Part, hash_file};
use crate::log::Recorded;
use crate::media::blobs::Blobs;

/// How what is sealed begins in an event's data. Within a text, the quotes would be escaped.
const SEALED: &[u8] = br#"{"sealed":"#;

/// The files that are there after the events seen so far. What names them is not sealed.
#[derive(Debug, Default)]
pub struct Needed {
    files: HashMap<String, (String, u64)>,
    has_sealed: bool,
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
        self.has_sealed =
            self.has_sealed || event.data.windows(SEALED.len()).any(|part| part == SEALED);
        Ok(())
    }

    /// Whether there was anything that a user's key has sealed.
    pub fn has_sealed(&self) -> bool {
        self.has_sealed
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

/// Where a blob lies in a backup, and in a store.
pub fn place(root: &Path, sha256: &str) -> PathBuf {
    root.join("blobs/sha256").join(sha256.get(..2).unwrap_or_default()).join(sha256)
}

/// How the files come into a backup, and what became of them so far.
pub struct Copying {
    how: HowBlobs,
    /// Whether what cannot be linked is copied.
    or_copy: bool,
    /// How a link is made, which a test may refuse.
    link: fn(&Path, &Path) -> std::io::Result<()>,
    linked: u64,
    copied: u64,
    /// Those that the store does not have, or has with other bytes.
    pub missing: Vec<String>,
    /// Of them those with other bytes, which are looked at once.
    damaged: HashSet<String>,
}

impl Copying {
    /// In the way that was asked for, or else by links where they are possible.
    pub fn new(asked: Option<HowBlobs>) -> Self {
        Self {
            how: asked.unwrap_or(HowBlobs::Link),
            or_copy: asked.is_none(),
            link: |source, target| std::fs::hard_link(source, target),
            linked: 0,
            copied: 0,
            missing: Vec::new(),
            damaged: HashSet::new(),
        }
    }

    /// For people, and for the manifest.
    pub fn how(&self) -> &'static str {
        match (self.how, self.linked, self.copied) {
            (HowBlobs::None, ..) => "listed",
            (HowBlobs::Copy, ..) | (HowBlobs::Link, 0, 1..) => "copied",
            (HowBlobs::Link, _, 0) => "linked",
            (HowBlobs::Link, ..) => "linked or copied",
        }
    }

    /// Brings what is not in the backup yet.
    pub fn bring_all(
        &mut self,
        blobs: &Blobs,
        needed: &Needed,
        backup: &Path,
    ) -> anyhow::Result<()> {
        self.missing.clear();
        if self.how == HowBlobs::None {
            return Ok(());
        }
        for sha256 in needed.blobs().into_keys() {
            let target = place(backup, &sha256);
            if target.exists() {
                continue;
            }
            if self.damaged.contains(&sha256) {
                self.missing.push(sha256);
                continue;
            }
            let done = self.bring(blobs, &sha256, &target);
            if !done.with_context(|| format!("copying the file {sha256}"))? {
                self.missing.push(sha256);
            }
        }
        Ok(())
    }

    /// False when the store does not have it. It may be moved aside, or back, while it is looked
    /// for.
    fn bring(&mut self, blobs: &Blobs, sha256: &str, target: &Path) -> std::io::Result<bool> {
        if let Some(directory) = target.parent() {
            std::fs::create_dir_all(directory)?;
        }
        for _ in 0..3 {
            let Some(source) = blobs.file_of(sha256) else { continue };
            let linked = match self.how {
                HowBlobs::Link => match (self.link)(&source, target) {
                    Err(error) if self.or_copy && is_refusal(&error) => None,
                    tried => Some(tried),
                },
                _ => None,
            };
            let by_link = linked.is_some();
            let brought = match linked {
                // A link says nothing of the bytes, and a restore takes none but these.
                Some(linked) => linked.and_then(|()| keep_if_whole(target, sha256)),
                None => copy_as(&source, target, sha256),
            };
            match brought {
                Ok(()) => {
                    *(if by_link { &mut self.linked } else { &mut self.copied }) += 1;
                    return Ok(true);
                }
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) if error.kind() == ErrorKind::InvalidData => {
                    eprintln!("{} is damaged, and not in the backup", source.display());
                    self.damaged.insert(sha256.to_owned());
                    return Ok(false);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    /// A restore wants each file of the list that is not known to be missing.
    ///
    /// # Errors
    /// There is one that is neither.
    pub fn ensure_whole(&self, needed: &Needed, backup: &Path) -> anyhow::Result<()> {
        if self.how == HowBlobs::None {
            return Ok(());
        }
        let missing: HashSet<_> = self.missing.iter().collect();
        for sha256 in needed.blobs().keys().filter(|sha256| !missing.contains(sha256)) {
            ensure!(place(backup, sha256).exists(), "the file {sha256} is not in the backup");
        }
        Ok(())
    }
}

/// Of a link to anything else nothing stays.
fn keep_if_whole(target: &Path, sha256: &str) -> std::io::Result<()> {
    let whole = ensure_whole(target, sha256);
    if whole.is_err() {
        std::fs::remove_file(target)?;
    }
    whole
}

/// Whether a copy is possible where a link is not. The device does not tell: two mounts of one file
/// system are one device, and no link leads from one into the other.
pub fn is_refusal(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::CrossesDevices
            | ErrorKind::PermissionDenied
            | ErrorKind::TooManyLinks
            | ErrorKind::Unsupported
    )
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
        return Err(damaged(source));
    }
    to.sync_all()
}

/// Looks whether a file has this hash.
///
/// # Errors
/// `InvalidData` when it has another.
pub fn ensure_whole(path: &Path, sha256: &str) -> std::io::Result<()> {
    match hash_file(path)? {
        (_, found) if found == sha256 => Ok(()),
        _ => Err(damaged(path)),
    }
}

fn damaged(path: &Path) -> std::io::Error {
    let what = "is damaged: its SHA-256 is not the one it should have";
    std::io::Error::new(ErrorKind::InvalidData, format!("{} {what}", path.display()))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::BlobStore;

    /// Which are refused is told by their names.
    fn link_some(source: &Path, target: &Path) -> std::io::Result<()> {
        let refused = hex::encode(Sha256::digest("no link"));
        match source.ends_with(refused) {
            true => Err(rustix::io::Errno::XDEV.into()),
            false => std::fs::hard_link(source, target),
        }
    }

    /// A store with these files in it, which a log names.
    fn stored(data: &Path, texts: &[&str]) -> Needed {
        let mut needed = Needed::default();
        for text in texts {
            let sha256 = hex::encode(Sha256::digest(text));
            let path = place(data, &sha256);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
            needed.files.insert((*text).to_owned(), (sha256, text.len() as u64));
        }
        needed
    }

    fn bring(texts: &[&str], asked: Option<HowBlobs>) -> (anyhow::Result<()>, &'static str) {
        let [data, backup] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let needed = stored(data.path(), texts);
        let blobs = Blobs::open(&BlobStore::File, data.path()).unwrap();
        let mut copying = Copying { link: link_some, ..Copying::new(asked) };
        let done = copying.bring_all(&blobs, &needed, backup.path());
        if done.is_ok() {
            // What is there already is not brought again, and stays counted.
            copying.bring_all(&blobs, &needed, backup.path()).unwrap();
            copying.ensure_whole(&needed, backup.path()).unwrap();
        }
        (done, copying.how())
    }

    #[test]
    fn what_cannot_be_linked_is_copied_unless_links_were_asked_for() {
        let how = |texts: &[&str], asked| {
            let (done, how) = bring(texts, asked);
            done.map(|()| how).map_err(|error| format!("{error:#}"))
        };
        assert_eq!(how(&["one", "two"], None).unwrap(), "linked");
        assert_eq!(how(&["no link"], None).unwrap(), "copied");
        assert_eq!(how(&["one", "no link"], None).unwrap(), "linked or copied");
        assert_eq!(how(&["one", "no link"], Some(HowBlobs::Copy)).unwrap(), "copied");
        let refused = how(&["one", "no link"], Some(HowBlobs::Link)).unwrap_err();
        assert!(refused.starts_with("copying the file ") && refused.contains("link"), "{refused}");
    }

    #[test]
    fn a_damaged_file_is_missing_in_the_backup_however_it_would_have_come_there() {
        for asked in [None, Some(HowBlobs::Link), Some(HowBlobs::Copy)] {
            let [data, backup] = [(); 2].map(|()| tempfile::tempdir().unwrap());
            let needed = stored(data.path(), &["sound", "whole"]);
            let damaged = hex::encode(Sha256::digest("whole"));
            // As long as it was.
            std::fs::write(place(data.path(), &damaged), "whale").unwrap();
            let blobs = Blobs::open(&BlobStore::File, data.path()).unwrap();
            let mut copying = Copying::new(asked);
            for _ in 0..2 {
                copying.bring_all(&blobs, &needed, backup.path()).unwrap();
                assert_eq!(copying.missing, std::slice::from_ref(&damaged));
                assert!(!place(backup.path(), &damaged).exists());
                copying.ensure_whole(&needed, backup.path()).unwrap();
            }
            assert_eq!(copying.linked + copying.copied, 1);
        }
    }

    #[test]
    fn a_file_system_refuses_links_in_several_ways_and_other_failures_are_none() {
        use rustix::io::Errno;
        for refusal in [Errno::XDEV, Errno::PERM, Errno::MLINK, Errno::OPNOTSUPP, Errno::NOTSUP] {
            assert!(is_refusal(&refusal.into()), "{refusal}");
        }
        for failure in [Errno::NOENT, Errno::NOSPC, Errno::IO, Errno::EXIST] {
            assert!(!is_refusal(&failure.into()), "{failure}");
        }
    }
}
