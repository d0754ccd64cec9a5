//! The line to a node of the stand-in: it can be cut, and refuse who calls.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

pub struct Line {
    pub port: u16,
    refuses: AtomicBool,
    /// Counts; those who carry a connection end with each.
    cuts: watch::Sender<u64>,
}

impl Line {
    /// To a port of this machine.
    pub async fn to(server: u16) -> Arc<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let port = listener.local_addr().expect("it has an address").port();
        let line =
            Arc::new(Self { port, refuses: AtomicBool::new(false), cuts: watch::Sender::new(0) });
        let carried = Arc::clone(&line);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(carried.clone().carry(client, server));
            }
        });
        line
    }

    async fn carry(self: Arc<Self>, mut client: TcpStream, server: u16) {
        let mut cuts = self.cuts.subscribe();
        if self.refuses.load(Ordering::SeqCst) {
            return;
        }
        let Ok(mut server) = TcpStream::connect(("127.0.0.1", server)).await else { return };
        let _ = (client.set_nodelay(true), server.set_nodelay(true));
        tokio::select! {
            _ = copy_bidirectional(&mut client, &mut server) => {}
            _ = cuts.changed() => {}
        }
    }

    /// Cuts all connections there are.
    pub fn cut(&self) {
        self.cuts.send_modify(|cuts| *cuts += 1);
    }

    pub fn set_refuses(&self, refuses: bool) {
        self.refuses.store(refuses, Ordering::SeqCst);
        if refuses {
            self.cut();
        }
    }

    pub fn refuses(&self) -> bool {
        self.refuses.load(Ordering::SeqCst)
    }
}
