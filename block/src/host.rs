//! A host file at any alignment: direct I/O where it fits, bounce buffers and read-modify-write where it does not,
//! holes, and the lock that keeps neighbours apart. What the bytes mean is the formats' business.

mod bounce;
mod length;
#[cfg(test)]
mod tests;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use tokio::sync::Mutex as AsyncMutex;

use self::bounce::Locks;
use crate::buffer::{Buffer, BufferPool, ZEROS_BYTES, zeros};
use crate::storage::{Effect, Hold, Keep, Lengths, Op, Outcome, Request, Storage, StorageFacts};
use crate::{ByteRange, Engine, ErrorKind, FileReader, HostError, HostOp, RangeLock, Root};

/// The unit, in bytes, in which ranges are punched and zeroed on the host; the edges are written.
const HOLE_BYTES: u64 = 4096;
/// Zeroing that much, in bytes, leaves no space allocated where it fails for want of room.
const RESTORED_BYTES: u64 = 1 << 20;
/// How many data ranges are asked for at once.
const MAP_RANGES: usize = 1024;

/// Whether opening makes the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Create {
    /// It must exist.
    #[default]
    No,
    /// It must not exist.
    New,
}

/// How to open a [`HostFile`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpenOptions {
    /// Refuse every change.
    pub read_only: bool,
    /// Whether to make the file.
    pub create: Create,
    /// Bypass the page cache where the host can; otherwise go through it.
    pub direct: bool,
    /// Whether bytes of zero behind the end of the file harm nobody. Bypassing the page cache needs whole blocks, also at
    /// the end: a power cut in the middle of a write there may leave the file longer, by less than one of them. Without
    /// this, a file that is written, and that ends within a block when it is opened, is written through the page cache.
    pub can_lengthen: bool,
    /// Take the locks by which QEMU recognises an image in use.
    pub lock: bool,
    /// Find out whether it could be opened so, beside all that this process rehearses: a file that would be written is
    /// opened for reading, and neither `lock` nor the locks of others count. `create` has no part in it.
    pub rehearse: bool,
}

impl OpenOptions {
    /// For reading, direct and locked.
    pub fn reading() -> Self {
        Self { read_only: true, direct: true, lock: true, ..Self::default() }
    }

    /// For reading and writing, direct and locked.
    pub fn writing() -> Self {
        Self { read_only: false, ..Self::reading() }
    }

    /// For writing a file that must not exist yet, direct and locked.
    pub fn creating() -> Self {
        Self { create: Create::New, ..Self::writing() }
    }
}

/// An open host file, or block device, that takes requests of any alignment. Clones are the same open file, which is
/// closed (and unlocked) when the last clone and the last operation are gone.
///
/// **Alignment.** Aligned writes go straight from the caller's memory to the device. Others are bounced, and device
/// blocks that they share with bytes which are not theirs are read first and written back whole, under a lock on
/// these blocks that also keeps aligned writes out: no neighbour is ever lost. Reads take no lock.
///
/// **End of the file.** [`HostFile::len`] is the end of what was written or set, a byte number of any alignment. The
/// file on the host may be longer while space is allocated ahead ([`HostFile::ensure_capacity`]) until
/// [`HostFile::give_back`]. With direct I/O a write whose last, partial block passes the end of the host's file is
/// rounded up with zeros and the file is cut to its true length before the write returns, while every other write
/// and resize behind that block waits; a power cut in between leaves the file longer by less than one block of
/// zeros. (An existing file whose length is odd is written through the page cache instead, without that window.)
///
/// **Dropped futures.** An operation that was handed to the host goes on; its buffers, the lock and the caller's
/// [`Hold`] stay with it until the host has finished, and lengths count it. What was not yet handed over (the second
/// half of a read-modify-write) does not happen.
#[derive(Clone)]
pub struct HostFile {
    inner: Arc<Inner>,
}

struct Inner {
    path: PathBuf,
    storage: Arc<dyn Storage>,
    facts: StorageFacts,
    lengths: Arc<Lengths>,
    locks: RangeLock,
    /// Held by whatever changes the length on the host, except plain writes.
    resize: Arc<AsyncMutex<()>>,
    pool: Arc<BufferPool>,
    can_allocate: AtomicBool,
    can_zero: AtomicBool,
    can_punch: AtomicBool,
}

