//! Disks, servers and runs for the tests. A server that cannot be started is a failure, never a skip.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use agent::{
    Address, AgentError, CancelToken, DiskJob, Event, RunOptions, RunReport, SourceSpec, Target,
    event_channel, run,
};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tempfile::TempDir;

/// The unit of comparison.
pub(crate) const BLOCK: u64 = 64 << 10;

/// A server in a process of its own; stopped when dropped.
pub(crate) struct Peer {
    socket: PathBuf,
    pid: Pid,
}

impl Peer {
    /// Starts nbdkit, whose command returns once its socket is there.
    pub(crate) fn nbdkit(directory: &Path, name: &str, arguments: &[&str]) -> Self {
        let (socket, pid_file) = paths(directory, name);
        let mut command = Command::new("nbdkit");
        command.arg("--unix").arg(&socket).arg("--pidfile").arg(&pid_file).args(arguments);
        Self::start(command, socket, &pid_file)
    }

    /// Starts qemu-nbd, whose command returns once its socket is there.
    pub(crate) fn qemu_nbd(directory: &Path, name: &str, arguments: &[&str]) -> Self {
        let (socket, pid_file) = paths(directory, name);
        let mut command = Command::new("qemu-nbd");
        command.args(["--fork", "--persistent", "--shared=16", "--socket"]).arg(&socket);
        command.arg("--pid-file").arg(&pid_file).args(arguments);
        Self::start(command, socket, &pid_file)
    }

    fn start(mut command: Command, socket: PathBuf, pid_file: &Path) -> Self {
        let status = command.status().unwrap_or_else(|error| {
            panic!("{:?} is needed for this test: {error}", command.get_program())
        });
        assert!(status.success(), "{command:?}");
        // A server that greets has written its process id.
        let mut greeting = [0; 8];
        UnixStream::connect(&socket).unwrap().read_exact(&mut greeting).unwrap();
        assert_eq!(&greeting, b"NBDMAGIC");
        let pid = fs::read_to_string(pid_file).unwrap().trim().parse().unwrap();
        Self { socket, pid: Pid::from_raw(pid).unwrap() }
    }

    pub(crate) fn target(&self, export: &str) -> Target {
        Target { address: Address::Unix(self.socket.clone()), export: export.into(), tls: None }
    }

    pub(crate) fn source(&self, bitmap: Option<&str>) -> SourceSpec {
        let address = Address::Unix(self.socket.clone());
        SourceSpec::Nbd {
            address,
            export: String::new(),
            tls: None,
            bitmap: bitmap.map(Into::into),
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Gone means gone: its image locks, too.
        if let Ok(process) = pidfd_open(self.pid, PidfdFlags::empty()) {
            let _ = pidfd_send_signal(&process, Signal::TERM);
            let _ = poll(&mut [PollFd::new(&process, PollFlags::IN)], None);
        }
    }
}

fn paths(directory: &Path, name: &str) -> (PathBuf, PathBuf) {
    (directory.join(format!("{name}.sock")), directory.join(format!("{name}.pid")))
}

/// A raw disk in a file, with the bytes that it should hold.
pub(crate) struct Disk {
    pub(crate) path: PathBuf,
}

impl Disk {
    /// A hole of `size` bytes.
    pub(crate) fn sparse(directory: &Path, name: &str, size: u64) -> Self {
        let path = directory.join(name);
        File::create_new(&path).unwrap().set_len(size).unwrap();
        Self { path }
    }

    /// Fills `blocks` with bytes that depend on their place and on `seed`.
    pub(crate) fn fill(&self, blocks: impl IntoIterator<Item = u64>, seed: u64) {
        let file = self.open();
        let size = file.metadata().unwrap().len();
        for block in blocks {
            let at = block * BLOCK;
            let mut bytes = vec![0; usize::try_from(BLOCK.min(size - at)).unwrap()];
            let mut hash = blake3::Hasher::new();
            hash.update(&seed.to_le_bytes()).update(&block.to_le_bytes());
            hash.finalize_xof().fill(&mut bytes);
            file.write_all_at(&bytes, at).unwrap();
        }
    }

    /// Writes zeros over a block: data to the file system, none to the disk.
    pub(crate) fn zero(&self, block: u64) {
        self.open().write_all_at(&vec![0; usize::try_from(BLOCK).unwrap()], block * BLOCK).unwrap();
    }

    pub(crate) fn resize(&self, size: u64) {
        self.open().set_len(size).unwrap();
    }

    pub(crate) fn spec(&self) -> SourceSpec {
        SourceSpec::File(self.path.clone())
    }

    pub(crate) fn read(&self) -> Vec<u8> {
        fs::read(&self.path).unwrap()
    }

    pub(crate) fn path_text(&self) -> &str {
        self.path.to_str().unwrap()
    }

    fn open(&self) -> File {
        OpenOptions::new().read(true).write(true).open(&self.path).unwrap()
    }
}

/// A directory with a state directory in it, and the change ids of disk 0.
pub(crate) struct Bench {
    pub(crate) directory: TempDir,
}

impl Bench {
    pub(crate) fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn state_dir(&self) -> PathBuf {
        self.path().join("state")
    }

    pub(crate) fn options(&self) -> RunOptions {
        RunOptions::new(self.state_dir(), "job-1")
    }

    /// Serves a raw file for writing.
    pub(crate) fn serve(&self, name: &str, disk: &Disk) -> Peer {
        Peer::nbdkit(self.path(), name, &["file", disk.path_text()])
    }

    /// Runs one disk to its end.
    pub(crate) async fn run_one(
        &self,
        source: SourceSpec,
        target: Target,
        previous: Option<&str>,
    ) -> Result<Ran, AgentError> {
        self.run(vec![job(0, source, target, previous)]).await
    }

    /// Runs some disks to their end, and collects what is told meanwhile.
    pub(crate) async fn run(&self, jobs: Vec<DiskJob>) -> Result<Ran, AgentError> {
        let (sender, mut receiver) = event_channel();
        let listening = tokio::spawn(async move {
            let mut events = Vec::new();
            while let Some(event) = receiver.recv().await {
                events.push(event);
            }
            events
        });
        let report = run(jobs, self.options(), sender, CancelToken::new()).await?;
        Ok(Ran { report, events: listening.await.unwrap() })
    }

    /// The names in the state directory.
    pub(crate) fn state_files(&self) -> Vec<String> {
        let Ok(listing) = fs::read_dir(self.state_dir()) else { return Vec::new() };
        listing.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

/// A run that succeeded.
pub(crate) struct Ran {
    pub(crate) report: RunReport,
    pub(crate) events: Vec<Event>,
}

impl Ran {
    pub(crate) fn disk(&self) -> &agent::DiskReport {
        &self.report.disks[0]
    }
}

pub(crate) fn job(
    index: u32,
    source: SourceSpec,
    target: Target,
    previous: Option<&str>,
) -> DiskJob {
    DiskJob {
        index,
        key: 2000 + i64::from(index),
        source,
        target,
        previous_change_id: previous.map(Into::into),
        full: false,
    }
}

/// Compares two raw files without printing megabytes.
pub(crate) fn assert_same(one: &Disk, other: &Disk) {
    let (one, other) = (one.read(), other.read());
    assert_eq!(one.len(), other.len());
    let differs = one.iter().zip(&other).position(|(a, b)| a != b);
    assert_eq!(differs, None, "the first byte that differs");
}
