//! How the bytes of a disk are stored, as far as a strict comparison asks: in the terms of `qemu-img map`, through all
//! layers of a chain. What they are is not asked here.

use std::collections::VecDeque;

use block::{BlockDevice, ByteRange, DeviceError};

use crate::image::Image;
use crate::layers::MapExtent;
use crate::walk::{Stretch, Walk};

/// How much of an image is asked about at once, in bytes: the answer may hold an extent for each cluster.
const LOOK_AHEAD_BYTES: u64 = 64 << 20;

/// How bytes are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Stored {
    /// Some layer says something of them.
    present: bool,
    data: bool,
    zero: bool,
    compressed: bool,
    /// They lie somewhere as they are.
    located: bool,
}

impl Stored {
    fn of_extent(extent: &MapExtent) -> Self {
        let MapExtent { present, data, zero, compressed, host, .. } = *extent;
        Self { present, data, zero, compressed, located: host.is_some() }
    }

    /// Bytes of a raw disk lie where they are, holes and all.
    fn of_disk(stretch: Stretch) -> Self {
        let Stretch { zero, .. } = stretch;
        Self { present: true, data: !zero, zero, compressed: false, located: true }
    }
}

/// A walk over a disk that also tells how it is stored, where that is asked.
pub(super) struct StoredWalk<'a> {
    plain: Walk<'a>,
    size_bytes: u64,
    strict: bool,
    image: Option<&'a Image>,
    ahead: VecDeque<MapExtent>,
}

impl<'a> StoredWalk<'a> {
    /// Over `device` and behind its end up to `total_bytes`; `image` is the same disk, where it is one.
    pub(super) fn new(
        device: &'a dyn BlockDevice,
        total_bytes: u64,
        image: Option<&'a Image>,
        strict: bool,
    ) -> Self {
        let size_bytes = device.limits().size_bytes;
        let plain = Walk::new(device, total_bytes);
        Self { plain, size_bytes, strict, image, ahead: VecDeque::new() }
    }

    /// The stretch that begins at `at`, as far as it is stored in one way; `at` must not go back. Where nobody asks,
    /// every stretch is stored alike.
    ///
    /// # Errors
    /// What the device answers, and the range that it was asked about.
    pub(super) async fn at(
        &mut self,
        at: u64,
    ) -> Result<(Stretch, Stored), (ByteRange, DeviceError)> {
        let stretch = self.plain.at(at).await?;
        if !self.strict || at >= self.size_bytes {
            return Ok((stretch, Stored::default()));
        }
        let Some(image) = self.image else { return Ok((stretch, Stored::of_disk(stretch))) };
        while self.ahead.front().is_some_and(|extent| extent.range.end() <= at) {
            self.ahead.pop_front();
        }
        if self.ahead.is_empty() {
            let end = self.size_bytes.min(at.saturating_add(LOOK_AHEAD_BYTES));
            let asked = ByteRange::between(at, end);
            let found = image.map_chain(asked).await.map_err(|error| (asked, error.into()))?;
            self.ahead.extend(found);
        }
        let Some(extent) = self.ahead.front() else { return Ok((stretch, Stored::default())) };
        let end = stretch.range.end().min(extent.range.end());
        let range = ByteRange::between(at, end);
        Ok((Stretch { range, ..stretch }, Stored::of_extent(extent)))
    }
}
