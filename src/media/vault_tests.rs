use super::*;
use std::os::unix::fs::PermissionsExt;

fn vault(dir: &Path) -> Vault {
    let blobs = Blobs::open(&crate::config::BlobStore::File, dir).unwrap();
    Vault::new(&blobs, "secrets", MasterKey::kept_in(&dir.join("master.key")))
}

fn sealed_file(dir: &Path, name: &str) -> PathBuf {
    dir.join("blobs/secrets").join(name)
}

#[tokio::test]
async fn a_secret_comes_back_until_it_is_destroyed_and_is_nowhere_in_clear() {
    let dir = tempfile::tempdir().unwrap();
    vault(dir.path()).seal("job-1", b"a-very-secret-key").await.unwrap();
    // Another process with the same directory.
    let again = vault(dir.path());
    assert_eq!(again.open("job-1").await.unwrap().unwrap(), b"a-very-secret-key");
    let sealed = std::fs::read(sealed_file(dir.path(), "job-1")).unwrap();
    assert!(!sealed.windows(6).any(|part| part == b"secret"));
    again.destroy("job-1").await.unwrap();
    again.destroy("job-1").await.unwrap();
    assert_eq!(again.open("job-1").await.unwrap(), None);
    assert!(!sealed_file(dir.path(), "job-1").exists());
}

#[tokio::test]
async fn the_same_secret_is_never_sealed_the_same_twice() {
    let dir = tempfile::tempdir().unwrap();
    let vault = vault(dir.path());
    let mut seen = std::collections::HashSet::new();
    for _ in 0..20 {
        vault.seal("job-1", b"k").await.unwrap();
        assert!(seen.insert(std::fs::read(sealed_file(dir.path(), "job-1")).unwrap()));
    }
}

#[tokio::test]
async fn what_was_changed_moved_or_sealed_by_another_key_is_not_opened() {
    let dir = tempfile::tempdir().unwrap();
    let vault = vault(dir.path());
    vault.seal("job-1", b"key of one").await.unwrap();
    let path = sealed_file(dir.path(), "job-1");
    let sealed = std::fs::read(&path).unwrap();
    std::fs::copy(&path, sealed_file(dir.path(), "job-2")).unwrap();
    assert!(matches!(vault.open("job-2").await, Err(Error::Unopenable)), "moved");
    for at in 0..sealed.len() {
        let mut changed = sealed.clone();
        changed[at] ^= 1;
        std::fs::write(&path, &changed).unwrap();
        assert!(matches!(vault.open("job-1").await, Err(Error::Unopenable)), "byte {at}");
        std::fs::write(&path, &sealed[..at]).unwrap();
        assert!(matches!(vault.open("job-1").await, Err(Error::Unopenable)), "cut at {at}");
    }
    std::fs::write(&path, &sealed).unwrap();
    let other = MasterKey::given(SealingKey::new(&[7; KEY_BYTES]).unwrap());
    let other = Vault::new(
        &Blobs::open(&crate::config::BlobStore::File, dir.path()).unwrap(),
        "secrets",
        other,
    );
    assert!(matches!(other.open("job-1").await, Err(Error::Unopenable)), "another key");
    assert!(vault.open("job-1").await.unwrap().is_some());
}

#[tokio::test]
async fn the_master_key_is_made_at_the_first_need_for_this_user_alone() {
    let dir = tempfile::tempdir().unwrap();
    let vault = vault(dir.path());
    let path = dir.path().join("master.key");
    assert_eq!(vault.open("job-1").await.unwrap(), None);
    assert!(!path.exists());
    vault.seal("job-1", b"k").await.unwrap();
    let meta = std::fs::metadata(&path).unwrap();
    assert_eq!((meta.len(), meta.permissions().mode() & 0o777), (32, 0o600));
    std::fs::write(&path, b"short").unwrap();
    let broken = super::tests::vault(dir.path()).seal("job-2", b"k").await;
    assert!(matches!(broken, Err(Error::MasterKey { .. })), "a broken key is not replaced");
}

#[test]
fn of_many_who_need_the_first_key_at_once_all_get_the_one_that_is_kept() {
    for _ in 0..50 {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("master.key");
        let all_there = std::sync::Barrier::new(8);
        let keys: Vec<_> = std::thread::scope(|scope| {
            let need = || {
                all_there.wait();
                read_or_make(&path).unwrap()
            };
            let needing: Vec<_> = (0..8).map(|_| scope.spawn(need)).collect();
            needing.into_iter().map(|it| it.join().unwrap()).collect()
        });
        let kept = std::fs::read(&path).unwrap();
        assert!(keys.iter().all(|key| *key == kept), "somebody seals with a lost key");
        assert_eq!(dir.path().read_dir().unwrap().count(), 1, "a draft was left behind");
    }
}

