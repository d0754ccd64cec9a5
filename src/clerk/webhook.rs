//! Signatures of webhook deliveries, as Svix and Standard Webhooks define them: HMAC-SHA256 over
//! `id.timestamp.body`, checked on the raw bytes before anything is parsed.

use base64::Engine;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig, general_purpose};
use chrono::{DateTime, Utc};
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

/// How far, in seconds, a delivery's timestamp may lie from now, either way, both ends included.
pub const TOLERANCE_S: i64 = 300;

const PREFIX: &str = "whsec_";
/// Shorter keys could be guessed; Svix makes 24 bytes.
const MIN_SECRET_BYTES: usize = 16;
const MAX_SECRET_BYTES: usize = 256;
const MAX_ID_BYTES: usize = 256;
const MAX_SIGNATURE_HEADER_BYTES: usize = 8 * 1024;

/// Secrets are shown with and without padding by different dashboards; signatures are never.
const SECRET_BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// The id of a delivery (`msg_…`): the same for each retry of it, so it tells duplicates.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct MessageId(pub String);

/// Why a delivery is not believed. All of these are answered with 400 and recorded nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Rejected {
    #[error("the webhook's {0} header is missing")]
    Missing(&'static str),
    #[error("the webhook's {0} header is there more than once")]
    Repeated(&'static str),
    #[error("the webhook's {0} header is malformed")]
    Malformed(&'static str),
    #[error("the webhook's timestamp is too old")]
    TooOld,
    #[error("the webhook's timestamp is too far in the future")]
    TooNew,
    #[error("the webhook's signature does not match")]
    Signature,
}

/// Verifies deliveries with one secret, or with several while secrets are being rotated.
pub struct WebhookVerifier {
    macs: Vec<Hmac<Sha256>>,
}

impl std::fmt::Debug for WebhookVerifier {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "WebhookVerifier({} secrets)", self.macs.len())
    }
}

impl WebhookVerifier {
    /// Reads `whsec_…`, or several of them separated by commas.
    ///
    /// # Errors
    /// Says which entry is malformed and how, never what it holds.
    pub fn parse(secrets_comma_separated: &str) -> Result<Self, String> {
        let parts = secrets_comma_separated.split(',').enumerate();
        let macs = parts
            .map(|(index, secret)| {
                mac_of(secret.trim()).map_err(|fault| format!("secret {}: {fault}", index + 1))
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { macs })
    }

    /// Checks a delivery and gives its id. `headers` are all headers of the request, repeated ones
    /// included; each of the three that matter falls back from `svix-*` to `webhook-*`.
    ///
    /// # Errors
    /// [`Rejected`] says what is wrong; nothing in `body` has been looked at but for its signature.
    pub fn verify<'a>(
        &self,
        headers: impl IntoIterator<Item = (&'a str, &'a [u8])>,
        body: &[u8],
        now: DateTime<Utc>,
    ) -> Result<MessageId, Rejected> {
        let headers = Headers::find(headers)?;
        let id = parse_id(headers.id.value("svix-id")?)?;
        let timestamp = headers.timestamp.value("svix-timestamp")?;
        check_time(parse_timestamp(timestamp)?, now)?;
        let signatures = headers.signature.value("svix-signature")?;
        if signatures.len() > MAX_SIGNATURE_HEADER_BYTES {
            return Err(Rejected::Malformed("svix-signature"));
        }
        let candidates = parse_signatures(signatures);
        let matches = self.macs.iter().any(|mac| {
            let signed = mac_over(mac.clone(), id, timestamp, body);
            // `verify_slice` compares in constant time.
            candidates.iter().any(|candidate| signed.clone().verify_slice(candidate).is_ok())
        });
        if matches { Ok(MessageId(id.to_owned())) } else { Err(Rejected::Signature) }
    }
}

