//! What a merge takes from others, told before it is done: what only the folded layers hold besides their disk, and
//! images elsewhere that stand on what changes. Whether that is wanted is for the caller to say.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::chain::{Chain, Layer};
use super::merge::bounds;
use super::{FoldError, MergeOptions};
use crate::image::Image;

/// What is not there any more, or shows something else, after a merge.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct MergeLosses {
    /// What the folded layers hold besides their disk. It goes with their files.
    pub layers: Vec<LayerLoss>,
    /// Images in the folders of the chain that stand on the base or on a folded layer, and are not of the chain: what
    /// they show changes, or they cannot be opened any more. Others, in other folders, are not found.
    pub dependents: Vec<PathBuf>,
}

/// What a layer holds besides its disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct LayerLoss {
    /// The layer's file.
    pub path: PathBuf,
    /// The names of its internal snapshots.
    pub snapshots: Vec<String>,
    /// The names of its bitmaps.
    pub bitmaps: Vec<String>,
}

/// What [`merge`](crate::merge) would take from others. Nothing is written, and files that stand beside the chain are
/// not locked.
///
/// # Errors
/// As [`plan_merge`](crate::plan_merge); [`Error::Path`](crate::Error::Path) for a folder that cannot be listed.
pub async fn merge_losses(top: &Path, options: &MergeOptions) -> Result<MergeLosses, FoldError> {
    let chain = Chain::trace(top, &options.copy.open).await?;
    let (above, base) = bounds(&chain, options)?;
    let ids = |layers: &[Layer]| layers.iter().filter_map(|layer| id_of(&layer.path)).collect();
    let changed: BTreeSet<FileId> = ids(chain.layers.get(above + 1..=base).unwrap_or_default());
    let own: BTreeSet<FileId> = ids(&chain.layers);
    let mut losses = MergeLosses::default();
    for layer in chain.layers.get(above + 1..base).unwrap_or_default() {
        let seen = Image::inspect(&layer.path).await?;
        let loss = LayerLoss {
            path: layer.path.clone(),
            snapshots: seen.snapshots.into_iter().map(|snapshot| snapshot.name).collect(),
            bitmaps: seen.bitmaps.into_iter().map(|bitmap| bitmap.name).collect(),
        };
        if !(loss.snapshots.is_empty() && loss.bitmaps.is_empty()) {
            losses.layers.push(loss);
        }
    }
    for folder in folders_of(&chain) {
        for path in files_of(&folder)? {
            let is_strange = id_of(&path).is_some_and(|id| !own.contains(&id));
            if is_strange && backing_of(&path).await.is_some_and(|below| changed.contains(&below)) {
                losses.dependents.push(path);
            }
        }
    }
    Ok(losses)
}

/// Device and inode: the same under every name.
type FileId = (u64, u64);

fn id_of(path: &Path) -> Option<FileId> {
    std::fs::metadata(path).ok().map(|facts| (facts.dev(), facts.ino()))
}

/// The folders in which the layers are.
fn folders_of(chain: &Chain) -> BTreeSet<PathBuf> {
    let resolved = chain.layers.iter().filter_map(|layer| std::fs::canonicalize(&layer.path).ok());
    resolved.filter_map(|path| path.parent().map(Path::to_owned)).collect()
}

/// The regular files of a folder, in the order of their names. Links are left out: what they lead to stands elsewhere
/// under its own name.
fn files_of(folder: &Path) -> Result<Vec<PathBuf>, crate::Error> {
    let fault = |source| crate::Error::Path { path: folder.to_owned(), source };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(fault)? {
        let entry = entry.map_err(fault)?;
        if entry.file_type().is_ok_and(|kind| kind.is_file()) {
            files.push(entry.path());
        }
    }
    files.sort();
    Ok(files)
}

/// What an image stands on. A file that cannot be read or is no image stands on nothing that is known.
async fn backing_of(path: &Path) -> Option<FileId> {
    let seen = Image::inspect(path).await.ok()?;
    let name = seen.info.backing?.name;
    id_of(&path.parent()?.join(name))
}
