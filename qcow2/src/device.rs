//! An image as a block device: checks a request against the disk, then hands it on.

use async_trait::async_trait;
use block::{BlockDevice, ByteRange, DeviceError, Durability, Extent, Limits, Segments, ZeroMode};
use bytes::Bytes;

use crate::error::Error;
use crate::image::Image;
use crate::read::LayerExtent;
use crate::write::Reach;

#[async_trait]
impl BlockDevice for Image {
    fn limits(&self) -> Limits {
        self.inner.limits()
    }

    async fn read(&self, range: ByteRange) -> Result<Segments, DeviceError> {
        self.inner.limits().check_read(range)?;
        if range.is_empty() {
            return Ok(Segments::default());
        }
        Ok(self.inner.read(range).await?)
    }

    async fn write(
        &self,
        offset: u64,
        data: Bytes,
        durability: Durability,
    ) -> Result<(), DeviceError> {
        let range = self.inner.limits().write_range(offset, data.len())?;
        if !range.is_empty() {
            self.inner.write(offset, data).await?;
        }
        self.settle(durability).await
    }

    async fn write_zeroes(
        &self,
        range: ByteRange,
        mode: ZeroMode,
        durability: Durability,
    ) -> Result<(), DeviceError> {
        self.inner.limits().check_write(range)?;
        if !range.is_empty() {
            self.inner.write_zeroes(range, mode, Reach::Disk).await?;
        }
        self.settle(durability).await
    }

    async fn discard(&self, range: ByteRange, durability: Durability) -> Result<(), DeviceError> {
        let limits = self.inner.limits();
        if limits.read_only {
            return Err(DeviceError::ReadOnly);
        }
        limits.check_read(range)?;
        if !range.is_empty() {
            self.inner.discard(range, Reach::Disk).await?;
        }
        self.settle(durability).await
    }

    async fn flush(&self) -> Result<(), DeviceError> {
        let live = self.inner.live()?;
        if self.inner.limits().read_only {
            return Ok(());
        }
        Ok(self.inner.flush(&live).await?)
    }

    async fn extents(&self, range: ByteRange) -> Result<Vec<Extent>, DeviceError> {
        self.inner.limits().check_read(range)?;
        Ok(self.inner.extents(range).await?)
    }

    async fn close(&self) -> Result<(), DeviceError> {
        Ok(self.inner.close().await?)
    }
}

impl Image {
    /// How a range of the disk is stored in this layer alone: extents in order, without gaps, that cover all of it,
    /// neighbours different.
    ///
    /// # Errors
    /// As [`BlockDevice::extents`].
    pub async fn map(&self, range: ByteRange) -> Result<Vec<LayerExtent>, Error> {
        self.inner.limits().check_read(range)?;
        self.inner.map(range).await
    }

    async fn settle(&self, durability: Durability) -> Result<(), DeviceError> {
        match durability {
            Durability::Deferred => Ok(()),
            Durability::Durable => self.flush().await,
        }
    }
}
