//! Taking and giving back host clusters: contiguous runs at the end of the file first of all, holes that are known
//! otherwise. Order on disk is not decided here: a cluster whose reference is still on disk never gets this far.

use crate::core::Core;
use crate::error::{Corruption, Fault, Feature, TableKind};
use crate::header::MAX_REFCOUNT_TABLE_BYTES;
use crate::mapping::{Step, Table};
use crate::refcount::BlockState;
use crate::units::{HOST_OFFSET_END, HostCluster, Run};

/// How many runs of clusters that were freed are remembered: the file is cut off before them when it is closed.
const MAX_FREED_RUNS: usize = 1 << 16;
/// Spare entries in a refcount table that had to grow, in blocks.
const TABLE_SLACK: u64 = 16;

impl Core {
    /// Finds the end of what is used, from the last refcount block backwards. Needed once, before the first
    /// reservation.
    pub(crate) fn find_end(&mut self) -> Result<Step<()>, Fault> {
        // What says that it lies behind the end of the file is kept free there, and does not move the end.
        if let Step::Load(table) = self.check_counted()? {
            return Ok(Step::Load(table));
        }
        let floor = self.fixed.end().min(self.geometry.clusters(self.capacity_bytes));
        let floor = floor.max(self.refs.table_run().end().0);
        let mut next = self.refs.last_block();
        let mut end = floor;
        while let Some(block) = next {
            match self.refs.state(block)? {
                BlockState::Unloaded(at) => return Ok(Step::Load(Table::Refcounts { block, at })),
                BlockState::Absent => {}
                BlockState::Loaded => {
                    let first = block * self.refs.per_block();
                    let last = first + self.refs.per_block();
                    let mut used = None;
                    for cluster in (first..last).rev() {
                        if self.refs.get(HostCluster(cluster))? != Some(0) {
                            used = Some(cluster);
                            break;
                        }
                    }
                    if let Some(used) = used {
                        end = end.max(used + 1);
                        break;
                    }
                }
            }
            next = block.checked_sub(1);
        }
        self.end = end;
        if let Some(block) = self.refs.last_block() {
            self.collect_free(block);
        }
        Ok(Step::Ready(()))
    }

    /// Refuses an image whose header, L1 table or refcount table count as free: what is written next would overwrite
    /// them, and much else.
    fn check_counted(&self) -> Result<Step<()>, Fault> {
        let in_file = self.geometry.clusters(self.capacity_bytes);
        let table = self.refs.table_run();
        let tables = table.clusters().map(|cluster| cluster.0);
        for cluster in self.fixed.clusters().chain(tables).filter(|at| *at < in_file) {
            let cluster = HostCluster(cluster);
            match self.refs.peek(cluster) {
                Some(1..) => continue,
                Some(0) => {}
                None => {
                    let block = self.refs.block_of(cluster);
                    if let BlockState::Unloaded(at) = self.refs.state(block)? {
                        return Ok(Step::Load(Table::Refcounts { block, at }));
                    }
                }
            }
            let host = self.geometry.host_offset(cluster);
            return Err(Fault::Corrupt { at: host, what: Corruption::NotCounted { host } });
        }
        Ok(Step::Ready(()))
    }

    /// Takes `count` clusters in one run: their refcounts are 1 from now on. What the caller does not publish it gives
    /// back with [`Core::give_back`]. Says whether the run was never written.
    pub(crate) fn reserve(&mut self, count: u64) -> Result<Step<(Run, bool)>, Fault> {
        self.settle_loaded()?;
        while let Some(run) = self.free.find(count) {
            match self.reserve_hole(run)? {
                Step::Ready(None) => {}
                Step::Ready(Some(found)) => return Ok(Step::Ready(found)),
                Step::Load(table) => return Ok(Step::Load(table)),
                Step::Grow(to) => return Ok(Step::Grow(to)),
            }
        }
        if let Some(table) = self.next_to_look_at() {
            return Ok(Step::Load(table));
        }
        loop {
            let Some(layout) = (match self.layout(count)? {
                Step::Ready(layout) => layout,
                Step::Load(table) => return Ok(Step::Load(table)),
                Step::Grow(to) => return Ok(Step::Grow(to)),
            }) else {
                continue;
            };
            return Ok(Step::Ready(self.append(&layout)));
        }
    }

    /// The next refcount block that may know of holes which earlier sessions have left: one for each time that the file
    /// grew. What is found in it is known once it is loaded.
    fn next_to_look_at(&mut self) -> Option<Table> {
        if !std::mem::take(&mut self.may_look) {
            return None;
        }
        while self.looked_at < self.refs.table_entries() {
            let block = self.looked_at;
            self.looked_at += 1;
            if let Ok(BlockState::Unloaded(at)) = self.refs.state(block) {
                let table = Table::Refcounts { block, at };
                return self.check_table(table).is_ok().then_some(table);
            }
        }
        None
    }

