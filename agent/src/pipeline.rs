//! One disk's bytes on their way: walk, read, tell blocks apart, book, write; each part with a bounded number of
//! things in flight. What is sent is decided by the ledger, not here.

use std::sync::{Arc, LazyLock};

use block::{BlockDevice, ByteRange, DeviceError, Durability, Segment, Segments, ZeroMode};
use bytes::Bytes;
use futures_util::{StreamExt, TryFutureExt, TryStreamExt, stream};
use tokio::sync::{Semaphore, mpsc};

use crate::blocks::{BLOCK_BYTES, BlockState, state_of};
use crate::budget::{Reserved, reserve};
use crate::compare::Entries;
use crate::digest_file::{DigestError, Finished};
use crate::error::Cause;
use crate::ledger::{Ledger, Order, ReadPiece, Scanned};
use crate::outline::Piece;
use crate::progress::Progress;
use crate::source::{Source, SourceError};
use crate::walk::{walk_all, walk_dirty};

/// Reads of one disk in flight.
const READS_IN_FLIGHT: usize = 8;

/// Writes of one disk in flight, a connection.
const WRITES_IN_FLIGHT: usize = 4;

/// Named pieces that wait to be read.
const QUEUED_PIECES: usize = 64;

/// Pieces that wait to be booked, and orders that wait to be written.
const QUEUED_ORDERS: usize = 16;

/// Digests are computed on as many threads as there are processors, whatever the number of disks.
static PROCESSORS: LazyLock<Semaphore> = LazyLock::new(|| {
    Semaphore::new(std::thread::available_parallelism().map_or(1, std::num::NonZero::get))
});

/// What stopped a pipeline.
pub(crate) enum PipelineError {
    Read { range: ByteRange, cause: Cause },
    Write { range: ByteRange, cause: Cause },
    Digests(DigestError),
    Died(Cause),
}

impl From<SourceError> for PipelineError {
    fn from(error: SourceError) -> Self {
        Self::Read { range: error.range, cause: error.cause }
    }
}

/// What goes through a pipeline, and how.
pub(crate) struct Pipeline<'a> {
    /// What is read.
    pub(crate) source: &'a Source,
    /// Whether only what the source's bitmap calls dirty is read.
    pub(crate) dirty_only: bool,
    /// Whether blocks need digests.
    pub(crate) digests: bool,
    /// The longest read and write, in bytes.
    pub(crate) extent_bytes: u64,
    /// What is written.
    pub(crate) target: &'a Arc<dyn BlockDevice>,
    /// The connections to the target.
    pub(crate) connections: usize,
    /// Who counts.
    pub(crate) progress: &'a Arc<Progress>,
}

/// What the ledger is sent.
enum ToBook {
    Part(Scanned),
    /// The disk is through: without this word a ledger does not close its books.
    End,
}

