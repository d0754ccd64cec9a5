//! Official cases, hostile tokens, and what each claim becomes.

use std::sync::Arc;

use std::sync::LazyLock;

use serde_json::json;

use super::*;
use crate::clerk::signing::SigningKey;

mod names;

const NOW: i64 = 1_893_456_000;
const ISSUER: &str = "https://clerk.t2m.test";
const APP: &str = "https://app.t2m.test";

static KEY: LazyLock<SigningKey> = LazyLock::new(|| SigningKey::generate("one").unwrap());
static STRANGER: LazyLock<SigningKey> = LazyLock::new(|| SigningKey::generate("one").unwrap());
static KEYS: LazyLock<KeySet> =
    LazyLock::new(|| KeySet::from_jwks(&KEY.jwks_json().to_string()).unwrap());

fn rules() -> Rules {
    Rules {
        issuer: Some(ISSUER.into()),
        audience: Some("t2m-api".into()),
        authorized_parties: vec![APP.into()],
    }
}

fn claims() -> Value {
    json!({
        "sub": "user_1", "sid": "sess_1", "iss": ISSUER, "aud": "t2m-api", "azp": APP,
        "iat": NOW, "nbf": NOW, "exp": NOW + 60,
    })
}

fn claims_with(name: &str, value: Value) -> Value {
    let mut claims = claims();
    claims[name] = value;
    claims
}

fn claims_without(name: &str) -> Value {
    let mut claims = claims();
    claims.as_object_mut().unwrap().remove(name);
    claims
}

fn header() -> Value {
    json!({ "alg": "RS256", "kid": "one", "typ": "JWT" })
}

fn with_header(name: &str, value: Value) -> String {
    let mut header = header();
    header[name] = value;
    KEY.sign_bytes(header.to_string().as_bytes(), claims().to_string().as_bytes()).unwrap()
}

fn with_payload(payload: &[u8]) -> String {
    KEY.sign_bytes(header().to_string().as_bytes(), payload).unwrap()
}

fn signed(claims: &Value) -> String {
    KEY.sign(claims).unwrap()
}

fn check(token: &str) -> Result<Verified, Rejected> {
    verify(token, &KEYS, &rules(), NOW)
}

#[test]
fn every_official_token_case_gets_its_official_verdict() {
    let vectors: Value =
        serde_json::from_str(include_str!("../../../tests/fixtures/clerk/vectors-sample.json"))
            .unwrap();
    let jwt = &vectors["jwt"];
    let keys = KeySet::from_jwks(&jwt["jwks"].to_string()).unwrap();
    let cases = jwt["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 32);
    for case in cases {
        let options = &case["options"];
        let parties = options["authorizedParties"].as_array().into_iter().flatten();
        let rules = Rules {
            issuer: jwt["issuer"].as_str().map(str::to_owned),
            audience: options["audience"].as_str().map(str::to_owned),
            authorized_parties: parties.map(|party| party.as_str().unwrap().to_owned()).collect(),
        };
        let verdict =
            verify(case["token"].as_str().unwrap(), &keys, &rules, jwt["now"].as_i64().unwrap());
        let code = match &verdict {
            Ok(_) => None,
            // Clerk does not check `iss`; the cases call a missing one invalid.
            Err(Rejected::Issuer) if case["name"] == "iss_missing" => Some("token-invalid"),
            Err(Rejected::NotYetValid) if case["name"] == "iat_plus_6s" => {
                Some("token-iat-in-the-future")
            }
            Err(rejected) => Some(code(rejected)),
        };
        assert_eq!(code, case["expected"]["code"].as_str(), "{}: {verdict:?}", case["name"]);
        assert_eq!(verdict.is_ok(), case["expected"]["verdict"] == "accept", "{}", case["name"]);
    }
}

fn code(rejected: &Rejected) -> &'static str {
    match rejected {
        Rejected::Malformed(_) | Rejected::TokenType => "token-invalid",
        Rejected::Algorithm => "token-invalid-algorithm",
        Rejected::UnknownKey => "jwk-kid-mismatch",
        Rejected::Signature => "token-invalid-signature",
        Rejected::Issuer => "token-invalid-issuer",
        Rejected::Audience => "token-invalid-audience",
        Rejected::AuthorizedParty => "token-invalid-authorized-parties",
        Rejected::Expired { .. } => "token-expired",
        Rejected::NotYetValid => "token-not-active-yet",
        Rejected::SessionPending => "session-pending",
        Rejected::NoKeys => "no-keys",
    }
}

