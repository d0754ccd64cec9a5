//! A rebuild: the whole log once more, into views that nobody reads yet. Events are folded one after
//! the other, on a thread of its own; meanwhile the next pages are read and decoded, on threads beside
//! the runtime's, which may be a single one and a server's.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use chrono::{DateTime, Utc};
use futures_util::stream::{self, BoxStream};
use futures_util::{Stream, StreamExt};
use serde::Serialize;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::keyring::Keyring;
use super::projector::{self, Error};
use crate::clock::Clock;
use crate::log::{self, EventLog, Recorded};
use crate::media::disk::Space;
use crate::views::{self, Building, Difference, Happened, Snapshot, Views};

/// How long a rebuild waits for what else is being built beside the views, as by a renewal.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a rebuild waits to be taken over: what was appended while it was built comes first.
const TAKEN_OVER_WITHIN: Duration = Duration::from_secs(600);
/// How often it looks whether what it built has been taken over, or whether it may begin.
const LOOK: Duration = Duration::from_millis(100);
/// Events that are handed on at once.
const BATCH: usize = if cfg!(test) { 4 } else { 512 };
/// Pages that are read at a time.
const AT_ONCE: usize = 4;
/// Threads that decode, each in its turn.
const DECODERS: usize = 2;
/// Pages that wait for each of them, and batches of each that wait to be folded, at the most.
const AHEAD: usize = 4;

/// Begins beside the views called `base`, when nobody builds there any more.
///
/// # Errors
/// [`views::Error::Rebuilding`] when somebody does so for long, [`views::Error::NoRoom`].
pub async fn beside(base: &Path) -> Result<Building, views::Error> {
    let give_up = Instant::now() + PATIENCE;
    loop {
        match Building::beside(base) {
            Err(views::Error::Rebuilding) if Instant::now() < give_up => {
                tokio::time::sleep(LOOK).await;
            }
            // Now that what an earlier attempt left has made room.
            Ok(building) => return ensure_room(base).map(|()| building),
            Err(error) => return Err(error),
        }
    }
}

/// Whether the disk has room for views as large as the present ones beside them: for the rows, and for
/// what is sorted on the way to the indexes.
///
/// # Errors
/// [`views::Error::NoRoom`]
pub fn ensure_room(base: &Path) -> Result<(), views::Error> {
    let present = views::present_file(base)?;
    let size = match std::fs::metadata(&present) {
        // Nobody knows how large they will be.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        about => about?.len(),
    };
    let needed = size + size / 2;
    let free = Space::of(&present)?.free;
    if free < needed { Err(views::Error::NoRoom { needed, free }) } else { Ok(()) }
}

