//! How much room a disk has.

use std::io;
use std::path::Path;

const GIB: u64 = 1 << 30;

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
        self.free < self.total / 20 || self.free < GIB
    }

    /// Whether so many bytes leave what the log needs to go on: 1 GiB, or a twentieth of a small
    /// disk. Less than what is scarce, so that somebody can be warned before anybody is refused.
    pub fn has_room_for(self, bytes: u64) -> bool {
        self.free.saturating_sub(bytes) >= GIB.min(self.total / 20)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_for_the_log_is_a_twentieth_and_1_gib_at_the_most() {
        let has = |free, total, bytes| Space { free, total }.has_room_for(bytes);
        assert!(
            has(GIB, 1000 * GIB, 0) && !has(GIB, 1000 * GIB, 1) && !has(GIB - 1, 1000 * GIB, 0)
        );
        assert!(has(5, 100, 0) && has(6, 100, 1) && !has(5, 100, 1));
        assert!(!has(0, 100, 0) && !has(7, 100, u64::MAX));
        // A file system that has no size of its own is not full.
        assert!(has(0, 0, 0));
        assert!(Space { free: GIB, total: 1000 * GIB }.is_scarce());
    }
}
