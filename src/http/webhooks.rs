//! Clerk's deliveries: the signature over the raw bytes first, then a command to an entity, and
//! 2xx only once its events, or the letter about why there are none, are durable.

use actix_web::http::header::{HeaderName, HeaderValue};
use actix_web::{HttpRequest, HttpResponse, web};
use chrono::{DateTime, Utc};
use metrics::counter;
use serde::Serialize;
use serde_json::Value;
use utoipa::openapi::path::Parameter;

use super::answer;
use super::app::App;
use super::body::{BodyLimits, declared_length, read_whole};
use super::edges::RequestId;
use super::openapi::header;
use super::problem::{Code, Problem};
use crate::actors::codec::{Metadata, Source};
use crate::actors::dead_letters::{Heading, Letter};
use crate::actors::entity::Failure;
use crate::clerk::payload::Envelope;
use crate::clerk::translate::{self, Command};
use crate::domain::session;
use crate::telemetry;

/// Clerk's bodies carry whole users with their metadata.
const MAX_BYTES: usize = 1024 * 1024;

/// `POST webhooks/clerk`
pub async fn receive(
    app: web::Data<App>,
    request: HttpRequest,
    request_id: RequestId,
    payload: web::Payload,
) -> Result<HttpResponse, Problem> {
    let counted = |verdict| counter!(telemetry::WEBHOOKS, "verdict" => verdict).increment(1);
    let verifier = app.webhooks.as_ref().ok_or_else(|| {
        counted("failed");
        Problem::new(Code::NotReady).with_sentence("CLERK_WEBHOOK_SECRET is not set on this server")
    })?;
    let limits = BodyLimits { json_bytes: MAX_BYTES, ..BodyLimits::of(&request) };
    let body = read_whole(declared_length(&request), payload, limits).await?;
    let now = app.system.clock.now();
    let headers = request.headers().iter().map(|(name, value)| (name.as_str(), value.as_bytes()));
    let message_id = verifier.verify(headers, &body, now).map_err(|rejected| {
        counted("rejected");
        Problem::new(Code::WebhookInvalid).caused_by(rejected.to_string())
    })?;
    let delivery = Verified { message_id: &message_id.0, body: &body, received_at: now };
    match use_or_keep(&app, delivery, request_id).await {
        Ok(outcome) => {
            counted(outcome.name());
            Ok(acknowledged(&outcome))
        }
        Err(problem) => {
            counted("failed");
            Err(problem)
        }
    }
}

/// A delivery that is Clerk's.
pub struct Verified<'a> {
    pub message_id: &'a str,
    pub body: &'a [u8],
    pub received_at: DateTime<Utc>,
}

/// What became of a delivery.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Its effect, new or not, is at this position.
    Recorded(u64),
    Unchanged(u64),
    /// Its type means nothing to us.
    Ignored,
    /// There is nothing in it that we can use: kept as a dead letter, unless it may carry a
    /// one-time code.
    Unusable(String),
}

impl Outcome {
    pub fn name(&self) -> &'static str {
        match self {
            Self::Recorded(_) => "recorded",
            Self::Unchanged(_) => "unchanged",
            Self::Ignored => "ignored",
            Self::Unusable(_) => "unusable",
        }
    }
}

/// Acts on a delivery, or keeps it for later; one that was kept before and is of use now is kept
/// no longer. The way of every verified delivery and of every retry.
///
/// # Errors
/// Neither was possible: Clerk shall send it again.
pub async fn use_or_keep(
    app: &App,
    delivery: Verified<'_>,
    request_id: RequestId,
) -> Result<Outcome, Problem> {
    let mut origin = Metadata::by("clerk", Source::Clerk);
    origin.correlation_id = request_id.id;
    origin.causation_id = Some(delivery.message_id.to_owned());
    let outcome = match command(&delivery) {
        Ok(Some(command)) => execute(app, command, origin).await?,
        Ok(None) => Outcome::Ignored,
        Err(why) => {
            keep(app, &delivery, &why).await?;
            return Ok(Outcome::Unusable(why));
        }
    };
    app.dead_letters.settle(delivery.message_id).await;
    Ok(outcome)
}

