//! What is asked of the nodes and what befalls them, drawn from the seed.

use std::rc::Rc;
use std::time::Duration;

use chrono::{DateTime, TimeDelta};
use object_store::ObjectStoreExt;
use object_store::path::Path;
use sha2::{Digest, Sha256};
use t2m::actors::entity::Failure;
use t2m::actors::leasing::{Completed, Error as LeasingError, Leased, Shape, by};
use t2m::actors::outputs::{Handed, slots};
use t2m::actors::timekeeper;
use t2m::config::Secret;
use t2m::domain::file::{self, File, Stored};
use t2m::domain::ids::{FileId, JobId, SessionId, UserId, derived_id};
use t2m::domain::job::{
    self, AspectRatio, Job, Kind, Options, Quality, Refusal, Request, VideoOptions,
};
use t2m::domain::session::{self, EndReason, Session};
use t2m::domain::text::{Personal, Prompt};
use t2m::domain::tier::Tier;
use t2m::domain::translation::{DEFAULT_SEGMENT_SIZE, Format, TranslationOptions};
use t2m::domain::user::{self, Profile, Snapshot, Told, User};

use super::dice::Dice;
use super::node::{Node, lose_views};
use super::rules::Phase;
use super::world::{NODES, PERSONAL, Word, World};

const USERS: [&str; 5] = ["ada", "bob", "cyd", "dan", "eve"];
/// When the first word of Clerk's was true.
const CLERK: i64 = 1_799_990_000;

/// One thing happens.
pub async fn step(world: &Rc<World>, dice: &mut Dice) {
    let index = usize::try_from(dice.below(NODES as u64)).unwrap();
    let node = world.node(index);
    match dice.below(100) {
        0..=9 => of_user(world, &node, dice),
        10..=21 => of_session(world, &node, dice),
        22..=31 => of_file(world, &node, dice),
        32..=43 => request(world, &node, dice),
        44..=48 => of_job(world, &node, dice),
        49..=58 => lease(world, &node, dice),
        59..=78 => work(world, &node, dice),
        79..=88 => look(world, &node, dice),
        89..=90 => world.hang_up(dice),
        91..=92 => calamity(world, index, dice),
        93 => skew(world, index, dice),
        _ => {
            world.pass(TimeDelta::seconds(i64::try_from(dice.below(90)).unwrap()));
            tokio::time::sleep(Duration::from_millis(dice.below(2500))).await;
        }
    }
    // Often the next thing is asked before this one is answered.
    for _ in 0..dice.below(6) {
        tokio::task::yield_now().await;
    }
    tokio::time::sleep(Duration::from_millis(dice.below(12))).await;
    world.pass(TimeDelta::milliseconds(i64::try_from(dice.below(3000)).unwrap()));
    if world.node(index).log.is_broken() && dice.percent(25) {
        world.restart(index, || {});
    }
}

fn user_of(dice: &mut Dice) -> UserId {
    UserId::try_from((*dice.pick(&USERS).unwrap()).to_owned()).unwrap()
}

fn personal(user: &UserId, what: u64) -> String {
    // The dot keeps one name from being part of another's.
    format!("{PERSONAL}{user}. {what}")
}

fn of_user(world: &Rc<World>, node: &Rc<Node>, dice: &mut Dice) {
    let user = user_of(dice);
    let at = DateTime::from_timestamp(CLERK + i64::try_from(dice.below(60)).unwrap(), 0).unwrap();
    let email = Some(Personal::Known(personal(&user, dice.below(9))));
    let first_name = Some(Personal::Known(personal(&user, dice.below(9))));
    let tier = ["standard", "premium", "enterprise"][usize::try_from(dice.below(3)).unwrap()];
    let snapshot = Snapshot {
        profile: Profile { email, first_name, ..Profile::default() },
        told: Told { subscription_tier: Some(tier.to_owned()), ..Told::default() },
        banned: dice.percent(15),
    };
    let banned = snapshot.banned;
    let command = match dice.below(20) {
        0..=12 => user::Command::Sync { snapshot, source_updated_at: at },
        13..=15 => user::Command::Provision(snapshot.into()),
        16 | 17 => user::Command::SetAccess(user::AccessChange {
            role: Some(format!("role {}", dice.below(3))),
            ..user::AccessChange::default()
        }),
        18 => user::Command::SetFlags([("new".to_owned(), dice.percent(50))].into()),
        _ => user::Command::Delete,
    };
    // Clerk delivers at least once, and to any node.
    let times = 1 + dice.below(2);
    for time in 0..times {
        let node = if time == 0 { Rc::clone(node) } else { other(world, node) };
        let (world_, user, command) = (Rc::clone(world), user.to_string(), command.clone());
        let word = matches!(command, user::Command::Sync { .. });
        let what = format!("{command:?} of {user}");
        let asking = node.clone();
        world.spawn(&node, what, async move {
            let (tag, deletes) = (world_.tag(), matches!(command, user::Command::Delete));
            if word {
                let (tag, user) = (tag.clone(), user.clone());
                let word = Word { tag, user, at, banned, acknowledged: false };
                world_.words.borrow_mut().push(word);
            }
            let stream = format!("user-{user}");
            let told =
                world_.asks::<User>(&asking, tag.clone(), stream, user.clone(), command, false);
            if told.await.is_ok() {
                if deletes {
                    world_.deleted.borrow_mut().insert(user);
                }
                let mut words = world_.words.borrow_mut();
                words
                    .iter_mut()
                    .filter(|word| word.tag == tag)
                    .for_each(|it| it.acknowledged = true);
            }
        });
    }
}

