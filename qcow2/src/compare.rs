//! Whether two disks hold the same: what both say is zero is not read, everything else is, several ranges at once. How
//! the answer is put, and which exit code it becomes, is the caller's affair.

mod stored;

use std::sync::Arc;

use block::{
    BlockDevice, ByteRange, DeviceError, InFlight, Segment, Segments, is_zero, try_join_all,
};

use crate::image::Image;
use crate::progress::Progress;
use crate::units::index;
use crate::walk::Stretch;
use stored::StoredWalk;

/// How much of each disk is compared at once, in bytes.
const COMPARE_BYTES: u64 = 1 << 20;
/// How many ranges are in flight where the caller does not say otherwise.
const DEFAULT_REQUESTS: usize = 8;
/// The most ranges that are in flight, whatever the caller says: with [`COMPARE_BYTES`] the bound on memory.
const MAX_REQUESTS: usize = 64;

/// How two disks are compared.
#[derive(Clone)]
pub struct CompareOptions {
    /// Whether sizes, and how bytes are stored, must be the same, too: whether there is space for them, whether they are
    /// known to be zero, compressed, or lie somewhere as they are.
    pub strict: bool,
    /// The disks again, where they are images: these know more of how bytes are stored.
    pub images: [Option<Image>; 2],
    /// How many ranges are read at once: 1 to 64.
    pub requests: usize,
}

impl Default for CompareOptions {
    fn default() -> Self {
        Self { strict: false, images: [None, None], requests: DEFAULT_REQUESTS }
    }
}

/// What the comparison of two disks finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Comparison {
    /// Both hold the same.
    Equal,
    /// Both hold the same as far as the shorter goes, and behind it the longer holds zeros.
    EqualButForSize {
        /// The sizes in bytes.
        sizes: [u64; 2],
    },
    /// The sizes differ, and they must not. Nothing was read.
    SizesDiffer {
        /// The sizes in bytes.
        sizes: [u64; 2],
    },
    /// From here on they are stored differently, and that must not be. Before it both hold the same.
    AllocationDiffers {
        /// The offset in bytes.
        offset: u64,
    },
    /// This is the first byte that differs; behind the end of a disk there are zeros.
    ContentDiffers {
        /// The offset in bytes.
        offset: u64,
    },
}

impl Comparison {
    /// Whether a reader of the two disks sees the same.
    pub const fn is_equal(self) -> bool {
        matches!(self, Self::Equal | Self::EqualButForSize { .. })
    }
}

/// Why two disks could not be compared to the end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CompareError {
    /// A disk does not say how a range is stored.
    #[error("cannot tell how {range} of the {} disk are stored: {source}", ordinal(*disk))]
    Extents {
        /// Which disk: 0 or 1.
        disk: usize,
        /// The range.
        range: ByteRange,
        /// What it answered.
        source: DeviceError,
    },
    /// A disk could not be read.
    #[error("cannot read {range} of the {} disk: {source}", ordinal(*disk))]
    Read {
        /// Which disk: 0 or 1.
        disk: usize,
        /// The range.
        range: ByteRange,
        /// What it answered.
        source: DeviceError,
    },
}

fn ordinal(disk: usize) -> &'static str {
    if disk == 0 { "first" } else { "second" }
}

/// Compares two disks up to the first difference.
///
/// # Errors
/// [`CompareError`], if there is no difference before.
pub async fn compare(
    disks: [Arc<dyn BlockDevice>; 2],
    options: &CompareOptions,
    progress: impl Fn(Progress) + Send + Sync,
) -> Result<Comparison, CompareError> {
    let sizes = [disks[0].limits().size_bytes, disks[1].limits().size_bytes];
    if options.strict && sizes[0] != sizes[1] {
        return Ok(Comparison::SizesDiffer { sizes });
    }
    let total_bytes = sizes[0].max(sizes[1]);
    let walk = |disk: usize| {
        let image = options.images[disk].as_ref();
        StoredWalk::new(&*disks[disk], total_bytes, image, options.strict)
    };
    let mut walks = [walk(0), walk(1)];
    let (mut next, mut flight) = (0, InFlight::new());
    let requests = options.requests.clamp(1, MAX_REQUESTS);
    loop {
        while next < total_bytes && flight.len() < requests {
            let here = match both(&mut walks, next).await {
                Ok(here) => here,
                Err(error) => {
                    // What lies before it may differ, which would be the answer.
                    if let Some(found) = drain(&mut flight).await? {
                        return Ok(found);
                    }
                    return Err(error);
                }
            };
            next = here.stretches[0].range.end();
            flight.push(look(&disks, here));
        }
        match flight.oldest().await {
            None => break,
            Some(Err(error)) => return Err(error),
            Some(Ok(Found::Nothing { end })) => progress(Progress { done_bytes: end, total_bytes }),
            Some(Ok(Found::Difference(found))) => return Ok(found),
        }
    }
    progress(Progress { done_bytes: total_bytes, total_bytes });
    Ok(if sizes[0] == sizes[1] { Comparison::Equal } else { Comparison::EqualButForSize { sizes } })
}

