//! A new state of an image's metadata, written beside the present one and put in its place by one write of the
//! header's first sector. What the new state is to be is decided by its callers: snapshots, amending, shrinking.
//!
//! Refcounts of the new state are counted from all that it references, never carried over. Everything of it goes to
//! clusters that the present state does not reference, so that a crash before the switch leaves the present state as
//! it was, and one after it the new one. L2 tables are copied only where the COPIED flags in them have to change.

mod expand;
mod refcounts;
mod room;

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;

use block::{ByteRange, Hold, HostError, RangeGuard, try_join_all};
use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::OwnedMutexGuard;

use crate::check::find_miscount;
use crate::core::Core;
use crate::error::{Error, Fault};
use crate::fields::{COPIED, EntryFields, EntryKind, HOST_OFFSET, halves};
use crate::header::{Header, Stages};
use crate::image::{Inner, Live};
use crate::mapping::from_big_endian;
use crate::open::{load_core, read_header};
use crate::refcount::{RefcountWidth, big_endian};
use crate::snapshot::{self, SnapshotEntry};
use crate::snapshots::{SnapshotTable, read_snapshots};
use crate::switch::write_stages;
use crate::tally::{Counts, Finding, Roots, TablePlace, TableUse, Tally};
use crate::units::{ClusterGeometry, HostCluster, HostOffset, Run, index};
pub(crate) use expand::Expand;
use refcounts::NewRefcounts;
use room::{Ledger, Room};

/// The tables that are copied at once, in bytes and in number.
const BATCH_BYTES: u64 = 8 << 20;
const BATCH_TABLES: u64 = 64;
/// How often it is flushed at most until nothing is left to write.
const FLUSH_ROUNDS: usize = 8;
/// The unit in which hosts give space back, in bytes.
const HOST_BLOCK_BYTES: u64 = 4096;

/// What the metadata of an image is to become.
#[derive(Clone, Debug)]
pub(crate) struct NewState {
    /// The L1 table, present in the file, by which the disk is to be read. The flags in it and below it may be wrong.
    pub tree: TablePlace,
    /// The size of the disk in bytes. The new L1 table is as long as this or the tree need.
    pub size_bytes: u64,
    /// All snapshots. Their L1 tables are present in the file and stay where they are.
    pub snapshots: Vec<SnapshotEntry>,
    /// The width of the refcounts.
    pub width: RefcountWidth,
    /// What becomes of zero flags; `None` keeps them.
    pub expand: Option<Expand>,
    /// The header to begin with: the present one, or one with another version, other features, other extensions.
    pub header: Header,
}

/// The present state, as far as a new one has to know it.
pub(crate) struct Present {
    pub header: Header,
    pub snapshots: SnapshotTable,
    /// The length of the file.
    pub file_bytes: u64,
}

impl Present {
    /// The state that changes nothing. Snapshots tell the sizes of their disks in it, as a later size is not theirs.
    pub(crate) fn unchanged(&self) -> NewState {
        let size_bytes = self.header.size_bytes;
        let sized = |entry: &SnapshotEntry| SnapshotEntry {
            disk_bytes: Some(entry.disk_bytes.unwrap_or(size_bytes)),
            ..entry.clone()
        };
        NewState {
            tree: TablePlace { at: self.header.l1_at, entries: self.header.l1_entries },
            size_bytes,
            snapshots: self.snapshots.entries.iter().map(sized).collect(),
            width: RefcountWidth::new(self.header.refcount_order).unwrap_or(RefcountWidth::DEFAULT),
            expand: None,
            header: self.header.clone(),
        }
    }
}

/// An image that nobody uses but us. Every host operation of the new state holds it, so that nobody comes in before
/// the last of them has ended, even where our future was dropped.
pub(crate) struct Quiet {
    inner: Arc<Inner>,
    pub(crate) stage: Mutex<Stage>,
    _guard: RangeGuard,
    _gate: OwnedMutexGuard<()>,
}

/// How far it has come.
pub(crate) enum Stage {
    /// Clusters below this one may have been written.
    Building(HostCluster),
    /// The header may say either state.
    Switching,
    Done,
}

impl Drop for Quiet {
    fn drop(&mut self) {
        match std::mem::replace(self.stage.get_mut(), Stage::Done) {
            Stage::Building(end) => {
                let mut core = self.inner.core.lock();
                core.virgin_floor = core.virgin_floor.max(end.0);
            }
            Stage::Switching => {
                let file = self.inner.path.clone();
                self.inner.poison(Error::Abandoned { file });
            }
            Stage::Done => {}
        }
    }
}

