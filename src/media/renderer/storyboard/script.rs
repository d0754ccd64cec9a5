//! From a prompt to a script: clauses become beats, keywords choose the palette, the motif and
//! what drifts through the air.
use super::palette::{self, Palette};
use super::random;

/// A film in order: the beats touch each other and cover the whole duration.
#[derive(Debug, Clone, PartialEq)]
pub struct Script {
    pub beats: Vec<Beat>,
    pub duration_s: f32,
    pub seed: u64,
}

/// One thought of the prompt, with the scenery it is shown in.
#[derive(Debug, Clone, PartialEq)]
pub struct Beat {
    pub start_s: f32,
    pub end_s: f32,
    /// All that the prompt says here; the picture may show less.
    pub caption: String,
    /// What the picture shows.
    pub words: Vec<Word>,
    pub palette: Palette,
    pub motif: Motif,
    pub particles: Particles,
    pub subject: Option<Subject>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Word {
    pub text: String,
    /// The word of its beat that carries the colour.
    pub accented: bool,
    /// Follows the word before it without a space, as in Chinese.
    pub joined: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Motif {
    Ridges,
    Waves,
    City,
    Forest,
    Dunes,
    Space,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Particles {
    Motes,
    Stars,
    Snow,
    Rain,
    Fireflies,
    Embers,
    Petals,
}

/// A silhouette in the scenery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    Boat,
    Lighthouse,
    Cabin,
    Balloon,
    Rocket,
    Birds,
}

/// More words than this are not read in one breath.
const WORDS_SHOWN: usize = 9;
/// No word needs more room than this; the captions have it whole.
const LETTERS_SHOWN: usize = 22;
/// The least time in which a beat can be read.
const BEAT_S: f32 = 2.2;

/// The script of a prompt. Takes any text whatever; text without anything visible gives one
/// beat without words.
pub fn write(prompt: &str, duration_s: u32, seed: u64, style: Option<&str>) -> Script {
    let seed = random::hash(seed, 0) ^ random::text_seed(prompt);
    let duration_s = duration_s.max(1) as f32;
    let room = ((duration_s / BEAT_S).floor() as usize).max(1);
    let thoughts = gather(clauses(&clean(prompt)), room);
    let ends = ends(&thoughts, duration_s);
    let mut mood = Mood::of_film(prompt, style, seed);
    let mut beats = Vec::with_capacity(thoughts.len());
    let mut start_s = 0.0;
    for (thought, end_s) in thoughts.into_iter().zip(ends) {
        mood = mood.turned_by(&thought);
        beats.push(mood.beat(thought, start_s, end_s));
        start_s = end_s;
    }
    Script { beats, duration_s, seed }
}

/// The prompt on one line, without what cannot be seen or would upset a layout engine: control
/// characters and the marks that switch the direction of text.
pub fn clean(prompt: &str) -> String {
    let visible = prompt.chars().map(|c| if c.is_control() { ' ' } else { c });
    let visible = visible.filter(|c| !is_direction_mark(*c)).collect::<String>();
    visible.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn is_direction_mark(c: char) -> bool {
    matches!(c, '\u{200E}' | '\u{200F}' | '\u{202A}'..='\u{202E}' | '\u{2066}'..='\u{2069}' | '\u{FEFF}')
}

fn clauses(text: &str) -> Vec<String> {
    let words: Vec<&str> = text.split(' ').filter(|word| !word.is_empty()).collect();
    let sentences = words.split_inclusive(|word| closes_clause(word));
    sentences.flat_map(breathe).map(|clause| clause.join(" ")).collect()
}

/// Halves a clause that is too long to read at once, where a speaker would draw breath.
fn breathe<'w>(clause: &[&'w str]) -> Vec<Vec<&'w str>> {
    if clause.len() <= WORDS_SHOWN {
        return vec![clause.to_vec()];
    }
    let effort = |at: &usize| {
        let lopsided = at.abs_diff(clause.len() / 2);
        if opens_clause(clause[*at]) { lopsided } else { lopsided + 3 }
    };
    let at = (3..clause.len() - 2).min_by_key(effort).unwrap_or(clause.len() / 2);
    let (first, second) = clause.split_at(at);
    [breathe(first), breathe(second)].concat()
}

