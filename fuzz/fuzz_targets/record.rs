//! The decoder of stored events: whatever type and data a record has, it becomes an event that every
//! aggregate takes in, or a reason; and an event that was read is written and read again as it was.
//! The input is the stream's name, the type, and the data, a line each.
#![no_main]

use libfuzzer_sys::fuzz_target;
use t2m::actors::codec::{AnyEvent, decode_any, encode};
use t2m::domain::Aggregate;
use t2m::domain::{file::File, job::Job, session::Session, user::User};

fuzz_target!(|data: &[u8]| {
    let mut lines = data.splitn(3, |byte| *byte == b'\n');
    let [stream, kind] = [(); 2].map(|()| lines.next().and_then(|it| std::str::from_utf8(it).ok()));
    let (Some(stream), Some(kind)) = (stream, kind) else { return };
    match decode_any(stream, kind, lines.next().unwrap_or_default()) {
        Ok(AnyEvent::User(_, event)) => there_and_back::<User>(stream, event),
        Ok(AnyEvent::Session(_, event)) => there_and_back::<Session>(stream, event),
        Ok(AnyEvent::File(_, event)) => there_and_back::<File>(stream, event),
        Ok(AnyEvent::Job(_, event)) => there_and_back::<Job>(stream, event),
        Err(_) => {}
    }
});

fn there_and_back<A: Aggregate>(stream: &str, event: A::Event) {
    let (kind, data) = encode::<A>(&event).expect("what was read can be written");
    let again = decode_any(stream, &kind, &data).expect("what was written can be read");
    let written = match again {
        AnyEvent::User(_, event) => encode::<User>(&event),
        AnyEvent::Session(_, event) => encode::<Session>(&event),
        AnyEvent::File(_, event) => encode::<File>(&event),
        AnyEvent::Job(_, event) => encode::<Job>(&event),
    };
    assert_eq!(written.expect("and again"), (kind, data));
    let mut state = A::default();
    for _ in 0..2 {
        state.evolve(&event);
    }
}
