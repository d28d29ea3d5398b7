//! What changes an image as a whole, all of it at once and under load: sizes, features, snapshots and bitmaps while
//! guests write and flush. Every sector holds what its owner wrote last, a snapshot what was there when it was taken,
//! no bitmap misses a change, and QEMU finds a clean image that reads the same.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use block::{BlockDevice, DeviceError, Durability, MemoryStorage, ZeroMode};
use qcow2::{AmendOptions, Error, Image, OpenOptions, ResizeOptions, Version};
use tokio::task::{JoinHandle, yield_now};

use super::deeds::{MOST_IDLE_TURNS, Sectors, all_values, bytes_of, values};
use super::judge::assert_clean;
use super::qemu::Qemu;
use super::setup::{Files, SECTOR, Setup};
use crate::common::block_on;
use crate::crowd::{Random, Value};
use crate::rounds::rounds;

const GUESTS: u64 = 3;
/// What each of them does in a round, and what each of the others does.
const REQUESTS: u64 = 14;
const CHANGES: u64 = 5;
const ROUNDS: u64 = 3;
const GRANULARITY_BYTES: u64 = 512;

/// A value that a sector got.
#[derive(Clone, Copy, Debug)]
struct Event {
    value: Value,
    began: u64,
    returned: u64,
}

/// What all tasks share.
#[derive(Clone)]
struct Stage {
    image: Image,
    clock: Arc<AtomicU64>,
    setup: Arc<Setup>,
    /// In sectors: what lies below is always there.
    floor: u64,
}

impl Stage {
    fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    /// Does something to some sectors; what they hold afterwards, where that is known.
    async fn request(
        &self,
        sectors: &Sectors,
        random: &mut Random,
    ) -> Result<Option<Value>, DeviceError> {
        let stamp = Value::Stamp(self.tick());
        let range = bytes_of(sectors);
        let bytes = |value: Value| -> Vec<u8> {
            sectors.clone().flat_map(|sector| value.bytes(sector)).collect()
        };
        let later = if random.below(6) == 0 { Durability::Durable } else { Durability::Deferred };
        let cluster = self.setup.cluster_sectors();
        let is_whole = sectors.start.is_multiple_of(cluster) && sectors.end.is_multiple_of(cluster);
        let kind = random.below(12);
        if self.setup.compresses && is_whole && kind < 6 {
            return match self.image.write_compressed(range.start(), bytes(stamp).into()).await {
                Ok(()) => Ok(Some(stamp)),
                Err(Error::Request(error)) => Err(error),
                Err(error) => panic!("{error}"),
            };
        }
        match kind {
            0..=6 => {
                self.image.write(range.start(), bytes(stamp).into(), later).await?;
                Ok(Some(stamp))
            }
            7 => {
                self.image.write(range.start(), bytes(Value::Zero).into(), later).await?;
                Ok(Some(Value::Zero))
            }
            8 | 9 => {
                let mode = ZeroMode { keep_allocated: kind == 8, fast_only: false };
                self.image.write_zeroes(range, mode, later).await?;
                Ok(Some(Value::Zero))
            }
            _ => self.image.discard(range, later).await.map(|()| None),
        }
    }
}

/// A task with sectors of its own.
struct Guest {
    stage: Stage,
    random: Random,
    slots: Vec<Sectors>,
    events: BTreeMap<u64, Vec<Event>>,
}

impl Guest {
    fn last(&self, sector: u64) -> Value {
        self.events[&sector].last().unwrap().value
    }

