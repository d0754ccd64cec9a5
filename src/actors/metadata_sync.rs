//! Brings what is decided here to Clerk: a user's access, flags, organization and onboarding into
//! its `public_metadata`, and the end of a session.
//!
//! It looks at what should be (the read model) and at what is (Clerk), and sends the difference;
//! the log only says where to look. How far it has come is kept in a file of its own, so that a
//! rebuilt read model makes it send nothing again, and a crash makes it look again at what it had
//! not finished: at least once, which is harmless.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use actix::Arbiter;
use futures_util::{StreamExt, stream};
use tokio::sync::watch;

use super::System;
use super::codec::{self, AnyEvent, Metadata, Source};
use crate::clerk::api::{AT_ONCE, Api, Error};
use crate::clerk::metadata::{Part, Wanted};
use crate::domain::ids::{SessionId, UserId};
use crate::domain::session::{self, EndReason};
use crate::domain::user;
use crate::log::{self, EventLog, Recorded};
use crate::views::{UserRow, Views};

/// Events read at once.
const PAGE: usize = 1000;
/// Things waiting to be sent at which no more events are read.
const MOST_PENDING: usize = 10_000;
/// How long it lets changes gather after the first, so that one request carries several.
const GATHER: Duration = Duration::from_millis(50);
/// How long it waits after Clerk could not be reached; the client has been patient before.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const MAX_PAUSE: Duration = Duration::from_secs(60);
/// What provisioning appends at the most: the registration, access, attributes, flags, an
/// organization in each of the forms in which a token can name one, and the onboarding.
const PROVISIONING: u64 = 8;

/// Starts following the log, on a thread of its own, until `stopping` says true.
pub fn start(
    system: Arc<System>,
    api: Arc<Api>,
    checkpoint: PathBuf,
    mut stopping: watch::Receiver<bool>,
) {
    Arbiter::new().spawn_fn(move || {
        let (log, views) = (Arc::clone(&system.log), system.views.clone());
        let sync = MetadataSync::open(log, views, api, checkpoint);
        actix::spawn(async move {
            // What is cut off here is looked at again after the next start.
            tokio::select! {
                () = follow(sync, &system) => {}
                _ = stopping.wait_for(|stopping| *stopping) => {}
            }
        });
    });
}

