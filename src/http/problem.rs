//! The one table of code → status → sentence, and the form of every error (CONTRACT.md §2). What
//! caused it is for our log only.

use std::{borrow::Cow, error::Error as StdError, fmt};

use actix_web::{
    HttpResponse, ResponseError,
    http::{
        StatusCode,
        header::{self, HeaderName, HeaderValue},
    },
};
use serde_json::{Map, Value, json};

use crate::actors::entity::Failure;
use crate::actors::leasing;
use crate::actors::projector::NotCaughtUp;
use crate::domain::session::EndReason;
use crate::domain::{file, job, session, user};
use crate::media::{blobs, signed_url};
use crate::views;

/// What a client may branch on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Code {
    MalformedRequest,
    InvalidJson,
    MissingBody,
    MultipartInvalid,
    LinkMalformed,
    WebhookInvalid,
    Unauthenticated,
    TokenInvalid,
    TokenExpired,
    SessionEnded,
    Forbidden,
    SessionPending,
    RoleRequired,
    PermissionRequired,
    PremiumRequired,
    OnboardingRequired,
    InvalidOrigin,
    LinkSignatureInvalid,
    NotFound,
    MethodNotAllowed,
    RequestTimeout,
    Conflict,
    JobNotCompleted,
    LeaseLost,
    UploadOffsetMismatch,
    LinkExpired,
    PreconditionFailed,
    PayloadTooLarge,
    QuotaExceeded,
    UnsupportedMediaType,
    RangeNotSatisfiable,
    ValidationFailed,
    OutputMissing,
    IdempotencyKeyReused,
    UploadBusy,
    RateLimited,
    ChecksumMismatch,
    TooManyStreams,
    InternalError,
    LogUnavailable,
    StorageUnavailable,
    StorageFull,
    Overloaded,
    NotReady,
    NotCaughtUp,
    KeysUnavailable,
}

