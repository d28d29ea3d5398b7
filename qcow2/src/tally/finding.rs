//! What can be wrong in an image: one variant a rule, with the entry and the offsets in it. Who finds it and what is
//! done about it stands elsewhere.

use std::fmt;

use crate::error::{Corruption, Feature, TableKind};
use crate::units::{GuestOffset, HostOffset};

/// An entry of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryPlace {
    /// The table.
    pub table: TableKind,
    /// Where the entry lies in the image file.
    pub at: HostOffset,
    /// The position of the entry in its table, from 0.
    pub index: u64,
}

impl fmt::Display for EntryPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} table entry {} at {}", self.table, self.index, self.at)
    }
}

/// Something that is wrong in an image.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Finding {
    /// A cluster is counted more often than it is used.
    #[error("cluster at {at} is leaked: refcount {refcount}, references {references}")]
    Leaked {
        /// The cluster.
        at: HostOffset,
        /// What the image counts.
        refcount: u64,
        /// How often it is used.
        references: u64,
    },
    /// A cluster is used more often than it is counted: it would be taken for something else while it is in use.
    #[error("cluster at {at} is in use: refcount {refcount}, references {references}")]
    CountTooLow {
        /// The cluster.
        at: HostOffset,
        /// What the image counts.
        refcount: u64,
        /// How often it is used.
        references: u64,
    },
    /// A cluster is used more often than a refcount of this image can say.
    #[error("cluster at {at} has {references} references, and refcounts end at {limit}")]
    CountOverflow {
        /// The cluster.
        at: HostOffset,
        /// How often it is used.
        references: u64,
        /// The largest refcount.
        limit: u64,
    },
    /// The COPIED flag of an active entry does not say whether the refcount is one.
    #[error("{entry}: {raw:#018x} has the wrong COPIED flag, the refcount is {refcount}")]
    CopiedFlag {
        /// The entry.
        entry: EntryPlace,
        /// What it holds.
        raw: u64,
        /// The refcount of what it points at.
        refcount: u64,
    },
    /// A cluster of metadata is used for something else, too.
    #[error("cluster at {at} holds a part of a {table} table and is used for something else, too")]
    Overlap {
        /// The cluster.
        at: HostOffset,
        /// The metadata in it.
        table: TableKind,
    },
    /// An entry names a cluster that holds metadata, too, or has more references than a refcount can say. A repair
    /// copies what the cluster holds to another one, which the entry names from then on.
    #[error("{entry}: {raw:#018x}{} names a cluster that it cannot share", Guest(*guest))]
    Shared {
        /// The entry.
        entry: EntryPlace,
        /// What it holds, or held.
        raw: u64,
        /// What it maps of the present disk, where it does.
        guest: Option<GuestOffset>,
    },
    /// An entry of the snapshot table breaks the format, and what it refers to is known all the same.
    #[error("the snapshot table at {at}: {what}")]
    SnapshotEntry {
        /// The entry.
        at: HostOffset,
        /// What is wrong with it.
        what: Corruption,
    },
    /// Internal snapshots that cannot be read, from one position of their table on.
    #[error(
        "snapshots from {snapshot} (from 0) to the end of their table, {count} in all, cannot be read"
    )]
    SnapshotsLost {
        /// The position of the first in the snapshot table, from 0.
        snapshot: u64,
        /// How many.
        count: u64,
    },
    /// An internal snapshot whose L1 table cannot be read.
    #[error(
        "snapshot {snapshot} (from 0, {name:?}) has no L1 table in the file: {entries} entries at {at}"
    )]
    SnapshotLost {
        /// The position in the snapshot table, from 0.
        snapshot: u64,
        /// Its name.
        name: String,
        /// Where its L1 table should start.
        at: HostOffset,
        /// The entries of its L1 table.
        entries: u64,
    },
    /// An entry sets bits that must be zero.
    #[error("{entry}: {raw:#018x} sets reserved bits")]
    ReservedBits {
        /// The entry.
        entry: EntryPlace,
        /// What it holds.
        raw: u64,
    },
    /// An entry points into the middle of a cluster.
    #[error("{entry}: {raw:#018x} is not aligned to a cluster")]
    Unaligned {
        /// The entry.
        entry: EntryPlace,
        /// What it holds.
        raw: u64,
    },
    /// An entry that reads as zeros reserves the middle of a cluster.
    #[error("{entry}: {raw:#018x} reserves space that is not aligned to a cluster")]
    UnalignedReserve {
        /// The entry.
        entry: EntryPlace,
        /// What it holds.
        raw: u64,
    },
    /// An entry points at something that lies behind the end of the file by a cluster or more.
    #[error("{entry} points at {len} bytes at {at}, behind the end of the file")]
    BehindFile {
        /// The entry.
        entry: EntryPlace,
        /// What it points at.
        at: HostOffset,
        /// The length of that in bytes.
        len: u64,
    },
    /// An entry of a compressed cluster has the COPIED flag.
    #[error("{entry}: {raw:#018x} is compressed and has the COPIED flag")]
    CompressedCopied {
        /// The entry.
        entry: EntryPlace,
        /// What it holds.
        raw: u64,
    },
    /// A compressed cluster in an image with an external data file.
    #[error("{entry}: {raw:#018x} is compressed in an image with an external data file")]
    CompressedExternal {
        /// The entry.
        entry: EntryPlace,
        /// What it holds.
        raw: u64,
    },
    /// A compressed cluster with subclusters.
    #[error("{entry}: {raw:#018x} is compressed and has subclusters {bitmap:#018x}")]
    CompressedSubclusters {
        /// The entry.
        entry: EntryPlace,
        /// What it holds.
        raw: u64,
        /// Its subclusters.
        bitmap: u64,
    },
    /// A subcluster that is allocated and zero at once.
    #[error("{entry}: {raw:#018x} has subclusters that are allocated and zero: {bitmap:#018x}")]
    SubclustersContradict {
        /// The entry.
        entry: EntryPlace,
        /// What it holds.
        raw: u64,
        /// Its subclusters.
        bitmap: u64,
    },
    /// Allocated subclusters of no cluster.
    #[error("{entry}: {raw:#018x} has allocated subclusters and no cluster: {bitmap:#018x}")]
    SubclustersWithoutCluster {
        /// The entry.
        entry: EntryPlace,
        /// What it holds.
        raw: u64,
        /// Its subclusters.
        bitmap: u64,
    },
    /// Internal snapshots in an image with an external data file.
    #[error(
        "the image has an external data file and {snapshots} snapshots, which exclude each other"
    )]
    SnapshotsWithExternalData {
        /// How many.
        snapshots: u64,
    },
    /// The L1 table of a snapshot is too long, or does not start on a cluster.
    #[error("snapshot {snapshot} (from 0) has no valid L1 table: {entries} entries at {at}")]
    SnapshotTable {
        /// The position in the snapshot table, from 0.
        snapshot: u64,
        /// Where its L1 table should start.
        at: HostOffset,
        /// The entries of its L1 table.
        entries: u64,
    },
    /// An entry of the snapshot table does not tell the size of its disk, as version 3 demands.
    #[error("snapshot {snapshot} (from 0) does not tell the size of its disk")]
    ShortSnapshot {
        /// The position in the snapshot table, from 0.
        snapshot: u64,
    },
    /// A table that leads to others breaks its format: what it refers to is not known.
    #[error("the {table} table at {at} cannot be read: {what}")]
    Unreadable {
        /// The table.
        table: TableKind,
        /// Where it lies, or its entry that is wrong.
        at: HostOffset,
        /// What is wrong with it.
        what: Corruption,
    },
    /// A table that leads to others passes a limit: what it refers to is not known.
    #[error("the {table} table at {at} is not followed: {what}")]
    BeyondLimits {
        /// The table.
        table: TableKind,
        /// Where it lies.
        at: HostOffset,
        /// The limit.
        what: Feature,
    },
    /// A refcount block that is used for something else, too.
    #[error("{entry}: the refcount block at {at} has {references} references")]
    SharedRefcountBlock {
        /// The entry of the refcount table.
        entry: EntryPlace,
        /// The block.
        at: HostOffset,
        /// How often its cluster is used so far.
        references: u64,
    },
}

/// Where the guest sees something, if it does.
struct Guest(Option<GuestOffset>);

impl fmt::Display for Guest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(at) => write!(f, " (guest offset {at})"),
            None => Ok(()),
        }
    }
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Space is lost and nothing else.
    Leak,
    /// Data is lost, or will be when the image is written to.
    Corruption,
    /// The check itself is not complete.
    Unchecked,
}

impl Finding {
    /// Whether nothing but space is lost by it.
    pub const fn is_leak(&self) -> bool {
        matches!(self, Self::Leaked { .. })
    }

    /// How bad it is.
    pub const fn severity(&self) -> Severity {
        match self {
            Self::Leaked { .. } => Severity::Leak,
            Self::Unreadable { .. } | Self::BeyondLimits { .. } => Severity::Unchecked,
            _ => Severity::Corruption,
        }
    }
}
