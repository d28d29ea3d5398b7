//! What a caller asked of an image that no image can be or do.

/// What a new image cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidOption {
    /// No power of two from 512 bytes to 2 MiB.
    #[error("a cluster size of {0} bytes (a power of two from 512 to 2097152 is needed)")]
    ClusterBytes(u32),
    /// No power of two from 1 to 64.
    #[error("refcounts of {0} bits (a power of two from 1 to 64 is needed)")]
    RefcountBits(u32),
    /// Extended L2 entries with clusters that are too small for 32 parts.
    #[error("extended L2 entries with clusters of {0} bytes (at least 16384 are needed)")]
    ExtendedL2ClusterBytes(u32),
    /// Something that version 2 has not.
    #[error("{option} in version 2 (compat=0.10)")]
    NeedsVersion3 {
        /// What.
        option: &'static str,
    },
    /// Clusters that are mapped in advance would hide the backing file.
    #[error("preallocation over a backing file without extended L2 entries")]
    PreallocationOverBackingFile,
    /// A data file that reads like the disk cannot read like the backing file.
    #[error(
        "data_file_raw with a backing file: a raw data file alone has to read as the disk does"
    )]
    RawDataOverBackingFile,
    /// A data file that is encrypted does not read like the disk.
    #[error("a raw data file that is encrypted")]
    EncryptedRawData,
    /// The options name an external data file and the caller gave none.
    #[error("an external data file that the caller has not opened")]
    DataFileMissing,
    /// The caller gave an external data file that the options do not name.
    #[error("an external data file without a name")]
    DataFileUnexpected,
    /// A name of an external data file that is empty, too long or not plain text.
    #[error("a data file name of {len} bytes (at most {limit})")]
    DataFileName {
        /// Its length in bytes.
        len: usize,
        /// The limit.
        limit: usize,
    },
    /// Names that do not fit the header.
    #[error("names that do not fit the header of {limit} bytes")]
    HeaderTooLarge {
        /// The bytes of a cluster.
        limit: usize,
    },
    /// More clusters than a refcount table can count.
    #[error("a refcount table of {bytes} bytes (at most {limit_bytes})")]
    RefcountTable {
        /// Its size.
        bytes: u64,
        /// The limit.
        limit_bytes: u64,
    },
    /// A disk for which the L1 table would pass its limit.
    #[error("a disk of {size_bytes} bytes: with this cluster size at most {limit_bytes}")]
    SizeBytes {
        /// The size asked for.
        size_bytes: u64,
        /// The largest size for the cluster size.
        limit_bytes: u64,
    },
    /// A name that no opening follows.
    #[error(
        "the name {0:?}: only plain paths are followed, not protocols or json: names (./ before a path)"
    )]
    Protocol(String),
    /// A backing name that is empty, too long for the header or not plain text.
    #[error("a backing file name of {len} bytes (at most {limit})")]
    BackingName {
        /// Its length in bytes.
        len: usize,
        /// The room for it.
        limit: usize,
    },
}

/// What cannot be done with an internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// No snapshot has this id or name.
    #[error("there is no snapshot with the id or name {0:?}")]
    NotFound(String),
    /// A snapshot was to be opened for writing.
    #[error("a snapshot can be opened for reading only")]
    ReadOnly,
    /// A name that is too long, or holds a NUL.
    #[error("a snapshot name of {len} bytes (at most {limit}, without NUL)")]
    Name {
        /// Its length in bytes.
        len: usize,
        /// The limit in bytes.
        limit: usize,
    },
    /// Guest data lies in another file, where nothing counts references.
    #[error("an image with an external data file has no internal snapshots")]
    ExternalDataFile,
    /// The disk would change under bitmaps that are to be kept up to date.
    #[error("the image has dirty bitmaps, which would not tell of the change: remove them first")]
    Bitmaps,
}
