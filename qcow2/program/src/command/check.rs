//! `check`: whether an image is consistent, and repairing it.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, bail};
use qcow2::{
    CheckOptions, CheckReport, Finding, HostOffset, Image, MAX_LISTED_FINDINGS, Repair, TableKind,
};
use serde::Serialize;

use crate::cache::Cache;
use crate::format::{self, Format, could_not_open};
use crate::open::{self, Access, How, Named};
use crate::output::{Output, print, print_json, report};
use crate::progress::Progress;
use crate::stop::Stop;

/// Say whether an image is consistent, and repair it
///
/// Ends with 0 where it is, 2 where it is corrupted, 3 where clusters are leaked and nothing else is wrong, 1 where
/// the check or the repair could not be made, and 63 where the format has no checks. After a repair the code tells
/// what is still wrong. Each finding is a line on standard error, up to 100 of each kind.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The format of the image; qcow2 is recognised, everything else is said
    #[arg(short, long, value_name = "FMT")]
    format: Option<Format>,

    /// FILE is a list of options: driver=qcow2,file.filename=PATH
    #[arg(long)]
    image_opts: bool,

    /// Repair: `leaks` only what wastes space, `all` everything that can be without guessing at data
    #[arg(short, long, value_name = "WHAT", conflicts_with = "force_share")]
    repair: Option<What>,

    /// Print nothing but errors
    #[arg(short, long)]
    quiet: bool,

    /// Show progress
    #[arg(short, long)]
    progress: bool,

    /// Taken for qemu-img's sake: metadata is read through the page cache
    #[arg(short = 'T', long = "cache", value_name = "CACHE")]
    source_cache: Option<Cache>,

    /// Read it although another program may be writing it
    #[arg(short = 'U', long)]
    force_share: bool,

    /// How to write the result
    #[arg(long, value_name = "OFMT", default_value = "human")]
    output: Output,

    #[command(flatten)]
    access: Access,

    /// The image
    #[arg(value_name = "FILE")]
    file: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum What {
    /// Clusters that are counted and not used
    Leaks,
    /// Whatever can be repaired
    All,
}

const FAILED: u8 = 1;
const CORRUPT: u8 = 2;
const LEAKS: u8 = 3;
const NO_CHECKS: u8 = 63;

/// The result.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Result {
    #[serde(skip_serializing_if = "is_zero")]
    image_end_offset: u64,
    #[serde(skip_serializing_if = "is_zero")]
    total_clusters: u64,
    check_errors: u64,
    #[serde(skip_serializing_if = "is_zero")]
    corruptions: u64,
    #[serde(skip_serializing_if = "is_zero")]
    leaks: u64,
    #[serde(skip_serializing_if = "is_zero")]
    corruptions_fixed: u64,
    #[serde(skip_serializing_if = "is_zero")]
    leaks_fixed: u64,
    #[serde(skip_serializing_if = "is_zero")]
    allocated_clusters: u64,
    #[serde(skip_serializing_if = "is_zero")]
    fragmented_clusters: u64,
    #[serde(skip_serializing_if = "is_zero")]
    compressed_clusters: u64,
    filename: String,
    format: &'static str,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for this form")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl Result {
    fn of(report: &CheckReport, filename: String) -> Self {
        Self {
            image_end_offset: report.image_end_bytes,
            total_clusters: report.total_clusters,
            check_errors: report.check_errors,
            corruptions: report.corruptions,
            leaks: report.leaks,
            corruptions_fixed: report.corruptions_fixed,
            leaks_fixed: report.leaks_fixed,
            allocated_clusters: report.allocated_clusters,
            fragmented_clusters: report.fragmented_clusters,
            compressed_clusters: report.compressed_clusters,
            filename,
            format: Format::Qcow2.name(),
        }
    }

    fn text(&self) -> String {
        let mut text = String::new();
        if self.corruptions_fixed > 0 || self.leaks_fixed > 0 {
            text += &format!(
                "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    {} \
                 corruptions\n\nDouble checking the fixed image now...\n",
                self.leaks_fixed, self.corruptions_fixed
            );
        }
        if self.corruptions == 0 && self.leaks == 0 && self.check_errors == 0 {
            text += "No errors were found on the image.\n";
        }
        if self.corruptions > 0 {
            text += &format!(
                "\n{} errors were found on the image.\nData may be corrupted, or further writes to the image may \
                 corrupt it.\n",
                self.corruptions
            );
        }
        if self.leaks > 0 {
            text += &format!(
                "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no harm to \
                 data.\n",
                self.leaks
            );
        }
        if self.check_errors > 0 {
            text += &format!(
                "\n{} internal errors have occurred during the check.\n",
                self.check_errors
            );
        }
        if self.total_clusters > 0 && self.allocated_clusters > 0 {
            text += &format!(
                "{}/{} = {}% allocated, {}% fragmented, {}% compressed clusters\n",
                self.allocated_clusters,
                self.total_clusters,
                percent(self.allocated_clusters, self.total_clusters),
                percent(self.fragmented_clusters, self.allocated_clusters),
                percent(self.compressed_clusters, self.allocated_clusters)
            );
        }
        if self.image_end_offset > 0 {
            text += &format!("Image end offset: {}\n", self.image_end_offset);
        }
        text
    }

    /// What is wrong with an image that could be checked.
    fn code(&self) -> u8 {
        match (self.corruptions, self.leaks) {
            (0, 0) => 0,
            (0, _) => LEAKS,
            (_, _) => CORRUPT,
        }
    }
}

