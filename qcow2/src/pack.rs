//! Places for compressed clusters: streams lie one behind the other, and several share a host cluster, whose refcount
//! says how many. Compressing and writing them is the driver's business.

use crate::core::Core;
use crate::entry::{L2Entry, Stream};
use crate::error::{Fault, Feature};
use crate::mapping::{Step, Table};
use crate::plan::{Link, Reservation};
use crate::refcount::BlockState;
use crate::units::{ClusterGeometry, HostCluster, HostOffset, Run, SECTOR_BYTES, index};

/// Where some streams go, with one write for all of them.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct StreamPlan {
    /// Where each starts, in order.
    pub places: Vec<HostOffset>,
    /// The end of the last, rounded up to a sector: what is behind the stream belongs to nobody else.
    pub end: HostOffset,
    /// The entries that name them. It reserves nothing itself.
    pub reservation: Reservation,
    /// The host clusters that each stream touches. Each is counted once in all of them.
    pub touched: Vec<Run>,
}

/// Streams laid out behind each other from somewhere in a host cluster on.
#[derive(Debug, PartialEq, Eq)]
struct Layout {
    /// The start of each, in bytes from the start of the first host cluster.
    starts: Vec<u64>,
    end: u64,
    /// The refcounts of the host clusters, the first one's own included.
    counts: Vec<u64>,
}

/// A host cluster that is not full.
#[derive(Clone, Copy, Debug)]
struct OpenCluster {
    cluster: HostCluster,
    /// The bytes that are taken.
    used: u64,
    /// Its refcount.
    count: u64,
}

impl Layout {
    /// Lays out streams of `lens` bytes from `start` bytes into a cluster on that has `count` references, where a
    /// cluster can have `most`.
    fn new(geometry: ClusterGeometry, lens: &[u64], start: u64, count: u64, most: u64) -> Self {
        let cluster = geometry.bytes();
        let mut layout = Self { starts: Vec::new(), end: start, counts: vec![count] };
        for len in lens {
            let here = layout.end / cluster;
            let is_full = layout.counts.get(index(here)) == Some(&most);
            let at = if is_full { (here + 1) * cluster } else { layout.end };
            layout.starts.push(at);
            layout.end = at + len;
            for touched in at / cluster..=(layout.end.max(at + 1) - 1) / cluster {
                let touched = index(touched);
                if touched >= layout.counts.len() {
                    layout.counts.resize(touched + 1, 0);
                }
                layout.counts[touched] += 1;
            }
        }
        layout
    }
}

impl Core {
    /// Plans streams for clusters of L2 table `l1`, which are locked exclusively: `streams` are the indices in the
    /// table and the lengths in bytes.
    ///
    /// All of them lie in one range of the file, which begins on a sector. So no sector holds bytes of two plans, and
    /// what a crash tears while one is written belongs to that one alone: streams that a flush has made durable are not
    /// touched again. (Where the device's blocks are larger, their other bytes are written as they were.)
    pub(crate) fn plan_streams(
        &mut self,
        l1: u64,
        streams: &[(u64, u64)],
    ) -> Result<Step<StreamPlan>, Fault> {
        match self.own_table(l1)? {
            Step::Ready(()) => {}
            Step::Load(table) => return Ok(Step::Load(table)),
            Step::Grow(to) => return Ok(Step::Grow(to)),
        }
        let mut drops = Vec::new();
        for (l2, _) in streams {
            drops.push(self.stored(l1, *l2)?.drops);
        }
        let lens: Vec<u64> = streams.iter().map(|(_, len)| *len).collect();
        let (places, end) = match self.pack(&lens)? {
            Step::Ready(packed) => packed,
            Step::Load(table) => return Ok(Step::Load(table)),
            Step::Grow(to) => return Ok(Step::Grow(to)),
        };
        let (mut links, mut touched) = (Vec::new(), Vec::new());
        for (((l2, len), at), drops) in streams.iter().zip(&places).zip(drops) {
            // Entries count sectors, so that the length goes up to the end of one.
            let len = (at.0 + len).next_multiple_of(SECTOR_BYTES) - at.0;
            let stream = Stream { at: *at, len };
            touched.push(stream.clusters(self.geometry));
            links.push(Link { l2: *l2, entry: L2Entry::Compressed(stream), drops });
        }
        self.map.pin(l1);
        let reservation = Reservation { l1, fresh: None, links };
        Ok(Step::Ready(StreamPlan { places, end, reservation, touched }))
    }

    /// Gives back what an unpublished plan held.
    pub(crate) fn undo_streams(&mut self, plan: &StreamPlan) {
        self.give_back(&plan.touched);
        self.undo(&plan.reservation);
    }

