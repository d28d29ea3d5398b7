//! A raw image or block device as a `BlockDevice`: guest bytes are host bytes. Alignment and bouncing are the host
//! file's business.

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::{OwnedRwLockReadGuard, RwLock};

use crate::stretches::Stretches;
use crate::unfinished::Unfinished;
use crate::{
    BlockDevice, ByteRange, DeviceError, Durability, Extent, HostFile, Limits, MAX_EXTENTS,
    OpenOptions, Segment, Segments, ZeroMode, try_join_all,
};

/// The largest piece, in bytes, of a read that is one operation on the host.
const READ_PIECE_BYTES: u64 = 1 << 20;
/// The least that a raw device likes to be asked for, in bytes.
const PREFERRED_BYTES: u32 = 4096;

/// A raw image file or a block device of the host. Its size is fixed when it is opened: where somebody else cuts the file,
/// what is not there any more is an error to read, not zeros.
#[derive(Debug)]
pub struct RawDevice {
    file: HostFile,
    limits: Limits,
    stretches: Stretches,
    /// Requests read it, closing writes it: so closing waits for what is in flight.
    open: Arc<RwLock<bool>>,
}

impl RawDevice {
    /// Opens an image, direct and locked.
    ///
    /// # Errors
    /// [`DeviceError::Host`].
    pub async fn open(path: &Path, read_only: bool) -> Result<Arc<Self>, DeviceError> {
        let options = OpenOptions { read_only, ..OpenOptions::writing() };
        Ok(Self::new(HostFile::open(path, options).await?))
    }

    /// Makes a new, sparse image of zeros; refuses to overwrite. Durable with its length, but not its directory entry.
    /// Where it fails, or the future is dropped while the image is made, nothing stays behind.
    ///
    /// # Errors
    /// [`DeviceError::Host`].
    pub async fn create(path: &Path, size_bytes: u64) -> Result<Arc<Self>, DeviceError> {
        let file = HostFile::open(path, OpenOptions::creating()).await?;
        let unfinished = Unfinished::new(path, file.id());
        file.set_len(size_bytes).await?;
        file.sync().await?;
        unfinished.keep();
        Ok(Self::new(file))
    }

    /// The device that an open file is.
    pub fn new(file: HostFile) -> Arc<Self> {
        let align = u32::try_from(file.alignment_bytes()).unwrap_or(PREFERRED_BYTES);
        let limits = Limits {
            size_bytes: file.len(),
            read_only: file.is_read_only(),
            preferred_bytes: PREFERRED_BYTES.max(align),
            can_discard: !file.is_read_only(),
            fast_zeroes: file.has_fast_zeroes(),
        };
        let (stretches, open) = (Stretches::default(), Arc::new(RwLock::new(true)));
        Arc::new(Self { file, limits, stretches, open })
    }

    /// The file underneath.
    pub fn file(&self) -> &HostFile {
        &self.file
    }

    /// Registers a request; the answer goes with its operations, so that closing waits for them even if the future
    /// that asked for them is dropped.
    async fn enter(&self) -> Result<Arc<OwnedRwLockReadGuard<bool>>, DeviceError> {
        let open = Arc::clone(&self.open).read_owned().await;
        if *open { Ok(Arc::new(open)) } else { Err(DeviceError::Closed) }
    }

    async fn settle(&self, durability: Durability) -> Result<(), DeviceError> {
        match durability {
            Durability::Deferred => Ok(()),
            Durability::Durable => Ok(self.file.sync().await?),
        }
    }
}

#[async_trait]
impl BlockDevice for RawDevice {
    fn limits(&self) -> Limits {
        self.limits
    }

