//! One client of the server and all that belongs to it, on a runtime of its own: given up as a whole
//! as soon as anything about it is in doubt, since it does not recover by itself.

use std::future::Future;
use std::ops::ControlFlow;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use eventstore::{
    AppendToStreamOptions, Client, ClientSettings, Position, ReadAllOptions, ReadStreamOptions,
    RecordedEvent, StreamPosition, StreamState, SubscribeToAllOptions, SubscriptionEvent,
    SubscriptionFilter,
};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tracing::instrument::WithSubscriber;

use super::address::Address;
use super::envelope::MARKER;
use super::silence::Guard;
use crate::log::{Deadlines, Error, bad};

/// From this version on the server filters reads of `$all`; before, it refuses to.
const FILTERS: (usize, usize) = (21, 10);

/// Changes from one leader to the next at a first contact, and the pause for each.
const TURNS: u32 = 5;
const TURN: Duration = Duration::from_millis(50);

/// Why a call has no answer.
#[derive(Debug)]
pub(super) enum Failure {
    /// The node is not the leader; nothing was done, and the client knows now who is.
    Moved,
    /// The connection, the node or the client is broken. What was asked may have been done.
    Broken(String),
    /// The server did not manage in time; it may yet, or may have.
    Late(String),
    /// The stream does not end where it was expected to.
    Unexpected,
    /// There is no such stream.
    Missing,
    /// The stream was deleted for good.
    Deleted,
    Denied,
    /// More bytes than the server takes in one append.
    TooLarge(String),
    /// The server's last word.
    Refused(String),
    /// What was read, or written, is wrong.
    Bad(Error),
}

impl Failure {
    /// Whether another try may go better.
    pub(super) fn passes(&self) -> bool {
        matches!(self, Self::Moved | Self::Broken(_) | Self::Late(_))
    }

    pub(super) fn into_error(self) -> Error {
        match self {
            Self::Bad(error) => error,
            Self::Deleted => bad(0, "one of its streams was deleted on the server"),
            Self::TooLarge(why) => too_large(&why),
            other => Error::Storage(other.told()),
        }
    }

    pub(super) fn told(&self) -> String {
        match self {
            Self::Moved => "the server is not the leader of its cluster".into(),
            Self::Broken(why) | Self::Late(why) | Self::Refused(why) => why.clone(),
            Self::Unexpected => "the stream does not end where it was expected to".into(),
            Self::Missing => "there is no such stream".into(),
            Self::Deleted => "the stream was deleted on the server".into(),
            Self::Denied => "the server refuses the credentials of T2M_LOG".into(),
            Self::TooLarge(why) => why.clone(),
            Self::Bad(error) => error.to_string(),
        }
    }
}

pub(super) fn too_large(why: &str) -> Error {
    Error::Invalid(format!(
        "the append is larger than the server takes ({why}); its setting is MaxAppendSize"
    ))
}

impl From<eventstore::Error> for Failure {
    fn from(error: eventstore::Error) -> Self {
        use eventstore::Error as Theirs;
        match error {
            Theirs::NotLeaderException(_) => Self::Moved,
            Theirs::AccessDenied => Self::Denied,
            Theirs::ResourceNotFound => Self::Missing,
            Theirs::ResourceDeleted => Self::Deleted,
            Theirs::WrongExpectedVersion { .. } => Self::Unexpected,
            Theirs::DeadlineExceeded => Self::Late("the server did not manage in time".into()),
            Theirs::Grpc { code, message } => answered(i32::from(code), message),
            Theirs::UnsupportedFeature
            | Theirs::InternalParsingError(_)
            | Theirs::ResourceAlreadyExists => Self::Refused(error.to_string()),
            // Also "Server Is Not Ready": another node may be.
            other => Self::Broken(other.to_string()),
        }
    }
}

/// By the status codes of gRPC.
fn answered(code: i32, message: String) -> Failure {
    const INVALID: i32 = 3;
    const EXHAUSTED: i32 = 8;
    const PRECONDITION: i32 = 9;
    match code {
        INVALID if message.contains("Maximum Append Size") => Failure::TooLarge(message),
        EXHAUSTED => Failure::TooLarge(message),
        INVALID if message.contains("Invalid Transaction") => Failure::Unexpected,
        PRECONDITION if message.contains("WrongExpectedVersion") => Failure::Unexpected,
        INVALID | PRECONDITION => Failure::Refused(message),
        // Among them "Aborted, Operation timed out".
        _ => Failure::Late(message),
    }
}

pub(super) struct Link {
    client: Client,
    address: Address,
    /// Whether the server leaves out its own events when `$all` is read.
    filters: bool,
    wait: Duration,
    /// What the client starts must end with it, and does not by itself.
    runtime: Own,
}

/// A runtime that can be dropped among the tasks of another one. Present until then.
struct Own(Option<Runtime>);

