//! The sockets that the program listens on, opened before it becomes another user: those that were asked for, and those
//! that systemd hands over.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};
use nbd_server::{ListeningSocket, SocketFileOptions};

use super::config::{Config, Place};
use super::identity;
use super::images::folder_of;
use super::options::{Listen, Options};
use super::places::Places;
use super::wanted::Refused;

/// The longest path of a Unix socket: what `sockaddr_un` holds before a NUL byte.
const MAX_PATH_BYTES: usize = 107;

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
    Vsock {
        cid: Option<u32>,
        port: u32,
    },
    /// All that a name has.
    Tcp {
        addresses: Vec<SocketAddr>,
        only_v6: bool,
    },
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

/// Finds the addresses, and tells which cannot be found. Asks name servers where they have names.
pub(super) fn resolve(asked: &[Asked]) -> (Vec<Resolved>, Refused) {
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
    (resolved, Refused(refused))
}

fn address(listen: &Listen) -> anyhow::Result<Address> {
    Ok(match listen {
        Listen::Unix(path) => {
            let folder = folder_of(path);
            if !folder.is_dir() {
                bail!("there is no folder {}", folder.display());
            }
            let bytes = path.as_os_str().len();
            if bytes > MAX_PATH_BYTES {
                bail!("the path has {bytes} bytes, and that of a socket at most {MAX_PATH_BYTES}");
            }
            let found = std::fs::symlink_metadata(path);
            if found.is_ok_and(|found| !found.file_type().is_socket()) {
                bail!(
                    "what is there is no socket, and is left alone; remove it or name another path"
                );
            }
            Address::Unix(path.clone())
        }
        Listen::Vsock { cid, port } => Address::Vsock { cid: *cid, port: *port },
        Listen::Tcp { host, port, only_v6, .. } => {
            let found = (host.as_str(), *port).to_socket_addrs();
            let found = found.with_context(|| format!("cannot resolve {host}"))?;
            let mut addresses: Vec<SocketAddr> = Vec::new();
            for address in found {
                if !addresses.contains(&address) {
                    addresses.push(address);
                }
            }
            if addresses.is_empty() {
                bail!("{host} has no address");
            }
            // Addresses of one name leave each other alone.
            let only_v6 = *only_v6 || addresses.len() > 1;
            Address::Tcp { addresses, only_v6 }
        }
    })
}

/// What comes of addresses: sockets, or the knowledge that there could be some.
pub(super) trait Maker {
    type Socket;
    fn unix(&mut self, path: &Path, options: &SocketFileOptions) -> io::Result<Self::Socket>;
    fn vsock(&mut self, cid: Option<u32>, port: u32) -> io::Result<Self::Socket>;
    fn tcp(&mut self, address: SocketAddr, only_v6: bool) -> io::Result<Self::Socket>;
    /// The TCP port that a socket got.
    fn port(socket: &Self::Socket) -> Option<u16>;
}

/// Makes sockets that listen; clients wait until they are served.
struct Listening;

impl Maker for Listening {
    type Socket = ListeningSocket;

    fn unix(&mut self, path: &Path, options: &SocketFileOptions) -> io::Result<ListeningSocket> {
        ListeningSocket::unix(path, options)
    }

    fn vsock(&mut self, cid: Option<u32>, port: u32) -> io::Result<ListeningSocket> {
        ListeningSocket::vsock(cid, port)
    }

    fn tcp(&mut self, address: SocketAddr, only_v6: bool) -> io::Result<ListeningSocket> {
        ListeningSocket::tcp(address, only_v6)
    }

    fn port(socket: &ListeningSocket) -> Option<u16> {
        socket.tcp_address().map(|address| address.port())
    }
}

impl Maker for Places {
    type Socket = ();

    fn unix(&mut self, path: &Path, options: &SocketFileOptions) -> io::Result<()> {
        Self::unix(self, path, options)
    }

    fn vsock(&mut self, cid: Option<u32>, port: u32) -> io::Result<()> {
        Self::vsock(self, cid, port)
    }

    fn tcp(&mut self, address: SocketAddr, only_v6: bool) -> io::Result<()> {
        Self::tcp(self, address, only_v6)
    }

