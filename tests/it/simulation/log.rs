//! An event log in memory that keeps the contract, and whose storage and network do not: answers
//! are lost, writes land after their callers were told that nothing is known, reads fail, handles
//! break, and other nodes hear late of what there is.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use t2m::log::{
    Appended, Error, EventLog, Expected, GENESIS, Link, NewEvent, REPEAT_WINDOW, Recorded, Stats,
    Verified, check_limits,
};
use tokio::sync::watch;

use super::dice::Faults;

/// Sees every append at the moment it is made.
pub type Witness = Box<dyn Fn(&[Recorded]) + Send + Sync>;

/// What all nodes share.
pub struct Storage {
    pub faults: Faults,
    content: Mutex<Content>,
    handles: Mutex<Vec<watch::Sender<u64>>>,
    witness: Witness,
    /// What has gone wrong, by kind and how often.
    pub struck: Mutex<BTreeMap<&'static str, u64>>,
}

#[derive(Default)]
struct Content {
    events: Vec<Recorded>,
    /// Where each stream's events are among all.
    streams: HashMap<String, Vec<usize>>,
}

/// One node's way to the log.
pub struct SimulatedLog {
    storage: Arc<Storage>,
    node: String,
    head: watch::Sender<u64>,
    /// After a failed write nothing more is written by this handle.
    broken: AtomicBool,
    /// Its node has crashed: nobody is there to hear an answer.
    dead: AtomicBool,
}

impl Storage {
    pub fn new(faults: Faults, witness: Witness) -> Arc<Self> {
        let (content, handles, struck) = Default::default();
        Arc::new(Self { faults, content, handles, witness, struck })
    }

    pub fn open(self: &Arc<Self>, node: &str) -> Arc<SimulatedLog> {
        let (head, _) = watch::channel(self.position());
        self.handles.lock().unwrap().push(head.clone());
        Arc::new(SimulatedLog {
            storage: Arc::clone(self),
            node: node.to_owned(),
            head,
            broken: AtomicBool::new(false),
            dead: AtomicBool::new(false),
        })
    }

    pub fn position(&self) -> u64 {
        self.content.lock().unwrap().events.last().map_or(0, |last| last.position)
    }

    pub fn stream(&self, stream: &str) -> Vec<Recorded> {
        self.content.lock().unwrap().stream(stream).cloned().collect()
    }

    /// How many events the stream has.
    pub fn length(&self, stream: &str) -> usize {
        self.content.lock().unwrap().streams.get(stream).map_or(0, Vec::len)
    }

    /// Everyone knows of everything.
    pub fn tell_all(&self) {
        let position = self.position();
        for head in self.handles.lock().unwrap().iter() {
            rise(head, position);
        }
    }

    pub fn strike(&self, what: &'static str) {
        *self.struck.lock().unwrap().entry(what).or_default() += 1;
    }

    fn apply(
        &self,
        stream: &str,
        expected: Expected,
        events: Vec<NewEvent>,
    ) -> Result<Appended, Error> {
        let mut dice = self.faults.dice("position");
        let gap = if self.faults.strike(&mut dice) { dice.below(5) } else { 0 };
        let (written, answer) =
            self.content.lock().unwrap().append(stream, expected, events, gap)?;
        if !written.is_empty() {
            (self.witness)(&written);
        }
        Ok(answer)
    }

    /// Other nodes hear of it later.
    fn tell_others(self: &Arc<Self>, position: u64) {
        let handles = self.handles.lock().unwrap().clone();
        for (number, head) in handles.into_iter().enumerate() {
            if self.faults.are_calm() {
                rise(&head, position);
                continue;
            }
            let mut dice = self.faults.dice(&format!("news {number}"));
            let storage = Arc::clone(self);
            tokio::spawn(async move {
                storage.faults.delay(&mut dice).await;
                rise(&head, position);
            });
        }
    }
}

fn rise(head: &watch::Sender<u64>, position: u64) {
    head.send_if_modified(|known| {
        let rises = *known < position;
        *known = position.max(*known);
        rises
    });
}

