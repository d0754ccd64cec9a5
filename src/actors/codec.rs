//! Between an event and its record in the log: the type's name, the data as JSON, and the metadata.
//!
//! Personal fields pass as they are: [`super::keyring`] seals them before and opens them after.

use serde::de::value::{BorrowedStrDeserializer, MapAccessDeserializer, StrDeserializer};
use serde::de::{DeserializeSeed, MapAccess};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use crate::domain::Aggregate;
use crate::domain::file::{self, File};
use crate::domain::ids::{FileId, JobId, SessionId, UserId};
use crate::domain::job::{self, Job};
use crate::domain::session::{self, Session};
use crate::domain::text::Visit;
use crate::domain::user::{self, User};
use crate::log::Recorded;

/// What is known about how an event came about (CONTRACT §5).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metadata {
    /// The `X-Request-Id` of the request it began with.
    pub correlation_id: String,
    /// The event or delivery that it answers to; absent when a person asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub causation_id: Option<String>,
    /// A user's id, `clerk`, a worker's id, or `system`.
    pub actor: String,
    pub source: Source,
}

impl Metadata {
    /// The origin of an event that nothing is known to have caused.
    pub fn by(actor: &str, source: Source) -> Self {
        Self { correlation_id: String::new(), causation_id: None, actor: actor.to_owned(), source }
    }

    /// This origin of what follows `last` in its stream: what nobody asked for answers to that
    /// event, and began with the same request.
    pub fn after(&self, last: &Last) -> Self {
        let mut origin = self.clone();
        if matches!(self.source, Source::Worker | Source::System) {
            origin.causation_id.get_or_insert_with(|| last.event_id.to_string());
            if origin.correlation_id.is_empty() {
                origin.correlation_id.clone_from(&last.correlation_id);
            }
        }
        origin
    }

    /// As it is stored.
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("strings under fixed names are always JSON")
    }
}

/// Whether a request may go by this id: 1 to 128 visible ASCII characters.
pub fn is_request_id(id: &[u8]) -> bool {
    (1..=128).contains(&id.len()) && id.iter().all(u8::is_ascii_graphic)
}

/// The last event of a stream, and the request that it began with.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Last {
    pub event_id: Uuid,
    /// Of the last event that has one and is no worker's: those name the worker's calls. Of the
    /// first event that has one where all are; empty where there is none.
    pub correlation_id: String,
}

impl Last {
    /// Goes on to the last of `events`.
    pub fn advance(&mut self, events: &[Recorded]) {
        let Some(last) = events.last() else { return };
        self.event_id = last.id;
        let mut began = None;
        // From the end: mostly the last one tells, and nothing else is decoded.
        for event in events.iter().rev() {
            if let Ok(origin) = serde_json::from_slice::<Metadata>(&event.metadata)
                && !origin.correlation_id.is_empty()
            {
                let is_call = origin.source == Source::Worker;
                began = Some(origin);
                if !is_call {
                    break;
                }
            }
        }
        if let Some(origin) = began {
            self.go_back_to(&origin);
        }
    }

    /// Takes the request that an event's origin names, unless that is a worker's call in the course of
    /// another one.
    pub fn go_back_to(&mut self, origin: &Metadata) {
        let is_call = origin.source == Source::Worker && !self.correlation_id.is_empty();
        if !origin.correlation_id.is_empty() && !is_call {
            self.correlation_id.clone_from(&origin.correlation_id);
        }
    }
}

/// The door it came in by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    Api,
    Clerk,
    Worker,
    System,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Written by a newer version: refused and not skipped, for the state without it would be wrong.
    #[error(
        "the event type {0} is not known: the log was written by a newer version than this program"
    )]
    UnknownType(String),
    /// A user's key is neither there nor was it destroyed: it was lost, or belongs to a backup.
    #[error(
        "the key of the user {0} is missing and was not destroyed: bring it back from a backup, or \
         give it up with `t2m erase {0}`"
    )]
    NoKey(String),
    /// The master key does not open it, although it opens those of others.
    #[error(
        "the key of the user {0} does not open as others do: give all master keys that have sealed \
         any (T2M_MASTER_KEY); if it is damaged, bring it back from a backup, or give it up with \
         `t2m erase {0}`"
    )]
    DamagedKey(String),
    #[error("the data of {kind} cannot be read: {what}")]
    BadData { kind: String, what: String },
    #[error("the stream {0} belongs to no entity of this version")]
    UnknownStream(String),
}

/// An event of any of the four aggregates, with the id that its stream names.
#[derive(Debug, Clone, PartialEq)]
pub enum AnyEvent {
    User(UserId, user::Event),
    Session(SessionId, session::Event),
    File(FileId, file::Event),
    Job(JobId, job::Event),
}

