//! Where a new state of the metadata goes, and how often it references every cluster. Only clusters that the present
//! state does not reference are given out; nothing here does I/O.

use crate::error::{Fault, Feature};
use crate::free::FreeRuns;
use crate::tally::{Counts, MAX_COUNTS_BYTES, TooScattered};
use crate::units::{ClusterGeometry, HOST_OFFSET_END, HostCluster, Run};

/// Clusters that the present state does not reference.
#[derive(Debug)]
pub(super) struct Room {
    geometry: ClusterGeometry,
    free: FreeRuns,
    /// The cluster behind all that is referenced or given out.
    end: HostCluster,
}

impl Room {
    /// The room that the references of the present state leave.
    pub(super) fn beside(geometry: ClusterGeometry, present: &Counts) -> Self {
        // The header's cluster is never free.
        let (mut free, mut next) = (FreeRuns::default(), 1);
        for (cluster, _) in present.iter() {
            if cluster.0 > next {
                free.insert(Run { start: HostCluster(next), count: cluster.0 - next });
            }
            next = next.max(cluster.0 + 1);
        }
        Self { geometry, free, end: HostCluster(next) }
    }

    /// Takes `count` clusters in one run: a hole, or else behind the end.
    ///
    /// # Errors
    /// [`Feature::FileTooLarge`].
    pub(super) fn take(&mut self, count: u64) -> Result<Run, Fault> {
        if let Some(run) = self.free.find(count) {
            self.free.remove(run);
            return Ok(run);
        }
        let run = Run { start: self.end, count };
        let bytes = run.end().0.saturating_mul(self.geometry.bytes());
        if bytes > HOST_OFFSET_END {
            return Err(Fault::Unsupported(Feature::FileTooLarge { bytes }));
        }
        self.end = run.end();
        Ok(run)
    }

    /// The cluster behind all that is referenced or given out.
    pub(super) const fn end(&self) -> HostCluster {
        self.end
    }
}

/// The references of the new state, while it is being made.
#[derive(Debug)]
pub(super) struct Ledger {
    counts: Counts,
    /// References that were counted and do not remain.
    gone: Counts,
}

impl Ledger {
    /// Starts with the references that were counted.
    pub(super) fn new(counts: Counts) -> Self {
        Self { counts, gone: Counts::default() }
    }

    /// Adds a reference to each cluster of a run.
    pub(super) fn add(&mut self, run: Run) -> Result<(), Fault> {
        self.counts.add(run, 1).map_err(too_scattered)
    }

    /// Takes a reference from each cluster of a run.
    pub(super) fn remove(&mut self, run: Run) -> Result<(), Fault> {
        self.gone.add(run, 1).map_err(too_scattered)
    }

    /// Lets `times` references to one cluster go to another.
    pub(super) fn replace(
        &mut self,
        old: HostCluster,
        new: HostCluster,
        times: u64,
    ) -> Result<(), Fault> {
        self.counts.add(Run::one(new), times).map_err(too_scattered)?;
        self.gone.add(Run::one(old), times).map_err(too_scattered)
    }

    /// The references to a cluster.
    pub(super) fn get(&self, cluster: HostCluster) -> u64 {
        self.counts.get(cluster).saturating_sub(self.gone.get(cluster))
    }

    /// The clusters of a range that are referenced, in order, with their counts.
    pub(super) fn between(
        &self,
        start: HostCluster,
        end: HostCluster,
    ) -> impl Iterator<Item = (HostCluster, u64)> + '_ {
        let counts = self.counts.between(start, end);
        counts
            .map(|(cluster, count)| (cluster, count.saturating_sub(self.gone.get(cluster))))
            .filter(|(_, count)| *count > 0)
    }
}

fn too_scattered(_: TooScattered) -> Fault {
    Fault::Unsupported(Feature::ScatteredReferences { limit: MAX_COUNTS_BYTES })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_taken_from_holes_first_and_then_behind_the_end() {
        let geometry = ClusterGeometry::of_bytes(512).unwrap();
        let mut present = Counts::default();
        present.add(Run { start: HostCluster(0), count: 3 }, 1).unwrap();
        present.add(Run { start: HostCluster(5), count: 2 }, 1).unwrap();
        let mut room = Room::beside(geometry, &present);
        let mut take = |count| room.take(count).unwrap().start.0;
        assert_eq!([take(1), take(2), take(1), take(1)], [3, 7, 4, 9]);
        assert_eq!(room.end(), HostCluster(10));
        let most = HOST_OFFSET_END / 512;
        assert!(room.take(most).is_err());
    }

    #[test]
    fn a_ledger_knows_what_remains() {
        let mut counts = Counts::default();
        counts.add(Run { start: HostCluster(1), count: 3 }, 1).unwrap();
        let mut ledger = Ledger::new(counts);
        ledger.add(Run::one(HostCluster(2))).unwrap();
        ledger.remove(Run { start: HostCluster(1), count: 2 }).unwrap();
        let left: Vec<_> = ledger.between(HostCluster(0), HostCluster(9)).collect();
        assert_eq!(left, [(HostCluster(2), 1), (HostCluster(3), 1)]);
        assert_eq!(ledger.get(HostCluster(1)), 0);
    }
}
