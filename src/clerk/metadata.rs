//! What T2M keeps in a user's `public_metadata` at Clerk, so that session tokens can carry it: the
//! names, and the change that brings what is there to what should be there.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use crate::domain::user::{Access, Membership, MembershipState, Onboarding, Right, User};

/// Names of seed `t2m-auth-and-sessions`, whose token template reads these three.
const ROLE: &str = "role";
const PERMISSIONS: &str = "permissions";
const SUBSCRIPTION_TIER: &str = "subscription_tier";
/// Names of seed `marketplace-session-token`.
const USER_TYPE: &str = "userType";
const FEATURE_FLAGS: &str = "featureFlags";
const ORGANIZATION: [&str; 3] = ["organizationId", "organizationName", "organizationRole"];
const ONBOARDING: &str = "onboarding";

/// A part of the metadata that changes as one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    Access(Right),
    UserType,
    Flags,
    Organization,
    Onboarding,
}

/// How a user is here.
#[derive(Debug, Clone, PartialEq)]
pub struct Wanted {
    pub access: Access,
    pub user_type: Option<String>,
    pub feature_flags: BTreeMap<String, bool>,
    /// The oldest membership: the metadata has room for one.
    pub organization: Option<Membership>,
    pub onboarding: Option<Onboarding>,
}

impl From<&User> for Wanted {
    fn from(user: &User) -> Self {
        let mut memberships = user.memberships.values();
        Self {
            access: user.access.clone(),
            user_type: user.user_type.clone(),
            feature_flags: user.feature_flags.clone(),
            // Clerk's ids of memberships, by which they are ordered, sort by age.
            organization: memberships.find_map(|state| match state {
                // What a token claims is Clerk's already, and there may be more of it.
                MembershipState::Member { membership, .. } if membership.is_claimed() => None,
                MembershipState::Member { membership, .. } => Some(membership.clone()),
                MembershipState::Left => None,
            }),
            onboarding: user.onboarding.clone(),
        }
    }
}

impl Wanted {
    /// The parts that are known here. One that is not must not erase what Clerk has, and no step of
    /// an onboarding must undo its completion there.
    pub fn known_parts(&self, there: &Map<String, Value>) -> BTreeSet<Part> {
        let onboarding = self.onboarding.is_some() && !self.undoes_completion(there);
        let optional = [
            (Part::UserType, self.user_type.is_some()),
            (Part::Organization, self.organization.is_some()),
            (Part::Onboarding, onboarding),
        ];
        let known = optional.into_iter().filter(|(_, known)| *known).map(|(part, _)| part);
        known.chain(Right::ALL.map(Part::Access)).chain([Part::Flags]).collect()
    }

    /// Whether the onboarding, completed at Clerk, is not here.
    pub fn undoes_completion(&self, there: &Map<String, Value>) -> bool {
        there.get(ONBOARDING).is_some_and(|it| it["status"] == "completed")
            && self.onboarding.as_ref().is_some_and(|it| !it.is_completed())
    }

    /// What to merge into `there` so that `parts` of it become as they are here; `null` removes.
    /// Empty when nothing differs. Keys of others are never touched.
    pub fn difference(
        &self,
        parts: &BTreeSet<Part>,
        there: &Map<String, Value>,
    ) -> Map<String, Value> {
        let mut patch = Map::new();
        for part in parts {
            match part {
                Part::Access(right) => self.access(*right, there, &mut patch),
                Part::UserType => {
                    set(USER_TYPE, self.user_type.clone().into(), there, &mut patch);
                }
                Part::Flags => self.flags(there, &mut patch),
                Part::Organization => self.organization(there, &mut patch),
                Part::Onboarding => self.onboarding(there, &mut patch),
            }
        }
        patch
    }

    fn access(&self, right: Right, there: &Map<String, Value>, patch: &mut Map<String, Value>) {
        let Access { role, permissions, subscription_tier } = &self.access;
        match right {
            Right::Role => set(ROLE, role.clone().into(), there, patch),
            Right::SubscriptionTier => {
                set(SUBSCRIPTION_TIER, subscription_tier.clone().into(), there, patch);
            }
            Right::Permissions => {
                // Their order means nothing.
                let listed = there.get(PERMISSIONS).and_then(Value::as_array);
                let texts = listed.map(|list| list.iter().map(Value::as_str).collect());
                let wanted: BTreeSet<_> = permissions.iter().map(|it| Some(it.as_str())).collect();
                if texts != Some(wanted) {
                    patch.insert(PERMISSIONS.to_owned(), json!(permissions));
                }
            }
        }
    }

    /// The merge is deep, so that a flag which is gone here must be removed by name.
    fn flags(&self, there: &Map<String, Value>, patch: &mut Map<String, Value>) {
        let Some(present) = there.get(FEATURE_FLAGS).and_then(Value::as_object) else {
            patch.insert(FEATURE_FLAGS.to_owned(), json!(self.feature_flags));
            return;
        };
        let mut flags = Map::new();
        for (name, on) in &self.feature_flags {
            set(name, (*on).into(), present, &mut flags);
        }
        let gone = present.iter().filter(|(name, value)| {
            value.is_boolean() && !self.feature_flags.contains_key(name.as_str())
        });
        flags.extend(gone.map(|(name, _)| (name.clone(), Value::Null)));
        if !flags.is_empty() {
            patch.insert(FEATURE_FLAGS.to_owned(), flags.into());
        }
    }