fn other(world: &World, node: &Node) -> Rc<Node> {
    world.node((node.index + 1) % NODES)
}

fn of_session(world: &Rc<World>, node: &Rc<Node>, dice: &mut Dice) {
    let user_id = user_of(dice);
    let id = SessionId::try_from(format!("sess_{user_id}_{}", dice.below(6))).unwrap();
    let now = node.system.clock.now();
    let command = match dice.below(20) {
        0..=8 => session::Command::Start {
            started_at: now - TimeDelta::seconds(i64::try_from(dice.below(120)).unwrap()),
            expires_at: dice.percent(20).then(|| now + TimeDelta::hours(1)),
            ip_address: Some(personal(&user_id, 1)),
            user_agent: dice.percent(50).then(|| personal(&user_id, 2)),
            user_id,
        },
        9..=14 => session::Command::Touch,
        15 | 16 => session::Command::Remember { remember_me: dice.percent(60) },
        17 => session::Command::Lapse,
        _ => session::Command::End {
            reason: *dice.pick(&[EndReason::SignedOut, EndReason::Revoked]).unwrap(),
        },
    };
    let (world_, asked) = (Rc::clone(world), Rc::clone(node));
    world.spawn(node, format!("{command:?} of {id}"), async move {
        let _ = world_.ask::<Session>(&asked, id.to_string(), command, false).await;
    });
}

/// The bytes of an upload or an output, durable in the store under their hash.
async fn blob(world: &World, content: u64) -> Result<String, object_store::Error> {
    let bytes = format!("content {content}").into_bytes();
    let sha256 = hex::encode(Sha256::digest(&bytes));
    let place = Path::from(format!("sha256/{}/{sha256}", &sha256[..2]));
    world.store.put(&place, bytes.into()).await?;
    Ok(sha256)
}

fn of_file(world: &Rc<World>, node: &Rc<Node>, dice: &mut Dice) {
    let (user_id, content) = (user_of(dice), dice.below(6));
    let (world_, asked) = (Rc::clone(world), Rc::clone(node));
    if dice.percent(60) {
        let key = dice.below(8);
        let (keyed, filename) = (dice.percent(60), personal(&user_id, key));
        let derived = FileId(derived_id(&user_id, "file", &key.to_string()));
        let id = if keyed { derived } else { FileId(node.system.clock.fresh_id()) };
        world.spawn(node, format!("{user_id} stores {content} as {id}"), async move {
            let Ok(sha256) = blob(&world_, content).await else { return };
            let command = file::Command::Store(Stored {
                user_id,
                filename: Personal::Known(filename),
                content_type: "text/plain".to_owned(),
                size: content + 1,
                sha256,
                metadata: Personal::default(),
                job_id: None,
                fingerprint: keyed.then(|| content.to_string()),
            });
            let _ = world_.ask::<File>(&asked, id.to_string(), command, !keyed).await;
        });
        return;
    }
    let Ok(page) = node.system.views.files(&user_id, None, 20) else { return };
    let Some(file) = dice.pick(&page.items) else { return };
    let id = file.file_id;
    let by = if dice.percent(90) { user_id } else { user_of(dice) };
    world.spawn(node, format!("{by} deletes {id}"), async move {
        let command = file::Command::Delete { by };
        let _ = world_.ask::<File>(&asked, id.to_string(), command, false).await;
    });
}

