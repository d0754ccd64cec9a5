//! The lease protocol (CONTRACT §3): how remote workers take jobs, report on them and hand in what
//! they made. What a lease allows is decided by [`crate::actors::leasing`].

use std::time::Duration;

use actix_web::http::header;
use actix_web::{HttpRequest, HttpResponse, web};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use chrono::{DateTime, Utc};
use futures_util::StreamExt;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;

use super::app::App;
use super::body::{BodyLimits, declared_length, payload_problem, too_large, unstalled};
use super::edges::RequestId;
use super::jobs::{OutputAnswer, at_position};
use super::json::{Fields, FromFields, Json};
use super::links::{LinkAnswer, sign};
use super::problem::{Code, Problem};
use super::{answer, jobs};
use crate::actors::codec::Metadata;
use crate::actors::leasing::{Completed, Done, Leased, Report, Shape, by};
use crate::actors::outputs::{Handed, Slot, slots};
use crate::config::Secret;
use crate::domain::ids::{JobId, LeaseId};
use crate::domain::job::{Kind, Options, Output, Request};
use crate::domain::translation::Format;
use crate::media::blobs::Stored;
use crate::media::renderer::{self, output::TextCheck};

mod tokens;

pub use tokens::{WorkerTokens, guard};

/// The longest that one call waits for a job, in seconds, and the longest that a worker may ask for.
const LONGEST_WAIT_S: u64 = 30;
const LONGEST_WAIT_ASKED_S: u64 = 3600;
/// Characters that are kept of what a worker says went wrong, and that it may say.
const ERROR_KEPT: usize = 1000;
const LONGEST_ERROR: usize = 16_384;
/// How long a worker may fetch the source of its job: longer than any attempt.
const SOURCE_LINK_S: i64 = 2 * 3600;
/// The actor of what is done under a lease that nobody holds any more.
const UNKNOWN: &str = "worker";

/// The body of `POST worker/lease`.
#[derive(Debug, utoipa::ToSchema)]
pub struct LeaseRequest {
    /// Shown to administrators.
    #[schema(pattern = r"^[^\x00-\x1f\x7f-\x9f]*$")]
    pub worker_id: String,
    /// The kinds of jobs it can do.
    #[schema(schema_with = jobs::some_kinds)]
    pub kinds: Vec<String>,
    /// How many seconds to wait for a job; 0 if absent.
    pub wait_s: Option<u64>,
}

impl FromFields for LeaseRequest {
    fn from_fields(fields: &mut Fields) -> Self {
        let worker_id = fields.text("worker_id", 1..=128);
        if worker_id.chars().any(char::is_control) {
            fields.refuse("worker_id", "must not contain control characters");
        }
        let kinds = fields.optional_texts("kinds", 1..=16, 1..=64).unwrap_or_else(|| {
            fields.refuse("kinds", "is required");
            Vec::new()
        });
        if kinds.iter().any(|name| kind(name).is_none()) {
            let names: Vec<_> = Kind::ALL.iter().map(|kind| kind.as_str()).collect();
            fields.refuse("kinds", format!("must be of {}", names.join(", ")));
        }
        let wait_s = fields.optional_u64("wait_s", 0..=LONGEST_WAIT_ASKED_S);
        Self { worker_id, kinds, wait_s: wait_s.map(|asked| asked.min(LONGEST_WAIT_S)) }
    }
}

fn kind(name: &str) -> Option<Kind> {
    Kind::ALL.into_iter().find(|kind| kind.as_str() == name)
}

