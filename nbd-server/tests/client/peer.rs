//! Servers as child processes, each ready when it accepts connections. They can be killed and started again on the
//! same files.

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nbd_server::client::Address;
use parking_lot::Mutex;
use tempfile::TempDir;

/// The reference server; ours has the same name.
const REFERENCE: &str = "/usr/bin/nbd-server";

/// A running server, killed when dropped.
pub(crate) struct Peer {
    dir: TempDir,
    program: &'static str,
    package: &'static str,
    arguments: Vec<String>,
    child: Mutex<Option<Child>>,
}

impl Peer {
    /// Starts nbdkit with these arguments (filters, plugin, parameters).
    pub(crate) fn nbdkit(arguments: &[&str]) -> Self {
        Self::nbdkit_in(scratch(), arguments)
    }

    /// Starts nbdkit beside files that are there already.
    pub(crate) fn nbdkit_in(dir: TempDir, arguments: &[&str]) -> Self {
        let listen = ["--foreground", "--unix", "socket"];
        Self::start(dir, "nbdkit", "nbdkit", &[&listen, arguments].concat())
    }

    /// Starts qemu-nbd with these arguments, the image last.
    pub(crate) fn qemu_nbd(dir: TempDir, arguments: &[&str]) -> Self {
        let socket = format!("--socket={}", dir.path().join("socket").display());
        let listen = ["--persistent", "--shared=8", &socket];
        Self::start(dir, "qemu-nbd", "qemu-utils", &[&listen, arguments].concat())
    }

    /// Starts qemu-storage-daemon with an NBD server of these properties, and arguments that name what it serves.
    pub(crate) fn qemu_storage_daemon(dir: TempDir, properties: &str, arguments: &[&str]) -> Self {
        let listen =
            format!("--nbd-server=addr.type=unix,addr.path=socket,max-connections=8{properties}");
        let (objects, rest): (Vec<&str>, Vec<&str>) =
            arguments.iter().partition(|argument| argument.starts_with("--object"));
        let arguments = [&objects[..], &[&listen], &rest].concat();
        Self::start(dir, "qemu-storage-daemon", "qemu-utils", &arguments)
    }

    /// Starts the reference server with an export "disk" of the file of that name; these lines go to the sections.
    pub(crate) fn reference(dir: TempDir, generic: &str, export: &str) -> Self {
        let at = dir.path().display();
        let sections = format!(
            "[generic]\nunixsock = {at}/socket\n{generic}\n[disk]\nexportname = {at}/disk\n{export}\n"
        );
        std::fs::write(dir.path().join("config"), sections).expect("a configuration");
        let config = dir.path().join("config").display().to_string();
        let pid = dir.path().join("pid").display().to_string();
        // It serves several clients only as a daemon.
        Self::start(dir, REFERENCE, "nbd-server", &["-C", &config, "-p", &pid])
    }

    /// Starts our own program with these arguments.
    #[cfg(feature = "program")]
    pub(crate) fn ours(dir: TempDir, arguments: &[&str]) -> Self {
        let program = env!("CARGO_BIN_EXE_nbd-server");
        Self::start(dir, program, "ours", &[&["--listen=unix:socket"], arguments].concat())
    }

    fn start(
        dir: TempDir,
        program: &'static str,
        package: &'static str,
        arguments: &[&str],
    ) -> Self {
        let arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        let peer = Self { dir, program, package, arguments, child: Mutex::new(None) };
        peer.run_again();
        peer
    }

    /// Starts it again, after it was killed.
    pub(crate) fn run_again(&self) {
        // Not every server replaces the socket of one that was killed.
        let _ = std::fs::remove_file(self.socket());
        let _ = std::fs::remove_file(self.pid_file());
        let mut command = Command::new(self.program);
        command.args(&self.arguments).current_dir(self.dir.path()).process_group(0);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let spawned = command.spawn();
        let mut child = spawned.unwrap_or_else(|error| {
            panic!("{} ({}) must be installed: {error}", self.program, self.package)
        });
        if self.package == "ours" {
            // It tells when it is ready; the others are asked until they are.
            let out = child.stdout.take().expect("its output");
            BufReader::new(out).read_line(&mut String::new()).expect("a line");
        }
        let names_itself = || self.program != REFERENCE || !self.daemon().is_empty();
        while !names_itself() || UnixStream::connect(self.socket()).is_err() {
            let ended = child.try_wait().expect("its state");
            let is_well = ended.is_none_or(|ended| ended.success() && self.program == REFERENCE);
            assert!(is_well, "{} {:?}: {ended:?}", self.program, self.arguments);
            std::thread::yield_now();
        }
        *self.child.lock() = Some(child);
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> Address {
        Address::Unix(self.socket())
    }

    /// The directory of its socket and files.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Ends it without ceremony, with what it has started; it is gone on return.
    pub(crate) fn kill(&self) {
        let Some(mut child) = self.child.lock().take() else { return };
        let own = child.id().to_string();
        let leader = if self.program == REFERENCE { &self.daemon() } else { &own };
        let _ = Command::new("kill").args(["-KILL", "--", &format!("-{leader}")]).output();
        let _ = child.wait();
        // Nobody here can wait for a daemon and its children but by looking.
        while self.program == REFERENCE && group_lives(leader) {
            std::thread::yield_now();
        }
    }

    /// The process of the reference server, which is no child of ours; nothing before it is ready.
    fn daemon(&self) -> String {
        std::fs::read_to_string(self.pid_file()).unwrap_or_default().trim().to_owned()
    }

    fn pid_file(&self) -> PathBuf {
        self.dir.path().join("pid")
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Whether a process of this group has not ended.
fn group_lives(leader: &str) -> bool {
    let processes = std::fs::read_dir("/proc").expect("the processes").flatten();
    processes.into_iter().any(|process| {
        let stat = std::fs::read_to_string(process.path().join("stat")).unwrap_or_default();
        // Behind the name in parentheses: state, parent, group.
        let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
        let fields: Vec<&str> = fields.split_whitespace().collect();
        fields.get(2) == Some(&leader) && fields.first() != Some(&"Z")
    })
}

/// A new directory.
pub(crate) fn scratch() -> TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

/// Runs a command that must succeed.
pub(crate) fn run(command: &mut Command, package: &str) {
    let name = command.get_program().to_string_lossy().into_owned();
    let status = command.status();
    let status =
        status.unwrap_or_else(|error| panic!("{name} ({package}) must be installed: {error}"));
    assert!(status.success(), "{command:?} failed: {status}");
}
