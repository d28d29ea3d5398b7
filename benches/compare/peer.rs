//! The contenders: our server, qemu-nbd in three tunings, and the two limits. Each measurement starts a fresh process.

use std::fmt;
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::case::{Case, Transport};
use crate::disk;
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
    /// Our `nbd-server` with all the data of a chain in one image.
    OursFlat,
    /// qemu-nbd as it comes.
    QemuDefault,
    /// qemu-nbd past the page cache, through io_uring.
    QemuUring,
    /// qemu-nbd past the page cache, through Linux AIO.
    QemuNative,
}

impl Contender {
    pub(crate) const ALL: [Self; 7] = [
        Self::Wire,
        Self::HostFile,
        Self::Ours,
        Self::OursFlat,
        Self::QemuDefault,
        Self::QemuUring,
        Self::QemuNative,
    ];

    pub(crate) const QEMU: [Self; 3] = [Self::QemuDefault, Self::QemuUring, Self::QemuNative];

    /// What it is measured with in this case, if it is.
    fn case(self, case: Case) -> Option<Case> {
        if self == Self::OursFlat { case.flat() } else { Some(case) }
    }
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Wire => "wire (nbdkit null)",
            Self::HostFile => "host file (fio O_DIRECT)",
            Self::Ours => "nbd-server",
            Self::OursFlat => "nbd-server, one layer",
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
    /// How long the server took from its start until it listened, in seconds.
    pub(crate) ready_secs: Option<f64>,
    /// Peak resident memory of the server.
    pub(crate) peak_mib: Option<f64>,
}

/// Where the program under test lies.
pub(crate) struct LineUp {
    pub(crate) nbd_server: PathBuf,
}

impl LineUp {
    /// Measures one contender once, on files of its own; `None` where it has no part in the case.
    pub(crate) fn measure(&self, contender: Contender, load: &Load<'_>) -> Result<Option<Figures>> {
        let Some(case) = contender.case(load.case) else { return Ok(None) };
        let (load, files) = (Load { case, ..*load }, load.folder.join("files"));
        let _ = std::fs::remove_dir_all(&files);
        std::fs::create_dir(&files)?;
        let load = Load { folder: &files, ..load };
        let result = match contender {
            Contender::HostFile => host_file(&load),
            _ => self.serve(contender, &load),
        };
        std::fs::remove_dir_all(&files)?;
        result.map(Some)
    }

    fn serve(&self, contender: Contender, load: &Load<'_>) -> Result<Figures> {
        let case = load.case;
        let image = match contender {
            Contender::Wire => None,
            _ if case.layers > 1 => Some(disk::chain(load)?),
            _ => Some(disk::empty(load)?),
        };
        if case.allocated && case.layers == 1 && image.is_some() {
            let load = Load { case: case.filling(), ..*load };
            let mut server = self.start(contender, image.as_deref(), &load)?;
            load.over_nbd(&server.uri)?;
            server.stop()?;
        }
        host::drop_caches()?;
        let mut server = self.start(contender, image.as_deref(), load)?;
        let before = Usage::of(server.child.id())?;
        let bytes_per_sec = load.over_nbd(&server.uri)?;
        let after = Usage::of(server.child.id())?;
        server.stop()?;
        if let Some(image) = image {
            disk::check(&image)?;
        }
        #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
        let gib = case.moved_mib(load.mib) as f64 / 1024.0;
        Ok(Figures {
            bytes_per_sec,
            cpu_secs_per_gib: Some((after.cpu_secs - before.cpu_secs) / gib),
            peak_mib: Some(after.peak_mib),
            ready_secs: Some(server.ready.as_secs_f64()),
        })
    }

