//! The way from one log into another of any engine: streams, revisions, ids and contents are the
//! same there; positions and hashes are that log's own.
//!
//! What all engines agree on is the log as an export has it: positions 1, 2, 3 … and one chain of
//! hashes over all of it. An engine without gaps has it so itself.

use super::{
    Error, EventLog, Expected, GENESIS, Link, MAX_EVENTS, NewEvent, Recorded, ToAppend, Verified,
    check_next, check_recorded,
};

/// The most bytes that are appended at once: no more than a server takes as it is set up, with what
/// it adds to a thousand events.
const BYTES: usize = 512 * 1024;
/// Events that are read at once.
const PAGE: usize = 1000;

/// A log read from its beginning, as an export has it.
pub struct Reading<'a> {
    log: &'a dyn EventLog,
    /// The position in the log itself up to which it was read.
    after: u64,
    end: (u64, [u8; 32]),
    /// Whether its own positions and hashes are an export's; not known before the first event.
    is_so_itself: Option<bool>,
}

impl<'a> Reading<'a> {
    pub fn of(log: &'a dyn EventLog) -> Self {
        Self { log, after: 0, end: (0, GENESIS), is_so_itself: None }
    }

    /// The events that follow; none at the end for now.
    ///
    /// # Errors
    /// The log cannot be read. One whose chain an export does not carry is verified first, and must
    /// be sound: afterwards its damage could not be told.
    pub async fn page(&mut self) -> Result<Vec<Recorded>, Error> {
        let mut page = self.log.read_all(self.after, PAGE).await?;
        let Some(last) = page.last() else { return Ok(page) };
        self.after = last.position;
        let is_so_itself = match self.is_so_itself {
            Some(known) => known,
            None => {
                let known = is_so_itself(&page[0]);
                if !known {
                    self.log.verify().await?;
                }
                *self.is_so_itself.insert(known)
            }
        };
        if is_so_itself {
            // As it is, damage and all: who takes it in looks at the chain.
            self.end = page.last().map_or(self.end, |last| (last.position, last.hash));
            return Ok(page);
        }
        for event in &mut page {
            event.position = self.end.0 + 1;
            event.hash = Link::of(event).hash(&self.end.1);
            self.end = (event.position, event.hash);
        }
        Ok(page)
    }

    /// Whether positions of the log itself are positions here.
    pub fn keeps_positions(&self) -> bool {
        self.is_so_itself.unwrap_or(true)
    }

    /// The last event's number and hash.
    pub fn end(&self) -> (u64, [u8; 32]) {
        self.end
    }
}

/// Whether a log that begins with `first` has an export's positions and hashes of its own.
fn is_so_itself(first: &Recorded) -> bool {
    check_next(first, 0, &GENESIS).is_ok()
}

/// What an export has that is taken now: how many events, and the hash of the last.
///
/// # Errors
/// As [`Reading::page`].
pub async fn extent(log: &dyn EventLog) -> Result<Verified, Error> {
    let first = log.read_all(0, 1).await?;
    if !first.first().is_none_or(is_so_itself) {
        return content_of(log, |_| {}).await;
    }
    let stats = log.stats().await?;
    Ok(Verified { events: stats.position, head_hash: stats.head_hash })
}

/// Reads the log to its end, as an export has it: how many events it has, and the hash of the last.
/// Logs with the same events in the same order have the same, whatever their engines.
///
/// # Errors
/// As [`Reading::page`].
pub async fn content_of(
    log: &dyn EventLog,
    mut progress: impl FnMut(u64),
) -> Result<Verified, Error> {
    let mut reading = Reading::of(log);
    while !reading.page().await?.is_empty() {
        progress(reading.end().0);
    }
    let (events, head_hash) = reading.end();
    Ok(Verified { events, head_hash })
}

/// Where a transfer stopped: at which of the events that were handed over last, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{error}")]
pub struct Stopped {
    pub at: usize,
    pub error: Error,
}

impl Stopped {
    fn at(at: usize) -> impl FnOnce(Error) -> Self {
        move |error| Self { at, error }
    }
}

/// Goes on from `end` through the events that follow, as an export has them.
///
/// # Errors
/// [`Error::Corrupt`] when one does not follow, [`Error::Invalid`] when it is beyond the contract's
/// limits.
pub fn follow(end: &mut (u64, [u8; 32]), events: &[Recorded]) -> Result<(), Stopped> {
    for (at, event) in events.iter().enumerate() {
        let checked = check_next(event, end.0, &end.1).and_then(|()| check_recorded(event));
        checked.map_err(Stopped::at(at))?;
        *end = (event.position, event.hash);
    }
    Ok(())
}

