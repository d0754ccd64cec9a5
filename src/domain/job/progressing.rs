//! A job that exists: what each command means to it in each phase, and what each event makes of it.

use chrono::{DateTime, TimeDelta, Utc};

use super::{
    DEADLINE_EXCEEDED, Event, LEASE, LONGEST_ATTEMPT, Lease, MAX_ATTEMPTS, Output, Phase,
    Progressing, Refusal, has_come,
};
use crate::domain::ids::{LeaseId, UserId};

impl Progressing {
    pub(super) fn lease(
        &self,
        lease_id: LeaseId,
        worker_id: &str,
        now: DateTime<Utc>,
    ) -> Result<Vec<Event>, Refusal> {
        let ready = match &self.phase {
            Phase::Queued => true,
            Phase::RetryWait { until } => has_come(*until, now),
            Phase::Running(lease) if lease.id == lease_id => return Ok(vec![]),
            _ => false,
        };
        if !ready || self.request.is_overdue(now) {
            return Err(Refusal::NotLeasable(self.phase.name()));
        }
        Ok(vec![Event::Leased {
            lease_id,
            worker_id: worker_id.to_owned(),
            attempt: self.attempts + 1,
            expires_at: now + LEASE,
        }])
    }

    pub(super) fn hold(&self, lease_id: LeaseId) -> Result<Vec<Event>, Refusal> {
        match &self.phase {
            Phase::Running(lease) | Phase::Cancelling(lease) if lease.id == lease_id => Ok(vec![]),
            _ => Err(Refusal::LeaseLost),
        }
    }

    pub(super) fn progress(
        &self,
        lease_id: LeaseId,
        progress: u8,
        message: Option<&str>,
        now: DateTime<Utc>,
    ) -> Result<Vec<Event>, Refusal> {
        match &self.phase {
            Phase::Running(lease) if lease.id == lease_id => Ok(vec![Event::Progressed {
                lease_id,
                progress: progress.min(100).max(lease.progress),
                message: message.map(str::to_owned),
                expires_at: (now + LEASE).min(lease.ends_at),
            }]),
            Phase::Cancelling(lease) if lease.id == lease_id => Ok(vec![]),
            _ if self.cut_off == Some(lease_id) => Ok(vec![]),
            _ => Err(Refusal::LeaseLost),
        }
    }

    pub(super) fn complete(
        &self,
        lease_id: LeaseId,
        output: &Output,
    ) -> Result<Vec<Event>, Refusal> {
        match &self.phase {
            Phase::Running(lease) if lease.id == lease_id => {
                Ok(vec![Event::Completed { lease_id, output: output.clone() }])
            }
            Phase::Cancelling(lease) if lease.id == lease_id => Ok(vec![Event::Cancelled {}]),
            Phase::Completed(done) if done == output => Ok(vec![]),
            _ => Err(Refusal::LeaseLost),
        }
    }

    pub(super) fn fail(
        &self,
        lease_id: LeaseId,
        error: &str,
        retryable: bool,
        now: DateTime<Utc>,
    ) -> Result<Vec<Event>, Refusal> {
        match &self.phase {
            Phase::Running(lease) if lease.id == lease_id => {
                Ok(self.after_attempt(lease_id, error, retryable, now))
            }
            Phase::Cancelling(lease) if lease.id == lease_id => Ok(vec![Event::Cancelled {}]),
            _ if self.cut_off == Some(lease_id) => Ok(vec![]),
            _ => Err(Refusal::LeaseLost),
        }
    }

    pub(super) fn give_back(&self, lease_id: LeaseId) -> Result<Vec<Event>, Refusal> {
        let attempt = self.attempts;
        match &self.phase {
            Phase::Running(lease) if lease.id == lease_id => {
                Ok(vec![Event::LeaseExpired { lease_id, attempt, given_back: true }])
            }
            Phase::Cancelling(lease) if lease.id == lease_id => Ok(vec![Event::Cancelled {}]),
            _ if self.cut_off == Some(lease_id) => Ok(vec![]),
            _ => Err(Refusal::LeaseLost),
        }
    }

    /// Another attempt after a growing delay, or the end.
    fn after_attempt(
        &self,
        lease_id: LeaseId,
        error: &str,
        retryable: bool,
        now: DateTime<Utc>,
    ) -> Vec<Event> {
        let again = retryable && self.attempts < MAX_ATTEMPTS;
        let mut events = vec![Event::AttemptFailed {
            lease_id,
            attempt: self.attempts,
            error: error.to_owned(),
            retry_at: again.then(|| now + delay_after(self.attempts, lease_id)),
        }];
        if !again {
            events.push(Event::Failed { error: error.to_owned() });
        }
        events
    }

