//! The server under examination, and the ways to speak to it. What is said is told in `peer`.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use block::{
    BlockDevice, ByteRange, DeviceError, Durability, Extent, Limits, Segment, Segments, ZeroMode,
};
use bytes::Bytes;
use nbd_server::wire::Headers;
use nbd_server::{Export, ExtentSource, FlaggedExtent, Server, ServerConfig};
use parking_lot::Mutex;
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

use crate::device::TestDevice;

/// The size of "disk" and "fixed".
pub(crate) const SIZE: u64 = 1 << 20;
/// The size of "giant".
pub(crate) const GIANT: u64 = 1 << 46;
/// The second context of "disk".
pub(crate) const STRIPES: &str = "x-test:stripes";
/// The length of its extents.
pub(crate) const STRIPE: u64 = 64 << 10;

/// The second context of "giant": the same everywhere, and told in crumbs.
pub(crate) const CRUMBS: &str = "x-test:crumbs";
/// The length of a crumb.
pub(crate) const CRUMB: u64 = 1 << 20;

/// Any stream.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

/// How the bytes travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    Unix,
    Tcp,
    /// TLS over TCP, begun by STARTTLS: whoever connects is in fixed newstyle already.
    #[cfg(feature = "tls")]
    Tls,
}

impl Transport {
    /// Those on which everything can be said, from the greeting on.
    pub(crate) const ALL: [Self; 2] = [Self::Unix, Self::Tcp];

    /// Those on which options and requests are exchanged.
    const NEGOTIATED: &[Self] = &[
        Self::Unix,
        Self::Tcp,
        #[cfg(feature = "tls")]
        Self::Tls,
    ];

    /// Whether the greeting has been said where this is connected.
    pub(crate) fn is_greeted(self) -> bool {
        !Self::ALL.contains(&self)
    }
}

/// One of the ways to speak to a server that every clause of the transmission phase holds for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Way {
    pub(crate) transport: Transport,
    pub(crate) headers: Headers,
}

impl Way {
    /// Every one.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        Self::with([Headers::Simple, Headers::Structured, Headers::Extended])
    }

    /// Those in which replies have chunks.
    pub(crate) fn with_chunks() -> impl Iterator<Item = Self> {
        Self::with([Headers::Structured, Headers::Extended])
    }

    /// Those with some headers.
    pub(crate) fn with<const N: usize>(headers: [Headers; N]) -> impl Iterator<Item = Self> {
        headers.into_iter().flat_map(|headers| {
            Transport::NEGOTIATED
                .iter()
                .map(move |transport| Self { transport: *transport, headers })
        })
    }
}

/// A server with the exports "disk" (writable, also the default), "fixed" (read-only) and "giant" (64 TiB).
pub(crate) struct Stage {
    pub(crate) server: Server,
    pub(crate) disk: Arc<TestDevice>,
    pub(crate) giant: Arc<Giant>,
    /// The same exports behind TLS.
    #[cfg(feature = "tls")]
    secure: tokio::sync::OnceCell<crate::secure::Secure>,
    #[cfg(feature = "tls")]
    limits: nbd_server::Limits,
    dir: TempDir,
    port: u16,
}

impl Stage {
    pub(crate) async fn new() -> Self {
        Self::with(ServerConfig::default()).await
    }

    pub(crate) async fn with(config: ServerConfig) -> Self {
        let (disk, giant) = (TestDevice::new(SIZE), Arc::new(Giant::default()));
        #[cfg(feature = "tls")]
        let limits = config.limits.clone();
        let server = Server::new(config);
        for export in exports(&disk, &giant) {
            server.add_export(export).unwrap();
        }
        let dir = tempfile::tempdir().unwrap();
        server.listen_unix(&dir.path().join("socket")).await.unwrap();
        let port = server.listen_tcp("127.0.0.1:0".parse().unwrap()).await.unwrap().port();
        Self {
            server,
            disk,
            giant,
            #[cfg(feature = "tls")]
            secure: tokio::sync::OnceCell::new(),
            #[cfg(feature = "tls")]
            limits,
            dir,
            port,
        }
    }

    /// The server that clients of a transport speak to.
    pub(crate) async fn server_of(&self, transport: Transport) -> Server {
        match transport {
            Transport::Unix | Transport::Tcp => self.server.clone(),
            #[cfg(feature = "tls")]
            Transport::Tls => self.secure().await.server.clone(),
        }
    }

