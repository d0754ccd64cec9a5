//! The token parser: whatever bytes come as a bearer token, it answers. The input is tried as it is
//! and, since a signature cannot be guessed, as the payload of a token that is signed well.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use t2m::clerk::jwt::{KeySet, Rules, verify};
use t2m::clerk::signing::SigningKey;

static KEY: LazyLock<SigningKey> = LazyLock::new(|| SigningKey::generate("fuzz").expect("a key"));
static KEYS: LazyLock<KeySet> = LazyLock::new(|| {
    KeySet::from_jwks(&KEY.jwks_json().to_string()).expect("its public half")
});
const NOW: i64 = 1_767_225_600;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let rules = Rules { issuer: Some("https://clerk.example.com".into()), ..Rules::default() };
    assert!(verify(text, &KEYS, &rules, NOW).is_err(), "a guessed token is accepted");
    if let Ok(claims) = serde_json::from_str::<serde_json::Value>(text) {
        if let Ok(token) = KEY.sign(&claims) {
            let _ = verify(&token, &KEYS, &rules, NOW);
        }
    }
});
