//! Reading, and telling how a range is stored: in this layer alone, or through the whole chain.

use std::sync::Arc;

use block::{ByteRange, Extent as DeviceExtent, MAX_EXTENTS, Segment, Segments, try_join_all};

use crate::data::read_data;
use crate::error::Error;
use crate::image::Inner;
use crate::mapping::Place;
use crate::resolve::{Answers, Clusters, Layer, Part, Source};
use crate::units::HostOffset;

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
    pub(crate) async fn read(self: &Arc<Self>, range: ByteRange) -> Result<Segments, Error> {
        let mut all = Segments::default();
        let mut rest = range;
        while !rest.is_empty() {
            let answers = self.resolve(rest, READ_EXTENTS, Clusters::Locked).await?;
            rest = ByteRange::between(answers.end(), rest.end());
            match answers.parts.as_slice() {
                [one] if one.range.len() <= READ_BYTES => all.extend(answers.read(*one).await?),
                parts => {
                    let reads = parts.iter().flat_map(cut).map(|part| answers.read(part));
                    for segments in try_join_all(reads).await? {
                        all.extend(segments);
                    }
                }
            }
        }
        Ok(all)
    }

    /// How a range of the disk is stored, through all layers. May end before the range does.
    pub(crate) async fn extents(
        self: &Arc<Self>,
        range: ByteRange,
    ) -> Result<Vec<DeviceExtent>, Error> {
        let mut all: Vec<DeviceExtent> = Vec::new();
        let mut rest = range;
        while !rest.is_empty() && all.len() <= MAX_EXTENTS {
            let answers = self.resolve(rest, MAX_EXTENTS, Clusters::Free).await?;
            rest = ByteRange::between(answers.end(), rest.end());
            for part in &answers.parts {
                match part.source {
                    Source::Layer(Place::Data { .. } | Place::Compressed(_)) => {
                        push(&mut all, part.range, true, false);
                    }
                    Source::Layer(Place::Zero { host }) => {
                        push(&mut all, part.range, host.is_some(), true);
                    }
                    Source::Layer(Place::Unallocated { .. }) => {
                        push(&mut all, part.range, false, true);
                    }
                    Source::Device => answers.extents(*part, MAX_EXTENTS, &mut all).await?,
                }
                if all.len() > MAX_EXTENTS {
                    break;
                }
            }
        }
        all.truncate(MAX_EXTENTS);
        Ok(all)
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

impl Answers {
    /// The bytes of a part.
    async fn read(&self, part: Part) -> Result<Segments, Error> {
        let Part { range, depth, source } = part;
        let Layer { image, live, .. } = &self.layers[depth];
        let bytes = match (source, &live.backing) {
            (Source::Device, Some(backing)) => {
                return backing.read(range).await.map_err(|error| image.backing_error(error));
            }
            (Source::Layer(Place::Data { host, .. }), _) => {
                let at = ByteRange::between(host.0, host.0.saturating_add(range.len()));
                read_data(live, at).await?
            }
            (Source::Layer(Place::Compressed(stream)), _) => {
                image.inflate(live, stream, range).await?
            }
            (Source::Device | Source::Layer(Place::Zero { .. } | Place::Unallocated { .. }), _) => {
                return Ok(Segments(vec![Segment::Zero(range.len())]));
            }
        };
        Ok(Segments(vec![Segment::Data(bytes)]))
    }

    /// Appends how a part that a device answers for is stored, or stops where there are more than `most`.
    async fn extents(
        &self,
        part: Part,
        most: usize,
        all: &mut Vec<DeviceExtent>,
    ) -> Result<(), Error> {
        let Layer { image, live, .. } = &self.layers[part.depth];
        let Some(backing) = &live.backing else { return Ok(()) };
        let mut rest = part.range;
        while !rest.is_empty() && all.len() <= most {
            let found = backing.extents(rest).await.map_err(|error| image.backing_error(error))?;
            for extent in &found {
                push(all, extent.range, extent.allocated, extent.zero);
            }
            // A device that answers nothing promises nothing.
            let Some(last) = found.last() else {
                push(all, rest, true, false);
                break;
            };
            rest = ByteRange::between(last.range.end(), rest.end());
        }
        Ok(())
    }
}

/// Cuts data into pieces that one host operation reads.
fn cut(part: &Part) -> Vec<Part> {
    let Source::Layer(Place::Data { host, exclusive }) = part.source else { return vec![*part] };
    let mut pieces = Vec::new();
    let mut rest = part.range;
    while !rest.is_empty() {
        let start = rest.start();
        let range = ByteRange::between(start, rest.end().min(start.saturating_add(READ_BYTES)));
        let host = HostOffset(host.0 + (start - part.range.start()));
        pieces.push(Part {
            range,
            source: Source::Layer(Place::Data { host, exclusive }),
            ..*part
        });
        rest = ByteRange::between(range.end(), rest.end());
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