#[test]
fn the_official_key_in_pem_form_verifies_with_line_ends_spelled_out_too() {
    let vectors: Value =
        serde_json::from_str(include_str!("../../../tests/fixtures/clerk/vectors-sample.json"))
            .unwrap();
    let jwt = &vectors["jwt"];
    let pem = jwt["jwt_key_pem"].as_str().unwrap();
    let token = jwt["cases"][0]["token"].as_str().unwrap();
    let quoted = format!("\"{}\"", pem.replace('\n', "\\n"));
    for pem in [pem, &pem.replace('\n', "\\n"), &quoted, &pem.replace('\n', "\r\n")] {
        let keys = KeySet::from_pem(pem).unwrap();
        assert!(verify(token, &keys, &Rules::default(), NOW).is_ok());
    }
}

#[test]
fn hostile_claims_are_refused() {
    use Rejected::{Audience, AuthorizedParty, Issuer, Malformed, NotYetValid, TokenType};
    assert!(check(&signed(&claims())).is_ok(), "the start must verify");
    let expired = |expired_at| Rejected::Expired { expired_at };
    let attacks = [
        ("sub", json!(""), Malformed("sub")),
        ("sub", json!(null), Malformed("sub")),
        ("sub", json!(7), Malformed("sub")),
        ("sub", json!(["user_1"]), Malformed("sub")),
        ("sub", json!({"id": "user_1"}), Malformed("sub")),
        ("sub", json!("user_1\0"), Malformed("sub")),
        ("sub", json!("../admin"), Malformed("sub")),
        ("sub", json!("user 1"), Malformed("sub")),
        ("sub", json!("üser_1"), Malformed("sub")),
        ("sub", json!("-user"), Malformed("sub")),
        ("sub", json!("user_1\n"), Malformed("sub")),
        ("sub", json!("u".repeat(129)), Malformed("sub")),
        ("sub", json!("mch_machine"), TokenType),
        ("sid", json!(""), Malformed("sid")),
        ("sid", json!(1), Malformed("sid")),
        ("sid", json!("sess/../1"), Malformed("sid")),
        ("iss", json!("https://evil.test"), Issuer),
        ("iss", json!("https://clerk.t2m.test/"), Issuer),
        ("iss", json!("HTTPS://clerk.t2m.test"), Issuer),
        ("iss", json!([ISSUER]), Issuer),
        ("iss", json!(null), Issuer),
        ("aud", json!("other"), Audience),
        ("aud", json!(""), Audience),
        ("aud", json!(null), Audience),
        ("aud", json!([]), Audience),
        ("aud", json!(["other"]), Audience),
        ("aud", json!(["t2m-api", 1]), Audience),
        ("aud", json!([["t2m-api"]]), Audience),
        ("aud", json!({"t2m-api": true}), Audience),
        ("aud", json!("t2m-api,other"), Audience),
        ("azp", json!("https://evil.test"), AuthorizedParty),
        ("azp", json!("https://app.t2m.test.evil.test"), AuthorizedParty),
        ("azp", json!(""), AuthorizedParty),
        ("azp", json!([APP]), AuthorizedParty),
        ("exp", json!(NOW - 5), expired(NOW - 5)),
        ("exp", json!(0), expired(0)),
        ("exp", json!(-1), Malformed("exp")),
        ("exp", json!("1893456060"), Malformed("exp")),
        ("exp", json!(null), Malformed("exp")),
        ("exp", json!(true), Malformed("exp")),
        ("exp", json!([NOW + 60]), Malformed("exp")),
        ("exp", json!(i64::MAX), Malformed("exp")),
        ("exp", json!(u64::MAX), Malformed("exp")),
        ("exp", json!(1e300), Malformed("exp")),
        ("exp", json!((NOW + 60) * 1000), Malformed("exp")),
        ("nbf", json!(NOW + 6), NotYetValid),
        ("nbf", json!("0"), Malformed("nbf")),
        ("nbf", json!(null), Malformed("nbf")),
        ("iat", json!(NOW + 6), NotYetValid),
        ("iat", json!("now"), Malformed("iat")),
        ("iat", json!({}), Malformed("iat")),
        ("sts", json!("pending"), Rejected::SessionPending),
    ];
    for (name, value, reason) in attacks {
        assert_eq!(
            check(&signed(&claims_with(name, value.clone()))),
            Err(reason),
            "{name} {value}"
        );
    }
    for (name, reason) in
        [("sub", Malformed("sub")), ("iss", Issuer), ("aud", Audience), ("exp", Malformed("exp"))]
    {
        assert_eq!(check(&signed(&claims_without(name))), Err(reason), "no {name}");
    }
    for name in ["azp", "nbf", "iat", "sid"] {
        assert!(check(&signed(&claims_without(name))).is_ok(), "no {name}");
    }
    for (name, value) in [("aud", json!(["other", "t2m-api"])), ("azp", json!(null))] {
        assert!(check(&signed(&claims_with(name, value.clone()))).is_ok(), "{name} {value}");
    }
}