fn closes_clause(word: &str) -> bool {
    word.ends_with([
        '.', ',', ';', ':', '!', '?', '…', '—', '–', '。', '、', '，', '！', '？', '؟', '،',
    ])
}

fn opens_clause(word: &str) -> bool {
    OPENERS.contains(&word.to_lowercase().as_str())
}

const OPENERS: &[&str] = &[
    "and", "while", "as", "then", "where", "when", "who", "that", "with", "through", "across",
    "under", "beneath", "over", "above", "at", "in", "into", "on", "from", "for", "to", "of",
];

/// Joins neighbouring clauses, evenly by length, until there is time for all of them.
fn gather(clauses: Vec<String>, room: usize) -> Vec<String> {
    let mut clauses = join_stubs(clauses, room);
    if clauses.is_empty() {
        return vec![String::new()];
    }
    while clauses.len() > room {
        let shortest_pair = (0..clauses.len() - 1)
            .min_by_key(|&i| clauses[i].len() + clauses[i + 1].len())
            .expect("more clauses than room, and room is at least one");
        let second = clauses.remove(shortest_pair + 1);
        clauses[shortest_pair] = format!("{} {second}", clauses[shortest_pair]);
    }
    clauses
}

/// A clause of one word reads better with its neighbour, unless it is all there is time for.
fn join_stubs(clauses: Vec<String>, room: usize) -> Vec<String> {
    let crowded = clauses.len() > room;
    let mut joined: Vec<String> = Vec::new();
    for clause in clauses {
        match joined.last_mut() {
            Some(last) if crowded || !last.contains(' ') && !last.ends_with(['.', '!', '?']) => {
                if last.split(' ').count() + clause.split(' ').count() <= WORDS_SHOWN {
                    last.push(' ');
                    last.push_str(&clause);
                    continue;
                }
                joined.push(clause);
            }
            _ => joined.push(clause),
        }
    }
    joined
}

/// When each beat ends: by its length in letters, with a share that all have alike.
fn ends(thoughts: &[String], duration_s: f32) -> Vec<f32> {
    let weight = |thought: &String| 24.0 + thought.chars().count().min(90) as f32;
    let total: f32 = thoughts.iter().map(weight).sum();
    let mut sum = 0.0;
    let mut ends: Vec<f32> = thoughts
        .iter()
        .map(|thought| {
            sum += weight(thought);
            duration_s * sum / total
        })
        .collect();
    if let Some(last) = ends.last_mut() {
        *last = duration_s;
    }
    ends
}

#[derive(Clone)]
struct Mood {
    palette: Palette,
    fixed_palette: bool,
    motif: Motif,
    particles: Particles,
    subject: Option<Subject>,
}

impl Mood {
    /// What the prompt as a whole is about holds wherever a clause says nothing else.
    fn of_film(prompt: &str, style: Option<&str>, seed: u64) -> Self {
        let style_palette = style.and_then(|style| look_up(PALETTES, style));
        let palette = style_palette.or_else(|| look_up(PALETTES, prompt));
        let palette = palette.unwrap_or_else(|| palette::any(random::hash(seed, 1)));
        let motif = look_up(MOTIFS, prompt).unwrap_or_else(|| any_motif(seed));
        let particles = look_up(PARTICLES, prompt).unwrap_or(match (motif, palette.night > 0.5) {
            (Motif::Space, _) => Particles::Stars,
            (Motif::Forest, true) => Particles::Fireflies,
            _ => Particles::Motes,
        });
        let subject = look_up(SUBJECTS, prompt).or((palette.night < 0.3).then_some(Subject::Birds));
        Self { palette, fixed_palette: style_palette.is_some(), motif, particles, subject }
    }

    fn turned_by(mut self, thought: &str) -> Self {
        if !self.fixed_palette {
            self.palette = look_up(PALETTES, thought).unwrap_or(self.palette);
        }
        self.motif = look_up(MOTIFS, thought).unwrap_or(self.motif);
        self.particles = look_up(PARTICLES, thought).unwrap_or(self.particles);
        self.subject = look_up(SUBJECTS, thought).or(self.subject);
        self
    }

