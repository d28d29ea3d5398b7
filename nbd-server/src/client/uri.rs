//! NBD URIs as people write them: `nbd://host:port/export?key=value` and `nbd+unix:///export?socket=PATH`, and with
//! feature `tls` the same with `nbds` for `nbd`. What the keys mean beyond `socket` and those of TLS is for the caller
//! to say.
//!
//! Source: `doc/uri.md` of NetworkBlockDevice/nbd.

use std::path::PathBuf;
use std::str::FromStr;

use super::address::Address;
use super::error::ClientError;
use super::options::ClientOptions;

/// The directory of certificates.
const CERTIFICATES: &str = "tls-certificates";
/// The name that the server proves.
const HOST_NAME: &str = "tls-hostname";
/// Whether the server must prove anything.
const VERIFY_PEER: &str = "tls-verify-peer";

/// A parsed NBD URI. [`NbdDevice::open`](super::NbdDevice::open) does all that it says, [`NbdUri::options`] what it says
/// about TLS: who takes it apart must not lose that.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct NbdUri {
    /// Where the server is.
    pub address: Address,
    /// The name of the export; empty for the default one.
    pub export: String,
    /// The decoded query in order, without `socket`.
    pub query: Vec<(String, String)>,
    /// Whether the scheme demands TLS (`nbds`).
    pub tls: bool,
}

impl NbdUri {
    /// The URI of an export, without TLS.
    pub fn new(address: Address, export: impl Into<String>) -> Self {
        Self { address, export: export.into(), query: Vec::new(), tls: false }
    }

    /// `options` with what the URI says about TLS, by the names that libnbd gave it:
    ///
    /// - `tls-certificates`: the directory for `ClientTls::from_directory`;
    ///   without it, the authorities of this host count
    /// - `tls-hostname`: the name that the server proves, instead of the one in the URI
    /// - `tls-verify-peer`: `true`, or `false` to trust everybody
    ///
    /// The URI of another scheme leaves the options as they are. Reads files, briefly.
    ///
    /// # Errors
    /// `ClientError::TlsSetup`.
    pub fn options(&self, options: ClientOptions) -> Result<ClientOptions, ClientError> {
        #[cfg(feature = "tls")]
        if self.tls {
            return Ok(ClientOptions { tls: Some(self.client_tls()?), ..options });
        }
        Ok(options)
    }

    #[cfg(feature = "tls")]
    fn client_tls(&self) -> Result<crate::tls::ClientTls, crate::tls::TlsError> {
        use crate::tls::ClientTls;

        let directory = self.get(CERTIFICATES).map(std::path::Path::new);
        let tls = match (self.get(VERIFY_PEER), directory) {
            (Some("false"), directory) => ClientTls::unverified(directory)?,
            (_, Some(directory)) => ClientTls::from_directory(directory)?,
            (_, None) => ClientTls::from_host()?,
        };
        match self.get(HOST_NAME) {
            Some(name) => tls.host_name(name),
            None => Ok(tls),
        }
    }

    /// The value of the first `key` in the query.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.query.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }
}

/// Why a text is no NBD URI that this client can use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UriError {
    /// Another scheme, or none.
    #[error("the URI begins with neither nbd:// nor nbd+unix:// (nor nbds:// nor nbds+unix://)")]
    Scheme,
    /// A scheme of NBD that this client does not speak.
    #[error("the scheme {scheme} is not supported")]
    Unsupported {
        /// The scheme.
        scheme: String,
    },
    /// A TCP URI without a host.
    #[error("the URI names no host")]
    NoHost,
    /// A port that is no number from 1 to 65535.
    #[error("{port:?} is no port")]
    Port {
        /// What stands in its place.
        port: String,
    },
    /// An IPv6 address whose bracket is not closed, or is followed by something other than a port.
    #[error("{authority:?} is no host and port")]
    Authority {
        /// What stands between the slashes.
        authority: String,
    },
    /// A user name before the host, which only pre-shared keys could use.
    #[error("the URI names a user, but pre-shared keys are not supported")]
    User,
    /// A parameter of TLS that is not known, has an impossible value, or stands where there is no TLS.
    #[error("the URI cannot say {key}={value}")]
    Tls {
        /// The parameter.
        key: String,
        /// Its value.
        value: String,
    },
    /// A `%` without two hexadecimal digits, or one that leaves UTF-8.
    #[error("{part:?} is not percent-encoded UTF-8")]
    Encoding {
        /// The part that cannot be decoded.
        part: String,
    },
    /// A Unix URI without `socket=`, or with an empty one.
    #[error("the URI names no socket; write nbd+unix:///EXPORT?socket=PATH")]
    NoSocket,
    /// `socket=` in a TCP URI.
    #[error("a URI of a host cannot name a socket, too")]
    SocketAndHost,
    /// A Unix URI with something before the path.
    #[error("a URI of a socket cannot name the host {host:?}")]
    HostAndSocket {
        /// The host.
        host: String,
    },
}