    fn port((): &()) -> Option<u16> {
        None
    }
}

/// Opens the sockets, after those that systemd hands over.
///
/// # Errors
/// All that cannot be opened.
pub(super) fn open(
    addresses: Vec<Resolved>,
    options: &SocketFileOptions,
) -> anyhow::Result<Vec<ListeningSocket>> {
    let mut sockets = Vec::new();
    for descriptor in identity::sockets()? {
        let socket = ListeningSocket::inherited(descriptor);
        sockets.push(socket.context("cannot listen on a socket of LISTEN_FDS")?);
    }
    sockets.extend(make(&mut Listening, addresses, options)?);
    if sockets.is_empty() {
        bail!("nowhere to listen");
    }
    Ok(sockets)
}

/// Makes the socket, or the sockets, of every address.
///
/// # Errors
/// All that cannot be made.
pub(super) fn make<M: Maker>(
    maker: &mut M,
    addresses: Vec<Resolved>,
    options: &SocketFileOptions,
) -> Result<Vec<M::Socket>, Refused> {
    let (mut sockets, mut refused) = (Vec::new(), Vec::new());
    for Resolved { address, optional, told } in addresses {
        let opened = match &address {
            Address::Unix(path) => maker.unix(path, options).map(|socket| vec![socket]),
            Address::Vsock { cid, port } => maker.vsock(*cid, *port).map(|socket| vec![socket]),
            Address::Tcp { addresses, only_v6 } => named(maker, addresses, *only_v6, &told),
        };
        match opened {
            Ok(opened) => sockets.extend(opened),
            Err(error) if optional => tracing::warn!("{told}: {error}; going on without"),
            Err(error) => refused.push(anyhow!(error).context(told)),
        }
    }
    if refused.is_empty() { Ok(sockets) } else { Err(Refused(refused)) }
}

/// How often a port is looked for that is free on all addresses of a name.
const PORT_ATTEMPTS: usize = 16;

/// Makes the sockets of all addresses that a name has, on one port.
fn named<M: Maker>(
    maker: &mut M,
    addresses: &[SocketAddr],
    only_v6: bool,
    told: &str,
) -> io::Result<Vec<M::Socket>> {
    let mut attempts = 1..PORT_ATTEMPTS;
    loop {
        match on_one_port(maker, addresses, only_v6, told) {
            Err(error)
                if error.kind() == io::ErrorKind::AddrInUse
                    && addresses.iter().all(|address| address.port() == 0)
                    && attempts.next().is_some() => {}
            made => return made,
        }
    }
}

/// The same, with a port that is free on the first address, where any may be taken. A machine may lack some of the
/// addresses, IPv6 for one.
fn on_one_port<M: Maker>(
    maker: &mut M,
    addresses: &[SocketAddr],
    only_v6: bool,
    told: &str,
) -> io::Result<Vec<M::Socket>> {
    let explain = |ip: IpAddr, error: io::Error| match addresses {
        [_] => error,
        _ => io::Error::new(error.kind(), format!("{ip}: {error}")),
    };
    let (mut sockets, mut lacking, mut free) = (Vec::new(), Vec::new(), None);
    for address in addresses {
        let address = SocketAddr::new(address.ip(), free.unwrap_or(address.port()));
        match maker.tcp(address, only_v6) {
            Ok(socket) => {
                free = free.or(M::port(&socket));
                sockets.push(socket);
            }
            Err(error) if is_lacking(&error) => lacking.push(explain(address.ip(), error)),
            Err(error) => return Err(explain(address.ip(), error)),
        }
    }
    if sockets.is_empty() {
        let kind = io::ErrorKind::AddrNotAvailable;
        let all: Vec<_> = lacking.iter().map(ToString::to_string).collect();
        return Err(io::Error::new(kind, all.join("; ")));
    }
    for error in lacking {
        tracing::warn!("{told}: {error}; going on without");
    }
    Ok(sockets)
}

/// Whether this machine has no such address, or no address of its kind.
fn is_lacking(error: &io::Error) -> bool {
    let no_family = Some(rustix::io::Errno::AFNOSUPPORT.raw_os_error());
    error.kind() == io::ErrorKind::AddrNotAvailable || error.raw_os_error() == no_family
}
