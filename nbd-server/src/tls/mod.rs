//! TLS on both sides, by rustls with the provider aws-lc-rs: versions 1.2 and 1.3, certificates as PEM. When TLS begins
//! is told by the handshakes; which exports a client may have, by `access`.
//!
//! Pre-shared keys (TLS-PSK) are not supported, because rustls has none. Sessions are never resumed: connections live
//! long, and each shows its certificate anew.

#[cfg(feature = "client")]
mod client;
mod error;
mod identity;
mod material;
mod server;

use std::sync::Arc;

use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::version::{TLS12, TLS13};

#[cfg(feature = "client")]
pub use client::ClientTls;
pub use error::TlsError;
pub use server::{ClientCertificates, ServerTls, ServerTlsFiles};

/// The versions of TLS that a server speaks. Older ones are never spoken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TlsVersions {
    /// 1.2 and 1.3.
    #[default]
    Both,
    /// 1.2 alone.
    Only12,
    /// 1.3 alone.
    Only13,
}

impl TlsVersions {
    fn of_rustls(self) -> &'static [&'static rustls::SupportedProtocolVersion] {
        const VERSIONS: &[&rustls::SupportedProtocolVersion] = &[&TLS13, &TLS12];
        let (newer, older) = VERSIONS.split_at(1);
        match self {
            Self::Both => VERSIONS,
            Self::Only12 => older,
            Self::Only13 => newer,
        }
    }
}

/// Named at every use: a process may hold several providers and no default one.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}
