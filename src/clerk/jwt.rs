//! Session tokens: an RS256 JWT of Clerk's in, the verified claims out. `jsonwebtoken` checks the
//! signature; the claims are checked here, against a clock that is handed in.

use std::collections::HashMap;
use std::fmt;

use aws_lc_rs::rsa::PublicKey;
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm, DecodingKey};
use serde::Serialize;
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::domain::tier::Tier;

pub use cache::TokenCache;

mod cache;

/// How far, in seconds, our clock and the issuer's may differ.
pub const CLOCK_SKEW_S: i64 = 5;
/// Longer tokens are not even decoded.
pub const MAX_TOKEN_BYTES: usize = 16 * 1024;

/// What a verified token says. Absent and `null` claims are `None` or empty.
#[derive(Debug, Clone, PartialEq)]
pub struct Verified {
    pub user_id: String,
    pub session_id: Option<String>,
    /// Unix seconds; 0 if the token has no `iat`, so that whatever is known of the user is newer.
    pub issued_at: i64,
    /// Unix seconds.
    pub expires_at: i64,
    pub email: Option<String>,
    pub role: Option<String>,
    /// The user's own permissions; those within an organization stand at the organization.
    pub permissions: Vec<String>,
    /// Or the plan, where it is named after a tier.
    pub tier: Option<String>,
    pub user_type: Option<String>,
    pub organizations: Vec<OrganizationClaim>,
    pub feature_flags: Map<String, Value>,
    /// Names of Clerk's v2 `fea`, without the scope.
    pub features: Vec<String>,
    /// Name of Clerk's v2 `pla`, without the scope: the user's plan, or else the organization's.
    pub plan: Option<String>,
    pub onboarding: Option<Value>,
    /// Who acts as this user (impersonation): `act.sub`.
    pub actor: Option<String>,
    pub session_status: Option<String>,
    /// All claims as they came.
    pub raw: Map<String, Value>,
}

/// An organization the token speaks of; roles and permissions in the long form (`org:admin`,
/// `org:video:render`) whichever version of token they came in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct OrganizationClaim {
    pub id: String,
    pub slug: Option<String>,
    pub role: Option<String>,
    pub permissions: Vec<String>,
}

/// What a token must say beyond its signature and times.
#[derive(Debug, Clone, Default)]
pub struct Rules {
    /// `CLERK_ISSUER`; compared exactly.
    pub issuer: Option<String>,
    /// `CLERK_AUDIENCE`; when set, a token without `aud` is refused too.
    pub audience: Option<String>,
    /// `CLERK_AUTHORIZED_PARTIES`; checked when the token has an `azp`, as Clerk itself does.
    pub authorized_parties: Vec<String>,
}

/// Why a token is not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Rejected {
    #[error("the token is malformed: {0}")]
    Malformed(&'static str),
    #[error("the token is not a session token")]
    TokenType,
    #[error("the token is not signed with RS256")]
    Algorithm,
    #[error("the token's signing key is unknown")]
    UnknownKey,
    #[error("the token's signature does not match")]
    Signature,
    #[error("the token's issuer is not accepted")]
    Issuer,
    #[error("the token's audience is not accepted")]
    Audience,
    #[error("the token's authorized party is not accepted")]
    AuthorizedParty,
    #[error("the token has expired")]
    Expired {
        /// Unix seconds.
        expired_at: i64,
    },
    #[error("the token is not valid yet")]
    NotYetValid,
    /// Signed in, but Clerk wants something done first (403, code `session_pending`).
    #[error("the session is pending")]
    SessionPending,
    /// The keys have not been fetched yet (503).
    #[error("the keys that verify tokens are not available yet")]
    NoKeys,
}

