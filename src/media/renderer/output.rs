//! What a program says it has made, looked at before it is believed.

use std::io;
use std::path::Path;

use tokio::io::AsyncReadExt;

use crate::domain::job::Options;
use crate::domain::translation::{Format, TranslationOptions};

/// Enough for every signature of a video.
const BEGINNING_BYTES: usize = 8 * 1024;
const CHUNK_BYTES: usize = 64 * 1024;

/// The media type of an output that fits the job, or why it does not.
///
/// # Errors
/// The file is there and cannot be read.
pub async fn check(
    path: &Path,
    options: &Options,
    most_bytes: u64,
) -> io::Result<Result<String, &'static str>> {
    // Not what a link points to: that may be any file of this machine.
    let meta = match tokio::fs::symlink_metadata(path).await {
        Ok(meta) => meta,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(Err("the engine wrote no output"));
        }
        Err(error) => return Err(error),
    };
    if !meta.is_file() {
        return Ok(Err("the engine's output is not a file"));
    }
    if meta.len() == 0 {
        return Ok(Err("the engine's output is empty"));
    }
    if meta.len() > most_bytes {
        return Ok(Err("the engine's output is too large"));
    }
    match options {
        Options::Video(_) => video(path).await,
        Options::Translation(options) => text(path, options.format).await,
    }
}

/// Whether a file is there that is a picture of this sort and no larger than that.
pub async fn is_jpeg(path: &Path, most_bytes: u64) -> bool {
    // As above: a link may lead anywhere.
    let meta = tokio::fs::symlink_metadata(path).await;
    if !meta.is_ok_and(|meta| meta.is_file() && meta.len() <= most_bytes) {
        return false;
    }
    let Ok(file) = tokio::fs::File::open(path).await else { return false };
    let mut beginning = Vec::new();
    let read = file.take(BEGINNING_BYTES as u64).read_to_end(&mut beginning).await;
    read.is_ok() && infer::get(&beginning).is_some_and(|kind| kind.mime_type() == "image/jpeg")
}

async fn video(path: &Path) -> io::Result<Result<String, &'static str>> {
    let mut beginning = Vec::new();
    let file = tokio::fs::File::open(path).await?;
    file.take(BEGINNING_BYTES as u64).read_to_end(&mut beginning).await?;
    let kind = infer::get(&beginning).map(|kind| kind.mime_type());
    let is_video = |kind: &&str| kind.starts_with("video/");
    Ok(kind.filter(is_video).map(str::to_owned).ok_or("the engine's output is not a video"))
}

async fn text(path: &Path, format: Format) -> io::Result<Result<String, &'static str>> {
    let mut file = tokio::fs::File::open(path).await?;
    let mut check = TextCheck::default();
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        let read = file.read(&mut chunk).await?;
        if read == 0 {
            break;
        }
        if check.add(&chunk[..read]).is_err() {
            break;
        }
    }
    Ok(check.judge(format).map(str::to_owned))
}

/// Bytes that are no text.
#[derive(Debug, PartialEq, Eq)]
pub struct NotText;

/// Tells whether bytes are UTF-8 without NUL, a chunk at a time.
#[derive(Default)]
pub struct TextCheck {
    /// Of a character that the next chunk ends.
    pending: Vec<u8>,
    beginning: String,
    failed: bool,
}

impl TextCheck {
    pub fn add(&mut self, chunk: &[u8]) -> Result<(), NotText> {
        let mut bytes = std::mem::take(&mut self.pending);
        bytes.extend_from_slice(chunk);
        let (text, rest) = match std::str::from_utf8(&bytes) {
            Ok(text) => (text, &[][..]),
            Err(error) if error.error_len().is_none() => {
                let (text, rest) = bytes.split_at(error.valid_up_to());
                (std::str::from_utf8(text).unwrap_or_default(), rest)
            }
            Err(_) => return self.fail(),
        };
        if text.contains('\0') {
            return self.fail();
        }
        if self.beginning.len() < BEGINNING_BYTES {
            self.beginning.extend(text.chars().take(BEGINNING_BYTES));
        }
        self.pending = rest.to_vec();
        Ok(())
    }

    /// What the text begins with.
    pub fn finish(self) -> Result<String, NotText> {
        match self.failed || !self.pending.is_empty() {
            true => Err(NotText),
            false => Ok(self.beginning),
        }
    }

    /// The media type of a translation in the format of its source, or why it is none.
    ///
    /// # Errors
    /// For the job's owner.
    pub fn judge(self, format: Format) -> Result<&'static str, &'static str> {
        let beginning = self.finish().map_err(|NotText| "the engine's output is not text")?;
        let fits = match format {
            Format::Text => true,
            Format::Srt => beginning.contains("-->"),
            Format::Vtt => beginning.trim_start_matches('\u{feff}').starts_with("WEBVTT"),
        };
        match fits {
            true => Ok(format.content_type()),
            false => Err("the engine's output does not have the layout of its source"),
        }
    }

    fn fail(&mut self) -> Result<(), NotText> {
        self.failed = true;
        Err(NotText)
    }
}

/// The source's name with the language before its ending: `film.srt` becomes `film.es.srt`.
pub fn translated_name(source: &str, options: &TranslationOptions) -> String {
    let stem = source.rsplit_once('.').map_or(source, |(stem, _)| stem);
    let stem = &stem[..stem.floor_char_boundary(180)];
    let language = options.target_language.as_ref();
    let language = language.map_or_else(|| "translated".to_owned(), ToString::to_string);
    format!("{stem}.{language}.{}", options.format.extension())
}