/// Waits until whoever reads `views` has put in their place what was built beside them.
///
/// # Errors
/// [`views::Error::NotTakenOver`] when that takes longer than `within`.
pub async fn taken_over(views: &Views, within: Duration) -> Result<(), views::Error> {
    let give_up = Instant::now() + within;
    while views.is_outdated()? {
        if Instant::now() >= give_up {
            return Err(views::Error::NotTakenOver);
        }
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}

/// Why an event is not to be passed over.
#[derive(Debug, thiserror::Error)]
pub enum Unskippable {
    #[error("the log ends at {head}: there is no {position}")]
    Beyond { position: u64, head: u64 },
    #[error("the log has no event at {position}")]
    Nothing { position: u64 },
    /// It would be applied all the same, and passed over unseen if it became unreadable one day.
    #[error("the event at {position} can be read: nothing stands still there")]
    Readable { position: u64 },
    #[error(transparent)]
    Unknown(#[from] Error),
}

/// Whether at each of these positions there is an event that no view can take in, which alone may be
/// passed over.
///
/// # Errors
/// [`Unskippable`], of the first that is none.
pub async fn ensure_unreadable(
    log: &dyn EventLog,
    keyring: &Keyring,
    positions: &[u64],
) -> Result<(), Unskippable> {
    for &position in positions {
        let head = *log.head().borrow();
        if position > head {
            return Err(Unskippable::Beyond { position, head });
        }
        let before = position.saturating_sub(1);
        let found = projector::next(log, keyring, before, position, 1).await?;
        match found.first() {
            Some(found) if found.position == position && found.entity.is_unreadable() => {}
            Some(found) if found.position == position => {
                return Err(Unskippable::Readable { position });
            }
            _ => return Err(Unskippable::Nothing { position }),
        }
    }
    Ok(())
}

/// Takes in the log up to `until`; `seen` hears of each position reached. The building is given
/// back at that position, or where the log ends if that is before.
///
/// # Errors
/// The log cannot be read, or the file not written; the building is lost then.
pub async fn rebuild(
    log: Arc<dyn EventLog>,
    keyring: Keyring,
    building: Building,
    until: u64,
    mut seen: impl FnMut(u64) + Send + 'static,
) -> Result<Building, Error> {
    let building = building.with_stride(log.stride());
    let from = building.checkpoint();
    let started = (0..DECODERS).map(|_| decoder(&keyring, until)).collect::<io::Result<Vec<_>>>();
    let (pages, decoders) = started.map_err(views::Error::Io)?.into_iter().unzip();
    let folding = tokio::task::spawn_blocking(move || fold(building, decoders, until, &mut seen));
    let reading = read(log, from, until, pages).await;
    let folded = folding.await.map_err(|error| views::Error::Io(io::Error::other(error)))?;
    reading?;
    folded
}

/// Fills views that have nothing yet up to `until`: faster than to follow the log, which must be able
/// to stop at any moment.
///
/// # Errors
/// As [`rebuild`]; the views are as before then.
pub async fn fill(
    log: Arc<dyn EventLog>,
    keyring: Keyring,
    views: &Views,
    until: u64,
) -> Result<(), Error> {
    let building = beside(&views.path()).await?;
    let built = rebuild(log, keyring, building, until, |_| ()).await?;
    let fresh = blocking(move || built.finish_as_current()).await?;
    Ok(views.replace_with(fresh)?)
}

/// A thread that decodes. It stays the same one, and so what it needs stays near its processor.
struct Decoder {
    batches: mpsc::Receiver<Result<Vec<Happened>, Error>>,
    thread: JoinHandle<()>,
}

/// With where its pages go.
fn decoder(keyring: &Keyring, until: u64) -> io::Result<(mpsc::Sender<Vec<Recorded>>, Decoder)> {
    let (pages, mut to_decode) = mpsc::channel(AHEAD);
    let (decoded, batches) = mpsc::channel(AHEAD);
    let (keyring, runtime) = (keyring.clone(), Handle::current());
    let thread = thread::Builder::new().name("replay-decode".into()).spawn(move || {
        while let Some(page) = to_decode.blocking_recv() {
            let batch = runtime.block_on(projector::understand(&keyring, page, until));
            if decoded.blocking_send(batch).is_err() {
                break;
            }
        }
    })?;
    Ok((pages, Decoder { batches, thread }))
}

/// Ends early when nobody folds any more; why not is what the folding answers.
async fn read(
    log: Arc<dyn EventLog>,
    from: u64,
    until: u64,
    decoders: Vec<mpsc::Sender<Vec<Recorded>>>,
) -> Result<(), Error> {
    let mut pages = pages(log, from, until);
    for decoder in decoders.iter().cycle() {
        let Some(page) = pages.next().await else { break };
        if decoder.send(page?).await.is_err() {
            break;
        }
    }
    Ok(())
}

/// One page after the other, up to `until` or to where the log ends. Where the next page begins is
/// known beforehand only if positions leave no gaps.
fn pages(
    log: Arc<dyn EventLog>,
    from: u64,
    until: u64,
) -> BoxStream<'static, Result<Vec<Recorded>, Error>> {
    let gapless = log.stride() == 1;
    let page = move |after: u64| {
        let log = Arc::clone(&log);
        // Where there are no gaps nothing is read that is not asked for: it may be damaged.
        let most = if gapless { until - after } else { u64::MAX };
        let most = usize::try_from(most).map_or(BATCH, |most| most.min(BATCH));
        async move { Ok(log.read_all(after, most).await?) }
    };
    if gapless {
        let pages = stream::iter((from..until).step_by(BATCH)).map(page).buffered(AT_ONCE);
        return until_cut_short(pages).boxed();
    }
    let next = move |after| {
        let page = (after < until).then(|| page(after));
        async move {
            let Some(page) = page else { return Ok(None) };
            let page = page.await?;
            Ok(page.last().map(|last| last.position).map(|last| (page, last)))
        }
    };
    stream::try_unfold(from, next).boxed()
}

/// Up to the first page that is not a whole one: there the log ended, and whatever the next ones show
/// came later, perhaps behind a gap.
fn until_cut_short(
    pages: impl Stream<Item = Result<Vec<Recorded>, Error>> + Unpin + Send,
) -> impl Stream<Item = Result<Vec<Recorded>, Error>> + Send {
    stream::unfold(Some(pages), async |pages| {
        let mut pages = pages?;
        let page = pages.next().await?;
        let is_whole = page.as_ref().is_ok_and(|page| page.len() == BATCH);
        Some((page, is_whole.then_some(pages)))
    })
}

fn fold(
    mut building: Building,
    mut decoders: Vec<Decoder>,
    until: u64,
    seen: &mut impl FnMut(u64),
) -> Result<Building, Error> {
    for turn in (0..decoders.len()).cycle() {
        let Some(batch) = decoders[turn].batches.blocking_recv() else { break };
        building.apply(&batch?, until)?;
        seen(building.checkpoint());
    }
    // What was decoded and not folded is let go first: a thread that waits to hand it on would not end.
    let threads: Vec<_> = decoders.into_iter().map(|decoder| decoder.thread).collect();
    for thread in threads {
        let panicked = |_| views::Error::Io(io::Error::other("a page was not decoded to its end"));
        thread.join().map_err(panicked)?;
    }
    Ok(building)
}

/// The rebuilds of a running server, one at a time. What is built takes the place of what is read
/// as any other does that somebody built beside it: the projector finds it.
#[derive(Clone)]
pub struct Rebuilds {
    clock: Clock,
    log: Arc<dyn EventLog>,
    keyring: Keyring,
    views: Views,
    last: Arc<Mutex<Option<Status>>>,
}

/// How far a rebuild is, or how it ended.
#[derive(Debug, Clone, Serialize, utoipa::ToSchema)]
#[schema(as = ReplayStatus)]
pub struct Status {
    #[schema(value_type = String, examples("running", "completed", "failed"))]
    pub state: State,
    /// Reached so far, and to be reached.
    pub position: u64,
    pub until: u64,
    pub started_at: DateTime<Utc>,
    pub finished_at: Option<DateTime<Utc>>,
    /// Why it failed.
    pub error: Option<String>,
    /// What was compared only: each table with what differs.
    pub differences: Option<Vec<Difference>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    Running,
    Completed,
    Failed,
}

/// Why a rebuild does not begin; nothing was changed then.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// Another one has not ended yet.
    #[error("a rebuild is under way")]
    UnderWay,
    #[error(transparent)]
    Unskippable(#[from] Unskippable),
    #[error("noting what is to be passed over: {0}")]
    Io(#[from] std::io::Error),
}

impl Rebuilds {
    pub fn new(clock: Clock, log: Arc<dyn EventLog>, keyring: Keyring, views: Views) -> Self {
        Self { clock, log, keyring, views, last: Arc::default() }
    }

    /// The one under way, else the last; none since the start.
    pub fn status(&self) -> Option<Status> {
        self.locked().clone()
    }

    /// Begins one in the background: to replace what is read, or only to `compare` with it. The
    /// positions of `skip` are passed over from then on.
    ///
    /// # Errors
    /// [`Refused`]
    pub async fn start(&self, compare: bool, skip: &[u64]) -> Result<Status, Refused> {
        ensure_unreadable(&*self.log, &self.keyring, skip).await?;
        self.begin(compare, skip)
    }

    fn begin(&self, compare: bool, skip: &[u64]) -> Result<Status, Refused> {
        let mut last = self.locked();
        if last.as_ref().is_some_and(|last| last.state == State::Running) {
            return Err(Refused::UnderWay);
        }
        let status = Status {
            state: State::Running,
            position: 0,
            until: *self.log.head().borrow(),
            started_at: self.clock.now(),
            finished_at: None,
            error: None,
            differences: None,
        };
        *last = Some(status.clone());
        drop(last);
        let (rebuilds, skip) = (self.clone(), skip.to_vec());
        tokio::spawn(async move {
            let outcome = match compare {
                true => rebuilds.compare().await,
                false => rebuilds.replace(&skip).await,
            };
            let (state, why) = match outcome {
                Ok(()) => (State::Completed, None),
                Err(error) => {
                    tracing::error!(%error, "the read model could not be rebuilt");
                    (State::Failed, Some(sentence(&error)))
                }
            };
            let finished_at = Some(rebuilds.clock.now());
            rebuilds.note(|status| {
                (status.state, status.finished_at, status.error) = (state, finished_at, why);
            });
        });
        Ok(status)
    }

    /// What of `skip` is passed over is noted once nothing can refuse the replacement.
    async fn replace(&self, skip: &[u64]) -> Result<(), Error> {
        let base = self.views.path();
        let known = views::skipped(&base).map_err(views::Error::from)?;
        let skipped = BTreeSet::from_iter(known.iter().chain(skip).copied());
        let building = beside(&base).await?.passing_over(Arc::new(skipped));
        let until = *self.log.head().borrow();
        let (log, keyring) = (Arc::clone(&self.log), self.keyring.clone());
        let built = rebuild(log, keyring, building, until, self.seen()).await?;
        let (views, skip) = (self.views.clone(), skip.to_vec());
        let finish = move || {
            built.ensure_no_worse_than(views.reach()?.as_ref())?;
            let note = || match skip.is_empty() {
                true => Ok(()),
                false => views::skip(&base, &skip).map_err(views::Error::from),
            };
            built.finish_as_current_after(note).map(drop)
        };
        blocking(finish).await?;
        Ok(taken_over(&self.views, TAKEN_OVER_WITHIN).await?)
    }

    async fn compare(&self) -> Result<(), Error> {
        let until = self.views.checkpoint();
        self.note(|status| status.until = until);
        let building = beside(&self.views.path()).await?;
        let replay = |building, until| {
            rebuild(Arc::clone(&self.log), self.keyring.clone(), building, until, self.seen())
        };
        let built = replay(building, until).await?;
        // Held no longer than need be: the WAL of what is read grows all the while.
        let live = Snapshot::of(&self.views.path())?;
        self.note(|status| status.until = live.checkpoint());
        let built = replay(built, live.checkpoint()).await?;
        let found = blocking(move || built.compare_and_remove(&live)).await?;
        self.note(|status| status.differences = Some(found));
        Ok(())
    }

    fn seen(&self) -> impl FnMut(u64) + Send + 'static {
        let rebuilds = self.clone();
        move |position| rebuilds.note(|status| status.position = position)
    }

    fn note(&self, change: impl FnOnce(&mut Status)) {
        if let Some(status) = self.locked().as_mut() {
            change(status);
        }
    }

    /// A panic elsewhere leaves no half-done change behind.
    fn locked(&self) -> MutexGuard<'_, Option<Status>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a rebuild failed, for whoever may ask for one: without paths, addresses and what was read, but
/// for why a view would stand still, which whoever asks is told of those that do.
fn sentence(error: &Error) -> String {
    let sentence = match error {
        Error::Log(log::Error::Corrupt { position: position @ 1.., .. }) => {
            return format!("The log is damaged at position {position}");
        }
        Error::Views(views::Error::NoRoom { needed, free }) => {
            return format!("The read model needs {needed} bytes beside it, and {free} are free");
        }
        Error::Views(error @ views::Error::StandsStill(_)) => {
            return format!(
                "Nothing was replaced: {error}. `t2m replay --even-if-parked` replaces it all the same"
            );
        }
        Error::Log(log::Error::Corrupt { .. }) => "The log is damaged",
        Error::Log(_) => "The log could not be read; the server's log lines say why",
        Error::Keys(_) => "The keys of users could not be read; the server's log lines say why",
        Error::Views(views::Error::Rebuilding) => {
            "Somebody else builds the read model and has not ended; try again later"
        }
        Error::Views(views::Error::NotTakenOver) => {
            "It was built, and the server did not take it over in time"
        }
        Error::Views(_) => "The read model could not be written; the server's log lines say why",
    };
    sentence.to_owned()
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, views::Error> + Send + 'static,
) -> Result<T, views::Error> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| views::Error::Io(std::io::Error::other(error)))?
}

#[cfg(test)]
#[path = "rebuild_tests.rs"]
mod tests;