/// Verifies `token` as of `now` (Unix seconds).
///
/// # Errors
/// [`Rejected`], in the order of Clerk's own verifier: form, type, algorithm, key, signature,
/// subject, audience, authorized party, times; then issuer and session status.
pub fn verify(token: &str, keys: &KeySet, rules: &Rules, now: i64) -> Result<Verified, Rejected> {
    let claims = parse_object(&signed_payload(token, keys)?, "payload")?;
    let subject = check_subject(&claims)?;
    check_audience(&claims, rules)?;
    check_authorized_party(&claims, rules)?;
    let (issued_at, expires_at) = check_times(&claims, now)?;
    check_issuer(&claims, rules)?;
    if text(&claims, "sts").as_deref() == Some("pending") {
        return Err(Rejected::SessionPending);
    }
    let session_id = match claims.get("sid") {
        None | Some(Value::Null) => None,
        Some(Value::String(sid)) if is_identifier(sid) => Some(sid.clone()),
        Some(_) => return Err(Rejected::Malformed("sid")),
    };
    Ok(Verified {
        user_id: subject,
        session_id,
        issued_at,
        expires_at,
        email: text(&claims, "email"),
        role: text(&claims, "role"),
        permissions: permissions(&claims),
        tier: first_text(&claims, &["subscription_tier", "subscriptionTier"])
            .or_else(|| plan(&claims).filter(|plan| Tier::is_name(plan))),
        user_type: first_text(&claims, &["user_type", "userType"]),
        organizations: organizations(&claims),
        feature_flags: first_object(&claims, &["feature_flags", "featureFlags"]),
        features: scoped(&claims, "fea").map(|(_, name)| name.to_owned()).collect(),
        plan: plan(&claims),
        onboarding: claims.get("onboarding").filter(|value| !value.is_null()).cloned(),
        actor: claims.get("act").and_then(Value::as_object).and_then(|act| text(act, "sub")),
        session_status: text(&claims, "sts"),
        raw: claims,
    })
}

/// Splits, decodes and checks everything that comes before the claims; gives the payload's bytes.
fn signed_payload(token: &str, keys: &KeySet) -> Result<Vec<u8>, Rejected> {
    if token.len() > MAX_TOKEN_BYTES {
        return Err(Rejected::Malformed("too long"));
    }
    let (message, signature) = token.rsplit_once('.').ok_or(Rejected::Malformed("parts"))?;
    let (header, payload) = message.split_once('.').ok_or(Rejected::Malformed("parts"))?;
    if payload.contains('.') {
        return Err(Rejected::Malformed("parts"));
    }
    // The engine refuses padding and spare bits, so that one token has one spelling.
    let decode =
        |part: &str, name| URL_SAFE_NO_PAD.decode(part).map_err(|_| Rejected::Malformed(name));
    let header = parse_object(&decode(header, "header")?, "header")?;
    let payload = decode(payload, "payload")?;
    decode(signature, "signature")?;
    check_header(&header)?;
    let kid = match header.get("kid") {
        None => None,
        Some(Value::String(kid)) => Some(kid.as_str()),
        Some(_) => return Err(Rejected::Malformed("kid")),
    };
    let key = keys.find(kid).ok_or(Rejected::UnknownKey)?;
    let verdict =
        jsonwebtoken::crypto::verify(signature, message.as_bytes(), key, Algorithm::RS256);
    if matches!(verdict, Ok(true)) { Ok(payload) } else { Err(Rejected::Signature) }
}

fn check_header(header: &Map<String, Value>) -> Result<(), Rejected> {
    // Categories of Clerk's: a session token and one from a template; others are for machines.
    const CATEGORIES: [&str; 2] = ["cl_B7d4PD111AAA", "cl_B7d4PD222AAA"];
    let category_fits = header
        .get("cat")
        .is_none_or(|cat| cat.as_str().is_some_and(|cat| CATEGORIES.contains(&cat)));
    if !category_fits || header.get("typ").is_some_and(|typ| typ != "JWT") {
        return Err(Rejected::TokenType);
    }
    // RFC 7515, 4.1.11: extensions we do not understand must be refused, and we understand none.
    if header.contains_key("crit") {
        return Err(Rejected::Malformed("crit"));
    }
    if header.get("alg").is_some_and(|alg| alg == "RS256") {
        Ok(())
    } else {
        Err(Rejected::Algorithm)
    }
}

