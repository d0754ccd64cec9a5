//! What must hold whenever nothing is under way and everyone knows of everything.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use rusqlite::Connection;
use rusqlite::types::ValueRef;
use t2m::domain::ids::{FileId, JobId, SessionId, UserId};
use t2m::domain::job::Kind;
use t2m::log::EventLog;
use uuid::Uuid;

use super::node::Node;
use super::rules::{self, Told};
use super::world::{NODES, PERSONAL, World};

type Checked = Result<(), String>;

/// Holds two things to be equal, and says what they are.
fn same<T: PartialEq + std::fmt::Debug>(what: &str, is: T, should: T) -> Checked {
    if is == should { Ok(()) } else { Err(format!("{what}: {is:?}, should be {should:?}")) }
}

fn user(id: &str) -> UserId {
    UserId::try_from(id.to_owned()).unwrap()
}

fn uuid(id: &str) -> Uuid {
    Uuid::try_parse(id).unwrap()
}

pub async fn check(world: &World) -> Checked {
    let mut hashes = BTreeSet::new();
    for index in 0..NODES {
        let node = world.node(index);
        let views = &node.system.views;
        same("parked views", views.parked(), vec![])?;
        hashes.insert(views.content_hash().map_err(|it| it.to_string())?);
        let of_node = |wrong| format!("node {index}: {wrong}");
        let seen = world.seen.lock().unwrap();
        rows(&node, &seen.told).map_err(of_node)?;
        counts(&node, &seen.told).map_err(of_node)?;
        queues(&node, &seen.told).map_err(of_node)?;
        let gone = seen.told.users.iter().filter(|(_, user)| user.deleted);
        let gone: Vec<&String> = gone.map(|(id, _)| id).collect();
        nothing_personal(&node, &gone).map_err(of_node)?;
    }
    same("different read models", hashes.len(), 1)?;
    store(world).await
}

/// The same, and what costs more.
pub async fn check_all(world: &World) -> Checked {
    check(world).await?;
    let node = world.node(0);
    let hash = node.system.views.content_hash().map_err(|it| it.to_string())?;
    let replayed = node.replayed(&world.path("replay.sqlite")).await;
    same("the replay", replayed.map_err(|it| it.to_string())?, hash)?;
    node.log.verify().await.map_err(|it| it.to_string())?;
    words(world)?;
    attempts(world)?;
    world.judge();
    Ok(())
}

/// What the read model shows of each thing is what the log told.
fn rows(node: &Node, told: &Told) -> Checked {
    let views = &node.system.views;
    for (id, job) in &told.jobs {
        let row = views.job(&JobId(uuid(id))).unwrap().ok_or(format!("no job {id}"))?;
        same(id, row.state.as_str(), job.state())?;
        same(id, u64::from(row.attempt), job.attempts)?;
    }
    for (id, session) in &told.sessions {
        let id = SessionId::try_from(id.clone()).unwrap();
        let row = views.session(&id).unwrap().ok_or(format!("no session {id}"))?;
        same(
            id.as_str(),
            row.ended_reason.map(|it| it.as_str().to_owned()),
            session.ended.clone(),
        )?;
        same(id.as_str(), row.user_id.map(String::from), session.user.clone())?;
    }
    for (id, file) in &told.files {
        same(id, views.file(&FileId(uuid(id))).unwrap().is_some(), !file.deleted)?;
    }
    for (id, known) in &told.users {
        let Some(row) = views.user(&user(id)).unwrap() else {
            same(id, known.registered, false)?;
            continue;
        };
        same(id, row.deleted, known.deleted)?;
        same(id, row.banned, known.banned && !known.deleted)?;
    }
    Ok(())
}

