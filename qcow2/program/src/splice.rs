//! Ranges of disks, one behind the other, as one disk for reading: what `convert` of several images and `dd` of a part
//! copy from. Nothing is written here.

use std::sync::Arc;

use async_trait::async_trait;
use block::{
    BlockDevice, ByteRange, DeviceError, Durability, Extent, Limits, MAX_EXTENTS, Segment,
    Segments, ZeroMode,
};
use bytes::Bytes;

/// A disk made of ranges of others.
pub(crate) struct Splice {
    parts: Vec<Part>,
    size_bytes: u64,
}

/// A range of a disk and where it appears.
struct Part {
    device: Arc<dyn BlockDevice>,
    /// Its first byte on the device.
    from: u64,
    /// Where it appears.
    here: ByteRange,
    /// Where its data ends here; zeros fill it up.
    data_end: u64,
}

impl Splice {
    /// A disk that has no bytes yet.
    pub(crate) fn new() -> Self {
        Self { parts: Vec::new(), size_bytes: 0 }
    }

    /// The same with a range of `device` behind it, filled up with zeros to a multiple of `unit_bytes`.
    pub(crate) fn then(
        mut self,
        device: Arc<dyn BlockDevice>,
        range: ByteRange,
        unit_bytes: u64,
    ) -> Self {
        let start = self.size_bytes;
        let data_end = start.saturating_add(range.len());
        let end = data_end.next_multiple_of(unit_bytes);
        let here = ByteRange::between(start, end);
        self.parts.push(Part { device, from: range.start(), here, data_end });
        self.size_bytes = end;
        self
    }

    /// The parts that `range` touches, each with what it touches of their data and of the zeros behind it.
    fn touched(
        &self,
        range: ByteRange,
    ) -> impl Iterator<Item = (&Part, ByteRange, ByteRange)> + Send {
        self.parts.iter().filter_map(move |part| {
            let both = part.here.intersection(range);
            let cut = part.data_end.clamp(both.start(), both.end());
            let (data, fill) =
                (ByteRange::between(both.start(), cut), ByteRange::between(cut, both.end()));
            (!both.is_empty()).then_some((part, data, fill))
        })
    }
}

impl Part {
    /// A range of the splice, on the device.
    fn there(&self, here: ByteRange) -> ByteRange {
        let at = here.start() - self.here.start() + self.from;
        ByteRange::between(at, at + here.len())
    }
}

#[async_trait]
impl BlockDevice for Splice {
    fn limits(&self) -> Limits {
        Limits {
            size_bytes: self.size_bytes,
            read_only: true,
            preferred_bytes: 4096,
            can_discard: false,
            fast_zeroes: false,
        }
    }

    async fn read(&self, range: ByteRange) -> Result<Segments, DeviceError> {
        self.limits().check_read(range)?;
        let mut segments = Segments::default();
        for (part, data, fill) in self.touched(range) {
            if !data.is_empty() {
                segments.extend(part.device.read(part.there(data)).await?);
            }
            segments.push(Segment::Zero(fill.len()));
        }
        Ok(segments)
    }

    async fn extents(&self, range: ByteRange) -> Result<Vec<Extent>, DeviceError> {
        self.limits().check_read(range)?;
        let mut extents = Vec::new();
        for (part, data, fill) in self.touched(range) {
            if extents.len() >= MAX_EXTENTS {
                break;
            }
            let mut end = data.start();
            if !data.is_empty() {
                let there = part.there(data);
                for extent in part.device.extents(there).await? {
                    let start = extent.range.start() - there.start() + data.start();
                    end = start + extent.range.len();
                    extents.push(Extent { range: ByteRange::between(start, end), ..extent });
                }
            }
            if end < data.end() {
                // The device told a part only: so do we.
                break;
            }
            if !fill.is_empty() {
                extents.push(Extent { range: fill, allocated: false, zero: true });
            }
        }
        extents.truncate(MAX_EXTENTS);
        Ok(extents)
    }

    async fn write(&self, _: u64, _: Bytes, _: Durability) -> Result<(), DeviceError> {
        Err(DeviceError::ReadOnly)
    }

    async fn write_zeroes(
        &self,
        _: ByteRange,
        _: ZeroMode,
        _: Durability,
    ) -> Result<(), DeviceError> {
        Err(DeviceError::ReadOnly)
    }

    async fn discard(&self, _: ByteRange, _: Durability) -> Result<(), DeviceError> {
        Err(DeviceError::ReadOnly)
    }

    async fn flush(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Leaves the disks that it is made of open: others may hold them, too.
    async fn close(&self) -> Result<(), DeviceError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::MemoryDevice;

    async fn disk(byte: u8, len: u64) -> Arc<dyn BlockDevice> {
        let disk = MemoryDevice::new(len);
        let bytes = vec![byte; usize::try_from(len).unwrap()];
        disk.write(0, bytes.into(), Durability::Deferred).await.unwrap();
        disk
    }

    #[tokio::test]
    async fn ranges_follow_each_other_with_zeros_between() {
        let splice = Splice::new()
            .then(disk(1, 1000).await, ByteRange::between(100, 700), 512)
            .then(disk(2, 512).await, ByteRange::between(0, 512), 512);
        assert_eq!(splice.limits().size_bytes, 1536);
        let all = splice.read(ByteRange::between(0, 1536)).await.unwrap().to_vec();
        let expected = [vec![1; 600], vec![0; 424], vec![2; 512]].concat();
        assert_eq!(all, expected);
        let some = splice.read(ByteRange::between(599, 1025)).await.unwrap().to_vec();
        assert_eq!(some, expected[599..1025]);
        assert!(splice.read(ByteRange::between(0, 1537)).await.is_err());
        let mut at = 0;
        for extent in splice.extents(ByteRange::between(0, 1536)).await.unwrap() {
            assert_eq!(extent.range.start(), at);
            at = extent.range.end();
        }
        assert_eq!(at, 1536);
    }
}
