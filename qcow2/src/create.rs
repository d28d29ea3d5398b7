//! Making a new image: header, refcount table, refcount blocks and an L1 table that covers the whole disk, in this
//! order from the start of the file.

use std::path::Path;

use block::{ByteRange, HostFile};
use bytes::Bytes;

use crate::error::{Error, InvalidOption};
use crate::header::{Header, MAX_BACKING_NAME_BYTES, MAX_L1_BYTES};
use crate::image::Image;
use crate::refcount::{RefcountWidth, big_endian};
use crate::units::{ClusterGeometry, DEFAULT_CLUSTER_BYTES, HostCluster, index};

/// The format of a backing file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackingFormat {
    /// A QCOW2 image.
    Qcow2,
    /// The bytes of a disk.
    Raw,
    /// A VMDK image, for reading only.
    Vmdk,
}

impl BackingFormat {
    /// The name that images record.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
            Self::Vmdk => "vmdk",
        }
    }
}

/// A backing file as an image records it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingName {
    /// The path, relative to the folder of the image that records it (or absolute).
    pub path: String,
    /// The format.
    pub format: BackingFormat,
}

/// What a new image is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// The size of the virtual disk in bytes. QEMU sees whole sectors of 512 bytes only.
    pub size_bytes: u64,
    /// The size of a cluster in bytes: a power of two from 512 to 2 MiB.
    pub cluster_bytes: u32,
    /// The backing file, which need not exist yet.
    pub backing: Option<BackingName>,
}

impl CreateOptions {
    /// A disk of `size_bytes` bytes in clusters of 64 KiB, without a backing file.
    pub fn new(size_bytes: u64) -> Self {
        Self { size_bytes, cluster_bytes: DEFAULT_CLUSTER_BYTES, backing: None }
    }

    /// The same with another cluster size.
    #[must_use]
    pub fn cluster_bytes(self, cluster_bytes: u32) -> Self {
        Self { cluster_bytes, ..self }
    }

    /// The same over a backing file.
    #[must_use]
    pub fn backing(self, path: impl Into<String>, format: BackingFormat) -> Self {
        Self { backing: Some(BackingName { path: path.into(), format }), ..self }
    }
}

impl Image {
    /// Makes a new image. When this returns, file and directory entry are durable; when it fails, there is no file.
    ///
    /// # Errors
    /// [`Error::Invalid`] for what no image can be; [`Error::Host`] if the file exists or cannot be written.
    pub async fn create(path: &Path, options: &CreateOptions) -> Result<(), Error> {
        let layout = Layout::new(path, options)?;
        let file = HostFile::open(path, block::OpenOptions::creating()).await?;
        let made = match layout.write(&file).await {
            Ok(()) => sync_folder(path),
            failed => failed,
        };
        if made.is_err() {
            // The error that counts is the first one; a file that stays behind cannot be opened as an image.
            let _not_removed = std::fs::remove_file(path);
        }
        made
    }

    /// Makes a new image in an open file, which must be empty (or a block device, which is overwritten).
    ///
    /// # Errors
    /// As [`Image::create`].
    pub async fn create_on(file: &HostFile, options: &CreateOptions) -> Result<(), Error> {
        Layout::new(file.path(), options)?.write(file).await
    }
}

/// Where everything goes in a new image.
struct Layout {
    geometry: ClusterGeometry,
    header: Vec<u8>,
    table_clusters: u64,
    blocks: u64,
    l1_clusters: u64,
}

