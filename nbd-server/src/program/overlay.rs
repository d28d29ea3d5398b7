//! A disk whose writes go to a file of its own, over another device or over nothing. The file has no name and is gone with
//! the disk; nothing of it is meant to last.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use block::{
    BlockDevice, ByteRange, DeviceError, Durability, ErrorKind, Extent, Limits, RawDevice, Segment,
    Segments, ZeroMode,
};
use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use tokio::sync::{Mutex as AsyncMutex, OnceCell};

use super::taken::{Room, Taken};

/// The unit, in bytes, in which a write takes a part of the disk over.
const BLOCK_BYTES: u64 = 4096;
/// A disk over another one.
pub(super) struct Overlay {
    base: Option<Arc<dyn BlockDevice>>,
    limits: Limits,
    folder: PathBuf,
    /// Made by the first write.
    file: OnceCell<Arc<RawDevice>>,
    taken: Mutex<Taken>,
    /// Held by whoever takes blocks over.
    writing: AsyncMutex<()>,
}

impl Overlay {
    /// Over `base`; files are made in `folder`.
    pub(super) fn over(base: Arc<dyn BlockDevice>, folder: &Path) -> Arc<Self> {
        let limits = base.limits();
        Self::new(Some(base), limits, folder, Room::new(Room::PARTS))
    }

    /// Over zeros.
    pub(super) fn empty(size_bytes: u64, folder: &Path) -> Arc<Self> {
        let preferred_bytes = 4096;
        let limits = Limits {
            size_bytes,
            read_only: false,
            preferred_bytes,
            can_discard: false,
            fast_zeroes: false,
        };
        Self::new(None, limits, folder, Room::new(Room::PARTS))
    }

    fn new(
        base: Option<Arc<dyn BlockDevice>>,
        limits: Limits,
        folder: &Path,
        room: Arc<Room>,
    ) -> Arc<Self> {
        Arc::new(Self {
            base,
            limits: Limits { read_only: false, can_discard: false, ..limits },
            folder: folder.to_owned(),
            file: OnceCell::new(),
            taken: Mutex::new(Taken::new(room)),
            writing: AsyncMutex::default(),
        })
    }

    /// Another one over the same, with nothing written. All of them share the memory for knowing what was.
    pub(super) fn fresh(&self) -> Arc<Self> {
        let room = Arc::clone(self.taken.lock().room());
        Self::new(self.base.clone(), self.limits, &self.folder, room)
    }

