//! What this node remembers of what it read, within bounds: where events are, how streams end, and
//! at which places the log can be entered.

use std::collections::{BTreeSet, HashMap, VecDeque};

use bytestring::ByteString;
use uuid::Uuid;

use crate::log::Recorded;

/// Events whose position is remembered.
const PLACES: usize = 1 << 16;
/// Streams whose last hash is remembered.
const CHAINS: usize = 1 << 16;
/// Places to enter at.
const ENTRANCES: usize = 1 << 16;
/// Of a page that was read, the last event is an entrance, and each so many-th before.
const STRIDE: usize = 64;

#[derive(Default)]
pub(super) struct Memory {
    places: HashMap<Uuid, u64>,
    /// The same ids, oldest first.
    aged: VecDeque<Uuid>,
    chains: HashMap<ByteString, (u64, [u8; 32])>,
    entrances: BTreeSet<u64>,
}

impl Memory {
    pub(super) fn place(&self, id: Uuid) -> Option<u64> {
        self.places.get(&id).copied()
    }

    pub(super) fn set_place(&mut self, id: Uuid, position: u64) {
        if self.places.insert(id, position).is_none() {
            self.aged.push_back(id);
        }
        if self.aged.len() > PLACES
            && let Some(oldest) = self.aged.pop_front()
        {
            self.places.remove(&oldest);
        }
    }

    /// The hash of the event at `revision` of a stream, if it is the last one known of it.
    pub(super) fn hash(&self, stream: &str, revision: u64) -> Option<[u8; 32]> {
        self.chains.get(stream).filter(|chain| chain.0 == revision).map(|chain| chain.1)
    }

    /// Takes what the server holds. What was only sent there may not be what it holds: another
    /// node may have sent the same ids with another content before.
    pub(super) fn read<'a>(&mut self, events: impl IntoIterator<Item = &'a Recorded>) {
        for event in events {
            if self.chains.len() >= CHAINS && !self.chains.contains_key(&event.stream) {
                self.chains.clear();
            }
            let chain = self.chains.entry(event.stream.clone()).or_default();
            if event.revision >= chain.0 {
                *chain = (event.revision, event.hash);
            }
            if event.position > 0 {
                self.set_place(event.id, event.position);
            }
        }
    }

    /// Takes a page of the log.
    pub(super) fn read_page(&mut self, events: &[Recorded]) {
        self.read(events);
        self.entrances.extend(events.iter().rev().step_by(STRIDE).map(|event| event.position));
        if self.entrances.len() > ENTRANCES {
            let mut odd = false;
            self.entrances.retain(|_| {
                odd = !odd;
                odd
            });
        }
    }

    /// Adds a place that was found to be an event's.
    pub(super) fn enter(&mut self, position: u64) {
        self.entrances.insert(position);
    }

    pub(super) fn is_entrance(&self, position: u64) -> bool {
        self.entrances.contains(&position)
    }

    /// The nearest entrances, one not after `position` and one after it.
    pub(super) fn around(&self, position: u64) -> (Option<u64>, Option<u64>) {
        let below = self.entrances.range(..=position).next_back().copied();
        (below, self.entrances.range(position + 1..).next().copied())
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use chrono::DateTime;

    use super::*;

    fn event(position: u64) -> Recorded {
        Recorded {
            id: Uuid::from_u128(position.into()),
            stream: "thing".into(),
            revision: position - 1,
            position,
            kind: "thing.happened.v1".into(),
            time: DateTime::UNIX_EPOCH,
            data: Bytes::new(),
            metadata: Bytes::new(),
            hash: [u8::try_from(position % 256).unwrap(); 32],
        }
    }

    #[test]
    fn what_is_remembered_is_bounded_and_the_newest() {
        let mut memory = Memory::default();
        let events: Vec<Recorded> = (1..=200_000).map(event).collect();
        events.chunks(64).for_each(|page| memory.read_page(page));
        assert_eq!(memory.place(Uuid::from_u128(200_000)), Some(200_000));
        assert_eq!(memory.place(Uuid::from_u128(1)), None);
        assert!(memory.places.len() <= PLACES && memory.aged.len() <= PLACES);
        assert_eq!(memory.hash("thing", 199_999), Some(event(200_000).hash));
        assert_eq!(memory.hash("thing", 7), None);
        assert!(memory.is_entrance(200_000) && !memory.is_entrance(3));
        assert_eq!(memory.around(65), (Some(64), Some(128)));
        assert_eq!(memory.around(1).0, None);
    }
}
