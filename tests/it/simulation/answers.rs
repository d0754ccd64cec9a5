//! Checks every answer to a command: that an effect which was acknowledged is in the log, once and
//! as it was told; that an answer without effect left none, and follows from what the log held at
//! some moment between the question and the answer.

use std::collections::BTreeMap;
use std::fmt::Debug;

use chrono::{DateTime, Utc};
use t2m::actors::System;
use t2m::actors::codec;
use t2m::actors::directory::Directory;
use t2m::actors::entity::{Executed, Failure};
use t2m::domain::file::File;
use t2m::domain::job::Job;
use t2m::domain::session::Session;
use t2m::domain::user::User;
use t2m::domain::{self, Aggregate};
use t2m::log::Recorded;

/// An aggregate as the simulation needs it.
pub trait Kept: Aggregate<Command: Clone + Debug> + Unpin {
    fn directory(system: &System) -> &Directory<Self>;
    /// The state without what is personal, which is sealed in the log.
    fn looks(&self) -> String;
}

impl Kept for User {
    fn directory(system: &System) -> &Directory<Self> {
        &system.users
    }

    fn looks(&self) -> String {
        let Self { standing, access, banned, memberships, synced_at, .. } = self;
        format!("{standing:?} {access:?} {banned} {memberships:?} {synced_at:?}")
    }
}

impl Kept for Session {
    fn directory(system: &System) -> &Directory<Self> {
        &system.sessions
    }

    fn looks(&self) -> String {
        format!("{self:?}")
    }
}

impl Kept for File {
    fn directory(system: &System) -> &Directory<Self> {
        &system.files
    }

    fn looks(&self) -> String {
        match self {
            Self::Absent => "absent".to_owned(),
            Self::Present(stored) => format!("{} {:?}", stored.sha256, stored.job_id),
            Self::Deleted => "deleted".to_owned(),
        }
    }
}

impl Kept for Job {
    fn directory(system: &System) -> &Directory<Self> {
        &system.jobs
    }

    fn looks(&self) -> String {
        match self {
            Self::Absent => "absent".to_owned(),
            Self::Requested(job) => format!("{} {:?} {:?}", job.attempts, job.phase, job.cut_off),
        }
    }
}

/// Events by who brought them about; the simulation gives each command another name.
pub type ByActor = BTreeMap<String, Vec<Recorded>>;

/// One command and its answer.
pub struct Answered<A: Kept> {
    pub command: A::Command,
    pub result: Result<Executed<A>, Failure<A::Refusal>>,
    /// Its stream's events up to the answer, and how many of them there were at the question.
    pub events: Vec<Recorded>,
    pub before: usize,
    /// What its node's clock has shown meanwhile.
    pub times: Vec<DateTime<Utc>>,
    /// What it has brought about.
    pub own: Vec<Recorded>,
}

impl<A: Kept> Answered<A> {
    pub fn check(&self) -> Result<(), String> {
        match &self.result {
            Ok(done) if !done.events.is_empty() => self.was_done(done),
            Ok(done) => {
                self.left_nothing()?;
                self.follows(|state, position, decided| {
                    matches!(decided, Ok(events) if events.is_empty())
                        && position == done.position
                        && state.looks() == done.state.looks()
                })
            }
            Err(Failure::Refused(refusal)) => {
                self.left_nothing()?;
                let refusal = format!("{refusal:?}");
                self.follows(
                    |_, _, decided| matches!(decided, Err(it) if format!("{it:?}") == refusal),
                )
            }
            Err(Failure::Conflict(_) | Failure::Keys(_)) => self.left_nothing(),
            // Not known: `carried_out` looks at what it was, in the end.
            Err(Failure::Unavailable(_)) => Ok(()),
            Err(Failure::Log(_) | Failure::Codec(_) | Failure::Overloaded) => {
                Err("it must not fail in this way".to_owned())
            }
        }
    }

    fn was_done(&self, done: &Executed<A>) -> Result<(), String> {
        let last = self.own.last().ok_or("acknowledged, and not in the log")?;
        if self.own.len() != done.events.len() {
            return Err(format!("{} events, {} in the log", done.events.len(), self.own.len()));
        }
        if done.position != last.position {
            return Err(format!("position {}, in truth {}", done.position, last.position));
        }
        let upto = usize::try_from(last.revision).unwrap() + 1;
        let state: A = folded(&self.events[..upto]);
        match state.looks() == done.state.looks() {
            true => Ok(()),
            false => Err(format!("it told {}, it is {}", done.state.looks(), state.looks())),
        }
    }

    fn left_nothing(&self) -> Result<(), String> {
        if self.own.is_empty() { Ok(()) } else { Err("it had no effect, but left one".to_owned()) }
    }

    fn follows(
        &self,
        is: impl Fn(&A, u64, Result<Vec<A::Event>, A::Refusal>) -> bool,
    ) -> Result<(), String> {
        let mut state: A = folded(&self.events[..self.before]);
        for length in self.before..=self.events.len() {
            let position = length.checked_sub(1).map_or(0, |at| self.events[at].position);
            if self.times.iter().any(|now| is(&state, position, state.decide(&self.command, *now)))
            {
                return Ok(());
            }
            if let Some(next) = self.events.get(length) {
                state.evolve(&decoded::<A>(next));
            }
        }
        Err(format!("no moment explains the answer; now it is {}", state.looks()))
    }
}

/// In the end: whatever a command has left is what it decides where it stands, and is there once.
pub fn carried_out<A: Kept>(
    command: &A::Command,
    own: &[Recorded],
    stream: &[Recorded],
) -> Result<(), String> {
    let Some(first) = own.first() else { return Ok(()) };
    let state: A = folded(&stream[..usize::try_from(first.revision).unwrap()]);
    let decided = state
        .decide(command, first.time)
        .map_err(|refusal| format!("it stands where it should have been refused: {refusal}"))?;
    let kinds: Vec<_> = decided.iter().map(|event| codec::encode::<A>(event).unwrap().0).collect();
    let left: Vec<_> = own.iter().map(|event| event.kind.to_string()).collect();
    if kinds == left { Ok(()) } else { Err(format!("it should be {kinds:?}, and is {left:?}")) }
}

pub fn stream_of<A: Kept>(id: &str) -> String {
    domain::stream::<A>(id)
}

fn decoded<A: Kept>(event: &Recorded) -> A::Event {
    codec::decode::<A>(&event.kind, &event.data).unwrap()
}

fn folded<A: Kept>(events: &[Recorded]) -> A {
    let mut state = A::default();
    events.iter().for_each(|event| state.evolve(&decoded::<A>(event)));
    state
}
