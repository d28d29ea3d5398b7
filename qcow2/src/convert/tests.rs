use async_trait::async_trait;
use block::{Extent, Limits, MemoryDevice};
use bytes::Bytes;
use parking_lot::Mutex;

use super::*;
use crate::units::index;

const SIZE: u64 = 9 << 20;

/// A disk in memory that notes what is asked of it, and fails where it is told to.
struct Odd {
    disk: Arc<MemoryDevice>,
    bad: Vec<ByteRange>,
    no_extents: bool,
    read: Mutex<Vec<ByteRange>>,
    changed: Mutex<Vec<(ByteRange, Option<ZeroMode>)>>,
}

impl Odd {
    fn new(disk: Arc<MemoryDevice>) -> Self {
        let (read, changed) = (Mutex::default(), Mutex::default());
        Self { disk, bad: Vec::new(), no_extents: false, read, changed }
    }
}

fn failure() -> DeviceError {
    DeviceError::NotSupported { what: "a bad block" }
}

#[async_trait]
impl BlockDevice for Odd {
    fn limits(&self) -> Limits {
        self.disk.limits()
    }

    async fn read(&self, range: ByteRange) -> Result<Segments, DeviceError> {
        if self.bad.iter().any(|bad| bad.overlaps(range)) {
            return Err(failure());
        }
        self.read.lock().push(range);
        // Those behind are ready first.
        for _ in 0..(SIZE - range.start()) >> 20 {
            tokio::task::yield_now().await;
        }
        self.disk.read(range).await
    }

    async fn write(&self, at: u64, data: Bytes, how: Durability) -> Result<(), DeviceError> {
        let range = ByteRange::between(at, at + data.len() as u64);
        self.changed.lock().push((range, None));
        self.disk.write(at, data, how).await
    }

    async fn write_zeroes(
        &self,
        range: ByteRange,
        mode: ZeroMode,
        how: Durability,
    ) -> Result<(), DeviceError> {
        self.changed.lock().push((range, Some(mode)));
        self.disk.write_zeroes(range, mode, how).await
    }

    async fn discard(&self, range: ByteRange, how: Durability) -> Result<(), DeviceError> {
        self.disk.discard(range, how).await
    }

    async fn flush(&self) -> Result<(), DeviceError> {
        self.changed.lock().push((ByteRange::between(0, 0), None));
        self.disk.flush().await
    }

    async fn extents(&self, range: ByteRange) -> Result<Vec<Extent>, DeviceError> {
        if self.no_extents { Err(failure()) } else { self.disk.extents(range).await }
    }

    async fn close(&self) -> Result<(), DeviceError> {
        self.disk.close().await
    }
}

/// Data, a long hole, data with zeros in between, and a tail of zeros.
fn content() -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(SIZE).expect("small")];
    bytes[..3 << 20].fill(1);
    bytes[6 << 20..(6 << 20) + 5000].fill(2);
    bytes[(6 << 20) + 20_000] = 3;
    bytes[(8 << 20) - 1] = 4;
    bytes
}

async fn copy(source: &Arc<Odd>, target: &Arc<Odd>, options: &ConvertOptions) -> Converted {
    let to = ConvertTarget::Device(Arc::clone(target) as _);
    convert(Arc::clone(source) as _, &to, options, |_| ()).await.expect("a copy")
}

fn odd(bytes: Vec<u8>) -> Arc<Odd> {
    Arc::new(Odd::new(MemoryDevice::from_bytes(bytes)))
}

#[tokio::test]
async fn zeros_are_neither_read_nor_written_where_both_sides_know_them() {
    let (source, target) = (odd(content()), odd(vec![0; content().len() + 100]));
    let done = copy(&source, &target, &ConvertOptions::default()).await;
    assert_eq!(target.disk.to_vec()[..content().len()], content());
    let read: u64 = source.read.lock().iter().map(|range| range.len()).sum();
    assert!(read < 4 << 20, "{read}");
    assert_eq!(done.written_bytes, (3 << 20) + 8192 + 4096 + 4096);
    assert_eq!(done.zeroed_bytes, 0);
    assert_eq!(done.skipped_bytes, SIZE - done.written_bytes);
    assert!(target.changed.lock().last().expect("a flush").0.is_empty());
}

#[tokio::test]
async fn a_target_that_is_not_zero_is_zeroed_where_the_source_is() {
    for in_order in [true, false] {
        let (source, target) = (odd(content()), odd(vec![9; content().len()]));
        let options = ConvertOptions { in_order, requests: 3, ..ConvertOptions::default() };
        let done = copy(&source, &target, &options).await;
        assert_eq!(target.disk.to_vec(), content());
        assert_eq!((done.skipped_bytes, done.zeroed_bytes + done.written_bytes), (0, SIZE));
    }
}

#[tokio::test]
async fn a_caller_that_knows_the_target_to_be_zero_is_believed() {
    let (source, target) = (odd(content()), odd(vec![9; content().len()]));
    let options = ConvertOptions { target_is_zero: true, ..ConvertOptions::default() };
    let done = copy(&source, &target, &options).await;
    assert!(done.skipped_bytes > 0);
    assert_eq!(target.disk.to_vec()[4 << 20], 9);
}

#[tokio::test]
async fn without_sparseness_everything_is_allocated() {
    let (source, target) = (odd(content()), odd(vec![0; content().len()]));
    let options = ConvertOptions { sparse_bytes: 0, ..ConvertOptions::default() };
    let done = copy(&source, &target, &options).await;
    assert_eq!(target.disk.to_vec(), content());
    assert_eq!((done.skipped_bytes, done.written_bytes + done.zeroed_bytes), (0, SIZE));
    let changed = target.changed.lock();
    assert!(changed.iter().filter_map(|(_, mode)| *mode).all(|mode| mode.keep_allocated));
}

