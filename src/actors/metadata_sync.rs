//! Brings what is decided here to Clerk: a user's access, flags, organization and onboarding into
//! its `public_metadata`, and the end of a session.
//!
//! It looks at what should be (the user's stream) and at what is (Clerk), and sends the difference;
//! the log as a whole only says where to look. How far it has come is kept in a file of its own, so
//! that a rebuilt read model makes it send nothing again, and a crash makes it look again at what it
//! had not finished: at least once, which is harmless.
//!
//! Clerk's word may be later than a decision and not heard of yet. So it is taken from Clerk's answer
//! just as its webhook would bring it, and what gives way to it is not sent.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use actix::Arbiter;
use chrono::{DateTime, Utc};
use futures_util::future::LocalBoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::sync::watch;
use tokio::time::Instant;

use super::System;
use super::codec::{self, AnyEvent, Metadata, Source};
use super::projector::{Progress, Reached};
use super::supervise::supervise;
use crate::clerk::api::{self, AT_ONCE, Api};
use crate::clerk::metadata::{Part, Wanted};
use crate::clerk::{payload, translate};
use crate::domain::ids::{SessionId, UserId};
use crate::domain::session::{self, EndReason};
use crate::domain::user::{self, Command, Right, Snapshot, Standing, User};
use crate::domain::{self, Aggregate};
use crate::log::{self, EventLog, Recorded};
use crate::views::View;

/// Events read at once.
const PAGE: usize = 1000;
/// Things waiting to be sent at which no more events are read.
const MOST_PENDING: usize = 10_000;
/// How long it lets changes gather after the first, so that one request carries several.
const GATHER: Duration = Duration::from_millis(50);
/// How long it waits after something could not be sent, with that alone, or the log not be read.
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
            let log = Arc::clone(&system.log);
            let sync = MetadataSync::open(log, Arc::clone(&api), checkpoint.clone());
            follow(sync, system.progress.clone())
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

async fn follow(mut sync: MetadataSync, mut progress: Progress) {
    let mut pause = FIRST_PAUSE;
    loop {
        let until = shown(&progress.now());
        let looked = sync.look(until).await;
        if let Err(error) = &looked {
            tracing::error!(%error, "changes could not be sent to Clerk");
        }
        let is_well = looked.is_ok();
        let wake = looked.unwrap_or_else(|_| Instant::now() + pause);
        if is_well {
            pause = FIRST_PAUSE;
        }
        tokio::select! {
            Some(sent) = sync.sending.next() => sync.note(sent),
            () = gathered(&mut progress), if is_well => {}
            () = tokio::time::sleep_until(wake), if is_well => {}
            // What else ends meanwhile makes the next one no longer.
            () = tokio::time::sleep_until(wake), if !is_well => pause = (pause * 2).min(MAX_PAUSE),
        }
    }
}

/// Resolves a moment after the read model has moved. What is cut off of it is no loss: whatever
/// else there is to do, a look follows it.
async fn gathered(progress: &mut Progress) {
    progress.moved().await;
    tokio::time::sleep(GATHER).await;
}

/// Up to where the read model shows what was decided. An event at which it is parked was not
/// understood, and no later one is passed over for it.
fn shown(reached: &Reached) -> u64 {
    let parked = reached.parked.iter().filter(|parked| parked.view == View::Users);
    parked.map(|parked| parked.position.saturating_sub(1)).min().unwrap_or(reached.position)
}

