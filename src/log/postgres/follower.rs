//! Moves the head when other nodes have appended: woken by their notifications, and by the clock
//! beneath, since a notification may be lost with its connection.

use std::sync::Arc;

use super::connection::Session;
use super::{Backoff, CHANNEL, Shared, reader};
use crate::log::Error;

/// Runs until the log is closed or stopped.
pub(super) async fn run(shared: Arc<Shared>) {
    let mut backoff = Backoff::default();
    while shared.condition.check_stopped().is_ok() {
        if let Ok(session) = Session::open(&shared).await {
            backoff = Backoff::default();
            if let Err(error) = follow(&shared, session).await {
                tracing::warn!(%error, "the log's head cannot be read");
            }
        }
        backoff.wait().await;
    }
}

async fn follow(shared: &Shared, mut session: Session) -> Result<(), Error> {
    // Before the first look, so that nothing falls between the two.
    session.within(session.client.batch_execute(&format!("LISTEN {CHANNEL}"))).await?;
    loop {
        let seen = shared.seen();
        let newest = reader::newest(&session).await?;
        if newest.position < seen.position {
            return Err(shared.condition.cut(seen.position));
        }
        shared.saw(newest);
        tokio::select! {
            () = shared.appended.notified() => {}
            () = tokio::time::sleep(shared.deadlines.poll) => {}
            () = session.ended() => return Err(Error::Storage("the connection broke".into())),
        }
    }
}
