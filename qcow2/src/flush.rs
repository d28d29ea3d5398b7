//! The order in which metadata reaches the disk: what nothing points at yet, a sync, what links it, a sync, what points
//! at it, a sync. The core says what; when and how it is written is the driver's.

use crate::core::Core;
use crate::mapping::CapturedMapping;
use crate::refcount::{CapturedRefcounts, MetaWrite};
use crate::units::{HostOffset, Run};

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
}

/// What a flush took out of the core, to be confirmed or given back.
#[derive(Debug, Default)]
pub struct Captured {
    map: CapturedMapping,
    refs: CapturedRefcounts,
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
        if !refs.left.is_empty() {
            let run = self.refs.table_run();
            let at = self.geometry.host_offset(run.start);
            let clusters = u32::try_from(run.count).unwrap_or(u32::MAX);
            self.header.move_refcount_table(at, clusters);
            link.push(MetaWrite { at: HostOffset(0), bytes: self.header.sector() });
        }
        for writes in [&mut first, &mut link] {
            writes.sort_unstable_by_key(|write| write.at);
        }
        if self.header.is_dirty() {
            // After a crash all refcounts are counted anew: they need not be there before what relies on them.
            last.append(&mut link);
        }
        let dropped = std::mem::take(&mut self.dropped);
        (FlushPlan { first, link, last }, Captured { map, refs, dropped })
    }

    /// All of a plan is durable. Gives the runs whose references are gone, which have to be dropped once each.
    pub(crate) fn landed(&mut self, captured: Captured) -> Vec<Run> {
        self.map.landed(&captured.map);
        self.refs.landed(&captured.refs);
        let mut gone = captured.dropped;
        gone.extend(captured.refs.left);
        gone
    }

    /// A plan was given up half-way: all of it has to be written again.
    pub(crate) fn revert(&mut self, mut captured: Captured) {
        self.map.revert(&mut captured.map);
        self.refs.revert(&mut captured.refs);
        self.dropped.append(&mut captured.dropped);
    }
}
