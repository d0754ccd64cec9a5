//! What drifts through the air in front of the land.

use tiny_skia::{PathBuilder, Transform};

use super::{Brush, Moment};
use crate::media::renderer::storyboard::palette::{Palette, mix};
use crate::media::renderer::storyboard::random::unit;
use crate::media::renderer::storyboard::script::Particles;

impl Brush<'_> {
    pub(super) fn particles(&mut self, moment: &Moment) {
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
}
