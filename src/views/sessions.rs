//! The sessions: who is signed in where, and which sessions are due to end.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chrono::{DateTime, Utc};
use rusqlite::{Connection, OptionalExtension, Row, params};
use serde::Serialize;

use super::batch::{Batch, Record};
use super::column::{Text, Time, Word, int};
use super::page::{Page, one_more};
use super::{Change, Error, Views};
use crate::domain::ids::{SessionId, UserId};
use crate::domain::session::{EndReason, Event, INACTIVITY};
use crate::domain::text::Personal;

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
CREATE INDEX sessions_doomed ON sessions (doomed) WHERE doomed IS NOT NULL;
";

pub(super) const INDEXES: &str = "
CREATE INDEX sessions_of_user ON sessions (user_id, ended_at, started_at);
-- With the user, so that the active ones are counted without touching the rows.
CREATE INDEX sessions_active ON sessions (last_active_at, user_id);
CREATE INDEX sessions_due ON sessions (due_at) WHERE due_at IS NOT NULL;
";

const COLUMNS: &str = "session_id, user_id, started_at, expires_at, last_active_at, remembered, \
                       ended_reason, ended_at, ip_address, user_agent";

#[derive(Debug, Clone, PartialEq, Serialize, utoipa::ToSchema)]
#[schema(as = OwnSession)]
pub struct SessionRow {
    #[schema(value_type = String)]
    pub session_id: SessionId,
    /// Absent when the end was all that was ever heard of it.
    #[schema(value_type = Option<String>)]
    pub user_id: Option<UserId>,
    pub started_at: DateTime<Utc>,
    pub expires_at: DateTime<Utc>,
    pub last_active_at: DateTime<Utc>,
    pub remembered: bool,
    #[schema(value_type = Option<String>)]
    pub ended_reason: Option<EndReason>,
    pub ended_at: Option<DateTime<Utc>>,
    pub ip_address: Option<String>,
    pub user_agent: Option<String>,
}

/// Where the page before ended. Opaque to clients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionCursor {
    /// Microseconds since 1970.
    started_at_us: i64,
    session_id: SessionId,
}

impl SessionCursor {
    fn of(row: &SessionRow) -> Self {
        Self {
            started_at_us: row.started_at.timestamp_micros(),
            session_id: row.session_id.clone(),
        }
    }

    /// None for what [`Page::next_cursor`] never was.
    pub fn parse(text: &str) -> Option<Self> {
        let text = String::from_utf8(URL_SAFE_NO_PAD.decode(text).ok()?).ok()?;
        let (started_at_us, session_id) = text.split_once('/')?;
        let session_id = SessionId::try_from(session_id.to_owned()).ok()?;
        Some(Self { started_at_us: started_at_us.parse().ok()?, session_id })
    }