impl Code {
    /// The table: the code as it stands in the body (stable), its status, and the sentence said
    /// when there is nothing more exact to say.
    fn row(self) -> (&'static str, u16, &'static str) {
        match self {
            Code::MalformedRequest => ("malformed_request", 400, "The request is malformed"),
            Code::InvalidJson => ("invalid_json", 400, "The request body is not valid JSON"),
            Code::MissingBody => ("missing_body", 400, "The request needs a body"),
            Code::MultipartInvalid => ("multipart_invalid", 400, "The multipart body is malformed"),
            Code::LinkMalformed => {
                ("link_malformed", 400, "The link lacks a parameter, or one is not a number")
            }
            Code::WebhookInvalid => {
                ("webhook_invalid", 400, "The webhook's signature could not be verified")
            }
            Code::Unauthenticated => ("unauthenticated", 401, "Authentication is required"),
            Code::TokenInvalid => ("token_invalid", 401, "The token is not valid"),
            Code::TokenExpired => ("token_expired", 401, "Token has expired"),
            Code::SessionEnded => ("session_ended", 401, "The session has ended"),
            Code::Forbidden => ("forbidden", 403, "This is not allowed"),
            Code::SessionPending => {
                ("session_pending", 403, "The session has tasks left to complete")
            }
            Code::RoleRequired => ("role_required", 403, "Another role is required"),
            Code::PermissionRequired => ("permission_required", 403, "A permission is missing"),
            Code::PremiumRequired => {
                ("premium_required", 403, "A premium subscription is required")
            }
            Code::OnboardingRequired => {
                ("onboarding_required", 403, "Onboarding has to be completed first")
            }
            Code::InvalidOrigin => {
                ("invalid_origin", 403, "Requests from this origin are not allowed")
            }
            Code::LinkSignatureInvalid => {
                ("link_signature_invalid", 403, "The link's signature is not valid")
            }
            Code::NotFound => ("not_found", 404, "Not found"),
            Code::MethodNotAllowed => ("method_not_allowed", 405, "The method is not allowed here"),
            Code::RequestTimeout => {
                ("request_timeout", 408, "The request body did not arrive in time")
            }
            Code::Conflict => ("conflict", 409, "This conflicts with the present state"),
            Code::JobNotCompleted => ("job_not_completed", 409, "The job is not completed"),
            Code::LeaseLost => ("lease_lost", 409, "The lease is no longer held"),
            Code::UploadOffsetMismatch => {
                ("upload_offset_mismatch", 409, "The upload is at another offset")
            }
            Code::LinkExpired => ("link_expired", 410, "The link has expired"),
            Code::PreconditionFailed => {
                ("precondition_failed", 412, "A condition of the request does not hold")
            }
            Code::PayloadTooLarge => ("payload_too_large", 413, "The request body is too large"),
            Code::QuotaExceeded => {
                ("quota_exceeded", 413, "There is not enough room left for this file")
            }
            Code::UnsupportedMediaType => {
                ("unsupported_media_type", 415, "The media type is not supported")
            }
            Code::RangeNotSatisfiable => {
                ("range_not_satisfiable", 416, "The range lies outside the file")
            }
            Code::ValidationFailed => ("validation_failed", 422, "Some fields are not valid"),
            Code::OutputMissing => {
                ("output_missing", 422, "The job's output has not been handed in under this lease")
            }
            Code::IdempotencyKeyReused => (
                "idempotency_key_reused",
                422,
                "The idempotency key was used before with another body",
            ),
            Code::UploadBusy => ("upload_busy", 423, "Another request is using the upload"),
            // A status of tus's own.
            Code::ChecksumMismatch => {
                ("checksum_mismatch", 460, "The bytes are not those that the checksum is of")
            }
            Code::RateLimited => ("rate_limited", 429, "Too many requests"),
            Code::TooManyStreams => {
                ("too_many_streams", 429, "This user has too many event streams open")
            }
            Code::InternalError => ("internal_error", 500, "Something went wrong on our side"),
            Code::LogUnavailable => {
                ("log_unavailable", 503, "Nothing can be recorded at the moment")
            }
            Code::StorageUnavailable => {
                ("storage_unavailable", 503, "Files cannot be stored or read at the moment")
            }
            Code::StorageFull => {
                ("storage_full", 503, "This server has no room left for uploads at the moment")
            }
            Code::Overloaded => ("overloaded", 503, "The server is overloaded"),
            Code::NotReady => ("not_ready", 503, "The server is not ready yet"),
            Code::NotCaughtUp => {
                ("not_caught_up", 503, "This node has not yet seen the position asked for")
            }
            Code::KeysUnavailable => {
                ("keys_unavailable", 503, "Tokens cannot be verified at the moment")
            }
        }
    }

    /// As it stands in the body; stable.
    pub fn name(self) -> &'static str {
        self.row().0
    }

    /// The sentence said when there is nothing more exact to say.
    pub fn sentence(self) -> &'static str {
        self.row().2
    }

    /// The status this code is answered with.
    pub fn status(self) -> StatusCode {
        StatusCode::from_u16(self.row().1).expect("the table holds real statuses")
    }
}

/// An error on its way to a caller.
pub struct Problem(Box<Inner>);

struct Inner {
    code: Code,
    sentence: Cow<'static, str>,
    detail: Map<String, Value>,
    at_top: bool,
    headers: Vec<(HeaderName, HeaderValue)>,
    cause: Option<Box<dyn StdError + Send + Sync>>,
}

impl Problem {
    /// The problem as the table words it.
    pub fn new(code: Code) -> Self {
        let headers = standing_headers(code);
        let sentence = Cow::Borrowed(code.sentence());
        let detail = Map::new();
        Self(Box::new(Inner { code, sentence, detail, at_top: false, headers, cause: None }))
    }

    /// 401 for a token past its time, both in Unix seconds; the seeds' clients read the fields at
    /// the top level, others in `detail`.
    pub fn token_expired(expired_at: i64, now: i64) -> Self {
        let mut problem = Self::new(Code::TokenExpired).with_detail(json!({
            "requires_refresh": true,
            "expired_at": expired_at,
            "current_time": now,
            "expired_seconds_ago": now.saturating_sub(expired_at),
        }));
        problem.0.at_top = true;
        problem
    }

    /// 401 of a session that has ended; why is told in both places too.
    pub fn session_ended(reason: EndReason) -> Self {
        let detail = json!({ "reason": reason.as_str() });
        let mut problem = Self::new(Code::SessionEnded).with_detail(detail);
        problem.0.at_top = true;
        problem
    }

