//! `t2m serve`: the server, until it is told to stop.

use std::io::IsTerminal;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use super::assemble::{Assembled, assemble, check};
use crate::clock::Clock;
use crate::config::Options;

pub fn run(options: Options) -> anyhow::Result<()> {
    let ready = check(options)?;
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let colour = std::io::stderr().is_terminal();
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colour);
    lines.with_writer(std::io::stderr).init();
    if ready.settings.dev_mode {
        tracing::warn!(
            "DEV_MODE is on: every request is trusted as dev_user; never do this in public"
        );
    }
    actix::System::new().block_on(async move {
        let Assembled { server, address, stopping, .. } = assemble(ready, Clock::system()).await?;
        println!("listening on {address}");
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
            handle.stop(true).await;
        });
        server.await.context("serving")
    })
}
