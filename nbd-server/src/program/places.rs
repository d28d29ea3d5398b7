//! Whether sockets could be made, found out without making them, so that nobody's clients notice: what the kernel does
//! not tell of another socket than the one that is meant is looked at here. Making them is for `sockets`.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use nbd_server::SocketFileOptions;
use socket2::{Domain, SockAddr, Socket, Type};

use super::images::folder_of;
use super::nameless;

/// The places of sockets that could be made together. Those of other processes do not count: one of them may be the
/// server whose configuration is looked at.
#[derive(Debug, Default)]
pub(super) struct Places {
    /// Each with whether an IPv6 address leaves IPv4 alone.
    tcp: Vec<(SocketAddr, bool)>,
    unix: Vec<PathBuf>,
    vsock: Vec<(Option<u32>, u32)>,
}

fn taken() -> io::Error {
    rustix::io::Errno::ADDRINUSE.into()
}

/// Whether two sockets would want the same.
fn overlap(one: (SocketAddr, bool), other: (SocketAddr, bool)) -> bool {
    let ((one, one_only), (other, other_only)) = (one, other);
    if one.port() != other.port() || one.port() == 0 {
        return false;
    }
    let is_all = |ip: IpAddr| ip.is_unspecified();
    let both = |wide: SocketAddr, only_v6: bool| is_all(wide.ip()) && wide.is_ipv6() && !only_v6;
    if one.is_ipv4() == other.is_ipv4() {
        one.ip() == other.ip() || is_all(one.ip()) || is_all(other.ip())
    } else {
        both(one, one_only) || both(other, other_only)
    }
}

impl Places {
    pub(super) fn tcp(&mut self, address: SocketAddr, only_v6: bool) -> io::Result<()> {
        // Datagrams have ports of their own, and the same addresses and rights.
        let socket = Socket::new(Domain::for_address(address), Type::DGRAM, None)?;
        if only_v6 && address.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        match socket.bind(&address.into()) {
            Err(error) if error.kind() != io::ErrorKind::AddrInUse => return Err(error),
            _ => {}
        }
        if self.tcp.iter().any(|other| overlap((address, only_v6), *other)) {
            return Err(taken());
        }
        self.tcp.push((address, only_v6));
        Ok(())
    }

    pub(super) fn unix(&mut self, path: &Path, options: &SocketFileOptions) -> io::Result<()> {
        SockAddr::unix(path)?;
        let folder = folder_of(path);
        match std::fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => return Err(taken()),
            Ok(_) | Err(_) => {}
        }
        // Where no file can be made, no socket can.
        let file = nameless::file(folder)?;
        let this = format!("/proc/self/fd/{}", file.as_raw_fd());
        if let Some(mode) = options.mode {
            std::fs::set_permissions(&this, PermissionsExt::from_mode(mode))?;
        }
        if options.uid.or(options.gid).is_some() {
            chown(&this, options.uid, options.gid)?;
        }
        let place = std::fs::canonicalize(folder)?.join(path.file_name().unwrap_or_default());
        if self.unix.contains(&place) {
            return Err(taken());
        }
        self.unix.push(place);
        Ok(())
    }

    pub(super) fn vsock(&mut self, cid: Option<u32>, port: u32) -> io::Result<()> {
        // One that is bound to a free port, and does not listen, is in nobody's way.
        let socket = Socket::new(Domain::VSOCK, Type::STREAM, None)?;
        socket.bind(&SockAddr::vsock(cid.unwrap_or(u32::MAX), u32::MAX))?;
        let is_same = |(other, of): &(Option<u32>, u32)| {
            port == *of && (cid == *other || cid.is_none() || other.is_none())
        };
        if port != 0 && self.vsock.iter().any(is_same) {
            return Err(taken());
        }
        self.vsock.push((cid, port));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nbd_server::ListeningSocket;

    /// An address, and whether it leaves IPv4 alone.
    type Wanted = (&'static str, bool);

    /// What the kernel says of two addresses with one port, and what is told.
    fn verdicts(one: Wanted, other: Wanted) -> [Result<(), io::ErrorKind>; 2] {
        let address = |text: &str, port| format!("{text}:{port}").parse().unwrap();
        let first = ListeningSocket::tcp(address(one.0, 0), one.1).unwrap();
        let port = first.tcp_address().unwrap().port();
        let second = ListeningSocket::tcp(address(other.0, port), other.1);
        let mut places = Places::default();
        places.tcp(address(one.0, port), one.1).expect("the first");
        let told = places.tcp(address(other.0, port), other.1);
        Places::default().tcp(address(one.0, port), one.1).expect("others do not count");
        [second.map(drop), told].map(|told| told.map_err(|error| error.kind()))
    }

    #[test]
    fn addresses_overlap_where_the_kernel_says_so() {
        let v6 = ListeningSocket::tcp("[::1]:0".parse().unwrap(), true).is_ok();
        let all: [Wanted; 6] = [
            ("127.0.0.1", false),
            ("127.0.0.2", false),
            ("0.0.0.0", false),
            ("[::1]", false),
            ("[::]", true),
            ("[::]", false),
        ];
        let usable = || all.into_iter().filter(|(text, _)| v6 || !text.starts_with('['));
        for (one, other) in usable().flat_map(|one| usable().map(move |other| (one, other))) {
            // Another program may have a port on the second address alone.
            let mut tries = std::iter::repeat_with(|| verdicts(one, other)).take(8);
            assert!(tries.any(|[kernel, told]| kernel == told), "{one:?} {other:?}");
        }
    }

    #[test]
    fn what_this_machine_lacks_is_no_place() {
        let error = Places::default().tcp("192.0.2.1:0".parse().unwrap(), false).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrNotAvailable);
    }

    #[test]
    fn socket_files_are_refused_where_they_could_not_be_made() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::create_dir(path("folder")).unwrap();
        std::fs::write(path("file"), "x").unwrap();
        let options = SocketFileOptions { mode: Some(0o600), ..SocketFileOptions::default() };
        let mut places = Places::default();
        for name in ["folder", "file", "missing/socket", &"x".repeat(200)] {
            let told = places.unix(&path(name), &options).unwrap_err();
            let made = ListeningSocket::unix(&path(name), &options).unwrap_err();
            assert_eq!(told.kind(), made.kind(), "{name}");
        }
        places.unix(&path("socket"), &options).unwrap();
        let again = places.unix(&path("folder/../socket"), &options).unwrap_err();
        assert_eq!(again.kind(), io::ErrorKind::AddrInUse);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "nothing was made");
    }
}
