//! The operator's tools around the log, beside a running server and after it.

use std::io::Write;
use std::path::Path;
use std::process::Output;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::Method;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::server::{Answer, Server, Setup, ask, claims, signed};

const ADA: &str = "user_ada";

fn parsed(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(parsed).collect()
}

/// Runs `t2m` on a data directory; what it prints if it succeeds, else what it complains of.
fn run(data: &Path, arguments: &[&str]) -> Result<String, String> {
    let Output { status, stdout, stderr } = Setup::clerk().run(data, arguments);
    match status.code() {
        Some(0) => Ok(String::from_utf8(stdout).unwrap()),
        _ => Err(String::from_utf8(stderr).unwrap()),
    }
}

fn path(dir: &TempDir, name: &str) -> String {
    dir.path().join(name).to_str().unwrap().to_owned()
}

/// A user with a profile, a file and two jobs.
async fn lived_in() -> Server {
    let server = Server::start(Setup::clerk());
    server.get(ADA, "me").await.data(200);
    server.upload(ADA, "notes.txt", "what I noted").await;
    let job = server.generate(ADA, "a lighthouse").await;
    server.generate("user_bob", "a boat").await;
    server.post(ADA, &format!("jobs/{job}/cancel"), &json!({})).await.data(200);
    server
}

async fn as_admin(server: &Server, path: &str) -> Answer {
    let mut claims = claims("user_boss");
    claims["role"] = json!("admin");
    ask(server.request(Method::GET, path).bearer_auth(signed(&claims))).await
}

#[tokio::test]
async fn a_log_whose_wal_is_damaged_is_left_as_it_is_until_that_is_mended() {
    let mut server = lived_in().await;
    let end = server.log_position().await;
    server.kill();
    let wal = server.data_dir().join("log.sqlite-wal");
    let sound = std::fs::read(&wal).unwrap();
    let mut damaged = sound.clone();
    damaged[sound.len() / 2] ^= 1;
    std::fs::write(&wal, &damaged).unwrap();
    let setup = Setup::clerk().with("CLERK_SECRET_KEY", "sk_test_1");
    for command in [&["serve"][..], &["keys", "rotate"], &["clerk", "import"], &["log", "verify"]] {
        let refused = setup.run(server.data_dir(), command);
        let told = String::from_utf8(refused.stderr).unwrap();
        assert!(!refused.status.success(), "{command:?}");
        assert!(told.contains("but its read model in"), "{command:?}: {told}");
        assert!(std::fs::read(&wal).unwrap() == damaged, "{command:?} changed it");
    }
    std::fs::write(&wal, &sound).unwrap();
    let server = server.start_again();
    assert_eq!(server.log_position().await, end);
    server.printed(&["log", "verify"]);
}

#[tokio::test]
async fn events_are_shown_and_counted_by_what_is_asked_for() {
    let server = lived_in().await;
    let show = |arguments: &[&str]| {
        let all = [&["log", "show", "--json"], arguments].concat();
        lines(&server.printed(&all))
    };
    let all = show(&[]);
    let select = |wanted: &dyn Fn(&Value) -> bool| -> Vec<Value> {
        let found: Vec<Value> = all.iter().filter(|event| wanted(event)).cloned().collect();
        assert!(!found.is_empty() && found.len() < all.len(), "nothing is filtered");
        found
    };
    let job = select(&|it| it["type"] == "job.cancelled.v1").remove(0);
    let (stream, time) = (job["stream"].as_str().unwrap(), job["time"].as_str().unwrap());
    assert_eq!(show(&["--stream", stream]), select(&|it| it["stream"] == stream));
    assert_eq!(
        show(&["--type", "job."]),
        select(&|it| it["type"].as_str().unwrap().starts_with("job."))
    );
    let at = |it: &Value| it["position"].as_u64().unwrap();
    assert_eq!(show(&["--from", "2", "--to", "4"]), select(&|it| (3..=4).contains(&at(it))));
    let is_since = |it: &Value| it["time"].as_str().unwrap() >= time;
    assert_eq!(show(&["--since", time]), select(&is_since));
    assert_eq!(show(&["--until", time]), select(&|it| !is_since(it)));
    let of_bob =
        select(&|it| it["stream"] == "user-user_bob" || it["data"]["user_id"] == "user_bob");
    assert_eq!(show(&["--user", "user_bob"]), of_bob);
    let request = job["metadata"]["correlation_id"].as_str().unwrap();
    let brought = select(&|it| it["metadata"]["correlation_id"] == request);
    assert_eq!(show(&["--correlation", request]), brought);
    let mut newest_first = all.clone();
    newest_first.reverse();
    assert_eq!(show(&["--reverse"]), newest_first);
    assert_eq!(show(&["--reverse", "--limit", "2"]), newest_first[..2]);
    let mut of_stream = show(&["--stream", stream]);
    of_stream.reverse();
    assert_eq!(show(&["--stream", stream, "--reverse"]), of_stream);
    assert_eq!(show(&["--stream", "job-none"]), [] as [Value; 0]);
    let tail = ["log", "tail", "--json", "--last", "1000", "--type", "job.", "--limit", "2"];
    assert_eq!(lines(&server.printed(&tail)), show(&["--type", "job.", "--limit", "2"]));
    let counted = parsed(&server.printed(&["log", "stats", "--json", "--stream", stream]));
    assert_eq!((&counted["events"], &counted["streams"]), (&json!(of_stream.len()), &json!(1)));
    let refused = run(server.data_dir(), &["log", "show", "--since", "yesterday"]).unwrap_err();
    assert!(refused.contains("not a time"), "{refused}");
}