    /// The file, made and without a name.
    async fn file(&self) -> Result<&Arc<RawDevice>, DeviceError> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let make = || async {
            let number = NUMBER.fetch_add(1, Ordering::Relaxed);
            let name = format!(".nbd-server-{}-{number}", std::process::id());
            let path = self.folder.join(name);
            let blocks = self.limits.size_bytes.div_ceil(BLOCK_BYTES);
            let file = RawDevice::create(&path, blocks * BLOCK_BYTES).await?;
            // Where its name cannot be taken away, somebody else has done that.
            let _ = std::fs::remove_file(&path);
            Ok(file)
        };
        self.file.get_or_try_init(make).await
    }

    /// What lies below.
    async fn below(&self, range: ByteRange) -> Result<Segments, DeviceError> {
        match &self.base {
            Some(base) => base.read(range).await,
            None => Ok(Segments(vec![Segment::Zero(range.len())])),
        }
    }

    /// What a block holds, padded with zeros behind the end of the disk.
    async fn block(&self, block: u64) -> Result<Vec<u8>, DeviceError> {
        let start = block * BLOCK_BYTES;
        let end = (start + BLOCK_BYTES).min(self.limits.size_bytes);
        let mut bytes = self.read(ByteRange::between(start, end)).await?.to_vec();
        bytes.resize(usize::try_from(BLOCK_BYTES).unwrap_or(bytes.len()), 0);
        Ok(bytes)
    }

    /// Writes `data`, together with what surrounds it in its blocks, to the file.
    async fn take(&self, range: ByteRange, data: &[u8]) -> Result<(), DeviceError> {
        let wide = range.widen(BLOCK_BYTES);
        self.prepare(wide)?;
        let mut bytes = BytesMut::with_capacity(data.len() + 8192);
        let within = |bytes: &[u8], until: u64| {
            let len = usize::try_from(until % BLOCK_BYTES).unwrap_or(0);
            bytes.get(..len).unwrap_or_default().to_vec()
        };
        if wide.start() != range.start() {
            let head = self.block(wide.start() / BLOCK_BYTES).await?;
            bytes.extend_from_slice(&within(&head, range.start()));
        }
        bytes.extend_from_slice(data);
        if wide.end() != range.end() {
            let tail = self.block(wide.end() / BLOCK_BYTES - 1).await?;
            let kept = within(&tail, range.end()).len();
            bytes.extend_from_slice(tail.get(kept..).unwrap_or_default());
        }
        self.file().await?.write(wide.start(), bytes.freeze(), Durability::Deferred).await?;
        self.mark(wide);
        Ok(())
    }

    /// Sees to it that it can be known that `wide` was written.
    fn prepare(&self, wide: ByteRange) -> Result<(), DeviceError> {
        let prepared = self.taken.lock().prepare(&blocks(wide));
        prepared.map_err(|source| DeviceError::Backend {
            kind: ErrorKind::NoSpace,
            source: Box::new(source),
        })
    }

    fn mark(&self, wide: ByteRange) {
        self.taken.lock().add(blocks(wide));
    }

    /// The longest part of `range`, from its beginning, that is all taken or all not, and which.
    fn run(&self, range: ByteRange) -> (ByteRange, bool) {
        let (end, taken) = self.taken.lock().run(blocks(range));
        let end = end.saturating_mul(BLOCK_BYTES).min(range.end());
        (ByteRange::between(range.start(), end), taken)
    }
}

/// The blocks that `range` touches.
fn blocks(range: ByteRange) -> Range<u64> {
    range.start() / BLOCK_BYTES..range.end().div_ceil(BLOCK_BYTES)
}

#[async_trait]
impl BlockDevice for Overlay {
    fn limits(&self) -> Limits {
        self.limits
    }

    async fn read(&self, range: ByteRange) -> Result<Segments, DeviceError> {
        self.limits.check_read(range)?;
        let (mut segments, mut at) = (Segments::default(), range.start());
        while at < range.end() {
            let (run, taken) = self.run(ByteRange::between(at, range.end()));
            segments.extend(match taken {
                true => self.file().await?.read(run).await?,
                false => self.below(run).await?,
            });
            at = run.end();
        }
        Ok(segments)
    }

    async fn write(&self, offset: u64, data: Bytes, _: Durability) -> Result<(), DeviceError> {
        let range = self.limits.write_range(offset, data.len())?;
        if range.is_empty() {
            return Ok(());
        }
        let _alone = self.writing.lock().await;
        self.take(range, &data).await
    }

    async fn write_zeroes(
        &self,
        range: ByteRange,
        mode: ZeroMode,
        _: Durability,
    ) -> Result<(), DeviceError> {
        self.limits.check_write(range)?;
        let _alone = self.writing.lock().await;
        let start = range.start().next_multiple_of(BLOCK_BYTES).min(range.end());
        let end = (range.end() / BLOCK_BYTES * BLOCK_BYTES).max(start);
        let whole = ByteRange::between(start, end);
        // First, because where it would be slow, nothing is to be changed.
        if !whole.is_empty() {
            self.prepare(whole)?;
            self.file().await?.write_zeroes(whole, mode, Durability::Deferred).await?;
            self.mark(whole);
        }
        let zeros = [0; 4096];
        for edge in [(range.start(), start), (end, range.end())] {
            let edge = ByteRange::between(edge.0, edge.1);
            if !edge.is_empty() {
                let len = usize::try_from(edge.len()).unwrap_or(0);
                self.take(edge, zeros.get(..len).unwrap_or_default()).await?;
            }
        }
        Ok(())
    }

    async fn discard(&self, range: ByteRange, _: Durability) -> Result<(), DeviceError> {
        self.limits.check_write(range)
    }

