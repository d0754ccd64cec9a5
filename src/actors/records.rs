//! Events as the outside reads them (CONTRACT §5), for operators and administrators: their data as
//! it is stored, sealed fields sealed.

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::Value;
use uuid::Uuid;

use crate::log::{self, EventLog, Recorded};

/// Events looked at for one page at the most; a rare type takes several pages.
const LOOKED_AT: usize = 5000;
/// Events read at once.
const CHUNK: usize = 500;

/// An event as CONTRACT §5 names its parts.
#[derive(Debug, Clone, PartialEq, Serialize, utoipa::ToSchema)]
#[schema(as = EventAnswer)]
pub struct Envelope {
    pub id: Uuid,
    pub stream: String,
    pub revision: u64,
    pub position: u64,
    #[serde(rename = "type")]
    pub kind: String,
    pub time: DateTime<Utc>,
    /// A text where it is not JSON.
    pub data: Value,
    pub metadata: Value,
    /// The chain's, in hex.
    pub hash: String,
}

impl From<&Recorded> for Envelope {
    fn from(event: &Recorded) -> Self {
        let mut metadata = value(&event.metadata);
        if let Value::Object(known) = &mut metadata {
            known.entry("causation_id").or_insert(Value::Null);
        }
        Self {
            id: event.id,
            stream: event.stream.to_string(),
            revision: event.revision,
            position: event.position,
            kind: event.kind.to_string(),
            time: event.time,
            data: value(&event.data),
            metadata,
            hash: hex::encode(event.hash),
        }
    }
}

fn value(bytes: &[u8]) -> Value {
    let text = || Value::String(String::from_utf8_lossy(bytes).into_owned());
    serde_json::from_slice(bytes).unwrap_or_else(|_| text())
}

/// Which events of the log.
#[derive(Debug, Clone, Default)]
pub struct Question {
    /// Only this stream.
    pub stream: Option<String>,
    /// Only types that begin so.
    pub kind: Option<String>,
    pub order: Order,
    /// Events of a page.
    pub limit: usize,
}

/// Where a page begins, and which way it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// The oldest first, after this position.
    After(u64),
    /// The newest first, before this position.
    Before(u64),
}

impl Order {
    /// From [`Order::text`]; none for anything else.
    pub fn parse(text: &str) -> Option<Self> {
        let (way, position) = text.split_at_checked(1)?;
        let position = position.parse().ok()?;
        match way {
            "a" => Some(Self::After(position)),
            "b" => Some(Self::Before(position)),
            _ => None,
        }
    }

    /// For a URL.
    pub fn text(self) -> String {
        match self {
            Self::After(position) => format!("a{position}"),
            Self::Before(position) => format!("b{position}"),
        }
    }
}

impl Default for Order {
    fn default() -> Self {
        Self::Before(u64::MAX)
    }
}

/// Some events, and where to go on; nowhere at the end.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    pub events: Vec<Envelope>,
    pub next: Option<Order>,
}

/// A page of the log. It may be short, and even empty, before the end: after so many events that
/// were not asked for, it is the caller's turn.
///
/// # Errors
/// The log cannot be read.
pub async fn page(log: &dyn EventLog, question: &Question) -> Result<Found, log::Error> {
    let mut cursor = Cursor::new(log, question).await?;
    let (mut events, mut looked_at) = (Vec::new(), 0);
    while let Some(chunk) = cursor.next().await? {
        for event in chunk {
            if events.len() == question.limit || looked_at >= LOOKED_AT {
                return Ok(Found { events, next: Some(cursor.order(looked_at)) });
            }
            cursor.reached = Some(event.position);
            looked_at += 1;
            let wanted = question.kind.as_deref().is_none_or(|kind| event.kind.starts_with(kind));
            if wanted {
                events.push(Envelope::from(&event));
            }
        }
    }
    Ok(Found { events, next: None })
}

/// Walks a stream, or the whole log, in chunks.
struct Cursor<'a> {
    log: &'a dyn EventLog,
    stream: Option<&'a str>,
    order: Order,
    /// The position, or the revision, from which the next chunk is read; none at the end.
    place: Option<u64>,
    /// The last position that was looked at.
    reached: Option<u64>,
}

impl<'a> Cursor<'a> {
    async fn new(log: &'a dyn EventLog, question: &'a Question) -> Result<Self, log::Error> {
        let stream = question.stream.as_deref();
        let order = question.order;
        let place = match (stream, order) {
            (None, Order::After(position)) => position,
            (None, Order::Before(position)) => {
                position.min(log.head().borrow().saturating_add(1)).saturating_sub(1)
            }
            (Some(stream), Order::After(position)) => count_until(log, stream, position).await?,
            (Some(stream), Order::Before(position)) => {
                count_until(log, stream, position.saturating_sub(1)).await?
            }
        };
        Ok(Self { log, stream, order, place: Some(place), reached: None })
    }

