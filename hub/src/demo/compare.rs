//! Comparing a point with a raw disk byte for byte: both are block devices. Holes that both have are not read.

use std::path::Path;
use std::sync::Arc;

use block::{BlockDevice, ByteRange, RawDevice};
use chain::Repository;

/// How much is read and compared at once, in bytes.
const PIECE_BYTES: u64 = 4 << 20;

/// Compares a raw disk with the point in time that a layer stands for; answers how many bytes are equal.
pub(super) async fn with_layer(raw: &Path, root: &Path, layer: &Path) -> anyhow::Result<u64> {
    let repository = Repository::open_for_reading(root).await?;
    let point = repository.open_point(layer.strip_prefix(root).unwrap_or(layer)).await?;
    let bytes = equal(raw, &point).await?;
    point.close().await?;
    Ok(bytes)
}

/// Compares two raw files; answers how many bytes are equal.
pub(super) async fn with_file(raw: &Path, other: &Path) -> anyhow::Result<u64> {
    let other: Arc<dyn BlockDevice> = RawDevice::open(other, true).await?;
    equal(raw, &other).await
}

async fn equal(raw: &Path, point: &Arc<dyn BlockDevice>) -> anyhow::Result<u64> {
    let disk = RawDevice::open(raw, true).await?;
    let size_bytes = disk.limits().size_bytes;
    let found = point.limits().size_bytes;
    anyhow::ensure!(
        size_bytes == found,
        "{} has {size_bytes} bytes, the point {found}",
        raw.display()
    );
    for piece in ByteRange::between(0, size_bytes).pieces(PIECE_BYTES) {
        if is_hole(&*disk, piece).await? && is_hole(&**point, piece).await? {
            continue;
        }
        let (wanted, found) = (disk.read(piece).await?.to_vec(), point.read(piece).await?.to_vec());
        if let Some(at) = wanted.iter().zip(&found).position(|(one, other)| one != other) {
            anyhow::bail!("{} differs at byte {}", raw.display(), piece.start() + at as u64);
        }
    }
    Ok(size_bytes)
}

async fn is_hole(device: &dyn BlockDevice, range: ByteRange) -> anyhow::Result<bool> {
    let extents = device.extents(range).await?;
    Ok(matches!(extents.as_slice(), [one] if one.zero && one.range == range))
}
