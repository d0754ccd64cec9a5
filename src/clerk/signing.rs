//! A local RSA key that signs tokens as Clerk does: for `t2m token`, `t2m demo`, the development
//! issuer and the tests. Production only ever verifies.

use aws_lc_rs::encoding::AsDer;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::{KeyPair, KeySize};
use aws_lc_rs::signature::{KeyPair as _, RSA_PKCS1_SHA256};
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde_json::{Value, json};

/// An RSA key pair of 2048 bits with the key id its tokens carry.
pub struct SigningKey {
    kid: String,
    pair: KeyPair,
}

impl std::fmt::Debug for SigningKey {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "SigningKey({})", self.kid)
    }
}

/// The key could not be made, read or used; there is nothing to branch on.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Error(&'static str);

impl SigningKey {
    /// Makes a fresh key (about 100 ms of one core).
    ///
    /// # Errors
    /// When the cryptographic library cannot make one.
    pub fn generate(kid: &str) -> Result<Self, Error> {
        let pair = KeyPair::generate(KeySize::Rsa2048)
            .map_err(|_| Error("an RSA key could not be generated"))?;
        Ok(Self { kid: kid.to_owned(), pair })
    }

    /// Reads what [`SigningKey::to_pkcs8_pem`] wrote.
    ///
    /// # Errors
    /// When `pem` holds no PKCS #8 RSA private key.
    pub fn from_pkcs8_pem(kid: &str, pem: &str) -> Result<Self, Error> {
        let body: String = pem
            .trim()
            .strip_prefix("-----BEGIN PRIVATE KEY-----")
            .and_then(|rest| rest.strip_suffix("-----END PRIVATE KEY-----"))
            .ok_or(Error("not a PKCS #8 private key in PEM form"))?
            .split_ascii_whitespace()
            .collect();
        let der = STANDARD.decode(body).map_err(|_| Error("the private key is not base64"))?;
        let pair = KeyPair::from_pkcs8(&der).map_err(|_| Error("the private key is not RSA"))?;
        Ok(Self { kid: kid.to_owned(), pair })
    }

    /// The private key, to be kept where only this process reads it.
    ///
    /// # Errors
    /// When the cryptographic library cannot write it.
    pub fn to_pkcs8_pem(&self) -> Result<String, Error> {
        let der = self.pair.as_der().map_err(|_| Error("the private key could not be written"))?;
        Ok(pem("PRIVATE KEY", der.as_ref()))
    }

    /// The public key in the form of `CLERK_JWT_KEY`.
    ///
    /// # Errors
    /// When the cryptographic library cannot write it.
    pub fn public_pem(&self) -> Result<String, Error> {
        let der = self.pair.public_key().as_der();
        Ok(pem(
            "PUBLIC KEY",
            der.map_err(|_| Error("the public key could not be written"))?.as_ref(),
        ))
    }

    /// What an issuer serves at `/.well-known/jwks.json`.
    pub fn jwks_json(&self) -> Value {
        let key = self.pair.public_key();
        json!({ "keys": [{
            "use": "sig",
            "kty": "RSA",
            "kid": self.kid,
            "alg": "RS256",
            "n": URL_SAFE_NO_PAD.encode(key.modulus().big_endian_without_leading_zero()),
            "e": URL_SAFE_NO_PAD.encode(key.exponent().big_endian_without_leading_zero()),
        }]})
    }

    /// A token with these claims, and a header as Clerk writes it.
    ///
    /// # Errors
    /// When the cryptographic library cannot sign.
    pub fn sign(&self, claims: &Value) -> Result<String, Error> {
        let header = json!({ "alg": "RS256", "kid": self.kid, "typ": "JWT" });
        self.sign_bytes(header.to_string().as_bytes(), claims.to_string().as_bytes())
    }

    /// Signs any header and payload as they are, even such as no issuer would write.
    pub(crate) fn sign_bytes(&self, header: &[u8], payload: &[u8]) -> Result<String, Error> {
        let message =
            format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(payload));
        let signature = self.sign_message(&message)?;
        Ok(format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature)))
    }

    pub(crate) fn sign_message(&self, message: &str) -> Result<Vec<u8>, Error> {
        let mut signature = vec![0; self.pair.public_modulus_len()];
        self.pair
            .sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), message.as_bytes(), &mut signature)
            .map_err(|_| Error("the token could not be signed"))?;
        Ok(signature)
    }
}

fn pem(label: &str, der: &[u8]) -> String {
    let encoded = STANDARD.encode(der);
    let mut pem = format!("-----BEGIN {label}-----\n");
    let mut rest = encoded.as_str();
    while !rest.is_empty() {
        let (line, tail) = rest.split_at(rest.len().min(64));
        pem.push_str(line);
        pem.push('\n');
        rest = tail;
    }
    pem.push_str(&format!("-----END {label}-----\n"));
    pem
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clerk::jwt::{KeySet, Rules, verify};

    #[test]
    fn a_key_written_and_read_again_signs_tokens_that_all_its_public_forms_verify() {
        let key = SigningKey::generate("dev").unwrap();
        let again = SigningKey::from_pkcs8_pem("dev", &key.to_pkcs8_pem().unwrap()).unwrap();
        let token = again.sign(&json!({ "sub": "user_1", "iat": 100, "exp": 200 })).unwrap();
        let jwks = KeySet::from_jwks(&key.jwks_json().to_string()).unwrap();
        let pem = KeySet::from_pem(&key.public_pem().unwrap()).unwrap();
        for keys in [jwks, pem] {
            assert_eq!(verify(&token, &keys, &Rules::default(), 150).unwrap().user_id, "user_1");
        }
    }

    #[test]
    fn what_is_no_private_key_is_refused_without_showing_it() {
        let public = SigningKey::generate("dev").unwrap().public_pem().unwrap();
        let noise = "-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----";
        let broken = "-----BEGIN PRIVATE KEY-----\n!!\n-----END PRIVATE KEY-----";
        for text in ["", "secret", &public, noise, broken] {
            let fault = SigningKey::from_pkcs8_pem("dev", text).unwrap_err().to_string();
            assert!(!fault.contains("secret") && !fault.contains("c2Vj"), "{fault}");
        }
    }
}