impl HostFile {
    /// Opens a file with the engine of this process.
    ///
    /// # Errors
    /// [`HostError`] with [`HostOp::Open`] or [`HostOp::Lock`].
    pub async fn open(path: &Path, options: OpenOptions) -> Result<Self, HostError> {
        Self::open_with(Engine::shared(), path, options).await
    }

    /// Opens a file with a certain engine.
    ///
    /// # Errors
    /// As [`HostFile::open`].
    pub async fn open_with(
        engine: &Engine,
        path: &Path,
        options: OpenOptions,
    ) -> Result<Self, HostError> {
        let storage = engine.open(None, path, &options).await?;
        Self::from_storage(path, storage)
    }

    /// Opens a regular file below a folder, which no link and nobody who swaps folders meanwhile leads away from. Of
    /// the options, `create` does not count: the file must be there.
    ///
    /// # Errors
    /// As [`HostFile::open`], also where the path leaves the folder or names no regular file.
    pub async fn open_beneath(
        root: &Root,
        path: &Path,
        options: OpenOptions,
    ) -> Result<Self, HostError> {
        let storage = Engine::shared().open(Some(root), path, &options).await?;
        Self::from_storage(path, storage)
    }

    /// A file over any storage; the path is for messages only.
    ///
    /// # Errors
    /// [`HostError`] with [`HostOp::Stat`] if the storage cannot tell its length.
    pub fn from_storage(path: &Path, storage: Arc<dyn Storage>) -> Result<Self, HostError> {
        let len = storage.len().map_err(|source| HostError::whole(path, HostOp::Stat, source))?;
        Ok(Self {
            inner: Arc::new(Inner {
                path: path.to_owned(),
                facts: storage.facts(),
                storage,
                lengths: Arc::new(Lengths::new(len)),
                locks: RangeLock::new(),
                resize: Arc::new(AsyncMutex::new(())),
                pool: Arc::clone(BufferPool::shared()),
                can_allocate: AtomicBool::new(true),
                can_zero: AtomicBool::new(true),
                can_punch: AtomicBool::new(true),
            }),
        })
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// Whether every change is refused.
    pub fn is_read_only(&self) -> bool {
        self.inner.facts.read_only
    }

    /// The end of what was written or set, in bytes; the size of a block device.
    pub fn len(&self) -> u64 {
        self.inner.lengths.logical.load(Ordering::Acquire)
    }

    /// Whether it has no byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The length of the file on the host at this moment, in bytes; the size of a block device. [`HostFile::len`] does
    /// not notice that somebody else cut or lengthened the file. One system call, no I/O.
    ///
    /// # Errors
    /// [`HostError`] with [`HostOp::Stat`].
    pub fn host_len(&self) -> Result<u64, HostError> {
        let len = self.inner.storage.len();
        len.map_err(|source| HostError::whole(self.path(), HostOp::Stat, source))
    }

    /// Device and inode number, by which two paths to one file are recognised; `None` where there is no real file.
    pub fn id(&self) -> Option<(u64, u64)> {
        self.inner.facts.id
    }

    /// What offsets and lengths should be multiples of to avoid copies, in bytes; 1 where it does not matter.
    pub fn alignment_bytes(&self) -> u64 {
        self.inner.facts.offset_align
    }

    /// Whether it is a block device, whose length never changes.
    pub fn is_fixed_len(&self) -> bool {
        self.inner.facts.fixed_len
    }

    /// Fails where somebody else has cut the file before `range` ends, or before [`HostFile::len`] where that comes first:
    /// what is missing there is not zeros. To be asked after the file's holes; reads ask it themselves.
    ///
    /// # Errors
    /// [`HostError`] with [`HostOp::Read`] and [`io::ErrorKind::UnexpectedEof`].
    pub async fn check_uncut(&self, range: ByteRange) -> Result<(), HostError> {
        self.check_length(HostOp::Read, range, range.end()).await
    }

    /// Fails where somebody else has cut the file before `end`, or before [`HostFile::len`] where that comes first. Asked
    /// for all of the file before each change: one behind the cut would make zeros of what is missing.
    async fn check_length(&self, op: HostOp, range: ByteRange, end: u64) -> Result<(), HostError> {
        let is_cut = || Ok(self.host_len()? < end.min(self.len()));
        if self.is_fixed_len() || !is_cut()? {
            return Ok(());
        }
        // Cutting it is our own right; that is over now.
        let _resize = self.inner.lock_resize().await;
        if !is_cut()? {
            return Ok(());
        }
        let (len, now) = (self.len(), self.host_len()?);
        let why = format!("somebody else has cut the file from {len} bytes to {now}");
        let source = io::Error::new(io::ErrorKind::UnexpectedEof, why);
        let place = match op {
            HostOp::Read => ByteRange::between(range.start().max(now), range.end()),
            _ => range,
        };
        Err(self.inner.error(op, place, source))
    }

    /// Reads `range`; bytes behind the end of the file are zeros. The result is one piece of memory: ask for large
    /// ranges in pieces.
    ///
    /// # Errors
    /// [`HostError`] with [`HostOp::Read`], also where somebody else has cut the file: [`HostFile::check_uncut`].
    pub async fn read(&self, range: ByteRange) -> Result<Bytes, HostError> {
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let inner = &self.inner;
        let wide = inner.widen(range, HostOp::Read)?;
        let mut bytes = inner.read_block(wide).await?.freeze();
        if wide != range {
            let before = ByteRange::between(wide.start(), range.start());
            let skip = inner.memory_len(before, HostOp::Read)?;
            bytes = bytes.slice(skip..skip + inner.memory_len(range, HostOp::Read)?);
        }
        // Where the host has no more, there are zeros up to the end.
        if bytes.last() == Some(&0) {
            self.check_uncut(range).await?;
        }
        Ok(bytes)
    }

    /// Writes all of `data`, of any alignment; the file grows where needed. `hold` is kept until the host has finished.
    ///
    /// # Errors
    /// [`HostError`] with [`HostOp::Write`]; then any part of the range may hold old or new bytes. A full host is
    /// [`crate::ErrorKind::NoSpace`].
    pub async fn write(&self, at: u64, data: Bytes, hold: Hold) -> Result<(), HostError> {
        let inner = &self.inner;
        let Some(range) = ByteRange::new(at, data.len() as u64) else {
            let at = ByteRange::between(at, at);
            return Err(inner.error(HostOp::Write, at, io::ErrorKind::FileTooLarge.into()));
        };
        if range.is_empty() {
            return Ok(());
        }
        inner.check_change(HostOp::Write, range)?;
        self.check_length(HostOp::Write, range, u64::MAX).await?;
        let wide = inner.widen(range, HostOp::Write)?;
        if wide != range {
            return inner.write_unaligned(range, wide, data, hold).await;
        }
        let guard = Some(Arc::new(inner.locks.lock_shared(range).await));
        let locks = Locks { guard, resize: None };
        if inner.is_memory_aligned(&data) {
            let keep = inner.keep(&hold, &locks, range.end(), range.end());
            return inner.run(Op::Write { at, data }, HostOp::Write, keep).await.map(drop);
        }
        inner.write_pieces(range, wide, &data, &hold, &locks).await
    }

    /// Copies `len` bytes at `from` of another file to `to` of this one without bringing them here: as extents that both
    /// files share where the file system can do that and the offsets are whole blocks of it, as it copies itself
    /// otherwise. `false` where it does neither, or where the other file ends before: then any part of the range may
    /// hold old or new bytes, and the caller has to write them.
    ///
    /// Nobody may change those bytes of the other file meanwhile. Otherwise as [`HostFile::write`]; files that bypass the
    /// page cache demand their alignment here, too, or answer `false`.
    ///
    /// # Errors
    /// [`HostError`] with [`HostOp::Copy`].
    pub async fn copy_from(
        &self,
        other: &HostFile,
        from: u64,
        to: u64,
        len: u64,
        hold: Hold,
    ) -> Result<bool, HostError> {
        let inner = &self.inner;
        let (Some(range), Some(read)) = (ByteRange::new(to, len), ByteRange::new(from, len)) else {
            let at = ByteRange::between(to, to);
            return Err(inner.error(HostOp::Copy, at, io::ErrorKind::FileTooLarge.into()));
        };
        if range.is_empty() {
            return Ok(true);
        }
        inner.check_change(HostOp::Copy, range)?;
        self.check_length(HostOp::Copy, range, u64::MAX).await?;
        let aligned =
            inner.widen(range, HostOp::Copy)? == range && read.is_aligned(other.alignment_bytes());
        if !aligned || read.end() > other.len() {
            return Ok(false);
        }
        let Some(source) = other.inner.storage.copy_source() else { return Ok(false) };
        let keep = inner.shared_keep(range, &hold, Some(range.end())).await;
        match inner.run(Op::Copy { source, from, range }, HostOp::Copy, keep).await {
            Ok(_) => Ok(true),
            Err(error) if is_unsupported(&error.source) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The file for a library that reads files itself, blocking its thread; `None` where it is no file of this host.
    pub fn reader(&self) -> Option<FileReader> {
        self.inner.storage.copy_source().map(FileReader::new)
    }

    /// Makes `range` read as zeros and stay, or become, allocated; the file grows where needed. Writes zeros where
    /// the host has no faster way ([`HostFile::has_fast_zeroes`]).
    ///
    /// # Errors
    /// [`HostError`] with [`HostOp::Punch`] or [`HostOp::Write`].
    pub async fn write_zeroes(&self, range: ByteRange, hold: Hold) -> Result<(), HostError> {
        if range.is_empty() {
            return Ok(());
        }
        if self.try_zero_fast(range, hold.clone()).await? {
            return Ok(());
        }
        self.write_plain_zeros(range, &hold).await
    }

    /// As [`HostFile::write_zeroes`], but only if the host has a faster way than writing: otherwise `false`, and
    /// nothing changed. Where no whole block of 4 KiB lies inside, writing is the fast way.
    ///
    /// # Errors
    /// As [`HostFile::write_zeroes`].
    pub async fn try_zero_fast(&self, range: ByteRange, hold: Hold) -> Result<bool, HostError> {
        let inner = &self.inner;
        inner.check_change(HostOp::Punch, range)?;
        self.check_length(HostOp::Punch, range, u64::MAX).await?;
        if !self.has_fast_zeroes() {
            return Ok(false);
        }
        let (head, middle, tail) = inner.hole_parts(range);
        if !middle.is_empty() {
            let holes = self.holes_to_restore(middle).await?;
            let keep = inner.shared_keep(middle, &hold, Some(middle.end())).await;
            match inner.run(Op::ZeroRange { range: middle }, HostOp::Punch, keep).await {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::NoSpace => {
                    return Err(self.restore_holes(holes, error, &hold).await);
                }
                Err(error) if is_unsupported(&error.source) => {
                    inner.can_zero.store(false, Ordering::Relaxed);
                    return Ok(false);
                }
                Err(error) => return Err(error),
            }
        }
        self.write_plain_zeros(head, &hold).await?;
        self.write_plain_zeros(tail, &hold).await?;
        Ok(true)
    }

    /// What has to be punched again where zeroing `range` fails for want of room: it can take all of the room that there
    /// is before it does. (Space that was allocated and never written counts as a hole, too.)
    async fn holes_to_restore(&self, range: ByteRange) -> Result<Vec<ByteRange>, HostError> {
        if range.len() < RESTORED_BYTES || self.inner.facts.fixed_len {
            return Ok(Vec::new());
        }
        let inside = range.intersection(ByteRange::between(0, self.len()));
        Ok(gaps(inside, &self.data_ranges(inside).await?))
    }

    /// Punches what of `holes` nobody has written to meanwhile, and cuts off what lies behind the end. Gives the error
    /// back.
    async fn restore_holes(
        &self,
        holes: Vec<ByteRange>,
        error: HostError,
        hold: &Hold,
    ) -> HostError {
        let inner = &self.inner;
        for hole in holes {
            // Keeps writes out while it is found out what was written.
            let guard = Arc::new(inner.locks.lock_exclusive(hole).await);
            let Ok(data) = self.data_ranges(hole).await else { continue };
            for range in gaps(hole, &data) {
                let locks = Locks { guard: Some(Arc::clone(&guard)), resize: None };
                let keep = inner.keep(hold, &locks, 0, 0);
                if let Err(error) = inner.run(Op::Punch { range }, HostOp::Punch, keep).await {
                    tracing::warn!(%error, "what could not be zeroed whole stays allocated in part");
                }
            }
        }
        if error.range.end() <= inner.physical_len() {
            return error;
        }
        let resize = inner.lock_resize().await;
        inner.cut_back_unless_room(&resize, error).await
    }

    /// Whether [`HostFile::write_zeroes`] is, as far as is known, cheaper than writing.
    pub fn has_fast_zeroes(&self) -> bool {
        self.inner.can_zero.load(Ordering::Relaxed) && !self.is_read_only()
    }

    /// Whether [`HostFile::punch`] works, as far as is known.
    pub fn can_punch(&self) -> bool {
        self.inner.can_punch.load(Ordering::Relaxed) && !self.is_read_only()
    }

    /// Deallocates `range`, which then reads as zeros; the length stays. `false` if the host cannot: nothing changed.
    ///
    /// # Errors
    /// [`HostError`] with [`HostOp::Punch`], or with [`HostOp::Write`] for the parts of blocks at the edges.
    pub async fn punch(&self, range: ByteRange, hold: Hold) -> Result<bool, HostError> {
        let inner = &self.inner;
        inner.check_change(HostOp::Punch, range)?;
        self.check_length(HostOp::Punch, range, u64::MAX).await?;
        let range = range.intersection(ByteRange::between(0, self.len()));
        if range.is_empty() {
            return Ok(true);
        }
        if !self.can_punch() {
            return Ok(false);
        }
        let (head, middle, tail) = inner.hole_parts(range);
        if !middle.is_empty() {
            let keep = inner.shared_keep(middle, &hold, None).await;
            match inner.run(Op::Punch { range: middle }, HostOp::Punch, keep).await {
                Ok(_) => {}
                Err(error) if is_unsupported(&error.source) => {
                    inner.can_punch.store(false, Ordering::Relaxed);
                    return Ok(false);
                }
                Err(error) => return Err(error),
            }
        }
        self.write_plain_zeros(head, &hold).await?;
        self.write_plain_zeros(tail, &hold).await?;
        Ok(true)
    }

    async fn write_plain_zeros(&self, range: ByteRange, hold: &Hold) -> Result<(), HostError> {
        for piece in range.pieces(ZEROS_BYTES) {
            self.write(piece.start(), zeros(piece.len()), hold.clone()).await?;
        }
        Ok(())
    }

    /// Makes durable every write whose call had returned before this one began, and the lengths to find them.
    ///
    /// # Errors
    /// [`HostError`] with [`HostOp::Sync`]: nothing may be assumed durable since the last good one.
    pub async fn sync(&self) -> Result<(), HostError> {
        self.inner.run(Op::Sync, HostOp::Sync, Keep::default()).await.map(drop)
    }

    /// The parts of `range` that hold data, in order; what is left out reads as zeros. All of it (up to the end of
    /// the file) where the host cannot tell.
    ///
    /// # Errors
    /// [`HostError`] with [`HostOp::Stat`].
    pub async fn data_ranges(&self, range: ByteRange) -> Result<Vec<ByteRange>, HostError> {
        let mut found = Vec::new();
        let mut rest = range.intersection(ByteRange::between(0, self.len()));
        while !rest.is_empty() {
            let (more, end) = self.some_data_ranges(rest, MAP_RANGES).await?;
            found.extend(more);
            rest = ByteRange::between(end, rest.end());
        }
        Ok(found)
    }

    /// At most `max` data ranges, and up to where the answer holds.
    pub(crate) async fn some_data_ranges(
        &self,
        range: ByteRange,
        max: usize,
    ) -> Result<(Vec<ByteRange>, u64), HostError> {
        let mut found = self.data_from(range, max).await?;
        let is_all = found.len() < max;
        if let Some(last) = found.last_mut() {
            *last = last.intersection(range);
        }
        let end = found.last().filter(|_| !is_all).map_or(range.end(), |last| last.end());
        Ok((found, end))
    }

    /// At most `max` data ranges that begin in `range`, the last of them as far as it goes.
    pub(crate) async fn data_from(
        &self,
        range: ByteRange,
        max: usize,
    ) -> Result<Vec<ByteRange>, HostError> {
        let op = Op::Map { range, max };
        match self.inner.run(op, HostOp::Stat, Keep::default()).await {
            Ok(Outcome::Ranges(found)) => Ok(found),
            Ok(_) => Ok(vec![range]),
            Err(error) if is_unsupported(&error.source) => Ok(vec![range]),
            Err(error) => Err(error),
        }
    }
}

impl Inner {
    fn error(&self, op: HostOp, range: ByteRange, source: io::Error) -> HostError {
        HostError { path: self.path.clone(), op, range, source }
    }

    fn physical_len(&self) -> u64 {
        self.lengths.physical.load(Ordering::Acquire)
    }

    fn check_change(&self, op: HostOp, range: ByteRange) -> Result<(), HostError> {
        if self.facts.read_only {
            return Err(self.error(op, range, io::ErrorKind::ReadOnlyFilesystem.into()));
        }
        if self.facts.fixed_len && range.end() > self.lengths.logical.load(Ordering::Acquire) {
            return Err(self.error(op, range, io::ErrorKind::StorageFull.into()));
        }
        Ok(())
    }

    /// The blocks that cover `range`; refuses what no file can hold.
    fn widen(&self, range: ByteRange, op: HostOp) -> Result<ByteRange, HostError> {
        let wide = range.widen(self.facts.offset_align);
        if i64::try_from(wide.end()).is_err() || !wide.contains(range) {
            return Err(self.error(op, range, io::ErrorKind::FileTooLarge.into()));
        }
        Ok(wide)
    }

    fn memory_len(&self, range: ByteRange, op: HostOp) -> Result<usize, HostError> {
        usize::try_from(range.len())
            .map_err(|_| self.error(op, range, io::ErrorKind::OutOfMemory.into()))
    }

    fn is_memory_aligned(&self, data: &Bytes) -> bool {
        (data.as_ptr() as usize).is_multiple_of(self.facts.memory_align)
    }

    /// Cuts a range into what is written and what the host's own holes can cover.
    fn hole_parts(&self, range: ByteRange) -> (ByteRange, ByteRange, ByteRange) {
        let unit = HOLE_BYTES.max(self.facts.offset_align);
        let start = range.start().next_multiple_of(unit).min(range.end());
        let end = (range.end() - range.end() % unit).max(start);
        (
            ByteRange::between(range.start(), start),
            ByteRange::between(start, end),
            ByteRange::between(end, range.end()),
        )
    }

    fn keep(&self, hold: &Hold, locks: &Locks, logical: u64, physical: u64) -> Keep {
        Keep {
            hold: hold.clone(),
            guard: locks.guard.clone(),
            resize: locks.resize.clone(),
            effect: Some((Arc::clone(&self.lengths), Effect::Grows { logical, physical })),
            slot: None,
        }
    }

    async fn shared_keep(&self, range: ByteRange, hold: &Hold, grows_to: Option<u64>) -> Keep {
        let guard = Some(Arc::new(self.locks.lock_shared(range).await));
        let mut keep = self.keep(hold, &Locks { guard, resize: None }, 0, 0);
        keep.effect = grows_to
            .map(|end| (Arc::clone(&self.lengths), Effect::Grows { logical: end, physical: end }));
        keep
    }

    /// Hands an operation to the engine, once there is a slot for it, and waits for its end.
    async fn run(&self, op: Op, what: HostOp, keep: Keep) -> Result<Outcome, HostError> {
        let range = op.range();
        // A closed semaphore would only mean that nothing bounds the queue any more.
        let slot = Arc::clone(self.storage.slots()).acquire_owned().await.ok();
        let (request, answer) = Request::keeping(op, Keep { slot, ..keep });
        self.storage.submit(request);
        let result = answer.await.unwrap_or_else(|_| {
            Err(io::Error::new(io::ErrorKind::Interrupted, "the I/O engine has stopped"))
        });
        result.map_err(|source| self.error(what, range, source))
    }

    /// Reads whole blocks.
    async fn read_block(&self, block: ByteRange) -> Result<Buffer, HostError> {
        let buffer = self.pool.get_now(self.memory_len(block, HostOp::Read)?);
        let op = Op::Read { at: block.start(), buffer };
        match self.run(op, HostOp::Read, Keep::default()).await? {
            Outcome::Read(buffer) => Ok(buffer),
            _ => Err(self.error(HostOp::Read, block, io::ErrorKind::InvalidData.into())),
        }
    }
}

/// What of `range` lies between `data`, which is in order.
fn gaps(range: ByteRange, data: &[ByteRange]) -> Vec<ByteRange> {
    let ends = data.iter().map(|data| data.end());
    let starts = data.iter().map(|data| data.start());
    let begins = std::iter::once(range.start()).chain(ends);
    let gaps = begins.zip(starts.chain(std::iter::once(range.end())));
    gaps.map(|(start, end)| ByteRange::between(start, end)).filter(|gap| !gap.is_empty()).collect()
}

/// Whether the host says that it cannot do such a thing at all, in any of the ways in which it says so.
fn is_unsupported(error: &io::Error) -> bool {
    use rustix::io::Errno;
    error.kind() == io::ErrorKind::Unsupported
        || [Errno::OPNOTSUPP, Errno::NOSYS, Errno::NODEV, Errno::NOTTY]
            .iter()
            .any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

impl std::fmt::Debug for HostFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostFile")
            .field("path", &self.inner.path)
            .field("len", &self.len())
            .field("facts", &self.inner.facts)
            .finish_non_exhaustive()
    }
}