    async fn flush(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    async fn extents(&self, range: ByteRange) -> Result<Vec<Extent>, DeviceError> {
        self.limits.check_read(range)?;
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let (run, taken) = self.run(range);
        match (taken, &self.base) {
            (true, _) => self.file().await?.extents(run).await,
            (false, Some(base)) => base.extents(run).await,
            (false, None) => Ok(vec![Extent { range: run, allocated: false, zero: true }]),
        }
    }

    async fn close(&self) -> Result<(), DeviceError> {
        match self.file.get() {
            Some(file) => file.close().await,
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::MemoryDevice;
    use proptest::prelude::*;

    const SIZE: u64 = 50_001;

    #[derive(Clone, Debug)]
    enum Change {
        Write(u64, u64, u8),
        Zero(u64, u64),
    }

    fn any_change() -> impl Strategy<Value = Change> {
        let at = (0..SIZE, 0..20_000_u64);
        prop_oneof![
            (at.clone(), 1_u8..).prop_map(|((at, len), byte)| Change::Write(
                at,
                len.min(SIZE - at),
                byte
            )),
            at.prop_map(|(at, len)| Change::Zero(at, len.min(SIZE - at))),
        ]
    }

    async fn imitate(base: Option<Arc<dyn BlockDevice>>, mut model: Vec<u8>, changes: Vec<Change>) {
        let dir = tempfile::tempdir().unwrap();
        let before = model.clone();
        let overlay = match &base {
            Some(base) => Overlay::over(Arc::clone(base), dir.path()),
            None => Overlay::empty(SIZE, dir.path()),
        };
        let place =
            |at: u64, len: u64| usize::try_from(at).unwrap()..usize::try_from(at + len).unwrap();
        for change in changes {
            match change {
                Change::Write(at, len, byte) => {
                    let data = vec![byte; usize::try_from(len).unwrap()];
                    model[place(at, len)].copy_from_slice(&data);
                    overlay.write(at, data.into(), Durability::Deferred).await.unwrap();
                }
                Change::Zero(at, len) => {
                    model[place(at, len)].fill(0);
                    let (range, mode) = (ByteRange::new(at, len).unwrap(), ZeroMode::default());
                    overlay.write_zeroes(range, mode, Durability::Deferred).await.unwrap();
                }
            }
        }
        let all = ByteRange::between(0, SIZE);
        assert!(overlay.read(all).await.unwrap().to_vec() == model);
        let mut at = 0;
        while at < SIZE {
            let extents = overlay.extents(ByteRange::between(at, SIZE)).await.unwrap();
            for extent in extents.iter().filter(|extent| extent.zero) {
                assert!(
                    model[place(extent.range.start(), extent.range.len())]
                        .iter()
                        .all(|byte| *byte == 0)
                );
            }
            assert_eq!(extents[0].range.start(), at);
            at = extents.last().unwrap().range.end();
        }
        assert!(overlay.fresh().read(all).await.unwrap().to_vec() == before);
        if let Some(base) = base {
            assert!(base.read(all).await.unwrap().to_vec() == before, "the base is as it was");
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing has a name");
    }

    #[tokio::test]
    async fn a_disk_of_terabytes_is_zeroed_and_asked_about_as_a_whole() {
        let dir = tempfile::tempdir().unwrap();
        let all = ByteRange::between(0, 8 << 40);
        let overlay = Overlay::empty(all.end(), dir.path());
        let untaken = overlay.extents(all).await.unwrap();
        assert_eq!(untaken, [Extent { range: all, allocated: false, zero: true }]);
        let inner = ByteRange::between(1, all.end() - 1);
        overlay.write_zeroes(inner, ZeroMode::default(), Durability::Deferred).await.unwrap();
        assert_eq!(overlay.run(all), (all, true));
        overlay.write(5 << 40, vec![7; 512].into(), Durability::Deferred).await.unwrap();
        let read = overlay.read(ByteRange::between((5 << 40) - 1, (5 << 40) + 1)).await.unwrap();
        assert_eq!(read.to_vec(), [0, 7]);
    }

    #[tokio::test]
    async fn a_write_that_cannot_be_remembered_finds_no_space_and_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let limits = Overlay::empty(1 << 40, dir.path()).limits;
        let overlay = Overlay::new(None, limits, dir.path(), Room::new(8)).fresh();
        let write = |gib: u64| {
            overlay.write(gib << 30, Bytes::from_static(&[7; 4096]), Durability::Deferred)
        };
        write(0).await.unwrap();
        let mut gib = 1;
        let error = loop {
            match write(gib).await {
                Ok(()) => gib += 1,
                Err(error) => break error,
            }
            assert!(gib < 8, "it takes more than there is room for");
        };
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        let place = ByteRange::between(gib << 30, (gib << 30) + 4096);
        assert_eq!(overlay.read(place).await.unwrap().to_vec(), [0; 4096]);
        let zeroed = overlay.write_zeroes(place, ZeroMode::default(), Durability::Deferred).await;
        assert_eq!(zeroed.unwrap_err().kind(), ErrorKind::NoSpace);
        write(0).await.unwrap();
    }

    /// The bytes that the one file without a name in `folder` takes on the disk.
    fn provisioned(folder: &Path) -> u64 {
        use std::os::unix::fs::MetadataExt;
        let open = std::fs::read_dir("/proc/self/fd").unwrap();
        let ours = open
            .map(|fd| fd.unwrap().path())
            .find(|fd| std::fs::read_link(fd).is_ok_and(|path| path.starts_with(folder)));
        std::fs::metadata(ours.unwrap()).unwrap().blocks() * 512
    }

    #[tokio::test]
    async fn zeroes_without_a_hole_are_provisioned_over_a_base_and_over_nothing() {
        let (size, range) = (4 << 20, ByteRange::between(5, (3 << 20) + 7));
        let base = MemoryDevice::read_only(vec![7; 4 << 20]);
        for overlay_over in [Some(base as Arc<dyn BlockDevice>), None] {
            let dir = tempfile::tempdir().unwrap();
            let overlay = match overlay_over {
                Some(base) => Overlay::over(base, dir.path()),
                None => Overlay::empty(size, dir.path()),
            };
            for (keep_allocated, least) in [(false, 0), (true, range.len())] {
                let mode = ZeroMode { keep_allocated, fast_only: false };
                overlay.write_zeroes(range, mode, Durability::Deferred).await.unwrap();
                let read = overlay.read(range).await.unwrap().to_vec();
                assert!(read.iter().all(|byte| *byte == 0));
                let provisioned = provisioned(dir.path());
                assert!(provisioned >= least, "{provisioned}");
                assert_eq!(provisioned < 1 << 20, !keep_allocated, "{provisioned}");
            }
        }
    }

    #[tokio::test]
    async fn fast_zeroes_are_given_where_the_host_has_them_and_else_change_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let overlay = Overlay::over(MemoryDevice::read_only(vec![7; 1 << 20]), dir.path());
        let range = ByteRange::between(5, (1 << 20) - 5);
        let mode = ZeroMode { keep_allocated: false, fast_only: true };
        let expected = match overlay.write_zeroes(range, mode, Durability::Deferred).await {
            Ok(()) => 0,
            Err(error) => {
                assert!(matches!(error, DeviceError::NotSupported { .. }));
                7
            }
        };
        let punches = overlay.file().await.unwrap().limits().can_discard;
        assert_eq!(expected == 0, punches);
        let read = overlay.read(range).await.unwrap().to_vec();
        assert!(read.iter().all(|byte| *byte == expected));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn it_reads_like_a_vector_and_leaves_its_base_alone(
            changes in proptest::collection::vec(any_change(), 0..12),
            is_empty in any::<bool>(),
        ) {
            let len = usize::try_from(SIZE).unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let (base, model): (Option<Arc<dyn BlockDevice>>, _) = if is_empty {
                (None, vec![0; len])
            } else {
                let bytes: Vec<u8> = (0..=255).cycle().take(len).collect();
                (Some(MemoryDevice::read_only(bytes.clone())), bytes)
            };
            runtime.block_on(imitate(base, model, changes));
        }
    }
}
