//! The contenders: our server, qemu-nbd in three tunings, and the two limits. Each measurement starts a fresh process.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::fio::Load;
use crate::host::{self, Usage};

/// Who is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Contender {
    /// `nbdkit null`: the protocol without a disk.
    Wire,
    /// fio on a preallocated file: the disk without a protocol.
    HostFile,
    /// Our `nbd-server`.
    Ours,
    /// qemu-nbd as it comes.
    QemuDefault,
    /// qemu-nbd past the page cache, through io_uring.
    QemuUring,
    /// qemu-nbd past the page cache, through Linux AIO.
    QemuNative,
}

impl Contender {
    pub(crate) const ALL: [Self; 6] = [
        Self::Wire,
        Self::HostFile,
        Self::Ours,
        Self::QemuDefault,
        Self::QemuUring,
        Self::QemuNative,
    ];

    pub(crate) const QEMU: [Self; 3] = [Self::QemuDefault, Self::QemuUring, Self::QemuNative];
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Wire => "wire (nbdkit null)",
            Self::HostFile => "host file (fio O_DIRECT)",
            Self::Ours => "nbd-server",
            Self::QemuDefault => "qemu-nbd (default)",
            Self::QemuUring => "qemu-nbd (none, io_uring)",
            Self::QemuNative => "qemu-nbd (none, native)",
        })
    }
}

/// What one measurement found.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub(crate) struct Figures {
    pub(crate) bytes_per_sec: f64,
    /// CPU seconds of the server for each GiB moved; absent where there is no server.
    pub(crate) cpu_secs_per_gib: Option<f64>,
    /// Peak resident memory of the server.
    pub(crate) peak_mib: Option<f64>,
}

/// Where the program under test lies.
pub(crate) struct LineUp {
    pub(crate) nbd_server: PathBuf,
}

impl LineUp {
    /// Measures one contender once, on files of its own.
    pub(crate) fn measure(&self, contender: Contender, load: &Load<'_>) -> Result<Figures> {
        let disk = load.folder.join("disk");
        let socket = load.folder.join("socket");
        let result = match contender {
            Contender::HostFile => host_file(&disk, load),
            _ => self.serve(contender, &disk, &socket, load),
        };
        for path in [&disk, &socket] {
            let _ = std::fs::remove_file(path);
        }
        result
    }

    fn serve(
        &self,
        contender: Contender,
        disk: &Path,
        socket: &Path,
        load: &Load<'_>,
    ) -> Result<Figures> {
        let has_disk = contender != Contender::Wire;
        if has_disk {
            create_image(disk, load.mib)?;
            if load.case.needs_data() {
                let mut server = self.start(contender, disk, socket, load.mib)?;
                load.over_nbd(crate::case::Case::SeqWrite, socket, "")?;
                server.stop()?;
            }
            host::drop_caches()?;
        }
        let mut server = self.start(contender, disk, socket, load.mib)?;
        let before = Usage::of(server.child.id())?;
        let bytes_per_sec = load.over_nbd(load.case, socket, "")?;
        let after = Usage::of(server.child.id())?;
        server.stop()?;
        if has_disk {
            check_image(disk)?;
        }
        #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
        let gib = load.mib as f64 / 1024.0;
        Ok(Figures {
            bytes_per_sec,
            cpu_secs_per_gib: Some((after.cpu_secs - before.cpu_secs) / gib),
            peak_mib: Some(after.peak_mib),
        })
    }

    fn start(&self, contender: Contender, disk: &Path, socket: &Path, mib: u64) -> Result<Server> {
        let _ = std::fs::remove_file(socket);
        let qemu = |extra: &[&str]| {
            let mut command = Command::new("qemu-nbd");
            command.args(["--format=qcow2", "--persistent", "--shared=8"]).args(extra);
            command.arg("--socket").arg(socket).arg(disk);
            command
        };
        let mut command = match contender {
            Contender::Wire => {
                let mut command = Command::new("nbdkit");
                command.args(["--foreground", "--unix"]).arg(socket);
                command.args(["null", &format!("size={mib}M")]);
                command
            }
            Contender::Ours => {
                let mut command = Command::new(&self.nbd_server);
                command.arg("--listen").arg(format!("unix:{}", socket.display()));
                command.arg("--export").arg(format!("disk={}", disk.display()));
                command
            }
            Contender::QemuDefault => qemu(&[]),
            Contender::QemuUring => qemu(&["--cache=none", "--aio=io_uring"]),
            Contender::QemuNative => qemu(&["--cache=none", "--aio=native"]),
            Contender::HostFile => bail!("the host file has no server"),
        };
        let child = command
            .stdout(Stdio::null())
            .stdin(Stdio::null())
            .spawn()
            .with_context(|| format!("{contender} does not start"))?;
        let mut server = Server { child };
        server.wait_for(socket).with_context(|| contender.to_string())?;
        Ok(server)
    }
}

/// A running server; killed where it is not stopped.
struct Server {
    child: Child,
}

impl Server {
    fn wait_for(&mut self, socket: &Path) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(20);
        while std::os::unix::net::UnixStream::connect(socket).is_err() {
            if let Some(status) = self.child.try_wait()? {
                bail!("ended before it listened: {status}");
            }
            anyhow::ensure!(Instant::now() < deadline, "does not listen on {}", socket.display());
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Asks the server to end, so that it writes back what it holds, and waits.
    fn stop(&mut self) -> Result<()> {
        host::terminate(self.child.id())?;
        let status = self.child.wait()?;
        // qemu-nbd and nbdkit end well on SIGTERM, too.
        anyhow::ensure!(status.success(), "the server ended with {status}");
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn create_image(disk: &Path, mib: u64) -> Result<()> {
    let _ = std::fs::remove_file(disk);
    let status = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(disk)
        .arg(format!("{mib}M"))
        .status()
        .context("qemu-img does not start")?;
    anyhow::ensure!(status.success(), "qemu-img create failed");
    Ok(())
}

/// A server that is fast because it writes a broken image does not count.
fn check_image(disk: &Path) -> Result<()> {
    let status = Command::new("qemu-img").args(["check", "-q", "-f", "qcow2"]).arg(disk).status();
    anyhow::ensure!(status.context("qemu-img does not start")?.success(), "the image is broken");
    Ok(())
}

fn host_file(disk: &Path, load: &Load<'_>) -> Result<Figures> {
    let file = std::fs::File::create(disk)?;
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, load.mib << 20)?;
    drop(file);
    if load.case.needs_data() {
        Load { case: crate::case::Case::SeqWrite, ..*load }.on_file(disk)?;
    }
    host::drop_caches()?;
    let bytes_per_sec = load.on_file(disk)?;
    Ok(Figures { bytes_per_sec, ..Figures::default() })
}
