//! The sockets that the program listens on, opened before it becomes another user: those that were asked for, and those
//! that systemd hands over.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;

use anyhow::{Context, anyhow, bail};
use nbd_server::{ListeningSocket, SocketFileOptions};

use super::config::{Config, Place};
use super::identity;
use super::images::folder_of;
use super::options::{Listen, Options};
use super::wanted::Refused;

/// An address to listen on, and where it is said.
pub(super) struct Asked {
    listen: Listen,
    /// `None` for the command line.
    place: Option<Place>,
}

/// An address that is known.
pub(super) struct Resolved {
    address: Address,
    /// Whether a machine that has no such address goes on without.
    optional: bool,
    /// For errors.
    told: String,
}

enum Address {
    Unix(PathBuf),
    Vsock { cid: Option<u32>, port: u32 },
    Tcp { address: SocketAddr, only_v6: bool },
}

/// Where to listen: where the command line says, or else the file, unless sockets are handed over.
pub(super) fn asked(options: &Options, config: Option<&Config>) -> Vec<Asked> {
    match (&options.listen[..], config) {
        ([], Some(config)) if !identity::has_sockets() => {
            let of_file = config.generic.listen.iter();
            let asked = |(line, listen): &(usize, Listen)| Asked {
                listen: listen.clone(),
                place: Some(config.place(*line)),
            };
            of_file.map(asked).collect()
        }
        (said, _) => {
            said.iter().map(|listen| Asked { listen: listen.clone(), place: None }).collect()
        }
    }
}

/// Finds the addresses. Asks name servers where they have names.
///
/// # Errors
/// All that cannot be found.
pub(super) fn resolve(asked: &[Asked]) -> Result<Vec<Resolved>, Refused> {
    let (mut resolved, mut refused) = (Vec::new(), Vec::new());
    for Asked { listen, place } in asked {
        let place = place.as_ref().map(|place| format!("{place}: ")).unwrap_or_default();
        let told = format!("{place}cannot listen on {listen}");
        match address(listen) {
            Ok(address) => {
                let optional = matches!(listen, Listen::Tcp { optional: true, .. });
                resolved.push(Resolved { address, optional, told });
            }
            Err(error) => refused.push(error.context(told)),
        }
    }
    if refused.is_empty() { Ok(resolved) } else { Err(Refused(refused)) }
}

fn address(listen: &Listen) -> anyhow::Result<Address> {
    Ok(match listen {
        Listen::Unix(path) => {
            let folder = folder_of(path);
            if !folder.is_dir() {
                bail!("there is no folder {}", folder.display());
            }
            Address::Unix(path.clone())
        }
        Listen::Vsock { cid, port } => Address::Vsock { cid: *cid, port: *port },
        Listen::Tcp { host, port, only_v6, .. } => {
            let found = (host.as_str(), *port).to_socket_addrs();
            let mut found = found.with_context(|| format!("cannot resolve {host}"))?;
            let address = found.next().with_context(|| format!("{host} has no address"))?;
            Address::Tcp { address, only_v6: *only_v6 }
        }
    })
}

/// Opens them; clients wait until they are served.
pub(super) fn open(
    addresses: Vec<Resolved>,
    options: &SocketFileOptions,
) -> anyhow::Result<Vec<ListeningSocket>> {
    let mut sockets = Vec::new();
    for descriptor in identity::sockets()? {
        let socket = ListeningSocket::inherited(descriptor);
        sockets.push(socket.context("cannot listen on a socket of LISTEN_FDS")?);
    }
    for Resolved { address, optional, told } in addresses {
        let opened = match &address {
            Address::Unix(path) => ListeningSocket::unix(path, options),
            Address::Vsock { cid, port } => ListeningSocket::vsock(*cid, *port),
            Address::Tcp { address, only_v6 } => ListeningSocket::tcp(*address, *only_v6),
        };
        match opened {
            Ok(socket) => sockets.push(socket),
            Err(error) if optional => tracing::warn!("{told}: {error}; going on without"),
            Err(error) => return Err(anyhow!(error).context(told)),
        }
    }
    if sockets.is_empty() {
        bail!("nowhere to listen");
    }
    Ok(sockets)
}
