//! What may stand in a log, event by event, said once more and otherwise than `src/domain` says it:
//! from the stored JSON, with no state of its own taken from there.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::Value;
use t2m::domain::job::has_come;
use t2m::log::Recorded;

/// Everything that the log has said so far.
#[derive(Default)]
pub struct Told {
    pub users: BTreeMap<String, User>,
    pub sessions: BTreeMap<String, Session>,
    pub files: BTreeMap<String, File>,
    pub jobs: BTreeMap<String, Job>,
}

#[derive(Debug, Default, Clone)]
pub struct User {
    pub registered: bool,
    pub deleted: bool,
    pub banned: bool,
    pub synced_at: Option<DateTime<Utc>>,
}

#[derive(Debug, Clone)]
pub struct Session {
    pub user: Option<String>,
    pub ended: Option<String>,
    active_at: DateTime<Utc>,
    expires_at: DateTime<Utc>,
    remembered: bool,
}

#[derive(Debug, Clone)]
pub struct File {
    pub user: String,
    pub sha256: String,
    pub size: u64,
    pub deleted: bool,
    /// Its user has not asked for its deletion.
    pub wanted: bool,
}

#[derive(Debug, Clone)]
pub struct Job {
    pub user: String,
    pub kind: String,
    pub phase: Phase,
    pub attempts: u64,
    deadline: Option<DateTime<Utc>>,
    /// Every lease that there ever was, by the one who has it.
    pub leases: BTreeMap<String, String>,
    progress: u64,
    /// When the attempt must be over.
    ends_at: DateTime<Utc>,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Phase {
    Queued,
    Running {
        lease: String,
        expires_at: DateTime<Utc>,
    },
    RetryWait(DateTime<Utc>),
    Cancelling {
        lease: String,
        expires_at: DateTime<Utc>,
    },
    Completed {
        lease: String,
        file: String,
        size: u64,
    },
    Failed,
    Cancelled,
    /// Between two events of one append.
    MustFail,
    MustCancel,
}

impl Job {
    pub fn state(&self) -> &'static str {
        match self.phase {
            Phase::Queued => "queued",
            Phase::Running { .. } => "running",
            Phase::RetryWait(_) => "retry_wait",
            Phase::Cancelling { .. } => "cancelling",
            Phase::Completed { .. } => "completed",
            Phase::Failed | Phase::MustFail => "failed",
            Phase::Cancelled | Phase::MustCancel => "cancelled",
        }
    }

    pub fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Completed { .. } | Phase::Failed | Phase::Cancelled)
    }

    /// Who holds the job now.
    pub fn held_by(&self) -> Option<&str> {
        match &self.phase {
            Phase::Running { lease, .. } | Phase::Cancelling { lease, .. } => Some(lease),
            _ => None,
        }
    }
}

/// Why an event may not be where it is.
type Wrong = &'static str;

fn must(holds: bool, what: Wrong) -> Result<(), Wrong> {
    if holds { Ok(()) } else { Err(what) }
}

fn text(data: &Value, name: &str) -> String {
    data[name].as_str().unwrap_or_default().to_owned()
}

fn time(data: &Value, name: &str) -> Option<DateTime<Utc>> {
    data[name].as_str()?.parse().ok()
}

impl Told {
    /// Takes in one append.
    pub fn hear(&mut self, events: &[Recorded]) -> Result<(), String> {
        for event in events {
            self.hear_one(event).map_err(|wrong| {
                let data = String::from_utf8_lossy(&event.data);
                format!(
                    "{wrong}: {} {} of {} at {}: {data}",
                    event.position, event.kind, event.stream, event.time
                )
            })?;
        }
        let half = |job: &Job| matches!(job.phase, Phase::MustFail | Phase::MustCancel);
        let id = events.first().and_then(|event| event.stream.strip_prefix("job-"));
        match id.and_then(|id| self.jobs.get(id)).is_some_and(half) {
            true => Err(format!("{} was left between two phases", events[0].stream)),
            false => Ok(()),
        }
    }

    fn hear_one(&mut self, event: &Recorded) -> Result<(), Wrong> {
        let data: Value = serde_json::from_slice(&event.data).map_err(|_| "no JSON")?;
        let (category, id) = event.stream.split_once('-').ok_or("a stream of nothing")?;
        let (id, kind) = (id.to_owned(), event.kind.as_ref());
        match category {
            "user" => self.users.entry(id).or_default().hear(kind, &data),
            "session" => self.hear_session(id, event, &data),
            "file" => self.hear_file(id, kind, &data),
            "job" if kind == "job.requested.v1" => {
                must(event.revision == 0, "a job was requested twice")?;
                self.jobs.insert(id, Job::requested(&data));
                Ok(())
            }
            "job" => {
                self.jobs.get_mut(&id).ok_or("a job that nobody requested")?.hear(event, &data)?;
                self.output_is_there(&id)
            }
            _ => Err("a category that there is not"),
        }
    }

