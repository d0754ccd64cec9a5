//! The webhook verifier: whatever stands in the headers, it answers, and it believes nothing that
//! was not signed. The input is three lines for the headers, then the body.
#![no_main]

use std::sync::LazyLock;

use chrono::DateTime;
use libfuzzer_sys::fuzz_target;
use t2m::clerk::webhook::{WebhookVerifier, sign};

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const NOW: i64 = 1_767_225_600;

static VERIFIER: LazyLock<WebhookVerifier> =
    LazyLock::new(|| WebhookVerifier::parse(SECRET).expect("a secret"));

fuzz_target!(|data: &[u8]| {
    let now = DateTime::from_timestamp(NOW, 0).expect("a time");
    let mut lines = data.splitn(4, |byte| *byte == b'\n');
    let [id, timestamp, signature, body] = [(); 4].map(|()| lines.next().unwrap_or_default());
    let headers = [("svix-id", id), ("svix-timestamp", timestamp), ("webhook-signature", signature)];
    assert!(VERIFIER.verify(headers, body, now).is_err(), "a guessed signature is accepted");

    // Signed as it should be, it is refused only for what stands in the id.
    let Ok(id) = std::str::from_utf8(id) else { return };
    let Ok(signature) = sign(SECRET, id, NOW, body) else { return };
    let timestamp = NOW.to_string();
    let headers = [
        ("webhook-id", id.as_bytes()),
        ("webhook-timestamp", timestamp.as_bytes()),
        ("svix-signature", signature.as_bytes()),
    ];
    if let Ok(message_id) = VERIFIER.verify(headers, body, now) {
        assert_eq!(message_id.0, id);
    }
});
