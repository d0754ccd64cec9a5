//! How an event of ours looks on the server: its stream's name there, and an envelope in the
//! server's metadata that holds what the server has no field for.

use std::borrow::Cow;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use chrono::{DateTime, SubsecRound, Utc};
use eventstore::{EventData, RecordedEvent};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::log::{Error, Link, NewEvent, Recorded, bad};

/// The form of the envelope and of the log as a whole. A newer one is refused.
pub(super) const VERSION: u32 = 1;
/// The stream that says whose log this is.
pub(super) const MARKER: &str = "~t2m";
/// How an envelope of any version begins.
const BEGINS: &[u8] = b"{\"t2m\":";

/// What the server's metadata of an event of ours holds.
#[derive(Serialize, Deserialize)]
struct Envelope<'a> {
    t2m: u32,
    /// Microseconds since 1970: the server's own time is the one of its clock.
    time: i64,
    /// The newest position that the writer had read. It comes before the event's own, and not by
    /// much.
    after: u64,
    #[serde(borrow)]
    hash: Cow<'a, str>,
    /// The exact bytes, which would be spaced otherwise as a JSON value.
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    metadata: Option<Cow<'a, str>>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    metadata_base64: Option<Cow<'a, str>>,
}

/// An event that was read.
#[derive(Debug, Clone)]
pub(super) struct Found {
    pub(super) event: Recorded,
    /// See [`Envelope::after`].
    pub(super) after: u64,
}

impl Found {
    /// Whether its hash is the one over it and `previous`, its stream's event before.
    pub(super) fn follows(&self, previous: &[u8; 32]) -> bool {
        let link = Link { position: self.after, ..Link::of(&self.event) };
        link.hash(previous) == self.event.hash
    }
}

/// An append as it goes to the server, however often.
pub(super) struct Parcel {
    pub(super) ids: Vec<Uuid>,
    events: Vec<EventData>,
}

impl Parcel {
    /// Chains `events` from `revision` of their stream on to the event before, with `previous` for
    /// its hash.
    pub(super) fn new(
        stream: &str,
        revision: u64,
        previous: [u8; 32],
        after: u64,
        events: &[NewEvent],
    ) -> Result<Self, Error> {
        let (mut hash, mut packed) = (previous, Vec::with_capacity(events.len()));
        for (event, revision) in events.iter().zip(revision..) {
            let time = event.time.trunc_subsecs(6);
            let link = Link {
                position: after,
                stream,
                revision,
                kind: &event.kind,
                id: event.id,
                time,
                data: &event.data,
                metadata: &event.metadata,
            };
            hash = link.hash(&hash);
            let envelope = envelope(&event.metadata, time, after, &hash)?;
            let packing = match json(&event.data) {
                Some(json) => EventData::json(&event.kind, &json)
                    .map_err(|error| Error::Storage(error.to_string()))?,
                None => EventData::binary(&event.kind, Bytes::copy_from_slice(&event.data)),
            };
            packed.push(packing.id(event.id).metadata(envelope.into()));
        }
        Ok(Self { ids: events.iter().map(|event| event.id).collect(), events: packed })
    }

    pub(super) fn events(&self) -> Vec<EventData> {
        self.events.clone()
    }
}

fn envelope(
    metadata: &[u8],
    time: DateTime<Utc>,
    after: u64,
    hash: &[u8; 32],
) -> Result<Vec<u8>, Error> {
    let (text, base64) = match std::str::from_utf8(metadata) {
        Ok(text) => (Some(text.into()), None),
        Err(_) => (None, Some(STANDARD.encode(metadata).into())),
    };
    let envelope = Envelope {
        t2m: VERSION,
        time: time.timestamp_micros(),
        after,
        hash: hex::encode(hash).into(),
        metadata: text,
        metadata_base64: base64,
    };
    serde_json::to_vec(&envelope).map_err(|error| Error::Storage(error.to_string()))
}

/// The data as the JSON that it is, to the byte; then it can be looked at on the server.
fn json(data: &[u8]) -> Option<&RawValue> {
    let value: &RawValue = serde_json::from_slice(data).ok()?;
    // Space around it would be lost.
    (value.get().len() == data.len()).then_some(value)
}

