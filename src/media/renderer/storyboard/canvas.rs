//! The few ways in which pixels are set. Skies and land are filled by hand, row by row, because a
//! general path filler takes several times as long for the same picture.
use tiny_skia::{FillRule, Paint, Path, Pixmap, Stroke, Transform};

use super::palette::{Rgb, mix};
use super::random;

pub struct Canvas {
    pub pixmap: Pixmap,
    pub width: usize,
    pub height: usize,
    dither: Vec<i32>,
}

/// Pixels a cell of the coarse grid that skies are painted on.
pub const CELL: usize = 16;
const DITHER: usize = 64;

impl Canvas {
    pub fn new(pixmap: Pixmap) -> Self {
        let (width, height) = (pixmap.width() as usize, pixmap.height() as usize);
        // Half a step of noise hides the bands of a gradient. It stands still, so it costs the
        // encoder one key frame and not every frame.
        let dither = (0..(DITHER * DITHER) as i64).map(|i| (random::unit(77, i) * 65535.0) as i32);
        Self { pixmap, width, height, dither: dither.collect() }
    }

    /// Fills the rows above `bottom` from a grid of colours, one every [`CELL`] pixels.
    pub fn fill_sky(&mut self, grid: &[Rgb], grid_width: usize, bottom: usize) {
        let stride = self.width * 4;
        let mut row_colours = vec![[0i32; 3]; grid_width];
        let rows = self.pixmap.data_mut().chunks_exact_mut(stride).take(bottom);
        for (y, row) in rows.enumerate() {
            let (above, share) = (y / CELL * grid_width, (y % CELL) as f32 / CELL as f32);
            for (i, colour) in row_colours.iter_mut().enumerate() {
                let between = mix(grid[above + i], grid[above + grid_width + i], share);
                *colour = between.map(|c| (c.clamp(0.0, 0.996) * 255.0 * 65536.0) as i32);
            }
            let dither = &self.dither[y % DITHER * DITHER..][..DITHER];
            for (cell, pixels) in row.chunks_mut(CELL * 4).enumerate() {
                let (from, to) = (row_colours[cell], row_colours[cell + 1]);
                let noise = &dither[cell * CELL % DITHER..];
                fill_cell(pixels, from, to, noise);
            }
        }
    }

    /// Fills everything below a skyline, rows down to `bottom`, with a colour for each row.
    /// `tops` holds the skyline's height for each column.
    pub fn fill_land(&mut self, tops: &[f32], colours: &[Rgb], bottom: usize) {
        let half: Vec<f32> = (0..self.width).map(|x| edge_half(tops, x)).collect();
        let solid: Vec<i32> =
            tops.iter().zip(&half).map(|(top, half)| (top + half).ceil().max(0.0) as i32).collect();
        let first = solid.iter().copied().min().unwrap_or(0) as usize;
        let stride = self.width * 4;
        let rows = self.pixmap.data_mut().chunks_exact_mut(stride).enumerate();
        for (y, row) in rows.take(bottom).skip(first) {
            let [r, g, b] = bytes(colours[y]);
            for (pixel, &solid) in row.chunks_exact_mut(4).zip(&solid) {
                if solid <= y as i32 {
                    pixel.copy_from_slice(&[r, g, b, 255]);
                }
            }
        }
        for x in 0..self.width {
            let start = (tops[x] - half[x]).floor().max(0.0) as usize;
            let end = (solid[x] as usize).min(self.height);
            for (y, colour) in colours.iter().enumerate().take(end).skip(start) {
                let cover = (y as f32 + 0.5 - tops[x] + half[x]) / (2.0 * half[x]);
                self.blend(x, y, *colour, cover.clamp(0.0, 1.0));
            }
        }
    }

    pub fn blend(&mut self, x: usize, y: usize, colour: Rgb, alpha: f32) {
        let at = (y * self.width + x) * 4;
        let pixel = &mut self.pixmap.data_mut()[at..at + 3];
        for (old, new) in pixel.iter_mut().zip(colour) {
            *old = (f32::from(*old) + (new * 255.0 - f32::from(*old)) * alpha) as u8;
        }
    }

