//! Reading streams and the log, and finding the places where both can be entered.

use std::collections::{HashMap, HashSet};
use std::ops::ControlFlow;
use std::sync::Arc;

use eventstore::{Position, RecordedEvent, StreamPosition};
use uuid::Uuid;

use super::Shared;
use super::envelope::{Found, MARKER, decode, to_server};
use super::link::{Failure, Link, place, said};
use crate::log::{Recorded, bad, guard};

/// No stream is longer.
pub(super) const LAST: u64 = i64::MAX as u64 - 1;
/// Events beyond one that was looked for among which the next one is looked for.
const NEAR: usize = 256;
/// Newest events that are taken into memory when the log is opened.
const NEWEST: usize = 256;

/// A page of a stream.
pub(super) async fn stream(
    shared: &Shared,
    link: &Link,
    stream: &str,
    from: u64,
    limit: usize,
) -> Result<Vec<Recorded>, Failure> {
    if limit == 0 || from > LAST {
        return Ok(Vec::new());
    }
    let name = to_server(stream);
    let raw = link.stream(name, StreamPosition::Position(from), false, limit).await?;
    ours(shared, link, &raw).await
}

/// Up to `count` last events of a stream, the first of them first.
pub(super) async fn stream_end(
    shared: &Shared,
    link: &Link,
    stream: &str,
    count: usize,
) -> Result<Vec<Recorded>, Failure> {
    let mut raw = link.stream(to_server(stream), StreamPosition::End, true, count).await?;
    raw.reverse();
    ours(shared, link, &raw).await
}

/// The last revision of a stream.
pub(super) async fn end(link: &Link, stream: &str) -> Result<Option<u64>, Failure> {
    let last = link.stream(to_server(stream), StreamPosition::End, true, 1).await?;
    Ok(last.first().map(|event| event.revision))
}

/// The events of a stream with their positions.
async fn ours(
    shared: &Shared,
    link: &Link,
    raw: &[RecordedEvent],
) -> Result<Vec<Recorded>, Failure> {
    let mut found = Vec::with_capacity(raw.len());
    for event in raw {
        let position = said(event.position.commit);
        let known = position.or_else(|| guard(&shared.memory).place(event.id));
        let decoded = decode(event, known.unwrap_or(0)).map_err(Failure::Bad)?;
        found.push(decoded.ok_or_else(|| {
            let what = format!("event {} of a stream of T2M is somebody else's", event.id);
            Failure::Bad(bad(known.unwrap_or(0), &what))
        })?);
    }
    if found.iter().any(|found| found.event.position == 0) {
        locate(link, &mut found).await?;
    }
    let events: Vec<Recorded> = found.into_iter().map(|found| found.event).collect();
    guard(&shared.memory).read(&events);
    Ok(events)
}

/// Finds the positions of events of one stream, in its order, on a server that does not tell them
/// when a stream is read. Each event says which one was the newest when it was written, and is not
/// far behind that one in the log.
async fn locate(link: &Link, found: &mut [Found]) -> Result<(), Failure> {
    struct Search {
        wanted: HashSet<Uuid>,
        places: HashMap<Uuid, u64>,
        beyond: usize,
    }
    let mut before = 0;
    for at in 0..found.len() {
        if found[at].event.position == 0 {
            let from = before.max(found[at].after);
            let wanted = found[at..].iter().map(|found| found.event.id).collect();
            let search = Search { wanted, places: HashMap::new(), beyond: 0 };
            let entry = if from == 0 { StreamPosition::Start } else { entry(from) };
            let search = link.all(entry, false, usize::MAX, search, |search, event| {
                if search.wanted.remove(&event.id) {
                    search.places.insert(event.id, event.position.commit);
                    search.beyond = 0;
                } else if !search.places.is_empty() {
                    search.beyond += 1;
                }
                let is_done = search.wanted.is_empty() || search.beyond > NEAR;
                Ok(if is_done { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
            });
            let places = search.await?.places;
            for found in &mut found[at..] {
                if let Some(position) = places.get(&found.event.id) {
                    found.event.position = *position;
                }
            }
        }
        before = found[at].event.position;
        if before == 0 {
            let id = found[at].event.id;
            let what = format!("event {id} is in its stream and not in the log");
            return Err(Failure::Bad(bad(0, &what)));
        }
    }
    Ok(())
}

/// Up to `limit` events of the log after `after`, which may be any number.
pub(super) async fn all(
    shared: &Shared,
    link: &Link,
    after: u64,
    limit: usize,
) -> Result<Vec<Found>, Failure> {
    let from = enter(shared, link, after).await?;
    walk(link, from, after, limit).await
}

/// The same from a place that is known to be one.
async fn walk(
    link: &Link,
    from: StreamPosition<Position>,
    after: u64,
    limit: usize,
) -> Result<Vec<Found>, Failure> {
    let found = link.all(from, false, usize::MAX, Vec::new(), move |found, event| {
        let position = event.position.commit;
        if position > after {
            found.extend(decode(&event, position).map_err(Failure::Bad)?);
        }
        let is_done = found.len() >= limit;
        Ok(if is_done { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    });
    found.await
}

/// The place of an event that is not after the first one behind `after`. The log can be entered at
/// events alone; at any other place the server reads what is no event.
async fn enter(
    shared: &Shared,
    link: &Link,
    after: u64,
) -> Result<StreamPosition<Position>, Failure> {
    // Who reads on hands in the position of an event, and who wants one event the place before it.
    for candidate in [after, after.saturating_add(1)] {
        if candidate == 0 {
            return Ok(StreamPosition::Start);
        }
        if guard(&shared.memory).is_entrance(candidate) {
            return Ok(entry(candidate));
        }
    }
    for candidate in [after, after.saturating_add(1)] {
        if link.at(candidate).await?.is_some() {
            guard(&shared.memory).enter(candidate);
            return Ok(entry(candidate));
        }
    }
    let (below, above) = guard(&shared.memory).around(after);
    let below_is_far = after - below.unwrap_or(0);
    if let Some(above) = above.filter(|above| above - after < below_is_far) {
        let found = link.all(entry(above), true, usize::MAX, None, move |found, event| {
            let position = event.position.commit;
            if position > after {
                return Ok(ControlFlow::Continue(()));
            }
            *found = Some(position);
            Ok(ControlFlow::Break(()))
        });
        if let Some(position) = found.await? {
            guard(&shared.memory).enter(position);
            return Ok(entry(position));
        }
        return Ok(StreamPosition::Start);
    }
    Ok(below.map_or(StreamPosition::Start, entry))
}

pub(super) fn entry(position: u64) -> StreamPosition<Position> {
    StreamPosition::Position(place(position))
}

/// The newest events of the log, the oldest of them first, and whether they are all of it.
pub(super) async fn newest(link: &Arc<Link>) -> Result<(Vec<Recorded>, bool), Failure> {
    type Newest = (Vec<Recorded>, bool);
    let newest: Newest = (Vec::new(), true);
    let from = StreamPosition::End;
    let found = link.all(from, true, usize::MAX, newest, |(events, is_all), event| {
        if event.stream_id() == MARKER && event.revision == 0 {
            return Ok(ControlFlow::Break(()));
        }
        let found = decode(&event, event.position.commit).map_err(Failure::Bad)?;
        events.extend(found.map(|found| found.event));
        *is_all = events.len() < NEWEST;
        Ok(if *is_all { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
    });
    let (mut events, is_all) = found.await?;
    events.reverse();
    Ok((events, is_all))
}
