//! Links that carry their own permission: `{id}:{user_id}:{expires}` under HMAC-SHA256, in hex.

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

/// Why a link is not honoured, in the order in which it is checked (CONTRACT.md §3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("a parameter of the link is missing or not a number")]
    Malformed,
    #[error("the link has expired")]
    Expired,
    #[error("the signature of the link does not match")]
    SignatureInvalid,
}

/// Why the configured secrets are refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("at least one signing secret is needed, and none may be empty")]
pub struct InvalidSecrets;

/// The configured secrets: the first signs, all verify, so that one can be rotated out.
#[derive(Clone)]
pub struct SigningSecrets {
    keys: Vec<Hmac<Sha256>>,
}

impl SigningSecrets {
    /// From a comma-separated list, blanks around each secret ignored.
    pub fn parse(list: &str) -> Result<Self, InvalidSecrets> {
        let keys = list.split(',').map(|secret| keyed(secret.trim())).collect::<Result<_, _>>()?;
        Ok(Self { keys })
    }

    /// The signature of a link, in lower-case hex; `expires` in Unix seconds.
    pub fn sign(&self, id: &str, user_id: &str, expires: i64) -> String {
        // `parse` lets no empty list through.
        hex::encode(message(&self.keys[0], id, user_id, expires).finalize().into_bytes())
    }

    /// Whether any of the secrets made this signature. Takes the same time for every wrong one.
    pub fn verify(&self, id: &str, user_id: &str, expires: i64, signature: &str) -> bool {
        let Ok(signature) = hex::decode(signature) else { return false };
        let matches = |key| message(key, id, user_id, expires).verify_slice(&signature).is_ok();
        self.keys.iter().fold(false, |found, key| matches(key) | found)
    }

    /// Judges a link by its raw query parameters at `now` (Unix seconds) and answers whose it is.
    pub fn check<'a>(
        &self,
        id: &str,
        user_id: Option<&'a str>,
        expires: Option<&str>,
        signature: Option<&str>,
        now: i64,
    ) -> Result<&'a str, Refused> {
        let user_id = user_id.filter(|text| !text.is_empty()).ok_or(Refused::Malformed)?;
        let signature = signature.filter(|text| !text.is_empty()).ok_or(Refused::Malformed)?;
        let expires = whole_number(expires.unwrap_or_default()).ok_or(Refused::Malformed)?;
        if now > expires {
            return Err(Refused::Expired);
        }
        match self.verify(id, user_id, expires, signature) {
            true => Ok(user_id),
            false => Err(Refused::SignatureInvalid),
        }
    }
}

impl std::fmt::Debug for SigningSecrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SigningSecrets({} secrets)", self.keys.len())
    }
}

fn keyed(secret: &str) -> Result<Hmac<Sha256>, InvalidSecrets> {
    match secret.is_empty() {
        true => Err(InvalidSecrets),
        false => Hmac::new_from_slice(secret.as_bytes()).map_err(|_| InvalidSecrets),
    }
}

fn message(key: &Hmac<Sha256>, id: &str, user_id: &str, expires: i64) -> Hmac<Sha256> {
    let mut mac = key.clone();
    mac.update(format!("{id}:{user_id}:{expires}").as_bytes());
    mac
}

