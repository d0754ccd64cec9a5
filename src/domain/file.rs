//! A file: bytes that a user stored or a job made. The bytes lie in the blob store before the
//! event says so, hence a file in the log always has its bytes.

use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Aggregate;
use super::ids::{JobId, UserId};
use super::text::{Personal, Visit};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", content = "data")]
pub enum Event {
    #[serde(rename = "file.stored.v1")]
    Stored(Box<Stored>),
    #[serde(rename = "file.deleted.v2")]
    Deleted {
        user_id: UserId,
        /// The bytes that lost a referrer, for whoever clears the blob store.
        sha256: String,
        reason: Reason,
    },
}

/// Why a file goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// Its owner asked for it.
    Requested,
    /// A job made it, and the time for which such files are kept is over.
    Expired,
    /// Its owner was deleted.
    OwnerDeleted,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Stored {
    pub user_id: UserId,
    pub filename: Personal<String>,
    /// Sniffed from the bytes where they tell, else as declared.
    pub content_type: String,
    /// In bytes.
    pub size: u64,
    /// Lower-case hexadecimal; also the address in the blob store.
    pub sha256: String,
    /// The upload's other form fields.
    #[serde(default)]
    pub metadata: Personal<serde_json::Map<String, serde_json::Value>>,
    /// The job that made it; absent for an upload.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job_id: Option<JobId>,
    /// Digest of the request that an `Idempotency-Key` came with, to tell a retry from a misuse.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<String>,
}

#[derive(Debug, Clone)]
pub enum Command {
    Store(Stored),
    Delete {
        by: UserId,
    },
    /// Nothing happens when it is gone already.
    Remove {
        reason: Reason,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("no such file")]
    NotFound,
    #[error("the idempotency key was used for another request")]
    KeyReused,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum File {
    #[default]
    Absent,
    Present(Stored),
    Deleted,
}

impl Aggregate for File {
    const CATEGORY: &'static str = "file";
    type Command = Command;
    type Event = Event;
    type Refusal = Refusal;

    fn decide(&self, command: &Command, _now: DateTime<Utc>) -> Result<Vec<Event>, Refusal> {
        match (command, self) {
            (Command::Store(file), Self::Absent) => Ok(vec![Event::Stored(Box::new(file.clone()))]),
            (Command::Store(file), Self::Present(stored)) if file.is_again(stored) => Ok(vec![]),
            (Command::Store(_), Self::Present(_) | Self::Deleted) => Err(Refusal::KeyReused),
            (Command::Delete { by }, Self::Present(stored)) if *by == stored.user_id => {
                Ok(vec![deleted(stored, Reason::Requested)])
            }
            (Command::Remove { reason }, Self::Present(stored)) => {
                Ok(vec![deleted(stored, *reason)])
            }
            (Command::Remove { .. }, _) => Ok(vec![]),
            (Command::Delete { .. }, _) => Err(Refusal::NotFound),
        }
    }

    fn evolve(&mut self, event: &Event) {
        *self = match event {
            Event::Stored(stored) => Self::Present(Stored::clone(stored)),
            Event::Deleted { .. } => Self::Deleted,
        };
    }

    fn personal(event: &mut Event, visit: Visit<'_>) {
        match event {
            Event::Stored(stored) => {
                visit("filename", &mut stored.filename);
                visit("metadata", &mut stored.metadata);
            }
            Event::Deleted { .. } => {}
        }
    }

    fn owner(_id: &str, event: &Event) -> Option<UserId> {
        match event {
            Event::Stored(stored) => Some(stored.user_id.clone()),
            Event::Deleted { user_id, .. } => Some(user_id.clone()),
        }
    }
}

impl Stored {
    /// Whether it is the same request once more; without a fingerprint the bytes tell.
    fn is_again(&self, stored: &Self) -> bool {
        let same = self.fingerprint.is_some() || self.sha256 == stored.sha256;
        same && self.fingerprint == stored.fingerprint
    }
}

fn deleted(stored: &Stored, reason: Reason) -> Event {
    Event::Deleted { user_id: stored.user_id.clone(), sha256: stored.sha256.clone(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(name: &str) -> UserId {
        UserId::try_from(name.to_owned()).unwrap()
    }

    fn photo() -> Stored {
        Stored {
            user_id: user("ada"),
            filename: Personal::Known("photo.png".to_owned()),
            content_type: "image/png".to_owned(),
            size: 3,
            sha256: "ab".repeat(32),
            metadata: Personal::default(),
            job_id: None,
            fingerprint: Some("f".to_owned()),
        }
    }

    fn check(given: &[Event], when: Command, then: Result<usize, Refusal>) {
        let decided = File::fold(given).decide(&when, DateTime::UNIX_EPOCH);
        assert_eq!(decided.map(|events| events.len()), then, "{when:?}");
    }

    #[test]
    fn a_file_is_stored_once_and_deleted_by_its_owner_alone() {
        let stored = Event::Stored(Box::new(photo()));
        let deleted = deleted(&photo(), Reason::Requested);
        let other = Stored { fingerprint: Some("g".to_owned()), ..photo() };
        check(&[], Command::Store(photo()), Ok(1));
        check(std::slice::from_ref(&stored), Command::Store(photo()), Ok(0));
        check(std::slice::from_ref(&stored), Command::Store(other), Err(Refusal::KeyReused));
        let output =
            Stored { job_id: Some(JobId(uuid::Uuid::nil())), fingerprint: None, ..photo() };
        let rendered_anew = Stored { sha256: "cd".repeat(32), ..output.clone() };
        let handed_in = [Event::Stored(Box::new(output.clone()))];
        check(&handed_in, Command::Store(output), Ok(0));
        check(&handed_in, Command::Store(rendered_anew), Err(Refusal::KeyReused));
        check(std::slice::from_ref(&stored), Command::Delete { by: user("ada") }, Ok(1));
        check(
            std::slice::from_ref(&stored),
            Command::Delete { by: user("bob") },
            Err(Refusal::NotFound),
        );
        check(&[], Command::Delete { by: user("ada") }, Err(Refusal::NotFound));
        let remove = || Command::Remove { reason: Reason::Expired };
        check(std::slice::from_ref(&stored), remove(), Ok(1));
        check(&[stored.clone(), deleted.clone()], remove(), Ok(0));
        check(&[], remove(), Ok(0));
        check(&[stored, deleted], Command::Delete { by: user("ada") }, Err(Refusal::NotFound));
    }
}
