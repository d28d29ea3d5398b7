//! What the program does between its first and its last line. The command line is described in `options`, opening
//! images in `images`.

mod depth;
mod images;
mod options;

use std::io::Write;
use std::time::Duration;

use anyhow::{Context, bail};
use nbd_server::{Export, Limits, Server, ServerConfig};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::timeout;

use images::Opened;
use options::Listen;
pub(crate) use options::Options;

/// How long connections may take to end, and devices to flush, after a signal.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(20);

/// How long an image may take to close after that.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(20);

/// Serves until SIGTERM or SIGINT. An error is everything that kept an image from being served or from ending clean.
pub(crate) fn run(options: Options) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let done = runtime.block_on(serve(options));
    // What hangs in a device is not waited for.
    runtime.shutdown_background();
    done
}

async fn serve(options: Options) -> anyhow::Result<()> {
    // Before anything is opened, so that a signal during the start leaves images clean, too.
    let mut stop = Stop::new()?;
    let server = Server::new(ServerConfig::with_limits(limits(&options)));
    let mut opened = Vec::new();
    let started = tokio::select! {
        started = start(&server, &options, &mut opened) => started,
        () = stop.requested() => Ok(()),
    };
    if started.is_ok() {
        stop.requested().await;
    }
    let ended = tokio::select! {
        ended = end(&server, opened) => ended,
        () = stop.again() => bail!("stopped by a second signal; images may need a check"),
    };
    started.and(ended)
}

fn limits(options: &Options) -> Limits {
    let mut limits = Limits::default();
    if let Some(connections) = options.max_connections {
        limits.connections = connections.get();
    }
    if let Some(seconds) = options.handshake_timeout {
        limits.handshake_timeout = Duration::from_secs(seconds.get().into());
    }
    limits
}

/// Opens every image, then listens: a client that can connect finds all exports.
async fn start(server: &Server, options: &Options, opened: &mut Vec<Opened>) -> anyhow::Result<()> {
    for (index, spec) in options.exports.iter().enumerate() {
        let image = images::open(spec, options.allow_references.as_ref()).await?;
        let mut export = Export::new(&spec.name, image.device())
            .description(spec.description.clone().unwrap_or_default())
            .read_only(spec.read_only)
            .default_export(index == 0);
        for (name, source) in image.sources() {
            export = export.context(name, source);
        }
        opened.push(image);
        server.add_export(export)?;
    }
    let mut out = std::io::stdout();
    for listen in &options.listen {
        let actual = bind(server, listen).await?;
        writeln!(out, "listening on {actual}").and_then(|()| out.flush())?;
    }
    Ok(())
}

/// Listens, and tells where.
async fn bind(server: &Server, listen: &Listen) -> anyhow::Result<String> {
    match listen {
        Listen::Unix(path) => {
            let bound = server.listen_unix(path).await;
            bound.with_context(|| format!("cannot listen on {listen}"))?;
            Ok(listen.to_string())
        }
        Listen::Tcp { host, port } => {
            let mut found = tokio::net::lookup_host((host.as_str(), *port))
                .await
                .with_context(|| format!("cannot resolve {host}"))?;
            let Some(address) = found.next() else { bail!("{host} has no address") };
            let bound = server.listen_tcp(address).await;
            Ok(bound.with_context(|| format!("cannot listen on {listen}"))?.to_string())
        }
    }
}

/// Lets clients go, flushes, and closes every image, each whatever becomes of the others.
async fn end(server: &Server, opened: Vec<Opened>) -> anyhow::Result<()> {
    let report = server.shutdown(SHUTDOWN_GRACE).await;
    let mut failures = Vec::new();
    for (name, error) in report.unflushed {
        let why = error.map_or("it took too long".to_owned(), |error| error.to_string());
        failures.push(format!("cannot flush {name:?}: {why}"));
    }
    for image in opened {
        let what = image.path().display().to_string();
        match timeout(CLOSE_TIMEOUT, image.device().close()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => failures.push(format!("cannot close {what}: {error}")),
            Err(_) => failures.push(format!("closing {what} took too long")),
        }
    }
    if failures.is_empty() { Ok(()) } else { bail!(failures.join("; ")) }
}

/// SIGTERM and SIGINT.
struct Stop {
    terminate: Signal,
    interrupt: Signal,
    requested: bool,
}

impl Stop {
    fn new() -> anyhow::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            requested: false,
        })
    }

    /// Waits for the first of them; later calls return at once.
    async fn requested(&mut self) {
        if !self.requested {
            self.again().await;
            self.requested = true;
        }
    }

    /// Waits for one more.
    async fn again(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
