//! Rules on who may connect, by what the kernel tells of the other end. Certificates are not looked at here.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use crate::peer::Peer;

/// A set of clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ClientRule {
    /// Those of a network, or of one address. Bits of the address behind the prefix do not count.
    Network {
        /// An address of the network.
        address: IpAddr,
        /// How many leading bits are the network's.
        prefix_bits: u8,
    },
    /// All that come over a Unix socket.
    Unix,
    /// Processes of a user that come over a Unix socket.
    Uid(u32),
    /// The context of a virtual machine that comes over vsock.
    Cid(u32),
}

impl ClientRule {
    /// Whether it means this client.
    pub fn matches(&self, peer: &Peer) -> bool {
        match (*self, peer) {
            (Self::Network { address, prefix_bits }, peer) => {
                peer.address().is_some_and(|found| share_prefix(address, found, prefix_bits))
            }
            (Self::Unix, Peer::Unix { .. }) => true,
            (Self::Uid(wanted), Peer::Unix { uid }) => wanted == *uid,
            (Self::Cid(wanted), Peer::Vsock { cid, .. }) => wanted == *cid,
            _ => false,
        }
    }
}

/// Whether two addresses of one family begin with the same bits.
fn share_prefix(one: IpAddr, other: IpAddr, bits: u8) -> bool {
    let (one, other, width) = match (one, other) {
        (IpAddr::V4(one), IpAddr::V4(other)) => {
            (u128::from(one.to_bits()), u128::from(other.to_bits()), 32)
        }
        (IpAddr::V6(one), IpAddr::V6(other)) => (one.to_bits(), other.to_bits(), 128),
        _ => return false,
    };
    let ignored = width - u32::from(bits).min(width);
    // Shifting by all bits of the type is none: every address is in a network without prefix.
    (one ^ other).checked_shr(ignored).unwrap_or(0) == 0
}

/// Why a text is no [`ClientRule`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ClientRuleError {
    /// It is none of the forms.
    #[error(
        "{0:?} is neither an address, a network ADDRESS/BITS, `unix`, uid:NUMBER nor cid:NUMBER"
    )]
    Unknown(String),
    /// A network that holds all IPv4 addresses in the spelling of IPv6, and others.
    #[error(
        "{0:?} is more than all IPv4 addresses; 0.0.0.0/0 are those, and a network of IPv6 addresses means no others"
    )]
    Mapped(String),
    /// The prefix is longer than the address.
    #[error("an address of {text:?} has {most} bits")]
    Prefix {
        /// What was said.
        text: String,
        /// How many bits there are.
        most: u8,
    },
}

impl FromStr for ClientRule {
    type Err = ClientRuleError;

    fn from_str(text: &str) -> Result<Self, ClientRuleError> {
        let unknown = || ClientRuleError::Unknown(text.to_owned());
        if text == "unix" {
            return Ok(Self::Unix);
        }
        if let Some(uid) = text.strip_prefix("uid:") {
            return uid.parse().map(Self::Uid).map_err(|_| unknown());
        }
        if let Some(cid) = text.strip_prefix("cid:") {
            return cid.parse().map(Self::Cid).map_err(|_| unknown());
        }
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let written: IpAddr = address.parse().map_err(|_| unknown())?;
        let most = if written.is_ipv4() { 32 } else { 128 };
        let bits = match prefix {
            Some(prefix) => prefix.parse::<u8>().map_err(|_| unknown())?,
            None => most,
        };
        if bits > most {
            return Err(ClientRuleError::Prefix { text: text.to_owned(), most });
        }
        // Peers are compared as IPv4 where they are, so such networks are, too.
        let address = written.to_canonical();
        let mapped = written.is_ipv6() && address.is_ipv4();
        if mapped && bits < 96 {
            return Err(ClientRuleError::Mapped(text.to_owned()));
        }
        Ok(Self::Network {
            address: if mapped || written.is_ipv4() { address } else { written },
            prefix_bits: if mapped { bits - 96 } else { bits },
        })
    }
}

impl fmt::Display for ClientRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Network { address, prefix_bits } => write!(f, "{address}/{prefix_bits}"),
            Self::Unix => f.write_str("unix"),
            Self::Uid(uid) => write!(f, "uid:{uid}"),
            Self::Cid(cid) => write!(f, "cid:{cid}"),
        }
    }
}