    /// In the order that was asked for; none at the end.
    async fn next(&mut self) -> Result<Option<Vec<Recorded>>, log::Error> {
        let Some(place) = self.place else { return Ok(None) };
        let mut chunk = match (self.order, self.stream) {
            (Order::After(_), None) => self.log.read_all(place, CHUNK).await?,
            (Order::After(_), Some(stream)) => self.log.read_stream(stream, place, CHUNK).await?,
            (Order::Before(_), stream) => {
                // As many positions as hold about a chunk of events.
                let stride = if stream.is_none() { self.log.stride() } else { 1 };
                let first = place.saturating_sub(CHUNK as u64 * stride);
                self.place = (first > 0).then_some(first);
                let mut chunk = match stream {
                    None => self.between(first, place).await?,
                    Some(stream) => {
                        let length = usize::try_from(place - first).unwrap_or(CHUNK);
                        self.log.read_stream(stream, first, length).await?
                    }
                };
                chunk.reverse();
                return Ok(Some(chunk));
            }
        };
        match chunk.last() {
            Some(last) if self.stream.is_none() => self.place = Some(last.position),
            Some(last) => self.place = Some(last.revision + 1),
            None => return Ok(None),
        }
        if chunk.len() < CHUNK {
            self.place = None;
        }
        chunk.shrink_to_fit();
        Ok(Some(chunk))
    }

    /// All events after `first` and up to `last`.
    async fn between(&self, first: u64, last: u64) -> Result<Vec<Recorded>, log::Error> {
        let (mut events, mut after) = (Vec::new(), first);
        loop {
            let page = self.log.read_all(after, CHUNK).await?;
            let is_last = page.len() < CHUNK;
            after = page.last().map_or(last, |event| event.position);
            events.extend(page.into_iter().filter(|event| event.position <= last));
            if is_last || after >= last {
                return Ok(events);
            }
        }
    }

    fn order(&self, looked_at: usize) -> Order {
        match (self.order, self.reached) {
            (Order::After(_), Some(position)) if looked_at > 0 => Order::After(position),
            (Order::Before(_), Some(position)) if looked_at > 0 => Order::Before(position),
            (order, _) => order,
        }
    }
}

/// How many events a stream has up to a position: the revision of the one after it.
async fn count_until(log: &dyn EventLog, stream: &str, position: u64) -> Result<u64, log::Error> {
    let is_until = async |revision: u64| {
        let found = log.read_stream(stream, revision, 1).await?;
        Ok::<_, log::Error>(found.first().is_some_and(|event| event.position <= position))
    };
    let mut beyond = 1;
    while is_until(beyond - 1).await? {
        beyond *= 2;
    }
    // The answer is from the half below, which is all until it, to one less than `beyond`.
    let (mut low, mut high) = (beyond / 2, beyond - 1);
    while low < high {
        let middle = low + (high - low) / 2;
        match is_until(middle).await? {
            true => low = middle + 1,
            false => high = middle,
        }
    }
    Ok(low)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::{EmbeddedLog, Expected, NewEvent};

    /// 2000 events; every seventh is of `thing-0`, every tenth of type `rare.v1`.
    async fn filled(path: &std::path::Path, count: u64) -> EmbeddedLog {
        let log = EmbeddedLog::open(path).unwrap();
        for number in 1..=count {
            let event = NewEvent {
                id: Uuid::from_u128(u128::from(number)),
                kind: if number % 10 == 0 { "rare.v1" } else { "often.v1" }.to_owned(),
                time: DateTime::UNIX_EPOCH,
                data: b"{}".to_vec(),
                metadata: b"{}".to_vec(),
            };
            let stream = format!("thing-{}", number % 7);
            log.append(&stream, Expected::Any, vec![event]).await.unwrap();
        }
        log
    }

    async fn all(log: &EmbeddedLog, mut question: Question) -> Vec<u64> {
        let mut seen = Vec::new();
        loop {
            let found = page(log, &question).await.unwrap();
            assert!(found.events.len() <= question.limit);
            seen.extend(found.events.iter().map(|event| event.position));
            let Some(next) = found.next else { return seen };
            question.order = next;
        }
    }

    #[tokio::test]
    async fn pages_join_without_gap_or_overlap_either_way() {
        let dir = tempfile::tempdir().unwrap();
        let log = filled(&dir.path().join("log.sqlite"), 1203).await;
        for stream in [None, Some(0), Some(3)] {
            for kind in ["", "rare", "none"] {
                let wanted: Vec<u64> = (1..=1203)
                    .filter(|n| stream.is_none_or(|stream| n % 7 == stream))
                    .filter(|n| match kind {
                        "" => true,
                        "rare" => n % 10 == 0,
                        _ => false,
                    })
                    .collect();
                let question = |order, limit| Question {
                    stream: stream.map(|number| format!("thing-{number}")),
                    kind: Some(kind.to_owned()),
                    order,
                    limit,
                };
                for limit in [7, 200] {
                    assert_eq!(all(&log, question(Order::After(0), limit)).await, wanted);
                    let mut newest_first = all(&log, question(Order::default(), limit)).await;
                    newest_first.reverse();
                    assert_eq!(newest_first, wanted);
                    let late: Vec<_> = wanted.iter().copied().filter(|n| *n > 600).collect();
                    assert_eq!(all(&log, question(Order::After(600), limit)).await, late);
                }
            }
        }
    }

    #[tokio::test]
    async fn a_stream_that_is_not_there_has_no_events() {
        let dir = tempfile::tempdir().unwrap();
        let log = filled(&dir.path().join("log.sqlite"), 3).await;
        for order in [Order::After(0), Order::default(), Order::Before(0)] {
            let question = Question { stream: Some("none".into()), kind: None, order, limit: 10 };
            assert_eq!(page(&log, &question).await.unwrap(), Found { events: vec![], next: None });
        }
    }
}
