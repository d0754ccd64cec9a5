//! The users: who they are and what they may do. The latter is held in memory too, because every
//! request asks for it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use chrono::{DateTime, TimeDelta, Utc};
use rusqlite::{Connection, OptionalExtension, Row, params};
use serde::Serialize;

use super::batch::{Batch, Record};
use super::column::{Json, Text, Time, int, unsigned};
use super::page::{Cursor, Page, before, one_more};
use super::{Change, Error, Views, files, jobs, sessions, tallies};
use crate::domain::ids::UserId;
use crate::domain::text::Personal;
use crate::domain::user::{Access, Event, Membership, Onboarding, Profile, Right};

pub(super) const SCHEMA: &str = "
CREATE TABLE users (
    user_id TEXT PRIMARY KEY,
    -- Where the user was registered or deleted; null while only memberships are known.
    position INTEGER,
    email TEXT,
    first_name TEXT,
    last_name TEXT,
    username TEXT,
    image_url TEXT,
    role TEXT NOT NULL,
    permissions TEXT NOT NULL,
    subscription_tier TEXT NOT NULL,
    user_type TEXT,
    feature_flags TEXT NOT NULL,
    onboarding TEXT,
    banned INTEGER NOT NULL,
    deleted INTEGER NOT NULL,
    provisional INTEGER NOT NULL,
    organizations TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL,
    access_position INTEGER NOT NULL,
    access_changed_at INTEGER,
    told_at INTEGER,
    decided_here INTEGER NOT NULL
) WITHOUT ROWID;
";

/// What the deletions and bans of a whole history come to for the rows of those users. What follows
/// a deletion is blank from the start, so that it does not matter when this is done.
pub(super) const SETTLE: &str = "
UPDATE sessions SET doomed = NULL WHERE doomed IS NOT NULL;
UPDATE sessions SET doomed = iif(users.deleted, 'user_deleted', 'user_banned') FROM users
    WHERE users.user_id = sessions.user_id AND (users.deleted OR users.banned)
    AND ended_at IS NULL;
UPDATE sessions SET ip_address = NULL, user_agent = NULL
    WHERE user_id IN (SELECT user_id FROM users WHERE deleted);
UPDATE files SET filename = '', metadata = '{}'
    WHERE user_id IN (SELECT user_id FROM users WHERE deleted);
UPDATE jobs SET prompt = '', options = json_remove(options, '$.style', '$.style_data')
    WHERE user_id IN (SELECT user_id FROM users WHERE deleted);
";

pub(super) const INDEXES: &str = "
CREATE INDEX users_by_age ON users (position) WHERE position IS NOT NULL;
-- Of a deleted user it is where the deletion lies.
CREATE INDEX users_deleted ON users (access_position) WHERE deleted;
";

const COLUMNS: &str = "user_id, position, email, first_name, last_name, username, image_url, role, \
                       permissions, subscription_tier, user_type, feature_flags, onboarding, \
                       banned, deleted, provisional, organizations, created_at, updated_at, \
                       access_position, access_changed_at, told_at, decided_here";

#[derive(Debug, Clone, PartialEq, Serialize, utoipa::ToSchema)]
#[schema(as = UserAnswer)]
pub struct UserRow {
    #[schema(value_type = String)]
    pub user_id: UserId,
    pub email: Option<String>,
    pub first_name: Option<String>,
    pub last_name: Option<String>,
    pub username: Option<String>,
    pub image_url: Option<String>,
    pub role: String,
    pub permissions: BTreeSet<String>,
    pub subscription_tier: String,
    pub user_type: Option<String>,
    pub feature_flags: BTreeMap<String, bool>,
    pub onboarding: Option<Onboarding>,
    pub banned: bool,
    /// Then all else is empty.
    pub deleted: bool,
    pub provisional: bool,
    /// In the order in which they were joined.
    pub organizations: Vec<Membership>,
    pub created_at: DateTime<Utc>,
    pub updated_at: DateTime<Utc>,
}

