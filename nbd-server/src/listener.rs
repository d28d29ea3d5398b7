//! Accepting connections on listening sockets. How these are made is told in `socket`, and what is said on a connection
//! elsewhere.

use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use socket2::Socket;
use tokio::io::{AsyncRead, AsyncWrite, Interest};
use tokio::net::{TcpListener, UnixListener, UnixStream, tcp, unix};

use crate::peer::Peer;
use crate::server::Server;
use crate::socket::SocketFile;

/// How long accepting rests after it failed, for instance because no file descriptor is left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How far apart failures to accept are told at least.
const TELL_PAUSE: Duration = Duration::from_secs(1);

/// Failures that come often and are told seldom.
#[derive(Debug, Default)]
struct Failures {
    told: Option<Instant>,
    untold: u64,
}

impl Failures {
    /// One more, now; where it is to be told, how many there were since the last that was.
    fn add(&mut self, now: Instant) -> Option<u64> {
        self.untold += 1;
        let is_fresh = |told: Instant| now.saturating_duration_since(told) < TELL_PAUSE;
        if self.told.is_some_and(is_fresh) {
            return None;
        }
        self.told = Some(now);
        Some(std::mem::take(&mut self.untold))
    }
}

/// A connection: its two halves, and who is at the other end.
pub(crate) type Accepted<R, W> = (R, W, Peer);

/// Something that accepts connections.
pub(crate) trait Listener: Send + Sync + 'static {
    type Reader: AsyncRead + Send + Unpin + 'static;
    type Writer: AsyncWrite + Send + Unpin + 'static;

    /// The next connection.
    fn next(&self)
    -> impl Future<Output = io::Result<Accepted<Self::Reader, Self::Writer>>> + Send;
}

/// Accepts until the server stops, then closes the listener.
pub(crate) async fn accept<L: Listener>(server: Server, listener: L) {
    let mut failures = Failures::default();
    loop {
        let accepted = tokio::select! {
            () = server.stopping() => return,
            accepted = listener.next() => accepted,
        };
        match accepted {
            Ok((reader, writer, peer)) => server.serve_halves(reader, writer, peer),
            Err(error) => {
                if let Some(failures) = failures.add(Instant::now()) {
                    tracing::warn!(%error, failures, "cannot accept a connection");
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// A TCP listener.
pub(crate) struct Tcp(TcpListener);

impl Tcp {
    pub(crate) fn new(socket: Socket) -> io::Result<Self> {
        Ok(Self(TcpListener::from_std(socket.into())?))
    }
}

impl Listener for Tcp {
    type Reader = tcp::OwnedReadHalf;
    type Writer = tcp::OwnedWriteHalf;

    async fn next(&self) -> io::Result<Accepted<Self::Reader, Self::Writer>> {
        let (stream, address) = self.0.accept().await?;
        // Fails only where the peer is gone already, which the first read finds out.
        let _ = stream.set_nodelay(true);
        let (reader, writer) = stream.into_split();
        Ok((reader, writer, Peer::Tcp(address)))
    }
}

/// A Unix listener, with its socket file where that is ours.
pub(crate) struct Unix {
    listener: UnixListener,
    _file: Option<SocketFile>,
}

impl Unix {
    pub(crate) fn new(socket: Socket, file: Option<SocketFile>) -> io::Result<Self> {
        let listener = UnixListener::from_std(OwnedFd::from(socket).into())?;
        Ok(Self { listener, _file: file })
    }
}

impl Listener for Unix {
    type Reader = unix::OwnedReadHalf;
    type Writer = unix::OwnedWriteHalf;

    async fn next(&self) -> io::Result<Accepted<Self::Reader, Self::Writer>> {
        let (stream, _) = self.listener.accept().await?;
        let peer = stream.peer_cred().map_or(Peer::Unknown, |cred| Peer::Unix { uid: cred.uid() });
        let (reader, writer) = stream.into_split();
        Ok((reader, writer, peer))
    }
}

/// A vsock listener, which the runtime does not know: a stream in the place of the socket tells when there is somebody.
pub(crate) struct Vsock {
    socket: Socket,
    ready: UnixStream,
}

impl Vsock {
    pub(crate) fn new(socket: Socket) -> io::Result<Self> {
        let ready = UnixStream::from_std(OwnedFd::from(socket.try_clone()?).into())?;
        Ok(Self { socket, ready })
    }
}

impl Listener for Vsock {
    type Reader = unix::OwnedReadHalf;
    type Writer = unix::OwnedWriteHalf;

    async fn next(&self) -> io::Result<Accepted<Self::Reader, Self::Writer>> {
        loop {
            self.ready.readable().await?;
            let accepted = self.ready.try_io(Interest::READABLE, || self.socket.accept());
            let (socket, address) = match accepted {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                accepted => accepted?,
            };
            let peer = match address.as_vsock_address() {
                Some((cid, port)) => Peer::Vsock { cid, port },
                None => Peer::Unknown,
            };
            socket.set_nonblocking(true)?;
            // A connected stream is read and written the same way whatever its addresses look like.
            let stream = UnixStream::from_std(OwnedFd::from(socket).into())?;
            let (reader, writer) = stream.into_split();
            return Ok((reader, writer, peer));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_told_once_a_second_at_most_and_counted() {
        let (mut failures, begin) = (Failures::default(), Instant::now());
        let told =
            |tenths: u64| failures.add(begin + ACCEPT_PAUSE * u32::try_from(tenths).unwrap());
        let told: Vec<u64> = (0..=25).filter_map(told).collect();
        assert_eq!(told, [1, 10, 10]);
    }
}
