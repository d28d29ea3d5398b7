//! Clusters of metadata that are used for something else, too, and those that are used more often than a refcount can
//! say: whatever else names one gets a copy of it in a cluster of its own, so that everything reads as before and nothing
//! is written over any more. Refcounts come after.
//!
//! What the header names stays where it is, and refcount structures are made anew elsewhere.

use std::collections::HashMap;

use block::{ByteRange, HostFile, try_join_all};
use bytes::Bytes;

use crate::check::examine::Examined;
use crate::check::report::{CheckReport, MAX_LISTED_FINDINGS};
use crate::error::{Error, TableKind};
use crate::fields::{
    ALL_ALLOCATED, COPIED, EntryFields, EntryKind, HOST_OFFSET, StreamFields, ZERO, halves,
};
use crate::header::Header;
use crate::mapping::from_big_endian;
use crate::refcount::RefcountWidth;
use crate::tally::{EntryPlace, Finding, Roots, TablePlace, TableUse, sweep};
use crate::units::{ClusterGeometry, GuestOffset, HostCluster, HostOffset, Run, index};

/// The most that one repair copies, in bytes: metadata is seldom as long. What is beyond stays reported.
const MAX_COPIED_BYTES: u64 = 1 << 30;
/// The most entries that one repair changes.
const MAX_CHANGES: usize = 1 << 20;
/// The bytes of an L1 table, and the L2 tables, that are read at once.
const PIECE_BYTES: u64 = 1 << 20;
const BATCH_TABLES: usize = 16;

/// Gives L2 tables that lie over other metadata, or are shared by too many, clusters of their own. Says whether there was one.
///
/// # Errors
/// [`Error::Host`].
pub(super) async fn separate_tables(
    file: &HostFile,
    header: &Header,
    examined: &Examined,
    done: &mut CheckReport,
) -> Result<bool, Error> {
    let mut work = Separation::new(file, header, examined);
    let roots = Roots::read(file, header, &mut |_: Finding, _: u64| {}).await?;
    let snapshots = roots.snapshots.iter().filter(|table| is_table(header.geometry, **table));
    let range = |table: TablePlace| ByteRange::between(table.at.0, table.at.0 + table.bytes());
    let mut trees = vec![(TableKind::L1, range(roots.l1), 1)];
    trees.extend(
        sweep(snapshots.map(|table| range(*table)))
            .into_iter()
            .map(|part| (TableKind::SnapshotL1, part.range, part.times)),
    );
    for (kind, tree, times) in trees {
        let inside = tree.intersection(ByteRange::between(0, file.len()));
        for data in file.data_ranges(inside).await? {
            let start = data.start() / 8 * 8;
            for piece in
                ByteRange::between(start, data.end().next_multiple_of(8)).pieces(PIECE_BYTES)
            {
                let entries = from_big_endian(&file.read(piece).await?);
                for (place, raw) in (0u64..).zip(entries).filter(|(_, raw)| *raw != 0) {
                    let at = HostOffset(piece.start() + place * 8);
                    let index = at.0.saturating_sub(tree.start()) / 8;
                    let entry = EntryPlace { table: kind, at, index };
                    work.l1_entry(entry, raw, times).await?;
                }
            }
        }
    }
    work.finish(&roots, done).await
}

/// Gives guest data in clusters of metadata, or of too many entries, clusters of its own. Says whether there was any.
///
/// # Errors
/// [`Error::Host`].
pub(super) async fn separate_data(
    file: &HostFile,
    header: &Header,
    examined: &Examined,
    done: &mut CheckReport,
) -> Result<bool, Error> {
    let mut work = Separation::new(file, header, examined);
    let roots = Roots::of_header(header);
    if work.entries.external_data {
        return Ok(false);
    }
    let is_sound = |table: &&TableUse| {
        table.holds_something
            && header.geometry.is_aligned(table.at.0)
            && !examined.overlaps.is_mixed(header.geometry.host_cluster(table.at))
    };
    let tables: Vec<TableUse> = examined.tally.tables.iter().filter(is_sound).copied().collect();
    for batch in tables.chunks(BATCH_TABLES) {
        let range = |at: u64| ByteRange::between(at, at + header.geometry.bytes());
        let reads = batch.iter().map(|table| file.read(range(table.at.0)));
        for (table, bytes) in batch.iter().zip(try_join_all(reads).await?) {
            work.l2_table(*table, &bytes).await?;
        }
    }
    work.finish(&roots, done).await
}

