//! QCOW2 images: a pure core that knows where things lie, and a thin driver that moves bytes. The format alone lives
//! here; host files are `block`'s, chains of backups and protocols are other crates'.
//!
//! Version 3 images with standard clusters of 512 bytes to 2 MiB, over backing files in QCOW2 or raw format. What an
//! image needs beyond that is refused by name ([`Feature`]).
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use block::{BlockDevice, ByteRange, Durability};
//! use bytes::Bytes;
//! use qcow2::{CreateOptions, Image, OpenOptions};
//!
//! # let dir = tempfile::tempdir()?;
//! # let path = dir.path().join("disk.qcow2");
//! # tokio::runtime::Builder::new_current_thread().build()?.block_on(async {
//! Image::create(&path, &CreateOptions::new(10 << 30)).await?;
//!
//! let image = Image::open(&path, OpenOptions::writing()).await?;
//! image.write(1 << 30, Bytes::from_static(b"hello"), Durability::Durable).await?;
//! let segments = image.read(ByteRange::between((1 << 30) - 1, (1 << 30) + 6)).await?;
//! assert_eq!(segments.to_vec(), b"\0hello\0");
//! image.close().await?;
//! # Ok(()) })
//! # }
//! ```

mod alloc;
mod amend;
mod backing;
mod bitmap;
mod cache;
mod change;
mod check;
mod cipher;
mod clear;
mod codec;
mod compare;
mod compressed;
mod convert;
mod core;
mod create;
mod data;
mod device;
mod encryption;
mod entry;
mod error;
mod fields;
mod flush;
mod fold;
mod free;
mod header;
mod image;
mod info;
mod inspect;
mod layers;
#[cfg(feature = "luks")]
mod luks;
mod mapping;
mod measure;
mod open;
mod overlap;
mod pack;
mod plan;
mod progress;
mod read;
mod refcount;
mod republish;
mod resize;
mod snapshot;
mod snapshots;
mod streams;
mod switch;
mod sync;
mod tally;
mod units;
#[cfg(feature = "vmdk")]
mod vmdk;
mod walk;
mod write;

pub use amend::AmendOptions;
pub use backing::{MAX_CHAIN_DEPTH, References};
pub use bitmap::{
    BitmapError, BitmapInfo, DirtyExtent, MAX_BITMAP_BYTES, MAX_BITMAP_DIRECTORY_BYTES,
    MAX_BITMAP_GRANULARITY_BITS, MAX_BITMAP_NAME_BYTES, MAX_BITMAP_TABLE_ENTRIES, MAX_BITMAPS,
    MIN_BITMAP_GRANULARITY_BITS,
};
pub use cache::{CacheUsage, L2_CACHE_BYTES, REFCOUNT_CACHE_BYTES, cache_usage};
pub use change::ChangeError;
pub use check::{CheckOptions, CheckReport, MAX_LISTED_FINDINGS, Refusal, Repair};
pub use codec::Compression;
pub use compare::{CompareError, CompareOptions, Comparison, compare};
pub use convert::{
    ConvertError, ConvertOptions, ConvertTarget, Converted, MAX_UNREADABLE_RANGES, convert,
};
pub use create::{BackingFormat, BackingName, CreateOptions, DataFileName, Preallocation, Version};
pub use encryption::{
    KeyChange, KeyCost, LuksCipher, LuksHash, LuksInfo, LuksOptions, MAX_UNLOCK_ROUNDS, Passphrase,
    SlotInfo, Slots,
};
pub use error::{
    Corruption, Error, Feature, InvalidOption, KeyError, ReferenceError, SnapshotError, TableKind,
    UnlockError, VmdkError,
};
pub use fold::{
    CommitOptions, FoldError, FoldOptions, FoldPlan, Folded, LayerPlan, MergeOptions,
    RebaseOptions, commit, merge, plan_commit, plan_merge, plan_rebase, rebase,
};
pub use header::{MAX_BACKING_NAME_BYTES, MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES};
pub use image::Image;
pub use info::{ImageInfo, RecordedBacking, RecordedDataFile, RecordedEncryption};
pub use inspect::{Inspection, RecordedBitmap};
pub use layers::{MAX_MAP_EXTENTS, MapExtent};
pub use measure::{
    BitmapSize, MeasureError, MeasureOptions, MeasureTarget, Measured, measure, measure_size,
};
pub use open::OpenOptions;
pub use progress::Progress;
pub use read::{LayerExtent, LayerState};
pub use resize::ResizeOptions;
pub use snapshot::{
    MAX_SNAPSHOT_EXTRA_BYTES, MAX_SNAPSHOT_NAME_BYTES, MAX_SNAPSHOT_TABLE_BYTES, MAX_SNAPSHOTS,
    Snapshot,
};
pub use tally::{EntryPlace, Finding, Severity};
pub use units::{
    ClusterGeometry, DEFAULT_CLUSTER_BYTES, HostOffset, MAX_CLUSTER_BITS, MIN_CLUSTER_BITS,
};
#[cfg(feature = "vmdk")]
pub use vmdk::Vmdk;