    fn hear_session(&mut self, id: String, event: &Recorded, data: &Value) -> Result<(), Wrong> {
        let (known, kind) = (self.sessions.get_mut(&id), event.kind.as_ref());
        let Some(session) = known else {
            let ended = (kind == "session.ended.v1").then(|| text(data, "reason"));
            must(ended.is_some() || kind == "session.started.v1", "a session without a start")?;
            let session = Session {
                user: data["user_id"].as_str().map(str::to_owned),
                ended,
                active_at: time(data, "started_at").unwrap_or_default(),
                expires_at: time(data, "expires_at").unwrap_or_default(),
                remembered: false,
            };
            self.sessions.insert(id, session);
            return Ok(());
        };
        must(session.ended.is_none(), "an ended session came to life")?;
        match kind {
            "session.active.v1" => {
                let at = time(data, "at").ok_or("no time")?;
                let grain = TimeDelta::minutes(1);
                must(at - session.active_at >= grain, "activity within a minute")?;
                session.active_at = at;
            }
            "session.remembered.v1" => {
                session.remembered = data["remember_me"] == true;
                session.expires_at = time(data, "expires_at").ok_or("no end")?;
            }
            "session.ended.v1" => {
                let idle = event.time - session.active_at;
                match data["reason"].as_str() {
                    Some("expired") => must(event.time >= session.expires_at, "expired early")?,
                    Some("inactive") => {
                        let long = idle >= TimeDelta::minutes(30) && !session.remembered;
                        must(long, "ended as inactive early")?;
                    }
                    _ => {}
                }
                session.ended = Some(text(data, "reason"));
            }
            _ => return Err("no event of a live session"),
        }
        Ok(())
    }

    fn hear_file(&mut self, id: String, kind: &str, data: &Value) -> Result<(), Wrong> {
        match (kind, self.files.get_mut(&id)) {
            ("file.stored.v1", None) => {
                let file = File {
                    user: text(data, "user_id"),
                    sha256: text(data, "sha256"),
                    size: data["size"].as_u64().ok_or("no size")?,
                    deleted: false,
                    wanted: true,
                };
                self.files.insert(id, file);
                Ok(())
            }
            ("file.deleted.v2", Some(file)) => {
                must(!file.deleted, "a file was deleted twice")?;
                must(data["sha256"] == file.sha256.as_str(), "other bytes than were stored")?;
                file.deleted = true;
                file.wanted = data["reason"] != "requested";
                Ok(())
            }
            _ => Err("no event of this file"),
        }
    }

    /// A completed job's output is stored first, and stays unless its user is gone, or has deleted it
    /// between the two.
    fn output_is_there(&self, job: &str) -> Result<(), Wrong> {
        let Some(Job { phase: Phase::Completed { file, size, .. }, user, .. }) = self.jobs.get(job)
        else {
            return Ok(());
        };
        let gone = self.users.get(user).is_some_and(|user| user.deleted);
        let there = |file: &File| file.size == *size && !(file.deleted && file.wanted);
        let there = self.files.get(file).is_some_and(there);
        must(there || gone, "completed without its output")
    }
}

impl User {
    fn hear(&mut self, kind: &str, data: &Value) -> Result<(), Wrong> {
        must(!self.deleted, "something happened to a deleted user")?;
        match kind {
            "user.registered.v1" => {
                must(!self.registered, "registered twice")?;
                self.registered = true;
            }
            "user.profile_changed.v1" => {
                let at = time(data, "source_updated_at");
                must(at > self.synced_at, "an older word of Clerk won")?;
                self.synced_at = at;
            }
            "user.banned.v1" => {
                must(!self.banned, "banned twice")?;
                self.banned = true;
            }
            "user.unbanned.v1" => {
                must(self.banned, "unbanned twice")?;
                self.banned = false;
            }
            "user.deleted.v1" => self.deleted = true,
            _ => must(self.registered, "a change of nobody")?,
        }
        Ok(())
    }
}

impl Job {
    fn requested(data: &Value) -> Self {
        Self {
            user: text(data, "user_id"),
            kind: text(data, "kind"),
            phase: Phase::Queued,
            attempts: 0,
            deadline: time(data, "deadline"),
            leases: BTreeMap::new(),
            progress: 0,
            ends_at: DateTime::UNIX_EPOCH,
        }
    }

