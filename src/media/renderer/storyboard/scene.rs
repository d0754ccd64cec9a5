//! Draws the film at any moment: sky, sun or moon, four layers of land that slide past each other,
//! what drifts through the air, and the words. A frame depends on its time alone, so frames can be
//! drawn in any order.
use tiny_skia::{PathBuilder, Pixmap, Transform};

use super::canvas::{CELL, Canvas, CoarseMask};
use super::palette::{self, Palette, Rgb, mix};
use super::random::{fbm, fbm2, hash, noise, smooth, unit};
use super::script::{Beat, Motif, Particles, Script, Subject};
use super::silhouettes::{self, Pose};
use super::type_setting::{SetWord, Setting, TypeSetter};
use crate::media::renderer::Error;

const LAYERS: usize = 4;

pub struct Scene<'s> {
    script: &'s Script,
    width: u32,
    height: u32,
    settings: Vec<(Setting, Option<CoarseMask>)>,
    /// Mean of the sides, in pixels: the measure of everything, so that all aspects look alike.
    measure: f32,
    horizon: f32,
    /// -1.0 or 1.0: the side of the frame on which the sun stands.
    side: f32,
}

impl<'s> Scene<'s> {
    pub fn new(script: &'s Script, width: u32, height: u32) -> Result<Self, Error> {
        let (w, h) = (width as f32, height as f32);
        let measure = (w * h).sqrt();
        let tall = h > w;
        let area = [w / 2.0, h * if tall { 0.74 } else { 0.765 }, w * 0.86, h * 0.36];
        let mut setter = TypeSetter::new();
        let settings = script.beats.iter().map(|beat| {
            let setting = setter.set(&beat.words, area, measure * if tall { 0.1 } else { 0.098 });
            let outlines = setting.words.iter().map(|word| &word.outline);
            let blur = setting.font_size * 0.16;
            let shadow = CoarseMask::of(outlines, setting.bounds, blur)
                .filter(|_| !setting.words.is_empty());
            (setting, shadow)
        });
        let side = if hash(script.seed, 9) & 1 == 0 { 1.0 } else { -1.0 };
        let horizon = h * if tall { 0.50 } else { 0.53 };
        Ok(Self { settings: settings.collect(), script, width, height, measure, horizon, side })
    }

    /// The moment to show while the film is not playing: the first words are all there.
    pub fn poster_s(&self) -> f32 {
        self.script
            .beats
            .first()
            .map_or(0.0, |beat| beat.start_s + (beat.end_s - beat.start_s) * 0.78)
    }

    /// What draws frames of this scene, one at a time.
    pub fn brush(&self) -> Result<Brush<'_>, Error> {
        let pixmap = Pixmap::new(self.width, self.height)
            .ok_or_else(|| Error::Invalid("the frame is too large".to_owned()))?;
        Ok(Brush { scene: self, canvas: Canvas::new(pixmap) })
    }

    fn moment(&self, at_s: f32) -> Moment {
        let beats = &self.script.beats;
        let index = beats.iter().rposition(|beat| beat.start_s <= at_s).unwrap_or(0);
        let (beat, before) = (&beats[index], &beats[index.saturating_sub(1)]);
        let turn = (at_s - beat.start_s) / (beat.end_s - beat.start_s).min(3.2) / 0.45;
        let turn = if index == 0 { 1.0 } else { turn.clamp(0.0, 1.0) };
        let scenery = if turn < 0.5 { before } else { beat };
        let dip = |changes: bool| if changes { smooth((1.0 - 2.0 * turn).abs()) } else { 1.0 };
        let turns = beats.iter().skip(1).map(|beat| smooth((at_s - beat.start_s) / 1.6));
        Moment {
            at_s,
            index,
            palette: palette::blend(&before.palette, &beat.palette, smooth(turn)),
            motif: scenery.motif,
            risen: dip(beat.motif != before.motif),
            particles: scenery.particles,
            thick: dip(beat.particles != before.particles),
            subject: scenery.subject,
            shown: dip(beat.subject != before.subject || beat.motif != before.motif),
            travelled: 0.03 * at_s + 0.2 * turns.sum::<f32>(),
            progress: at_s / self.script.duration_s,
        }
    }
}