/// A job in the hands of a worker. It may hold a secret, so that it is not shown for debugging.
#[derive(Serialize, utoipa::ToSchema)]
pub struct LeaseAnswer {
    /// Every further call names it.
    pub lease_id: Uuid,
    pub job_id: Uuid,
    /// The id of the request that the job came from: sent as `X-Request-Id` with the calls under this
    /// lease, it makes them part of what that request brought about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    pub kind: &'static str,
    /// From 1.
    pub attempt: u32,
    /// Progress before then keeps the lease.
    pub expires_at: DateTime<Utc>,
    pub prompt: String,
    #[schema(value_type = Object)]
    pub options: Value,
    /// Where the file lies that the job works on, if there is one.
    pub source: Option<LinkAnswer>,
    pub outputs: Vec<OutputWanted>,
    /// The secret that came with the job; for its engine alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api_key: Option<String>,
}

/// What a worker may hand in; the first one it must.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct OutputWanted {
    pub name: &'static str,
    /// Media types, comma separated.
    pub content_types: String,
}

impl LeaseAnswer {
    fn new(app: &App, leased: Leased, api_key: Option<&Secret>) -> Self {
        let request_id = leased.request_id().map(str::to_owned);
        let request = leased.request;
        let source = request.options.source_file_id();
        let wanted = |slot: &Slot| OutputWanted { name: slot.name, content_types: slot.types() };
        Self {
            lease_id: leased.lease_id.0,
            job_id: leased.job_id.0,
            request_id,
            kind: request.kind.as_str(),
            attempt: leased.attempt,
            expires_at: leased.expires_at,
            prompt: request.prompt_text().to_owned(),
            options: json!(request.options),
            source: source.map(|id| sign(app, &request.user_id, id, SOURCE_LINK_S)),
            outputs: slots(request.kind).iter().map(wanted).collect(),
            api_key: api_key.map(|key| key.reveal().to_owned()),
        }
    }
}

/// What the events of a worker's call say of their origin. Of a call that names no request, all that
/// comes of it bears the id of the request that the job goes back to.
fn origin(worker_id: &str, request_id: &RequestId) -> Metadata {
    let given = request_id.is_given.then(|| request_id.id.clone());
    Metadata { correlation_id: given.unwrap_or_default(), ..by(worker_id) }
}

/// The same, by the worker that holds the lease.
async fn origin_under(
    app: &App,
    job_id: JobId,
    lease_id: LeaseId,
    request_id: &RequestId,
) -> Metadata {
    match app.leasing.holder(job_id, lease_id).await {
        Some((worker_id, last)) => origin(&worker_id, request_id).after(&last),
        None => origin(UNKNOWN, request_id),
    }
}

/// An answer bears the id that the events bear.
fn bearing(mut response: HttpResponse, id: &str) -> HttpResponse {
    if !id.is_empty() {
        let request_id = RequestId { id: id.to_owned(), is_given: false };
        response.extensions_mut().insert(request_id);
    }
    response
}

/// `POST worker/lease`
pub async fn lease(
    app: web::Data<App>,
    request_id: RequestId,
    body: Json<LeaseRequest>,
) -> Result<HttpResponse, Problem> {
    let kinds: Vec<Kind> = body.0.kinds.iter().filter_map(|name| kind(name)).collect();
    let wait = Duration::from_secs(body.0.wait_s.unwrap_or(0));
    let stopping = app.stopping.clone();
    let origin = origin(&body.0.worker_id, &request_id);
    let leased = app.leasing.lease_within(&origin, &kinds, wait, stopping).await?;
    let Some(leased) = leased else { return Ok(HttpResponse::NoContent().finish()) };
    let id = match request_id.is_given {
        true => request_id.id,
        false => leased.last.correlation_id.clone(),
    };
    let given = give(&app, &origin, leased).await;
    Ok(bearing(given.unwrap_or_else(HttpResponse::from_error), &id))
}

