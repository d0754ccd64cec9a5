//! Deliveries that were genuine and yet unusable, kept until somebody retries or discards them.
//! They lie outside the log, because their bodies hold personal data and must be able to go.

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::clock::Clock;
use crate::domain::ids::UserId;
use crate::media::blobs::{Blobs, Error};
use crate::media::documents::{Documents, Listed};

/// Where the letters lie in the object store.
const FOLDER: &str = "dead-letters";
/// How long a letter is kept after its last delivery.
const KEPT_FOR: TimeDelta = TimeDelta::days(30);
/// How many of the newest letters are kept.
const MOST: usize = 10_000;
/// How often old letters are looked for, besides once every so many writes.
const TRIM_EVERY: Duration = Duration::from_secs(3600);
const TRIM_EVERY_WRITES: usize = 256;

/// A delivery that could not be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Letter {
    #[serde(flatten)]
    pub heading: Heading,
    /// As it was delivered; what is not UTF-8 is replaced.
    pub body: String,
}

/// What may be shown of a letter in a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = DeadLetter)]
pub struct Heading {
    pub message_id: String,
    pub received_at: DateTime<Utc>,
    /// Absent when the body tells none.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    pub reason: String,
}

/// Where a page of letters ended. Opaque to clients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cursor {
    written_at: DateTime<Utc>,
    name: String,
}

/// The letters of all nodes; clones share what they know.
#[derive(Debug, Clone)]
pub struct DeadLetters {
    documents: Documents,
    /// Names seen at the last look, so that a delivery that succeeds, as nearly all do, costs no
    /// call to the store.
    known: Arc<Mutex<HashSet<String>>>,
    writes: Arc<AtomicUsize>,
}

impl DeadLetters {
    pub fn new(blobs: &Blobs) -> Self {
        let documents = blobs.documents(FOLDER);
        Self { documents, known: Arc::default(), writes: Arc::default() }
    }

    /// Keeps a letter, in the place of an earlier one of the same delivery. Durable on return.
    ///
    /// # Errors
    /// The store cannot take it: then the delivery must not be acknowledged.
    pub async fn keep(&self, letter: &Letter, now: DateTime<Utc>) -> Result<(), Error> {
        let name = name_of(&letter.heading.message_id);
        let json = serde_json::to_vec_pretty(letter).expect("strings and times are always JSON");
        self.documents.put(&name, json).await?;
        self.known().insert(name);
        if (self.writes.fetch_add(1, Ordering::Relaxed) + 1).is_multiple_of(TRIM_EVERY_WRITES)
            && let Err(error) = self.trim(now).await
        {
            tracing::warn!(%error, "old dead letters could not be dropped");
        }
        Ok(())
    }

    /// The letter of a delivery.
    pub async fn find(&self, message_id: &str) -> Result<Option<Letter>, Error> {
        self.read(&name_of(message_id)).await
    }

    /// Removes the letter of a delivery, if there is one.
    pub async fn discard(&self, message_id: &str) -> Result<(), Error> {
        let name = name_of(message_id);
        self.documents.delete(&name).await?;
        self.known().remove(&name);
        Ok(())
    }

    /// The delivery was used after all. Its events are durable, so a letter that cannot be removed
    /// does no harm: a retry of it changes nothing.
    pub async fn settle(&self, message_id: &str) {
        let waiting = self.known().contains(&name_of(message_id));
        if waiting && let Err(error) = self.discard(message_id).await {
            tracing::warn!(message_id, %error, "a dead letter that was used could not be removed");
        }
    }

    /// Letters, the one delivered last first, and where the next page begins.
    pub async fn page(
        &self,
        after: Option<&Cursor>,
        limit: usize,
    ) -> Result<(Vec<Heading>, Option<Cursor>), Error> {
        let listed = self.documents.list().await?;
        let is_next = |it: &&Listed| {
            after.is_none_or(|end| (it.written_at, &it.name) < (end.written_at, &end.name))
        };
        let mut rest = listed.iter().filter(is_next);
        let page: Vec<&Listed> = rest.by_ref().take(limit).collect();
        let more = rest.next().is_some();
        let mut headings = Vec::with_capacity(page.len());
        for listed in &page {
            // One that was removed since it was listed is passed over.
            headings.extend(self.read(&listed.name).await?.map(|letter| letter.heading));
        }
        let end = page.last().filter(|_| more);
        Ok((headings, end.map(|it| Cursor { written_at: it.written_at, name: it.name.clone() })))
    }

