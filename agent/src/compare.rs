//! What the target needs for each block, from what the block holds now and what it held in the baseline: a merge-join
//! of two rising streams. Pure but for the iterator that yields the baseline.

use block::ByteRange;

use crate::blocks::{BLOCK_BYTES, BlockDigest, BlockState, block_range, blocks_of};
use crate::coalesce::Need;
use crate::digest_file::{DigestError, Entry};

/// The rising blocks of a baseline that are not zero.
pub(crate) trait Entries: Iterator<Item = Result<Entry, DigestError>> {}
impl<I: Iterator<Item = Result<Entry, DigestError>>> Entries for I {}

/// The baseline, and how far it has been read.
#[derive(Debug)]
pub(crate) struct Baseline<I> {
    entries: I,
    /// The first entry that has not been compared.
    ahead: Option<Entry>,
    /// Blocks from here on lie (partly) behind the end of the disk as it was: nothing is known of them.
    known_blocks: u64,
}

/// Decides what each part of a disk needs. Asked in rising order.
#[derive(Debug)]
pub(crate) enum Comparison<I> {
    /// Whatever is asked about is told to the target: a full, or extents that a bitmap calls dirty.
    Everything,
    /// Only what differs from the baseline.
    Against(Baseline<I>),
}

impl<I: Entries> Baseline<I> {
    /// A baseline of a disk that had `old_bytes` and has `disk_bytes` now, which is not less.
    pub(crate) fn new(entries: I, old_bytes: u64, disk_bytes: u64) -> Self {
        let known_blocks = match old_bytes == disk_bytes {
            true => blocks_of(disk_bytes),
            // A block that was cut short by the old end has bytes that the old disk did not.
            false => old_bytes / BLOCK_BYTES,
        };
        Self { entries, ahead: None, known_blocks }
    }

    /// The first entry at or behind `block`; what lies before has been dealt with.
    fn entry_from(&mut self, block: u64) -> Result<Option<Entry>, DigestError> {
        while self.ahead.is_none_or(|entry| entry.block < block) {
            self.ahead = self.entries.next().transpose()?;
            if self.ahead.is_none() {
                return Ok(None);
            }
        }
        Ok(self.ahead)
    }

    fn digest_of(&mut self, block: u64) -> Result<Option<BlockDigest>, DigestError> {
        let entry = self.entry_from(block)?;
        Ok(entry.filter(|entry| entry.block == block).map(|entry| entry.digest))
    }
}

impl<I: Entries> Comparison<I> {
    /// What the block at `index`, which was read, needs.
    pub(crate) fn of_block(&mut self, index: u64, now: BlockState) -> Result<Need, DigestError> {
        let changed = match now {
            BlockState::Zero => Need::Zeros,
            BlockState::Data(_) => Need::Data,
        };
        let Self::Against(baseline) = self else { return Ok(changed) };
        if index >= baseline.known_blocks {
            return Ok(changed);
        }
        let same = match (now, baseline.digest_of(index)?) {
            (BlockState::Zero, None) => true,
            (BlockState::Data(Some(now)), Some(before)) => now == before,
            _ => false,
        };
        Ok(if same { Need::Nothing } else { changed })
    }

