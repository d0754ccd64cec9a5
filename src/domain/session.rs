//! A session: from sign-in to its one end. An ended session never revives, whatever comes late.

use chrono::{DateTime, TimeDelta, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::ids::UserId;
use super::text::{Personal, Visit};
use super::{Aggregate, moment};

/// How long a session lives from its start (seed `t2m-auth-and-sessions`, `SESSION_CONFIG`).
pub const LIFETIME: TimeDelta = TimeDelta::days(7);
/// How long a remembered one lives from its start.
pub const REMEMBERED_LIFETIME: TimeDelta = TimeDelta::days(30);
/// How long one that is not remembered outlives its last activity.
pub const INACTIVITY: TimeDelta = TimeDelta::minutes(30);
/// Activity is recorded no more often than this.
pub const ACTIVITY_GRAIN: TimeDelta = TimeDelta::minutes(1);

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", content = "data")]
pub enum Event {
    #[serde(rename = "session.started.v1")]
    Started {
        user_id: UserId,
        started_at: DateTime<Utc>,
        expires_at: DateTime<Utc>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        ip_address: Option<Personal<String>>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        user_agent: Option<Personal<String>>,
    },
    #[serde(rename = "session.active.v1")]
    Active {
        user_id: UserId,
        #[serde(deserialize_with = "moment::deserialize")]
        at: DateTime<Utc>,
    },
    #[serde(rename = "session.remembered.v1")]
    Remembered { user_id: UserId, remember_me: bool, expires_at: DateTime<Utc> },
    #[serde(rename = "session.ended.v1")]
    Ended {
        /// Absent when the end came before anything else was heard of the session.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        user_id: Option<UserId>,
        reason: EndReason,
        at: DateTime<Utc>,
    },
}

/// Why a session is over; clients see it in the `session_ended` answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum EndReason {
    /// The user signed out.
    SignedOut,
    /// Removed at Clerk.
    Removed,
    /// Revoked by the user on another device, by an administrator, or at Clerk.
    Revoked,
    /// Its lifetime is over.
    Expired,
    /// Nothing was heard of it for too long.
    Inactive,
    /// Its user was deleted.
    UserDeleted,
    /// Its user was banned.
    UserBanned,
}

impl EndReason {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::SignedOut => "signed_out",
            Self::Removed => "removed",
            Self::Revoked => "revoked",
            Self::Expired => "expired",
            Self::Inactive => "inactive",
            Self::UserDeleted => "user_deleted",
            Self::UserBanned => "user_banned",
        }
    }
}

#[derive(Debug, Clone)]
pub enum Command {
    /// A sign-in as Clerk tells it, or the first request of a session that it has not told yet.
    Start {
        user_id: UserId,
        started_at: DateTime<Utc>,
        /// Clerk's own end, if that comes before ours.
        expires_at: Option<DateTime<Utc>>,
        ip_address: Option<String>,
        user_agent: Option<String>,
    },
    /// The user did something in this session.
    Touch,
    Remember {
        remember_me: bool,
    },
    End {
        reason: EndReason,
    },
    /// Time has passed: end the session if its own is over.
    Lapse,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("no such session")]
    NotFound,
    #[error("the session has ended")]
    Ended(EndReason),
}

#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Session {
    #[default]
    Unknown,
    Live(Live),
    Ended(EndReason),
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Live {
    pub user_id: UserId,
    pub started_at: DateTime<Utc>,
    pub expires_at: DateTime<Utc>,
    pub last_active_at: DateTime<Utc>,
    pub remembered: bool,
}

impl Live {
    /// Why this session is over at `now`, if it is.
    pub fn lapsed(&self, now: DateTime<Utc>) -> Option<EndReason> {
        if now >= self.expires_at {
            Some(EndReason::Expired)
        } else if !self.remembered && now - self.last_active_at >= INACTIVITY {
            Some(EndReason::Inactive)
        } else {
            None
        }
    }
}

impl Aggregate for Session {
    const CATEGORY: &'static str = "session";
    type Command = Command;
    type Event = Event;
    type Refusal = Refusal;

