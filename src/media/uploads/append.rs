//! Adding bytes to an upload: written and hashed at the same time, durable before they count, and
//! all or nothing where a checksum was promised.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::mem;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use aws_lc_rs::digest::{self, SHA1_FOR_LEGACY_USE_ONLY, SHA256};
use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt};
use sha2::{Digest, Sha256};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, interval_at};

use super::super::blobs::{SNIFF_BYTES, Stored, sniffed};
use super::note::Note;
use super::{Error, Held, in_background};

/// What is gathered before it is written; bounds the memory of an upload.
const PIECE_BYTES: usize = 1024 * 1024;
/// So much of a body without a checksum is taken in, or so long, until it is noted: a crash costs no
/// more than this and a piece.
pub(super) const NOTED_BYTES: u64 = 4 * 1024 * 1024;
pub(super) const NOTED_EVERY: Duration = Duration::from_secs(5);

/// A digest that the client promises of what it sends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checksum {
    pub algorithm: Algorithm,
    pub digest: Vec<u8>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    /// Every server of tus must have it; it guards against accidents, not against people.
    Sha1,
    Sha256,
}

impl Algorithm {
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "sha1" => Some(Self::Sha1),
            "sha256" => Some(Self::Sha256),
            _ => None,
        }
    }

    fn context(self) -> digest::Context {
        digest::Context::new(match self {
            Self::Sha1 => &SHA1_FOR_LEGACY_USE_ONLY,
            Self::Sha256 => &SHA256,
        })
    }
}

/// How an append came to its end.
#[derive(Debug)]
pub enum Ended<E> {
    /// The body was taken whole.
    Whole,
    /// The body broke off; without a checksum, what came of it counts.
    BrokenOff(E),
    /// Another request wants the upload; likewise.
    Hurried,
    /// The body was longer than the upload; nothing of it counts.
    TooLong,
    /// The checksum is another one; nothing of it counts.
    Corrupted,
}

#[derive(Debug)]
pub struct Appended<E> {
    pub ended: Ended<E>,
    /// How many bytes are durable now.
    pub offset: u64,
}

/// What is being taken in, apart from what counts: it may come to nothing.
struct Intake {
    file: File,
    note: Note,
    /// How many bytes the file has.
    length: u64,
    /// How many of them are noted. With a checksum that waits for the end.
    noted: u64,
    /// Of the bytes of the file, if that of those before them is known.
    hasher: Option<Sha256>,
    /// Of the bytes of the body, if a digest of them is promised.
    promised: Option<digest::Context>,
}

impl Held {
    /// Adds the body at the present offset. Must not be dropped half way: whoever calls it from a
    /// request, which may be, gives it a task of its own.
    ///
    /// # Errors
    /// The spool cannot be written; what was acknowledged before stands.
    pub async fn append<E>(
        &mut self,
        body: impl Stream<Item = Result<Bytes, E>>,
        checksum: Option<Checksum>,
    ) -> Result<Appended<E>, Error> {
        // Absent until they are put back together with the offset: whatever fails in between, the
        // digest is made anew from the file, and the note is written anew.
        let (before, known) = (self.offset(), self.work.hasher.take());
        let is_noted = mem::take(&mut self.work.is_noted);
        let note = self.uploads.note(self.upload.wanted.id);
        let file = self.opened(note.clone(), is_noted).await?;
        let promised = checksum.as_ref().map(|it| it.algorithm.context());
        let hasher = known.clone();
        let mut intake = Intake { file, note, length: before, noted: before, hasher, promised };
        let mut ended = match self.take_in(body, &mut intake).await {
            Ok(ended) => ended,
            Err(error) => {
                // What does not count must not take room, least of all from the log on a full disk.
                let cut = in_background(move || intake.note.cut(&intake.file, before)).await;
                return Err(cut.err().map_or(error, Error::from));
            }
        };
        let Intake { file, note, length, hasher, promised, .. } = intake;
        if let (Ended::Whole, Some(context), Some(promised)) = (&ended, promised, &checksum)
            && context.finish().as_ref() != promised.digest
        {
            ended = Ended::Corrupted;
        }
        let undone = match &ended {
            Ended::Whole => false,
            Ended::BrokenOff(_) | Ended::Hurried => checksum.is_some(),
            Ended::TooLong | Ended::Corrupted => true,
        };
        self.work.offset = in_background(move || {
            if undone {
                note.cut(&file, before)?;
                return Ok(before);
            }
            let kept = file.sync_all().and_then(|()| note.write(length));
            kept.inspect_err(|_| drop(note.cut(&file, before)))?;
            Ok(length)
        })
        .await?;
        self.work.is_noted = true;
        self.work.hasher = if undone { known } else { hasher };
        Ok(Appended { ended, offset: self.work.offset })
    }

