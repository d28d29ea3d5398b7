//! L1 and L2 entries: one or two words of 64 bits that say where a table or a cluster lies. Decoding names every outcome and refuses the
//! rest; what to do about an outcome is decided elsewhere.

use crate::error::{Corruption, TableKind};
use crate::fields::{
    COMPRESSED, COPIED, EntryFields, EntryKind, HOST_OFFSET, L1_RESERVED, L2_RESERVED,
    REFCOUNT_TABLE_RESERVED, StreamFields, ZERO,
};
use crate::units::{ClusterGeometry, HOST_OFFSET_END, HostOffset, Run, SECTOR_BYTES, index};

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
    /// Where it starts: a multiple of the cluster size, and 0 only in an external data file.
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
        if raw & L1_RESERVED != 0 {
            return Err(Corruption::ReservedBits { table: TableKind::L1, raw });
        }
        let host = raw & HOST_OFFSET;
        // Without a table the flag tells nothing, as QEMU has it; a check calls it wrong.
        if host == 0 {
            return Ok(Self::Absent);
        }
        Ok(Self::Table(Hosted::decode(raw, host, TableKind::L1, geometry)?))
    }

    /// The bits of an entry.
    pub(crate) fn encode(self) -> u64 {
        match self {
            Self::Absent => 0,
            Self::Table(hosted) => hosted.encode(),
        }
    }
}

/// Bits over the subclusters of a cluster, the first in bit 0; with standard L2 entries the whole cluster is bit 0.
pub(crate) type Mask = u32;

/// What an L2 entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum L2Entry {
    /// A cluster of subclusters that are data, zeros, or nothing here.
    Cluster(Cluster),
    /// A compressed cluster.
    Compressed(Stream),
}

/// A cluster that is not compressed. No bit is set in both masks, and none in `alloc` without a host cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cluster {
    /// The host cluster; with no bit in `alloc` it is kept for later, and its content means nothing.
    pub host: Option<Hosted>,
    /// What the host cluster holds.
    pub alloc: Mask,
    /// What reads as zeros, whatever the backing file holds.
    pub zero: Mask,
}

/// A compressed cluster: bytes of the image file that need not be aligned to anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Stream {
    /// Where it starts.
    pub at: HostOffset,
    /// Its bytes, up to the end of the last sector that it touches; the stream itself may end before.
    pub len: u64,
}

/// How a subcluster is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sub {
    /// Not here: the backing file answers.
    Unallocated,
    Zero,
    Data,
}

impl Cluster {
    /// How the subcluster `first` is stored, and how many from there on are stored alike (at most 32).
    pub(crate) fn run_at(self, first: u32) -> (Sub, u32) {
        let bit = |mask: Mask| mask.checked_shr(first).unwrap_or(0);
        let (alloc, zero) = (bit(self.alloc), bit(self.zero));
        if alloc & 1 != 0 {
            (Sub::Data, alloc.trailing_ones())
        } else if zero & 1 != 0 {
            (Sub::Zero, zero.trailing_ones())
        } else {
            (Sub::Unallocated, (alloc | zero).trailing_zeros())
        }
    }
}

impl Stream {
    /// The host clusters that it touches.
    pub(crate) fn clusters(self, geometry: ClusterGeometry) -> Run {
        let start = geometry.host_cluster(self.at);
        let last = HostOffset(self.at.0.saturating_add(self.len.saturating_sub(1)));
        Run { start, count: geometry.host_cluster(last).0 - start.0 + 1 }
    }
}

/// The masks for the subclusters from `first` to before `end`.
pub(crate) fn mask(first: u32, end: u32) -> Mask {
    let below = |end: u32| Mask::MAX.checked_shr(32u32.saturating_sub(end)).unwrap_or(0);
    below(end) & !below(first)
}

impl EntryFormat {
    /// All subclusters of a cluster.
    pub(crate) fn all(&self) -> Mask {
        mask(0, self.geometry.subclusters())
    }

    /// The 64-bit words of an L2 entry.
    pub(crate) fn words(&self) -> usize {
        index(self.geometry.l2_entry_bytes() / 8)
    }

