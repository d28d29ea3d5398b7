//! L1 and L2 entries: 64 bits that say where a table or a cluster lies. Decoding names every outcome and refuses the
//! rest; what to do about an outcome is decided elsewhere.

use crate::error::{Corruption, TableKind};
use crate::units::{ClusterGeometry, HostOffset};

/// Bit 63: the refcount of what the entry points at is exactly one.
const COPIED: u64 = 1 << 63;
/// Bit 62 of an L2 entry: a compressed cluster.
const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of an L2 entry: the cluster reads as zeros.
const ZERO: u64 = 1;
/// Bits 9 to 55: a host offset.
const HOST_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// What decides how the entries of an image are read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EntryFormat {
    /// The cluster size, and whether L2 entries are extended.
    pub geometry: ClusterGeometry,
    /// The version of the format: 2 has no zero flag.
    pub version: u32,
    /// Guest data lies in a file of its own, whose clusters have no refcounts.
    pub external_data: bool,
}

/// A place in the image file, and whether this entry is its only user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Hosted {
    /// Where it starts; a multiple of the cluster size and never 0.
    pub at: HostOffset,
    /// Its refcount is exactly one: it may be written in place.
    pub exclusive: bool,
}

/// What an L1 entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum L1Entry {
    /// No L2 table: all clusters that it would map are unallocated.
    Absent,
    /// An L2 table.
    Table(Hosted),
}

impl L1Entry {
    /// Reads an entry.
    ///
    /// # Errors
    /// [`Corruption::Unaligned`], [`Corruption::ReservedBits`].
    ///
    /// Source: qcow2 specification, "Cluster mapping", L1 table entry.
    pub(crate) fn decode(raw: u64, geometry: ClusterGeometry) -> Result<Self, Corruption> {
        if raw & !(HOST_OFFSET | COPIED) != 0 {
            return Err(Corruption::ReservedBits { table: TableKind::L1, raw });
        }
        Ok(match place(raw, TableKind::L1, geometry)? {
            None => Self::Absent,
            Some(hosted) => Self::Table(hosted),
        })
    }

    /// The bits of an entry.
    pub(crate) fn encode(self) -> u64 {
        match self {
            Self::Absent => 0,
            Self::Table(hosted) => hosted.encode(),
        }
    }
}

/// What an L2 entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum L2Entry {
    /// Nothing: the backing file answers, or zeros.
    Unallocated,
    /// Zeros, whatever the backing file holds; space may be reserved for it.
    Zero {
        /// The reserved cluster, whose content means nothing.
        host: Option<Hosted>,
    },
    /// A cluster of data.
    Data(Hosted),
    /// A compressed cluster; the descriptor is not decoded yet.
    Compressed {
        /// The whole entry.
        raw: u64,
    },
}

impl L2Entry {
    /// Reads an entry of a version 3 image with standard entries.
    ///
    /// # Errors
    /// [`Corruption::Unaligned`], [`Corruption::ReservedBits`].
    ///
    /// Source: qcow2 specification, "Cluster mapping", L2 table entry and standard cluster descriptor.
    pub(crate) fn decode(raw: u64, geometry: ClusterGeometry) -> Result<Self, Corruption> {
        if raw & COMPRESSED != 0 {
            return Ok(Self::Compressed { raw });
        }
        if raw & !(HOST_OFFSET | COPIED | ZERO) != 0 {
            return Err(Corruption::ReservedBits { table: TableKind::L2, raw });
        }
        Ok(match (place(raw, TableKind::L2, geometry)?, raw & ZERO != 0) {
            (host, true) => Self::Zero { host },
            (Some(hosted), false) => Self::Data(hosted),
            (None, false) => Self::Unallocated,
        })
    }

    /// The bits of an entry.
    pub(crate) fn encode(self) -> u64 {
        match self {
            Self::Unallocated => 0,
            Self::Zero { host } => ZERO | host.map_or(0, Hosted::encode),
            Self::Data(hosted) => hosted.encode(),
            Self::Compressed { raw } => raw,
        }
    }
}

