//! Placing without a server: what the database would answer is looked up in a list.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use bytestring::ByteString;
use chrono::DateTime;
use tokio::sync::oneshot;
use uuid::Uuid;

use super::Seen;
use super::placing::{Before, End, Known, Lookup, Placed, place};
use super::writer::Append;
use crate::log::Expected::{Any, NoStream, Revision};
use crate::log::{Appended, Error, Expected, GENESIS, NewEvent, REPEAT_WINDOW, check_next};

fn append(stream: &str, expected: Expected, ids: &[u128]) -> Append {
    let events = ids.iter().map(|id| NewEvent {
        id: Uuid::from_u128(*id),
        kind: format!("thing.happened.v{}", id % 2),
        time: DateTime::from_timestamp_nanos(1_700_000_000_123_456_789),
        data: format!("{id}").into_bytes(),
        metadata: b"{}".to_vec(),
    });
    Append {
        stream: stream.into(),
        expected,
        events: events.collect(),
        broken: None,
        reply: oneshot::channel().0,
    }
}

/// What a database holds.
struct Held {
    head: Seen,
    ends: HashMap<ByteString, End>,
    types: HashMap<ByteString, i64>,
    events: HashMap<i64, Vec<Known>>,
}

impl Held {
    fn new() -> Self {
        let head = Seen { position: 0, hash: GENESIS };
        Self { head, ends: HashMap::new(), types: HashMap::new(), events: HashMap::new() }
    }

    fn look_up(&self, append: &Append) -> Vec<Known> {
        let lookup = Lookup::of(append, self.ends.get(&append.stream));
        let Some(Lookup { stream, from, id, length }) = lookup else { return vec![] };
        let events = &self.events[&stream];
        let from = match id {
            None => Some(from),
            Some(id) => events
                .iter()
                .rfind(|it| it.id == id && it.revision >= from)
                .map(|newest| newest.revision),
        };
        let Some(from) = from else { return vec![] };
        events.iter().filter(|it| it.revision >= from).take(length).copied().collect()
    }

    /// Places a group and holds what it writes, like a commit.
    fn commit(&mut self, group: &[Append]) -> Placed {
        let known: Vec<_> = group.iter().map(|append| self.look_up(append)).collect();
        let before = Before { head: self.head, ends: &self.ends, types: &self.types };
        let placed = place(group, &before, &known);
        for (event, (stream, _)) in placed.fresh.iter().zip(&placed.numbers) {
            let known = Known { revision: event.revision, id: event.id, position: event.position };
            self.events.entry(*stream).or_default().push(known);
            check_next(event, self.head.position, &self.head.hash).unwrap();
            self.head = Seen { position: event.position, hash: event.hash };
        }
        assert_eq!(placed.fresh.len(), placed.numbers.len());
        self.ends.extend(placed.ends.iter().map(|(name, end)| (name.clone(), *end)));
        self.types.extend(placed.new_types.iter().map(|(id, name)| (name.clone(), *id)));
        placed
    }

    fn answers(&mut self, group: &[Append]) -> Vec<Result<Appended, Option<u64>>> {
        let answers = self.commit(group).answers.into_iter();
        let actual = |error| match error {
            Error::Conflict { actual, .. } => actual,
            other => panic!("no conflict: {other}"),
        };
        answers.map(|answer| answer.map_err(actual)).collect()
    }

    fn answer(
        &mut self,
        stream: &str,
        expected: Expected,
        ids: &[u128],
    ) -> Result<Appended, Option<u64>> {
        self.answers(&[append(stream, expected, ids)]).remove(0)
    }
}

fn at(revision: u64, position: u64) -> Result<Appended, Option<u64>> {
    Ok(Appended { revision, position })
}

#[test]
fn the_appends_of_a_group_follow_each_other() {
    let mut held = Held::new();
    let group = [
        append("a", NoStream, &[1, 2]),
        append("b", Any, &[3]),
        append("a", Revision(1), &[4]),
        append("c", Revision(0), &[5]),
        append("a", Any, &[6]),
        append("a", Revision(1), &[7]),
    ];
    let answers = held.answers(&group);
    assert_eq!(answers, [at(1, 2), at(0, 3), at(2, 4), Err(None), at(3, 5), Err(Some(3))]);
    assert_eq!(held.answer("b", Revision(0), &[8]), at(1, 6));
}

#[test]
fn streams_and_types_are_numbered_once_by_where_they_first_stand() {
    let mut held = Held::new();
    let placed = held.commit(&[append("a", NoStream, &[2, 3]), append("b", Any, &[4])]);
    assert_eq!(placed.new_streams, [(1, "a".into()), (3, "b".into())]);
    let (even, odd): (ByteString, ByteString) =
        ("thing.happened.v0".into(), "thing.happened.v1".into());
    assert_eq!(placed.new_types, [(1, even.clone()), (2, odd.clone())]);
    assert_eq!(placed.numbers, [(1, 1), (1, 2), (3, 1)]);
    let placed = held.commit(&[append("b", Any, &[5]), append("a", Any, &[6])]);
    assert_eq!((placed.new_streams, placed.new_types), (vec![], vec![]));
    assert_eq!(placed.numbers, [(3, 2), (1, 1)]);
    assert_eq!(placed.fresh.iter().map(|it| &it.kind).collect::<Vec<_>>(), [&odd, &even]);
    assert_eq!(placed.ends["a"], End { id: 1, last: 2 });
}

