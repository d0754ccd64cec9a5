//! The caller's files: upload, list, show, delete.

use std::time::Duration;

use actix_web::{HttpRequest, HttpResponse, web};
use serde::Serialize;
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::answer;
use super::app::App;
use super::caller::Caller;
use super::jobs::{at_position, fingerprint, idempotency_key, replayed};
use super::lists::{PageAnswer, PageQuery};
use super::problem::{Code, Problem};
use super::quota::Allowance;
use super::upload::{self, MAX_METADATA_BYTES, Most};
use crate::domain::file::{Command, File, Stored};
use crate::domain::ids::{FileId, derived_id};
use crate::domain::text::Personal;
use crate::views::{FileRow, View};

/// A file as its owner sees it.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct FileAnswer {
    pub file_id: Uuid,
    pub filename: String,
    pub content_type: String,
    /// In bytes.
    pub size: u64,
    pub sha256: String,
    #[schema(value_type = Object)]
    pub metadata: Map<String, Value>,
    /// The job that made it, if one did.
    pub job_id: Option<Uuid>,
    pub created_at: chrono::DateTime<chrono::Utc>,
}

impl From<FileRow> for FileAnswer {
    fn from(row: FileRow) -> Self {
        Self {
            file_id: row.file_id.0,
            filename: row.filename,
            content_type: row.content_type,
            size: row.size,
            sha256: row.sha256,
            metadata: row.metadata,
            job_id: row.job_id.map(|id| id.0),
            created_at: row.created_at,
        }
    }
}

/// The form of `POST files/upload`; fields with other names, 32 at most and together 16 KiB of JSON,
/// become the file's `metadata`.
#[derive(Debug, utoipa::ToSchema)]
#[allow(dead_code, reason = "it describes the form, which is read as it comes")]
pub struct UploadForm {
    #[schema(value_type = String, format = Binary)]
    pub file: Vec<u8>,
}

/// The answer to an upload (CONTRACT §3); the rest is at `GET files/{id}`.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct UploadAnswer {
    pub file_id: Uuid,
    pub filename: String,
    pub content_type: String,
    /// In bytes.
    pub size: u64,
    pub sha256: String,
    pub created_at: chrono::DateTime<chrono::Utc>,
}

impl From<FileRow> for UploadAnswer {
    fn from(row: FileRow) -> Self {
        Self {
            file_id: row.file_id.0,
            filename: row.filename,
            content_type: row.content_type,
            size: row.size,
            sha256: row.sha256,
            created_at: row.created_at,
        }
    }
}

/// The answer when a file was deleted.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct FileDeleted {
    pub file_id: Uuid,
    pub deleted: bool,
}

