//! The real binary, started on a free port with a data directory of its own, and a client that
//! speaks to it as browsers, Clerk and operators do. Nothing here waits for time to pass: what is
//! waited for is an event, and the deadlines only turn a hang into a failure.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, OnceLock, mpsc};
use std::time::Duration;

use reqwest::header::HeaderMap;
use reqwest::{Client, Method, RequestBuilder, Response};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use t2m::clerk::signing::SigningKey;
use t2m::clerk::webhook;
use t2m::clock::Clock;
use tempfile::TempDir;

pub const ISSUER: &str = "https://clerk.t2m.test";
pub const WEBHOOK_SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
pub const LINK_SECRET: &str = "a secret that signs the links of the tests";
/// Where the log lines go, for a test that reads them; not a variable of `t2m`.
pub const LOG_FILE: &str = "TEST_LOG_FILE";
/// The words before the program, for a test that starts it under another one; not a variable of
/// `t2m`.
pub const UNDER: &str = "TEST_UNDER";
/// Long enough for a render on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// What a server is started with.
#[derive(Clone)]
pub struct Setup(Vec<(&'static str, String)>);

impl Setup {
    /// Tokens of [`key`], signed webhooks and links, no renderer, budgets that nobody uses up.
    pub fn clerk() -> Self {
        Self::development()
            .with("CLERK_ISSUER", ISSUER)
            .with("CLERK_JWT_KEY", key().public_pem().expect("the test key has a public half"))
            .with("CLERK_WEBHOOK_SECRET", WEBHOOK_SECRET)
            .with("FILE_SIGNING_SECRET", LINK_SECRET)
    }

    /// Nothing about Clerk: the key that development makes for itself.
    pub fn development() -> Self {
        Self(Vec::new())
            .with("T2M_ENGINE", "none")
            .with("RATE_LIMIT_WRITES", "1000000/1h")
            .with("RATE_LIMIT_READS", "1000000/1h")
            .with("RATE_LIMIT_LINKS", "1000000/1h")
            .with("RATE_LIMIT_ANONYMOUS", "1000000/1h")
    }

    /// Sets a variable; the last value counts.
    pub fn with(mut self, variable: &'static str, value: impl Into<String>) -> Self {
        self.0.push((variable, value.into()));
        self
    }

    /// Runs `t2m` with these variables until it ends.
    pub fn run(&self, data_dir: &Path, arguments: &[&str]) -> Output {
        self.command(data_dir, arguments).output().expect("t2m starts")
    }

    pub fn command(&self, data_dir: &Path, arguments: &[&str]) -> Command {
        let set = |wanted| self.0.iter().rev().find(|(name, _)| *name == wanted);
        let mut words = set(UNDER).map_or("", |(_, words)| words).split_whitespace();
        let program = env!("CARGO_BIN_EXE_t2m");
        let mut command = Command::new(words.next().unwrap_or(program));
        if set(UNDER).is_some() {
            command.args(words).arg(program);
        }
        command
            .args(arguments)
            // Neither the machine's variables nor anybody's `.env`.
            .env_clear()
            .current_dir(data_dir)
            .env("T2M_LISTEN", "127.0.0.1:0")
            .env("T2M_DATA_DIR", data_dir)
            .env("RUST_LOG", "off")
            .envs(self.0.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null());
        if let Some((_, path)) = set(LOG_FILE) {
            let file = std::fs::File::options().create(true).append(true).open(path);
            command.stderr(file.expect("the log file opens"));
        }
        command
    }
}

/// The key that signs the tests' tokens; making one is slow, so that there is one.
pub fn key() -> &'static SigningKey {
    static KEY: OnceLock<SigningKey> = OnceLock::new();
    KEY.get_or_init(|| SigningKey::generate("tests").expect("an RSA key can be made"))
}

/// The present, in Unix seconds.
pub fn now() -> i64 {
    Clock::system().now().timestamp()
}

/// The claims of a fresh token, as Clerk's template makes them.
pub fn claims(user: &str) -> Value {
    let now = now();
    json!({
        "iss": ISSUER, "aud": "t2m-api", "sub": user, "sid": session_of(user),
        "iat": now, "nbf": now, "exp": now + 3600,
    })
}

/// The session that [`claims`] names.
pub fn session_of(user: &str) -> String {
    format!("sess_{user}")
}

/// A token with these claims.
pub fn signed(claims: &Value) -> String {
    key().sign(claims).expect("the test key signs")
}

/// A server that runs until it is dropped.
pub struct Server {
    setup: Setup,
    process: Child,
    /// Kept, so that the server can go on printing.
    _stdout: BufReader<ChildStdout>,
    /// `http://127.0.0.1:…`
    pub address: String,
    data: Arc<TempDir>,
    http: Client,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Server {
    pub fn start(setup: Setup) -> Self {
        Self::start_on(setup, Arc::new(TempDir::new().expect("a temporary directory")))
    }

    /// On data that are there already.
    pub fn start_in(setup: Setup, data: TempDir) -> Self {
        Self::start_on(setup, Arc::new(data))
    }

    fn start_on(setup: Setup, data: Arc<TempDir>) -> Self {
        Self::try_start_on(setup, data).unwrap_or_else(|said| panic!("t2m serve said {said:?}"))
    }

    /// What it said instead of its address, if it does not start.
    pub fn try_start_on(setup: Setup, data: Arc<TempDir>) -> Result<Self, String> {
        let mut command = setup.command(data.path(), &["serve"]);
        let mut process = command.stdout(Stdio::piped()).spawn().expect("t2m starts");
        let stdout = BufReader::new(process.stdout.take().expect("its output is piped"));
        let (line, stdout) = first_line(stdout);
        let Some(address) = line.trim().strip_prefix("listening on ").map(str::to_owned) else {
            let _ = process.kill();
            let _ = process.wait();
            return Err(line);
        };
        Ok(Self { setup, process, _stdout: stdout, address, data, http: Client::new() })
    }

    /// Ends it as `kill -9` does, if it still runs.
    pub fn kill(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }

    /// Ends it as an operator would.
    pub fn stop(&mut self) -> ExitStatus {
        self.send(Signal::TERM);
        self.ended()
    }

    /// Waits for its end, once it was told to.
    pub fn ended(&mut self) -> ExitStatus {
        self.process.wait().expect("the server ends")
    }

    pub fn process_id(&self) -> u32 {
        self.process.id()
    }

    /// Does not wait for the effect.
    pub fn send(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.process), signal).expect("the server was running");
    }

    /// Starts another one on the same data, once this one is dead.
    pub fn start_again(self) -> Self {
        let setup = self.setup.clone();
        self.start_again_as(setup)
    }

    /// The same with other variables.
    pub fn start_again_as(mut self, setup: Setup) -> Self {
        self.kill();
        Self::start_on(setup, Arc::clone(&self.data))
    }

    pub fn data_dir(&self) -> &Path {
        self.data.path()
    }

    /// Runs a command of `t2m` on this server's data.
    pub fn run(&self, arguments: &[&str]) -> Output {
        self.setup.run(self.data_dir(), arguments)
    }

    /// What [`Server::run`] prints, which must succeed.
    pub fn printed(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "t2m {arguments:?}: {errors}");
        String::from_utf8(output.stdout).expect("t2m prints UTF-8")
    }

    /// A request below `/api/v1/`; a path that begins with a slash stands as it is.
    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let below = if path.starts_with('/') { "" } else { "/api/v1/" };
        self.http.request(method, format!("{}{below}{path}", self.address)).timeout(PATIENCE)
    }

    /// A request of a user with a fresh token.
    pub fn request_of(&self, user: &str, method: Method, path: &str) -> RequestBuilder {
        self.request(method, path).bearer_auth(signed(&claims(user)))
    }

    pub async fn get(&self, user: &str, path: &str) -> Answer {
        ask(self.request_of(user, Method::GET, path)).await
    }

    pub async fn post(&self, user: &str, path: &str, body: &Value) -> Answer {
        ask(self.request_of(user, Method::POST, path).json(body)).await
    }

    pub async fn delete(&self, user: &str, path: &str) -> Answer {
        ask(self.request_of(user, Method::DELETE, path)).await
    }

    /// Uploads a text file and gives `data` of the answer.
    pub async fn upload(&self, user: &str, name: &str, text: &str) -> Value {
        use reqwest::multipart::{Form, Part};
        let part = Part::text(text.to_owned()).file_name(name.to_owned());
        let part = part.mime_str("text/plain").expect("a media type");
        let form = Form::new().part("file", part).text("purpose", "test");
        let request = self.request_of(user, Method::POST, "files/upload").multipart(form);
        ask(request).await.data(200)
    }

    /// Asks for a video and gives the job's id.
    pub async fn generate(&self, user: &str, prompt: &str) -> String {
        let data = self.post(user, "videos/generate", &json!({ "prompt": prompt })).await.data(202);
        data["job_id"].as_str().expect("a job has an id").to_owned()
    }

    /// Delivers a webhook with a message id of its own.
    pub async fn deliver(&self, kind: &str, data: &Value) -> Answer {
        let id = format!("msg_{}", Clock::system().fresh_id().simple());
        ask(self.delivery(&id, kind, data)).await
    }

    /// A signed delivery.
    pub fn delivery(&self, id: &str, kind: &str, data: &Value) -> RequestBuilder {
        let at = Clock::system().now();
        let body = json!({
            "type": kind, "object": "event", "timestamp": at.timestamp_millis(), "data": data,
        });
        let body = body.to_string();
        let signature = webhook::sign(WEBHOOK_SECRET, id, at.timestamp(), body.as_bytes());
        self.request(Method::POST, "webhooks/clerk")
            .header("svix-id", id)
            .header("svix-timestamp", at.timestamp())
            .header("svix-signature", signature.expect("the test secret signs"))
            .header("content-type", "application/json")
            .body(body)
    }

    /// The position at which the log ends.
    pub async fn log_position(&self) -> u64 {
        let data = ask(self.request(Method::GET, "system/ready")).await.data(200);
        data["log_position"].as_u64().expect("readiness tells the position")
    }

    /// Opens an event stream once its user may have another one: one that was hung up counts until
    /// the server has noticed.
    pub async fn events_when_free(&self, user: &str, path: &str, after: Option<u64>) -> Events {
        let mut response = self.ask_for_events(user, path, after).await;
        for _ in 0..500 {
            if response.status() != 429 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
            response = self.ask_for_events(user, path, after).await;
        }
        assert_eq!(response.status(), 200);
        Events { response, unread: String::new(), last_id: None }
    }

    async fn ask_for_events(&self, user: &str, path: &str, after: Option<u64>) -> Response {
        let mut request = self.request_of(user, Method::GET, path);
        if let Some(after) = after {
            request = request.header("last-event-id", after);
        }
        request.send().await.expect("the stream opens")
    }

    /// Opens an event stream; `after` is its `Last-Event-ID`.
    pub async fn events(&self, user: &str, path: &str, after: Option<u64>) -> Events {
        let response = self.ask_for_events(user, path, after).await;
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream; charset=utf-8");
        Events { response, unread: String::new(), last_id: None }
    }
}

