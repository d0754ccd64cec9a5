//! What a word of Clerk's on the user's rights changes: what is decided here, and what a newer token
//! claims, stands against it.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, TimeDelta, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Access, Event, Onboarding, Right, Snapshot, Standing, User};

/// A decision that another one has replaced may still be on its way to Clerk: a request there is
/// repeated for some minutes before it is given up.
const ECHO: TimeDelta = TimeDelta::minutes(10);

/// What Clerk last said of a user's rights. Kept beside [`Access`], which an administrator may have
/// set since: only a change of Clerk's own word overrules that, and a key that Clerk no longer has
/// is a right taken away.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Told {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub permissions: Option<BTreeSet<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subscription_tier: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_type: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub feature_flags: Option<BTreeMap<String, bool>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub onboarding: Option<Onboarding>,
}

impl Told {
    pub(super) fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// This, and of what it says nothing the other.
    fn or(&self, other: &Self) -> Self {
        Self {
            role: either(&self.role, &other.role),
            permissions: either(&self.permissions, &other.permissions),
            subscription_tier: either(&self.subscription_tier, &other.subscription_tier),
            user_type: either(&self.user_type, &other.user_type),
            feature_flags: either(&self.feature_flags, &other.feature_flags),
            onboarding: self.onboarding.as_ref().or(other.onboarding.as_ref()).cloned(),
        }
    }
}

/// What a token claimed of the rights. It stands against a word of Clerk's that is older and says
/// nothing: a user's creation names no right that was given since. Where a newer word says nothing,
/// the right may have been taken away, and is. A token's time is whole seconds: a word of the same
/// second counts as newer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Claimed {
    pub(super) told: Told,
    pub(super) issued_at: DateTime<Utc>,
}

/// What was decided here of each key of Clerk's metadata.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Decided {
    pub role: Decision<String>,
    pub permissions: Decision<BTreeSet<String>>,
    pub subscription_tier: Decision<String>,
    pub user_type: Decision<String>,
    pub flags: Decision<BTreeMap<String, bool>>,
    pub onboarding: Decision<Onboarding>,
}

impl Decided {
    /// `access` says how a right is from now on. What is not decided here, Clerk decides.
    pub(super) fn settle(
        &mut self,
        right: Right,
        access: &Access,
        decided_at: Option<DateTime<Utc>>,
    ) {
        match right {
            Right::Role => self.role.replace(&access.role, decided_at),
            Right::Permissions => self.permissions.replace(&access.permissions, decided_at),
            Right::SubscriptionTier => {
                self.subscription_tier.replace(&access.subscription_tier, decided_at);
            }
        }
    }
}

/// What was decided here of one key.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Decision<T> {
    /// When it was decided last.
    pub at: Option<DateTime<Utc>>,
    /// The last decision, until Clerk says otherwise.
    value: Option<T>,
    /// Those before it that Clerk may not have repeated yet, each with when the next one replaced it.
    replaced: Vec<(T, DateTime<Utc>)>,
}

impl<T> Default for Decision<T> {
    fn default() -> Self {
        Self { at: None, value: None, replaced: vec![] }
    }
}

impl<T: Clone + PartialEq> Decision<T> {
    /// Whether what is known is what was decided here.
    pub(super) fn stands(&self) -> bool {
        self.value.is_some()
    }

    pub(super) fn settle(&mut self, value: Option<&T>, decided_at: Option<DateTime<Utc>>) {
        match (value, decided_at) {
            (Some(value), Some(at)) => self.decide(value, at),
            _ => self.give_way(),
        }
        self.at = decided_at.or(self.at);
    }

    fn replace(&mut self, value: &T, decided_at: Option<DateTime<Utc>>) {
        match decided_at {
            Some(_) => self.settle(Some(value), decided_at),
            None => *self = Self::default(),
        }
    }

    fn decide(&mut self, value: &T, at: DateTime<Utc>) {
        // A word that may be heard is newer than this decision.
        self.replaced.retain(|(_, until)| *until + ECHO > at);
        if let Some(before) = self.value.replace(value.clone())
            && before != *value
        {
            self.replaced.push((before, at));
        }
    }

