//! Sets a beat's words: shapes them, breaks them into balanced lines that fit the frame, and hands
//! out outlines.
//!
//! Outfit and Inter are part of the program. Only a word they cannot spell makes it look at the
//! fonts of the machine, so every other prompt renders alike everywhere. A word that no font can
//! spell is left to the captions; boxes in its place would tell nobody anything.
use cosmic_text::{
    Attrs, Buffer, Command, Family, FontSystem, Metrics, Shaping, SwashCache, Weight, Wrap, fontdb,
};
use tiny_skia::{Path, PathBuilder, Transform};

use super::script::Word;

/// Words in place, in pixels of the frame.
#[derive(Debug, Default)]
pub struct Setting {
    pub words: Vec<SetWord>,
    pub font_size: f32,
    /// The block that holds all the words: left, top, right, bottom.
    pub bounds: [f32; 4],
}

#[derive(Debug)]
pub struct SetWord {
    pub outline: Path,
    pub accented: bool,
    pub left: f32,
    pub right: f32,
    pub baseline: f32,
}

pub struct TypeSetter {
    fonts: FontSystem,
    cache: SwashCache,
    looked_at_system: bool,
}

/// Words are shaped once at this size, and scaled.
const EM: f32 = 128.0;
const LINE_HEIGHT: f32 = 1.16;
const SPACE: f32 = 0.25;

impl TypeSetter {
    pub fn new() -> Self {
        let mut db = fontdb::Database::new();
        db.load_font_data(include_bytes!("../../../../assets/fonts/Outfit-Bold.ttf").to_vec());
        db.load_font_data(include_bytes!("../../../../assets/fonts/Inter-Bold.ttf").to_vec());
        // A fixed locale: the machine's would choose between Han glyphs.
        let fonts = FontSystem::new_with_locale_and_db("en-US".to_owned(), db);
        Self { fonts, cache: SwashCache::new(), looked_at_system: false }
    }

    /// Sets the words in the middle of a box given as centre x, centre y, width, height.
    pub fn set(&mut self, words: &[Word], area: [f32; 4], largest: f32) -> Setting {
        let shaped: Vec<Shaped> = words.iter().filter_map(|word| self.shape(word)).collect();
        if shaped.is_empty() {
            return Setting::default();
        }
        let (size, lines) = fit(&shaped, area[2], area[3], largest);
        place(&shaped, &lines, size, area)
    }

    fn shape(&mut self, word: &Word) -> Option<Shaped> {
        let mut text = word.text.clone();
        if !self.spells(&text) && !self.looked_at_system {
            self.looked_at_system = true;
            self.fonts.db_mut().load_system_fonts();
        }
        if !self.spells(&text) {
            text = word.text.chars().filter(|c| self.spells(&c.to_string())).collect();
        }
        let (outline, width) = self.outline(&text)?;
        let rtl = text.chars().find_map(direction).unwrap_or(false);
        Some(Shaped { outline, width, rtl, accented: word.accented, joined: word.joined })
    }

    fn spells(&mut self, text: &str) -> bool {
        let buffer = self.buffer(text);
        buffer.layout_runs().all(|run| run.glyphs.iter().all(|glyph| glyph.glyph_id != 0))
    }

    fn buffer(&mut self, text: &str) -> Buffer {
        let mut buffer = Buffer::new(&mut self.fonts, Metrics::new(EM, EM));
        buffer.set_wrap(Wrap::None);
        let attrs = Attrs::new().family(Family::Name("Outfit")).weight(Weight::BOLD);
        buffer.set_text(text, &attrs, Shaping::Advanced, None);
        buffer.shape_until_scroll(&mut self.fonts, false);
        buffer
    }

