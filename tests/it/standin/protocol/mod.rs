//! The messages and services of KurrentDB's protocol as far as the stand-in speaks it.
//!
//! Generated once, outside of the repository, with `protox` 0.8 and `tonic-build` 0.13
//! (`build_client(false)`, `build_transport(false)`, comments off) from the proto files in the
//! `kurrentdb` crate 1.2, cut down to what is used here: unknown fields are skipped on the wire.

#![allow(clippy::all, clippy::pedantic, reason = "generated")]

pub mod gossip;
pub mod server_features;
pub mod streams;