/// Who may connect. By default everybody.
///
/// Who is denied is refused whatever else is said. Once somebody is allowed by name, everybody else is refused: an
/// address that is allowed shuts out Unix clients, too, unless `unix` or their user is allowed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Admission {
    allowed: Option<Vec<ClientRule>>,
    denied: Vec<ClientRule>,
}

impl Admission {
    /// Nobody, until somebody is allowed.
    pub fn nobody() -> Self {
        Self { allowed: Some(Vec::new()), denied: Vec::new() }
    }

    /// Also allows these, and from now on nobody who is not allowed.
    #[must_use]
    pub fn allow(mut self, rules: impl IntoIterator<Item = ClientRule>) -> Self {
        self.allowed.get_or_insert_default().extend(rules);
        self
    }

    /// Refuses these.
    #[must_use]
    pub fn deny(mut self, rules: impl IntoIterator<Item = ClientRule>) -> Self {
        self.denied.extend(rules);
        self
    }

    /// Whether this client may connect.
    pub fn permits(&self, peer: &Peer) -> bool {
        let means = |rules: &[ClientRule]| rules.iter().any(|rule| rule.matches(peer));
        !means(&self.denied) && self.allowed.as_deref().is_none_or(means)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(address: &str) -> Peer {
        Peer::Tcp((address.parse::<IpAddr>().unwrap(), 40_000).into())
    }

    fn rule(text: &str) -> ClientRule {
        text.parse().unwrap()
    }

    #[test]
    fn networks_are_compared_by_their_prefix_in_either_spelling() {
        let rules = |text| Admission::default().allow([rule(text)]);
        for (network, inside, outside) in [
            ("192.168.7.9/16", "192.168.255.1", "192.169.0.0"),
            ("10.0.0.1", "10.0.0.1", "10.0.0.2"),
            ("10.0.0.0/31", "::ffff:10.0.0.1", "10.0.0.2"),
            ("::ffff:10.0.0.0/104", "10.1.2.3", "11.0.0.0"),
            ("2001:db8::/33", "2001:db8:7fff::1", "2001:db8:8000::"),
            ("0.0.0.0/0", "255.1.2.3", "::1"),
            ("::/0", "::1", "127.0.0.1"),
        ] {
            assert!(rules(network).permits(&tcp(inside)), "{network} {inside}");
            assert!(!rules(network).permits(&tcp(outside)), "{network} {outside}");
        }
    }

    #[test]
    fn denial_wins_and_an_allowance_shuts_everybody_else_out() {
        let everybody = Admission::default();
        assert!(everybody.permits(&tcp("1.2.3.4")) && everybody.permits(&Peer::Unknown));
        assert!(!Admission::nobody().permits(&Peer::Unix { uid: 0 }));
        let admission = everybody.clone().allow([rule("10.0.0.0/8"), rule("uid:7"), rule("cid:3")]);
        let admission = admission.deny([rule("10.0.0.9")]);
        for peer in [tcp("10.0.0.8"), Peer::Unix { uid: 7 }, Peer::Vsock { cid: 3, port: 1 }] {
            assert!(admission.permits(&peer), "{peer}");
        }
        for peer in [tcp("10.0.0.9"), Peer::Unix { uid: 8 }, Peer::Unknown] {
            assert!(!admission.permits(&peer), "{peer}");
        }
        assert!(everybody.clone().deny([rule("unix")]).permits(&tcp("10.0.0.9")));
        assert!(!everybody.deny([rule("unix")]).permits(&Peer::Unix { uid: 0 }));
    }

    #[test]
    fn a_network_in_the_spelling_of_ipv6_is_all_of_ipv4_at_most() {
        let denied = Admission::default().deny([rule("::ffff:0:0/96")]);
        assert!(!denied.permits(&tcp("10.0.0.9")) && denied.permits(&tcp("::1")));
        for text in ["::ffff:0:0/95", "::ffff:10.0.0.1/0"] {
            let refused = text.parse::<ClientRule>();
            assert_eq!(refused, Err(ClientRuleError::Mapped(text.to_owned())));
        }
    }

    #[test]
    fn rules_are_read_or_refused_with_a_reason() {
        for text in ["10.0.0.1/32", "::1/128", "unix", "uid:0", "cid:2"] {
            assert_eq!(rule(text).to_string(), text);
        }
        for text in
            ["", "10.0.0", "10.0.0.1/33", "::/129", "uid:", "uid:root", "cid:-1", "a/8", "1.2.3.4/"]
        {
            assert!(text.parse::<ClientRule>().is_err(), "{text}");
        }
    }
}
