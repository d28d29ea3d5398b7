//! Joined devices beside one device of the same bytes, and what becomes of failures of a part.

use super::*;
use block::{HostFile, MemoryDevice, MemoryStorage, RawDevice};
use proptest::collection::vec;
use proptest::prelude::*;

/// A part, and what is to be found out about it.
struct Probe {
    device: Arc<dyn BlockDevice>,
    limits: Limits,
    flush_fails: bool,
    /// How often it was flushed or closed.
    settled: std::sync::atomic::AtomicUsize,
}

impl Probe {
    fn over(device: Arc<dyn BlockDevice>) -> Self {
        let limits = device.limits();
        Self { device, limits, flush_fails: false, settled: 0.into() }
    }

    fn settle(&self) -> Result<(), DeviceError> {
        self.settled.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let failed = DeviceError::NotSupported { what: "keeping anything" };
        if self.flush_fails { Err(failed) } else { Ok(()) }
    }

    fn settled(&self) -> usize {
        self.settled.load(std::sync::atomic::Ordering::Relaxed)
    }
}

#[async_trait]
impl BlockDevice for Probe {
    fn limits(&self) -> Limits {
        self.limits
    }

    async fn read(&self, range: ByteRange) -> Result<Segments, DeviceError> {
        self.device.read(range).await
    }

    async fn write(&self, at: u64, data: Bytes, how: Durability) -> Result<(), DeviceError> {
        self.device.write(at, data, how).await
    }

    async fn write_zeroes(
        &self,
        range: ByteRange,
        mode: ZeroMode,
        how: Durability,
    ) -> Result<(), DeviceError> {
        if mode.fast_only && !self.limits.fast_zeroes {
            return Err(DeviceError::NotSupported { what: "fast zeros" });
        }
        self.device.write_zeroes(range, mode, how).await
    }

    async fn discard(&self, range: ByteRange, how: Durability) -> Result<(), DeviceError> {
        self.device.discard(range, how).await
    }

    async fn flush(&self) -> Result<(), DeviceError> {
        self.settle()
    }

    async fn extents(&self, range: ByteRange) -> Result<Vec<Extent>, DeviceError> {
        self.device.extents(range).await
    }

    async fn close(&self) -> Result<(), DeviceError> {
        self.settle()
    }
}

fn probes<const N: usize>(probes: [Probe; N]) -> ([Arc<Probe>; N], Arc<Joined>) {
    let probes = probes.map(Arc::new);
    let joined = Joined::new(probes.iter().map(|probe| Arc::clone(probe) as _)).unwrap();
    (probes, joined)
}

fn memory(bytes: Vec<u8>) -> Arc<dyn BlockDevice> {
    MemoryDevice::from_bytes(bytes)
}

fn range(start: u64, end: u64) -> ByteRange {
    ByteRange::between(start, end)
}

#[derive(Clone, Debug)]
enum Op {
    Write(u64, Vec<u8>),
    Zero(ByteRange, ZeroMode),
    Discard(ByteRange),
    Read(ByteRange),
    Extents(ByteRange),
    Flush,
}

/// Lengths of parts, empty and odd ones among them.
fn lengths() -> impl Strategy<Value = Vec<u64>> {
    vec(prop_oneof![Just(0), Just(4096), 1..20_000_u64, Just(16_384)], 1..7)
}

fn op(size: u64) -> impl Strategy<Value = Op> {
    // A little of it lies past the end.
    let asked = move || (0..=size, 0..=size / 2 + 10).prop_map(|(at, len)| range(at, at + len));
    let mode = (any::<bool>(), any::<bool>())
        .prop_map(|(keep_allocated, fast_only)| ZeroMode { keep_allocated, fast_only });
    prop_oneof![
        4 => (0..=size, vec(any::<u8>(), 0..9000)).prop_map(|(at, data)| Op::Write(at, data)),
        2 => (asked(), mode).prop_map(|(range, mode)| Op::Zero(range, mode)),
        1 => asked().prop_map(Op::Discard),
        3 => asked().prop_map(Op::Read),
        2 => asked().prop_map(Op::Extents),
        1 => Just(Op::Flush),
    ]
}

