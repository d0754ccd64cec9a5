//! How many files and sockets this process may have open.

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the soft limit to the hard one: each signed link that is read takes a socket and a file, and
/// the usual soft limit of 1024 is kept for programs that use `select`.
pub fn raise_limit() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    match raised(current, maximum) {
        Ok(now) => tracing::debug!(before = current, now, "files and sockets that may be open"),
        Err(error) => tracing::info!(%error, limit = current, "the limit of open files stays"),
    }
}

fn raised(current: Option<u64>, maximum: Option<u64>) -> Result<Option<u64>, Errno> {
    if current != maximum {
        setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })?;
    }
    Ok(maximum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soft_limit_becomes_the_hard_one() {
        let maximum = getrlimit(Resource::Nofile).maximum;
        let low = Some(maximum.map_or(4096, |maximum| maximum.min(4096)));
        setrlimit(Resource::Nofile, Rlimit { current: low, maximum }).unwrap();
        raise_limit();
        assert_eq!(getrlimit(Resource::Nofile).current, maximum);
    }
}
