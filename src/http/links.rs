//! Signed links: making them for the owner, and serving whoever holds one.

use actix_web::{HttpRequest, HttpResponse, web};
use chrono::{DateTime, Utc};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::app::App;
use super::caller::{Caller, wait_for_position};
use super::files::{owned, parse_id};
use super::json::{Fields, FromFields, OptionalJson};
use super::problem::{Code, Problem};
use super::ranges::{ServedFile, serve};
use super::{answer, jobs};
use crate::domain::ids::{FileId, UserId};
use crate::media::blobs;

/// An hour.
const DEFAULT_S: u64 = 3600;
/// Seven days.
const MAX_S: u64 = 7 * 24 * 3600;

/// The body of a request for a link.
#[derive(Debug, utoipa::ToSchema)]
pub struct LinkRequest {
    /// Seconds; an hour if absent.
    pub expires_in: Option<u64>,
}

impl FromFields for LinkRequest {
    fn from_fields(fields: &mut Fields) -> Self {
        fields.alias("expiresIn", "expires_in");
        Self { expires_in: fields.optional_u64("expires_in", 1..=MAX_S) }
    }
}

impl LinkRequest {
    fn lifetime_s(&self) -> i64 {
        i64::try_from(self.expires_in.unwrap_or(DEFAULT_S)).unwrap_or_default()
    }
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct LinkAnswer {
    pub url: String,
    pub expires_at: DateTime<Utc>,
}

/// `POST files/{id}/signed-url`. No event: links are asked for at every render of a player.
pub async fn of_file(
    app: web::Data<App>,
    caller: Caller,
    id: web::Path<String>,
    body: OptionalJson<LinkRequest>,
) -> Result<HttpResponse, Problem> {
    let file_id = parse_id(&id)?;
    owned(&app, &caller, file_id)?;
    Ok(answer::ok(sign(&app, &caller.user_id, file_id, body.0.lifetime_s())))
}

/// `POST videos/{job_id}/signed-url`
pub async fn of_video(
    app: web::Data<App>,
    caller: Caller,
    id: web::Path<String>,
    body: OptionalJson<LinkRequest>,
) -> Result<HttpResponse, Problem> {
    let job = jobs::owned(&app, &caller, jobs::parse_id(&id)?)?;
    let Some(output) = &job.output else {
        let detail = json!({ "state": job.state, "status": job.status() });
        return Err(Problem::new(Code::JobNotCompleted).with_detail(detail));
    };
    owned(&app, &caller, output.file_id)?;
    Ok(answer::ok(sign(&app, &caller.user_id, output.file_id, body.0.lifetime_s())))
}

/// A link to a user's file that is good for so many seconds.
pub fn sign(app: &App, user_id: &UserId, file_id: FileId, lifetime_s: i64) -> LinkAnswer {
    let expires = app.system.clock.now().timestamp() + lifetime_s;
    let id = file_id.to_string();
    let signature = app.links.sign(&id, user_id.as_str(), expires);
    let user_id = url_encoded(user_id.as_str());
    let public_url = &app.public_url;
    LinkAnswer {
        url: format!(
            "{public_url}/api/files/secure/{id}?user_id={user_id}&expires={expires}&signature={signature}"
        ),
        expires_at: DateTime::from_timestamp(expires, 0).unwrap_or_default(),
    }
}

/// All but what RFC 3986 §2.3 calls unreserved.
const RESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

fn url_encoded(text: &str) -> String {
    utf8_percent_encode(text, RESERVED).to_string()
}

/// The query of a signed link; all of it is needed, and what is missing answered with 400.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
pub struct LinkQuery {
    /// Whose file it is.
    #[param(required = true)]
    user_id: Option<String>,
    /// Unix seconds.
    #[param(required = true, value_type = Option<i64>)]
    expires: Option<String>,
    /// Hex of HMAC-SHA256 over `{id}:{user_id}:{expires}`.
    #[param(required = true, value_type = Option<String>, pattern = "^[0-9a-fA-F]{64}$")]
    signature: Option<String>,
}

/// `GET|HEAD files/secure/{id}`; the order of the checks is the contract's.
pub async fn secure(
    app: web::Data<App>,
    request: HttpRequest,
    id: web::Path<String>,
) -> Result<HttpResponse, Problem> {
    let query = web::Query::<LinkQuery>::from_query(request.query_string())
        .map_err(|_| Problem::new(Code::LinkMalformed))?;
    let now = app.system.clock.now();
    let user_id = app.links.check(
        &id,
        query.user_id.as_deref(),
        query.expires.as_deref(),
        query.signature.as_deref(),
        now.timestamp(),
    )?;
    let file_id = parse_id(&id)?;
    wait_for_position(&app, &request).await?;
    let row = app.system.views.file(&file_id)?.filter(|row| row.user_id.as_str() == user_id);
    let row = row.ok_or_else(|| Problem::new(Code::NotFound))?;
    let gone = app.system.views.user_standing(&row.user_id).is_some_and(|user| user.deleted);
    if gone {
        return Err(Problem::new(Code::NotFound));
    }
    let file = ServedFile {
        sha256: row.sha256.clone(),
        size: row.size,
        content_type: row.content_type,
        filename: row.filename,
        modified: Some(row.created_at.timestamp()),
    };
    let read = async |range| app.blobs.begin_range(&row.sha256, range).await.map_err(unreadable);
    serve(&request, &file, read).await
}

/// Of a file that is there: its owner has lost nothing by asking for what is not to be found.
fn unreadable(error: blobs::Error) -> Problem {
    Problem::new(Code::StorageUnavailable).caused_by(error)
}