    fn give_way(&mut self) {
        self.value = None;
        self.replaced.clear();
    }

    /// Which of the replaced decisions Clerk repeats: what we sent there ourselves, stamped by Clerk
    /// after the next one was made here, is no newer word.
    fn echo(&self, word: Option<&T>, as_of: DateTime<Utc>) -> Option<usize> {
        let is_it =
            |(value, until): &(T, DateTime<Utc>)| Some(value) == word && as_of <= *until + ECHO;
        self.replaced.iter().position(is_it)
    }

    /// Whether it gives way to a word that differs from the one before. Where `only_claimed` a token
    /// alone has spoken before, perhaps with a default of its template: that Clerk does not name
    /// what was decided here takes nothing away then.
    fn yields(&self, word: Option<&T>, only_claimed: bool, as_of: Option<DateTime<Utc>>) -> bool {
        let Some(at) = self.at else { return true };
        as_of.is_some_and(|as_of| at < as_of && self.echo(word, as_of).is_none())
            && (word.is_some() || !only_claimed)
    }

    /// Takes in a word that differs from the one before.
    fn hear(&mut self, word: Option<&T>, only_claimed: bool, as_of: DateTime<Utc>) {
        if let Some(index) = self.echo(word, as_of) {
            self.replaced.drain(..=index);
        } else if self.value.is_some() && self.value.as_ref() == word {
            self.replaced.clear();
        } else if self.yields(word, only_claimed, Some(as_of)) {
            self.give_way();
        }
    }
}

impl<T: Clone + Default + PartialEq> Decision<T> {
    fn listen(&mut self, [before, now, clerks]: [&Option<T>; 3], as_of: DateTime<Utc>) {
        if differ(before, now) {
            self.hear(now.as_ref(), !says(clerks), as_of);
        }
    }
}

impl User {
    pub(super) fn sync(&self, snapshot: &Snapshot, source_updated_at: DateTime<Utc>) -> Vec<Event> {
        if self.synced_at.is_some_and(|known| source_updated_at <= known) {
            // Of two words of the same time, the one that bans holds, whichever comes first.
            let tie = self.synced_at == Some(source_updated_at);
            let ban = tie && snapshot.banned && !self.banned;
            return if ban { vec![Event::Banned {}] } else { vec![] };
        }
        let profile = Box::new(snapshot.profile.clone());
        let mut events = vec![];
        if self.standing == Standing::Unknown {
            let (profile, told) = (profile.clone(), Told::default());
            let claimed_at = None;
            events.push(Event::Registered { profile, provisional: false, told, claimed_at });
        }
        // Recorded even when equal: it says up to when Clerk's word is known.
        let told = snapshot.told.clone();
        events.push(Event::ProfileChanged { profile, source_updated_at, told });
        events.extend(self.differences(&snapshot.told, Some(source_updated_at)));
        match (self.banned, snapshot.banned) {
            (false, true) => events.push(Event::Banned {}),
            (true, false) => events.push(Event::Unbanned {}),
            (false, false) | (true, true) => {}
        }
        events
    }

    /// The word before, and this one of `as_of`, with what a token claimed where they say nothing;
    /// and what of the first was not only claimed.
    fn words(&self, word: &Told, as_of: Option<DateTime<Utc>>) -> (Told, Told, Told) {
        let clerks = self.synced_at.map(|_| self.told.clone()).unwrap_or_default();
        let Some(claimed) = &self.claimed else {
            return (self.told.clone(), word.clone(), clerks);
        };
        let older = as_of.is_some_and(|as_of| as_of < claimed.issued_at);
        let word = if older { word.or(&claimed.told) } else { word.clone() };
        (self.told.or(&claimed.told), word, clerks)
    }

