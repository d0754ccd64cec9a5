//! A stand-in for KurrentDB, for tests alone: an in-process server that speaks as much of the
//! protocol as the client uses, and fails on demand. What it shows is how the engine deals with
//! answers and faults; how a real server behaves is shown by the lane of `T2M_TEST_ESDB`.

#![allow(clippy::result_large_err, reason = "a status of gRPC is as large as it is")]

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use base64::Engine as _;
use futures_util::{Stream, StreamExt, stream};
use tokio::net::TcpStream;
use tonic::metadata::MetadataMap;
use tonic::{Code, Request, Response, Status, Streaming};
use uuid::Uuid;

use crate::postgres::free_port;
use line::Line;
use protocol::{gossip, server_features, streams};
use store::{Kept, MAX_APPEND, Outcome, Store};
use streams::read_req::options::{CountOption, FilterOption, StreamOption};

mod line;
mod protocol;
pub mod store;

/// How a server of some time behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Age {
    /// As 20.10: no version, no filtered reads, no positions in reads of streams.
    Old,
    /// As 22.10.
    New,
}

/// What befalls the next append.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The connection is cut before anything was written.
    CutBefore,
    /// The connection is cut after it was written.
    CutAfter,
    /// "Operation timed out", and nothing was written.
    TimeoutBefore,
    /// "Operation timed out", although it was written.
    TimeoutAfter,
    /// It is written long after the client has lost its patience.
    WrittenLate(Duration),
    NotReady,
}

/// A node, or the only one.
pub struct Node {
    pub line: Arc<Line>,
    age: Age,
    store: Arc<Store>,
    faults: Mutex<VecDeque<Fault>>,
    slow_ms: AtomicU64,
    hangs: AtomicBool,
    mute: AtomicBool,
    subscriptions: AtomicU64,
    ends: tokio::sync::watch::Sender<u64>,
    cluster: OnceLock<Arc<Cluster>>,
}

/// Nodes of one log.
pub struct Cluster {
    pub nodes: Vec<Arc<Node>>,
    leader: AtomicUsize,
}

impl Cluster {
    pub async fn start(count: usize, age: Age) -> Arc<Self> {
        let store = Arc::new(Store::new());
        let mut nodes = Vec::new();
        for _ in 0..count {
            nodes.push(Node::start_with(age, Arc::clone(&store)).await);
        }
        let cluster = Arc::new(Self { nodes, leader: AtomicUsize::new(0) });
        cluster.nodes.iter().for_each(|node| drop(node.cluster.set(Arc::clone(&cluster))));
        cluster
    }

    pub fn address(&self) -> String {
        let seeds: Vec<String> =
            self.nodes.iter().map(|node| format!("127.0.0.1:{}", node.line.port)).collect();
        format!("esdb://admin:changeit@{}?tls=false", seeds.join(","))
    }

    pub fn lead(&self, node: usize) {
        self.leader.store(node, Ordering::SeqCst);
    }

    fn leader(&self) -> &Arc<Node> {
        &self.nodes[self.leader.load(Ordering::SeqCst)]
    }
}

impl Node {
    pub async fn start(age: Age) -> Arc<Self> {
        Self::start_with(age, Arc::new(Store::new())).await
    }

    async fn start_with(age: Age, store: Arc<Store>) -> Arc<Self> {
        let port = free_port();
        let node = Arc::new(Self {
            line: Line::to(port).await,
            age,
            store,
            faults: Mutex::default(),
            slow_ms: AtomicU64::new(0),
            hangs: AtomicBool::new(false),
            mute: AtomicBool::new(false),
            subscriptions: AtomicU64::new(0),
            ends: tokio::sync::watch::Sender::new(0),
            cluster: OnceLock::new(),
        });
        let service = streams::streams_server::StreamsServer::new(Arc::clone(&node))
            .max_decoding_message_size(32 * 1024 * 1024);
        let gossip = gossip::gossip_server::GossipServer::new(Arc::clone(&node));
        let features =
            server_features::server_features_server::ServerFeaturesServer::new(node.clone());
        let server = tonic::transport::Server::builder()
            .add_service(service)
            .add_service(gossip)
            .add_service(features)
            .serve(([127, 0, 0, 1], port).into());
        tokio::spawn(server);
        while TcpStream::connect(("127.0.0.1", port)).await.is_err() {
            tokio::task::yield_now().await;
        }
        node
    }

