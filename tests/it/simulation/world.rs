//! Two nodes on one log and one object store, what was asked of them, and what they answered.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use chrono::{DateTime, TimeDelta};
use t2m::actors::codec::{Metadata, Source};
use t2m::actors::entity::{Executed, Failure};
use t2m::actors::leasing::Leased;
use t2m::actors::timekeeper;
use t2m::domain::ids::LeaseId;
use t2m::log::Recorded;
use tokio::task::JoinHandle;

use super::answers::{Answered, ByActor, Kept, carried_out, stream_of};
use super::dice::{Dice, Faults};
use super::log::Storage;
use super::node::{Node, Watch};
use super::rules::Told;
use super::store::SimulatedStore;

pub const NODES: usize = 2;
/// Part of everything personal, so that it is found wherever it should not be.
pub const PERSONAL: &str = "personal of ";

pub struct World {
    pub storage: Arc<Storage>,
    pub store: Arc<SimulatedStore>,
    /// The object store's own; it goes with the first node's but for its jumps.
    pub store_watch: Watch,
    pub watches: Vec<Watch>,
    pub nodes: RefCell<Vec<Rc<Node>>>,
    pub seen: Arc<Mutex<Seen>>,
    pub dir: tempfile::TempDir,
    running: RefCell<Vec<Running>>,
    asked: Cell<u64>,
    /// For the end: whether what a command has left is right.
    verdicts: RefCell<Vec<(String, Verdict)>>,
    pub attempts: RefCell<Vec<Leased>>,
    /// What was handed in under which lease.
    pub handed: RefCell<BTreeSet<(LeaseId, String)>>,
    /// Sealed and acknowledged, by their jobs.
    pub secrets: RefCell<BTreeSet<String>>,
    /// What Clerk has said of whom: when, banned or not, and whether that was acknowledged.
    pub words: RefCell<Vec<Word>>,
    pub deleted: RefCell<BTreeSet<String>>,
    pub counted: RefCell<BTreeMap<&'static str, u64>>,
}

type Verdict = Box<dyn FnOnce(&[Recorded], &Storage) -> Result<(), String>>;

pub struct Word {
    pub tag: String,
    pub user: String,
    pub at: DateTime<chrono::Utc>,
    pub banned: bool,
    pub acknowledged: bool,
}

struct Running {
    node: Rc<Node>,
    what: String,
    task: JoinHandle<()>,
}

/// What the log and the trace show.
#[derive(Default)]
pub struct Seen {
    pub told: Told,
    pub by_actor: ByActor,
    pub trace: Vec<String>,
    /// The first thing that must not be.
    pub wrong: Option<String>,
}

impl Seen {
    fn append(&mut self, events: &[Recorded]) {
        for event in events {
            let Recorded { stream, revision, position, kind, id, time, .. } = event;
            self.trace.push(format!("  log {position} {stream}@{revision} {kind} {id} {time}"));
            if String::from_utf8_lossy(&event.data).contains(PERSONAL) {
                self.fail(format!("what is personal stands in clear in {stream}@{revision}"));
            }
            let metadata: Metadata = serde_json::from_slice(&event.metadata).unwrap();
            self.by_actor.entry(metadata.actor).or_default().push(event.clone());
        }
        if let Err(wrong) = self.told.hear(events) {
            self.fail(wrong);
        }
    }

    fn fail(&mut self, wrong: String) {
        self.wrong.get_or_insert(wrong);
    }
}

impl World {
    pub fn new(seed: u64) -> Rc<Self> {
        let mut dice = Dice::of(seed, "world", 0);
        // Some seeds are quiet, so that the tested paths are long; some are storms.
        let often = [0, 3, 8, 15, 30][usize::try_from(dice.below(5)).unwrap()];
        let start = DateTime::from_timestamp(1_800_000_000, 0).unwrap();
        let seen = Arc::new(Mutex::new(Seen::default()));
        let witness = Arc::clone(&seen);
        let witness = Box::new(move |events: &[Recorded]| witness.lock().unwrap().append(events));
        let storage = Storage::new(Faults::new(dice.next(), often), witness);
        let number = |index: usize| u64::try_from(index).unwrap();
        let watches: Vec<_> =
            (0..NODES).map(|index| Watch::new(start, seed * 8 + number(index))).collect();
        let store_watch = Watch::new(start, 0);
        let store = SimulatedStore::new(Faults::new(dice.next(), often), store_watch.clock.clone());
        let world = Rc::new(Self {
            storage,
            store,
            store_watch,
            watches,
            nodes: RefCell::default(),
            seen,
            dir: directory(),
            running: RefCell::default(),
            asked: Cell::default(),
            verdicts: RefCell::default(),
            attempts: RefCell::default(),
            handed: RefCell::default(),
            secrets: RefCell::default(),
            words: RefCell::default(),
            deleted: RefCell::default(),
            counted: RefCell::default(),
        });
        for index in 0..NODES {
            let node = world.started(index);
            world.nodes.borrow_mut().push(node);
        }
        world
    }

