//! One append: chained to its stream's last event, sent with the revision that this one has, and
//! settled by the ids of its events when its outcome is not known.
//!
//! Every append names a revision, those with [`Expected::Any`] too, which look for it first. So the
//! server takes each of them at one place only, and the same ids there once, however often they are
//! sent and however late one of the sendings arrives.

use std::sync::Arc;

use eventstore::{StreamPosition, StreamState};
use tokio::time::Instant;
use uuid::Uuid;

use super::Shared;
use super::envelope::{Parcel, decode, to_server};
use super::link::{Failure, Link, too_large};
use super::reading::{self, LAST};
use crate::log::patience::Backoff;
use crate::log::{Appended, Error, Expected, GENESIS, NewEvent, REPEAT_WINDOW, Recorded, guard};

/// No server takes more in one append, whatever its settings.
const MOST_BYTES: usize = 16 * 1024 * 1024;

pub(super) struct Append {
    pub(super) stream: String,
    pub(super) expected: Expected,
    pub(super) events: Vec<NewEvent>,
}

/// Where an append goes.
struct Base {
    revision: u64,
    /// Of the event before.
    hash: [u8; 32],
}

/// What the log answers to an append, once it is known.
type Answer = Result<Appended, Error>;

impl Append {
    /// # Errors
    /// [`Error::Invalid`] when no server takes so much at once.
    pub(super) fn check_size(&self) -> Result<(), Error> {
        let size = |event: &NewEvent| event.data.len() + event.metadata.len();
        match self.events.iter().map(size).sum::<usize>() {
            bytes if bytes > MOST_BYTES => Err(too_large(&format!("{MOST_BYTES} bytes at most"))),
            _ => Ok(()),
        }
    }

    /// Appends, over as many connections as it takes and as fit into the time there is.
    pub(super) async fn run(self, shared: Arc<Shared>) -> Answer {
        // Of those that look for the end, one at a time, or each but one would look in vain.
        let turn = shared.turn(&self.stream);
        let _turn = match self.expected {
            Expected::Any => Some(turn.lock().await),
            _ => None,
        };
        // The same in each try, so that each sends the same.
        let after = shared.seen().map_or(0, |seen| seen.position);
        let give_up = Instant::now() + shared.deadlines.settle;
        let (mut backoff, mut again) = (Backoff::default(), false);
        loop {
            let failure = match shared.link().await {
                Ok(link) => match self.attempt(&shared, &link, after, again).await {
                    Ok(answer) => {
                        shared.condition.set_back();
                        if let Ok(appended) = &answer {
                            shared.saw(appended.position);
                        }
                        return answer;
                    }
                    // Somebody else has appended meanwhile.
                    Err(Failure::Unexpected) if Instant::now() < give_up => continue,
                    Err(Failure::Unexpected) => {
                        let why = "others were faster at this stream, again and again";
                        return Err(Error::Unwritable(why.into()));
                    }
                    Err(failure) => {
                        shared.lost(&link, &failure).await;
                        failure
                    }
                },
                Err(error) => Failure::Broken(error.to_string()),
            };
            if !failure.passes() && !matches!(failure, Failure::Denied) {
                return Err(failure.into_error());
            }
            if Instant::now() >= give_up || shared.condition.check_stopped().is_err() {
                shared.condition.set_refused(&failure.told());
                return Err(shared.condition.unwritable());
            }
            tracing::warn!(why = failure.told(), "an append is tried again");
            again = true;
            backoff.wait().await;
        }
    }

    async fn attempt(
        &self,
        shared: &Shared,
        link: &Link,
        after: u64,
        again: bool,
    ) -> Result<Answer, Failure> {
        let base = match self.expected {
            Expected::NoStream => Base { revision: 0, hash: GENESIS },
            Expected::Revision(last) => match self.hash_at(shared, link, last).await? {
                Some(hash) => Base { revision: last + 1, hash },
                None => return self.conflict(link).await.map(Err),
            },
            Expected::Any => match self.end_or_repeat(shared, link).await? {
                Ok(base) => base,
                Err(answer) => return Ok(answer),
            },
        };
        if again && let Some(appended) = self.settled(shared, link, base.revision).await? {
            return Ok(Ok(appended));
        }
        self.send(shared, link, base, after).await
    }

