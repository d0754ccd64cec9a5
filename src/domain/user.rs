//! A user: who it is according to Clerk, and what it may do.
//!
//! Clerk delivers at least once and in any order, so every change carries the time it happened at
//! its source; what is older than what is known changes nothing, and a deletion is for ever.
//!
//! What is decided here stands until Clerk brings a newer word on the same key of its metadata: a
//! delivery repeats the whole user, so a key that it merely repeats is no word.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Aggregate;
use super::ids::UserId;
use super::text::{Personal, Visit};

pub use access::{Access, AccessChange, Right};
pub use memberships::{Assignment, Membership, MembershipState, Placement};
pub use word::{Claimed, Decided, Told};

mod access;
mod memberships;
mod word;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", content = "data")]
pub enum Event {
    #[serde(rename = "user.registered.v1")]
    Registered {
        profile: Box<Profile>,
        /// True when the claims of a token came before Clerk's webhook.
        provisional: bool,
        /// What those claims said of the user's rights.
        #[serde(default, skip_serializing_if = "Told::is_empty")]
        told: Told,
        /// When the token that said it was issued; absent in older events.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        claimed_at: Option<DateTime<Utc>>,
    },
    #[serde(rename = "user.profile_changed.v1")]
    ProfileChanged {
        profile: Box<Profile>,
        /// When it changed at Clerk.
        source_updated_at: DateTime<Utc>,
        /// What Clerk's metadata said of the user's rights at that time.
        #[serde(default, skip_serializing_if = "Told::is_empty")]
        told: Told,
    },
    #[serde(rename = "user.access_changed.v1")]
    AccessChanged {
        access: Access,
        /// When it was decided here; absent when Clerk told it, and in older events.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        decided_at: Option<DateTime<Utc>>,
        /// Which rights were decided, changed or not. Absent when Clerk told it, and in older
        /// events: there those that changed, or all of them if none did.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        decided: Option<BTreeSet<Right>>,
    },
    #[serde(rename = "user.attributes_changed.v1")]
    AttributesChanged {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        user_type: Option<String>,
        /// When it was decided here; absent when Clerk told it, and in older events.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        decided_at: Option<DateTime<Utc>>,
    },
    #[serde(rename = "user.flags_changed.v1")]
    FlagsChanged {
        feature_flags: BTreeMap<String, bool>,
        /// When it was decided here; absent when Clerk told it, and in older events.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        decided_at: Option<DateTime<Utc>>,
    },
    #[serde(rename = "user.organization_joined.v1")]
    OrganizationJoined { membership: Membership, source_updated_at: DateTime<Utc> },
    #[serde(rename = "user.organization_role_changed.v1")]
    OrganizationRoleChanged {
        membership_id: String,
        role: String,
        permissions: BTreeSet<String>,
        source_updated_at: DateTime<Utc>,
    },
    #[serde(rename = "user.organization_left.v1")]
    OrganizationLeft { membership_id: String, organization_id: String },
    #[serde(rename = "user.onboarding_progressed.v1")]
    OnboardingProgressed {
        onboarding: Onboarding,
        /// When the user told it here; absent when Clerk or a token did, and in older events.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        decided_at: Option<DateTime<Utc>>,
    },
    #[serde(rename = "user.banned.v1")]
    Banned {},
    #[serde(rename = "user.unbanned.v1")]
    Unbanned {},
    #[serde(rename = "user.deleted.v1")]
    Deleted {},
}

/// Who the user is. Absent fields were empty at Clerk; nothing is made up for them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Profile {
    /// The primary address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub email: Option<Personal<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_name: Option<Personal<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_name: Option<Personal<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub username: Option<Personal<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_url: Option<Personal<String>>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema, utoipa::ToSchema)]
pub struct Onboarding {
    pub step: u32,
    pub total_steps: u32,
    pub status: OnboardingStatus,
}

impl Onboarding {
    /// Steps where nobody names a total (seed `marketplace-session-token`).
    pub const DEFAULT_STEPS: u32 = 8;

    pub fn is_completed(&self) -> bool {
        self.status == OnboardingStatus::Completed
    }
}

#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema, utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum OnboardingStatus {
    NotStarted,
    InProgress,
    Completed,
    Abandoned,
}

impl OnboardingStatus {
    /// As seed `marketplace-session-token` spells them.
    pub const NAMES: [&'static str; 4] = ["not_started", "in_progress", "completed", "abandoned"];

    pub fn parse(name: &str) -> Option<Self> {
        let all = [Self::NotStarted, Self::InProgress, Self::Completed, Self::Abandoned];
        Self::NAMES.iter().position(|known| *known == name).map(|index| all[index])
    }
}

/// All that one `user.created` or `user.updated` of Clerk says.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Snapshot {
    pub profile: Profile,
    /// The public metadata.
    pub told: Told,
    pub banned: bool,
}

/// All that the claims of a token say of its user.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Claims {
    pub snapshot: Snapshot,
    /// Under ids of [`Membership::claimed`].
    pub memberships: Vec<Membership>,
    pub onboarding: Option<Onboarding>,
    pub issued_at: DateTime<Utc>,
}

