//! From what Clerk delivers to commands of ours. It decides nothing: order, repetition and
//! tombstones are the aggregates' business.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Utc};
use serde_json::{Map, Value};

use super::jwt::Verified;
use super::payload::{self, Delivery, SessionEnd};
use crate::domain::ids::{SessionId, UserId};
use crate::domain::session::{self, EndReason};
use crate::domain::text::Personal;
use crate::domain::user::{
    self, Claims, Membership, Onboarding, OnboardingStatus, Profile, Snapshot, Told,
};

/// What a delivery asks of our aggregates.
#[expect(clippy::large_enum_variant, reason = "one a delivery, and gone at once")]
#[derive(Debug, Clone)]
pub enum Command {
    User(UserId, user::Command),
    Session(SessionId, session::Command),
}

/// A verified delivery names an id that cannot be one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the delivery names an unusable id")]
pub struct UnusableId;

/// The command of a delivery, none if its type means nothing to us. `made_at` is the envelope's
/// time, for bodies that carry none of their own.
///
/// # Errors
/// [`UnusableId`].
pub fn command(delivery: Delivery, made_at: DateTime<Utc>) -> Result<Option<Command>, UnusableId> {
    Ok(Some(match delivery {
        Delivery::UserCreatedOrUpdated(user) => {
            let source_updated_at = user.updated_at.unwrap_or(made_at);
            let command = user::Command::Sync { snapshot: snapshot(&user), source_updated_at };
            Command::User(user_id(user.id)?, command)
        }
        Delivery::UserDeleted { user_id: id } => Command::User(user_id(id)?, user::Command::Delete),
        Delivery::SessionStarted(session) => start(session, made_at)?,
        Delivery::SessionEnded { session, reason } => {
            let reason = match reason {
                SessionEnd::Ended => EndReason::SignedOut,
                SessionEnd::Removed => EndReason::Removed,
                SessionEnd::Revoked => EndReason::Revoked,
            };
            Command::Session(session_id(session.id)?, session::Command::End { reason })
        }
        Delivery::MembershipChanged(membership) => {
            let source_updated_at = membership.updated_at.unwrap_or(made_at);
            let user = user_id(membership.public_user_data.user_id.clone())?;
            let membership = joined(membership);
            Command::User(user, user::Command::Join { membership, source_updated_at })
        }
        Delivery::MembershipRemoved(membership) => {
            let user = user_id(membership.public_user_data.user_id)?;
            let command = user::Command::Leave {
                membership_id: membership.id,
                organization_id: membership.organization.id,
            };
            Command::User(user, command)
        }
        Delivery::Ignored { .. } => return Ok(None),
    }))
}

/// What a token says of its user, for the first request before any webhook.
pub fn claims(token: &Verified) -> Claims {
    let memberships = token.organizations.iter().map(|organization| Membership {
        membership_id: Membership::claimed(&organization.id),
        organization_id: organization.id.clone(),
        name: None,
        slug: organization.slug.clone(),
        role: organization.role.clone().unwrap_or_default(),
        permissions: organization.permissions.iter().cloned().collect(),
    });
    Claims {
        snapshot: claimed_snapshot(token),
        memberships: memberships.collect(),
        // One that is on its way is left to later tokens, which know how far it has come.
        onboarding: onboarding(token).filter(Onboarding::is_completed),
        issued_at: DateTime::from_timestamp(token.issued_at, 0).unwrap_or_default(),
    }
}

/// How far a token says that its user's onboarding is (seed `marketplace-session-token`).
pub fn onboarding(token: &Verified) -> Option<Onboarding> {
    progress(token.onboarding.as_ref()?)
}

fn progress(said: &Value) -> Option<Onboarding> {
    let claim = said.as_object()?;
    let status = OnboardingStatus::parse(claim.get("status")?.as_str()?)?;
    let number = |names: [&str; 2]| {
        let found = names.iter().find_map(|name| claim.get(*name)?.as_u64());
        found.and_then(|number| u32::try_from(number).ok())
    };
    let total_steps = number(["totalSteps", "total_steps"]).unwrap_or(Onboarding::DEFAULT_STEPS);
    // Who has completed it need not have taken every step of it.
    let unnamed = if status == OnboardingStatus::Completed { total_steps } else { 0 };
    let step = number(["currentStep", "step"]).unwrap_or(unnamed).min(total_steps);
    Some(Onboarding { step, total_steps, status })
}

fn claimed_snapshot(token: &Verified) -> Snapshot {
    let email = token.email.clone().filter(|email| !email.is_empty()).map(Personal::Known);
    Snapshot {
        profile: Profile { email, ..Profile::default() },
        told: Told {
            role: token.role.clone(),
            permissions: Some(token.permissions.iter().cloned().collect())
                .filter(|permissions: &BTreeSet<_>| !permissions.is_empty()),
            subscription_tier: token.tier.clone(),
            user_type: token.user_type.clone(),
            feature_flags: Some(flags(&token.feature_flags)).filter(|flags| !flags.is_empty()),
            onboarding: None,
        },
        banned: false,
    }
}

