//! How much is used, for administrators.

use std::collections::BTreeMap;

use actix_web::{HttpResponse, web};
use chrono::{DateTime, Utc};
use serde::Serialize;
use utoipa::ToSchema;

use super::answer;
use super::app::App;
use super::problem::Problem;
use crate::views;

/// The answer of `GET admin/analytics`; days and months are those of UTC.
#[derive(Debug, Serialize, ToSchema)]
pub struct AnalyticsAnswer {
    pub as_of: DateTime<Utc>,
    pub users: UserCounts,
    pub jobs: JobCounts,
    /// The length of all videos ever completed.
    pub seconds_rendered: f64,
    /// Files that are there, made or uploaded.
    pub files: u64,
    /// Their sizes together; equal bytes count for each file.
    pub bytes_stored: u64,
    /// The last 30, the oldest first.
    pub days: Vec<DayCounts>,
    /// The last 12, the oldest first.
    pub months: Vec<MonthCounts>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct UserCounts {
    /// Without those who were deleted.
    pub total: u64,
    /// With a session that was active within a day.
    pub active_1d: u64,
    pub active_7d: u64,
    pub active_30d: u64,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct JobCounts {
    /// A state without jobs is absent.
    pub by_state: BTreeMap<String, u64>,
    /// Jobs that failed for good, whether or not they were tried again by their user:
    /// `attempts_exhausted`, `not_retryable`, `worker_lost` or `other`.
    pub failures: BTreeMap<String, u64>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct DayCounts {
    #[schema(example = "2026-11-21")]
    pub day: String,
    #[serde(flatten)]
    pub counts: Counts,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct MonthCounts {
    #[schema(example = "2026-11")]
    pub month: String,
    #[serde(flatten)]
    pub counts: Counts,
}

/// What happened in a day or a month.
#[derive(Debug, Serialize, ToSchema)]
pub struct Counts {
    /// Jobs that were asked for in it.
    pub jobs: u64,
    /// Jobs that ended in it.
    pub completed: u64,
    pub failed: u64,
    pub cancelled: u64,
    pub seconds_rendered: f64,
}

/// `GET admin/analytics`
pub async fn analytics(app: web::Data<App>) -> Result<HttpResponse, Problem> {
    let as_of = app.system.clock.now();
    let found = app.system.views.analytics(as_of)?;
    let [active_1d, active_7d, active_30d] = found.active;
    Ok(answer::ok(AnalyticsAnswer {
        as_of,
        users: UserCounts { total: found.users, active_1d, active_7d, active_30d },
        jobs: JobCounts { by_state: found.jobs, failures: found.failures },
        seconds_rendered: found.seconds_rendered,
        files: found.files,
        bytes_stored: found.bytes_stored,
        days: periods(found.days, |day, counts| DayCounts { day, counts }),
        months: periods(found.months, |month, counts| MonthCounts { month, counts }),
    }))
}

/// The months of `me`, in which anything happened.
pub fn months(found: Vec<views::Period>) -> Vec<MonthCounts> {
    periods(found, |month, counts| MonthCounts { month, counts })
}

fn periods<T>(found: Vec<views::Period>, named: impl Fn(String, Counts) -> T) -> Vec<T> {
    let counts = |period: &views::Period| Counts {
        jobs: period.requested,
        completed: period.completed,
        failed: period.failed,
        cancelled: period.cancelled,
        seconds_rendered: period.seconds_rendered,
    };
    found
        .into_iter()
        .map(|period| {
            let counts = counts(&period);
            named(period.name, counts)
        })
        .collect()
}
