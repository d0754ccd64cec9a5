//! Live event streams (Server-Sent Events, WHATWG HTML section 9.2): what the read model's feed
//! holds after a position, then whatever comes, without loss or repetition.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use actix_web::web::Bytes;
use actix_web::{HttpRequest, HttpResponse, web};
use futures_util::stream;
use serde_json::json;
use tokio::time::Instant;
use utoipa::openapi::path::Parameter;

use super::app::App;
use super::caller::Caller;
use super::jobs;
use super::openapi::{header_of, position};
use super::problem::{Code, Problem};
use crate::actors::news::Subscription;
use crate::domain::ids::{JobId, SessionId, UserId};
use crate::views::{FeedItem, SessionStanding};

/// A comment this often keeps proxies from closing a silent stream; also how long news that was
/// missed can stay so.
const HEARTBEAT: Duration = Duration::from_secs(15);
pub const MEDIA_TYPE: &str = "text/event-stream";
/// What a client is told that goes on from a position beyond the log's end.
const RESET: &str = "reset";
/// Items read at once.
const PAGE: usize = 256;

/// `GET jobs/{id}/events`: the job's whole story, then its next chapters.
pub async fn of_job(
    app: web::Data<App>,
    caller: Caller,
    request: HttpRequest,
    id: web::Path<String>,
) -> Result<HttpResponse, Problem> {
    let job = jobs::owned(&app, &caller, jobs::parse_id(&id)?)?;
    let begin = Begin::of(&app, &request, true).await?;
    Ok(respond(Stream::new(app.into_inner(), &caller, Some(job.job_id), begin)?))
}

/// `GET events`: everything of the caller's from now on, or from where it left off.
pub async fn of_user(
    app: web::Data<App>,
    caller: Caller,
    request: HttpRequest,
) -> Result<HttpResponse, Problem> {
    let begin = Begin::of(&app, &request, false).await?;
    Ok(respond(Stream::new(app.into_inner(), &caller, None, begin)?))
}

/// What an event stream may be asked with.
pub fn resuming() -> Vec<Parameter> {
    let words = "The last `id:` that was seen: what happened after it comes, without loss or \
                 repetition. One beyond the log's end, as after the restore of an older backup, \
                 brings an event `reset`: what was read before is to be read again, and the stream \
                 goes on as one without this header.";
    vec![header_of("Last-Event-ID", words, position())]
}

/// The position after which to go on; a browser's `EventSource` sends the last `id:` it saw.
fn resume_after(request: &HttpRequest) -> Result<Option<u64>, Problem> {
    let Some(value) = request.headers().get("last-event-id") else { return Ok(None) };
    let position = value.to_str().ok().and_then(|text| text.trim().parse().ok());
    position.map(Some).ok_or_else(|| {
        Problem::new(Code::MalformedRequest).with_sentence("Last-Event-ID is not a position")
    })
}

/// Where a stream begins, and how that came.
struct Begin {
    after: u64,
    begun: Begun,
}

#[derive(Clone, Copy)]
enum Begun {
    /// With what comes from now on.
    Present,
    /// Where the client left off, or at the beginning.
    Elsewhere,
    /// As if for the first time: the client goes on from a position that this log does not have.
    Anew,
}

impl Begin {
    /// Where the client left off, else at the present, or for one job at its beginning.
    async fn of(app: &App, request: &HttpRequest, is_of_job: bool) -> Result<Self, Problem> {
        let present = || app.system.progress.now().position;
        let Some(after) = resume_after(request)? else {
            return Ok(match is_of_job {
                true => Self { after: 0, begun: Begun::Elsewhere },
                false => Self { after: present(), begun: Begun::Present },
            });
        };
        // This node may only be behind. If not, nothing would ever follow that position; and a
        // refusal would make a browser's `EventSource` give up for good.
        let is_beyond = app.system.visible(after).await.is_err()
            && app.system.log.end().await.is_ok_and(|end| after > end);
        Ok(match is_beyond {
            true => Self { after: if is_of_job { 0 } else { present() }, begun: Begun::Anew },
            false => Self { after, begun: Begun::Elsewhere },
        })
    }
}

fn respond(stream: Stream) -> HttpResponse {
    HttpResponse::Ok()
        .content_type("text/event-stream; charset=utf-8")
        .insert_header(("Cache-Control", "no-cache, no-transform"))
        .insert_header(("X-Accel-Buffering", "no"))
        .streaming(stream::unfold(stream, Stream::next))
}

