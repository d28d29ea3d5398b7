//! Reading, and telling how a range is stored: in this layer alone, or through the whole chain.

use block::{
    BlockDevice, ByteRange, Extent as DeviceExtent, MAX_EXTENTS, Segment, Segments, try_join_all,
};

use crate::data::read_data;
use crate::error::Error;
use crate::image::{Inner, Live};
use crate::mapping::{Extent, Place};

/// The largest single read of the host, in bytes. Longer extents are read in pieces, at once.
const READ_BYTES: u64 = 2 << 20;
/// How many extents a read resolves before it moves their bytes.
const READ_EXTENTS: usize = 1024;

/// How a run of guest bytes is stored in one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerState {
    /// This layer holds the bytes.
    Data,
    /// This layer holds the bytes, compressed.
    Compressed,
    /// This layer says that they are zero.
    Zero,
    /// This layer says nothing: the backing file answers, or zeros.
    Unallocated,
}

/// A run of guest bytes that one layer stores alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerExtent {
    /// Where it lies on the disk.
    pub range: ByteRange,
    /// How it is stored.
    pub state: LayerState,
}

impl Inner {
    /// Reads a range of the disk.
    pub(crate) async fn read(&self, range: ByteRange) -> Result<Segments, Error> {
        // Refused at once where the image is closing, instead of waiting until it is closed.
        self.live()?;
        let _guard = self.guests.lock_shared(self.widen(range)).await;
        let live = self.live()?;
        let mut all = Segments::default();
        let mut rest = range;
        while !rest.is_empty() {
            let extents = self.step(&live, |core| core.lookup(rest, READ_EXTENTS)).await?;
            let end = extents.last().map_or(rest.end(), |last| last.range.end());
            let pieces: Vec<Extent> = extents.iter().flat_map(cut).collect();
            match pieces.as_slice() {
                [one] => all.extend(self.read_extent(&live, *one).await?),
                many => {
                    let reads = many.iter().map(|one| self.read_extent(&live, *one));
                    for segments in try_join_all(reads).await? {
                        all.extend(segments);
                    }
                }
            }
            rest = ByteRange::between(end, rest.end());
        }
        Ok(all)
    }

    async fn read_extent(&self, live: &Live, extent: Extent) -> Result<Segments, Error> {
        let range = extent.range;
        match (extent.place, &live.backing) {
            (Place::Data { host, .. }, _) => {
                let at = ByteRange::between(host.0, host.0.saturating_add(range.len()));
                let bytes = read_data(live, at).await?;
                Ok(Segments(vec![Segment::Data(bytes)]))
            }
            (Place::Compressed(stream), _) => {
                let bytes = self.inflate(live, stream, range).await?;
                Ok(Segments(vec![Segment::Data(bytes)]))
            }
            (Place::Unallocated { .. }, Some(backing)) => {
                let end = backing.limits().size_bytes;
                let below = range.intersection(ByteRange::between(0, end));
                let mut segments = if below.is_empty() {
                    Segments::default()
                } else {
                    backing.read(below).await.map_err(|error| self.backing_error(error))?
                };
                segments.push(Segment::Zero(range.len() - below.len()));
                Ok(segments)
            }
            (Place::Zero { .. } | Place::Unallocated { .. }, _) => {
                Ok(Segments(vec![Segment::Zero(range.len())]))
            }
        }
    }

    /// How a range of the disk is stored, through all layers. May end before the range does.
    pub(crate) async fn extents(&self, range: ByteRange) -> Result<Vec<DeviceExtent>, Error> {
        let live = self.live()?;
        let mut all: Vec<DeviceExtent> = Vec::new();
        let mut rest = range;
        while !rest.is_empty() && all.len() < MAX_EXTENTS {
            let here = self.step(&live, |core| core.lookup(rest, MAX_EXTENTS)).await?;
            for extent in here {
                match (extent.place, &live.backing) {
                    (Place::Data { .. } | Place::Compressed(_), _) => {
                        push(&mut all, extent.range, true, false);
                    }
                    (Place::Zero { host }, _) => push(&mut all, extent.range, host.is_some(), true),
                    (Place::Unallocated { .. }, None) => push(&mut all, extent.range, false, true),
                    (Place::Unallocated { .. }, Some(backing)) => {
                        self.extents_below(&**backing, extent.range, &mut all).await?;
                    }
                }
                if all.len() > MAX_EXTENTS {
                    all.truncate(MAX_EXTENTS);
                    return Ok(all);
                }
            }
            rest = ByteRange::between(all.last().map_or(rest.end(), |e| e.range.end()), rest.end());
        }
        Ok(all)
    }

    async fn extents_below(
        &self,
        backing: &dyn BlockDevice,
        range: ByteRange,
        all: &mut Vec<DeviceExtent>,
    ) -> Result<(), Error> {
        let end = backing.limits().size_bytes;
        let mut below = range.intersection(ByteRange::between(0, end));
        while !below.is_empty() && all.len() <= MAX_EXTENTS {
            let found = backing.extents(below).await.map_err(|error| self.backing_error(error))?;
            for extent in &found {
                push(all, extent.range, extent.allocated, extent.zero);
            }
            // A device that answers nothing promises nothing.
            let Some(last) = found.last() else {
                push(all, below, true, false);
                break;
            };
            below = ByteRange::between(last.range.end(), below.end());
        }
        if all.len() <= MAX_EXTENTS {
            let behind = ByteRange::between(range.start().max(end), range.end());
            if !behind.is_empty() {
                push(all, behind, false, true);
            }
        }
        Ok(())
    }

    /// How a range of the disk is stored in this layer alone. Covers all of the range.
    pub(crate) async fn map(&self, range: ByteRange) -> Result<Vec<LayerExtent>, Error> {
        let live = self.live()?;
        let mut all: Vec<LayerExtent> = Vec::new();
        let mut rest = range;
        while !rest.is_empty() {
            for extent in self.step(&live, |core| core.lookup(rest, MAX_EXTENTS)).await? {
                let state = match extent.place {
                    Place::Data { .. } => LayerState::Data,
                    Place::Compressed(_) => LayerState::Compressed,
                    Place::Zero { .. } => LayerState::Zero,
                    Place::Unallocated { .. } => LayerState::Unallocated,
                };
                match all.last_mut() {
                    Some(last) if last.state == state => {
                        last.range = ByteRange::between(last.range.start(), extent.range.end());
                    }
                    _ => all.push(LayerExtent { range: extent.range, state }),
                }
            }
            rest = ByteRange::between(all.last().map_or(rest.end(), |e| e.range.end()), rest.end());
        }
        Ok(all)
    }
}

/// Cuts an extent of data into pieces that one host operation reads.
fn cut(extent: &Extent) -> Vec<Extent> {
    let Place::Data { host, exclusive } = extent.place else { return vec![*extent] };
    let start = extent.range.start();
    let mut pieces = Vec::new();
    let mut done = 0;
    while done < extent.range.len() {
        let len = READ_BYTES.min(extent.range.len() - done);
        let range = ByteRange::between(start + done, start + done + len);
        let host = crate::units::HostOffset(host.0 + done);
        pieces.push(Extent { range, place: Place::Data { host, exclusive } });
        done += len;
    }
    pieces
}

fn push(all: &mut Vec<DeviceExtent>, range: ByteRange, allocated: bool, zero: bool) {
    match all.last_mut() {
        Some(last) if last.allocated == allocated && last.zero == zero => {
            last.range = ByteRange::between(last.range.start(), range.end());
        }
        _ => all.push(DeviceExtent { range, allocated, zero }),
    }
}