/// The event at `position`, which the server may not have said; none if it is not of T2M's log.
///
/// # Errors
/// [`Error::Corrupt`] for an envelope that cannot be read, [`Error::Foreign`] for a newer one.
pub(super) fn decode(raw: &RecordedEvent, position: u64) -> Result<Option<Found>, Error> {
    let name = raw.stream_id();
    if name.starts_with('$') || name == MARKER || !raw.custom_metadata.starts_with(BEGINS) {
        return Ok(None);
    }
    let broken = |what: &str| bad(position, what);
    let envelope: Envelope<'_> = serde_json::from_slice(&raw.custom_metadata)
        .map_err(|_| broken("its envelope cannot be read"))?;
    if envelope.t2m > VERSION {
        return Err(Error::Foreign(format!(
            "T2M_LOG: the log has an event of version {} at position {position} and this program \
             knows version {VERSION}; use a newer program",
            envelope.t2m
        )));
    }
    let mut hash = [0; 32];
    hex::decode_to_slice(&*envelope.hash, &mut hash).map_err(|_| broken("its hash is none"))?;
    let metadata = match (envelope.metadata, envelope.metadata_base64) {
        (Some(text), None) => text.into_owned().into_bytes(),
        (None, Some(text)) => {
            STANDARD.decode(&*text).map_err(|_| broken("its metadata is not base64"))?
        }
        _ => return Err(broken("its envelope cannot be read")),
    };
    let event = Recorded {
        id: raw.id,
        stream: from_server(name).into(),
        revision: raw.revision,
        position,
        kind: raw.event_type.as_str().into(),
        time: DateTime::from_timestamp_micros(envelope.time)
            .ok_or_else(|| broken("its time is out of range"))?,
        data: Bytes::copy_from_slice(&raw.data),
        metadata: metadata.into(),
        hash,
    };
    Ok(Some(Found { event, after: envelope.after }))
}

/// A stream's name on the server, where names in `$` are the server's own and those in `~` ours.
pub(super) fn to_server(stream: &str) -> String {
    match stream.starts_with(['$', '~']) {
        true => format!("~{stream}"),
        false => stream.to_owned(),
    }
}

fn from_server(name: &str) -> &str {
    name.strip_prefix('~').unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_stream_of_ours_is_the_servers_or_the_marker() {
        for name in ["job-1", "$all", "~t2m", "$$x", "~", "~~t2m", "t2m"] {
            let there = to_server(name);
            assert!(!there.starts_with('$') && there != MARKER, "{there}");
            assert_eq!(from_server(&there), name);
        }
    }

    #[test]
    fn json_is_json_only_if_it_stays_what_it_is() {
        for text in [r#"{ "a" : 1.0e1,"a":"☃" }"#, "1", "null"] {
            let data = EventData::json("x", &json(text.as_bytes()).unwrap()).unwrap();
            assert!(format!("{data:?}").contains("application/json"));
            assert_eq!(
                serde_json::to_vec(&json(text.as_bytes()).unwrap()).unwrap(),
                text.as_bytes()
            );
        }
        for text in [&b" {}"[..], b"{}\n", b"{", b"", b"\xff", b"    "] {
            assert!(json(text).is_none(), "{text:?}");
        }
    }

    #[test]
    fn metadata_comes_back_whatever_its_bytes() {
        for metadata in [&b"{ \"a\":1 }"[..], b"", b"\xff\x00\""] {
            let bytes = envelope(metadata, DateTime::UNIX_EPOCH, 7, &[9; 32]).unwrap();
            assert!(bytes.starts_with(BEGINS));
            let read: Envelope<'_> = serde_json::from_slice(&bytes).unwrap();
            let plain = read.metadata.map(|text| text.into_owned().into_bytes());
            let coded = read.metadata_base64.map(|text| STANDARD.decode(&*text).unwrap());
            assert_eq!(plain.or(coded).unwrap(), metadata);
        }
    }
}
