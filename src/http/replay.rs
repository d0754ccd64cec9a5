//! The read model built anew from the log, at an administrator's word, while the present one answers.

use actix_web::{HttpResponse, web};
use serde::Serialize;

use super::answer;
use super::app::App;
use super::caller::Caller;
use super::json::{self, Fields, FromFields};
use super::operations::ParkedFacts;
use super::problem::{Code, Problem};
use crate::actors::rebuild::{Refused, Status, Unskippable};
use crate::views;

/// The body of `POST admin/replay`; all of it may be left out.
#[derive(Debug, Default, utoipa::ToSchema)]
pub struct ReplayRequest {
    /// Compare what is read with a replay, row by row, and change nothing.
    pub diff: Option<bool>,
    /// Positions of events to pass over from now on, since no view can take them in.
    pub skip: Option<Vec<u64>>,
}

impl FromFields for ReplayRequest {
    fn from_fields(fields: &mut Fields) -> Self {
        Self { diff: fields.optional_bool("diff"), skip: fields.optional_numbers("skip", 0..=1000) }
    }
}

/// `POST admin/replay`: begins; how far it is, `GET` of the same path tells.
pub async fn start(
    app: web::Data<App>,
    _caller: Caller,
    body: web::Bytes,
) -> Result<HttpResponse, Problem> {
    let request = if body.is_empty() { ReplayRequest::default() } else { json::parse(&body)? };
    let compare = request.diff.unwrap_or(false);
    let skip = request.skip.unwrap_or_default();
    if compare && !skip.is_empty() {
        return Err(Problem::field("skip", "changes what is compared: leave out diff"));
    }
    let status = app.rebuilds.start(compare, &skip).await.map_err(|refused| match refused {
        Refused::UnderWay => {
            Problem::new(Code::Conflict).with_sentence("A replay is under way already")
        }
        Refused::Unskippable(why) => unskippable(why),
        Refused::Io(error) => views::Error::Io(error).into(),
    })?;
    Ok(answer::accepted(status))
}

fn unskippable(why: Unskippable) -> Problem {
    match why {
        Unskippable::Beyond { .. } => {
            Problem::field("skip", "names a position after the log's end")
        }
        Unskippable::Nothing { .. } => Problem::field("skip", "names a position without an event"),
        Unskippable::Readable { .. } => {
            Problem::field("skip", "names an event that can be read, and is not passed over")
        }
        Unskippable::Unknown(error) => Problem::new(Code::InternalError).caused_by(error),
    }
}

/// `GET admin/replay`: the one under way, else the last since the start.
pub async fn status(app: web::Data<App>, _caller: Caller) -> HttpResponse {
    let parked = app.system.progress.now().parked.into_iter().map(ParkedFacts::from).collect();
    answer::ok(ReplayAnswer { replay: app.rebuilds.status(), parked })
}

/// The answer of `GET admin/replay`.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct ReplayAnswer {
    /// Null if there was none since the start.
    pub replay: Option<Status>,
    /// Views that stand still.
    pub parked: Vec<ParkedFacts>,
}
