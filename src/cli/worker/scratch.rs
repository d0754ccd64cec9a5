//! Where a worker works: a directory of its own, beside those of the other workers of its user.

use std::fs::{self, DirBuilder, File};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};

use crate::cli::server_lock;

/// Held while it is looked who else is there.
const TURN: &str = "turn.lock";
/// Of the file beside a directory that is held while its worker runs.
const LOCK: &str = "lock";

/// Removed when it is dropped.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
    /// The system lets go of it however the worker ends.
    _held: File,
}

/// The directory in which workers have theirs: in the one that is `given`, or among the temporary
/// ones, where anybody may have been first.
///
/// # Errors
/// It cannot be made, or is not this user's alone.
pub fn shared(given: Option<&Path>) -> anyhow::Result<PathBuf> {
    let user = rustix::process::geteuid().as_raw();
    let path = match given {
        Some(given) => given.join("t2m-worker"),
        None => std::env::temp_dir().join(format!("t2m-workers-{user}")),
    };
    // An engine is told its paths, and runs somewhere else.
    let path = std::path::absolute(&path).unwrap_or(path);
    if let Some(given) = given {
        fs::create_dir_all(given).with_context(|| format!("making {}", given.display()))?;
    }
    make(&path)?;
    if given.is_none() {
        ensure_private(&path, user)?;
    }
    Ok(path)
}

/// Makes a directory that nobody else may look into, unless there is one.
fn make(path: &Path) -> anyhow::Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => {
            Err(error).with_context(|| format!("making {}", path.display()))
        }
        _ => Ok(()),
    }
}

fn ensure_private(path: &Path, user: u32) -> anyhow::Result<()> {
    let found =
        fs::symlink_metadata(path).with_context(|| format!("reading {}", path.display()))?;
    ensure!(
        found.is_dir() && found.uid() == user && found.mode() & 0o077 == 0,
        "{} is not a directory of this user alone: remove it, or set T2M_WORKER_SCRATCH",
        path.display()
    );
    Ok(())
}

impl Scratch {
    /// Makes one, and clears away those of workers that were killed.
    ///
    /// # Errors
    /// The directory above it cannot be written to.
    pub fn take(above: &Path) -> anyhow::Result<Self> {
        let context = || format!("working in {}", above.display());
        let mut options = File::options();
        let turn = options.create(true).truncate(false).write(true).open(above.join(TURN));
        let turn = turn.with_context(context)?;
        turn.lock().with_context(context)?;
        clear(above);
        // The process ids of two machines, or containers, may be the same.
        let name = format!("{}-{:016x}", std::process::id(), rand::random::<u64>());
        let path = above.join(name);
        fs::create_dir(&path).with_context(context)?;
        let held = server_lock::lock(&path.with_extension(LOCK))?.with_context(context)?;
        Ok(Self { path, _held: held })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

/// For whose turn it is: a directory whose worker is just about to lock it looks like one that was
/// left.
fn clear(above: &Path) {
    let entries = fs::read_dir(above).into_iter().flatten().flatten();
    for path in entries.map(|entry| entry.path()).filter(|path| path.is_dir()) {
        if let Ok(Some(_held)) = server_lock::lock(&path.with_extension(LOCK)) {
            remove(&path);
        }
    }
}

/// What cannot be removed is left to whoever comes next.
fn remove(path: &Path) {
    let _ = fs::remove_dir_all(path);
    let _ = fs::remove_file(path.with_extension(LOCK));
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn directories(above: &Path) -> usize {
        let entries = fs::read_dir(above).unwrap().map(|entry| entry.unwrap().path());
        entries.filter(|path| path.is_dir()).count()
    }

    #[test]
    fn workers_side_by_side_leave_each_other_alone_and_clear_what_the_killed_have_left() {
        let dir = tempfile::tempdir().unwrap();
        let above = shared(Some(&dir.path().join("a/b"))).unwrap();
        assert_eq!(above, dir.path().join("a/b/t2m-worker"));
        // Of one that was killed, and of an older version, without a lock.
        for name in ["1-0123456789abcdef", "0-older"] {
            fs::create_dir_all(above.join(name).join("scratch")).unwrap();
        }
        File::create(above.join("1-0123456789abcdef.lock")).unwrap();
        let first = Scratch::take(&above).unwrap();
        assert_eq!(directories(&above), 1, "only its own");
        fs::write(first.path().join("source"), "hers").unwrap();
        assert_eq!(shared(Some(&dir.path().join("a/b"))).unwrap(), above);
        let second = Scratch::take(&above).unwrap();
        assert_ne!(first.path(), second.path());
        drop(second);
        assert!(first.path().join("source").exists());
        drop(first);
        let left = fs::read_dir(&above).unwrap().map(|it| it.unwrap().file_name());
        assert_eq!(left.collect::<Vec<_>>(), [TURN]);
    }

    #[test]
    fn a_directory_that_others_may_look_into_is_not_taken() {
        let (dir, user) = (tempfile::tempdir().unwrap(), rustix::process::geteuid().as_raw());
        let path = dir.path().join("t2m-workers");
        for _ in 0..2 {
            make(&path).unwrap();
            ensure_private(&path, user).unwrap();
        }
        assert!(ensure_private(&path, user + 1).is_err(), "it is somebody else's");
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let open = dir.path().join("open");
        make(&open).unwrap();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o755)).unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        for planted in [link, open, file] {
            make(&planted).unwrap();
            assert!(ensure_private(&planted, user).is_err(), "{}", planted.display());
        }
    }
}
