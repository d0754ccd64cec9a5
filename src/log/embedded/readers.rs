//! Threads that read, each over a connection of its own.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;

use tokio::sync::{Semaphore, oneshot};

use super::reader::Reader;
use super::{Error, guard, spawn};

/// Reads that run at the same time.
const READERS: usize = 8;

/// Reads never run where they are asked for: even a small one may have to wait for a disk, and an
/// actor's runtime has only the one thread. Nor do they run on tokio's blocking threads, which take
/// turns: here the one that was busy last is asked first, since what it needs is still near its
/// processor. A replay reads page after page.
pub(super) struct Readers {
    path: PathBuf,
    idle: Mutex<Vec<Idle>>,
    permits: Arc<Semaphore>,
}

/// A thread that waits for a question; it ends when nobody can ask it any more.
struct Idle {
    questions: mpsc::Sender<Question>,
    thread: JoinHandle<()>,
}

/// Asked with the thread's connection, if it has one; it may leave another, or none.
type Question = Box<dyn FnOnce(&mut Option<Reader>) + Send>;

impl Readers {
    /// One connection is opened at once: what cannot be read is no log.
    pub(super) fn open(path: &Path) -> Result<Self, Error> {
        let first = start(Some(Reader::open(path)?))?;
        Ok(Self {
            path: path.to_owned(),
            idle: Mutex::new(vec![first]),
            permits: Arc::new(Semaphore::new(READERS)),
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// # Errors
    /// What `work` answers; a connection that had an error is not used again.
    pub(super) async fn run<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&mut Reader) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let permit = self.permits.clone().acquire_owned().await;
        let permit = permit.map_err(|_| Error::Storage("the log is closed".into()))?;
        let idle = guard(&self.idle).pop();
        let Idle { questions, thread } = idle.map_or_else(|| start(None), Ok)?;
        let (readers, asked) = (self.clone(), questions.clone());
        let (reply, answer) = oneshot::channel();
        let question = move |reader: &mut Option<Reader>| {
            // Moved in: it is held until the work is done, also when nobody waits for it any more.
            let _permit = permit;
            let answer = match reader {
                Some(reader) => work(reader),
                None => Reader::open(&readers.path).and_then(|opened| work(reader.insert(opened))),
            };
            if answer.is_err() {
                *reader = None;
            }
            // Before the answer: whoever asks next finds it.
            guard(&readers.idle).push(Idle { questions, thread });
            // Nobody may wait for it any more.
            let _ = reply.send(answer);
        };
        let broken = || Error::Storage("a read did not end".into());
        asked.send(Box::new(question)).map_err(|_| broken())?;
        // Else the thread could not end before this is looked at again.
        drop(asked);
        answer.await.map_err(|_| broken())?
    }

    /// Closes the connections that nobody reads by.
    pub(super) fn close(&self) {
        let idle = std::mem::take(&mut *guard(&self.idle));
        for Idle { questions, thread } in idle {
            drop(questions);
            // None that panicked is among the idle ones.
            let _ = thread.join();
        }
    }
}

fn start(mut reader: Option<Reader>) -> Result<Idle, Error> {
    let (questions, asked) = mpsc::channel::<Question>();
    let serve = move || asked.into_iter().for_each(|question| question(&mut reader));
    Ok(Idle { questions, thread: spawn("log-reader", serve)? })
}
