//! Whether a handle on a log over the network can be used at present, or ever again.

use std::sync::{Mutex, OnceLock};

use super::{Error, guard};

/// What a handle and its tasks know of it.
pub(super) struct Condition {
    /// Where the log is, without what is secret in its address.
    place: String,
    /// Why nothing can be written at present.
    away: Mutex<Away>,
    /// Why nothing is written or read any more.
    stopped: OnceLock<String>,
}

#[derive(Default)]
struct Away {
    /// The server does not answer.
    unreached: Option<String>,
    /// It may answer, and yet took no append. That it can be reached says nothing against it.
    refused: Option<String>,
}

/// What the operator is told of.
#[derive(Debug, PartialEq)]
enum News {
    Away(String),
    Back,
}

impl Away {
    fn reason(&self) -> Option<&String> {
        self.unreached.as_ref().or(self.refused.as_ref())
    }
}

impl Condition {
    pub(super) fn new(place: String) -> Self {
        Self { place, away: Mutex::default(), stopped: OnceLock::new() }
    }

    /// Nothing is written or read on this handle any more.
    pub(super) fn stop(&self, reason: &str) -> Error {
        let reason = reason.strip_prefix("T2M_LOG: ").unwrap_or(reason);
        if self.stopped.set(reason.to_owned()).is_ok() {
            tracing::error!(%reason, "the log stops");
        }
        Error::Foreign(format!("T2M_LOG: {reason}"))
    }

    /// The server has lost or exchanged what this node has seen.
    pub(super) fn cut(&self, position: u64) -> Error {
        self.stop(&format!(
            "{} no longer has the event at {position} that was read here: the log was cut or \
             exchanged, as by a restored backup or a failover to a standby that lagged; restore \
             it, or delete the read model and restart to go on with what it has",
            self.place
        ))
    }

    pub(super) fn check_stopped(&self) -> Result<(), Error> {
        self.stopped.get().map_or(Ok(()), |reason| Err(Error::Storage(reason.clone())))
    }

    pub(super) fn is_unwritable(&self) -> bool {
        self.stopped.get().is_some() || guard(&self.away).reason().is_some()
    }

    /// Whether only an append that succeeds, or what comes near to one, shows that it can be written.
    pub(super) fn is_refused(&self) -> bool {
        guard(&self.away).refused.is_some()
    }

    pub(super) fn unwritable(&self) -> Error {
        if let Some(reason) = self.stopped.get() {
            return Error::Unwritable(reason.clone());
        }
        let away = guard(&self.away).reason().cloned();
        Error::Unwritable(away.unwrap_or_else(|| "it is closed".into()))
    }

    /// The server cannot be reached.
    pub(super) fn set_away(&self, why: &str) {
        self.tell(self.change(|away| away.unreached = Some(why.to_owned())));
    }

    /// The server can be reached.
    pub(super) fn set_back(&self) {
        self.tell(self.change(|away| away.unreached = None));
    }

    /// The server took no append in time.
    pub(super) fn set_refused(&self, why: &str) {
        self.tell(self.change(|away| away.refused = Some(why.to_owned())));
    }

    /// The server has taken an append.
    pub(super) fn set_taken(&self) {
        self.tell(self.change(|away| *away = Away::default()));
    }

    /// What of it is news.
    fn change(&self, change: impl FnOnce(&mut Away)) -> Option<News> {
        let mut away = guard(&self.away);
        let before = away.reason().is_some();
        change(&mut away);
        match (before, away.reason()) {
            (false, Some(why)) => Some(News::Away(why.clone())),
            (true, None) => Some(News::Back),
            _ => None,
        }
    }

    fn tell(&self, news: Option<News>) {
        match news {
            Some(News::Away(why)) => {
                tracing::error!(%why, "the log cannot be written at present, {}", self.place);
            }
            Some(News::Back) => tracing::info!("the log can be written again"),
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_operator_is_told_once_when_it_goes_and_once_when_it_is_back() {
        let condition = Condition::new("the database".into());
        let unreached = |why: Option<&str>| {
            let why = why.map(str::to_owned);
            condition.change(|away| away.unreached = why)
        };
        assert_eq!(unreached(None), None);
        assert_eq!(unreached(Some("nobody answers")), Some(News::Away("nobody answers".into())));
        assert_eq!(unreached(Some("still nobody")), None);
        assert_eq!(condition.change(|away| away.refused = Some("read-only".into())), None);
        assert_eq!(unreached(None), None, "it is refused still");
        assert_eq!(condition.change(|away| *away = Away::default()), Some(News::Back));
        assert_eq!(condition.change(|away| *away = Away::default()), None);
    }

    #[test]
    fn who_took_no_append_is_not_back_because_it_answers() {
        let condition = Condition::new("the database".into());
        condition.set_refused("it is read-only");
        condition.set_away("nobody answers");
        assert_eq!(condition.unwritable(), Error::Unwritable("nobody answers".into()));
        condition.set_back();
        assert!(condition.is_unwritable() && condition.is_refused());
        assert_eq!(condition.unwritable(), Error::Unwritable("it is read-only".into()));
        condition.set_taken();
        assert!(!condition.is_unwritable() && !condition.is_refused());
    }

    #[test]
    fn what_is_away_may_come_back_and_what_has_stopped_does_not() {
        let condition = Condition::new("the database".into());
        assert!(!condition.is_unwritable());
        condition.set_away("nobody answers");
        assert!(condition.is_unwritable());
        assert_eq!(condition.unwritable(), Error::Unwritable("nobody answers".into()));
        condition.set_back();
        assert!(!condition.is_unwritable());
        assert_eq!(condition.check_stopped(), Ok(()));
        let told = condition.cut(7).to_string();
        assert!(told.contains("T2M_LOG: the database no longer has the event at 7"), "{told}");
        // The first reason is the one.
        condition.stop("T2M_LOG: it was closed");
        condition.set_back();
        assert!(condition.is_unwritable());
        for said in [condition.check_stopped().unwrap_err(), condition.unwritable()] {
            let said = said.to_string();
            assert!(said.contains("no longer has") && !said.contains("T2M_LOG"), "{said}");
        }
    }
}
