//! What is done to an image: guests that meet inside clusters, several at once, and beside them or alone what changes
//! snapshots, the bitmap and the size. Each deed tells what it knows when it is done.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use block::{BlockDevice, ByteRange, DeviceError, Durability, ZeroMode};
use qcow2::{Error, Image, OpenOptions, ResizeOptions};
use tokio::task::{JoinHandle, yield_now};

use super::ledger::{Baseline, Event, Flush, Kept, Ledger, Mark};
use super::setup::{Files, SECTOR};
use crate::crowd::{Random, Value};

/// The bitmap that records everything, and the one that others are merged into.
pub(super) const BITMAP: &str = "kept";
const OTHER_BITMAP: &str = "other";
const BITMAP_GRANULARITY: u64 = 1024;
/// So many turns in which nothing moves mean that nothing will: others compute meanwhile.
pub(super) const MOST_IDLE_TURNS: u32 = 20_000_000;

/// Sectors, from the first to before the last.
pub(super) type Sectors = std::ops::Range<u64>;

#[derive(Clone, Debug)]
pub(super) enum Deed {
    Write(Sectors, Durability),
    ZeroData(Sectors, Durability),
    Zero {
        sectors: Sectors,
        keep: bool,
        durability: Durability,
    },
    Discard(Sectors, Durability),
    Compress(Sectors),
    Flush,
    TakeSnapshot(String),
    GoBack(String),
    Forget(String),
    Resize(u64),
    AddBitmap,
    ClearBitmap,
    /// Makes or removes another bitmap, switches it, merges ours into it.
    OtherBitmap(u64),
}

impl Deed {
    /// What it wants its sectors to hold.
    fn intended(&self, stamp: Value) -> Vec<Option<Value>> {
        let value = match self {
            Self::Write(..) | Self::Compress(_) => stamp,
            _ => Value::Zero,
        };
        self.sectors().into_iter().flat_map(Clone::clone).map(|_| Some(value)).collect()
    }

    pub(super) fn sectors(&self) -> Option<&Sectors> {
        match self {
            Self::Write(sectors, _)
            | Self::ZeroData(sectors, _)
            | Self::Zero { sectors, .. }
            | Self::Discard(sectors, _)
            | Self::Compress(sectors) => Some(sectors),
            _ => None,
        }
    }
}

pub(super) fn bytes_of(sectors: &Sectors) -> ByteRange {
    ByteRange::between(sectors.start * SECTOR, sectors.end * SECTOR)
}

/// What sectors hold.
pub(super) async fn values(
    image: &Image,
    sectors: &Sectors,
) -> Result<Vec<Option<Value>>, DeviceError> {
    let bytes = image.read(bytes_of(sectors)).await?.to_vec();
    Ok(sectors.clone().zip(bytes.chunks(512)).map(|(at, bytes)| Value::of(at, bytes)).collect())
}

/// The whole disk.
pub(super) async fn all_values(image: &Image) -> Result<Vec<Option<Value>>, DeviceError> {
    values(image, &(0..image.limits().size_bytes / SECTOR)).await
}

/// What is known of a deed that is being done, was done, or failed.
#[derive(Clone)]
pub(super) struct Done {
    pub deed: Deed,
    pub began: usize,
    pub began_at: u64,
    pub returned: u64,
    /// How many things had happened when it had returned.
    pub now: usize,
    pub is_durable: bool,
    /// What the sectors hold that it was about; for a snapshot what it keeps.
    pub values: Vec<Option<Value>>,
    pub error: Option<Arc<Error>>,
    /// Its future was dropped half-way.
    pub is_dropped: bool,
}

/// Does deeds.
#[derive(Clone)]
pub(super) struct Doer {
    pub files: Files,
    pub clock: Arc<AtomicU64>,
}

impl Doer {
    pub(super) fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    /// What is known of a deed before it is done.
    fn start(&self, deed: Deed) -> Done {
        let began_at = self.tick();
        Done {
            began: self.files.now(),
            began_at,
            returned: u64::MAX,
            now: usize::MAX,
            is_durable: false,
            values: deed.intended(Value::Stamp(began_at)),
            error: None,
            is_dropped: false,
            deed,
        }
    }