#[tokio::test]
async fn an_export_is_imported_as_it_was_and_goes_on_where_it_ended() {
    let server = lived_in().await;
    let place = TempDir::new().unwrap();
    let (one, two) = (path(&place, "one.jsonl"), path(&place, "two.jsonl"));
    server.printed(&["log", "export", &one]);
    server.generate(ADA, "one more").await;
    server.printed(&["log", "export", &two]);
    let (first, second) = (std::fs::read(&one).unwrap(), std::fs::read(&two).unwrap());
    assert_eq!(server.printed(&["log", "export"]).as_bytes(), second);
    let refused = run(server.data_dir(), &["log", "export", &one]).unwrap_err();
    assert!(refused.contains("exists"), "{refused}");
    let refused = run(server.data_dir(), &["log", "import", &two]).unwrap_err();
    assert!(refused.contains("open for writing elsewhere"), "{refused}");

    let fresh = TempDir::new().unwrap();
    let export = || run(fresh.path(), &["log", "export", "-"]).unwrap().into_bytes();
    run(fresh.path(), &["log", "import", &one]).unwrap();
    assert!(export() == first, "the import differs");
    run(fresh.path(), &["log", "import", &two]).unwrap();
    assert!(export() == second, "the continuation differs");
    run(fresh.path(), &["log", "import", &two]).unwrap();
    let shorter = run(fresh.path(), &["log", "import", &one]).unwrap_err();
    assert!(shorter.contains("does not continue it"), "{shorter}");
    let other = path(&place, "other.jsonl");
    let stranger = lived_in().await;
    stranger.generate(ADA, "quite").await;
    stranger.generate(ADA, "another").await;
    stranger.printed(&["log", "export", &other]);
    let another = run(fresh.path(), &["log", "import", &other]).unwrap_err();
    assert!(another.contains("has another event at position"), "{another}");
    assert!(export() == second, "a refused import changed something");
}

#[tokio::test]
async fn an_export_that_is_not_sound_is_refused_with_its_place_and_leaves_nothing() {
    let server = lived_in().await;
    let text = server.printed(&["log", "export", "-"]);
    let all: Vec<&str> = text.lines().collect();
    let joined = |lines: &[&str]| format!("{}\n", lines.join("\n"));
    let mut gap = all.clone();
    gap.remove(3);
    let altered = text.replace("720p", "480p");
    let at = all.iter().position(|line| line.contains("720p")).unwrap();
    let altered_at = format!("line {}: position {at}: the event and its hash", at + 1);
    let mut nonsense = all.clone();
    nonsense[2] = "{\"no\":1}";
    let faults = [
        (joined(&gap), "line 4: position 3: the event is missing"),
        (altered, altered_at.as_str()),
        (text[..text.len() - 20].to_owned(), "cut in the middle of this line"),
        (joined(&all[..all.len() - 1]), "it was cut"),
        (joined(&nonsense), "line 3: not an event"),
        (text.replacen("\"version\":1", "\"version\":2", 1), "version 2"),
        (String::new(), "line 1: not an exported log"),
    ];
    for (text, sentence) in faults {
        let place = TempDir::new().unwrap();
        let file = path(&place, "log.jsonl");
        std::fs::write(&file, text).unwrap();
        let refused = run(place.path(), &["log", "import", &file]).unwrap_err();
        assert!(refused.contains(sentence), "{sentence:?} is not in {refused}");
        assert_eq!(refused.trim().lines().count(), 1, "{refused}");
        assert!(!place.path().join("log.sqlite").exists(), "{sentence}");
        assert!(!place.path().join("log.importing").exists(), "{sentence}");
    }
}

