//! An image that is closed for writing and opened for reading under its export, when its writer is done: closing marks
//! it clean. When that is, is told by the server; which file it is, by `held`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::bail;
use async_trait::async_trait;
use block::{BlockDevice, ByteRange, DeviceError, Durability, Extent, Limits, Segments, ZeroMode};
use bytes::Bytes;
use tokio::sync::RwLock;

use super::errors::text_of;
use super::held::Held;
use super::images::{ImageKey, Opened, Opening};

/// The image, open for writing, or for reading alone once it is sealed.
pub(super) struct Sealable {
    key: ImageKey,
    /// The file that was opened, whatever becomes of its name.
    held: Held,
    how: Opening,
    limits: Limits,
    sealed: AtomicBool,
    /// Who works on it shares the lock: it is not taken away from under a request. Nobody else has it, so that the file is
    /// let go of where it is closed. `None` where it is sealed and could not be opened again.
    opened: RwLock<Option<Opened>>,
}

impl Sealable {
    /// Opens an image for writing.
    ///
    /// # Errors
    /// Those of [`Opened::open`], and another file that was put in its place meanwhile.
    pub(super) async fn open(key: &ImageKey, how: &Opening) -> anyhow::Result<Arc<Self>> {
        let held = Held::of(key).await?;
        let opened = Opened::open(key, true, how).await?;
        if !held.is_at(key.path()).await {
            bail!("another file was put in its place while it was opened");
        }
        let (key, how, limits) = (key.clone(), how.clone(), opened.as_device().limits());
        let (sealed, opened) = (AtomicBool::new(false), RwLock::new(Some(opened)));
        Ok(Arc::new(Self { key, held, how, limits, sealed, opened }))
    }

    /// Closes the image, which makes it clean, and opens it for reading. What cannot be opened again is sealed all the
    /// same, and fails every request.
    ///
    /// # Errors
    /// Those of closing.
    pub(super) async fn seal(&self) -> Result<(), DeviceError> {
        let mut opened = self.opened.write().await;
        device(&opened)?.close().await?;
        self.sealed.store(true, Ordering::Release);
        // Its locks would keep even ourselves out.
        *opened = None;
        match self.reopen().await {
            Ok(again) => *opened = Some(again),
            Err(error) => tracing::error!(
                image = %self.key.path().display(),
                why = text_of(&error),
                "its writer is done and it is closed, but it cannot be opened again for reading: requests to it fail \
                 until its exports are removed"
            ),
        }
        Ok(())
    }

    /// The very file that was written, wherever it lies by now.
    async fn reopen(&self) -> anyhow::Result<Opened> {
        let path = self.held.path(&self.key).await?;
        let opened = Opened::open(&self.key.at(path.clone()), false, &self.how).await?;
        if !self.held.is_at(&path).await {
            bail!("another file was put in its place while it was opened");
        }
        Ok(opened)
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
        match &*self.opened.read().await {
            Some(opened) => opened.as_device().flush().await,
            // Closing made all of it durable.
            None => Ok(()),
        }
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