fn request(world: &Rc<World>, node: &Rc<Node>, dice: &mut Dice) {
    let (user_id, key) = (user_of(dice), dice.below(5));
    let now = node.system.clock.now();
    let keyed = dice.percent(50);
    let derived = JobId(derived_id(&user_id, "job", &key.to_string()));
    let id = if keyed { derived } else { JobId(node.system.clock.fresh_id()) };
    let secret = dice.percent(25);
    let options = if secret || dice.percent(20) {
        Options::Translation(TranslationOptions {
            source_file_id: FileId(derived_id(&user_id, "file", "0")),
            format: Format::Text,
            source_language: None,
            target_language: None,
            model_name: "m".to_owned(),
            style_data: Some(Personal::Known(personal(&user_id, 3))),
            segment_size: DEFAULT_SEGMENT_SIZE,
            has_api_key: secret,
        })
    } else {
        Options::Video(VideoOptions {
            duration: 1,
            quality: Quality::P480,
            aspect_ratio: AspectRatio::Square,
            style: None,
            seed: 1,
            engine: None,
            source_file_id: None,
        })
    };
    let minutes = i64::try_from(dice.below(30)).unwrap();
    let request = Request {
        kind: options.kind(),
        prompt: Personal::Known(Prompt::parse(&personal(&user_id, key)).unwrap()),
        options,
        tier: *dice.pick(&Tier::ALL).unwrap(),
        batch: dice.percent(20),
        fingerprint: keyed.then(|| format!("{}", dice.below(3))),
        callback_url: dice.percent(10).then(|| Personal::Known(personal(&user_id, 4))),
        deadline: dice.percent(15).then(|| now + TimeDelta::minutes(minutes)),
        user_id,
    };
    let twice = keyed && dice.percent(30);
    for time in 0..=u64::from(twice) {
        let node = if time == 0 { Rc::clone(node) } else { other(world, node) };
        let (world_, asked, request) = (Rc::clone(world), Rc::clone(&node), request.clone());
        world.spawn(&node, format!("a request of {}: {id}", request.user_id), async move {
            let sealed = request.options.needs_secret();
            if sealed {
                let kept = asked.secrets.keep(id, &Secret::from("sesame".to_owned())).await;
                if kept.is_err() {
                    return;
                }
            }
            let command = job::Command::Request(request);
            let done = world_.ask::<Job>(&asked, id.to_string(), command, !keyed).await;
            // One whose job was there before may have come after that job's end.
            if sealed && done.is_ok_and(|done| !done.events.is_empty()) {
                world_.secrets.borrow_mut().insert(id.to_string());
            }
        });
    }
}

fn of_job(world: &Rc<World>, node: &Rc<Node>, dice: &mut Dice) {
    let jobs: Vec<(String, String)> = {
        let told = &world.seen.lock().unwrap().told;
        told.jobs.iter().map(|(id, job)| (id.clone(), job.user.clone())).collect()
    };
    let Some((id, user)) = dice.pick(&jobs).cloned() else { return };
    let owner = UserId::try_from(user).unwrap();
    let by = if dice.percent(90) { owner } else { user_of(dice) };
    let command = match dice.below(10) {
        0..=3 => job::Command::Cancel { by },
        4..=7 => job::Command::Retry { by },
        8 => job::Command::Lapse,
        _ => job::Command::Look,
    };
    let (world_, asked) = (Rc::clone(world), Rc::clone(node));
    world.spawn(node, format!("{command:?} of {id}"), async move {
        let _ = world_.ask::<Job>(&asked, id, command, false).await;
    });
}

fn lease(world: &Rc<World>, node: &Rc<Node>, dice: &mut Dice) {
    let (world_, asked) = (Rc::clone(world), Rc::clone(node));
    let kinds = if dice.percent(70) { &Kind::ALL[..] } else { &Kind::ALL[..1] };
    let tag = world.tag();
    world.spawn(node, format!("{tag} wants a job"), async move {
        let answer = asked.leasing.lease(&by(&tag), kinds, |_| false).await;
        let leases: Vec<_> = own(&world_, &tag).into_iter().map(|event| event.stream).collect();
        let shown = match &answer {
            Ok(Some(leased)) => format!("gets {} by {}", leased.job_id, leased.lease_id.0),
            Ok(None) => "gets nothing".to_owned(),
            Err(error) => error.to_string(),
        };
        world_.trace(format!("  {tag} {shown}"));
        let right = match &answer {
            Ok(Some(leased)) => *leases == [format!("job-{}", leased.job_id)],
            Ok(None) => leases.is_empty(),
            Err(error) => is_unknown(error) || leases.is_empty(),
        };
        if !right {
            world_.fail(format!("{tag} {shown}, and has leased {leases:?}"));
        }
        if let Ok(Some(leased)) = answer {
            world_.count("leased");
            let mut attempts = world_.attempts.borrow_mut();
            attempts.push(leased);
            // The oldest workers die.
            if attempts.len() > 12 {
                attempts.remove(0);
            }
        }
    });
}