    fn organization(&self, there: &Map<String, Value>, patch: &mut Map<String, Value>) {
        let [id, name, role] = ORGANIZATION;
        let member = self.organization.as_ref();
        set(id, member.map(|it| it.organization_id.clone()).into(), there, patch);
        set(name, member.and_then(|it| it.name.clone()).into(), there, patch);
        set(role, member.map(|it| it.role.clone()).into(), there, patch);
    }

    fn onboarding(&self, there: &Map<String, Value>, patch: &mut Map<String, Value>) {
        let Some(onboarding) = &self.onboarding else { return };
        let empty = Map::new();
        let present = there.get(ONBOARDING).and_then(Value::as_object).unwrap_or(&empty);
        let mut changed = Map::new();
        set("status", json!(onboarding.status), present, &mut changed);
        set("currentStep", onboarding.step.into(), present, &mut changed);
        set("totalSteps", onboarding.total_steps.into(), present, &mut changed);
        if !changed.is_empty() {
            patch.insert(ONBOARDING.to_owned(), changed.into());
        }
    }
}

fn set(name: &str, value: Value, there: &Map<String, Value>, patch: &mut Map<String, Value>) {
    if there.get(name).unwrap_or(&Value::Null) != &value {
        patch.insert(name.to_owned(), value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clerk::translate::told;
    use crate::domain::user::OnboardingStatus;

    fn ada() -> Wanted {
        Wanted {
            access: Access {
                role: "admin".to_owned(),
                permissions: BTreeSet::from(["a".to_owned(), "b".to_owned()]),
                subscription_tier: "premium".to_owned(),
            },
            user_type: Some("freelancer".to_owned()),
            feature_flags: BTreeMap::from([("new".to_owned(), true), ("off".to_owned(), false)]),
            organization: None,
            // Its last steps were left out.
            onboarding: Some(Onboarding {
                step: 5,
                total_steps: 8,
                status: OnboardingStatus::Completed,
            }),
        }
    }

    fn object(value: Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    fn difference(there: Value) -> Value {
        let there = object(there);
        ada().difference(&ada().known_parts(&there), &there).into()
    }

    #[test]
    fn everything_is_pushed_to_who_has_nothing_and_nothing_to_who_has_it() {
        let all = json!({
            "role": "admin", "permissions": ["a", "b"], "subscription_tier": "premium",
            "userType": "freelancer", "featureFlags": { "new": true, "off": false },
            "onboarding": { "status": "completed", "currentStep": 5, "totalSteps": 8 },
        });
        assert_eq!(difference(json!({})), all);
        let mut there = all;
        there["permissions"] = json!(["b", "a"]);
        there["theirs"] = json!("stays");
        there["organizationId"] = json!("theirs too");
        assert_eq!(difference(there), json!({}));
    }

    #[test]
    fn a_flag_that_is_gone_is_removed_by_name_and_what_is_no_flag_stays() {
        let there = json!({
            "role": "user", "permissions": ["a", "b"], "subscription_tier": "premium",
            "userType": "freelancer",
            "featureFlags": { "old": true, "off": true, "note": "not ours" },
            "onboarding": { "status": "in_progress", "currentStep": 5, "totalSteps": 8, "x": 1 },
        });
        let patch = json!({
            "role": "admin", "featureFlags": { "old": null, "off": false, "new": true },
            "onboarding": { "status": "completed" },
        });
        assert_eq!(difference(there), patch);
    }

    #[test]
    fn only_the_parts_that_were_asked_for_are_touched() {
        let left = Wanted { user_type: None, ..ada() };
        let there = object(json!({ "organizationId": "org_1", "userType": "old", "role": "x" }));
        let parts = BTreeSet::from([Part::Organization]);
        assert_eq!(Value::from(left.difference(&parts, &there)), json!({ "organizationId": null }));
        assert!(!left.known_parts(&there).contains(&Part::UserType));
    }

    #[test]
    fn of_access_only_the_rights_that_were_asked_for_are_touched() {
        let there = object(json!({ "role": "user", "subscription_tier": "standard" }));
        for (right, patch) in Right::ALL.into_iter().zip([
            json!({ "role": "admin" }),
            json!({ "permissions": ["a", "b"] }),
            json!({ "subscription_tier": "premium" }),
        ]) {
            let parts = BTreeSet::from([Part::Access(right)]);
            assert_eq!(Value::from(ada().difference(&parts, &there)), patch);
        }
    }

    #[test]
    fn a_step_of_an_onboarding_undoes_no_completion() {
        let pushed = |here, there: &str| {
            let onboarding = Onboarding { step: 3, total_steps: 8, status: here };
            let wanted = Wanted { onboarding: Some(onboarding), ..ada() };
            let there = object(json!({ "onboarding": { "status": there } }));
            wanted.known_parts(&there).contains(&Part::Onboarding)
        };
        assert!(!pushed(OnboardingStatus::InProgress, "completed"));
        assert!(pushed(OnboardingStatus::InProgress, "not_started"));
        assert!(pushed(OnboardingStatus::Completed, "completed"));
    }

    #[test]
    fn what_is_pushed_is_what_is_read_back() {
        let there = json!({ "feature_flags": { "stale": true }, "user_type": "stale" });
        let mut merged = object(there.clone());
        merged.extend(object(difference(there)));
        let (wanted, told) = (ada(), told(&merged));
        assert_eq!(told.role, Some(wanted.access.role));
        assert_eq!(told.permissions, Some(wanted.access.permissions));
        assert_eq!(told.subscription_tier, Some(wanted.access.subscription_tier));
        assert_eq!(told.user_type, wanted.user_type);
        assert_eq!(told.feature_flags, Some(wanted.feature_flags));
        assert_eq!(told.onboarding, wanted.onboarding);
    }
}
