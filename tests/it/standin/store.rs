//! What the stand-in holds, and a KurrentDB server's rules for it: expected revisions, repeats by
//! event id, commit positions with gaps between them.

use std::collections::HashMap;
use std::sync::Mutex;

use tokio::sync::watch;
use uuid::Uuid;

/// As the server's default.
pub const MAX_APPEND: usize = 1024 * 1024;

/// An event as it is kept.
#[derive(Debug, Clone)]
pub struct Kept {
    pub id: Uuid,
    pub stream: String,
    pub revision: u64,
    pub position: u64,
    pub kind: String,
    pub content_type: String,
    pub metadata: Vec<u8>,
    pub data: Vec<u8>,
}

#[derive(Default)]
struct Kepts {
    events: Vec<Kept>,
    /// Places among the events.
    streams: HashMap<String, Vec<usize>>,
    /// Where the next record begins.
    end: u64,
}

/// Shared by the nodes of a cluster.
pub struct Store {
    kept: Mutex<Kepts>,
    /// One append at a time, as a leader has it.
    writing: Mutex<()>,
    /// How many events there are.
    pub grown: watch::Sender<usize>,
}

/// What becomes of an append.
pub enum Outcome {
    /// The last revision and the position of the last event.
    Done(u64, u64),
    /// The stream's last revision.
    Unexpected(Option<u64>),
}

impl Store {
    pub fn new() -> Self {
        let (kept, writing) = (Mutex::default(), Mutex::default());
        let store = Self { kept, writing, grown: watch::Sender::new(0) };
        store.clear();
        store
    }

    /// As a server that is set up anew.
    pub fn clear(&self) {
        // A server writes something of its own first.
        *self.kept.lock().unwrap() = Kepts { end: 226, ..Kepts::default() };
        self.grown.send_replace(0);
        self.write_own();
    }

    /// Takes away all events from a position on.
    pub fn cut(&self, position: u64) {
        let mut kept = self.kept.lock().unwrap();
        kept.events.retain(|event| event.position < position);
        let length = kept.events.len();
        kept.streams.values_mut().for_each(|places| places.retain(|place| *place < length));
        drop(kept);
        self.grown.send_replace(length);
    }

    /// An event of the server's own.
    pub fn write_own(&self) {
        let own = Kept {
            id: Uuid::from_u128(rand::random()),
            stream: "$stats-127.0.0.1:2113".to_owned(),
            revision: 0,
            position: 0,
            kind: "$statsCollected".to_owned(),
            content_type: "application/json".to_owned(),
            metadata: Vec::new(),
            data: vec![b'1'; 300],
        };
        self.write(vec![own]);
    }

    /// Writes for somebody else, past every rule.
    pub fn write(&self, events: Vec<Kept>) -> (u64, u64) {
        let mut kept = self.kept.lock().unwrap();
        let mut last = (0, 0);
        for mut event in events {
            let places = kept.streams.get(&event.stream).map_or(0, Vec::len);
            event.revision = places as u64;
            event.position = kept.end;
            let size = event.data.len() + event.metadata.len() + event.stream.len();
            kept.end += size as u64 + 91;
            last = (event.revision, event.position);
            let place = kept.events.len();
            kept.streams.entry(event.stream.clone()).or_default().push(place);
            kept.events.push(event);
        }
        let length = kept.events.len();
        drop(kept);
        self.grown.send_replace(length);
        last
    }

    /// `expected` is the revision of the last event, none for no stream.
    pub fn append(&self, expected: Option<u64>, events: Vec<Kept>) -> Outcome {
        let _writing = self.writing.lock().unwrap();
        let stream = events[0].stream.clone();
        let there = self.stream(&stream);
        let last = there.last().map(|event| event.revision);
        let next = usize::try_from(expected.map_or(0, |last| last + 1)).unwrap_or(usize::MAX);
        if next < there.len() {
            let there = &there[next..there.len().min(next + events.len())];
            let same = there.iter().map(|event| event.id).eq(events.iter().map(|event| event.id));
            return match there.last().filter(|_| same) {
                Some(last) => Outcome::Done(last.revision, last.position),
                None => Outcome::Unexpected(last),
            };
        }
        if next > there.len() {
            return Outcome::Unexpected(last);
        }
        let (revision, position) = self.write(events);
        if revision % 5 == 0 {
            self.write_own();
        }
        Outcome::Done(revision, position)
    }

    pub fn stream(&self, name: &str) -> Vec<Kept> {
        let kept = self.kept.lock().unwrap();
        let places = kept.streams.get(name).map_or(&[][..], |places| places);
        places.iter().map(|place| kept.events[*place].clone()).collect()
    }

    /// All events from one on, by count.
    pub fn from(&self, count: usize) -> Vec<Kept> {
        let kept = self.kept.lock().unwrap();
        kept.events.get(count..).unwrap_or_default().to_vec()
    }

    /// How many events are before a position; none where no event begins, as servers do not look.
    pub fn before(&self, position: u64) -> Option<usize> {
        let kept = self.kept.lock().unwrap();
        if position >= kept.end {
            return Some(kept.events.len());
        }
        kept.events.binary_search_by_key(&position, |event| event.position).ok()
    }

    /// Changes an event in a way that no server does.
    pub fn alter(&self, position: u64, change: impl FnOnce(&mut Kept)) {
        let mut kept = self.kept.lock().unwrap();
        let event = kept.events.iter_mut().find(|event| event.position == position);
        change(event.expect("there is an event"));
    }
}
