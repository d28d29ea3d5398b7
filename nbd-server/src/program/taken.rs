//! Which blocks of a disk were written, and how much memory knowing it may take. What is in the blocks is elsewhere.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// How many blocks a word tells of, how many words a map has, and how many blocks a map tells of.
const WORD_BLOCKS: u64 = 64;
const MAP_WORDS: usize = 64;
const MAP_BLOCKS: u64 = 4096;
/// How many parts one addition can make: a map at either end, and what is whole between them.
const GROWTH: usize = 3;

/// What all disks of one export may know of together, in parts. A part takes at most 600 bytes or so, and in blocks of
/// 4 KiB one of scattered writes covers 16 MiB of the disk, one of writes in order any length.
#[derive(Debug)]
pub(super) struct Room(AtomicUsize);

impl Room {
    /// Parts, by default: at most 75 MiB.
    pub(super) const PARTS: usize = 1 << 17;

    pub(super) fn new(parts: usize) -> Arc<Self> {
        Arc::new(Self(AtomicUsize::new(parts)))
    }

    /// Takes `more` parts for a disk that holds some: only where at least as many stay for the others.
    fn take(&self, held: usize, more: usize) -> bool {
        let rest = |free: usize| free.checked_sub(more).filter(|rest| *rest >= held + more);
        self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, rest).is_ok()
    }

    fn give_back(&self, parts: usize) {
        self.0.fetch_add(parts, Ordering::AcqRel);
    }
}

/// There is no room to know of more.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("no memory is left to know what was written: the writes are too scattered")]
pub(super) struct NoRoom;

/// A part of what is known, from the number of a map on that is its key.
#[derive(Debug)]
enum Part {
    /// All blocks up to the beginning of this map. Neighbours are one part.
    Whole(u64),
    /// Some blocks of one map: neither none nor all.
    Some(Box<[u64; MAP_WORDS]>),
}

/// Which blocks were written. Questions and additions take time for what they find, not for how long their range is.
#[derive(Debug)]
pub(super) struct Taken {
    parts: BTreeMap<u64, Part>,
    room: Arc<Room>,
    /// Parts that were taken from the room.
    held: usize,
}

impl Taken {
    pub(super) fn new(room: Arc<Room>) -> Self {
        Self { parts: BTreeMap::new(), room, held: 0 }
    }

    /// What further disks share.
    pub(super) fn room(&self) -> &Arc<Room> {
        &self.room
    }

    /// Sees to it that adding these blocks finds room.
    ///
    /// # Errors
    /// [`NoRoom`]. What is known already needs none.
    pub(super) fn prepare(&mut self, blocks: &Range<u64>) -> Result<(), NoRoom> {
        if blocks.is_empty() || self.run(blocks.clone()) == (blocks.end, true) {
            return Ok(());
        }
        let more = (self.parts.len() + GROWTH).saturating_sub(self.held);
        if !self.room.take(self.held, more) {
            return Err(NoRoom);
        }
        self.held += more;
        Ok(())
    }

    /// Adds blocks that were prepared for.
    pub(super) fn add(&mut self, blocks: Range<u64>) {
        let (first, last) = (blocks.start.div_ceil(MAP_BLOCKS), blocks.end / MAP_BLOCKS);
        if first > last {
            // Within one map.
            self.mark(last, blocks.start % MAP_BLOCKS..blocks.end % MAP_BLOCKS);
        } else {
            if !blocks.start.is_multiple_of(MAP_BLOCKS) {
                self.mark(first - 1, blocks.start % MAP_BLOCKS..MAP_BLOCKS);
            }
            self.fill(first..last);
            if !blocks.end.is_multiple_of(MAP_BLOCKS) {
                self.mark(last, 0..blocks.end % MAP_BLOCKS);
            }
        }
        let unused = self.held.saturating_sub(self.parts.len() + GROWTH);
        self.held -= unused;
        self.room.give_back(unused);
    }

