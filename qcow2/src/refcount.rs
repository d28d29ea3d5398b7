//! Refcounts: the table, the blocks that are in memory, and the codec for all seven widths. Which clusters to take or
//! to free is decided by the allocator; nothing here does I/O.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;

use crate::cache::{Age, REFCOUNT_BLOCKS, Share};
use crate::entry;
use crate::error::Fault;
use crate::units::{ClusterGeometry, HostCluster, HostOffset, Run, TABLE_WRITE_BYTES, index};

/// The width of a refcount: 1 to 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RefcountWidth {
    order: u32,
}

impl RefcountWidth {
    /// 16 bits: what new images have.
    pub(crate) const DEFAULT: Self = Self { order: 4 };

    /// One bit.
    pub(crate) const SMALLEST: Self = Self { order: 0 };

    /// The width of `1 << order` bits, or `None` above 64.
    pub(crate) const fn new(order: u32) -> Option<Self> {
        if order > 6 { None } else { Some(Self { order }) }
    }

    /// The base-2 logarithm of the width.
    pub(crate) const fn order(self) -> u32 {
        self.order
    }

    /// The largest refcount that fits.
    pub(crate) const fn max(self) -> u64 {
        u64::MAX >> (64 - (1u32 << self.order))
    }

    /// The refcounts of one block.
    pub(crate) const fn per_block(self, geometry: ClusterGeometry) -> u64 {
        (geometry.bytes() * 8) >> self.order
    }

    /// Reads the refcount number `at` of a block; 0 behind its end.
    ///
    /// Source: qcow2 specification, "Host cluster management", refcount block entry.
    pub(crate) fn get(self, block: &[u8], at: u64) -> u64 {
        let Some(bytes) = block.get(self.place(at)) else { return 0 };
        let value = bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte));
        (value >> self.shift(at)) & self.max()
    }

    /// How many of the first `slots` refcounts of a block are not 0.
    pub(crate) fn used(self, block: &[u8], slots: u64) -> Used {
        let mut used = Used::default();
        for slot in (0..slots).filter(|slot| self.get(block, *slot) != 0) {
            used = Used { count: used.count + 1, end: slot + 1 };
        }
        used
    }

    /// Stores a refcount. Says whether it fits.
    pub(crate) fn set(self, block: &mut [u8], at: u64, value: u64) -> bool {
        if value > self.max() {
            return false;
        }
        let (place, shift) = (self.place(at), self.shift(at));
        let Some(bytes) = block.get_mut(place) else { return false };
        if self.order < 3 {
            let Ok(mask) = u8::try_from(self.max() << shift) else { return false };
            let Ok(bits) = u8::try_from(value << shift) else { return false };
            bytes[0] = bytes[0] & !mask | bits;
        } else {
            let start = 8 - bytes.len();
            bytes.copy_from_slice(&value.to_be_bytes()[start..]);
        }
        true
    }

    /// The bytes that hold a refcount.
    fn place(self, at: u64) -> Range<usize> {
        let start = index((at << self.order) >> 3);
        start..start + (1usize << self.order.saturating_sub(3))
    }

    /// Widths below a byte begin at the least significant bit.
    fn shift(self, at: u64) -> u32 {
        if self.order >= 3 {
            return 0;
        }
        let slot = u32::try_from(at & ((8 >> self.order) - 1)).unwrap_or(0);
        slot << self.order
    }
}

/// What of a refcount block is in use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Used {
    /// The refcounts that are not 0.
    pub count: u64,
    /// The slot behind the last of them.
    pub end: u64,
}

/// A refcount block in memory.
#[derive(Debug)]
struct Block {
    at: HostOffset,
    bytes: Vec<u8>,
    /// The bytes that differ from the disk and from what a flush is writing.
    dirty: Option<Range<usize>>,
    /// What a flush is writing now.
    writing: Option<Range<usize>>,
    age: Age,
}

/// Whether the refcounts of a region can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BlockState {
    /// There is no block: all refcounts are 0.
    Absent,
    /// The block lies there and must be loaded.
    Unloaded(HostOffset),
    /// It is in memory.
    Loaded,
}

/// A range of the file with its new content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaWrite {
    /// Where it starts.
    pub at: HostOffset,
    /// What is there from now on.
    pub bytes: Vec<u8>,
}

/// What a flush took from the refcounts, by block and table index.
#[derive(Debug, Default)]
pub(crate) struct CapturedRefcounts {
    blocks: Vec<u64>,
    entries: BTreeSet<u64>,
    /// Where the table lived before it moved; the flush switches the header where there is one.
    pub left: Vec<Run>,
}