    pub fn address(&self) -> String {
        format!("esdb://admin:changeit@127.0.0.1:{}?tls=false", self.line.port)
    }

    pub fn store(&self) -> &Store {
        &self.store
    }

    /// It neither answers nor accepts until it is [`Node::up`].
    pub fn down(&self) {
        self.line.set_refuses(true);
    }

    pub fn up(&self) {
        self.line.set_refuses(false);
    }

    pub fn next_append(&self, fault: Fault) {
        self.faults.lock().unwrap().push_back(fault);
    }

    /// How many faults of appends are still to come.
    pub fn faults_left(&self) -> usize {
        self.faults.lock().unwrap().len()
    }

    /// Each answer takes so long.
    pub fn slow(&self, by: Duration) {
        let millis = u64::try_from(by.as_millis()).expect("a short time");
        self.slow_ms.store(millis, Ordering::SeqCst);
    }

    /// Nothing is answered while it is so.
    pub fn set_hangs(&self, hangs: bool) {
        self.hangs.store(hangs, Ordering::SeqCst);
    }

    /// Subscriptions stay open and bring nothing.
    pub fn set_mute(&self, mute: bool) {
        self.mute.store(mute, Ordering::SeqCst);
    }

    /// Ends all subscriptions as if that were no fault.
    pub fn end_subscriptions(&self) {
        self.ends.send_modify(|ends| *ends += 1);
    }

    /// Subscriptions that were ever made.
    pub fn subscriptions(&self) -> u64 {
        self.subscriptions.load(Ordering::SeqCst)
    }

    /// What is before every call of the streams.
    async fn admit(&self, metadata: &MetadataMap) -> Result<(), Status> {
        while self.hangs.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        tokio::time::sleep(Duration::from_millis(self.slow_ms.load(Ordering::SeqCst))).await;
        if !is_known(metadata, false) {
            return Err(Status::unauthenticated("who is it?"));
        }
        let needs_leader = metadata.get("requires-leader").is_some_and(|it| it == "true");
        if let Some(cluster) = self.cluster.get()
            && needs_leader
            && !std::ptr::eq(&**cluster.leader(), self)
        {
            let mut told = MetadataMap::new();
            let port = cluster.leader().line.port.to_string();
            told.insert("exception", "not-leader".parse().expect("plain"));
            told.insert("leader-endpoint-host", "127.0.0.1".parse().expect("plain"));
            told.insert("leader-endpoint-port", port.parse().expect("plain"));
            return Err(Status::with_metadata(Code::NotFound, "Leader info available", told));
        }
        Ok(())
    }

    fn shown(&self, event: Kept, of_stream: bool) -> Result<streams::ReadResp, Status> {
        let position = match of_stream && self.age == Age::Old {
            true => u64::MAX,
            false => event.position,
        };
        let metadata = [
            ("type", event.kind),
            ("content-type", event.content_type),
            ("created", "17000000000000000".to_owned()),
        ];
        let event = streams::read_event::RecordedEvent {
            id: Some(streams::Uuid {
                value: Some(streams::uuid::Value::String(event.id.to_string())),
            }),
            stream_identifier: Some(streams::StreamIdentifier {
                stream_name: event.stream.into_bytes(),
            }),
            stream_revision: event.revision,
            prepare_position: position,
            commit_position: position,
            metadata: metadata.map(|(name, value)| (name.to_owned(), value)).into(),
            custom_metadata: event.metadata,
            data: event.data,
        };
        let position = match position {
            u64::MAX => streams::read_event::Position::NoPosition(streams::Empty {}),
            position => streams::read_event::Position::CommitPosition(position),
        };
        Ok(streams::ReadResp {
            content: Some(streams::read_resp::Content::Event(streams::ReadEvent {
                event: Some(event),
                position: Some(position),
            })),
        })
    }

