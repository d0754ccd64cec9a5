//! What commands print. A reader who has seen enough (`| head`) is no failure, and stops no work; half
//! of it on a full disk is a failure, however the work went.

use std::fmt::Arguments;
use std::io::{Error, ErrorKind, Result, Write};
use std::sync::OnceLock;

/// Why a line is missing that somebody waits for.
static UNPRINTED: OnceLock<Error> = OnceLock::new();

/// Prints a line, and leaves it to [`settle`] to say that it could not be.
pub fn say(line: Arguments<'_>) {
    match writeln!(std::io::stdout(), "{line}") {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => drop(UNPRINTED.set(error)),
        _ => {}
    }
}

/// Standard output, for who prints much and may stop when nobody reads any more: by the error, which
/// [`settle`] knows from that of a connection.
pub struct Stdout;

#[derive(Debug, thiserror::Error)]
#[error("nobody reads what is printed")]
struct ReaderGone;

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        std::io::stdout().write(bytes).map_err(told)
    }

    fn flush(&mut self) -> Result<()> {
        std::io::stdout().flush().map_err(told)
    }
}

fn told(error: Error) -> Error {
    match error.kind() {
        ErrorKind::BrokenPipe => Error::new(ErrorKind::BrokenPipe, ReaderGone),
        _ => error,
    }
}

/// How a command has ended.
///
/// # Errors
/// Its own, unless nobody read on; else that of a line that could not be printed.
pub fn settle(done: anyhow::Result<()>) -> anyhow::Result<()> {
    match done {
        Err(error) if !is_reader_gone(&error) => Err(error),
        _ => UNPRINTED.get().map_or(Ok(()), |error| anyhow::bail!("printing: {error}")),
    }
}

fn is_reader_gone(error: &anyhow::Error) -> bool {
    let mut causes = error.chain().filter_map(|cause| cause.downcast_ref::<Error>());
    causes.any(|cause| cause.get_ref().is_some_and(|inner| inner.is::<ReaderGone>()))
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn a_reader_who_has_seen_enough_is_told_from_a_connection_that_broke() {
        let broken = || Error::from(ErrorKind::BrokenPipe);
        let gone = Err::<(), _>(told(broken())).context("printing events");
        settle(gone).unwrap();
        let cut = Err::<(), _>(broken()).context("copying the log");
        settle(cut).unwrap_err();
        settle(Err(told(Error::from(ErrorKind::StorageFull)).into())).unwrap_err();
    }
}
