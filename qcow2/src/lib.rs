//! QCOW2 images: a pure core that knows where things lie, and a thin driver that moves bytes. The format alone lives
//! here; host files are `block`'s, chains of backups and protocols are other crates'.
//!
//! Versions 2 and 3 with all that the format has: every cluster size and refcount width, subclusters, compression (the
//! feature `compression`, on unless switched off), external data files, LUKS (feature `luks`), internal snapshots,
//! persistent bitmaps, over backing files in QCOW2, raw or VMDK (feature `vmdk`). What is not known is refused by name
//! ([`Feature`]).
//!
//! [`Image`] is a disk; [`Image::check`] judges and mends one; [`convert()`], [`compare()`], [`commit`], [`rebase`] and
//! [`merge`] move whole disks. [`sans_io`] is the core alone, for programs with I/O of their own.
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
//!
//! How it is stored, points in time inside the file, what changed since, a smaller copy, and a judgement:
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use std::sync::Arc;
//!
//! use block::{BlockDevice, ByteRange, Durability};
//! use qcow2::{CheckOptions, Compression, ConvertOptions, ConvertTarget, CreateOptions, Image, OpenOptions};
//!
//! # let dir = tempfile::tempdir()?;
//! # let (path, small) = (dir.path().join("disk.qcow2"), dir.path().join("small.qcow2"));
//! # tokio::runtime::Builder::new_current_thread().build()?.block_on(async {
//! Image::create(&path, &CreateOptions::new(1 << 30)).await?;
//! let image = Image::open(&path, OpenOptions::writing()).await?;
//! image.write(0, vec![1; 1 << 20].into(), Durability::Deferred).await?;
//! assert_eq!(image.map(ByteRange::between(0, 1 << 30)).await?.len(), 2); // Data, then nothing.
//!
//! image.create_snapshot("before").await?;
//! image.add_bitmap("since", 65536, true).await?;
//! image.write(1 << 20, vec![2; 65536].into(), Durability::Deferred).await?;
//! let changed = image.dirty_extents("since", ByteRange::between(0, 1 << 30)).await?;
//! assert!(changed.iter().any(|extent| extent.dirty && extent.range.start() == 1 << 20));
//! image.close().await?;
//!
//! let source: Arc<dyn BlockDevice> = Arc::new(Image::open(&path, OpenOptions::reading()).await?);
//! Image::create(&small, &CreateOptions::new(1 << 30).compression(Compression::Zstd)).await?;
//! let target = Image::open(&small, OpenOptions::writing()).await?;
//! let into = ConvertTarget::Compressed { image: target.clone(), level: None };
//! qcow2::convert(source, &into, &ConvertOptions::default(), |_| {}).await?;
//! target.close().await?;
//!
//! let report = Image::check(&small, CheckOptions::default(), |_| {}).await?;
//! assert!(report.is_clean());
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
mod follow;
mod free;
mod header;
mod image;
mod info;
mod inspect;
mod layers;
mod lend;
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
mod resolve;
pub mod sans_io;
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
    MAX_BITMAP_GRANULARITY_BITS, MAX_BITMAP_MEMORY_BYTES, MAX_BITMAP_NAME_BYTES,
    MAX_BITMAP_TABLE_ENTRIES, MAX_BITMAPS, MIN_BITMAP_GRANULARITY_BITS,
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
    DEFAULT_UNLOCK_TIME, KeyChange, KeyCost, LuksCipher, LuksHash, LuksInfo, LuksOptions,
    Passphrase, SlotInfo, Slots,
};
pub use error::{
    Corruption, Error, Feature, InvalidOption, KeyError, ReferenceError, SnapshotError, TableKind,
    UnlockError, VmdkError,
};
pub use fold::{
    CommitOptions, FoldError, FoldOptions, FoldPlan, Folded, LayerLoss, LayerPlan, MergeLosses,
    MergeOptions, RebaseOptions, commit, merge, merge_losses, plan_commit, plan_merge, plan_rebase,
    rebase,
};
pub use follow::{ChainFile, ChainFiles};
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
    ClusterGeometry, DEFAULT_CLUSTER_BYTES, GuestOffset, HostOffset, MAX_CLUSTER_BITS,
    MIN_CLUSTER_BITS,
};
#[cfg(feature = "vmdk")]
pub use vmdk::{MAX_VMDK_EXTENTS, Vmdk};