    fn read_stream(&self, asked: &streams::read_req::Options, count: usize) -> Answers {
        use streams::read_req::stream_options::RevisionOption;
        let Some(StreamOption::Stream(place)) = &asked.stream_option else {
            return Box::pin(stream::empty());
        };
        let name = place.stream_identifier.clone().unwrap_or_default().stream_name;
        let name = String::from_utf8(name).expect("a stream's name is text");
        let mut events = self.store.stream(&name);
        if events.is_empty() {
            let missing = streams::read_resp::StreamNotFound {
                stream_identifier: place.stream_identifier.clone(),
            };
            let content = Some(streams::read_resp::Content::StreamNotFound(missing));
            return Box::pin(stream::iter([Ok(streams::ReadResp { content })]));
        }
        let backwards = asked.read_direction == 1;
        if let Some(RevisionOption::Revision(from)) = place.revision_option {
            events.retain(
                |event| if backwards { event.revision <= from } else { event.revision >= from },
            );
        }
        if backwards {
            events.reverse();
        }
        events.truncate(count);
        let shown: Vec<_> = events.into_iter().map(|event| self.shown(event, true)).collect();
        Box::pin(stream::iter(shown))
    }

    /// How many events are before the place that is asked for.
    fn entrance(&self, asked: &streams::read_req::Options) -> Result<usize, Status> {
        use streams::read_req::all_options::AllOption;
        let Some(StreamOption::All(place)) = &asked.stream_option else {
            return Err(Status::invalid_argument("not of $all"));
        };
        match &place.all_option {
            Some(AllOption::Position(place)) => self
                .store
                .before(place.commit_position)
                .ok_or_else(|| Status::unknown("Exception was thrown by handler.")),
            Some(AllOption::End(_)) => Ok(self.store.from(0).len()),
            _ => Ok(0),
        }
    }

    fn read_all(
        &self,
        asked: &streams::read_req::Options,
        count: usize,
    ) -> Result<Answers, Status> {
        let filters = matches!(asked.filter_option, Some(FilterOption::Filter(_)));
        if filters && self.age == Age::Old {
            return Err(Status::unknown("Exception was thrown by handler."));
        }
        let entrance = self.entrance(asked)?;
        let mut events = match asked.read_direction {
            0 => self.store.from(entrance),
            _ => {
                let mut events = self.store.from(0);
                events.truncate(entrance);
                events.reverse();
                events
            }
        };
        events.retain(|event| !filters || !event.stream.starts_with('$'));
        events.truncate(count);
        let shown: Vec<_> = events.into_iter().map(|event| self.shown(event, false)).collect();
        Ok(Box::pin(stream::iter(shown)))
    }

    fn subscribe(self: &Arc<Self>, asked: &streams::read_req::Options) -> Result<Answers, Status> {
        use streams::read_req::all_options::AllOption;
        let is_from_event = matches!(
            &asked.stream_option,
            Some(StreamOption::All(place)) if matches!(place.all_option, Some(AllOption::Position(_)))
        );
        // The event at the place itself is not sent.
        let mut sent = self.entrance(asked)? + usize::from(is_from_event);
        self.subscriptions.fetch_add(1, Ordering::SeqCst);
        let (node, mut grown) = (Arc::clone(self), self.store.grown.subscribe());
        let mut ends = self.ends.subscribe();
        let (sender, answers) = tokio::sync::mpsc::channel(16);
        tokio::spawn(async move {
            let confirmed = streams::read_resp::SubscriptionConfirmation {
                subscription_id: "a subscription".to_owned(),
            };
            let content = Some(streams::read_resp::Content::Confirmation(confirmed));
            let mut open = sender.send(Ok(streams::ReadResp { content })).await.is_ok();
            while open {
                let is_mute = node.mute.load(Ordering::SeqCst);
                for event in if is_mute { Vec::new() } else { node.store.from(sent) } {
                    sent += 1;
                    if event.stream.starts_with('$') {
                        // As some servers have it, with no prepare position.
                        let place = streams::Position {
                            commit_position: event.position,
                            prepare_position: 0,
                        };
                        let content = Some(streams::read_resp::Content::Checkpoint(place));
                        open &= sender.send(Ok(streams::ReadResp { content })).await.is_ok();
                        continue;
                    }
                    open &= sender.send(node.shown(event, false)).await.is_ok();
                }
                tokio::select! {
                    _ = grown.changed() => {}
                    _ = ends.changed() => return,
                    () = sender.closed() => return,
                }
            }
        });
        let answers = stream::unfold(answers, |mut answers| async {
            answers.recv().await.map(|answer| (answer, answers))
        });
        Ok(Box::pin(answers))
    }

