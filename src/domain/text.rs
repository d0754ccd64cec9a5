//! Texts that people wrote, parsed once: what has the type is valid.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A personal field: shown to its owner and to administrators, kept out of our own output.
///
/// The type marks what the codec seals with the user's key on its way into the log; `Debug` never
/// prints it, so no log line can leak it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Personal<T>(pub T);

impl<T> std::fmt::Debug for Personal<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("(personal)")
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
        assert!(!format!("{:?}", Personal("ada@example.com")).contains("ada"));
    }
}