impl Pipeline<'_> {
    /// Moves a disk. Returns the digest file of its new state, durable but not published, if one is kept.
    ///
    /// `alive` is dropped when the ledger's thread has ended, which may be a moment after this future was dropped.
    pub(crate) async fn run<I: Entries + Send + 'static>(
        &self,
        ledger: Ledger<I>,
        alive: mpsc::Sender<()>,
    ) -> Result<Option<Finished>, PipelineError> {
        let (named, pieces) = mpsc::channel(QUEUED_PIECES);
        let (book, to_book) = mpsc::channel(QUEUED_ORDERS);
        let (give, orders) = mpsc::channel(QUEUED_ORDERS);
        let progress = Arc::clone(self.progress);
        let keeping = tokio::task::spawn_blocking(move || {
            let kept = keep(ledger, to_book, &give, &progress);
            drop(alive);
            kept
        });
        let kept = keeping.map_err(|error| PipelineError::Died(error.into()));
        let ((), (), (), kept) =
            tokio::try_join!(self.walk(named), self.read(pieces, book), self.write(orders), kept)?;
        match kept {
            Ok(Some(closed)) => Ok(closed.digests),
            Ok(None) => Err(PipelineError::Died("the books were not closed".into())),
            Err(error) => Err(PipelineError::Digests(error)),
        }
    }

    async fn walk(&self, named: mpsc::Sender<Piece>) -> Result<(), PipelineError> {
        let walked = match self.dirty_only {
            true => walk_dirty(self.source, self.extent_bytes, named).await,
            false => walk_all(self.source, self.extent_bytes, named).await,
        };
        Ok(walked?)
    }

    async fn read(
        &self,
        mut pieces: mpsc::Receiver<Piece>,
        book: mpsc::Sender<ToBook>,
    ) -> Result<(), PipelineError> {
        let mut scanned = stream::poll_fn(move |context| pieces.poll_recv(context))
            .map(|piece| self.scan(piece))
            .buffered(READS_IN_FLIGHT);
        while let Some(part) = scanned.try_next().await? {
            // A ledger that is gone has failed, and says so itself.
            if book.send(ToBook::Part(part)).await.is_err() {
                return Ok(());
            }
            self.progress.tell_if_due();
        }
        let _ = book.send(ToBook::End).await;
        Ok(())
    }

    async fn scan(&self, piece: Piece) -> Result<Scanned, PipelineError> {
        let range = match piece {
            Piece::Zeros(range) => {
                // Behind an end that moved forward everything looks like a hole.
                self.source.check_size().await?;
                return Ok(Scanned::Zeros(range));
            }
            Piece::Read(range) => range,
        };
        let reserved = reserve(range.len()).await;
        let read = self.source.device().read(range).await;
        // An end that moved forward is told as that, whether the read met it or not.
        self.source.check_size().await?;
        let segments = match read {
            Ok(segments) => segments,
            Err(error) => return Err(self.narrow(range, error).await),
        };
        self.progress.read(range.len());
        // The semaphore is never closed.
        let _turn = PROCESSORS.acquire().await.ok();
        let digests = self.digests;
        tokio::task::spawn_blocking(move || examine(range, &segments, digests, reserved))
            .await
            .map_err(|error| PipelineError::Died(error.into()))
    }

    /// Finds the block that made the read of `range` fail, so that the error names it and not its neighbours.
    async fn narrow(&self, range: ByteRange, error: DeviceError) -> PipelineError {
        for block in range.pieces(BLOCK_BYTES) {
            if let Err(error) = self.source.device().read(block).await {
                return PipelineError::Read { range: block, cause: error.into() };
            }
        }
        PipelineError::Read { range, cause: error.into() }
    }

    async fn write(&self, mut orders: mpsc::Receiver<Order>) -> Result<(), PipelineError> {
        let in_flight = self.connections.max(1) * WRITES_IN_FLIGHT;
        stream::poll_fn(move |context| orders.poll_recv(context))
            .map(Ok)
            .try_for_each_concurrent(in_flight, |order| self.fulfil(order))
            .await
    }

    async fn fulfil(&self, order: Order) -> Result<(), PipelineError> {
        let (range, written) = match order {
            Order::Write { range, data, reserved } => {
                let written = self.target.write(range.start(), data, Durability::Deferred).await;
                drop(reserved);
                self.progress.data_sent(range.len());
                (range, written)
            }
            Order::Zero(range) => {
                let mode = ZeroMode::default();
                let written = self.target.write_zeroes(range, mode, Durability::Deferred).await;
                self.progress.zero_sent(range.len());
                (range, written)
            }
        };
        written.map_err(|cause| PipelineError::Write { range, cause: cause.into() })?;
        self.progress.tell_if_due();
        Ok(())
    }
}

/// Books that were closed.
struct Closed {
    digests: Option<Finished>,
}

/// Keeps the books until the end of the disk, or until nobody is there any more, which closes nothing.
fn keep<I: Entries>(
    mut ledger: Ledger<I>,
    mut to_book: mpsc::Receiver<ToBook>,
    give: &mpsc::Sender<Order>,
    progress: &Progress,
) -> Result<Option<Closed>, DigestError> {
    let mut orders = Vec::new();
    loop {
        let part = match to_book.blocking_recv() {
            Some(ToBook::Part(part)) => part,
            Some(ToBook::End) => break,
            None => return Ok(None),
        };
        let end = part.range().end();
        ledger.book(part, &mut orders)?;
        if !hand_over(&mut orders, give) {
            return Ok(None);
        }
        progress.booked(end);
    }
    let digests = ledger.close(&mut orders)?;
    Ok(hand_over(&mut orders, give).then_some(Closed { digests }))
}

/// Whether there was somebody to take the orders.
fn hand_over(orders: &mut Vec<Order>, give: &mpsc::Sender<Order>) -> bool {
    orders.drain(..).all(|order| give.blocking_send(order).is_ok())
}

/// Tells the blocks of what was read apart. Costs processor time only.
fn examine(range: ByteRange, segments: &Segments, digests: bool, reserved: Reserved) -> Scanned {
    let Some(bytes) = joined(segments) else { return Scanned::Zeros(range) };
    let states: Vec<_> = range
        .pieces(BLOCK_BYTES)
        .scan(0usize, |at, piece| {
            let end = usize::try_from(piece.end() - range.start()).ok()?;
            let block = bytes.get(*at..end)?;
            *at = end;
            Some(state_of(block, digests))
        })
        .collect();
    if states.iter().all(|state| *state == BlockState::Zero) {
        return Scanned::Zeros(range);
    }
    Scanned::Read(ReadPiece { range, bytes, states, reserved })
}

/// What was read, in one row; `None` if nothing of it is stored.
fn joined(segments: &Segments) -> Option<Bytes> {
    match segments.0.as_slice() {
        [] | [Segment::Zero(_)] => None,
        [Segment::Data(bytes)] => Some(bytes.clone()),
        _ => Some(segments.to_vec().into()),
    }
}

#[cfg(test)]
mod tests;
