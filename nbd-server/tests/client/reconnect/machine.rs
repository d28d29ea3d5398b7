//! A server that can lose its power: what was not flushed is gone then, and what it still had in its hands has no effect.
//! Clients reach it by cables that can be cut or fall silent, one by one or all.

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use block::{
    BlockDevice, ByteRange, DeviceError, Durability, Extent, Limits, Segment, Segments, ZeroMode,
};
use bytes::Bytes;
use nbd_server::client::Address;
use nbd_server::{Export, Server, ServerConfig};
use parking_lot::Mutex;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// The size of the disk in bytes, unless a test wants another.
pub(super) const DISK_BYTES: u64 = 1 << 20;

/// What becomes of a request that reaches the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Done,
    /// It waits until the machine is told otherwise, or for ever.
    Held,
    Fails,
    /// The power goes instead.
    Crash,
}

/// A change that reached the machine: where it begins and how long it is; flushes have neither.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    Read(u64, u64),
    Write(u64, u64),
    Flush,
}

struct Disk {
    cached: Vec<u8>,
    durable: Vec<u8>,
    life: u64,
    log: Vec<Asked>,
}

struct Room {
    disk: Mutex<Disk>,
    fate: watch::Sender<Arc<dyn Fn(Asked) -> Fate + Send + Sync>>,
    /// The requests that wait, and those that have ended in a crash.
    held: watch::Sender<usize>,
    server: Mutex<Option<Server>>,
    cables: Mutex<Vec<Cable>>,
}

/// The machine, its disk and its cables.
pub(super) struct Machine {
    room: Arc<Room>,
    dir: TempDir,
    reception: JoinHandle<()>,
}

struct Cable {
    task: JoinHandle<()>,
    mishap: watch::Sender<Option<Mishap>>,
}

#[derive(Clone, Copy, Debug)]
enum Mishap {
    /// It breaks, as soon as the server has done what it had got by then: replies are lost, and nothing is done late.
    Cut,
    /// Nothing comes through any more, and nobody is told.
    Silence,
}

impl Machine {
    /// With power.
    pub(super) fn start() -> Self {
        let bytes = vec![0; usize::try_from(DISK_BYTES).unwrap()];
        let disk = Disk { cached: bytes.clone(), durable: bytes, life: 0, log: Vec::new() };
        let room = Arc::new(Room {
            disk: Mutex::new(disk),
            fate: watch::Sender::new(Arc::new(|_| Fate::Done)),
            held: watch::Sender::new(0),
            server: Mutex::new(None),
            cables: Mutex::default(),
        });
        let dir = tempfile::tempdir().expect("a temporary directory");
        let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
        let reception = tokio::spawn(receive(Arc::clone(&room), listener));
        let machine = Self { room, dir, reception };
        machine.power_on();
        machine
    }

    pub(super) fn address(&self) -> Address {
        Address::Unix(self.path())
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    /// Begins another life, if none lasts.
    pub(super) fn power_on(&self) {
        self.power_on_with(DISK_BYTES);
    }

    /// With a disk that shows this size.
    pub(super) fn power_on_with(&self, size_bytes: u64) {
        let life = self.room.disk.lock().life;
        let device = Arc::new(Life { room: Arc::clone(&self.room), life, size_bytes });
        let server = Server::new(ServerConfig::default());
        server.add_export(Export::new("disk", device)).unwrap();
        self.room.server.lock().get_or_insert(server);
    }

    /// Everything that was not flushed is gone.
    pub(super) fn power_off(&self) {
        self.room.power_off();
    }

    /// All connections break; the server lives.
    pub(super) async fn cut_all(&self) {
        while self.cables() > 0 {
            self.cut_one().await;
        }
    }

    /// The oldest connection breaks.
    pub(super) async fn cut_one(&self) {
        let cable = self.room.cables.lock().remove(0);
        cable.mishap.send_replace(Some(Mishap::Cut));
        let _ = cable.task.await;
    }

    /// Nothing comes through the oldest connection any more, and nobody is told.
    pub(super) fn silence_one(&self) {
        let cable = self.room.cables.lock().remove(0);
        cable.mishap.send_replace(Some(Mishap::Silence));
    }

    /// The number of connections now.
    pub(super) fn cables(&self) -> usize {
        self.room.cables.lock().len()
    }

    /// Takes its leave in order, then is there again. Waits for clients to go.
    pub(super) async fn restart(&self) {
        let server = self.room.server.lock().take().expect("no power");
        let report = server.shutdown(std::time::Duration::from_secs(20)).await;
        assert_eq!(report.dropped_connections, 0);
        self.power_on();
    }

    /// What becomes of requests from now on; those that were held are judged again.
    pub(super) fn decide(&self, fate: impl Fn(Asked) -> Fate + Send + Sync + 'static) {
        self.room.fate.send_replace(Arc::new(fate));
    }

    /// Waits until `count` requests are held.
    pub(super) async fn held(&self, count: usize) {
        self.room.held.subscribe().wait_for(|held| *held >= count).await.unwrap();
    }

    /// Takes what reached the disk since the last time.
    pub(super) fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.room.disk.lock().log)
    }

    pub(super) fn durable(&self) -> Vec<u8> {
        self.room.disk.lock().durable.clone()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.reception.abort();
        self.power_off();
    }
}