    fn hear(&mut self, event: &Recorded, data: &Value) -> Result<(), Wrong> {
        let (now, lease) = (event.time, text(data, "lease_id"));
        let fenced = self.held_by() == Some(lease.as_str());
        let running = matches!(self.phase, Phase::Running { .. });
        self.phase = match event.kind.as_ref() {
            "job.leased.v1" => self.leased(now, lease, data)?,
            "job.progressed.v1" => {
                must(running && fenced, "progress under a lost lease")?;
                let progress = data["progress"].as_u64().ok_or("no progress")?;
                must((self.progress..=100).contains(&progress), "progress fell")?;
                self.progress = progress;
                let expires_at = time(data, "expires_at").ok_or("no end")?;
                let renewed = (now + TimeDelta::seconds(60)).min(self.ends_at);
                must(expires_at == renewed, "renewed for another time")?;
                Phase::Running { lease, expires_at }
            }
            "job.lease_expired.v1" => {
                must(running && fenced, "another lease ran out")?;
                let Phase::Running { expires_at, .. } = self.phase else { unreachable!() };
                must(has_come(expires_at, now), "a lease was taken back early")?;
                if self.attempts < 3 { Phase::Queued } else { Phase::MustFail }
            }
            "job.attempt_failed.v1" => {
                must(running && fenced, "a failure under a lost lease")?;
                match time(data, "retry_at") {
                    None => Phase::MustFail,
                    Some(at) => {
                        must(self.attempts < 3, "a fourth attempt is planned")?;
                        must(at > now, "no delay")?;
                        Phase::RetryWait(at)
                    }
                }
            }
            "job.cancel_requested.v1" => {
                must(data["by"] == self.user.as_str(), "cancelled by another")?;
                match std::mem::replace(&mut self.phase, Phase::MustCancel) {
                    Phase::Running { lease, expires_at } => Phase::Cancelling { lease, expires_at },
                    Phase::Queued | Phase::RetryWait(_) => Phase::MustCancel,
                    _ => return Err("cancelled after its end"),
                }
            }
            "job.completed.v1" => {
                must(running && fenced, "completed under a lost lease")?;
                let size = data["output"]["size"].as_u64().ok_or("no size")?;
                Phase::Completed { lease, file: text(&data["output"], "file_id"), size }
            }
            "job.failed.v1" => {
                let overdue = self.deadline.is_some_and(|deadline| deadline <= now);
                let waits = matches!(self.phase, Phase::Queued | Phase::RetryWait(_));
                let late = (running || waits) && overdue;
                must(late || self.phase == Phase::MustFail, "failed without a reason")?;
                Phase::Failed
            }
            "job.cancelled.v1" => {
                let may = matches!(self.phase, Phase::MustCancel | Phase::Cancelling { .. });
                must(may, "cancelled without being asked")?;
                Phase::Cancelled
            }
            "job.retried.v1" => {
                must(data["by"] == self.user.as_str(), "retried by another")?;
                let may = matches!(self.phase, Phase::Failed | Phase::Cancelled);
                must(may, "retried before its end")?;
                self.attempts = 0;
                Phase::Queued
            }
            _ => return Err("no event of a job"),
        };
        Ok(())
    }

    fn leased(&mut self, now: DateTime<Utc>, lease: String, data: &Value) -> Result<Phase, Wrong> {
        let free = match self.phase {
            Phase::Queued => true,
            Phase::RetryWait(until) => has_come(until, now),
            _ => false,
        };
        must(free, "leased while it was not free")?;
        must(self.deadline.is_none_or(|deadline| deadline > now), "leased after its deadline")?;
        let worker = text(data, "worker_id");
        must(self.leases.insert(lease.clone(), worker).is_none(), "a lease of that id was there")?;
        self.attempts += 1;
        must(data["attempt"] == self.attempts && self.attempts <= 3, "a wrong attempt")?;
        let expires_at = time(data, "expires_at").ok_or("no end")?;
        must(expires_at == now + TimeDelta::seconds(60), "a lease of another length")?;
        (self.progress, self.ends_at) = (0, now + TimeDelta::minutes(60));
        Ok(Phase::Running { lease, expires_at })
    }
}

/// The bytes that some file refers to.
pub fn referred(told: &Told) -> BTreeSet<String> {
    let present = told.files.values().filter(|file| !file.deleted);
    present.map(|file| file.sha256.clone()).collect()
}
