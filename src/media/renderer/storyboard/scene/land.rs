//! The layers of land: how high each stands, and what lies on it.

use super::{Brush, Moment, Scene};
use crate::media::renderer::storyboard::palette::{Palette, Rgb, mix};
use crate::media::renderer::storyboard::random::{fbm, hash, noise, smooth, unit};
use crate::media::renderer::storyboard::script::Motif;

pub(super) const LAYERS: usize = 4;

/// One layer of land.
pub(super) struct Land {
    pub(super) tops: Vec<f32>,
    base: f32,
    colour: Rgb,
}

impl Brush<'_> {
    pub(super) fn land(&self, moment: &Moment, layer: usize) -> Land {
        let Scene { height, measure, horizon, script, .. } = self.scene;
        let room = *height as f32 - horizon;
        let sunk = (1.0 - moment.risen) * (room + measure * 0.3);
        let base = horizon + room * [0.0, 0.13, 0.32, 0.60][layer];
        let pan = moment.travelled * [0.12, 0.3, 0.65, 1.2][layer] + layer as f32 * 17.0;
        let seed = hash(script.seed, layer as i64 + 20);
        let Palette { far, near, .. } = moment.palette;
        let spot = Spot { seed, layer, at_s: moment.at_s, side: self.scene.side };
        let tops = (0..self.canvas.width).map(|x| {
            let along = x as f32 / measure;
            let rise = match moment.motif {
                Motif::Space => space(
                    &spot,
                    (x as f32 / self.canvas.width as f32 - 0.5) * self.canvas.width as f32
                        / measure,
                ),
                motif => rise(motif, &spot, along + pan),
            };
            base - rise * measure + sunk
        });
        Land {
            tops: tops.collect(),
            base: base + sunk,
            colour: mix(far, near, [0.0, 0.36, 0.72, 1.0][layer]),
        }
    }

    pub(super) fn layer(&mut self, moment: &Moment, lands: &[Land], layer: usize) {
        let land = &lands[layer];
        let height = self.canvas.height;
        let bottom = covered_from(&lands[layer + 1..], height);
        let Palette { horizon, glow, .. } = moment.palette;
        let summit = land.tops.iter().copied().fold(f32::MAX, f32::min);
        let mist = [0.62, 0.42, 0.22, 0.0][layer];
        let foot = lands.get(layer + 1).map_or(height as f32, |next| next.base).max(summit + 1.0);
        let haze = mix(horizon, glow, 0.15);
        let colours: Vec<Rgb> = (0..height)
            .map(|y| {
                let down = smooth((y as f32 - summit) / (foot - summit));
                let shade = 1.0 - 0.45 * smooth(y as f32 / height as f32 * 2.4 - 1.3);
                mix(land.colour, haze, mist * down).map(|c| c * shade)
            })
            .collect();
        self.canvas.fill_land(&land.tops, &colours, bottom);
        self.rim(moment, land, layer);
        match moment.motif {
            Motif::City => self.windows(moment, land, layer),
            Motif::Waves if layer < 2 => self.glitter(moment, lands, layer),
            _ => {}
        }
    }

    /// Light on the slopes that face the sun.
    fn rim(&mut self, moment: &Moment, land: &Land, layer: usize) {
        let sun = self.sun_at(moment);
        let thick = (self.scene.measure / 480.0).max(1.0) * (1.0 + layer as f32 * 0.5);
        let waves = moment.motif == Motif::Waves;
        let power = if moment.motif == Motif::Space { 0.9 } else { [0.5, 0.42, 0.3, 0.16][layer] };
        let tint = moment.palette.glow;
        for x in 2..self.canvas.width - 2 {
            let slope = (land.tops[x + 2] - land.tops[x - 2]) / 4.0;
            // Gradual, or the light would break off below the sun.
            let aside = ((x as f32 - sun.0) / (self.scene.measure * 0.15)).clamp(-1.0, 1.0);
            let facing = slope * aside;
            let near = (-((x as f32 - sun.0) / (self.scene.measure * 0.55)).powi(2)).exp();
            let lit = if waves { 0.5 } else { smooth(0.35 + facing * 0.8) };
            let strength = power * lit * (0.2 + 0.8 * near);
            let top = land.tops[x].max(0.0);
            for row in 0..(thick * 3.0) as usize {
                let y = top as usize + row;
                if y < self.canvas.height && strength > 0.01 {
                    let fade = 1.0 - (row as f32 + 0.5) / (thick * 3.0);
                    self.canvas.blend(x, y, tint, strength * fade * fade);
                }
            }
        }
    }

    fn windows(&mut self, moment: &Moment, land: &Land, layer: usize) {
        let measure = self.scene.measure;
        let seed = hash(self.scene.script.seed, layer as i64 + 20);
        let pan = moment.travelled * [0.12, 0.3, 0.65, 1.2][layer] + layer as f32 * 17.0;
        let wide = TOWER[layer];
        let Palette { glow, accent, night, horizon, .. } = moment.palette;
        let lights = [mix(glow, [1.0, 0.8, 0.45], 0.5), accent, mix(glow, horizon, 0.4)];
        let power = (0.35 + 0.65 * night) * [0.35, 0.6, 0.7, 0.35][layer];
        let pitch = wide * measure / 6.0;
        if pitch < 2.5 {
            return;
        }
        let cells = (pan / wide).floor() as i64
            ..=((pan + self.canvas.width as f32 / measure) / wide) as i64;
        for cell in cells {
            let left = (cell as f32 * wide - pan) * measure;
            let middle =
                ((left + wide * measure / 2.0).max(0.0) as usize).min(self.canvas.width - 1);
            let top = land.tops[middle];
            let rows = (((land.base - top) / pitch + 6.0).max(0.0) as i64).min(40);
            for window in 0..rows * 5 {
                let key = cell.wrapping_mul(1009).wrapping_add(window);
                let chance = unit(seed ^ 0xF1, key);
                let blink = smooth((moment.at_s * 0.35 + unit(seed, key) * 9.0).sin() * 6.0 + 5.2);
                if chance < 0.36 {
                    let (row, column) = ((window / 5) as f32, (window % 5) as f32);
                    let at = [
                        left + (column + 0.72) * pitch,
                        top + (row + 0.9) * pitch,
                        pitch * 0.52,
                        pitch * 0.6,
                    ];
                    let colour = lights[(hash(seed, key) % 7).saturating_sub(4) as usize];
                    self.canvas.rectangle(at, colour, power * blink);
                }
            }
        }
    }

    /// The sun's broken path on the water.
    fn glitter(&mut self, moment: &Moment, lands: &[Land], layer: usize) {
        let sun = self.sun_at(moment);
        let measure = self.scene.measure;
        let top = lands[layer].base;
        let room = lands[layer + 1].base - top + measure * 0.03;
        let seed = self.scene.script.seed ^ (0x611 + layer as u64);
        for i in 0..90 {
            let down = unit(seed, i * 3);
            let spread = measure * (0.03 + 0.10 * (down + layer as f32));
            let phase = moment.at_s * (0.5 + unit(seed, i * 3 + 1)) + unit(seed, i * 3 + 2) * 20.0;
            let round = phase.floor() as i64;
            let x = sun.0 + (unit(seed ^ 9, i * 977 + round) * 2.0 - 1.0) * spread;
            let life = (phase.fract() * std::f32::consts::PI).sin();
            let wide = measure * (0.006 + 0.02 * (down + layer as f32 * 0.7)) * (0.4 + life);
            let thick = (measure / 520.0 * (1.0 + down + layer as f32)).max(1.0);
            let colour = mix(moment.palette.glow, [1.0; 3], 0.3);
            self.canvas.rectangle(
                [x - wide / 2.0, top + down * room, wide, thick],
                colour,
                0.65 * life * moment.risen,
            );
        }
    }
}

