//! The configurations that lose power here, and the files that one image stands on, with what happens to them in one
//! order. What is done to an image is told in `deeds`, what must be left in `judge`.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use block::{
    BlockDevice, CrashChoice, Durability, HeldOps, HostFile, MemoryDevice, MemoryStorage, OpKind,
    OpView, Request, Storage, StorageFacts,
};
use parking_lot::Mutex;
use qcow2::{
    BackingFormat, Compression, CreateOptions, Error, Image, KeyCost, LuksCipher, LuksOptions,
    OpenOptions, Passphrase, Version,
};
use tokio::sync::Semaphore;

use crate::crowd::{Random, Value};

pub(super) const SECTOR: u64 = 512;
/// The queues in which held operations of one file wait: one for syncs, the others for parts of the file.
const LANES: u64 = 4;
/// How long parts of an image below are that hold data, or nothing.
const HOLE: usize = 44;
const HOLE_SECTORS: u64 = HOLE as u64;

/// Opens the encrypted images.
pub(super) const PASSPHRASE: &str = "open sesame";
/// The moments of one run at which power goes.
const MOMENTS: usize = 60;
/// Those where every copy of the image, or every opening, takes its time.
const FEW_MOMENTS: usize = 12;

/// One configuration.
#[derive(Clone, Debug)]
pub(super) struct Setup {
    pub name: &'static str,
    pub options: CreateOptions,
    /// The length of the backing file.
    pub backing_sectors: u64,
    /// What the host demands of offsets.
    pub align: u16,
    pub compresses: bool,
    pub has_bitmaps: bool,
    pub has_snapshots: bool,
    pub resizes: bool,
    /// The moments of one run at which power goes.
    pub moments: usize,
}

impl Setup {
    fn new(name: &'static str, cluster_bytes: u32) -> Self {
        let size_bytes = match cluster_bytes {
            512 => 80 << 10,
            4096 => 160 << 10,
            16384 => 320 << 10,
            65536 => (700 << 10) + 512,
            _ => (2 << 20) + (300 << 10) + 512,
        };
        Self {
            name,
            options: CreateOptions::new(size_bytes).cluster_bytes(cluster_bytes),
            backing_sectors: 0,
            align: 512,
            compresses: false,
            has_bitmaps: false,
            has_snapshots: false,
            resizes: false,
            moments: MOMENTS,
        }
    }

    fn with(self, change: impl FnOnce(CreateOptions) -> CreateOptions) -> Self {
        Self { options: change(self.options), ..self }
    }

    /// Over a file that ends before the disk does.
    fn over_backing(mut self) -> Self {
        self.backing_sectors = self.options.size_bytes / SECTOR * 2 / 3;
        self.with(|options| options.backing("below", BackingFormat::Raw))
    }

    /// Over an image that ends before the disk does, has holes, and has clusters of another size.
    fn over_image(self) -> Self {
        let over = self.over_backing();
        over.with(|options| options.backing("below", BackingFormat::Qcow2))
    }

    /// With fewer cuts and runs than others.
    fn costly(self) -> Self {
        Self { moments: FEW_MOMENTS, ..self }
    }

    pub(super) fn is_costly(&self) -> bool {
        self.moments == FEW_MOMENTS
    }

    fn compressing(self) -> Self {
        Self { compresses: true, ..self }
    }

    fn with_bitmaps(self) -> Self {
        Self { has_bitmaps: true, ..self }
    }

    fn with_snapshots(self) -> Self {
        Self { has_snapshots: true, ..self }
    }

    fn resizing(self) -> Self {
        Self { resizes: true, ..self }
    }