fn own(world: &World, tag: &str) -> Vec<t2m::log::Recorded> {
    let seen = world.seen.lock().unwrap();
    let own = seen.by_actor.get(tag).into_iter().flatten();
    own.filter(|event| event.stream.starts_with("job-")).cloned().collect()
}

fn is_unknown(error: &LeasingError) -> bool {
    matches!(error, LeasingError::Job(Failure::Unavailable(_)))
}

fn is_lost(error: &LeasingError) -> bool {
    matches!(error, LeasingError::Job(Failure::Refused(Refusal::LeaseLost)))
}

/// A worker does something, at any node; also one whose lease is long lost.
fn work(world: &Rc<World>, node: &Rc<Node>, dice: &mut Dice) {
    let attempts = world.attempts.borrow().clone();
    // Mostly one that was taken just now.
    let oldest = if dice.percent(60) { attempts.len().saturating_sub(3) } else { 0 };
    let Some(leased) = dice.pick(&attempts[oldest..]).cloned() else { return };
    let (world_, asked, tag) = (Rc::clone(world), Rc::clone(node), world.tag());
    let (what, content) = (dice.below(10), dice.below(6));
    let percent = u8::try_from(dice.below(101)).unwrap();
    let name = ["reports", "reports", "reports", "hands in", "hands in", "hands in", "completes"];
    let named = name.get(usize::try_from(what).unwrap()).copied();
    let named = named.unwrap_or(if what < 9 { "completes" } else { "fails" });
    let label = format!("{tag} {named} {} under {}", leased.job_id, leased.lease_id.0);
    world.spawn(node, label, async move {
        let held_before = is_held(&world_, &leased);
        let Leased { job_id, lease_id, .. } = leased;
        let answer = match what {
            0..=2 => asked
                .leasing
                .progress(job_id, lease_id, &by(&tag), percent, None)
                .await
                .map(|done| if done.outcome.cancelled { "to stop" } else { "noted" }),
            3..=5 => hand_in(&world_, &asked, &leased, content).await,
            6..=8 => {
                if content > 2 {
                    let _ = hand_in(&world_, &asked, &leased, content).await;
                }
                let shape = |_: &_| Shape { duration: Some(1.0), ..Shape::default() };
                let done = asked.leasing.complete(job_id, lease_id, &by(&tag), shape).await;
                done.map(|done| match done.outcome {
                    Completed::Done(_) => "completed",
                    Completed::Cancelled => "cancelled",
                })
            }
            _ => {
                let (error, retryable) = ("engine: x".to_owned(), content > 1);
                let done = asked.leasing.fail(job_id, lease_id, &by(&tag), error, retryable).await;
                done.map(|done| done.outcome)
            }
        };
        let shown = answer.as_ref().map_or_else(ToString::to_string, |it| (*it).to_owned());
        world_.trace(format!("  {tag}: {shown}"));
        let own: Vec<_> = own(&world_, &tag).iter().map(|event| event.kind.clone()).collect();
        let wrote = |kind: &str| own.iter().any(|it| **it == *kind);
        let right = match (&answer, what) {
            (Ok("noted"), _) => wrote("job.progressed.v1"),
            (Ok("to stop"), _) => own.is_empty(),
            (Ok("handed in"), _) => held_before && own.is_empty(),
            (Ok("completed"), _) => completed_by(&world_, &leased),
            (Ok("cancelled"), _) => wrote("job.cancelled.v1"),
            (Ok(_), _) => {
                wrote("job.attempt_failed.v1") || wrote("job.cancelled.v1") || own.is_empty()
            }
            (Err(error), what) if is_lost(error) => {
                let spoilt = (6..=8).contains(&what) && output_is_spoilt(&world_, &leased);
                own.is_empty() && (spoilt || !is_held(&world_, &leased))
            }
            (Err(error), _) => is_unknown(error) || own.is_empty(),
        };
        if matches!(&answer, Err(error) if is_lost(error)) {
            world_.count("lease lost");
        }
        match answer {
            Ok("completed") => world_.count("completed"),
            Ok("to stop") => world_.count("told to stop"),
            _ => {}
        }
        if !right {
            world_
                .fail(format!("{tag} on {job_id} under {lease_id:?}: {shown}, and wrote {own:?}"));
        }
    });
}