impl Content {
    fn stream(&self, stream: &str) -> impl Iterator<Item = &Recorded> {
        self.streams.get(stream).into_iter().flatten().map(|index| &self.events[*index])
    }

    /// What was written, which is nothing if it was there, and the answer.
    fn append(
        &mut self,
        stream: &str,
        expected: Expected,
        events: Vec<NewEvent>,
        gap: u64,
    ) -> Result<(Vec<Recorded>, Appended), Error> {
        let present: Vec<&Recorded> = self.stream(stream).collect();
        let end = present.len();
        let actual = present.last().map(|last| last.revision);
        let conflict = || Error::Conflict { stream: stream.to_owned(), expected, actual };
        let start = match expected {
            Expected::NoStream => 0,
            Expected::Revision(last) => usize::try_from(last)
                .ok()
                .and_then(|last| last.checked_add(1))
                .ok_or_else(conflict)?,
            Expected::Any => {
                let from = end.saturating_sub(usize::try_from(REPEAT_WINDOW).unwrap());
                let known = present[from..].iter().position(|it| it.id == events[0].id);
                known.map_or(end, |offset| from + offset)
            }
        };
        if start > end {
            return Err(conflict());
        }
        if start < end {
            let same = present[start..].iter().zip(&events).filter(|(it, new)| it.id == new.id);
            if same.count() < events.len() {
                return Err(conflict());
            }
            let last = present[start + events.len() - 1];
            return Ok((vec![], Appended { revision: last.revision, position: last.position }));
        }
        let mut position = self.events.last().map_or(0, |last| last.position) + gap;
        let mut previous = self.events.last().map_or(GENESIS, |last| last.hash);
        let written: Vec<Recorded> = events
            .into_iter()
            .zip(u64::try_from(end).unwrap()..)
            .map(|(new, revision)| {
                position += 1;
                let NewEvent { id, kind, time, data, metadata } = new;
                let time = chrono::SubsecRound::trunc_subsecs(time, 6);
                let (stream, kind) = (stream.into(), kind.into());
                let mut event = Recorded {
                    id,
                    stream,
                    revision,
                    position,
                    kind,
                    time,
                    data: data.into(),
                    metadata: metadata.into(),
                    hash: previous,
                };
                event.hash = Link::of(&event).hash(&previous);
                previous = event.hash;
                event
            })
            .collect();
        let indexes = self.events.len()..self.events.len() + written.len();
        self.streams.entry(stream.to_owned()).or_default().extend(indexes);
        self.events.extend(written.iter().cloned());
        let last = written.last().expect("an append has events");
        Ok((written.clone(), Appended { revision: last.revision, position: last.position }))
    }
}

impl SimulatedLog {
    pub fn crash(&self) {
        self.dead.store(true, Ordering::SeqCst);
    }

    pub fn is_broken(&self) -> bool {
        self.broken.load(Ordering::SeqCst)
    }

    async fn unless_dead(&self) {
        if self.dead.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
    }

    fn unwritable(&self, why: &'static str) -> Error {
        self.storage.strike(why);
        Error::Unwritable(why.to_owned())
    }

    async fn readable(&self, what: &str) -> Result<(), Error> {
        let faults = &self.storage.faults;
        let mut dice = faults.dice(&format!("{} {what}", self.node));
        faults.delay(&mut dice).await;
        self.unless_dead().await;
        if faults.strike(&mut dice) && dice.percent(40) {
            self.storage.strike("read failed");
            return Err(Error::Storage("the network is down".to_owned()));
        }
        Ok(())
    }
}

