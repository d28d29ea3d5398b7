//! Accepting connections on listening sockets. How these are made is told in `socket`, and what is said on a connection
//! elsewhere.

use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use socket2::{SockRef, Socket, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, Interest};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream, tcp, unix};

use crate::failures::Failures;
use crate::peer::Peer;
use crate::server::Server;
use crate::socket::SocketFile;

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
    let mut failures = Failures::of("cannot accept a connection");
    loop {
        let accepted = tokio::select! {
            () = server.stopping() => return,
            accepted = listener.next() => accepted,
        };
        match accepted {
            Ok((reader, writer, peer)) => server.serve_halves(reader, writer, peer),
            Err(error) => failures.rest(&error).await,
        }
    }
}

/// A TCP listener, and how long its clients may acknowledge nothing.
pub(crate) struct Tcp {
    listener: TcpListener,
    peer_timeout: Duration,
}

impl Tcp {
    pub(crate) fn new(socket: Socket, peer_timeout: Duration) -> io::Result<Self> {
        Ok(Self { listener: TcpListener::from_std(socket.into())?, peer_timeout })
    }
}

/// Probes of an idle connection from when half of its time is over.
const PROBES: u32 = 6;

/// Has the kernel break a connection whose peer acknowledges nothing for so long: probes find it where nothing is in
/// flight, and what is in flight does where there is something, for which alone probes would wait a quarter of an hour.
fn watch_peer(stream: &TcpStream, limit: Duration) -> io::Result<()> {
    let limit = limit.clamp(Duration::from_secs(2), Duration::from_secs(18 * 3600));
    let interval = (limit / 2 / PROBES).max(Duration::from_secs(1));
    let keepalive =
        TcpKeepalive::new().with_time(limit / 2).with_interval(interval).with_retries(PROBES);
    let socket = SockRef::from(stream);
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_user_timeout(Some(limit))
}

impl Listener for Tcp {
    type Reader = tcp::OwnedReadHalf;
    type Writer = tcp::OwnedWriteHalf;

    async fn next(&self) -> io::Result<Accepted<Self::Reader, Self::Writer>> {
        let (stream, address) = self.listener.accept().await?;
        // These fail only where the peer is gone already, which the first read finds out.
        let _ = stream.set_nodelay(true);
        let _ = watch_peer(&stream, self.peer_timeout);
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
    use crate::socket::ListeningSocket;

    /// What the kernel was told about the peers that are accepted on a socket.
    async fn watched(socket: ListeningSocket, limit: Duration) -> [Duration; 3] {
        let address = socket.tcp_address().unwrap();
        let listener = Tcp::new(socket.socket, limit).unwrap();
        let _client = TcpStream::connect(address).await.unwrap();
        let (reader, _writer, _) = listener.next().await.unwrap();
        let socket = SockRef::from(reader.as_ref());
        assert!(socket.keepalive().unwrap() && socket.tcp_nodelay().unwrap());
        assert_eq!(socket.tcp_keepalive_retries().unwrap(), PROBES);
        [
            socket.tcp_keepalive_time().unwrap(),
            socket.tcp_keepalive_interval().unwrap(),
            socket.tcp_user_timeout().unwrap().unwrap(),
        ]
    }

    #[tokio::test]
    async fn who_acknowledges_nothing_is_found_out_idle_or_not() {
        let seconds = |all: [u64; 3]| all.map(Duration::from_secs);
        for (limit, expected) in [
            (120, [60, 10, 120]),
            (4, [2, 1, 4]),
            (0, [1, 1, 2]),
            (u64::MAX, [9 * 3600, 5400, 18 * 3600]),
        ] {
            let local = || "127.0.0.1:0".parse().unwrap();
            let own = ListeningSocket::tcp(local(), false).unwrap();
            let bare = ListeningSocket::tcp(local(), false).unwrap().socket;
            for socket in [own, ListeningSocket::inherited(bare.into()).unwrap()] {
                let told = watched(socket, Duration::from_secs(limit)).await;
                assert_eq!(told, seconds(expected), "{limit} s");
            }
        }
    }
}
