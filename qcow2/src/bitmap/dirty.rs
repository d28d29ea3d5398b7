//! Which parts of a disk are dirty, in memory: sparse, so that a huge disk with few changes costs little. How bits are
//! stored in a file is told in `codec`, when they are set in `track`.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use block::ByteRange;

use crate::units::index;

/// The most memory that the bitmaps of all open images of this process take, in bytes: all bits of two disks of 64 TiB
/// with the usual granularity, even where every other bit is set. (Long runs of equal bits take next to nothing.)
///
/// A bitmap that would pass it when a change is recorded becomes inconsistent, as it says in the file already while
/// changes are recorded; reading, merging and resizing are refused.
pub const MAX_BITMAP_MEMORY_BYTES: u64 = 1 << 28;

/// What a chunk takes beside its bits, about, in bytes.
const CHUNK_OVERHEAD_BYTES: u64 = 64;
/// The bits of a chunk: as a bitmap it takes 4 KiB.
const CHUNK_BITS: u64 = 1 << 15;
const CHUNK_WORDS: usize = 512;
/// Up to so many set bits a chunk is a list of them.
const FEW: usize = 256;

/// A part of the disk, and whether a bitmap says that it changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirtyExtent {
    /// The part.
    pub range: ByteRange,
    /// Whether it changed.
    pub dirty: bool,
}

/// The bits of a chunk of which any is set.
#[derive(Clone, Debug)]
enum Chunk {
    /// All of them. Never the last chunk of a map where that is shorter.
    Full,
    /// These, in order.
    Few(Vec<u16>),
    /// As a bitmap, with the number of those that are set.
    Bits { set: u32, words: Box<[u64; CHUNK_WORDS]> },
}

/// The memory of many maps.
#[derive(Debug)]
pub(crate) struct Budget {
    limit_bytes: u64,
    used_bytes: AtomicU64,
}

impl Budget {
    /// So many bytes for all maps together.
    pub(crate) const fn new(limit_bytes: u64) -> Self {
        Self { limit_bytes, used_bytes: AtomicU64::new(0) }
    }
}

/// The memory of all bitmaps of the process.
static PROCESS: Budget = Budget::new(MAX_BITMAP_MEMORY_BYTES);

/// What a map has taken of a budget, and gives back when it goes.
#[derive(Debug)]
struct Charge {
    budget: &'static Budget,
    bytes: u64,
}

impl Charge {
    fn change(&mut self, from_bytes: u64, to_bytes: u64) {
        self.bytes = self.bytes + to_bytes - from_bytes;
        if to_bytes >= from_bytes {
            self.budget.used_bytes.fetch_add(to_bytes - from_bytes, Ordering::Relaxed);
        } else {
            self.budget.used_bytes.fetch_sub(from_bytes - to_bytes, Ordering::Relaxed);
        }
    }
}

impl Clone for Charge {
    fn clone(&self) -> Self {
        let mut charge = Self { budget: self.budget, bytes: 0 };
        charge.change(0, self.bytes);
        charge
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.change(self.bytes, 0);
    }
}

/// A set of equal parts of a disk.
#[derive(Clone, Debug)]
pub(crate) struct DirtyMap {
    charge: Charge,
    size_bytes: u64,
    granularity_bits: u32,
    /// By number; absent where no bit is set.
    chunks: BTreeMap<u64, Chunk>,
}

impl DirtyMap {
    /// Nothing is dirty of a disk of `size_bytes`, in parts of `1 << granularity_bits` bytes.
    pub(crate) fn new(size_bytes: u64, granularity_bits: u32) -> Self {
        Self::within(&PROCESS, size_bytes, granularity_bits)
    }

    /// The same, with memory of `budget`.
    pub(crate) fn within(budget: &'static Budget, size_bytes: u64, granularity_bits: u32) -> Self {
        let charge = Charge { budget, bytes: 0 };
        Self { charge, size_bytes, granularity_bits, chunks: BTreeMap::new() }
    }

    /// The same without a set bit.
    pub(crate) fn emptied(&self) -> Self {
        Self::within(self.charge.budget, self.size_bytes, self.granularity_bits)
    }

