//! Reading: a few connections and the pages read over them.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use bytestring::ByteString;
use chrono::DateTime;
use futures_util::TryStreamExt;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::timeout;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Row, Statement};

use super::connection::{Session, failed, late};
use super::{Seen, Shared};
use crate::log::{Error, GENESIS, Recorded, bad, from_sql, guard, to_sql};

/// Reads that run at the same time, each on a connection.
const READERS: usize = 4;

/// A row as [`decode`] takes it. Outer joins: a name that is missing must not hide the event.
const SELECT: &str = "
    SELECT e.position, s.name, e.revision, t.name, e.id, e.time, e.hash, e.data, e.metadata
    FROM t2m.events e
    LEFT JOIN t2m.streams s ON s.id = e.stream_id
    LEFT JOIN t2m.types t ON t.id = e.type_id";

/// A page of events.
pub(super) enum Query {
    All { after: u64, limit: usize },
    Stream { stream: String, from: u64, limit: usize },
}

pub(super) struct Readers {
    pub(super) shared: Arc<Shared>,
    idle: Mutex<Vec<Reader>>,
    permits: Semaphore,
}

impl Readers {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, idle: Mutex::default(), permits: Semaphore::new(READERS) }
    }

    pub(super) async fn fetch(&self, query: &Query) -> Result<Vec<Recorded>, Error> {
        let mut lease = self.lease().await?;
        let answer = match lease.reader()?.fetch(query).await {
            // It may have broken long ago, while nobody used it.
            Err(Error::Storage(_)) if lease.used => {
                lease.renew(self).await?;
                lease.reader()?.fetch(query).await
            }
            answer => answer,
        };
        if answer.is_ok() {
            lease.give_back(self);
        }
        answer
    }

    /// The end of the log, as the server says it now; the others know it, too, from then on.
    pub(super) async fn newest(&self) -> Result<Seen, Error> {
        let mut lease = self.lease().await?;
        let newest = match newest(&lease.reader()?.session).await {
            Err(Error::Storage(_)) if lease.used => {
                lease.renew(self).await?;
                newest(&lease.reader()?.session).await?
            }
            answer => answer?,
        };
        lease.give_back(self);
        self.shared.saw(newest);
        Ok(newest)
    }

    /// A connection of one's own until the lease is dropped.
    pub(super) async fn lease(&self) -> Result<Lease<'_>, Error> {
        self.shared.condition.check_stopped()?;
        let permit = self.permits.acquire().await;
        let permit = permit.map_err(|_| Error::Storage("the log is closed".into()))?;
        let idle = guard(&self.idle).pop();
        let used = idle.is_some();
        let mut lease = Lease { reader: idle, used, _permit: permit };
        if !used {
            lease.renew(self).await?;
        }
        Ok(lease)
    }
}

/// A reader that is given back after a success only: what else may still come over its connection
/// is not known.
pub(super) struct Lease<'a> {
    reader: Option<Reader>,
    /// Whether the connection was there before.
    used: bool,
    _permit: SemaphorePermit<'a>,
}

impl Lease<'_> {
    pub(super) fn reader(&self) -> Result<&Reader, Error> {
        self.reader.as_ref().ok_or_else(|| Error::Storage("no connection".into()))
    }

    pub(super) fn give_back(mut self, readers: &Readers) {
        guard(&readers.idle).extend(self.reader.take());
    }

    async fn renew(&mut self, readers: &Readers) -> Result<(), Error> {
        // The others were idle as long, and broke with it.
        guard(&readers.idle).clear();
        self.reader = Some(Reader::open(&readers.shared).await?);
        Ok(())
    }
}

pub(super) struct Reader {
    pub(super) session: Session,
    all: Statement,
    stream: Statement,
    wait: std::time::Duration,
}

