//! The read model is opened for one log: that which it was computed from, or it begins anew.

use anyhow::{Context, bail};

use super::layout;
use super::log::Which;
use crate::actors::standing::{self, Standing};
use crate::log::EventLog;
use crate::views::{self, Seen, Views, discard};

/// Opens the read model beside `log`. If it is of another log, it is thrown away, so that it is
/// computed anew; if it has seen what the log no longer has, that is an error.
///
/// # Errors
/// In one sentence that names the setting.
pub async fn open_views(log: &dyn EventLog, which: &Which) -> anyhow::Result<Views> {
    let path = which.data_dir.join(layout::VIEWS);
    // Before they are opened, which throws away those of an older version.
    let seen = match Seen::of(&path) {
        Err(views::Error::Outdated(_)) => None,
        seen => seen.context("opening the read model")?,
    };
    if let Some(seen) = seen {
        let standing = standing::of(log, &seen).await.context("reading the log")?;
        ensure_no_loss(standing, &seen, which)?;
        if standing != Standing::Same {
            set_aside(standing, &seen, which)?;
            discard(&path).context("removing the read model of another log")?;
        }
    }
    Views::open(&path).context("opening the read model")
}

/// Refuses a log that lacks what the read model has seen of it: an acknowledged event is missing, or
/// the setting is wrong.
///
/// # Errors
/// In one sentence that names the setting.
pub fn ensure_no_loss(standing: Standing, seen: &Seen, which: &Which) -> anyhow::Result<()> {
    let (log, dir) = (which.shown(), which.data_dir.display());
    let position = seen.position;
    match standing {
        Standing::Same | Standing::Another => Ok(()),
        Standing::Empty => bail!(
            "T2M_LOG: the log {log} is empty, but the read model in {dir} has seen {position} of \
             another: name that one, bring its events here with `t2m log copy` or `import`, or \
             begin with nothing by `t2m replay --from-what-is-left`"
        ),
        Standing::Cut { head } => bail!(
            "T2M_LOG: the log {log} ends at {head}, but its read model in {dir} has seen \
             {position}: the log was cut or exchanged; restore it, or go on from what is left by \
             `t2m replay --from-what-is-left`"
        ),
        Standing::Parted => bail!(
            "T2M_LOG: the log {log} has another event at {position} than its read model in {dir} \
             has seen there: it was cut, as by an older backup, and has gone on since; restore \
             it, or go on from what there is by `t2m replay --from-what-is-left`"
        ),
    }
}

/// Says that the read model is not of this log, and sees to it that nothing else counts positions of
/// the other one, which say nothing of this. What follows the log begins at its start then: of
/// callbacks the store knows which were sent, and Clerk is told nothing that it has.
///
/// # Errors
/// One of the files stays where it is.
pub fn set_aside(standing: Standing, seen: &Seen, which: &Which) -> anyhow::Result<()> {
    let (log, dir) = (which.shown(), &which.data_dir);
    let shown = dir.display();
    match standing {
        Standing::Same => return Ok(()),
        Standing::Another => tracing::warn!(
            "T2M_LOG names another log, {log}, than the read model in {shown} was computed from: it \
             is thrown away and computed anew"
        ),
        Standing::Empty | Standing::Cut { .. } | Standing::Parted => tracing::warn!(
            "the log {log} lacks what the read model in {shown} has seen up to {}: it is computed \
             anew from what is left",
            seen.position
        ),
    }
    for name in layout::POSITIONS {
        let (path, aside) = (dir.join(name), dir.join(format!("{name}.of-another-log")));
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
