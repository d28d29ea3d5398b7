//! TCP and Unix listeners: binding, accepting, and cleaning up the socket file. Connections are served elsewhere.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpSocket, UnixListener, UnixStream, tcp, unix};

use crate::peer::Peer;
use crate::server::Server;

/// Connections that the kernel keeps for us until they are accepted.
const BACKLOG: u32 = 1024;

/// How long accepting rests after it failed, for instance because no file descriptor is left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

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
    loop {
        let accepted = tokio::select! {
            () = server.stopping() => return,
            accepted = listener.next() => accepted,
        };
        match accepted {
            Ok((reader, writer, peer)) => server.serve_halves(reader, writer, peer),
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// A TCP listener.
pub(crate) struct Tcp(TcpListener);

impl Tcp {
    pub(crate) fn bind(addr: SocketAddr) -> io::Result<Self> {
        let socket = if addr.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        socket.set_reuseaddr(true)?;
        // Accepted sockets inherit it: a peer that vanished is found out even where nothing is in flight.
        socket.set_keepalive(true)?;
        socket.bind(addr)?;
        Ok(Self(socket.listen(BACKLOG)?))
    }

    pub(crate) fn address(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
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

/// A Unix listener that owns its socket file.
pub(crate) struct Unix {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file that we made.
    made: (u64, u64),
}

impl Unix {
    pub(crate) async fn bind(path: &Path) -> io::Result<Self> {
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                remove_stale(path, error).await?;
                UnixListener::bind(path)?
            }
            bound => bound?,
        };
        let made = file_id(path)?;
        Ok(Self { listener, path: path.to_owned(), made })
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

impl Drop for Unix {
    fn drop(&mut self) {
        // Whoever replaced the file keeps theirs.
        if file_id(&self.path).is_ok_and(|found| found == self.made) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn file_id(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = std::fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Removes a socket file on which nobody listens; anything else keeps the error.
async fn remove_stale(path: &Path, in_use: io::Error) -> io::Result<()> {
    if !std::fs::symlink_metadata(path)?.file_type().is_socket() {
        return Err(in_use);
    }
    match UnixStream::connect(path).await {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path)
        }
        _ => Err(in_use),
    }
}
