//! `t2m state`: one entity as the log has it, now or as it was, and what each event changed of it.

use anyhow::{Context, bail};
use clap::Args;
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::keys::Place;
use super::point::{self, By, Point};
use super::say;
use crate::actors::codec;
use crate::actors::keyring::Keyring;
use crate::actors::records::Envelope;
use crate::domain::Aggregate;
use crate::domain::file::File;
use crate::domain::job::Job;
use crate::domain::session::Session;
use crate::domain::user::User;
use crate::log::{self, EventLog, Recorded};

const PAGE: usize = 500;

#[derive(Args)]
pub struct State {
    /// The entity's stream, such as `job-0198…` or `user-user_…`
    #[arg(value_name = "STREAM")]
    stream: String,
    /// As it was after a position of the log, or at a time (RFC 3339)
    #[arg(long, value_name = "POSITION|TIME", value_parser = point::parse)]
    at: Option<Point>,
    #[command(flatten)]
    place: Place,
    /// JSON instead of text
    #[arg(long)]
    json: bool,
}

/// An event, and what it did to the state.
struct Step {
    event: Recorded,
    changes: Vec<Change>,
}

/// What is to be shown.
struct Shown {
    state: Value,
    steps: Vec<Step>,
    /// Why it ends there.
    unreadable: Option<Unreadable>,
}

/// The first event that is lacking: neither it nor what follows has done anything to the state.
#[derive(Debug, PartialEq, Serialize)]
struct Unreadable {
    position: u64,
    reason: String,
}

/// One field that has another value now; absent on a side where there is no such field.
#[derive(Debug, PartialEq, Serialize)]
struct Change {
    /// JSON pointer (RFC 6901) into the state.
    field: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    before: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    after: Option<Value>,
}

impl State {
    pub fn run(self) -> anyhow::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let log = self.place.log.open_for_reading().await?;
            let head = *log.head().borrow();
            let shown = self.look(&*log).await?;
            match self.json {
                true => print_json(&self.stream, &shown, head),
                false => print(&self.stream, &shown, head),
            }
            if let Some(Unreadable { position, reason }) = shown.unreadable {
                bail!(
                    "the event at position {position} cannot be read, and what is shown was before \
                     it: {reason}"
                );
            }
            Ok(())
        })
    }

    async fn look(&self, log: &dyn EventLog) -> anyhow::Result<Shown> {
        let (events, damage) = self.events(log).await?;
        let keyring = self.place.open_for_reading()?.keyring();
        let mut shown = match codec::category(&self.stream) {
            User::CATEGORY => fold::<User>(&keyring, events).await?,
            Session::CATEGORY => fold::<Session>(&keyring, events).await?,
            File::CATEGORY => fold::<File>(&keyring, events).await?,
            Job::CATEGORY => fold::<Job>(&keyring, events).await?,
            _ => bail!("the stream {} belongs to no entity of this version", self.stream),
        };
        shown.unreadable = shown.unreadable.or(damage);
        Ok(shown)
    }

    /// As far as is asked for, or up to where the log is damaged.
    async fn events(
        &self,
        log: &dyn EventLog,
    ) -> anyhow::Result<(Vec<Recorded>, Option<Unreadable>)> {
        let (mut events, damage) = self.whole(log).await?;
        let began = match (events.first(), &damage) {
            (Some(first), _) => format!("{}, {}", first.position, first.time.to_rfc3339()),
            (None, Some(damage)) => damage.position.to_string(),
            (None, None) => {
                bail!("the log {} has no stream {}", self.place.log.shown(), self.stream)
            }
        };
        let upto = match self.at {
            None => return Ok((events, damage)),
            Some(Point::Position(position)) => position,
            Some(Point::Time(time)) => {
                let mut by = By::new(time);
                events.iter().for_each(|event| by.see(event));
                by.warn();
                match &damage {
                    // When the damaged one happened nobody knows.
                    Some(_) if !by.is_past() => u64::MAX,
                    Some(Unreadable { reason, .. }) => {
                        eprintln!("{reason}; what follows is not searched for events of that time");
                        by.position()
                    }
                    None => by.position(),
                }
            }
        };
        events.truncate(events.partition_point(|event| event.position <= upto));
        let damage = damage.filter(|damage| damage.position <= upto);
        if events.is_empty() && damage.is_none() {
            bail!("{} began only at position {began}", self.stream);
        }
        Ok((events, damage))
    }

    /// All of the stream, or what lies before the damage. A page that holds one is not given at all, so
    /// that events are read one by one then.
    async fn whole(
        &self,
        log: &dyn EventLog,
    ) -> anyhow::Result<(Vec<Recorded>, Option<Unreadable>)> {
        let (mut events, mut limit) = (Vec::new(), PAGE);
        loop {
            let from = events.len() as u64;
            match log.read_stream(&self.stream, from, limit).await {
                Ok(page) => {
                    let is_last = page.len() < limit;
                    events.extend(page);
                    if is_last {
                        return Ok((events, None));
                    }
                }
                Err(error) => {
                    let log::Error::Corrupt { position: position @ 1.., .. } = error else {
                        return Err(error).context("reading the log");
                    };
                    if limit == 1 {
                        let reason = error.to_string();
                        return Ok((events, Some(Unreadable { position, reason })));
                    }
                    limit = 1;
                }
            }
        }
    }
}