/// `sub`; `user_id` where a template names the user so and there is no other name.
fn check_subject(claims: &Map<String, Value>) -> Result<String, Rejected> {
    let named = |name| claims.get(name).filter(|value| !value.is_null());
    let (subject, name) = match (named("sub"), named("user_id")) {
        (Some(subject), _) => (subject, "sub"),
        (None, Some(user_id)) => (user_id, "user_id"),
        (None, None) => return Err(Rejected::Malformed("sub")),
    };
    let subject = subject.as_str().filter(|subject| is_identifier(subject));
    let subject = subject.ok_or(Rejected::Malformed(name))?;
    // Clerk's machines sign in with tokens of the same keys.
    if subject.starts_with("mch_") { Err(Rejected::TokenType) } else { Ok(subject.to_owned()) }
}

/// Ids become names of streams and keys of rows, so only plain characters get in.
fn is_identifier(id: &str) -> bool {
    id.len() <= 128
        && id.starts_with(|first: char| first.is_ascii_alphanumeric())
        && id.chars().all(|c| c.is_ascii_alphanumeric() || "_-.:@|+".contains(c))
}

fn check_audience(claims: &Map<String, Value>, rules: &Rules) -> Result<(), Rejected> {
    let Some(expected) = &rules.audience else { return Ok(()) };
    let matches = match claims.get("aud") {
        Some(Value::String(audience)) => audience == expected,
        Some(Value::Array(list)) => {
            list.iter().all(Value::is_string) && list.iter().any(|one| one == expected.as_str())
        }
        _ => false,
    };
    if matches { Ok(()) } else { Err(Rejected::Audience) }
}

fn check_authorized_party(claims: &Map<String, Value>, rules: &Rules) -> Result<(), Rejected> {
    if rules.authorized_parties.is_empty() {
        return Ok(());
    }
    match claims.get("azp") {
        None | Some(Value::Null) => Ok(()),
        Some(Value::String(party)) if rules.authorized_parties.contains(party) => Ok(()),
        Some(_) => Err(Rejected::AuthorizedParty),
    }
}

fn check_issuer(claims: &Map<String, Value>, rules: &Rules) -> Result<(), Rejected> {
    match &rules.issuer {
        Some(expected) if claims.get("iss").is_none_or(|iss| iss != expected.as_str()) => {
            Err(Rejected::Issuer)
        }
        _ => Ok(()),
    }
}

/// Gives `(iat, exp)`. `exp` is required; `nbf` and `iat` are checked when they are there.
fn check_times(claims: &Map<String, Value>, now: i64) -> Result<(i64, i64), Rejected> {
    let expires_at = time(claims, "exp")?.ok_or(Rejected::Malformed("exp"))?;
    let not_before = time(claims, "nbf")?.unwrap_or(0);
    let issued_at = time(claims, "iat")?.unwrap_or(0);
    if expires_at <= now.saturating_sub(CLOCK_SKEW_S) {
        return Err(Rejected::Expired { expired_at: expires_at });
    }
    if not_before.max(issued_at) > now.saturating_add(CLOCK_SKEW_S) {
        return Err(Rejected::NotYetValid);
    }
    Ok((issued_at, expires_at))
}

/// A NumericDate (RFC 7519): whole or fractional seconds, not before 1970 nor after the year 9999.
fn time(claims: &Map<String, Value>, name: &'static str) -> Result<Option<i64>, Rejected> {
    const YEAR_10000: f64 = 253_402_300_800.0;
    let Some(value) = claims.get(name) else { return Ok(None) };
    let seconds = value.as_f64().filter(|seconds| (0.0..YEAR_10000).contains(seconds));
    // In this range every whole number of seconds fits both f64 and i64 exactly.
    seconds.map(|seconds| Some(seconds.floor() as i64)).ok_or(Rejected::Malformed(name))
}

