//! What operators see from outside: the names of all metrics, in Prometheus' naming, and the one
//! recorder. They are counted where things happen; without a recorder that costs next to nothing. And
//! what servers and workers call an attempt at a job in log lines and traces.

use std::fmt::Display;

use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use tracing::Span;

/// By `method`, `route` (its pattern below the prefix) and `status`.
pub const HTTP_REQUESTS: &str = "t2m_http_requests_total";
/// By `method` and `route`; until the head of the answer is ready.
pub const HTTP_DURATION: &str = "t2m_http_request_duration_seconds";
pub const EVENT_STREAMS: &str = "t2m_event_streams";
/// By `verdict`, one of [`VERDICTS`].
pub const WEBHOOKS: &str = "t2m_webhook_deliveries_total";
pub const VERDICTS: [&str; 6] =
    ["recorded", "unchanged", "ignored", "unusable", "rejected", "failed"];
/// From a decision until its events are durable.
pub const APPEND_DURATION: &str = "t2m_log_append_duration_seconds";
/// By `type`.
pub const EVENTS: &str = "t2m_log_events_appended_total";
/// Of the embedded engine, whose commits take whatever waits.
pub const COMMIT_EVENTS: &str = "t2m_log_commit_events";
pub const COMMIT_DURATION: &str = "t2m_log_commit_duration_seconds";
pub const LOG_POSITION: &str = "t2m_log_position";
/// 1 or 0.
pub const LOG_WRITABLE: &str = "t2m_log_writable";
pub const PROJECTION_POSITION: &str = "t2m_projection_position";
pub const PROJECTION_LAG: &str = "t2m_projection_lag_positions";
/// By `view`: 1 while it stands still.
pub const PROJECTION_PARKED: &str = "t2m_projection_parked";
/// By `kind` of entity.
pub const ACTORS_ALIVE: &str = "t2m_actors_alive";
/// By `kind`: commands that wait in mailboxes or are being executed.
pub const MAILBOX_DEPTH: &str = "t2m_actor_mailbox_depth";
/// By `state`.
pub const JOBS: &str = "t2m_jobs";
pub const LEASES_EXPIRED: &str = "t2m_job_leases_expired_total";
/// By `task`, one of those in the background that are begun anew.
pub const BACKGROUND_PANICS: &str = "t2m_background_panics_total";
pub const BACKGROUND_TASKS: [&str; 10] = [
    "callbacks",
    "dispatcher",
    "erasure",
    "jwks",
    "metadata_sync",
    "projector",
    "renewal",
    "secrets",
    "storekeeper",
    "timekeeper",
];
/// By `purpose`, `work` or `traffic`: 1 while `system/ready` answers 200.
pub const READY: &str = "t2m_ready";
/// Of the disk of the data directory.
pub const DISK_FREE: &str = "t2m_disk_free_bytes";
pub const JWKS_AGE: &str = "t2m_jwks_age_seconds";

const SECONDS: [f64; 14] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
const BATCH: [f64; 11] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0];

/// The recorder of this process; what it gives tells all metrics in Prometheus' text format.
///
/// # Errors
/// There is one already.
pub fn install() -> Result<PrometheusHandle, BuildError> {
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS)?
        .set_buckets_for_metric(Matcher::Full(COMMIT_EVENTS.to_owned()), &BATCH)?
        .install_recorder()?;
    describe();
    begin_at_zero();
    metrics_process::Collector::default().describe();
    Ok(handle)
}

/// The span of all that is done in one attempt at a job. Its lines name the job by it, so that it is
/// there where nothing but errors is told.
pub fn attempt_span(job_id: impl Display, attempt: u32, request_id: Option<&str>) -> Span {
    tracing::error_span!("attempt", %job_id, attempt, request_id)
}

/// What happens rarely is there before it does: a series that begins with 1 has not increased.
fn begin_at_zero() {
    counter!(LEASES_EXPIRED).absolute(0);
    for task in BACKGROUND_TASKS {
        counter!(BACKGROUND_PANICS, "task" => task).absolute(0);
    }
    for verdict in VERDICTS {
        counter!(WEBHOOKS, "verdict" => verdict).absolute(0);
    }
}

fn describe() {
    describe_counter!(HTTP_REQUESTS, "Requests answered");
    describe_histogram!(HTTP_DURATION, Unit::Seconds, "From a request to the head of its answer");
    describe_gauge!(EVENT_STREAMS, "Event streams that are open");
    describe_counter!(WEBHOOKS, "Deliveries of Clerk's, by what became of them");
    describe_histogram!(APPEND_DURATION, Unit::Seconds, "From a decision to its events durable");
    describe_counter!(EVENTS, "Events made durable by this node");
    describe_histogram!(COMMIT_EVENTS, "Events in one commit of the embedded log");
    describe_histogram!(COMMIT_DURATION, Unit::Seconds, "One commit of the embedded log");
    describe_gauge!(LOG_POSITION, "The log's last position");
    describe_gauge!(LOG_WRITABLE, "Whether the log takes events");
    describe_gauge!(PROJECTION_POSITION, "The last position in the read model");
    describe_gauge!(PROJECTION_LAG, "How far the read model is behind the log");
    describe_gauge!(PROJECTION_PARKED, "Whether a view stands still at an event");
    describe_gauge!(ACTORS_ALIVE, "Entities in memory");
    describe_gauge!(MAILBOX_DEPTH, "Commands that wait for their entity or are being executed");
    describe_gauge!(JOBS, "Jobs in each state");
    describe_counter!(LEASES_EXPIRED, "Leases whose worker was not heard of any more");
    describe_counter!(BACKGROUND_PANICS, "Panics of background tasks, which were begun anew");
    describe_gauge!(READY, "Whether this node can do all its work, and whether it takes traffic");
    describe_gauge!(DISK_FREE, Unit::Bytes, "Free on the disk of the data directory");
    describe_gauge!(JWKS_AGE, Unit::Seconds, "Since Clerk's keys were last fetched");
}
