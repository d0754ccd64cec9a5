//! How long an engine over the network waits, and how it waits between tries.

use std::time::Duration;

/// How long things may take. The default is for production.
#[derive(Debug, Clone, Copy)]
pub struct Deadlines {
    /// For the server to be reachable when the log is opened.
    pub start: Duration,
    /// For one connection.
    pub connect: Duration,
    /// For the answer to one statement or call, or the next row or event of many.
    pub statement: Duration,
    /// For an append to be settled over another connection when its own broke, before it is
    /// answered that its outcome is unknown.
    pub settle: Duration,
    /// How often other nodes' events are looked for, should nobody tell of them.
    pub poll: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            start: Duration::from_secs(60),
            connect: Duration::from_secs(5),
            statement: Duration::from_secs(10),
            settle: Duration::from_secs(3),
            poll: Duration::from_millis(500),
        }
    }
}

/// Pauses between tries, from a twentieth of a second to two seconds.
pub(super) struct Backoff(Duration);

impl Default for Backoff {
    fn default() -> Self {
        Self(Duration::from_millis(50))
    }
}

impl Backoff {
    pub(super) async fn wait(&mut self) {
        tokio::time::sleep(self.next()).await;
    }

    /// The next pause. A part of it is chance, so that nodes do not come back all at once.
    fn next(&mut self) -> Duration {
        let pause = self.0.mul_f64(0.5 + rand::random::<f64>() / 2.0);
        self.0 = (self.0 * 2).min(Duration::from_secs(2));
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_two_seconds_and_half_of_each_is_chance() {
        let mut backoff = Backoff::default();
        for longest in [50, 100, 200, 400, 800, 1600, 2000, 2000, 2000].map(Duration::from_millis) {
            let pause = backoff.next();
            assert!(pause >= longest / 2 && pause <= longest, "{pause:?} of {longest:?}");
        }
    }
}
