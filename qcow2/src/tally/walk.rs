//! The walk itself: from the roots through all tables to the clusters, in an order in which every table is met with all
//! that point at it. Reads are batched, with many in flight.

use std::collections::BTreeMap;

use block::{ByteRange, HostFile, is_zero, try_join_all};

use crate::bitmap::codec::BitmapCluster;
use crate::error::{Corruption, Error, Fault, Feature, TableKind};
use crate::fields::{
    ALL_ALLOCATED, COPIED, EntryFields, EntryKind, HOST_OFFSET, L1_RESERVED, L2_RESERVED,
    REFCOUNT_TABLE_RESERVED, StreamFields, ZERO, halves,
};
use crate::header::Header;
use crate::mapping::from_big_endian;
use crate::tally::counts::{Counts, MAX_COUNTS_BYTES, TooScattered};
use crate::tally::finding::{EntryPlace, Finding};
use crate::tally::roots::{Roots, TablePlace};
use crate::tally::sweep::sweep;
use crate::units::{ClusterGeometry, HOST_OFFSET_END, HostCluster, HostOffset, Run, index};

/// The bytes of a table of tables that are read at once.
const PIECE_BYTES: u64 = 1 << 20;
/// The L2 tables that are read at once, and their bytes.
const BATCH_TABLES: usize = 64;
const BATCH_BYTES: u64 = 8 << 20;
/// L2 tables that start inside a cluster overlap others, so that few clusters could hold very many of them. What more
/// of them refer to is not followed.
const MAX_UNALIGNED_TABLES: u64 = 32;
/// L2 tables full of zeros are rare unless somebody put them into holes: after so many, holes are asked for first.
const ZERO_TABLES: u64 = 64;
/// The least of the file that is asked for holes at once, in bytes.
const HOLES_BYTES: u64 = 1 << 30;
/// What remembering an L2 table, and another piece of metadata, takes at most, about, in bytes.
const TABLE_MEMORY_BYTES: u64 = 64;
const PIECE_MEMORY_BYTES: u64 = 32;

/// Takes what a walk finds.
pub(crate) trait Visitor: Send {
    /// A fault, and how often it is met.
    fn fault(&mut self, finding: Finding, times: u64);

    /// How many of the bytes of L2 tables are read.
    fn progress(&mut self, _done: u64, _total: u64) {}
}

impl<F: FnMut(Finding, u64) + Send> Visitor for F {
    fn fault(&mut self, finding: Finding, times: u64) {
        self(finding, times);
    }
}

pub(crate) type Visit<'a> = &'a mut dyn Visitor;

/// How the clusters of the active disk lie, as QEMU counts them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ActiveClusters {
    /// Clusters that have a place.
    pub allocated: u64,
    /// Of these, those that do not follow their predecessor, and all that are compressed.
    pub fragmented: u64,
    /// Of these, the compressed ones.
    pub compressed: u64,
}

/// An L2 table and who points at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TableUse {
    /// Where it starts.
    pub at: HostOffset,
    /// How many entries of L1 tables point at it; snapshots have such tables, too.
    pub all: u64,
    /// How many entries of the active L1 table do.
    pub active: u32,
    /// It was read and has entries.
    pub holds_something: bool,
}

/// Every reference of an image.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    /// How often every cluster is referenced.
    pub counts: Counts,
    /// The clusters of all metadata but L2 tables, and how many references to it they have.
    pub metadata: Vec<(Run, TableKind, u64)>,
    /// The L2 tables, in the order of the file.
    pub tables: Vec<TableUse>,
    /// How the clusters of the active disk lie.
    pub active: ActiveClusters,
    /// The refcount table, as read.
    pub refcount_table: Vec<u64>,
    /// Whether the refcount table leads to blocks that cannot be used as they are.
    pub broken_refcounts: bool,
    /// Whether there are references that could not be counted, so that what seems free may not be.
    pub incomplete: bool,
}

impl Tally {
    /// Counts all references of the image in `file`, and tells `visit` every fault on the way.
    ///
    /// # Errors
    /// As [`Tally::take`].
    pub(crate) async fn of_image(
        file: &HostFile,
        header: &Header,
        visit: Visit<'_>,
    ) -> Result<Self, Error> {
        let roots = Roots::read(file, header, visit).await?;
        Self::take(file, &roots, visit).await
    }

