//! Where metadata lives, and the refusal to let anything else be written there. Whether refcounts are exact is the
//! checker's question; here is asked only what can be answered from memory, before every write.

use std::collections::{BTreeMap, HashSet};

use crate::core::Core;
use crate::entry::{Cluster, L2Entry};
use crate::error::{Corruption, Fault, TableKind};
use crate::flush::FlushPlan;
use crate::mapping::{Step, Table};
use crate::refcount::{BlockState, MetaWrite};
use crate::units::{HostCluster, HostOffset, Run};

/// How many clusters that are used twice are remembered: only broken images have any.
const MAX_SHARED_CLUSTERS: usize = 1 << 16;

/// How many runs of clusters of bitmaps are remembered.
const MAX_BITMAP_RUNS: usize = 1 << 16;

/// A set of clusters, as runs.
#[derive(Clone, Debug, Default)]
pub(crate) struct RunSet {
    /// First cluster and end; disjoint.
    runs: BTreeMap<u64, u64>,
}

impl RunSet {
    /// Adds a run.
    pub(crate) fn push(&mut self, run: Run) {
        let (mut start, mut end) = (run.start.0, run.end().0);
        if start == end {
            return;
        }
        while let Some((first, last)) = self.touching(start, end) {
            self.runs.remove(&first);
            start = start.min(first);
            end = end.max(last);
        }
        self.runs.insert(start, end);
    }

    fn touching(&self, start: u64, end: u64) -> Option<(u64, u64)> {
        let (first, last) = self.runs.range(..=end).next_back()?;
        (*last >= start).then_some((*first, *last))
    }

    /// Takes the clusters of a run out.
    pub(crate) fn remove(&mut self, run: Run) {
        let (start, end) = (run.start.0, run.end().0);
        while let Some((first, last)) = self.runs.range(..end).next_back().map(|(s, e)| (*s, *e)) {
            if last <= start || run.count == 0 {
                return;
            }
            self.runs.remove(&first);
            if last > end {
                self.runs.insert(end, last);
            }
            if first < start {
                self.runs.insert(first, start);
            }
        }
    }

    /// Whether a cluster is in both.
    pub(crate) fn overlaps(&self, run: Run) -> bool {
        let before = self.runs.range(..run.end().0).next_back();
        before.is_some_and(|(_, end)| *end > run.start.0)
    }

    /// The cluster behind the run that a cluster is in.
    pub(crate) fn end_of(&self, cluster: HostCluster) -> Option<u64> {
        let (_, end) = self.runs.range(..=cluster.0).next_back()?;
        (*end > cluster.0).then_some(*end)
    }

    /// The first cluster of the run that a cluster is in.
    pub(crate) fn start_of(&self, cluster: HostCluster) -> Option<u64> {
        let (start, end) = self.runs.range(..=cluster.0).next_back()?;
        (*end > cluster.0).then_some(*start)
    }

    /// All clusters, in order.
    pub(crate) fn clusters(&self) -> impl Iterator<Item = u64> + '_ {
        self.runs.iter().flat_map(|(start, end)| *start..*end)
    }

    /// Of how many runs it consists.
    pub(crate) fn len(&self) -> usize {
        self.runs.len()
    }

    /// The cluster behind the last.
    pub(crate) fn end(&self) -> u64 {
        self.runs.last_key_value().map_or(0, |(_, end)| *end)
    }
}

/// The clusters of L2 tables and refcount blocks, and those among them that more than one entry points at or that lie
/// over other metadata.
#[derive(Debug, Default)]
pub(crate) struct Tables {
    clusters: HashSet<HostCluster>,
    doubtful: HashSet<HostCluster>,
}

impl Tables {
    pub(crate) fn insert(&mut self, cluster: HostCluster) {
        self.clusters.insert(cluster);
    }

    /// Takes out a table that is given up, unless somebody else may use it.
    pub(crate) fn remove(&mut self, cluster: HostCluster) {
        if !self.doubtful.contains(&cluster) {
            self.clusters.remove(&cluster);
        }
    }

    pub(crate) fn contains(&self, cluster: HostCluster) -> bool {
        self.clusters.contains(&cluster)
    }

    pub(crate) fn is_doubtful(&self, cluster: HostCluster) -> bool {
        self.doubtful.contains(&cluster)
    }

    fn found(&mut self, cluster: HostCluster, also_fixed: bool) {
        if !self.clusters.insert(cluster) || also_fixed {
            self.doubtful.insert(cluster);
        }
    }
}