    fn decide(&self, command: &Command, now: DateTime<Utc>) -> Result<Vec<Event>, Refusal> {
        match (self, command) {
            (
                Self::Unknown,
                Command::Start { user_id, started_at, expires_at, ip_address, user_agent },
            ) => {
                let ours = *started_at + LIFETIME;
                let started = Event::Started {
                    user_id: user_id.clone(),
                    started_at: *started_at,
                    expires_at: expires_at.map_or(ours, |theirs| theirs.min(ours)),
                    ip_address: ip_address.clone().map(Personal::Known),
                    user_agent: user_agent.clone().map(Personal::Known),
                };
                // A start that comes late says nothing of what happened since: inactivity counts
                // from now.
                let late = now - *started_at >= ACTIVITY_GRAIN;
                let active = late.then(|| Event::Active { user_id: user_id.clone(), at: now });
                Ok([Some(started), active].into_iter().flatten().collect())
            }
            // The end overtook the start: remember the end, so that the start finds it.
            (Self::Unknown, Command::End { reason }) => {
                Ok(vec![Event::Ended { user_id: None, reason: *reason, at: now }])
            }
            (Self::Unknown, Command::Lapse) => Ok(vec![]),
            (Self::Unknown, Command::Touch | Command::Remember { .. }) => Err(Refusal::NotFound),
            (Self::Live(_), Command::Start { .. }) => Ok(vec![]),
            (Self::Live(live), Command::Touch) => touch(live, now),
            (Self::Live(live), Command::Remember { remember_me }) => {
                remember(live, *remember_me, now)
            }
            (Self::Live(live), Command::End { reason }) => Ok(vec![end(live, *reason, now)]),
            (Self::Live(live), Command::Lapse) => {
                Ok(live.lapsed(now).map(|reason| end(live, reason, now)).into_iter().collect())
            }
            (Self::Ended(_), Command::End { .. } | Command::Lapse) => Ok(vec![]),
            (Self::Ended(reason), _) => Err(Refusal::Ended(*reason)),
        }
    }

    fn evolve(&mut self, event: &Event) {
        match event {
            Event::Started { user_id, started_at, expires_at, .. } => {
                *self = Self::Live(Live {
                    user_id: user_id.clone(),
                    started_at: *started_at,
                    expires_at: *expires_at,
                    last_active_at: *started_at,
                    remembered: false,
                });
            }
            Event::Active { at, .. } => {
                if let Self::Live(live) = self {
                    live.last_active_at = *at;
                }
            }
            Event::Remembered { remember_me, expires_at, .. } => {
                if let Self::Live(live) = self {
                    live.remembered = *remember_me;
                    live.expires_at = *expires_at;
                }
            }
            Event::Ended { reason, .. } => *self = Self::Ended(*reason),
        }
    }

    fn personal(event: &mut Event, visit: Visit<'_>) {
        match event {
            Event::Started { ip_address, user_agent, .. } => {
                for (place, field) in [("ip_address", ip_address), ("user_agent", user_agent)] {
                    if let Some(field) = field {
                        visit(place, field);
                    }
                }
            }
            Event::Active { .. } | Event::Remembered { .. } | Event::Ended { .. } => {}
        }
    }

    fn owner(_id: &str, event: &Event) -> Option<UserId> {
        match event {
            Event::Started { user_id, .. }
            | Event::Active { user_id, .. }
            | Event::Remembered { user_id, .. } => Some(user_id.clone()),
            Event::Ended { user_id, .. } => user_id.clone(),
        }
    }
}

fn touch(live: &Live, now: DateTime<Utc>) -> Result<Vec<Event>, Refusal> {
    if let Some(reason) = live.lapsed(now) {
        return Ok(vec![end(live, reason, now)]);
    }
    if now - live.last_active_at < ACTIVITY_GRAIN {
        return Ok(vec![]);
    }
    Ok(vec![Event::Active { user_id: live.user_id.clone(), at: now }])
}

fn remember(live: &Live, remember_me: bool, now: DateTime<Utc>) -> Result<Vec<Event>, Refusal> {
    if let Some(reason) = live.lapsed(now) {
        return Ok(vec![end(live, reason, now)]);
    }
    if live.remembered == remember_me {
        return Ok(vec![]);
    }
    let lifetime = if remember_me { REMEMBERED_LIFETIME } else { LIFETIME };
    Ok(vec![Event::Remembered {
        user_id: live.user_id.clone(),
        remember_me,
        expires_at: live.started_at + lifetime,
    }])
}

