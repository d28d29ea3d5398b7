//! What is to be served, from the command line and from files that are read again, and whether it could be. Opening it
//! is the catalogue's.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::bail;
use nbd_server::{Admission, ClientRule, Removal, Server, ServerConfig};

use super::NewTls;
use super::catalogue::Catalogue;
use super::config::{self, Config, Fault, Faults, Finding, Generic, Place};
use super::errors::text_of;
use super::images::Opening;
use super::made::Made;
use super::options::{ExportSpec, Options};
use super::sockets::{self, Asked};
use super::wanted::{Refused, Wanted};

/// How long images that were only looked at may take to close.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(20);

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
        let Some(path) = self.path.clone() else { return self.reload_alone(server) };
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
        self.finds_any(&config);
        let generic = &config.generic;
        let tls = match self.tls(&config) {
            Ok(tls) => tls,
            Err(error) => {
                return tracing::error!("{}; the configuration is not reloaded", text_of(&error));
            }
        };
        let has_tls = tls.is_some();
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
    fn server_config(&self, config: Option<&Config>) -> anyhow::Result<ServerConfig> {
        #[cfg(feature = "tls")]
        return Ok(super::tls::with(ServerConfig::default(), self.tls.find(config)?));
        #[cfg(not(feature = "tls"))]
        {
            let _ = config;
            Ok(ServerConfig::default())
        }
    }

    /// The certificates that count, as they are now.
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
        Ok(config)
    }
}

/// The main file.
fn whole(config: &Config) -> Place {
    config.place(1)
}

/// Does all that the start does short of listening and serving, with images opened beside whoever has them, and tells
/// what would be served.
///
/// # Errors
/// All that could not be served.
pub(super) fn check(
    reloading: &Reloading,
    config: Option<&Config>,
    listen: &[Asked],
    how: Opening,
) -> anyhow::Result<()> {
    let mut wrong: Vec<String> = Vec::new();
    wrong.extend(sockets::resolve(listen).err().map(|refused| refused.to_string()));
    let server_config = reloading.server_config(config);
    wrong.extend(server_config.as_ref().err().map(text_of));
    let references = config.and_then(|config| config.generic.references.as_ref());
    let wanted = reloading.wanted(config);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let looked = runtime.block_on(async {
        let can_serve = server_config.is_ok();
        let server = Server::new(server_config.unwrap_or_default());
        let mut catalogue = Catalogue::new(server, Opening { only_looks: true, ..how });
        let looked = if can_serve {
            catalogue.apply(&wanted, references, Removal::Drain, None).await.map(drop)
        } else {
            // What exports demand of certificates that cannot be used is not told.
            catalogue.prepare(&wanted, references, &mut Made::default()).await.map(drop)
        };
        catalogue.end(CLOSE_TIMEOUT).await;
        looked
    });
    wrong.extend(looked.err().map(|refused| refused.to_string()));
    if !wrong.is_empty() {
        bail!(wrong.join("\n"));
    }
    let files = config.map_or(0, |config| config.files.len());
    println!("{} exports in {files} files: all is well", wanted.len());
    Ok(())
}
