//! Draws the film at any moment: sky, sun or moon, four layers of land that slide past each other,
//! what drifts through the air, and the words. A frame depends on its time alone, so frames can be
//! drawn in any order.
use tiny_skia::{Pixmap, Transform};

use super::canvas::{Canvas, CoarseMask};
use super::palette::{self, Palette, mix};
use super::random::{hash, smooth};
use super::script::{Beat, Motif, Particles, Script, Subject};
use super::silhouettes::{self, Pose};
use super::type_setting::{SetWord, Setting, TypeSetter};
use crate::media::renderer::Error;

mod air;
mod land;
mod sky;

use land::{LAYERS, Land};

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
