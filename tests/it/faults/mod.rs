//! Faults of the machine below, and what holds all the same: nothing acknowledged is lost, nothing
//! happens twice, and what the log says is what the views show. Each test here is the short form of
//! one in `scripts/soak`, which sets `T2M_ROUNDS`; `T2M_SEED` repeats a run's draws.

use std::io::Write;
use std::time::Duration;

use t2m::clock::Clock;

mod clock;
mod deeds;
mod disk;
mod io_errors;
mod kills;
mod ledger;
mod power;
mod repeats;
mod room;
mod uploads;

pub use disk::library;

/// How often a fault strikes: `short`, unless the long form is asked for.
pub fn rounds(short: usize) -> usize {
    variable("T2M_ROUNDS").unwrap_or(short)
}

/// What is drawn in a test, the same for the same seed (SplitMix64, Steele et al. 2014).
pub struct Dice(u64);

impl Dice {
    /// Of the run's seed, which a failing test shows.
    pub fn new() -> Self {
        let fresh = || Clock::system().fresh_id().as_u64_pair().1;
        let seed = variable("T2M_SEED").unwrap_or_else(fresh);
        println!("T2M_SEED={seed}");
        Self::of(seed)
    }

    pub fn of(seed: u64) -> Self {
        Self(seed)
    }

    pub fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// At least `from`, less than `to`.
    pub fn between(&mut self, from: usize, to: usize) -> usize {
        from + usize::try_from(self.roll() % (to - from) as u64).expect("a rest fits")
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.between(0, last + 1));
        }
    }
}

fn variable<T: std::str::FromStr>(name: &str) -> Option<T> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is not a number: {text}")))
}

/// Says so where nothing catches it: a test that was passed over must not look like one that passed.
pub fn skip(test: &str, why: &str) {
    let line = format!("SKIPPED {test}: {why}\n");
    std::io::stderr().write_all(line.as_bytes()).expect("stderr can be written");
}

/// Asks until it is so; a hang fails.
pub async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    for _ in 0..600 {
        if holds().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("never: {what}");
}