/// With two digits behind the point.
#[expect(clippy::cast_precision_loss, reason = "people read two digits of it")]
fn percent(part: u64, whole: u64) -> String {
    format!("{:.2}", part as f64 * 100.0 / whole as f64)
}

pub(crate) async fn run(options: Options, stop: &Stop) -> anyhow::Result<u8> {
    let named = Named::parse(&options.file, options.format, options.image_opts)?;
    let Some(path) = named.place.path() else {
        bail!("{}: an export is a disk, and has nothing to check", options.file);
    };
    let how = named.how(&match options.repair {
        None => How::reading(None, options.force_share),
        Some(_) => How::writing(None),
    })?;
    if named.format.map_or_else(|| format::recognise(path), Ok)? != Format::Qcow2 {
        // Opened, so that what is not there at all is no matter of formats.
        let how = How::reading(None, how.shared);
        open::open(&named, &how, &options.access).await?.close().await?;
        report(&anyhow::anyhow!("This image format does not support checks here: only qcow2 does"));
        return Ok(NO_CHECKS);
    }
    let found = check(path, &how, &options, stop).await?;
    tell_findings(&found, cluster_bytes(path).await);
    let result = Result::of(&found, options.file.clone());
    match options.output {
        _ if options.quiet => {}
        Output::Human => print(&result.text())?,
        Output::Json => print_json(&result)?,
    }
    if let Some(refused) = &found.refused {
        report(&anyhow::anyhow!("{}: not repaired: {refused}", path.display()));
    }
    let failed = result.check_errors > 0 || found.refused.is_some();
    if failed {
        report(&anyhow::anyhow!("Check failed"));
    }
    Ok(if failed { FAILED } else { result.code() })
}

async fn check(
    path: &Path,
    how: &How,
    options: &Options,
    stop: &Stop,
) -> anyhow::Result<CheckReport> {
    let what = CheckOptions {
        repair: match options.repair {
            None => Repair::None,
            Some(What::Leaks) => Repair::Leaks,
            Some(What::All) => Repair::All,
        },
        lock: !how.shared,
    };
    let progress = Progress::new(options.progress, options.quiet, 1);
    let told = |now: qcow2::Progress| progress.set(now.done_bytes, now.total_bytes);
    let found = stop.or(async {
        Image::check(path, what, told).await.map_err(|error| open::explained(error, path, how))
    });
    let found = found.await;
    progress.end(found.is_ok());
    found
}

async fn cluster_bytes(path: &Path) -> u64 {
    let seen = Image::inspect(path).await;
    seen.with_context(|| could_not_open(path)).map_or(1, |seen| seen.info.cluster_bytes.max(1))
}

/// One line for each finding, in the words that scripts know where there are some. Wrong counts are told before they
/// are told to be repaired.
fn tell_findings(found: &CheckReport, cluster_bytes: u64) {
    let mut err = std::io::stderr().lock();
    let counts = found.repaired.iter().filter(|finding| is_count(finding));
    let lines = (counts.map(|finding| (finding, false)))
        .chain(found.repaired.iter().map(|finding| (finding, true)))
        .chain(found.findings.iter().map(|finding| (finding, false)));
    for (finding, repaired) in lines {
        let _unheard = writeln!(err, "{}", line(finding, repaired, cluster_bytes));
    }
    let told = found.findings.len() as u64;
    let all = found.leaks + found.corruptions + found.check_errors;
    if all > told {
        let rest = all - told;
        let _unheard = writeln!(err, "{rest} more (of each kind {MAX_LISTED_FINDINGS} are listed)");
    }
}

fn is_count(finding: &Finding) -> bool {
    matches!(finding, Finding::Leaked { .. } | Finding::CountTooLow { .. })
}

fn line(finding: &Finding, repaired: bool, cluster_bytes: u64) -> String {
    let cluster = |at: &HostOffset| at.0 / cluster_bytes;
    let verb = match finding {
        _ if repaired => "Repairing",
        Finding::Leaked { .. } => "Leaked",
        _ => "ERROR",
    };
    match finding {
        Finding::Leaked { at, refcount, references }
        | Finding::CountTooLow { at, refcount, references } => {
            format!("{verb} cluster {} refcount={refcount} reference={references}", cluster(at))
        }
        Finding::CopiedFlag { entry, raw, refcount } => {
            let what = match entry.table {
                TableKind::L2 => format!("data cluster: l2_entry={raw:x}"),
                _ => format!("L2 cluster: l1_index={} l1_entry={raw:x}", entry.index),
            };
            // Where it was matters to whoever has to put it right.
            let place = if repaired { String::new() } else { format!(" ({entry})") };
            format!("{verb} OFLAG_COPIED {what} refcount={refcount}{place}")
        }
        other => format!("{verb} {other}"),
    }
}
