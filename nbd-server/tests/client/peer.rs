//! Servers as child processes. Each is ready when its starting command returns, because it forks after it listens.

use std::path::{Path, PathBuf};
use std::process::Command;

use nbd_server::client::Address;
use tempfile::TempDir;

/// A running server, ended when dropped.
pub(crate) struct Peer {
    dir: TempDir,
    program: &'static str,
}

impl Peer {
    /// Starts nbdkit with these arguments (filters, plugin, parameters).
    pub(crate) fn nbdkit(arguments: &[&str]) -> Self {
        Self::nbdkit_in(scratch(), arguments)
    }

    /// Starts nbdkit beside files that are there already.
    pub(crate) fn nbdkit_in(dir: TempDir, arguments: &[&str]) -> Self {
        let peer = Self { dir, program: "nbdkit" };
        let mut command = Command::new("nbdkit");
        command.arg("--unix").arg(peer.socket()).arg("--pidfile").arg(peer.pid_file());
        peer.start(command.args(arguments))
    }

    /// Starts qemu-nbd with these arguments, the image last.
    pub(crate) fn qemu_nbd(dir: TempDir, arguments: &[&str]) -> Self {
        let peer = Self { dir, program: "qemu-nbd" };
        let mut command = Command::new("qemu-nbd");
        command.args(["--fork", "--persistent", "--shared=8", "--socket"]).arg(peer.socket());
        command.arg("--pid-file").arg(peer.pid_file()).args(arguments);
        peer.start(&mut command)
    }

    fn start(self, command: &mut Command) -> Self {
        run(command.current_dir(self.dir.path()), self.program);
        self
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> Address {
        Address::Unix(self.socket())
    }

    /// The directory of its socket and files.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Ends it without ceremony.
    pub(crate) fn kill(&self) {
        let pid = std::fs::read_to_string(self.pid_file()).unwrap_or_default();
        let pid = pid.trim();
        if !pid.is_empty() {
            let _ = Command::new("kill").args(["-KILL", pid]).output();
            let _ = std::fs::remove_file(self.pid_file());
        }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    fn pid_file(&self) -> PathBuf {
        self.dir.path().join("pid")
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A new directory.
pub(crate) fn scratch() -> TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

/// Runs a command that must succeed.
pub(crate) fn run(command: &mut Command, package: &str) {
    let name = command.get_program().to_string_lossy().into_owned();
    // A daemon keeps its standard error open; into a pipe, that would be waited for.
    let status = command.status();
    let status =
        status.unwrap_or_else(|error| panic!("{name} ({package}) must be installed: {error}"));
    assert!(status.success(), "{command:?} failed: {status}");
}
