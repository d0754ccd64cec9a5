//! Files by the SHA-256 of their bytes, in an object store: written once, never changed. A blob
//! is durable when [`BlobWriter::finish`] returns, so an event about it may follow.

use std::{
    io::{self, SeekFrom},
    ops::Range,
    path::{Path as FsPath, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt, TryStreamExt, stream};
use object_store::{
    ClientOptions, GetOptions, GetRange, GetResultPayload, MultipartUpload, ObjectStore,
    ObjectStoreExt, RetryConfig, aws::AmazonS3Builder, local::LocalFileSystem, memory::InMemory,
    path::Path, prefix::PrefixStore,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt};

use super::documents::Documents;
use super::settling::{self, Settling};
use crate::config::{BlobStore, Secret};

/// What is gathered before it is handed to the store, in bytes; bounds the memory of an upload.
const PART_BYTES: usize = 1024 * 1024;
/// The same for S3, whose parts must have 5 MiB at least, and be 10,000 at most.
const S3_PART_BYTES: usize = 5 * 1024 * 1024;
/// What a download holds at a time, in bytes. (The store's own stream reads 8 KiB a thread hop.)
const READ_BYTES: usize = 128 * 1024;
/// The longest silence of S3 while bytes are read or copied. It goes on while a player pauses, which
/// `T2M_STALLED_S` is to end long before.
const S3_SILENCE: Duration = Duration::from_secs(15 * 60);
/// How long a call may take that moves a part at the most.
const ANSWERED_WITHIN: Duration = Duration::from_secs(60);
/// How long a store may take to make one object of many parts: S3 speaks of minutes.
const COMPLETED_WITHIN: Duration = Duration::from_secs(5 * 60);
/// Enough for every signature `infer` knows (tar's stands at byte 257) but the disk images'.
pub(super) const SNIFF_BYTES: usize = 8 * 1024;

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
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stored {
    /// Lower-case hex; the blob's name.
    pub sha256: String,
    /// In bytes.
    pub size: u64,
    /// The media type its first bytes show, if they show one.
    pub sniffed: Option<String>,
}

/// The store: `sha256/ab/abcdef…` for what is there, `incoming/` for what is still being written,
/// `aside/` for what nobody seems to need (see [`super::aside`]). Cheap to clone.
#[derive(Debug, Clone)]
pub struct Blobs {
    pub(super) store: Arc<dyn ObjectStore>,
    /// The same for documents, and for whatever moves no bytes: over S3, a call to it ends soon, the
    /// answer's body included.
    pub(super) small: Arc<dyn ObjectStore>,
    /// `blobs` under the data directory: the store itself, unless that is elsewhere.
    pub(super) root: PathBuf,
    pub(super) is_local: bool,
    part_bytes: usize,
    /// Of the directories of blobs.
    settling: Arc<Settling>,
}

impl Blobs {
    /// Opens the store that is configured; its directory is made, if it is one. Blocking; for the
    /// start.
    ///
    /// # Errors
    /// The directory cannot be made, or the settings of S3 (`AWS_…`) make no sense.
    pub fn open(store: &BlobStore, data_dir: &FsPath) -> Result<Self, Error> {
        let root = data_dir.join("blobs");
        if *store == BlobStore::File {
            std::fs::create_dir_all(root.join("incoming"))?;
            std::fs::create_dir_all(root.join("sha256"))?;
            for directory in [data_dir, root.as_path()] {
                std::fs::File::open(directory)?.sync_all()?;
            }
        }
        Self::around(store, root)
    }

    /// Opens it to be read alone, which makes nothing: a directory that is not there is read as an
    /// empty store.
    ///
    /// # Errors
    /// As [`Blobs::open`].
    pub fn open_for_reading(store: &BlobStore, data_dir: &FsPath) -> Result<Self, Error> {
        let root = data_dir.join("blobs");
        match store {
            BlobStore::File if !root.try_exists()? => {
                Ok(Self::of(Arc::new(InMemory::new()), root, true, PART_BYTES))
            }
            _ => Self::around(store, root),
        }
    }

    /// Over a store that somebody else has opened, which need not be on any disk.
    pub fn over(store: Arc<dyn ObjectStore>, data_dir: &FsPath) -> Self {
        let root = data_dir.join("blobs");
        Self::of(store, root, false, S3_PART_BYTES)
    }

    fn of(store: Arc<dyn ObjectStore>, root: PathBuf, is_local: bool, part_bytes: usize) -> Self {
        let (small, settling) = (Arc::clone(&store), Arc::default());
        Self { store, small, root, is_local, part_bytes, settling }
    }

    fn around(store: &BlobStore, root: PathBuf) -> Result<Self, Error> {
        match store {
            BlobStore::File => {
                // With fsync the store syncs a file before it renames it, then both directories and
                // any it had to make; without it a power cut could lose a blob whose event is in
                // the log.
                let store = LocalFileSystem::new_with_prefix(&root)?.with_fsync(true);
                Ok(Self::of(Arc::new(store), root, true, PART_BYTES))
            }
            BlobStore::S3 { bucket, prefix, aws } => {
                let open = |options: ClientOptions| -> Result<Arc<dyn ObjectStore>, Error> {
                    let client = s3(bucket, aws, options).build()?;
                    Ok(Arc::new(PrefixStore::new(client, prefix.as_str())))
                };
                let small = open(ClientOptions::new())?;
                Ok(Self { small, ..Self::of(open(for_blobs())?, root, false, S3_PART_BYTES) })
            }
        }
    }

    /// Whether the store answers and lets itself be read.
    ///
    /// # Errors
    /// What it said.
    pub async fn probe(&self) -> Result<(), Error> {
        let mut listed = self.small.list(Some(&Path::from("incoming")));
        listed.next().await.transpose()?;
        Ok(())
    }

    /// Removes what a crash left half written on this machine and says how many files that were.
    /// Only for the start, before the first writer: it would take a living writer's file too.
    pub fn sweep_incoming(&self) -> Result<usize, Error> {
        let mut swept = 0;
        if !self.is_local {
            return Ok(swept);
        }
        for entry in std::fs::read_dir(self.root.join("incoming"))? {
            std::fs::remove_file(entry?.path())?;
            swept += 1;
        }
        Ok(swept)
    }

    /// Starts a blob. Dropped unfinished, it leaves nothing.
    pub async fn writer(&self) -> Result<BlobWriter, Error> {
        // Several servers may share a bucket, so that a counter would not do.
        let name = format!("{:032x}", rand::random::<u128>());
        let location = Path::from(format!("incoming/{name}"));
        let upload = answered(ANSWERED_WITHIN, self.store.put_multipart(&location)).await?;
        Ok(BlobWriter {
            blobs: self.clone(),
            leftover: Leftover(self.root.join("incoming").join(name)),
            location,
            upload: Some(upload),
            part_bytes: self.part_bytes,
            buffer: BytesMut::new(),
            first: BytesMut::new(),
            hasher: Some(Sha256::new()),
            size: 0,
        })
    }

    /// Where files lie that are to be [adopted](Blobs::adopt).
    pub fn spool(&self) -> PathBuf {
        self.root.join("uploads")
    }

    /// Makes a file of the spool, whose bytes are durable and known, a blob. May be repeated: a
    /// file that is gone is no error if its blob is there.
    ///
    /// # Errors
    /// [`Error::NotFound`] when neither is there.
    pub async fn adopt(&self, name: &str, known: &Stored) -> Result<(), Error> {
        let path = self.spool().join(name);
        if !tokio::fs::try_exists(&path).await? {
            self.bring_back(&known.sha256).await?;
            return self.sync_names_of(&known.sha256).await;
        }
        if self.is_local {
            return self.give_name(&Path::from(format!("uploads/{name}")), &known.sha256).await;
        }
        if self.copy_in(&path).await?.sha256 != known.sha256 {
            // The disk gave back other bytes than it was given; they are all that there is.
            return Err(Error::Io(io::ErrorKind::InvalidData.into()));
        }
        Ok(tokio::fs::remove_file(&path).await?)
    }

    /// Takes in a finished file, e.g. a rendered one, and removes it from where it was.
    pub async fn put_file(&self, path: &FsPath) -> Result<Stored, Error> {
        let stored = self.copy_in(path).await?;
        tokio::fs::remove_file(path).await?;
        Ok(stored)
    }

    /// Takes in a file and leaves it where it is.
    pub async fn copy_in(&self, path: &FsPath) -> Result<Stored, Error> {
        let mut writer = self.writer().await?;
        let mut chunks = Box::pin(read_on(tokio::fs::File::open(path).await?, None));
        while let Some(chunk) = chunks.next().await {
            writer.write(chunk?).await?;
        }
        writer.finish().await
    }

    /// The bytes of `range`, in order. A blob that is not there is the stream's first item.
    pub fn read_range(
        &self,
        sha256: &str,
        range: Range<u64>,
    ) -> impl Stream<Item = Result<Bytes, Error>> + use<> {
        let (blobs, sha256) = (self.clone(), sha256.to_owned());
        stream::once(async move { blobs.open_range(&sha256, range).await }).try_flatten()
    }

    /// The same, once the first of the bytes are there: what cannot be read is found out while it
    /// can still be said.
    pub async fn begin_range(
        &self,
        sha256: &str,
        range: Range<u64>,
    ) -> Result<impl Stream<Item = Result<Bytes, Error>> + use<>, Error> {
        let mut chunks = self.open_range(sha256, range).await?;
        let first = chunks.try_next().await?;
        Ok(stream::iter(first.map(Ok)).chain(chunks))
    }

    /// Copies a blob into a file of this machine. The file is not synced: it is for passing use.
    pub async fn copy_to(&self, sha256: &str, size: u64, path: &FsPath) -> Result<(), Error> {
        let mut file = tokio::fs::File::create(path).await?;
        let mut chunks = std::pin::pin!(self.read_range(sha256, 0..size));
        while let Some(chunk) = chunks.next().await {
            file.write_all(&chunk?).await?;
        }
        Ok(file.flush().await?)
    }

    /// Gives a file that is durable the name of its hash. On S3 a copy and a deletion: the blob
    /// appears whole, and again if it was there.
    async fn give_name(&self, from: &Path, sha256: &str) -> Result<(), Error> {
        let place = location(sha256)?;
        self.store.rename(from, &place).await.inspect_err(|_| self.settling.failed())?;
        match self.is_local {
            // The store has synced the blob's own directory, and that one's name only if it was new.
            true => Ok(self.settling.settle(|| [self.root.join("sha256")]).await?),
            false => Ok(()),
        }
    }

    /// Makes the name of a blob durable that somebody else has given it, or failed over it.
    async fn sync_names_of(&self, sha256: &str) -> Result<(), Error> {
        if !self.is_local {
            return Ok(());
        }
        let above = self.root.join("sha256");
        Ok(settling::sync([above.join(&sha256[..2]), above]).await?)
    }

    /// A folder of small documents in the same store.
    pub fn documents(&self, folder: &str) -> Documents {
        let store = Arc::clone(&self.small);
        Documents::new(&Self { store, ..self.clone() }, folder)
    }

    /// In bytes.
    pub async fn size(&self, sha256: &str) -> Result<u64, Error> {
        match self.small.head(&location(sha256)?).await {
            Err(object_store::Error::NotFound { .. }) => {
                self.aside(sha256).await?.map(|found| found.size).ok_or(Error::NotFound)
            }
            found => Ok(found?.size),
        }
    }

    /// Looks at a blob that has been put aside too, and once more at its own place: it may have
    /// been brought back in between.
    async fn open_range(&self, sha256: &str, range: Range<u64>) -> Result<Chunks, Error> {
        let location = location(sha256)?;
        match open_range(&*self.store, &location, range.clone()).await {
            Err(Error::NotFound) => {}
            opened => return opened,
        }
        if let Some(aside) = self.aside(sha256).await? {
            match open_range(&*self.store, &aside.location, range.clone()).await {
                Err(Error::NotFound) => {}
                opened => return opened,
            }
        }
        open_range(&*self.store, &location, range).await
    }
}

type Chunks = stream::BoxStream<'static, Result<Bytes, Error>>;

/// A blob on its way in.
#[derive(Debug)]
pub struct BlobWriter {
    blobs: Blobs,
    location: Path,
    /// Taken when it is complete; left there, it is aborted.
    upload: Option<Box<dyn MultipartUpload>>,
    part_bytes: usize,
    /// Also for its drop.
    leftover: Leftover,
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
            let room = (self.part_bytes - self.buffer.len()).min(chunk.len());
            self.buffer.extend_from_slice(&chunk.split_to(room));
            if self.buffer.len() == self.part_bytes {
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
        let upload = self.upload.as_mut().ok_or(Error::WriterBroken)?;
        let completed = answered(COMPLETED_WITHIN, upload.complete()).await;
        if completed.is_ok() || self.blobs.is_local {
            // A store on a disk lets go of what it could not complete, and leaves it there.
            self.upload = None;
        }
        completed.inspect_err(|_| self.leftover.remove_unfinished())?;
        self.blobs.give_name(&self.location, &sha256).await?;
        Ok(Stored { sha256, size: self.size, sniffed: sniffed(&self.first) })
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
        let upload = self.upload.as_mut().ok_or(Error::WriterBroken)?;
        let (written, hashed) =
            tokio::join!(answered(ANSWERED_WITHIN, upload.put_part(part.into())), hashing);
        written?;
        self.hasher = Some(hashed.map_err(|_| Error::WriterBroken)?);
        Ok(())
    }
}

impl Drop for BlobWriter {
    fn drop(&mut self) {
        // S3 keeps, and charges for, the parts of an upload that nobody aborts.
        let runtime = tokio::runtime::Handle::try_current();
        if let (Some(mut upload), Ok(runtime)) = (self.upload.take(), runtime) {
            runtime.spawn(async move {
                if let Err(error) = upload.abort().await {
                    tracing::warn!(%error, "an unfinished upload could not be removed");
                }
            });
        }
    }
}

/// The media type that the first bytes of a file show.
pub(super) fn sniffed(first: &[u8]) -> Option<String> {
    let first = &first[..first.len().min(SNIFF_BYTES)];
    infer::get(first).map(|kind| kind.mime_type().to_owned())
}

/// The completed file between the store's two renames; before the first the store cleans up, unless
/// it is that which fails.
#[derive(Debug)]
struct Leftover(PathBuf);

impl Leftover {
    /// A store on a disk calls it so until it is complete. No other writer has the same name.
    fn remove_unfinished(&self) {
        let mut unfinished = self.0.clone().into_os_string();
        unfinished.push("#1");
        // As below.
        drop(std::fs::remove_file(unfinished));
    }
}

impl Drop for Leftover {
    fn drop(&mut self) {
        // Usually it is gone already; what cannot be removed is swept at the next start.
        drop(std::fs::remove_file(&self.0));
    }
}

/// Refuses all but a hash, so that no name can lead out of the store.
pub(super) fn location(sha256: &str) -> Result<Path, Error> {
    let is_hash =
        sha256.len() == 64 && sha256.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    match is_hash {
        true => Ok(Path::from(format!("sha256/{}/{sha256}", &sha256[..2]))),
        false => Err(Error::NotFound),
    }
}

/// Whatever `AWS_…` says goes before what is said here.
fn s3(bucket: &str, aws: &[(String, Secret)], options: ClientOptions) -> AmazonS3Builder {
    // The client's own patience is three minutes, in which an uploader hears nothing.
    let retry = RetryConfig {
        max_retries: 4,
        retry_timeout: Duration::from_secs(30),
        ..RetryConfig::default()
    };
    let builder = AmazonS3Builder::new().with_bucket_name(bucket).with_retry(retry);
    aws.iter().fold(builder.with_client_options(options), |builder, (name, value)| {
        // There are more variables than this client knows, e.g. AWS_PROFILE.
        match name.to_ascii_lowercase().parse() {
            Ok(key) => builder.with_config(key, value.reveal()),
            Err(_) => builder,
        }
    })
}

/// How long a read or a copy takes is for the blob's size to say: the client's usual 30 s, the body
/// included, would cut it off.
fn for_blobs() -> ClientOptions {
    ClientOptions::new().with_timeout_disabled().with_read_timeout(S3_SILENCE)
}

/// A call that is answered soon or not at all.
async fn answered<T>(
    within: Duration,
    call: impl Future<Output = object_store::Result<T>>,
) -> Result<T, object_store::Error> {
    tokio::time::timeout(within, call).await.unwrap_or_else(|late| {
        Err(object_store::Error::Generic { store: "blobs", source: Box::new(late) })
    })
}

async fn open_range(
    store: &dyn ObjectStore,
    location: &Path,
    range: Range<u64>,
) -> Result<Chunks, Error> {
    if range.is_empty() {
        return Ok(stream::empty().boxed());
    }
    let bounded = Some(GetRange::Bounded(range.clone()));
    let options = GetOptions { range: bounded, ..GetOptions::default() };
    let result = answered(ANSWERED_WITHIN, store.get_opts(location, options)).await?;
    // A store gives what there is of a range.
    if result.range != range {
        return Err(Error::Io(io::ErrorKind::UnexpectedEof.into()));
    }
    let length = range.end - range.start;
    match result.payload {
        GetResultPayload::File(file, _) => {
            let mut file = tokio::fs::File::from_std(file);
            file.seek(SeekFrom::Start(range.start)).await?;
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