    async fn read(&self, range: ByteRange) -> Result<Segments, DeviceError> {
        let _open = self.enter().await?;
        self.limits.check_read(range)?;
        let mut segments = Segments::default();
        let stretches = if !self.stretches.covers(range) {
            self.stretches.of(&self.file, range).await
        } else if range.len() <= READ_PIECE_BYTES {
            segments.push(Segment::Data(self.file.read(range).await?));
            return Ok(segments);
        } else {
            vec![range]
        };
        // Owned, so that the futures borrow nothing of a closure's argument.
        let pieces: Vec<_> =
            stretches.iter().flat_map(|one| one.pieces(READ_PIECE_BYTES)).collect();
        let reads = pieces.iter().map(|piece| {
            let (file, piece) = (self.file.clone(), *piece);
            async move { file.read(piece).await }
        });
        let read = try_join_all(reads).await?;
        let mut at = range.start();
        for (piece, bytes) in pieces.into_iter().zip(read) {
            segments.push(Segment::Zero(piece.start() - at));
            segments.push(Segment::Data(bytes));
            at = piece.end();
        }
        segments.push(Segment::Zero(range.end() - at));
        if at < range.end() {
            self.file.check_uncut(range).await?;
        }
        Ok(segments)
    }

    async fn write(
        &self,
        offset: u64,
        data: Bytes,
        durability: Durability,
    ) -> Result<(), DeviceError> {
        let open = self.enter().await?;
        let range = self.limits.write_range(offset, data.len())?;
        if range.is_empty() {
            return Ok(());
        }
        self.file.write(offset, data, Some(open)).await?;
        self.settle(durability).await
    }

    async fn write_zeroes(
        &self,
        range: ByteRange,
        mode: ZeroMode,
        durability: Durability,
    ) -> Result<(), DeviceError> {
        let open = self.enter().await?;
        self.limits.check_write(range)?;
        if range.is_empty() {
            return Ok(());
        }
        let slow = DeviceError::NotSupported { what: "zeroing faster than writing zeros" };
        let punched = !mode.keep_allocated && self.file.punch(range, Some(open.clone())).await?;
        if !punched {
            if mode.fast_only && !self.file.try_zero_fast(range, Some(open.clone())).await? {
                return Err(slow);
            }
            if !mode.fast_only {
                self.file.write_zeroes(range, Some(open)).await?;
            }
        }
        self.settle(durability).await
    }

    async fn discard(&self, range: ByteRange, durability: Durability) -> Result<(), DeviceError> {
        let open = self.enter().await?;
        self.limits.check_write(range)?;
        self.file.punch(range, Some(open)).await?;
        self.settle(durability).await
    }

    async fn flush(&self) -> Result<(), DeviceError> {
        let _open = self.enter().await?;
        if self.limits.read_only {
            return Ok(());
        }
        Ok(self.file.sync().await?)
    }

    async fn extents(&self, range: ByteRange) -> Result<Vec<Extent>, DeviceError> {
        let _open = self.enter().await?;
        self.limits.check_read(range)?;
        let (data, end) = self.file.some_data_ranges(range, MAX_EXTENTS / 2 - 1).await?;
        let mut extents = Vec::with_capacity(data.len() * 2 + 1);
        let mut at = range.start();
        for data in data {
            push_extent(&mut extents, ByteRange::between(at, data.start()), false);
            push_extent(&mut extents, data, true);
            at = data.end();
        }
        push_extent(&mut extents, ByteRange::between(at, end), false);
        if let Some(last) = extents.last().filter(|last| last.zero) {
            self.file.check_uncut(last.range).await?;
        }
        Ok(extents)
    }

    async fn close(&self) -> Result<(), DeviceError> {
        let mut open = self.open.write().await;
        if !std::mem::replace(&mut *open, false) || self.limits.read_only {
            return Ok(());
        }
        self.file.give_back().await?;
        Ok(self.file.sync().await?)
    }
}

