//! The Nth call that makes something durable fails with EIO, for one N after the other: an error or
//! a success, and never a promise that is not kept. Here `strace` has those fail by which SQLite writes,
//! and all syncs; [`files`] has those by which files come to be.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use tempfile::TempDir;

use super::deeds::Deeds;
use super::ledger::Ledger;
use super::{rounds, skip, until};
use crate::server::{Server, Setup, UNDER};

pub mod files;

/// How SQLite writes, and how it and the stores of files sync.
const CALLS: [&str; 3] = ["pwrite64", "fdatasync,fsync", "ftruncate"];
/// What the short form tries. Each thread counts its own calls.
const WHILE_STARTING: [usize; 2] = [2, 24];
const WHILE_SERVING: [usize; 5] = [1, 2, 3, 7, 16];
const COMMANDS: usize = 12;
/// What is found in the report of a run in which something failed.
const INJECTED: &str = "(INJECTED)";

#[tokio::test]
async fn a_call_that_fails_while_it_starts_breaks_nothing() {
    each_fails(&WHILE_STARTING, async |call, nth, seen| {
        let under = format!("strace -D --seccomp-bpf {}", injection(call, nth, seen));
        let data = data();
        let mut clients = Clients::new();
        // Not to start is an answer too.
        let setup = Setup::clerk().with(UNDER, under);
        if let Ok(mut server) = Server::try_start_on(setup, Arc::clone(&data)) {
            clients.ask(&server).await;
            server.kill();
        }
        clients.restart_and_audit(data).await;
    })
    .await;
}

#[tokio::test]
async fn a_call_that_fails_while_it_serves_breaks_no_promise() {
    each_fails(&WHILE_SERVING, async |call, nth, seen| {
        let data = data();
        let mut server =
            Server::try_start_on(Setup::clerk(), Arc::clone(&data)).expect("it starts");
        let mut strace = attach(&server, call, nth, seen);
        let mut clients = Clients::new();
        clients.ask(&server).await;
        server.kill();
        strace.wait().expect("it ends with the server");
        clients.restart_and_audit(data).await;
    })
    .await;
}

/// One run for each call and N, as long as there is an Nth call.
async fn each_fails(sample: &[usize], run: impl AsyncFn(&str, usize, &Path)) {
    if let Err(error) = Command::new("strace").arg("-V").output() {
        return skip("failing calls", &format!("strace: {error}"));
    }
    let last = rounds(0);
    for call in CALLS {
        let every = if last == 0 { sample.to_vec() } else { (1..=last).collect() };
        let mut failed = 0;
        for nth in every {
            println!("{call} no. {nth}");
            let place = TempDir::new().expect("a temporary directory");
            let seen = place.path().join("seen");
            run(call, nth, &seen).await;
            if !std::fs::read_to_string(seen).expect("strace tells").contains(INJECTED) {
                println!("{call}: none is left to fail");
                break;
            }
            failed += 1;
        }
        // While it serves nothing is cut.
        assert!(failed > 0 || call == "ftruncate", "no {call} failed, so that nothing was shown");
    }
}

fn injection(call: &str, nth: usize, seen: &Path) -> String {
    let seen = seen.display();
    format!("-f -o {seen} -e trace={call} -e inject={call}:error=EIO:when={nth}")
}

/// From now on the calls of each thread are counted.
fn attach(server: &Server, call: &str, nth: usize, seen: &Path) -> Child {
    let process = server.process_id().to_string();
    let mut strace = Command::new("strace")
        .args(["-p", &process])
        .args(injection(call, nth, seen).split(' '))
        .stderr(Stdio::piped())
        .spawn()
        .expect("strace starts");
    let mut said = BufReader::new(strace.stderr.take().expect("it is piped"));
    let mut line = String::new();
    said.read_line(&mut line).expect("strace speaks");
    assert!(line.contains("attached"), "{line}");
    // It says so once more of every thread to come.
    std::thread::spawn(move || std::io::copy(&mut said, &mut std::io::sink()));
    strace
}

fn data() -> Arc<TempDir> {
    Arc::new(TempDir::new().expect("a temporary directory"))
}

/// Those who ask, and hold the server to its answers.
struct Clients {
    ledger: Ledger,
    deeds: Deeds,
}

impl Clients {
    fn new() -> Self {
        Self { ledger: Ledger::new(), deeds: Deeds::default() }
    }

    /// What is promised can be read at once, whatever has become of the log.
    async fn ask(&mut self, server: &Server) {
        for _ in 0..COMMANDS {
            let _ = self.ledger.write(server).await;
        }
        self.deeds.ask(server).await;
        assert_eq!(self.ledger.broken(server).await, 0, "acknowledged, and cannot be read");
        self.deeds.check(server).await;
    }

    async fn restart_and_audit(&mut self, data: Arc<TempDir>) {
        let server = Server::try_start_on(Setup::clerk(), data);
        let server = server.unwrap_or_else(|said| panic!("it does not start again: {said:?}"));
        self.deeds.settle(&server).await;
        self.deeds.wait_for_erasures(&server).await;
        self.ledger.audit_promises(&server).await;
        server.printed(&["log", "verify"]);
        // Views that are renewed once somebody left come from before that: who has no key any more has
        // a name in them, until they have caught up.
        let alike = async || {
            let compared = server.run(&["replay", "--diff"]);
            let printed = String::from_utf8_lossy(&compared.stdout);
            let is_alike = printed.contains("live and replayed alike");
            if !is_alike {
                println!("{printed}{}", String::from_utf8_lossy(&compared.stderr));
            }
            is_alike
        };
        until("the views are what a replay gives", alike).await;
        self.deeds.check(&server).await;
    }
}