    /// The outline of a word with its baseline at 0, and its width; `None` if nothing is drawn.
    fn outline(&mut self, text: &str) -> Option<(Path, f32)> {
        let buffer = self.buffer(text);
        let mut path = PathBuilder::new();
        let mut width = 0.0f32;
        for run in buffer.layout_runs() {
            width = width.max(run.line_w);
            for glyph in run.glyphs {
                let physical = glyph.physical((0.0, 0.0), 1.0);
                let commands =
                    self.cache.get_outline_commands_uncached(&mut self.fonts, physical.cache_key);
                let x = glyph.x + glyph.font_size * glyph.x_offset;
                let y = -glyph.y + glyph.font_size * glyph.y_offset;
                draw(&mut path, commands.as_deref().unwrap_or_default(), x, y);
            }
        }
        path.finish().map(|path| (path, width))
    }
}

/// A word at size [`EM`].
struct Shaped {
    outline: Path,
    width: f32,
    rtl: bool,
    accented: bool,
    joined: bool,
}

fn draw(path: &mut PathBuilder, commands: &[Command], x: f32, y: f32) {
    for command in commands {
        match command {
            Command::MoveTo(p) => path.move_to(x + p.x, -y - p.y),
            Command::LineTo(p) => path.line_to(x + p.x, -y - p.y),
            Command::QuadTo(a, p) => path.quad_to(x + a.x, -y - a.y, x + p.x, -y - p.y),
            Command::CurveTo(a, b, p) => {
                path.cubic_to(x + a.x, -y - a.y, x + b.x, -y - b.y, x + p.x, -y - p.y);
            }
            Command::Close => path.close(),
        }
    }
}

/// Whether a letter runs right to left; `None` for digits and marks.
fn direction(c: char) -> Option<bool> {
    let rtl =
        matches!(c, '\u{590}'..='\u{8FF}' | '\u{FB1D}'..='\u{FDFF}' | '\u{FE70}'..='\u{FEFC}');
    c.is_alphabetic().then_some(rtl)
}

/// The largest size at which the words fit, and the word indices of each line.
fn fit(words: &[Shaped], width: f32, height: f32, largest: f32) -> (f32, Vec<Vec<usize>>) {
    let mut size = largest;
    for _ in 0..80 {
        let lines = wrap(words, width / size * EM);
        let tall = lines.len() as f32 * size * LINE_HEIGHT;
        let wide = lines.iter().map(|line| line_width(words, line)).fold(0.0, f32::max);
        if tall <= height && wide * size / EM <= width {
            return (size, balance(words, lines, width / size * EM));
        }
        size *= 0.95;
    }
    (size, wrap(words, width / size * EM))
}

fn wrap(words: &[Shaped], width: f32) -> Vec<Vec<usize>> {
    let mut lines: Vec<Vec<usize>> = vec![Vec::new()];
    for index in 0..words.len() {
        let line = lines.len() - 1;
        lines[line].push(index);
        if lines[line].len() > 1 && line_width(words, &lines[line]) > width {
            lines[line].pop();
            lines.push(vec![index]);
        }
    }
    lines
}

/// The same number of lines, with the longest as short as can be.
fn balance(words: &[Shaped], lines: Vec<Vec<usize>>, width: f32) -> Vec<Vec<usize>> {
    let narrower = (1..16).map(|step| wrap(words, width * (1.0 - step as f32 * 0.05)));
    let fits = |candidate: &Vec<Vec<usize>>| {
        candidate.len() == lines.len()
            && candidate.iter().all(|line| line_width(words, line) <= width)
    };
    narrower.take_while(fits).last().unwrap_or(lines)
}

fn line_width(words: &[Shaped], line: &[usize]) -> f32 {
    line.iter().enumerate().map(|(i, &word)| gap(words, i, word) + words[word].width).sum()
}

fn gap(words: &[Shaped], place_in_line: usize, word: usize) -> f32 {
    if place_in_line == 0 || words[word].joined { 0.0 } else { SPACE * EM }
}

