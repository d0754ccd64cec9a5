//! A whole log as text, one JSON document a line: a [`Header`], then every event in order.
//!
//! An event's data and metadata are opaque to the log, so they travel as JSON *strings* that hold
//! their exact bytes; as JSON values they would come back with other spaces, and other hashes. Bytes
//! that are not UTF-8 travel as base64 under another name. The order of the fields is fixed, so
//! that the same log is always the same text.

use std::io::{self, BufRead, Read, Write};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use chrono::{DateTime, SecondsFormat, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{MAX_BYTES, Recorded};

/// What the header's `format` says.
pub const FORMAT: &str = "t2m-log";
/// The newest form known here.
pub const VERSION: u32 = 1;
/// A byte is six characters at the most, and an event has two parts.
const LONGEST_LINE: u64 = 2 * 6 * MAX_BYTES as u64 + 65_536;

/// The first line: how much must follow, so that a cut text is known for one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    pub format: String,
    pub version: u32,
    pub events: u64,
    /// The last event's, 0 when there is none.
    pub position: u64,
    /// The last event's hash in hex, that of an empty log when there is none.
    pub head_hash: String,
}

impl Header {
    pub fn new(events: u64, position: u64, head_hash: &[u8; 32]) -> Self {
        let head_hash = hex::encode(head_hash);
        Self { format: FORMAT.to_owned(), version: VERSION, events, position, head_hash }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("line {line}: {what}")]
    Line { line: u64, what: String },
    #[error(transparent)]
    Io(#[from] io::Error),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line<'a> {
    id: Uuid,
    #[serde(borrow)]
    stream: Text<'a>,
    revision: u64,
    position: u64,
    #[serde(borrow, rename = "type")]
    kind: Text<'a>,
    #[serde(borrow)]
    time: Text<'a>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    data: Option<Text<'a>>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    data_base64: Option<Text<'a>>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    metadata: Option<Text<'a>>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    metadata_base64: Option<Text<'a>>,
    #[serde(borrow)]
    hash: Text<'a>,
}

/// Borrowed where the text has no escapes.
#[derive(Serialize, Deserialize)]
#[serde(transparent)]
struct Text<'a>(#[serde(borrow)] std::borrow::Cow<'a, str>);

impl<'a> From<&'a str> for Text<'a> {
    fn from(text: &'a str) -> Self {
        Self(text.into())
    }
}

/// Writes the first line.
///
/// # Errors
/// The writer's.
pub fn write_header(to: &mut impl Write, header: &Header) -> io::Result<()> {
    serde_json::to_writer(&mut *to, header)?;
    to.write_all(b"\n")
}

/// Writes one event's line.
///
/// # Errors
/// The writer's.
pub fn write_event(to: &mut impl Write, event: &Recorded) -> io::Result<()> {
    let (data, data_base64) = exactly(&event.data);
    let (metadata, metadata_base64) = exactly(&event.metadata);
    let line = Line {
        id: event.id,
        stream: (&*event.stream).into(),
        revision: event.revision,
        position: event.position,
        kind: (&*event.kind).into(),
        time: Text(event.time.to_rfc3339_opts(SecondsFormat::Micros, true).into()),
        data,
        data_base64,
        metadata,
        metadata_base64,
        hash: Text(hex::encode(event.hash).into()),
    };
    serde_json::to_writer(&mut *to, &line)?;
    to.write_all(b"\n")
}

fn exactly(bytes: &[u8]) -> (Option<Text<'_>>, Option<Text<'_>>) {
    match std::str::from_utf8(bytes) {
        Ok(text) => (Some(text.into()), None),
        Err(_) => (None, Some(Text(STANDARD.encode(bytes).into()))),
    }
}

/// Reads such a text, a line at a time.
pub struct Lines<R> {
    from: R,
    /// Of the line read last; the first is 1.
    number: u64,
    line: Vec<u8>,
}

impl<R: BufRead> Lines<R> {
    pub fn new(from: R) -> Self {
        Self { from, number: 0, line: Vec::new() }
    }

