//! The newest events, in memory: whoever follows the log reads them without asking the disk or the
//! database.

use std::collections::VecDeque;
use std::sync::Mutex;

use super::{Recorded, guard};

/// What is kept at the most: some seconds of a busy log.
const EVENTS: usize = 8192;
const BYTES: usize = 4 << 20;

/// Events in the log's order with none left out, durable all of them. They end where the log ends, unless
/// somebody else wrote to it since.
#[derive(Default)]
pub(super) struct Tail(Mutex<Kept>);

#[derive(Default)]
struct Kept {
    /// The position before the first event; between the two there is none.
    since: u64,
    events: VecDeque<Recorded>,
    bytes: usize,
}

impl Tail {
    /// Takes what was committed or read, in order, of a log whose positions have no gaps. What is
    /// here already is left out; after a gap the rest begins anew.
    pub(super) fn extend(&self, durable: impl IntoIterator<Item = Recorded>) {
        let mut kept = guard(&self.0);
        durable.into_iter().for_each(|event| kept.push(event.position.saturating_sub(1), event));
        kept.shorten();
    }

    /// The same for a log whose positions have gaps: `durable` is all there is from `after` on.
    #[cfg_attr(not(feature = "eventstore"), allow(dead_code, reason = "no engine leaves gaps"))]
    pub(super) fn follow(&self, after: u64, durable: impl IntoIterator<Item = Recorded>) {
        let (mut kept, mut before) = (guard(&self.0), after);
        for event in durable {
            let position = event.position;
            kept.push(before, event);
            before = position;
        }
        kept.shorten();
    }

    /// Up to `limit` events after `after`; none if they begin before what is kept here.
    pub(super) fn page(&self, after: u64, limit: usize) -> Option<Vec<Recorded>> {
        let kept = guard(&self.0);
        if kept.events.is_empty() || after < kept.since {
            return None;
        }
        let skipped = kept.events.partition_point(|event| event.position <= after);
        Some(kept.events.iter().skip(skipped).take(limit).cloned().collect())
    }
}

impl Kept {
    fn push(&mut self, before: u64, event: Recorded) {
        match self.events.back().map(|last| last.position) {
            Some(last) if event.position <= last => return,
            Some(last) if before <= last => {}
            _ => *self = Self { since: before, ..Self::default() },
        }
        self.bytes += size(&event);
        self.events.push_back(event);
    }

    fn shorten(&mut self) {
        while self.bytes > BYTES || self.events.len() > EVENTS {
            let Some(oldest) = self.events.pop_front() else { break };
            self.bytes -= size(&oldest);
            self.since = oldest.position;
        }
    }
}

fn size(event: &Recorded) -> usize {
    event.data.len() + event.metadata.len()
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use chrono::DateTime;
    use uuid::Uuid;

    use super::*;

    fn event(position: u64) -> Recorded {
        Recorded {
            id: Uuid::from_u128(position.into()),
            stream: "thing".into(),
            revision: position - 1,
            position,
            kind: "thing.happened.v1".into(),
            time: DateTime::UNIX_EPOCH,
            data: vec![0; 100].into(),
            metadata: Bytes::new(),
            hash: [0; 32],
        }
    }

    /// What is kept after `runs` were taken.
    fn check(runs: &[std::ops::Range<u64>], then: std::ops::Range<u64>) {
        let tail = Tail::default();
        runs.iter().for_each(|run| tail.extend(run.clone().map(event)));
        let kept = tail.page(then.start - 1, usize::MAX).expect("it begins there");
        assert_eq!(kept.iter().map(|e| e.position).collect::<Vec<_>>(), then.collect::<Vec<_>>());
    }

    #[test]
    fn a_run_joins_repeats_nothing_and_begins_anew_after_a_gap() {
        check(&[1..4, 4..6], 1..6);
        check(&[1..4, 2..6], 1..6);
        check(&[3..6, 1..4], 3..6);
        check(&[1..4, 5..7], 5..7);
        check(&[1..10, 10..20_001], 11_809..20_001);
        let tail = Tail::default();
        tail.extend((5..9).map(event));
        assert_eq!(tail.page(3, 10), None, "what is older is not here");
    }

    #[test]
    fn as_many_bytes_are_kept_as_may_be_and_the_newest_of_them() {
        let large = |position| Recorded {
            data: vec![0; BYTES / 8].into(),
            metadata: vec![0; BYTES / 8].into(),
            ..event(position)
        };
        let kept = |tail: &Tail, first: u64| {
            assert_eq!(tail.page(first - 2, 10), None);
            tail.page(first - 1, 10).expect("it begins there").len()
        };
        let tail = Tail::default();
        tail.extend((1..=4).map(large));
        assert_eq!(tail.page(0, 10).unwrap().len(), 4, "just as many as may be");
        tail.extend((5..=6).map(large));
        assert_eq!(kept(&tail, 3), 4);
        // After a gap nothing of what was before counts.
        tail.extend((8..=11).map(large));
        assert_eq!(kept(&tail, 8), 4);
    }

    #[test]
    fn a_page_begins_after_the_position_and_ends_at_its_limit() {
        let tail = Tail::default();
        assert_eq!(tail.page(0, 10), None, "nothing is here");
        tail.extend((5..9).map(event));
        let page = |after, limit| -> Vec<u64> {
            tail.page(after, limit).unwrap().iter().map(|event| event.position).collect()
        };
        assert_eq!(page(5, 2), [6, 7]);
        assert_eq!(page(7, 9), [8]);
        assert!(page(8, 9).is_empty());
        assert!(page(u64::MAX, 9).is_empty());
    }

    #[test]
    fn gaps_between_positions_are_no_gaps_in_the_log() {
        let positions = |page: Option<Vec<Recorded>>| {
            page.map(|page| page.iter().map(|event| event.position).collect::<Vec<_>>())
        };
        let tail = Tail::default();
        assert_eq!(tail.page(0, 10), None);
        tail.follow(10, [event(30), event(70)]);
        tail.follow(30, [event(70), event(90)]);
        assert_eq!(positions(tail.page(10, 10)), Some(vec![30, 70, 90]));
        assert_eq!(positions(tail.page(29, 2)), Some(vec![30, 70]));
        assert_eq!(positions(tail.page(30, 10)), Some(vec![70, 90]));
        assert_eq!(positions(tail.page(90, 10)), Some(vec![]));
        assert_eq!(tail.page(9, 10), None);
        tail.follow(95, [event(99)]);
        assert_eq!(tail.page(90, 10), None, "there may be one between 90 and 95");
        assert_eq!(positions(tail.page(95, 10)), Some(vec![99]));
    }
}