impl Inner {
    /// Replaces the metadata by what `make` says, told the present state. Requests wait meanwhile and go on after.
    ///
    /// # Errors
    /// What `make` refuses. [`Error::Damaged`] where references of the present state cannot be counted, or are more than
    /// are counted in the image.
    /// [`Feature::RefcountTooNarrow`](crate::Feature::RefcountTooNarrow), [`Error::Host`]: nothing has changed then,
    /// and the image goes on. [`Error::Poisoned`] where the switch or what follows it failed.
    pub(crate) async fn republish(
        self: &Arc<Self>,
        make: impl FnOnce(&Present) -> Result<NewState, Error> + Send,
    ) -> Result<(), Error> {
        let (live, quiet) = self.quiet().await?;
        let hold: Hold = Some(Arc::clone(&quiet) as _);
        let header = self.core.lock().header.clone();
        let snapshots = read_snapshots(&live.file, &header).await?;
        let present = Present { header, snapshots, file_bytes: live.file.len() };
        let state = make(&present)?;
        let old = self.count_present(&live, &present.header).await?;
        let new = self.count(&live, &present.header, Some(&state)).await?;
        let (tables, mut ledger) = (new.tables, Ledger::new(new.counts));
        let geometry = present.header.geometry;
        // The L1 table of the tree was counted as the active one, which gets a new place.
        self.check(ledger.remove(table_run(geometry, state.tree)))?;
        let room = Room::beside(geometry, &old);
        let copies = HashMap::new();
        let mut work = Work {
            inner: self,
            live: &live,
            quiet: &quiet,
            hold,
            geometry,
            tables,
            ledger,
            room,
            copies,
        };
        if state.expand.is_some() {
            work.check_places(&state).await?;
        }
        let stages = match work.build(&present, &state).await {
            Ok(stages) => stages,
            Err(error) => {
                work.cut_back(old.end()).await;
                return Err(error);
            }
        };
        let Work { ledger, hold, .. } = work;
        self.switch(&live, &quiet, &hold, stages).await?;
        self.punch_unused(&live, &hold, geometry, &old, &ledger).await;
        *quiet.stage.lock() = Stage::Done;
        Ok(())
    }

    /// Waits for what is in flight, keeps everybody else away, and flushes until nothing is left to write.
    pub(crate) async fn quiet(self: &Arc<Self>) -> Result<(Arc<Live>, Arc<Quiet>), Error> {
        if self.limits().read_only {
            return Err(Error::Request(block::DeviceError::ReadOnly));
        }
        // Refused at once where the image is closing, instead of waiting until it is closed.
        self.live()?;
        let guard = self.guests.lock_exclusive(ByteRange::between(0, u64::MAX)).await;
        let live = self.live()?;
        self.before_change(&live).await?;
        for _ in 0..FLUSH_ROUNDS {
            self.flush(&live).await?;
            self.step_in_flush(&live, Core::settle).await?;
            if !self.core.lock().is_dirty() {
                break;
            }
        }
        let gate = Arc::clone(&self.flush_gate).lock_owned().await;
        let end = self.core.lock().end_bytes();
        // Clusters that are only reserved may lie behind what was ever written, where none should be found.
        live.file.grow(end).await?;
        self.live()?;
        let quiet = Quiet {
            inner: Arc::clone(self),
            stage: Mutex::new(Stage::Building(HostCluster(0))),
            _guard: guard,
            _gate: gate,
        };
        Ok((live, Arc::new(quiet)))
    }

    /// Counts the references of the present state, which must not be more than the image counts: what is used more
    /// often may be anything's by now, and there may be any number of it.
    async fn count_present(&self, live: &Live, header: &Header) -> Result<Counts, Error> {
        let tally = self.count(live, header, None).await?;
        match find_miscount(&live.file, header, &tally).await? {
            Some(finding) => Err(self.damaged(finding)),
            None => Ok(tally.counts),
        }
    }