#[tokio::test]
async fn the_state_of_an_entity_is_shown_with_what_made_it_so() {
    let server = lived_in().await;
    let events = lines(&server.printed(&["log", "show", "--json", "--type", "job.cancelled.v1"]));
    let stream = events[0]["stream"].as_str().unwrap();
    let state = |arguments: &[&str]| {
        parsed(&server.printed(&[&["state", stream, "--json"], arguments].concat()))
    };
    let now = state(&[]);
    assert_eq!(now["state"]["requested"]["phase"], "cancelled");
    let last = now["events"].as_array().unwrap().last().unwrap();
    let change = json!([
        { "field": "/requested/phase", "before": "queued", "after": "cancelled" },
    ]);
    assert_eq!(last["changes"], change);
    let position = events[0]["position"].as_u64().unwrap();
    let before = state(&["--at", &(position - 1).to_string()]);
    assert_eq!(before["state"]["requested"]["phase"], "queued");
    assert_eq!(before["state"]["requested"]["request"]["prompt"], "a lighthouse");
    assert_eq!(state(&["--at", events[0]["time"].as_str().unwrap()])["state"], now["state"]);
    let text = server.printed(&["state", stream]);
    assert!(text.contains("~ /requested/phase: \"queued\" → \"cancelled\""), "{text}");
    for (arguments, sentence) in [
        (["state", "job-none", "--at", "9"], "has no stream job-none"),
        (["state", stream, "--at", "1"], "began only at position"),
        (["state", stream, "--at", "noon"], "neither a position nor a time"),
    ] {
        let refused = run(server.data_dir(), &arguments).unwrap_err();
        assert!(refused.contains(sentence), "{refused}");
    }
}

