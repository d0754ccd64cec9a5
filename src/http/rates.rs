//! How much a user may ask for: a sliding window a user and class, in this node's memory.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Mutex, PoisonError};

/// `100/1h`: so many requests in so many seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    pub requests: u32,
    pub window_s: i64,
}

/// A text that is no budget.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected a number of requests and a time, such as 100/1h")]
pub struct InvalidBudget;

impl std::str::FromStr for Budget {
    type Err = InvalidBudget;

    fn from_str(text: &str) -> Result<Self, InvalidBudget> {
        let (requests, window) = text.split_once('/').ok_or(InvalidBudget)?;
        let requests = requests.trim().parse().map_err(|_| InvalidBudget)?;
        let window = window.trim();
        let digits = window.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit_s = match &window[digits.len()..] {
            "s" => 1,
            "m" => 60,
            "h" => 3600,
            "d" => 86_400,
            _ => return Err(InvalidBudget),
        };
        let count: i64 =
            if digits.is_empty() { Ok(1) } else { digits.parse() }.map_err(|_| InvalidBudget)?;
        if requests == 0 || !(1..=366).contains(&count) && unit_s == 86_400 || count < 1 {
            return Err(InvalidBudget);
        }
        let window_s = count.checked_mul(unit_s).ok_or(InvalidBudget)?;
        Ok(Self { requests, window_s })
    }
}

/// What a request counts against.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    Write,
    Read,
    /// Asking for a signed link: players do it at every render (CONTRACT, Decisions).
    Link,
}

/// How a budget stands after a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    pub allowed: bool,
    pub limit: u32,
    pub remaining: u32,
    /// Unix seconds at which the present window is over.
    pub reset: i64,
    /// Seconds until a refused request would be let through.
    pub retry_after_s: i64,
}

/// The budgets of all users.
pub struct Rates {
    writes: Budget,
    reads: Budget,
    shards: Vec<Mutex<HashMap<(String, Class), Window>>>,
    hasher: RandomState,
}

/// Two neighbouring fixed windows; weighting the older by its overlap slides them.
#[derive(Debug, Clone, Copy, Default)]
struct Window {
    start: i64,
    count: u32,
    previous: u32,
}

const SHARDS: usize = 16;
/// Windows a shard keeps before it drops those that are over.
const KEPT: usize = 10_000;

impl Rates {
    pub fn new(writes: Budget, reads: Budget) -> Self {
        let shards = (0..SHARDS).map(|_| Mutex::default()).collect();
        Self { writes, reads, shards, hasher: RandomState::new() }
    }

    fn budget(&self, class: Class) -> Budget {
        match class {
            Class::Write => self.writes,
            Class::Read | Class::Link => self.reads,
        }
    }

    /// Counts a request of `user` at `now` (Unix seconds), unless the budget is used up.
    pub fn take(&self, user: &str, class: Class, now: i64) -> Standing {
        let budget = self.budget(class);
        let index = usize::try_from(self.hasher.hash_one(user) % SHARDS as u64).unwrap_or_default();
        let mut shard = self.shards[index].lock().unwrap_or_else(PoisonError::into_inner);
        if shard.len() >= KEPT {
            let longest = self.writes.window_s.max(self.reads.window_s);
            shard.retain(|_, window| now - window.start < 2 * longest);
        }
        shard.entry((user.to_owned(), class)).or_default().take(budget, now)
    }
}

impl Window {
    fn take(&mut self, budget: Budget, now: i64) -> Standing {
        let start = now - now.rem_euclid(budget.window_s);
        if start != self.start {
            self.previous = if start - self.start == budget.window_s { self.count } else { 0 };
            self.count = 0;
            self.start = start;
        }
        let left_s = start + budget.window_s - now;
        let carried = i64::from(self.previous) * left_s / budget.window_s;
        let used = i64::from(self.count) + carried;
        let allowed = used < i64::from(budget.requests);
        if allowed {
            self.count = self.count.saturating_add(1);
        }
        let remaining = i64::from(budget.requests) - used - i64::from(allowed);
        Standing {
            allowed,
            limit: budget.requests,
            remaining: u32::try_from(remaining.max(0)).unwrap_or_default(),
            reset: start + budget.window_s,
            retry_after_s: if allowed { 0 } else { self.free_in(budget, left_s) },
        }
    }

    /// Seconds until enough of the older window has slid out.
    fn free_in(&self, budget: Budget, left_s: i64) -> i64 {
        let free = i64::from(budget.requests) - i64::from(self.count);
        if free <= 0 || self.previous == 0 {
            return left_s.max(1);
        }
        let enough_left_s = (free * budget.window_s - 1) / i64::from(self.previous);
        (left_s - enough_left_s).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUDGET: Budget = Budget { requests: 10, window_s: 100 };

    #[test]
    fn budgets_are_read_as_the_contract_writes_them() {
        assert_eq!("100/1h".parse(), Ok(Budget { requests: 100, window_s: 3600 }));
        assert_eq!("5/m".parse(), Ok(Budget { requests: 5, window_s: 60 }));
        for bad in ["", "100", "0/1h", "x/1h", "5/1", "5/-1h", "5/0h", "5/9999999999999999d"] {
            assert_eq!(bad.parse::<Budget>(), Err(InvalidBudget), "{bad}");
        }
    }

    #[test]
    fn the_budget_is_used_up_and_slides_free() {
        let rates = Rates::new(BUDGET, BUDGET);
        let take = |now| rates.take("ada", Class::Write, now);
        assert!((0..10).all(|_| take(1000).allowed));
        let refused = take(1050);
        assert!(!refused.allowed);
        assert_eq!((refused.remaining, refused.reset), (0, 1100));
        // Halfway through the next window half of the old requests still count.
        assert!((0..5).all(|_| take(1150).allowed));
        let refused = take(1150);
        assert!(!refused.allowed);
        assert!(!take(1150 + refused.retry_after_s - 1).allowed);
        assert!(take(1150 + refused.retry_after_s).allowed);
    }

    #[test]
    fn users_and_classes_have_budgets_of_their_own() {
        let rates = Rates::new(Budget { requests: 1, window_s: 100 }, BUDGET);
        assert!(rates.take("ada", Class::Write, 0).allowed);
        assert!(!rates.take("ada", Class::Write, 0).allowed);
        assert!(rates.take("ada", Class::Read, 0).allowed);
        assert!(rates.take("bob", Class::Write, 0).allowed);
    }
}
