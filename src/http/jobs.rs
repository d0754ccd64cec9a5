//! Videos and the jobs that make them.

use std::sync::Arc;

use actix_web::http::header::{HeaderName, HeaderValue};
use actix_web::{HttpRequest, HttpResponse, web};
use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use utoipa::openapi::schema::{Array, ArrayBuilder, Object};
use uuid::Uuid;

use super::app::App;
use super::caller::Caller;
use super::json::{Fields, FromFields, Json};
use super::lists::{self, PageAnswer, PageQuery};
use super::openapi::one_of;
use super::problem::{Code, Problem};
use super::{answer, files};
use crate::actors::System;
use crate::actors::callbacks::address::LONGEST_URL;
use crate::actors::entity::Failure;
use crate::actors::leasing::Leasing;
use crate::config::Retention;
use crate::domain::ids::{FileId, JobId, derived_id};
use crate::domain::job::{
    AspectRatio, Command, Job, Kind, Options, Output, Quality, Request, VideoOptions,
};
use crate::domain::text::{Personal, Prompt};
use crate::domain::tier::Tier;
use crate::views::{self, JobFilter, JobRow, View};

/// Seconds of a video whose request names no duration.
const DEFAULT_DURATION_S: u64 = 10;
/// Of any tier.
const MAX_DURATION_S: u64 = 60;
/// A week.
pub const LONGEST_DEADLINE_S: u64 = 604_800;
/// The states that `?state=` may name.
const STATES: [&str; 7] =
    ["queued", "running", "retry_wait", "cancelling", "completed", "failed", "cancelled"];

/// The body of `POST videos/generate`.
#[derive(Debug, utoipa::ToSchema)]
pub struct VideoRequest {
    /// Not blank, and without control characters but line breaks and tabs.
    #[schema(
        pattern = r"^[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]*[^\s\x00-\x1f\x7f-\x9f][^\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]*$"
    )]
    pub prompt: String,
    /// Seconds; tier standard: 10 at most. 10 if absent.
    pub duration: Option<u64>,
    /// `4k` not in tier standard; `720p` if absent.
    pub quality: Option<&'static str>,
    /// `16:9` if absent.
    pub aspect_ratio: Option<&'static str>,
    /// Words that set the mood and are not shown.
    pub style: Option<String>,
    /// The same prompt and seed make the same video.
    pub seed: Option<u64>,
    pub engine: Option<&'static str>,
    /// A file of the caller's.
    pub source_file_id: Option<Uuid>,
    /// Where to POST, signed by Standard Webhooks, that the job has ended: http or https, a public
    /// address. It is told at least once, and again while it is not answered with 2xx.
    #[schema(format = "uri", pattern = "^https?://")]
    pub callback_url: Option<String>,
    /// Seconds from now after which the job fails unless it has ended.
    pub deadline_s: Option<u64>,
}

fn kinds() -> Object {
    one_of("What is made", Kind::ALL.map(Kind::as_str))
}

pub fn some_kinds() -> Array {
    ArrayBuilder::new().items(kinds()).build()
}

fn states() -> Object {
    one_of("The whole truth", STATES)
}

fn statuses() -> Object {
    one_of("What the seed's front end understands", ["processing", "completed", "error"])
}

impl FromFields for VideoRequest {
    fn from_fields(fields: &mut Fields) -> Self {
        let prompt = fields.text("prompt", 1..=Prompt::MAX_CHARACTERS);
        if let Err(fault) = Prompt::parse(&prompt) {
            fields.refuse("prompt", fault.to_string());
        }
        Self {
            prompt,
            duration: fields.optional_u64("duration", 1..=MAX_DURATION_S),
            quality: fields.optional_choice("quality", &Quality::NAMES),
            aspect_ratio: fields.optional_choice("aspect_ratio", &AspectRatio::NAMES),
            style: fields.optional_text("style", 1..=200),
            // Whole numbers beyond 2^53 do not survive a browser.
            seed: fields.optional_u64("seed", 0..=(1 << 53) - 1),
            engine: fields.optional_choice("engine", &["storyboard"]),
            source_file_id: fields.optional_uuid("source_file_id"),
            callback_url: fields.optional_text("callback_url", 1..=LONGEST_URL),
            deadline_s: fields.optional_u64("deadline_s", 1..=LONGEST_DEADLINE_S),
        }
    }
}