/// The answer with a job, and with its secret if it needs one; a job without it is failed instead.
async fn give(app: &App, origin: &Metadata, leased: Leased) -> Result<HttpResponse, Problem> {
    let position = leased.position;
    let given = |leased, key: Option<&Secret>| {
        at_position(answer::ok(LeaseAnswer::new(app, leased, key)), position)
    };
    if !leased.request.options.needs_secret() {
        return Ok(given(leased, None));
    }
    let (error, retryable, answer) = match app.secrets.of_job(leased.job_id).await {
        Ok(Some(key)) => return Ok(given(leased, Some(&key))),
        Ok(None) => {
            let nothing = HttpResponse::NoContent().finish();
            ("the job's secret was destroyed", false, Ok(nothing))
        }
        Err(error) => {
            let problem = Problem::new(Code::StorageUnavailable).caused_by(error);
            ("the job's secret could not be opened", true, Err(problem))
        }
    };
    // Nobody can work on it.
    let (job_id, lease_id) = (leased.job_id, leased.lease_id);
    app.leasing.fail(job_id, lease_id, origin, error.to_owned(), retryable).await?;
    answer
}

/// The body of `POST worker/jobs/{id}/progress`.
#[derive(Debug, utoipa::ToSchema)]
pub struct ProgressRequest {
    pub lease_id: Uuid,
    /// Percent; what is below the last one counts as that.
    pub progress: f64,
    /// For the user.
    pub message: Option<String>,
}

impl FromFields for ProgressRequest {
    fn from_fields(fields: &mut Fields) -> Self {
        let lease_id = lease_id(fields);
        let progress = fields.optional_f64("progress", 0.0..=100.0).unwrap_or_else(|| {
            fields.refuse("progress", "is required");
            0.0
        });
        Self { lease_id, progress, message: fields.optional_text("message", 1..=200) }
    }
}

fn lease_id(fields: &mut Fields) -> Uuid {
    fields.optional_uuid("lease_id").unwrap_or_else(|| {
        fields.refuse("lease_id", "is required");
        Uuid::nil()
    })
}

/// What a worker is told when it reports.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct ReportAnswer {
    /// The job is to be stopped: end it with `fail`.
    pub cancelled: bool,
    /// Of the lease.
    pub expires_at: DateTime<Utc>,
}

/// `POST worker/jobs/{id}/progress`
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
pub async fn progress(
    app: web::Data<App>,
    request_id: RequestId,
    id: web::Path<String>,
    body: Json<ProgressRequest>,
) -> Result<HttpResponse, Problem> {
    let (job_id, lease_id) = (jobs::parse_id(&id)?, LeaseId(body.0.lease_id));
    // Within 0 to 100, so that nothing is cut off.
    let percent = body.0.progress as u8;
    let origin = origin_under(&app, job_id, lease_id, &request_id).await;
    let message = body.0.message;
    let done = app.leasing.progress(job_id, lease_id, &origin, percent, message).await?;
    let Report { cancelled, expires_at } = done.outcome;
    // Also where it cannot be read yet: whoever hears that his lease was not renewed throws away
    // what he has made.
    let told = at_position(answer::ok(ReportAnswer { cancelled, expires_at }), done.position);
    Ok(bearing(told, &origin.correlation_id))
}

/// The query of `PUT worker/jobs/{id}/output`.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
pub struct OutputQuery {
    #[param(required = true, value_type = Option<Uuid>)]
    lease_id: Option<String>,
    /// One of the lease's `outputs`; the first if absent.
    name: Option<String>,
}

/// What was handed in.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct HandedAnswer {
    pub name: &'static str,
    pub content_type: String,
    /// In bytes.
    pub size: u64,
    pub sha256: String,
}

