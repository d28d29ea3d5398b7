//! Copying a device into a new raw file: several reads in flight, zeros left out, everything hashed in order. Knows
//! devices and one file; nothing of backups.

use std::path::Path;
use std::sync::Arc;

use block::{BlockDevice, ByteRange, HostFile, MAX_EXTENTS, OpenOptions, Segment, Segments};
use futures_util::{StreamExt, stream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::error::describe;

/// How much one read asks for, in bytes.
const READ_BYTES: u64 = 1 << 20;

/// How many reads are in flight.
const READS: usize = 8;

/// How many writes are in flight.
const WRITES: usize = 8;

/// How many pieces wait to be hashed.
const HASH_QUEUE: usize = 16;

/// How many zeros are hashed at once, in bytes.
const ZEROS: usize = 64 << 10;

/// Copies `device` into the new file `path` and makes it durable. Tells `progress` how far it is and how much data was
/// added. Returns the BLAKE3 of the whole content in hexadecimal.
///
/// # Errors
/// In words: what the device or the file failed at. The file may be there, in part.
pub(super) async fn copy(
    device: Arc<dyn BlockDevice>,
    path: &Path,
    mut progress: impl FnMut(u64, u64) + Send,
) -> Result<String, String> {
    let size = device.limits().size_bytes;
    let file =
        HostFile::open(path, OpenOptions::creating()).await.map_err(|error| describe(&error))?;
    file.set_len(size).await.map_err(|error| describe(&error))?;
    let (pieces, hashed) = hasher();
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
                send(&pieces, Piece::Zero(extent.range.len())).await?;
                progress(extent.range.end(), 0);
            } else {
                copy_data(&device, &file, extent.range, &pieces, &mut progress).await?;
            }
            at = extent.range.end();
        }
        if at == rest.start() {
            return Err(format!("the backup tells nothing of byte {at}"));
        }
    }
    drop(pieces);
    file.sync().await.map_err(|error| describe(&error))?;
    hashed.await.map_err(|_| "the digest was not finished".to_owned())
}

/// Copies a range that may hold data: reads overlap, are hashed in order, and written while the next ones come in.
async fn copy_data(
    device: &Arc<dyn BlockDevice>,
    file: &HostFile,
    range: ByteRange,
    pieces: &mpsc::Sender<Piece>,
    progress: &mut (impl FnMut(u64, u64) + Send),
) -> Result<(), String> {
    let reads = stream::iter(range.pieces(READ_BYTES))
        .map(|piece| async move { (piece, device.read(piece).await) })
        .buffered(READS);
    let writes = reads
        .map(|(piece, read)| async move {
            let segments = read.map_err(|error| describe(&error))?;
            if segments.len() != piece.len() {
                return Err(format!("{piece} was read short"));
            }
            send(pieces, Piece::Data(segments.clone())).await?;
            Ok::<_, String>((piece, segments))
        })
        // One at a time, so that pieces reach the hash in order.
        .buffered(1)
        .map(|sent| async move {
            let (piece, segments) = sent?;
            let written = write(file, piece.start(), segments).await?;
            Ok::<_, String>((piece.end(), written))
        })
        .buffered(WRITES);
    tokio::pin!(writes);
    while let Some(written) = writes.next().await {
        let (done, bytes) = written?;
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

/// Content in the order of the disk.
enum Piece {
    Data(Segments),
    Zero(u64),
}

async fn send(pieces: &mpsc::Sender<Piece>, piece: Piece) -> Result<(), String> {
    pieces.send(piece).await.map_err(|_| "the digest was not finished".to_owned())
}

/// A thread that hashes what it is sent, until the sender is dropped.
fn hasher() -> (mpsc::Sender<Piece>, JoinHandle<String>) {
    let (sender, mut receiver) = mpsc::channel(HASH_QUEUE);
    let hashed = tokio::task::spawn_blocking(move || {
        let mut hash = blake3::Hasher::new();
        while let Some(piece) = receiver.blocking_recv() {
            match piece {
                Piece::Zero(len) => hash_zeros(&mut hash, len),
                Piece::Data(segments) => {
                    for segment in segments.0 {
                        match segment {
                            Segment::Data(bytes) => {
                                hash.update(&bytes);
                            }
                            Segment::Zero(len) => hash_zeros(&mut hash, len),
                        }
                    }
                }
            }
        }
        hash.finalize().to_hex().to_string()
    });
    (sender, hashed)
}

fn hash_zeros(hash: &mut blake3::Hasher, mut len: u64) {
    static NOTHING: [u8; ZEROS] = [0; ZEROS];
    while len > 0 {
        let now = usize::try_from(len).unwrap_or(ZEROS).min(ZEROS);
        hash.update(NOTHING.get(..now).unwrap_or(&NOTHING));
        len -= now as u64;
    }
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
        let digest = copy(device.clone(), &path, |at, more| {
            assert!(at >= done);
            (done, sum) = (at, sum + more);
        })
        .await
        .unwrap();
        let wanted = device.read(ByteRange::between(0, size)).await.unwrap().to_vec();
        let found = std::fs::read(&path).unwrap();
        assert!(found == wanted);
        assert_eq!(digest, blake3::hash(&wanted).to_hex().to_string());
        assert_eq!(done, size);
        assert!(sum >= (3 << 20) && sum <= size);
    }
}