    pub(super) async fn run(self, image: Image, deed: Deed) -> Done {
        let done = self.start(deed);
        self.go_on(image, done).await
    }

    async fn go_on(self, image: Image, mut done: Done) -> Done {
        let result = self.perform(&image, &mut done).await;
        done.returned = self.tick();
        done.now = self.files.now();
        done.error = result.err().map(Arc::new);
        if done.error.is_none() && matches!(done.deed, Deed::Discard(..)) {
            // Which of the two it made of them.
            match values(&image, done.deed.sectors().unwrap()).await {
                Ok(found) => done.values = found,
                Err(error) => done.error = Some(Arc::new(Error::Request(error))),
            }
        }
        done
    }

    async fn perform(&self, image: &Image, done: &mut Done) -> Result<(), Error> {
        let mut durability = Durability::Deferred;
        let stamp = Value::Stamp(done.began_at);
        let result = match &done.deed {
            Deed::Write(sectors, wanted) => {
                durability = *wanted;
                let data: Vec<u8> = sectors.clone().flat_map(|at| stamp.bytes(at)).collect();
                image.write(sectors.start * SECTOR, data.into(), durability).await
            }
            Deed::ZeroData(sectors, wanted) => {
                durability = *wanted;
                let len = usize::try_from(bytes_of(sectors).len()).unwrap();
                image.write(sectors.start * SECTOR, vec![0; len].into(), durability).await
            }
            Deed::Zero { sectors, keep, durability: wanted } => {
                durability = *wanted;
                let mode = ZeroMode { keep_allocated: *keep, fast_only: false };
                image.write_zeroes(bytes_of(sectors), mode, durability).await
            }
            Deed::Discard(sectors, wanted) => {
                durability = *wanted;
                image.discard(bytes_of(sectors), durability).await
            }
            Deed::Compress(sectors) => {
                let data: Vec<u8> = sectors.clone().flat_map(|at| stamp.bytes(at)).collect();
                return image.write_compressed(sectors.start * SECTOR, data.into()).await;
            }
            Deed::Flush => image.flush().await,
            _ => return self.restructure(image, done).await,
        };
        done.is_durable = durability == Durability::Durable;
        Ok(result?)
    }

    /// What changes more than guests can.
    async fn restructure(&self, image: &Image, done: &mut Done) -> Result<(), Error> {
        done.is_durable = true;
        match &done.deed {
            Deed::TakeSnapshot(name) => {
                image.create_snapshot(name).await?;
                let view = self.files.open(OpenOptions::reading().snapshot(name)).await?;
                done.values = all_values(&view).await?;
                Ok(())
            }
            Deed::GoBack(name) => image.apply_snapshot(name).await,
            Deed::Forget(name) => image.delete_snapshot(name).await,
            Deed::Resize(sectors) => {
                let options = ResizeOptions { allow_shrinking: true, ..ResizeOptions::default() };
                image.resize(sectors * SECTOR, &options).await
            }
            Deed::AddBitmap => image.add_bitmap(BITMAP, BITMAP_GRANULARITY, true).await,
            Deed::ClearBitmap => image.clear_bitmap(BITMAP).await,
            Deed::OtherBitmap(choice) => {
                let there = image.bitmaps().await?.iter().any(|found| found.name == OTHER_BITMAP);
                match choice {
                    _ if !there => image.add_bitmap(OTHER_BITMAP, 4096, choice % 2 == 0).await,
                    0 => image.remove_bitmap(OTHER_BITMAP).await,
                    1 => image.disable_bitmap(OTHER_BITMAP).await,
                    2 => image.enable_bitmap(OTHER_BITMAP).await,
                    _ => image.merge_bitmap(OTHER_BITMAP, image, BITMAP).await,
                }
            }
            guest => unreachable!("{guest:?} is a guest's"),
        }
    }

