//! A read model that was built beside the present one takes its place, and nothing is left over.

use super::*;

#[test]
fn fresh_views_replace_the_present_ones_under_their_readers() {
    let views = after(history());
    let reader = views.views.clone();
    for round in 0..3 {
        let build = |events: &[Happened]| {
            let mut fresh = Building::beside(&views.path()).unwrap();
            assert!(matches!(Building::beside(&views.path()), Err(Error::Rebuilding)));
            fresh.apply(events, 0).unwrap();
            let fresh = fresh.finish().unwrap();
            let followed = empty();
            followed.apply(events).unwrap();
            assert_eq!(fresh.dump().unwrap(), followed.dump().unwrap(), "built as if followed");
            fresh
        };
        let behind = build(&log(history())[..3]);
        assert!(matches!(views.replace_with(behind), Err(Error::Behind { .. })), "{round}");
        views.replace_with(build(&log(history()))).unwrap();
        assert!(reader.user(&user_id("ada")).unwrap().is_some());
    }
    let entity = user("eve", registered("e"));
    views.apply(&[Happened { position: 9999, hash: [0; 32], time: at(9), entity }]).unwrap();
    assert!(reader.user_standing(&user_id("eve")).is_some());
    let hash = views.content_hash().unwrap();
    let Fixture { directory, views } = views;
    drop((views, reader));
    let databases = fs::read_dir(directory.path())
        .unwrap()
        .flatten()
        .filter(|entry| entry.path().extension().is_some_and(|extension| extension == "sqlite"));
    assert_eq!(databases.count(), 1, "the replaced files are deleted");
    let again = Views::open(&directory.path().join("views.sqlite")).unwrap();
    assert_eq!((again.checkpoint(), again.content_hash().unwrap()), (9999, hash));
}

#[test]
fn a_rebuild_that_broke_off_leaves_nothing_behind_the_next_start() {
    let Fixture { directory, views } = after(history());
    let mut building = Building::beside(&views.path()).unwrap();
    building.apply(&log(history()), 0).unwrap();
    let half_built = directory.path().join("views-1.sqlite");
    let left_by_a_crash = directory.path().join("views-2.sqlite");
    fs::copy(&half_built, &left_by_a_crash).unwrap();
    drop(views);
    let path = directory.path().join("views.sqlite");
    drop(Views::open(&path).unwrap());
    assert!(half_built.exists() && left_by_a_crash.exists(), "somebody is at it");
    drop(building);
    assert!(left_by_a_crash.exists());
    drop(Views::open(&path).unwrap());
    assert!(!left_by_a_crash.exists());
}

#[test]
fn what_is_not_finished_takes_no_room_and_shows_nothing_any_more() {
    let views = after(history());
    let names = || {
        let names = fs::read_dir(views.directory.path()).unwrap();
        let mut names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
        names.retain(|name| !name.to_string_lossy().starts_with("views.sqlite"));
        names
    };
    let build = || {
        let mut building = Building::beside(&views.path()).unwrap();
        building.apply(&log(history()), 0).unwrap();
        building
    };
    drop(build());
    assert_eq!(names(), ["views.rebuild.lock"]);
    build().compare_and_remove(&Snapshot::of(&views.path()).unwrap()).unwrap();
    assert_eq!(names(), ["views.rebuild.lock"]);
    // It cannot be named.
    fs::create_dir(views.directory.path().join("views.sqlite.current.draft")).unwrap();
    assert!(build().hand_over().is_err());
    assert!(build().finish_as_current().is_err());
    assert_eq!(names(), ["views.rebuild.lock"]);

    let own = views.directory.path().join("own.sqlite");
    drop(Building::at(&own).unwrap());
    assert!(!own.exists());
    drop(Building::at(&own).unwrap().finish().unwrap());
    assert!(own.exists());
}

#[test]
fn what_was_built_beside_outlives_a_sweeping_before_it_is_taken_over() {
    let Fixture { directory, views } = after(history());
    let mut building = Building::beside(&views.path()).unwrap();
    building.apply(&log(history()), 0).unwrap();
    drop(building.finish_as_current().unwrap());
    views.sweep();
    let fresh = views.successor().unwrap().expect("it was built");
    assert_eq!(fresh.content_hash().unwrap(), views.content_hash().unwrap());
    views.replace_with(fresh).unwrap();
    views.sweep();
    assert!(!directory.path().join("views.sqlite").exists(), "the one before is not needed");
}

#[test]
fn views_that_are_taken_over_while_others_are_built_give_way_to_those() {
    let Fixture { directory, views } = after(history());
    let build = || {
        let mut building = Building::beside(&views.path()).unwrap();
        building.apply(&log(history()), 0).unwrap();
        drop(building.finish_as_current().unwrap());
    };
    build();
    let first = views.successor().unwrap().expect("it was built");
    build();
    views.sweep();
    views.replace_with(first).unwrap();
    assert_eq!(views.present_file(), directory.path().join("views-1.sqlite"));
    assert!(views.present_file().exists());
    let second = views.successor().unwrap().expect("it was built after the first");
    views.replace_with(second).unwrap();
    views.sweep();
    assert_eq!(views.present_file(), directory.path().join("views-2.sqlite"));
    assert!(!directory.path().join("views-1.sqlite").exists());
    assert_eq!(views.successor().unwrap().map(|next| next.present_file()), None);
}

#[test]
fn a_wal_that_grew_under_a_reader_gives_its_room_back() {
    let views = after(history());
    let wal = views.directory.path().join("views.sqlite-wal");
    let length = || fs::metadata(&wal).unwrap().len();
    let mut position = views.checkpoint();
    let mut apply = || {
        position += 1;
        let entity = user(&format!("user-{position}"), registered("e"));
        views.apply(&[Happened { position, hash: [0; 32], time: at(9), entity }]).unwrap();
    };
    let reader = Snapshot::of(&views.path()).unwrap();
    while length() < 2 << 20 {
        apply();
    }
    drop(reader);
    let sql = Connection::open(views.present_file()).unwrap();
    sql.query_row("PRAGMA wal_checkpoint(RESTART)", [], |_| Ok(())).unwrap();
    apply();
    assert!(length() <= 1 << 20, "{}", length());
}

#[test]
fn views_from_elsewhere_do_not_replace() {
    let (here, there) = (after(history()), after(history()));
    assert!(matches!(here.replace_with(there.views.clone()), Err(Error::Elsewhere)));
}
