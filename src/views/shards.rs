//! A map in memory that many threads read and one thread writes: cut into parts, each with its own
//! lock, so that they seldom wait for each other.

use std::array;
use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::{PoisonError, RwLock};

const SHARDS: usize = 64;

pub(super) struct Shards<K, V> {
    hasher: RandomState,
    parts: [RwLock<HashMap<K, V>>; SHARDS],
}

impl<K: Eq + Hash, V: Clone> Shards<K, V> {
    pub fn new() -> Self {
        Self { hasher: RandomState::new(), parts: array::from_fn(|_| RwLock::default()) }
    }

    pub fn get(&self, key: &K) -> Option<V> {
        self.part(key).read().unwrap_or_else(PoisonError::into_inner).get(key).cloned()
    }

    pub fn insert(&self, key: K, value: V) {
        self.part(&key).write().unwrap_or_else(PoisonError::into_inner).insert(key, value);
    }

    /// Keeps `value` if `still` holds once nobody else can write to its part, and makes room by
    /// letting go of the whole part at `most`.
    pub fn keep(&self, key: K, value: V, most: usize, still: impl FnOnce() -> bool) {
        let mut part = self.part(&key).write().unwrap_or_else(PoisonError::into_inner);
        if part.len() >= most {
            part.clear();
        }
        if still() {
            part.insert(key, value);
        }
    }

    pub fn clear(&self) {
        for part in &self.parts {
            part.write().unwrap_or_else(PoisonError::into_inner).clear();
        }
    }

    pub fn remove(&self, key: &K) {
        self.part(key).write().unwrap_or_else(PoisonError::into_inner).remove(key);
    }

    fn part(&self, key: &K) -> &RwLock<HashMap<K, V>> {
        let hash = self.hasher.hash_one(key);
        // The top bits: the map inside places by the low ones.
        &self.parts[(hash >> 58) as usize % SHARDS]
    }
}
