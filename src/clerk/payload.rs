//! What webhook deliveries say, read loosely: every field may be missing, unknown fields and types
//! are no fault, since Clerk adds to both without notice. Nothing here decides anything.

use chrono::{DateTime, Utc};
use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer};
use serde_json::{Map, Value};

/// A delivery that we act on, or know to leave alone.
#[derive(Debug, Clone, PartialEq)]
pub enum Delivery {
    UserCreatedOrUpdated(User),
    UserDeleted {
        user_id: String,
    },
    SessionStarted(Session),
    SessionEnded {
        session: Session,
        reason: SessionEnd,
    },
    MembershipChanged(Membership),
    MembershipRemoved(Membership),
    /// Acknowledged and forgotten. The body is dropped on purpose: `email.created` and
    /// `sms.created` carry one-time codes.
    Ignored {
        kind: String,
    },
}

/// Why Clerk says a session is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SessionEnd {
    Ended,
    Removed,
    Revoked,
}

/// A verified delivery that cannot be acted on: recorded as a dead letter, answered with 200.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unusable {
    #[error("the delivery is not a JSON object with a type")]
    NotAnEvent,
    #[error("the data of {kind} cannot be read")]
    Data { kind: String },
    #[error("the data of {kind} names no {what}")]
    NoId { kind: String, what: &'static str },
}

/// The frame of every delivery.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Envelope {
    #[serde(rename = "type")]
    pub kind: String,
    #[serde(default)]
    pub data: Value,
    /// When Clerk made the event.
    #[serde(default, deserialize_with = "time")]
    pub timestamp: Option<DateTime<Utc>>,
    #[serde(default, deserialize_with = "lenient")]
    pub event_attributes: EventAttributes,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct EventAttributes {
    #[serde(deserialize_with = "lenient")]
    pub http_request: HttpRequest,
}

/// The request that caused the event; empty when the Backend API did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct HttpRequest {
    #[serde(deserialize_with = "text")]
    pub client_ip: Option<String>,
    #[serde(deserialize_with = "text")]
    pub user_agent: Option<String>,
}

