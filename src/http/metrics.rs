//! `GET /metrics`: what has been counted, and what is as of now, in Prometheus' text format.

use actix_web::{HttpResponse, web};
use metrics::gauge;

use super::app::App;
use super::health;
use super::problem::Problem;
use crate::domain::{Aggregate, file::File, job::Job, session::Session, user::User};
use crate::telemetry;
use crate::views::View;

/// Each is told even when there is none, so that an alert can tell none from unknown.
const STATES: [&str; 7] =
    ["queued", "running", "retry_wait", "cancelling", "completed", "failed", "cancelled"];

pub async fn metrics(app: web::Data<App>) -> Result<HttpResponse, Problem> {
    let system = &app.system;
    let head = *system.log.head().borrow();
    let reached = system.progress.now();
    gauge!(telemetry::LOG_POSITION).set(head as f64);
    gauge!(telemetry::LOG_WRITABLE).set(f64::from(u8::from(system.log.writable().is_ok())));
    gauge!(telemetry::PROJECTION_POSITION).set(reached.position as f64);
    gauge!(telemetry::PROJECTION_LAG).set(head.saturating_sub(reached.position) as f64);
    for view in View::ALL {
        let parked = reached.parked.iter().any(|parked| parked.view == view);
        gauge!(telemetry::PROJECTION_PARKED, "view" => view.as_str())
            .set(f64::from(u8::from(parked)));
    }
    let entities = [
        (User::CATEGORY, system.users.alive(), system.users.waiting()),
        (Session::CATEGORY, system.sessions.alive(), system.sessions.waiting()),
        (File::CATEGORY, system.files.alive(), system.files.waiting()),
        (Job::CATEGORY, system.jobs.alive(), system.jobs.waiting()),
    ];
    for (kind, alive, waiting) in entities {
        gauge!(telemetry::ACTORS_ALIVE, "kind" => kind).set(alive as f64);
        gauge!(telemetry::MAILBOX_DEPTH, "kind" => kind).set(waiting as f64);
    }
    match system.views.jobs_by_state() {
        Ok(jobs) => {
            for state in STATES {
                let count = jobs.get(state).copied().unwrap_or_default();
                gauge!(telemetry::JOBS, "state" => state).set(count as f64);
            }
        }
        // All else is told still, above all that the read model stands still.
        Err(error) => {
            tracing::warn!(%error, "the jobs could not be counted");
            for state in STATES {
                gauge!(telemetry::JOBS, "state" => state).set(f64::NAN);
            }
        }
    }
    for (purpose, for_traffic) in [("work", false), ("traffic", true)] {
        let ready = health::unready(&app, for_traffic).is_none();
        gauge!(telemetry::READY, "purpose" => purpose).set(f64::from(u8::from(ready)));
    }
    if let Ok(disk) = app.blobs.space() {
        gauge!(telemetry::DISK_FREE).set(disk.free as f64);
    }
    gauge!(telemetry::EVENT_STREAMS).set(system.news.followers() as f64);
    if let Some(age) = app.authenticator.keys_age(system.clock.now().timestamp()) {
        gauge!(telemetry::JWKS_AGE).set(age as f64);
    }
    metrics_process::Collector::default().collect();
    let text = app.metrics.as_ref().map(|metrics| metrics.render()).unwrap_or_default();
    Ok(HttpResponse::Ok().content_type("text/plain; version=0.0.4; charset=utf-8").body(text))
}
