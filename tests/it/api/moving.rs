//! Moving house: a log from one engine into another and back, with a server that notices nothing, and
//! everything that may go wrong on the way.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::{Output, Stdio};
use std::time::Duration;

use reqwest::Method;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use t2m::log::{EmbeddedLog, EventLog, Expected};
use tempfile::TempDir;

use super::{clerk_session, clerk_user};
use crate::engine_faults::until;
use crate::engines::event;
use crate::postgres::{Postgres, Proxy};
use crate::server::{Answer, Server, Setup, ask, session_of};

const ADA: &str = "user_ada";
const BOB: &str = "user_bob";
const BOB_TOO: &str = "user_bob_too";
const EVE: &str = "user_eve";
const TOKEN: &str = "a-worker-token-of-the-tests";
const MP4: &[u8] = b"\0\0\0\x18ftypisom\0\0\0\0isommp42 and then some frames";

fn setup() -> Setup {
    Setup::clerk().with("T2M_WORKER_TOKENS", TOKEN)
}

async fn fresh() -> String {
    let server = Postgres::shared();
    server.address(&server.database().await)
}

fn path(dir: &TempDir, name: &str) -> String {
    dir.path().join(name).to_str().unwrap().to_owned()
}

/// What `t2m` prints if it succeeds, else what it complains of.
fn run(setup: &Setup, data: &Path, arguments: &[&str]) -> Result<String, String> {
    said(setup.run(data, arguments))
}

fn said(Output { status, stdout, stderr }: Output) -> Result<String, String> {
    let text = String::from_utf8_lossy(if status.success() { &stdout } else { &stderr });
    assert!(!text.contains("postgres:postgres"), "a password is shown: {text}");
    if status.success() { Ok(text.into_owned()) } else { Err(text.into_owned()) }
}

async fn worker(server: &Server, path: &str, body: &Value) -> Answer {
    let request = server.request(Method::POST, &format!("worker/{path}")).bearer_auth(TOKEN);
    ask(request.json(body)).await
}

/// What was asked of a server, and is to be answered alike by the next.
struct Lived {
    paths: Vec<String>,
    waiting: String,
    held: String,
    lease: Value,
    link: String,
}

/// A user with files and jobs, one whose session has ended, one who was erased, and a worker at work.
async fn lived_in(server: &Server) -> Lived {
    for user in [ADA, BOB, EVE] {
        server.deliver("user.created", &clerk_user(user, 1_767_225_600_000)).await.data(200);
        let session = clerk_session(&session_of(user), user, "active");
        server.deliver("session.created", &session).await.data(200);
        server.get(user, "me").await.data(200);
    }
    let file = server.upload(ADA, "notes.txt", "what I noted").await;
    let file = file["file_id"].as_str().unwrap().to_owned();
    let held = server.generate(ADA, "a lighthouse").await;
    let lease = worker(server, "lease", &json!({ "worker_id": "w", "kinds": ["video"] })).await;
    let lease = lease.data(200);
    assert_eq!(lease["job_id"], held.as_str());
    let waiting = server.generate(ADA, "a boat").await;
    let cancelled = server.generate(BOB, "a bridge").await;
    server.post(BOB, &format!("jobs/{cancelled}/cancel"), &json!({})).await.data(200);
    let ended = clerk_session(&session_of(BOB), BOB, "ended");
    server.deliver("session.ended", &ended).await.data(200);
    server.generate(EVE, "a secret wish").await;
    server.deliver("user.deleted", &json!({ "id": EVE, "deleted": true })).await.data(200);
    let tombstone = server.data_dir().join("blobs/erased").join(EVE);
    until("the user is erased", async || tombstone.exists()).await;
    let link = server.post(ADA, &format!("files/{file}/signed-url"), &json!({})).await.data(200);
    let link = link["url"].as_str().unwrap();
    Lived {
        paths: ["me", "jobs", "files", "sessions"]
            .into_iter()
            .map(str::to_owned)
            .chain([format!("jobs/{held}"), format!("jobs/{waiting}"), format!("files/{file}")])
            .collect(),
        waiting,
        held,
        lease: lease["lease_id"].clone(),
        link: link[link.find("/api/").unwrap()..].to_owned(),
    }
}

