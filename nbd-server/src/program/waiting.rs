//! A disk whose image comes later: until then writes are kept in a file that outlives the process, and from then on the
//! image is served with them in it. When it has come is told by a signal, and where the file lies by `diff`.

pub(super) mod diff;
#[cfg(test)]
mod tests;
mod unknown;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, bail};
use async_trait::async_trait;
use block::{
    BlockDevice, ByteRange, DeviceError, Durability, ErrorKind, Extent, Limits, Segment, Segments,
    ZeroMode,
};
use bytes::Bytes;
use futures_util::future::try_join_all;
use qcow2::{Image, LayerState};
use tokio::sync::{OwnedRwLockWriteGuard, RwLock};

use super::images::{ImageKey, Opened, Opening};
use super::options::ExportSpec;
use diff::BLOCK_BYTES;
use unknown::{PART, unread};

/// How much of the disk is looked at at once for what was written.
const WINDOW_BYTES: u64 = 1 << 30;

/// How much is copied by one operation.
const PIECE_BYTES: u64 = 1 << 20;

/// How many of these operations run at once.
const COPIES: usize = 8;

/// The disk.
pub(super) struct Waiting {
    spec: ExportSpec,
    /// The file that keeps what is written.
    diff: ImageKey,
    limits: Limits,
    has_come: AtomicBool,
    /// Requests share it; whoever merges has it alone, so that they wait.
    state: Arc<RwLock<State>>,
}

enum State {
    /// What was written, over what is not known.
    Waiting(Image),
    /// The image, with all that was written.
    Come(Opened),
}

impl State {
    fn device(&self) -> &dyn BlockDevice {
        match self {
            Self::Waiting(image) => image,
            Self::Come(opened) => opened.as_device(),
        }
    }
}

impl Waiting {
    /// Goes on with what the file keeps, which is there.
    ///
    /// # Errors
    /// Those of [`diff::open`].
    pub(super) async fn open(
        spec: &ExportSpec,
        diff: &ImageKey,
        how: &Opening,
    ) -> anyhow::Result<Arc<Self>> {
        let image = diff::open(spec, diff, how).await?;
        let limits = Limits {
            size_bytes: image.limits().size_bytes,
            read_only: false,
            preferred_bytes: u32::try_from(BLOCK_BYTES)?,
            can_discard: true,
            fast_zeroes: false,
        };
        if !how.only_looks {
            tracing::info!(
                export = spec.name,
                image = %spec.path.display(),
                diff = %diff.path().display(),
                "waiting for the image until SIGUSR1 tells that it is whole; what is written goes to the diff"
            );
        }
        let state = Arc::new(RwLock::new(State::Waiting(image)));
        let (spec, diff) = (spec.clone(), diff.clone());
        Ok(Arc::new(Self { spec, diff, limits, has_come: AtomicBool::new(false), state }))
    }

    pub(super) fn has_come(&self) -> bool {
        self.has_come.load(Ordering::Acquire)
    }

    /// Opens the image, writes into it what was written, and shows it from then on; requests wait meanwhile. How many
    /// bytes that were.
    ///
    /// Where it fails or the future is dropped, the file still keeps everything, and it can be done again. The image may
    /// have got any part of it by then.
    ///
    /// # Errors
    /// An image that is missing or has another length, and those of reading and writing.
    pub(super) async fn merge(self: &Arc<Self>, how: &Opening) -> anyhow::Result<u64> {
        let opened = self.image(how).await?;
        let state = Arc::clone(&self.state).write_owned().await;
        let copied = match &*state {
            State::Waiting(image) => copy(image, opened.as_device()).await,
            State::Come(_) => bail!("it has come already"),
        };
        let done = match copied {
            // It ends whatever becomes of this future: in between, nothing may be served.
            Ok(bytes) => {
                let this = Arc::clone(self);
                tokio::spawn(async move { this.switch(state, opened).await.map(|()| bytes) })
                    .await?
            }
            Err(error) => {
                // Waits for what is in flight, so that nobody is in the way of the next time.
                let _the_first_error_counts = opened.as_device().close().await;
                Err(error.into())
            }
        };
        done.with_context(|| {
            format!("cannot merge {} into {}", self.diff.path().display(), self.spec.path.display())
        })
    }

    /// The image, which has the size of the disk.
    async fn image(&self, how: &Opening) -> anyhow::Result<Opened> {
        let (spec, path) = (self.spec.clone(), self.spec.path.display());
        let asked = how.clone();
        let found = tokio::task::spawn_blocking(move || ImageKey::of(&spec, None, &asked)).await?;
        let key = found.with_context(|| format!("cannot open {path}"))?;
        let opened = Opened::open(&key, true, how).await?;
        let (has, wanted) = (opened.as_device().limits().size_bytes, self.limits.size_bytes);
        if has != wanted {
            let _nothing_was_written = opened.as_device().close().await;
            bail!("{path} has {has} bytes, and filesize says {wanted}: is it whole?");
        }
        Ok(opened)
    }