    /// A second one like it, where there is memory for both.
    pub(crate) fn second(&self) -> Option<Self> {
        let budget = self.charge.budget;
        let used_bytes = budget.used_bytes.load(Ordering::Relaxed);
        (used_bytes.saturating_add(self.charge.bytes) <= budget.limit_bytes).then(|| self.clone())
    }

    /// Whether all maps together take more memory than they may: then this one has to go.
    pub(crate) fn is_over_limit(&self) -> bool {
        let budget = self.charge.budget;
        !self.chunks.is_empty() && budget.used_bytes.load(Ordering::Relaxed) > budget.limit_bytes
    }

    /// The size of the disk in bytes.
    pub(crate) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The base-2 logarithm of the bytes that a bit stands for.
    pub(crate) fn granularity_bits(&self) -> u32 {
        self.granularity_bits
    }

    /// How many bits there are.
    pub(crate) fn bits(&self) -> u64 {
        self.size_bytes.div_ceil(1 << self.granularity_bits)
    }

    /// Whether no bit is set.
    pub(crate) fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// The bytes of the disk that are dirty.
    pub(crate) fn dirty_bytes(&self) -> u64 {
        let set: u64 = self.chunks.values().map(Chunk::count).sum();
        let whole = set << self.granularity_bits;
        let last = self.bits().saturating_sub(1);
        if self.size_bytes == 0 || !self.contains(last) {
            return whole;
        }
        whole - ((self.bits() << self.granularity_bits) - self.size_bytes)
    }

    /// Makes every part dirty that `range` touches.
    pub(crate) fn set(&mut self, range: ByteRange) {
        let end = range.end().min(self.size_bytes);
        if range.start() < end {
            let last = (end - 1) >> self.granularity_bits;
            self.set_bits(range.start() >> self.granularity_bits..last + 1);
        }
    }

    /// Sets bits by number, as far as there are such.
    pub(crate) fn set_bits(&mut self, bits: Range<u64>) {
        let (mut at, end) = (bits.start, bits.end.min(self.bits()));
        while at < end {
            let (number, from) = (at / CHUNK_BITS, at % CHUNK_BITS);
            let to = (from + (end - at)).min(CHUNK_BITS);
            let before = self.chunks.get(&number).map_or(0, Chunk::memory_bytes);
            let chunk = self.chunks.entry(number).or_insert(Chunk::Few(Vec::new()));
            if from == 0 && to == CHUNK_BITS {
                *chunk = Chunk::Full;
            } else {
                chunk.set(index(from)..index(to));
            }
            self.charge.change(before, chunk.memory_bytes());
            at += to - from;
        }
    }

    /// Makes everything dirty that is so in `other`.
    pub(crate) fn merge(&mut self, other: &Self) {
        if self.granularity_bits == other.granularity_bits {
            for (number, chunk) in &other.chunks {
                self.unite(*number, chunk.words());
            }
            return;
        }
        let bits = other.granularity_bits;
        let mut at = 0;
        while let Some(run) = other.next_run(at) {
            self.set(ByteRange::between(run.start << bits, run.end << bits));
            // What else lies in the part that was just set adds nothing.
            let end = (run.end << bits).checked_next_multiple_of(1 << self.granularity_bits);
            at = end.unwrap_or(u64::MAX) >> bits;
        }
    }

    /// Sets the bits that are set in `bytes`, of which the first is that of bit `first`, a multiple of 64.
    pub(crate) fn absorb(&mut self, first: u64, bytes: &[u8]) {
        let (mut number, mut slot) = (first / CHUNK_BITS, index(first % CHUNK_BITS / 64));
        let mut words = bytes.chunks(8).map(little_endian).peekable();
        while words.peek().is_some() {
            let mut part = Box::new([0; CHUNK_WORDS]);
            for (place, word) in part.iter_mut().skip(slot).zip(&mut words) {
                *place = word;
            }
            self.unite(number, part);
            (number, slot) = (number + 1, 0);
        }
    }

