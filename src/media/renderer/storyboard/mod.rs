//! The built-in engine: draws a short film about a prompt, as moving scenery with the prompt's
//! words set into it. It needs no model, no network and no other program.
use std::fs;
use std::ops::{ControlFlow, Range};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use super::{Error, MAX_DURATION_S, OnProgress, Rendered, Spec};

mod canvas;
mod captions;
mod encode;
mod palette;
mod poster;
mod random;
mod scene;
mod script;
mod segments;
mod silhouettes;
mod type_setting;

use encode::{Group, GroupEncoder};
use scene::Scene;
use segments::Segments;

/// Renders `video.mp4`, `poster.jpg` and `captions.vtt` into a directory that exists.
///
/// Blocks until done, on `threads` threads of its own that inherit the caller's priority: call it
/// on a thread of low priority, never on a server's async one. Memory holds one raw frame a
/// thread, and the encoded film.
///
/// Each finished second is kept in `segments/` there: a render of the same specification that is
/// started again in the same directory, after a crash as after an error, goes on where it stopped.
/// The directory is the caller's to remove.
///
/// # Errors
/// [`Error::Invalid`] for a specification out of bounds or a prompt with nothing visible in it,
/// [`Error::Cancelled`] after `on_progress` broke off, [`Error::Failed`] if disk or encoder do.
/// None of them leaves a file but finished segments.
pub fn render(
    spec: &Spec,
    directory: &Path,
    threads: usize,
    on_progress: &mut OnProgress<'_>,
) -> Result<Rendered, Error> {
    validate(spec)?;
    let rendered = Rendered {
        video: directory.join("video.mp4"),
        poster: directory.join("poster.jpg"),
        captions: directory.join("captions.vtt"),
        duration_ms: u64::from(spec.duration_s) * 1000,
        width: spec.width,
        height: spec.height,
    };
    let script = script::write(&spec.prompt, spec.duration_s, spec.seed, spec.style.as_deref());
    let scene = Scene::new(&script, spec.width, spec.height)?;
    let groups = film(spec, &scene, threads, &Segments::open(directory, spec), on_progress)?;
    write_files(spec, &scene, &script, &groups, &rendered).inspect_err(|_| {
        for file in [&rendered.video, &rendered.poster, &rendered.captions] {
            let _ = fs::remove_file(file);
        }
    })?;
    Ok(rendered)
}

fn validate(spec: &Spec) -> Result<(), Error> {
    let invalid = |what: &str| Err(Error::Invalid(what.to_owned()));
    if !(1..=MAX_DURATION_S).contains(&spec.duration_s) {
        return invalid("the duration must be 1 to 60 seconds");
    }
    if !(1..=60).contains(&spec.frames_per_second) {
        return invalid("the frame rate must be 1 to 60 a second");
    }
    let (long, short) = (spec.width.max(spec.height), spec.width.min(spec.height));
    if short < 64 || long > 3840 || short > 2160 || !(long | short).is_multiple_of(2) {
        return invalid("the frame must be even, at least 64 and at most 3840x2160 pixels");
    }
    if script::clean(&spec.prompt).is_empty() {
        return invalid("the prompt has no visible text");
    }
    Ok(())
}

/// How long a group may keep the caller from breaking off.
const ASK_EVERY: Duration = Duration::from_millis(50);

/// All groups in order. A second each: long enough to compress, short enough that two threads end
/// at about the same time and progress moves.
fn film(
    spec: &Spec,
    scene: &Scene<'_>,
    threads: usize,
    segments: &Segments,
    on_progress: &mut OnProgress<'_>,
) -> Result<Vec<Group>, Error> {
    let total = spec.duration_s as usize;
    let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let mut groups: Vec<Group> = (0..total).map(|_| Group::new()).collect();
    thread::scope(|scope| {
        let (sender, done) = mpsc::channel();
        for _ in 0..threads.clamp(1, total) {
            let (sender, next, stop) = (sender.clone(), &next, &stop);
            scope.spawn(move || {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= total || stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let group = match segments.finished(number) {
                        Some(group) => Ok(group),
                        None => encode_group(spec, scene, frames_of(spec, number), stop)
                            .inspect(|group| segments.keep(number, group)),
                    };
                    if sender.send(group.map(|group| (number, group))).is_err() {
                        return;
                    }
                }
            });
        }
        // Our own sender must go, or the loop below would wait for it for ever.
        drop(sender);
        let collected = collect(&done, &mut groups, on_progress);
        stop.store(true, Ordering::Relaxed);
        collected
    })?;
    Ok(groups)
}

