//! A PostgreSQL server of a benchmark's own, run by `scripts/postgres`.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};

use tokio::runtime::Runtime;
use tokio_postgres::{Client, NoTls};

pub async fn connect(address: &str) -> Client {
    let (client, connection) =
        tokio_postgres::connect(address, NoTls).await.expect("the server answers");
    tokio::spawn(connection);
    client
}

/// Ends with its input, when it is dropped.
pub struct Server {
    process: Child,
    port: u16,
    _directory: tempfile::TempDir,
}

impl Server {
    pub fn start() -> Self {
        use std::os::unix::fs::PermissionsExt;
        let readable = std::fs::Permissions::from_mode(0o755);
        let directory = tempfile::Builder::new().permissions(readable).tempdir();
        let directory = directory.expect("a directory");
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("an address").port();
        drop(listener);
        let mut process = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/postgres"))
            .arg(directory.path().join("server"))
            .arg(port.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("scripts/postgres");
        let mut line = String::new();
        let stdout = process.stdout.as_mut().expect("piped");
        BufReader::new(stdout).read_line(&mut line).expect("it speaks");
        assert_eq!(line, "ready\n");
        Self { process, port, _directory: directory }
    }

    /// The address of a new database.
    pub fn database(&self, name: &str, runtime: &Runtime) -> String {
        let at = |database: &str| {
            format!("postgres://postgres:postgres@127.0.0.1:{}/{database}", self.port)
        };
        runtime.block_on(async {
            let create = format!("CREATE DATABASE {name}");
            connect(&at("postgres")).await.batch_execute(&create).await.expect("created");
        });
        at(name)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(mut stdin) = self.process.stdin.take() {
            let _ = stdin.flush();
        }
        let _ = self.process.wait();
    }
}
