//! Tasks that use one image at once, each in slots of its own that share clusters with slots of others, and what they
//! know of every sector. When the operations of the host take effect is up to the test.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use block::{BlockDevice, ByteRange, Durability, MemoryStorage, OpKind, ZeroMode};
use qcow2::Image;
use tokio::task::{JoinHandle, yield_now};

use crate::memory::Shape;

const SECTOR: u64 = 512;
/// The queues in which held operations wait: one for syncs, the others for parts of the file.
const LANES: u64 = 5;
/// So many turns in which nothing moves mean that nothing will.
const MOST_IDLE_TURNS: u32 = 100_000;

/// What a sector holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    Zero,
    /// Its own number and this one, over and over; 0 is what the backing file holds.
    Stamp(u64),
}

impl Value {
    fn stamp(self, sector: u64) -> [u8; 16] {
        match self {
            Self::Zero => [0; 16],
            Self::Stamp(stamp) => (u128::from(sector + 1) << 64 | u128::from(stamp)).to_be_bytes(),
        }
    }

    pub(crate) fn bytes(self, sector: u64) -> Vec<u8> {
        self.stamp(sector).repeat(32)
    }

    /// `None` for what nobody has put there.
    pub(crate) fn of(sector: u64, bytes: &[u8]) -> Option<Self> {
        let stamp = u64::from_be_bytes(bytes[8..16].try_into().unwrap());
        let found = if bytes[..8] == [0; 8] { Self::Zero } else { Self::Stamp(stamp) };
        let expected = found.stamp(sector);
        bytes.chunks(16).all(|part| part == expected).then_some(found)
    }
}

/// A seed's numbers.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (mixed ^ mixed >> 29) % end
    }
}

/// A value that a sector got.
struct Event {
    value: Value,
    /// The log's length when the request that made it began.
    began: usize,
    /// The time when that request returned.
    returned: u64,
    /// The log's length when it was known to be durable; `usize::MAX` if it never was.
    durable: usize,
}

struct Flush {
    /// The time when it began.
    began: u64,
    /// The log's length when it had returned.
    durable: usize,
}

/// One task, between and while it works.
struct Member {
    storage: MemoryStorage,
    clock: Arc<AtomicU64>,
    random: Random,
    /// Its own sectors, as runs.
    slots: Vec<ByteRange>,
    /// What became of each of them, oldest first.
    events: BTreeMap<u64, Vec<Event>>,
    flushes: Vec<Flush>,
}

