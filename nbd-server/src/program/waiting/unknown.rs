//! What lies below the writes to an image that has not come: a disk of which nothing is known, and the errors that say
//! so.

use async_trait::async_trait;
use block::{
    BlockDevice, ByteRange, DeviceError, Durability, ErrorKind, Extent, Limits, Segments, ZeroMode,
};
use bytes::Bytes;
use nbd_server::Refusal;

/// Why what was not written cannot be read.
pub(super) const UNREAD: Refusal = Refusal(
    "the image has not come yet, and this was not written so far: SIGUSR1 tells the server when it is whole",
);

/// Why what was not written cannot be written in part.
pub(super) const PART: Refusal = Refusal(
    "the image has not come yet: until SIGUSR1 tells the server that it is whole, what was not written so far is written \
     in whole blocks of 4096 bytes",
);

/// An error of reading, in the words of the disk where it comes from what is not known.
pub(super) fn unread(error: DeviceError) -> DeviceError {
    let DeviceError::Backend { source, .. } = &error else { return error };
    match source.downcast_ref() {
        Some(qcow2::Error::Backing { .. }) => UNREAD.of_kind(ErrorKind::Io),
        _ => error,
    }
}

/// The disk.
pub(super) struct Unknown {
    pub(super) size_bytes: u64,
}

#[async_trait]
impl BlockDevice for Unknown {
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
        if range.is_empty() { Ok(Segments::default()) } else { Err(UNREAD.of_kind(ErrorKind::Io)) }
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

    async fn extents(&self, range: ByteRange) -> Result<Vec<Extent>, DeviceError> {
        self.limits().check_read(range)?;
        let all = Extent { range, allocated: true, zero: false };
        Ok(if range.is_empty() { Vec::new() } else { vec![all] })
    }

    async fn close(&self) -> Result<(), DeviceError> {
        Ok(())
    }
}
