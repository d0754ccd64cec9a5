//! What one verification of a token costs when it is not in the cache, and when it is.

use criterion::{Criterion, criterion_group, criterion_main};
use serde_json::json;
use t2m::clerk::jwt::{KeySet, Rules, TokenCache, verify};
use t2m::clerk::signing::SigningKey;

criterion_group!(benches, verification);
criterion_main!(benches);

const NOW: i64 = 1_767_225_600;

fn verification(c: &mut Criterion) {
    let key = SigningKey::generate("bench").expect("a key");
    let keys = KeySet::from_jwks(&key.jwks_json().to_string()).expect("its public half");
    let rules = Rules {
        issuer: Some("https://clerk.example.com".to_owned()),
        audience: Some("t2m-api".to_owned()),
        authorized_parties: vec!["https://app.example.com".to_owned()],
    };
    let token = key
        .sign(&json!({
            "iss": "https://clerk.example.com", "aud": "t2m-api", "azp": "https://app.example.com",
            "sub": "user_2rGrace", "sid": "sess_2rDesk", "iat": NOW, "nbf": NOW, "exp": NOW + 3600,
            "email": "grace@example.com", "role": "admin", "subscription_tier": "premium",
            "permissions": ["video:create", "video:read", "video:delete"],
        }))
        .expect("signed");
    c.bench_function("a token verified", |b| {
        b.iter(|| verify(&token, &keys, &rules, NOW).expect("verified"));
    });
    let cache = TokenCache::with_capacity(1000);
    c.bench_function("a token found in the cache", |b| {
        b.iter(|| cache.verify(&token, &keys, &rules, NOW).expect("verified"));
    });
}
