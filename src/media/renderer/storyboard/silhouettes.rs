//! What a prompt may name and the scenery can show: a boat, a lighthouse, a flock.
use tiny_skia::{Path, PathBuilder, Transform};

use super::canvas::Canvas;
use super::palette::Rgb;
use super::script::Subject;

/// Where and how a subject is drawn. Its foot stands at (`x`, `y`); `size` is its height in pixels.
pub struct Pose {
    pub x: f32,
    pub y: f32,
    pub size: f32,
    pub lean: f32,
    pub at_s: f32,
    pub dark: Rgb,
    pub light: Rgb,
}

pub fn draw(canvas: &mut Canvas, subject: Subject, pose: &Pose) {
    match subject {
        Subject::Boat => boat(canvas, pose),
        Subject::Lighthouse => lighthouse(canvas, pose),
        Subject::Cabin => cabin(canvas, pose),
        Subject::Balloon => balloon(canvas, pose),
        Subject::Rocket => rocket(canvas, pose),
        Subject::Birds => birds(canvas, pose),
    }
}

fn boat(canvas: &mut Canvas, pose: &Pose) {
    let hull = [(-0.42, -0.10), (0.46, -0.12), (0.30, 0.06), (-0.28, 0.06)];
    let mast = [(-0.015, -0.1), (-0.01, -1.0), (0.01, -1.0), (0.015, -0.1)];
    shape(canvas, pose, &[&hull, &mast], pose.dark, 1.0);
    let sails: [&[_]; 2] = [
        &[(0.035, -0.96), (0.26, -0.62), (0.42, -0.18), (0.035, -0.18)],
        &[(-0.035, -0.86), (-0.035, -0.18), (-0.36, -0.18), (-0.20, -0.45)],
    ];
    shape(canvas, pose, &sails, pose.light, 0.92);
}

fn lighthouse(canvas: &mut Canvas, pose: &Pose) {
    let lamp = (pose.x, pose.y - pose.size * 0.90);
    let turn = (pose.at_s * 0.9).sin();
    for side in [-1.0f32, 1.0] {
        let reach = pose.size * 2.6 * turn * side;
        let mut beam = PathBuilder::new();
        beam.move_to(lamp.0, lamp.1);
        beam.line_to(lamp.0 + reach, lamp.1 - pose.size * 0.20);
        beam.line_to(lamp.0 + reach, lamp.1 + pose.size * 0.14);
        beam.close();
        fill(canvas, beam, pose.light, 0.16);
    }
    let rock =
        [(-0.55, 0.10), (-0.34, -0.06), (-0.1, -0.11), (0.16, -0.10), (0.38, -0.03), (0.6, 0.10)];
    let tower = [(-0.13, -0.05), (-0.075, -0.82), (0.075, -0.82), (0.13, -0.05)];
    let gallery = [(-0.11, -0.80), (-0.11, -0.84), (0.11, -0.84), (0.11, -0.80)];
    let roof = [(-0.085, -0.95), (0.0, -1.04), (0.085, -0.95)];
    shape(canvas, pose, &[&rock, &tower, &gallery, &roof], pose.dark, 1.0);
    let glass: [&[_]; 1] = [&[(-0.05, -0.84), (-0.05, -0.95), (0.05, -0.95), (0.05, -0.84)]];
    shape(canvas, pose, &glass, pose.light, 1.0);
    canvas.splat(lamp.0, lamp.1, pose.size * 0.36, pose.light, 0.7);
}

fn cabin(canvas: &mut Canvas, pose: &Pose) {
    let house = [(-0.52, 0.14), (-0.52, -0.44), (0.52, -0.44), (0.52, 0.14)];
    let roof = [(-0.68, -0.40), (-0.30, -0.92), (0.30, -0.92), (0.68, -0.40)];
    let chimney = [(0.20, -0.6), (0.20, -1.08), (0.34, -1.08), (0.34, -0.6)];
    shape(canvas, pose, &[&house, &roof, &chimney], pose.dark, 1.0);
    let panes: [&[_]; 2] = [
        &[(-0.36, -0.10), (-0.36, -0.32), (-0.12, -0.32), (-0.12, -0.10)],
        &[(0.12, -0.10), (0.12, -0.32), (0.36, -0.32), (0.36, -0.10)],
    ];
    shape(canvas, pose, &panes, pose.light, 0.95);
    canvas.splat(pose.x, pose.y - pose.size * 0.2, pose.size * 0.8, pose.light, 0.22);
    for puff in 0..7 {
        let age = (pose.at_s * 0.22 + puff as f32 / 7.0).fract();
        let x = pose.x + pose.size * (0.27 + age * 0.5 + 0.05 * (age * 9.0).sin());
        let y = pose.y - pose.size * (1.12 + age * 1.1);
        canvas.splat(x, y, pose.size * (0.06 + 0.2 * age), pose.light, 0.16 * (1.0 - age));
    }
}

