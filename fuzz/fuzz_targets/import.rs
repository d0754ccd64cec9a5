//! The reader of exported logs: whatever the text is, it answers with events or with the line that is
//! wrong, and what it has read is written as it stood.
#![no_main]

use libfuzzer_sys::fuzz_target;
use t2m::log::dump::{Lines, write_event};

fuzz_target!(|data: &[u8]| {
    let mut lines = Lines::new(data);
    let _ = lines.header();
    while let Ok(Some(event)) = lines.event() {
        let mut written = Vec::new();
        write_event(&mut written, &event).expect("memory takes it");
        let again = Lines::new(written.as_slice()).event();
        assert_eq!(again.ok().flatten().as_ref(), Some(&event), "it is not read as it was written");
    }
});
