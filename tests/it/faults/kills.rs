//! `kill -9` under load.

use rustix::process::Signal;

use super::ledger::{ALL_KINDS, Ledger};
use super::rounds;
use crate::server::{Server, Setup};

#[tokio::test]
async fn whatever_was_acknowledged_outlives_every_kill() {
    let mut ledger = Ledger::of(&ALL_KINDS);
    let mut server = Server::start(Setup::clerk());
    let rounds = rounds(100);
    for round in 1..=rounds {
        let enough = ledger.dice.between(1, 40);
        ledger.write_until_gone(&server, enough, || server.send(Signal::KILL)).await;
        server = server.start_again();
        ledger.settle(&server).await;
        if round % 50 == 0 || round == rounds {
            ledger.audit(&server).await;
            println!("{round} kills, {}", ledger.tally());
        }
    }
}
