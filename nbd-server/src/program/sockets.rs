//! The sockets that the program listens on, opened before it becomes another user: those that were asked for, and those
//! that systemd hands over.

use std::net::{SocketAddr, ToSocketAddrs};

use anyhow::{Context, bail};
use nbd_server::{ListeningSocket, SocketFileOptions};

use super::identity;
use super::options::Listen;

/// Opens them; clients wait until they are served.
pub(super) fn open(
    listen: &[Listen],
    options: &SocketFileOptions,
) -> anyhow::Result<Vec<ListeningSocket>> {
    let mut sockets = Vec::new();
    for descriptor in identity::sockets()? {
        let socket = ListeningSocket::inherited(descriptor);
        sockets.push(socket.context("cannot listen on a socket of LISTEN_FDS")?);
    }
    for address in listen {
        let opened = one(address, options);
        let opened = opened.with_context(|| format!("cannot listen on {address}"));
        match (opened, address) {
            (Ok(socket), _) => sockets.push(socket),
            (Err(error), Listen::Tcp { optional: true, .. }) => {
                tracing::warn!("{error:#}; going on without");
            }
            (Err(error), _) => return Err(error),
        }
    }
    if sockets.is_empty() {
        bail!("nowhere to listen");
    }
    Ok(sockets)
}

fn one(address: &Listen, options: &SocketFileOptions) -> anyhow::Result<ListeningSocket> {
    Ok(match address {
        Listen::Unix(path) => ListeningSocket::unix(path, options)?,
        Listen::Vsock { cid, port } => ListeningSocket::vsock(*cid, *port)?,
        Listen::Tcp { host, port, only_v6, .. } => {
            ListeningSocket::tcp(resolve(host, *port)?, *only_v6)?
        }
    })
}

fn resolve(host: &str, port: u16) -> anyhow::Result<SocketAddr> {
    let mut found =
        (host, port).to_socket_addrs().with_context(|| format!("cannot resolve {host}"))?;
    found.next().with_context(|| format!("{host} has no address"))
}
