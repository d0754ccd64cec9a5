//! `t2m clerk`: users' metadata to Clerk in bulk, Clerk's users into the log, and what differs.
//!
//! It reads the log itself, not the read model of a server, and says how far.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use futures_util::{Stream, StreamExt, stream};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value};

use super::log::Which;
use super::{BadConfiguration, keys, owner, restore, say};
use crate::actors::codec::{self, AnyEvent, Metadata, Source};
use crate::actors::entity::Entity;
use crate::actors::keyring::Keyring;
use crate::clerk::api::{self, AT_ONCE, Api, Error, unix_clock};
use crate::clerk::metadata::Wanted;
use crate::clerk::payload::{self, Delivery};
use crate::clerk::translate::{self, Command};
use crate::clock::Clock;
use crate::config::BackendOptions;
use crate::domain::ids::UserId;
use crate::domain::user::{Standing, User};
use crate::domain::{self, Aggregate};
use crate::log::{self, EventLog};

/// Commands on their way to the log at once; the log writes what waits in one go.
const APPENDING: usize = 64;
const PAGE: usize = 1000;

#[derive(Subcommand)]
pub enum Clerk {
    /// Push the metadata of all users to Clerk, save those newer there; a server may be running
    Sync(Push),
    /// Load all users from Clerk into the log; no server may be running
    Import(Place),
    /// Load what is newer at Clerk, push what differs, and name who is missing on either side
    Reconcile(Push),
}

#[derive(Args)]
pub struct Place {
    #[command(flatten)]
    keys: keys::Place,
    #[command(flatten)]
    backend: BackendOptions,
}

#[derive(Args)]
pub struct Push {
    #[command(flatten)]
    place: Place,
    /// Only say what would be done; a server may be running
    #[arg(long)]
    dry_run: bool,
}

impl Clerk {
    pub fn run(self) -> anyhow::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            match self {
                Self::Sync(push) => push.place.checked(false).await?.sync(push.dry_run).await,
                Self::Import(place) => {
                    owner::refuse_root(place.keys.data_dir())?;
                    place.checked(true).await?.import().await
                }
                Self::Reconcile(push) => {
                    if !push.dry_run {
                        owner::refuse_root(push.place.keys.data_dir())?;
                    }
                    push.place.checked(!push.dry_run).await?.reconcile(push.dry_run).await
                }
            }
        })
    }
}

/// Users here, as the log has them.
struct Here {
    users: BTreeMap<UserId, User>,
    position: u64,
}

/// Users at Clerk.
type There = BTreeMap<UserId, payload::User>;

/// What is needed to work.
struct Session {
    data_dir: PathBuf,
    log: String,
    keyring: Keyring,
    api: Api,
    clock: Clock,
}

impl Place {
    async fn checked(self, writes: bool) -> anyhow::Result<Session> {
        let backend = self.backend.check().map_err(BadConfiguration)?;
        let missing = || BadConfiguration(vec!["CLERK_SECRET_KEY: required".to_owned()]);
        self.keys.log.check()?;
        let clock = Clock::system();
        let api = Api::new(&backend.ok_or_else(missing)?, unix_clock(&clock))?;
        let opened = if writes { self.keys.open()? } else { self.keys.open_for_reading()? };
        let keyring = opened.own_keyring().await?;
        let Which { data_dir, setting } = self.keys.log;
        Ok(Session { data_dir, log: setting, keyring, api, clock })
    }
}

impl Session {
    async fn sync(&self, dry_run: bool) -> anyhow::Result<()> {
        let here = read_users(&self.log, &self.data_dir).await?;
        let (users, unconfirmed): (Vec<_>, Vec<_>) =
            here.living().partition(|(_, user)| user.standing == Standing::Registered);
        say(format_args!("position     {}", here.position));
        let tally = self.push(users.into_iter(), dry_run).await?;
        tally.name_newer();
        say(format_args!("{}     {}", if dry_run { "to push " } else { "pushed  " }, tally.done));
        say(format_args!("unchanged    {}", tally.unchanged));
        say(format_args!("newer there  {}", tally.newer.len()));
        if !tally.newer.is_empty() {
            eprintln!(
                "what is newer at Clerk is not overwritten: t2m clerk reconcile loads it first"
            );
        }
        // Of them only an old token has told; it must not overrule what Clerk has.
        say(format_args!("unconfirmed  {}", unconfirmed.len()));
        tally.settle("could not be pushed")
    }