/// What a request must know of its user.
#[derive(Debug, Clone, PartialEq)]
pub struct UserAccess {
    pub deleted: bool,
    pub banned: bool,
    pub provisional: bool,
    pub role: String,
    pub permissions: BTreeSet<String>,
    pub subscription_tier: String,
    pub user_type: Option<String>,
    pub feature_flags: BTreeMap<String, bool>,
    /// The last change of role, permissions, tier, user type or flags; 0 if there was none.
    pub access_position: u64,
    /// When that was, by our own clock: a token issued earlier does not know of it.
    pub access_changed_at: Option<DateTime<Utc>>,
    /// Up to when, by Clerk's clock, its word is known: so much for a token issued no later.
    pub told_at: Option<DateTime<Utc>>,
    /// What was last set by an administrator here, and not told by Clerk since: no token knows
    /// better.
    pub decided_here: DecidedHere,
}

#[derive(Debug, Clone, Default, PartialEq)]
pub struct DecidedHere {
    pub rights: BTreeSet<Right>,
    pub user_type: bool,
    pub flags: bool,
}

impl Views {
    /// From memory. Nothing for a user who was neither registered nor deleted yet.
    pub fn user_standing(&self, user_id: &UserId) -> Option<Arc<UserAccess>> {
        self.current().users.get(user_id)
    }

    /// A user; a deleted one too, as such.
    pub fn user(&self, user_id: &UserId) -> Result<Option<UserRow>, Error> {
        let found = self.read(|sql| User::find(sql, user_id))?;
        Ok(found.filter(|user| user.position.is_some()).map(|user| user.row))
    }

    /// Users whose deletion lies after a position, with its position, in that order.
    pub fn users_deleted_after(
        &self,
        position: u64,
        limit: usize,
    ) -> Result<Vec<(u64, UserId)>, Error> {
        self.read(|sql| {
            sql.prepare_cached(
                "SELECT access_position, user_id FROM users
                 WHERE deleted AND access_position > ?1 ORDER BY access_position LIMIT ?2",
            )?
            .query_map(params![int(position), int(limit as u64)], |row| {
                Ok((unsigned(row.get(0)?), row.get::<_, Text<UserId>>(1)?.0))
            })?
            .collect()
        })
    }

    /// All users, the newest first, the deleted ones among them.
    pub fn users(&self, cursor: Option<&Cursor>, limit: usize) -> Result<Page<UserRow>, Error> {
        let rows = self.read(|sql| {
            sql.prepare_cached(&format!(
                "SELECT {COLUMNS} FROM users WHERE position IS NOT NULL AND position < ?1
                 ORDER BY position DESC LIMIT ?2"
            ))?
            .query_map(params![before(cursor), one_more(limit)], |row| {
                user(row).map(|user| (user.position.unwrap_or_default(), user.row))
            })?
            .collect()
        })?;
        Ok(Page::cut(rows, limit))
    }
}

/// A row, and what of it clients do not see.
pub(super) struct User {
    pub row: UserRow,
    position: Option<u64>,
    access_position: u64,
    access_changed_at: Option<DateTime<Utc>>,
    told_at: Option<DateTime<Utc>>,
    decided_here: DecidedHere,
}

