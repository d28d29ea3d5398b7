//! Who is at the other end of a connection, as far as TLS tells, and which exports they may have. How certificates are
//! judged is told elsewhere.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::handshake::Unavailable;

/// A name in a client's certificate, as rules of exports use it: `cn:NAME`, the common name of its subject, or
/// `dns:NAME`, a DNS name among its alternative names. Common names are compared as they are, DNS names without regard
/// to case; a `*` stands for itself.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ClientName {
    /// The common name of the certificate's subject.
    Common(String),
    /// A DNS name among the certificate's alternative names.
    Dns(String),
}

/// A text that names no client.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is neither cn:NAME nor dns:NAME")]
pub struct ClientNameError {
    /// The text.
    pub text: String,
}

impl FromStr for ClientName {
    type Err = ClientNameError;

    fn from_str(text: &str) -> Result<Self, ClientNameError> {
        match text.split_once(':') {
            Some(("cn", name)) if !name.is_empty() => Ok(Self::Common(name.to_owned())),
            Some(("dns", name)) if !name.is_empty() => Ok(Self::Dns(name.to_owned())),
            _ => Err(ClientNameError { text: text.to_owned() }),
        }
    }
}

impl fmt::Display for ClientName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Common(name) => write!(f, "cn:{name}"),
            Self::Dns(name) => write!(f, "dns:{name}"),
        }
    }
}

/// What a certificate that was found valid says about a client.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) names: Vec<ClientName>,
}

impl Identity {
    fn has(&self, wanted: &ClientName) -> bool {
        self.names.iter().any(|name| match (name, wanted) {
            (ClientName::Common(name), ClientName::Common(wanted)) => name == wanted,
            (ClientName::Dns(name), ClientName::Dns(wanted)) => name.eq_ignore_ascii_case(wanted),
            _ => false,
        })
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.names.is_empty() {
            return f.write_str("a certificate without names");
        }
        for (index, name) in self.names.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            // A name may hold anything: it must not look like another line of a log.
            write!(f, "{comma}{}", name.to_string().escape_debug())?;
        }
        Ok(())
    }
}

/// How far a connection is protected.
#[derive(Clone, Debug, Default)]
pub(crate) enum Protection {
    /// Not at all.
    #[default]
    Plain,
    /// By TLS; with the client's identity where it showed a valid certificate.
    #[cfg_attr(not(any(feature = "tls", test)), expect(dead_code, reason = "only TLS makes one"))]
    Tls(Option<Arc<Identity>>),
}

impl fmt::Display for Protection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain => f.write_str("without TLS"),
            Self::Tls(None) => f.write_str("without a certificate"),
            Self::Tls(Some(identity)) => identity.fmt(f),
        }
    }
}

/// What an export demands of those who want it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Access {
    pub(crate) tls_only: bool,
    /// Those who may have it; `None` is everybody.
    pub(crate) clients: Option<Vec<ClientName>>,
}

impl Access {
    /// Whether only clients with TLS can have it.
    pub(crate) fn needs_tls(&self) -> bool {
        self.tls_only || self.clients.is_some()
    }

    /// Whether a client may have it.
    pub(crate) fn judge(&self, protection: &Protection) -> Result<(), Unavailable> {
        match (protection, &self.clients) {
            (Protection::Plain, _) if self.needs_tls() => Err(Unavailable::TlsRequired),
            (_, None) => Ok(()),
            (Protection::Tls(Some(identity)), Some(clients))
                if clients.iter().any(|client| identity.has(client)) =>
            {
                Ok(())
            }
            (_, Some(_)) => Err(Unavailable::Forbidden),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tls(names: &[&str]) -> Protection {
        let names = names.iter().map(|name| name.parse().unwrap()).collect();
        Protection::Tls(Some(Arc::new(Identity { names })))
    }

    fn access(tls_only: bool, clients: Option<&[&str]>) -> Access {
        let clients = clients.map(|all| all.iter().map(|name| name.parse().unwrap()).collect());
        Access { tls_only, clients }
    }

    #[test]
    fn names_of_clients_are_read_and_written() {
        for text in ["cn:Backup 1", "dns:backup-1.example", "cn:a:b"] {
            assert_eq!(text.parse::<ClientName>().unwrap().to_string(), text);
        }
        for text in ["", "backup-1", "cn:", "dns:", "CN:x", "o:x"] {
            assert!(text.parse::<ClientName>().is_err(), "{text}");
        }
    }

    #[test]
    fn an_export_without_demands_is_everybodys() {
        let open = access(false, None);
        for protection in [Protection::Plain, Protection::Tls(None), tls(&["cn:a"])] {
            assert_eq!(open.judge(&protection), Ok(()));
        }
    }

    #[test]
    fn without_tls_an_export_that_demands_it_cannot_be_had() {
        for access in [access(true, None), access(false, Some(&["cn:a"]))] {
            assert_eq!(access.judge(&Protection::Plain), Err(Unavailable::TlsRequired));
        }
        assert_eq!(access(true, None).judge(&Protection::Tls(None)), Ok(()));
    }

    #[test]
    fn only_a_named_client_finds_an_export_that_names_its_clients() {
        let access = access(false, Some(&["cn:a", "dns:B.example"]));
        for names in [&["cn:a"][..], &["dns:b.EXAMPLE"], &["cn:x", "dns:b.example"]] {
            assert_eq!(access.judge(&tls(names)), Ok(()), "{names:?}");
        }
        for names in [&["cn:A"][..], &["dns:a"], &["cn:B.example"], &["dns:*.example"], &[]] {
            assert_eq!(access.judge(&tls(names)), Err(Unavailable::Forbidden), "{names:?}");
        }
        assert_eq!(access.judge(&Protection::Tls(None)), Err(Unavailable::Forbidden));
        let nobodys = Access { tls_only: false, clients: Some(Vec::new()) };
        assert_eq!(nobodys.judge(&tls(&["cn:a"])), Err(Unavailable::Forbidden));
    }

    #[test]
    fn a_name_cannot_forge_a_line_of_the_log() {
        let Protection::Tls(Some(identity)) = tls(&["cn:a\nb"]) else { panic!() };
        assert_eq!(identity.to_string(), "cn:a\\nb");
    }
}
