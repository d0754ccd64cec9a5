//! Backups of what does not lie in the data directory: a log over the network, files in a bucket.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::Method;
use serde_json::{Value, json};
use t2m::media::blobs::Blobs;
use tempfile::TempDir;

use crate::engine_faults::until;
use crate::postgres::{Postgres, Proxy};
use crate::s3::S3;
use crate::server::{Server, Setup, ask};

const ADA: &str = "user_ada";

fn path(dir: &TempDir, name: &str) -> String {
    dir.path().join(name).to_str().unwrap().to_owned()
}

fn run(setup: &Setup, data: &Path, arguments: &[&str]) -> Result<String, String> {
    let output = setup.run(data, arguments);
    match output.status.code() {
        Some(0) => Ok(String::from_utf8(output.stdout).unwrap()),
        _ => Err(String::from_utf8(output.stderr).unwrap()),
    }
}

fn parsed(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

async fn fresh() -> Setup {
    let server = Postgres::shared();
    Setup::clerk().with("T2M_LOG", server.address(&server.database().await))
}

async fn text_of(server: &Server, file: &str) -> Vec<u8> {
    let link = server.post(ADA, &format!("files/{file}/signed-url"), &json!({})).await.data(200);
    let url = link["url"].as_str().unwrap();
    ask(server.request(Method::GET, &url[url.find("/api/").unwrap()..])).await.bytes
}

#[tokio::test]
async fn a_backup_over_postgres_is_restored_into_any_engine_that_is_empty() {
    let setup = fresh().await;
    let server = Server::start(setup.clone());
    let file = server.upload(ADA, "kept.txt", "kept in the backup").await;
    let file = file["file_id"].as_str().unwrap().to_owned();
    let job = server.generate(ADA, "acknowledged before the backup").await;
    let place = TempDir::new().unwrap();
    let backup = path(&place, "backup");
    let made = parsed(&server.printed(&["backup", &backup, "--json"]));
    assert_eq!(made["events"], server.log_position().await);
    for target in [Setup::clerk(), fresh().await] {
        let elsewhere = TempDir::new().unwrap();
        let restored = run(&target, elsewhere.path(), &["restore", &backup, "--json"]).unwrap();
        assert_eq!(parsed(&restored)["head_hash"], made["head_hash"]);
        let verified = run(&target, elsewhere.path(), &["log", "verify", "--json"]).unwrap();
        assert_eq!(parsed(&verified)["head_hash"], made["head_hash"]);
        let restored = Server::start_in(target, elsewhere);
        let shown = restored.get(ADA, &format!("jobs/{job}")).await.data(200);
        assert_eq!(shown["job_id"], job.as_str());
        assert_eq!(text_of(&restored, &file).await, b"kept in the backup");
        restored.printed(&["doctor", "--full"]);
    }
    // Never over another log; into its own, as after a restore that broke off, it goes.
    let other = fresh().await;
    Server::start(other.clone()).generate("user_bob", "somebody else's").await;
    let elsewhere = TempDir::new().unwrap();
    let refused = run(&other, elsewhere.path(), &["restore", &backup]).unwrap_err();
    assert!(refused.contains("(T2M_LOG) is neither empty nor a part of this backup"), "{refused}");
    assert_eq!(std::fs::read_dir(elsewhere.path()).unwrap().count(), 0, "it left something");
    run(&setup, elsewhere.path(), &["restore", &backup]).unwrap();
}

#[tokio::test]
async fn another_data_directory_than_the_servers_is_no_backup_of_a_log_over_the_network() {
    let setup = fresh().await;
    let server = Server::start(setup.clone());
    server.generate(ADA, "sealed by a key").await;
    let (place, other) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let missing = path(&place, "not there");
    let backup = path(&place, "backup");
    let arguments = ["backup", &backup, "--data-dir", &missing];
    let refused = run(&setup, other.path(), &arguments).unwrap_err();
    assert!(refused.contains("there is no data directory"), "{refused}");
    let refused = run(&setup, other.path(), &["backup", &backup]).unwrap_err();
    assert!(refused.contains("neither a key nor a tombstone"), "{refused}");
    assert_eq!(std::fs::read_dir(other.path()).unwrap().count(), 0, "it made something");
    assert!(!Path::new(&missing).exists() && !Path::new(&backup).join("manifest.json").exists());
    std::fs::remove_dir_all(&backup).unwrap();
    // The right one, without what opens the keys in it.
    std::fs::remove_file(server.data_dir().join("master.key")).unwrap();
    let refused = run(&setup, server.data_dir(), &["backup", &backup]).unwrap_err();
    assert!(refused.contains("to open them: name the server's data directory"), "{refused}");
    assert!(!Path::new(&backup).exists());
    let given = setup.with("T2M_MASTER_KEY", "BwcH".repeat(10) + "Bwc=");
    let refused = run(&given, server.data_dir(), &["backup", &backup]).unwrap_err();
    assert!(refused.contains("opens with T2M_MASTER_KEY: another one seals them"), "{refused}");
}

#[tokio::test]
async fn files_of_a_backup_are_brought_into_a_bucket() {
    let s3 = S3::start().await;
    let server = Server::start(Setup::clerk());
    let kept = server.upload(ADA, "kept.txt", "kept in the backup").await;
    let other = server.upload(ADA, "other.txt", "will be damaged").await;
    let place = TempDir::new().unwrap();
    let backup = path(&place, "backup");
    server.printed(&["backup", &backup, "--blobs", "copy"]);
    let with = |url: &str| {
        let setup = Setup::clerk().with("T2M_BLOBS", url);
        s3.variables().fold(setup, |it, (name, value)| it.with(name, value))
    };
    let elsewhere = TempDir::new().unwrap();
    let left = || std::fs::read_dir(elsewhere.path()).unwrap().count();
    let nowhere = with("s3://no-such-bucket/some");
    run(&nowhere, elsewhere.path(), &["restore", &backup]).unwrap_err();
    assert_eq!(left(), 0, "it left something");
    let damaged = other["sha256"].as_str().unwrap();
    let file = Path::new(&backup).join("blobs/sha256").join(&damaged[..2]).join(damaged);
    std::fs::write(file, "it is damaged !").unwrap();
    let setup = with(&s3.url);
    let refused = run(&setup, elsewhere.path(), &["restore", &backup]).unwrap_err();
    assert!(refused.contains(damaged) && refused.contains("is damaged"), "{refused}");
    assert_eq!(left(), 0, "it left something");
    let arguments = ["restore", &backup, "--without-damaged-files", "--json"];
    let restored = parsed(&run(&setup, elsewhere.path(), &arguments).unwrap());
    assert_eq!((&restored["blobs"], &restored["left_out_blobs"]), (&json!(1), &json!([damaged])));
    assert!(!elsewhere.path().join("blobs").exists(), "files for a bucket were left here");
    // Once more, into the bucket that has them.
    run(&setup, TempDir::new().unwrap().path(), &arguments).unwrap();
    // One that only lists them says that they have to be there.
    let listed = path(&place, "listed");
    server.printed(&["backup", &listed, "--blobs", "none"]);
    let arguments = ["restore", &listed, "--json"];
    let told = parsed(&run(&setup, TempDir::new().unwrap().path(), &arguments).unwrap());
    assert_eq!((&told["blobs"], &told["listed_blobs"]), (&json!(0), &json!(2)), "{told}");
    let restored = Server::start_in(setup, elsewhere);
    let id = kept["file_id"].as_str().unwrap();
    assert_eq!(text_of(&restored, id).await, b"kept in the backup");
    let status = restored.run(&["doctor"]);
    let told = String::from_utf8_lossy(&status.stdout).into_owned();
    let id = other["file_id"].as_str().unwrap();
    assert!(told.contains(&format!("1 files without their bytes: {id} of {ADA}")), "{told}");
}

#[tokio::test]
async fn what_the_operator_gave_up_is_in_the_backup_and_a_restore_goes_to_a_fresh_volume() {
    let (data, place) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    crate::engines::filled(&data.path().join("log.sqlite"), 1).await;
    std::fs::write(data.path().join("views.skipped"), "7\n").unwrap();
    let backup = path(&place, "backup");
    let setup = Setup::clerk();
    run(&setup, data.path(), &["backup", &backup]).unwrap();
    let volume = TempDir::new().unwrap();
    std::fs::create_dir(volume.path().join("lost+found")).unwrap();
    // As long as one is at work there, or broke off, nobody else writes.
    std::fs::create_dir(volume.path().join("restoring")).unwrap();
    let export = path(&place, "log.jsonl");
    run(&setup, data.path(), &["log", "export", &export]).unwrap();
    let into = volume.path().to_str().unwrap();
    let copy = ["log", "copy", "--to", "embedded", "--to-data-dir", into];
    let copied = run(&setup, data.path(), &copy).unwrap_err();
    for refused in [run(&setup, volume.path(), &["log", "import", &export]).unwrap_err(), copied] {
        assert!(refused.contains("a restore into") && refused.contains("broke off"), "{refused}");
    }
    assert_eq!(std::fs::read_dir(volume.path()).unwrap().count(), 2);
    run(&setup, volume.path(), &["restore", &backup]).unwrap();
    assert_eq!(std::fs::read(volume.path().join("views.skipped")).unwrap(), b"7\n");
    assert!(!volume.path().join("restoring").exists());
}

#[tokio::test]
async fn a_restore_into_postgres_that_broke_off_lets_no_server_start_and_is_repeated() {
    let (data, place) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    crate::engines::filled(&data.path().join("log.sqlite"), 20).await;
    let elsewhere = TempDir::new().unwrap();
    let backup = path(&place, "backup");
    let made = parsed(&run(&Setup::clerk(), data.path(), &["backup", &backup, "--json"]).unwrap());
    let (postgres, s3) = (Postgres::shared(), S3::start().await);
    let database = postgres.database().await;
    // With the files elsewhere too, nothing of which lies here.
    let over = |address: String| {
        let setup = Setup::clerk().with("T2M_LOG", address).with("T2M_BLOBS", &s3.url);
        s3.variables().fold(setup, |it, (name, value)| it.with(name, value))
    };
    let direct = over(postgres.address(&database));
    let proxy = Proxy::to(postgres).await;
    proxy.hold_answers(Duration::from_millis(100));
    let slowly = over(proxy.address(&database));
    let mut restore = slowly.command(elsewhere.path(), &["restore", &backup]);
    let mut restore = restore.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    until("some events are there", async || {
        run(&direct, place.path(), &["log", "stats", "--json"])
            .is_ok_and(|counted| parsed(&counted)["events"] != 0)
    })
    .await;
    restore.kill().unwrap();
    restore.wait().unwrap();
    let refused = run(&direct, elsewhere.path(), &["serve"]).unwrap_err();
    assert!(refused.contains("a restore into") && refused.contains("broke off"), "{refused}");
    let restored = run(&direct, elsewhere.path(), &["restore", &backup, "--json"]).unwrap();
    assert_eq!(parsed(&restored)["head_hash"], made["head_hash"]);
    let verified = run(&direct, elsewhere.path(), &["log", "verify", "--json"]).unwrap();
    assert_eq!(parsed(&verified)["head_hash"], made["head_hash"]);
    assert!(!elsewhere.path().join("log.sqlite").exists());
}

#[tokio::test]
async fn a_backup_with_its_files_in_a_bucket_names_them_and_brings_the_keys_into_another() {
    let (one, other) = (S3::start().await, S3::start().await);
    let with = |s3: &S3| {
        let setup = Setup::clerk().with("T2M_BLOBS", &s3.url);
        s3.variables().fold(setup, |it, (name, value)| it.with(name, value))
    };
    let mut server = Server::start(with(&one));
    let file = server.upload(ADA, "kept.txt", "kept in the bucket").await;
    let job = server.generate(ADA, "sealed by a key in the bucket").await;
    let place = TempDir::new().unwrap();
    let backup = path(&place, "backup");
    let copied = server.run(&["backup", &backup, "--blobs", "copy"]);
    let told = String::from_utf8_lossy(&copied.stderr).into_owned();
    assert!(told.contains("files in S3 are not copied: give --blobs none"), "{told}");
    std::fs::remove_dir_all(&backup).unwrap();
    let made = parsed(&server.printed(&["backup", &backup, "--json"]));
    assert_eq!((&made["blobs"], &made["missing_blobs"]), (&json!(1), &json!([])));
    let list = std::fs::read_to_string(Path::new(&backup).join("blobs.txt")).unwrap();
    let sha256 = file["sha256"].as_str().unwrap();
    assert!(list.starts_with(sha256), "{list}");
    assert!(!Path::new(&backup).join("blobs").exists(), "the files are by reference");
    assert!(server.stop().success());

    // Into the bucket where the files are: all is there.
    let elsewhere = TempDir::new().unwrap();
    run(&with(&one), elsewhere.path(), &["restore", &backup]).unwrap();
    let restored = Server::start_in(with(&one), elsewhere);
    let shown = restored.get(ADA, &format!("jobs/{job}")).await.data(200);
    assert_eq!(shown["prompt"], "sealed by a key in the bucket");
    let id = file["file_id"].as_str().unwrap();
    assert_eq!(text_of(&restored, id).await, b"kept in the bucket");
    restored.printed(&["doctor", "--full"]);
    drop(restored);

    // Into another one: keys are brought, and the doctor says which files are to be brought too.
    let elsewhere = TempDir::new().unwrap();
    run(&with(&other), elsewhere.path(), &["restore", &backup]).unwrap();
    let mut restored = Server::start_in(with(&other), elsewhere);
    let shown = restored.get(ADA, &format!("jobs/{job}")).await.data(200);
    assert_eq!(shown["prompt"], "sealed by a key in the bucket");
    assert!(restored.stop().success());
    let doctor = restored.run(&["doctor"]);
    let told = String::from_utf8_lossy(&doctor.stdout).into_owned();
    assert!(told.contains(&format!("1 files without their bytes: {id} of {ADA}")), "{told}");
}

#[tokio::test]
async fn after_a_rotation_the_keys_in_the_bucket_give_way_to_those_of_a_backup_only_when_told_to() {
    let s3 = S3::start().await;
    let setup = Setup::clerk().with("T2M_BLOBS", &s3.url);
    let setup = s3.variables().fold(setup, |it, (name, value)| it.with(name, value));
    let mut server = Server::start(setup.clone());
    let job = server.generate(ADA, "sealed before the backup").await;
    server.generate("user_eve", "of somebody who goes").await;
    let place = TempDir::new().unwrap();
    let backup = path(&place, "backup");
    server.printed(&["backup", &backup]);
    server.generate("user_bob", "sealed since").await;
    server.printed(&["erase", "user_eve"]);
    assert!(server.stop().success());
    let rotated = server.printed(&["keys", "rotate"]);
    assert!(rotated.contains("holds the new master key alone"), "{rotated}");
    let opens = |setup: &Setup, data: &Path| {
        let state = run(setup, data, &["state", &format!("job-{job}"), "--json"]).unwrap();
        state.contains("sealed before the backup")
    };

    let elsewhere = TempDir::new().unwrap();
    let refused = run(&setup, elsewhere.path(), &["restore", &backup]).unwrap_err();
    assert!(refused.contains("2 sealed keys and secrets in the store, such as keys/user_ada"));
    assert!(refused.contains("the backup's master.key") && refused.contains("--replace-keys"));
    assert_eq!(std::fs::read_dir(elsewhere.path()).unwrap().count(), 0, "it left something");
    assert!(opens(&setup, server.data_dir()), "who has the new master key has lost something");

    // Whoever has it elsewhere needs no others.
    let new = STANDARD.encode(std::fs::read(server.data_dir().join("master.key")).unwrap());
    let (given, beside) = (setup.clone().with("T2M_MASTER_KEY", new), TempDir::new().unwrap());
    run(&given, beside.path(), &["restore", &backup]).unwrap();
    assert!(opens(&given, beside.path()) && opens(&setup, server.data_dir()));

    // It is lost with the disk.
    drop(server);
    run(&setup, elsewhere.path(), &["restore", &backup, "--replace-keys"]).unwrap();
    let blobs = Blobs::open_for_reading(&s3.store(), place.path()).unwrap();
    assert_eq!(blobs.names_in("keys").await.unwrap(), [ADA]);
    let restored = Server::start_in(setup, elsewhere);
    let shown = restored.get(ADA, &format!("jobs/{job}")).await.data(200);
    assert_eq!(shown["prompt"], "sealed before the backup");
    // Who came since comes anew; who was erased since stays so.
    restored.generate("user_bob", "sealed after the restore").await;
    assert_eq!(blobs.names_in("keys").await.unwrap(), [ADA, "user_bob"]);
    assert_eq!(blobs.names_in("erased").await.unwrap(), ["user_eve"]);
}

#[tokio::test]
async fn a_backup_without_its_master_key_is_restored_only_where_that_is_given() {
    let key = |byte: u8| STANDARD.encode([byte; 32]);
    let setup = Setup::clerk().with("T2M_MASTER_KEY", key(7));
    let server = Server::start(setup.clone());
    let job = server.generate(ADA, "sealed by a given key").await;
    let place = TempDir::new().unwrap();
    let backup = path(&place, "backup");
    server.printed(&["backup", &backup]);
    let elsewhere = TempDir::new().unwrap();
    let wrong = setup.clone().with("T2M_MASTER_KEY", key(8));
    for (setup, sentence) in [
        (&Setup::clerk(), "neither a master.key in the backup nor T2M_MASTER_KEY"),
        (&wrong, "none of the 1 sealed keys and secrets opens with T2M_MASTER_KEY"),
    ] {
        let refused = run(setup, elsewhere.path(), &["restore", &backup]).unwrap_err();
        assert!(refused.contains(sentence), "{refused}");
        assert_eq!(std::fs::read_dir(elsewhere.path()).unwrap().count(), 0, "it left something");
    }
    let several = setup.with("T2M_MASTER_KEY", format!("{},{}", key(8), key(7)));
    run(&several, elsewhere.path(), &["restore", &backup]).unwrap();
    let restored = Server::start_in(several, elsewhere);
    let shown = restored.get(ADA, &format!("jobs/{job}")).await.data(200);
    assert_eq!(shown["prompt"], "sealed by a given key");
}
