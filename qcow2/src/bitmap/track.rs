//! The bitmaps of an open image: what they say in memory, and the recording of changes. Reading and writing the file is
//! told in `load` and `store`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use block::ByteRange;
use parking_lot::Mutex;
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

use super::codec::DirectoryEntry;
use super::dirty::DirtyMap;
use crate::error::Error;
use crate::image::{Inner, Live};
use crate::units::{ClusterGeometry, HostOffset};

/// All bitmaps of an open image.
#[derive(Default)]
pub(crate) struct Bitmaps {
    /// Whether there are any: most images have none, and their writes should not pay for it.
    active: AtomicBool,
    /// Held by whoever reads or writes bitmaps in the file, until the last operation on the host is over. Taken behind
    /// locks on guest ranges and before the gate of flushes.
    turn: Arc<AsyncMutex<()>>,
    /// In the order of the directory; `None` until that was read.
    list: Mutex<Option<Vec<LiveBitmap>>>,
}

/// A bitmap of an open image.
#[derive(Clone, Debug)]
pub(super) struct LiveBitmap {
    /// What the directory on disk says; a table at 0 for one that is not there yet.
    pub entry: DirectoryEntry,
    /// Whether memory and disk together tell every change. While this image records changes the bitmap is `in_use` on
    /// disk and consistent all the same.
    pub is_consistent: bool,
    /// The bits that are known in memory.
    pub map: DirtyMap,
    /// Whether `map` knows all of them; otherwise those on disk are to be added.
    pub is_whole: bool,
    /// Where `map` may differ from the disk, in units of what one cluster of bits covers.
    pub touched: DirtyMap,
    /// A table on disk that was given up, with all its clusters: where it starts, and its entries.
    pub left: Option<(HostOffset, u32)>,
}

impl LiveBitmap {
    /// A bitmap that the directory on disk describes.
    pub(super) fn on_disk(
        entry: DirectoryEntry,
        size_bytes: u64,
        geometry: ClusterGeometry,
    ) -> Self {
        let touched = DirtyMap::new(size_bytes, coverage_bits(entry.granularity_bits, geometry));
        Self {
            is_consistent: entry.is_usable(),
            map: DirtyMap::new(size_bytes, entry.granularity_bits),
            is_whole: false,
            touched,
            left: None,
            entry,
        }
    }

    /// Changes what it says to `map`, all of it.
    pub(super) fn replace(&mut self, map: DirtyMap, size_bytes: u64) {
        self.map = map;
        self.is_whole = true;
        self.touched.set(ByteRange::between(0, size_bytes));
    }

    /// Fits it, whole as it is in memory, to a disk of another size. All of it goes to new clusters.
    pub(super) fn resize(&mut self, size_bytes: u64, geometry: ClusterGeometry) {
        if self.entry.table_at.0 != 0 {
            self.left = Some((self.entry.table_at, self.entry.table_entries));
        }
        self.entry.table_at = HostOffset(0);
        self.entry.table_entries = 0;
        self.map = self.map.resized(size_bytes);
        self.touched =
            DirtyMap::new(size_bytes, coverage_bits(self.entry.granularity_bits, geometry));
        self.touched.set(ByteRange::between(0, size_bytes));
    }

    /// Whether it has to be stored before the file may be let go.
    pub(super) fn is_unsaved(&self) -> bool {
        self.is_consistent && (self.entry.in_use || !self.touched.is_empty())
    }

    /// Whether changes of the disk concern it and the file does not say yet that it misses them.
    fn needs_mark(&self) -> bool {
        self.entry.auto && !self.entry.in_use
    }

    fn record(&mut self, range: ByteRange) {
        if self.entry.auto && self.is_consistent {
            self.map.set(range);
            self.touched.set(range);
            if self.map.is_over_limit() {
                let name = String::from_utf8_lossy(&self.entry.name);
                tracing::warn!(%name, "a bitmap is lost: there is no memory for what changed");
                self.give_up();
            }
        }
    }

    /// It misses changes from now on, and says so when it is stored.
    pub(super) fn give_up(&mut self) {
        self.is_consistent = false;
        self.map = self.map.emptied();
        self.touched = self.touched.emptied();
    }
}

/// The base-2 logarithm of the bytes of the disk whose bits fill a cluster.
pub(super) const fn coverage_bits(granularity_bits: u32, geometry: ClusterGeometry) -> u32 {
    granularity_bits + geometry.bits() + 3
}