impl FromStr for NbdUri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        let (scheme, rest) = text.split_once("://").ok_or(UriError::Scheme)?;
        let (unix, tls) = match scheme.to_ascii_lowercase().as_str() {
            "nbd" => (false, false),
            "nbd+unix" => (true, false),
            "nbds" if cfg!(feature = "tls") => (false, true),
            "nbds+unix" if cfg!(feature = "tls") => (true, true),
            "nbds" | "nbds+unix" | "nbd+vsock" | "nbds+vsock" | "nbd+ssh" => {
                return Err(UriError::Unsupported { scheme: scheme.to_owned() });
            }
            _ => return Err(UriError::Scheme),
        };
        let rest = rest.split_once('#').map_or(rest, |(before, _)| before);
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, export) = rest.split_once('/').unwrap_or((rest, ""));
        let mut query = parse_query(query)?;
        let export = decode(export)?;
        let address = if unix {
            unix_address(authority, &mut query)?
        } else {
            if query.iter().any(|(key, _)| key == "socket") {
                return Err(UriError::SocketAndHost);
            }
            tcp_address(authority)?
        };
        check_tls(tls, &query)?;
        Ok(Self { address, export, query, tls })
    }
}

fn parse_query(query: &str) -> Result<Vec<(String, String)>, UriError> {
    query
        .split(['&', ';'])
        .filter(|pair| !pair.is_empty())
        .map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            Ok((decode(key)?, decode(value)?))
        })
        .collect()
}

/// Whether every parameter about TLS is known and in its place: one that was misspelt must not be ignored.
fn check_tls(tls: bool, query: &[(String, String)]) -> Result<(), UriError> {
    for (key, value) in query.iter().filter(|(key, _)| key.starts_with("tls-")) {
        let known = match key.as_str() {
            CERTIFICATES | HOST_NAME => !value.is_empty(),
            VERIFY_PEER => matches!(value.as_str(), "true" | "false"),
            _ => false,
        };
        let twice = query.iter().filter(|(other, _)| other == key).count() > 1;
        if !tls || !known || twice {
            return Err(UriError::Tls { key: key.clone(), value: value.clone() });
        }
    }
    Ok(())
}

fn unix_address(host: &str, query: &mut Vec<(String, String)>) -> Result<Address, UriError> {
    if !host.is_empty() {
        return Err(UriError::HostAndSocket { host: host.to_owned() });
    }
    let at = query.iter().position(|(key, _)| key == "socket").ok_or(UriError::NoSocket)?;
    let (_, path) = query.remove(at);
    if path.is_empty() {
        return Err(UriError::NoSocket);
    }
    Ok(Address::Unix(PathBuf::from(path)))
}

fn tcp_address(authority: &str) -> Result<Address, UriError> {
    if authority.contains('@') {
        return Err(UriError::User);
    }
    let wrong = || UriError::Authority { authority: authority.to_owned() };
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, after) = rest.split_once(']').ok_or_else(wrong)?;
            match after.strip_prefix(':') {
                Some(port) => (host, port),
                None if after.is_empty() => (host, ""),
                None => return Err(wrong()),
            }
        }
        None => authority.split_once(':').unwrap_or((authority, "")),
    };
    if host.is_empty() {
        return Err(UriError::NoHost);
    }
    // An empty port is the default one, as in any URI.
    let port = if port.is_empty() {
        Address::PORT
    } else {
        let number = port.parse().ok().filter(|number| *number != 0);
        number.ok_or_else(|| UriError::Port { port: port.to_owned() })?
    };
    Ok(Address::Tcp { host: decode(host)?, port })
}