/// Why a look was broken off; nothing is lost by it.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error(transparent)]
    Log(#[from] log::Error),
    #[error("keeping the position of what was sent: {0}")]
    Checkpoint(#[from] std::io::Error),
}

/// Why something waits, or is not sent at all.
#[derive(Debug, thiserror::Error)]
enum Unsent {
    #[error(transparent)]
    Clerk(#[from] api::Error),
    #[error(transparent)]
    Log(#[from] log::Error),
    /// Perhaps a newer version understands what Clerk has said there.
    #[error(transparent)]
    Unreadable(#[from] codec::Error),
}

impl Unsent {
    fn is_final(&self) -> bool {
        matches!(self, Self::Clerk(error) if error.is_final())
    }
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
    under_way: bool,
    /// Where the first event lies that came while it was under way.
    later: Option<u64>,
    /// It alone waits for this, and nobody else for it.
    next_try: Instant,
    pause: Duration,
}

impl Pending {
    fn since(position: u64) -> Self {
        Self {
            since: position,
            parts: BTreeSet::new(),
            under_way: false,
            later: None,
            next_try: Instant::now(),
            pause: FIRST_PAUSE,
        }
    }
}

/// What came of a try.
struct Sent {
    target: Target,
    outcome: Result<(), Unsent>,
}

/// The way from the log to Clerk.
pub struct MetadataSync {
    log: Arc<dyn EventLog>,
    api: Arc<Api>,
    path: PathBuf,
    /// As it is on disk.
    checkpoint: u64,
    /// Up to where events were read.
    read: u64,
    pending: BTreeMap<Target, Pending>,
    sending: FuturesUnordered<LocalBoxFuture<'static, Sent>>,
    /// Whether anything was sent or given up since the checkpoint was kept.
    settled: bool,
    /// When it is next said that something waits.
    quiet_until: Instant,
}

impl MetadataSync {
    /// Begins where the last one ended; at the start of the log when that is not known, which sends
    /// nothing that Clerk has already.
    pub fn open(log: Arc<dyn EventLog>, api: Arc<Api>, path: PathBuf) -> Self {
        let head = *log.head().borrow();
        let kept = std::fs::read_to_string(&path).ok().and_then(|text| text.trim().parse().ok());
        // Beyond the head: the log was exchanged for another one.
        let checkpoint = kept.filter(|position| *position <= head).unwrap_or(0);
        Self {
            log,
            api,
            path,
            checkpoint,
            read: checkpoint,
            pending: BTreeMap::new(),
            sending: FuturesUnordered::new(),
            settled: false,
            quiet_until: Instant::now(),
        }
    }

    /// Up to where everything was sent.
    pub fn checkpoint(&self) -> u64 {
        self.checkpoint
    }

    /// Reads on to `until`, a page at the most, and begins to send what is due; when to look again,
    /// should nothing happen before.
    ///
    /// # Errors
    /// [`Failure`]; what Clerk could not take is no failure, it stays for a later look.
    pub async fn look(&mut self, until: u64) -> Result<Instant, Failure> {
        self.read_on(until).await?;
        // One moment for both: what falls due in between would be neither begun nor waited for.
        let now = Instant::now();
        self.begin(now);
        self.keep_checkpoint()?;
        if self.read < until && self.pending.len() < MOST_PENDING {
            return Ok(now);
        }
        // What is due and was not begun waits for others to end.
        let waiting = self.pending.values().filter(|it| !it.under_way).map(|it| it.next_try);
        Ok(waiting.filter(|next| *next > now).min().unwrap_or(now + MAX_PAUSE))
    }

    async fn read_on(&mut self, until: u64) -> Result<(), Failure> {
        if self.read >= until || self.pending.len() >= MOST_PENDING {
            return Ok(());
        }
        let page = self.log.read_all(self.read, PAGE).await?;
        for recorded in page.iter().take_while(|recorded| recorded.position <= until) {
            if let Some((target, parts)) = concerns(recorded) {
                let position = recorded.position;
                let pending =
                    self.pending.entry(target).or_insert_with(|| Pending::since(position));
                pending.parts.extend(parts);
                if pending.under_way {
                    pending.later.get_or_insert(position);
                }
            }
            self.read = recorded.position;
        }
        // Positions may have gaps, so that `until` need not be one.
        if page.len() < PAGE || page.last().is_some_and(|last| last.position > until) {
            self.read = self.read.max(until);
        }
        Ok(())
    }

    /// Begins what is due, at most [`AT_ONCE`] at a time; first what went wrong least often.
    fn begin(&mut self, now: Instant) {
        while self.sending.len() < AT_ONCE {
            let due = self.pending.iter_mut().filter(|(_, it)| !it.under_way && it.next_try <= now);
            let next = due.min_by_key(|(_, it)| (it.pause, it.next_try));
            let Some((target, pending)) = next else { return };
            pending.under_way = true;
            let (log, api) = (Arc::clone(&self.log), Arc::clone(&self.api));
            let sending = send(log, api, target.clone(), pending.parts.clone());
            self.sending.push(Box::pin(sending));
        }
    }

    /// What could not be sent waits, all of it; what was is done, except for what came meanwhile.
    fn note(&mut self, Sent { target, outcome }: Sent) {
        let waiting = self.pending.len();
        let Some(pending) = self.pending.get_mut(&target) else { return };
        pending.under_way = false;
        let later = pending.later.take();
        match outcome {
            Err(error) if !error.is_final() => {
                let now = Instant::now();
                pending.next_try = now + pending.pause;
                pending.pause = (pending.pause * 2).min(MAX_PAUSE);
                if self.quiet_until <= now {
                    self.quiet_until = now + FIRST_PAUSE;
                    tracing::warn!(
                        %error, waiting, "not everything could be sent to Clerk; trying again"
                    );
                }
                return;
            }
            Err(error) => tracing::warn!(?target, %error, "a change is not sent to Clerk"),
            Ok(()) => {}
        }
        match later {
            Some(since) => {
                let parts = std::mem::take(&mut pending.parts);
                *pending = Pending { parts, ..Pending::since(since) };
            }
            None => drop(self.pending.remove(&target)),
        }
        self.settled = true;
    }

    /// To read events anew costs less than to sync a file after each of them.
    fn keep_checkpoint(&mut self) -> Result<(), Failure> {
        let first = self.pending.values().map(|pending| pending.since).min();
        let position = first.map_or(self.read, |first| first - 1);
        let all_done = self.settled && self.sending.is_empty();
        let enough = all_done || position >= self.checkpoint + PAGE as u64;
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
            // Which of them an older event decided, the stream tells.
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

async fn send(
    log: Arc<dyn EventLog>,
    api: Arc<Api>,
    target: Target,
    parts: BTreeSet<Part>,
) -> Sent {
    let outcome = match &target {
        Target::User(id) => send_user(&*log, &api, id, &parts).await,
        Target::Session(id) => api.revoke_session(id.as_str()).await.map_err(Unsent::from),
    };
    Sent { target, outcome }
}

/// Makes `parts` of a user's metadata at Clerk as they are here, if Clerk has not spoken on them
/// since they were decided: heard or not. What is not heard yet, its webhook brings.
async fn send_user(
    log: &dyn EventLog,
    api: &Api,
    user_id: &UserId,
    parts: &BTreeSet<Part>,
) -> Result<(), Unsent> {
    let mut known = Known::default();
    known.read_on(log, user_id).await?;
    if known.decided_of(parts).is_empty() {
        return Ok(());
    }
    let there = api.user(user_id.as_str()).await?;
    // Anew: Clerk has taken its time, and a decision that was replaced meanwhile is not sent.
    known.read_on(log, user_id).await?;
    known.hear(&there);
    let (wanted, there) = (Wanted::from(&known.user), there.public_metadata);
    let mut parts = known.decided_of(parts);
    if wanted.undoes_completion(&there) {
        parts.remove(&Part::Onboarding);
    }
    let patch = wanted.difference(&parts, &there);
    if patch.is_empty() {
        return Ok(());
    }
    // Once: before the next try it is asked again what is there.
    Ok(api.merge_metadata_once(user_id.as_str(), patch).await?)
}

/// A user as its stream has it. That is asked itself: what another node has heard is in it at once,
/// and later in the read model.
#[derive(Default)]
struct Known {
    user: User,
    /// The revision after the last event read.
    next_revision: u64,
    /// What was last decided here, and not told by Clerk since.
    decided_here: BTreeSet<Part>,
}

impl Known {
    async fn read_on(&mut self, log: &dyn EventLog, user_id: &UserId) -> Result<(), Unsent> {
        let stream = domain::stream::<User>(user_id);
        loop {
            let page = log.read_stream(&stream, self.next_revision, PAGE).await?;
            for recorded in &page {
                self.take_in(&codec::decode::<User>(&recorded.kind, &recorded.data)?);
                self.next_revision = recorded.revision + 1;
            }
            if page.len() < PAGE {
                return Ok(());
            }
        }
    }

    fn take_in(&mut self, event: &user::Event) {
        let (parts, here): (BTreeSet<Part>, bool) = match event {
            user::Event::AccessChanged { access, decided_at, decided } => {
                let here = decided_at.is_some();
                let rights = self.user.access.settled_by(access, here, decided.as_ref());
                (rights.into_iter().map(Part::Access).collect(), here)
            }
            user::Event::AttributesChanged { decided_at, .. } => {
                ([Part::UserType].into(), decided_at.is_some())
            }
            user::Event::FlagsChanged { decided_at, .. } => {
                ([Part::Flags].into(), decided_at.is_some())
            }
            user::Event::OnboardingProgressed { decided_at, .. } => {
                ([Part::Onboarding].into(), decided_at.is_some())
            }
            // Of memberships the metadata repeats what is known, whoever told it.
            user::Event::OrganizationJoined { .. }
            | user::Event::OrganizationRoleChanged { .. }
            | user::Event::OrganizationLeft { .. } => ([Part::Organization].into(), true),
            user::Event::Registered { .. }
            | user::Event::ProfileChanged { .. }
            | user::Event::Banned {}
            | user::Event::Unbanned {}
            | user::Event::Deleted {} => (BTreeSet::new(), false),
        };
        if here {
            self.decided_here.extend(parts);
        } else {
            self.decided_here.retain(|part| !parts.contains(part));
        }
        self.user.evolve(event);
    }

    /// Takes in Clerk's present word as its webhook will: one that is known already, repeats our own
    /// or is from before a decision undoes nothing. Without a time it counts as new.
    fn hear(&mut self, there: &payload::User) {
        let told = translate::told(&there.public_metadata);
        let source_updated_at = there.updated_at.unwrap_or(DateTime::<Utc>::MAX_UTC);
        let snapshot = Snapshot { told, ..Snapshot::default() };
        let word = Command::Sync { snapshot, source_updated_at };
        // It decides nothing by itself, and so needs no time.
        for event in self.user.decide(&word, source_updated_at).unwrap_or_default() {
            self.take_in(&event);
        }
    }

    fn decided_of(&self, parts: &BTreeSet<Part>) -> BTreeSet<Part> {
        match self.user.standing {
            Standing::Provisional | Standing::Registered => &self.decided_here & parts,
            Standing::Unknown | Standing::Deleted => BTreeSet::new(),
        }
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
#[path = "metadata_sync_tests.rs"]
mod tests;