    pub fn node(&self, index: usize) -> Rc<Node> {
        Rc::clone(&self.nodes.borrow()[index])
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn trace(&self, line: String) {
        self.seen.lock().unwrap().trace.push(line);
    }

    pub fn fail(&self, wrong: String) {
        self.trace(format!("WRONG: {wrong}"));
        self.seen.lock().unwrap().fail(wrong);
    }

    pub fn went_wrong(&self) -> bool {
        self.seen.lock().unwrap().wrong.is_some()
    }

    pub fn count(&self, what: &'static str) {
        *self.counted.borrow_mut().entry(what).or_default() += 1;
    }

    /// A name that nobody else has.
    pub fn tag(&self) -> String {
        self.asked.set(self.asked.get() + 1);
        format!("op-{}", self.asked.get())
    }

    /// Time passes for everyone, for no clock quite alike.
    pub fn pass(&self, by: TimeDelta) {
        self.watches.iter().for_each(|watch| watch.advance(by));
        self.store_watch.advance(by);
    }

    fn started(&self, index: usize) -> Rc<Node> {
        let clock = &self.watches[index].clock;
        Rc::new(Node::start(index, clock, &self.storage, &self.store, self.dir.path()))
    }

    /// Kills a node and starts it anew; `between` is what happens meanwhile.
    pub fn restart(&self, index: usize, between: impl FnOnce()) {
        let old = self.node(index);
        old.crash();
        self.trace(format!("node {index} crashes"));
        self.running.borrow_mut().retain(|running| {
            let dies = Rc::ptr_eq(&running.node, &old);
            if dies {
                running.task.abort();
            }
            !dies
        });
        between();
        self.nodes.borrow_mut()[index] = self.started(index);
    }

    /// Something is asked of a node, beside everything else.
    pub fn spawn(&self, node: &Rc<Node>, what: String, asking: impl Future<Output = ()> + 'static) {
        self.trace(format!("node {}: {what}", node.index));
        let task = actix::spawn(asking);
        self.running.borrow_mut().push(Running { node: Rc::clone(node), what, task });
    }

    /// Callers go away; what they have asked for goes on or not.
    pub fn hang_up(&self, dice: &mut Dice) {
        let mut running = self.running.borrow_mut();
        if !running.is_empty() {
            let index = dice.below(u64::try_from(running.len()).unwrap());
            running.swap_remove(usize::try_from(index).unwrap()).task.abort();
            self.count("callers gone");
        }
    }

    pub fn under_way(&self) -> usize {
        let mut running = self.running.borrow_mut();
        running.retain(|running| !running.task.is_finished());
        running.len()
    }

    /// Asks an entity, and checks what it says.
    pub async fn ask<A: Kept>(
        &self,
        node: &Node,
        id: String,
        command: A::Command,
        fresh: bool,
    ) -> Result<Executed<A>, Failure<A::Refusal>> {
        let (tag, stream) = (self.tag(), stream_of::<A>(&id));
        self.asks::<A>(node, tag, stream, id, command, fresh).await
    }

    pub async fn asks<A: Kept>(
        &self,
        node: &Node,
        tag: String,
        stream: String,
        id: String,
        command: A::Command,
        fresh: bool,
    ) -> Result<Executed<A>, Failure<A::Refusal>> {
        let asked = command.clone();
        let (of, at) = (tag.clone(), stream.clone());
        let verdict = move |own: &[Recorded], storage: &Storage| {
            carried_out::<A>(&asked, own, &storage.stream(&at))
                .map_err(|wrong| format!("{of} {asked:?} on {at}: {wrong}"))
        };
        self.verdicts.borrow_mut().push((tag.clone(), Box::new(verdict)));
        let watch = &self.watches[node.index];
        let (before, shown) = (self.storage.length(&stream), watch.shown());
        let origin = Metadata::by(&tag, Source::Api);
        let directory = A::directory(&node.system);
        let result = match fresh {
            true => directory.execute_fresh(&id, command.clone(), origin).await,
            false => directory.execute(&id, command.clone(), origin).await,
        };
        let (events, times) = (self.storage.stream(&stream), watch.since(shown));
        let own = self.seen.lock().unwrap().by_actor.get(&tag).cloned().unwrap_or_default();
        let answer = match &result {
            Ok(done) => format!("{} events, position {}", done.events.len(), done.position),
            Err(error) => error.to_string(),
        };
        self.trace(format!("  {tag} on {stream}: {answer}"));
        self.count(match &result {
            Ok(done) if done.events.is_empty() => "nothing to do",
            Ok(_) => "done",
            Err(Failure::Refused(_)) => "refused",
            Err(Failure::Unavailable(_)) => "unavailable",
            Err(Failure::Conflict(_)) => "given up after conflicts",
            Err(Failure::Keys(_)) => "no keys",
            Err(_) => "other",
        });
        let answered = Answered::<A> { command, result, events, before, times, own };
        if let Err(wrong) = answered.check() {
            self.fail(format!("{tag} {:?} on {stream}: {wrong} ({answer})", answered.command));
        }
        answered.result
    }

    /// Nothing goes wrong any more until everything that was begun has ended and everyone knows of
    /// it.
    pub async fn rest(&self) {
        self.storage.faults.calm(true);
        self.store.faults.calm(true);
        let mut waited = 0;
        while self.under_way() > 0 {
            tokio::time::sleep(Duration::from_millis(500)).await;
            waited += 1;
            if waited > 240 {
                let what: Vec<_> = self.running.borrow().iter().map(|it| it.what.clone()).collect();
                return self.fail(format!("these never end: {what:?}"));
            }
        }
        // What lands late has landed by then.
        tokio::time::sleep(Duration::from_secs(10)).await;
        for index in 0..NODES {
            if self.node(index).log.is_broken() {
                self.restart(index, || {});
            }
        }
        for _ in 0..3 {
            self.look().await;
        }
        self.trace(format!("at rest, position {}", self.storage.position()));
    }

    pub fn stir(&self) {
        self.storage.faults.calm(false);
        self.store.faults.calm(false);
    }

    /// Every background actor of every node does what there is to do.
    async fn look(&self) {
        for index in 0..NODES {
            self.catch_up().await;
            let node = self.node(index);
            let done = timekeeper::look(&node.system).await.map_err(|it| it.to_string());
            let done = done.and(node.secrets.look(&node.system).await.map_err(|it| it.to_string()));
            let done = done.and(node.keeper.look().await.map_err(|it| it.to_string()));
            let done = done.and(node.keeper.reconcile().await.map_err(|it| it.to_string()));
            let mut eraser = node.eraser.lock().await;
            let done = done.and(eraser.look().await.map_err(|it| it.to_string()));
            if let Err(error) = done {
                self.fail(format!("a look of node {index} failed at rest: {error}"));
            }
        }
        self.catch_up().await;
    }

    async fn catch_up(&self) {
        self.storage.tell_all();
        let position = self.storage.position();
        for index in 0..NODES {
            let progress = &self.node(index).system.progress;
            if progress.reached(position, None, Duration::from_secs(30)).await.is_err() {
                self.fail(format!("node {index} stays at {:?} of {position}", progress.now()));
            }
        }
    }

    /// In the end: what each command has left, also those that nobody heard an answer to.
    pub fn judge(&self) {
        let by_actor = self.seen.lock().unwrap().by_actor.clone();
        for (tag, verdict) in self.verdicts.take() {
            let own = by_actor.get(&tag).map_or(&[][..], |own| own);
            if let Err(wrong) = verdict(own, &self.storage) {
                self.fail(wrong);
            }
        }
    }
}

/// In memory where the system has a place for that: nothing here is to outlive the process.
fn directory() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    match memory.is_dir() {
        true => tempfile::tempdir_in(memory).unwrap(),
        false => tempfile::tempdir().unwrap(),
    }
}