    /// All of them.
    pub(super) fn all() -> Vec<Self> {
        let v2 = |setup: Self| setup.with(|options| options.version(Version::V2));
        let bits = |setup: Self, bits| setup.with(|options| options.refcount_bits(bits));
        let lazy = |setup: Self| setup.with(|options| options.lazy_refcounts(true));
        let extended = |setup: Self| setup.with(|options| options.extended_l2(true));
        let data = |setup: Self, raw| setup.with(|options| options.data_file("data", raw));
        let zstd = |setup: Self| setup.with(|options| options.compression(Compression::Zstd));
        let mut all = vec![
            v2(Self::new("v2-512", 512)).over_backing(),
            v2(Self::new("v2-4k", 4096)).over_backing().compressing().resizing(),
            v2(Self::new("v2-64k", 65536)).over_backing().compressing().with_snapshots(),
            bits(Self::new("bits-1-512", 512), 1).over_backing().compressing().resizing(),
            Self { align: 4096, ..bits(Self::new("bits-1-4k", 4096), 1).compressing() },
            bits(Self::new("bits-64", 4096), 64).compressing().with_bitmaps().with_snapshots(),
            extended(Self::new("extended-64k", 65536)).over_backing().with_snapshots().resizing(),
            extended(Self::new("extended-16k", 16384)).over_backing().compressing().with_bitmaps(),
            lazy(Self::new("lazy-512", 512)).over_backing().resizing(),
            lazy(Self::new("lazy-4k", 4096)).compressing().with_snapshots(),
            lazy(Self::new("lazy-64k", 65536)).over_backing().compressing().with_bitmaps(),
            data(Self::new("data-64k", 65536), false).over_backing().with_bitmaps(),
            data(Self::new("data-512", 512), false).over_backing().resizing(),
            extended(data(Self::new("data-extended", 16384), false)).over_backing(),
            data(Self::new("raw-data", 4096), true).resizing(),
            zstd(Self::new("zstd-4k", 4096))
                .over_backing()
                .compressing()
                .with_snapshots()
                .resizing(),
            Self::new("all-512", 512).compressing().with_bitmaps().with_snapshots(),
            Self::new("all-64k", 65536).over_backing().compressing().with_snapshots().resizing(),
            Self::new("all-2m", 2 << 20)
                .costly()
                .over_backing()
                .compressing()
                .with_bitmaps()
                .with_snapshots(),
            extended(Self::new("extended-2m", 2 << 20)).costly().over_image().resizing(),
            Self::new("image-below-64k", 65536).over_image().compressing().with_snapshots(),
            extended(Self::new("image-below-16k", 16384)).over_image().resizing(),
            lazy(data(Self::new("image-below-data", 4096), false)).over_image().with_bitmaps(),
        ];
        if cfg!(feature = "luks") {
            let luks =
                |setup: Self| setup.costly().with(|options| options.encryption(cheap_keys()));
            all.extend([
                luks(Self::new("luks-4k", 4096)).over_backing().with_bitmaps().with_snapshots(),
                lazy(luks(extended(Self::new("luks-extended", 16384)))).over_image().resizing(),
                luks(data(Self::new("luks-data", 65536), false)).over_backing().with_bitmaps(),
            ]);
        }
        all
    }

    pub(super) fn sectors(&self) -> u64 {
        self.options.size_bytes / SECTOR
    }

    pub(super) fn cluster_sectors(&self) -> u64 {
        u64::from(self.options.cluster_bytes) / SECTOR
    }

    /// What a sector of a new image holds.
    pub(super) fn below(&self, sector: u64) -> Value {
        let is_hole = self.stands_on_image() && sector / HOLE_SECTORS % 3 == 1;
        if sector < self.backing_sectors && !is_hole { Value::Stamp(0) } else { Value::Zero }
    }

    fn stands_on_image(&self) -> bool {
        let backing = self.options.backing.as_ref();
        backing.is_some_and(|backing| backing.format == BackingFormat::Qcow2)
    }

    fn bytes_below(&self, sectors: Range<u64>) -> Vec<u8> {
        sectors.flat_map(|sector| self.below(sector).bytes(sector)).collect()
    }
}

