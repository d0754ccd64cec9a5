//! The payload translator: whatever a verified body says, it becomes a command, nothing, or a
//! reason; and a command that it becomes is one that the aggregates can take.
#![no_main]

use chrono::DateTime;
use libfuzzer_sys::fuzz_target;
use t2m::clerk::payload::Envelope;
use t2m::clerk::translate::{Command, command};
use t2m::domain::Aggregate;
use t2m::domain::session::Session;
use t2m::domain::user::User;

fuzz_target!(|data: &[u8]| {
    let now = DateTime::from_timestamp(1_767_225_600, 0).expect("a time");
    let _ = Envelope::may_be_kept(data);
    let Ok(delivery) = Envelope::parse(data) else { return };
    match command(delivery, now) {
        Ok(Some(Command::User(_, command))) => take::<User>(&command, now),
        Ok(Some(Command::Session(_, command))) => take::<Session>(&command, now),
        Ok(None) | Err(_) => {}
    }
});

fn take<A: Aggregate>(command: &A::Command, now: DateTime<chrono::Utc>) {
    let mut state = A::default();
    for _ in 0..2 {
        let Ok(events) = state.decide(command, now) else { return };
        for event in &events {
            state.evolve(event);
        }
    }
}