/// `PUT worker/jobs/{id}/output`: the bytes themselves.
pub async fn output(
    app: web::Data<App>,
    request: HttpRequest,
    id: web::Path<String>,
    query: web::Query<OutputQuery>,
    payload: web::Payload,
) -> Result<HttpResponse, Problem> {
    let job_id = jobs::parse_id(&id)?;
    let lease_id = query.lease_id.as_deref().and_then(|text| Uuid::try_parse(text).ok());
    let lease_id = LeaseId(lease_id.ok_or_else(|| Problem::field("lease_id", "must be a UUID"))?);
    let (held, _) = app.leasing.hold(job_id, lease_id).await?;
    let slot = slot(held.kind, query.name.as_deref())?;
    let digest = declared_digest(&request)?;
    let declared = declared_type(&request, slot)?;
    let stored = receive(&app, &request, payload).await?;
    if digest.is_some_and(|digest| hex::encode(digest) != stored.sha256) {
        return Err(Problem::new(Code::MalformedRequest)
            .with_sentence("The bytes do not have the digest that Content-Digest tells"));
    }
    let shown = real_type(&app, &stored, &held.options).await?;
    let content_type = match (&held.options, shown) {
        (Options::Video(_), None) => slot.unshown(declared.as_deref()).map(str::to_owned),
        // What a text does not show it is not.
        (_, shown) => shown,
    };
    let fits = content_type.as_deref().filter(|name| slot.filename(name).is_some());
    let fits = fits.filter(|name| declared.as_deref().is_none_or(|declared| declared == *name));
    let content_type = fits.ok_or_else(|| wrong_type(slot))?.to_owned();
    let handed = Handed { content_type, size: stored.size, sha256: stored.sha256 };
    app.leasing.hand_in(job_id, lease_id, slot, &handed).await?;
    let Handed { content_type, size, sha256 } = handed;
    Ok(answer::ok(HandedAnswer { name: slot.name, content_type, size, sha256 }))
}

fn slot(kind: Kind, name: Option<&str>) -> Result<&'static Slot, Problem> {
    let slots = slots(kind);
    let found = match name {
        None => slots.first(),
        Some(name) => slots.iter().find(|slot| slot.name == name),
    };
    found.ok_or_else(|| {
        let names: Vec<_> = slots.iter().map(|slot| slot.name).collect();
        Problem::field("name", &format!("must be one of {}", names.join(", ")))
    })
}

/// The SHA-256 of `Content-Digest` (RFC 9530), if the worker sent one.
fn declared_digest(request: &HttpRequest) -> Result<Option<Vec<u8>>, Problem> {
    let Some(value) = request.headers().get("content-digest") else { return Ok(None) };
    let text = value.to_str().unwrap_or_default();
    let mut all = text.split(',').filter_map(|part| part.trim().split_once('='));
    let Some((_, digest)) = all.find(|(name, _)| *name == "sha-256") else { return Ok(None) };
    let digest = digest.strip_prefix(':').and_then(|rest| rest.strip_suffix(':'));
    let digest = digest.and_then(|text| STANDARD.decode(text).ok()).filter(|it| it.len() == 32);
    let digest = digest.ok_or_else(|| {
        Problem::new(Code::MalformedRequest).with_sentence("Content-Digest is malformed")
    })?;
    Ok(Some(digest))
}

/// What the worker calls it; nothing if it leaves that to its bytes.
fn declared_type(request: &HttpRequest, slot: &Slot) -> Result<Option<String>, Problem> {
    let Some(value) = request.headers().get(header::CONTENT_TYPE) else { return Ok(None) };
    let mime: Option<mime::Mime> = value.to_str().ok().and_then(|text| text.parse().ok());
    let essence = mime.as_ref().map(|mime| mime.essence_str());
    match essence {
        Some("application/octet-stream") => Ok(None),
        Some(name) if slot.filename(name).is_some() => Ok(Some(name.to_owned())),
        _ => Err(wrong_type(slot)),
    }
}

fn wrong_type(slot: &Slot) -> Problem {
    Problem::new(Code::UnsupportedMediaType).with_sentence(format!(
        "The output {} must be of {}",
        slot.name,
        slot.types()
    ))
}