    /// Adds a round, soft light.
    pub fn splat(&mut self, x: f32, y: f32, radius: f32, colour: Rgb, strength: f32) {
        let (columns, rows) = (self.span(x, radius, self.width), self.span(y, radius, self.height));
        let light = colour.map(|c| c * 255.0 * strength);
        let shrink = 1.0 / (radius * radius);
        for row in rows {
            let dy = row as f32 + 0.5 - y;
            for column in columns.clone() {
                let dx = column as f32 + 0.5 - x;
                let near = 1.0 - (dx * dx + dy * dy) * shrink;
                if near > 0.0 {
                    let at = (row * self.width + column) * 4;
                    let pixel = &mut self.pixmap.data_mut()[at..at + 3];
                    for (old, light) in pixel.iter_mut().zip(light) {
                        *old = (f32::from(*old) + light * near * near).min(255.0) as u8;
                    }
                }
            }
        }
    }

    /// Blends a rectangle with sides on whole pixels.
    pub fn rectangle(&mut self, [x, y, w, h]: [f32; 4], colour: Rgb, alpha: f32) {
        let edge = |v: f32, limit: usize| (v.round().max(0.0) as usize).min(limit);
        for row in edge(y, self.height)..edge(y + h, self.height) {
            for column in edge(x, self.width)..edge(x + w, self.width) {
                self.blend(column, row, colour, alpha);
            }
        }
    }

    pub fn fill(&mut self, path: &Path, colour: Rgb, alpha: f32, transform: Transform) {
        let paint = paint(colour, alpha);
        self.pixmap.fill_path(path, &paint, FillRule::Winding, transform, None);
    }

    pub fn stroke(&mut self, path: &Path, colour: Rgb, alpha: f32, width: f32) {
        let stroke = Stroke { width, line_cap: tiny_skia::LineCap::Round, ..Stroke::default() };
        self.pixmap.stroke_path(path, &paint(colour, alpha), &stroke, Transform::identity(), None);
    }

    /// Darkens the picture under a coarse mask, `strength` 0.0 to 1.0.
    pub fn shade(&mut self, mask: &CoarseMask, strength: f32) {
        let strength = (strength.clamp(0.0, 1.0) * 256.0) as u32;
        let size = CoarseMask::CELL;
        for row in 0..(mask.height - 1) * size {
            let y = mask.top + row as i32;
            if y < 0 || y >= self.height as i32 {
                continue;
            }
            let (above, below) = mask.rows(row / size);
            let down = (row % size) as u32;
            let line = &mut self.pixmap.data_mut()[y as usize * self.width * 4..][..self.width * 4];
            for cell in 0..mask.width - 1 {
                let mixed = |i: usize| {
                    u32::from(above[i]) * (size as u32 - down) + u32::from(below[i]) * down
                };
                let (from, to) = (mixed(cell), mixed(cell + 1));
                if from + to == 0 {
                    continue;
                }
                for i in 0..size {
                    let x = mask.left + (cell * size + i) as i32;
                    if x < 0 || x >= self.width as i32 {
                        continue;
                    }
                    let dark = (from * (size - i) as u32 + to * i as u32) / (size * size) as u32;
                    let keep = 256 - dark * strength / 256;
                    for channel in &mut line[x as usize * 4..][..3] {
                        *channel = (u32::from(*channel) * keep / 256) as u8;
                    }
                }
            }
        }
    }

    fn span(&self, centre: f32, radius: f32, limit: usize) -> std::ops::Range<usize> {
        let from = (centre - radius).floor().max(0.0) as usize;
        from.min(limit)..((centre + radius).ceil().max(0.0) as usize).min(limit)
    }
}

/// A blurred mask at an eighth of the frame's resolution; the soft shadow of text.
pub struct CoarseMask {
    left: i32,
    top: i32,
    width: usize,
    height: usize,
    data: Vec<u8>,
}

impl CoarseMask {
    const CELL: usize = 8;