fn first_line(mut stdout: BufReader<ChildStdout>) -> (String, BufReader<ChildStdout>) {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut line = String::new();
        let _ = stdout.read_line(&mut line);
        let _ = sender.send((line, stdout));
    });
    receiver.recv_timeout(PATIENCE).expect("t2m serve says its address")
}

/// An answer, read whole.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    pub bytes: Vec<u8>,
    /// Null unless the answer is JSON.
    pub body: Value,
}

impl Answer {
    /// `data` of a success with this status.
    #[track_caller]
    pub fn data(mut self, status: u16) -> Value {
        assert_eq!(self.status, status, "{}", self.body);
        assert_eq!(self.body["success"], true, "{}", self.body);
        self.body["data"].take()
    }

    /// A header's text, empty if it is missing.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    /// `X-Log-Position`.
    #[track_caller]
    pub fn position(&self) -> u64 {
        self.header("x-log-position").parse().expect("the answer tells its position")
    }

    /// Checks the form that every refusal has, and that it tells nothing of what is inside.
    #[track_caller]
    pub fn assert_refused(&self, status: u16, code: &str) {
        let body = &self.body;
        assert_eq!((self.status, body["code"].as_str()), (status, Some(code)), "{body}");
        assert_eq!(body["success"], false, "{body}");
        assert!(body["error"].as_str().is_some_and(|sentence| !sentence.is_empty()), "{body}");
        assert_eq!(body["error"], body["message"], "{body}");
        assert!(body["detail"].is_object(), "{body}");
        assert!(!self.header("x-request-id").is_empty(), "no request id: {body}");
        assert_eq!(self.header("www-authenticate").starts_with("Bearer"), status == 401, "{body}");
        let text = String::from_utf8_lossy(&self.bytes);
        for inside in ["serde", "expected", "line 1 column", "panicked", "sqlite", ".rs"] {
            assert!(!text.contains(inside), "{inside:?} in {text}");
        }
    }
}

