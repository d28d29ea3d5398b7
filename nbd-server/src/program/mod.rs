//! What the program does between its first and its last line. The command line is described in `options`, configuration
//! files in `config`, what is served in `catalogue`.

mod attendant;
mod catalogue;
mod check;
mod config;
mod depth;
mod descriptors;
mod errors;
mod first_bytes;
mod held;
mod hint;
mod identity;
mod images;
mod limits;
mod made;
mod manual;
mod nameless;
mod numbered;
mod options;
mod overlay;
mod places;
mod reload;
mod sealable;
mod sockets;
mod spelling;
mod taken;
#[cfg(feature = "tls")]
mod tls;
mod waiting;
mod wanted;

use std::io::{self, Write};
use std::time::Duration;

use anyhow::{Context, bail};
use nbd_server::{ListeningSocket, Server, ServerConfig, SocketFileOptions};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::Instant;

use catalogue::Catalogue;
use config::Config;
pub(crate) use errors::text_of;
use images::Opening;
pub(crate) use options::{LogFormat, Options};
use reload::Reloading;

/// Signals that come within such a time are one: timeout(1) sends two, to the process and to its group.
const ONE_WISH: Duration = Duration::from_millis(500);

/// How long the last operations on files may take when the program ends.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Certificates that take the place of others.
#[cfg(feature = "tls")]
type NewTls = nbd_server::tls::ServerTls;
#[cfg(not(feature = "tls"))]
type NewTls = std::convert::Infallible;

/// Signals that ask for something while exports are served.
pub(crate) struct Wishes {
    reload: Signal,
    /// Images that were waited for are whole.
    merge: Signal,
}

impl Wishes {
    fn new() -> io::Result<Self> {
        Ok(Self {
            reload: signal(SignalKind::hangup())?,
            merge: signal(SignalKind::user_defined1())?,
        })
    }
}

/// From now on SIGHUP and SIGUSR1 do not end the process, but are kept for [`run`], and SIGXFSZ does nothing. To be called
/// first of all: signals come at any moment.
pub(crate) fn catch_signals() -> io::Result<Wishes> {
    block::survive_size_limit()?;
    // It outlives this runtime, which has no thread; there may be one only, until the process is the user it is to be.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let _entered = runtime.enter();
    Wishes::new()
}

/// Does what the options say. An error is everything that kept an image from being served or from ending clean.
pub(crate) fn run(options: Options, wishes: Wishes) -> anyhow::Result<()> {
    if options.man {
        return manual::print();
    }
    if let Some(shell) = options.completions {
        return manual::complete(shell);
    }
    let config = options.config.as_deref().map(config::read).transpose()?;
    for remark in config.iter().flat_map(|config| &config.remarks) {
        tracing::warn!("{remark}");
    }
    let reloading = Reloading::new(&options, config.as_ref())?;
    let listen = sockets::asked(&options, config.as_ref());
    if options.check_config {
        let how = opening(&options);
        return check::check(&options, &reloading, config.as_ref(), &listen, how);
    }
    descriptors::raise_limit();
    let generic = config.as_ref().map(|config| &config.generic);
    let mut limits = options.limits.clone();
    if let Some(generic) = generic {
        limits = limits.or(&generic.limits);
    }
    let server_config = ServerConfig::with_limits(limits.of_server());
    #[cfg(feature = "tls")]
    let server_config = tls::with(server_config, options.tls.find(config.as_ref())?);
    let (addresses, refused) = sockets::resolve(&listen);
    if !refused.0.is_empty() {
        return Err(refused.into());
    }
    let sockets = sockets::open(addresses, &socket_options(&options, config.as_ref()))?;
    #[cfg(feature = "metrics")]
    let metrics = metrics_listener(&options, config.as_ref())?;
    // While there is one thread, after the sockets and before the images are opened.
    become_user(config.as_ref())?;
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    if let Some(threads) = generic.and_then(|generic| generic.threads) {
        runtime.worker_threads(threads);
    }
    let runtime = runtime.enable_all().build()?;
    let grace = limits.shutdown_grace();
    let start = Start {
        options,
        reloading,
        config,
        server_config,
        sockets,
        #[cfg(feature = "metrics")]
        metrics,
        grace,
    };
    let done = runtime.block_on(serve(start, wishes));
    // What hangs in a device is not waited for.
    runtime.shutdown_background();
    // What is in flight keeps its file locked: whoever comes next must find it free.
    block::wait_until_closed(CLOSE_TIMEOUT);
    done
}

