//! The beats as WebVTT: all of the prompt, in cues that can be read.
use std::fmt::Write;

use super::script::Script;

/// Two lines of the usual width.
const CUE_LETTERS: usize = 84;
/// A shorter cue only flickers.
const CUE_S: f32 = 1.2;

/// The WebVTT file of a script. Its cues touch and cover the film.
/// Source: W3C WebVTT, section 4.1; `&`, `<` and `>` are escaped, so no text can end a cue early.
pub fn write(script: &Script) -> String {
    let mut file = String::from("WEBVTT\n");
    let mut number = 0;
    for beat in &script.beats {
        let length_s = beat.end_s - beat.start_s;
        let cues = split(&beat.caption, (length_s / CUE_S).floor().max(1.0) as usize);
        let letters: usize = cues.iter().map(|cue| cue.len()).sum::<usize>().max(1);
        let mut read = 0;
        for cue in &cues {
            let at = |letter: usize| beat.start_s + length_s * letter as f32 / letters as f32;
            number += 1;
            let (from, to) = (timestamp(at(read)), timestamp(at(read + cue.len())));
            read += cue.len();
            let _ = write!(file, "\n{number}\n{from} --> {to}\n{}\n", escape(cue));
        }
    }
    file
}

/// Parts of about equal length, at most `limit`, cut between words.
fn split(text: &str, limit: usize) -> Vec<String> {
    if text.is_empty() {
        return Vec::new();
    }
    let count = text.chars().count().div_ceil(CUE_LETTERS).min(limit).max(1);
    let each = text.chars().count().div_ceil(count);
    let mut cues = vec![String::new()];
    for word in text.split(' ') {
        let length = cues.last().map_or(0, |cue| cue.chars().count());
        if length >= each && cues.len() < count {
            cues.push(String::new());
        }
        if let Some(cue) = cues.last_mut() {
            if !cue.is_empty() {
                cue.push(' ');
            }
            cue.push_str(word);
        }
    }
    cues
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn timestamp(seconds: f32) -> String {
    let ms = (f64::from(seconds) * 1000.0).round() as u64;
    format!("{:02}:{:02}:{:02}.{:03}", ms / 3_600_000, ms / 60_000 % 60, ms / 1000 % 60, ms % 1000)
}

#[cfg(test)]
mod tests {
    use super::super::script;
    use super::*;

    #[test]
    fn cues_cover_the_film_from_its_first_to_its_last_moment() {
        let file =
            write(&script::write("A quiet lake at dawn. Birds rise, one by one", 10, 1, None));
        let times: Vec<_> = file.lines().filter_map(|line| line.split_once(" --> ")).collect();
        assert_eq!(times.first().unwrap().0, "00:00:00.000");
        assert_eq!(times.last().unwrap().1, "00:00:10.000");
        assert!(times.windows(2).all(|pair| pair[0].1 == pair[1].0));
    }

    #[test]
    fn a_long_beat_is_read_in_several_cues_and_nothing_is_lost() {
        let prompt = "slowly ".repeat(100);
        let file = write(&script::write(&prompt, 20, 1, None));
        assert_eq!(file.matches("slowly").count(), 100);
        assert!(file.lines().all(|line| line.len() < 120));
    }

    #[test]
    fn text_cannot_forge_a_cue() {
        let file = write(&script::write("x\n\n00:00:00.000 --> 00:01:00.000\n<b>&", 5, 1, None));
        assert_eq!(file.matches(" --> ").count(), 1);
        assert!(file.contains("--&gt;") && file.contains("&lt;b&gt;&amp;"));
    }
}