impl Batch<'_> {
    pub fn user(
        &mut self,
        position: u64,
        time: DateTime<Utc>,
        user_id: &UserId,
        event: &Event,
    ) -> rusqlite::Result<()> {
        if self.held.users.get(self.sql, user_id)?.is_none() {
            self.held.users.put(self.sql, user_id, User::unknown(user_id.clone(), time))?;
        }
        let Some(user) = self.held.users.change(self.sql, user_id)? else { return Ok(()) };
        if user.row.deleted {
            // For ever, whatever comes late.
            return Ok(());
        }
        let before = user.is_there();
        user.take_in(position, time, event);
        let change = i64::from(user.is_there()) - i64::from(before);
        if change != 0 {
            self.count(tallies::Item::Users, change, 0.0)?;
        }
        match event {
            // In one go when it is finished: see `SETTLE`.
            Event::Deleted {} | Event::Banned {} | Event::Unbanned {} if self.building => Ok(()),
            Event::Deleted {} => {
                self.save()?;
                sessions::erase(self.sql, user_id)?;
                files::erase(self.sql, user_id)?;
                jobs::erase(self.sql, user_id)
            }
            Event::Banned {} | Event::Unbanned {} => {
                self.save()?;
                sessions::ban(self.sql, user_id, matches!(event, Event::Banned {}))
            }
            Event::Registered { .. }
            | Event::ProfileChanged { .. }
            | Event::AccessChanged { .. }
            | Event::AttributesChanged { .. }
            | Event::FlagsChanged { .. }
            | Event::OrganizationJoined { .. }
            | Event::OrganizationRoleChanged { .. }
            | Event::OrganizationLeft { .. }
            | Event::OnboardingProgressed { .. } => Ok(()),
        }
    }

    /// Whether the user was deleted: then nothing personal of it is taken in any more.
    pub fn is_erased(&mut self, user_id: &UserId) -> rusqlite::Result<bool> {
        Ok(self.held.users.get(self.sql, user_id)?.is_some_and(|user| user.row.deleted))
    }
}

/// What all users may do, to be held in memory.
pub(super) fn load(sql: &Connection, mut take: impl FnMut(Change)) -> rusqlite::Result<()> {
    let mut query =
        sql.prepare(&format!("SELECT {COLUMNS} FROM users WHERE position IS NOT NULL"))?;
    let mut rows = query.query([])?;
    while let Some(row) = rows.next()? {
        let user = user(row)?;
        user.change(&user.row.user_id).map(&mut take);
    }
    Ok(())
}

impl User {
    fn unknown(user_id: UserId, time: DateTime<Utc>) -> Self {
        let Access { role, permissions, subscription_tier } = Access::default();
        let row = UserRow {
            user_id,
            email: None,
            first_name: None,
            last_name: None,
            username: None,
            image_url: None,
            role,
            permissions,
            subscription_tier,
            user_type: None,
            feature_flags: BTreeMap::new(),
            onboarding: None,
            banned: false,
            deleted: false,
            provisional: false,
            organizations: vec![],
            created_at: time,
            updated_at: time,
        };
        Self {
            row,
            position: None,
            access_position: 0,
            access_changed_at: None,
            told_at: None,
            decided_here: DecidedHere::default(),
        }
    }

    /// What the memory holds of it; nothing while it was neither registered nor deleted.
    pub fn change(&self, user_id: &UserId) -> Option<Change> {
        self.position?;
        Some(Change::User(user_id.clone(), Arc::new(self.access())))
    }

    /// Registered, and not deleted.
    fn is_there(&self) -> bool {
        self.position.is_some() && !self.row.deleted
    }