/// On the way into a log that is empty, or holds the beginning of what comes: an earlier transfer,
/// which broke off. Whatever it holds stays once.
pub struct Carrying<'a> {
    target: &'a dyn EventLog,
    /// What it held before, until all of that was compared.
    held: Option<Reading<'a>>,
    page: std::vec::IntoIter<Recorded>,
    end: (u64, [u8; 32]),
    appended: u64,
    has_begun: bool,
}

impl<'a> Carrying<'a> {
    pub fn into(target: &'a dyn EventLog) -> Self {
        let held = Some(Reading::of(target));
        Self {
            target,
            held,
            page: Vec::new().into_iter(),
            end: (0, GENESIS),
            appended: 0,
            has_begun: false,
        }
    }

    /// The events that were not there yet.
    pub fn appended(&self) -> u64 {
        self.appended
    }

    /// Whether anything was appended, or may have been.
    pub fn has_begun(&self) -> bool {
        self.has_begun
    }

    /// Takes the events that follow, as an export has them.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when one does not follow, [`Error::Foreign`] when the log holds another one
    /// in its place, or what the log says. Those before it are there.
    pub async fn take(&mut self, events: &[Recorded]) -> Result<(), Stopped> {
        let there = self.compare(events).await?;
        let fresh = &events[there..];
        let sound = fresh.iter().enumerate().find_map(|(nth, event)| {
            let checked = self.check(event);
            checked.err().map(|error| Stopped { at: there + nth, error })
        });
        let until = sound.as_ref().map_or(events.len(), |stopped| stopped.at);
        self.has_begun |= there < until;
        let shift = |stopped: Stopped| Stopped { at: there + stopped.at, ..stopped };
        append(self.target, &events[there..until]).await.map_err(shift)?;
        self.appended += (until - there) as u64;
        sound.map_or(Ok(()), Err)
    }

    /// Whether the log holds nothing but the beginning of `events`, and how much of it that is;
    /// nothing is appended.
    ///
    /// # Errors
    /// As [`Carrying::take`].
    pub async fn compare(&mut self, events: &[Recorded]) -> Result<usize, Stopped> {
        for (at, event) in events.iter().enumerate() {
            let Some(held) = self.next_held().await.map_err(Stopped::at(at))? else {
                return Ok(at);
            };
            self.check(event).map_err(Stopped::at(at))?;
            if !is_same(&held, event) {
                let error = Error::Foreign("the log holds another event there".into());
                return Err(Stopped { at, error });
            }
        }
        Ok(events.len())
    }

    /// Reads all of the log once more, and compares it with what was taken.
    ///
    /// # Errors
    /// It holds more, its chain is broken, or it is not the same.
    pub async fn finish(mut self, progress: impl FnMut(u64)) -> Result<Verified, Error> {
        if self.next_held().await?.is_some() {
            let events = self.end.0;
            return Err(Error::Foreign(format!("the log holds more than these {events} events")));
        }
        self.target.verify().await?;
        let found = content_of(self.target, progress).await?;
        let (events, head_hash) = self.end;
        match found == (Verified { events, head_hash }) {
            true => Ok(found),
            false => Err(Error::Foreign(format!(
                "the log does not read as what was brought: {} events for {events}; somebody else \
                 has written to it meanwhile",
                found.events
            ))),
        }
    }

    fn check(&mut self, event: &Recorded) -> Result<(), Error> {
        check_next(event, self.end.0, &self.end.1)?;
        self.end = (event.position, event.hash);
        Ok(())
    }

    /// What it held before, one after the other.
    async fn next_held(&mut self) -> Result<Option<Recorded>, Error> {
        loop {
            if let Some(event) = self.page.next() {
                return Ok(Some(event));
            }
            let Some(held) = &mut self.held else { return Ok(None) };
            let page = held.page().await?;
            if page.is_empty() {
                self.held = None;
            }
            self.page = page.into_iter();
        }
    }
}

fn is_same(one: &Recorded, other: &Recorded) -> bool {
    one.stream == other.stream && one.revision == other.revision && new(one) == new(other)
}

