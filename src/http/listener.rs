//! Takes connections within bounds: so many at a time, for so long, and only while there are descriptors that nothing else
//! needs. Whoever is refused sees its connection closed, and comes again.

use crate::node::descriptors::Descriptors;
use axum::serve::Listener;
use std::future::Future;
use std::io::{Error, ErrorKind, Result};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Sleep;

/// Connections at a time: scrapers and health checks are few.
const CONNECTIONS: usize = 64;
/// A connection ends after so long: one that does nothing keeps nobody out for good.
const LONGEST: Duration = Duration::from_secs(30);
/// Pause after the system has given us none.
const PAUSE: Duration = Duration::from_millis(200);

/// A listener that takes no more than it should.
pub(super) struct Bounded {
    listener: TcpListener,
    places: Arc<Semaphore>,
}

impl Bounded {
    pub(super) fn new(listener: TcpListener) -> Self {
        Bounded { listener, places: Arc::new(Semaphore::new(CONNECTIONS)) }
    }
}

impl Listener for Bounded {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        loop {
            let (stream, addr) = match self.listener.accept().await {
                Ok(accepted) => accepted,
                // The other side has gone, or there are no descriptors: that is said by who looks after them.
                Err(error) => {
                    tracing::debug!("a connection was not taken: {error}");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            };
            let place = self.places.clone().try_acquire_owned();
            let has_room = Descriptors::now().is_none_or(|now| now.has_room_beside(0));
            match place {
                Ok(place) if has_room => {
                    let end = Box::pin(tokio::time::sleep(LONGEST));
                    return (Connection { stream, end, _place: place }, addr);
                }
                // Closed at once.
                _ => drop(stream),
            }
        }
    }

    fn local_addr(&self) -> Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection that ends.
pub(super) struct Connection {
    stream: TcpStream,
    end: Pin<Box<Sleep>>,
    _place: OwnedSemaphorePermit,
}

impl Connection {
    fn check(&mut self, cx: &mut Context<'_>) -> Result<()> {
        match self.end.as_mut().poll(cx) {
            Poll::Ready(()) => {
                Err(Error::new(ErrorKind::TimedOut, "the connection was there for long enough"))
            }
            Poll::Pending => Ok(()),
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_read(cx, into)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