    fn take_in(&mut self, position: u64, time: DateTime<Utc>, event: &Event) {
        let row = &mut self.row;
        row.updated_at = time;
        match event {
            Event::Registered { profile, provisional, .. } => {
                row.provisional = *provisional;
                row.created_at = time;
                row.set_profile(profile);
                self.position = Some(position);
            }
            Event::ProfileChanged { profile, source_updated_at, .. } => {
                row.provisional = false;
                row.set_profile(profile);
                self.is_told(*source_updated_at);
            }
            Event::AccessChanged { access, decided_at, decided } => {
                let here = decided_at.is_some();
                for right in row.access().settled_by(access, here, decided.as_ref()) {
                    if here {
                        self.decided_here.rights.insert(right);
                    } else {
                        self.decided_here.rights.remove(&right);
                    }
                }
                row.role.clone_from(&access.role);
                row.permissions.clone_from(&access.permissions);
                row.subscription_tier.clone_from(&access.subscription_tier);
                self.access_is_of(position, time);
            }
            Event::AttributesChanged { user_type, decided_at } => {
                row.user_type.clone_from(user_type);
                self.decided_here.user_type = decided_at.is_some();
                self.access_is_of(position, time);
            }
            Event::FlagsChanged { feature_flags, decided_at } => {
                row.feature_flags.clone_from(feature_flags);
                self.decided_here.flags = decided_at.is_some();
                self.access_is_of(position, time);
            }
            Event::OrganizationJoined { membership, .. } => {
                let place = row
                    .organizations
                    .iter_mut()
                    .find(|known| known.membership_id == membership.membership_id);
                match place {
                    Some(known) => known.clone_from(membership),
                    None => row.organizations.push(membership.clone()),
                }
            }
            Event::OrganizationRoleChanged { membership_id, role, permissions, .. } => {
                for known in &mut row.organizations {
                    if known.membership_id == *membership_id {
                        known.role.clone_from(role);
                        known.permissions.clone_from(permissions);
                    }
                }
            }
            Event::OrganizationLeft { membership_id, .. } => {
                row.organizations.retain(|known| known.membership_id != *membership_id);
            }
            Event::OnboardingProgressed { onboarding, .. } => {
                row.onboarding = Some(onboarding.clone());
            }
            Event::Banned {} => row.banned = true,
            Event::Unbanned {} => row.banned = false,
            Event::Deleted {} => self.erase(position, time),
        }
    }

    /// As new as our hearing of it, even where Clerk's word is older: whoever is told that a change
    /// was taken in may rely on it against every token from before.
    fn access_is_of(&mut self, position: u64, time: DateTime<Utc>) {
        self.access_position = position;
        self.access_changed_at = self.access_changed_at.max(Some(time));
    }

    /// Even when no right changed: an older token may name one that was taken away before, in a
    /// delivery that never came or comes late. The first word is not known to take anything away:
    /// a token of its very second counts.
    fn is_told(&mut self, at: DateTime<Utc>) {
        let first = self.told_at.is_none();
        let until = if first { at.checked_sub_signed(TimeDelta::seconds(1)) } else { Some(at) };
        self.told_at = self.told_at.max(until);
    }

    fn erase(&mut self, position: u64, time: DateTime<Utc>) {
        let known = Self::unknown(self.row.user_id.clone(), time);
        let created_at = if self.position.is_some() { self.row.created_at } else { time };
        self.row = UserRow { deleted: true, created_at, ..known.row };
        self.position.get_or_insert(position);
        self.access_is_of(position, time);
    }

    fn access(&self) -> UserAccess {
        let row = &self.row;
        UserAccess {
            deleted: row.deleted,
            banned: row.banned,
            provisional: row.provisional,
            role: row.role.clone(),
            permissions: row.permissions.clone(),
            subscription_tier: row.subscription_tier.clone(),
            user_type: row.user_type.clone(),
            feature_flags: row.feature_flags.clone(),
            access_position: self.access_position,
            access_changed_at: self.access_changed_at,
            told_at: self.told_at,
            decided_here: self.decided_here.clone(),
        }
    }
}

/// As a column holds it: a bit for each right, in their order, and then for the others.
impl DecidedHere {
    const USER_TYPE: i64 = 1 << Right::ALL.len();
    const FLAGS: i64 = Self::USER_TYPE << 1;

    fn bits(&self) -> i64 {
        let rights: i64 = self.rights.iter().map(|right| 1 << *right as i64).sum();
        let others = [(self.user_type, Self::USER_TYPE), (self.flags, Self::FLAGS)];
        rights + others.into_iter().filter(|(is, _)| *is).map(|(_, bit)| bit).sum::<i64>()
    }

