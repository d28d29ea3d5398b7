//! Hosts that fail and futures that are dropped, at any operation and in all configurations: what failed is old or
//! new, nothing else is lost, the image goes on or has to be opened again, and the file is an image at every moment.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use block::{BlockDevice, MemoryStorage, OpKind, OpView};
use qcow2::{Error, Image, OpenOptions};

use super::deeds::{BITMAP, Deed, Doer, Done, all_values, note, pick};
use super::judge::{Judge, assert_clean, assert_consistent, is_dirty};
use super::ledger::{Baseline, Event, Flush, Kept, Ledger, allowed};
use super::setup::{Files, Setup};
use crate::common::block_on;
use crate::crowd::{Random, Value};
use crate::rounds::rounds;

/// The batches of one run.
const BATCHES: u64 = 12;

/// A run in which something goes wrong.
struct Run {
    what: String,
    files: Files,
    doer: Doer,
    ledger: Ledger,
    image: Image,
    /// Something may have been left allocated.
    leaks: bool,
    /// The deeds that failed.
    failures: u32,
}

impl Run {
    async fn start(setup: &Setup, what: String) -> Self {
        let files = Files::create(setup).await;
        files.storages().for_each(MemoryStorage::without_fallocate);
        let doer = Doer { files: files.clone(), clock: Arc::new(1.into()) };
        let image = files.open(OpenOptions::writing()).await.unwrap();
        Self { what, doer, ledger: Ledger::new(setup), image, leaks: false, failures: 0, files }
    }

    /// Does what comes to mind, one after the other.
    async fn work(&mut self, random: &mut Random, batches: Range<u64>) {
        for number in batches {
            let before = self.failures;
            for deed in pick(random, &self.ledger, &self.files, number) {
                let sectors = deed.sectors().map_or(0, |sectors| sectors.end);
                if sectors > self.ledger.size() {
                    continue;
                }
                let done = self.doer.clone().run(self.image.clone(), deed).await;
                self.failures += u32::from(done.error.is_some());
                self.take(vec![done]).await;
            }
            if self.failures > before {
                self.end_trouble();
            }
        }
    }

    fn end_trouble(&self) {
        self.files.storages().for_each(MemoryStorage::clear_faults);
    }

    /// Takes in what was done, and what became of that which was not.
    async fn take(&mut self, done: Vec<Done>) {
        let before = self.ledger.clone();
        let (failed, rest): (Vec<Done>, Vec<Done>) =
            done.into_iter().partition(|done| done.error.is_some());
        let lost: Vec<Done> = rest
            .iter()
            .filter(|done| done.is_dropped && done.deed.sectors().is_none())
            .chain(&failed)
            .cloned()
            .collect();
        note(&mut self.ledger, rest);
        if lost.is_empty() {
            return;
        }
        if self.is_poisoned().await {
            assert!(self.image.close().await.is_err(), "{}", self.what);
            self.reopen(&lost, &before).await;
        } else {
            self.find_out(&lost, &before, false).await;
        }
    }

    /// What was not durable when the image was given up is as after a power cut that lost nothing.
    async fn reopen(&mut self, lost: &[Done], before: &Ledger) {
        self.leaks = true;
        if !is_dirty(&self.files) {
            assert_consistent(&self.files, &self.what).await;
        }
        self.end_trouble();
        self.image = self.files.open(OpenOptions::writing()).await.unwrap();
        self.ledger.settle();
        self.find_out(lost, before, true).await;
    }

    /// Closes the image, which may fail, too, and opens it again.
    async fn close_in_trouble(&mut self) {
        let began = self.doer.tick();
        if self.image.close().await.is_err() {
            self.failures += 1;
            let before = self.ledger.clone();
            return self.reopen(&[], &before).await;
        }
        self.ledger.flushes.push(Flush { began, durable: self.files.now() });
        self.assert_sound().await;
        self.end_trouble();
        self.image = self.files.open(OpenOptions::writing()).await.unwrap();
    }

    async fn assert_sound(&self) {
        if self.leaks {
            assert_consistent(&self.files, &self.what).await;
        } else {
            assert_clean(&self.files, &self.what).await;
        }
    }