fn balloon(canvas: &mut Canvas, pose: &Pose) {
    let y = pose.y - pose.size * 0.62;
    let radius = pose.size * 0.38;
    for (stripe, share) in [1.0f32, 0.66, 0.3].into_iter().enumerate() {
        let mut envelope = PathBuilder::new();
        let wide = radius * share;
        envelope.move_to(pose.x, y - radius);
        envelope.cubic_to(
            pose.x + wide * 1.4,
            y - radius,
            pose.x + wide * 1.3,
            y + radius * 0.5,
            pose.x + wide * 0.22,
            y + radius * 1.1,
        );
        envelope.line_to(pose.x - wide * 0.22, y + radius * 1.1);
        envelope.cubic_to(
            pose.x - wide * 1.3,
            y + radius * 0.5,
            pose.x - wide * 1.4,
            y - radius,
            pose.x,
            y - radius,
        );
        envelope.close();
        let colour = if stripe % 2 == 0 { pose.dark } else { pose.light };
        fill(canvas, envelope, colour, 0.96);
    }
    let basket = [(-0.07, 0.0), (-0.08, -0.10), (0.08, -0.10), (0.07, 0.0)];
    let ropes = [(-0.07, -0.1), (-0.08, -0.22), (-0.07, -0.22), (-0.06, -0.1)];
    let other = [(0.07, -0.1), (0.08, -0.22), (0.07, -0.22), (0.06, -0.1)];
    shape(canvas, pose, &[&basket, &ropes, &other], pose.dark, 1.0);
    canvas.splat(pose.x, pose.y - pose.size * 0.18, pose.size * 0.14, pose.light, 0.7);
}

fn rocket(canvas: &mut Canvas, pose: &Pose) {
    let flicker = 1.0 + 0.15 * (pose.at_s * 31.0).sin();
    for puff in 0..16 {
        let along = puff as f32 / 16.0;
        let sway = (pose.at_s * 7.0 + puff as f32).sin() * along * 0.05;
        let (dx, dy) = lean(pose.lean, sway, along * 1.7);
        let radius = pose.size * (0.08 + 0.16 * along) * flicker;
        let strength = 0.5 * (1.0 - along) * (1.0 - along);
        canvas.splat(
            pose.x + dx * pose.size,
            pose.y + dy * pose.size,
            radius,
            pose.light,
            strength,
        );
    }
    let fins = [(-0.24, 0.02), (-0.10, -0.32), (0.10, -0.32), (0.24, 0.02), (0.0, -0.08)];
    shape(canvas, pose, &[&fins], pose.dark, 1.0);
    let body = [
        (-0.10, -0.06),
        (-0.14, -0.45),
        (-0.09, -0.78),
        (0.0, -1.0),
        (0.09, -0.78),
        (0.14, -0.45),
        (0.10, -0.06),
    ];
    shape(canvas, pose, &[&body], pose.light, 0.96);
    let port =
        [(-0.05, -0.55), (0.0, -0.60), (0.05, -0.55), (0.05, -0.50), (0.0, -0.45), (-0.05, -0.50)];
    shape(canvas, pose, &[&port], pose.dark, 1.0);
}

fn birds(canvas: &mut Canvas, pose: &Pose) {
    let mut flock = PathBuilder::new();
    for bird in 0..7i32 {
        let (row, side) = ((bird + 1) / 2, if bird % 2 == 0 { 1.0 } else { -1.0 });
        let phase = bird as f32 * 1.7;
        let x =
            pose.x - pose.size * 0.30 * row as f32 + pose.size * 0.04 * (pose.at_s + phase).sin();
        let y = pose.y
            + pose.size * (0.13 * side * row as f32 + 0.04 * (pose.at_s * 1.3 + phase).cos());
        let span = pose.size * 0.13;
        let flap = (pose.at_s * 6.5 + phase).sin() * span * 0.55;
        flock.move_to(x - span, y - flap);
        flock.quad_to(x - span * 0.4, y - span * 0.25 - flap * 0.4, x, y);
        flock.quad_to(x + span * 0.4, y - span * 0.25 - flap * 0.4, x + span, y - flap);
    }
    if let Some(flock) = flock.finish() {
        canvas.stroke(&flock, pose.dark, 0.8, (pose.size * 0.028).max(1.2));
    }
}

fn shape(canvas: &mut Canvas, pose: &Pose, outlines: &[&[(f32, f32)]], colour: Rgb, alpha: f32) {
    for outline in outlines {
        let mut path = PathBuilder::new();
        for (i, &(x, y)) in outline.iter().enumerate() {
            let (dx, dy) = lean(pose.lean, x, y);
            let (x, y) = (pose.x + dx * pose.size, pose.y + dy * pose.size);
            if i == 0 { path.move_to(x, y) } else { path.line_to(x, y) }
        }
        path.close();
        fill(canvas, path, colour, alpha);
    }
}

fn lean(angle: f32, x: f32, y: f32) -> (f32, f32) {
    let (sin, cos) = angle.sin_cos();
    (x * cos - y * sin, x * sin + y * cos)
}

fn fill(canvas: &mut Canvas, path: PathBuilder, colour: Rgb, alpha: f32) {
    let finished: Option<Path> = path.finish();
    if let Some(path) = finished {
        canvas.fill(&path, colour, alpha, Transform::identity());
    }
}
