//! What an image can refuse or fail at: one variant a rule, with the file and the numbers in it. How a protocol
//! spells an error is decided by the protocol, from [`block::DeviceError::kind`].

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use block::{CpuError, DeviceError, ErrorKind, HostError};

use crate::bitmap::BitmapError;
use crate::codec::Compression;
use crate::tally::Finding;
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

/// Why an encrypted image was not opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UnlockError {
    /// The caller gave no passphrase.
    #[error("it is encrypted and no passphrase was given")]
    NoPassphrase,
    /// No key slot opens with a passphrase of the caller.
    #[error("it is encrypted and the passphrase opens none of its key slots")]
    WrongPassphrase,
    /// A key slot asks for more rounds of PBKDF2 than this machine does in [`crate::OpenOptions::unlock_time`], and
    /// those that were tried do not open with a passphrase of the caller.
    #[error(
        "it is encrypted and key slot {slot} was not tried: it asks for {rounds} rounds of PBKDF2, and this machine does \
         {limit} in the time that is allowed for a slot"
    )]
    TooMuchWork {
        /// The slot, counted from 0.
        slot: usize,
        /// The rounds that it asks for, with those of the digest that tells the right key.
        rounds: u64,
        /// The limit.
        limit: u64,
    },
}

/// Why the keys of an encrypted image were not changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// The image has no keys.
    #[error("it is not encrypted")]
    NotEncrypted,
    /// There are slots 0 to 7.
    #[error("there is no key slot {0}, only 0 to 7")]
    NoSuchSlot(usize),
    /// All slots have keys.
    #[error("all key slots are in use")]
    NoFreeSlot,
    /// The slot has a key, which nobody asked to lose.
    #[error("key slot {0} is in use")]
    SlotInUse(usize),
    /// The slot has no key.
    #[error("key slot {0} is empty")]
    SlotEmpty(usize),
    /// Nothing would open the image any more.
    #[error("no key would be left, and nothing could open the image again")]
    LastKey,
}

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
    #[error("a raw data file over a backing file")]
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

