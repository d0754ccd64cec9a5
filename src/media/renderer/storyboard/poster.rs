//! The poster: one finished frame as a JPEG.
use std::fs;
use std::path::Path;

use image::codecs::jpeg::JpegEncoder;
use image::{ExtendedColorType, ImageEncoder};
use tiny_skia::Pixmap;

use crate::media::renderer::Error;

/// Indistinguishable at this size, and about 70 KB at 720p.
const QUALITY: u8 = 85;

pub fn write(frame: &Pixmap, file: &Path) -> Result<(), Error> {
    let rgb: Vec<u8> = frame.pixels().iter().flat_map(|p| [p.red(), p.green(), p.blue()]).collect();
    let mut jpeg = Vec::new();
    JpegEncoder::new_with_quality(&mut jpeg, QUALITY)
        .write_image(&rgb, frame.width(), frame.height(), ExtendedColorType::Rgb8)
        .map_err(|error| Error::Failed(format!("encoding the poster: {error}")))?;
    fs::write(file, jpeg).map_err(|error| Error::Failed(format!("writing the poster: {error}")))
}