    /// How many letters this process has kept so far.
    pub fn kept(&self) -> usize {
        self.writes.load(Ordering::Relaxed)
    }

    /// Removes every letter whose body names one of these users, and says how many.
    ///
    /// # Errors
    /// The store cannot be read or does not remove one.
    pub async fn forget(&self, users: &HashSet<UserId>) -> Result<usize, Error> {
        let mut forgotten = 0;
        for listed in self.documents.list().await? {
            let Some(letter) = self.read(&listed.name).await? else { continue };
            if names_one_of(&letter.body, users) {
                self.documents.delete(&listed.name).await?;
                self.known().remove(&listed.name);
                forgotten += 1;
            }
        }
        Ok(forgotten)
    }

    /// Drops what is too old and what is too many, and learns what is there.
    pub async fn trim(&self, now: DateTime<Utc>) -> Result<(), Error> {
        self.trim_to(now, MOST).await
    }

    /// Trims once an hour for as long as the runtime lives.
    pub fn start(&self, clock: Clock) {
        let letters = self.clone();
        tokio::spawn(async move {
            loop {
                if let Err(error) = letters.trim(clock.now()).await {
                    tracing::warn!(%error, "old dead letters could not be dropped");
                }
                tokio::time::sleep(TRIM_EVERY).await;
            }
        });
    }

    async fn trim_to(&self, now: DateTime<Utc>, most: usize) -> Result<(), Error> {
        let listed = self.documents.list().await?;
        let fresh = listed.iter().take(most).take_while(|it| now - it.written_at < KEPT_FOR);
        let kept = fresh.count();
        // Only added to: what was kept while the store was listed is not in the list.
        self.known().extend(listed[..kept].iter().map(|it| it.name.clone()));
        for old in &listed[kept..] {
            self.documents.delete(&old.name).await?;
            self.known().remove(&old.name);
        }
        Ok(())
    }

    async fn read(&self, name: &str) -> Result<Option<Letter>, Error> {
        let Some(bytes) = self.documents.get(name).await? else { return Ok(None) };
        let letter = serde_json::from_slice(&bytes);
        Ok(letter.inspect_err(|error| tracing::warn!(name, %error, "not a dead letter")).ok())
    }

    fn known(&self) -> MutexGuard<'_, HashSet<String>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Cursor {
    /// None for what [`Cursor::text`] never was.
    pub fn parse(text: &str) -> Option<Self> {
        let bytes = URL_SAFE_NO_PAD.decode(text).ok()?;
        let (nanos, name) = std::str::from_utf8(&bytes).ok()?.split_once(' ')?;
        let written_at = DateTime::from_timestamp_nanos(nanos.parse().ok()?);
        Some(Self { written_at, name: name.to_owned() })
    }

    pub fn text(&self) -> String {
        // A store's clock that is beyond the year 2262 costs the rest of the list, no more.
        let nanos = self.written_at.timestamp_nanos_opt().unwrap_or_default();
        URL_SAFE_NO_PAD.encode(format!("{nanos} {}", self.name))
    }
}

/// Whether a whole word of the text is one of the ids.
fn names_one_of(text: &str, users: &HashSet<UserId>) -> bool {
    let between = |c: char| !UserId::may_hold(c);
    text.split(between).any(|word| {
        let id = UserId::try_from(word.to_owned());
        id.is_ok_and(|id| users.contains(&id))
    })
}