    fn of(bits: i64) -> Self {
        let is = |right: &Right| bits >> *right as i64 & 1 == 1;
        Self {
            rights: Right::ALL.into_iter().filter(is).collect(),
            user_type: bits & Self::USER_TYPE != 0,
            flags: bits & Self::FLAGS != 0,
        }
    }
}

impl UserRow {
    pub fn access(&self) -> Access {
        Access {
            role: self.role.clone(),
            permissions: self.permissions.clone(),
            subscription_tier: self.subscription_tier.clone(),
        }
    }

    fn set_profile(&mut self, profile: &Profile) {
        let clear = |field: &Option<Personal<String>>| field.as_ref()?.known().cloned();
        self.email = clear(&profile.email);
        self.first_name = clear(&profile.first_name);
        self.last_name = clear(&profile.last_name);
        self.username = clear(&profile.username);
        self.image_url = clear(&profile.image_url);
    }
}

impl Record for User {
    type Key = UserId;

    fn find(sql: &Connection, user_id: &UserId) -> rusqlite::Result<Option<Self>> {
        sql.prepare_cached(&format!("SELECT {COLUMNS} FROM users WHERE user_id = ?1"))?
            .query_row([user_id.as_str()], user)
            .optional()
    }

    fn insert(&self, sql: &Connection, user_id: &UserId) -> rusqlite::Result<()> {
        self.update(sql, user_id)
    }

    fn update(&self, sql: &Connection, user_id: &UserId) -> rusqlite::Result<()> {
        let row = &self.row;
        sql.prepare_cached(&format!(
            "INSERT OR REPLACE INTO users ({COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9,
                 ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18, ?19, ?20, ?21, ?22, ?23)"
        ))?
        .execute(params![
            user_id.as_str(),
            self.position.map(int),
            row.email,
            row.first_name,
            row.last_name,
            row.username,
            row.image_url,
            row.role,
            Json(&row.permissions),
            row.subscription_tier,
            row.user_type,
            Json(&row.feature_flags),
            row.onboarding.as_ref().map(Json),
            row.banned,
            row.deleted,
            row.provisional,
            Json(&row.organizations),
            Time(row.created_at),
            Time(row.updated_at),
            int(self.access_position),
            self.access_changed_at.map(Time),
            self.told_at.map(Time),
            self.decided_here.bits(),
        ])?;
        Ok(())
    }

    fn delete(sql: &Connection, user_id: &UserId) -> rusqlite::Result<()> {
        sql.prepare_cached("DELETE FROM users WHERE user_id = ?1")?.execute([user_id.as_str()])?;
        Ok(())
    }
}

fn user(row: &Row<'_>) -> rusqlite::Result<User> {
    Ok(User {
        row: UserRow {
            user_id: row.get::<_, Text<UserId>>(0)?.0,
            email: row.get(2)?,
            first_name: row.get(3)?,
            last_name: row.get(4)?,
            username: row.get(5)?,
            image_url: row.get(6)?,
            role: row.get(7)?,
            permissions: row.get::<_, Json<_>>(8)?.0,
            subscription_tier: row.get(9)?,
            user_type: row.get(10)?,
            feature_flags: row.get::<_, Json<_>>(11)?.0,
            onboarding: row.get::<_, Option<Json<_>>>(12)?.map(|onboarding| onboarding.0),
            banned: row.get(13)?,
            deleted: row.get(14)?,
            provisional: row.get(15)?,
            organizations: row.get::<_, Json<_>>(16)?.0,
            created_at: row.get::<_, Time>(17)?.0,
            updated_at: row.get::<_, Time>(18)?.0,
        },
        position: row.get::<_, Option<i64>>(1)?.map(unsigned),
        access_position: unsigned(row.get(19)?),
        access_changed_at: row.get::<_, Option<Time>>(20)?.map(|at| at.0),
        told_at: row.get::<_, Option<Time>>(21)?.map(|at| at.0),
        decided_here: DecidedHere::of(row.get(22)?),
    })
}
