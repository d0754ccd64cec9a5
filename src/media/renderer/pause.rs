//! How long a machine that could not work waits until it takes the next job: else one without room,
//! without its store or without its engine would fail all that wait, as fast as it can take them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

const FIRST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(60);

/// Of all who take jobs for one engine: they lack the same things. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Pause(Arc<Mutex<Faults>>);

#[derive(Debug, Default)]
struct Faults {
    in_a_row: u32,
    until: Option<Instant>,
}

impl Pause {
    /// A job was done.
    pub fn worked(&self) {
        *self.faults() = Faults::default();
    }

    /// A job was not done, by a fault of the machine.
    pub fn failed(&self) {
        let mut faults = self.faults();
        let now = Instant::now();
        if faults.until.is_some_and(|until| now < until) {
            // Begun before, and likely of the same cause.
            return;
        }
        let pause = (FIRST * 2_u32.pow(faults.in_a_row.min(6))).min(LONGEST);
        faults.in_a_row = faults.in_a_row.saturating_add(1);
        // With a little chance in it: others may lack the same.
        faults.until = Some(now + pause.mul_f64(rand::random_range(0.5..1.0)));
    }

    /// How much of it is left, if anything is.
    pub fn left(&self) -> Option<Duration> {
        let left = self.faults().until?.saturating_duration_since(Instant::now());
        (!left.is_zero()).then_some(left)
    }

    /// Resolves when nothing is left of it.
    pub async fn over(&self) {
        while let Some(left) = self.left() {
            tokio::time::sleep(left).await;
        }
    }

    fn faults(&self) -> MutexGuard<'_, Faults> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_machine_that_cannot_work_pauses_longer_each_time_until_it_has_worked() {
        let pause = Pause::default();
        assert_eq!(pause.left(), None);
        for seconds in [1, 2, 4, 8, 16, 32, 60, 60] {
            pause.failed();
            // Another slot, by the same cause.
            pause.failed();
            let (longest, began) = (Duration::from_secs(seconds), Instant::now());
            pause.over().await;
            let (least, most) = (longest / 2, longest + Duration::from_millis(5));
            assert!((least..most).contains(&began.elapsed()), "{:?}", began.elapsed());
        }
        pause.failed();
        pause.worked();
        assert_eq!(pause.left(), None);
        pause.failed();
        assert!(pause.left().is_some_and(|left| left <= FIRST));
    }
}