    /// Where the longest run from the beginning of `blocks` ends whose blocks are all taken or all not, and which.
    pub(super) fn run(&self, blocks: Range<u64>) -> (u64, bool) {
        let (mut at, taken) = self.step(blocks.start);
        while at < blocks.end {
            let (next, is_taken) = self.step(at);
            if is_taken != taken {
                break;
            }
            at = next;
        }
        (at.min(blocks.end), taken)
    }

    /// Where the part, or the run in a map, or the gap ends in which a block lies, and whether it is taken.
    fn step(&self, block: u64) -> (u64, bool) {
        let map = block / MAP_BLOCKS;
        match self.parts.range(..=map).next_back() {
            Some((_, Part::Whole(end))) if map < *end => (end.saturating_mul(MAP_BLOCKS), true),
            Some((key, Part::Some(words))) if *key == map => {
                let (end, taken) = run_in(words, block % MAP_BLOCKS);
                (map * MAP_BLOCKS + end, taken)
            }
            _ => {
                let next = self.parts.range(map + 1..).next();
                (next.map_or(u64::MAX, |(key, _)| key * MAP_BLOCKS), false)
            }
        }
    }

    /// Adds blocks of one map.
    fn mark(&mut self, map: u64, blocks: Range<u64>) {
        if blocks.is_empty() {
            return;
        }
        if matches!(self.parts.range(..=map).next_back(), Some((_, Part::Whole(end))) if map < *end)
        {
            return;
        }
        let part = self.parts.entry(map).or_insert_with(|| Part::Some(Box::new([0; MAP_WORDS])));
        let Part::Some(words) = part else { return };
        for (word, first) in words.iter_mut().zip((0..).step_by(64)) {
            let from = blocks.start.clamp(first, first + WORD_BLOCKS) - first;
            let to = blocks.end.clamp(first, first + WORD_BLOCKS) - first;
            *word |= below(to) & !below(from);
        }
        if words.iter().all(|word| *word == u64::MAX) {
            self.fill(map..map + 1);
        }
    }

    /// Makes maps one whole, together with those that touch them.
    fn fill(&mut self, maps: Range<u64>) {
        if maps.is_empty() {
            return;
        }
        let Range { mut start, mut end } = maps;
        if let Some((key, Part::Whole(before))) = self.parts.range(..=start).next_back()
            && *before >= start
        {
            (start, end) = (*key, end.max(*before));
        }
        if let Some((_, Part::Whole(behind))) = self.parts.range(..=end).next_back() {
            end = end.max(*behind);
        }
        let within: Vec<u64> = self.parts.range(start..end).map(|(key, _)| *key).collect();
        for key in within {
            self.parts.remove(&key);
        }
        self.parts.insert(start, Part::Whole(end));
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.room.give_back(self.held);
    }
}

/// A word whose first `count` bits are set.
fn below(count: u64) -> u64 {
    u32::try_from(count)
        .ok()
        .and_then(|count| 1_u64.checked_shl(count))
        .map_or(u64::MAX, |bit| bit - 1)
}

