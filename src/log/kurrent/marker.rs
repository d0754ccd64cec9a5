//! Whose log is on a server: one event in a stream of its own, which no event of the log is before.

use std::ops::ControlFlow;
use std::sync::Arc;

use eventstore::{EventData, StreamPosition, StreamState};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::envelope::{MARKER, VERSION};
use super::link::{Failure, Link};
use crate::log::Error;

const FORMAT: &str = "t2m-log";
const KIND: &str = "t2m.log";
/// A name that no stream of the log has, and not the marker's: what begins the log lies there. Its events
/// have no meaning, and whoever reads the log passes over them.
const PROBES: &str = "~t2m.probe";
const PROBE: &str = "t2m.probe";

#[derive(Serialize, Deserialize)]
struct Marker {
    format: String,
    version: u32,
    identity: Uuid,
}

/// The identity of the log; none where there is nothing yet.
///
/// # Errors
/// [`Failure::Bad`] with [`Error::Foreign`] when it is not ours or newer.
pub(super) async fn inspect(link: &Link, place: &str) -> Result<Option<Uuid>, Failure> {
    let foreign =
        |what: String| Err(Failure::Bad(Error::Foreign(format!("T2M_LOG: {place} {what}"))));
    let found = link.stream(MARKER.into(), StreamPosition::Start, false, 1).await?;
    let Some(event) = found.first() else { return Ok(None) };
    let marker: Option<Marker> = event.as_json().ok();
    match marker.filter(|marker| marker.format == FORMAT) {
        None => foreign(format!("has a stream {MARKER} that is not T2M's; it was left as it is")),
        Some(Marker { version, .. }) if version > VERSION => foreign(format!(
            "holds a T2M log of version {version} and this program knows version {VERSION}; use a \
             newer program"
        )),
        Some(Marker { identity, .. }) => Ok(Some(identity)),
    }
}

/// Appends to a stream of its own, which shows that the server takes appends.
///
/// # Errors
/// It does not, or somebody else did the same at the same time.
pub(super) async fn probe(link: &Link) -> Result<(), Failure> {
    let newest = link.stream(PROBES.into(), StreamPosition::End, true, 1).await?;
    let state = newest
        .first()
        .map_or(StreamState::NoStream, |newest| StreamState::StreamRevision(newest.revision));
    let event = EventData::json(PROBE, &serde_json::json!({}))
        .map_err(|error| Failure::Bad(Error::Storage(error.to_string())))?;
    let event = event.id(Uuid::from_u128(rand::random()));
    link.append(PROBES.into(), state, vec![event]).await.map(drop)
}

/// The identity of the log, which is begun if the server holds nothing but its own events.
///
/// # Errors
/// As [`inspect`], and when there are events of somebody else.
pub(super) async fn begin(link: &Arc<Link>, place: &str) -> Result<Uuid, Failure> {
    if let Some(identity) = inspect(link, place).await? {
        return Ok(identity);
    }
    let is_empty = link.all(StreamPosition::Start, false, usize::MAX, true, |is_empty, event| {
        *is_empty = event.stream_id().starts_with('$');
        Ok(if *is_empty { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
    });
    if is_empty.await? {
        let identity = Uuid::from_u128(rand::random());
        let marker = Marker { format: FORMAT.to_owned(), version: VERSION, identity };
        let event = EventData::json(KIND, &marker)
            .map_err(|error| Failure::Bad(Error::Storage(error.to_string())))?;
        match link.append(MARKER.into(), StreamState::NoStream, vec![event.id(identity)]).await {
            // Another node was faster.
            Ok(_) | Err(Failure::Unexpected) => {}
            Err(failure) => return Err(failure),
        }
    }
    // Also where another node has just begun it, and written to it.
    inspect(link, place).await?.ok_or_else(|| {
        Failure::Bad(Error::Foreign(format!(
            "T2M_LOG: {place} holds events of another system; they were left as they are"
        )))
    })
}
