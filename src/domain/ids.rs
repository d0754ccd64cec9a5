//! Identifiers, parsed once at the edge and valid for ever after.

use std::fmt;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::de::Visitor;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use uuid::Uuid;

/// Why a text is no identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("an id is 1 to 128 letters, digits, or one of _ - . : @ |")]
pub struct InvalidId;

// The descriptions of these two stand in the events' schemas too.

/// A user, by Clerk's id (`user_…`).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, JsonSchema)]
#[schemars(with = "String")]
pub struct UserId(Arc<str>);

/// A session, by Clerk's id (`sess_…`), or derived from the token when it names none.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, JsonSchema)]
#[schemars(with = "String")]
pub struct SessionId(Arc<str>);

/// A job: version 7 when fresh, version 5 of user and `Idempotency-Key` when one was given.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(transparent)]
pub struct JobId(pub Uuid);

/// A stored file.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(transparent)]
pub struct FileId(pub Uuid);

/// One worker's hold on one attempt of a job; every write of the worker must name it.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(transparent)]
pub struct LeaseId(pub Uuid);

/// Namespace of the ids that are derived from a user and an `Idempotency-Key` (RFC 9562, version 5).
const IDEMPOTENCY: Uuid = Uuid::from_u128(0x2f6d_0c0e_6a0b_5b53_9d6e_7432_6d6b_6579);

/// The id that a retry with the same key meets again.
pub fn derived_id(user_id: &UserId, kind: &str, idempotency_key: &str) -> Uuid {
    Uuid::new_v5(&IDEMPOTENCY, format!("{kind}\n{user_id}\n{idempotency_key}").as_bytes())
}

fn allowed(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.' | b':' | b'@' | b'|')
}

fn checked(text: &str) -> Result<Arc<str>, InvalidId> {
    if (1..=128).contains(&text.len()) && text.bytes().all(allowed) {
        Ok(text.into())
    } else {
        Err(InvalidId)
    }
}

/// Checks a text where it lies in what is read.
struct Checking;

impl Visitor<'_> for Checking {
    type Value = Arc<str>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an id")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Arc<str>, E> {
        checked(text).map_err(E::custom)
    }
}

macro_rules! is_a_text {
    ($id:ident) => {
        impl $id {
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<&str> for $id {
            type Error = InvalidId;
            fn try_from(text: &str) -> Result<Self, InvalidId> {
                checked(text).map(Self)
            }
        }

        impl TryFrom<String> for $id {
            type Error = InvalidId;
            fn try_from(text: String) -> Result<Self, InvalidId> {
                checked(&text).map(Self)
            }
        }

        impl From<$id> for String {
            fn from(id: $id) -> Self {
                id.as_str().to_owned()
            }
        }

        impl fmt::Display for $id {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl Serialize for $id {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $id {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserializer.deserialize_str(Checking).map(Self)
            }
        }
    };
}

is_a_text!(UserId);
is_a_text!(SessionId);

impl UserId {
    /// Whether an id may hold this character.
    pub fn may_hold(c: char) -> bool {
        u8::try_from(c).is_ok_and(allowed)
    }
}

impl SessionId {
    /// The session of a token that names none: by its subject and time of issue (CONTRACT §4).
    pub fn of_token(user_id: &UserId, issued_at: i64) -> Self {
        let told = format!("session\n{user_id}\n{issued_at}");
        let id = Uuid::new_v5(&IDEMPOTENCY, told.as_bytes());
        Self(format!("tok_{}", id.simple()).into())
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for FileId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_could_break_a_stream_name_or_a_header_are_refused() {
        for bad in ["", "a b", "a/b", "a\r\nb", "ü", &"x".repeat(129)] {
            assert!(UserId::try_from(bad.to_owned()).is_err(), "{bad:?}");
        }
        assert!(UserId::try_from("user_2mT2m".to_owned()).is_ok());
        let error = serde_json::from_str::<UserId>("7").unwrap_err().to_string();
        assert!(error.contains("expected an id"), "{error}");
    }

    #[test]
    fn the_same_key_of_another_user_is_another_id() {
        let ada = UserId::try_from("ada".to_owned()).unwrap();
        let bob = UserId::try_from("bob".to_owned()).unwrap();
        assert_eq!(derived_id(&ada, "job", "k"), derived_id(&ada, "job", "k"));
        assert_ne!(derived_id(&ada, "job", "k"), derived_id(&bob, "job", "k"));
        assert_ne!(derived_id(&ada, "job", "k"), derived_id(&ada, "file", "k"));
    }

    #[test]
    fn an_id_keeps_its_text_and_shows_it() {
        let longest = "x".repeat(128);
        for text in ["user_2mT2m", "a-b.c:d@e|F9", &longest] {
            let user = UserId::try_from(text.to_owned()).unwrap();
            assert_eq!((user.as_str(), user.to_string().as_str()), (text, text));
            assert_eq!(String::from(user), text);
            let session = SessionId::try_from(text.to_owned()).unwrap();
            assert_eq!((session.as_str(), session.to_string().as_str()), (text, text));
            assert_eq!(String::from(session), text);
            assert!(text.chars().all(UserId::may_hold));
        }
        assert!(!" /\nü".chars().any(UserId::may_hold));
        assert!(SessionId::try_from("a b".to_owned()).is_err());
        let id = Uuid::from_u128(7);
        assert_eq!(
            (JobId(id).to_string(), FileId(id).to_string()),
            (id.to_string(), id.to_string())
        );
    }

    #[test]
    fn the_session_of_a_token_without_one_is_the_same_for_the_same_user_and_time() {
        let ada = UserId::try_from("ada".to_owned()).unwrap();
        let bob = UserId::try_from("bob".to_owned()).unwrap();
        let session = SessionId::of_token(&ada, 5);
        assert_eq!(session, SessionId::of_token(&ada, 5));
        assert_ne!(session, SessionId::of_token(&ada, 6));
        assert_ne!(session, SessionId::of_token(&bob, 5));
        assert_eq!(SessionId::try_from(session.to_string()), Ok(session));
    }
}
