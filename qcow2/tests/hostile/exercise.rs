//! Everything that can be done to an image, done to bytes that nobody vouches for. Errors are fine; a panic, a read of
//! another length than asked, and an image that is worse after it was closed than before are not.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use block::{BlockDevice, ByteRange, Durability, HostFile, MemoryDevice, MemoryStorage, ZeroMode};
use bytes::Bytes;
use qcow2::{CheckReport, Finding, Image, OpenOptions, Passphrase, Repair};

/// The host is full here: an image may say that its tables lie terabytes away.
const HOST_BYTES: u64 = 16 << 20;
/// How much is read or written at once.
const AREA_BYTES: u64 = 1 << 16;
/// How long a key slot may work: slots that ask for much are to be looked at, not waited for.
const UNLOCK_TIME: Duration = Duration::from_secs(1);
/// How many snapshots and bitmaps are looked at.
const MANY: usize = 4;

/// What became of an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// It could be opened for reading.
    pub(crate) opened: bool,
    /// It could be opened for writing.
    pub(crate) opened_for_writing: bool,
    /// A check called it clean as it was.
    pub(crate) clean: bool,
    /// A check called it clean after a repair.
    pub(crate) repaired: bool,
}

/// An image in memory and what it may stand on.
struct Stage {
    storage: MemoryStorage,
    data: MemoryStorage,
    passphrases: Vec<Passphrase>,
}

/// Uses an image in every way.
///
/// # Panics
/// Where the image does what no image may.
pub(crate) async fn exercise(bytes: &[u8], passphrases: &[Passphrase]) -> Outcome {
    let mut outcome = Outcome::default();
    let stage = Stage::new(bytes, passphrases);
    let file = stage.file();
    if let Ok(seen) = Image::inspect_on(&file).await {
        let _text = format!("{seen:?}");
    }
    let before = Image::check_on(&file, Repair::None, |_| {}).await.ok();
    outcome.clean = before.as_ref().is_some_and(CheckReport::is_clean);
    outcome.opened = stage.read().await;
    assert!(stage.storage.log().is_empty(), "what only looks must not write");
    outcome.opened_for_writing = stage.write(before.as_ref()).await;
    outcome.repaired = Stage::new(bytes, passphrases).repair(Repair::All).await;
    Stage::new(bytes, passphrases).repair(Repair::Leaks).await;
    outcome
}

impl Stage {
    fn new(bytes: &[u8], passphrases: &[Passphrase]) -> Self {
        let storage = MemoryStorage::from_bytes(bytes.to_vec(), 512);
        storage.limit_len(HOST_BYTES);
        let data = MemoryStorage::from_bytes(vec![0xd5; 100_000], 512);
        data.limit_len(HOST_BYTES);
        Self { storage, data, passphrases: passphrases.to_vec() }
    }

    fn file(&self) -> HostFile {
        let storage = self.storage.clone().into_dyn();
        HostFile::from_storage(Path::new("hostile.qcow2"), storage).expect("a file in memory")
    }

    /// Opens it over what it says that it needs, without ever looking for that on the host.
    async fn open(&self, mut options: OpenOptions) -> Option<Image> {
        options.passphrases.clone_from(&self.passphrases);
        options.unlock_time = UNLOCK_TIME;
        let seen = Image::inspect_on(&self.file()).await.ok()?;
        let data = seen.info.data_file.map(|_| {
            let storage = self.data.clone().into_dyn();
            HostFile::from_storage(Path::new("hostile.data"), storage).expect("a file in memory")
        });
        let below = || MemoryDevice::read_only(vec![0xb7; 50_000]) as Arc<dyn BlockDevice>;
        let backing = seen.info.backing.map(|_| below());
        Image::open_parts(self.file(), data, backing, options).await.ok()
    }

    async fn read(&self) -> bool {
        let Some(image) = self.open(OpenOptions::reading()).await else { return false };
        read_from(&image).await;
        let snapshots = image.snapshots().await.unwrap_or_default();
        for bitmap in image.bitmaps().await.unwrap_or_default().iter().take(MANY) {
            let all = ByteRange::between(0, image.limits().size_bytes);
            let _may_fail = image.dirty_extents(&bitmap.name, all).await;
        }
        let _may_fail = image.close().await;
        for snapshot in snapshots.iter().take(MANY) {
            let options = OpenOptions::reading().snapshot(&*snapshot.id);
            if let Some(image) = self.open(options).await {
                read_from(&image).await;
            }
        }
        true
    }

