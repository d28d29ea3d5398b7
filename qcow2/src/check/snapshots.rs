//! Repairing a snapshot table: what cannot be read of it is taken away, and what lies over other metadata gets a place
//! of its own. In version 3 the sizes of disks are filled in that old versions of QEMU left out.

use block::HostFile;

use crate::check::examine::Examined;
use crate::check::read_header;
use crate::check::report::CheckReport;
use crate::error::{Error, Fault, TableKind};
use crate::header::Header;
use crate::image::Live;
use crate::open::start;
use crate::snapshot::{self, SnapshotEntry};
use crate::snapshots::{Salvaged, salvage_snapshots};
use crate::switch::switch_header;
use crate::tally::Finding;
use crate::units::{HostCluster, HostOffset, Run, SECTOR_BYTES};

/// The most bytes of snapshots' L1 tables that one repair copies. What is beyond stays reported.
const MAX_COPIED_BYTES: u64 = 1 << 30;

/// Takes away snapshots that cannot be read, and gives those a new table that lie over other metadata. Says whether
/// there were any. Refcounts of the new clusters come after.
///
/// # Errors
/// [`Error::Host`].
pub(super) async fn mend_snapshots(
    file: &HostFile,
    header: &mut Header,
    examined: &Examined,
    done: &mut CheckReport,
) -> Result<bool, Error> {
    if header.snapshots == 0 {
        return Ok(false);
    }
    let geometry = header.geometry;
    let mut end = examined.tally.end(geometry, file.len());
    let is_mixed = |run: Run| run.clusters().any(|cluster| examined.overlaps.is_mixed(cluster));
    let Salvaged { entries: found, len, fault } = salvage_snapshots(file, header).await?;
    let lost = u64::from(header.snapshots).saturating_sub(found.len() as u64);
    let at = header.snapshots_at;
    let table = Run { start: geometry.host_cluster(at), count: geometry.clusters(len) };
    let mut changed = fault.is_some() || is_mixed(table);
    let mut left = MAX_COPIED_BYTES;
    let mut kept = Vec::new();
    for (snapshot, mut entry) in (0u64..).zip(found) {
        let (at, entries) = (entry.l1_at, u64::from(entry.l1_entries));
        // The size of its disk does not matter for what it refers to.
        let place = SnapshotEntry { disk_bytes: None, ..entry.clone() };
        if place.check(geometry, file.len()).is_err() {
            let name = String::from_utf8_lossy(&entry.name).into_owned();
            tracing::warn!(image = %file.path().display(), snapshot, name, "a snapshot is removed");
            done.fixed(Finding::SnapshotLost { snapshot, name, at, entries });
            changed = true;
            continue;
        }
        let l1 = Run { start: geometry.host_cluster(at), count: geometry.clusters(entries * 8) };
        let bytes = l1.count * geometry.bytes();
        if is_mixed(l1) && bytes <= left {
            left -= bytes;
            let content = file.read(geometry.host_range(l1)).await?;
            entry.l1_at = geometry.host_offset(end);
            file.write(entry.l1_at.0, content, None).await?;
            end = HostCluster(end.0 + l1.count);
            done.fixed(Finding::Overlap { at, table: TableKind::SnapshotL1 });
            changed = true;
        }
        entry.disk_bytes = Some(entry.disk_bytes.unwrap_or(header.size_bytes));
        kept.push(entry);
    }
    if !changed {
        return Ok(false);
    }
    if lost > 0 {
        let snapshot = u64::from(header.snapshots) - lost;
        tracing::warn!(image = %file.path().display(), lost, "snapshots are removed");
        done.fixed(Finding::SnapshotsLost { snapshot, count: lost });
    } else if let Some(Fault::Corrupt { at, what }) = fault {
        done.fixed(Finding::SnapshotEntry { at, what });
    } else if is_mixed(table) {
        done.fixed(Finding::Overlap { at, table: TableKind::Snapshots });
    }
    let mut new = header.clone();
    new.snapshots = u32::try_from(kept.len()).unwrap_or(u32::MAX);
    new.snapshots_at = HostOffset(0);
    if !kept.is_empty() {
        let mut bytes = snapshot::encode(&kept).map_err(|fault| fault.of(file.path()))?;
        bytes.resize(bytes.len().next_multiple_of(crate::units::index(SECTOR_BYTES)), 0);
        new.snapshots_at = geometry.host_offset(end);
        file.write(new.snapshots_at.0, bytes.into(), None).await?;
    }
    file.sync().await?;
    switch_header(file, header, &mut new).await?;
    *header = new;
    Ok(true)
}

/// Adds what entries lack to an image in which nothing else is wrong: a snapshot that does not tell the size of its
/// disk has the disk's. Says whether anything was added.
///
/// # Errors
/// [`Error::Host`], and [`Error::Unsupported`] for a table that would pass its limits.
pub(super) async fn complete_snapshots(
    file: &HostFile,
    report: &CheckReport,
    done: &mut CheckReport,
) -> Result<bool, Error> {
    let header = read_header(file).await?;
    let short = short_snapshots(file, &header).await?;
    let is_all = report.corruptions == short.len() as u64 && report.check_errors == 0;
    // There are no snapshots of data that lies elsewhere.
    if short.is_empty() || !is_all || report.refused.is_some() || header.has_data_file() {
        return Ok(false);
    }
    match rewrite(file, header).await {
        Ok(()) => {}
        // It stays reported.
        Err(
            Error::Corrupt { .. }
            | Error::Unsupported { .. }
            | Error::Damaged { .. }
            | Error::Uncountable { .. },
        ) => return Ok(false),
        Err(error) => return Err(error),
    }
    short.into_iter().for_each(|snapshot| done.fixed(Finding::ShortSnapshot { snapshot }));
    Ok(true)
}

/// Puts the present state in place once more, in which every snapshot tells all.
async fn rewrite(file: &HostFile, header: Header) -> Result<(), Error> {
    // Guest data is neither read nor written, so that neither a backing file nor a passphrase is needed.
    let live = Live {
        file: file.clone(),
        data: None,
        backing: None,
        below: None,
        cipher: None,
        unlock_time: crate::DEFAULT_UNLOCK_TIME,
    };
    let inner = start(live, header, false).await?.inner;
    let written = inner.republish(|present| Ok(present.unchanged())).await;
    let closed = inner.close().await;
    written.and(closed)
}

/// The positions of entries that lack what version 3 demands.
///
/// # Errors
/// [`Error::Host`], and [`Error::Corrupt`] for a table that cannot be read.
pub(super) async fn short_snapshots(file: &HostFile, header: &Header) -> Result<Vec<u64>, Error> {
    if header.version < 3 {
        return Ok(Vec::new());
    }
    let table = salvage_snapshots(file, header).await?;
    let short = (0u64..).zip(&table.entries).filter(|(_, entry)| entry.disk_bytes.is_none());
    Ok(short.map(|(snapshot, _)| snapshot).collect())
}
