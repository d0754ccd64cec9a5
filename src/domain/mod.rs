//! What T2M is about, as pure functions: no I/O, no clock, no randomness. What a decision needs of
//! the outside is handed in, so that replay is exact and tests are instant.
//!
//! Four aggregates, each one file: its events, commands, state, refusals, decisions and tests; and
//! the rules that concern many of them at once.

pub mod file;
pub mod ids;
pub mod job;
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