    /// The blurred shape of paths that lie within `bounds` (left, top, right, bottom).
    pub fn of<'p>(
        paths: impl Iterator<Item = &'p Path>,
        bounds: [f32; 4],
        blur: f32,
    ) -> Option<Self> {
        let size = Self::CELL as f32;
        let reach = (blur / size).ceil().max(1.0) as usize;
        let pad = (reach * 3 + 1) as f32 * size;
        let (left, top) = ((bounds[0] - pad).floor(), (bounds[1] - pad).floor());
        let cells = |length: f32| ((length + 2.0 * pad) / size).ceil() as u32 + 2;
        let (width, height) = (cells(bounds[2] - bounds[0]), cells(bounds[3] - bounds[1]));
        let mut mask = tiny_skia::Mask::new(width, height)?;
        let shrink =
            Transform::from_row(1.0 / size, 0.0, 0.0, 1.0 / size, -left / size, -top / size);
        for path in paths {
            mask.fill_path(path, FillRule::Winding, true, shrink);
        }
        let (width, height) = (width as usize, height as usize);
        let mut data = mask.take();
        for _ in 0..3 {
            data = box_blur(&data, width, height, reach);
        }
        // Thin letters blur to a faint grey; bring them back to a shadow one can see.
        data.iter_mut().for_each(|v| *v = (f32::from(*v) * 1.9).min(255.0) as u8);
        Some(Self { left: left as i32, top: top as i32, width, height, data })
    }

    fn rows(&self, row: usize) -> (&[u8], &[u8]) {
        self.data[row * self.width..][..2 * self.width].split_at(self.width)
    }
}

fn box_blur(data: &[u8], width: usize, height: usize, reach: usize) -> Vec<u8> {
    let pass = |data: &[u8], line: usize, step: usize, lines: usize, between: usize| {
        let mut out = vec![0; data.len()];
        for start in (0..lines).map(|l| l * between) {
            for i in 0..line {
                let window = i.saturating_sub(reach)..(i + reach + 1).min(line);
                let sum: usize = window.map(|j| data[start + j * step] as usize).sum();
                out[start + i * step] = (sum / (2 * reach + 1)) as u8;
            }
        }
        out
    };
    let across = pass(data, width, 1, height, width);
    pass(&across, height, width, width, 1)
}

/// Blends along one cell of one row. The values have 24 bits, so the `wrapping_*` only spare the
/// checks that would keep the compiler from doing several pixels at once.
#[inline]
fn fill_cell(pixels: &mut [u8], from: [i32; 3], to: [i32; 3], noise: &[i32]) {
    let step = |c: usize| (to[c] - from[c]) / CELL as i32;
    let (r, g, b) = (step(0), step(1), step(2));
    for (i, (pixel, noise)) in pixels.chunks_exact_mut(4).zip(noise).enumerate() {
        let at = |from: i32, step: i32| {
            (from.wrapping_add(step.wrapping_mul(i as i32)).wrapping_add(*noise) >> 16) as u8
        };
        pixel.copy_from_slice(&[at(from[0], r), at(from[1], g), at(from[2], b), 255]);
    }
}

fn paint(colour: Rgb, alpha: f32) -> Paint<'static> {
    let mut paint = Paint { anti_alias: true, ..Paint::default() };
    let [r, g, b] = bytes(colour);
    paint.set_color_rgba8(r, g, b, (alpha.clamp(0.0, 1.0) * 255.0) as u8);
    paint
}

fn bytes(colour: Rgb) -> [u8; 3] {
    colour.map(|c| (c.clamp(0.0, 1.0) * 255.0 + 0.5) as u8)
}

/// Half the height over which a skyline's edge is softened in a column: steep slopes need more
/// than one pixel, and the wall of a tower none.
fn edge_half(tops: &[f32], x: usize) -> f32 {
    let (left, right) = (tops[x.saturating_sub(1)], tops[(x + 1).min(tops.len() - 1)]);
    let rise = (right - left).abs() / 4.0;
    if rise > 6.0 { 0.5 } else { rise.max(0.5) }
}
