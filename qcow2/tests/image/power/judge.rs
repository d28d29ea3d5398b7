//! What a power cut may leave: an image with leaks at most, every sector old or new, snapshots whole, no bitmap that
//! looks right and misses a change, and a disk that can be written on.

use block::BlockDevice;
use qcow2::{Image, OpenOptions, Repair};

use super::deeds::{BITMAP, Deed, Doer, all_values};
use super::ledger::{Ledger, allowed};
use super::setup::{Files, SECTOR};
use crate::crowd::{Random, Value};

/// Judges what is left after `now` things.
pub(super) struct Judge<'a> {
    pub ledger: &'a Ledger,
    pub now: usize,
    pub what: String,
}

impl Judge<'_> {
    /// What the disk holds.
    pub(super) async fn judge(&self, left: &Files, number: u64) -> Vec<Option<Value>> {
        let what = &self.what;
        let dirty = is_dirty(left);
        if !dirty {
            assert_consistent(left, what).await;
        }
        let image = left.open(OpenOptions::reading()).await;
        let image = image.unwrap_or_else(|error| panic!("{what}: {error}"));
        let disk = all_values(&image).await;
        let disk = disk.unwrap_or_else(|error| panic!("{what}: {error:?}"));
        self.judge_disk(&disk);
        self.judge_bitmap(&image, &disk).await;
        self.judge_snapshots(&image, left, number.is_multiple_of(5)).await;
        if dirty || number.is_multiple_of(6) {
            self.goes_on(left, disk.clone(), number).await;
        }
        disk
    }

    fn judge_disk(&self, disk: &[Option<Value>]) {
        let (what, ledger) = (&self.what, self.ledger);
        let size = disk.len() as u64;
        assert!(allowed(&ledger.sizes, self.now).any(|one| *one == size), "{what}: {size} sectors");
        for (sector, found) in disk.iter().enumerate() {
            let events = &ledger.sectors[sector];
            let fits = allowed(events, self.now).any(|value| Some(*value) == *found);
            assert!(fits, "{what}: sector {sector} holds {found:?}: {events:?}");
        }
    }

    /// Once it was durable it is there, and if it is not marked it tells of every sector that differs.
    async fn judge_bitmap(&self, image: &Image, disk: &[Option<Value>]) {
        let (what, ledger) = (&self.what, self.ledger);
        if ledger.baselines.is_empty() {
            return;
        }
        let bitmaps = image.bitmaps().await.unwrap();
        let Some(found) = bitmaps.iter().find(|bitmap| bitmap.name == BITMAP) else {
            assert!(ledger.baselines[0].durable > self.now, "{what}: the bitmap is gone");
            return;
        };
        // One that was cleared before may tell of more, never of less.
        let baseline = ledger.baselines.iter().rfind(|baseline| baseline.began < self.now);
        let Some(baseline) = baseline.filter(|_| !found.inconsistent) else { return };
        let dirty = crate::bitmaps::dirty(image, BITMAP).await;
        for (sector, found) in disk.iter().enumerate() {
            let at = sector as u64 * SECTOR;
            let known = dirty.iter().any(|(start, end)| (*start..*end).contains(&at));
            let held = baseline.content.get(sector).map_or(&[][..], Vec::as_slice);
            let same = found.is_some_and(|found| held.contains(&found));
            assert!(
                known || same,
                "{what}: sector {sector} holds {found:?}, none of {held:?}, which the bitmap misses"
            );
        }
    }

    async fn judge_snapshots(&self, image: &Image, left: &Files, in_full: bool) {
        let (what, now) = (&self.what, self.now);
        let listed = image.snapshots().await.unwrap();
        for kept in &self.ledger.snapshots {
            let is_there = listed.iter().any(|one| one.name == kept.name);
            assert!(!is_there || (kept.began < now && kept.gone > now), "{what}: {}", kept.name);
            let must_be = kept.durable <= now && kept.leaving >= now;
            assert!(is_there || !must_be, "{what}: snapshot {} is gone", kept.name);
            if is_there && in_full {
                let view = left.open(OpenOptions::reading().snapshot(&kept.name)).await.unwrap();
                let found = all_values(&view).await.unwrap();
                let fits = found.len() == kept.content.len()
                    && found.iter().zip(&kept.content).all(|(a, b)| *a == Some(*b));
                assert!(fits, "{what}: snapshot {} has changed", kept.name);
            }
        }
    }

    /// The image is opened for writing, written, closed, and reads as it should.
    async fn goes_on(&self, left: &Files, disk: Vec<Option<Value>>, number: u64) {
        let what = &self.what;
        let again = left.copy();
        let image = again.open(OpenOptions::writing()).await;
        let image = image.unwrap_or_else(|error| panic!("{what}: for writing: {error}"));
        assert!(!is_dirty(&again), "{what}: rebuilt when it was opened");
        // Lost power once more, while or after counting.
        let things = again.now();
        for thing in [things / 3, things * 2 / 3, things] {
            let twice = again.cut(thing, number);
            let reread = twice.open(OpenOptions::writing()).await;
            let reread = reread.unwrap_or_else(|error| panic!("{what}: twice: {error}"));
            assert!(all_values(&reread).await.unwrap() == disk, "{what}: lost power twice");
            if thing < things {
                break;
            }
        }
        let doer = Doer { files: again.clone(), clock: std::sync::Arc::new((1 << 40).into()) };
        let mut expected = disk;
        let len = expected.len() as u64;
        let mut random = Random(number);
        for nth in 0..4 {
            let start = random.below(len);
            let sectors = start..(start + 1 + random.below(150)).min(len);
            let deed = match nth {
                0 => Deed::Discard(sectors, block::Durability::Deferred),
                _ => Deed::Write(sectors, block::Durability::Deferred),
            };
            let done = doer.clone().run(image.clone(), deed).await;
            assert!(done.error.is_none(), "{what}: {:?}", done.error);
            for (sector, value) in done.deed.sectors().unwrap().clone().zip(done.values) {
                expected[usize::try_from(sector).unwrap()] = value;
            }
        }
        if again.setup.has_snapshots && number.is_multiple_of(4) {
            image.create_snapshot("afterwards").await.unwrap();
        }
        image.close().await.unwrap();
        assert_consistent(&again, &format!("{what}, afterwards")).await;
        let image = again.open(OpenOptions::reading()).await.unwrap();
        assert!(all_values(&image).await.unwrap() == expected, "{what}: written afterwards");
    }
}

/// Bit 0 of the incompatible features of version 3.
pub(super) fn is_dirty(files: &Files) -> bool {
    let bytes = files.image.snapshot();
    bytes[7] == 3 && bytes[79] & 1 == 1
}

pub(super) async fn assert_consistent(files: &Files, what: &str) {
    let (file, _) = files.open_hosts();
    let report = Image::check_on(&file, Repair::None, |_| {}).await.unwrap();
    assert!(report.is_consistent(), "{what}: {:?}", report.findings);
}

pub(super) async fn assert_clean(files: &Files, what: &str) {
    let (file, _) = files.open_hosts();
    let report = Image::check_on(&file, Repair::None, |_| {}).await.unwrap();
    assert!(report.is_clean() && !is_dirty(files), "{what}: {report:?}");
}
