//! Arbitrary operations on an image of arbitrary shape, held against a vector of bytes: the disk reads like it at every
//! moment, bitmaps name all that changed, snapshots keep what they saw, and a check finds the closed image clean.

#![no_main]

use std::path::Path;
use std::sync::Arc;

use block::{BlockDevice, ByteRange, Durability, HostFile, MemoryDevice, MemoryStorage, ZeroMode};
use bytes::Bytes;
use libfuzzer_sys::arbitrary::{self, Arbitrary, Unstructured};
use libfuzzer_sys::fuzz_target;
use qcow2::{
    BackingFormat, Compression, CreateOptions, Error, Image, OpenOptions, Preallocation, Repair,
    ResizeOptions, Version,
};

/// The largest disk.
const MAX_BYTES: u64 = 1 << 20;
/// The most operations of one input.
const MAX_OPERATIONS: usize = 64;
/// The most times that an input closes the image, which reads and checks all of it.
const MAX_REOPENS: u32 = 8;
/// The most snapshots and the most bitmaps at a time.
const MAX_NAMES: usize = 5;
const SECTOR: u64 = 512;

/// Set to see the operations of an input.
const SHOW: &str = "FUZZ_SHOW";

/// What the image is made like.
#[derive(Arbitrary, Debug)]
struct Shape {
    old: bool,
    cluster: u8,
    extended: bool,
    refcount_order: u8,
    lazy: bool,
    zstd: bool,
    backing: Option<u16>,
    data_file: bool,
    raw: bool,
    blocks_of_4096: bool,
    prepared: bool,
    size: u16,
    unaligned: u8,
}

/// One operation. Places and lengths are taken modulo what there is.
#[derive(Arbitrary, Debug)]
enum Operation {
    Write { at: u32, len: u16, seed: u8 },
    WriteLong { at: u32, len: u32, seed: u8 },
    WriteZeros { at: u32, len: u16 },
    Compressed { at: u16, clusters: u8, seed: u8 },
    Zero { at: u32, len: u32, keep: bool },
    Discard { at: u32, len: u32 },
    Resize { size: u16, unaligned: u8, prepared: bool },
    SnapshotCreate,
    SnapshotApply { which: u8 },
    SnapshotDelete { which: u8 },
    BitmapAdd { granularity: u8, enabled: bool },
    BitmapClear { which: u8 },
    BitmapSwitch { which: u8, enabled: bool },
    BitmapRemove { which: u8 },
    Flush,
    Reopen,
}

/// A bitmap and the sectors that it must name.
struct Bitmap {
    name: String,
    enabled: bool,
    changed: Vec<bool>,
}

struct Snapshot {
    id: String,
    disk: Vec<u8>,
}

/// The image, and what it must be like.
struct World {
    storage: MemoryStorage,
    data: Option<MemoryStorage>,
    below: Option<Vec<u8>>,
    image: Image,
    disk: Vec<u8>,
    snapshots: Vec<Snapshot>,
    bitmaps: Vec<Bitmap>,
    named: u32,
    reopened: u32,
}

impl Shape {
    fn size(size: u16, unaligned: u8) -> u64 {
        (u64::from(size) * 16 + u64::from(unaligned)).min(MAX_BYTES)
    }

    /// Nothing where no image can be like that.
    fn options(&self) -> CreateOptions {
        let bits = 9 + u32::from(self.cluster) % 9;
        let version = if self.old { Version::V2 } else { Version::V3 };
        let mut options = CreateOptions::new(Self::size(self.size, self.unaligned))
            .cluster_bytes(1 << bits)
            .version(version);
        if !self.old {
            options = options
                .extended_l2(self.extended && bits >= 14)
                .refcount_bits(1 << (self.refcount_order % 7))
                .lazy_refcounts(self.lazy)
                .compression(if self.zstd { Compression::Zstd } else { Compression::Deflate });
            if self.data_file {
                options = options.data_file("data", self.raw && self.backing.is_none());
            }
        }
        if self.backing.is_some() {
            options = options.backing("below", BackingFormat::Raw);
        } else if self.prepared {
            options = options.preallocation(Preallocation::Metadata);
        }
        options
    }
}

fn host(storage: &MemoryStorage) -> HostFile {
    let storage = storage.clone().into_dyn();
    HostFile::from_storage(Path::new("fuzzed.qcow2"), storage).expect("a file in memory")
}