impl From<Snapshot> for Claims {
    fn from(snapshot: Snapshot) -> Self {
        Self { snapshot, ..Self::default() }
    }
}

#[derive(Debug, Clone)]
pub enum Command {
    /// The first request of a user whom no webhook has told of yet: the claims of the token.
    Provision(Claims),
    /// Clerk tells how the user was at `source_updated_at`.
    Sync {
        snapshot: Snapshot,
        source_updated_at: DateTime<Utc>,
    },
    /// Clerk tells how a membership was at `source_updated_at`.
    Join {
        membership: Membership,
        source_updated_at: DateTime<Utc>,
    },
    Leave {
        membership_id: String,
        organization_id: String,
    },
    /// An administrator decides.
    SetAccess(AccessChange),
    SetFlags(BTreeMap<String, bool>),
    Place(Placement),
    Onboard(Onboarding),
    Delete,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("no such user")]
    NotFound,
    #[error("the user was deleted")]
    Deleted,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct User {
    pub standing: Standing,
    pub profile: Profile,
    pub access: Access,
    pub user_type: Option<String>,
    pub feature_flags: BTreeMap<String, bool>,
    pub onboarding: Option<Onboarding>,
    pub banned: bool,
    /// By membership; a left one stays as a tombstone, so that a late update cannot revive it.
    pub memberships: BTreeMap<String, MembershipState>,
    pub told: Told,
    /// What a token claimed, until a word of Clerk's is known that is newer.
    pub claimed: Option<Claimed>,
    /// Up to when Clerk's word about the user is known.
    pub synced_at: Option<DateTime<Utc>>,
    pub decided: Decided,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    #[default]
    Unknown,
    Provisional,
    Registered,
    Deleted,
}

impl Aggregate for User {
    const CATEGORY: &'static str = "user";
    type Command = Command;
    type Event = Event;
    type Refusal = Refusal;

    fn decide(&self, command: &Command, now: DateTime<Utc>) -> Result<Vec<Event>, Refusal> {
        if self.standing == Standing::Deleted {
            return self.decide_deleted(command);
        }
        match command {
            Command::Provision(claims) => Ok(self.provision(claims)),
            Command::Sync { snapshot, source_updated_at } => {
                Ok(self.sync(snapshot, *source_updated_at))
            }
            Command::Join { membership, source_updated_at } => {
                Ok(self.join(membership, *source_updated_at))
            }
            Command::Leave { membership_id, organization_id } => {
                Ok(self.leave(membership_id, organization_id))
            }
            Command::SetAccess(change) => {
                // Recorded even when equal: it overrules tokens from before.
                let (access, decided) = (change.of(&self.access), Some(change.rights()));
                let event = Event::AccessChanged { access, decided_at: Some(now), decided };
                self.known().map(|()| vec![event])
            }
            Command::SetFlags(flags) => self.known().map(|()| self.flags_to(flags, Some(now))),
            Command::Place(placement) => self.known().map(|()| self.place(placement, now)),
            Command::Onboard(onboarding) => {
                self.known().map(|()| self.onboard(onboarding, Some(now)))
            }
            Command::Delete => Ok(vec![Event::Deleted {}]),
        }
    }

    fn evolve(&mut self, event: &Event) {
        match event {
            Event::Registered { profile, provisional, told, claimed_at } => {
                self.standing =
                    if *provisional { Standing::Provisional } else { Standing::Registered };
                self.profile = Profile::clone(profile);
                self.told = told.clone();
                self.claimed =
                    claimed_at.map(|issued_at| Claimed { told: told.clone(), issued_at });
            }
            Event::ProfileChanged { profile, source_updated_at, told } => {
                self.standing = Standing::Registered;
                self.profile = Profile::clone(profile);
                self.hear(told, *source_updated_at);
            }
            Event::AccessChanged { access, decided_at, decided } => {
                let here = decided_at.is_some();
                for right in self.access.settled_by(access, here, decided.as_ref()) {
                    self.decided.settle(right, access, *decided_at);
                }
                self.access = access.clone();
            }
            Event::AttributesChanged { user_type, decided_at } => {
                self.user_type = user_type.clone();
                self.decided.user_type.settle(user_type.as_ref(), *decided_at);
            }
            Event::FlagsChanged { feature_flags, decided_at } => {
                self.feature_flags = feature_flags.clone();
                self.decided.flags.settle(Some(feature_flags), *decided_at);
            }
            Event::OrganizationJoined { membership, source_updated_at } => {
                let state = MembershipState::Member {
                    membership: membership.clone(),
                    as_of: *source_updated_at,
                };
                self.memberships.insert(membership.membership_id.clone(), state);
            }
            Event::OrganizationRoleChanged {
                membership_id,
                role,
                permissions,
                source_updated_at,
            } => {
                if let Some(MembershipState::Member { membership, as_of }) =
                    self.memberships.get_mut(membership_id)
                {
                    membership.role = role.clone();
                    membership.permissions = permissions.clone();
                    *as_of = *source_updated_at;
                }
            }
            Event::OrganizationLeft { membership_id, .. } => {
                self.memberships.insert(membership_id.clone(), MembershipState::Left);
            }
            Event::OnboardingProgressed { onboarding, decided_at } => {
                self.onboarding = Some(onboarding.clone());
                self.decided.onboarding.settle(Some(onboarding), *decided_at);
            }
            Event::Banned {} => self.banned = true,
            Event::Unbanned {} => self.banned = false,
            Event::Deleted {} => {
                *self = Self { standing: Standing::Deleted, ..Self::default() };
            }
        }
    }