    /// Forgets what was written, which is in the image, and shows that.
    async fn switch(
        &self,
        mut state: OwnedRwLockWriteGuard<State>,
        opened: Opened,
    ) -> anyhow::Result<()> {
        let diff = self.diff.clone();
        let forgotten = tokio::task::spawn_blocking(move || diff::forget(&diff)).await?;
        if let Err(error) = forgotten {
            let _the_first_error_counts = opened.as_device().close().await;
            return Err(error.into());
        }
        // What is dropped is not closed: that would write to a file that is gone.
        *state = State::Come(opened);
        self.has_come.store(true, Ordering::Release);
        Ok(())
    }

    /// Refuses what covers a block in part that is not known, because then none of it would be.
    async fn check_edges(&self, image: &Image, range: ByteRange) -> Result<(), DeviceError> {
        let size = self.limits.size_bytes;
        let wide = range.widen(BLOCK_BYTES);
        let mut partial = Vec::new();
        if wide.start() < range.start() {
            partial.push(wide.start());
        }
        if wide.end().min(size) > range.end() {
            partial.push(wide.end() - BLOCK_BYTES);
        }
        for start in partial {
            let block = ByteRange::between(start, (start + BLOCK_BYTES).min(size));
            let known = image.map(block).await?;
            if known.iter().any(|extent| extent.state == LayerState::Unallocated) {
                return Err(PART.of_kind(ErrorKind::Io));
            }
        }
        Ok(())
    }
}

/// Writes all that was written into the image, durably; how many bytes that were.
async fn copy(from: &Image, to: &dyn BlockDevice) -> Result<u64, DeviceError> {
    let mut copied = 0;
    for window in ByteRange::between(0, from.limits().size_bytes).pieces(WINDOW_BYTES) {
        let mut pieces = Vec::new();
        for extent in from.map(window).await? {
            match extent.state {
                LayerState::Unallocated => continue,
                LayerState::Zero => {
                    to.write_zeroes(extent.range, ZeroMode::default(), Durability::Deferred)
                        .await?;
                }
                LayerState::Data | LayerState::Compressed => {
                    pieces.extend(extent.range.pieces(PIECE_BYTES));
                }
            }
            copied += extent.range.len();
        }
        for together in pieces.chunks(COPIES) {
            try_join_all(together.iter().map(|piece| copy_piece(from, to, *piece))).await?;
        }
    }
    to.flush().await?;
    Ok(copied)
}

async fn copy_piece(
    from: &Image,
    to: &dyn BlockDevice,
    piece: ByteRange,
) -> Result<(), DeviceError> {
    let mut at = piece.start();
    for segment in from.read(piece).await?.0 {
        let range = ByteRange::between(at, at + segment.len());
        at = range.end();
        match segment {
            Segment::Data(bytes) => to.write(range.start(), bytes, Durability::Deferred).await?,
            Segment::Zero(_) => {
                to.write_zeroes(range, ZeroMode::default(), Durability::Deferred).await?;
            }
        }
    }
    Ok(())
}

#[async_trait]
impl BlockDevice for Waiting {
    fn limits(&self) -> Limits {
        self.limits
    }

    async fn read(&self, range: ByteRange) -> Result<Segments, DeviceError> {
        self.state.read().await.device().read(range).await.map_err(unread)
    }

    async fn write(
        &self,
        offset: u64,
        data: Bytes,
        durability: Durability,
    ) -> Result<(), DeviceError> {
        let range = self.limits.write_range(offset, data.len())?;
        let state = self.state.read().await;
        if let State::Waiting(image) = &*state {
            self.check_edges(image, range).await?;
        }
        state.device().write(offset, data, durability).await
    }

    async fn write_zeroes(
        &self,
        range: ByteRange,
        mode: ZeroMode,
        durability: Durability,
    ) -> Result<(), DeviceError> {
        self.limits.check_write(range)?;
        let state = self.state.read().await;
        let mut mode = mode;
        if let State::Waiting(image) = &*state {
            if mode.fast_only {
                let what = "fast zeroes before the image has come";
                return Err(DeviceError::NotSupported { what });
            }
            // There is no space to keep: it would be that of the image.
            mode.keep_allocated = false;
            self.check_edges(image, range).await?;
        }
        state.device().write_zeroes(range, mode, durability).await
    }

    async fn discard(&self, range: ByteRange, durability: Durability) -> Result<(), DeviceError> {
        self.limits.check_write(range)?;
        match &*self.state.read().await {
            // What the image has there is not known.
            State::Waiting(_) => Ok(()),
            State::Come(opened) => opened.as_device().discard(range, durability).await,
        }
    }

    async fn flush(&self) -> Result<(), DeviceError> {
        self.state.read().await.device().flush().await
    }

    async fn extents(&self, range: ByteRange) -> Result<Vec<Extent>, DeviceError> {
        self.limits.check_read(range)?;
        match &*self.state.read().await {
            State::Waiting(_) if range.is_empty() => Ok(Vec::new()),
            State::Waiting(_) => Ok(vec![Extent { range, allocated: true, zero: false }]),
            State::Come(opened) => opened.as_device().extents(range).await,
        }
    }

    async fn close(&self) -> Result<(), DeviceError> {
        let state = self.state.read().await;
        if let State::Waiting(_) = &*state {
            let (image, diff) = (self.spec.path.display(), self.diff.path().display());
            tracing::warn!(
                %image, %diff,
                "the image has not come: what was written stays in the diff, and is not in the image"
            );
        }
        state.device().close().await
    }
}