fn any_case() -> impl Strategy<Value = (Vec<u64>, Vec<Op>)> {
    lengths().prop_flat_map(|lengths| {
        let size = lengths.iter().sum();
        (Just(lengths), vec(op(size), 1..40))
    })
}

/// All extents of a range, asked for until it is told; none of them as its neighbour is.
async fn extents(device: &dyn BlockDevice, range: ByteRange) -> Vec<Extent> {
    let (mut all, mut at): (Vec<Extent>, _) = (Vec::new(), range.start());
    while at < range.end() {
        let some = device.extents(ByteRange::between(at, range.end())).await.unwrap();
        let alike =
            |two: &[Extent]| (two[0].allocated, two[0].zero) == (two[1].allocated, two[1].zero);
        assert!(!some.windows(2).any(alike), "{some:?}");
        for extent in some {
            assert_eq!(extent.range.start(), at, "without gaps");
            at = extent.range.end();
            all.push(extent);
        }
    }
    assert_eq!(at, range.end().max(range.start()));
    all
}

/// A raw file in memory.
fn raw(bytes: Vec<u8>) -> Arc<dyn BlockDevice> {
    let storage = MemoryStorage::from_bytes(bytes, 512);
    RawDevice::new(HostFile::from_storage("memory".as_ref(), storage.into_dyn()).unwrap())
}

/// Does the same to both, and finds both alike.
async fn both_do(joined: &Joined, model: &MemoryDevice, op: &Op) {
    let (defer, before) = (Durability::Deferred, model.to_vec());
    let kind = |done: Result<(), DeviceError>| done.map_err(|error| error.kind());
    match op {
        Op::Write(at, data) => {
            let data = Bytes::from(data.clone());
            let expected = kind(model.write(*at, data.clone(), defer).await);
            assert_eq!(kind(joined.write(*at, data, Durability::Durable).await), expected);
        }
        Op::Zero(range, mode) => {
            let done = joined.write_zeroes(*range, *mode, defer).await;
            if matches!(done, Err(DeviceError::NotSupported { .. })) {
                assert!(mode.fast_only, "{mode:?}");
            } else {
                let expected = kind(model.write_zeroes(*range, ZeroMode::default(), defer).await);
                assert_eq!(kind(done), expected);
            }
        }
        Op::Discard(range) => {
            let done = kind(joined.discard(*range, defer).await);
            assert_eq!(done, kind(model.discard(*range, defer).await));
            if done.is_ok() {
                // Zeros or what was there: the model follows.
                let now = joined.read(*range).await.unwrap().to_vec();
                let at = usize::try_from(range.start()).unwrap();
                for (now, before) in now.iter().zip(&before[at..]) {
                    assert!(*now == 0 || now == before);
                }
                model.write(range.start(), now.into(), defer).await.unwrap();
            }
        }
        Op::Read(range) => {
            let read = joined.read(*range).await.map(|read| read.to_vec());
            let expected = model.read(*range).await.map(|read| read.to_vec());
            assert_eq!(read.map_err(|error| error.kind()), expected.map_err(|error| error.kind()));
        }
        Op::Extents(range) if range.end() > model.limits().size_bytes => {
            let refused = joined.extents(*range).await;
            assert!(matches!(refused, Err(DeviceError::PastEnd { .. })));
        }
        Op::Extents(range) => {
            for extent in extents(joined, *range).await.iter().filter(|extent| extent.zero) {
                let read = model.read(extent.range).await.unwrap().to_vec();
                assert!(read.iter().all(|byte| *byte == 0));
            }
        }
        Op::Flush => joined.flush().await.unwrap(),
    }
}

proptest! {
    #[test] // Whatever is done to them, across borders or not, they are one disk.
    fn joined_devices_are_like_one_of_their_bytes((lengths, ops) in any_case(), raws in any::<bool>()) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let bytes = |len: u64| (0..len).map(|at| u8::try_from(at % 251).unwrap()).collect();
            let contents: Vec<Vec<u8>> = lengths.iter().map(|len| bytes(*len)).collect();
            let model = MemoryDevice::from_bytes(contents.concat());
            let part = |content| if raws { raw(content) } else { memory(content) };
            let joined = Joined::new(contents.into_iter().map(part)).unwrap();
            assert_eq!(joined.limits().size_bytes, model.limits().size_bytes);
            for op in &ops {
                both_do(&joined, &model, op).await;
            }
            let whole = range(0, model.limits().size_bytes);
            assert!(joined.read(whole).await.unwrap().to_vec() == model.to_vec());
            joined.close().await.unwrap();
        });
    }
}

