//! The built-in engine: draws a short film about a prompt, as moving scenery with the prompt's
//! words set into it. It needs no model, no network and no other program.
use std::fs;
use std::ops::{ControlFlow, Range};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;

use super::{Error, MAX_DURATION_S, OnProgress, Rendered, Spec};

mod canvas;
mod captions;
mod encode;
mod palette;
mod poster;
mod random;
mod scene;
mod script;
mod silhouettes;
mod type_setting;

use encode::{Group, GroupEncoder};
use scene::Scene;

/// Renders `video.mp4`, `poster.jpg` and `captions.vtt` into a directory that exists.
///
/// Blocks until done, on `threads` threads of its own that inherit the caller's priority: call it
/// on a thread of low priority, never on a server's async one. Memory holds one raw frame a
/// thread, and the encoded film.
///
/// # Errors
/// [`Error::Invalid`] for a specification out of bounds or a prompt with nothing visible in it,
/// [`Error::Cancelled`] after `on_progress` broke off, [`Error::Failed`] if disk or encoder do.
/// None of them leaves a file.
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
    let groups = film(spec, &scene, threads, on_progress)?;
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

/// All groups in order. A second each: long enough to compress, short enough that two threads end
/// at about the same time and progress moves.
fn film(
    spec: &Spec,
    scene: &Scene<'_>,
    threads: usize,
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
                    let group = encode_group(spec, scene, frames_of(spec, number), stop);
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
    for finished in 1..=groups.len() {
        let Ok(group) = done.recv() else {
            return Err(Error::Failed("a render thread ended early".to_owned()));
        };
        let (number, group) = group?;
        groups[number] = group;
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
