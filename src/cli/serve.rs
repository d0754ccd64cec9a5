//! `t2m serve`: the server, until it is told to stop.

use std::time::Duration;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};

use super::assemble::{Assembled, assemble, check};
use super::{say, telemetry};
use crate::clock::Clock;
use crate::config::Options;

/// Whoever keeps a connection open learns with its next answer that it must use another one; so long
/// requests are still taken, that none is lost between two.
const LAST_REQUESTS: Duration = Duration::from_millis(300);

pub fn run(options: Options) -> anyhow::Result<()> {
    let ready = check(options)?;
    // Dropped last, so that what is said at the very end is sent too.
    let _telemetry = telemetry::init(&ready.settings)?;
    if ready.settings.dev_mode {
        tracing::warn!(
            "DEV_MODE is on: every request is trusted as dev_user; never do this in public"
        );
    }
    actix::System::new().block_on(async move {
        let Assembled { server, address, stopping, held: _held, .. } =
            assemble(ready, Clock::system()).await?;
        say(format_args!("listening on {address}"));
        let handle = server.handle();
        let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
        actix::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            tracing::info!("stopping: open requests may finish, event streams end");
            stopping.send_replace(true);
            tokio::time::sleep(LAST_REQUESTS).await;
            handle.stop(true).await;
        });
        server.await.context("serving")
    })
}