    /// Writes what was asked for, or does what is to befall it.
    async fn write(&self, expected: Option<u64>, events: Vec<Kept>) -> Result<Outcome, Status> {
        let fault = self.faults.lock().unwrap().pop_front();
        let timeout = || Status::aborted("Operation timed out");
        match fault {
            None => Ok(self.store.append(expected, events)),
            Some(Fault::NotReady) => Err(Status::unavailable("Server Is Not Ready")),
            Some(Fault::TimeoutBefore) => Err(timeout()),
            Some(Fault::TimeoutAfter) => {
                self.store.append(expected, events);
                Err(timeout())
            }
            Some(Fault::WrittenLate(after)) => {
                let store = Arc::clone(&self.store);
                tokio::spawn(async move {
                    tokio::time::sleep(after).await;
                    store.append(expected, events);
                });
                Err(timeout())
            }
            Some(fault) => {
                if fault == Fault::CutAfter {
                    self.store.append(expected, events);
                }
                self.line.cut();
                std::future::pending().await
            }
        }
    }
}

/// Whether the caller is the administrator, or nobody.
fn is_known(metadata: &MetadataMap, may_be_nobody: bool) -> bool {
    let expected = base64::engine::general_purpose::STANDARD.encode("admin:changeit");
    match metadata.get("authorization").map(|given| given.to_str()) {
        None => may_be_nobody,
        Some(given) => given.is_ok_and(|given| given == format!("Basic {expected}")),
    }
}

type Answers = Pin<Box<dyn Stream<Item = Result<streams::ReadResp, Status>> + Send>>;

#[tonic::async_trait]
impl streams::streams_server::Streams for Arc<Node> {
    type ReadStream = Answers;

    async fn read(&self, request: Request<streams::ReadReq>) -> Result<Response<Answers>, Status> {
        self.admit(request.metadata()).await?;
        let asked = request.into_inner().options.unwrap_or_default();
        let answers = match (&asked.stream_option, &asked.count_option) {
            (_, Some(CountOption::Subscription(_))) => self.subscribe(&asked)?,
            (Some(StreamOption::Stream(_)), Some(CountOption::Count(count))) => {
                self.read_stream(&asked, usize::try_from(*count).unwrap_or(usize::MAX))
            }
            (_, Some(CountOption::Count(count))) => {
                self.read_all(&asked, usize::try_from(*count).unwrap_or(usize::MAX))?
            }
            _ => return Err(Status::invalid_argument("how many?")),
        };
        Ok(Response::new(answers))
    }

    async fn append(
        &self,
        request: Request<Streaming<streams::AppendReq>>,
    ) -> Result<Response<streams::AppendResp>, Status> {
        use streams::append_req::Content;
        use streams::append_req::options::ExpectedStreamRevision;
        self.admit(request.metadata()).await?;
        let mut messages = request.into_inner();
        let (mut options, mut events, mut size) = (None, Vec::new(), 0);
        while let Some(message) = messages.next().await {
            match message?.content {
                Some(Content::Options(given)) => options = Some(given),
                Some(Content::ProposedMessage(event)) => {
                    let kind = event.metadata.get("type").cloned().unwrap_or_default();
                    size += 2 * kind.len() + event.data.len() + event.custom_metadata.len();
                    if size > MAX_APPEND {
                        let text = format!("Maximum Append Size of {MAX_APPEND} Exceeded.");
                        return Err(Status::invalid_argument(text));
                    }
                    events.push(kept(event, kind));
                }
                None => return Err(Status::invalid_argument("what?")),
            }
        }
        let options = options.ok_or_else(|| Status::invalid_argument("where?"))?;
        let name = options.stream_identifier.unwrap_or_default().stream_name;
        let name = String::from_utf8(name).expect("a stream's name is text");
        events.iter_mut().for_each(|event: &mut Kept| event.stream.clone_from(&name));
        let expected = match options.expected_stream_revision {
            Some(ExpectedStreamRevision::Revision(last)) => Some(last),
            Some(ExpectedStreamRevision::NoStream(_)) => None,
            _ => return Err(Status::invalid_argument("T2M names the revision")),
        };
        let outcome = self.write(expected, events).await?;
        Ok(Response::new(streams::AppendResp { result: Some(told(outcome, expected)) }))
    }
}

