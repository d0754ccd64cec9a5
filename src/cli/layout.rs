//! What lies in a data directory, by name; what lies in the store of files, its own modules name.

pub use crate::log::EMBEDDED_FILE as LOG;

/// The read model, as it is called to the outside: a rebuilt one has a number in its real name.
pub const VIEWS: &str = "views.sqlite";
/// What seals everybody's keys, unless that was given.
pub const MASTER_KEY: &str = "master.key";
/// Who holds the directory; it says nothing by being there.
pub const SERVER_LOCK: &str = "server.lock";
/// Beside the kept key, locked while that is exchanged; it says nothing by being there either.
pub const EXCHANGE_LOCK: &str = "rotate.lock";

/// The secrets of development.
pub const FILE_SIGNING_SECRET: &str = "file-signing-secret";
pub const CALLBACK_SIGNING_SECRET: &str = "callback-signing-secret";
pub const DEVELOPMENT_KEY: &str = "development-key.pem";

/// How far the push to Clerk is in the log.
pub const CLERK_SYNC_POSITION: &str = "clerk-sync-position";
/// How far callbacks are in the log.
pub const CALLBACKS_POSITION: &str = "callbacks-position";
/// What names positions of the log beside the read model: these, and which events the operator has given
/// up.
pub const POSITIONS: [&str; 3] = [CLERK_SYNC_POSITION, CALLBACKS_POSITION, "views.skipped"];
