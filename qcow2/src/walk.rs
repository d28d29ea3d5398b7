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

/// Which layer says what the bytes from some offset on are, and how far that goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Said {
    /// The layer, counted from the top, and what it says; `None` if none does, and what lies below them answers.
    pub by: Option<(usize, LayerState)>,
    pub end: u64,
}

/// A walk over what some layers of a chain say, the topmost first.
pub(crate) struct Layers<'a> {
    layers: Vec<LayerWalk<'a>>,
}

struct LayerWalk<'a> {
    image: &'a Image,
    size_bytes: u64,
    ahead: VecDeque<LayerExtent>,
}

impl<'a> Layers<'a> {
    /// Over `images`, the topmost first, without what lies below the last.
    pub(crate) fn new(images: &'a [Image]) -> Self {
        let layers = images.iter().map(|image| LayerWalk {
            image,
            size_bytes: image.limits().size_bytes,
            ahead: VecDeque::new(),
        });
        Self { layers: layers.collect() }
    }

    /// Who says what the bytes from `at` on are. `at` must not go back.
    ///
    /// # Errors
    /// What an image answers, and the range that it was asked about.
    pub(crate) async fn at(&mut self, at: u64) -> Result<Said, (ByteRange, DeviceError)> {
        let mut end = u64::MAX;
        for (number, layer) in self.layers.iter_mut().enumerate() {
            let (state, layer_end) = layer.at(at).await?;
            end = end.min(layer_end);
            if state != LayerState::Unallocated {
                return Ok(Said { by: Some((number, state)), end });
            }
        }
        Ok(Said { by: None, end })
    }
}

impl LayerWalk<'_> {
    async fn at(&mut self, at: u64) -> Result<(LayerState, u64), (ByteRange, DeviceError)> {
        // Behind its end a layer answers with zeros.
        if at >= self.size_bytes {
            return Ok((LayerState::Zero, u64::MAX));
        }
        while self.ahead.front().is_some_and(|extent| extent.range.end() <= at) {
            self.ahead.pop_front();
        }
        if self.ahead.is_empty() {
            let end = self.size_bytes.min(at.saturating_add(LAYER_LOOK_AHEAD_BYTES));
            let asked = ByteRange::between(at, end);
            let found = self.image.map(asked).await.map_err(|error| (asked, error.into()))?;
            self.ahead.extend(found);
        }
        let first = self.ahead.front();
        Ok(first.map_or((LayerState::Zero, u64::MAX), |extent| (extent.state, extent.range.end())))
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
