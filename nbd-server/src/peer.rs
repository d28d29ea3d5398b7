//! Who is at the other end of a connection, as far as the kernel tells. Whether they may connect is decided by
//! `admission`.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

/// The other end of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Peer {
    /// A TCP client.
    Tcp(SocketAddr),
    /// A process of this machine, with the user it ran as when it connected.
    Unix {
        /// Its effective user.
        uid: u32,
    },
    /// A virtual machine, or the host of this one.
    Vsock {
        /// Its context: 2 is the host, 1 this machine itself.
        cid: u32,
        /// Its port.
        port: u32,
    },
    /// Nobody told: a stream that an embedder brought.
    Unknown,
}

impl Peer {
    /// The network address, IPv4 also where it came through an IPv6 socket.
    pub fn address(&self) -> Option<IpAddr> {
        match self {
            Self::Tcp(address) => Some(address.ip().to_canonical()),
            _ => None,
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "{address}"),
            Self::Unix { uid } => write!(f, "unix:uid={uid}"),
            Self::Vsock { cid, port } => write!(f, "vsock:{cid}:{port}"),
            Self::Unknown => f.write_str("unknown"),
        }
    }
}