    async fn work(mut self) -> Self {
        for _ in 0..REQUESTS {
            let slot = usize::try_from(self.random.below(self.slots.len() as u64)).unwrap();
            let mut sectors = self.slots[slot].clone();
            if self.random.below(2) == 0 {
                sectors.start += self.random.below(sectors.end - sectors.start);
            }
            let began = self.stage.tick();
            let done = self.stage.request(&sectors, &mut self.random).await.unwrap();
            let returned = self.stage.tick();
            let found = values(&self.stage.image, &sectors).await.unwrap();
            for (sector, found) in sectors.zip(found) {
                let old = self.last(sector);
                let fits = match done {
                    Some(wanted) => found == Some(wanted),
                    None => found == Some(old) || found == Some(Value::Zero),
                };
                assert!(fits, "sector {sector} holds {found:?}, not {done:?} over {old:?}");
                let value = found.unwrap();
                if done.is_none() && value == old {
                    // A discard that was not done is no change.
                    continue;
                }
                self.events.get_mut(&sector).unwrap().push(Event { value, began, returned });
            }
            if self.random.below(5) == 0 {
                self.stage.image.flush().await.unwrap();
            }
        }
        self
    }
}

/// Uses what lies behind the floor, while it comes and goes. When each write returned, by its stamp.
async fn squat(stage: Stage, mut random: Random) -> BTreeMap<u64, u64> {
    let mut returned = BTreeMap::new();
    for _ in 0..REQUESTS {
        let end = stage.image.limits().size_bytes / SECTOR;
        if end <= stage.floor {
            yield_now().await;
            continue;
        }
        let start = stage.floor + random.below(end - stage.floor);
        let cluster = stage.setup.cluster_sectors();
        let sectors = match random.below(3) {
            0 => start.next_multiple_of(cluster)..start.next_multiple_of(cluster) + cluster,
            _ => start..(start + 1 + random.below(2 * cluster)).min(end),
        };
        match stage.request(&sectors, &mut random).await {
            Ok(Some(Value::Stamp(stamp))) => {
                returned.insert(stamp, stage.tick());
            }
            Ok(_) | Err(DeviceError::WritePastEnd { .. } | DeviceError::PastEnd { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
    returned
}

/// Gives the disk other sizes: when each of them began, and which it was, in sectors.
async fn resize(stage: Stage, mut random: Random) -> Vec<(u64, u64)> {
    let mut sizes = Vec::new();
    for _ in 0..CHANGES {
        let most = stage.setup.sectors() * 5 / 4;
        let size = stage.floor + 1 + random.below(most - stage.floor);
        let options = ResizeOptions { allow_shrinking: true, ..ResizeOptions::default() };
        let began = stage.tick();
        stage.image.resize(size * SECTOR, &options).await.unwrap();
        sizes.push((began, size));
    }
    sizes
}

async fn amend(stage: Stage, mut random: Random) {
    for _ in 0..CHANGES {
        let bits = [8, 16, 32, 64][usize::try_from(random.below(4)).unwrap()];
        let options = AmendOptions {
            refcount_bits: (random.below(2) == 0).then_some(bits),
            lazy_refcounts: Some(random.below(2) == 0),
            ..AmendOptions::default()
        };
        stage.image.amend(&options).await.unwrap();
    }
}

/// A snapshot, taken at some time between two.
struct Kept {
    name: String,
    began: u64,
    returned: u64,
}

async fn snapshots(stage: Stage, mut random: Random, mut kept: Vec<Kept>) -> Vec<Kept> {
    for _ in 0..CHANGES {
        if kept.len() > 1 || (kept.len() == 1 && random.below(3) == 0) {
            let gone = kept.remove(usize::try_from(random.below(kept.len() as u64)).unwrap());
            stage.image.delete_snapshot_named(&gone.name).await.unwrap();
        } else {
            let began = stage.tick();
            let name = format!("s{began}");
            stage.image.create_snapshot(&name).await.unwrap();
            kept.push(Kept { name, began, returned: stage.tick() });
        }
    }
    kept
}

/// A bitmap, and since when it records changes, if it does.
struct Tracked {
    name: String,
    is_there: bool,
    since: Option<u64>,
}

async fn bitmaps(stage: Stage, mut random: Random, mut tracked: Tracked) -> Tracked {
    let (image, name) = (stage.image.clone(), tracked.name.clone());
    // As long as the others, who wait for each other.
    for _ in 0..3 * CHANGES {
        if !tracked.is_there {
            image.add_bitmap(&name, GRANULARITY_BYTES, true).await.unwrap();
            tracked = Tracked { is_there: true, since: Some(stage.tick()), ..tracked };
            continue;
        }
        match random.below(6) {
            0 => {
                image.remove_bitmap(&name).await.unwrap();
                tracked = Tracked { is_there: false, since: None, ..tracked };
            }
            1 => {
                image.disable_bitmap(&name).await.unwrap();
                tracked.since = None;
            }
            2 | 3 => {
                image.enable_bitmap(&name).await.unwrap();
                tracked.since = tracked.since.or(Some(stage.tick()));
            }
            _ => {
                image.clear_bitmap(&name).await.unwrap();
                tracked.since = tracked.since.map(|_| stage.tick());
            }
        }
    }
    tracked
}

/// Everything that is known between two rounds.
struct Known {
    what: String,
    files: Files,
    stage: Stage,
    guests: Vec<Guest>,
    snapshots: Vec<Vec<Kept>>,
    bitmaps: Vec<Tracked>,
    /// Those of which the disk has one.
    sizes: Vec<u64>,
    /// All that it ever got, as [`resize`] tells them.
    resized: Vec<(u64, u64)>,
    /// As [`squat`] tells it.
    squatted: BTreeMap<u64, u64>,
}

impl Known {
    async fn start(setup: &Setup, seed: u64, what: String) -> Self {
        let files = Files::create(setup).await;
        files.storages().for_each(MemoryStorage::without_fallocate);
        let image = files.open(OpenOptions::writing()).await.unwrap();
        // What lies below reaches further.
        let floor = setup.sectors() / 2;
        let (clock, setup) = (Arc::new(AtomicU64::new(1)), Arc::clone(&files.setup));
        let stage = Stage { image, clock, setup, floor };
        let mut random = Random(seed);
        let mut guests: Vec<Guest> = (0..GUESTS)
            .map(|number| Guest {
                stage: stage.clone(),
                random: Random(seed ^ (number + 1) << 32),
                slots: Vec::new(),
                events: BTreeMap::new(),
            })
            .collect();
        let cluster = stage.setup.cluster_sectors();
        let (mut at, mut number) = (0, 0);
        while at < floor {
            // Parts of clusters, and whole ones.
            let end = match random.below(3) {
                0 if at.is_multiple_of(cluster) => at + cluster * (1 + random.below(2)),
                0 => at.next_multiple_of(cluster),
                _ => at + 1 + random.below(cluster),
            };
            let slot = at..end.min(floor);
            at = slot.end;
            number = (number + 1) % guests.len();
            for sector in slot.clone() {
                let first = Event { value: stage.setup.below(sector), began: 0, returned: 0 };
                guests[number].events.insert(sector, vec![first]);
            }
            guests[number].slots.push(slot);
        }
        let tracked = |name: &str| Tracked { name: name.to_owned(), is_there: false, since: None };
        let takes_snapshots = files.data.is_none();
        Self {
            snapshots: if takes_snapshots { vec![Vec::new(), Vec::new()] } else { Vec::new() },
            bitmaps: vec![tracked("one"), tracked("two")],
            sizes: vec![stage.setup.sectors()],
            resized: Vec::new(),
            squatted: BTreeMap::new(),
            what,
            files,
            stage,
            guests,
        }
    }

    /// All of them at once; where operations of the host are held, a seed's numbers let them go.
    async fn round(&mut self, random: &mut Random, held: bool) {
        let lanes = if held { self.files.hold() } else { Vec::new() };
        let mut seed = || Random(random.below(u64::MAX));
        let stage = || self.stage.clone();
        let squatter = tokio::spawn(squat(stage(), seed()));
        let resizers: Vec<_> = (0..2).map(|_| tokio::spawn(resize(stage(), seed()))).collect();
        let amender = tokio::spawn(amend(stage(), seed()));
        let taken = self.snapshots.drain(..);
        let takers: Vec<_> =
            taken.map(|kept| tokio::spawn(snapshots(stage(), seed(), kept))).collect();
        let recorded = self.bitmaps.drain(..);
        let recorders: Vec<_> =
            recorded.map(|one| tokio::spawn(bitmaps(stage(), seed(), one))).collect();
        let guests: Vec<_> =
            self.guests.drain(..).map(|guest| tokio::spawn(guest.work())).collect();
        let mut idle = 0;
        let running = |tasks: &[JoinHandle<Guest>]| {
            tasks.iter().any(|task| !task.is_finished())
                || !(squatter.is_finished() && amender.is_finished())
                || resizers.iter().any(|task| !task.is_finished())
                || takers.iter().any(|task| !task.is_finished())
                || recorders.iter().any(|task| !task.is_finished())
        };
        while held && running(&guests) {
            for _ in 0..=random.below(4) {
                yield_now().await;
            }
            idle = if self.files.release(&lanes, random) { 0 } else { idle + 1 };
            assert!(idle < MOST_IDLE_TURNS, "nothing is in flight, and nobody goes on");
            if idle > 100 {
                std::thread::yield_now();
            }
        }
        drop(lanes);
        self.squatted.extend(squatter.await.unwrap());
        amender.await.unwrap();
        self.sizes.clear();
        for task in resizers {
            // Whoever was last of the two was last of all.
            let sizes = task.await.unwrap();
            self.sizes.extend(sizes.last().map(|(_, size)| *size));
            self.resized.extend(sizes);
        }
        for task in takers {
            self.snapshots.push(task.await.unwrap());
        }
        for task in recorders {
            self.bitmaps.push(task.await.unwrap());
        }
        for task in guests {
            self.guests.push(task.await.unwrap());
        }
    }

    fn events(&self) -> impl Iterator<Item = (u64, &Vec<Event>)> {
        self.guests.iter().flat_map(|guest| &guest.events).map(|(sector, all)| (*sector, all))
    }

    /// The image that is open is what it should be. What the disk holds.
    async fn assert_holds(&self) -> Vec<Option<Value>> {
        let (what, image) = (&self.what, &self.stage.image);
        let disk = all_values(image).await.unwrap();
        assert!(self.sizes.contains(&(disk.len() as u64)), "{what}: {} sectors", disk.len());
        for (sector, events) in self.events() {
            let found = disk[usize::try_from(sector).unwrap()];
            let last = events.last().unwrap().value;
            assert!(found == Some(last), "{what}: {sector} holds {found:?}, not {last:?}");
        }
        for (sector, found) in (0..).zip(&disk).skip_while(|(sector, _)| *sector < self.stage.floor)
        {
            let found = found.unwrap_or_else(|| panic!("{what}: foreign bytes in {sector}"));
            let Value::Stamp(stamp) = found else { continue };
            // What lies below was there from the start; a write that was refused may have come about in part.
            let since =
                if stamp == 0 { 0 } else { *self.squatted.get(&stamp).unwrap_or(&u64::MAX) };
            let cut = self.resized.iter().find(|(began, size)| *began > since && *size <= sector);
            assert!(cut.is_none(), "{what}: {sector} holds {found:?}, which {cut:?} has cut off");
        }
        let listed = image.bitmaps().await.unwrap();
        assert_eq!(
            listed.len(),
            self.bitmaps.iter().filter(|tracked| tracked.is_there).count(),
            "{what}: {listed:?}"
        );
        for tracked in self.bitmaps.iter().filter(|tracked| tracked.is_there) {
            let dirty = crate::bitmaps::dirty(image, &tracked.name).await;
            let is_dirty = |sector: u64| {
                let at = sector * SECTOR;
                dirty.iter().any(|(start, end)| (*start..*end).contains(&at))
            };
            for (sector, events) in self.events() {
                let missed = events.iter().find(|event| {
                    tracked.since.is_some_and(|since| event.began > since) && !is_dirty(sector)
                });
                assert!(missed.is_none(), "{what}: {} misses {sector}: {missed:?}", tracked.name);
            }
        }
        disk
    }

    /// Each snapshot holds what was there at one moment, or what was being written then.
    async fn assert_snapshots(&self) {
        let listed = self.stage.image.snapshots().await.unwrap();
        let kept: Vec<&Kept> = self.snapshots.iter().flatten().collect();
        assert_eq!(listed.len(), kept.len(), "{}: {listed:?}", self.what);
        for Kept { name, began, returned } in kept {
            let view = self.files.open(OpenOptions::reading().snapshot(name)).await.unwrap();
            let found = all_values(&view).await.unwrap();
            for (sector, events) in self.events() {
                let found = found[usize::try_from(sector).unwrap()];
                let first = events.iter().rposition(|event| event.returned <= *began).unwrap_or(0);
                let mut may = events[first..].iter().filter(|event| event.began < *returned);
                let fits = may.any(|event| Some(event.value) == found);
                assert!(fits, "{}: {name}: {sector} holds {found:?}: {events:?}", self.what);
            }
        }
    }

    /// Bitmaps reach to the end of the disk.
    async fn assert_bitmaps_reach(&mut self) {
        let image = &self.stage.image;
        let end = image.limits().size_bytes / SECTOR;
        let stamp = self.stage.tick();
        let data = Value::Stamp(stamp).bytes(end - 1);
        image.write((end - 1) * SECTOR, data.into(), Durability::Deferred).await.unwrap();
        self.squatted.insert(stamp, self.stage.tick());
        for tracked in self.bitmaps.iter().filter(|tracked| tracked.since.is_some()) {
            let dirty = crate::bitmaps::dirty(image, &tracked.name).await;
            let reaches = dirty.last().is_some_and(|(_, last)| *last == end * SECTOR);
            assert!(reaches, "{}: {} of {end} sectors: {dirty:?}", self.what, tracked.name);
        }
    }

    /// Closed, judged by everybody, and opened again.
    async fn settle(&mut self, number: u64) {
        self.assert_bitmaps_reach().await;
        let disk = self.assert_holds().await;
        self.assert_snapshots().await;
        self.stage.image.close().await.unwrap();
        assert_clean(&self.files, &self.what).await;
        let what = format!("{}, round {number}", self.what);
        if number + 1 == ROUNDS {
            let mut qemu = Qemu::new(&self.files);
            qemu.see(&self.files, &disk, what.clone());
            qemu.assert_reads();
        }
        self.stage.image = self.files.open(OpenOptions::writing()).await.unwrap();
        for guest in &mut self.guests {
            guest.stage = self.stage.clone();
        }
        let again = self.assert_holds().await;
        assert!(again == disk, "{what}: opened again");
        self.assert_snapshots().await;
    }
}

async fn all_at_once(setup: &Setup, seed: u64, held: bool) {
    let what = format!("{}, seed {seed}, held: {held}", setup.name);
    let mut known = Known::start(setup, seed, what).await;
    let mut random = Random(!seed);
    for number in 0..ROUNDS {
        known.round(&mut random, held).await;
        known.settle(number).await;
    }
    known.stage.image.close().await.unwrap();
}

/// Those that can be changed in all these ways.
fn setups() -> impl Iterator<Item = Setup> {
    Setup::all().into_iter().filter(|setup| {
        let options = &setup.options;
        options.version == Version::V3 && options.refcount_bits > 1 && !setup.is_costly()
    })
}

#[test]
fn changes_of_the_whole_image_meet_each_other_and_guests_in_every_order() {
    for setup in setups() {
        for seed in 0..u64::from(rounds(2)) {
            block_on(all_at_once(&setup, seed, true));
        }
    }
}

#[test]
fn changes_of_the_whole_image_meet_each_other_and_guests_on_several_threads() {
    let mut threads = tokio::runtime::Builder::new_multi_thread();
    let runtime = threads.worker_threads(3).enable_time().build().unwrap();
    for setup in setups() {
        for seed in 0..u64::from(rounds(2)) {
            let setup = setup.clone();
            let run = runtime.spawn(async move { all_at_once(&setup, seed, false).await });
            runtime.block_on(run).unwrap();
        }
    }
}
