//! VMDK images as read-only devices: a descriptor and the extents that it names, or one file that holds all. How grains
//! are stored is known to a library; deltas over a parent are refused.

mod descriptor;
mod sparse;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use block::{
    BlockDevice, ByteRange, DeviceError, Durability, Extent, HostFile, Limits, MAX_EXTENTS,
    Segment, Segments, ZeroMode, try_join_all,
};
use bytes::Bytes;
use parking_lot::RwLock;
use tokio::sync::Semaphore;

use self::descriptor::{Content, ExtentLine, NO_PARENT};
use self::sparse::Sparse;
use crate::backing::{Found, Trail};
use crate::create::BackingFormat;
use crate::error::{Error, VmdkError};
use crate::open::OpenOptions;

pub use self::descriptor::MAX_VMDK_EXTENTS;

/// The longest text descriptor that is read, in bytes.
const MAX_DESCRIPTOR_BYTES: u64 = 1 << 20;
/// How many pieces of files with grains one image reads at once, each through a reader of its own.
const READERS: usize = 4;
/// The largest piece that is read at once, in bytes.
const READ_BYTES: u64 = 1 << 20;
/// How many grains one question about extents looks at.
const MAX_PROBES: u64 = 1 << 16;

/// A VMDK image, open for reading.
///
/// Sparse, flat, split and stream-optimised images are read. Extents obey [`OpenOptions::references`], as backing files
/// do; all files are locked as QEMU does.
pub struct Vmdk {
    path: PathBuf,
    size_bytes: u64,
    /// Nothing once it is closed.
    live: RwLock<Option<Arc<Live>>>,
    places: Semaphore,
}

/// The files that it holds open.
struct Live {
    /// For its lock alone.
    _descriptor: HostFile,
    /// What the disk is made of, in its order.
    parts: Vec<Part>,
}

/// A range of the disk.
struct Part {
    range: ByteRange,
    holds: Holds,
}

#[derive(Clone)]
enum Holds {
    Zeros,
    /// The bytes as they are, from an offset on.
    Flat(HostFile, u64),
    Sparse(Arc<Sparse>),
}

/// What an image says of itself.
enum Told {
    /// It is one file.
    Whole(Arc<Sparse>),
    /// It names extents.
    Extents(Vec<ExtentLine>),
}

impl Vmdk {
    /// Opens an image. [`OpenOptions::read_only`] is taken as set.
    ///
    /// # Errors
    /// [`Error::Vmdk`] for what is broken or not supported, [`Error::Reference`] for an extent that may not be opened,
    /// [`Error::Host`].
    pub async fn open(path: &Path, options: &OpenOptions) -> Result<Self, Error> {
        let trail = Trail::start(path, &options.references)?;
        Self::open_on_trail(path, None, options, trail).await
    }

    /// The size of the disk in bytes, as the image in an open file (not a direct one) says it. Its extents are not
    /// opened.
    ///
    /// # Errors
    /// As [`Vmdk::open`].
    pub async fn size_on(file: &HostFile) -> Result<u64, Error> {
        match told(file).await? {
            Told::Whole(whole) => Ok(whole.bytes),
            Told::Extents(lines) => Ok(ranges(file.path(), &lines)?.1),
        }
    }

    /// As [`Vmdk::open`], by the reference that led here, if one did.
    pub(crate) async fn open_on_trail(
        path: &Path,
        found: Option<&Found>,
        options: &OpenOptions,
        trail: Trail,
    ) -> Result<Self, Error> {
        let options = options.to_read();
        // Read at any offset.
        let cached = OpenOptions { direct: false, ..options.clone() };
        let file = match found {
            Some(found) => found.open(&cached).await?,
            None => cached.open_file(path, BackingFormat::Vmdk).await?,
        };
        let trail = trail.enter(path, file.id())?;
        let (parts, size_bytes) = match told(&file).await? {
            Told::Whole(whole) => {
                let range = ByteRange::between(0, whole.bytes);
                (vec![Part { range, holds: Holds::Sparse(whole) }], range.end())
            }
            Told::Extents(lines) => {
                let (ranges, size_bytes) = ranges(path, &lines)?;
                let mut parts = Vec::with_capacity(lines.len());
                for (line, range) in lines.iter().zip(ranges) {
                    parts.push(Part {
                        range,
                        holds: open_extent(path, line, &options, &trail).await?,
                    });
                }
                (parts, size_bytes)
            }
        };
        Ok(Self {
            path: path.to_owned(),
            size_bytes,
            live: RwLock::new(Some(Arc::new(Live { _descriptor: file, parts }))),
            places: Semaphore::new(READERS),
        })
    }

    /// The path that it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What a range is made of, in the order of the disk: what holds it, where it begins there, and how long it is.
    fn inside(&self, range: ByteRange) -> Result<Vec<(Holds, ByteRange, ByteRange)>, DeviceError> {
        let live = self.live.read().clone().ok_or(DeviceError::Closed)?;
        let touched = live.parts.iter().map(|part| (part, part.range.intersection(range)));
        let pieces = touched.filter(|(_, piece)| !piece.is_empty()).map(|(part, piece)| {
            let base = match &part.holds {
                Holds::Flat(_, at) => *at,
                Holds::Zeros | Holds::Sparse(_) => 0,
            };
            let start = base + (piece.start() - part.range.start());
            (part.holds.clone(), piece, ByteRange::between(start, start + piece.len()))
        });
        Ok(pieces.collect())
    }