async fn follow(mut sync: MetadataSync, system: &System) {
    let mut progress = system.progress.clone();
    let mut pause = FIRST_PAUSE;
    loop {
        // What the read model has not taken in yet cannot be sent.
        let until = progress.now().position;
        match sync.look(until).await {
            Ok(Looked::AllSent) => {
                pause = FIRST_PAUSE;
                progress.moved().await;
                tokio::time::sleep(GATHER).await;
                continue;
            }
            Ok(Looked::MoreToRead) => continue,
            Ok(Looked::NotAllSent(error)) => {
                let waiting = sync.pending.len();
                tracing::warn!(%error, waiting, "not everything could be sent to Clerk; trying again");
            }
            Err(error) => tracing::error!(%error, "changes could not be sent to Clerk"),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(MAX_PAUSE);
    }
}

/// What came of a look.
#[derive(Debug, PartialEq, Eq)]
pub enum Looked {
    AllSent,
    MoreToRead,
    /// Some of it waits, for this reason.
    NotAllSent(Error),
}

/// Why a look was broken off; nothing is lost by it.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error(transparent)]
    Log(#[from] log::Error),
    #[error("keeping the position of what was sent: {0}")]
    Checkpoint(#[from] std::io::Error),
}

/// What may have to be sent.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Target {
    User(UserId),
    Session(SessionId),
}

struct Pending {
    /// Where the first event lies that is not sent yet; the checkpoint stays before it.
    since: u64,
    /// Of a user's metadata.
    parts: BTreeSet<Part>,
}

/// The way from the log to Clerk.
pub struct MetadataSync {
    log: Arc<dyn EventLog>,
    views: Views,
    api: Arc<Api>,
    path: PathBuf,
    /// As it is on disk.
    checkpoint: u64,
    /// Up to where events were read.
    read: u64,
    pending: BTreeMap<Target, Pending>,
    /// Whether anything was sent or given up since the checkpoint was kept.
    settled: bool,
}

impl MetadataSync {
    /// Begins where the last one ended; at the start of the log when that is not known, which sends
    /// nothing that Clerk has already.
    pub fn open(log: Arc<dyn EventLog>, views: Views, api: Arc<Api>, path: PathBuf) -> Self {
        let head = *log.head().borrow();
        let kept = std::fs::read_to_string(&path).ok().and_then(|text| text.trim().parse().ok());
        // Beyond the head: the log was exchanged for another one.
        let checkpoint = kept.filter(|position| *position <= head).unwrap_or(0);
        let pending = BTreeMap::new();
        Self { log, views, api, path, checkpoint, read: checkpoint, pending, settled: false }
    }

    /// Up to where everything was sent.
    pub fn checkpoint(&self) -> u64 {
        self.checkpoint
    }

    /// Reads on to `until`, a page at the most, and sends what waits.
    ///
    /// # Errors
    /// [`Failure`]; what Clerk could not take is no failure, it stays for the next look.
    pub async fn look(&mut self, until: u64) -> Result<Looked, Failure> {
        self.read_on(until).await?;
        let unsent = self.send_pending().await;
        self.keep_checkpoint()?;
        Ok(match unsent {
            Some(error) => Looked::NotAllSent(error),
            None if self.read < until => Looked::MoreToRead,
            None => Looked::AllSent,
        })
    }

    async fn read_on(&mut self, until: u64) -> Result<(), Failure> {
        if self.read >= until || self.pending.len() >= MOST_PENDING {
            return Ok(());
        }
        let page = self.log.read_all(self.read, PAGE).await?;
        for recorded in page.iter().take_while(|recorded| recorded.position <= until) {
            if let Some((target, part)) = self.concerns(recorded).await? {
                let fresh = Pending { since: recorded.position, parts: BTreeSet::new() };
                self.pending.entry(target).or_insert(fresh).parts.extend(part);
            }
            self.read = recorded.position;
        }
        if page.len() < PAGE {
            self.read = self.read.max(until);
        }
        Ok(())
    }

    /// What an event asks to be looked at, if it was decided here.
    async fn concerns(
        &self,
        recorded: &Recorded,
    ) -> Result<Option<(Target, Option<Part>)>, Failure> {
        if !was_decided_here(recorded) {
            return Ok(None);
        }
        let Ok(event) = codec::decode_any(&recorded.stream, &recorded.kind, &recorded.data) else {
            // Its view is parked and says so; what it asks of Clerk waits for `t2m clerk sync`.
            return Ok(None);
        };
        let concerns = match event {
            AnyEvent::User(id, event) => part_of(&event).map(|part| (Target::User(id), Some(part))),
            AnyEvent::Session(id, event) => {
                ends_at_clerk(&id, &event).then_some((Target::Session(id), None))
            }
            AnyEvent::File(..) | AnyEvent::Job(..) => None,
        };
        if concerns.is_some() && self.is_provisioning(recorded).await? {
            return Ok(None);
        }
        Ok(concerns)
    }

    /// What a token's claims brought is Clerk's own word, and perhaps an old one.
    async fn is_provisioning(&self, recorded: &Recorded) -> Result<bool, Failure> {
        if recorded.revision >= PROVISIONING || codec::category(&recorded.stream) != "user" {
            return Ok(false);
        }
        let first = self.log.read_stream(&recorded.stream, 0, 1).await?;
        // One append: the same instant and the same request.
        Ok(first.first().is_some_and(|first| {
            first.time == recorded.time
                && first.metadata == recorded.metadata
                && first.revision < recorded.revision
        }))
    }

    /// Sends what waits, at most [`AT_ONCE`] at a time; the reason when some of it could not be sent.
    async fn send_pending(&mut self) -> Option<Error> {
        let (api, views) = (&self.api, &self.views);
        let sending = self.pending.iter().map(|(target, pending)| async move {
            let sent = match target {
                Target::User(id) => send_user(api, views, id, &pending.parts).await,
                Target::Session(id) => api.revoke_session(id.as_str()).await,
            };
            (target.clone(), sent)
        });
        let sent: Vec<_> = stream::iter(sending).buffer_unordered(AT_ONCE).collect().await;
        let mut unsent = None;
        for (target, outcome) in sent {
            match outcome {
                Err(error) if !error.is_final() => {
                    unsent = Some(error);
                    continue;
                }
                Err(error) => tracing::warn!(?target, %error, "a change is not sent to Clerk"),
                Ok(()) => {}
            }
            self.pending.remove(&target);
            self.settled = true;
        }
        unsent
    }

    /// To read events anew that concern nobody costs less than to sync a file after each of them.
    fn keep_checkpoint(&mut self) -> Result<(), Failure> {
        let first = self.pending.values().map(|pending| pending.since).min();
        let position = first.map_or(self.read, |first| first - 1);
        let enough = self.settled || position >= self.checkpoint + PAGE as u64;
        if enough && position > self.checkpoint {
            replace(&self.path, &position.to_string())?;
            self.checkpoint = position;
            self.settled = false;
        }
        Ok(())
    }
}

fn was_decided_here(recorded: &Recorded) -> bool {
    if !matches!(codec::category(&recorded.stream), "user" | "session") {
        return false;
    }
    serde_json::from_slice::<Metadata>(&recorded.metadata)
        .is_ok_and(|metadata| matches!(metadata.source, Source::Api | Source::System))
}

fn part_of(event: &user::Event) -> Option<Part> {
    match event {
        user::Event::AccessChanged { .. } => Some(Part::Access),
        user::Event::AttributesChanged { .. } => Some(Part::UserType),
        user::Event::FlagsChanged { .. } => Some(Part::Flags),
        user::Event::OrganizationJoined { .. }
        | user::Event::OrganizationRoleChanged { .. }
        | user::Event::OrganizationLeft { .. } => Some(Part::Organization),
        user::Event::OnboardingProgressed { .. } => Some(Part::Onboarding),
        user::Event::Registered { .. }
        | user::Event::ProfileChanged { .. }
        | user::Event::Banned {}
        | user::Event::Unbanned {}
        | user::Event::Deleted {} => None,
    }
}

/// A session that a person ended here must mint no more tokens. One that merely lapsed here may be
/// of use to other applications of the same Clerk instance.
fn ends_at_clerk(id: &SessionId, event: &session::Event) -> bool {
    let by_a_person = |reason| matches!(reason, EndReason::Revoked | EndReason::SignedOut);
    // Others are ours, made for tokens that name no session.
    id.as_str().starts_with("sess_")
        && matches!(event, session::Event::Ended { reason, .. } if by_a_person(*reason))
}

async fn send_user(
    api: &Api,
    views: &Views,
    user_id: &UserId,
    parts: &BTreeSet<Part>,
) -> Result<(), Error> {
    let row = views.user(user_id).map_err(|error| Error::Unreachable(error.to_string()))?;
    match row.filter(|row| !row.deleted) {
        Some(row) => send_difference(api, user_id, &wanted(row), parts).await.map(drop),
        None => Ok(()),
    }
}

/// Makes `parts` of the metadata at Clerk as `wanted`; false when they were so already.
///
/// # Errors
/// What the API answers.
pub async fn send_difference(
    api: &Api,
    user_id: &UserId,
    wanted: &Wanted,
    parts: &BTreeSet<Part>,
) -> Result<bool, Error> {
    let there = api.user(user_id.as_str()).await?;
    let patch = wanted.difference(parts, &there.public_metadata);
    if patch.is_empty() {
        return Ok(false);
    }
    api.merge_metadata(user_id.as_str(), patch).await?;
    Ok(true)
}

fn wanted(row: UserRow) -> Wanted {
    let access = user::Access {
        role: row.role,
        permissions: row.permissions,
        subscription_tier: row.subscription_tier,
    };
    Wanted {
        access,
        user_type: row.user_type,
        feature_flags: row.feature_flags,
        // Clerk's ids of memberships sort by their age.
        organization: row
            .organizations
            .into_iter()
            .filter(|membership| !membership.is_claimed())
            .min_by(|a, b| a.membership_id.cmp(&b.membership_id)),
        onboarding: row.onboarding,
    }
}

/// All of the new content or all of the old, whatever happens meanwhile.
pub(super) fn replace(path: &Path, text: &str) -> std::io::Result<()> {
    let unfinished = path.with_extension("new");
    let mut file = std::fs::File::create(&unfinished)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&unfinished, path)?;
    match path.parent() {
        // The rename itself is durable only then.
        Some(directory) => std::fs::File::open(directory)?.sync_all(),
        None => Ok(()),
    }
}