fn snapshot(user: &payload::User) -> Snapshot {
    let personal =
        |text: &Option<String>| text.clone().filter(|t| !t.is_empty()).map(Personal::Known);
    let email = user.primary_email().and_then(|address| address.email_address.clone());
    Snapshot {
        profile: Profile {
            email: personal(&email),
            first_name: personal(&user.first_name),
            last_name: personal(&user.last_name),
            username: personal(&user.username),
            image_url: personal(&user.image_url),
        },
        told: told(&user.public_metadata),
        banned: user.banned,
    }
}

/// What public metadata says to us. The names that we push come before their other spellings, so
/// that what we pushed is what we read.
pub fn told(metadata: &Map<String, Value>) -> Told {
    Told {
        role: text(metadata, &["role"]),
        permissions: metadata.get("permissions").and_then(Value::as_array).map(|list| {
            list.iter().filter_map(Value::as_str).map(str::to_owned).collect::<BTreeSet<_>>()
        }),
        subscription_tier: text(metadata, &["subscription_tier", "subscriptionTier"]),
        user_type: text(metadata, &["userType", "user_type"]),
        feature_flags: ["featureFlags", "feature_flags"]
            .iter()
            .find_map(|name| metadata.get(*name)?.as_object())
            .map(flags),
        onboarding: metadata.get("onboarding").and_then(progress),
    }
}

fn text(metadata: &Map<String, Value>, names: &[&str]) -> Option<String> {
    let found = names.iter().find_map(|name| metadata.get(*name)?.as_str());
    found.filter(|text| !text.is_empty()).map(str::to_owned)
}

/// Those that are on or off; anything else is none.
pub fn flags(map: &Map<String, Value>) -> BTreeMap<String, bool> {
    map.iter().filter_map(|(name, value)| Some((name.clone(), value.as_bool()?))).collect()
}

fn start(session: payload::Session, made_at: DateTime<Utc>) -> Result<Command, UnusableId> {
    let activity = session.latest_activity.unwrap_or_default();
    let browser = [activity.browser_name, activity.browser_version, activity.device_type];
    let user_agent = browser.into_iter().flatten().collect::<Vec<_>>().join(" ");
    let command = session::Command::Start {
        user_id: user_id(session.user_id)?,
        started_at: session.created_at.unwrap_or(made_at),
        // Nobody tells us of either end, hence both times.
        expires_at: session.expire_at.into_iter().chain(session.abandon_at).min(),
        ip_address: activity.ip_address,
        user_agent: Some(user_agent).filter(|text| !text.is_empty()),
    };
    Ok(Command::Session(session_id(session.id)?, command))
}

fn joined(membership: payload::Membership) -> Membership {
    Membership {
        membership_id: membership.id,
        organization_id: membership.organization.id,
        name: membership.organization.name,
        slug: membership.organization.slug,
        role: membership.role.unwrap_or_default(),
        permissions: membership.permissions.into_iter().collect(),
    }
}

fn user_id(id: String) -> Result<UserId, UnusableId> {
    UserId::try_from(id).map_err(|_| UnusableId)
}

fn session_id(id: String) -> Result<SessionId, UnusableId> {
    SessionId::try_from(id).map_err(|_| UnusableId)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clerk::payload::Envelope;

    fn fixture(name: &str) -> Option<Command> {
        let path =
            format!("{}/tests/fixtures/clerk/payloads/{name}.json", env!("CARGO_MANIFEST_DIR"));
        let body = std::fs::read(path).unwrap();
        command(Envelope::parse(&body).unwrap(), DateTime::UNIX_EPOCH).unwrap()
    }

    fn synced(name: &str) -> Snapshot {
        match fixture(name) {
            Some(Command::User(_, user::Command::Sync { snapshot, .. })) => snapshot,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_primary_address_is_taken_wherever_it_stands() {
        let first = synced("user.created").profile.email;
        assert_eq!(first, Some(Personal::Known("ada@example.com".to_owned())));
        let second = synced("user.updated.primary_is_second_email").profile.email;
        assert!(second.is_some());
        assert_eq!(synced("user.created.no_email_phone_only").profile.email, None);
    }

    #[test]
    fn names_that_clerk_leaves_empty_stay_empty() {
        let profile = synced("user.updated.all_names_null").profile;
        assert_eq!((profile.first_name, profile.last_name), (None, None));
    }

    #[test]
    fn a_ban_is_seen_and_a_deletion_is_a_deletion() {
        assert!(synced("user.updated.banned_locked").banned);
        let deleted = fixture("user.deleted");
        assert!(matches!(deleted, Some(Command::User(_, user::Command::Delete))));
    }

    #[test]
    fn sessions_start_and_end() {
        let started = fixture("session.created");
        assert!(matches!(started, Some(Command::Session(_, session::Command::Start { .. }))));
        let ended = fixture("session.revoked");
        let revoked = session::Command::End { reason: EndReason::Revoked };
        assert!(matches!(&ended, Some(Command::Session(_, command))
            if format!("{command:?}") == format!("{revoked:?}")));
        assert!(fixture("unknown.future_event").is_none());
    }
}