/// A user, whole, as of `updated_at`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct User {
    #[serde(deserialize_with = "lenient")]
    pub id: String,
    #[serde(deserialize_with = "text")]
    pub first_name: Option<String>,
    #[serde(deserialize_with = "text")]
    pub last_name: Option<String>,
    #[serde(deserialize_with = "text")]
    pub username: Option<String>,
    #[serde(deserialize_with = "text")]
    pub image_url: Option<String>,
    #[serde(deserialize_with = "text")]
    pub primary_email_address_id: Option<String>,
    #[serde(deserialize_with = "lenient")]
    pub email_addresses: Vec<EmailAddress>,
    /// Set by the application. `unsafe_metadata`, which users write themselves, is not even read.
    #[serde(deserialize_with = "lenient")]
    pub public_metadata: Map<String, Value>,
    #[serde(deserialize_with = "lenient")]
    pub private_metadata: Map<String, Value>,
    #[serde(deserialize_with = "lenient")]
    pub banned: bool,
    #[serde(deserialize_with = "lenient")]
    pub locked: bool,
    #[serde(deserialize_with = "time")]
    pub created_at: Option<DateTime<Utc>>,
    #[serde(deserialize_with = "time")]
    pub updated_at: Option<DateTime<Utc>>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct EmailAddress {
    #[serde(deserialize_with = "lenient")]
    pub id: String,
    #[serde(deserialize_with = "text")]
    pub email_address: Option<String>,
    #[serde(deserialize_with = "lenient")]
    pub verification: Verification,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Verification {
    #[serde(deserialize_with = "text")]
    pub status: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Session {
    #[serde(deserialize_with = "lenient")]
    pub id: String,
    #[serde(deserialize_with = "lenient")]
    pub user_id: String,
    #[serde(deserialize_with = "lenient")]
    pub user: Option<User>,
    #[serde(deserialize_with = "text")]
    pub client_id: Option<String>,
    /// Who acts as the user, when somebody does.
    #[serde(deserialize_with = "lenient")]
    pub actor: Option<Actor>,
    #[serde(deserialize_with = "text")]
    pub status: Option<String>,
    #[serde(deserialize_with = "lenient")]
    pub latest_activity: Option<Activity>,
    #[serde(deserialize_with = "time")]
    pub last_active_at: Option<DateTime<Utc>>,
    #[serde(deserialize_with = "time")]
    pub expire_at: Option<DateTime<Utc>>,
    #[serde(deserialize_with = "time")]
    pub abandon_at: Option<DateTime<Utc>>,
    #[serde(deserialize_with = "time")]
    pub created_at: Option<DateTime<Utc>>,
    #[serde(deserialize_with = "time")]
    pub updated_at: Option<DateTime<Utc>>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Actor {
    #[serde(deserialize_with = "text")]
    pub sub: Option<String>,
}

/// The device behind a session.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Activity {
    #[serde(deserialize_with = "text")]
    pub device_type: Option<String>,
    #[serde(deserialize_with = "lenient")]
    pub is_mobile: bool,
    #[serde(deserialize_with = "text")]
    pub browser_name: Option<String>,
    #[serde(deserialize_with = "text")]
    pub browser_version: Option<String>,
    #[serde(deserialize_with = "text")]
    pub ip_address: Option<String>,
    #[serde(deserialize_with = "text")]
    pub city: Option<String>,
    #[serde(deserialize_with = "text")]
    pub country: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Membership {
    #[serde(deserialize_with = "lenient")]
    pub id: String,
    #[serde(deserialize_with = "text")]
    pub role: Option<String>,
    #[serde(deserialize_with = "lenient")]
    pub permissions: Vec<String>,
    #[serde(deserialize_with = "lenient")]
    pub organization: Organization,
    #[serde(deserialize_with = "lenient")]
    pub public_user_data: PublicUserData,
    #[serde(deserialize_with = "time")]
    pub created_at: Option<DateTime<Utc>>,
    #[serde(deserialize_with = "time")]
    pub updated_at: Option<DateTime<Utc>>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Organization {
    #[serde(deserialize_with = "lenient")]
    pub id: String,
    #[serde(deserialize_with = "text")]
    pub name: Option<String>,
    #[serde(deserialize_with = "text")]
    pub slug: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct PublicUserData {
    #[serde(deserialize_with = "lenient")]
    pub user_id: String,
}

impl User {
    /// The address the user chose as primary; the first of the list may be any other, and a user
    /// with a phone only has none.
    pub fn primary_email(&self) -> Option<&EmailAddress> {
        let primary = self.primary_email_address_id.as_deref()?;
        self.email_addresses.iter().find(|address| address.id == primary)
    }
}

impl Envelope {
    /// Reads the body of a delivery whose signature has been verified.
    ///
    /// # Errors
    /// [`Unusable`] when it is no event, or one of a type we act on without the ids that needs.
    pub fn parse(body: &[u8]) -> Result<Delivery, Unusable> {
        Self::read(body)?.into_delivery()
    }

    /// The frame alone, for who needs its time or its request as well.
    ///
    /// # Errors
    /// [`Unusable::NotAnEvent`].
    pub fn read(body: &[u8]) -> Result<Self, Unusable> {
        serde_json::from_slice(body).map_err(|_| Unusable::NotAnEvent)
    }

    /// Whether a body that could not be used may be kept. One that may carry a one-time code must
    /// not, even if it is too broken to tell its type.
    pub fn may_be_kept(body: &[u8]) -> bool {
        match Self::read(body) {
            Ok(envelope) => !CARRY_CODES.contains(&envelope.kind.as_str()),
            Err(_) => !mentions_codes(&String::from_utf8_lossy(body)),
        }
    }

    /// What the event means to us.
    ///
    /// # Errors
    /// [`Unusable`] when a type we act on lacks the ids that needs.
    pub fn into_delivery(self) -> Result<Delivery, Unusable> {
        match self.kind.as_str() {
            "user.created" | "user.updated" => {
                let user: User = self.data()?;
                self.need(&user.id, "user")?;
                Ok(Delivery::UserCreatedOrUpdated(user))
            }
            "user.deleted" => {
                let user: User = self.data()?;
                self.need(&user.id, "user")?;
                Ok(Delivery::UserDeleted { user_id: user.id })
            }
            "session.created" => Ok(Delivery::SessionStarted(self.session()?)),
            "session.ended" => self.session_ended(SessionEnd::Ended),
            "session.removed" => self.session_ended(SessionEnd::Removed),
            "session.revoked" => self.session_ended(SessionEnd::Revoked),
            "organizationMembership.created" | "organizationMembership.updated" => {
                Ok(Delivery::MembershipChanged(self.membership()?))
            }
            "organizationMembership.deleted" => Ok(Delivery::MembershipRemoved(self.membership()?)),
            _ => Ok(Delivery::Ignored { kind: self.kind }),
        }
    }

    fn session_ended(&self, reason: SessionEnd) -> Result<Delivery, Unusable> {
        // Whose it was, its start has said.
        let session: Session = self.data()?;
        self.need(&session.id, "session")?;
        Ok(Delivery::SessionEnded { session, reason })
    }

    fn session(&self) -> Result<Session, Unusable> {
        let session: Session = self.data()?;
        self.need(&session.id, "session")?;
        self.need(&session.user_id, "user")?;
        Ok(session)
    }

    fn membership(&self) -> Result<Membership, Unusable> {
        let membership: Membership = self.data()?;
        self.need(&membership.id, "membership")?;
        self.need(&membership.organization.id, "organization")?;
        self.need(&membership.public_user_data.user_id, "user")?;
        Ok(membership)
    }

    fn data<T: DeserializeOwned>(&self) -> Result<T, Unusable> {
        T::deserialize(&self.data).map_err(|_| Unusable::Data { kind: self.kind.clone() })
    }

    fn need(&self, id: &str, what: &'static str) -> Result<(), Unusable> {
        if id.is_empty() { Err(Unusable::NoId { kind: self.kind.clone(), what }) } else { Ok(()) }
    }
}

/// Types whose bodies carry one-time codes.
const CARRY_CODES: [&str; 2] = ["email.created", "sms.created"];

/// Looks for the types and for Clerk's names of the code in a text that does not parse. JSON may
/// write any sign as `\u002e`, so what is escaped is looked for unescaped.
fn mentions_codes(text: &str) -> bool {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("\\u") {
        plain.push_str(&rest[..at]);
        let digits = rest.get(at + 2..at + 6).and_then(|hex| u32::from_str_radix(hex, 16).ok());
        let sign = digits.and_then(char::from_u32);
        plain.push(sign.unwrap_or('?'));
        rest = &rest[at + if sign.is_some() { 6 } else { 2 }..];
    }
    plain.push_str(rest);
    let plain = plain.to_ascii_lowercase();
    CARRY_CODES.iter().chain(&["otp"]).any(|name| plain.contains(name))
}

/// `null` and values of another type read as the default: one odd field must not cost the event.
fn lenient<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: DeserializeOwned + Default,
{
    let value = Value::deserialize(deserializer)?;
    Ok(T::deserialize(value).unwrap_or_default())
}

fn text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let text: Option<String> = lenient(deserializer)?;
    Ok(text.filter(|text| !text.is_empty()))
}

/// Milliseconds or seconds since 1970: Clerk's specification and its documentation disagree, but
/// what is below 10^11 would be before March 1973 in milliseconds. What lies beyond the year 8999 is
/// no time: RFC 3339 ends with 9999, and lifetimes are yet to be added.
fn time<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<DateTime<Utc>>, D::Error> {
    const FIRST_MILLISECONDS: i64 = 100_000_000_000;
    const LAST_MILLISECONDS: i64 = 221_845_391_999_999;
    let number: Option<i64> = lenient(deserializer)?;
    Ok(number.filter(|number| (1..=LAST_MILLISECONDS).contains(number)).and_then(|number| {
        if number < FIRST_MILLISECONDS {
            DateTime::from_timestamp(number, 0)
        } else {
            DateTime::from_timestamp_millis(number)
        }
    }))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn fixture(name: &str) -> Vec<u8> {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/clerk/payloads");
        fs::read(format!("{folder}/{name}.json")).unwrap()
    }

    fn user(name: &str) -> User {
        match Envelope::parse(&fixture(name)) {
            Ok(Delivery::UserCreatedOrUpdated(user)) => user,
            other => panic!("{name}: {other:?}"),
        }
    }

    fn email(name: &str) -> Option<String> {
        user(name).primary_email().and_then(|address| address.email_address.clone())
    }

    #[test]
    fn every_payload_becomes_what_its_type_says() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/clerk/payloads");
        let mut count = 0;
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let body = fs::read(&path).unwrap();
            let kind = Envelope::read(&body).unwrap().kind;
            let delivery = Envelope::parse(&body).unwrap_or_else(|e| panic!("{path:?}: {e}"));
            let fits = match kind.as_str() {
                "user.created" | "user.updated" => {
                    matches!(delivery, Delivery::UserCreatedOrUpdated(_))
                }
                "user.deleted" => matches!(delivery, Delivery::UserDeleted { .. }),
                "session.created" => matches!(delivery, Delivery::SessionStarted(_)),
                "session.ended" | "session.removed" | "session.revoked" => {
                    matches!(delivery, Delivery::SessionEnded { .. })
                }
                "organizationMembership.created" | "organizationMembership.updated" => {
                    matches!(delivery, Delivery::MembershipChanged(_))
                }
                "organizationMembership.deleted" => {
                    matches!(delivery, Delivery::MembershipRemoved(_))
                }
                _ => delivery == Delivery::Ignored { kind },
            };
            assert!(fits, "{path:?}");
            count += 1;
        }
        assert_eq!(count, 40);
    }

    #[test]
    fn the_primary_address_is_the_one_the_user_chose() {
        assert_eq!(email("user.created").as_deref(), Some("ada@example.com"));
        let second = user("user.updated.primary_is_second_email");
        let first = second.email_addresses[0].email_address.clone();
        assert_ne!(second.primary_email().unwrap().email_address, first);
        assert_eq!(email("user.created.no_email_phone_only"), None);
        assert_eq!(email("user.created.dashboard_example_shape"), None);
        assert_eq!(email("user.created.unverified_only"), None);
    }

    #[test]
    fn missing_names_are_missing_and_not_words() {
        let user = user("user.updated.all_names_null");
        assert_eq!((user.first_name, user.last_name), (None, None));
    }

    #[test]
    fn times_in_seconds_and_in_milliseconds_are_told_apart() {
        let at = |name| Envelope::read(&fixture(name)).unwrap().timestamp.unwrap();
        assert_eq!(at("user.created.seconds_timestamp").timestamp_millis(), 1_767_225_600_000);
        assert_eq!(at("user.created").timestamp_millis(), 1_767_225_601_835);
        let updated_at = user("user.created").updated_at.unwrap();
        assert_eq!(updated_at.timestamp_millis(), 1_767_225_601_800);
    }

    #[test]
    fn a_session_tells_its_device_and_who_acts() {
        let Ok(Delivery::SessionStarted(session)) =
            Envelope::parse(&fixture("session.created.impersonated"))
        else {
            panic!("a session starts");
        };
        assert_eq!(session.actor.unwrap().sub.as_deref(), Some("user_admin"));
        assert_eq!(session.latest_activity.unwrap().city.as_deref(), Some("Lisbon"));
        let Ok(Delivery::SessionEnded { session, reason }) =
            Envelope::parse(&fixture("session.revoked"))
        else {
            panic!("a session ends");
        };
        assert_eq!((session.user_id, reason), (user("user.created").id, SessionEnd::Revoked));
        let Ok(Delivery::SessionStarted(session)) =
            Envelope::parse(&fixture("session.created.user_null"))
        else {
            panic!("a session starts");
        };
        assert_eq!(session.user, None);
    }

    #[test]
    fn an_odd_field_costs_only_itself() {
        let body = br#"{"type":"user.updated","timestamp":"soon","event_attributes":7,"data":{
            "id":"user_1","first_name":7,"last_name":"L","email_addresses":"x","banned":"yes",
            "updated_at":1e400000,"public_metadata":[]}}"#;
        assert_eq!(Envelope::parse(body), Err(Unusable::NotAnEvent), "no number is that large");
        let body = String::from_utf8_lossy(body).replace("1e400000", "-1");
        let Ok(Delivery::UserCreatedOrUpdated(user)) = Envelope::parse(body.as_bytes()) else {
            panic!("the user is read");
        };
        assert_eq!((user.last_name.as_deref(), user.first_name), (Some("L"), None));
        assert!(!user.banned && user.updated_at.is_none() && user.public_metadata.is_empty());
    }

    #[test]
    fn a_time_beyond_all_calendars_is_no_time() {
        for (time, read) in [
            ("221845391999999", true),
            ("221845392000000", false),
            ("8210266876799999", false),
            ("9223372036854775807", false),
            ("-1", false),
            ("0", false),
        ] {
            let body = format!(r#"{{"type":"session.created","timestamp":{time}}}"#);
            let envelope = Envelope::read(body.as_bytes()).unwrap();
            assert_eq!(envelope.timestamp.is_some(), read, "{time}");
        }
    }

    #[test]
    fn a_body_that_may_carry_a_code_is_never_kept() {
        for name in ["email.created", "sms.created"] {
            let body = fixture(name);
            assert!(!Envelope::may_be_kept(&body));
            assert!(!Envelope::may_be_kept(&body[..body.len() - 2]), "cut off");
            assert!(!Envelope::may_be_kept(&[&body[..], b"\xff"].concat()), "not UTF-8");
        }
        for (body, kept) in [
            (r#"{"type":"user.created","data":7}"#, true),
            (r#"{"type":7,"data":{}}"#, true),
            ("not JSON \\u00zz \\u", true),
            (r#"{"type":"email\u002ecreated","data":{}"#, false),
            (r#"{"type":"email.created","type":"user.created"}"#, false),
            (r#"{"Type":"SMS.Created"}"#, false),
            (r#"{"data":{"otp_code":"424242"}}"#, false),
            (r#"{"data":{"\u006f\u0074p_code":"424242"}}"#, false),
        ] {
            assert_eq!(Envelope::may_be_kept(body.as_bytes()), kept, "{body}");
        }
    }

    #[test]
    fn what_cannot_be_acted_on_says_why() {
        let no_event: [&[u8]; 6] = [b"", b"null", b"[]", b"{}", b"{\"type\":7}", b"\xff"];
        for body in no_event {
            assert_eq!(Envelope::parse(body), Err(Unusable::NotAnEvent));
        }
        for (body, what) in [
            (r#"{"type":"user.created","data":{}}"#, "user"),
            (r#"{"type":"user.deleted","data":{"id":null}}"#, "user"),
            (r#"{"type":"session.created","data":{"id":"sess_1"}}"#, "user"),
            (r#"{"type":"session.ended","data":{"user_id":"user_1"}}"#, "session"),
            (r#"{"type":"organizationMembership.created","data":{}}"#, "membership"),
            (
                r#"{"type":"organizationMembership.updated","data":{"id":"m","organization":7}}"#,
                "organization",
            ),
            (
                r#"{"type":"organizationMembership.deleted",
                    "data":{"id":"m","organization":{"id":"o"},"public_user_data":null}}"#,
                "user",
            ),
        ] {
            let fault = Envelope::parse(body.as_bytes()).unwrap_err();
            assert!(matches!(fault, Unusable::NoId { what: named, .. } if named == what), "{body}");
        }
        let fault = Envelope::parse(br#"{"type":"user.created"}"#).unwrap_err();
        assert_eq!(fault, Unusable::Data { kind: "user.created".into() });
    }
}
