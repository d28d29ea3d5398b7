//! An open image: the core behind its lock, the file, the backing device, and what ties requests to them. How a read,
//! a write and a flush use these stands in modules of their own.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use block::{
    BlockDevice, ByteRange, DeviceError, Hold, HostError, HostFile, HostOp, Limits, RangeLock,
};
use parking_lot::{Mutex, RwLock};
use tokio::sync::{Mutex as AsyncMutex, OnceCell};

use crate::bitmap::Bitmaps;
use crate::cache;
use crate::cipher::Cipher;
use crate::core::Core;
use crate::error::{Error, Fault, Feature};
use crate::header::CORRUPT;
use crate::layers::Below;
use crate::mapping::{Step, Table};
use crate::streams;
use crate::units::HostOffset;

/// An open QCOW2 image. Clones are the same image.
///
/// All methods of [`BlockDevice`] can be called from any number of tasks at once, on any runtime.
///
/// **Order.** Requests that overlap are ordered by locks on guest ranges, widened to clusters: reads and overwrites of
/// what is allocated share, whatever changes the mapping excludes, and overwrites of the same bytes take turns. No
/// lock on the image is held while bytes move.
///
/// **Durability.** Metadata changes live in memory until [`BlockDevice::flush`]. At every moment the file on disk is an
/// image in which at most clusters are leaked; what a flush covered reads back.
///
/// **Dropping.** A request whose future is dropped goes on as far as it was handed to the host; its locks and clusters
/// stay with it until the host has finished. An image that is dropped without [`BlockDevice::close`] is left as after
/// a power cut, with all data that was flushed.
///
/// **Failure.** A failed write of data fails that request only. A failed write of metadata, or a failed sync, makes
/// every later request answer [`Error::Poisoned`] until the image is opened again; where there was only no room for
/// it, the flush fails and can be tried again. Corruption that is met while writing sets the image's corrupt bit and
/// ends all changes ([`Feature::WritingCorrupt`]); reading goes on.
#[derive(Clone)]
pub struct Image {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) path: PathBuf,
    /// The size of the disk in it may change.
    limits: RwLock<Limits>,
    pub(crate) info: crate::info::Facts,
    pub(crate) core: Arc<Mutex<Core>>,
    /// Guest ranges, widened to clusters.
    pub(crate) guests: RangeLock,
    /// Guest bytes that are being overwritten in place, by requests that share the locks on their clusters.
    pub(crate) overwrites: RangeLock,
    /// Host ranges of tables that are being loaded.
    loads: RangeLock,
    /// Held by the flush that runs.
    pub(crate) flush_gate: Arc<AsyncMutex<()>>,
    /// Held by what changes the image as a whole, in several steps: its size, its snapshots, its features.
    pub(crate) structure: AsyncMutex<()>,
    /// The number of the last flush that began, and of the last that succeeded.
    pub(crate) flushes_begun: AtomicU64,
    pub(crate) flushes_done: AtomicU64,
    /// File and backing device until the image is closed.
    live: RwLock<Option<Arc<Live>>>,
    closing: AtomicBool,
    poison: Mutex<Option<Arc<Error>>>,
    first_change: OnceCell<()>,
    pub(crate) bitmaps: Bitmaps,
    /// Corruption was met while writing: nothing is changed any more.
    is_broken: AtomicBool,
}

/// What an image stands on.
pub(crate) struct Live {
    /// The image file: all metadata, and guest data where there is no data file.
    pub(crate) file: HostFile,
    /// The external data file, where guest data lives in one.
    pub(crate) data: Option<HostFile>,
    pub(crate) backing: Option<Arc<dyn BlockDevice>>,
    /// What is known of the backing device.
    pub(crate) below: Option<Below>,
    /// What encrypts guest data on the host.
    pub(crate) cipher: Option<Arc<dyn Cipher>>,
    /// How long may be worked on opening it by a passphrase.
    pub(crate) unlock_time: Duration,
}

impl Image {
    pub(crate) fn assemble(
        live: Live,
        core: Core,
        limits: Limits,
        info: crate::info::Facts,
    ) -> Self {
        let bitmaps = Bitmaps::new(matches!(core.header.bitmaps(), Ok(Some(_))));
        let core = Arc::new(Mutex::new(core));
        cache::register(&core);
        Self {
            inner: Arc::new(Inner {
                path: live.file.path().to_owned(),
                limits: RwLock::new(limits),
                info,
                core,
                guests: RangeLock::new(),
                overwrites: RangeLock::new(),
                loads: RangeLock::new(),
                flush_gate: Arc::new(AsyncMutex::new(())),
                structure: AsyncMutex::new(()),
                flushes_begun: AtomicU64::new(0),
                flushes_done: AtomicU64::new(0),
                live: RwLock::new(Some(Arc::new(live))),
                closing: AtomicBool::new(false),
                poison: Mutex::new(None),
                first_change: OnceCell::new(),
                bitmaps,
                is_broken: AtomicBool::new(false),
            }),
        }
    }