impl Core {
    /// Notes where all L2 tables and refcount blocks lie, for writing.
    pub(crate) fn find_tables(&mut self) {
        let places: Vec<_> = self.map.table_places().chain(self.refs.block_places()).collect();
        for at in places {
            let cluster = self.geometry.host_cluster(at);
            let fixed = self.is_fixed(Run::one(cluster));
            self.tables.found(cluster, fixed);
        }
    }

    /// Refuses a table that does not lie in the file, or lies over other metadata.
    ///
    /// # Errors
    /// [`Corruption::BehindFile`], [`Corruption::OverlapsMetadata`].
    pub(crate) fn check_table(&self, table: Table) -> Result<(), Fault> {
        let (kind, at) = match table {
            Table::L2 { at, .. } => (TableKind::L1, at),
            Table::Refcounts { at, .. } => (TableKind::RefcountTable, at),
        };
        if at.0.checked_add(self.geometry.bytes()).is_none() || at.0 >= self.capacity_bytes {
            return Err(Fault::Corrupt {
                at,
                what: Corruption::BehindFile { table: kind, host: at },
            });
        }
        let cluster = self.geometry.host_cluster(at);
        // Refcounts are there for those who change them.
        let shared = kind == TableKind::RefcountTable && self.tables.is_doubtful(cluster);
        if self.is_fixed(Run::one(cluster)) || shared {
            let what = Corruption::OverlapsMetadata { table: kind, host: at };
            return Err(Fault::Corrupt { at, what });
        }
        Ok(())
    }

    /// Refuses clusters as a place of guest data that hold metadata, or data of two entries that both call it theirs:
    /// writing there would break the image.
    ///
    /// # Errors
    /// [`Corruption::OverlapsMetadata`], [`Corruption::UsedTwice`] for the L2 entry at `entry_at`.
    pub(crate) fn check_target(&self, run: Run, entry_at: HostOffset) -> Result<(), Fault> {
        if self.map.format().external_data {
            return Ok(());
        }
        let host = self.geometry.host_offset(run.start);
        let table = TableKind::L2;
        if self.is_taken(run) {
            let what = Corruption::OverlapsMetadata { table, host };
            return Err(Fault::Corrupt { at: entry_at, what });
        }
        if !self.used_twice.is_empty() && run.clusters().any(|at| self.used_twice.contains(&at)) {
            return Err(Fault::Corrupt {
                at: entry_at,
                what: Corruption::UsedTwice { table, host },
            });
        }
        Ok(())
    }

    /// Whether refcounts, as far as they are in memory, agree that clusters have one user each. With more they must not
    /// be written in place, whatever the entry says.
    ///
    /// # Errors
    /// [`Corruption::NotCounted`] for a cluster that the entry at `entry_at` uses and that counts as free.
    pub(crate) fn has_own_clusters(&self, run: Run, entry_at: HostOffset) -> Result<bool, Fault> {
        let mut own = true;
        // In a data file nothing is counted.
        for cluster in run.clusters().filter(|_| !self.map.format().external_data) {
            match self.refs.peek(cluster) {
                None if !self.refs.is_absent(cluster) => {}
                Some(1) => {}
                None | Some(0) => {
                    let host = self.geometry.host_offset(cluster);
                    let what = Corruption::NotCounted { host };
                    return Err(Fault::Corrupt { at: entry_at, what });
                }
                Some(_) => own = false,
            }
        }
        Ok(own)
    }

    /// Whether the L2 table at `at`, which L1 entry `l1` calls its own, has other users after all.
    ///
    /// # Errors
    /// [`Corruption::UsedTwice`] where it has and is not counted so: a copy would leave too few references to all that
    /// both point at.
    pub(crate) fn doubt(&mut self, l1: u64, at: HostOffset) -> Result<Step<bool>, Fault> {
        let cluster = self.geometry.host_cluster(at);
        if !self.tables.is_doubtful(cluster) {
            return Ok(Step::Ready(matches!(self.refs.peek(cluster), Some(2..))));
        }
        match self.refs.get(cluster)? {
            Some(2..) => Ok(Step::Ready(true)),
            Some(_) => {
                let what = Corruption::UsedTwice { table: TableKind::L1, host: at };
                Err(Fault::Corrupt { at: self.map.l1_entry_at(l1), what })
            }
            None => {
                let block = self.refs.block_of(cluster);
                Ok(match self.refs.state(block)? {
                    BlockState::Unloaded(at) => Step::Load(Table::Refcounts { block, at }),
                    BlockState::Absent | BlockState::Loaded => Step::Ready(false),
                })
            }
        }
    }