/// The row from which the layers leave nothing of what is behind them.
pub(super) fn covered_from(lands: &[Land], height: usize) -> usize {
    let lowest = |land: &Land| land.tops.iter().copied().fold(f32::MIN, f32::max);
    let row = lands.iter().map(lowest).fold(f32::MAX, f32::min);
    ((row.max(0.0) as usize).saturating_add(8)).min(height)
}

/// Width of a tower in each layer of a city, in frame measures.
const TOWER: [f32; LAYERS] = [0.034, 0.05, 0.078, 0.13];

struct Spot {
    seed: u64,
    layer: usize,
    at_s: f32,
    side: f32,
}

/// How high the land of a layer stands above its base at `u`, all in frame measures.
fn rise(motif: Motif, spot: &Spot, u: f32) -> f32 {
    match motif {
        Motif::Ridges => ridges(spot, u),
        Motif::Waves => waves(spot, u),
        Motif::City => city(spot, u),
        Motif::Forest => forest(spot, u),
        Motif::Dunes => dunes(spot, u),
        Motif::Space => 0.0,
    }
}

fn ridges(spot: &Spot, u: f32) -> f32 {
    let frequency = [2.6, 2.3, 2.0, 1.6][spot.layer];
    let octaves = [6, 6, 5, 4][spot.layer];
    // Folding the noise makes peaks out of its middle.
    let folded = |x: f32, seed: u64| 1.0 - (2.0 * noise(seed, x) - 1.0).abs();
    let (mut sum, mut weight, mut x) = (0.0, 0.5, u * frequency);
    for octave in 0..octaves {
        sum += folded(x, spot.seed ^ octave) * weight;
        weight *= 0.46;
        x *= 2.1;
    }
    [0.30, 0.20, 0.15, 0.10][spot.layer] * (sum - 0.22)
}