async fn fold<A: Aggregate + Serialize>(
    keyring: &Keyring,
    events: Vec<Recorded>,
) -> anyhow::Result<Shown> {
    let (decoded, failed) = keyring.decode::<A>(&events).await.context("reading the keys")?;
    let unreadable = failed.map(|error| Unreadable {
        position: events[decoded.len()].position,
        reason: error.to_string(),
    });
    let mut state = A::default();
    let mut json = serde_json::to_value(&state)?;
    let mut steps = Vec::with_capacity(events.len());
    for (event, decoded) in events.into_iter().zip(decoded) {
        state.evolve(&decoded);
        let after = serde_json::to_value(&state)?;
        let mut changes = Vec::new();
        compare("", Some(&json), Some(&after), &mut changes);
        steps.push(Step { event, changes });
        json = after;
    }
    Ok(Shown { state: json, steps, unreadable })
}

/// Notes the innermost fields that differ; a list is one field.
fn compare(field: &str, before: Option<&Value>, after: Option<&Value>, into: &mut Vec<Change>) {
    let fields = |value: Option<&Value>| match value {
        Some(Value::Object(fields)) => Some(fields.clone()),
        // What has come or gone is told field by field.
        None => Some(Map::new()),
        Some(_) => None,
    };
    match (before, after) {
        (before, after) if before == after => {}
        (Some(Value::Object(_)), _) | (_, Some(Value::Object(_)))
            if let (Some(old), Some(new)) = (fields(before), fields(after)) =>
        {
            let gone = old.iter().filter(|(name, _)| !new.contains_key(*name));
            for (name, value) in gone {
                compare(&below(field, name), Some(value), None, into);
            }
            for (name, value) in &new {
                compare(&below(field, name), old.get(name), Some(value), into);
            }
        }
        (before, Some(Value::Object(new))) => {
            // A word that stood for the whole, such as "queued", became something with fields.
            into.push(Change { field: field.to_owned(), before: before.cloned(), after: None });
            new.iter().for_each(|(name, value)| {
                compare(&below(field, name), None, Some(value), into);
            });
        }
        (before, after) => into.push(Change {
            field: field.to_owned(),
            before: before.cloned(),
            after: after.cloned(),
        }),
    }
}

fn below(field: &str, name: &str) -> String {
    format!("{field}/{}", name.replace('~', "~0").replace('/', "~1"))
}

fn print_json(stream: &str, shown: &Shown, head: u64) {
    say(format_args!("{}", as_json(stream, shown, head)));
}

