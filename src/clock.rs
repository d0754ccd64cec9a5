//! The only source of the present time and of fresh ids, so that a replay is exact and a test can
//! move time.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use chrono::{DateTime, SubsecRound, TimeDelta, Utc};
use uuid::Uuid;

/// Tells the time and makes ids. Clones share the same clock.
#[derive(Debug, Clone)]
pub struct Clock(Source);

#[derive(Debug, Clone)]
enum Source {
    System,
    /// Unix microseconds that only [`Clock::advance`] moves.
    Manual(Arc<AtomicI64>),
    /// The same, and its ids follow from a seed.
    Seeded(Arc<Seeded>),
}

#[derive(Debug)]
struct Seeded {
    micros: AtomicI64,
    seed: u64,
    /// Ids made so far.
    made: AtomicU64,
}

impl Clock {
    /// The machine's clock.
    pub fn system() -> Self {
        Self(Source::System)
    }

    /// A clock that stands still at `start` until it is advanced.
    pub fn manual(start: DateTime<Utc>) -> Self {
        Self(Source::Manual(Arc::new(AtomicI64::new(start.timestamp_micros()))))
    }

    /// The same for a simulation that must come out alike each time: its ids follow from `seed`.
    /// No two clocks that may meet in one log have the same.
    pub fn seeded(start: DateTime<Utc>, seed: u64) -> Self {
        let micros = AtomicI64::new(start.timestamp_micros());
        Self(Source::Seeded(Arc::new(Seeded { micros, seed, made: AtomicU64::new(0) })))
    }

    /// The present, in whole microseconds: what the log stores, so nothing is rounded later.
    #[allow(clippy::disallowed_methods)]
    pub fn now(&self) -> DateTime<Utc> {
        match &self.0 {
            Source::System => Utc::now().trunc_subsecs(6),
            Source::Manual(micros) => at(micros),
            Source::Seeded(seeded) => at(&seeded.micros),
        }
    }

    /// Moves a manual clock; the machine's clock does not listen.
    pub fn advance(&self, by: TimeDelta) {
        let micros = match &self.0 {
            Source::System => return,
            Source::Manual(micros) => micros,
            Source::Seeded(seeded) => &seeded.micros,
        };
        micros.fetch_add(by.num_microseconds().unwrap_or_default(), Ordering::SeqCst);
    }

    /// A fresh id: UUID version 7 (RFC 9562), so that ids sort by the time they were made.
    #[allow(clippy::disallowed_methods)]
    pub fn fresh_id(&self) -> Uuid {
        match &self.0 {
            Source::System | Source::Manual(_) => Uuid::now_v7(),
            Source::Seeded(seeded) => seeded.next_id(),
        }
    }
}

impl Seeded {
    fn next_id(&self) -> Uuid {
        let made = self.made.fetch_add(1, Ordering::SeqCst);
        let mut random = [0; 10];
        random[..8].copy_from_slice(&mixed(mixed(self.seed).wrapping_add(made)).to_be_bytes());
        // What tells them apart even if two of the mixed numbers are alike.
        random[8..].copy_from_slice(&(made as u16).to_be_bytes());
        let millis = self.micros.load(Ordering::SeqCst) / 1000;
        uuid::Builder::from_unix_timestamp_millis(millis.unsigned_abs(), &random).into_uuid()
    }
}

fn at(micros: &AtomicI64) -> DateTime<Utc> {
    DateTime::from_timestamp_micros(micros.load(Ordering::SeqCst)).unwrap_or_default()
}

/// The output function of SplitMix64 (Steele, Lea and Flood 2014).
fn mixed(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ids_of_a_seeded_clock_follow_from_its_seed() {
        let ids = |seed| {
            let clock = Clock::seeded(DateTime::UNIX_EPOCH, seed);
            [clock.fresh_id(), clock.fresh_id()]
        };
        assert_eq!(ids(1), ids(1));
        let all = [ids(1), ids(2)].concat();
        assert!(all.iter().all(|id| id.get_version_num() == 7));
        assert_eq!(all.iter().collect::<std::collections::HashSet<_>>().len(), 4);
    }
}