/// The message id itself if any file system takes it, else its hash. (An id never holds a dot.)
fn name_of(message_id: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
    if (1..=200).contains(&message_id.len()) && message_id.bytes().all(plain) {
        format!("{message_id}.json")
    } else {
        format!("sha256.{}.json", hex::encode(Sha256::digest(message_id)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::BlobStore;

    fn letters() -> (tempfile::TempDir, DeadLetters) {
        let dir = tempfile::tempdir().unwrap();
        let letters = DeadLetters::new(&Blobs::open(&BlobStore::File, dir.path()).unwrap());
        (dir, letters)
    }

    fn now() -> DateTime<Utc> {
        Clock::system().now()
    }

    fn letter(message_id: &str, reason: &str) -> Letter {
        let heading = Heading {
            message_id: message_id.to_owned(),
            received_at: now(),
            kind: Some("user.created".to_owned()),
            reason: reason.to_owned(),
        };
        Letter { heading, body: "{\"type\":\"user.created\"}".to_owned() }
    }

    async fn ids(letters: &DeadLetters) -> Vec<String> {
        let (page, _) = letters.page(None, 100).await.unwrap();
        page.into_iter().map(|heading| heading.message_id).collect()
    }

    #[tokio::test]
    async fn the_same_delivery_again_is_one_letter_and_a_usable_one_is_none() {
        let (_dir, letters) = letters();
        letters.keep(&letter("msg_1", "first"), now()).await.unwrap();
        letters.keep(&letter("msg_1", "second"), now()).await.unwrap();
        assert_eq!(ids(&letters).await, ["msg_1"]);
        let found = letters.find("msg_1").await.unwrap().unwrap();
        assert_eq!((found.heading.reason.as_str(), found.body.len()), ("second", 23));
        letters.settle("msg_1").await;
        letters.settle("msg_1").await;
        assert_eq!(letters.find("msg_1").await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_restarted_server_knows_which_letters_a_redelivery_settles() {
        let (_dir, letters) = letters();
        letters.keep(&letter("msg_1", "x"), now()).await.unwrap();
        let restarted = DeadLetters { known: Arc::default(), ..letters.clone() };
        restarted.trim(now()).await.unwrap();
        restarted.settle("msg_1").await;
        assert_eq!(ids(&letters).await, [""; 0]);
    }

    #[tokio::test]
    async fn old_letters_and_those_beyond_the_newest_are_dropped() {
        let (_dir, letters) = letters();
        for id in ["msg_1", "msg_2", "msg_3"] {
            letters.keep(&letter(id, "x"), now()).await.unwrap();
        }
        letters.trim_to(now(), 2).await.unwrap();
        assert_eq!(ids(&letters).await, ["msg_3", "msg_2"]);
        letters.trim(now() + TimeDelta::days(29)).await.unwrap();
        assert_eq!(ids(&letters).await.len(), 2);
        letters.trim(now() + TimeDelta::days(31)).await.unwrap();
        assert_eq!(ids(&letters).await, [""; 0]);
        assert!(letters.known().is_empty());
    }

    #[tokio::test]
    async fn letters_that_name_a_user_are_forgotten_and_those_of_a_like_name_are_not() {
        let (_dir, letters) = letters();
        let about = |id: &str, body: &str| Letter { body: body.to_owned(), ..letter(id, "x") };
        for (id, body) in [
            ("msg_1", r#"{"data":{"id":"user_1"}}"#),
            ("msg_2", r#"{"data":{"id":"user_12"}}"#),
            ("msg_3", "no json, user_1"),
            ("msg_4", ""),
        ] {
            letters.keep(&about(id, body), now()).await.unwrap();
        }
        let gone = HashSet::from([UserId::try_from("user_1".to_owned()).unwrap()]);
        assert_eq!(letters.forget(&gone).await.unwrap(), 2);
        assert_eq!(letters.forget(&gone).await.unwrap(), 0);
        assert_eq!(ids(&letters).await, ["msg_4", "msg_2"]);
    }

    #[tokio::test]
    async fn pages_hold_each_letter_once_whatever_its_id() {
        let (_dir, letters) = letters();
        let (long, odd) = ("m".repeat(256), "msg/../<1>:*?");
        let expected = [long.as_str(), odd, "msg_2", "msg_1"];
        for id in expected.iter().rev() {
            letters.keep(&letter(id, "x"), now()).await.unwrap();
            assert!(letters.find(id).await.unwrap().is_some(), "{id}");
        }
        let (mut seen, mut after) = (vec![], None);
        loop {
            let (page, end) = letters.page(after.as_ref(), 1).await.unwrap();
            seen.extend(page.into_iter().map(|heading| heading.message_id));
            let Some(end) = end else { break };
            after = Some(Cursor::parse(&end.text()).unwrap());
            assert_eq!(after, Some(end));
        }
        assert_eq!(seen, expected);
        for bad in ["", "a", "AAAA", "!!"] {
            assert_eq!(Cursor::parse(bad), None, "{bad:?}");
        }
    }
}