impl Room {
    fn power_off(&self) {
        {
            let mut disk = self.disk.lock();
            disk.life += 1;
            disk.cached = disk.durable.clone();
        }
        self.server.lock().take();
        self.cables.lock().drain(..).for_each(|cable| cable.task.abort());
    }
}

async fn receive(room: Arc<Room>, listener: UnixListener) {
    while let Ok((stream, _)) = listener.accept().await {
        // Without power, whoever calls is hung up on.
        let Some(server) = room.server.lock().clone() else { continue };
        let mishap = watch::Sender::new(None);
        let task = tokio::spawn(carry(stream, server, mishap.subscribe()));
        room.cables.lock().push(Cable { task, mishap });
    }
}

async fn carry(
    mut outside: UnixStream,
    server: Server,
    mut mishap: watch::Receiver<Option<Mishap>>,
) {
    let (mut inside, theirs) = tokio::io::duplex(64 << 10);
    server.serve_stream(theirs);
    let mishap = tokio::select! {
        biased;
        mishap = mishap.wait_for(Option::is_some) => mishap.ok().and_then(|mishap| *mishap),
        _ = tokio::io::copy_bidirectional(&mut outside, &mut inside) => return,
    };
    let _ = inside.shutdown().await;
    let _ = inside.read_to_end(&mut Vec::new()).await;
    if let Some(Mishap::Silence) = mishap {
        std::future::pending::<()>().await;
    }
}

/// The disk as one life of the machine sees it.
struct Life {
    room: Arc<Room>,
    life: u64,
    size_bytes: u64,
}

impl Life {
    async fn meet_fate(&self, asked: Asked) -> Result<(), DeviceError> {
        let mut fates = self.room.fate.subscribe();
        loop {
            let fate = fates.borrow_and_update()(asked);
            match fate {
                Fate::Done => return Ok(()),
                Fate::Fails => return Err(DeviceError::NotSupported { what: "anything today" }),
                Fate::Held => {}
                Fate::Crash => {
                    // By somebody else: this task belongs to a connection that is cut.
                    let room = Arc::clone(&self.room);
                    tokio::spawn(async move {
                        room.power_off();
                        let life = room.disk.lock().life;
                        let device = Life { room: Arc::clone(&room), life, size_bytes: DISK_BYTES };
                        let server = Server::new(ServerConfig::default());
                        server.add_export(Export::new("disk", Arc::new(device))).unwrap();
                        *room.server.lock() = Some(server);
                    });
                    return std::future::pending().await;
                }
            }
            self.room.held.send_modify(|held| *held += 1);
            let _ = fates.changed().await;
            self.room.held.send_modify(|held| *held -= 1);
        }
    }

    /// Works on the disk, if this life lasts.
    fn with<T>(&self, asked: Asked, work: impl FnOnce(&mut Disk) -> T) -> Result<T, DeviceError> {
        let mut disk = self.room.disk.lock();
        if disk.life != self.life {
            return Err(DeviceError::Closed);
        }
        disk.log.push(asked);
        Ok(work(&mut disk))
    }

    async fn change(
        &self,
        range: ByteRange,
        durability: Durability,
        content: impl FnOnce(&mut [u8]),
    ) -> Result<(), DeviceError> {
        let asked = Asked::Write(range.start(), range.len());
        self.meet_fate(asked).await?;
        self.with(asked, |disk| {
            let span = span(range);
            content(&mut disk.cached[span.clone()]);
            if durability == Durability::Durable {
                let (durable, cached) = (&mut disk.durable, &disk.cached);
                durable[span.clone()].copy_from_slice(&cached[span]);
            }
        })
    }
}

fn span(range: ByteRange) -> std::ops::Range<usize> {
    usize::try_from(range.start()).unwrap()..usize::try_from(range.end()).unwrap()
}

#[async_trait]
impl BlockDevice for Life {
    fn limits(&self) -> Limits {
        Limits {
            size_bytes: self.size_bytes,
            read_only: false,
            preferred_bytes: 4096,
            can_discard: true,
            fast_zeroes: true,
        }
    }

    async fn read(&self, range: ByteRange) -> Result<Segments, DeviceError> {
        let asked = Asked::Read(range.start(), range.len());
        self.meet_fate(asked).await?;
        let bytes = self.with(asked, |disk| disk.cached[span(range)].to_vec())?;
        Ok(Segments(vec![Segment::Data(bytes.into())]))
    }

    async fn write(&self, at: u64, data: Bytes, how: Durability) -> Result<(), DeviceError> {
        let range = ByteRange::new(at, data.len() as u64).unwrap();
        self.change(range, how, |bytes| bytes.copy_from_slice(&data)).await
    }

    async fn write_zeroes(
        &self,
        range: ByteRange,
        _: ZeroMode,
        how: Durability,
    ) -> Result<(), DeviceError> {
        self.change(range, how, |bytes| bytes.fill(0)).await
    }

    async fn discard(&self, range: ByteRange, how: Durability) -> Result<(), DeviceError> {
        self.change(range, how, |bytes| bytes.fill(0)).await
    }

    async fn flush(&self) -> Result<(), DeviceError> {
        self.meet_fate(Asked::Flush).await?;
        self.with(Asked::Flush, |disk| disk.durable = disk.cached.clone())
    }

    async fn extents(&self, range: ByteRange) -> Result<Vec<Extent>, DeviceError> {
        Ok(vec![Extent { range, allocated: true, zero: false }])
    }

    async fn close(&self) -> Result<(), DeviceError> {
        Ok(())
    }
}
