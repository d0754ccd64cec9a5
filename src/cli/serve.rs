//! `t2m serve`: the server, until it is told to stop.

use std::pin::pin;
use std::time::{Duration, Instant};

use anyhow::Context;

use super::assemble::{Assembled, assemble, check};
use super::interrupt::Interrupt;
use super::{descriptors, owner, say, telemetry};
use crate::clock::Clock;
use crate::config::{Environment, Options};
use crate::http::app::{LAST_PIECES, STOP_WITHIN};

/// Whoever keeps a connection open learns with its next answer that it must use another one; so long
/// connections are still taken, that none is lost between two.
const LAST_REQUESTS: Duration = Duration::from_millis(300);

pub fn run(options: Options) -> anyhow::Result<()> {
    let ready = check(options)?;
    owner::refuse_root(&ready.settings.data_dir)?;
    // Ends last, so that what is said at the very end is sent too.
    let (format, collector) = (ready.settings.log_format, &ready.settings.otlp_endpoint);
    let telemetry = telemetry::init("t2m", format, collector.as_deref())?;
    descriptors::raise_limit();
    if ready.settings.dev_mode {
        tracing::warn!(
            "DEV_MODE is on: every request is trusted as dev_user; never do this in public"
        );
    }
    let production = ready.settings.environment == Environment::Production;
    if production && ready.settings.webhook_secrets.is_none() {
        tracing::warn!("CLERK_WEBHOOK_SECRET is not set: what happens at Clerk is not heard of");
    }
    let by = actix::System::new().block_on(async move {
        // Listened for from the start: it may take long, and the first process of a container is
        // not ended by a signal that it does not listen for.
        let mut interrupt = Interrupt::listen()?;
        let mut told = pin!(interrupt.heard());
        let assembled = tokio::select! {
            biased;
            () = &mut told => {
                tracing::info!("stopping before it has begun");
                // What is being opened or built on other threads would be waited for.
                std::process::exit(0);
            }
            assembled = assemble(ready, Clock::system()) => assembled?,
        };
        say(format_args!("listening on {}", assembled.address));
        serve(assembled, told).await
    })?;
    telemetry.end_by(by);
    Ok(())
}

/// Answers by when all must have ended.
async fn serve(assembled: Assembled, told: impl Future<Output = ()>) -> anyhow::Result<Instant> {
    let Assembled {
        server, door, traffic, stopping, last_pieces, dispatchers, held: _held, ..
    } = assembled;
    let handle = server.handle();
    let serving = actix::spawn(server);
    tokio::select! {
        ended = serving => {
            ended.context("serving")?.context("serving")?;
            return Ok(Instant::now() + STOP_WITHIN);
        }
        () = told => {}
    }
    let by = Instant::now() + STOP_WITHIN;
    tracing::info!("stopping: open requests may finish, event streams end, jobs are given back");
    stopping.send_replace(true);
    let stop = async {
        tokio::time::sleep(LAST_REQUESTS).await;
        door.close(&handle).await;
        // A connection whose request is not read yet is closed by what comes next.
        traffic.ceased().await;
        handle.stop(true).await;
        for ended in dispatchers {
            let _ = ended.await;
        }
    };
    let call = async {
        tokio::time::sleep(LAST_PIECES).await;
        last_pieces.send_replace(true);
        std::future::pending().await
    };
    let stopped = async {
        tokio::select! {
            () = stop => {}
            () = call => {}
        }
    };
    if tokio::time::timeout(STOP_WITHIN, stopped).await.is_err() {
        tracing::warn!("what has not finished by now is cut off");
    }
    Ok(by)
}