#[test]
fn hostile_headers_and_payloads_are_refused() {
    use Rejected::{Algorithm, Malformed, Signature, TokenType, UnknownKey};
    for alg in ["none", "None", "NONE", "HS256", "RS384", "RS512", "PS256", "ES256", "rs256", ""] {
        assert_eq!(check(&with_header("alg", json!(alg))), Err(Algorithm), "{alg}");
    }
    let embedded = STRANGER.jwks_json()["keys"][0].clone();
    let with_own_key = json!({ "alg": "RS256", "kid": "one", "typ": "JWT", "jwk": embedded });
    let with_own_key = STRANGER
        .sign_bytes(with_own_key.to_string().as_bytes(), claims().to_string().as_bytes())
        .unwrap();
    assert_eq!(check(&with_own_key), Err(Signature));
    assert_eq!(check(&STRANGER.sign(&claims()).unwrap()), Err(Signature));

    let headers = [
        ("alg", json!(null), Algorithm),
        ("alg", json!(["RS256"]), Algorithm),
        ("typ", json!("at+jwt"), TokenType),
        ("typ", json!("JWE"), TokenType),
        ("typ", json!(null), TokenType),
        ("cat", json!("cl_B7d4PD333AAA"), TokenType),
        ("cat", json!(""), TokenType),
        ("cat", json!(null), TokenType),
        ("crit", json!(["exp"]), Malformed("crit")),
        ("crit", json!([]), Malformed("crit")),
        ("crit", json!(null), Malformed("crit")),
        ("kid", json!("two"), UnknownKey),
        ("kid", json!(""), UnknownKey),
        ("kid", json!("../../dev/null"), UnknownKey),
        ("kid", json!(1), Malformed("kid")),
        ("kid", json!(null), Malformed("kid")),
    ];
    for (name, value, reason) in headers {
        assert_eq!(check(&with_header(name, value.clone())), Err(reason), "{name} {value}");
    }

    let whole = claims().to_string();
    let twice = |extra: &str| format!("{{{extra},{}", &whole[1..]);
    let deep = twice(&format!("\"x\":{}{}", "[".repeat(1000), "]".repeat(1000)));
    let payloads = [
        String::new(),
        "null".into(),
        "[]".into(),
        "\"sub\"".into(),
        "7".into(),
        whole[..whole.len() - 1].to_owned(),
        format!("{whole}{whole}"),
        format!("[{whole}]"),
        format!("\u{feff}{whole}"),
        twice("\"sub\":\"user_admin\""),
        twice("\"s\\u0075b\":\"user_admin\""),
        twice("\"exp\":9999999999"),
        twice("\"x\":1e999"),
        deep,
    ];
    for payload in payloads {
        let shown = &payload[..payload.len().min(80)];
        assert_eq!(check(&with_payload(payload.as_bytes())), Err(Malformed("payload")), "{shown}");
    }
    assert_eq!(check(&with_payload(b"{\"sub\":\"\xff\"}")), Err(Malformed("payload")));
    let twice_alg = br#"{"alg":"none","alg":"RS256","kid":"one"}"#;
    let twice_alg = KEY.sign_bytes(twice_alg, whole.as_bytes()).unwrap();
    assert_eq!(check(&twice_alg), Err(Malformed("header")));
}