fn collect(
    done: &mpsc::Receiver<Result<(usize, Group), Error>>,
    groups: &mut [Group],
    on_progress: &mut OnProgress<'_>,
) -> Result<(), Error> {
    let mut finished = 0;
    while finished < groups.len() {
        match done.recv_timeout(ASK_EVERY) {
            Ok(group) => {
                let (number, group) = group?;
                groups[number] = group;
                finished += 1;
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                return Err(Error::Failed("a render thread ended early".to_owned()));
            }
        }
        let percent = finished as f32 * 100.0 / groups.len() as f32;
        if let ControlFlow::Break(()) = on_progress(percent) {
            return Err(Error::Cancelled);
        }
    }
    Ok(())
}

fn frames_of(spec: &Spec, group: usize) -> Range<u32> {
    let first = group as u32 * spec.frames_per_second;
    first..first + spec.frames_per_second
}

fn encode_group(
    spec: &Spec,
    scene: &Scene<'_>,
    frames: Range<u32>,
    stop: &AtomicBool,
) -> Result<Group, Error> {
    let mut encoder = GroupEncoder::new(spec)?;
    let mut brush = scene.brush()?;
    for frame in frames {
        if stop.load(Ordering::Relaxed) {
            return Err(Error::Cancelled);
        }
        let at_s = frame as f32 / spec.frames_per_second as f32;
        let picture = brush.draw(at_s);
        encoder.push(picture, fade(at_s, spec.duration_s as f32))?;
    }
    Ok(encoder.finish())
}

/// Out of the dark at the start and back into it at the end.
fn fade(at_s: f32, duration_s: f32) -> f32 {
    let length_s = (duration_s * 0.15).min(0.5);
    random::smooth((at_s + 0.08) / length_s).min(random::smooth((duration_s - at_s) / length_s))
}