    /// Finds room for streams, and counts them in the clusters that they touch.
    fn pack(&mut self, lens: &[u64]) -> Result<Step<(Vec<HostOffset>, HostOffset)>, Fault> {
        let most = self.refs.width().max();
        let open = match self.open_cluster()? {
            Step::Ready(open) => open,
            Step::Load(table) => return Ok(Step::Load(table)),
            Step::Grow(to) => return Ok(Step::Grow(to)),
        };
        let behind = open.map(|open| {
            (open.cluster, Layout::new(self.geometry, lens, open.used, open.count, most))
        });
        if let Some((cluster, layout)) = &behind
            && layout.counts.len() == 1
        {
            return Ok(Step::Ready(self.take(*cluster, layout)));
        }
        let alone = Layout::new(self.geometry, lens, 0, 0, most);
        let (run, _) = match self.reserve(alone.counts.len() as u64)? {
            Step::Ready(fresh) => fresh,
            Step::Load(table) => return Ok(Step::Load(table)),
            Step::Grow(to) => return Ok(Step::Grow(to)),
        };
        let end = self.geometry.host_offset(run.end()).0;
        if end > self.map.format().stream_end() {
            self.give_back(&[run]);
            return Err(Fault::Unsupported(Feature::FileTooLarge { bytes: end }));
        }
        // What was reserved may lie right behind the open cluster, and then be one too many.
        let (first, layout) = match behind {
            Some((cluster, layout))
                if cluster.0 + 1 == run.start.0
                    && cluster.0 + layout.counts.len() as u64 <= run.end().0 =>
            {
                (cluster, layout)
            }
            _ => (run.start, alone),
        };
        let used = HostCluster(first.0 + layout.counts.len() as u64);
        if used < run.end() {
            self.give_back(&[Run { start: used, count: run.end().0 - used.0 }]);
        }
        Ok(Step::Ready(self.take(first, &layout)))
    }

    /// The half-filled cluster behind the last streams, where in it there is room, and its refcount.
    fn open_cluster(&mut self) -> Result<Step<Option<OpenCluster>>, Fault> {
        let Some(at) = self.packing else { return Ok(Step::Ready(None)) };
        let cluster = self.geometry.host_cluster(at);
        Ok(Step::Ready(match self.refs.get(cluster)? {
            Some(0) => None,
            Some(count) => {
                let used = at.0 % self.geometry.bytes();
                Some(OpenCluster { cluster, used, count })
            }
            None => {
                let block = self.refs.block_of(cluster);
                match self.refs.state(block)? {
                    BlockState::Unloaded(at) => {
                        return Ok(Step::Load(Table::Refcounts { block, at }));
                    }
                    BlockState::Absent | BlockState::Loaded => None,
                }
            }
        }))
    }

    /// Counts the streams of a layout from cluster `first` on; the next ones go behind them.
    fn take(&mut self, first: HostCluster, layout: &Layout) -> (Vec<HostOffset>, HostOffset) {
        for (cluster, count) in (first.0..).zip(&layout.counts) {
            self.refs.set(HostCluster(cluster), *count);
        }
        let start = self.geometry.host_offset(first).0;
        let places = layout.starts.iter().map(|at| HostOffset(start + at)).collect();
        let end = (start + layout.end).next_multiple_of(SECTOR_BYTES);
        self.packing = (!self.geometry.is_aligned(end)).then_some(HostOffset(end));
        (places, HostOffset(end))
    }

    /// A cluster that nobody uses any more is no place for further streams: somebody else may take it.
    pub(crate) fn close_packing(&mut self, unused: HostCluster) {
        if self.packing.is_some_and(|at| self.geometry.host_cluster(at) == unused) {
            self.packing = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn geometry(bits: u32) -> ClusterGeometry {
        ClusterGeometry::new(bits).unwrap()
    }

    #[test]
    fn streams_lie_one_behind_the_other_and_count_where_they_touch() {
        let layout = Layout::new(geometry(12), &[1000, 3000, 200, 4095], 512, 2, 100);
        assert_eq!(layout.starts, [512, 1512, 4512, 4712]);
        assert_eq!((layout.end, layout.counts), (8807, vec![4, 3, 1]));
    }

    #[test]
    fn a_cluster_whose_refcount_is_at_its_limit_takes_no_more() {
        let layout = Layout::new(geometry(12), &[1000, 100, 3000], 0, 0, 1);
        assert_eq!(layout.starts, [0, 4096, 8192]);
        assert_eq!(layout.counts, [1, 1, 1]);
        let layout = Layout::new(geometry(12), &[1000, 100], 512, 3, 3);
        assert_eq!((layout.starts, layout.counts), (vec![4096, 5096], vec![3, 2]));
    }

    proptest! {
        #[test]
        fn streams_never_overlap_and_never_count_too_much(
            lens in prop::collection::vec(1u64..4096, 1..40), start in 0u64..8, count in 1u64..5,
            order in 0u32..5,
        ) {
            let most = u64::MAX >> (64 - (1u32 << order));
            let (start, count) = (start * 512, count.min(most));
            let layout = Layout::new(geometry(12), &lens, start, count, most);
            let mut counts = vec![0; layout.counts.len()];
            counts[0] = count;
            let mut end = start;
            for (at, len) in layout.starts.iter().zip(&lens) {
                prop_assert!(*at >= end);
                end = at + len;
                for touched in at / 4096..=(end - 1) / 4096 {
                    counts[usize::try_from(touched).unwrap()] += 1;
                }
            }
            prop_assert_eq!(end, layout.end);
            prop_assert!(counts.iter().all(|count| *count <= most));
            prop_assert_eq!(counts, layout.counts);
        }
    }
}