/// Appends what another log holds, in its order: each append takes the run of events of one stream,
/// so that its order against other streams is kept too.
async fn append(target: &dyn EventLog, events: &[Recorded]) -> Result<(), Stopped> {
    let (mut appends, mut starts, mut rest) = (Vec::new(), Vec::new(), events);
    while let Some(first) = rest.first() {
        starts.push(events.len() - rest.len());
        let (run, others) = rest.split_at(run_of(rest));
        let expected = match first.revision.checked_sub(1) {
            None => Expected::NoStream,
            Some(last) => Expected::Revision(last),
        };
        let events = run.iter().map(new).collect();
        // Copied: the log that takes it remembers its name, not the page that it was read in.
        let stream = (*first.stream).into();
        appends.push(ToAppend { stream, expected, events });
        rest = others;
    }
    let appended = target.append_in_turn(appends).await;
    appended.map_err(|(nth, error)| Stopped { at: starts.get(nth).copied().unwrap_or(0), error })
}

/// How many of them, from the first on, are one stream's and fit into one append.
fn run_of(events: &[Recorded]) -> usize {
    let Some(first) = events.first() else { return 0 };
    let mut bytes = 0;
    let fits =
        events.iter().zip(first.revision..).take(MAX_EVENTS).take_while(|(event, revision)| {
            bytes += event.data.len() + event.metadata.len();
            event.stream == first.stream
                && event.revision == *revision
                && (bytes <= BYTES || *revision == first.revision)
        });
    fits.count()
}

