//! The order in which metadata reaches the disk: what nothing points at yet, a sync, what links it, a sync, what points
//! at it, a sync. The core says what; when and how it is written is the driver's.

use crate::core::Core;
use crate::header::Header;
use crate::mapping::CapturedMapping;
use crate::refcount::{CapturedRefcounts, MetaWrite};
use crate::units::{ClusterGeometry, HostOffset, Run};

/// The writes of one flush, in three stages with a sync behind each that is not empty.
#[derive(Debug, Default)]
pub struct FlushPlan {
    /// Refcount blocks, new L2 tables, a refcount table that moved: nothing on disk points there yet, or it only
    /// counts higher. Data is made durable by the same sync.
    pub first: Vec<MetaWrite>,
    /// What makes refcount blocks count: entries of the refcount table, or the header.
    pub link: Vec<MetaWrite>,
    /// L2 entries in place and L1 entries.
    pub last: Vec<MetaWrite>,
    /// Where the last cluster ends that an entry may name, in bytes: the file has to reach there before one does, even
    /// where nothing was written to it.
    pub end_bytes: u64,
}

/// The stage that a flush had begun with when it was given up: what of it may be on disk, in any order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reached {
    /// [`FlushPlan::first`].
    #[default]
    First,
    /// [`FlushPlan::link`].
    Link,
    /// [`FlushPlan::last`].
    Last,
}

/// What a flush took out of the core, to be confirmed or given back.
#[derive(Debug, Default)]
pub struct Captured {
    map: CapturedMapping,
    refs: CapturedRefcounts,
    /// Where the header is to find the refcount table, if elsewhere than before.
    moved: Option<Run>,
    dropped: Vec<Run>,
}

impl Core {
    /// Whether anything but guest data waits to be written, or space to be freed.
    pub(crate) fn is_dirty(&self) -> bool {
        self.map.is_dirty() || self.refs.is_dirty() || !self.dropped.is_empty()
    }

    /// Takes what is to be written, consistent in itself: every entry taken points at something whose refcount is
    /// taken too, or was before.
    pub(crate) fn capture(&mut self) -> (FlushPlan, Captured) {
        let (mut first, mut link, refs) = self.refs.capture();
        let (tables, mut last, map) = self.map.capture();
        first.extend(tables);
        let moved = (!refs.left.is_empty()).then(|| self.refs.table_run());
        if let Some(run) = moved {
            // Not in memory yet: whoever writes the header before this has landed must not name a table that is not
            // there.
            let mut header = self.header.clone();
            move_table(&mut header, self.geometry, run);
            link.push(MetaWrite { at: HostOffset(0), bytes: header.sector() });
        }
        for writes in [&mut first, &mut link] {
            writes.sort_unstable_by_key(|write| write.at);
        }
        if self.header.is_dirty() {
            // After a crash all refcounts are counted anew: they need not be there before what relies on them.
            last.append(&mut link);
        }
        let dropped = std::mem::take(&mut self.dropped);
        let end_bytes = self.end_bytes();
        (FlushPlan { first, link, last, end_bytes }, Captured { map, refs, moved, dropped })
    }

    /// All of a plan is durable. Gives the runs whose references are gone, which have to be dropped once each.
    pub(crate) fn landed(&mut self, captured: Captured) -> Vec<Run> {
        self.map.landed(&captured.map);
        self.refs.landed(&captured.refs);
        if let Some(run) = captured.moved {
            move_table(&mut self.header, self.geometry, run);
        }
        let mut gone = captured.dropped;
        gone.extend(captured.refs.left);
        gone
    }

    /// A plan was given up half-way: all of it has to be written again. What may have been linked by now is no longer
    /// new: others must be durable before it names them.
    pub(crate) fn revert(&mut self, mut captured: Captured, reached: Reached) {
        self.map.revert(&mut captured.map, reached >= Reached::Last);
        self.refs.revert(&mut captured.refs, reached >= Reached::Link);
        self.dropped.append(&mut captured.dropped);
    }
}

fn move_table(header: &mut Header, geometry: ClusterGeometry, run: Run) {
    let clusters = u32::try_from(run.count).unwrap_or(u32::MAX);
    header.move_refcount_table(geometry.host_offset(run.start), clusters);
}