/// Why an image could not be created, opened, read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The image breaks its format. Parts that do not depend on what is broken stay readable.
    #[error("{} is corrupt at {at}: {what}", file.display())]
    Corrupt {
        /// The image.
        file: PathBuf,
        /// The offset in it.
        at: HostOffset,
        /// The rule that is broken.
        what: Corruption,
    },
    /// The image is fine and asks for more than this version does.
    #[error("{} needs what is not supported: {feature}", file.display())]
    Unsupported {
        /// The image.
        file: PathBuf,
        /// What it asks for.
        feature: Feature,
    },
    /// The host failed.
    #[error(transparent)]
    Host(#[from] HostError),
    /// A file that an image refers to was not opened: what lies below it, its data file or an extent.
    #[error("{} refers to {name:?}: {reason}", file.display())]
    Reference {
        /// The image that refers to it.
        file: PathBuf,
        /// The name as recorded.
        name: String,
        /// Why not.
        reason: ReferenceError,
    },
    /// An encrypted image was not opened.
    #[error("{} stays locked: {reason}", file.display())]
    Locked {
        /// The image.
        file: PathBuf,
        /// Why.
        reason: UnlockError,
    },
    /// The keys of an encrypted image were not changed.
    #[error("the keys of {} stay as they are: {reason}", file.display())]
    Key {
        /// The image.
        file: PathBuf,
        /// Why.
        reason: KeyError,
    },
    /// The system has no random numbers for keys.
    #[error("no random numbers for keys: {source}")]
    NoRandomness {
        /// What the system said.
        source: std::io::Error,
    },
    /// A VMDK image was not opened.
    #[error("{} is no VMDK that can be read: {what}", file.display())]
    Vmdk {
        /// The image.
        file: PathBuf,
        /// Why not.
        what: VmdkError,
    },
    /// A path could not be resolved.
    #[error("cannot resolve {}: {source}", path.display())]
    Path {
        /// The path.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The backing file failed.
    #[error("backing file of {}: {source}", file.display())]
    Backing {
        /// The image above it.
        file: PathBuf,
        /// What it answered.
        source: DeviceError,
    },
    /// A new image cannot be made like this.
    #[error("cannot create {}: {what}", file.display())]
    Invalid {
        /// The image that was to be.
        file: PathBuf,
        /// What is wrong.
        what: InvalidOption,
    },
    /// Something is wrong with the image that has to be repaired before its metadata can be written anew.
    #[error("{} must be repaired first, run check: {finding}", file.display())]
    Damaged {
        /// The image.
        file: PathBuf,
        /// What was found first.
        finding: Box<Finding>,
    },
    /// Not everything that the image refers to is understood, so that what seems free may not be.
    #[error("{} refers to clusters in a way that is not understood", file.display())]
    Uncountable {
        /// The image.
        file: PathBuf,
    },
    /// A change of the metadata was given up in the moment when it took effect.
    #[error("a change of {} was given up while its header was written", file.display())]
    Abandoned {
        /// The image.
        file: PathBuf,
    },
    /// Something cannot be done with an internal snapshot.
    #[error("{}: {what}", file.display())]
    Snapshot {
        /// The image.
        file: PathBuf,
        /// What, and why not.
        what: SnapshotError,
    },
    /// An image cannot be changed like this.
    #[error("cannot change {}: {what}", file.display())]
    Change {
        /// The image.
        file: PathBuf,
        /// What is wrong.
        what: crate::change::ChangeError,
    },
    /// A request that leaves the disk, or a change to a read-only one.
    #[error(transparent)]
    Request(DeviceError),
    /// A computation (of a compression or a key) broke down, which is a defect of ours and not of the image.
    #[error("{}: {source}", file.display())]
    Cpu {
        /// The image.
        file: PathBuf,
        /// What happened.
        source: CpuError,
    },
    /// Writing metadata failed earlier: what is on disk is consistent, what is in memory is not to be trusted.
    #[error("{} must be reopened, because writing its metadata failed: {first}", file.display())]
    Poisoned {
        /// The image.
        file: PathBuf,
        /// The first failure.
        first: Arc<Error>,
    },
    /// Something cannot be done with a bitmap.
    #[error("bitmap {name:?} of {}: {reason}", file.display())]
    Bitmap {
        /// The image.
        file: PathBuf,
        /// The name of the bitmap.
        name: String,
        /// Why not.
        reason: BitmapError,
    },
    /// The image is closed or closing.
    #[error("{} is closed", file.display())]
    Closed {
        /// The image.
        file: PathBuf,
    },
}

impl Error {
    /// The class of this error.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Corrupt { .. }
            | Self::Path { .. }
            | Self::NoRandomness { .. }
            | Self::Vmdk { .. }
            | Self::Poisoned { .. }
            | Self::Cpu { .. }
            | Self::Damaged { .. }
            | Self::Uncountable { .. }
            | Self::Abandoned { .. } => ErrorKind::Io,
            Self::Unsupported { .. } => ErrorKind::NotSupported,
            Self::Host(error) => error.kind(),
            Self::Reference { .. }
            | Self::Change { .. }
            | Self::Invalid { .. }
            | Self::Locked { .. }
            | Self::Snapshot { .. }
            | Self::Bitmap { .. }
            | Self::Key { .. } => ErrorKind::Invalid,
            Self::Backing { source, .. } | Self::Request(source) => source.kind(),
            Self::Closed { .. } => ErrorKind::ShuttingDown,
        }
    }
}

impl From<Error> for DeviceError {
    fn from(error: Error) -> Self {
        match error {
            Error::Host(error) => Self::Host(error),
            Error::Request(error) => error,
            Error::Closed { .. } => Self::Closed,
            other => Self::Backend { kind: other.kind(), source: Box::new(other) },
        }
    }
}

/// What the pure core answers when it cannot go on: an [`Error`] that does not know its file yet.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The image breaks its format.
    #[error("corrupt at {at}: {what}")]
    Corrupt {
        /// The offset in the file.
        at: HostOffset,
        /// The rule that is broken.
        what: Corruption,
    },
    /// The image asks for what is not supported.
    #[error("what is not supported: {0}")]
    Unsupported(Feature),
}

impl Fault {
    /// The error for the image `file`.
    pub(crate) fn of(self, file: &std::path::Path) -> Error {
        let file = file.to_owned();
        match self {
            Self::Corrupt { at, what } => Error::Corrupt { file, at, what },
            Self::Unsupported(feature) => Error::Unsupported { file, feature },
        }
    }
}
