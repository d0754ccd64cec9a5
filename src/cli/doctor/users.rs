//! Whether each user still has the key that opens what is sealed of them, and whether one that was
//! destroyed is there again.

use std::collections::{BTreeSet, HashMap, HashSet};

use anyhow::Context;

use crate::actors::keyring::Keyring;
use crate::actors::sealing;
use crate::cli::log::{bar, unit};
use crate::domain::ids::UserId;
use crate::log::EventLog;

const PAGE: usize = 1000;

/// What is wrong with the keys of users, by their ids.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// How many keys there are, and how many tombstones.
    pub keys: usize,
    pub erased: usize,
    /// Something of theirs is sealed, and there is neither a key nor a tombstone.
    pub lost: BTreeSet<UserId>,
    /// A key lies beside a tombstone.
    pub returned: BTreeSet<UserId>,
    /// Deleted, and there is a key and no tombstone.
    pub unerased: BTreeSet<UserId>,
    /// There is a tombstone, and the log knows of no deletion.
    pub undeleted: BTreeSet<UserId>,
}

/// Compares the keys with the users that the read model knows, each with whether it was deleted; or,
/// without any, with those of whom the log holds something sealed. In memory there are ids alone.
///
/// # Errors
/// The log or the store cannot be read.
pub async fn look(
    log: &dyn EventLog,
    keyring: &Keyring,
    known: Option<HashMap<UserId, bool>>,
) -> anyhow::Result<Found> {
    let is_from_log = known.is_none();
    let (deleted, mut living): (HashSet<_>, HashSet<_>) = match known {
        Some(known) => {
            let (deleted, living): (Vec<_>, Vec<_>) = known.into_iter().partition(|it| it.1);
            let ids =
                |users: Vec<(UserId, bool)>| users.into_iter().map(|(user, _)| user).collect();
            (ids(deleted), ids(living))
        }
        None => of_log(log, |_| true).await?,
    };
    // After the users, each of whom has a key first; and before the tombstones, which come first too.
    let keys = keyring.users().await.context("listing the keys")?;
    let erased = keyring.erased().await.context("listing the tombstones")?;
    let mut found = Found { keys: keys.len(), erased: erased.len(), ..Found::default() };
    living.retain(|user| !keys.contains(user));
    for user in erased {
        if living.remove(&user) {
            found.undeleted.insert(user.clone());
        }
        // It may have been about to go when it was listed.
        let is_there = keys.contains(&user) && keyring.has_key(&user).await?;
        if is_there {
            found.returned.insert(user);
        }
    }
    let unerased = deleted.into_iter().filter(|user| keys.contains(user));
    found.unerased = unerased.filter(|user| !found.returned.contains(user)).collect();
    if !is_from_log && !found.undeleted.is_empty() {
        // The read model may not have heard of it yet.
        let deleted = of_log(log, |_| false).await?.0;
        found.undeleted.retain(|user| !deleted.contains(user));
    }
    // The read model does not say of whom something is sealed; without a key almost nobody is asked.
    if !is_from_log && !living.is_empty() {
        living = of_log(log, |user| living.contains(user)).await?.1;
    }
    found.lost = living.into_iter().collect();
    Ok(found)
}