impl Member {
    fn now(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    async fn work(mut self, image: Image, acts: usize) -> Self {
        for _ in 0..acts {
            self.act(&image).await;
            if self.random.below(3) == 0 {
                let sectors = self.pick();
                for (sector, found) in values(&image, sectors).await {
                    assert_eq!(
                        found,
                        Some(self.last(sector)),
                        "sector {sector} as its owner reads it"
                    );
                }
            }
        }
        self
    }

    /// One request, and what is known because of it.
    async fn act(&mut self, image: &Image) {
        let sectors = self.pick();
        let range = bytes_of(sectors);
        let began = self.storage.log_len();
        let durable = self.random.below(6) == 0;
        let durability = if durable { Durability::Durable } else { Durability::Deferred };
        let mut value = Value::Zero;
        let kind = self.random.below(11);
        match kind {
            0..=3 => {
                value = Value::Stamp(self.now());
                let data: Vec<u8> = sectors_of(sectors).flat_map(|at| value.bytes(at)).collect();
                image.write(range.start(), data.into(), durability).await
            }
            4 => {
                let zeros = vec![0; usize::try_from(range.len()).unwrap()];
                image.write(range.start(), zeros.into(), durability).await
            }
            5 | 6 => {
                let mode = ZeroMode { keep_allocated: kind == 5, fast_only: false };
                image.write_zeroes(range, mode, durability).await
            }
            7 | 8 => image.discard(range, durability).await,
            _ => return self.flush(image).await,
        }
        .unwrap();
        let returned = self.now();
        let durable = if durable { self.storage.log_len() } else { usize::MAX };
        let discarded = matches!(kind, 7 | 8);
        let found = if discarded { values(image, sectors).await } else { Vec::new() };
        let found: BTreeMap<_, _> = found.into_iter().collect();
        for sector in sectors_of(sectors) {
            if discarded {
                let old = self.last(sector);
                value = found[&sector].expect("a discarded sector holds what it was given");
                assert!(
                    value == Value::Zero || value == old,
                    "sector {sector}: {old:?}, {value:?}"
                );
            }
            let event = Event { value, began, returned, durable };
            self.events.get_mut(&sector).unwrap().push(event);
        }
    }

    async fn flush(&mut self, image: &Image) {
        let began = self.now();
        image.flush().await.unwrap();
        self.flushes.push(Flush { began, durable: self.storage.log_len() });
    }

    fn last(&self, sector: u64) -> Value {
        self.events[&sector].last().unwrap().value
    }

    /// All or a part of one of its slots.
    fn pick(&mut self) -> ByteRange {
        let slot = self.random.below(self.slots.len() as u64);
        let slot = self.slots[usize::try_from(slot).unwrap()];
        if self.random.below(2) == 0 {
            return slot;
        }
        let start = slot.start() + self.random.below(slot.len());
        let len = 1 + self.random.below(slot.end() - start);
        ByteRange::between(start, start + len)
    }
}

/// All tasks.
pub(crate) struct Crowd {
    members: Vec<Member>,
}

impl Crowd {
    /// Deals the disk out: slots of single sectors, of parts of clusters and of some clusters, neighbours to different
    /// tasks.
    pub(crate) fn new(shape: &Shape, storage: &MemoryStorage, tasks: u64, seed: u64) -> Self {
        let clock = Arc::new(AtomicU64::new(1));
        let mut random = Random(seed);
        let mut members: Vec<_> = (0..tasks)
            .map(|task| Member {
                storage: storage.clone(),
                clock: Arc::clone(&clock),
                random: Random(seed ^ (task + 1) << 32),
                slots: Vec::new(),
                events: BTreeMap::new(),
                flushes: Vec::new(),
            })
            .collect();
        let content = shape.content();
        let cluster = (u64::from(shape.cluster_bytes) / SECTOR).max(6);
        let (mut at, end) = (0, shape.size_bytes / SECTOR);
        let mut turns = members.len();
        while at < end {
            let longest = [1, cluster, 3 * cluster][usize::try_from(random.below(3)).unwrap()];
            let slot = ByteRange::between(at, (at + 1 + random.below(longest)).min(end));
            turns += 1;
            let number = turns % members.len();
            let owner = &mut members[number];
            owner.slots.push(slot);
            for sector in sectors_of(slot) {
                let bytes =
                    crate::memory::part(&content, bytes_of(ByteRange::between(sector, sector + 1)));
                let value = Value::of(sector, bytes).expect("a stamped disk");
                let first = Event { value, began: 0, returned: 0, durable: 0 };
                owner.events.insert(sector, vec![first]);
            }
            at = slot.end();
        }
        Self { members }
    }

    /// Lets all of them work at once, `acts` requests each.
    pub(crate) async fn work(&mut self, image: &Image, acts: usize) {
        let tasks = self.start(image, acts);
        self.finish(tasks).await;
    }

    /// The same, where each operation of the host waits until a seed's numbers let it go.
    pub(crate) async fn work_held(&mut self, image: &Image, acts: usize, random: &mut Random) {
        let storage = self.members[0].storage.clone();
        let lanes: Vec<_> = (0..LANES)
            .map(|lane| {
                storage.hold(move |op| match op.kind {
                    OpKind::Sync => lane == 0,
                    _ => lane == 1 + op.range.start() / 1536 % (LANES - 1),
                })
            })
            .collect();
        let tasks = self.start(image, acts);
        let (mut idle, mut most) = (0, 0);
        while tasks.iter().any(|task| !task.is_finished()) {
            for _ in 0..random.below(4) {
                yield_now().await;
            }
            most = most.max(lanes.iter().map(block::HeldOps::count).sum());
            let lane = usize::try_from(random.below(LANES)).unwrap();
            idle = if lanes[lane].release_one() { 0 } else { idle + 1 };
            assert!(idle < MOST_IDLE_TURNS, "nothing is in flight, and nobody goes on");
        }
        assert!(most > 2, "they worked at once");
        drop(lanes);
        self.finish(tasks).await;
    }

