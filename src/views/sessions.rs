//! The sessions: who is signed in where, and which sessions are due to end.

use chrono::{DateTime, Utc};
use rusqlite::{Connection, OptionalExtension, Row, params};
use serde::Serialize;

use super::column::{Text, Time, Word, int};
use super::{Change, Error, Views};
use crate::domain::ids::{SessionId, UserId};
use crate::domain::session::{EndReason, Event, INACTIVITY};

pub(super) const SCHEMA: &str = "
CREATE TABLE sessions (
    session_id TEXT PRIMARY KEY,
    user_id TEXT,
    started_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    last_active_at INTEGER NOT NULL,
    remembered INTEGER NOT NULL,
    ended_reason TEXT,
    ended_at INTEGER,
    ip_address TEXT,
    user_agent TEXT,
    -- When time alone ends it; null once it has ended.
    due_at INTEGER,
    -- Why it must end although its time is not over: its user is gone.
    doomed TEXT
) WITHOUT ROWID;
CREATE INDEX sessions_of_user ON sessions (user_id, ended_at, started_at);
-- With the user, so that the active ones are counted without touching the rows.
CREATE INDEX sessions_active ON sessions (last_active_at, user_id);
CREATE INDEX sessions_due ON sessions (due_at) WHERE due_at IS NOT NULL;
CREATE INDEX sessions_doomed ON sessions (doomed) WHERE doomed IS NOT NULL;
";

const COLUMNS: &str = "session_id, user_id, started_at, expires_at, last_active_at, remembered, \
                       ended_reason, ended_at, ip_address, user_agent";

const START: &str = "
INSERT INTO sessions VALUES (?1, ?2, ?3, ?4, ?3, 0, NULL, NULL,
    -- Where somebody came from who has been forgotten by now is not remembered again.
    (SELECT ?5 WHERE NOT EXISTS (SELECT 1 FROM users WHERE user_id = ?2 AND deleted)),
    (SELECT ?6 WHERE NOT EXISTS (SELECT 1 FROM users WHERE user_id = ?2 AND deleted)),
    min(?4, ?3 + ?7),
    (SELECT CASE WHEN deleted THEN ?8 WHEN banned THEN ?9 END FROM users WHERE user_id = ?2))
ON CONFLICT (session_id) DO NOTHING
";

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SessionRow {
    pub session_id: SessionId,
    /// Absent when the end was all that was ever heard of it.
    pub user_id: Option<UserId>,
    pub started_at: DateTime<Utc>,
    pub expires_at: DateTime<Utc>,
    pub last_active_at: DateTime<Utc>,
    pub remembered: bool,
    pub ended_reason: Option<EndReason>,
    pub ended_at: Option<DateTime<Utc>>,
    pub ip_address: Option<String>,
    pub user_agent: Option<String>,
}

/// What a request must know of its session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SessionStanding {
    /// Not ended; whether its time is over is for the caller, who has the clock.
    Live {
        user_id: UserId,
        expires_at: DateTime<Utc>,
        last_active_at: DateTime<Utc>,
        remembered: bool,
    },
    Ended(EndReason),
}

impl Views {
    /// Live sessions are held in memory; for one that ended, this is one indexed read.
    ///
    /// A file that cannot be read counts as an unknown session. That is safe: the caller then asks
    /// the session itself, which never revives.
    pub fn session_standing(&self, session_id: &SessionId) -> Option<SessionStanding> {
        if let Some(live) = self.current().sessions.get(session_id) {
            return Some(live);
        }
        match self.session(session_id) {
            Ok(row) => row.and_then(SessionRow::standing),
            Err(error) => {
                tracing::error!(%error, "a session could not be read from the views");
                None
            }
        }
    }

    /// A session, live or ended.
    pub fn session(&self, session_id: &SessionId) -> Result<Option<SessionRow>, Error> {
        self.read(|sql| {
            sql.prepare_cached(&format!("SELECT {COLUMNS} FROM sessions WHERE session_id = ?1"))?
                .query_row([session_id.as_str()], session)
                .optional()
        })
    }

    /// A user's sessions that have not ended, newest first.
    pub fn sessions_of(&self, user_id: &UserId) -> Result<Vec<SessionRow>, Error> {
        self.read(|sql| {
            sql.prepare_cached(&format!(
                "SELECT {COLUMNS} FROM sessions WHERE user_id = ?1 AND ended_at IS NULL
                 ORDER BY started_at DESC, session_id"
            ))?
            .query_map([user_id.as_str()], session)?
            .collect()
        })
    }

    /// Sessions that time has ended by `now`, the most overdue first.
    pub fn lapsed_sessions(
        &self,
        now: DateTime<Utc>,
        limit: usize,
    ) -> Result<Vec<SessionId>, Error> {
        self.read(|sql| {
            sql.prepare_cached(
                "SELECT session_id FROM sessions WHERE due_at IS NOT NULL AND due_at <= ?1
                 ORDER BY due_at LIMIT ?2",
            )?
            .query_map(params![Time(now), int(limit as u64)], |row| {
                row.get::<_, Text<SessionId>>(0).map(|id| id.0)
            })?
            .collect()
        })
    }

    /// Sessions that outlived their user's deletion or ban, with the reason to end them for.
    pub fn live_sessions_of_gone_users(
        &self,
        limit: usize,
    ) -> Result<Vec<(SessionId, EndReason)>, Error> {
        self.read(|sql| {
            sql.prepare_cached(
                "SELECT session_id, doomed FROM sessions WHERE doomed IS NOT NULL LIMIT ?1",
            )?
            .query_map([int(limit as u64)], |row| {
                Ok((row.get::<_, Text<SessionId>>(0)?.0, row.get::<_, Word<EndReason>>(1)?.0))
            })?
            .collect()
        })
    }
}

