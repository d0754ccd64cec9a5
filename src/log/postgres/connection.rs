//! One connection: opened, checked to lead to the log that this node knows, and given up as soon as
//! anything about it is in doubt.

use std::future::{Future, poll_fn};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_postgres::error::SqlState;
use tokio_postgres::{AsyncMessage, Client, Connection, Socket};

use super::tls::Encrypted;
use super::{CHANNEL, Shared, schema};
use crate::log::{Error, to_sql};

/// An open connection and the task that drives it. Dropping it closes the socket, whatever is under
/// way on it.
pub(super) struct Session {
    pub(super) client: Client,
    driver: JoinHandle<()>,
    deadline: Duration,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Session {
    /// A connection whose log may not be there yet.
    pub(super) async fn unchecked(shared: &Arc<Shared>) -> Result<Self, Error> {
        let connecting = shared.address.config.connect(shared.tls.clone());
        let (client, connection) = match timeout(shared.deadlines.connect, connecting).await {
            Ok(connected) => connected.map_err(|error| explain(&error))?,
            Err(_) => return Err(Error::Storage("no answer to the connection in time".into())),
        };
        let driver = tokio::spawn(drive(Arc::clone(shared), connection));
        let session = Self { client, driver, deadline: shared.deadlines.statement };
        // A node that stops in the middle of a commit must not hold up the others; a search path
        // or an isolation that somebody has set for the role must not change what is meant here.
        let set = format!(
            "SET search_path = t2m, pg_catalog;
             SET default_transaction_isolation = 'read committed';
             SET idle_in_transaction_session_timeout = {};
             SELECT set_config('synchronous_commit', 'on', false)
             WHERE current_setting('synchronous_commit') = 'off'",
            session.deadline.as_millis()
        );
        session.within(session.client.batch_execute(&set)).await?;
        Ok(session)
    }

    /// A connection to the log that this node has opened.
    ///
    /// # Errors
    /// [`Error::Storage`] when the server cannot be reached. [`Error::Foreign`] when it has another
    /// log now, or less of it than was seen here: the handle is stopped then.
    pub(super) async fn open(shared: &Arc<Shared>) -> Result<Self, Error> {
        let mut session = Self::unchecked(shared).await?;
        let place = shared.address.shown();
        let deadline = session.deadline;
        let known = shared.identity.get().copied();
        let checked = async {
            let found = schema::inspect(&session.client, &place).await?;
            if found.map(|(_, identity)| identity) != known {
                return Err(shared.condition.stop(&format!("{place} holds another log now")));
            }
            let seen = shared.seen();
            if seen.position == 0 {
                return Ok(());
            }
            let sql = "SELECT hash FROM t2m.events WHERE position = $1";
            let row = session.client.query_opt(sql, &[&to_sql(seen.position)]).await;
            match row.map_err(failed)? {
                Some(row) if row.get::<_, &[u8]>(0) == seen.hash => Ok(()),
                _ => Err(shared.condition.cut(seen.position)),
            }
        };
        timeout(deadline, checked).await.unwrap_or_else(|_| Err(late()))?;
        session.deadline = deadline;
        Ok(session)
    }

    /// The answer, unless it takes longer than a statement may.
    pub(super) async fn within<T>(
        &self,
        answer: impl Future<Output = Result<T, tokio_postgres::Error>>,
    ) -> Result<T, Error> {
        match timeout(self.deadline, answer).await {
            Ok(answer) => answer.map_err(failed),
            Err(_) => Err(late()),
        }
    }

    /// Returns when the connection has ended.
    pub(super) async fn ended(&mut self) {
        // A driver that panicked has ended, too.
        let _ = (&mut self.driver).await;
    }
}

/// Moves what is sent and received, and wakes the follower when somebody has appended.
async fn drive(shared: Arc<Shared>, mut connection: Connection<Socket, Encrypted<Socket>>) {
    while let Some(message) = poll_fn(|context| connection.poll_message(context)).await {
        match message {
            Ok(AsyncMessage::Notification(note)) if note.channel() == CHANNEL => {
                // What this node wrote it knows already.
                let position = note.payload().parse::<u64>();
                if position.is_ok_and(|position| position > *shared.head.borrow()) {
                    shared.appended.notify_one();
                }
            }
            Ok(_) => {}
            // Whoever waits for an answer is told.
            Err(_) => return,
        }
    }
}

pub(super) fn late() -> Error {
    Error::Storage("no answer from the server in time".into())
}

/// Any failure of a statement. The server may have another mind next time.
pub(super) fn failed(error: tokio_postgres::Error) -> Error {
    Error::Storage(told(&error))
}

/// Why there is no connection: what only an operator can change is [`Error::Foreign`].
fn explain(error: &tokio_postgres::Error) -> Error {
    let why = told(error);
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    let mut untrusted = false;
    while let Some(inner) = cause {
        let io = inner.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        untrusted |= io.is_some_and(|it| it.is::<tokio_rustls::rustls::Error>());
        cause = inner.source();
    }
    if untrusted {
        return Error::Foreign(format!(
            "T2M_LOG: the server's certificate is not accepted ({why}); name its issuer with \
             sslrootcert=PATH"
        ));
    }
    // The driver's words: it has no name for it.
    if why == "server does not support TLS" {
        return Error::Foreign(
            "T2M_LOG: the server does not speak TLS, which sslmode asks for".into(),
        );
    }
    let refused = [
        SqlState::INVALID_PASSWORD,
        SqlState::INVALID_AUTHORIZATION_SPECIFICATION,
        SqlState::INVALID_CATALOG_NAME,
        SqlState::INSUFFICIENT_PRIVILEGE,
    ];
    if error.code().is_some_and(|code| refused.contains(code)) {
        return Error::Foreign(format!("T2M_LOG: the server refuses the connection: {why}"));
    }
    Error::Storage(why)
}

/// The innermost cause: the outer ones only say that there is one.
fn told(error: &tokio_postgres::Error) -> String {
    if let Some(answer) = error.as_db_error() {
        return format!("{} ({})", answer.message(), answer.code().code());
    }
    let mut cause: &dyn std::error::Error = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}