#[test]
fn tokens_bent_out_of_form_are_refused() {
    let good = signed(&claims());
    let parts: Vec<&str> = good.split('.').collect();
    let (header, payload, signature) = (parts[0], parts[1], parts[2]);
    let alg = |alg: &str| URL_SAFE_NO_PAD.encode(format!("{{\"alg\":\"{alg}\",\"kid\":\"one\"}}"));
    let hmac_with_public_key = {
        use hmac::{Hmac, KeyInit, Mac};
        let message = format!("{}.{payload}", alg("HS256"));
        let pem = KEY.public_pem().unwrap();
        let mac = Hmac::<Sha256>::new_from_slice(pem.as_bytes()).unwrap();
        let mac = mac.chain_update(&message).finalize().into_bytes();
        format!("{message}.{}", URL_SAFE_NO_PAD.encode(mac))
    };
    let raw = URL_SAFE_NO_PAD.decode(signature).unwrap();
    let resigned = |raw: &[u8]| format!("{header}.{payload}.{}", URL_SAFE_NO_PAD.encode(raw));
    let huge = signed(&claims_with("x", json!("x".repeat(MAX_TOKEN_BYTES))));
    let mut bent = vec![
        String::new(),
        ".".into(),
        "..".into(),
        "...".into(),
        "not a token".into(),
        format!("{header}.{payload}"),
        format!("{header}.{payload}."),
        format!(".{payload}.{signature}"),
        format!("{header}..{signature}"),
        format!("{good}."),
        format!(".{good}"),
        format!("{good}.{signature}"),
        format!("{header}.{payload}.x.{signature}"),
        format!("{good}="),
        format!("{good}=="),
        format!("{header}=.{payload}.{signature}"),
        format!(" {good}"),
        format!("{good}\n"),
        format!("{good}\0"),
        format!("Bearer {good}"),
        format!("\"{good}\""),
        good.replace('.', ","),
        format!("{}.{payload}.", alg("none")),
        format!("{}.{payload}.{signature}", alg("none")),
        hmac_with_public_key,
        resigned(&raw[..255]),
        resigned(&[raw.as_slice(), &[0]].concat()),
        resigned(&[&[0], raw.as_slice()].concat()),
        resigned(&[0; 256]),
        resigned(&[255; 256]),
        resigned(&[]),
        format!("{header}.{}.{signature}", URL_SAFE_NO_PAD.encode("{}")),
        format!("{payload}.{header}.{signature}"),
        format!("{header}.{payload}.{}", STANDARD.encode([251; 256])),
        huge,
        "a.".repeat(8000),
        "é.é.é".into(),
    ];
    for position in (0..raw.len()).step_by(16) {
        let mut flipped = raw.clone();
        flipped[position] ^= 1;
        bent.push(resigned(&flipped));
    }
    // 256 bytes are 342 characters: the last one carries four spare bits, of which none may be set.
    let last = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    for spare in last.chars().filter(|c| !signature.ends_with(*c)) {
        bent.push(format!("{}{spare}", &good[..good.len() - 1]));
    }
    assert!(bent.len() >= 60, "{}", bent.len());
    for token in bent {
        assert!(check(&token).is_err(), "{}", &token.chars().take(120).collect::<String>());
    }
}

#[test]
fn clocks_may_differ_by_five_seconds() {
    let token = signed(&claims());
    let at = |now| verify(&token, &KEYS, &rules(), now).map(|_| ());
    assert_eq!(at(NOW - 6), Err(Rejected::NotYetValid));
    assert_eq!(at(NOW - 5), Ok(()));
    assert_eq!(at(NOW + 64), Ok(()));
    assert_eq!(at(NOW + 65), Err(Rejected::Expired { expired_at: NOW + 60 }));
    assert_eq!(at(i64::MIN), Err(Rejected::NotYetValid));
    assert_eq!(at(i64::MAX), Err(Rejected::Expired { expired_at: NOW + 60 }));
}