    fn personal(event: &mut Event, visit: Visit<'_>) {
        match event {
            Event::Registered { profile, .. } | Event::ProfileChanged { profile, .. } => {
                profile.personal(visit);
            }
            Event::AccessChanged { .. }
            | Event::AttributesChanged { .. }
            | Event::FlagsChanged { .. }
            | Event::OrganizationJoined { .. }
            | Event::OrganizationRoleChanged { .. }
            | Event::OrganizationLeft { .. }
            | Event::OnboardingProgressed { .. }
            | Event::Banned {}
            | Event::Unbanned {}
            | Event::Deleted {} => {}
        }
    }

    /// A user's stream is named after its user.
    fn owner(id: &str, _event: &Event) -> Option<UserId> {
        UserId::try_from(id.to_owned()).ok()
    }
}

impl Profile {
    fn personal(&mut self, visit: Visit<'_>) {
        for (place, field) in [
            ("profile.email", &mut self.email),
            ("profile.first_name", &mut self.first_name),
            ("profile.last_name", &mut self.last_name),
            ("profile.username", &mut self.username),
            ("profile.image_url", &mut self.image_url),
        ] {
            if let Some(field) = field {
                visit(place, field);
            }
        }
    }
}

impl User {
    /// What comes late from Clerk changes nothing; what a person asks for is refused.
    fn decide_deleted(&self, command: &Command) -> Result<Vec<Event>, Refusal> {
        match command {
            Command::Sync { .. }
            | Command::Join { .. }
            | Command::Leave { .. }
            | Command::Delete => Ok(vec![]),
            Command::Provision(_)
            | Command::SetAccess(_)
            | Command::SetFlags(_)
            | Command::Place(_)
            | Command::Onboard(_) => Err(Refusal::Deleted),
        }
    }

    fn known(&self) -> Result<(), Refusal> {
        match self.standing {
            Standing::Provisional | Standing::Registered => Ok(()),
            Standing::Unknown => Err(Refusal::NotFound),
            Standing::Deleted => Err(Refusal::Deleted),
        }
    }

    fn provision(&self, claims: &Claims) -> Vec<Event> {
        if self.standing != Standing::Unknown {
            return vec![];
        }
        let snapshot = &claims.snapshot;
        let mut events = vec![Event::Registered {
            profile: Box::new(snapshot.profile.clone()),
            provisional: true,
            told: snapshot.told.clone(),
            claimed_at: (!snapshot.told.is_empty()).then_some(claims.issued_at),
        }];
        events.extend(self.differences(&snapshot.told, None));
        // Who was told of any membership by Clerk, be it one that is over, knows better.
        if self.memberships.is_empty() {
            events.extend(claims.memberships.iter().map(|membership| Event::OrganizationJoined {
                membership: membership.clone(),
                source_updated_at: claims.issued_at,
            }));
        }
        events.extend(claims.onboarding.iter().flat_map(|told| self.onboard(told, None)));
        events
    }

    fn access_to(&self, access: Access) -> Vec<Event> {
        if access == self.access {
            return vec![];
        }
        vec![Event::AccessChanged { access, decided_at: None, decided: None }]
    }

    fn user_type_to(
        &self,
        user_type: Option<&String>,
        decided_at: Option<DateTime<Utc>>,
    ) -> Vec<Event> {
        // Decided where it was so already, it stands against words that are older.
        let decides = decided_at.is_some() && !self.decided.user_type.stands();
        if self.user_type.as_ref() == user_type && !decides {
            return vec![];
        }
        vec![Event::AttributesChanged { user_type: user_type.cloned(), decided_at }]
    }

    fn flags_to(
        &self,
        feature_flags: &BTreeMap<String, bool>,
        decided_at: Option<DateTime<Utc>>,
    ) -> Vec<Event> {
        let decides = decided_at.is_some() && !self.decided.flags.stands();
        if *feature_flags == self.feature_flags && !decides {
            return vec![];
        }
        vec![Event::FlagsChanged { feature_flags: feature_flags.clone(), decided_at }]
    }

    fn has_completed_onboarding(&self) -> bool {
        self.onboarding.as_ref().is_some_and(Onboarding::is_completed)
    }

    fn onboard(&self, onboarding: &Onboarding, decided_at: Option<DateTime<Utc>>) -> Vec<Event> {
        if self.onboarding.as_ref() == Some(onboarding) {
            return vec![];
        }
        vec![Event::OnboardingProgressed { onboarding: onboarding.clone(), decided_at }]
    }
}

#[cfg(test)]
mod tests;
