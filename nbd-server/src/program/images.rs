//! Opening an image by its format. The one place of this crate that knows formats.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use async_trait::async_trait;
use block::{BlockDevice, ByteRange, DeviceError, RawDevice};
use nbd_server::{DIRTY, ExtentSource, FlaggedExtent};
use qcow2::{BitmapError, DirtyExtent, Image, OpenOptions, References};

use super::depth::{self, AllocationDepth};
use super::options::{AllowReferences, ExportSpec, Format};

/// The first bytes of a qcow2 image.
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

/// An image that is open, with its path for messages.
pub(super) struct Opened {
    path: PathBuf,
    device: Arc<dyn BlockDevice>,
    /// Contexts by name.
    sources: Vec<(String, Arc<dyn ExtentSource>)>,
}

impl Opened {
    /// What to serve, and to close at the end.
    pub(super) fn device(&self) -> Arc<dyn BlockDevice> {
        Arc::clone(&self.device)
    }

    /// What the image tells beside where data lies.
    pub(super) fn sources(&self) -> impl Iterator<Item = (String, Arc<dyn ExtentSource>)> {
        self.sources.iter().cloned()
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

/// Opens the image of an export.
pub(super) async fn open(
    spec: &ExportSpec,
    references: Option<&AllowReferences>,
) -> anyhow::Result<Opened> {
    let path = &spec.path;
    let cannot = || format!("cannot open {} for export {:?}", path.display(), spec.name);
    let format = match spec.format {
        Some(format) => format,
        None => recognise(path).with_context(cannot)?,
    };
    let (device, sources): (Arc<dyn BlockDevice>, _) = match format {
        Format::Raw => {
            let device = RawDevice::open(path, spec.read_only).await.with_context(cannot)?;
            (device, Vec::new())
        }
        Format::Qcow2 => {
            let options = qcow2_options(spec, references);
            let image = Image::open(path, options).await.with_context(cannot)?;
            let mut sources = bitmaps(&image, spec).await.with_context(cannot)?;
            if spec.allocation_depth {
                let source = AllocationDepth::new(&image).with_context(cannot)?;
                sources.push((depth::CONTEXT.to_owned(), Arc::new(source)));
            }
            (Arc::new(image), sources)
        }
    };
    Ok(Opened { path: path.clone(), device, sources })
}

/// The bitmaps that were asked for, each of which must tell every change: of the image, or else of the first image
/// below it that has one of that name.
async fn bitmaps(
    image: &Image,
    spec: &ExportSpec,
) -> Result<Vec<(String, Arc<dyn ExtentSource>)>, qcow2::Error> {
    let mut sources: Vec<(String, Arc<dyn ExtentSource>)> = Vec::new();
    for name in &spec.bitmaps {
        let source = Bitmap { image: image_with(image, name).await?, name: name.clone() };
        sources.push((format!("qemu:dirty-bitmap:{name}"), Arc::new(source)));
    }
    Ok(sources)
}

/// The uppermost image from `top` down that has a usable bitmap of that name. One that is there and unusable hides
/// those below it.
async fn image_with(top: &Image, name: &str) -> Result<Image, qcow2::Error> {
    let mut layer = top.clone();
    loop {
        let first = ByteRange::between(0, layer.limits().size_bytes.min(1));
        let missing = match layer.dirty_extents(name, first).await {
            Ok(_) => return Ok(layer),
            Err(error @ qcow2::Error::Bitmap { reason: BitmapError::Unknown, .. }) => error,
            Err(error) => return Err(error),
        };
        match layer.backing_image()? {
            Some(below) => layer = below,
            None => return Err(missing),
        }
    }
}

/// A bitmap of an open image, as it is when a client asks.
struct Bitmap {
    image: Image,
    name: String,
}

#[async_trait]
impl ExtentSource for Bitmap {
    async fn extents(&self, range: ByteRange) -> Result<Vec<FlaggedExtent>, DeviceError> {
        // An image below may be smaller: behind its end nothing is dirty.
        let end = range.end().min(self.image.limits().size_bytes).max(range.start());
        let known = ByteRange::between(range.start(), end);
        let mut extents = if known.is_empty() {
            Vec::new()
        } else {
            self.image.dirty_extents(&self.name, known).await?
        };
        if extents.last().map_or(range.start(), |last| last.range.end()) == end && end < range.end()
        {
            let start = match extents.last() {
                Some(last) if !last.dirty => extents.pop().map_or(end, |last| last.range.start()),
                _ => end,
            };
            extents
                .push(DirtyExtent { range: ByteRange::between(start, range.end()), dirty: false });
        }
        let flagged = |extent: DirtyExtent| FlaggedExtent {
            range: extent.range,
            flags: if extent.dirty { DIRTY } else { 0 },
        };
        Ok(extents.into_iter().map(flagged).collect())
    }
}

/// Locked, direct, and with backing files where they are allowed to be.
fn qcow2_options(spec: &ExportSpec, references: Option<&AllowReferences>) -> OpenOptions {
    let options = match &spec.snapshot {
        Some(snapshot) => OpenOptions::reading().snapshot(snapshot),
        None if spec.read_only => OpenOptions::reading(),
        None => OpenOptions::writing(),
    };
    options.references(match references {
        None => References::Confined,
        Some(AllowReferences::Any) => References::Any,
        Some(AllowReferences::Below(directory)) => References::Under(directory.clone()),
    })
}

/// Recognises qcow2. Anything else must be named: a guest could write a header into a raw disk, and would be believed.
fn recognise(path: &Path) -> anyhow::Result<Format> {
    let mut magic = [0; QCOW2_MAGIC.len()];
    match File::open(path)?.read_exact(&mut magic) {
        Ok(()) if magic == QCOW2_MAGIC => Ok(Format::Qcow2),
        Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => Err(error.into()),
        _ => bail!("it is no qcow2 image; say format=raw if it is a raw one"),
    }
}
