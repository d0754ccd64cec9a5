//! A rebuild: the whole log once more, into views that nobody reads yet. One thread reads and
//! decodes while the other folds, since each costs about as much.

use std::sync::Arc;

use tokio::sync::mpsc;

use super::projector::{self, Error};
use crate::log::EventLog;
use crate::views::{Building, Happened};

/// Events in one transaction: enough that most events meet the row that they change in memory.
const BATCH: usize = 8192;
/// Batches that are decoded ahead.
const AHEAD: usize = 1;

/// Takes in the log up to `until`; `seen` hears of each position reached. The building is given
/// back at that position, or where the log ends if that is before.
///
/// # Errors
/// The log cannot be read, or the file not written; the building is lost then.
pub async fn rebuild(
    log: Arc<dyn EventLog>,
    building: Building,
    until: u64,
    mut seen: impl FnMut(u64) + Send + 'static,
) -> Result<Building, Error> {
    let (decoded, batches) = mpsc::channel::<Vec<Happened>>(AHEAD);
    let from = building.checkpoint();
    let folding = tokio::task::spawn_blocking(move || fold(building, batches, until, &mut seen));
    let reading = read(log, from, until, decoded).await;
    let folded = folding.await.map_err(|error| {
        crate::views::Error::Io(std::io::Error::other(format!("the rebuild broke off: {error}")))
    })?;
    reading?;
    Ok(folded?)
}

/// Ends early when nobody folds any more; why not is what the folding answers.
async fn read(
    log: Arc<dyn EventLog>,
    mut from: u64,
    until: u64,
    decoded: mpsc::Sender<Vec<Happened>>,
) -> Result<(), Error> {
    while from < until {
        let batch = projector::next(log.as_ref(), from, until, BATCH).await?;
        let Some(last) = batch.last() else { break };
        from = last.position;
        if decoded.send(batch).await.is_err() {
            break;
        }
    }
    Ok(())
}

fn fold(
    mut building: Building,
    mut batches: mpsc::Receiver<Vec<Happened>>,
    until: u64,
    seen: &mut impl FnMut(u64),
) -> Result<Building, crate::views::Error> {
    while let Some(batch) = batches.blocking_recv() {
        building.apply(&batch, until)?;
        seen(building.checkpoint());
    }
    Ok(building)
}
