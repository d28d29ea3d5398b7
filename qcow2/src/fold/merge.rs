//! The rolling full backup: increments of a chain are folded into an older image, and what stood on them is put over
//! that. First the bytes, then one header, then the files: at every cut the rest of the chain reads as before.

use std::path::{Path, PathBuf};

use block::{ByteRange, Durability, ZeroMode};

use super::chain::{Chain, Stack, Writes};
use super::commit::fold;
use super::names::{check, relative};
use super::plan::FoldPlan;
use super::{FoldError, FoldOptions, Folded};
use crate::create::{BackingName, sync_folder};
use crate::image::Image;
use crate::progress::Progress;

/// What is merged.
#[derive(Clone, Debug, Default)]
pub struct MergeOptions {
    /// How it is copied.
    pub copy: FoldOptions,
    /// The image that increments are folded into; the lowest of the chain otherwise.
    pub base: Option<PathBuf>,
    /// The last increment that is folded; the one over the base otherwise. It cannot be the top of the chain: that is
    /// what [`commit`](crate::commit) is for.
    pub last: Option<PathBuf>,
    /// Remove the files of the folded increments. They are of no use: what they show is mixed with what was above.
    pub remove: bool,
}

/// Folds increments of the chain of `top` into its base, and puts the layer above them over the base.
///
/// That layer, its internal snapshots and all layers above it read as before at every moment, whatever ends the work.
///
/// What ends it after the layer was put over the base and before all folded files were removed leaves the others
/// behind: no chain leads to them any more, so calling again does not know them.
///
/// # Errors
/// [`FoldError`]; calling again goes on.
pub async fn merge(
    top: &Path,
    options: &MergeOptions,
    progress: impl Fn(Progress) + Send + Sync,
) -> Result<Folded, FoldError> {
    let chain = Chain::trace(top, &options.copy.open).await?;
    let (above, base) = bounds(&chain, options)?;
    let name = new_name(&chain, above, base)?;
    let writes = Writes { top: false, base: true };
    // Held from here on: nobody changes the layer that waits for its new backing file.
    let over = match chain.layers.get(above) {
        Some(layer) => options.copy.open.to_write().open_file(&layer.path, layer.format).await?,
        None => return Err(FoldError::NoBacking { file: top.to_owned() }),
    };
    let stack = chain.open(above + 1, base, writes, &options.copy.open).await?;
    let folded = match fold(&stack, &chain, base, &options.copy, &progress).await {
        Ok(folded) => clear_behind(&stack).await.map(|()| folded),
        failed => failed,
    };
    let closed = stack.close().await;
    let folded = folded?;
    closed?;
    Image::set_backing_on(&over, Some(&name)).await?;
    drop(over);
    if options.remove {
        for layer in chain.layers.get(above + 1..base).unwrap_or_default() {
            layer.remove()?;
            sync_folder(&layer.path)?;
        }
    }
    Ok(folded)
}

/// Makes a base that is longer than the layers over it read as zeros behind their end, as it does through them.
async fn clear_behind(stack: &Stack) -> Result<(), FoldError> {
    let end = stack.base.limits().size_bytes;
    let behind = ByteRange::between(stack.top().limits().size_bytes.min(end), end);
    if behind.is_empty() {
        return Ok(());
    }
    stack.base.write_zeroes(behind, ZeroMode::default(), Durability::Deferred).await?;
    Ok(stack.base.flush().await?)
}

/// What [`merge`] would do. Nothing is written.
///
/// # Errors
/// As [`merge`], as far as it can be foreseen.
pub async fn plan_merge(top: &Path, options: &MergeOptions) -> Result<FoldPlan, FoldError> {
    let chain = Chain::trace(top, &options.copy.open).await?;
    let (above, base) = bounds(&chain, options)?;
    new_name(&chain, above, base)?;
    let mut plan = FoldPlan::of(&chain, above + 1, base, &options.copy.open).await?;
    let paths = |from: usize, to: usize| {
        let layers = chain.layers.get(from..to).unwrap_or_default();
        layers.iter().map(|layer| layer.path.clone()).collect()
    };
    plan.relinked = paths(above, above + 1);
    if options.remove {
        plan.removed = paths(above + 1, base);
    }
    Ok(plan)
}

/// The positions of the layer that is put over the base, and of the base; what is between them is folded.
pub(super) fn bounds(chain: &Chain, options: &MergeOptions) -> Result<(usize, usize), FoldError> {
    if chain.layers.len() < 2 {
        return Err(FoldError::NoBacking { file: chain.top().to_owned() });
    }
    let base = match &options.base {
        Some(path) => chain.below(path)?,
        None => chain.layers.len().saturating_sub(1),
    };
    let path = |position: usize| {
        chain.layers.get(position).map(|layer| layer.path.clone()).unwrap_or_default()
    };
    if base == 1 {
        return Err(FoldError::NothingBetween { file: path(0), base: path(1) });
    }
    let last = match &options.last {
        Some(path) => chain.below(path)?,
        None => base.saturating_sub(1),
    };
    if last == 0 || last >= base {
        let (file, base, last) = (path(0), path(base), path(last));
        return Err(FoldError::Order { file, base, last });
    }
    Ok((last - 1, base))
}

fn new_name(chain: &Chain, above: usize, base: usize) -> Result<BackingName, FoldError> {
    let (Some(above), Some(base)) = (chain.layers.get(above), chain.layers.get(base)) else {
        return Err(FoldError::NoBacking { file: chain.top().to_owned() });
    };
    let path = relative(&above.path, &base.path).unwrap_or_default();
    let name = BackingName { path, format: base.format };
    check(&above.path, Some(&name))?;
    Ok(name)
}