    /// Whether a run touches the header, a table of tables, an L2 table or a refcount block.
    pub(crate) fn is_metadata(&self, run: Run) -> bool {
        self.is_fixed(run) || run.clusters().any(|cluster| self.tables.contains(cluster))
    }

    /// Whether a run touches metadata or bitmaps: a wrong refcount must not make room of it.
    pub(crate) fn is_taken(&self, run: Run) -> bool {
        self.is_metadata(run) || self.bitmaps.overlaps(run)
    }

    /// Remembers clusters of bitmaps, up to [`MAX_BITMAP_RUNS`] runs; what is beyond has its refcounts alone.
    pub(crate) fn guard_bitmap(&mut self, run: Run) {
        if self.bitmaps.len() < MAX_BITMAP_RUNS {
            self.bitmaps.push(run);
        }
    }

    /// Whether a run touches metadata that never moves, or the refcount table.
    pub(crate) fn is_fixed(&self, run: Run) -> bool {
        self.fixed.overlaps(run) || self.refs.table_overlaps(run)
    }

    /// Remembers the clusters that two entries of a table in memory both call their own.
    pub(crate) fn note_used_twice(&mut self, l1: u64) {
        let own = |entry| match entry {
            Ok(L2Entry::Cluster(Cluster { host: Some(host), .. })) if host.exclusive => {
                Some(host.at)
            }
            _ => None,
        };
        let mut hosts: Vec<HostOffset> =
            (0..self.geometry.l2_entries()).filter_map(|l2| own(self.map.entry(l1, l2))).collect();
        if hosts.is_sorted_by(|one, next| one < next) {
            return;
        }
        hosts.sort_unstable();
        for pair in hosts.windows(2) {
            if pair[0] == pair[1] && self.used_twice.len() < MAX_SHARED_CLUSTERS {
                self.used_twice.insert(self.geometry.host_cluster(pair[0]));
            }
        }
    }

    /// The last look before metadata is written: every write of a flush goes where that kind of metadata lives.
    ///
    /// # Errors
    /// [`Corruption::OverlapsMetadata`] with the place of the write that does not.
    pub(crate) fn check_plan(&self, plan: &FlushPlan) -> Result<(), Fault> {
        let cluster = |write: &MetaWrite| self.geometry.host_cluster(write.at);
        let table = |write: &MetaWrite| {
            self.tables.contains(cluster(write)) && !self.is_fixed(Run::one(cluster(write)))
        };
        let refcounts = |write: &MetaWrite| self.refs.table_overlaps(Run::one(cluster(write)));
        let fixed = |write: &MetaWrite| self.fixed.overlaps(Run::one(cluster(write)));
        let first = plan.first.iter().find(|write| !table(write) && !refcounts(write));
        let link = plan.link.iter().find(|write| write.at.0 != 0 && !refcounts(write));
        // What links refcounts comes last where they may stay behind.
        let links = |write: &MetaWrite| self.header.is_dirty() && refcounts(write);
        let last = plan.last.iter().find(|write| !table(write) && !fixed(write) && !links(write));
        let Some(write) = first.or(link).or(last) else { return Ok(()) };
        let what = Corruption::OverlapsMetadata { table: TableKind::L1, host: write.at };
        Err(Fault::Corrupt { at: write.at, what })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_run_set_is_a_set(
            runs in prop::collection::vec((any::<bool>(), 0u64..64, 0u64..9), 0..30), ask in (0u64..64, 1u64..9),
        ) {
            let (mut set, mut model) = (RunSet::default(), BTreeSet::new());
            for (add, start, count) in &runs {
                let run = Run { start: HostCluster(*start), count: *count };
                if *add {
                    set.push(run);
                    model.extend(*start..start + count);
                } else {
                    set.remove(run);
                    model.retain(|at| !(*start..start + count).contains(at));
                }
            }
            let asked = Run { start: HostCluster(ask.0), count: ask.1 };
            prop_assert_eq!(set.overlaps(asked), model.range(ask.0..ask.0 + ask.1).next().is_some());
            let end_of = set.end_of(HostCluster(ask.0));
            let after = (ask.0..).find(|at| !model.contains(at));
            prop_assert_eq!(end_of, after.filter(|after| *after > ask.0));
            prop_assert_eq!(set.end(), model.last().map_or(0, |last| last + 1));
        }
    }
}
