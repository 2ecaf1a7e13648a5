//! A link that can be cut, stalled, delayed and throttled: a TCP proxy between two processes.
//!
//! TCP between processes is reliable: what a lossy network does to it (packets lost, doubled, reordered)
//! comes out as delay, stalls and broken connections, and that is what this makes. At most one chunk
//! for each direction is held in between, apart from the sockets' own buffers.

use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Bytes moved at a time.
const CHUNK: usize = 16 << 10;

/// How a link is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Link {
    Pass,
    /// Connections are closed, new ones are closed at once.
    Cut,
    /// Nothing goes through, nobody is told.
    Stall,
    /// Nothing goes through one way: what clients of the link send.
    StallUp,
    /// Each chunk waits for so long, and up to as much again.
    Delay(Duration),
    /// Bytes per second, each way.
    Throttle(u64),
}

/// A running link.
#[derive(Debug)]
pub(crate) struct Proxy {
    address: SocketAddr,
    link: watch::Sender<Link>,
    task: JoinHandle<()>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Proxy {
    /// Listens on a free port and leads to `target`.
    pub(crate) async fn start(target: SocketAddr) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let (link, state) = watch::channel(Link::Pass);
        let task = tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                tokio::spawn(connect(near, target, state.clone()));
            }
        });
        Proxy { address, link, task }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn set(&self, link: Link) {
        self.link.send_replace(link);
    }
}

async fn connect(near: TcpStream, target: SocketAddr, mut link: watch::Receiver<Link>) {
    let open = link.wait_for(|link| !matches!(link, Link::Stall | Link::StallUp)).await.map(|link| *link);
    if !matches!(open, Ok(open) if open != Link::Cut) {
        return;
    }
    let Ok(far) = TcpStream::connect(target).await else { return };
    let (_, _) = (near.set_nodelay(true), far.set_nodelay(true));
    let ((mut near_in, mut near_out), (mut far_in, mut far_out)) = (near.into_split(), far.into_split());
    let (up, down) = (link.clone(), link.clone());
    tokio::select! {
        () = pump(&mut near_in, &mut far_out, up, true) => {}
        () = pump(&mut far_in, &mut near_out, down, false) => {}
        _ = link.wait_for(|link| *link == Link::Cut) => {}
    }
}

async fn pump(
    from: &mut (impl AsyncReadExt + Unpin),
    to: &mut (impl AsyncWriteExt + Unpin),
    mut link: watch::Receiver<Link>,
    up: bool,
) {
    let mut chunk = vec![0; CHUNK];
    // Enough of a dice for jitter; faults are drawn elsewhere.
    let mut dice = 7u32;
    loop {
        let Ok(size @ 1..) = from.read(&mut chunk).await else { return };
        let stalled = |link: &Link| *link == Link::Stall || (up && *link == Link::StallUp);
        let Ok(state) = link.wait_for(|link| !stalled(link)).await.map(|link| *link) else { return };
        match state {
            Link::Delay(delay) => {
                dice = dice.wrapping_mul(1_103_515_245).wrapping_add(12_345);
                tokio::time::sleep(delay + delay.mul_f64(f64::from(dice >> 16) / 65_536.0)).await;
            }
            Link::Throttle(rate) => {
                tokio::time::sleep(Duration::from_secs_f64(size as f64 / rate as f64)).await;
            }
            Link::Pass | Link::Cut | Link::Stall | Link::StallUp => {}
        }
        if to.write_all(&chunk[..size]).await.is_err() {
            return;
        }
    }
}

#[tokio::test]
async fn a_link_passes_stalls_and_is_cut() {
    let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxy = Proxy::start(server.local_addr().unwrap()).await;
    let mut near = TcpStream::connect(proxy.address()).await.unwrap();
    let (mut far, _) = server.accept().await.unwrap();
    let mut byte = [0];
    near.write_all(b"a").await.unwrap();
    far.read_exact(&mut byte).await.unwrap();
    proxy.set(Link::StallUp);
    far.write_all(b"b").await.unwrap();
    near.read_exact(&mut byte).await.unwrap();
    near.write_all(b"c").await.unwrap();
    let silent = tokio::time::timeout(Duration::from_millis(100), far.read_exact(&mut byte)).await;
    assert!(silent.is_err(), "it came through");
    proxy.set(Link::Pass);
    far.read_exact(&mut byte).await.unwrap();
    assert_eq!(&byte, b"c");
    proxy.set(Link::Cut);
    assert_eq!(far.read(&mut byte).await.unwrap_or(0), 0);
    let mut late = TcpStream::connect(proxy.address()).await.unwrap();
    assert_eq!(late.read(&mut byte).await.unwrap_or(0), 0);
}
