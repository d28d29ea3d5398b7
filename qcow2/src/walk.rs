//! Going over a disk from its beginning to its end, stretch by stretch of what is stored alike. What becomes of a
//! stretch is decided by whoever walks.

use std::collections::VecDeque;

use block::{BlockDevice, ByteRange, DeviceError, Extent};

use crate::image::Image;
use crate::read::{LayerExtent, LayerState};

/// How much of a disk is asked about at once, in bytes: its answer comes before the first byte is moved.
const LOOK_AHEAD_BYTES: u64 = 4 << 30;

/// A run of bytes that are stored alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stretch {
    pub range: ByteRange,
    /// The device holds space for it.
    pub allocated: bool,
    /// It reads as zeros.
    pub zero: bool,
}

/// A walk over a disk, and over the zeros that a longer one has in their place behind its end.
pub(crate) struct Walk<'a> {
    device: &'a dyn BlockDevice,
    size_bytes: u64,
    total_bytes: u64,
    ahead: VecDeque<Extent>,
}

impl<'a> Walk<'a> {
    /// Over `device` and behind its end up to `total_bytes`.
    pub(crate) fn new(device: &'a dyn BlockDevice, total_bytes: u64) -> Self {
        let size_bytes = device.limits().size_bytes;
        Self { device, size_bytes, total_bytes, ahead: VecDeque::new() }
    }

    /// The stretch that begins at `at`, which lies before the total. `at` must not go back.
    ///
    /// # Errors
    /// What the device answers, and the range that it was asked about; another call asks it again.
    pub(crate) async fn at(&mut self, at: u64) -> Result<Stretch, (ByteRange, DeviceError)> {
        if at >= self.size_bytes {
            let range = ByteRange::between(at, self.total_bytes);
            return Ok(Stretch { range, allocated: false, zero: true });
        }
        while self.ahead.front().is_some_and(|extent| extent.range.end() <= at) {
            self.ahead.pop_front();
        }
        if self.ahead.is_empty() {
            let end = self.size_bytes.min(at.saturating_add(LOOK_AHEAD_BYTES));
            let asked = ByteRange::between(at, end);
            let found = self.device.extents(asked).await.map_err(|source| (asked, source))?;
            self.ahead.extend(found.into_iter().filter(|extent| extent.range.end() > at));
        }
        Ok(match self.ahead.front() {
            Some(extent) => Stretch {
                range: ByteRange::between(at, extent.range.end()),
                allocated: extent.allocated,
                zero: extent.zero,
            },
            // A device that answers nothing promises nothing.
            None => {
                let range = ByteRange::between(at, self.size_bytes);
                Stretch { range, allocated: true, zero: false }
            }
        })
    }
}

/// How much of a layer is asked about at once, in bytes: its answer may hold an extent for each cluster.
const LAYER_LOOK_AHEAD_BYTES: u64 = 64 << 20;

/// A walk over what one layer of a chain says.
pub(crate) struct Layers<'a> {
    image: &'a Image,
    size_bytes: u64,
    ahead: VecDeque<LayerExtent>,
}

impl<'a> Layers<'a> {
    /// Over `image` without its backing files.
    pub(crate) fn new(image: &'a Image) -> Self {
        Self { image, size_bytes: image.limits().size_bytes, ahead: VecDeque::new() }
    }

    /// Whether the layer says what the bytes from `at` on are, and how far that goes. `at` must not go back.
    ///
    /// # Errors
    /// What the image answers, and the range that it was asked about.
    pub(crate) async fn at(&mut self, at: u64) -> Result<(bool, u64), (ByteRange, DeviceError)> {
        while self.ahead.front().is_some_and(|extent| extent.range.end() <= at) {
            self.ahead.pop_front();
        }
        if self.ahead.is_empty() {
            let end = self.size_bytes.min(at.saturating_add(LAYER_LOOK_AHEAD_BYTES));
            let asked = ByteRange::between(at, end);
            let found = self.image.map(asked).await.map_err(|error| (asked, error.into()))?;
            self.ahead.extend(found);
        }
        // Behind its end a layer answers with zeros.
        let behind = (true, u64::MAX);
        let first = self.ahead.front();
        Ok(first
            .map_or(behind, |extent| (extent.state != LayerState::Unallocated, extent.range.end())))
    }
}

#[cfg(test)]
mod tests {
    use block::MemoryDevice;

    use super::*;

    #[tokio::test]
    async fn a_walk_meets_every_byte_once_and_zeros_behind_the_end() {
        let mut bytes = vec![0; 40_000];
        bytes[8192..12_288].fill(7);
        let device = MemoryDevice::from_bytes(bytes);
        let mut walk = Walk::new(&*device, 50_000);
        let mut met = Vec::new();
        let mut at = 0;
        while at < 50_000 {
            let stretch = walk.at(at).await.expect("memory answers");
            assert_eq!(stretch.range.start(), at);
            met.push((stretch.range.end(), stretch.allocated, stretch.zero));
            at = stretch.range.end();
        }
        let expected = [
            (8192, true, true),
            (12_288, true, false),
            (40_000, true, true),
            (50_000, false, true),
        ];
        assert_eq!(met, expected);
    }

    #[tokio::test]
    async fn a_walk_can_begin_inside_a_stretch() {
        let device = MemoryDevice::from_bytes(vec![1; 10_000]);
        let mut walk = Walk::new(&*device, 10_000);
        for at in [0, 1, 5000] {
            let stretch = walk.at(at).await.expect("memory answers");
            assert_eq!((stretch.range.start(), stretch.range.end()), (at, 10_000));
        }
    }
}
