//! Moments, as events hold them.

use std::fmt;

use chrono::{DateTime, Utc};
use serde::Deserializer;
use serde::de::{Error, Visitor};

/// Reads what chrono's own `Deserialize` reads, RFC 3339 and its relatives, but tries the strict form
/// first, in which all events are written: that takes a third of the time, and a replay reads
/// millions of them.
///
/// # Errors
/// The text is no moment.
pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<DateTime<Utc>, D::Error> {
    from.deserialize_str(Moment)
}

struct Moment;

impl Visitor<'_> for Moment {
    type Value = DateTime<Utc>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a moment (RFC 3339)")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
        match DateTime::parse_from_rfc3339(text) {
            Ok(moment) => Ok(moment.to_utc()),
            Err(_) => text.parse().map_err(E::custom),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;
    use serde_json::json;

    use super::*;

    #[derive(Debug, Deserialize, PartialEq)]
    struct Event(#[serde(deserialize_with = "deserialize")] DateTime<Utc>);

    #[test]
    fn a_moment_is_read_as_chrono_reads_it() {
        for text in [
            "2026-11-22T03:04:05Z",
            "2026-11-22T03:04:05.123456Z",
            "2026-11-22T05:04:05+02:00",
            "2026-11-22 03:04:05 UTC",
            "1969-12-31T23:59:59.5Z",
        ] {
            let read: Event = serde_json::from_value(json!(text)).unwrap();
            assert_eq!(read, Event(serde_json::from_value(json!(text)).unwrap()), "{text}");
        }
        for bad in [json!("soon"), json!(7), json!("2026-13-01T00:00:00Z"), json!(null)] {
            assert!(serde_json::from_value::<Event>(bad.clone()).is_err(), "{bad}");
        }
        let error = serde_json::from_value::<Event>(json!(7)).unwrap_err().to_string();
        assert!(error.ends_with("expected a moment (RFC 3339)"), "{error}");
    }
}
