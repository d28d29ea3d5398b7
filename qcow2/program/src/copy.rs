//! Copying a range of one disk into another, several pieces at once. Zeros are told as zeros, so that the target may
//! leave them out.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Context;
use block::{BlockDevice, ByteRange, Durability, Segment, ZeroMode, is_zero};
use futures_util::stream::{self, TryStreamExt};

use crate::progress::Progress;

/// The pieces, in bytes, that are read and written as one.
const PIECE_BYTES: u64 = 1 << 20;
/// How many pieces are on their way at once.
const PIECES_AT_ONCE: usize = 8;

/// Where bytes come from and go to.
pub(crate) struct Copy {
    pub(crate) source: Arc<dyn BlockDevice>,
    /// What is read.
    pub(crate) range: ByteRange,
    pub(crate) target: Arc<dyn BlockDevice>,
    /// Where its first byte goes.
    pub(crate) at: u64,
    /// Whether the target reads as zeros already.
    pub(crate) target_is_zero: bool,
    pub(crate) durability: Durability,
}

impl Copy {
    /// Copies. Does not flush.
    ///
    /// # Errors
    /// What reading or writing failed at, with the offset.
    pub(crate) async fn run(&self, progress: &Progress) -> anyhow::Result<()> {
        let done = AtomicU64::new(0);
        let total = self.range.len();
        stream::iter(self.range.pieces(PIECE_BYTES).map(Ok::<_, anyhow::Error>))
            .try_for_each_concurrent(PIECES_AT_ONCE, |piece| {
                let done = &done;
                async move {
                    self.piece(piece).await?;
                    let now = done.fetch_add(piece.len(), Ordering::Relaxed) + piece.len();
                    progress.set(now, total);
                    Ok(())
                }
            })
            .await
    }

    async fn piece(&self, piece: ByteRange) -> anyhow::Result<()> {
        let read = self.source.read(piece).await;
        let segments = read.with_context(|| format!("error while reading {piece}"))?;
        let mut at = self.at + (piece.start() - self.range.start());
        for segment in segments.0 {
            let len = segment.len();
            let written = match segment {
                Segment::Data(bytes) if !is_zero(&bytes) => {
                    self.target.write(at, bytes, self.durability).await
                }
                _ if self.target_is_zero => Ok(()),
                _ => {
                    let range = ByteRange::between(at, at + len);
                    self.target.write_zeroes(range, ZeroMode::default(), self.durability).await
                }
            };
            written.with_context(|| format!("error while writing at byte {at}"))?;
            at += len;
        }
        Ok(())
    }
}