/// All refcounts of an image, as far as they are in memory.
#[derive(Debug)]
pub(crate) struct Refcounts {
    geometry: ClusterGeometry,
    width: RefcountWidth,
    table: Vec<u64>,
    table_run: Run,
    /// Where the table on disk may lie, while a larger one waits to be written.
    moved_from: Vec<Run>,
    /// The table lies where it is to be, as it was at some time, and the header may name it.
    table_written: bool,
    dirty_entries: BTreeSet<u64>,
    blocks: HashMap<u64, Block>,
    share: Share,
}

impl Refcounts {
    pub(crate) fn new(
        geometry: ClusterGeometry,
        width: RefcountWidth,
        table: Vec<u64>,
        table_run: Run,
    ) -> Self {
        Self {
            geometry,
            width,
            table,
            table_run,
            moved_from: Vec::new(),
            table_written: true,
            dirty_entries: BTreeSet::new(),
            blocks: HashMap::new(),
            share: Share::new(&REFCOUNT_BLOCKS, geometry.bytes()),
        }
    }

    /// The refcounts of one block.
    pub(crate) fn per_block(&self) -> u64 {
        self.width.per_block(self.geometry)
    }

    /// The block that holds the refcount of `cluster`.
    pub(crate) fn block_of(&self, cluster: HostCluster) -> u64 {
        cluster.0 / self.per_block()
    }

    /// The entries of the table.
    pub(crate) fn table_entries(&self) -> u64 {
        self.table.len() as u64
    }

    /// Where the table is, or will be after the next flush.
    pub(crate) fn table_run(&self) -> Run {
        self.table_run
    }

    /// The index of the last block that exists.
    pub(crate) fn last_block(&self) -> Option<u64> {
        self.table.iter().rposition(|raw| *raw != 0).map(|at| at as u64)
    }

    /// Where the blocks lie, as far as the entries make sense.
    pub(crate) fn block_places(&self) -> impl Iterator<Item = HostOffset> {
        let set = self.table.iter().filter(|raw| **raw != 0);
        set.filter_map(|raw| entry::refcount_block(*raw, self.geometry).ok().flatten())
    }

    /// Whether the refcounts of block `at` are in memory.
    pub(crate) fn state(&self, at: u64) -> Result<BlockState, Fault> {
        if self.blocks.contains_key(&at) {
            return Ok(BlockState::Loaded);
        }
        let Some(raw) = self.table.get(index(at)) else { return Ok(BlockState::Absent) };
        let place =
            HostOffset((self.geometry.host_offset(self.table_run.start).0).saturating_add(at * 8));
        match entry::refcount_block(*raw, self.geometry) {
            Ok(None) => Ok(BlockState::Absent),
            Ok(Some(host)) => Ok(BlockState::Unloaded(host)),
            Err(what) => Err(Fault::Corrupt { at: place, what }),
        }
    }

    /// Puts a block that was read from `host` into memory, unless it is there.
    pub(crate) fn insert_loaded(&mut self, at: u64, host: HostOffset, mut bytes: Vec<u8>) {
        bytes.resize(index(self.geometry.bytes()), 0);
        self.blocks.entry(at).or_insert(Block {
            at: host,
            bytes,
            dirty: None,
            writing: None,
            age: Age::loaded(),
        });
        self.share.set(self.blocks.len());
    }

    /// Makes block `at` in cluster `host`, where there is none. All its refcounts are 0.
    pub(crate) fn insert_new(&mut self, at: u64, host: HostCluster) {
        let host = self.geometry.host_offset(host);
        let bytes = vec![0; index(self.geometry.bytes())];
        let dirty = Some(0..bytes.len());
        let age = Age::loaded();
        self.blocks.insert(at, Block { at: host, bytes, dirty, writing: None, age });
        self.share.set(self.blocks.len());
        if let Some(entry) = self.table.get_mut(index(at)) {
            *entry = host.0;
            self.dirty_entries.insert(at);
        }
    }

    /// Gives the table more room at another place. The place that it leaves is free once a flush has switched the
    /// header.
    pub(crate) fn move_table(&mut self, to: Run) {
        let entries = to.count * self.geometry.bytes() / 8;
        self.table.resize(index(entries), 0);
        self.moved_from.push(std::mem::replace(&mut self.table_run, to));
        self.table_written = false;
    }