/// Whether an L1 table of a snapshot can be one.
fn is_table(geometry: ClusterGeometry, table: TablePlace) -> bool {
    geometry.is_aligned(table.at.0) && table.bytes() <= crate::header::MAX_L1_BYTES
}

/// What is found and copied, and the entries that are to name the copies.
struct Separation<'a> {
    file: &'a HostFile,
    examined: &'a Examined,
    geometry: ClusterGeometry,
    entries: EntryFields,
    /// The largest refcount: more entries cannot share a copy.
    max: u64,
    /// Where the next copy goes: behind all that is in the file or named.
    next: HostCluster,
    /// The clusters that may still be copied.
    left: u64,
    /// Where clusters were copied to, and how many entries name the copy.
    copies: HashMap<Run, (HostCluster, u64)>,
    changes: Vec<Change>,
}

/// An entry that changes.
struct Change {
    entry: EntryPlace,
    /// Where its table starts.
    table: HostOffset,
    old: u64,
    new: u64,
}

impl<'a> Separation<'a> {
    fn new(file: &'a HostFile, header: &Header, examined: &'a Examined) -> Self {
        let geometry = header.geometry;
        let width = RefcountWidth::new(header.refcount_order).unwrap_or(RefcountWidth::DEFAULT);
        Self {
            file,
            examined,
            geometry,
            entries: header.entry_format().fields(),
            max: width.max(),
            next: examined.tally.end(geometry, file.len()),
            left: MAX_COPIED_BYTES / geometry.bytes(),
            copies: HashMap::new(),
            changes: Vec::new(),
        }
    }

    async fn l1_entry(&mut self, entry: EntryPlace, raw: u64, times: u64) -> Result<(), Error> {
        let host = HostOffset(raw & HOST_OFFSET);
        let cluster = self.geometry.host_cluster(host);
        if !self.geometry.is_aligned(host.0) || !self.examined.overlaps.is_mixed(cluster) {
            return Ok(());
        }
        // No table lies in the header's cluster, and nobody looks for one there.
        if host.0 == 0 {
            self.change(entry, HostOffset(0), raw, 0);
        } else if let Some(copy) = self.copy(Run::one(cluster), times).await? {
            self.change(entry, HostOffset(0), raw, self.geometry.host_offset(copy).0);
        }
        Ok(())
    }

    async fn l2_table(&mut self, table: TableUse, bytes: &Bytes) -> Result<(), Error> {
        let step = self.geometry.l2_entry_bytes();
        for (place, bytes) in (0u64..).zip(bytes.chunks_exact(index(step))) {
            let (raw, bitmap) = halves(bytes);
            let (at, len) = match self.entries.kind(raw) {
                EntryKind::Absent | EntryKind::Zero => continue,
                EntryKind::Hosted(host) => (host, self.geometry.bytes()),
                EntryKind::Compressed => StreamFields::of(self.geometry).decode(raw),
            };
            let start = self.geometry.host_cluster(HostOffset(at));
            let run =
                Run { start, count: self.geometry.clusters(at.saturating_add(len)) - start.0 };
            if !run.clusters().any(|cluster| self.examined.overlaps.contains(cluster)) {
                continue;
            }
            let index = place;
            let entry = EntryPlace {
                table: TableKind::L2,
                at: HostOffset(table.at.0 + place * step),
                index,
            };
            if let Some(new) = self.apart(raw, bitmap, run, table.all).await? {
                self.change(entry, table.at, raw, new);
            }
        }
        Ok(())
    }

