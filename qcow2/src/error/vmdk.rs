//! Why a VMDK image was not opened.

use std::path::PathBuf;

/// Why a VMDK image was not opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmdkError {
    /// It is broken, or of a kind that the library does not read.
    #[error(transparent)]
    Library(Box<dyn std::error::Error + Send + Sync>),
    /// It is a delta over another image.
    #[error("it is a delta, which needs its parent: consolidate it first")]
    Parent,
    /// Its text descriptor is no text that anybody wrote.
    #[error("a descriptor of {0} bytes")]
    LongDescriptor(u64),
    /// Its disk is larger than any file.
    #[error("a disk of {0} bytes")]
    Size(u64),
    /// Its extents do not add up to the disk.
    #[error("its extents do not make up its disk of {size_bytes} bytes")]
    Extents {
        /// The size of the disk in bytes.
        size_bytes: u64,
    },
    /// A disk of a kind that is not read.
    #[error("a disk of the kind {0:?}")]
    Kind(String),
    /// A line of its descriptor that should be an extent, counted from 1.
    #[error("line {0} of its descriptor is no extent that is understood")]
    Line(usize),
    /// More extents than `MAX_VMDK_EXTENTS`.
    #[error("its descriptor names more than {0} extents")]
    TooManyExtents(usize),
    /// A file with less of the disk than its descriptor says.
    #[error("the extent {} is too short", .0.display())]
    ShortExtent(PathBuf),
}