/// Bytes that differ with the seed; a few seeds compress well.
fn pattern(seed: u8, len: usize) -> Vec<u8> {
    let mut state = u32::from(seed) + 1;
    let random = move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        if seed % 4 == 0 { seed | 1 } else { state.to_be_bytes()[0] }
    };
    std::iter::repeat_with(random).take(len).collect()
}

fn index(number: u64) -> usize {
    usize::try_from(number).expect("a small number")
}

impl World {
    async fn new(shape: &Shape) -> Option<Self> {
        let options = shape.options();
        let align = if shape.blocks_of_4096 { 4096 } else { 1 };
        let storage = MemoryStorage::with_alignment(align);
        let data = options.data_file.as_ref().map(|_| MemoryStorage::with_alignment(align));
        let file = data.as_ref().map(host);
        // Some options do not go together.
        Image::create_with_data(&host(&storage), file.as_ref(), &options).await.ok()?;
        let below = shape.backing.map(|size| pattern(1, usize::from(size) * 8 / 512 * 512));
        let mut disk = below.clone().unwrap_or_default();
        disk.resize(index(options.size_bytes), 0);
        let image = Self::open(&storage, data.as_ref(), below.as_ref()).await.expect("a new image");
        let (snapshots, bitmaps) = (Vec::new(), Vec::new());
        Some(Self { storage, data, below, image, disk, snapshots, bitmaps, named: 0, reopened: 0 })
    }

    async fn open(
        storage: &MemoryStorage,
        data: Option<&MemoryStorage>,
        below: Option<&Vec<u8>>,
    ) -> Result<Image, Error> {
        let below = below.map(|bytes| MemoryDevice::read_only(bytes.clone()) as _);
        let below: Option<Arc<dyn BlockDevice>> = below;
        Image::open_parts(host(storage), data.map(host), below, OpenOptions::writing()).await
    }

    fn range(&self, at: u32, len: u64) -> ByteRange {
        let size = self.disk.len() as u64;
        let at = if size == 0 { 0 } else { u64::from(at) % size };
        ByteRange::between(at, at.saturating_add(len).min(size))
    }

    fn part(&mut self, range: ByteRange) -> &mut [u8] {
        &mut self.disk[index(range.start())..index(range.end())]
    }

    /// Notes a change for the bitmaps.
    fn changed(&mut self, range: ByteRange) {
        if range.is_empty() {
            return;
        }
        let sectors = index(range.start() / SECTOR)..index(range.end().div_ceil(SECTOR));
        for bitmap in self.bitmaps.iter_mut().filter(|bitmap| bitmap.enabled) {
            bitmap.changed[sectors.clone()].fill(true);
        }
    }

    async fn write(&mut self, range: ByteRange, data: Vec<u8>) {
        self.part(range).copy_from_slice(&data);
        self.changed(range);
        let done = self.image.write(range.start(), data.into(), Durability::Deferred).await;
        done.expect("a sound image takes a write");
        self.compare(range).await;
    }

    async fn apply(&mut self, operation: &Operation) {
        match *operation {
            Operation::Write { at, len, seed } => {
                let range = self.range(at, u64::from(len));
                self.write(range, pattern(seed, index(range.len()))).await;
            }
            Operation::WriteLong { at, len, seed } => {
                let range = self.range(at, u64::from(len) % MAX_BYTES);
                self.write(range, pattern(seed, index(range.len()))).await;
            }
            Operation::WriteZeros { at, len } => {
                let range = self.range(at, u64::from(len));
                self.write(range, vec![0; index(range.len())]).await;
            }
            Operation::Compressed { at, clusters, seed } => {
                self.compressed(at, clusters, seed).await;
            }
            Operation::Zero { at, len, keep } => {
                let range = self.range(at, u64::from(len));
                self.part(range).fill(0);
                self.changed(range);
                let mode = ZeroMode { keep_allocated: keep, fast_only: false };
                let done = self.image.write_zeroes(range, mode, Durability::Deferred).await;
                done.expect("a sound image takes zeros");
                self.compare(range).await;
            }
            Operation::Discard { at, len } => self.discard(at, len).await,
            Operation::Resize { size, unaligned, prepared } => {
                self.resize(Shape::size(size, unaligned), prepared).await;
            }
            Operation::SnapshotCreate if self.snapshots.len() < MAX_NAMES => {
                self.named += 1;
                // Refcounts of one bit and external data have no room for it.
                if let Ok(made) = self.image.create_snapshot(&format!("s{}", self.named)).await {
                    let disk = self.disk.clone();
                    self.snapshots.push(Snapshot { id: made.id, disk });
                }
            }
            Operation::SnapshotApply { which } => self.snapshot_apply(which).await,
            Operation::SnapshotDelete { which } if !self.snapshots.is_empty() => {
                let which = usize::from(which) % self.snapshots.len();
                let snapshot = self.snapshots.remove(which);
                let done = self.image.delete_snapshot(&snapshot.id).await;
                done.expect("what was made can be deleted");
            }
            Operation::Flush => self.image.flush().await.expect("a flush"),
            Operation::Reopen if self.reopened < MAX_REOPENS => self.reopen().await,
            _ => self.bitmap(operation).await,
        }
    }

