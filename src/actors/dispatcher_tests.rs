//! Leases that are renewed, and machines that cannot work.

use std::future;

use chrono::TimeDelta;

use super::*;
use crate::actors::leasing::tests::World;
use crate::domain::job::LEASE;

fn rendering(world: &World) -> Rendering {
    Rendering {
        engine: Engine::Storyboard { threads: 1 },
        kind: Kind::Video,
        leasing: Arc::clone(&world.leasing),
        blobs: Arc::new(world.blobs.clone()),
        secrets: Secrets::new(world.vault()),
        scratch: PathBuf::new(),
        slots: 1,
    }
}

#[actix::test]
async fn a_lease_is_renewed_for_as_long_as_files_are_moved_and_its_loss_ends_that() {
    let world = World::new().await;
    let (rendering, id) = (rendering(&world), world.ask("ada").await);
    let leased = world.lease("w").await;
    let first_end = leased.expires_at;
    world.pass(LEASE - TimeDelta::seconds(1)).await;
    let renewed = async {
        let look = || world.leasing.look(id, leased.lease_id);
        while look().await.is_ok_and(|report| report.expires_at == first_end) {
            tokio::task::yield_now().await;
        }
        Ok(())
    };
    assert!(while_held(&rendering, &leased, renewed).await.is_ok());
    world.pass(TimeDelta::seconds(1)).await;
    assert!(world.leasing.look(id, leased.lease_id).await.is_ok(), "its first end has passed");
    world.pass(LEASE).await;
    let lost = while_held(&rendering, &leased, future::pending::<Result<(), _>>()).await;
    assert!(matches!(lost, Err(Broken::LeaseLost)));
}

#[actix::test]
async fn what_a_machine_without_a_scratch_directory_leases_is_no_attempt_and_it_pauses() {
    let (world, file) = (World::new().await, tempfile::NamedTempFile::new().unwrap());
    let rendering = Rendering { scratch: file.path().to_owned(), ..rendering(&world) };
    let (id, pause) = (world.ask("ada").await, Pause::default());
    let (_stop, stopping) = watch::channel(false);
    let leased = world.lease("w").await;
    work(&world.system, &rendering, &leased, &pause, stopping).await;
    let job = world.system.views.job(&id).unwrap().unwrap();
    assert_eq!((job.state.as_str(), job.attempt), ("queued", 0));
    assert!(pause.left().is_some());
}
