//! nbdkit as a foreign source or target, on a Unix socket of its own.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::{Running, wait_until};

/// A running nbdkit.
pub struct Nbdkit {
    process: Running,
    socket: PathBuf,
}

impl Nbdkit {
    /// Starts it with the given arguments behind its own options, and waits until it answers.
    ///
    /// # Errors
    /// Where it does not start.
    pub fn start(socket: &Path, arguments: &[&str]) -> Result<Self> {
        let mut command = Command::new("nbdkit");
        command.args(["--foreground", "--exit-with-parent", "--unix"]).arg(socket).args(arguments);
        let mut process = Running::start(&mut command)?;
        wait_until("nbdkit", || {
            anyhow::ensure!(process.is_running()?, "nbdkit {arguments:?} ended at once");
            Ok(std::os::unix::net::UnixStream::connect(socket).is_ok())
        })?;
        Ok(Self { process, socket: socket.to_owned() })
    }

    /// As a source for an agent.
    pub fn source(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }

    /// Its process number.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }
}
