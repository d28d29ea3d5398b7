//! Reading what can be read of a range where something cannot: smaller and smaller parts, down to sectors. What is lost
//! is noted and reads as zeros.

use block::{BlockDevice, ByteRange, ErrorKind, Segment, Segments};

use super::{ConvertError, Converted, MAX_UNREADABLE_RANGES};

/// The parts into which a range that cannot be read is cut, in bytes, one after the other. The last is given up.
const PARTS_BYTES: [u64; 3] = [64 << 10, 4096, 512];

/// Reads a range of which a read of the whole has failed.
pub(super) async fn read(
    source: &dyn BlockDevice,
    range: ByteRange,
    outcome: &mut Converted,
) -> Result<Segments, ConvertError> {
    let mut content = Segments::default();
    let mut rest = parts(range);
    while let Some(part) = rest.pop() {
        match source.read(part).await {
            Ok(segments) => content.extend(segments),
            // Nothing will ever be read again.
            Err(source) if source.kind() == ErrorKind::ShuttingDown => {
                return Err(ConvertError::Read { range: part, source });
            }
            Err(_) if part.len() > PARTS_BYTES[2] => rest.extend(parts(part)),
            Err(_) => {
                content.push(Segment::Zero(part.len()));
                note(outcome, part);
            }
        }
    }
    Ok(content)
}

/// The next smaller parts of a range, the first at the end.
fn parts(range: ByteRange) -> Vec<ByteRange> {
    let smaller = PARTS_BYTES.into_iter().find(|part| *part < range.len());
    let mut parts: Vec<_> = range.pieces(smaller.unwrap_or(PARTS_BYTES[2])).collect();
    parts.reverse();
    parts
}

fn note(outcome: &mut Converted, range: ByteRange) {
    outcome.unreadable_bytes += range.len();
    let has_room = outcome.unreadable.len() < MAX_UNREADABLE_RANGES;
    match outcome.unreadable.last_mut() {
        Some(last) if last.end() == range.start() => {
            *last = ByteRange::between(last.start(), range.end());
        }
        _ if has_room => outcome.unreadable.push(range),
        _ => {}
    }
}
