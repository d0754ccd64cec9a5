//! What Ctrl-C, or whoever stops a command, ends: work, and not the process, so that what was begun is
//! cleared away.

use anyhow::{Context, bail};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// From here on the signals end nothing by themselves.
pub struct Interrupt([Signal; 2]);

impl Interrupt {
    /// # Errors
    /// The system does not let anybody listen.
    pub fn listen() -> anyhow::Result<Self> {
        Self::on([SignalKind::terminate(), SignalKind::interrupt()])
    }

    fn on(kinds: [SignalKind; 2]) -> anyhow::Result<Self> {
        let [one, other] = kinds.map(|kind| signal(kind).context("listening for signals"));
        Ok(Self([one?, other?]))
    }

    /// Resolves at the first signal.
    pub async fn heard(&mut self) {
        let [one, other] = &mut self.0;
        tokio::select! {
            _ = one.recv() => {}
            _ = other.recv() => {}
        }
    }

    /// Wherever the work is.
    ///
    /// # Errors
    /// Its own, or that it was interrupted.
    pub async fn or<T>(
        &mut self,
        work: impl Future<Output = anyhow::Result<T>>,
    ) -> anyhow::Result<T> {
        tokio::select! {
            done = work => done,
            () = self.heard() => bail!("interrupted"),
        }
    }
}

#[cfg(test)]
pub mod tests {
    use rustix::process::{Signal as Number, getpid, kill_process};

    use super::*;

    /// One that has been told, by signals that end no other test.
    pub fn told() -> Interrupt {
        let interrupt =
            Interrupt::on([SignalKind::user_defined1(), SignalKind::user_defined2()]).unwrap();
        kill_process(getpid(), Number::USR2).unwrap();
        interrupt
    }

    /// One by signals that nobody sends; other tests send the usual ones to this process.
    pub fn untold() -> Interrupt {
        Interrupt::on([SignalKind::window_change(), SignalKind::io()]).unwrap()
    }

    #[tokio::test]
    async fn work_that_would_not_end_ends_at_a_signal() {
        let told = told().or(std::future::pending::<anyhow::Result<()>>()).await.unwrap_err();
        assert_eq!(told.to_string(), "interrupted");
    }
}