    /// The bytes' file, standing at the offset; what a failure left behind it is no longer noted, and
    /// cut off: other bytes are about to be there.
    async fn opened(&self, note: Note, is_noted: bool) -> Result<File, Error> {
        let (offset, part) = (self.offset(), self.uploads.path(self.upload.wanted.id, "part"));
        Ok(in_background(move || {
            let mut file = File::options().write(true).open(part)?;
            match is_noted {
                true => file.set_len(offset)?,
                false => note.cut(&file, offset)?,
            }
            file.seek(SeekFrom::Start(offset))?;
            Ok(file)
        })
        .await?)
    }

    async fn take_in<E>(
        &self,
        body: impl Stream<Item = Result<Bytes, E>>,
        intake: &mut Intake,
    ) -> Result<Ended<E>, Error> {
        let upload = &self.upload;
        let mut body = std::pin::pin!(body);
        let mut left = upload.wanted.length - self.offset();
        let mut piece = BytesMut::with_capacity(PIECE_BYTES);
        let mut due = interval_at(Instant::now() + NOTED_EVERY, NOTED_EVERY);
        let ended = loop {
            let mut hurry = std::pin::pin!(upload.hurry.notified());
            hurry.as_mut().enable();
            if upload.waiting.load(Ordering::SeqCst) > 0 {
                break Ended::Hurried;
            }
            let chunk = tokio::select! {
                chunk = body.next() => chunk,
                () = hurry => continue,
                _ = due.tick() => {
                    intake.write(piece.split().freeze(), 1).await?;
                    continue;
                }
            };
            match chunk {
                None => break Ended::Whole,
                Some(Err(error)) => break Ended::BrokenOff(error),
                Some(Ok(chunk)) if chunk.len() as u64 > left => break Ended::TooLong,
                Some(Ok(chunk)) => {
                    left -= chunk.len() as u64;
                    piece.extend_from_slice(&chunk);
                }
            }
            if piece.len() >= PIECE_BYTES {
                intake.write(piece.split().freeze(), NOTED_BYTES).await?;
                piece.reserve(PIECE_BYTES);
                if self.uploads.blobs.space().is_ok_and(|space| !space.has_room_for(0)) {
                    return Err(Error::Full);
                }
            }
        };
        if !matches!(ended, Ended::TooLong) {
            intake.write(piece.freeze(), u64::MAX).await?;
        }
        Ok(ended)
    }
}

impl Intake {
    /// Notes the bytes too, if so many are not noted yet and no checksum is promised.
    ///
    /// All on threads for blocking work: at 2 GiB it would hold up other requests. After an error the
    /// digests are lost.
    async fn write(&mut self, piece: Bytes, most_unnoted: u64) -> Result<(), Error> {
        let (mut file, bytes) = (self.file.try_clone()?, piece.clone());
        self.length += piece.len() as u64;
        let is_due = self.promised.is_none() && self.length - self.noted >= most_unnoted;
        let due = is_due.then(|| (self.note.clone(), self.length));
        let writing = spawn_blocking(move || {
            file.write_all(&bytes)?;
            if let Some((note, length)) = due {
                file.sync_all()?;
                note.write(length)?;
            }
            io::Result::Ok(())
        });
        let (mut hasher, mut promised) = (self.hasher.take(), self.promised.take());
        let hashing = spawn_blocking(move || {
            if let Some(hasher) = &mut hasher {
                hasher.update(&piece);
            }
            if let Some(promised) = &mut promised {
                promised.update(&piece);
            }
            (hasher, promised)
        });
        let (written, hashed) = tokio::join!(writing, hashing);
        written.map_err(io::Error::other)??;
        if is_due {
            self.noted = self.length;
        }
        (self.hasher, self.promised) = hashed.map_err(io::Error::other)?;
        Ok(())
    }
}

/// Digest, size and type of a file; the digest is taken as it is if it is known. Blocking.
pub(super) fn examined(path: &Path, known: Option<Sha256>) -> io::Result<Stored> {
    let mut file = File::open(path)?;
    let mut first = Vec::with_capacity(SNIFF_BYTES);
    (&mut file).take(SNIFF_BYTES as u64).read_to_end(&mut first)?;
    let hasher = match known {
        Some(hasher) => hasher,
        None => {
            file.seek(SeekFrom::Start(0))?;
            let (mut hasher, mut piece) = (Sha256::new(), vec![0; PIECE_BYTES]);
            loop {
                match file.read(&mut piece)? {
                    0 => break hasher,
                    read => hasher.update(&piece[..read]),
                }
            }
        }
    };
    Ok(Stored {
        sha256: hex::encode(hasher.finalize()),
        size: file.metadata()?.len(),
        sniffed: sniffed(&first),
    })
}
