//! How much room a disk has.

use std::io;
use std::path::Path;

/// In bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Space {
    /// What this process may still write.
    pub free: u64,
    pub total: u64,
}

impl Space {
    /// Of the file system that holds `path`.
    ///
    /// # Errors
    /// The system does not say.
    pub fn of(path: &Path) -> io::Result<Self> {
        let about = rustix::fs::statvfs(path)?;
        Ok(Self {
            free: about.f_bavail.saturating_mul(about.f_frsize),
            total: about.f_blocks.saturating_mul(about.f_frsize),
        })
    }

    /// Under a twentieth, or under 1 GiB.
    pub fn is_scarce(self) -> bool {
        self.free < self.total / 20 || self.free < 1 << 30
    }
}
