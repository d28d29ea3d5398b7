//! Where a server listens, and how to reach it. Names of exports are not part of an address.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpStream, UnixStream};

use super::error::ClientError;
use super::stream::{Counters, Halves};

/// A server's socket.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// A host name or an IPv4 or IPv6 address (without brackets), and a port.
    Tcp {
        /// The host.
        host: String,
        /// The port; [`Address::PORT`] where a URI names none.
        port: u16,
    },
    /// The path of a Unix socket.
    Unix(PathBuf),
}

impl Address {
    /// NBD's registered port.
    pub const PORT: u16 = 10809;

    /// Connects within `limit`; everything on the socket is counted in `counters`.
    pub(super) async fn connect(
        &self,
        limit: Duration,
        counters: &Arc<Counters>,
    ) -> Result<Halves, ClientError> {
        let connecting = async {
            match self {
                Self::Tcp { host, port } => {
                    let stream = TcpStream::connect((host.as_str(), *port)).await?;
                    stream.set_nodelay(true)?;
                    let (read, write) = stream.into_split();
                    Ok(Halves::new(read, write, counters))
                }
                Self::Unix(path) => {
                    let (read, write) = UnixStream::connect(path).await?.into_split();
                    Ok(Halves::new(read, write, counters))
                }
            }
        };
        match tokio::time::timeout(limit, connecting).await {
            Ok(Ok(halves)) => Ok(halves),
            Ok(Err(source)) => Err(ClientError::Connect { address: self.to_string(), source }),
            Err(_) => Err(ClientError::Timeout {
                address: self.to_string(),
                what: "connecting",
                after: limit,
            }),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}
