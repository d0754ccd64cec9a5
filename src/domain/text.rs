//! Texts that people wrote, parsed once: what has the type is valid.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::value::{StrDeserializer, StringDeserializer};
use serde::de::{DeserializeOwned, MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

/// A personal field: shown to its owner and to administrators, kept out of our own output.
///
/// In the log it is sealed with its owner's key, and erased once that key is destroyed; what lies
/// between the two faces is not the domain's. `Debug` never prints it, so no log line can leak it.
#[derive(Clone, PartialEq, Eq)]
pub enum Personal<T> {
    /// Stored as it is; in the log only by versions that did not seal yet.
    Known(T),
    /// As it lies in the log, stored as `{"sealed":"…"}`.
    Sealed(String),
    /// Its key was destroyed, stored as `{"erased":true}`.
    Erased,
}

impl<T> Personal<T> {
    pub fn known(&self) -> Option<&T> {
        match self {
            Self::Known(value) => Some(value),
            Self::Sealed(_) | Self::Erased => None,
        }
    }
}

impl<T: Default> Default for Personal<T> {
    fn default() -> Self {
        Self::Known(T::default())
    }
}

impl<T> fmt::Debug for Personal<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(personal)")
    }
}

/// A personal field of any type, for whoever seals and opens it.
pub trait Concealed {
    /// The value as JSON, if it is known.
    fn clear(&self) -> Option<Vec<u8>>;
    /// The sealed text, if it is sealed.
    fn sealed(&self) -> Option<&str>;
    fn seal(&mut self, text: String);
    /// Makes it known.
    ///
    /// # Errors
    /// The JSON is not of this type; then it stays as it was.
    fn reveal(&mut self, json: &[u8]) -> Result<(), serde_json::Error>;
    fn erase(&mut self);
}

/// Is shown each personal field of an event, under its place: its dotted path in the event's data.
/// What is sealed is bound to that name, so it never changes.
pub type Visit<'a> = &'a mut dyn FnMut(&'static str, &mut dyn Concealed);

impl<T: Serialize + DeserializeOwned> Concealed for Personal<T> {
    fn clear(&self) -> Option<Vec<u8>> {
        self.known().map(|value| serde_json::to_vec(value).expect("a text or a JSON object"))
    }

    fn sealed(&self) -> Option<&str> {
        match self {
            Self::Sealed(text) => Some(text),
            Self::Known(_) | Self::Erased => None,
        }
    }

    fn seal(&mut self, text: String) {
        *self = Self::Sealed(text);
    }

    fn reveal(&mut self, json: &[u8]) -> Result<(), serde_json::Error> {
        *self = Self::Known(serde_json::from_slice(json)?);
        Ok(())
    }

    fn erase(&mut self) {
        *self = Self::Erased;
    }
}

impl<T: Serialize> Serialize for Personal<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut face = match self {
            Self::Known(value) => return value.serialize(serializer),
            Self::Sealed(_) | Self::Erased => serializer.serialize_map(Some(1))?,
        };
        match self {
            Self::Sealed(text) => face.serialize_entry("sealed", text)?,
            Self::Known(_) | Self::Erased => face.serialize_entry("erased", &true)?,
        }
        face.end()
    }
}

impl<'de, T: DeserializeOwned> Deserialize<'de> for Personal<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Faces(PhantomData))
    }
}

struct Faces<T>(PhantomData<T>);

impl<'de, T: DeserializeOwned> Visitor<'de> for Faces<T> {
    type Value = Personal<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a personal field, sealed, erased or in clear")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Self::Value, E> {
        T::deserialize(StrDeserializer::new(text)).map(Personal::Known)
    }

    fn visit_string<E: serde::de::Error>(self, text: String) -> Result<Self::Value, E> {
        T::deserialize(StringDeserializer::new(text)).map(Personal::Known)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut fields = Map::new();
        while let Some((name, value)) = map.next_entry::<String, Value>()? {
            fields.insert(name, value);
        }
        if fields.len() == 1 {
            if let Some(Value::String(text)) = fields.get_mut("sealed") {
                return Ok(Personal::Sealed(std::mem::take(text)));
            }
            if fields.get("erased") == Some(&Value::Bool(true)) {
                return Ok(Personal::Erased);
            }
        }
        T::deserialize(Value::Object(fields)).map(Personal::Known).map_err(serde::de::Error::custom)
    }
}

impl<T: JsonSchema> JsonSchema for Personal<T> {
    fn schema_name() -> Cow<'static, str> {
        format!("Personal_{}", T::schema_name()).into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let clear = generator.subschema_for::<T>();
        json_schema!({
            "description": "A personal field: sealed with its owner's key, erased when that key \
                            was destroyed, or in clear, as older versions wrote it.",
            "anyOf": [
                clear,
                { "type": "object", "properties": { "sealed": { "type": "string" } },
                  "required": ["sealed"], "additionalProperties": false },
                { "type": "object", "properties": { "erased": { "const": true } },
                  "required": ["erased"], "additionalProperties": false },
            ],
        })
    }
}

/// What the video shall show: 1 to 2000 characters that are not all white space.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct Prompt(String);