impl Layout {
    fn new(path: &Path, options: &CreateOptions) -> Result<Self, Error> {
        let invalid = |what| Error::Invalid { file: path.to_owned(), what };
        let geometry = ClusterGeometry::of_bytes(options.cluster_bytes)
            .ok_or_else(|| invalid(InvalidOption::ClusterBytes(options.cluster_bytes)))?;
        let limit_bytes = (MAX_L1_BYTES / 8).saturating_mul(geometry.l2_coverage());
        // Files and devices end at 2^63 - 1.
        let limit_bytes = limit_bytes.min(i64::MAX.unsigned_abs());
        if options.size_bytes > limit_bytes {
            let size_bytes = options.size_bytes;
            return Err(invalid(InvalidOption::SizeBytes { size_bytes, limit_bytes }));
        }
        let l1_entries = geometry.l1_entries(options.size_bytes).max(1);
        let l1_clusters = geometry.clusters(l1_entries * 8);
        let (table_clusters, blocks) = refcounts_for(geometry, 1 + l1_clusters);
        let at = |cluster| geometry.host_offset(HostCluster(cluster));
        let mut new = Header::new(geometry, options.size_bytes);
        new.l1_at = at(1 + table_clusters + blocks);
        new.l1_entries = l1_entries;
        new.refcount_table_at = at(1);
        new.refcount_table_clusters = table_clusters;
        new.refcount_order = RefcountWidth::DEFAULT.order();
        if let Some(backing) = &options.backing {
            new.backing_name = Some(backing.path.as_bytes().to_vec());
            new.extensions.backing_format = Some(backing.format.name().as_bytes().to_vec());
        }
        let name_len = options.backing.as_ref().map_or(1, |backing| backing.path.len());
        let bad_name = |limit| invalid(InvalidOption::BackingName { len: name_len, limit });
        if name_len == 0 || name_len > MAX_BACKING_NAME_BYTES {
            return Err(bad_name(MAX_BACKING_NAME_BYTES));
        }
        let room = index(geometry.bytes()).saturating_sub(new.least_bytes());
        let header = new.encode().map_err(|_| bad_name(room))?;
        Ok(Self { geometry, header, table_clusters, blocks, l1_clusters })
    }

    async fn write(&self, file: &HostFile) -> Result<(), Error> {
        let cluster = self.geometry.bytes();
        let used = 1 + self.table_clusters + self.blocks + self.l1_clusters;
        if file.len() < used * cluster {
            file.set_len(used * cluster).await?;
        }
        if file.is_fixed_len() {
            file.write_zeroes(ByteRange::between(0, used * cluster), None).await?;
        }
        let first_block = 1 + self.table_clusters;
        let table: Vec<u64> =
            (first_block..first_block + self.blocks).map(|block| block * cluster).collect();
        file.write(cluster, Bytes::from(big_endian(&table)), None).await?;
        file.write(first_block * cluster, Bytes::from(self.blocks(used)), None).await?;
        // Last, so that nothing half-made looks like an image.
        file.sync().await?;
        file.write(0, Bytes::from(self.header.clone()), None).await?;
        Ok(file.sync().await?)
    }

    /// The refcount blocks: one for each of the `used` first clusters.
    fn blocks(&self, used: u64) -> Vec<u8> {
        let width = RefcountWidth::DEFAULT;
        let mut bytes = vec![0; index(self.blocks * self.geometry.bytes())];
        for cluster in 0..used {
            // Blocks lie one behind the other, and so do their refcounts: one long block.
            width.set(&mut bytes, cluster, 1);
        }
        bytes
    }
}

/// The clusters of a refcount table, and the blocks, that count `others` clusters and themselves.
fn refcounts_for(geometry: ClusterGeometry, others: u64) -> (u64, u64) {
    let per_block = RefcountWidth::DEFAULT.per_block(geometry);
    let (mut table, mut blocks) = (1, 1);
    loop {
        let used = others + table + blocks;
        let (more_table, more_blocks) =
            (geometry.clusters(blocks * 8).max(1), used.div_ceil(per_block));
        if (more_table, more_blocks) == (table, blocks) {
            return (table, blocks);
        }
        (table, blocks) = (more_table.max(table), more_blocks.max(blocks));
    }
}

fn sync_folder(path: &Path) -> Result<(), Error> {
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let synced = std::fs::File::open(folder).and_then(|folder| folder.sync_all());
    synced.map_err(|source| Error::Path { path: folder.to_owned(), source })
}
