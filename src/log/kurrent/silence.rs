//! Ends a subscription that has ended on the server's side: the client does not notice, and asks
//! again for ever without a pause in which it could be stopped. It says so in a warning at every
//! turn, and that is where it is caught.

use std::fmt::Debug;
use std::sync::atomic::{AtomicU32, Ordering};

use tracing::field::{Field, Visit};
use tracing::metadata::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

const WARNING: &str = "Received an unknown subscription message";
/// There may be messages that the client does not know indeed.
const TURNS: u32 = 100;

/// Takes what the client logs. Nothing of it is passed on: what follows from a failure is said by
/// who asked.
#[derive(Default)]
pub(super) struct Guard {
    turns: AtomicU32,
}

impl Subscriber for Guard {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() <= Level::WARN
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::WARN)
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut message = Message(false);
        event.record(&mut message);
        if message.0 && self.turns.fetch_add(1, Ordering::Relaxed) >= TURNS {
            // Unwinds its task alone, which ends as one that panicked does, without a word.
            std::panic::resume_unwind(Box::new("the subscription has ended"));
        }
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

struct Message(bool);

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0 |= field.name() == "message" && format!("{value:?}") == WARNING;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_that_turns_without_end_is_ended() {
        use tracing::instrument::WithSubscriber;
        let turning = async {
            loop {
                tracing::warn!("Received an unknown subscription message");
            }
        };
        let ended = tokio::spawn(turning.with_subscriber(Guard::default())).await;
        assert!(ended.is_err_and(|error| error.is_panic()));
        let calm = async {
            for _ in 0..1000 {
                tracing::warn!("something else");
            }
        };
        tokio::spawn(calm.with_subscriber(Guard::default())).await.unwrap();
    }
}