async fn hand_in(
    world: &World,
    node: &Node,
    leased: &Leased,
    content: u64,
) -> Result<&'static str, LeasingError> {
    let Ok(sha256) = blob(world, content).await else { return Ok("nothing handed in") };
    let slot = &slots(leased.request.kind)[0];
    let content_type = match leased.request.kind {
        Kind::Video => "video/mp4",
        Kind::Translation => "text/plain",
    };
    let handed = Handed { content_type: content_type.to_owned(), size: content + 1, sha256 };
    world.handed.borrow_mut().insert((leased.lease_id, handed.sha256.clone()));
    node.leasing.hand_in(leased.job_id, leased.lease_id, slot, &handed).await?;
    Ok("handed in")
}

fn is_held(world: &World, leased: &Leased) -> bool {
    let told = &world.seen.lock().unwrap().told;
    let job = told.jobs.get(&leased.job_id.to_string());
    job.and_then(|job| job.held_by()) == Some(&*leased.lease_id.0.to_string())
}

/// A completion under this lease broke off between the file and the job. What was stored then was
/// deleted by its user since, or other bytes were handed in: then the lease is of no use.
fn output_is_spoilt(world: &World, leased: &Leased) -> bool {
    let (request, lease_id) = (&leased.request, leased.lease_id);
    let main = slots(request.kind)[0].name;
    let file = derived_id(&request.user_id, main, &lease_id.0.to_string());
    let told = &world.seen.lock().unwrap().told;
    let Some(file) = told.files.get(&file.to_string()) else { return false };
    let handed = world.handed.borrow();
    let others =
        || handed.iter().any(|(lease, sha256)| *lease == lease_id && *sha256 != file.sha256);
    file.deleted || others()
}

fn completed_by(world: &World, leased: &Leased) -> bool {
    let told = &world.seen.lock().unwrap().told;
    let job = told.jobs.get(&leased.job_id.to_string());
    job.is_some_and(|job| {
        matches!(&job.phase, Phase::Completed { lease, .. } if *lease == leased.lease_id.0.to_string())
    })
}

fn look(world: &Rc<World>, node: &Rc<Node>, dice: &mut Dice) {
    let (asked, who) = (Rc::clone(node), dice.below(9));
    let name = ["timekeeper", "eraser", "secrets", "storekeeper", "reconciliation"];
    let named = name[usize::try_from(who.saturating_sub(4)).unwrap()];
    world.spawn(node, format!("{named} looks"), async move {
        // What fails is done at the next look.
        match who {
            0..=4 => drop(timekeeper::look(&asked.system).await),
            5 => drop(asked.eraser.lock().await.look().await),
            6 => drop(asked.secrets.look(&asked.system).await),
            7 => drop(asked.keeper.look().await),
            _ => drop(asked.keeper.reconcile().await),
        }
    });
}

fn calamity(world: &Rc<World>, index: usize, dice: &mut Dice) {
    match dice.below(4) {
        0 | 1 => world.restart(index, || {}),
        2 => {
            world.count("views lost");
            world.restart(index, || lose_views(world.dir.path(), index));
        }
        _ => {
            let (node, world_) = (world.node(index), Rc::clone(world));
            let rebuilding = Rc::clone(&node);
            world.spawn(&node, "views are rebuilt".to_owned(), async move {
                if rebuilding.rebuild().await.is_ok() {
                    world_.count("views rebuilt");
                }
            });
        }
    }
}

/// One node's clock is set: by minutes, forwards or backwards.
fn skew(world: &World, index: usize, dice: &mut Dice) {
    let seconds = i64::try_from(dice.below(600)).unwrap() - 300;
    world.trace(format!("node {index}'s clock moves by {seconds} s"));
    world.watches[index].advance(TimeDelta::seconds(seconds));
}

/// Time that nobody has watched: sessions end, leases run out, outputs grow old.
pub fn leap(world: &World, dice: &mut Dice) {
    let hours = [1, 7, 24, 8 * 24, 31 * 24][usize::try_from(dice.below(5)).unwrap()];
    world.trace(format!("{hours} hours pass"));
    world.pass(TimeDelta::hours(hours));
}
