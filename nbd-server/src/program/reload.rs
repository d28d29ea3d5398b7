//! What is to be served, from the command line and from files that are read again. Opening it is the catalogue's.

use std::path::PathBuf;
use std::time::Duration;

use nbd_server::{Admission, ClientRule, Replacement, Server, ServerConfig};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::NewTls;
use super::catalogue::Catalogue;
use super::config::{self, Config, Fault, Faults, Finding, Generic, Place};
use super::errors::text_of;
use super::options::{ExportSpec, Options};
use super::wanted::{Refused, Wanted};

/// How long reading files again may take: one can lie on a host that does not answer.
const READ_TIMEOUT: Duration = Duration::from_secs(30);

/// What comes of reading the files.
type Read = Result<(Config, anyhow::Result<Option<NewTls>>), Faults>;

/// Where what is served is told.
pub(super) struct Reloading {
    path: Option<PathBuf>,
    /// As it was at the start.
    generic: Option<Generic>,
    exports: Vec<ExportSpec>,
    allow: Vec<ClientRule>,
    deny: Vec<ClientRule>,
    #[cfg(feature = "tls")]
    tls: super::tls::TlsOptions,
    /// The last time that the files were read again.
    reading: Option<JoinHandle<Read>>,
}

impl Reloading {
    /// Keeps what reading the files again needs.
    ///
    /// # Errors
    /// Where nothing is to be served, and no folder is named where exports may come to be.
    pub(super) fn new(options: &Options, config: Option<&Config>) -> Result<Self, Faults> {
        let reloading = Self {
            path: options.config.clone(),
            generic: config.map(|config| config.generic.clone()),
            exports: options.exports.clone(),
            allow: options.allow.clone(),
            deny: options.deny.clone(),
            #[cfg(feature = "tls")]
            tls: options.tls.clone(),
            reading: None,
        };
        if let Some(config) = config
            && !reloading.finds_any(config)
            && config.generic.include.is_none()
        {
            return Err(Faults(vec![Finding { place: whole(config), what: Fault::NoExports }]));
        }
        Ok(reloading)
    }

    /// Whether there is an export at all; a word of warning where there is none.
    fn finds_any(&self, config: &Config) -> bool {
        let finds = !config.exports.is_empty() || !self.exports.is_empty();
        if !finds {
            tracing::warn!("{}: no export is configured, nothing is served", whole(config));
        }
        finds
    }

    /// Everything that is to be served: what the command line says, and what the files say.
    pub(super) fn wanted(&self, config: Option<&Config>) -> Vec<Wanted> {
        let of_files = config.map(|config| &config.exports[..]).unwrap_or_default();
        let has_default = of_files.iter().any(|(_, spec)| spec.is_default);
        let mut wanted: Vec<Wanted> = Vec::new();
        for (index, spec) in self.exports.iter().enumerate() {
            let is_default = index == 0 && !has_default;
            wanted.push(Wanted { spec: ExportSpec { is_default, ..spec.clone() }, place: None });
        }
        wanted.extend(
            of_files
                .iter()
                .map(|(place, spec)| Wanted { spec: spec.clone(), place: Some(place.clone()) }),
        );
        wanted
    }

    /// Adds who may connect, and whether exports are listed.
    pub(super) fn with_policy(
        &self,
        replacement: Replacement,
        config: Option<&Config>,
    ) -> Replacement {
        let generic = config.map(|config| &config.generic);
        let mut admission = generic.map(|generic| generic.admission.clone()).unwrap_or_default();
        if !self.allow.is_empty() {
            admission = admission.allow(self.allow.iter().copied());
        }
        replacement
            .admission(Admission::deny(admission, self.deny.iter().copied()))
            .listing(generic.is_none_or(|generic| generic.listing))
    }

    /// Reads the files again and serves what they say; whatever is wrong with them, all goes on as before.
    pub(super) async fn reload(&mut self, server: &Server, catalogue: &mut Catalogue) {
        let Some(path) = self.path.clone() else { return self.reload_alone(server) };
        let Some((config, tls)) = self.read(path).await else { return };
        for remark in &config.remarks {
            tracing::warn!("{remark}");
        }
        self.finds_any(&config);
        let generic = &config.generic;
        let has_tls = tls.is_some();
        let wanted = self.wanted(Some(&config));
        let beside = |exports: Replacement| {
            let all = self.with_policy(exports, Some(&config)).removal(generic.removal);
            with_tls(all, tls)
        };
        match catalogue.apply(&wanted, generic.references.as_ref(), beside).await {
            Ok(replaced) => {
                if self.generic.as_ref().is_some_and(|start| !start.starts_like(generic)) {
                    let file = whole(&config).file;
                    tracing::warn!(
                        "{}: addresses, limits, users, and whether TLS is used, change with the next start",
                        file.display()
                    );
                }
                let (added, changed, removed) =
                    (replaced.added, replaced.changed, replaced.removed);
                tracing::info!(?added, ?changed, ?removed, kept = replaced.kept.len(), "reloaded");
                if has_tls {
                    tracing::info!("the certificates are read again");
                }
                catalogue.sweep().await;
            }
            Err(Refused(errors)) => {
                for error in errors {
                    tracing::error!("{}", text_of(&error));
                }
                tracing::error!("the configuration is not reloaded");
            }
        }
    }

