//! Writes that do not fit the alignment of the device: copied into aligned memory, with what the file holds around
//! them. Aligned writes never come here.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::OwnedMutexGuard;

use super::Inner;
use crate::storage::{Effect, Hold, Op};
use crate::{ByteRange, HostError, HostOp, RangeGuard};

/// The largest piece, in bytes, that goes through a bounce buffer at once.
const BOUNCE_BYTES: u64 = 1 << 20;

/// What an operation that must not meet others holds.
#[derive(Default)]
pub(super) struct Locks {
    pub(super) guard: Option<Arc<RangeGuard>>,
    pub(super) resize: Option<Arc<OwnedMutexGuard<()>>>,
}

impl Inner {
    pub(super) async fn write_unaligned(
        &self,
        range: ByteRange,
        wide: ByteRange,
        data: Bytes,
        hold: Hold,
    ) -> Result<(), HostError> {
        if range.end() == wide.end() || wide.end() <= self.physical_len() {
            let guard = Some(Arc::new(self.locks.lock_exclusive(wide).await));
            // Only a cut of the file, which waits for this lock or has gone before it, makes it shorter.
            if range.end() == wide.end() || wide.end() <= self.physical_len() {
                let locks = Locks { guard, resize: None };
                return self.write_pieces(range, wide, &data, &hold, &locks).await;
            }
        }
        let resize = self.lock_resize().await;
        let guard = self.lock_from(wide.start()).await;
        let host_len = self.physical_len();
        let locks = Locks { guard: Some(Arc::clone(&guard)), resize: Some(Arc::clone(&resize)) };
        let written = self.write_pieces(range, wide, &data, &hold, &locks).await;
        if wide.end() <= host_len {
            return written;
        }
        let len = self.lengths.begin_cut(host_len.max(range.end()));
        let mut keep = self.resize_keep(&resize, Effect::Physical(len));
        keep.guard = Some(guard);
        keep.hold = hold;
        let cut = self.run(Op::SetLen { len }, HostOp::Resize, keep).await.map(drop);
        written.and(cut)
    }

    /// Writes in pieces, copying what has to be aligned. The locks are the caller's and cover all of `wide`.
    pub(super) async fn write_pieces(
        &self,
        range: ByteRange,
        wide: ByteRange,
        data: &Bytes,
        hold: &Hold,
        locks: &Locks,
    ) -> Result<(), HostError> {
        for piece in wide.pieces(BOUNCE_BYTES.max(self.facts.offset_align)) {
            let inside = piece.intersection(range);
            let skip = ByteRange::between(range.start(), inside.start());
            let skip = self.memory_len(skip, HostOp::Write)?;
            let len = self.memory_len(inside, HostOp::Write)?;
            let part = data.slice(skip..skip + len);
            let block = if inside == piece && self.is_memory_aligned(&part) {
                part
            } else {
                self.bounce(piece, inside, &part).await?
            };
            let keep = self.keep(hold, locks, inside.end(), piece.end());
            let op = Op::Write { at: piece.start(), data: block };
            self.run(op, HostOp::Write, keep).await?;
        }
        Ok(())
    }

    /// Copies `part` into aligned memory for all of `piece`, with what the file holds around it.
    async fn bounce(
        &self,
        piece: ByteRange,
        inside: ByteRange,
        part: &Bytes,
    ) -> Result<Bytes, HostError> {
        let align = self.facts.offset_align;
        let len = self.memory_len(piece, HostOp::Write)?;
        let mut whole = self.pool.get_now(len);
        let first = ByteRange::between(piece.start(), piece.start() + align);
        let last = ByteRange::between(piece.end() - align, piece.end());
        let needs_first = inside.start() > piece.start() || inside.end() < first.end();
        if needs_first {
            let block = self.read_block(first).await?;
            whole[..block.len()].copy_from_slice(&block);
        }
        if inside.end() < piece.end() && !(needs_first && first == last) {
            let block = self.read_block(last).await?;
            whole[len - block.len()..].copy_from_slice(&block);
        }
        let skip =
            self.memory_len(ByteRange::between(piece.start(), inside.start()), HostOp::Write)?;
        whole[skip..skip + part.len()].copy_from_slice(part);
        Ok(whole.freeze())
    }
}
