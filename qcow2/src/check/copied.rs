//! The COPIED flags of the active tables: each says that what its entry points at has a refcount of one. The tables of
//! snapshots have no flags that mean anything.

use block::{ByteRange, HostFile, try_join_all};

use crate::check::compare::write_sectors;
use crate::check::examine::Examined;
use crate::error::{Error, TableKind};
use crate::fields::{COPIED, EntryFields, EntryKind, HOST_OFFSET, halves};
use crate::header::Header;
use crate::mapping::from_big_endian;
use crate::tally::{EntryPlace, Finding};
use crate::units::{ClusterGeometry, HostCluster, HostOffset, SECTOR_BYTES, index};

/// The L2 tables that are read at once, and their bytes.
const BATCH_TABLES: usize = 64;
const BATCH_BYTES: u64 = 8 << 20;

/// Which flags are put right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fix {
    /// None.
    None,
    /// Those of clusters whose refcount this repair has lowered to one.
    Lowered,
    /// All.
    All,
}

/// Compares the flags with the refcounts, and puts right those that `fix` says.
///
/// # Errors
/// [`Error::Host`].
pub(super) async fn check_copied(
    file: &HostFile,
    header: &Header,
    examined: &mut Examined,
    fix: Fix,
) -> Result<(), Error> {
    let entries = header.entry_format().fields();
    let geometry = header.geometry;
    l1_table(file, header, examined, fix).await?;
    let tables = std::mem::take(&mut examined.tally.tables);
    let mut active = tables.iter().filter(|table| table.active > 0 && table.holds_something);
    let per_batch = BATCH_TABLES.min(index((BATCH_BYTES / geometry.bytes()).max(1)));
    loop {
        let batch: Vec<_> = active.by_ref().take(per_batch).collect();
        if batch.is_empty() {
            break;
        }
        let range = |at: u64| ByteRange::between(at, at + geometry.bytes());
        let reads = batch.iter().map(|table| file.read(range(table.at.0)));
        for (table, bytes) in batch.iter().zip(try_join_all(reads).await?) {
            let (at, times) = (table.at, u64::from(table.active));
            let mut table = L2Table { at, times, geometry, entries, examined, fix };
            let mut bytes = bytes.to_vec();
            let changed = table.check(&mut bytes);
            write_sectors(file, at, &bytes, &changed).await?;
        }
    }
    examined.tally.tables = tables;
    Ok(())
}

async fn l1_table(
    file: &HostFile,
    header: &Header,
    examined: &mut Examined,
    fix: Fix,
) -> Result<(), Error> {
    let start = header.l1_at;
    let range = ByteRange::between(start.0, start.0.saturating_add(header.l1_entries * 8));
    let range = range.intersection(ByteRange::between(0, file.len()));
    let mut bytes = file.read(range).await?.to_vec();
    let mut changed = Vec::new();
    for (place, raw) in (0u64..).zip(from_big_endian(&bytes)) {
        let host = HostOffset(raw & HOST_OFFSET);
        if host.0 == 0 {
            continue;
        }
        let at = HostOffset(start.0 + place * 8);
        let entry = EntryPlace { table: TableKind::L1, at, index: place };
        let cluster = header.geometry.host_cluster(host);
        let judged = Flag { entry, raw, cluster, geometry: header.geometry, fix, times: 1 };
        if judged.check(None, examined) {
            put(&mut bytes, place * 8, raw ^ COPIED, &mut changed);
        }
    }
    write_sectors(file, start, &bytes, &changed).await
}

/// Stores an entry, and notes its sector.
fn put(table: &mut [u8], at: u64, raw: u64, changed: &mut Vec<u64>) {
    if let Some(place) = table.get_mut(index(at)..index(at + 8)) {
        place.copy_from_slice(&raw.to_be_bytes());
        if changed.last() != Some(&(at / SECTOR_BYTES)) {
            changed.push(at / SECTOR_BYTES);
        }
    }
}

struct L2Table<'a> {
    at: HostOffset,
    times: u64,
    geometry: ClusterGeometry,
    entries: EntryFields,
    examined: &'a mut Examined,
    fix: Fix,
}

impl L2Table<'_> {
    /// Puts right what may be. Says which sectors changed.
    fn check(&mut self, bytes: &mut [u8]) -> Vec<u64> {
        let mut changed = Vec::new();
        let step = self.geometry.l2_entry_bytes();
        // A table that is no cluster lies over others; what is right in one may be wrong in the other.
        let fix = if self.geometry.is_aligned(self.at.0) { self.fix } else { Fix::None };
        for place in 0..bytes.len() as u64 / step {
            let (raw, _) = halves(bytes.get(index(place * step)..).unwrap_or_default());
            let EntryKind::Hosted(host) = self.entries.kind(raw) else { continue };
            let at = HostOffset(self.at.0 + place * step);
            let entry = EntryPlace { table: TableKind::L2, at, index: place };
            let cluster = self.geometry.host_cluster(HostOffset(host));
            let refcount = self.entries.external_data.then_some(1);
            let geometry = self.geometry;
            let judged = Flag { entry, raw, cluster, geometry, fix, times: self.times };
            if judged.check(refcount, self.examined) {
                put(bytes, place * step, raw ^ COPIED, &mut changed);
            }
        }
        changed
    }
}

/// An entry whose flag is judged.
struct Flag {
    entry: EntryPlace,
    raw: u64,
    cluster: HostCluster,
    geometry: ClusterGeometry,
    fix: Fix,
    times: u64,
}

impl Flag {
    /// Reports a wrong flag. Says whether it is to be turned.
    fn check(&self, refcount: Option<u64>, examined: &mut Examined) -> bool {
        let kept = examined.compared.refcount(self.cluster, &examined.tally);
        let refcount = refcount.unwrap_or(kept);
        let flagged = self.raw & COPIED != 0;
        if flagged == (refcount == 1) {
            return false;
        }
        let lowered = examined.compared.lowered_to_one.get(self.cluster) != 0;
        let wanted = match self.fix {
            Fix::None => false,
            Fix::Lowered => lowered && !flagged,
            Fix::All => true,
        };
        let place = self.geometry.host_cluster(self.entry.at);
        let fixed = wanted && !examined.overlaps.contains(place);
        let finding = Finding::CopiedFlag { entry: self.entry, raw: self.raw, refcount };
        if fixed {
            examined.report.fixed(finding);
        } else {
            examined.report.add(finding, self.times);
        }
        fixed
    }
}
