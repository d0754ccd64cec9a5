//! The disk is full: refusals, never a false promise; and when there is room again it goes on
//! without being started anew.

use std::collections::BTreeSet;
use std::fs::{DirEntry, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::multipart::{Form, Part};
use reqwest::{Method, RequestBuilder};

use super::disk::Disk;
use super::ledger::Ledger;
use super::{rounds, skip, until};
use crate::server::{Answer, Server, Setup, ask};

const ADA: &str = "user_ada";
const MIB: usize = 24;
/// More than a full disk takes, in bytes.
const LARGE: usize = 4 << 20;
/// More than fills what SQLite still holds for itself of a full disk.
const ENOUGH: usize = 100;
const AT_ONCE: usize = 64;

#[tokio::test]
async fn a_full_disk_refuses_what_is_new_and_takes_it_again_when_there_is_room() {
    let disk = match Disk::in_memory(MIB) {
        Ok(disk) => disk,
        Err(why) => return skip("a full disk", &why),
    };
    let mut ledger = Ledger::new();
    let server = Server::try_start_on(Setup::clerk(), disk.data_dir()).expect("it starts");
    for _ in 0..20 {
        ledger.write(&server).await.expect("there is room");
    }
    let file = server.upload(ADA, "notes.txt", "hello").await;
    let link = format!("files/{}/signed-url", file["file_id"].as_str().unwrap());

    let upload = created(&server).await;

    // Room comes back in two ways: somebody deletes what filled the disk, or makes it larger.
    for round in 0..rounds(1) {
        let filler = fill(disk.path());
        refuse_all(&mut ledger, &server, &link, &upload).await;
        std::fs::remove_file(filler).unwrap();
        recover(&mut ledger, &server).await;
        server.upload(ADA, "notes.txt", "more").await;

        let filler = fill(disk.path());
        refuse_all(&mut ledger, &server, &link, &upload).await;
        disk.resize(MIB * (round + 2));
        recover(&mut ledger, &server).await;
        std::fs::remove_file(filler).unwrap();
    }
    assert_eq!(ask(piece(&server, &upload)).await.status, 204, "it goes on where it was");
    ledger.audit(&server).await;

    let server = server.start_again();
    ledger.audit(&server).await;
}

/// The name of a file that takes all the room there is.
fn fill(disk: &Path) -> PathBuf {
    let path = disk.join("filler");
    let mut filler = File::create(&path).expect("an empty file needs no room");
    for bytes in [1 << 16, 1 << 12, 1] {
        while filler.write_all(&vec![0; bytes]).is_ok() {}
    }
    path
}

/// Until the log has no room either; then reads go on.
async fn refuse_all(ledger: &mut Ledger, server: &Server, link: &str, upload: &str) {
    let mut codes = BTreeSet::new();
    for _ in 0..ENOUGH {
        // At once: while only the views have no room, each waits for them in vain.
        for answer in ledger.write_at_once(server, AT_ONCE).await {
            assert_eq!(answer.status, 503, "{}", answer.body);
            assert!(!answer.header("retry-after").is_empty(), "{}", answer.body);
            codes.insert(answer.body["code"].as_str().expect("a code").to_owned());
        }
        if codes.contains("log_unavailable") {
            break;
        }
    }
    assert!(codes.contains("log_unavailable"), "only {codes:?}");
    ask(server.request(Method::GET, "system/ready")).await.assert_refused(503, "not_ready");
    // However often it looks for room: what the log has for itself is none for the read model.
    for _ in 0..10 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        for answer in ledger.write_at_once(server, 1).await {
            assert_eq!(answer.body["code"], "log_unavailable", "{}", answer.body);
        }
    }
    let metrics = ask(server.request(Method::GET, "/metrics")).await.bytes;
    let metrics = String::from_utf8(metrics).expect("it is text");
    for series in ["t2m_log_writable 0", "t2m_ready{purpose=\"work\"} 0"] {
        assert!(metrics.lines().any(|line| line == series), "no {series} in\n{metrics}");
    }
    ask(server.request(Method::GET, "system/ready?for=traffic")).await.data(200);
    server.get(ADA, "jobs").await.data(200);
    server.post(ADA, link, &serde_json::json!({})).await.data(200);
    upload_too_much(server).await.assert_refused(503, "storage_full");
    let refused = ask(piece(server, upload)).await;
    refused.assert_refused(503, "storage_full");
    let uploads = server.data_dir().join("blobs/uploads").read_dir().unwrap();
    let held: u64 =
        uploads.map(|it| it.unwrap()).filter(is_part).map(|it| it.metadata().unwrap().len()).sum();
    assert_eq!(held, 0, "pieces that do not count take room");
    // What was refused is removed after its answer.
    let incoming = server.data_dir().join("blobs/incoming");
    until("nothing is left of it", async || incoming.read_dir().unwrap().count() == 0).await;
}

fn is_part(file: &DirEntry) -> bool {
    file.path().extension().is_some_and(|extension| extension == "part")
}

/// The path of an upload in pieces that has none yet.
async fn created(server: &Server) -> String {
    let request = server.request_of(ADA, Method::POST, "files/tus");
    let request = request.header("tus-resumable", "1.0.0").header("upload-length", LARGE);
    let answer = ask(request).await;
    assert_eq!(answer.status, 201, "{}", answer.body);
    answer.header("location").replace(&server.address, "")
}

/// All of it at once.
fn piece(server: &Server, upload: &str) -> RequestBuilder {
    let request = server.request_of(ADA, Method::PATCH, upload);
    let request = request.header("tus-resumable", "1.0.0").header("upload-offset", 0);
    request.header("content-type", "application/offset+octet-stream").body(vec![7; LARGE])
}

async fn upload_too_much(server: &Server) -> Answer {
    let part = Part::bytes(vec![7; LARGE]).file_name("large.bin");
    let request = server.request_of(ADA, Method::POST, "files/upload");
    ask(request.multipart(Form::new().part("file", part))).await
}

/// The server looks for room by itself.
async fn recover(ledger: &mut Ledger, server: &Server) {
    let ready = async || ask(server.request(Method::GET, "system/ready")).await.status == 200;
    until("it is ready again", ready).await;
    let written = async || ledger.write(server).await.is_ok();
    until("it takes jobs again", written).await;
    ledger.settle(server).await;
}