/// What looking at one range brought.
enum Found {
    Nothing { end: u64 },
    Difference(Comparison),
}

/// The first difference in what is in flight.
async fn drain<F: Future<Output = Result<Found, CompareError>>>(
    flight: &mut InFlight<F>,
) -> Result<Option<Comparison>, CompareError> {
    while let Some(result) = flight.oldest().await {
        if let Found::Difference(found) = result? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// How both disks store the bytes from `at` on, as far as neither changes.
async fn both(walks: &mut [StoredWalk<'_>; 2], at: u64) -> Result<Here, CompareError> {
    let failed = |disk| move |(range, source)| CompareError::Extents { disk, range, source };
    let [first, second] = walks;
    let found = [first.at(at).await.map_err(failed(0))?, second.at(at).await.map_err(failed(1))?];
    let alike = found[0].1 == found[1].1;
    let mut here = found.map(|(stretch, _)| stretch);
    let end = here[0].range.end().min(here[1].range.end());
    // What both know to be zero is as long as it likes: nothing is read.
    let most = if here[0].zero && here[1].zero { u64::MAX } else { COMPARE_BYTES - 1 };
    let end = end.min((at | most).saturating_add(1));
    for stretch in &mut here {
        stretch.range = ByteRange::between(at, end);
    }
    Ok(Here { stretches: here, alike })
}

/// How both disks store a range.
struct Here {
    stretches: [Stretch; 2],
    /// In the same way, or nobody asks.
    alike: bool,
}

async fn look(disks: &[Arc<dyn BlockDevice>; 2], here: Here) -> Result<Found, CompareError> {
    let Here { stretches: here, alike } = here;
    let range = here[0].range;
    if !alike {
        let offset = range.start();
        return Ok(Found::Difference(Comparison::AllocationDiffers { offset }));
    }
    if here[0].zero && here[1].zero {
        return Ok(Found::Nothing { end: range.end() });
    }
    let reads = [0, 1].map(|disk| content(&*disks[disk], disk, here[disk]));
    let contents = try_join_all(reads).await?;
    let [first, second] = contents.as_slice() else {
        return Ok(Found::Nothing { end: range.end() });
    };
    Ok(match first_difference(first, second) {
        None => Found::Nothing { end: range.end() },
        Some(at) => {
            let offset = range.start() + at;
            Found::Difference(Comparison::ContentDiffers { offset })
        }
    })
}

/// What a disk holds in a stretch; of what it knows to be zero nothing is read.
async fn content(
    device: &dyn BlockDevice,
    disk: usize,
    stretch: Stretch,
) -> Result<Segments, CompareError> {
    if stretch.zero {
        return Ok(Segments(vec![Segment::Zero(stretch.range.len())]));
    }
    let range = stretch.range;
    device.read(range).await.map_err(|source| CompareError::Read { disk, range, source })
}

/// Where two contents of the same length differ first, in bytes from their beginning.
fn first_difference(first: &Segments, second: &Segments) -> Option<u64> {
    let (mut left, mut right) = (first.0.iter(), second.0.iter());
    let (mut a, mut b) = (left.next().cloned(), right.next().cloned());
    let mut at = 0;
    while let (Some(first), Some(second)) = (&a, &b) {
        let len = first.len().min(second.len());
        let differs = match (first, second) {
            (Segment::Zero(_), Segment::Zero(_)) => None,
            (Segment::Data(bytes), Segment::Zero(_)) | (Segment::Zero(_), Segment::Data(bytes)) => {
                first_nonzero(&bytes[..index(len)])
            }
            (Segment::Data(first), Segment::Data(second)) => {
                first_unequal(&first[..index(len)], &second[..index(len)])
            }
        };
        if let Some(differs) = differs {
            return Some(at + differs as u64);
        }
        at += len;
        a = rest(first, len).or_else(|| left.next().cloned());
        b = rest(second, len).or_else(|| right.next().cloned());
    }
    None
}

/// What is left of a segment behind its first `len` bytes, if anything is.
fn rest(segment: &Segment, len: u64) -> Option<Segment> {
    let rest = match segment {
        Segment::Data(bytes) => Segment::Data(bytes.slice(index(len)..)),
        Segment::Zero(all) => Segment::Zero(all - len),
    };
    (!rest.is_empty()).then_some(rest)
}

fn first_nonzero(bytes: &[u8]) -> Option<usize> {
    if is_zero(bytes) { None } else { bytes.iter().position(|byte| *byte != 0) }
}

fn first_unequal(first: &[u8], second: &[u8]) -> Option<usize> {
    // The comparison of slices runs at the speed of memory; the search need not.
    if first == second { None } else { first.iter().zip(second).position(|(a, b)| a != b) }
}

#[cfg(test)]
mod tests;