    /// 422 for one field.
    pub fn field(name: &str, words: &str) -> Self {
        Self::fields(Map::from_iter([(name.to_owned(), Value::from(words))]))
    }

    /// 422 for several fields, each with what it must be.
    pub fn fields(fields: Map<String, Value>) -> Self {
        let words: Vec<String> = fields
            .iter()
            .map(|(name, words)| format!("{name} {}", words.as_str().unwrap_or("is not valid")))
            .collect();
        let sentence = format!("Some fields are not valid: {}", words.join("; "));
        Self::new(Code::ValidationFailed)
            .with_sentence(sentence)
            .with_detail(json!({ "fields": fields }))
    }

    /// 405, naming the methods that are allowed.
    pub fn method_not_allowed(allow: &str) -> Self {
        let value = HeaderValue::from_str(allow).unwrap_or(HeaderValue::from_static(""));
        Self::new(Code::MethodNotAllowed).with_header(header::ALLOW, value)
    }

    /// Adds to `detail`; anything but an object is ignored.
    pub fn with_detail(mut self, detail: Value) -> Self {
        if let Value::Object(detail) = detail {
            self.0.detail.extend(detail);
        }
        self
    }

    /// Says it more exactly than the table.
    pub fn with_sentence(mut self, sentence: impl Into<Cow<'static, str>>) -> Self {
        self.0.sentence = sentence.into();
        self
    }

    /// Sets a header of the answer.
    pub fn with_header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.0.headers.retain(|(present, _)| *present != name);
        self.0.headers.push((name, value));
        self
    }

    /// When to come again, in seconds: a header, and in `detail`.
    pub fn retry_after(self, seconds: u64) -> Self {
        self.with_header(header::RETRY_AFTER, seconds.into())
            .with_detail(json!({ "retry_after": seconds }))
    }

    /// Keeps the cause for the log; it never reaches the caller.
    pub fn caused_by(mut self, cause: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.0.cause = Some(cause.into());
        self
    }

    /// What a client may branch on.
    pub fn code(&self) -> Code {
        self.0.code
    }

    /// What our log may say about it, causes included.
    pub fn cause(&self) -> Option<String> {
        let mut next: Option<&dyn StdError> = Some(self.0.cause.as_deref()?);
        let mut words = Vec::new();
        while let Some(error) = next {
            words.push(error.to_string());
            next = error.source();
        }
        Some(words.join(": "))
    }

    /// The body of the answer.
    pub fn body(&self) -> Value {
        let Inner { code, sentence, detail, at_top, .. } = &*self.0;
        let mut body = json!({
            "success": false,
            "error": sentence,
            "message": sentence,
            "code": code.name(),
            "detail": detail,
        });
        if let (true, Value::Object(body)) = (at_top, &mut body) {
            body.extend(detail.clone());
        }
        body
    }
}

impl ResponseError for Problem {
    fn status_code(&self) -> StatusCode {
        self.0.code.status()
    }

    fn error_response(&self) -> HttpResponse {
        let mut response = HttpResponse::build(self.status_code());
        for (name, value) in &self.0.headers {
            response.insert_header((name.clone(), value.clone()));
        }
        // The rest of the body will not be read, so the connection cannot be used again.
        let unread = [Code::RequestTimeout, Code::PayloadTooLarge, Code::QuotaExceeded];
        if unread.contains(&self.0.code) {
            response.force_close();
        }
        response.json(self.body())
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.0.code.name(), self.0.sentence)
    }
}

impl fmt::Debug for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Problem({self}, caused by {:?})", self.cause())
    }
}

impl StdError for Problem {}

impl From<NotCaughtUp> for Problem {
    fn from(_: NotCaughtUp) -> Self {
        Self::new(Code::NotCaughtUp).retry_after(1)
    }
}

impl From<views::Error> for Problem {
    fn from(error: views::Error) -> Self {
        Self::new(Code::InternalError).caused_by(error)
    }
}

