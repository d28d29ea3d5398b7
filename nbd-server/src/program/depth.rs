//! `qemu:allocation-depth`: which layer of a chain answers for each part of a disk, told as qemu-nbd tells it. Which
//! exports offer it is said by their options.

use async_trait::async_trait;
use block::{ByteRange, DeviceError};
use nbd_server::{ExtentSource, FlaggedExtent};
use qcow2::Image;

/// The name of the context.
pub(super) const CONTEXT: &str = "qemu:allocation-depth";

/// The layers of an open image.
pub(super) struct AllocationDepth {
    image: Image,
    /// The images of the chain that have something below them, which are the uppermost so many.
    overlays: usize,
}

impl AllocationDepth {
    pub(super) fn new(image: &Image) -> Result<Self, qcow2::Error> {
        let mut overlays = 0;
        let mut layer = Some(image.clone());
        while let Some(image) = layer {
            overlays += usize::from(image.info().backing.is_some());
            layer = image.backing_image()?;
        }
        Ok(Self { image: image.clone(), overlays })
    }

    /// 1 for the top layer, one more for each below it, 0 where none has anything. Behind the end of a layer that is
    /// shorter than the one above it, that layer answers, with zeros.
    fn depth(&self, extent: &qcow2::MapExtent) -> u32 {
        let depth = match extent.present {
            true => extent.depth + 1,
            false if extent.depth < self.overlays => extent.depth + 2,
            false => 0,
        };
        u32::try_from(depth).unwrap_or(u32::MAX)
    }
}

#[async_trait]
impl ExtentSource for AllocationDepth {
    async fn extents(&self, range: ByteRange) -> Result<Vec<FlaggedExtent>, DeviceError> {
        let extents = self.image.map_chain(range).await?;
        let flagged = |extent: qcow2::MapExtent| FlaggedExtent {
            range: extent.range,
            flags: self.depth(&extent),
        };
        Ok(extents.into_iter().map(flagged).collect())
    }
}
