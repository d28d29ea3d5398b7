//! A byte range of a device or a file, with arithmetic that cannot overflow. Knows nothing of clusters or sectors.

use std::fmt;

/// The bytes from `start` up to, but without, `end()`.
///
/// `start + len` never exceeds [`u64::MAX`]: the constructor refuses what would wrap.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ByteRange {
    start: u64,
    len: u64,
}

impl ByteRange {
    /// A range of `len` bytes at `start`, or `None` where its end would pass 2^64 - 1.
    pub const fn new(start: u64, len: u64) -> Option<Self> {
        match start.checked_add(len) {
            Some(_) => Some(Self { start, len }),
            None => None,
        }
    }

    /// The range between two offsets; empty, at `start`, where `end` lies before it.
    pub const fn between(start: u64, end: u64) -> Self {
        Self { start, len: end.saturating_sub(start) }
    }

    /// The first byte.
    pub const fn start(self) -> u64 {
        self.start
    }

    /// The number of bytes.
    pub const fn len(self) -> u64 {
        self.len
    }

    /// The first byte behind the range.
    pub const fn end(self) -> u64 {
        self.start + self.len
    }

    /// Whether the range holds no byte.
    pub const fn is_empty(self) -> bool {
        self.len == 0
    }

    /// Whether `other` lies inside.
    pub const fn contains(self, other: Self) -> bool {
        self.start <= other.start && other.end() <= self.end()
    }

    /// Whether at least one byte is in both.
    pub const fn overlaps(self, other: Self) -> bool {
        self.start < other.end() && other.start < self.end() && self.len > 0 && other.len > 0
    }

    /// The bytes that are in both; empty where there are none.
    pub fn intersection(self, other: Self) -> Self {
        Self::between(self.start.max(other.start), self.end().min(other.end()))
    }

    /// The smallest range of whole blocks that covers this one; `block` is a power of two, in bytes.
    ///
    /// Saturates at the last whole block below 2^64.
    pub const fn widen(self, block: u64) -> Self {
        let mask = block - 1;
        let end = match self.end().checked_add(mask) {
            Some(end) => end & !mask,
            None => !mask,
        };
        Self::between(self.start & !mask, end)
    }

    /// Whether both ends are multiples of `block`, a power of two, in bytes.
    pub const fn is_aligned(self, block: u64) -> bool {
        (self.start | self.len) & (block - 1) == 0
    }

    /// Cuts at every multiple of `block` (a power of two, in bytes), in order, without empty pieces.
    pub fn pieces(self, block: u64) -> impl Iterator<Item = Self> {
        let mut rest = self;
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let boundary = (rest.start | (block - 1)).saturating_add(1);
            let piece = Self::between(rest.start, boundary.min(rest.end()));
            rest = Self::between(piece.end(), rest.end());
            Some(piece)
        })
    }
}

impl fmt::Debug for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start, self.end())
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes at offset {}", self.len, self.start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_that_would_wrap_is_refused() {
        assert!(ByteRange::new(u64::MAX, 1).is_none());
        assert_eq!(ByteRange::new(u64::MAX, 0).map(ByteRange::end), Some(u64::MAX));
    }

    #[test]
    fn widening_covers_and_aligns() {
        let wide = ByteRange::between(5, 4097).widen(4096);
        assert_eq!((wide.start(), wide.end()), (0, 8192));
        assert!(wide.is_aligned(4096));
        assert_eq!(ByteRange::between(u64::MAX - 1, u64::MAX).widen(512).end() % 512, 0);
    }

    #[test]
    fn pieces_cover_a_range_without_crossing_a_boundary() {
        let pieces: Vec<_> = ByteRange::between(10, 40).pieces(16).collect();
        let ends: Vec<_> = pieces.iter().map(|p| (p.start(), p.end())).collect();
        assert_eq!(ends, [(10, 16), (16, 32), (32, 40)]);
        assert_eq!(ByteRange::between(3, 3).pieces(16).count(), 0);
    }

    #[test]
    fn empty_ranges_overlap_nothing() {
        let all = ByteRange::between(0, 100);
        assert!(!all.overlaps(ByteRange::between(50, 50)));
        assert!(all.overlaps(ByteRange::between(99, 200)));
        assert!(!all.overlaps(ByteRange::between(100, 200)));
    }
}
