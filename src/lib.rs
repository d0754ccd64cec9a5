//! T2M: the back end of text-to-media apps on Clerk, as an event-sourced actor system.
//!
//! `decide(state, command, now) → events`, `evolve(state, event) → state`, and a log between them.
//! Everything else is plumbing, with one place each. A module may use those above it in this list,
//! never those below; a test holds that.
//!
//! 0. [`clock`], [`config`] and [`telemetry`]: the only source of now and of fresh ids; checked
//!    settings; the metrics by name, and the span of an attempt.
//! 1. [`domain`]: users, sessions, files and jobs as pure functions. [`log`]: streams, revisions,
//!    positions and a hash chain. They do not know each other.
//! 2. [`views`]: the read models. [`clerk`]: tokens, keys and webhooks. [`media`]: bytes, links and
//!    the renderer.
//! 3. [`actors`]: entities, projector, dispatcher, timekeeper and storekeeper.
//! 4. [`http`]: the front end.
//! 5. [`cli`]: the commands of `t2m`.
//!
//! Deliberately absent: an aggregate that reads another one, a handler that appends to the log, a
//! clock read outside `clock.rs`, a module called `utils`, and any bus besides the log.

pub mod actors;
pub mod clerk;
pub mod cli;
pub mod clock;
pub mod config;
pub mod domain;
pub mod http;
pub mod log;
pub mod media;
pub mod telemetry;
pub mod views;

/// A replay makes and frees millions of small things, most of them on another thread than they were made
/// on, which costs the C library's allocator a third of that time. Fuzzers bring one of their own.
#[cfg(not(fuzzing))]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;