fn as_json(stream: &str, shown: &Shown, head: u64) -> Value {
    let Shown { state, steps, unreadable } = shown;
    let events: Vec<_> = steps
        .iter()
        .map(|step| json!({ "event": Envelope::from(&step.event), "changes": step.changes }))
        .collect();
    let position = steps.last().map(|step| step.event.position);
    let mut json = json!({
        "stream": stream, "position": position, "log_position": head, "state": state,
        "events": events,
    });
    if let Some(unreadable) = unreadable {
        json["unreadable"] = json!(unreadable);
    }
    json
}

fn print(stream: &str, shown: &Shown, head: u64) {
    let Shown { state, steps, .. } = shown;
    say(format_args!("{stream} after {} events; the log is at {head}", steps.len()));
    say(format_args!("{state:#}"));
    for Step { event, changes } in steps {
        let Recorded { position, revision, kind, .. } = event;
        let time = event.time.format("%Y-%m-%dT%H:%M:%S%.3fZ");
        say(format_args!("\n{position:>8}  {time}  #{revision}  {kind}"));
        for Change { field, before, after } in changes {
            let field = if field.is_empty() { "/" } else { field };
            match (before, after) {
                (None, Some(after)) => say(format_args!("          + {field} = {after}")),
                (Some(before), None) => say(format_args!("          - {field} = {before}")),
                (before, after) => {
                    let text = |value: &Option<Value>| {
                        value.as_ref().map_or_else(String::new, Value::to_string)
                    };
                    say(format_args!("          ~ {field}: {} → {}", text(before), text(after)));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use chrono::{DateTime, TimeDelta, Utc};
    use uuid::Uuid;

    use super::*;
    use crate::cli::log::Which;
    use crate::log::{EmbeddedLog, Expected, NewEvent};

    const KNOWN: &str = "user.banned.v1";

    fn at(second: i64) -> DateTime<Utc> {
        DateTime::UNIX_EPOCH + TimeDelta::seconds(second)
    }

    /// A user, of whom these events are told, each of its second.
    async fn told(dir: &Path, events: &[(&str, i64)]) -> EmbeddedLog {
        let log = EmbeddedLog::open(&dir.join("log.sqlite")).unwrap();
        for (number, (kind, second)) in (1..).zip(events) {
            let event = NewEvent {
                id: Uuid::from_u128(number),
                kind: (*kind).to_owned(),
                time: at(*second),
                data: b"{}".to_vec(),
                metadata: b"{}".to_vec(),
            };
            log.append("user-ada", Expected::Any, vec![event]).await.unwrap();
        }
        log
    }

    /// How many events were applied, and the JSON that is printed.
    async fn looked(
        dir: &Path,
        log: &EmbeddedLog,
        at: Option<Point>,
    ) -> anyhow::Result<(usize, Value)> {
        let which = Which { data_dir: dir.to_owned(), setting: "embedded".to_owned() };
        let place = Place { log: which, blobs: "file".to_owned(), master_key: None };
        let state = State { stream: "user-ada".to_owned(), at, place, json: true };
        let shown = state.look(log).await?;
        Ok((shown.steps.len(), as_json(&state.stream, &shown, 9)))
    }

    #[tokio::test]
    async fn what_was_before_an_event_that_cannot_be_read_is_shown() {
        let dir = tempfile::tempdir().unwrap();
        let unheard_of = "user.unheard_of.v1";
        let events = [(KNOWN, 1), (KNOWN, 2), (unheard_of, 3), (KNOWN, 4), (unheard_of, 5)];
        let log = told(dir.path(), &events).await;
        let looked = async |at| looked(dir.path(), &log, at).await.unwrap();
        let (steps, json) = looked(None).await;
        assert_eq!((steps, &json["position"]), (2, &json!(2)));
        assert_eq!(json["events"].as_array().unwrap().len(), 2);
        assert_eq!(json["unreadable"]["position"], 3);
        let reason = json["unreadable"]["reason"].as_str().unwrap();
        assert!(reason.contains("user.unheard_of.v1 is not known"), "{reason}");
        let (steps, before) = looked(Some(Point::Position(2))).await;
        assert_eq!((steps, before.get("unreadable")), (2, None));
        assert_eq!(before["state"], json["state"]);
    }

    #[tokio::test]
    async fn where_the_log_is_damaged_what_was_before_is_shown() {
        let dir = tempfile::tempdir().unwrap();
        let log = told(dir.path(), &[(KNOWN, 1), (KNOWN, 2), (KNOWN, 3), (KNOWN, 4)]).await;
        let stranger = rusqlite::Connection::open(dir.path().join("log.sqlite")).unwrap();
        let damage = |position: u64| {
            let sql = format!("UPDATE events SET data = X'7b' WHERE position = {position}");
            stranger.execute_batch(&sql).unwrap();
        };
        let looked = async |at| looked(dir.path(), &log, at).await;
        damage(3);
        for (asked, steps, is_whole) in [
            (None, 2, false),
            (Some(Point::Position(3)), 2, false),
            (Some(Point::Position(2)), 2, true),
            (Some(Point::Time(at(9))), 2, false),
            (Some(Point::Time(at(1))), 1, true),
        ] {
            let (applied, json) = looked(asked).await.unwrap();
            let unreadable = json.get("unreadable").map(|it| &it["position"]);
            let expected = json!(3);
            assert_eq!(applied, steps, "{asked:?}");
            assert_eq!(unreadable, (!is_whole).then_some(&expected), "{asked:?}");
        }
        damage(1);
        assert_eq!(looked(None).await.unwrap().1["unreadable"]["position"], 1);
        let refused = looked(Some(Point::Position(0))).await.unwrap_err().to_string();
        assert_eq!(refused, "user-ada began only at position 1");
    }

    #[tokio::test]
    async fn a_clock_that_was_wrong_for_a_while_cuts_nothing_off() {
        let dir = tempfile::tempdir().unwrap();
        let log = told(dir.path(), &[(KNOWN, 2), (KNOWN, 99), (KNOWN, 3), (KNOWN, 9)]).await;
        let looked = async |second| looked(dir.path(), &log, Some(Point::Time(at(second)))).await;
        for (second, steps) in [(2, 1), (3, 3), (8, 3), (9, 4), (100, 4)] {
            assert_eq!(looked(second).await.unwrap().0, steps, "{second}");
        }
        let refused = looked(1).await.unwrap_err().to_string();
        assert!(refused.starts_with("user-ada began only at position 1, 1970-01-01"), "{refused}");
    }

    #[test]
    fn only_the_fields_that_differ_are_named() {
        let check = |before: Value, after: Value, expected: &[(&str, Value, Value)]| {
            let mut changes = Vec::new();
            compare("", Some(&before), Some(&after), &mut changes);
            let found: Vec<_> = changes
                .into_iter()
                .map(|it| (it.field, it.before.unwrap_or_default(), it.after.unwrap_or_default()))
                .collect();
            let expected: Vec<_> = expected
                .iter()
                .map(|(field, old, new)| ((*field).to_owned(), old.clone(), new.clone()))
                .collect();
            assert_eq!(found, expected);
        };
        let none = Value::Null;
        check(json!({ "a": 1, "b": 2 }), json!({ "a": 1, "b": 3 }), &[("/b", json!(2), json!(3))]);
        check(json!({ "a": [1] }), json!({ "a": [1, 2] }), &[("/a", json!([1]), json!([1, 2]))]);
        check(json!({ "a": { "b": 1 } }), json!({}), &[("/a/b", json!(1), none.clone())]);
        check(json!({}), json!({ "a/~": true }), &[("/a~1~0", none.clone(), json!(true))]);
        check(
            json!({ "phase": "queued" }),
            json!({ "phase": { "running": { "progress": 0 } } }),
            &[
                ("/phase", json!("queued"), none.clone()),
                ("/phase/running/progress", none.clone(), json!(0)),
            ],
        );
        check(json!("x"), json!("x"), &[]);
    }
}