#[test]
fn the_claims_of_the_templates_are_read() {
    let mut all = claims();
    all.as_object_mut().unwrap().extend(
        json!({
            "email": "ada@example.com", "role": "creator", "subscription_tier": "premium",
            "permissions": ["video:create", 7, "video:create"], "userType": "freelancer",
            "roles": [{ "name": "Verified", "permissions": ["view_project", "video:create"] }, 7],
            "organizationId": "org_456", "organizationRole": "ORG_OWNER",
            "featureFlags": { "advanced_search": true },
            "onboarding": { "status": "completed" },
            "act": { "sub": "user_admin" },
        })
        .as_object()
        .unwrap()
        .clone(),
    );
    let verified = check(&signed(&all)).unwrap();
    assert_eq!(verified.session_id.as_deref(), Some("sess_1"));
    assert_eq!((verified.issued_at, verified.expires_at), (NOW, NOW + 60));
    assert_eq!(verified.email.as_deref(), Some("ada@example.com"));
    assert_eq!(verified.role.as_deref(), Some("creator"));
    assert_eq!(verified.tier.as_deref(), Some("premium"));
    assert_eq!(verified.permissions, ["video:create", "view_project"]);
    assert_eq!(verified.user_type.as_deref(), Some("freelancer"));
    assert_eq!(verified.organizations[0].id, "org_456");
    assert_eq!(verified.organizations[0].role.as_deref(), Some("ORG_OWNER"));
    assert_eq!(verified.feature_flags["advanced_search"], true);
    assert_eq!(verified.onboarding, Some(json!({ "status": "completed" })));
    assert_eq!(verified.actor.as_deref(), Some("user_admin"));
    assert_eq!(Value::Object(verified.raw), all);
}

#[test]
fn version_2_permissions_are_read_from_their_masks() {
    let read = |fea: &str, per: &str, fpm: &str| {
        let mut claims = claims_with("fea", json!(fea));
        claims["o"] =
            json!({ "id": "org_1", "slg": "acme", "rol": "admin", "per": per, "fpm": fpm });
        check(&signed(&claims)).unwrap().organizations.remove(0)
    };
    let organization = read("o:dashboard,u:hd,ou:teams", "manage,read", "3,2");
    assert_eq!(organization.role.as_deref(), Some("org:admin"));
    assert_eq!(organization.slug.as_deref(), Some("acme"));
    let expected = ["org:dashboard:manage", "org:dashboard:read", "org:teams:read"];
    assert_eq!(organization.permissions, expected);

    let names: Vec<String> = (0..70).map(|n| format!("p{n}")).collect();
    let wide = read("o:big", &names.join(","), "1180591620717411303423");
    assert_eq!(wide.permissions.len(), 70);
    // 2^69 alone: read as a 64-bit float or integer this would be other bits, or none.
    let one = read("o:big", &names.join(","), "590295810358705651712");
    assert_eq!(one.permissions, ["org:big:p69"]);
    for nonsense in ["", "x", "-1", "1.5", "0x3", " ", ",,,"] {
        assert!(read("o:big", "a,b", nonsense).permissions.is_empty(), "{nonsense}");
    }
    assert!(read("o:big", "a,b", &"9".repeat(400)).permissions.is_empty());
}

#[test]
fn version_2_features_and_plan_lose_their_scope() {
    let mut claims = claims_with("fea", json!("o:dashboard,u:hd"));
    claims["pla"] = json!("o:pro,u:plus");
    let verified = check(&signed(&claims)).unwrap();
    assert_eq!(verified.features, ["dashboard", "hd"]);
    assert_eq!(verified.plan.as_deref(), Some("plus"));
    let verified = check(&signed(&claims_with("pla", json!("o:pro")))).unwrap();
    assert_eq!(verified.plan.as_deref(), Some("pro"));
}

