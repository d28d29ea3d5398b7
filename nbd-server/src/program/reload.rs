//! What is to be served, from the command line and from files that are read again, and whether it could be. Opening it
//! is the catalogue's.

use std::path::PathBuf;

use anyhow::{anyhow, bail};
use block::MemoryDevice;
use nbd_server::{Admission, ClientRule, Export, Server, ServerConfig};

use super::NewTls;
use super::catalogue::{Catalogue, Wanted};
use super::config::{self, Config, Fault, Faults, Finding, Generic, Place};
use super::images::ImageKey;
use super::options::{ExportSpec, Options, Writes};

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
}

impl Reloading {
    /// Keeps what reading the files again needs.
    ///
    /// # Errors
    /// Where nothing is to be served.
    pub(super) fn new(options: &Options, config: Option<&Config>) -> Result<Self, Faults> {
        let reloading = Self {
            path: options.config.clone(),
            generic: config.map(|config| config.generic.clone()),
            exports: options.exports.clone(),
            allow: options.allow.clone(),
            deny: options.deny.clone(),
            #[cfg(feature = "tls")]
            tls: options.tls.clone(),
        };
        config.map_or(Ok(()), |config| reloading.check_any(config))?;
        Ok(reloading)
    }

    /// Whether there is an export at all.
    fn check_any(&self, config: &Config) -> Result<(), Faults> {
        if !config.exports.is_empty() || !self.exports.is_empty() {
            return Ok(());
        }
        Err(Faults(vec![Finding { place: whole(config), what: Fault::NoExports }]))
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

    /// Whether a server takes the exports, with TLS as it would be: their names, and what they demand of clients.
    fn rehearse(&self, wanted: &[Wanted], config: Option<&Config>) -> anyhow::Result<()> {
        let server_config = ServerConfig::default();
        #[cfg(feature = "tls")]
        let server_config = match self.tls.find(config)? {
            Some((mode, tls)) => server_config.tls(mode, tls),
            None => server_config,
        };
        #[cfg(not(feature = "tls"))]
        let _ = config;
        let server = Server::new(server_config);
        for Wanted { spec, place } in wanted {
            let device = MemoryDevice::new(0);
            let mut export = Export::new(&spec.name, device)
                .default_export(spec.is_default)
                .tls_only(spec.tls_only);
            if !spec.clients.is_empty() {
                export = export.clients(spec.clients.iter().cloned());
            }
            let place = place.as_ref().map(|place| format!("{place}: ")).unwrap_or_default();
            server.add_export(export).map_err(|error| anyhow!("{place}{error}"))?;
        }
        Ok(())
    }

    /// Sets who may connect, and whether exports are listed.
    pub(super) fn set_policy(&self, server: &Server, config: Option<&Config>) {
        let generic = config.map(|config| &config.generic);
        let mut admission = generic.map(|generic| generic.admission.clone()).unwrap_or_default();
        if !self.allow.is_empty() {
            admission = admission.allow(self.allow.iter().copied());
        }
        server.set_admission(Admission::deny(admission, self.deny.iter().copied()));
        server.set_listing(generic.is_none_or(|generic| generic.listing));
    }

    /// Reads the files again and serves what they say; whatever is wrong with them, all goes on as before.
    pub(super) async fn reload(&mut self, server: &Server, catalogue: &mut Catalogue) {
        let Some(path) = self.path.clone() else {
            tracing::warn!("there is no configuration to reload");
            return;
        };
        let read = tokio::task::spawn_blocking(move || config::read(&path)).await;
        let Ok(read) = read else { return };
        let config = match read.and_then(|config| self.complete(config)) {
            Ok(config) => config,
            Err(Faults(findings)) => {
                for finding in findings {
                    tracing::error!("{finding}");
                }
                tracing::error!("the configuration is broken, and not reloaded");
                return;
            }
        };
        for remark in &config.remarks {
            tracing::warn!("{remark}");
        }
        let generic = &config.generic;
        let tls = match self.tls(&config) {
            Ok(tls) => tls,
            Err(error) => return tracing::error!("{error:#}; the configuration is not reloaded"),
        };
        let wanted = self.wanted(Some(&config));
        match catalogue.apply(&wanted, generic.references.as_ref(), generic.removal, tls).await {
            Ok(replaced) => {
                self.set_policy(server, Some(&config));
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
                catalogue.sweep().await;
            }
            Err(error) => tracing::error!("{error:#}; the configuration is not reloaded"),
        }
    }

    /// The certificates that the files name, as they are now.
    fn tls(&self, config: &Config) -> anyhow::Result<Option<NewTls>> {
        #[cfg(feature = "tls")]
        return self.tls.of_reload(config);
        #[cfg(not(feature = "tls"))]
        {
            let _ = config;
            Ok(None)
        }
    }

    /// Refuses files that may be half-written.
    fn complete(&self, config: Config) -> Result<Config, Faults> {
        let unfinished = config.remarks.iter().filter(|remark| remark.unfinished);
        let finding = |place: &Place| Finding { place: place.clone(), what: Fault::Unfinished };
        let findings: Vec<_> = unfinished.map(|remark| finding(&remark.place)).collect();
        if !findings.is_empty() {
            return Err(Faults(findings));
        }
        self.check_any(&config)?;
        Ok(config)
    }
}

/// The main file.
fn whole(config: &Config) -> Place {
    let file = config.files.first().cloned().unwrap_or_default();
    Place { file: file.into(), line: 1 }
}

/// Looks at the images without opening them as such, and tells what would be served.
///
/// # Errors
/// All that could not be served.
pub(super) fn check(reloading: &Reloading, config: Option<&Config>) -> anyhow::Result<()> {
    let references = config.and_then(|config| config.generic.references.as_ref());
    let mut wrong = Vec::new();
    let wanted = reloading.wanted(config);
    for one in &wanted {
        let spec = &one.spec;
        let is_made = spec.makes_bytes.is_some() && !spec.path.exists();
        if is_made || spec.writes == Writes::Temporary {
            continue;
        }
        if let Err(error) = ImageKey::of(spec, references) {
            let place = one.place.as_ref().map(|place| format!("{place}: ")).unwrap_or_default();
            wrong.push(format!("{place}[{}] {}: {error:#}", spec.name, spec.path.display()));
        }
    }
    if let Err(error) = reloading.rehearse(&wanted, config) {
        wrong.push(format!("{error:#}"));
    }
    if !wrong.is_empty() {
        bail!(wrong.join("\n"));
    }
    let files = config.map_or(0, |config| config.files.len());
    println!("{} exports in {files} files: all is well", wanted.len());
    Ok(())
}