/// The signature of a delivery: of each callback that this server sends, and of what the demo and
/// the tests deliver as Clerk. `timestamp` is in Unix seconds.
///
/// # Errors
/// Says how `secret` is malformed, never what it holds.
pub fn sign(secret: &str, id: &str, timestamp: i64, body: &[u8]) -> Result<String, String> {
    let timestamp = timestamp.to_string();
    let mac = mac_over(mac_of(secret)?, id, timestamp.as_bytes(), body);
    let signature = general_purpose::STANDARD.encode(mac.finalize().into_bytes());
    Ok(format!("v1,{signature}"))
}

#[derive(Default)]
struct Headers<'a> {
    id: Header<'a>,
    timestamp: Header<'a>,
    signature: Header<'a>,
}

#[derive(Default)]
struct Header<'a> {
    svix: Option<&'a [u8]>,
    webhook: Option<&'a [u8]>,
}

impl<'a> Headers<'a> {
    fn find(all: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Result<Self, Rejected> {
        let mut found = Self::default();
        for (name, value) in all {
            found.take(name, value)?;
        }
        Ok(found)
    }

    fn take(&mut self, name: &str, value: &'a [u8]) -> Result<(), Rejected> {
        let slots = [
            ("svix-id", &mut self.id.svix),
            ("svix-timestamp", &mut self.timestamp.svix),
            ("svix-signature", &mut self.signature.svix),
            ("webhook-id", &mut self.id.webhook),
            ("webhook-timestamp", &mut self.timestamp.webhook),
            ("webhook-signature", &mut self.signature.webhook),
        ];
        for (known, slot) in slots {
            if name.eq_ignore_ascii_case(known) && slot.replace(value).is_some() {
                return Err(Rejected::Repeated(known));
            }
        }
        Ok(())
    }
}

impl<'a> Header<'a> {
    /// A `svix-*` header that is there but wrong does not fall back: who can add a header must not
    /// be able to choose which one counts.
    fn value(&self, name: &'static str) -> Result<&'a [u8], Rejected> {
        self.svix.or(self.webhook).ok_or(Rejected::Missing(name))
    }
}

fn mac_of(secret: &str) -> Result<Hmac<Sha256>, String> {
    let encoded = secret.strip_prefix(PREFIX).ok_or("does not start with whsec_")?;
    let key = SECRET_BASE64.decode(encoded).map_err(|_| "is not base64 after whsec_")?;
    if key.len() < MIN_SECRET_BYTES {
        return Err(format!("is too short ({} bytes; at least {MIN_SECRET_BYTES})", key.len()));
    }
    if key.len() > MAX_SECRET_BYTES {
        return Err(format!("is too long ({} bytes; at most {MAX_SECRET_BYTES})", key.len()));
    }
    Ok(Hmac::new_from_slice(&key).expect("HMAC takes keys of any length"))
}

fn mac_over(mut mac: Hmac<Sha256>, id: &str, timestamp: &[u8], body: &[u8]) -> Hmac<Sha256> {
    for part in [id.as_bytes(), b".", timestamp, b".", body] {
        mac.update(part);
    }
    mac
}

/// An id with a dot is refused: `a.1` + `2` and `a` + `1.2` would sign the same bytes.
fn parse_id(id: &[u8]) -> Result<&str, Rejected> {
    let sound = !id.is_empty()
        && id.len() <= MAX_ID_BYTES
        && id.iter().all(|byte| byte.is_ascii_graphic() && *byte != b'.');
    let id = std::str::from_utf8(id).ok().filter(|_| sound);
    id.ok_or(Rejected::Malformed("svix-id"))
}

/// Digits only and no leading zero, so that one time has one spelling.
fn parse_timestamp(timestamp: &[u8]) -> Result<i64, Rejected> {
    let sound = !timestamp.is_empty()
        && timestamp.len() <= 12
        && timestamp[0] != b'0'
        && timestamp.iter().all(u8::is_ascii_digit);
    let digits = std::str::from_utf8(timestamp).ok().filter(|_| sound);
    digits.and_then(|digits| digits.parse().ok()).ok_or(Rejected::Malformed("svix-timestamp"))
}

fn check_time(timestamp: i64, now: DateTime<Utc>) -> Result<(), Rejected> {
    let age_s = now.timestamp() - timestamp;
    if age_s > TOLERANCE_S {
        return Err(Rejected::TooOld);
    }
    if age_s < -TOLERANCE_S {
        return Err(Rejected::TooNew);
    }
    Ok(())
}

/// The `v1` signatures of a header; other versions and whatever does not decode are passed over,
/// as the specification asks, so that senders can introduce new versions.
fn parse_signatures(header: &[u8]) -> Vec<Vec<u8>> {
    header
        .split(|byte| *byte == b' ')
        .filter_map(|part| part.strip_prefix(b"v1,"))
        .filter_map(|encoded| general_purpose::STANDARD.decode(encoded).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &str = "whsec_6aRDVhO2pXfbAVCMQxuVyazacpzj5x1P";
    const OTHER: &str = "whsec_GqbYx83y9pNsJibOx7QEyeuuFW12wi/V";
    const NOW: i64 = 1_893_456_000;

    fn at(seconds: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(seconds, 0).unwrap()
    }

    fn verify(
        secrets: &str,
        headers: &[(&str, &str)],
        body: &[u8],
        now: i64,
    ) -> Result<MessageId, Rejected> {
        let headers = headers.iter().map(|(name, value)| (*name, value.as_bytes()));
        WebhookVerifier::parse(secrets).unwrap().verify(headers, body, at(now))
    }

    #[test]
    fn every_official_signature_case_gets_its_official_verdict() {
        let vectors: serde_json::Value =
            serde_json::from_str(include_str!("../../tests/fixtures/clerk/vectors-sample.json"))
                .unwrap();
        let cases = vectors["svix"].as_array().unwrap();
        assert_eq!(cases.len(), 22);
        for case in cases {
            let headers: Vec<(&str, &[u8])> = case["headers"]
                .as_array()
                .unwrap()
                .iter()
                .map(|pair| (pair[0].as_str().unwrap(), pair[1].as_str().unwrap().as_bytes()))
                .collect();
            let body = general_purpose::STANDARD.decode(case["body_b64"].as_str().unwrap());
            let now = at(case["now"].as_i64().unwrap());
            let verdict = WebhookVerifier::parse(case["secret"].as_str().unwrap())
                .map_err(|_| ())
                .and_then(|verifier| verifier.verify(headers, &body.unwrap(), now).map_err(|_| ()));
            let expected = case["expected"] == "accept";
            assert_eq!(verdict.is_ok(), expected, "{}", case["name"]);
        }
    }

    #[test]
    fn what_sign_makes_verifies_under_each_secret_of_a_rotation() {
        let signature = sign(OTHER, "msg_1", NOW, b"{}").unwrap();
        let timestamp = NOW.to_string();
        let headers = [
            ("Svix-Id", "msg_1"),
            ("svix-timestamp", &timestamp),
            ("webhook-signature", &signature),
        ];
        let both = format!("{SECRET} , {OTHER}");
        assert_eq!(verify(&both, &headers, b"{}", NOW), Ok(MessageId("msg_1".into())));
        assert_eq!(verify(SECRET, &headers, b"{}", NOW), Err(Rejected::Signature));
    }

    #[test]
    fn the_tolerance_is_five_minutes_both_ways_and_inclusive() {
        let signature = sign(SECRET, "msg_1", NOW, b"x").unwrap();
        let timestamp = NOW.to_string();
        let headers = [
            ("webhook-id", "msg_1"),
            ("webhook-timestamp", timestamp.as_str()),
            ("webhook-signature", signature.as_str()),
        ];
        for (now, expected) in [
            (NOW - 301, Err(Rejected::TooNew)),
            (NOW - 300, Ok(MessageId("msg_1".into()))),
            (NOW + 300, Ok(MessageId("msg_1".into()))),
            (NOW + 301, Err(Rejected::TooOld)),
        ] {
            assert_eq!(verify(SECRET, &headers, b"x", now), expected, "now {now}");
        }
    }

    #[test]
    fn a_malformed_secret_is_refused_by_number_and_never_shown() {
        let long = format!("whsec_{}", general_purpose::STANDARD.encode([7_u8; 257]));
        let faults = [
            ("", "secret 1: does not start with whsec_"),
            ("whsec_", "secret 1: is too short (0 bytes; at least 16)"),
            ("whsec_AAAA", "secret 1: is too short (3 bytes; at least 16)"),
            ("hunter2hunter2", "secret 1: does not start with whsec_"),
            ("WHSEC_6aRDVhO2pXfbAVCMQxuVyazacpzj5x1P", "secret 1: does not start with whsec_"),
            ("whsec_hunter2!hunter2!hunter2!hunter", "secret 1: is not base64 after whsec_"),
            ("whsec_6aRDVhO2pXfbAVCMQxuVyazacpzj5x1-", "secret 1: is not base64 after whsec_"),
            (&long, "secret 1: is too long (257 bytes; at most 256)"),
        ];
        for (secret, fault) in faults {
            assert_eq!(WebhookVerifier::parse(secret).unwrap_err(), fault);
        }
        let second = format!("{SECRET},hunter2");
        let fault = WebhookVerifier::parse(&second).unwrap_err();
        assert_eq!(fault, "secret 2: does not start with whsec_");
        let fault = WebhookVerifier::parse(&format!("{SECRET},")).unwrap_err();
        assert_eq!(fault, "secret 2: does not start with whsec_");
        let shown = format!("{:?}", WebhookVerifier::parse(SECRET).unwrap());
        assert_eq!(shown, "WebhookVerifier(1 secrets)");
    }

    /// Each attack starts from a delivery that verifies and spoils one thing.
    #[test]
    fn hostile_deliveries_are_refused() {
        let body = br#"{"type":"user.created"}"#.as_slice();
        let good = sign(SECRET, "msg_1", NOW, body).unwrap();
        let good_digest = good.strip_prefix("v1,").unwrap().to_owned();
        let time = NOW.to_string();
        let own = |headers: &[(&str, &str)]| -> Vec<(String, Vec<u8>)> {
            headers.iter().map(|(n, v)| ((*n).to_owned(), v.as_bytes().to_vec())).collect()
        };
        let with = |id: &str, timestamp: &str, signature: &str| {
            own(&[("svix-id", id), ("svix-timestamp", timestamp), ("svix-signature", signature)])
        };
        let check = |headers: &[(String, Vec<u8>)], body: &[u8]| {
            let headers = headers.iter().map(|(n, v)| (n.as_str(), v.as_slice()));
            WebhookVerifier::parse(SECRET).unwrap().verify(headers, body, at(NOW))
        };
        assert!(check(&with("msg_1", &time, &good), body).is_ok(), "the start must verify");

        let other = sign(OTHER, "msg_1", NOW, body).unwrap();
        let dotted = sign(SECRET, "msg_1.2", NOW, body).unwrap();
        let spaced = sign(SECRET, "msg 1", NOW, body).unwrap();
        let empty_id = sign(SECRET, "", NOW, body).unwrap();
        let long_id = "m".repeat(257);
        let long_id_signature = sign(SECRET, &long_id, NOW, body).unwrap();
        let flood = format!("{good} ").repeat(200);
        let flipped = {
            let first = if good_digest.starts_with('A') { "B" } else { "A" };
            format!("v1,{first}{}", &good_digest[1..])
        };
        let unpadded = good.trim_end_matches('=').to_owned();
        // Two headers apart from the attack keep what the official library would join by a comma.
        let twice = |name: &str, value: &str| {
            let mut headers = with("msg_1", &time, &good);
            headers.push((name.to_owned(), value.as_bytes().to_vec()));
            headers
        };
        let raw = |id: &[u8], timestamp: &[u8], signature: &[u8]| {
            vec![
                ("svix-id".to_owned(), id.to_vec()),
                ("svix-timestamp".to_owned(), timestamp.to_vec()),
                ("svix-signature".to_owned(), signature.to_vec()),
            ]
        };
        use Rejected::{Malformed, Missing, Repeated, Signature, TooNew, TooOld};
        let (bad_id, bad_time) = (Malformed("svix-id"), Malformed("svix-timestamp"));
        let attacks = vec![
            ("no headers", vec![], Missing("svix-id")),
            (
                "no id",
                own(&[("svix-timestamp", &time), ("svix-signature", &good)]),
                Missing("svix-id"),
            ),
            (
                "no time",
                own(&[("svix-id", "msg_1"), ("svix-signature", &good)]),
                Missing("svix-timestamp"),
            ),
            (
                "no signature",
                own(&[("svix-id", "msg_1"), ("svix-timestamp", &time)]),
                Missing("svix-signature"),
            ),
            (
                "names that only look alike",
                own(&[("svix_id", "msg_1"), ("svix_timestamp", &time), ("svix_signature", &good)]),
                Missing("svix-id"),
            ),
            ("another secret", with("msg_1", &time, &other), Signature),
            ("another id", with("msg_2", &time, &good), Signature),
            ("id in capitals", with("MSG_1", &time, &good), Signature),
            ("empty id", with("", &time, &empty_id), bad_id),
            ("id with a dot", with("msg_1.2", &time, &dotted), bad_id),
            ("id shifted into the time", with(&format!("msg_1.{time}"), &time, &good), bad_id),
            ("id with a space", with("msg 1", &time, &spaced), bad_id),
            ("id with a nul", raw(b"msg_\x001", time.as_bytes(), good.as_bytes()), bad_id),
            ("id that is not ASCII", with("msg_é", &time, &good), bad_id),
            ("id that is not UTF-8", raw(b"msg_\xff", time.as_bytes(), good.as_bytes()), bad_id),
            ("id without end", with(&long_id, &time, &long_id_signature), bad_id),
            ("time one second later", with("msg_1", &(NOW + 1).to_string(), &good), Signature),
            ("time too old", with("msg_1", &(NOW - 301).to_string(), &good), TooOld),
            ("time too new", with("msg_1", &(NOW + 301).to_string(), &good), TooNew),
            ("time in milliseconds", with("msg_1", &format!("{NOW}000"), &good), bad_time),
            ("time zero", with("msg_1", "0", &good), bad_time),
            ("time empty", with("msg_1", "", &good), bad_time),
            ("time negative", with("msg_1", "-1893456000", &good), bad_time),
            ("time with a plus", with("msg_1", &format!("+{time}"), &good), bad_time),
            ("time with a leading zero", with("msg_1", &format!("0{time}"), &good), bad_time),
            ("time with a space", with("msg_1", &format!(" {time}"), &good), bad_time),
            ("time with a fraction", with("msg_1", &format!("{time}.0"), &good), bad_time),
            ("time in hex", with("msg_1", "0x70dbd880", &good), bad_time),
            ("time with an exponent", with("msg_1", "1.893456e9", &good), bad_time),
            ("time in words", with("msg_1", "NaN", &good), bad_time),
            ("time in Arabic digits", with("msg_1", "١٨٩٣٤٥٦٠٠٠", &good), bad_time),
            ("time that overflows", with("msg_1", "99999999999999999999", &good), bad_time),
            ("signature empty", with("msg_1", &time, ""), Signature),
            ("signature of nothing", with("msg_1", &time, "v1,"), Signature),
            ("signature without version", with("msg_1", &time, &good_digest), Signature),
            (
                "signature of version 2",
                with("msg_1", &time, &format!("v2,{good_digest}")),
                Signature,
            ),
            (
                "signature of version 1a",
                with("msg_1", &time, &format!("v1a,{good_digest}")),
                Signature,
            ),
            (
                "signature of version V1",
                with("msg_1", &time, &format!("V1,{good_digest}")),
                Signature,
            ),
            ("signature with =", with("msg_1", &time, &format!("v1={good_digest}")), Signature),
            ("signature flipped", with("msg_1", &time, &flipped), Signature),
            ("signature cut", with("msg_1", &time, &good[..good.len() - 8]), Signature),
            ("signature longer", with("msg_1", &time, &format!("{}AAAA", unpadded)), Signature),
            ("signature unpadded", with("msg_1", &time, &unpadded), Signature),
            (
                "signature all zero",
                with("msg_1", &time, "v1,AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="),
                Signature,
            ),
            (
                "signature in hex",
                with("msg_1", &time, &format!("v1,{}", "ab".repeat(32))),
                Signature,
            ),
            (
                "signatures split by commas",
                with("msg_1", &time, &format!("v1,AAAA,{good}")),
                Signature,
            ),
            (
                "signatures split by tabs",
                with("msg_1", &time, &format!("v1,AAAA\t{good}")),
                Signature,
            ),
            (
                "signature that is not UTF-8",
                raw(b"msg_1", time.as_bytes(), b"v1,\xff\xfe"),
                Signature,
            ),
            ("a flood of signatures", with("msg_1", &time, &flood), Malformed("svix-signature")),
            ("id twice", twice("svix-id", "msg_1"), Repeated("svix-id")),
            ("time twice", twice("Svix-Timestamp", &time), Repeated("svix-timestamp")),
            ("signature twice", twice("SVIX-SIGNATURE", &good), Repeated("svix-signature")),
        ];
        assert!(attacks.len() >= 40, "{} attacks", attacks.len());
        for (name, headers, reason) in attacks {
            assert_eq!(check(&headers, body), Err(reason), "{name}");
        }

        let honest = with("msg_1", &time, &good);
        let bodies: [&[u8]; 8] = [
            b"",
            br#"{"type":"user.deleted"}"#,
            br#"{"type": "user.created"}"#,
            b"{\"type\":\"user.created\"}\n",
            b"\xef\xbb\xbf{\"type\":\"user.created\"}",
            br#"b'{"type":"user.created"}'"#,
            br#"{"type":"user.created"}{"type":"user.created"}"#,
            br#"{"type":"user.create"#,
        ];
        for body in bodies {
            assert_eq!(check(&honest, body), Err(Signature), "{}", String::from_utf8_lossy(body));
        }
    }

    #[test]
    fn a_wrong_svix_header_does_not_fall_back_to_a_right_webhook_header() {
        let good = sign(SECRET, "msg_1", NOW, b"{}").unwrap();
        let time = NOW.to_string();
        let headers = [
            ("webhook-id", "msg_1"),
            ("webhook-timestamp", time.as_str()),
            ("webhook-signature", good.as_str()),
        ];
        assert!(verify(SECRET, &headers, b"{}", NOW).is_ok());
        for (name, wrong) in [("svix-id", "msg_2"), ("svix-timestamp", "1"), ("svix-signature", "")]
        {
            let mut spoiled = headers.to_vec();
            spoiled.push((name, wrong));
            assert!(verify(SECRET, &spoiled, b"{}", NOW).is_err(), "{name}");
        }
    }

    #[test]
    fn what_is_as_long_as_it_may_be_is_accepted() {
        for bytes in [16, 256] {
            let secret = format!("whsec_{}", general_purpose::STANDARD.encode(vec![7_u8; bytes]));
            assert!(WebhookVerifier::parse(&secret).is_ok(), "{bytes}");
        }
        let (id, time) = ("m".repeat(256), NOW.to_string());
        let good = sign(SECRET, &id, NOW, b"{}").unwrap();
        // Padded by a version that nobody knows.
        let longest = format!("v9,{} {good}", "A".repeat(8 * 1024 - good.len() - 4));
        assert_eq!(longest.len(), MAX_SIGNATURE_HEADER_BYTES);
        let headers = [("svix-id", &*id), ("svix-timestamp", &time), ("svix-signature", &longest)];
        assert_eq!(verify(SECRET, &headers, b"{}", NOW), Ok(MessageId(id.clone())));
        // Twelve digits are a time, if a far one.
        let far = [("svix-id", &*id), ("svix-timestamp", "999999999999"), ("svix-signature", "")];
        assert_eq!(verify(SECRET, &far, b"{}", NOW), Err(Rejected::TooNew));
    }
}
