//! The options of TLS, and what becomes of them. What certificates are good for is told in the library.

use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, ValueEnum};
use nbd_server::tls::{ClientCertificates, ServerTls};
use nbd_server::{Server, ServerConfig, TlsMode};

/// TLS on all listeners.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct TlsOptions {
    /// Whether clients may use TLS (on) or must (require) [default: off]
    #[arg(long, value_enum, value_name = "off|on|require", hide_possible_values = true)]
    #[arg(requires_ifs = [("on", "tls_certificates"), ("require", "tls_certificates")])]
    tls: Option<Tls>,

    /// The directory with server-cert.pem and server-key.pem; for --tls-verify-peer also with ca-cert.pem, and with
    /// ca-crl.pem where certificates were revoked
    #[arg(long, value_name = "DIR", requires = "tls")]
    tls_certificates: Option<PathBuf>,

    /// Serve those clients alone that show a certificate issued by ca-cert.pem. Exports can name theirs (client=)
    #[arg(long, requires_all = ["tls", "tls_certificates"])]
    tls_verify_peer: bool,
}

/// The modes of TLS by their names on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Tls {
    Off,
    On,
    Require,
}

impl TlsOptions {
    /// Adds TLS to the configuration of a server, where it is asked for.
    pub(super) fn apply(&self, config: ServerConfig) -> anyhow::Result<ServerConfig> {
        let mode = match self.tls {
            None | Some(Tls::Off) => return Ok(config),
            Some(Tls::On) => TlsMode::Offered,
            Some(Tls::Require) => TlsMode::Required,
        };
        let Some(tls) = self.read()? else { return Ok(config) };
        Ok(config.tls(mode, tls))
    }

    /// Uses the certificates as they are now for new connections; those that cannot be used change nothing.
    pub(super) fn reload(&self, server: &Server) {
        let replaced = match self.read() {
            Ok(None) => return,
            Ok(Some(tls)) => server.replace_tls(tls).map_err(anyhow::Error::from),
            Err(error) => Err(error),
        };
        match replaced {
            Ok(()) => tracing::info!("the certificates are read again"),
            Err(error) => tracing::error!("{error:#}; the old certificates stay"),
        }
    }

    /// The certificates as they are in the directory now; none where TLS is off.
    fn read(&self) -> anyhow::Result<Option<ServerTls>> {
        let (Some(Tls::On | Tls::Require), Some(directory)) = (self.tls, &self.tls_certificates)
        else {
            return Ok(None);
        };
        let clients = if self.tls_verify_peer {
            ClientCertificates::Required
        } else {
            ClientCertificates::Ignored
        };
        let read = ServerTls::from_directory(directory, clients);
        Ok(Some(read.context("cannot set up TLS")?))
    }
}