    /// Whether a cluster of `run` belongs to the table, here or where it is about to leave.
    pub(crate) fn table_overlaps(&self, run: Run) -> bool {
        self.table_run.overlaps(run) || self.moved_from.iter().any(|left| left.overlaps(run))
    }

    /// The refcount of a cluster; `None` while its block is not in memory.
    pub(crate) fn get(&mut self, cluster: HostCluster) -> Result<Option<u64>, Fault> {
        let at = self.block_of(cluster);
        let slot = cluster.0 % self.per_block();
        if let Some(block) = self.blocks.get_mut(&at) {
            block.age.touch();
            return Ok(Some(self.width.get(&block.bytes, slot)));
        }
        Ok(match self.state(at)? {
            BlockState::Absent => Some(0),
            BlockState::Unloaded(_) | BlockState::Loaded => None,
        })
    }

    /// The refcount of a cluster if its block is in memory.
    pub(crate) fn peek(&self, cluster: HostCluster) -> Option<u64> {
        let block = self.blocks.get(&self.block_of(cluster))?;
        Some(self.width.get(&block.bytes, cluster.0 % self.per_block()))
    }

    /// Whether a cluster counts as free because there is no block for it.
    pub(crate) fn is_absent(&self, cluster: HostCluster) -> bool {
        matches!(self.state(self.block_of(cluster)), Ok(BlockState::Absent))
    }

    /// Sets the refcount of a cluster whose block is in memory. Says whether it could.
    pub(crate) fn set(&mut self, cluster: HostCluster, value: u64) -> bool {
        let at = self.block_of(cluster);
        let slot = cluster.0 % self.per_block();
        let Some(block) = self.blocks.get_mut(&at) else { return false };
        block.age.touch();
        if !self.width.set(&mut block.bytes, slot, value) {
            return false;
        }
        let place = self.width.place(slot);
        block.dirty = Some(join(block.dirty.take(), place));
        true
    }

    /// How wide a refcount is.
    pub(crate) fn width(&self) -> RefcountWidth {
        self.width
    }

    /// Whether a flush has something to write.
    pub(crate) fn is_dirty(&self) -> bool {
        !self.dirty_entries.is_empty()
            || !self.moved_from.is_empty()
            || self.blocks.values().any(|block| block.dirty.is_some())
    }

    /// The bytes of blocks that may not be forgotten.
    pub(crate) fn dirty_bytes(&self) -> u64 {
        let dirty = self.blocks.values().filter(|block| !block.is_clean()).count() as u64;
        dirty * self.geometry.bytes()
    }

    /// Takes what must be written: blocks (and a table that moved) first, then, after a sync, what links them: entries
    /// of the table where it is on disk. Where the table has moved ([`CapturedRefcounts::left`]) the header, too, must
    /// be switched then.
    pub(crate) fn capture(&mut self) -> (Vec<MetaWrite>, Vec<MetaWrite>, CapturedRefcounts) {
        let mut first = Vec::new();
        let mut captured = CapturedRefcounts::default();
        for (at, block) in &mut self.blocks {
            let Some(dirty) = block.dirty.take() else { continue };
            let dirty = write_units(dirty, block.bytes.len());
            first.push(MetaWrite {
                at: HostOffset(block.at.0 + dirty.start as u64),
                bytes: block.bytes[dirty.clone()].to_vec(),
            });
            block.writing = Some(dirty);
            captured.blocks.push(*at);
        }
        captured.entries = std::mem::take(&mut self.dirty_entries);
        captured.left = std::mem::take(&mut self.moved_from);
        let table_at = self.geometry.host_offset(self.table_run.start);
        if !self.table_written {
            first.push(MetaWrite { at: table_at, bytes: big_endian(&self.table) });
            return (first, Vec::new(), captured);
        }
        let link = entry_writes(table_at, &self.table, captured.entries.iter().copied());
        (first, link, captured)
    }

    /// What was captured is on disk.
    pub(crate) fn landed(&mut self, captured: &CapturedRefcounts) {
        self.table_written |= self.moved_from.is_empty();
        for at in &captured.blocks {
            if let Some(block) = self.blocks.get_mut(at) {
                block.writing = None;
            }
        }
    }

    /// What was captured may or may not be on disk: it has to be written again. If it is `linked`, a table that moved is
    /// there, and the header may name it: from now on its entries are written as those of others are.
    pub(crate) fn revert(&mut self, captured: &mut CapturedRefcounts, linked: bool) {
        self.table_written |= linked && self.moved_from.is_empty();

        for at in &captured.blocks {
            if let Some(block) = self.blocks.get_mut(at)
                && let Some(writing) = block.writing.take()
            {
                block.dirty = Some(join(block.dirty.take(), writing));
            }
        }
        self.dirty_entries.append(&mut captured.entries);
        self.moved_from.append(&mut captured.left);
    }

