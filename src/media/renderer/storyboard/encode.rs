//! Frames to H.264, and H.264 to MP4.
//!
//! Each group of pictures is closed and has an encoder of its own: groups can be encoded in any
//! order on any thread, and the film comes out the same, byte for byte.
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use muxide::api::{MuxerBuilder, VideoCodec};
use openh264::OpenH264API;
use openh264::encoder::{
    Complexity, Encoder, EncoderConfig, FrameRate, IntraFramePeriod, Profile, RateControlMode,
    VuiConfig,
};
use openh264::formats::YUVSlices;
use tiny_skia::Pixmap;

use crate::media::renderer::{Error, Spec};

/// The encoded frames of one group, in order; the first is a key frame.
pub type Group = Vec<Vec<u8>>;

pub struct GroupEncoder {
    encoder: Encoder,
    planes: Planes,
    group: Group,
}

impl GroupEncoder {
    pub fn new(spec: &Spec) -> Result<Self, Error> {
        let config = EncoderConfig::new()
            // A constant quantiser: a bit rate would have to be found anew in every group, and
            // would be seen as a pulse at each key frame.
            .rate_control_mode(RateControlMode::Off)
            .complexity(Complexity::Low)
            .profile(Profile::High)
            .max_frame_rate(FrameRate::from_hz(spec.frames_per_second as f32))
            // The only key frame of a group is its first.
            .intra_frame_period(IntraFramePeriod::from_num_frames(0))
            .scene_change_detect(false)
            .skip_frames(false)
            .adaptive_quantization(false)
            .background_detection(false)
            .num_threads(1)
            .vui(VuiConfig::bt709());
        let encoder = Encoder::with_api_config(OpenH264API::from_source(), config)
            .map_err(|error| Error::Failed(format!("starting the encoder: {error}")))?;
        let planes = Planes::new(spec.width as usize, spec.height as usize);
        Ok(Self { encoder, planes, group: Group::new() })
    }

    /// Adds a frame, darkened to `brightness` (0.0 to 1.0).
    pub fn push(&mut self, frame: &Pixmap, brightness: f32) -> Result<(), Error> {
        self.planes.fill(frame.data(), brightness);
        let encoded = self
            .encoder
            .encode(&self.planes.slices())
            .map_err(|error| Error::Failed(format!("encoding a frame: {error}")))?;
        self.group.push(encoded.to_vec());
        Ok(())
    }

    pub fn finish(self) -> Group {
        self.group
    }
}

/// Writes the groups as an MP4 whose index comes first, so that it plays while it loads. The file
/// appears under its name only when it is whole.
pub fn write_mp4(groups: &[Group], spec: &Spec, file: &Path) -> Result<(), Error> {
    let partial = file.with_extension("mp4.partial");
    let written = mux(groups, spec, &partial)
        .and_then(|()| fs::rename(&partial, file).map_err(|error| error.to_string()));
    written.map_err(|error| {
        let _ = fs::remove_file(&partial);
        Error::Failed(format!("writing the video: {error}"))
    })
}

fn mux(groups: &[Group], spec: &Spec, file: &Path) -> Result<(), String> {
    let writer = BufWriter::new(File::create(file).map_err(|error| error.to_string())?);
    let rate = f64::from(spec.frames_per_second);
    let mut muxer = MuxerBuilder::new(writer)
        .video(VideoCodec::H264, spec.width, spec.height, rate)
        .with_fast_start(true)
        .build()
        .map_err(|error| error.to_string())?;
    let frames = groups.iter().flat_map(|group| group.iter().enumerate());
    for (number, (place_in_group, frame)) in frames.enumerate() {
        muxer
            .write_video(number as f64 / rate, frame, place_in_group == 0)
            .map_err(|error| error.to_string())?;
    }
    muxer.finish_in_place().map_err(|error| error.to_string())?;
    muxer.into_writer().flush().map_err(|error| error.to_string())
}

