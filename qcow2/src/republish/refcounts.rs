//! The refcount table and blocks of a new state, which count everything in it and themselves. Written by the caller.

use std::collections::{BTreeMap, BTreeSet};

use super::room::{Ledger, Room};
use crate::error::{Fault, Feature, TableKind};
use crate::header::MAX_REFCOUNT_TABLE_BYTES;
use crate::refcount::RefcountWidth;
use crate::units::{ClusterGeometry, HostCluster, Run, index};

/// Where the refcounts of a new state lie.
#[derive(Debug)]
pub(super) struct NewRefcounts {
    geometry: ClusterGeometry,
    width: RefcountWidth,
    /// The clusters of the table.
    pub(super) table: Run,
    /// The blocks, by their index in the table.
    blocks: BTreeMap<u64, HostCluster>,
}

impl NewRefcounts {
    /// Finds places for a table and blocks that count all of `ledger`, and enters them there.
    ///
    /// # Errors
    /// [`Feature::TableTooLarge`], [`Feature::FileTooLarge`], [`Feature::ScatteredReferences`].
    pub(super) fn lay_out(
        geometry: ClusterGeometry,
        width: RefcountWidth,
        ledger: &mut Ledger,
        room: &mut Room,
    ) -> Result<Self, Fault> {
        let per_block = width.per_block(geometry);
        let mut needed = BTreeSet::new();
        for (cluster, _) in ledger.between(HostCluster(0), HostCluster(u64::MAX)) {
            needed.insert(cluster.0 / per_block);
        }
        let mut layout =
            Self { geometry, width, table: Run::one(HostCluster(0)), blocks: BTreeMap::new() };
        layout.place_blocks(&mut needed, ledger, room)?;
        loop {
            let clusters = layout.table_clusters()?;
            layout.table = room.take(clusters)?;
            ledger.add(layout.table)?;
            needed.extend(layout.table.clusters().map(|cluster| cluster.0 / per_block));
            layout.place_blocks(&mut needed, ledger, room)?;
            if layout.table_clusters()? <= clusters {
                return Ok(layout);
            }
            // Counting the table took blocks that the table has no entries for.
            ledger.remove(layout.table)?;
        }
    }

    /// Places the blocks that are needed, and those that are needed for these.
    fn place_blocks(
        &mut self,
        needed: &mut BTreeSet<u64>,
        ledger: &mut Ledger,
        room: &mut Room,
    ) -> Result<(), Fault> {
        while let Some(block) = needed.pop_first() {
            if self.blocks.contains_key(&block) {
                continue;
            }
            let run = room.take(1)?;
            ledger.add(run)?;
            self.blocks.insert(block, run.start);
            needed.insert(run.start.0 / self.width.per_block(self.geometry));
        }
        Ok(())
    }

    fn table_clusters(&self) -> Result<u64, Fault> {
        let last = self.blocks.last_key_value().map_or(0, |(last, _)| *last);
        let (bytes, limit) = ((last + 1) * 8, MAX_REFCOUNT_TABLE_BYTES);
        if bytes > limit {
            let table = TableKind::RefcountTable;
            return Err(Fault::Unsupported(Feature::TableTooLarge { table, bytes, limit }));
        }
        Ok(self.geometry.clusters(bytes))
    }

    /// The entries of the table.
    pub(super) fn table_entries(&self) -> Vec<u64> {
        let mut entries = vec![0; index(self.table.count * self.geometry.bytes() / 8)];
        for (block, cluster) in &self.blocks {
            if let Some(entry) = entries.get_mut(index(*block)) {
                *entry = self.geometry.host_offset(*cluster).0;
            }
        }
        entries
    }

    /// The blocks, by index, and where they go.
    pub(super) fn blocks(&self) -> impl Iterator<Item = (u64, HostCluster)> + '_ {
        self.blocks.iter().map(|(block, cluster)| (*block, *cluster))
    }

    /// The bytes of a block.
    ///
    /// # Errors
    /// [`Feature::RefcountTooNarrow`].
    pub(super) fn encode(&self, block: u64, ledger: &Ledger) -> Result<Vec<u8>, Fault> {
        let per_block = self.width.per_block(self.geometry);
        let first = block * per_block;
        let mut bytes = vec![0; index(self.geometry.bytes())];
        for (cluster, count) in ledger.between(HostCluster(first), HostCluster(first + per_block)) {
            if !self.width.set(&mut bytes, cluster.0 - first, count) {
                let bits = 1 << self.width.order();
                let feature = Feature::RefcountTooNarrow { bits, needed: count };
                return Err(Fault::Unsupported(feature));
            }
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::tally::Counts;

    proptest! {
        #[test] // Whatever is referenced, the new refcounts count it and themselves.
        fn refcounts_count_themselves(
            runs in prop::collection::vec((0u64..6000, 1u64..600), 1..8),
            order in 0u32..=6,
            bits in 9u32..=12,
        ) {
            let geometry = ClusterGeometry::new(bits).unwrap();
            let width = RefcountWidth::new(order).unwrap();
            let mut present = Counts::default();
            present.add(Run::one(HostCluster(0)), 1).unwrap();
            for (start, count) in runs {
                for cluster in start..start + count {
                    if present.get(HostCluster(cluster)) == 0 {
                        present.add(Run::one(HostCluster(cluster)), 1).unwrap();
                    }
                }
            }
            let mut room = Room::beside(geometry, &present);
            let mut again = Counts::default();
            for (cluster, count) in present.iter() {
                again.add(Run::one(cluster), count).unwrap();
            }
            let mut ledger = Ledger::new(again);
            let made = NewRefcounts::lay_out(geometry, width, &mut ledger, &mut room).unwrap();
            let entries = made.table_entries();
            let mut total = 0;
            for (block, place) in made.blocks() {
                prop_assert_eq!(entries[index(block)], geometry.host_offset(place).0);
                prop_assert_eq!(present.get(place), 0);
                let bytes = made.encode(block, &ledger).unwrap();
                for slot in 0..width.per_block(geometry) {
                    let count = width.get(&bytes, slot);
                    let cluster = HostCluster(block * width.per_block(geometry) + slot);
                    prop_assert_eq!(count, ledger.get(cluster));
                    prop_assert!(count <= 1);
                    total += count;
                }
            }
            let used = present.iter().count() as u64 + made.table.count + made.blocks().count() as u64;
            prop_assert_eq!(total, used);
        }
    }

    #[test]
    fn a_count_that_does_not_fit_is_refused() {
        let geometry = ClusterGeometry::of_bytes(512).unwrap();
        let mut present = Counts::default();
        present.add(Run::one(HostCluster(0)), 1).unwrap();
        present.add(Run::one(HostCluster(1)), 4).unwrap();
        let mut room = Room::beside(geometry, &present);
        let mut ledger = Ledger::new(present);
        let width = RefcountWidth::new(1).unwrap();
        let made = NewRefcounts::lay_out(geometry, width, &mut ledger, &mut room).unwrap();
        let refused = made.encode(0, &ledger).unwrap_err();
        assert_eq!(refused, Fault::Unsupported(Feature::RefcountTooNarrow { bits: 2, needed: 4 }));
    }
}
