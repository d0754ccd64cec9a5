//! Where a backup is put together, and how it comes from there into the data directory: nothing is
//! moved before all of it is there, and what broke off while it was moved is moved on.

use std::ffi::OsStr;
use std::fs::{File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::super::backup::manifest::{sync_tree, write_private};
use super::super::layout::LOG;
use super::super::server_lock;

/// What a restore that was cut off leaves in the data directory. By being there it keeps servers from
/// starting, and commands from writing.
const STAGING: &str = "restoring";
/// What that is called once everything is in its place, for as long as it takes to remove it.
const DONE: &str = "restored";
/// In it from when things are moved.
const MOVING: &str = "moving.json";
/// A file system makes it for itself, and a fresh volume has nothing else.
const LOST_AND_FOUND: &str = "lost+found";

/// The directory in which everything is put together, and a hold on the data directory.
pub struct Staging {
    pub path: PathBuf,
    data_dir: PathBuf,
    /// Whether an earlier restore broke off; all that it left is what it had begun to move.
    pub broke_off: bool,
    pub moving: Option<Moving>,
    /// Let go when it is dropped.
    _held: File,
}

/// What was restored, written down when all of it was there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restored {
    pub backup_of: DateTime<Utc>,
    pub head_hash: String,
    /// The documents of those who were erased since.
    pub erased: Vec<String>,
    /// How many files were brought.
    pub blobs: u64,
    /// Those that were left out because they are damaged or not there.
    pub left_out: Vec<String>,
}

/// It, and what of the staging directory is to be moved.
#[derive(Debug, Serialize, Deserialize)]
pub struct Moving {
    pub restored: Restored,
    names: Vec<String>,
}

/// # Errors
/// A restore into this directory is at work, or broke off.
pub fn refuse_unfinished(data_dir: &Path) -> anyhow::Result<()> {
    ensure!(
        !data_dir.join(STAGING).exists(),
        "a restore into {} is at work, or broke off; repeat it, or empty the directory",
        data_dir.display()
    );
    Ok(())
}

impl Staging {
    /// Makes it, or takes over that of a restore that broke off.
    ///
    /// # Errors
    /// Another restore is at work there, or there is anything else.
    pub fn begin(data_dir: &Path) -> anyhow::Result<Self> {
        let context = || format!("making the data directory {}", data_dir.display());
        std::fs::create_dir_all(data_dir).with_context(context)?;
        let held = File::open(data_dir).with_context(context)?;
        match held.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                bail!("another restore into {} is at work", data_dir.display())
            }
            Err(TryLockError::Error(error)) => return Err(error).with_context(context),
        }
        let path = data_dir.join(STAGING);
        let broke_off = path.exists();
        let moving = Moving::read(&path)?;
        if !broke_off {
            // Before anybody else is looked for, who looks for it.
            std::fs::create_dir(&path).with_context(context)?;
        }
        let data_dir = data_dir.to_owned();
        let staging = Self { path, data_dir, broke_off, moving, _held: held };
        if let Some(stranger) = staging.stranger().with_context(context)? {
            if !broke_off {
                std::fs::remove_dir(&staging.path).with_context(context)?;
            }
            bail!(
                "{} is not empty: it holds {stranger}; a backup is never restored over data",
                staging.data_dir.display()
            );
        }
        if staging.moving.is_none() {
            staging.empty()?;
        }
        Ok(staging)
    }

    /// What lies in the data directory and is not of a restore.
    fn stranger(&self) -> std::io::Result<Option<String>> {
        let moved = self.moving.as_ref().map_or(&[][..], |moving| &moving.names);
        for entry in std::fs::read_dir(&self.data_dir)? {
            let name = entry?.file_name();
            let is_ours = name == STAGING
                || name == LOST_AND_FOUND
                || server_lock::is_named(&name)
                || moved.iter().any(|moved| name == OsStr::new(moved));
            if !is_ours {
                return Ok(Some(name.to_string_lossy().into_owned()));
            }
        }
        Ok(None)
    }

    /// It stays itself where half a log may lie elsewhere: by being there it keeps servers from
    /// starting.
    pub fn empty(&self) -> anyhow::Result<()> {
        let context = || format!("emptying {}", self.path.display());
        for entry in std::fs::read_dir(&self.path).with_context(context)? {
            let path = entry.with_context(context)?.path();
            let removed = match path.is_dir() {
                true => std::fs::remove_dir_all(&path),
                false => std::fs::remove_file(&path),
            };
            removed.with_context(context)?;
        }
        Ok(())
    }

    pub fn remove(&self) -> anyhow::Result<()> {
        std::fs::remove_dir_all(&self.path).context("removing what was restored")
    }

    /// Moves everything, the log last: without one, a data directory is an empty server's. Broken off
    /// from here on, the same restore goes on with it.
    ///
    /// # Errors
    /// Something else came into its place meanwhile, or it cannot be moved.
    pub fn put_into_place(&self, restored: &Restored) -> anyhow::Result<()> {
        let context = || format!("moving what was restored into {}", self.data_dir.display());
        sync_tree(&self.path).with_context(context)?;
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.path).with_context(context)? {
            names.push(entry.with_context(context)?.file_name().to_string_lossy().into_owned());
        }
        names.sort_by_key(|name| name == LOG);
        for name in &names {
            self.ensure_free(name)?;
        }
        let moving = Moving { restored: restored.clone(), names };
        moving.write(&self.path).with_context(context)?;
        self.move_on(&moving)
    }

    /// Whether something may have been moved already.
    pub fn is_moving(&self) -> bool {
        self.path.join(MOVING).exists()
    }

    /// Moves what has not been moved yet.
    ///
    /// # Errors
    /// As [`Staging::put_into_place`].
    pub fn move_on(&self, moving: &Moving) -> anyhow::Result<()> {
        let context = || format!("moving what was restored into {}", self.data_dir.display());
        for name in &moving.names {
            let (from, to) = (self.path.join(name), self.data_dir.join(name));
            if from.symlink_metadata().is_ok() {
                self.ensure_free(name)?;
                std::fs::rename(&from, &to).with_context(context)?;
            }
            ensure!(to.exists(), "{} is gone: empty the directory and repeat", to.display());
        }
        let sync = || File::open(&self.data_dir).and_then(|dir| dir.sync_all());
        sync().with_context(context)?;
        // In one step: without the list of what was moved, nothing could go on.
        let done = self.data_dir.join(DONE);
        std::fs::rename(&self.path, &done).with_context(context)?;
        std::fs::remove_dir_all(&done).with_context(context)?;
        sync().with_context(context)
    }

    fn ensure_free(&self, name: &str) -> anyhow::Result<()> {
        let place = self.data_dir.join(name);
        ensure!(
            place.symlink_metadata().is_err(),
            "{} came into being during the restore: move it away and repeat",
            place.display()
        );
        Ok(())
    }
}