    /// Reads an L2 entry: its first word, and the bitmap of an extended one.
    ///
    /// # Errors
    /// [`Corruption::Unaligned`], [`Corruption::ReservedBits`], [`Corruption::SubclusterBits`].
    ///
    /// Source: qcow2 specification, "Cluster mapping": L2 table entry, standard and compressed cluster descriptors,
    /// extended L2 entries.
    pub(crate) fn decode(&self, raw: u64, bitmap: u64) -> Result<L2Entry, Corruption> {
        let reserved = Err(Corruption::ReservedBits { table: TableKind::L2, raw });
        let kind = self.fields().kind(raw);
        if kind == EntryKind::Compressed {
            // The bitmap of a compressed cluster is all zero, and an external data file holds none.
            if self.external_data || bitmap != 0 {
                return reserved;
            }
            return self.decode_stream(raw).map_or(reserved, |s| Ok(L2Entry::Compressed(s)));
        }
        let has_zero_flag = self.version >= 3 && !self.geometry.is_extended();
        if raw & (L2_RESERVED | if has_zero_flag { 0 } else { ZERO }) != 0 {
            return reserved;
        }
        let host = match kind {
            EntryKind::Hosted(at) => Some(Hosted::decode(raw, at, TableKind::L2, self.geometry)?),
            _ => None,
        };
        if self.geometry.is_extended() {
            let (alloc, zero) = halves(bitmap);
            if alloc & zero != 0 || (host.is_none() && alloc != 0) {
                return Err(Corruption::SubclusterBits { raw, bitmap });
            }
            return Ok(L2Entry::Cluster(Cluster { host, alloc, zero }));
        }
        let zero = Mask::from(raw & ZERO != 0);
        let alloc = Mask::from(zero == 0 && host.is_some());
        Ok(L2Entry::Cluster(Cluster { host, alloc, zero }))
    }

    /// The words of an L2 entry; the second one counts only where entries are extended.
    pub(crate) fn encode(&self, entry: L2Entry) -> [u64; 2] {
        match entry {
            L2Entry::Cluster(cluster) if self.geometry.is_extended() => {
                let bitmap = u64::from(cluster.zero) << 32 | u64::from(cluster.alloc);
                [cluster.host.map_or(0, Hosted::encode), bitmap]
            }
            L2Entry::Cluster(Cluster { host, alloc, zero }) => {
                // Without its flag a cluster that is only kept would pass for data.
                let host = host.filter(|_| alloc | zero != 0).map_or(0, Hosted::encode);
                [host | if zero != 0 { ZERO } else { 0 }, 0]
            }
            L2Entry::Compressed(stream) => [self.encode_stream(stream), 0],
        }
    }

    /// How the bits of L2 entries are taken apart.
    pub(crate) const fn fields(&self) -> EntryFields {
        EntryFields { extended: self.geometry.is_extended(), external_data: self.external_data }
    }

    /// Where compressed clusters must end at the latest: their offsets have no more bits.
    pub(crate) fn stream_end(&self) -> u64 {
        HOST_OFFSET_END.min(1 << StreamFields::of(self.geometry).offset_bits)
    }

    /// `None` for an offset behind everything that the format can address.
    fn decode_stream(&self, raw: u64) -> Option<Stream> {
        let (at, len) = StreamFields::of(self.geometry).decode(raw);
        (at < HOST_OFFSET_END).then_some(Stream { at: HostOffset(at), len })
    }

    fn encode_stream(&self, stream: Stream) -> u64 {
        let last = stream.at.0 + stream.len.saturating_sub(1);
        let more = last / SECTOR_BYTES - stream.at.0 / SECTOR_BYTES;
        COMPRESSED | more << StreamFields::of(self.geometry).offset_bits | stream.at.0
    }
}

impl Hosted {
    /// A place that only one entry uses.
    pub(crate) const fn exclusive(at: HostOffset) -> Self {
        Self { at, exclusive: true }
    }

    /// The place at `host` that the entry `raw` names.
    fn decode(
        raw: u64,
        host: u64,
        table: TableKind,
        geometry: ClusterGeometry,
    ) -> Result<Self, Corruption> {
        if !geometry.is_aligned(host) {
            return Err(Corruption::Unaligned { table, raw });
        }
        Ok(Self { at: HostOffset(host), exclusive: raw & COPIED != 0 })
    }

