//! How large a new image of a disk would be. Arithmetic over the extents of the disk: nothing is read or written, and
//! no image is opened.

use block::{BlockDevice, ByteRange, DeviceError};

use crate::error::InvalidOption;
use crate::header::MAX_L1_BYTES;
use crate::refcount::RefcountWidth;
use crate::units::{ClusterGeometry, DEFAULT_CLUSTER_BYTES, SECTOR_BYTES};

/// What a bitmap takes in its directory beside its name, in bytes.
const BITMAP_ENTRY_BYTES: u64 = 24;

/// A persistent bitmap of the disk, as far as its size matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapSize {
    /// The length of its name in bytes.
    pub name_bytes: u64,
    /// What one bit stands for, in bytes: a power of two.
    pub granularity_bytes: u64,
}

/// The image whose size is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MeasureTarget {
    /// The bytes of the disk.
    Raw,
    /// A QCOW2 image.
    Qcow2(MeasureOptions),
}

/// What a QCOW2 image is to be, as far as its size depends on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeasureOptions {
    /// The size of a cluster in bytes.
    pub cluster_bytes: u32,
    /// The width of a refcount in bits.
    pub refcount_bits: u32,
    /// Whether L2 entries are extended.
    pub extended_l2: bool,
    /// Whether it gets a backing file: of what the disk holds nobody knows which part that file has, so all counts.
    pub backing: bool,
    /// Whether all space is reserved for data when the image is made.
    pub allocate_data: bool,
    /// The bytes of a LUKS header with its key slots; 0 without encryption.
    pub luks_header_bytes: u64,
    /// The bitmaps that go along; `None` where source or target cannot have any.
    pub bitmaps: Option<Vec<BitmapSize>>,
}

impl Default for MeasureOptions {
    fn default() -> Self {
        Self {
            cluster_bytes: DEFAULT_CLUSTER_BYTES,
            refcount_bits: 16,
            extended_l2: false,
            backing: false,
            allocate_data: false,
            luks_header_bytes: 0,
            bitmaps: None,
        }
    }
}

/// How large an image becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measured {
    /// What it takes to hold the disk as it is now. Compression, and metadata that need not be there, are not taken
    /// into account: it is a bound, not a forecast.
    pub required_bytes: u64,
    /// What it takes when every cluster of the disk has been written.
    pub fully_allocated_bytes: u64,
    /// What the bitmaps take on top, where there can be any.
    pub bitmaps_bytes: Option<u64>,
}

/// Why no size can be told.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MeasureError {
    /// No image can be like this.
    #[error("no image can have {0}")]
    Invalid(InvalidOption),
    /// The source does not say how a range is stored.
    #[error("cannot tell how {range} of the source are stored: {source}")]
    Extents {
        /// The range.
        range: ByteRange,
        /// What the source answered.
        source: DeviceError,
    },
}

/// How large an image of an empty disk of `size_bytes` bytes becomes.
///
/// # Errors
/// [`MeasureError::Invalid`].
pub fn measure_size(size_bytes: u64, target: &MeasureTarget) -> Result<Measured, MeasureError> {
    match target {
        MeasureTarget::Raw => raw(size_bytes),
        MeasureTarget::Qcow2(options) => {
            let disk = Disk::new(size_bytes, options)?;
            Ok(disk.measured(0))
        }
    }
}

/// How large an image of a disk becomes that holds what `source` holds now.
///
/// # Errors
/// [`MeasureError`].
pub async fn measure(
    source: &dyn BlockDevice,
    target: &MeasureTarget,
) -> Result<Measured, MeasureError> {
    let size_bytes = source.limits().size_bytes;
    let options = match target {
        MeasureTarget::Raw => return raw(size_bytes),
        MeasureTarget::Qcow2(options) => options,
    };
    let disk = Disk::new(size_bytes, options)?;
    let required = if options.backing {
        disk.data_bytes
    } else {
        required_bytes(source, size_bytes, disk.geometry).await?
    };
    Ok(disk.measured(required))
}

/// The bytes of the clusters in which `source` holds anything but zeros.
async fn required_bytes(
    source: &dyn BlockDevice,
    size_bytes: u64,
    geometry: ClusterGeometry,
) -> Result<u64, MeasureError> {
    let (mut required, mut counted) = (0, 0);
    let mut rest = ByteRange::between(0, size_bytes);
    while !rest.is_empty() {
        let extents = source.extents(rest).await;
        let extents = extents.map_err(|source| MeasureError::Extents { range: rest, source })?;
        for extent in extents.iter().filter(|extent| !extent.zero) {
            let clusters = extent.range.widen(geometry.bytes());
            let new = ByteRange::between(clusters.start().max(counted), clusters.end());
            required += new.len();
            counted = new.end();
        }
        // A device that answers nothing promises nothing: all of it may be data.
        let Some(last) = extents.last() else {
            let clusters = rest.widen(geometry.bytes());
            return Ok(required + clusters.end() - clusters.start().max(counted));
        };
        rest = ByteRange::between(last.range.end(), rest.end());
    }
    Ok(required)
}