fn text(object: &Map<String, Value>, name: &str) -> Option<String> {
    object.get(name).and_then(Value::as_str).filter(|text| !text.is_empty()).map(str::to_owned)
}

fn first_text(object: &Map<String, Value>, names: &[&str]) -> Option<String> {
    names.iter().find_map(|name| text(object, name))
}

fn first_object(object: &Map<String, Value>, names: &[&str]) -> Map<String, Value> {
    let found = names.iter().find_map(|name| object.get(*name).and_then(Value::as_object));
    found.cloned().unwrap_or_default()
}

fn texts(object: &Map<String, Value>, name: &str) -> Vec<String> {
    let list = object.get(name).and_then(Value::as_array);
    list.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
}

/// `permissions`, and those of the marketplace template's `roles`, each once.
fn permissions(claims: &Map<String, Value>) -> Vec<String> {
    let roles = claims.get("roles").and_then(Value::as_array).into_iter().flatten();
    let of_roles = roles.filter_map(Value::as_object).flat_map(|role| texts(role, "permissions"));
    let mut all = texts(claims, "permissions");
    all.extend(of_roles);
    let mut seen = std::collections::HashSet::new();
    all.retain(|permission| seen.insert(permission.clone()));
    all
}

/// Clerk's v2 `o`, v1 `org_*` or the marketplace template's `organizationId`; a token names at most
/// one in each form, and the same one only once.
fn organizations(claims: &Map<String, Value>) -> Vec<OrganizationClaim> {
    let mut found: Vec<OrganizationClaim> = Vec::new();
    let forms =
        [organization_v2(claims), organization_v1(claims), organization_of_template(claims)];
    for organization in forms.into_iter().flatten() {
        if found.iter().all(|known| known.id != organization.id) {
            found.push(organization);
        }
    }
    found
}

fn organization_v2(claims: &Map<String, Value>) -> Option<OrganizationClaim> {
    let organization = claims.get("o")?.as_object()?;
    Some(OrganizationClaim {
        id: text(organization, "id")?,
        slug: text(organization, "slg"),
        role: text(organization, "rol").map(|role| format!("org:{role}")),
        permissions: masked_permissions(claims, organization),
    })
}

fn organization_v1(claims: &Map<String, Value>) -> Option<OrganizationClaim> {
    Some(OrganizationClaim {
        id: text(claims, "org_id")?,
        slug: text(claims, "org_slug"),
        role: text(claims, "org_role"),
        permissions: texts(claims, "org_permissions"),
    })
}

fn organization_of_template(claims: &Map<String, Value>) -> Option<OrganizationClaim> {
    Some(OrganizationClaim {
        id: first_text(claims, &["organization_id", "organizationId"])?,
        slug: None,
        role: first_text(claims, &["organization_role", "organizationRole"]),
        permissions: Vec::new(),
    })
}

/// `fpm` has a mask for each organization feature of `fea`, in order; bit n stands for the n-th
/// name of `per`.
fn masked_permissions(
    claims: &Map<String, Value>,
    organization: &Map<String, Value>,
) -> Vec<String> {
    let names = text(organization, "per").unwrap_or_default();
    let names: Vec<&str> = names.split(',').map(str::trim).take(MAX_MASK_BITS).collect();
    let masks = text(organization, "fpm").unwrap_or_default();
    let features = scoped(claims, "fea").filter(|(scope, _)| scope.contains('o'));
    let mut permissions = Vec::new();
    for ((_, feature), mask) in features.zip(masks.split(',')) {
        let granted =
            names.iter().zip(bits(mask.trim())).filter(|(name, bit)| *bit && !name.is_empty());
        permissions.extend(granted.map(|(name, _)| format!("org:{feature}:{name}")));
    }
    permissions
}

const MAX_MASK_BITS: usize = 512;
/// As many as the largest mask of [`MAX_MASK_BITS`] bits needs.
const MAX_MASK_DIGITS: usize = 155;