    /// Counts the references of the present state, or of the new one without what is still to be written of it.
    async fn count(
        &self,
        live: &Live,
        header: &Header,
        state: Option<&NewState>,
    ) -> Result<Tally, Error> {
        let mut first: Option<Finding> = None;
        let mut visit = |finding: Finding, _: u64| {
            if !finding.is_leak() {
                first.get_or_insert(finding);
            }
        };
        let mut roots = Roots::read(&live.file, header, &mut visit).await?;
        if let Some(state) = state {
            let place = |entry: &SnapshotEntry| TablePlace {
                at: entry.l1_at,
                entries: u64::from(entry.l1_entries),
            };
            // What is still to be expanded follows the rules of the present version.
            roots.version = state.header.version.max(header.version);
            roots.l1 = state.tree;
            roots.snapshots = state.snapshots.iter().map(place).collect();
            roots.snapshot_table = None;
            roots.refcount_table.entries = 0;
        }
        let tally = Tally::take(&live.file, &roots, &mut visit).await?;
        match first {
            Some(finding) => Err(self.damaged(finding)),
            None if tally.incomplete => Err(Error::Uncountable { file: self.path.clone() }),
            None => Ok(tally),
        }
    }

    fn damaged(&self, finding: Finding) -> Error {
        Error::Damaged { file: self.path.clone(), finding: Box::new(finding) }
    }

    /// Writes the header, and reads back what it names.
    async fn switch(
        &self,
        live: &Live,
        quiet: &Quiet,
        hold: &Hold,
        stages: Stages,
    ) -> Result<(), Error> {
        *quiet.stage.lock() = Stage::Switching;
        let switched = async {
            write_stages(&live.file, stages, hold).await?;
            let header = read_header(&live.file).await?;
            let size_bytes = header.size_bytes;
            let backing_bytes = live.backing.as_ref().map(|backing| backing.limits().size_bytes);
            let mut core = load_core(&live.file, header, backing_bytes, true).await?;
            {
                let mut present = self.core.lock();
                // Bitmaps stay where they are.
                core.bitmaps = std::mem::take(&mut present.bitmaps);
                *present = core;
            }
            self.set_size(size_bytes);
            self.step_in_flush(live, Core::find_end).await
        };
        switched.await.map_err(|error: Error| self.poison(error))
    }

    /// Gives the host back the clusters that the new state does not reference. Failing loses space, nothing else.
    async fn punch_unused(
        &self,
        live: &Live,
        hold: &Hold,
        geometry: ClusterGeometry,
        old: &Counts,
        ledger: &Ledger,
    ) {
        let mut unused: Option<Run> = None;
        let gone = old.iter().map(|(cluster, _)| cluster).filter(|at| ledger.get(*at) == 0);
        for cluster in gone.map(Some).chain([None]) {
            match (&mut unused, cluster) {
                (Some(run), Some(cluster)) if run.end() == cluster => run.count += 1,
                (run, cluster) => {
                    if let Some(run) = std::mem::replace(run, cluster.map(Run::one)) {
                        self.punch_run(live, hold, geometry.host_range(run)).await;
                    }
                }
            }
        }
    }

    async fn punch_run(&self, live: &Live, hold: &Hold, range: ByteRange) {
        let start = range.start().next_multiple_of(HOST_BLOCK_BYTES);
        let whole = ByteRange::between(start, range.end() - range.end() % HOST_BLOCK_BYTES);
        if whole.is_empty() || !live.file.can_punch() {
            return;
        }
        if let Err(error) = live.file.punch(whole, hold.clone()).await {
            tracing::debug!(image = %self.path.display(), %error, "space was not given back");
        }
    }

    fn check<T>(&self, result: Result<T, Fault>) -> Result<T, Error> {
        result.map_err(|fault| self.fault(fault))
    }
}

/// A new state in the making.
struct Work<'a> {
    inner: &'a Inner,
    live: &'a Live,
    quiet: &'a Quiet,
    hold: Hold,
    geometry: ClusterGeometry,
    /// All L2 tables of the new state, in the order of the file.
    tables: Vec<TableUse>,
    ledger: Ledger,
    room: Room,
    /// Where tables went whose zero flags were expanded, by their place and the L1 entry that they are for.
    copies: HashMap<(HostCluster, u64), HostCluster>,
}