/// Becomes the user and the group that the configuration names.
fn become_user(config: Option<&Config>) -> anyhow::Result<()> {
    let generic = config.map(|config| &config.generic);
    let user = generic.and_then(|generic| generic.user.as_deref());
    identity::become_user(user, generic.and_then(|generic| generic.group.as_deref()))
}

/// Where counters are told, if anywhere.
#[cfg(feature = "metrics")]
fn metrics_address(options: &Options, config: Option<&Config>) -> Option<std::net::SocketAddr> {
    options.metrics.or(config.and_then(|config| config.generic.metrics))
}

/// Takes the port for counters.
#[cfg(feature = "metrics")]
fn metrics_listener(
    options: &Options,
    config: Option<&Config>,
) -> anyhow::Result<Option<std::net::TcpListener>> {
    let listen = |address| {
        let listener = std::net::TcpListener::bind(address);
        listener.with_context(|| cannot_tell_counters(address, options, config))
    };
    metrics_address(options, config).map(listen).transpose()
}

/// That, and who asked for it.
#[cfg(feature = "metrics")]
fn cannot_tell_counters(
    address: std::net::SocketAddr,
    options: &Options,
    config: Option<&Config>,
) -> String {
    let asked = match (options.metrics, config.and_then(|config| config.files.first())) {
        (None, Some(file)) => format!("`metrics` of [generic] in {}", file.display()),
        _ => "--metrics".to_owned(),
    };
    format!("cannot tell counters on {address}, as {asked} says")
}

fn socket_options(options: &Options, config: Option<&Config>) -> SocketFileOptions {
    let generic = config.map(|config| &config.generic);
    let owner = options.unix_owner.or(generic.and_then(|generic| generic.socket_owner));
    SocketFileOptions {
        mode: options.unix_mode.or(generic.and_then(|generic| generic.socket_mode)),
        uid: owner.and_then(|owner| owner.uid),
        gid: owner.and_then(|owner| owner.gid),
    }
}

/// How images are opened that do not say otherwise.
fn opening(options: &Options) -> Opening {
    let references = options.allow_references.clone();
    Opening { references, unlock_time: options.unlock_seconds, only_looks: false }
}

/// What there is before anything is opened.
struct Start {
    options: Options,
    reloading: Reloading,
    config: Option<Config>,
    server_config: ServerConfig,
    sockets: Vec<ListeningSocket>,
    #[cfg(feature = "metrics")]
    metrics: Option<std::net::TcpListener>,
    grace: Duration,
}

async fn serve(start: Start, mut wishes: Wishes) -> anyhow::Result<()> {
    let Start { options, mut reloading, config, server_config, sockets, grace, .. } = start;
    // Before anything is opened, so that a signal during the start leaves images clean, too.
    let mut stop = Stop::new()?;
    let server = Server::new(server_config);
    let mut catalogue = Catalogue::new(server.clone(), opening(&options));
    #[cfg(feature = "metrics")]
    if let Some(listener) = start.metrics {
        let address = server.serve_metrics(listener).context("cannot tell counters")?;
        tracing::info!("counters are told on http://{address}/metrics");
    }
    let started = tokio::select! {
        started = begin(&server, &reloading, config.as_ref(), &mut catalogue, sockets) => started,
        () = stop.requested() => Ok(()),
    };
    if started.is_ok() {
        let tended = tend(&server, &mut catalogue, &mut reloading, &mut wishes);
        tokio::select! {
            () = tended => {}
            () = stop.requested() => {}
            () = server.used_and_left(), if options.once => {}
        }
        tracing::info!("stopping: clients are let go, images flushed and closed");
    }
    let ended = tokio::select! {
        ended = end(&server, catalogue, grace) => ended,
        () = stop.again() => bail!("stopped by a second signal; images may need a check"),
    };
    started.and(ended)
}

/// Reloads what is to be reloaded, merges into what was waited for and closes what nobody uses, for ever. Whoever drops
/// the future lets the rest of it to the end.
async fn tend(
    server: &Server,
    catalogue: &mut Catalogue,
    reloading: &mut Reloading,
    wishes: &mut Wishes,
) {
    loop {
        tokio::select! {
            _ = wishes.reload.recv() => reloading.reload(server, catalogue).await,
            _ = wishes.merge.recv() => catalogue.merge().await,
            () = catalogue.settle() => catalogue.sweep().await,
        }
    }
}