fn new(event: &Recorded) -> NewEvent {
    NewEvent {
        id: event.id,
        kind: event.kind.to_string(),
        time: event.time,
        data: event.data.to_vec(),
        metadata: event.metadata.to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use chrono::DateTime;
    use uuid::Uuid;

    use super::*;
    use crate::log::EmbeddedLog;

    async fn filled(path: &std::path::Path) -> EmbeddedLog {
        let log = EmbeddedLog::open(path).unwrap();
        for number in 0..60_u128 {
            let events = (0..=number % 3).map(|nth| NewEvent {
                id: Uuid::from_u128(number * 10 + nth),
                kind: "thing.happened.v1".to_owned(),
                time: DateTime::UNIX_EPOCH,
                data: format!("{{\"n\":{number}}}").into_bytes(),
                metadata: b"{}".to_vec(),
            });
            let stream = format!("thing-{}", number % 7);
            log.append(&stream, Expected::Any, events.collect()).await.unwrap();
        }
        log
    }

    fn recorded(stream: &str, revision: u64, bytes: usize) -> Recorded {
        Recorded {
            id: Uuid::from_u128(revision.into()),
            stream: stream.into(),
            revision,
            position: revision + 1,
            kind: "thing.happened.v1".into(),
            time: DateTime::UNIX_EPOCH,
            data: vec![b' '; bytes / 2].into(),
            metadata: vec![b' '; bytes / 2].into(),
            hash: [0; 32],
        }
    }

    #[test]
    fn a_run_is_of_one_stream_without_gaps_and_fits_into_one_append() {
        let run = |events: &[(&str, u64, usize)]| {
            let events =
                events.iter().map(|(stream, revision, bytes)| recorded(stream, *revision, *bytes));
            run_of(&events.collect::<Vec<_>>())
        };
        assert_eq!(run(&[]), 0);
        assert_eq!(run(&[("a", 5, 2), ("a", 6, 2), ("b", 0, 2), ("a", 7, 2)]), 2);
        assert_eq!(run(&[("a", 5, 2), ("a", 7, 2)]), 1);
        assert_eq!(run(&[("a", 0, BYTES / 2), ("a", 1, BYTES / 2), ("a", 2, 2)]), 2);
        assert_eq!(run(&[("a", 5, BYTES + 2), ("a", 6, 2)]), 1, "one goes whatever it has");
        let many: Vec<_> = (0..1500).map(|revision| recorded("a", revision, 2)).collect();
        assert_eq!(run_of(&many), MAX_EVENTS);
    }

    #[tokio::test]
    async fn a_log_that_holds_something_else_is_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let target = EmbeddedLog::open(&dir.path().join("log.sqlite")).unwrap();
        let events: Vec<_> = (0..4).map(|revision| recorded("a", revision, 2)).collect();
        append(&target, &events[..2]).await.unwrap();
        let mut other = events.clone();
        other[1].id = Uuid::from_u128(99);
        for wrong in [&other[..], &other[1..], &events[3..]] {
            let refused = append(&target, wrong).await;
            assert!(
                matches!(refused, Err(Stopped { error: Error::Conflict { .. }, .. })),
                "{refused:?}"
            );
        }
        assert_eq!(target.read_all(0, 10).await.unwrap().len(), 2);
    }

    #[test]
    fn an_event_is_the_same_in_another_log_at_whatever_position() {
        let event = recorded("a", 1, 2);
        let elsewhere = Recorded { position: 9, hash: [9; 32], ..event.clone() };
        assert!(is_same(&event, &elsewhere));
        let id = Uuid::from_u128(99);
        for other in [
            Recorded { stream: "b".into(), ..event.clone() },
            Recorded { revision: 2, ..event.clone() },
            Recorded { id, ..event.clone() },
        ] {
            assert!(!is_same(&event, &other), "{other:?}");
        }
    }

    #[tokio::test]
    async fn an_event_that_somebody_else_has_come_before_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let events = filled(&dir.path().join("a.sqlite")).await.read_all(0, 1000).await.unwrap();
        let target = EmbeddedLog::open(&dir.path().join("b.sqlite")).unwrap();
        let mut carrying = Carrying::into(&target);
        let (first, rest) = events.split_at(20);
        carrying.take(&first[..5]).await.unwrap();
        assert!(carrying.has_begun());
        carrying.take(&first[5..]).await.unwrap();
        assert_eq!(carrying.appended(), 20);
        // The first event of the stream that begins last.
        let is_first = |at: &usize| rest[..*at].iter().all(|it| it.stream != rest[*at].stream);
        let at = (0..rest.len()).rev().find(is_first).unwrap();
        let other = NewEvent { id: Uuid::from_u128(9999), ..new(&rest[at]) };
        target.append(&rest[at].stream, Expected::Any, vec![other]).await.unwrap();
        let stopped = carrying.take(rest).await.unwrap_err();
        assert!(matches!(stopped.error, Error::Conflict { .. }), "{stopped:?}");
        assert_eq!(stopped.at, at);
    }

    #[tokio::test]
    async fn what_precedes_an_event_that_does_not_follow_is_there_and_it_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let mut events =
            filled(&dir.path().join("a.sqlite")).await.read_all(0, 1000).await.unwrap();
        let target = EmbeddedLog::open(&dir.path().join("b.sqlite")).unwrap();
        append(&target, &events[..5]).await.unwrap();
        events[8].hash = [0; 32];
        let stopped = Carrying::into(&target).take(&events).await.unwrap_err();
        assert!(matches!(stopped.error, Error::Corrupt { position: 9, .. }), "{stopped:?}");
        assert_eq!(stopped.at, 8);
        assert_eq!(target.read_all(0, 1000).await.unwrap(), events[..8]);
    }

    #[tokio::test]
    async fn what_does_not_follow_is_found_before_anything_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let events = filled(&dir.path().join("a.sqlite")).await.read_all(0, 1000).await.unwrap();
        let mut end = (0, GENESIS);
        for page in events.chunks(7) {
            follow(&mut end, page).unwrap();
        }
        assert_eq!(end, events.last().map(|last| (last.position, last.hash)).unwrap());
        let mut gap = events.clone();
        gap.remove(4);
        let mut altered = events.clone();
        altered[4].data = Bytes::from_static(b"{}");
        for wrong in [&gap, &altered] {
            let stopped = follow(&mut (0, GENESIS), wrong).unwrap_err();
            assert!(matches!(
                stopped,
                Stopped { at: 4, error: Error::Corrupt { position: 5, .. } }
            ));
        }
        // Its hash is right, and yet no log takes it.
        let mut nameless = events.clone();
        nameless[4].stream = "".into();
        nameless[4].hash = Link::of(&nameless[4]).hash(&nameless[3].hash);
        let stopped = follow(&mut (0, GENESIS), &nameless).unwrap_err();
        assert!(matches!(stopped, Stopped { at: 4, error: Error::Invalid(_) }), "{stopped:?}");
    }

    async fn carry(target: &dyn EventLog, events: &[Recorded]) -> Result<Verified, Stopped> {
        let mut carrying = Carrying::into(target);
        for page in events.chunks(7) {
            carrying.take(page).await?;
        }
        carrying.finish(|_| {}).await.map_err(Stopped::at(usize::MAX))
    }

    #[tokio::test]
    async fn a_transfer_that_broke_off_anywhere_is_ended_by_the_next_one() {
        let dir = tempfile::tempdir().unwrap();
        let source = filled(&dir.path().join("a.sqlite")).await;
        let events = source.read_all(0, 1000).await.unwrap();
        let whole = content_of(&source, |_| {}).await.unwrap();
        assert_eq!(
            whole,
            source.verify().await.unwrap(),
            "an engine without gaps has it so itself"
        );
        for upto in 0..=events.len() {
            let target = EmbeddedLog::open(&dir.path().join(format!("{upto}.sqlite"))).unwrap();
            append(&target, &events[..upto]).await.unwrap();
            let mut carrying = Carrying::into(&target);
            carrying.take(&events[..upto]).await.unwrap();
            assert!(!carrying.has_begun(), "all of it was there");
            assert_eq!(carry(&target, &events).await, Ok(whole), "after {upto}");
            assert_eq!(target.read_all(0, 1000).await.unwrap(), events);
        }
    }

    #[tokio::test]
    async fn what_does_not_fit_is_named_and_nothing_of_it_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let events = filled(&dir.path().join("a.sqlite")).await.read_all(0, 1000).await.unwrap();
        let target = EmbeddedLog::open(&dir.path().join("b.sqlite")).unwrap();
        let mut gap = events.clone();
        gap.remove(4);
        let mut altered = events.clone();
        altered[4].data = Bytes::from_static(b"{}");
        for wrong in [gap, altered] {
            let stopped = Carrying::into(&target).take(&wrong).await.unwrap_err();
            assert!(matches!(
                stopped,
                Stopped { at: 4, error: Error::Corrupt { position: 5, .. } }
            ));
            assert_eq!(*target.head().borrow(), 4, "those before it are there");
        }
        let shorter = carry(&target, &events[..3]).await.unwrap_err();
        assert!(
            matches!(shorter.error, Error::Foreign(what) if what.contains("more than these 3"))
        );
        let more = NewEvent { id: Uuid::from_u128(9999), ..new(&events[0]) };
        target.append("other", Expected::NoStream, vec![more]).await.unwrap();
        let other = carry(&target, &events).await.unwrap_err();
        assert!(matches!(other, Stopped { at: 4, error: Error::Foreign(_) }), "{other:?}");
        assert_eq!(*target.head().borrow(), 5);
    }

    #[test]
    fn a_log_with_gaps_reads_as_the_export_of_one_without() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let dense = filled(&dir.path().join("a.sqlite")).await;
            let whole = content_of(&dense, |_| {}).await.unwrap();
            let sparse = Sparse(dense);
            assert_eq!(content_of(&sparse, |_| {}).await.unwrap(), whole);
            let target = EmbeddedLog::open(&dir.path().join("b.sqlite")).unwrap();
            assert_eq!(extent(&sparse).await.unwrap(), whole);
            let mut reading = Reading::of(&sparse);
            assert!(reading.keeps_positions(), "nothing is known yet");
            let mut carrying = Carrying::into(&target);
            carrying.take(&reading.page().await.unwrap()).await.unwrap();
            assert!(!reading.keeps_positions());
            assert_eq!(carrying.finish(|_| {}).await.unwrap(), whole);
            // And back: what it holds is compared by what is the same in both.
            let mut carrying = Carrying::into(&sparse);
            carrying.take(&target.read_all(0, 1000).await.unwrap()).await.unwrap();
            assert_eq!((carrying.appended(), carrying.finish(|_| {}).await.unwrap()), (0, whole));
        });
    }

    /// Positions and hashes of its own, as those of an engine that counts bytes.
    struct Sparse(EmbeddedLog);

    #[async_trait::async_trait]
    impl EventLog for Sparse {
        async fn append(
            &self,
            stream: &str,
            expected: Expected,
            events: Vec<NewEvent>,
        ) -> Result<crate::log::Appended, Error> {
            self.0.append(stream, expected, events).await
        }

        async fn read_stream(
            &self,
            stream: &str,
            from: u64,
            limit: usize,
        ) -> Result<Vec<Recorded>, Error> {
            self.0.read_stream(stream, from, limit).await
        }

        async fn read_all(&self, after: u64, limit: usize) -> Result<Vec<Recorded>, Error> {
            let mut events = self.0.read_all(after / 100, limit).await?;
            for event in &mut events {
                (event.position, event.hash) = (event.position * 100, [7; 32]);
            }
            Ok(events)
        }

        fn head(&self) -> tokio::sync::watch::Receiver<u64> {
            self.0.head()
        }

        fn writable(&self) -> Result<(), Error> {
            self.0.writable()
        }

        async fn stats(&self) -> Result<crate::log::Stats, Error> {
            let stats = self.0.stats().await?;
            Ok(crate::log::Stats { position: stats.position * 100, ..stats })
        }

        async fn verify(&self) -> Result<Verified, Error> {
            self.0.verify().await
        }
    }
}
