//! Counts that were taken against the refcounts that the image keeps. Refcounts are corrected where they lie; a table
//! that is lost is made anew elsewhere.

use block::{ByteRange, HostFile};
use bytes::Bytes;

use crate::check::Repair;
use crate::check::report::{CheckReport, MAX_LISTED_FINDINGS};
use crate::error::{Error, Fault, Feature};
use crate::fields::REFCOUNT_TABLE_RESERVED;
use crate::header::Header;
use crate::refcount::{RefcountWidth, Used};
use crate::tally::{Counts, Finding, MAX_COUNTS_BYTES, Tally, TooScattered};
use crate::units::{ClusterGeometry, HostCluster, HostOffset, Run, SECTOR_BYTES, index};

/// The most clusters of a file that is checked: a bound on time, which QEMU has, too.
const MAX_CHECKED_CLUSTERS: u64 = i32::MAX as u64;
/// The memory for refcounts that differ, beside that for the counts, in bytes.
const DIFFERING_BYTES: u64 = 80 << 20;

/// What the comparison of all clusters says.
#[derive(Debug)]
pub(super) struct Compared {
    /// The refcounts of clusters that are referenced and have another refcount than references: one more each, so that
    /// 0 can be told from none.
    differing: Counts,
    /// Clusters whose refcount a repair lowered to one.
    pub lowered_to_one: Counts,
    /// Clusters are in use that the image takes for free: refcounts must be made anew.
    pub needs_rebuild: bool,
    /// The cluster behind the last one in use.
    pub end: HostCluster,
    /// The largest refcount.
    pub max: u64,
    /// Clusters from here on are not in the file.
    outside: HostCluster,
}

impl Compared {
    /// The refcount that the image keeps for a cluster.
    pub(super) fn refcount(&self, cluster: HostCluster, tally: &Tally) -> u64 {
        if cluster >= self.outside {
            return 0;
        }
        match self.differing.get(cluster) {
            0 => tally.counts.get(cluster).min(self.max),
            more => more - 1,
        }
    }

    /// Whether a refcount is wrong.
    pub(super) fn differs(&self, cluster: HostCluster) -> bool {
        self.differing.get(cluster) != 0
    }
}

/// Compares all refcounts with what was counted, and corrects those that `repair` may: never from 0 upwards, and
/// downwards only where leaks do not stay.
///
/// # Errors
/// [`Error::Host`], and [`Feature`] for what passes the limits of a check.
pub(super) async fn compare(
    file: &HostFile,
    header: &Header,
    tally: &Tally,
    (repair, leaks_stay): (Repair, bool),
    report: &mut CheckReport,
) -> Result<Compared, Error> {
    let geometry = header.geometry;
    let outside = tally.end(geometry, file.len());
    if outside.0 > MAX_CHECKED_CLUSTERS {
        let feature = Feature::FileTooLarge { bytes: file.len() };
        return Err(Fault::Unsupported(feature).of(file.path()));
    }
    let width = RefcountWidth::new(header.refcount_order).unwrap_or(RefcountWidth::DEFAULT);
    let budget = DIFFERING_BYTES + MAX_COUNTS_BYTES.saturating_sub(tally.counts.bytes());
    let mut comparison = Comparison {
        geometry,
        width,
        tally,
        repair,
        leaks_stay,
        report,
        compared: Compared {
            differing: Counts::within(budget),
            lowered_to_one: Counts::within(budget),
            needs_rebuild: tally.broken_refcounts,
            end: HostCluster(0),
            max: width.max(),
            outside,
        },
        used: None,
        listed: 0,
    };
    let per_block = width.per_block(geometry);
    let mut next = 0;
    // Hostile tables name one block many times.
    let mut last = (0, Bytes::new());
    for (number, raw) in (0u64..).zip(&tally.refcount_table).filter(|(_, raw)| **raw != 0) {
        let start = number * per_block;
        if start >= outside.0 {
            break;
        }
        let at = raw & !REFCOUNT_TABLE_RESERVED;
        if !geometry.is_aligned(at) || at >= file.len() {
            continue;
        }
        comparison.without_block(next, start).map_err(|_| scattered(file))?;
        next = (start + per_block).min(outside.0);
        if at != last.0 || repair != Repair::None {
            comparison.used = None;
            last = (at, file.read(ByteRange::between(at, at + geometry.bytes())).await?);
        }
        let mut block = last.1.to_vec();
        let mut changed = comparison.block(start, next, &mut block).map_err(|_| scattered(file))?;
        if repair == Repair::All {
            // Left by a write of refcounts whose clusters never came; they would be leaks once the file reaches there.
            changed.extend(comparison.forget_outside(next - start, per_block, &mut block));
            changed.dedup();
        }
        write_sectors(file, HostOffset(at), &block, &changed).await?;
    }
    comparison.without_block(next, outside.0).map_err(|_| scattered(file))?;
    Ok(comparison.compared)
}

pub(super) fn scattered(file: &HostFile) -> Error {
    let feature = Feature::ScatteredReferences { limit: MAX_COUNTS_BYTES };
    Fault::Unsupported(feature).of(file.path())
}