fn waves(spot: &Spot, u: f32) -> f32 {
    let Spot { layer, at_s, .. } = *spot;
    let size = [0.0012, 0.008, 0.016, 0.028][layer];
    let f = [30.0, 14.0, 8.0, 5.0][layer];
    let t = at_s * [0.8, 0.9, 1.0, 1.1][layer];
    let swell = (u * f + t).sin() * 0.5 + (u * f * 1.83 - t * 1.3).sin() * 0.3;
    let chop =
        (u * f * 4.1 + t * 2.1).sin() * 0.12 + (noise(spot.seed, u * f * 0.7 + t * 0.3) - 0.5);
    // Sharper crests than troughs, as water has.
    let height = swell + chop;
    size * (height + 0.35 * height * height.abs())
}

fn city(spot: &Spot, u: f32) -> f32 {
    let wide = TOWER[spot.layer];
    let cell = (u / wide).floor();
    let along = u / wide - cell;
    let tower = |k: i64| unit(spot.seed, cell as i64 * 3 + k);
    let downtown = 0.5 + 0.9 * noise(spot.seed ^ 2, u * 1.4);
    let height = [0.24, 0.21, 0.15, 0.055][spot.layer] * downtown * (0.25 + tower(0) * tower(0));
    let setback = if tower(1) > 0.55 && !(0.2..0.8).contains(&along) { 0.82 } else { 1.0 };
    let mast = if tower(2) > 0.72 && (along - 0.5).abs() < 0.02 { 0.035 } else { 0.0 };
    let alley = if along > 0.95 { 0.3 } else { 1.0 };
    height * setback * alley + mast
}

fn forest(spot: &Spot, u: f32) -> f32 {
    let grow = [0.55, 0.8, 1.2, 1.9][spot.layer];
    let hill = [0.16, 0.12, 0.08, 0.03][spot.layer] * fbm(spot.seed, u * 1.7, 3);
    let trees = [0.0f32, 0.37].map(|shift| {
        let wide = 0.019 * grow;
        let place = u / wide + shift;
        let cell = place.floor() as i64;
        let aside = ((place - place.floor()) * 2.0 - 1.0).abs();
        let tall = 0.040 * grow * (0.45 + unit(spot.seed ^ shift.to_bits() as u64, cell));
        let up = 1.0 - aside;
        // Boughs: the outline steps back a little at each.
        tall * (up - 0.10 * (up * 5.0).fract()).max(0.0)
    });
    hill + trees[0].max(trees[1])
}

fn dunes(spot: &Spot, u: f32) -> f32 {
    let f = [2.4, 1.9, 1.5, 1.1][spot.layer];
    let x = u * f + 0.25 * noise(spot.seed ^ 4, u * f * 0.8);
    let cell = x.floor();
    let along = x - cell;
    let crest = 0.62;
    // A long climb on the windward side, a short fall to the lee.
    let shape = if along < crest {
        smooth(along / crest)
    } else {
        1.0 - smooth((along - crest) / (1.0 - crest))
    };
    [0.10, 0.10, 0.085, 0.06][spot.layer] * shape * (0.4 + 0.6 * unit(spot.seed, cell as i64))
        + 0.02 * noise(spot.seed, u * 2.0)
}

/// A world's edge: only the third layer is seen.
fn space(spot: &Spot, from_middle: f32) -> f32 {
    if spot.layer != 2 {
        return -2.0;
    }
    let radius = 1.9f32;
    let x = from_middle + spot.side * 0.2;
    let drop = radius - (radius * radius - x * x).max(0.0).sqrt();
    0.11 - drop
}