#[tokio::test]
async fn the_doctor_finds_a_sound_server_sound_and_says_what_is_wrong_with_another() {
    let mut server = lived_in().await;
    let data = server.data_dir().to_owned();
    let verdicts = |arguments: &[&str]| {
        let output = Setup::clerk().run(&data, &[&["doctor", "--json"], arguments].concat());
        let findings = parsed(&String::from_utf8(output.stdout).unwrap());
        let faulty: Vec<String> = findings
            .as_array()
            .unwrap()
            .iter()
            .filter(|it| it["verdict"] == "fault")
            .map(|it| it["check"].as_str().unwrap().to_owned())
            .collect();
        assert_eq!(output.status.success(), faulty.is_empty(), "{findings}");
        faulty
    };
    assert_eq!(verdicts(&[]), [] as [&str; 0]);
    assert_eq!(verdicts(&["--full"]), [] as [&str; 0]);
    server.stop();
    assert_eq!(verdicts(&["--full"]), [] as [&str; 0]);
    let text = run(&data, &["doctor"]).unwrap();
    assert!(text.lines().all(|line| line.starts_with("ok ") || line.starts_with("warning ")));

    let blob = walk(&data.join("blobs/sha256")).remove(0);
    let hidden = data.join("hidden");
    std::fs::rename(&blob, &hidden).unwrap();
    assert_eq!(verdicts(&[]), ["blobs"]);
    std::fs::rename(&hidden, &blob).unwrap();
    // A volume that was not mounted, or did not come along.
    std::fs::rename(data.join("blobs"), &hidden).unwrap();
    assert_eq!(verdicts(&[]), ["keys of users", "blobs"]);
    std::fs::rename(&hidden, data.join("blobs")).unwrap();
    std::fs::rename(data.join("log.sqlite"), &hidden).unwrap();
    assert_eq!(verdicts(&[]), ["views"], "they have seen what is not there");
    // What lies beside it is a part of it.
    let beside = ["log.sqlite-wal", "log.sqlite-shm"]
        .map(|it| (data.join(it), data.join(format!("{it}.hidden"))));
    for (left, hidden) in beside.iter().filter(|(left, _)| left.exists()) {
        std::fs::rename(left, hidden).unwrap();
    }
    for (command, sentence) in [
        (&["serve"][..], "is empty, but the read model in"),
        (&["erase", ADA], "there is no log at"),
        (&["keys", "rotate"], "there is no log at"),
        (&["keys", "status"], "there is no log at"),
    ] {
        let refused = run(&data, command).unwrap_err();
        assert!(refused.contains(sentence), "{refused}");
        assert!(!data.join("log.sqlite").exists(), "{command:?} has left an empty log");
    }
    std::fs::rename(&hidden, data.join("log.sqlite")).unwrap();
    for (left, hidden) in beside.iter().filter(|(_, hidden)| hidden.exists()) {
        std::fs::rename(hidden, left).unwrap();
    }
    let log = rusqlite::Connection::open(data.join("log.sqlite")).unwrap();
    let set = |data: &[u8]| {
        log.execute("UPDATE events SET data = ?1 WHERE position = 3", [data]).unwrap();
    };
    let select = "SELECT data FROM events WHERE position = 3";
    let whole: Vec<u8> = log.query_row(select, [], |row| row.get(0)).unwrap();
    let mut flipped = whole.clone();
    flipped[5] ^= 1;
    set(&flipped);
    assert_eq!(verdicts(&[]), ["log"]);
    // What lies before it is there for everybody who asks for no more.
    let model = hidden.with_file_name("until-2.sqlite");
    for command in [
        &["log", "show", "--to", "2"][..],
        &["log", "show", "--limit", "2"],
        &["log", "show", "--from", "1", "--to", "2", "--reverse"],
        &["log", "stats", "--to", "2"],
        &["log", "tail", "--from", "1", "--to", "2"],
        &["replay", "--until", "2", "--to", model.to_str().unwrap()],
    ] {
        run(&data, command).unwrap_or_else(|refused| panic!("{command:?}: {refused}"));
    }
    let shown = Setup::clerk().run(&data, &["log", "show"]);
    assert_eq!(shown.status.code(), Some(1));
    assert_eq!(String::from_utf8(shown.stdout).unwrap().lines().count(), 2);
    let itself = data.join(".");
    let copy = ["log", "copy", "--to", "embedded", "--to-data-dir", itself.to_str().unwrap()];
    let refused = run(&data, &copy).unwrap_err();
    assert!(refused.contains("is the log that is to be copied"), "{refused}");
    let verified = Setup::clerk().run(&data, &["log", "verify", "--json"]);
    assert_eq!(verified.status.code(), Some(1));
    let told = parsed(&String::from_utf8(verified.stdout).unwrap());
    assert_eq!(told["position"], 3, "{told}");
    assert!(told["error"].as_str().unwrap().contains("do not belong together"), "{told}");
    set(&whole);
    // What is left agrees with itself, but the read model has seen more.
    let lose = "CREATE TEMP TABLE lost AS SELECT * FROM events WHERE position > 3;
                DELETE FROM events WHERE position > 3";
    log.execute_batch(lose).unwrap();
    let verified = Setup::clerk().run(&data, &["log", "verify", "--json"]);
    assert_eq!(verified.status.code(), Some(1));
    let told = parsed(&String::from_utf8(verified.stdout).unwrap());
    assert_eq!(told["position"], 4, "{told}");
    for command in [&["backup", hidden.to_str().unwrap()][..], &["serve"]] {
        let refused = run(&data, command).unwrap_err();
        assert!(refused.contains("ends at 3, but its read model in"), "{refused}");
    }
    assert!(!hidden.exists(), "a backup of what is left");
    log.execute_batch("INSERT INTO events SELECT * FROM lost").unwrap();
    std::fs::create_dir_all(data.join("blobs/secrets")).unwrap();
    std::fs::write(data.join("blobs/secrets/job-1"), b"sealed by a key that is lost").unwrap();
    assert_eq!(verdicts(&[]), ["keys"]);
    let bad = Setup::clerk().with("RATE_LIMIT_READS", "many").run(&data, &["doctor"]);
    let text = String::from_utf8(bad.stdout).unwrap();
    assert!(text.contains("fault    configuration  RATE_LIMIT_READS"), "{text}");
    std::fs::remove_file(data.join("blobs/secrets/job-1")).unwrap();
    let (key, tombstone) = (format!("blobs/keys/{ADA}"), format!("blobs/erased/{ADA}"));
    let (key, tombstone) = (data.join(key), data.join(tombstone));
    std::fs::rename(&key, &hidden).unwrap();
    assert_eq!(verdicts(&[]), ["keys of users"], "it is lost");
    assert_eq!(verdicts(&["--full"]), ["keys of users"]);
    std::fs::create_dir_all(tombstone.parent().unwrap()).unwrap();
    std::fs::write(&tombstone, TOMBSTONE).unwrap();
    assert_eq!(verdicts(&[]), [] as [&str; 0], "it was destroyed");
    std::fs::rename(&hidden, &key).unwrap();
    assert_eq!(verdicts(&[]), ["keys of users"], "it has come back");
    std::fs::remove_file(&tombstone).unwrap();

    // While another master key takes its place, and with none given.
    let (old, new) = (std::fs::read(data.join("master.key")).unwrap(), [7; 32]);
    let [old, new] = [&old[..], &new].map(|key| STANDARD.encode(key));
    let keys = |given: &str| {
        let output = Setup::clerk().with("T2M_MASTER_KEY", given).run(&data, &["doctor"]);
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines().find(|line| line.contains(" keys  ")).map(str::to_owned).unwrap()
    };
    for given in [format!("{new},{old}"), old, " ".to_owned()] {
        assert!(keys(&given).starts_with("ok "), "{}", keys(&given));
    }
    assert!(keys(&new).starts_with("fault "), "{}", keys(&new));

    let mut views = std::fs::File::options().write(true).open(data.join("views.sqlite")).unwrap();
    views.write_all(b"no header of SQLite").unwrap();
    assert_eq!(verdicts(&[]), ["views"]);
    assert_eq!(Setup::clerk().run(&data, &["serve"]).status.code(), Some(1));
}

