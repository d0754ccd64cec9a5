//! Many videos at once, for premium users: each is checked before any is asked for.

use actix_web::{HttpRequest, HttpResponse, web};
use futures_util::future::try_join_all;
use serde::Serialize;
use serde_json::{Map, Value};

use super::answer;
use super::app::App;
use super::caller::Caller;
use super::jobs::{
    JobAnswer, VideoRequest, asked, at_position, fingerprint, idempotency_key, owned, replayed,
    video, was_asked,
};
use super::json::{Fields, FromFields, Json};
use super::problem::Problem;
use crate::actors::entity::Executed;
use crate::domain::ids::{JobId, derived_id};
use crate::domain::job::{Command, Job, Request};
use crate::views::View;

/// The body of `POST videos/batch`.
#[derive(Debug, utoipa::ToSchema)]
pub struct BatchRequest {
    /// 1 to 100, each as for `POST videos/generate`.
    #[schema(min_items = 1, max_items = 100)]
    pub jobs: Vec<VideoRequest>,
}

impl FromFields for BatchRequest {
    /// A hundred of the longest prompts, of four bytes a character, and room for the rest.
    const LARGEST: Option<usize> = Some(2 * 1024 * 1024);

    fn from_fields(fields: &mut Fields) -> Self {
        Self { jobs: fields.objects("jobs", 1..=100) }
    }
}

/// The jobs, in the order of the request.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct BatchAnswer {
    pub jobs: Vec<JobAnswer>,
}

/// `POST videos/batch`
pub async fn generate(
    app: web::Data<App>,
    caller: Caller,
    request: HttpRequest,
    body: Json<BatchRequest>,
) -> Result<HttpResponse, Problem> {
    let key = idempotency_key(&request)?;
    let wanted = requests(&app, &caller, key.as_deref(), body.0).await?;
    let done = execute(&app, &caller, wanted, key.is_some()).await?;
    let position = done.iter().map(|(_, done)| done.position).max().unwrap_or_default();
    app.system.visible_in(View::Jobs, position).await?;
    let shown = |(id, _): &(JobId, Executed<Job>)| {
        owned(&app, &caller, *id).map(|row| JobAnswer::at_request(&row))
    };
    let jobs = done.iter().map(shown).collect::<Result<_, _>>()?;
    let nothing_new = done.iter().all(|(_, done)| done.events.is_empty());
    Ok(replayed(at_position(answer::accepted(BatchAnswer { jobs }), position), nothing_new))
}

/// All of the requests, or every fault in them. Those of a batch that comes again under its key are
/// faults no more: it was checked when it came first.
async fn requests(
    app: &App,
    caller: &Caller,
    key: Option<&str>,
    body: BatchRequest,
) -> Result<Vec<(JobId, Request)>, Problem> {
    let mut faults = Map::new();
    let mut wanted = Vec::with_capacity(body.jobs.len());
    let mut all = Vec::with_capacity(body.jobs.len());
    for (index, body) in body.jobs.into_iter().enumerate() {
        let id = JobId(match key {
            // Of another kind than a single job's, which may have the same key.
            Some(key) => derived_id(&caller.user_id, "batch", &format!("{key}/{index}")),
            None => app.system.clock.fresh_id(),
        });
        let deadline_s = body.deadline_s;
        let (request, found) = video(app, caller, id, body)?;
        all.push(asked(&request, deadline_s));
        wanted.push((id, Request { batch: true, ..request }));
        faults.extend(
            found
                .into_iter()
                .map(|fault| (format!("jobs[{index}].{}", fault.field), Value::from(fault.words))),
        );
    }
    let first = wanted.first().filter(|_| key.is_some()).map(|(id, _)| *id);
    let again = match first {
        Some(first) if !faults.is_empty() => was_asked(app, caller, first).await?,
        _ => false,
    };
    if !faults.is_empty() && !again {
        return Err(Problem::fields(faults));
    }
    if key.is_some() {
        // Of the whole batch: a longer one under the same key is another request too.
        let whole = fingerprint(&Value::from(all));
        for (_, request) in &mut wanted {
            request.fingerprint = Some(whole.clone());
        }
    }
    Ok(wanted)
}

/// Under a key, the first job decides for all whether the key was used for something else; only
/// then may the others be asked for. They are, at the same time.
async fn execute(
    app: &App,
    caller: &Caller,
    wanted: Vec<(JobId, Request)>,
    keyed: bool,
) -> Result<Vec<(JobId, Executed<Job>)>, Problem> {
    let jobs = &app.system.jobs;
    let one = async |(id, request): (JobId, Request)| {
        let (command, origin) = (Command::Request(request), caller.origin());
        let done = match keyed {
            true => jobs.execute(id, command, origin).await?,
            false => jobs.execute_fresh(id, command, origin).await?,
        };
        Ok::<_, Problem>((id, done))
    };
    let mut wanted = wanted.into_iter();
    let mut done = Vec::with_capacity(wanted.len());
    if keyed && let Some(first) = wanted.next() {
        done.push(one(first).await?);
    }
    done.extend(try_join_all(wanted.map(one)).await?);
    Ok(done)
}
