//! Listening sockets: made here with their mode and owner, or handed over by who started the process. Accepting on them
//! is `listener`'s.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use socket2::{Domain, SockAddr, Socket, Type};

/// Connections that the kernel keeps for us until they are accepted.
const BACKLOG: i32 = 1024;

/// All contexts, or any free port, of vsock.
const VSOCK_ANY: u32 = u32::MAX;

/// Who may open a Unix socket. By default what the umask leaves, and the user of the process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketFileOptions {
    /// The permission bits, as of chmod(2).
    pub mode: Option<u32>,
    /// The user who owns it.
    pub uid: Option<u32>,
    /// The group that owns it.
    pub gid: Option<u32>,
}

/// A socket that listens. [`Server::listen`](crate::Server::listen) serves it; until then clients wait.
#[derive(Debug)]
pub struct ListeningSocket {
    pub(crate) socket: Socket,
    pub(crate) kind: Kind,
}

/// What clients come over.
#[derive(Debug)]
pub(crate) enum Kind {
    Tcp,
    /// With the file that is to be removed at the end.
    Unix(Option<SocketFile>),
    Vsock,
}

/// A socket file that we made, removed when dropped.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    made: (u64, u64),
}

impl ListeningSocket {
    /// Listens on a TCP address; port 0 takes a free one. `only_v6` says whether an IPv6 address that stands for all
    /// leaves IPv4 alone.
    ///
    /// # Errors
    /// What the host says, for instance that the address is in use.
    pub fn tcp(address: SocketAddr, only_v6: bool) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        if only_v6 && address.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        socket.bind(&address.into())?;
        Self::start(socket, Kind::Tcp)
    }

    /// Listens on a Unix socket. A socket file on which nobody listens is replaced; the file is removed when the socket
    /// is dropped. Nobody can connect before its mode and owner are set.
    ///
    /// # Errors
    /// What the host says; `AddrInUse` where another process listens there, or where the file is no socket.
    pub fn unix(path: &Path, options: &SocketFileOptions) -> io::Result<Self> {
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        let address = SockAddr::unix(path)?;
        match socket.bind(&address) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                remove_stale(path, &address, error)?;
                socket.bind(&address)?;
            }
            bound => bound?,
        }
        let file = SocketFile { path: path.to_owned(), made: file_id(path)? };
        if let Some(mode) = options.mode {
            std::fs::set_permissions(path, PermissionsExt::from_mode(mode))?;
        }
        if options.uid.or(options.gid).is_some() {
            std::os::unix::fs::chown(path, options.uid, options.gid)?;
        }
        Self::start(socket, Kind::Unix(Some(file)))
    }

    /// Listens for virtual machines, or for the host of this one: on the context `cid` of this machine or, as is usual,
    /// on all that it has. Port 0 takes a free one.
    ///
    /// # Errors
    /// What the host says, for instance that its kernel has no vsock.
    pub fn vsock(cid: Option<u32>, port: u32) -> io::Result<Self> {
        let socket = Socket::new(Domain::VSOCK, Type::STREAM, None)?;
        let port = if port == 0 { VSOCK_ANY } else { port };
        socket.bind(&SockAddr::vsock(cid.unwrap_or(VSOCK_ANY), port))?;
        Self::start(socket, Kind::Vsock)
    }

    /// Takes over a socket that somebody else made, for instance systemd.
    ///
    /// # Errors
    /// `InvalidInput` where it does not listen, or is of a kind that is not served here.
    pub fn inherited(descriptor: OwnedFd) -> io::Result<Self> {
        let wrong = |text| io::Error::new(io::ErrorKind::InvalidInput, text);
        let socket = Socket::from(descriptor);
        if !socket.is_listener()? {
            return Err(wrong("the socket does not listen"));
        }
        let kind = match socket.domain()? {
            Domain::IPV4 | Domain::IPV6 => Kind::Tcp,
            Domain::UNIX => Kind::Unix(None),
            Domain::VSOCK => Kind::Vsock,
            _ => return Err(wrong("the socket is neither TCP, Unix nor vsock")),
        };
        socket.set_nonblocking(true)?;
        Ok(Self { socket, kind })
    }

    fn start(socket: Socket, kind: Kind) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        socket.listen(BACKLOG)?;
        Ok(Self { socket, kind })
    }

    /// The TCP address, which matters for port 0; `None` for another socket.
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        self.socket.local_addr().ok()?.as_socket()
    }
}

/// As clients spell it: `HOST:PORT`, `unix:PATH` or `vsock:CID:PORT`.
impl fmt::Display for ListeningSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let address = self.socket.local_addr().map_err(|_| fmt::Error)?;
        if let Some(address) = address.as_socket() {
            write!(f, "{address}")
        } else if let Some(path) = address.as_pathname() {
            write!(f, "unix:{}", path.display())
        } else if let Some((cid, port)) = address.as_vsock_address() {
            match cid {
                VSOCK_ANY => write!(f, "vsock:any:{port}"),
                cid => write!(f, "vsock:{cid}:{port}"),
            }
        } else {
            f.write_str("a socket without a name")
        }
    }
}

impl Drop for SocketFile {
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
fn remove_stale(path: &Path, address: &SockAddr, in_use: io::Error) -> io::Result<()> {
    if !std::fs::symlink_metadata(path)?.file_type().is_socket() {
        return Err(in_use);
    }
    let probe = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // Somebody who has no time to accept is there all the same.
    probe.set_nonblocking(true)?;
    match probe.connect(address) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path)
        }
        _ => Err(in_use),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unix_socket_has_its_mode_before_anybody_can_connect_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let owner = std::fs::metadata(dir.path()).unwrap().uid();
        let options = SocketFileOptions { mode: Some(0o640), uid: Some(owner), gid: None };
        let socket = ListeningSocket::unix(&path, &options).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, 0o640);
        assert_eq!(socket.to_string(), format!("unix:{}", path.display()));
        let taken = ListeningSocket::unix(&path, &options).unwrap_err();
        assert_eq!(taken.kind(), io::ErrorKind::AddrInUse);
        drop(socket);
        assert!(!path.exists());
        std::fs::write(&path, "no socket").unwrap();
        assert!(ListeningSocket::unix(&path, &options).is_err());
        assert!(path.exists());
    }

    #[test]
    fn what_does_not_listen_is_not_taken_over() {
        let (connected, _peer) = Socket::pair(Domain::UNIX, Type::STREAM, None).unwrap();
        let error = ListeningSocket::inherited(connected.into()).unwrap_err();
        assert_eq!(error.to_string(), "the socket does not listen");
        let listening = ListeningSocket::tcp("127.0.0.1:0".parse().unwrap(), false).unwrap();
        let copy = listening.socket.try_clone().unwrap();
        let inherited = ListeningSocket::inherited(copy.into()).unwrap();
        assert_eq!(inherited.tcp_address(), listening.tcp_address());
        let datagrams = Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap();
        assert!(ListeningSocket::inherited(datagrams.into()).is_err());
    }
}
