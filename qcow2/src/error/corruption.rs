//! How an image breaks its format: one variant a rule, with the numbers in it.

use std::fmt;

use crate::codec::Compression;
use crate::units::HostOffset;

/// Which table an entry stands in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TableKind {
    /// The table of L2 tables.
    L1,
    /// A table of clusters.
    L2,
    /// The table of refcount blocks.
    RefcountTable,
    /// A block of refcounts.
    RefcountBlock,
    /// The table of a bitmap.
    Bitmap,
    /// The table of internal snapshots.
    Snapshots,
    /// The L1 table of an internal snapshot.
    SnapshotL1,
    /// The header with all that lies in its cluster.
    Header,
    /// The header of LUKS with its key material.
    Encryption,
    /// The list of bitmaps.
    BitmapDirectory,
    /// The bits of a bitmap.
    BitmapData,
}

impl fmt::Display for TableKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::L1 => "L1",
            Self::L2 => "L2",
            Self::RefcountTable => "refcount",
            Self::RefcountBlock => "refcount block",
            Self::Bitmap => "bitmap",
            Self::Snapshots => "snapshot",
            Self::SnapshotL1 => "snapshot's L1",
            Self::Header => "header",
            Self::Encryption => "encryption header",
            Self::BitmapDirectory => "bitmap directory",
            Self::BitmapData => "bitmap data",
        })
    }
}

