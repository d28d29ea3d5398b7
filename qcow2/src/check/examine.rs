//! One whole look at an image that changes nothing: all counts, all comparisons, all overlaps.

use block::HostFile;

use crate::check::Repair;
use crate::check::compare::{Compared, compare, scattered};
use crate::check::copied::{Fix, check_copied};
use crate::check::overlap::Overlaps;
use crate::check::report::CheckReport;
use crate::check::snapshots::short_snapshots;
use crate::error::Error;
use crate::header::Header;
use crate::progress::Progress;
use crate::tally::{EntryPlace, Finding, Tally, Visitor};

/// The most entries with reserved space that is no cluster that one repair puts right.
const MAX_RESERVES: usize = 1 << 20;

/// What a look at an image says.
pub(super) struct Examined {
    pub tally: Tally,
    pub compared: Compared,
    pub overlaps: Overlaps,
    /// Entries that reserve space that is no cluster.
    pub reserves: Vec<EntryPlace>,
    /// What is wrong, but for COPIED flags.
    pub report: CheckReport,
}

/// Takes findings in.
struct Collector<'a> {
    report: CheckReport,
    reserves: Vec<EntryPlace>,
    progress: &'a (dyn Fn(Progress) + Send + Sync),
}

impl Visitor for Collector<'_> {
    fn fault(&mut self, finding: Finding, times: u64) {
        if let Finding::UnalignedReserve { entry, .. } = &finding
            && self.reserves.len() < MAX_RESERVES
        {
            self.reserves.push(*entry);
        }
        self.report.add(finding, times);
    }

    fn progress(&mut self, done_bytes: u64, total_bytes: u64) {
        (self.progress)(Progress { done_bytes, total_bytes });
    }
}

/// Looks at all but COPIED flags.
///
/// # Errors
/// [`Error::Host`], and [`Error::Unsupported`] for what passes the limits of a check.
pub(super) async fn examine(
    file: &HostFile,
    header: &Header,
    progress: &(dyn Fn(Progress) + Send + Sync),
) -> Result<Examined, Error> {
    let mut collector =
        Collector { report: CheckReport::default(), reserves: Vec::new(), progress };
    let mut tally = Tally::of_image(file, header, &mut collector).await?;
    let Collector { mut report, reserves, .. } = collector;
    let compared = compare(file, header, &tally, (Repair::None, true), &mut report).await?;
    let overlaps = Overlaps::find(&mut tally, header.geometry, &compared, &mut report);
    let overlaps = overlaps.map_err(|_| scattered(file))?;
    if !tally.incomplete {
        for snapshot in short_snapshots(file, header).await? {
            report.add(Finding::ShortSnapshot { snapshot }, 1);
        }
    }
    report.image_end_bytes = compared.end.0 << header.geometry.bits();
    report.total_clusters = header.geometry.clusters(header.size_bytes);
    report.allocated_clusters = tally.active.allocated;
    report.fragmented_clusters = tally.active.fragmented;
    report.compressed_clusters = tally.active.compressed;
    Ok(Examined { tally, compared, overlaps, reserves, report })
}

/// All that is wrong with an image.
///
/// # Errors
/// As [`examine`].
pub(super) async fn report(
    file: &HostFile,
    header: &Header,
    progress: &(dyn Fn(Progress) + Send + Sync),
) -> Result<CheckReport, Error> {
    let mut examined = examine(file, header, progress).await?;
    check_copied(file, header, &mut examined, Fix::None).await?;
    Ok(examined.report)
}
