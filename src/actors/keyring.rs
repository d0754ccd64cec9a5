//! A key for every user, which seals what is personal of that user in the log. To destroy the key
//! is to erase all of it, in every copy of the log; a tombstone says that this was meant.
//!
//! The tombstone comes first and outlives the key: a key that is missing without one was lost, not
//! destroyed, and whatever needs it fails rather than pass for erased.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use chrono::{DateTime, SecondsFormat, Utc};
use foldhash::fast::RandomState;
use futures_util::{StreamExt, TryStreamExt, stream};
use serde_json::{Value, json};

use super::codec::{self, AnyEvent};
use super::sealing::{self, Holding};
use crate::domain::Aggregate;
use crate::domain::ids::UserId;
use crate::domain::text::Visit;
use crate::log::Recorded;
use crate::media::blobs::{self, Blobs};
use crate::media::documents::Documents;
use crate::media::vault::{self, KEY_BYTES, MasterKey, SealingKey, Vault};

/// Where the keys lie in the object store, and where the tombstones.
pub const KEYS: &str = "keys";
pub const TOMBSTONES: &str = "erased";
/// What is sealed to recognise the master key by, and where it lies.
pub const MARK: &str = "master-mark";
/// Unsealed keys kept in memory: some ten megabytes.
const MOST: usize = 16_384;
/// Keys read from the store at a time.
const AT_A_TIME: usize = 32;

/// All users' keys; clones share what they know.
#[derive(Clone)]
pub struct Keyring {
    vault: Vault,
    /// Holds [`MARK`] alone.
    mark: Vault,
    tombstones: Documents,
    known: Arc<Mutex<Known>>,
}

