//! The read model is opened for one log: that which it was computed from, or it begins anew.

use std::path::Path;

use anyhow::{Context, bail};

use super::log::Which;
use crate::actors::standing::{self, Standing};
use crate::log::EventLog;
use crate::views::{Views, discard};

/// What lies beside the read model and says how far something is in the log, or names positions.
const OF_THIS_LOG: [&str; 3] = ["clerk-sync-position", "callbacks-position", "views.skipped"];

/// Opens the read model beside `log`. If it is of another log, it is thrown away, so that it is
/// computed anew; if it has seen what the log no longer has, that is an error.
///
/// # Errors
/// In one sentence that names the setting.
pub async fn open_views(log: &dyn EventLog, which: &Which) -> anyhow::Result<Views> {
    let path = which.data_dir.join("views.sqlite");
    let views = Views::open(&path).context("opening the read model")?;
    let seen = views.seen().context("reading the read model")?;
    let standing = standing::of(log, &seen).await.context("reading the log")?;
    let (log, dir) = (which.shown(), which.data_dir.display());
    let position = seen.position;
    match standing {
        Standing::Same => Ok(views),
        Standing::Another => {
            tracing::warn!(
                "T2M_LOG names another log, {log}, than the read model in {dir} was computed \
                 from: it is thrown away and computed anew"
            );
            drop(views);
            set_aside(&which.data_dir)?;
            discard(&path).context("removing the read model of another log")?;
            Views::open(&path).context("opening the read model")
        }
        Standing::Empty => bail!(
            "T2M_LOG: the log {log} is empty, but the read model in {dir} has seen {position} of \
             another: name that one, bring its events here with `t2m log copy` or `import`, or \
             delete the views in {dir} to begin with nothing"
        ),
        Standing::Cut { head } => bail!(
            "T2M_LOG: the log {log} ends at {head}, but its read model in {dir} has seen \
             {position}: the log was cut or exchanged; restore it, or delete the views in {dir} \
             to build them from what is left"
        ),
        Standing::Parted => bail!(
            "T2M_LOG: the log {log} has another event at {position} than its read model in {dir} \
             has seen there: it was cut, as by an older backup, and has gone on since; restore \
             it, or delete the views in {dir} to build them from what there is"
        ),
    }
}

/// Positions of one log say nothing of another. What follows the log begins at its start then, which
/// tells nobody anything twice.
pub fn set_aside(data_dir: &Path) -> anyhow::Result<()> {
    for name in OF_THIS_LOG {
        let (path, aside) = (data_dir.join(name), data_dir.join(format!("{name}.of-another-log")));
        match std::fs::rename(&path, &aside) {
            Ok(()) => tracing::warn!(path = %aside.display(), "positions of the other log"),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => {
                return Err(error).with_context(|| format!("setting {} aside", path.display()));
            }
        }
    }
    Ok(())
}