fn kept(event: streams::append_req::ProposedMessage, kind: String) -> Kept {
    use streams::uuid::Value;
    let id = match event.id.and_then(|id| id.value) {
        Some(Value::String(text)) => text.parse().expect("an id"),
        Some(Value::Structured(id)) => {
            let half = |bits: i64| u128::from(bits.cast_unsigned());
            let high = half(id.most_significant_bits) << 64;
            Uuid::from_u128(high | half(id.least_significant_bits))
        }
        None => Uuid::nil(),
    };
    Kept {
        id,
        stream: String::new(),
        revision: 0,
        position: 0,
        kind,
        content_type: event.metadata.get("content-type").cloned().unwrap_or_default(),
        metadata: event.custom_metadata,
        data: event.data,
    }
}

fn told(outcome: Outcome, expected: Option<u64>) -> streams::append_resp::Result {
    use streams::append_resp::success::{CurrentRevisionOption as Revision, PositionOption};
    use streams::append_resp::wrong_expected_version::{
        CurrentRevisionOption, ExpectedRevisionOption,
    };
    use streams::append_resp::{Success, WrongExpectedVersion};
    let empty = streams::Empty {};
    match outcome {
        Outcome::Done(revision, position) => streams::append_resp::Result::Success(Success {
            current_revision_option: Some(Revision::CurrentRevision(revision)),
            position_option: Some(PositionOption::Position(streams::Position {
                commit_position: position,
                prepare_position: position,
            })),
        }),
        Outcome::Unexpected(last) => {
            streams::append_resp::Result::WrongExpectedVersion(WrongExpectedVersion {
                current_revision_option: Some(last.map_or(
                    CurrentRevisionOption::CurrentNoStream(empty),
                    CurrentRevisionOption::CurrentRevision,
                )),
                expected_revision_option: Some(expected.map_or(
                    ExpectedRevisionOption::ExpectedNoStream(empty),
                    ExpectedRevisionOption::ExpectedRevision,
                )),
            })
        }
    }
}

#[tonic::async_trait]
impl gossip::gossip_server::Gossip for Arc<Node> {
    async fn read(
        &self,
        request: Request<gossip::Empty>,
    ) -> Result<Response<gossip::ClusterInfo>, Status> {
        const FOLLOWER: i32 = 6;
        const LEADER: i32 = 8;
        if !is_known(request.metadata(), true) {
            return Err(Status::unauthenticated("who is it?"));
        }
        let Some(cluster) = self.cluster.get() else {
            return Err(Status::unavailable("no cluster"));
        };
        let members = cluster.nodes.iter().map(|node| gossip::MemberInfo {
            state: if Arc::ptr_eq(node, cluster.leader()) { LEADER } else { FOLLOWER },
            is_alive: !node.line.refuses(),
            http_end_point: Some(gossip::EndPoint {
                address: "127.0.0.1".to_owned(),
                port: node.line.port.into(),
            }),
        });
        Ok(Response::new(gossip::ClusterInfo { members: members.collect() }))
    }
}

#[tonic::async_trait]
impl server_features::server_features_server::ServerFeatures for Arc<Node> {
    async fn get_supported_methods(
        &self,
        _: Request<server_features::Empty>,
    ) -> Result<Response<server_features::SupportedMethods>, Status> {
        match self.age {
            Age::Old => Err(Status::unimplemented("Service is unimplemented.")),
            Age::New => Ok(Response::new(server_features::SupportedMethods {
                event_store_server_version: "22.10.0".to_owned(),
            })),
        }
    }
}
