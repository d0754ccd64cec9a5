//! Which events a command is about.

use anyhow::Context;
use chrono::{DateTime, Utc};
use clap::Args;
use serde_json::Value;

use crate::domain::{self, user::User};
use crate::log::{self, EventLog, Recorded};

const PAGE: usize = 500;

#[derive(Args, Clone, Default)]
pub struct Selection {
    /// Only this stream, such as `job-0198…`
    #[arg(long)]
    stream: Option<String>,
    /// Only types that begin so, such as `job.` or `job.failed.v1`
    #[arg(long = "type", value_name = "TYPE")]
    kind: Option<String>,
    /// Only events after this position
    #[arg(long, value_name = "POSITION")]
    from: Option<u64>,
    /// Only events up to this position
    #[arg(long, default_value_t = u64::MAX, value_name = "POSITION", hide_default_value = true)]
    to: u64,
    /// Only events of this time (RFC 3339) and later
    #[arg(long, value_name = "TIME", value_parser = time)]
    since: Option<DateTime<Utc>>,
    /// Only events before this time (RFC 3339)
    #[arg(long, value_name = "TIME", value_parser = time)]
    until: Option<DateTime<Utc>>,
    /// Only events of this user's stream, and those whose data names the user
    #[arg(long, value_name = "ID")]
    user: Option<String>,
    /// Only events that this request brought about (its `X-Request-Id`)
    #[arg(long, value_name = "ID")]
    correlation: Option<String>,
}

fn time(text: &str) -> Result<DateTime<Utc>, String> {
    let time = DateTime::parse_from_rfc3339(text);
    Ok(time.map_err(|_| "not a time such as 2026-11-21T19:30:00Z")?.to_utc())
}

/// Whether the walk shall go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    GoOn,
    Stop,
}

impl Selection {
    pub fn everything() -> Self {
        Self { to: u64::MAX, ..Self::default() }
    }

    /// Everything there is.
    pub fn is_all(&self) -> bool {
        let Self {
            stream,
            kind,
            from: None | Some(0),
            to: u64::MAX,
            since,
            until,
            user,
            correlation,
        } = self
        else {
            return false;
        };
        [stream, kind, user, correlation].iter().all(|text| text.is_none())
            && since.is_none()
            && until.is_none()
    }

    /// The position after which it is to begin.
    pub fn from(&self) -> Option<u64> {
        self.from
    }

    /// The last position that it is about.
    pub fn to(&self) -> u64 {
        self.to
    }

    pub fn wants(&self, event: &Recorded) -> bool {
        let Self { stream, kind, from, to, since, until, user, correlation } = self;
        stream.as_deref().is_none_or(|stream| *event.stream == *stream)
            && kind.as_deref().is_none_or(|kind| event.kind.starts_with(kind))
            && (from.unwrap_or(0) < event.position && event.position <= *to)
            && since.is_none_or(|since| event.time >= since)
            && until.is_none_or(|until| event.time < until)
            && user.as_deref().is_none_or(|user| {
                *event.stream == *domain::stream::<User>(user)
                    || names(&event.data, "user_id", user)
            })
            && correlation.as_deref().is_none_or(|id| names(&event.metadata, "correlation_id", id))
    }

    /// Hands the events to `visit`, in the log's order or in the opposite one. A stream is read by
    /// its index; everything else means to walk the log between the two positions.
    pub async fn walk(
        &self,
        log: &dyn EventLog,
        reverse: bool,
        mut visit: impl FnMut(&Recorded) -> anyhow::Result<Then>,
    ) -> anyhow::Result<()> {
        let mut visit = |events: Vec<Recorded>| {
            let mut wanted: Vec<_> = events.iter().filter(|event| self.wants(event)).collect();
            if reverse {
                wanted.reverse();
            }
            for event in wanted {
                if visit(event)? == Then::Stop {
                    return Ok(Then::Stop);
                }
            }
            anyhow::Ok(Then::GoOn)
        };
        if let Some(stream) = &self.stream {
            return walk_stream(log, stream, self.to, reverse, &mut visit).await;
        }
        let (start, end) = (self.from.unwrap_or(0), self.to.min(*log.head().borrow()));
        match reverse {
            false => walk_on(log, start, end, &mut visit).await,
            true => walk_back(log, start, end, &mut visit).await,
        }
    }
}

async fn walk_on(
    log: &dyn EventLog,
    mut low: u64,
    end: u64,
    visit: &mut impl FnMut(Vec<Recorded>) -> anyhow::Result<Then>,
) -> anyhow::Result<()> {
    while low < end {
        let page = log::read_up_to_damage(log, low, PAGE).await;
        let mut events = page.context("reading the log")?;
        let Some(last) = events.last() else { break };
        low = last.position;
        events.retain(|event| event.position <= end);
        if visit(events)? == Then::Stop {
            break;
        }
    }
    Ok(())
}

/// The log is read onwards only, so that this goes back by windows. Where positions have gaps, how
/// wide they must be shows as it goes.
async fn walk_back(
    log: &dyn EventLog,
    start: u64,
    mut high: u64,
    visit: &mut impl FnMut(Vec<Recorded>) -> anyhow::Result<Then>,
) -> anyhow::Result<()> {
    let mut width = PAGE as u64;
    while start < high {
        let low = start.max(high.saturating_sub(width));
        let mut window = Vec::new();
        walk_on(log, low, high, &mut |events| {
            window.extend(events);
            Ok(Then::GoOn)
        })
        .await?;
        if window.len() < PAGE / 4 {
            width = width.saturating_mul(4);
        } else if window.len() > PAGE * 4 {
            width /= 4;
        }
        if visit(window)? == Then::Stop {
            break;
        }
        high = low;
    }
    Ok(())
}

/// A stream is what happened to one entity: short enough to be held whole where it is turned round.
async fn walk_stream(
    log: &dyn EventLog,
    stream: &str,
    end: u64,
    reverse: bool,
    visit: &mut impl FnMut(Vec<Recorded>) -> anyhow::Result<Then>,
) -> anyhow::Result<()> {
    let (mut next, mut held, mut limit, mut reached) = (0, Vec::new(), PAGE, 0);
    while reached < end {
        let page = match log.read_stream(stream, next, limit).await {
            // A page with a damaged event is not given at all: what lies before it is read one by one.
            Err(log::Error::Corrupt { .. }) if limit > 1 => {
                limit = 1;
                continue;
            }
            Err(log::Error::Corrupt { position, .. }) if position > end => break,
            page => page.context("reading the log")?,
        };
        let Some(last) = page.last() else { break };
        (next, reached) = (last.revision + 1, last.position);
        if reverse {
            held.extend(page);
        } else if visit(page)? == Then::Stop {
            return Ok(());
        }
    }
    visit(held).map(|_| ())
}

fn names(json: &[u8], field: &str, text: &str) -> bool {
    // Most events say nothing of it; only the others are parsed.
    contains(json, text.as_bytes())
        && serde_json::from_slice::<Value>(json)
            .is_ok_and(|json| json[field].as_str() == Some(text))
}

fn contains(bytes: &[u8], wanted: &[u8]) -> bool {
    !wanted.is_empty() && bytes.windows(wanted.len()).any(|window| window == wanted)
}
