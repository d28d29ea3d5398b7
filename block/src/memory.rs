//! A block device in memory: for tests, and for callers that have a small disk as bytes. Nothing of it is durable.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::RwLock;

use crate::{
    BlockDevice, ByteRange, DeviceError, Durability, Extent, Limits, MAX_EXTENTS, Segment,
    Segments, ZeroMode, is_zero,
};

/// In which unit a memory device tells zeros from data, in bytes.
const EXTENT_BYTES: u64 = 4096;
/// The most bytes that one call of `extents` looks at.
const EXTENTS_SCAN_BYTES: u64 = 64 << 20;

/// A disk in memory. All of it counts as allocated; its extents say truly which blocks of 4 KiB are zero.
#[derive(Debug)]
pub struct MemoryDevice {
    bytes: RwLock<Vec<u8>>,
    limits: Limits,
    closed: AtomicBool,
}

impl MemoryDevice {
    /// A disk of `size_bytes` zeros.
    ///
    /// # Panics
    /// If that is more than the address space holds.
    pub fn new(size_bytes: u64) -> Arc<Self> {
        let len = usize::try_from(size_bytes).unwrap_or(usize::MAX);
        Arc::new(Self::with(vec![0; len], false))
    }

    /// A read-only disk with this content.
    pub fn read_only(bytes: Vec<u8>) -> Arc<Self> {
        Arc::new(Self::with(bytes, true))
    }

    /// A writable disk with this content.
    pub fn from_bytes(bytes: Vec<u8>) -> Arc<Self> {
        Arc::new(Self::with(bytes, false))
    }

    fn with(bytes: Vec<u8>, read_only: bool) -> Self {
        let limits = Limits {
            size_bytes: bytes.len() as u64,
            read_only,
            preferred_bytes: 4096,
            can_discard: false,
            fast_zeroes: true,
        };
        Self { bytes: RwLock::new(bytes), limits, closed: AtomicBool::new(false) }
    }

    /// All bytes now.
    pub fn to_vec(&self) -> Vec<u8> {
        self.bytes.read().clone()
    }

    fn check_open(&self) -> Result<(), DeviceError> {
        if self.closed.load(Ordering::Acquire) { Err(DeviceError::Closed) } else { Ok(()) }
    }

    /// The places in memory of a range that has been checked against the limits.
    fn places(range: ByteRange) -> std::ops::Range<usize> {
        let at = |offset| usize::try_from(offset).unwrap_or(usize::MAX);
        at(range.start())..at(range.end())
    }

    fn check_change(&self, range: ByteRange) -> Result<(), DeviceError> {
        self.check_open()?;
        self.limits.check_write(range)
    }
}

#[async_trait]
impl BlockDevice for MemoryDevice {
    fn limits(&self) -> Limits {
        self.limits
    }

    async fn read(&self, range: ByteRange) -> Result<Segments, DeviceError> {
        self.check_open()?;
        self.limits.check_read(range)?;
        let mut segments = Segments::default();
        let data = Bytes::copy_from_slice(&self.bytes.read()[Self::places(range)]);
        segments.push(Segment::Data(data));
        Ok(segments)
    }

    async fn write(&self, offset: u64, data: Bytes, _: Durability) -> Result<(), DeviceError> {
        self.check_open()?;
        let range = self.limits.write_range(offset, data.len())?;
        self.bytes.write()[Self::places(range)].copy_from_slice(&data);
        Ok(())
    }

    async fn write_zeroes(
        &self,
        range: ByteRange,
        _: ZeroMode,
        _: Durability,
    ) -> Result<(), DeviceError> {
        self.check_change(range)?;
        self.bytes.write()[Self::places(range)].fill(0);
        Ok(())
    }

    async fn discard(&self, range: ByteRange, _: Durability) -> Result<(), DeviceError> {
        self.check_change(range)
    }

    async fn flush(&self) -> Result<(), DeviceError> {
        self.check_open()
    }

    async fn extents(&self, range: ByteRange) -> Result<Vec<Extent>, DeviceError> {
        self.check_open()?;
        self.limits.check_read(range)?;
        let bytes = self.bytes.read();
        let end = range.end().min(range.start().saturating_add(EXTENTS_SCAN_BYTES));
        let mut extents: Vec<Extent> = Vec::new();
        for block in ByteRange::between(range.start(), end).pieces(EXTENT_BYTES) {
            let zero = is_zero(&bytes[Self::places(block)]);
            let full = extents.len() == MAX_EXTENTS;
            match extents.last_mut() {
                Some(last) if last.zero == zero => {
                    last.range = ByteRange::between(last.range.start(), block.end());
                }
                _ if full => break,
                _ => extents.push(Extent { range: block, allocated: true, zero }),
            }
        }
        Ok(extents)
    }

    async fn close(&self) -> Result<(), DeviceError> {
        self.closed.store(true, Ordering::Release);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_keeps_what_is_written_and_says_where_zeros_are() {
        let device = MemoryDevice::new(20_000);
        device.write(5000, Bytes::from_static(b"here"), Durability::Deferred).await.unwrap();
        let read = device.read(ByteRange::between(4998, 5006)).await.unwrap();
        assert_eq!(read.to_vec(), b"\0\0here\0\0");
        let extents = device.extents(ByteRange::between(0, 20_000)).await.unwrap();
        let zeros: Vec<_> = extents.iter().map(|e| (e.range.end(), e.zero)).collect();
        assert_eq!(zeros, [(4096, true), (8192, false), (20_000, true)]);
        let mode = ZeroMode::default();
        let all = ByteRange::between(0, 20_000);
        device.write_zeroes(all, mode, Durability::Durable).await.unwrap();
        assert!(is_zero(&device.to_vec()));
    }

    #[tokio::test]
    async fn it_refuses_what_its_limits_forbid() {
        let device = MemoryDevice::read_only(vec![1; 100]);
        let write = device.write(0, Bytes::from_static(b"x"), Durability::Deferred).await;
        assert!(matches!(write, Err(DeviceError::ReadOnly)));
        let read = device.read(ByteRange::between(50, 101)).await;
        assert!(matches!(read, Err(DeviceError::PastEnd { .. })));
        let device = MemoryDevice::new(100);
        let write = device.write(u64::MAX, Bytes::from_static(b"xy"), Durability::Deferred).await;
        assert!(matches!(write, Err(DeviceError::WritePastEnd { .. })));
        device.close().await.unwrap();
        assert!(matches!(device.flush().await, Err(DeviceError::Closed)));
    }
}
