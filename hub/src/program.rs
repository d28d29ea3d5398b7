//! The `sendense-hub` program: its command line, and the life of the process from the first line of the log to the last.
//! What it runs is [`Hub`] and [`crate::http`].

use std::future::Future;
use std::io::IsTerminal;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand, ValueEnum};
use tokio::net::TcpListener;

use crate::demo::{self, Demo};
use crate::error::describe;
use crate::http::auth::{Auth, TokenDigest, admin_token};
use crate::http::router;
use crate::hub::{Config, Hub};
use crate::outlet::{complain, say};

/// How long open HTTP connections may take to end once everything else has.
const HTTP_STOP: Duration = Duration::from_secs(5);

/// Sendense hub: accepts backup jobs, keeps chains, restores.
#[derive(Debug, Parser)]
#[command(name = "sendense-hub", version)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve the REST interface and make backups until stopped
    Serve(Serve),
    /// Show the main job on disks made for it: back up, change, back up again, compare, restore
    Demo(Demo),
}

/// What `serve` is told.
#[derive(Debug, Args)]
struct Serve {
    /// Where the REST interface listens
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:8082")]
    listen: String,

    /// Directory for the database, the token, sockets and the agent's digests
    #[arg(long, value_name = "DIR")]
    data: PathBuf,

    /// Where external agents connect by NBD: HOST:PORT, HOST:0 for any port, or off
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:10808")]
    nbd_listen: String,

    /// How long an external agent may be silent before its job fails
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    agent_timeout: u64,

    /// How long an external agent may take to connect before its job fails
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    connect_timeout: u64,

    /// How long the hub's own agent may go without moving a byte before its job fails
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    stall_timeout: u64,

    /// Whether requests need the token of DIR/admin.token; off only on loopback
    #[arg(long, value_enum, default_value_t = Switch::On)]
    auth: Switch,

    /// How the log is written
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

/// The whole program.
pub fn main() -> ExitCode {
    let Cli { command } = Cli::parse();
    match &command {
        Command::Serve(options) => start_log(options.log_format, "info"),
        Command::Demo(_) => start_log(LogFormat::Text, "warn"),
    }
    let runtime = block::survive_size_limit()
        .and_then(|()| tokio::runtime::Builder::new_multi_thread().enable_all().build());
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            complain(&format!("sendense-hub: no runtime: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(async {
        match command {
            Command::Serve(options) => serve(options).await,
            Command::Demo(options) => demo::run(&options).await,
        }
    });
    // What still hangs in a blocking call must not keep the process.
    runtime.shutdown_timeout(HTTP_STOP);
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&format!("sendense-hub: {}", describe(error.as_ref())));
            ExitCode::FAILURE
        }
    }
}

fn start_log(format: LogFormat, default: &str) {
    use tracing_subscriber::EnvFilter;
    let filter =
        EnvFilter::try_from_env("SENDENSE_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        // It would complain on standard error about standard error, and die of that.
        .log_internal_errors(false)
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
}

async fn serve(options: Serve) -> anyhow::Result<()> {
    let listen = resolve(&options.listen).context("--listen")?;
    let nbd_listen = match options.nbd_listen.as_str() {
        "off" => None,
        text => Some(resolve(text).context("--nbd-listen")?),
    };
    if options.auth == Switch::Off && !listen.ip().is_loopback() {
        bail!(
            "--auth off is only allowed on loopback, not on {listen}: anybody could delete backups"
        );
    }
    // Before anything is started, so that a stop that comes early is not missed.
    let stop = stop_signal().context("signals")?;
    let listener =
        TcpListener::bind(listen).await.with_context(|| format!("listen on {listen}"))?;
    let config = Config {
        data: options.data.clone(),
        nbd_listen,
        agent_timeout: Duration::from_secs(options.agent_timeout),
        connect_timeout: Duration::from_secs(options.connect_timeout),
        stall_timeout: Duration::from_secs(options.stall_timeout),
    };
    let hub = Hub::start(config).await?;
    let auth = match options.auth {
        Switch::Off => Auth::Off,
        Switch::On => {
            let token = admin_token(&options.data).context("the admin token")?;
            Auth::Token(TokenDigest::of(&token))
        }
    };
    let address = listener.local_addr()?;
    say(&format!("listening on http://{address}"));
    if !address.ip().is_loopback() {
        tracing::warn!(
            "REST is plain HTTP: whoever sees the traffic to {address} learns the administrator's token"
        );
    }
    if let Some(address) = hub.nbd_address() {
        tracing::info!("NBD for external agents on {address}");
        if !address.ip().is_loopback() {
            tracing::warn!(
                "NBD has neither encryption nor a password yet: whoever reaches {address} can write to backups in work"
            );
        }
    }
    run(hub, listener, auth, stop).await
}

/// Serves until `stop`, then ends jobs and connections within bounds.
///
/// # Errors
/// Where the listener fails.
pub async fn run(
    hub: Arc<Hub>,
    listener: TcpListener,
    auth: Auth,
    stop: impl Future<Output = ()> + Send + 'static,
) -> anyhow::Result<()> {
    let ended = Arc::new(tokio::sync::Notify::new());
    let app = router(Arc::clone(&hub), auth);
    let mut server = tokio::spawn({
        let ended = Arc::clone(&ended);
        async move {
            let ended = async move { ended.notified().await };
            axum::serve(listener, app).with_graceful_shutdown(ended).await
        }
    });
    let early = tokio::select! {
        () = stop => None,
        result = &mut server => Some(result),
    };
    tracing::info!("stopping");
    // The interface answers while jobs end, so that their end can be seen.
    hub.stop().await;
    ended.notify_one();
    let result = match early {
        Some(result) => Ok(result),
        None => tokio::time::timeout(HTTP_STOP, server).await,
    };
    match result {
        Ok(Ok(result)) => result.context("the REST interface"),
        Ok(Err(_)) => bail!("the REST interface died of a bug"),
        // Connections that stay open end with the process.
        Err(_) => Ok(()),
    }
}

fn resolve(text: &str) -> anyhow::Result<SocketAddr> {
    text.to_socket_addrs()
        .with_context(|| format!("{text:?} is no HOST:PORT"))?
        .next()
        .with_context(|| format!("{text:?} has no address"))
}

/// SIGTERM or SIGINT.
fn stop_signal() -> std::io::Result<impl Future<Output = ()> + Send + 'static> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}