    /// Reads the certificates again where there are no files to read.
    fn reload_alone(&self, server: &Server) {
        #[cfg(feature = "tls")]
        if self.tls.reload(server) {
            return;
        }
        #[cfg(not(feature = "tls"))]
        let _ = server;
        tracing::warn!("there is no configuration to reload");
    }

    /// A server with TLS as it would be, and listening nowhere.
    pub(super) fn server_config(&self, config: Option<&Config>) -> anyhow::Result<ServerConfig> {
        #[cfg(feature = "tls")]
        return Ok(super::tls::with(ServerConfig::default(), self.tls.find(config)?));
        #[cfg(not(feature = "tls"))]
        {
            let _ = config;
            Ok(ServerConfig::default())
        }
    }

    /// Reads the files and the certificates that count, within [`READ_TIMEOUT`]. Where that cannot be, says why.
    async fn read(&mut self, path: PathBuf) -> Option<(Config, Option<NewTls>)> {
        if self.reading.as_ref().is_some_and(|reading| !reading.is_finished()) {
            tracing::error!(
                "the configuration is not reloaded: reading it has not ended since it was to be reloaded last"
            );
            return None;
        }
        #[cfg(feature = "tls")]
        let tls = self.tls.clone();
        let reading = tokio::task::spawn_blocking(move || {
            let config = complete(config::read(&path)?)?;
            #[cfg(feature = "tls")]
            let tls = tls.of_reload(&config);
            #[cfg(not(feature = "tls"))]
            let tls = Ok(None);
            Ok::<_, Faults>((config, tls))
        });
        // Kept where it is not over in time, so that those that hang do not become more.
        let reading = self.reading.insert(reading);
        match timeout(READ_TIMEOUT, reading).await {
            Ok(Ok(Ok((config, Ok(tls))))) => return Some((config, tls)),
            Ok(Ok(Ok((_, Err(error))))) => {
                tracing::error!("{}; the configuration is not reloaded", text_of(&error));
            }
            Ok(Ok(Err(Faults(findings)))) => {
                for finding in findings {
                    tracing::error!("{finding}");
                }
                tracing::error!("the configuration is broken, and not reloaded");
            }
            Ok(Err(error)) => tracing::error!(%error, "the configuration is not reloaded"),
            Err(_) => tracing::error!(
                limit_secs = READ_TIMEOUT.as_secs(),
                "the configuration is not reloaded: reading it, or a file that it names, takes too long"
            ),
        }
        None
    }
}

/// Refuses files that may be half-written.
fn complete(config: Config) -> Result<Config, Faults> {
    let unfinished = config.remarks.iter().filter(|remark| remark.unfinished);
    let finding = |place: &Place| Finding { place: place.clone(), what: Fault::Unfinished };
    let findings: Vec<_> = unfinished.map(|remark| finding(&remark.place)).collect();
    if findings.is_empty() { Ok(config) } else { Err(Faults(findings)) }
}

/// Adds other certificates, where there are any.
fn with_tls(replacement: Replacement, tls: Option<NewTls>) -> Replacement {
    match tls {
        #[cfg(feature = "tls")]
        Some(tls) => replacement.tls(tls),
        #[cfg(not(feature = "tls"))]
        Some(never) => match never {},
        None => replacement,
    }
}

/// The main file.
fn whole(config: &Config) -> Place {
    config.place(1)
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn files_that_do_not_end_are_given_up_and_no_more_are_read_until_they_do() {
        let dir = tempfile::tempdir().unwrap();
        let (hangs, good) = (dir.path().join("hangs"), dir.path().join("good"));
        mknodat(CWD, &hangs, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        std::fs::write(&good, "[generic]\n").unwrap();
        let options = Options::parse_from(["nbd-server", "--listen=unix:x", "--export=a=b"]);
        let mut reloading = Reloading::new(&options, None).unwrap();
        // Time stands still while files are read, unless somebody moves it.
        let read = tokio::select! {
            biased;
            read = reloading.read(hangs.clone()) => read,
            () = async {
                tokio::time::advance(READ_TIMEOUT * 2).await;
                std::future::pending().await
            } => None,
        };
        assert!(read.is_none());
        assert!(reloading.read(good.clone()).await.is_none(), "the first one goes on");
        drop(std::fs::OpenOptions::new().write(true).open(&hangs).unwrap());
        while reloading.reading.as_ref().is_some_and(|reading| !reading.is_finished()) {
            tokio::task::yield_now().await;
        }
        assert!(reloading.read(good).await.is_some());
    }
}
