//! What T2M is about, as pure functions: no I/O, no clock, no randomness. What a decision needs of
//! the outside is handed in, so that replay is exact and tests are instant.
//!
//! Four aggregates, each one file: its events, commands, state, refusals, decisions and tests; and
//! the rules that concern many of them at once.

pub mod file;
pub mod ids;
pub mod job;
pub mod moment;
pub mod schedule;
pub mod session;
pub mod text;
pub mod tier;
pub mod translation;
pub mod user;

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// One consistency boundary: a stream of events, and the rules by which commands add to it.
pub trait Aggregate: Default + Clone + Send + 'static {
    /// First part of the stream's name: `job` in `job-ID`.
    const CATEGORY: &'static str;
    type Command: Send + 'static;
    type Event: Serialize + DeserializeOwned + Clone + Send + 'static;
    /// Why the business says no: a variant for each reason that a caller could act on.
    type Refusal: std::error::Error + Send + 'static;

    /// The events that `command` brings about, none if there is nothing to do.
    ///
    /// # Errors
    /// A refusal; then nothing happened.
    fn decide(
        &self,
        command: &Self::Command,
        now: DateTime<Utc>,
    ) -> Result<Vec<Self::Event>, Self::Refusal>;

    /// Takes in what has happened. Never refuses: what is in the log is a fact.
    fn evolve(&mut self, event: &Self::Event);

    /// Shows `visit` every personal field of an event. An event that has none is passed over.
    fn personal(event: &mut Self::Event, visit: text::Visit<'_>);

    /// Whose an event's personal fields are; `id` is the stream's. None where there are none.
    fn owner(id: &str, event: &Self::Event) -> Option<ids::UserId>;

    /// The state after `events`.
    fn fold<'a>(events: impl IntoIterator<Item = &'a Self::Event>) -> Self {
        let mut state = Self::default();
        for event in events {
            state.evolve(event);
        }
        state
    }
}

/// The stream of one entity, as CONTRACT §5 names it: `job-ID`.
pub fn stream<A: Aggregate>(id: impl std::fmt::Display) -> String {
    format!("{}-{id}", A::CATEGORY)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{Aggregate, file::File, job::Job, session::Session, stream, user::User};

    const ID: &str = "0190d3a0-0000-7000-8000-000000000001";

    /// The places of the personal fields of an event, and whose they are.
    fn personal<A: Aggregate>(kind: &str, data: Value) -> (Vec<&'static str>, Option<String>) {
        let event = json!({ "type": kind, "data": data });
        let mut event: A::Event = serde_json::from_value(event).unwrap();
        let mut places = vec![];
        A::personal(&mut event, &mut |place, field| {
            assert!(field.clear().is_some(), "{place}");
            places.push(place);
        });
        (places, A::owner("ada", &event).map(String::from))
    }

    #[test]
    fn each_personal_field_is_shown_under_its_place_and_belongs_to_its_user() {
        let ada = || Some("ada".to_owned());
        let profile = json!({
            "email": "a@x", "first_name": "A", "last_name": "L", "username": "al", "image_url": "u",
        });
        let places = [
            "profile.email",
            "profile.first_name",
            "profile.last_name",
            "profile.username",
            "profile.image_url",
        ];
        let data = json!({ "profile": profile, "provisional": true });
        assert_eq!(personal::<User>("user.registered.v1", data), (places.to_vec(), ada()));
        let data = json!({ "profile": profile, "source_updated_at": "2026-01-01T00:00:00Z" });
        assert_eq!(personal::<User>("user.profile_changed.v1", data), (places.to_vec(), ada()));
        assert_eq!(personal::<User>("user.banned.v1", json!({})), (vec![], ada()));

        let data = json!({
            "user_id": "bob", "filename": "photo.png", "content_type": "image/png", "size": 3,
            "sha256": "00", "metadata": { "title": "me" },
        });
        let bob = || Some("bob".to_owned());
        let places = vec!["filename", "metadata"];
        assert_eq!(personal::<File>("file.stored.v1", data), (places, bob()));
        let data = json!({ "user_id": "bob", "sha256": "00", "reason": "requested" });
        assert_eq!(personal::<File>("file.deleted.v2", data), (vec![], bob()));

        let data = json!({
            "user_id": "bob", "started_at": "2026-01-01T00:00:00Z",
            "expires_at": "2026-01-08T00:00:00Z", "ip_address": "::1", "user_agent": "curl",
        });
        let places = vec!["ip_address", "user_agent"];
        assert_eq!(personal::<Session>("session.started.v1", data), (places, bob()));
        let data = json!({ "user_id": "bob", "at": "2026-01-01T00:00:00Z" });
        assert_eq!(personal::<Session>("session.active.v1", data), (vec![], bob()));
        let data = json!({ "reason": "removed", "at": "2026-01-01T00:00:00Z" });
        assert_eq!(personal::<Session>("session.ended.v1", data), (vec![], None));

        let options = json!({
            "source_file_id": ID, "format": "srt", "model_name": "m", "style_data": "terse",
            "segment_size": 1, "has_api_key": false,
        });
        let data = json!({
            "user_id": "bob", "kind": "translation", "prompt": "film.srt", "options": options,
            "callback_url": "https://x/?key=1",
        });
        let places = vec!["prompt", "callback_url", "options.style_data"];
        assert_eq!(personal::<Job>("job.requested.v1", data), (places, bob()));
        let options = json!({
            "duration": 1, "quality": "480p", "aspect_ratio": "1:1", "seed": 0, "style": "Mia's",
        });
        let data =
            json!({ "user_id": "bob", "kind": "video", "prompt": "night", "options": options });
        let places = vec!["prompt", "options.style"];
        assert_eq!(personal::<Job>("job.requested.v1", data), (places, bob()));
        let data = json!({ "error": "boom" });
        assert_eq!(personal::<Job>("job.failed.v1", data), (vec![], None));
    }

    #[test]
    fn a_stream_is_named_after_its_category_and_its_entity() {
        assert_eq!(stream::<Job>(ID), format!("job-{ID}"));
        assert_eq!(stream::<User>("ada"), "user-ada");
    }
}