/// Why a key cannot be used now. What lies in the log for ever is a [`codec::Error`] instead.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the keys of users: {0}")]
    Vault(#[from] vault::Error),
    #[error("the key of the user {0}: {1}")]
    Key(UserId, vault::Error),
    #[error("the tombstones of users: {0}")]
    Store(#[from] blobs::Error),
    #[error(transparent)]
    Codec(#[from] codec::Error),
}

/// How a kind of events is read.
struct Form<E> {
    parse: fn(&Recorded) -> Result<E, codec::Error>,
    personal: fn(&mut E, Visit<'_>),
    owner: fn(&Recorded, &E) -> Option<UserId>,
}

/// What became of a destruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Destroyed {
    /// There was no tombstone yet.
    pub tombstone: bool,
    /// There was a key.
    pub key: bool,
}

/// Second chance: those not asked for since the last clearing go first.
#[derive(Default)]
struct Known(HashMap<UserId, (Holding, bool), RandomState>);

impl Keyring {
    pub fn new(blobs: &Blobs, master: MasterKey) -> Self {
        let mark = Vault::new(blobs, MARK, master.clone());
        let vault = Vault::new(blobs, KEYS, master);
        Self { vault, mark, tombstones: blobs.documents(TOMBSTONES), known: Arc::default() }
    }

    /// Whether the master key is the one under which the users' keys lie. Where there are none yet,
    /// the first `of_several` nodes leaves a mark by which the others see whether theirs is the same.
    ///
    /// # Errors
    /// The store or the master key cannot be read.
    pub async fn is_ours(&self, of_several: bool) -> Result<bool, Error> {
        if let Some(is_ours) = self.vault.is_ours().await? {
            return Ok(is_ours);
        }
        if !of_several {
            return Ok(true);
        }
        self.mark.create(MARK, &[]).await?;
        Ok(self.mark.is_ours().await?.unwrap_or(true))
    }

    /// What another master key has sealed says nothing of the next one.
    ///
    /// # Errors
    /// The store does not take it.
    pub async fn forget_mark(&self) -> Result<(), Error> {
        Ok(self.mark.destroy(MARK).await?)
    }

    /// The type and data of an event as they are to be stored. A user's first event makes the key,
    /// which is durable before the event is.
    ///
    /// # Errors
    /// The key cannot be read or made.
    pub async fn encode<A: Aggregate>(
        &self,
        stream: &str,
        event: &A::Event,
    ) -> Result<(String, Vec<u8>), Error> {
        let (kind, data) = codec::encode::<A>(event)?;
        let mut sealed = event.clone();
        let Some(owner) = sealing::owner_of::<A>(stream, &mut sealed)? else {
            return Ok((kind, data));
        };
        let holding = self.of(&owner).await?;
        sealing::seal(&holding, stream, &kind, |visit| A::personal(&mut sealed, visit))?;
        Ok(codec::encode::<A>(&sealed)?)
    }

    /// The events of one entity's records, opened, up to the first that cannot be read; and why it
    /// cannot.
    ///
    /// # Errors
    /// Keys cannot be read at present.
    pub async fn decode<A: Aggregate>(
        &self,
        records: &[Recorded],
    ) -> Result<(Vec<A::Event>, Option<codec::Error>), Error> {
        let form = Form::<A::Event> {
            parse: |record| codec::decode::<A>(&record.kind, &record.data),
            personal: A::personal,
            owner: |record, event| A::owner(sealing::id_of(&record.stream), event),
        };
        let mut events = Vec::with_capacity(records.len());
        for event in self.decode_as(&form, records).await? {
            match event {
                Ok(event) => events.push(event),
                Err(error) => return Ok((events, Some(error))),
            }
        }
        Ok((events, None))
    }

    /// The events of records of any entities, each opened, or why it cannot be read.
    ///
    /// # Errors
    /// Keys cannot be read at present.
    pub async fn decode_each(
        &self,
        records: &[Recorded],
    ) -> Result<Vec<Result<AnyEvent, codec::Error>>, Error> {
        let form = Form {
            parse: |record| codec::decode_any(&record.stream, &record.kind, &record.data),
            personal: AnyEvent::personal,
            owner: |_, event: &AnyEvent| event.owner(),
        };
        self.decode_as(&form, records).await
    }

    /// In three passes, so that the keys of a batch are read at once and the rest never waits.
    async fn decode_as<E>(
        &self,
        form: &Form<E>,
        records: &[Recorded],
    ) -> Result<Vec<Result<E, codec::Error>>, Error> {
        let mut events: Vec<_> = records.iter().map(form.parse).collect();
        let (mut sealed, mut owners) = (vec![], HashSet::new());
        for (index, (record, event)) in records.iter().zip(&mut events).enumerate() {
            let Ok(event) = event else { continue };
            let mut is_sealed = false;
            (form.personal)(event, &mut |_, field| is_sealed |= field.sealed().is_some());
            if is_sealed {
                let owner = (form.owner)(record, event);
                owners.extend(owner.clone());
                sealed.push((index, owner));
            }
        }
        if sealed.is_empty() {
            return Ok(events);
        }
        let holdings = self.find_all(owners).await?;
        for (index, owner) in sealed {
            let Recorded { stream, kind, .. } = &records[index];
            let Ok(event) = &mut events[index] else { continue };
            let opened = match owner.as_ref().and_then(|owner| holdings.get(owner)) {
                Some(Ok(key)) => sealing::open(key, stream, kind, |it| (form.personal)(event, it)),
                Some(Err(damaged)) => Err(damaged.clone()),
                None => Err(codec::Error::NoKey(owner.map_or_else(String::new, String::from))),
            };
            if let Err(error) = opened {
                events[index] = Err(error);
            }
        }
        Ok(events)
    }

    /// A record's data for display: what is personal is opened as far as its key is there.
    ///
    /// # Errors
    /// The key cannot be read at present. Data that is no JSON is shown as text.
    pub async fn open_json(&self, stream: &str, kind: &str, data: &[u8]) -> Result<Value, Error> {
        let Ok(mut value) = serde_json::from_slice(data) else {
            return Ok(Value::String(String::from_utf8_lossy(data).into_owned()));
        };
        if let Some(owner) = sealing::owner_in_json(stream, &value)
            && let Some(holding) = self.find(&owner).await?
        {
            sealing::open_json(&holding, stream, kind, &mut value);
        }
        Ok(value)
    }

    /// A user's key, made if there is none.
    ///
    /// # Errors
    /// It cannot be read, made or kept.
    pub async fn of(&self, user: &UserId) -> Result<Holding, Error> {
        if let Some(found) = self.find(user).await? {
            // It is to seal more, and may be what an attempt to make it has left that failed.
            self.vault.settle().await?;
            return Ok(found);
        }
        let mut key = [0; KEY_BYTES];
        aws_lc_rs::rand::fill(&mut key).map_err(|_| vault::Error::Cipher)?;
        self.vault.create(&name_of(user), &key).await?;
        // Somebody may have destroyed it before it was made: then the tombstone stands.
        if self.is_erased(user).await? {
            self.vault.destroy(&name_of(user)).await?;
        }
        // Another process may have made another one first.
        self.find(user).await?.ok_or_else(|| codec::Error::NoKey(user.to_string()).into())
    }

    /// What there is of a user's key; none if there never was one, or it was lost.
    ///
    /// # Errors
    /// It cannot be read at present, or not be opened: [`codec::Error::DamagedKey`] if others can.
    pub async fn find(&self, user: &UserId) -> Result<Option<Holding>, Error> {
        if let Some(known) = self.known().get(user) {
            return Ok(Some(known));
        }
        let key = self.vault.open(&name_of(user)).await;
        let holding = match key {
            // Asked after the key. One beside a tombstone is about to go; and it may be another than
            // the events were sealed with, made too late by somebody who did not know yet.
            _ if self.is_erased(user).await? => Holding::Erased,
            Ok(Some(key)) => {
                let bad = |_| Error::Key(user.clone(), vault::Error::BadKey);
                Holding::Key(SealingKey::new(&key.try_into().map_err(bad)?)?)
            }
            Ok(None) => return Ok(None),
            // Under another master key, which may come yet, none of the others opens either.
            Err(vault::Error::Unopenable) if self.vault.is_ours().await? == Some(true) => {
                return Err(codec::Error::DamagedKey(user.to_string()).into());
            }
            Err(error) => return Err(Error::Key(user.clone(), error)),
        };
        self.known().keep(user, &holding);
        Ok(Some(holding))
    }

    /// Destroys a user's key for ever, and leaves a tombstone that says when. May be repeated.
    ///
    /// # Errors
    /// The store does not take it; what was done until then stands.
    pub async fn destroy(&self, user: &UserId, now: DateTime<Utc>) -> Result<Destroyed, Error> {
        let note = json!({ "erased_at": now.to_rfc3339_opts(SecondsFormat::Secs, true) });
        let name = name_of(user);
        // Asked first, because that is cheaper where it is repeated after each start.
        let tombstone = !self.is_erased(user).await?
            && self.tombstones.create(&name, note.to_string().into_bytes()).await?;
        self.tombstones.settle().await?;
        let key = self.bury(user).await?;
        Ok(Destroyed { tombstone, key })
    }

    /// Removes the key of a user who has a tombstone, and says whether there was one.
    ///
    /// # Errors
    /// The store does not take it.
    pub async fn bury(&self, user: &UserId) -> Result<bool, Error> {
        let name = name_of(user);
        let key = self.vault.holds(&name).await?;
        if key {
            self.vault.destroy(&name).await?;
        } else {
            // A copy of it that a crash left opens all the same.
            self.vault.forget_unfinished(&name).await?;
        }
        self.known().keep(user, &Holding::Erased);
        Ok(key)
    }

    /// Whether there is a user's key or tombstone; the key is not opened.
    ///
    /// # Errors
    /// The store cannot be read.
    pub async fn holds(&self, user: &UserId) -> Result<bool, Error> {
        Ok(self.has_key(user).await? || self.is_erased(user).await?)
    }

    /// Whether there is a user's key; it is not opened.
    ///
    /// # Errors
    /// The store cannot be read.
    pub async fn has_key(&self, user: &UserId) -> Result<bool, Error> {
        Ok(self.vault.holds(&name_of(user)).await?)
    }

    /// All users who have a key.
    ///
    /// # Errors
    /// The store cannot be listed.
    pub async fn users(&self) -> Result<HashSet<UserId>, Error> {
        let listed = self.vault.list().await?;
        Ok(listed.iter().filter_map(|document| user_of(&document.name)).collect())
    }

    /// Whether there is a user's tombstone.
    ///
    /// # Errors
    /// The store cannot be read.
    pub async fn is_erased(&self, user: &UserId) -> Result<bool, Error> {
        Ok(self.tombstones.get(&name_of(user)).await?.is_some())
    }

    /// All users who have a tombstone.
    ///
    /// # Errors
    /// The store cannot be listed.
    pub async fn erased(&self) -> Result<Vec<UserId>, Error> {
        let listed = self.tombstones.list().await?;
        Ok(listed.iter().filter_map(|document| user_of(&document.name)).collect())
    }

    /// Those of the users for whom there is something to find, be it damaged.
    async fn find_all(
        &self,
        users: HashSet<UserId>,
    ) -> Result<HashMap<UserId, Result<Holding, codec::Error>>, Error> {
        let (mut found, mut missing) = (HashMap::with_capacity(users.len()), vec![]);
        {
            let mut known = self.known();
            for user in users {
                match known.get(&user) {
                    Some(holding) => drop(found.insert(user, Ok(holding))),
                    None => missing.push(user),
                }
            }
        }
        // In an order that does not change from one run to the next: a simulation repeats itself.
        missing.sort_unstable();
        let read = stream::iter(missing).map(async |user| match self.find(&user).await {
            Ok(holding) => Ok(holding.map(|holding| (user, Ok(holding)))),
            Err(Error::Codec(damaged)) => Ok(Some((user, Err(damaged)))),
            Err(error) => Err(error),
        });
        let read: Vec<_> = read.buffer_unordered(AT_A_TIME).try_collect().await?;
        found.extend(read.into_iter().flatten());
        Ok(found)
    }

    /// A panic elsewhere leaves no half-done change behind.
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn get(&mut self, user: &UserId) -> Option<Holding> {
        let (holding, recent) = self.0.get_mut(user)?;
        *recent = true;
        Some(holding.clone())
    }

    fn keep(&mut self, user: &UserId, holding: &Holding) {
        if self.0.len() >= MOST {
            self.0.retain(|_, (_, recent)| std::mem::take(recent));
            if self.0.len() >= MOST {
                self.0.clear();
            }
        }
        // One that read the key before it was destroyed must not bring it back.
        let place = self.0.entry(user.clone()).or_insert_with(|| (holding.clone(), true));
        if matches!(holding, Holding::Erased) {
            *place = (Holding::Erased, true);
        }
    }
}

/// As long as the id, and a file name everywhere: the store would write `|` and a lone dot in a way
/// of its own, which a listing does not undo. Neither `=` nor `+` is part of an id.
fn name_of(user: &UserId) -> String {
    let name = user.as_str().replace('|', "=");
    match name.strip_prefix('.') {
        Some(rest) => format!("+{rest}"),
        None => name,
    }
}

/// The name of a user's documents: of its id, or of what is such a name already.
pub fn document_of(user: &str) -> Option<String> {
    match UserId::try_from(user.to_owned()) {
        Ok(id) => Some(name_of(&id)),
        Err(_) => user_of(user).map(|id| name_of(&id)).filter(|name| name == user),
    }
}

/// The user whose key, or whose tombstone, is called so.
pub fn user_of(name: &str) -> Option<UserId> {
    let id = match name.strip_prefix('+') {
        Some(rest) => format!(".{rest}"),
        None => name.to_owned(),
    };
    UserId::try_from(id.replace('=', "|")).ok()
}

#[cfg(test)]
#[path = "keyring_tests.rs"]
mod tests;
