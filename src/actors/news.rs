//! Wakes those who follow a user when something of that user has moved in the read model, and
//! nobody else: with thousands of open streams, most news concerns very few of them.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::domain::ids::UserId;

/// Who follows whom; clones share it.
#[derive(Debug, Clone, Default)]
pub struct News(Arc<Mutex<Followers>>);

type Followers = HashMap<UserId, Vec<Arc<Notify>>>;

/// The user is followed as often as may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the user has as many open streams as may be")]
pub struct TooMany;

impl News {
    /// Follows a user until the subscription is dropped.
    ///
    /// # Errors
    /// [`TooMany`] when `most` others do so already.
    pub fn follow(&self, user_id: &UserId, most: usize) -> Result<Subscription, TooMany> {
        let mut followers = self.locked();
        let present = followers.get(user_id).map_or(0, Vec::len);
        if present >= most {
            return Err(TooMany);
        }
        let bell = Arc::new(Notify::new());
        followers.entry(user_id.clone()).or_default().push(Arc::clone(&bell));
        Ok(Subscription { news: self.clone(), user_id: user_id.clone(), bell })
    }

    /// How many follow anybody.
    pub fn followers(&self) -> usize {
        self.locked().values().map(Vec::len).sum()
    }

    /// Wakes who follows one of these users.
    pub fn tell(&self, users: &HashSet<UserId>) {
        let followers = self.locked();
        // The smaller side leads: a replay moves everybody, and mostly nobody follows.
        if followers.len() < users.len() {
            let told = followers.iter().filter(|(user_id, _)| users.contains(*user_id));
            told.flat_map(|(_, bells)| bells).for_each(|bell| bell.notify_one());
        } else {
            let told = users.iter().filter_map(|user_id| followers.get(user_id));
            told.flatten().for_each(|bell| bell.notify_one());
        }
    }

    /// Wakes everybody.
    pub fn tell_all(&self) {
        self.locked().values().flatten().for_each(|bell| bell.notify_one());
    }

    /// A panic elsewhere leaves no half-done change behind.
    fn locked(&self) -> MutexGuard<'_, Followers> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One that follows a user.
#[derive(Debug)]
pub struct Subscription {
    news: News,
    user_id: UserId,
    bell: Arc<Notify>,
}

impl Subscription {
    /// Resolves when there was news since the last time, or since the beginning.
    pub async fn news(&self) {
        // News that comes while nobody waits is kept for who asks next.
        self.bell.notified().await;
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let mut followers = self.news.locked();
        if let Some(bells) = followers.get_mut(&self.user_id) {
            bells.retain(|bell| !Arc::ptr_eq(bell, &self.bell));
            if bells.is_empty() {
                followers.remove(&self.user_id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn user(name: &str) -> UserId {
        UserId::try_from(name.to_owned()).unwrap()
    }

    fn woken(subscription: &Subscription) -> bool {
        subscription.news().now_or_never().is_some()
    }

    #[test]
    fn news_wakes_all_who_follow_the_user_once_and_nobody_else() {
        let news = News::default();
        let follow = |name| news.follow(&user(name), 9).unwrap();
        let (one, two, other) = (follow("ada"), follow("ada"), follow("bob"));
        // Told before anyone waits, twice, and among more users than are followed.
        news.tell(&HashSet::from([user("ada")]));
        news.tell(&["ada", "eve", "zoe"].into_iter().map(user).collect());
        assert!(woken(&one) && woken(&two) && !woken(&other));
        assert!(!woken(&one));
    }

    #[test]
    fn no_user_is_followed_more_often_than_may_be() {
        let news = News::default();
        let first = news.follow(&user("ada"), 2).unwrap();
        let second = news.follow(&user("ada"), 2).unwrap();
        assert_eq!(news.follow(&user("ada"), 2).err(), Some(TooMany));
        assert!(news.follow(&user("bob"), 2).is_ok());
        drop(first);
        let third = news.follow(&user("ada"), 2).unwrap();
        drop((second, third));
        assert!(news.locked().is_empty());
    }
}