#[tokio::test]
async fn extents_that_touch_across_a_border_are_one() {
    let parts = [vec![1; 8192], vec![2; 4096], vec![], vec![0; 4096], vec![0; 5000], vec![3; 10]];
    let joined = Joined::new(parts.map(memory)).unwrap();
    let told = joined.extents(range(100, 21_000)).await.unwrap();
    let zeros: Vec<_> = told.iter().map(|extent| (extent.range, extent.zero)).collect();
    assert_eq!(zeros, [(range(100, 12_288), false), (range(12_288, 21_000), true)]);
    let end = joined.extents(range(21_383, 21_394)).await.unwrap();
    assert_eq!(end.len(), 2, "{end:?}");
    assert!(joined.extents(range(21_394, 21_394)).await.unwrap().is_empty());
}

#[tokio::test]
async fn extents_have_a_bound_over_all_parts() {
    let striped: Vec<u8> = (0..5000).flat_map(|block| [u8::from(block % 2 == 0); 4096]).collect();
    let joined = Joined::new([striped.clone(), striped].map(memory)).unwrap();
    let told = joined.extents(range(0, joined.limits().size_bytes)).await.unwrap();
    assert_eq!(told.len(), MAX_EXTENTS);
    assert_eq!(told.last().unwrap().range.end(), 8192 * 4096);
}

#[tokio::test]
async fn all_parts_are_flushed_and_closed_and_a_failure_of_one_is_told() {
    let (parts, joined) = probes(
        [0, 1, 2]
            .map(|part| Probe { flush_fails: part == 1, ..Probe::over(MemoryDevice::new(512)) }),
    );
    assert!(matches!(joined.flush().await, Err(DeviceError::NotSupported { .. })));
    assert!(parts.iter().all(|part| part.settled() == 1), "the others, too");
    assert!(joined.close().await.is_err());
    assert!(parts.iter().all(|part| part.settled() == 2), "the others, too");
}

#[tokio::test]
async fn what_only_may_be_zeroed_fast_is_zeroed_as_a_whole_or_not_at_all() {
    let slow = |is_slow: bool| {
        let mut probe = Probe::over(memory(vec![7; 1000]));
        probe.limits.fast_zeroes = !is_slow;
        probe
    };
    let fast = ZeroMode { fast_only: true, ..ZeroMode::default() };
    for (first, expected) in [(true, 7), (false, 0)] {
        let (_, joined) = probes([slow(first), slow(!first)]);
        assert!(!joined.limits().fast_zeroes);
        let done = joined.write_zeroes(range(0, 2000), fast, Durability::Deferred).await;
        assert_eq!(done.is_err(), first);
        assert_eq!(joined.read(range(0, 2000)).await.unwrap().to_vec(), [expected; 2000]);
    }
}

#[tokio::test]
async fn limits_are_the_strictest_of_the_parts() {
    let with = |size_bytes, read_only, preferred_bytes| {
        let mut probe = Probe::over(MemoryDevice::new(0));
        let abilities = Limits { can_discard: preferred_bytes > 512, ..probe.limits };
        probe.limits = Limits { size_bytes, read_only, preferred_bytes, ..abilities };
        probe
    };
    let (_, joined) = probes([with(513, false, 512), with(1000, true, 65_536)]);
    let limits = joined.limits();
    assert_eq!((limits.size_bytes, limits.preferred_bytes), (1513, 65_536));
    assert!(limits.read_only && limits.can_discard);
    for too_long in [[1, i64::MAX as u64], [u64::MAX, 1]] {
        let parts = too_long.map(|size| Arc::new(with(size, false, 512)) as Arc<dyn BlockDevice>);
        assert!(Joined::new(parts).is_none());
    }
    assert_eq!(Joined::new([]).unwrap().limits().size_bytes, 0);
}
