//! TLS between the two parts of a negotiation: the end of the plain one and the beginning of the other. Whom to trust is
//! told in [`crate::tls`]; a client that was told to use TLS has no way around it.

#[cfg(feature = "tls")]
use rustls::pki_types::ServerName;

use super::address::Address;
use super::error::ClientError;
#[cfg(feature = "tls")]
use super::error::HandshakeFault;
use super::options::ClientOptions;
use super::stream::Halves;
#[cfg(feature = "tls")]
use crate::tls::ClientTls;

/// The name that the server of a Unix socket proves where nothing else is said.
#[cfg(feature = "tls")]
const LOCAL_NAME: &str = "localhost";

/// How one server is called by TLS.
#[cfg(feature = "tls")]
#[derive(Clone, Debug)]
pub(super) struct Security {
    tls: ClientTls,
    name: ServerName<'static>,
}

/// Without TLS there is no such thing.
#[cfg(not(feature = "tls"))]
#[derive(Clone, Debug)]
pub(super) enum Security {}

#[cfg(feature = "tls")]
impl Security {
    /// What the options demand for this server, wherever it is.
    pub(super) fn of(
        address: Option<&Address>,
        options: &ClientOptions,
    ) -> Result<Option<Self>, ClientError> {
        let Some(tls) = options.tls.clone() else { return Ok(None) };
        let host = match address {
            Some(Address::Tcp { host, .. }) => host,
            Some(Address::Unix(_)) | None => LOCAL_NAME,
        };
        let name = tls.expected(host)?;
        Ok(Some(Self { tls, name }))
    }

    /// Begins TLS on a socket whose server has acknowledged STARTTLS.
    pub(super) async fn begin(self, halves: Halves) -> Result<Halves, ClientError> {
        // What is in the buffer came in plain text, and would pass for the server's own words behind TLS.
        let stream = halves.into_stream().ok_or(HandshakeFault::PlaintextBehindStartTls)?;
        let connected = self.tls.connect(self.name, stream).await;
        let stream = connected.map_err(|source| ClientError::Tls { source })?;
        let (read, write) = tokio::io::split(stream);
        Ok(Halves::uncounted(read, write))
    }
}

#[cfg(not(feature = "tls"))]
impl Security {
    pub(super) fn of(_: Option<&Address>, _: &ClientOptions) -> Result<Option<Self>, ClientError> {
        Ok(None)
    }

    pub(super) async fn begin(self, _: Halves) -> Result<Halves, ClientError> {
        match self {}
    }
}