impl Reader {
    async fn open(shared: &Arc<Shared>) -> Result<Self, Error> {
        let session = Session::open(shared).await?;
        let all = format!("{SELECT} WHERE e.position > $1 ORDER BY e.position LIMIT $2");
        let stream = format!(
            "{SELECT} WHERE e.stream_id = (SELECT id FROM t2m.streams WHERE name = $1)
             AND e.revision >= $2 ORDER BY e.revision LIMIT $3"
        );
        Ok(Self {
            all: session.within(session.client.prepare(&all)).await?,
            stream: session.within(session.client.prepare(&stream)).await?,
            session,
            wait: shared.deadlines.statement,
        })
    }

    pub(super) async fn fetch(&self, query: &Query) -> Result<Vec<Recorded>, Error> {
        match query {
            Query::All { after, limit } => {
                self.rows(&self.all, &[&to_sql(*after), &to_sql(*limit as u64)]).await
            }
            Query::Stream { stream, from, limit } => {
                let (from, limit) = (to_sql(*from), to_sql(*limit as u64));
                self.rows(&self.stream, &[stream, &from, &limit]).await
            }
        }
    }

    /// The deadline is for each row: a long page over a slow line is no fault.
    async fn rows(
        &self,
        statement: &Statement,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Recorded>, Error> {
        let answer = self.session.client.query_raw(statement, parameters.iter().copied());
        let rows = self.session.within(answer).await?;
        let mut rows = std::pin::pin!(rows);
        let (mut events, mut names) = (Vec::new(), HashSet::new());
        loop {
            let row = timeout(self.wait, rows.try_next()).await.map_err(|_| late())?;
            let Some(row) = row.map_err(failed)? else { return Ok(events) };
            events.push(decode(&row, &mut names)?);
        }
    }
}

/// A row of [`SELECT`]; names that were met before are shared.
fn decode(row: &Row, names: &mut HashSet<ByteString>) -> Result<Recorded, Error> {
    let position = from_sql(row.try_get(0).map_err(failed)?);
    let stream = name(row, 1, names).ok_or_else(|| bad(position, "its stream has no name"))?;
    let kind = name(row, 3, names).ok_or_else(|| bad(position, "its type has no name"))?;
    let revision: i64 = row.try_get(2).map_err(failed)?;
    let bytes = |at| row.try_get::<_, &[u8]>(at).map_err(failed);
    Ok(Recorded {
        id: row.try_get(4).map_err(failed)?,
        stream,
        revision: u64::try_from(revision).map_err(|_| bad(position, "its revision is negative"))?,
        position,
        kind,
        time: DateTime::from_timestamp_micros(row.try_get(5).map_err(failed)?)
            .ok_or_else(|| bad(position, "its time is out of range"))?,
        data: Bytes::copy_from_slice(bytes(7)?),
        metadata: Bytes::copy_from_slice(bytes(8)?),
        hash: bytes(6)?.try_into().map_err(|_| bad(position, "its hash has not 32 bytes"))?,
    })
}

fn name(row: &Row, at: usize, names: &mut HashSet<ByteString>) -> Option<ByteString> {
    let name: &str = row.try_get::<_, Option<&str>>(at).ok()??;
    if let Some(known) = names.get(name) {
        return Some(known.clone());
    }
    let name: ByteString = name.into();
    names.insert(name.clone());
    Some(name)
}

/// What finds the end of the log.
pub(super) const NEWEST: &str =
    "SELECT position, hash FROM t2m.events ORDER BY position DESC LIMIT 1";

/// The end of the log.
pub(super) async fn newest(session: &Session) -> Result<Seen, Error> {
    let row = session.within(session.client.query_opt(NEWEST, &[])).await?;
    seen(row.as_ref())
}

/// The end of the log, from the answer to [`NEWEST`].
pub(super) fn seen(row: Option<&Row>) -> Result<Seen, Error> {
    let Some(row) = row else { return Ok(Seen { position: 0, hash: GENESIS }) };
    let position = from_sql(row.try_get(0).map_err(failed)?);
    let hash = row.try_get::<_, &[u8]>(1).map_err(failed)?.try_into();
    let hash = hash.map_err(|_| bad(position, "its hash has not 32 bytes"))?;
    Ok(Seen { position, hash })
}
