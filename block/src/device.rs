//! The `BlockDevice` trait and its vocabulary. One call is one request, never one cluster; what a device is made of
//! stays behind it.

use async_trait::async_trait;
use bytes::Bytes;

use crate::{ByteRange, DeviceError};

/// The most extents one call of [`BlockDevice::extents`] returns.
pub const MAX_EXTENTS: usize = 8192;

/// What a device is and what it can do. Sizes are bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The size of the device.
    pub size_bytes: u64,
    /// Whether every change is refused.
    pub read_only: bool,
    /// The unit in which the device likes to be asked: a power of two from 512 bytes.
    pub preferred_bytes: u32,
    /// Whether `discard` gives space back (it is always allowed).
    pub can_discard: bool,
    /// Whether `write_zeroes` can be cheaper than writing zeros.
    pub fast_zeroes: bool,
}

/// Whether a change must be durable before the call returns (`FUA`) or may wait for the next flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// The next [`BlockDevice::flush`] makes it durable.
    Deferred,
    /// It is durable, with all metadata that finds it, when the call returns.
    Durable,
}

/// How zeros may be stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ZeroMode {
    /// Space must stay or become allocated (NBD's `NO_HOLE`); otherwise the device may deallocate.
    pub keep_allocated: bool,
    /// Fail with [`DeviceError::NotSupported`], changing nothing, where it would cost as much as writing zeros
    /// (NBD's `FAST_ZERO`).
    pub fast_only: bool,
}

/// A piece of what was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Segment {
    /// These bytes.
    Data(Bytes),
    /// This many zero bytes that are stored nowhere.
    Zero(u64),
}

impl Segment {
    /// The number of guest bytes it stands for.
    pub fn len(&self) -> u64 {
        match self {
            Self::Data(bytes) => bytes.len() as u64,
            Self::Zero(len) => *len,
        }
    }

    /// Whether it stands for no byte at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What was read, in guest order, without gaps; the lengths add up to what was asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Segments(pub Vec<Segment>);

impl Segments {
    /// The number of bytes that they stand for.
    pub fn len(&self) -> u64 {
        self.0.iter().map(Segment::len).sum()
    }

    /// Whether they stand for no byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Appends a segment; neighbouring zeros become one, empty ones are left out.
    pub fn push(&mut self, segment: Segment) {
        match (self.0.last_mut(), segment) {
            (_, segment) if segment.is_empty() => {}
            (Some(Segment::Zero(last)), Segment::Zero(more)) => *last += more,
            (_, segment) => self.0.push(segment),
        }
    }

    /// Appends all of `other`.
    pub fn extend(&mut self, other: Segments) {
        for segment in other.0 {
            self.push(segment);
        }
    }

    /// Copies everything into one vector. For tests and small reads: it allocates the zeros, too.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut all = Vec::new();
        for segment in &self.0 {
            match segment {
                Segment::Data(bytes) => all.extend_from_slice(bytes),
                Segment::Zero(len) => {
                    all.resize(all.len() + usize::try_from(*len).unwrap_or(usize::MAX), 0);
                }
            }
        }
        all
    }
}

/// A run of bytes that are stored alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where it lies on the device.
    pub range: ByteRange,
    /// Whether the device holds space for it (in any layer); NBD's `HOLE` is the opposite.
    pub allocated: bool,
    /// Whether it reads as zeros now. `false` promises nothing.
    pub zero: bool,
}

/// A disk: bytes from 0 to `limits().size_bytes`, of any alignment and length.
///
/// Requests may be in flight at once and may finish in any order. Two that overlap and of which at least one writes
/// are ordered somehow, byte for byte as if one had run first within each sector; nothing of a third party's bytes
/// is ever lost. Dropping a future does not stop its I/O: buffers, locks and reservations stay owned by the operation
/// until the kernel has finished with it.
///
/// A zero-length request succeeds and does nothing.
#[async_trait]
pub trait BlockDevice: Send + Sync {
    /// Size and abilities. Constant while the device is open.
    fn limits(&self) -> Limits;