/// A job as its owner sees it (CONTRACT §3).
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct JobAnswer {
    pub job_id: Uuid,
    #[schema(schema_with = kinds)]
    pub kind: String,
    #[schema(schema_with = statuses)]
    pub status: String,
    #[schema(schema_with = states)]
    pub state: String,
    /// Percent.
    #[schema(maximum = 100)]
    pub progress: u8,
    pub prompt: String,
    #[schema(value_type = Object)]
    pub options: Value,
    pub attempt: u32,
    /// 1 is next: how many jobs workers take up to and including this one, if nothing else happens.
    /// Null unless the job waits for its turn.
    pub queue_position: Option<u64>,
    pub error: Option<String>,
    pub output: Option<OutputAnswer>,
    /// When the output will be deleted; null if it is gone, or kept for ever.
    pub expires_at: Option<DateTime<Utc>>,
    /// When the job fails with `deadline_exceeded` unless it has ended before.
    pub deadline: Option<DateTime<Utc>>,
    pub created_at: DateTime<Utc>,
    pub started_at: Option<DateTime<Utc>>,
    pub finished_at: Option<DateTime<Utc>>,
}

/// What a job has made; null is what its kind does not have.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct OutputAnswer {
    pub file_id: Uuid,
    pub content_type: String,
    /// In bytes.
    pub size: u64,
    /// In seconds.
    pub duration: Option<f64>,
    pub width: Option<u32>,
    pub height: Option<u32>,
    pub poster_file_id: Option<Uuid>,
    pub captions_file_id: Option<Uuid>,
}

impl From<&Output> for OutputAnswer {
    fn from(output: &Output) -> Self {
        Self {
            file_id: output.file_id.0,
            content_type: output.content_type.clone(),
            size: output.size,
            duration: output.duration,
            width: output.width,
            height: output.height,
            poster_file_id: output.poster_file_id.map(|id| id.0),
            captions_file_id: output.captions_file_id.map(|id| id.0),
        }
    }
}

impl JobAnswer {
    fn new(row: &JobRow, queue_position: Option<u64>) -> Self {
        Self {
            job_id: row.job_id.0,
            status: row.status().to_owned(),
            kind: row.kind.as_str().to_owned(),
            state: row.state.clone(),
            progress: row.progress,
            prompt: row.prompt.clone(),
            options: json!(row.options),
            attempt: row.attempt,
            queue_position,
            error: row.error.clone(),
            output: row.output.as_ref().map(OutputAnswer::from),
            expires_at: None,
            deadline: row.deadline,
            created_at: row.created_at,
            started_at: row.started_at,
            finished_at: row.finished_at,
        }
    }

    /// As it was when it was asked for: what a retry with the same key is answered too.
    pub fn at_request(row: &JobRow) -> Self {
        let fresh = Self::new(row, None);
        Self {
            status: "processing".to_owned(),
            state: "queued".to_owned(),
            progress: 0,
            attempt: 0,
            error: None,
            output: None,
            started_at: None,
            finished_at: None,
            ..fresh
        }
    }
}