/// One that breaks off, stalls or is too large leaves nothing.
async fn receive(
    app: &App,
    request: &HttpRequest,
    payload: web::Payload,
) -> Result<Stored, Problem> {
    let most = app.max_upload_bytes;
    if declared_length(request).is_some_and(|length| length > most) {
        return Err(too_large(most));
    }
    let mut body = std::pin::pin!(unstalled(payload, BodyLimits::of(request).silence));
    let mut writer = app.blobs.writer().await?;
    while let Some(chunk) = body.next().await {
        let chunk = chunk.map_err(payload_problem)?;
        if writer.size() + chunk.len() as u64 > most {
            return Err(too_large(most));
        }
        writer.write(chunk).await?;
    }
    if writer.size() == 0 {
        return Err(Problem::new(Code::MissingBody));
    }
    Ok(writer.finish().await?)
}

/// What the bytes show; captions have no signature that the store knows.
async fn real_type(
    app: &App,
    stored: &Stored,
    options: &Options,
) -> Result<Option<String>, Problem> {
    if let Options::Translation(options) = options {
        return text_type(app, stored, options.format).await;
    }
    if stored.sniffed.is_some() {
        return Ok(stored.sniffed.clone());
    }
    const SIGNATURE: &[u8] = b"WEBVTT";
    const MARK: &[u8] = "\u{feff}".as_bytes();
    let most = (SIGNATURE.len() + MARK.len()) as u64;
    let mut head = Vec::new();
    let mut bytes = Box::pin(app.blobs.read_range(&stored.sha256, 0..stored.size.min(most)));
    while let Some(chunk) = bytes.next().await {
        head.extend_from_slice(&chunk?);
    }
    let head = head.strip_prefix(MARK).unwrap_or(&head);
    Ok(head.starts_with(SIGNATURE).then(|| "text/vtt".to_owned()))
}

/// All of a text is looked at.
async fn text_type(app: &App, stored: &Stored, format: Format) -> Result<Option<String>, Problem> {
    let mut check = TextCheck::default();
    let mut bytes = Box::pin(app.blobs.read_range(&stored.sha256, 0..stored.size));
    while let Some(chunk) = bytes.next().await {
        if check.add(&chunk?).is_err() {
            return Ok(None);
        }
    }
    Ok(check.judge(format).ok().map(str::to_owned))
}

/// The body of `POST worker/jobs/{id}/complete`.
#[derive(Debug, utoipa::ToSchema)]
pub struct CompleteRequest {
    pub lease_id: Uuid,
    /// Seconds; as requested if absent.
    pub duration: Option<f64>,
    /// Pixels; as requested if absent.
    pub width: Option<u64>,
    /// Pixels; as requested if absent.
    pub height: Option<u64>,
}

impl FromFields for CompleteRequest {
    fn from_fields(fields: &mut Fields) -> Self {
        Self {
            lease_id: lease_id(fields),
            duration: fields.optional_f64("duration", 0.0..=86_400.0),
            width: fields.optional_u64("width", 1..=65_536),
            height: fields.optional_u64("height", 1..=65_536),
        }
    }
}

impl CompleteRequest {
    fn shape(&self, request: &Request) -> Shape {
        let Options::Video(options) = &request.options else { return Shape::default() };
        let (quality, ratio) = (options.quality.as_str(), options.aspect_ratio.as_str());
        let (width, height) = renderer::dimensions(quality, ratio).unwrap_or_default();
        let given = |pixels: Option<u64>| pixels.and_then(|it| u32::try_from(it).ok());
        Shape {
            duration: Some(self.duration.unwrap_or_else(|| f64::from(options.duration))),
            width: Some(given(self.width).unwrap_or(width)),
            height: Some(given(self.height).unwrap_or(height)),
        }
    }
}

/// What a worker is told when its part is done.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct OutcomeAnswer {
    pub job_id: Uuid,
    /// Of the job: `completed`, `cancelled`, `failed`, `retry_wait` or, given back, `queued`.
    pub state: &'static str,
    pub output: Option<OutputAnswer>,
}

fn outcome(job_id: JobId, state: &'static str, output: Option<&Output>) -> HttpResponse {
    answer::ok(OutcomeAnswer { job_id: job_id.0, state, output: output.map(OutputAnswer::from) })
}

