//! Certificates, keys and revocation lists as they lie in a directory, under the names that QEMU, libnbd and nbdkit use.
//! What they are good for is not judged here.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};

use super::error::TlsError;

/// The authorities that the other side's certificate is judged by.
pub(super) const CA: &str = "ca-cert.pem";
/// What the authorities have revoked.
pub(super) const CRL: &str = "ca-crl.pem";

/// A certificate with its chain, and its key.
pub(super) struct Credentials {
    pub(super) chain: Vec<CertificateDer<'static>>,
    pub(super) key: PrivateKeyDer<'static>,
}

impl Credentials {
    /// From PEM.
    pub(super) fn from_pem(chain: Pem<'_>, key: Pem<'_>) -> Result<Self, TlsError> {
        let key_der =
            PrivateKeyDer::from_pem_slice(key.text).map_err(|source| key.error(source))?;
        Ok(Self { chain: chain.all()?, key: key_der })
    }
}

/// A PEM text with a name for messages.
#[derive(Clone, Copy)]
pub(super) struct Pem<'a> {
    pub(super) what: &'a str,
    pub(super) text: &'a [u8],
}

impl Pem<'_> {
    fn error(&self, source: impl std::error::Error + Send + Sync + 'static) -> TlsError {
        TlsError::Pem { what: self.what.to_owned(), source: Box::new(source) }
    }

    /// Every item of a kind; at least one.
    fn all<T: PemObject + 'static>(&self) -> Result<Vec<T>, TlsError> {
        let found: Result<Vec<T>, _> = T::pem_slice_iter(self.text).collect();
        match found {
            Ok(found) if found.is_empty() => {
                Err(self.error(rustls::pki_types::pem::Error::NoItemsFound))
            }
            Ok(found) => Ok(found),
            Err(source) => Err(self.error(source)),
        }
    }

    /// The certificates as authorities.
    pub(super) fn authorities(&self) -> Result<RootCertStore, TlsError> {
        let mut roots = RootCertStore::empty();
        for certificate in self.all::<CertificateDer<'static>>()? {
            roots.add(certificate).map_err(|source| TlsError::Unusable {
                what: self.what.to_owned(),
                source: Box::new(source),
            })?;
        }
        Ok(roots)
    }

    /// The revocation lists.
    pub(super) fn revocations(
        &self,
    ) -> Result<Vec<CertificateRevocationListDer<'static>>, TlsError> {
        self.all()
    }
}

/// A file, with its path for messages.
pub(super) struct PemFile {
    what: String,
    text: Vec<u8>,
}

impl PemFile {
    pub(super) fn pem(&self) -> Pem<'_> {
        Pem { what: &self.what, text: &self.text }
    }
}

/// Reads `name` in `directory`.
pub(super) fn find(directory: &Path, name: &str) -> Result<Option<PemFile>, TlsError> {
    match open(&directory.join(name)) {
        Ok(file) => Ok(Some(file)),
        Err(TlsError::Read { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Reads `name` in `directory`, where it must be.
pub(super) fn read(directory: &Path, name: &str) -> Result<PemFile, TlsError> {
    open(&directory.join(name))
}

/// Reads a file.
pub(super) fn open(path: &Path) -> Result<PemFile, TlsError> {
    match fs::read(path) {
        Ok(text) => Ok(PemFile { what: path.display().to_string(), text }),
        Err(source) => Err(TlsError::Read { path: path.to_owned(), source }),
    }
}
