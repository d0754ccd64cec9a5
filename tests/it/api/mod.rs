//! The contract, asked of the running server.

mod access;
mod admin;
mod backups;
mod batch;
mod budgets;
mod callbacks;
mod claims;
mod cli;
mod dead_letters;
mod identity;
mod links;
mod main_job;
mod moving;
mod names;
mod operators;
mod origins;
mod quota;
mod refusals;
mod repeats;
mod restart;
mod stopping;
mod streams;
mod takeover;
mod worker;

use serde_json::{Value, json};

/// The body of Clerk's `user.created` and `user.updated`; the primary address is the second one.
fn clerk_user(id: &str, updated_at: i64) -> Value {
    json!({
        "id": id, "object": "user", "first_name": "Ada", "last_name": "Lovelace",
        "primary_email_address_id": "idn_2",
        "email_addresses": [
            { "id": "idn_1", "email_address": "old@example.com" },
            { "id": "idn_2", "email_address": "ada@example.com" },
        ],
        "public_metadata": { "role": "creator", "subscription_tier": "premium" },
        "created_at": 1_767_225_600_000_i64, "updated_at": updated_at,
    })
}

/// The body of Clerk's `session.*`.
fn clerk_session(id: &str, user_id: &str, status: &str) -> Value {
    let now = crate::server::now() * 1000;
    json!({
        "id": id, "object": "session", "user_id": user_id, "status": status,
        "created_at": now, "updated_at": now, "expire_at": now + 7 * 24 * 3_600_000,
    })
}
