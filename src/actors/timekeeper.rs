//! What time brings about: sessions end, leases lapse, jobs fail at their deadline, and the sessions of users who are gone end
//! with them. It looks at what is due and acts on it; nothing is lost when a look is missed.

use std::sync::Arc;
use std::time::Duration;

use actix::Arbiter;
use metrics::counter;

use super::System;
use super::codec::{Metadata, Source};
use super::supervise::supervise;
use crate::domain::{job, session};
use crate::telemetry;

/// How often it looks.
const EVERY: Duration = Duration::from_secs(1);
/// What it handles in one look at the most; the rest waits for the next.
const AT_ONCE: usize = 500;

/// Looks at the read model once a second, on a thread of its own.
pub fn start(system: Arc<System>) {
    Arbiter::new().spawn(supervise("timekeeper", move || keep_time(Arc::clone(&system))));
}

async fn keep_time(system: Arc<System>) {
    loop {
        if let Err(error) = look(&system).await {
            tracing::warn!(%error, "the timekeeper could not look");
        }
        tokio::time::sleep(EVERY).await;
    }
}

/// Acts on everything that is due now.
///
/// # Errors
/// The read model cannot be read. What an entity refuses or the log cannot take is logged and
/// tried again at the next look.
pub async fn look(system: &System) -> Result<(), crate::views::Error> {
    let now = system.clock.now();
    for id in system.views.lapsed_sessions(now, AT_ONCE)? {
        let done = system.sessions.execute(&id, session::Command::Lapse, origin()).await;
        report(&id.to_string(), done.err());
    }
    for (id, reason) in system.views.live_sessions_of_gone_users(AT_ONCE)? {
        let command = session::Command::End { reason };
        let done = system.sessions.execute(&id, command, origin()).await;
        report(&id.to_string(), done.err());
    }
    let due = [
        system.views.overdue_jobs(now, AT_ONCE)?,
        system.views.lapsed_jobs(now, AT_ONCE)?,
        system.views.jobs_held_by_another_clock(now, AT_ONCE)?,
    ];
    for id in due.into_iter().flatten() {
        let done = system.jobs.execute(id, job::Command::Lapse, origin()).await;
        let lapsed = |event: &job::Event| matches!(event, job::Event::LeaseExpired { .. });
        if done.as_ref().is_ok_and(|done| done.events.iter().any(lapsed)) {
            counter!(telemetry::LEASES_EXPIRED).increment(1);
        }
        report(&id.to_string(), done.err());
    }
    Ok(())
}

fn origin() -> Metadata {
    Metadata::by("timekeeper", Source::System)
}

fn report<E: std::fmt::Display>(id: &str, error: Option<E>) {
    if let Some(error) = error {
        tracing::warn!(id, %error, "what was due could not be done");
    }
}
