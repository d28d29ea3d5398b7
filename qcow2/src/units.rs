//! Offsets and cluster numbers that cannot be mixed up, and the arithmetic of one image's cluster size. No table is
//! read here and no entry decoded.

use std::fmt;

use block::ByteRange;

/// The smallest cluster that the format knows: 512 bytes.
pub const MIN_CLUSTER_BITS: u32 = 9;
/// The largest cluster that QEMU opens: 2 MiB.
pub const MAX_CLUSTER_BITS: u32 = 21;
/// The cluster size of images that do not ask for another: 64 KiB.
pub const DEFAULT_CLUSTER_BYTES: u32 = 1 << 16;
/// The unit in which the host writes a piece or does not: metadata never relies on more, in bytes.
pub(crate) const SECTOR_BYTES: u64 = 512;
/// The unit in which changes of tables are written, in bytes: what direct I/O takes without reading first.
pub(crate) const TABLE_WRITE_BYTES: u64 = 4096;
/// Host offsets in L1 and L2 entries have 56 bits; nothing that they point at may lie behind.
pub(crate) const HOST_OFFSET_END: u64 = 1 << 56;

/// A byte of the image file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostOffset(pub u64);

/// A byte of the virtual disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestOffset(pub u64);

/// A cluster of the image file, counted from 0 (the header's).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostCluster(pub u64);

/// A cluster of the virtual disk, counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestCluster(pub u64);

impl fmt::Display for HostOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for GuestOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// Consecutive host clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Run {
    /// The first.
    pub start: HostCluster,
    /// How many.
    pub count: u64,
}

impl Run {
    /// One cluster.
    pub(crate) const fn one(start: HostCluster) -> Self {
        Self { start, count: 1 }
    }

    /// The cluster behind the last.
    pub const fn end(self) -> HostCluster {
        HostCluster(self.start.0 + self.count)
    }

    /// Whether a cluster is in both.
    pub const fn overlaps(self, other: Self) -> bool {
        self.start.0 < other.end().0 && other.start.0 < self.end().0
    }

    /// Each cluster in turn.
    pub fn clusters(self) -> impl Iterator<Item = HostCluster> {
        (self.start.0..self.end().0).map(HostCluster)
    }
}

/// The smallest cluster that 32 subclusters of at least 512 bytes fit in: 16 KiB.
const MIN_EXTENDED_BITS: u32 = 14;

/// The cluster size of an image, the width of its L2 entries, and all that follows from them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClusterGeometry {
    bits: u32,
    /// L2 entries have 16 bytes and describe 32 subclusters each.
    extended: bool,
}

impl ClusterGeometry {
    /// The geometry for clusters of `1 << bits` bytes, or `None` outside 512 bytes to 2 MiB.
    pub const fn new(bits: u32) -> Option<Self> {
        if bits < MIN_CLUSTER_BITS || bits > MAX_CLUSTER_BITS {
            return None;
        }
        Some(Self { bits, extended: false })
    }

    /// The geometry for clusters of `bytes`, or `None` for a size that is no power of two or out of bounds.
    pub const fn of_bytes(bytes: u32) -> Option<Self> {
        if !bytes.is_power_of_two() {
            return None;
        }
        Self::new(bytes.trailing_zeros())
    }

    /// The same with extended L2 entries, or `None` for clusters below 16 KiB, which have no subclusters.
    pub const fn extended(self) -> Option<Self> {
        if self.bits < MIN_EXTENDED_BITS {
            return None;
        }
        Some(Self { extended: true, ..self })
    }

    /// Whether L2 entries are extended.
    pub const fn is_extended(self) -> bool {
        self.extended
    }

    /// The subclusters of a cluster: 32 with extended L2 entries, otherwise the cluster itself.
    pub const fn subclusters(self) -> u32 {
        if self.extended { 32 } else { 1 }
    }

    /// The bytes of a subcluster: the unit in which extended L2 entries tell data from zeros and holes.
    pub const fn subcluster_bytes(self) -> u64 {
        if self.extended { self.bytes() >> 5 } else { self.bytes() }
    }

    /// The base-2 logarithm of the cluster size.
    pub const fn bits(self) -> u32 {
        self.bits
    }

    /// The cluster size in bytes.
    pub const fn bytes(self) -> u64 {
        1 << self.bits
    }

    /// The bytes of an L2 entry: 8, or 16 where it is extended.
    pub const fn l2_entry_bytes(self) -> u64 {
        1 << self.entry_bits()
    }

    const fn entry_bits(self) -> u32 {
        if self.extended { 4 } else { 3 }
    }