    /// Sets in `bytes`, of which the first is that of bit `first`, a multiple of 64, every bit that is set here.
    pub(crate) fn pack(&self, first: u64, bytes: &mut [u8]) {
        let mut rest = bytes;
        let mut at = first;
        while !rest.is_empty() {
            let slot = index(at % CHUNK_BITS / 64);
            let len = ((CHUNK_WORDS - slot) * 8).min(rest.len());
            let (part, behind) = rest.split_at_mut(len);
            if let Some(chunk) = self.chunks.get(&(at / CHUNK_BITS)) {
                for (place, word) in part.chunks_mut(8).zip(chunk.words().iter().skip(slot)) {
                    for (byte, bits) in place.iter_mut().zip(word.to_le_bytes()) {
                        *byte |= bits;
                    }
                }
            }
            rest = behind;
            at += len as u64 * 8;
        }
    }

    /// Adds the bits of `words` to those of a chunk, as far as there are such.
    fn unite(&mut self, number: u64, mut words: Box<[u64; CHUNK_WORDS]>) {
        let len = self.bits().saturating_sub(number.saturating_mul(CHUNK_BITS));
        if len < CHUNK_BITS {
            clear_from(&mut words, index(len));
        }
        if words.iter().all(|word| *word == 0) {
            return;
        }
        let before = self.chunks.get(&number).map_or(0, Chunk::memory_bytes);
        let chunk = self.chunks.entry(number).or_insert(Chunk::Few(Vec::new()));
        chunk.unite(words);
        self.charge.change(before, chunk.memory_bytes());
    }

    /// The first run of set bits that ends behind `from`, without what lies before `from`.
    pub(crate) fn next_run(&self, from: u64) -> Option<Range<u64>> {
        let start = self.next_set(from)?;
        Some(start..self.next_clear(start))
    }

    /// `range` of the disk in parts that are dirty or not, in order and without gaps, neighbours different; at most
    /// `most`, which may end before `range` does.
    pub(crate) fn extents(&self, range: ByteRange, most: usize) -> Vec<DirtyExtent> {
        let bits = self.granularity_bits;
        let mut extents = Vec::new();
        let mut at = range.start();
        while at < range.end() && extents.len() < most {
            let bit = at >> bits;
            let dirty = self.contains(bit);
            let next = if dirty { Some(self.next_clear(bit)) } else { self.next_set(bit) };
            let end = next.map_or(range.end(), |bit| (bit << bits).min(range.end()));
            extents.push(DirtyExtent { range: ByteRange::between(at, end), dirty });
            at = end;
        }
        extents
    }

    /// The same for a disk of another size: what is behind its end is cut off, what is new is not dirty.
    pub(crate) fn resized(&self, size_bytes: u64) -> Self {
        let mut map = Self::within(self.charge.budget, size_bytes, self.granularity_bits);
        for (number, chunk) in &self.chunks {
            map.unite(*number, chunk.words());
        }
        map
    }

    fn contains(&self, bit: u64) -> bool {
        let slot = index(bit % CHUNK_BITS);
        self.chunks.get(&(bit / CHUNK_BITS)).is_some_and(|chunk| chunk.contains(slot))
    }

    fn next_set(&self, from: u64) -> Option<u64> {
        let first = from / CHUNK_BITS;
        self.chunks.range(first..).find_map(|(number, chunk)| {
            let at = if *number == first { from % CHUNK_BITS } else { 0 };
            let found = chunk.next_set(index(at))?;
            Some(number * CHUNK_BITS + found as u64)
        })
    }

    /// The first bit from `from` on that is not set, at the latest the one behind the last.
    fn next_clear(&self, from: u64) -> u64 {
        let (mut number, mut at) = (from / CHUNK_BITS, from % CHUNK_BITS);
        while let Some(chunk) = self.chunks.get(&number) {
            if let Some(found) = chunk.next_clear(index(at)) {
                return (number * CHUNK_BITS + found as u64).min(self.bits());
            }
            (number, at) = (number + 1, 0);
        }
        (number * CHUNK_BITS + at).min(self.bits())
    }
}

