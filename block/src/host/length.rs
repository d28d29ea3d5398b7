//! The two lengths of a host file: what was written, and what the host has. Growing, allocating ahead, giving back and
//! cutting; plain writes change the lengths by their completions.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::OwnedMutexGuard;

use super::{HostFile, Inner, is_unsupported};
use crate::storage::{Effect, Keep, Op};
use crate::{ByteRange, ErrorKind, HostError, HostOp, RangeGuard};

/// The least and the most that [`HostFile::ensure_capacity`] grows ahead, in bytes.
const GROW_AHEAD_BYTES: (u64, u64) = (8 << 20, 256 << 20);
/// Where growing ahead stops halving its step on a full file system, in bytes.
const GROW_LEAST_BYTES: u64 = 64 << 10;

impl HostFile {
    /// Makes the file at least `len` bytes long, with space behind its present end allocated and reading as zeros.
    /// Never shrinks; [`HostFile::len`] counts it. Where the host cannot allocate, the file gets a hole instead. (Where a
    /// write behind the old end has failed, what it left may show; [`HostFile::set_len`] clears that.)
    ///
    /// # Errors
    /// [`HostError`] with [`HostOp::Allocate`] or [`HostOp::Resize`].
    pub async fn grow(&self, len: u64) -> Result<(), HostError> {
        let inner = &self.inner;
        let range = ByteRange::between(self.len(), len);
        if range.is_empty() {
            return Ok(());
        }
        inner.check_change(HostOp::Allocate, range)?;
        let resize = inner.lock_resize().await;
        let effect = Effect::Grows { logical: len, physical: len };
        let keep = inner.resize_keep(&resize, effect);
        let start = inner.physical_len().min(self.len());
        let op = Op::Allocate { range: ByteRange::between(start, len) };
        match inner.run(op, HostOp::Allocate, keep).await {
            Err(error) if is_unsupported(&error.source) => {
                inner.can_allocate.store(false, Ordering::Relaxed);
            }
            Err(error) => return Err(inner.cut_back_unless_room(&resize, error).await),
            Ok(_) => return Ok(()),
        }
        if inner.physical_len() >= len {
            inner.lengths.logical.fetch_max(len, Ordering::AcqRel);
            return Ok(());
        }
        let keep = inner.resize_keep(&resize, Effect::Grows { logical: len, physical: len });
        inner.run(Op::SetLen { len }, HostOp::Resize, keep).await.map(drop)
    }

    /// Allocates ahead so that a write up to `end` does not have to lengthen the file: cheap if it need not, otherwise
    /// an eighth of the file (8 to 256 MiB) at once, less where the host is nearly full. [`HostFile::len`] does not
    /// count it; [`HostFile::give_back`] returns what was not used. Does nothing where the host cannot.
    ///
    /// # Errors
    /// [`HostError`] with [`HostOp::Allocate`] if not even `end` can be reached: [`crate::ErrorKind::NoSpace`].
    pub async fn ensure_capacity(&self, end: u64) -> Result<(), HostError> {
        let inner = &self.inner;
        let enough = || {
            end <= inner.physical_len()
                || inner.facts.fixed_len
                || !inner.can_allocate.load(Ordering::Relaxed)
        };
        if enough() || inner.storage.has_ample_room(end.saturating_sub(inner.physical_len())) {
            return Ok(());
        }
        inner.check_change(HostOp::Allocate, ByteRange::between(end, end))?;
        let resize = inner.lock_resize().await;
        let mut step = (end / 8).clamp(GROW_AHEAD_BYTES.0, GROW_AHEAD_BYTES.1);
        while !enough() {
            let target = end.saturating_add(step);
            let effect = Effect::Grows { logical: 0, physical: target };
            let range = ByteRange::between(inner.physical_len(), target);
            let keep = inner.resize_keep(&resize, effect);
            match inner.run(Op::Allocate { range }, HostOp::Allocate, keep).await {
                Ok(_) => return Ok(()),
                Err(error) if is_unsupported(&error.source) => {
                    inner.can_allocate.store(false, Ordering::Relaxed);
                }
                Err(error) => {
                    let error = inner.cut_back_unless_room(&resize, error).await;
                    if step == 0 || error.kind() != ErrorKind::NoSpace {
                        return Err(error);
                    }
                    step = if step > GROW_LEAST_BYTES { step / 4 } else { 0 };
                }
            }
        }
        Ok(())
    }