impl AnyEvent {
    /// Shows every personal field.
    pub fn personal(&mut self, visit: Visit<'_>) {
        match self {
            Self::User(_, event) => User::personal(event, visit),
            Self::Session(_, event) => Session::personal(event, visit),
            Self::File(_, event) => File::personal(event, visit),
            Self::Job(_, event) => Job::personal(event, visit),
        }
    }

    /// Whose the personal fields are.
    pub fn owner(&self) -> Option<UserId> {
        match self {
            Self::User(id, _) => Some(id.clone()),
            Self::Session(id, event) => Session::owner(id.as_str(), event),
            Self::File(_, event) => File::owner("", event),
            Self::Job(_, event) => Job::owner("", event),
        }
    }
}

/// The type's name and the data as JSON.
///
/// # Errors
/// [`Error::BadData`] for an event that does not serialise as `{"type":…,"data":…}`.
pub fn encode<A: Aggregate>(event: &A::Event) -> Result<(String, Vec<u8>), Error> {
    let mut json = serde_json::to_vec(event).map_err(|error| bad(A::CATEGORY, error))?;
    // Derived adjacent tagging writes the type first, so one pass yields both parts in place.
    let name_len = json
        .strip_prefix(HEAD)
        .and_then(|rest| rest.iter().position(|byte| *byte == b'"'))
        .filter(|len| json[HEAD.len() + len..].starts_with(MIDDLE) && json.ends_with(b"}"))
        .ok_or_else(|| bad(A::CATEGORY, "not of the form {\"type\":…,\"data\":…}"))?;
    let name_end = HEAD.len() + name_len;
    let kind = String::from_utf8_lossy(&json[HEAD.len()..name_end]).into_owned();
    json.pop();
    json.drain(..name_end + MIDDLE.len());
    Ok((kind, json))
}

const HEAD: &[u8] = br#"{"type":""#;
const MIDDLE: &[u8] = br#"","data":"#;

/// The event of a record; a retired version arrives as the present one.
///
/// # Errors
/// [`Error::UnknownType`] for a type that this version does not have, [`Error::BadData`] for data
/// that its type does not allow.
pub fn decode<A: Aggregate>(kind: &str, data: &[u8]) -> Result<A::Event, Error> {
    if !is_retired(kind) {
        return decode_current::<A>(kind, data);
    }
    let value = serde_json::from_slice(data).map_err(|error| bad(kind, error))?;
    let (kind, value) = upcast(kind, value);
    decode_current::<A>(&kind, value.to_string().as_bytes())
}

/// The event of a record of any entity.
///
/// # Errors
/// As [`decode`], and [`Error::UnknownStream`] for a name that is not `user-ID`, `session-ID`,
/// `file-ID` or `job-ID` with an id that such an entity may have.
pub fn decode_any(stream: &str, kind: &str, data: &[u8]) -> Result<AnyEvent, Error> {
    let unknown = || Error::UnknownStream(stream.to_owned());
    let (category, id) = stream.split_once('-').ok_or_else(unknown)?;
    let uuid = || id.parse::<uuid::Uuid>().map_err(|_| unknown());
    match category {
        User::CATEGORY => {
            let id = UserId::try_from(id).map_err(|_| unknown())?;
            Ok(AnyEvent::User(id, decode::<User>(kind, data)?))
        }
        Session::CATEGORY => {
            let id = SessionId::try_from(id).map_err(|_| unknown())?;
            Ok(AnyEvent::Session(id, decode::<Session>(kind, data)?))
        }
        File::CATEGORY => Ok(AnyEvent::File(FileId(uuid()?), decode::<File>(kind, data)?)),
        Job::CATEGORY => Ok(AnyEvent::Job(JobId(uuid()?), decode::<Job>(kind, data)?)),
        _ => Err(unknown()),
    }
}

/// What kind of entity a stream is of: `job` for `job-ID`.
pub fn category(stream: &str) -> &str {
    stream.split_once('-').map_or(stream, |(category, _)| category)
}

/// The present type and data of what an older version wrote; the present ones stay as they are.
///
/// Each retired version is one entry of a table that leads to the next one, so a type's history
/// is walked step by step and no entry is ever touched again.
pub fn upcast(kind: &str, data: Value) -> (String, Value) {
    upcast_by(RETIRED, kind, data)
}

/// True for a type that is still in logs but no longer in the code.
pub fn is_retired(kind: &str) -> bool {
    RETIRED.iter().any(|(retired, _)| *retired == kind)
}