    async fn is_poisoned(&self) -> bool {
        let read = self.image.read(crate::common::range(0, 512)).await;
        matches!(&read, Err(block::DeviceError::Backend { source, .. })
            if matches!(source.downcast_ref::<Error>(), Some(Error::Poisoned { .. })))
    }

    /// Looks what is there: what was not touched must be what it was, what was touched old or new.
    async fn find_out(&mut self, lost: &[Done], before: &Ledger, reopened: bool) {
        let what = &self.what;
        let (now, tick) = (self.files.now(), self.doer.tick());
        let disk = all_values(&self.image).await.unwrap();
        let began = lost.iter().map(|done| done.began).min().unwrap_or(now);
        let size = disk.len() as u64;
        if size != self.ledger.size() {
            let resized = lost.iter().any(|done| match &done.deed {
                Deed::Resize(to) => *to == size,
                Deed::GoBack(_) => true,
                _ => false,
            });
            assert!(resized || reopened, "{what}: {size} sectors");
            self.ledger.resized(Event { value: size, began, returned: tick, durable: usize::MAX });
        }
        for (sector, found) in disk.iter().enumerate() {
            let found = found.unwrap_or_else(|| panic!("{what}: foreign bytes in {sector}"));
            let at = sector as u64;
            let old = self.ledger.last(at);
            let wanted = lost.iter().flat_map(|done| self.wanted(done, at));
            let wanted: Vec<Value> = wanted.collect();
            let mut fits = found == old || wanted.contains(&found);
            if reopened {
                fits |= allowed(&self.ledger.sectors[sector], now).any(|value| *value == found);
            }
            assert!(fits, "{what}: sector {sector} holds {found:?}, not {old:?} or {wanted:?}");
            let event = |value| Event { value, began, returned: tick, durable: usize::MAX };
            for value in wanted.into_iter().chain((found != old).then_some(found)) {
                self.ledger.push(at, event(value));
            }
            if self.ledger.last(at) != found {
                self.ledger.push(at, event(found));
            }
        }
        self.find_snapshots(lost).await;
        self.find_bitmap(lost, before).await;
    }

    /// What a deed that failed may have made of a sector.
    fn wanted(&self, done: &Done, sector: u64) -> Option<Value> {
        match (&done.deed, done.deed.sectors()) {
            (_, Some(sectors)) if sectors.contains(&sector) => {
                done.values.get(usize::try_from(sector - sectors.start).unwrap()).copied()?
            }
            (Deed::Resize(to), _) if sector >= *to => Some(Value::Zero),
            (Deed::GoBack(name), _) => {
                let kept = self.ledger.snapshots.iter().rfind(|kept| kept.name == *name)?;
                kept.content.get(usize::try_from(sector).unwrap()).copied()
            }
            _ => None,
        }
    }

    async fn find_snapshots(&mut self, lost: &[Done]) {
        let listed = self.image.snapshots().await.unwrap();
        let now = self.files.now();
        for done in lost {
            match &done.deed {
                Deed::TakeSnapshot(name) if listed.iter().any(|one| one.name == *name) => {
                    let options = OpenOptions::reading().snapshot(name);
                    let view = self.files.open(options).await.unwrap();
                    let content = all_values(&view).await.unwrap();
                    self.ledger.snapshots.push(Kept {
                        name: name.clone(),
                        content: content.into_iter().map(Option::unwrap).collect(),
                        began: done.began,
                        durable: usize::MAX,
                        leaving: usize::MAX,
                        gone: usize::MAX,
                    });
                }
                Deed::Forget(name) => {
                    let is_there = listed.iter().any(|one| one.name == *name);
                    let mut all = self.ledger.snapshots.iter_mut();
                    let kept = all.rfind(|kept| kept.name == *name).unwrap();
                    if !is_there {
                        (kept.leaving, kept.gone) = (done.began, usize::MAX);
                    }
                }
                _ => {}
            }
        }
        for kept in self.ledger.snapshots.iter().filter(|kept| kept.leaving == usize::MAX) {
            let is_there = listed.iter().any(|one| one.name == kept.name);
            assert!(is_there, "{}, {now}: snapshot {} is gone", self.what, kept.name);
        }
    }