    fn beat(&self, caption: String, start_s: f32, end_s: f32) -> Beat {
        let words = shown(&caption);
        let Self { palette, motif, particles, subject, .. } = *self;
        Beat { start_s, end_s, caption, words, palette, motif, particles, subject }
    }
}

fn any_motif(seed: u64) -> Motif {
    let motifs = [Motif::Ridges, Motif::Ridges, Motif::Waves, Motif::Dunes, Motif::Forest];
    motifs[(random::hash(seed, 2) % motifs.len() as u64) as usize]
}

/// The words for the picture: the first of the thought, short enough to read, one accented.
fn shown(thought: &str) -> Vec<Word> {
    let mut words = Vec::new();
    let mut all =
        thought.split(' ').filter(|word| !word.is_empty()).flat_map(split_word).peekable();
    // A script without spaces counts letters as words, so it gets more of them.
    let limit = if all.clone().any(|word| word.joined) { 3 * WORDS_SHOWN } else { WORDS_SHOWN };
    while let Some(word) = all.next_if(|_| words.len() < limit) {
        words.push(word);
    }
    let cut = all.peek().is_some();
    // A line that breaks off sounds better after `forest` than after `at`.
    while cut && words.len() > 3 && words.last().is_some_and(|word| opens_clause(&word.text)) {
        words.pop();
    }
    if let Some(last) = words.last_mut() {
        let bare = last.text.trim_end_matches([',', ';', ':', '.', '—', '–', '、', '，', '。']);
        last.text = if cut { format!("{bare}…") } else { bare.to_owned() };
    }
    words.retain(|word| !word.text.is_empty());
    accent(&mut words);
    words
}

fn split_word(word: &str) -> Vec<Word> {
    let plain = |text: String, joined| Word { text, accented: false, joined };
    if word.chars().any(is_unspaced) {
        let letters = word.chars().enumerate();
        return letters.map(|(i, letter)| plain(letter.to_string(), i > 0)).collect();
    }
    let mut text: String = word.chars().take(LETTERS_SHOWN).collect();
    if text.len() < word.len() {
        text.push('…');
    }
    vec![plain(text, false)]
}

/// Scripts that put no spaces between words: kana, Han.
fn is_unspaced(c: char) -> bool {
    matches!(c, '\u{3000}'..='\u{30FF}' | '\u{3400}'..='\u{4DBF}' | '\u{4E00}'..='\u{9FFF}' | '\u{FF01}'..='\u{FF60}' | '\u{20000}'..='\u{2FA1F}')
}

/// Accents a word that the scenery knows; else the longest.
fn accent(words: &mut [Word]) {
    let weight = |word: &Word| {
        let known = look_up(PALETTES, &word.text).is_some()
            || look_up(MOTIFS, &word.text).is_some()
            || look_up(PARTICLES, &word.text).is_some()
            || look_up(SUBJECTS, &word.text).is_some();
        word.text.chars().filter(|c| c.is_alphanumeric()).count() + if known { 100 } else { 0 }
    };
    let heaviest = words.iter().enumerate().max_by_key(|(i, word)| (weight(word), usize::MAX - i));
    if let Some((i, _)) = heaviest.filter(|_| words.len() > 1) {
        words[i].accented = true;
    }
}

/// The value of the first word of the text that one of the table's stems begins.
fn look_up<T: Copy>(table: &[(&[&str], T)], text: &str) -> Option<T> {
    text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).find_map(|word| {
        let word = word.to_lowercase();
        let known = |stems: &[&str]| stems.iter().any(|stem| is_form_of(&word, stem));
        table.iter().find(|(stems, _)| known(stems)).map(|(_, value)| *value)
    })
}

/// Whether the word is the stem with a common English ending, so that `sea` is not in `search`.
fn is_form_of(word: &str, stem: &str) -> bool {
    let endings = ["", "s", "es", "y", "ing", "ed", "er", "en", "lit", "fall", "light"];
    word.strip_prefix(stem).is_some_and(|ending| endings.contains(&ending))
}