    #[cfg(feature = "tls")]
    async fn secure(&self) -> &crate::secure::Secure {
        let exports = exports(&self.disk, &self.giant);
        let made = crate::secure::Secure::new(exports, self.limits.clone());
        self.secure.get_or_init(|| made).await
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) async fn connect(&self, transport: Transport) -> Box<dyn Stream> {
        match transport {
            Transport::Unix => Box::new(UnixStream::connect(self.socket()).await.unwrap()),
            Transport::Tcp => {
                let stream = TcpStream::connect(("127.0.0.1", self.port)).await.unwrap();
                stream.set_nodelay(true).unwrap();
                Box::new(stream)
            }
            #[cfg(feature = "tls")]
            Transport::Tls => self.secure().await.connect().await,
        }
    }
}

fn exports(disk: &Arc<TestDevice>, giant: &Arc<Giant>) -> [Export; 3] {
    [
        Export::new("disk", Arc::clone(disk) as _)
            .default_export(true)
            .description("a disk")
            .context(STRIPES, Arc::new(Stripes)),
        Export::new("fixed", TestDevice::with(SIZE, true)),
        Export::new("giant", Arc::clone(giant) as _).context(CRUMBS, Arc::clone(giant) as _),
    ]
}

/// Stripes that carry the flags 0 and 1 in turn.
struct Stripes;

#[async_trait]
impl ExtentSource for Stripes {
    async fn extents(&self, range: ByteRange) -> Result<Vec<FlaggedExtent>, DeviceError> {
        let flagged = |range: ByteRange| FlaggedExtent {
            range,
            flags: u32::try_from(range.start() / STRIPE % 2).unwrap(),
        };
        Ok(range.pieces(STRIPE).map(flagged).collect())
    }
}

/// A device of 64 TiB that is one hole, and remembers what was asked of it.
#[derive(Default)]
pub(crate) struct Giant {
    changes: Mutex<Vec<(&'static str, ByteRange)>>,
    crumbs: AtomicU64,
}

#[async_trait]
impl ExtentSource for Giant {
    async fn extents(&self, range: ByteRange) -> Result<Vec<FlaggedExtent>, DeviceError> {
        self.crumbs.fetch_add(1, Ordering::Relaxed);
        let range = ByteRange::between(range.start(), range.end().min(range.start() + CRUMB));
        Ok(vec![FlaggedExtent { range, flags: 7 }])
    }
}

impl Giant {
    /// How often it was asked for crumbs.
    pub(crate) fn crumbs(&self) -> u64 {
        self.crumbs.load(Ordering::Relaxed)
    }

    /// What was to be changed so far.
    pub(crate) fn changes(&self) -> Vec<(&'static str, ByteRange)> {
        self.changes.lock().clone()
    }

    fn change(&self, what: &'static str, range: ByteRange) -> Result<(), DeviceError> {
        self.limits().check_write(range)?;
        self.changes.lock().push((what, range));
        Ok(())
    }
}

#[async_trait]
impl BlockDevice for Giant {
    fn limits(&self) -> Limits {
        Limits {
            size_bytes: GIANT,
            read_only: false,
            preferred_bytes: 4096,
            can_discard: true,
            fast_zeroes: true,
        }
    }

    async fn read(&self, range: ByteRange) -> Result<Segments, DeviceError> {
        self.limits().check_read(range)?;
        Ok(Segments(vec![Segment::Zero(range.len())]))
    }

    async fn write(&self, offset: u64, data: Bytes, _: Durability) -> Result<(), DeviceError> {
        self.change("write", ByteRange::new(offset, data.len() as u64).unwrap())
    }

    async fn write_zeroes(
        &self,
        range: ByteRange,
        _: ZeroMode,
        _: Durability,
    ) -> Result<(), DeviceError> {
        self.change("zeroes", range)
    }

    async fn discard(&self, range: ByteRange, _: Durability) -> Result<(), DeviceError> {
        self.change("discard", range)
    }

    async fn flush(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    async fn extents(&self, range: ByteRange) -> Result<Vec<Extent>, DeviceError> {
        self.limits().check_read(range)?;
        Ok(vec![Extent { range, allocated: false, zero: true }])
    }

    async fn close(&self) -> Result<(), DeviceError> {
        Ok(())
    }
}
