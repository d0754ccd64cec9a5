//! Rows given to a function within SQLite, as an aggregate of them: stepping to each row from without
//! and asking for its columns takes half as long again.

use std::sync::{Arc, Mutex};

use rusqlite::functions::{Aggregate, Context, FunctionFlags};
use rusqlite::types::Null;
use rusqlite::{Connection, Params};

use super::Error;
use crate::log::guard;

/// What becomes of rows.
pub(super) trait Receiver: Send + 'static {
    /// Takes one row, in the order in which SQLite meets them. An error ends the query.
    fn take(&mut self, row: &Context) -> Result<(), Error>;
}

/// A connection with a function that gives rows to an `R`: `given(column, …)`.
pub(super) struct Given<R> {
    conn: Connection,
    state: Arc<Mutex<State<R>>>,
}

struct State<R> {
    receiver: R,
    fault: Option<Error>,
}

impl<R: Receiver> Given<R> {
    pub(super) fn new(conn: Connection, receiver: R) -> Result<Self, Error> {
        let state = Arc::new(Mutex::new(State { receiver, fault: None }));
        // Of any number of columns.
        conn.create_aggregate_function(
            "given",
            -1,
            FunctionFlags::SQLITE_UTF8,
            Function(Arc::clone(&state)),
        )?;
        Ok(Self { conn, state })
    }

    /// Runs `SELECT given(…)`.
    pub(super) fn run(&self, sql: &str, params: impl Params) -> Result<(), Error> {
        let done = self.conn.prepare_cached(sql)?.query_row(params, |_| Ok(()));
        match guard(&self.state).fault.take() {
            Some(fault) => Err(fault),
            None => Ok(done?),
        }
    }

    pub(super) fn conn(&self) -> &Connection {
        &self.conn
    }

    /// What the receiver has come to.
    pub(super) fn receiver<T>(&self, with: impl FnOnce(&mut R) -> T) -> T {
        with(&mut guard(&self.state).receiver)
    }
}

struct Function<R>(Arc<Mutex<State<R>>>);

impl<R: Receiver> Aggregate<(), Null> for Function<R> {
    fn init(&self, _: &mut Context) -> rusqlite::Result<()> {
        Ok(())
    }

    fn step(&self, row: &mut Context, (): &mut ()) -> rusqlite::Result<()> {
        let mut state = guard(&self.0);
        state.receiver.take(row).map_err(|fault| {
            state.fault = Some(fault);
            // Ends the query; the fault itself is told by `run`.
            rusqlite::Error::InvalidQuery
        })
    }

    fn finalize(&self, _: &mut Context, _: Option<()>) -> rusqlite::Result<Null> {
        Ok(Null)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::bad;

    /// Adds up to a most.
    struct Sum {
        sum: i64,
        most: i64,
    }

    impl Receiver for Sum {
        fn take(&mut self, row: &Context) -> Result<(), Error> {
            self.sum += row.get::<i64>(0)? + row.get::<i64>(1)?;
            assert_ne!(self.sum, 0, "a panic");
            match self.sum > self.most {
                true => Err(bad(7, "too much")),
                false => Ok(()),
            }
        }
    }

    fn summed(rows: &str) -> (Result<(), Error>, i64) {
        let conn = Connection::open_in_memory().unwrap();
        let given = Given::new(conn, Sum { sum: 0, most: 10 }).unwrap();
        let rows =
            format!("SELECT given(column1, column2) FROM (VALUES {rows}) WHERE column1 < ?1");
        (given.run(&rows, [100]), given.receiver(|receiver| receiver.sum))
    }

    #[test]
    fn each_row_is_given_once() {
        assert_eq!(summed("(1, 2), (3, 4), (100, 1)"), (Ok(()), 10));
        assert_eq!(summed("(100, 2)"), (Ok(()), 0), "no row at all");
    }

    #[test]
    fn what_the_receiver_refuses_ends_the_query_and_is_told() {
        assert_eq!(summed("(1, 2), (8, 4), (5, 1)"), (Err(bad(7, "too much")), 15));
    }

    #[test]
    fn what_sqlite_refuses_and_a_panic_are_errors() {
        assert!(matches!(summed("(1, 'a')"), (Err(Error::Storage(_)), 0)));
        assert!(matches!(summed("(1, -1)"), (Err(Error::Storage(_)), 0)));
    }
}
