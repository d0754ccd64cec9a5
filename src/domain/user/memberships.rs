//! A user's places in organizations: what Clerk tells of them, what a token claims until then, and
//! what an administrator decides.

use std::collections::BTreeSet;

use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Event, User};

/// A user's place in an organization.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema, utoipa::ToSchema)]
pub struct Membership {
    pub membership_id: String,
    pub organization_id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slug: Option<String>,
    pub role: String,
    #[serde(default)]
    pub permissions: BTreeSet<String>,
}

impl Membership {
    /// The id of a membership that an administrator makes; Clerk's begin otherwise.
    pub fn administered(id: Uuid) -> String {
        format!("{ADMINISTERED}{id}")
    }

    fn is_administered(&self) -> bool {
        self.membership_id.starts_with(ADMINISTERED)
    }

    /// The id of a membership that a token claims, for none tells Clerk's; Clerk's own replaces it.
    pub fn claimed(organization_id: &str) -> String {
        format!("{CLAIMED}{organization_id}")
    }

    pub fn is_claimed(&self) -> bool {
        self.membership_id.starts_with(CLAIMED)
    }
}

const ADMINISTERED: &str = "t2m_";
const CLAIMED: &str = "token_";

/// What kind of user this is, and of which organization.
#[derive(Debug, Clone)]
pub struct Placement {
    /// Absent: stays as it is.
    pub user_type: Option<String>,
    pub organization: Assignment,
}

#[derive(Debug, Clone)]
pub enum Assignment {
    AsItIs,
    /// Out of the organization that an administrator chose. Clerk's memberships are Clerk's.
    Nowhere,
    /// Into this one and out of another that an administrator chose. The membership's id is for a
    /// new one; where the user is a member already, that membership takes what else it says.
    Member(Membership),
}

#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum MembershipState {
    Member { membership: Membership, as_of: DateTime<Utc> },
    Left,
}

impl User {
    pub(super) fn join(
        &self,
        membership: &Membership,
        source_updated_at: DateTime<Utc>,
    ) -> Vec<Event> {
        match self.memberships.get(&membership.membership_id) {
            None => {
                let mut events: Vec<Event> =
                    self.end_of_claimed(&membership.organization_id).collect();
                let membership = membership.clone();
                events.push(Event::OrganizationJoined { membership, source_updated_at });
                events
            }
            Some(MembershipState::Member { membership: known, as_of })
                if source_updated_at > *as_of =>
            {
                let renamed = (&known.name, &known.slug) != (&membership.name, &membership.slug);
                vec![if renamed {
                    Event::OrganizationJoined { membership: membership.clone(), source_updated_at }
                } else {
                    Event::OrganizationRoleChanged {
                        membership_id: membership.membership_id.clone(),
                        role: membership.role.clone(),
                        permissions: membership.permissions.clone(),
                        source_updated_at,
                    }
                }]
            }
            Some(MembershipState::Member { .. } | MembershipState::Left) => vec![],
        }
    }

    pub(super) fn leave(&self, membership_id: &str, organization_id: &str) -> Vec<Event> {
        if self.memberships.get(membership_id) == Some(&MembershipState::Left) {
            return vec![];
        }
        let mut events = vec![Event::OrganizationLeft {
            membership_id: membership_id.to_owned(),
            organization_id: organization_id.to_owned(),
        }];
        events.extend(self.end_of_claimed(organization_id));
        events
    }

    /// Clerk has told of the membership that a token claimed.
    fn end_of_claimed(&self, organization_id: &str) -> impl Iterator<Item = Event> {
        let claimed = self.present_memberships().filter(move |present| {
            present.is_claimed() && present.organization_id == organization_id
        });
        claimed.map(|present| Event::OrganizationLeft {
            membership_id: present.membership_id.clone(),
            organization_id: present.organization_id.clone(),
        })
    }

    pub(super) fn place(&self, placement: &Placement, now: DateTime<Utc>) -> Vec<Event> {
        let mut events = vec![];
        if let Some(user_type) = &placement.user_type {
            events.extend(self.user_type_to(Some(user_type), Some(now)));
        }
        let wanted = match &placement.organization {
            Assignment::AsItIs => return events,
            Assignment::Nowhere => None,
            Assignment::Member(wanted) => Some(wanted),
        };
        let is_wanted = |present: &&Membership| {
            wanted.is_some_and(|wanted| wanted.organization_id == present.organization_id)
        };
        let others = self.present_memberships().filter(|present| !is_wanted(present));
        events.extend(others.filter(|present| present.is_administered()).map(|present| {
            Event::OrganizationLeft {
                membership_id: present.membership_id.clone(),
                organization_id: present.organization_id.clone(),
            }
        }));
        if let Some(wanted) = wanted {
            events.extend(match self.present_memberships().find(is_wanted) {
                Some(present) => adjusted(present, wanted, now),
                None => Some(Event::OrganizationJoined {
                    membership: wanted.clone(),
                    source_updated_at: now,
                }),
            });
        }
        events
    }

    pub(super) fn present_memberships(&self) -> impl Iterator<Item = &Membership> {
        self.memberships.values().filter_map(|state| match state {
            MembershipState::Member { membership, .. } => Some(membership),
            MembershipState::Left => None,
        })
    }
}

/// What makes a membership what an administrator wants it to be.
fn adjusted(present: &Membership, wanted: &Membership, now: DateTime<Utc>) -> Option<Event> {
    let membership = Membership {
        membership_id: present.membership_id.clone(),
        organization_id: present.organization_id.clone(),
        name: wanted.name.clone().or_else(|| present.name.clone()),
        slug: present.slug.clone(),
        role: wanted.role.clone(),
        permissions: wanted.permissions.clone(),
    };
    if membership == *present {
        return None;
    }
    if membership.name != present.name {
        // There is no event for a name alone; joining again says all of it.
        return Some(Event::OrganizationJoined { membership, source_updated_at: now });
    }
    Some(Event::OrganizationRoleChanged {
        membership_id: membership.membership_id,
        role: membership.role,
        permissions: membership.permissions,
        source_updated_at: now,
    })
}
