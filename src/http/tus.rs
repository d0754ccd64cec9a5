//! Uploads in pieces: tus 1.0 (tus.io) with the extensions creation, creation-with-upload,
//! expiration, checksum and termination. An upload has the id of the file that it becomes; its
//! address goes on telling so once it is stored.

use std::time::SystemTime;

use actix_web::http::Method;
use actix_web::http::header::{self, HeaderName, HeaderValue, HttpDate};
use actix_web::{HttpRequest, HttpResponse, HttpResponseBuilder, web};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use chrono::{DateTime, Utc};
use serde_json::json;
use uuid::Uuid;

use super::app::App;
use super::body::{BodyLimits, declared_length, too_large};
use super::caller::Caller;
use super::files::{self, parse_id};
use super::jobs::{at_position, idempotency_key, replayed};
use super::problem::{Code, Problem};
use super::room::{self, Room};
use super::upload;
use crate::domain::ids::{FileId, derived_id};
use crate::media::reservations::Reservation;
use crate::media::uploads::{self, Algorithm, Begun, Checksum, Ended, Held, Wanted};
use crate::views::{FileRow, View};

mod apart;
mod body;
mod metadata;
pub mod parameters;

use apart::{heard_or_undone, to_the_end};
use body::Body;
use metadata::{bad_metadata, described, pairs};

/// The protocol's version, in every answer.
pub const VERSION: &str = "1.0.0";
const EXTENSIONS: &str = "creation,creation-with-upload,expiration,checksum,termination";
const ALGORITHMS: &str = "sha1,sha256";
pub const PIECE: &str = "application/offset+octet-stream";
const OVERRIDE: &str = "x-http-method-override";
/// Uploads of one user that may be open at once: what is said of each is held in memory until it ends.
/// A few that are begun at the same instant may come to more.
const MOST_OPEN: usize = 100;

/// What a page of another origin may send.
pub const REQUEST_HEADERS: [&str; 6] = [
    "Tus-Resumable",
    "Upload-Length",
    "Upload-Offset",
    "Upload-Metadata",
    "Upload-Checksum",
    "X-HTTP-Method-Override",
];
/// What it may read.
pub const RESPONSE_HEADERS: [&str; 10] = [
    "Tus-Resumable",
    "Tus-Version",
    "Tus-Extension",
    "Tus-Max-Size",
    "Tus-Checksum-Algorithm",
    "Upload-Offset",
    "Upload-Length",
    "Upload-Metadata",
    "Upload-Expires",
    "X-File-Id",
];

/// `OPTIONS files/tus`; a browser's preflight is answered before it comes here.
pub async fn options(app: web::Data<App>) -> HttpResponse {
    HttpResponse::NoContent()
        .insert_header(("Tus-Version", VERSION))
        .insert_header(("Tus-Extension", EXTENSIONS))
        .insert_header(("Tus-Max-Size", app.max_upload_bytes.to_string()))
        .insert_header(("Tus-Checksum-Algorithm", ALGORITHMS))
        .finish()
}

