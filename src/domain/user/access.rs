//! What a user may do: its rights, and which of them an administrator decides.

use std::collections::BTreeSet;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What the user may do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Access {
    pub role: String,
    #[serde(default)]
    pub permissions: BTreeSet<String>,
    pub subscription_tier: String,
}

/// A field of [`Access`].
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Right {
    Role,
    Permissions,
    SubscriptionTier,
}

impl Right {
    pub const ALL: [Self; 3] = [Self::Role, Self::Permissions, Self::SubscriptionTier];
}

impl Default for Access {
    fn default() -> Self {
        Self {
            role: "user".to_owned(),
            permissions: BTreeSet::new(),
            subscription_tier: "standard".to_owned(),
        }
    }
}

impl Access {
    /// Of which rights the event that makes `next` of this access says who decides them: those that
    /// it names. One that names none, as Clerk's word and older events do, tells by what changes;
    /// a decision that changes nothing confirms them all.
    pub fn settled_by(
        &self,
        next: &Self,
        here: bool,
        decided: Option<&BTreeSet<Right>>,
    ) -> BTreeSet<Right> {
        if let Some(decided) = decided {
            return decided.clone();
        }
        let changed = [
            (Right::Role, self.role != next.role),
            (Right::Permissions, self.permissions != next.permissions),
            (Right::SubscriptionTier, self.subscription_tier != next.subscription_tier),
        ];
        let confirms = here && self == next;
        changed.into_iter().filter(|(_, it)| confirms || *it).map(|(right, _)| right).collect()
    }
}

/// What becomes of a user's access; what is absent stays as it is.
#[derive(Debug, Clone, Default)]
pub struct AccessChange {
    pub role: Option<String>,
    pub permissions: Option<BTreeSet<String>>,
    pub subscription_tier: Option<String>,
}

impl AccessChange {
    pub(super) fn of(&self, present: &Access) -> Access {
        let Self { role, permissions, subscription_tier } = self.clone();
        Access {
            role: role.unwrap_or_else(|| present.role.clone()),
            permissions: permissions.unwrap_or_else(|| present.permissions.clone()),
            subscription_tier: subscription_tier
                .unwrap_or_else(|| present.subscription_tier.clone()),
        }
    }

    /// Those that it decides, be they so already.
    pub(super) fn rights(&self) -> BTreeSet<Right> {
        let named = [
            (Right::Role, self.role.is_some()),
            (Right::Permissions, self.permissions.is_some()),
            (Right::SubscriptionTier, self.subscription_tier.is_some()),
        ];
        named.into_iter().filter(|(_, named)| *named).map(|(right, _)| right).collect()
    }
}
