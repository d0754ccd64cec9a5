//! What is above the land: the sky's colours, stars, the sun or moon or a planet.

use tiny_skia::{PathBuilder, Transform};

use super::land::{Land, covered_from};
use super::{Brush, Moment, Scene};
use crate::media::renderer::storyboard::canvas::CELL;
use crate::media::renderer::storyboard::palette::{Palette, Rgb, mix};
use crate::media::renderer::storyboard::random::{fbm, fbm2, hash, noise, smooth, unit};
use crate::media::renderer::storyboard::script::{Motif, Particles};

impl Brush<'_> {
    pub(super) fn sun_at(&self, moment: &Moment) -> (f32, f32) {
        let Scene { width, measure, horizon, side, .. } = self.scene;
        let high =
            if moment.palette.night > 0.6 && moment.palette.bars < 0.5 { 0.25 } else { 0.15 };
        let x = *width as f32 * (0.5 + side * (0.22 - 0.05 * moment.progress));
        (x, horizon - measure * (high + 0.04 * moment.progress))
    }

    pub(super) fn sky(&mut self, moment: &Moment, lands: &[Land]) {
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

    pub(super) fn stars(&mut self, moment: &Moment) {
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

    pub(super) fn sun(&mut self, moment: &Moment) {
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