#[test]
fn weak_and_foreign_keys_are_refused() {
    let n = |bytes: usize| URL_SAFE_NO_PAD.encode(vec![0xC3; bytes]);
    let jwk = |n: String, e: &str| json!({ "kty": "RSA", "kid": "k", "n": n, "e": e });
    let n_after =
        |first: &[u8], bytes| URL_SAFE_NO_PAD.encode([first, &vec![0xC3; bytes]].concat());
    let sets = [
        json!({}),
        json!([]),
        json!({ "keys": {} }),
        json!({ "keys": [] }),
        json!({ "keys": [7, null, "x"] }),
        json!({ "keys": [jwk(n(128), "AQAB")] }),
        json!({ "keys": [jwk(n(255), "AQAB")] }),
        json!({ "keys": [jwk(n(2048), "AQAB")] }),
        json!({ "keys": [jwk(n(256), "AQ")] }),
        json!({ "keys": [jwk(n(256), "AA")] }),
        json!({ "keys": [jwk(n(256), "")] }),
        json!({ "keys": [jwk(n(256), "AQAB"), jwk(n(300), "AQAB")] }),
        json!({ "keys": [jwk(n(256), "Ag")] }),
        json!({ "keys": [jwk(n(256), "AQAAAAAB")] }),
        json!({ "keys": [jwk(n_after(&[1], 255), "AQAB")] }),
        json!({ "keys": [jwk(n_after(&[1], 1024), "AQAB")] }),
        json!({ "keys": [{ "kty": "EC", "kid": "k", "n": n(256), "e": "AQAB" }] }),
        json!({ "keys": [{ "kty": "RSA", "n": n(256), "e": "AQAB" }] }),
        json!({ "keys": [{ "kty": "oct", "kid": "k", "k": "c2VjcmV0" }] }),
        json!({ "keys": [{ "kty": "RSA", "use": "enc", "kid": "k", "n": n(256), "e": "AQAB" }] }),
        json!({ "keys": [{ "kty": "RSA", "alg": "RS512", "kid": "k", "n": n(256), "e": "AQAB" }] }),
    ];
    for set in sets {
        assert!(KeySet::from_jwks(&set.to_string()).is_err(), "{set}");
    }
    for key in
        [jwk(n(256), "AQAB"), jwk(n(1024), "AQAAAAE"), jwk(n_after(&[0, 0, 0], 256), "AAEAAQ")]
    {
        assert!(KeySet::from_jwks(&json!({ "keys": [key] }).to_string()).is_ok(), "{key}");
    }
    let private = KEY.to_pkcs8_pem().unwrap();
    let noise = "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----";
    let weak = "-----BEGIN PUBLIC KEY-----\nMIGfMA0GCSqGSIb3DQEBAQUAA4GNADCBiQKBgQCqGKukO1De7zhZj6+H0qtjTkVxwTCpvKe4eCZ0\nFPqri0cb2JZfXJ/DgYSF6vUpwmJG8wVQZKjeGcjDOL5UlsuusFncCzWBQ7RKNUSesmQRMSGkVb1/\n3j+skZ6UtW+5u09lHNsj6tQ51s1SPrCBkedbNf0Tp0GbMJDyR4e9T04ZZwIDAQAB\n-----END PUBLIC KEY-----";
    for pem in ["", "secret", &private, noise, weak] {
        assert!(KeySet::from_pem(pem).is_err(), "{pem}");
    }
}

#[test]
fn a_cached_token_is_believed_for_five_minutes_and_never_past_its_end() {
    let mut long = claims();
    long["exp"] = json!(NOW + 1000);
    let token = signed(&long);
    let cache = TokenCache::default();
    let at = |token: &str, now| cache.verify(token, &KEYS, &rules(), now);
    let first = at(&token, NOW).unwrap();
    assert!(Arc::ptr_eq(&first, &at(&token, NOW + 299).unwrap()));
    let second = at(&token, NOW + 300).unwrap();
    assert!(!Arc::ptr_eq(&first, &second));
    assert!(at(&token, NOW + 1005).is_err());
    assert_eq!(at(&token, NOW - 6), Err(Rejected::NotYetValid), "a clock set back");

    let short = signed(&claims());
    let first = at(&short, NOW).unwrap();
    assert!(Arc::ptr_eq(&first, &at(&short, NOW + 59).unwrap()));
    assert!(!Arc::ptr_eq(&first, &at(&short, NOW + 60).unwrap()), "only the skew lets it in");
    assert!(at(&short, NOW + 65).is_err());
}