impl<R: StdError + Into<Problem>> From<Failure<R>> for Problem {
    fn from(failure: Failure<R>) -> Self {
        match failure {
            Failure::Refused(refusal) => refusal.into(),
            Failure::Overloaded => Self::new(Code::Overloaded).retry_after(1),
            Failure::Unavailable(error) => {
                Self::new(Code::LogUnavailable).retry_after(5).caused_by(error)
            }
            Failure::Conflict(error) => Self::new(Code::Overloaded).retry_after(1).caused_by(error),
            Failure::Log(error) => Self::new(Code::InternalError).caused_by(error),
            Failure::Keys(error) => {
                Self::new(Code::StorageUnavailable).retry_after(5).caused_by(error)
            }
            Failure::Codec(error) => Self::new(Code::InternalError).caused_by(error),
        }
    }
}

impl From<user::Refusal> for Problem {
    fn from(refusal: user::Refusal) -> Self {
        match refusal {
            user::Refusal::NotFound | user::Refusal::Deleted => Self::new(Code::NotFound),
        }
    }
}

impl From<session::Refusal> for Problem {
    fn from(refusal: session::Refusal) -> Self {
        match refusal {
            session::Refusal::NotFound => Self::new(Code::NotFound),
            session::Refusal::Ended(reason) => Self::session_ended(reason),
        }
    }
}

impl From<file::Refusal> for Problem {
    fn from(refusal: file::Refusal) -> Self {
        match refusal {
            file::Refusal::NotFound => Self::new(Code::NotFound),
            file::Refusal::KeyReused => Self::new(Code::IdempotencyKeyReused),
        }
    }
}

impl From<job::Refusal> for Problem {
    fn from(refusal: job::Refusal) -> Self {
        match refusal {
            job::Refusal::NotFound => Self::new(Code::NotFound),
            job::Refusal::KeyReused => Self::new(Code::IdempotencyKeyReused),
            job::Refusal::LeaseLost => Self::new(Code::LeaseLost),
            job::Refusal::SecretGone => Self::new(Code::Conflict).with_sentence(
                "The job's api_key was destroyed when it ended: ask for a new translation",
            ),
            job::Refusal::DeadlineOver => Self::new(Code::Conflict)
                .with_sentence("The job's deadline has passed: ask for a new job"),
            job::Refusal::NotLeasable(state) | job::Refusal::WrongState(state) => {
                Self::new(Code::Conflict).with_detail(json!({ "state": state }))
            }
        }
    }
}

impl From<leasing::Error> for Problem {
    fn from(error: leasing::Error) -> Self {
        match error {
            leasing::Error::Job(failure) => failure.into(),
            leasing::Error::File(failure) => failure.into(),
            leasing::Error::Blobs(error) => error.into(),
            leasing::Error::Views(error) => error.into(),
            leasing::Error::OutputMissing(name) => {
                Self::new(Code::OutputMissing).with_detail(json!({ "output": name }))
            }
        }
    }
}

impl From<signed_url::Refused> for Problem {
    fn from(refused: signed_url::Refused) -> Self {
        Self::new(match refused {
            signed_url::Refused::Malformed => Code::LinkMalformed,
            signed_url::Refused::Expired => Code::LinkExpired,
            signed_url::Refused::SignatureInvalid => Code::LinkSignatureInvalid,
        })
    }
}

impl From<blobs::Error> for Problem {
    fn from(error: blobs::Error) -> Self {
        let code = match error {
            blobs::Error::NotFound => Code::NotFound,
            blobs::Error::WriterBroken => Code::InternalError,
            blobs::Error::Store(_) | blobs::Error::Io(_) => Code::StorageUnavailable,
        };
        Self::new(code).caused_by(error)
    }
}

fn standing_headers(code: Code) -> Vec<(HeaderName, HeaderValue)> {
    // RFC 6750 §3.1: a request without any credentials gets the challenge without an error code.
    let challenge = match code {
        Code::Unauthenticated => "Bearer realm=\"t2m\"".to_owned(),
        _ => format!(
            "Bearer realm=\"t2m\", error=\"invalid_token\", error_description=\"{}\"",
            code.sentence()
        ),
    };
    match code.row().1 {
        401 => HeaderValue::try_from(challenge)
            .map(|value| vec![(header::WWW_AUTHENTICATE, value)])
            .expect("the table's sentences are plain ASCII"),
        503 => vec![(header::RETRY_AFTER, HeaderValue::from_static("1"))],
        _ => Vec::new(),
    }
}

#[cfg(test)]
#[path = "problem_tests.rs"]
mod tests;