fn end(live: &Live, reason: EndReason, at: DateTime<Utc>) -> Event {
    Event::Ended { user_id: Some(live.user_id.clone()), reason, at }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(minutes: i64) -> DateTime<Utc> {
        DateTime::UNIX_EPOCH + TimeDelta::minutes(minutes)
    }

    fn ada() -> UserId {
        UserId::try_from("ada".to_owned()).unwrap()
    }

    fn start() -> Command {
        Command::Start {
            user_id: ada(),
            started_at: at(0),
            expires_at: None,
            ip_address: None,
            user_agent: None,
        }
    }

    /// Runs commands at their minutes; returns the names of what happened and the state.
    fn run(steps: &[(i64, Command)]) -> (Vec<String>, Session, Option<Refusal>) {
        let (mut session, mut names, mut refused) = (Session::default(), vec![], None);
        for (minute, command) in steps {
            match session.decide(command, at(*minute)) {
                Ok(events) => {
                    for event in events {
                        session.evolve(&event);
                        let name = serde_json::to_value(&event).unwrap()["type"].to_string();
                        names
                            .push(name.replace("session.", "").replace(".v1", "").replace('"', ""));
                    }
                }
                Err(refusal) => refused = Some(refusal),
            }
        }
        (names, session, refused)
    }

    fn check(steps: &[(i64, Command)], then: &[&str]) {
        assert_eq!(run(steps).0, then, "{steps:?}");
    }

    #[test]
    fn activity_is_recorded_at_most_once_a_minute() {
        check(&[(0, start()), (0, Command::Touch)], &["started"]);
        check(&[(0, start()), (0, Command::Touch), (1, Command::Touch)], &["started", "active"]);
    }

    #[test]
    fn thirty_minutes_of_inactivity_end_a_session_that_is_not_remembered() {
        check(&[(0, start()), (29, Command::Lapse)], &["started"]);
        check(&[(0, start()), (30, Command::Lapse)], &["started", "ended"]);
        let remember = Command::Remember { remember_me: true };
        check(&[(0, start()), (1, remember), (31, Command::Lapse)], &["started", "remembered"]);
    }

    #[test]
    fn a_touch_that_comes_too_late_ends_the_session_instead() {
        let (names, state, _) = run(&[(0, start()), (31, Command::Touch)]);
        assert_eq!(names, ["started", "ended"]);
        assert_eq!(state, Session::Ended(EndReason::Inactive));
    }

    #[test]
    fn a_remembered_session_ends_after_thirty_days() {
        let remember = Command::Remember { remember_me: true };
        let day = 24 * 60;
        let steps = [(0, start()), (1, remember), (30 * day, Command::Lapse)];
        assert_eq!(run(&steps).1, Session::Ended(EndReason::Expired));
    }

    #[test]
    fn an_ended_session_never_revives() {
        let end = Command::End { reason: EndReason::Revoked };
        let (names, _, refused) = run(&[(0, end.clone()), (1, start()), (2, end)]);
        assert_eq!(names, ["ended"]);
        assert_eq!(refused, Some(Refusal::Ended(EndReason::Revoked)));
    }

    #[test]
    fn clerks_own_end_wins_when_it_is_sooner() {
        let command = Command::Start {
            user_id: ada(),
            started_at: at(0),
            expires_at: Some(at(10)),
            ip_address: None,
            user_agent: None,
        };
        assert_eq!(
            run(&[(0, command), (10, Command::Lapse)]).1,
            Session::Ended(EndReason::Expired)
        );
    }

    #[test]
    fn a_reason_is_named_as_it_is_stored() {
        use EndReason::{Expired, Inactive, Removed, Revoked, SignedOut, UserBanned, UserDeleted};
        for reason in [SignedOut, Removed, Revoked, Expired, Inactive, UserDeleted, UserBanned] {
            assert_eq!(serde_json::to_value(reason).unwrap(), reason.as_str());
        }
    }

    #[test]
    fn what_is_repeated_happens_once() {
        let remember = || Command::Remember { remember_me: true };
        check(&[(0, start()), (0, start())], &["started"]);
        check(&[(0, start()), (1, remember()), (2, remember())], &["started", "remembered"]);
        let end = || Command::End { reason: EndReason::SignedOut };
        let steps = [(0, start()), (1, end()), (2, end()), (3, Command::Lapse)];
        let (names, state, refused) = run(&steps);
        assert_eq!((names.as_slice(), refused), (&["started".into(), "ended".into()][..], None));
        assert_eq!(state, Session::Ended(EndReason::SignedOut));
    }

    #[test]
    fn a_session_that_nobody_started_can_only_end() {
        assert_eq!(run(&[(0, Command::Lapse)]), (vec![], Session::Unknown, None));
        for command in [Command::Touch, Command::Remember { remember_me: true }] {
            assert_eq!(run(&[(0, command)]).2, Some(Refusal::NotFound));
        }
    }

    #[test]
    fn a_start_that_is_told_late_counts_inactivity_from_when_it_is_heard() {
        check(&[(40, start()), (69, Command::Lapse)], &["started", "active"]);
        check(&[(40, start()), (70, Command::Lapse)], &["started", "active", "ended"]);
    }

    #[test]
    fn a_session_no_longer_remembered_has_its_seven_days() {
        let remember = |remember_me| Command::Remember { remember_me };
        let steps = [(0, start()), (1, remember(true)), (2, remember(false))];
        let Session::Live(live) = run(&steps).1 else { panic!("it lives") };
        assert_eq!((live.remembered, live.expires_at), (false, at(0) + LIFETIME));
        check(&[(0, start()), (31, remember(true))], &["started", "ended"]);
    }
}