impl SessionRow {
    fn standing(self) -> Option<SessionStanding> {
        match self.ended_reason {
            Some(reason) => Some(SessionStanding::Ended(reason)),
            None => Some(SessionStanding::Live {
                user_id: self.user_id?,
                expires_at: self.expires_at,
                last_active_at: self.last_active_at,
                remembered: self.remembered,
            }),
        }
    }
}

pub(super) fn apply(
    sql: &Connection,
    session_id: &SessionId,
    event: &Event,
    changes: &mut Vec<Change>,
) -> rusqlite::Result<()> {
    let id = session_id.as_str();
    let idle = INACTIVITY.num_microseconds().unwrap_or(i64::MAX);
    match event {
        Event::Started { user_id, started_at, expires_at, ip_address, user_agent } => {
            // One that is known already, ended above all, is not started again.
            sql.prepare_cached(START)?.execute(params![
                id,
                user_id.as_str(),
                Time(*started_at),
                Time(*expires_at),
                ip_address.as_ref().map(|ip| &ip.0),
                user_agent.as_ref().map(|agent| &agent.0),
                idle,
                EndReason::UserDeleted.as_str(),
                EndReason::UserBanned.as_str(),
            ])?;
        }
        Event::Active { at, .. } => {
            sql.prepare_cached(
                "UPDATE sessions SET last_active_at = ?2, due_at =
                     CASE WHEN remembered THEN expires_at ELSE min(expires_at, ?2 + ?3) END
                 WHERE session_id = ?1 AND ended_at IS NULL",
            )?
            .execute(params![id, Time(*at), idle])?;
        }
        Event::Remembered { remember_me, expires_at, .. } => {
            sql.prepare_cached(
                "UPDATE sessions SET remembered = ?2, expires_at = ?3, due_at =
                     CASE WHEN ?2 THEN ?3 ELSE min(?3, last_active_at + ?4) END
                 WHERE session_id = ?1 AND ended_at IS NULL",
            )?
            .execute(params![id, remember_me, Time(*expires_at), idle])?;
        }
        Event::Ended { user_id, reason, at } => {
            // The first end stands.
            sql.prepare_cached(
                "INSERT INTO sessions (session_id, user_id, started_at, expires_at, last_active_at,
                     remembered, ended_reason, ended_at) VALUES (?1, ?2, ?4, ?4, ?4, 0, ?3, ?4)
                 ON CONFLICT (session_id) DO UPDATE SET
                     ended_reason = ?3, ended_at = ?4, due_at = NULL, doomed = NULL
                 WHERE ended_at IS NULL",
            )?
            .execute(params![
                id,
                user_id.as_ref().map(UserId::as_str),
                reason.as_str(),
                Time(*at)
            ])?;
            changes.extend(user_id.clone().map(Change::Touched));
        }
    }
    changes.push(Change::Session(session_id.clone(), live(sql, id)?));
    Ok(())
}

/// All live sessions, to be held in memory.
pub(super) fn load(sql: &Connection, mut take: impl FnMut(Change)) -> rusqlite::Result<()> {
    let mut query =
        sql.prepare(&format!("SELECT {COLUMNS} FROM sessions WHERE ended_at IS NULL"))?;
    let mut rows = query.query([])?;
    while let Some(row) = rows.next()? {
        let row = session(row)?;
        take(Change::Session(row.session_id.clone(), row.standing()));
    }
    Ok(())
}

/// The user was deleted: the sessions must end, and where they came from is forgotten.
pub(super) fn erase(sql: &Connection, user_id: &UserId) -> rusqlite::Result<()> {
    sql.prepare_cached("UPDATE sessions SET doomed = ?2 WHERE user_id = ?1 AND ended_at IS NULL")?
        .execute(params![user_id.as_str(), EndReason::UserDeleted.as_str()])?;
    sql.prepare_cached(
        "UPDATE sessions SET ip_address = NULL, user_agent = NULL WHERE user_id = ?1",
    )?
    .execute([user_id.as_str()])?;
    Ok(())
}

/// The user was banned, or no longer is.
pub(super) fn ban(sql: &Connection, user_id: &UserId, banned: bool) -> rusqlite::Result<()> {
    let doomed = banned.then(|| EndReason::UserBanned.as_str());
    sql.prepare_cached("UPDATE sessions SET doomed = ?2 WHERE user_id = ?1 AND ended_at IS NULL")?
        .execute(params![user_id.as_str(), doomed])?;
    Ok(())
}

fn live(sql: &Connection, id: &str) -> rusqlite::Result<Option<SessionStanding>> {
    let row = sql
        .prepare_cached(&format!(
            "SELECT {COLUMNS} FROM sessions WHERE session_id = ?1 AND ended_at IS NULL"
        ))?
        .query_row([id], session)
        .optional()?;
    Ok(row.and_then(SessionRow::standing))
}

fn session(row: &Row<'_>) -> rusqlite::Result<SessionRow> {
    Ok(SessionRow {
        session_id: row.get::<_, Text<SessionId>>(0)?.0,
        user_id: row.get::<_, Option<Text<UserId>>>(1)?.map(|id| id.0),
        started_at: row.get::<_, Time>(2)?.0,
        expires_at: row.get::<_, Time>(3)?.0,
        last_active_at: row.get::<_, Time>(4)?.0,
        remembered: row.get(5)?,
        ended_reason: row.get::<_, Option<Word<EndReason>>>(6)?.map(|reason| reason.0),
        ended_at: row.get::<_, Option<Time>>(7)?.map(|at| at.0),
        ip_address: row.get(8)?,
        user_agent: row.get(9)?,
    })
}