/// All files below a directory.
fn walk(directory: &Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] }).collect()
}

#[tokio::test]
async fn a_backup_of_a_busy_server_is_restored_elsewhere_to_all_that_was_acknowledged() {
    let server = Arc::new(lived_in().await);
    let file = server.upload(ADA, "kept.txt", "kept in the backup").await;
    let stop = Arc::new(AtomicBool::new(false));
    let busy = {
        let (server, stop) = (Arc::clone(&server), Arc::clone(&stop));
        tokio::spawn(async move {
            let mut number = 0;
            while !stop.load(Ordering::Relaxed) {
                server.generate("user_busy", &format!("number {number}")).await;
                let name = format!("{number}.txt");
                let file = server.upload("user_busy", &name, &format!("text {number}")).await;
                if number % 3 == 0 {
                    let path = format!("files/{}", file["file_id"].as_str().unwrap());
                    server.delete("user_busy", &path).await;
                }
                number += 1;
            }
            number
        })
    };
    let job = server.generate(ADA, "acknowledged before the backup").await;
    let acknowledged = server.log_position().await;
    let place = TempDir::new().unwrap();
    let backup = path(&place, "backup");
    let data = server.data_dir().to_owned();
    let made = {
        let backup = backup.clone();
        tokio::task::spawn_blocking(move || run(&data, &["backup", &backup, "--json"]))
    };
    let made = parsed(&made.await.unwrap().unwrap());
    stop.store(true, Ordering::Relaxed);
    assert!(busy.await.unwrap() > 0, "nobody was busy");
    assert!(made["events"].as_u64().unwrap() >= acknowledged, "{made}");
    assert_eq!(made["missing_blobs"], json!([]));
    let again = run(server.data_dir(), &["backup", &backup]).unwrap_err();
    assert!(again.contains("is not empty"), "{again}");

    let elsewhere = TempDir::new().unwrap();
    let restored = parsed(&run(elsewhere.path(), &["restore", &backup, "--json"]).unwrap());
    assert_eq!(restored["head_hash"], made["head_hash"]);
    let verified = parsed(&run(elsewhere.path(), &["log", "verify", "--json"]).unwrap());
    assert_eq!(verified["head_hash"], made["head_hash"]);
    let over = run(elsewhere.path(), &["restore", &backup]).unwrap_err();
    assert!(over.contains("is not empty"), "{over}");
    let upto = made["events"].to_string();
    let digests = |data: &Path, to: &str| {
        let printed = run(data, &["replay", "--until", &upto, "--to", &path(&place, to)]).unwrap();
        let tables: Vec<_> = printed.lines().filter(|line| line.contains("sha256")).collect();
        tables.join("\n")
    };
    assert_eq!(digests(elsewhere.path(), "a.sqlite"), digests(server.data_dir(), "b.sqlite"));
    // In place an earlier position is only for where nobody asks.
    let beside = run(server.data_dir(), &["replay", "--until", "3"]).unwrap_err();
    assert!(beside.contains("a server runs"), "{beside}");
    let alone = run(elsewhere.path(), &["replay", "--until", "3"]).unwrap();
    assert!(alone.contains(&format!("position    3 of {upto}")), "{alone}");

    let server = Server::start_in(Setup::clerk(), elsewhere);
    assert_eq!(server.get(ADA, &format!("jobs/{job}")).await.data(200)["job_id"], job.as_str());
    let id = file["file_id"].as_str().unwrap();
    let link = server.post(ADA, &format!("files/{id}/signed-url"), &json!({})).await.data(200);
    let url = link["url"].as_str().unwrap();
    let below = &url[url.find("/api/").unwrap()..];
    assert_eq!(ask(server.request(Method::GET, below)).await.bytes, b"kept in the backup");
    server.printed(&["doctor", "--full"]);
}