    /// Counts all references from the roots on, and tells `visit` every fault on the way. Memory is bounded by
    /// [`MAX_COUNTS_BYTES`] and a few tables.
    ///
    /// # Errors
    /// [`Error::Host`], and [`Feature::ScatteredReferences`] where the bound is too small.
    pub(crate) async fn take(
        file: &HostFile,
        roots: &Roots,
        visit: Visit<'_>,
    ) -> Result<Self, Error> {
        // QEMU knows lengths in sectors.
        let file_bytes = file.len().next_multiple_of(512).min(HOST_OFFSET_END);
        let mut walk = Walk {
            file,
            roots,
            geometry: roots.geometry,
            file_bytes,
            entries: EntryFields {
                extended: roots.geometry.is_extended(),
                external_data: roots.external_data,
            },
            visit,
            tally: Self { incomplete: roots.incomplete, ..Self::default() },
            tables: BTreeMap::new(),
            pending: None,
        };
        match walk.run().await {
            Ok(()) => Ok(walk.tally),
            Err(Stop::Host(error)) => Err(Error::Host(error)),
            Err(Stop::TooScattered) => {
                let feature = Feature::ScatteredReferences { limit: MAX_COUNTS_BYTES };
                Err(Fault::Unsupported(feature).of(file.path()))
            }
        }
    }

    /// The first cluster behind the file and behind all references.
    pub(crate) fn end(&self, geometry: ClusterGeometry, file_bytes: u64) -> HostCluster {
        self.counts.end().max(HostCluster(geometry.clusters(file_bytes)))
    }
}

/// Why a walk ends early.
enum Stop {
    Host(block::HostError),
    TooScattered,
}

impl From<block::HostError> for Stop {
    fn from(error: block::HostError) -> Self {
        Self::Host(error)
    }
}

impl From<TooScattered> for Stop {
    fn from(_: TooScattered) -> Self {
        Self::TooScattered
    }
}

/// How many entries point at an L2 table: all, and those of the active L1 table.
#[derive(Clone, Copy, Default)]
struct Users {
    all: u64,
    active: u32,
}

struct Walk<'a> {
    file: &'a HostFile,
    roots: &'a Roots,
    geometry: ClusterGeometry,
    file_bytes: u64,
    entries: EntryFields,
    visit: Visit<'a>,
    tally: Tally,
    tables: BTreeMap<u64, Users>,
    /// Clusters that the L2 table at hand references one behind the other and that are not counted yet.
    pending: Option<Run>,
}