impl Work<'_> {
    /// Writes all of the new state but the header, durably, and gives the writes that switch to it.
    async fn build(&mut self, present: &Present, state: &NewState) -> Result<Stages, Error> {
        let needed = self.geometry.l1_entries(state.size_bytes).max(state.tree.entries).max(1);
        let l1 = self.take(self.geometry.clusters(needed * 8))?;
        let mut snapshots = state.snapshots.clone();
        if let Some(expand) = state.expand {
            self.expand_snapshots(&mut snapshots, expand).await?;
        }
        let (snapshots_at, snapshots) = self.snapshots(&snapshots).await?;
        let entries = self.tables(present, state, needed).await?;
        self.write(vec![(self.at(l1), Bytes::from(big_endian(&entries)))]).await?;
        let table = self.refcounts(state.width).await?;
        self.live.file.sync().await?;
        let mut header = state.header.clone();
        header.size_bytes = state.size_bytes;
        header.l1_at = self.geometry.host_offset(l1.start);
        header.l1_entries = needed;
        header.refcount_table_at = self.geometry.host_offset(table.start);
        header.refcount_table_clusters = table.count;
        header.refcount_order = state.width.order();
        header.snapshots = snapshots;
        header.snapshots_at = snapshots_at;
        self.inner.check(header.check(self.live.file.len()))?;
        self.inner.check(present.header.rewrite(&mut header))
    }

    async fn snapshots(&mut self, entries: &[SnapshotEntry]) -> Result<(HostOffset, u32), Error> {
        let bytes = self.inner.check(snapshot::encode(entries))?;
        if entries.is_empty() {
            return Ok((HostOffset(0), 0));
        }
        let run = self.take(self.geometry.clusters(bytes.len() as u64))?;
        self.write(vec![(self.at(run), bytes.into())]).await?;
        // The encoder has checked the limit.
        Ok((self.geometry.host_offset(run.start), u32::try_from(entries.len()).unwrap_or(u32::MAX)))
    }

    /// Copies the L2 tables whose flags change, and gives the entries of the new L1 table.
    async fn tables(
        &mut self,
        present: &Present,
        state: &NewState,
        needed: u64,
    ) -> Result<Vec<u64>, Error> {
        let place = state.tree;
        let range = ByteRange::between(place.at.0, place.at.0.saturating_add(place.bytes()));
        let mut l1 = from_big_endian(&self.live.file.read(range).await?);
        l1.resize(index(needed), 0);
        let fields = present.header.entry_format().fields();
        let at_once = (BATCH_BYTES / self.geometry.bytes()).clamp(1, BATCH_TABLES);
        // A table is read once, however many entries name it, and not at all where it holds nothing.
        let mut met = vec![false; self.tables.len()];
        let mut used: Vec<(usize, u64)> = Vec::new();
        for (at, entry) in l1.iter().enumerate() {
            let Some((number, table)) = self.table(*entry) else { continue };
            if let Some(met) = met.get_mut(number).filter(|met| !**met) {
                *met = true;
                used.push((at, table.active.into()));
            }
        }
        drop(met);
        let mut moved = HashMap::new();
        for batch in used.chunks(index(at_once)) {
            let reads =
                batch.iter().map(|(at, _)| self.read_table(l1.get(*at).copied().unwrap_or(0)));
            let tables = try_join_all(reads).await?;
            let mut writes = Vec::new();
            for ((at, times), (named, bytes)) in batch.iter().zip(tables) {
                let (old, bytes, expanded) = match state.expand {
                    Some(expand) => self.expanded(*at as u64, named, bytes, expand).await?,
                    None => (named, bytes, false),
                };
                moved.insert(named, old);
                let bytes = match self.with_flags(&bytes, fields) {
                    Some(flagged) => flagged,
                    None if expanded => bytes,
                    None => continue,
                };
                let copy = self.inner.check(self.room.take(1))?.start;
                self.inner.check(self.ledger.replace(old, copy, *times))?;
                moved.insert(named, copy);
                writes.push((self.at(Run::one(copy)), bytes));
            }
            self.write(writes).await?;
        }
        for entry in l1.iter_mut().filter(|entry| **entry != 0) {
            let named = self.geometry.host_cluster(HostOffset(*entry & HOST_OFFSET));
            let place = moved.get(&named).copied().unwrap_or(named);
            let once = self.ledger.get(place) == 1;
            *entry = self.at(Run::one(place)) | if once { COPIED } else { 0 };
        }
        Ok(l1)
    }

    /// The L2 table that an L1 entry names, and its number, where it holds something.
    fn table(&self, raw: u64) -> Option<(usize, TableUse)> {
        let at = HostOffset(raw & HOST_OFFSET);
        let number = self.tables.binary_search_by_key(&at, |table| table.at).ok()?;
        let table = self.tables.get(number).copied().filter(|table| table.holds_something)?;
        Some((number, table))
    }

    async fn read_table(&self, raw: u64) -> Result<(HostCluster, Bytes), HostError> {
        let at = HostOffset(raw & HOST_OFFSET);
        let range = ByteRange::between(at.0, at.0.saturating_add(self.geometry.bytes()));
        Ok((self.geometry.host_cluster(at), self.live.file.read(range).await?))
    }

    /// An L2 table with the COPIED flags that it has to have, or `None` where it has them.
    fn with_flags(&self, table: &Bytes, fields: EntryFields) -> Option<Bytes> {
        let mut changed: Option<Vec<u8>> = None;
        let step = index(self.geometry.l2_entry_bytes());
        for (number, entry) in table.chunks_exact(step).enumerate() {
            let (raw, _) = halves(entry);
            let wanted = match fields.kind(raw) {
                EntryKind::Compressed => raw & !COPIED,
                // Nobody counts clusters of another file.
                EntryKind::Hosted(host) if !fields.external_data => {
                    let cluster = self.geometry.host_cluster(HostOffset(host));
                    let once = self.ledger.get(cluster) == 1;
                    raw & !COPIED | if once { COPIED } else { 0 }
                }
                EntryKind::Hosted(_) | EntryKind::Absent | EntryKind::Zero => raw,
            };
            if wanted != raw {
                let bytes = changed.get_or_insert_with(|| table.to_vec());
                if let Some(place) = bytes.get_mut(number * step..number * step + 8) {
                    place.copy_from_slice(&wanted.to_be_bytes());
                }
            }
        }
        changed.map(Bytes::from)
    }

    /// Writes refcounts for all that is in the ledger by now.
    async fn refcounts(&mut self, width: RefcountWidth) -> Result<Run, Error> {
        let made = NewRefcounts::lay_out(self.geometry, width, &mut self.ledger, &mut self.room);
        let made = self.inner.check(made)?;
        let blocks: Vec<(u64, HostCluster)> = made.blocks().collect();
        let at_once = (BATCH_BYTES / self.geometry.bytes()).clamp(1, BATCH_TABLES);
        for batch in blocks.chunks(index(at_once)) {
            let mut writes = Vec::new();
            for (block, cluster) in batch {
                let bytes = self.inner.check(made.encode(*block, &self.ledger))?;
                writes.push((self.geometry.host_offset(*cluster).0, bytes.into()));
            }
            self.write(writes).await?;
        }
        let table = Bytes::from(big_endian(&made.table_entries()));
        self.write(vec![(self.at(made.table), table)]).await?;
        Ok(made.table)
    }

    /// Takes clusters that the new state references once.
    fn take(&mut self, count: u64) -> Result<Run, Error> {
        let run = self.inner.check(self.room.take(count))?;
        self.inner.check(self.ledger.add(run))?;
        Ok(run)
    }

    fn at(&self, run: Run) -> u64 {
        self.geometry.host_offset(run.start).0
    }

    /// Writes what was taken, all at once. Whatever fails, all have ended when this returns.
    async fn write(&self, writes: Vec<(u64, Bytes)>) -> Result<(), Error> {
        let end = self.room.end();
        *self.quiet.stage.lock() = Stage::Building(end);
        self.inner.grow(self.live, end.0.saturating_mul(self.geometry.bytes())).await?;
        let all = writes.into_iter().map(|(at, bytes)| async move {
            Ok::<_, Infallible>(self.live.file.write(at, bytes, self.hold.clone()).await)
        });
        let Ok(ended) = try_join_all(all).await;
        ended.into_iter().collect::<Result<(), HostError>>().map_err(Error::Host)
    }

    /// Gives up: cuts the file to what the present state uses.
    async fn cut_back(&self, used: HostCluster) {
        let end = {
            let core = self.inner.core.lock();
            core.end.max(used.0).saturating_mul(self.geometry.bytes())
        };
        if self.live.file.is_fixed_len() || self.live.file.len() < end {
            return;
        }
        match self.live.file.set_len(end).await {
            Ok(()) => {
                let mut core = self.inner.core.lock();
                core.capacity_bytes = core.capacity_bytes.min(end);
            }
            Err(error) => {
                let image = self.inner.path.display();
                tracing::warn!(%image, %error, "the file could not be cut back");
            }
        }
    }
}

/// The clusters of a table.
fn table_run(geometry: ClusterGeometry, table: TablePlace) -> Run {
    Run { start: geometry.host_cluster(table.at), count: geometry.clusters(table.bytes()) }
}
