//! What a client needs for TLS: whom it trusts, as whom it calls, and under which name it expects the server.
//! Connections are not known here.

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::error::TlsError;
use super::material::{self, CA, CRL, Credentials, Pem};
use super::{TlsVersions, provider};

/// Whom a client trusts, as whom it calls, and the server's name. Clones share it.
///
/// A client that has one never speaks without TLS: where the server does not begin it, connecting fails.
#[derive(Clone)]
pub struct ClientTls {
    config: Arc<rustls::ClientConfig>,
    host_name: Option<ServerName<'static>>,
    verified: bool,
}

impl fmt::Debug for ClientTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientTls")
            .field("host_name", &self.host_name)
            .field("verified", &self.verified)
            .finish_non_exhaustive()
    }
}

impl ClientTls {
    /// Reads a directory: `ca-cert.pem`, the authorities to trust; `ca-crl.pem`, what those have revoked, if there is
    /// one; `client-cert.pem` and `client-key.pem`, as whom to call, if they are there. Reads files, briefly.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn from_directory(directory: &Path) -> Result<Self, TlsError> {
        let ca = material::read(directory, CA)?;
        let crl = material::find(directory, CRL)?;
        let credentials = credentials(directory)?;
        let verifier =
            verifier(ca.pem().authorities()?, crl.as_ref().map(|file| file.pem()), ca.pem().what)?;
        Self::new(verifier, credentials, true)
    }

    /// The same from PEM texts: the authorities to trust, and where the client has one its certificate and its key.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn from_pem(
        authorities: &[u8],
        credentials: Option<(&[u8], &[u8])>,
    ) -> Result<Self, TlsError> {
        let ca = Pem { what: "the authorities", text: authorities };
        let credentials = credentials.map(|(certificate, key)| {
            Credentials::from_pem(
                Pem { what: "the client's certificate", text: certificate },
                Pem { what: "the client's key", text: key },
            )
        });
        Self::new(verifier(ca.authorities()?, None, ca.what)?, credentials.transpose()?, true)
    }

    /// Trusts the authorities that this host trusts, and calls without a certificate. Reads files, briefly.
    ///
    /// # Errors
    /// [`TlsError::NoAuthority`] where there are none.
    pub fn from_host() -> Result<Self, TlsError> {
        let mut roots = RootCertStore::empty();
        // Hosts hold certificates that cannot be used; the others are enough.
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if roots.is_empty() {
            return Err(TlsError::NoAuthority { whose: "servers" });
        }
        Self::new(verifier(roots, None, "the host's authorities")?, None, true)
    }

    /// Trusts every server: what is sent is hidden from those who listen, but not from those who sit in between. Calls
    /// with the certificate in `directory`, as in [`ClientTls::from_directory`], if there is one.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn unverified(directory: Option<&Path>) -> Result<Self, TlsError> {
        let credentials = directory.map_or(Ok(None), credentials)?;
        Self::new(Arc::new(Anybody(provider())), credentials, false)
    }

    /// Expects a certificate for this name or IP address, instead of the host that is called (`localhost` for Unix
    /// sockets).
    ///
    /// # Errors
    /// [`TlsError::HostName`].
    pub fn host_name(self, name: &str) -> Result<Self, TlsError> {
        Ok(Self { host_name: Some(server_name(name)?), ..self })
    }

    fn new(
        verifier: Arc<dyn ServerCertVerifier>,
        credentials: Option<Credentials>,
        verified: bool,
    ) -> Result<Self, TlsError> {
        let unusable = |what: &str, source| TlsError::Unusable {
            what: what.to_owned(),
            source: Box::new(source),
        };
        let builder = rustls::ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(TlsVersions::Both.of_rustls())
            .map_err(|source| unusable("the TLS provider", source))?
            .dangerous()
            .with_custom_certificate_verifier(verifier);
        let mut config = match credentials {
            Some(Credentials { chain, key }) => builder
                .with_client_auth_cert(chain, key)
                .map_err(|source| unusable("the client's certificate", source))?,
            None => builder.with_no_client_auth(),
        };
        config.resumption = Resumption::disabled();
        Ok(Self { config: Arc::new(config), host_name: None, verified })
    }

    /// The name that a server at `host` must prove.
    pub(crate) fn expected(&self, host: &str) -> Result<ServerName<'static>, TlsError> {
        self.host_name.clone().map_or_else(|| server_name(host), Ok)
    }

    /// Does the client's side of the TLS handshake.
    pub(crate) async fn connect<S>(
        &self,
        name: ServerName<'static>,
        stream: S,
    ) -> io::Result<TlsStream<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        TlsConnector::from(Arc::clone(&self.config)).connect(name, stream).await
    }
}

fn server_name(name: &str) -> Result<ServerName<'static>, TlsError> {
    // An IPv6 address may carry a zone, which no certificate knows.
    let bare = name.split_once('%').map_or(name, |(address, _)| address);
    ServerName::try_from(bare.to_owned()).map_err(|_| TlsError::HostName { name: name.to_owned() })
}

/// The client's certificate in a directory.
fn credentials(directory: &Path) -> Result<Option<Credentials>, TlsError> {
    let certificate = material::find(directory, "client-cert.pem")?;
    let key = material::find(directory, "client-key.pem")?;
    match (certificate, key) {
        (Some(certificate), Some(key)) => {
            Credentials::from_pem(certificate.pem(), key.pem()).map(Some)
        }
        (None, None) => Ok(None),
        (Some(_), None) => {
            Err(TlsError::Half { there: "client-cert.pem", missing: "client-key.pem" })
        }
        (None, Some(_)) => {
            Err(TlsError::Half { there: "client-key.pem", missing: "client-cert.pem" })
        }
    }
}

/// Judges servers' certificates by authorities and their revocations.
fn verifier(
    roots: RootCertStore,
    crl: Option<Pem<'_>>,
    what: &str,
) -> Result<Arc<dyn ServerCertVerifier>, TlsError> {
    let mut builder = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider());
    if let Some(crl) = crl {
        builder = builder.with_crls(crl.revocations()?).allow_unknown_revocation_status();
    }
    let built = builder.build();
    Ok(built
        .map_err(|source| TlsError::Unusable { what: what.to_owned(), source: Box::new(source) })?)
}

/// Takes every certificate for valid. That the server has its key is still checked.
#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