/// Opens every image, then serves: a client that is answered finds all exports.
async fn begin(
    server: &Server,
    reloading: &Reloading,
    config: Option<&Config>,
    catalogue: &mut Catalogue,
    sockets: Vec<ListeningSocket>,
) -> anyhow::Result<()> {
    let references = config.and_then(|config| config.generic.references.as_ref());
    let beside = |exports| reloading.with_policy(exports, config);
    catalogue.apply(&reloading.wanted(config), references, beside).await?;
    let mut out = std::io::stdout();
    for socket in sockets {
        let address = socket.to_string();
        server.listen(socket).with_context(|| format!("cannot listen on {address}"))?;
        writeln!(out, "listening on {address}").and_then(|()| out.flush())?;
    }
    Ok(())
}

/// Lets clients go, flushes, and closes every image, each whatever becomes of the others.
async fn end(server: &Server, catalogue: Catalogue, grace: Duration) -> anyhow::Result<()> {
    let report = server.shutdown(grace).await;
    let mut failures = Vec::new();
    for (name, error) in report.unflushed {
        let why = error.map_or("it took too long".to_owned(), |error| error.to_string());
        failures.push(format!("cannot flush {name:?}: {why}"));
    }
    failures.extend(catalogue.end(grace).await);
    if failures.is_empty() { Ok(()) } else { bail!(failures.join("; ")) }
}

/// SIGTERM and SIGINT.
struct Stop {
    terminate: Signal,
    interrupt: Signal,
    requested: bool,
    /// When the first came.
    first: Option<Instant>,
}

impl Stop {
    fn new() -> anyhow::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            requested: false,
            first: None,
        })
    }

    /// Waits for the first of them; later calls return at once.
    async fn requested(&mut self) {
        if !self.requested {
            self.again().await;
            self.requested = true;
        }
    }

    /// Waits for one more that is meant as such.
    async fn again(&mut self) {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => {}
                _ = self.interrupt.recv() => {}
            }
            let now = Instant::now();
            let first = *self.first.get_or_insert(now);
            if first == now || now.duration_since(first) > ONE_WISH {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use async_trait::async_trait;
    use block::{
        BlockDevice, ByteRange, DeviceError, Durability, Extent, Limits, MemoryDevice, Segments,
        ZeroMode,
    };
    use bytes::Bytes;
    use clap::Parser;
    use tokio::sync::Notify;

    use super::*;
    use crate::program::images::ImageKey;
    use crate::program::options::ExportSpec;

    /// A device that tells when it is being closed, and never is.
    struct Stuck {
        device: Arc<MemoryDevice>,
        closing: Notify,
    }

    #[async_trait]
    impl BlockDevice for Stuck {
        fn limits(&self) -> Limits {
            self.device.limits()
        }

        async fn read(&self, range: ByteRange) -> Result<Segments, DeviceError> {
            self.device.read(range).await
        }

        async fn write(&self, at: u64, data: Bytes, how: Durability) -> Result<(), DeviceError> {
            self.device.write(at, data, how).await
        }

        async fn write_zeroes(
            &self,
            range: ByteRange,
            mode: ZeroMode,
            how: Durability,
        ) -> Result<(), DeviceError> {
            self.device.write_zeroes(range, mode, how).await
        }

        async fn discard(&self, range: ByteRange, how: Durability) -> Result<(), DeviceError> {
            self.device.discard(range, how).await
        }

        async fn flush(&self) -> Result<(), DeviceError> {
            self.device.flush().await
        }

        async fn extents(&self, range: ByteRange) -> Result<Vec<Extent>, DeviceError> {
            self.device.extents(range).await
        }

        async fn close(&self) -> Result<(), DeviceError> {
            self.closing.notify_one();
            std::future::pending().await
        }
    }

    #[tokio::test]
    async fn an_image_that_is_never_closed_keeps_the_program_neither_from_stopping_nor_from_telling()
     {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = format!("a={},format=raw", file.path().display());
        let key =
            ImageKey::of(&text.parse::<ExportSpec>().unwrap(), None, &Opening::default()).unwrap();
        let stuck = Arc::new(Stuck { device: MemoryDevice::new(512), closing: Notify::new() });
        let server = Server::new(ServerConfig::default());
        let mut catalogue = Catalogue::new(server.clone(), Opening::default());
        catalogue.leave(key, Arc::clone(&stuck) as _);
        let options = Options::parse_from(["nbd-server", "--listen=unix:x", "--export=a=b"]);
        let mut reloading = Reloading::new(&options, None).unwrap();
        let mut wishes = Wishes::new().unwrap();
        tokio::select! {
            () = tend(&server, &mut catalogue, &mut reloading, &mut wishes) => {}
            () = stuck.closing.notified() => {}
        }
        let told = catalogue.end(Duration::from_millis(1)).await;
        assert!(told.len() == 1 && told[0].contains("took too long"), "{told:?}");
    }
}