    async fn read_piece(&self, range: ByteRange) -> Result<Segments, DeviceError> {
        let mut all = Segments::default();
        for (holds, _, there) in self.inside(range)? {
            match holds {
                Holds::Zeros => all.push(Segment::Zero(there.len())),
                Holds::Flat(file, _) => all.push(Segment::Data(file.read(there).await?)),
                Holds::Sparse(sparse) => {
                    let _place = self.places.acquire().await.map_err(|_| DeviceError::Closed)?;
                    all.extend(sparse.read(there).await?);
                }
            }
        }
        Ok(all)
    }
}

#[async_trait]
impl BlockDevice for Vmdk {
    fn limits(&self) -> Limits {
        Limits {
            size_bytes: self.size_bytes,
            read_only: true,
            preferred_bytes: 1 << 16,
            can_discard: false,
            fast_zeroes: false,
        }
    }

    async fn read(&self, range: ByteRange) -> Result<Segments, DeviceError> {
        self.limits().check_read(range)?;
        let reads = range.pieces(READ_BYTES).map(|piece| self.read_piece(piece));
        let mut all = Segments::default();
        for segments in try_join_all(reads).await? {
            all.extend(segments);
        }
        Ok(all)
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
        let mut all: Vec<Extent> = Vec::new();
        for (holds, piece, there) in self.inside(range)? {
            let sparse = match holds {
                Holds::Zeros => {
                    all.push(Extent { range: piece, allocated: true, zero: true });
                    continue;
                }
                Holds::Flat(..) => {
                    all.push(Extent { range: piece, allocated: true, zero: false });
                    continue;
                }
                Holds::Sparse(sparse) => sparse,
            };
            let _place = self.places.acquire().await.map_err(|_| DeviceError::Closed)?;
            let found = sparse.extents(there, MAX_PROBES).await?;
            let mut end = piece.start();
            for extent in found {
                let len = extent.range.len();
                all.push(Extent { range: ByteRange::between(end, end + len), ..extent });
                end += len;
            }
            // The rest is another question.
            if end < piece.end() || all.len() >= MAX_EXTENTS {
                break;
            }
        }
        Ok(joined(all))
    }

    async fn close(&self) -> Result<(), DeviceError> {
        let live = self.live.write().take();
        // Reads that go on keep what they need.
        for part in live.iter().flat_map(|live| &live.parts) {
            if let Holds::Sparse(sparse) = &part.holds {
                sparse.close();
            }
        }
        Ok(())
    }
}

/// What an image says of itself.
async fn told(file: &HostFile) -> Result<Told, Error> {
    let path = file.path();
    let start = file.read(ByteRange::between(0, file.len().min(1))).await?;
    if start.first() != Some(&b'#') {
        let whole = Sparse::open(path, file.clone()).await?;
        if whole.parent != NO_PARENT {
            return Err(refused(path, VmdkError::Parent));
        }
        return Ok(Told::Whole(whole));
    }
    if file.len() > MAX_DESCRIPTOR_BYTES {
        return Err(refused(path, VmdkError::LongDescriptor(file.len())));
    }
    let text = file.read(ByteRange::between(0, file.len())).await?;
    descriptor::parse(&text).map(Told::Extents).map_err(|what| refused(path, what))
}

/// Where extents lie on the disk, and the size of the disk.
fn ranges(path: &Path, lines: &[ExtentLine]) -> Result<(Vec<ByteRange>, u64), Error> {
    let mut end: u64 = 0;
    let mut ranges = Vec::with_capacity(lines.len());
    for line in lines {
        let start = end;
        end = start.saturating_add(line.bytes);
        if end > i64::MAX.unsigned_abs() {
            return Err(refused(path, VmdkError::Size(end)));
        }
        ranges.push(ByteRange::between(start, end));
    }
    Ok((ranges, end))
}

/// Opens an extent of the image in `path`, as other references are opened: once, where it may lie.
async fn open_extent(
    path: &Path,
    line: &ExtentLine,
    options: &OpenOptions,
    trail: &Trail,
) -> Result<Holds, Error> {
    let (name, cached) = match &line.content {
        Content::Zeros => return Ok(Holds::Zeros),
        Content::Flat { name, .. } => (name, false),
        Content::Sparse { name } => (name, true),
    };
    let place = trail.place(path, name.as_bytes())?;
    trail.check_new(&place)?;
    // Files with grains are read at any offset.
    let options = OpenOptions { direct: options.direct && !cached, ..options.clone() };
    let file = place.open(&options, BackingFormat::Vmdk).await?;
    let (holds, has) = match &line.content {
        Content::Flat { at, .. } => {
            let has = file.len().saturating_sub(*at);
            (Holds::Flat(file.clone(), *at), has)
        }
        Content::Zeros | Content::Sparse { .. } => {
            let sparse = Sparse::open(path, file.clone()).await?;
            let has = sparse.bytes;
            (Holds::Sparse(sparse), has)
        }
    };
    if has < line.bytes {
        return Err(refused(path, VmdkError::ShortExtent(file.path().to_owned())));
    }
    Ok(holds)
}

/// Neighbours that say the same become one; of more than an answer may have the rest is left out.
fn joined(all: Vec<Extent>) -> Vec<Extent> {
    let mut joined: Vec<Extent> = Vec::new();
    for extent in all {
        match joined.last_mut() {
            Some(last) if (last.allocated, last.zero) == (extent.allocated, extent.zero) => {
                last.range = ByteRange::between(last.range.start(), extent.range.end());
            }
            _ => joined.push(extent),
        }
    }
    joined.truncate(MAX_EXTENTS);
    joined
}

fn refused(path: &Path, what: VmdkError) -> Error {
    Error::Vmdk { file: path.to_owned(), what }
}