/// Counts that are kept are those that come out when everything is counted again.
fn counts(node: &Node, told: &Told) -> Checked {
    let views = &node.system.views;
    let analytics = views.analytics(node.system.clock.now()).map_err(|it| it.to_string())?;
    let there = told.users.values().filter(|user| user.registered && !user.deleted);
    same("users", analytics.users, there.count() as u64)?;
    let of = |owner: Option<&str>| {
        let mine = |user: &String| owner.is_none_or(|owner| owner == user.as_str());
        let mut states = BTreeMap::<String, u64>::new();
        for job in told.jobs.values().filter(|job| mine(&job.user)) {
            *states.entry(job.state().to_owned()).or_default() += 1;
        }
        let files = told.files.values().filter(|file| !file.deleted && mine(&file.user));
        let sizes: Vec<u64> = files.map(|file| file.size).collect();
        (states, sizes.len() as u64, sizes.iter().sum::<u64>())
    };
    let counted = (analytics.jobs, analytics.files, analytics.bytes_stored);
    same("everybody", counted, of(None))?;
    for id in told.users.keys() {
        let usage = views.usage(&user(id), node.system.clock.now());
        let usage = usage.map_err(|it| it.to_string())?;
        same(id, (usage.jobs, usage.files, usage.bytes_stored), of(Some(id)))?;
    }
    Ok(())
}

/// Those who wait have the places 1, 2, 3 …, and the first is the one that a worker gets.
fn queues(node: &Node, told: &Told) -> Checked {
    let (views, now, caps) = (&node.system.views, node.system.clock.now(), node.leasing.caps());
    for kind in Kind::ALL {
        let next = views.next_job(now, caps, &[kind], |_| false);
        let mut places = BTreeMap::new();
        for (id, job) in told.jobs.iter().filter(|(_, job)| job.kind == kind.as_str()) {
            let row = views.job(&JobId(uuid(id))).unwrap().ok_or("no row")?;
            let place = views.queue_position(&row, now, caps);
            if job.phase == rules::Phase::Queued && place.is_none() {
                return Err(format!("{id} waits, but has no place"));
            }
            if let Some(place) = place {
                places.insert(place, JobId(uuid(id)));
            } else {
                same("who comes next does not wait", next == Some(JobId(uuid(id))), false)?;
            }
            let waits = matches!(job.phase, rules::Phase::Queued | rules::Phase::RetryWait(_));
            same("has a place without waiting", place.is_some() && !waits, false)?;
        }
        let (given, wanted): (Vec<u64>, _) =
            (places.keys().copied().collect(), (1..=places.len() as u64).collect());
        same("places", given, wanted)?;
        if let Some(next) = next {
            same("the first", places.get(&1), Some(&next))?;
        }
    }
    Ok(())
}

/// The file that is read has no row with anything personal of these users. One that a rebuild left
/// unfinished when its node crashed is not looked at: it stays until the next rebuild begins.
fn nothing_personal(node: &Node, gone: &[&String]) -> Checked {
    let marks: Vec<String> = gone.iter().map(|id| format!("{PERSONAL}{id}.")).collect();
    let sql = Connection::open(present(&node.system.views.path())).unwrap();
    let tables: Vec<String> = sql
        .prepare("SELECT name FROM sqlite_schema WHERE type = 'table'")
        .and_then(|mut it| it.query_map([], |row| row.get(0))?.collect())
        .map_err(|it| it.to_string())?;
    same("it is the read model", tables.iter().any(|table| table == "users"), true)?;
    for table in tables {
        if let Some(mark) = found(&sql, &table, &marks) {
            return Err(format!("`{mark}` is left in {table}"));
        }
    }
    Ok(())
}

/// The file that the views' name stands for.
fn present(base: &Path) -> PathBuf {
    let number = std::fs::read_to_string(base.with_extension("current"));
    match number.ok().and_then(|text| text.trim().parse::<u64>().ok()) {
        Some(number) if number > 0 => base.with_file_name(format!("views-{number}.sqlite")),
        _ => base.to_owned(),
    }
}

