//! From a device's extents to the descriptors of BLOCK_STATUS: flags, merging, limits. Asking the device is told in
//! the connection.
//!
//! Source: `doc/proto.md`, "NBD_REPLY_TYPE_BLOCK_STATUS", "base:allocation metadata context".

use block::{ByteRange, Extent};

use crate::extent_source::FlaggedExtent;
use crate::wire::allocation;

/// A run of bytes with the same flags in one context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// In bytes, never 0; at most 32 bits where the request's length had no more.
    pub len: u64,
    /// The context's flags.
    pub flags: u32,
}

/// The device told extents that are not those of the range it was asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the device told its extents with a gap, or none")]
pub struct BrokenExtents;

/// The flags of an extent in `base:allocation`.
pub fn allocation_flags(extent: &Extent) -> u32 {
    let hole = if extent.allocated { 0 } else { allocation::HOLE };
    let zero = if extent.zero { allocation::ZERO } else { 0 };
    hole | zero
}

/// Collects descriptors for one request. Neighbours with the same flags become one; none passes the range.
#[derive(Debug)]
pub struct Descriptors {
    rest: ByteRange,
    limit: usize,
    done: Vec<Descriptor>,
    full: bool,
}

impl Descriptors {
    /// For a request about `range` with at most `limit` descriptors in the reply.
    pub fn new(range: ByteRange, limit: usize) -> Self {
        Self { rest: range, limit, done: Vec::new(), full: false }
    }

    /// What the device is to be asked next; `None` when the reply is complete.
    pub fn rest(&self) -> Option<ByteRange> {
        (!self.full && !self.rest.is_empty()).then_some(self.rest)
    }

    /// Takes what the device told about [`Self::rest`].
    ///
    /// # Errors
    /// [`BrokenExtents`] where they do not begin there, leave a gap or are empty.
    pub fn push(&mut self, extents: &[Extent]) -> Result<(), BrokenExtents> {
        let flagged = |extent: &Extent| FlaggedExtent {
            range: extent.range,
            flags: allocation_flags(extent),
        };
        self.push_all(extents.iter().map(flagged))
    }

    /// As [`Self::push`], for what a source of extents told.
    ///
    /// # Errors
    /// As [`Self::push`].
    pub fn push_flagged(&mut self, extents: &[FlaggedExtent]) -> Result<(), BrokenExtents> {
        self.push_all(extents.iter().copied())
    }

    fn push_all(
        &mut self,
        extents: impl ExactSizeIterator<Item = FlaggedExtent>,
    ) -> Result<(), BrokenExtents> {
        if extents.len() == 0 {
            return Err(BrokenExtents);
        }
        for extent in extents {
            if self.rest.is_empty() || self.full {
                break;
            }
            let range = extent.range.intersection(self.rest);
            if extent.range.start() > self.rest.start() || range.is_empty() {
                return Err(BrokenExtents);
            }
            self.push_one(range.len(), extent.flags);
        }
        Ok(())
    }

    fn push_one(&mut self, len: u64, flags: u32) {
        let is_full = self.done.len() >= self.limit;
        match self.done.last_mut() {
            // All of them lie in one range, whose length fits.
            Some(last) if last.flags == flags => last.len += len,
            _ if is_full => {
                self.full = true;
                return;
            }
            _ => self.done.push(Descriptor { len, flags }),
        }
        self.rest = ByteRange::between(self.rest.start() + len, self.rest.end());
    }

    /// The descriptors, in order.
    pub fn into_vec(self) -> Vec<Descriptor> {
        self.done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn extent(start: u64, end: u64, allocated: bool, zero: bool) -> Extent {
        Extent { range: ByteRange::between(start, end), allocated, zero }
    }

    #[test]
    fn neighbours_with_the_same_flags_become_one() {
        let mut status = Descriptors::new(ByteRange::between(10, 100), 16);
        status.push(&[extent(0, 50, true, false), extent(50, 60, true, false)]).unwrap();
        assert_eq!(status.rest(), Some(ByteRange::between(60, 100)));
        status.push(&[extent(60, 200, false, true)]).unwrap();
        assert_eq!(status.rest(), None);
        assert_eq!(
            status.into_vec(),
            [Descriptor { len: 50, flags: 0 }, Descriptor { len: 40, flags: 3 }]
        );
    }

    #[test]
    fn a_single_descriptor_still_merges_and_then_stops() {
        let mut status = Descriptors::new(ByteRange::between(0, 100), 1);
        status.push(&[extent(0, 10, true, true), extent(10, 20, true, true)]).unwrap();
        status.push(&[extent(20, 30, true, false)]).unwrap();
        assert_eq!(status.rest(), None);
        assert_eq!(status.into_vec(), [Descriptor { len: 20, flags: 2 }]);
    }

    #[test]
    fn a_device_that_leaves_a_gap_or_makes_no_progress_is_found_out() {
        let status = || Descriptors::new(ByteRange::between(10, 100), 16);
        assert_eq!(status().push(&[]), Err(BrokenExtents));
        assert_eq!(status().push(&[extent(11, 20, true, true)]), Err(BrokenExtents));
        assert_eq!(status().push(&[extent(10, 10, true, true)]), Err(BrokenExtents));
        assert_eq!(status().push(&[extent(0, 10, true, true)]), Err(BrokenExtents));
    }

    #[test]
    fn a_request_of_2_to_the_62_is_one_descriptor() {
        let all = ByteRange::between(0, 1 << 62);
        let mut status = Descriptors::new(all, 16);
        status
            .push(&[extent(0, 1 << 40, false, true), extent(1 << 40, 1 << 62, false, true)])
            .unwrap();
        assert_eq!(status.into_vec(), [Descriptor { len: 1 << 62, flags: 3 }]);
    }

    proptest! {
        #[test]
        fn descriptors_cover_the_range_from_its_start_without_passing_it(
            start in 0_u64..1000,
            lens in proptest::collection::vec((1_u64..100, any::<bool>(), any::<bool>()), 1..50),
            wanted in 1_u64..3000,
            limit in 1_usize..20,
        ) {
            let mut status = Descriptors::new(ByteRange::between(start, start + wanted), limit);
            let mut at = start;
            let mut extents = Vec::new();
            for (len, allocated, zero) in lens {
                extents.push(extent(at, at + len, allocated, zero));
                at += len;
            }
            status.push(&extents).unwrap();
            let done = status.into_vec();
            let sum: u64 = done.iter().map(|one| one.len).sum();
            prop_assert!(!done.is_empty() && done.len() <= limit);
            prop_assert!(sum <= wanted);
            prop_assert!(done.iter().all(|one| one.len > 0));
            prop_assert!(done.windows(2).all(|pair| pair[0].flags != pair[1].flags));
        }
    }
}