#[test]
fn who_only_looks_makes_nothing() {
    let data = TempDir::new().unwrap();
    run(data.path(), &["keys", "status"]).unwrap_err();
    run(data.path(), &["webhooks", "dead"]).unwrap();
    run(data.path(), &["keys", "rotate"]).unwrap_err();
    run(data.path(), &["doctor"]).unwrap();
    assert_eq!(std::fs::read_dir(data.path()).unwrap().count(), 0, "something was made");
}

#[tokio::test]
async fn a_damaged_or_unfinished_backup_is_refused_and_leaves_nothing() {
    let server = lived_in().await;
    let place = TempDir::new().unwrap();
    let backup = path(&place, "backup");
    server.printed(&["backup", &backup, "--blobs", "copy"]);
    let refuse = |what: &str| {
        let data = TempDir::new().unwrap();
        let refused = run(data.path(), &["restore", &backup]).unwrap_err();
        assert_eq!(std::fs::read_dir(data.path()).unwrap().count(), 0, "{what} left something");
        refused
    };
    for file in walk(Path::new(&backup)) {
        let whole = std::fs::read(&file).unwrap();
        let what = file.display().to_string();
        if what.ends_with("manifest.json") || whole.is_empty() {
            continue;
        }
        let mut flipped = whole.clone();
        flipped[whole.len() / 2] ^= 1;
        std::fs::write(&file, &flipped).unwrap();
        let refused = refuse(&what);
        assert!(refused.contains("damaged"), "{what}: {refused}");
        std::fs::remove_file(&file).unwrap();
        refuse(&what);
        std::fs::write(&file, &whole).unwrap();
    }
    let manifest = Path::new(&backup).join("manifest.json");
    let whole = std::fs::read_to_string(&manifest).unwrap();
    std::fs::write(&manifest, whole.replacen("\"version\": 1", "\"version\": 2", 1)).unwrap();
    assert!(refuse("a newer version").contains("newer program"));
    std::fs::remove_file(&manifest).unwrap();
    assert!(refuse("no manifest").contains("never finished"));
    std::fs::write(&manifest, &whole).unwrap();
    run(TempDir::new().unwrap().path(), &["restore", &backup]).unwrap();
}

const TOMBSTONE: &str = r#"{"erased_at":"2026-03-09T08:00:00Z"}"#;