/// The bits of a decimal number, lowest first; none if it is not one. Masks outgrow 64 bits, so
/// the digits are halved by hand.
fn bits(decimal: &str) -> Vec<bool> {
    let sound = !decimal.is_empty()
        && decimal.len() <= MAX_MASK_DIGITS
        && decimal.bytes().all(|byte| byte.is_ascii_digit());
    if !sound {
        return Vec::new();
    }
    let mut digits: Vec<u8> = decimal.bytes().map(|byte| byte - b'0').collect();
    let mut bits = Vec::new();
    while digits.iter().any(|digit| *digit != 0) {
        let mut carry = 0;
        for digit in &mut digits {
            let value = carry * 10 + *digit;
            *digit = value / 2;
            carry = value % 2;
        }
        bits.push(carry == 1);
    }
    bits
}

/// The `scope:name` pairs of a comma list: `o:dashboard,u:hd`.
fn scoped<'a>(
    claims: &'a Map<String, Value>,
    name: &str,
) -> impl Iterator<Item = (&'a str, &'a str)> {
    let list = claims.get(name).and_then(Value::as_str).unwrap_or_default();
    list.split(',').filter_map(|entry| entry.trim().split_once(':'))
}

fn plan(claims: &Map<String, Value>) -> Option<String> {
    let of_user = scoped(claims, "pla").find(|(scope, _)| scope.contains('u'));
    of_user.or_else(|| scoped(claims, "pla").next()).map(|(_, name)| name.to_owned())
}

fn parse_object(bytes: &[u8], part: &'static str) -> Result<Map<String, Value>, Rejected> {
    let UniqueNames(object) =
        serde_json::from_slice(bytes).map_err(|_| Rejected::Malformed(part))?;
    Ok(object)
}

/// A JSON object in which no name stands twice: readers differ in which of two they believe.
struct UniqueNames(Map<String, Value>);

impl<'de> Deserialize<'de> for UniqueNames {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Names;

        impl<'de> Visitor<'de> for Names {
            type Value = Map<String, Value>;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Self::Value, A::Error> {
                let mut object = Map::new();
                while let Some((name, value)) = access.next_entry::<String, Value>()? {
                    if object.insert(name, value).is_some() {
                        return Err(A::Error::custom("a name stands twice"));
                    }
                }
                Ok(object)
            }
        }

        deserializer.deserialize_map(Names).map(Self)
    }
}

const MIN_KEY_BITS: usize = 2048;
const MAX_KEY_BITS: usize = 8192;

/// The public keys that may have signed a token.
pub struct KeySet {
    keys: KeysById,
    /// Differs when the keys differ: verified tokens are cached under it.
    fingerprint: [u8; 32],
}

enum KeysById {
    /// One key given by the operator, whatever the token calls it.
    Any(DecodingKey),
    ByKid(HashMap<String, DecodingKey>),
}

impl fmt::Debug for KeySet {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.keys {
            KeysById::Any(_) => formatter.write_str("KeySet(one key for any id)"),
            KeysById::ByKid(keys) => write!(formatter, "KeySet({:?})", keys.keys()),
        }
    }
}

impl KeySet {
    /// Reads an RSA public key in PEM form; `\n` spelled out (as in many `.env` files) is read as a
    /// line's end.
    ///
    /// # Errors
    /// A sentence's end that says what is wrong with the key, without showing it.
    pub fn from_pem(pem: &str) -> Result<Self, String> {
        let key = PublicKey::from_der(&der_of_pem(pem)?)
            .map_err(|_| "is not an RSA public key".to_owned())?;
        let n = key.modulus().big_endian_without_leading_zero();
        let e = key.exponent().big_endian_without_leading_zero();
        let key = rsa_key(n, e)?;
        let fingerprint = Sha256::new().chain_update(n).chain_update(e).finalize().into();
        Ok(Self { keys: KeysById::Any(key), fingerprint })
    }

