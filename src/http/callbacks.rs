//! What became of the callbacks of a job, for its owner.

use actix_web::{HttpResponse, web};
use chrono::{DateTime, Utc};
use serde::Serialize;

use super::answer;
use super::app::App;
use super::caller::Caller;
use super::jobs::{owned, parse_id};
use super::problem::{Code, Problem};
use crate::actors::callbacks::{self, record};

/// The answer to `GET jobs/{id}/callbacks`.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct CallbacksAnswer {
    /// As it was given; null if none was.
    pub callback_url: Option<String>,
    /// One for each time the job has ended: a retry may end it again. The oldest first.
    pub items: Vec<CallbackItem>,
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct CallbackItem {
    /// The `webhook-id`, the same at every attempt.
    pub id: String,
    /// `job.completed`, `job.failed` or `job.cancelled`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub happened_at: DateTime<Utc>,
    pub delivered: bool,
    /// Null once it was delivered or given up.
    pub next_attempt_at: Option<DateTime<Utc>>,
    pub attempts: Vec<CallbackAttempt>,
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct CallbackAttempt {
    pub at: DateTime<Utc>,
    /// Of the answer; null if none came.
    pub status: Option<u16>,
    /// Why none came: `address_refused`, `connection`, `timeout`, `no_answer` or `unsendable`.
    #[schema(value_type = Option<String>)]
    pub error: Option<record::Trouble>,
}

impl From<record::Callback> for CallbackItem {
    fn from(callback: record::Callback) -> Self {
        let attempts = callback.attempts.into_iter();
        Self {
            id: callback.id,
            kind: callback.ending.name(),
            happened_at: callback.happened_at,
            delivered: callback.delivered,
            next_attempt_at: callback.next_attempt_at,
            attempts: attempts
                .map(|it| CallbackAttempt { at: it.at, status: it.status, error: it.error })
                .collect(),
        }
    }
}

/// `GET jobs/{id}/callbacks`
pub async fn list(
    app: web::Data<App>,
    caller: Caller,
    id: web::Path<String>,
) -> Result<HttpResponse, Problem> {
    let row = owned(&app, &caller, parse_id(&id)?)?;
    let unreadable = |error| Problem::new(Code::StorageUnavailable).caused_by(error);
    let callback_url = callbacks::url_of(&app.system, row.job_id).await.map_err(unreadable)?;
    let record = app.callbacks.of_job(row.job_id).await?;
    let found = record.map(|record| record.callbacks).unwrap_or_default();
    let items = found.into_iter().map(CallbackItem::from).collect();
    Ok(answer::ok(CallbacksAnswer { callback_url, items }))
}