    /// Does deeds at once, their operations on the host let go in the order of a seed. With `drops` one of the futures
    /// is dropped half-way; if it wrote, the same sectors are written again at once.
    pub(super) async fn run_all(
        &self,
        image: &Image,
        deeds: Vec<Deed>,
        random: &mut Random,
        drops: bool,
    ) -> Vec<Done> {
        let lanes = self.files.hold();
        let mut known: Vec<Done> = deeds.into_iter().map(|deed| self.start(deed)).collect();
        let start = |done: &Done| tokio::spawn(self.clone().go_on(image.clone(), done.clone()));
        let mut tasks: Vec<JoinHandle<Done>> = known.iter().map(start).collect();
        let mut until_drop = if drops { random.below(30) } else { u64::MAX };
        let mut idle = 0;
        while tasks.iter().any(|task| !task.is_finished()) {
            for _ in 0..=random.below(4) {
                yield_now().await;
            }
            if until_drop == 0 {
                let victim = usize::try_from(random.below(tasks.len() as u64)).unwrap();
                tasks[victim].abort();
                if let Some(sectors) = known[victim].deed.sectors() {
                    let again = self.start(Deed::Write(sectors.clone(), Durability::Deferred));
                    tasks.push(start(&again));
                    known.push(again);
                }
            }
            until_drop = until_drop.wrapping_sub(1);
            idle = if self.files.release(&lanes, random) { 0 } else { idle + 1 };
            assert!(idle < MOST_IDLE_TURNS, "nothing is in flight, and nobody goes on");
            if idle > 100 {
                std::thread::yield_now();
            }
        }
        drop(lanes);
        self.files.note();
        let mut all = Vec::new();
        for (task, known) in tasks.into_iter().zip(known) {
            all.push(match task.await {
                Ok(done) => done,
                Err(error) if error.is_cancelled() => Done { is_dropped: true, ..known },
                Err(error) => std::panic::resume_unwind(error.into_panic()),
            });
        }
        all
    }
}

/// Picks what is done next.
pub(super) fn pick(random: &mut Random, ledger: &Ledger, files: &Files, number: u64) -> Vec<Deed> {
    let setup = &files.setup;
    let mut deeds = Vec::new();
    let structure = structure(random, ledger, files, number);
    if matches!(structure, Some(Deed::GoBack(_))) {
        return structure.into_iter().collect();
    }
    let mut end = ledger.size();
    if let Some(Deed::Resize(to)) = structure {
        end = end.min(to);
    }
    if structure.is_none() || random.below(2) == 0 {
        // Neighbours in a few clusters.
        let clusters = [1, 2, 4, 12][usize::try_from(random.below(4)).unwrap()];
        let span = (setup.cluster_sectors().max(3) * clusters).min(end);
        let base = random.below(end - span + 1);
        let mut edges: Vec<u64> =
            (0..=2 + random.below(4)).map(|_| base + random.below(span + 1)).collect();
        edges.sort_unstable();
        edges.dedup();
        let slots = edges.windows(2).map(|edge| edge[0]..edge[1]);
        deeds.extend(slots.map(|slot| guest(random, slot, files, end)));
    }
    if random.below(4) == 0 {
        deeds.push(Deed::Flush);
    }
    let at = usize::try_from(random.below(deeds.len() as u64 + 1)).unwrap();
    if let Some(structure) = structure {
        deeds.insert(at, structure);
    }
    deeds
}

fn guest(random: &mut Random, sectors: Sectors, files: &Files, end: u64) -> Deed {
    let durability = if random.below(6) == 0 { Durability::Durable } else { Durability::Deferred };
    let kind = random.below(12);
    if files.setup.compresses && kind < 5 {
        let cluster = files.setup.cluster_sectors();
        let first = sectors.start.next_multiple_of(cluster);
        let last = if sectors.end == end { end } else { sectors.end / cluster * cluster };
        if first < last {
            return Deed::Compress(first..last);
        }
    }
    match kind {
        0..=6 => Deed::Write(sectors, durability),
        7 => Deed::ZeroData(sectors, durability),
        8 | 9 => Deed::Zero { sectors, keep: kind == 8, durability },
        _ => Deed::Discard(sectors, durability),
    }
}

