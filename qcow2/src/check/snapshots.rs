//! Completing a snapshot table of version 3 that does not tell the sizes of its disks, as old versions of QEMU left it
//! behind when they made an image one of version 3. No other fault of the table is put right: the rest would be guessed.

use block::HostFile;

use crate::check::read_header;
use crate::check::report::CheckReport;
use crate::error::Error;
use crate::header::Header;
use crate::image::Live;
use crate::open::start;
use crate::snapshots::read_snapshots;
use crate::tally::Finding;

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
    let table = read_snapshots(file, header).await?;
    let short = (0u64..).zip(&table.entries).filter(|(_, entry)| entry.disk_bytes.is_none());
    Ok(short.map(|(snapshot, _)| snapshot).collect())
}