/// Writes the sectors (by number, in order) of a table that changed.
pub(super) async fn write_sectors(
    file: &HostFile,
    at: HostOffset,
    table: &[u8],
    sectors: &[u64],
) -> Result<(), Error> {
    for run in sectors.chunk_by(|one, next| one + 1 == *next) {
        let (Some(first), Some(last)) = (run.first(), run.last()) else { continue };
        let (start, end) = (first * SECTOR_BYTES, (last + 1) * SECTOR_BYTES);
        let end = index(end).min(table.len());
        let bytes = table.get(index(start)..end).unwrap_or_default().to_vec();
        file.write(at.0 + start, bytes.into(), None).await?;
    }
    Ok(())
}

struct Comparison<'a> {
    geometry: ClusterGeometry,
    width: RefcountWidth,
    tally: &'a Tally,
    repair: Repair,
    /// Leaks may be something else, and are only told.
    leaks_stay: bool,
    report: &'a mut CheckReport,
    compared: Compared,
    /// How much of the block at hand is in use, among so many slots, once that is known.
    used: Option<(u64, Used)>,
    /// Leaks of whole blocks that were listed one by one.
    listed: usize,
}

impl Comparison<'_> {
    /// Clusters for which there is no block: their refcounts are 0.
    fn without_block(&mut self, start: u64, end: u64) -> Result<(), TooScattered> {
        let tally = self.tally;
        for (cluster, references) in tally.counts.between(HostCluster(start), HostCluster(end)) {
            self.cluster(cluster, 0, references)?;
        }
        Ok(())
    }

    /// The refcounts of a block, corrected. Says which sectors changed.
    fn block(&mut self, start: u64, end: u64, block: &mut [u8]) -> Result<Vec<u64>, TooScattered> {
        let tally = self.tally;
        let mut counted = tally.counts.between(HostCluster(start), HostCluster(end)).peekable();
        let mut changed = Vec::new();
        if counted.peek().is_none() && self.repair == Repair::None {
            self.all_leaked(start, end, block);
            return Ok(changed);
        }
        for cluster in (start..end).map(HostCluster) {
            let slot = cluster.0 - start;
            let refcount = self.width.get(block, slot);
            let references = counted.next_if(|(at, _)| *at == cluster).map_or(0, |(_, many)| many);
            if refcount == 0 && references == 0 {
                continue;
            }
            let right = self.cluster(cluster, refcount, references)?;
            if right != refcount && self.width.set(block, slot, right) {
                let sector = (slot << self.width.order()) / 8 / SECTOR_BYTES;
                if changed.last() != Some(&sector) {
                    changed.push(sector);
                }
            }
        }
        Ok(changed)
    }

    /// Clears the refcounts `from..end` of a block, whose clusters are not in the file. Says which sectors changed.
    fn forget_outside(&self, from: u64, end: u64, block: &mut [u8]) -> Vec<u64> {
        let mut changed = Vec::new();
        for slot in from..end {
            if self.width.get(block, slot) != 0 && self.width.set(block, slot, 0) {
                changed.push((slot << self.width.order()) / 8 / SECTOR_BYTES);
            }
        }
        changed.dedup();
        changed
    }

    /// A block for clusters that nothing references. Hostile images have very many of them, most often the same.
    fn all_leaked(&mut self, start: u64, end: u64, block: &[u8]) {
        let slots = end - start;
        let used = match self.used {
            Some((known, used)) if known == slots => used,
            _ => self.width.used(block, slots),
        };
        self.used = Some((slots, used));
        let listed = self.listed < MAX_LISTED_FINDINGS && used.count > 0;
        let mut counted = 0;
        for slot in (0..slots).filter(|_| listed) {
            let refcount = self.width.get(block, slot);
            if refcount != 0 && self.listed < MAX_LISTED_FINDINGS {
                let at = self.geometry.host_offset(HostCluster(start + slot));
                self.report.add(Finding::Leaked { at, refcount, references: 0 }, 1);
                self.listed += 1;
                counted += 1;
            }
        }
        self.report.leaks += used.count - counted;
        if used.count > 0 {
            self.compared.end = HostCluster(start + used.end);
        }
    }

    /// Judges a cluster that is counted or used, and says what its refcount is to be.
    fn cluster(
        &mut self,
        cluster: HostCluster,
        refcount: u64,
        references: u64,
    ) -> Result<u64, TooScattered> {
        self.compared.end = HostCluster(cluster.0 + 1);
        let at = self.geometry.host_offset(cluster);
        let max = self.width.max();
        if references > max {
            let finding = Finding::CountOverflow { at, references, limit: max };
            self.report.add(finding, references - max);
        }
        let right = references.min(max);
        if refcount == right {
            return Ok(refcount);
        }
        let (finding, may_fix) = if refcount > right {
            let finding = Finding::Leaked { at, refcount, references };
            (finding, self.repair != Repair::None && !self.leaks_stay)
        } else {
            self.compared.needs_rebuild |= refcount == 0;
            let finding = Finding::CountTooLow { at, refcount, references };
            (finding, self.repair == Repair::All && refcount > 0)
        };
        if may_fix {
            self.report.fixed(finding);
            if refcount > right && right == 1 {
                self.compared.lowered_to_one.add(Run::one(cluster), 1)?;
            }
            return Ok(right);
        }
        self.report.add(finding, 1);
        if references > 0 {
            self.compared.differing.add(Run::one(cluster), refcount.saturating_add(1))?;
        }
        Ok(refcount)
    }
}
