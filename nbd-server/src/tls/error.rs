//! Why certificates and keys cannot be used. Failures of a connection are told where the connection is.

use std::io;
use std::path::PathBuf;

/// Why TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the host says.
        source: io::Error,
    },
    /// A certificate, key or revocation list is not PEM, or there is none in it.
    #[error("there is no usable PEM in {what}: {source}")]
    Pem {
        /// The file, or what it is for.
        what: String,
        /// What is wrong.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Certificates and keys that do not fit each other, or that TLS cannot use.
    #[error("{what} cannot be used: {source}")]
    Unusable {
        /// The file, or what it is for.
        what: String,
        /// What is wrong.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A certificate without a key, or a key without a certificate.
    #[error("there is {there} but no {missing}")]
    Half {
        /// What there is.
        there: &'static str,
        /// What it needs.
        missing: &'static str,
    },
    /// The authorities that are needed to judge certificates are missing.
    #[error("no certificate authorities to judge {whose} by")]
    NoAuthority {
        /// Whose certificates.
        whose: &'static str,
    },
    /// A name that no certificate can be issued for.
    #[error("{name:?} is no host name")]
    HostName {
        /// The name.
        name: String,
    },
}