#[test]
fn the_cache_forgets_when_the_keys_change_and_stays_within_its_bound() {
    let cache = TokenCache::with_capacity(32);
    let token = signed(&claims());
    cache.verify(&token, &KEYS, &rules(), NOW).unwrap();
    let rotated = KeySet::from_jwks(&STRANGER.jwks_json().to_string()).unwrap();
    assert_eq!(cache.verify(&token, &rotated, &rules(), NOW), Err(Rejected::Signature));
    let same_again = KeySet::from_jwks(&KEY.jwks_json().to_string()).unwrap();
    let first = cache.verify(&token, &KEYS, &rules(), NOW).unwrap();
    let again = cache.verify(&token, &same_again, &rules(), NOW).unwrap();
    assert!(Arc::ptr_eq(&first, &again), "a refresh that changes nothing keeps the cache");
    for n in 0..100 {
        let token = signed(&claims_with("n", json!(n)));
        cache.verify(&token, &KEYS, &rules(), NOW).unwrap();
    }
    let held: Vec<(usize, usize)> = cache
        .shards
        .iter()
        .map(|shard| shard.lock().unwrap())
        .map(|shard| (shard.entries.len(), shard.order.len()))
        .collect();
    assert!(held.iter().all(|(entries, order)| entries == order), "{held:?}");
    assert_eq!(held.iter().map(|(entries, _)| *entries).max(), Some(2), "{held:?}");
}

#[test]
fn an_organization_is_read_in_each_form_and_the_same_one_once() {
    let read = |forms: &[Value]| {
        let mut all = claims();
        for form in forms {
            all.as_object_mut().unwrap().extend(form.as_object().unwrap().clone());
        }
        check(&signed(&all)).unwrap().organizations
    };
    let first = json!({
        "org_id": "org_1", "org_slug": "acme", "org_role": "org:admin",
        "org_permissions": ["org:video:render", 7],
    });
    let expected = OrganizationClaim {
        id: "org_1".to_owned(),
        slug: Some("acme".to_owned()),
        role: Some("org:admin".to_owned()),
        permissions: vec!["org:video:render".to_owned()],
    };
    assert_eq!(read(std::slice::from_ref(&first)), [expected]);
    let ids = |forms: &[Value]| -> Vec<String> {
        read(forms).into_iter().map(|organization| organization.id).collect()
    };
    let (same, other) = (json!({ "organizationId": "org_1" }), json!({ "o": { "id": "org_2" } }));
    assert_eq!(ids(&[first.clone(), same]), ["org_1"]);
    assert_eq!(ids(&[first, other]), ["org_2", "org_1"]);
    assert_eq!(ids(&[]), Vec::<String>::new());
}

#[test]
fn a_permission_without_a_name_is_none() {
    let mut claims = claims_with("fea", json!("o:video"));
    claims["o"] = json!({ "id": "org_1", "per": "manage,,read", "fpm": "7" });
    let organization = check(&signed(&claims)).unwrap().organizations.remove(0);
    assert_eq!(organization.permissions, ["org:video:manage", "org:video:read"]);
}

#[test]
fn ids_and_tokens_as_long_as_they_may_be_are_accepted_and_no_longer_ones() {
    let longest = "u".repeat(128);
    let claims = claims_with("sub", json!(longest));
    assert_eq!(check(&signed(&claims)).unwrap().user_id, longest);

    // White space around the JSON of the header and a claim as filling reach every length.
    let token = |length: usize| {
        let sized = |spaces: usize, filling: usize| {
            let header = format!("{}{}", header(), " ".repeat(spaces));
            let claims = claims_with("x", json!("x".repeat(filling)));
            KEY.sign_bytes(header.as_bytes(), claims.to_string().as_bytes()).unwrap()
        };
        let bare = sized(0, 0).len();
        let near = (length - bare) * 3 / 4 - 4;
        let mut sizes = (0..4).flat_map(|spaces| (near..near + 8).map(move |it| (spaces, it)));
        sizes.find_map(|(spaces, filling)| {
            Some(sized(spaces, filling)).filter(|token| token.len() == length)
        })
    };
    let (fits, longer) = (token(MAX_TOKEN_BYTES).unwrap(), token(MAX_TOKEN_BYTES + 1).unwrap());
    let cache = TokenCache::default();
    assert!(check(&fits).is_ok());
    assert!(cache.verify(&fits, &KEYS, &rules(), NOW).is_ok());
    let refused = Rejected::Malformed("too long");
    assert_eq!(check(&longer), Err(refused.clone()));
    assert_eq!(cache.verify(&longer, &KEYS, &rules(), NOW), Err(refused));
}

#[test]
fn a_key_set_names_its_keys_and_shows_nothing_of_them() {
    assert_eq!(format!("{:?}", *KEYS), r#"KeySet(["one"])"#);
    let pem = KeySet::from_pem(&KEY.public_pem().unwrap()).unwrap();
    assert_eq!(format!("{pem:?}"), "KeySet(one key for any id)");
}
