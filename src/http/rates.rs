//! How much may be asked for: a sliding window a user and class, and one an address for those who
//! are nobody; in this node's memory.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, RandomState};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Mutex, PoisonError};

use super::problem::{Code, Problem};

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

/// What a user's request counts against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
    /// Unix seconds at which a further request is let through: of a budget that is used up the first
    /// one, else the end of the present window.
    pub reset: i64,
    /// Seconds until a refused request would be let through.
    pub retry_after_s: i64,
}

impl Standing {
    /// Whether the request may go on.
    ///
    /// # Errors
    /// 429, saying when to come again.
    pub fn into_result(self) -> Result<(), Problem> {
        if self.allowed {
            return Ok(());
        }
        let seconds = u64::try_from(self.retry_after_s).unwrap_or(1);
        Err(Problem::new(Code::RateLimited).retry_after(seconds))
    }
}

/// The budget of each class.
#[derive(Debug, Clone, Copy)]
pub struct Budgets {
    pub writes: Budget,
    pub reads: Budget,
    pub links: Budget,
    /// Of an address, for requests that prove nothing about their sender.
    pub anonymous: Budget,
}

/// The budgets of everybody, and how they stand.
pub struct Rates {
    writes: Windows<String>,
    reads: Windows<String>,
    links: Windows<String>,
    anonymous: Windows<IpAddr>,
}

impl Rates {
    pub fn new(budgets: Budgets) -> Self {
        Self {
            writes: Windows::new(budgets.writes),
            reads: Windows::new(budgets.reads),
            links: Windows::new(budgets.links),
            anonymous: Windows::new(budgets.anonymous),
        }
    }

    /// Counts a request of `user` at `now` (Unix seconds), unless the budget is used up.
    pub fn take(&self, user: &str, class: Class, now: i64) -> Standing {
        match class {
            Class::Write => self.writes.take(user, now),
            Class::Read => self.reads.take(user, now),
            Class::Link => self.links.take(user, now),
        }
    }

    /// Counts a request of nobody in particular. Of IPv6, the network counts: a host has all of it.
    pub fn take_anonymous(&self, address: IpAddr, now: i64) -> Standing {
        let address = match address {
            IpAddr::V4(_) => address,
            IpAddr::V6(whole) => {
                let network = u128::from(whole) & !u128::from(u64::MAX);
                IpAddr::V6(Ipv6Addr::from(network))
            }
        };
        self.anonymous.take(&address, now)
    }
}

/// One budget, and a window for each who uses it.
struct Windows<K> {
    budget: Budget,
    shards: Vec<Mutex<Shard<K>>>,
    hasher: RandomState,
}

struct Shard<K> {
    windows: HashMap<K, Window>,
    /// With so many, those that are over are dropped.
    full: usize,
}

const SHARDS: usize = 16;
/// Windows a shard keeps without looking which of them are over.
const KEPT: usize = 10_000;
/// Windows a shard keeps at all. With more it forgets all of them: an attacker with addresses
/// without number gets some requests more, but never our memory.
const MOST: usize = 8 * KEPT;

impl<K: Hash + Eq> Windows<K> {
    fn new(budget: Budget) -> Self {
        let empty = || Mutex::new(Shard { windows: HashMap::new(), full: KEPT });
        let shards = (0..SHARDS).map(|_| empty()).collect();
        Self { budget, shards, hasher: RandomState::new() }
    }

    /// The key is made owned only for one that is new.
    fn take<Q>(&self, key: &Q, now: i64) -> Standing
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ToOwned<Owned = K> + ?Sized,
    {
        let index = usize::try_from(self.hasher.hash_one(key) % SHARDS as u64).unwrap_or_default();
        let mut shard = self.shards[index].lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(window) = shard.windows.get_mut(key) {
            return window.take(self.budget, now);
        }
        if shard.windows.len() >= shard.full {
            shard.make_room(self.budget, now);
        }
        shard.windows.entry(key.to_owned()).or_default().take(self.budget, now)
    }
}

impl<K: Hash + Eq> Shard<K> {
    fn make_room(&mut self, budget: Budget, now: i64) {
        self.windows.retain(|_, window| now - window.start < 2 * budget.window_s);
        if self.windows.len() >= MOST {
            self.windows.clear();
        }
        // Twice what is left: the next look pays for itself.
        self.full = (2 * self.windows.len()).clamp(KEPT, MOST);
    }
}