    /// Takes in the metadata as it was at `as_of`.
    pub(super) fn hear(&mut self, word: &Told, as_of: DateTime<Utc>) {
        let (before, now, clerks) = self.words(word, Some(as_of));
        let ours = &mut self.decided;
        let words = [&before, &now, &clerks];
        ours.role.listen(words.map(|word| &word.role), as_of);
        ours.permissions.listen(words.map(|word| &word.permissions), as_of);
        ours.subscription_tier.listen(words.map(|word| &word.subscription_tier), as_of);
        ours.user_type.listen(words.map(|word| &word.user_type), as_of);
        ours.flags.listen(words.map(|word| &word.feature_flags), as_of);
        // That it is no longer named is no word.
        if now.onboarding.is_some() && before.onboarding != now.onboarding {
            self.decided.onboarding.hear(now.onboarding.as_ref(), false, as_of);
        }
        self.claimed.take_if(|claimed| claimed.issued_at <= as_of);
        self.told = word.clone();
        self.synced_at = Some(as_of);
    }

    /// What the metadata, as it was at `as_of`, says otherwise than when it was last heard.
    pub(super) fn differences(&self, word: &Told, as_of: Option<DateTime<Utc>>) -> Vec<Event> {
        let (before, now, clerks) = self.words(word, as_of);
        let (known, decided, none) = (&self.access, &self.decided, Access::default());
        let mut access = known.clone();
        if decided.role.yields(now.role.as_ref(), !says(&clerks.role), as_of) {
            access.role = told(&before.role, &now.role, &known.role, none.role);
        }
        let only_claimed = !says(&clerks.permissions);
        if decided.permissions.yields(now.permissions.as_ref(), only_claimed, as_of) {
            let (before, now) = (&before.permissions, &now.permissions);
            access.permissions = told(before, now, &known.permissions, none.permissions);
        }
        let only_claimed = !says(&clerks.subscription_tier);
        if decided.subscription_tier.yields(now.subscription_tier.as_ref(), only_claimed, as_of) {
            let (before, now) = (&before.subscription_tier, &now.subscription_tier);
            access.subscription_tier =
                told(before, now, &known.subscription_tier, none.subscription_tier);
        }
        let mut events = self.access_to(access);
        let only_claimed = !says(&clerks.user_type);
        if before.user_type != now.user_type
            && decided.user_type.yields(now.user_type.as_ref(), only_claimed, as_of)
        {
            events.extend(self.user_type_to(now.user_type.as_ref(), None));
        }
        let only_claimed = !says(&clerks.feature_flags);
        if decided.flags.yields(now.feature_flags.as_ref(), only_claimed, as_of) {
            let (before, now) = (&before.feature_flags, &now.feature_flags);
            let flags = told(before, now, &self.feature_flags, BTreeMap::new());
            events.extend(self.flags_to(&flags, None));
        }
        if let Some(told) = &now.onboarding
            && before.onboarding != now.onboarding
            && decided.onboarding.yields(Some(told), false, as_of)
            // Nobody knows how old a first word is.
            && (before.onboarding.is_some() || !self.has_completed_onboarding())
        {
            events.extend(self.onboard(told, None));
        }
        events
    }
}

/// Whether a word says anything: a list that is empty says no more than one that is absent.
fn says<T: Default + PartialEq>(word: &Option<T>) -> bool {
    word.as_ref().is_some_and(|word| *word != T::default())
}

fn either<T: Clone + Default + PartialEq>(one: &Option<T>, other: &Option<T>) -> Option<T> {
    if says(one) { one.clone() } else { other.clone() }
}

fn differ<T: Clone + Default + PartialEq>(before: &Option<T>, now: &Option<T>) -> bool {
    before.clone().unwrap_or_default() != now.clone().unwrap_or_default()
}

/// One right after Clerk's word went from `before` to `now`: `known`, which may be an
/// administrator's decision, stands for as long as Clerk says the same.
fn told<T: Clone + Default + PartialEq>(
    before: &Option<T>,
    now: &Option<T>,
    known: &T,
    none: T,
) -> T {
    if differ(before, now) { now.clone().unwrap_or(none) } else { known.clone() }
}

#[cfg(test)]
mod tests;