const PALETTES: &[(&[&str], Palette)] = &[
    (&["aurora", "borealis", "magic", "dream", "fairy", "mystic"], palette::AURORA),
    (
        &["neon", "cyberpunk", "synthwave", "retrowave", "futuristic", "arcade", "vaporwave"],
        palette::NEON,
    ),
    (&["noir", "monochrome", "black", "documentary"], palette::NOIR),
    (
        &[
            "night",
            "midnight",
            "moon",
            "star",
            "starry",
            "dark",
            "galaxy",
            "cosmic",
            "space",
            "universe",
            "firefly",
            "fireflies",
        ],
        palette::NIGHT,
    ),
    (&["sunset", "dusk", "evening", "twilight", "autumn", "fall"], palette::DUSK),
    (
        &[
            "sunrise", "dawn", "morning", "spring", "blossom", "cherry", "pink", "romantic",
            "love", "flower", "petal",
        ],
        palette::DAWN,
    ),
    (
        &[
            "fire", "volcano", "lava", "ember", "dragon", "flame", "epic", "war", "battle",
            "campfire",
        ],
        palette::EMBER,
    ),
    (
        &[
            "desert", "dune", "sand", "sahara", "mars", "golden", "gold", "vintage", "retro",
            "sepia", "savanna",
        ],
        palette::GOLD,
    ),
    (&["snow", "winter", "ice", "frost", "arctic", "glacier", "cold", "blizzard"], palette::FROST),
    (&["rain", "storm", "thunder", "fog", "mist", "cloudy", "gloom"], palette::STORM),
    (&["forest", "jungle", "wood", "tree", "green", "meadow", "garden", "nature"], palette::GREEN),
    (
        &["ocean", "sea", "beach", "underwater", "island", "tropical", "lagoon", "whale"],
        palette::OCEAN,
    ),
    (&["day", "summer", "sky", "sunny", "bright", "cheerful", "anime", "cartoon"], palette::DAY),
];

const MOTIFS: &[(&[&str], Motif)] = &[
    (
        &[
            "ocean",
            "sea",
            "wave",
            "beach",
            "surf",
            "boat",
            "ship",
            "sail",
            "sailboat",
            "lake",
            "river",
            "whale",
            "island",
            "harbor",
            "harbour",
            "coast",
            "lighthouse",
            "underwater",
        ],
        Motif::Waves,
    ),
    (
        &[
            "city",
            "cities",
            "town",
            "street",
            "skyline",
            "skyscraper",
            "building",
            "urban",
            "downtown",
            "rooftop",
            "tokyo",
            "york",
            "traffic",
            "neon",
            "cyberpunk",
            "robot",
            "startup",
            "office",
        ],
        Motif::City,
    ),
    (
        &[
            "forest",
            "jungle",
            "wood",
            "tree",
            "pine",
            "fox",
            "deer",
            "garden",
            "meadow",
            "firefly",
            "fireflies",
        ],
        Motif::Forest,
    ),
    (&["desert", "dune", "sand", "sahara", "mars", "camel", "oasis", "savanna"], Motif::Dunes),
    (
        &[
            "space",
            "planet",
            "galaxy",
            "cosmic",
            "universe",
            "astronaut",
            "orbit",
            "nebula",
            "spaceship",
            "rocket",
            "satellite",
        ],
        Motif::Space,
    ),
    (
        &[
            "mountain", "ridge", "peak", "alp", "valley", "hill", "canyon", "volcano", "cliff",
            "dragon", "glacier",
        ],
        Motif::Ridges,
    ),
];

const PARTICLES: &[(&[&str], Particles)] = &[
    (&["snow", "blizzard", "winter", "arctic", "frost", "snowflake"], Particles::Snow),
    (&["rain", "storm", "thunder", "monsoon", "drizzle"], Particles::Rain),
    (&["firefly", "fireflies", "fairy", "glowworm", "lantern", "magic"], Particles::Fireflies),
    (
        &["fire", "ember", "lava", "volcano", "dragon", "campfire", "flame", "spark"],
        Particles::Embers,
    ),
    (&["petal", "blossom", "cherry", "flower", "spring", "rose"], Particles::Petals),
    (
        &["star", "starry", "galaxy", "cosmic", "space", "universe", "constellation"],
        Particles::Stars,
    ),
];

