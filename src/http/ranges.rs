//! Serving a stored file by RFC 9110: conditions (§13), single ranges (§14), and headers that keep
//! a browser from executing what users uploaded. actix-files shows inodes and differs by replica.

use std::{
    ops::Range,
    time::{Duration, SystemTime},
};

use actix_web::{
    HttpRequest, HttpResponse, HttpResponseBuilder, ResponseError,
    body::SizedStream,
    http::{
        Method, StatusCode,
        header::{self, HeaderName, HeaderValue, HttpDate},
    },
    web::Bytes,
};
use futures_util::{Stream, stream};

use super::problem::{Code, Problem};
use super::upload::is_xml;

/// A file as it is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServedFile {
    /// Lower-case hex; the strong entity tag.
    pub sha256: String,
    /// In bytes.
    pub size: u64,
    pub content_type: String,
    pub filename: String,
    /// When it was stored, in Unix seconds.
    pub modified: Option<i64>,
}

/// Answers GET or HEAD of `file`; `read` is asked for the bytes of one range, if any are needed.
/// Every outcome is a complete response, refusals included.
///
/// # Errors
/// What `read` says before the first byte; later the connection is all that can break off.
pub async fn serve<S, E>(
    req: &HttpRequest,
    file: &ServedFile,
    read: impl AsyncFnOnce(Range<u64>) -> Result<S, Problem>,
) -> Result<HttpResponse, Problem>
where
    S: Stream<Item = Result<Bytes, E>> + 'static,
    E: Into<Box<dyn std::error::Error>> + 'static,
{
    let (status, range) = match judge(req, file) {
        Verdict::Whole => (StatusCode::OK, 0..file.size),
        Verdict::Part(range) => (StatusCode::PARTIAL_CONTENT, range),
        Verdict::NotModified => {
            let mut response = HttpResponse::NotModified();
            return Ok(validators(&mut response, file).finish());
        }
        Verdict::Refused(code) => return Ok(refuse(code, file)),
    };
    let length = range.end - range.start;
    let mut response = head(file, status, &range);
    if req.method() == Method::HEAD {
        let nothing = stream::empty::<Result<_, E>>();
        return Ok(response.body(SizedStream::new(length, nothing)));
    }
    Ok(response.body(SizedStream::new(length, read(range).await?)))
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Whole,
    Part(Range<u64>),
    NotModified,
    Refused(Code),
}

/// The order of RFC 9110 §13.2.2.
fn judge(req: &HttpRequest, file: &ServedFile) -> Verdict {
    let text = |name| header_list(req, name);
    let date = |name| modified_since(req, name);
    let unchanged_since =
        |date: Option<u64>| date.zip(modified(file)).map(|(date, modified)| modified <= date);
    let refused = match text(header::IF_MATCH) {
        Some(tags) => !names_tag(&tags, file, Weak::Differs),
        None => unchanged_since(date(header::IF_UNMODIFIED_SINCE)) == Some(false),
    };
    if refused {
        return Verdict::Refused(Code::PreconditionFailed);
    }
    let known = match text(header::IF_NONE_MATCH) {
        Some(tags) => names_tag(&tags, file, Weak::Equals),
        None => unchanged_since(date(header::IF_MODIFIED_SINCE)) == Some(true),
    };
    if known {
        return Verdict::NotModified;
    }
    // Range is defined for GET alone (§14.2).
    if req.method() != Method::GET || !if_range_holds(req, file) {
        return Verdict::Whole;
    }
    match single_range(req).map(|asked| asked.within(file.size)) {
        None => Verdict::Whole,
        Some(Some(range)) => Verdict::Part(range),
        Some(None) => Verdict::Refused(Code::RangeNotSatisfiable),
    }
}

fn head(file: &ServedFile, status: StatusCode, range: &Range<u64>) -> HttpResponseBuilder {
    let content_type = HeaderValue::from_str(&file.content_type)
        .unwrap_or(HeaderValue::from_static("application/octet-stream"));
    let mut response = HttpResponse::build(status);
    validators(&mut response, file)
        .insert_header((header::CONTENT_TYPE, content_type))
        .insert_header((header::CONTENT_DISPOSITION, disposition(file)))
        .insert_header((header::X_CONTENT_TYPE_OPTIONS, "nosniff"))
        .insert_header((header::CONTENT_SECURITY_POLICY, "sandbox"))
        // Keeps the compressor off, which would break ranges and the tag; `edges` removes it.
        .insert_header((header::CONTENT_ENCODING, "identity"));
    if status == StatusCode::PARTIAL_CONTENT {
        let place = format!("bytes {}-{}/{}", range.start, range.end - 1, file.size);
        response.insert_header((header::CONTENT_RANGE, place));
    }
    response
}

fn validators<'a>(
    response: &'a mut HttpResponseBuilder,
    file: &ServedFile,
) -> &'a mut HttpResponseBuilder {
    response
        .insert_header((header::ETAG, tag(file)))
        .insert_header((header::ACCEPT_RANGES, "bytes"))
        .insert_header((header::CACHE_CONTROL, "private, max-age=3600"));
    if let Some(seconds) = modified(file) {
        let time = HttpDate::from(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
        response.insert_header((header::LAST_MODIFIED, time));
    }
    response
}

