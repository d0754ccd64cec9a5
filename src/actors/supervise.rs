//! The owner of each background task: it sees the panic that would end one for good, unseen, and
//! begins the task anew.

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures_util::FutureExt;
use metrics::counter;
use tokio::time::Instant;

use crate::telemetry;

const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// Also how long a task goes well until its next panic counts as its first.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Runs a task until it ends by itself. After a panic it is made anew, each time a little later: what
/// two of them must not do at once is handed in by `make`, and what one has left is taken up as after
/// a start of the server.
pub async fn supervise<T: Future<Output = ()>>(task: &'static str, mut make: impl FnMut() -> T) {
    // Else its first panic would be no increase.
    debug_assert!(telemetry::BACKGROUND_TASKS.contains(&task), "{task}");
    let mut pause = FIRST_PAUSE;
    loop {
        let began = Instant::now();
        let running = AssertUnwindSafe(async { make().await }).catch_unwind();
        let Err(panic) = running.await else { return };
        if began.elapsed() >= LONGEST_PAUSE {
            pause = FIRST_PAUSE;
        }
        counter!(telemetry::BACKGROUND_PANICS, "task" => task).increment(1);
        let (cause, pause_s) = (words_of(panic.as_ref()), pause.as_secs());
        tracing::error!(task, cause, pause_s, "a background task has panicked; it is begun anew");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

fn words_of(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it said nothing")
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_task_that_panics_is_begun_anew_after_a_pause_and_may_end() {
        let (began, runs) = (Instant::now(), Cell::new(0));
        supervise("timekeeper", || {
            runs.set(runs.get() + 1);
            let run = runs.get();
            async move { assert_ne!(run, 1, "the first goes wrong") }
        })
        .await;
        assert_eq!((runs.get(), began.elapsed().as_secs()), (2, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn the_pause_grows_to_a_minute_and_begins_anew_after_a_good_one() {
        let at = RefCell::new(Vec::new());
        let mut last = Instant::now();
        supervise("timekeeper", || {
            at.borrow_mut().push(last.elapsed().as_secs());
            let run = at.borrow().len();
            last = Instant::now();
            async move {
                match run {
                    10 => tokio::time::sleep(LONGEST_PAUSE).await,
                    12 => return,
                    _ => {}
                }
                panic!("{run}");
            }
        })
        .await;
        assert_eq!(*at.borrow(), [0, 1, 2, 4, 8, 16, 32, 60, 60, 60, 61, 2]);
    }

    #[test]
    fn the_words_of_a_panic_are_told() {
        assert_eq!(words_of(&"a"), "a");
        assert_eq!(words_of(&"b".to_owned()), "b");
        assert_eq!(words_of(&7), "it said nothing");
    }
}