/// All that a frame shows, at one time.
struct Moment {
    at_s: f32,
    index: usize,
    palette: Palette,
    motif: Motif,
    /// 0.0: the land is out of sight below the frame; 1.0: in its place.
    risen: f32,
    particles: Particles,
    /// 0.0 to 1.0: how much of the particles is seen.
    thick: f32,
    subject: Option<Subject>,
    shown: f32,
    /// How far the camera has gone to the right, in frame measures.
    travelled: f32,
    progress: f32,
}

pub struct Brush<'s> {
    scene: &'s Scene<'s>,
    canvas: Canvas,
}

/// One layer of land.
struct Land {
    tops: Vec<f32>,
    base: f32,
    colour: Rgb,
}

impl Brush<'_> {
    pub fn draw(&mut self, at_s: f32) -> &Pixmap {
        let moment = self.scene.moment(at_s);
        let lands: Vec<Land> = (0..LAYERS).map(|layer| self.land(&moment, layer)).collect();
        self.sky(&moment, &lands);
        self.stars(&moment);
        self.sun(&moment);
        for layer in 0..LAYERS {
            self.layer(&moment, &lands, layer);
            // Behind the second layer, which then hides its foot.
            if layer == 0 {
                self.subject(&moment, &lands);
            }
        }
        self.particles(&moment);
        self.words(&moment);
        &self.canvas.pixmap
    }

    fn sun_at(&self, moment: &Moment) -> (f32, f32) {
        let Scene { width, measure, horizon, side, .. } = self.scene;
        let high =
            if moment.palette.night > 0.6 && moment.palette.bars < 0.5 { 0.25 } else { 0.15 };
        let x = *width as f32 * (0.5 + side * (0.22 - 0.05 * moment.progress));
        (x, horizon - measure * (high + 0.04 * moment.progress))
    }

    fn sky(&mut self, moment: &Moment, lands: &[Land]) {
        let (columns, rows) =
            (self.canvas.width.div_ceil(CELL) + 1, self.canvas.height.div_ceil(CELL) + 1);
        let bottom = covered_from(lands, self.canvas.height);
        let mut grid = vec![[0.0; 3]; columns * rows];
        for row in 0..(bottom / CELL + 2).min(rows) {
            for column in 0..columns {
                let (x, y) = ((column * CELL) as f32, (row * CELL) as f32);
                grid[row * columns + column] = self.sky_colour(moment, x, y);
            }
        }
        self.canvas.fill_sky(&grid, columns, bottom);
    }

    fn sky_colour(&self, moment: &Moment, x: f32, y: f32) -> Rgb {
        let Palette { top, middle, horizon, glow, clouds, aurora, night, .. } = moment.palette;
        let seed = self.scene.script.seed;
        let measure = self.scene.measure;
        let down = y / self.scene.horizon;
        let mut colour = if down < 0.55 {
            mix(top, middle, smooth(down / 0.55))
        } else {
            mix(middle, horizon, smooth((down - 0.55) / 0.5))
        };
        let sun = self.sun_at(moment);
        let away = ((x - sun.0).powi(2) + ((y - sun.1) * 1.15).powi(2)) / (measure * measure);
        let (u, v) = (x / measure + moment.travelled * 0.1, y / measure);
        if clouds > 0.0 {
            let drift = moment.at_s * 0.008;
            let cover = fbm2(seed ^ 5, u * 2.2 + drift * 2.0, v * 7.0 - drift, 4);
            let cover = smooth((cover - 0.46) / 0.3)
                * clouds
                * smooth(down * 2.2)
                * smooth((1.12 - down) * 4.0);
            let lit = mix(mix(middle, horizon, 0.55), glow, 0.65 * (-away * 7.0).exp());
            colour = mix(colour, lit, cover * 0.75);
        }
        if aurora > 0.0 {
            colour = add(colour, aurora_light(seed, moment, u, v), aurora);
        }
        let strength = 1.0 - 0.45 * night;
        let light = 0.50 * (-away * 28.0).exp() + 0.34 * (-away * 5.5).exp();
        colour = mix(colour, glow, light * strength);
        let (cx, cy) = (x / self.scene.width as f32 - 0.5, y / self.scene.height as f32 - 0.5);
        colour.map(|c| c * (1.0 - 0.42 * (cx * cx + cy * cy)))
    }

    fn stars(&mut self, moment: &Moment) {
        let seed = self.scene.script.seed ^ 0x57A2;
        let many = if moment.particles == Particles::Stars { moment.thick } else { 0.0 };
        let night = smooth(moment.palette.night * 1.6 - 0.5).max(many * 0.8);
        if night <= 0.01 {
            return;
        }
        let (w, h) = (self.canvas.width as f32, self.scene.horizon);
        let scale = self.scene.measure / 960.0;
        let pan = moment.travelled * 0.04 * self.scene.measure;
        for i in 0..(130.0 + 200.0 * many) as i64 {
            let x = (unit(seed, i * 4) * w - pan).rem_euclid(w);
            let y = unit(seed, i * 4 + 1) * h;
            let bright = unit(seed, i * 4 + 2).powi(3);
            let pulse =
                0.7 + 0.3 * (moment.at_s * (1.0 + 2.0 * unit(seed, i * 4 + 3)) + i as f32).sin();
            let fade = smooth((1.0 - y / h) * 2.5);
            let radius = scale * (1.1 + 2.0 * bright);
            self.canvas.splat(
                x,
                y,
                radius,
                [0.92, 0.95, 1.0],
                (0.35 + 0.65 * bright) * pulse * fade * night,
            );
        }
        self.shooting_star(moment, night);
    }

    fn shooting_star(&mut self, moment: &Moment, night: f32) {
        let every = 4.2;
        let turn = (moment.at_s / every).floor();
        let along = (moment.at_s - turn * every) / 0.8;
        let seed = hash(self.scene.script.seed, turn as i64 + 40);
        if along >= 1.0 {
            return;
        }
        let from = (
            self.canvas.width as f32 * (0.15 + 0.6 * unit(seed, 0)),
            self.scene.horizon * (0.08 + 0.3 * unit(seed, 1)),
        );
        let length = self.scene.measure * 0.22;
        for i in 0..26 {
            let behind = i as f32 / 26.0;
            let at = (along - behind * 0.35).max(0.0) * length;
            let strength = (1.0 - behind).powi(2) * smooth((1.0 - along) * 4.0) * 0.7 * night;
            self.canvas.splat(
                from.0 + at,
                from.1 + at * 0.42,
                self.scene.measure / 460.0,
                [1.0; 3],
                strength,
            );
        }
    }

    fn sun(&mut self, moment: &Moment) {
        let (x, y) = self.sun_at(moment);
        let Palette { glow, night, bars, middle, .. } = moment.palette;
        let planet = moment.motif == Motif::Space;
        let radius = self.scene.measure * if planet { 0.11 } else { 0.06 + 0.06 * bars };
        let Some(disc) = PathBuilder::from_circle(x, y, radius) else { return };
        if planet {
            return self.planet(moment, (x, y), radius * moment.risen);
        }
        self.canvas.splat(x, y, radius * 2.4, glow, 0.30);
        let face = mix(glow, [1.0, 1.0, 1.0], 0.35);
        self.canvas.fill(&disc, face, 0.97, Transform::identity());
        if night > 0.7 && bars < 0.5 {
            for (dx, dy, size) in
                [(-0.3, -0.25, 0.26), (0.28, 0.1, 0.34), (-0.15, 0.42, 0.2), (0.15, -0.5, 0.15)]
            {
                let sea = PathBuilder::from_circle(x + dx * radius, y + dy * radius, size * radius);
                if let Some(sea) = sea {
                    self.canvas.fill(&sea, mix(face, middle, 0.5), 0.35, Transform::identity());
                }
            }
        }
        if bars > 0.01 {
            self.bars(moment, (x, y), radius, glow);
        }
    }

    /// The sun of a synthwave sleeve: yellow to pink, cut by the sky.
    fn bars(&mut self, moment: &Moment, (x, y): (f32, f32), radius: f32, yellow: Rgb) {
        let Palette { horizon, middle, bars, .. } = moment.palette;
        for row in (y - radius) as i32..(y + radius) as i32 {
            if row < 0 || row >= self.canvas.height as i32 {
                continue;
            }
            let dy = (row as f32 + 0.5 - y) / radius;
            let half = radius * (1.0 - dy * dy).max(0.0).sqrt();
            let band = ((dy + 1.0) * 6.5 - moment.at_s * 0.25).rem_euclid(1.0);
            let colour = mix(yellow, horizon, (dy + 0.6) * 0.8);
            let cut = dy > -0.1 && band < 0.12 + 0.3 * dy;
            let colour = if cut { mix(middle, horizon, 0.35) } else { colour };
            self.canvas.rectangle([x - half, row as f32, 2.0 * half, 1.0], colour, bars);
        }
    }

    fn planet(&mut self, moment: &Moment, (x, y): (f32, f32), radius: f32) {
        let Palette { far, glow, accent, top, .. } = moment.palette;
        let y = y + self.scene.measure * 0.01;
        self.canvas.splat(x, y, radius * 2.2 + 1.0, accent, 0.14);
        let light = (-0.5f32 * self.scene.side, -0.6f32);
        for row in ((y - radius).max(0.0) as usize)
            ..((y + radius).max(0.0) as usize).min(self.canvas.height)
        {
            let dy = (row as f32 + 0.5 - y) / radius;
            let half = (1.0 - dy * dy).max(0.0).sqrt();
            let (from, to) = ((x - half * radius).max(0.0), (x + half * radius).max(0.0));
            for column in from as usize..(to as usize).min(self.canvas.width) {
                let dx = (column as f32 + 0.5 - x) / radius;
                let depth = (1.0 - dx * dx - dy * dy).max(0.0).sqrt();
                let lit = smooth((dx * light.0 + dy * light.1 + depth * 0.6) * 0.9 + 0.25);
                let band = fbm(
                    self.scene.script.seed ^ 3,
                    dy * 5.0 + 0.25 * noise(8, dx * 3.0 + moment.at_s * 0.1),
                    3,
                );
                let surface = mix(mix(far, accent, 0.55), glow, smooth(band * 1.6 - 0.4) * 0.7);
                let edge = smooth(depth * radius / 4.0);
                self.canvas.blend(column, row, mix(mix(top, surface, 0.12), surface, lit), edge);
            }
        }
        self.ring((x, y), radius, mix(glow, accent, 0.4));
    }

    fn ring(&mut self, (x, y): (f32, f32), radius: f32, colour: Rgb) {
        for (size, alpha) in [(1.55, 0.75), (1.72, 0.5), (1.84, 0.3)] {
            let mut arc = PathBuilder::new();
            for step in 0..=80 {
                // The far side of the ring hides behind the planet.
                let angle = -0.62 + step as f32 / 80.0 * (std::f32::consts::PI + 1.24);
                let (dx, dy) = (angle.cos() * size, angle.sin() * size * 0.26);
                let (dx, dy) = (dx * 0.94 - dy * 0.34, dx * 0.34 + dy * 0.94);
                let (px, py) = (x + dx * radius, y + dy * radius);
                if step == 0 { arc.move_to(px, py) } else { arc.line_to(px, py) }
            }
            if let Some(arc) = arc.finish() {
                self.canvas.stroke(&arc, colour, alpha, radius * 0.06);
            }
        }
    }

    fn land(&self, moment: &Moment, layer: usize) -> Land {
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

    fn layer(&mut self, moment: &Moment, lands: &[Land], layer: usize) {
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

    fn subject(&mut self, moment: &Moment, lands: &[Land]) {
        let Some(subject) = moment.subject.filter(|_| moment.shown > 0.02) else { return };
        if !belongs(subject, moment) {
            return;
        }
        let Scene { measure, width, side, horizon, .. } = self.scene;
        let drift = moment.travelled - 0.1;
        let x = *width as f32 * (0.5 - side * 0.2) + side * drift * measure * 0.10;
        let column = (x.max(0.0) as usize).min(self.canvas.width - 1);
        let reach = (measure * 0.04) as usize;
        let around = column.saturating_sub(reach)..(column + reach).min(self.canvas.width);
        let ground = lands[1].tops[around].iter().copied().fold(f32::MIN, f32::max);
        let bob = (moment.at_s * 1.3).sin();
        let hidden = (1.0 - moment.shown) * measure * 0.35;
        let (y, size, lean) = match subject {
            Subject::Boat => {
                (ground + measure * 0.004 * bob, 0.19, 0.05 * (moment.at_s * 1.1).sin())
            }
            Subject::Lighthouse => (ground + measure * 0.004, 0.26, 0.0),
            Subject::Cabin => (ground - measure * 0.006, 0.08, 0.0),
            Subject::Balloon => {
                (horizon - measure * (0.13 + 0.012 * bob + 0.06 * moment.progress), 0.21, 0.0)
            }
            Subject::Rocket => (
                horizon - measure * (0.06 + 0.16 * moment.progress + 0.004 * bob),
                0.17,
                0.42 * -side,
            ),
            Subject::Birds => (horizon - measure * (0.25 + 0.01 * bob), 0.17, 0.0),
        };
        let x =
            if subject == Subject::Birds { x + (moment.progress - 0.3) * measure * 0.4 } else { x };
        let Palette { near, glow, far, .. } = moment.palette;
        let pose = Pose {
            x,
            y: y + hidden,
            size: size * measure,
            lean,
            at_s: moment.at_s,
            dark: mix(near, far, 0.12),
            light: mix(glow, [1.0, 0.93, 0.78], 0.4),
        };
        silhouettes::draw(&mut self.canvas, subject, &pose);
    }

    fn particles(&mut self, moment: &Moment) {
        let count = match moment.particles {
            Particles::Motes => 34,
            Particles::Stars => 0,
            Particles::Snow => 230,
            Particles::Rain => 190,
            Particles::Fireflies => 46,
            Particles::Embers => 90,
            Particles::Petals => 60,
        };
        if moment.particles == Particles::Rain {
            return self.rain(moment, count);
        }
        for i in 0..count {
            self.particle(moment, i);
        }
    }

    fn particle(&mut self, moment: &Moment, i: i64) {
        let seed = self.scene.script.seed ^ 0xA1;
        let [a, b, c, d] = [0, 1, 2, 3].map(|k| unit(seed, i * 4 + k));
        let (w, h, m) = (self.canvas.width as f32, self.canvas.height as f32, self.scene.measure);
        let (t, near) = (moment.at_s, c * c);
        let sway = |speed: f32, width: f32| (t * speed + d * 40.0).sin() * width * m;
        let pan = moment.travelled * (0.2 + near) * m;
        let x = |sway: f32| (a * w * 1.2 + sway - pan).rem_euclid(w * 1.2) - w * 0.1;
        let fall = |speed: f32| (b * h * 1.2 + t * speed * m).rem_euclid(h * 1.2) - h * 0.1;
        let Palette { glow, accent, .. } = moment.palette;
        let pulse = 0.5 + 0.5 * (t * (0.8 + d) + a * 30.0).sin();
        let (x, y, radius, colour, strength) = match moment.particles {
            Particles::Snow => (
                x(sway(0.7, 0.02)),
                fall(0.05 + 0.11 * near),
                0.0022 + 0.0065 * near,
                [1.0; 3],
                0.75 - 0.35 * near,
            ),
            Particles::Fireflies => (
                x(sway(0.5, 0.05)),
                h * (0.38 + 0.58 * b) + sway(0.8, 0.025),
                0.005 + 0.004 * near,
                [1.0, 0.93, 0.45],
                pulse * pulse,
            ),
            Particles::Embers => (
                x(sway(1.1, 0.03)),
                h - fall(0.10 + 0.16 * near),
                0.0022 + 0.003 * near,
                [1.0, 0.55, 0.2],
                0.4 + 0.6 * pulse,
            ),
            Particles::Petals => {
                (x(sway(0.6, 0.06)), fall(0.05 + 0.07 * near), 0.0, [1.0, 0.78, 0.86], 0.9)
            }
            _ => (
                x(sway(0.2, 0.03)),
                (b * h - t * 0.008 * m).rem_euclid(h),
                0.006 + 0.022 * near,
                mix(glow, accent, d),
                (0.10 + 0.10 * pulse) * (1.2 - near),
            ),
        };
        let strength = strength * moment.thick;
        if moment.particles == Particles::Petals {
            return self.petal(
                (x, y),
                m * (0.006 + 0.008 * near),
                t * (0.8 + d) + a * 6.0,
                strength,
            );
        }
        self.canvas.splat(x, y, (radius * m).max(1.3), colour, strength);
        if moment.particles == Particles::Fireflies {
            self.canvas.splat(x, y, radius * m * 4.5, colour, strength * 0.25);
        }
    }

    fn petal(&mut self, (x, y): (f32, f32), size: f32, turn: f32, alpha: f32) {
        let mut petal = PathBuilder::new();
        petal.move_to(-size, 0.0);
        petal.quad_to(0.0, -size * 0.9, size, 0.0);
        petal.quad_to(0.0, size * 0.9, -size, 0.0);
        let Some(petal) = petal.finish() else { return };
        let flat = 0.35 + 0.65 * (turn * 1.3).sin().abs();
        let transform =
            Transform::from_scale(1.0, flat).post_rotate(turn * 57.3).post_translate(x, y);
        self.canvas.fill(&petal, [1.0, 0.80, 0.87], alpha, transform);
    }

    fn rain(&mut self, moment: &Moment, count: i64) {
        let seed = self.scene.script.seed ^ 0xA1;
        let (w, h, m) = (self.canvas.width as f32, self.canvas.height as f32, self.scene.measure);
        for (nearness, share) in [(0.4, 0usize), (1.0, 1)] {
            let mut drops = PathBuilder::new();
            for i in (0..count).filter(|i| *i as usize % 2 == share) {
                let y = (unit(seed, i * 2) * h * 1.2 + moment.at_s * m * (0.7 + 0.6 * nearness))
                    .rem_euclid(h * 1.2)
                    - h * 0.1;
                let x = (unit(seed, i * 2 + 1) * w * 1.2 - y * 0.12).rem_euclid(w * 1.2) - w * 0.1;
                let length = m * (0.02 + 0.03 * nearness);
                drops.move_to(x, y);
                drops.line_to(x - length * 0.12, y + length);
            }
            if let Some(drops) = drops.finish() {
                self.canvas.stroke(
                    &drops,
                    [0.85, 0.92, 1.0],
                    0.28 * moment.thick * nearness.max(0.6),
                    m / 700.0 * (0.7 + nearness),
                );
            }
        }
    }

    fn words(&mut self, moment: &Moment) {
        let scene = self.scene;
        let beat = &scene.script.beats[moment.index];
        let (setting, shadow) = &scene.settings[moment.index];
        let leaving_s = ((beat.end_s - beat.start_s) * 0.2).min(0.35);
        let gone = smooth((beat.end_s - moment.at_s) / leaving_s);
        if let Some(shadow) = shadow {
            self.canvas.shade(shadow, 0.62 * smooth((moment.at_s - beat.start_s) / 0.7) * gone);
        }
        for (i, word) in setting.words.iter().enumerate() {
            let come = entrance(beat, moment.at_s, i, setting.words.len());
            self.word(moment, setting.font_size, word, come, gone);
        }
    }

    fn word(&mut self, moment: &Moment, size: f32, word: &SetWord, come: f32, gone: f32) {
        let alpha = smooth(come * 1.4) * gone;
        if alpha < 0.01 {
            return;
        }
        let settle = (1.0 - come.clamp(0.0, 1.0)).powi(3);
        let dy = size * (0.55 * settle - 0.2 * (1.0 - gone));
        let colour = if word.accented { moment.palette.accent } else { [0.985, 0.98, 0.965] };
        self.canvas.fill(&word.outline, colour, alpha, Transform::from_translate(0.0, dy));
        if word.accented {
            let drawn = smooth(come * 0.7 - 0.4);
            let at = [
                word.left,
                word.baseline + size * 0.13 + dy,
                (word.right - word.left) * drawn,
                (size * 0.05).max(2.0),
            ];
            self.canvas.rectangle(at, colour, alpha);
        }
    }
}

/// Whether a subject can be where the film is.
fn belongs(subject: Subject, moment: &Moment) -> bool {
    match subject {
        Subject::Boat | Subject::Lighthouse => moment.motif == Motif::Waves,
        Subject::Cabin => !matches!(moment.motif, Motif::Waves | Motif::Space | Motif::City),
        Subject::Balloon => moment.motif != Motif::Space,
        Subject::Rocket => true,
        // Birds sleep at night.
        Subject::Birds => moment.motif != Motif::Space && moment.palette.night < 0.6,
    }
}

/// How far a word has come in: below 0.0 not yet, from 1.0 on it rests.
fn entrance(beat: &Beat, at_s: f32, place: usize, count: usize) -> f32 {
    let length_s = beat.end_s - beat.start_s;
    let between_s = (length_s * 0.4 / count as f32).min(0.13);
    let first_s = beat.start_s + (length_s * 0.05).min(0.12);
    (at_s - first_s - place as f32 * between_s) / (length_s * 0.3).min(0.55)
}

/// The row from which the layers leave nothing of what is behind them.
fn covered_from(lands: &[Land], height: usize) -> usize {
    let lowest = |land: &Land| land.tops.iter().copied().fold(f32::MIN, f32::max);
    let row = lands.iter().map(lowest).fold(f32::MAX, f32::min);
    ((row.max(0.0) as usize).saturating_add(8)).min(height)
}

fn aurora_light(seed: u64, moment: &Moment, u: f32, v: f32) -> Rgb {
    let mut light = [0.0; 3];
    for (band, colour) in [(0i64, [0.15, 0.95, 0.60]), (1, [0.35, 0.45, 1.0])] {
        let phase = moment.at_s * 0.25 + band as f32 * 2.1;
        let crest = 0.27 - 0.07 * band as f32
            + 0.07 * (u * 3.1 + phase).sin()
            + 0.035 * (u * 7.3 - phase * 1.4).sin();
        let above = crest - v;
        let streak = 0.35 + 0.65 * noise(seed ^ band as u64, u * 26.0 + (v * 3.0).sin() + phase);
        let glow = if above > 0.0 { (-above * 7.0).exp() } else { (above * 40.0).exp() };
        light = add(light, colour, glow * streak * 0.62);
    }
    light
}

fn add(a: Rgb, b: Rgb, share: f32) -> Rgb {
    [0, 1, 2].map(|i| a[i] + b[i] * share)
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
