//! What administrators see of the machinery: the events of the log, and how the server is.

use std::collections::BTreeMap;

use actix_web::{HttpRequest, HttpResponse, web};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::answer;
use super::app::App;
use super::lists::{self, PageAnswer, PageQuery};
use super::problem::{Code, Problem};
use crate::actors::records::{self, Order, Question};
use crate::views::Parked;

/// The query of `GET admin/events`.
#[derive(Deserialize, utoipa::IntoParams)]
pub struct Filter {
    /// Only events of this stream, such as `job-…`.
    stream: Option<String>,
    /// Only types that begin so, such as `job.`.
    #[serde(rename = "type")]
    kind: Option<String>,
    /// Those after this position, in the order of the log; the newest first if absent.
    #[param(value_type = Option<u64>)]
    from: Option<String>,
}

/// `GET admin/events?stream=&type=&from=`: the newest first; with `from`, those after that position
/// in the order of the log. A type is a prefix, such as `job.`. A page may be short before the end:
/// `next_cursor` says whether there is more to look at.
pub async fn events(
    app: web::Data<App>,
    request: HttpRequest,
    page: PageQuery<Order>,
) -> Result<HttpResponse, Problem> {
    let Filter { stream, kind, from } = lists::query(&request)?;
    let from = match from.as_deref().map(str::parse) {
        None => Order::default(),
        Some(Ok(position)) => Order::After(position),
        Some(Err(_)) => {
            let fault = Value::from("must be a position of the log");
            return Err(Problem::fields(Map::from_iter([("from".to_owned(), fault)])));
        }
    };
    let question = Question { stream, kind, order: page.cursor.unwrap_or(from), limit: page.limit };
    let found = records::page(app.system.log.as_ref(), &question).await;
    let found = found.map_err(|error| Problem::new(Code::InternalError).caused_by(error))?;
    let next_cursor = found.next.map(|order| order.text());
    Ok(answer::ok(PageAnswer { items: found.events, next_cursor }))
}

/// The answer of `GET admin/system`.
#[derive(Debug, Serialize, ToSchema)]
pub struct SystemAnswer {
    pub version: &'static str,
    pub started_at: DateTime<Utc>,
    pub uptime_s: i64,
    /// The server's clock.
    pub now: DateTime<Utc>,
    pub log: LogFacts,
    pub views: ViewFacts,
    /// How many jobs are in each state; a state without jobs is absent.
    pub jobs: BTreeMap<String, u64>,
    pub actors: ActorFacts,
    pub blobs: BlobFacts,
    /// Of the data directory; absent when the system does not say.
    pub disk: Option<DiskFacts>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct LogFacts {
    /// `embedded`.
    pub engine: String,
    /// The last event's, 0 when there is none.
    pub position: u64,
    pub writable: bool,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct ViewFacts {
    /// The last position applied.
    pub position: u64,
    /// Positions of the log that are not applied yet.
    pub lag: u64,
    /// Those that stand still; the others go on.
    pub parked: Vec<ParkedFacts>,
}

/// A view that stands still at an event that this version cannot take in.
#[derive(Debug, Serialize, ToSchema)]
pub struct ParkedFacts {
    /// `users`, `sessions`, `files` or `jobs`.
    pub view: &'static str,
    pub position: u64,
    pub reason: String,
}

impl From<Parked> for ParkedFacts {
    fn from(parked: Parked) -> Self {
        Self { view: parked.view.as_str(), position: parked.position, reason: parked.reason }
    }
}

/// How many are alive.
#[derive(Debug, Serialize, ToSchema)]
pub struct ActorFacts {
    pub users: usize,
    pub sessions: usize,
    pub files: usize,
    pub jobs: usize,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct BlobFacts {
    /// `file` or `s3`.
    pub store: &'static str,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct DiskFacts {
    pub free_bytes: u64,
    pub total_bytes: u64,
    /// Under a twentieth is free, or under 1 GiB.
    pub scarce: bool,
}

/// `GET admin/system`
pub async fn system(app: web::Data<App>) -> Result<HttpResponse, Problem> {
    let system = &app.system;
    let now = system.clock.now();
    // Before the head, so that the lag is never less than nothing.
    let reached = system.progress.now();
    let position = *system.log.head().borrow();
    let disk = app.blobs.space().ok();
    Ok(answer::ok(SystemAnswer {
        version: env!("CARGO_PKG_VERSION"),
        started_at: app.started_at,
        uptime_s: (now - app.started_at).num_seconds(),
        now,
        log: LogFacts {
            engine: app.log_engine.clone(),
            position,
            writable: system.log.writable().is_ok(),
        },
        views: ViewFacts {
            position: reached.position,
            lag: position.saturating_sub(reached.position),
            parked: reached.parked.into_iter().map(ParkedFacts::from).collect(),
        },
        jobs: system.views.analytics(now)?.jobs,
        actors: ActorFacts {
            users: system.users.alive(),
            sessions: system.sessions.alive(),
            files: system.files.alive(),
            jobs: system.jobs.alive(),
        },
        blobs: BlobFacts { store: if app.blobs.local_root().is_some() { "file" } else { "s3" } },
        disk: disk.map(|space| DiskFacts {
            free_bytes: space.free,
            total_bytes: space.total,
            scarce: space.is_scarce(),
        }),
    }))
}