/// Gives the following version's type and data.
type Step = fn(Value) -> (&'static str, Value);

/// Every retired version.
const RETIRED: &[(&str, Step)] = &[("file.deleted.v1", file_deleted_v1)];

/// It told by leaving the reason out that the owner had asked for it.
fn file_deleted_v1(mut data: Value) -> (&'static str, Value) {
    if let Value::Object(fields) = &mut data
        && fields.get("reason").is_none_or(Value::is_null)
    {
        fields.insert("reason".to_owned(), "requested".into());
    }
    ("file.deleted.v2", data)
}

fn upcast_by(retired: &[(&str, Step)], kind: &str, data: Value) -> (String, Value) {
    let (mut kind, mut data) = (kind.to_owned(), data);
    while let Some((_, step)) = retired.iter().find(|(name, _)| *name == kind) {
        let (next, changed) = step(data);
        (kind, data) = (next.to_owned(), changed);
    }
    (kind, data)
}

fn decode_current<A: Aggregate>(kind: &str, data: &[u8]) -> Result<A::Event, Error> {
    // Looked at once as a whole, not string by string; what is no text may still be of a type that
    // is not known, and is told so.
    match std::str::from_utf8(data) {
        Ok(text) => decode_json::<A, _>(kind, serde_json::Deserializer::from_str(text)),
        Err(_) => decode_json::<A, _>(kind, serde_json::Deserializer::from_slice(data)),
    }
}

fn decode_json<'de, A: Aggregate, R: serde_json::de::Read<'de>>(
    kind: &str,
    mut json: serde_json::Deserializer<R>,
) -> Result<A::Event, Error> {
    let mut fields = Tagged { kind, data: &mut json, next: Field::Type, type_is_known: false };
    let decoded = A::Event::deserialize(MapAccessDeserializer::new(&mut fields));
    let type_is_known = fields.type_is_known;
    match decoded.and_then(|event| json.end().map(|()| event)) {
        Ok(event) => Ok(event),
        Err(_) if !type_is_known => Err(Error::UnknownType(kind.to_owned())),
        Err(error) => Err(bad(kind, error)),
    }
}

fn bad(kind: &str, what: impl std::fmt::Display) -> Error {
    Error::BadData { kind: kind.to_owned(), what: what.to_string() }
}

/// Reads as `{"type": kind, "data": …}` without building that text, nor a [`Value`] of it: decoding
/// is most of what a replay costs.
struct Tagged<'a, R> {
    kind: &'a str,
    data: &'a mut serde_json::Deserializer<R>,
    next: Field,
    /// Serde asks for the data only after it has accepted the type.
    type_is_known: bool,
}

#[derive(Clone, Copy)]
enum Field {
    Type,
    Data,
    End,
}