/// `POST videos/generate`
pub async fn generate(
    app: web::Data<App>,
    caller: Caller,
    request: HttpRequest,
    body: Json<VideoRequest>,
) -> Result<HttpResponse, Problem> {
    let key = idempotency_key(&request)?;
    let job_id = JobId(match &key {
        Some(key) => derived_id(&caller.user_id, "job", key),
        None => app.system.clock.fresh_id(),
    });
    let deadline_s = body.0.deadline_s;
    let (mut wanted, faults) = video(&app, &caller, job_id, body.0)?;
    let is_repeat = !faults.is_empty() && key.is_some() && was_asked(&app, &caller, job_id).await?;
    if !faults.is_empty() && !is_repeat {
        let faults = faults.into_iter().map(|it| (it.field.to_owned(), it.words.into()));
        return Err(Problem::fields(faults.collect()));
    }
    let jobs = &app.system.jobs;
    let done = if key.is_some() {
        wanted.fingerprint = Some(fingerprint(&asked(&wanted, deadline_s)));
        jobs.execute(job_id, Command::Request(wanted), caller.origin()).await?
    } else {
        jobs.execute_fresh(job_id, Command::Request(wanted), caller.origin()).await?
    };
    app.system.visible_in(View::Jobs, done.position).await?;
    let row = owned(&app, &caller, job_id)?;
    let response = answer::accepted(JobAnswer::at_request(&row));
    Ok(replayed(at_position(response, done.position), done.events.is_empty()))
}

/// What is wrong with a request that is well-formed.
#[derive(Debug)]
pub struct Fault {
    pub field: &'static str,
    pub words: String,
}

impl Fault {
    fn new(field: &'static str, words: impl ToString) -> Self {
        Self { field, words: words.to_string() }
    }
}

/// Whether the job of a key is there: then its request was checked when it came first, and may ask
/// by now for what cannot be had any more. The job itself knows, also where the read model is behind.
///
/// # Errors
/// As those of every command.
pub async fn was_asked(app: &App, caller: &Caller, job_id: JobId) -> Result<bool, Problem> {
    match app.system.jobs.execute(job_id, Command::Look, caller.origin()).await {
        Ok(_) => Ok(true),
        Err(Failure::Refused(_)) => Ok(false),
        Err(failure) => Err(failure.into()),
    }
}

/// The job that a body asks for, and every field of it that cannot be had now.
///
/// # Errors
/// The prompt is none.
pub fn video(
    app: &App,
    caller: &Caller,
    job_id: JobId,
    body: VideoRequest,
) -> Result<(Request, Vec<Fault>), Problem> {
    let prompt = Prompt::parse(&body.prompt);
    let prompt = prompt.map_err(|fault| Problem::field("prompt", &fault.to_string()))?;
    let source_file_id = body.source_file_id.map(FileId);
    let tier = Tier::of(&caller.subscription_tier);
    let duration = u32::try_from(body.duration.unwrap_or(DEFAULT_DURATION_S)).unwrap_or(u32::MAX);
    let quality = body.quality.and_then(Quality::parse).unwrap_or(Quality::P720);
    let mut faults = beyond(tier, duration, quality);
    if source_file_id.is_some_and(|id| files::owned(app, caller, id).is_err()) {
        faults.push(Fault::new("source_file_id", "is not a file of yours"));
    }
    if let Some(url) = &body.callback_url
        && let Err(words) = app.callbacks.check(url)
    {
        faults.push(Fault::new("callback_url", words));
    }
    let options = VideoOptions {
        duration,
        quality,
        aspect_ratio: body
            .aspect_ratio
            .and_then(AspectRatio::parse)
            .unwrap_or(AspectRatio::Landscape),
        style: body.style.map(Personal::Known),
        seed: body.seed.unwrap_or_else(|| seed_of(job_id)),
        engine: body.engine.map(str::to_owned),
        source_file_id,
    };
    let request = Request {
        user_id: caller.user_id.clone(),
        kind: Kind::Video,
        prompt: Personal::Known(prompt),
        options: Options::Video(options),
        tier,
        batch: false,
        fingerprint: None,
        callback_url: body.callback_url.map(Personal::Known),
        deadline: deadline(app, body.deadline_s),
    };
    Ok((request, faults))
}

/// So many seconds from now.
pub fn deadline(app: &App, seconds: Option<u64>) -> Option<DateTime<Utc>> {
    let seconds = i64::try_from(seconds?.min(LONGEST_DEADLINE_S)).unwrap_or_default();
    Some(app.system.clock.now() + TimeDelta::seconds(seconds))
}