    async fn import(&self) -> anyhow::Result<()> {
        let log = open_for_writing(&self.log, &self.data_dir).await?;
        let there = fetch_all(&self.api).await?;
        let tally = self.take_in(&log, there).await?;
        say(format_args!("imported     {}", tally.done));
        say(format_args!("unchanged    {}", tally.unchanged));
        tally.settle("could not be imported")
    }

    async fn reconcile(&self, dry_run: bool) -> anyhow::Result<()> {
        // Before anything is asked of Clerk: both ways need both ends.
        let log =
            if dry_run { None } else { Some(open_for_writing(&self.log, &self.data_dir).await?) };
        let mut there = fetch_all(&self.api).await?;
        let mut here = read_users(&self.log, &self.data_dir).await?;
        let newer: Vec<_> =
            there.keys().filter(|id| here.lacks(id, &there[*id])).cloned().collect();
        for id in &newer {
            say(format_args!("newer there    {id}"));
        }
        let mut failures = Tally::default();
        if let Some(log) = &log {
            let taken = newer.iter().filter_map(|id| Some((id.clone(), there.get(id)?.clone())));
            failures.failed += self.take_in(log, taken.collect()).await?.failed;
            here = read_users(&self.log, &self.data_dir).await?;
        } else {
            // They are to be taken in first, and what differs then is not known yet.
            there.retain(|id, _| !newer.contains(id));
        }
        let missing = here.living().filter(|(id, _)| !there.contains_key(*id));
        let missing: Vec<_> = missing.map(|(id, _)| id).filter(|id| !newer.contains(id)).collect();
        for id in &missing {
            say(format_args!("missing there  {id}"));
        }
        let differing: Vec<_> =
            here.living().filter(|(id, user)| differs(user, there.get(*id))).collect();
        for (id, _) in &differing {
            say(format_args!("differs        {id}"));
        }
        let count = differing.len();
        if !dry_run {
            let pushed = self.push(differing.into_iter(), false).await?;
            failures.failed += pushed.failed;
            pushed.name_newer();
            if !pushed.newer.is_empty() {
                let count = pushed.newer.len();
                say(format_args!("{count} not pushed, being newer there by now"));
            }
        }
        say(format_args!(
            "{} newer there, {} missing there, {count} differing",
            newer.len(),
            missing.len()
        ));
        failures.settle("could not be reconciled")
    }

    /// What webhooks about these users would have done.
    async fn take_in(&self, log: &Arc<dyn EventLog>, users: There) -> anyhow::Result<Tally> {
        let bar = bar("import", users.len())?;
        let now = self.clock.now();
        let taking =
            users.into_iter().map(|(id, user)| async move {
                let command = translate::command(Delivery::UserCreatedOrUpdated(user), now);
                let Ok(Some(Command::User(_, command))) = command else {
                    return (id, Err("it cannot be understood".to_owned()));
                };
                let stream = domain::stream::<User>(&id);
                let (log, clock) = (Arc::clone(log), self.clock.clone());
                let mut entity = Entity::<User>::new(log, clock, self.keyring.clone(), stream);
                let done = entity.execute(&command, &Metadata::by("clerk", Source::Clerk)).await;
                let outcome = done.map(|done| {
                    if done.events.is_empty() { Outcome::Unchanged } else { Outcome::Done }
                });
                (id, outcome.map_err(|error| error.to_string()))
            });
        Ok(Tally::of(stream::iter(taking).buffer_unordered(APPENDING), &bar).await)
    }

    /// Makes the metadata of these users at Clerk as it is here, where Clerk has said nothing since
    /// that is not known here.
    async fn push<'a>(
        &self,
        users: impl ExactSizeIterator<Item = (&'a UserId, &'a User)>,
        dry_run: bool,
    ) -> anyhow::Result<Tally> {
        let bar = bar("push", users.len())?;
        let pushing = users.map(|(id, user)| async move {
            let outcome = self.push_one(id, user, dry_run).await;
            (id.clone(), outcome.map_err(|error| error.to_string()))
        });
        Ok(Tally::of(stream::iter(pushing).buffer_unordered(AT_ONCE), &bar).await)
    }

    async fn push_one(&self, id: &UserId, user: &User, dry_run: bool) -> Result<Outcome, Error> {
        let there = self.api.user(id.as_str()).await?;
        let patch = difference(user, &there);
        if patch.is_empty() {
            return Ok(Outcome::Unchanged);
        }
        if is_newer(&there, user) {
            return Ok(Outcome::NewerThere);
        }
        if !dry_run {
            self.api.merge_metadata(id.as_str(), patch).await?;
        }
        Ok(Outcome::Done)
    }
}