fn cheap_keys() -> LuksOptions {
    LuksOptions {
        cipher: LuksCipher::Aes128Xts,
        cost: KeyCost::Rounds(1),
        ..LuksOptions::new(Passphrase::new(PASSPHRASE))
    }
}

/// What an image stands on.
#[derive(Clone)]
struct Below {
    device: Arc<dyn BlockDevice>,
    /// The file that it lies in.
    file: MemoryStorage,
}

impl Below {
    async fn create(setup: &Setup) -> Self {
        let bytes = setup.bytes_below(0..setup.backing_sectors);
        if !setup.stands_on_image() {
            let file = MemoryStorage::from_bytes(bytes.clone(), 512);
            return Self { device: MemoryDevice::read_only(bytes), file };
        }
        let file = MemoryStorage::with_alignment(512);
        let open = || HostFile::from_storage(Path::new("below"), file.clone().into_dyn()).unwrap();
        let cluster_bytes = if setup.options.cluster_bytes == 4096 { 65536 } else { 4096 };
        let options = CreateOptions::new(bytes.len() as u64).cluster_bytes(cluster_bytes);
        Image::create_with_data(&open(), None, &options).await.unwrap();
        let image = Image::open_on(open(), None, OpenOptions::writing()).await.unwrap();
        for start in (0..setup.backing_sectors).step_by(HOLE) {
            if setup.below(start) == Value::Stamp(0) {
                let sectors = start..(start + HOLE_SECTORS).min(setup.backing_sectors);
                let data = setup.bytes_below(sectors).into();
                image.write(start * SECTOR, data, Durability::Deferred).await.unwrap();
            }
        }
        image.close().await.unwrap();
        let image = Image::open_on(open(), None, OpenOptions::reading()).await.unwrap();
        Self { device: Arc::new(image), file }
    }
}

/// The files of one image.
#[derive(Clone)]
pub(super) struct Files {
    pub setup: Arc<Setup>,
    pub image: MemoryStorage,
    pub data: Option<MemoryStorage>,
    below: Option<Below>,
    order: Order,
}

/// How long the logs of both files were after each thing that happened.
#[derive(Clone, Default)]
struct Order(Arc<Mutex<Vec<(usize, usize)>>>);

/// A file whose operations are noted in the common order.
struct Noted {
    storage: MemoryStorage,
    files: Files,
}

impl Storage for Noted {
    fn submit(&self, request: Request) {
        self.storage.submit(request);
        self.files.note();
    }

    fn facts(&self) -> StorageFacts {
        self.storage.facts()
    }

    fn len(&self) -> std::io::Result<u64> {
        self.storage.len()
    }

    fn slots(&self) -> &Arc<Semaphore> {
        self.storage.slots()
    }
}

impl Files {
    /// A new image, durable, with empty logs.
    pub(super) async fn create(setup: &Setup) -> Self {
        let empty = || MemoryStorage::with_alignment(setup.align);
        let image = empty();
        let data = setup.options.data_file.as_ref().map(|_| empty());
        let below = match setup.options.backing {
            Some(_) => Some(Below::create(setup).await),
            None => None,
        };
        let mut files =
            Self { setup: Arc::new(setup.clone()), image, data, below, order: Order::default() };
        let (image, data) = files.open_hosts();
        Image::create_with_data(&image, data.as_ref(), &setup.options).await.unwrap();
        files.settle();
        files
    }

    /// Takes all that is in the files for durable, and forgets how it came there.
    fn settle(&mut self) {
        let align = self.setup.align;
        let durable = |storage: &mut MemoryStorage| {
            *storage = MemoryStorage::from_bytes(storage.snapshot(), align)
        };
        std::iter::once(&mut self.image).chain(&mut self.data).for_each(durable);
        self.order = Order(Arc::new(Mutex::new(vec![(0, 0)])));
    }