impl<'de, R: serde_json::de::Read<'de>> MapAccess<'de> for &mut Tagged<'_, R> {
    type Error = serde_json::Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Self::Error> {
        let name = match self.next {
            Field::Type => "type",
            Field::Data => "data",
            Field::End => return Ok(None),
        };
        self.type_is_known = matches!(self.next, Field::Data);
        seed.deserialize(BorrowedStrDeserializer::new(name)).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(
        &mut self,
        seed: V,
    ) -> Result<V::Value, Self::Error> {
        match self.next {
            Field::Type => {
                self.next = Field::Data;
                seed.deserialize(StrDeserializer::new(self.kind))
            }
            Field::Data | Field::End => {
                self.next = Field::End;
                seed.deserialize(&mut *self.data)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn ended() -> session::Event {
        session::Event::Ended {
            user_id: None,
            reason: session::EndReason::Revoked,
            at: chrono::DateTime::UNIX_EPOCH,
        }
    }

    #[test]
    fn an_event_comes_back_as_it_was_written() {
        let (kind, data) = encode::<Session>(&ended()).unwrap();
        assert_eq!(kind, "session.ended.v1");
        assert_eq!(data, br#"{"reason":"revoked","at":"1970-01-01T00:00:00Z"}"#);
        assert_eq!(decode::<Session>(&kind, &data), Ok(ended()));
        let any = decode_any("session-sess_a-b", &kind, &data).unwrap();
        let id = SessionId::try_from("sess_a-b".to_owned()).unwrap();
        assert_eq!(any, AnyEvent::Session(id, ended()));
    }

    #[test]
    fn an_event_without_fields_has_empty_data() {
        let (kind, data) = encode::<User>(&user::Event::Deleted {}).unwrap();
        assert_eq!((kind.as_str(), data.as_slice()), ("user.deleted.v1", b"{}".as_slice()));
        assert_eq!(decode::<User>(&kind, &data), Ok(user::Event::Deleted {}));
    }

    #[test]
    fn a_type_of_a_newer_version_is_refused() {
        for kind in ["user.deleted.v2", "job.completed.v1", "", "type"] {
            let refused = decode::<User>(kind, b"{}");
            assert_eq!(refused, Err(Error::UnknownType(kind.to_owned())));
        }
    }

    #[test]
    fn data_that_its_type_does_not_allow_is_refused() {
        for data in ["", "null", "7", "{", "{} {}", r#"{"at":"soon"}"#, "\u{0}"] {
            let refused = decode::<Session>("session.ended.v1", data.as_bytes());
            assert!(matches!(&refused, Err(Error::BadData { .. })), "{data:?}: {refused:?}");
        }
        assert!(matches!(
            decode::<Session>("session.ended.v1", b"\xff\xfe"),
            Err(Error::BadData { .. })
        ));
    }

    #[test]
    fn a_stream_of_no_entity_is_refused() {
        for stream in ["", "job", "job-", "job-7", "order-1", "user-", "user-a b"] {
            let refused = decode_any(stream, "user.deleted.v1", b"{}");
            assert_eq!(refused, Err(Error::UnknownStream(stream.to_owned())));
        }
    }

    #[test]
    fn the_category_ends_at_the_first_dash() {
        assert_eq!(category("job-0197-ab"), "job");
        assert_eq!(category("$system"), "$system");
    }

    #[test]
    fn a_retired_version_is_led_to_the_present_one_step_by_step() {
        let retired: &[(&str, Step)] = &[
            ("user.named.v2", |data| ("user.named.v3", json!({ "names": [data["name"]] }))),
            ("user.named.v1", |data| ("user.named.v2", json!({ "name": data }))),
        ];
        let expected = ("user.named.v3".to_owned(), json!({ "names": ["Ada"] }));
        assert_eq!(upcast_by(retired, "user.named.v1", json!("Ada")), expected);
        let present = expected.1.clone();
        assert_eq!(upcast_by(retired, "user.named.v3", present), expected);
    }

    #[test]
    fn a_deletion_of_the_first_version_tells_its_reason() {
        let deleted = |reason| {
            let user_id = UserId::try_from("ada".to_owned()).unwrap();
            Ok(file::Event::Deleted { user_id, sha256: "ab".to_owned(), reason })
        };
        let check = |data: Value, then| {
            let data = data.to_string();
            assert_eq!(decode::<File>("file.deleted.v1", data.as_bytes()), then, "{data}");
        };
        check(json!({ "user_id": "ada", "sha256": "ab" }), deleted(file::Reason::Requested));
        let expired = json!({ "user_id": "ada", "sha256": "ab", "reason": "expired" });
        check(expired, deleted(file::Reason::Expired));
        for bad in [json!(7), json!({ "sha256": "ab" })] {
            let refused = decode::<File>("file.deleted.v1", bad.to_string().as_bytes());
            assert!(matches!(refused, Err(Error::BadData { .. })), "{bad}: {refused:?}");
        }
    }

    #[test]
    fn a_stream_goes_back_to_its_request_and_not_to_a_workers_calls() {
        use Source::{Api, System, Worker};
        let recorded = |number: u64, source: Source, id: &str| Recorded {
            id: Uuid::from_u128(u128::from(number)),
            stream: "job-1".into(),
            revision: number,
            position: number + 1,
            kind: "job.progressed.v1".into(),
            time: chrono::DateTime::UNIX_EPOCH,
            data: bytes::Bytes::new(),
            metadata: Metadata { correlation_id: id.to_owned(), ..Metadata::by("x", source) }
                .to_bytes()
                .into(),
            hash: [0; 32],
        };
        let check = |events: &[(Source, &str)], then: &str| {
            let numbered = (0..).zip(events);
            let recorded: Vec<_> =
                numbered.map(|(number, &(source, id))| recorded(number, source, id)).collect();
            let (mut at_once, mut one_by_one) = (Last::default(), Last::default());
            at_once.advance(&recorded);
            for event in recorded.chunks(1) {
                one_by_one.advance(event);
            }
            let event_id = recorded.last().map_or_else(Uuid::nil, |it| it.id);
            assert_eq!(at_once, Last { event_id, correlation_id: then.to_owned() }, "{events:?}");
            assert_eq!(one_by_one, at_once, "{events:?}");
        };
        check(&[], "");
        check(&[(Api, "")], "");
        check(&[(Api, "asked"), (Worker, "poll"), (Worker, "report")], "asked");
        check(&[(Api, "asked"), (Worker, "asked"), (Api, "retry"), (Worker, "poll")], "retry");
        check(&[(Api, "asked"), (Worker, "poll"), (System, "due"), (System, "")], "due");
        check(&[(Api, ""), (Worker, "poll"), (Worker, "report")], "poll");
        check(&[(Worker, "poll"), (Api, "cancel"), (Worker, "report")], "cancel");
    }

    #[test]
    fn metadata_reads_as_the_contract_says() {
        let metadata = Metadata {
            correlation_id: "req_1".to_owned(),
            causation_id: None,
            actor: "clerk".to_owned(),
            source: Source::Clerk,
        };
        let json = json!({ "correlation_id": "req_1", "actor": "clerk", "source": "clerk" });
        assert_eq!(serde_json::to_value(&metadata).unwrap(), json);
    }
}