    async fn compressed(&mut self, at: u16, clusters: u8, seed: u8) {
        let cluster = self.image.info().cluster_bytes;
        let size = self.disk.len() as u64;
        let at = u64::from(at) % size.div_ceil(cluster).max(1) * cluster;
        let end = at.saturating_add(u64::from(clusters % 8) * cluster).min(size);
        let range = ByteRange::between(at.min(end), end);
        let data = pattern(seed, index(range.len()));
        let done = self.image.write_compressed(range.start(), Bytes::from(data.clone())).await;
        match done {
            Ok(()) => {
                self.part(range).copy_from_slice(&data);
                self.changed(range);
            }
            Err(_) => assert!(self.data.is_some() || range.is_empty(), "{done:?}"),
        }
        self.compare(range).await;
    }

    async fn discard(&mut self, at: u32, len: u32) {
        let range = self.range(at, u64::from(len));
        let done = self.image.discard(range, Durability::Deferred).await;
        done.expect("a sound image takes a discard");
        let now = self.image.read(range).await.expect("a sound image reads").to_vec();
        let old = self.part(range);
        let fits = now.iter().zip(&*old).all(|(now, old)| *now == 0 || now == old);
        assert!(fits, "{range:?}: neither zeros nor what was there");
        // Parts of clusters stay as they are, and are no change.
        let differ: Vec<u64> = (range.start()..)
            .zip(now.iter().zip(&*old))
            .filter(|(_, (a, b))| a != b)
            .map(|(at, _)| at)
            .collect();
        old.copy_from_slice(&now);
        if let (Some(first), Some(last)) = (differ.first(), differ.last()) {
            self.changed(ByteRange::between(*first, *last + 1));
        }
    }

    async fn resize(&mut self, size: u64, prepared: bool) {
        let mut options = ResizeOptions { allow_shrinking: true, ..ResizeOptions::default() };
        if prepared && size > self.disk.len() as u64 {
            options.preallocation = Preallocation::Metadata;
        }
        // Refused with snapshots in version 2, to nothing with bitmaps, and prepared over a backing file.
        if self.image.resize(size, &options).await.is_ok() {
            self.disk.resize(index(size), 0);
            let sectors = self.disk.len().div_ceil(512);
            for bitmap in &mut self.bitmaps {
                // A new area is not dirty, as in QEMU.
                bitmap.changed.resize(sectors, false);
            }
        }
        assert_eq!(self.image.limits().size_bytes, self.disk.len() as u64);
        let end = self.range(u32::MAX, MAX_BYTES);
        self.compare(end).await;
    }

    async fn snapshot_apply(&mut self, which: u8) {
        if self.snapshots.is_empty() {
            return;
        }
        let which = usize::from(which) % self.snapshots.len();
        let snapshot = &self.snapshots[which];
        // Refused with bitmaps.
        if self.image.apply_snapshot(&snapshot.id).await.is_ok() {
            self.disk = snapshot.disk.clone();
        }
        self.compare_all().await;
    }