/// How an image breaks its format.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Corruption {
    /// The file does not begin with `QFI\xfb`.
    #[error("no qcow2 magic number")]
    NoMagic,
    /// The file ends inside a structure.
    #[error("the file ends inside {what}")]
    Truncated {
        /// The structure.
        what: &'static str,
    },
    /// A header field holds a value that the format forbids.
    #[error("header field {field} holds {value}, which the format forbids")]
    HeaderField {
        /// The name of the field in the specification.
        field: &'static str,
        /// What it holds.
        value: u64,
    },
    /// A table that the header points at does not start on a cluster.
    #[error("the {table} table starts at {value:#x}, which is no cluster of this file")]
    TablePlace {
        /// The table.
        table: TableKind,
        /// Where the header says that it starts.
        value: u64,
    },
    /// The L1 table is too short for the disk.
    #[error("the L1 table has {entries} entries and the disk needs {needed}")]
    L1TooShort {
        /// The entries that it has.
        entries: u64,
        /// The entries that the disk needs.
        needed: u64,
    },
    /// A header extension passes the header's cluster.
    #[error("header extension {kind:#010x} of {len} bytes passes the end of the header")]
    ExtensionPastEnd {
        /// The type of the extension.
        kind: u32,
        /// Its length in bytes.
        len: u64,
    },
    /// The backing file's name does not lie in the header's cluster.
    #[error("the backing file name of {len} bytes at {at:#x} does not fit the header")]
    BackingName {
        /// Where it should start.
        at: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// An offset that is no multiple of the cluster size.
    #[error("{table} table entry {raw:#018x} is not aligned to a cluster")]
    Unaligned {
        /// The table.
        table: TableKind,
        /// The entry.
        raw: u64,
    },
    /// An extended L2 entry says of a subcluster that it is data and zeros, or data without a cluster.
    #[error("L2 table entry {raw:#018x} has the impossible subclusters {bitmap:#018x}")]
    SubclusterBits {
        /// The first word of the entry.
        raw: u64,
        /// The second word: what is zero above what is data.
        bitmap: u64,
    },
    /// An entry of an image with a data file points at another place in it than the guest's.
    #[error("L2 table entry points at {host} of the data file instead of {guest:#x}")]
    NotAtGuestOffset {
        /// Where it points.
        host: HostOffset,
        /// Where it should.
        guest: u64,
    },
    /// A bit that must be zero.
    #[error("{table} table entry {raw:#018x} sets reserved bits")]
    ReservedBits {
        /// The table.
        table: TableKind,
        /// The entry.
        raw: u64,
    },
    /// An entry points at the header, the L1 table or the refcount table.
    #[error("{table} table entry points at {host}, where metadata lives")]
    OverlapsMetadata {
        /// The table.
        table: TableKind,
        /// What it points at.
        host: HostOffset,
    },
    /// Two entries point at one cluster, and each says that it is its own.
    #[error("{table} table entry points at {host}, which another entry calls its own, too")]
    UsedTwice {
        /// The table.
        table: TableKind,
        /// What it points at.
        host: HostOffset,
    },
    /// A cluster is used and counts as free.
    #[error("the cluster at {host} is in use with a refcount of 0")]
    NotCounted {
        /// The cluster.
        host: HostOffset,
    },
    /// A table lies behind the end of the file.
    #[error("{table} table entry points at {host}, behind the end of the file")]
    BehindFile {
        /// The table.
        table: TableKind,
        /// What it points at.
        host: HostOffset,
    },
    /// A field of a snapshot holds a value that the format forbids.
    #[error("snapshot {entry} (from 0): field {field} holds {value}, which the format forbids")]
    SnapshotField {
        /// The position in the snapshot table, from 0.
        entry: u32,
        /// The name of the field in the specification.
        field: &'static str,
        /// What it holds.
        value: u64,
    },
    /// A snapshot's disk has a size that no disk can have.
    #[error("a snapshot's disk of {bytes} bytes (with this cluster size at most {limit_bytes})")]
    SnapshotDisk {
        /// The size of the disk in bytes.
        bytes: u64,
        /// The largest size for the cluster size.
        limit_bytes: u64,
    },
    /// A snapshot's id or name holds a NUL.
    #[error("snapshot {entry} (from 0): the {what} holds a NUL")]
    SnapshotText {
        /// The position in the snapshot table, from 0.
        entry: u32,
        /// Which text.
        what: &'static str,
    },
    /// A compressed cluster that its algorithm cannot make sense of.
    #[error("the compressed cluster is no {compression} stream of one cluster")]
    CompressedGarbage {
        /// The algorithm that the header names.
        compression: Compression,
    },
    /// A compressed cluster that ends before it is a cluster.
    #[error("the compressed cluster ends after {bytes} of {cluster} bytes ({compression})")]
    CompressedShort {
        /// The algorithm that the header names.
        compression: Compression,
        /// The bytes that it holds.
        bytes: u64,
        /// The bytes of a cluster.
        cluster: u64,
    },
    /// The autoclear bit says that there are bitmaps, and the extension is not there.
    #[error("the bitmaps bit is set without a bitmaps extension")]
    BitmapsWithoutExtension,
    /// A field of the bitmaps extension or of the bitmap directory holds what the format forbids.
    #[error("{field} of the bitmaps holds {value:#x}, which the format forbids")]
    BitmapField {
        /// The name of the field in the specification.
        field: &'static str,
        /// What it holds.
        value: u64,
    },
    /// Two bitmaps have one name.
    #[error("there are two bitmaps named {name:?}")]
    BitmapName {
        /// The name.
        name: String,
    },
    /// A header extension holds what the format forbids.
    #[error("header extension {kind:#010x}: {rule}")]
    ExtensionContent {
        /// The type of the extension.
        kind: u32,
        /// The rule that it breaks.
        rule: &'static str,
    },
    /// The autoclear bit says that the external data file reads like the disk, which cannot be.
    #[error("the raw external data bit is set without a data file, or with a backing file")]
    RawData,
    /// The image says that it is encrypted by LUKS, and not where its LUKS header is.
    #[error("the image is encrypted by LUKS without an encryption header")]
    NoEncryptionHeader,
    /// The encryption header does not start on a cluster of the file, or does not end in it.
    #[error("the encryption header of {len} bytes at {at:#x} is not in clusters of this file")]
    EncryptionHeaderPlace {
        /// Where it should start.
        at: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// A field of the LUKS header holds a value that the format forbids.
    #[error("LUKS header field {field} holds {value}, which the format forbids")]
    LuksField {
        /// The name of the field in the specification.
        field: &'static str,
        /// What it holds.
        value: u64,
    },
    /// A text of the LUKS header does not end, or is no text.
    #[error("LUKS header field {field} is no text that ends")]
    LuksText {
        /// The name of the field in the specification.
        field: &'static str,
    },
    /// The material of a key slot lies where something else does.
    #[error("the material of LUKS key slot {slot} overlaps what it must not")]
    LuksOverlap {
        /// The slot, counted from 0.
        slot: usize,
    },
}
