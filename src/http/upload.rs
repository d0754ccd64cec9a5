//! Multipart uploads: field `file` streams into the blob store, the other fields become metadata.

use std::io;

use actix_multipart::{Field, Multipart};
use actix_web::{HttpRequest, error::PayloadError, http::header::ContentDisposition, web};
use futures_util::StreamExt;
use serde_json::{Map, Value};

use super::{
    body::{BodyLimits, declared_length, payload_problem, too_large, unstalled},
    problem::{Code, Problem},
    quota::Allowance,
    room::{Room, STEP_BYTES},
};
use crate::media::blobs::{BlobWriter, Blobs};

/// Fields besides the file, and how long the name of each may be.
pub const MAX_FIELDS: usize = 32;
pub const MAX_NAME_BYTES: usize = 128;
/// What all that is kept of a file beside its bytes may take, as JSON, which is how it is stored and
/// sent: 200 files make a page, 1000 events a batch, 10,000 entities are held in memory, and all of
/// that is counted in pieces that must not be large.
pub const MAX_METADATA_BYTES: usize = 16 * 1024;

/// How large an upload may be, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct Most {
    pub file: u64,
    /// All fields besides it, as JSON.
    pub fields: usize,
}

impl Most {
    /// What a file of the largest size comes with: the fields, their headers and the boundaries.
    fn around_file(self) -> u64 {
        (self.fields + MAX_FIELDS * 1024 + 64 * 1024) as u64
    }
}

/// An upload whose bytes are durable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upload {
    /// Safe to show and to store: no path, no control characters, at most 255 bytes.
    pub filename: String,
    /// What the client called it, if anything.
    pub declared_type: Option<String>,
    /// What its bytes show; else what was declared, if harmless; else `application/octet-stream`.
    pub content_type: String,
    /// In bytes.
    pub size: u64,
    pub sha256: String,
    /// The other fields, as strings; a repeated one as a list. May hold secrets (`api_key`).
    pub metadata: Map<String, Value>,
}

/// Reads an upload to its end. One that is refused or breaks off leaves nothing behind.
pub async fn receive(
    req: &HttpRequest,
    payload: web::Payload,
    blobs: &Blobs,
    most: Most,
    allowance: &mut Allowance,
) -> Result<Upload, Problem> {
    let declared = declared_length(req).unwrap_or_default();
    let least = declared.saturating_sub(most.around_file());
    if least > most.file {
        return Err(too_large(most.file));
    }
    let room = Room::of_store(blobs);
    room.check(least)?;
    // All of the body if there is room, so that the upload cannot fail half way; else what the
    // file must have at the least.
    if allowance.cover(declared).is_err() {
        allowance.cover(least)?;
    }
    let body = Box::pin(unstalled(payload, BodyLimits::of(req).silence));
    let mut multipart = Multipart::new(req.headers(), body);
    let mut metadata = Metadata::new(most.fields);
    let (part, writer) = loop {
        let Some(field) = multipart.next().await else {
            return Err(Problem::field("file", "is required"));
        };
        let field = field.map_err(multipart_problem)?;
        match field.name() {
            Some("file") => break receive_file(field, blobs, room, most.file, allowance).await?,
            _ => metadata.add(field).await?,
        }
    };
    // Before there is a blob: it would stay for hours when the form is refused.
    metadata.add_rest(&mut multipart).await?;
    allowance.shrink_to(writer.size());
    let stored = writer.finish().await?;
    Ok(Upload {
        filename: part.filename,
        content_type: content_type(stored.sniffed.as_deref(), part.declared.as_ref()),
        declared_type: part.declared.map(|mime| mime.to_string()),
        size: stored.size,
        sha256: stored.sha256,
        metadata: metadata.fields,
    })
}

struct Part {
    filename: String,
    declared: Option<mime::Mime>,
}

async fn receive_file(
    mut field: Field,
    blobs: &Blobs,
    room: Room<'_>,
    most: u64,
    allowance: &mut Allowance,
) -> Result<(Part, BlobWriter), Problem> {
    let filename = filename(field.content_disposition());
    let declared = field.content_type().cloned();
    let mut writer = blobs.writer().await?;
    let mut checked = 0;
    while let Some(chunk) = field.next().await {
        let chunk = chunk.map_err(multipart_problem)?;
        let size = writer.size() + chunk.len() as u64;
        if size > most {
            return Err(too_large(most));
        }
        allowance.keep_ahead_of(size)?;
        // Others write too, and not every body says how long it is.
        if size >= checked {
            room.check(0)?;
            checked = size + STEP_BYTES;
        }
        writer.write(chunk).await?;
    }
    Ok((Part { filename, declared }, writer))
}

struct Metadata {
    fields: Map<String, Value>,
    count: usize,
    /// All of them as JSON, in bytes.
    most: usize,
}

impl Metadata {
    fn new(most: usize) -> Self {
        Self { fields: Map::new(), count: 0, most }
    }

    async fn add_rest(&mut self, multipart: &mut Multipart) -> Result<(), Problem> {
        while let Some(field) = multipart.next().await {
            let field = field.map_err(multipart_problem)?;
            if field.name() == Some("file") {
                return Err(Problem::field("file", "must be given once"));
            }
            self.add(field).await?;
        }
        Ok(())
    }

