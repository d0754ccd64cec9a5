//! What is in the log as a whole, and whether the chain holds.

use std::collections::BTreeMap;

use chrono::DateTime;
use tokio::sync::Mutex;

use super::reader::{Lease, Query, Readers, newest};
use crate::log::{Error, GENESIS, Progress, Stats, Verified, bad, check_next, from_sql, to_sql};

/// Events that one statement counts, so that each ends within its deadline.
const COUNTED: u64 = 200_000;
/// Events that a verification reads at once.
const VERIFIED: usize = 2000;

/// Events counted so far; each call for stats counts on from there.
#[derive(Default)]
pub(super) struct Tally {
    upto: u64,
    streams: u64,
    types: BTreeMap<String, u64>,
    /// Microseconds.
    first: Option<i64>,
    last: Option<i64>,
}

impl Tally {
    async fn count_to(&mut self, head: u64, lease: &Lease<'_>) -> Result<(), Error> {
        let session = &lease.reader()?.session;
        while self.upto < head {
            let upto = head.min(self.upto + COUNTED);
            let range = [to_sql(self.upto), to_sql(upto)];
            let (after, end) = (&range[0], &range[1]);
            // Streams are numbered by the position of their first event.
            let streams = "SELECT count(*) FROM t2m.streams WHERE id > $1 AND id <= $2";
            let streams = session.within(session.client.query_one(streams, &[after, end])).await?;
            let types = "SELECT t.name, c.count FROM (
                    SELECT type_id, count(*) FROM t2m.events
                    WHERE position > $1 AND position <= $2 GROUP BY type_id
                ) c JOIN t2m.types t ON t.id = c.type_id";
            let types = session.within(session.client.query(types, &[after, end])).await?;
            let ends = "SELECT (SELECT time FROM t2m.events WHERE position = $1::bigint + 1),
                               (SELECT time FROM t2m.events WHERE position = $2)";
            let ends = session.within(session.client.query_one(ends, &[after, end])).await?;
            self.first = self.first.or(ends.get(0));
            self.last = ends.get(1);
            self.streams += from_sql(streams.get(0));
            for row in types {
                *self.types.entry(row.get(0)).or_default() += from_sql(row.get(1));
            }
            self.upto = upto;
        }
        Ok(())
    }
}

pub(super) async fn stats(readers: &Readers, tally: &Mutex<Tally>) -> Result<Stats, Error> {
    let mut tally = tally.lock().await;
    let lease = readers.lease().await?;
    let session = &lease.reader()?.session;
    let head = newest(session).await?;
    tally.count_to(head.position, &lease).await?;
    readers.shared.saw(head);
    let size =
        "SELECT (pg_total_relation_size('t2m.events') + pg_total_relation_size('t2m.streams')
                + pg_total_relation_size('t2m.types'))::bigint";
    let size = session.within(session.client.query_one(size, &[])).await?;
    let stats = Stats {
        // Positions have no gaps.
        events: tally.upto,
        streams: tally.streams,
        position: head.position,
        head_hash: head.hash,
        bytes: from_sql(size.get(0)),
        types: tally.types.clone(),
        first: tally.first.and_then(DateTime::from_timestamp_micros),
        last: tally.last.and_then(DateTime::from_timestamp_micros),
    };
    lease.give_back(readers);
    Ok(stats)
}

/// Walks the chain after `after`, whose own hash is believed, up to the end, which must not be before
/// `head`. This engine leaves no gaps, so a missing position is damage.
pub(super) async fn verify(
    readers: &Readers,
    after: u64,
    head: u64,
    mut progress: Progress,
) -> Result<Verified, Error> {
    let (mut position, mut hash) = (after, GENESIS);
    if let Some(before) = after.checked_sub(1) {
        let found = readers.fetch(&Query::All { after: before, limit: 1 }).await?;
        let begin = found.first().filter(|event| event.position == after);
        hash = begin.ok_or_else(|| bad(after, "the event is missing"))?.hash;
    }
    loop {
        let page = readers.fetch(&Query::All { after: position, limit: VERIFIED }).await?;
        for event in &page {
            check_next(event, position, &hash)?;
            (position, hash) = (event.position, event.hash);
        }
        progress(position);
        if page.is_empty() {
            break;
        }
    }
    if position < head {
        return Err(bad(position + 1, "the event is missing"));
    }
    Ok(Verified { events: position - after, head_hash: hash })
}
