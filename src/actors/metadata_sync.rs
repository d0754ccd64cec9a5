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
use super::projector::Reached;
use super::supervise::supervise;
use crate::clerk::api::{AT_ONCE, Api, Error};
use crate::clerk::metadata::{Part, Wanted};
use crate::domain::ids::{SessionId, UserId};
use crate::domain::session::{self, EndReason};
use crate::domain::user::{self, Right};
use crate::log::{self, EventLog, Recorded};
use crate::views::{UserRow, View, Views};

/// Events read at once.
const PAGE: usize = 1000;
/// Things waiting to be sent at which no more events are read.
const MOST_PENDING: usize = 10_000;
/// How long it lets changes gather after the first, so that one request carries several.
const GATHER: Duration = Duration::from_millis(50);
/// How long it waits after Clerk could not be reached; the client has been patient before.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const MAX_PAUSE: Duration = Duration::from_secs(60);
/// Starts following the log, on a thread of its own, until `stopping` says true.
pub fn start(
    system: Arc<System>,
    api: Arc<Api>,
    checkpoint: PathBuf,
    mut stopping: watch::Receiver<bool>,
) {
    Arbiter::new().spawn_fn(move || {
        let begin = move || {
            let (log, views) = (Arc::clone(&system.log), system.views.clone());
            let sync = MetadataSync::open(log, views, Arc::clone(&api), checkpoint.clone());
            follow(sync, Arc::clone(&system))
        };
        actix::spawn(async move {
            // What is cut off here is looked at again after the next start.
            tokio::select! {
                () = supervise("metadata_sync", begin) => {}
                _ = stopping.wait_for(|stopping| *stopping) => {}
            }
        });
    });
}