    /// A copy of these files whose logs begin here.
    pub(super) fn copy(&self) -> Self {
        let mut copy = self.clone();
        copy.settle();
        copy
    }

    pub(super) fn storages(&self) -> impl Iterator<Item = &MemoryStorage> {
        [&self.image].into_iter().chain(&self.data)
    }

    pub(super) fn open_hosts(&self) -> (HostFile, Option<HostFile>) {
        let host = |name: &str, storage: &MemoryStorage| {
            let noted = Noted { storage: storage.clone(), files: self.clone() };
            HostFile::from_storage(Path::new(name), Arc::new(noted)).unwrap()
        };
        (host("image", &self.image), self.data.as_ref().map(|data| host("data", data)))
    }

    pub(super) async fn open(&self, options: OpenOptions) -> Result<Image, Error> {
        let (image, data) = self.open_hosts();
        let backing = self.below.as_ref().map(|below| Arc::clone(&below.device));
        Image::open_parts(image, data, backing, options.passphrase(Passphrase::new(PASSPHRASE)))
            .await
    }

    /// The bytes of the file below, if there is one.
    pub(super) fn below(&self) -> Option<Vec<u8>> {
        self.below.as_ref().map(|below| below.file.snapshot())
    }

    pub(super) fn note(&self) {
        let mut order = self.order.0.lock();
        let now = (self.image.log_len(), self.data.as_ref().map_or(0, MemoryStorage::log_len));
        if order.last() != Some(&now) {
            order.push(now);
        }
    }

    /// So many things have happened.
    pub(super) fn now(&self) -> usize {
        self.order.0.lock().len().saturating_sub(1)
    }

    /// What a power cut leaves after so many things. Seeds 0 to 3 lose or keep all that is not durable, in both files
    /// or in one of them; others tear every write, even ones in sectors, odd ones in blocks of 4096 bytes.
    pub(super) fn cut(&self, now: usize, seed: u64) -> Self {
        let (image, data) = self.order.0.lock()[now];
        let (of_image, of_data) = match seed {
            2 => (1, 0),
            3 => (0, 1),
            both => (both, both),
        };
        let mut left = self.clone();
        left.image = torn(&self.image, image, of_image);
        left.data = self.data.as_ref().map(|file| torn(file, data, of_data));
        left.order = Order(Arc::new(Mutex::new(vec![(0, 0)])));
        left
    }

    /// Lets operations wait until a seed's numbers let them go.
    pub(super) fn hold(&self) -> Vec<HeldOps> {
        let lane = |storage: &MemoryStorage, lane: u64| {
            storage.hold(move |op: &OpView| match op.kind {
                OpKind::Sync => lane == 0,
                _ => lane == 1 + op.range.start() / 1536 % (LANES - 1),
            })
        };
        let files: Vec<_> = self.storages().collect();
        files.iter().flat_map(|file| (0..LANES).map(|number| lane(file, number))).collect()
    }

    /// Lets one of the held operations go. Whether there was one.
    pub(super) fn release(&self, lanes: &[HeldOps], random: &mut Random) -> bool {
        let lane = usize::try_from(random.below(lanes.len() as u64)).unwrap();
        let released = lanes[lane].release_one();
        self.note();
        released
    }
}

fn torn(storage: &MemoryStorage, ops: usize, seed: u64) -> MemoryStorage {
    if seed < 2 || seed.is_multiple_of(2) {
        return storage.crash_image_seeded(ops, seed);
    }
    // Blocks of 4096 bytes survive as a whole.
    let chance =
        |index: usize, place: u64| Random(seed ^ (index as u64) << 20 ^ place << 44).below(4);
    storage.crash_image(ops, |choice: &CrashChoice<'_>| match chance(choice.index, u64::MAX) {
        0 => false,
        1 => true,
        _ => chance(choice.index, choice.sector.unwrap_or(0) / 4096) < 2,
    })
}