    /// The base-2 logarithm of [`ClusterGeometry::l2_coverage`].
    const fn coverage_bits(self) -> u32 {
        2 * self.bits - self.entry_bits()
    }

    /// The entries of an L2 table.
    pub const fn l2_entries(self) -> u64 {
        1 << (self.bits - self.entry_bits())
    }

    /// The bytes of the virtual disk that one L2 table maps.
    pub const fn l2_coverage(self) -> u64 {
        1 << self.coverage_bits()
    }

    /// The entries that an L1 table needs for a disk of `size` bytes.
    pub const fn l1_entries(self, size: u64) -> u64 {
        size.div_ceil(self.l2_coverage())
    }

    /// The L1 entry that maps `at`.
    pub const fn l1_index(self, at: GuestOffset) -> u64 {
        at.0 >> self.coverage_bits()
    }

    /// The entry in its L2 table that maps `at`.
    pub const fn l2_index(self, at: GuestOffset) -> u64 {
        (at.0 >> self.bits) & (self.l2_entries() - 1)
    }

    /// The guest bytes that entry `l2` of L2 table `l1` maps, without regard to the size of the disk.
    pub const fn guest_range(self, l1: u64, l2: u64) -> ByteRange {
        let start = (l1 << self.coverage_bits()) + (l2 << self.bits);
        ByteRange::between(start, start.saturating_add(self.bytes()))
    }

    /// The guest cluster that holds `at`.
    pub const fn guest_cluster(self, at: GuestOffset) -> GuestCluster {
        GuestCluster(at.0 >> self.bits)
    }

    /// The host cluster that holds `at`.
    pub const fn host_cluster(self, at: HostOffset) -> HostCluster {
        HostCluster(at.0 >> self.bits)
    }

    /// Where a host cluster starts. Clusters are below 2^55, so that this cannot overflow for those of a file.
    pub const fn host_offset(self, cluster: HostCluster) -> HostOffset {
        HostOffset(cluster.0 << self.bits)
    }

    /// The bytes of a run of host clusters.
    pub const fn host_range(self, run: Run) -> ByteRange {
        ByteRange::between(run.start.0 << self.bits, (run.start.0 + run.count) << self.bits)
    }

    /// The clusters that `bytes` need.
    pub const fn clusters(self, bytes: u64) -> u64 {
        bytes.div_ceil(1 << self.bits)
    }

    /// Whether an offset is a multiple of the cluster size.
    pub const fn is_aligned(self, offset: u64) -> bool {
        offset & (self.bytes() - 1) == 0
    }
}

/// A length or index in memory. Everything that comes here is bounded far below `usize::MAX` by a named limit;
/// saturating (instead of wrapping) makes a broken bound end in a refused slice, never in a wrong one.
pub(crate) fn index(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_of_64k_clusters_maps_512_mib() {
        let geometry = ClusterGeometry::of_bytes(65536).unwrap();
        assert_eq!(geometry.l2_entries(), 8192);
        assert_eq!(geometry.l2_coverage(), 512 << 20);
        assert_eq!(geometry.l1_entries(500 << 30), 1000);
        assert_eq!(geometry.l1_entries(1), 1);
        assert_eq!(geometry.l1_index(GuestOffset((512 << 20) + 65536)), 1);
        assert_eq!(geometry.l2_index(GuestOffset((512 << 20) + 65536)), 1);
        assert_eq!(geometry.guest_range(1, 1).start(), (512 << 20) + 65536);
    }

    #[test]
    fn extended_entries_halve_what_a_table_maps() {
        let geometry = ClusterGeometry::of_bytes(65536).unwrap().extended().unwrap();
        assert_eq!((geometry.l2_entries(), geometry.l2_entry_bytes()), (4096, 16));
        assert_eq!(geometry.l2_coverage(), 256 << 20);
        assert_eq!((geometry.subclusters(), geometry.subcluster_bytes()), (32, 2048));
        assert_eq!(geometry.guest_range(1, 1).start(), (256 << 20) + 65536);
        assert!(ClusterGeometry::of_bytes(8192).unwrap().extended().is_none());
    }

    #[test]
    fn cluster_sizes_outside_the_bounds_are_refused() {
        for bytes in [0, 1, 256, 513, 65535, 4 << 20] {
            assert!(ClusterGeometry::of_bytes(bytes).is_none(), "{bytes}");
        }
        for bits in MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS {
            assert_eq!(ClusterGeometry::new(bits).map(ClusterGeometry::bytes), Some(1 << bits));
        }
    }
}
