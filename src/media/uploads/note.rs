//! How many bytes of an upload are durable, noted beside them. The length of their file does not say:
//! a power cut may keep it and lose the bytes, and a kill leaves bytes that nobody has compared with
//! their checksum.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::PathBuf;

/// The note of one upload. Always of the same length, so that writing it anew changes one sector.
#[derive(Debug, Clone)]
pub(super) struct Note(pub(super) PathBuf);

impl Note {
    /// Of no bytes. Durable once the directory is.
    pub(super) fn create(&self) -> io::Result<()> {
        Self::fill(&File::create(&self.0)?, 0)
    }

    /// What it says; none if there is none, or nothing that makes sense.
    pub(super) fn read(&self) -> io::Result<Option<u64>> {
        match fs::read_to_string(&self.0) {
            Ok(text) => Ok(text.parse().ok()),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Durable on return. What it counts must be durable before.
    pub(super) fn write(&self, offset: u64) -> io::Result<()> {
        Self::fill(&File::options().write(true).open(&self.0)?, offset)
    }

    /// Cuts the bytes' file, and counts no more. The note goes first: a power cut may keep the
    /// file's length, with zeros from where it was cut.
    pub(super) fn cut(&self, part: &File, offset: u64) -> io::Result<()> {
        self.write(offset)?;
        part.set_len(offset)
    }

    fn fill(mut file: &File, offset: u64) -> io::Result<()> {
        file.write_all(format!("{offset:020}").as_bytes())?;
        file.sync_all()
    }
}
