//! Bytes: where they lie, the links that hand them out, and the renderer that makes them.

pub mod aside;
pub mod blobs;
pub mod disk;
pub mod documents;
pub mod inventory;
pub mod renderer;
pub mod reservations;
mod settling;
pub mod signed_url;
pub mod uploads;
pub mod vault;
