//! What of a content is worth writing: runs of data, and runs of zeros that are long enough to be left out. Nothing is
//! copied: runs of data are parts of what was read.

use block::{ByteRange, Segment, Segments, is_zero};
use bytes::Bytes;

use crate::units::index;

/// A run of bytes that is written in one way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Run {
    Data(Bytes),
    Zero,
}

/// Cuts a content that begins at `start` into runs, in order and without gaps. Zeros count where they fill an aligned
/// block of `sparse_bytes`, a power of two, or where the source says that they are.
pub(super) fn of(content: &Segments, start: u64, sparse_bytes: u64) -> Vec<(ByteRange, Run)> {
    let (mut runs, mut at) = (Vec::new(), start);
    for segment in &content.0 {
        let range = ByteRange::between(at, at + segment.len());
        at = range.end();
        match segment {
            Segment::Zero(_) => push_zero(&mut runs, range),
            Segment::Data(bytes) => cut(&mut runs, range, bytes, sparse_bytes),
        }
    }
    runs
}

fn cut(runs: &mut Vec<(ByteRange, Run)>, range: ByteRange, bytes: &Bytes, sparse_bytes: u64) {
    let slice =
        |part: ByteRange| index(part.start() - range.start())..index(part.end() - range.start());
    let mut data = ByteRange::between(range.start(), range.start());
    for block in range.pieces(sparse_bytes) {
        // A part of a block counts only where nothing but zeros lies around it.
        let whole = block.len() == sparse_bytes || block == range;
        if !(whole && is_zero(&bytes[slice(block)])) {
            data = ByteRange::between(data.start(), block.end());
            continue;
        }
        if !data.is_empty() {
            runs.push((data, Run::Data(bytes.slice(slice(data)))));
        }
        push_zero(runs, block);
        data = ByteRange::between(block.end(), block.end());
    }
    if !data.is_empty() {
        runs.push((data, Run::Data(bytes.slice(slice(data)))));
    }
}

fn push_zero(runs: &mut Vec<(ByteRange, Run)>, range: ByteRange) {
    match runs.last_mut() {
        Some((last, Run::Zero)) => *last = ByteRange::between(last.start(), range.end()),
        _ => runs.push((range, Run::Zero)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn whole_blocks_of_zeros_are_runs_and_parts_are_not() {
        let mut bytes = vec![0; 5 * 512];
        bytes[600] = 1;
        bytes[4 * 512] = 2;
        let content = Segments(vec![Segment::Data(bytes.into()), Segment::Zero(100)]);
        let found: Vec<_> = of(&content, 512, 512)
            .into_iter()
            .map(|(range, run)| (range.start(), range.end(), run == Run::Zero))
            .collect();
        let expected = [
            (512, 1024, true),
            (1024, 1536, false),
            (1536, 2560, true),
            (2560, 3072, false),
            (3072, 3172, true),
        ];
        assert_eq!(found, expected);
    }

    proptest! {
        #[test] // Whatever the cuts: runs lie one behind the other, and together are the content.
        fn runs_are_the_content(
            parts in prop::collection::vec((1u64..3000, 0u8..3), 0..8), start in 0u64..5000,
            sparse in prop::sample::select(vec![512u64, 1024, 4096]),
        ) {
            let segments = parts.iter().map(|(len, kind)| match kind {
                0 => Segment::Zero(*len),
                // Zeros among which a byte stands now and then.
                kind => {
                    let byte = |at: u64| u8::from(*kind == 1 && at % 2048 == 7);
                    Segment::Data((0..*len).map(byte).collect::<Vec<_>>().into())
                }
            });
            let content = Segments(segments.collect());
            let (mut all, mut at) = (Vec::new(), start);
            for (range, run) in of(&content, start, sparse) {
                prop_assert_eq!(range.start(), at);
                at = range.end();
                match run {
                    Run::Zero => all.resize(all.len() + index(range.len()), 0),
                    Run::Data(bytes) => {
                        prop_assert_eq!(bytes.len() as u64, range.len());
                        all.extend_from_slice(&bytes);
                    }
                }
            }
            prop_assert_eq!(all, content.to_vec());
        }
    }
}
