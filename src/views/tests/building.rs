//! Views that are built come out as those that followed.

use super::*;
use crate::views::feed::TICKS_KEPT;

fn schema(views: &Views) -> Vec<(String, String)> {
    let all = views.read(|sql| {
        sql.prepare("SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL ORDER BY name")?
            .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
            .collect()
    });
    all.unwrap()
}

#[test]
fn a_file_that_was_built_has_the_tables_and_indexes_of_one_that_followed() {
    let views = empty();
    let built = Building::beside(&views.path()).unwrap().finish().unwrap();
    assert_eq!(schema(&built), schema(&views));
    let indexes = schema(&views).iter().filter(|(_, sql)| sql.starts_with("CREATE INDEX")).count();
    assert!(indexes > 15, "{indexes}");
}

#[test]
fn what_is_not_ours_keeps_its_name_and_another_is_taken() {
    let views = after(history());
    let place = |name: &str| views.directory.path().join(name);
    let letters = "somebody's letters".repeat(99);
    fs::write(place("views-1.sqlite"), &letters).unwrap();
    let theirs = || Connection::open(place("views-2.sqlite")).unwrap();
    theirs().execute_batch("CREATE TABLE theirs (x)").unwrap();
    fs::create_dir(place("views-3.sqlite")).unwrap();
    fs::write(place("views-4.sqlite-wal"), &letters).unwrap();
    std::os::unix::fs::symlink(place("views.sqlite"), place("views-5.sqlite")).unwrap();
    // Of ours the beginning, and what a crash left of the rest.
    let mut broken = fs::read(views.present_file()).unwrap();
    broken[100..].fill(0xff);
    fs::write(place("views-6.sqlite"), broken).unwrap();

    let mut building = Building::beside(&views.path()).unwrap();
    building.apply(&log(history()), 0).unwrap();
    let fresh = building.finish_as_current().unwrap();
    assert_eq!(fresh.present_file(), place("views-6.sqlite"));
    assert_eq!(fresh.content_hash().unwrap(), views.content_hash().unwrap());
    views.replace_with(fresh).unwrap();
    views.sweep();
    for name in ["views-1.sqlite", "views-4.sqlite-wal"] {
        assert_eq!(fs::read_to_string(place(name)).unwrap(), letters);
    }
    theirs().execute_batch("SELECT x FROM theirs").unwrap();
    assert!(place("views-3.sqlite").is_dir());
    assert!(!place("views.sqlite").exists(), "the one before is not needed");
    drop(Building::beside(&views.path()).unwrap().finish_as_current().unwrap());
    assert!(place("views-7.sqlite").exists());
}

#[test]
fn ticks_are_kept_for_so_many_positions_and_all_else_for_ever() {
    let mut history = log(vec![
        job(1, requested("ada")),
        job(1, leased(1, 60)),
        job(1, progressed(10, 60)),
        job(1, progressed(20, 60)),
        job(2, requested("bob")),
    ]);
    for stride in [1, 512] {
        // The first of the two ticks is just too old by then.
        history[4].position = history[2].position + TICKS_KEPT * stride;
        keep_ticks(&history, stride);
    }
}

fn keep_ticks(history: &[Happened], stride: u64) {
    let followed = empty();
    followed.set_stride(stride);
    for happened in history {
        followed.apply(std::slice::from_ref(happened)).unwrap();
    }
    let kept = |views: &Views| -> Vec<String> {
        let items = views.feed_of_job(&job_id(1), 0, 99).unwrap();
        items.into_iter().map(|item| format!("{} {}", item.position, item.event)).collect()
    };
    let expected = ["10 job.requested", "20 job.leased", "40 job.progressed"];
    assert_eq!(kept(&followed), expected);
    for towards in [0, history[4].position] {
        let building = Building::beside(&followed.path()).unwrap();
        let mut building = building.with_stride(stride);
        for happened in history {
            building.apply(std::slice::from_ref(happened), towards).unwrap();
        }
        let built = building.finish().unwrap();
        assert_eq!(kept(&built), expected, "towards {towards}");
        assert_eq!(built.content_hash().unwrap(), followed.content_hash().unwrap());
    }
    followed.renew().unwrap();
    let renewed = followed.successor().unwrap().expect("it was made beside");
    assert_eq!((kept(&renewed), renewed.stride()), (kept(&followed), stride));
}

#[test]
fn views_of_another_version_that_were_built_beside_are_left_to_its_program() {
    let views = after(history());
    let mut building = Building::beside(&views.path()).unwrap();
    building.apply(&log(history()), 0).unwrap();
    let built = building.finish_as_current().unwrap().present_file();
    let version = |number| {
        let sql = Connection::open(&built).unwrap();
        sql.pragma_update(None, "user_version", number).unwrap();
    };
    version(99);
    assert_eq!(views.successor().unwrap().map(|next| next.present_file()), None);
    assert!(!views.is_outdated().unwrap());
    views.sweep();
    version(file::SCHEMA_VERSION);
    assert!(views.is_outdated().unwrap());
    let fresh = views.successor().unwrap().expect("it stayed");
    assert_eq!(fresh.content_hash().unwrap(), views.content_hash().unwrap());
}
