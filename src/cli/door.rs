//! The listening socket, and how it is closed so that everybody who has come in is served.
//!
//! What waits for `accept` when a listening socket is closed is reset by the kernel, although its
//! client has connected and has perhaps asked already. So that nobody is left there, beginnings of
//! connections are dropped first, then those that came before are accepted, and only then the
//! socket is closed: who knocks meanwhile is refused at the next try, a second later.

use std::io;
use std::net::TcpListener;
use std::time::Duration;

use actix_web::dev::ServerHandle;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::Shutdown;

/// Until a connection that had begun has come in, over the way of a few thousand kilometres.
const HANDSHAKE: Duration = Duration::from_millis(100);
/// Between two looks at who waits, and how many looks there are.
const LOOK_EVERY: Duration = Duration::from_millis(5);
const LOOKS: usize = 200;
/// The front end hears on another thread that it is to accept no more.
const HEARD: Duration = Duration::from_millis(20);

/// A second handle on the socket that the front end listens on.
pub struct Door(TcpListener);

impl Door {
    /// # Errors
    /// The system has no handle left.
    pub fn of(listener: &TcpListener) -> io::Result<Self> {
        Ok(Self(listener.try_clone()?))
    }

    /// Lets in who has come, and refuses who comes after.
    pub async fn close(&self, server: &ServerHandle) {
        if let Err(error) = drop_beginnings(&self.0) {
            tracing::debug!(%error, "connections are made until the socket is closed");
        }
        tokio::time::sleep(HANDSHAKE).await;
        for _ in 0..LOOKS {
            if !self.somebody_waits() {
                break;
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        server.pause().await;
        tokio::time::sleep(HEARD).await;
        if let Err(error) = rustix::net::shutdown(&self.0, Shutdown::Read) {
            tracing::debug!(%error, "the socket is closed with the last connection only");
        }
    }

    fn somebody_waits(&self) -> bool {
        let mut looked_at = [PollFd::new(&self.0, PollFlags::IN)];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut looked_at, Some(&at_once)).is_ok_and(|ready| ready > 0)
    }
}

/// Drops every segment with SYN from now on. What has begun by then comes to its end; the sockets
/// that were accepted have no such segments any more.
#[cfg(target_os = "linux")]
fn drop_beginnings(listener: &TcpListener) -> io::Result<()> {
    use socket2::{SockFilter, SockRef};
    /// Classic BPF: the byte of the flags in the TCP header, a jump if SYN is set, how much to keep.
    const PROGRAM: [SockFilter; 4] = [
        SockFilter::new(0x30, 0, 0, 13),
        SockFilter::new(0x45, 0, 1, 0x02),
        SockFilter::new(0x06, 0, 0, 0),
        SockFilter::new(0x06, 0, 0, u32::MAX),
    ];
    SockRef::from(listener).attach_filter(&PROGRAM)
}

#[cfg(not(target_os = "linux"))]
fn drop_beginnings(_: &TcpListener) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}
