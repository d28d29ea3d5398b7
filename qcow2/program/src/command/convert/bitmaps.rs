//! The persistent bitmaps that `convert --bitmaps` takes along.

use anyhow::{Context, bail};
use qcow2::{BitmapInfo, Image};

use crate::open::Opened;
use crate::output::warn;

/// The bitmaps of a source that are copied.
///
/// # Errors
/// A source that has none by its nature, and a bitmap that cannot be believed, unless those are skipped.
pub(super) async fn of(source: &Opened, skip_broken: bool) -> anyhow::Result<Vec<BitmapInfo>> {
    let Some(image) = source.image() else { bail!("Source lacks bitmap support") };
    let mut wanted = Vec::new();
    for bitmap in image.bitmaps().await? {
        let name = &bitmap.name;
        match (bitmap.inconsistent, skip_broken) {
            (false, _) => wanted.push(bitmap),
            (true, true) => warn(&format!("Skipping inconsistent bitmap '{name}'")),
            (true, false) => bail!(
                "Cannot copy inconsistent bitmap '{name}': try --skip-broken-bitmaps, or remove it by `qcow2 bitmap \
                 --remove`"
            ),
        }
    }
    Ok(wanted)
}

/// Makes the bitmaps in the target and fills them.
///
/// # Errors
/// What the target refuses.
pub(super) async fn copy(
    bitmaps: &[BitmapInfo],
    source: &Image,
    target: Option<&Image>,
) -> anyhow::Result<()> {
    let Some(target) = target else { return Ok(()) };
    for BitmapInfo { name, granularity_bytes, enabled, .. } in bitmaps {
        let added = target.add_bitmap(name, *granularity_bytes, *enabled).await;
        added.with_context(|| format!("Failed to create bitmap {name}"))?;
        let merged = target.merge_bitmap(name, source, name).await;
        merged.with_context(|| format!("Failed to populate bitmap {name}"))?;
    }
    Ok(())
}
