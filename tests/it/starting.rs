//! A log over the network that cannot be used at the start: what is said, how long it is waited for,
//! and with which exit code it ends. Never is a password shown.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::postgres::{Postgres, free_port};
use crate::server::{Server, Setup};

const PASSWORD: &str = "hunter2";

/// What `t2m serve` says, in one sentence, instead of serving.
fn refused(address: &str) -> String {
    let data = TempDir::new().unwrap();
    let setup = Setup::clerk().with("T2M_LOG", address);
    let Output { status, stdout, stderr } = setup.run(data.path(), &["serve"]);
    let told = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(1), "{told}");
    assert!(stdout.is_empty(), "it listened");
    assert_eq!(told.trim().lines().count(), 1, "{told}");
    assert!(told.contains("T2M_LOG: "), "{told}");
    assert!(!told.contains(PASSWORD) && !told.contains("postgres:postgres"), "{told}");
    // An operator's command says the same.
    let shown = setup.run(data.path(), &["log", "stats"]);
    let shown = String::from_utf8(shown.stderr).unwrap();
    assert!(shown.contains("T2M_LOG: ") && !shown.contains(PASSWORD), "{shown}");
    told
}

#[tokio::test]
async fn what_can_only_be_put_right_by_hand_is_refused_at_once() {
    let server = Postgres::shared();
    let port = server.port();
    let [foreign, newer] = [server.database().await, server.database().await];
    let sql = "CREATE SCHEMA t2m; CREATE TABLE t2m.events (x int)";
    server.client(&foreign).await.batch_execute(sql).await.unwrap();
    drop(t2m::log::open(&server.address(&newer), "".as_ref()).await.unwrap());
    let sql = "UPDATE t2m.log SET version = 99";
    server.client(&newer).await.batch_execute(sql).await.unwrap();
    let at = |who: &str, database: &str| format!("postgres://{who}@127.0.0.1:{port}/{database}");
    let (admin, wrong) = ("postgres:postgres", format!("postgres:{PASSWORD}"));
    for (address, because) in [
        (at(&wrong, &newer), "password authentication failed"),
        (at(admin, "nowhere"), "database \"nowhere\" does not exist"),
        (at(admin, &foreign), "is not a T2M log; it was left as it is"),
        (at(admin, &newer), "version 99 and this program knows version"),
        (format!("{}?sslmode=require", at(admin, &newer)), "TLS"),
    ] {
        let told = refused(&address);
        assert!(told.contains(because), "{because:?} is not in {told}");
    }
}

/// It takes the minute that it says.
#[test]
fn a_server_that_is_not_there_is_waited_for_aloud_and_then_given_up() {
    let address = format!("postgres://me:{PASSWORD}@127.0.0.1:{}/d", free_port());
    let data = TempDir::new().unwrap();
    let setup = Setup::clerk().with("T2M_LOG", &address).with("RUST_LOG", "warn");
    // Both wait at the same time.
    let started = [&["serve"][..], &["log", "stats"]].map(|arguments| {
        let mut command = setup.command(data.path(), arguments);
        command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("t2m starts")
    });
    for mut waiting in started {
        let mut line = String::new();
        let mut stderr = BufReader::new(waiting.stderr.take().unwrap());
        stderr.read_line(&mut line).unwrap();
        assert!(line.contains("waiting for the log") && line.contains("T2M_LOG"), "{line}");
        assert!(!line.contains(PASSWORD), "{line}");
        let mut rest = String::new();
        stderr.read_to_string(&mut rest).unwrap();
        assert_eq!(waiting.wait().unwrap().code(), Some(1), "{rest}");
        let last = rest.lines().last().unwrap();
        assert!(last.starts_with("t2m: opening the log"), "{last}");
        assert!(last.contains("T2M_LOG: database `d` at 127.0.0.1:"), "{last}");
        assert!(last.contains("could not be reached within 60 s"), "{last}");
        assert!(!rest.contains(PASSWORD), "{rest}");
    }
}

