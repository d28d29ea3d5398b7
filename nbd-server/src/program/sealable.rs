//! An image that is closed for writing and opened for reading under its export, when its writer is done: closing marks
//! it clean. When that is, is told by the server.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use block::{BlockDevice, ByteRange, DeviceError, Durability, Extent, Limits, Segments, ZeroMode};
use bytes::Bytes;
use tokio::sync::RwLock;

use super::images::{ImageKey, Opened};

/// The image, open for writing, or for reading alone once it is sealed.
pub(super) struct Sealable {
    key: ImageKey,
    unlock_time: Option<Duration>,
    limits: Limits,
    /// Who works on it shares the lock: it is not taken away from under a request.
    device: RwLock<Arc<dyn BlockDevice>>,
}

impl Sealable {
    pub(super) fn new(
        key: &ImageKey,
        unlock_time: Option<Duration>,
        device: Arc<dyn BlockDevice>,
    ) -> Arc<Self> {
        let limits = device.limits();
        Arc::new(Self { key: key.clone(), unlock_time, limits, device: RwLock::new(device) })
    }

    /// Closes the image, which makes it clean, and opens it for reading.
    ///
    /// # Errors
    /// Those of closing and opening. What is closed and cannot be opened again fails every request.
    pub(super) async fn seal(&self) -> Result<(), DeviceError> {
        let mut device = self.device.write().await;
        device.close().await?;
        match Opened::open(&self.key, false, self.unlock_time).await {
            Ok(opened) => {
                *device = opened.device();
                Ok(())
            }
            Err(error) => {
                tracing::error!("cannot open {} again: {error:#}", self.key.path().display());
                Err(DeviceError::Closed)
            }
        }
    }
}

#[async_trait]
impl BlockDevice for Sealable {
    fn limits(&self) -> Limits {
        self.limits
    }

    async fn read(&self, range: ByteRange) -> Result<Segments, DeviceError> {
        self.device.read().await.read(range).await
    }

    async fn write(
        &self,
        offset: u64,
        data: Bytes,
        durability: Durability,
    ) -> Result<(), DeviceError> {
        self.device.read().await.write(offset, data, durability).await
    }

    async fn write_zeroes(
        &self,
        range: ByteRange,
        mode: ZeroMode,
        durability: Durability,
    ) -> Result<(), DeviceError> {
        self.device.read().await.write_zeroes(range, mode, durability).await
    }

    async fn discard(&self, range: ByteRange, durability: Durability) -> Result<(), DeviceError> {
        self.device.read().await.discard(range, durability).await
    }

    async fn flush(&self) -> Result<(), DeviceError> {
        self.device.read().await.flush().await
    }

    async fn extents(&self, range: ByteRange) -> Result<Vec<Extent>, DeviceError> {
        self.device.read().await.extents(range).await
    }

    async fn close(&self) -> Result<(), DeviceError> {
        self.device.read().await.close().await
    }
}