#[tokio::test]
async fn writes_begin_in_the_order_of_the_disk_however_reads_end() {
    let bytes: Vec<u8> = vec![7; usize::try_from(SIZE).expect("small")];
    for in_order in [true, false] {
        let (source, target) = (odd(bytes.clone()), odd(vec![0; bytes.len()]));
        let options = ConvertOptions { in_order, ..ConvertOptions::default() };
        copy(&source, &target, &options).await;
        assert_eq!(target.disk.to_vec(), bytes);
        let mut begun: Vec<_> =
            target.changed.lock().iter().map(|(range, _)| range.start()).collect();
        begun.pop();
        assert_eq!(begun.is_sorted(), in_order, "{begun:?}");
    }
}

#[tokio::test]
async fn salvaging_loses_sectors_that_are_bad_and_no_more() {
    let bytes: Vec<u8> = (0..SIZE).map(|at| u8::try_from(at % 251).expect("small") | 1).collect();
    let bad = vec![ByteRange::between(1000, 1001), ByteRange::between(5_000_000, 5_001_000)];
    let source = Odd { bad, ..Odd::new(MemoryDevice::from_bytes(bytes.clone())) };
    let (source, target) = (Arc::new(source), odd(vec![0; bytes.len()]));
    let to = ConvertTarget::Device(Arc::clone(&target) as _);
    let strict = ConvertOptions::default();
    let error = convert(Arc::clone(&source) as _, &to, &strict, |_| ()).await;
    assert!(matches!(error, Err(ConvertError::Read { .. })), "{error:?}");

    let options = ConvertOptions { salvage: true, ..ConvertOptions::default() };
    let done = copy(&source, &target, &options).await;
    let lost = [ByteRange::between(512, 1024), ByteRange::between(4_999_680, 5_001_216)];
    assert_eq!(done.unreadable, lost);
    assert_eq!(done.unreadable_bytes, 2048);
    let mut expected = bytes;
    for range in lost {
        expected[index(range.start())..index(range.end())].fill(0);
    }
    assert!(target.disk.to_vec() == expected);
}

#[tokio::test]
async fn extents_that_fail_are_an_error_or_salvaged_by_reading() {
    let source = Odd { no_extents: true, ..Odd::new(MemoryDevice::from_bytes(content())) };
    let (source, target) = (Arc::new(source), odd(vec![0; content().len()]));
    let to = ConvertTarget::Device(Arc::clone(&target) as _);
    let error = convert(Arc::clone(&source) as _, &to, &ConvertOptions::default(), |_| ()).await;
    assert!(matches!(error, Err(ConvertError::Extents { .. })), "{error:?}");
    let options = ConvertOptions { salvage: true, ..ConvertOptions::default() };
    let done = copy(&source, &target, &options).await;
    assert_eq!(target.disk.to_vec(), content());
    assert_eq!(done.unreadable_bytes, 0);
}

#[tokio::test]
async fn a_target_that_is_too_small_or_fails_is_an_error() {
    let source: Arc<dyn BlockDevice> = MemoryDevice::from_bytes(vec![1; 1000]);
    let small = ConvertTarget::Device(MemoryDevice::new(999));
    let options = ConvertOptions::default();
    let error = convert(Arc::clone(&source), &small, &options, |_| ()).await;
    assert!(matches!(error, Err(ConvertError::TargetTooSmall { .. })), "{error:?}");
    let fixed = ConvertTarget::Device(MemoryDevice::read_only(vec![0; 1000]));
    let error = convert(source, &fixed, &options, |_| ()).await;
    assert!(matches!(error, Err(ConvertError::Write { .. })), "{error:?}");
}

#[tokio::test]
async fn a_copy_in_one_piece_takes_the_time_of_its_bytes_too() {
    let (source, target) = (odd(vec![7; 100_000]), odd(vec![0; 100_000]));
    // A day and more.
    let options = ConvertOptions { bytes_per_sec: NonZeroU64::new(1), ..ConvertOptions::default() };
    let to = ConvertTarget::Device(Arc::clone(&target) as _);
    let mut copy = std::pin::pin!(convert(source, &to, &options, |_| ()));
    // What was due at once is there, and the copy is not done.
    while target.disk.to_vec() != [7; 100_000] {
        tokio::select! {
            biased;
            done = &mut copy => panic!("{done:?}"),
            () = tokio::task::yield_now() => {}
        }
    }
    for _ in 0..1000 {
        tokio::select! {
            biased;
            done = &mut copy => panic!("{done:?}"),
            () = tokio::task::yield_now() => {}
        }
    }
}

#[tokio::test]
async fn progress_goes_forward_under_a_limit_on_the_rate_too() {
    let (source, target) = (odd(content()), odd(vec![0; content().len()]));
    let bytes_per_sec = NonZeroU64::new(1 << 40);
    let options = ConvertOptions { bytes_per_sec, ..ConvertOptions::default() };
    let steps = Mutex::new(Vec::new());
    let to = ConvertTarget::Device(Arc::clone(&target) as _);
    let note = |step| steps.lock().push(step);
    convert(source, &to, &options, note).await.expect("a copy");
    assert_eq!(target.disk.to_vec(), content());
    let steps = steps.into_inner();
    assert!(steps.is_sorted_by_key(|step: &Progress| step.done_bytes));
    assert_eq!(steps.last(), Some(&Progress { done_bytes: SIZE, total_bytes: SIZE }));
}