    /// What parts of `zeros` need. It reads as zeros and begins at a block; what is not named needs nothing.
    pub(crate) fn of_zeros(
        &mut self,
        zeros: ByteRange,
        disk_bytes: u64,
        mut needs: impl FnMut(ByteRange),
    ) -> Result<(), DigestError> {
        let Self::Against(baseline) = self else {
            needs(zeros);
            return Ok(());
        };
        let (mut block, end) = (zeros.start() / BLOCK_BYTES, blocks_of(zeros.end()));
        let known = baseline.known_blocks;
        while let Some(entry) = baseline.entry_from(block)? {
            if entry.block >= end.min(known) {
                break;
            }
            needs(block_range(entry.block, disk_bytes));
            block = entry.block + 1;
        }
        if known < end {
            needs(ByteRange::between(zeros.start().max(known * BLOCK_BYTES), zeros.end()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A model block: 0 is zero, others are data of that kind.
    fn state(kind: u8) -> BlockState {
        match kind {
            0 => BlockState::Zero,
            kind => BlockState::Data(Some(BlockDigest([kind; 32]))),
        }
    }

    fn baseline(old: &[u8]) -> impl Entries + use<> {
        let entries: Vec<_> = old.iter().zip(0..).filter(|(kind, _)| **kind != 0).collect();
        let entries: Vec<_> = entries
            .into_iter()
            .map(|(kind, block)| Ok(Entry { block, digest: BlockDigest([*kind; 32]) }))
            .collect();
        entries.into_iter()
    }

    proptest! {
        #[test] // Holes and blocks that were read as zeros come to the same.
        fn a_merge_join_decides_like_a_look_at_both_disks(
            old in proptest::collection::vec(0u8..3, 1..40),
            new in proptest::collection::vec((0u8..3, any::<bool>()), 1..60),
            (odd, old_odd) in (1..BLOCK_BYTES, 1..BLOCK_BYTES),
        ) {
            // A disk grows or stays: the old one is cut to the new one's length.
            let old = &old[..old.len().min(new.len())];
            let disk_bytes = (new.len() as u64 - 1) * BLOCK_BYTES + odd;
            let old_bytes = match old.len() == new.len() {
                true => disk_bytes,
                false => (old.len() as u64 - 1) * BLOCK_BYTES + old_odd,
            };
            let mut comparison = Comparison::Against(Baseline::new(baseline(old), old_bytes, disk_bytes));
            let mut needs = vec![Need::Nothing; new.len()];
            let mut at = 0;
            while at < new.len() {
                let hole = new[at..].iter().take_while(|(kind, hole)| *kind == 0 && *hole).count();
                let index = at as u64;
                if hole == 0 {
                    needs[at] = comparison.of_block(index, state(new[at].0)).unwrap();
                    at += 1;
                    continue;
                }
                let end = disk_bytes.min((at + hole) as u64 * BLOCK_BYTES);
                let zeros = ByteRange::between(index * BLOCK_BYTES, end);
                comparison.of_zeros(zeros, disk_bytes, |range| {
                    assert!(zeros.contains(range) && !range.is_empty());
                    for block in range.start() / BLOCK_BYTES..blocks_of(range.end()) {
                        needs[usize::try_from(block).unwrap()] = Need::Zeros;
                    }
                }).unwrap();
                at += hole;
            }
            for (index, (kind, _)) in new.iter().enumerate() {
                let changed = if *kind == 0 { Need::Zeros } else { Need::Data };
                let known = old.len() == new.len() || index + 1 < old.len();
                let same = known && old.get(index) == Some(kind);
                prop_assert_eq!(needs[index], if same { Need::Nothing } else { changed }, "block {}", index);
            }
        }
    }

    #[test]
    fn without_a_baseline_everything_is_told() {
        let mut all = Comparison::<std::iter::Empty<_>>::Everything;
        assert_eq!(all.of_block(3, BlockState::Zero).unwrap(), Need::Zeros);
        assert_eq!(all.of_block(4, BlockState::Data(None)).unwrap(), Need::Data);
        let (hole, mut told) = (ByteRange::between(0, 1 << 50), None);
        all.of_zeros(hole, 1 << 50, |range| told = Some(range)).unwrap();
        assert_eq!(told, Some(hole));
    }

    #[test]
    fn a_baseline_that_stops_being_readable_is_an_error() {
        let broken = DigestError::Foreign { path: "x".into() };
        let entries = std::iter::once(Err(broken));
        let mut comparison = Comparison::Against(Baseline::new(entries, 1 << 20, 1 << 20));
        assert!(comparison.of_block(0, BlockState::Zero).is_err());
    }
}