fn write_files(
    spec: &Spec,
    scene: &Scene<'_>,
    script: &script::Script,
    groups: &[Group],
    rendered: &Rendered,
) -> Result<(), Error> {
    let captions = captions::write(script);
    fs::write(&rendered.captions, captions)
        .map_err(|error| Error::Failed(format!("writing the captions: {error}")))?;
    let mut brush = scene.brush()?;
    poster::write(brush.draw(scene.poster_s()), &rendered.poster)?;
    encode::write_mp4(groups, spec, &rendered.video)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::media::renderer::{FRAMES_PER_SECOND, dimensions};

    fn spec(prompt: &str, aspect_ratio: &str) -> Spec {
        let (width, height) = dimensions("480p", aspect_ratio).unwrap();
        Spec {
            prompt: prompt.to_owned(),
            seed: 7,
            duration_s: 2,
            width,
            height,
            frames_per_second: FRAMES_PER_SECOND,
            style: None,
        }
    }

    fn keep_going(_: f32) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    /// The video, poster and captions of a render on so many threads.
    fn files(spec: &Spec, threads: usize) -> [Vec<u8>; 3] {
        let directory = tempfile::tempdir().unwrap();
        let rendered = render(spec, directory.path(), threads, &mut keep_going).unwrap();
        [rendered.video, rendered.poster, rendered.captions].map(|file| fs::read(file).unwrap())
    }

    #[test]
    fn the_same_prompt_and_seed_give_the_same_bytes_on_any_number_of_threads() {
        let spec = spec("fireflies over a quiet lake", "16:9");
        assert!(files(&spec, 1) == files(&spec, 3));
    }

    #[test]
    fn another_seed_gives_another_film() {
        let one = spec("a valley", "1:1");
        let other = Spec { seed: 8, ..one.clone() };
        assert!(files(&one, 2)[0] != files(&other, 2)[0]);
    }

    #[test]
    fn every_aspect_ratio_has_a_video_with_its_index_first_and_a_poster_of_its_size() {
        for aspect_ratio in ["16:9", "9:16", "1:1"] {
            let spec = spec("snow on the city, a rocket to the stars", aspect_ratio);
            let [video, poster, _] = files(&spec, 2);
            let find = |name: &[u8]| video.windows(4).position(|at| at == name).unwrap();
            assert!(find(b"ftyp") < find(b"moov") && find(b"moov") < find(b"mdat"));
            let poster = image::load_from_memory(&poster).unwrap();
            assert_eq!((poster.width(), poster.height()), (spec.width, spec.height));
        }
    }

    #[test]
    fn progress_rises_to_a_hundred_a_group_at_a_time() {
        let directory = tempfile::tempdir().unwrap();
        let mut seen = Vec::new();
        let mut note = |percent: f32| {
            seen.push(percent);
            ControlFlow::Continue(())
        };
        render(&spec("dunes", "1:1"), directory.path(), 2, &mut note).unwrap();
        // It is asked between groups too.
        seen.dedup();
        seen.retain(|percent| *percent > 0.0);
        assert_eq!(seen, [50.0, 100.0]);
    }

    #[test]
    fn breaking_off_ends_the_render_and_leaves_finished_segments_alone() {
        let directory = tempfile::tempdir().unwrap();
        let mut calls = 0;
        let mut stop = |_: f32| {
            calls += 1;
            ControlFlow::Break(())
        };
        let long = Spec { duration_s: 60, ..spec("a long way", "1:1") };
        let result = render(&long, directory.path(), 2, &mut stop);
        assert!(matches!(result, Err(Error::Cancelled)));
        assert_eq!(calls, 1);
        let left: Vec<_> = fs::read_dir(directory.path()).unwrap().flatten().collect();
        assert_eq!(left.iter().map(|it| it.file_name()).collect::<Vec<_>>(), ["segments"]);
    }

    #[test]
    fn a_render_that_broke_off_goes_on_where_it_stopped_and_gives_the_same_bytes() {
        let spec = Spec { duration_s: 4, ..spec("a ship in the night", "1:1") };
        let directory = tempfile::tempdir().unwrap();
        let mut until_half = |percent: f32| match percent {
            50.0.. => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        };
        let broken = render(&spec, directory.path(), 1, &mut until_half);
        assert!(matches!(broken, Err(Error::Cancelled)));
        let segments = Segments::open(directory.path(), &spec);
        assert!(segments.finished(0).is_some() && segments.finished(1).is_some());
        // A segment that was damaged, or is another film's, is drawn again.
        segments.keep(3, &vec![b"not a frame".to_vec()]);
        let torn = fs::read_dir(directory.path().join("segments")).unwrap().flatten();
        let torn = torn.map(|it| it.path()).max().unwrap();
        let bytes = fs::read(&torn).unwrap();
        fs::write(&torn, &bytes[..bytes.len() - 1]).unwrap();
        let other = Spec { seed: 99, ..spec.clone() };
        assert!(Segments::open(directory.path(), &other).finished(0).is_none());

        let first = fs::metadata(segments.path(0)).unwrap().modified().unwrap();
        let resumed = render(&spec, directory.path(), 2, &mut keep_going).unwrap();
        assert_eq!(fs::metadata(segments.path(0)).unwrap().modified().unwrap(), first);
        assert!(fs::read(resumed.video).unwrap() == files(&spec, 2)[0]);
    }

    #[test]
    fn text_that_upsets_renderers_renders() {
        let prompt = "\u{202E}שלום 🦊 \u{0} مرحبا 你好世界 --> <b> ".repeat(40) + &"x".repeat(900);
        files(&Spec { duration_s: 1, ..spec(&prompt, "9:16") }, 2);
    }

    #[test]
    fn what_cannot_be_rendered_is_refused_before_any_work() {
        let good = spec("a valley", "16:9");
        let bad = [
            Spec { duration_s: 0, ..good.clone() },
            Spec { duration_s: 61, ..good.clone() },
            Spec { width: 641, ..good.clone() },
            Spec { width: 7680, ..good.clone() },
            Spec { frames_per_second: 0, ..good.clone() },
            Spec { prompt: " \n\u{7}".to_owned(), ..good },
        ];
        for spec in bad {
            let directory = tempfile::tempdir().unwrap();
            let result = render(&spec, directory.path(), 2, &mut keep_going);
            assert!(matches!(result, Err(Error::Invalid(_))), "{spec:?}");
            assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
        }
    }
}