#[test]
fn an_event_is_kept_as_it_came_with_its_time_to_the_microsecond() {
    let placed = Held::new().commit(&[append("a", Any, &[7])]);
    let event = &placed.fresh[0];
    assert_eq!((event.id, &*event.stream, event.revision), (Uuid::from_u128(7), "a", 0));
    assert_eq!((&event.data[..], &event.metadata[..]), (&b"7"[..], &b"{}"[..]));
    assert_eq!(event.time.timestamp_nanos_opt(), Some(1_700_000_000_123_456_000));
}

#[test]
fn a_repeat_is_answered_what_the_first_append_was() {
    let first = |held: &mut Held| {
        let answers = held.answers(&[append("a", NoStream, &[1, 2]), append("b", Any, &[3])]);
        assert_eq!(answers, [at(1, 2), at(0, 3)]);
    };
    let repeats = |held: &mut Held| {
        assert_eq!(held.answer("a", NoStream, &[1, 2]), at(1, 2));
        assert_eq!(held.answer("a", NoStream, &[1]), at(0, 1));
        assert_eq!(held.answer("a", Revision(0), &[2]), at(1, 2));
        assert_eq!(held.answer("a", Any, &[1, 2]), at(1, 2));
        assert_eq!(held.answer("a", Any, &[2]), at(1, 2));
        assert_eq!(held.answer("b", Any, &[3]), at(0, 3));
    };
    let mut held = Held::new();
    first(&mut held);
    repeats(&mut held);
    assert_eq!(held.answer("a", Any, &[4]), at(2, 4));
    repeats(&mut held);
    assert_eq!(held.head.position, 4, "nothing was written twice");
    // A repeat in the group of its first.
    let twice = |expected| [append("c", expected, &[5, 6]), append("c", expected, &[5, 6])];
    assert_eq!(Held::new().answers(&twice(Any)), [at(1, 2), at(1, 2)]);
    assert_eq!(Held::new().answers(&twice(NoStream)), [at(1, 2), at(1, 2)]);
    // One whose beginning was there before the group and whose end is of the group.
    let across = [append("a", Any, &[7]), append("a", Revision(1), &[4, 7])];
    assert_eq!(held.answers(&across), [at(3, 5), at(3, 5)]);
}

#[test]
fn what_only_overlaps_a_repeat_is_a_conflict() {
    let mut held = Held::new();
    held.commit(&[append("a", NoStream, &[1, 2, 3])]);
    for (expected, ids) in [
        (NoStream, &[1, 2, 3, 4][..]),
        (NoStream, &[2]),
        (NoStream, &[9]),
        (Any, &[3, 4]),
        (Any, &[1, 3]),
        (Revision(0), &[3]),
        (Revision(0), &[2, 4]),
        (Revision(1), &[3, 4]),
        (Revision(3), &[4]),
        (Revision(u64::MAX), &[4]),
    ] {
        assert_eq!(held.answer("a", expected, ids), Err(Some(2)), "{expected:?} {ids:?}");
    }
    assert_eq!(held.head.position, 3);
    assert_eq!(held.answer("a", Revision(2), &[4]), at(3, 4));
}

#[test]
fn the_database_is_asked_only_for_what_may_be_a_repeat() {
    let end = End { id: 5, last: 1000 };
    let of = |expected, ids: &[u128]| Lookup::of(&append("a", expected, ids), Some(&end));
    let lookup = |from, id: Option<u128>, length| {
        Some(Lookup { stream: 5, from, id: id.map(Uuid::from_u128), length })
    };
    assert_eq!(of(Revision(1000), &[1]), None);
    assert_eq!(of(Revision(1001), &[1]), None);
    assert_eq!(of(Revision(999), &[1]), lookup(1000, None, 1));
    assert_eq!(of(NoStream, &[1, 2]), lookup(0, None, 2));
    assert_eq!(of(Any, &[7, 8]), lookup(1000 - REPEAT_WINDOW - 2, Some(7), 2));
    assert_eq!(Lookup::of(&append("a", Any, &[1]), None), None);
}

#[test]
fn a_commit_that_is_placed_anew_names_the_same_append() {
    let broken = Some(Arc::new(AtomicBool::new(false)));
    let in_turn = |stream, expected, id| {
        let broken = broken.clone();
        Append { broken, ..append(stream, expected, &[id]) }
    };
    let group = [
        in_turn("a", Any, 1),
        in_turn("b", Revision(7), 2),
        in_turn("c", Any, 3),
        append("d", Any, &[4]),
    ];
    // The connection broke over the first one, and nothing was written.
    let first = Held::new().commit(&group).answers;
    let mut held = Held::new();
    let again = held.commit(&group).answers;
    assert_eq!(first, again);
    assert!(matches!(
        &again[..],
        [Ok(_), Err(Error::Conflict { .. }), Err(Error::Unwritable(_)), Ok(_)]
    ));
    // Once that is answered nothing follows it, in a later commit either.
    group[1].break_off();
    let later = held.commit(&[in_turn("e", Any, 5)]).answers;
    assert!(matches!(later[..], [Err(Error::Unwritable(_))]));
}
