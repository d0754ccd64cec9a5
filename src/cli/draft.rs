//! A file on its way: it gets its name when it is whole, and is gone if it never is.

use std::fs::File;
use std::path::{Path, PathBuf};

use super::backup::files::is_refusal;

/// What lies beside a database while it is open, under its name and these.
const COMPANIONS: [&str; 2] = ["-wal", "-shm"];

/// Of several on their way to one name each is a file of its own.
pub struct Draft {
    path: PathBuf,
    to: PathBuf,
}

impl Draft {
    /// Of what somebody else writes.
    pub fn of(to: &Path) -> Self {
        let mut path = to.to_owned().into_os_string();
        path.push(format!(".{:016x}.unfinished", rand::random::<u64>()));
        Self { path: PathBuf::from(path), to: to.to_owned() }
    }

    /// The same, and the file to write to.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn beside(to: &Path) -> std::io::Result<(Self, File)> {
        let draft = Self::of(to);
        let file = File::options().write(true).create_new(true).open(&draft.path)?;
        Ok((draft, file))
    }

    /// Where it is written.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its bytes are durable already.
    ///
    /// # Errors
    /// Something has that name, or it cannot be given.
    pub fn keep(self) -> std::io::Result<()> {
        // A link never replaces what somebody else has put there meanwhile; a rename would.
        match std::fs::hard_link(&self.path, &self.to) {
            Err(error) if is_refusal(&error) && self.to.symlink_metadata().is_err() => {
                std::fs::rename(&self.path, &self.to)?;
            }
            linked => linked?,
        }
        sync_parent(&self.to)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // It may have been moved.
        let _ = std::fs::remove_file(&self.path);
        for companion in COMPANIONS {
            let mut path = self.path.clone().into_os_string();
            path.push(companion);
            let _ = std::fs::remove_file(path);
        }
    }
}

/// A name that a file was given is durable with its directory.
fn sync_parent(path: &Path) -> std::io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn of_two_exports_to_one_name_the_second_replaces_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("log.jsonl");
        let [(one, mut first), (two, mut second), (never, _)] =
            [(); 3].map(|()| Draft::beside(&to).unwrap());
        first.write_all(b"the first").unwrap();
        second.write_all(b"the second").unwrap();
        assert!(!to.exists());
        one.keep().unwrap();
        let refused = two.keep().unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::AlreadyExists);
        drop(never);
        assert_eq!(std::fs::read(&to).unwrap(), b"the first");
        assert_eq!(dir.path().read_dir().unwrap().count(), 1, "a draft was left");
    }
}
