//! Everything between Clerk and us: session tokens, the keys that sign them, webhooks, and the
//! Backend API. Nothing here reads the time or keeps anything on disk; whoever calls hands in `now`.

pub mod api;
pub mod jwks;
pub mod jwt;
pub mod metadata;
pub mod payload;
pub mod signing;
pub mod translate;
pub mod webhook;

use std::sync::Arc;

use jwks::Jwks;
use jwt::{KeySet, Rejected, Rules, TokenCache, Verified};

/// Where the keys that verify session tokens come from.
pub enum Keys {
    /// `CLERK_JWT_KEY`, or the development key: verification without the network.
    Fixed(Arc<KeySet>),
    /// Fetched from the issuer and refreshed in the background by [`Jwks::run`].
    Fetched(Arc<Jwks>),
}

/// The one door for bearer tokens: keys, rules and the cache of tokens that were verified already.
pub struct Authenticator {
    keys: Keys,
    rules: Rules,
    cache: TokenCache,
}

impl Authenticator {
    pub fn new(keys: Keys, rules: Rules) -> Self {
        Self { keys, rules, cache: TokenCache::default() }
    }

    /// Whether any key is at hand; without one every token is answered with 503 by the caller.
    pub fn has_keys(&self) -> bool {
        match &self.keys {
            Keys::Fixed(_) => true,
            Keys::Fetched(jwks) => jwks.current().is_some(),
        }
    }

    /// Seconds since the keys were fetched; none when they are given or not there yet.
    pub fn keys_age(&self, now: i64) -> Option<i64> {
        match &self.keys {
            Keys::Fixed(_) => None,
            Keys::Fetched(jwks) => Some(now.saturating_sub(jwks.fetched_at()?)),
        }
    }

    /// Verifies `token` as of `now` (Unix seconds). An unknown key id makes the key set be fetched
    /// again, at most once per 30 s for all callers together.
    ///
    /// # Errors
    /// [`Rejected::NoKeys`] when no key set has been fetched yet (503, not 401); any other variant
    /// says what is wrong with the token.
    pub async fn authenticate(&self, token: &str, now: i64) -> Result<Arc<Verified>, Rejected> {
        match self.authenticate_with_known_keys(token, now) {
            Err(Rejected::UnknownKey | Rejected::NoKeys) => {
                if let Keys::Fetched(jwks) = &self.keys {
                    jwks.refetch_for_unknown_key().await;
                }
                self.authenticate_with_known_keys(token, now)
            }
            verdict => verdict,
        }
    }

    fn authenticate_with_known_keys(
        &self,
        token: &str,
        now: i64,
    ) -> Result<Arc<Verified>, Rejected> {
        let keys = match &self.keys {
            Keys::Fixed(keys) => Arc::clone(keys),
            Keys::Fetched(jwks) => jwks.current().ok_or(Rejected::NoKeys)?,
        };
        self.cache.verify(token, &keys, &self.rules, now)
    }
}