    /// Takes a run that is said to be free. `None`: some of it was not, and is no longer said to be.
    fn reserve_hole(&mut self, run: Run) -> Result<Step<Option<(Run, bool)>>, Fault> {
        let mut fits = true;
        for cluster in run.clusters() {
            match self.refs.get(cluster)? {
                Some(0) if !self.is_taken(Run::one(cluster)) => {}
                Some(_) => {
                    fits = false;
                    self.free.remove(Run::one(cluster));
                }
                None => {
                    let block = self.refs.block_of(cluster);
                    let BlockState::Unloaded(at) = self.refs.state(block)? else { continue };
                    return Ok(Step::Load(Table::Refcounts { block, at }));
                }
            }
        }
        if !fits {
            return Ok(Step::Ready(None));
        }
        for cluster in run.clusters() {
            self.refs.set(cluster, 1);
        }
        self.free.remove(run);
        self.freed.remove(run);
        let virgin = run.start.0 >= self.virgin_floor;
        self.virgin_floor = self.virgin_floor.max(run.end().0);
        Ok(Step::Ready(Some((run, virgin))))
    }

    /// Plans an append: new refcount blocks, then a moved refcount table, then the run. `None`: the end moved, again.
    fn layout(&mut self, count: u64) -> Result<Step<Option<Layout>>, Fault> {
        let per_block = self.refs.per_block();
        let mut layout = Layout { start: self.end, blocks: Vec::new(), table: 0, count };
        loop {
            let last = (layout.end() - 1) / per_block;
            let table = self.table_clusters_for(last)?;
            let blocks = self.missing_blocks(layout.start / per_block, last)?;
            let blocks = match blocks {
                Step::Ready(blocks) => blocks,
                Step::Load(table) => return Ok(Step::Load(table)),
                Step::Grow(to) => return Ok(Step::Grow(to)),
            };
            if table == layout.table && blocks.len() == layout.blocks.len() {
                layout.blocks = blocks;
                break;
            }
            layout.table = layout.table.max(table);
            layout.blocks = blocks;
        }
        for cluster in (layout.start..layout.end()).rev() {
            let free = self.refs.get(HostCluster(cluster))? == Some(0);
            if !free || self.is_taken(Run::one(HostCluster(cluster))) {
                self.end = self.fixed.end_of(HostCluster(cluster)).unwrap_or(cluster + 1);
                return Ok(Step::Ready(None));
            }
        }
        let bytes = layout.end().saturating_mul(self.geometry.bytes());
        if bytes > HOST_OFFSET_END {
            return Err(Fault::Unsupported(Feature::FileTooLarge { bytes }));
        }
        if bytes > self.capacity_bytes {
            return Ok(Step::Grow(bytes));
        }
        Ok(Step::Ready(Some(layout)))
    }

    /// The clusters of a refcount table that covers block `last`; 0 where the present one does.
    fn table_clusters_for(&self, last: u64) -> Result<u64, Fault> {
        if last < self.refs.table_entries() {
            return Ok(0);
        }
        let clusters = self.geometry.clusters((last + TABLE_SLACK) * 8);
        let clusters = clusters.max(self.refs.table_run().count * 2);
        let limit = MAX_REFCOUNT_TABLE_BYTES;
        let clusters = clusters.min(limit / self.geometry.bytes());
        if clusters * self.geometry.bytes() / 8 <= last {
            return Err(Fault::Unsupported(Feature::TableTooLarge {
                table: TableKind::RefcountTable,
                bytes: (last + 1) * 8,
                limit,
            }));
        }
        Ok(clusters)
    }

    fn missing_blocks(&self, first: u64, last: u64) -> Result<Step<Vec<u64>>, Fault> {
        let mut missing = Vec::new();
        for block in first..=last {
            match self.refs.state(block)? {
                BlockState::Absent => missing.push(block),
                BlockState::Unloaded(at) => return Ok(Step::Load(Table::Refcounts { block, at })),
                BlockState::Loaded => {}
            }
        }
        Ok(Step::Ready(missing))
    }

    fn append(&mut self, layout: &Layout) -> (Run, bool) {
        self.may_look = true;
        let table_start = layout.start + layout.blocks.len() as u64;
        if layout.table > 0 {
            let to = Run { start: HostCluster(table_start), count: layout.table };
            self.refs.move_table(to);
        }
        for (block, cluster) in layout.blocks.iter().zip(layout.start..) {
            self.refs.insert_new(*block, HostCluster(cluster));
            self.tables.insert(HostCluster(cluster));
        }
        for cluster in layout.start..layout.end() {
            self.refs.set(HostCluster(cluster), 1);
        }
        let run = Run { start: HostCluster(table_start + layout.table), count: layout.count };
        let virgin = run.start.0 >= self.virgin_floor;
        self.freed
            .remove(Run { start: HostCluster(layout.start), count: layout.end() - layout.start });
        self.end = layout.end();
        self.virgin_floor = self.virgin_floor.max(self.end);
        (run, virgin)
    }

    /// Gives back clusters that were reserved and never published.
    pub(crate) fn give_back(&mut self, runs: &[Run]) {
        self.ready.extend_from_slice(runs);
    }

