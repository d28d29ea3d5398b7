//! Walks a source from its first byte to its last and names the pieces that have to be read, and those that are zero
//! without. Reads no content.

use std::sync::Arc;

use block::{BlockDevice, ByteRange, Extent};
use tokio::sync::mpsc;

use crate::outline::{Outline, Piece};
use crate::source::{Source, SourceError};

/// A device answered a question about extents with none: the walk would never end.
#[derive(Debug, thiserror::Error)]
#[error("the source does not say how these bytes are stored")]
struct NoExtents;

/// Names all pieces of the disk, in whole blocks. Ends early, without error, when nobody listens any more.
pub(crate) async fn walk_all(
    source: &Source,
    max_read_bytes: u64,
    pieces: mpsc::Sender<Piece>,
) -> Result<(), SourceError> {
    let size = source.size_bytes();
    let mut outline = Outline::new(size, max_read_bytes);
    let (mut at, mut out) = (0, Vec::new());
    while at < size {
        for extent in extents_from(source.device(), ByteRange::between(at, size)).await? {
            outline.push(extent.range, extent.zero, &mut out);
            at = extent.range.end();
        }
        for piece in out.drain(..) {
            if pieces.send(piece).await.is_err() {
                return Ok(());
            }
        }
    }
    outline.finish(&mut out);
    for piece in out {
        if pieces.send(piece).await.is_err() {
            break;
        }
    }
    Ok(())
}

/// Names the pieces that the source's bitmap calls dirty, exactly as it does. Ends early when nobody listens any more.
pub(crate) async fn walk_dirty(
    source: &Source,
    max_read_bytes: u64,
    pieces: mpsc::Sender<Piece>,
) -> Result<(), SourceError> {
    let size = source.size_bytes();
    let mut allocation = Allocation { device: source.device(), known: Vec::new(), size };
    let mut at = 0;
    while at < size {
        let range = ByteRange::between(at, size);
        let (dirty, end) =
            source.dirty(range).await.map_err(|cause| SourceError { range, cause })?;
        if end <= at {
            return Err(SourceError { range, cause: NoExtents.into() });
        }
        at = end;
        for range in dirty {
            for piece in allocation.tell_apart(range).await? {
                for piece in cut(piece, max_read_bytes) {
                    if pieces.send(piece).await.is_err() {
                        return Ok(());
                    }
                }
            }
        }
    }
    Ok(())
}

/// Cuts a piece that has to be read at multiples of `max_read_bytes`.
fn cut(piece: Piece, max_read_bytes: u64) -> Vec<Piece> {
    match piece {
        Piece::Zeros(_) => vec![piece],
        Piece::Read(range) => {
            range.pieces(max_read_bytes.next_power_of_two()).map(Piece::Read).collect()
        }
    }
}

async fn extents_from(
    device: &Arc<dyn BlockDevice>,
    range: ByteRange,
) -> Result<Vec<Extent>, SourceError> {
    let extents = device.extents(range).await;
    let extents = extents.map_err(|cause| SourceError { range, cause: cause.into() })?;
    match extents.last() {
        Some(last) if last.range.end() > range.start() => Ok(extents),
        _ => Err(SourceError { range, cause: NoExtents.into() }),
    }
}

/// Where a device is zero, asked for in long answers and remembered until passed.
struct Allocation<'a> {
    device: &'a Arc<dyn BlockDevice>,
    known: Vec<Extent>,
    size: u64,
}

impl Allocation<'_> {
    /// Tells the zeros in `range` from what has to be read. Asked in rising order.
    async fn tell_apart(&mut self, range: ByteRange) -> Result<Vec<Piece>, SourceError> {
        let mut pieces: Vec<Piece> = Vec::new();
        let mut rest = range;
        while !rest.is_empty() {
            let first = self.known.partition_point(|extent| extent.range.end() <= rest.start());
            let Some(extent) = self.known.get(first) else {
                let ahead = ByteRange::between(rest.start(), self.size.max(rest.end()));
                self.known = extents_from(self.device, ahead).await?;
                continue;
            };
            let part = extent.range.intersection(rest);
            let piece = if extent.zero { Piece::Zeros(part) } else { Piece::Read(part) };
            pieces.push(piece);
            rest = ByteRange::between(part.end(), rest.end());
        }
        Ok(join(pieces))
    }
}

/// Joins neighbours of one kind: extents differ in more than what matters here.
fn join(pieces: Vec<Piece>) -> Vec<Piece> {
    let mut joined: Vec<Piece> = Vec::with_capacity(pieces.len());
    for piece in pieces {
        let together = |a: ByteRange, b: ByteRange| ByteRange::between(a.start(), b.end());
        match (joined.last_mut(), piece) {
            (Some(Piece::Read(last)), Piece::Read(next)) => *last = together(*last, next),
            (Some(Piece::Zeros(last)), Piece::Zeros(next)) => *last = together(*last, next),
            _ => joined.push(piece),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_of_one_kind_are_read_together() {
        let range = ByteRange::between;
        let pieces =
            vec![Piece::Read(range(3, 5)), Piece::Read(range(5, 9)), Piece::Zeros(range(9, 12))];
        assert_eq!(join(pieces), [Piece::Read(range(3, 9)), Piece::Zeros(range(9, 12))]);
    }

    #[test]
    fn a_long_dirty_extent_is_cut_where_reads_end() {
        let read = |start, end| Piece::Read(ByteRange::between(start, end));
        assert_eq!(cut(read(5, 300), 128), [read(5, 128), read(128, 256), read(256, 300)]);
    }
}
