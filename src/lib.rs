//! T2M: the back end of text-to-media apps on Clerk, as an event-sourced actor system.

pub mod clock;
pub mod domain;
