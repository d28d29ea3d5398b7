//! What an image asks for and is not done: features, and references that are not followed.

use std::path::PathBuf;

use super::corruption::TableKind;
use crate::units::HostOffset;

/// What an image asks for and this version does not do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Feature {
    /// A version that is not opened yet.
    #[error("version {0} of the format")]
    Version(u32),
    /// Encrypted content, in a way that nobody knows.
    #[error("encryption (method {0})")]
    Encryption(u32),
    /// Encrypted content, in a way that is not safe.
    #[error(
        "legacy AES encryption, which is not safe: convert the image with qemu-img to one with LUKS or without"
    )]
    LegacyEncryption,
    /// Encrypted content, in a build without LUKS.
    #[error("LUKS encryption, which this build leaves out (its feature `luks` is off)")]
    LuksLeftOut,
    /// A version of LUKS other than 1, which is the only one that QEMU opens in images.
    #[error("version {0} of LUKS (only version 1 can be opened)")]
    LuksVersion(u16),
    /// A cipher other than AES in XTS mode with plain or plain64 tweaks.
    #[error("LUKS cipher {0:?}")]
    LuksCipher(String),
    /// A hash that is not SHA-1 or SHA-2.
    #[error("LUKS hash {0:?}")]
    LuksHash(String),
    /// A compression other than deflate.
    #[error("compression type {0}")]
    CompressionType(u8),
    /// Writing compressed clusters where guest data is encrypted or lies in a data file.
    #[error("compressed writes to an image that is encrypted or has a data file")]
    CompressedWrites,
    /// Writing to an image whose refcounts may be wrong.
    #[error(
        "writing to an image that was not closed cleanly (its dirty bit is set): repair it first"
    )]
    WritingDirty,
    /// Writing to an image that says it is broken.
    #[error("writing to an image that is marked corrupt: repair it first")]
    WritingCorrupt,
    /// Incompatible feature bits of which nothing but a name (if that) is known.
    #[error("incompatible features {0}")]
    Unknown(String),
    /// A compressed cluster, in a build without compression.
    #[error("compressed clusters, which this build leaves out (its feature `compression` is off)")]
    CompressionLeftOut,
    /// A VMDK backing file, in a build without VMDK.
    #[error("backing files in VMDK, which this build leaves out (its feature `vmdk` is off)")]
    VmdkLeftOut,
    /// A backing format other than qcow2, raw and vmdk.
    #[error("backing format {0:?}")]
    BackingFormat(String),
    /// Clusters larger than QEMU's.
    #[error("clusters of 2^{0} bytes (at most 2 MiB)")]
    ClusterBits(u32),
    /// An image file for which host offsets have too few bits.
    #[error("an image file of {bytes} bytes")]
    FileTooLarge {
        /// The size that it would have.
        bytes: u64,
    },
    /// A refcount that its width does not hold.
    #[error("a refcount of {needed}, where refcounts have {bits} bits")]
    RefcountTooNarrow {
        /// The width of a refcount in bits.
        bits: u32,
        /// The refcount that would be needed.
        needed: u64,
    },
    /// More internal snapshots than QEMU opens.
    #[error("more than {limit} internal snapshots")]
    TooManySnapshots {
        /// The limit.
        limit: u32,
    },
    /// A snapshot's id or name that does not fit the table.
    #[error("a snapshot id or name of more than {limit} bytes")]
    SnapshotNameTooLong {
        /// The limit in bytes.
        limit: usize,
    },
    /// References so scattered that counting them takes more memory than a check may.
    #[error("counting references that are scattered too widely for {limit} bytes of memory")]
    ScatteredReferences {
        /// The limit in bytes.
        limit: u64,
    },
    /// A header whose extensions and backing name do not fit its cluster.
    #[error("a header of {bytes} bytes (at most {limit})")]
    HeaderTooLarge {
        /// Its size.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// An L2 table that maps two parts of a disk, where only one can be meant.
    #[error("an L2 table (at {at}) that stands for two parts of the disk")]
    TableAtTwoPlaces {
        /// The table.
        at: HostOffset,
    },
    /// More L2 tables inside of clusters than a check follows.
    #[error("more than {limit} L2 tables that do not start on a cluster")]
    UnalignedTables {
        /// The limit.
        limit: u64,
    },
    /// A table larger than its limit.
    #[error("a {table} table of {bytes} bytes (at most {limit})")]
    TableTooLarge {
        /// The table.
        table: TableKind,
        /// Its size.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
}

/// Why a backing file was not opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReferenceError {
    /// The image does not say what format its backing file has; guessing would let a guest choose it.
    #[error("the image does not record the format of its backing file")]
    NoFormat,
    /// `json:` or a protocol.
    #[error("only plain paths are followed, not protocols or json: names")]
    Protocol,
    /// The name is no UTF-8, or holds a NUL.
    #[error("the name is not valid UTF-8")]
    NotUtf8,
    /// The path leaves the folder that references are confined to.
    #[error("it leads to {}, outside {}", target.display(), root.display())]
    Outside {
        /// Where it leads to.
        target: PathBuf,
        /// The folder.
        root: PathBuf,
    },
    /// The header records a backing file and the caller gave none.
    #[error("the caller gave no device for it")]
    Missing,
    /// The caller gave a backing device and the header records none.
    #[error("the caller gave a device for it, and the image records none")]
    Unexpected,
    /// Something that is no regular file.
    #[error("it is not a regular file")]
    NotRegular,
    /// Between the decision that it may be opened and its opening another file took its place.
    #[error("another file took its place while it was opened")]
    Replaced,
    /// The image has an external data file and does not name it.
    #[error("the image does not name its external data file")]
    NoDataFileName,
    /// The caller gave an external data file and the image has none.
    #[error("the caller gave an external data file, and the image has none")]
    UnexpectedDataFile,
    /// The file is already part of the chain.
    #[error("the chain comes back to the same file")]
    Loop,
    /// More layers than [`crate::MAX_CHAIN_DEPTH`].
    #[error("the chain has more than {0} layers")]
    TooDeep(usize),
}