/// The users whom the log has deleted, and the others of whom it holds something sealed.
async fn of_log(
    log: &dyn EventLog,
    is_asked: impl Fn(&UserId) -> bool,
) -> anyhow::Result<(HashSet<UserId>, HashSet<UserId>)> {
    let (mut deleted, mut sealed) = (HashSet::new(), HashSet::new());
    let bar = bar("sealed", *log.head().borrow(), unit(log))?;
    let mut after = 0;
    loop {
        let page = log.read_all(after, PAGE).await.context("reading the log")?;
        let Some(last) = page.last() else { break };
        after = last.position;
        bar.set_position(after);
        for event in &page {
            if event.kind.starts_with("user.deleted.") {
                deleted.extend(UserId::try_from(sealing::id_of(&event.stream)));
            } else if let Some(owner) = sealing::owner_of_sealed(&event.stream, &event.data) {
                sealed.extend(Some(owner).filter(&is_asked));
            }
        }
    }
    bar.finish_and_clear();
    sealed.retain(|user| !deleted.contains(user));
    Ok((deleted, sealed))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use chrono::DateTime;

    use super::*;
    use crate::clock::Clock;
    use crate::config::BlobStore;
    use crate::log::{EmbeddedLog, Expected, NewEvent};
    use crate::media::blobs::Blobs;
    use crate::media::vault::MasterKey;

    fn user(id: &str) -> UserId {
        UserId::try_from(id).unwrap()
    }

    fn users<const N: usize>(ids: [&str; N]) -> BTreeSet<UserId> {
        ids.map(user).into()
    }

    async fn append(log: &EmbeddedLog, stream: &str, kind: &str, data: &str) {
        let event = NewEvent {
            id: Clock::system().fresh_id(),
            kind: kind.to_owned(),
            time: DateTime::UNIX_EPOCH,
            data: data.as_bytes().to_vec(),
            metadata: b"{}".to_vec(),
        };
        log.append(stream, Expected::Any, vec![event]).await.unwrap();
    }

    /// Ada and Bob with something sealed, Eve in clear; Gone, whom the log has deleted.
    async fn lived_in(dir: &Path) -> (EmbeddedLog, Keyring) {
        let log = EmbeddedLog::open(&dir.join("log.sqlite")).unwrap();
        let sealed = r#"{"email":{"sealed":"AAAA"}}"#;
        let of_bob = r#"{"user_id":"user_bob","request":{"prompt":{"sealed":"AAAA"}}}"#;
        append(&log, "user-user_ada", "user.registered.v1", sealed).await;
        append(&log, "job-1", "job.requested.v1", of_bob).await;
        append(&log, "user-user_eve", "user.registered.v1", r#"{"email":"sealed"}"#).await;
        append(&log, "user-user_gone", "user.registered.v1", sealed).await;
        append(&log, "user-user_gone", "user.deleted.v1", "{}").await;
        let blobs = Blobs::open(&BlobStore::File, dir).unwrap();
        (log, Keyring::new(&blobs, MasterKey::kept_in(&dir.join("master.key"))))
    }

    #[tokio::test]
    async fn lost_keys_are_told_from_destroyed_ones_and_from_what_needs_none() {
        let dir = tempfile::tempdir().unwrap();
        let (log, keyring) = lived_in(dir.path()).await;
        for id in ["user_ada", "user_bob"] {
            keyring.of(&user(id)).await.unwrap();
        }
        let living = ["user_ada", "user_bob", "user_eve"].map(|id| (user(id), false));
        let known = HashMap::from(living).into_iter().chain([(user("user_gone"), true)]);
        let known: HashMap<_, _> = known.collect();
        for known in [Some(known.clone()), None] {
            let found = look(&log, &keyring, known).await.unwrap();
            assert_eq!(found, Found { keys: 2, ..Found::default() });
        }
        std::fs::remove_file(dir.path().join("blobs/keys/user_ada")).unwrap();
        keyring.destroy(&user("user_bob"), DateTime::UNIX_EPOCH).await.unwrap();
        let lost = Found {
            erased: 1,
            lost: users(["user_ada"]),
            undeleted: users(["user_bob"]),
            ..Found::default()
        };
        for known in [Some(known), None] {
            assert_eq!(look(&log, &keyring, known).await.unwrap(), lost);
        }
    }

    #[tokio::test]
    async fn a_destroyed_key_that_is_there_again_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let (log, keyring) = lived_in(dir.path()).await;
        let ids = ["user_ada", "user_bob", "user_gone"];
        for id in ids {
            keyring.of(&user(id)).await.unwrap();
        }
        let path = dir.path().join("blobs/keys/user_bob");
        let backup = std::fs::read(&path).unwrap();
        keyring.destroy(&user("user_bob"), DateTime::UNIX_EPOCH).await.unwrap();
        std::fs::write(&path, backup).unwrap();
        let returned = Found {
            keys: 3,
            erased: 1,
            returned: users(["user_bob"]),
            unerased: users(["user_gone"]),
            ..Found::default()
        };
        let known = ids.map(|id| (user(id), id == "user_gone"));
        for known in [Some(HashMap::from(known)), None] {
            assert_eq!(look(&log, &keyring, known).await.unwrap(), returned);
        }
    }
}