fn command(delivery: &Verified<'_>) -> Result<Option<Command>, String> {
    let envelope = Envelope::read(delivery.body).map_err(|unusable| unusable.to_string())?;
    let made_at = envelope.timestamp.unwrap_or(delivery.received_at);
    let delivery = envelope.into_delivery().map_err(|unusable| unusable.to_string())?;
    translate::command(delivery, made_at).map_err(|unusable| unusable.to_string())
}

/// Clerk would send the same again for days, so it is acknowledged once it is kept.
async fn keep(app: &App, delivery: &Verified<'_>, why: &str) -> Result<(), Problem> {
    let Verified { message_id, body, received_at } = *delivery;
    tracing::warn!(message_id, why, "a verified delivery is unusable");
    if !Envelope::may_be_kept(body) {
        return Ok(());
    }
    let heading = Heading {
        message_id: message_id.to_owned(),
        received_at,
        kind: Envelope::read(body).ok().map(|envelope| envelope.kind),
        reason: why.to_owned(),
    };
    let letter = Letter { heading, body: String::from_utf8_lossy(body).into_owned() };
    app.dead_letters.keep(&letter, app.system.clock.now()).await.map_err(|error| {
        Problem::new(Code::StorageUnavailable)
            .with_sentence("The delivery could not be used, nor kept for later")
            .caused_by(error)
    })
}

async fn execute(app: &App, command: Command, origin: Metadata) -> Result<Outcome, Problem> {
    let (changed, position) = match command {
        Command::User(id, command) => {
            let done = app.system.users.execute(id, command, origin).await?;
            (!done.events.is_empty(), done.position)
        }
        Command::Session(id, command) => {
            match app.system.sessions.execute(id, command, origin).await {
                Ok(done) => (!done.events.is_empty(), done.position),
                // The start came after the end: it changes nothing.
                Err(Failure::Refused(session::Refusal::Ended(_))) => (false, 0),
                Err(failure) => return Err(failure.into()),
            }
        }
    };
    app.system.visible(position).await?;
    Ok(if changed { Outcome::Recorded(position) } else { Outcome::Unchanged(position) })
}

/// What is told of a delivery that was taken.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct Acknowledged {
    pub received: bool,
    /// `recorded`, `unchanged`, `ignored` or, kept as a dead letter, `unusable`.
    pub outcome: &'static str,
}

/// A delivery of Clerk's, as far as it is read; the signature is over its bytes.
#[derive(utoipa::ToSchema)]
#[allow(dead_code, reason = "only its schema is used")]
pub struct Delivery {
    /// Such as `user.created`; unknown ones are acknowledged.
    #[schema(rename = "type")]
    pub kind: String,
    #[schema(value_type = Object)]
    pub data: Value,
}

/// The headers that sign a delivery; each is also read under its name in Standard Webhooks,
/// `webhook-…`.
pub fn signing() -> Vec<Parameter> {
    vec![
        header("svix-id", "The delivery's id, the same at every try."),
        header("svix-timestamp", "Unix seconds; at most five minutes off."),
        header("svix-signature", "`v1,` and base64 of HMAC-SHA256, or several of them."),
    ]
}

/// The answer to Clerk; also to an administrator whose retry was of use.
pub fn acknowledged(outcome: &Outcome) -> HttpResponse {
    let mut response = answer::ok(Acknowledged { received: true, outcome: outcome.name() });
    if let Outcome::Recorded(position) | Outcome::Unchanged(position) = outcome {
        let name = HeaderName::from_static("x-log-position");
        response.headers_mut().insert(name, HeaderValue::from(*position));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_outcome_is_counted_from_zero_on() {
        let unusable = Outcome::Unusable(String::new());
        for outcome in [Outcome::Recorded(1), Outcome::Unchanged(1), Outcome::Ignored, unusable] {
            assert!(telemetry::VERDICTS.contains(&outcome.name()), "{outcome:?}");
        }
    }
}