/// A frame as 4:2:0, BT.709, limited range.
struct Planes {
    width: usize,
    height: usize,
    y: Vec<u8>,
    u: Vec<u8>,
    v: Vec<u8>,
}

impl Planes {
    fn new(width: usize, height: usize) -> Self {
        let chroma = width * height / 4;
        Self { width, height, y: vec![0; width * height], u: vec![0; chroma], v: vec![0; chroma] }
    }

    fn slices(&self) -> YUVSlices<'_> {
        let strides = (self.width, self.width / 2, self.width / 2);
        YUVSlices::new((&self.y, &self.u, &self.v), (self.width, self.height), strides)
    }

    /// Fixed point, 16 bits. Source of the weights: ITU-R BT.709-6, section 3.
    fn fill(&mut self, rgba: &[u8], brightness: f32) {
        let weights =
            |w: [f32; 3], range: f32| w.map(|w| (w * range * 65536.0 * brightness) as i32);
        let luma = weights([0.2126, 0.7152, 0.0722], 219.0 / 255.0);
        let blue = weights([-0.11457, -0.38543, 0.5], 224.0 / 255.0);
        let red = weights([0.5, -0.45415, -0.04585], 224.0 / 255.0);
        let stride = self.width * 4;
        for (row, pair) in rgba.chunks_exact(2 * stride).enumerate() {
            let ys = &mut self.y[row * 2 * self.width..][..2 * self.width];
            for (y, p) in ys.iter_mut().zip(pair.chunks_exact(4)) {
                *y = (weigh(&luma, channels(p)).wrapping_add((16 << 16) + 32768) >> 16) as u8;
            }
            let (above, below) = pair.split_at(stride);
            let us = &mut self.u[row * self.width / 2..][..self.width / 2];
            let vs = &mut self.v[row * self.width / 2..][..self.width / 2];
            let squares = above.chunks_exact(8).zip(below.chunks_exact(8));
            for ((u, v), (a, b)) in us.iter_mut().zip(vs).zip(squares) {
                let (p, q) = (channels(a), channels(&a[4..8]));
                let (r, s) = (channels(b), channels(&b[4..8]));
                let sum = (p.0 + q.0 + r.0 + s.0, p.1 + q.1 + r.1 + s.1, p.2 + q.2 + r.2 + s.2);
                *u = (weigh(&blue, sum).wrapping_add((512 << 16) + 131_072) >> 18) as u8;
                *v = (weigh(&red, sum).wrapping_add((512 << 16) + 131_072) >> 18) as u8;
            }
        }
    }
}

#[inline]
fn channels(p: &[u8]) -> (i32, i32, i32) {
    (i32::from(p[0]), i32::from(p[1]), i32::from(p[2]))
}

/// Weights of 16 bits and channels of 10 at most cannot overflow; saying so with `wrapping_*`
/// spares the checks that would keep the compiler from doing eight pixels at once.
#[inline]
fn weigh(w: &[i32; 3], p: (i32, i32, i32)) -> i32 {
    let (r, g, b) = (w[0].wrapping_mul(p.0), w[1].wrapping_mul(p.1), w[2].wrapping_mul(p.2));
    r.wrapping_add(g).wrapping_add(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planes_of(rgb: [u8; 3], brightness: f32) -> [u8; 3] {
        let mut planes = Planes::new(2, 2);
        planes.fill(&[rgb[0], rgb[1], rgb[2], 255].repeat(4), brightness);
        [planes.y[0], planes.u[0], planes.v[0]]
    }

    #[test]
    fn colours_convert_by_bt709_in_limited_range() {
        assert_eq!(planes_of([0, 0, 0], 1.0), [16, 128, 128]);
        assert_eq!(planes_of([255, 255, 255], 1.0), [235, 128, 128]);
        assert_eq!(planes_of([255, 0, 0], 1.0), [63, 102, 240]);
        assert_eq!(planes_of([0, 0, 255], 1.0), [32, 240, 118]);
        assert_eq!(planes_of([255, 255, 255], 0.0), [16, 128, 128]);
    }
}