    /// A bitmap that may have been made or cleared counts from then on.
    async fn find_bitmap(&mut self, lost: &[Done], before: &Ledger) {
        let changes = |done: &&Done| matches!(done.deed, Deed::AddBitmap | Deed::ClearBitmap);
        let Some(done) = lost.iter().find(changes) else { return };
        let listed = self.image.bitmaps().await.unwrap();
        if listed.iter().any(|bitmap| bitmap.name == BITMAP) {
            let content = self.ledger.since(&before.mark());
            let durable = usize::MAX;
            self.ledger.baselines.push(Baseline { began: done.began, durable, content });
        }
    }

    /// Closes the image, and cuts the power at some moments of what was.
    async fn finish(mut self, random: &mut Random) {
        self.end_trouble();
        let disk = all_values(&self.image).await.unwrap();
        let expected: Vec<_> = self.ledger.content().into_iter().map(Some).collect();
        let wrong = disk.iter().zip(&expected).position(|(found, known)| found != known);
        if let Some(at) = wrong.filter(|_| disk != expected) {
            let (found, known) = (disk[at], &self.ledger.sectors[at]);
            panic!("{}: sector {at} holds {found:?}, not the last of {known:?}", self.what);
        }
        assert_eq!(disk.len(), expected.len(), "{}", self.what);
        let began = self.doer.tick();
        self.image.close().await.unwrap();
        self.ledger.flushes.push(Flush { began, durable: self.files.now() });
        self.assert_sound().await;
        self.ledger.settle();
        let all = self.files.now();
        for number in 0..5 {
            let now =
                if number == 0 { all } else { usize::try_from(random.below(all as u64)).unwrap() };
            let what = format!("{}: power cut after {now} of {all}, {number}", self.what);
            let left = self.files.cut(now, number + 3);
            let judge = Judge { ledger: &self.ledger, now, what };
            judge.judge(&left, number + 3).await;
        }
    }
}

/// What goes wrong.
#[derive(Clone, Copy, Debug)]
enum Trouble {
    /// One operation finds no room.
    Full,
    /// From one operation on there is no room for any write, until somebody has noticed and made room.
    FullForAWhile,
    /// One operation fails for another reason.
    Broken,
}

/// What goes wrong in turns.
const TROUBLES: [Trouble; 3] = [Trouble::Full, Trouble::FullForAWhile, Trouble::Broken];

/// Lets the `nth` change of the files fail. How many deeds failed, and how many changes there were.
async fn fails(setup: &Setup, seed: u64, nth: usize, trouble: Trouble) -> (u32, usize) {
    let mut run =
        Run::start(setup, format!("{}, seed {seed}, {trouble:?} at {nth}", setup.name)).await;
    let seen = Arc::new(AtomicUsize::new(0));
    for file in run.files.storages() {
        let seen = Arc::clone(&seen);
        let number = move |op: &OpView| match op.kind {
            OpKind::Read | OpKind::Map => None,
            _ => Some(seen.fetch_add(1, Ordering::SeqCst)),
        };
        match trouble {
            Trouble::Full | Trouble::Broken => {
                let kind = match trouble {
                    Trouble::Full => io::ErrorKind::StorageFull,
                    _ => io::ErrorKind::Other,
                };
                file.fail_nth(0, kind, move |op| number(op) == Some(nth));
            }
            Trouble::FullForAWhile => {
                let is_after =
                    move |op: &OpView| number(op) >= Some(nth) && op.kind == OpKind::Write;
                file.fail_from(0, io::ErrorKind::StorageFull, is_after);
            }
        }
    }
    run.work(&mut Random(77 + seed), 0..BATCHES).await;
    run.close_in_trouble().await;
    run.work(&mut Random(!seed), BATCHES..BATCHES + 2).await;
    let failures = run.failures;
    run.finish(&mut Random(nth as u64)).await;
    (failures, seen.load(Ordering::SeqCst))
}

/// Drops one future in every other batch.
async fn drops(setup: &Setup, seed: u64) {
    let mut run = Run::start(setup, format!("{}, futures dropped, seed {seed}", setup.name)).await;
    let mut random = Random(seed);
    for number in 0..BATCHES {
        let deeds = pick(&mut random, &run.ledger, &run.files, number);
        let done = run.doer.run_all(&run.image, deeds, &mut random, number % 2 == 0).await;
        run.take(done).await;
    }
    run.finish(&mut random).await;
}