#[test]
fn a_server_that_waits_for_its_log_ends_when_it_is_told_to() {
    let data = TempDir::new().unwrap();
    let setup = Setup::clerk()
        .with("T2M_LOG", format!("postgres://127.0.0.1:{}/d", free_port()))
        .with("RUST_LOG", "warn");
    let mut command = setup.command(data.path(), &["serve"]);
    let mut waiting = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(waiting.stderr.take().unwrap()).read_line(&mut line).unwrap();
    assert!(line.contains("waiting for the log"), "{line}");
    kill_process(Pid::from_child(&waiting), Signal::TERM).unwrap();
    // Not ended by the signal, but of its own accord, as a container's first process has to.
    assert_eq!(waiting.wait().unwrap().code(), Some(0));
}

/// An authority, and a certificate of it for `localhost`.
struct Certificates(TempDir);

impl Certificates {
    fn make() -> Self {
        let made = Self(TempDir::new().unwrap());
        for name in ["ca", "stranger"] {
            made.openssl(&format!(
                "req -x509 -newkey rsa:2048 -nodes -keyout {name}.key -out {name}.crt -days 2 \
                 -subj /CN={name} -addext basicConstraints=critical,CA:TRUE"
            ));
        }
        made.openssl("req -newkey rsa:2048 -nodes -keyout server.key -out server.csr -subj /CN=x");
        std::fs::write(made.path("names"), "subjectAltName=DNS:localhost\n").unwrap();
        made.openssl(
            "x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 \
             -extfile names -out server.crt",
        );
        made
    }

    fn openssl(&self, arguments: &str) {
        let mut command = Command::new("openssl");
        let made = command.args(arguments.split_whitespace()).current_dir(&self.0).output();
        let made = made.expect("openssl is there");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.0.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap()
    }
}

/// TLS with this certificate, on a server that runs; written by the server, which owns its key then.
async fn turn_tls_on(server: &Postgres, certificates: &Certificates) {
    let client = server.client("postgres").await;
    for name in ["server.key", "server.crt"] {
        let text = certificates.text(name);
        let lines: Vec<String> = text.lines().map(|line| format!("('{line}')")).collect();
        let write =
            format!("COPY (VALUES {}) TO PROGRAM 'umask 077; cat > {name}'", lines.join(","));
        client.batch_execute(&write).await.unwrap();
    }
    client.batch_execute("ALTER SYSTEM SET ssl = on").await.unwrap();
    client.batch_execute("SELECT pg_reload_conf()").await.unwrap();
    crate::engine_faults::until("TLS is on", async || {
        let shown = server.client("postgres").await.query_one("SHOW ssl", &[]).await.unwrap();
        shown.get::<_, &str>(0) == "on"
    })
    .await;
}

#[tokio::test]
async fn over_tls_the_certificate_must_be_the_hosts_and_of_an_authority_that_is_known() {
    let server = Postgres::start_own();
    let certificates = Certificates::make();
    turn_tls_on(&server, &certificates).await;
    let port = server.port();
    let at = |host: &str, roots: &Path, mode: &str| {
        let roots = roots.display();
        format!(
            "postgres://postgres:postgres@{host}:{port}/postgres?sslmode={mode}&sslrootcert={roots}"
        )
    };
    let (ca, stranger) = (certificates.path("ca.crt"), certificates.path("stranger.crt"));
    let node = Server::start(Setup::clerk().with("T2M_LOG", at("localhost", &ca, "verify-full")));
    node.generate("user_ada", "over TLS").await;
    let encrypted = "SELECT count(*) FROM pg_stat_ssl s JOIN pg_stat_activity a USING (pid)
                     WHERE a.application_name = 't2m' AND s.ssl";
    let encrypted = server.client("postgres").await.query_one(encrypted, &[]).await.unwrap();
    assert!(encrypted.get::<_, i64>(0) > 0, "nothing is encrypted");
    for (address, because) in [
        (at("127.0.0.1", &ca, "verify-full"), "not valid for name"),
        (at("localhost", &stranger, "verify-full"), "UnknownIssuer"),
        (at("localhost", &stranger, "require"), "UnknownIssuer"),
    ] {
        let told = refused(&address);
        assert!(told.contains("certificate") && told.contains(because), "{told}");
    }
    let file = certificates.path("none.crt");
    let output = Setup::clerk()
        .with("T2M_LOG", at("localhost", &file, "verify-full"))
        .run(certificates.0.path(), &["serve"]);
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{told}");
    assert!(told.starts_with("T2M_LOG: the certificates of sslrootcert"), "{told}");
}
