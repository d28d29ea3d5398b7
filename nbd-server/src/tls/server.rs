//! What a server needs for TLS: its certificate, and what it demands of clients'. Connections and exports are not known
//! here.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::error::TlsError;
use super::identity::identity;
use super::material::{self, CA, CRL, Credentials, Pem};
use super::{TlsVersions, provider};
use crate::access::Identity;

/// What a server demands of clients' certificates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ClientCertificates {
    /// None is asked for: whoever connects is nobody in particular.
    #[default]
    Ignored,
    /// One is asked for. Clients without are nobody in particular; one that is not valid ends the connection.
    Requested,
    /// Clients without a valid one are not served.
    Required,
}

/// Where what a server needs for TLS lies, for [`ServerTls::from_files`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerTlsFiles {
    /// The server's certificate, followed by those between it and the authority's, as PEM.
    pub certificate: PathBuf,
    /// Its key, as PEM; may be the same file.
    pub key: PathBuf,
    /// The authorities that issue clients' certificates, as PEM. Where this is named, clients without a valid one are
    /// not served; otherwise none is asked for.
    pub authorities: Option<PathBuf>,
    /// The versions to speak.
    pub versions: TlsVersions,
    /// Whether the server's order of ciphers counts, and not the client's.
    pub server_order: bool,
}

/// A server's certificate and key, and its demands on clients'. Clones share them.
#[derive(Clone)]
pub struct ServerTls {
    config: Arc<rustls::ServerConfig>,
    clients: ClientCertificates,
}

impl fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerTls").field("clients", &self.clients).finish_non_exhaustive()
    }
}

impl ServerTls {
    /// Reads `server-cert.pem` (followed by the certificates between it and the authority's, if there are any) and
    /// `server-key.pem` in a directory; where clients' certificates are looked at, also `ca-cert.pem`, the authorities
    /// that issue them, and `ca-crl.pem`, what those have revoked, if there is one. Reads files, briefly.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn from_directory(directory: &Path, clients: ClientCertificates) -> Result<Self, TlsError> {
        let certificate = material::read(directory, "server-cert.pem")?;
        let key = material::read(directory, "server-key.pem")?;
        let credentials = Credentials::from_pem(certificate.pem(), key.pem())?;
        let (ca, crl) = match clients {
            ClientCertificates::Ignored => (None, None),
            _ => (Some(material::read(directory, CA)?), material::find(directory, CRL)?),
        };
        let (ca, crl) = (ca.as_ref().map(|file| file.pem()), crl.as_ref().map(|file| file.pem()));
        let demands = Demands { clients, ca, crl, ..Demands::default() };
        Self::new(credentials, demands, certificate.pem().what)
    }

    /// Reads the files that are named. Briefly; to be called again after they changed.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn from_files(files: &ServerTlsFiles) -> Result<Self, TlsError> {
        let certificate = material::open(&files.certificate)?;
        let key = material::open(&files.key)?;
        let credentials = Credentials::from_pem(certificate.pem(), key.pem())?;
        let ca = files.authorities.as_deref().map(material::open).transpose()?;
        let demands = Demands {
            clients: match ca {
                Some(_) => ClientCertificates::Required,
                None => ClientCertificates::Ignored,
            },
            ca: ca.as_ref().map(|file| file.pem()),
            crl: None,
            versions: files.versions,
            server_order: files.server_order,
        };
        Self::new(credentials, demands, certificate.pem().what)
    }

    /// The same from PEM texts: the server's certificate with what lies between it and the authority's, its key, and the
    /// authorities that issue clients' certificates.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn from_pem(
        certificate: &[u8],
        key: &[u8],
        clients: ClientCertificates,
        authorities: Option<&[u8]>,
    ) -> Result<Self, TlsError> {
        let what = "the server's certificate";
        let credentials = Credentials::from_pem(
            Pem { what, text: certificate },
            Pem { what: "the server's key", text: key },
        )?;
        let ca = authorities.map(|text| Pem { what: "the clients' authorities", text });
        Self::new(credentials, Demands { clients, ca, ..Demands::default() }, what)
    }

    fn new(credentials: Credentials, demands: Demands<'_>, what: &str) -> Result<Self, TlsError> {
        let Demands { clients, ca, crl, versions, server_order } = demands;
        let unusable = |what: &str, source: Box<dyn std::error::Error + Send + Sync>| {
            TlsError::Unusable { what: what.to_owned(), source }
        };
        let builder = rustls::ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(versions.of_rustls())
            .map_err(|source| unusable("the TLS provider", Box::new(source)))?;
        let builder = if clients == ClientCertificates::Ignored {
            builder.with_no_client_auth()
        } else {
            let ca = ca.ok_or(TlsError::NoAuthority { whose: "clients" })?;
            let mut verifier = WebPkiClientVerifier::builder_with_provider(
                Arc::new(ca.authorities()?),
                provider(),
            );
            if let Some(crl) = crl {
                // Authorities without a list revoke nothing.
                verifier = verifier.with_crls(crl.revocations()?).allow_unknown_revocation_status();
            }
            if clients == ClientCertificates::Requested {
                verifier = verifier.allow_unauthenticated();
            }
            let verifier =
                verifier.build().map_err(|source| unusable(ca.what, Box::new(source)))?;
            builder.with_client_cert_verifier(verifier)
        };
        let mut config = builder
            .with_single_cert(credentials.chain, credentials.key)
            .map_err(|source| unusable(what, Box::new(source)))?;
        config.ignore_client_order = server_order;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Self { config: Arc::new(config), clients })
    }

    /// Whether clients' certificates are looked at.
    pub(crate) fn identifies_clients(&self) -> bool {
        self.clients != ClientCertificates::Ignored
    }

    /// Does the server's side of the TLS handshake. Gives the stream back where that fails.
    pub(crate) async fn accept<S>(&self, stream: S) -> Result<Accepted<S>, (io::Error, S)>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let acceptor = TlsAcceptor::from(Arc::clone(&self.config));
        let stream = acceptor.accept(stream).into_fallible().await?;
        let (_, session) = stream.get_ref();
        let first = session.peer_certificates().and_then(<[_]>::first);
        Ok(Accepted { identity: first.map(identity).map(Arc::new), stream })
    }
}

/// What a server demands, beside its own certificate.
#[derive(Default)]
struct Demands<'a> {
    clients: ClientCertificates,
    ca: Option<Pem<'a>>,
    crl: Option<Pem<'a>>,
    versions: TlsVersions,
    server_order: bool,
}

/// A stream on which TLS has begun.
pub(crate) struct Accepted<S> {
    pub(crate) stream: TlsStream<S>,
    /// What the client's certificate says, where it showed one.
    pub(crate) identity: Option<Arc<Identity>>,
}