const SUBJECTS: &[(&[&str], Subject)] = &[
    (&["boat", "ship", "sail", "sailboat", "sailor", "pirate", "yacht"], Subject::Boat),
    (&["lighthouse", "beacon", "harbor", "harbour"], Subject::Lighthouse),
    (&["cabin", "house", "home", "cottage", "hut", "village", "farm"], Subject::Cabin),
    (&["balloon", "airship", "zeppelin"], Subject::Balloon),
    (&["rocket", "spaceship", "launch", "astronaut"], Subject::Rocket),
    (&["bird", "gull", "eagle", "crane", "swallow", "flock"], Subject::Birds),
];

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn film(prompt: &str, duration_s: u32) -> Script {
        write(prompt, duration_s, 1, None)
    }

    #[test]
    fn clauses_become_beats() {
        let script = film("A red fox runs through the snow, the moon rises over the city", 10);
        let captions: Vec<_> = script.beats.iter().map(|beat| beat.caption.as_str()).collect();
        assert_eq!(captions, ["A red fox runs through the snow,", "the moon rises over the city"]);
    }

    #[test]
    fn a_clause_too_long_for_one_breath_is_halved_before_a_preposition() {
        let script = film("a red fox runs slowly through the snowy forest at night", 10);
        let captions: Vec<_> = script.beats.iter().map(|beat| beat.caption.as_str()).collect();
        assert_eq!(captions, ["a red fox runs slowly", "through the snowy forest at night"]);
    }

    #[test]
    fn keywords_choose_palette_motif_and_particles() {
        let beat = &film("snow over the neon city", 5).beats[0];
        assert_eq!(beat.motif, Motif::City);
        assert_eq!(beat.particles, Particles::Snow);
        assert_eq!(beat.palette, palette::FROST);
    }

    #[test]
    fn a_style_sets_the_palette_of_the_whole_film() {
        let script = write("snow at dawn, fire at night", 10, 1, Some("Noir"));
        assert!(script.beats.iter().all(|beat| beat.palette == palette::NOIR));
    }

    #[test]
    fn a_word_is_not_found_within_another() {
        assert_eq!(look_up(MOTIFS, "we search the sandwich"), None);
        assert_eq!(look_up(MOTIFS, "Mountains!"), Some(Motif::Ridges));
    }

    #[test]
    fn a_known_word_is_accented_before_a_longer_one() {
        let words = shown("an unbelievable fox");
        assert_eq!(words.iter().find(|word| word.accented).unwrap().text, "fox");
    }

    #[test]
    fn a_long_prompt_is_cut_in_the_picture_and_whole_in_the_captions() {
        let prompt = "many words follow one another here without an end ".repeat(40);
        let script = film(&prompt, 5);
        let captions: Vec<_> = script.beats.iter().map(|beat| beat.caption.clone()).collect();
        assert_eq!(captions.join(" "), clean(&prompt));
        assert!(script.beats.iter().all(|beat| beat.words.len() <= WORDS_SHOWN));
    }

    #[test]
    fn text_that_cannot_be_seen_gives_one_silent_beat() {
        let script = film("\u{0}\u{7}\u{202E}", 5);
        assert_eq!(script.beats.len(), 1);
        assert!(script.beats[0].words.is_empty());
    }

    proptest! {
        #[test]
        fn any_text_at_all_gives_beats_that_touch_and_cover_the_film(
            prompt in any::<String>(), duration_s in 0u32..70, seed: u64,
        ) {
            let script = write(&prompt, duration_s, seed, Some(&prompt));
            let mut at = 0.0;
            for beat in &script.beats {
                prop_assert_eq!(beat.start_s, at);
                prop_assert!(beat.end_s > beat.start_s);
                prop_assert!(beat.words.iter().all(|w| w.text.chars().count() <= LETTERS_SHOWN + 1));
                at = beat.end_s;
            }
            prop_assert_eq!(at, duration_s.max(1) as f32);
        }
    }
}
