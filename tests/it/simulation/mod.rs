//! Simulations: the real entities, projectors, leasing and background actors of two nodes, on one
//! thread, over a log and an object store that fail, with clocks that jump. All that happens follows
//! from a number, the seed; models check every answer and what must always hold.
//!
//! - `SIM_SEED=7 cargo test --test it simulation` runs one seed and prints what happened.
//! - `SIM_SEEDS=100000` runs so many, `SIM_FROM` says where to begin.

mod answers;
mod dice;
mod found;
mod log;
mod node;
mod rest;
mod rules;
mod steps;
mod store;
mod world;

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use sha2::{Digest, Sha256};

use dice::Dice;
use world::World;

/// In CI; about a minute on one core.
const SEEDS: u64 = 500;
/// Between two rests.
const STEPS: u64 = 60;
const RESTS: u64 = 2;
/// Of a seed that failed.
const SHOWN: usize = 60;

/// How a seed went.
struct Run {
    trace: Vec<String>,
    wrong: Option<String>,
    /// What happened, by name and how often.
    counted: BTreeMap<&'static str, u64>,
}

impl Run {
    fn hash(&self) -> String {
        hex::encode(Sha256::digest(self.trace.join("\n")))
    }
}

/// Time passes when nobody has anything to do.
fn on_one_thread<T>(story: impl Future<Output = T>) -> T {
    let system = actix::System::with_tokio_rt(|| {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        runtime.enable_all().start_paused(true).build().unwrap()
    });
    system.block_on(story)
}

fn run(seed: u64) -> Run {
    on_one_thread(async move {
        let world = World::new(seed);
        let mut dice = Dice::of(seed, "steps", 0);
        'run: for rest in 0..RESTS {
            for _ in 0..STEPS {
                steps::step(&world, &mut dice).await;
                if world.went_wrong() {
                    break 'run;
                }
            }
            world.rest().await;
            let last = rest + 1 == RESTS;
            let checked =
                if last { rest::check_all(&world).await } else { rest::check(&world).await };
            if let Err(wrong) = checked {
                world.fail(wrong);
                break;
            }
            steps::leap(&world, &mut dice);
            world.rest().await;
            world.stir();
        }
        let mut counted = world.counted.borrow().clone();
        counted.extend(world.storage.struck.lock().unwrap().clone());
        let seen = std::mem::take(&mut *world.seen.lock().unwrap());
        Run { trace: seen.trace, wrong: seen.wrong, counted }
    })
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a number"))
}

fn assert_right(seed: u64, run: &Run) {
    if let Some(wrong) = &run.wrong {
        let shown = &run.trace[run.trace.len().saturating_sub(SHOWN)..];
        panic!("SIM_SEED={seed}: {wrong}\n{}", shown.join("\n"));
    }
}

#[test]
fn no_seed_brings_about_what_must_not_be() {
    if let Some(seed) = number("SIM_SEED") {
        let run = run(seed);
        println!("{}", run.trace.join("\n"));
        return assert_right(seed, &run);
    }
    let (from, seeds) = (number("SIM_FROM").unwrap_or(0), number("SIM_SEEDS").unwrap_or(SEEDS));
    let (next, counted) = (AtomicU64::new(from), Mutex::new(BTreeMap::new()));
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::SeqCst);
            if seed >= from + seeds {
                return;
            }
            let run = run(seed);
            if run.wrong.is_some() {
                // The others need not go on.
                next.store(u64::MAX / 2, Ordering::SeqCst);
            }
            assert_right(seed, &run);
            for (what, times) in run.counted {
                *counted.lock().unwrap().entry(what).or_insert(0) += times;
            }
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        (0..threads).for_each(|_| drop(scope.spawn(work)));
    });
    let counted = counted.into_inner().unwrap();
    println!("{counted:?}");
    // A simulation in which nothing goes wrong shows nothing.
    for what in HAPPENS {
        assert!(seeds < SEEDS || counted.contains_key(what), "it never happened: {what}");
    }
}

/// What is to be seen in so many seeds.
const HAPPENS: [&str; 19] = [
    "callers gone",
    "completed",
    "conflict",
    "done",
    "landed late",
    "lease lost",
    "leased",
    "no keys",
    "not written",
    "nothing to do",
    "read failed",
    "refused",
    "the handle is broken",
    "told to stop",
    "unavailable",
    "under way",
    "views lost",
    "views rebuilt",
    "written, and the answer lost",
];

#[test]
fn the_same_seed_is_the_same_story() {
    for seed in 0..6 {
        let [one, two] = [run(seed), run(seed)];
        let differs = one.trace.iter().zip(&two.trace).position(|(one, two)| one != two);
        if let Some(at) = differs {
            let from = at.saturating_sub(10);
            panic!("{:#?}\nor {:#?}", &one.trace[from..=at], two.trace[at]);
        }
        assert_eq!(one.hash(), two.hash());
    }
    assert_ne!(run(0).hash(), run(1).hash());
}
