//! The Nth call that makes something durable fails with EIO, for one N after the other: an error or
//! a success, and never a promise that is not kept.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use tempfile::TempDir;

use super::ledger::Ledger;
use super::{rounds, skip};
use crate::server::{Server, Setup, UNDER};

/// How SQLite and the stores of files write and sync.
const CALLS: [&str; 3] = ["pwrite64", "fdatasync,fsync", "ftruncate"];
/// What the short form tries. Each thread counts its own calls.
const WHILE_STARTING: [usize; 2] = [2, 24];
const WHILE_SERVING: [usize; 5] = [1, 2, 3, 7, 16];
const COMMANDS: usize = 12;

#[tokio::test]
async fn a_call_that_fails_while_it_starts_breaks_nothing() {
    each_fails(&WHILE_STARTING, async |call, nth, seen| {
        let under = format!("strace -D --seccomp-bpf {}", injection(call, nth, seen));
        let data = data();
        let mut ledger = Ledger::new();
        // Not to start is an answer too.
        let setup = Setup::clerk().with(UNDER, under);
        if let Ok(server) = Server::try_start_on(setup, Arc::clone(&data)) {
            ask_and_kill(&mut ledger, server).await;
        }
        restart_and_audit(&mut ledger, data).await;
    })
    .await;
}

#[tokio::test]
async fn a_call_that_fails_while_it_serves_breaks_no_promise() {
    each_fails(&WHILE_SERVING, async |call, nth, seen| {
        let data = data();
        let server = Server::try_start_on(Setup::clerk(), Arc::clone(&data)).expect("it starts");
        let mut strace = attach(&server, call, nth, seen);
        let mut ledger = Ledger::new();
        ask_and_kill(&mut ledger, server).await;
        strace.wait().expect("it ends with the server");
        restart_and_audit(&mut ledger, data).await;
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
            if !std::fs::read_to_string(seen).expect("strace tells").contains("(INJECTED)") {
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

async fn ask_and_kill(ledger: &mut Ledger, mut server: Server) {
    for _ in 0..COMMANDS {
        let _ = ledger.write(&server).await;
    }
    // What was promised can be read, whatever has become of the log.
    assert_eq!(ledger.broken(&server).await, 0, "acknowledged, and cannot be read");
    server.kill();
}

async fn restart_and_audit(ledger: &mut Ledger, data: Arc<TempDir>) {
    let server = Server::try_start_on(Setup::clerk(), data);
    let server = server.unwrap_or_else(|said| panic!("it does not start again: {said:?}"));
    ledger.audit(&server).await;
}
