//! What a translation is asked: which file, between which languages, and how.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::ids::FileId;
use super::text::Personal;

/// The model when the request names none (seed `translation-clerk-integration`).
pub const DEFAULT_MODEL: &str = "gemini-2.5-flash-lite";
/// Characters of a segment when the request names no number (the same seed).
pub const DEFAULT_SEGMENT_SIZE: u32 = 15_000;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct TranslationOptions {
    /// The text as it was uploaded.
    pub source_file_id: FileId,
    pub format: Format,
    /// Absent: the engine's choice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_language: Option<Language>,
    /// Absent: the engine's choice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_language: Option<Language>,
    pub model_name: String,
    /// How the engine shall write, in words or data of the engine's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub style_data: Option<Personal<String>>,
    /// The most characters that an engine shall translate at a time.
    pub segment_size: u32,
    /// Whether a key came with the request. The key itself is in the vault and nowhere else.
    pub has_api_key: bool,
}

/// How the text is laid out, in the source and in the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    Text,
    /// SubRip.
    Srt,
    /// WebVTT.
    Vtt,
}

impl Format {
    /// By what the text begins with, else by its file name.
    pub fn of(filename: &str, beginning: &str) -> Self {
        let beginning = beginning.trim_start_matches('\u{feff}');
        let extension = filename.rsplit_once('.').map(|(_, extension)| extension.to_lowercase());
        if beginning.starts_with("WEBVTT") {
            Self::Vtt
        } else if extension.as_deref() == Some("srt") || begins_with_a_cue(beginning) {
            Self::Srt
        } else {
            Self::Text
        }
    }

    pub fn content_type(self) -> &'static str {
        match self {
            Self::Text => "text/plain",
            Self::Srt => "application/x-subrip",
            Self::Vtt => "text/vtt",
        }
    }

    pub fn extension(self) -> &'static str {
        match self {
            Self::Text => "txt",
            Self::Srt => "srt",
            Self::Vtt => "vtt",
        }
    }
}

/// A number, and a timing below it.
fn begins_with_a_cue(text: &str) -> bool {
    let mut lines = text.lines().map(str::trim).skip_while(|line| line.is_empty());
    let number = lines.next().is_some_and(|line| line.parse::<u64>().is_ok());
    number && lines.next().is_some_and(|line| line.contains("-->"))
}

/// A language, by its tag: `en`, `pt-BR`, `zh-Hant` (the form of RFC 5646, not its registry).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct Language(String);

/// Why a text names no language.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("must be a language tag such as en or pt-BR")]
pub struct InvalidLanguage;

impl TryFrom<String> for Language {
    type Error = InvalidLanguage;
    fn try_from(text: String) -> Result<Self, InvalidLanguage> {
        let mut parts = text.split('-');
        let primary = parts.next().unwrap_or_default();
        let is_primary =
            (2..=8).contains(&primary.len()) && primary.bytes().all(|b| b.is_ascii_alphabetic());
        let is_part = |part: &str| {
            (1..=8).contains(&part.len()) && part.bytes().all(|b| b.is_ascii_alphanumeric())
        };
        if text.len() <= 35 && is_primary && parts.all(is_part) {
            Ok(Self(text))
        } else {
            Err(InvalidLanguage)
        }
    }
}

impl From<Language> for String {
    fn from(language: Language) -> Self {
        language.0
    }
}

impl fmt::Display for Language {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_language_is_a_tag() {
        for good in ["en", "spa", "pt-BR", "zh-Hant-TW", "de-CH-1996"] {
            assert!(Language::try_from(good.to_owned()).is_ok(), "{good}");
        }
        let long = format!("en{}", "-abcdefgh".repeat(4));
        for bad in
            ["", "e", "en_US", "english language", "en-", "../x", "en\n", "1n", "--help", &long]
        {
            assert!(Language::try_from(bad.to_owned()).is_err(), "{bad:?}");
        }
        let language = Language::try_from("pt-BR".to_owned()).unwrap();
        assert_eq!(language.to_string(), "pt-BR");
        assert_eq!(String::from(language), "pt-BR");
    }

    #[test]
    fn the_layout_is_told_by_the_text_and_then_by_the_name() {
        let check = |name: &str, text: &str, then| assert_eq!(Format::of(name, text), then);
        check("a.txt", "WEBVTT\n\n00:01.000 --> 00:02.000\nHi", Format::Vtt);
        check("a", "\u{feff}WEBVTT", Format::Vtt);
        check("a.txt", "\n1\r\n00:00:01,000 --> 00:00:02,000\r\nHi", Format::Srt);
        check("A.SRT", "Hi", Format::Srt);
        check("a.txt", "1\nis a number", Format::Text);
        check("notes", "", Format::Text);
    }

    #[test]
    fn a_layout_has_its_content_type_and_its_extension() {
        let layouts = [
            (Format::Text, "text/plain", "txt"),
            (Format::Srt, "application/x-subrip", "srt"),
            (Format::Vtt, "text/vtt", "vtt"),
        ];
        for (format, content_type, extension) in layouts {
            assert_eq!((format.content_type(), format.extension()), (content_type, extension));
        }
    }
}
