//! Devices one behind the other as one device. Which they are, and that none is there twice, is told by whoever opened
//! them.

use std::sync::Arc;

use async_trait::async_trait;
use block::{
    BlockDevice, ByteRange, DeviceError, Durability, Extent, Limits, MAX_EXTENTS, Segments,
    ZeroMode, try_join_all,
};
use bytes::Bytes;
use futures_util::future::join_all;

/// Several devices, each beginning where the one before it ends, at whatever byte that is.
///
/// Requests that cross borders are split. One that changes something is answered when all its pieces are done, even
/// where one of them failed. All parts are flushed and closed, whatever becomes of the others.
pub struct Joined {
    parts: Vec<Part>,
    limits: Limits,
}

/// One of the devices.
struct Part {
    device: Arc<dyn BlockDevice>,
    /// What it is of the whole.
    place: ByteRange,
}

/// What one part has of a range.
struct Piece<'a> {
    part: &'a Part,
    /// Of the whole.
    range: ByteRange,
}

impl Piece<'_> {
    /// Where it lies in its part.
    fn inner(&self) -> ByteRange {
        let start = self.part.place.start();
        ByteRange::between(self.range.start() - start, self.range.end() - start)
    }
}

impl std::fmt::Debug for Joined {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let places: Vec<_> = self.parts.iter().map(|part| part.place).collect();
        f.debug_struct("Joined").field("places", &places).finish_non_exhaustive()
    }
}

impl Joined {
    /// These devices in their order. They may be of any length, also empty. It is read-only where one of them is.
    ///
    /// `None` where all of them are longer together than an offset in a file can be.
    pub fn new(devices: impl IntoIterator<Item = Arc<dyn BlockDevice>>) -> Option<Arc<Self>> {
        let mut limits = Limits {
            size_bytes: 0,
            read_only: false,
            preferred_bytes: 512,
            can_discard: false,
            fast_zeroes: true,
        };
        let mut parts = Vec::new();
        for device in devices {
            let own = device.limits();
            let place = ByteRange::new(limits.size_bytes, own.size_bytes)?;
            i64::try_from(place.end()).ok()?;
            limits = Limits {
                size_bytes: place.end(),
                read_only: limits.read_only || own.read_only,
                preferred_bytes: limits.preferred_bytes.max(own.preferred_bytes),
                can_discard: limits.can_discard || own.can_discard,
                fast_zeroes: limits.fast_zeroes && own.fast_zeroes,
            };
            parts.push(Part { device, place });
        }
        Some(Arc::new(Self { parts, limits }))
    }

    /// What each part has of a range, without those that have nothing.
    fn pieces(&self, range: ByteRange) -> impl Iterator<Item = Piece<'_>> {
        let first = self.parts.partition_point(|part| part.place.end() <= range.start());
        let behind = self.parts.iter().skip(first);
        behind
            .take_while(move |part| part.place.start() < range.end())
            .map(move |part| Piece { part, range: part.place.intersection(range) })
            .filter(|piece| !piece.range.is_empty())
    }

    /// Zeroes fast what can be, or nothing: where a later piece cannot be, those before it are zeros already, so that it
    /// becomes zeros, too, as fast as it can.
    async fn zero_fast(
        &self,
        range: ByteRange,
        mode: ZeroMode,
        durability: Durability,
    ) -> Result<(), DeviceError> {
        let mut begun = false;
        for piece in self.pieces(range) {
            let device = &piece.part.device;
            match device.write_zeroes(piece.inner(), mode, durability).await {
                Err(DeviceError::NotSupported { .. }) if begun => {
                    let slow = ZeroMode { fast_only: false, ..mode };
                    device.write_zeroes(piece.inner(), slow, durability).await?;
                }
                done => done?,
            }
            begun = true;
        }
        Ok(())
    }
}

/// Waits for all, and answers the first error in their order.
async fn all(
    changes: impl IntoIterator<Item = impl Future<Output = Result<(), DeviceError>>>,
) -> Result<(), DeviceError> {
    join_all(changes).await.into_iter().collect()
}

#[async_trait]
impl BlockDevice for Joined {
    fn limits(&self) -> Limits {
        let is_read_only = |part: &Part| part.device.limits().read_only;
        // Devices may become read-only while they are open.
        Limits { read_only: self.parts.iter().any(is_read_only), ..self.limits }
    }

    async fn read(&self, range: ByteRange) -> Result<Segments, DeviceError> {
        self.limits.check_read(range)?;
        let reads = self.pieces(range).map(|piece| piece.part.device.read(piece.inner()));
        let mut segments = Segments::default();
        for read in try_join_all(reads).await? {
            segments.extend(read);
        }
        Ok(segments)
    }

    async fn write(
        &self,
        offset: u64,
        mut data: Bytes,
        durability: Durability,
    ) -> Result<(), DeviceError> {
        let range = self.limits.write_range(offset, data.len())?;
        all(self.pieces(range).map(|piece| {
            let len =
                usize::try_from(piece.range.len()).map_or(data.len(), |len| len.min(data.len()));
            piece.part.device.write(piece.inner().start(), data.split_to(len), durability)
        }))
        .await
    }

    async fn write_zeroes(
        &self,
        range: ByteRange,
        mode: ZeroMode,
        durability: Durability,
    ) -> Result<(), DeviceError> {
        self.limits.check_write(range)?;
        if mode.fast_only {
            return self.zero_fast(range, mode, durability).await;
        }
        all(self
            .pieces(range)
            .map(|piece| piece.part.device.write_zeroes(piece.inner(), mode, durability)))
        .await
    }

    async fn discard(&self, range: ByteRange, durability: Durability) -> Result<(), DeviceError> {
        self.limits.check_write(range)?;
        all(self.pieces(range).map(|piece| piece.part.device.discard(piece.inner(), durability)))
            .await
    }

    async fn flush(&self) -> Result<(), DeviceError> {
        all(self.parts.iter().map(|part| part.device.flush())).await
    }

    async fn extents(&self, range: ByteRange) -> Result<Vec<Extent>, DeviceError> {
        self.limits.check_read(range)?;
        let mut extents: Vec<Extent> = Vec::new();
        for piece in self.pieces(range) {
            let start = piece.part.place.start();
            let mut known = piece.range.start();
            for extent in piece.part.device.extents(piece.inner()).await? {
                known = start + extent.range.end();
                match extents.last_mut() {
                    Some(last)
                        if (last.allocated, last.zero) == (extent.allocated, extent.zero) =>
                    {
                        last.range = ByteRange::between(last.range.start(), known);
                    }
                    _ => {
                        let range = ByteRange::between(start + extent.range.start(), known);
                        extents.push(Extent { range, ..extent });
                    }
                }
            }
            if known < piece.range.end() || extents.len() >= MAX_EXTENTS {
                break;
            }
        }
        extents.truncate(MAX_EXTENTS);
        Ok(extents)
    }

    async fn close(&self) -> Result<(), DeviceError> {
        all(self.parts.iter().map(|part| part.device.close())).await
    }
}

#[cfg(test)]
mod tests;