    async fn bitmap(&mut self, operation: &Operation) {
        if let Operation::BitmapAdd { granularity, enabled } = *operation {
            if self.bitmaps.len() < MAX_NAMES {
                self.named += 1;
                let name = format!("b{}", self.named);
                let bytes = SECTOR << (granularity % 12);
                if self.image.add_bitmap(&name, bytes, enabled).await.is_ok() {
                    let changed = vec![false; self.disk.len().div_ceil(512)];
                    self.bitmaps.push(Bitmap { name, enabled, changed });
                }
            }
            return;
        }
        let (Operation::BitmapClear { which }
        | Operation::BitmapSwitch { which, .. }
        | Operation::BitmapRemove { which }) = *operation
        else {
            return;
        };
        if self.bitmaps.is_empty() {
            return;
        }
        let which = usize::from(which) % self.bitmaps.len();
        let bitmap = &mut self.bitmaps[which];
        let done = match *operation {
            Operation::BitmapClear { .. } => {
                bitmap.changed.fill(false);
                self.image.clear_bitmap(&bitmap.name).await
            }
            Operation::BitmapSwitch { enabled, .. } => {
                bitmap.enabled = enabled;
                if enabled {
                    self.image.enable_bitmap(&bitmap.name).await
                } else {
                    self.image.disable_bitmap(&bitmap.name).await
                }
            }
            _ => {
                let bitmap = self.bitmaps.remove(which);
                self.image.remove_bitmap(&bitmap.name).await
            }
        };
        done.expect("what was made can be changed");
    }

    async fn compare(&self, range: ByteRange) {
        let size = self.disk.len() as u64;
        let end = range.end().saturating_add(3000).min(size);
        let around = ByteRange::between(range.start().saturating_sub(3000).min(end), end);
        let read = self.image.read(around).await.expect("a sound image reads").to_vec();
        let model = &self.disk[index(around.start())..index(around.end())];
        assert!(read == model, "{around:?} reads as something else");
    }

    async fn compare_all(&self) {
        let size = self.disk.len() as u64;
        assert_eq!(self.image.limits().size_bytes, size);
        let all = ByteRange::between(0, size);
        let read = self.image.read(all).await.expect("a sound image reads").to_vec();
        assert!(read == self.disk, "the disk reads as something else");
        let extents = self.image.extents(all).await.expect("a sound image has extents");
        for extent in extents.iter().filter(|extent| extent.zero) {
            let range = index(extent.range.start())..index(extent.range.end());
            assert!(self.disk[range].iter().all(|byte| *byte == 0), "{extent:?} is not zero");
        }
        for bitmap in &self.bitmaps {
            let dirty = self.image.dirty_extents(&bitmap.name, all).await.expect("a bitmap");
            for extent in dirty.iter().filter(|extent| !extent.dirty) {
                let sectors = extent.range.start() / SECTOR..extent.range.end().div_ceil(SECTOR);
                for sector in sectors {
                    assert!(!bitmap.changed[index(sector)], "{} misses {sector}", bitmap.name);
                }
            }
        }
    }

    async fn close(&self) {
        self.compare_all().await;
        self.image.close().await.expect("a sound image closes");
        let found = Image::check_on(&host(&self.storage), Repair::None, |_| {}).await;
        let found = found.expect("a sound image can be checked");
        assert!(found.is_clean(), "{found:?}");
        for snapshot in &self.snapshots {
            let options = OpenOptions::reading().snapshot(&*snapshot.id);
            let below = self.below.clone().map(|bytes| MemoryDevice::read_only(bytes) as _);
            let below: Option<Arc<dyn BlockDevice>> = below;
            let data = self.data.as_ref().map(host);
            let image = Image::open_parts(host(&self.storage), data, below, options).await;
            let image = image.expect("a snapshot opens");
            let all = ByteRange::between(0, snapshot.disk.len() as u64);
            let read = image.read(all).await.expect("a snapshot reads").to_vec();
            assert!(read == snapshot.disk, "snapshot {} reads as something else", snapshot.id);
        }
    }

    async fn reopen(&mut self) {
        self.reopened += 1;
        self.close().await;
        let opened = Self::open(&self.storage, self.data.as_ref(), self.below.as_ref()).await;
        self.image = opened.expect("what was closed opens again");
        self.compare_all().await;
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Unstructured::new(data);
    let Ok(shape) = input.arbitrary::<Shape>() else { return };
    let show = std::env::var_os(SHOW).is_some();
    if show {
        eprintln!("{shape:?}");
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    runtime.expect("a runtime").block_on(async {
        let Some(mut world) = World::new(&shape).await else { return };
        for _ in 0..MAX_OPERATIONS {
            // What is left at the end makes an operation with zeros for what it lacks.
            let Ok(operation) = input.arbitrary::<Operation>() else { break };
            if show {
                eprintln!("{operation:?}");
            }
            world.apply(&operation).await;
            if input.is_empty() {
                break;
            }
        }
        world.close().await;
    });
});
