//! Whether the process lives, and whether it can do its work.

use actix_web::{HttpResponse, web};
use serde::Serialize;
use serde_json::json;

use super::answer;
use super::app::App;
use super::problem::{Code, Problem};
use crate::views::Parked;

#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct Health {
    status: &'static str,
    version: &'static str,
}

/// The answer of a server that can do its work.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct Readiness {
    status: &'static str,
    /// The log's last.
    log_position: u64,
    /// The last that the read model has.
    view_position: u64,
}

/// Liveness: answers as long as the process can.
pub async fn health() -> HttpResponse {
    answer::ok(Health { status: "ok", version: env!("CARGO_PKG_VERSION") })
}

/// Readiness: the log takes events and the read model has all of them.
pub async fn ready(app: web::Data<App>) -> Result<HttpResponse, Problem> {
    let not_ready = |why: String| {
        Problem::new(Code::NotReady).with_detail(json!({ "reason": why })).retry_after(1)
    };
    if *app.stopping.borrow() {
        return Err(not_ready("the server is stopping".to_owned()));
    }
    if let Err(error) = app.system.log.writable() {
        tracing::warn!(%error, "not ready");
        return Err(not_ready("the log cannot accept events".to_owned()));
    }
    let reached = app.system.progress.now();
    if let Some(Parked { view, position, .. }) = reached.parked.first() {
        let view = view.as_str();
        return Err(not_ready(format!("the view {view} is parked at position {position}")));
    }
    if reached.stands_still {
        return Err(not_ready(format!("the read model stands still at {}", reached.position)));
    }
    let head = *app.system.log.head().borrow();
    // Under load the read model is always a little behind; a thousand events are one batch.
    if reached.position + 1000 * app.system.log.stride() < head {
        return Err(not_ready(format!("the read model is at {} of {head}", reached.position)));
    }
    if !app.dev_mode && !app.authenticator.has_keys() {
        return Err(not_ready("the keys that verify tokens are not there yet".to_owned()));
    }
    let (log_position, view_position) = (head, reached.position);
    Ok(answer::ok(Readiness { status: "ready", log_position, view_position }))
}

/// `GET /.well-known/jwks.json`: the keys of the development issuer, for verifiers that want to
/// walk the real path without Clerk (RFC 7517).
pub async fn development_keys(app: web::Data<App>) -> Result<HttpResponse, Problem> {
    let keys = app.development_keys.as_ref().ok_or_else(|| Problem::new(Code::NotFound))?;
    Ok(HttpResponse::Ok().json(keys))
}
