//! The tests that look at T2M from outside: one binary, so that it links once.

mod browser;
mod events;
mod floors;