    /// Notes that a reference to a cluster is gone in memory.
    pub(crate) fn drop_reference(&mut self, cluster: HostCluster) {
        match self.dropped.last_mut() {
            Some(last) if last.end() == cluster => last.count += 1,
            _ => self.dropped.push(Run::one(cluster)),
        }
    }

    /// Frees what may be freed and whose refcounts are in memory. Never asks for anything.
    fn settle_loaded(&mut self) -> Result<(), Fault> {
        for run in std::mem::take(&mut self.ready) {
            let mut rest = run;
            while rest.count > 0 {
                let cluster = rest.start;
                if self.refs.get(cluster)?.is_none() {
                    self.ready.push(rest);
                    break;
                }
                if self.decrement(cluster)? {
                    self.release(&[Run::one(cluster)]);
                }
                rest = Run { start: HostCluster(cluster.0 + 1), count: rest.count - 1 };
            }
        }
        Ok(())
    }

    /// Frees all that may be freed, loading the refcounts that it takes.
    pub(crate) fn settle(&mut self) -> Result<Step<()>, Fault> {
        self.settle_loaded()?;
        let Some(run) = self.ready.first() else { return Ok(Step::Ready(())) };
        self.load_refcounts(run.start)
    }

    /// Drops one reference to each cluster of `run`, whose references on disk are gone. Gives the clusters that nobody
    /// uses now; they may be taken only after [`Core::release`].
    pub(crate) fn drop_run(&mut self, run: Run) -> Result<Step<Vec<Run>>, Fault> {
        for cluster in run.clusters() {
            if self.refs.get(cluster)?.is_none() {
                return Ok(crate::mapping::forward(self.load_refcounts(cluster)?));
            }
        }
        let mut unused: Vec<Run> = Vec::new();
        for cluster in run.clusters() {
            if !self.decrement(cluster)? {
                continue;
            }
            match unused.last_mut() {
                Some(last) if last.end() == cluster => last.count += 1,
                _ => unused.push(Run::one(cluster)),
            }
        }
        Ok(Step::Ready(unused))
    }

    /// Clusters with refcount 0 may be taken from now on.
    pub(crate) fn release(&mut self, runs: &[Run]) {
        for run in runs {
            self.free.insert(*run);
            if self.freed.len() < MAX_FREED_RUNS {
                self.freed.push(*run);
            }
        }
        let last = HostCluster(self.geometry.clusters(self.kept_bytes).saturating_sub(1));
        if let Some(start) = self.freed.start_of(last) {
            self.kept_bytes = self.kept_bytes.min(start.saturating_mul(self.geometry.bytes()));
        }
        while let Some(last) = self.free.take_ending_at(self.end) {
            self.end = last.start.0;
        }
    }

    fn load_refcounts(&mut self, cluster: HostCluster) -> Result<Step<()>, Fault> {
        let block = self.refs.block_of(cluster);
        Ok(match self.refs.state(block)? {
            BlockState::Unloaded(at) => Step::Load(Table::Refcounts { block, at }),
            BlockState::Absent | BlockState::Loaded => Step::Ready(()),
        })
    }

    /// Drops one reference. Says whether it was the last.
    fn decrement(&mut self, cluster: HostCluster) -> Result<bool, Fault> {
        match self.refs.get(cluster)? {
            Some(count @ 1..) => {
                self.refs.set(cluster, count - 1);
                if count == 1 {
                    self.close_packing(cluster);
                }
                Ok(count == 1)
            }
            // The image counted wrong before us. Not reusing the cluster is the safe side.
            _ => {
                tracing::warn!(cluster = cluster.0, "a cluster in use had no refcount");
                Ok(false)
            }
        }
    }

    /// Remembers the clusters of a block in memory that nobody uses.
    pub(crate) fn collect_free(&mut self, block: u64) {
        let first = block * self.refs.per_block();
        let last = (first + self.refs.per_block()).min(self.end);
        let mut hole: Option<Run> = None;
        for cluster in (first..last).map(HostCluster) {
            let unused =
                matches!(self.refs.get(cluster), Ok(Some(0))) && !self.is_taken(Run::one(cluster));
            hole = match (hole, unused) {
                (Some(hole), true) => Some(Run { count: hole.count + 1, ..hole }),
                (None, true) => Some(Run::one(cluster)),
                (Some(hole), false) => {
                    self.free.insert(hole);
                    None
                }
                (None, false) => None,
            };
        }
        if let Some(hole) = hole {
            self.free.insert(hole);
        }
    }
}

/// Clusters at the end of the file: refcount blocks, a refcount table, then the run.
#[derive(Debug)]
struct Layout {
    start: u64,
    /// The blocks that are new, by index.
    blocks: Vec<u64>,
    /// The clusters of a refcount table that moves here; 0 where it does not.
    table: u64,
    count: u64,
}

impl Layout {
    fn end(&self) -> u64 {
        self.start + self.blocks.len() as u64 + self.table + self.count
    }
}