fn refuse(code: Code, file: &ServedFile) -> HttpResponse {
    let mut response = Problem::new(code).error_response();
    let headers = response.headers_mut();
    if let Ok(tag) = HeaderValue::from_str(&tag(file)) {
        headers.insert(header::ETAG, tag);
    }
    if code == Code::RangeNotSatisfiable {
        let length = HeaderValue::from_str(&format!("bytes */{}", file.size));
        headers.insert(header::CONTENT_RANGE, length.expect("a number is a header value"));
    }
    response
}

fn tag(file: &ServedFile) -> String {
    format!("\"{}\"", file.sha256)
}

/// Seconds within what an HTTP date can say.
fn modified(file: &ServedFile) -> Option<u64> {
    let year_9999 = 253_402_300_799;
    file.modified.and_then(|seconds| u64::try_from(seconds).ok()).filter(|it| *it <= year_9999)
}

fn header_list(req: &HttpRequest, name: HeaderName) -> Option<String> {
    let lines: Vec<&str> =
        req.headers().get_all(name).map(|value| value.to_str().unwrap_or("")).collect();
    (!lines.is_empty()).then(|| lines.join(","))
}

/// A date in Unix seconds; one that cannot be read is ignored (§13.1.3).
fn modified_since(req: &HttpRequest, name: HeaderName) -> Option<u64> {
    let mut lines = req.headers().get_all(name);
    let (first, None) = (lines.next()?, lines.next()) else { return None };
    unix_seconds(first.to_str().ok()?)
}

fn unix_seconds(date: &str) -> Option<u64> {
    let date: HttpDate = date.parse().ok()?;
    let since = SystemTime::from(date).duration_since(SystemTime::UNIX_EPOCH);
    since.ok().map(|since| since.as_secs())
}

#[derive(Clone, Copy, PartialEq)]
enum Weak {
    Equals,
    Differs,
}

/// Our tags hold no comma, so a list may be split at each.
fn names_tag(list: &str, file: &ServedFile, weak: Weak) -> bool {
    let ours = tag(file);
    list.split(',').map(str::trim).any(|item| {
        let item = match weak {
            Weak::Equals => item.strip_prefix("W/").unwrap_or(item),
            Weak::Differs => item,
        };
        item == "*" || item == ours
    })
}

/// §13.1.5: a strong tag or exactly our date, else the whole file.
fn if_range_holds(req: &HttpRequest, file: &ServedFile) -> bool {
    let Some(condition) = header_list(req, header::IF_RANGE) else { return true };
    let condition = condition.trim();
    condition == tag(file)
        || unix_seconds(condition).is_some_and(|date| Some(date) == modified(file))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    From { first: u64, last: u64 },
    Last(u64),
}

impl Asked {
    /// What of it the file has; nothing if it cannot be satisfied.
    fn within(self, size: u64) -> Option<Range<u64>> {
        let range = match self {
            Asked::From { first, last } => first..last.saturating_add(1).min(size),
            Asked::Last(count) => size.saturating_sub(count)..size,
        };
        (!range.is_empty()).then_some(range)
    }
}

/// One well-formed range; anything else is ignored, which §14.2 allows.
fn single_range(req: &HttpRequest) -> Option<Asked> {
    let list = header_list(req, header::RANGE)?;
    let (unit, range) = list.split_once('=')?;
    let (first, last) = range.trim().split_once('-')?;
    if !unit.trim().eq_ignore_ascii_case("bytes") {
        return None;
    }
    match (first, last) {
        ("", count) => Some(Asked::Last(digits(count)?)),
        (first, "") => Some(Asked::From { first: digits(first)?, last: u64::MAX }),
        (first, last) => {
            let (first, last) = (digits(first)?, digits(last)?);
            (first <= last).then_some(Asked::From { first, last })
        }
    }
}

/// A number too large to hold lies past every file, as u64::MAX does.
fn digits(text: &str) -> Option<u64> {
    let all = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    all.then(|| text.parse().unwrap_or(u64::MAX))
}

/// Inline only for media; SVG is a document with scripts, whatever its name says. RFC 6266, with
/// the name for old clients in ASCII and the real one by RFC 8187.
pub fn disposition(file: &ServedFile) -> String {
    let mime = file.content_type.to_ascii_lowercase();
    let media = ["audio/", "video/", "image/"].iter().any(|kind| mime.starts_with(kind));
    let kind = if media && !is_xml(&mime) { "inline" } else { "attachment" };
    let plain = |c: char| if c.is_ascii_graphic() || c == ' ' { c } else { '_' };
    // A percent sign in a plain name is decoded by some browsers; quotes and backslashes end it.
    let safe = |c: char| if matches!(c, '"' | '\\' | '%' | '/') { '_' } else { c };
    let ascii: String = file.filename.chars().map(plain).map(safe).collect();
    match ascii == file.filename {
        true => format!("{kind}; filename=\"{ascii}\""),
        false => format!("{kind}; filename=\"{ascii}\"; filename*=UTF-8''{}", ext(&file.filename)),
    }
}

/// RFC 8187 §3.2.1: all but `attr-char` is percent-encoded.
fn ext(name: &str) -> String {
    let mut out = String::new();
    for byte in name.bytes() {
        match byte.is_ascii_alphanumeric() || b"!#$&+-.^_`|~".contains(&byte) {
            true => out.push(char::from(byte)),
            false => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

#[cfg(test)]
#[path = "ranges_tests.rs"]
mod tests;