    async fn add(&mut self, mut field: Field) -> Result<(), Problem> {
        let name = field.name().unwrap_or_default().to_owned();
        self.count += 1;
        if self.count > MAX_FIELDS {
            let sentence = format!("At most {MAX_FIELDS} fields are allowed besides the file");
            return Err(Problem::new(Code::ValidationFailed).with_sentence(sentence));
        }
        if name.is_empty() || name.len() > MAX_NAME_BYTES {
            let sentence = format!("Field names must be 1 to {MAX_NAME_BYTES} bytes long");
            return Err(Problem::new(Code::ValidationFailed).with_sentence(sentence));
        }
        let mut bytes = Vec::new();
        while let Some(chunk) = field.next().await {
            bytes.extend_from_slice(&chunk.map_err(multipart_problem)?);
            if bytes.len() > self.most {
                return Err(self.too_much(&name));
            }
        }
        let text = String::from_utf8(bytes).map_err(|_| Problem::field(&name, "must be UTF-8"))?;
        self.insert(name.clone(), Value::String(text));
        match json_bytes(&self.fields) <= self.most {
            true => Ok(()),
            false => Err(self.too_much(&name)),
        }
    }

    fn too_much(&self, name: &str) -> Problem {
        let words =
            format!("makes the fields besides the file longer than {} bytes of JSON", self.most);
        Problem::field(name, &words)
    }

    fn insert(&mut self, name: String, text: Value) {
        match self.fields.get_mut(&name) {
            None => drop(self.fields.insert(name, text)),
            Some(Value::Array(texts)) => texts.push(text),
            Some(first) => *first = Value::Array(vec![first.take(), text]),
        }
    }
}

/// What it takes where it is stored, with all that is escaped.
pub fn json_bytes(metadata: &Map<String, Value>) -> usize {
    serde_json::to_vec(metadata).map_or(usize::MAX, |json| json.len())
}

fn multipart_problem(error: actix_multipart::MultipartError) -> Problem {
    use actix_multipart::MultipartError as E;
    match error {
        E::ContentTypeMissing | E::ContentTypeParse | E::ContentTypeIncompatible => {
            Problem::new(Code::UnsupportedMediaType)
                .with_sentence("Send the file as multipart/form-data")
        }
        E::Payload(PayloadError::Io(io)) if io.kind() == io::ErrorKind::TimedOut => {
            payload_problem(PayloadError::Io(io))
        }
        other => Problem::new(Code::MultipartInvalid).caused_by(other.to_string()),
    }
}

/// The file's own name, without what could harm a shell, a header, a path or a reader's eye.
fn filename(disposition: Option<&ContentDisposition>) -> String {
    let extended = disposition.and_then(|it| it.get_filename_ext());
    let extended = extended.map(|it| String::from_utf8_lossy(&it.value).into_owned());
    let plain = || disposition.and_then(|it| it.get_filename()).map(str::to_owned);
    sanitised(&extended.or_else(plain).unwrap_or_default())
}

/// A file name that is safe to keep; `file` if nothing of it is left.
pub fn sanitised(name: &str) -> String {
    let last = name.rsplit(['/', '\\']).next().unwrap_or_default();
    // Marks that reverse the reading direction make `gpj.exe` look like `exe.jpg`.
    let turns = |c: char| matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let kept: String = last.chars().filter(|c| !c.is_control() && !turns(*c)).collect();
    match kept.trim() {
        "" | "." | ".." => "file".to_owned(),
        kept => shortened(kept),
    }
}

/// At most 255 bytes, cut before the extension.
fn shortened(name: &str) -> String {
    const MAX_BYTES: usize = 255;
    if name.len() <= MAX_BYTES {
        return name.to_owned();
    }
    let dot = name.rfind('.').filter(|dot| name.len() - dot <= 32);
    let (stem, extension) = name.split_at(dot.unwrap_or(name.len()));
    let end = stem.floor_char_boundary(MAX_BYTES - extension.len());
    format!("{}{extension}", &stem[..end])
}

/// What a file is served as: what its bytes show, else what was declared if that is harmless.
pub fn content_type(sniffed: Option<&str>, declared: Option<&mime::Mime>) -> String {
    let harmless = declared.map(|mime| mime.essence_str()).filter(|kind| is_harmless(kind));
    sniffed.or(harmless).unwrap_or("application/octet-stream").to_owned()
}

/// Nothing a browser would run, and nothing that is a message of its own.
fn is_harmless(essence: &str) -> bool {
    let (kind, subtype) = essence.split_once('/').unwrap_or_default();
    let known = ["application", "audio", "font", "image", "model", "text", "video"];
    known.contains(&kind) && !runs(subtype) && !is_xml(essence)
}

/// Whole words: an `openxmlformats` is an office document, and `postscript` no script.
fn runs(subtype: &str) -> bool {
    let named = subtype.strip_prefix("x-").unwrap_or(subtype);
    let by_browsers = [
        "cache-manifest",
        "component",
        "css",
        "ecmascript",
        "hta",
        "html",
        "java-applet",
        "java-archive",
        "javascript",
        "jscript",
        "livescript",
        "manifest+json",
        "shockwave-flash",
        "vnd.adobe.flash.movie",
        "wasm",
        "web-app-manifest+json",
        "xhtml",
    ];
    by_browsers.contains(&named) || named.starts_with("javascript1.")
}

/// Whether a browser may take it for XML, in which there may be scripts.
pub fn is_xml(content_type: &str) -> bool {
    let essence = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    let (_, subtype) = essence.split_once('/').unwrap_or_default();
    ["svg", "svg-xml", "xml", "xsl"].contains(&subtype) || subtype.ends_with("+xml")
}

#[cfg(test)]
#[path = "upload_tests.rs"]
mod tests;