fn found<'a>(sql: &Connection, table: &str, marks: &'a [String]) -> Option<&'a String> {
    let mut all = sql.prepare(&format!("SELECT * FROM \"{table}\"")).unwrap();
    let columns = all.column_count();
    let mut rows = all.query([]).unwrap();
    while let Some(row) = rows.next().unwrap() {
        for column in 0..columns {
            if let ValueRef::Text(bytes) | ValueRef::Blob(bytes) = row.get_ref(column).unwrap() {
                let text = String::from_utf8_lossy(bytes);
                if let Some(mark) = marks.iter().find(|mark| text.contains(*mark)) {
                    return Some(mark);
                }
            }
        }
    }
    None
}

/// Bytes that a file refers to are there; keys of deleted users and secrets of ended jobs are not.
async fn store(world: &World) -> Checked {
    let (referred, over, alive, gone) = {
        let told = &world.seen.lock().unwrap().told;
        let deleted = |id: &String| told.users.get(id).is_some_and(|user| user.deleted);
        let secrets = world.secrets.borrow();
        let kept = told.jobs.iter().filter(|(id, _)| secrets.contains(*id));
        let (over, alive): (Vec<_>, Vec<_>) =
            kept.partition(|(_, job)| job.is_over() || deleted(&job.user));
        let ids = |jobs: Vec<(&String, _)>| -> Vec<String> {
            jobs.into_iter().map(|(id, _)| id.clone()).collect()
        };
        let gone: Vec<String> = told.users.keys().filter(|id| deleted(id)).cloned().collect();
        (rules::referred(told), ids(over), ids(alive), gone)
    };
    for sha256 in referred {
        let place = format!("sha256/{}/{sha256}", &sha256[..2]);
        let there = world.store.holds(&place).await
            || !world.store.under(&format!("aside/{sha256}")).await.is_empty();
        same("bytes of a file are lost", there, true)?;
    }
    for (jobs, should) in [(over, false), (alive, true)] {
        for id in jobs {
            let there = world.store.holds(&format!("secrets/job-{id}")).await;
            same(&format!("the secret of {id} is there"), there, should)?;
        }
    }
    for id in gone {
        same(&format!("the key of {id}"), world.store.holds(&format!("keys/{id}")).await, false)?;
        same(
            &format!("the tombstone of {id}"),
            world.store.holds(&format!("erased/{id}")).await,
            true,
        )?;
    }
    Ok(())
}

/// Clerk's newest word holds, in whatever order and however often its words came.
fn words(world: &World) -> Checked {
    let seen = world.seen.lock().unwrap();
    let words = world.words.borrow();
    for word in words.iter().filter(|word| word.acknowledged) {
        let known = seen.told.users.get(&word.user).ok_or("acknowledged, and nobody is there")?;
        let newest = known.deleted || known.synced_at >= Some(word.at);
        same(&format!("{} is newer than what is known of {}", word.tag, word.user), newest, true)?;
        let holds = known.deleted || known.synced_at != Some(word.at) || known.banned;
        same(&format!("the ban {} of {}", word.tag, word.user), holds || !word.banned, true)?;
    }
    for (id, known) in seen.told.users.iter().filter(|(_, known)| known.banned) {
        let newest = |word: &&super::world::Word| {
            &word.user == id && Some(word.at) == known.synced_at && word.banned
        };
        same(&format!("somebody banned {id}"), words.iter().any(|word| newest(&word)), true)?;
    }
    for id in world.deleted.borrow().iter() {
        let gone = seen.told.users.get(id).is_some_and(|user| user.deleted);
        same(&format!("{id}, whose deletion was acknowledged, is gone"), gone, true)?;
    }
    Ok(())
}

/// What a worker says once is recorded once: no call of one has left two events of a kind.
fn attempts(world: &World) -> Checked {
    let seen = world.seen.lock().unwrap();
    for (actor, events) in seen.by_actor.iter().filter(|(actor, _)| actor.starts_with("op-")) {
        let mut kinds = BTreeSet::new();
        for event in events.iter().filter(|event| event.stream.starts_with("job-")) {
            same(&format!("{actor} twice"), kinds.insert(&event.kind), true)?;
        }
    }
    Ok(())
}
