//! Turns an accepted job into its result: [`engine`] says what goes in and what comes out, whether
//! the built-in [`storyboard`] draws or a program does the work, [`command`].
use std::ops::ControlFlow;
use std::path::PathBuf;

pub mod engine;

pub mod command;
mod disk;
pub mod output;
pub mod pause;
mod process;
pub mod storyboard;

pub use engine::{Engine, Made, MadeFile, Progress, Work};
pub use storyboard::render;

/// Frames per second of the built-in engine. The pace of film: it moves as well as 30 would here,
/// for a fifth less work.
pub const FRAMES_PER_SECOND: u32 = 24;

/// The longest video, in seconds, that one job may ask for.
pub const MAX_DURATION_S: u32 = 60;

/// What to draw. Two equal specifications give byte-identical files on one build of the program
/// (see `storyboard::type_setting` for the one exception, scripts that need a system font).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spec {
    pub prompt: String,
    pub seed: u64,
    /// Seconds, 1 to [`MAX_DURATION_S`].
    pub duration_s: u32,
    /// Pixels, even; see [`dimensions`].
    pub width: u32,
    /// Pixels, even; see [`dimensions`].
    pub height: u32,
    /// 1 to 60; [`FRAMES_PER_SECOND`] unless there is a reason.
    pub frames_per_second: u32,
    /// Words that set the mood and are not shown, such as `neon` or `noir`.
    pub style: Option<String>,
}

/// The files of one finished render.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    pub video: PathBuf,
    pub poster: PathBuf,
    pub captions: PathBuf,
    pub duration_ms: u64,
    pub width: u32,
    pub height: u32,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `on_progress` asked to stop; nothing is left in the directory.
    #[error("the render was cancelled")]
    Cancelled,
    /// The specification can never be rendered.
    #[error("invalid render: {0}")]
    Invalid(String),
    /// The machine failed (disk, encoder); the same render may succeed later.
    #[error("render failed: {0}")]
    Failed(String),
    /// The program could not be run at all, which is the machine's fault; the words are fit for the
    /// job's owner.
    #[error("{0}")]
    NotRun(String),
    /// A program said so, or made what cannot be used; the words are fit for the job's owner.
    #[error("{words}")]
    Engine { words: String, retryable: bool },
}

/// Called with the percentage done, 0.0 to 100.0, after each group of pictures; `Break` cancels.
pub type OnProgress<'a> = dyn FnMut(f32) -> ControlFlow<()> + Send + 'a;

/// Width and height in pixels for a quality (`480p`, `720p`, `1080p`, `4k`) and an aspect ratio
/// (`16:9`, `9:16`, `1:1`); `None` for any other name. The quality names the shorter side, and
/// both sides are even, as 4:2:0 chroma requires.
pub fn dimensions(quality: &str, aspect_ratio: &str) -> Option<(u32, u32)> {
    let (long, short) = match quality {
        "480p" => (854, 480),
        "720p" => (1280, 720),
        "1080p" => (1920, 1080),
        "4k" => (3840, 2160),
        _ => return None,
    };
    match aspect_ratio {
        "16:9" => Some((long, short)),
        "9:16" => Some((short, long)),
        "1:1" => Some((short, short)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_quality_and_aspect_ratio_has_even_dimensions_named_by_the_short_side() {
        for (quality, short) in [("480p", 480), ("720p", 720), ("1080p", 1080), ("4k", 2160)] {
            for aspect_ratio in ["16:9", "9:16", "1:1"] {
                let (width, height) = dimensions(quality, aspect_ratio).unwrap();
                assert_eq!(width.min(height), short);
                assert_eq!((width % 2, height % 2), (0, 0));
            }
        }
        assert_eq!(dimensions("720p", "16:9"), Some((1280, 720)));
        assert_eq!(dimensions("720p", "9:16"), Some((720, 1280)));
        assert_eq!(dimensions("720p", "1:1"), Some((720, 720)));
    }

    #[test]
    fn an_unknown_quality_or_aspect_ratio_has_no_dimensions() {
        assert_eq!(dimensions("8k", "16:9"), None);
        assert_eq!(dimensions("720p", "4:3"), None);
    }
}