    /// The path that the image was opened by.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        streams::forget_image(self.core.lock().id);
    }
}

impl Inner {
    /// The file and the backing device, for a request that begins.
    ///
    /// # Errors
    /// [`Error::Closed`], [`Error::Poisoned`].
    pub(crate) fn live(&self) -> Result<Arc<Live>, Error> {
        if self.closing.load(Ordering::Acquire) {
            return Err(self.closed());
        }
        self.live_while_closing()
    }

    pub(crate) fn live_while_closing(&self) -> Result<Arc<Live>, Error> {
        if let Some(first) = self.poison.lock().clone() {
            return Err(Error::Poisoned { file: self.path.clone(), first });
        }
        self.live.read().clone().ok_or_else(|| self.closed())
    }

    fn closed(&self) -> Error {
        Error::Closed { file: self.path.clone() }
    }

    /// Refuses new requests from now on.
    pub(crate) fn start_closing(&self) {
        self.closing.store(true, Ordering::Release);
    }

    /// Whether a request has changed anything.
    pub(crate) fn has_changed(&self) -> bool {
        self.first_change.initialized()
    }

    /// Lets go of the file, and with it of its locks.
    pub(crate) fn let_go(&self) {
        streams::forget_image(self.core.lock().id);
        self.live.write().take();
    }

    /// Whether the file has been let go.
    pub(crate) fn is_gone(&self) -> bool {
        self.live.read().is_none()
    }

    /// What requests have to keep to. The size may have changed by the time that a request gets its lock.
    pub(crate) fn limits(&self) -> Limits {
        *self.limits.read()
    }

    /// The disk has another size from now on.
    pub(crate) fn set_size(&self, size_bytes: u64) {
        self.limits.write().size_bytes = size_bytes;
    }

    /// The error of an answer of the core.
    pub(crate) fn fault(&self, fault: Fault) -> Error {
        fault.of(&self.path)
    }

    /// Makes every later request fail, because metadata on disk is behind what memory says, and gives the error back.
    pub(crate) fn poison(&self, error: Error) -> Error {
        let mut poison = self.poison.lock();
        let first = match &*poison {
            Some(first) => Arc::clone(first),
            None => {
                tracing::error!(image = %self.path.display(), %error, "metadata could not be written");
                let first = Arc::new(error);
                *poison = Some(Arc::clone(&first));
                first
            }
        };
        Error::Poisoned { file: self.path.clone(), first }
    }

    /// Asks the core until it has an answer, doing for it what it needs.
    ///
    /// # Errors
    /// What the core refuses, and what the host fails at on the way; then nothing has changed.
    pub(crate) async fn step<T>(
        &self,
        live: &Live,
        mut ask: impl FnMut(&mut Core) -> Result<Step<T>, Fault>,
    ) -> Result<T, Error> {
        loop {
            cache::make_room();
            if self.core.lock().is_full() {
                self.flush(live).await?;
            }
            let step = ask(&mut self.core.lock()).map_err(|fault| self.fault(fault))?;
            match step {
                Step::Ready(answer) => return Ok(answer),
                needs => self.serve(live, needs).await?,
            }
        }
    }

    /// As [`Inner::step`], for what is about to change the image: corruption that is met on the way ends all changes.
    pub(crate) async fn change<T>(
        &self,
        live: &Live,
        ask: impl FnMut(&mut Core) -> Result<Step<T>, Fault>,
    ) -> Result<T, Error> {
        let answer = self.step(live, ask).await;
        if let Err(error @ Error::Corrupt { .. }) = &answer {
            let no_flush = Arc::clone(&self.flush_gate).lock_owned().await;
            self.give_up_changing(live, error, &Some(Arc::new(no_flush))).await;
        }
        answer
    }

