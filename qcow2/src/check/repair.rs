//! Repairing: what a look at the image found is put right in an order in which every step alone leaves the image no
//! worse, and a last look says what is left.

use block::{ByteRange, HostFile};

use crate::check::bitmaps::mend_bitmaps;
use crate::check::compare::{compare, write_sectors};
use crate::check::copied::{Fix, check_copied};
use crate::check::examine::{self, Examined, examine};
use crate::check::rebuild::rebuild;
use crate::check::report::{CheckReport, Refusal};
use crate::check::separate::{separate_data, separate_tables};
use crate::check::snapshots::{complete_snapshots, mend_snapshots};
use crate::check::{Repair, read_header};
use crate::error::{Error, TableKind};
use crate::fields::{ALL_ALLOCATED, ALL_ZERO, ZERO, halves};
use crate::header::{BITMAPS, CORRUPT, DIRTY, Header};
use crate::progress::Progress;
use crate::switch::switch_header;
use crate::tally::{EntryPlace, Finding};
use crate::units::{HostOffset, SECTOR_BYTES, index};

type Watch<'a> = &'a (dyn Fn(Progress) + Send + Sync);

/// Repairs an image.
///
/// # Errors
/// [`Error::Host`], and [`Error::Unsupported`] for what passes the limits of a check.
pub(super) async fn repair(
    file: &HostFile,
    mut header: Header,
    repair: Repair,
    progress: Watch<'_>,
) -> Result<CheckReport, Error> {
    let mut examined = examine(file, &header, progress).await?;
    let mut done = CheckReport::default();
    if repair == Repair::All && mend_bitmaps(file, &mut header, &mut done).await? {
        examined = examine(file, &header, progress).await?;
    }
    if repair == Repair::All && mend_snapshots(file, &mut header, &examined, &mut done).await? {
        examined = examine(file, &header, progress).await?;
    }
    let refusal = if examined.tally.incomplete {
        Some(Refusal::Incomplete)
    } else if examined.compared.needs_rebuild && repair != Repair::All {
        Some(Refusal::NeedsRebuild)
    } else {
        None
    };
    if refusal.is_some() {
        check_copied(file, &header, &mut examined, Fix::None).await?;
        examined.report.refused = refusal;
        take_fixed(done, &mut examined.report);
        return Ok(examined.report);
    }
    withdraw_unknown(file, &mut header).await?;
    if repair == Repair::All {
        drop_stale_bitmaps(file, &mut header).await?;
        if !examined.overlaps.is_empty()
            && separate_tables(file, &header, &examined, &mut done).await?
        {
            examined = examine(file, &header, progress).await?;
        }
        if !examined.overlaps.is_empty()
            && separate_data(file, &header, &examined, &mut done).await?
        {
            examined = examine(file, &header, progress).await?;
        }
        // Only now is every table alone where it lies.
        if fix_reserves(file, &header, &examined, &mut done).await? {
            examined = examine(file, &header, progress).await?;
        }
        examined.compared.needs_rebuild |= examined.overlaps.refcounts;
    }
    let is_lost = examined.report.findings.iter().any(leads_astray);
    if examined.compared.needs_rebuild {
        match rebuild(file, &header, &examined.tally).await? {
            Ok(new) => header = new,
            Err(refusal) => done.refused = Some(refusal),
        }
        // All refcounts are right now, or nothing has changed.
        let before = examined.report;
        examined = examine(file, &header, progress).await?;
        note_rebuilt(&before, &examined.report, &mut done);
    } else {
        let mut scratch = CheckReport::default();
        let (tally, report) = (&examined.tally, &mut scratch);
        examined.compared = compare(file, &header, tally, (repair, is_lost), report).await?;
        file.sync().await?;
        take_fixed(scratch, &mut done);
    }
    let fix = match repair {
        // Flags follow refcounts, and these are still wrong.
        _ if done.refused.is_some() => Fix::None,
        Repair::All => Fix::All,
        Repair::Leaks | Repair::None => Fix::Lowered,
    };
    examined.report = CheckReport::default();
    check_copied(file, &header, &mut examined, fix).await?;
    file.sync().await?;
    take_fixed(examined.report, &mut done);
    drop(examined.tally);
    let mut report = finish(file, repair, done, progress).await?;
    if is_lost && report.leaks > 0 && report.refused.is_none() {
        report.refused = Some(Refusal::LostTable);
    }
    Ok(report)
}

/// Whether a table of guest data is somewhere else than its entry says.
fn leads_astray(finding: &Finding) -> bool {
    use TableKind::{L1, SnapshotL1};
    matches!(
        finding,
        Finding::Unaligned { entry: EntryPlace { table: L1 | SnapshotL1, .. }, .. }
            | Finding::BehindFile { entry: EntryPlace { table: L1 | SnapshotL1, .. }, .. }
    )
}