/// Undoes percent-encoding, strictly.
fn decode(part: &str) -> Result<String, UriError> {
    let wrong = || UriError::Encoding { part: part.to_owned() };
    let mut decoded = Vec::with_capacity(part.len());
    let mut rest = part.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        if *first != b'%' {
            decoded.push(*first);
            continue;
        }
        let (digits, after) = rest.split_at_checked(2).ok_or_else(wrong)?;
        rest = after;
        let mut value = 0;
        for digit in digits {
            let digit = char::from(*digit).to_digit(16).ok_or_else(wrong)?;
            value = value * 16 + digit;
        }
        decoded.push(u8::try_from(value).map_err(|_| wrong())?);
    }
    String::from_utf8(decoded).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16) -> Address {
        Address::Tcp { host: host.to_owned(), port }
    }

    #[test]
    fn a_tcp_uri_names_host_port_export_and_query() {
        let uri: NbdUri = "nbd://backup.example:10810/disk%20one?bitmap=b%2F1&x".parse().unwrap();
        assert_eq!(uri.address, tcp("backup.example", 10810));
        assert_eq!(uri.export, "disk one");
        assert_eq!(uri.get("bitmap"), Some("b/1"));
        assert_eq!(uri.get("x"), Some(""));
        assert_eq!(uri.get("y"), None);
    }

    #[test]
    fn the_port_and_the_export_may_be_left_out() {
        let uri: NbdUri = "NBD://localhost".parse().unwrap();
        assert_eq!((uri.address, uri.export.as_str()), (tcp("localhost", 10809), ""));
        let uri: NbdUri = "nbd://[::1]:7/a/b".parse().unwrap();
        assert_eq!((uri.address, uri.export.as_str()), (tcp("::1", 7), "a/b"));
        let uri: NbdUri = "nbd://[fe80::1]".parse().unwrap();
        assert_eq!(uri.address.to_string(), "[fe80::1]:10809");
    }

    #[test]
    fn a_unix_uri_names_its_socket() {
        let uri: NbdUri = "nbd+unix:///e?socket=/run/a%20b.sock&bitmap=c".parse().unwrap();
        assert_eq!(uri.address, Address::Unix("/run/a b.sock".into()));
        assert_eq!(uri.query, [("bitmap".to_owned(), "c".to_owned())]);
    }

    #[test]
    fn each_mistake_has_its_name() {
        let error = |text: &str| text.parse::<NbdUri>().unwrap_err();
        assert_eq!(error("http://x"), UriError::Scheme);
        assert_eq!(error("disk.img"), UriError::Scheme);
        assert_eq!(error("nbds+vsock://1"), UriError::Unsupported { scheme: "nbds+vsock".into() });
        assert_eq!(error("nbd:///e"), UriError::NoHost);
        assert_eq!(error("nbd://h:0/e"), UriError::Port { port: "0".into() });
        assert_eq!(error("nbd://h:65536/e"), UriError::Port { port: "65536".into() });
        assert_eq!(error("nbd://[::1/e"), UriError::Authority { authority: "[::1".into() });
        assert_eq!(error("nbd://u@h/e"), UriError::User);
        assert_eq!(error("nbd://h/%2"), UriError::Encoding { part: "%2".into() });
        assert_eq!(error("nbd://h/%+1"), UriError::Encoding { part: "%+1".into() });
        assert_eq!(error("nbd://h/%ff"), UriError::Encoding { part: "%ff".into() });
        assert_eq!(error("nbd+unix:///e"), UriError::NoSocket);
        assert_eq!(error("nbd+unix:///e?socket="), UriError::NoSocket);
        assert_eq!(error("nbd://h/e?socket=/s"), UriError::SocketAndHost);
        assert_eq!(error("nbd+unix://h/e?socket=/s"), UriError::HostAndSocket { host: "h".into() });
    }

    #[test]
    fn without_the_feature_tls_a_uri_that_demands_it_is_refused() {
        for scheme in ["nbds", "nbds+unix"] {
            let parsed = format!("{scheme}://h/e").parse::<NbdUri>();
            let unsupported = UriError::Unsupported { scheme: scheme.into() };
            assert_eq!(parsed == Err(unsupported), !cfg!(feature = "tls"));
        }
    }

    #[test]
    fn parameters_of_tls_are_known_or_refused() {
        let error = |query: &str| format!("nbd://h/e?{query}").parse::<NbdUri>().unwrap_err();
        for query in ["tls-certificates=/d", "tls-verify-peer=false", "tls-x=1"] {
            assert!(matches!(error(query), UriError::Tls { .. }), "{query}");
        }
    }

    #[cfg(feature = "tls")]
    #[test]
    fn a_uri_of_tls_tells_what_to_trust() {
        let uri: NbdUri = "nbds://h:1/e?tls-verify-peer=false&tls-hostname=x".parse().unwrap();
        assert!(uri.tls);
        assert!(uri.options(ClientOptions::default()).unwrap().tls.is_some());
        let uri: NbdUri = "NBDS+UNIX:///e?socket=/s&tls-certificates=/no/such".parse().unwrap();
        assert!(uri.tls);
        assert!(uri.options(ClientOptions::default()).is_err());
        for query in [
            "tls-verify-peer=0",
            "tls-verify-peer",
            "tls-hostname=",
            "tls-certificates",
            "tls-psk-file=/f",
            "tls-hostname=a&tls-hostname=b",
        ] {
            let parsed = format!("nbds://h/e?{query}").parse::<NbdUri>();
            assert!(matches!(parsed, Err(UriError::Tls { .. })), "{query}");
        }
    }
}