/// Sends a request and reads its answer.
pub async fn ask(request: RequestBuilder) -> Answer {
    try_ask(request).await.expect("the server answers")
}

/// Sends a request to a server that may die over it.
pub async fn try_ask(request: RequestBuilder) -> reqwest::Result<Answer> {
    let response = request.send().await?;
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    let bytes = response.bytes().await?.to_vec();
    let body = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
    Ok(Answer { status, headers, bytes, body })
}

/// One Server-Sent Event.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    pub id: u64,
    pub kind: String,
    pub data: Value,
}

/// An open event stream; dropping it cuts the connection.
pub struct Events {
    response: Response,
    unread: String,
    /// The last `id:` that came, with an event or without one; what a browser would go on from.
    pub last_id: Option<u64>,
}

impl Events {
    /// Reads the greeting.
    pub async fn greeted(mut self) -> Self {
        let greeting = self.response.chunk().await.expect("the stream does not break off");
        self.unread
            .push_str(std::str::from_utf8(&greeting.expect("it stays open")).expect("ASCII"));
        let id =
            self.unread.strip_prefix(": connected\n").expect("a greeting").strip_prefix("id: ");
        let id = id.and_then(|rest| rest.lines().next());
        self.last_id = id.map(|id| id.parse().expect("it is a position"));
        self
    }

    /// The next event; none when the server ends the stream.
    pub async fn next(&mut self) -> Option<Event> {
        loop {
            while let Some(end) = self.unread.find("\n\n") {
                let frame: String = self.unread.drain(..end + 2).collect();
                let id = frame.lines().find_map(|line| line.strip_prefix("id: "));
                self.last_id = id.and_then(|id| id.parse().ok()).or(self.last_id);
                if let Some(event) = event(&frame) {
                    return Some(event);
                }
            }
            let chunk = self.response.chunk().await.expect("the stream does not break off")?;
            self.unread.push_str(std::str::from_utf8(&chunk).expect("frames are ASCII here"));
        }
    }
}

/// None for a comment.
fn event(frame: &str) -> Option<Event> {
    let field = |name: &str| frame.lines().find_map(|line| line.strip_prefix(name));
    Some(Event {
        data: serde_json::from_str(field("data: ")?).expect("JSON"),
        id: field("id: ").expect("an event has an id").parse().expect("an id is a position"),
        kind: field("event: ").expect("an event has a type").to_owned(),
    })
}
