//! How much is being asked, for who wants to stop and leave nobody without an answer.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How long nobody may have asked anything until nobody is believed to be about to. What was sent
/// is read long before.
const QUIET: Duration = Duration::from_millis(250);

/// Counts requests as they come and as they are answered.
#[derive(Debug, Default)]
pub struct Traffic {
    begun: AtomicU64,
    answered: AtomicU64,
}

/// A request that is being answered for as long as this lives.
pub struct UnderWay<'a>(&'a Traffic);

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.answered.fetch_add(1, Ordering::SeqCst);
    }
}

impl Traffic {
    /// Counts one more.
    pub fn begin(&self) -> UnderWay<'_> {
        self.begun.fetch_add(1, Ordering::SeqCst);
        UnderWay(self)
    }

    /// Waits until all that was asked is answered and nothing more comes.
    pub async fn ceased(&self) {
        let mut seen = None;
        loop {
            let answered = self.answered.load(Ordering::SeqCst);
            // Read second: it may be ahead of the other, never behind.
            let begun = self.begun.load(Ordering::SeqCst);
            if seen == Some(begun) && answered == begun {
                return;
            }
            seen = Some(begun);
            tokio::time::sleep(QUIET).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    /// Time passes only as this says.
    #[tokio::test(start_paused = true)]
    async fn it_has_ceased_when_all_is_answered_and_nothing_came_for_a_while() {
        let traffic = Arc::new(Traffic::default());
        let watched = Arc::clone(&traffic);
        let began = tokio::time::Instant::now();
        let ceased = tokio::spawn(async move {
            watched.ceased().await;
            tokio::time::Instant::now() - began
        });
        let long = traffic.begin();
        for _ in 0..10 {
            tokio::time::sleep(QUIET / 2).await;
            drop(traffic.begin());
        }
        tokio::time::sleep(QUIET * 10).await;
        assert!(!ceased.is_finished(), "a request is being answered");
        drop(long);
        assert!(ceased.await.unwrap() >= QUIET * 15);
    }
}
