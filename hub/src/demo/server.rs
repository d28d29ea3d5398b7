//! The hub of the demonstration: this very program as a process of its own, on ports that the kernel chooses.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context;
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::ctl::client::Client;
use crate::http::auth::admin_token;

/// How long the hub may take to end.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);

/// A running hub; killed where it is not stopped.
pub(super) struct Server {
    child: Child,
    url: String,
    data: PathBuf,
}

impl Server {
    /// Starts a hub and waits until it listens.
    pub(super) async fn start(data: &Path) -> anyhow::Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["serve", "--listen", "127.0.0.1:0", "--nbd-listen", "off", "--data"])
            .arg(data)
            .env("SENDENSE_LOG", "warn")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("the hub does not start")?;
        let stdout = child.stdout.take().context("a piped standard output")?;
        let mut lines = BufReader::new(stdout).lines();
        while let Some(line) = lines.next_line().await? {
            if let Some(url) = line.strip_prefix("listening on ") {
                return Ok(Self { child, url: url.to_owned(), data: data.to_owned() });
            }
        }
        anyhow::bail!("the hub ended before it listened")
    }

    /// A client with the administrator's token.
    pub(super) fn client(&self) -> anyhow::Result<Client> {
        let token = admin_token(&self.data).context("the hub's token")?;
        Client::of(&self.url, Some(token))
    }

    /// Asks the hub to end, and waits until it has.
    pub(super) async fn stop(mut self) -> anyhow::Result<()> {
        let pid = self.child.id().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw);
        kill_process(pid.context("the hub has ended by itself")?, Signal::TERM)?;
        let ended = tokio::time::timeout(STOP_TIMEOUT, self.child.wait()).await;
        let status = ended.context("the hub does not end")??;
        anyhow::ensure!(status.success(), "the hub ended with {status}");
        Ok(())
    }
}