/// Each change of the files fails, in every way.
fn each_change_fails(name: &str) {
    let setup = Setup::all().into_iter().find(|setup| setup.name == name).unwrap();
    for seed in 0..u64::from(rounds(1)) {
        let (_, all) = block_on(fails(&setup, seed, usize::MAX, Trouble::Full));
        for trouble in TROUBLES {
            let failures: u32 =
                (0..all).map(|nth| block_on(fails(&setup, seed, nth, trouble)).0).sum();
            assert!(failures as usize > all / 2, "{trouble:?}: {failures} failures in {all} runs");
        }
    }
}

macro_rules! each_change_may_fail {
    ($($test:ident: $name:literal;)*) => {
        $(#[test]
        fn $test() {
            each_change_fails($name);
        })*
    };
}

each_change_may_fail! {
    each_change_of_a_file_with_snapshots_and_bitmaps_may_fail: "all-512";
    each_change_of_a_file_with_lazy_refcounts_may_fail: "lazy-4k";
    each_change_of_a_file_with_extended_entries_may_fail: "extended-16k";
    each_change_of_a_file_and_its_data_file_may_fail: "data-512";
    each_change_of_a_file_with_refcounts_of_one_bit_may_fail: "bits-1-512";
    each_change_of_a_file_over_an_image_may_fail: "image-below-16k";
}

#[test]
fn some_changes_of_a_file_may_fail_in_every_configuration() {
    let mut failures = 0;
    for (number, setup) in Setup::all().iter().enumerate() {
        let wanted = usize::try_from(rounds(if setup.is_costly() { 1 } else { 12 })).unwrap();
        let (_, all) = block_on(fails(setup, 0, usize::MAX, Trouble::Full));
        let step = (all / wanted).max(1);
        for (turn, nth) in (0..all).skip(number * 7 % step).step_by(step).enumerate() {
            let trouble = TROUBLES[(number + turn) % TROUBLES.len()];
            failures += block_on(fails(setup, 0, nth, trouble)).0;
        }
    }
    assert!(failures > 100, "only {failures} failures were noticed");
}

#[test]
fn futures_may_be_dropped_anywhere_in_every_configuration() {
    for setup in &Setup::all() {
        for seed in 0..u64::from(rounds(if setup.is_costly() { 1 } else { 6 })) {
            block_on(drops(setup, seed));
        }
    }
}

/// A stale write of the header would bring back what was before the snapshot.
#[test]
fn a_dropped_first_change_does_not_undo_a_later_header() {
    let setups = Setup::all();
    let setup = setups.iter().find(|setup| setup.name == "lazy-4k").unwrap();
    // Where nothing is aligned writes go straight to the host, which orders none of them.
    let setup = &Setup { align: 1, ..setup.clone() };
    block_on(async {
        let run = Run::start(setup, "a late header".to_owned()).await;
        let first = std::sync::atomic::AtomicBool::new(true);
        let held = run.files.image.hold(move |op| {
            let header = op.kind == OpKind::Write && op.range.start() == 0;
            header && first.swap(false, std::sync::atomic::Ordering::SeqCst)
        });
        let image = run.image.clone();
        let task = tokio::spawn(async move {
            image.write(0, vec![1; 4096].into(), block::Durability::Deferred).await
        });
        while held.count() == 0 {
            tokio::task::yield_now().await;
        }
        task.abort();
        assert!(task.await.unwrap_err().is_cancelled());
        let image = run.image.clone();
        let taken = tokio::spawn(async move { image.create_snapshot("kept").await.map(drop) });
        for _ in 0..1000 {
            tokio::task::yield_now().await;
        }
        assert!(held.release_one());
        drop(held);
        taken.await.unwrap().unwrap();
        run.image.close().await.unwrap();
        assert_clean(&run.files, "after a late header").await;
        let again = run.files.open(OpenOptions::reading()).await.unwrap();
        assert_eq!(again.snapshots().await.unwrap().len(), 1, "the snapshot is gone");
    });
}