fn raw(size_bytes: u64) -> Result<Measured, MeasureError> {
    let limit_bytes = i64::MAX.unsigned_abs() / SECTOR_BYTES * SECTOR_BYTES;
    let whole = size_bytes.checked_next_multiple_of(SECTOR_BYTES);
    let Some(bytes) = whole.filter(|bytes| *bytes <= limit_bytes) else {
        return Err(MeasureError::Invalid(InvalidOption::SizeBytes { size_bytes, limit_bytes }));
    };
    Ok(Measured { required_bytes: bytes, fully_allocated_bytes: bytes, bitmaps_bytes: None })
}

/// An image that is asked about.
struct Disk<'a> {
    geometry: ClusterGeometry,
    width: RefcountWidth,
    /// The size of the disk in whole clusters.
    data_bytes: u64,
    size_bytes: u64,
    options: &'a MeasureOptions,
}

impl<'a> Disk<'a> {
    fn new(size_bytes: u64, options: &'a MeasureOptions) -> Result<Self, MeasureError> {
        let invalid = |what| Err(MeasureError::Invalid(what));
        let Some(geometry) = ClusterGeometry::of_bytes(options.cluster_bytes) else {
            return invalid(InvalidOption::ClusterBytes(options.cluster_bytes));
        };
        let geometry = match (options.extended_l2, geometry.extended()) {
            (false, _) => geometry,
            (true, Some(extended)) => extended,
            (true, None) => {
                return invalid(InvalidOption::ExtendedL2ClusterBytes(options.cluster_bytes));
            }
        };
        let order = options.refcount_bits.trailing_zeros();
        let width = RefcountWidth::new(order);
        let Some(width) = width.filter(|_| options.refcount_bits.is_power_of_two()) else {
            return invalid(InvalidOption::RefcountBits(options.refcount_bits));
        };
        let limit_bytes = (MAX_L1_BYTES / 8).saturating_mul(geometry.l2_coverage());
        if size_bytes > limit_bytes {
            return invalid(InvalidOption::SizeBytes { size_bytes, limit_bytes });
        }
        let data_bytes = geometry.clusters(size_bytes) * geometry.bytes();
        Ok(Self { geometry, width, data_bytes, size_bytes, options })
    }

    fn measured(&self, required: u64) -> Measured {
        let cluster = self.geometry.bytes();
        let luks = self.options.luks_header_bytes.next_multiple_of(cluster);
        let l2 = self.geometry.l1_entries(self.data_bytes) * cluster;
        let l1 = (l2 / cluster * 8).next_multiple_of(cluster);
        let counted = luks + cluster + l2 + l1 + self.data_bytes;
        let metadata = cluster + l2 + l1 + self.refcount_bytes(counted / cluster);
        let bitmaps = self.options.bitmaps.as_deref().map(|all| {
            let bytes = self.bitmap_bytes(all);
            // With the refcounts that they need beside those of everything else.
            let more = self.refcount_bytes((counted + bytes) / cluster);
            bytes + more - self.refcount_bytes(counted / cluster)
        });
        let required = if self.options.allocate_data { self.data_bytes } else { required };
        Measured {
            required_bytes: luks + metadata + required,
            fully_allocated_bytes: luks + metadata + self.data_bytes,
            bitmaps_bytes: bitmaps,
        }
    }

    /// What the refcounts of so many clusters take, and of themselves.
    fn refcount_bytes(&self, clusters: u64) -> u64 {
        let (mut blocks, mut table) = (0, 0);
        loop {
            let all = clusters + table + blocks;
            let more_blocks = all.div_ceil(self.width.per_block(self.geometry));
            let more_table = self.geometry.clusters(more_blocks * 8);
            if (more_blocks, more_table) == (blocks, table) {
                return (blocks + table) * self.geometry.bytes();
            }
            (blocks, table) = (more_blocks, more_table);
        }
    }

    /// What bitmaps take of which every bit is set, with their tables and their directory.
    fn bitmap_bytes(&self, bitmaps: &[BitmapSize]) -> u64 {
        let cluster = self.geometry.bytes();
        let (mut all, mut directory) = (0, 0);
        for bitmap in bitmaps {
            let bits = self.size_bytes.div_ceil(bitmap.granularity_bytes.max(1));
            let clusters = self.geometry.clusters(bits.div_ceil(8));
            all += clusters * cluster + (clusters * 8).next_multiple_of(cluster);
            directory += (BITMAP_ENTRY_BYTES + bitmap.name_bytes).next_multiple_of(8);
        }
        all + directory.next_multiple_of(cluster)
    }
}