#[async_trait::async_trait]
impl EventLog for SimulatedLog {
    async fn append(
        &self,
        stream: &str,
        expected: Expected,
        events: Vec<NewEvent>,
    ) -> Result<Appended, Error> {
        check_limits(stream, &events)?;
        let storage = &self.storage;
        let mut dice = storage.faults.dice(&format!("{} append {stream}", self.node));
        storage.faults.delay(&mut dice).await;
        self.unless_dead().await;
        self.writable()?;
        if storage.faults.strike(&mut dice) {
            match dice.below(8) {
                0 | 1 => return Err(self.unwritable("not written")),
                2 | 3 => {
                    storage.apply(stream, expected, events)?;
                    storage.tell_others(storage.position());
                    return Err(self.unwritable("written, and the answer lost"));
                }
                4 | 5 => {
                    let (storage, stream) = (Arc::clone(storage), stream.to_owned());
                    tokio::spawn(async move {
                        storage.faults.delay(&mut dice).await;
                        storage.faults.delay(&mut dice).await;
                        if storage.apply(&stream, expected, events).is_ok() {
                            storage.strike("landed late");
                        }
                        storage.tell_others(storage.position());
                    });
                    return Err(self.unwritable("under way"));
                }
                fate => {
                    self.broken.store(true, Ordering::SeqCst);
                    if fate == 6 {
                        storage.apply(stream, expected, events)?;
                        storage.tell_others(storage.position());
                    }
                    return Err(self.unwritable("the handle is broken"));
                }
            }
        }
        let answer = storage.apply(stream, expected, events);
        if matches!(answer, Err(Error::Conflict { .. })) {
            storage.strike("conflict");
        }
        if let Ok(appended) = &answer {
            rise(&self.head, appended.position);
            storage.tell_others(appended.position);
        }
        storage.faults.delay(&mut dice).await;
        self.unless_dead().await;
        answer
    }

    async fn read_stream(
        &self,
        stream: &str,
        from_revision: u64,
        limit: usize,
    ) -> Result<Vec<Recorded>, Error> {
        self.readable(stream).await?;
        let content = self.storage.content.lock().unwrap();
        let from = usize::try_from(from_revision).unwrap_or(usize::MAX);
        Ok(content.stream(stream).skip(from).take(limit).cloned().collect())
    }

    async fn read_all(&self, after: u64, limit: usize) -> Result<Vec<Recorded>, Error> {
        self.readable("all").await?;
        let content = self.storage.content.lock().unwrap();
        let from = content.events.partition_point(|event| event.position <= after);
        Ok(content.events[from..].iter().take(limit).cloned().collect())
    }

    fn head(&self) -> watch::Receiver<u64> {
        self.head.subscribe()
    }

    fn writable(&self) -> Result<(), Error> {
        match self.is_broken() {
            true => Err(Error::Unwritable("a write has failed".to_owned())),
            false => Ok(()),
        }
    }

    async fn stats(&self) -> Result<Stats, Error> {
        let content = self.storage.content.lock().unwrap();
        let events = &content.events;
        let mut types = BTreeMap::new();
        for event in events {
            *types.entry(event.kind.to_string()).or_default() += 1;
        }
        Ok(Stats {
            events: events.len() as u64,
            streams: content.streams.len() as u64,
            position: events.last().map_or(0, |last| last.position),
            head_hash: events.last().map_or(GENESIS, |last| last.hash),
            bytes: events.iter().map(|event| event.data.len() as u64).sum(),
            types,
            first: events.first().map(|event| event.time),
            last: events.last().map(|event| event.time),
        })
    }

    async fn verify(&self) -> Result<Verified, Error> {
        let content = self.storage.content.lock().unwrap();
        let mut previous = GENESIS;
        for event in &content.events {
            if Link::of(event).hash(&previous) != event.hash {
                let what = "altered".to_owned();
                return Err(Error::Corrupt { position: event.position, what });
            }
            previous = event.hash;
        }
        Ok(Verified { events: content.events.len() as u64, head_hash: previous })
    }
}

#[tokio::test]
async fn the_simulated_log_keeps_the_contract() {
    t2m::log::conformance::run(async || {
        let storage = Storage::new(Faults::new(0, 0), Box::new(|_| {}));
        storage.open("a") as Arc<dyn EventLog>
    })
    .await;
}