/// Where the run ends that begins at a block of a map, both counted from the beginning of the map, and which it is.
fn run_in(words: &[u64; MAP_WORDS], block: u64) -> (u64, bool) {
    let index = usize::try_from(block / WORD_BLOCKS).unwrap_or(MAP_WORDS);
    let inner = words.get(index).copied().unwrap_or_default();
    let taken = inner >> (block % WORD_BLOCKS) & 1 == 1;
    let mut first = block / WORD_BLOCKS * WORD_BLOCKS;
    let mut before = below(block % WORD_BLOCKS);
    for word in words.iter().skip(index) {
        // The blocks that end the run.
        let others = if taken { !word } else { *word } & !before;
        if others != 0 {
            return (first + u64::from(others.trailing_zeros()), taken);
        }
        (first, before) = (first + WORD_BLOCKS, 0);
    }
    (MAP_BLOCKS, taken)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BLOCKS: u64 = 6 * MAP_BLOCKS;

    fn any_range() -> impl Strategy<Value = Range<u64>> {
        let edge = prop_oneof![
            0..=BLOCKS,
            (0..=6_u64, -2..3_i64).prop_map(|(map, off)| {
                (map * MAP_BLOCKS).saturating_add_signed(off).min(BLOCKS)
            }),
        ];
        let length = prop_oneof![edge.clone(), 1..70_u64];
        prop_oneof![
            (edge.clone(), edge).prop_map(|(one, other)| one.min(other)..one.max(other)),
            (0..BLOCKS, length).prop_map(|(start, len)| start..(start + len).min(BLOCKS)),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        #[test]
        fn runs_are_those_of_a_row_of_flags(added in proptest::collection::vec(any_range(), 0..16)) {
            let room = Room::new(100);
            let mut taken = Taken::new(Arc::clone(&room));
            let mut model = vec![false; usize::try_from(BLOCKS).unwrap()];
            for blocks in added {
                let places = usize::try_from(blocks.start).unwrap()..usize::try_from(blocks.end).unwrap();
                model[places].fill(true);
                taken.prepare(&blocks).unwrap();
                taken.add(blocks);
                prop_assert!(taken.parts.len() <= taken.held);
                prop_assert!(taken.held <= taken.parts.len() + GROWTH);
            }
            let mut at = 0;
            for run in model.chunk_by(|one, other| one == other) {
                let end = at + run.len() as u64;
                prop_assert_eq!(taken.run(at..BLOCKS), (end, run[0]));
                prop_assert_eq!(taken.run(at..at + 1), (at + 1, run[0]));
                prop_assert_eq!(taken.run(end - 1..BLOCKS), (end, run[0]));
                at = end;
            }
            drop(taken);
            prop_assert_eq!(room.0.load(Ordering::Acquire), 100);
        }
    }

    #[test]
    fn a_disk_of_any_size_that_is_written_as_a_whole_is_one_part() {
        let mut taken = Taken::new(Room::new(10));
        let blocks = u64::MAX / 4096;
        assert_eq!(taken.run(0..blocks), (blocks, false));
        for block in [0, blocks / 2, blocks - 1] {
            taken.prepare(&(block..block + 1)).unwrap();
            taken.add(block..block + 1);
        }
        assert_eq!(taken.run(1..blocks), (blocks / 2, false));
        taken.add(0..blocks);
        assert_eq!(taken.run(0..blocks), (blocks, true));
        assert!(taken.parts.len() <= 2, "one part, and the rest of the last map");
    }

    #[test]
    fn a_part_takes_what_the_manual_says() {
        // A node of a tree is half full at least.
        let place = 2 * size_of::<(u64, Part)>();
        let part = place + size_of::<[u64; MAP_WORDS]>() + 2 * size_of::<usize>();
        assert!(part <= 600, "{part}");
        const { assert!(Room::PARTS * 600 <= 75 << 20) };
        let parts_of_a_gib = (1 << 30) / (4096 * usize::try_from(MAP_BLOCKS).unwrap());
        assert!(parts_of_a_gib * 600 <= 38 << 10);
    }

    #[test]
    fn scattered_writes_run_out_of_room_and_leave_half_of_it_to_others() {
        let room = Room::new(100);
        let scatter = |taken: &mut Taken| {
            let one = |block: &u64| match taken.prepare(&(*block..*block + 1)) {
                Ok(()) => {
                    taken.add(*block..*block + 1);
                    true
                }
                Err(NoRoom) => false,
            };
            (0..).step_by(5000).take_while(one).count()
        };
        let (mut greedy, mut other) =
            (Taken::new(Arc::clone(&room)), Taken::new(Arc::clone(&room)));
        let many = scatter(&mut greedy);
        assert!((40..=50).contains(&many), "{many}");
        let fewer = scatter(&mut other);
        assert!((20..=25).contains(&fewer), "{fewer}");
        assert_eq!(greedy.prepare(&(0..1)), Ok(()), "what is known needs no room");
        assert_eq!(greedy.prepare(&(1..2)), Err(NoRoom));
        drop(greedy);
        assert!(scatter(&mut other) > fewer, "what a disk held is free with its end");
    }
}
