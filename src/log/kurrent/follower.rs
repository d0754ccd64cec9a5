//! Follows the log: a subscription tells that somebody has appended, and beneath it the clock has a
//! look, since a subscription may fall silent without an end. What was appended is read from the log
//! itself, from the last known event on: whatever a subscription leaves out, no event is passed by.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use eventstore::StreamPosition;
use tokio::time::{Instant, timeout};

use super::envelope::{Found, decode};
use super::link::{Failure, Link};
use super::{Shared, marker, reading};
use crate::log::patience::Backoff;
use crate::log::{Error, Recorded, guard};

/// Events that are read at once.
const PAGE: usize = 500;
/// A look may find by chance what the subscription is about to tell. So often it is not chance.
const LOOKS: u32 = 3;
/// How often it is tried whether a server that took no append takes one again.
const PROBE: Duration = Duration::from_secs(1);
/// What held so long was no failed try.
const LASTING: Duration = Duration::from_secs(5);

/// Runs until the log is closed or stopped.
pub(super) async fn run(shared: Arc<Shared>) {
    let mut backoff = Backoff::default();
    while shared.condition.check_stopped().is_ok() {
        let began = Instant::now();
        match shared.link().await {
            Ok(link) => {
                shared.condition.set_back();
                if let Err(failure) = follow(&shared, &link).await {
                    tracing::warn!(why = failure.told(), "the log cannot be followed");
                    if let Failure::Bad(Error::Foreign(why)) = failure {
                        shared.condition.stop(&why);
                    }
                }
                // The client may have connected anew by itself, to whatever is there now.
                shared.give_up(&link).await;
            }
            Err(error) => shared.condition.set_away(&error.to_string()),
        }
        if began.elapsed() > LASTING {
            backoff = Backoff::default();
        }
        backoff.wait().await;
    }
}

/// Finds out whether a server that took no append takes one again: nobody is sent to a node that is
/// not ready. Runs until the log is closed or stopped.
pub(super) async fn probe(shared: Arc<Shared>) {
    while shared.condition.check_stopped().is_ok() {
        tokio::time::sleep(PROBE).await;
        if !shared.condition.is_refused() {
            continue;
        }
        // That there is no connection is for those to tell who need one.
        let Ok(link) = shared.link().await else { continue };
        match marker::probe(&link).await {
            Ok(()) => shared.condition.set_taken(),
            Err(failure) => {
                tracing::warn!(why = failure.told(), "the log takes no append yet");
                shared.lost(&link, &failure).await;
            }
        }
    }
}

/// Returns when another subscription is needed.
async fn follow(shared: &Shared, link: &Arc<Link>) -> Result<(), Failure> {
    let mut scanned = 0;
    look(shared, link, &mut scanned).await?;
    let mut subscription = link.subscribe(entry(position(shared)));
    let mut looks = 0;
    loop {
        match timeout(shared.deadlines.poll, subscription.moved.changed()).await {
            Ok(Ok(())) => {
                look(shared, link, &mut scanned).await?;
                looks = 0;
            }
            Ok(Err(_)) => return Ok(()),
            Err(_) => {
                let is_new = look(shared, link, &mut scanned).await?;
                looks = if is_new { looks + 1 } else { 0 };
                shared.condition.set_back();
                if looks >= LOOKS {
                    tracing::warn!("the subscription to the log tells nothing; it is renewed");
                    return Ok(());
                }
            }
        }
    }
}

/// Takes what is new, and answers whether anything was. `scanned` is the place up to which the log
/// was looked at; it moves over the server's own events, too.
async fn look(shared: &Shared, link: &Link, scanned: &mut u64) -> Result<bool, Failure> {
    let before = position(shared);
    loop {
        let seen = position(shared);
        let from = seen.max(*scanned);
        let page = (Vec::<Found>::new(), from);
        let page = link.all(entry(from), false, usize::MAX, page, move |(found, last), event| {
            *last = event.position.commit;
            if *last > seen {
                found.extend(decode(&event, *last).map_err(Failure::Bad)?);
            }
            let is_done = found.len() >= PAGE;
            Ok(if is_done { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        });
        let (found, last) = page.await?;
        *scanned = last;
        let is_last = found.len() < PAGE;
        take(shared, found.into_iter().map(|found| found.event).collect());
        if is_last {
            return Ok(position(shared) > before);
        }
    }
}

/// Takes what follows on what was seen last.
fn take(shared: &Shared, events: Vec<Recorded>) {
    let Some(last) = events.last().cloned() else { return };
    guard(&shared.memory).read_page(&events);
    shared.tail.follow(position(shared), events);
    shared.read(&last);
}

fn position(shared: &Shared) -> u64 {
    shared.seen().map_or(0, |seen| seen.position)
}

fn entry(position: u64) -> StreamPosition<eventstore::Position> {
    match position {
        0 => StreamPosition::Start,
        position => reading::entry(position),
    }
}