async fn follow(mut sync: MetadataSync, system: Arc<System>) {
    let mut progress = system.progress.clone();
    let mut pause = FIRST_PAUSE;
    loop {
        let until = shown(&progress.now());
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

/// Up to where the read model shows what was decided; what it has not taken in cannot be sent.
fn shown(reached: &Reached) -> u64 {
    let parked = reached.parked.iter().filter(|parked| parked.view == View::Users);
    parked.map(|parked| parked.position.saturating_sub(1)).min().unwrap_or(reached.position)
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
            if let Some((target, parts)) = concerns(recorded) {
                let fresh = Pending { since: recorded.position, parts: BTreeSet::new() };
                self.pending.entry(target).or_insert(fresh).parts.extend(parts);
            }
            self.read = recorded.position;
        }
        if page.len() < PAGE {
            self.read = self.read.max(until);
        }
        Ok(())
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

/// What an event asks to be looked at, if it was decided here; of a user, the parts of its metadata.
fn concerns(recorded: &Recorded) -> Option<(Target, BTreeSet<Part>)> {
    if !was_decided_here(recorded) {
        return None;
    }
    // One that cannot be decoded has its view parked, which says so; what it asks of Clerk waits for
    // `t2m clerk sync`.
    match codec::decode_any(&recorded.stream, &recorded.kind, &recorded.data).ok()? {
        AnyEvent::User(id, event) => {
            let parts = parts_of(event);
            (!parts.is_empty()).then_some((Target::User(id), parts))
        }
        AnyEvent::Session(id, event) => {
            ends_at_clerk(&id, &event).then_some((Target::Session(id), BTreeSet::new()))
        }
        AnyEvent::File(..) | AnyEvent::Job(..) => None,
    }
}

fn was_decided_here(recorded: &Recorded) -> bool {
    if !matches!(codec::category(&recorded.stream), "user" | "session") {
        return false;
    }
    serde_json::from_slice::<Metadata>(&recorded.metadata)
        .is_ok_and(|metadata| matches!(metadata.source, Source::Api | Source::System))
}

/// What an event decides. What a token's claims brought is Clerk's own word, and perhaps an old one:
/// nothing says when it was decided, and its membership is one that is claimed.
fn parts_of(event: user::Event) -> BTreeSet<Part> {
    match event {
        user::Event::AccessChanged { decided_at: Some(_), decided, .. } => {
            // Which of them an older event decided, the read model knows.
            let rights = decided.unwrap_or_else(|| Right::ALL.into());
            rights.into_iter().map(Part::Access).collect()
        }
        user::Event::AttributesChanged { decided_at: Some(_), .. } => [Part::UserType].into(),
        user::Event::FlagsChanged { decided_at: Some(_), .. } => [Part::Flags].into(),
        user::Event::OnboardingProgressed { decided_at: Some(_), .. } => [Part::Onboarding].into(),
        user::Event::OrganizationJoined { membership, .. } if membership.is_claimed() => {
            BTreeSet::new()
        }
        user::Event::OrganizationJoined { .. }
        | user::Event::OrganizationRoleChanged { .. }
        | user::Event::OrganizationLeft { .. } => [Part::Organization].into(),
        user::Event::AccessChanged { decided_at: None, .. }
        | user::Event::AttributesChanged { decided_at: None, .. }
        | user::Event::FlagsChanged { decided_at: None, .. }
        | user::Event::OnboardingProgressed { decided_at: None, .. }
        | user::Event::Registered { .. }
        | user::Event::ProfileChanged { .. }
        | user::Event::Banned {}
        | user::Event::Unbanned {}
        | user::Event::Deleted {} => BTreeSet::new(),
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

/// Makes `parts` of a user's metadata at Clerk as they are here; a right only if Clerk has not spoken
/// on it since it was decided.
async fn send_user(
    api: &Api,
    views: &Views,
    user_id: &UserId,
    parts: &BTreeSet<Part>,
) -> Result<(), Error> {
    let decided = || -> Result<_, Error> {
        let row = views.user(user_id).map_err(|error| Error::Unreachable(error.to_string()))?;
        let Some(row) = row.filter(|row| !row.deleted) else { return Ok(None) };
        let Some(standing) = views.user_standing(user_id) else { return Ok(None) };
        let parts = still_decided(parts, &standing.decided_here.rights);
        Ok((!parts.is_empty()).then(|| (wanted(row), parts)))
    };
    if decided()?.is_none() {
        return Ok(());
    }
    let there = api.user(user_id.as_str()).await?.public_metadata;
    // Anew: Clerk has taken its time, and a decision that was replaced meanwhile is not sent.
    let Some((wanted, mut parts)) = decided()? else { return Ok(()) };
    if wanted.undoes_completion(&there) {
        parts.remove(&Part::Onboarding);
    }
    let patch = wanted.difference(&parts, &there);
    if patch.is_empty() { Ok(()) } else { api.merge_metadata(user_id.as_str(), patch).await }
}

fn still_decided(parts: &BTreeSet<Part>, here: &BTreeSet<Right>) -> BTreeSet<Part> {
    let holds = |part: &&Part| match part {
        Part::Access(right) => here.contains(right),
        Part::UserType | Part::Flags | Part::Organization | Part::Onboarding => true,
    };
    parts.iter().filter(holds).copied().collect()
}

fn wanted(row: UserRow) -> Wanted {
    Wanted {
        access: row.access(),
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

/// Makes whoever follows a log from now on begin behind `position`: what was decided before is sent no
/// more. Where the log has lost events, what Clerk said in them would be overruled.
///
/// # Errors
/// It cannot be kept.
pub fn count_as_sent(path: &Path, position: u64) -> std::io::Result<()> {
    replace(path, &position.to_string())
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

#[cfg(test)]
mod tests {
    use chrono::{DateTime, Utc};

    use super::*;
    use crate::domain::Aggregate;
    use crate::domain::user::{
        Access, AccessChange, Claims, Command, Membership, Onboarding, OnboardingStatus, Snapshot,
        Told, User,
    };
    use crate::views::Parked;

    fn told() -> Told {
        Told {
            role: Some("creator".to_owned()),
            user_type: Some("seller".to_owned()),
            feature_flags: Some([("beta".to_owned(), true)].into()),
            ..Told::default()
        }
    }

    fn parts_after(user: &User, command: &Command) -> BTreeSet<Part> {
        let events = user.decide(command, DateTime::<Utc>::UNIX_EPOCH).unwrap();
        events.into_iter().flat_map(parts_of).collect()
    }

    fn user(command: &Command) -> User {
        User::fold(&User::default().decide(command, DateTime::UNIX_EPOCH).unwrap())
    }

    #[test]
    fn what_a_token_claims_asks_for_nothing_whatever_was_heard_before() {
        let membership = Membership {
            membership_id: Membership::claimed("o1"),
            organization_id: "o1".to_owned(),
            name: None,
            slug: None,
            role: "org:admin".to_owned(),
            permissions: BTreeSet::new(),
        };
        let status = OnboardingStatus::Completed;
        let claims = Command::Provision(Claims {
            snapshot: Snapshot { told: told(), ..Snapshot::default() },
            memberships: vec![membership],
            onboarding: Some(Onboarding { step: 8, total_steps: 8, status }),
            ..Claims::default()
        });
        assert_eq!(parts_after(&User::default(), &claims), BTreeSet::new());
        let (membership_id, organization_id) = ("m1".to_owned(), "o2".to_owned());
        let left = user(&Command::Leave { membership_id, organization_id });
        assert_eq!(parts_after(&left, &claims), BTreeSet::new());
    }

    #[test]
    fn nothing_is_read_that_the_parked_view_of_users_does_not_show() {
        let parked = |view, position| {
            let reason = String::new();
            let parked = vec![Parked { view, position, reason }];
            shown(&Reached { position: 9, parked, stands_still: false })
        };
        assert_eq!((parked(View::Jobs, 5), parked(View::Users, 5)), (9, 4));
    }

    #[test]
    fn of_access_only_what_was_decided_is_asked_for() {
        let snapshot = Snapshot { told: told(), ..Snapshot::default() };
        let ada = user(&Command::Sync { snapshot, source_updated_at: DateTime::UNIX_EPOCH });
        let tier =
            AccessChange { subscription_tier: Some("premium".to_owned()), ..Default::default() };
        let tier_alone = BTreeSet::from([Part::Access(Right::SubscriptionTier)]);
        assert_eq!(parts_after(&ada, &Command::SetAccess(tier)), tier_alone);
        let same = AccessChange { role: Some("creator".to_owned()), ..Default::default() };
        let role_alone = BTreeSet::from([Part::Access(Right::Role)]);
        assert_eq!(parts_after(&ada, &Command::SetAccess(same)), role_alone);

        // Of an older event, what the read model took for decided.
        let (access, decided_at) = (Access::default(), Some(DateTime::UNIX_EPOCH));
        let older = user::Event::AccessChanged { access, decided_at, decided: None };
        let parts = still_decided(&parts_of(older), &BTreeSet::from([Right::SubscriptionTier]));
        assert_eq!(parts, tier_alone);
    }
}
