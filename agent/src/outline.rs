//! From a source's extents to whole blocks: which pieces must be read, and which are known to be zeros without. Pure.

use block::ByteRange;

use crate::blocks::BLOCK_BYTES;

/// A part of the source that is treated alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    /// It has to be read.
    Read(ByteRange),
    /// It reads as zeros; nobody needs to try.
    Zeros(ByteRange),
}

/// Turns extents of any alignment into pieces that begin at block boundaries and end there or at the end of the disk.
///
/// A block counts as zeros only where zero extents cover all of it. The pieces come in order and cover the disk.
#[derive(Debug)]
pub(crate) struct Outline {
    size_bytes: u64,
    max_read_bytes: u64,
    /// Everything before has been handed out; a block boundary, or the end of the disk.
    done: u64,
    /// Where the zero extents that were pushed last, without a gap, began.
    zero_from: Option<u64>,
}

impl Outline {
    /// An outline of a disk; pieces to read are at most `max_read_bytes` (a multiple of the block size) long.
    pub(crate) fn new(size_bytes: u64, max_read_bytes: u64) -> Self {
        let max_read_bytes = (max_read_bytes / BLOCK_BYTES).max(1) * BLOCK_BYTES;
        Self { size_bytes, max_read_bytes, done: 0, zero_from: None }
    }

    /// Adds the extent that follows the last one.
    pub(crate) fn push(&mut self, range: ByteRange, zero: bool, out: &mut Vec<Piece>) {
        if zero {
            self.zero_from.get_or_insert(range.start());
            return;
        }
        self.end_zeros(range.start(), out);
        // Only full pieces: what the next extents add may still join the last one.
        self.hand_out_reads(range.end() / self.max_read_bytes * self.max_read_bytes, out);
    }

    /// Says that there are no more extents: the disk is covered.
    pub(crate) fn finish(mut self, out: &mut Vec<Piece>) {
        self.end_zeros(self.size_bytes, out);
        self.hand_out_reads(self.size_bytes, out);
    }

    fn end_zeros(&mut self, end: u64, out: &mut Vec<Piece>) {
        let Some(from) = self.zero_from.take() else { return };
        let start = from.next_multiple_of(BLOCK_BYTES).max(self.done);
        let zeros = ByteRange::between(start, self.whole_blocks_before(end));
        if !zeros.is_empty() {
            self.hand_out_reads(start, out);
            out.push(Piece::Zeros(zeros));
            self.done = zeros.end();
        }
    }

    fn hand_out_reads(&mut self, end: u64, out: &mut Vec<Piece>) {
        while self.done < end {
            let boundary =
                (self.done / self.max_read_bytes + 1).saturating_mul(self.max_read_bytes);
            let piece = ByteRange::between(self.done, boundary.min(end));
            out.push(Piece::Read(piece));
            self.done = piece.end();
        }
    }

    /// The end of the last block that ends at or before `end`; the last of the disk may be short.
    fn whole_blocks_before(&self, end: u64) -> u64 {
        if end >= self.size_bytes { self.size_bytes } else { end / BLOCK_BYTES * BLOCK_BYTES }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::blocks::{block_range, blocks_of};

    impl Piece {
        fn range(self) -> ByteRange {
            match self {
                Self::Read(range) | Self::Zeros(range) => range,
            }
        }
    }

    fn outline(extents: &[(u64, bool)], max_read_bytes: u64) -> (u64, Vec<Piece>) {
        let size_bytes = extents.iter().map(|(len, _)| len).sum();
        let (mut outline, mut out, mut at) =
            (Outline::new(size_bytes, max_read_bytes), Vec::new(), 0);
        for (len, zero) in extents {
            outline.push(ByteRange::between(at, at + len), *zero, &mut out);
            at += len;
        }
        outline.finish(&mut out);
        (size_bytes, out)
    }

    #[test]
    fn the_hole_at_the_end_of_an_odd_disk_is_not_read() {
        let (size, pieces) =
            outline(&[(BLOCK_BYTES + 1, false), (2 * BLOCK_BYTES + 5, true)], 1 << 20);
        let read = ByteRange::between(0, 2 * BLOCK_BYTES);
        assert_eq!(pieces, [Piece::Read(read), Piece::Zeros(ByteRange::between(read.end(), size))]);
    }

    proptest! {
        #[test]
        fn a_block_is_read_unless_all_of_it_is_a_hole(
            extents in proptest::collection::vec((1u64..200_000, any::<bool>()), 1..40), blocks in 1u64..5,
        ) {
            let (size, pieces) = outline(&extents, blocks * BLOCK_BYTES);
            let mut at = 0;
            for piece in &pieces {
                prop_assert_eq!(piece.range().start(), at);
                prop_assert!(!piece.range().is_empty());
                prop_assert!(matches!(piece, Piece::Zeros(_)) || piece.range().len() <= blocks * BLOCK_BYTES);
                at = piece.range().end();
            }
            prop_assert_eq!(at, size);
            let zeros_at = |at: u64| {
                let mut end = 0;
                extents.iter().find(|(len, _)| { end += len; at < end }).is_some_and(|(_, zero)| *zero)
            };
            let boundaries = extents.iter().scan(0, |end, (len, _)| { *end += len; Some(*end) });
            let boundaries: Vec<_> = boundaries.collect();
            for index in 0..blocks_of(size) {
                let range = block_range(index, size);
                // Zeroness changes at boundaries only.
                let hole = zeros_at(range.start())
                    && boundaries.iter().filter(|at| **at > range.start() && **at < range.end()).all(|at| zeros_at(*at));
                let piece = pieces.iter().find(|piece| piece.range().contains(range));
                prop_assert_eq!(matches!(piece, Some(Piece::Zeros(_))), hole);
                prop_assert!(piece.is_some());
            }
        }
    }
}
