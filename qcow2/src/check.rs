//! Checking an image and repairing it, exact to the cluster. The counting is `tally`'s; here counts are compared with
//! what the image says, and what the image says is corrected.

mod bitmaps;
mod compare;
mod copied;
mod examine;
mod overlap;
mod rebuild;
mod repair;
mod report;
mod separate;
mod snapshots;

use std::path::Path;

use block::{ByteRange, HostFile};

use crate::error::{Corruption, Error, Fault, Feature, TableKind};
use crate::header::{Header, MAX_REFCOUNT_TABLE_BYTES};
use crate::image::Image;
use crate::progress::Progress;
use crate::tally::{Finding, Tally};
use crate::units::{HOST_OFFSET_END, HostCluster, HostOffset, SECTOR_BYTES};

pub use report::{CheckReport, MAX_LISTED_FINDINGS, Refusal};

/// What a check may change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Repair {
    /// Nothing.
    #[default]
    None,
    /// Refcounts that are too high become what they ought to be, and COPIED flags that this makes wrong. Nothing else.
    Leaks,
    /// All that can be repaired without guessing at data: refcounts, COPIED flags, reserved space that is no cluster, a
    /// refcount table that is lost, sizes of disks that snapshots do not tell. What lies in clusters of metadata and is
    /// something else, too, is copied to clusters of its own. Internal snapshots that cannot be read are removed.
    /// Bitmaps that cannot be read are removed or become inconsistent: all of them where their directory is broken.
    /// Where the image is clean then, its dirty and corrupt bits go.
    All,
}

/// How to check an image.
#[derive(Clone, Debug)]
pub struct CheckOptions {
    /// What may be changed.
    pub repair: Repair,
    /// Take QEMU's image locks.
    pub lock: bool,
}

impl Default for CheckOptions {
    /// Locked, changing nothing.
    fn default() -> Self {
        Self { repair: Repair::None, lock: true }
    }
}

impl Image {
    /// Counts every reference in the image file and compares what it finds with what the file says of itself. Opens
    /// neither backing nor data files. Guest data is not read.
    ///
    /// Memory is bounded whatever the file holds. `progress` is told how much of the L2 tables has been read, once for
    /// every pass; a repair has several.
    ///
    /// A repair that is interrupted leaves an image that can be repaired again.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use qcow2::{CheckOptions, CreateOptions, Image, Repair};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("disk.qcow2");
    /// # tokio::runtime::Builder::new_current_thread().build()?.block_on(async {
    /// Image::create(&path, &CreateOptions::new(1 << 30)).await?;
    /// let options = CheckOptions { repair: Repair::All, ..CheckOptions::default() };
    /// let report = Image::check(&path, options, |_| {}).await?;
    /// for finding in &report.findings {
    ///     println!("{finding}");
    /// }
    /// assert!(report.is_clean());
    /// # Ok(()) })
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Host`]; [`Error::Corrupt`] and [`Error::Unsupported`] for a file whose header cannot be understood or
    /// that passes the limits of a check. What is wrong behind the header is no error but in the report.
    pub async fn check(
        path: &Path,
        options: CheckOptions,
        progress: impl Fn(Progress) + Send + Sync,
    ) -> Result<CheckReport, Error> {
        let host = block::OpenOptions {
            read_only: options.repair == Repair::None,
            direct: false,
            lock: options.lock,
            ..block::OpenOptions::default()
        };
        let file = HostFile::open(path, host).await?;
        check_file(&file, options.repair, &progress).await
    }

    /// Checks the image in a file that is open already, and that nobody else changes meanwhile.
    ///
    /// # Errors
    /// As [`Image::check`].
    pub async fn check_on(
        file: &HostFile,
        repair: Repair,
        progress: impl Fn(Progress) + Send + Sync,
    ) -> Result<CheckReport, Error> {
        check_file(file, repair, &progress).await
    }
}

/// Checks the image in a file that is open.
async fn check_file(
    file: &HostFile,
    repair: Repair,
    progress: &(dyn Fn(Progress) + Send + Sync),
) -> Result<CheckReport, Error> {
    let header = read_header(file).await?;
    match repair {
        Repair::None => examine::report(file, &header, progress).await,
        Repair::Leaks | Repair::All => repair::repair(file, header, repair, progress).await,
    }
}

/// Makes the refcounts of an image exact that was not closed cleanly, and clears its dirty bit. Before that is done,
/// no cluster may be called free.
///
/// # Errors
/// As [`Image::check`], and [`Feature::WritingDirty`] where something stays wrong.
pub(crate) async fn rebuild_dirty(file: &HostFile) -> Result<(), Error> {
    let report = check_file(file, Repair::All, &|_| {}).await?;
    if report.is_clean() {
        return Ok(());
    }
    Err(Fault::Unsupported(Feature::WritingDirty).of(file.path()))
}

/// The first cluster in `tally`, which is that of the image in `file`, that is used more often than it is counted.
///
/// # Errors
/// As [`Image::check`].
pub(crate) async fn find_miscount(
    file: &HostFile,
    header: &Header,
    tally: &Tally,
) -> Result<Option<Finding>, Error> {
    let mut report = CheckReport::default();
    compare::compare(file, header, tally, (Repair::None, true), &mut report).await?;
    Ok(report.findings.into_iter().find(|finding| !finding.is_leak()))
}

/// Reads a header without insisting that what it names lies in the file.
async fn read_header(file: &HostFile) -> Result<Header, Error> {
    let fault = |fault: Fault| fault.of(file.path());
    let start = file.read(ByteRange::between(0, SECTOR_BYTES.min(file.len()))).await?;
    let needed = Header::needed_bytes(&start).map_err(fault)?;
    let cluster = file.read(ByteRange::between(0, needed.min(file.len()))).await?;
    let header = Header::parse(&cluster).map_err(fault)?;
    check_limits(&header).map_err(fault)?;
    Ok(header)
}

/// What must hold before tables can be walked: all that opening asks of a header, but for bitmaps and the refcount table,
/// which can be taken away and made anew, and for the end of the file, behind which tables are found to lie.
fn check_limits(header: &Header) -> Result<(), Fault> {
    let geometry = header.geometry;
    let mut sane = header.clone();
    sane.move_refcount_table(geometry.host_offset(HostCluster(1)), 1);
    // Bitmaps may be taken away.
    sane.set_bitmaps(None);
    sane.check(HOST_OFFSET_END)?;
    let bytes = header.refcount_table_clusters.saturating_mul(geometry.bytes());
    if bytes > MAX_REFCOUNT_TABLE_BYTES {
        let (table, limit) = (TableKind::RefcountTable, MAX_REFCOUNT_TABLE_BYTES);
        return Err(Fault::Unsupported(Feature::TableTooLarge { table, bytes, limit }));
    }
    // Where nothing can be, nobody opens the image, be the table empty or not.
    let place = header.snapshots_at;
    if !geometry.is_aligned(place.0) || place.0 >= HOST_OFFSET_END {
        let what = Corruption::TablePlace { table: TableKind::Snapshots, value: place.0 };
        return Err(Fault::Corrupt { at: HostOffset(64), what });
    }
    Ok(())
}
