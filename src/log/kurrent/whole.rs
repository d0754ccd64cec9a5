//! What is in the log as a whole, and whether it holds together.

use std::collections::{BTreeMap, HashMap, VecDeque};

use bytestring::ByteString;
use chrono::{DateTime, Utc};

use super::envelope::Found;
use crate::log::{Error, GENESIS, Link, Recorded, Stats, Verified, bad};

/// Events that are read at once.
pub(super) const PAGE: usize = 2000;
/// Positions back to which an event's word on the newest one before it is held against the log.
const REMEMBERED: usize = 1 << 20;

/// Events counted so far; each call for stats counts on from there.
pub(super) struct Tally {
    events: u64,
    streams: u64,
    pub(super) position: u64,
    head_hash: [u8; 32],
    bytes: u64,
    types: BTreeMap<String, u64>,
    first: Option<DateTime<Utc>>,
    last: Option<DateTime<Utc>>,
}

impl Default for Tally {
    fn default() -> Self {
        Self {
            events: 0,
            streams: 0,
            position: 0,
            head_hash: GENESIS,
            bytes: 0,
            types: BTreeMap::new(),
            first: None,
            last: None,
        }
    }
}

impl Tally {
    pub(super) fn count(&mut self, event: &Recorded) {
        self.events += 1;
        self.streams += u64::from(event.revision == 0);
        self.position = event.position;
        self.head_hash = Link::of(event).hash(&self.head_hash);
        let names = event.stream.len() + event.kind.len();
        self.bytes += (names + event.data.len() + event.metadata.len()) as u64;
        match self.types.get_mut(&*event.kind) {
            Some(count) => *count += 1,
            None => drop(self.types.insert(event.kind.to_string(), 1)),
        }
        self.first = self.first.or(Some(event.time));
        self.last = Some(event.time);
    }

    pub(super) fn stats(&self) -> Stats {
        Stats {
            events: self.events,
            streams: self.streams,
            position: self.position,
            head_hash: self.head_hash,
            bytes: self.bytes,
            types: self.types.clone(),
            first: self.first,
            last: self.last,
        }
    }
}

/// Checks the events of a log in its order.
pub(super) struct Check {
    events: u64,
    pub(super) position: u64,
    head_hash: [u8; 32],
    /// The last revision of each stream and its hash.
    chains: HashMap<ByteString, (u64, [u8; 32])>,
    recent: VecDeque<u64>,
}

impl Default for Check {
    fn default() -> Self {
        let (chains, recent) = (HashMap::new(), VecDeque::new());
        Self { events: 0, position: 0, head_hash: GENESIS, chains, recent }
    }
}

impl Check {
    pub(super) fn take(&mut self, found: &Found) -> Result<(), Error> {
        let event = &found.event;
        let wrong = |what: &str| Err(bad(event.position, what));
        if event.position <= self.position {
            return wrong("the event is out of order");
        }
        let chain = self.chains.get(&event.stream).copied();
        let (due, previous) = chain.map_or((0, GENESIS), |(last, hash)| (last + 1, hash));
        if event.revision != due {
            let (stream, revision) = (&event.stream, event.revision);
            return wrong(&format!("it is {revision} of {stream} and should be {due}"));
        }
        if !found.follows(&previous) {
            return wrong("the event and its hash do not belong together");
        }
        let is_missing = found.after >= self.recent.front().copied().unwrap_or(0)
            && found.after > 0
            && self.recent.binary_search(&found.after).is_err();
        if is_missing {
            let what = "the event is missing that was the newest when a later one was written";
            return Err(bad(found.after, what));
        }
        self.events += 1;
        self.position = event.position;
        self.head_hash = Link::of(event).hash(&self.head_hash);
        self.chains.insert(event.stream.clone(), (event.revision, event.hash));
        self.recent.push_back(event.position);
        if self.recent.len() > REMEMBERED {
            self.recent.pop_front();
        }
        Ok(())
    }

    pub(super) fn verified(&self) -> Verified {
        Verified { events: self.events, head_hash: self.head_hash }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use uuid::Uuid;

    use super::*;

    /// Three streams in turn, each event written when the one before it was known.
    fn log() -> Vec<Found> {
        let mut log: Vec<Found> = Vec::new();
        for number in 0..30_u64 {
            let stream: ByteString = format!("thing-{}", number % 3).into();
            let before = log.iter().rev().find(|found| found.event.stream == stream);
            let previous = before.map_or(GENESIS, |found| found.event.hash);
            let after = log.last().map_or(0, |found| found.event.position);
            let mut event = Recorded {
                id: Uuid::from_u128(number.into()),
                stream,
                revision: number / 3,
                position: 100 + 37 * number,
                kind: "thing.happened.v1".into(),
                time: DateTime::UNIX_EPOCH,
                data: format!("{number}").into_bytes().into(),
                metadata: Bytes::new(),
                hash: [0; 32],
            };
            event.hash = Link { position: after, ..Link::of(&event) }.hash(&previous);
            log.push(Found { event, after });
        }
        log
    }

    fn check(log: &[Found]) -> Result<Verified, Error> {
        let mut check = Check::default();
        log.iter().try_for_each(|found| check.take(found))?;
        Ok(check.verified())
    }

    #[test]
    fn a_whole_log_is_found_whole_and_counted_with_the_same_hash() {
        let mut tally = Tally::default();
        log().iter().for_each(|found| tally.count(&found.event));
        let (verified, stats) = (check(&log()).unwrap(), tally.stats());
        assert_eq!((verified.events, stats.events, stats.streams), (30, 30, 3));
        assert_eq!(verified.head_hash, stats.head_hash);
        let mut moved = log();
        moved[29].event.position += 1;
        assert_ne!(check(&moved).unwrap().head_hash, verified.head_hash);
    }

    #[test]
    fn every_alteration_is_found_at_its_position() {
        let position = |at: u64| 100 + 37 * at;
        type Change = fn(&mut Vec<Found>);
        let changes: [(&str, Change, u64); 9] = [
            ("data", |log| log[7].event.data = Bytes::from_static(b"x"), position(7)),
            ("metadata", |log| log[7].event.metadata = Bytes::from_static(b"x"), position(7)),
            ("time", |log| log[8].event.time += chrono::TimeDelta::microseconds(1), position(8)),
            ("type", |log| log[9].event.kind = "other".into(), position(9)),
            ("stream", |log| log[10].event.stream = "other".into(), position(10)),
            ("id", |log| log[11].event.id = Uuid::from_u128(77), position(11)),
            ("one is missing", |log| drop(log.remove(12)), position(12)),
            ("a stream's end is missing", |log| drop(log.remove(28)), position(28)),
            ("order", |log| log.swap(13, 14), position(13)),
        ];
        for (what, change, at) in changes {
            let mut log = log();
            change(&mut log);
            let found = check(&log);
            assert!(
                matches!(found, Err(Error::Corrupt { position, .. }) if position == at),
                "{what}: {found:?} instead of {at}"
            );
        }
    }
}
