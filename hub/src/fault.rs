//! A device that remembers why it failed first, and knows whether it is being flushed. An NBD client only learns an error
//! number; the job log shall say which file and what the kernel said.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use block::{
    BlockDevice, ByteRange, DeviceError, Durability, ErrorKind, Extent, Limits, Segments, ZeroMode,
};
use bytes::Bytes;
use parking_lot::Mutex;

use crate::error::describe;

/// The first failure of a device, in words, and how many flushes of it have not ended.
#[derive(Clone, Debug, Default)]
pub(crate) struct Fault {
    first: Arc<Mutex<Option<String>>>,
    flushes: Arc<AtomicUsize>,
}

/// A flush that has not ended.
struct Flushing<'a>(&'a AtomicUsize);

impl Drop for Flushing<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Fault {
    /// What went wrong first, if anything did.
    pub(crate) fn first(&self) -> Option<String> {
        self.first.lock().clone()
    }

    /// Whether the device is being flushed.
    pub(crate) fn is_flushing(&self) -> bool {
        self.flushes.load(Ordering::Relaxed) > 0
    }

    fn flushing(&self) -> Flushing<'_> {
        self.flushes.fetch_add(1, Ordering::Relaxed);
        Flushing(&self.flushes)
    }

    fn note<T>(&self, result: Result<T, DeviceError>) -> Result<T, DeviceError> {
        if let Err(error) = &result {
            // What the peer did wrong is no fault of the device, and a closed one has said why before.
            let ours = matches!(
                error.kind(),
                ErrorKind::NoSpace | ErrorKind::NoMemory | ErrorKind::Io | ErrorKind::ReadOnly
            ) && !matches!(error, DeviceError::WritePastEnd { .. });
            if ours {
                self.first.lock().get_or_insert_with(|| describe(error));
            }
        }
        result
    }
}

/// A device with its [`Fault`].
pub(crate) struct Remembering {
    inner: Arc<dyn BlockDevice>,
    fault: Fault,
}

impl Remembering {
    pub(crate) fn new(inner: Arc<dyn BlockDevice>, fault: Fault) -> Self {
        Self { inner, fault }
    }
}

#[async_trait]
impl BlockDevice for Remembering {
    fn limits(&self) -> Limits {
        self.inner.limits()
    }

    async fn read(&self, range: ByteRange) -> Result<Segments, DeviceError> {
        self.fault.note(self.inner.read(range).await)
    }

    async fn write(
        &self,
        offset: u64,
        data: Bytes,
        durability: Durability,
    ) -> Result<(), DeviceError> {
        self.fault.note(self.inner.write(offset, data, durability).await)
    }

    async fn write_zeroes(
        &self,
        range: ByteRange,
        mode: ZeroMode,
        durability: Durability,
    ) -> Result<(), DeviceError> {
        self.fault.note(self.inner.write_zeroes(range, mode, durability).await)
    }

    async fn discard(&self, range: ByteRange, durability: Durability) -> Result<(), DeviceError> {
        self.fault.note(self.inner.discard(range, durability).await)
    }

    async fn flush(&self) -> Result<(), DeviceError> {
        let _flushing = self.fault.flushing();
        self.fault.note(self.inner.flush().await)
    }

    async fn extents(&self, range: ByteRange) -> Result<Vec<Extent>, DeviceError> {
        self.fault.note(self.inner.extents(range).await)
    }

    async fn close(&self) -> Result<(), DeviceError> {
        self.fault.note(self.inner.close().await)
    }
}

#[cfg(test)]
mod tests {
    use block::{HostFile, MemoryStorage, OpKind, RawDevice};

    use super::*;

    #[tokio::test]
    async fn the_first_failure_of_the_host_is_remembered_and_the_peers_mistakes_are_not() {
        let storage = MemoryStorage::from_bytes(vec![0; 1 << 20], 512);
        let full = std::io::ErrorKind::StorageFull;
        storage.fail_from(1, full, |op| op.kind == OpKind::Write);
        let file = HostFile::from_storage("layer.raw".as_ref(), storage.into_dyn()).unwrap();
        let fault = Fault::default();
        let device = Remembering::new(RawDevice::new(file), fault.clone());
        let data = |len: usize| Bytes::from(vec![7; len]);
        device.write(0, data(4096), Durability::Deferred).await.unwrap();
        device.write(1 << 20, data(1), Durability::Deferred).await.unwrap_err();
        device.read(ByteRange::between(1 << 20, 2 << 20)).await.unwrap_err();
        assert_eq!(fault.first(), None);
        device.write(8192, data(4096), Durability::Deferred).await.unwrap_err();
        let first = fault.first().unwrap();
        assert!(first.contains("layer.raw") && first.contains("offset 8192"), "{first}");
        device.write(65536, data(4096), Durability::Deferred).await.unwrap_err();
        assert_eq!(fault.first(), Some(first));
    }
}