/// The last look, and what a clean image gets for it.
async fn finish(
    file: &HostFile,
    repair: Repair,
    mut done: CheckReport,
    progress: Watch<'_>,
) -> Result<CheckReport, Error> {
    let mut header = read_header(file).await?;
    let mut report = examine::report(file, &header, progress).await?;
    if repair == Repair::All && complete_snapshots(file, &report, &mut done).await? {
        header = read_header(file).await?;
        report = examine::report(file, &header, progress).await?;
    }
    report.repaired = done.repaired;
    report.leaks_fixed = done.leaks_fixed;
    report.corruptions_fixed = done.corruptions_fixed;
    report.refused = done.refused;
    if repair == Repair::All && report.is_consistent() && (header.is_dirty() || header.is_corrupt())
    {
        let mut new = header.clone();
        new.set_incompatible(DIRTY | CORRUPT, false);
        switch_header(file, &header, &mut new).await?;
    }
    Ok(report)
}

/// Adds what was put right.
fn take_fixed(from: CheckReport, done: &mut CheckReport) {
    let (leaks, corruptions) = (done.leaks_fixed, done.corruptions_fixed);
    for finding in from.repaired {
        done.fixed(finding);
    }
    // What is not listed counts all the same.
    done.leaks_fixed = leaks + from.leaks_fixed;
    done.corruptions_fixed = corruptions + from.corruptions_fixed;
}

/// What is gone after refcounts were made anew has been put right.
fn note_rebuilt(before: &CheckReport, after: &CheckReport, done: &mut CheckReport) {
    let (leaks, corruptions) = (done.leaks_fixed, done.corruptions_fixed);
    for finding in before.findings.iter().filter(|finding| !after.findings.contains(finding)) {
        done.fixed(finding.clone());
    }
    done.leaks_fixed = leaks + before.leaks.saturating_sub(after.leaks);
    done.corruptions_fixed = corruptions + before.corruptions.saturating_sub(after.corruptions);
}

/// Before anything changes: what the image says of data that is not kept up to date here is withdrawn.
async fn withdraw_unknown(file: &HostFile, header: &mut Header) -> Result<(), Error> {
    let mut new = header.clone();
    new.clear_autoclear();
    if new == *header {
        return Ok(());
    }
    switch_header(file, header, &mut new).await?;
    *header = new;
    Ok(())
}

/// Bitmaps that a program without knowledge of them has made worthless: their clusters count as leaked, so nothing may
/// lead to them any longer.
async fn drop_stale_bitmaps(file: &HostFile, header: &mut Header) -> Result<(), Error> {
    if header.extensions.bitmaps.is_none() || header.autoclear & BITMAPS != 0 {
        return Ok(());
    }
    let mut new = header.clone();
    new.extensions.bitmaps = None;
    switch_header(file, header, &mut new).await?;
    *header = new;
    Ok(())
}

/// Makes entries that reserve space in the middle of clusters plain zeros. Says whether there was one.
async fn fix_reserves(
    file: &HostFile,
    header: &Header,
    examined: &Examined,
    done: &mut CheckReport,
) -> Result<bool, Error> {
    let mut any = false;
    for entry in &examined.reserves {
        let cluster = header.geometry.host_cluster(entry.at);
        if !examined.overlaps.contains(cluster) {
            any |= fix_reserve(file, header, *entry, done).await?;
        }
    }
    if any {
        file.sync().await?;
    }
    Ok(any)
}

async fn fix_reserve(
    file: &HostFile,
    header: &Header,
    entry: EntryPlace,
    done: &mut CheckReport,
) -> Result<bool, Error> {
    let start = entry.at.0 / SECTOR_BYTES * SECTOR_BYTES;
    let range = ByteRange::between(start, start + SECTOR_BYTES);
    let mut sector = file.read(range).await?.to_vec();
    let place = index(entry.at.0 - start);
    let (raw, bitmap) = halves(sector.get(place..).unwrap_or_default());
    let mut fixed = Vec::new();
    if header.geometry.is_extended() {
        // What had a place reads as zeros, as before.
        let zero = (bitmap | bitmap << 32) & ALL_ZERO;
        fixed.extend_from_slice(&0u64.to_be_bytes());
        fixed.extend_from_slice(&(zero & !ALL_ALLOCATED).to_be_bytes());
    } else {
        fixed.extend_from_slice(&ZERO.to_be_bytes());
    }
    let Some(bytes) = sector.get_mut(place..place + fixed.len()) else { return Ok(false) };
    bytes.copy_from_slice(&fixed);
    write_sectors(file, HostOffset(start), &sector, &[0]).await?;
    done.fixed(Finding::UnalignedReserve { entry, raw });
    Ok(true)
}
