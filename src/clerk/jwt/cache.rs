//! Tokens that were verified already.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use sha2::{Digest, Sha256};

use super::{KeySet, MAX_TOKEN_BYTES, Rejected, Rules, Verified, verify};

/// Tokens that were verified already, so that a page's fortieth request costs a hash and a look-up.
/// Bounded; the oldest entries make room.
pub struct TokenCache {
    pub(super) shards: Vec<Mutex<Shard>>,
    entries_per_shard: usize,
}

#[derive(Default)]
pub(super) struct Shard {
    pub(super) entries: HashMap<[u8; 32], Entry>,
    /// Each key of `entries` once, oldest first.
    pub(super) order: VecDeque<[u8; 32]>,
}

pub(super) struct Entry {
    verified: Arc<Verified>,
    keys: [u8; 32],
    cached_at: i64,
    until: i64,
}

impl Default for TokenCache {
    fn default() -> Self {
        Self::with_capacity(10_000)
    }
}

impl TokenCache {
    /// Longest time, in seconds, that a token is believed without being verified again.
    pub const MAX_AGE_S: i64 = 300;
    const SHARDS: usize = 16;

    /// Holds about `capacity` tokens (rounded up to a multiple of the number of shards).
    pub fn with_capacity(capacity: usize) -> Self {
        Self {
            shards: (0..Self::SHARDS).map(|_| Mutex::default()).collect(),
            entries_per_shard: capacity.div_ceil(Self::SHARDS).max(1),
        }
    }

    /// [`verify`], or what it said of this token before: at most five minutes ago, never past the
    /// token's `exp`, and under the same keys. One cache serves one set of rules.
    ///
    /// # Errors
    /// Those of [`verify`]; refusals are not kept.
    pub fn verify(
        &self,
        token: &str,
        keys: &KeySet,
        rules: &Rules,
        now: i64,
    ) -> Result<Arc<Verified>, Rejected> {
        if token.len() > MAX_TOKEN_BYTES {
            return Err(Rejected::Malformed("too long"));
        }
        let hash: [u8; 32] = Sha256::digest(token).into();
        if let Some(verified) = self.get(&hash, keys, now) {
            return Ok(verified);
        }
        let verified = Arc::new(verify(token, keys, rules, now)?);
        let until = verified.expires_at.min(now.saturating_add(Self::MAX_AGE_S));
        if until > now {
            let verified = Arc::clone(&verified);
            self.put(hash, Entry { verified, keys: keys.fingerprint, cached_at: now, until });
        }
        Ok(verified)
    }

    fn get(&self, hash: &[u8; 32], keys: &KeySet, now: i64) -> Option<Arc<Verified>> {
        let shard = self.shard(hash).lock().unwrap_or_else(PoisonError::into_inner);
        let entry = shard.entries.get(hash)?;
        // A clock set back must not stretch an entry's life.
        let fresh = (entry.cached_at..entry.until).contains(&now);
        (fresh && entry.keys == keys.fingerprint).then(|| Arc::clone(&entry.verified))
    }

    fn put(&self, hash: [u8; 32], entry: Entry) {
        let mut shard = self.shard(&hash).lock().unwrap_or_else(PoisonError::into_inner);
        if shard.entries.insert(hash, entry).is_some() {
            return;
        }
        shard.order.push_back(hash);
        if shard.order.len() > self.entries_per_shard
            && let Some(oldest) = shard.order.pop_front()
        {
            shard.entries.remove(&oldest);
        }
    }

    fn shard(&self, hash: &[u8; 32]) -> &Mutex<Shard> {
        &self.shards[usize::from(hash[0]) % Self::SHARDS]
    }
}
