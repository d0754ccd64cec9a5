//! Room on the disk that uploads must leave: the log and the read model lie on it too, and nobody
//! can record anything once it is full.

use super::problem::{Code, Problem};
use crate::media::blobs::Blobs;
use crate::media::disk::Space;

/// After how many bytes of an upload it is looked at again.
pub const STEP_BYTES: u64 = 16 * 1024 * 1024;
/// When somebody may have made room.
const AGAIN_S: u64 = 60;

/// The disk that an upload goes to, if it goes to one of this machine.
#[derive(Debug, Clone, Copy)]
pub struct Room<'a>(Option<&'a Blobs>);

impl<'a> Room<'a> {
    /// Of what is written to the store itself.
    pub fn of_store(blobs: &'a Blobs) -> Self {
        Self(blobs.local_root().map(|_| blobs))
    }

    /// Of what lies on this machine first, wherever the store is.
    pub fn of_spool(blobs: &'a Blobs) -> Self {
        Self(Some(blobs))
    }

    /// Whether so many bytes more leave enough. A system that does not say how much there is does
    /// not keep anybody from trying.
    ///
    /// # Errors
    /// 503 `storage_full`.
    pub fn check(self, bytes: u64) -> Result<(), Problem> {
        within(self.0.and_then(|blobs| blobs.space().ok()), bytes)
    }
}

fn within(space: Option<Space>, bytes: u64) -> Result<(), Problem> {
    match space {
        Some(space) if !space.has_room_for(bytes) => Err(full()),
        _ => Ok(()),
    }
}

/// 503 `storage_full`.
pub fn full() -> Problem {
    Problem::new(Code::StorageFull).retry_after(AGAIN_S)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uploads_are_refused_before_the_disk_is_full() {
        let (free, total) = (3 << 30, 100 << 30);
        assert!(within(Some(Space { free, total }), 2 << 30).is_ok());
        let refused = within(Some(Space { free, total }), (2 << 30) + 1).unwrap_err();
        assert_eq!((refused.code(), refused.code().status().as_u16()), (Code::StorageFull, 503));
        assert_eq!(refused.body()["detail"]["retry_after"], AGAIN_S);
        assert!(within(Some(Space { free: (1 << 30) - 1, total }), 0).is_err());
        assert!(within(None, u64::MAX).is_ok());
    }
}
