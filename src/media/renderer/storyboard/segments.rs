//! The finished seconds of a film on disk, so that a render that was killed goes on where it
//! stopped. A segment is believed only if it is whole and of the same film and the same build.
use std::fs;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::encode::Group;
use crate::media::renderer::Spec;

/// Raised when the same specification gives another picture.
const FORMAT: u32 = 1;
/// Bytes of a digest.
const DIGEST: usize = 32;

pub struct Segments {
    directory: PathBuf,
    /// Of the film, in each segment's digest.
    film: String,
}

impl Segments {
    /// Those of a film below a directory. A directory that cannot be made only costs the segments.
    pub fn open(directory: &Path, spec: &Spec) -> Self {
        let directory = directory.join("segments");
        if let Err(error) = fs::create_dir_all(&directory) {
            tracing::warn!(%error, "finished segments cannot be kept");
        }
        Self { directory, film: format!("{FORMAT} {} {spec:?}", env!("CARGO_PKG_VERSION")) }
    }

    pub fn path(&self, number: usize) -> PathBuf {
        self.directory.join(format!("{number:04}"))
    }

    /// A segment of an earlier render; nothing if it is missing, torn or another film's.
    pub fn finished(&self, number: usize) -> Option<Group> {
        let bytes = fs::read(self.path(number)).ok()?;
        let (digest, body) = bytes.split_at_checked(DIGEST)?;
        (digest == self.digest(number, body)).then(|| frames(body))?
    }

    /// Keeps a segment. It is not synced: what a power cut tears is noticed and drawn again.
    pub fn keep(&self, number: usize, group: &Group) {
        let mut body = Vec::new();
        for frame in group {
            body.extend_from_slice(&(frame.len() as u64).to_le_bytes());
            body.extend_from_slice(frame);
        }
        let mut bytes = self.digest(number, &body).to_vec();
        bytes.append(&mut body);
        let path = self.path(number);
        let partial = path.with_extension("partial");
        let kept = fs::write(&partial, bytes).and_then(|()| fs::rename(&partial, &path));
        if let Err(error) = kept {
            tracing::warn!(%error, "a finished segment was not kept");
        }
    }

    fn digest(&self, number: usize, body: &[u8]) -> [u8; DIGEST] {
        let mut digest = Sha256::new();
        digest.update(format!("{number} {} {}\n", self.film.len(), self.film));
        digest.update(body);
        digest.finalize().into()
    }
}

fn frames(mut body: &[u8]) -> Option<Group> {
    let mut group = Group::new();
    while !body.is_empty() {
        let (length, rest) = body.split_first_chunk::<8>()?;
        let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
        let (frame, rest) = rest.split_at_checked(length)?;
        group.push(frame.to_vec());
        body = rest;
    }
    Some(group)
}
