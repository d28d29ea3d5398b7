//! The options of TLS, and what becomes of them. What certificates are good for is told in the library.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Args, ValueEnum};
use nbd_server::tls::{ClientCertificates, ServerTls, ServerTlsFiles, TlsError};
use nbd_server::{Server, ServerConfig, TlsMode};

use super::config::Config;
use super::errors::text_of;

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
    /// TLS as these options ask for it, or else as the configuration does; none where nobody does.
    pub(super) fn find(
        &self,
        config: Option<&Config>,
    ) -> anyhow::Result<Option<(TlsMode, ServerTls)>> {
        let mode = match self.tls {
            None => return Ok(config.map(of_files).transpose()?.flatten()),
            Some(Tls::Off) => TlsMode::Off,
            Some(Tls::On) => TlsMode::Offered,
            Some(Tls::Require) => TlsMode::Required,
        };
        if config.is_some_and(|config| config.generic.tls.mode != TlsMode::Off) {
            tracing::warn!("--tls takes the place of what the configuration says on TLS");
        }
        Ok(self.read()?.map(|tls| (mode, tls)))
    }

    /// The certificates as they are now: those of the directory, or else those that a configuration names.
    pub(super) fn of_reload(&self, config: &Config) -> anyhow::Result<Option<ServerTls>> {
        match self.tls {
            None => Ok(of_files(config)?.map(|(_, tls)| tls)),
            Some(_) => self.read(),
        }
    }

    /// Uses the certificates of the directory as they are now for new connections, if there is one; those that cannot be
    /// used change nothing.
    pub(super) fn reload(&self, server: &Server) -> bool {
        let replaced = match self.read() {
            Ok(None) => return false,
            Ok(Some(tls)) => server.replace_tls(tls).map_err(anyhow::Error::from),
            Err(error) => Err(error),
        };
        match replaced {
            Ok(()) => tracing::info!("the certificates are read again"),
            Err(error) => tracing::error!("{}; the old certificates stay", text_of(&error)),
        }
        true
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
        let told = || format!("cannot set up TLS by --tls-certificates {}", directory.display());
        Ok(Some(read.with_context(told)?))
    }
}

/// A server with TLS, where there is any.
pub(super) fn with(server: ServerConfig, tls: Option<(TlsMode, ServerTls)>) -> ServerConfig {
    match tls {
        Some((mode, tls)) => server.tls(mode, tls),
        None => server,
    }
}

/// The key whose file an error is about.
fn key_of(error: &TlsError, files: &ServerTlsFiles) -> Option<&'static str> {
    let file = match error {
        TlsError::Read { path, .. } => path,
        TlsError::Pem { what, .. } | TlsError::Unusable { what, .. } => Path::new(what),
        _ => return None,
    };
    let keys = [
        ("keyfile", Some(&*files.key)),
        ("certfile", Some(&*files.certificate)),
        ("cacertfile", files.authorities.as_deref()),
    ];
    keys.into_iter().find(|(_, named)| *named == Some(file)).map(|(key, _)| key)
}

/// TLS as a configuration asks for it.
fn of_files(config: &Config) -> anyhow::Result<Option<(TlsMode, ServerTls)>> {
    let asked = &config.generic.tls;
    if asked.mode == TlsMode::Off {
        return Ok(None);
    }
    let read = ServerTls::from_files(&asked.files).map_err(|error| {
        let key = key_of(&error, &asked.files).map(|key| format!(": {key}")).unwrap_or_default();
        let told = format!("{}: cannot set up TLS{key}", config.place(asked.line));
        anyhow::Error::from(error).context(told)
    });
    Ok(Some((asked.mode, read?)))
}
