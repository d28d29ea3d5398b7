//! What a new image is to be: the options, and which of them go together. Nothing is made here.

use crate::backing::has_protocol;
use crate::codec::Compression;
use crate::create::layout::Layout;
use crate::encryption::LuksOptions;
use crate::error::InvalidOption;
use crate::header::{MAX_BACKING_NAME_BYTES, largest_disk_bytes};
use crate::units::{ClusterGeometry, DEFAULT_CLUSTER_BYTES};

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

/// An external data file as an image records it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataFileName {
    /// The path, relative to the folder of the image that records it (or absolute).
    pub path: String,
    /// The data file always reads like the disk, without the image. Then all clusters are mapped from the start.
    pub raw: bool,
}

/// The version of the format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Version {
    /// Version 2, which QEMU calls `compat=0.10`: for programs from before 2012.
    V2,
    /// Version 3, which QEMU calls `compat=1.1`.
    #[default]
    V3,
}

impl Version {
    /// The number in the header.
    pub const fn number(self) -> u32 {
        match self {
            Self::V2 => 2,
            Self::V3 => 3,
        }
    }

    /// The name that QEMU uses.
    pub const fn compat(self) -> &'static str {
        match self {
            Self::V2 => "0.10",
            Self::V3 => "1.1",
        }
    }
}

/// What of a new area is made in advance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// The mapping. The file gets its length, as a hole.
    Metadata,
    /// The mapping, and space on the host without writing it.
    Falloc,
    /// The mapping, and zeros are written.
    Full,
}

impl Preallocation {
    /// The name that QEMU uses.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Metadata => "metadata",
            Self::Falloc => "falloc",
            Self::Full => "full",
        }
    }
}

/// What a new image is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// The size of the virtual disk in bytes. QEMU sees whole sectors of 512 bytes only.
    pub size_bytes: u64,
    /// The size of a cluster in bytes: a power of two from 512 to 2 MiB.
    pub cluster_bytes: u32,
    /// The version of the format. Everything below but the backing file needs version 3.
    pub version: Version,
    /// L2 entries tell of 32 parts of each cluster; for clusters of 16 KiB and more.
    pub extended_l2: bool,
    /// The width of a refcount in bits: a power of two up to 64.
    pub refcount_bits: u32,
    /// Refcounts may stay behind while the image is open for writing; after a crash they are rebuilt.
    pub lazy_refcounts: bool,
    /// How clusters are compressed that are written compressed.
    pub compression: Compression,
    /// The external data file.
    pub data_file: Option<DataFileName>,
    /// The backing file, which need not exist yet.
    pub backing: Option<BackingName>,
    /// What is made in advance.
    pub preallocation: Preallocation,
    /// How guest data is encrypted.
    pub encryption: Option<LuksOptions>,
}

impl CreateOptions {
    /// A disk of `size_bytes` bytes in clusters of 64 KiB, without a backing file.
    pub fn new(size_bytes: u64) -> Self {
        Self {
            size_bytes,
            cluster_bytes: DEFAULT_CLUSTER_BYTES,
            version: Version::default(),
            extended_l2: false,
            refcount_bits: 16,
            lazy_refcounts: false,
            compression: Compression::default(),
            data_file: None,
            backing: None,
            preallocation: Preallocation::default(),
            encryption: None,
        }
    }

    /// The same with another cluster size.
    #[must_use]
    pub fn cluster_bytes(self, cluster_bytes: u32) -> Self {
        Self { cluster_bytes, ..self }
    }

    /// The same in another version of the format.
    #[must_use]
    pub fn version(self, version: Version) -> Self {
        Self { version, ..self }
    }

    /// The same with or without extended L2 entries.
    #[must_use]
    pub fn extended_l2(self, extended_l2: bool) -> Self {
        Self { extended_l2, ..self }
    }

    /// The same with another width of refcounts.
    #[must_use]
    pub fn refcount_bits(self, refcount_bits: u32) -> Self {
        Self { refcount_bits, ..self }
    }

    /// The same with or without lazy refcounts.
    #[must_use]
    pub fn lazy_refcounts(self, lazy_refcounts: bool) -> Self {
        Self { lazy_refcounts, ..self }
    }

    /// The same with another way to compress clusters.
    #[must_use]
    pub fn compression(self, compression: Compression) -> Self {
        Self { compression, ..self }
    }

