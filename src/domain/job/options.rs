//! What a job is asked besides its prompt.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Kind;
use crate::domain::ids::FileId;
use crate::domain::text::Personal;
use crate::domain::translation::TranslationOptions;

/// What a job of each kind is asked besides its prompt. The kinds share no required field, so that
/// what is stored needs no tag.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Options {
    Video(VideoOptions),
    Translation(TranslationOptions),
}

impl Options {
    pub fn kind(&self) -> Kind {
        match self {
            Self::Video(_) => Kind::Video,
            Self::Translation(_) => Kind::Translation,
        }
    }

    /// The file that the job works on, if there is one.
    pub fn source_file_id(&self) -> Option<FileId> {
        match self {
            Self::Video(options) => options.source_file_id,
            Self::Translation(options) => Some(options.source_file_id),
        }
    }

    /// Whether a secret was sealed for the job, which its end destroys.
    pub fn needs_secret(&self) -> bool {
        matches!(self, Self::Translation(options) if options.has_api_key)
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct VideoOptions {
    /// Seconds.
    pub duration: u32,
    pub quality: Quality,
    pub aspect_ratio: AspectRatio,
    /// In the user's own words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub style: Option<Personal<String>>,
    /// Chosen at the request when the caller names none, so that every attempt draws the same.
    pub seed: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_file_id: Option<FileId>,
}

/// From coarse to fine.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
pub enum Quality {
    #[serde(rename = "480p")]
    P480,
    #[serde(rename = "720p")]
    P720,
    #[serde(rename = "1080p")]
    P1080,
    #[serde(rename = "4k")]
    K4,
}

impl Quality {
    pub const NAMES: [&'static str; 4] = ["480p", "720p", "1080p", "4k"];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::P480 => "480p",
            Self::P720 => "720p",
            Self::P1080 => "1080p",
            Self::K4 => "4k",
        }
    }

    pub fn parse(name: &str) -> Option<Self> {
        [Self::P480, Self::P720, Self::P1080, Self::K4].into_iter().find(|q| q.as_str() == name)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum AspectRatio {
    #[serde(rename = "16:9")]
    Landscape,
    #[serde(rename = "9:16")]
    Portrait,
    #[serde(rename = "1:1")]
    Square,
}

impl AspectRatio {
    pub const NAMES: [&'static str; 3] = ["16:9", "9:16", "1:1"];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Landscape => "16:9",
            Self::Portrait => "9:16",
            Self::Square => "1:1",
        }
    }

    pub fn parse(name: &str) -> Option<Self> {
        [Self::Landscape, Self::Portrait, Self::Square].into_iter().find(|r| r.as_str() == name)
    }
}