    /// Reads a JSON Web Key Set (RFC 7517). Keys for other algorithms or uses, without an id or too
    /// weak are left out.
    ///
    /// # Errors
    /// When it is no key set, names one key twice, or holds no usable key.
    pub fn from_jwks(json: &str) -> Result<Self, String> {
        let set: Value = serde_json::from_str(json).map_err(|_| "the key set is not JSON")?;
        let list = set.get("keys").and_then(Value::as_array).ok_or("the key set has no keys")?;
        let mut keys = HashMap::new();
        let mut digests = Vec::new();
        for (kid, n, e) in list.iter().filter_map(usable_jwk) {
            let Ok(key) = rsa_key(&n, &e) else { continue };
            if keys.insert(kid.to_owned(), key).is_some() {
                return Err("the key set has two keys of one id".to_owned());
            }
            digests.push(digest_of_parts(&[kid.as_bytes(), &n, &e]));
        }
        if keys.is_empty() {
            return Err("the key set has no usable key".to_owned());
        }
        digests.sort_unstable();
        let fingerprint = Sha256::digest(digests.concat()).into();
        Ok(Self { keys: KeysById::ByKid(keys), fingerprint })
    }

    fn find(&self, kid: Option<&str>) -> Option<&DecodingKey> {
        match &self.keys {
            KeysById::Any(key) => Some(key),
            KeysById::ByKid(keys) => keys.get(kid?),
        }
    }
}

/// Length-prefixed, so that no two different lists of parts give the same bytes.
fn digest_of_parts(parts: &[&[u8]]) -> [u8; 32] {
    let mut digest = Sha256::new();
    for part in parts {
        digest.update((part.len() as u64).to_be_bytes());
        digest.update(part);
    }
    digest.finalize().into()
}

fn der_of_pem(pem: &str) -> Result<Vec<u8>, String> {
    let pem = pem.replace("\\n", "\n").replace("\\r", "");
    let pem = pem.trim().trim_matches(['"', '\'']).trim();
    if pem.contains("PRIVATE KEY") {
        return Err("is a private key; the public key belongs here".to_owned());
    }
    let body = ["PUBLIC KEY", "RSA PUBLIC KEY"].iter().find_map(|label| {
        pem.strip_prefix(&format!("-----BEGIN {label}-----"))?
            .strip_suffix(&format!("-----END {label}-----"))
    });
    let body = body.ok_or("is not a public key in PEM form")?;
    let body: String = body.split_ascii_whitespace().collect();
    STANDARD.decode(body).map_err(|_| "is not base64 between its PEM lines".to_owned())
}

fn usable_jwk(key: &Value) -> Option<(&str, Vec<u8>, Vec<u8>)> {
    let is = |name: &str, expected: &str| key.get(name).is_none_or(|value| value == expected);
    if key.get("kty")? != "RSA" || !is("use", "sig") || !is("alg", "RS256") {
        return None;
    }
    let number = |name| URL_SAFE_NO_PAD.decode(key.get(name)?.as_str()?).ok();
    let without_zeros =
        |number: Vec<u8>| -> Vec<u8> { number.into_iter().skip_while(|byte| *byte == 0).collect() };
    let kid = key.get("kid")?.as_str()?;
    Some((kid, without_zeros(number("n")?), without_zeros(number("e")?)))
}

/// `n` and `e` big-endian, without leading zeros.
fn rsa_key(n: &[u8], e: &[u8]) -> Result<DecodingKey, String> {
    let bits = n.first().map_or(0, |first| n.len() * 8 - first.leading_zeros() as usize);
    if !(MIN_KEY_BITS..=MAX_KEY_BITS).contains(&bits) {
        return Err(format!("has {bits} bits; {MIN_KEY_BITS} to {MAX_KEY_BITS} are accepted"));
    }
    let exponent_is_sound =
        e.len() <= 5 && e.last().is_some_and(|last| last % 2 == 1) && e != [1].as_slice();
    if !exponent_is_sound {
        return Err("has an unsound exponent".to_owned());
    }
    Ok(DecodingKey::from_rsa_raw_components(n, e))
}

#[cfg(test)]
mod tests;