impl Lived {
    async fn answers(&self, server: &Server) -> Vec<Value> {
        let mut answers = Vec::new();
        for path in &self.paths {
            answers.push(server.get(ADA, path).await.data(200));
        }
        server.get(BOB, "me").await.assert_refused(401, "session_ended");
        let gone = server.get(EVE, "me").await;
        assert!(matches!(gone.status, 401 | 403), "{}", gone.body);
        assert_eq!(ask(server.request(Method::GET, &self.link)).await.bytes, b"what I noted");
        let told = server.printed(&["log", "show", "--user", EVE]);
        assert!(!told.contains("a secret wish") && told.contains("user.deleted"), "{told}");
        answers
    }
}

fn forget_views(data: &Path) {
    for entry in std::fs::read_dir(data).unwrap().flatten() {
        if entry.file_name().to_string_lossy().starts_with("views") {
            std::fs::remove_file(entry.path()).unwrap();
        }
    }
}

#[tokio::test]
async fn a_house_moves_into_postgres_and_back_and_nobody_notices() {
    let place = TempDir::new().unwrap();
    let mut server = Server::start(setup());
    let lived = lived_in(&server).await;
    let before = lived.answers(&server).await;
    // What takes long is done while it still runs.
    let address = fresh().await;
    server.printed(&["log", "copy", "--to", &address]);
    server.upload(BOB_TOO, "since.txt", "what came since").await;
    assert!(server.stop().success());

    let (one, two) = (path(&place, "one.jsonl"), path(&place, "two.jsonl"));
    server.printed(&["log", "export", &one]);
    let over_postgres = setup().with("T2M_LOG", &address);
    let data = server.data_dir().to_owned();
    let imported = run(&over_postgres, &data, &["log", "import", &one]).unwrap();
    assert!(imported.contains("compared one by one"), "{imported}");
    run(&over_postgres, &data, &["log", "export", &two]).unwrap();
    assert!(std::fs::read(&one).unwrap() == std::fs::read(&two).unwrap(), "the exports differ");
    let again = run(&over_postgres, &data, &["log", "import", &one, "--json"]).unwrap();
    assert!(again.contains(r#""imported":0"#), "{again}");

    // The read model of one engine would do for the other; here it is proved that none is needed.
    forget_views(&data);
    let mut server = server.start_again_as(over_postgres.clone());
    assert_eq!(lived.answers(&server).await, before);
    let body = json!({ "lease_id": lived.lease, "progress": 60 });
    let report = worker(&server, &format!("jobs/{}/progress", lived.held), &body).await.data(200);
    assert_eq!(report["cancelled"], false);
    let output = format!("worker/jobs/{}/output?lease_id={}", lived.held, text(&lived.lease));
    let put = server.request(Method::PUT, &output).bearer_auth(TOKEN).body(MP4);
    ask(put).await.data(200);
    let body = json!({ "lease_id": lived.lease });
    worker(&server, &format!("jobs/{}/complete", lived.held), &body).await.data(200);
    let next = worker(&server, "lease", &json!({ "worker_id": "w", "kinds": ["video"] })).await;
    assert_eq!(next.data(200)["job_id"], lived.waiting.as_str());
    let doctor = run(&over_postgres, &data, &["doctor", "--full"]).unwrap();
    assert!(doctor.contains("ok       log            postgres://127.0.0.1:"), "{doctor}");
    let before = lived.answers(&server).await;
    assert!(server.stop().success());

    // Back into the file that was left, which has the beginning.
    let data_dir = data.to_str().unwrap();
    let back = ["log", "copy", "--to", "embedded", "--to-data-dir", data_dir];
    let copied = run(&over_postgres, &data, &back).unwrap();
    assert!(copied.contains("log.sqlite"), "{copied}");
    std::fs::remove_file(&two).unwrap();
    run(&over_postgres, &data, &["log", "export", &two]).unwrap();
    let server = server.start_again_as(setup());
    assert_eq!(server.printed(&["log", "export", "-"]).as_bytes(), std::fs::read(&two).unwrap());
    assert_eq!(lived.answers(&server).await, before);
    let diff = server.printed(&["replay", "--diff"]);
    assert!(diff.contains("live and replayed alike"), "{diff}");
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

/// A log of so many events in 7 streams, in a data directory of its own.
async fn filled(count: u128) -> TempDir {
    let data = TempDir::new().unwrap();
    let log = EmbeddedLog::open(&data.path().join("log.sqlite")).unwrap();
    for number in 1..=count {
        let stream = format!("thing-{}", number % 7);
        log.append(&stream, Expected::Any, vec![event(number)]).await.unwrap();
    }
    data
}

#[tokio::test]
async fn operators_ask_and_change_what_lies_in_postgres() {
    let address = fresh().await;
    let mut server = Server::start(setup().with("T2M_LOG", &address));
    server.deliver("user.created", &clerk_user(ADA, 1_767_225_600_000)).await.data(200);
    let job = server.generate(ADA, "a lighthouse").await;
    server.generate(BOB, "a boat").await;
    let state = server.printed(&["state", &format!("job-{job}")]);
    assert!(state.contains("a lighthouse"), "{state}");
    let unknown = said(server.run(&["state", "job-none"])).unwrap_err();
    assert!(unknown.contains("the log postgres://127.0.0.1:"), "{unknown}");
    let all = server.printed(&["log", "show"]);
    let last = all.lines().count().to_string();
    assert_eq!(server.printed(&["log", "tail", "--last", &last, "--limit", &last]), all);
    let two: Vec<&str> = all.lines().skip(all.lines().count() - 2).collect();
    let tail = server.printed(&["log", "tail", "--last", "2", "--limit", "2"]);
    assert_eq!(tail.lines().collect::<Vec<_>>(), two);
    let reverse = server.printed(&["log", "show", "--reverse"]);
    assert_eq!(reverse.lines().rev().collect::<Vec<_>>(), all.lines().collect::<Vec<_>>());

    // Beside the server, which does the rest, and without it.
    let rotated = server.printed(&["keys", "rotate"]);
    assert!(rotated.contains("as long as a server runs"), "{rotated}");
    let erased = server.printed(&["erase", BOB]);
    assert!(erased.contains("running: it deletes the user"), "{erased}");
    until("the server has deleted the user", async || {
        server.get(BOB, "me").await.body.to_string().contains("user_deleted")
    })
    .await;
    let file = server.data_dir().join("none.jsonl");
    std::fs::write(&file, server.printed(&["log", "export", "-"])).unwrap();
    let busy = said(server.run(&["log", "import", file.to_str().unwrap()])).unwrap_err();
    assert!(busy.contains("a server runs in"), "{busy}");
    assert!(server.stop().success());
    let rotated = server.printed(&["keys", "rotate"]);
    assert!(rotated.contains("holds the new master key alone"), "{rotated}");
    let erased = server.printed(&["erase", ADA]);
    assert!(erased.contains("the user is deleted, at position"), "{erased}");
    let state = server.printed(&["state", &format!("job-{job}")]);
    assert!(!state.contains("a lighthouse"), "{state}");
    assert!(!server.data_dir().join("log.sqlite").exists());
}

#[tokio::test]
async fn an_import_into_postgres_that_was_interrupted_is_ended_by_the_same_command() {
    let (data, place) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    crate::engines::filled(&data.path().join("log.sqlite"), 20).await;
    let file = path(&place, "log.jsonl");
    run(&setup(), data.path(), &["log", "export", &file]).unwrap();
    let server = Postgres::shared();
    let database = server.database().await;
    let direct = setup().with("T2M_LOG", server.address(&database));
    let proxy = Proxy::to(server).await;
    proxy.hold_answers(Duration::from_millis(100));
    let slowly = setup().with("T2M_LOG", proxy.address(&database));
    for signal in [Signal::INT, Signal::KILL] {
        let mut command = slowly.command(place.path(), &["log", "import", &file]);
        let import = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let count = async || {
            let counted = run(&direct, place.path(), &["log", "stats", "--json"]);
            counted.map_or(0, |counted| {
                serde_json::from_str::<Value>(&counted).unwrap()["events"].as_u64().unwrap()
            })
        };
        let before = count().await;
        until("some events are there", async || count().await > before).await;
        kill_process(Pid::from_child(&import), signal).unwrap();
        let ended = import.wait_with_output().unwrap();
        assert!(!ended.status.success(), "it was not interrupted but done");
        if signal == Signal::INT {
            let told = said(ended).unwrap_err();
            assert!(
                told.contains("what was brought stays") && told.contains("interrupted"),
                "{told}"
            );
        }
    }
    let there = run(&direct, place.path(), &["log", "verify", "--json"]).unwrap();
    assert!(!there.contains(r#""events":20000,"#), "nothing was interrupted: {there}");
    let ended = run(&direct, place.path(), &["log", "import", &file, "--json"]).unwrap();
    assert!(ended.contains(r#""events":20000,"#), "{ended}");
    let exported = run(&direct, place.path(), &["log", "export", "-"]).unwrap();
    assert!(exported.as_bytes() == std::fs::read(&file).unwrap(), "the exports differ");
}

#[tokio::test]
async fn who_interrupts_it_while_a_server_does_not_answer_is_heard() {
    let (data, place) = (filled(20).await, TempDir::new().unwrap());
    let file = path(&place, "log.jsonl");
    run(&setup(), data.path(), &["log", "export", &file]).unwrap();
    let server = Postgres::shared();
    let database = server.database().await;
    let proxy = Proxy::to(server).await;
    proxy.hold_answers(Duration::from_secs(3600));
    let silent = proxy.address(&database);
    for arguments in [["log", "import", &file, "--log"], ["log", "copy", "--json", "--to"]] {
        let before = proxy.connected();
        let mut command = setup().command(data.path(), &arguments);
        let command = command.arg(&silent).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().unwrap();
        until("it has connected", async || proxy.connected() > before).await;
        kill_process(Pid::from_child(&child), Signal::INT).unwrap();
        let told = said(child.wait_with_output().unwrap()).unwrap_err();
        assert!(told.trim().ends_with(": interrupted"), "{told}");
    }
}

#[tokio::test]
async fn an_import_beside_one_that_is_at_work_says_nothing_of_what_that_has_made() {
    let (data, place) = (filled(20).await, TempDir::new().unwrap());
    let file = path(&place, "log.jsonl");
    run(&setup(), data.path(), &["log", "export", &file]).unwrap();
    let at_work = t2m::log::Import::begin(&place.path().join("log.sqlite")).unwrap();
    assert!(place.path().join("log.importing").exists());
    let told = run(&setup(), place.path(), &["log", "import", &file]).unwrap_err();
    assert!(told.contains("is open for writing elsewhere"), "{told}");
    assert!(!told.contains("was broken off"), "{told}");
    drop(at_work);
    // Nor where a WAL was left without its log.
    std::fs::write(place.path().join("log.sqlite-wal"), "of another log").unwrap();
    let told = run(&setup(), place.path(), &["log", "import", &file]).unwrap_err();
    assert!(told.contains("lies there without its log"), "{told}");
    assert!(!place.path().join("log.sqlite").exists());
}

#[tokio::test]
async fn an_import_into_a_file_that_is_interrupted_leaves_nothing() {
    let (data, place) = (filled(20).await, TempDir::new().unwrap());
    let export = run(&setup(), data.path(), &["log", "export", "-"]).unwrap();
    let left = || -> Vec<String> {
        let entries = std::fs::read_dir(place.path()).unwrap().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        names.filter(|name| name.starts_with("log.") && name != "log.lock").collect()
    };
    for signal in [Signal::INT, Signal::KILL] {
        let mut command = setup().command(place.path(), &["log", "import", "-"]);
        let command = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut import = command.spawn().unwrap();
        // Its input hangs in the middle.
        let mut stdin = import.stdin.take().unwrap();
        stdin.write_all(&export.as_bytes()[..export.len() / 2]).unwrap();
        until("the import has begun", async || !left().is_empty()).await;
        kill_process(Pid::from_child(&import), signal).unwrap();
        let ended = import.wait_with_output().unwrap();
        drop(stdin);
        assert_eq!(left().is_empty(), signal == Signal::INT, "{:?}", left());
        if signal == Signal::INT {
            let told = said(ended).unwrap_err();
            assert!(told.contains("nothing was changed"), "{told}");
        }
    }
    let file = path(&place, "whole.jsonl");
    std::fs::write(&file, &export).unwrap();
    let output = setup().run(place.path(), &["log", "import", &file]);
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(told.contains("was broken off; what it left is removed"), "{told}");
    said(output).unwrap();
    assert!(left().iter().all(|name| name.starts_with("log.sqlite")), "{:?}", left());
    assert_eq!(run(&setup(), place.path(), &["log", "export", "-"]).unwrap(), export);
}

/// How many events a log has; it is made if it is not there.
async fn count(address: &str) -> u64 {
    let log = t2m::log::open(address, "".as_ref()).await.unwrap();
    let events = log.stats().await.unwrap().events;
    tokio::task::spawn_blocking(move || drop(log)).await.unwrap();
    events
}

#[tokio::test]
async fn an_import_into_postgres_names_what_is_wrong_and_goes_only_where_it_fits() {
    let (data, place) = (filled(20).await, TempDir::new().unwrap());
    let export = run(&setup(), data.path(), &["log", "export", "-"]).unwrap();
    let file = path(&place, "log.jsonl");
    let import = |address: &str, text: &str| {
        std::fs::write(&file, text).unwrap();
        let setup = setup().with("T2M_LOG", address);
        run(&setup, place.path(), &["log", "import", &file])
    };
    let lines: Vec<&str> = export.lines().collect();
    let altered = export.replace(r#"\"n\":13}"#, r#"\"n\":99}"#);
    let cut = lines[..15].join("\n") + "\n";
    let mut gap = lines.clone();
    gap.remove(9);
    for (text, sentence) in [
        (altered.clone(), "line 14: position 13: the event and its hash do not belong together"),
        (gap.join("\n") + "\n", "line 10: position 9: the event is missing"),
        (cut, "line 16: the export ends after 14 of 20 events: it was cut"),
        (export.replacen("t2m-log", "x", 1), "line 1: not an exported log"),
    ] {
        let address = fresh().await;
        let refused = import(&address, &text).unwrap_err();
        assert!(refused.contains(sentence), "{sentence:?} is not in {refused}");
        assert_eq!(refused.trim().lines().count(), 1, "{refused}");
        assert_eq!(count(&address).await, 0, "after {refused}");
        // What is right goes in after it.
        import(&address, &export).unwrap();
    }
    // What comes only once cannot be looked through before.
    let address = fresh().await;
    std::fs::write(&file, &altered).unwrap();
    let piped = setup().with("T2M_LOG", &address);
    let mut piped = piped.command(place.path(), &["log", "import", "-"]);
    let refused = said(piped.stdin(File::open(&file).unwrap()).output().unwrap()).unwrap_err();
    let sentence = "what was brought stays, and the same command goes on after it: line 14: ";
    assert!(refused.contains(sentence), "{refused}");
    assert_eq!(count(&address).await, 12);
    import(&address, &export).unwrap();
    let other = filled(21).await;
    let log = EmbeddedLog::open(&other.path().join("log.sqlite")).unwrap();
    log.append("thing-x", Expected::NoStream, vec![event(1000)]).await.unwrap();
    drop(log);
    let longer = run(&setup(), other.path(), &["log", "export", "-"]).unwrap();
    import(&address, &longer).unwrap();
    let shorter = import(&address, &export).unwrap_err();
    assert!(shorter.contains("ends at position 22 and the export at 20"), "{shorter}");
    let stranger = filled(30).await;
    let text = run(&setup(), stranger.path(), &["log", "export", "-"]).unwrap();
    let refused = import(&address, &text).unwrap_err();
    let sentence = "nothing was changed: line 23: position 22: the log holds another event there";
    assert!(refused.contains(sentence), "{refused}");
    let nowhere = run(&setup(), stranger.path(), &["log", "copy", "--to", "embedded"]);
    assert!(nowhere.unwrap_err().contains("needs --to-data-dir"));
    let copy = ["log", "copy", "--to", &address];
    let refused = run(&setup(), stranger.path(), &copy).unwrap_err();
    assert!(refused.contains("position 22: the log holds another event there"), "{refused}");
}

#[tokio::test]
async fn a_read_model_of_another_log_is_thrown_away_and_of_a_lost_one_refused() {
    let server = Postgres::shared();
    // The users of both can be read in either place.
    let with_key = || Setup::clerk().with("T2M_MASTER_KEY", "BwcH".repeat(10) + "Bwc=");
    let mut first = Server::start(with_key());
    let job = first.generate(ADA, "in the first log").await;
    let data = first.data_dir().to_owned();
    assert!(first.stop().success());
    let refused = |setup: &Setup| {
        let output = setup.run(&data, &["serve"]);
        assert_eq!(output.status.code(), Some(1));
        let told = said(output).unwrap_err();
        assert_eq!(told.trim().lines().count(), 1, "{told}");
        assert!(told.contains("T2M_LOG"), "{told}");
        told
    };
    // The setting was changed, and nothing was brought there.
    let database = server.database().await;
    let setup = with_key().with("T2M_LOG", server.address(&database));
    let told = refused(&setup);
    assert!(told.contains("is empty, but the read model in"), "{told}");
    let doctor = setup.run(&data, &["doctor"]);
    assert!(String::from_utf8_lossy(&doctor.stdout).contains("the log is empty"), "{doctor:?}");

    // Another system's log: its own read model is made.
    let mut second = Server::start(setup.clone());
    let other = second.generate(BOB, "in the second log").await;
    assert!(second.stop().success());
    let key = format!("blobs/keys/{BOB}");
    std::fs::copy(second.data_dir().join(&key), data.join(&key)).unwrap();
    std::fs::write(data.join("views.skipped"), "1\n").unwrap();
    let doctor = setup.run(&data, &["doctor"]);
    let text = String::from_utf8_lossy(&doctor.stdout);
    assert!(text.contains("they are of another log than T2M_LOG names"), "{text}");
    assert!(text.contains("warning  skipped        1 events were given up"), "{text}");
    let lines = data.join("lines");
    let loud = setup.clone().with("RUST_LOG", "warn");
    let loud = loud.with(crate::server::LOG_FILE, lines.to_str().unwrap());
    let mut moved = first.start_again_as(loud);
    let shown = moved.get(BOB, &format!("jobs/{other}")).await.data(200);
    assert_eq!(shown["prompt"], "in the second log");
    moved.get(ADA, &format!("jobs/{job}")).await.assert_refused(404, "not_found");
    let warned = std::fs::read_to_string(&lines).unwrap();
    assert!(warned.contains("T2M_LOG names another log, postgres://127.0.0.1:"), "{warned}");
    assert!(!warned.contains("postgres:postgres"), "{warned}");
    assert!(data.join("views.skipped.of-another-log").exists());
    // A command that names the wrong log does not take the running server's views away.
    let wrong = run(&with_key(), &data, &["replay"]).unwrap_err();
    assert!(wrong.contains("a server runs in") && wrong.contains("over another log"), "{wrong}");
    assert!(moved.stop().success());

    // The same log, cut short, and then gone on.
    let stranger = server.client(&database).await;
    let cut = "DELETE FROM t2m.events WHERE position = (SELECT max(position) FROM t2m.events);
               DELETE FROM t2m.streams WHERE id > (SELECT max(position) FROM t2m.events);
               DELETE FROM t2m.types WHERE id > (SELECT max(position) FROM t2m.events)";
    stranger.batch_execute(cut).await.unwrap();
    assert!(refused(&setup).contains("the log was cut or exchanged"));
    let told = run(&setup, &data, &["replay"]).unwrap_err();
    assert!(told.contains("the log was cut or exchanged"), "{told}");
    let log = t2m::log::open(&server.address(&database), "".as_ref()).await.unwrap();
    log.append("thing", Expected::NoStream, vec![event(1)]).await.unwrap();
    assert!(refused(&setup).contains("has another event at"), "it went on");
    tokio::task::spawn_blocking(move || drop(log)).await.unwrap();

    // Back at the first log.
    let mut back = moved.start_again_as(with_key());
    assert_eq!(back.get(ADA, &format!("jobs/{job}")).await.data(200)["job_id"], job.as_str());
    // A command says it, too.
    assert!(back.stop().success());
    let told = setup.run(&data, &["replay"]);
    let told = String::from_utf8_lossy(&told.stderr).into_owned();
    assert!(told.contains("T2M_LOG names another log, postgres://127.0.0.1:"), "{told}");
    assert!(!told.contains("postgres:postgres"), "{told}");
}