    /// Makes the file at least `end` bytes long, by a hole where nothing is; [`HostFile::len`] counts it. No system call
    /// where the host's length suffices, as it does behind [`HostFile::ensure_capacity`] on hosts that can allocate.
    /// Otherwise waits for writes behind the present end.
    ///
    /// # Errors
    /// [`HostError`] with [`HostOp::Resize`].
    pub async fn ensure_len(&self, end: u64) -> Result<(), HostError> {
        let inner = &self.inner;
        if inner.facts.fixed_len || inner.lengths.reach(end) {
            return Ok(());
        }
        inner.check_change(HostOp::Resize, ByteRange::between(end, end))?;
        let resize = inner.lock_resize().await;
        // A write that is in flight may lengthen the file further, which must not be undone.
        let guard = inner.lock_from(inner.physical_len()).await;
        if inner.lengths.reach(end) {
            return Ok(());
        }
        let mut keep = inner.resize_keep(&resize, Effect::Grows { logical: end, physical: end });
        keep.guard = Some(guard);
        inner.run(Op::SetLen { len: end }, HostOp::Resize, keep).await.map(drop)
    }

    /// Cuts off what was allocated ahead and not written: the host's length becomes [`HostFile::len`].
    ///
    /// # Errors
    /// [`HostError`] with [`HostOp::Resize`] or [`HostOp::Stat`].
    pub async fn give_back(&self) -> Result<(), HostError> {
        let inner = &self.inner;
        if inner.facts.fixed_len || inner.facts.read_only {
            return Ok(());
        }
        let resize = inner.lock_resize().await;
        let guard = inner.lock_from(self.len()).await;
        let len = inner.lengths.begin_cut(self.len());
        if self.host_len()? == len {
            return Ok(());
        }
        let mut keep = inner.resize_keep(&resize, Effect::Physical(len));
        keep.guard = Some(guard);
        inner.run(Op::SetLen { len }, HostOp::Resize, keep).await.map(drop)
    }

    /// Sets the length: cuts the file, or lengthens it by a hole that reads as zeros. Waits for writes behind the cut.
    ///
    /// # Errors
    /// [`HostError`] with [`HostOp::Resize`]; a block device refuses any length but its own.
    pub async fn set_len(&self, len: u64) -> Result<(), HostError> {
        let inner = &self.inner;
        let range = ByteRange::between(len, len);
        inner.check_change(HostOp::Resize, range)?;
        if inner.facts.fixed_len {
            let same = len == self.len();
            let refused = || inner.error(HostOp::Resize, range, io::ErrorKind::Unsupported.into());
            return if same { Ok(()) } else { Err(refused()) };
        }
        let resize = inner.lock_resize().await;
        let guard = inner.lock_from(len.min(self.len())).await;
        let old = self.len();
        // What lies between the logical and the host's end may be left of a failed write: it must not become visible.
        let steps = if len > old && inner.physical_len() > old { &[old, len][..] } else { &[len] };
        for len in steps.iter().copied() {
            let mut keep = inner.resize_keep(&resize, Effect::Sets(len));
            keep.guard = Some(Arc::clone(&guard));
            inner.run(Op::SetLen { len }, HostOp::Resize, keep).await?;
        }
        Ok(())
    }
}

impl Inner {
    pub(super) async fn lock_resize(&self) -> Arc<OwnedMutexGuard<()>> {
        Arc::new(Arc::clone(&self.resize).lock_owned().await)
    }

    /// Where allocating failed for want of room, cuts off what it has left behind the length that was known: a file system
    /// may allocate all that is free before it finds that this is not enough. Gives the error back.
    pub(super) async fn cut_back_unless_room(
        &self,
        resize: &Arc<OwnedMutexGuard<()>>,
        error: HostError,
    ) -> HostError {
        if error.kind() != ErrorKind::NoSpace || self.facts.fixed_len {
            return error;
        }
        // A write that is in flight may have lengthened the file, which must not be undone.
        let guard = self.lock_from(self.physical_len()).await;
        let len = self.physical_len();
        let mut keep = self.resize_keep(resize, Effect::Physical(len));
        keep.guard = Some(guard);
        // Also where the length is the same: blocks may lie behind the end.
        if let Err(error) = self.run(Op::SetLen { len }, HostOp::Resize, keep).await {
            tracing::warn!(%error, "what could not be allocated whole stays allocated in part");
        }
        error
    }

    /// Keeps every write out that touches the block of `offset` or a later one.
    pub(super) async fn lock_from(&self, offset: u64) -> Arc<RangeGuard> {
        let start = offset - offset % self.facts.offset_align;
        Arc::new(self.locks.lock_exclusive(ByteRange::between(start, u64::MAX)).await)
    }

    pub(super) fn resize_keep(&self, resize: &Arc<OwnedMutexGuard<()>>, effect: Effect) -> Keep {
        Keep {
            resize: Some(Arc::clone(resize)),
            effect: Some((Arc::clone(&self.lengths), effect)),
            ..Keep::default()
        }
    }
}