impl Chunk {
    fn count(&self) -> u64 {
        match self {
            Self::Full => CHUNK_BITS,
            Self::Few(bits) => bits.len() as u64,
            Self::Bits { set, .. } => u64::from(*set),
        }
    }

    fn memory_bytes(&self) -> u64 {
        CHUNK_OVERHEAD_BYTES
            + match self {
                Self::Full => 0,
                Self::Few(bits) => bits.capacity() as u64 * 2,
                Self::Bits { words, .. } => words.len() as u64 * 8,
            }
    }

    fn contains(&self, bit: usize) -> bool {
        self.next_set(bit) == Some(bit)
    }

    fn words(&self) -> Box<[u64; CHUNK_WORDS]> {
        match self {
            Self::Full => Box::new([u64::MAX; CHUNK_WORDS]),
            Self::Bits { words, .. } => words.clone(),
            Self::Few(few) => {
                let mut words = Box::new([0; CHUNK_WORDS]);
                for bit in few {
                    set_words(&mut words, one(usize::from(*bit)));
                }
                words
            }
        }
    }

    /// Adds the bits of `words`.
    fn unite(&mut self, mut words: Box<[u64; CHUNK_WORDS]>) {
        for (word, own) in words.iter_mut().zip(self.words().iter()) {
            *word |= own;
        }
        let set = words.iter().map(|word| word.count_ones()).sum();
        *self = match u64::from(set) {
            CHUNK_BITS => Self::Full,
            few if few <= FEW as u64 => {
                let next = |from: usize| first_one(&words, from, 0);
                let bits = std::iter::successors(next(0), |bit| next(bit + 1));
                Self::Few(bits.filter_map(|bit| u16::try_from(bit).ok()).collect())
            }
            _ => Self::Bits { set, words },
        };
    }

    /// Sets bits, of which there is at least one.
    fn set(&mut self, bits: Range<usize>) {
        if let Self::Few(few) = self {
            let from = few.partition_point(|bit| usize::from(*bit) < bits.start);
            let to = few.partition_point(|bit| usize::from(*bit) < bits.end);
            if few.len() - (to - from) + bits.len() <= FEW {
                few.splice(from..to, bits.filter_map(|bit| u16::try_from(bit).ok()));
                return;
            }
            let set = u32::try_from(few.len()).unwrap_or(u32::MAX);
            *self = Self::Bits { set, words: self.words() };
        }
        if let Self::Bits { set, words } = self {
            *set += set_words(words, bits);
            if u64::from(*set) == CHUNK_BITS {
                *self = Self::Full;
            }
        }
    }

    fn next_set(&self, from: usize) -> Option<usize> {
        match self {
            Self::Full => (from < index(CHUNK_BITS)).then_some(from),
            Self::Few(bits) => {
                let at = bits.partition_point(|bit| usize::from(*bit) < from);
                bits.get(at).map(|bit| usize::from(*bit))
            }
            Self::Bits { words, .. } => first_one(words, from, 0),
        }
    }

    fn next_clear(&self, from: usize) -> Option<usize> {
        match self {
            Self::Full => None,
            Self::Few(bits) => {
                let at = bits.partition_point(|bit| usize::from(*bit) < from);
                let rest = bits.get(at..).unwrap_or_default();
                let run = rest.iter().zip(from..).take_while(|(bit, at)| usize::from(**bit) == *at);
                Some(from + run.count()).filter(|bit| *bit < index(CHUNK_BITS))
            }
            Self::Bits { words, .. } => first_one(words, from, u64::MAX),
        }
    }
}

fn one(bit: usize) -> Range<usize> {
    bit..bit + 1
}

/// Sets bits and says how many were not.
fn set_words(words: &mut [u64; CHUNK_WORDS], bits: Range<usize>) -> u32 {
    let mut changed = 0;
    let mut at = bits.start;
    while at < bits.end {
        let (word, shift) = (at / 64, at % 64);
        let len = (64 - shift).min(bits.end - at);
        let mask = (u64::MAX >> (64 - len)) << shift;
        if let Some(word) = words.get_mut(word) {
            changed += (mask & !*word).count_ones();
            *word |= mask;
        }
        at += len;
    }
    changed
}