/// Why a text is no prompt.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPrompt {
    #[error("must not be empty")]
    Empty,
    #[error("must be at most {} characters", Prompt::MAX_CHARACTERS)]
    TooLong,
    #[error("must not contain control characters")]
    Control,
}

impl Prompt {
    pub const MAX_CHARACTERS: usize = 2000;

    /// # Errors
    /// Empty, too long, or with control characters other than line breaks and tabs.
    pub fn parse(text: &str) -> Result<Self, InvalidPrompt> {
        if text.chars().count() > Self::MAX_CHARACTERS {
            return Err(InvalidPrompt::TooLong);
        }
        if text.chars().any(|c| c.is_control() && !matches!(c, '\n' | '\r' | '\t')) {
            return Err(InvalidPrompt::Control);
        }
        if text.trim().is_empty() {
            return Err(InvalidPrompt::Empty);
        }
        Ok(Self(text.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Prompt {
    type Error = InvalidPrompt;
    fn try_from(text: String) -> Result<Self, InvalidPrompt> {
        Self::parse(&text)
    }
}

impl From<Prompt> for String {
    fn from(prompt: Prompt) -> Self {
        prompt.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_is_one_to_two_thousand_characters() {
        assert_eq!(Prompt::parse("").err(), Some(InvalidPrompt::Empty));
        assert_eq!(Prompt::parse(" \n\t").err(), Some(InvalidPrompt::Empty));
        assert_eq!(Prompt::parse("a\0b").err(), Some(InvalidPrompt::Control));
        assert_eq!(Prompt::parse(&"ü".repeat(2001)).err(), Some(InvalidPrompt::TooLong));
        assert!(Prompt::parse(&"ü".repeat(2000)).is_ok());
        assert!(Prompt::parse("שלום 🎬 мир").is_ok());
    }

    #[test]
    fn a_personal_field_does_not_print_itself() {
        for personal in [Personal::Known("ada"), Personal::Sealed("ada".to_owned())] {
            assert_eq!(format!("{personal:?}"), "(personal)");
        }
    }

    #[test]
    fn a_personal_field_is_stored_in_one_of_three_ways() {
        fn check<T>(value: Personal<T>, json: &str)
        where
            T: Serialize + DeserializeOwned + PartialEq,
        {
            assert_eq!(serde_json::to_string(&value).unwrap(), json);
            assert!(serde_json::from_str::<Personal<T>>(json).unwrap() == value, "{json}");
        }
        check(Personal::Known("ada".to_owned()), r#""ada""#);
        check(Personal::Known(Prompt::parse("a pier").unwrap()), r#""a pier""#);
        check(Personal::<Prompt>::Sealed("AQ==".to_owned()), r#"{"sealed":"AQ=="}"#);
        check(Personal::<Prompt>::Erased, r#"{"erased":true}"#);
        // What an uploader called so is no mark of ours, as long as it cannot be one.
        for text in [r#"{}"#, r#"{"erased":"true"}"#, r#"{"sealed":"x","size":"1"}"#] {
            check(Personal::Known(serde_json::from_str::<Map<_, _>>(text).unwrap()), text);
        }
        for bad in ["7", "null", r#"{"erased":false}"#, r#"{"sealed":7}"#, r#""""#] {
            assert!(serde_json::from_str::<Personal<Prompt>>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_personal_field_is_sealed_revealed_and_erased() {
        let mut name = Personal::Known("ada".to_owned());
        assert_eq!(name.known().map(String::as_str), Some("ada"));
        assert_eq!((name.clear(), name.sealed()), (Some(br#""ada""#.to_vec()), None));
        name.seal("AQ==".to_owned());
        assert_eq!((name.known(), name.clear(), name.sealed()), (None, None, Some("AQ==")));
        assert!(name.reveal(b"7").is_err());
        assert_eq!(name.sealed(), Some("AQ=="), "what is no text leaves it sealed");
        name.reveal(br#""bob""#).unwrap();
        assert!(name == Personal::Known("bob".to_owned()));
        name.erase();
        assert!(name == Personal::Erased);
        assert_eq!((name.known(), name.clear(), name.sealed()), (None, None, None));
    }

    #[test]
    fn a_personal_field_is_read_from_a_value_too_and_says_what_it_must_be() {
        let read = |value: Value| serde_json::from_value::<Personal<String>>(value);
        assert!(read(Value::from("ada")).unwrap() == Personal::Known("ada".to_owned()));
        let fault = read(Value::from(7)).unwrap_err().to_string();
        assert!(fault.ends_with("a personal field, sealed, erased or in clear"), "{fault}");
    }

    #[test]
    fn the_schema_of_a_personal_field_has_its_three_faces() {
        assert_eq!(Personal::<String>::schema_name(), "Personal_string");
        let schema = Personal::<String>::json_schema(&mut SchemaGenerator::default());
        let faces = schema.get("anyOf").and_then(Value::as_array).unwrap();
        assert_eq!(faces[0]["type"], "string");
        let sealed = (&faces[1]["required"][0], &faces[1]["additionalProperties"]);
        assert_eq!(sealed, (&Value::from("sealed"), &Value::from(false)));
        let erased = (&faces[2]["required"][0], &faces[2]["additionalProperties"]);
        assert_eq!(erased, (&Value::from("erased"), &Value::from(false)));
    }
}
