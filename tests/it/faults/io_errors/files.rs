//! Calls that give a file its bytes or its name, or take it away: blobs, keys, tombstones, the master
//! key. The library that has them fail (`eio.c`) is made on the spot and loaded into the server, where it
//! counts them over all threads.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use reqwest::{Method, RequestBuilder};
use serde_json::json;
use tempfile::TempDir;

use super::super::uploads::is_there;
use super::super::{rounds, skip, until};
use super::{Clients, INJECTED, data};
use crate::server::{Answer, Server, Setup, ask};

const SOURCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/faults/io_errors/eio.c");
const CALLS: [&str; 3] = ["write", "rename", "unlink"];
/// What the short form tries: the first of such calls on such a path.
const WHILE_STARTING: [(&str, &str); 4] = [
    ("write", "/server.lock"),
    ("write", "/callback-signing-secret"),
    ("rename", "/log.sqlite$"),
    ("unlink", "/log.new-journal$"),
];
const WHILE_SERVING: [(&str, &str); 10] = [
    ("write", "/master.new"),
    ("write", "/blobs/keys/"),
    ("write", "/blobs/incoming/"),
    ("write", "/blobs/erased/"),
    ("rename", "/master.key$"),
    ("rename", "/blobs/keys/"),
    ("rename", "/blobs/incoming/"),
    ("rename", "/blobs/sha256/"),
    ("rename", "/blobs/erased/"),
    ("unlink", "/blobs/keys/"),
];
/// Directories whose entries are never made durable, and what must then not be acknowledged.
const NEVER_SYNCED: [(&str, Asked); 5] = [
    ("/blobs/keys$", Asked::Arrival),
    ("/blobs$", Asked::Arrival),
    ("/blobs/sha256$", Asked::Upload),
    ("/blobs/sha256/", Asked::Upload),
    ("/blobs/incoming$", Asked::Upload),
];
/// The first failure is not the one that matters: what it leaves must not be believed.
const TRIES: usize = 4;
/// A piece of an upload of which four megabytes are noted before the end; in bytes.
const LONG: usize = 7 << 20;

#[derive(Clone, Copy)]
enum Asked {
    Arrival,
    Upload,
}

/// The library, and what it is told.
pub struct Faults {
    place: TempDir,
}

impl Faults {
    /// # Errors
    /// Why it cannot be made here.
    pub fn new() -> Result<Self, String> {
        let place = TempDir::new().map_err(|error| error.to_string())?;
        let faults = Self { place };
        let mut compiler = Command::new("cc");
        compiler
            .args(["-shared", "-fPIC", "-O1", "-o"])
            .arg(faults.library())
            .args([SOURCE, "-ldl"]);
        let output = compiler.output().map_err(|error| format!("cc: {error}"))?;
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "eio.c: {said}");
        Ok(faults)
    }

    fn library(&self) -> PathBuf {
        self.place.path().join("eio.so")
    }

    fn plan(&self) -> PathBuf {
        self.place.path().join("plan")
    }

    pub fn setup(&self) -> Setup {
        let [library, plan] = [self.library(), self.plan()];
        let setup = Setup::clerk().with("LD_PRELOAD", library.to_string_lossy());
        setup.with("TEST_FAULT_PLAN", plan.to_string_lossy())
    }

    /// From now on calls are counted.
    pub fn make(&self, plan: &str) {
        let draft = self.place.path().join("draft");
        std::fs::write(&draft, format!("{plan}\n")).expect("the plan is written");
        std::fs::rename(draft, self.plan()).expect("the plan has its name");
    }

    pub fn happened(&self) -> bool {
        std::fs::read_to_string(self.plan()).is_ok_and(|plan| plan.contains(INJECTED))
    }

    fn end(&self) {
        std::fs::remove_file(self.plan()).expect("there is a plan");
    }
}

#[tokio::test]
async fn a_file_that_cannot_be_made_while_it_starts_breaks_nothing() {
    each_fails(&WHILE_STARTING, async |faults, plan| {
        let data = data();
        faults.make(plan);
        let mut clients = Clients::new();
        // Not to start is an answer too.
        if let Ok(mut server) = Server::try_start_on(faults.setup(), Arc::clone(&data)) {
            clients.ask(&server).await;
            server.kill();
        }
        clients.restart_and_audit(data).await;
    })
    .await;
}

#[tokio::test]
async fn a_file_that_cannot_be_made_while_it_serves_breaks_no_promise_and_hinders_nothing_later() {
    each_fails(&WHILE_SERVING, async |faults, plan| {
        let data = data();
        let server = Server::try_start_on(faults.setup(), Arc::clone(&data));
        let mut server = server.expect("it starts");
        faults.make(plan);
        let mut clients = Clients::new();
        clients.ask(&server).await;
        // What is erased is erased after the answer.
        let erasing = async || faults.happened() || clients.deeds.are_erased(&server);
        until("those who left are erased, or something fails", erasing).await;
        // The disk is well again.
        clients.deeds.settle(&server).await;
        clients.ledger.settle(&server).await;
        if !plan.starts_with("unlink") {
            nothing_is_left_of_refused_uploads(&server).await;
        }
        server.kill();
        clients.restart_and_audit(data).await;
    })
    .await;
}