/// Appends an extent; neighbours that are stored alike become one.
fn push_extent(extents: &mut Vec<Extent>, range: ByteRange, allocated: bool) {
    if range.is_empty() {
        return;
    }
    match extents.last_mut() {
        Some(last) if last.allocated == allocated => {
            last.range = ByteRange::between(last.range.start(), range.end());
        }
        _ => extents.push(Extent { range, allocated, zero: !allocated }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{LoggedOp, MemoryStorage, OpKind, is_zero};

    fn over(storage: &MemoryStorage) -> Arc<RawDevice> {
        let file = HostFile::from_storage("memory".as_ref(), storage.clone().into_dyn());
        RawDevice::new(file.expect("a host file"))
    }

    fn places(range: ByteRange) -> std::ops::Range<usize> {
        usize::try_from(range.start()).unwrap()..usize::try_from(range.end()).unwrap()
    }

    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange::between(start, end)
    }

    #[tokio::test]
    async fn a_durable_write_is_synced_before_it_returns() {
        let storage = MemoryStorage::from_bytes(vec![0; 8192], 512);
        let device = over(&storage);
        device.write(100, Bytes::from_static(b"now"), Durability::Durable).await.unwrap();
        assert_eq!(storage.log().last(), Some(&LoggedOp::Sync));
        let image = storage.crash_image(usize::MAX, |_| false).snapshot();
        assert_eq!(&image[100..103], b"now");
    }

    #[tokio::test]
    async fn zeroes_punch_or_stay_allocated_as_asked() {
        let storage = MemoryStorage::from_bytes(vec![7; 65_536], 512);
        let device = over(&storage);
        let keep = ZeroMode { keep_allocated: true, fast_only: false };
        let zeroed = range(4096, 8192);
        device.write_zeroes(zeroed, keep, Durability::Deferred).await.unwrap();
        assert_eq!(storage.log(), [LoggedOp::Zero { range: zeroed, grows: true }]);
        let unmap = ZeroMode::default();
        device.write_zeroes(range(10_000, 20_000), unmap, Durability::Deferred).await.unwrap();
        let punched = LoggedOp::Zero { range: range(12_288, 16_384), grows: false };
        assert!(storage.log().contains(&punched));
        let bytes = storage.snapshot();
        assert!(is_zero(&bytes[10_000..20_000]) && bytes[9_999] == 7 && bytes[20_000] == 7);
    }

    #[tokio::test]
    async fn fast_zeroes_are_refused_where_they_would_be_slow() {
        let storage = MemoryStorage::from_bytes(vec![7; 65_536], 512);
        storage.without_fallocate();
        let device = over(&storage);
        let mode = ZeroMode { keep_allocated: false, fast_only: true };
        let error = device.write_zeroes(range(0, 65_536), mode, Durability::Deferred).await;
        assert!(matches!(error, Err(DeviceError::NotSupported { .. })));
        assert_eq!(storage.snapshot(), vec![7; 65_536], "nothing changed");
        let mode = ZeroMode { fast_only: false, ..mode };
        device.write_zeroes(range(1, 65_536), mode, Durability::Deferred).await.unwrap();
        assert!(is_zero(&storage.snapshot()[1..]));
    }

    #[tokio::test]
    async fn extents_follow_the_holes_of_the_file() {
        let storage = MemoryStorage::with_alignment(512);
        let file = HostFile::from_storage("memory".as_ref(), storage.into_dyn()).unwrap();
        file.set_len(100_000).await.unwrap();
        let device = RawDevice::new(file);
        device.write(40_960, Bytes::from(vec![1; 4096]), Durability::Deferred).await.unwrap();
        let extents = device.extents(range(1000, 100_000)).await.unwrap();
        let found: Vec<_> =
            extents.iter().map(|e| (e.range.start(), e.range.end(), e.allocated, e.zero)).collect();
        let expected = [
            (1000, 40_960, false, true),
            (40_960, 45_056, true, false),
            (45_056, 100_000, false, true),
        ];
        assert_eq!(found, expected);
    }

    #[tokio::test]
    async fn long_reads_arrive_whole_and_in_order() {
        let bytes: Vec<u8> = (0..5_000_000_u32).map(|n| n.to_le_bytes()[n as usize % 3]).collect();
        let storage = MemoryStorage::from_bytes(bytes.clone(), 512);
        let device = over(&storage);
        let read = device.read(range(3, 4_999_999)).await.unwrap();
        assert!(read.to_vec() == bytes[3..4_999_999]);
    }

    #[tokio::test]
    async fn an_image_that_cannot_be_made_leaves_nothing_and_takes_nothing_away() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let too_long = u64::MAX;
        RawDevice::create(&path, too_long).await.expect_err("no file is that long");
        assert!(!path.exists());
        std::fs::write(&path, "somebody's").unwrap();
        RawDevice::create(&path, too_long).await.expect_err("it is there");
        assert_eq!(std::fs::read(&path).unwrap(), b"somebody's");
        std::fs::remove_file(&path).unwrap();
        RawDevice::create(&path, 4096).await.unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 4096);
    }

    #[test]
    fn what_has_taken_the_name_of_an_unfinished_file_keeps_it() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("image"), dir.path().join("other"));
        std::fs::write(&path, "ours").unwrap();
        let made = std::fs::metadata(&path).map(|ours| (ours.dev(), ours.ino())).ok();
        let unfinished = Unfinished::new(&path, made);
        std::fs::write(&other, "theirs").unwrap();
        std::fs::rename(&other, &path).unwrap();
        drop(unfinished);
        assert_eq!(std::fs::read(&path).unwrap(), b"theirs");
    }

    #[tokio::test]
    async fn long_reads_tell_long_holes_and_short_ones_read_them() {
        let storage = MemoryStorage::with_alignment(512);
        let file = HostFile::from_storage("memory".as_ref(), storage.into_dyn()).unwrap();
        file.set_len(8 << 20).await.unwrap();
        let device = RawDevice::new(file);
        for (at, len) in [(1 << 20, 70_144), (3 << 20, 3 << 20)] {
            device.write(at, Bytes::from(vec![7; len]), Durability::Deferred).await.unwrap();
        }
        let told = |read: &Segments| -> Vec<(bool, u64)> {
            read.0.iter().map(|one| (matches!(one, Segment::Data(_)), one.len())).collect()
        };
        let read = device.read(range(0, 8 << 20)).await.unwrap();
        let hole = (2 << 20) - 70_144;
        let first = [(false, 1 << 20), (true, 70_144), (false, hole)];
        let rest = [(true, 1 << 20), (true, 1 << 20), (true, 1 << 20), (false, 2 << 20)];
        assert_eq!(told(&read), [&first[..], &rest].concat());
        let mut expected = vec![0; 8 << 20];
        for (at, len) in [(1 << 20, 70_144), (3 << 20, 3 << 20)] {
            expected[at..at + len].fill(7);
        }
        assert!(read.to_vec() == expected);
        assert_eq!(told(&device.read(range(0, 65_536)).await.unwrap()), [(false, 65_536)]);
        assert_eq!(told(&device.read(range(0, 65_535)).await.unwrap()), [(true, 65_535)]);
        // What was known as data and is a hole by now reads as zeros all the same.
        device.discard(range(3 << 20, 4 << 20), Durability::Deferred).await.unwrap();
        assert!(crate::is_zero(&device.read(range(3 << 20, 4 << 20)).await.unwrap().to_vec()));
        // And what was known as a hole and is data by now is read.
        device.write(0, Bytes::from(vec![9; 65_536]), Durability::Deferred).await.unwrap();
        assert_eq!(device.read(range(0, 65_536)).await.unwrap().to_vec(), [9; 65_536]);
    }

    #[tokio::test]
    async fn limits_are_kept() {
        let storage = MemoryStorage::from_bytes(vec![0; 1000], 1);
        let device = over(&storage);
        let write = device.write(999, Bytes::from_static(b"xy"), Durability::Deferred).await;
        assert!(matches!(write, Err(DeviceError::WritePastEnd { .. })));
        assert!(matches!(device.read(range(0, 1001)).await, Err(DeviceError::PastEnd { .. })));
        assert!(storage.log().is_empty());
    }

    #[tokio::test]
    async fn closing_waits_for_dropped_writes_flushes_and_then_refuses() {
        let storage = MemoryStorage::from_bytes(vec![0; 4096], 512);
        let device = over(&storage);
        let held = storage.hold(|op| op.kind == OpKind::Write);
        let writing = tokio::spawn({
            let device = Arc::clone(&device);
            async move { device.write(0, Bytes::from(vec![1; 512]), Durability::Deferred).await }
        });
        while held.count() == 0 {
            tokio::task::yield_now().await;
        }
        writing.abort();
        assert!(writing.await.is_err_and(|error| error.is_cancelled()));
        let closing = tokio::spawn({
            let device = Arc::clone(&device);
            async move { device.close().await }
        });
        tokio::task::yield_now().await;
        assert!(!closing.is_finished(), "a write is in flight");
        drop(held);
        closing.await.unwrap().unwrap();
        assert_eq!(storage.log().last(), Some(&LoggedOp::Sync));
        assert!(matches!(device.flush().await, Err(DeviceError::Closed)));
        assert!(matches!(device.read(range(0, 1)).await, Err(DeviceError::Closed)));
        device.close().await.unwrap();
    }

    #[tokio::test]
    async fn what_somebody_else_cut_off_is_an_error_and_no_zeros() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.raw");
        let mut content = vec![7; 4 << 20];
        // Zeros and holes that are there are read, and what ends before the end now, too.
        content[1 << 20..2 << 20].fill(0);
        std::fs::write(&path, &content).unwrap();
        let options = OpenOptions { lock: false, ..OpenOptions::writing() };
        let device = RawDevice::new(HostFile::open(&path, options).await.unwrap());
        device.discard(range(1 << 20, 2 << 20), Durability::Deferred).await.unwrap();
        let end = (3 << 20) + 100;
        let ranges = [
            range(0, 2 << 20),
            range(end - 10, end),
            range((1 << 20) + 5, (1 << 20) + 6),
            range(0, end),
        ];
        let cut = [
            range(end, end + 1),
            range(end - 10, end + 10),
            range(end - 100_000, end + 1),
            range(0, 4 << 20),
            range((4 << 20) - 1, 4 << 20),
            range(2 << 20, 4 << 20),
        ];
        for range in ranges.into_iter().chain(cut) {
            let read = device.read(range).await.unwrap().to_vec();
            assert!(read == content[places(range)], "{range}");
        }
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(end).unwrap();
        for range in ranges {
            let read = device.read(range).await.unwrap().to_vec();
            assert!(read == content[places(range)], "{range}");
            assert!(device.extents(range).await.is_ok());
        }
        // A change behind the cut would make zeros of what is missing.
        let past = (4 << 20) - 4096;
        let zeroes = [ZeroMode::default(), ZeroMode { keep_allocated: true, fast_only: false }];
        let changes = [
            device.write(past, Bytes::from(vec![1; 4096]), Durability::Deferred).await,
            device.write(5, Bytes::from_static(b"x"), Durability::Deferred).await,
            device.write_zeroes(range(past, 4 << 20), zeroes[0], Durability::Deferred).await,
            device.write_zeroes(range(past, 4 << 20), zeroes[1], Durability::Deferred).await,
            device.discard(range(0, 4096), Durability::Deferred).await,
        ];
        for changed in changes {
            assert!(changed.unwrap_err().to_string().contains("somebody else has cut the file"));
        }
        assert_eq!(device.file().host_len().unwrap(), end);
        for range in cut {
            let failed = [device.read(range).await.err(), device.extents(range).await.err()];
            for error in failed.into_iter().map(Option::unwrap) {
                assert_eq!(error.kind(), crate::ErrorKind::Io);
                let text = error.to_string();
                let wanted = format!("somebody else has cut the file from 4194304 bytes to {end}");
                assert!(text.contains("disk.raw") && text.contains(&wanted), "{text}");
            }
        }
        // Whole again, it goes on.
        std::fs::write(&path, &content).unwrap();
        device.write(past, Bytes::from(vec![1; 4096]), Durability::Deferred).await.unwrap();
        assert!(
            device.read(range(0, past)).await.unwrap().to_vec()
                == content[..places(range(0, past)).end]
        );
    }
}