impl Walk<'_> {
    async fn run(&mut self) -> Result<(), Stop> {
        let header = EntryPlace { table: TableKind::Header, at: HostOffset(0), index: 0 };
        self.refer(TableKind::Header, 0, self.geometry.bytes(), header, 1)?;
        self.active_l1().await?;
        self.snapshots().await?;
        self.other_pieces()?;
        self.bitmaps().await?;
        self.l2_tables().await?;
        self.refcount_blocks().await
    }

    /// Counts the clusters of a table or of another piece of metadata.
    fn refer(
        &mut self,
        kind: TableKind,
        at: u64,
        len: u64,
        entry: EntryPlace,
        times: u64,
    ) -> Result<(), TooScattered> {
        if let Some(run) = self.clusters(at, len, entry, times) {
            self.tally.counts.add(run, times)?;
            if kind != TableKind::L2 {
                self.tally.metadata.push((run, kind, times));
            }
        }
        self.check_memory()
    }

    /// The clusters of a range, unless it lies behind the file by a cluster or more.
    fn clusters(&mut self, at: u64, len: u64, entry: EntryPlace, times: u64) -> Option<Run> {
        let end = at
            .checked_add(len)
            .filter(|end| len > 0 && end.saturating_sub(self.file_bytes) < self.geometry.bytes());
        let Some(end) = end else {
            if len > 0 {
                self.visit.fault(Finding::BehindFile { entry, at: HostOffset(at), len }, times);
            }
            return None;
        };
        let start = self.geometry.host_cluster(HostOffset(at));
        Some(Run { start, count: self.geometry.clusters(end) - start.0 })
    }

    fn check_memory(&self) -> Result<(), TooScattered> {
        let tables = self.tables.len() as u64 * TABLE_MEMORY_BYTES;
        let pieces = self.tally.metadata.len() as u64 * PIECE_MEMORY_BYTES;
        if tables + pieces + self.tally.counts.bytes() > MAX_COUNTS_BYTES {
            return Err(TooScattered);
        }
        Ok(())
    }

    async fn active_l1(&mut self) -> Result<(), Stop> {
        let l1 = self.roots.l1;
        let header = EntryPlace { table: TableKind::Header, at: HostOffset(40), index: 0 };
        self.refer(TableKind::L1, l1.at.0, l1.bytes(), header, 1)?;
        let range = table_range(l1);
        for piece in self.in_file(range).pieces(PIECE_BYTES) {
            let bytes = self.file.read(piece).await?;
            self.l1_entries(TableKind::L1, piece.start(), range.start(), &bytes, 1)?;
        }
        Ok(())
    }

    /// Takes in a part of an L1 table that starts at `base`.
    fn l1_entries(
        &mut self,
        table: TableKind,
        start: u64,
        base: u64,
        bytes: &[u8],
        times: u64,
    ) -> Result<(), TooScattered> {
        let entries = from_big_endian(bytes);
        for (place, raw) in (0u64..).zip(entries).filter(|(_, raw)| *raw != 0) {
            let at = start + place * 8;
            let entry = EntryPlace { table, at: HostOffset(at), index: (at - base) / 8 };
            if raw & L1_RESERVED != 0 {
                self.visit.fault(Finding::ReservedBits { entry, raw }, times);
            }
            let host = raw & HOST_OFFSET;
            if !self.geometry.is_aligned(host) {
                self.visit.fault(Finding::Unaligned { entry, raw }, times);
            }
            self.refer(TableKind::L2, host, self.geometry.bytes(), entry, times)?;
            let users = self.tables.entry(host).or_default();
            users.all = users.all.saturating_add(times);
            users.active += u32::from(table == TableKind::L1);
        }
        Ok(())
    }

    async fn snapshots(&mut self) -> Result<(), Stop> {
        let count = self.roots.snapshots.len() as u64;
        if count > 0 && self.roots.external_data {
            self.visit.fault(Finding::SnapshotsWithExternalData { snapshots: count }, 1);
        }
        let mut good = Vec::new();
        for (snapshot, table) in (0u64..).zip(&self.roots.snapshots) {
            let TablePlace { at, entries } = *table;
            if !self.geometry.is_aligned(at.0) || table.bytes() > crate::header::MAX_L1_BYTES {
                self.visit.fault(Finding::SnapshotTable { snapshot, at, entries }, 1);
            } else if entries > 0 {
                good.push(table_range(*table));
            }
        }
        self.shared_tables(TableKind::SnapshotL1, &good)?;
        for part in sweep(good) {
            // A hostile image may have terabytes of such tables in holes.
            for data in self.file.data_ranges(self.in_file(part.range)).await? {
                for piece in widened(data, part.range).pieces(PIECE_BYTES) {
                    let bytes = self.file.read(piece).await?;
                    let (start, kind) = (piece.start(), TableKind::SnapshotL1);
                    self.l1_entries(kind, start, part.base, &bytes, part.times)?;
                }
            }
        }
        Ok(())
    }

    /// Counts the clusters of tables that may lie over each other.
    fn shared_tables(&mut self, kind: TableKind, tables: &[ByteRange]) -> Result<(), TooScattered> {
        let mut inside = Vec::new();
        for (number, range) in (0u64..).zip(tables) {
            let entry = EntryPlace { table: kind, at: HostOffset(range.start()), index: number };
            if self.clusters(range.start(), range.len(), entry, 1).is_some() {
                inside.push(range.widen(self.geometry.bytes()));
            }
        }
        for part in sweep(inside) {
            let entry = EntryPlace { table: kind, at: HostOffset(part.range.start()), index: 0 };
            self.refer(kind, part.range.start(), part.range.len(), entry, part.times)?;
        }
        Ok(())
    }

    /// Snapshot table, refcount table and encryption header.
    fn other_pieces(&mut self) -> Result<(), TooScattered> {
        let header = |at| EntryPlace { table: TableKind::Header, at: HostOffset(at), index: 0 };
        if let Some(piece) = self.roots.snapshot_table {
            self.refer(TableKind::Snapshots, piece.at.0, piece.len, header(64), 1)?;
        }
        self.refcount_table(header(48))?;
        if let Some(piece) = self.roots.encryption {
            self.refer(TableKind::Encryption, piece.at.0, piece.len, header(0), 1)?;
        }
        if let Some(piece) = self.roots.bitmap_directory {
            self.refer(TableKind::BitmapDirectory, piece.at.0, piece.len, header(0), 1)?;
        }
        Ok(())
    }

    /// The refcount table may be anywhere: where it cannot be, there is none.
    fn refcount_table(&mut self, entry: EntryPlace) -> Result<(), TooScattered> {
        let table = self.roots.refcount_table;
        let raw = table.at.0;
        if !self.geometry.is_aligned(raw) {
            self.visit.fault(Finding::Unaligned { entry, raw }, 1);
        } else if let Some(run) = self.clusters(raw, table.bytes(), entry, 1) {
            self.tally.counts.add(run, 1)?;
            self.tally.metadata.push((run, TableKind::RefcountTable, 1));
            return Ok(());
        }
        self.tally.broken_refcounts = table.entries > 0;
        Ok(())
    }

    async fn bitmaps(&mut self) -> Result<(), Stop> {
        let ranges: Vec<_> = self.roots.bitmaps.iter().map(|table| table_range(*table)).collect();
        self.shared_tables(TableKind::Bitmap, &ranges)?;
        for part in sweep(ranges) {
            for data in self.file.data_ranges(self.in_file(part.range)).await? {
                for piece in widened(data, part.range).pieces(PIECE_BYTES) {
                    let bytes = self.file.read(piece).await?;
                    self.bitmap_entries(piece.start(), part.base, &bytes, part.times)?;
                }
            }
        }
        Ok(())
    }

    fn bitmap_entries(
        &mut self,
        start: u64,
        base: u64,
        bytes: &[u8],
        times: u64,
    ) -> Result<(), TooScattered> {
        let entries = from_big_endian(bytes);
        for (place, raw) in (0u64..).zip(entries) {
            let at = HostOffset(start + place * 8);
            let index = (at.0 - base) / 8;
            let entry = EntryPlace { table: TableKind::Bitmap, at, index };
            match BitmapCluster::decode(raw, self.geometry) {
                Ok(BitmapCluster::Zeros | BitmapCluster::Ones) => {}
                Ok(BitmapCluster::Stored(host)) => {
                    let len = self.geometry.bytes();
                    self.refer(TableKind::BitmapData, host.0, len, entry, times)?;
                }
                Err(what) => {
                    self.tally.incomplete = true;
                    let finding = match what {
                        Corruption::Unaligned { .. } => Finding::Unaligned { entry, raw },
                        _ => Finding::ReservedBits { entry, raw },
                    };
                    self.visit.fault(finding, times);
                }
            }
        }
        Ok(())
    }

    async fn l2_tables(&mut self) -> Result<(), Stop> {
        let found = std::mem::take(&mut self.tables);
        let mut tables = Vec::with_capacity(found.len());
        tables.extend(found.into_iter().map(|(at, Users { all, active })| TableUse {
            at: HostOffset(at),
            all,
            active,
            holds_something: false,
        }));
        let (len, total) = (self.geometry.bytes(), tables.len() as u64);
        let per_batch = BATCH_TABLES.min(index((BATCH_BYTES / len).max(1)));
        let (mut zero_tables, mut unaligned, mut holes) = (0u64, 0u64, Holes::default());
        let mut batch = Vec::new();
        for number in 0..tables.len() {
            let Some(table) = tables.get(number).copied() else { break };
            let mut wanted = table.at.0 < self.file_bytes;
            if wanted && !self.geometry.is_aligned(table.at.0) {
                unaligned += 1;
                wanted = self.follows(unaligned, table);
            }
            if wanted && zero_tables >= ZERO_TABLES {
                wanted = holes.has_data(self.file, table.at.0, len).await?;
            }
            if wanted {
                batch.push(number);
            }
            if batch.len() >= per_batch || number + 1 == tables.len() {
                zero_tables += self.l2_batch(&std::mem::take(&mut batch), &mut tables).await?;
                self.visit.progress((number as u64 + 1) * len, total * len);
            }
        }
        self.tally.tables = tables;
        Ok(())
    }

    /// Whether a table that starts inside of a cluster is followed.
    fn follows(&mut self, unaligned: u64, table: TableUse) -> bool {
        if unaligned <= MAX_UNALIGNED_TABLES {
            return true;
        }
        let what = Feature::UnalignedTables { limit: MAX_UNALIGNED_TABLES };
        let finding = Finding::BeyondLimits { table: TableKind::L2, at: table.at, what };
        self.visit.fault(finding, table.all);
        self.tally.incomplete = true;
        false
    }

    /// Reads and counts some tables. Says how many of them hold nothing.
    async fn l2_batch(&mut self, batch: &[usize], tables: &mut [TableUse]) -> Result<u64, Stop> {
        let len = self.geometry.bytes();
        let places = batch.iter().filter_map(|number| tables.get(*number)).map(|table| table.at.0);
        let reads = places.map(|at| self.file.read(ByteRange::between(at, at + len)));
        let read = try_join_all(reads).await?;
        let mut zero_tables = 0;
        for (number, bytes) in batch.iter().zip(&read) {
            let Some(table) = tables.get_mut(*number) else { continue };
            table.holds_something = !is_zero(bytes);
            if table.holds_something {
                self.l2_table(*table, bytes)?;
            } else {
                zero_tables += 1;
            }
        }
        Ok(zero_tables)
    }

    fn l2_table(&mut self, table: TableUse, bytes: &[u8]) -> Result<(), TooScattered> {
        let mut next = None;
        let step = self.geometry.l2_entry_bytes();
        for (place, bytes) in (0u64..).zip(bytes.chunks_exact(index(step))) {
            let (raw, bitmap) = halves(bytes);
            if raw == 0 && bitmap == 0 {
                continue;
            }
            let at = HostOffset(table.at.0 + place * step);
            let entry = EntryPlace { table: TableKind::L2, at, index: place };
            self.check_reserved(raw, entry, table.all);
            match self.entries.kind(raw) {
                EntryKind::Compressed => self.compressed(raw, bitmap, entry, table)?,
                EntryKind::Hosted(host) => {
                    self.check_hosted(raw, bitmap, entry, table.all);
                    self.tally.active.allocated += u64::from(table.active);
                    if next.is_some_and(|next| next != host) {
                        self.tally.active.fragmented += u64::from(table.active);
                    }
                    next = Some(host + self.geometry.bytes());
                    if !self.roots.external_data {
                        self.data(host, self.geometry.bytes(), entry, table.all)?;
                    }
                }
                EntryKind::Absent if bitmap & ALL_ALLOCATED != 0 => {
                    let finding = Finding::SubclustersWithoutCluster { entry, raw, bitmap };
                    self.visit.fault(finding, table.all);
                }
                EntryKind::Absent | EntryKind::Zero => {}
            }
        }
        self.flush(table.all)
    }

    fn check_reserved(&mut self, raw: u64, entry: EntryPlace, times: u64) {
        let no_zero_flag = self.roots.version < 3 || self.entries.extended;
        let reserved = L2_RESERVED | if no_zero_flag { ZERO } else { 0 };
        if self.entries.kind(raw) != EntryKind::Compressed && raw & reserved != 0 {
            self.visit.fault(Finding::ReservedBits { entry, raw }, times);
        }
    }

    fn check_hosted(&mut self, raw: u64, bitmap: u64, entry: EntryPlace, times: u64) {
        if (bitmap >> 32) & bitmap != 0 {
            self.visit.fault(Finding::SubclustersContradict { entry, raw, bitmap }, times);
        }
        if !self.geometry.is_aligned(raw & HOST_OFFSET) {
            let has_data =
                if self.entries.extended { bitmap & ALL_ALLOCATED != 0 } else { raw & ZERO == 0 };
            self.visit.fault(
                if has_data {
                    Finding::Unaligned { entry, raw }
                } else {
                    Finding::UnalignedReserve { entry, raw }
                },
                times,
            );
        }
    }

    fn compressed(
        &mut self,
        raw: u64,
        bitmap: u64,
        entry: EntryPlace,
        table: TableUse,
    ) -> Result<(), TooScattered> {
        if raw & COPIED != 0 {
            self.visit.fault(Finding::CompressedCopied { entry, raw }, table.all);
        }
        if self.roots.external_data {
            self.visit.fault(Finding::CompressedExternal { entry, raw }, table.all);
            return Ok(());
        }
        if bitmap != 0 {
            self.visit.fault(Finding::CompressedSubclusters { entry, raw, bitmap }, table.all);
            return Ok(());
        }
        self.tally.active.allocated += u64::from(table.active);
        self.tally.active.compressed += u64::from(table.active);
        self.tally.active.fragmented += u64::from(table.active);
        let (at, len) = StreamFields::of(self.geometry).decode(raw);
        self.data(at, len, entry, table.all)
    }

    /// Counts guest data, together with what follows it in the file.
    fn data(
        &mut self,
        at: u64,
        len: u64,
        entry: EntryPlace,
        times: u64,
    ) -> Result<(), TooScattered> {
        let Some(run) = self.clusters(at, len, entry, times) else { return Ok(()) };
        match &mut self.pending {
            Some(pending) if pending.end() == run.start => pending.count += run.count,
            _ => {
                self.flush(times)?;
                self.pending = Some(run);
            }
        }
        Ok(())
    }

    fn flush(&mut self, times: u64) -> Result<(), TooScattered> {
        match self.pending.take() {
            Some(run) => self.tally.counts.add(run, times),
            None => Ok(()),
        }
    }

    async fn refcount_blocks(&mut self) -> Result<(), Stop> {
        let place = self.roots.refcount_table;
        if self.tally.broken_refcounts {
            return Ok(());
        }
        let range = self.in_file(table_range(place));
        let mut table = Vec::new();
        for piece in range.pieces(PIECE_BYTES) {
            table.extend(from_big_endian(&self.file.read(piece).await?));
        }
        // Blocks do not move it: what lies behind is none.
        let end = self.tally.end(self.geometry, self.file_bytes);
        for (number, raw) in (0u64..).zip(&table).filter(|(_, raw)| **raw != 0) {
            let at = HostOffset(place.at.0 + number * 8);
            let entry = EntryPlace { table: TableKind::RefcountTable, at, index: number };
            self.refcount_block(*raw, entry, end)?;
        }
        self.tally.refcount_table = table;
        Ok(())
    }

    fn refcount_block(
        &mut self,
        raw: u64,
        entry: EntryPlace,
        end: HostCluster,
    ) -> Result<(), TooScattered> {
        let at = HostOffset(raw);
        let cluster = self.geometry.host_cluster(at);
        let len = self.geometry.bytes();
        let finding = if raw & REFCOUNT_TABLE_RESERVED != 0 {
            Finding::ReservedBits { entry, raw }
        } else if !self.geometry.is_aligned(raw) {
            Finding::Unaligned { entry, raw }
        } else if cluster >= end {
            Finding::BehindFile { entry, at, len }
        } else {
            self.refer(TableKind::RefcountBlock, raw, len, entry, 1)?;
            let references = self.tally.counts.get(cluster);
            if references == 1 {
                return Ok(());
            }
            Finding::SharedRefcountBlock { entry, at, references }
        };
        self.tally.broken_refcounts = true;
        self.visit.fault(finding, 1);
        Ok(())
    }

    fn in_file(&self, range: ByteRange) -> ByteRange {
        range.intersection(ByteRange::between(0, self.file_bytes))
    }
}

