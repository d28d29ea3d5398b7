//! What folding would copy, told without writing: from which layer how much. The answer is exact as long as nobody
//! changes the files.

use std::path::PathBuf;

use super::FoldError;
use super::chain::{Chain, Stack, Writes};
use crate::convert::ConvertError;
use crate::open::OpenOptions;
use crate::read::LayerState;
use crate::walk::Layers;

/// What folding would copy from one layer, in bytes of the disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LayerPlan {
    /// The layer's file.
    pub path: PathBuf,
    /// Data that nothing above hides.
    pub data_bytes: u64,
    /// Zeros that nothing above hides.
    pub zero_bytes: u64,
}

/// What folding would do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FoldPlan {
    /// What would be written: the base, or the image that gets another backing file.
    pub into: PathBuf,
    /// The size that it would grow to, if it would.
    pub grows_to_bytes: Option<u64>,
    /// The layers that bytes come from, the topmost first.
    pub layers: Vec<LayerPlan>,
    /// The images that would get another backing file.
    pub relinked: Vec<PathBuf>,
    /// The files that would be removed.
    pub removed: Vec<PathBuf>,
    /// How many internal snapshots of the image would show something else than before where they hold nothing
    /// themselves: what lies below it changes for the disk as it is now, and they are left alone.
    pub snapshots: u32,
}

impl FoldPlan {
    /// The data that would be copied, in bytes.
    pub fn data_bytes(&self) -> u64 {
        self.layers.iter().map(|layer| layer.data_bytes).sum()
    }

    /// What folding the layers from `first` down to `base` into `base` copies.
    pub(super) async fn of(
        chain: &Chain,
        first: usize,
        base: usize,
        options: &OpenOptions,
    ) -> Result<Self, FoldError> {
        let stack = chain.open(first, base, Writes::default(), options).await?;
        let paths = chain.layers.iter().map(|layer| layer.path.clone());
        let names: Vec<PathBuf> = paths.skip(first).collect();
        let layers = count(&stack, &names).await;
        let size_bytes = stack.top().limits().size_bytes;
        let grows = stack.base.limits().size_bytes < size_bytes;
        stack.close().await?;
        Ok(Self {
            into: names.get(base - first).cloned().unwrap_or_default(),
            grows_to_bytes: grows.then_some(size_bytes),
            layers: layers?,
            ..Self::default()
        })
    }
}

async fn count(stack: &Stack, names: &[PathBuf]) -> Result<Vec<LayerPlan>, FoldError> {
    let mut plans: Vec<LayerPlan> = stack
        .layers
        .iter()
        .zip(names)
        .map(|(_, path)| LayerPlan { path: path.clone(), ..LayerPlan::default() })
        .collect();
    let size_bytes = stack.top().limits().size_bytes;
    let mut walk = Layers::new(&stack.layers);
    let mut at = 0;
    while at < size_bytes {
        let said = walk.at(at).await;
        let said = said.map_err(|(range, source)| ConvertError::Extents { range, source })?;
        let end = said.end.min(size_bytes);
        if let Some((number, state)) = said.by
            && let Some(plan) = plans.get_mut(number)
        {
            match state {
                LayerState::Zero => plan.zero_bytes += end - at,
                _ => plan.data_bytes += end - at,
            }
        }
        at = end;
    }
    Ok(plans)
}
