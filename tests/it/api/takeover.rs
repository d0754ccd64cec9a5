//! Whoever works on a job may die at any moment: another goes on, and there is one output. Some of
//! these wait for a lease to run out, which takes a minute.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::AsyncWriteExt;

use crate::server::{Server, Setup, ask};

const ADA: &str = "user_ada";
const TOKEN: &str = "a-worker-token-of-the-tests";
/// A lease, a render on a busy machine, and some more.
const PATIENCE: Duration = Duration::from_secs(240);

async fn within<T>(what: &str, looking: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, looking).await.unwrap_or_else(|_| panic!("never: {what}"))
}

/// Long enough to be killed over.
async fn long_job(server: &Server) -> String {
    let body = json!({ "prompt": "a long way home", "duration": 10, "quality": "1080p" });
    let job = server.post(ADA, "videos/generate", &body).await.data(202);
    job["job_id"].as_str().unwrap().to_owned()
}

/// How often each event has come, once the job is completed.
async fn completed(server: &Server, job: &str) -> BTreeMap<String, usize> {
    // One stream may not last as long as a lease and a render together.
    let ending = async {
        loop {
            let shown = server.get(ADA, &format!("jobs/{job}")).await.data(200);
            if shown["status"] != "processing" {
                return assert_eq!(shown["state"], "completed", "{shown}");
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    within("the job completes", ending).await;
    let mut kinds = BTreeMap::new();
    let mut events = server.events(ADA, &format!("jobs/{job}/events"), Some(0)).await;
    while !kinds.contains_key("job.completed") {
        *kinds.entry(events.next().await.unwrap().kind).or_default() += 1;
    }
    kinds
}

/// The job's files are one video, one poster and one set of captions, and nothing is left over.
async fn assert_one_output(server: &Server, job: &str) {
    let shown = server.get(ADA, &format!("jobs/{job}")).await.data(200);
    let files = server.get(ADA, "files").await.data(200)["items"].take();
    let of_job = |file: &&Value| file["job_id"] == job || file["job_id"].is_null();
    let mut kinds: Vec<_> = files.as_array().unwrap().iter().filter(of_job).collect();
    kinds.sort_by_key(|file| file["content_type"].to_string());
    let kinds: Vec<_> = kinds.iter().map(|file| file["content_type"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["image/jpeg", "text/vtt", "video/mp4"], "{files}");
    assert_eq!(shown["output"]["content_type"], "video/mp4", "{shown}");
}

/// The finished segments, each with its time and its number in the file system.
fn segments(directory: &Path) -> BTreeMap<String, (std::time::SystemTime, u64)> {
    use std::os::unix::fs::MetadataExt;
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let of = |entry: std::fs::DirEntry| {
        let name = entry.file_name().into_string().ok()?;
        let meta = entry.metadata().ok().filter(|_| !name.ends_with(".partial"))?;
        Some((name, (meta.modified().ok()?, meta.ino())))
    };
    entries.filter_map(of).collect()
}

#[tokio::test]
async fn a_render_goes_on_at_the_segment_where_its_server_was_killed() {
    let mut server = Server::start(Setup::clerk().with("T2M_ENGINE", "storyboard"));
    let job = long_job(&server).await;
    let folder = server.data_dir().join("scratch/video").join(&job).join("segments");
    within("two segments are finished", async {
        while segments(&folder).len() < 2 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    server.kill();
    let before = segments(&folder);
    assert!((2..10).contains(&before.len()), "{before:?}");
    let server = server.start_again();
    // Seen while the second attempt draws: a new one beside the old ones, which are as they were.
    within("the render goes on", async {
        loop {
            let now = segments(&folder);
            for (name, old) in &before {
                assert_eq!(now.get(name), Some(old), "segment {name} was drawn again");
            }
            if now.len() > before.len() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    let kinds = completed(&server, &job).await;
    assert_eq!((kinds["job.leased"], kinds["job.completed"]), (2, 1), "{kinds:?}");
    assert_one_output(&server, &job).await;
}

/// `t2m worker` with the built-in renderer.
struct Worker {
    process: Child,
    _dir: TempDir,
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Worker {
    fn start(server: &Server) -> Self {
        let dir = TempDir::new().unwrap();
        let setup = Setup::development()
            .with("T2M_ENGINE", "storyboard")
            .with("T2M_SERVER", &server.address)
            .with("T2M_WORKER_TOKEN", TOKEN)
            .with("T2M_WORKER_SCRATCH", dir.path().to_str().unwrap());
        let process = setup.command(dir.path(), &["worker"]).stdout(Stdio::null()).spawn().unwrap();
        Self { process, _dir: dir }
    }

    fn send(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.process), signal).unwrap();
    }
}

fn without_engine() -> Server {
    Server::start(Setup::clerk().with("T2M_WORKER_TOKENS", TOKEN))
}

#[tokio::test]
async fn another_worker_takes_over_from_one_that_was_killed_and_from_one_that_was_frozen() {
    let server = without_engine();
    let first = Worker::start(&server);
    // It can.
    let body = json!({ "prompt": "a pier", "duration": 1, "quality": "480p" });
    let easy = server.post(ADA, "videos/generate", &body).await.data(202);
    let easy = easy["job_id"].as_str().unwrap().to_owned();
    let kinds = completed(&server, &easy).await;
    assert_eq!(kinds["job.leased"], 1, "{kinds:?}");
    assert_one_output(&server, &easy).await;
    let poster = server.get(ADA, &format!("jobs/{easy}")).await.data(200);
    assert!(poster["output"]["poster_file_id"].is_string(), "{poster}");
    for file in server.get(ADA, "files").await.data(200)["items"].as_array().unwrap() {
        server.delete(ADA, &format!("files/{}", file["file_id"].as_str().unwrap())).await;
    }

    let job = long_job(&server).await;
    let mut events = server.events(ADA, &format!("jobs/{job}/events"), Some(0)).await;
    while events.next().await.unwrap().kind != "job.progressed" {}
    // Frozen at first: when it thaws, its lease is another's and it changes nothing.
    first.send(Signal::STOP);
    let second = Worker::start(&server);
    within("the second worker has the job", async {
        while events.next().await.unwrap().kind != "job.lease_expired" {}
        while events.next().await.unwrap().kind != "job.leased" {}
    })
    .await;
    first.send(Signal::CONT);
    let kinds = completed(&server, &job).await;
    assert_eq!((kinds["job.leased"], kinds["job.completed"]), (2, 1), "{kinds:?}");
    assert_one_output(&server, &job).await;
    drop((first, second));
}

#[tokio::test]
async fn another_worker_takes_over_from_one_that_was_killed() {
    let server = without_engine();
    let mut first = Worker::start(&server);
    let job = long_job(&server).await;
    let mut events = server.events(ADA, &format!("jobs/{job}/events"), Some(0)).await;
    while events.next().await.unwrap().kind != "job.progressed" {}
    first.process.kill().unwrap();
    first.process.wait().unwrap();
    let _second = Worker::start(&server);
    let kinds = completed(&server, &job).await;
    assert_eq!((kinds["job.leased"], kinds["job.completed"]), (2, 1), "{kinds:?}");
    assert_eq!(kinds["job.lease_expired"], 1, "{kinds:?}");
    assert_one_output(&server, &job).await;
}

#[tokio::test]
async fn a_worker_that_leaves_while_it_waits_takes_no_job_with_it() {
    let server = without_engine();
    let address = server.address.strip_prefix("http://").unwrap();
    let body = json!({ "worker_id": "gone", "kinds": ["video"], "wait_s": 30 }).to_string();
    let head = format!(
        "POST /api/v1/worker/lease HTTP/1.1\r\nhost: {address}\r\nauthorization: Bearer {TOKEN}\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut jobs = std::collections::BTreeSet::new();
    for round in 0..8 {
        let mut waiting = tokio::net::TcpStream::connect(address).await.unwrap();
        waiting.write_all(head.as_bytes()).await.unwrap();
        // Gone before the job comes, and at the same moment.
        if round % 2 == 0 {
            drop(waiting);
            jobs.insert(server.generate(&format!("user_{round}"), "a pier").await);
        } else {
            let user = format!("user_{round}");
            let asked = server.generate(&user, "a pier");
            let leaving = async move { drop(waiting) };
            jobs.insert(tokio::join!(asked, leaving).0);
        }
    }
    // At once, or when the lease of one that was too late to leave runs out.
    let taking = async {
        while !jobs.is_empty() {
            let body = json!({ "worker_id": "here", "kinds": ["video"], "wait_s": 30 });
            let request = server.request(reqwest::Method::POST, "worker/lease");
            let answer = ask(request.bearer_auth(TOKEN).json(&body)).await;
            if answer.status == 204 {
                continue;
            }
            let leased = answer.data(200);
            assert!(jobs.remove(leased["job_id"].as_str().unwrap()), "twice: {leased}");
        }
    };
    within("every job is taken", taking).await;
}