    /// Reads `range`.
    ///
    /// # Errors
    /// [`DeviceError::PastEnd`] if it leaves the device; otherwise what the layers below failed at.
    async fn read(&self, range: ByteRange) -> Result<Segments, DeviceError>;

    /// Writes all of `data` at `offset`.
    ///
    /// # Errors
    /// [`DeviceError::WritePastEnd`], [`DeviceError::ReadOnly`], or what the layers below failed at; then any part of
    /// the range may hold old or new sectors.
    async fn write(
        &self,
        offset: u64,
        data: Bytes,
        durability: Durability,
    ) -> Result<(), DeviceError>;

    /// Makes `range` read as zeros. The range may be as long as the device.
    ///
    /// # Errors
    /// As [`BlockDevice::write`]; [`DeviceError::NotSupported`] only for `mode.fast_only`.
    async fn write_zeroes(
        &self,
        range: ByteRange,
        mode: ZeroMode,
        durability: Durability,
    ) -> Result<(), DeviceError>;

    /// Says that the content of `range` is no longer needed. What it reads afterwards is either zeros or what was
    /// there: never a backing file's older content, never another guest's bytes.
    ///
    /// # Errors
    /// As [`BlockDevice::read`], and [`DeviceError::ReadOnly`].
    async fn discard(&self, range: ByteRange, durability: Durability) -> Result<(), DeviceError>;

    /// Makes durable everything whose call had returned before this one began.
    ///
    /// # Errors
    /// What the host failed at. After a failed flush nothing may be assumed durable since the last good one.
    async fn flush(&self) -> Result<(), DeviceError>;

    /// How `range` is stored: extents in order, without gaps, from `range.start()`, neighbours different.
    ///
    /// At least one extent for a non-empty range. May end before the range does (at [`MAX_EXTENTS`], or where more
    /// metadata would have to be loaded): ask again from the end of the last. The last one never passes the range.
    ///
    /// # Errors
    /// As [`BlockDevice::read`].
    async fn extents(&self, range: ByteRange) -> Result<Vec<Extent>, DeviceError>;

    /// Waits for what is in flight, flushes, and leaves the image in its clean state. Later requests answer
    /// [`DeviceError::Closed`]. Closing twice is fine.
    ///
    /// # Errors
    /// As [`BlockDevice::flush`]: the device is closed all the same, but not clean.
    async fn close(&self) -> Result<(), DeviceError>;
}

impl Limits {
    /// Checks that `range` lies on the device, for a read.
    ///
    /// # Errors
    /// [`DeviceError::PastEnd`].
    pub fn check_read(&self, range: ByteRange) -> Result<(), DeviceError> {
        if range.end() > self.size_bytes {
            return Err(DeviceError::PastEnd { range, size_bytes: self.size_bytes });
        }
        Ok(())
    }

    /// The range of `len` bytes from `offset` on, which a write is about, checked as by [`Limits::check_write`]. One that
    /// passes the largest offset that there is passes the end of every device.
    ///
    /// # Errors
    /// [`DeviceError::ReadOnly`], [`DeviceError::WritePastEnd`].
    pub fn write_range(&self, offset: u64, len: usize) -> Result<ByteRange, DeviceError> {
        let range = ByteRange::new(offset, len as u64)
            .unwrap_or_else(|| ByteRange::between(offset, u64::MAX));
        self.check_write(range)?;
        Ok(range)
    }

    /// Checks that `range` lies on the device and that it may be written.
    ///
    /// # Errors
    /// [`DeviceError::ReadOnly`], [`DeviceError::WritePastEnd`].
    pub fn check_write(&self, range: ByteRange) -> Result<(), DeviceError> {
        if self.read_only {
            return Err(DeviceError::ReadOnly);
        }
        if range.end() > self.size_bytes {
            return Err(DeviceError::WritePastEnd { range, size_bytes: self.size_bytes });
        }
        Ok(())
    }
}