    /// The number of the line read last.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// The first line.
    ///
    /// # Errors
    /// It is no header, or one of a newer version.
    pub fn header(&mut self) -> Result<Header, Error> {
        let is_none = |found: &str| format!("not an exported log: {found}");
        if !self.next_line()? {
            return Err(self.bad(is_none("it is empty")));
        }
        let header: Header = serde_json::from_slice(&self.line)
            .map_err(|_| self.bad(is_none("its first line is no header")))?;
        if header.format != FORMAT {
            return Err(self.bad(is_none("its header names another format")));
        }
        match header.version {
            VERSION => Ok(header),
            version => Err(self.bad(format!(
                "the export is of version {version} and this program knows version {VERSION}; \
                 use a newer program"
            ))),
        }
    }

    /// The next event; none at the end of the text.
    ///
    /// # Errors
    /// A line that is no event, or was cut.
    pub fn event(&mut self) -> Result<Option<Recorded>, Error> {
        if !self.next_line()? {
            return Ok(None);
        }
        match parse(&self.line) {
            Ok(event) => Ok(Some(event)),
            Err(what) => Err(self.bad(format!("not an event: {what}"))),
        }
    }

    /// An error about the line read last.
    pub fn bad(&self, what: impl Into<String>) -> Error {
        Error::Line { line: self.number, what: what.into() }
    }

    fn next_line(&mut self) -> Result<bool, Error> {
        self.line.clear();
        self.number += 1;
        let read = (&mut self.from).take(LONGEST_LINE).read_until(b'\n', &mut self.line)?;
        match self.line.last() {
            None => Ok(false),
            Some(b'\n') => Ok(true),
            Some(_) if read as u64 == LONGEST_LINE => Err(self.bad("it is too long for an event")),
            Some(_) => Err(self.bad("the text was cut in the middle of this line")),
        }
    }
}

fn parse(line: &[u8]) -> Result<Recorded, String> {
    // Serde's words name the field and the column.
    let line: Line = serde_json::from_slice(line).map_err(|error| error.to_string())?;
    let time = DateTime::parse_from_rfc3339(&line.time.0).map_err(|_| "its time is none")?;
    let mut hash = [0; 32];
    hex::decode_to_slice(&*line.hash.0, &mut hash).map_err(|_| "its hash is none")?;
    Ok(Recorded {
        id: line.id,
        stream: (&*line.stream.0).into(),
        revision: line.revision,
        position: line.position,
        kind: (&*line.kind.0).into(),
        time: whole_microseconds(time.to_utc())?,
        data: bytes("data", line.data, line.data_base64)?.into(),
        metadata: bytes("metadata", line.metadata, line.metadata_base64)?.into(),
        hash,
    })
}

/// Finer ones are not stored, so that a hash over them would not be found again.
fn whole_microseconds(time: DateTime<Utc>) -> Result<DateTime<Utc>, String> {
    match time.timestamp_subsec_nanos() % 1000 {
        0 => Ok(time),
        _ => Err("its time is finer than a microsecond".to_owned()),
    }
}