    /// The blocks that may be forgotten, with their ranks.
    pub(crate) fn oldest(&mut self) -> Vec<(u64, u64)> {
        let clean = self.blocks.iter_mut().filter(|(_, block)| block.is_clean());
        clean.filter_map(|(at, block)| Some((block.age.rank()?, *at))).collect()
    }

    /// Forgets a block, if it may be forgotten.
    pub(crate) fn forget(&mut self, at: u64) {
        if self.blocks.get(&at).is_some_and(Block::is_clean) {
            self.blocks.remove(&at);
            self.share.set(self.blocks.len());
        }
    }
}

impl Block {
    fn is_clean(&self) -> bool {
        self.dirty.is_none() && self.writing.is_none()
    }
}

/// The smallest range that covers both.
pub(crate) fn join(range: Option<Range<usize>>, other: Range<usize>) -> Range<usize> {
    match range {
        None => other,
        Some(range) => range.start.min(other.start)..range.end.max(other.end),
    }
}

/// Widens a range of a table of `len` bytes to what is written at once.
pub(crate) fn write_units(range: Range<usize>, len: usize) -> Range<usize> {
    let unit = index(TABLE_WRITE_BYTES);
    range.start / unit * unit..range.end.next_multiple_of(unit).min(len)
}

/// A table as it lies on disk.
pub(crate) fn big_endian(entries: &[u64]) -> Vec<u8> {
    entries.iter().flat_map(|entry| entry.to_be_bytes()).collect()
}

/// Writes for the parts of a table at `at` that hold the entries `dirty`, which come in order.
pub(crate) fn entry_writes(
    at: HostOffset,
    table: &[u64],
    dirty: impl Iterator<Item = u64>,
) -> Vec<MetaWrite> {
    let per_unit = TABLE_WRITE_BYTES / 8;
    let mut units: Vec<Range<u64>> = Vec::new();
    for entry in dirty {
        let unit = entry / per_unit;
        match units.last_mut() {
            Some(last) if unit < last.end => {}
            Some(last) if unit == last.end => last.end += 1,
            _ => units.push(unit..unit + 1),
        }
    }
    let write = |range: Range<u64>| {
        let end = index(range.end * per_unit).min(table.len());
        let entries = table.get(index(range.start * per_unit)..end).unwrap_or_default();
        MetaWrite {
            at: HostOffset(at.0 + range.start * TABLE_WRITE_BYTES),
            bytes: big_endian(entries),
        }
    };
    units.into_iter().map(write).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn narrow_refcounts_begin_at_the_least_significant_bit() {
        let mut block = vec![0; 512];
        let width = RefcountWidth::new(0).unwrap();
        assert!(width.set(&mut block, 0, 1) && width.set(&mut block, 9, 1));
        assert_eq!(block[..2], [1, 2]);
        let width = RefcountWidth::new(2).unwrap();
        assert!(width.set(&mut block, 5, 0xa));
        assert_eq!(block[2], 0xa0);
        assert!(!width.set(&mut block, 5, 16), "an overflow is refused, not wrapped");
        assert_eq!(width.get(&block, 5), 0xa);
    }

    #[test]
    fn table_writes_cover_the_entries_in_units_and_no_more() {
        let table: Vec<u64> = (0..1544).collect();
        let writes = entry_writes(HostOffset(65536), &table, [1, 511, 1543].into_iter());
        let ranges: Vec<_> = writes.iter().map(|w| (w.at.0 - 65536, w.bytes.len())).collect();
        assert_eq!(ranges, [(0, 4096), (12288, 64)]);
        assert_eq!(writes[1].bytes[56..], 1543u64.to_be_bytes());
    }

    proptest! {
        #[test]
        fn every_width_keeps_what_is_stored(order in 0u32..=6, values in prop::collection::vec(any::<u64>(), 64)) {
            let width = RefcountWidth::new(order).unwrap();
            let mut block = vec![0; 512];
            for (at, value) in values.iter().enumerate() {
                prop_assert!(width.set(&mut block, at as u64, value & width.max()));
            }
            for (at, value) in values.iter().enumerate() {
                prop_assert_eq!(width.get(&block, at as u64), value & width.max());
            }
        }
    }
}