impl Bitmaps {
    /// For an image that is open for writing and `has_bitmaps` or not.
    pub(crate) fn new(has_bitmaps: bool) -> Self {
        Self { active: AtomicBool::new(has_bitmaps), ..Self::default() }
    }

    /// Waits until nobody reads or writes bitmaps in the file.
    pub(super) async fn turn(&self) -> Turn {
        Turn(Arc::new(Arc::clone(&self.turn).lock_owned().await))
    }

    /// Looks at the list, or at nothing where the directory was not read yet.
    pub(super) fn with<T>(&self, look: impl FnOnce(&mut Option<Vec<LiveBitmap>>) -> T) -> T {
        let mut list = self.list.lock();
        let result = look(&mut list);
        if let Some(list) = &*list {
            self.active.store(!list.is_empty(), Ordering::Release);
        }
        result
    }

    /// Looks at one bitmap.
    pub(super) fn with_one<T>(
        &self,
        at: usize,
        look: impl FnOnce(&mut LiveBitmap) -> T,
    ) -> Option<T> {
        self.list.lock().as_mut().and_then(|list| list.get_mut(at)).map(look)
    }

    /// Records a change in memory; `false` if the file must first say that bitmaps miss changes.
    fn note(&self, range: ByteRange) -> bool {
        let mut list = self.list.lock();
        let Some(list) = list.as_mut() else { return false };
        if list.iter().any(LiveBitmap::needs_mark) {
            return false;
        }
        list.iter_mut().for_each(|bitmap| bitmap.record(range));
        true
    }
}

/// The right to read and write bitmaps in the file. Operations on the host hold it, too.
pub(super) struct Turn(Arc<OwnedMutexGuard<()>>);

impl Turn {
    pub(super) fn hold(&self) -> block::Hold {
        Some(Arc::clone(&self.0) as _)
    }
}

impl Inner {
    /// Records in all enabled bitmaps that `range` of the disk changes. To be called with `range` locked, before the
    /// change begins: whoever stores or clears bitmaps locks everything.
    ///
    /// # Errors
    /// What reading and marking the bitmap directory fails at: then the change must not begin.
    pub(crate) async fn record_change(&self, live: &Live, range: ByteRange) -> Result<(), Error> {
        if !self.bitmaps.active.load(Ordering::Acquire) {
            return Ok(());
        }
        // Behind the end nothing changes that a bitmap tells of.
        let range = range.intersection(ByteRange::between(0, self.limits().size_bytes));
        while !range.is_empty() && !self.bitmaps.note(range) {
            let turn = self.bitmaps.turn().await;
            self.load_bitmaps(live).await?;
            self.mark_bitmaps(live, &turn).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::dirty::Budget;
    use super::*;

    #[test]
    fn a_bitmap_without_memory_is_inconsistent_and_never_misses_a_change_silently() {
        static BUDGET: Budget = Budget::new(10_000);
        let geometry = ClusterGeometry::of_bytes(65536).unwrap();
        let entry = DirectoryEntry {
            name: b"b".to_vec(),
            table_at: HostOffset(0x50000),
            table_entries: 1,
            granularity_bits: 9,
            in_use: false,
            auto: true,
            extra_is_compatible: false,
            extra: Vec::new(),
        };
        let mut bitmap = LiveBitmap::on_disk(entry, 1 << 40, geometry);
        bitmap.map = DirtyMap::within(&BUDGET, 1 << 40, 9);
        let bitmaps = Bitmaps::new(true);
        bitmaps.with(|list| *list = Some(vec![bitmap]));
        assert!(!bitmaps.note(ByteRange::between(0, 1)), "not before the file says so");
        bitmaps.with_one(0, |bitmap| bitmap.entry.in_use = true);
        let mut recorded = 0u64;
        while bitmaps.with_one(0, |bitmap| bitmap.is_consistent) == Some(true) {
            let at = recorded << 25;
            assert!(bitmaps.note(ByteRange::between(at, at + 1)));
            recorded += 1;
            assert!(recorded < 1000, "the limit is met");
        }
        assert!(recorded > 10);
        let state = |bitmap: &mut LiveBitmap| {
            (bitmap.entry.in_use, bitmap.map.is_empty(), bitmap.is_unsaved())
        };
        assert_eq!(bitmaps.with_one(0, state), Some((true, true, false)));
        // Changes go on all the same.
        assert!(bitmaps.note(ByteRange::between(0, 1)));
    }
}
