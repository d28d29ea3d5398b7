//! An image that is closed for writing and opened for reading under its export, when its writer is done: closing marks
//! it clean. When that is, is told by the server.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use block::{BlockDevice, ByteRange, DeviceError, Durability, Extent, Limits, Segments, ZeroMode};
use bytes::Bytes;
use tokio::sync::RwLock;

use super::images::{ImageKey, Opened, Opening};

/// The image, open for writing, or for reading alone once it is sealed.
pub(super) struct Sealable {
    key: ImageKey,
    how: Opening,
    limits: Limits,
    sealed: AtomicBool,
    /// Who works on it shares the lock: it is not taken away from under a request. Nobody else has it, so that the file is
    /// let go of where it is closed. `None` where it could not be opened again.
    opened: RwLock<Option<Opened>>,
}

impl Sealable {
    pub(super) fn new(key: &ImageKey, how: &Opening, opened: Opened) -> Arc<Self> {
        let (key, how, limits) = (key.clone(), how.clone(), opened.as_device().limits());
        let (sealed, opened) = (AtomicBool::new(false), RwLock::new(Some(opened)));
        Arc::new(Self { key, how, limits, sealed, opened })
    }

    /// Closes the image, which makes it clean, and opens it for reading.
    ///
    /// # Errors
    /// Those of closing and opening. What is closed and cannot be opened again fails every request.
    pub(super) async fn seal(&self) -> Result<(), DeviceError> {
        let mut opened = self.opened.write().await;
        device(&opened)?.close().await?;
        self.sealed.store(true, Ordering::Release);
        // Its locks would keep even ourselves out.
        *opened = None;
        match Opened::open(&self.key, false, &self.how).await {
            Ok(again) => {
                *opened = Some(again);
                Ok(())
            }
            Err(error) => {
                tracing::error!("cannot open {} again: {error:#}", self.key.path().display());
                Err(DeviceError::Closed)
            }
        }
    }
}

/// The image as it is now.
fn device(opened: &Option<Opened>) -> Result<&dyn BlockDevice, DeviceError> {
    opened.as_ref().map(Opened::as_device).ok_or(DeviceError::Closed)
}

#[async_trait]
impl BlockDevice for Sealable {
    fn limits(&self) -> Limits {
        let is_sealed = self.sealed.load(Ordering::Acquire);
        Limits { read_only: self.limits.read_only || is_sealed, ..self.limits }
    }

    async fn read(&self, range: ByteRange) -> Result<Segments, DeviceError> {
        device(&*self.opened.read().await)?.read(range).await
    }

    async fn write(
        &self,
        offset: u64,
        data: Bytes,
        durability: Durability,
    ) -> Result<(), DeviceError> {
        device(&*self.opened.read().await)?.write(offset, data, durability).await
    }

    async fn write_zeroes(
        &self,
        range: ByteRange,
        mode: ZeroMode,
        durability: Durability,
    ) -> Result<(), DeviceError> {
        device(&*self.opened.read().await)?.write_zeroes(range, mode, durability).await
    }

    async fn discard(&self, range: ByteRange, durability: Durability) -> Result<(), DeviceError> {
        device(&*self.opened.read().await)?.discard(range, durability).await
    }

    async fn flush(&self) -> Result<(), DeviceError> {
        device(&*self.opened.read().await)?.flush().await
    }

    async fn extents(&self, range: ByteRange) -> Result<Vec<Extent>, DeviceError> {
        device(&*self.opened.read().await)?.extents(range).await
    }

    async fn close(&self) -> Result<(), DeviceError> {
        match &*self.opened.read().await {
            Some(opened) => opened.as_device().close().await,
            None => Ok(()),
        }
    }
}