    /// The same with guest data in a file of its own, which is made together with the image.
    #[must_use]
    pub fn data_file(self, path: impl Into<String>, raw: bool) -> Self {
        Self { data_file: Some(DataFileName { path: path.into(), raw }), ..self }
    }

    /// The same over a backing file.
    #[must_use]
    pub fn backing(self, path: impl Into<String>, format: BackingFormat) -> Self {
        Self { backing: Some(BackingName { path: path.into(), format }), ..self }
    }

    /// The same with something made in advance.
    #[must_use]
    pub fn preallocation(self, preallocation: Preallocation) -> Self {
        Self { preallocation, ..self }
    }

    /// The same with encrypted guest data.
    #[must_use]
    pub fn encryption(self, encryption: LuksOptions) -> Self {
        Self { encryption: Some(encryption), ..self }
    }

    /// Refuses what no image can be, as `qemu-img` does. Making an image does so, too; asked before, nothing is touched.
    ///
    /// # Errors
    /// [`InvalidOption`], for the first rule that is broken.
    pub fn check(&self) -> Result<(), InvalidOption> {
        let geometry = self.geometry()?;
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 {
            return Err(InvalidOption::RefcountBits(self.refcount_bits));
        }
        if self.version == Version::V2
            && let Some(option) = self.needs_version_3()
        {
            return Err(InvalidOption::NeedsVersion3 { option });
        }
        let limit_bytes = largest_disk_bytes(geometry);
        if self.size_bytes > limit_bytes {
            return Err(InvalidOption::SizeBytes { size_bytes: self.size_bytes, limit_bytes });
        }
        if self.backing.is_some() {
            if self.preallocation != Preallocation::Off && !self.extended_l2 {
                return Err(InvalidOption::PreallocationOverBackingFile);
            }
            if self.data_file.as_ref().is_some_and(|file| file.raw) {
                return Err(InvalidOption::RawDataOverBackingFile);
            }
        }
        if self.encryption.is_some() && self.data_file.as_ref().is_some_and(|file| file.raw) {
            return Err(InvalidOption::EncryptedRawData);
        }
        let limit = MAX_BACKING_NAME_BYTES;
        let bad = |name: &str| name.is_empty() || name.len() > limit || name.contains('\0');
        if let Some(name) = self.backing.as_ref().map(|b| &b.path).filter(|name| bad(name)) {
            return Err(InvalidOption::BackingName { len: name.len(), limit });
        }
        if let Some(name) = self.data_file.as_ref().map(|d| &d.path).filter(|name| bad(name)) {
            return Err(InvalidOption::DataFileName { len: name.len(), limit });
        }
        let names =
            [self.backing.as_ref().map(|b| &b.path), self.data_file.as_ref().map(|d| &d.path)];
        if let Some(name) = names.into_iter().flatten().find(|name| has_protocol(name)) {
            return Err(InvalidOption::Protocol(name.clone()));
        }
        // What is left is room for all of it.
        Layout::new(self, Vec::new()).map(drop)
    }

    pub(super) fn geometry(&self) -> Result<ClusterGeometry, InvalidOption> {
        let geometry = ClusterGeometry::of_bytes(self.cluster_bytes)
            .ok_or(InvalidOption::ClusterBytes(self.cluster_bytes))?;
        if !self.extended_l2 {
            return Ok(geometry);
        }
        let extended = geometry.extended();
        extended.ok_or(InvalidOption::ExtendedL2ClusterBytes(self.cluster_bytes))
    }

    fn needs_version_3(&self) -> Option<&'static str> {
        let prepared = self.preallocation != Preallocation::Off;
        [
            (self.extended_l2, "extended L2 entries"),
            (self.lazy_refcounts, "lazy refcounts"),
            (self.refcount_bits != 16, "refcounts that have not 16 bits"),
            (self.data_file.is_some(), "an external data file"),
            (self.compression != Compression::Deflate, "a compression type"),
            (self.encryption.is_some() && prepared, "preallocation of encrypted data"),
        ]
        .into_iter()
        .find_map(|(asked, option)| asked.then_some(option))
    }

    /// What is made in advance in the end: a raw data file needs all of its mapping.
    pub(super) fn preallocated(&self) -> Preallocation {
        match self.preallocation {
            Preallocation::Off if self.data_file.as_ref().is_some_and(|file| file.raw) => {
                Preallocation::Metadata
            }
            mode => mode,
        }
    }
}
