//! What a subscription is worth to a job: how large it may be, and which share of the workers it
//! gets.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::job::Quality;
use crate::config::ByTier;

/// A user's subscription at the time of a request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Tier {
    #[default]
    Standard,
    Premium,
    Enterprise,
}

impl Tier {
    pub const ALL: [Self; 3] = [Self::Standard, Self::Premium, Self::Enterprise];

    /// What this tier has of something that each tier has.
    pub fn pick<T>(self, each: &ByTier<T>) -> &T {
        match self {
            Self::Standard => &each.standard,
            Self::Premium | Self::Enterprise => &each.premium,
        }
    }

    /// By its name at Clerk; an unknown one has bought nothing.
    pub fn of(name: &str) -> Self {
        match name {
            "premium" => Self::Premium,
            "enterprise" => Self::Enterprise,
            _ => Self::Standard,
        }
    }

    pub fn is_name(name: &str) -> bool {
        Self::ALL.into_iter().any(|tier| tier.as_str() == name)
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Standard => "standard",
            Self::Premium => "premium",
            Self::Enterprise => "enterprise",
        }
    }

    /// The longest video, in seconds.
    pub fn longest_s(self) -> u32 {
        match self {
            Self::Standard => 10,
            Self::Premium | Self::Enterprise => 60,
        }
    }

    pub fn finest(self) -> Quality {
        match self {
            Self::Standard => Quality::P1080,
            Self::Premium | Self::Enterprise => Quality::K4,
        }
    }

    /// For serde: what is left out of events because it is what absence means.
    pub fn is_standard(&self) -> bool {
        *self == Self::Standard
    }
}

/// Jobs that share the workers on equal terms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    Premium,
    Standard,
    /// Many at once, by whomever: nobody waits for a single one of them.
    Batch,
}

impl Class {
    /// The one that goes first where nothing else decides comes first.
    pub const ALL: [Self; 3] = [Self::Premium, Self::Standard, Self::Batch];

    pub fn of(tier: Tier, batch: bool) -> Self {
        match (tier, batch) {
            (_, true) => Self::Batch,
            (Tier::Standard, false) => Self::Standard,
            (Tier::Premium | Tier::Enterprise, false) => Self::Premium,
        }
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Premium => "premium",
            Self::Standard => "standard",
            Self::Batch => "batch",
        }
    }
}

/// How many jobs of one user run at once at the most, in each class.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caps {
    pub premium: u32,
    pub standard: u32,
    pub batch: u32,
}

impl Caps {
    pub const DEFAULT: Self = Self { premium: 4, standard: 2, batch: 2 };

    pub fn of(&self, class: Class) -> u32 {
        match class {
            Class::Premium => self.premium,
            Class::Standard => self.standard,
            Class::Batch => self.batch,
        }
    }
}

impl Default for Caps {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// Why a text says no caps.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("must be like premium=4,standard=2,batch=2, each at least 1")]
pub struct InvalidCaps;

impl std::str::FromStr for Caps {
    type Err = InvalidCaps;

    /// `premium=4,standard=2,batch=2`; a class that is not named keeps its default.
    fn from_str(text: &str) -> Result<Self, InvalidCaps> {
        let mut caps = Self::DEFAULT;
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let (name, number) = part.split_once('=').ok_or(InvalidCaps)?;
            let number = number.trim().parse().ok().filter(|number| *number > 0);
            let number = number.ok_or(InvalidCaps)?;
            match name.trim() {
                "premium" => caps.premium = number,
                "standard" => caps.standard = number,
                "batch" => caps.batch = number,
                _ => return Err(InvalidCaps),
            }
        }
        Ok(caps)
    }
}

impl fmt::Display for Caps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "premium={},standard={},batch={}", self.premium, self.standard, self.batch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn caps_are_read_by_name_and_nonsense_is_refused() {
        assert_eq!(Caps::DEFAULT.to_string(), "premium=4,standard=2,batch=2");
        assert_eq!(Caps::DEFAULT.to_string().parse(), Ok(Caps::DEFAULT));
        assert_eq!(" batch = 9 ".parse(), Ok(Caps { batch: 9, ..Caps::DEFAULT }));
        for bad in
            ["premium", "premium=0", "premium=-1", "gold=1", "premium=a", "premium=4;batch=1"]
        {
            assert_eq!(bad.parse::<Caps>(), Err(InvalidCaps), "{bad}");
        }
    }

    #[test]
    fn a_batch_is_a_batch_whoever_asks() {
        assert_eq!(Class::of(Tier::of("enterprise"), false), Class::Premium);
        assert_eq!(Class::of(Tier::of("premium"), true), Class::Batch);
        assert_eq!(Class::of(Tier::of("Premium"), false), Class::Standard);
    }

    #[test]
    fn what_is_paid_for_is_longer_finer_and_of_another_class() {
        let each = ByTier { standard: 1, premium: 2 };
        let worth = |tier: Tier| {
            (*tier.pick(&each), tier.longest_s(), tier.finest(), Class::of(tier, false))
        };
        assert_eq!(worth(Tier::Standard), (1, 10, Quality::P1080, Class::Standard));
        for tier in [Tier::Premium, Tier::Enterprise] {
            assert_eq!(worth(tier), (2, 60, Quality::K4, Class::Premium));
        }
    }

    #[test]
    fn a_tier_and_a_class_are_named_as_they_are_stored() {
        for tier in Tier::ALL {
            assert_eq!(serde_json::to_value(tier).unwrap(), tier.as_str());
            assert_eq!(Tier::of(tier.as_str()), tier);
            assert_eq!(tier.is_standard(), tier == Tier::Standard);
            assert!(Tier::is_name(tier.as_str()));
        }
        assert!(!Tier::is_name("gold"));
        for class in Class::ALL {
            assert_eq!(serde_json::to_value(class).unwrap(), class.as_str());
        }
    }

    #[test]
    fn each_class_has_its_own_cap() {
        let caps: Caps = "premium=5,standard=6,batch=7".parse().unwrap();
        assert_eq!(Class::ALL.map(|class| caps.of(class)), [5, 6, 7]);
        assert_eq!(Caps::default(), Caps { premium: 4, standard: 2, batch: 2 });
    }
}
