//! The bit fields of L1, L2 and table entries, and how they are taken apart without a judgement, which is what a check
//! needs. Decoding for reading and writing, which refuses what breaks the format, builds on it in `entry`.

use crate::units::{ClusterGeometry, SECTOR_BYTES};

/// Bit 63 of L1 and L2 entries: the refcount of what the entry points at is exactly one.
pub(crate) const COPIED: u64 = 1 << 63;
/// Bit 62 of an L2 entry: a compressed cluster.
pub(crate) const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of an L2 entry: the cluster reads as zeros.
pub(crate) const ZERO: u64 = 1;
/// Bits 9 to 55 of L1, L2 and bitmap table entries: a host offset.
pub(crate) const HOST_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// What L1 entries must not set.
pub(crate) const L1_RESERVED: u64 = !(HOST_OFFSET | COPIED);
/// What L2 entries of clusters that are not compressed must not set.
pub(crate) const L2_RESERVED: u64 = !(HOST_OFFSET | COPIED | COMPRESSED | ZERO);
/// What entries of a refcount table must not set.
pub(crate) const REFCOUNT_TABLE_RESERVED: u64 = 0x1ff;
/// The subclusters that are allocated, in the second half of an extended entry.
pub(crate) const ALL_ALLOCATED: u64 = 0xffff_ffff;
/// The subclusters that read as zeros, in the second half of an extended entry.
pub(crate) const ALL_ZERO: u64 = ALL_ALLOCATED << 32;

/// What kind of cluster an L2 entry names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EntryKind {
    /// Nothing.
    Absent,
    /// Zeros, and no place.
    Zero,
    /// A place, be it of data or of zeros.
    Hosted(u64),
    /// A compressed cluster.
    Compressed,
}

/// Which bits L2 entries of an image have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EntryFields {
    pub extended: bool,
    pub external_data: bool,
}

impl EntryFields {
    /// The kind of an entry, told by its first half.
    pub(crate) const fn kind(self, raw: u64) -> EntryKind {
        let host = raw & HOST_OFFSET;
        if raw & COMPRESSED != 0 {
            return EntryKind::Compressed;
        }
        // An external file has a cluster at 0, and every cluster there has one user.
        let hosted = host != 0 || (self.external_data && raw & COPIED != 0);
        match (hosted, raw & ZERO != 0 && !self.extended) {
            (false, true) => EntryKind::Zero,
            (false, false) => EntryKind::Absent,
            (true, true) if host == 0 => EntryKind::Zero,
            (true, _) => EntryKind::Hosted(host),
        }
    }
}

/// How the entry of a compressed cluster splits into an offset and a count of sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StreamFields {
    /// The bits of the offset, which are the lowest.
    pub offset_bits: u32,
    /// The bits of the count, which follow up to [`COMPRESSED`].
    count_bits: u32,
}

impl StreamFields {
    /// Source: qcow2 specification, "Compressed Clusters Descriptor".
    pub(crate) const fn of(geometry: ClusterGeometry) -> Self {
        let count_bits = geometry.bits() - 8;
        Self { offset_bits: COMPRESSED.trailing_zeros() - count_bits, count_bits }
    }

    /// Where the stream starts, and its length up to the end of the last sector named, in bytes.
    pub(crate) const fn decode(self, raw: u64) -> (u64, u64) {
        let at = raw & ((1 << self.offset_bits) - 1);
        let more = (raw >> self.offset_bits) & ((1 << self.count_bits) - 1);
        (at, (more + 1) * SECTOR_BYTES - at % SECTOR_BYTES)
    }
}

/// The entry at the start of `bytes`: its first half, and its second where there is one.
pub(crate) fn halves(bytes: &[u8]) -> (u64, u64) {
    let half = |bytes: Option<&[u8; 8]>| bytes.map_or(0, |bytes| u64::from_be_bytes(*bytes));
    (half(bytes.first_chunk()), half(bytes.get(8..).and_then(|rest| rest.first_chunk())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_compressed_entry_counts_sectors_from_that_of_its_first_byte() {
        let fields = StreamFields::of(ClusterGeometry::of_bytes(65536).unwrap());
        let raw = COMPRESSED | (2 << 54) | 0x50301;
        assert_eq!(fields.decode(raw), (0x50301, 3 * 512 - 0x101));
    }

    #[test]
    fn an_offset_of_zero_is_a_place_only_in_an_external_file() {
        let inside = EntryFields { extended: false, external_data: false };
        let outside = EntryFields { extended: false, external_data: true };
        assert_eq!(inside.kind(COPIED), EntryKind::Absent);
        assert_eq!(inside.kind(COPIED | ZERO), EntryKind::Zero);
        assert_eq!(outside.kind(COPIED | ZERO), EntryKind::Zero);
        assert_eq!(outside.kind(COPIED), EntryKind::Hosted(0));
        assert_eq!(outside.kind(ZERO), EntryKind::Zero);
        assert_eq!(inside.kind(0x50000 | ZERO), EntryKind::Hosted(0x50000));
    }
}