/// All users of Clerk, page by page. Each begins with one that was seen, since whoever is deleted
/// meanwhile makes all others move up.
async fn fetch_all(api: &Api) -> anyhow::Result<There> {
    let bar = ProgressBar::new_spinner().with_message("users fetched from Clerk");
    let (mut there, mut offset) = (There::new(), 0);
    loop {
        let page = api.users(offset).await.context("listing the users of Clerk")?;
        let first = page.first().and_then(|user| UserId::try_from(user.id.clone()).ok());
        if offset > 0 && !first.is_some_and(|first| there.contains_key(&first)) {
            offset = offset.saturating_sub(api::PAGE);
            continue;
        }
        let more = page.len().saturating_sub(1);
        for user in page {
            match UserId::try_from(user.id.clone()) {
                Ok(id) => drop(there.insert(id, user)),
                Err(error) => bail!("Clerk lists the user {:?}: {error}", user.id),
            }
        }
        bar.set_position(there.len() as u64);
        bar.tick();
        if more == 0 {
            bar.finish_and_clear();
            return Ok(there);
        }
        offset += more;
    }
}

impl Here {
    /// Who is known and not deleted.
    fn living(&self) -> impl Iterator<Item = (&UserId, &User)> {
        let living = |standing| matches!(standing, Standing::Registered | Standing::Provisional);
        self.users.iter().filter(move |(_, user)| living(user.standing))
    }

    /// Whether Clerk knows of a user what is not known here.
    fn lacks(&self, id: &UserId, there: &payload::User) -> bool {
        let Some(user) = self.users.get(id) else { return true };
        user.standing != Standing::Deleted && is_newer(there, user)
    }
}

/// Whether Clerk's word on a user is newer than the last that is known here.
fn is_newer(there: &payload::User, user: &User) -> bool {
    let newer = |known| there.updated_at.is_none_or(|updated_at| updated_at > known);
    user.synced_at.is_none_or(newer)
}

/// What makes the metadata there as it is here.
fn difference(user: &User, there: &payload::User) -> Map<String, Value> {
    let (wanted, there) = (Wanted::from(user), &there.public_metadata);
    wanted.difference(&wanted.known_parts(there), there)
}

fn differs(user: &User, there: Option<&payload::User>) -> bool {
    user.standing == Standing::Registered
        && there.is_some_and(|there| !difference(user, there).is_empty())
}

enum Outcome {
    Done,
    Unchanged,
    /// Left alone, for that is not known here yet.
    NewerThere,
}

/// How it went.
#[derive(Default)]
struct Tally {
    done: usize,
    unchanged: usize,
    /// Who was passed over.
    newer: BTreeSet<UserId>,
    failed: usize,
}