fn table_range(table: TablePlace) -> ByteRange {
    let end = table.at.0.saturating_add(table.bytes());
    ByteRange::between(table.at.0, end)
}

/// A range of data inside a table, widened to whole entries.
fn widened(data: ByteRange, table: ByteRange) -> ByteRange {
    let start = table.start() + (data.start() - table.start()) / 8 * 8;
    let end = table.start() + (data.end() - table.start()).next_multiple_of(8);
    ByteRange::between(start, end.min(table.end()))
}

/// Which part of the file is known, and where data lies in it.
#[derive(Default)]
struct Holes {
    known_to: u64,
    window: u64,
    data: Vec<ByteRange>,
}

impl Holes {
    /// Whether the host has data for a table. Asked in the order of the file.
    async fn has_data(&mut self, file: &HostFile, at: u64, len: u64) -> Result<bool, Stop> {
        if at >= self.known_to {
            // Wider steps through emptiness; a bound on how many ranges one answer has.
            let empty = self.data.is_empty() && self.window > 0;
            self.window = if empty { self.window.saturating_mul(2) } else { HOLES_BYTES };
            self.known_to = at.saturating_add(self.window);
            self.data = file.data_ranges(ByteRange::between(at, self.known_to)).await?;
        }
        let table = ByteRange::between(at, at.saturating_add(len));
        let after = self.data.partition_point(|data| data.end() <= at);
        let found = self.data.get(after).is_some_and(|data| data.start() < table.end());
        Ok(found || table.end() > self.known_to)
    }
}
