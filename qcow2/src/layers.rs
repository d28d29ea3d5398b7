//! Where the bytes of a disk come from, through all layers of its chain: what `qemu-img map` shows. Reading them, and
//! what one layer says alone, stand with reading.

use std::path::PathBuf;

use block::{ByteRange, MAX_EXTENTS};

use crate::error::Error;
use crate::image::Image;
use crate::mapping::Place;
use crate::resolve::{Clusters, Layer, Part, Source};
use crate::units::HostOffset;

/// The most extents of one answer of [`Image::map_chain`].
pub const MAX_MAP_EXTENTS: usize = 1 << 16;

/// A run of guest bytes that one layer of a chain answers for, in one way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapExtent {
    /// Where it lies on the disk.
    pub range: ByteRange,
    /// How many layers lie above the one that answers.
    pub depth: usize,
    /// The file of that layer: where there is a data file, and [`MapExtent::host`] counts in it, the data file.
    pub layer: PathBuf,
    /// The layer says something of it; otherwise no layer does, and it reads as zeros.
    pub present: bool,
    /// The layer holds bytes.
    pub data: bool,
    /// It reads as zeros.
    pub zero: bool,
    /// The bytes are compressed.
    pub compressed: bool,
    /// Where the bytes lie in the file, as they are: not for compressed or encrypted ones.
    pub host: Option<u64>,
}

/// What is known of a backing device.
#[derive(Clone)]
pub(crate) enum Below {
    /// A QCOW2 image.
    Image(Image),
    /// The bytes of a disk, in this file.
    Raw(PathBuf),
    /// A device that this file or name led to.
    Other(PathBuf),
}

impl Image {
    /// The QCOW2 image right below this one, where it was opened with one: for questions about layers. Reading this
    /// image reads it, too.
    ///
    /// # Errors
    /// Where the image is closed.
    pub fn backing_image(&self) -> Result<Option<Self>, Error> {
        Ok(match &self.inner.live()?.below {
            Some(Below::Image(image)) => Some(image.clone()),
            Some(Below::Raw(_) | Below::Other(_)) | None => None,
        })
    }

    /// Where the bytes of a range of the disk come from, through all layers: extents in order, without gaps, neighbours
    /// different.
    ///
    /// At least one for a range that is not empty. May end before the range does, at [`MAX_MAP_EXTENTS`]: ask again from
    /// the end of the last.
    ///
    /// # Errors
    /// As [`block::BlockDevice::extents`].
    pub async fn map_chain(&self, range: ByteRange) -> Result<Vec<MapExtent>, Error> {
        self.inner.limits().check_read(range)?;
        let mut all = Vec::new();
        let mut rest = range;
        while !rest.is_empty() && all.len() <= MAX_MAP_EXTENTS {
            let answers = self.inner.resolve(rest, MAX_EXTENTS, Clusters::Free).await?;
            rest = ByteRange::between(answers.end(), rest.end());
            for part in &answers.parts {
                let layer = &answers.layers[part.depth];
                match part.source {
                    Source::Layer(place) => push(&mut all, tell(layer, *part, place)),
                    Source::Device => map_device(layer, *part, &mut all).await?,
                }
                if all.len() > MAX_MAP_EXTENTS {
                    break;
                }
            }
        }
        all.truncate(MAX_MAP_EXTENTS);
        Ok(all)
    }
}

/// Appends what the device below `layer` says of a part, or stops when there is enough.
async fn map_device(layer: &Layer, part: Part, all: &mut Vec<MapExtent>) -> Result<(), Error> {
    let live = &layer.live;
    let Some(backing) = &live.backing else { return Ok(()) };
    let (path, is_raw) = match &live.below {
        Some(Below::Raw(path)) => (path.clone(), true),
        Some(Below::Other(path)) => (path.clone(), false),
        Some(Below::Image(_)) | None => (PathBuf::new(), false),
    };
    let mut rest = part.range;
    while !rest.is_empty() && all.len() <= MAX_MAP_EXTENTS {
        let found =
            backing.extents(rest).await.map_err(|error| layer.image.backing_error(error))?;
        for extent in &found {
            push(
                all,
                MapExtent {
                    range: extent.range,
                    depth: part.depth + 1,
                    layer: path.clone(),
                    present: is_raw || extent.allocated || !extent.zero,
                    data: !extent.zero,
                    zero: extent.zero,
                    compressed: false,
                    host: is_raw.then_some(extent.range.start()),
                },
            );
        }
        // A device that answers nothing has nothing more to say.
        let Some(last) = found.last() else { return Ok(()) };
        rest = ByteRange::between(last.range.end(), rest.end());
    }
    Ok(())
}

/// What a layer says of a part.
fn tell(layer: &Layer, part: Part, place: Place) -> MapExtent {
    let Layer { image, live, .. } = layer;
    let (present, data, host) = match place {
        Place::Unallocated { host } => (false, false, host),
        Place::Zero { host } => (true, false, host),
        Place::Data { host, .. } => (true, true, Some(host)),
        Place::Compressed(_) => (true, true, None),
    };
    // Cipher text is nothing that could be read there.
    let host = host.filter(|_| live.cipher.is_none());
    let path = match (&live.data, host) {
        (Some(data), Some(_)) => data.path(),
        _ => &image.path,
    };
    MapExtent {
        range: part.range,
        depth: part.depth,
        layer: path.to_owned(),
        present,
        data,
        zero: !data,
        compressed: matches!(place, Place::Compressed(_)),
        host: host.map(|HostOffset(host)| host),
    }
}

fn push(all: &mut Vec<MapExtent>, next: MapExtent) {
    if let Some(last) = all.last_mut() {
        let continues = match (last.host, next.host) {
            (None, None) => true,
            (Some(host), Some(next)) => host + last.range.len() == next,
            _ => false,
        };
        let kind = |e: &MapExtent| (e.depth, e.present, e.data, e.zero, e.compressed);
        if continues && kind(last) == kind(&next) && last.layer == next.layer {
            last.range = ByteRange::between(last.range.start(), next.range.end());
            return;
        }
    }
    all.push(next);
}
