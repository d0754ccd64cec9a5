//! Disks that a test may pull the plug of, or fill: file systems of its own, which only root may
//! mount.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use rustix::process::Signal;
use tempfile::TempDir;

use crate::server::Server;

/// XFS takes no less than 300 MB.
const IMAGE_BYTES: u64 = 400 << 20;

/// A mounted file system, unmounted when it is dropped. Whatever runs on it must be gone by then.
pub struct Disk {
    /// None for one that lies in memory.
    image: Option<PathBuf>,
    mounted_at: PathBuf,
    _place: TempDir,
}

impl Disk {
    /// A file with a file system in it, of the kind that `mkfs.KIND` makes.
    ///
    /// # Errors
    /// Why this machine does not allow it.
    pub fn in_file(kind: &str) -> Result<Self, String> {
        let place = TempDir::new().map_err(|error| error.to_string())?;
        let image = place.path().join("disk");
        File::create(&image).and_then(|file| file.set_len(IMAGE_BYTES)).expect("a sparse file");
        run(&format!("mkfs.{kind}"), &["-q".as_ref(), &image])?;
        let disk = Self::at(place, Some(image))?;
        disk.mount()?;
        Ok(disk)
    }

    /// Of so many MiB, in memory.
    ///
    /// # Errors
    /// Why this machine does not allow it.
    pub fn in_memory(mib: usize) -> Result<Self, String> {
        let place = TempDir::new().map_err(|error| error.to_string())?;
        let disk = Self::at(place, None)?;
        let size = format!("size={mib}m");
        let words = ["-t", "tmpfs", "-o", &size, "none"].map(Path::new);
        run("mount", &[&words[..], &[&disk.mounted_at]].concat())?;
        Ok(disk)
    }

    fn at(place: TempDir, image: Option<PathBuf>) -> Result<Self, String> {
        let mounted_at = place.path().join("mounted");
        std::fs::create_dir(&mounted_at).map_err(|error| error.to_string())?;
        Ok(Self { image, mounted_at, _place: place })
    }

    /// A directory on it that outlives a power cut.
    pub fn data_dir(&self) -> Arc<TempDir> {
        let dir = TempDir::new_in(&self.mounted_at).expect("the disk is empty");
        run("sync", &["-f".as_ref(), dir.path()]).expect("the disk is healthy");
        Arc::new(dir)
    }

    pub fn path(&self) -> &Path {
        &self.mounted_at
    }

    /// Makes one in memory larger or smaller.
    pub fn resize(&self, mib: usize) {
        let words = format!("remount,size={mib}m");
        run("mount", &["-o".as_ref(), words.as_ref(), &self.mounted_at]).expect("it is mounted");
    }

    /// What was not synced is gone, as when the power fails: the server stands still, the disk takes
    /// nothing more, not even what its own journal still has in memory, and only then all go.
    ///
    /// Without the standstill the server would see its disk fail and might yet answer.
    pub fn cut_power(&self, server: &Server) {
        server.send(Signal::STOP);
        run("xfs_io", &["-x".as_ref(), "-c".as_ref(), "shutdown".as_ref(), &self.mounted_at])
            .expect("a mounted disk can be shut down");
        server.send(Signal::KILL);
    }

    /// What is left of it when the power is back.
    pub fn power_up(&self, server: &mut Server) {
        server.kill();
        run("umount", &[&self.mounted_at]).expect("nothing runs on it any more");
        self.mount().expect("it was mounted before");
    }

    fn mount(&self) -> Result<(), String> {
        let image = self.image.as_ref().expect("one in a file");
        run("mount", &["-o".as_ref(), "loop".as_ref(), image, &self.mounted_at])
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Nothing may be there to unmount.
        let _ = run("umount", &["-l".as_ref(), &self.mounted_at]);
    }
}

fn run(program: &str, arguments: &[&Path]) -> Result<(), String> {
    let output = Command::new(program).args(arguments).output();
    let output = output.map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{program}: {}", said.lines().next().unwrap_or("no reason given")))
}

/// A shared library that Debian keeps below its machine's own folder.
pub fn library(name: &str) -> Option<PathBuf> {
    let folders = std::fs::read_dir("/usr/lib").ok()?.flatten();
    folders.map(|folder| folder.path().join(name)).find(|path| path.exists())
}
