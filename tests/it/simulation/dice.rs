//! Everything that a simulation draws: from one seed, and the same on every machine.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// SplitMix64 (Steele, Lea and Flood 2014): a fault that a seed has shown stays under that seed,
/// whichever version of whatever crate is there.
#[derive(Debug, Clone)]
pub struct Dice(u64);

impl Dice {
    /// Those of one subject among many: what one draws does not move what another does.
    pub fn of(seed: u64, subject: &str, number: u64) -> Self {
        // FNV-1a
        let hash = subject.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let mut dice = Self(seed ^ hash);
        Self(dice.next() ^ number)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// 0 to `end`, without `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    pub fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    pub fn pick<'a, T>(&mut self, among: &'a [T]) -> Option<&'a T> {
        let end = u64::try_from(among.len()).unwrap();
        if end == 0 { None } else { among.get(usize::try_from(self.below(end)).unwrap()) }
    }
}

/// When what goes wrong. What is drawn depends on who asks for the how manyth time and on nothing
/// else, so that the order of a hash map cannot leak in.
#[derive(Debug)]
pub struct Faults {
    seed: u64,
    /// How often something goes wrong, in percent.
    pub often: u64,
    asked: Mutex<BTreeMap<String, u64>>,
    calm: AtomicBool,
}

impl Faults {
    pub fn new(seed: u64, often: u64) -> Self {
        let (asked, calm) = (Mutex::default(), AtomicBool::new(often == 0));
        Self { seed, often, asked, calm }
    }

    /// From now on nothing goes wrong and everything is prompt, or no longer.
    pub fn calm(&self, calm: bool) {
        self.calm.store(calm, Ordering::SeqCst);
    }

    pub fn are_calm(&self) -> bool {
        self.calm.load(Ordering::SeqCst)
    }

    pub fn dice(&self, subject: &str) -> Dice {
        let mut asked = self.asked.lock().unwrap();
        let number = asked.entry(subject.to_owned()).or_default();
        *number += 1;
        Dice::of(self.seed, subject, *number)
    }

    /// Now and then something goes wrong.
    pub fn strike(&self, dice: &mut Dice) -> bool {
        let hit = dice.percent(self.often);
        hit && !self.are_calm()
    }

    /// Mostly no time, sometimes a little, rarely seconds.
    pub async fn delay(&self, dice: &mut Dice) {
        let millis = match dice.below(20) {
            0..=9 => 0,
            10..=17 => dice.below(20),
            18 => dice.below(400),
            _ => dice.below(4000),
        };
        if millis == 0 || self.are_calm() {
            tokio::task::yield_now().await;
        } else {
            tokio::time::sleep(Duration::from_millis(millis)).await;
        }
    }
}
