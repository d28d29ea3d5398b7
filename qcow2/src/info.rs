//! What an image says of itself, for people and for programs.

use std::path::PathBuf;

use crate::codec::Compression;
use crate::header::{CRYPT_LUKS, CRYPT_NONE, Header};
use crate::image::Image;

/// What never changes while an image is open, and the driver needs at every turn.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Facts {
    pub cluster_bytes: u64,
    pub subcluster_bytes: u64,
    pub l2_coverage: u64,
    pub compression: Compression,
    /// The external data file always reads like the disk.
    pub raw_data: bool,
}

/// The backing file that an image records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordedBacking {
    /// Its name, as recorded; bytes that are no UTF-8 are replaced.
    pub name: String,
    /// Its format, as recorded, where it is.
    pub format: Option<String>,
}

/// The external data file that an image records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordedDataFile {
    /// Its name, as recorded, where it is; bytes that are no UTF-8 are replaced.
    pub name: Option<String>,
    /// It reads like the disk, without the image.
    pub raw: bool,
}

/// How guest data is encrypted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum RecordedEncryption {
    /// Not at all.
    #[default]
    None,
    /// AES-CBC in the way of old versions of QEMU, which is not safe and not opened.
    LegacyAes,
    /// LUKS.
    Luks,
}

/// What an image says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageInfo {
    /// The path that it was opened by.
    pub path: PathBuf,
    /// The version of the format.
    pub version: u32,
    /// The size of the virtual disk in bytes.
    pub size_bytes: u64,
    /// The size of a cluster in bytes.
    pub cluster_bytes: u64,
    /// The width of a refcount in bits.
    pub refcount_bits: u32,
    /// How clusters are compressed that are.
    pub compression: Compression,
    /// Refcounts may stay behind while it is open for writing.
    pub lazy_refcounts: bool,
    /// L2 entries tell of 32 parts of each cluster.
    pub extended_l2: bool,
    /// The file that holds the guest data, where that is another one.
    pub data_file: Option<RecordedDataFile>,
    /// How guest data is encrypted.
    pub encryption: RecordedEncryption,
    /// The backing file, where there is one.
    pub backing: Option<RecordedBacking>,
    /// The number of internal snapshots.
    pub snapshots: u32,
    /// Its refcounts may be wrong.
    pub is_dirty: bool,
    /// It is marked corrupt.
    pub is_corrupt: bool,
    /// It was opened for reading only.
    pub read_only: bool,
    /// The length of the image file up to the last cluster in use, in bytes; all of it where it is open for reading.
    pub file_bytes: u64,
}

impl Facts {
    pub(crate) fn new(header: &Header) -> Self {
        Self {
            cluster_bytes: header.geometry.bytes(),
            subcluster_bytes: header.geometry.subcluster_bytes(),
            l2_coverage: header.geometry.l2_coverage(),
            compression: Compression::from_type_byte(header.compression_type()).unwrap_or_default(),
            raw_data: header.is_data_file_raw(),
        }
    }
}

impl ImageInfo {
    /// What a header says.
    pub(crate) fn of_header(path: PathBuf, header: &Header, file_bytes: u64) -> Self {
        let text = |bytes: &Vec<u8>| String::from_utf8_lossy(bytes).into_owned();
        let data_file = header.has_data_file().then(|| RecordedDataFile {
            name: header.extensions.data_file.as_ref().map(text),
            raw: header.is_data_file_raw(),
        });
        Self {
            path,
            version: header.version,
            size_bytes: header.size_bytes,
            cluster_bytes: header.geometry.bytes(),
            refcount_bits: 1 << header.refcount_order,
            // Other types are refused with the header.
            compression: Compression::from_type_byte(header.compression_type()).unwrap_or_default(),
            lazy_refcounts: header.has_lazy_refcounts(),
            extended_l2: header.has_extended_l2(),
            data_file,
            encryption: match header.crypt_method {
                CRYPT_NONE => RecordedEncryption::None,
                CRYPT_LUKS => RecordedEncryption::Luks,
                _ => RecordedEncryption::LegacyAes,
            },
            backing: header.backing_name.as_ref().map(|name| RecordedBacking {
                name: text(name),
                format: header.extensions.backing_format.as_ref().map(text),
            }),
            snapshots: header.snapshots,
            is_dirty: header.is_dirty(),
            is_corrupt: header.is_corrupt(),
            read_only: true,
            file_bytes,
        }
    }
}

impl Image {
    /// What the image says of itself.
    pub fn info(&self) -> ImageInfo {
        let core = self.inner.core.lock();
        let used = core.end_bytes();
        let file_bytes = if used == 0 { core.capacity_bytes } else { used };
        ImageInfo {
            read_only: self.inner.limits().read_only,
            ..ImageInfo::of_header(self.inner.path.clone(), &core.header, file_bytes)
        }
    }
}