    /// Refuses all changes from now on, and marks the image as corrupt, durably, where its version can say so. What
    /// was changed before can still be flushed. `hold` keeps other flushes out until the header is written.
    pub(crate) async fn give_up_changing(&self, live: &Live, error: &Error, hold: &Hold) {
        if self.is_broken.swap(true, Ordering::AcqRel) {
            return;
        }
        tracing::error!(image = %self.path.display(), %error, "no longer written: repair it");
        let sector = {
            let mut core = self.core.lock();
            if core.header.version < 3 {
                return;
            }
            core.header.set_incompatible(CORRUPT, true);
            core.header.sector()
        };
        let written = match live.file.write(0, sector.into(), hold.clone()).await {
            Ok(()) => live.file.sync().await,
            failed => failed,
        };
        if let Err(error) = written {
            tracing::error!(image = %self.path.display(), %error, "could not be marked as corrupt");
        }
    }

    /// As [`Inner::step`], for a flush itself: it makes no room first.
    pub(crate) async fn step_in_flush<T>(
        &self,
        live: &Live,
        mut ask: impl FnMut(&mut Core) -> Result<Step<T>, Fault>,
    ) -> Result<T, Error> {
        loop {
            let step = ask(&mut self.core.lock()).map_err(|fault| self.fault(fault))?;
            match step {
                Step::Ready(answer) => return Ok(answer),
                needs => self.serve(live, needs).await?,
            }
        }
    }

    async fn serve<T>(&self, live: &Live, needs: Step<T>) -> Result<(), Error> {
        match needs {
            Step::Ready(_) => Ok(()),
            Step::Load(table) => self.load(live, table).await,
            Step::Grow(to) => self.grow(live, to).await,
        }
    }

    /// Reads a table into memory, unless somebody else just did.
    ///
    /// One at a time for each table: a table that is not in memory is on disk as it was last, and stays so until it
    /// has been loaded, which only the holder of this lock can do.
    async fn load(&self, live: &Live, table: Table) -> Result<(), Error> {
        let cluster = self.core.lock().geometry.bytes();
        let at = table.at().0;
        let range = ByteRange::between(at, at.saturating_add(cluster));
        let _turn = self.loads.lock_exclusive(range).await;
        {
            let core = self.core.lock();
            if !core.is_missing(table) {
                return Ok(());
            }
            core.check_table(table).map_err(|fault| self.fault(fault))?;
        }
        let bytes = live.file.read(range).await?;
        self.core.lock().loaded(table, &bytes).map_err(|fault| self.fault(fault))
    }

    pub(crate) async fn grow(&self, live: &Live, to: u64) -> Result<(), Error> {
        if live.file.is_fixed_len() && to > live.file.len() {
            return Err(Error::Host(HostError {
                path: self.path.clone(),
                op: HostOp::Allocate,
                range: ByteRange::between(live.file.len(), to),
                source: std::io::ErrorKind::StorageFull.into(),
            }));
        }
        live.file.ensure_capacity(to).await?;
        let mut core = self.core.lock();
        core.capacity_bytes = core.capacity_bytes.max(to);
        Ok(())
    }

    /// Once, before anything in the image changes: what the image says of data that we do not keep up to date
    /// (unknown autoclear features) is withdrawn, durably, and the dirty bit is set where refcounts may stay behind.
    ///
    /// # Errors
    /// [`Feature::WritingCorrupt`] where corruption was met since the image was opened; what the host fails at.
    pub(crate) async fn before_change(&self, live: &Live) -> Result<(), Error> {
        if self.is_broken.load(Ordering::Acquire) {
            return Err(self.fault(Fault::Unsupported(Feature::WritingCorrupt)));
        }
        self.first_change
            .get_or_try_init(|| async {
                // The write takes the gate along: if it landed late, it would undo what others made of the header.
                let gate: Hold = Some(Arc::new(Arc::clone(&self.flush_gate).lock_owned().await));
                let sector = self.core.lock().header.sector_for_changing();
                let Some(sector) = sector else { return Ok(()) };
                let write = live.file.write(HostOffset(0).0, sector.into(), gate.clone()).await;
                let done = match write {
                    Ok(()) => live.file.sync().await,
                    failed => failed,
                };
                done.map_err(|error| self.poison(Error::Host(error)))?;
                // Not before: whoever drops this future half-way leaves it to the next.
                self.core.lock().header.begin_changing();
                Ok(())
            })
            .await
            .copied()
    }

    /// The bytes of a cluster.
    pub(crate) fn cluster_bytes(&self) -> u64 {
        self.info.cluster_bytes
    }

    /// The guest clusters that a range touches: what a request locks.
    pub(crate) fn widen(&self, range: ByteRange) -> ByteRange {
        range.widen(self.cluster_bytes())
    }

    /// The error of the backing device.
    pub(crate) fn backing_error(&self, source: DeviceError) -> Error {
        Error::Backing { file: self.path.clone(), source }
    }
}
