//! Clerk's deliveries: the signature over the raw bytes first, then a command to an entity, and
//! 2xx only once its events are durable and visible.

use actix_web::http::header::{HeaderName, HeaderValue};
use actix_web::{HttpRequest, HttpResponse, web};
use serde_json::json;

use super::answer;
use super::app::App;
use super::body::{BodyLimits, declared_length, read_whole};
use super::edges::RequestId;
use super::problem::{Code, Problem};
use crate::actors::codec::{Metadata, Source};
use crate::actors::entity::Failure;
use crate::clerk::payload::Envelope;
use crate::clerk::translate::{self, Command};
use crate::domain::session;

/// Clerk's bodies carry whole users with their metadata.
const MAX_BYTES: usize = 1024 * 1024;

/// `POST webhooks/clerk`
pub async fn receive(
    app: web::Data<App>,
    request: HttpRequest,
    request_id: RequestId,
    payload: web::Payload,
) -> Result<HttpResponse, Problem> {
    let verifier = app.webhooks.as_ref().ok_or_else(|| {
        Problem::new(Code::NotReady).with_sentence("CLERK_WEBHOOK_SECRET is not set on this server")
    })?;
    let limits = BodyLimits { json_bytes: MAX_BYTES, ..BodyLimits::of(&request) };
    let body = read_whole(declared_length(&request), payload, limits).await?;
    let now = app.system.clock.now();
    let headers = request.headers().iter().map(|(name, value)| (name.as_str(), value.as_bytes()));
    let message_id = verifier
        .verify(headers, &body, now)
        .map_err(|rejected| Problem::new(Code::WebhookInvalid).caused_by(rejected.to_string()))?;

    let envelope = Envelope::read(&body).map_err(|unusable| unusable.to_string());
    let command = envelope.and_then(|envelope| {
        let made_at = envelope.timestamp.unwrap_or(now);
        let delivery = envelope.into_delivery().map_err(|unusable| unusable.to_string())?;
        translate::command(delivery, made_at).map_err(|unusable| unusable.to_string())
    });
    let mut origin = Metadata::by("clerk", Source::Clerk);
    origin.correlation_id = request_id.0;
    origin.causation_id = Some(message_id.0.clone());
    match command {
        Ok(Some(command)) => execute(&app, command, origin).await,
        Ok(None) => Ok(acknowledged("ignored")),
        // Clerk would send the same again for days; there is nothing in it that we can use.
        Err(why) => {
            tracing::warn!(message_id = message_id.0, why, "a verified delivery is unusable");
            Ok(acknowledged("unusable"))
        }
    }
}

async fn execute(app: &App, command: Command, origin: Metadata) -> Result<HttpResponse, Problem> {
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
    let mut response = acknowledged(if changed { "recorded" } else { "unchanged" });
    let name = HeaderName::from_static("x-log-position");
    response.headers_mut().insert(name, HeaderValue::from(position));
    Ok(response)
}

fn acknowledged(outcome: &str) -> HttpResponse {
    answer::ok(json!({ "received": true, "outcome": outcome }))
}
