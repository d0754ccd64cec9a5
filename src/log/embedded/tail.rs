//! The newest events, in memory: whoever follows the log reads them without asking the disk.

use std::collections::VecDeque;
use std::sync::Mutex;

use super::guard;
use crate::log::Recorded;

/// What is kept at the most: some seconds of a busy log.
const EVENTS: usize = 8192;
const BYTES: usize = 4 * 1024 * 1024;

/// The log's end without gaps, durable all of it.
#[derive(Default)]
pub(super) struct Tail(Mutex<Kept>);

#[derive(Default)]
struct Kept {
    events: VecDeque<Recorded>,
    bytes: usize,
}

impl Tail {
    /// Takes what was committed, in order and right after what it has.
    pub(super) fn extend(&self, committed: impl IntoIterator<Item = Recorded>) {
        let mut kept = guard(&self.0);
        for event in committed {
            kept.bytes += size(&event);
            kept.events.push_back(event);
        }
        while kept.bytes > BYTES || kept.events.len() > EVENTS {
            let Some(oldest) = kept.events.pop_front() else { break };
            kept.bytes -= size(&oldest);
        }
    }

    /// Up to `limit` events after `after`; none if they begin before what is kept here.
    pub(super) fn page(&self, after: u64, limit: usize) -> Option<Vec<Recorded>> {
        let kept = guard(&self.0);
        let first = kept.events.front()?.position;
        let skipped = usize::try_from(after.saturating_add(1).checked_sub(first)?).ok()?;
        Some(kept.events.iter().skip(skipped).take(limit).cloned().collect())
    }
}

fn size(event: &Recorded) -> usize {
    event.data.len() + event.metadata.len()
}
