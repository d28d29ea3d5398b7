use block::MemoryDevice;
use bytes::Bytes;
use parking_lot::Mutex;
use proptest::prelude::*;

use super::*;

async fn judge(first: &[u8], second: &[u8], strict: bool) -> Comparison {
    let disks: [Arc<dyn BlockDevice>; 2] =
        [MemoryDevice::read_only(first.to_vec()), MemoryDevice::read_only(second.to_vec())];
    let options = CompareOptions { strict, ..CompareOptions::default() };
    compare(disks, &options, |_| ()).await.expect("memory answers")
}

#[tokio::test]
async fn the_first_byte_that_differs_is_found_wherever_it_is() {
    let base: Vec<u8> = (0..5_000_000_u32).map(|n| n.to_le_bytes()[1]).collect();
    assert_eq!(judge(&base, &base, true).await, Comparison::Equal);
    for at in [0, 1, 4095, 1 << 20, (3 << 20) + 17, base.len() - 1] {
        let mut other = base.clone();
        other[at] ^= 1;
        let last = other.len() - 1;
        other[last] ^= 2;
        let offset = at as u64;
        assert_eq!(judge(&base, &other, false).await, Comparison::ContentDiffers { offset });
        assert_eq!(judge(&other, &base, false).await, Comparison::ContentDiffers { offset });
    }
}

#[tokio::test]
async fn a_longer_disk_is_equal_if_its_tail_is_zero() {
    let short = vec![3; 10_000];
    let mut long = short.clone();
    long.resize(3_000_000, 0);
    let sizes = [10_000, 3_000_000];
    assert_eq!(judge(&short, &long, false).await, Comparison::EqualButForSize { sizes });
    assert_eq!(judge(&short, &long, true).await, Comparison::SizesDiffer { sizes });
    assert!(judge(&long, &short, false).await.is_equal());
    long[2_999_999] = 1;
    let found = judge(&long, &short, false).await;
    assert_eq!(found, Comparison::ContentDiffers { offset: 2_999_999 });
    assert!(!found.is_equal());
    assert_eq!(judge(&[], &[], true).await, Comparison::Equal);
}

#[tokio::test]
async fn strictness_sees_zeros_that_are_known_in_one_disk_only() {
    let dir = tempfile::tempdir().expect("a folder");
    let hole = block::RawDevice::create(&dir.path().join("hole"), 1 << 20).await.expect("a file");
    let path = dir.path().join("written");
    std::fs::write(&path, vec![0; 1 << 20]).expect("a file");
    let written = block::RawDevice::open(&path, true).await.expect("a file");
    let disks: [Arc<dyn BlockDevice>; 2] = [hole, written];
    let strict = CompareOptions { strict: true, requests: 0, ..CompareOptions::default() };
    let found = compare(disks.clone(), &strict, |_| ()).await.expect("both answer");
    assert_eq!(found, Comparison::AllocationDiffers { offset: 0 });
    let lax = CompareOptions { strict: false, ..CompareOptions::default() };
    assert_eq!(compare(disks, &lax, |_| ()).await.expect("both answer"), Comparison::Equal);
}

#[tokio::test]
async fn a_disk_that_fails_is_named_unless_a_difference_lies_before() {
    let good: Arc<dyn BlockDevice> = MemoryDevice::from_bytes(vec![1; 3 << 20]);
    let closed = MemoryDevice::from_bytes(vec![1; 3 << 20]);
    closed.close().await.expect("memory closes");
    let error = compare([good, closed], &CompareOptions::default(), |_| ()).await;
    let text = error.expect_err("closed").to_string();
    assert!(text.contains("second disk"), "{text}");
}

#[tokio::test]
async fn progress_only_goes_forward_and_ends_at_the_total() {
    let disk: Arc<dyn BlockDevice> = MemoryDevice::from_bytes(vec![1; 5 << 20]);
    let steps = Mutex::new(Vec::new());
    let note = |step| steps.lock().push(step);
    let disks = [Arc::clone(&disk), disk];
    compare(disks, &CompareOptions::default(), note).await.expect("memory answers");
    let steps = steps.into_inner();
    assert!(steps.is_sorted_by_key(|step: &Progress| step.done_bytes) && steps.len() > 4);
    let total_bytes = 5 << 20;
    assert_eq!(steps.last(), Some(&Progress { done_bytes: total_bytes, total_bytes }));
}

fn segments(cuts: &[(u8, u8)]) -> Segments {
    let parts = cuts.iter().map(|(len, byte)| match byte {
        0 => Segment::Zero(u64::from(*len)),
        byte => Segment::Data(Bytes::from(vec![byte & 3; usize::from(*len)])),
    });
    Segments(parts.collect())
}

proptest! {
    #[test]
    fn segments_differ_where_their_bytes_do(
        first in prop::collection::vec((0u8..9, 0u8..8), 0..12),
        second in prop::collection::vec((0u8..9, 0u8..8), 0..12),
    ) {
        let (mut first, mut second) = (segments(&first), segments(&second));
        let len = first.len().max(second.len());
        for short in [&mut first, &mut second] {
            let missing = len - short.len();
            short.0.push(Segment::Zero(missing));
        }
        let (a, b) = (first.to_vec(), second.to_vec());
        let expected = a.iter().zip(&b).position(|(a, b)| a != b).map(|at| at as u64);
        prop_assert_eq!(first_difference(&first, &second), expected);
    }
}