    /// What an entry becomes that names a run of clusters of which one is metadata.
    async fn apart(
        &mut self,
        raw: u64,
        bitmap: u64,
        run: Run,
        times: u64,
    ) -> Result<Option<u64>, Error> {
        let is_compressed = self.entries.kind(raw) == EntryKind::Compressed;
        let holds_data =
            if self.entries.extended { bitmap & ALL_ALLOCATED != 0 } else { raw & ZERO == 0 };
        if !is_compressed && !holds_data {
            // Reserved space, which nobody reads.
            return Ok(Some(if self.entries.extended { 0 } else { ZERO }));
        }
        if !is_compressed && !self.geometry.is_aligned(raw & HOST_OFFSET) {
            return Ok(None);
        }
        let Some(copy) = self.copy(run, times).await? else { return Ok(None) };
        let (old, new) = (self.geometry.host_offset(run.start), self.geometry.host_offset(copy));
        if !is_compressed {
            return Ok(Some(raw & !(HOST_OFFSET | COPIED) | new.0));
        }
        let offset_bits = StreamFields::of(self.geometry).offset_bits;
        let mask = (1u64 << offset_bits) - 1;
        let at = (raw & mask) - old.0 + new.0;
        Ok((at <= mask).then_some(raw & !mask | at))
    }

    /// Copies clusters, for so many references; `None` where that passes a limit.
    async fn copy(&mut self, run: Run, times: u64) -> Result<Option<HostCluster>, Error> {
        if self.changes.len() >= MAX_CHANGES {
            return Ok(None);
        }
        if let Some((copy, uses)) = self.copies.get_mut(&run)
            && uses.saturating_add(times) <= self.max
        {
            *uses += times;
            return Ok(Some(*copy));
        }
        if run.count > self.left || times > self.max {
            return Ok(None);
        }
        let copy = Run { start: self.next, count: run.count };
        let range = self.geometry.host_range(run);
        let bytes = self.file.read(range).await?;
        self.file.write(self.geometry.host_offset(copy.start).0, bytes, None).await?;
        self.left -= run.count;
        self.next = copy.end();
        self.copies.insert(run, (copy.start, times));
        Ok(Some(copy.start))
    }

    fn change(&mut self, entry: EntryPlace, table: HostOffset, old: u64, new: u64) {
        self.changes.push(Change { entry, table, old, new });
    }

    /// Once all copies are durable, the entries name them.
    async fn finish(self, roots: &Roots, done: &mut CheckReport) -> Result<bool, Error> {
        if self.changes.is_empty() {
            return Ok(false);
        }
        self.file.sync().await?;
        let l1 = table_of(self.file, roots.l1).await?;
        for (number, change) in self.changes.iter().enumerate() {
            let Change { entry, table, old, new } = *change;
            self.file.write(entry.at.0, new.to_be_bytes().to_vec().into(), None).await?;
            let is_data = entry.table == TableKind::L2 && number < MAX_LISTED_FINDINGS;
            let l1_index = l1.iter().position(|raw| is_data && raw & HOST_OFFSET == table.0);
            let guest = l1_index.map(|l1_index| {
                GuestOffset(self.geometry.guest_range(l1_index as u64, entry.index).start())
            });
            done.fixed(Finding::Shared { entry, raw: old, guest });
        }
        self.file.sync().await?;
        Ok(true)
    }
}

/// The entries of a table, as far as it lies in the file.
async fn table_of(file: &HostFile, table: TablePlace) -> Result<Vec<u64>, Error> {
    let range = ByteRange::between(table.at.0, table.at.0.saturating_add(table.bytes()));
    let inside = range.intersection(ByteRange::between(0, file.len()));
    Ok(from_big_endian(&file.read(inside).await?))
}
