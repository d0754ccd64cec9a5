//! Files by the SHA-256 of their bytes, in an object store: written once, never changed. A blob
//! is durable when [`BlobWriter::finish`] returns, so an event about it may follow.

use std::{
    io::{self, SeekFrom},
    ops::Range,
    path::{Path as FsPath, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt, TryStreamExt, stream};
use object_store::{
    GetOptions, GetRange, GetResultPayload, MultipartUpload, ObjectStore, ObjectStoreExt,
    local::LocalFileSystem, path::Path,
};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncSeekExt};

use super::documents::Documents;

/// What is gathered before it is handed to the store, in bytes; bounds the memory of an upload.
const PART_BYTES: usize = 1024 * 1024;
/// What a download holds at a time, in bytes. (The store's own stream reads 8 KiB a thread hop.)
const READ_BYTES: usize = 128 * 1024;
/// Enough for every signature `infer` knows (tar's stands at byte 257) but the disk images'.
const SNIFF_BYTES: usize = 8 * 1024;

/// Why a blob could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("no such blob")]
    NotFound,
    #[error("the writer was used after it had failed")]
    WriterBroken,
    #[error("using the blob store: {0}")]
    Store(object_store::Error),
    #[error("using the blob directory: {0}")]
    Io(#[from] io::Error),
}

impl From<object_store::Error> for Error {
    fn from(error: object_store::Error) -> Self {
        match error {
            object_store::Error::NotFound { .. } => Error::NotFound,
            other => Error::Store(other),
        }
    }
}

/// A blob that is durable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Lower-case hex; the blob's name.
    pub sha256: String,
    /// In bytes.
    pub size: u64,
    /// The media type its first bytes show, if they show one.
    pub sniffed: Option<String>,
}

/// The store: `blobs/sha256/ab/abcdef…` under the data directory, `blobs/incoming/` for what is
/// still being written. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Blobs {
    store: Arc<dyn ObjectStore>,
    incoming: PathBuf,
    next: Arc<AtomicU64>,
}

impl Blobs {
    /// Opens the store under `data_dir`, making its directories durable. Blocking; for the start.
    pub fn open(data_dir: &FsPath) -> Result<Self, Error> {
        let root = data_dir.join("blobs");
        let incoming = root.join("incoming");
        std::fs::create_dir_all(&incoming)?;
        std::fs::create_dir_all(root.join("sha256"))?;
        for directory in [data_dir, root.as_path()] {
            std::fs::File::open(directory)?.sync_all()?;
        }
        // With fsync the store syncs a file before it renames it, then both directories and any
        // it had to make; without it a power cut could lose a blob whose event is in the log.
        let store = LocalFileSystem::new_with_prefix(&root)?.with_fsync(true);
        Ok(Self { store: Arc::new(store), incoming, next: Arc::default() })
    }

    /// Removes what a crash left half written and says how many files that were. Only for the
    /// start, before the first writer: it would take a living writer's file too.
    pub fn sweep_incoming(&self) -> Result<usize, Error> {
        let mut swept = 0;
        for entry in std::fs::read_dir(&self.incoming)? {
            std::fs::remove_file(entry?.path())?;
            swept += 1;
        }
        Ok(swept)
    }

    /// Starts a blob. Dropped unfinished, it leaves nothing.
    pub async fn writer(&self) -> Result<BlobWriter, Error> {
        // The process id keeps a command line tool and a server apart; the counter two writers.
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}-{number}", std::process::id());
        let location = Path::from(format!("incoming/{name}"));
        let upload = self.store.put_multipart(&location).await?;
        Ok(BlobWriter {
            store: self.store.clone(),
            _leftover: Leftover(self.incoming.join(name)),
            location,
            upload,
            buffer: BytesMut::new(),
            first: BytesMut::new(),
            hasher: Some(Sha256::new()),
            size: 0,
        })
    }

    /// Takes in a finished file, e.g. a rendered one, and removes it from where it was.
    pub async fn put_file(&self, path: &FsPath) -> Result<Stored, Error> {
        let mut writer = self.writer().await?;
        let mut chunks = Box::pin(read_on(tokio::fs::File::open(path).await?, None));
        while let Some(chunk) = chunks.next().await {
            writer.write(chunk?).await?;
        }
        let stored = writer.finish().await?;
        tokio::fs::remove_file(path).await?;
        Ok(stored)
    }

    /// The bytes of `range`, in order. A blob that is not there is the stream's first item.
    pub fn read_range(
        &self,
        sha256: &str,
        range: Range<u64>,
    ) -> impl Stream<Item = Result<Bytes, Error>> + use<> {
        let (store, location) = (self.store.clone(), location(sha256));
        stream::once(async move { open_range(&*store, &location?, range).await }).try_flatten()
    }

    /// A folder of small documents in the same store.
    pub fn documents(&self, folder: &str) -> Documents {
        Documents::new(Arc::clone(&self.store), folder)
    }

    /// In bytes.
    pub async fn size(&self, sha256: &str) -> Result<u64, Error> {
        Ok(self.store.head(&location(sha256)?).await?.size)
    }

    /// Removes a blob; one that is not there is no error. The caller knows that no other file
    /// has the same bytes.
    pub async fn delete(&self, sha256: &str) -> Result<(), Error> {
        match self.store.delete(&location(sha256)?).await.map_err(Error::from) {
            Err(Error::NotFound) => Ok(()),
            other => other,
        }
    }
}