    async fn send(
        &self,
        shared: &Shared,
        link: &Link,
        base: Base,
        after: u64,
    ) -> Result<Answer, Failure> {
        let Base { revision, hash } = base;
        let parcel = Parcel::new(&self.stream, revision, hash, after, &self.events);
        let parcel = parcel.map_err(Failure::Bad)?;
        let state = match revision.checked_sub(1) {
            None => StreamState::NoStream,
            Some(last) => StreamState::StreamRevision(last),
        };
        match link.append(to_server(&self.stream), state, parcel.events()).await {
            Ok((last, position)) => {
                shared.condition.set_taken();
                let due = revision + self.events.len() as u64 - 1;
                if last != due {
                    let what = format!("{} ends at {last} after {due} was appended", self.stream);
                    return Err(Failure::Bad(crate::log::bad(0, &what)));
                }
                let position = match position {
                    Some(position) => position,
                    None => self.position_of(shared, link, last).await?,
                };
                if let Some(id) = parcel.ids.last() {
                    let mut memory = guard(&shared.memory);
                    memory.set_place(*id, position);
                    memory.enter(position);
                }
                Ok(Ok(Appended { revision: last, position }))
            }
            Err(Failure::Unexpected) => match self.settled(shared, link, revision).await? {
                Some(appended) => Ok(Ok(appended)),
                None if self.expected == Expected::Any => Err(Failure::Unexpected),
                None => self.conflict(link).await.map(Err),
            },
            Err(failure) => Err(failure),
        }
    }

    /// Where these very events are, if they are at `revision`.
    async fn settled(
        &self,
        shared: &Shared,
        link: &Link,
        revision: u64,
    ) -> Result<Option<Appended>, Failure> {
        let length = self.events.len();
        let there = reading::stream(shared, link, &self.stream, revision, length).await?;
        Ok(self.is_at(&there).then(|| appended(there.last())).flatten())
    }

    fn is_at(&self, there: &[Recorded]) -> bool {
        let ids = |event: &Recorded| event.id;
        there.iter().map(ids).eq(self.events.iter().map(|event| event.id))
    }

    /// The end of the stream, or the answer if the append is a repeat of a recent one.
    async fn end_or_repeat(
        &self,
        shared: &Shared,
        link: &Link,
    ) -> Result<Result<Base, Answer>, Failure> {
        let length = self.events.len();
        let window = usize::try_from(REPEAT_WINDOW).unwrap_or_default() + length + 1;
        let recent = reading::stream_end(shared, link, &self.stream, window).await?;
        let first: Option<Uuid> = self.events.first().map(|event| event.id);
        if let Some(at) = recent.iter().rposition(|event| Some(event.id) == first) {
            let there = &recent[at..recent.len().min(at + length)];
            if self.is_at(there)
                && let Some(appended) = appended(there.last())
            {
                return Ok(Err(Ok(appended)));
            }
            return Ok(Err(Err(self.conflict_at(recent.last().map(|last| last.revision)))));
        }
        let genesis = Base { revision: 0, hash: GENESIS };
        let next = |last: &Recorded| Base { revision: last.revision + 1, hash: last.hash };
        Ok(Ok(recent.last().map_or(genesis, next)))
    }

    async fn hash_at(
        &self,
        shared: &Shared,
        link: &Link,
        revision: u64,
    ) -> Result<Option<[u8; 32]>, Failure> {
        if revision >= LAST {
            return Ok(None);
        }
        if let Some(hash) = guard(&shared.memory).hash(&self.stream, revision) {
            return Ok(Some(hash));
        }
        // Its position is of no interest, and takes time where the server does not tell it.
        let from = StreamPosition::Position(revision);
        let found = link.stream(to_server(&self.stream), from, false, 1).await?;
        let Some(raw) = found.first().filter(|event| event.revision == revision) else {
            return Ok(None);
        };
        match decode(raw, 0).map_err(Failure::Bad)? {
            Some(found) => Ok(Some(found.event.hash)),
            None => {
                let what = format!("event {} of a stream of T2M is somebody else's", raw.id);
                Err(Failure::Bad(crate::log::bad(0, &what)))
            }
        }
    }

    async fn position_of(
        &self,
        shared: &Shared,
        link: &Link,
        revision: u64,
    ) -> Result<u64, Failure> {
        let found = reading::stream(shared, link, &self.stream, revision, 1).await?;
        let position = found.first().map(|event| event.position);
        position.ok_or_else(|| Failure::Broken("what was just appended is not there".into()))
    }

    async fn conflict(&self, link: &Link) -> Result<Error, Failure> {
        Ok(self.conflict_at(reading::end(link, &self.stream).await?))
    }

    fn conflict_at(&self, actual: Option<u64>) -> Error {
        Error::Conflict { stream: self.stream.clone(), expected: self.expected, actual }
    }
}

fn appended(last: Option<&Recorded>) -> Option<Appended> {
    last.map(|last| Appended { revision: last.revision, position: last.position })
}
