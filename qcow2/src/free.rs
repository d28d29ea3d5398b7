//! The set of host clusters that are known to be free, as runs. Whether a cluster may be put here is decided by
//! whoever knows the refcounts.

use std::collections::{BTreeMap, BTreeSet};

use crate::units::{HostCluster, Run};

/// The most runs that are remembered. Beyond it free clusters stay unused until the image is opened again.
const MAX_RUNS: usize = 1 << 16;

/// Free clusters, as disjoint runs that do not touch.
#[derive(Debug, Default)]
pub(crate) struct FreeRuns {
    /// Length by start.
    runs: BTreeMap<u64, u64>,
    /// The same as length and start.
    by_len: BTreeSet<(u64, u64)>,
}

impl FreeRuns {
    /// Adds a run; what is there already stays.
    pub(crate) fn insert(&mut self, run: Run) {
        let (mut start, mut end) = (run.start.0, run.end().0);
        if let Some((before, len)) = self.runs.range(..=start).next_back().map(|(s, l)| (*s, *l))
            && before + len >= start
        {
            start = before;
            end = end.max(before + len);
        }
        while let Some((next, len)) = self.runs.range(start..=end).next().map(|(s, l)| (*s, *l)) {
            self.take(next, len);
            end = end.max(next + len);
        }
        if self.runs.len() < MAX_RUNS {
            self.put(start, end - start);
        }
    }

    fn put(&mut self, start: u64, len: u64) {
        self.runs.insert(start, len);
        self.by_len.insert((len, start));
    }

    fn take(&mut self, start: u64, len: u64) {
        self.runs.remove(&start);
        self.by_len.remove(&(len, start));
    }

    /// The start of the shortest run with at least `count` clusters, and the first of those. It stays in the set.
    pub(crate) fn find(&self, count: u64) -> Option<Run> {
        let (_, start) = self.by_len.range((count, 0)..).next()?;
        Some(Run { start: HostCluster(*start), count })
    }

    /// Takes the clusters of a run out, as far as they are in.
    pub(crate) fn remove(&mut self, run: Run) {
        let (start, end) = (run.start.0, run.end().0);
        loop {
            let found = self.runs.range(..end).next_back().map(|(s, l)| (*s, s + l));
            let Some((from, to)) = found.filter(|(_, to)| *to > start) else { return };
            self.take(from, to - from);
            if to > end {
                self.put(end, to - end);
            }
            if from < start {
                self.put(from, start - from);
            }
        }
    }

    /// Takes out the run that ends at `end`.
    pub(crate) fn take_ending_at(&mut self, end: u64) -> Option<Run> {
        let (start, len) = self.runs.range(..end).next_back().map(|(s, l)| (*s, *l))?;
        if start + len != end {
            return None;
        }
        self.take(start, len);
        Some(Run { start: HostCluster(start), count: len })
    }

    #[cfg(test)]
    pub(crate) fn count(&self) -> u64 {
        self.runs.values().sum()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn run(start: u64, count: u64) -> Run {
        Run { start: HostCluster(start), count }
    }

    #[test]
    fn neighbours_become_one_run() {
        let mut free = FreeRuns::default();
        free.insert(run(10, 2));
        free.insert(run(14, 2));
        assert_eq!(free.find(3), None);
        free.insert(run(12, 2));
        assert_eq!(free.find(5), Some(run(10, 5)));
        assert_eq!(free.take_ending_at(16), Some(run(10, 6)));
        assert_eq!(free.count(), 0);
    }

    proptest! {
        #[test]
        fn free_runs_are_a_set(ops in prop::collection::vec((any::<bool>(), 0u64..64, 1u64..9), 1..60)) {
            let (mut free, mut model) = (FreeRuns::default(), BTreeSet::new());
            for (insert, start, count) in ops {
                if insert {
                    free.insert(run(start, count));
                    model.extend(start..start + count);
                } else {
                    free.remove(run(start, count));
                    model.retain(|at| !(start..start + count).contains(at));
                }
                let runs: Vec<_> = free.runs.iter().flat_map(|(s, l)| *s..s + l).collect();
                prop_assert_eq!(runs, model.iter().copied().collect::<Vec<_>>());
                let by_len: BTreeSet<_> = free.runs.iter().map(|(start, len)| (*len, *start)).collect();
                prop_assert_eq!(&free.by_len, &by_len);
                let longest = by_len.last().map_or(0, |(len, _)| *len);
                prop_assert_eq!(free.find(longest + 1), None);
                prop_assert_eq!(free.find(longest.max(1)).is_some(), longest > 0);
            }
        }
    }
}
