//! One disk's books: takes what was read in the order of the disk, decides what the target is told, and notes the
//! digests of the new state. Runs on a thread that may block on the digest files; it moves no disk's bytes.

use block::ByteRange;
use bytes::Bytes;

use crate::blocks::{BLOCK_BYTES, BlockState};
use crate::budget::Reserved;
use crate::coalesce::{Coalescer, Need, Run};
use crate::compare::{Comparison, Entries};
use crate::digest_file::{DigestError, DigestWriter, Entry, Finished};

/// A part of the disk, in order, without overlap.
#[derive(Debug)]
pub(crate) enum Scanned {
    /// It reads as zeros.
    Zeros(ByteRange),
    /// It was read and holds data somewhere.
    Read(ReadPiece),
}

impl Scanned {
    /// Which part.
    pub(crate) fn range(&self) -> ByteRange {
        match self {
            Self::Zeros(range) => *range,
            Self::Read(piece) => piece.range,
        }
    }
}

/// What was read of a part of the disk.
#[derive(Debug)]
pub(crate) struct ReadPiece {
    /// Which part.
    pub(crate) range: ByteRange,
    /// Its bytes.
    pub(crate) bytes: Bytes,
    /// The states of its blocks, one for each of `range.pieces(BLOCK_BYTES)`.
    pub(crate) states: Vec<BlockState>,
    /// The memory that the bytes are charged to.
    pub(crate) reserved: Reserved,
}

/// What the target is to be told.
#[derive(Debug)]
pub(crate) enum Order {
    /// These bytes.
    Write {
        /// Where they go.
        range: ByteRange,
        /// The bytes.
        data: Bytes,
        /// The memory that they are charged to.
        reserved: Reserved,
    },
    /// That this reads as zeros.
    Zero(ByteRange),
}

/// The books of one disk.
#[derive(Debug)]
pub(crate) struct Ledger<I> {
    comparison: Comparison<I>,
    digests: Option<DigestWriter>,
    coalescer: Coalescer,
    disk_bytes: u64,
    runs: Vec<Run>,
}

impl<I: Entries> Ledger<I> {
    /// Opens the books of a disk of `disk_bytes`. Pieces are at most `max_data_bytes` long.
    pub(crate) fn new(
        comparison: Comparison<I>,
        digests: Option<DigestWriter>,
        disk_bytes: u64,
        max_data_bytes: u64,
    ) -> Self {
        let coalescer = Coalescer::new(max_data_bytes);
        Self { comparison, digests, coalescer, disk_bytes, runs: Vec::new() }
    }

    /// Books a part; what the target must be told by now goes to `orders`.
    pub(crate) fn book(
        &mut self,
        scanned: Scanned,
        orders: &mut Vec<Order>,
    ) -> Result<(), DigestError> {
        match scanned {
            Scanned::Zeros(range) => self.book_zeros(range, orders),
            Scanned::Read(piece) => self.book_read(&piece, orders),
        }
    }

    /// Closes the books. The digest file, if one is kept, is durable but not published.
    pub(crate) fn close(self, orders: &mut Vec<Order>) -> Result<Option<Finished>, DigestError> {
        let mut runs = self.runs;
        self.coalescer.finish(&mut runs);
        orders.extend(runs.into_iter().filter_map(|run| order(run, None)));
        self.digests.map(DigestWriter::finish).transpose()
    }

    fn book_zeros(&mut self, zeros: ByteRange, orders: &mut Vec<Order>) -> Result<(), DigestError> {
        let Self { comparison, coalescer, runs, .. } = self;
        comparison.of_zeros(zeros, self.disk_bytes, |range| {
            coalescer.push(range, Need::Zeros, runs);
        })?;
        orders.extend(self.runs.drain(..).filter_map(|run| order(run, None)));
        Ok(())
    }

    fn book_read(&mut self, piece: &ReadPiece, orders: &mut Vec<Order>) -> Result<(), DigestError> {
        for (range, state) in piece.range.pieces(BLOCK_BYTES).zip(&piece.states) {
            let block = range.start() / BLOCK_BYTES;
            if let (Some(digests), BlockState::Data(Some(digest))) = (&mut self.digests, state) {
                digests.push(Entry { block, digest: *digest })?;
            }
            let need = self.comparison.of_block(block, *state)?;
            self.coalescer.push(range, need, &mut self.runs);
        }
        self.coalescer.end_piece(&mut self.runs);
        orders.extend(self.runs.drain(..).filter_map(|run| order(run, Some(piece))));
        Ok(())
    }
}

/// The order for a run. A run of data lies inside the piece that is being booked: the coalescer ends it there.
fn order(run: Run, piece: Option<&ReadPiece>) -> Option<Order> {
    match (run.need, piece) {
        (Need::Nothing, _) => None,
        (Need::Zeros, _) => Some(Order::Zero(run.range)),
        (Need::Data, piece) => {
            debug_assert!(piece.is_some_and(|piece| piece.range.contains(run.range)));
            let piece = piece?;
            let from = usize::try_from(run.range.start() - piece.range.start()).ok()?;
            let len = usize::try_from(run.range.len()).ok()?;
            let data = piece.bytes.slice(from..from + len);
            Some(Order::Write { range: run.range, data, reserved: piece.reserved.clone() })
        }
    }
}