impl Drop for Own {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

impl std::ops::Deref for Own {
    type Target = Runtime;

    fn deref(&self) -> &Runtime {
        self.0.as_ref().expect("it is there until the drop")
    }
}

impl Link {
    /// Connects to the leader. Whose log it has is not known then.
    pub(super) async fn open(
        address: &Address,
        deadlines: Deadlines,
    ) -> Result<Arc<Self>, Failure> {
        let opened = Self::open_as(address, address.settings.clone(), deadlines).await;
        match (opened, &address.anonymous) {
            // Members of a cluster do not tell a wrong user about it, and the client does not tell
            // that from their being away. Streams say what is the matter.
            (Err(Failure::Broken(_)), Some(settings)) => {
                Self::open_as(address, settings.clone(), deadlines).await
            }
            (opened, _) => opened,
        }
    }

    async fn open_as(
        address: &Address,
        settings: ClientSettings,
        deadlines: Deadlines,
    ) -> Result<Arc<Self>, Failure> {
        let broken = |error: String| Failure::Broken(error);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("log-kurrent-link")
            .enable_all()
            .build()
            .map_err(|error| broken(error.to_string()))?;
        let runtime = Own(Some(runtime));
        let handle = runtime.handle().clone();
        // It reads the machine's certificates.
        let making = runtime.spawn_blocking(move || Client::with_runtime_handle(handle, settings));
        let made = making.await.map_err(|_| broken("the client could not be made".into()))?;
        let client = made.map_err(|error| broken(error.to_string()))?;
        let (address, wait) = (address.clone(), deadlines.statement);
        let mut link = Self { client, address, filters: false, wait, runtime };
        let client = link.client.clone();
        let greeting = async move {
            let info = within(deadlines.connect, client.server_info()).await?;
            Ok((info.version().major(), info.version().minor()))
        };
        // A server that does not say its version is older than those that filter.
        link.filters = link.run(greeting).await? >= FILTERS;
        // A member that does not lead says who does, and the client goes there.
        for _ in 0..TURNS {
            match link.stream(MARKER.into(), StreamPosition::Start, false, 1).await {
                Err(Failure::Moved) => tokio::time::sleep(TURN).await,
                Err(failure) => return Err(failure),
                Ok(_) => return Ok(Arc::new(link)),
            }
        }
        Err(Failure::Moved)
    }

    /// Up to `count` events of a stream; none where there is no stream.
    pub(super) async fn stream(
        &self,
        name: String,
        from: StreamPosition<u64>,
        backwards: bool,
        count: usize,
    ) -> Result<Vec<RecordedEvent>, Failure> {
        let options = ReadStreamOptions::default().position(from).max_count(count);
        let options = if backwards { options.backwards() } else { options.forwards() };
        let mut options = options.requires_leader(true);
        if let Some(credentials) = self.address.credentials.clone() {
            options = options.authenticated(credentials);
        }
        let (client, wait) = (self.client.clone(), self.wait);
        self.run(async move {
            let mut events = Vec::new();
            let mut reading = match within(wait, client.read_stream(name, &options)).await {
                Err(Failure::Missing) => return Ok(events),
                reading => reading?,
            };
            loop {
                match within(wait, reading.next()).await {
                    Ok(Some(resolved)) => events.extend(resolved.event),
                    Ok(None) | Err(Failure::Missing) => return Ok(events),
                    Err(failure) => return Err(failure),
                }
            }
        })
        .await
    }

    /// Hands the events of `$all` to `step`, those of the server among them, until it breaks or
    /// there are no more; answers what `step` made of `state`.
    pub(super) async fn all<S: Send + 'static>(
        &self,
        from: StreamPosition<Position>,
        backwards: bool,
        count: usize,
        mut state: S,
        mut step: impl FnMut(&mut S, RecordedEvent) -> Result<ControlFlow<()>, Failure> + Send + 'static,
    ) -> Result<S, Failure> {
        let options = ReadAllOptions::default().position(from).max_count(count);
        let options = if backwards { options.backwards() } else { options.forwards() };
        let mut options = options.requires_leader(true);
        // A single event that is asked for is the one at this place, whose ever it is.
        if self.filters && count > 1 {
            options = options.filter(SubscriptionFilter::on_stream_name().exclude_system_events());
        }
        if let Some(credentials) = self.address.credentials.clone() {
            options = options.authenticated(credentials);
        }
        let (client, wait) = (self.client.clone(), self.wait);
        self.run(async move {
            let mut reading = within(wait, client.read_all(&options)).await?;
            while let Some(resolved) = within(wait, reading.next()).await? {
                let Some(event) = resolved.event else { continue };
                if step(&mut state, event)?.is_break() {
                    break;
                }
            }
            Ok(state)
        })
        .await
    }