    fn encode(self) -> u64 {
        self.at.0 | if self.exclusive { COPIED } else { 0 }
    }
}

/// The lower and the upper half.
fn halves(bitmap: u64) -> (Mask, Mask) {
    let half = |bits: u64| Mask::try_from(bits & u64::from(Mask::MAX)).unwrap_or(0);
    (half(bitmap), half(bitmap >> 32))
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
    if raw & REFCOUNT_TABLE_RESERVED != 0 {
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
    use crate::units::HostCluster;

    fn standard() -> EntryFormat {
        let geometry = ClusterGeometry::of_bytes(65536).unwrap();
        EntryFormat { geometry, version: 3, external_data: false }
    }

    fn extended() -> EntryFormat {
        let format = standard();
        EntryFormat { geometry: format.geometry.extended().unwrap(), ..format }
    }

    const HOSTED: Hosted = Hosted { at: HostOffset(0x50000), exclusive: true };

    fn cluster(host: Option<Hosted>, alloc: Mask, zero: Mask) -> L2Entry {
        L2Entry::Cluster(Cluster { host, alloc, zero })
    }

    #[test]
    fn every_kind_of_standard_entry_is_named() {
        let shared = Hosted { exclusive: false, ..HOSTED };
        let stream = Stream { at: HostOffset(0x1234), len: 3 * 512 - 0x34 };
        for (raw, entry) in [
            (0, cluster(None, 0, 0)),
            (1, cluster(None, 0, 1)),
            (0x50001, cluster(Some(shared), 0, 1)),
            (COPIED | 0x50000, cluster(Some(HOSTED), 1, 0)),
            (0x50000, cluster(Some(shared), 1, 0)),
            (COMPRESSED | 2 << 54 | 0x1234, L2Entry::Compressed(stream)),
        ] {
            assert_eq!(standard().decode(raw, 0), Ok(entry));
            assert_eq!(standard().encode(entry), [raw, 0]);
        }
        let geometry = standard().geometry;
        assert_eq!(L1Entry::decode(COPIED | 0x50000, geometry), Ok(L1Entry::Table(HOSTED)));
    }

    #[test]
    fn extended_entries_name_subclusters() {
        let raw = COPIED | 0x50000;
        let entry = cluster(Some(HOSTED), 0b0110, 0b1001);
        let bitmap = 0b1001 << 32 | 0b0110;
        assert_eq!(extended().decode(raw, bitmap), Ok(entry));
        assert_eq!(extended().encode(entry), [raw, bitmap]);
        // Kept for later.
        assert_eq!(extended().decode(raw, 0), Ok(cluster(Some(HOSTED), 0, 0)));
        assert_eq!(extended().encode(cluster(Some(HOSTED), 0, 0)), [raw, 0]);
        let both = extended().decode(raw, 1 << 32 | 1);
        assert!(matches!(both, Err(Corruption::SubclusterBits { .. })));
        assert!(matches!(extended().decode(0, 1), Err(Corruption::SubclusterBits { .. })));
        assert!(matches!(extended().decode(raw | ZERO, 1), Err(Corruption::ReservedBits { .. })));
        assert!(extended().decode(COMPRESSED | 0x1000, 1).is_err());
        let runs = Cluster { host: Some(HOSTED), alloc: 0b0110, zero: 0b1001 };
        let kinds: Vec<_> = [0, 1, 3, 4].map(|at| runs.run_at(at)).into();
        let expected = [(Sub::Zero, 1), (Sub::Data, 2), (Sub::Zero, 1), (Sub::Unallocated, 32)];
        assert_eq!(kinds, expected);
    }

    #[test]
    fn version_2_has_no_zero_flag_and_a_data_file_has_a_first_cluster() {
        let old = EntryFormat { version: 2, ..standard() };
        assert!(matches!(old.decode(0x50001, 0), Err(Corruption::ReservedBits { .. })));
        assert_eq!(old.decode(0, 0), Ok(cluster(None, 0, 0)));
        let external = EntryFormat { external_data: true, ..standard() };
        let first = cluster(Some(Hosted::exclusive(HostOffset(0))), 1, 0);
        assert_eq!(external.decode(COPIED, 0), Ok(first));
        assert_eq!(external.encode(first), [COPIED, 0]);
        assert!(external.decode(COMPRESSED | 0x1000, 0).is_err());
    }

    #[test]
    fn a_stream_touches_as_many_clusters_as_its_sectors_do() {
        let geometry = ClusterGeometry::of_bytes(512).unwrap();
        let format = EntryFormat { geometry, ..standard() };
        // The longest: two sectors, of which the first begins in the middle.
        let raw = COMPRESSED | 1 << 61 | 0x3e80;
        let L2Entry::Compressed(stream) = format.decode(raw, 0).unwrap() else { panic!() };
        assert_eq!(stream, Stream { at: HostOffset(0x3e80), len: 512 + 0x180 });
        assert_eq!(stream.clusters(geometry), Run { start: HostCluster(0x1f), count: 2 });
    }

    #[test]
    fn masks_are_half_open() {
        assert_eq!((mask(0, 32), mask(0, 1), mask(31, 32)), (!0, 1, 1 << 31));
        assert_eq!((mask(3, 3), mask(2, 5)), (0, 0b11100));
    }

    #[test]
    fn unaligned_and_reserved_bits_are_corruption() {
        let l2 = |raw| standard().decode(raw, 0);
        let geometry = standard().geometry;
        assert!(matches!(l2(0x50200), Err(Corruption::Unaligned { .. })));
        assert!(matches!(l2(0x50002), Err(Corruption::ReservedBits { .. })));
        assert!(matches!(l2(1 << 56), Err(Corruption::ReservedBits { .. })));
        assert!(L1Entry::decode(0x50001, geometry).is_err());
        assert!(refcount_block(0x50001, geometry).is_err());
        assert!(refcount_block(0x50200, geometry).is_err());
        assert_eq!(refcount_block(1 << 60, geometry), Ok(Some(HostOffset(1 << 60))));
    }

    #[test]
    fn the_copied_flag_alone_is_no_place() {
        assert_eq!(standard().decode(COPIED, 0), Ok(cluster(None, 0, 0)));
        assert_eq!(standard().decode(COPIED | ZERO, 0), Ok(cluster(None, 0, 1)));
        assert_eq!(extended().decode(COPIED, 1 << 32), Ok(cluster(None, 0, 1)));
        assert!(matches!(extended().decode(COPIED, 1), Err(Corruption::SubclusterBits { .. })));
        assert_eq!(L1Entry::decode(COPIED, standard().geometry), Ok(L1Entry::Absent));
        // Zeros at the start of an external file are nowhere, too: other guest clusters lie elsewhere.
        let external = EntryFormat { external_data: true, ..standard() };
        assert_eq!(external.decode(COPIED | ZERO, 0), Ok(cluster(None, 0, 1)));
    }

    proptest! {
        #[test] // What decodes encodes to the same bits; nothing panics.
        fn entries_survive_a_round_trip(
            raw: u64, bitmap: u64, bits in 9u32..=21, wide: bool, version in 2u32..=3, external_data: bool,
        ) {
            let geometry = ClusterGeometry::new(bits).unwrap();
            let geometry = geometry.extended().filter(|_| wide).unwrap_or(geometry);
            let format = EntryFormat { geometry, version, external_data };
            if let Ok(entry) = format.decode(raw, bitmap) {
                let bitmap = if geometry.is_extended() { bitmap } else { 0 };
                // The flag means nothing for compressed clusters and without a place, and is left out.
                let kind = format.fields().kind(raw);
                let hosted = matches!(kind, EntryKind::Hosted(_));
                let raw = if hosted { raw } else { raw & !COPIED };
                prop_assert_eq!(format.encode(entry), [raw, bitmap]);
            }
            if let Ok(entry) = L1Entry::decode(raw, geometry) {
                let raw = if raw & HOST_OFFSET == 0 { raw & !COPIED } else { raw };
                prop_assert_eq!(entry.encode(), raw);
            }
        }
    }
}
