//! A part of a device as a device of its own, and a device whose writes are all durable. Where parts lie is told by
//! `partition`.

use std::sync::Arc;

use async_trait::async_trait;
use block::{BlockDevice, ByteRange, DeviceError, Durability, Extent, Limits, Segments, ZeroMode};
use bytes::Bytes;

/// The part of a device that a range covers. Its byte 0 is the first of the range; closing it closes nothing else.
pub struct Window {
    device: Arc<dyn BlockDevice>,
    range: ByteRange,
}

impl std::fmt::Debug for Window {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Window").field("range", &self.range).finish_non_exhaustive()
    }
}

impl Window {
    /// The part of `device` in `range`.
    ///
    /// # Errors
    /// [`DeviceError::PastEnd`] where the device is shorter.
    pub fn new(device: Arc<dyn BlockDevice>, range: ByteRange) -> Result<Arc<Self>, DeviceError> {
        device.limits().check_read(range)?;
        Ok(Arc::new(Self { device, range }))
    }

    /// Where a range of ours lies on the device, after a check that may refuse it.
    fn place(
        &self,
        range: ByteRange,
        check: fn(&Limits, ByteRange) -> Result<(), DeviceError>,
    ) -> Result<ByteRange, DeviceError> {
        check(&self.limits(), range)?;
        let start = self.range.start();
        Ok(ByteRange::between(start + range.start(), start + range.end()))
    }
}

#[async_trait]
impl BlockDevice for Window {
    fn limits(&self) -> Limits {
        Limits { size_bytes: self.range.len(), ..self.device.limits() }
    }

    async fn read(&self, range: ByteRange) -> Result<Segments, DeviceError> {
        self.device.read(self.place(range, Limits::check_read)?).await
    }

    async fn write(
        &self,
        offset: u64,
        data: Bytes,
        durability: Durability,
    ) -> Result<(), DeviceError> {
        self.limits().write_range(offset, data.len())?;
        self.device.write(self.range.start() + offset, data, durability).await
    }

    async fn write_zeroes(
        &self,
        range: ByteRange,
        mode: ZeroMode,
        durability: Durability,
    ) -> Result<(), DeviceError> {
        let range = self.place(range, Limits::check_write)?;
        self.device.write_zeroes(range, mode, durability).await
    }

    async fn discard(&self, range: ByteRange, durability: Durability) -> Result<(), DeviceError> {
        let range = self.place(range, Limits::check_write)?;
        self.device.discard(range, durability).await
    }

    async fn flush(&self) -> Result<(), DeviceError> {
        self.device.flush().await
    }

    async fn extents(&self, range: ByteRange) -> Result<Vec<Extent>, DeviceError> {
        let mut extents = self.device.extents(self.place(range, Limits::check_read)?).await?;
        let start = self.range.start();
        for extent in &mut extents {
            let (from, to) = (extent.range.start(), extent.range.end());
            extent.range = ByteRange::between(from.saturating_sub(start), to.saturating_sub(start));
        }
        Ok(extents)
    }

    async fn close(&self) -> Result<(), DeviceError> {
        // Others may look through windows of their own.
        self.device.flush().await
    }
}

/// A device that makes every change durable before it answers, whether that was asked for or not.
pub struct WriteThrough(Arc<dyn BlockDevice>);

impl std::fmt::Debug for WriteThrough {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WriteThrough").finish_non_exhaustive()
    }
}

impl WriteThrough {
    /// `device`, with durable changes only.
    pub fn new(device: Arc<dyn BlockDevice>) -> Arc<Self> {
        Arc::new(Self(device))
    }
}

#[async_trait]
impl BlockDevice for WriteThrough {
    fn limits(&self) -> Limits {
        self.0.limits()
    }

    async fn read(&self, range: ByteRange) -> Result<Segments, DeviceError> {
        self.0.read(range).await
    }

    async fn write(&self, offset: u64, data: Bytes, _: Durability) -> Result<(), DeviceError> {
        self.0.write(offset, data, Durability::Durable).await
    }

    async fn write_zeroes(
        &self,
        range: ByteRange,
        mode: ZeroMode,
        _: Durability,
    ) -> Result<(), DeviceError> {
        self.0.write_zeroes(range, mode, Durability::Durable).await
    }

    async fn discard(&self, range: ByteRange, _: Durability) -> Result<(), DeviceError> {
        self.0.discard(range, Durability::Durable).await
    }

    async fn flush(&self) -> Result<(), DeviceError> {
        self.0.flush().await
    }

    async fn extents(&self, range: ByteRange) -> Result<Vec<Extent>, DeviceError> {
        self.0.extents(range).await
    }

    async fn close(&self) -> Result<(), DeviceError> {
        self.0.close().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::MemoryDevice;
    use proptest::prelude::*;

    #[tokio::test]
    async fn a_window_shows_its_part_and_keeps_to_it() {
        let device = MemoryDevice::from_bytes(vec![7; 20_000]);
        let range = ByteRange::between(1000, 9000);
        let window = Window::new(device.clone(), range).unwrap();
        assert_eq!(window.limits().size_bytes, 8000);
        window.write(0, Bytes::from_static(b"ab"), Durability::Deferred).await.unwrap();
        let part = ByteRange::between(7000, 8000);
        window.write_zeroes(part, ZeroMode::default(), Durability::Deferred).await.unwrap();
        let bytes = device.to_vec();
        assert_eq!((&bytes[999..1003], bytes[9000]), (&b"\x07ab\x07"[..], 7));
        assert!(bytes[8000..9000].iter().all(|byte| *byte == 0));
        let past = window.read(ByteRange::between(7999, 8001)).await;
        assert!(matches!(past, Err(DeviceError::PastEnd { size_bytes: 8000, .. })));
        for offset in [7999, u64::MAX] {
            let past = window.write(offset, Bytes::from_static(b"ab"), Durability::Deferred).await;
            assert!(matches!(past, Err(DeviceError::WritePastEnd { .. })));
        }
        assert!(window.discard(ByteRange::between(0, 8001), Durability::Deferred).await.is_err());
        window.close().await.unwrap();
        assert!(device.flush().await.is_ok(), "others go on");
        assert!(Window::new(device, ByteRange::between(0, 20_001)).is_err());
    }

    proptest! {
        #[test]
        fn extents_of_a_window_are_those_of_its_part(cut in 0_u64..30_000, len in 1_u64..30_000, at in 0_u64..30_000) {
            let mut bytes = vec![0; 65_536];
            bytes[9000..9100].fill(1);
            bytes[40_000..50_000].fill(1);
            let device = MemoryDevice::from_bytes(bytes);
            let window = Window::new(device, ByteRange::between(cut, cut + 35_000)).unwrap();
            let asked = ByteRange::between(at, at + len.min(35_000 - at));
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let extents = runtime.block_on(window.extents(asked)).unwrap();
            prop_assert_eq!(extents[0].range.start(), asked.start());
            prop_assert!(extents.last().unwrap().range.end() <= asked.end());
            for extent in extents.iter().filter(|extent| extent.zero) {
                let read = runtime.block_on(window.read(extent.range)).unwrap().to_vec();
                prop_assert!(read.iter().all(|byte| *byte == 0));
            }
        }
    }
}