/// Said before the server stops: whoever follows is to ask again, of this address, a second later
/// and with its `Last-Event-ID`.
const COME_BACK: Bytes = Bytes::from_static(b"retry: 1000\n: the server restarts\n\n");

struct Stream {
    app: Arc<App>,
    user_id: UserId,
    session_id: Option<SessionId>,
    job_id: Option<JobId>,
    /// Up to here the client has been told everything.
    after: u64,
    begun: Begun,
    ready: VecDeque<FeedItem>,
    subscription: Subscription,
    /// When the client is to hear something again.
    heartbeat: Instant,
    greeted: bool,
    /// It has been told to come back.
    left: bool,
}

impl Stream {
    /// Follows the caller from now on, so that nothing slips in between a look and the wait.
    ///
    /// # Errors
    /// 429 when the caller has too many streams open.
    fn new(
        app: Arc<App>,
        caller: &Caller,
        job_id: Option<JobId>,
        begin: Begin,
    ) -> Result<Self, Problem> {
        let most = app.streams_per_user;
        let subscription = app.system.news.follow(&caller.user_id, most).map_err(|_| {
            Problem::new(Code::TooManyStreams)
                .retry_after(HEARTBEAT.as_secs())
                .with_detail(json!({ "limit": most }))
        })?;
        Ok(Self {
            app,
            user_id: caller.user_id.clone(),
            session_id: caller.session_id.clone(),
            job_id,
            after: begin.after,
            begun: begin.begun,
            ready: VecDeque::new(),
            subscription,
            heartbeat: Instant::now() + HEARTBEAT,
            greeted: false,
            left: false,
        })
    }

    /// The next bytes, and the stream after them; none when the session or the server ends.
    async fn next(mut self) -> Option<(Result<Bytes, std::io::Error>, Self)> {
        if !self.greeted {
            self.greeted = true;
            return Some((Ok(self.greeting()), self));
        }
        let mut stopping = self.app.stopping.clone();
        loop {
            if self.is_over() || self.left {
                return None;
            }
            if *stopping.borrow_and_update() {
                self.left = true;
                return Some((Ok(COME_BACK), self));
            }
            if self.ready.is_empty()
                && let Err(error) = self.fill()
            {
                tracing::error!(%error, "an event stream could not read the feed");
                return None;
            }
            if let Some(item) = self.ready.pop_front() {
                self.after = item.position;
                self.heartbeat = Instant::now() + HEARTBEAT;
                return Some((Ok(frame(&item)), self));
            }
            // Room for a page of items is not kept through a long silence.
            self.ready = VecDeque::new();
            tokio::select! {
                () = self.subscription.news() => {}
                _ = stopping.changed() => {}
                () = tokio::time::sleep_until(self.heartbeat) => {
                    self.heartbeat = Instant::now() + HEARTBEAT;
                    return Some((Ok(Bytes::from_static(b": heartbeat\n\n")), self));
                }
            }
        }
    }

    /// Something at once, so that the client knows that it is connected. One that begins at the present
    /// is told where that is: cut off before its first item, it goes on from there. An `id:` without data
    /// is no event, yet a browser keeps it (HTML, 9.2.6); nobody else is sent one, for simple clients
    /// take whatever has an id for an event.
    fn greeting(&self) -> Bytes {
        let after = self.after;
        match self.begun {
            Begun::Present => Bytes::from(format!(": connected\nid: {after}\n\n")),
            Begun::Elsewhere => Bytes::from_static(b": connected\n\n"),
            Begun::Anew => {
                let data = json!({ "type": RESET }).to_string();
                frame(&FeedItem { position: after, event: RESET.to_owned(), data })
            }
        }
    }

    fn fill(&mut self) -> Result<(), crate::views::Error> {
        let views = &self.app.system.views;
        let items = match &self.job_id {
            Some(job_id) => views.feed_of_job(job_id, self.after, PAGE)?,
            None => views.feed_of_user(&self.user_id, self.after, PAGE)?,
        };
        self.ready.extend(items);
        Ok(())
    }

    /// An ended session is refused on its open streams too.
    fn is_over(&self) -> bool {
        let views = &self.app.system.views;
        let ended = self.session_id.as_ref().is_some_and(|id| {
            matches!(views.session_standing(id), Some(SessionStanding::Ended(_)))
        });
        ended || views.user_standing(&self.user_id).is_some_and(|user| user.deleted || user.banned)
    }
}

fn frame(item: &FeedItem) -> Bytes {
    // The data is JSON on one line, so it needs no splitting.
    Bytes::from(format!("id: {}\nevent: {}\ndata: {}\n\n", item.position, item.event, item.data))
}
