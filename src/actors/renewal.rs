//! Writes the read model anew once somebody was erased. SQLite clears the rows that go, but not every
//! copy that it left of a row when it put a page in order; a new file has the rows alone. It is made
//! beside the one that is read and takes its place as a rebuilt one does: the projector finds it.
//!
//! Whether it is to be done stands in the file itself, so that no crash makes it forgotten; and all
//! that were deleted meanwhile go at once.

use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::Arbiter;

use super::supervise::supervise;
use super::{System, rebuild};
use crate::views::{self, Views};

/// How often it looks; the read model's movement wakes it sooner.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// Movements come in bursts.
const AT_MOST_EVERY: Duration = Duration::from_secs(1);
/// It rests so many times as long as it wrote: a large file is written seldom.
const REST: u32 = 10;
/// How long it waits when it could not be done, or somebody else builds there.
const AFTER_A_FAILURE: Duration = Duration::from_secs(60);
const BETWEEN_TRIES: Duration = Duration::from_secs(5);
/// How long it waits for what it made to be taken over.
const TAKEN_OVER_WITHIN: Duration = Duration::from_secs(60);

/// Looks for as long as the actix system runs, on a thread of its own.
pub fn start(system: Arc<System>) {
    Arbiter::new().spawn(supervise("renewal", move || keep_clear(Arc::clone(&system))));
}

async fn keep_clear(system: Arc<System>) {
    let mut moved = system.progress.clone();
    loop {
        let rest = match look(&system.views).await {
            Ok(took) => AT_MOST_EVERY.max(took * REST),
            Err(views::Error::Rebuilding) => BETWEEN_TRIES,
            Err(error) => {
                tracing::warn!(
                    %error,
                    "what may be left of erased users in the read model could not be cleared"
                );
                AFTER_A_FAILURE
            }
        };
        tokio::time::sleep(rest).await;
        let _ = tokio::time::timeout(LOOK_EVERY - AT_MOST_EVERY, moved.moved()).await;
    }
}

/// Renews the read model if that is necessary; when it returns, the new one is read. Says how long
/// the writing took.
///
/// # Errors
/// The files cannot be read or written, or somebody else builds beside them.
pub async fn look(views: &Views) -> Result<Duration, views::Error> {
    let mut took = Duration::ZERO;
    // Another one that was built beside comes first: it may have to be renewed too.
    if views.holds_residue()? && !views.is_outdated()? {
        let began = Instant::now();
        // What others left there takes room too.
        views.sweep();
        rebuild::ensure_room(&views.path())?;
        let shared = views.clone();
        let renewing = tokio::task::spawn_blocking(move || shared.renew());
        renewing.await.map_err(|error| views::Error::Io(std::io::Error::other(error)))??;
        took = began.elapsed();
    }
    rebuild::taken_over(views, TAKEN_OVER_WITHIN).await?;
    Ok(took)
}