impl Moving {
    fn read(staging: &Path) -> anyhow::Result<Option<Self>> {
        let path = staging.join(MOVING);
        let context = || format!("reading {}", path.display());
        match std::fs::read(&path) {
            Ok(json) => serde_json::from_slice(&json).map(Some).with_context(context),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(context),
        }
    }

    /// Under its name only when it is whole.
    fn write(&self, staging: &Path) -> anyhow::Result<()> {
        let unfinished = staging.join("moving.new");
        write_private(&unfinished, &serde_json::to_vec(self)?)?;
        std::fs::rename(unfinished, staging.join(MOVING))?;
        Ok(File::open(staging)?.sync_all()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn restored() -> Restored {
        Restored {
            backup_of: DateTime::UNIX_EPOCH,
            head_hash: "ab".repeat(32),
            erased: vec!["user_bob".to_owned()],
            blobs: 1,
            left_out: vec![],
        }
    }

    /// A data directory, and what is to come into it.
    fn staged() -> (tempfile::TempDir, Staging) {
        let dir = tempfile::tempdir().unwrap();
        let staging = Staging::begin(dir.path()).unwrap();
        for name in [LOG, "master.key", "blobs/sha256/ab/abc"] {
            write_private(&staging.path.join(name), name.as_bytes()).unwrap();
        }
        (dir, staging)
    }

    fn names(dir: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(dir).unwrap().flatten();
        let mut names: Vec<_> =
            entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    #[test]
    fn what_broke_off_while_it_was_moved_is_moved_on() {
        let whole = ["blobs", LOG, "master.key"];
        for moved in 0..=whole.len() {
            let (dir, staging) = staged();
            let moving = Moving { restored: restored(), names: whole.map(str::to_owned).to_vec() };
            moving.write(&staging.path).unwrap();
            for name in &whole[..moved] {
                std::fs::rename(staging.path.join(name), dir.path().join(name)).unwrap();
            }
            drop(staging);
            assert!(refuse_unfinished(dir.path()).is_err(), "{moved} were moved");
            let staging = Staging::begin(dir.path()).unwrap();
            let moving = staging.moving.as_ref().unwrap();
            assert_eq!(moving.restored, restored());
            staging.move_on(moving).unwrap();
            assert_eq!(names(dir.path()), whole, "{moved} were moved");
            assert_eq!(std::fs::read(dir.path().join(LOG)).unwrap(), LOG.as_bytes());
            refuse_unfinished(dir.path()).unwrap();
        }
    }

    #[test]
    fn what_came_into_being_meanwhile_is_not_replaced() {
        let (dir, staging) = staged();
        std::fs::write(dir.path().join(LOG), "another log").unwrap();
        let refused = staging.put_into_place(&restored()).unwrap_err().to_string();
        assert!(refused.contains("log.sqlite came into being during the restore"), "{refused}");
        assert_eq!(std::fs::read(dir.path().join(LOG)).unwrap(), b"another log");
        assert_eq!(names(dir.path()), [LOG, STAGING], "something was moved");
        drop(staging);
        let refused = Staging::begin(dir.path()).err().unwrap().to_string();
        assert!(refused.contains("is not empty: it holds log.sqlite"), "{refused}");
        std::fs::remove_file(dir.path().join(LOG)).unwrap();
        let staging = Staging::begin(dir.path()).unwrap();
        assert!(staging.broke_off && names(&staging.path).is_empty());
    }

    #[test]
    fn a_fresh_volume_is_empty_and_anything_else_is_refused_and_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join(LOST_AND_FOUND)).unwrap();
        std::fs::write(dir.path().join("server.lock"), "").unwrap();
        drop(Staging::begin(dir.path()).unwrap());
        std::fs::remove_dir(dir.path().join(STAGING)).unwrap();
        std::fs::write(dir.path().join("something"), "").unwrap();
        assert!(Staging::begin(dir.path()).is_err());
        assert_eq!(names(dir.path()), [LOST_AND_FOUND, "server.lock", "something"]);
    }

    #[test]
    fn of_two_restores_at_once_the_second_is_refused() {
        let (dir, _staging) = staged();
        let refused = Staging::begin(dir.path()).err().unwrap().to_string();
        assert!(refused.starts_with("another restore into "), "{refused}");
    }
}