    fn start(&mut self, image: &Image, acts: usize) -> Vec<JoinHandle<Member>> {
        let members = self.members.drain(..);
        members.map(|member| tokio::spawn(member.work(image.clone(), acts))).collect()
    }

    async fn finish(&mut self, tasks: Vec<JoinHandle<Member>>) {
        for task in tasks {
            self.members.push(task.await.unwrap());
        }
    }

    /// Closes the image, which is a flush, too.
    pub(crate) async fn close(&mut self, image: &Image) {
        let first = &mut self.members[0];
        let began = first.now();
        image.close().await.unwrap();
        first.flushes.push(Flush { began, durable: first.storage.log_len() });
    }

    /// Notes of each value since when it is durable: a flush that began when its request had returned has returned.
    pub(crate) fn settle(&mut self) {
        let flushes: Vec<_> = self.members.iter_mut().flat_map(|m| m.flushes.drain(..)).collect();
        let events = self.members.iter_mut().flat_map(|member| member.events.values_mut());
        for event in events.flatten() {
            let after = flushes.iter().filter(|flush| flush.began > event.returned);
            let durable = after.map(|flush| flush.durable).min().unwrap_or(usize::MAX);
            event.durable = event.durable.min(durable);
        }
    }

    /// Every sector must hold its last value.
    pub(crate) fn assert_last(&self, disk: &[u8], what: &str) {
        self.assert_after(disk, usize::MAX, what, |events, _| events.len() - 1);
    }

    /// Every sector must hold what was durable after `ops` operations of the log, or what a request that had begun has
    /// made of it since.
    pub(crate) fn assert_old_or_new(&self, disk: &[u8], ops: usize, what: &str) {
        self.assert_after(disk, ops, what, |events, ops| {
            events.iter().rposition(|event| event.durable <= ops).unwrap()
        });
    }

    fn assert_after(
        &self,
        disk: &[u8],
        ops: usize,
        what: &str,
        oldest: impl Fn(&[Event], usize) -> usize,
    ) {
        for (sector, events) in self.members.iter().flat_map(|member| &member.events) {
            let bytes =
                crate::memory::part(disk, bytes_of(ByteRange::between(*sector, sector + 1)));
            let found = Value::of(*sector, bytes);
            let first = oldest(events, ops);
            let mut allowed = events[first..]
                .iter()
                .enumerate()
                .filter(|(number, event)| *number == 0 || event.began < ops)
                .map(|(_, event)| event.value);
            let fits = allowed.clone().any(|value| Some(value) == found);
            assert!(fits, "{what}: sector {sector} holds {found:?}, not {:?}", allowed.next());
        }
    }
}

/// The shape over a disk whose sectors are stamped, and which ends before the shape's disk does.
pub(crate) fn over_stamps(shape: Shape) -> Shape {
    let sectors = shape.size_bytes * 2 / 3 / SECTOR;
    let backing = (0..sectors).flat_map(|sector| Value::Stamp(0).bytes(sector)).collect();
    Shape { backing: Some(backing), ..shape }
}

fn sectors_of(sectors: ByteRange) -> impl Iterator<Item = u64> {
    sectors.start()..sectors.end()
}

fn bytes_of(sectors: ByteRange) -> ByteRange {
    ByteRange::between(sectors.start() * SECTOR, sectors.end() * SECTOR)
}

async fn values(image: &Image, sectors: ByteRange) -> Vec<(u64, Option<Value>)> {
    let bytes = image.read(bytes_of(sectors)).await.unwrap().to_vec();
    let chunks = sectors_of(sectors).zip(bytes.chunks(512));
    chunks.map(|(sector, bytes)| (sector, Value::of(sector, bytes))).collect()
}