    fn text(&self) -> String {
        URL_SAFE_NO_PAD.encode(format!("{}/{}", self.started_at_us, self.session_id))
    }
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
    pub fn sessions_of(
        &self,
        user_id: &UserId,
        cursor: Option<&SessionCursor>,
        limit: usize,
    ) -> Result<Page<SessionRow>, Error> {
        let started_at = cursor.map_or(i64::MAX, |cursor| cursor.started_at_us);
        let session_id = cursor.map_or("", |cursor| cursor.session_id.as_str());
        let mut items: Vec<SessionRow> = self.read(|sql| {
            sql.prepare_cached(&format!(
                "SELECT {COLUMNS} FROM sessions WHERE user_id = ?1 AND ended_at IS NULL
                 AND started_at <= ?2 AND (started_at < ?2 OR session_id > ?3)
                 ORDER BY started_at DESC, session_id LIMIT ?4"
            ))?
            .query_map(params![user_id.as_str(), started_at, session_id, one_more(limit)], session)?
            .collect()
        })?;
        let more = items.len() > limit;
        items.truncate(limit);
        let next_cursor = items.last().filter(|_| more).map(|row| SessionCursor::of(row).text());
        Ok(Page { items, next_cursor })
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

/// A row, and what of it clients do not see.
pub(super) struct Session {
    row: SessionRow,
    /// When time alone ends it; none once it has ended.
    due_at: Option<DateTime<Utc>>,
    /// Why it must end although its time is not over.
    doomed: Option<EndReason>,
}

impl Batch<'_> {
    pub fn session(&mut self, session_id: &SessionId, event: &Event) -> rusqlite::Result<()> {
        match event {
            Event::Started { user_id, started_at, expires_at, ip_address, user_agent } => {
                // One that is known already, ended above all, is not started again.
                if self.held.sessions.get(self.sql, session_id)?.is_some() {
                    return Ok(());
                }
                let (deleted, banned) = match self.held.users.get(self.sql, user_id)? {
                    Some(user) => (user.row.deleted, user.row.banned),
                    None => (false, false),
                };
                // Where somebody came from who has been forgotten by now is not remembered again.
                let text = |field: &Option<Personal<String>>| {
                    field.as_ref()?.known().filter(|_| !deleted).cloned()
                };
                let row = SessionRow {
                    user_id: Some(user_id.clone()),
                    ip_address: text(ip_address),
                    user_agent: text(user_agent),
                    ..SessionRow::bare(session_id, *started_at, *expires_at)
                };
                let doomed = match (deleted, banned) {
                    (true, _) => Some(EndReason::UserDeleted),
                    (false, true) => Some(EndReason::UserBanned),
                    (false, false) => None,
                };
                let due_at = row.due_at();
                let session = Session { row, due_at, doomed };
                self.held.sessions.put(self.sql, session_id, session)?;
            }
            Event::Active { at, .. } => self.live_session(session_id, |row| {
                row.last_active_at = *at;
            })?,
            Event::Remembered { remember_me, expires_at, .. } => {
                self.live_session(session_id, |row| {
                    row.remembered = *remember_me;
                    row.expires_at = *expires_at;
                })?;
            }
            Event::Ended { user_id, reason, at } => {
                if self.held.sessions.get(self.sql, session_id)?.is_none() {
                    let row = SessionRow {
                        user_id: user_id.clone(),
                        ..SessionRow::bare(session_id, *at, *at)
                    };
                    let session = Session { row, due_at: None, doomed: None };
                    self.held.sessions.put(self.sql, session_id, session)?;
                }
                // The first end stands.
                self.live_session(session_id, |row| {
                    row.ended_reason = Some(*reason);
                    row.ended_at = Some(*at);
                })?;
                if let Some(user_id) = user_id {
                    self.touch(user_id);
                }
            }
        }
        Ok(())
    }

    /// Changes a session that has not ended.
    fn live_session(
        &mut self,
        session_id: &SessionId,
        change: impl FnOnce(&mut SessionRow),
    ) -> rusqlite::Result<()> {
        if let Some(session) = self.held.sessions.change(self.sql, session_id)?
            && session.row.ended_at.is_none()
        {
            change(&mut session.row);
            session.due_at = session.row.due_at();
            session.doomed = session.doomed.filter(|_| session.row.ended_at.is_none());
        }
        Ok(())
    }
}

impl Session {
    /// What the memory holds of it; nothing once it has ended.
    pub fn standing(&self) -> Option<SessionStanding> {
        if self.row.ended_at.is_some() { None } else { self.row.clone().standing() }
    }
}

impl SessionRow {
    fn bare(session_id: &SessionId, at: DateTime<Utc>, expires_at: DateTime<Utc>) -> Self {
        Self {
            session_id: session_id.clone(),
            user_id: None,
            started_at: at,
            expires_at,
            last_active_at: at,
            remembered: false,
            ended_reason: None,
            ended_at: None,
            ip_address: None,
            user_agent: None,
        }
    }

    fn due_at(&self) -> Option<DateTime<Utc>> {
        let idle = self.last_active_at.checked_add_signed(INACTIVITY).unwrap_or(self.expires_at);
        match (self.ended_at, self.remembered) {
            (Some(_), _) => None,
            (None, true) => Some(self.expires_at),
            (None, false) => Some(self.expires_at.min(idle)),
        }
    }
}

impl Record for Session {
    type Key = SessionId;

    fn find(sql: &Connection, session_id: &SessionId) -> rusqlite::Result<Option<Self>> {
        sql.prepare_cached(&format!(
            "SELECT {COLUMNS}, due_at, doomed FROM sessions WHERE session_id = ?1"
        ))?
        .query_row([session_id.as_str()], |row| {
            Ok(Self {
                row: session(row)?,
                due_at: row.get::<_, Option<Time>>(10)?.map(|at| at.0),
                doomed: row.get::<_, Option<Word<EndReason>>>(11)?.map(|reason| reason.0),
            })
        })
        .optional()
    }

    fn insert(&self, sql: &Connection, session_id: &SessionId) -> rusqlite::Result<()> {
        let row = &self.row;
        sql.prepare_cached(
            "INSERT INTO sessions VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)",
        )?
        .execute(params![
            session_id.as_str(),
            row.user_id.as_ref().map(UserId::as_str),
            Time(row.started_at),
            Time(row.expires_at),
            Time(row.last_active_at),
            row.remembered,
            row.ended_reason.map(EndReason::as_str),
            row.ended_at.map(Time),
            row.ip_address,
            row.user_agent,
            self.due_at.map(Time),
            self.doomed.map(EndReason::as_str),
        ])?;
        Ok(())
    }

    /// Where it came from never changes.
    fn update(&self, sql: &Connection, session_id: &SessionId) -> rusqlite::Result<()> {
        let row = &self.row;
        sql.prepare_cached(
            "UPDATE sessions SET expires_at = ?2, last_active_at = ?3, remembered = ?4,
                 ended_reason = ?5, ended_at = ?6, due_at = ?7, doomed = ?8
             WHERE session_id = ?1",
        )?
        .execute(params![
            session_id.as_str(),
            Time(row.expires_at),
            Time(row.last_active_at),
            row.remembered,
            row.ended_reason.map(EndReason::as_str),
            row.ended_at.map(Time),
            self.due_at.map(Time),
            self.doomed.map(EndReason::as_str),
        ])?;
        Ok(())
    }

    fn delete(sql: &Connection, session_id: &SessionId) -> rusqlite::Result<()> {
        sql.prepare_cached("DELETE FROM sessions WHERE session_id = ?1")?
            .execute([session_id.as_str()])?;
        Ok(())
    }
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