    pub(super) fn cancel(&self, by: &UserId) -> Result<Vec<Event>, Refusal> {
        if *by != self.request.user_id {
            return Err(Refusal::NotFound);
        }
        let asked = Event::CancelRequested { by: by.clone() };
        match &self.phase {
            Phase::Queued | Phase::RetryWait { .. } => Ok(vec![asked, Event::Cancelled {}]),
            Phase::Running(_) => Ok(vec![asked]),
            Phase::Cancelling(_) | Phase::Cancelled => Ok(vec![]),
            Phase::Completed(_) | Phase::Failed => Err(Refusal::WrongState(self.phase.name())),
        }
    }

    pub(super) fn retry(&self, by: &UserId, now: DateTime<Utc>) -> Result<Vec<Event>, Refusal> {
        if *by != self.request.user_id {
            return Err(Refusal::NotFound);
        }
        match &self.phase {
            Phase::Failed | Phase::Cancelled if self.request.options.needs_secret() => {
                Err(Refusal::SecretGone)
            }
            Phase::Failed | Phase::Cancelled if self.request.is_overdue(now) => {
                Err(Refusal::DeadlineOver)
            }
            Phase::Failed | Phase::Cancelled => Ok(vec![Event::Retried { by: by.clone() }]),
            other => Err(Refusal::WrongState(other.name())),
        }
    }

    pub(super) fn lapse(&self, now: DateTime<Utc>) -> Vec<Event> {
        match &self.phase {
            Phase::Queued | Phase::RetryWait { .. } | Phase::Running(_)
                if self.request.is_overdue(now) =>
            {
                let error = format!("{DEADLINE_EXCEEDED}: the job had not ended by its deadline");
                vec![Event::Failed { error }]
            }
            Phase::Running(lease) if has_come(lease.expires_at, now) => {
                let (lease_id, attempt) = (lease.id, self.attempts);
                let mut events = vec![Event::LeaseExpired { lease_id, attempt, given_back: false }];
                if self.attempts >= MAX_ATTEMPTS {
                    events.push(Event::Failed { error: "no worker finished the job".to_owned() });
                }
                events
            }
            Phase::Cancelling(lease) if has_come(lease.expires_at, now) => {
                vec![Event::Cancelled {}]
            }
            _ => vec![],
        }
    }

    pub(super) fn abandon(&self) -> Vec<Event> {
        match &self.phase {
            Phase::Cancelling(_) => vec![Event::Cancelled {}],
            _ => vec![],
        }
    }

    pub(super) fn evolve(&mut self, event: &Event) {
        match event {
            Event::Requested(_) => {}
            Event::Leased { lease_id, worker_id, attempt, expires_at } => {
                self.attempts = *attempt;
                self.phase = Phase::Running(Lease {
                    id: *lease_id,
                    worker_id: worker_id.clone(),
                    expires_at: *expires_at,
                    ends_at: *expires_at - LEASE + LONGEST_ATTEMPT,
                    progress: 0,
                });
            }
            Event::Progressed { progress, expires_at, .. } => {
                if let Phase::Running(lease) = &mut self.phase {
                    lease.progress = *progress;
                    lease.expires_at = *expires_at;
                }
            }
            Event::LeaseExpired { attempt, given_back, .. } => {
                self.attempts = attempt.saturating_sub(u32::from(*given_back));
                self.phase = Phase::Queued;
            }
            Event::AttemptFailed { retry_at, .. } => {
                self.phase = retry_at.map_or(Phase::Failed, |until| Phase::RetryWait { until });
            }
            Event::CancelRequested { .. } => {
                if let Phase::Running(lease) = &self.phase {
                    self.phase = Phase::Cancelling(lease.clone());
                }
            }
            Event::Completed { output, .. } => self.phase = Phase::Completed(output.clone()),
            Event::Failed { .. } => {
                // After an attempt that failed or lost its lease nobody runs any more.
                if let Phase::Running(lease) = &self.phase {
                    self.cut_off = Some(lease.id);
                }
                self.phase = Phase::Failed;
            }
            Event::Cancelled {} => self.phase = Phase::Cancelled,
            Event::Retried { .. } => {
                self.attempts = 0;
                self.phase = Phase::Queued;
            }
        }
    }
}

/// 5 s after the first attempt and four times as long after each further one; up to half of it is
/// added, so that jobs that failed together do not come again together. The lease's id, which is
/// another for each attempt, says how much.
pub(super) fn delay_after(attempts: u32, lease_id: LeaseId) -> TimeDelta {
    let whole = 5_000 * 4_i64.pow(attempts.saturating_sub(1).min(5));
    let part = i64::from(lease_id.0.as_u128() as u16);
    TimeDelta::milliseconds(whole + whole * part / (2 * (1 << 16)))
}
