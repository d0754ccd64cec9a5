//! The power fails under load. A kill alone shows nothing of this: what a killed process wrote is
//! still in the system's memory, synced or not. `scripts/soak` picks the file system by the tests'
//! names.

use std::sync::Arc;

use tempfile::TempDir;

use super::disk::{Disk, library};
use super::io_errors::files::Faults;
use super::ledger::{ALL_KINDS, Kind, Ledger};
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

/// Files whose syncs alone are taken away, what is then lost, and what a server may say instead that
/// does not start.
const ALONE: [(&str, &[Kind], &[&str]); 4] = [
    ("/blobs/incoming/", &[Kind::File], &[]),
    (".part$", &[Kind::Pieces], &[]),
    (".offset$", &[Kind::Pieces], &[]),
    (
        "/blobs/keys/",
        &[Kind::FirstJob],
        &["the keys in the store were sealed by another master key"],
    ),
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

/// Those of the log do not make up for them.
#[tokio::test]
async fn ext4_loses_files_and_keys_by_the_same_power_cuts_when_theirs_are_the_only_syncs_to_miss() {
    loses_what_alone_is_not_synced("ext4").await;
}

#[tokio::test]
async fn xfs_loses_files_and_keys_by_the_same_power_cuts_when_theirs_are_the_only_syncs_to_miss() {
    loses_what_alone_is_not_synced("xfs").await;
}

async fn keeps_what_was_acknowledged(kind: &str) {
    let disk = match Disk::in_file(kind) {
        Ok(disk) => disk,
        Err(why) => return skip(&format!("power cuts on {kind}"), &why),
    };
    let mut ledger = Ledger::of(&ALL_KINDS);
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
            println!("{round} power cuts on {kind}, {}", ledger.tally());
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
    let is_lost = loses_something(&disk, &setup, &ALL_KINDS, &LOST).await;
    assert!(is_lost, "five power cuts, nothing was synced, and nothing is lost");
}

async fn loses_what_alone_is_not_synced(kind: &str) {
    let test = format!("power cuts on {kind} without syncs of files");
    let disk = match Disk::in_file(kind) {
        Ok(disk) => disk,
        Err(why) => return skip(&test, &why),
    };
    for (path, asked, said) in ALONE {
        let faults = match Faults::new() {
            Ok(faults) => faults,
            Err(why) => return skip(&test, &why),
        };
        faults.make(&format!("fsync 1 {path} lies"));
        let is_lost = loses_something(&disk, &faults.setup(), asked, said).await;
        assert!(faults.happened(), "{path}: nothing was synced in the first place");
        assert!(is_lost, "five power cuts, {path} was not synced, and nothing is lost");
    }
}

/// Whether one of five power cuts takes from a server what it has promised, or so much that the next one
/// does not start and says so.
async fn loses_something(
    disk: &Disk,
    setup: &Setup,
    asked: &'static [Kind],
    lost: &[&str],
) -> bool {
    let elsewhere = TempDir::new().expect("a temporary directory");
    let said = elsewhere.path().join("said");
    let synced = Setup::clerk().with(LOG_FILE, said.to_string_lossy());
    for _ in 0..5 {
        let mut ledger = Ledger::of(asked);
        let data = disk.data_dir();
        let mut server = Server::try_start_on(setup.clone(), Arc::clone(&data)).expect("it starts");
        ledger.write_until_gone(&server, 20, || disk.cut_power(&server)).await;
        disk.power_up(&mut server);
        drop(server);
        let Ok(server) = Server::try_start_on(synced.clone(), data) else {
            let said = std::fs::read_to_string(&said).expect("it says why");
            assert!(lost.iter().any(|sentence| said.contains(sentence)), "{said:?}");
            return true;
        };
        if ledger.broken(&server).await > 0 {
            return true;
        }
    }
    false
}
