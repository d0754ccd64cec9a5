//! Translations: a text comes in with its languages and perhaps a key, and becomes a job.

use actix_web::{HttpRequest, HttpResponse, web};
use futures_util::StreamExt;
use serde::Serialize;
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::app::App;
use super::caller::Caller;
use super::jobs::{
    JobAnswer, LONGEST_DEADLINE_S, at_position, deadline, fingerprint, idempotency_key, owned,
    replayed, was_asked,
};
use super::problem::{Code, Problem};
use super::quota::Allowance;
use super::upload::{self, Most, Upload};
use super::{answer, files};
use crate::config::Secret;
use crate::domain::file::{self, Stored};
use crate::domain::ids::{FileId, JobId, derived_id};
use crate::domain::job::{Command, Kind, Options, Request};
use crate::domain::text::{Personal, Prompt};
use crate::domain::tier::Tier;
use crate::domain::translation::{
    DEFAULT_MODEL, DEFAULT_SEGMENT_SIZE, Format, Language, TranslationOptions,
};
use crate::media::renderer::output::TextCheck;
use crate::views::View;

/// A text that is longer is a book to be sent in parts, in bytes.
const LARGEST_TEXT: u64 = 16 * 1024 * 1024;
const LONGEST_KEY: usize = 4096;
const LONGEST_MODEL_NAME: usize = 128;
const LONGEST_STYLE: usize = 10_000;
const LARGEST_SEGMENT: u32 = 1_000_000;
/// The longest of each field together, with what JSON escapes of them.
const LARGEST_FORM: usize = 64 * 1024;

/// The form of `POST translations` and `POST uploadfile/`.
#[derive(Debug, utoipa::ToSchema)]
#[allow(dead_code, reason = "it describes the form; the fields are read one by one")]
pub struct TranslationForm {
    /// Plain text, SubRip or WebVTT, UTF-8, 16 MiB at most.
    #[schema(value_type = String, format = Binary)]
    pub file: Vec<u8>,
    /// A language tag such as `en`; the engine's choice if absent.
    #[schema(nullable = false, max_length = 35, pattern = "^[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*$")]
    pub source_language: Option<String>,
    /// A language tag such as `es`; the engine's choice if absent.
    #[schema(nullable = false, max_length = 35, pattern = "^[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*$")]
    pub target_language: Option<String>,
    /// `gemini-2.5-flash-lite` if absent.
    #[schema(
        nullable = false,
        max_length = 128,
        pattern = r"^[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]*$"
    )]
    pub model_name: Option<String>,
    /// How the engine shall write, in words or data of the engine's own.
    #[schema(
        nullable = false,
        max_length = 10000,
        pattern = r"^[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]*$"
    )]
    pub style_data: Option<String>,
    /// The most characters that an engine shall translate at a time; 15000 if absent.
    #[schema(nullable = false, minimum = 1, maximum = 1000000)]
    pub segment_size: Option<u32>,
    /// For the engine alone, and destroyed when the job ends: 4096 bytes at most, on one line.
    /// Required by `uploadfile/`.
    #[schema(nullable = false, max_length = 4096, pattern = r"^[^\x00-\x1f\x7f-\x9f]*$")]
    pub api_key: Option<String>,
    /// As for `POST videos/generate`.
    #[schema(nullable = false, max_length = 2048, format = "uri", pattern = "^https?://")]
    pub callback_url: Option<String>,
    /// As for `POST videos/generate`.
    #[schema(nullable = false, minimum = 1, maximum = 604800)]
    pub deadline_s: Option<u32>,
}

/// `POST translations`
pub async fn request(
    app: web::Data<App>,
    caller: Caller,
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse, Problem> {
    let asked = ask(&app, &caller, &request, payload, KeyIs::Optional).await?;
    Ok(asked.finish(answer::accepted(JobAnswer::at_request(&asked.row))))
}

/// The answer to the seed's `POST uploadfile/`: ours, and beside it what its own client reads.
#[derive(Serialize)]
struct SeedAnswer<'a> {
    success: bool,
    data: &'a JobAnswer,
    id: Uuid,
    job_id: Uuid,
    filename: &'a str,
    status: &'a str,
    created_at: chrono::DateTime<chrono::Utc>,
}

