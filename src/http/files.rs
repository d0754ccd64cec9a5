//! The caller's files: upload, list, show, delete.

use actix_web::{HttpRequest, HttpResponse, web};
use serde::Serialize;
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::app::App;
use super::caller::Caller;
use super::jobs::{at_position, fingerprint, idempotency_key, replayed};
use super::lists::{PageAnswer, PageQuery};
use super::problem::{Code, Problem};
use super::{answer, upload};
use crate::domain::file::{Command, File, Stored};
use crate::domain::ids::{FileId, derived_id};
use crate::domain::text::Personal;
use crate::views::FileRow;

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

/// `POST files/upload`
pub async fn store(
    app: web::Data<App>,
    caller: Caller,
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse, Problem> {
    let key = idempotency_key(&request)?;
    let received = upload::receive(&request, payload, &app.blobs, app.max_upload_bytes).await?;
    let file_id = FileId(match &key {
        Some(key) => derived_id(&caller.user_id, "file", key),
        None => app.system.clock.fresh_id(),
    });
    let fingerprint =
        key.map(|_| fingerprint(&json!([received.filename, received.sha256, received.metadata])));
    let command = Command::Store(Stored {
        user_id: caller.user_id.clone(),
        filename: Personal(received.filename),
        content_type: received.content_type,
        size: received.size,
        sha256: received.sha256,
        metadata: Personal(received.metadata),
        job_id: None,
        fingerprint,
    });
    let done = app.system.files.execute(file_id, command, caller.origin()).await?;
    app.system.visible(done.position).await?;
    let row = owned(&app, &caller, file_id)?;
    let response = at_position(answer::ok(UploadAnswer::from(row)), done.position);
    Ok(replayed(response, done.events.is_empty()))
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
    let command = Command::Delete { by: caller.user_id.clone() };
    let done = app.system.files.execute(file_id, command, caller.origin()).await?;
    debug_assert_eq!(done.state, File::Deleted);
    app.system.visible(done.position).await?;
    Ok(at_position(answer::ok(json!({ "file_id": file_id, "deleted": true })), done.position))
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