/// `POST worker/jobs/{id}/complete`
pub async fn complete(
    app: web::Data<App>,
    request_id: RequestId,
    id: web::Path<String>,
    body: Json<CompleteRequest>,
) -> Result<HttpResponse, Problem> {
    let (job_id, lease_id) = (jobs::parse_id(&id)?, LeaseId(body.0.lease_id));
    let shape = |request: &Request| body.0.shape(request);
    let origin = origin_under(&app, job_id, lease_id, &request_id).await;
    let done = app.leasing.complete(job_id, lease_id, &origin, shape).await?;
    Ok(bearing(told(job_id, done)?, &origin.correlation_id))
}

/// What cannot be read yet may be asked for again, and is answered the same then; but under the
/// lease of a job that was cancelled, nothing is.
fn told(job_id: JobId, done: Done<Completed>) -> Result<HttpResponse, Problem> {
    let response = match &done.outcome {
        Completed::Done(output) => {
            done.visible?;
            outcome(job_id, "completed", Some(output))
        }
        Completed::Cancelled => outcome(job_id, "cancelled", None),
    };
    Ok(at_position(response, done.position))
}

/// The body of `POST worker/jobs/{id}/fail`.
#[derive(Debug, utoipa::ToSchema)]
pub struct FailRequest {
    pub lease_id: Uuid,
    /// Shown to the user.
    pub error: String,
    /// Whether another attempt may succeed; true if absent.
    pub retryable: Option<bool>,
    /// The worker was told to stop: the job goes on with the next one at once, the attempt does not
    /// count, and `error` and `retryable` say nothing. False if absent.
    pub given_back: Option<bool>,
}

impl FromFields for FailRequest {
    fn from_fields(fields: &mut Fields) -> Self {
        Self {
            lease_id: lease_id(fields),
            error: fields.text("error", 1..=LONGEST_ERROR).chars().take(ERROR_KEPT).collect(),
            retryable: fields.optional_bool("retryable"),
            given_back: fields.optional_bool("given_back"),
        }
    }
}

/// `POST worker/jobs/{id}/fail`
pub async fn fail(
    app: web::Data<App>,
    request_id: RequestId,
    id: web::Path<String>,
    body: Json<FailRequest>,
) -> Result<HttpResponse, Problem> {
    let (job_id, lease_id) = (jobs::parse_id(&id)?, LeaseId(body.0.lease_id));
    let origin = origin_under(&app, job_id, lease_id, &request_id).await;
    let FailRequest { error, retryable, given_back, .. } = body.0;
    let done = match given_back.unwrap_or(false) {
        true => app.leasing.give_back(job_id, lease_id, &origin).await?,
        false => {
            let again = retryable.unwrap_or(true);
            app.leasing.fail(job_id, lease_id, &origin, error, again).await?
        }
    };
    // Also where it cannot be read yet: asked again, the lease is gone.
    let told = at_position(outcome(job_id, done.outcome, None), done.position);
    Ok(bearing(told, &origin.correlation_id))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::actors::projector::NotCaughtUp;
    use crate::domain::ids::FileId;

    #[test]
    fn a_cancelled_completion_is_told_at_once_since_asked_again_its_lease_is_gone() {
        let job_id = JobId(Uuid::from_u128(1));
        let done = |outcome| Done { outcome, position: 7, visible: Err(NotCaughtUp) };
        assert!(told(job_id, done(Completed::Cancelled)).is_ok());
        let output = Output {
            file_id: FileId(Uuid::from_u128(2)),
            content_type: "video/mp4".to_owned(),
            size: 1,
            duration: None,
            width: None,
            height: None,
            poster_file_id: None,
            captions_file_id: None,
        };
        let refused = told(job_id, done(Completed::Done(output))).unwrap_err();
        assert_eq!(refused.code(), Code::NotCaughtUp);
    }
}