/// What a request is known by when it comes again. A deadline counts as it was asked for: the time
/// that it means is another at each try.
pub fn asked(request: &Request, deadline_s: Option<u64>) -> Value {
    match (&request.callback_url, deadline_s) {
        (None, None) => json!([request.prompt, request.options]),
        (url, seconds) => json!([request.prompt, request.options, url, seconds]),
    }
}

/// What a tier does not allow, and which one would.
fn beyond(tier: Tier, duration: u32, quality: Quality) -> Vec<Fault> {
    let mut faults = Vec::new();
    if duration > tier.longest_s() {
        let words = format!(
            "must be at most {} in tier {}; up to {} needs tier premium",
            tier.longest_s(),
            tier.as_str(),
            Tier::Premium.longest_s()
        );
        faults.push(Fault::new("duration", words));
    }
    if quality > tier.finest() {
        let words = format!(
            "must be at most {} in tier {}; {} needs tier premium",
            tier.finest().as_str(),
            tier.as_str(),
            quality.as_str()
        );
        faults.push(Fault::new("quality", words));
    }
    faults
}

/// From the job's id, so that a repeated request asks for the same picture.
fn seed_of(job_id: JobId) -> u64 {
    let (high, low) = job_id.0.as_u64_pair();
    (high ^ low) & ((1 << 53) - 1)
}

/// The query of `GET jobs`.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
pub struct FilterQuery {
    #[param(schema_with = states)]
    state: Option<String>,
    #[param(schema_with = kinds)]
    kind: Option<String>,
}

/// `GET jobs`
pub async fn list(
    app: web::Data<App>,
    caller: Caller,
    request: HttpRequest,
    page: PageQuery,
) -> Result<HttpResponse, Problem> {
    let query: FilterQuery = lists::query(&request)?;
    if query.state.as_ref().is_some_and(|state| !STATES.contains(&state.as_str())) {
        return Err(Problem::field("state", "is not a state of jobs"));
    }
    if query.kind.as_ref().is_some_and(|kind| Kind::parse(kind).is_none()) {
        return Err(Problem::field("kind", "is not a kind of jobs"));
    }
    listed(&app, &caller, &JobFilter { state: query.state, kind: query.kind }, &page)
}

/// `GET videos`
pub async fn videos(
    app: web::Data<App>,
    caller: Caller,
    page: PageQuery,
) -> Result<HttpResponse, Problem> {
    let filter = JobFilter { state: None, kind: Some(Kind::Video.as_str().to_owned()) };
    listed(&app, &caller, &filter, &page)
}

fn listed(
    app: &App,
    caller: &Caller,
    filter: &JobFilter,
    page: &PageQuery,
) -> Result<HttpResponse, Problem> {
    let found = app.system.views.jobs(&caller.user_id, filter, page.cursor.as_ref(), page.limit)?;
    let items = found.items.iter().map(|row| shown(app, row)).collect::<Result<Vec<_>, _>>()?;
    Ok(answer::ok(PageAnswer { items, next_cursor: found.next_cursor }))
}

fn shown(app: &App, row: &JobRow) -> Result<JobAnswer, Problem> {
    Ok(Shown::new(&app.system, &app.leasing, app.retention).job(row)?)
}

/// What it takes to show a job to its owner, in an answer or in a callback.
pub struct Shown {
    system: Arc<System>,
    leasing: Arc<Leasing>,
    retention: Retention,
}

impl Shown {
    pub fn new(system: &Arc<System>, leasing: &Arc<Leasing>, retention: Retention) -> Self {
        Self { system: Arc::clone(system), leasing: Arc::clone(leasing), retention }
    }

    /// # Errors
    /// The read model cannot be read.
    pub fn value(&self, row: &JobRow) -> Result<Value, views::Error> {
        self.job(row).map(|job| json!(job))
    }