fn bytes(name: &str, text: Option<Text>, base64: Option<Text>) -> Result<Vec<u8>, String> {
    match (text, base64) {
        (Some(text), None) => Ok(text.0.into_owned().into_bytes()),
        (None, Some(text)) => {
            STANDARD.decode(&*text.0).map_err(|_| format!("its {name} is not base64"))
        }
        _ => Err(format!("it must have its {name} once")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    fn event() -> Recorded {
        Recorded {
            id: Uuid::from_u128(7),
            stream: "job-1".into(),
            revision: 0,
            position: 1,
            kind: "job.requested.v1".into(),
            time: DateTime::from_timestamp_micros(1_700_000_000_000_001).unwrap(),
            data: b"{ \"a\" : 1.0e1 }".to_vec().into(),
            metadata: vec![0xff, 0, b'"'].into(),
            hash: [9; 32],
        }
    }

    fn text(events: &[Recorded]) -> Vec<u8> {
        let mut text = Vec::new();
        write_header(&mut text, &Header::new(events.len() as u64, 1, &[9; 32])).unwrap();
        events.iter().for_each(|event| write_event(&mut text, event).unwrap());
        text
    }

    #[test]
    fn an_event_comes_back_byte_by_byte_whatever_it_holds() {
        let text = text(&[event()]);
        let mut lines = Lines::new(&text[..]);
        assert_eq!(lines.header().unwrap(), Header::new(1, 1, &[9; 32]));
        assert_eq!(lines.event().unwrap(), Some(event()));
        assert_eq!(lines.event().unwrap(), None);
    }

    #[test]
    fn a_line_of_an_export_reads_like_this() {
        let event = Recorded { metadata: Bytes::from_static(b"{}"), hash: [0xab; 32], ..event() };
        let text = text(&[event]);
        let line = std::str::from_utf8(&text).unwrap().lines().nth(1).unwrap();
        let hash = "ab".repeat(32);
        assert_eq!(
            line,
            format!(
                r#"{{"id":"00000000-0000-0000-0000-000000000007","stream":"job-1","revision":0,"position":1,"type":"job.requested.v1","time":"2023-11-14T22:13:20.000001Z","data":"{{ \"a\" : 1.0e1 }}","metadata":"{{}}","hash":"{hash}"}}"#
            )
        );
    }

    #[test]
    fn what_is_no_export_is_refused_with_the_line() {
        let check = |text: &str, expected: &str| {
            let mut lines = Lines::new(text.as_bytes());
            let found = lines.header().and_then(|_| lines.event()).unwrap_err().to_string();
            assert!(found.starts_with(expected), "{text}: {found}");
        };
        let header = String::from_utf8(text(&[])).unwrap();
        check("", "line 1: not an exported log: it is empty");
        check("{}\n", "line 1: not an exported log: its first line is no header");
        check(&header.replace("t2m-log", "x"), "line 1: not an exported log: its header names");
        check(&header.replace(":1,", ":2,"), "line 1: the export is of version 2");
        check(header.trim_end(), "line 1: the text was cut in the middle");
        check(&format!("{header}{{}}\n"), "line 2: not an event: missing field `id`");
        let whole = String::from_utf8(text(&[event()])).unwrap();
        check(&whole[..whole.len() - 1], "line 2: the text was cut in the middle");
        check(&whole.replace("0001Z", "00015Z"), "line 2: not an event: its time is finer");
        check(&whole.replace("0909", "09zz"), "line 2: not an event: its hash is none");
        check(&whole.replace("metadata_base64", "data_base64"), "line 2: not an event: it must");
        check(&whole.replace("\"data\"", "\"date\""), "line 2: not an event: unknown field");
    }

    #[test]
    fn the_largest_event_is_read_and_a_longer_line_is_refused() {
        // Each of these bytes is six characters in JSON.
        let (data, metadata) = (vec![1; MAX_BYTES], vec![2; MAX_BYTES]);
        let largest = Recorded { data: data.into(), metadata: metadata.into(), ..event() };
        let mut lines = text(std::slice::from_ref(&largest));
        let mut read = Lines::new(&lines[..]);
        read.header().unwrap();
        assert!(read.event().unwrap() == Some(largest));
        assert_eq!(read.number(), 2);
        lines.truncate(lines.len() - 1);
        lines.resize(lines.len() + 65_536, b' ');
        let mut read = Lines::new(&lines[..]);
        read.header().unwrap();
        let error = read.event().unwrap_err().to_string();
        assert_eq!(error, "line 2: it is too long for an event");
    }

    #[test]
    fn bytes_that_are_no_base64_are_refused() {
        let whole = String::from_utf8(text(&[event()])).unwrap();
        let broken = whole.replace("/wAi", "/wA!");
        assert_ne!(broken, whole);
        let mut lines = Lines::new(broken.as_bytes());
        lines.header().unwrap();
        let error = lines.event().unwrap_err().to_string();
        assert_eq!(error, "line 2: not an event: its metadata is not base64");
    }
}
