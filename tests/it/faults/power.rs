//! The power fails under load. A kill alone shows nothing of this: what a killed process wrote is
//! still in the system's memory, synced or not.

use std::sync::Arc;

use super::disk::{Disk, library};
use super::ledger::Ledger;
use super::{rounds, skip};
use crate::server::{Server, Setup};

#[tokio::test]
async fn whatever_was_acknowledged_outlives_every_power_cut() {
    let kind = std::env::var("T2M_DISK").unwrap_or_else(|_| "ext4".to_owned());
    let disk = match Disk::in_file(&kind) {
        Ok(disk) => disk,
        Err(why) => return skip("power cuts", &why),
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

/// Else the test above would prove nothing.
#[tokio::test]
async fn the_same_power_cuts_lose_something_when_nothing_is_synced() {
    let Some(unsynced) = library("libeatmydata.so") else {
        return skip("power cuts without syncs", "libeatmydata is not installed");
    };
    let disk = match Disk::in_file("ext4") {
        Ok(disk) => disk,
        Err(why) => return skip("power cuts without syncs", &why),
    };
    let setup = Setup::clerk().with("LD_PRELOAD", unsynced.to_string_lossy());
    for _ in 0..5 {
        let mut ledger = Ledger::new();
        let data = disk.data_dir();
        let mut server = Server::try_start_on(setup.clone(), Arc::clone(&data)).expect("it starts");
        ledger.write_until_gone(&server, 20, || disk.cut_power(&server)).await;
        disk.power_up(&mut server);
        drop(server);
        // What is left may be no log at all, or a damaged one.
        let Ok(server) = Server::try_start_on(Setup::clerk(), data) else { return };
        if ledger.broken(&server).await > 0 {
            return;
        }
    }
    panic!("five power cuts, nothing was synced, and nothing is lost");
}