/// `POST files/tus`
pub async fn create(
    app: web::Data<App>,
    caller: Caller,
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse, Problem> {
    speaks_tus(&request)?;
    let length = length(&request)?;
    if length > app.max_upload_bytes {
        return Err(too_large(app.max_upload_bytes));
    }
    let first = is_piece(&request).then(|| piece(&app, &request, payload)).transpose()?;
    if first.is_some() {
        fits(&request, 0, length)?;
    }
    let key = idempotency_key(&request)?;
    let id = match &key {
        Some(key) => derived_id(&caller.user_id, "file", key),
        None => app.system.clock.fresh_id(),
    };
    let wanted = wanted(&app, &caller, id, length, &request)?;
    let found = find(&app, &caller, id);
    if let (Some(_), Ok(found)) = (&key, found) {
        return again(&app, &found, &wanted).await;
    }
    let open = app.uploads.number_of(&caller.user_id);
    if open >= MOST_OPEN {
        return Err(too_many(open));
    }
    // Before its room is reserved: a repetition while this one is begun must not need it too.
    let begun = app.uploads.claim(id)?;
    Room::of_spool(&app.blobs).check(length)?;
    let mut allowance = app.quotas.allowance(&app, &caller);
    allowance.cover(length)?;
    let (expires_at, room) = (wanted.expires_at, allowance.into_room());
    let work = begin(app.clone(), caller, begun, wanted, room, first, key.is_some());
    let advanced = match key {
        Some(_) => to_the_end(work).await?,
        None => {
            let forgotten = forget(app.clone(), id);
            heard_or_undone(work, move |_| forgotten).await?
        }
    };
    let mut response = HttpResponse::Created();
    response.insert_header((header::LOCATION, location(&app, id)));
    Ok(advanced.tell(&mut response, expires_at))
}

/// `HEAD files/tus/{id}`
pub async fn show(
    app: web::Data<App>,
    caller: Caller,
    request: HttpRequest,
    id: web::Path<String>,
) -> Result<HttpResponse, Problem> {
    let found = find(&app, &caller, parse_id(&id)?.0)?;
    speaks_tus(&request)?;
    let mut response = HttpResponse::Ok();
    response.insert_header((header::CACHE_CONTROL, "no-store"));
    let upload = match found {
        Found::Stored(file) => {
            if let Some(described) = described(&file) {
                response.insert_header(("Upload-Metadata", described));
            }
            return Ok(stored(&mut response, &file));
        }
        Found::Open(upload) => upload,
    };
    response.insert_header(("Upload-Length", upload.wanted.length.to_string()));
    if !upload.wanted.described.is_empty() {
        response.insert_header(("Upload-Metadata", upload.wanted.described.as_str()));
    }
    let expires_at = upload.wanted.expires_at;
    let held = app.uploads.hold(upload).await?;
    // All its bytes may be there without it being stored: the log could not be written then.
    Ok(advance(&app, &caller, held, None).await?.tell(&mut response, expires_at))
}

/// `PATCH files/tus/{id}`
pub async fn append(
    app: web::Data<App>,
    caller: Caller,
    request: HttpRequest,
    id: web::Path<String>,
    payload: web::Payload,
) -> Result<HttpResponse, Problem> {
    let found = find(&app, &caller, parse_id(&id)?.0)?;
    speaks_tus(&request)?;
    if !is_piece(&request) {
        let sentence = format!("Send a piece of an upload as {PIECE}");
        return Err(Problem::new(Code::UnsupportedMediaType).with_sentence(sentence));
    }
    let offset = number(&request, "upload-offset")?
        .ok_or_else(|| malformed("The header Upload-Offset is missing"))?;
    let first = piece(&app, &request, payload)?;
    let upload = match found {
        Found::Open(upload) => {
            Room::of_spool(&app.blobs).check(declared_length(&request).unwrap_or_default())?;
            upload
        }
        Found::Stored(file) => {
            stands_at(offset, file.size)?;
            fits(&request, offset, file.size)?;
            return Ok(stored(&mut HttpResponse::NoContent(), &file));
        }
    };
    let expires_at = upload.wanted.expires_at;
    let held = app.uploads.hold(upload).await?;
    stands_at(offset, held.offset())?;
    fits(&request, offset, held.upload.wanted.length)?;
    let advanced = advance(&app, &caller, held, Some(first)).await?;
    Ok(advanced.tell(&mut HttpResponse::NoContent(), expires_at))
}

/// `DELETE files/tus/{id}`; of a finished one, its file goes.
pub async fn terminate(
    app: web::Data<App>,
    caller: Caller,
    request: HttpRequest,
    id: web::Path<String>,
) -> Result<HttpResponse, Problem> {
    let found = find(&app, &caller, parse_id(&id)?.0)?;
    speaks_tus(&request)?;
    match found {
        Found::Open(upload) => {
            app.uploads.hold(upload).await?.end().await?;
            Ok(HttpResponse::NoContent().finish())
        }
        Found::Stored(file) => {
            let position = files::remove(&app, &caller, file.file_id).await?;
            Ok(at_position(HttpResponse::NoContent().finish(), position))
        }
    }
}

/// `POST files/tus/{id}` with `X-HTTP-Method-Override`
pub async fn overridden(
    app: web::Data<App>,
    caller: Caller,
    request: HttpRequest,
    id: web::Path<String>,
    payload: web::Payload,
) -> Result<HttpResponse, Problem> {
    find(&app, &caller, parse_id(&id)?.0)?;
    match text(&request, OVERRIDE) {
        Some("PATCH") => append(app, caller, request, id, payload).await,
        Some("DELETE") => terminate(app, caller, request, id).await,
        _ => Err(malformed("X-HTTP-Method-Override must be PATCH or DELETE")),
    }
}

/// Whether a request to the address of an upload sends a piece of it, also for a client that knows
/// only POST.
pub fn is_patch(request: &HttpRequest) -> bool {
    match *request.method() {
        Method::PATCH => true,
        Method::POST => text(request, OVERRIDE) == Some("PATCH"),
        _ => false,
    }
}

/// What the address of an upload stands for.
enum Found {
    Open(std::sync::Arc<uploads::Upload>),
    Stored(Box<FileRow>),
}

/// The caller's own; another's is not there.
fn find(app: &App, caller: &Caller, id: Uuid) -> Result<Found, Problem> {
    let open = app.uploads.find(id, app.system.clock.now());
    match open.filter(|upload| upload.wanted.user_id == caller.user_id) {
        Some(upload) => Ok(Found::Open(upload)),
        None => Ok(Found::Stored(Box::new(files::owned(app, caller, FileId(id))?))),
    }
}

type Piece = (Body, Option<Checksum>);

/// How far an upload is.
struct Advanced {
    offset: u64,
    /// Where in the log its file lies, once it is stored.
    stored: Option<(Uuid, u64)>,
}

impl Advanced {
    fn tell(self, response: &mut HttpResponseBuilder, expires_at: DateTime<Utc>) -> HttpResponse {
        response.insert_header(("Upload-Offset", self.offset.to_string()));
        match self.stored {
            Some((id, position)) => response
                .insert_header(("X-File-Id", id.to_string()))
                .insert_header(("X-Log-Position", position.to_string())),
            None => {
                let date = HttpDate::from(SystemTime::from(expires_at)).to_string();
                response.insert_header(("Upload-Expires", date))
            }
        };
        response.finish()
    }
}

fn stored(response: &mut HttpResponseBuilder, file: &FileRow) -> HttpResponse {
    response
        .insert_header(("Upload-Offset", file.size.to_string()))
        .insert_header(("Upload-Length", file.size.to_string()))
        .insert_header(("X-File-Id", file.file_id.to_string()))
        .insert_header(("X-Log-Position", file.position.to_string()))
        .finish()
}

/// Ends an upload that nobody knows of, if it is open.
async fn forget(app: web::Data<App>, id: Uuid) {
    let Some(upload) = app.uploads.find(id, app.system.clock.now()) else { return };
    if let Ok(held) = app.uploads.hold(upload).await {
        end_unknown(held).await;
    }
}

/// Begins an upload and takes in what came with the request. If that fails, the upload stays only
/// if its address is `known` by the client's key: who was not told it will not come again.
async fn begin(
    app: web::Data<App>,
    caller: Caller,
    begun: Begun,
    wanted: Wanted,
    room: Reservation,
    first: Option<Piece>,
    known: bool,
) -> Result<Advanced, Problem> {
    let id = wanted.id;
    begun.create(wanted, room).await?;
    let upload = app.uploads.find(id, app.system.clock.now());
    let upload = upload.ok_or_else(|| Problem::new(Code::NotFound))?;
    let mut held = app.uploads.hold(upload).await?;
    let taken = take_in(&app, &caller, &mut held, first).await;
    settle(&app, held, taken, known).await
}

/// Takes in a piece, and stores the file if it was the last one.
async fn advance(
    app: &web::Data<App>,
    caller: &Caller,
    mut held: Held,
    piece: Option<Piece>,
) -> Result<Advanced, Problem> {
    let (app, caller) = (app.clone(), caller.clone());
    to_the_end(async move {
        let taken = take_in(&app, &caller, &mut held, piece).await;
        settle(&app, held, taken, true).await
    })
    .await
}

async fn take_in(
    app: &App,
    caller: &Caller,
    held: &mut Held,
    piece: Option<Piece>,
) -> Result<Advanced, Problem> {
    // One that is sealed waits only for its event.
    if let Some((body, checksum)) = piece.filter(|_| !held.is_sealed()) {
        let appended = held.append(body, checksum).await?;
        match appended.ended {
            Ended::Whole => {}
            Ended::BrokenOff(error) => return Err(error.into()),
            Ended::Hurried => return Err(Problem::new(Code::UploadBusy)),
            Ended::TooLong => return Err(too_long(held.upload.wanted.length)),
            Ended::Corrupted => return Err(Problem::new(Code::ChecksumMismatch)),
        }
    }
    let offset = held.offset();
    if !held.is_full() {
        return Ok(Advanced { offset, stored: None });
    }
    let position = store(app, caller, held).await?;
    Ok(Advanced { offset, stored: Some((held.upload.wanted.id, position)) })
}

/// Ends an upload for which nothing more will come: it is stored, or cannot be, or its address is
/// not `known` to anybody.
async fn settle(
    app: &App,
    held: Held,
    taken: Result<Advanced, Problem>,
    known: bool,
) -> Result<Advanced, Problem> {
    let stored = taken.as_ref().ok().and_then(|advanced| advanced.stored);
    if let Some((_, position)) = stored
        && let Err(late) = app.system.visible_in(View::Files, position).await
    {
        // Until the file itself counts, what is reserved for it must. Who comes again finds it.
        if !known {
            files::once_shown(app, position, end_unknown(held));
        }
        return Err(late.into());
    }
    match &taken {
        Ok(_) if stored.is_some() => held.end().await?,
        Ok(_) => {}
        Err(_) if !known => end_unknown(held).await,
        // Its bytes are lost, or its file was stored and deleted: it will never be another one.
        Err(problem) => {
            if [Code::NotFound, Code::IdempotencyKeyReused].contains(&problem.code()) {
                held.end().await?;
            }
        }
    }
    taken
}

async fn end_unknown(held: Held) {
    if let Err(error) = held.end().await {
        tracing::warn!(%error, "an upload that nobody knows of was left to expire");
    }
}

/// The way of every upload: the bytes are durable, then there is an event.
async fn store(app: &App, caller: &Caller, held: &mut Held) -> Result<u64, Problem> {
    let blob = held.store().await?;
    let wanted = &held.upload.wanted;
    let declared = wanted.declared_type.as_ref().and_then(|it| it.parse::<mime::Mime>().ok());
    let upload = upload::Upload {
        filename: wanted.filename.clone(),
        content_type: upload::content_type(blob.sniffed.as_deref(), declared.as_ref()),
        declared_type: wanted.declared_type.clone(),
        size: blob.size,
        sha256: blob.sha256.clone(),
        metadata: wanted.metadata.clone(),
    };
    // What a repetition after a crash must find again.
    let fingerprint = Some(blob.sha256);
    let recorded = files::record(app, caller, FileId(wanted.id), upload, fingerprint).await?;
    Ok(recorded.position)
}

/// The answer to a creation that was made before with the same key.
async fn again(app: &App, found: &Found, wanted: &Wanted) -> Result<HttpResponse, Problem> {
    let same = match found {
        Found::Open(upload) => {
            upload.wanted.length == wanted.length && upload.wanted.described == wanted.described
        }
        Found::Stored(file) => file.size == wanted.length && file.filename == wanted.filename,
    };
    if !same {
        return Err(Problem::new(Code::IdempotencyKeyReused));
    }
    let mut response = HttpResponse::Created();
    response.insert_header((header::LOCATION, location(app, wanted.id)));
    let response = match found {
        Found::Stored(file) => stored(&mut response, file),
        Found::Open(upload) => {
            let expires_at = upload.wanted.expires_at;
            let held = app.uploads.hold(std::sync::Arc::clone(upload)).await?;
            Advanced { offset: held.offset(), stored: None }.tell(&mut response, expires_at)
        }
    };
    Ok(replayed(response, true))
}

/// Without scheme and host, so that it holds behind whatever the client came through.
fn location(app: &App, id: Uuid) -> String {
    let url = url::Url::parse(&app.public_url);
    let above = url.as_ref().map(|url| url.path().trim_end_matches('/')).unwrap_or_default();
    format!("{above}/api/v1/files/tus/{id}")
}

fn speaks_tus(request: &HttpRequest) -> Result<(), Problem> {
    if text(request, "tus-resumable") == Some(VERSION) {
        return Ok(());
    }
    let version = HeaderName::from_static("tus-version");
    Err(Problem::new(Code::PreconditionFailed)
        .with_sentence(format!("This is tus {VERSION}: send it as Tus-Resumable"))
        .with_header(version, HeaderValue::from_static(VERSION)))
}

fn length(request: &HttpRequest) -> Result<u64, Problem> {
    if request.headers().contains_key("upload-defer-length") {
        return Err(malformed("Upload-Defer-Length is not supported: send Upload-Length"));
    }
    number(request, "upload-length")?.ok_or_else(|| malformed("Upload-Length is missing"))
}

fn is_piece(request: &HttpRequest) -> bool {
    text(request, "content-type").is_some_and(|kind| kind.eq_ignore_ascii_case(PIECE))
}

fn piece(app: &App, request: &HttpRequest, payload: web::Payload) -> Result<Piece, Problem> {
    let silence = BodyLimits::of(request).silence;
    Ok((body::body(payload, silence, app.last_pieces.clone()), checksum(request)?))
}

fn checksum(request: &HttpRequest) -> Result<Option<Checksum>, Problem> {
    let Some(header) = request.headers().get("upload-checksum") else { return Ok(None) };
    let (name, digest) = header.to_str().ok().and_then(|it| it.split_once(' ')).unwrap_or_default();
    let algorithm = Algorithm::parse(name).ok_or_else(|| {
        malformed("Upload-Checksum must name sha1 or sha256, and then the digest in Base64")
    })?;
    let digest = STANDARD.decode(digest.trim());
    let digest = digest.map_err(|_| malformed("The digest in Upload-Checksum is not Base64"))?;
    Ok(Some(Checksum { algorithm, digest }))
}

/// Refuses a piece by its declared length, before any of it is read.
fn fits(request: &HttpRequest, offset: u64, length: u64) -> Result<(), Problem> {
    let declared = declared_length(request).unwrap_or_default();
    match offset.checked_add(declared) {
        Some(end) if end <= length => Ok(()),
        _ => Err(too_long(length)),
    }
}

fn too_long(length: u64) -> Problem {
    Problem::new(Code::PayloadTooLarge)
        .with_sentence("The piece goes beyond the length that the upload was begun with")
        .with_detail(json!({ "upload_length": length }))
}

fn too_many(open: usize) -> Problem {
    Problem::new(Code::QuotaExceeded)
        .with_sentence("Too many uploads are open: finish one of them, or end it, before the next")
        .with_detail(json!({ "open": open, "limit": MOST_OPEN }))
}

fn stands_at(claimed: u64, offset: u64) -> Result<(), Problem> {
    match claimed == offset {
        true => Ok(()),
        false => {
            Err(Problem::new(Code::UploadOffsetMismatch).with_detail(json!({ "offset": offset })))
        }
    }
}

fn number(request: &HttpRequest, name: &str) -> Result<Option<u64>, Problem> {
    let Some(value) = request.headers().get(name) else { return Ok(None) };
    let digits = value.to_str().ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
    let number = digits.and_then(|digits| digits.parse().ok());
    number
        .map(Some)
        .ok_or_else(|| malformed(&format!("The header {name} is not a number of bytes")))
}

fn text<'a>(request: &'a HttpRequest, name: &str) -> Option<&'a str> {
    request.headers().get(name)?.to_str().ok().map(str::trim)
}