impl Hosted {
    /// A place that only one entry uses.
    pub(crate) const fn exclusive(at: HostOffset) -> Self {
        Self { at, exclusive: true }
    }

    fn encode(self) -> u64 {
        self.at.0 | if self.exclusive { COPIED } else { 0 }
    }
}

fn place(
    raw: u64,
    table: TableKind,
    geometry: ClusterGeometry,
) -> Result<Option<Hosted>, Corruption> {
    let offset = raw & HOST_OFFSET;
    if !geometry.is_aligned(offset) {
        return Err(Corruption::Unaligned { table, raw });
    }
    let exclusive = raw & COPIED != 0;
    // Host offset 0 with the flag exists only with an external data file.
    if offset == 0 && exclusive {
        return Err(Corruption::ReservedBits { table, raw });
    }
    Ok((offset != 0).then_some(Hosted { at: HostOffset(offset), exclusive }))
}

/// Reads a refcount table entry: the offset of a refcount block, or `None`.
///
/// # Errors
/// [`Corruption::Unaligned`], [`Corruption::ReservedBits`].
///
/// Source: qcow2 specification, "Host cluster management", refcount table entry.
pub(crate) fn refcount_block(
    raw: u64,
    geometry: ClusterGeometry,
) -> Result<Option<HostOffset>, Corruption> {
    let table = TableKind::RefcountTable;
    if raw & 0x1ff != 0 {
        return Err(Corruption::ReservedBits { table, raw });
    }
    if !geometry.is_aligned(raw) {
        return Err(Corruption::Unaligned { table, raw });
    }
    Ok((raw != 0).then_some(HostOffset(raw)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn geometry() -> ClusterGeometry {
        ClusterGeometry::of_bytes(65536).unwrap()
    }

    #[test]
    fn every_kind_of_entry_is_named() {
        let hosted = Hosted { at: HostOffset(0x50000), exclusive: true };
        let shared = Hosted { exclusive: false, ..hosted };
        for (raw, entry) in [
            (0, L2Entry::Unallocated),
            (1, L2Entry::Zero { host: None }),
            (0x50001, L2Entry::Zero { host: Some(shared) }),
            (COPIED | 0x50000, L2Entry::Data(hosted)),
            (0x50000, L2Entry::Data(shared)),
            (COMPRESSED | 0x1234, L2Entry::Compressed { raw: COMPRESSED | 0x1234 }),
        ] {
            assert_eq!(L2Entry::decode(raw, geometry()), Ok(entry));
            assert_eq!(entry.encode(), raw);
        }
        assert_eq!(L1Entry::decode(COPIED | 0x50000, geometry()), Ok(L1Entry::Table(hosted)));
    }

    #[test]
    fn unaligned_and_reserved_bits_are_corruption() {
        let l2 = |raw| L2Entry::decode(raw, geometry());
        assert!(matches!(l2(0x50200), Err(Corruption::Unaligned { .. })));
        assert!(matches!(l2(0x50002), Err(Corruption::ReservedBits { .. })));
        assert!(matches!(l2(1 << 56), Err(Corruption::ReservedBits { .. })));
        assert!(matches!(l2(COPIED), Err(Corruption::ReservedBits { .. })));
        assert!(L1Entry::decode(0x50001, geometry()).is_err());
        assert!(refcount_block(0x50001, geometry()).is_err());
        assert!(refcount_block(0x50200, geometry()).is_err());
        assert_eq!(refcount_block(1 << 60, geometry()), Ok(Some(HostOffset(1 << 60))));
    }

    proptest! {
        #[test] // What decodes encodes to the same bits; nothing panics.
        fn entries_survive_a_round_trip(raw: u64, bits in 9u32..=21) {
            let geometry = ClusterGeometry::new(bits).unwrap();
            if let Ok(entry) = L2Entry::decode(raw, geometry) {
                prop_assert_eq!(entry.encode(), raw);
            }
            if let Ok(entry) = L1Entry::decode(raw, geometry) {
                prop_assert_eq!(entry.encode(), raw);
            }
        }
    }
}