/// `POST files/upload`
pub async fn store(
    app: web::Data<App>,
    caller: Caller,
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse, Problem> {
    let key = idempotency_key(&request)?;
    let file_id = FileId(match &key {
        Some(key) => derived_id(&caller.user_id, "file", key),
        None => app.system.clock.fresh_id(),
    });
    let mut allowance = allowance(&app, &caller, file_id)?;
    let most = Most { file: app.max_upload_bytes, fields: MAX_METADATA_BYTES };
    let received = upload::receive(&request, payload, &app.blobs, most, &mut allowance).await?;
    let fingerprint =
        key.map(|_| fingerprint(&json!([received.filename, received.sha256, received.metadata])));
    let kept = record(&app, &caller, file_id, received, fingerprint).await?;
    if let Err(late) = app.system.visible_in(View::Files, kept.position).await {
        // Until the file itself counts, its reservation must.
        once_shown(&app, kept.position, async move { drop(allowance) });
        return Err(late.into());
    }
    let row = owned(&app, &caller, file_id)?;
    let response = at_position(answer::ok(UploadAnswer::from(row)), kept.position);
    Ok(replayed(response, !kept.is_new))
}

/// What an upload may take up; one that comes again takes up nothing more than its file does.
///
/// # Errors
/// The read model cannot be read.
pub fn allowance(app: &App, caller: &Caller, file_id: FileId) -> Result<Allowance, Problem> {
    let known = app.system.views.file(&file_id)?.filter(|row| row.user_id == caller.user_id);
    Ok(match known {
        Some(file) => Allowance::again(file.size),
        None => app.quotas.allowance(app, caller),
    })
}

/// The longest that a reservation outlives its upload.
const AT_LAST: Duration = Duration::from_secs(3600);

/// Does that once files can be read up to a position, also where their view is parked until then.
pub fn once_shown(app: &App, position: u64, then: impl Future<Output = ()> + 'static) {
    let progress = app.system.progress.clone();
    actix_web::rt::spawn(async move {
        let _ = progress.shown(position, View::Files, AT_LAST).await;
        then.await;
    });
}

/// A file that is in the log.
#[derive(Debug, Clone, Copy)]
pub struct Recorded {
    pub position: u64,
    /// Not recorded before.
    pub is_new: bool,
}

/// Records an upload, whose bytes are durable, as a file.
///
/// # Errors
/// What the file's stream refuses, or that the log cannot be written.
pub async fn record(
    app: &App,
    caller: &Caller,
    file_id: FileId,
    upload: upload::Upload,
    fingerprint: Option<String>,
) -> Result<Recorded, Problem> {
    let command = Command::Store(Stored {
        user_id: caller.user_id.clone(),
        filename: Personal::Known(upload.filename),
        content_type: upload.content_type,
        size: upload.size,
        sha256: upload.sha256,
        metadata: Personal::Known(upload.metadata),
        job_id: None,
        fingerprint,
    });
    let done = app.system.files.execute(file_id, command, caller.origin()).await?;
    Ok(Recorded { position: done.position, is_new: !done.events.is_empty() })
}

/// `GET files`
pub async fn list(
    app: web::Data<App>,
    caller: Caller,
    page: PageQuery,
) -> Result<HttpResponse, Problem> {
    let found = app.system.views.files(&caller.user_id, page.cursor.as_ref(), page.limit)?;
    let items: Vec<FileAnswer> = found.items.into_iter().map(FileAnswer::from).collect();
    Ok(answer::ok(PageAnswer { items, next_cursor: found.next_cursor }))
}

/// `GET files/{id}`
pub async fn show(
    app: web::Data<App>,
    caller: Caller,
    id: web::Path<String>,
) -> Result<HttpResponse, Problem> {
    let row = owned(&app, &caller, parse_id(&id)?)?;
    Ok(answer::ok(FileAnswer::from(row)))
}

/// `DELETE files/{id}`
pub async fn delete(
    app: web::Data<App>,
    caller: Caller,
    id: web::Path<String>,
) -> Result<HttpResponse, Problem> {
    let file_id = parse_id(&id)?;
    owned(&app, &caller, file_id)?;
    let position = remove(&app, &caller, file_id).await?;
    Ok(at_position(answer::ok(FileDeleted { file_id: file_id.0, deleted: true }), position))
}

/// Deletes a file of the caller's and says where in the log that is.
///
/// # Errors
/// As those of every command.
pub async fn remove(app: &App, caller: &Caller, file_id: FileId) -> Result<u64, Problem> {
    let command = Command::Delete { by: caller.user_id.clone() };
    let done = app.system.files.execute(file_id, command, caller.origin()).await?;
    debug_assert_eq!(done.state, File::Deleted);
    app.system.visible_in(View::Files, done.position).await?;
    Ok(done.position)
}

/// The file, if it is there and the caller's: the two are never told apart.
pub fn owned(app: &App, caller: &Caller, id: FileId) -> Result<FileRow, Problem> {
    let row = app.system.views.file(&id)?.filter(|row| row.user_id == caller.user_id);
    row.ok_or_else(|| Problem::new(Code::NotFound))
}

/// What is no UUID is no file.
pub fn parse_id(text: &str) -> Result<FileId, Problem> {
    Uuid::try_parse(text).map(FileId).map_err(|_| Problem::new(Code::NotFound))
}