    /// The event at a commit position; none if no event begins there.
    pub(super) async fn at(&self, position: u64) -> Result<Option<RecordedEvent>, Failure> {
        let from = StreamPosition::Position(place(position));
        let found = self.all(from, false, 1, None, |found, event| {
            *found = Some(event);
            Ok(ControlFlow::Break(()))
        });
        match found.await {
            Ok(found) => Ok(found.filter(|event| event.position.commit == position)),
            // What servers say to a place that is none; one that is broken is found out next.
            Err(Failure::Broken(_) | Failure::Refused(_) | Failure::Late(_)) => Ok(None),
            Err(failure) => Err(failure),
        }
    }

    /// Appends and answers the stream's last revision, and the commit position if it was said.
    pub(super) async fn append(
        &self,
        name: String,
        state: StreamState,
        events: Vec<eventstore::EventData>,
    ) -> Result<(u64, Option<u64>), Failure> {
        let mut options = AppendToStreamOptions::default()
            .stream_state(state)
            .requires_leader(true)
            .deadline(self.wait);
        if let Some(credentials) = self.address.credentials.clone() {
            options = options.authenticated(credentials);
        }
        let (client, wait) = (self.client.clone(), self.wait);
        self.run(async move {
            let answer = within(wait, client.append_to_stream(name, &options, events)).await?;
            Ok((answer.next_expected_version, said(answer.position.commit)))
        })
        .await
    }

    /// Tells when somebody has appended after a position; the server's own events are left out.
    pub(super) fn subscribe(&self, after: StreamPosition<Position>) -> Subscription {
        let (sender, moved) = watch::channel(());
        let filter = SubscriptionFilter::on_stream_name().exclude_system_events();
        let mut options =
            SubscribeToAllOptions::default().position(after).filter(filter).requires_leader(true);
        if let Some(credentials) = self.address.credentials.clone() {
            options = options.authenticated(credentials);
        }
        let client = self.client.clone();
        let forwarding = async move {
            let mut subscription = client.subscribe_to_all(&options).await;
            loop {
                match subscription.next_subscription_event().await {
                    Ok(SubscriptionEvent::EventAppeared(_)) => {
                        if sender.send(()).is_err() {
                            return;
                        }
                    }
                    // Checkpoints among them. They are no places to go on from: their prepare
                    // position may be 0.
                    Ok(_) => {}
                    Err(_) => return,
                }
            }
        };
        let task = self.runtime.spawn(forwarding.with_subscriber(Guard::default()));
        Subscription { moved, _task: Task(task) }
    }

    /// The client panics over answers that it does not understand, and logs every failure as if
    /// the node were gone.
    async fn run<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, Failure>> + Send + 'static,
    ) -> Result<T, Failure> {
        let ended = Task(self.runtime.spawn(work.with_subscriber(Guard::default()))).await;
        ended.unwrap_or_else(|error| Err(Failure::Broken(format!("the client failed: {error}"))))
    }
}

/// Ends when its channel does.
pub(super) struct Subscription {
    pub(super) moved: watch::Receiver<()>,
    _task: Task<()>,
}

/// A task that ends with whoever waits for it.
struct Task<T>(JoinHandle<T>);

impl<T> Drop for Task<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl<T> Future for Task<T> {
    type Output = Result<T, tokio::task::JoinError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(context)
    }
}

async fn within<T>(
    wait: Duration,
    answer: impl Future<Output = eventstore::Result<T>>,
) -> Result<T, Failure> {
    match timeout(wait, answer).await {
        Ok(answer) => answer.map_err(Failure::from),
        Err(_) => Err(Failure::Broken("no answer from the server in time".into())),
    }
}

/// A commit position as the server takes it. For every event of an append it is the prepare
/// position, too; only explicit transactions, which gRPC does not have, tell the two apart.
pub(super) fn place(position: u64) -> Position {
    Position { commit: position, prepare: position }
}

/// A commit position as the server says it. Old ones do not in reads of streams.
pub(super) fn said(commit: u64) -> Option<u64> {
    (commit != 0 && commit != u64::MAX).then_some(commit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_server_says_is_understood() {
        let check = |code: i32, message: &str| answered(code, message.to_owned());
        let size = check(3, "Maximum Append Size of 1048576 Exceeded.").into_error();
        assert!(matches!(&size, Error::Invalid(why) if why.contains("1048576")), "{size}");
        assert!(matches!(check(3, "Invalid Transaction"), Failure::Unexpected));
        assert!(matches!(check(10, "Operation timed out"), Failure::Late(_)));
        assert!(matches!(check(9, "no"), Failure::Refused(_)));
        let gone = Failure::from(eventstore::Error::ServerError("Server Is Not Ready".into()));
        assert!(gone.passes() && matches!(gone, Failure::Broken(_)));
        assert!(!Failure::from(eventstore::Error::AccessDenied).passes());
    }
}
