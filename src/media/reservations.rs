//! Room that uploads under way will need: counted before their bytes come, so that two uploads at
//! once cannot together pass what each alone may have.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::domain::ids::UserId;

/// What is reserved, by user, in bytes. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Reservations(Arc<Mutex<HashMap<UserId, u64>>>);

/// Some room of one user; given back when it is dropped.
#[derive(Debug)]
pub struct Reservation {
    of: Reservations,
    user_id: UserId,
    bytes: u64,
}

impl Reservations {
    /// Reserves room if `fits` says so, which is told what the user has reserved already. Nobody
    /// else reserves meanwhile.
    ///
    /// # Errors
    /// What `fits` says.
    pub fn reserve<E>(
        &self,
        user_id: &UserId,
        bytes: u64,
        fits: impl FnOnce(u64) -> Result<(), E>,
    ) -> Result<Reservation, E> {
        let mut none = Reservation { of: self.clone(), user_id: user_id.clone(), bytes: 0 };
        none.grow_to(bytes, fits)?;
        Ok(none)
    }

    /// What a user has reserved.
    pub fn of(&self, user_id: &UserId) -> u64 {
        self.locked().get(user_id).copied().unwrap_or_default()
    }

    fn give_back(&self, user_id: &UserId, bytes: u64) {
        let mut reserved = self.locked();
        if let Some(all) = reserved.get_mut(user_id) {
            *all = all.saturating_sub(bytes);
            if *all == 0 {
                reserved.remove(user_id);
            }
        }
    }

    fn locked(&self) -> MutexGuard<'_, HashMap<UserId, u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reservation {
    /// In bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Makes it as large as that, if it is smaller and `fits` says so, which is told what else the
    /// user has reserved.
    ///
    /// # Errors
    /// What `fits` says; then it stays as it was.
    pub fn grow_to<E>(
        &mut self,
        bytes: u64,
        fits: impl FnOnce(u64) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut reserved = self.of.locked();
        let all = reserved.get(&self.user_id).copied().unwrap_or_default();
        let others = all.saturating_sub(self.bytes);
        if bytes > self.bytes {
            fits(others)?;
            reserved.insert(self.user_id.clone(), others.saturating_add(bytes));
            self.bytes = bytes;
        }
        Ok(())
    }

    /// Gives back what is more than that.
    pub fn shrink_to(&mut self, bytes: u64) {
        self.of.give_back(&self.user_id, self.bytes.saturating_sub(bytes));
        self.bytes = self.bytes.min(bytes);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.of.give_back(&self.user_id, self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_reserved_counts_until_it_is_dropped_and_a_refusal_changes_nothing() {
        let reservations = Reservations::default();
        let ada = UserId::try_from("ada".to_owned()).unwrap();
        let within = |limit: u64, bytes: u64| {
            move |others: u64| match others + bytes <= limit {
                true => Ok(()),
                false => Err(others),
            }
        };
        let first = reservations.reserve(&ada, 6, within(10, 6)).unwrap();
        assert_eq!(reservations.reserve(&ada, 5, within(10, 5)).unwrap_err(), 6);
        let mut second = reservations.reserve(&ada, 1, within(10, 1)).unwrap();
        assert_eq!(second.grow_to(5, within(10, 5)), Err(6));
        assert_eq!((second.bytes(), reservations.of(&ada)), (1, 7));
        second.grow_to(4, within(10, 4)).unwrap();
        second.grow_to(2, |_| Err(0)).unwrap();
        assert_eq!((second.bytes(), reservations.of(&ada)), (4, 10));
        drop(first);
        assert_eq!(reservations.of(&ada), 4);
        drop(second);
        assert_eq!(reservations.of(&ada), 0);
    }
}
