//! That nothing of a deleted user stays in the files, and nothing of anybody else is lost on the way.

use std::path::Path;

use super::*;
use crate::domain::text::Prompt;

const USERS: u64 = 1000;

/// What only this user's rows hold, and which of the deleted it is.
fn mark(n: u64) -> String {
    format!("secret-{n:04}")
}

fn is_deleted(n: u64) -> bool {
    n.is_multiple_of(4)
}

fn profile(n: u64, length: usize) -> Box<Profile> {
    let known = |what: &str| Some(Personal::Known(format!("{}{what}", mark(n))));
    Box::new(Profile {
        email: known("@example.com"),
        first_name: known(&"a".repeat(length)),
        last_name: known(&"b".repeat(length / 2)),
        ..Profile::default()
    })
}

/// A number that looks like chance.
fn drawn(n: u64) -> u64 {
    let mixed = n.wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29);
    mixed.wrapping_mul(0xBF58_476D_1CE4_E5B9) >> 33
}

/// Rows that come in no order and then grow, each by another length, so that pages are split and put
/// in order with rows of others on them.
fn lives() -> Vec<Entity> {
    let everybody = |round: u64| {
        let mut users: Vec<u64> = (0..USERS).collect();
        users.sort_by_key(|n| drawn(n + round * 10_000));
        users
    };
    let name = |n| format!("user-{n}");
    let mut lives = vec![];
    for n in everybody(0) {
        let (profile, told) = (profile(n, 9), Told::default());
        let claimed_at = None;
        let event = UserEvent::Registered { profile, provisional: false, told, claimed_at };
        lives.push(user(&name(n), event));
        let known = |what: &str| Some(Personal::Known(format!("{}{what}", mark(n))));
        let start = SessionEvent::Started {
            user_id: user_id(&name(n)),
            started_at: at(0),
            expires_at: at(86_400),
            ip_address: known("::1"),
            user_agent: known(&"x".repeat(drawn(n) as usize % 90)),
        };
        lives.push(session(&format!("session-{n}"), start));
        let JobEvent::Requested(mut request) = requested(&name(n)) else { unreachable!() };
        request.prompt = Personal::Known(Prompt::parse(&format!("{} at sea", mark(n))).unwrap());
        lives.push(job(n.into(), JobEvent::Requested(request)));
    }
    for n in everybody(1) {
        let profile = profile(n, drawn(n + 77_777) as usize % 1500);
        let (source_updated_at, told) = (at(1), Told::default());
        let event = UserEvent::ProfileChanged { profile, source_updated_at, told };
        lives.push(user(&name(n), event));
    }
    let gone = everybody(0).into_iter().filter(|n| is_deleted(*n));
    lives.extend(gone.map(|n| user(&name(n), UserEvent::Deleted {})));
    lives
}

fn lived() -> Fixture {
    let views = empty();
    for batch in log(lives()).chunks(50) {
        views.apply(batch).unwrap();
    }
    views
}

/// The deleted users of whom a file of the folder says something.
fn told_of(folder: &Path) -> Vec<(String, u64)> {
    let mut told = vec![];
    for path in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        let bytes = fs::read(&path).unwrap();
        let marks = bytes.windows(11).filter_map(|part| {
            let number = part.strip_prefix(b"secret-")?;
            std::str::from_utf8(number).ok()?.parse().ok()
        });
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        told.extend(marks.filter(|n| is_deleted(*n)).map(|n| (name.clone(), n)));
    }
    told
}

#[test]
fn what_moved_rows_left_of_deleted_users_is_in_no_file_once_the_views_are_renewed() {
    let views = lived();
    let folder = views.directory.path();
    let sql = Connection::open(views.present_file()).unwrap();
    sql.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
    drop(sql);
    let left = told_of(folder);
    assert!(!left.is_empty(), "SQLite clears it all by now: then there is nothing to renew");
    assert!(views.holds_residue().unwrap());
    let before = views.content_hash().unwrap();

    views.renew().unwrap();
    let fresh = views.successor().unwrap().expect("it was made beside");
    assert_eq!(told_of(folder), left, "nothing new");
    assert!(!fresh.holds_residue().unwrap());
    views.replace_with(fresh).unwrap();
    assert_eq!(told_of(folder), []);
    assert!(!views.holds_residue().unwrap());
    assert_eq!(views.content_hash().unwrap(), before);
    let names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
    let of_the_first = names.filter(|name| name.to_string_lossy().starts_with("views.sqlite"));
    assert_eq!(of_the_first.count(), 0, "its WAL goes with it");
    // Who is deleted after that makes it necessary again, also after a restart.
    let position = views.checkpoint() + 1;
    let entity = user("user-1", UserEvent::Deleted {});
    views.apply(&[Happened { position, hash: [0; 32], time: at(9), entity }]).unwrap();
    let Fixture { directory, views } = views;
    drop(views);
    let views = Views::open(&directory.path().join("views.sqlite")).unwrap();
    assert!(views.holds_residue().unwrap());
}

#[test]
fn what_happens_while_views_are_renewed_is_not_lost() {
    let (views, history) = (empty(), log(history()));
    let (before, after) = history.split_at(20);
    views.apply(before).unwrap();
    let copy = Building::beside(&views.path()).unwrap().copied().unwrap();
    assert!(matches!(views.renew(), Err(Error::Rebuilding)));
    views.apply(after).unwrap();
    assert!(views.user(&user_id("bob")).unwrap().unwrap().deleted, "queries go on");
    let fresh = copy.finish_as_current().unwrap();
    assert_eq!(fresh.checkpoint(), before.last().unwrap().position);
    assert!(matches!(views.replace_with(fresh), Err(Error::Behind { .. })));
    let fresh = views.successor().unwrap().expect("it was made beside");
    fresh.apply(after).unwrap();
    let expected = views.content_hash().unwrap();
    views.replace_with(fresh).unwrap();
    assert_eq!((views.checkpoint(), views.content_hash().unwrap()), (410, expected));
    // The deletion came after the rows were copied.
    assert!(views.holds_residue().unwrap());
}

#[test]
fn renewed_views_stand_still_where_the_others_did() {
    let views = after(history());
    let (view, reason) = (Some(View::Files), "of a newer version".to_owned());
    let entity = Entity::Unreadable { view, reason };
    views.apply(&[Happened { position: 999, hash: [7; 32], time: at(9), entity }]).unwrap();
    views.renew().unwrap();
    let fresh = views.successor().unwrap().unwrap();
    assert_eq!((fresh.parked(), fresh.seen().unwrap()), (views.parked(), views.seen().unwrap()));
    assert_eq!(fresh.parked().len(), 1);
}

#[test]
fn a_renewal_that_fails_leaves_nothing() {
    let views = after(history());
    let newer = views.directory.path().join("views-1.sqlite");
    fs::copy(views.present_file(), &newer).unwrap();
    Connection::open(&newer).unwrap().execute_batch("PRAGMA user_version = 999").unwrap();
    fs::write(views.directory.path().join("views.current"), "1").unwrap();
    assert!(matches!(views.renew(), Err(Error::Outdated(_))));
    assert!(newer.exists());
    assert!(!views.directory.path().join("views-2.sqlite").exists());
}

#[test]
fn a_removal_that_breaks_off_leaves_the_file_by_which_the_rest_is_found() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("views-1.sqlite");
    fs::write(&path, "").unwrap();
    fs::create_dir(directory.path().join("views-1.sqlite-wal")).unwrap();
    assert!(file::remove(&path).is_err());
    assert!(path.exists());
}