    /// Changes it, and holds it against what a check said before.
    async fn write(&self, before: Option<&CheckReport>) -> bool {
        let original = self.storage.snapshot();
        let Some(image) = self.open(OpenOptions::writing()).await else { return false };
        let mut all_good = write_to(&image).await;
        read_from(&image).await;
        let snapshot = image.create_snapshot("made here").await;
        all_good &= image.add_bitmap("made here", 65536, true).await.is_ok();
        all_good &= image.write(0, Bytes::from_static(b"again"), Durability::Durable).await.is_ok();
        if let Ok(snapshot) = snapshot {
            all_good &= image.delete_snapshot(&snapshot.id).await.is_ok();
        }
        let _may_fail = image.bitmaps().await;
        all_good &= image.close().await.is_ok();
        let Some(before) = before.filter(|before| before.is_consistent()) else {
            // What was wrong before may be worse now; a repair is no less true for that.
            Box::pin(self.repair(Repair::All)).await;
            return true;
        };
        let after = Image::check_on(&self.file(), Repair::None, |_| {}).await;
        let after = after.expect("what could be checked before can be checked afterwards");
        // A COPIED flag that is missing on what two entries of the disk shared costs a copy, not data.
        let is_harmless = |finding: &&Finding| matches!(finding, Finding::CopiedFlag { raw, .. } if raw >> 63 == 0);
        let harmless = after.findings.iter().filter(is_harmless).count() as u64;
        let is_worse = after.corruptions > harmless || after.check_errors > 0;
        let what = format!("before: {before:?}\nafter: {after:?}");
        assert!(!is_worse, "made corrupt by using it\n{what}");
        if all_good && after.leaks > before.leaks {
            let hidden = self.leaks_if_as_long(original).await;
            assert!(after.leaks <= hidden, "clusters are leaked, not just {hidden}\n{what}");
        }
        true
    }

    /// The leaks that an image would have had in a file as long as this one is now: refcounts behind the end of a file
    /// count nothing until it grows.
    async fn leaks_if_as_long(&self, mut original: Vec<u8>) -> u64 {
        original.resize(self.storage.snapshot().len().max(original.len()), 0);
        let longer = Self::new(&original, &self.passphrases);
        let report = Image::check_on(&longer.file(), Repair::None, |_| {}).await;
        report.map_or(0, |report| report.leaks)
    }

    /// Repairs it. What a repair calls right must be right.
    async fn repair(&self, repair: Repair) -> bool {
        let file = self.file();
        let Ok(said) = Image::check_on(&file, repair, |_| {}).await else { return false };
        let found = Image::check_on(&file, Repair::None, |_| {}).await;
        let found = found.expect("what was repaired can be checked");
        let wrong = |report: &CheckReport| (report.leaks, report.corruptions, report.check_errors);
        assert_eq!(wrong(&said), wrong(&found), "{said:?}\n{found:?}");
        if !said.is_clean() || repair != Repair::All {
            return false;
        }
        self.read().await;
        self.write(Some(&found)).await;
        true
    }
}

/// Where to read and write: the start, the middle and the end of the disk.
fn areas(size: u64) -> impl Iterator<Item = ByteRange> {
    let starts = [0, size / 2, size.saturating_sub(AREA_BYTES)];
    starts
        .into_iter()
        .map(move |at| ByteRange::between(at, size.min(at.saturating_add(AREA_BYTES))))
}

async fn read_from(image: &Image) {
    let size = image.limits().size_bytes;
    for area in areas(size) {
        if let Ok(segments) = image.read(area).await {
            assert_eq!(segments.len(), area.len(), "a read of another length than asked");
        }
        if let Ok(extents) = image.map_chain(area).await {
            assert!(extents.iter().all(|extent| area.contains(extent.range)));
        }
    }
    let wide = ByteRange::between(0, size.min(1 << 40));
    if let Ok(extents) = image.extents(wide).await {
        assert!(extents.iter().all(|extent| wide.contains(extent.range)));
    }
}

/// Whether all of it worked.
async fn write_to(image: &Image) -> bool {
    let size = image.limits().size_bytes;
    let later = Durability::Deferred;
    let cluster = image.info().cluster_bytes;
    let mut all_good = true;
    for area in areas(size) {
        let start = area.start();
        let end = |len: u64| area.end().min(start.saturating_add(len));
        let data = vec![0x5a; usize::try_from(end(5000) - start).unwrap_or(0)];
        let part = ByteRange::between(start, end(3000));
        all_good &= image.write(start, Bytes::from(data), later).await.is_ok();
        all_good &= image.write_zeroes(part, ZeroMode::default(), later).await.is_ok();
        all_good &= image.flush().await.is_ok();
        all_good &= image.discard(area, Durability::Durable).await.is_ok();
        let whole = start.next_multiple_of(cluster);
        if whole.saturating_add(cluster) <= size && cluster <= AREA_BYTES {
            let data = vec![0xa5; usize::try_from(cluster).unwrap_or(0)];
            // Refused where the image may have none of these.
            let _may_fail = image.write_compressed(whole, Bytes::from(data)).await;
        }
    }
    all_good
}
