//! What the URI of an NBD server says about TLS, kept as it was written. Files are read when the server is called.

use std::fmt;

use nbd_server::client::{ClientError, ClientOptions, NbdDevice, NbdUri};
use percent_encoding::utf8_percent_encode;

use crate::Address;
use crate::source_spec::RESERVED;

/// What the names of the parameters begin with.
const PREFIX: &str = "tls-";

/// TLS with a server, by libnbd's parameters: `tls-certificates=DIRECTORY` (`ca-cert.pem`, and `client-cert.pem` and
/// `client-key.pem` where the server wants to know the client; without it, the authorities of this host count),
/// `tls-hostname=NAME` (that the server proves, instead of the one in the URI), `tls-verify-peer=false` (to trust
/// everybody).
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Tls {
    /// Checked by whoever parsed the URI.
    parameters: Vec<(String, String)>,
}

impl Tls {
    /// Takes what a URI says about TLS out of its query; `None` where it demands none.
    pub(crate) fn of(uri: &mut NbdUri) -> Option<Self> {
        let is_ours = |pair: &mut (String, String)| pair.0.starts_with(PREFIX);
        uri.tls.then(|| Self { parameters: uri.query.extract_if(.., is_ours).collect() })
    }

    /// Writes the parameters, the first behind `separator`; returns what introduces the next one.
    pub(crate) fn write(
        &self,
        f: &mut fmt::Formatter<'_>,
        mut separator: char,
    ) -> Result<char, fmt::Error> {
        for (key, value) in &self.parameters {
            write!(f, "{separator}{key}={}", utf8_percent_encode(value, RESERVED))?;
            separator = '&';
        }
        Ok(separator)
    }
}

/// Calls a server, by TLS where that is demanded: never without then.
pub(crate) async fn connect(
    address: &Address,
    export: &str,
    tls: Option<&Tls>,
    options: ClientOptions,
) -> Result<std::sync::Arc<NbdDevice>, ClientError> {
    let mut uri = NbdUri::new(address.clone(), export);
    if let Some(tls) = tls {
        uri.tls = true;
        uri.query.clone_from(&tls.parameters);
    }
    NbdDevice::open(&uri, options).await
}