/// Two neighbouring fixed windows; weighting the older by its overlap slides them.
#[derive(Debug, Clone, Copy, Default)]
struct Window {
    start: i64,
    count: u32,
    previous: u32,
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
        let remaining = (i64::from(budget.requests) - used - i64::from(allowed)).max(0);
        let free_in_s = self.free_in(budget, left_s);
        Standing {
            allowed,
            limit: budget.requests,
            remaining: u32::try_from(remaining).unwrap_or_default(),
            reset: now + if remaining == 0 { free_in_s } else { left_s },
            retry_after_s: if allowed { 0 } else { free_in_s },
        }
    }

    /// Seconds until a request that would be refused is let through: until enough of the older window
    /// has slid out, which may be this one by then.
    fn free_in(&self, budget: Budget, left_s: i64) -> i64 {
        let slid = |older: u32, free: i64| {
            let enough_left_s = (free * budget.window_s - 1) / i64::from(older.max(1));
            (budget.window_s - enough_left_s).max(0)
        };
        let free = i64::from(budget.requests) - i64::from(self.count);
        let seconds = match free {
            1.. => slid(self.previous, free) - (budget.window_s - left_s),
            _ => left_s + slid(self.count, i64::from(budget.requests)),
        };
        seconds.max(1)
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

    fn rates(budget: Budget) -> Rates {
        Rates::new(Budgets { writes: budget, reads: BUDGET, links: BUDGET, anonymous: budget })
    }

    #[test]
    fn the_budget_is_used_up_and_slides_free() {
        let rates = rates(BUDGET);
        let take = |now| rates.take("ada", Class::Write, now);
        assert!((0..10).all(|_| take(1000).allowed));
        let refused = take(1050);
        assert!(!refused.allowed);
        assert_eq!((refused.remaining, refused.reset), (0, 1050 + refused.retry_after_s));
        // Halfway through the next window half of the old requests still count.
        assert!((0..5).all(|_| take(1150).allowed));
        let refused = take(1150);
        assert!(!refused.allowed);
        assert!(!take(1150 + refused.retry_after_s - 1).allowed);
        assert!(take(1150 + refused.retry_after_s).allowed);
    }

    proptest::proptest! {
        #[test]
        fn who_waits_as_long_as_told_is_let_through_and_nobody_is_sooner(
            budget in (1_u32..30, 1_i64..200),
            gaps in proptest::collection::vec(0_i64..60, 0..80),
        ) {
            let budget = Budget { requests: budget.0, window_s: budget.1 };
            let (mut window, mut now) = (Window::default(), 1_000_000);
            for gap in gaps {
                now += gap;
                let standing = window.take(budget, now);
                if standing.remaining == 0 {
                    let mut late = window;
                    proptest::prop_assert!(late.take(budget, standing.reset).allowed);
                }
                if !standing.allowed {
                    let (mut early, mut late) = (window, window);
                    let free = now + standing.retry_after_s;
                    proptest::prop_assert!(!early.take(budget, free - 1).allowed);
                    proptest::prop_assert!(late.take(budget, free).allowed);
                }
            }
        }
    }

    #[test]
    fn users_and_classes_have_budgets_of_their_own() {
        let rates = rates(Budget { requests: 1, window_s: 100 });
        assert!(rates.take("ada", Class::Write, 0).allowed);
        assert!(!rates.take("ada", Class::Write, 0).allowed);
        assert!(rates.take("ada", Class::Read, 0).allowed);
        assert!(rates.take("bob", Class::Write, 0).allowed);
    }
    #[test]
    fn an_address_of_version_six_stands_for_its_network() {
        let rates = rates(Budget { requests: 1, window_s: 100 });
        let allowed = |address: &str| rates.take_anonymous(address.parse().unwrap(), 0).allowed;
        assert!(allowed("2001:db8::1"));
        assert!(!allowed("2001:db8::ffff:1"));
        assert!(allowed("2001:db8:0:1::1"));
        assert!(allowed("192.0.2.1"));
        assert!(allowed("192.0.2.2"));
        assert!(!allowed("192.0.2.1"));
    }

    #[test]
    fn addresses_without_number_do_not_fill_the_memory() {
        let rates = rates(BUDGET);
        let most = u32::try_from(2 * SHARDS * MOST).unwrap();
        for address in 0..most {
            rates.take_anonymous(std::net::Ipv4Addr::from_bits(address).into(), 0);
        }
        for shard in &rates.anonymous.shards {
            assert!(shard.lock().unwrap().windows.len() <= MOST);
        }
    }
}
