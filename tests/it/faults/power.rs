//! The power fails under load. A kill alone shows nothing of this: what a killed process wrote is
//! still in the system's memory, synced or not. `scripts/soak` picks the file system by the tests'
//! names.

use std::sync::Arc;

use tempfile::TempDir;

use super::disk::{Disk, library};
use super::ledger::Ledger;
use super::{rounds, skip};
use crate::server::{LOG_FILE, Server, Setup};

/// What a server says that finds less of the log than was written, or none at all. Any other reason
/// not to start is a fault of something else.
const LOST: [&str; 5] = [
    "log.sqlite is not a T2M log",
    "log.sqlite-wal lies there without its log",
    "the log is damaged at position",
    "but the read model in",
    "the log was cut or exchanged",
];

#[tokio::test]
async fn ext4_keeps_whatever_was_acknowledged_through_every_power_cut() {
    keeps_what_was_acknowledged("ext4").await;
}

#[tokio::test]
async fn xfs_keeps_whatever_was_acknowledged_through_every_power_cut() {
    keeps_what_was_acknowledged("xfs").await;
}

/// Else the tests above would prove nothing.
#[tokio::test]
async fn ext4_loses_something_by_the_same_power_cuts_when_nothing_is_synced() {
    loses_what_is_not_synced("ext4").await;
}

#[tokio::test]
async fn xfs_loses_something_by_the_same_power_cuts_when_nothing_is_synced() {
    loses_what_is_not_synced("xfs").await;
}

async fn keeps_what_was_acknowledged(kind: &str) {
    let disk = match Disk::in_file(kind) {
        Ok(disk) => disk,
        Err(why) => return skip(&format!("power cuts on {kind}"), &why),
    };
    let mut ledger = Ledger::new();
    let mut server = Server::try_start_on(Setup::clerk(), disk.data_dir()).expect("it starts");
    let rounds = rounds(20);
    for round in 1..=rounds {
        let enough = ledger.dice.between(1, 40);
        ledger.write_until_gone(&server, enough, || disk.cut_power(&server)).await;
        disk.power_up(&mut server);
        server = server.start_again();
        ledger.settle(&server).await;
        if round % 50 == 0 || round == rounds {
            ledger.audit(&server).await;
            println!("{round} power cuts on {kind}, {} promises", ledger.promises());
        }
    }
}

async fn loses_what_is_not_synced(kind: &str) {
    let test = format!("power cuts on {kind} without syncs");
    let Some(unsynced) = library("libeatmydata.so") else {
        return skip(&test, "libeatmydata is not installed");
    };
    let disk = match Disk::in_file(kind) {
        Ok(disk) => disk,
        Err(why) => return skip(&test, &why),
    };
    let setup = Setup::clerk().with("LD_PRELOAD", unsynced.to_string_lossy());
    let elsewhere = TempDir::new().expect("a temporary directory");
    let said = elsewhere.path().join("said");
    let synced = Setup::clerk().with(LOG_FILE, said.to_string_lossy());
    for _ in 0..5 {
        let mut ledger = Ledger::new();
        let data = disk.data_dir();
        let mut server = Server::try_start_on(setup.clone(), Arc::clone(&data)).expect("it starts");
        ledger.write_until_gone(&server, 20, || disk.cut_power(&server)).await;
        disk.power_up(&mut server);
        drop(server);
        let Ok(server) = Server::try_start_on(synced.clone(), data) else {
            let said = std::fs::read_to_string(&said).expect("it says why");
            assert!(LOST.iter().any(|sentence| said.contains(sentence)), "{said:?}");
            return;
        };
        if ledger.broken(&server).await > 0 {
            return;
        }
    }
    panic!("five power cuts, nothing was synced, and nothing is lost");
}