/// A blob on its way in.
#[derive(Debug)]
pub struct BlobWriter {
    store: Arc<dyn ObjectStore>,
    location: Path,
    upload: Box<dyn MultipartUpload>,
    /// Held for its drop.
    _leftover: Leftover,
    buffer: BytesMut,
    first: BytesMut,
    /// Absent while a part is under way: a write that was cut off must not be built upon.
    hasher: Option<Sha256>,
    size: u64,
}

impl BlobWriter {
    /// Adds bytes. After an error only dropping the writer makes sense.
    pub async fn write(&mut self, mut chunk: Bytes) -> Result<(), Error> {
        self.size += chunk.len() as u64;
        let wanted = SNIFF_BYTES.saturating_sub(self.first.len()).min(chunk.len());
        self.first.extend_from_slice(&chunk[..wanted]);
        while !chunk.is_empty() {
            let room = (PART_BYTES - self.buffer.len()).min(chunk.len());
            self.buffer.extend_from_slice(&chunk.split_to(room));
            if self.buffer.len() == PART_BYTES {
                self.put_part().await?;
            }
        }
        Ok(())
    }

    /// How much was written so far, in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Makes the blob durable under its hash. The same bytes again are the same blob.
    pub async fn finish(mut self) -> Result<Stored, Error> {
        if !self.buffer.is_empty() {
            self.put_part().await?;
        }
        let hasher = self.hasher.take().ok_or(Error::WriterBroken)?;
        let sha256 = hex::encode(hasher.finalize());
        self.upload.complete().await?;
        self.store.rename(&self.location, &location(&sha256)?).await?;
        let sniffed = infer::get(&self.first).map(|kind| kind.mime_type().to_owned());
        Ok(Stored { sha256, size: self.size, sniffed })
    }

    /// Hashes a part on a thread for blocking work while the store writes it: at 2 GiB either
    /// would hold up the requests that share the async thread.
    async fn put_part(&mut self) -> Result<(), Error> {
        let mut hasher = self.hasher.take().ok_or(Error::WriterBroken)?;
        let part = std::mem::take(&mut self.buffer).freeze();
        let bytes = part.clone();
        let hashing = tokio::task::spawn_blocking(move || {
            hasher.update(&bytes);
            hasher
        });
        let (written, hashed) = tokio::join!(self.upload.put_part(part.into()), hashing);
        written?;
        self.hasher = Some(hashed.map_err(|_| Error::WriterBroken)?);
        Ok(())
    }
}

/// The completed file between the store's two renames; the store cleans up before the first.
#[derive(Debug)]
struct Leftover(PathBuf);

impl Drop for Leftover {
    fn drop(&mut self) {
        // Usually it is gone already; what cannot be removed is swept at the next start.
        drop(std::fs::remove_file(&self.0));
    }
}

/// Refuses all but a hash, so that no name can lead out of the store.
fn location(sha256: &str) -> Result<Path, Error> {
    let is_hash =
        sha256.len() == 64 && sha256.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    match is_hash {
        true => Ok(Path::from(format!("sha256/{}/{sha256}", &sha256[..2]))),
        false => Err(Error::NotFound),
    }
}

async fn open_range(
    store: &dyn ObjectStore,
    location: &Path,
    range: Range<u64>,
) -> Result<stream::BoxStream<'static, Result<Bytes, Error>>, Error> {
    if range.is_empty() {
        return Ok(stream::empty().boxed());
    }
    let options = GetOptions { range: Some(GetRange::Bounded(range)), ..GetOptions::default() };
    let result = store.get_opts(location, options).await?;
    let length = result.range.end - result.range.start;
    match result.payload {
        GetResultPayload::File(file, _) => {
            let mut file = tokio::fs::File::from_std(file);
            file.seek(SeekFrom::Start(result.range.start)).await?;
            Ok(read_on(file, Some(length)).boxed())
        }
        GetResultPayload::Stream(stream) => Ok(stream.map_err(Error::from).boxed()),
    }
}

/// Reads from where the file stands: `length` bytes, or to its end. A file that ends early is an
/// error, not a short answer.
fn read_on(
    file: tokio::fs::File,
    length: Option<u64>,
) -> impl Stream<Item = Result<Bytes, Error>> + Send {
    stream::try_unfold((file, length), |(mut file, left)| async move {
        if left == Some(0) {
            return Ok(None);
        }
        let most = left.map_or(READ_BYTES as u64, |left| left.min(READ_BYTES as u64));
        let mut chunk = BytesMut::with_capacity(most as usize);
        let read = (&mut file).take(most).read_buf(&mut chunk).await? as u64;
        match (read, left) {
            (0, None) => Ok(None),
            (0, Some(_)) => Err(Error::Io(io::ErrorKind::UnexpectedEof.into())),
            _ => Ok(Some((chunk.freeze(), (file, left.map(|left| left - read))))),
        }
    })
}

#[cfg(test)]
#[path = "blobs_tests.rs"]
mod tests;
