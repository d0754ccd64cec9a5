//! Seals the personal fields of an event on its way into the log, and opens them on its way out.
//!
//! What is sealed is bound to its stream, its event's type and its place in the event, so that it
//! opens nowhere else. The places are dotted paths in the data, hence a record can be opened for
//! display without knowing its type.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::codec::{self, Error};
use crate::domain::Aggregate;
use crate::domain::ids::UserId;
use crate::domain::text::Visit;
use crate::media::vault::SealingKey;

/// What there is of a user's key.
#[derive(Clone)]
pub enum Holding {
    Key(SealingKey),
    /// It was destroyed, for ever.
    Erased,
}

/// Whose key an event is sealed with; none if there is nothing to seal.
///
/// # Errors
/// [`Error::BadData`] when it has personal fields and belongs to nobody.
pub fn owner_of<A: Aggregate>(stream: &str, event: &mut A::Event) -> Result<Option<UserId>, Error> {
    let mut known = false;
    A::personal(event, &mut |_, field| known |= field.clear().is_some());
    if !known {
        return Ok(None);
    }
    A::owner(id_of(stream), event).map(Some).ok_or_else(|| Error::BadData {
        kind: A::CATEGORY.to_owned(),
        what: "personal fields that are nobody's".to_owned(),
    })
}

/// Seals every known field of an event of this type, or erases it.
///
/// # Errors
/// The cipher refuses.
pub fn seal(
    holding: &Holding,
    stream: &str,
    kind: &str,
    personal: impl FnOnce(Visit<'_>),
) -> Result<(), Error> {
    let mut failed = None;
    personal(&mut |place, field| {
        let Some(clear) = field.clear() else { return };
        match holding {
            Holding::Erased => field.erase(),
            Holding::Key(key) => match key.seal(&bound_to(stream, kind, place), &clear) {
                Ok(sealed) => field.seal(STANDARD.encode(sealed)),
                Err(error) => failed = Some(bad(kind, place, error)),
            },
        }
    });
    failed.map_or(Ok(()), Err)
}

/// Makes every sealed field known, or erased if its key was.
///
/// # Errors
/// [`Error::BadData`] for a field that was sealed elsewhere, by another key, or is damaged.
pub fn open(
    holding: &Holding,
    stream: &str,
    kind: &str,
    personal: impl FnOnce(Visit<'_>),
) -> Result<(), Error> {
    let mut failed = None;
    personal(&mut |place, field| {
        if let Some(sealed) = field.sealed() {
            match opened(holding, stream, kind, place, sealed) {
                None => field.erase(),
                Some(Err(error)) => failed = Some(error),
                Some(Ok(json)) => {
                    if let Err(error) = field.reveal(&json) {
                        failed = Some(bad(kind, place, error));
                    }
                }
            }
        }
    });
    failed.map_or(Ok(()), Err)
}

/// Opens what is sealed in a record's data; what cannot be opened stays as it is.
pub fn open_json(holding: &Holding, stream: &str, kind: &str, data: &mut Value) {
    walk(String::new(), data, &mut |place, sealed| match opened(
        holding, stream, kind, place, sealed,
    ) {
        None => Some(json!({ "erased": true })),
        Some(Ok(bytes)) => serde_json::from_slice(&bytes).ok(),
        Some(Err(_)) => None,
    });
}

/// Whose a record's personal fields are, by its stream or its data.
pub fn owner_in_json(stream: &str, data: &Value) -> Option<UserId> {
    let id = match codec::category(stream) {
        "user" => id_of(stream),
        _ => data.get("user_id")?.as_str()?,
    };
    UserId::try_from(id.to_owned()).ok()
}

/// Whose key opens what is sealed in a record's data; none if nothing is.
pub fn owner_of_sealed(stream: &str, data: &[u8]) -> Option<UserId> {
    const MARK: &[u8] = br#""sealed""#;
    if !data.windows(MARK.len()).any(|part| part == MARK) {
        return None;
    }
    let (mut value, mut is_sealed) = (serde_json::from_slice(data).ok()?, false);
    walk(String::new(), &mut value, &mut |_, _| {
        is_sealed = true;
        None
    });
    if is_sealed { owner_in_json(stream, &value) } else { None }
}

/// `ada` of `user-ada`.
pub fn id_of(stream: &str) -> &str {
    stream.split_once('-').map_or("", |(_, id)| id)
}

/// None when the key was destroyed.
fn opened(
    holding: &Holding,
    stream: &str,
    kind: &str,
    place: &str,
    sealed: &str,
) -> Option<Result<Vec<u8>, Error>> {
    let Holding::Key(key) = holding else { return None };
    let bytes = STANDARD.decode(sealed).map_err(|error| bad(kind, place, error));
    Some(bytes.and_then(|bytes| {
        let name = bound_to(stream, kind, place);
        key.open(&name, &bytes).map_err(|error| bad(kind, place, error))
    }))
}

fn walk(place: String, value: &mut Value, open: &mut impl FnMut(&str, &str) -> Option<Value>) {
    let Value::Object(fields) = value else { return };
    if fields.len() == 1
        && let Some(sealed) = fields.get("sealed").and_then(Value::as_str)
    {
        if let Some(opened) = open(&place, sealed) {
            *value = opened;
        }
        return;
    }
    for (name, field) in fields {
        let place = if place.is_empty() { name.clone() } else { format!("{place}.{name}") };
        walk(place, field, open);
    }
}

/// No part can hold a line break.
fn bound_to(stream: &str, kind: &str, place: &str) -> String {
    [stream, kind, place].join("\n")
}

fn bad(kind: &str, place: &str, what: impl std::fmt::Display) -> Error {
    Error::BadData { kind: kind.to_owned(), what: format!("its {place}: {what}") }
}