#[tokio::test]
async fn what_no_sync_makes_durable_is_not_acknowledged_however_often_it_is_asked_for() {
    for (directory, asked) in NEVER_SYNCED {
        println!("{directory} is never synced");
        let faults = match Faults::new() {
            Ok(faults) => faults,
            Err(why) => return skip("directories that are never synced", &why),
        };
        let server = Server::start(faults.setup());
        faults.make(&format!("fsync 1 {directory} lasting"));
        for _ in 0..TRIES {
            let answer = ask(request(&server, asked)).await;
            assert_eq!(answer.status, 503, "{directory}: {}", answer.body);
        }
        assert!(faults.happened(), "nothing failed, so that nothing was shown");
        faults.end();
        assert_eq!(ask(request(&server, asked)).await.status, 200, "{directory}");
    }
}

/// A body that is short, or so long that some of it is noted before its end.
#[tokio::test]
async fn a_piece_that_was_not_synced_or_noted_is_not_believed_after_a_restart() {
    for (plan, size) in [
        ("fsync 1 .part$", 3),
        ("fsync 1 .offset$", 3),
        ("fsync 1 .part$", LONG),
        ("fsync 2 .part$", LONG),
        ("fsync 1 .offset$", LONG),
        ("fsync 2 .offset$", LONG),
        ("write 6 .part$", LONG),
    ] {
        println!("{plan}, {size} bytes");
        let faults = match Faults::new() {
            Ok(faults) => faults,
            Err(why) => return skip("a piece that is not synced", &why),
        };
        let server = Server::start(faults.setup());
        let upload = server.request_of("user_ada", Method::POST, "files/tus");
        let upload = upload.header("tus-resumable", "1.0.0").header("upload-length", 3 + size);
        let created = ask(upload).await;
        assert_eq!(created.status, 201, "{}", created.body);
        let upload = created.header("location").replace(&server.address, "");
        assert_eq!(send(&server, &upload, 0, b"abc".to_vec()).await.status, 204);

        let rest: Vec<_> = (0..251).cycle().take(size).collect();
        faults.make(plan);
        assert_eq!(send(&server, &upload, 3, rest.clone()).await.status, 503);
        assert!(faults.happened(), "nothing failed, so that nothing was shown");
        // Not only cut off: a power cut may leave zeros in their place.
        assert_eq!(noted(&server, &upload), 3);
        let server = server.start_again_as(Setup::clerk());
        let head = server.request_of("user_ada", Method::HEAD, &upload);
        let head = ask(head.header("tus-resumable", "1.0.0")).await;
        assert_eq!((head.status, head.header("upload-offset")), (200, "3"));
        let stored = send(&server, &upload, 3, rest.clone()).await;
        assert_eq!(stored.status, 204);
        let bytes = [b"abc", &rest[..]].concat();
        assert!(is_there(&server, "user_ada", stored.header("x-file-id"), &bytes).await);
    }
}

/// One run for each fault of the sample, or for each call and N as long as there is an Nth.
async fn each_fails(sample: &[(&str, &str)], run: impl AsyncFn(&Faults, &str)) {
    let last = rounds(0);
    if last == 0 {
        for (call, path) in sample {
            let plan = format!("{call} 1 {path}");
            match fails(&plan, &run).await {
                Ok(happened) => assert!(happened, "{plan}: nothing failed, so nothing was shown"),
                Err(why) => return skip("files that cannot be made", &why),
            }
        }
        return;
    }
    for call in CALLS {
        for nth in 1..=last {
            match fails(&format!("{call} {nth} /"), &run).await {
                Ok(true) => {}
                Ok(false) => {
                    assert!(nth > 1, "no {call} failed, so that nothing was shown");
                    println!("{call}: none is left to fail");
                    break;
                }
                Err(why) => return skip("files that cannot be made", &why),
            }
        }
    }
}

/// Whether it happened in this run.
async fn fails(plan: &str, run: impl AsyncFn(&Faults, &str)) -> Result<bool, String> {
    println!("{plan}");
    let faults = Faults::new()?;
    run(&faults, plan).await;
    Ok(faults.happened())
}

/// It is removed after the answer.
async fn nothing_is_left_of_refused_uploads(server: &Server) {
    let incoming = server.data_dir().join("blobs/incoming");
    let is_empty = async || incoming.read_dir().is_ok_and(|mut files| files.next().is_none());
    until("nothing is left of refused uploads", is_empty).await;
}

fn request(server: &Server, asked: Asked) -> RequestBuilder {
    use reqwest::multipart::{Form, Part};
    match asked {
        Asked::Arrival => {
            let data = json!({
                "id": "user_zoe", "first_name": "Zoe", "email_addresses": [],
                "updated_at": 1_767_225_600_000_i64, "created_at": 1_767_225_600_000_i64,
            });
            server.delivery("msg_zoe", "user.created", &data)
        }
        Asked::Upload => {
            let form = Form::new().part("file", Part::text("hello").file_name("hello.txt"));
            server.request_of("user_ada", Method::POST, "files/upload").multipart(form)
        }
    }
}

/// What counts of an upload after a crash.
fn noted(server: &Server, upload: &str) -> u64 {
    let id = upload.rsplit('/').next().expect("an address ends with the id");
    let note = server.data_dir().join(format!("blobs/uploads/{id}.offset"));
    let text = std::fs::read_to_string(note).expect("there is a note");
    text.parse().expect("it is a number of bytes")
}

async fn send(server: &Server, upload: &str, offset: u64, bytes: Vec<u8>) -> Answer {
    let request = server.request_of("user_ada", Method::PATCH, upload);
    let request = request.header("tus-resumable", "1.0.0").header("upload-offset", offset);
    ask(request.header("content-type", "application/offset+octet-stream").body(bytes)).await
}