#[tokio::test]
async fn who_was_erased_since_the_backup_has_no_key_after_it() {
    let server = lived_in().await;
    // Somebody's key that opens: where none does, it is no backup.
    server.get("user_eve", "me").await.data(200);
    let place = TempDir::new().unwrap();
    let store = server.data_dir().join("blobs");
    for (folder, name) in [("keys", "user_ada"), ("keys", "user_bob"), ("keys", "user_gone")] {
        std::fs::create_dir_all(store.join(folder)).unwrap();
        std::fs::write(store.join(folder).join(name), format!("the key of {name}")).unwrap();
    }
    std::fs::create_dir_all(store.join("erased")).unwrap();
    std::fs::write(store.join("erased/user_gone"), TOMBSTONE).unwrap();
    for user in ["user_ada", "user_bob"] {
        let unusable = json!({
            "id": "of no use", "object": "session", "user_id": user, "status": "active",
        });
        server.deliver("session.created", &unusable).await.data(200);
    }
    let backup = path(&place, "backup");
    let made = parsed(&server.printed(&["backup", &backup, "--json"]));
    let unopened = made["unopened"].as_array().unwrap();
    for user in ["keys/user_ada", "keys/user_bob"] {
        assert!(unopened.contains(&json!(user)), "{made}");
    }
    assert!(!unopened.contains(&json!("keys/user_eve")), "{made}");
    std::fs::write(store.join("erased/user_bob"), TOMBSTONE).unwrap();
    let list = path(&place, "erased.txt");
    std::fs::write(&list, "user_bob\n").unwrap();
    // The keys may be kept apart.
    let keys = path(&place, "apart");
    std::fs::rename(Path::new(&backup).join("keys"), &keys).unwrap();
    let without = run(TempDir::new().unwrap().path(), &["restore", &backup]).unwrap_err();
    assert!(without.contains("keys"), "{without}");
    for tombstones in [store.join("erased").to_str().unwrap(), &list] {
        let data = TempDir::new().unwrap();
        let arguments = ["restore", &backup, "--keys", &keys, "--tombstones", tombstones];
        run(data.path(), &arguments).unwrap();
        let there = |name: &str| data.path().join("blobs").join(name).exists();
        assert!(there("keys/user_ada") && there("erased/user_bob") && there("erased/user_gone"));
        assert!(!there("keys/user_bob") && !there("keys/user_gone"), "an erased user has a key");
        let letters: Vec<_> = std::fs::read_dir(data.path().join("blobs/dead-letters"))
            .unwrap()
            .map(|letter| std::fs::read_to_string(letter.unwrap().path()).unwrap())
            .collect();
        let naming = |user: &str| letters.iter().filter(|letter| letter.contains(user)).count();
        assert_eq!((naming("user_ada"), naming("user_bob")), (1, 0), "{letters:?}");
    }
    // Another folder is not taken for users.
    let data = TempDir::new().unwrap();
    let wrong = store.to_str().unwrap();
    let arguments = ["restore", &backup, "--keys", &keys, "--tombstones", wrong];
    let refused = run(data.path(), &arguments).unwrap_err();
    assert!(refused.contains("is no copy of the folder `erased`"), "{refused}");
    assert_eq!(std::fs::read_dir(data.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn administrators_read_the_log_and_how_the_server_is() {
    let server = lived_in().await;
    let all = lines(&server.printed(&["log", "show", "--json"]));
    let events = as_admin(&server, "admin/events?limit=200").await.data(200);
    let shown: Vec<Value> = events["items"].as_array().unwrap().iter().rev().cloned().collect();
    // The administrator's own first request is an event too.
    assert_eq!(shown[..all.len()], all);
    let all = shown;
    assert!(all.iter().all(|event| event["metadata"].get("causation_id").is_some()));
    let ask_for = async |query: &str| {
        let page = as_admin(&server, &format!("admin/events?{query}")).await.data(200);
        (page["items"].as_array().unwrap().clone(), page["next_cursor"].clone())
    };
    let (first, next) = ask_for("from=1&limit=2").await;
    assert_eq!(first, all[1..3]);
    let next = next.as_str().unwrap();
    assert_eq!(ask_for(&format!("from=1&limit=2&cursor={next}")).await.0, all[3..5]);
    let stream = all.last().unwrap()["stream"].as_str().unwrap();
    let (of_stream, _) = ask_for(&format!("stream={stream}")).await;
    assert!(!of_stream.is_empty() && of_stream.iter().all(|event| event["stream"] == stream));
    let (jobs, _) = ask_for("type=job.requested").await;
    assert_eq!(jobs.len(), 2);
    assert_eq!(ask_for("stream=job-none").await, (vec![], Value::Null));
    as_admin(&server, "admin/events?from=soon").await.assert_refused(422, "validation_failed");

    let system = as_admin(&server, "admin/system").await.data(200);
    assert_eq!(system["log"]["engine"], "embedded");
    assert_eq!((&system["log"]["writable"], &system["views"]["lag"]), (&json!(true), &json!(0)));
    assert_eq!(system["log"]["position"], all.len());
    assert_eq!(system["jobs"], json!({ "cancelled": 1, "queued": 1 }));
    assert_eq!(system["blobs"]["store"], "file");
    assert!(system["disk"]["free_bytes"].as_u64().unwrap() > 0);
    assert!(system["actors"]["jobs"].as_u64().unwrap() >= 2);
    assert_eq!(system["views"]["parked"], json!([]));
}
