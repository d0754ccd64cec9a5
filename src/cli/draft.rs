//! A file on its way: it gets its name when it is whole, and is gone if it never is.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};

use super::backup::files::is_refusal;

/// What lies beside a database while it is open, under its name and these.
const COMPANIONS: [&str; 2] = ["-wal", "-shm"];
/// What ends the name of a draft, and of the file that is locked while somebody is at work on it.
const UNFINISHED: &str = ".unfinished";
const LOCK: &str = ".lock";
/// Digits before that, which no other draft has.
const DIGITS: usize = 16;

/// Of several on their way to one name each is a file of its own.
pub struct Draft {
    path: PathBuf,
    to: PathBuf,
    /// Not of the draft itself: there are systems where that would keep SQLite out. None where the
    /// disk has no locks.
    _alive: Option<File>,
}

impl Draft {
    /// Of what somebody else writes. What runs that were killed have left in that directory goes.
    pub fn of(to: &Path) -> Self {
        remove_dead(to);
        let random = rand::random::<u64>();
        let path = with(to, &format!(".{random:0DIGITS$x}{UNFINISHED}"));
        // Before the draft is there: whoever sees a draft alone may not judge it.
        let alive = lock(File::options().write(true).create_new(true), &path);
        Self { path, to: to.to_owned(), _alive: alive }
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
        let _ = remove(&self.path);
    }
}

fn remove(draft: &Path) -> std::io::Result<()> {
    let removed = std::fs::remove_file(draft);
    // The lock at the end: without it nobody can tell that the others are dead.
    for companion in COMPANIONS.into_iter().chain([LOCK]) {
        let _ = std::fs::remove_file(with(draft, companion));
    }
    removed
}

/// Deletes the drafts of runs that were killed, in the directory of `to`: they may show everything in
/// clear. One of which nobody can tell is named.
fn remove_dead(to: &Path) {
    for draft in std::fs::read_dir(directory(to)).into_iter().flatten().flatten() {
        let draft = draft.path();
        if !is_draft(&draft) {
            continue;
        }
        let dead = lock(File::options().write(true), &draft);
        let shown = draft.display();
        if dead.is_some() {
            match remove(&draft) {
                Ok(()) => eprintln!("{shown} was removed: the run that wrote it was killed"),
                Err(error) => eprintln!("{shown} is what a killed run has left: {error}"),
            }
        } else if draft.exists() && !with(&draft, LOCK).exists() {
            eprintln!("{shown} may be what a killed run has left: remove it if nobody writes it");
        }
    }
}

fn is_draft(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    let random = name.and_then(|name| name.strip_suffix(UNFINISHED)?.rsplit_once('.'));
    random.is_some_and(|(to, digits)| {
        let is_digit = |digit: u8| matches!(digit, b'0'..=b'9' | b'a'..=b'f');
        !to.is_empty() && digits.len() == DIGITS && digits.bytes().all(is_digit)
    })
}

/// None while somebody else is at work on it, and where that cannot be told.
fn lock(options: &OpenOptions, draft: &Path) -> Option<File> {
    let file = options.open(with(draft, LOCK)).ok()?;
    file.try_lock().is_ok().then_some(file)
}

fn with(path: &Path, suffix: &str) -> PathBuf {
    let mut path = path.to_owned().into_os_string();
    path.push(suffix);
    PathBuf::from(path)
}

fn directory(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A name that a file was given is durable with its directory.
fn sync_parent(path: &Path) -> std::io::Result<()> {
    File::open(directory(path))?.sync_all()
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
    #[test]
    fn what_a_killed_run_left_goes_and_what_one_is_at_work_on_stays() {
        let dir = tempfile::tempdir().unwrap();
        let to = |name: &str| dir.path().join(name);
        let names = || {
            let names = dir.path().read_dir().unwrap().map(|entry| entry.unwrap().path());
            names.collect::<std::collections::BTreeSet<_>>()
        };
        let killed = Draft::of(&to("killed.sqlite"));
        let left = ["", "-wal", LOCK].map(|suffix| with(&killed.path, suffix));
        drop(killed);
        left.iter().for_each(|path| std::fs::write(path, "").unwrap());
        // Of a program that locked nothing, and of other people.
        let others = [&format!("log.jsonl.{:016x}.unfinished", 7), "letter.unfinished"].map(to);
        others.iter().for_each(|path| std::fs::write(path, "").unwrap());
        let (alive, _) = Draft::beside(&to("log.jsonl")).unwrap();
        let lives = [alive.path.clone(), with(&alive.path, LOCK)];
        assert_eq!(names(), others.iter().chain(&lives).cloned().collect());
        drop(Draft::of(&to("log.jsonl")));
        assert_eq!(names(), others.iter().chain(&lives).cloned().collect());
        drop(alive);
        assert_eq!(names(), others.into_iter().collect());
    }
}
