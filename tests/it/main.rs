//! The tests that look at T2M from outside: one binary, so that it links once.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod postgres;
mod server;

mod api;
mod backend;
mod blobs;
mod browser;
mod clerk_api;
mod clients;
mod engine_faults;
mod engines;
mod erasure;
mod events;
mod faults;
mod floors;
#[cfg(feature = "eventstore")]
mod kurrent;
#[cfg(feature = "eventstore")]
mod kurrent_faults;
mod lives;
mod many_nodes;
#[cfg(feature = "eventstore")]
mod over_kurrent;
mod over_postgres;
mod replay;
mod s3;
mod seeds;
mod simulation;
#[cfg(feature = "eventstore")]
mod standin;
mod starting;
mod telemetry;
mod translations;
mod tus;
mod worker;
