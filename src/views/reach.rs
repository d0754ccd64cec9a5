//! How far views have come, so that nothing takes their place which stands still where they went on.

use std::path::Path;

use rusqlite::{Connection, ErrorCode};

use super::file::{self, Found};
use super::{Error, Parked, Views, checkpoint, parked};

/// Where views are, and what of them stands still.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reach {
    position: u64,
    parked: Vec<Parked>,
}

impl Reach {
    /// Of the views that are called `base`; none where there are none that a server goes on with.
    ///
    /// # Errors
    /// They cannot be read at present.
    pub fn of(base: &Path) -> Result<Option<Self>, Error> {
        let real = file::current(base)?;
        usable(match file::recognise(&real) {
            Ok(Found::Ours) => file::reader(&real).and_then(|sql| Ok(read(&sql)?)),
            Ok(Found::Outdated | Found::Nothing) | Err(Error::Foreign(_)) => return Ok(None),
            Err(error) => Err(error),
        })
    }

    /// The first that stands still in what was `built` and went on here. Where these have not come to
    /// yet they would stand still, too.
    pub(super) fn went_past<'a>(&self, built: &'a [Parked]) -> Option<&'a Parked> {
        let went_on = |fresh: &&Parked| {
            let stands = |it: &Parked| it.view == fresh.view && it.position <= fresh.position;
            fresh.position <= self.position && !self.parked.iter().any(stands)
        };
        built.iter().filter(went_on).min_by_key(|parked| parked.position)
    }
}

impl Views {
    /// As [`Reach::of`] those that are read here.
    ///
    /// # Errors
    /// They cannot be read at present.
    pub fn reach(&self) -> Result<Option<Reach>, Error> {
        usable(self.read(read))
    }
}

fn read(sql: &Connection) -> rusqlite::Result<Reach> {
    // At first: what stands still at this position stands in the table by then.
    let position = checkpoint(sql)?;
    Ok(Reach { position, parked: parked::load(sql)? })
}

/// None of views that are damaged, which only others in their place make good.
fn usable(read: Result<Reach, Error>) -> Result<Option<Reach>, Error> {
    use ErrorCode::{CannotOpen, DatabaseBusy, DatabaseLocked, OutOfMemory};
    match read {
        Err(Error::Sqlite(error)) => match error.sqlite_error_code() {
            Some(CannotOpen | DatabaseBusy | DatabaseLocked | OutOfMemory) => Err(error.into()),
            _ => Ok(None),
        },
        read => read.map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::views::View;

    #[test]
    fn a_view_is_lost_that_stands_still_where_the_present_one_went_on() {
        let parked = |all: &[(View, u64)]| -> Vec<Parked> {
            let one = |&(view, position)| Parked { view, position, reason: String::new() };
            all.iter().map(one).collect()
        };
        let (files, jobs) = (View::Files, View::Jobs);
        for (position, present, built, lost) in [
            (9, &[][..], &[][..], None),
            (9, &[], &[(jobs, 9)], Some((jobs, 9))),
            (9, &[], &[(jobs, 7), (files, 5)], Some((files, 5))),
            // They come to it yet.
            (9, &[], &[(jobs, 10)], None),
            (0, &[], &[(jobs, 1)], None),
            (9, &[(jobs, 7)], &[(jobs, 7)], None),
            (9, &[(jobs, 5)], &[(jobs, 7)], None),
            (9, &[(jobs, 7)], &[(jobs, 5)], Some((jobs, 5))),
            (9, &[(jobs, 7)], &[(jobs, 7), (files, 8)], Some((files, 8))),
            (9, &[(jobs, 7), (files, 3)], &[], None),
        ] {
            let (reach, built) = (Reach { position, parked: parked(present) }, parked(built));
            let found = reach.went_past(&built).map(|parked| (parked.view, parked.position));
            assert_eq!(found, lost, "{reach:?} {built:?}");
        }
    }

    #[test]
    fn views_that_no_server_goes_on_with_have_come_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("views.sqlite");
        assert_eq!(Reach::of(&path).unwrap(), None);
        let views = Views::open(&path).unwrap();
        let begun = Some(Reach { position: 0, parked: vec![] });
        assert_eq!((Reach::of(&path).unwrap(), views.reach().unwrap()), (begun.clone(), begun));
        let change = |sql| Connection::open(&path).unwrap().execute_batch(sql).unwrap();
        change("ALTER TABLE parked RENAME TO damaged");
        assert_eq!((Reach::of(&path).unwrap(), views.reach().unwrap()), (None, None));
        drop(views);
        change("ALTER TABLE damaged RENAME TO parked; PRAGMA user_version = 999");
        assert_eq!(Reach::of(&path).unwrap(), None);
        let foreign = dir.path().join("foreign.sqlite");
        std::fs::write(&foreign, "somebody's letters, longer than a header".repeat(20)).unwrap();
        assert_eq!(Reach::of(&foreign).unwrap(), None);
    }
}