impl Tally {
    /// Counts what comes, with a line on stderr for each failure.
    async fn of(
        outcomes: impl Stream<Item = (UserId, Result<Outcome, String>)>,
        bar: &ProgressBar,
    ) -> Self {
        let mut tally = Self::default();
        let mut outcomes = std::pin::pin!(outcomes);
        while let Some((id, outcome)) = outcomes.next().await {
            match outcome {
                Ok(Outcome::Done) => tally.done += 1,
                Ok(Outcome::Unchanged) => tally.unchanged += 1,
                Ok(Outcome::NewerThere) => drop(tally.newer.insert(id)),
                Err(error) => {
                    tally.failed += 1;
                    bar.suspend(|| eprintln!("{id}: {error}"));
                }
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
        tally
    }

    fn name_newer(&self) {
        for id in &self.newer {
            say(format_args!("passed over  {id}"));
        }
    }

    fn settle(&self, what: &str) -> anyhow::Result<()> {
        say(format_args!("failed       {}", self.failed));
        if self.failed > 0 {
            bail!("{} users {what}", self.failed);
        }
        Ok(())
    }
}

fn bar(what: &str, count: usize) -> anyhow::Result<ProgressBar> {
    let template = format!("{what} {{bar:40}} {{pos}}/{{len}} users {{per_sec}} {{eta}}");
    Ok(ProgressBar::new(count as u64).with_style(ProgressStyle::with_template(&template)?))
}

/// All users as the log has them, with what is personal sealed: nobody asks for it here. A server
/// may be writing to it.
async fn read_users(log: &str, data_dir: &Path) -> anyhow::Result<Here> {
    let log = log::open_for_reading(log, data_dir).await.context("opening the log")?;
    let mut here = Here { users: BTreeMap::new(), position: 0 };
    loop {
        let page = log.read_all(here.position, PAGE).await.context("reading the log")?;
        let Some(last) = page.last() else { return Ok(here) };
        here.position = last.position;
        for event in page.iter().filter(|it| codec::category(&it.stream) == User::CATEGORY) {
            let decoded = codec::decode_any(&event.stream, &event.kind, &event.data);
            let at = || format!("reading the event at position {}", event.position);
            if let AnyEvent::User(id, event) = decoded.with_context(at)? {
                here.users.entry(id).or_default().evolve(&event);
            }
        }
    }
}

/// An embedded log has one writer.
async fn open_for_writing(log: &str, data_dir: &Path) -> anyhow::Result<Arc<dyn EventLog>> {
    restore::refuse_unfinished(data_dir)?;
    let which = Which { data_dir: data_dir.to_owned(), setting: log.to_owned() };
    which.ensure_no_loss_before_opening().await?;
    match log::open(log, data_dir).await {
        Err(log::Error::Unwritable(why)) => bail!(
            "the log in {} is held by a running server ({why}): stop it, import, start it again",
            data_dir.display()
        ),
        opened => opened.context("opening the log"),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use async_trait::async_trait;
    use serde_json::json;

    use super::*;
    use crate::clerk::api::{Answer, Request, Transport};

    type Change = fn(&mut Vec<u32>);

    /// Lists three users at a time; before a certain request for them somebody changes them.
    struct Changing {
        users: Arc<Mutex<Vec<u32>>>,
        requests_before: Mutex<usize>,
        change: Change,
    }

    #[async_trait]
    impl Transport for Changing {
        async fn send(&self, request: Request) -> Result<Answer, String> {
            let mut users = self.users.lock().unwrap();
            let mut before = self.requests_before.lock().unwrap();
            if *before == 0 {
                (self.change)(&mut users);
            }
            *before = before.wrapping_sub(1);
            let mut query = request.url.query_pairs();
            let offset = query.find(|(name, _)| name == "offset").unwrap().1.parse().unwrap();
            let page = users.iter().skip(offset).take(3);
            let page: Vec<_> = page.map(|n| json!({ "id": format!("user_{n}") })).collect();
            Ok(Answer { status: 200, retry_after: None, body: json!(page).to_string().into() })
        }
    }

    #[tokio::test]
    async fn nobody_is_passed_over_while_others_are_deleted_or_sign_up() {
        let changes: [(usize, Change); 5] = [
            (1, |users| users.retain(|n| *n > 1)),
            (1, |users| users.retain(|n| *n != 2)),
            (2, |users| users.retain(|n| *n > 4)),
            (3, |users| users.retain(|n| *n > 5)),
            (1, |users| users.splice(0..0, 10..15).for_each(drop)),
        ];
        for (requests_before, change) in changes {
            let users = Arc::new(Mutex::new((0..7).collect()));
            let requests_before = Mutex::new(requests_before);
            let clerk = Changing { users: Arc::clone(&users), requests_before, change };
            let base = "https://api.clerk.test/".parse().unwrap();
            let api = Api::over(Box::new(clerk), base, Arc::new(|| 0), || 0.5);
            let there = fetch_all(&api).await.unwrap();
            for n in users.lock().unwrap().iter().filter(|n| **n < 7) {
                let id = UserId::try_from(format!("user_{n}")).unwrap();
                assert!(there.contains_key(&id), "{id} is not among {:?}", there.keys());
            }
        }
    }
}