#[tokio::test]
async fn the_kept_key_is_exchanged_under_a_running_process_and_after_a_crash() {
    let dir = tempfile::tempdir().unwrap();
    let (running, path) = (vault(dir.path()), dir.path().join("master.key"));
    running.seal("job-1", b"one").await.unwrap();
    let (old, exchange) = (std::fs::read(&path).unwrap(), MasterKey::kept_in(&path));
    let blobs = Blobs::open(&crate::config::BlobStore::File, dir.path()).unwrap();
    let exchanging = Vault::new(&blobs, "secrets", exchange.clone());
    assert_eq!(exchanging.is_by_first("job-1").await.unwrap(), Some(true));
    exchange.put_fresh_first().unwrap();
    // A second try after a crash makes no third key.
    exchange.put_fresh_first().unwrap();
    let both = std::fs::read(&path).unwrap();
    assert_eq!((both.len(), &both[KEY_BYTES..]), (2 * KEY_BYTES, &old[..]));
    running.seal("job-2", b"two").await.unwrap();
    let by_first = [running.is_by_first("job-1").await, running.is_by_first("job-2").await];
    assert_eq!(by_first.map(Result::unwrap), [Some(false), Some(true)]);
    assert!(exchanging.reseal("job-1").await.unwrap(), "it knows of its own new key");
    assert!(!vault(dir.path()).reseal("job-1").await.unwrap());
    exchange.keep_first_alone().unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), both[..KEY_BYTES]);
    for vault in [running, vault(dir.path())] {
        assert_eq!(vault.open("job-1").await.unwrap().unwrap(), b"one");
        assert_eq!(vault.open("job-2").await.unwrap().unwrap(), b"two");
    }
}

#[tokio::test]
async fn of_several_given_keys_the_first_seals_and_all_open() {
    let dir = tempfile::tempdir().unwrap();
    let blobs = Blobs::open(&crate::config::BlobStore::File, dir.path()).unwrap();
    let with = |keys: &[u8]| {
        let keys: Vec<_> = keys.iter().map(|byte| STANDARD.encode([*byte; 32])).collect();
        Vault::new(&blobs, "secrets", MasterKey::parse(&keys.join(", ")).unwrap())
    };
    with(&[1]).seal("job-1", b"one").await.unwrap();
    assert_eq!(with(&[2, 1]).open("job-1").await.unwrap().unwrap(), b"one");
    assert!(matches!(with(&[2]).open("job-1").await, Err(Error::Unopenable)));
    assert!(with(&[2, 1]).reseal("job-1").await.unwrap());
    assert_eq!(with(&[2]).open("job-1").await.unwrap().unwrap(), b"one");
}

#[test]
fn of_many_that_make_the_master_key_at_once_all_get_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("master.key");
    let start = std::sync::Barrier::new(8);
    let keys: Vec<Vec<u8>> = std::thread::scope(|scope| {
        let make = || {
            start.wait();
            read_or_make(&path).unwrap()
        };
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(make)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let kept = std::fs::read(&path).unwrap();
    assert!(keys.iter().all(|key| *key == kept));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no draft is left");
}

#[tokio::test]
async fn what_broke_off_leaves_no_old_key_behind_once_the_exchange_is_repeated() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("master.key");
    vault(dir.path()).seal("job-1", b"one").await.unwrap();
    let old = std::fs::read(&path).unwrap();
    let exchange = MasterKey::kept_in(&path);
    // Killed before the draft had its name: in either step.
    draft(&path, &[&[7_u8; KEY_BYTES][..], &old].concat()).unwrap();
    let others = ["master.new", "master.new-abc", "other.new-0123456789abcdef"];
    for name in others {
        std::fs::write(dir.path().join(name), "not ours").unwrap();
    }
    exchange.put_fresh_first().unwrap();
    draft(&path, &old).unwrap();
    exchange.put_fresh_first().unwrap();
    assert!(vault(dir.path()).reseal("job-1").await.unwrap());
    exchange.keep_first_alone().unwrap();
    let entries = std::fs::read_dir(dir.path()).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.filter(|name| name != "blobs").collect();
    names.sort();
    assert_eq!(names, [&["master.key"][..], &others].concat());
    assert_eq!(vault(dir.path()).open("job-1").await.unwrap().unwrap(), b"one");
}

#[test]
fn an_exchange_that_fails_leaves_no_draft() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("master.key");
    // Nothing takes the place of a directory.
    std::fs::create_dir(&path).unwrap();
    assert!(replace(&path, &[7; KEY_BYTES]).is_err());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn a_key_is_given_as_base64_of_32_bytes() {
    assert!(SealingKey::parse(&STANDARD.encode([1; 32])).is_ok());
    for bad in ["", "abc", "!!!!", &STANDARD.encode([1; 31]), &STANDARD.encode([1; 33])] {
        assert!(matches!(SealingKey::parse(bad), Err(Error::BadKey)), "{bad}");
    }
}