/// `POST uploadfile/`
pub async fn upload_file(
    app: web::Data<App>,
    caller: Caller,
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse, Problem> {
    let asked = ask(&app, &caller, &request, payload, KeyIs::Required).await?;
    let data = JobAnswer::at_request(&asked.row);
    let body = SeedAnswer {
        success: true,
        id: data.job_id,
        job_id: data.job_id,
        filename: &data.prompt,
        status: &data.status,
        created_at: data.created_at,
        data: &data,
    };
    Ok(asked.finish(HttpResponse::Ok().json(body)))
}

#[derive(Clone, Copy, PartialEq)]
enum KeyIs {
    Optional,
    Required,
}

/// A job that was asked for.
struct Asked {
    row: std::sync::Arc<crate::views::JobRow>,
    position: u64,
    nothing_new: bool,
}

impl Asked {
    fn finish(&self, response: HttpResponse) -> HttpResponse {
        replayed(at_position(response, self.position), self.nothing_new)
    }
}

async fn ask(
    app: &App,
    caller: &Caller,
    request: &HttpRequest,
    payload: web::Payload,
    key_is: KeyIs,
) -> Result<Asked, Problem> {
    let key = idempotency_key(request)?;
    let id = |kind: &str| match &key {
        Some(key) => derived_id(&caller.user_id, kind, key),
        None => app.system.clock.fresh_id(),
    };
    let (job_id, file_id) = (JobId(id("job")), FileId(id("translation source")));
    let most = app.max_upload_bytes.min(LARGEST_TEXT);
    // Its text may be deleted by now, and there may be no room for it any more.
    let again = key.is_some() && was_asked(app, caller, job_id).await?;
    let mut allowance = match again {
        true => Allowance::again(most),
        false => files::allowance(app, caller, file_id)?,
    };
    let limits = Most { file: most, fields: LARGEST_FORM };
    let received = upload::receive(request, payload, &app.blobs, limits, &mut allowance);
    let mut received = received.await?;
    let mut form = Form { fields: std::mem::take(&mut received.metadata), faults: Map::new() };
    // First of all, so that nothing else can get hold of it.
    let api_key = form.secret("api_key");
    if key_is == KeyIs::Required && api_key.is_none() {
        form.refuse("api_key", "is required");
    }
    let (callback_url, deadline_s) = (form.callback_url(app, again), form.deadline_s());
    let options = form.options(file_id, api_key.is_some());
    let options = form.checked(options)?;
    let beginning = beginning(app, &received).await?;
    let format = Format::of(&received.filename, &beginning);
    let options = Options::Translation(TranslationOptions { format, ..options });
    let mut asked = vec![json!(received.filename), json!(received.sha256), json!(options)];
    if callback_url.is_some() || deadline_s.is_some() {
        asked.extend([json!(callback_url), json!(deadline_s)]);
    }
    let fingerprint = key.map(|_| fingerprint(&Value::from(asked)));
    let prompt = Prompt::parse(&received.filename)
        .map_err(|fault| Problem::field("file", &format!("its name {fault}")))?;
    let wanted = Request {
        user_id: caller.user_id.clone(),
        kind: Kind::Translation,
        prompt: Personal::Known(prompt),
        options,
        tier: Tier::of(&caller.subscription_tier),
        batch: false,
        fingerprint: fingerprint.clone(),
        callback_url: callback_url.map(Personal::Known),
        deadline: deadline(app, deadline_s),
    };
    // A repeat meets its job, whose secret is in the vault or rightly gone.
    if !again {
        store(app, caller, file_id, received, format, fingerprint, allowance).await?;
        if let Some(api_key) = api_key
            && app.system.views.job(&job_id)?.is_none()
        {
            app.secrets.keep(job_id, &api_key).await.map_err(not_sealed)?;
        }
    }
    let done = app.system.jobs.execute(job_id, Command::Request(wanted), caller.origin()).await?;
    app.system.visible_in(View::Jobs, done.position).await?;
    let row = owned(app, caller, job_id)?;
    Ok(Asked { row, position: done.position, nothing_new: done.events.is_empty() })
}

fn not_sealed(error: crate::media::vault::Error) -> Problem {
    Problem::new(Code::StorageUnavailable).caused_by(error)
}

async fn store(
    app: &App,
    caller: &Caller,
    file_id: FileId,
    received: Upload,
    format: Format,
    fingerprint: Option<String>,
    allowance: Allowance,
) -> Result<(), Problem> {
    let command = file::Command::Store(Stored {
        user_id: caller.user_id.clone(),
        filename: Personal::Known(received.filename),
        content_type: format.content_type().to_owned(),
        size: received.size,
        sha256: received.sha256,
        metadata: Personal::default(),
        job_id: None,
        fingerprint,
    });
    let done = app.system.files.execute(file_id, command, caller.origin()).await?;
    if let Err(late) = app.system.visible_in(View::Files, done.position).await {
        // Until the file itself counts, its reservation must.
        files::once_shown(app, done.position, async move { drop(allowance) });
        return Err(late.into());
    }
    files::owned(app, caller, file_id).map(drop)
}

/// What the text begins with; all of it is looked at.
async fn beginning(app: &App, received: &Upload) -> Result<String, Problem> {
    let not_text = || Problem::field("file", "must be UTF-8 text: plain, SubRip or WebVTT");
    let mut check = TextCheck::default();
    let mut bytes = Box::pin(app.blobs.read_range(&received.sha256, 0..received.size));
    while let Some(chunk) = bytes.next().await {
        check.add(&chunk?).map_err(|_| not_text())?;
    }
    let beginning = check.finish().map_err(|_| not_text())?;
    match beginning.trim().is_empty() {
        true => Err(Problem::field("file", "must not be empty")),
        false => Ok(beginning),
    }
}

/// The fields of the form beside the file, and what is wrong with them. No value is ever said back.
struct Form {
    fields: Map<String, Value>,
    faults: Map<String, Value>,
}

impl Form {
    fn refuse(&mut self, name: &str, words: impl Into<String>) {
        self.faults.entry(name).or_insert_with(|| Value::String(words.into()));
    }

    fn checked<T>(&mut self, value: T) -> Result<T, Problem> {
        match self.faults.is_empty() {
            true => Ok(value),
            false => Err(Problem::fields(std::mem::take(&mut self.faults))),
        }
    }

    /// A field that is given once; one that is empty is absent, as browsers send it.
    fn take(&mut self, name: &str) -> Option<String> {
        match self.fields.remove(name)? {
            Value::String(text) if text.trim().is_empty() => None,
            Value::String(text) => Some(text),
            _ => {
                self.refuse(name, "must be given once");
                None
            }
        }
    }

    fn text(&mut self, name: &str, longest: usize) -> Option<String> {
        let text = self.take(name)?;
        let control = |c: char| c.is_control() && !matches!(c, '\n' | '\r' | '\t');
        if text.chars().count() > longest || text.chars().any(control) {
            let words = format!("must be at most {longest} characters, none of them control ones");
            self.refuse(name, words);
            return None;
        }
        Some(text)
    }

    fn secret(&mut self, name: &str) -> Option<Secret> {
        let text = self.take(name)?;
        let text = text.trim();
        if text.len() > LONGEST_KEY || text.chars().any(char::is_control) {
            self.refuse(name, format!("must be at most {LONGEST_KEY} bytes, on one line"));
            return None;
        }
        Some(Secret::from(text.to_owned()))
    }

    fn language(&mut self, name: &str) -> Option<Language> {
        let text = self.take(name)?;
        let parsed = Language::try_from(text.trim().to_owned());
        parsed.map_err(|fault| self.refuse(name, fault.to_string())).ok()
    }

    /// What was accepted once is not judged `again`, by settings that may be others now.
    fn callback_url(&mut self, app: &App, again: bool) -> Option<String> {
        let url = self.take("callback_url")?;
        if !again {
            app.callbacks.check(&url).map_err(|words| self.refuse("callback_url", words)).ok()?;
        }
        Some(url)
    }

    fn deadline_s(&mut self) -> Option<u64> {
        let text = self.take("deadline_s")?;
        let seconds = text.trim().parse().ok().filter(|s| (1..=LONGEST_DEADLINE_S).contains(s));
        if seconds.is_none() {
            let words = format!("must be a whole number from 1 to {LONGEST_DEADLINE_S}");
            self.refuse("deadline_s", words);
        }
        seconds
    }

    fn segment_size(&mut self) -> u32 {
        let Some(text) = self.take("segment_size") else { return DEFAULT_SEGMENT_SIZE };
        let number = text.trim().parse().ok().filter(|n| (1..=LARGEST_SEGMENT).contains(n));
        number.unwrap_or_else(|| {
            let words = format!("must be a whole number from 1 to {LARGEST_SEGMENT}");
            self.refuse("segment_size", words);
            DEFAULT_SEGMENT_SIZE
        })
    }

    /// With a format that the text has yet to tell.
    fn options(&mut self, source_file_id: FileId, has_api_key: bool) -> TranslationOptions {
        TranslationOptions {
            source_file_id,
            format: Format::Text,
            source_language: self.language("source_language"),
            target_language: self.language("target_language"),
            model_name: self
                .text("model_name", LONGEST_MODEL_NAME)
                .unwrap_or_else(|| DEFAULT_MODEL.to_owned()),
            style_data: self.text("style_data", LONGEST_STYLE).map(Personal::Known),
            segment_size: self.segment_size(),
            has_api_key,
        }
    }
}
