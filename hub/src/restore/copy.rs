//! Copying a device into a new raw file: several pieces in flight, zeros left out, so that it costs what the disk holds
//! and not what it measures. Knows devices and one file; nothing of backups.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use block::{BlockDevice, ByteRange, HostFile, MAX_EXTENTS, OpenOptions, Segment, Segments};
use futures_util::{StreamExt, stream};

use crate::error::describe;

/// How much one read asks for, in bytes.
const READ_BYTES: u64 = 1 << 20;

/// How many pieces are in flight, being read or written.
const PIECES: usize = 16;

/// Copies `device` into the new file `path` and makes it durable. Tells `progress` how far it is and how much data was
/// added.
///
/// # Errors
/// In words: what the device or the file failed at. The file may be there, in part.
pub(crate) async fn copy(
    device: Arc<dyn BlockDevice>,
    path: &Path,
    mut progress: impl FnMut(u64, u64) + Send,
) -> Result<(), String> {
    let size = device.limits().size_bytes;
    let file =
        HostFile::open(path, OpenOptions::creating()).await.map_err(|error| describe(&error))?;
    // What a disk holds is for its owner only, as the disk was.
    tokio::fs::set_permissions(path, Permissions::from_mode(0o600))
        .await
        .map_err(|error| format!("cannot keep {} from others: {error}", path.display()))?;
    file.set_len(size).await.map_err(|error| describe(&error))?;
    let mut at = 0;
    while at < size {
        let rest = ByteRange::between(at, size);
        let extents = device.extents(rest).await.map_err(|error| describe(&error))?;
        debug_assert!(extents.len() <= MAX_EXTENTS);
        for extent in extents {
            if extent.range.start() != at || extent.range.is_empty() {
                return Err(format!("the backup tells nothing of byte {at}"));
            }
            if extent.zero {
                progress(extent.range.end(), 0);
            } else {
                copy_data(&device, &file, extent.range, &mut progress).await?;
            }
            at = extent.range.end();
        }
        if at == rest.start() {
            return Err(format!("the backup tells nothing of byte {at}"));
        }
    }
    file.sync().await.map_err(|error| describe(&error))
}

/// Copies a range that may hold data.
async fn copy_data(
    device: &Arc<dyn BlockDevice>,
    file: &HostFile,
    range: ByteRange,
    progress: &mut (impl FnMut(u64, u64) + Send),
) -> Result<(), String> {
    let pieces = stream::iter(range.pieces(READ_BYTES))
        .map(|piece| async move {
            let segments = device.read(piece).await.map_err(|error| describe(&error))?;
            if segments.len() != piece.len() {
                return Err(format!("{piece} was read short"));
            }
            let written = write(file, piece.start(), segments).await?;
            Ok((piece.end(), written))
        })
        .buffered(PIECES);
    tokio::pin!(pieces);
    while let Some(copied) = pieces.next().await {
        let (done, bytes) = copied?;
        progress(done, bytes);
    }
    Ok(())
}

/// Writes the data of `segments` and leaves out the zeros: the file is new, so that they are there already.
async fn write(file: &HostFile, start: u64, segments: Segments) -> Result<u64, String> {
    let (mut at, mut data) = (start, 0);
    for segment in segments.0 {
        let len = segment.len();
        match segment {
            Segment::Data(bytes) if !block::is_zero(&bytes) => {
                file.write(at, bytes, None).await.map_err(|error| describe(&error))?;
                data += len;
            }
            Segment::Data(_) | Segment::Zero(_) => {}
        }
        at += len;
    }
    Ok(data)
}

#[cfg(test)]
mod tests {
    use block::{Durability, MemoryDevice};
    use bytes::Bytes;

    use super::*;

    #[tokio::test]
    async fn a_copy_has_the_content_and_the_holes_of_the_device() {
        let size = (5 << 20) + 513;
        let device = MemoryDevice::new(size);
        let data = |byte: u8, len: usize| Bytes::from(vec![byte; len]);
        device.write(100, data(1, 3 << 20), Durability::Deferred).await.unwrap();
        device.write(size - 7, data(2, 7), Durability::Deferred).await.unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.raw");
        let (mut done, mut sum) = (0, 0);
        copy(device.clone(), &path, |at, more| {
            assert!(at >= done);
            (done, sum) = (at, sum + more);
        })
        .await
        .unwrap();
        let wanted = device.read(ByteRange::between(0, size)).await.unwrap().to_vec();
        let found = std::fs::read(&path).unwrap();
        assert!(found == wanted);
        assert_eq!(done, size);
        assert!(sum >= (3 << 20) && sum <= size);
    }
}
