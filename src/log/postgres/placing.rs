//! Where a group's appends go: decided in memory, under the writers' lock, from the ends of their
//! streams and what is recorded where an append may be a repeat.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use bytestring::ByteString;
use chrono::SubsecRound;
use uuid::Uuid;

use super::Seen;
use super::writer::Append;
use crate::log::{Appended, Error, Expected, Link, REPEAT_WINDOW, Recorded, to_sql};

/// A stream's number and its last revision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct End {
    pub(super) id: i64,
    pub(super) last: u64,
}

/// An event of a stream, as far as a repeat is recognised by it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Known {
    pub(super) revision: u64,
    pub(super) id: Uuid,
    pub(super) position: u64,
}

/// What has to be read to say whether an append is a repeat: `length` events on, from a revision or
/// from the newest event of this id that is not before a revision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Lookup {
    pub(super) stream: i64,
    pub(super) from: u64,
    pub(super) id: Option<Uuid>,
    pub(super) length: usize,
}

impl Lookup {
    /// None when no event of the database can answer: there is no stream, or its end is expected.
    pub(super) fn of(append: &Append, end: Option<&End>) -> Option<Self> {
        let end = end?;
        let length = append.events.len();
        let (from, id) = match append.expected {
            Expected::Revision(last) if last >= end.last => return None,
            Expected::Revision(last) => (last + 1, None),
            Expected::NoStream => (0, None),
            Expected::Any => {
                let oldest = end.last.saturating_sub(REPEAT_WINDOW + length as u64);
                (oldest, Some(append.events.first()?.id))
            }
        };
        Some(Self { stream: end.id, from, id, length })
    }
}

/// The outcome of a group, and what is to be written for it.
#[derive(Default)]
pub(super) struct Placed {
    pub(super) answers: Vec<Result<Appended, Error>>,
    pub(super) fresh: Vec<Recorded>,
    /// Numbers of stream and type of each of `fresh`.
    pub(super) numbers: Vec<(i64, i64)>,
    /// The streams' new ends.
    pub(super) ends: HashMap<ByteString, End>,
    pub(super) new_streams: Vec<(i64, ByteString)>,
    pub(super) new_types: Vec<(i64, ByteString)>,
}

/// What was in the log before.
pub(super) struct Before<'a> {
    pub(super) head: Seen,
    pub(super) ends: &'a HashMap<ByteString, End>,
    pub(super) types: &'a HashMap<ByteString, i64>,
}

/// Places a group; `known` has what was looked up for each of its appends. A commit that breaks is
/// placed anew, so that nothing of this is noted outside before the answers are sent.
pub(super) fn place(group: &[Append], before: &Before<'_>, known: &[Vec<Known>]) -> Placed {
    let mut placing =
        Placing { before, head: before.head, placed: Placed::default(), of_stream: HashMap::new() };
    let mut broken = HashSet::new();
    for (append, known) in group.iter().zip(known) {
        let turn = append.broken.as_ref().map(Arc::as_ptr);
        let follows = turn.is_some_and(|turn| broken.contains(&turn));
        let answer = match follows || append.follows_a_failure() {
            true => Err(Error::Unwritable("an append before it was not written".into())),
            false => placing.place(append, known),
        };
        if answer.is_err() {
            broken.extend(turn);
        }
        placing.placed.answers.push(answer);
    }
    placing.placed
}

struct Placing<'a> {
    before: &'a Before<'a>,
    head: Seen,
    placed: Placed,
    /// What the group itself has added.
    of_stream: HashMap<ByteString, Vec<Known>>,
}

impl Placing<'_> {
    fn place(&mut self, append: &Append, known: &[Known]) -> Result<Appended, Error> {
        let end = self.placed.ends.get(&append.stream);
        let Some(end) = end.or_else(|| self.before.ends.get(&append.stream)).copied() else {
            return match append.expected {
                Expected::Revision(_) => Err(append.conflict(None)),
                Expected::Any | Expected::NoStream => {
                    let id = to_sql(self.head.position + 1);
                    self.placed.new_streams.push((id, append.stream.clone()));
                    Ok(self.insert(id, 0, append))
                }
            };
        };
        let repeat_from = match append.expected {
            Expected::Revision(last) if last == end.last => None,
            Expected::Revision(last) => Some(last.saturating_add(1)),
            Expected::NoStream => Some(0),
            Expected::Any => self.newest_of_first_id(append, known),
        };
        match repeat_from {
            None => Ok(self.insert(end.id, end.last + 1, append)),
            Some(first) => self
                .recorded_at(first, append, known)
                .ok_or_else(|| append.conflict(Some(end.last))),
        }
    }

    fn added(&self, append: &Append) -> &[Known] {
        self.of_stream.get(&append.stream).map_or(&[], Vec::as_slice)
    }

    fn newest_of_first_id(&self, append: &Append, known: &[Known]) -> Option<u64> {
        let id = append.events.first()?.id;
        let mut newest_first = self.added(append).iter().rev().chain(known.iter().rev());
        newest_first.find(|it| it.id == id).map(|it| it.revision)
    }

    /// The original answer, if exactly these events are in the stream from revision `first` on.
    fn recorded_at(&self, first: u64, append: &Append, known: &[Known]) -> Option<Appended> {
        let recorded = known.iter().chain(self.added(append)).filter(|it| it.revision >= first);
        let mut recorded = recorded.take(append.events.len());
        let mut answer = None;
        for event in &append.events {
            let it = recorded.next()?;
            let revision = answer.map_or(first, |last: Appended| last.revision + 1);
            if it.id != event.id || it.revision != revision {
                return None;
            }
            answer = Some(Appended { revision, position: it.position });
        }
        answer
    }

    fn insert(&mut self, stream: i64, first: u64, append: &Append) -> Appended {
        let mut revision = first;
        for (event, at) in append.events.iter().zip(first..) {
            revision = at;
            let position = self.head.position + 1;
            let (kind, kind_id) = self.find_type(&event.kind, position);
            let mut recorded = Recorded {
                id: event.id,
                stream: append.stream.clone(),
                revision,
                position,
                kind,
                // As a reader of the database sees it.
                time: event.time.trunc_subsecs(6),
                data: event.data.clone().into(),
                metadata: event.metadata.clone().into(),
                hash: [0; 32],
            };
            recorded.hash = Link::of(&recorded).hash(&self.head.hash);
            self.head = Seen { position, hash: recorded.hash };
            let added = self.of_stream.entry(append.stream.clone()).or_default();
            added.push(Known { revision, id: event.id, position });
            self.placed.numbers.push((stream, kind_id));
            self.placed.fresh.push(recorded);
        }
        let end = End { id: stream, last: revision };
        self.placed.ends.insert(append.stream.clone(), end);
        Appended { revision, position: self.head.position }
    }

    fn find_type(&mut self, name: &str, position: u64) -> (ByteString, i64) {
        if let Some((name, id)) = self.before.types.get_key_value(name) {
            return (name.clone(), *id);
        }
        if let Some((id, name)) = self.placed.new_types.iter().find(|(_, it)| &**it == name) {
            return (name.clone(), *id);
        }
        let name: ByteString = name.into();
        self.placed.new_types.push((to_sql(position), name.clone()));
        (name, to_sql(position))
    }
}
