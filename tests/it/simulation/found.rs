//! What seeds have found, each told as shortly as it can be.

use std::rc::Rc;

use chrono::TimeDelta;
use t2m::actors::leasing::by;
use t2m::config::Secret;
use t2m::domain::ids::{FileId, JobId, UserId};
use t2m::domain::job::{Command, Job, Kind, Options, Request};
use t2m::domain::text::{Personal, Prompt};
use t2m::domain::tier::Tier;
use t2m::domain::translation::{DEFAULT_SEGMENT_SIZE, Format, TranslationOptions};
use uuid::Uuid;

use super::node::lose_views;
use super::on_one_thread;
use super::world::World;

const JOB: JobId = JobId(Uuid::from_u128(7));

/// Two nodes, and nothing goes wrong but what the test brings about.
fn quietly(test: impl AsyncFnOnce(Rc<World>)) {
    on_one_thread(async {
        let world = World::new(0);
        world.storage.faults.calm(true);
        world.store.faults.calm(true);
        test(Rc::clone(&world)).await;
        assert_eq!(world.seen.lock().unwrap().wrong, None);
    });
}

/// A translation with a secret, asked for at one node.
async fn requested(world: &World, index: usize) {
    let node = world.node(index);
    node.secrets.keep(JOB, &Secret::from("sesame".to_owned())).await.unwrap();
    let request = Request {
        user_id: UserId::try_from("ada".to_owned()).unwrap(),
        kind: Kind::Translation,
        prompt: Personal::Known(Prompt::parse("a text").unwrap()),
        options: Options::Translation(TranslationOptions {
            source_file_id: FileId(Uuid::from_u128(8)),
            format: Format::Text,
            source_language: None,
            target_language: None,
            model_name: "m".to_owned(),
            style_data: None,
            segment_size: DEFAULT_SEGMENT_SIZE,
            has_api_key: true,
        }),
        tier: Tier::Standard,
        batch: false,
        fingerprint: None,
        callback_url: None,
        deadline: None,
    };
    let command = Command::Request(request);
    world.ask::<Job>(&node, JOB.to_string(), command, true).await.unwrap();
    world.rest().await;
}

#[test]
fn a_node_answers_by_what_another_one_has_written() {
    quietly(async |world| {
        // The entity lives at the first node from here on.
        requested(&world, 0).await;
        let leased = world.node(1).leasing.lease(&by("w"), &Kind::ALL, |_| false).await;
        let lease_id = leased.unwrap().expect("a job waits").lease_id;
        let request = world.node(0).leasing.hold(JOB, lease_id).await;
        request.expect("the lease is held, and the first node says so");
    });
}

#[test]
fn no_secret_is_lost_while_views_are_begun_anew() {
    quietly(async |world| {
        requested(&world, 0).await;
        world.pass(TimeDelta::days(2));
        world.restart(0, || lose_views(world.dir.path(), 0));
        let node = world.node(0);
        assert_eq!(node.system.views.checkpoint(), 0);
        node.secrets.look(&node.system).await.unwrap();
        assert!(world.store.holds(&format!("secrets/job-{JOB}")).await);
    });
}
