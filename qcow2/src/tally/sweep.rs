//! Ranges that overlap, cut into pieces that do not, each with how many ranges hold it. Thus tables that many others
//! point at, or that lie over each other, are read once.

use block::ByteRange;

/// A piece that the same ranges hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layered {
    /// The piece.
    pub range: ByteRange,
    /// How many ranges hold it.
    pub times: u64,
    /// Where the range that was met first among those starts.
    pub base: u64,
}

/// The pieces of all `ranges`, in order.
pub(crate) fn sweep(ranges: impl IntoIterator<Item = ByteRange>) -> Vec<Layered> {
    // Ends come before starts at the same place, so that nothing of no length is made.
    let mut edges: Vec<(u64, bool)> = Vec::new();
    for range in ranges.into_iter().filter(|range| !range.is_empty()) {
        edges.push((range.start(), true));
        edges.push((range.end(), false));
    }
    edges.sort_unstable();
    let mut pieces = Vec::new();
    let (mut times, mut from, mut base) = (0u64, 0u64, 0u64);
    for (at, starts) in edges {
        if times > 0 && at > from {
            pieces.push(Layered { range: ByteRange::between(from, at), times, base });
        }
        if starts && times == 0 {
            base = at;
        }
        times = if starts { times + 1 } else { times.saturating_sub(1) };
        from = at;
    }
    pieces
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_byte_is_in_one_piece_that_knows_its_ranges(
            ranges in prop::collection::vec((0u64..200, 0u64..50), 0..20),
        ) {
            let ranges: Vec<_> =
                ranges.iter().map(|(at, len)| ByteRange::between(*at, at + len)).collect();
            let pieces = sweep(ranges.iter().copied());
            for at in 0..260 {
                let byte = ByteRange::between(at, at + 1);
                let holds = |range: &ByteRange| !range.intersection(byte).is_empty();
                let times = ranges.iter().filter(|range| holds(range)).count() as u64;
                let found: Vec<_> = pieces.iter().filter(|piece| holds(&piece.range)).collect();
                prop_assert!(found.len() <= 1);
                prop_assert_eq!(found.first().map_or(0, |piece| piece.times), times);
            }
        }
    }
}