/// Digits, with a minus or without. One too large is a number still: it saturates, and no such
/// link was ever signed.
fn whole_number(text: &str) -> Option<i64> {
    let digits = text.strip_prefix('-').unwrap_or(text);
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let limit = if text.starts_with('-') { i64::MIN } else { i64::MAX };
    Some(text.parse().unwrap_or(limit))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0190d3a0-0000-7000-8000-000000000001";
    const EXPIRES: i64 = 1_900_000_000;
    // Computed with Python's `hmac.new(secret, b"{id}:{user_id}:{expires}", sha256).hexdigest()`.
    const BY_FIRST: &str = "18e6219d063027718b322003e46e7ae4042f9eb4836dc5529311483aa142a2d7";
    const BY_SECOND: &str = "647342554b79d88d6e5fa378966abd164f8eadc89b4fd5572d605ad3b5efc44b";

    fn secrets() -> SigningSecrets {
        SigningSecrets::parse("first-secret, second-secret").unwrap()
    }

    fn check(expires: &str, signature: &str, now: i64) -> Result<&'static str, Refused> {
        let given = |text: &str| (text != "none").then(|| text.to_owned());
        let (expires, signature) = (given(expires), given(signature));
        secrets().check(ID, Some("user_2abc"), expires.as_deref(), signature.as_deref(), now)
    }

    #[test]
    fn signatures_equal_those_of_another_implementation() {
        assert_eq!(secrets().sign(ID, "user_2abc", EXPIRES), BY_FIRST);
        let other = SigningSecrets::parse("k").unwrap().sign("f", "u", 0);
        assert_eq!(other, "cfa50a22331fb38f9778528b3d1acc1f4e318d7aeef9114ae803f92e4ad24cef");
    }

    #[test]
    fn every_secret_verifies() {
        for signature in [BY_FIRST, BY_SECOND] {
            assert_eq!(check("1900000000", signature, EXPIRES - 1), Ok("user_2abc"));
        }
    }

    #[test]
    fn a_link_holds_through_its_last_second() {
        assert!(check("1900000000", BY_FIRST, EXPIRES).is_ok());
        assert_eq!(check("1900000000", BY_FIRST, EXPIRES + 1), Err(Refused::Expired));
    }

    #[test]
    fn missing_and_malformed_parameters_come_before_all_else() {
        for expires in ["none", "", "soon", "1.5", "1e9", "+5", "-", " 5"] {
            assert_eq!(check(expires, "00", 0), Err(Refused::Malformed), "{expires:?}");
        }
        assert_eq!(check("1", "none", 9), Err(Refused::Malformed));
        let no_user = secrets().check(ID, None, Some("1"), Some("00"), 9);
        assert_eq!(no_user, Err(Refused::Malformed));
    }

    #[test]
    fn expiry_comes_before_the_signature() {
        assert_eq!(check("5", "00", 6), Err(Refused::Expired));
        assert_eq!(check("-5", "00", 6), Err(Refused::Expired));
    }

    #[test]
    fn a_changed_link_is_refused() {
        let one_second_more = check("1900000001", BY_FIRST, 0);
        assert_eq!(one_second_more, Err(Refused::SignatureInvalid));
        for signature in ["zz", "00", &BY_FIRST[2..], "0", "é"] {
            assert_eq!(check("1900000000", signature, 0), Err(Refused::SignatureInvalid));
        }
        let huge = check("99999999999999999999999", BY_FIRST, 0);
        assert_eq!(huge, Err(Refused::SignatureInvalid));
        assert!(!secrets().verify(ID, "user_other", EXPIRES, BY_FIRST));
    }

    #[test]
    fn empty_secrets_are_refused() {
        for list in ["", " ", "a,", ",a", "a,,b"] {
            assert!(SigningSecrets::parse(list).is_err(), "{list:?}");
        }
    }

    #[test]
    fn an_empty_user_or_signature_is_a_missing_one() {
        let no_user = secrets().check(ID, Some(""), Some("1900000000"), Some(BY_FIRST), 0);
        assert_eq!(no_user, Err(Refused::Malformed));
        assert_eq!(check("1900000000", "", 0), Err(Refused::Malformed));
    }

    #[test]
    fn a_secret_given_twice_verifies_as_one_given_once() {
        let twice = SigningSecrets::parse("first-secret,first-secret").unwrap();
        assert!(twice.verify(ID, "user_2abc", EXPIRES, BY_FIRST));
        assert_eq!(format!("{twice:?}"), "SigningSecrets(2 secrets)");
    }

    #[test]
    fn a_number_too_large_is_still_before_or_after_now() {
        let (far_before, far_after) = ("-99999999999999999999999", "99999999999999999999999");
        assert_eq!(check(far_before, "00", i64::MIN + 1), Err(Refused::Expired));
        assert_eq!(check(far_after, "00", i64::MAX), Err(Refused::SignatureInvalid));
    }
}