fn place(words: &[Shaped], lines: &[Vec<usize>], size: f32, area: [f32; 4]) -> Setting {
    let scale = size / EM;
    let tall = lines.len() as f32 * size * LINE_HEIGHT;
    let top = area[1] - tall / 2.0;
    // The first word decides which way the lines run.
    let rtl = words[0].rtl;
    let mut setting =
        Setting { font_size: size, bounds: [f32::MAX, top, f32::MIN, top + tall], words: vec![] };
    for (row, line) in lines.iter().enumerate() {
        let width = line_width(words, line) * scale;
        let baseline = top + row as f32 * size * LINE_HEIGHT + size * 0.92;
        let mut along = 0.0;
        for (i, &word) in line.iter().enumerate() {
            along += gap(words, i, word) * scale;
            let wide = words[word].width * scale;
            let from_left = if rtl { width - along - wide } else { along };
            let left = area[0] - width / 2.0 + from_left;
            along += wide;
            let transform = Transform::from_row(scale, 0.0, 0.0, scale, left, baseline);
            let Some(outline) = words[word].outline.clone().transform(transform) else { continue };
            let accented = words[word].accented;
            setting.words.push(SetWord { outline, accented, left, right: left + wide, baseline });
        }
        setting.bounds[0] = setting.bounds[0].min(area[0] - width / 2.0);
        setting.bounds[2] = setting.bounds[2].max(area[0] + width / 2.0);
    }
    setting
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::media::renderer::storyboard::script;
    use proptest::prelude::*;

    fn set(prompt: &str, area: [f32; 4]) -> Setting {
        let script = script::write(prompt, 5, 1, None);
        TypeSetter::new().set(&script.beats[0].words, area, 90.0)
    }

    fn check_inside(setting: &Setting, area: [f32; 4]) {
        for word in &setting.words {
            assert!(word.left >= area[0] - area[2] / 2.0 - 1.0, "{word:?}");
            assert!(word.right <= area[0] + area[2] / 2.0 + 1.0, "{word:?}");
        }
        assert!(setting.bounds[3] - setting.bounds[1] <= area[3] + 1.0);
    }

    #[test]
    fn long_words_shrink_until_they_fit_the_frame() {
        let area = [240.0, 300.0, 400.0, 300.0];
        let setting = set(&"Donaudampfschifffahrtsgesellschaft".repeat(9), area);
        assert_eq!(setting.words.len(), 1);
        check_inside(&setting, area);
    }

    #[test]
    fn cyrillic_and_greek_are_spelled_by_the_fonts_on_board() {
        let mut setter = TypeSetter::new();
        assert!(setter.spells("Привет") && setter.spells("κόσμε"));
        assert!(!setter.looked_at_system);
    }

    #[test]
    fn what_no_font_can_spell_is_left_out() {
        let words = [Word { text: "fox\u{10FFFD}".into(), accented: false, joined: false }];
        let mut setter = TypeSetter::new();
        let mixed = setter.set(&words, [0.0, 0.0, 500.0, 200.0], 90.0);
        let plain = set("fox", [0.0, 0.0, 500.0, 200.0]);
        assert_eq!(mixed.words[0].right, plain.words[0].right);
    }

    #[test]
    fn right_to_left_words_run_from_the_right() {
        let mut setter = TypeSetter::new();
        let word = |text: &str| Word { text: text.into(), accented: false, joined: false };
        let mut shaped = ["one", "two"].map(|text| setter.shape(&word(text)).unwrap());
        assert_eq!("שלום".chars().find_map(direction), Some(true));
        shaped[0].rtl = true;
        let setting = place(&shaped, &[vec![0, 1]], 60.0, [500.0, 0.0, 900.0, 200.0]);
        assert!(setting.words[0].left > setting.words[1].left);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn any_text_is_set_inside_its_area(prompt in ".{0,300}") {
            let area = [240.0, 300.0, 400.0, 300.0];
            check_inside(&set(&prompt, area), area);
        }
    }
}
