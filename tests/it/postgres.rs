//! A PostgreSQL server of the tests' own, run by `scripts/postgres`, and a connection to it that can
//! be cut, slowed and refused.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener as StdListener;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use t2m::log::Deadlines;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_postgres::{Client, NoTls};

/// Deadlines with which a test of faults does not wait long.
pub const SHORT: Deadlines = Deadlines {
    start: Duration::from_secs(60),
    connect: Duration::from_millis(1000),
    statement: Duration::from_millis(1000),
    settle: Duration::from_millis(500),
    poll: Duration::from_millis(100),
};

/// A server that runs until it is dropped, or this process ends, however it ends.
pub struct Postgres {
    process: Child,
    pipes: Mutex<(Option<ChildStdin>, BufReader<ChildStdout>)>,
    port: u16,
    databases: AtomicUsize,
    _directory: TempDir,
}

impl Postgres {
    /// The one that tests share which only read and write.
    pub fn shared() -> &'static Self {
        static SHARED: OnceLock<Postgres> = OnceLock::new();
        SHARED.get_or_init(Self::start_own)
    }

    /// One that a test may crash.
    pub fn start_own() -> Self {
        use std::os::unix::fs::PermissionsExt;
        let readable = std::fs::Permissions::from_mode(0o755);
        let directory = tempfile::Builder::new().permissions(readable).tempdir();
        let directory = directory.expect("a temporary directory");
        let port = free_port();
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/postgres");
        let mut process = Command::new(script)
            .arg(directory.path().join("server"))
            .arg(port.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("scripts/postgres starts");
        let stdin = process.stdin.take().expect("its input is piped");
        let stdout = BufReader::new(process.stdout.take().expect("its output is piped"));
        let server = Self {
            process,
            pipes: Mutex::new((Some(stdin), stdout)),
            port,
            databases: AtomicUsize::new(0),
            _directory: directory,
        };
        server.hear("ready");
        server
    }

    fn hear(&self, wanted: &str) {
        let mut line = String::new();
        let mut pipes = self.pipes.lock().unwrap();
        pipes.1.read_line(&mut line).expect("scripts/postgres speaks");
        assert_eq!(line.trim(), wanted, "is PostgreSQL missing? run scripts/setup-tests");
    }

    fn tell(&self, command: &str) {
        let mut pipes = self.pipes.lock().unwrap();
        let stdin = pipes.0.as_mut().expect("it is open until the drop");
        writeln!(stdin, "{command}").expect("scripts/postgres listens");
        drop(pipes);
        self.hear("done");
    }

    /// Its processes end at once, and write nothing more.
    pub fn crash(&self) {
        self.tell("crash");
    }

    pub fn start_again(&self) {
        self.tell("start");
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// An administrator's address of a database.
    pub fn address(&self, database: &str) -> String {
        format!("postgres://postgres:postgres@127.0.0.1:{}/{database}", self.port)
    }

    /// An empty database; its name.
    pub async fn database(&self) -> String {
        self.database_with("").await
    }

    pub async fn database_with(&self, options: &str) -> String {
        let number = self.databases.fetch_add(1, Ordering::Relaxed);
        let name = format!("test_{number}");
        let create = format!("CREATE DATABASE {name} TEMPLATE template0 {options}");
        self.client("postgres").await.batch_execute(&create).await.expect("it is created");
        name
    }

    /// A stranger's connection.
    pub async fn client(&self, database: &str) -> Client {
        let connected = tokio_postgres::connect(&self.address(database), NoTls).await;
        let (client, connection) = connected.expect("the server answers");
        tokio::spawn(connection);
        client
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // It ends the server when its input ends.
        self.pipes.get_mut().map(|pipes| pipes.0.take()).ok();
        let _ = self.process.wait();
    }
}

/// A port that was free a moment ago.
pub fn free_port() -> u16 {
    let listener = StdListener::bind("127.0.0.1:0").expect("a port is free");
    listener.local_addr().expect("it has an address").port()
}

/// Stands between a log and its server.
pub struct Proxy {
    port: u16,
    line: Arc<Line>,
}

struct Line {
    server: u16,
    /// Bytes that may still pass before everything is cut, once.
    left: AtomicU64,
    /// Milliseconds that each piece of an answer is held back.
    delay_ms: AtomicU64,
    /// How often somebody has connected.
    connected: AtomicU64,
    /// Counts what was cut; those who carry a connection end with it.
    cuts: watch::Sender<u64>,
}

impl Proxy {
    pub async fn to(server: &Postgres) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let port = listener.local_addr().expect("it has an address").port();
        let line = Arc::new(Line {
            server: server.port,
            left: AtomicU64::new(u64::MAX),
            delay_ms: AtomicU64::new(0),
            connected: AtomicU64::new(0),
            cuts: watch::Sender::new(0),
        });
        let carried = Arc::clone(&line);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                carried.connected.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(carry(Arc::clone(&carried), client));
            }
        });
        Self { port, line }
    }

    pub fn address(&self, database: &str) -> String {
        format!("postgres://postgres:postgres@127.0.0.1:{}/{database}", self.port)
    }

    /// Cuts all connections after so many more bytes, of questions and answers together.
    pub fn cut_after(&self, bytes: u64) {
        self.line.left.store(bytes, Ordering::SeqCst);
    }

    /// Whether the last [`Proxy::cut_after`] has come to pass.
    pub fn was_cut(&self) -> bool {
        self.line.left.load(Ordering::SeqCst) == u64::MAX
    }

    /// How often somebody has connected.
    pub fn connected(&self) -> u64 {
        self.line.connected.load(Ordering::SeqCst)
    }

    pub fn hold_answers(&self, delay: Duration) {
        let millis = u64::try_from(delay.as_millis()).expect("a short delay");
        self.line.delay_ms.store(millis, Ordering::SeqCst);
    }
}

async fn carry(line: Arc<Line>, client: TcpStream) {
    let Ok(server) = TcpStream::connect(("127.0.0.1", line.server)).await else { return };
    let mut cuts = line.cuts.subscribe();
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let asking = pass(&line, from_client, to_server, false);
    let answering = pass(&line, from_server, to_client, true);
    tokio::select! {
        () = asking => {}
        () = answering => {}
        _ = cuts.changed() => {}
    }
}

async fn pass(
    line: &Line,
    mut from: impl AsyncReadExt + Unpin,
    mut to: impl AsyncWriteExt + Unpin,
    answers: bool,
) {
    let mut buffer = vec![0; 16 * 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        let delay = line.delay_ms.load(Ordering::SeqCst);
        if answers && delay > 0 {
            tokio::time::sleep(Duration::from_millis(delay)).await;
        }
        let count = length as u64;
        let take = |left| if left == u64::MAX { None } else { Some(left - count.min(left)) };
        let left = line.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take);
        match left {
            Ok(left) if left <= count => {
                // A part of the message goes out, as a network would have it.
                let part = usize::try_from(left).expect("a small number");
                let _ = to.write_all(&buffer[..part]).await;
                line.left.store(u64::MAX, Ordering::SeqCst);
                line.cuts.send_modify(|cuts| *cuts += 1);
                return;
            }
            _ => {}
        }
        if to.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}
