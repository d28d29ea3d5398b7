//! Moving what a layer holds into the layer below it. The base is durable before the layer is emptied.

use std::path::{Path, PathBuf};

use block::BlockDevice;

use super::chain::{Chain, Stack, Writes};
use super::plan::FoldPlan;
use super::{FoldError, FoldOptions, Folded};
use crate::convert::{ConvertTarget, Layered, convert_layers};
use crate::lend::Taker;
use crate::progress::Progress;
use crate::resize::ResizeOptions;

/// What is committed.
#[derive(Clone, Debug, Default)]
pub struct CommitOptions {
    /// How it is copied.
    pub copy: FoldOptions,
    /// The layer that takes everything above it; the backing file of the top otherwise. Layers between it and the top
    /// lose their meaning: what they showed is mixed with what was above.
    pub base: Option<PathBuf>,
    /// Leave the top as it is. Otherwise it is emptied, where the base is its own backing file.
    pub keep_top: bool,
}

/// Moves what `top` holds, data and zeros, into its backing file, which grows where it is smaller. Then empties `top`.
///
/// At every moment `top` reads as before, whatever ends the work. Images that others have put over the base change
/// what they show; so do internal snapshots of `top` where they hold nothing themselves, as with `qemu-img commit`.
///
/// # Errors
/// [`FoldError`]; calling again goes on.
pub async fn commit(
    top: &Path,
    options: &CommitOptions,
    progress: impl Fn(Progress) + Send + Sync,
) -> Result<Folded, FoldError> {
    let chain = Chain::trace(top, &options.copy.open).await?;
    let base = base_of(&chain, options)?;
    let empties = !options.keep_top && base == 1;
    let writes = Writes { top: empties, base: true };
    let stack = chain.open(0, base, writes, &options.copy.open).await?;
    let folded = fold(&stack, &chain, base, &options.copy, &progress).await;
    let emptied = match (&folded, stack.layers.first()) {
        (Ok(_), Some(image)) if empties => image.inner.forget_all().await,
        _ => Ok(()),
    };
    let closed = stack.close().await;
    let folded = folded?;
    emptied?;
    closed?;
    Ok(folded)
}

/// What [`commit`] would do. Nothing is written.
///
/// # Errors
/// As [`commit`], as far as it can be foreseen.
pub async fn plan_commit(top: &Path, options: &CommitOptions) -> Result<FoldPlan, FoldError> {
    let chain = Chain::trace(top, &options.copy.open).await?;
    let base = base_of(&chain, options)?;
    let snapshots = chain.layers.first().map_or(0, |top| top.snapshots);
    Ok(FoldPlan { snapshots, ..FoldPlan::of(&chain, 0, base, &options.copy.open).await? })
}

fn base_of(chain: &Chain, options: &CommitOptions) -> Result<usize, FoldError> {
    match &options.base {
        Some(path) => chain.below(path),
        None if chain.layers.len() > 1 => Ok(1),
        None => Err(FoldError::NoBacking { file: chain.top().to_owned() }),
    }
}

/// Writes what the layers of an opened stack say into its base, and makes it durable.
pub(super) async fn fold(
    stack: &Stack,
    chain: &Chain,
    base: usize,
    options: &FoldOptions,
    progress: &(impl Fn(Progress) + Send + Sync),
) -> Result<Folded, FoldError> {
    let source = stack.top();
    let needed_bytes = source.limits().size_bytes;
    if let Some(Taker::Image(image)) = &stack.taker
        && image.limits().size_bytes < needed_bytes
    {
        image.resize(needed_bytes, &ResizeOptions::default()).await?;
    }
    let size_bytes = stack.base.limits().size_bytes;
    if size_bytes < needed_bytes {
        let file = chain.layers.get(base).map(|layer| layer.path.clone()).unwrap_or_default();
        return Err(FoldError::TooSmall { file, size_bytes, needed_bytes });
    }
    let target = ConvertTarget::Device(std::sync::Arc::clone(&stack.base));
    let copy = options.convert();
    let layers = Layered { images: &stack.layers, taker: stack.taker.as_ref() };
    let done = convert_layers(source, &target, &copy, Some(layers), progress).await?;
    Ok(Folded {
        written_bytes: done.written_bytes,
        zeroed_bytes: done.zeroed_bytes,
        by_host_bytes: done.by_host_bytes,
    })
}