    fn job(&self, row: &JobRow) -> Result<JobAnswer, views::Error> {
        let (now, caps) = (self.system.clock.now(), self.leasing.caps());
        let views = &self.system.views;
        let file = row.output.as_ref().map(|output| views.file(&output.file_id)).transpose()?;
        let expires_at = file.flatten().and_then(|it| it.expires_at(&self.retention));
        Ok(JobAnswer { expires_at, ..JobAnswer::new(row, views.queue_position(row, now, caps)) })
    }
}

/// `GET jobs/{id}` and `GET status/{id}`
pub async fn show(
    app: web::Data<App>,
    caller: Caller,
    id: web::Path<String>,
) -> Result<HttpResponse, Problem> {
    let row = owned(&app, &caller, parse_id(&id)?)?;
    Ok(answer::ok(shown(&app, &row)?))
}

/// `POST jobs/{id}/cancel`
pub async fn cancel(
    app: web::Data<App>,
    caller: Caller,
    id: web::Path<String>,
) -> Result<HttpResponse, Problem> {
    change(&app, &caller, &id, Command::Cancel { by: caller.user_id.clone() }).await
}

/// `POST jobs/{id}/retry`
pub async fn retry(
    app: web::Data<App>,
    caller: Caller,
    id: web::Path<String>,
) -> Result<HttpResponse, Problem> {
    change(&app, &caller, &id, Command::Retry { by: caller.user_id.clone() }).await
}

async fn change(
    app: &App,
    caller: &Caller,
    id: &str,
    command: Command,
) -> Result<HttpResponse, Problem> {
    let job_id = parse_id(id)?;
    owned(app, caller, job_id)?;
    let done = app.system.jobs.execute(job_id, command, caller.origin()).await?;
    debug_assert_ne!(done.state, Job::Absent);
    app.system.visible_in(View::Jobs, done.position).await?;
    let row = owned(app, caller, job_id)?;
    Ok(at_position(answer::ok(shown(app, &row)?), done.position))
}

/// The job, if it is there and the caller's: the two are never told apart.
pub fn owned(app: &App, caller: &Caller, id: JobId) -> Result<Arc<JobRow>, Problem> {
    let row = app.system.views.job(&id)?.filter(|row| row.user_id == caller.user_id);
    row.ok_or_else(|| Problem::new(Code::NotFound))
}

/// What is no UUID is no job.
pub fn parse_id(text: &str) -> Result<JobId, Problem> {
    Uuid::try_parse(text).map(JobId).map_err(|_| Problem::new(Code::NotFound))
}

/// The `Idempotency-Key` of a creating request: 1 to 255 visible characters.
pub fn idempotency_key(request: &HttpRequest) -> Result<Option<String>, Problem> {
    let Some(value) = request.headers().get("idempotency-key") else { return Ok(None) };
    let usable =
        (1..=255).contains(&value.len()) && value.as_bytes().iter().all(u8::is_ascii_graphic);
    let text = value.to_str().ok().filter(|_| usable).ok_or_else(|| {
        Problem::new(Code::MalformedRequest)
            .with_sentence("Idempotency-Key must be 1 to 255 visible ASCII characters")
    })?;
    Ok(Some(text.to_owned()))
}

/// Tells a retry from another request under the same key.
pub fn fingerprint(request: &Value) -> String {
    hex::encode(Sha256::digest(request.to_string()))
}

/// Says where in the log the command's effect lies.
pub fn at_position(mut response: HttpResponse, position: u64) -> HttpResponse {
    let name = HeaderName::from_static("x-log-position");
    response.headers_mut().insert(name, HeaderValue::from(position));
    response
}

/// Says that the answer is to an earlier request with the same key.
pub fn replayed(mut response: HttpResponse, nothing_new: bool) -> HttpResponse {
    if nothing_new {
        let name = HeaderName::from_static("idempotent-replayed");
        response.headers_mut().insert(name, HeaderValue::from_static("true"));
    }
    response
}