/// The first bit from `from` on that is set after every word was XORed with `flip`.
fn first_one(words: &[u64; CHUNK_WORDS], from: usize, flip: u64) -> Option<usize> {
    let first = from / 64;
    words.iter().enumerate().skip(first).find_map(|(number, word)| {
        let mut word = word ^ flip;
        if number == first {
            word &= u64::MAX << (from % 64);
        }
        let bit = usize::try_from(word.trailing_zeros()).unwrap_or(64);
        (word != 0).then_some(number * 64 + bit)
    })
}

/// Clears bit number `bit` and all behind it.
fn clear_from(words: &mut [u64; CHUNK_WORDS], bit: usize) {
    for (word, at) in words.iter_mut().zip((0..).step_by(64)) {
        let kept = bit.saturating_sub(at).min(64);
        *word &= u64::MAX.checked_shr(u32::try_from(64 - kept).unwrap_or(64)).unwrap_or(0);
    }
}

/// Up to eight bytes as a word of which the first byte is the lowest.
fn little_endian(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A size that ends within a chunk and within a part.
    const SIZE: u64 = (CHUNK_BITS * 2 + 777) * 512 + 100;

    fn any_range() -> impl Strategy<Value = ByteRange> {
        let len = prop_oneof![1u64..2000, 1u64..200_000, 1u64..SIZE];
        (0..SIZE, len).prop_map(|(at, len)| ByteRange::between(at, (at + len).min(SIZE)))
    }

    /// One bit each of all parts.
    fn model_of(ranges: &[ByteRange], bits: u32) -> Vec<bool> {
        let mut model = vec![false; index(SIZE.div_ceil(1 << bits))];
        for range in ranges {
            model[index(range.start() >> bits)..index((range.end() - 1) >> bits) + 1].fill(true);
        }
        model
    }

    fn bits_of(map: &DirtyMap) -> Vec<bool> {
        let mut found = vec![false; index(map.bits())];
        let mut at = 0;
        while let Some(run) = map.next_run(at) {
            at = run.end;
            found[index(run.start)..index(run.end)].fill(true);
        }
        found
    }

    fn map_of(ranges: &[ByteRange], bits: u32) -> DirtyMap {
        let mut map = DirtyMap::new(SIZE, bits);
        ranges.iter().for_each(|range| map.set(*range));
        map
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn a_map_is_the_set_of_touched_parts(
            ranges in prop::collection::vec(any_range(), 0..40),
            bits in 9u32..14,
        ) {
            let map = map_of(&ranges, bits);
            let model = model_of(&ranges, bits);
            prop_assert!(bits_of(&map) == model);
            let bytes = |bit: u64| ((bit + 1) << bits).min(SIZE) - (bit << bits);
            let dirty = (0..).zip(&model).filter(|(_, set)| **set).map(|(bit, _)| bytes(bit));
            prop_assert_eq!(map.dirty_bytes(), dirty.sum::<u64>());
            prop_assert_eq!(map.is_empty(), !model.contains(&true));
        }

        #[test]
        fn extents_tell_what_was_set(
            ranges in prop::collection::vec(any_range(), 0..20),
            asked in any_range(),
            most in 1usize..10,
        ) {
            let map = map_of(&ranges, 12);
            let model = model_of(&ranges, 12);
            let extents = map.extents(asked, most);
            let mut at = asked.start();
            for extent in &extents {
                prop_assert_eq!(extent.range.start(), at);
                at = extent.range.end();
                let bits = index(extent.range.start() >> 12)..index((at - 1) >> 12) + 1;
                prop_assert!(model[bits].iter().all(|set| *set == extent.dirty));
            }
            prop_assert!(extents.len() == most || at == asked.end());
            prop_assert!(extents.windows(2).all(|pair| pair[0].dirty != pair[1].dirty));
        }

        #[test]
        fn packed_bits_come_back(ranges in prop::collection::vec(any_range(), 0..20)) {
            let (map, model) = (map_of(&ranges, 9), model_of(&ranges, 9));
            let mut again = DirtyMap::new(SIZE, 9);
            for first in (0..map.bits()).step_by(512 * 8) {
                let mut bytes = vec![0; 512];
                map.pack(first, &mut bytes);
                for (at, byte) in bytes.iter().enumerate() {
                    let bit = |n: usize| model.get(index(first) + at * 8 + n) == Some(&true);
                    prop_assert_eq!(*byte, (0..8).fold(0, |sum, n| sum | u8::from(bit(n)) << n));
                }
                again.absorb(first, &bytes);
            }
            prop_assert!(bits_of(&again) == model);
        }

        #[test]
        fn a_resized_map_keeps_what_fits_and_nothing_else(
            ranges in prop::collection::vec(any_range(), 0..20),
            bits in 9u32..14,
            size in 1u64..SIZE * 2,
        ) {
            let map = map_of(&ranges, bits).resized(size);
            let mut model = model_of(&ranges, bits);
            model.resize(index(size.div_ceil(1 << bits)), false);
            prop_assert_eq!(map.size_bytes(), size);
            prop_assert!(bits_of(&map) == model);
            let back = map.resized(SIZE);
            model.resize(index(SIZE.div_ceil(1 << bits)), false);
            prop_assert!(bits_of(&back) == model);
        }

        #[test]
        fn merging_covers_at_any_granularity(
            ranges in prop::collection::vec(any_range(), 0..20),
            from in 9u32..16,
            to in 9u32..16,
        ) {
            let source = map_of(&ranges, from);
            let mut target = DirtyMap::new(SIZE, to);
            target.merge(&source);
            let unit = 1 << from;
            let widened: Vec<_> = ranges
                .iter()
                .map(|range| range.widen(unit).intersection(ByteRange::between(0, SIZE)))
                .collect();
            prop_assert!(bits_of(&target) == model_of(&widened, to));
        }
    }

    #[test]
    fn memory_is_counted_over_all_maps_and_given_back() {
        static BUDGET: Budget = Budget::new(20_000);
        let used = || BUDGET.used_bytes.load(Ordering::Relaxed);
        let mut map = DirtyMap::within(&BUDGET, SIZE * 100, 9);
        map.set(ByteRange::between(0, 1));
        assert!((CHUNK_OVERHEAD_BYTES..200).contains(&used()) && !map.is_over_limit());
        for bit in (0..CHUNK_BITS).step_by(2) {
            map.set_bits(bit..bit + 1);
        }
        assert_eq!(used(), CHUNK_OVERHEAD_BYTES + 4096);
        map.set_bits(0..CHUNK_BITS);
        assert_eq!(used(), CHUNK_OVERHEAD_BYTES);
        for bit in (0..CHUNK_BITS * 2).step_by(3) {
            map.set_bits(CHUNK_BITS + bit..CHUNK_BITS + bit + 1);
        }
        let other = map.clone();
        assert!(!map.is_over_limit());
        let third = other.resized(SIZE * 200);
        assert!(map.is_over_limit() && third.is_over_limit() && !map.emptied().is_over_limit());
        drop(other);
        assert!(!map.is_over_limit());
        drop((map, third));
        assert_eq!(used(), 0);
    }

    #[test]
    fn a_huge_disk_with_few_changes_costs_little() {
        let size = 64 << 40;
        let mut map = DirtyMap::new(size, 16);
        for at in (0..size).step_by(1 << 36) {
            map.set(ByteRange::between(at, at + 1));
        }
        assert_eq!(map.chunks.len(), 1 << 10);
        assert!(
            map.chunks.values().all(|chunk| matches!(chunk, Chunk::Few(bits) if bits.len() == 1))
        );
        map.set(ByteRange::between(0, size));
        assert!(map.chunks.values().all(|chunk| matches!(chunk, Chunk::Full)));
        assert_eq!(map.dirty_bytes(), size);
        let extents = map.extents(ByteRange::between(0, size), 10);
        assert_eq!(extents, [DirtyExtent { range: ByteRange::between(0, size), dirty: true }]);
    }
}