fn structure(random: &mut Random, ledger: &Ledger, files: &Files, number: u64) -> Option<Deed> {
    let setup = &files.setup;
    let present: Vec<_> =
        ledger.snapshots.iter().filter(|kept| kept.leaving == usize::MAX).collect();
    let old = setup.options.version == qcow2::Version::V2;
    let any = present.len() as u64;
    let one =
        |random: &mut Random| present[usize::try_from(random.below(any)).unwrap()].name.clone();
    match random.below(12) {
        0 if setup.has_snapshots && any < 3 => Some(Deed::TakeSnapshot(format!("s{number}"))),
        1 if any > 0 => Some(Deed::Forget(one(random))),
        2 if any > 0 && !setup.has_bitmaps => Some(Deed::GoBack(one(random))),
        3 | 4 if setup.resizes && !(old && any > 0) => {
            let most = setup.sectors() * 5 / 4;
            Some(Deed::Resize(most / 3 + random.below(most * 2 / 3)))
        }
        5..=7 if setup.has_bitmaps && ledger.baselines.is_empty() => Some(Deed::AddBitmap),
        5 if setup.has_bitmaps => Some(Deed::ClearBitmap),
        6 if setup.has_bitmaps => Some(Deed::OtherBitmap(random.below(5))),
        _ => None,
    }
}

/// Writes what was done into the ledger.
pub(super) fn note(ledger: &mut Ledger, done: Vec<Done>) {
    let (before, mark) = (ledger.content(), ledger.mark());
    let structures: Vec<&Done> = done.iter().filter(|done| done.deed.sectors().is_none()).collect();
    for done in done.iter().filter(|done| done.deed.sectors().is_some()) {
        let sectors = done.deed.sectors().unwrap().clone();
        if done.is_dropped {
            // It may have come about before what was written there again.
            let values = done.values.iter().map(|value| value.unwrap());
            sectors.zip(values).for_each(|(sector, value)| ledger.push(sector, done.event(value)));
            continue;
        }
        for (sector, value) in sectors.zip(&done.values) {
            let value =
                value.unwrap_or_else(|| panic!("{:?}: foreign bytes in {sector}", done.deed));
            let old = ledger.last(sector);
            let discards = matches!(done.deed, Deed::Discard(..));
            assert!(
                !discards || value == old || value == Value::Zero,
                "discarded {sector}: {value:?}"
            );
            ledger.push(sector, done.event(value));
        }
    }
    for done in structures.into_iter().filter(|done| !done.is_dropped) {
        note_structure(ledger, done, &before, &mark);
    }
}

fn note_structure(ledger: &mut Ledger, done: &Done, before: &[Value], mark: &Mark) {
    match &done.deed {
        Deed::Flush => ledger.flushes.push(Flush { began: done.began_at, durable: done.now }),
        Deed::TakeSnapshot(name) => {
            let content: Vec<Value> = done.values.iter().map(|value| value.unwrap()).collect();
            for (sector, value) in content.iter().enumerate() {
                // A write whose future was dropped, and the one that came after it.
                let mut known = ledger.sectors[sector].iter().rev().take(2);
                let fits =
                    known.any(|event| event.value == *value) || before.get(sector) == Some(value);
                assert!(fits, "snapshot {name}: sector {sector} holds {value:?}");
            }
            ledger.snapshots.push(Kept {
                name: name.clone(),
                content,
                began: done.began,
                durable: done.now,
                leaving: usize::MAX,
                gone: usize::MAX,
            });
        }
        Deed::GoBack(name) => {
            let kept = ledger.snapshots.iter().rfind(|kept| kept.name == *name).unwrap();
            let content = kept.content.clone();
            let size = content.len() as u64;
            if size != ledger.size() {
                ledger.resized(done.event(size));
            }
            for (sector, value) in content.into_iter().enumerate() {
                ledger.push(sector as u64, done.event(value));
            }
        }
        Deed::Forget(name) => {
            let kept = ledger.snapshots.iter_mut().rfind(|kept| kept.name == *name).unwrap();
            (kept.leaving, kept.gone) = (done.began, done.now);
        }
        Deed::Resize(sectors) => ledger.resized(done.event(*sectors)),
        Deed::AddBitmap | Deed::ClearBitmap => {
            let content = ledger.since(mark);
            ledger.baselines.push(Baseline { began: done.began, durable: done.now, content });
        }
        _ => {}
    }
}

impl Done {
    pub(super) fn event<T>(&self, value: T) -> Event<T> {
        let durable = if self.is_durable { self.now } else { usize::MAX };
        Event { value, began: self.began, returned: self.returned, durable }
    }
}