fn malformed(sentence: &str) -> Problem {
    Problem::new(Code::MalformedRequest).with_sentence(sentence.to_owned())
}

fn wanted(
    app: &App,
    caller: &Caller,
    id: Uuid,
    length: u64,
    request: &HttpRequest,
) -> Result<Wanted, Problem> {
    let described = match request.headers().get("upload-metadata") {
        Some(header) => header.to_str().map_err(|_| bad_metadata("is not ASCII"))?,
        None => "",
    };
    let mut pairs = pairs(described)?;
    let mut take = |names: [&str; 2]| {
        let at = pairs.iter().position(|(key, _)| names.contains(&key.as_str()))?;
        Some(pairs.remove(at).1)
    };
    let filename = take(["filename", "name"]).unwrap_or_default();
    let declared_type = take(["filetype", "type"]).filter(|kind| !kind.is_empty());
    Ok(Wanted {
        id,
        user_id: caller.user_id.clone(),
        length,
        filename: upload::sanitised(&filename),
        declared_type,
        metadata: pairs.into_iter().map(|(key, value)| (key, value.into())).collect(),
        described: described.to_owned(),
        expires_at: app.system.clock.now() + app.upload_lifetime,
        whole: None,
    })
}

impl From<uploads::Error> for Problem {
    fn from(error: uploads::Error) -> Self {
        match error {
            uploads::Error::Busy => Self::new(Code::UploadBusy),
            uploads::Error::Full => room::full(),
            uploads::Error::Gone => Self::new(Code::NotFound),
            uploads::Error::Blobs(error) => error.into(),
            uploads::Error::Io(error) => Self::new(Code::StorageUnavailable).caused_by(error),
        }
    }
}
