//! `t2m state`: one entity as the log has it, now or as it was, and what each event changed of it.

use anyhow::{Context, bail};
use clap::Args;
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::keys::Place;
use super::point::{self, Point};
use super::say;
use crate::actors::codec;
use crate::actors::keyring::Keyring;
use crate::actors::records::Envelope;
use crate::domain::Aggregate;
use crate::domain::file::File;
use crate::domain::job::Job;
use crate::domain::session::Session;
use crate::domain::user::User;
use crate::log::{EventLog, Recorded};

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

fn has_happened(event: &Recorded, at: Point) -> bool {
    match at {
        Point::Position(position) => event.position <= position,
        Point::Time(time) => event.time <= time,
    }
}

/// An event, and what it did to the state.
struct Step {
    event: Recorded,
    changes: Vec<Change>,
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
            let events = self.events(&*log).await?;
            let keyring = self.place.open_for_reading()?.keyring();
            let (state, steps) = match codec::category(&self.stream) {
                User::CATEGORY => fold::<User>(&keyring, events).await?,
                Session::CATEGORY => fold::<Session>(&keyring, events).await?,
                File::CATEGORY => fold::<File>(&keyring, events).await?,
                Job::CATEGORY => fold::<Job>(&keyring, events).await?,
                _ => bail!("the stream {} belongs to no entity of this version", self.stream),
            };
            match self.json {
                true => print_json(&self.stream, &state, &steps, head),
                false => print(&self.stream, &state, &steps, head),
            }
            Ok(())
        })
    }

    async fn events(&self, log: &dyn EventLog) -> anyhow::Result<Vec<Recorded>> {
        let mut events = Vec::new();
        loop {
            let from = events.len() as u64;
            let page =
                log.read_stream(&self.stream, from, PAGE).await.context("reading the log")?;
            let is_last = page.len() < PAGE;
            events.extend(page);
            if is_last {
                break;
            }
        }
        if events.is_empty() {
            bail!("the log {} has no stream {}", self.place.log.shown(), self.stream);
        }
        if let Some(at) = self.at {
            let upto = events.iter().take_while(|event| has_happened(event, at)).count();
            if upto == 0 {
                let Recorded { position, time, .. } = &events[0];
                let time = time.to_rfc3339();
                bail!("{} began only at position {position}, {time}", self.stream);
            }
            events.truncate(upto);
        }
        Ok(events)
    }
}

async fn fold<A: Aggregate + Serialize>(
    keyring: &Keyring,
    events: Vec<Recorded>,
) -> anyhow::Result<(Value, Vec<Step>)> {
    let (decoded, unreadable) = keyring.decode::<A>(&events).await.context("reading the keys")?;
    if let Some(error) = unreadable {
        let position = events[decoded.len()].position;
        return Err(error).with_context(|| format!("the event at position {position}"));
    }
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
    Ok((json, steps))
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

fn print_json(stream: &str, state: &Value, steps: &[Step], head: u64) {
    let events: Vec<_> = steps
        .iter()
        .map(|step| json!({ "event": Envelope::from(&step.event), "changes": step.changes }))
        .collect();
    let position = steps.last().map(|step| step.event.position);
    let shown = json!({
        "stream": stream, "position": position, "log_position": head, "state": state,
        "events": events,
    });
    say(format_args!("{shown}"));
}

fn print(stream: &str, state: &Value, steps: &[Step], head: u64) {
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
    use super::*;

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
