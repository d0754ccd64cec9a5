//! Whether the process lives, and whether it can do its work.

use std::sync::atomic::Ordering;

use actix_web::{HttpRequest, HttpResponse, web};
use serde::{Deserialize, Serialize};
use serde_json::json;
use utoipa::openapi::Object;

use super::answer;
use super::app::App;
use super::lists;
use super::openapi::one_of;
use super::problem::{Code, Problem};
use crate::actors::projector::Reached;
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

/// The query of `GET system/ready`.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
pub struct ReadyQuery {
    #[serde(rename = "for")]
    #[param(schema_with = purposes)]
    purpose: Option<String>,
}

const TRAFFIC: &str = "traffic";

fn purposes() -> Object {
    let words = "`traffic`: whether to send requests here, as a balancer asks. What all nodes have in \
                 common, such as a log that takes nothing or an event that no view can take in, is \
                 then no reason against it: reads go on, and each request is told what it cannot have.";
    one_of(words, [TRAFFIC])
}

/// Readiness: the log takes events and the read model has all of them.
pub async fn ready(app: web::Data<App>, request: HttpRequest) -> Result<HttpResponse, Problem> {
    let ReadyQuery { purpose } = lists::query(&request)?;
    let for_traffic = match purpose.as_deref() {
        None => false,
        Some(TRAFFIC) => true,
        Some(_) => return Err(Problem::field("for", "must be traffic")),
    };
    if let Some(why) = unready(&app, for_traffic) {
        if let Err(error) = app.system.log.writable() {
            tracing::warn!(%error, "not ready");
        }
        let problem = Problem::new(Code::NotReady).with_detail(json!({ "reason": why }));
        return Err(problem.retry_after(1));
    }
    let log_position = *app.system.log.head().borrow();
    let view_position = app.system.progress.now().position;
    Ok(answer::ok(Readiness { status: "ready", log_position, view_position }))
}

/// Why no requests should come here, or (unless that is only about traffic) why commands are
/// refused or not seen to be done.
pub(super) fn unready(app: &App, for_traffic: bool) -> Option<String> {
    if *app.stopping.borrow() {
        return Some("the server is stopping".to_owned());
    }
    let reached = app.system.progress.now();
    if !for_traffic && let Some(why) = cannot_work(app, &reached) {
        return Some(why);
    }
    let head = *app.system.log.head().borrow();
    // Under load the read model is always a little behind; a thousand events are one batch.
    let is_behind = reached.position + 1000 * app.system.log.stride() < head;
    app.caught_up.fetch_or(!is_behind, Ordering::Relaxed);
    if is_behind && !(for_traffic && app.caught_up.load(Ordering::Relaxed)) {
        return Some(format!("the read model is at {} of {head}", reached.position));
    }
    let lacks_keys = !app.dev_mode && !app.authenticator.has_keys();
    lacks_keys.then(|| "the keys that verify tokens are not there yet".to_owned())
}

fn cannot_work(app: &App, reached: &Reached) -> Option<String> {
    if app.system.log.writable().is_err() {
        return Some("the log cannot accept events".to_owned());
    }
    if let Some(Parked { view, position, .. }) = reached.parked.first() {
        return Some(format!("the view {} is parked at position {position}", view.as_str()));
    }
    reached.stands_still.then(|| format!("the read model stands still at {}", reached.position))
}

/// `GET /.well-known/jwks.json`: the keys of the development issuer, for verifiers that want to
/// walk the real path without Clerk (RFC 7517).
pub async fn development_keys(app: web::Data<App>) -> Result<HttpResponse, Problem> {
    let keys = app.development_keys.as_ref().ok_or_else(|| Problem::new(Code::NotFound))?;
    Ok(HttpResponse::Ok().json(keys))
}