    /// Starts the server of an image, on an address of its own.
    fn start(&self, contender: Contender, image: Option<&Path>, load: &Load<'_>) -> Result<Server> {
        let address = Address::new(load)?;
        let image = image.unwrap_or(Path::new(""));
        let qemu = |extra: &[&str]| {
            let mut command = Command::new("qemu-nbd");
            command.args(["--format=qcow2", "--persistent", "--shared=8"]).args(extra);
            match &address {
                Address::Unix(socket) => command.arg("--socket").arg(socket),
                Address::Tcp(port) => command.arg("--bind=127.0.0.1").arg(format!("--port={port}")),
            };
            command.arg(image);
            command
        };
        let mut command = match contender {
            Contender::Wire => {
                let mut command = Command::new("nbdkit");
                command.arg("--foreground");
                match &address {
                    Address::Unix(socket) => command.arg("--unix").arg(socket),
                    Address::Tcp(port) => {
                        command.arg("--ipaddr=127.0.0.1").arg(format!("--port={port}"))
                    }
                };
                command.args(["null", &format!("size={}M", load.mib)]);
                command
            }
            Contender::Ours | Contender::OursFlat => {
                let mut command = Command::new(&self.nbd_server);
                command.arg("--listen").arg(match &address {
                    Address::Unix(socket) => format!("unix:{}", socket.display()),
                    Address::Tcp(port) => format!("127.0.0.1:{port}"),
                });
                command.arg("--export").arg(format!("disk={}", image.display()));
                command
            }
            Contender::QemuDefault => qemu(&[]),
            Contender::QemuUring => qemu(&["--cache=none", "--aio=io_uring"]),
            Contender::QemuNative => qemu(&["--cache=none", "--aio=native"]),
            Contender::HostFile => bail!("the host file has no server"),
        };
        let begun = Instant::now();
        let child = command
            .stdout(Stdio::null())
            .stdin(Stdio::null())
            .spawn()
            .with_context(|| format!("{contender} does not start"))?;
        let mut server = Server { child, uri: address.uri(), ready: Duration::ZERO };
        server.wait_for(&address).with_context(|| contender.to_string())?;
        server.ready = begun.elapsed();
        Ok(server)
    }
}

/// Where a server listens.
enum Address {
    Unix(PathBuf),
    Tcp(u16),
}

impl Address {
    /// One that nobody has.
    fn new(load: &Load<'_>) -> Result<Self> {
        Ok(match load.case.transport {
            Transport::Unix => {
                let socket = load.folder.join("socket");
                let _ = std::fs::remove_file(&socket);
                Self::Unix(socket)
            }
            Transport::Tcp => Self::Tcp(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port()),
        })
    }

    fn uri(&self) -> String {
        match self {
            Self::Unix(socket) => format!("nbd+unix:///?socket={}", socket.display()),
            Self::Tcp(port) => format!("nbd://127.0.0.1:{port}/"),
        }
    }

    fn is_listened_on(&self) -> bool {
        match self {
            Self::Unix(socket) => UnixStream::connect(socket).is_ok(),
            Self::Tcp(port) => TcpStream::connect(("127.0.0.1", *port)).is_ok(),
        }
    }
}

/// A running server; killed where it is not stopped.
struct Server {
    child: Child,
    uri: String,
    /// How long it took to listen.
    ready: Duration,
}

impl Server {
    fn wait_for(&mut self, address: &Address) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !address.is_listened_on() {
            if let Some(status) = self.child.try_wait()? {
                bail!("ended before it listened: {status}");
            }
            anyhow::ensure!(Instant::now() < deadline, "does not listen on {}", address.uri());
            std::thread::sleep(Duration::from_millis(1));
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

fn host_file(load: &Load<'_>) -> Result<Figures> {
    let path = load.folder.join("disk");
    let file = std::fs::File::create(&path)?;
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, load.mib << 20)?;
    drop(file);
    if load.case.allocated {
        Load { case: load.case.filling(), ..*load }.on_file(&path)?;
    }
    host::drop_caches()?;
    Ok(Figures { bytes_per_sec: load.on_file(&path)?, ..Figures::default() })
}
