//! How much a user may store, held at the start of an upload: what is stored, what uploads under
//! way have reserved, and what is asked for must fit together.

use serde_json::json;

use super::app::App;
use super::caller::Caller;
use super::problem::{Code, Problem};
use crate::config::ByTier;
use crate::domain::ids::UserId;
use crate::domain::tier::Tier;
use crate::media::reservations::{Reservation, Reservations};
use crate::views::Views;

/// How far an allowance grows beyond what has come.
const STEP_BYTES: u64 = 16 * 1024 * 1024;

/// The limits, and what is reserved.
pub struct Quotas {
    /// In bytes.
    limits: ByTier<u64>,
    reservations: Reservations,
}

/// What one upload of a user may take up; given back when it is dropped.
pub struct Allowance {
    room: Reservation,
    /// In bytes.
    limit: u64,
    /// Absent where nothing more is stored.
    stored: Option<(Views, UserId)>,
}

impl Quotas {
    pub fn new(limits: ByTier<u64>, reservations: Reservations) -> Self {
        Self { limits, reservations }
    }

    /// Of nothing yet; it grows with the upload.
    pub fn allowance(&self, app: &App, caller: &Caller) -> Allowance {
        Allowance {
            room: nothing(&self.reservations, &caller.user_id),
            limit: *Tier::of(&caller.subscription_tier).pick(&self.limits),
            stored: Some((app.system.views.clone(), caller.user_id.clone())),
        }
    }
}

impl Allowance {
    /// Reserves so many bytes in all.
    ///
    /// # Errors
    /// 413 `quota_exceeded`; what was reserved before stays so.
    pub fn cover(&mut self, bytes: u64) -> Result<(), Problem> {
        let (limit, stored) = (self.limit, &self.stored);
        let Some((views, user_id)) = stored else {
            return match bytes <= limit {
                true => Ok(()),
                false => Err(Problem::new(Code::IdempotencyKeyReused)),
            };
        };
        self.room.grow_to(bytes, |reserved| {
            let used = views.bytes_stored(user_id)?;
            match used.saturating_add(reserved).saturating_add(bytes) <= limit {
                true => Ok(()),
                false => Err(exceeded(limit, used, reserved, bytes)),
            }
        })
    }

    /// Reserves so many bytes of an upload whose length is not known, and more if there is room:
    /// every time, all that the user has stored is summed while nobody else can reserve.
    ///
    /// # Errors
    /// As [`Allowance::cover`].
    pub fn keep_ahead_of(&mut self, bytes: u64) -> Result<(), Problem> {
        if bytes <= self.room.bytes() || self.cover(bytes.saturating_add(STEP_BYTES)).is_ok() {
            return Ok(());
        }
        self.cover(bytes)
    }

    /// Gives back what an upload needs no more, now that its size is known.
    pub fn shrink_to(&mut self, bytes: u64) {
        self.room.shrink_to(bytes);
    }

    /// For an upload that outlives its request.
    pub fn into_room(self) -> Reservation {
        self.room
    }

    /// For an upload that comes again under its key: its file of so many bytes counts already, and
    /// a larger one is another request.
    pub fn again(size: u64) -> Self {
        let nobody = UserId::try_from("nobody".to_owned()).expect("this is an id");
        let room = nothing(&Reservations::default(), &nobody);
        Self { room, limit: size, stored: None }
    }

    /// For whoever stores without a user: tests, and the fuzzer of the multipart reader.
    pub fn unlimited() -> Self {
        Self::again(u64::MAX)
    }
}

fn nothing(reservations: &Reservations, user_id: &UserId) -> Reservation {
    let Ok(room) = reservations.reserve(user_id, 0, |_| Ok::<_, std::convert::Infallible>(()));
    room
}

/// All in bytes.
fn exceeded(limit: u64, used: u64, reserved: u64, requested: u64) -> Problem {
    Problem::new(Code::QuotaExceeded).with_detail(json!({
        "limit": limit, "used": used, "reserved": reserved, "requested": requested,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_without_a_length_is_reserved_in_steps_and_to_the_byte_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let views = Views::open(&dir.path().join("views.sqlite")).unwrap();
        let ada = UserId::try_from("ada".to_owned()).unwrap();
        let reservations = Reservations::default();
        let limit = 2 * STEP_BYTES + 10;
        let stored = Some((views, ada.clone()));
        let mut allowance = Allowance { room: nothing(&reservations, &ada), limit, stored };
        for (bytes, reserved) in [
            (1, STEP_BYTES + 1),
            (STEP_BYTES + 1, STEP_BYTES + 1),
            (STEP_BYTES + 2, 2 * STEP_BYTES + 2),
            (2 * STEP_BYTES + 2, 2 * STEP_BYTES + 2),
            (2 * STEP_BYTES + 3, 2 * STEP_BYTES + 3),
            (limit, limit),
        ] {
            allowance.keep_ahead_of(bytes).unwrap();
            assert_eq!(reservations.of(&ada), reserved, "{bytes}");
        }
        let refused = allowance.keep_ahead_of(limit + 1).unwrap_err();
        assert_eq!(refused.body()["detail"]["requested"], limit + 1);
        assert_eq!(refused.code(), Code::QuotaExceeded);
        // When all has come, another one fits beside it.
        allowance.shrink_to(7);
        assert_eq!(reservations.of(&ada), 7);
        allowance.shrink_to(8);
        assert_eq!(reservations.of(&ada), 7);
        let again = Allowance::again(5).keep_ahead_of(6).unwrap_err();
        assert_eq!(again.code(), Code::IdempotencyKeyReused);
    }
}
